"""Do N processes train as one?

The runs are started as torchrun starts them, N times the same program, on pairs that each own their tokens: what every
pair weighs in the step is read from its own logits, whichever rank it was on.  `batch` is of one process, so that the
prediction is that of one process with N times the batch.  Every process imports its trainer anew, so the chapter is
of the full tier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from dpocheck.check import Case, Comparison, agree, check, close, logged, scene, worst
from dpocheck.checks import scenes
from dpocheck.experiment import Objective, Recipe, TrainExperiment
from dpocheck.oracle.theory import PAPER, Theory

MEAN = "Rafailov et al. 2023, Eq. 7: the expectation over the data set is a mean over pairs, wherever they are computed"
BASE = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=3, world_size=2)
SLOW = replace(BASE, learning_rate=16.0)  # the change is still read to a part in 10^6, and errors hardly spread
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")  # fmt: skip
new = partial(scene, family="ranks")


def promised(case: Case) -> Case:
    """The case under what the documentation says of a batch that does not fill all ranks."""
    return replace(case, theory=case.theory.but(ranks_tail=case.says.uneven_ranks or "kept"))


def either(case: Case, judge: Callable[[Case], Comparison]) -> Comparison:
    """The judgement under what is documented and measured, or, where that fails, where every pair weighs the same:
    right whatever the trainer does with micro-batches."""
    first = judge(promised(case))
    if first.verdict != "fail":
        return first
    alike = judge(replace(case, theory=case.theory.but(uneven="pairs", uneven_metrics="pairs")))
    return alike if alike.verdict == "pass" else first


def _even(theory: Theory) -> list:
    return [new("six pairs on two processes of three", scenes.run(scenes.rectangular(6), theory, BASE))]


def _splits(theory: Theory) -> list:
    six = scenes.rectangular(6)

    def run(**changes: object) -> TrainExperiment:
        return scenes.run(six, theory, replace(BASE, **changes))

    return [
        *_even(theory),
        new("six pairs on two processes, in micro-batches of one each", run(batch=1, accumulation=3), tier="full"),
        new("six pairs on three processes of two", run(batch=2, world_size=3), tier="full"),
        new("six pairs on two processes, clipped", run(clip_norm=2.0**-5), tier="full"),
    ]


@check(
    "RANKS-SPLIT", chapter="ranks", stage="step", level="must", tier="full", needs={"train.gradient"}, scenes=_splits,
    rivals=(PAPER.but(gradient_scale=2.0), PAPER.but(gradient_scale=0.5)),
    claim="A step on N processes is the step of one process on the same global batch.", source=MEAN,
    covers=("DP-EQ", "RUN-DDP", "RUN-FSDP"),
    why="The learning rate, or the data, silently changes with the number of GPUs.",
    bug="HALOs, until it got `process_index`: every rank iterated over the same pairs.",
    fix="Give each rank its own rows, divide by the pairs of all ranks, and add the ranks' gradients (under DDP, which "
    "averages, multiply by the number of ranks).",
)  # fmt: skip
def split(case: Case) -> Comparison:
    clipped = case.experiments[0].recipe.clip_norm is not None  # a clipped gradient keeps its norm, scaled or not
    return agree(replace(case, rivals=()) if clipped else case, "gradient")


@check(
    "RANKS-WEIGHTS", judges="same", chapter="ranks", stage="step", level="must", tier="full",
    needs={"train.spies.ranks"}, scenes=_even, claim="Every process ends with the same weights.",
    source="data parallelism: replicas start from the same weights and take the same steps", covers=("DP-EQ",),
    why="Ranks that drift apart train several models, of which one is saved.",
    bug="Gradients reduced to the first rank instead of to all.",
    fix="All-reduce the gradients of every trainable parameter before the optimizer's step.",
)  # fmt: skip
def same_weights(case: Case) -> Comparison:
    apart = {told["rank"]: told["apart"] for told in case.observed[0].spies["ranks"] if told["apart"] is not None}
    if len(apart) < 2:
        return Comparison("not-applicable", reason="the other processes show no weights of their own")
    rank = max(sorted(apart)[1:], key=apart.get)  # type: ignore[arg-type]
    # Two ranks that both are as far off as rounding explains.
    limit = 2 * float(np.max(case.bound("logits")))
    return close(apart[rank], 0.0, limit, label=lambda _: f"largest difference of a logit between ranks 0 and {rank}")


@check(
    "RANKS-REFERENCE", judges="frozen", chapter="ranks", stage="reference", level="must", tier="full",
    needs={"train.spies.ranks"}, scenes=_even,
    claim="The reference's parameters and buffers are the same bits after training as before, on every process.",
    source="Rafailov et al. 2023, section 4: pi_ref is fixed", covers=("REF-FROZEN",),
    why="The pairs of one rank are compared with another model than those of the rest.",
    bug="A reference that only the first rank keeps out of the optimizer.",
    fix="Freeze the reference wherever it is loaded.",
)  # fmt: skip
def frozen(case: Case) -> Comparison:
    seen = {told["rank"]: told["reference"] for told in case.observed[0].spies["ranks"] if "reference" in told}
    if not seen:
        return Comparison("not-applicable", reason="no process loaded the reference that was handed over")
    for rank, spy in seen.items():
        if spy["changed"]:
            return Comparison(
                "fail", observed=f"changed on rank {rank}: {', '.join(spy['changed'][:3])}", expected="nothing changed"
            )
    return Comparison("pass", error=0.0, bound=0.0)


# ------------------------------------------------------------------------------------------------------- uneven ranks


def _uneven(theory: Theory) -> list:
    """Five pairs on two processes of three; five others, of other tokens, are evaluated in the same way."""
    pairs = scenes.rectangular(10)
    tables = {"policy": scenes.table(pairs, 1), "reference": scenes.table(pairs, 2)}
    held = scenes.rows(pairs[5:], scenes.SIZE, theory)
    recipe = replace(SLOW, eval_batch=3)
    return [
        new("five pairs on two processes of three",
            scenes.run(pairs[:5], theory, recipe, evaluation=(("held out", held),), **tables))
    ]  # fmt: skip


def _last_step(theory: Theory) -> list:
    recipe = replace(SLOW, learning_rate=1.0, batch=1, steps=None, epochs=1)
    run = scenes.run(scenes.rectangular(5), theory, recipe)
    return [*_uneven(theory), new("five pairs, one a process: the last step has one for two", run, tier="full")]


@check(
    "RANKS-PAIRS", chapter="ranks", stage="step", level="must", tier="full", needs={"train.logits"}, scenes=_last_step,
    claim="In a batch that does not fill all processes no pair is lost or counted twice, and all weigh the same, save "
    "what the documentation says.",
    source=MEAN + "; the trainer's documentation", covers=("DP-EQ", "RUN-COVERAGE"), says="uneven_ranks",
    why="Some pairs count twice or never, and which ones depends on the number of GPUs.",
    bug="open-instruct takes the mean of the ranks' means: pairs of a rank that has few weigh more.",
    fix="Divide the sum over all ranks by the number of pairs on all ranks; give a filler a weight of 0.",
)  # fmt: skip
def each_pair(case: Case) -> Comparison:
    seen, reach = weights(case, case.observed[0].logits)

    def under(**choice: str) -> Comparison:
        theory = case.theory.but(**choice)
        due, _ = weights(case, case.predicted(theory=theory).logits)
        limit = reach * np.max(case.limit(case.experiments[0], "logits", theory, case.precision))
        return close(seen, due, limit, label=lambda at: f"the weight of pair {at[0] + 1}")

    alike = under(uneven="pairs")
    if alike.verdict == "pass":
        return alike
    shown = f"the pairs weigh {', '.join(f'{weight:.3f}' for weight in seen)}"
    documented = case.says.uneven_accumulation == "micro-batches"
    for choice, stands, words in (
        ({"uneven": "micro-batches"}, documented, "the mean of the processes' means is taken"),
        ({"ranks_tail": "repeated"}, case.says.uneven_ranks == "repeated",
         "rows from the start of the epoch fill the last process, and count again"),
    ):  # fmt: skip
        if under(**choice).verdict == "pass":
            reason = f"{words}{', as documented' if stands else ''}: {shown}"
            return replace(alike, verdict="info" if stands else "fail", reason=reason)
    lost = ", ".join(str(number) for number, weight in enumerate(seen, start=1) if abs(weight) < 1e-3)
    return replace(alike, reason=f"lost: pair {lost}; {shown}" if lost else shown)


def weights(case: Case, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pair,): what each pair weighs in the change of the logits, and how far an error of 1 in each logit reaches.

    The pairs own their tokens, so that the change, over the rate, is sum_i w_i g_i, with g_i the gradient of pair i
    alone, and g_i . g_j = 0: w_i = (change . g_i) / (rate g_i . g_i).  An error e in every logit moves w_i by at most
    e sum |g_i| / (rate g_i . g_i).
    """
    experiment = case.experiments[0]
    rate = experiment.recipe.learning_rate
    change = (experiment.policy.logits() - logits) / rate
    found, reach = [], []
    alone = replace(experiment.recipe, batch=1, accumulation=1, world_size=1, steps=1, epochs=None)
    for row in experiment.rows:
        one = replace(experiment, rows=(row,), evaluation=(), recipe=alone)
        gradient = case.predict(one, case.theory).gradient
        square = float(np.sum(gradient**2))
        found.append(float(np.sum(change * gradient)) / square)
        reach.append(float(np.sum(np.abs(gradient))) / (rate * square))
    return np.array(found), np.array(reach)


