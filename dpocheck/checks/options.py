"""Does an option that the trainer accepts do what its name says?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from dpocheck.check import Case, Comparison, Scene, check, scene
from dpocheck.checks import scenes
from dpocheck.experiment import Body, Lora, Objective, Recipe, TrainExperiment
from dpocheck.oracle.theory import Theory

HALF = Objective(beta=0.5)
STEP = Recipe(HALF, learning_rate=scenes.ONE_STEP, batch=6)  # shows the gradient; the run that other checks ask for too
WALK = Recipe(HALF, learning_rate=8.0, batch=2, steps=3)  # shows where three steps end
EPOCH = replace(WALK, batch=3, steps=None, epochs=1)
ADAM = Recipe(HALF, optimizer="adamw", learning_rate=2.0**9, betas=(0.5, 0.75), epsilon=2.0**6, batch=2, steps=3)
LORA = Recipe(HALF, learning_rate=2.0, batch=4, steps=3, lora=Lora(4, 8.0, ("q_proj", "v_proj", "o_proj")))


def _asked(objective: Objective = HALF, **changes: Any) -> Recipe:
    return replace(STEP, objective=replace(objective, **changes))


SIMPO, CUT = Objective("simpo", beta=2.0), replace(STEP, max_length=4)

# Option -> the recipe without it and the one with it: two runs that must differ where the option acts.
OPTIONS: dict[str, tuple[Recipe, Recipe]] = {
    "label_smoothing": (STEP, _asked(label_smoothing=0.25)),
    "kind": (STEP, _asked(kind="hinge")),
    "kind ipo": (STEP, _asked(kind="ipo")),
    "clip_norm": (STEP, replace(STEP, clip_norm=2.0**-6)),
    "max_length": (STEP, CUT),
    "sft_weight": (STEP, _asked(sft_weight=1.0)),
    "length_normalised": (STEP, _asked(length_normalised=True)),
    "beta": (STEP, _asked(beta=0.25)),
    "gamma": (_asked(SIMPO), _asked(SIMPO, gamma=0.5)),
    "truncation": (CUT, replace(CUT, truncation="keep_end")),
    "learning_rate": (WALK, replace(WALK, learning_rate=16.0)),
    "momentum": (WALK, replace(WALK, momentum=0.5)),
    "weight_decay": (STEP, replace(STEP, weight_decay=2.0**-18)),
    "schedule": (WALK, replace(WALK, schedule="linear")),
    "warmup_steps": (WALK, replace(WALK, warmup_steps=2)),
    "steps": (WALK, replace(WALK, steps=4)),
    "batch": (WALK, replace(WALK, batch=4)),
    "accumulation": (WALK, replace(WALK, accumulation=2)),
    "epochs": (EPOCH, replace(EPOCH, epochs=2)),
    "drop_last": (EPOCH, replace(EPOCH, drop_last=True)),
    "betas": (ADAM, replace(ADAM, betas=(0.75, 0.875))),
    "epsilon": (ADAM, replace(ADAM, epsilon=2.0**8)),
    "lora alpha": (LORA, replace(LORA, lora=replace(LORA.lora, alpha=32.0))),
    "eval_every": (replace(WALK, eval_every=3), replace(WALK, eval_every=1)),
    "save_every": (replace(WALK, save_every=3), replace(WALK, save_every=1)),
}


def _options(theory: Theory) -> list[Scene]:
    bases = {pairs: scenes.run(scenes.rectangular(pairs), theory) for pairs in (4, 6)}
    speaking = scenes.run(scenes.rectangular(4, prompt=3, completion=3), theory, body=Body("speaking", layers=2))
    speaking = replace(speaking, policy=None, reference=None)

    def run(recipe: Recipe) -> TrainExperiment:
        base = bases[6 if recipe.batch == STEP.batch else 4]
        made = replace(speaking if recipe.lora else base, recipe=recipe)
        return replace(made, evaluation=(("held", base.rows),)) if recipe.eval_every else made

    return [
        scene(name, run(without), run(with_option), family=f"option {name}")
        for name, (without, with_option) in OPTIONS.items()
    ]


@check(
    "OPTION-ACTS", judges="change", chapter="options", stage="loss", level="should", needs=set(), scenes=_options,
    hears_refusals=True,
    claim="An option that is accepted changes what it names, or is refused.",
    source="design principle: an accepted option that changes nothing is a silent error",
    covers=("LOSS-TYPE-HONOURED", "LOSS-SMOOTH-VALUE"),
    why="The run looks as asked for and is another: a comparison of two settings compares a setting with itself.",
    bug="TRL 0.29 to 1.16 accepts label_smoothing with the sigmoid loss and ignores it: cDPO became plain DPO.",
    fix="Raise an error where the option is not supported for this loss.",
)  # fmt: skip
def acts(case: Case) -> Comparison:
    without, with_option = case.observed
    if without.refused or with_option.refused:
        return Comparison("not-applicable", reason=f"refused by the adapter: {without.refused or with_option.refused}")
    if without.raised:
        return Comparison("unknown", reason=f"the run without the option: {without.raised}")
    if with_option.raised:
        return Comparison("pass", reason=f"refused: {with_option.raised}")
    for told in (_moved(case, "gradient"), _moved(case, "logits"), _counted(case)):
        if told is not None:
            return told
    if case.predicted(1).logits is None:  # what the oracle does not replay, AdamW and LoRA, must differ in its bits
        if without.digest is not None and without.digest == with_option.digest:
            return _nothing(case, "the same bits", "other weights")
        return Comparison("pass", observed="other weights")
    return Comparison("unknown", reason="this input would not show the option")


def _nothing(case: Case, observed: str, expected: str, **fields: Any) -> Comparison:
    where = f"{_named(case)}: the option was accepted and changed nothing"
    return Comparison("fail", observed=observed, expected=expected, where=where, **fields)


def _named(case: Case) -> str:
    """The option by which the two runs differ, with its value in the second."""
    told = []
    without, with_option = (run.recipe for run in case.experiments)
    for one, other in ((without, with_option), (without.objective, with_option.objective)):
        told += [(name, value) for name, value in vars(other).items() if getattr(one, name) != value]
    return ", ".join(
        f"LoRA's alpha {value.alpha:g}" if name == "lora" else f"{name} {value}"
        for name, value in told if name != "objective"
    )  # fmt: skip


def _moved(case: Case, name: str) -> Comparison | None:
    """The option changes an array by as much as is due, somewhere; None where this array would not show it."""
    seen, paper = ([getattr(of(i), name) for i in (0, 1)] for of in (case.observed.__getitem__, case.predicted))
    if any(array is None for array in (*seen, *paper)):
        return None
    due, change = np.abs(paper[1] - paper[0]), np.abs(seen[1] - seen[0])
    noise = np.broadcast_to(case.bound(name, 0) + np.asarray(case.bound(name, 1)), due.shape)
    if not np.any(due > 4 * noise):
        return None
    cell = np.unravel_index(int(np.argmax(due)), due.shape)
    if np.any(change > noise):
        return Comparison("pass", observed=float(change[cell]), expected=float(due[cell]))
    return _nothing(
        case, f"{name} changed by {change.max():.3g}", f"changed by {due.max():.3g}",
        error=float(due[cell]), bound=float(noise[cell]),
    )  # fmt: skip


def _counted(case: Case) -> Comparison | None:
    """The option changes how often something is written: evaluations in the log, checkpoints."""
    for what, count in (("evaluations", _evaluations), ("checkpoints", lambda run: len(run.saved or ()))):
        due, seen = [count(case.predicted(i)) for i in (0, 1)], [count(run) for run in case.observed]
        if due[0] != due[1]:
            if not seen[0]:
                return Comparison("not-applicable", reason=f"no {what} are reported")
            if seen[0] == seen[1]:
                return _nothing(case, f"{seen[1]} {what}", f"{due[1]} {what}")
            return Comparison("pass", observed=f"{seen[1]} {what}", expected=f"{due[1]} {what}")
    return None


def _evaluations(run: Any) -> int:
    return len({entry["step"] for entry in run.history or () if entry["split"] == "held"})
