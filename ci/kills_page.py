"""How does the kill matrix become a page?  Reads stored verdicts, writes ci/kills.json and docs/kills.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

RIGHT = ("pass", "info", "not-applicable")
Cells = dict[str, dict[str, list[str]]]  # subject -> check -> [verdict, print of the subject, print of the check]
ROOT = Path(__file__).resolve().parent.parent
CODE = [f"dpocheck/{part}.py" for part in ("check", "checks/*", "miniature/*", "zoo/*", "oracle/*")]


def code_print() -> str:
    """Of all code that a verdict depends on."""
    files = sorted(path for pattern in CODE for path in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def write(cells: Cells, check_print: Callable, subject_print: Callable, matrix: Path, page: Path) -> None:
    from dpocheck import selftest
    from dpocheck.zoo import SPECIMENS, VARIANTS

    checks = selftest.catalogue()
    prints = {check.id: check_print(check) for check in checks}
    rows = {name: cells.get(name, {}) for name in ("miniature", *VARIANTS, *SPECIMENS)}
    verdicts = {name: {id: cell[0] for id, cell in row.items() if id in prints} for name, row in rows.items()}
    stale = sum(cell[1:] != [subject_print(name), prints[id]] for name, row in rows.items()
                for id, cell in row.items() if id in prints)  # fmt: skip
    seen = verdicts.items()

    def rest(names: Iterable[str], *left_out: str) -> dict[str, dict[str, str]]:
        return {n: {id: v for id, v in verdicts[n].items() if v not in (*RIGHT, *left_out)} for n in names}

    data = {
        "code": code_print(), "stale": stale, "checks": prints,
        "specimens": {name: subject_print(name) for name in SPECIMENS},
        "asked": {name: len(row) for name, row in seen},
        "fails": {name: sorted(id for id, v in row.items() if v == "fail") for name, row in seen if name in SPECIMENS},
        "others": rest(SPECIMENS, "fail"),
        "honest": rest(("miniature", *VARIANTS)),
    }  # fmt: skip
    matrix.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(lines(data, checks)) + "\n", encoding="utf-8")


def lines(data: dict, checks: list) -> list[str]:
    killed = {check.id: [name for name, ids in data["fails"].items() if check.id in ids] for check in checks}
    return [
        "# Which check catches which bug?",
        "",
        "Made by `ci/kills`: every specimen of the zoo against every quick check, blocking ignored, and the honest",
        "variants against all of them.  A specimen is the miniature trainer with exactly one part broken.",
        "",
        f"Code {data['code']}; {data['stale']} cells are older than the code they were made from.",
        f"{len(data['fails'])} specimens, {len(checks)} checks, {len(data['honest'])} honest subjects, "
        f"{sum(len(found) for found in data['honest'].values())} false alarms.",
        "",
        *_survivors(data),
        *_checks(checks, killed, data),
        *_specimens(data),
    ]


def _survivors(data: dict) -> list[str]:
    from dpocheck.selftest import LEFT_OUT
    from dpocheck.zoo import SPECIMENS

    text = ["## Specimens that no check fails", ""]
    found = [name for name, ids in data["fails"].items() if not ids]
    if not found:
        return [*text, "None.", ""]
    reasons = {name: LEFT_OUT.get(SPECIMENS[name].caught_by, "not explained") for name in found}
    return [*text, *(f"- `{name}`: {reason}." for name, reason in reasons.items()), ""]


def _checks(checks: list, killed: dict[str, list[str]], data: dict) -> list[str]:
    text = [
        "## Checks", "", "`alone`: specimens that no other check fails.  OPTION-ACTS makes half of all runs, and is",
        "asked of the specimens that are declared for it alone.", "",
        "| check | level | fails | alone |", "|---|---|---|---|",
    ]  # fmt: skip
    alone = {check.id: [name for name in killed[check.id] if data["fails"][name] == [check.id]] for check in checks}
    for check in checks:
        text.append(f"| {check.id} | {check.level} | {len(killed[check.id])} | {', '.join(alone[check.id]) or '–'} |")
    redundant = [check.id for check in checks if killed[check.id] and not alone[check.id]]
    text += ["", "## Checks that fail no specimen alone", "",
             "They catch nothing that another check does not catch.  They stay because they need other observables,",
             "name the place more closely, or hold without the oracle.", ""]  # fmt: skip
    for id in redundant:
        mine = set(killed[id])
        within = [other for other in killed if other != id and mine <= set(killed[other]) and other in redundant]
        text.append(f"- {id}" + (f": contained in {', '.join(within[:3])}" if within else ""))
    return [*text, ""]


def _specimens(data: dict) -> list[str]:
    from dpocheck.zoo import SPECIMENS

    text = ["## Specimens", "", "| specimen | declared | fails |", "|---|---|---|"]
    for name, ids in data["fails"].items():
        own = SPECIMENS[name].caught_by
        others = [id for id in ids if id != own]
        shown = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
        text.append(f"| {name} | {own}{'' if own in ids else ' (not failed)'} | {shown or '–'} |")
    return text
