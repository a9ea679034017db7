"""How is an experiment put to a subject?  Finds it by name, keeps its worker, derives, remembers.

`transports.py` says where it lives; what it answers is the same from everywhere.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpocheck import derive, fixed, reading
from dpocheck.adapter import Says
from dpocheck.ahead import Ahead
from dpocheck.experiment import (
    DIVERGENCES,
    Experiment,
    LossExperiment,
    Objective,
    Sequence,
    TrainExperiment,
    key,
    ranks_of,
)
from dpocheck.observation import Seen, SequenceSeen
from dpocheck.oracle.theory import PAPER, Theory
from dpocheck.probes.handed import checkpoints
from dpocheck.transports import Broken, Refused, Transport, against_ranks

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


class Subject:
    """One trainer under audit."""

    def __init__(
        self, name: str, transport: Transport, folder: Path, more: Iterable[Callable[[], Transport]] = ()
    ) -> None:
        """`more`: starters of further transports that answer as the first does, for runs side by side."""
        self.objective: Objective | None = None  # asked for in the place of the ordinary one
        self.name, self.transport, self.folder = name, transport, folder
        self.ahead = Ahead(transport, more)
        about = transport.about
        self.capabilities: tuple[str, ...] = tuple(about["capabilities"])
        self.says = about["says"] if isinstance(about["says"], Says) else _says(about["says"])
        self.only: dict[str, Any] = dict(about.get("only") or {})  # options that the subject has hard-coded
        kept = self.says.reference_dtype or PAPER.reference_dtype
        self.theory: Theory = PAPER.but(reference_dtype=kept)  # with the conventions found so far
        self.coarsest = UNIT.get(about.get("precision", ""), 0.0)  # roundoff of the dtype that it says it has
        self.precisions: dict[type, float] = {}
        self.memory: dict[str, Seen] = {}
        self.asked: dict[str, Experiment] = {}
        self.calls = 0

    def close(self) -> None:
        self.ahead.close()

    def standalone(self, question: dict[str, Any]) -> dict[str, Any]:
        """What the subject offers for a script without dpocheck; {} where it offers nothing."""
        with self.ahead.lease() as transport:
            return transport.standalone(question)

    def run_ahead(self, experiments: Iterable[Experiment]) -> None:
        """Start the whole runs that the subject's own experiments need; they are taken when they are asked for."""
        for experiment in experiments:
            for run in self.whole_runs(experiment):
                if isinstance(run, Sequence):
                    self.ahead.submit(run, self._sequence)
                elif self._remembered_as(run) not in self.memory:
                    self.ahead.submit(run, self._alone)

    def whole_runs(self, experiment: Experiment) -> tuple[TrainExperiment | Sequence, ...]:
        """The runs and sequences that an experiment comes down to; none where it is answered otherwise."""
        if self.cannot(experiment):
            return ()
        if isinstance(experiment, TrainExperiment | Sequence):
            return (experiment,)
        if derive.CAPABILITY[type(experiment)] in self.capabilities:
            return ()
        plan = derive.plan(experiment, self.capabilities, self.theory)
        return () if isinstance(plan, str) else tuple(r for part in plan.experiments for r in self.whole_runs(part))

    def _remembered_as(self, experiment: Experiment) -> str:
        return key(experiment) + (self.theory.eos if "train" in self.capabilities else "")

    def precision(self, experiment: Experiment) -> float:
        """The unit roundoff of the subject's arithmetic on this experiment: the dtype asked for, or coarser."""
        kind = type(experiment)
        if isinstance(experiment, Sequence):
            return self.precision(experiment.runs[0])
        asked = experiment.recipe.dtype if isinstance(experiment, TrainExperiment) else experiment.dtype
        if isinstance(experiment, LossExperiment) and "loss" not in self.capabilities:
            asked = self.says.reference_dtype or "float32"  # its numbers are log-probs of two models
        native = {k: u for k, u in self.precisions.items() if k is kind}
        return max(UNIT[asked], *(native or self.precisions).values(), 0.0)  # derived: what it is derived from

    def observe(self, experiment: Experiment) -> Seen:
        """What the subject shows of an experiment; remembered, except for sequences."""
        if isinstance(experiment, Sequence):
            ready = self.ahead.take(experiment)
            return self._sequence(experiment) if ready is None else ready
        name = self._remembered_as(experiment)
        if name not in self.memory:
            self.memory[name] = self._observe(experiment)
            self.asked[name] = experiment
        return self.memory[name]

    def remembers(self, experiment: Experiment) -> bool:
        """Whether the answer to an experiment is known already, or follows from runs that are."""
        if self._remembered_as(experiment) in self.memory:
            return True
        runs = self.whole_runs(experiment)
        return bool(runs) and all(not isinstance(r, Sequence) and self._remembered_as(r) in self.memory for r in runs)

    def memory_keys(self) -> tuple[str, ...]:
        """The keys of what is remembered already."""
        return tuple(key(experiment) for experiment in self.asked.values())

    def witnesses(self) -> list[tuple[Experiment, Seen]]:
        """All that was seen of tables so far."""
        return [
            (experiment, self.memory[name])
            for name, experiment in self.asked.items()
            if not isinstance(experiment, TrainExperiment) or experiment.policy is not None
        ]

    def own(self, experiment: Any, check: str = "") -> Any:
        """The experiment at the objective asked of a check, or at the beta that the subject has hard-coded; with the
        policy as its reference, where the subject takes no other."""
        if self.only.get("reference") == "policy" and check not in fixed.TWO_MODELS:
            experiment = fixed.at_start(experiment)
        return fixed.own(experiment, self.only, fixed.asked_of(check, self.objective))

    def cannot(self, experiment: Experiment) -> str | None:
        """Why this subject has no way to show the experiment; None where it has one.  Nothing is run."""
        if ranks_of(experiment) > 1 and (reason := against_ranks(self.transport)):
            return reason
        if reason := self.not_offered(experiment):
            return reason
        if isinstance(experiment, Sequence):
            return None if "train" in self.capabilities else "the subject has no `train`"
        if derive.CAPABILITY[type(experiment)] in self.capabilities:
            return None
        plan = derive.plan(experiment, self.capabilities, self.theory)
        return plan if isinstance(plan, str) else None

    def not_offered(self, experiment: Experiment) -> str | None:
        """Why an objective that few trainers have is not asked for: nobody says that this one has it.

        A subject need not know its name, and may raise anything.
        """
        kinds = {objective.kind for objective in fixed.objectives_of(experiment)} & set(DIVERGENCES)
        said = {*(self.says.objectives or ()), *([self.objective.kind] if self.objective else [])}
        return f"nothing says that the subject offers {sorted(kinds - said)[0]}" if kinds - said else None

    def _observe(self, experiment: Experiment) -> Seen:
        if derive.CAPABILITY[type(experiment)] in self.capabilities:
            ready = self.ahead.take(experiment)
            seen = self._alone(experiment) if ready is None else ready
            return self._one_by_one(experiment, seen) if isinstance(experiment, LossExperiment) else seen
        plan = derive.plan(experiment, self.capabilities, self.theory)
        if isinstance(plan, str):
            return reading.empty(experiment, via="derived", refused=plan)
        answers = tuple(self.observe(coarse) for coarse in plan.experiments)
        for answer in answers:
            if answer.raised or answer.refused:
                told = {"raised": answer.raised, "refused": answer.refused, "output": answer.output}
                return reading.empty(
                    experiment, via="derived", died=answer.died, in_adapter=answer.in_adapter, **told
                )
        return replace(plan.read(answers), changes=tuple(line for answer in answers for line in answer.changes))

    def _one_by_one(self, experiment: LossExperiment, seen: Any) -> Seen:
        """Where only a reduced loss comes back, the loss of each pair is what it is alone."""
        pairs = len(experiment.policy_chosen)
        if seen.raised or seen.refused or seen.per_pair is not None or experiment.calls != 1:
            return seen
        alone = []
        for i in range(pairs):
            one = LossExperiment(
                *((row[i],) for row in experiment.arguments().tolist()), experiment.objective,
                experiment.lengths and (experiment.lengths[i],), experiment.dtype,
            )  # fmt: skip
            alone.append(self.observe(one))
        if any(answer.raised or answer.refused for answer in alone):
            return seen
        return replace(seen, per_pair=np.array([answer.per_pair[0] for answer in alone]))  # type: ignore[attr-defined]

    def _alone(self, experiment: Experiment) -> Seen:
        with self.ahead.lease() as leased:
            transport = self.transport.together if ranks_of(experiment) > 1 else leased
            return self._native(transport, experiment, self.folder / key(experiment)[:16], None)

    def _sequence(self, experiment: Sequence) -> SequenceSeen:
        if "train" not in self.capabilities:
            return SequenceSeen(refused="the subject has no `train`")
        with self.ahead.lease() as transport:
            return self._in_order(transport, experiment)

    def _in_order(self, transport: Transport, experiment: Sequence) -> SequenceSeen:
        folder = self.folder / f"{key(experiment)[:16]}-{self.calls}"
        runs: list[Any] = []
        for number, run in enumerate(experiment.runs):
            runs.append(self._native(transport, run, folder / f"run{number}", folder / "shared", number))
            if runs[-1].raised or runs[-1].refused:
                last = runs[-1]
                return SequenceSeen(
                    runs=tuple(runs), raised=last.raised, refused=last.refused, output=last.output, died=last.died,
                    in_adapter=last.in_adapter,
                )  # fmt: skip
        changes = tuple(line for run in runs for line in run.changes)
        return SequenceSeen(runs=tuple(runs), via=runs[-1].via, changes=changes)

    def _native(
        self, transport: Transport, experiment: Experiment, folder: Path, shared: Path | None, number: int = 0
    ) -> Seen:
        """Put one experiment to the subject.  The `number`-th run of a sequence starts from random numbers of its own:
        a trainer that ignores its seed does not repeat itself by our doing."""
        self.calls += 1
        started = time.perf_counter()
        via = "files" if transport.about.get("form") == "command line" else "native"
        paths = checkpoints(experiment, folder)
        try:
            payload, arrays = transport.answer(experiment, paths, shared or folder / "run", number)
            return replace(
                reading.seen(experiment, payload, arrays, via), seconds=time.perf_counter() - started,
                changes=transport.changes, output=transport.said,
            )  # fmt: skip
        except Refused as refusal:
            return reading.empty(experiment, via=via, refused=str(refusal) or "refused without a reason")
        except Broken as fault:
            return reading.empty(
                experiment, via=via, raised=fault.reason, output=fault.output, in_adapter=fault.in_adapter,
                died=fault.died,
            )  # fmt: skip
        finally:
            if shared is None:
                shutil.rmtree(folder, ignore_errors=True)


def _says(data: dict[str, Any]) -> Says:
    return Says(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
