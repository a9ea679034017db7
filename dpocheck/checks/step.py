"""Is one optimizer step what its pairs add up to, and nothing else?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, agree, check, close, equal, labels, scene, worst
from dpocheck.checks import draws, scenes
from dpocheck.experiment import Body, Objective, Recipe, TrainExperiment
from dpocheck.oracle.theory import PAPER, Theory

MEAN = "Rafailov et al. 2023, Eq. 7: the expectation over the data set is a mean over pairs"
SGD = "theta' = theta - rate * gradient"
BASE = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=6)


def _even(theory: Theory) -> list:
    pairs = scenes.rectangular(6)
    return [
        scene(f"six pairs as {parts} micro-batches of {6 // parts}",
              scenes.run(pairs, theory, replace(BASE, batch=6 // parts, accumulation=parts)), family="accumulation")
        for parts in (2, 3, 6)
    ]  # fmt: skip


@check(
    "ACCUM-EVEN", chapter="step", stage="step", level="must", needs={"train.gradient"}, scenes=_even,
    draw=draws.runs("even"),
    rivals=(PAPER.but(accumulation="sum"), PAPER.but(accumulation="last")),
    claim="Micro-batches of equal size add up to the gradient of one big batch.", source=MEAN,
    covers=("ACCUM-EVEN", "ACCUM-STEP", "RUN-ACCUM"),
    why="The learning rate that was tuned is multiplied by the accumulation steps.",
    bug="TRL 0.12 and 0.13 with transformers 4.46: the gradient times the number of micro-batches.",
    fix="Divide by the number of micro-batches once, in one place.",
)  # fmt: skip
def even(case: Case) -> Comparison:
    return agree(case, "gradient")


def _uneven(theory: Theory) -> list:
    recipe = replace(BASE, batch=2, accumulation=3)
    return [scene("five pairs as micro-batches of 2, 2 and 1", scenes.run(scenes.rectangular(5), theory, recipe),
        family="accumulation")]


@check(
    "ACCUM-UNEVEN", chapter="step", stage="step", level="must", needs={"train.gradient"}, scenes=_uneven,
    says="uneven_accumulation",
    claim="Micro-batches of unequal size weigh as the documentation promises: by their pairs, or all the same.",
    source=MEAN + "; the trainer's documentation", covers=("ACCUM-UNEVEN",),
    why="The last window of an epoch is rarely full: its pairs would count more than the others.",
    bug="ms-swift averaged the means of uneven micro-batches.", fix="Divide the window's sum by the window's pairs.",
)  # fmt: skip
def uneven(case: Case) -> Comparison:
    promised = case.says.uneven_accumulation
    if promised is None:
        return Comparison("not-applicable", reason="the documentation promises no weights in an uneven window")
    return agree(replace(case, theory=case.theory.but(uneven=promised)), "gradient")


def _last_window(theory: Theory) -> list:
    one = Recipe(Objective(beta=0.5), learning_rate=8.0, batch=2, accumulation=2, steps=None, epochs=1)
    pairs = scenes.rectangular(6)
    return [scene(name, scenes.run(pairs, theory, recipe), family="last window") for name, recipe in (
        ("an epoch of three micro-batches in windows of two", one),
        ("two epochs of three micro-batches in windows of two", replace(one, epochs=2)),
    )]  # fmt: skip


@check(
    "ACCUM-LAST-WINDOW", chapter="step", stage="step", level="must", needs={"train.logits"}, scenes=_last_window,
    rivals=(PAPER.but(incomplete_window="full-divisor"), PAPER.but(accumulation="sum")),
    claim="An epoch's last, incomplete window is averaged over the micro-batches that it has, or left out, or goes on "
    "in the next epoch.",
    source=MEAN, covers=("ACCUM-UNEVEN",),
    why="The last step of every epoch is too small: its pairs count for less than all others.",
    bug="Transformers until 4.54 divided by gradient_accumulation_steps, however many micro-batches there were; "
    "torchtune 0.6 adds the gradients that are left to the next epoch's first step.",
    fix="Divide by the number of micro-batches in this window; clear what is left out.",
)  # fmt: skip
def last_window(case: Case) -> Comparison:
    told = [agree(replace(case, experiments=(run,), theory=case.theory.but(incomplete_window=rule), rivals=rivals),
                  "logits") for run, rule, rivals in _windows(case.experiments[0], case.rivals)]  # fmt: skip
    return next((one for one in told if one.verdict == "pass"), told[0])


def _windows(run: TrainExperiment, rivals: tuple[Theory, ...]) -> list[tuple[TrainExperiment, str, tuple[Theory, ...]]]:
    """The right ways to cut epochs into windows: a run, a rule for its last window, and the rivals that it tells apart.

    Where the steps of an epoch are counted as its whole windows, a run of several epochs ends after as many steps,
    though it also steps over what is left, or lets windows go on from one epoch to the next.
    """
    recipe = run.recipe
    epochs = recipe.epochs or 1
    found = [(run, "stepped", rivals), (run, "dropped", rivals)]
    if epochs > 1:
        whole = epochs * (len(run.rows) // (recipe.batch * recipe.accumulation))
        joined = replace(run, rows=run.rows * epochs, recipe=replace(recipe, epochs=1))
        full = tuple(rival for rival in rivals if rival.incomplete_window == PAPER.incomplete_window)
        found += [(_ended(run, whole), "stepped", rivals), (joined, "stepped", full),
                  (_ended(joined, whole), "stepped", full)]  # fmt: skip
    return found


def _ended(run: TrainExperiment, steps: int) -> TrainExperiment:
    return replace(run, recipe=replace(run.recipe, epochs=None, steps=steps))


def _tokens(theory: Theory) -> list:
    pairs = scenes.ragged()[:4]
    objective = Objective(beta=0.5, sft_weight=1.0)
    whole = replace(BASE, objective=objective, batch=4)
    split = replace(whole, batch=1, accumulation=4)
    runs = (scenes.run(pairs, theory, whole), scenes.run(pairs, theory, split))
    return [scene("four pairs of unequal lengths, with an SFT term, as one batch and as four", *runs, family="sft")]


@check(
    "ACCUM-TOKENS", judges="same", chapter="step",
    stage="step", level="should", needs={"train.gradient"}, scenes=_tokens,
    claim="With an SFT term too, the gradient does not depend on how the batch is cut into micro-batches of one size.",
    source="the gradient of a mean over pairs is the mean of their gradients", covers=("ACCUM-EVEN",),
    why="The same recipe trains differently on a machine with less memory.",
    bug="TRL 0.20 to 1.16: the sft term is a mean over each micro-batch's tokens; gradients differ by 16 to 27 %.",
    fix="Normalise by the tokens, or the pairs, of the whole step.",
)  # fmt: skip
def tokens(case: Case) -> Comparison:
    return worst([equal(case, "gradient")])


def _permuted(theory: Theory) -> list:
    pairs = scenes.rectangular(6)
    forward = scenes.run(pairs, theory, BASE)
    return [scene("six pairs, and the same backwards", forward, replace(forward, rows=forward.rows[::-1]))]


@check(
    "STEP-PERMUTATION", judges="same", chapter="step",
    stage="step", level="must", needs={"train.gradient"}, scenes=_permuted,
    claim="The gradient of a batch does not depend on the order of its pairs.", source=MEAN,
    covers=("STEP-PERM", "LOSS-PERM"), why="Chosen and rejected rows that are matched by position drift apart.",
    bug="Chosen and rejected halves split as if they were interleaved.", fix="Keep the two rows of a pair together.",
)  # fmt: skip
def permutation(case: Case) -> Comparison:
    return equal(case, "gradient")


def _two_steps(theory: Theory) -> list:
    recipe = Recipe(Objective(beta=0.5), learning_rate=8.0, batch=2, steps=3)
    pairs = scenes.rectangular(4)
    again = Recipe(Objective(beta=0.5), learning_rate=8.0, batch=4, steps=2)
    return [
        scene("three steps on batches of two", scenes.run(pairs, theory, recipe)),
        scene("two steps on one batch", scenes.run(pairs, theory, again)),
    ]


@check(
    "STEP-TWO", chapter="step", stage="step", level="must", needs={"train.logits"}, scenes=_two_steps, source=SGD,
    draw=draws.runs("steps"),
    rivals=(PAPER.but(stale="kept"), PAPER.but(reference="policy-live"), PAPER.but(momentum_extra=0.9)),
    claim="Consecutive steps end where plain SGD on the same batches ends.",
    covers=("STEP-TWO", "RUN-REPLAY", "RUN-LR", "RUN-DESCENT"),
    why="One step sees neither gradients that were not cleared nor a reference that moves.",
    bug="zero_grad forgotten: each step repeats all earlier ones.",
    fix="Clear gradients after every step; leave the reference alone.",
)  # fmt: skip
def two(case: Case) -> Comparison:
    return agree(case, "logits")


def _one_step(theory: Theory) -> list:
    return [scene("one step of six pairs", scenes.run(scenes.rectangular(6), theory, BASE))]


@check(
    "STEP-NOTHING-HIDDEN", chapter="step", stage="step", level="must", needs={"train.gradient", "train.moved"},
    scenes=_one_step, source=SGD, rivals=(PAPER.but(weight_decay_extra=0.01),),
    claim="With SGD and no weight decay, what has no gradient does not move.",
    covers=("STEP-SGD", "RUN-CONSERVE"), why="Undeclared decay pulls every weight towards zero, every step.",
    bug="AdamW's default weight decay of 0.01 left on.", fix="Pass weight decay explicitly, zero included.",
)  # fmt: skip
def nothing_hidden(case: Case) -> Comparison:
    seen, paper = case.observed[0].gradient, case.predicted().gradient
    limit = np.broadcast_to(np.asarray(case.bound("gradient")), paper.shape)
    idle = (paper == 0) & (np.abs(seen) > limit)
    if not idle.any():
        return Comparison("pass", error=0.0, bound=float(limit.max()))
    cell = tuple(int(i) for i in np.unravel_index(int(np.argmax(np.where(idle, np.abs(seen), 0))), seen.shape))
    return Comparison(
        "fail", error=float(abs(seen[cell])), bound=float(limit[cell]), observed=float(seen[cell]), expected=0.0,
        where=f"{int(idle.sum())} logits without a gradient moved, among them the "
        + labels(case.experiments[0], "gradient")(cell),
    )  # fmt: skip


def _clip(theory: Theory) -> list:
    pairs = scenes.rectangular(6)
    split = replace(BASE, batch=2, accumulation=3)
    return [
        scene("clipping at a fraction of the norm", scenes.run(pairs, theory, replace(BASE, clip_norm=2.0**-5)),
            family="clip"),
        scene("the same over three micro-batches", scenes.run(pairs, theory, replace(split, clip_norm=2.0**-5)),
            family="clip"),
    ]


@check(
    "CLIP-NORM", chapter="step", stage="step", level="must", needs={"train.gradient"}, scenes=_clip,
    draw=draws.runs("whole", "even", clip=True),
    rivals=(PAPER.but(clip="ignored"), PAPER.but(clip="value")),
    claim="Clipping scales the step's whole gradient by threshold / norm, and keeps its direction.",
    source="Pascanu et al. 2013 (arXiv:1211.5063), algorithm 1", covers=("CLIP-ACTIVE", "RUN-CLIP", "STEP-GRADNORM"),
    why="Clipping each micro-batch, or each value, is another algorithm.",
    bug="Clipping inside the accumulation loop.", fix="Clip once, after the last backward of the step.",
)  # fmt: skip
def clip_norm(case: Case) -> Comparison:
    return agree(case, "gradient")


def _no_clip(theory: Theory) -> list:
    run = scenes.run(scenes.rectangular(6), theory, replace(BASE, clip_norm=64.0))
    return [scene("clipping far above the norm", run, family="clip")]


@check(
    "CLIP-INACTIVE", chapter="step", stage="step", level="must", needs={"train.gradient"}, scenes=_no_clip,
    rivals=(PAPER.but(clip="always"),), claim="Clipping does nothing below its threshold.",
    source="Pascanu et al. 2013 (arXiv:1211.5063), algorithm 1", covers=("CLIP-INACTIVE",),
    why="Always normalising is another optimizer.", bug="Gradient divided by its norm at every step.",
    fix="Scale by min(1, threshold / norm).",
)  # fmt: skip
def clip_inactive(case: Case) -> Comparison:
    return agree(case, "gradient")


def _tensors(theory: Theory) -> list:
    """A step that is longer than the weights: what is stored of it is the gradient, to rounding."""
    recipe = Recipe(Objective(beta=0.5), learning_rate=64.0, batch=4)
    pairs = scenes.rectangular(4, prompt=3, completion=3)
    whole = scenes.run(pairs, theory, recipe, body=Body("speaking", layers=2), policy=None, reference=None)
    clipped = replace(whole, recipe=replace(recipe, clip_norm=2.0**-5))
    return [scene("an ordinary small Llama, one step without clipping and one with", whole, clipped,
        family="clip tensors")]  # fmt: skip


@check(
    "CLIP-GLOBAL", chapter="step", stage="step", level="must", needs={"train.weights"},
    scenes=_tensors,
    claim="One factor clips the gradients of all parameters: threshold over the norm of all of them together.",
    source="Pascanu et al. 2013 (arXiv:1211.5063), algorithm 1", covers=("CLIP-ACTIVE", "RUN-CLIP"),
    why="Parameters that are clipped one by one get a step in another direction than the gradient's.",
    bug="clip_grad_norm_ called on each parameter, or on each group of them.",
    fix="Clip once, over all parameters that are trained.",
)  # fmt: skip
def clip_global(case: Case) -> Comparison:
    """The step without clipping is rate * g, so that the one with it has to be threshold / |g| of it.

    A change is read off weights that are stored to nearest, before and after: each of its numbers is off by the
    roundoff times twice the weight plus the change.  The two forwards and backwards are the same arithmetic on the same
    numbers; their gradients may differ where a kernel adds in another order, by some hundred roundings.
    """
    recipe = case.experiments[1].recipe
    whole, clipped = (seen.weights for seen in case.observed)
    names = sorted(name for name in whole if np.any(whole[name]) and name in clipped)
    sizes = {name: (float(np.linalg.norm(whole[name])), float(np.linalg.norm(clipped[name]))) for name in names}
    step = recipe.learning_rate * recipe.clip_norm  # the length of a clipped step
    norm = float(np.linalg.norm([size for size, _ in sizes.values()]))
    if norm <= 2.0 * step:
        return Comparison("unknown", reason=f"the gradient is {norm / step:.3g} times the threshold: too little")
    told = [_one_factor(case, name, *sizes[name], step / norm, norm) for name in names]
    found = worst(told)
    alone = [name for name in names if abs(sizes[name][1] - min(step, sizes[name][0])) < 1e-3 * step]
    if found.verdict == "fail" and len(alone) == len(names):
        return replace(found, where=f"{found.where}: each parameter is clipped alone")
    return found


def _one_factor(case: Case, name: str, whole: float, clipped: float, factor: float, norm: float) -> Comparison:
    """The length of one parameter's clipped step against `factor` times that of its step without clipping."""
    count = case.observed[0].weights[name].size
    weight = 2.0 * np.sqrt(count)  # the probe's weights lie within (-1.2, 1.2); as a norm, with room
    open_ = case.precision * ((2.0 * weight + clipped) + factor * (2.0 * weight + whole) + 500.0 * factor * norm)
    if factor * whole < 8.0 * open_:
        return Comparison("not-applicable", reason=f"{name} moves too little")
    return close(clipped, factor * whole, open_, label=lambda _: f"length of the clipped step of {name}")


