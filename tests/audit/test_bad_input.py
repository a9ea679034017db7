"""Does bad input get one clear message and exit code 2, with nothing written?"""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from dpocheck import cli

LOSS = """
import torch.nn.functional as F
def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    h = (policy_chosen_logps - policy_rejected_logps) - (reference_chosen_logps - reference_rejected_logps)
    return -F.logsigmoid(beta * h)
"""
FILES = {
    "right.py": LOSS,
    "nothing.py": "x = 1\n",
    "syntax.py": "def (\n",
    "imports.py": "import no_such_module\nclass Adapter:\n    def train(self, probe, rows, recipe, folder): ...\n",
    "lacks.py": "class Adapter:\n    train = 3\n",
    "number.py": "Adapter = 3\n",
    "wants.py": "class Adapter:\n    def __init__(self, model): ...\n"
                "    def train(self, probe, rows, recipe, folder): ...\n",
    "says.py": "class Adapter:\n    says = 3\n    def train(self, probe, rows, recipe, folder): ...\n",
    "generates.py": LOSS.replace("    return", "    yield"),
    "broken.toml": "[[expect]\n",
    "unknown.toml": '[[expect]]\nid = "NOPE"\nversion = 1\nverdict = "fail"\nreason = "x"\n',
    "outdated.toml": '[[expect]]\nid = "LOSS-VALUE"\nversion = 0\nverdict = "fail"\nreason = "x"\n',
    "command.toml": 'comand = "train {policy}"\n',
}  # fmt: skip


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """What is said on standard error; the exit code is 2, and no file is new."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("all my work")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
        done = CliRunner().invoke(cli.cli, ["audit", *arguments])
        assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before
        assert (tmp_path / "thesis" / "chapter.tex").read_text() == "all my work"
        return " ".join(done.stderr.split())

    return run


@pytest.mark.parametrize(("arguments", "said"), [
    (["nosuch"], "installed adapters: reference, trl"),
    (["missing.py:dpo_loss"], "missing.py is not a file"),
    (["nothing.py"], "no function here is recognised"),
    (["syntax.py"], "syntax.py, line 1"),
    (["right.py:dpo_loss", "--only", "LOSS-VALU"], "did you mean LOSS-VALUE"),
    (["right.py:dpo_loss", "--known", "missing.toml"], "cannot read the known failures missing.toml"),
    (["right.py:dpo_loss", "--known", "broken.toml"], "broken.toml is not TOML"),
    (["right.py:dpo_loss", "--known", "unknown.toml"], "entry 1 (NOPE)"),
    (["right.py:dpo_loss", "--known", "outdated.toml"], "version 0 is outdated, the check is at 1"),
    (["right.py:dpo_loss", "--known", "thesis"], "cannot read the known failures thesis"),
    (["right.py:dpo_loss", "--out", "thesis"], "holds files (chapter.tex) but no results.jsonl"),
    (["right.py:dpo_loss", "--out", "right.py"], "is a file; the results need a folder"),
    (["right.py:dpo_loss", "--out", "right.py/below"], "cannot write"),
    (["right.py:dpo_loss", "--objective", "dppo"], "no loss is called 'dppo'"),
    (["right.py:dpo_loss", "--objective", "ipo,beta=-1"], "beta is -1; it must be above 0"),
    (["right.py:dpo_loss", "--timeout", "nan"], "must be a number of seconds above 0"),
    (["right.py:dpo_loss", "--memory", "inf"], "must be a number of GB above 0"),
    (["right.py:dpo_loss", "--memory", "0.1"], "allow 0.75 or more"),
    (["command.toml"], "did you mean 'command'"),
    (["broken.toml"], "broken.toml is not TOML"),
])  # fmt: skip
def test_what_can_be_seen_without_the_subject_is_refused_before_a_worker_starts(refused, monkeypatch, arguments, said):
    from dpocheck.transports import process

    def never(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(process.subprocess, "Popen", never)
    assert said in refused(*arguments)


@pytest.mark.parametrize(("subject", "said"), [
    ("no.such.module:Adapter", "No module named 'no'"),
    ("os:path", "os:path is a module; an adapter or a function is audited"),
    ("imports.py:Adapter", "No module named 'no_such_module'"),
    ("lacks.py:Adapter", "has none of the methods loss, sequence_logps, step, train"),
    ("number.py:Adapter", "number.py:Adapter is an int; an adapter or a function is audited"),
    ("wants.py:Adapter", "cannot be made without arguments (missing a required argument: 'model')"),
    ("says.py:Adapter", "`says` is an int; expected dpocheck.adapter.Says(...)"),
    ("generates.py:dpo_loss", "a generator; a function that returns its result is audited"),
    ("right.py:dpo_los", "did you mean dpo_loss?"),
])  # fmt: skip
def test_a_subject_that_cannot_be_loaded_is_one_message(refused, subject, said):
    assert said in refused(subject)
