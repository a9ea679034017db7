"""From the command to the files and back, with a real worker and real checks: does it hold together?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpocheck

RIGHT = '''
import torch.nn.functional as F

def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    h = policy_chosen_logps - reference_chosen_logps - (policy_rejected_logps - reference_rejected_logps)
    return -F.logsigmoid(beta * h)
'''
WRONG = RIGHT.replace("policy_rejected_logps - reference_rejected", "policy_rejected_logps + reference_rejected")


@pytest.fixture
def run(tmp_path):
    """Runs a module of ours in a folder of its own."""

    def call(*arguments: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(Path(dpocheck.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=590,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        )  # fmt: skip

    return call


@pytest.mark.long
def test_a_wrong_loss_is_found_kept_replayed_and_fixed(run, tmp_path):
    (tmp_path / "train.py").write_text(WRONG)
    audit = run("dpocheck.cli", "audit", "train.py")
    assert audit.returncode == 1, audit.stderr
    assert audit.stdout.startswith("train.py:dpo_loss(")  # what was recognised
    assert "✘  LOSS-VALUE" in audit.stdout
    assert audit.stderr == ""
    out = tmp_path / "out" / "dpo_loss"
    records = [json.loads(row) for row in (out / "results.jsonl").read_text().splitlines()]
    (failed,) = [record for record in records if record.get("id") == "LOSS-VALUE"]
    script = subprocess.run([sys.executable, out / failed["script"]], capture_output=True, text=True, timeout=300)
    assert "<-- not so" in script.stdout, script.stderr
    replay = run("dpocheck.cli", "replay", Path(failed["experiment"]).stem)
    assert (replay.returncode, replay.stdout[:18]) == (1, "failed: LOSS-VALUE"), replay.stderr
    (tmp_path / "train.py").write_text(RIGHT)
    replay = run("dpocheck.cli", "replay", "loss-value")
    assert (replay.returncode, replay.stdout[:17]) == (0, "fixed: LOSS-VALUE"), replay.stderr
    audit = run("dpocheck.cli", "audit", "train.py:dpo_loss")
    assert audit.returncode == 0, audit.stdout


@pytest.mark.long
def test_a_known_failure_of_a_real_audit_makes_it_right(run, tmp_path):
    (tmp_path / "train.py").write_text(WRONG)
    (tmp_path / "known.toml").write_text('[[expect]]\nid = "LOSS-VALUE"\nversion = 1\nreason = "the sign of a term"\n')
    audit = run("dpocheck.cli", "audit", "train.py:dpo_loss", "--only", "LOSS-VALUE", "--known", "known.toml")
    assert audit.returncode == 0, audit.stdout + audit.stderr
    (tmp_path / "train.py").write_text(RIGHT)
    audit = run("dpocheck.cli", "audit", "train.py:dpo_loss", "--only", "LOSS-VALUE", "--known", "known.toml")
    assert audit.returncode == 1
    assert "passes, though it is a known failure: the sign of a term" in " ".join(audit.stdout.split())


@pytest.mark.long
def test_a_new_adapter_runs_as_it_is_written(run, tmp_path):
    assert run("dpocheck.cli", "new-adapter", "mine").returncode == 0
    audit = run("dpocheck.cli", "audit", "mine.py:Adapter", "--only", "LOSS-VALUE", "--only", "GRAD-TOKENS")
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert "2 checks, 2 of 2 applicable ran: 2 passed" in audit.stdout


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        ("absent.py:loss", "absent.py is not a file"),
        ("nothing.py", "nothing"),
        ("broken.py", "broken.py"),
        ("trll", "unknown subject 'trll'; installed adapters:"),
    ],
)
def test_a_subject_that_cannot_be_is_refused_before_a_worker_starts(run, tmp_path, subject, said):
    (tmp_path / "nothing.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("def loss(:\n")
    done = run("dpocheck.cli", "audit", subject)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ pytest plugin


@pytest.mark.long
def test_pytest_passes_skips_and_fails_as_the_verdicts_say(run, tmp_path):
    (tmp_path / "train.py").write_text(WRONG)
    conformance = ("pytest", "--pyargs", "conformance", "-q", "-p", "no:cacheprovider")
    wrong = run(*conformance, "--dpo-adapter", "train.py:dpo_loss")
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    assert "✘ LOSS-VALUE · must" in wrong.stdout  # the long form
    assert "repeat      dpocheck replay loss-value-" in wrong.stdout
    (tmp_path / "train.py").write_text(RIGHT)
    right = run(*conformance, "--dpo-adapter", "train.py:dpo_loss")
    assert right.returncode == 0, right.stdout
    assert " passed, " in right.stdout
    assert " skipped" in right.stdout


def test_pytest_without_a_trainer_says_how_to_name_one(run):
    done = run("pytest", "--pyargs", "conformance", "-q", "-rs", "-p", "no:cacheprovider")
    assert "no trainer was named: give --dpo-adapter SPEC" in " ".join(done.stdout.split())


def test_the_plugin_is_silent_and_loads_nothing_where_it_is_not_used(tmp_path):
    (tmp_path / "test_other.py").write_text(
        "import sys\n"
        "def test_other():\n"
        "    assert 'dpocheck.pytest_plugin' in sys.modules\n"
        "    heavy = ('torch', 'numpy', 'scipy', 'rich', 'dpocheck.check', 'dpocheck.runner')\n"
        "    assert [name for name in heavy if name in sys.modules] == []\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_other.py"], capture_output=True,
        text=True, cwd=tmp_path, timeout=120,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "dpocheck.pytest_plugin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "dpocheck" not in done.stdout
