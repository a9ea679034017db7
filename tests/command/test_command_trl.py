"""TRL's own command line, nothing patched: the gradient read off two checkpoints is the closed form."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from command_bench import experiment, put, seen
from command_closed_form import PAIRS, WORDS, gradient, slopes

import conformance
from dpocheck.command import CommandSubject, read
from dpocheck.experiment import Objective

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed; pip install 'dpocheck[trl]'"),
]

BETA = 0.5
CASES = {  # recipe, smoothing of the closed form
    "sigmoid": ({}, 0.0),
    "four micro-batches of one": ({"batch": 1, "accumulation": 4}, 0.0),
    "two micro-batches of two": ({"batch": 2, "accumulation": 2}, 0.0),
    "ipo": ({"objective": Objective("ipo", BETA)}, 0.0),
    "hinge": ({"objective": Objective("hinge", BETA)}, 0.0),
    "robust": ({"objective": Objective("robust", BETA, label_smoothing=0.125)}, 0.125),
    "clipped": ({"clip_norm": 0.0625}, 0.0),
}


@pytest.fixture
def trl(tmp_path):
    path = Path(conformance.__file__).parent / "commands" / "trl.toml"
    return CommandSubject(read(path), limits_seconds=240, memory_gb=6, folder=tmp_path / "subject")


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_trl_is_the_closed_form(name, trl, tmp_path):
    recipe, smoothing = CASES[name]
    asked = experiment(**recipe)
    assert trl.supports(asked) is None
    reply, arrays = put(trl, asked, tmp_path)
    kind = asked.recipe.objective.kind
    right = gradient(asked.policy.logits(), asked.reference.logits(), PAIRS, slopes(kind, BETA, smoothing))
    norm = np.linalg.norm(right)
    if name == "clipped":
        right = right * 0.0625 / norm
    found = seen(arrays, asked)
    largest, rate = np.max(np.abs(right)), asked.recipe.learning_rate
    # The stored end is off by 2^-24 of a logit of at most 1 + rate*largest; float32 sums of a forward and a backward
    # over 64 words add some 2^-22 of the gradient; clipping divides by norm + 1e-6 (torch), k*norm being hundreds.
    bound = 2.0**-24 * (1 + rate * largest) / (rate * largest) + 2.0**-21
    assert np.max(np.abs(found - right)) < bound * largest
    (entry,) = reply["fields"]["history"]
    assert entry["step"] == 1
    assert entry["metrics"]["grad_norm"] == pytest.approx(1024 * norm, rel=1e-5)  # k = 2^10, before clipping
    # Nothing but the head moved by more than 1e-8: the embedding is 2^14, the norm 2^7.
    assert {n for n, size in reply["fields"]["moved"].items() if size > 1e-8} == {"lm_head.weight"}


def test_trl_scores_the_end_of_sequence_it_appends(trl, tmp_path):
    asked = experiment(reference=None)
    _, arrays = put(trl, asked, tmp_path)
    found = seen(arrays, asked)
    for _, chosen, rejected in PAIRS:  # the last tokens differ, so that the two entries cannot cancel
        assert found[chosen[-1], WORDS.eos] < -1e-2
        assert found[rejected[-1], WORDS.eos] > 1e-2
