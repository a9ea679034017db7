"""Does a subject that misbehaves spoil more than the check at hand?  Whole audits, through the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

SUBJECTS = Path(__file__).parent / "hostile_subjects.py"
CHECKS = ("LOSS-EXTREME", "LOSS-ZERO-MARGIN", "LOSS-BETA-LIMITS")  # only the first goes far enough for the deed
OTHERS = {"LOSS-ZERO-MARGIN": "pass", "LOSS-BETA-LIMITS": "pass"}


@dataclass(frozen=True)
class Audit:
    code: int
    screen: str
    errors: str
    out: Path

    def results(self) -> dict[str, dict]:
        lines = [json.loads(line) for line in (self.out / "results.jsonl").read_text().splitlines()]
        assert [line["type"] for line in lines] == ["header", *["result"] * (len(lines) - 2), "footer"]
        return {line["id"]: line for line in lines[1:-1]}

    def output(self, check: str) -> str:
        return (self.out / self.results()[check]["output"]).read_text()


Run = Callable[..., Audit]


@pytest.fixture
def audit(tmp_path: Path) -> Run:
    """Audit one of the hostile subjects in a process of its own."""

    def run(subject: str, *arguments: str, checks: tuple[str, ...] = CHECKS) -> Audit:
        out = tmp_path / "out"
        only = [word for check in checks for word in ("--only", check)]
        command = [sys.executable, "-m", "dpocheck.cli", "audit", subject, "--out", str(out), *only, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300,
                              env=os.environ | {"COLUMNS": "200"})  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return Audit(done.returncode, done.stdout, done.stderr, out)

    return run


def spoiled(audit: Audit, said: str) -> None:
    """The check at hand is an error that says why; the others passed; nothing can be said of a must check: exit 3."""
    found = audit.results()
    assert {name: result["verdict"] for name, result in found.items()} == OTHERS | {"LOSS-EXTREME": "error"}
    assert said in found["LOSS-EXTREME"]["reason"]
    assert said in " ".join(audit.screen.split())
    assert audit.code == 3
    assert "the subject was here" in audit.output("LOSS-EXTREME")


LONG = pytest.mark.long


@pytest.mark.parametrize(("deed", "said", "arguments"), [
    ("Raises", "ZeroDivisionError: margin too wide", ()),
    ("ExitsAtOnce", "exited with code 0", ()),
    ("Segfaults", "SIGSEGV", ()),
    ("Hoards", "MemoryError", ("--memory", "2")),
    pytest.param("Hangs", "took more than 5 s and was stopped", ("--timeout", "5"), marks=LONG),
    pytest.param("RaisesUnprintable", "Unprintable: <the message cannot be shown", (), marks=LONG),
    pytest.param("Exits", "SystemExit: 7", (), marks=LONG),
    pytest.param("Aborts", "SIGKILL", (), marks=LONG),
    pytest.param("Interrupts", "KeyboardInterrupt", (), marks=LONG),
    pytest.param("ReturnsNothing", "loss() returned None; expected a tensor of shape (", (), marks=LONG),
    pytest.param("ReturnsGenerator", "loss() returned a generator; expected", (), marks=LONG),
    pytest.param("ReturnsMatrix", "loss() returned shape (16, 16); expected (16,)", (), marks=LONG),
    pytest.param("ReturnsMeta", "loss() returned a tensor on meta", (), marks=LONG),
    pytest.param("ReturnsText", "loss() returned a str; expected", (), marks=LONG),
])  # fmt: skip
def test_a_deed_spoils_the_check_at_hand_and_no_other(audit, deed, said, arguments):
    spoiled(audit(f"{SUBJECTS}:{deed}", *arguments), said)


def test_the_output_kept_of_an_error_shows_where_it_was_raised(audit):
    told = audit(f"{SUBJECTS}:Raises", checks=("LOSS-EXTREME",)).output("LOSS-EXTREME")
    assert "hostile_subjects.py" in told
    assert 'raise ZeroDivisionError("margin too wide")' in told


def test_a_loss_that_is_not_a_number_is_a_finding(audit):
    found = audit(f"{SUBJECTS}:ReturnsNan")
    verdicts = {name: result["verdict"] for name, result in found.results().items()}
    assert verdicts == OTHERS | {"LOSS-EXTREME": "fail"}
    assert found.code == 1
    assert "NaN" in found.screen


@pytest.mark.parametrize(("deed", "said"), [
    ("Everything", "default dtype: torch.float32 became torch.float16; patched: torch.log_softmax;"),
    pytest.param("ChangesDtype", "default dtype: torch.float32 became torch.float16", marks=LONG),
    pytest.param("ChangesPlace", "became '/'", marks=LONG),
    pytest.param("Patches", "patched: torch.nn.functional.logsigmoid", marks=LONG),
])  # fmt: skip
def test_what_was_left_changed_is_an_error_of_the_check_at_hand(audit, deed, said):
    """It is put back: the checks that follow see a process as it was."""
    found = audit(f"{SUBJECTS}:{deed}")
    spoiled(found, said)
    assert "the subject was here" not in found.screen + found.errors


@pytest.mark.parametrize("deed", [pytest.param(name, marks=LONG) for name in ("Forks", "Floods", "ChangesRandom")])
def test_what_reaches_no_later_answer_spoils_nothing(audit, deed):
    found = audit(f"{SUBJECTS}:{deed}")
    verdicts = {name: result["verdict"] for name, result in found.results().items()}
    assert verdicts == OTHERS | {"LOSS-EXTREME": "pass"}
    assert found.code == 0
    assert len(found.screen) < 3000  # not one line of the subject's own
    assert "the subject was here" not in found.screen + found.errors


TRAINS = {  # what `train` does -> what the smoke stage says to the adapter's author
    "NothingBack": "train() returned None",
    "Unmoved": "did not move and logged no loss",
    "NotAModel": "policy is of type list; expected the trained model",
}


@pytest.mark.parametrize("deed", list(TRAINS))
@pytest.mark.long
def test_a_train_that_does_not_train_is_the_adapter_s_fault(audit, deed):
    found = audit(f"{SUBJECTS}:{deed}", checks=("GRAD-IDENTITY",))
    assert found.code == 3
    assert found.results() == {}
    assert TRAINS[deed] in " ".join(found.screen.split())


@pytest.mark.long
def test_a_train_that_trains_the_reference_is_a_finding(audit):
    found = audit(f"{SUBJECTS}:TrainsTheReference", checks=("REF-FROZEN", "GRAD-START"))
    assert found.results()["REF-FROZEN"]["verdict"] == "fail"
    assert found.results()["GRAD-START"]["verdict"] == "pass"
    assert found.code == 1


@pytest.mark.long
def test_a_run_that_dies_spoils_the_checks_that_need_it(audit):
    found = audit(f"{SUBJECTS}:DiesWhenAccumulating", checks=("ACCUM-EVEN", "GRAD-IDENTITY"))
    verdicts = {name: result["verdict"] for name, result in found.results().items()}
    assert verdicts == {"ACCUM-EVEN": "error", "GRAD-IDENTITY": "pass"}
    assert "SIGSEGV" in found.results()["ACCUM-EVEN"]["reason"]
    assert found.code == 3


def test_a_module_that_dies_while_imported_is_one_message(audit, tmp_path):
    """Nothing can be asked of it: no verdict, no files, and not the exit code of a finding."""
    subject = tmp_path / "dies.py"
    subject.write_text("import os\ndef dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, "
                       "reference_rejected_logps, beta): ...\nprint('goodbye', flush=True)\nos._exit(5)\n")  # fmt: skip
    found = audit(f"{subject}:dpo_loss")
    assert found.code in (2, 3)
    assert "code 5" in found.screen + found.errors
    assert "goodbye" in found.screen + found.errors
