"""How do the cells of `ci/variants` become a page?  Writes ci/variants.json and docs/tolerances.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MATRIX, PAGE = ROOT / "ci" / "variants.json", ROOT / "docs" / "tolerances.md"
AIM = 10.0  # right trainers stay below a tenth of the bound, faults go beyond ten times it
Records = dict[tuple[str, str], dict]  # (subject, check) -> the stored record

# Why a check misses the aim on one side, where it does.
WHY_NEAR = {
    "LOSS-VALUE-GRADIENT": "the bound is the remainder of a central difference, step^2 beta^3 / (36 sqrt 3), which a "
    "drawn margin attains at large beta",
    "LOGP-VALUE": "the bound counts every rounding of a sum of few terms once; with one to nine tokens they hardly "
    "cancel",
}
NEAR = "the bound adds up the worst case of few roundings, and a few roundings come near their worst case"
WEAK = "the error of this fault is of the size of a low precision, which the check must allow"


def write(records: Records, prints: Callable) -> None:
    data = table(records, prints)
    MATRIX.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text("\n".join(lines(data)) + "\n", encoding="utf-8")


def table(records: Records, prints: Callable) -> dict:
    """Check -> its print, the cells of the honest subjects, and how far beyond the bound each declared fault is."""
    from dpocheck import selftest
    from dpocheck.check import CHECKS
    from dpocheck.zoo import SPECIMENS, VARIANTS

    checks = [check for check in CHECKS.values() if check in selftest.catalogue()]
    data: dict = {"checks": {}, "variants": ["miniature", *VARIANTS]}
    for check in checks:
        honest = {}
        for name in data["variants"]:
            record = records.get((name, check.id))
            if record is None or record["prints"] != prints(name, check):
                continue
            if record.get("same"):
                honest[name] = "same"
            else:
                cell = record["cell"]
                kept = ("drawn", "passed", "unknown", "not_applicable", "exact", "reason", "trouble")
                honest[name] = {key: cell[key] for key in kept if cell[key]} | {"worst": round(cell["worst"], 4)}
        faults = {}
        for name, found in SPECIMENS.items():
            record = records.get((name, check.id))
            if found.caught_by == check.id and record and record["prints"] == prints(name, check):
                faults[name] = _beyond(record)
        data["checks"][check.id] = {"print": prints("miniature", check)[1], "honest": honest, "faults": faults}
    return data


def _beyond(record: dict) -> float | str | None:
    """Error over bound; "exact" where nothing but equality is right; None where it was not caught."""
    if record["verdict"] != "fail":
        return None
    error, bound = record["error"], record["bound"]
    if not bound or error is None:
        return "exact"
    ratio = float(error) / float(bound)
    return round(ratio, 2) if ratio < float("inf") else "exact"


def lines(data: dict) -> list[str]:
    """The page, of what ci/variants.json holds."""
    rows = [(id, _honest(data, found), _smallest(found)) for id, found in data["checks"].items()]
    whole = sum(count for _, (_, _, count, _), _ in rows)
    cells = sum(len(found["honest"]) for found in data["checks"].values())
    wanted = len(data["checks"]) * len(data["variants"])
    troubled = [
        f"- {name}, {id}: {cell['trouble']}" for id, found in data["checks"].items()
        for name, cell in found["honest"].items() if isinstance(cell, dict) and cell.get("trouble")
    ]  # fmt: skip
    return [
        "# How sharp is each check?", "",
        "Made by `ci/variants`.  Right trainers: every variant of the zoo on distinct drawn experiments, 300 a check,",
        "30 where each takes a whole run; the table has the greatest error over bound, and the fewest experiments that",
        "passed for any variant to which the check applies.  Faults: the specimens that the check must catch; the",
        "table has the smallest error over bound.  Bounds are derived (`dpocheck/tolerances.py`), never fitted.", "",
        f"{cells} of {wanted} cells are current; {whole} experiments passed, {len(troubled)} failed.", "",
        *troubled, *([""] if troubled else []),
        "`exact`: bits, counts or words are compared, and nothing but equality passes.", "",
        "| check | right: worst | variants | fewest passed | fault: smallest | of |", "|---|---|---|---|---|---|",
        *(f"| {id} | {_number(right[0])} | {right[1]} | {right[3] if right[1] else '–'} | {_number(wrong[0])} | "
          f"{wrong[1] or '–'} |" for id, right, wrong in rows),
        "", "## Where the aim of a factor 10 is missed", "",
        *_misses(rows),
    ]  # fmt: skip


def _honest(data: dict, found: dict) -> tuple[float | str | None, int, int, int]:
    """Worst error over bound, variants to which the check applies, experiments that passed, the fewest of a variant."""
    base = found["honest"].get("miniature")
    cells = [base if cell == "same" else cell for cell in found["honest"].values()]
    cells = [cell for cell in cells if isinstance(cell, dict) and cell.get("passed")]
    if not cells:
        return None, 0, 0, 0
    exact = all(cell.get("exact", 0) == cell["passed"] for cell in cells)
    worst = "exact" if exact else max(cell["worst"] for cell in cells)
    own = sum(cell["passed"] for cell in found["honest"].values() if isinstance(cell, dict) and cell.get("passed"))
    return worst, len(cells), own, min(cell["passed"] for cell in cells)


def _smallest(found: dict) -> tuple[float | str | None, str]:
    numbers = {name: ratio for name, ratio in found["faults"].items() if isinstance(ratio, float | int)}
    if numbers:
        name = min(numbers, key=numbers.get)  # type: ignore[arg-type]
        return numbers[name], name
    exact = [name for name, ratio in found["faults"].items() if ratio == "exact"]
    return ("exact", exact[0]) if exact else (None, "")


def _number(value: float | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def _misses(rows: list) -> list[str]:
    text = []
    for id, (worst, *_), (smallest, name) in rows:
        if isinstance(worst, float) and worst > 1 / AIM:
            text.append(f"- {id}: a right trainer came to {worst:.2g} of the bound: {WHY_NEAR.get(id, NEAR)}.")
        if isinstance(smallest, float | int) and smallest < AIM:
            text.append(f"- {id}: {name} is only {smallest:.3g} times the bound: {WEAK}.")
    return text or ["Nowhere."]
