"""A command line that is quick: a fake trainer's, described by a TOML that a test completes."""

from pathlib import Path

from command_closed_form import WORDS, rows, table

from dpocheck.command import CommandSubject, read
from dpocheck.experiment import Objective, Recipe, TrainExperiment
from dpocheck.probes import tables

TRAINER = Path(__file__).with_name("command_fake_trainer.py")
COMMAND = (
    f"{{python}} '{TRAINER}' --model {{policy}} --data {{rows}}/train.jsonl --out {{out}} --beta {{beta}} "
    "--lr {learning_rate} --steps {steps} --batch {batch} --accumulation {accumulation}"
)


def described(folder: Path, *, more: str = "", command: str = "", **parts: str) -> CommandSubject:
    """The fake trainer's command line.  `more` is appended to the command, each of `parts` is a TOML value."""
    values = {
        "rows": '{ file = "train.jsonl", order = "kept" }',
        "reference": '{ how = "option", option = "--ref {reference}" }',
        "update": '{ kind = "sgd" }',
        "weights": '{ last = "final.safetensors", step = "{step}.safetensors", counts = "microsteps" }',
        "losses": '{ sigmoid = "", cdpo = "--smoothing {smoothing}" }',
    } | parts
    lines = [f'command = """{command or COMMAND} {more}"""', *(f"{name} = {text}" for name, text in values.items())]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fake.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return CommandSubject(read(path), limits_seconds=60, memory_gb=4, folder=folder / "subject")


def experiment(*, reference: int | None = 2, pairs=None, **recipe) -> TrainExperiment:
    """Four pairs in one batch under two generic tables; keywords go to the recipe."""
    of = {} if pairs is None else {"pairs": pairs}
    plain = {"objective": Objective(beta=0.5), "learning_rate": 16.0, "batch": 4}
    return TrainExperiment(
        policy=table(1), reference=None if reference is None else table(reference), tokenizer=WORDS, rows=rows(**of),
        recipe=Recipe(**(plain | recipe)),
    )  # fmt: skip


def put(subject: CommandSubject, asked: TrainExperiment, folder: Path):
    """Write the checkpoints of the experiment, and let the subject answer."""
    paths = {"policy": folder / "policy"}
    dtype = asked.recipe.dtype
    tables.write_checkpoint(paths["policy"], asked.policy, asked.tokenizer, asked.body, dtype)
    if asked.reference is not None:
        paths["reference"] = folder / "reference"
        tables.write_checkpoint(paths["reference"], asked.reference, asked.tokenizer, asked.body, dtype)
    return subject.answer(asked, paths, folder / "run")


def seen(arrays, asked: TrainExperiment, name: str = "head"):
    """The gradient, (context, target), as every one-step run is read: (start - end) / learning rate, in logits."""
    size, dtype = asked.tokenizer.size, asked.recipe.dtype
    change = tables.logits(arrays["start"], size, dtype) - tables.logits(arrays[name], size, dtype)
    return change / asked.recipe.learning_rate