def _logged(theory: Theory) -> list:
    return [*_even(theory), *(replace(uneven, tier="full") for uneven in _uneven(theory))]


@check(
    "RANKS-METRICS", chapter="ranks", stage="metrics", level="must", tier="full",
    needs={"train.history.loss"}, scenes=_logged,
    claim="What is logged of a step is the mean over the pairs of all processes.", source=MEAN, covers=("MET-AGG",),
    why="The curve that people look at shows one GPU's share of the data.",
    bug="TRL until 0.14 logged the first rank's rewards.", fix="Gather the per-pair values of all ranks, then average.",
)  # fmt: skip
def metrics(case: Case) -> Comparison:
    """Metric by metric: a loss may count the rows that fill the last process, as its gradient does, beside rewards
    that leave them out."""
    return worst([either(case, lambda one, name=name: logged(one, name)) for name in METRICS])


@check(
    "RANKS-EVALUATION", chapter="ranks", stage="metrics", level="must", tier="full",
    needs={"train.history.loss"}, scenes=_uneven,
    claim="Metrics of a held-out set are means over its pairs, each counted once, though the processes have unequal "
    "numbers of them.", source="the mean of a set is over its members", covers=("MET-AGG",),
    why="Rows that only fill the last batch change the number by which models are chosen.",
    bug="TRL 0.29 to 1.16 gathers with `gather`, not `gather_for_metrics`: the fillers of the last batch count.",
    fix="Leave the fillers out before averaging, or weight each batch by its own pairs.",
)  # fmt: skip
def evaluation(case: Case) -> Comparison:
    return worst([logged(promised(case), name, split="held out") for name in METRICS])


