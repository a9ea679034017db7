"""How is a failure shown without dpocheck?  As a script for a bug report: it needs the trainer and nothing of ours.

`writer` gives the function that makes the script of a result, or None where there is none to make.  What a whole run
shows is written by `train_script`: the checkpoints of the probe, the rows, the trainer, observed beside expected.  A
bare function is imported by its path and called with the numbers (`function_script.py`).
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from dpocheck.experiment import Recipe, Sequence, TrainExperiment, to_plain
from dpocheck.probes import tables, tokenizers
from dpocheck.report.command_script import command_trainers
from dpocheck.report.function_script import function_script
from dpocheck.report.hook import ask
from dpocheck.report.literal import literal
from dpocheck.report.words import deviation, line, shown_pair
from dpocheck.result import Report, Result

WIDTH = 118
STAND_INS = {  # of what adapters import from dpocheck.adapter
    "Unsupported": 'Unsupported = type("Unsupported", (Exception,), {})',
    "TrainOut": 'TrainOut = namedtuple("TrainOut", "policy history checkpoints", defaults=((), {}))',
    "StepOut": 'StepOut = namedtuple("StepOut", "loss metrics", defaults=({},))',
    "LossOut": 'LossOut = namedtuple("LossOut", "loss rewards_chosen rewards_rejected", defaults=(None, None))',
    "Says": "Says = dict",
    **{name: f"{name} = object" for name in ("Adapter", "Objective", "PairBatch", "Probe", "Recipe", "TokenBatch")},
}


@dataclass(frozen=True)
class Trainer:
    """The text that drives a trainer in a script: `run_trainer(run, policy, reference, rows, out)`."""

    text: str
    pasted: str = ""
    package: str | None = None
    alone: bool = True


def writer(report: Report, options: Any) -> Callable[[Result, Report], str | None]:
    """The script of a result of this audit, or None.  The subject is asked once, when the first script is made."""
    subject = str(getattr(options, "subject", options))
    failing = [result for result in report.results if result.verdict in ("fail", "expected-fail")]
    own = [experiment for result in failing if _native(result, report) for experiment in result.experiments]
    runs = {id: () if _native(result, report) else whole_runs(result, report) for id, result in enumerate(failing)}
    recipes = [translated(run) for found in runs.values() for run in found]

    @cache
    def asked(what: str) -> dict[str, Any]:
        if subject.endswith(".toml"):
            texts = command_trainers(Path(subject), [run for found in runs.values() for run in found])
            return {"train": texts} if texts else {}
        return ask(subject, experiments=own) if what == "function" else ask(subject, recipes)

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
        if answer.get("train"):
            texts = dict(zip([run for each in runs.values() for run in each], answer["train"], strict=True))
            answer["train"] = [texts[run] for run in found]
        return train_script(result, report, found, answer)

    return script


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
    """The script of whole runs.  `answer`: what the adapter offers (`hook.ask`)."""
    trainer = hooked(answer) if answer.get("train") else pasted(answer)
    if trainer is None:
        return None
    first = runs[0]
    tokenizer = first.tokenizer
    silent = first.body.kind != "speaking"
    if silent and any(run.policy is None for run in runs):
        return None
    scales = tables.scales(first.recipe.dtype)
    values = {
        **front(result, report, trainer),
        "imports": imports(trainer), "pasted": trainer.pasted, "train": trainer.text,
        "size": tokenizer.size, "words": wrapped("WORDS", list(tokenizer.words)), "c": scales.c, "k": scales.k,
        "runs": run_literals(runs, report, recipes=bool(trainer.pasted)), "speaking": not silent,
        "glass": first.body.kind in ("glass", "clock"),
        "clock": first.body.kind == "clock", "hidden": tables.hidden_size(tokenizer.size, first.body),
        "layers": first.body.layers, "stored": "float64" if first.recipe.dtype == "float64" else "float32",
        "dtype": first.recipe.dtype, "dtype_name": dtype_name(report), "pad": tokenizer.pad,
        "pad_token": '"</s>"' if tokenizer.pad_is_eos else '"<pad>"', "kind": tokenizer.kind,
        "adds_bos": tokenizer.adds_bos, "merges": [list(tokenizer.merge)] if tokenizer.merge else [],
        "template": repr(tokenizers.jinja(tokenizer.template)) if tokenizer.template else "",
        "tokenizer_says": "One word, one token" if tokenizer.kind == "words" else "One character, one token",
        "edited": any(run.edited is not None for run in runs),
        "shared": any(isinstance(experiment, Sequence) for experiment in result.experiments),
        "tolerance": 1e-2 if "16" in first.recipe.dtype else 1e-4,
    }  # fmt: skip
    return render("train.py.j2", values)


def render(name: str, values: dict[str, Any]) -> str:
    """A template of this package, as text without trailing blanks or piles of empty lines."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # The result is Python, not HTML: every value put in is a literal, or one printable line behind a '#'.
    environment = Environment(
        loader=PackageLoader("dpocheck.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    rows = [row.rstrip() for row in environment.get_template(name).render(values).splitlines()]
    text = "\n".join(rows) + "\n"
    while "\n\n\n\n" in text:
        text = text.replace("\n\n\n\n", "\n\n\n")
    ast.parse(text)  # a script that is no Python is a bug of ours, and is not written
    return text


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
        needs = f"Needs numpy, safetensors, torch, transformers and {package}; {alone}."
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


def hooked(answer: dict[str, Any]) -> Trainer:
    """The adapter's own text for each recipe; equal texts once."""
    texts = list(dict.fromkeys(answer["train"]))
    if len(texts) == 1:
        body, choose = texts[0].strip(), "train"
    else:
        named = [text.strip().replace("def train(", f"def train_{place}(") for place, text in enumerate(texts, 1)]
        body = "\n\n\n".join(named)
        order = [f"train_{texts.index(text) + 1}" for text in answer["train"]]
        choose = f"[{', '.join(order)}][RUNS.index(run)]"
    glue = (
        "def run_trainer(run, policy, reference, rows, out):\n"
        '    held_out = {name: held for name, held in rows.items() if name != "train"}\n'
        f'    return {choose}(policy, reference, policy, rows["train"], held_out, out)'
    )
    return Trainer(f"{body}\n\n\n{glue}", package=answer.get("package"))


def pasted(answer: dict[str, Any]) -> Trainer | None:
    """The adapter's file, with stand-ins for what it imports of dpocheck."""
    source = answer.get("source")
    if not source:
        return None
    names: list[str] = []
    cut: list[tuple[int, int]] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module in ("dpocheck.adapter", "__future__"):
            cut.append((node.lineno, node.end_lineno or node.lineno))
            if node.module == "dpocheck.adapter":
                names += [alias.name for alias in node.names]
                if any(alias.asname or alias.name not in STAND_INS for alias in node.names):
                    return None
    lines = source.splitlines()
    kept = [row for place, row in enumerate(lines, 1) if not any(low <= place <= high for low, high in cut)]
    text = "\n".join(kept).strip()
    alone = "dpocheck" not in "".join(row for row in kept if "import" in row)
    stand_ins = "\n".join(STAND_INS[name] for name in dict.fromkeys(names))
    glue = render("pasted.py.j2", {"attribute": answer["attribute"]}).strip()
    return Trainer(glue, f"{stand_ins}\n\n{text}", answer.get("package"), alone)


def imports(trainer: Trainer) -> str:
    rows = [
        "from __future__ import annotations", "", "import hashlib", "import json", "import tempfile",
        *(["from collections import namedtuple"] if "namedtuple(" in trainer.pasted else []),
        "from pathlib import Path",
        *(["from types import SimpleNamespace"] if "SimpleNamespace" in trainer.text else []),
        "", "import numpy as np", "import torch", "from safetensors.numpy import load_file, save_file",
        "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast",
    ]  # fmt: skip
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------------------- the runs


def run_literals(runs: tuple[TrainExperiment, ...], report: Report, *, recipes: bool) -> str:
    """`RUN_1 = {...}`, later runs by what differs, and `RUNS`; with the recipes where the script reads them."""
    records = [run_record(run, report) for run in runs]
    if not recipes:
        records = [{name: value for name, value in record.items() if name != "recipe"} for record in records]
    parts = [_dictionary("RUN_1", records[0], "")]
    for place, record in enumerate(records[1:], 2):
        differs = {name: value for name, value in record.items() if value != records[0][name]}
        parts.append(_dictionary(f"RUN_{place}", differs, "RUN_1 | "))
    names = ", ".join(f"RUN_{place}" for place in range(1, len(records) + 1))
    return "\n".join([*parts, f"RUNS = [{names}]"])


def _dictionary(name: str, record: dict[str, Any], prefix: str) -> str:
    lines = [f"{name} = {prefix}{{"]
    for key, value in record.items():
        lines += textwrap.indent(f'"{key}": ' + literal(value, WIDTH - 8), "    ").splitlines()
        lines[-1] += ","
    return "\n".join([*lines, "}"])


def wrapped(name: str, value: Any) -> str:
    return f"{name} = {literal(value, WIDTH)}"


def run_record(run: TrainExperiment, report: Report) -> dict[str, Any]:
    """One run as plain Python data; tables are (base logit, [(context, next token, logit), ...])."""

    def table(record: Any) -> Any:
        return None if record is None else (record.base, [tuple(entry) for entry in record.entries])

    log, cells = expected(run, report)
    recipe = to_plain(translated(run))
    return {
        "policy": table(run.policy), "reference": table(run.reference), "on_disk": table(run.edited),
        "rows": [row.record() for row in run.rows],
        "evaluation": {name: [row.record() for row in held] for name, held in run.evaluation},
        "rows_on_disk": run.rows_on_disk, "rate": rate(run), "attention_dropout": run.body.attention_dropout,
        "recipe": _untyped(recipe), "expected_log": log, "expected_cells": cells,
    }  # fmt: skip


def _untyped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _untyped(item) for name, item in value.items() if name != "type"}
    return [_untyped(item) for item in value] if isinstance(value, list) else value


def rate(run: TrainExperiment) -> float | None:
    """The learning rate, in logits, of a run whose one step is a plain gradient step; else None."""
    recipe = run.recipe
    plain = recipe.optimizer == "sgd" and recipe.steps == 1 and not (recipe.weight_decay or recipe.warmup_steps)
    return recipe.learning_rate if plain and recipe.lora is None and run.policy is not None else None


LOGGED = ("loss", "rewards/", "logps/")
CELLS = 12


def expected(run: TrainExperiment, report: Report) -> tuple[list[Any], list[Any]]:
    """What the papers predict: the log by (step, split, numbers), and the logits that should change most.

    Of a run of one plain SGD step the cells are those of the gradient, (before - after) / rate.
    """
    from dpocheck.oracle import predict

    try:
        seen = predict(run, conventions(report))
    except Exception:  # the oracle predicts nothing here: the script then shows what was observed alone
        return [], []
    log = []
    for entry in seen.history or ():
        metrics = {name: float(value) for name, value in entry["metrics"].items() if name.startswith(LOGGED)}
        if metrics and entry["split"] != "summary":
            log.append((int(entry["step"]), str(entry["split"]), metrics))
    values = seen.gradient if rate(run) else seen.logits
    if values is None or run.policy is None:
        return log[:CELLS], []
    size = abs(values if rate(run) else values - run.policy.logits())
    worst = sorted(zip(*size.nonzero(), strict=True), key=lambda cell: (-size[cell], cell))[:CELLS]
    cells = [(int(u), int(v), float(values[u, v])) for u, v in sorted(worst)]
    return log[:CELLS], cells
