"""Which few runs show most, where a run takes seconds?  The quick tier of a command line.

A command line starts a new process for every run, so its quick tier is a list of checks whose scenes share at most ten
runs.  The full tier asks everything.
"""

from __future__ import annotations

from dpocheck.check import Check, Scene
from dpocheck.experiment import key
from dpocheck.subject import Subject

RUNS = 10

# In the order of what they show; each brings at most its first scenes, as many as the budget still allows.
QUICK = (
    "GRAD-IDENTITY", "STEP-NOTHING-HIDDEN", "RUN-GRADIENT", "GRAD-TOKENS", "GRAD-RAGGED", "GRAD-ATTENTION", "REF-START",
    "METRIC-LOSS", "METRIC-REWARDS", "METRIC-MARGIN", "METRIC-ACCURACY", "METRIC-LOGPS", "OPTION-ACTS", "ACCUM-EVEN",
    "STEP-TWO", "OPTIMUM-RECOVERED", "EVAL-BATCH", "LOSS-IPO", "ROWS-ROUND-TRIP", "DEFAULTS-STEP", "REF-PRECOMPUTED",
)  # fmt: skip


def is_costly(subject: Subject) -> bool:
    return subject.transport.about.get("form") == "command line"


def choose(subject: Subject, selected: list[Check]) -> dict[str, tuple[Scene, ...]]:
    """Check -> the scenes that fit the budget, for the checks of the quick list."""
    by_id = {check.id: check for check in selected}
    spent: set[str] = set(subject.memory_keys())
    start, chosen = len(spent), {}
    for name in QUICK:
        if name not in by_id:
            continue
        kept: list[Scene] = []
        for scene in by_id[name].staged(subject.theory):
            if scene.tier != "quick":
                continue
            needed = {key(run) for experiment in scene.experiments for run in subject.whole_runs(experiment)} - spent
            if not needed and any(subject.cannot(experiment) for experiment in scene.experiments):
                continue
            if len(spent) - start + len(needed) + 1 > RUNS:
                break
            spent |= needed
            kept.append(scene)
            if name != "ROWS-ROUND-TRIP":
                break
        if kept:
            chosen[name] = tuple(kept)
    return chosen
