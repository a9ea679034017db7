"""How is the failure of a bare function shown without dpocheck?  By calling it with the numbers."""

from __future__ import annotations

from dpocheck.result import Report, Result


def function_script(result: Result, report: Report, subject: str) -> str | None:
    return None
