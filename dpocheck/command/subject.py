"""How does a trainer's own command line answer an experiment?  By files alone: nothing of it is imported or patched.

A checkpoint folder and a preference file go in; the folder that the trainer wrote and its log are read.  The pieces:
`command_file` is the description, `command_asked` what can be asked, `command_run` runs the program, and
`command_reading` turns what Adam or LoRA left into what plain SGD would have left.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dpocheck.command import run as command_run
from dpocheck.command.asked import asked, loss_texts, reasons
from dpocheck.command.file import CommandError, CommandFile, read
from dpocheck.command.log import history, matches_of, rounding
from dpocheck.command.reading import Reading, read_weights
from dpocheck.command.run import CommandFailed
from dpocheck.command.text import expand, words
from dpocheck.experiment import Row, TrainExperiment
from dpocheck.probes import tables

__all__ = ["CommandError", "CommandFailed", "CommandFile", "CommandSubject", "read"]

LOG_READ = 2**26  # characters of a log file
Reply = tuple[dict[str, Any], dict[str, np.ndarray]]


class CommandSubject:
    """A trainer's command line as a subject.  Raises CommandError where its program is missing."""

    form = "command line"
    capabilities = ("train",)

    def __init__(
        self, file: CommandFile, *, limits_seconds: float, memory_gb: float, folder: Path, python: str | None = None,
        places: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """`python`: the interpreter to take instead of the one that the file names.  `places`: what {python}, {bin},
        {environment} and {here} stand for, where nothing is to be run and so no program is looked for."""
        self.file, self.seconds, self.memory_gb, self.folder = file, limits_seconds, memory_gb, Path(folder).absolute()
        self.name, self.says, self.precision = file.name, file.says, file.dtype
        self.moves = file.update.moves  # the only tensors that the trainer says it trains; empty: all
        alone = file.reference.omitted == "policy" and file.reference.how not in ("option", "resume")
        self.only = {"reference": "policy"} if alone else {}  # the reference is always the model it starts from
        self.places = places or _places(file, python)
        self.forced = _fixed(file)
        self.stubs = tuple(f"{name}: {content}" for name, content in file.files.items())
        if file.rows.template is not None:
            self.stubs += (f"chat template of a tokenizer that has none: {file.rows.template}",)
        self.version = self._version()

    def _version(self) -> str | None:
        if self.file.package is None:
            return None
        if self.places["python"] == sys.executable:
            try:
                return importlib.metadata.version(self.file.package)
            except importlib.metadata.PackageNotFoundError:
                return None
        code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
        done = subprocess.run(
            [self.places["python"], "-c", code, self.file.package], capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip() or None

    def supports(self, experiment: TrainExperiment) -> str | None:
        """Why this command line cannot be asked for the experiment; None if it can."""
        return next(reasons(self.file, experiment), None)

    def answer(self, experiment: TrainExperiment, paths: dict[str, Path], folder: Path) -> Reply:
        """Run the command on the experiment in `folder`; the reply that an adapter's `train` would have given.

        `paths`: the checkpoint folders "policy" and, where one is handed over, "reference".  Runs that are answered
        in one folder share their caches, and a run that resumes finds what the run before it wrote.
        Raises CommandFailed when the command fails, hangs or writes nothing.
        """
        if (reason := self.supports(experiment)) is not None:
            raise ValueError(f"the command line cannot be asked for this experiment: {reason}")
        run = Run(self, experiment, paths, Path(folder).absolute())
        matches: list[dict[str, str]] = []
        log = self.file.log
        lines = None if log is None or log.file else lambda text: matches.extend(matches_of(text, log))
        done = command_run.run(
            run.arguments(), environment=run.environment(), folder=run.work, seconds=self.seconds,
            memory_gb=self.memory_gb, lines=lines,
        )  # fmt: skip
        try:
            return run.reply(matches)
        except CommandFailed as error:
            raise CommandFailed(error.reason, done.output) from None


# ------------------------------------------------------------------------------------------------------------ program


def _places(file: CommandFile, given: str | None) -> dict[str, str]:
    """The interpreter, its folder and its environment; the command's program is looked for here, once."""
    python = given or expand(file.python, {"environment": sys.prefix}) or sys.executable
    if "/" in python and not given:
        python = str(Path(python).expanduser() if python[0] in "/~" else file.path.parent.absolute() / python)
    found = shutil.which(python)
    if found is None:
        raise CommandError(f"{file.path.name}: python is {python!r}, which is no program; name an interpreter")
    places = {"python": found, "bin": str(Path(found).parent), "environment": str(Path(found).parent.parent)}
    places["here"] = str(file.path.parent.absolute())
    program = words(file.command, places | dict(file.defaults))[0]
    if shutil.which(program) is None:
        raise CommandError(
            f"{file.path.name}: the program of the command, {program!r}, is not there; install the trainer, or set "
            "`python` to the interpreter of the environment that holds it"
        )
    return places


def _fixed(file: CommandFile) -> dict[str, str]:
    """The options that the command sets to values of its own: what people do not necessarily run."""
    fixed: dict[str, str] = {}
    text = " ".join([file.command, *(option.off for option in file.options.values())])
    arguments, name = words(text, {}), None
    for argument in arguments[1:]:
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            fixed[name] = value or "true"
        elif name:
            fixed[name] = argument if fixed[name] == "true" else f"{fixed[name]} {argument}"
    return {name: value for name, value in fixed.items() if "{" not in value}

# ---------------------------------------------------------------------------------------------------------------- run


class Run:
    """One run: the files written before it, its arguments, and the reading of what it left."""

    def __init__(
        self, subject: CommandSubject, experiment: TrainExperiment, paths: dict[str, Path], folder: Path
    ) -> None:  # fmt: skip
        self.subject, self.file, self.experiment = subject, subject.file, experiment
        self.recipe = tables.translate(experiment.recipe, experiment.body)
        self.reading = Reading.of(self.file, experiment.recipe, experiment.body)
        self.folder, self.work, self.out, self.rows = folder, folder / "work", folder / "out", folder / "rows"
        if self.out.exists() and self.recipe.resume_from is None:
            shutil.rmtree(self.out)
        for name in ("work", "rows", "out", "cache", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        policy = Path(paths["policy"]).absolute()
        self.start = tables.read_state(policy)
        self.policy = self._templated(self.reading.rescaled(policy, folder / "policy"), folder / "policy")
        given, how = experiment.reference is not None, self.file.reference.how
        # Resuming is needed only for a reference that differs; an option is used whenever one is handed over.
        differs = experiment.reference != experiment.policy
        self.hands_over = given and (how == "option" or (how == "resume" and differs))
        self.reference = self.policy
        if self.hands_over:
            self.reference = self._templated(Path(paths["reference"]).absolute(), folder / "reference")
        self.resume = folder / "resume" if self.hands_over and how == "resume" else None
        self.before = _written(self._last())  # by the run that this one resumes
        self._write_rows()
        if self.resume is not None:
            shutil.rmtree(self.resume, ignore_errors=True)
            shutil.copytree(self.policy, self.resume)
        for name, content in self.file.files.items():
            if "{resume}" not in name or self.resume is not None:
                path = Path(expand(name, self.values))
                path = path if path.is_absolute() else self.work / path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(expand(content, self.values), encoding="utf-8")

    def _templated(self, checkpoint: Path, copy: Path) -> Path:
        """The checkpoint with the description's chat template, if it has one and the tokenizer has none."""
        if self.file.rows.template is None or self.experiment.tokenizer.template is not None:
            return checkpoint
        if checkpoint != copy:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(checkpoint, copy)
        place = copy / "tokenizer_config.json"
        config = json.loads(place.read_text(encoding="utf-8")) | {"chat_template": self.file.rows.template}
        place.write_text(json.dumps(config, indent=1), encoding="utf-8")
        return copy

    def _write_rows(self) -> None:
        names = [self.file.rows.file, self.file.rows.also] if self.file.rows.also else [self.file.rows.file]
        sets = [(name, self.experiment.rows) for name in names]
        sets += [(self.file.rows.evaluation, rows) for _, rows in self.experiment.evaluation]
        for name, rows in sets:
            text = "".join(json.dumps(record(row, self.file.rows.format)) + "\n" for row in rows)
            (self.rows / name).parent.mkdir(parents=True, exist_ok=True)
            (self.rows / name).write_text(text, encoding="utf-8")

    @property
    def values(self) -> dict[str, Any]:
        """The placeholders of this run."""
        recipe, objective = self.recipe, self.recipe.objective
        hidden = tables.hidden_size(self.experiment.tokenizer.size, self.experiment.body)
        values = dict(self.file.defaults) | self.subject.places | {
            "policy": self.policy, "reference": self.reference, "rows": self.rows, "out": self.out, "work": self.work,
            "base": self.reference if self.file.reference.how == "resume" else self.policy, "resume": self.resume,
            "beta": float(objective.beta), "gamma": float(objective.gamma), "sft_weight": float(objective.sft_weight),
            "smoothing": float(objective.label_smoothing), "learning_rate": self.reading.rate,
            "batch": recipe.batch, "accumulation": recipe.accumulation, "seed": recipe.seed, "epochs": recipe.epochs,
            "steps": recipe.steps, "max_length": recipe.max_length, "weight_decay": float(recipe.weight_decay),
            "momentum": float(recipe.momentum), "warmup_steps": recipe.warmup_steps, "beta1": float(recipe.betas[0]),
            "beta2": float(recipe.betas[1]), "epsilon": float(recipe.epsilon), "save_every": recipe.save_every,
            "resume_from": recipe.resume_from, "eval_batch": recipe.eval_batch, "rank": hidden,
            "ranks": recipe.world_size,
            "eval_every": recipe.eval_every or recipe.steps or 1, "alpha": self.file.update.scale * hidden,
        }  # fmt: skip
        values["window"] = recipe.batch * recipe.accumulation  # rows of one step
        if recipe.steps is not None:
            values["microsteps"] = recipe.steps * recipe.accumulation
            values["examples"] = recipe.steps * values["window"]
            values["passes"] = values["examples"] // len(self.experiment.rows)  # over the rows, for {steps} steps
        if recipe.clip_norm is not None:
            values["clip_norm"] = float(recipe.clip_norm)
        return values

    def arguments(self) -> list[str]:
        recipe, texts = self.experiment.recipe, []
        command = self.file.plain if recipe.defaults else self.file.command
        if recipe.world_size > 1:
            command = shlex.join([*shlex.split(self.file.launch), *shlex.split(command)[1:]])
        texts.append(command)
        texts += loss_texts(self.file, recipe.objective)
        if self.hands_over:
            texts.append(self.file.reference.option)
        wanted = {*asked(recipe, evaluation=bool(self.experiment.evaluation)), "seed"}
        for name, option in self.file.options.items():
            if name in wanted:
                texts.append(option.on)
            elif not recipe.defaults:
                texts.append(option.off)
        return [word for text in texts for word in words(text, self.values)]

    def environment(self) -> dict[str, str]:
        extra = {name: expand(text, self.values) for name, text in self.file.environment.items()}
        return command_run.offline(self.folder, self.subject.folder / "shared", extra)

    def reply(self, matches: list[dict[str, str]]) -> Reply:
        """What the run left, as `TrainingProbe.reply` would say it."""
        weights = self.file.weights
        found = self._last()
        if self.before is not None and _written(found) == self.before:
            raise CommandFailed(f"wrote no weights: {found} is that of the run it resumed")
        end, arrays = self._state(found, f"weights.last, {weights.last!r}"), {}
        if self.experiment.body.kind == "speaking":
            arrays |= {f"weights.{name}": end[name] - old for name, old in self.start.items() if name in end}
        else:
            arrays |= {"start": self.start[tables.HEAD], "head": end[tables.HEAD]}
            for step, path in saved(self.out, weights.step):
                if weights.counts == "microsteps":
                    step //= self.recipe.accumulation
                arrays[f"saved.{step}"] = self._state(path, "weights.step")[tables.HEAD]
        moved = {
            name: float(np.max(np.abs(end[name].astype(np.float64) - old))) if old.size else 0.0
            for name, old in self.start.items()
            if name in end and end[name].shape == old.shape and self.reading.watches(name)
        }
        evaluation = self.experiment.evaluation[0][0] if self.experiment.evaluation else None
        log = self.file.log
        entries = history(log, matches, self._logged(), evaluation, self.recipe.accumulation)
        floor = rounding(log, entries)
        if noise := self.reading.noise(end, weights):
            floor |= {"gradient": noise, "attended": noise, "logits": noise * self.experiment.recipe.learning_rate}
        fields = {
            "history": entries, "floor": floor,
            "moved": moved, "digest": tables.digest(end), "start_digest": tables.digest(self.start),
        }  # fmt: skip
        return {"fields": fields, "spies": {}}, arrays

    def _last(self) -> Path:
        """Where the last weights are; `weights.last` may name the checkpoint of the last step."""
        last = self.file.weights.last
        found = saved(self.out, last) if "{step" in last else []
        return found[-1][1] if found else self.out / last

    def _state(self, path: Path, what: str) -> dict[str, np.ndarray]:
        """The weights at `path` in the start's scale and as plain SGD would have left them."""
        state = read_weights(path, what)
        weights = self.file.weights
        if weights.head in state:
            state[tables.HEAD] = state.pop(weights.head)
        elif self.file.update.kind != "lora":
            known = ", ".join(sorted(state))[:300]
            raise CommandFailed(f"wrote no tensor {weights.head!r} (weights.head) into {path.name}; it holds: {known}")
        return self.reading.as_sgd(self.start, state, weights)

    def _logged(self) -> str | None:
        """The text of the log file of the last step."""
        log = self.file.log
        if log is None or log.file is None:
            return None
        path = self.out / log.file
        if "{step" in log.file:
            found = saved(self.out, log.file)
            if not found:
                return None
            path = found[-1][1]
        if not path.is_file():
            return None
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(LOG_READ)


def _written(path: Path) -> int | None:
    """When the newest weights at `path` were written, in ns."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=None)


def saved(out: Path, pattern: str | None) -> list[tuple[int, Path]]:
    """The files that `pattern` names for any step, by step."""
    if pattern is None:
        return []
    place = re.compile(r"\{step(?::[^{}]*)?\}")
    named = re.compile(r"(\d+)".join(re.escape(part) for part in place.split(pattern)))
    found = []
    for path in out.glob(place.sub("*", pattern)):
        if match := named.fullmatch(path.relative_to(out).as_posix()):
            found.append((int(match[1]), path))
    return sorted(found)


def record(row: Row, style: str) -> dict[str, Any]:
    """A row as the trainer's format has it."""
    if style == "prompt-chosen-rejected":
        return row.record()
    if style == "hh":
        start = f"\n\nHuman: {row.prompt}\n\nAssistant:"
        return {"chosen": f"{start} {str(row.chosen).strip()}", "rejected": f"{start} {str(row.rejected).strip()}"}
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    plain = {name: value if isinstance(value, list) else [{"role": roles[name], "content": value.strip()}]
             for name, value in row.record().items()}  # fmt: skip
    if style == "conversations":
        return {"chosen": plain["prompt"] + plain["chosen"], "rejected": plain["prompt"] + plain["rejected"]}
    return {"messages": plain["prompt"] + plain["chosen"], "rejected_response": plain["rejected"][-1]["content"]}
