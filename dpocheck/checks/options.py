"""Does an option that the trainer accepts do what its name says?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, check, scene
from dpocheck.checks import scenes
from dpocheck.experiment import Objective, Recipe
from dpocheck.oracle.theory import Theory


def _options(theory: Theory) -> list:
    pairs = scenes.rectangular(4)
    plain = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=4)
    base = scenes.run(pairs, theory, plain)

    def against(name: str, recipe: Recipe, start: Recipe = plain) -> object:
        return scene(name, replace(base, recipe=start), replace(base, recipe=recipe), family=f"option {name}")

    smooth = replace(plain.objective, label_smoothing=0.25)
    return [
        against("label_smoothing", replace(plain, objective=smooth)),
        against("clip_norm", replace(plain, clip_norm=2.0**-6)),
        against("max_length", replace(plain, max_length=4)),
        against("sft_weight", replace(plain, objective=replace(plain.objective, sft_weight=1.0))),
        against("length_normalised", replace(plain, objective=replace(plain.objective, length_normalised=True))),
    ]


@check(
    "OPTION-ACTS", chapter="options", stage="loss", level="should", needs=set(), scenes=_options, hears_refusals=True,
    claim="An option that is accepted changes what it names, or is refused.",
    source="design principle: an accepted option that changes nothing is a silent error",
    covers=("LOSS-TYPE-HONOURED", "LOSS-SMOOTH-VALUE"),
    why="The run looks as asked for and is another: a comparison of two settings compares a setting with itself.",
    bug="TRL 0.29 to 1.16 accepts label_smoothing with the sigmoid loss and ignores it: cDPO became plain DPO.",
    fix="Raise an error where the option is not supported for this loss.",
)  # fmt: skip
def acts(case: Case) -> Comparison:
    without, with_option = case.observed
    if without.raised or without.refused:
        return Comparison("unknown", reason=f"the run without the option: {without.raised or without.refused}")
    if with_option.refused:
        return Comparison("not-applicable", reason=f"refused by the adapter: {with_option.refused}")
    if with_option.raised:
        return Comparison("pass", reason=f"refused: {with_option.raised}")
    if without.gradient is None or with_option.gradient is None:
        return Comparison("not-applicable", reason="gradients are not observable here")
    change = np.abs(with_option.gradient - without.gradient)
    due = np.abs(case.predicted(1).gradient - case.predicted(0).gradient)
    noise = case.bound("gradient", 0) + np.asarray(case.bound("gradient", 1))
    if not np.any(due > 4 * noise):
        return Comparison("unknown", reason="this input would not show the option")
    cell = np.unravel_index(int(np.argmax(due)), due.shape)
    if not np.any(change > noise):
        return Comparison(
            "fail", observed=f"gradient changed by {change.max():.3g}", expected=f"changed by {due.max():.3g}",
            error=float(due[cell]), bound=float(np.broadcast_to(noise, due.shape)[cell]),
            where="the option was accepted and changed nothing",
        )  # fmt: skip
    return Comparison("pass", observed=float(change[cell]), expected=float(due[cell]))
