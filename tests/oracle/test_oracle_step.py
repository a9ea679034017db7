"""Are log-probs, metrics and gradients of table models right?  Judged by hand and by central differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle_scenes import PAIRS, SIZE, step, table

from dpocheck.experiment import LogpExperiment, Objective, Pair, Table, TokenRow
from dpocheck.oracle import PAPER, predict
from dpocheck.oracle.theory import values

OBJECTIVES = [
    Objective(beta=0.5), Objective(beta=0.5, label_smoothing=0.2), Objective("robust", 0.5, 0.2),
    Objective("ipo", 0.5), Objective("simpo", 2.0, gamma=0.75), Objective(beta=0.5, length_normalised=True),
    Objective(beta=0.5, sft_weight=0.3),
]  # fmt: skip


def plain_logp(logits: np.ndarray, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    """One token at a time, from the definition."""
    total, previous = 0.0, prompt[-1]
    for token in completion:
        total += logits[previous, token] - np.log(np.exp(logits[previous]).sum())
        previous = token
    return total


def test_a_batch_one_pair_at_a_time():
    experiment = step(Objective(beta=0.5))
    policy, reference = experiment.policy.logits(), experiment.reference.logits()
    losses, rewards = [], []
    for pair in PAIRS:
        ratios = [plain_logp(policy, pair.prompt, y) - plain_logp(reference, pair.prompt, y)
                  for y in (pair.chosen, pair.rejected)]  # fmt: skip
        rewards.append([0.5 * ratio for ratio in ratios])
        losses.append(np.log1p(np.exp(-0.5 * (ratios[0] - ratios[1]))))
    seen = predict(experiment)
    chosen, rejected = np.array(rewards).T
    assert seen.loss == pytest.approx(np.mean(losses), abs=1e-14)
    assert seen.metrics["rewards/chosen"] == pytest.approx(chosen.mean(), abs=1e-14)
    assert seen.metrics["rewards/margins"] == pytest.approx((chosen - rejected).mean(), abs=1e-14)
    assert seen.metrics["rewards/accuracies"] == np.mean(chosen > rejected)
    expected = np.mean([plain_logp(policy, pair.prompt, pair.rejected) for pair in PAIRS])
    assert seen.metrics["logps/rejected"] == pytest.approx(expected, abs=1e-13)


def changed(experiment, context: int, target: int, by: float):
    return replace(experiment, policy=experiment.policy.shifted((context, target, by)))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.kind}-{o.label_smoothing}-{o.length_normalised}")
def test_the_gradient_is_a_central_difference_in_every_logit(objective):
    # error: step^2 / 6 times a third derivative of order 1, 1e-9; rounding 1e-15 / step, 1e-11
    experiment, size = step(objective), 2.0**-14
    gradient = predict(experiment).gradient
    for context in range(SIZE):
        for target in range(SIZE):
            up, down = (predict(changed(experiment, context, target, s * size)).loss for s in (1, -1))
            assert gradient[context, target] == pytest.approx((up - down) / (2 * size), abs=3e-8)


DIFFERENTIABLE = [
    {"normaliser": name} for name in ("none", "prob", "log2", "negated", "max", "argmax")
] + [
    {"counted": name} for name in values()["counted"]
] + [
    {"link": name} for name in values()["link"]
] + [
    {"smoothing": name} for name in values()["smoothing"]
] + [
    {"margins": name} for name in values()["margins"]
] + [
    {"reduction": name} for name in values()["reduction"]
] + [
    {"logps": name} for name in values()["logps"]
] + [
    {"beta_on": name} for name in values()["beta_on"]
] + [
    {"reference": name} for name in ("none", "swapped", "rolled", "batch-mean", "policy-graph")
] + [
    {"pairing": "interleaved"}, {"pairing": "rolled"}, {"columns": "swapped"}, {"temperature": 2.0}, {"clamp": 1.0},
    {"token_floor": -2.0}, {"offset": 0.5}, {"sft_extra": 0.25}, {"kl_extra": 0.25}, {"scale": 0.5},
    {"normalised": "always"}, {"coefficients": (1.0, -0.5, -0.25, 2.0)}, {"smoothing_default": 0.2},
    {"sft_mean": "tokens"}, {"sft_mean": "sum"}, {"sft": "replaces"}, {"counted_reference": "no-eos"},
]  # fmt: skip


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("change", DIFFERENTIABLE, ids=str)
def test_faulty_losses_have_their_own_gradient(change, padding):
    # wrong, but differentiated rightly: a fault of the loss alone has the gradient of that loss
    experiment, theory, size = step(Objective(beta=0.5, label_smoothing=0.1, sft_weight=0.2)), PAPER.but(**change), 1e-5
    experiment = replace(experiment, padding=padding)
    gradient = predict(experiment, theory).gradient
    direction = np.random.default_rng(3).normal(size=(SIZE, SIZE))
    moved = [replace(experiment, policy=Table.of(experiment.policy.logits() + s * size * direction)) for s in (1, -1)]
    up, down = (predict(one, theory).loss for one in moved)
    assert np.any(gradient)
    assert np.sum(gradient * direction) == pytest.approx((up - down) / (2 * size), rel=1e-6, abs=1e-7)


def logits_under_glass(experiment, block: np.ndarray, kind: str) -> float:
    """The loss of a model whose logits are table[context] + sum_h share[h] block[h]: from its definition."""

    def logp(logits: np.ndarray, prompt: tuple[int, ...], completion: tuple[int, ...], extra: np.ndarray) -> float:
        ids, total = prompt + completion, 0.0
        for t in range(len(prompt), len(ids)):
            distances = [t - 1 - j for j in range(t)]
            scores = [2 * (np.cos(d) - np.sin(d)) if kind == "clock" else 0.0 for d in distances]
            weights = np.exp(scores)
            shares = np.zeros(len(logits))
            for j, weight in enumerate(weights / weights.sum()):
                shares[ids[j]] += weight
            z = logits[ids[t - 1]] + shares @ extra
            total += z[ids[t]] - np.log(np.exp(z).sum())
        return total

    policy, reference, zero = experiment.policy.logits(), experiment.reference.logits(), np.zeros_like(block)
    losses = []
    for pair in experiment.pairs:
        h = [logp(policy, pair.prompt, y, block) - logp(reference, pair.prompt, y, zero)
             for y in (pair.chosen, pair.rejected)]  # fmt: skip
        losses.append(np.log1p(np.exp(-experiment.objective.beta * (h[0] - h[1]))))
    return float(np.mean(losses))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", ["glass", "clock"])
def test_attended_is_the_gradient_of_the_glass_block(kind, padding):
    experiment, size, zero = step(body=kind, padding=padding), 2.0**-14, np.zeros((SIZE, SIZE))
    seen = predict(experiment)
    assert seen.loss == pytest.approx(logits_under_glass(experiment, zero, kind), abs=1e-14)
    for token in range(SIZE):
        for target in (0, 3, 5, 14):
            block = zero.copy()
            block[token, target] = size
            up, down = (logits_under_glass(experiment, s * block, kind) for s in (1, -1))
            assert seen.attended[token, target] == pytest.approx((up - down) / (2 * size), abs=3e-9)
    assert not seen.attended[15].any()  # padding
    assert seen.gradient == pytest.approx(predict(step()).gradient, abs=1e-16)


def rows(*specs: tuple[tuple[int, ...], int, int]) -> tuple[TokenRow, ...]:
    """(ids, start of the completion, pads on the right) each."""
    return tuple(
        TokenRow((*ids, *[15] * pads), (1,) * len(ids) + (0,) * pads,
                 (0,) * start + (1,) * (len(ids) - start) + (0,) * pads)
        for ids, start, pads in specs
    )  # fmt: skip


LOGP = LogpExperiment(table(1), rows(((1, 2, 3, 4, 14), 2, 1), ((5, 6, 7, 8, 0, 14), 3, 0)), dtype="float64")


def test_counted_positions_by_hand():
    # the logits after token t - 1 predict token t, for the completion's tokens alone
    assert predict(LOGP).counted == (((2, 3, 1), (3, 4, 1), (4, 14, 1)), ((0, 14, 1), (7, 8, 1), (8, 0, 1)))


@pytest.mark.parametrize(("rule", "first_row"), [
    ("prompt", ((1, 2, 1), (2, 3, 1), (3, 4, 1), (4, 14, 1))),
    ("last-prompt", ((1, 2, 1), (2, 3, 1), (3, 4, 1), (4, 14, 1))),
    ("no-first", ((3, 4, 1), (4, 14, 1))),
    ("no-eos", ((2, 3, 1), (3, 4, 1))),
    ("eos-twice", ((2, 3, 1), (3, 4, 1), (4, 14, 2))),
    ("last-only", ((4, 14, 1),)),
    ("padding", ((2, 3, 1), (3, 4, 1), (4, 14, 1), (14, 15, 1))),
    ("unshifted", ((3, 3, 1), (4, 4, 1), (14, 14, 1))),
    ("unshifted-padding", ((3, 3, 1), (4, 4, 1), (14, 14, 1), (15, 15, 1))),
    ("unshifted-all", ((1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 4, 1), (14, 14, 1), (15, 15, 1))),
    ("shifted-back", ((4, 3, 1), (14, 4, 1), (15, 14, 1))),
    ("double-shift", ((1, 3, 1), (2, 4, 1), (3, 14, 1))),
    ("mask-unshifted", ((3, 4, 1), (4, 14, 1), (14, 15, 1))),
])  # fmt: skip
def test_wrong_rules_by_hand(rule, first_row):
    assert predict(LOGP, PAPER.but(counted=rule)).counted[0] == first_row


def test_zero_id_and_pad_id_rules_by_hand():
    zero = predict(LOGP, PAPER.but(counted="no-zero-id")).counted[1]
    assert zero == ((0, 14, 1), (7, 8, 1))
    padded = LogpExperiment(table(1), rows(((1, 2, 15, 14), 2, 1)), dtype="float64")
    assert predict(padded, PAPER.but(counted="no-pad-id")).counted[0] == ((15, 14, 1),)


def test_the_longest_row_loses_its_last_token():
    counted = predict(LOGP, PAPER.but(counted="longest-loses-last")).counted
    assert counted[0] == predict(LOGP).counted[0]
    assert counted[1] == ((7, 8, 1), (8, 0, 1))


def test_log_probs_and_their_gradient():
    seen, size = predict(LOGP), 2.0**-14
    assert seen.logps[0] == pytest.approx(plain_logp(LOGP.table.logits(), (1, 2), (3, 4, 14)), abs=1e-14)
    for context, target in ((2, 3), (2, 9), (8, 0), (14, 15)):
        moved = (replace(LOGP, table=LOGP.table.shifted((context, target, s * size))) for s in (1, -1))
        up, down = (predict(one).logps for one in moved)
        assert seen.gradient[:, context, target] == pytest.approx((up - down) / (2 * size), abs=3e-9)


@given(st.integers(0, 3), st.sampled_from(["right", "left"]))
def test_padding_changes_nothing(extra, padding):
    # a longer, unrelated pair pads the others; the mean of three losses is then known from the single ones
    long = Pair((9, 10), (11, 12, 13) * (extra + 1) + (14,), (12, 14))
    alone = [predict(step(pairs=(pair,))).loss for pair in (*PAIRS[:2], long)]
    together = predict(step(pairs=(*PAIRS[:2], long), padding=padding))
    assert together.loss == pytest.approx(np.mean(alone), abs=1e-14)


def test_identical_completions_have_no_gradient_whatever_the_reference():
    # T9.5
    seen = predict(step(pairs=(Pair((1, 2), (3, 4, 14), (3, 4, 14)),)))
    assert seen.loss == pytest.approx(np.log(2), abs=1e-16)
    assert not seen.gradient.any()


def test_gradients_of_swapped_data_add_up_without_the_reference():
    # T9.2: g(D) - g(D swapped) = -beta mean(d) = 2 g(D) with the policy as reference
    experiment = step()
    swapped = replace(experiment, pairs=tuple(Pair(p.prompt, p.rejected, p.chosen) for p in PAIRS))
    own = replace(experiment, reference=experiment.policy)
    difference = predict(experiment).gradient - predict(swapped).gradient
    assert difference == pytest.approx(2 * predict(own).gradient, abs=1e-15)


def test_a_tracer_sums_to_the_set_of_positions_counted():
    # a saturated tracer: log-probs are exactly -2^k, so the sum is a binary code of the labels that were scored
    logits = np.zeros((SIZE, SIZE))
    for label in range(10):
        logits[:, label] = -(2.0 ** (6 + label))
    logits[:, 10:14] = -(2.0**20)
    logits[:, 14] = -(2.0**16)
    row = TokenRow((3, 1, 4, 0, 7, 14), (1,) * 6, (0, 0, 1, 1, 1, 1))
    seen = predict(LogpExperiment(Table.of(logits), (row,), dtype="float32"))
    assert seen.logps[0] == -(2.0**10 + 2.0**6 + 2.0**13 + 2.0**16)


def test_logits_are_rounded_to_the_checkpoints_type():
    third = LogpExperiment(Table(4, 0.0, ((0, 1, 1 / 3),)), (TokenRow((0, 1), (1, 1), (0, 1)),), dtype="bfloat16")
    z = 0.333984375  # 1/3 to eight bits
    assert predict(third).logps[0] == pytest.approx(z - np.log(np.exp(z) + 3), abs=1e-15)


def test_gradients_that_are_not_cleared_add_up():
    experiment = step(calls=3)
    kept = predict(experiment, PAPER.but(stale="kept"))
    assert np.array_equal(predict(experiment).gradient, predict(step()).gradient)
    assert np.array_equal(kept.gradient, 3 * predict(step()).gradient)
