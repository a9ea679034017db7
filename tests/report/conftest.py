"""One audit's outcome with every verdict in it, built by hand: what the reports are tested on."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from dpocheck.experiment import LossExperiment, Recipe, Row, Table, Tokenizer, TrainExperiment
from dpocheck.result import Diagnosis, Header, Report, Result

LOSS = LossExperiment((-3.5,), (-6.0,), (-4.0,), (-5.0,))
TOKENIZER = Tokenizer(words=("a", "b", "c"), size=16)
TRAIN = TrainExperiment(
    policy=Table(16, 0.0, ((0, 1, 0.5),)), reference=None, tokenizer=TOKENIZER, rows=(Row("a", " b", " c"),),
    recipe=Recipe(batch=1, clip_norm=1.0),
)  # fmt: skip


def make(id: str, verdict: str, **fields: Any) -> Result:
    given = {
        "version": 1, "level": "must", "tier": "quick", "chapter": "loss", "stage": "loss", "claim": f"{id} holds.",
        "source": "Rafailov et al. 2023, Eq. 7",
    }  # fmt: skip
    return Result(id=id, verdict=verdict, **(given | fields))


HEADER = Header(
    suite="0.1.0", subject="trl", name="trl", subject_version="1.16.0", route="train", forced={"bf16": "False"},
    isolation="process", precision=2.0**-24, seed=0, tier="quick", platform="Linux", versions={"torch": "2.13.0"},
    adapter_lines=24, blind=("derivatives with respect to the reference",),
)  # fmt: skip

RESULTS = (
    make("ROWS-ROUND-TRIP", "pass", chapter="rows", stage="tokens"),
    make(
        "REF-IS-POLICY-GIVEN", "fail", chapter="reference", stage="reference", observed=1.318, expected=0.693147,
        error=0.624853, bound=1e-6, where="first loss", experiments=(TRAIN,), seconds=0.25,
        diagnosis=(Diagnosis("the reference is re-read from disk", 0.0), Diagnosis("no reference", 0.4)),
    ),
    make("LOSS-ZERO-MARGIN", "pass"),
    make("LOSS-SHOULD", "fail", level="should", observed=float("nan"), expected=0.5, error=float("inf"), bound=1e-9,
         where="per pair, pair 1", experiments=(LOSS,)),
    make("LOSS-BLOCKED", "blocked", blocked_by="REF-IS-POLICY-GIVEN"),
    make("LOSS-CONVENTION", "info", level="info", convention=("ipo_length", "mean")),
    make("LOSS-ODD", "error", reason="the adapter raised TypeError", output="Traceback\n  boom\n"),
    make("LOSS-WEAK", "unknown", level="should", reason="this input cannot tell them apart"),
    make("RUNS-RANKS", "not-applicable", chapter="runs", stage="run", reason="one process"),
)  # fmt: skip


@pytest.fixture
def report() -> Report:
    return Report(
        header=HEADER, results=RESULTS, equation="−log σ(0.100·[1.000 lp_w − 1.000 rf_w])", asked="dpo, beta 0.1",
        equation_residual=3e-8, seconds=18.2,
    )  # fmt: skip


@pytest.fixture
def hostile(report: Report) -> Report:
    """Everything that a subject chooses is an attack on the reader's terminal, on markup, on XML or on JSON."""
    bad = "\x1b[2J\x1b]0;owned\x07[red]x[/y] <b>&\x00\ud800\uffff \u202e]]>"
    results = tuple(
        replace(r, reason=bad, observed=bad, expected=bad, where=bad, output=bad + "\n" + bad, params={bad: bad},
                diagnosis=(Diagnosis(bad, 0.1),))
        for r in report.results
    )  # fmt: skip
    header = replace(report.header, name=bad, subject_version=bad, forced={bad: bad}, blind=(bad,), stubs=(bad,))
    return replace(report, header=header, results=results, equation=bad, asked=bad, smoke=bad)


@pytest.fixture
def alone(tmp_path):
    """Runs a script in a process in which `import dpocheck` fails."""
    block = tmp_path / "block"
    block.mkdir()
    (block / "sitecustomize.py").write_text(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'dpocheck':\n"
        "            raise ModuleNotFoundError('dpocheck is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
    )

    def run(text: str, code: int = 1) -> str:
        path = tmp_path / "script.py"
        path.write_text(text)
        environment = os.environ | {"PYTHONPATH": str(block), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(path)], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run
