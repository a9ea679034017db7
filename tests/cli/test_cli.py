"""Do the commands say what they should, on the right stream, with the right exit code?"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import dpocheck
from dpocheck import cli, stored
from dpocheck.experiment import LossExperiment, Objective
from dpocheck.result import Header, Report, Result


@dataclass(frozen=True)
class Declared:
    """As much of a check as the commands look at."""

    id: str
    chapter: str = "loss"
    stage: str = "loss"
    level: str = "must"
    tier: str = "quick"
    version: int = 1
    claim: str = "At zero margin the loss is log 2."
    source: str = "Rafailov et al. 2023, Eq. 7"
    why: str = "a wrong offset moves every gradient"
    bug: str = "a margin added twice"
    fix: str = "remove the offset"
    says: str | None = None
    needs: frozenset[str] = frozenset({"loss.per_pair"})
    rivals: tuple = ()
    covers: tuple = ("L2",)


DECLARED = (Declared("LOSS-ZERO-MARGIN"), Declared("LOSS-MONOTONE"), Declared("RUNS-BITS", tier="full"))
CHECKS = {check.id: check for check in DECLARED}
PASS = Result(
    id="LOSS-ZERO-MARGIN", version=1, level="must", tier="quick", chapter="loss", stage="loss", verdict="pass",
    claim="At zero margin the loss is log 2.",
)  # fmt: skip
FAIL = replace(
    PASS, id="LOSS-MONOTONE", verdict="fail", observed=1.0, expected=2.0, error=1.0, bound=1e-9,
    experiments=(LossExperiment((-1.0,), (-2.0,), (-1.0,), (-2.0,)),),
)  # fmt: skip


def audited(*results: Result, **fields: Any) -> Report:
    header = Header(
        suite="0.1.0", subject="mine", name="mine", subject_version="1", route="loss", forced={}, isolation="process",
        precision=None, seed=0, tier="quick", platform="Linux",
    )  # fmt: skip
    return Report(header=header, results=results, **fields)


@dataclass
class Fake:
    """A runner that answers with what the test put there, and keeps what it was asked."""

    report: Report = field(default_factory=lambda: audited(PASS))
    result: Result = PASS
    asked: list[Any] = field(default_factory=list)


@pytest.fixture
def fake(monkeypatch, tmp_path) -> Fake:
    fake = Fake()
    module = types.ModuleType("dpocheck.runner")

    class UsageError(Exception):
        pass

    @dataclass(frozen=True)
    class Options:
        subject: str
        tier: str = "quick"
        only: tuple[str, ...] = ()
        seed: int = 0
        jobs: int = 1
        objective: Objective | None = None
        tokenizer: str | None = None
        timeout: float = 120.0
        memory: float = 8.0
        shrink: int = 0
        out: Path | None = None
        known: tuple[str, ...] = ()
        python: str | None = None
        unblocked: bool = False

    @contextlib.contextmanager
    def audited(options, progress=None):
        if options.subject == "nobody":
            raise UsageError("unknown subject 'nobody'; installed adapters: trl")
        fake.asked.append(options)
        yield fake.report, lambda question: {}

    def replay(data):
        fake.asked.append(data)
        return fake.result

    module.UsageError, module.Options, module.audited = UsageError, Options, audited
    again = types.ModuleType("dpocheck.replay")
    again.replay = replay
    monkeypatch.setitem(sys.modules, "dpocheck.replay", again)
    module.planned = lambda options: [(CHECKS["LOSS-MONOTONE"], None), (CHECKS["RUNS-BITS"], "needs train")]
    monkeypatch.setitem(sys.modules, "dpocheck.runner", module)
    monkeypatch.setattr(dpocheck, "runner", module, raising=False)
    monkeypatch.setattr(cli, "catalogue", lambda: CHECKS)
    monkeypatch.setattr(cli, "questions", dict)
    monkeypatch.setattr("dpocheck.explain.Check", Declared)
    monkeypatch.chdir(tmp_path)
    return fake


def dpo(*arguments: str):
    return CliRunner().invoke(cli.cli, list(arguments))


# ------------------------------------------------------------------------------------------------------------- start


def test_help_names_every_command():
    text = dpo("--help").output
    for command in ("audit", "list", "explain", "replay", "selftest", "new-adapter"):
        assert f"  {command} " in text


# ------------------------------------------------------------------------------------------------------------- audit


def test_a_right_subject_exits_0_and_leaves_the_files(fake):
    done = dpo("audit", "mine", "--out", "here")
    assert done.exit_code == 0, done.output
    assert "1 check, 1 of 1 applicable ran: 1 passed" in done.output
    assert json.loads(Path("here/results.jsonl").read_text().splitlines()[0])["name"] == "mine"


@pytest.mark.parametrize(
    ("report", "arguments", "code"),
    [
        (audited(PASS, FAIL), [], 1),
        (audited(PASS, replace(FAIL, level="should")), [], 1),
        (audited(PASS, replace(FAIL, level="should")), ["--fail-on", "must"], 0),
        (audited(), [], 3),
        (audited(smoke="returned nothing"), [], 3),
        (audited(PASS, replace(PASS, id="X", verdict="unknown")), [], 3),
        (audited(PASS, replace(PASS, id="X", verdict="error")), [], 3),
        (audited(FAIL, replace(PASS, id="X", verdict="error")), [], 1),
        (audited(replace(PASS, verdict="not-applicable")), [], 3),
    ],
)
def test_exit_codes(fake, report, arguments, code):
    fake.report = report
    assert dpo("audit", "mine", *arguments).exit_code == code


def test_every_option_reaches_the_runner(fake):
    done = dpo(
        "audit", "mine", "--tier", "full", "--only", "loss-monotone", "--only", "RUNS-BITS", "--seed", "3", "--jobs",
        "2", "--objective", "sigmoid,beta=0.2,label_smoothing=0.1", "--timeout", "5", "--memory", "2", "--shrink", "9",
        "--out", "here",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    options = fake.asked[0]
    assert (options.tier, options.only, options.seed) == ("full", ("LOSS-MONOTONE", "RUNS-BITS"), 3)
    assert (options.jobs, options.timeout, options.memory, options.shrink) == (2, 5.0, 2.0, 9)
    assert options.objective == Objective("sigmoid", 0.2, 0.1)
    assert options.out == Path("here")


def test_the_objective_may_be_called_dpo():
    assert cli.parse_objective("dpo,beta=0.2") == Objective("sigmoid", 0.2)
    assert cli.parse_objective("simpo, beta=2, gamma=1,length_normalised=true") == Objective(
        "simpo", 2.0, gamma=1.0, length_normalised=True
    )


def test_without_out_the_files_go_to_a_folder_of_the_subjects_name(fake):
    done = dpo("audit", "mine")
    assert "written to out/mine-1" in done.output
    assert Path("out/mine-1/junit.xml").is_file()


def test_a_check_asked_for_alone_is_shown_at_length(fake):
    fake.report = audited(FAIL)
    text = dpo("audit", "mine", "--only", "LOSS-MONOTONE").output
    assert "✘ LOSS-MONOTONE · must · version 1" in text
    assert "log π_θ(y_w)" in text


def test_list_says_what_would_run_and_runs_nothing(fake):
    done = dpo("audit", "mine", "--list")
    assert done.exit_code == 0
    assert not fake.asked
    assert "1 check would run, 1 not" in done.output
    assert "not run: needs train" in done.output


def test_nothing_goes_to_stderr_and_no_bar_is_drawn_where_it_is_no_terminal(fake):
    assert dpo("audit", "mine").stderr == ""


def test_the_bar_is_gone_at_the_end_and_shows_labels_as_they_are():
    import io

    from rich.console import Console

    from dpocheck.report.progress import bar

    buffer = io.StringIO()
    with bar(Console(file=buffer, force_terminal=True, width=100)) as update:
        update(types.SimpleNamespace(done=1, total=2, label="[red]LOSS\x1b[2J[/x]"))
    shown = buffer.getvalue()
    assert "[red]LOSS[/x]" in shown
    assert "\x1b[2J" not in shown
    assert shown.rstrip().endswith(("\x1b[2K", "\x1b[?25h", "\r"))  # the line is erased, the cursor comes back


# --------------------------------------------------------------------------------------------------------- bad input

KNOWN = '[[expect]]\nid = "LOSS-MONOTONE"\nversion = 1\nreason = "known"\n'


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], "unknown subject 'nobody'; installed adapters: trl"),
        (["mine", "--only", "LOSS-MONOTON"], "no check has the id 'LOSS-MONOTON'; did you mean LOSS-MONOTONE"),
        (["mine", "--known", "absent.toml"], "cannot read the known failures absent.toml"),
        (["mine", "--known", "old.toml"], "version 0 is outdated, the check is at 1"),
        (["mine", "--out", "file"], "file is a file; the results need a folder"),
        (["mine", "--out", "/proc/none"], "cannot write"),
        (["mine", "--tier", "slow"], "'slow' is not one of 'quick', 'full'"),
        (["mine", "--timeout", "0"], "0.0 is not in the range x>0"),
        (["mine", "--seed", "x"], "'x' is not a valid integer"),
        (["mine", "--objective", "sigmoids"], "no loss is called 'sigmoids'; did you mean sigmoid or simpo?; known:"),
        (["mine", "--objective", "ipo,bta=1"], "cannot read 'bta=1'; did you mean beta"),
        (["mine", "--objective", "ipo,beta=x"], "beta is 'x'; it must be a number"),
        (["mine", "--objective", "ipo,beta=1,beta=2"], "beta is given twice"),
        (["mine", "--tokenizer", "absent"], "'absent' does not exist"),
        (["mine", "--olny", "X"], "Did you mean"),
        ([], "Missing argument 'SUBJECT'"),
    ],
)
def test_bad_input_is_one_message_on_stderr_exit_2_and_nothing_runs(fake, arguments, said):
    Path("file").write_text("")
    Path("old.toml").write_text(KNOWN.replace("version = 1", "version = 0"))
    done = dpo("audit", *arguments)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert not fake.asked
    assert sorted(os.listdir()) == ["file", "old.toml"]


def test_a_folder_of_other_files_is_refused_before_anything_runs(fake):
    Path("thesis").mkdir()
    Path("thesis/a.tex").write_text("x")
    done = dpo("audit", "mine", "--out", "thesis")
    assert (done.exit_code, fake.asked) == (2, [])
    assert Path("thesis/a.tex").read_text() == "x"


def test_known_failures_turn_the_exit_code_to_0_and_are_shown(fake):
    fake.report = audited(PASS, FAIL)
    Path("known.toml").write_text(KNOWN)
    done = dpo("audit", "mine", "--known", "known.toml")
    assert done.exit_code == 0, done.output
    assert "1 known failure" in done.output
    assert dpo("audit", "mine").exit_code == 1  # never applied unasked


def test_a_known_failure_that_passes_exits_1(fake):
    fake.report = audited(PASS, replace(FAIL, verdict="pass"))
    Path("known.toml").write_text(KNOWN)
    done = dpo("audit", "mine", "--known", "known.toml", "--fail-on", "must")
    assert done.exit_code == 1
    assert "passes, though it is a known failure: known" in done.output


def test_entries_for_checks_left_out_by_only_and_tier_are_not_stale(fake):
    more = KNOWN + '[[expect]]\nid = "RUNS-BITS"\nversion = 1\nreason = "known"\n'
    Path("known.toml").write_text(more)
    assert dpo("audit", "mine", "--only", "LOSS-ZERO-MARGIN", "--known", "known.toml").exit_code == 0
    fake.report = audited(PASS, FAIL)
    assert dpo("audit", "mine", "--known", "known.toml").exit_code == 0  # RUNS-BITS is of the full tier
    done = dpo("audit", "mine", "--tier", "full", "--known", "known.toml")
    assert done.exit_code == 1
    assert "stale: the check did not run" in " ".join(done.output.split())


def test_a_terminal_without_unicode_still_gets_the_report(fake):
    fake.report = audited(PASS, FAIL)
    done = CliRunner(charset="ascii").invoke(cli.cli, ["audit", "mine"])
    assert done.exit_code == 1, done.exception
    assert "x LOSS-MONOTONE" in " ".join(done.output.split())


# ------------------------------------------------------------------------------------------- list, explain and others


def test_list_shows_checks_by_chapter_with_level_tier_and_claim(fake):
    text = dpo("list").output
    assert text.startswith("loss (3)\n")
    assert "LOSS-ZERO-MARGIN  must    quick  At zero margin the loss is log 2." in text
    assert "RUNS-BITS         must    full " in text


def test_explain_tells_claim_source_reason_bug_and_remedy(fake):
    text = dpo("explain", "loss-zero-margin").output
    for part in ("At zero margin", "Eq. 7", "moves every gradient", "a margin added twice", "remove the offset",
                 "loss.per_pair", "L2", "version 1", "--only LOSS-ZERO-MARGIN"):  # fmt: skip
        assert part in text


def test_explain_offers_near_ids(fake):
    done = dpo("explain", "ZERO-MARGIN")
    assert done.exit_code == 2
    assert "did you mean LOSS-ZERO-MARGIN" in done.stderr


@pytest.mark.parametrize(
    ("verdict", "word", "code"),
    [("pass", "fixed", 0), ("fail", "failed", 1), ("error", "error", 3), ("unknown", "error", 3),
     ("not-applicable", "error", 3)],
)  # fmt: skip
def test_replay_answers_fixed_failed_or_error(fake, verdict, word, code):
    fake.report = audited(FAIL)
    dpo("audit", "mine")
    fake.asked.clear()
    fake.result = replace(FAIL, verdict=verdict)
    for name in (stored.handle(FAIL), "LOSS-MONOTONE", f"out/mine-1/{stored.handle(FAIL)}"):
        done = dpo("replay", name)
        assert done.exit_code == code, done.output
        assert done.output.startswith(f"{word}: LOSS-MONOTONE")
    assert fake.asked[0]["subject"] == "mine"


def test_replay_of_nothing_known_is_refused(fake):
    done = dpo("replay", "loss-zero-0000")
    assert done.exit_code == 2
    assert "no stored experiment 'loss-zero-0000'" in done.stderr


def test_a_new_adapter_is_written_once_and_never_overwritten(fake):
    done = dpo("new-adapter", "mytrainer")
    assert done.exit_code == 0
    text = Path("mytrainer.py").read_text()
    assert text.count("REPLACE") == 3
    assert "says = Says()" in text  # it promises nothing in its trainer's name
    assert 'kind=("sigmoid",)' in text  # nor objectives
    assert "probe.reference() or probe.policy()" in text
    assert "dpocheck audit mytrainer.py:Adapter" in done.output
    Path("mytrainer.py").write_text("mine")
    again = dpo("new-adapter", "mytrainer")
    assert again.exit_code == 2
    assert "is not overwritten" in again.stderr
    assert Path("mytrainer.py").read_text() == "mine"


@pytest.mark.parametrize("name", ["my-trainer", "../x", "a b", "", "1x"])
def test_a_name_that_is_no_module_is_refused(fake, name):
    done = dpo("new-adapter", name)
    assert done.exit_code == 2
    assert os.listdir() == []
