"""Is a mistake around TRL found through `train` alone, and named where the oracle has a theory of it?"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
import planted_runs
import planted_trl
from test_planted import audited, found

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed"),
]

NAMED = [  # fault, the check that speaks of it, the theory that the diagnosis names
    ("DoublesTheNorm", "GRAD-IDENTITY", "temperature 1/2"),
    ("HalvesTheGradient", "GRAD-IDENTITY", "gradient halved, loss right"),
    ("ReferenceSharesTheHead", "GRAD-IDENTITY", "reference is the live policy"),
    ("ReferenceForgetsItsHead", "GRAD-IDENTITY", "no reference"),
    ("CollatorDropsTheEos", "ROWS-EOS", "does not count EOS"),
    ("CollatorScoresThePromptsEnd", "METRIC-LOGPS", "counts the last prompt token"),
    ("CollatorMasksTheLastToken", "GRAD-TOKENS", "does not count EOS"),
    ("CollatorMasksTheFirstToken", "GRAD-TOKENS", "does not count the completion's first token"),
    ("LogsRewardsCrosswise", "METRIC-REWARDS", "rewards of chosen and rejected swapped"),
    ("LogsRewardsTimesBeta", "METRIC-REWARDS", "rewards with beta twice"),
]
FOUND = [  # no theory describes them: the report says where and what
    ("FreezesTheQueries", "STEP-ALL-PARAMETERS", "model.layers.0.self_attn.q_proj.weight"),
    ("ReferenceStaysInTraining", "REF-NO-DROPOUT", "random numbers drawn"),
    ("ModelsHandedOverCrosswise", "GRAD-IDENTITY", "gradient of"),
    ("DecaysUnasked", "STEP-NOTHING-HIDDEN", "without a gradient moved"),
]
SHARED = [  # the same hooks as around the miniature
    ("DropsTheLongerChosen", "GRAD-TOKENS", "without the gradient due"),
    ("LosesThePrompt", "GRAD-ATTENTION", "attended"),
    ("EvaluatesOnAnother", "EVAL-BATCH", "of held"),
    ("ScalesTheRate", "RUN-GRADIENT", "sum over pairs"),
    ("LogsOneStepLate", "METRIC-LOSS", "loss of train"),
]


@pytest.mark.parametrize(("fault", "check", "theory"), NAMED)
def test_a_fault_around_trl_is_named(fault, check, theory):
    result = next(r for r in audited(getattr(planted_trl, fault), check).results if r.id == check)
    assert result.verdict == "fail", result.reason
    assert theory in [one.name for one in result.diagnosis]


@pytest.mark.parametrize(("fault", "check", "kind"), FOUND)
def test_a_fault_around_trl_is_found_and_described(fault, check, kind):
    found(getattr(planted_trl, fault), check, kind)


@pytest.mark.parametrize(("fault", "check", "kind"), SHARED)
def test_a_fault_of_rows_recipe_or_log_is_found_around_trl(fault, check, kind):
    from conformance.adapters.trl import Adapter

    found(getattr(planted_runs, fault)(Adapter()), check, kind)
