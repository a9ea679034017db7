"""Is the reference of a LoRA run the model with its adapter switched off, and is the adapter scaled as asked for?"""

from __future__ import annotations

from dataclasses import dataclass, replace

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


# ------------------------------------------------------------------------------------------------ the adapter's scale

# A scale so small that the adapter leaves the model as it is, at a rate so large that A moves as far as it is long.
FAINT = Lora(4, 2.0**-6, ("o_proj",))


def _faint(theory: Theory) -> list:
    recipe = Recipe(Objective(beta=0.5), learning_rate=64.0, batch=4)
    pairs = scenes.rectangular(4, prompt=3, completion=3)
    whole = scenes.run(pairs, theory, recipe, body=Body("speaking", layers=2), policy=None, reference=None)
    one = replace(whole, recipe=replace(recipe, learning_rate=2.0**8, lora=FAINT))
    two = replace(one, recipe=replace(one.recipe, steps=2))
    return [scene("an ordinary small Llama, a step without an adapter, and one and two with", whole, one, two,
        family="lora scale")]  # fmt: skip


@check(
    "LORA-SCALE", chapter="lora", stage="step", level="must", needs={"train.weights"}, scenes=_faint,
    claim="An adapter's product B A is multiplied by alpha over the rank.",
    source="Hu et al. 2022 (arXiv:2106.09685), section 4.1", covers=("POL-TRAINABLE",),
    why="It multiplies the learning rate by its square: a run that was tuned at one rank goes wrong at another.",
    bug="alpha over the root of the rank, as rsLoRA has it, where LoRA was asked for; alpha that is not divided.",
    fix="Pass alpha and rank on, and use rsLoRA's scale only where it is asked for.",
)  # fmt: skip
def scale(case: Case) -> Comparison:
    whole, one, two = (seen.weights for seen in case.observed)
    recipe = case.experiments[1].recipe
    due = recipe.lora.alpha / recipe.lora.rank
    names = [name for name in sorted(one) if any(part in name for part in recipe.lora.targets)]
    found = []
    for name in names:
        if all(name in held and np.any(held[name]) for held in (whole, one, two)):
            gradient = -np.asarray(whole[name], float) / case.experiments[0].recipe.learning_rate
            changes = np.asarray(one[name], float), np.asarray(two[name], float)
            found.append((name, _second_step(gradient, *changes, recipe.lora.rank, case.precision)))
    if not found:
        return Comparison("unknown", reason="the modules that the adapter is on do not move")
    name, told = min(found, key=lambda pair: pair[1].open_)
    scaled = told.eta / recipe.learning_rate
    if told.open_ > 0.25 or told.rest > told.open_:  # rsLoRA is off by the root of the rank, at least by that of two
        return Comparison("unknown", reason="two steps are not told apart from those of another optimizer or start")
    error, bound = abs(scaled - due), told.open_ * max(due, scaled)
    return Comparison(
        "pass" if error <= bound else "fail", error=error, bound=bound, observed=f"scale {scaled:.3g}",
        expected=f"alpha / rank = {due:.3g}", where=f"adapter of {name}",
    )  # fmt: skip


@dataclass(frozen=True)
class _Told:
    """`eta` = rate * scale.  `rest`: the share of the turned part that the fit leaves; `open_`: the share of eta that
    may be wrong, and of what a correct run may leave."""

    eta: float
    rest: float
    open_: float


def _second_step(gradient: np.ndarray, one: np.ndarray, two: np.ndarray, rank: int, u: float) -> _Told:
    """Rate times scale, from a weight's change (out, in) after one and after two steps of SGD on an adapter.

    With s the scale, eta = rate * s, and B = 0 at the start, one step leaves s B A = -s eta G A'A: only the product of
    rate, s^2 and the unknown start shows.  In the second step A moves by what B is then:

        two = (one + one') (1 + eta^2 G'G1),    one' = -s eta G1 A'A,

    G1 the second gradient.  A change as faint as this one leaves G1 = G but for a share of the order of s.  The rows of
    `one` span those of A; what of `two` lies outside of them is eta^2 (one + one') G'G, and eta is told by it alone.

    The share by which one' differs from `one` is that by which G1 differs from G, in the directions of A.  To first
    order eta^2 is off by twice it, once in G1 and once in one'; eight times leaves room for the directions that A does
    not see.  A stored weight is rounded once, before and after, where weights are below 1.2.
    """
    span = np.linalg.svd(one)[2][:rank]
    inside = span.T @ span
    outside = np.eye(len(inside)) - inside
    bend = gradient.T @ gradient
    turned, square = two @ outside, 0.0
    for _ in range(100):
        straight = two @ inside @ np.linalg.inv(np.eye(len(inside)) + square * inside @ bend @ inside)
        term = straight @ bend @ outside
        before, square = square, max(float(np.sum(turned * term) / np.sum(term**2)), 0.0)
        if abs(square - before) <= 1e-9 * square:
            break
    size = float(np.linalg.norm(turned))
    drift = float(np.linalg.norm(straight - 2.0 * one) / np.linalg.norm(one))
    stored = 3.0 * u * 1.2 * np.sqrt(one.size) / size
    return _Told(square**0.5, float(np.linalg.norm(turned - square * term)) / size, float(8.0 * drift + stored))
