"""Do pytest items say what the verdicts mean?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from dpocheck.piecewise import ids, settle, versions
from dpocheck.result import Header, Report, Result

HEADER = Header(
    suite="0.1.0", subject="mine", name="mine", subject_version="1", route="loss", forced={}, isolation="process",
    precision=None, seed=0, tier="quick", platform="Linux",
)  # fmt: skip
RESULT = Result(
    id="LOSS-VALUE", version=1, level="must", tier="quick", chapter="loss", stage="loss", verdict="pass",
    claim="The loss is right.", reason="because",
)  # fmt: skip


def report(*verdicts: str, **fields) -> Report:
    return Report(header=HEADER, results=tuple(replace(RESULT, verdict=verdict, **fields) for verdict in verdicts))


@pytest.mark.parametrize("verdict", ["pass", "info"])
def test_a_pass_and_a_convention_pass(verdict):
    settle(report(verdict))


@pytest.mark.parametrize("verdict", ["not-applicable", "blocked"])
def test_what_does_not_apply_is_skipped_with_its_reason(verdict):
    with pytest.raises(pytest.skip.Exception, match="because"):
        settle(report(verdict))


@pytest.mark.parametrize("verdict", ["fail", "error", "unknown", "unexpected-pass"])
def test_everything_else_fails_with_the_long_form(verdict):
    with pytest.raises(pytest.fail.Exception, match="LOSS-VALUE · must · version 1"):
        settle(report(verdict))


def test_a_known_failure_is_an_expected_one():
    with pytest.raises(pytest.xfail.Exception, match=r"re-read from disk https://example\.org"):
        settle(report("expected-fail", known={"reason": "re-read from disk", "url": "https://example.org"}))


def test_a_stale_entry_fails_beside_a_pass():
    with pytest.raises(pytest.fail.Exception):
        settle(report("pass", "fail"))


def test_items_are_the_questions_and_the_checks_each_once():
    names = ids("full")
    assert len(names) == len(set(names))
    # The checks of a user's own tokenizer have no scenes until one is given.
    assert {id for id in set(versions()) - set(names) if not id.startswith("TOK-")} == set()
    assert set(names) <= set(versions())
    assert set(ids("quick")) <= set(names)
