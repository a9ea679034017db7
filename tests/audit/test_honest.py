"""Does whoever computes DPO pass, however it is written?"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from dpocheck.runner import Options, run

sys.path.append(str(Path(__file__).parent))
import honest

RIGHT = {"pass", "info", "not-applicable"}
FUNCTIONS = [name for name, held in vars(honest).items() if inspect.isfunction(held) and held.__module__ == "honest"]
CLASSES = ["DPOLoss", "HandStep", "RowStep", "PairStep"]


def subject(name: str):
    held = getattr(honest, name)
    return held() if inspect.isclass(held) else held


def wrong(report) -> dict[str, str]:
    return {r.id: f"{r.verdict} {r.reason} {r.where}" for r in report.results if r.verdict not in RIGHT}


@pytest.mark.parametrize("name", [
    *(n for n in FUNCTIONS if n not in ("row_by_row", "two_halves")), "DPOLoss",
    *(pytest.param(n, marks=pytest.mark.long) for n in ("row_by_row", "two_halves", *CLASSES[1:])),
])  # fmt: skip
def test_an_honest_implementation_passes_every_check(name):
    report = run(Options(subject=subject(name)))
    assert report.smoke is None
    assert wrong(report) == {}
    assert report.count("pass") >= 8
    assert report.exit_code() == 0


def test_a_loss_without_torch_says_that_it_has_no_gradient():
    """Its values are right; what needs a derivative is not claimed."""
    report = run(Options(subject=honest.NumpyLoss(), only=("LOSS-VALUE", "LOSS-ZERO-MARGIN", "LOSS-PARTIALS")))
    verdicts = {r.id: r.verdict for r in report.results}
    assert verdicts["LOSS-VALUE"] == verdicts["LOSS-ZERO-MARGIN"] == "pass"
    assert verdicts["LOSS-PARTIALS"] != "pass"


@pytest.mark.parametrize("name", ["by_softplus", "many_kinds"])
def test_what_it_optimises_is_said_and_is_what_was_asked_for(name):
    """The fit is exact for the sigmoid family: s = -log(expm1(L)) is linear in the four log-probs."""
    report = run(Options(subject=subject(name), only=("LOSS-VALUE",)))
    assert "1.000 lp_w − 1.000 rf_w − 1.000 lp_l + 1.000 rf_l" in report.equation
    assert report.equation_residual < 1e-9


@pytest.mark.long
@pytest.mark.parametrize("style", ["right", "left", "two forwards", "labels", "copied reference", "own cache", "LoRA"])
def test_an_honest_loop_passes_every_check(style):
    from loops import Loop

    report = run(Options(subject=Loop(style)))
    assert report.smoke is None
    assert wrong(report) == {}
    assert report.count("pass") >= 50


@pytest.mark.long
def test_a_loop_in_bfloat16_is_never_blamed():
    """Its numbers are coarse: checks may be undecided, with that reason, but none may fail."""
    from loops import Loop

    report = run(Options(subject=Loop("autocast")))
    assert report.header.precision == 2.0**-8
    assert [r.id for r in report.results if r.verdict in ("fail", "error")] == []
