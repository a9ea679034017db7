"""Is the reference of a LoRA run the model with its adapter switched off?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, check, logged, scene
from dpocheck.checks import scenes
from dpocheck.derive import STILL
from dpocheck.experiment import Body, Lora, Objective, Recipe, TrainExperiment
from dpocheck.oracle.theory import Theory
from dpocheck.reading import entries


def _adapter(theory: Theory) -> list:
    recipe = Recipe(
        Objective(beta=0.5), learning_rate=2.0, batch=4, steps=3, lora=Lora(4, 8.0, ("q_proj", "v_proj", "o_proj"))
    )
    pairs = scenes.rectangular(4, prompt=3, completion=3)
    run = scenes.run(pairs, theory, recipe, body=Body("speaking", layers=2))
    return [
        scene("an ordinary small Llama, three steps", replace(run, policy=None, reference=None), family="lora"),
        scene("four pairs, an adapter, and a reference of its own", _given(theory), family="lora reference"),
    ]


def _given(theory: Theory) -> TrainExperiment:
    """A fresh adapter changes nothing: the first loss is that of the two tables."""
    recipe = Recipe(Objective(beta=0.5), learning_rate=STILL, batch=4, lora=Lora(4, 8.0, ("q_proj", "v_proj")))
    return scenes.run(scenes.rectangular(4), theory, recipe)


@check(
    "LORA-REFERENCE", chapter="lora", stage="reference", level="must", needs={"train.history.loss"}, scenes=_adapter,
    claim="With a fresh adapter the loss starts at log 2; once it is trained, the rewards leave zero: the reference is "
    "the model without it.",
    source="Rafailov et al. 2023, Eq. 7, with pi_ref the policy before training",
    covers=("REF-ADAPTER", "POL-TRAINABLE"),
    why="A reference that carries the adapter along never lets the loss move.",
    bug="The adapter left on in the reference's forward; or the SFT adapter switched off with it.",
    fix="Compute the reference under disable_adapter(), or from a frozen copy of the adapter.",
)  # fmt: skip
def reference(case: Case) -> Comparison:
    if case.experiments[0].reference is not None:
        return logged(case, "loss")
    losses = entries(case.observed[0].history, "train", "loss")
    if len(losses) < 2:
        return Comparison("not-applicable", reason="the loss of single steps is not logged")
    noise = 2e3 * case.precision  # a stock Llama has float32 islands: log-probs to some hundred roundings
    if abs(losses[0] - np.log(2)) > noise:
        return Comparison("fail", error=abs(losses[0] - np.log(2)), bound=noise, observed=losses[0],
            expected=float(np.log(2)), where="first loss")
    if abs(losses[-1] - np.log(2)) <= noise:
        return Comparison("fail", error=noise, bound=0.0, observed=losses[-1], expected="less than log 2",
            where="loss after two steps: it stands still")
    return Comparison("pass", error=abs(losses[0] - np.log(2)), bound=noise)


def _base(theory: Theory) -> list:
    return _adapter(theory)[:1]


@check(
    "LORA-BASE", chapter="lora", stage="step", level="must", needs={"train.moved"}, scenes=_base,
    claim="With an adapter, only the modules that it was put on change.",
    source="Hu et al. 2022 (arXiv:2106.09685), section 4.1: the pre-trained weights are frozen",
    covers=("POL-TRAINABLE", "REF-ADAPTER"),
    why="The reference of such a run is the base model: where the base is trained too, the reference moves.",
    bug="requires_grad_(True) on the whole model after the adapter was added.",
    fix="Train the adapter's parameters alone.",
)  # fmt: skip
def base(case: Case) -> Comparison:
    targets = case.experiments[0].recipe.lora.targets
    moved = case.observed[0].moved
    wrong = {name: change for name, change in moved.items() if change and not any(part in name for part in targets)}
    if wrong:
        first = max(wrong, key=wrong.get)
        return Comparison("fail", error=wrong[first], bound=0.0,
            observed=f"{len(wrong)} others moved, {first} by {wrong[first]:.2g}",
                          expected=f"only {', '.join(targets)} move")  # fmt: skip
    if not any(moved.values()):
        return Comparison("fail", observed="nothing moved", expected=f"{', '.join(targets)} move")
    return Comparison("pass", error=0.0, bound=0.0)
