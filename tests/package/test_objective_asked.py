"""Is the audit done at the objective that is asked for?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dpocheck import audit, fixed
from dpocheck.asked import parse_objective
from dpocheck.check import CHECKS
from dpocheck.checks import scenes
from dpocheck.checks.loss import ORDINARY
from dpocheck.experiment import LossExperiment, Objective, Sequence
from dpocheck.oracle.theory import PAPER
from dpocheck.runner import UsageError

IPO = Objective("ipo", beta=0.2)
CORE = ("LOSS-VALUE", "LOSS-BETA-LIMITS", "LOSS-ZERO-MARGIN")
ASKED = (
    "dpo,beta=0.1", "ipo,beta=0.2", "hinge,beta=0.1", "robust,beta=0.5,label_smoothing=0.1",
    "cdpo,beta=0.1,label_smoothing=0.2",
)  # fmt: skip
DIVERGENCES = ("forward_kl,beta=0.5", "js_divergence,beta=0.2", "alpha_divergence,beta=0.5,alpha=0.3")


def log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    return policy_chosen_logps - policy_rejected_logps - (reference_chosen_logps - reference_rejected_logps)


def preference_loss(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.1,
    label_smoothing=0.0, loss_type="sigmoid",
):  # fmt: skip
    h = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    m, eps = beta * h, label_smoothing
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return torch.relu(1 - m)
    if loss_type == "robust":
        return (-(1 - eps) * F.logsigmoid(m) + eps * F.logsigmoid(-m)) / (1 - 2 * eps)
    return -(1 - eps) * F.logsigmoid(m) - eps * F.logsigmoid(-m)


def twice_beta_in_ipo(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.1,
    loss_type="sigmoid",
):  # fmt: skip
    """A DPO that is right, and an IPO whose target is 1 / beta."""
    h = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return (h - 1 / beta) ** 2 if loss_type == "ipo" else -F.logsigmoid(beta * h)


def fixed_at_a_tenth(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    h = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return -F.logsigmoid(0.1 * h)


def verdicts(report) -> dict[str, str]:
    return {result.id: result.verdict for result in report.results}


@pytest.mark.parametrize("asked", ASKED)
def test_a_right_function_passes_at_the_objective_asked_for(asked):
    found = verdicts(audit(preference_loss, only=CORE, objective=asked))
    assert found["LOSS-VALUE"] == "pass"
    assert "fail" not in found.values()
    assert found["LOSS-ZERO-MARGIN"] == ("pass" if asked.startswith("dpo") else "not-applicable")


def test_an_objective_that_is_wrong_fails_only_where_it_is_asked_for():
    assert verdicts(audit(twice_beta_in_ipo, only="LOSS-VALUE"))["LOSS-VALUE"] == "pass"
    report = audit(twice_beta_in_ipo, only="LOSS-VALUE", objective="ipo,beta=0.2")
    assert verdicts(report)["LOSS-VALUE"] == "fail"
    assert {experiment.objective for result in report.results for experiment in result.experiments} == {IPO}
    assert report.asked == "ipo,beta=0.2"


def test_a_closed_form_of_the_sigmoid_says_so_at_another_objective():
    (result,) = audit(preference_loss, only="LOSS-SWAP", objective=IPO).results
    assert result.verdict == "not-applicable"
    assert "L(m) - L(-m) = -m; asked for is ipo,beta=0.2" in result.reason


def test_an_objective_that_the_subject_does_not_have_is_refused():
    with pytest.raises(UsageError, match=r"dpo,beta=0.2 was asked for, and the subject has its beta fixed at 0.1"):
        audit(fixed_at_a_tenth, objective="dpo,beta=0.2")


def test_margins_stay_where_a_check_put_them():
    own = fixed.own(ORDINARY, {}, Objective(beta=0.125))
    assert own.objective.beta * own.arguments() == pytest.approx(ORDINARY.objective.beta * ORDINARY.arguments())


def test_only_the_ordinary_objective_gives_way():
    smoothed = replace(ORDINARY, objective=Objective(beta=0.5, label_smoothing=0.125))
    assert fixed.own(smoothed, {}, IPO) == smoothed
    run = scenes.run(scenes.rectangular(2), PAPER)
    both = fixed.own(Sequence((run, run)), {}, IPO)
    assert [each.recipe.objective for each in both.runs] == [IPO, IPO]
    assert fixed.own(run, {}, None) == run


def test_objectives_per_token_get_lengths():
    bare = LossExperiment((-1.0,), (-2.0,), (-1.5,), (-1.25,), fixed.ORDINARY)
    own = fixed.own(bare, {}, Objective("simpo", beta=2.0))
    assert own.lengths == ((fixed.LENGTH, fixed.LENGTH),)


def test_words_are_read_back_as_the_same_objective():
    for objective in (IPO, Objective("simpo", 2.0, gamma=0.5), Objective(sft_weight=0.5, length_normalised=True)):
        assert parse_objective(fixed.words(objective)) == objective


def test_what_is_said_of_checks_names_checks_that_exist():
    assert {*fixed.SIGMOID_ONLY, *fixed.PLACED, *fixed.BROKEN_BY} <= set(CHECKS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"objective": "ipo,beta=0"}, "beta is 0; it must be above 0"),
        ({"objective": "cdpo,label_smoothing=0.5"}, "label_smoothing is 0.5; it must be in"),
        ({"tier": "fast"}, "tier is 'fast'; it must be 'quick' or 'full'"),
        ({"only": "LOSS-VALU"}, "did you mean LOSS-VALUE"),
        ({"tokenizer": "nowhere"}, "tokenizer nowhere: not a folder"),
    ],
)
def test_what_cannot_be_asked_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        audit(preference_loss, **given)


@pytest.mark.long
@pytest.mark.parametrize("asked", ASKED + DIVERGENCES)
def test_the_miniature_passes_at_the_objective_asked_for(asked):
    report = audit("zoo:miniature", objective=asked)
    assert report.exit_code() == 0, [(result.id, result.reason) for result in report.results]
    assert report.count("pass") > 60


@pytest.mark.long
@pytest.mark.parametrize("asked", ["ipo,beta=0.2", "dpo,beta=0.1"])
def test_a_specimen_fails_its_check_at_the_objective_asked_for(asked):
    from dpocheck.zoo import SPECIMENS

    name = "given-reference-ignored"
    report = audit(f"zoo:{name}", only=SPECIMENS[name].caught_by, objective=asked)
    assert verdicts(report)[SPECIMENS[name].caught_by] == "fail"
