"""A command line in several processes: `launch` takes the place of its program, and nothing else changes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "command"))

from command_bench import COMMAND, described, experiment, put

from dpocheck.command.file import CommandError
from dpocheck.transports import InFiles, against_ranks

LAUNCHER = Path(__file__).with_name("ranks_launcher.py")
LAUNCH = f"\"{{python}} '{LAUNCHER}' {{ranks}}\""
TWO = experiment(batch=4, world_size=2)


def test_the_launcher_takes_the_place_of_the_program(tmp_path):
    _, arrays = put(described(tmp_path, launch=LAUNCH), TWO, tmp_path)
    first, second = ((tmp_path / "run" / "out" / f"arguments{rank}").read_text().splitlines() for rank in (0, 1))
    assert first[0] == second[0] == COMMAND.split("'")[1]  # the script; the launcher has its interpreter
    assert first[first.index("--batch") + 1] == "4"  # of one process
    assert (tmp_path / "run" / "out-1" / "final.safetensors").exists()
    _, alone = put(described(tmp_path / "alone"), experiment(batch=4), tmp_path / "alone")
    assert np.array_equal(arrays["head"], alone["head"])  # both processes of this trainer take the same four pairs
    assert not np.array_equal(arrays["head"], arrays["start"])


def test_one_process_is_started_without_the_launcher(tmp_path):
    put(described(tmp_path, launch=LAUNCH), experiment(batch=4), tmp_path)
    assert not (tmp_path / "run" / "out" / "arguments0").exists()


def test_the_number_of_processes_may_stand_in_the_environment_instead(tmp_path):
    subject = described(tmp_path, launch="'{python} -I'", environment="{ NPROC_PER_NODE = '{ranks}' }",
                        more="--misbehave environment")  # fmt: skip
    put(subject, TWO, tmp_path)
    assert '"NPROC_PER_NODE": "2"' in (tmp_path / "run" / "out" / "environment.json").read_text()


def test_a_launcher_that_is_not_told_the_number_is_refused(tmp_path):
    with pytest.raises(CommandError, match=r"launch has no \{ranks\}"):
        described(tmp_path, launch="'{bin}/torchrun --nproc-per-node 2'")


def test_without_a_launcher_the_experiment_is_not_applicable(tmp_path):
    subject = InFiles(described(tmp_path))
    assert "no `launch`" in against_ranks(subject)
    assert against_ranks(InFiles(described(tmp_path / "b", launch=LAUNCH))) is None
    assert "no `launch`" in subject.subject.supports(TWO)


def test_the_order_of_rows_does_not_matter_where_one_step_takes_all(tmp_path):
    """Four pairs on two processes of two are one step, as four on one process are."""
    subject = described(tmp_path, launch=LAUNCH, rows='{ file = "train.jsonl", order = "shuffled" }')
    assert subject.supports(experiment(batch=2, world_size=2)) is None
    assert "shuffles the rows" in subject.supports(experiment(batch=1, world_size=2))
