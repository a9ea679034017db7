"""What does an experiment look like to a reader?  A few lines and a small table, in the field's own words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Several
from typing import Any

import numpy as np

from dpocheck.experiment import (
    LogpExperiment,
    LossExperiment,
    Recipe,
    Row,
    Sequence,
    StepExperiment,
    Table,
    TextExperiment,
    Tokenizer,
    TrainExperiment,
)
from dpocheck.report.words import line, number, plural

ROWS = 8  # of a table; a counterexample is small, a merged scene is not


def grid(rows: Several[Several[str]], *, indent: str = "  ", numeric: Several[int] = ()) -> list[str]:
    """Rows of cells as aligned lines; the columns `numeric` are set flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "   ".join(cells)).rstrip())
    return lines


def changed(record: Any, default: Any, *, skip: Several[str] = ()) -> str:
    """The fields of a record that differ from `default`: `batch 2, clip_norm 1.0`."""
    parts = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name in skip or value == getattr(default, field.name):
            continue
        if dataclasses.is_dataclass(value):
            value = "(" + ", ".join(f"{f.name} {getattr(value, f.name)}" for f in dataclasses.fields(value)) + ")"
        parts.append(f"{field.name} {value}")
    return ", ".join(parts)


def objective_line(objective: Any) -> str:
    extras = changed(objective, type(objective)(kind=objective.kind), skip=("kind", "beta"))
    return f"{objective.kind}, beta {objective.beta:g}" + (f", {extras}" if extras else "")


def describe(experiments: Several[Any]) -> tuple[str, list[str]]:
    """One sentence, and the lines of a table."""
    if not experiments:
        return "none is stored", []
    if len(experiments) == 1:
        return _one(experiments[0])
    head = f"{len(experiments)} experiments, judged together"
    lines: list[str] = []
    first = experiments[0]
    sentence, table = _one(first)
    lines += [f"  1. {sentence}", *(f"  {row}" for row in table)]
    for place, other in enumerate(experiments[1:], 2):
        if type(other) is type(first):
            lines.append(f"  {place}. the same, but {difference(first, other) or 'run again'}")
        else:
            sentence, table = _one(other)
            lines += [f"  {place}. {sentence}", *(f"  {row}" for row in table)]
    return head, lines


def _one(experiment: Any) -> tuple[str, list[str]]:
    if isinstance(experiment, LossExperiment):
        return _loss(experiment)
    if isinstance(experiment, LogpExperiment):
        return _logp(experiment)
    if isinstance(experiment, StepExperiment):
        return _step(experiment)
    if isinstance(experiment, TrainExperiment):
        return _train(experiment)
    if isinstance(experiment, Sequence):
        sentence, table = describe(experiment.runs)
        return f"runs in one folder, one after the other: {sentence}", table
    if isinstance(experiment, TextExperiment):
        asked = f"{plural(len(experiment.rows), 'pair')}, one a step, on the tokenizer in {experiment.tokenizer}"
        return asked, _row_table(experiment.rows)
    return line(experiment)[:200], []


def difference(first: Any, other: Any, prefix: str = "") -> str:
    """Where two records of one type differ, down to the innermost fields."""
    parts = []
    for field in dataclasses.fields(first):
        before, after = getattr(first, field.name), getattr(other, field.name)
        if before == after:
            continue
        if dataclasses.is_dataclass(before) and type(before) is type(after) and not isinstance(before, Table):
            parts.append(difference(before, after, f"{prefix}{field.name}."))
        elif isinstance(before, Table):
            parts.append(f"another table for {prefix}{field.name}")
        else:
            text = line(after)
            brief = text if len(text) <= 60 else f"other {prefix}{field.name}"
            parts.append(brief if brief.startswith("other ") else f"{prefix}{field.name} {brief}")
    return ", ".join(part for part in parts if part)


def _loss(experiment: LossExperiment) -> tuple[str, list[str]]:
    policy_w, policy_l, reference_w, reference_l = experiment.arguments()
    rows = [("pair", "log π_θ(y_w)", "log π_θ(y_l)", "log π_ref(y_w)", "log π_ref(y_l)", "h")]
    for pair in range(min(len(policy_w), ROWS)):
        h = (policy_w[pair] - reference_w[pair]) - (policy_l[pair] - reference_l[pair])
        numbers = (policy_w[pair], policy_l[pair], reference_w[pair], reference_l[pair], h)
        rows.append((str(pair + 1), *(number(float(value)) for value in numbers)))
    sentence = f"{plural(len(policy_w), 'pair')}, {objective_line(experiment.objective)}, {experiment.dtype}"
    table = grid(rows, numeric=range(1, 6))
    return sentence, table + _more(len(policy_w), "pair")


def _more(count: int, noun: str) -> list[str]:
    return [f"  … and {plural(count - ROWS, noun)} more"] if count > ROWS else []


def _body(body: Any) -> str:
    extras = changed(body, type(body)(kind=body.kind), skip=("kind",))
    return f"{body.kind} model" + (f" ({extras})" if extras else "")


def _logp(experiment: LogpExperiment) -> tuple[str, list[str]]:
    rows = [("row", "token ids, completion in [ ], padding as ·")]
    for place, row in enumerate(experiment.rows[:ROWS], 1):
        cells = []
        for token, real, scored in zip(row.ids, row.attention, row.completion, strict=True):
            cells.append(f"[{token}]" if scored else str(token) if real else f"·{token}")
        rows.append((str(place), " ".join(cells)))
    sentence = f"{plural(len(experiment.rows), 'row')} under a {_body(experiment.body)}, {experiment.dtype}"
    return sentence, grid(rows) + _more(len(experiment.rows), "row")


