"""What does a trainer's own log say?  Text matched by the description's expressions becomes history entries."""

from __future__ import annotations

import math
import re
from typing import Any

from dpocheck.command.file import Log

ENTRIES = 100_000  # kept of one run
SLASHED = {
    name.replace("/", "_"): name
    for name in (
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
        "logits/chosen", "logits/rejected",
    )
}  # fmt: skip
SUMMARY = ("train_runtime", "train_loss")  # what a Hugging Face trainer logs once, at the end


def matches_of(text: str, log: Log) -> list[dict[str, str]]:
    """The entries found in `text`: metric -> number as printed."""
    found = []
    for match in re.finditer(log.step, text):
        entry = {name: value for name, value in match.groupdict().items() if value is not None}
        if log.metric:
            entry |= {pair["name"]: pair["value"] for pair in re.finditer(log.metric, match[0])}
        found.append(entry)
        if len(found) == ENTRIES:
            break
    return found


def history(
    log: Log | None, matches: list[dict[str, str]], text: str | None, evaluation: str | None, accumulation: int = 1
) -> list[dict]:
    """History entries, each `{"step", "split", "metrics"}`; entries without a step of their own are counted.

    Where the trainer counts micro-batches, the step is the one that a micro-batch belongs to.
    """
    if log is None:
        return []
    entries: list[dict[str, Any]] = []
    trained = 0
    for match in [*matches[:ENTRIES], *(matches_of(text, log) if text else [])]:
        metrics: dict[str, float] = {}
        for name, value in match.items():
            try:
                metrics[log.names.get(name, SLASHED.get(name, name))] = float(value)
            except ValueError:
                continue
        step = metrics.pop("step", None)
        held = [name for name in metrics if name.startswith(log.evaluation_prefix)] if evaluation else []
        split = evaluation if held else "summary" if any(name in metrics for name in SUMMARY) else "train"
        if held:
            cut = len(log.evaluation_prefix)
            metrics = {name[cut:]: metrics[name] for name in held}
        trained += split == "train"
        step = int(step) if step is not None else trained
        if log.counts == "microsteps":
            step = -(-step // accumulation)
        entries.append({"step": step, "split": split, "metrics": metrics})
    return entries


def rounding(log: Log | None, entries: list[dict[str, Any]]) -> dict[str, float]:
    """Half a unit of the last place printed, the greatest of each metric, by the names that bounds know."""
    found: dict[str, float] = {}
    for entry in entries if log is not None else ():
        for name, value in entry["metrics"].items():
            size = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
            places = [log.digits - 1 - size, *([log.decimals] if log.decimals is not None else [])]
            where = f"history.{entry['split']}.{name}"
            found[where] = max(found.get(where, 0.0), 0.5 * 10.0 ** -min(places))
    return found
