"""How are whole runs shown without dpocheck?  Checkpoints of the probe, rows, trainer, observed beside expected."""

from __future__ import annotations

import ast
import textwrap
from typing import Any

from dpocheck.experiment import Recipe, Sequence, TrainExperiment, to_plain
from dpocheck.literal import literal
from dpocheck.probes import tables, tokenizers
from dpocheck.report import judged
from dpocheck.report.driver import Trainer, followed, hooked, pasted
from dpocheck.report.front import WIDTH, front
from dpocheck.report.render import render
from dpocheck.report.words import line
from dpocheck.result import Report, Result


def train_script(
    result: Result, report: Report, runs: tuple[TrainExperiment, ...], answer: dict[str, Any]
) -> str | None:
    """The script of whole runs; None where it would show nothing.  `answer`: what `worker.standalone` answers."""
    trainer = hooked(answer) if answer.get("train") else followed(answer) or pasted(answer)
    if trainer is None:
        return None
    first = runs[0]
    if first.body.kind != "speaking" and any(run.policy is None for run in runs):
        return None
    judges = judged.kind(result, runs)
    ranks = first.recipe.world_size
    if (judges in judged.SPIED and answer.get("folders")) or (ranks > 1 and judges != "prediction"):
        return None  # a spy needs a live model, and of several processes the first alone shows what it has
    shown = judged.predicted(result, runs, report) if judges in ("prediction", "change") else [{} for _ in runs]
    change = _change(shown, result) if judges == "change" else {}
    if (judges == "prediction" and not any(shown)) or (judges == "change" and not change):
        return None
    values = {
        **front(result, report, trainer), **model_values(first, report), "pasted": trainer.pasted,
        "train": trainer.text,
        "judges": judges, "limit": repr(judged.limit(result)) if judges != "same" else _equal_limit(result),
        "watched": judged.spied(result) if judges in judged.SPIED else "", "several": len(runs) > 1,
        "runs": "\n".join([
            run_literals(runs, shown if judges == "prediction" else None, trainer),
            *([f"TITLES = {literal(judged.titles(runs), WIDTH)}"] if judges in ("same", "change") else []),
            *([f"CHANGE = {literal(change, WIDTH)}  # run B less run A"] if change else []),
        ]),
        "compared": literal(("gradient of", "logits of", "model.", "lm_head.")),
        "expected_words": literal("Expected: " + line(result.claim)), "twice": _tokens(first),
        "done": literal(f"Done, twice: {judged.done(first, runs[-1])}."), "edited": any(run.edited for run in runs),
        "on_disk": any(run.rows_on_disk for run in runs), "ranks": ranks,
        "shared": any(isinstance(experiment, Sequence) for experiment in result.experiments),
    }  # fmt: skip
    values["imports"] = imports(trainer, values)
    return render("train.py.j2", values)


def translated(run: TrainExperiment) -> Recipe:
    return tables.translate(run.recipe, run.body)


def _change(shown: list[dict[str, float]], result: Result) -> dict[str, float]:
    """The eight numbers that the second run should change most."""
    first, second = shown[0], shown[-1]
    due = {name: second[name] - first[name] for name in first if name in second and second[name] != first[name]}
    return dict(sorted(due.items(), key=lambda item: -abs(item[1]))[:8])


def _equal_limit(result: Result) -> str:
    """Where bits were judged, none may differ; else what two correct runs may be off by."""
    return repr(10 * result.bound if result.bound else 0.0)


def _tokens(run: TrainExperiment) -> str:
    """The tokens of the first row, for a forward."""
    from dpocheck.oracle.tokens import tokenise

    try:
        pair = tokenise(run)[0]
    except (ValueError, KeyError, IndexError):
        return ""
    return literal([int(token) for token in (*pair.prompt, *pair.chosen)])


def model_values(run: TrainExperiment, report: Report) -> dict[str, Any]:
    """What the template writes of model and tokenizer."""
    tokenizer, body, scales = run.tokenizer, run.body, tables.scales(run.recipe.dtype)
    return {
        "size": tokenizer.size, "words": names(tokenizer), "c": scales.c, "k": scales.k,
        "speaking": body.kind == "speaking", "glass": body.kind in ("glass", "clock"), "clock": body.kind == "clock",
        "hidden": tables.hidden_size(tokenizer.size, body), "positions": tables.longest(body),
        "layers": body.layers, "dtype": run.recipe.dtype,
        "dtype_name": dtype_name(report), "pad": tokenizer.pad,
        "pad_token": '"</s>"' if tokenizer.pad_is_eos else '"<pad>"', "kind": tokenizer.kind,
        "adds_bos": tokenizer.adds_bos, "merges": [tuple(tokenizer.merge)] if tokenizer.merge else [],
        "template": literal(tokenizers.jinja(tokenizer.template)) if tokenizer.template else "",
        "tokenizer_says": "One word, one token" if tokenizer.kind == "words" else "One character, one token",
    }  # fmt: skip


