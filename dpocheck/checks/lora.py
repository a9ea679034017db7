"""Is the reference of a LoRA run the model with its adapter switched off?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, check, scene
from dpocheck.checks import scenes
from dpocheck.experiment import Body, Lora, Objective, Recipe
from dpocheck.oracle.theory import Theory
from dpocheck.reading import entries


def _adapter(theory: Theory) -> list:
    recipe = Recipe(
        Objective(beta=0.5), learning_rate=2.0, batch=4, steps=3, lora=Lora(4, 8.0, ("q_proj", "v_proj", "o_proj"))
    )
    pairs = scenes.rectangular(4, prompt=3, completion=3)
    run = scenes.run(pairs, theory, recipe, body=Body("speaking", layers=2))
    return [scene("an ordinary small Llama, three steps", replace(run, policy=None, reference=None), family="lora")]


@check(
    "LORA-REFERENCE", chapter="lora", stage="reference", level="must", needs={"train.history.loss"}, scenes=_adapter,
    claim="With a fresh adapter the loss starts at log 2; once it is trained, the rewards leave zero: the reference is "
    "the model without it.",
    source="Rafailov et al. 2023, Eq. 7, with pi_ref the policy before training", covers=("REF-ADAPTER", "POL-TRAINABLE"),
    why="A reference that carries the adapter along never lets the loss move.",
    bug="The adapter left on in the reference's forward; or the SFT adapter switched off with it.",
    fix="Compute the reference under disable_adapter(), or from a frozen copy of the adapter.",
)  # fmt: skip
def reference(case: Case) -> Comparison:
    losses = entries(case.observed[0].history, "train", "loss")
    if len(losses) < 2:
        return Comparison("not-applicable", reason="the loss of single steps is not logged")
    noise = 2e3 * case.precision  # a stock Llama has float32 islands: log-probs to some hundred roundings
    if abs(losses[0] - np.log(2)) > noise:
        return Comparison("fail", error=abs(losses[0] - np.log(2)), bound=noise, observed=losses[0], expected=float(np.log(2)), where="first loss")
    if abs(losses[-1] - np.log(2)) <= noise:
        return Comparison("fail", error=noise, bound=0.0, observed=losses[-1], expected="less than log 2", where="loss after two steps: it stands still")
    return Comparison("pass", error=abs(losses[0] - np.log(2)), bound=noise)