# ------------------------------------------------------------------------------------------------------- the reference


def _precomputed(theory: Theory) -> list:
    recipe = replace(BASE, precompute_reference=True)
    five = scenes.run(scenes.rectangular(5), theory, recipe)
    return [
        new("five pairs on two processes of three, reference precomputed", five),
        new("the same from a file", replace(five, rows_on_disk=True), tier="full"),
        new("six pairs, reference precomputed", scenes.run(scenes.rectangular(6), theory, recipe), tier="full"),
    ]


@check(
    "RANKS-PRECOMPUTED", chapter="ranks", stage="step", level="must", tier="full", needs={"train.gradient"},
    scenes=_precomputed, rivals=(PAPER.but(reference="rolled"), PAPER.but(reference="policy-live")),
    claim="Reference log-probs computed on N processes and kept equal those computed online.",
    source="Rafailov et al. 2023, section 4: pi_ref is fixed", covers=("REF-CACHE-EQ", "REF-CACHE-ALIGN"),
    why="A cache put together in another order than the rows gives pairs each other's reference.",
    bug="open-instruct's cache was indexed by the position in a rank's own shard: wrong on more than one.",
    fix="Key the cache by row; compute it on one rank, or gather it with the rows' numbers.",
)  # fmt: skip
def precomputed(case: Case) -> Comparison:
    return either(case, lambda one: agree(one, "gradient"))
