"""How do the answers of `ci/diagnosis` become a page?  Writes ci/diagnosis.json and docs/diagnosis.md."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE = ROOT / "ci" / "diagnosis.json", ROOT / "docs" / "diagnosis.md"
Records = dict[tuple[str, str], dict]  # (part, name) -> the stored record
SOUND = ("both", "alike", "one", "kind")


def write(records: Records, code: str) -> None:
    """`code`: the print of the code as it is now; answers that were made by other code are counted."""
    from dpocheck.oracle.theory import FAULTS
    from dpocheck.zoo import SPECIMENS

    kept: dict[str, dict[str, dict]] = {"unknown": {}, "pairs": {}, "broken": {}, "audits": {}}
    for (part, name), record in sorted(records.items()):
        gone = (part == "unknown" and name not in FAULTS) or (part == "audits" and name not in SPECIMENS)
        if not gone:
            kept[part][name] = {key: value for key, value in record.items() if key not in ("part", "name")}
    DATA.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    older = sum(record["code"] != code for part in kept.values() for record in part.values())
    PAGE.write_text("\n".join(lines(kept, len(FAULTS), len(SPECIMENS), older)) + "\n", encoding="utf-8")


def outcome(record: dict) -> str:
    """What the first name is worth: "uncaught", "none", or as judged; "doubtful" where the report says so itself."""
    if not record["check"]:
        return "uncaught"
    if not record["right"]:
        return "none"
    right = record["right"][0]
    return "doubtful" if right == "wrong" and record["doubtful"][0] else right


def lines(data: dict, faults: int, specimens: int, older: int) -> list[str]:
    return [
        "# How good are the names that an audit gives to bugs?", "",
        "Made by `ci/diagnosis`.  An audit names the known fault whose prediction is nearest to what was seen, or",
        "none.",
        "A name is refuted, and not given, where an observation that is right would be wrong under it, or where most",
        "of the wrong observations that it bears on stay wrong under it.  Where it bears on few of them, the report",
        "says so beside it.", "",
        f"{older} of {sum(map(len, data.values()))} answers are older than the code that gives them.", "",
        *_unknown(data["unknown"], faults), *_two(data), *_audits(data["audits"], specimens),
    ]  # fmt: skip


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.0f} %)" if total else "0"


def _unknown(records: dict[str, dict], faults: int) -> list[str]:
    caught = [record for record in records.values() if record["check"]]
    found, total = Counter(map(outcome, caught)), len(caught)
    wrong = {name: record["names"][0] for name, record in records.items() if outcome(record) == "wrong"}
    return [
        "## A fault that the diagnosis does not know", "",
        f"Each of the known faults was taken out of what the diagnosis knows; {len(records)} of {faults} are measured.",
        f"The oracle plays a trainer that has it, and {total} fail a check that judges numbers of one process.", "",
        "| answer | faults |", "|---|---|",
        f"| none of the known ones | {_share(found['none'], total)} |",
        f"| another name for the same training | {_share(found['alike'], total)} |",
        f"| a fault of the same kind | {_share(found['kind'], total)} |",
        f"| another fault, marked as doubtful | {_share(found['doubtful'], total)} |",
        f"| another fault | {_share(found['wrong'], total)} |", "",
        *(f"- {name}: named {other}." for name, other in wrong.items()), *([""] if wrong else []),
    ]  # fmt: skip


def _two(data: dict) -> list[str]:
    text = [
        "## Two faults at once", "",
        "Random pairs of faults that act in different places; predicted by the oracle, and built into the miniature",
        "out of two specimens.  The first name that is given is:", "",
        "| answer | predicted | built |", "|---|---|---|",
    ]  # fmt: skip
    parts = [[record for record in data[part].values() if record["check"]] for part in ("pairs", "broken")]
    counts = [Counter(map(outcome, caught)) for caught in parts]
    # A name that is one of the two is that, also where it predicts all that was seen of both.
    for count, part in zip(counts, ("pairs", "broken"), strict=True):
        for name, record in data[part].items():
            if outcome(record) == "alike" and record["names"][0] in name.split(" + "):
                count["alike"] -= 1
                count["one"] += 1
    words = {
        "both": "both faults", "alike": "another name for the same training in what was seen", "one": "one of the two",
        "kind": "a fault of the kind of one of them", "none": "none of the known ones",
        "doubtful": "another fault, marked as doubtful", "wrong": "another fault",
    }  # fmt: skip
    for key, label in words.items():
        shares = (_share(c[key], len(caught)) for c, caught in zip(counts, parts, strict=True))
        text.append(f"| {label} | {' | '.join(shares)} |")
    text.append(f"| pairs that fail a check | {len(parts[0])} | {len(parts[1])} |")
    return [*text, ""]


def _audits(records: dict[str, dict], specimens: int) -> list[str]:
    if not records:
        return []
    fails = [len(record["fails"]) for record in records.values()]
    several = {name: record["fails"] for name, record in records.items() if len(record["fails"]) > 1}
    missed = [name for name, record in records.items() if not record["fails"]]
    places = [record["place"] for record in records.values() if record["place"] is not None]
    return [
        "## One bug, one failure", "",
        f"Whole quick audits, blocking on, of {len(records)} of {specimens} specimens, in random order: the median",
        f"number of failures is {statistics.median(fails):g}, the mean {statistics.mean(fails):.2f}, the greatest",
        f"{max(fails)}; {_share(sum(n == 1 for n in fails), len(fails))} have one.",
        f"Of {len(places)} whose theory is known, the first failure is named rightly first in "
        f"{_share(sum(p == 1 for p in places), len(places))}.", "",
        *(f"- {name}: {', '.join(ids)}" for name, ids in several.items()),
        *(f"- {name}: nothing fails in the quick tier with blocking on" for name in missed),
    ]  # fmt: skip
