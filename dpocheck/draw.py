"""What do drawn experiments add to a check?  The one driver: it draws, has them judged, and shrinks what fails.

Nothing else in an audit calls Hypothesis.  The same seed draws the same experiments, with one version of Hypothesis;
checks that draw from the same strategy draw the same ones, and so share what was observed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from dpocheck.check import Check, Comparison
from dpocheck.experiment import Experiment, key
from dpocheck.oracle.theory import Theory

CHEAP, DEAR = 30, 10  # examples: where the subject answers the kind itself, and where each takes whole runs
CAPABILITY = {"logps": "sequence_logps", "logz": "loss"}  # of kinds and chapters that are called otherwise


@dataclass(frozen=True)
class Ask:
    """What a check's `draw` is told: the conventions found so far, and whether the subject answers this kind of
    experiment itself.  Where it does not, an experiment is realised as whole runs, which pad and mask by themselves."""

    theory: Theory
    native: bool


Judge = Callable[[tuple[Experiment, ...]], Any]  # observes and judges; answers with a record that has a `comparison`


@dataclass
class Tally:
    """What became of the drawn examples.  `budget`: how many more may be put to the subject once one has failed.

    Each example is judged once: a subject that changes its mind cannot unsettle the search.
    """

    judge: Judge
    budget: int = 0
    judged: int = 0  # with a verdict about the subject
    unknown: int = 0
    not_applicable: int = 0
    spent: int = 0  # of the budget
    tightest: Any = None  # the outcome with the greatest error over bound
    failing: Any = None  # the smallest failure found
    stopped: Any = None  # the error after which nothing more is asked
    doubt: Any = None  # the first outcome that told nothing
    memory: dict[tuple[str, ...], Any] = field(default_factory=dict)

    @property
    def drawn(self) -> int:
        return self.judged + self.unknown + self.not_applicable

    def fails(self, experiments: tuple[Experiment, ...]) -> bool:
        """Whether an example fails; False where it is not to be put to the subject any more."""
        name = tuple(key(experiment) for experiment in experiments)
        if name not in self.memory:
            if self.stopped or (self.failing and self.spent >= self.budget):
                return False
            self.memory[name] = self.judge(experiments)
            self._count(self.memory[name])
        outcome = self.memory[name]
        if outcome.comparison.verdict != "fail":
            return False
        self.failing = outcome
        return True

    def _count(self, outcome: Any) -> None:
        verdict = outcome.comparison.verdict
        if verdict in ("error", "blocked"):  # perhaps the worker's death: nothing is drawn and nothing shrunk after it
            self.stopped = outcome
        elif self.failing:
            self.spent += 1
        elif verdict == "unknown":
            self.unknown += 1
            self.doubt = self.doubt or outcome
        elif verdict == "not-applicable":
            self.not_applicable += 1
        else:
            self.judged += 1
            if verdict != "fail" and (self.tightest is None or ratio(outcome) >= ratio(self.tightest)):
                self.tightest = outcome

    def words(self) -> str:
        parts = [f"{self.drawn} drawn, {self.judged} judged"]
        parts += [f"{self.unknown} told nothing"] if self.unknown else []
        parts += [f"{self.not_applicable} not applicable"] if self.not_applicable else []
        parts += [f"{self.spent} more to shrink the failure"] if self.spent else []
        return ", ".join(parts)

    def outcome(self) -> Any | None:
        """What to report; None where nothing that was drawn applies to the subject.

        An error; else the smallest failure; else unknown, where none told anything; else the tightest pass.
        """
        found = self.stopped or self.failing or self.tightest or self.doubt
        if found is None:
            return None
        comparison = found.comparison
        reason = comparison.reason if found is not self.doubt else f"nothing drawn told anything: {comparison.reason}"
        return replace(found, comparison=replace(comparison, reason=joined(reason, self.words())))


def joined(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)


def ratio(outcome: Any) -> float:
    """Error over bound; 0 where there is none."""
    found: Comparison = outcome.comparison
    return found.error / found.bound if found.error and found.bound else 0.0


def search(strategy: Any, tally: Tally, *, examples: int, seed: int) -> Tally:
    """Draw up to `examples` tuples of experiments until one fails, then shrink that within the tally's budget."""
    from random import Random

    from hypothesis import Phase, Verbosity, find, settings
    from hypothesis.errors import NoSuchExample

    phases = (Phase.generate, Phase.shrink) if tally.budget else (Phase.generate,)
    quiet = settings(
        max_examples=examples, phases=phases, database=None, deadline=None, derandomize=False, print_blob=False,
        verbosity=Verbosity.quiet,
    )  # fmt: skip
    try:
        smallest = find(strategy, tally.fails, settings=quiet, random=Random(seed))
    except NoSuchExample:
        return tally
    tally.fails(smallest)  # the last failure seen need not be the smallest; this one is
    return tally


def draw(check: Check, theory: Theory, capabilities: tuple[str, ...], judge: Judge, *, seed: int, shrink: int,
         examples: int | None = None) -> Tally:  # fmt: skip
    """Put a check's drawn experiments to a subject.  `examples` None: as many as the route affords."""
    kinds = {need.partition(".")[0] for need in check.needs} or {check.chapter}
    wanted = {CAPABILITY.get(kind, kind) for kind in kinds}
    native = wanted <= set(capabilities)
    count = examples or (CHEAP if native and "train" not in wanted else DEAR)
    return search(check.draw(Ask(theory, native)), Tally(judge, shrink), examples=count, seed=seed)
