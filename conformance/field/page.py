"""What did the field show?  Writes `conformance/RESULTS.md` from the stored results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conformance.field import audits, history
from conformance.field.expected import judged
from conformance.field.subjects import ROOT, Trainer

PAGE = ROOT / "conformance" / "RESULTS.md"
MARKS = {
    "pass": "✔", "fail": "✘", "expected-fail": "✘", "unexpected-pass": "?", "error": "!", "unknown": "?", "info": "i",
    "blocked": "·", "not-applicable": "–",
}  # fmt: skip
LEGEND = "✔ passed · ✘ failed · – not applicable · blank: not asked · ! the adapter's error · ? undecided"


def page(known: Mapping[str, Trainer], pairs: list[history.Pair]) -> str:
    stored = {trainer: audits.stored(trainer) for trainer in known.values()}
    results = {trainer.name: judged(trainer, found) for trainer, found in stored.items() if found}
    told = {name: result for name, result in results.items() if result.get("results")}
    lines = [
        "# The field: trainers that others wrote", "",
        "Written by `ci/field --page` from `results/*.json`, which `ci/field` writes; "
        "`subjects.toml` says what each subject is, `expected/*.toml` why it fails what it fails.", "",
        "## Subjects", "", *_subjects(known, results), "",
        "## Findings", "", *_findings(known, told), "",
        "## By adapter and by command line", "", *_routes(known, told), "",
        "## Time travel", "", history.table(pairs, history.stored()), "",
    ]  # fmt: skip
    for family in dict.fromkeys(known[name].family for name in told):
        members = {name: result for name, result in told.items() if known[name].family == family}
        lines += [f"## {family}: checks", "", LEGEND + ".", "", *_checks(members), "",
                  f"## {family}: conventions", "", *_conventions(members), ""]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _subjects(known: Mapping[str, Trainer], results: Mapping[str, Any]) -> list[str]:
    lines = ["| subject | route | passed | failed | conventions | not applicable | other | audited | environment |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, result in results.items():
        counts: dict[str, int] = {}
        for check in result.get("results", []):
            counts[check["verdict"]] = counts.get(check["verdict"], 0) + 1
        failed = counts.pop("fail", 0) + counts.pop("expected-fail", 0)
        cells = [counts.pop("pass", 0), failed, counts.pop("info", 0), counts.pop("not-applicable", 0)]
        other = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
        size = f"{result['environment']['megabytes']} MB" if "environment" in result else ""
        shown = name + (" (newest)" if known[name].newest else "")
        if "broken" in result or result.get("smoke"):
            other = "**" + _line(result.get("broken") or result["smoke"], 120) + "**"
        told = [shown, result["route"], *map(str, cells), other, result["date"], size]
        lines.append(f"| {' | '.join(told)} |")
    return lines


def _findings(known: Mapping[str, Trainer], told: Mapping[str, Any]) -> list[str]:
    """A bug a line: what is wrong, where, and which checks show it."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for name, result in told.items():
        reasons = _reasons(known[name].expected)
        for check in audits.found(result, "fail", "expected-fail"):
            checks, subjects = found.setdefault(reasons.get(check["id"], "**not looked into yet**"), ({}, {}))
            checks[f"`{check['id']}`"] = subjects[name] = None
    lines = ["| what is wrong | in | shown by |", "|---|---|---|"]
    for why, (checks, subjects) in found.items():
        lines.append(f"| {why} | {', '.join(subjects)} | {', '.join(checks)} |")
    return lines


def _reasons(path: Path) -> dict[str, str]:
    """check -> why its failure is expected, with the link."""
    import tomllib

    if not path.is_file():
        return {}
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("expect", [])
    linked = {entry["id"]: f" ([upstream]({entry['url']}))" if entry.get("url") else "" for entry in entries}
    return {entry["id"]: _line(entry["reason"], 600) + linked[entry["id"]] for entry in entries}


def _routes(known: Mapping[str, Trainer], told: Mapping[str, Any]) -> list[str]:
    """Do the two ways to the same release say the same?"""
    lines = [
        "Checks that both routes decide, and how many of them they decide alike. The others are decided by one alone: "
        "a command line shows less, and its quick tier asks less.", "",
        "| release | decided by both | alike | not alike | by the adapter alone | by the command line alone |",
        "|---" * 6 + "|",
    ]  # fmt: skip
    for name in told:
        same = (known[name].package, known[name].release)
        twin = next((other for other in told if known[other].route == "command line" and known[other].release
                     and (known[other].package, known[other].release) == same), "")  # fmt: skip
        if known[name].route != "adapter" or not twin:
            continue
        one, two = _decided(told[name]), _decided(told[twin])
        both = [id for id in one if id in two]
        apart = [f"`{id}` ({one[id]}, {two[id]})" for id in both if one[id] != two[id]]
        why = f"{', '.join(apart)}: {known[twin].note[:1].lower()}{known[twin].note[1:]}" if apart else ""
        counts = (len(both), len(both) - len(apart), why, len(one) - len(both), len(two) - len(both))
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    return lines


def _decided(result: Mapping[str, Any]) -> dict[str, str]:
    """check -> what was decided: passed, failed, or the convention."""
    verdicts = {"pass": "passed", "fail": "failed", "expected-fail": "failed"}
    found = {c["id"]: verdicts.get(c["verdict"]) or (c["verdict"] == "info" and (c.get("convention") or ("", ""))[1])
             for c in result["results"]}  # fmt: skip
    return {id: str(word) for id, word in found.items() if word}


def _checks(members: Mapping[str, Any]) -> list[str]:
    cells = {name: {c["id"]: c["verdict"] for c in result["results"] if not c["id"].startswith("CONV-")}
             for name, result in members.items()}  # fmt: skip
    every = list(dict.fromkeys(id for found in cells.values() for id in found))
    lines = _head("check", members)
    for id in every:
        lines.append(f"| `{id}` | " + " | ".join(MARKS.get(cells[name].get(id, ""), "") for name in members) + " |")
    return lines


def _conventions(members: Mapping[str, Any]) -> list[str]:
    cells = {name: {c["id"]: (c.get("convention") or [None, "?"])[1]
                    for c in result["results"] if c["id"].startswith("CONV-")}
             for name, result in members.items()}  # fmt: skip
    every = list(dict.fromkeys(id for found in cells.values() for id in found))
    lines = _head("question", members)
    return lines + [f"| `{id}` | " + " | ".join(cells[name].get(id, "") for name in members) + " |" for id in every]


def _head(first: str, members: Mapping[str, Any]) -> list[str]:
    names = " | ".join(_short(name, members) for name in members)
    return [f"| {first} | {names} |", "|---" * (len(members) + 1) + "|"]


def _short(name: str, members: Mapping[str, Any]) -> str:
    """The release, where the columns are releases of one trainer."""
    first = name.partition("-")[0]
    return (all(other.startswith(f"{first}-") for other in members) and name.partition("-")[2]) or name


def _line(text: str, longest: int) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= longest else text[: longest - 3] + "..."
