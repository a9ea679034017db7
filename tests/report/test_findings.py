"""Do the findings written for maintainers say all they need, and do their scripts print what they say?"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "conformance"
FINDINGS = sorted((ROOT / "findings").glob("*.md"))
TRL = [path for path in FINDINGS if "TRL 1.16.0" in path.read_text(encoding="utf-8")]  # the trainer that is at hand
LINES = {path: 60 if path in TRL else 100 for path in FINDINGS}  # of a script; a trainer of files alone needs them made
SECTIONS = ["Promised", "Script", "Observed", "Expected", "Suspected line", "Suggested fix"]


def parts(path: Path) -> tuple[str, str]:
    """The script and what it is said to print."""
    text = path.read_text(encoding="utf-8")
    script = re.search(r"```python\n(.*?)```", text, re.S)
    printed = re.search(r"## Observed\n\n```\n(.*?)```", text, re.S)
    assert script
    assert printed
    return script[1], printed[1]


def test_every_known_failure_of_trl_has_a_page():
    known = tomllib.loads((ROOT / "expected" / "trl-1.16.0.toml").read_text(encoding="utf-8"))["expect"]
    assert {entry["id"].lower() for entry in known} == {path.stem for path in TRL}


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_a_finding_is_complete_and_short(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", text, re.M) == SECTIONS
    assert re.search(r"^Found by check [A-Z-]+\. .* \d+\.\d+", text, re.M)
    script, _ = parts(path)
    assert len(script.splitlines()) <= LINES[path]
    assert "dpocheck" not in script


@pytest.mark.long
@pytest.mark.parametrize("path", TRL, ids=lambda path: path.stem)
def test_a_findings_script_shows_what_the_page_says(path, alone):
    trl = pytest.importorskip("trl", reason="the findings are TRL's")
    if trl.__version__ != "1.16.0":
        pytest.skip(f"the findings are those of TRL 1.16.0, this is {trl.__version__}")
    script, printed = parts(path)
    rows = [row for row in alone(script).splitlines() if not row.startswith("{")]  # the trainer's own log

    def close(one: str, other: str) -> bool:
        """The same words, and numbers that rounding alone may change."""
        number = r"-?\d+\.\d+"
        values = [[float(value) for value in re.findall(number, text)] for text in (one, other)]
        words = [re.sub(number, "#", text) for text in (one, other)]
        return words[0] == words[1] and values[0] == pytest.approx(values[1], rel=1e-3)

    assert len(rows) == len(printed.splitlines())
    assert all(close(one, other) for one, other in zip(rows, printed.splitlines(), strict=True)), rows
