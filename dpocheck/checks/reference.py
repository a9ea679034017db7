"""Is the reference the one that was meant, frozen, and computed as the policy is?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, agree, check, close, logged, scene, worst
from dpocheck.checks import scenes
from dpocheck.derive import STILL, rows
from dpocheck.experiment import Body, LossExperiment, Objective, Pair, Recipe, Sequence, TrainExperiment
from dpocheck.oracle.numbers import ROUNDOFF
from dpocheck.oracle.theory import PAPER, Theory
from dpocheck.reading import entries

FROZEN = "Rafailov et al. 2023, section 4: pi_ref is fixed during training"


def _start(theory: Theory) -> list:
    pairs = scenes.ragged()
    recipe = Recipe(Objective(beta=0.5), learning_rate=STILL, batch=1, steps=len(pairs))
    run = scenes.run(pairs, theory, recipe)
    run = replace(run, reference=run.policy)
    speaking = replace(run, policy=None, body=Body("speaking", layers=2))  # one formula gives both their weights
    return [
        scene("five pairs of unequal lengths, reference = policy", run, family="ragged"),
        scene("the same with an ordinary small Llama of two layers", speaking, family="speaking"),
    ]


@check(
    "REF-START", chapter="reference", stage="reference", level="must", needs={"train.history.loss"}, scenes=_start,
    rivals=(PAPER.but(reference="none"), PAPER.but(counted_reference="no-eos")),
    claim="Where policy and reference are equal, the loss is log 2 and the rewards are 0, at every length.",
    source="Rafailov et al. 2023, Eq. 7 with pi_theta = pi_ref", covers=("INIT-LOG2", "RUN-INIT", "LOGP-POLREF"),
    why="Any way in which the reference is computed differently from the policy shows here: other tokens, another "
    "mask, another precision, dropout in one of them.",
    bug="TRL 0.29 to 1.15 re-loaded the reference in float32 beside a bfloat16 policy: 0.669 instead of 0.693.",
    fix="Compute both log-probs by one function, on one batch, in one dtype.",
)  # fmt: skip
def start(case: Case) -> Comparison:
    if case.experiments[0].body.kind == "speaking":
        return worst([_at_start(case, name) for name in ("loss", "rewards/chosen", "rewards/rejected")])
    return worst([logged(case, name) for name in ("loss", "rewards/chosen", "rewards/rejected")])


# Two stable evaluations of one Llama of two layers, sixteen wide.  Fifteen products follow each other, each a sum of
# sixteen terms; norms, rotations and softmaxes add some forty roundings a layer: 320 for a logit.  A row scores at most
# eight tokens.
SPEAKING = 8 * 320
COARSE = 0.05  # a bound that no longer tells a wrong layer from rounding


def _at_start(case: Case, name: str) -> Comparison:
    """No model of the policy is needed where it is its own reference: both log-ratios are 0, whatever it does."""
    objective = case.experiments[0].recipe.objective
    if objective.kind == "simpo" or objective.sft_weight:
        return Comparison("not-applicable", reason="what is optimised depends on the policy alone")
    due, slope = 0.0, objective.beta
    if name == "loss":
        predicted = case.predict(LossExperiment(*[(0.0,)] * 4, objective, lengths=((1, 1),)), case.theory)
        due, slope = predicted.reduced, float(np.nansum(np.abs(predicted.slopes)))
    floor = case.observed[0].floor.get(f"history.train.{name}", 0.0)
    precision = max(case.precision, ROUNDOFF.get(case.theory.reference_dtype, 0.0))
    limit = max(1.0, slope) * SPEAKING * precision + floor
    seen = entries(case.observed[0].history, "train", name)
    if not seen or limit > COARSE:
        what = "is not logged" if not seen else "is too coarse in this precision"
        return Comparison("not-applicable", reason=f"{name} of train {what}")
    return close(seen, np.full(len(seen), due), limit, label=lambda at: f"{name} of train, step {at[0] + 1}")


def _given(theory: Theory) -> list:
    pairs = scenes.rectangular(2)
    run = scenes.run(pairs, theory, reference=None, edited=scenes.table(pairs, 3))
    twice = scenes.run(
        pairs, theory, Recipe(Objective(beta=0.5), learning_rate=8.0, batch=2, steps=2), reference=None
    )
    return [
        scene("two pairs, policy changed in memory after it was loaded, no reference handed over", run,
            family="reference absent"),
        scene("two steps on two pairs, no reference handed over", twice, family="reference absent"),
    ]


@check(
    "REF-IS-POLICY-GIVEN", chapter="reference", stage="reference", level="must", needs={"train.logits"},
    scenes=_given, rivals=(PAPER.but(reference="policy-live"),),
    claim="Where no reference is handed over, the reference is the policy as it was passed to the trainer.",
    source=FROZEN, covers=("REF-ADAPTER", "INIT-GRAD"),
    why="A model that was merged, averaged, resized or fine-tuned in memory gets another reference than the user "
    "thinks, and the loss does not start at log 2.",
    bug="TRL 0.29 to 1.16 re-loads the checkpoint that the policy once came from.",
    fix="Copy the policy before training, or pass the reference explicitly.",
)  # fmt: skip
def given(case: Case) -> Comparison:
    if case.experiments[0].recipe.steps == 2:  # the first step of a reference that moves along is right
        return worst([logged(case, "loss"), agree(case, "logits")])
    return worst([logged(case, "loss"), agree(replace(case, rivals=(PAPER.but(reference="disk"),)), "gradient")])


def _two_steps(theory: Theory) -> list:
    pairs = scenes.rectangular(4)
    recipe = Recipe(Objective(beta=0.5), learning_rate=8.0, batch=2, steps=2)
    return [scene("two steps of two pairs", scenes.run(pairs, theory, recipe))]


@check(
    "REF-FROZEN", judges="frozen", chapter="reference", stage="run", level="must", needs={"train.spies.reference"},
    scenes=_two_steps,
    claim="The reference's parameters and buffers are the same bits after training as before, in the dtype that it has "
    "then.", source=FROZEN,
    covers=("REF-FROZEN", "REF-INDEP"), why="A reference that moves is no reference.",
    bug="A reference whose parameters are in the optimizer follows the policy.",
    fix="Keep the reference's parameters out of the optimizer, and give it storage of its own.",
)  # fmt: skip
def frozen(case: Case) -> Comparison:
    changed = case.observed[0].spies["reference"]["changed"]
    if changed:
        return Comparison("fail", observed=f"changed: {', '.join(changed[:3])}", expected="nothing changed")
    return Comparison("pass", error=0.0, bound=0.0)


@check(
    "REF-NO-GRAPH", judges="graph", chapter="reference", stage="reference", level="should",
    needs={"train.spies.reference"},
    scenes=_two_steps, claim="The reference runs without a graph and is left without gradients.", source=FROZEN,
    covers=("REF-NOGRAD",), why="A graph that nobody uses costs the memory of a second model in training.",
    bug="The first OpenRLHF release ran the reference without no_grad and without eval().",
    fix="Wrap the reference's forward in torch.no_grad().",
)  # fmt: skip
def no_graph(case: Case) -> Comparison:
    spy = case.observed[0].spies["reference"]
    if not spy["forwards"]:
        return Comparison("not-applicable", reason="the reference that was handed over was never called")
    if spy["graph"] or spy["gradient"]:
        return Comparison(
            "fail", observed=f"{spy['graph']} forwards with a graph, largest gradient {spy['gradient']:.3g}",
            expected="no graph, no gradient",
        )  # fmt: skip
    return Comparison("pass", error=0.0, bound=0.0)


def _dropout(theory: Theory) -> list:
    pairs = scenes.rectangular(2, prompt=3)
    run = scenes.run(pairs, theory, body=Body("glass", attention_dropout=0.5))
    return [scene("two pairs, attention dropout 0.5 in the model's configuration", run)]


@check(
    "REF-NO-DROPOUT", judges="drawn", chapter="reference", stage="reference", level="must",
    needs={"train.spies.reference"},
    scenes=_dropout, claim="No dropout is drawn in the reference, attention dropout included.", source=FROZEN,
    covers=("REF-EVAL",), why="A reference that answers differently each time is no fixed distribution.",
    bug="TRL 0.5 left dropout on in both models; several trainers still switch off nn.Dropout modules only, which "
    "leaves attention dropout on.",
    fix="reference.eval(), and set the dropout rates of its configuration to 0.",
)  # fmt: skip
def no_dropout(case: Case) -> Comparison:
    spy = case.observed[0].spies["reference"]
    if spy["drawn"]:
        return Comparison(
            "fail", observed=f"random numbers drawn in {spy['drawn']} of {spy['forwards']} forwards", expected="none"
        )
    return Comparison("pass", error=0.0, bound=0.0)


@check(
    "POLICY-NO-DROPOUT", judges="drawn", chapter="reference", stage="reference", level="should",
    needs={"train.spies.policy"},
    scenes=_dropout, claim="No dropout is drawn in the policy, attention dropout included.",
    source="Rafailov et al. 2023, Eq. 7 is of pi_theta itself; its log-ratio to the reference starts at 0",
    covers=("DROP-POLICY",),
    why="With dropout in the policy alone the loss does not start at log 2, and no step repeats.",
    bug="HALOs kept the policy's dropout on beside a reference without.",
    fix="Set the policy's dropout rates to 0, the attention's in its configuration too.",
)  # fmt: skip
def policy_no_dropout(case: Case) -> Comparison:
    spy = case.observed[0].spies["policy"]
    if spy["drawn"]:
        return Comparison(
            "fail", observed=f"random numbers drawn in {spy['drawn']} of {spy['forwards']} forwards", expected="none"
        )
    return Comparison("pass", error=0.0, bound=0.0)


def _precomputed(theory: Theory) -> list:
    pairs = scenes.rectangular(6)
    recipe = Recipe(Objective(beta=0.5), learning_rate=4.0, batch=2, steps=3, precompute_reference=True)
    return [
        scene("six pairs in three batches, reference precomputed", scenes.run(pairs, theory, recipe),
              family="precomputed"),
        scene("three steps on one pair each, one prompt, reference precomputed from the policy", _own_cache(theory),
              family="reference absent"),
    ]  # fmt: skip


def _own_cache(theory: Theory) -> TrainExperiment:
    """Pairs that share their prompt and completions: a step on one moves the others' log-probs."""
    eos = scenes.WORDS.eos
    first, second, third = ((token, token + 1, eos) for token in (2, 4, 6))
    pairs = tuple(Pair((0, 1), *both) for both in ((first, second), (second, third), (third, first)))
    recipe = Recipe(Objective(beta=0.5), learning_rate=4.0, batch=1, steps=3, precompute_reference=True)
    return scenes.run(pairs, theory, recipe, reference=None)


