"""Does the tree keep its own rules?  Sizes, docstrings, style, what every check says of itself, and no local paths."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpocheck import checks
from dpocheck.check import CHECKS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dpocheck", "reference_impl", "conformance", "tests", "examples", "ci")
PYTHON = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TEXT = sorted(
    path
    for folder in (*FOLDERS, ".ci", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".sh", ".toml", ".txt", ".md", ".j2", ".json", ".yml", ".yaml", "")
    and path.is_file()
    and "__pycache__" not in path.parts
) + sorted(ROOT.glob("*.md")) + [ROOT / "pyproject.toml"]  # fmt: skip
LINES, FUNCTION = 400, 60


def at(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


@pytest.mark.parametrize("path", PYTHON, ids=at)
def test_a_file_answers_one_question_in_at_most_400_lines(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "its first sentence says which question it answers"
    long = {node.name: length(node) for node in functions(tree) if length(node) > FUNCTION}
    assert not long, f"longer than {FUNCTION} lines: {long}"


@pytest.mark.skipif(shutil.which("ruff") is None and shutil.which("ruff", path=Path(sys.executable).parent) is None,
                    reason="ruff is not installed")  # fmt: skip
def test_the_linter_is_content():
    ruff = shutil.which("ruff", path=Path(sys.executable).parent) or "ruff"
    done = subprocess.run([ruff, "check", *FOLDERS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("id", CHECKS)
def test_a_check_says_what_it_claims_why_and_what_to_do(id):
    check = CHECKS[id]
    for name in ("claim", "source", "why", "bug", "fix"):
        said = getattr(check, name)
        assert len(said) >= 10, f"{name}: {said!r}"
        assert said.strip() == said
        assert "TODO" not in said
    assert check.claim.endswith("."), check.claim
    assert check.chapter in checks.CHAPTERS


def test_ids_are_words_of_capitals():
    for id in CHECKS:
        assert re.fullmatch(r"[A-Z0-9]+(-[A-Z0-9]+)+", id), id


def test_nothing_names_the_machine_it_was_made_on():
    """Paths of a person's own folders, and indexes of packages, belong to no file of ours."""
    local = re.compile(r"(?<![\w.~-])/(?:root|work)/|pypi[\w.-]*/simple")
    assert local.search(" /root" + "/dev")  # it can fail
    assert len(TEXT) > 200
    for path in TEXT:
        found = local.search(path.read_text(encoding="utf-8", errors="replace"))
        assert path == Path(__file__) or not found, f"{at(path)}: {found}"


def test_nothing_is_a_pickle():
    """No pickle is written or read: weights are safetensors, and records are JSON."""
    modules = r"import (?:c?pickle|dill|cloudpickle|joblib)"
    banned = re.compile(modules + r"|torch\.save\(|weights_only=False|allow_pickle=True")
    for path in PYTHON:
        if path == Path(__file__) or "tests" in path.parts:
            continue  # a test may plant what is to be refused
        assert not banned.search(path.read_text(encoding="utf-8")), at(path)
        for call in re.findall(r"torch\.load\([^\n]*", path.read_text(encoding="utf-8")):
            assert "weights_only=True" in call, f"{at(path)}: {call}"
