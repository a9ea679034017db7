"""Does the built package hold all it needs, and audit in a directory that is not the checkout?"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="the build backend is not installed")
ROOT = Path(__file__).resolve().parents[2]
RIGHT = '''
import torch.nn.functional as F

def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.1):
    h = policy_chosen_logps - reference_chosen_logps - (policy_rejected_logps - reference_rejected_logps)
    return -F.logsigmoid(beta * h)
'''


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("dpocheck-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel, installed into a folder of its own that comes before the environment's packages."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=500)


# What `ci/field`, a script of the checkout, reads and keeps: results alone are larger than the program.
OF_THE_CHECKOUT = {"field", "history", "locks", "results", "RESULTS.md", "subjects.toml"}


def test_everything_that_is_not_python_is_in_it_too(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("dpocheck", "reference_impl", "conformance"):
        for path in (ROOT / package).rglob("*"):
            told = path.relative_to(ROOT)
            stays = told.parts[0] == "conformance" and told.parts[1] in OF_THE_CHECKOUT
            if path.is_file() and "__pycache__" not in path.parts:
                assert (str(told) in names) != stays, told
    assert not [name for name in names if name.startswith(("tests/", "ci/", "out/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_version_is_that_of_the_package(wheel):
    import dpocheck

    assert wheel.name.startswith(f"dpocheck-{dpocheck.__version__}-")


@pytest.mark.long
def test_it_audits_a_function_where_there_is_no_checkout(installed, tmp_path):
    (tmp_path / "train.py").write_text(RIGHT)
    where = run(installed, tmp_path, "-c", "import dpocheck; print(dpocheck.__file__)")
    assert where.stdout.strip() == str(installed / "dpocheck" / "__init__.py")
    done = run(installed, tmp_path, "-m", "dpocheck.cli", "audit", "train.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "dpo_loss" / "results.jsonl").is_file()


@pytest.mark.long
def test_it_trains_a_probe_where_there_is_no_checkout(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "dpocheck.cli", "audit", "zoo:miniature", "--only", "GRAD-IDENTITY")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.long
def test_its_adapters_are_found_by_name(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "dpocheck.cli", "audit", "nobody")
    assert done.returncode == 2
    assert "installed adapters: reference, trl" in done.stderr
