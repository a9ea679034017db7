"""One trainer, two routes: what TRL's command line shows, its adapter shows too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dpocheck.result import Report
from dpocheck.runner import Options, run

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed"),
]
COMMAND = Path(__file__).parents[2] / "conformance" / "commands" / "trl.toml"


def verdicts(report: Report) -> dict[str, str]:
    return {result.id: result.verdict for result in report.results}


def test_the_command_line_and_the_adapter_of_trl_agree_on_every_check_both_can_show():
    by_files = run(Options(subject=str(COMMAND)))
    assert by_files.smoke is None
    shown = [id for id, verdict in verdicts(by_files).items() if verdict in ("pass", "fail") and "CONV" not in id]
    assert len(shown) >= 15
    by_adapter = verdicts(run(Options(subject="trl", only=tuple(shown))))
    assert {id: by_adapter[id] for id in shown} == {id: verdicts(by_files)[id] for id in shown}
