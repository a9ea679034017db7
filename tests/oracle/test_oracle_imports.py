"""Is the oracle independent?  It may know the papers, the experiments and the observations: nothing else of ours."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import dpocheck.oracle

ALLOWED = ("numpy", "scipy", "dpocheck.experiment", "dpocheck.observation", "dpocheck.oracle")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module)
    return found


def test_it_imports_numpy_scipy_and_the_records_alone():
    files = list(Path(dpocheck.oracle.__file__).parent.glob("*.py"))
    assert len(files) > 10
    for path in files:
        for name in imported(path):
            known = name.split(".")[0] in sys.stdlib_module_names or name.startswith(ALLOWED)
            assert known, f"{path.name} imports {name}"


def test_predicting_loads_no_framework():
    code = (
        "import sys; from dpocheck.oracle import predict; from dpocheck.experiment import *;"
        "predict(LossExperiment((-1.0,), (-2.0,), (-1.0,), (-1.0,)));"
        "print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
