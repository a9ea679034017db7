"""Does a bare loss, however written, give through its adapter the numbers that it computes?"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from asking import SUBJECTS, ask

from dpocheck import fixed
from dpocheck.adapter import Unsupported
from dpocheck.experiment import LossExperiment, Objective
from dpocheck.worker import loading

FOUR = ((-3.5, -7.25), (-6.0, -4.5), (-4.0, -6.5), (-5.0, -5.75))
H = (1.5, -2.0)  # (pi_w - ref_w) - (pi_l - ref_l): (0.5 - -1.0), (-0.75 - 1.25)


def experiment(**changes) -> LossExperiment:
    return LossExperiment(*FOUR, objective=Objective(**{"beta": 0.5} | changes))


def softplus(t: float) -> float:
    return math.log1p(math.exp(t))


HONEST = [
    "four_names", "indexed_dpo", "british_dpo", "other_order_loss", "short_dpo", "letters_dpo", "unnamed_dpo_loss",
    "ratio_loss", "model_ratio_loss", "typed_dpo", "global_dpo", "configured_dpo", "numpy_dpo", "plain_number_dpo",
    "lambda_dpo", "partial_dpo", "decorated_dpo", "DPOCriterion", "BigTrainer.dpo_loss", "BigTrainer.static_loss",
    "token_dpo_loss", "named_tuple_dpo", "record_dpo", "DPOCriterion.forward", "halves_dpo", "counted_halves_dpo",
    "turns_dpo", "tuples_dpo", "token_halves_dpo", "margin_dpo_loss", "delta_dpo_loss", "gains_preference_loss",
    "logits_named_dpo", "flagged_dpo", "one_pair_dpo", "numpy_one_pair_dpo", "RecordsDPO", "LocalMathDPO.compute",
]  # fmt: skip
NUMBERS = ("numpy_dpo", "plain_number_dpo", "numpy_one_pair_dpo", "LocalMathDPO.compute")  # they have no slopes
EACH = [softplus(-0.5 * h) for h in H]  # -log sigma(beta h)
SLOPE = [0.5 / (1 + math.exp(0.5 * h)) for h in H]  # beta sigma(-beta h)


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_loss_gives_minus_log_sigmoid_of_beta_h(name):
    seen = ask(f"losses:{name}", experiment())
    assert seen["capabilities"] == ["loss"]
    assert seen["form"] == "function"
    assert seen["lines"] == 0
    assert seen["reduced"] == pytest.approx(np.mean(EACH), rel=1e-12)
    if "per_pair" in seen:
        assert seen["per_pair"] == pytest.approx(EACH, rel=1e-12)


@pytest.mark.parametrize("name", [n for n in HONEST if n not in NUMBERS])
def test_the_slopes_of_an_honest_loss_are_those_of_the_mean(name):
    seen = ask(f"losses:{name}", experiment())
    assert seen["slopes"][0] == pytest.approx([-s / 2 for s in SLOPE], rel=1e-12)
    assert seen["slopes"][1] == pytest.approx([s / 2 for s in SLOPE], rel=1e-12)


@pytest.mark.parametrize("name", ["four_names", "indexed_dpo", "plain_number_dpo", "named_tuple_dpo"])
def test_rewards_come_back_by_side(name):
    seen = ask(f"losses:{name}", experiment())
    assert seen["rewards_chosen"] == pytest.approx([0.25, -0.375])  # beta (pi_w - ref_w)
    assert seen["rewards_rejected"] == pytest.approx([-0.5, 0.625])


@pytest.mark.parametrize("name", ["four_names", "typed_dpo", "DPOCriterion"])
def test_smoothing_is_passed_on(name):
    seen = ask(f"losses:{name}", experiment(label_smoothing=0.2))
    expected = [0.8 * softplus(-0.5 * h) + 0.2 * softplus(0.5 * h) for h in H]
    assert seen["per_pair"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["four_names", "typed_dpo", "only_ipo_loss", "told_ipo_loss"])
def test_ipo_is_asked_for_by_flag_by_type_or_by_name(name):
    seen = ask(f"losses:{name}", experiment(kind="ipo"))
    assert seen["per_pair"] == pytest.approx([(1.5 - 1.0) ** 2, (-2.0 - 1.0) ** 2])


def test_hinge_is_asked_for_by_type():
    assert ask("losses:typed_dpo", experiment(kind="hinge"))["per_pair"] == pytest.approx([0.25, 2.0])


def test_simpo_is_given_log_probs_per_token():
    four = LossExperiment(*FOUR, objective=Objective("simpo", beta=2.0, gamma=0.5), lengths=((2, 3), (5, 2)))
    seen = ask("losses:simpo_loss", four)
    margins = [2.0 * (-3.5 / 2 + 6.0 / 3) - 0.5, 2.0 * (-7.25 / 5 + 4.5 / 2) - 0.5]
    assert seen["per_pair"] == pytest.approx([softplus(-m) for m in margins])


def test_simpo_that_is_told_the_lengths_is_given_sums():
    four = LossExperiment(*FOUR, objective=Objective("simpo", beta=2.0, gamma=0.5), lengths=((2, 3), (5, 2)))
    whole = ask("losses:simpo_loss", four)["per_pair"]
    assert ask("losses:told_simpo_loss", four)["per_pair"] == pytest.approx(whole)
    assert ask("losses:SimpleSimPO.simpo_loss", four)["per_pair"] == pytest.approx(whole)


def test_a_gamma_that_is_a_ratio_to_beta_is_told_so_and_said():
    four = LossExperiment(*FOUR, objective=Objective("simpo", beta=2.0, gamma=0.5), lengths=((2, 3), (5, 2)))
    seen = ask("losses:ratio_simpo_loss", four)
    assert seen["per_pair"] == pytest.approx(ask("losses:simpo_loss", four)["per_pair"])
    assert seen["forced"]["ratio_simpo_loss: gamma"] == "a ratio to beta"
    assert "simpo_loss: gamma" not in ask("losses:simpo_loss", four)["forced"]


def test_simpo_with_loss_types_is_asked_for_simpo_alone():
    assert ask("losses:SimpleSimPO.simpo_loss", experiment(kind="simpo"))["only"] == {"kind": "simpo"}
    with pytest.raises(Unsupported, match="is simpo and has no parameter to choose"):
        ask("losses:SimpleSimPO.simpo_loss", experiment())


def test_a_plain_number_is_a_value_without_slopes():
    seen = ask("losses:float_dpo", experiment())
    assert seen["reduced"] == pytest.approx(np.mean(EACH), rel=1e-12)
    assert "slopes" not in seen


def test_a_loss_that_sums_tokens_is_asked_with_lengths_that_differ():
    """Chosen of 2 tokens, rejected of 4: a mean over tokens is half of one log-prob and a quarter of the other."""
    asked = fixed.own(experiment(), ask("losses:token_dpo_loss", experiment())["only"])
    assert asked.lengths == ((2, 4), (2, 4))
    wrong = ask("losses:wrong_token_mean_dpo_loss", asked)
    h = [(w - rw) / 2 - (l - rl) / 4 for w, l, rw, rl in zip(*FOUR, strict=True)]
    assert wrong["reduced"] == pytest.approx(np.mean([softplus(-0.5 * each) for each in h]), rel=1e-12)


def test_a_function_for_one_pair_is_called_once_a_pair_and_says_so():
    seen = ask("losses:one_pair_dpo", experiment())
    assert seen["forced"]["one_pair_dpo: pairs"] == "one a call"
    assert seen["slopes"][0] == pytest.approx([-s / 2 for s in SLOPE], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("fixed_dpo", {}, "beta 0.5: fixed_dpo has beta fixed at 0.25"),
        ("betaless_dpo", {}, "beta 0.5: betaless_dpo has beta fixed at 1"),
        ("short_dpo", {"label_smoothing": 0.1}, "label_smoothing: short_dpo has no such parameter"),
        ("short_dpo", {"kind": "ipo"}, "ipo: short_dpo is sigmoid"),
        ("only_ipo_loss", {}, "sigmoid: only_ipo_loss is ipo"),
        ("typed_dpo", {"kind": "robust", "label_smoothing": 0.1}, "robust: typed_dpo has no such loss type"),
        ("short_dpo", {"length_normalised": True}, "does not divide by the length"),
        ("short_dpo", {"sft_weight": 1.0}, "sft_weight: short_dpo has no such term"),
    ],
)
def test_what_a_function_cannot_be_told_is_unsupported(name, changes, says):
    with pytest.raises(Unsupported, match=says):
        ask(f"losses:{name}", experiment(**changes))


@pytest.mark.parametrize(("name", "beta"), [("fixed_dpo", 0.25), ("betaless_dpo", 1.0), ("ready_criterion", 0.125)])
def test_a_fixed_beta_is_found_and_audited_at_that_value(name, beta):
    seen = ask(f"losses:{name}", experiment(beta=beta))
    assert seen["per_pair"] == pytest.approx([softplus(-beta * h) for h in H])
    assert seen["forced"][f"{name}: beta"] == repr(beta)


def test_what_is_fixed_is_told_to_the_judge_and_asked_for_instead():
    assert ask("losses:fixed_dpo", experiment(beta=0.25))["only"] == {"beta": 0.25}
    assert ask("losses:only_ipo_loss", experiment(kind="ipo"))["only"] == {"kind": "ipo"}
    assert ask("losses:four_names", experiment())["only"] == {}
    doubled = LossExperiment(*(tuple(2 * x for x in column) for column in FOUR), objective=Objective(beta=0.25))
    assert fixed.own(experiment(), {"beta": 0.25}) == doubled  # 0.25 * 2 h = 0.5 h
    assert fixed.own(experiment(beta=2.0), {"beta": 0.25}) == experiment(beta=2.0)
    assert fixed.own(experiment(), {"kind": "ipo"}) == experiment()
    assert fixed.plain({"kind": "ipo", "beta": 0.25}) == Objective("ipo", beta=0.25)


def test_a_module_constant_is_put_back_after_the_call():
    adapter = loading.load(f"{SUBJECTS / 'losses.py'}:global_dpo")
    vectors = [torch.tensor(column, dtype=torch.float64) for column in FOUR]
    adapter.loss(*vectors, objective=Objective(beta=0.7))
    assert adapter.targets["loss"].function.__globals__["BETA"] == 0.1


PI_W, PI_L, REF_W, REF_L = (np.array(column) for column in FOUR)
WRONG = {
    "wrong_sign_dpo": 0.5 * (PI_W - PI_L - REF_W - REF_L),
    "wrong_twice_dpo": 0.25 * np.array(H),
    "wrong_swapped_dpo": -0.5 * np.array(H),
    "wrong_no_reference_dpo": 0.5 * (PI_W - PI_L),
    "wrong_two_dpo_loss": 0.5 * (PI_W - PI_L),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_shows_its_own_wrong_numbers(name):
    seen = ask(f"losses:{name}", experiment())
    assert seen["reduced"] == pytest.approx(np.mean([softplus(-m) for m in WRONG[name]]), rel=1e-12)


def test_a_detached_side_has_a_slope_of_zero():
    seen = ask("losses:wrong_detached_dpo", experiment())
    assert seen["slopes"][1] == pytest.approx([0.0, 0.0])
    assert seen["slopes"][0] == pytest.approx([-s / 2 for s in SLOPE])
