"""Do right trainers with a modern trainer's habits pass, and are bugs found that were invented without the zoo?

At first contact one of fourteen right trainers could not be judged: a compiled model, whose compiler patches torch (the
patch is accepted since).  Seventeen of 23 bugs were found.  Four of the others have had a check, or a scene of one, and
a specimen since.  `LogsTheNextRate` and `NormAfterClipping` log what another trainer logs too, under the same name:
which of the two is logged is told as a convention.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dpocheck.runner import Options, run

sys.path.append(str(Path(__file__).parent))
import unseen_runs
import unusual_runs
from test_honest_runs import passes
from test_planted import audited, told

RIGHT = (
    "Fused", "CachedPrompt", "Tree", "Chunked", "NormsWithoutDecay", "FunctionalGradient", "Buckets", "Compiled",
    "StepsInHooks", "SlopeByHand", "WidePadding", "Scheduled",
)  # fmt: skip
BUGS = [  # fault, the check that fails, what a reader is told
    ("MomentsLostByEpoch", "STEP-MOMENTUM", "logits of"),
    ("ClipsEachMicroBatch", "CLIP-NORM", "clipped per micro-batch"),
    ("WarmUpCountsMicroBatches", "STEP-SCHEDULE", "learning rate logged at step 3"),
    ("ReferenceFollowsEpochs", "STEP-TWO", "logits of"),
    ("CacheByPlaceInTheEpoch", "REF-CACHE-FRESH", "reference log-probs of an earlier run"),
    ("FloorUnderTheRejected", "LOSS-SHAPE", "slope of the loss"),
    ("SmoothsTheMargin", "LOSS-SMOOTHING", "per pair"),
    ("WeighsByTheReference", "LOSS-PARTIALS", "in another direction"),
    ("DropsRepeatedPrompts", "LOGP-TOKEN-ZERO", "log-prob"),
    ("PromptLosesItsEnd", "ROWS-ROUND-TRIP", "gradient of"),
    ("SystemMessageLost", "ROWS-CHAT", "attended of"),
    ("PadIsNotScored", "LOGP-PAD-IS-EOS", "does not count tokens that have the pad's id"),
    ("FirstEpochsOrderAgain", "RUN-SHUFFLE", "second epoch"),
    ("EvaluationLeavesGradients", "EVAL-PURE", "weights differ"),
    ("LastEvaluationBatchExchanged", "EVAL-BATCH", "rewards/rejected of held"),
    ("SavedInHalf", "RUN-SAVED", "logits differ"),
    ("ClipsBeforeUnscaling", "CLIP-NORM", "clipped before the loss scale"),  # "reference is the live policy" at first
    ("DropsRepeatedPrompts", "OPTIMUM-RECOVERED", "of rows with one prompt only the first"),  # "SFT term" at first
    ("ClipsEachParameter", "CLIP-GLOBAL", "each parameter is clipped alone"),  # missed at first
    ("PenaltyInsteadOfDecay", "STEP-DECAY", "the decay is added to the gradient"),  # missed at first
    ("HandsBackTheBest", "EVAL-PURE", "weights differ"),  # missed at first
    ("RowsFromTheRightFile", "RUN-COVERAGE", "rows without any effect: 5"),  # missed at first
]
pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_trainer_with_a_modern_habit_passes_every_check(name):
    passes(getattr(unusual_runs, name)(), 55)


@pytest.mark.parametrize("name", ["LogsEveryOther", "ReferencePaddedOnTheLeft"])
def test_what_hides_a_detail_is_no_failure(name):
    """What only the first step's own log line would show, or which way a tie falls, stays undecided."""
    report = run(Options(subject=getattr(unusual_runs, name)()))
    assert report.smoke is None
    assert [r.id for r in report.results if r.verdict in ("fail", "error")] == []
    assert report.count("pass") >= 50


@pytest.mark.parametrize(
    ("trainer", "question", "answer"),
    [("NormAfterClipping", "CONV-NORM", "after clipping"), ("LogsTheNextRate", "CONV-RATE", "the next step's")],
)
def test_which_of_two_numbers_is_logged_is_told_as_a_convention(trainer, question, answer):
    """Some trainers read the norm after clipping, or the rate after the schedule has moved on: neither is a failure."""
    report = run(Options(subject=getattr(unseen_runs, trainer)()))
    assert answer in next(r for r in report.results if r.id == question).reason
    assert [r.id for r in report.results if r.verdict in ("fail", "error")] == []


@pytest.mark.parametrize(("fault", "check", "kind"), BUGS)
def test_a_bug_invented_without_the_zoo_is_found(fault, check, kind):
    report = audited(getattr(unseen_runs, fault)(), check)
    result = next(r for r in report.results if r.id == check)
    assert result.verdict == "fail", (result.verdict, result.reason)
    assert kind in told(report, result)
