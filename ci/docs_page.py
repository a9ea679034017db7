"""How do the declarations of the checks become docs/catalogue.md?"""

from __future__ import annotations

import tomllib
from pathlib import Path

from dpocheck import checks as _declared  # noqa: F401  (declares every check)
from dpocheck import zoo
from dpocheck.check import CHAPTERS, CHECKS, Check
from dpocheck.explain import mathematics
from dpocheck.report.words import CHAPTERS as TITLES
from dpocheck.report.words import line, plural

ROOT = Path(__file__).resolve().parent.parent
PROPERTIES = ROOT / "docs" / "properties.toml"


def properties() -> tuple[dict[str, list[str]], dict[str, str]]:
    """Ids of the properties by chapter, and why some have no check."""
    data = tomllib.loads(PROPERTIES.read_text(encoding="utf-8"))
    excused = data.pop("excused")
    return data, excused


def covered() -> dict[str, list[str]]:
    """Property -> the checks that name it."""
    found: dict[str, list[str]] = {}
    for check in CHECKS.values():
        for id in check.covers:
            found.setdefault(id, []).append(check.id)
    return found


def open_properties() -> list[str]:
    """Those that are neither covered nor excused."""
    chapters, excused = properties()
    known = covered()
    return [id for ids in chapters.values() for id in ids if id not in known and id not in excused]


# Of each objective: paper, equation, and where the number of the equation was verified.
OWN = "by the comment beside the formula in many public copies of the loss; the paper's own text was not read"
EQUATIONS = (
    ("DPO", "Rafailov et al. 2023 (arXiv:2305.18290)", "Eq. 7", OWN),
    ("cDPO", "Mitchell 2023 (ericmitchell.ai/cdpo.pdf)", "Eq. 3", OWN),
    ("IPO", "Azar et al. 2023 (arXiv:2310.12036)", "Eq. 17", OWN + "; they name version 2"),
    ("rDPO (robust)", "Chowdhury et al. 2024 (arXiv:2403.00409)", "no number given", "not verified"),
    ("hinge", "Liu et al. 2023 (arXiv:2309.06657)", "no number given", "not verified"),
    ("SimPO", "Meng et al. 2024 (arXiv:2405.14734)", "Eq. 6", "not verified"),
    ("SFT term", "Pang et al. 2024 (arXiv:2404.19733)", "Eq. 1", "not verified"),
    ("SFT term", "Xu et al. 2024 (arXiv:2401.08417)", "Eq. 5", "not verified"),
    ("f-divergences", "Wang et al. 2023 (arXiv:2309.16240)", "no number given",
     "not verified; a test differentiates each f"),
)


def _equations() -> list[str]:
    rows = ["## numbers of equations", "", "| objective | paper | equation | where the number was verified |"]
    return [*rows, "| --- | --- | --- | --- |", *(f"| {' | '.join(one)} |" for one in EQUATIONS), ""]


def page() -> str:
    checks = list(CHECKS.values())
    rows = [
        "# The catalogue of checks", "",
        "Made by `ci/docs` from the declarations in `dpocheck/checks`; changes belong there.", "",
        f"{plural(len(checks), 'check')}. `dpocheck explain ID` shows one of them.  *must* fails an audit, *should* "
        "too unless `--fail-on must` is given.  The *quick* tier is the default.", "",
    ]  # fmt: skip
    inside = {chapter: [check for check in checks if check.chapter == chapter] for chapter in CHAPTERS}
    rows += [
        f"- [{_title(chapter)}](#{_title(chapter).lower().replace(' ', '-')}), {plural(len(found), 'check')}"
        for chapter, found in inside.items() if found
    ]  # fmt: skip
    rows += ["- [numbers of equations](#numbers-of-equations)",
             "- [properties and what covers them](#properties-and-what-covers-them)", ""]
    for chapter, found in inside.items():
        if found:
            rows += [f"## {_title(chapter)}", ""]
            for check in found:
                rows += _check(check)
    return "\n".join([*rows, *_equations(), *_table()]) + "\n"


def _title(chapter: str) -> str:
    return TITLES.get(chapter, chapter)


def _check(check: Check) -> list[str]:
    """One check as a heading, its claim, and a list."""
    kind = f"*{check.level}*, {check.tier} tier, stage {check.stage}, version {check.version}"
    rows = [f"### {check.id}", "", kind, ""]
    rows += [_escaped(mathematics(line(check.claim))), ""]
    caught = [_specimen(one) for one in zoo.SPECIMENS.values() if check.id in _catchers(one)]
    items = [
        ("Source", mathematics(check.source)), ("Why", check.why), ("A real bug", check.bug), ("To fix", check.fix),
        ("Catches", ", ".join(caught)), ("Covers", ", ".join(check.covers)),
    ]  # fmt: skip
    rows += [f"- **{label}:** {text if label == 'Catches' else _escaped(line(text))}" for label, text in items if text]
    return [*rows, ""]


def _catchers(specimen: object) -> tuple[str, ...]:
    catchers = specimen.caught_by
    return (catchers,) if isinstance(catchers, str) else tuple(catchers)


def _specimen(specimen: object) -> str:
    return f"`{specimen.id}`"


def _escaped(text: str) -> str:
    for mark in "\\*_<>|`":
        text = text.replace(mark, "\\" + mark)
    return text


def _table() -> list[str]:
    chapters, excused = properties()
    known = covered()
    total = sum(map(len, chapters.values()))
    count = sum(id in known for ids in chapters.values() for id in ids)
    said = f"Of {total} properties {count} are covered; of the others the table says why they have no check."
    rows = ["## properties and what covers them", "", said, ""]
    for chapter, ids in chapters.items():
        rows += [f"### {chapter.replace('_', '-')}", "", "| property | checks, or why there is none |", "| --- | --- |"]
        for id in ids:
            rows.append(f"| {id} | {', '.join(known[id]) if id in known else _escaped(excused.get(id, 'open'))} |")
        rows.append("")
    return rows[:-1]