def names(tokenizer: Any) -> str:
    """`NAMES = ...`: every token's text, the words, fillers, then the special tokens."""
    words, size = list(tokenizer.words), tokenizer.size
    if words == list(tokenizers.alphabet(size)):
        text = '"""\n' + "\n".join(textwrap.wrap(" ".join(words), WIDTH)) + '\n""".split()'
    else:
        text = literal(words, WIDTH)
    fillers = "" if len(words) == size - 4 else f" + [f\"<{{token}}>\" for token in range({len(words)}, {size - 4})]"
    return f'NAMES = {text}{fillers}\nNAMES += ["<unk>", "<s>", "</s>", "<pad>"]'


def dtype_name(report: Report) -> str:
    """The keyword that transformers takes for the dtype: `dtype` from 4.56 on."""
    release = report.header.versions.get("transformers", "5.0").split(".")[:2]
    numbers = tuple(int(part) if part.isdigit() else 0 for part in release)
    return "dtype" if numbers >= (4, 56) else "torch_dtype"


def imports(trainer: Trainer, values: dict[str, Any]) -> str:
    whole = trainer.pasted + trainer.text
    core = ["Tokenizer", "models", "pre_tokenizers" if values["kind"] == "words" else "decoders"]
    core += ["processors"] if values["adds_bos"] else []
    rows = [
        "from __future__ import annotations", "", "import contextlib",
        *(["import json"] if values["on_disk"] or "json." in whole else []),
        *(["import os", "import subprocess"] if values["ranks"] > 1 else []), "import sys", "import tempfile",
        "import traceback",
        *(["from collections import namedtuple"] if "namedtuple(" in trainer.pasted else []),
        "from pathlib import Path",
        *(["from types import SimpleNamespace"] if "SimpleNamespace" in trainer.text else []),
        "", *(["import numpy as np"] if values["speaking"] else []), "import torch",
        *([] if values["watched"] else ["from safetensors.torch import load_file"]),
        f"from tokenizers import {', '.join(sorted(core))}",
        "from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast",
    ]  # fmt: skip
    return "\n".join(rows)


def run_literals(runs: tuple[TrainExperiment, ...], shown: list[dict[str, float]] | None, trainer: Trainer) -> str:
    """`RUN_1 = {...}`, later runs by what differs, and `RUNS`; with the recipes where the script reads them."""
    records = [run_record(run) for run in runs]
    for place, record in enumerate(records):
        if not trainer.pasted:
            del record["recipe"]
        if shown is not None:
            record["expected"] = shown[place]
    parts = []
    for place, record in enumerate(records):
        differs = {name: value for name, value in record.items() if not place or value != records[0][name]}
        options = {name: ast.literal_eval(text) for name, text in (trainer.options or [{}] * len(runs))[place].items()}
        differs |= {"options": options} if trainer.options else {}
        parts.append(_dictionary(f"RUN_{place + 1}", differs, "RUN_1 | " if place else ""))
    named = ", ".join(f"RUN_{place}" for place in range(1, len(records) + 1))
    return "\n".join([*parts, f"RUNS = [{named}]"])


def _dictionary(name: str, record: dict[str, Any], prefix: str) -> str:
    lines = [f"{name} = {prefix}{{"]
    for key, value in record.items():
        lines += textwrap.indent(f'"{key}": ' + literal(value, WIDTH - 8), "    ").splitlines()
        lines[-1] += ","
    return "\n".join([*lines, "}"])


def run_record(run: TrainExperiment) -> dict[str, Any]:
    """One run as plain Python data; tables are (base logit, [(context, next token, logit), ...])."""

    def table(record: Any) -> Any:
        return None if record is None else (record.base, [tuple(entry) for entry in record.entries])

    return {
        "done": judged.done(run),
        "policy": table(run.policy), "reference": table(run.reference), "on_disk": table(run.edited),
        "rows": [row.record() for row in run.rows],
        "evaluation": {name: [row.record() for row in held] for name, held in run.evaluation},
        "rate": judged.rate(run), "attention_dropout": run.body.attention_dropout,
        "recipe": _untyped(to_plain(translated(run))),
    }  # fmt: skip


def _untyped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _untyped(item) for name, item in value.items() if name != "type"}
    return [_untyped(item) for item in value] if isinstance(value, list) else value