def _speaking(theory: Theory) -> list:
    recipe = Recipe(Objective(beta=0.5), learning_rate=0.5, batch=4)
    run = scenes.run(scenes.rectangular(4, prompt=3, completion=3), theory, recipe, body=Body("speaking", layers=2))
    return [scene("an ordinary small Llama, one step", replace(run, policy=None, reference=None), family="speaking")]


@check(
    "STEP-ALL-PARAMETERS", chapter="step", stage="step", level="must", needs={"train.moved"}, scenes=_speaking,
    claim="Every trainable parameter that the log-probs depend on gets a gradient and moves.",
    source="the chain rule", covers=("POL-ALLGRAD", "RUN-UPDATE-LOST"),
    why="A frozen embedding or a detached block trains half a model.",
    bug="Gradient checkpointing with LoRA and inputs without gradient: silently no training (TRL 0.7).",
    fix="Look for no_grad, detach and requires_grad_(False) on the policy's path.",
)  # fmt: skip
def all_parameters(case: Case) -> Comparison:
    still = sorted(name for name, change in case.observed[0].moved.items() if change == 0)
    if still:
        shown = ", ".join(still[:3]) + (f" and {len(still) - 3} more" if len(still) > 3 else "")
        return Comparison("fail", observed=f"unmoved: {shown}", expected="every parameter moves")
    return Comparison("pass", error=0.0, bound=0.0)