def table_logp(table: Table, prompt: Several[int], completion: Several[int]) -> float:
    """log pi(completion given prompt) in nats under a table: the sum over the completion's tokens."""
    logits = table.logits()
    total, last = 0.0, prompt[-1]
    for token in completion:
        row = logits[last]
        top = row.max()
        total += float(row[token] - top - np.log(np.exp(row - top).sum()))
        last = token
    return total


def _step(experiment: StepExperiment) -> tuple[str, list[str]]:
    rows = [("pair", "", "prompt → completion (token ids)", "log π_θ", "log π_ref")]
    for place, pair in enumerate(experiment.pairs[:ROWS], 1):
        prompt = " ".join(map(str, pair.prompt))
        for side, completion in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            numbers = [
                number(table_logp(table, pair.prompt, completion)) if pair.prompt else "?"
                for table in (experiment.policy, experiment.reference)
            ]
            label = str(place) if side == "chosen" else ""
            rows.append((label, side, f"{prompt} → {' '.join(map(str, completion))}", *numbers))
    sentence = f"{plural(len(experiment.pairs), 'pair')}, {objective_line(experiment.objective)}, {experiment.dtype}"
    sentence += f", {experiment.padding} padding with {experiment.pad}, {_body(experiment.body)}"
    if experiment.calls > 1:
        sentence += f", the last of {experiment.calls} equal calls"
    return sentence, grid(rows, numeric=(3, 4)) + _more(len(experiment.pairs), "pair")


def _text(value: Any) -> str:
    if value is None:
        return "(no column)"
    if isinstance(value, str):
        text = repr(line(value)) if value.strip() == value else repr(value)
    else:
        text = " ".join(f"{message.role}: {message.content!r}" for message in value)
    text = line(text)
    return text if len(text) <= 60 else text[:57] + "…"


def reference_words(experiment: TrainExperiment) -> str:
    if experiment.edited is not None:
        given = "policy changed in memory after it was loaded from disk"
        return given if experiment.reference is None else f"{given}, a reference passed"
    if experiment.reference is None:
        return "no reference passed"
    return "reference equal to the policy" if experiment.reference == experiment.policy else "another reference passed"


def _tokenizer(tokenizer: Tokenizer) -> str:
    parts = ["one word one token" if tokenizer.kind == "words" else "one character one token"]
    if tokenizer.merge:
        parts.append(f"{tokenizer.merge[0]!r} and {tokenizer.merge[1]!r} merge")
    if tokenizer.adds_bos:
        parts.append("adds BOS")
    if tokenizer.pad_is_eos:
        parts.append("pad is EOS")
    if tokenizer.template:
        parts.append("chat template" + (" with EOS" if tokenizer.template.eos else ""))
    return ", ".join(parts)


def _train(experiment: TrainExperiment) -> tuple[str, list[str]]:
    recipe = experiment.recipe
    sentence = f"{plural(len(experiment.rows), 'pair')}, {objective_line(recipe.objective)}"
    sentence += f"; {reference_words(experiment)}"
    lines = []
    if settings := changed(recipe, Recipe(), skip=("objective",)):
        lines.append(f"  recipe      {settings}")
    lines.append(f"  tokenizer   {_tokenizer(experiment.tokenizer)}; {_body(experiment.body)}")
    lines += _row_table(experiment.rows, _logps(experiment))
    for name, rows in experiment.evaluation:
        lines += [f"  evaluation set {line(name)!r}, {plural(len(rows), 'pair')}:", *_row_table(rows)]
    return sentence, lines


def _logps(experiment: TrainExperiment) -> list[tuple[str, list[tuple[str, str]]]]:
    """Columns (title, (chosen, rejected) of each row) of the log-probs that the tables give the completions."""
    from dpocheck.oracle.tokens import tokenise

    tables = [("log π_θ", experiment.policy), ("log π_ref", experiment.reference), ("log π on disk", experiment.edited)]
    try:
        pairs = tokenise(experiment)
    except (ValueError, KeyError, IndexError):  # rows that cannot be tokenised are shown as they are
        return []
    if len(pairs) != len(experiment.rows) or not all(pair.prompt for pair in pairs):
        return []
    columns = []
    for title, table in tables:
        if table is not None:
            sides = [(pair.chosen, pair.rejected) for pair in pairs[:ROWS]]
            prompts = [pair.prompt for pair in pairs[:ROWS]]
            columns.append((title, [
                (number(table_logp(table, prompt, w)), number(table_logp(table, prompt, l)))
                for prompt, (w, l) in zip(prompts, sides, strict=True)
            ]))  # fmt: skip
    return columns


def _row_table(rows: Several[Row], columns: Several[tuple[str, list[tuple[str, str]]]] = ()) -> list[str]:
    cells = [("prompt", "chosen", "rejected", *(f"{title} of y_w, y_l" for title, _ in columns))]
    for place, row in enumerate(rows[:ROWS]):
        logps = [f"{values[place][0]}, {values[place][1]}" for _, values in columns]
        cells.append((_text(row.prompt), _text(row.chosen), _text(row.rejected), *logps))
    return grid(cells) + _more(len(rows), "pair")
