"""How is dpocheck used from Python?  `from dpocheck import audit`; nothing heavy is imported before the call.

    from dpocheck import audit

    report = audit("trl")                       # a name or a path, in a process of its own
    report = audit(my_loss, only=["LOSS-VALUE"])  # a live function or adapter, in this process
    assert report.exit_code() == 0, [result.id for result in report.findings]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from dpocheck.experiment import Objective
    from dpocheck.result import Report

__version__ = "0.1.0"
__all__ = ["__version__", "audit"]


def audit(
    subject: Any, *, tier: str = "quick", only: Iterable[str] | str = (), seed: int = 0, jobs: int = 0,
    objective: Objective | str | None = None, tokenizer: str | Path | None = None, timeout: float = 120.0,
    memory: float = 8.0, known: str | Path | None = None, python: str | None = None,
) -> Report:  # fmt: skip
    """Audit one DPO trainer, and return what the command `dpocheck audit` would print.

    `subject`: a name ("trl"), "pkg.mod:Adapter", "file.py:name", "file.py", a command line's "file.toml"; or a live
    adapter or function, which is audited in this process (`report.header.isolation` is "none").  `tier` "quick" or
    "full"; `only` these checks, by id; `seed` of the drawn experiments; `jobs` runs side by side, 0: as many as are
    of use; `objective` the loss asked for, a record or its text ("ipo,beta=0.1"); `tokenizer` the folder of a
    tokenizer the rows are run on too; `timeout` in seconds for one answer and `memory` in GB, both for subjects given
    by name; `known` a known-failures file; `python` the interpreter of the environment that holds the trainer.

    Nothing is printed or written.  Raises `dpocheck.runner.UsageError` or `dpocheck.known.KnownError` where what is
    given cannot be audited; what the subject does wrong is in the report.
    """
    from dpocheck.asked import run

    return run(
        subject, tier=tier, only=only, seed=seed, jobs=jobs, objective=objective, tokenizer=tokenizer,
        timeout=timeout, memory=memory, known=known, python=python,
    )  # fmt: skip
