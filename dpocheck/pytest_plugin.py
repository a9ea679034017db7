"""Which options does pytest get?  Three; the rest happens in `conformance/test_conformance.py`.

Loaded in every pytest run where dpocheck is installed, so it imports nothing and says nothing where it is not used.
"""

from __future__ import annotations


def pytest_addoption(parser) -> None:
    group = parser.getgroup("dpocheck", "audit of a DPO trainer (pytest --pyargs conformance)")
    group.addoption(
        "--dpo-adapter", action="append", default=[], metavar="SPEC",
        help="a trainer to audit: trl, pkg.mod:Adapter or path/to/file.py:name; may be given several times",
    )  # fmt: skip
    group.addoption("--dpo-tier", choices=("quick", "full"), default="quick", help="which checks (default: quick)")
    group.addoption("--dpo-known", default=None, metavar="FILE", help="known failures, TOML")
