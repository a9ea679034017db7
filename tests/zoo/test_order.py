"""Is what is plainest judged first, and does one bug give one failure?"""

from __future__ import annotations

import pytest

from dpocheck import obedient, order, runner, selftest
from dpocheck.adapter import CAPABILITIES
from dpocheck.check import CHECKS
from dpocheck.oracle.theory import PAPER
from dpocheck.session import Session


def place(id: str, capabilities=CAPABILITIES) -> int:
    return [check.id for check in order.ordered(CHECKS.values(), capabilities)].index(id)


def test_every_family_that_blocks_or_is_blocked_is_one_of_a_check():
    known = {scene.family for check in CHECKS.values() for scene in check.staged(PAPER)}
    named = {family for pair in order.MADE_OF.items() for family in (pair[0], *pair[1])}
    assert named | order.BASIC <= known


def test_ordinary_batches_come_before_special_ones_and_special_ones_before_what_comes_on_top():
    assert place("LOGP-VALUE") < place("GRAD-IDENTITY") < place("RUN-GRADIENT") < place("ROWS-EOS")
    assert place("ROWS-EOS") < place("METRIC-LOSS") < place("RANKS-SPLIT") < place("OPTION-ACTS")


def test_a_loss_of_its_own_is_judged_first_and_one_read_from_runs_after_log_probs_and_reference():
    assert place("LOSS-VALUE") == 0
    through_runs = ("train",)
    assert place("LOGP-VALUE", through_runs) < place("REF-START", through_runs) < place("LOSS-VALUE", through_runs)


def test_no_check_is_lost_by_ordering():
    assert sorted(check.id for check in order.ordered(CHECKS.values(), ())) == sorted(CHECKS)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"beta_power": 2.0}, "LOSS-VALUE"),
        ({"counted": "prompt"}, "LOGP-TOKENS"),
        ({"counted_reference": "no-eos"}, "REF-START"),
        ({"update": -1.0}, "RUN-GRADIENT"),
        ({"stale": "kept"}, "STEP-TWO"),
        ({"template_eos": "twice"}, "ROWS-CHAT"),
        ({"margin": "sum"}, "METRIC-MARGIN"),
    ],
)
def test_one_fault_gives_one_failure_where_it_is_plainest(change, expected):
    subject = obedient.Obedient(PAPER.but(**change))
    run = Session(subject, runner.cached_predict, runner.cached_bound)
    checks = [c for c in order.ordered(selftest.catalogue(), CAPABILITIES) if c.id not in obedient.LEFT_OUT]
    failed = [check.id for check in checks if run.result(check).verdict == "fail"]
    assert failed == [expected]


def test_a_loss_and_log_probs_that_are_functions_of_their_own_do_not_hide_each_other():
    subject = obedient.Obedient(PAPER.but(beta_power=2.0, counted="prompt"))
    run = Session(subject, runner.cached_predict, runner.cached_bound)
    checks = [c for c in order.ordered(selftest.catalogue(), CAPABILITIES) if c.chapter in ("loss", "logz", "logps")]
    assert [check.id for check in checks if run.result(check).verdict == "fail"] == ["LOSS-VALUE", "LOGP-TOKENS"]
