"""Is a mistake that nobody has declared found, by the check that speaks of it, and named by its kind?

None of these faults is a specimen of the zoo.  Each is planted alone, into something that is right otherwise.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dpocheck.adapter import LossOut
from dpocheck.miniature import MINIATURE
from dpocheck.result import Report, Result
from dpocheck.runner import Options, run

sys.path.append(str(Path(__file__).parent))
import planted_functions
import planted_runs

LONG = pytest.mark.long


def audited(subject: object, *checks: str) -> Report:
    report = run(Options(subject=subject() if inspect.isclass(subject) else subject, only=checks))
    assert report.smoke is None
    return report


def told(report: Report, result: Result) -> str:
    """All that a reader sees about a failure: where, what, the diagnosis, and the equation."""
    names = [one.name for one in result.diagnosis]
    return " | ".join(map(str, (result.where, result.observed, result.reason, result.scene, *names, report.equation)))


def found(subject: object, check: str, kind: str) -> None:
    report = audited(subject, check)
    result = next(r for r in report.results if r.id == check)
    assert result.verdict == "fail", (result.verdict, result.reason)
    assert kind in told(report, result)
    assert report.exit_code() == 1


FUNCTIONS = [  # fault, the check that speaks of it, the kind
    ("running_baseline", "LOSS-PURE", "called three times"),
    ("every_other_pair_swapped", "LOSS-VALUE", "per pair"),
    ("detached_weight_squared", "LOSS-VALUE-GRADIENT", "slope in the policy"),
    ("hardest_pairs_only", "LOSS-SHAPE", "slope of the loss"),
    ("chosen_penalty", "LOSS-SHAPE", "margin -24"),
    ("tempered_reference", "LOSS-ARGUMENTS", "1.000 lp_w − 0.500 rf_w − 1.000 lp_l + 0.500 rf_l"),
    ("rounded_to_half", "LOSS-DTYPES", "float32"),
    ("best_thirty_two", "LOGP-EXTREME", "logits times 256"),
    ("last_four_positions", "LOGP-TOKENS", "scored 0 times"),
    ("stops_at_a_zero", "LOGP-TOKEN-ZERO", "id 0"),
    ("discounted", "LOGP-TOKENS", "scored 0.9 times"),
    ("repeated_tokens_once", "LOGP-VALUE", "repeat a token"),
]
STEPS = [
    ("SeesPads", "GRAD-ATTENTION", "attended"),
    ("ChosenReferenceTwice", "GRAD-IDENTITY", "no reference"),
    ("HalvesInterleaved", "GRAD-TOKENS", "alternating rows"),
    ("GradientOfTheSign", "GRAD-IDENTITY", "gradient"),
    ("ClipsEachParameter", "GRAD-IDENTITY", "gradient times"),
]


@pytest.mark.parametrize(("fault", "check", "kind"), FUNCTIONS)
def test_a_fault_in_a_bare_function_is_found_and_named(fault, check, kind):
    found(getattr(planted_functions, fault), check, kind)


@pytest.mark.parametrize(("fault", "check", "kind"), [pytest.param(*one, marks=LONG) for one in STEPS])
def test_a_fault_in_a_step_is_found_and_named(fault, check, kind):
    found(getattr(planted_functions, fault), check, kind)


RUNS = [
    ("SwapsEveryThirdRow", "GRAD-IDENTITY", "gradient of"),
    ("DropsRepeatedRows", "GRAD-OPTIMUM", "at the closed-form optimum"),
    ("DropsTheLongerChosen", "GRAD-TOKENS", "without the gradient due"),
    ("StripsText", "ROWS-ROUND-TRIP", "ends with a space"),
    ("LosesThePrompt", "GRAD-ATTENTION", "attended"),
    ("LastRowTwice", "ACCUM-UNEVEN", "2, 2 and"),
    ("EvaluatesOnAnother", "EVAL-BATCH", "of held"),
    ("ScalesTheRate", "RUN-GRADIENT", "sum over pairs"),
    ("OneStepTooMany", "RUN-GRADIENT", "gradient of"),
    ("BatchForAccumulation", "OPTION-ACTS", "last batch"),
    ("BetasExchanged", "STEP-ADAM", "steps"),
    ("WarmsUpUnasked", "RUN-GRADIENT", "halved"),
    ("BetaOfTheRun", "GRAD-IDENTITY", "beta"),
    ("ModelsExchanged", "GRAD-IDENTITY", "gradient of"),
    ("ReferenceShaken", "REF-START", "rewards"),
    ("HeadScaled", "GRAD-IDENTITY", "gradient of"),
    ("ReturnsTheAverage", "RUN-GRADIENT", "halved"),
    ("ReturnsTheStart", "RUN-GRADIENT", "gradient of"),
    ("StartsFromTheReference", "GRAD-IDENTITY", "gradient of"),
    ("LogsOneStepLate", "METRIC-LOSS", "loss of train"),
    ("SmoothedLoss", "METRIC-LOSS", "loss of train"),
    ("AccuracyInPercent", "METRIC-ACCURACY", "rewards/accuracies"),
    ("MarginHalved", "METRIC-MARGIN", "rewards/margins"),
    ("LogpsPerPairSummed", "METRIC-LOGPS", "logps/chosen"),
]


@pytest.mark.long
@pytest.mark.parametrize(("fault", "check", "kind"), RUNS)
def test_a_fault_around_a_run_is_found_and_named(fault, check, kind):
    found(getattr(planted_runs, fault), check, kind)


# --------------------------------------------------------------------------------- one fault through two capabilities


class Only:
    """One capability of a trainer; the others are not there."""

    def __init__(self, inner, capability: str) -> None:
        self.says = inner.says
        setattr(self, capability, getattr(inner, capability))


def _loss(change):
    """The miniature's loss with its four arguments changed first."""

    def loss(a, b, c, d, *, objective, lengths=None):
        out = MINIATURE.loss(*change(a, b, c, d), objective=objective, lengths=lengths)
        true = MINIATURE.loss(a, b, c, d, objective=objective, lengths=lengths)
        return LossOut(out.loss, true.rewards_chosen, true.rewards_rejected)

    return replace(MINIATURE, loss=loss)


