"""Does the catalogue catch every specimen, name its fault, and leave what is right alone?"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from dpocheck import selftest
from dpocheck.check import CHECKS
from dpocheck.zoo import SPECIMENS, VARIANTS

MATRIX = Path(__file__).parents[2] / "ci" / "kills.json"
# One or two of each stage, and of each way in which a fault shows.
SAMPLE = (
    "swaps-columns", "keeps-only-the-last-turn", "bos-before-the-template", "max-length-ignored",
    "chosen-attention-for-both", "counts-padding", "shifted-twice", "mean-for-sum", "bits-for-nats",
    "given-reference-ignored", "reference-counts-the-prompt", "reference-aliases-the-policy", "beta-constant",
    "policy-terms-added", "smoothing-halved", "broadcast-over-pairs", "likelihood-term-added", "sft-sign",
    "accumulation-not-divided", "clips-by-value", "ascends", "adam-without-bias-correction", "warm-up-skipped",
    "never-shuffled", "rewards-clipped", "metrics-summed",
)  # fmt: skip
# Checks that ask for what a whole run does not show: masks, dtypes and calls of the caller's own.
NOT_THROUGH_TRAIN = {
    "LOGP-TOKENS", "LOGP-PADDING", "LOGP-BATCH-MATES", "LOGP-PAD-IS-EOS", "LOSS-DTYPES", "LOSS-PURE", "ONE-TRAINER",
}  # fmt: skip


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    made = selftest.Zoo(tmp_path_factory.mktemp("zoo"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def matrix():
    return json.loads(MATRIX.read_text())


@pytest.mark.parametrize("name", SAMPLE)
def test_a_specimen_is_caught_and_its_own_fault_named_first(zoo, name):
    line = selftest.specimen(zoo, name, selftest.declared_check(name))
    assert line.verdict == "fail", line
    assert line.named in (None, 1), line


def test_the_miniature_passes_everything(zoo):
    assert [line for line in selftest.variant(zoo, "miniature") if not line.right] == []


def test_every_specimen_names_a_check_that_exists():
    for name, declared in SPECIMENS.items():
        if declared.caught_by not in selftest.LEFT_OUT:
            selftest.declared_check(name)


def test_a_check_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setitem(SPECIMENS, "mean-for-sum", replace(SPECIMENS["mean-for-sum"], caught_by="LOGP-VALEU"))
    with pytest.raises(ValueError, match=r"mean-for-sum says that LOGP-VALEU .*LOGP-VALUE"):
        selftest.declared_check("mean-for-sum")


# --------------------------------------------------------------------------------------------------- the kill matrix


def test_the_stored_matrix_is_of_these_specimens_and_checks(matrix):
    """After a check or a specimen was added: run ci/kills."""
    assert set(matrix["specimens"]) == set(SPECIMENS)
    assert set(matrix["checks"]) == {check.id for check in selftest.catalogue()}


def test_every_check_fails_a_specimen(matrix):
    failed = {id for ids in matrix["fails"].values() for id in ids}
    assert set(matrix["checks"]) - failed == set()


def test_every_specimen_fails_the_check_that_it_names(matrix):
    missed = {
        name: declared.caught_by
        for name, declared in SPECIMENS.items()
        if declared.caught_by not in selftest.LEFT_OUT and declared.caught_by not in matrix["fails"][name]
    }
    assert missed == {}


def test_no_honest_subject_fails(matrix):
    assert set(matrix["honest"]) == {"miniature", *VARIANTS}
    assert {name: found for name, found in matrix["honest"].items() if found} == {}


def test_ten_cells_of_the_stored_matrix_come_out_the_same(zoo, matrix):
    """Pseudo-random cells; half of them are failures, which are rare."""
    draw = random.Random(5)
    names = sorted(set(matrix["fails"]))
    failing = draw.sample([name for name in names if matrix["fails"][name]], 5)
    cells = [(name, draw.choice(matrix["fails"][name])) for name in failing]
    cells += [(draw.choice(names), draw.choice(sorted(set(matrix["checks"]) - {"OPTION-ACTS"}))) for _ in range(5)]
    for name, id in cells:
        verdict = selftest.row(zoo, name, [CHECKS[id]])[id]
        assert (verdict == "fail") == (id in matrix["fails"][name]), (name, id, verdict)


# ----------------------------------------------------------------------------------------------------- the whole of it


@pytest.mark.long
def test_all_specimens_are_caught_and_nine_in_ten_faults_named_first(zoo):
    lines = [
        selftest.specimen(zoo, name, selftest.declared_check(name))
        for name, declared in SPECIMENS.items()
        if declared.caught_by not in selftest.LEFT_OUT
    ]
    assert [line for line in lines if not line.right] == []
    ranks = [line.named for line in lines if line.named is not None]
    assert sum(rank == 1 for rank in ranks) >= 0.9 * len(ranks)
    assert sum(rank > 0 for rank in ranks) >= 0.97 * len(ranks)


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_a_right_trainer_passes_everything(zoo, name):
    assert [line for line in selftest.variant(zoo, name) if not line.right] == []


@pytest.mark.long
def test_every_check_fails_a_specimen_through_train_alone(zoo):
    """What a check sees of a step or a loss, it sees of a whole run as well."""
    failed = {
        declared.caught_by
        for name, declared in SPECIMENS.items()
        if "train" in declared.at
        and declared.caught_by not in selftest.LEFT_OUT
        and selftest.specimen(zoo, name, selftest.declared_check(name), only="train").verdict == "fail"
    }
    named = {declared.caught_by for declared in SPECIMENS.values()} - set(selftest.LEFT_OUT)
    assert named - failed - NOT_THROUGH_TRAIN == set()
