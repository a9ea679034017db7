"""Does this trainer pass the audit, through the entry point that people type?

Run alone: pytest tests/reference/test_trainer_audited.py
"""

from __future__ import annotations

import pytest

from dpocheck.runner import Options, run

BAD = ("fail", "error", "unknown", "blocked", "unexpected-pass")
SAMPLE = (
    "ROWS-EOS", "ROWS-BOUNDARY", "LOGP-TOKENS", "LOGP-VALUE", "REF-START", "REF-PRECOMPUTED", "LOSS-VALUE",
    "LOGZ-POLICY", "GRAD-IDENTITY", "ACCUM-UNEVEN", "METRIC-REWARDS", "LORA-REFERENCE",
)  # fmt: skip


def test_a_sample_of_the_audit_passes_in_a_worker_of_its_own() -> None:
    report = run(Options(subject="reference", only=SAMPLE))
    assert report.smoke is None
    said = [(r.id, r.reason) for r in report.results if r.verdict != "pass"]
    assert {r.id: r.verdict for r in report.results} == dict.fromkeys(SAMPLE, "pass"), said


@pytest.mark.long
def test_the_quick_audit_has_no_finding_and_leaves_nothing_open() -> None:
    report = run(Options(subject="reference"))
    assert report.smoke is None
    assert [(r.id, r.verdict, r.reason) for r in report.results if r.verdict in BAD] == []
    assert report.exit_code() == 0
    # All of it applies: what could not be asked would be an untested promise.
    assert [r.id for r in report.results if r.verdict == "not-applicable"] == ["LOSS-DIVERGENCE"]  # not offered
    assert report.count("pass") >= 80
    # Read off the trainer's own behaviour: beta 0.5 and the signs of Eq. 7.
    assert "−log σ( 0.500 · [ 1.000 lp_w − 1.000 rf_w − 1.000 lp_l + 1.000 rf_l ] )" in report.equation
