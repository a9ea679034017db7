"""Do known failures hide exactly what they name, and never rot unseen?"""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest

from dpocheck.known import Expected, KnownError, apply, load
from dpocheck.stored import joint_key

TODAY = datetime.date(2026, 11, 24)
VERSIONS = {"REF-IS-POLICY-GIVEN": 1, "LOSS-SHOULD": 2, "LOSS-ODD": 1}
REF = Expected(id="REF-IS-POLICY-GIVEN", version=1, reason="re-read from disk", url="https://example.org/1")
REST = (  # the other things that keep the sample from being right
    Expected(id="LOSS-SHOULD", version=1, reason="NaN"),
    Expected(id="LOSS-ODD", version=1, reason="crashes", verdict="error"),
)


def verdicts(report):
    return [(result.id, result.verdict) for result in report.results]


def test_a_known_failure_becomes_expected_and_carries_its_reason(report):
    known = apply(report, [REF], TODAY)
    result = known.results[1]
    assert result.verdict == "expected-fail"
    assert (result.known["reason"], result.known["url"]) == ("re-read from disk", "https://example.org/1")
    assert len(known.results) == len(report.results)


def test_with_all_failures_known_the_exit_code_is_0(report):
    assert report.exit_code() == 1
    assert apply(report, [REF, *REST], TODAY).exit_code() == 0


def test_an_error_of_a_must_check_stays_an_error_unless_it_is_known_as_one(report):
    known = [REF, REST[0], replace(REST[1], verdict="fail")]
    assert apply(report, known, TODAY).exit_code() == 1  # the entry is stale: it said fail, the check ends in an error


def test_an_expected_failure_that_passes_is_a_finding(report):
    known = apply(report, [Expected(id="LOSS-ZERO-MARGIN", version=1, reason="was broken")], TODAY)
    assert ("LOSS-ZERO-MARGIN", "unexpected-pass") in verdicts(known)
    assert known.exit_code("must") == 1


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (Expected(id="NO-SUCH-RUN", version=1, reason="x"), "stale: the check did not run"),
        (Expected(id="RUNS-RANKS", version=1, reason="x"), "the verdict is not-applicable (one process), not fail"),
        (replace(REF, where={"kind": "ipo"}), "stale: no result has kind = 'ipo'"),
        (replace(REF, experiment="0000"), "it fails on another experiment"),
        (replace(REF, until=datetime.date(2026, 11, 23)), "expired on 2026-11-23"),
    ],
)
def test_an_entry_that_matched_nothing_or_has_expired_is_a_finding_of_its_own(report, entry, said):
    known = apply(report, [entry], TODAY)
    added = known.results[-1]
    assert (added.id, added.verdict, added.level) == (entry.id, "fail", "must")
    assert said in added.reason
    assert known.results[1].verdict == "fail"  # nothing was excused
    right = replace(report, results=report.results[:1])
    assert apply(right, [entry], TODAY).exit_code("must") == 1


def test_an_entry_counts_on_its_last_day(report):
    assert apply(report, [replace(REF, until=TODAY)], TODAY).results[1].verdict == "expected-fail"


def test_an_entry_may_name_parameters_and_the_experiment(report):
    failing = report.results[1]
    ipo = replace(failing, params={"kind": "ipo"})
    both = replace(report, results=(failing, ipo))
    key = joint_key(failing.experiments)
    known = apply(both, [replace(REF, where={"kind": "ipo"}, experiment=key[:12])], TODAY)
    assert verdicts(known) == [(REF.id, "fail"), (REF.id, "expected-fail")]


def test_an_entry_for_a_check_that_was_not_asked_for_is_not_stale(report):
    entry = Expected(id="OTHER", version=1, reason="x")
    assert apply(report, [entry], TODAY, left_out={"OTHER"}).results == report.results


def test_a_blocked_check_neither_confirms_nor_outdates_its_entry(report):
    known = apply(report, [Expected(id="LOSS-BLOCKED", version=1, reason="x")], TODAY)
    assert verdicts(known) == verdicts(report)


def test_the_entry_of_a_crash_does_not_excuse_a_wrong_number(report):
    known = apply(report, [replace(REF, verdict="error")], TODAY)
    assert known.results[1].verdict == "fail"
    assert "the verdict is fail, not error" in known.results[-1].reason


def test_a_file_is_read_with_all_its_fields(tmp_path):
    path = tmp_path / "known.toml"
    path.write_text(
        """
        [[expect]]
        id = "REF-IS-POLICY-GIVEN"
        version = 1
        verdict = "fail"
        where = {objective = "cdpo"}
        reason = "re-read from disk"
        url = "https://example.org"
        seen = 2026-11-20
        until = "2027-03-01"
        experiment = "3f2a"
        """
    )
    (entry,) = load(path, VERSIONS)
    assert (entry.where, entry.until, entry.seen) == (
        {"objective": "cdpo"}, datetime.date(2027, 3, 1), datetime.date(2026, 11, 20)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[expect]\n", "is not TOML"),
        ("[[expected]]\n", "unknown table 'expected'; allowed: [[expect]]"),
        ("expect = 3\n", "is not a list of tables"),
        ('[[expect]]\nid="LOSS-ODD"\nversion=1\nreasons="y"', "unknown field 'reasons'; did you mean reason"),
        ('[[expect]]\nid="LOSS-ODD"\nversion=1', "(LOSS-ODD): lacks reason"),
        ('[[expect]]\nid="LOSS-OD"\nversion=1\nreason="x"', "no check has this id; did you mean LOSS-ODD"),
        ('[[expect]]\nid="LOSS-SHOULD"\nversion=1\nreason="x"', "version 1 is outdated, the check is at 2"),
        ('[[expect]]\nid="LOSS-ODD"\nversion=2\nreason="x"', "version 2 is newer than this dpocheck"),
        ('[[expect]]\nid="LOSS-ODD"\nversion="1"\nreason="x"', "version is '1'; it must be a whole number"),
        ('[[expect]]\nid="LOSS-ODD"\nversion=true\nreason="x"', "version is True; it must be a whole number"),
        ('[[expect]]\nid="LOSS-ODD"\nversion=1\nreason=" "', "the reason is empty"),
        ('[[expect]]\nid="LOSS-ODD"\nversion=1\nreason="x"\nverdict="pass"', "verdict 'pass' cannot be expected"),
        ('[[expect]]\nid="LOSS-ODD"\nversion=1\nreason="x"\nuntil="soon"', "until is 'soon'; it must be a date"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_with_entry_and_remedy(tmp_path, text, said):
    path = tmp_path / "known.toml"
    path.write_text(text)
    with pytest.raises(KnownError) as refusal:
        load(path, VERSIONS)
    assert said in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unreadable_file_is_refused(tmp_path):
    with pytest.raises(KnownError, match="No such file"):
        load(tmp_path / "absent.toml", VERSIONS)
    (tmp_path / "latin.toml").write_bytes(b'[[expect]]\nid = "\xff"')
    with pytest.raises(KnownError, match="is not TOML"):
        load(tmp_path / "latin.toml", VERSIONS)