def _logps(weigh):
    """The miniature's log-probs with each completion token weighed by its place among the completion's."""

    def logps(logits, batch):
        mask = batch.completion_mask[:, 1:]
        place, length = mask.cumsum(-1) - 1, mask.sum(-1, keepdim=True)
        scores = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        return (scores * mask * weigh(place, length)).sum(-1)

    return replace(MINIATURE, logps=logps)


def _weight(weight):
    """The miniature's loss with the gradient of each pair multiplied; the value stays."""

    def loss(a, b, c, d, *, objective, lengths=None):
        out = MINIATURE.loss(a, b, c, d, objective=objective, lengths=lengths)
        return replace(out, loss=weight * out.loss + (1 - weight) * out.loss.detach())

    return replace(MINIATURE, loss=loss)


# fault -> (the finer capability, the check that fails on both routes, the trainer, the theory that both name, if any)
TWICE = {
    "the reference counts half": ("loss", "LOSS-VALUE", _loss(lambda a, b, c, d: (a, b, c / 2, d / 2)), None),
    "the chosen ratio counts one and a half": (
        "loss", "LOSS-VALUE", _loss(lambda a, b, c, d: (1.5 * a, b, 1.5 * c, d)), None),
    "the greater log-prob is the chosen one": (
        "loss", "LOSS-VALUE", _loss(lambda a, b, c, d: (a.maximum(b), a.minimum(b), c, d)), None),
    "the rejected reference for both": (
        "loss", "LOSS-VALUE", _loss(lambda a, b, c, d: (a, b, d, d)), "reference's log-ratio left out of the loss"),
    "the chosen reference for both": (
        "loss", "LOSS-VALUE", _loss(lambda a, b, c, d: (a, b, c, c)), "reference's log-ratio left out of the loss"),
    "the reference's signs": (
        "loss", "LOSS-VALUE", _loss(lambda a, b, c, d: (a, b, c, -d)),
        "reference's rejected log-prob is added where it should be subtracted"),
    "the rejected completion is forgotten": (
        "loss", "LOSS-VALUE", _loss(lambda a, b, c, d: (a, 0 * b, c, 0 * d)), "rejected completion left out"),
    "a bonus for every pair": (
        "loss", "LOSS-VALUE", _loss(lambda a, b, c, d: (a + 2, b, c, d)), "1 added to the logit"),
    "a third of the gradient": (
        "loss", "LOSS-PARTIALS", _weight(1 / 3), "gradient times 0.3333, loss right"),
    "later tokens count less": (
        "sequence_logps", "LOGP-VALUE", _logps(lambda place, length: 0.5**place.clamp(min=0)), None),
    "the first token counts twice": (
        "sequence_logps", "LOGP-VALUE", _logps(lambda place, length: 1.0 + (place == 0)), None),
    "the second token is lost": (
        "sequence_logps", "LOGP-VALUE", _logps(lambda place, length: 1.0 * (place != 1)), None),
    "the first token is lost": (
        "sequence_logps", "LOGP-VALUE", _logps(lambda place, length: 1.0 * (place != 0)),
        "does not count the completion's first token"),
    "the last token counts twice": (
        "sequence_logps", "LOGP-VALUE", _logps(lambda place, length: 1.0 + (place == length - 1)), "counts EOS twice"),
    "the length divides": (
        "step", "GRAD-RAGGED", _logps(lambda place, length: length**-1.0), "mean over tokens instead of sum"),
    "the square root of the length divides": (
        "sequence_logps", "LOGP-VALUE", _logps(lambda place, length: length**-0.5), None),
}  # fmt: skip


def failed(fault: str, capability: str) -> Result:
    _, check, trainer, _ = TWICE[fault]
    result = next(r for r in audited(Only(trainer, capability), check).results if r.id == check)
    assert result.verdict == "fail", (capability, result.verdict, result.reason)
    return result


@pytest.mark.parametrize("fault", TWICE)
def test_a_fault_is_found_through_the_finer_capability(fault):
    failed(fault, TWICE[fault][0])


@pytest.mark.long
@pytest.mark.parametrize("fault", TWICE)
def test_the_finer_capability_and_train_alone_fail_the_same_check_and_name_the_same_fault(fault):
    capability, check, _, theory = TWICE[fault]
    finer, whole = failed(fault, capability), failed(fault, "train")
    assert finer.id == whole.id == check
    if theory:
        assert theory in [one.name for one in finer.diagnosis]
        assert theory in [one.name for one in whole.diagnosis]
