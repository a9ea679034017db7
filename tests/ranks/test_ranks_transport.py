"""A run in several processes: each is told its place, one answer comes back, and what fails in one ends all."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from dpocheck.checks import scenes
from dpocheck.experiment import Recipe, Sequence, ranks_of
from dpocheck.open import open_subject
from dpocheck.oracle.theory import PAPER
from dpocheck.transports import InProcess, against_ranks, ranks

SUBJECTS = Path(__file__).with_name("ranks_subjects.py")
TWO = scenes.run(scenes.rectangular(4), PAPER, Recipe(batch=2, world_size=2))


@pytest.fixture
def subject(tmp_path, monkeypatch):
    """`subject(name)`: one of `ranks_subjects.py`, closed at the end, with nothing of it left running."""
    opened = []
    monkeypatch.setattr(ranks, "GRACE", 1.0)

    def build(name: str):
        opened.append(open_subject(f"{SUBJECTS}:{name}", tmp_path, timeout=60))
        return opened[-1]

    yield build
    for one in opened:
        one.close()
    assert [pid for pid in pids(tmp_path) if alive(pid)] == []


def told(folder: Path) -> list[dict]:
    """What each process was told, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("told*.json"))]


def pids(folder: Path) -> list[int]:
    return [one["pid"] for one in told(folder)]


def alive(pid: int) -> bool:
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.05)
    return True


def test_each_process_is_told_its_place_as_torchrun_tells_it(subject, tmp_path):
    seen = subject("Adapter").observe(TWO)
    assert seen.raised is None
    first, second = told(tmp_path)
    for rank, one in enumerate((first, second)):
        assert (one["RANK"], one["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["MASTER_ADDR"]) == ("2", "2", "127.0.0.1")
        assert one["rows"] == 4  # of all ranks: which are whose is the trainer's business
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["folder"] == second["folder"]
    assert first["pid"] != second["pid"]


def test_the_first_process_answers_and_the_others_need_not(subject):
    seen = subject("Adapter").observe(TWO)
    assert seen.logits == pytest.approx(TWO.policy.logits())
    assert [(one["rank"], one["apart"]) for one in seen.spies["ranks"]] == [(0, 0.0), (1, None)]


@pytest.mark.parametrize(("name", "same"), [("Adapter", True), ("StaysInGroup", False), ("KeepsGroup", True)])
def test_processes_are_used_again_unless_they_are_still_in_a_group(name, same, subject, tmp_path):
    trainer = subject(name)
    trainer.observe(TWO)
    before, port = pids(tmp_path), told(tmp_path)[0]["MASTER_PORT"]
    trainer.observe(replace(TWO, recipe=replace(TWO.recipe, seed=1)))
    assert (pids(tmp_path) == before) is same
    assert told(tmp_path)[0]["MASTER_PORT"] != port


def test_a_process_that_raises_ends_the_run_for_those_that_wait_for_it(subject):
    trainer = subject("Raises")
    began = time.monotonic()
    seen = trainer.observe(TWO)
    assert time.monotonic() - began < 60  # its own limit and the others' start, which a rank that sleeps never reaches
    assert seen.raised == "ValueError: the second half of the batch is missing (rank 1 of 2)"
    assert seen.in_adapter
    assert "this is rank 1" in seen.output
    assert "--- rank 0:\nthis is rank 0" in seen.output


def test_a_process_that_dies_is_the_reason_though_another_raises(subject):
    seen = subject("Dies").observe(TWO)
    assert seen.died
    assert seen.raised == "rank 1 of 2: during the call 'observe' the subject's process exited with code 3"
    assert "last words" in seen.output
    assert "ConnectionError: a peer closed the connection" in seen.output


def test_a_process_that_hangs_is_ended_at_the_limit_and_says_where_it_was(subject):
    trainer = subject("Hangs")
    processes = trainer.transport.in_ranks.ranks
    processes.like.limits = replace(processes.like.limits, seconds=3.0, start_seconds=3.0)
    seen = trainer.observe(TWO)
    assert seen.died
    assert "rank 1 of 2: the call 'observe' took more than" in seen.raised
    assert "in wait_in_vain" in seen.output


def test_a_refusal_is_a_refusal(subject):
    seen = subject("Refuses").observe(TWO)
    assert seen.refused.startswith("more than one process (rank ")
    assert seen.raised is None


def test_a_trainer_that_does_not_say_so_is_never_started_in_several_processes(subject, tmp_path):
    trainer = subject("Alone")
    assert "does not declare `ranks = True`" in trainer.cannot(TWO)
    assert "does not declare" in trainer.cannot(Sequence((replace(TWO, recipe=Recipe(batch=4)), TWO)))
    assert trainer.cannot(replace(TWO, recipe=Recipe(batch=4))) is None
    assert not trainer.transport.in_ranks.ranks.workers


def test_a_live_object_has_this_process_alone():
    class Live:
        ranks = True

        def train(self, probe, rows, recipe, folder):
            raise AssertionError

    assert "live object" in against_ranks(InProcess(Live()))


def test_how_many_processes_an_experiment_asks_for():
    assert ranks_of(TWO) == 2
    assert ranks_of(Sequence((replace(TWO, recipe=Recipe()), TWO))) == 2
    assert ranks_of(scenes.step(scenes.rectangular(2))) == 1
