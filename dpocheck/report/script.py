"""How is a failure shown without dpocheck?  As a script for a bug report: it needs the trainer and nothing of ours.

`writer` gives the function that makes the script of a result, or None where there is none to make.  What a whole run
shows is written by `train_script.py`; a bare function is imported by its path and called with the numbers
(`function_script.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from dpocheck.experiment import Sequence, TrainExperiment, to_plain
from dpocheck.report.command_script import command_trainers
from dpocheck.report.front import conventions
from dpocheck.report.function_script import function_script
from dpocheck.report.train_script import train_script, translated
from dpocheck.result import Report, Result


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
        elif type(experiment) not in CAPABILITY or CAPABILITY[type(experiment)] in capabilities:
            return ()
        else:
            coarse = plan(experiment, capabilities, theory)
            if isinstance(coarse, str):
                return ()
            waiting = [*coarse.experiments, *waiting]
    bodies = [replace(run.body, attention_dropout=0.0) for run in runs]
    recipes = [(run.recipe.dtype, run.recipe.world_size) for run in runs]
    alike = {(run.tokenizer, body, *recipe) for run, body, recipe in zip(runs, bodies, recipes, strict=True)}
    return tuple(runs) if len(alike) == 1 else ()
