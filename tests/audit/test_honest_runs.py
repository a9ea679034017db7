"""Does a whole trainer that is built in another way pass every check that applies to it?"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from dpocheck.result import Report
from dpocheck.runner import Options, run

HERE = Path(__file__).parent
sys.path.append(str(HERE))
RIGHT = {"pass", "info", "not-applicable"}
RUNS = (
    "Packed", "LeftPadded", "Scaled", "SummedThenNormalised", "TwoPasses", "OwnOrder", "Functional", "AsksTwice",
    "LogsPerToken",
)  # fmt: skip
pytestmark = pytest.mark.long


def wrong(report: Report) -> dict[str, str]:
    return {r.id: f"{r.verdict} {r.reason} {r.where}" for r in report.results if r.verdict not in RIGHT}


def passes(subject: object, at_least: int) -> None:
    report = run(Options(subject=subject))
    assert report.smoke is None
    assert wrong(report) == {}
    assert report.count("pass") >= at_least
    assert report.exit_code() == 0


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_right_and_built_otherwise_passes_every_check(name):
    import honest_runs

    passes(getattr(honest_runs, name)(), 60)


def test_a_trainer_without_torch_passes_every_check():
    """A Llama in numpy float64; what a live model in torch would show is not asked of it."""
    from honest_numpy import NumpyTrainer

    passes(NumpyTrainer(), 55)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_a_subclass_of_the_trainer_of_transformers_passes_every_check():
    from honest_trainer import TrainerSubclass

    passes(TrainerSubclass(), 60)


@pytest.mark.parametrize("name", ["train_step", "get_logps"])
def test_the_functions_of_a_notebook_pass_every_check(name):
    passes(f"{HERE / 'honest_notebook.py'}:{name}", 7)
