"""Does the command behave as a process should: quick, honest in its exit code, quiet when its reader leaves?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dpocheck


def in_a_process(*arguments: str, code: str = "from dpocheck.cli import main; main()", **variables: str):
    environment = os.environ | {"PYTHONPATH": str(Path(dpocheck.__file__).parents[1])} | variables
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


HEAVY = ("torch", "scipy", "hypothesis", "rich", "jinja2", "numpy", "transformers", "jsonschema")
LOADED = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"


def test_help_loads_nothing_heavy():
    code = "\n".join(("from dpocheck.cli import cli", "try: cli()", f"except SystemExit: pass\n{LOADED}"))
    for arguments in (["--help"], ["audit", "--help"], ["--version"]):
        done = in_a_process(*arguments, code=code)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"


def test_the_look_at_loaded_modules_can_fail():
    assert in_a_process(code=f"import numpy; {LOADED}").stdout.strip() == "['numpy']"


def test_a_bug_of_ours_is_never_taken_for_a_finding():
    code = (
        "import dpocheck.cli as c, click\n"
        "c.catalogue = lambda: 1 / 0\n"
        "c.main()"
    )  # fmt: skip
    done = in_a_process("list", code=code)
    assert done.returncode == 3
    assert "this is a bug of dpocheck" in done.stderr


def test_an_interruption_is_never_taken_for_a_finding():
    code = (
        "import dpocheck.cli as c\n"
        "def stop(): raise KeyboardInterrupt\n"
        "c.catalogue = stop\n"
        "c.main()"
    )  # fmt: skip
    done = in_a_process("list", code=code)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip().endswith("dpocheck: stopped; nothing was written")


def test_a_reader_who_leaves_is_no_error():
    command = f"{sys.executable} -m dpocheck.cli list | head -1"
    path = str(Path(dpocheck.__file__).parents[1])
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
