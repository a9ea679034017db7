"""TRL on two processes: what is right, what is a documented choice, and the two faults that its findings describe."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest

from dpocheck import conventions, runner, smoke
from dpocheck.check import CHECKS
from dpocheck.open import open_subject
from dpocheck.session import Session

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed; pip install 'dpocheck[trl]'"),
]
RIGHT = ("RANKS-SPLIT", "RANKS-WEIGHTS", "RANKS-REFERENCE", "RANKS-METRICS")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if version("trl") != "1.16.0":
        pytest.skip(f"the findings are those of TRL 1.16.0, this is {version('trl')}")
    subject = open_subject("trl", tmp_path_factory.mktemp("trl"), timeout=300)
    assert not smoke.test(subject)
    conventions.resolve(subject, runner.cached_predict)
    run = Session(subject, runner.cached_predict, runner.cached_bound, tier="full", blocking=False)
    yield {id: run.result(check) for id, check in CHECKS.items() if check.chapter == "ranks"}
    subject.close()


@pytest.mark.parametrize("id", RIGHT)
def test_what_trl_does_right(id, results):
    assert results[id].verdict == "pass", results[id]


def test_a_short_last_batch_is_filled_with_rows_from_the_start_as_documented(results):
    found = results["RANKS-PAIRS"]
    assert found.verdict == "info"
    assert "as documented: the pairs weigh" in found.reason


def test_fillers_count_in_the_evaluation(results):
    """Four of the five held-out pairs are right; the first, one of them, counts twice: 5 of 6."""
    found = results["RANKS-EVALUATION"]
    assert found.verdict == "fail"
    assert "of held out" in found.where
    if "accuracies" in found.where:
        assert (found.observed, found.expected) == (pytest.approx(5 / 6), pytest.approx(4 / 5))


def test_a_precomputed_reference_needs_a_data_set_on_disk(results):
    found = results["RANKS-PRECOMPUTED"]
    assert found.verdict == "fail"
    assert "FileNotFoundError" in found.reason
    assert "(rank 1 of 2)" in found.reason
