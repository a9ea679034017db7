"""Are the files of an audit whole, valid, and enough to repeat a failure?"""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from importlib.resources import files as package_files
from pathlib import Path

import jsonschema
import pytest

from dpocheck import stored
from dpocheck.experiment import from_plain
from dpocheck.files import CannotWrite
from dpocheck.report.files import check_folder, default_folder, gather, lines, write
from dpocheck.report.junit import junit

SCHEMA = json.loads((package_files("dpocheck.report") / "results.schema.json").read_text())


def refuse(text: str):
    raise ValueError(f"{text} is not JSON")


def test_every_line_of_the_results_is_strict_json_that_fits_the_schema(report, hostile):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for audit in (report, hostile, replace(report, results=(), smoke="nothing trained", equation_residual=None)):
        records = [json.loads(line, parse_constant=refuse) for line in lines(audit)]
        for record in records:
            validator.validate(record)
        assert [record["type"] for record in records] == ["header", *["result"] * len(audit.results), "footer"]


@pytest.mark.parametrize("change", [{"verdict": "passed"}, {"level": "high"}, {"error": "nan"}, {"extra": 1}])
def test_the_schema_refuses_what_the_contract_does_not_know(report, change):
    record = json.loads(lines(report)[1]) | change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(record)


def test_numbers_that_json_lacks_are_strings_and_what_is_absent_is_null(report):
    record = next(r for r in map(json.loads, lines(report)) if r.get("id") == "LOSS-SHOULD")
    assert (record["observed"], record["error"], record["error_over_bound"]) == ("NaN", "Infinity", "Infinity")
    assert record["blocked_by"] is None


def test_the_footer_counts(report):
    footer = json.loads(lines(report)[-1])
    assert (footer["executed"], footer["applicable"], footer["total"]) == (5, 8, 9)
    assert sum(footer["counts"].values()) == 9


def test_junit_reads_back_with_the_same_counts(report):
    root = ElementTree.fromstring(junit(report))
    suite = root.find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": 9, "failures": 2, "errors": 2, "skipped": 2}
    found = {kind: len(suite.findall(f"testcase/{kind}")) for kind in ("failure", "error", "skipped")}
    assert found == {"failure": 2, "error": 2, "skipped": 2}
    failure = suite.find("testcase[@name='REF-IS-POLICY-GIVEN']/failure")
    assert "probably    the reference is re-read from disk" in failure.text
    assert suite.find("testcase[@name='LOSS-BLOCKED']/skipped").get("message") == "blocked by REF-IS-POLICY-GIVEN"


def test_junit_survives_whatever_a_subject_says(hostile):
    root = ElementTree.fromstring(junit(hostile))
    messages = [node.get("message") for node in root.iter("failure")]
    assert messages
    assert all("[red]x[/y] <b>&" in message for message in messages)


def test_a_failed_smoke_stage_is_an_error_of_junit(report):
    suite = ElementTree.fromstring(junit(replace(report, results=(), smoke="no policy"))).find("testsuite")
    assert (suite.get("tests"), suite.get("errors")) == ("1", "1")
    assert suite.find("testcase/error").get("message") == "no policy"


def test_an_audit_leaves_its_files_and_their_paths_are_relative(report, tmp_path):
    folder = tmp_path / "deep" / "out"
    written = write(report, folder, script=lambda result, _: f"# {result.id}\n")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    handles = {stored.handle(result) for result in report.results if result.experiments}
    assert found == {
        "results.jsonl", "junit.xml", "ref-is-policy-given.txt", "loss-should.txt", "output/loss-odd.txt",
        "scripts/ref_is_policy_given.py", "scripts/loss_should.py", *(f"experiments/{name}.json" for name in handles),
    }  # fmt: skip
    for line in (folder / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in ("experiment", "script", "output"):
            assert not record.get(name) or (folder / record[name]).is_file()
    assert written.results[1].script == "scripts/ref_is_policy_given.py"
    assert (folder / "output/loss-odd.txt").read_text() == "Traceback\n  boom\n"


def test_results_of_one_id_do_not_overwrite_each_other(report):
    twice = replace(report, results=(report.results[1], replace(report.results[1], params={"kind": "ipo"})))
    _, contents = gather(twice)
    assert {"ref-is-policy-given.txt", "ref-is-policy-given-2.txt"} <= set(contents)


def test_the_folder_is_replaced_whole(report, tmp_path):
    folder = tmp_path / "out"
    write(report, folder)
    write(replace(report, results=report.results[:1]), folder)
    assert {path.name for path in folder.iterdir()} == {"results.jsonl", "junit.xml"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_of_somebody_elses_is_never_replaced(report, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for attempt in (lambda: check_folder(tmp_path), lambda: write(report, tmp_path)):
        with pytest.raises(CannotWrite, match="holds files"):
            attempt()
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_early_check_of_a_folder_leaves_nothing(tmp_path):
    check_folder(tmp_path / "a" / "b" / "c")
    assert os.listdir(tmp_path) == []


def test_a_failure_while_writing_leaves_the_old_folder(report, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    write(report, folder)
    before = sorted(path.name for path in folder.iterdir())

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpocheck.files.write_atomic", full)
    with pytest.raises(CannotWrite, match="No space left"):
        write(report, folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert os.listdir(tmp_path) == ["out"]


def test_the_default_folder_is_named_after_subject_and_version(report, hostile):
    assert default_folder(report) == Path("out/trl-1.16.0")
    named = default_folder(replace(report, header=replace(report.header, name="../../etc", subject_version=None)))
    assert named == Path("out/etc")
    assert default_folder(hostile).parent == Path("out")


# ------------------------------------------------------------------------------------------------ stored experiments


def stored_file(report, tmp_path) -> Path:
    write(report, tmp_path / "out")
    return tmp_path / "out" / "experiments" / f"{stored.handle(report.results[1])}.json"


def test_a_stored_experiment_comes_back_equal_with_subject_and_versions(report, tmp_path):
    data = stored.read(stored_file(report, tmp_path))
    assert from_plain(data["experiments"]) == report.results[1].experiments
    assert (data["subject"], data["subject_version"], data["versions"]) == ("trl", "1.16.0", {"torch": "2.13.0"})
    assert data["check"] == {"id": "REF-IS-POLICY-GIVEN", "version": 1}


def test_it_is_found_by_path_by_handle_and_by_id(report, tmp_path):
    path = stored_file(report, tmp_path)
    out = tmp_path / "out"
    for name in (str(path), str(path.with_suffix("")), str(out / path.stem), path.stem, "REF-IS-POLICY-GIVEN"):
        assert stored.find(name, [tmp_path]) == path, name
    with pytest.raises(stored.StoredError, match=f"near: {path.stem}"):
        stored.find("ref-is-policy-gven", [out])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key": "0" * 64}, "changed by hand"),
        ({"schema": 99}, "schema 99"),
        ({"surprise": 1}, "unknown fields: surprise"),
        ({"experiments": [{"type": "Bomb"}]}, "unknown record 'Bomb'"),
    ],
)
def test_a_spoilt_stored_file_is_refused_with_the_reason(report, tmp_path, change, said):
    path = stored_file(report, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(stored.StoredError, match=said):
        stored.read(path)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not a stored"), ("[]", "not a JSON object"), ("{}", "it lacks check")]
)
def test_what_is_no_stored_experiment_is_refused(tmp_path, text, said):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(stored.StoredError, match=said):
        stored.read(path)
