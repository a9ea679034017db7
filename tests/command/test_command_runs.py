"""A command that misbehaves spoils its own run: one reason, its own last output, nothing left running."""

import json
import re
import sys
import time

import psutil
import pytest
from command_bench import COMMAND, TRAINER, described, experiment, put

from dpocheck.command import CommandFailed
from dpocheck.command.run import KEPT, run

PYTHON = sys.executable


def failure(subject, folder) -> CommandFailed:
    with pytest.raises(CommandFailed) as caught:
        put(subject, experiment(), folder)
    assert "\n" not in caught.value.reason
    return caught.value


@pytest.mark.parametrize(
    ("misbehave", "reason", "said"),
    [
        ("fail", "exited with status 1", "the learning rate is the wrong colour"),
        ("signal", "was ended by signal SIGSEGV", ""),
        ("nothing", "wrote no weights: .*final.safetensors is not there", ""),
        ("garbage", "wrote unreadable weights: .*final.safetensors", "step 1 of many"),
    ],
)
def test_a_command_that_fails_is_reported_with_its_reason_and_its_own_output(misbehave, reason, said, tmp_path):
    error = failure(described(tmp_path, more=f"--misbehave {misbehave}"), tmp_path)
    assert re.search(reason, error.reason), error.reason
    assert said in error.output


def test_a_command_that_hangs_is_ended_with_everything_it_started(tmp_path):
    subject = described(tmp_path, more="--misbehave hang")
    subject.seconds = 3
    error = failure(subject, tmp_path)
    assert error.reason == "was still running after 3 s, the time limit"
    assert "thinking" in error.output
    child = int((tmp_path / "run/out/child").read_text())  # it had left the session
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the grandchild outlived the run")


def test_a_command_that_fills_the_memory_is_ended(tmp_path):
    subject = described(tmp_path, more="--misbehave memory")
    subject.memory_gb = 0.5
    assert failure(subject, tmp_path).reason.endswith("of memory; the limit is 0.5 GB")


def test_a_flood_of_output_is_read_and_only_its_end_is_kept(tmp_path):
    subject = described(tmp_path, more="--misbehave flood", log=r"{ step = 'loss (?P<loss>\S+)' }")
    before = psutil.Process().memory_info().rss
    reply, _ = put(subject, experiment(), tmp_path)
    assert psutil.Process().memory_info().rss - before < 100 * 2**20  # of 210 MB
    assert len(reply["fields"]["history"]) == 1


def test_the_last_64_kb_are_kept(tmp_path):
    code = "import sys; sys.stdout.write('a' * 1000000 + 'the end')"
    done = run([PYTHON, "-c", code], environment={}, folder=tmp_path, seconds=60, memory_gb=1)
    assert len(done.output) == KEPT
    assert done.output.endswith("athe end")


def test_lines_are_handed_on_whole_however_they_are_written(tmp_path):
    code = "import os, time\nfor part in (b'lo', b'ss 1\\nlos', b's 2\\nloss 3'): os.write(1, part); time.sleep(0.1)"
    pieces = []
    run([PYTHON, "-c", code], environment={}, folder=tmp_path, seconds=60, memory_gb=1, lines=pieces.append)
    assert "\n".join(pieces).split("\n") == ["loss 1", "loss 2", "loss 3"]


def test_a_program_that_is_gone_is_a_failure_of_the_command(tmp_path):
    with pytest.raises(CommandFailed, match="could not be started: No such file"):
        run([str(tmp_path / "gone")], environment={}, folder=tmp_path, seconds=60, memory_gb=1)


def test_a_head_that_is_not_there_is_named_with_what_is(tmp_path):
    error = failure(described(tmp_path, weights='{ last = "final.safetensors", head = "output.weight" }'), tmp_path)
    assert "no tensor 'output.weight' (weights.head)" in error.reason
    assert "lm_head.weight" in error.reason


def test_an_adapter_of_another_rank_cannot_be_read(tmp_path):
    weights = '{ last = "final.safetensors", lora_a = "head.A", lora_b = "head.B" }'
    subject = described(tmp_path, more="--optim lora --rank 8", update='{ kind = "lora" }', weights=weights)
    assert "give the trainer {rank}" in failure(subject, tmp_path).reason


def test_a_run_is_offline_has_its_own_caches_and_no_launchers_variables(tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "8", "RANK": "3", "HF_HUB_OFFLINE": "0", "HF_HOME": "/elsewhere",
                        "WANDB_API_KEY": "x"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    subject = described(tmp_path, more="--misbehave environment", environment='{ MINE = "{work}/x" }')
    put(subject, experiment(), tmp_path)
    found = json.loads((tmp_path / "run/out/environment.json").read_text())
    assert found["HF_HUB_OFFLINE"] == found["TRANSFORMERS_OFFLINE"] == found["OMP_NUM_THREADS"] == "1"
    assert found["MINE"] == str(tmp_path / "run/work/x")
    for name in ("HF_HOME", "XDG_CACHE_HOME", "TMPDIR"):
        assert found[name].startswith(str(tmp_path / "run"))
    assert not {"WORLD_SIZE", "RANK", "WANDB_API_KEY"} & set(found)


def test_a_folder_with_a_space_and_quotes_is_no_difficulty(tmp_path):
    folder = tmp_path / "my 'own' folder"
    folder.mkdir()
    _, arrays = put(described(folder, command=COMMAND), experiment(), folder)
    assert (arrays["start"] != arrays["head"]).any()


def test_a_second_run_in_a_folder_does_not_see_what_the_first_one_wrote(tmp_path):
    put(described(tmp_path), experiment(), tmp_path)
    error = failure(described(tmp_path, more="--misbehave nothing"), tmp_path)
    assert "wrote no weights" in error.reason


def test_a_run_that_resumes_finds_what_the_run_before_it_wrote(tmp_path):
    options = '{ resume_from = "--resume {out}/{resume_from:05d}" }'
    subject = described(tmp_path, options=options)
    put(subject, experiment(), tmp_path)
    kept = (tmp_path / "run/out/00001.safetensors").read_bytes()
    with pytest.raises(CommandFailed) as caught:  # the fake resumes from folders, and says which one it missed
        put(subject, experiment(reference=1, resume_from=1), tmp_path)
    assert f"{tmp_path}/run/out/00001/model.safetensors" in caught.value.output
    assert (tmp_path / "run/out/00001.safetensors").read_bytes() == kept


def test_what_an_earlier_run_wrote_is_not_taken_for_the_resumed_run_s(tmp_path):
    options = '{ resume_from = "--misbehave nothing" }'
    subject = described(tmp_path, options=options)
    put(subject, experiment(), tmp_path)
    with pytest.raises(CommandFailed, match="is that of the run it resumed"):
        put(subject, experiment(reference=1, resume_from=1), tmp_path)


def test_a_script_beside_the_description_is_named_by_its_folder(tmp_path):
    command = COMMAND.replace("'" + str(TRAINER) + "'", "{here}/train.py")
    (tmp_path / "train.py").write_text(TRAINER.read_text())
    _, arrays = put(described(tmp_path, command=command), experiment(), tmp_path)
    assert (arrays["start"] != arrays["head"]).any()
