"""Is the mathematics of the trainer that of the papers?  Run alone: pytest tests/reference/test_dpo.py"""

from __future__ import annotations

import math
from types import SimpleNamespace

import mpmath
import pytest
import torch

from reference_impl import dpo, objectives

MARGINS = [0.0, 1e-8, -1e-3, 1.0, -1.0, 5.0, 16.0, 20.5, -20.5, 37.0, -60.0, 88.0, 104.0, -300.0, 700.0, 1e4, -1e4]
# One rounding of the result and one of the exponential inside: 4 units in the last place leave room for both.
RELATIVE = {torch.float64: 4 * 2.0**-52, torch.float32: 4 * 2.0**-23}


def settings(objective: str = "dpo", **changes: object) -> SimpleNamespace:
    values = {"beta": 0.1, "label_smoothing": 0.0, "gamma": 0.0, "ipo_length": "sum", "sft_weight": 0.0}
    return SimpleNamespace(objective=objective, **{**values, **changes})


def four(w: float, l: float, ref_w: float, ref_l: float, tokens: tuple[int, int] = (4, 2)) -> objectives.PairLogps:
    def one(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    return objectives.PairLogps(one(w), one(l), one(ref_w), one(ref_l), one(tokens[0]), one(tokens[1]))


def exact_loss(margin: float) -> mpmath.mpf:
    with mpmath.workdps(50):
        return mpmath.log1p(mpmath.exp(-mpmath.mpf(margin)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", MARGINS)
def test_loss_is_right_to_the_last_digits_at_any_margin(margin: float, dtype: torch.dtype) -> None:
    logit = torch.tensor([margin], dtype=dtype)
    expected = float(exact_loss(float(logit)))
    tiny = torch.finfo(dtype).tiny  # below it the format itself loses digits
    assert dpo.dpo_loss(logit).item() == pytest.approx(expected, rel=RELATIVE[dtype], abs=tiny)


@pytest.mark.parametrize("margin", MARGINS)
def test_gradient_weight_is_sigmoid_of_the_negative_margin(margin: float) -> None:
    logit = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    dpo.dpo_loss(logit).sum().backward()
    with mpmath.workdps(50):
        expected = -float(1 / (1 + mpmath.exp(mpmath.mpf(margin))))
    # At margin 0⁺ the weight is 1 − z/(1+z) with z near 1: absolute rounding of one unit at 1, hence abs as well.
    assert logit.grad.item() == pytest.approx(expected, rel=RELATIVE[torch.float64], abs=1e-300)


def test_equal_policy_and_reference_give_log_two_and_half_beta_gradient() -> None:
    policy_w = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    reward_w = dpo.implicit_reward(policy_w, torch.tensor([-3.0], dtype=torch.float64), 0.1)
    loss = dpo.dpo_loss(dpo.preference_logit(reward_w, torch.zeros(1, dtype=torch.float64)))
    loss.sum().backward()
    assert loss.item() == math.log(2)
    assert policy_w.grad.item() == pytest.approx(-0.05, rel=1e-15)  # −β σ(0) = −β/2


def test_reward_and_logit_by_hand() -> None:
    # β = ½: r̂_w = ½(−1 − (−3)) = 1, r̂_l = ½(−2 − (−1)) = −½, margin 1½.
    reward_w = dpo.implicit_reward(torch.tensor([-1.0]), torch.tensor([-3.0]), 0.5)
    reward_l = dpo.implicit_reward(torch.tensor([-2.0]), torch.tensor([-1.0]), 0.5)
    assert dpo.preference_logit(reward_w, reward_l).item() == 1.5


def test_token_logps_of_bfloat16_logits_are_float32() -> None:
    # Uniform over 3 tokens: log ⅓, which bfloat16 could not hold to 1e-6.
    logps = dpo.token_logps(torch.zeros(1, 3, dtype=torch.bfloat16), torch.tensor([2]))
    assert logps.dtype == torch.float32
    assert logps.item() == pytest.approx(-math.log(3), rel=1e-6)


def test_value_outside_the_completion_cannot_reach_the_sum() -> None:
    logps = torch.tensor([[float("-inf"), -1.0, -2.0, float("nan")]])
    is_completion = torch.tensor([[False, True, True, False]])
    assert dpo.sequence_logp(logps, is_completion).item() == -3.0


def test_uneven_micro_batches_add_up_to_the_mean_over_all_pairs() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0], dtype=torch.float64)
    parts = [dpo.mean_over_pairs(part, 5) for part in (losses[:2], losses[2:4], losses[4:])]
    assert sum(parts).item() == pytest.approx(4.0, rel=1e-15)  # 20 / 5; the mean of means would be 5


def test_metrics_of_a_tie_count_as_not_accurate_and_kl_averages_both_completions() -> None:
    one = torch.ones(1)
    logps = {"policy_w": -3 * one, "policy_l": -5 * one, "reference_w": -4 * one, "reference_l": -8 * one}
    values = dpo.metrics(logps, one, one, one)
    assert values["rewards/accuracies"].item() == 0.0
    assert values["kl/k1"].item() == 2.0  # ((−3+4) + (−5+8)) / 2


# Expected values: β = 0.5, log-ratios s_w = −1+3 = 2 and s_l = −4+3 = −1, so h = 3, βh = 1.5; 4 and 2 tokens, so the
# means give s_w = ½, s_l = −½, h = 1, βh = ½; SimPO: −1/4 + 4/2 = 1.75, βh = 0.875.  L(z) = log(1 + e^−z).
def L(z: float) -> float:
    return float(exact_loss(z))


BY_HAND = {
    "dpo": (settings("dpo", beta=0.5), L(1.5)),
    "dpo_norm": (settings("dpo_norm", beta=0.5), L(0.5)),
    "cdpo": (settings("cdpo", beta=0.5, label_smoothing=0.2), 0.8 * L(1.5) + 0.2 * L(-1.5)),
    "robust": (settings("robust", beta=0.5, label_smoothing=0.2), (0.8 * L(1.5) - 0.2 * L(-1.5)) / 0.6),
    "ipo sum": (settings("ipo", beta=0.5), 4.0),  # (3 − 1/(2·½))² = 2²
    "ipo mean": (settings("ipo", beta=0.5, ipo_length="mean"), 0.0),  # (1 − 1)²
    "hinge": (settings("hinge", beta=0.5), 0.0),  # 1 − 1.5 < 0
    "hinge active": (settings("hinge", beta=0.25), 0.25),  # 1 − 0.75
    "simpo": (settings("simpo", beta=0.5, gamma=0.3), L(0.575)),
    "dpo + sft": (settings("dpo", beta=0.5, sft_weight=2.0), L(1.5) + 2 * 0.25),  # NLL per token = 1/4
}


@pytest.mark.parametrize("name", BY_HAND)
def test_objective_equals_its_formula_by_hand(name: str) -> None:
    config, expected = BY_HAND[name]
    scored = objectives.score_pairs(four(-1.0, -4.0, -3.0, -3.0), config)
    assert scored.losses.item() == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_every_objective_has_a_value_by_hand() -> None:
    assert {config.objective for config, _ in BY_HAND.values()} == set(objectives.OBJECTIVES)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_every_objective_is_finite_with_finite_gradient_at_extreme_margins(name: str, margin: float) -> None:
    logps = four(-1.0, -1.0 - margin / 0.1, -1.0, -1.0)
    logps.policy_w.requires_grad_(True)
    scored = objectives.score_pairs(logps, settings(name, label_smoothing=0.2 if name in ("cdpo", "robust") else 0.0))
    scored.losses.sum().backward()
    assert scored.losses.isfinite().all()
    assert logps.policy_w.grad.isfinite().all()


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_logged_margin_is_what_the_loss_compares(name: str) -> None:
    # dL/d(reward_w) has the sign of a comparison: at equal rewards all but IPO and SimPO give the value at 0.
    scored = objectives.score_pairs(four(-2.0, -1.0, -2.0, -1.0), settings(name, beta=1.0))
    at_zero = {"hinge": 1.0, "ipo": 0.25, "simpo": L(0.0)}.get(name, math.log(2))
    margin = (scored.reward_w - scored.reward_l).item()
    assert margin == 0.0  # SimPO: −2/4 and −1/2 are equal
    assert scored.losses.item() == pytest.approx(at_zero, rel=1e-15)


def test_robust_loss_is_unbiased_under_flips() -> None:
    # What the loss is made for: (1−ε) L_robust(z) + ε L_robust(−z) = L(z), at ε = 0.3, z = 0.7.
    z = torch.tensor([0.7], dtype=torch.float64)
    mixed = 0.7 * objectives.robust_loss(z, 0.3) + 0.3 * objectives.robust_loss(-z, 0.3)
    assert mixed.item() == pytest.approx(L(0.7), rel=1e-14)


def test_reference_shift_of_a_prompt_cancels() -> None:
    # β log Z(x) shifts both rewards of a prompt; the loss must not move.
    plain = objectives.score_pairs(four(-1.0, -4.0, -3.0, -3.0), settings()).losses
    shifted = objectives.score_pairs(four(-1.0, -4.0, -3.0 + 8, -3.0 + 8), settings()).losses
    assert plain.item() == pytest.approx(shifted.item(), rel=1e-14)
