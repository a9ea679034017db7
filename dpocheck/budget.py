"""Which few runs show most, where a run takes seconds?  The quick tier of a command line.

A command line starts a new process for every run, so its quick tier is a list of checks whose scenes share at most
twelve runs.  The full tier asks everything.
"""

from __future__ import annotations

from dpocheck.check import Check, Scene
from dpocheck.experiment import Experiment, Sequence, key
from dpocheck.subject import Subject

RUNS = 12

# In the order of what they show; each brings one more of its scenes that can be asked, if the budget still allows it.
QUICK = (
    "GRAD-IDENTITY", "STEP-NOTHING-HIDDEN", "RUN-GRADIENT", "GRAD-TOKENS", "GRAD-RAGGED", "GRAD-ATTENTION", "REF-START",
    "METRIC-LOSS", "METRIC-REWARDS", "METRIC-MARGIN", "METRIC-ACCURACY", "METRIC-LOGPS", "OPTION-ACTS", "OPTION-ACTS",
    "ACCUM-EVEN", "STEP-TWO", "OPTIMUM-RECOVERED", "RUN-COVERAGE", "OPTION-ACTS", "EVAL-BATCH", "LOSS-IPO",
    "ROWS-ROUND-TRIP", "ROWS-ROUND-TRIP", "DEFAULTS-STEP", "REF-PRECOMPUTED",
)  # fmt: skip


def is_costly(subject: Subject) -> bool:
    return subject.transport.about.get("form") == "command line"


def choose(subject: Subject, selected: list[Check]) -> dict[str, tuple[Scene, ...]]:
    """Check -> the scenes that fit the budget, for the checks of the quick list.

    A run that the subject refuses costs nothing; a check all of whose scenes are refused keeps the first, which says
    why.
    """
    by_id = {check.id: check for check in selected}
    spent: set[str] = set(subject.memory_keys())
    start, chosen = len(spent), {}
    for name in QUICK:
        if name not in by_id:
            continue
        kept = chosen.get(name, ())
        offered = [s for s in by_id[name].staged(subject.theory) if s.tier == "quick" and s not in kept]
        for scene in offered:
            experiments = [subject.own(experiment, name) for experiment in scene.experiments]
            if any(map(subject.cannot, experiments)) or _refused(subject, experiments):
                continue
            needed = {key(run) for experiment in experiments for run in subject.whole_runs(experiment)} - spent
            if len(spent) - start + len(needed) + 1 <= RUNS:
                spent |= needed
                chosen[name] = (*kept, scene)
            break
        else:
            if not kept and (refused := [s for s in offered if not any(map(subject.cannot, s.experiments))]):
                chosen[name] = (refused[0],)
    return chosen


def _refused(subject: Subject, experiments: list[Experiment]) -> bool:
    """Whether the command line cannot be asked for one of the runs."""
    whole = [run for experiment in experiments for run in subject.whole_runs(experiment)]
    runs = [run for one in whole for run in (one.runs if isinstance(one, Sequence) else (one,))]
    return any(subject.transport.refuses(run) for run in runs)
