"""Which files does an audit leave?  One folder, written beside its place and put there whole.

    results.jsonl              header, one line a result, footer; schema in `results.schema.json`
    junit.xml                  the same for a CI server
    <id>.txt                   the long form of each finding
    experiments/<handle>.json  what failed, as plain data: `dpocheck replay <handle>`
    scripts/<id>.py            the same without dpocheck
    output/<id>.txt            what the subject itself printed, where a check ended in an error
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpocheck import files, stored
from dpocheck.report.failure import long_form
from dpocheck.report.junit import junit
from dpocheck.result import SCHEMA, Report, Result
from dpocheck.text import printable

REPORTED = ("fail", "unexpected-pass", "expected-fail")
KEPT = (*REPORTED, "error", "unknown")

Script = Callable[[Result, Report], "str | None"]


def check_folder(folder: Path) -> None:
    """Whether `folder` can be written or replaced.  Raises CannotWrite; leaves nothing behind."""
    missing = [parent for parent in folder.absolute().parents if not parent.exists()]
    try:
        files.new_folder_beside(folder).rmdir()
    finally:
        for parent in missing:
            if parent.is_dir():
                parent.rmdir()


def default_folder(report: Report) -> Path:
    """`out/<name>-<version>` below the working folder."""
    name = "-".join(str(part) for part in (report.header.name, report.header.subject_version) if part)
    return Path("out") / (re.sub(r"[^\w.+-]+", "_", name).strip("._") or "subject")


def write(
    report: Report, folder: Path, *, options: dict[str, Any] | None = None, script: Script | None = None
) -> Report:
    """Write the audit's files; `folder` is replaced whole, or stays as it was.  Returns the report with their paths.

    `script` makes the stand-alone script of a result, or None.  Raises CannotWrite.
    """
    report, contents = gather(report, options=options, script=script)
    new = files.new_folder_beside(folder)
    try:
        for name, data in contents.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path, data)
        files.replace_folder(new, folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, files.CannotWrite):
            raise
        raise files.CannotWrite(f"cannot write {folder}: {error.strerror or error}") from error
    return report


def gather(
    report: Report, *, options: dict[str, Any] | None = None, script: Script | None = None
) -> tuple[Report, dict[str, bytes]]:
    """The report with the paths of its files, and the files by path."""
    contents: dict[str, bytes] = {}
    results = []
    taken: set[str] = set()
    for result in report.results:
        name = _free(_safe(result.id), taken)
        if result.verdict in KEPT and result.experiments:
            path = f"experiments/{stored.handle(result)}.json"
            contents[path] = _json(stored.store(result, report, options))
            result = replace(result, experiment=path)
        if result.verdict in ("fail", "expected-fail") and script and (text := script(result, report)):
            path = f"scripts/{name.replace('-', '_')}.py"
            contents[path] = text.encode("utf-8", "backslashreplace")
            result = replace(result, script=path)
        if result.verdict in ("fail", "error", "unknown") and result.output:
            path = f"output/{name}.txt"
            contents[path] = printable(result.output).encode("utf-8", "backslashreplace")
            result = replace(result, output=path)
        results.append((name, result))
    report = replace(report, results=tuple(result for _, result in results))
    for name, result in results:
        if result.verdict in REPORTED:
            contents[f"{name}.txt"] = long_form(result, report).encode("utf-8", "backslashreplace")
    contents["junit.xml"] = junit(report)
    contents[files.RESULT] = "".join(line + "\n" for line in lines(report)).encode()
    return report, contents


def _json(data: dict[str, Any]) -> bytes:
    """JSON with one field a line: a number a line would bury the experiment."""
    fields = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in data.items())
    return ("{\n" + ",\n".join(fields) + "\n}\n").encode()


def _safe(id: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", id.lower()).strip("-") or "check"


def _free(name: str, taken: set[str]) -> str:
    """`name`, or with a number behind it where a result of the same id has taken it."""
    place, free = 2, name
    while free in taken:
        free, place = f"{name}-{place}", place + 1
    taken.add(free)
    return free


def lines(report: Report) -> list[str]:
    """results.jsonl, a JSON object a line; NaN and infinities are strings, what is absent is null."""
    header = {"type": "header", "schema": SCHEMA, **asdict(report.header), "smoke": report.smoke}
    footer = {"type": "footer", **report.footer(), "asked": report.asked, "residual": report.equation_residual}
    records = [header, *({"type": "result", **result_record(result)} for result in report.results), footer]
    return [json.dumps(stored.json_value(record), ensure_ascii=True, allow_nan=False) for record in records]


def result_record(result: Result) -> dict[str, Any]:
    """One result as JSON data, without the experiments themselves."""
    record = {name: value for name, value in vars(result).items() if name not in ("experiments", "diagnosis", "key")}
    record["error_over_bound"] = result.error_over_bound
    record["diagnosis"] = [asdict(diagnosis) for diagnosis in result.diagnosis]
    record["convention"] = list(result.convention) if result.convention else None
    record["output"] = result.output if result.output and result.output.startswith("output/") else None
    return record
