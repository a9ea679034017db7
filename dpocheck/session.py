"""How does one check come to its verdict?  Its scenes are observed, judged, and the worst outcome is reported."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, replace
from typing import Any

from dpocheck import fixed, order
from dpocheck.check import CHECKS, Case, Check, Comparison, Scene
from dpocheck.draw import draw, joined
from dpocheck.experiment import Experiment, LogpExperiment, LossExperiment, Sequence, StepExperiment, TrainExperiment
from dpocheck.observation import Seen
from dpocheck.oracle.theory import Theory
from dpocheck.result import Result
from dpocheck.subject import Subject

KIND = {
    LossExperiment: "loss", LogpExperiment: "logps", StepExperiment: "step", TrainExperiment: "train",
    Sequence: "sequence",
}  # fmt: skip
ORDER = ("fail", "error", "unknown", "info", "pass", "blocked", "not-applicable")
EVERY = "*"  # every family
Predict = Callable[[Experiment, Theory], Seen]
Limit = Callable[[Experiment, str, Theory, float], Any]


@dataclass(frozen=True)
class Outcome:
    """One scene's judgement, and what a report needs to know about how it came about."""

    comparison: Comparison
    scene: Scene
    via: str | None = None
    output: str | None = None
    blocked_by: str | None = None
    observed: tuple[Seen, ...] = ()


class Session:
    """The checks of one audit, one after the other, and what blocks what.

    The first `must` check that fails blocks those that come after it in the same scene family, so that one bug gives
    one failure; `order` says what else it blocks.
    `blocking=False` for single checks and for the kill matrix.
    """

    def __init__(
        self, subject: Subject, predict: Predict, limit: Limit, *, tier: str = "quick", blocking: bool = True,
        seed: int = 0, shrink: int = 0, known: Collection[str] = (),
    ) -> None:  # fmt: skip
        """`known`: checks whose failure is expected; what is known already blocks nothing."""
        self.subject, self.predict, self.limit = subject, predict, limit
        self.tier, self.blocking = tier, blocking
        self.seed, self.shrink, self.known = seed, shrink, frozenset(known)
        self.chosen: dict[str, tuple[Scene, ...]] | None = None  # check -> scenes, where only some are run
        self.failed: dict[str, list[str]] = {}  # scene family -> the checks that failed
        self.told: set[str] = set()  # changes of the subject's process that a check has reported
        self.seen: dict[str, list[tuple[Experiment, Seen]]] = {}  # check -> what was observed in its scenes

    def scenes(self, check: Check) -> Sequence_[Scene]:
        """The scenes to run: all of the check's, or those chosen for it."""
        return check.staged(self.subject.theory) if self.chosen is None else self.chosen.get(check.id, ())

    def result(self, check: Check) -> Result:
        began = time.perf_counter()
        outcomes = [
            self.outcome(check, scene)
            for scene in self.scenes(check)
            if self.tier == "full" or scene.tier == "quick"
        ]
        found, words = self.drawn(check, outcomes)
        outcomes += found
        told = min(outcomes, key=_severity) if outcomes else Outcome(
            Comparison("not-applicable", reason="no scene for this subject"), Scene("none", ())
        )  # fmt: skip
        if words and told not in found:
            told = replace(told, comparison=replace(told.comparison, reason=joined(told.comparison.reason, words)))
        if told.comparison.verdict == "fail" and check.level == "must" and check.id not in self.known:
            self.failed.setdefault(told.scene.family, []).append(check.id)
            if order.blocks_all(check, told.scene.family):
                self.failed.setdefault(EVERY, []).append(check.id)
        self.seen[check.id] = [
            pair for each in outcomes for pair in zip(each.scene.experiments, each.observed, strict=False)
        ]
        return report(check, told, time.perf_counter() - began)

    def blocker(self, check: Check, scene: Scene) -> str | None:
        """The check that failed and of which this one is made."""
        made_of = (EVERY, *order.families(scene.family))
        failed = (id for family in made_of for id in self.failed.get(family, ()))
        able = self.subject.capabilities
        return next((id for id in failed if not order.apart(check, CHECKS[id], able)), None)

    def drawn(self, check: Check, outcomes: list[Outcome]) -> tuple[list[Outcome], str]:
        """What drawn experiments add, in the full tier, and how many there were, in words.

        None where a scene, which is smaller, failed already, and none where no scene applies to the subject.
        """
        verdicts = {outcome.comparison.verdict for outcome in outcomes}
        if self.tier != "full" or check.draw is None or verdicts & {"fail", "error", "blocked"}:
            return [], ""
        if verdicts <= {"not-applicable"}:
            return [], ""
        family = next(each.scene.family for each in outcomes if each.comparison.verdict != "not-applicable")
        tally = draw(
            check, self.subject.theory, self.subject.capabilities,
            lambda experiments: self.outcome(check, Scene("drawn", experiments, family)),
            seed=self.seed, shrink=self.shrink,
        )  # fmt: skip
        found = tally.outcome()
        return [found] if found else [], tally.words()

    def outcome(self, check: Check, scene: Scene) -> Outcome:
        """Observe one scene and judge it."""
        if reason := fixed.outside(check.id, self.subject.objective):
            return Outcome(Comparison("not-applicable", reason=reason), scene)
        own = tuple(self.subject.own(experiment, check.id) for experiment in scene.experiments)
        scene = replace(scene, experiments=own)
        for experiment in scene.experiments:
            if reason := self.subject.cannot(experiment):
                return Outcome(Comparison("not-applicable", reason=reason), scene)
        if self.blocking and (blocker := self.blocker(check, scene)):
            return Outcome(Comparison("blocked", reason=f"{blocker} failed before"), scene, blocked_by=blocker)
        observed = []
        for experiment in scene.experiments:
            seen = self.subject.observe(experiment)
            observed.append(seen)
            if not check.hears_refusals and (seen.refused or seen.raised):
                return Outcome(_trouble(seen), scene, seen.via, seen.output)
        if missing := _missing(check, scene, observed):
            return Outcome(Comparison("not-applicable", reason=f"{missing} is not observable here"), scene)
        case = Case(
            scene.experiments, tuple(observed), self.subject.theory, self.subject.says,
            max(self.subject.precision(experiment) for experiment in scene.experiments),
            check.rivals, self.predict, self.limit,
        )  # fmt: skip
        try:
            comparison = check.judge(case)
        except Exception:
            comparison = Comparison("unknown", reason="the check itself broke: " + traceback.format_exc(limit=-2))
        if comparison.verdict == "unknown" and (
            reason := fixed.powerless(comparison.reason, self.subject.objective, self.subject.only)
        ):
            comparison = replace(comparison, verdict="not-applicable", reason=reason)
        output = next((seen.output for seen in observed if seen.output), None)
        if comparison.verdict != "fail" and (left := self._left_changed(observed)):
            comparison = Comparison("error", reason=left)
        return Outcome(comparison, scene, observed[0].via, output, observed=tuple(observed))


    def _left_changed(self, observed: list[Any]) -> str:
        """What the subject left changed in its process, in words; once, by the check that sees it first."""
        new = [line for line in dict.fromkeys(line for seen in observed for line in seen.changes)
               if line not in self.told]  # fmt: skip
        self.told.update(new)
        return f"left its process changed: {'; '.join(new)}; it is put back after each call" if new else ""


