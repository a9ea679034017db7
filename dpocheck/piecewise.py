"""How is one check at a time judged, with one worker for all of them?  What pytest items and replays do.

Nothing blocks anything here: items run in any order and in several processes, and each has to say the same alone.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dpocheck import conventions, runner, smoke, vocabulary
from dpocheck.check import CHECKS, Check
from dpocheck.known import Expected, apply, load
from dpocheck.open import open_subject
from dpocheck.report.failure import long_form
from dpocheck.report.words import cause, line
from dpocheck.result import Report, Result
from dpocheck.session import Session


def ids(tier: str) -> list[str]:
    """The checks and the questions of a tier, in the order of an audit: the items of a subject."""
    questions = [question.id for question in conventions.QUESTIONS]
    return questions + [check.id for check in runner.select(runner.Options(subject="", tier=tier))]


def known_failures(path: str | None) -> tuple[Expected, ...]:
    """The entries of a known-failures file.  Raises `known.KnownError`."""
    return load(Path(path), versions()) if path else ()


def versions() -> dict[str, int]:
    """All ids that a result can carry, with their versions."""
    return {question.id: 1 for question in conventions.QUESTIONS} | {id: check.version for id, check in CHECKS.items()}


class Piecewise:
    """One subject with its worker, opened at once.  Raises `runner.UsageError`."""

    def __init__(self, options: runner.Options, known: Iterable[Expected] = ()) -> None:
        self.options, self.known = options, tuple(known)
        self.folder = tempfile.TemporaryDirectory(prefix="dpocheck-")
        try:
            self.subject = open_subject(
                options.subject, Path(self.folder.name), timeout=options.timeout, memory=options.memory,
                python=options.python,
            )  # fmt: skip
        except BaseException:
            self.folder.cleanup()
            raise
        self.subject.objective = options.objective
        self.trouble = smoke.test(self.subject)
        found = [] if self.trouble else conventions.resolve(self.subject, runner.cached_predict)
        self.answers = {result.id: result for result in found}
        self.session = Session(
            self.subject, runner.cached_predict, runner.cached_bound, tier=options.tier, blocking=False,
            seed=options.seed, shrink=options.shrink,
        )  # fmt: skip

    def __enter__(self) -> Piecewise:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.subject.close()
        self.folder.cleanup()

    def report(self, id: str, today: datetime.date) -> Report:
        """The outcome of one id, with the known failures applied: its result, and findings about its entries."""
        result = self._result(id)
        report = Report(header=runner.header(self.subject, self.options), results=(result,))
        return apply(report, [entry for entry in self.known if entry.id == id], today)

    def _result(self, id: str) -> Result:
        if id in CHECKS:
            return self.judge(CHECKS[id])
        if id in self.answers:
            return self.answers[id]
        if self.trouble:
            return unsaid(id, "error", self.trouble)
        return unsaid(id, "not-applicable", "this subject does not show which choice it makes")

    def judge(self, check: Check) -> Result:
        """The result of one check, with its diagnosis."""
        if self.trouble:
            return unsaid(check.id, "error", self.trouble)
        if check.chapter == vocabulary.CHAPTER and check.scenes:
            return vocabulary.again(self.subject, check)
        return runner.diagnosed([self.session.result(check)], self.session)[0]


def unsaid(id: str, verdict: str, reason: str) -> Result:
    """The result of a check that could not be asked."""
    if verdict == "error":
        reason = f"the adapter did not get through the smoke stage: {reason}"
    return Result(
        id=id, version=versions()[id], level="info", tier="quick", chapter="rows", stage="tokens", verdict=verdict,
        reason=reason,
    )  # fmt: skip


def settle(report: Report) -> None:
    """Turn verdicts into a pytest outcome: pass and info are passed, what does not apply is skipped, the rest fails."""
    import pytest

    wrong = [r for r in report.results if r.verdict in ("fail", "unexpected-pass", "error", "unknown")]
    if wrong:
        pytest.fail("\n\n".join(long_form(result, report) for result in wrong), pytrace=False)
    for result in report.results:
        if result.verdict in ("not-applicable", "blocked"):
            pytest.skip(cause(result))
        if result.verdict == "expected-fail":
            known = result.known or {}
            pytest.xfail(" ".join(line(known[name]) for name in ("reason", "url") if known.get(name)))
