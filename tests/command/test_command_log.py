"""What a trainer logs becomes history entries by TRL's names, from its output or from a file it writes."""

import math

import pytest
from command_bench import described, experiment, put

from dpocheck.command.file import Log
from dpocheck.command.log import history, matches_of

LOG_2 = math.log(2)  # the loss where policy and reference are the same


def entries(tmp_path, log: str, more: str = "", **parts):
    subject = described(tmp_path, more=more, log=log, **parts)
    return put(subject, experiment(reference=1, steps=2, batch=2, accumulation=2), tmp_path)[0]["fields"]["history"]


def test_named_groups_are_metrics_by_trl_names(tmp_path):
    log = r"{ step = 'step (?P<step>\d+) of many: loss (?P<loss>\S+) \| reward_chosen (?P<rewards_chosen>\S+)' }"
    first, second = entries(tmp_path, log)
    assert (first["step"], first["split"], second["step"]) == (1, "train", 2)
    assert first["metrics"]["loss"] == pytest.approx(LOG_2, abs=5e-7)  # six decimals are printed
    assert set(first["metrics"]) == {"loss", "rewards/chosen"}


def test_entries_without_a_number_are_counted_and_names_translated(tmp_path):
    log = r"{ step = 'loss (?P<xent>\S+)', names = { xent = 'loss' }, digits = 6 }"
    found = entries(tmp_path, log)
    assert [entry["step"] for entry in found] == [1, 2]
    assert found[0]["metrics"]["loss"] == pytest.approx(LOG_2, abs=5e-7)


def test_a_dictionary_is_read_by_pairs_and_what_is_no_number_left_out(tmp_path):
    log = """{ step = '\\{.*\\}', metric = "'(?P<name>[^']+)': '?(?P<value>[^',}]+)" }"""
    first, _ = entries(tmp_path, log, more="--log dict")
    assert first["metrics"]["loss"] == pytest.approx(LOG_2, abs=5e-7)
    assert set(first["metrics"]) == {"loss", "rewards/chosen"}


def test_a_log_file_is_read_where_the_last_step_left_it(tmp_path):
    log = r"""{ file = "log-{step}.json", step = '\{[^{}]*\}', metric = '"(?P<name>[^"]+)": (?P<value>[^\s,]+)' }"""
    found = entries(tmp_path, log, more="--log file")
    assert [entry["step"] for entry in found] == [1, 2]
    assert found[0]["metrics"]["loss"] == pytest.approx(LOG_2, rel=1e-6)


def test_an_evaluation_set_is_written_and_its_entries_carry_its_name(tmp_path):
    from dataclasses import replace

    subject = described(
        tmp_path, rows='{ file = "train.jsonl", evaluation = "held.jsonl", order = "kept" }', more="--log dict",
        options='{ evaluation = "--eval-data {rows}/held.jsonl" }',
        log="""{ step = '\\{.*\\}', metric = "'(?P<name>[^']+)': '?(?P<value>[^',}]+)" }""",
    )  # fmt: skip
    asked = experiment(reference=1)
    asked = replace(asked, evaluation=(("held", asked.rows[:1]),))
    reply, _ = put(subject, asked, tmp_path)
    assert [(entry["split"], entry["step"]) for entry in reply["fields"]["history"]] == [("train", 1), ("held", 1)]
    assert 0 < reply["fields"]["history"][1]["metrics"]["loss"] < LOG_2  # one step on all rows lowers each row's loss
    assert len((tmp_path / "run/rows/held.jsonl").read_text().splitlines()) == 1


def test_a_summary_is_told_from_a_step():
    log = Log(step=r"\{.*\}", metric=r"'(?P<name>\w+)': (?P<value>[-.\d]+)")
    text = "{'loss': 0.5}\nnoise\n{'train_runtime': 2.0, 'train_loss': 0.5}"
    found = history(log, matches_of(text, log), None, None)
    assert [(entry["step"], entry["split"]) for entry in found] == [(1, "train"), (1, "summary")]


def test_without_a_log_there_is_no_history():
    assert history(None, [], None, None) == []


def test_micro_batches_are_counted_as_the_steps_they_belong_to():
    log = Log(step=r"Iter (?P<step>\d+): loss (?P<loss>\S+)", counts="microsteps")
    text = "\n".join(f"Iter {i}: loss {i}.0" for i in range(1, 6))
    assert [entry["step"] for entry in history(log, matches_of(text, log), None, None, 2)] == [1, 1, 2, 2, 3]