def _severity(outcome: Outcome) -> tuple[int, float]:
    comparison = outcome.comparison
    ratio = comparison.error / comparison.bound if comparison.error and comparison.bound else 0.0
    return ORDER.index(comparison.verdict), -ratio


def _trouble(seen: Seen) -> Comparison:
    """A refusal makes a check not-applicable; an error on legitimate input is the trainer's, or its adapter's."""
    if seen.refused:
        return Comparison("not-applicable", reason=seen.refused)
    if seen.died or seen.in_adapter:
        return Comparison("error", reason=seen.raised or "")
    reason = f"raised on legitimate input: {seen.raised}"
    return Comparison("fail", reason=reason, observed=seen.raised, expected="an answer")


def _missing(check: Check, scene: Scene, observed: list[Any]) -> str | None:
    for need in sorted(check.needs):
        kind, _, name = need.partition(".")
        for experiment, seen in zip(scene.experiments, observed, strict=True):
            parts = seen.runs if isinstance(experiment, Sequence) else (seen,)
            wanted = kind == KIND[type(experiment)] or (kind == "train" and isinstance(experiment, Sequence))
            if wanted and not (seen.refused or seen.raised) and any(_absent(part, name) for part in parts):
                return need
    return None


def _absent(seen: Any, name: str) -> bool:
    """A dotted name reaches into the metrics of the history ("history.logps/chosen") or the spies."""
    field, _, inner = name.partition(".")
    value = getattr(seen, field, None)
    if value is None or (isinstance(value, tuple | dict) and not value):
        return True
    if field == "history" and inner:
        return not any(inner in entry["metrics"] for entry in value)
    return bool(inner) and inner not in value


def report(check: Check, outcome: Outcome, seconds: float) -> Result:
    comparison, verdict = outcome.comparison, outcome.comparison.verdict
    if check.level == "info" and verdict in ("pass", "fail"):
        verdict = "info"
    return Result(
        id=check.id, version=check.version, level=check.level, tier=check.tier, chapter=check.chapter,
        stage=check.stage, verdict=verdict, reason=comparison.reason, claim=check.claim, source=check.source,
        via=outcome.via, observed=comparison.observed, expected=comparison.expected, error=comparison.error,
        bound=comparison.bound, where=comparison.where, blocked_by=outcome.blocked_by,
        convention=comparison.convention, output=outcome.output, seconds=seconds, family=outcome.scene.family,
        scene=outcome.scene.name, experiments=outcome.scene.experiments,
    )  # fmt: skip
