"""How does a TOML file describe a trainer's command line?  The fields, their closed values, and what is refused.

    command = "{python} -m trainer --model {policy} --data {rows} --beta {beta} --lr {learning_rate} --out {out}"
    rows = { format = "prompt-chosen-rejected", file = "train.jsonl" }
    update = { kind = "sgd" }
    weights = { last = "model.safetensors" }
    losses = { sigmoid = "" }

is a whole description.  `conformance/commands/trl.toml` shows every other field in use.  Texts hold placeholders,
`PLACEHOLDERS` plus the names under `[defaults]`; {here} is the folder of the description, {work} the one that the
command runs in.
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from dpocheck.adapter import Says
from dpocheck.command.text import PLACEHOLDERS, CommandError, check, near

LOSSES = ("sigmoid", "cdpo", "robust", "hinge", "ipo", "simpo")  # and "+EXTRA", or "LOSS+EXTRA" for one of the two
EXTRAS = ("sft", "length_normalised")

OPTIONS = {  # what a recipe can ask for beyond the plain run, and the words a reason uses for it
    "seed": "another seed than 0", "epochs": "epochs", "steps": "a number of steps", "clip_norm": "clipping",
    "weight_decay": "weight decay", "momentum": "momentum", "adamw": "AdamW", "shuffle": "shuffled rows",
    "linear": "a linear schedule", "cosine": "a cosine schedule", "warmup": "warm-up", "drop_last": "drop_last",
    "max_length": "truncation", "keep_end": "truncation that keeps the end", "drop": "dropping of long rows",
    "precompute_reference": "a precomputed reference", "save_every": "checkpoints", "resume_from": "resuming",
    "evaluation": "an evaluation set",
}  # fmt: skip

SAYS = {
    "eos": ("appended", "none"), "bos": ("none", "tokenizer", "added"), "ipo": ("sum", "mean"),
    "truncation": ("keep_start", "keep_end", "drop"), "reward_scale": ("beta", "one"),
    "reduction": ("none", "mean", "sum"), "uneven_accumulation": ("pairs", "micro-batches"),
    "uneven_ranks": ("kept", "repeated"), "reference_dtype": ("bfloat16", "float16"),
}  # fmt: skip


def _choice(*values: str, default: Any = MISSING) -> Any:
    given = {} if default is MISSING else {"default": default}
    return field(metadata={"values": values}, **given)


@dataclass(frozen=True)
class Rows:
    """The preference file.  `also`: a second name it is written under.  `order`: what the trainer does to the rows;
    drawn: each micro-batch is drawn from all of them anew.

    `template`: for a trainer that renders plain text, too, by a chat template: the one (Jinja) that a tokenizer without
    a template of its own is given.
    """

    file: str
    format: str = _choice("prompt-chosen-rejected", "messages", "conversations", "hh", default="prompt-chosen-rejected")
    also: str | None = None
    evaluation: str | None = None  # the file of the held-out set, where `options.evaluation` can ask for one
    order: str = _choice("kept", "shuffled", "drawn", default="shuffled")
    template: str | None = None
    prompt: str = _choice("required", "optional", default="required")


@dataclass(frozen=True)
class Reference:
    """How a reference that is not the policy is handed over, and what is used when none is (`omitted`).

    `option`: by the text `option`.  `resume`: {base} holds the reference, and the text `option` makes the trainer
    resume from {resume}, a folder with the policy's weights.  `steps`, `adapter-off`, `none`: not at all.
    """

    how: str = _choice("option", "resume", "steps", "adapter-off", "none", default="none")
    option: str = ""
    omitted: str = _choice("policy", "base", "none", default="policy")


@dataclass(frozen=True)
class Update:
    """The optimizer the command asks for: it fixes the learning rate handed over and the reading of the gradient.

    adam: with `epsilon`, `betas` and `bias_correction` as the command sets them.  lora: plain SGD on an adapter of
    rank {rank} = hidden size on the head alone, `scale` = alpha / rank.  `moves`: the only tensors that may move.
    """

    kind: str = _choice("sgd", "adam", "lora", default="sgd")
    epsilon: float = 1e-8
    betas: tuple[float, ...] = (0.9, 0.999)
    bias_correction: bool = True
    scale: float = 1.0
    moves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weights:
    """Where the trained weights lie under {out}: at the end, and after {step}, counted in steps or micro-batches.
    Where `last` names {step} too, the highest is the last."""

    last: str
    step: str | None = None
    counts: str = _choice("steps", "microsteps", default="steps")
    head: str = "lm_head.weight"
    lora_a: str | None = None
    lora_b: str | None = None


@dataclass(frozen=True)
class Log:
    """What the trainer logs: `step` matches one entry; its named groups are metrics (`rewards_chosen` is
    rewards/chosen; `step` is the number of the step).  `metric`, with groups `name` and `value`, reads an entry
    whose metrics have their own names.  `file`: read there, under {out}, not in the output, whose lines are matched one
    by one.  `digits`, `decimals`: significant digits, or places after the point, that are printed.  `names`: the
    trainer's name -> TRL's.  `counts`: what one entry, or its `step`, stands for."""

    step: str
    metric: str | None = None
    file: str | None = None
    digits: int = 17
    decimals: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    evaluation_prefix: str = "eval_"
    counts: str = _choice("steps", "microsteps", default="steps")


@dataclass(frozen=True)
class Option:
    """Text appended when a recipe asks for something, and when it does not."""

    on: str
    off: str = ""


@dataclass(frozen=True)
class CommandFile:
    """A trainer's command line, described.  `path` is where the description stands."""

    command: str
    rows: Rows
    weights: Weights
    losses: Mapping[str, str]
    path: Path = Path()
    name: str = ""
    plain: str | None = None  # the whole command, with everything left to the trainer that it need not be told
    # for a run in {ranks} processes: the words put in the place of the command's first word, as
    # "{bin}/torchrun --standalone --nproc-per-node {ranks}"; without it the trainer is run in one process
    launch: str | None = None
    package: str | None = None  # the distribution whose version the report names
    python: str = ""  # "": the interpreter dpocheck runs under
    dtype: str = _choice("float32", "bfloat16", "float64", default="float32")
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # path -> content, written first
    reference: Reference = Reference()
    update: Update = Update()
    log: Log | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)  # placeholder -> value; "$NAME": a variable's
    says: Says = field(default_factory=Says)


