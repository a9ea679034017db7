"""What does an audit of one release say?  Runs `dpocheck audit` in its own process and keeps what is worth keeping.

A result is JSON, a check a line; it is what the page, the table of history and the expected failures are read from.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conformance.field import environments, locks
from conformance.field.subjects import ROOT, Trainer

RESULTS = ROOT / "conformance" / "results"
KEPT = ("id", "version", "level", "chapter", "stage", "params", "verdict", "reason", "observed", "expected", "where",
        "error", "bound", "blocked_by", "convention", "diagnosis")  # fmt: skip
LONG = 300  # characters of a text that is kept
SECONDS = "600"  # for one answer: several audits may share a machine


def path_of(trainer: Trainer) -> Path:
    return RESULTS / f"{trainer.name}.json"


def stored(trainer: Trainer) -> dict[str, Any] | None:
    """The result of an earlier audit."""
    try:
        return json.loads(path_of(trainer).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def print_of(trainer: Trainer) -> str:
    """Of all that a result depends on: the toolkit, how the trainer is driven, and what is installed."""
    total = hashlib.sha256()
    drivers = sorted(trainer.driver.parent.glob(f"{trainer.driver.stem}*"))  # an adapter's helpers are named after it
    for path in [*sorted((ROOT / "dpocheck").rglob("*.py")), *drivers]:
        total.update(path.read_bytes() if path.is_file() else b"")
    told = [trainer.requirements, trainer.bare, trainer.torch, trainer.options, dict(trainer.environment)]
    total.update(json.dumps(told).encode())
    return total.hexdigest()[:16]


def up_to_date(trainer: Trainer) -> bool:
    """Is the stored result one of this toolkit, and of an environment as the lock has it?"""
    found = stored(trainer) or {}
    lock = locks.valid(trainer)
    same = lock is None or found.get("environment", {}).get("lock") == locks.digest(lock)
    return found.get("print") == print_of(trainer) and same


def audit(trainer: Trainer, more: Sequence[str] = (), only: Sequence[str] = ()) -> dict[str, Any]:
    """Make the environment, audit, and return the result.  A broken environment is a result too."""
    printed, started = print_of(trainer), time.monotonic()
    head: dict[str, Any] = {
        "subject": trainer.name, "family": trainer.family, "route": trainer.route, "package": trainer.package,
        "release": trainer.release, "date": datetime.date.today().isoformat(), "print": printed,
    }  # fmt: skip
    if trainer.checkout and not os.environ.get(trainer.checkout):
        return head | {"broken": f"{trainer.checkout} names no checkout"}
    try:
        environment = environments.made(trainer)
    except environments.BrokenEnvironment as fault:
        return head | {"broken": f"{fault} (all of it: {fault.log})"}
    out = environments.cache() / "out" / trainer.name
    command = [
        sys.executable, "-m", "dpocheck.cli", "audit", trainer.subject, "--python", str(environment.python),
        "--out", str(out), "--timeout", SECONDS, "--unblocked", *more, *trainer.options,
        *(part for id in only for part in ("--only", id)),
    ]  # fmt: skip
    told = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "140"} | dict(trainer.environment)
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True)
    log = out.with_suffix(out.suffix + ".txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    head |= {"exit": done.returncode, "seconds": round(time.monotonic() - started, 1),
             "environment": {"megabytes": environment.megabytes, "packages": environment.packages}}  # fmt: skip
    written = out / "results.jsonl"
    if done.returncode not in (0, 1, 3) or not written.is_file():
        said = (done.stderr or done.stdout).strip()
        return head | {"broken": f"the audit ended with {done.returncode}: {said[-LONG:]}"}
    return head | read(written)


def read(path: Path) -> dict[str, Any]:
    """What is kept of a results.jsonl."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    header = next(line for line in lines if line["type"] == "header")
    footer = next(line for line in lines if line["type"] == "footer")
    results = [
        {name: _short(line[name]) for name in KEPT if line.get(name) not in (None, "", [], {})}
        for line in lines
        if line["type"] == "result"
    ]
    return {
        "suite": header["suite"], "precision": header["precision"], "forced": header["forced"],
        "stubs": header.get("stubs") or [], "capabilities": header["route"], "smoke": header["smoke"] or "",
        "equation": footer.get("equation") or "", "asked": footer.get("asked") or "", "results": results,
    }  # fmt: skip


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= LONG else value[: LONG - 3] + "..."
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_short(item) for item in value[:3]]
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    return value


def keep(trainer: Trainer, result: dict[str, Any]) -> Path:
    """Write a result, one field or one check a line; what was installed goes into the subject's lock."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    if "environment" in result:
        told = result["environment"]
        lock = locks.keep(trainer, told.get("packages", {}))
        result = result | {"environment": {"megabytes": told["megabytes"], "lock": locks.digest(lock)}}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items() if name != "results"]
    checks = ",\n".join("  " + json.dumps(check) for check in result.get("results", []))
    lines.append(f'"results": [\n{checks}\n]')
    path = path_of(trainer)
    new = path.with_suffix(".new")
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    new.replace(path)
    return path


def found(result: dict[str, Any], *verdicts: str) -> list[dict[str, Any]]:
    """The checks of a result with one of these verdicts."""
    return [check for check in result.get("results", []) if check["verdict"] in verdicts]
