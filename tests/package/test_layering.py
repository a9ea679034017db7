"""Do imports point one way?  The worker's side is light, the judge without torch, the trainer without its auditor."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("dpocheck", "reference_impl", "conformance")
STDLIB = sys.stdlib_module_names
FRAMEWORKS = {"torch", "transformers"}

# Beside the audited trainer, in its environment.
WORKER = ("worker.main", "worker.requests", "worker.answer", "worker.loading", "worker.spies",
          "worker.training_probe", "worker.watched", "adapter", "experiment", "wire")  # fmt: skip
LIGHT = {"numpy", "safetensors"}
# Modules of that side that may load a framework, inside functions only.
LIVE = {
    "dpocheck.probes.live", "dpocheck.probes.fed", "dpocheck.huggingface", "dpocheck.worker.spies",
    "dpocheck.worker.answer", "dpocheck.worker.training_probe", "dpocheck.worker.watched",
    "dpocheck.worker.surroundings", "dpocheck.worker.recorded",
}  # fmt: skip
FUNCTIONS = "dpocheck.functions"  # bare functions as subjects: tensors are made inside their functions
ZOO = ("dpocheck.zoo", "dpocheck.miniature")  # subjects themselves, loaded by name only

JUDGE = ("cli", "asked", "runner", "piecewise", "replay", "selftest", "pytest_plugin", "report", "checks", "oracle",
         "strategies", "diagnose", "identify", "subject", "tolerances")  # fmt: skip


def sources(package: str) -> dict[str, Path]:
    """Module name -> file."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {name: path for package in OURS for name, path in sources(package).items()}


def imports(node: ast.AST, *, inside: bool) -> Iterator[str]:
    """The modules a file imports; `inside`: in functions too.  What is for type checkers alone is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from {f"{child.module}.{alias.name}" for alias in child.names}
        elif inside or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, inside=inside)


def imported(name: str, *, inside: bool) -> set[str]:
    """The modules of ours and the packages of others that a module imports."""
    found = set()
    for target in imports(ast.parse(MODULES[name].read_text(encoding="utf-8")), inside=inside):
        ours = target.split(".")[0] in OURS
        found.add((target if target in MODULES else target.rpartition(".")[0]) if ours else target.split(".")[0])
    return found


def reached(roots: tuple[str, ...], *, inside: bool, but: tuple[str, ...] = ()) -> dict[str, set[str]]:
    """Module of ours -> packages of others, over all that the roots import, packages' own files included."""
    todo = [f"dpocheck.{root}" for root in roots]
    found: dict[str, set[str]] = {}
    while todo:
        name = todo.pop()
        if name in found or name not in MODULES or (but and name.startswith(but)):
            continue
        names = imported(name, inside=inside)
        todo += [each for each in names if each in MODULES]
        todo += {name.rpartition(".")[0]} - {"dpocheck"}  # which loads nothing: a test below
        found[name] = {each for each in names if each not in MODULES and each not in STDLIB}
    return found


def test_the_workers_side_imports_numpy_and_safetensors_and_frameworks_inside_functions_alone():
    graph = reached(WORKER, inside=False)
    assert {"dpocheck.worker.main", "dpocheck.worker.answer", "dpocheck.probes.tables"} <= set(graph)
    for name, others in graph.items():
        assert others <= LIGHT, f"{name} imports {others - LIGHT} where it is loaded"


def test_only_the_live_side_of_the_worker_knows_a_framework():
    for name, others in reached(WORKER, inside=True, but=ZOO).items():
        allowed = name in LIVE or name.startswith(FUNCTIONS)
        extra = others - LIGHT - (FRAMEWORKS | {"peft", "datasets"} if allowed else set())
        assert not extra, f"{name} imports {extra}"


def test_the_worker_knows_nothing_of_the_judge():
    judge = ("oracle", "checks", "report", "runner", "subject", "strategies", "diagnose", "identify", "cli")
    for name in reached(WORKER, inside=False):
        assert not name.startswith(tuple(f"dpocheck.{part}" for part in judge)), name


def test_the_judge_reaches_no_framework():
    graph = reached(JUDGE, inside=False)
    assert len(graph) > 50
    for name, others in graph.items():
        assert not others & FRAMEWORKS, f"{name} imports {others & FRAMEWORKS}"


def test_the_oracle_imports_numpy_and_scipy_alone():
    for name in MODULES:
        if name.startswith("dpocheck.oracle"):
            others = {each for each in imported(name, inside=True) if each not in MODULES and each not in STDLIB}
            assert others <= {"numpy", "scipy"}, f"{name} imports {others}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("dpocheck")])
def test_the_toolkit_knows_no_trainer_by_name(name):
    assert not {each.split(".")[0] for each in imported(name, inside=True)} & {"reference_impl", "conformance", "trl"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("reference_impl")])
def test_the_reference_trainer_does_not_know_that_it_is_checked(name):
    of_ours = {each for each in imported(name, inside=True) if each.split(".")[0] in ("dpocheck", "conformance")}
    assert not of_ours or name == "reference_impl.adapter", of_ours


# ----------------------------------------------------------------------------------------- what is really loaded

LOSS = '''
import torch.nn.functional as F

def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.1):
    h = policy_chosen_logps - reference_chosen_logps - (policy_rejected_logps - reference_rejected_logps)
    return -F.logsigmoid(beta * h)
'''
HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "numpy", "scipy", "hypothesis", "click", "rich", "jinja2")


def loaded(code: str, folder: Path) -> list[str]:
    """Which of the heavy packages are loaded after the code, in a process of its own."""
    show = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing(tmp_path):
    assert loaded("import dpocheck; from dpocheck import audit; dpocheck.__version__", tmp_path) == []


def test_the_look_at_what_is_loaded_can_fail(tmp_path):
    assert loaded("import numpy", tmp_path) == ["numpy"]


def test_an_audit_of_a_named_subject_leaves_the_judge_without_torch(tmp_path):
    (tmp_path / "loss.py").write_text(LOSS)
    code = "\n".join((
        "import sys; sys.stdout, real = sys.stderr, sys.stdout",
        "from dpocheck import audit",
        "report = audit('loss.py:dpo_loss')",
        "sys.stdout = real",
        "assert report.exit_code() == 0, report",
        "assert report.count('pass') >= 10",
    ))  # fmt: skip
    assert not {"torch", "transformers", "trl", "datasets", "peft"} & set(loaded(code, tmp_path))
