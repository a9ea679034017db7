"""How is a failure shown without dpocheck?  As a script for a bug report: it needs the trainer and nothing of ours.

`writer` gives the function that makes the script of a result, or None where there is none to make.  What a whole run
shows is written by `train_script`: the checkpoints of the probe, the rows, the trainer, observed beside expected.  A
bare function is imported by its path and called with the numbers (`function_script.py`).
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from dpocheck.experiment import Recipe, Sequence, TrainExperiment, to_plain
from dpocheck.probes import tables, tokenizers
from dpocheck.report import judged
from dpocheck.report.command_script import command_trainers
from dpocheck.report.driver import Trainer, followed, hooked, pasted
from dpocheck.report.function_script import function_script
from dpocheck.report.literal import literal
from dpocheck.report.render import render
from dpocheck.report.words import deviation, line, shown_pair
from dpocheck.result import Report, Result

WIDTH = 118


def writer(
    report: Report, options: Any, ask: Callable[[dict[str, Any]], dict[str, Any]]
) -> Callable[[Result, Report], str | None]:
    """The script of a result of this audit, or None.  `ask` (`Subject.standalone`) is called once, when the first
    script is made."""
    subject = str(getattr(options, "subject", options))
    failing = [result for result in report.results if result.verdict in ("fail", "expected-fail")]
    own = [experiment for result in failing if _native(result, report) for experiment in result.experiments]
    runs = {id: () if _native(result, report) else whole_runs(result, report) for id, result in enumerate(failing)}
    every = [run for found in runs.values() for run in found]
    recipes = [translated(run) for run in every]

    @cache
    def asked(what: str) -> dict[str, Any]:
        if subject.endswith(".toml"):
            texts = command_trainers(Path(subject), every)
            return {"train": texts, "folders": True} if texts else {}
        if what == "function":
            return ask({"experiments": to_plain(own), "recipes": [], "asked": []})
        return ask({"experiments": [], "recipes": to_plain(recipes), "asked": [_of(run) for run in every]})

    def script(result: Result, report: Report) -> str | None:
        if report.header.isolation == "none" or not result.experiments:
            return None
        if _native(result, report):
            calls = dict(zip(own, asked("function").get("calls", []), strict=False))
            told = [calls.get(experiment) for experiment in result.experiments]
            return function_script(result, report, subject, told)
        found = whole_runs(result, report)
        if not found:
            return None
        answer = dict(asked("adapter"))
        for name in ("train", "traces"):
            if answer.get(name):
                texts = dict(zip(every, answer[name], strict=True))
                answer[name] = [texts[run] for run in found]
        return train_script(result, report, found, answer)

    return script


def _of(run: TrainExperiment) -> dict[str, Any]:
    """What a trace wants to know of a run."""
    sets = [name for name, _ in run.evaluation]
    return {"reference": run.reference is not None, "sets": sets, "on_disk": run.rows_on_disk}


def _native(result: Result, report: Report) -> bool:
    """Were the experiments put to the subject as they are, through a finer method than `train`?"""
    from dpocheck.derive import CAPABILITY

    kinds = {CAPABILITY.get(type(experiment), "train") for experiment in result.experiments}
    return bool(kinds) and kinds <= set(_capabilities(report)) - {"train"}


def _capabilities(report: Report) -> tuple[str, ...]:
    return tuple(part.strip() for part in report.header.route.split(","))


def whole_runs(result: Result, report: Report) -> tuple[TrainExperiment, ...]:
    """The runs behind a result: its experiments, or those they were derived from; () where it was seen otherwise."""
    from dpocheck.derive import CAPABILITY, plan

    capabilities = _capabilities(report)
    theory = conventions(report)
    runs: list[TrainExperiment] = []
    waiting = list(result.experiments)
    while waiting:
        experiment = waiting.pop(0)
        if isinstance(experiment, Sequence):
            runs += experiment.runs
        elif isinstance(experiment, TrainExperiment):
            runs.append(experiment)
        elif CAPABILITY[type(experiment)] in capabilities:
            return ()
        else:
            coarse = plan(experiment, capabilities, theory)
            if isinstance(coarse, str):
                return ()
            waiting = [*coarse.experiments, *waiting]
    alike = {(run.tokenizer, replace(run.body, attention_dropout=0.0), run.recipe.dtype) for run in runs}
    return tuple(runs) if len(alike) == 1 and all(run.recipe.world_size == 1 for run in runs) else ()


def conventions(report: Report) -> Any:
    """The paper, with the conventions that this audit found."""
    from dpocheck.oracle.theory import CONVENTIONS, PAPER

    found = dict(result.convention for result in report.results if result.convention and result.verdict == "info")
    return PAPER.but(**{name: value for name, value in found.items() if name in CONVENTIONS})


def translated(run: TrainExperiment) -> Recipe:
    return tables.translate(run.recipe, run.body)


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
    if judges in judged.SPIED and answer.get("folders"):
        return None  # a spy needs a live model
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
        "on_disk": any(run.rows_on_disk for run in runs),
        "shared": any(isinstance(experiment, Sequence) for experiment in result.experiments),
    }  # fmt: skip
    values["imports"] = imports(trainer, values)
    return render("train.py.j2", values)


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
        "hidden": tables.hidden_size(tokenizer.size, body), "layers": body.layers, "dtype": run.recipe.dtype,
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


def front(result: Result, report: Report, trainer: Trainer | None, needs: str = "") -> dict[str, Any]:
    """The comment at the head of a script."""
    header = report.header
    story = []
    if result.observed is not None:
        observed, expected = shown_pair(result.observed, result.expected)
        where = f"{line(result.where)}: " if result.where else ""
        story.append(f"{where}observed {observed[:300]}, expected {expected[:300]}" + _off(result))
    elif result.reason:
        story.append(line(result.reason)[:600])
    if result.diagnosis:
        story.append(f"Probably: {line(result.diagnosis[0].name)}.")
    versions = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    seen = f"Seen with {header.name} {header.subject_version or ''}"
    story.append(line(f"{seen} ({versions})" if versions else seen))
    if trainer is not None:
        package = line(trainer.package or header.name)
        alone = "nothing else" if trainer.alone else "what the adapter imports"
        needs = f"Needs torch, transformers and {package}; {alone}."
    return {
        "id": line(result.id), "claim": _comment(line(result.claim)), "name": line(header.name), "needs": needs,
        "story": [_comment(text) for text in story], "file": result.id.lower().replace("-", "_") + ".py",
    }  # fmt: skip


def _off(result: Result) -> str:
    return f" ({deviation(result)})" if result.error is not None else ""


def _comment(text: str) -> str:
    return "\n# ".join(textwrap.wrap(text, WIDTH, break_long_words=True) or [""])


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
        *(["import json"] if values["on_disk"] or "json." in whole else []), "import sys", "import tempfile",
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


# ---------------------------------------------------------------------------------------------------------- the runs


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
