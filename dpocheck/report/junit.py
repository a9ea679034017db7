"""How does a CI server read an audit?  As JUnit XML: one test case a check.

Blocked and not-applicable checks are skipped, `error` and `unknown` are errors, failures carry the long form.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from dpocheck.report.failure import long_form
from dpocheck.report.words import cause, line
from dpocheck.result import Report, Result
from dpocheck.text import printable

KINDS = {
    "fail": "failure", "unexpected-pass": "failure", "error": "error", "unknown": "error", "not-applicable": "skipped",
    "blocked": "skipped", "expected-fail": "skipped",
}  # fmt: skip


def clean(text: str) -> str:
    """Text that XML 1.0 can hold: no control characters, lone surrogates or non-characters."""
    return "".join(
        letter
        for letter in printable(text)
        if letter in "\t\n" or 0x20 <= ord(letter) < 0xD800 or 0xE000 <= ord(letter) < 0xFFFE or ord(letter) > 0xFFFF
    )


def junit(report: Report) -> bytes:
    """The report as a JUnit file, UTF-8."""
    kinds = [KINDS.get(result.verdict) for result in report.results]
    header = report.header
    name = clean(line(f"dpocheck {header.name} {header.subject_version or ''}"))
    counts = {
        "tests": str(len(kinds) + bool(report.smoke)), "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error") + bool(report.smoke)), "skipped": str(kinds.count("skipped")),
        "time": f"{report.seconds:.3f}",
    }  # fmt: skip
    root = ElementTree.Element("testsuites", {"name": name, **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": name, **counts})
    properties = ElementTree.SubElement(suite, "properties")
    for key in ("suite", "subject", "route", "isolation", "tier", "seed", "platform"):
        ElementTree.SubElement(properties, "property", {"name": key, "value": clean(line(getattr(header, key)))})
    if report.smoke:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "dpocheck.smoke", "name": "smoke", "time": "0"})
        error = ElementTree.SubElement(case, "error", {"message": clean(line(report.smoke)), "type": "smoke"})
        error.text = clean(report.smoke)
    for result in report.results:
        _case(suite, result, report)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _case(suite: ElementTree.Element, result: Result, report: Report) -> None:
    name = result.id + (f"[{line(result.params)}]" if result.params else "")
    attributes = {
        "classname": clean(f"dpocheck.{result.chapter}"), "name": clean(name), "time": f"{result.seconds:.3f}"
    }  # fmt: skip
    case = ElementTree.SubElement(suite, "testcase", attributes)
    kind = KINDS.get(result.verdict)
    if kind is None:
        return
    message = f"blocked by {result.blocked_by}" if result.blocked_by else cause(result)
    said = ElementTree.SubElement(case, kind, {"message": clean(line(message)), "type": result.verdict})
    if kind in ("failure", "error"):
        said.text = clean(long_form(result, report))
