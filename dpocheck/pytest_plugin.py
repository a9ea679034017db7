"""Which options does pytest get?  Three; the rest happens in `conformance/test_conformance.py`.

Loaded in every pytest run where dpocheck is installed, so it imports nothing but pytest and says nothing unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dpocheck.piecewise import Piecewise


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dpocheck", "audit of a DPO trainer (pytest --pyargs conformance)")
    group.addoption(
        "--dpo-adapter", action="append", default=[], metavar="SPEC",
        help="a trainer to audit: trl, pkg.mod:Adapter or path/to/file.py:name; may be given several times",
    )  # fmt: skip
    group.addoption("--dpo-tier", choices=("quick", "full"), default="quick", help="which checks (default: quick)")
    group.addoption("--dpo-known", default=None, metavar="FILE", help="known failures, TOML")


@pytest.fixture(scope="session")
def dpo_audited(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Piecewise]]:
    """The subjects under audit by name, each with one worker in this process, closed at the end of the session."""
    from dpocheck.piecewise import Piecewise, known_failures
    from dpocheck.runner import Options

    known = known_failures(request.config.getoption("--dpo-known"))
    tier = request.config.getoption("--dpo-tier")
    opened: dict[str, Piecewise] = {}

    def subject(spec: str) -> Piecewise:
        if spec not in opened:
            opened[spec] = Piecewise(Options(subject=spec, tier=tier), known)
        return opened[spec]

    try:
        yield subject
    finally:
        for one in opened.values():
            one.close()
