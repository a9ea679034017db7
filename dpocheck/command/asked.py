"""Which experiments can a command line be asked?  Everything else is not applicable, with a reason, never a pass."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dpocheck.command.file import OPTIONS, CommandFile
from dpocheck.command.reading import Reading
from dpocheck.experiment import Objective, Recipe, Row, TrainExperiment


def asked(recipe: Recipe, *, evaluation: bool) -> list[str]:
    """The names under `options` that a recipe asks for, beyond one run of plain SGD."""
    wanted = {
        "steps": recipe.steps is not None, "epochs": recipe.steps is None and recipe.epochs is not None,
        "clip_norm": recipe.clip_norm is not None, "weight_decay": recipe.weight_decay != 0,
        "momentum": recipe.momentum != 0, "shuffle": recipe.shuffle, "warmup": recipe.warmup_steps > 0,
        "drop_last": recipe.drop_last, "max_length": recipe.max_length is not None,
        "precompute_reference": recipe.precompute_reference, "save_every": recipe.save_every is not None,
        "resume_from": recipe.resume_from is not None, "evaluation": evaluation,
    }  # fmt: skip
    names = [name for name, is_asked in wanted.items() if is_asked]
    names += [recipe.optimizer] if recipe.optimizer != "sgd" else []
    names += [recipe.schedule] if recipe.schedule != "constant" else []
    cut = recipe.max_length is not None and recipe.truncation != "keep_start"
    return names + ([recipe.truncation] if cut else [])


def loss_texts(file: CommandFile, objective: Objective) -> list[str] | str:
    """The option texts of an objective, or the name of the loss that is missing."""
    kind = "cdpo" if objective.kind == "sigmoid" and objective.label_smoothing else objective.kind
    if objective.label_smoothing and kind not in ("cdpo", "robust"):
        return f"{kind} with label smoothing"
    extras = [name for name, used in (("sft", objective.sft_weight), ("length_normalised", objective.length_normalised))
              if used]  # fmt: skip
    if len(extras) == 1 and (whole := f"{kind}+{extras[0]}") in file.losses:
        return [file.losses[whole]]
    texts = []
    for name in (kind, *(f"+{extra}" for extra in extras)):
        if name not in file.losses:
            return f"{kind}{name}" if name.startswith("+") else name
        texts.append(file.losses[name])
    return texts


def reasons(file: CommandFile, experiment: TrainExperiment) -> Iterator[str]:
    """Every reason why the experiment cannot be asked, most telling first."""
    recipe = experiment.recipe
    if isinstance(missing := loss_texts(file, recipe.objective), str):
        yield f"the command line offers no {missing} loss"
    if experiment.edited is not None:
        yield "a command line cannot be handed a model that was changed in memory"
    if recipe.world_size != 1 and file.launch is None:
        yield "the description has no `launch`: the command is run with one process"
    if recipe.lora is not None:
        yield "the command line trains the full weights, not LoRA"
    if recipe.defaults and file.plain is None:
        yield "the description has no `plain` command that leaves everything to the trainer"
    if len(experiment.evaluation) > 1:
        yield "the command line takes one evaluation set at most"
    written = " ".join([file.command, *file.files.values()])
    for name in asked(recipe, evaluation=bool(experiment.evaluation)):
        if not _offered(file, name, written):
            yield f"the command line offers no option for {OPTIONS.get(name, name)}"
    if recipe.seed and "seed" not in file.options and "{seed}" not in written:
        yield f"the command line offers no option for {OPTIONS['seed']}"
    window = recipe.batch * recipe.accumulation * recipe.world_size
    counted = written + " ".join(option.on for option in file.options.values())
    if "{passes}" in counted and recipe.steps and recipe.steps * window % len(experiment.rows):
        yield "the trainer counts epochs, and that number of steps is no whole number of them"
    if not recipe.shuffle and len(experiment.rows) != window and _order(file) == "shuffled":
        yield "the trainer shuffles the rows and offers no option against it"
    if not recipe.shuffle and len(experiment.rows) != recipe.batch and _order(file) == "drawn":
        yield "the trainer draws each batch anew and offers no option against it"
    if file.dtype != recipe.dtype and (file.dtype, recipe.dtype) != ("bfloat16", "float32"):
        yield f"the command line computes in {file.dtype}, not in {recipe.dtype}"
    yield from _reference_reasons(file, experiment)
    yield from _row_reasons(file, experiment.rows)
    yield from _update_reasons(file, experiment)


def _offered(file: CommandFile, name: str, written: str) -> bool:
    if name == "steps" and "{microsteps}" in written:
        return True
    if name == "epochs" and ("{steps}" in written or "{microsteps}" in written):
        return False
    if name == "shuffle" and file.rows.order != "kept":
        return True
    if name == "save_every" and file.weights.step is not None:
        return True
    return name in file.options or f"{{{name}}}" in written


def _order(file: CommandFile) -> str:
    return "kept" if "shuffle" in file.options and file.options["shuffle"].off else file.rows.order


def _reference_reasons(file: CommandFile, experiment: TrainExperiment) -> Iterator[str]:
    how, other = file.reference.how, experiment.reference not in (None, experiment.policy)
    if other and how not in ("option", "resume"):
        words_ = {"steps": "it has no option, only the steps of a run away from it",
                  "adapter-off": "it is the model without the adapter", "none": "it has no option"}  # fmt: skip
        yield f"another reference than the policy cannot be handed over: {words_[how]}"
    if other and how == "resume" and experiment.recipe.resume_from is not None:
        yield "another reference is handed over by resuming, so that this run cannot resume another"
    needed = experiment.recipe.objective.kind != "simpo"
    if experiment.reference is None and file.reference.omitted == "none" and needed:
        yield "no reference is used where none is handed over"


def _row_reasons(file: CommandFile, rows: tuple[Row, ...]) -> Iterator[str]:
    text = all(isinstance(part, str | None) for row in rows for part in (row.prompt, row.chosen, row.rejected))
    if any(row.prompt is None for row in rows):
        if file.rows.format != "prompt-chosen-rejected":
            yield f"rows without a prompt column cannot be written as {file.rows.format}"
        elif file.rows.prompt == "required":
            yield "the trainer does not say that it takes rows without a prompt column"
    if file.rows.format == "hh" and not text:
        yield "chat rows cannot be written as hh"
    texts = [part for row in rows for part in (row.prompt, row.chosen, row.rejected) if isinstance(part, str)]
    if file.rows.format != "prompt-chosen-rejected" and any(part.strip() != part.removeprefix(" ") for part in texts):
        yield f"white space around a text is not kept where rows are written as {file.rows.format}"


def _update_reasons(file: CommandFile, experiment: TrainExperiment) -> Iterator[str]:
    update, recipe, speaking = file.update, experiment.recipe, experiment.body.kind == "speaking"
    if update.kind == "sgd":
        return
    reading = Reading.of(file, experiment.recipe, experiment.body)
    for value, words_ in ((recipe.weight_decay, "weight decay"), (recipe.momentum, "momentum"),
                          (recipe.optimizer != "sgd", "another optimizer")):  # fmt: skip
        if value:
            yield f"{words_} cannot be read through the {update.kind} that the command line uses"
    if recipe.clip_norm is not None and not reading.linear:
        yield f"clipping cannot be read through the {update.kind} that the command line uses"
    if speaking and not reading.linear:
        yield f"only a table's head can be read through the {update.kind} that the command line uses"
    if steps_of(experiment) != 1 and not (reading.linear and not any(update.betas)):
        yield f"only one step can be read through the {update.kind} that the command line uses"


def steps_of(experiment: TrainExperiment) -> int:
    """The optimizer steps of a run; an incomplete window counts as one."""
    recipe = experiment.recipe
    if recipe.steps is not None:
        return recipe.steps
    micro = math.ceil(len(experiment.rows) / recipe.batch)
    return math.ceil(micro / (recipe.accumulation * recipe.world_size)) * (recipe.epochs or 1)