# ------------------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> CommandFile:
    """The description in `path`.  Raises CommandError on anything wrong, before anything runs."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} is not TOML: {error}") from None
    try:
        return _command(data, path)
    except CommandError as error:
        raise CommandError(f"{path.name}: {error}") from None


def _command(data: dict[str, Any], path: Path) -> CommandFile:
    if "path" in data:
        raise CommandError(_unknown("path", "", (f.name for f in fields(CommandFile))))
    plain = dict(data)
    for name, record in (("rows", Rows), ("weights", Weights), ("reference", Reference), ("update", Update),
                         ("log", Log)):  # fmt: skip
        if name in plain:
            plain[name] = _record(record, _of(plain[name], dict, name), name)
    if "defaults" in plain:
        plain["defaults"] = {name: _variable(value, f"defaults.{name}") for name, value in
                             _of(plain["defaults"], dict, "defaults").items()}  # fmt: skip
    plain["options"] = _options(_of(plain.get("options", {}), dict, "options"))
    plain["says"] = _says(_of(plain.get("says", {}), dict, "says"))
    file = _record(CommandFile, plain, "")
    object.__setattr__(file, "path", path)
    object.__setattr__(file, "name", file.name or path.stem)
    _losses(file)
    _meaning(file)
    _texts(file)
    return file


_TYPES = {
    "str": (str, "a text"), "str | None": (str, "a text"), "float": ((int, float), "a number"),
    "int": (int, "a whole number"), "int | None": (int, "a whole number"),
    "bool": (bool, "true or false"), "Mapping[str, str]": (dict, "a table of texts"),
    "tuple[float, ...]": (list, "a list of numbers"), "tuple[str, ...]": (list, "a list of texts"),
}  # fmt: skip


def _record(record: type, data: dict[str, Any], where: str) -> Any:
    """A frozen record of a TOML table: unknown and missing fields, wrong types and values are refused."""
    known = {f.name: f for f in fields(record)}
    dot = f"{where}." if where else ""
    for name in data:
        if name not in known:
            raise CommandError(_unknown(name, dot, known))
    for name, f in known.items():
        if name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise CommandError(f"the field {dot}{name} is missing")
    return record(**{name: _value(known[name], value, dot + name) for name, value in data.items()})


def _value(f: Any, value: Any, where: str) -> Any:
    if f.type not in _TYPES:
        return value
    kind, words = _TYPES[f.type]
    _of(value, kind, where, words)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        _of(item, (int, float) if f.type == "tuple[float, ...]" else str, where, words)
    allowed = f.metadata.get("values")
    if allowed and value not in allowed:
        raise CommandError(f"{where} is {value!r}; allowed: {', '.join(allowed)}{near(value, allowed)}")
    return tuple(value) if isinstance(value, list) else value


def _of(value: Any, kind: Any, where: str, words: str = "a table") -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CommandError(f"{where} is {value!r}; it must be {words}")
    return value


def _unknown(name: str, dot: str, known: Iterable[str]) -> str:
    known = [k for k in known if k != "path"]
    return f"unknown field {dot}{name}{near(name, known)}; known: {', '.join(sorted(known))}"


def _variable(value: Any, where: str) -> Any:
    """A text that is $NAME is the value of that variable: what differs from machine to machine, such as a checkout."""
    if not isinstance(value, str) or not (match := re.fullmatch(r"\$([A-Za-z_][A-Za-z0-9_]*)", value)):
        return value
    if not os.environ.get(match[1]):
        raise CommandError(f"{where} is {value!r}, and the environment has no {match[1]}; set it to a path")
    return os.environ[match[1]]


def _options(data: dict[str, Any]) -> dict[str, Option]:
    made = {}
    for name, value in data.items():
        if name not in OPTIONS:
            raise CommandError(_unknown(name, "options.", OPTIONS))
        where = f"options.{name}"
        made[name] = Option(value) if isinstance(value, str) else _record(
            Option, _of(value, dict, where, "a text or a table with `on` and `off`"), where
        )  # fmt: skip
    return made


def _says(data: dict[str, Any]) -> Says:
    lists = ("objectives", "options")
    for name, value in data.items():
        if name not in SAYS and name not in lists:
            raise CommandError(_unknown(name, "says.", (*SAYS, *lists)))
        if name in lists:
            for item in _of(value, list, f"says.{name}", "a list of texts"):
                _of(item, str, f"says.{name}", "a list of texts")
        elif value not in SAYS[name]:
            raise CommandError(f"says.{name} is {value!r}; allowed: {', '.join(SAYS[name])}")
    return Says(**{name: tuple(value) if name in lists else value for name, value in data.items()})


def _losses(file: CommandFile) -> None:
    if not file.losses:
        raise CommandError(f"losses is empty; give the option text of at least one of: {', '.join(LOSSES)}")
    known = [*LOSSES, *(f"+{extra}" for extra in EXTRAS), *(f"{loss}+{extra}" for loss in LOSSES for extra in EXTRAS)]
    for name in file.losses:
        if name not in known:
            raise CommandError(_unknown(name, "losses.", known))


def _meaning(file: CommandFile) -> None:
    """Fields that only make sense together."""
    reference, update, weights = file.reference, file.update, file.weights
    for name in ("option", "resume"):
        if reference.how == name and not reference.option:
            raise CommandError(f"reference.how is {name!r}, so reference.option must hold the text that asks for it")
    if reference.how == "resume" and "{resume}" not in reference.option:
        raise CommandError("reference.how is 'resume', so reference.option must name {resume}, the folder to resume")
    if reference.how == "resume" and "{base}" not in file.command:
        raise CommandError("reference.how is 'resume', so command must name {base}, the model that is the reference")
    if update.kind == "adam" and (len(update.betas) != 2 or not all(0 <= b < 1 for b in update.betas)):
        raise CommandError(f"update.betas is {list(update.betas)}; it must be two numbers of [0, 1)")
    if update.kind == "adam" and update.epsilon <= 0:
        raise CommandError(f"update.epsilon is {update.epsilon}; it must be positive: the gradient is read through it")
    if update.kind == "lora" and not (weights.lora_a and weights.lora_b):
        raise CommandError("update.kind is 'lora', so weights.lora_a and weights.lora_b must name its tensors")
    if weights.step is not None and not re.search(r"\{step[:}]", weights.step):
        raise CommandError(f"weights.step is {weights.step!r}; it must contain {{step}}")
    if "evaluation" in file.options and not file.rows.evaluation:
        raise CommandError("options.evaluation is given, so rows.evaluation must name the file of the held-out set")
    if file.log is not None:
        _regex(file.log.step, "log.step", None if file.log.metric else ())
        if file.log.metric:
            _regex(file.log.metric, "log.metric", ("name", "value"))


def _regex(pattern: str, where: str, groups: tuple[str, ...] | None) -> None:
    try:
        named = re.compile(pattern).groupindex
    except re.error as error:
        raise CommandError(f"{where} is not a regular expression: {error}: {pattern!r}") from None
    if groups == () and not named:
        raise CommandError(f"{where} has no named group; each metric is one, as in 'loss (?P<loss>[-.0-9]+)'")
    for name in groups or ():
        if name not in named:
            raise CommandError(f"{where} has no group {name!r}; it needs (?P<name>...) and (?P<value>...)")


# --------------------------------------------------------------------------------------------------------------- texts


def _texts(file: CommandFile) -> None:
    """Every placeholder is known, every text can be split and filled in."""
    known = PLACEHOLDERS | dict(file.defaults) | {"step": 1}
    for name in file.defaults:
        if name in PLACEHOLDERS:
            raise CommandError(f"defaults.{name} is a placeholder that each run fills in; use another name")
    check(file.command, "command", known, split=True)
    check(file.plain or "", "plain", known, split=True)
    check(file.launch or "", "launch", known, split=True)
    if file.launch is not None and "{ranks}" not in " ".join([file.launch, *file.environment.values()]):
        raise CommandError("launch has no {ranks}, the number of processes; put it there or into an environment value")
    if not shlex.split(file.command):
        raise CommandError("command is empty")
    for name, text in file.losses.items():
        check(text, f"losses.{name}", known, split=True)
    for name, option in file.options.items():
        check(option.on, f"options.{name}", known, split=True)
        check(option.off, f"options.{name}.off", known, split=True)
    check(file.reference.option, "reference.option", known, split=True)
    named = [("python", file.python), ("rows.file", file.rows.file), ("weights.last", file.weights.last),
             ("weights.step", file.weights.step or ""), ("log.file", (file.log and file.log.file) or "")]  # fmt: skip
    named += [(f"environment.{name}", text) for name, text in file.environment.items()]
    named += [(f"files.{name!r}", name) for name in file.files]
    for where, text in named:
        check(text, where, known, split=False)
    for name, content in file.files.items():  # braces are the content's own unless they all but name a placeholder
        for match in re.finditer(r"\{([a-z_]+)\}", content):
            if match[1] not in known and (meant := near(match[1], known)):
                raise CommandError(f"unknown placeholder {match[0]} in the content of files.{name!r}{meant}")