@check(
    "REF-PRECOMPUTED", chapter="reference", stage="reference", level="must", needs={"train.logits"},
    scenes=_precomputed, rivals=(PAPER.but(reference="rolled"), PAPER.but(reference="policy-live")),
    claim="Reference log-probs computed once and kept equal those computed online.", source=FROZEN,
    covers=("REF-CACHE-EQ", "REF-CACHE-ALIGN"), why="A cache out of step gives each pair another pair's reference.",
    bug="TRL 0.12 dropped the precomputed columns; the policy became its own reference and the loss stayed log 2.",
    fix="Key the cache by row, not by position in the batch.",
)  # fmt: skip
def precomputed(case: Case) -> Comparison:
    if case.experiments[0].reference is None:
        return agree(replace(case, rivals=(PAPER.but(reference="policy-live"),)), "logits")
    return agree(case, "logits")


def _stale(theory: Theory) -> list:
    pairs = scenes.rectangular(3)
    recipe = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=3, precompute_reference=True)
    first = scenes.run(pairs, theory, recipe)
    others = rows(scenes.rectangular(6)[3:], scenes.SIZE, theory)
    return [
        scene(f"two runs in one folder, the second with {what}", Sequence((first, second)), family="cache")
        for what, second in (
            ("another reference", replace(first, reference=scenes.table(pairs, 5))),
            ("other rows, as many", replace(first, rows=others)),
            ("rows cut to four tokens", replace(first, recipe=replace(recipe, max_length=4))),
        )
    ]


@check(
    "REF-CACHE-FRESH", chapter="reference", stage="reference", level="must", needs={"sequence.gradient"},
    scenes=_stale, source=FROZEN,
    claim="Precomputed reference log-probs are never used for another reference, other rows or another limit.",
    covers=("REF-CACHE-INVALID",), why="A stale cache trains against a model that is no longer there, silently.",
    bug="open-instruct's cache key leaves out the weights of a local path: two references can share a key.",
    fix="Put a hash of the reference's weights, the tokenized rows and all settings into the cache's key.",
)  # fmt: skip
def cache_fresh(case: Case) -> Comparison:
    runs, papers = case.observed[0].runs, case.predicted().runs
    return worst([
        close(seen.gradient, paper.gradient, case.bound(f"runs.{i}.gradient"))
        for i, (seen, paper) in enumerate(zip(runs, papers, strict=True))
    ])  # fmt: skip
