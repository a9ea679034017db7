"""What can be set in a run, and what is refused?  One frozen record, from Python, a YAML file or key=value.

Everything wrong with a config is refused here, before a model or a data set is opened.  A setting that would have no
effect under the others is wrong too: it is refused, not ignored.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reference_impl.objectives import OBJECTIVES

TRACKERS = ("tensorboard", "wandb")
RESERVED_SPLITS = ("train", "summary")


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, out of range or without effect; says what to do."""


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter (Hu et al. 2021) in place of full fine-tuning."""

    rank: int = 16
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of modules, or 'all-linear': every linear layer but the head."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapter, for example lm_head."""


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run.  Numbers of pairs count preferences, each two token rows."""

    # What is trained, on what
    model: str | None = None
    """The policy before training: a folder or a hub name.  May be passed to train() as a live model instead."""
    reference: str | None = None
    """The reference; null: the policy as it is when training starts."""
    tokenizer: str | None = None
    """Null: the policy's own."""
    train: str | None = None
    """Preferences: .jsonl, .json (also .gz), .parquet, or 'hub:name[:split]'."""
    eval: dict[str, str] = field(default_factory=dict)
    """Held-out sets: name → preferences."""
    output_dir: str | None = None
    """Null: nothing is written."""

    # Objective
    objective: Literal["dpo", "dpo_norm", "cdpo", "robust", "ipo", "hinge", "simpo"] = "dpo"
    beta: float = 0.1
    """Strength of the constraint to the reference; IPO's τ."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong: cdpo, robust."""
    gamma: float = 0.0
    """SimPO's margin itself, not the ratio γ/β."""
    ipo_length: Literal["sum", "mean"] = "sum"
    """IPO on sums of token log-probabilities (the paper), or on their means (its authors' later advice)."""
    sft_weight: float = 0.0
    """Weight of −log π(y_w|x)/|y_w| added to each pair's loss."""

    # Optimisation
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 5e-7
    momentum: float = 0.0
    """SGD's."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    epsilon: float = 1e-8
    """AdamW's."""
    weight_decay: float = 0.0
    """Decoupled under AdamW; acts on every trained parameter."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What follows the warm-up, down to 0 after the last step."""
    warmup_steps: int = 0
    warmup_first: Literal["positive", "zero"] = "positive"
    """Step k of w warm-up steps (k from 0) has (k + 1)/(w + 1) of the learning rate, or k/w: a first step of 0."""
    clip_norm: float | None = 1.0
    """Greatest global norm of the step's gradient; null: no clipping."""
    epochs: int | None = None
    """Passes over the data; 1 unless steps is given."""
    steps: int | None = None
    """Optimizer steps."""
    batch: int = 4
    """Pairs in a forward pass of one process."""
    accumulation: int = 1
    """Forward passes in an optimizer step: it has batch × accumulation pairs, which several processes share."""
    last_step: Literal["keep", "drop"] = "keep"
    """An epoch's last optimizer step when too few pairs are left for it: made of those, or left out."""
    shuffle: bool = True
    seed: int = 0

    # Numbers and memory
    dtype: Literal["bf16", "fp32", "fp64"] = "fp32"
    """bf16: float32 weights and optimizer, bfloat16 matrix products."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """torch.compile of each decoder layer."""
    lora: LoraSettings | None = None
    logps: Literal["auto", "chunked", "full"] = "auto"
    """How completions are scored; auto: chunked where the architecture's head is known."""
    device: str = "auto"
    """A torch device; auto: a GPU if there is one.  A live model stays where it is."""
    shard: int | None = None
    """Of several processes, how many share one copy of the weights; null: all.  Fewer: each group has a copy."""
    cpu_offload: bool = False
    """Of several processes, each keeps its part of weights and optimizer in the computer's memory, not the GPU's."""

    # Data
    max_length: int | None = 1024
    """Tokens of prompt and completion together."""
    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    # Reference
    reference_logps: Literal["online", "precomputed"] = "online"
    """Precomputed: once, before training, kept on disk; the reference then leaves memory."""
    reference_batch: int | None = None
    """Pairs in a forward pass while precomputing; null: batch."""
    reference_cache: str | None = None
    """Folder of precomputed log-probs; null: reference_cache in output_dir."""

    # Evaluation, checkpoints, reports
    eval_batch: int | None = None
    """Pairs in a forward pass; null: batch."""
    eval_every: int | None = None
    """Optimizer steps between evaluations; there is always one after the last step."""
    eval_at_start: bool = True
    """One more before the first step, to compare with."""
    confidence: float = 0.95
    """Coverage of the intervals of an evaluation."""
    save_every: int | None = None
    """Optimizer steps between checkpoints; null: none but on SIGTERM."""
    keep_last: int | None = None
    """Checkpoints kept; null: all."""
    resume: str = "auto"
    """'auto': from the newest whole checkpoint in output_dir, if any; 'never'; or a checkpoint's folder."""
    print_every: int = 1
    trackers: tuple[str, ...] = ()
    """Beside metrics.jsonl: tensorboard, wandb."""

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ConfigError(problem)

    @property
    def pairs_per_step(self) -> int:
        return self.batch * self.accumulation


def _problems(c: TrainConfig) -> Any:
    """Messages, the first of which is reported."""
    yield from _type_problems(c)
    yield from _range_problems(c)
    yield from _objective_problems(c)
    yield from _combination_problems(c)


def _type_problems(c: TrainConfig) -> Any:
    # OmegaConf has checked the types of what comes from a file; this is for records made in Python.
    for name in _FLOATS | _INTS | _BOOLS:
        value = getattr(c, name)
        if value is None and name in _OPTIONAL:
            continue
        if name in _BOOLS:
            wanted, good = "true or false", isinstance(value, bool)
        elif name in _INTS:
            wanted, good = "a whole number", isinstance(value, int) and not isinstance(value, bool)
        else:
            wanted, good = "a number", isinstance(value, int | float) and not isinstance(value, bool)
        if not good:
            yield f"{name} is {value!r}, but should be {wanted}"
    for name in _STRINGS:
        if not isinstance(getattr(c, name), str) and not (getattr(c, name) is None and name in _OPTIONAL):
            yield f"{name} is {getattr(c, name)!r}, but should be a text"
    for name, allowed in _CHOICES.items():
        if getattr(c, name) not in allowed:
            yield f"{name} is {getattr(c, name)!r}, but should be one of {', '.join(allowed)}"


def _range_problems(c: TrainConfig) -> Any:
    for name in sorted(_FLOATS):
        value = getattr(c, name)
        if value is not None and not math.isfinite(value):
            yield f"{name} is {value}, but should be finite"
    for name in ("beta", "epsilon", "clip_norm"):
        if getattr(c, name) is not None and getattr(c, name) <= 0:
            yield f"{name} is {getattr(c, name)}, but should be above 0{_ZERO_HINTS.get(name, '')}"
    for name in ("learning_rate", "momentum", "weight_decay", "sft_weight", "gamma", "warmup_steps", "seed"):
        if getattr(c, name) < 0:
            yield f"{name} is {getattr(c, name)}, but should be at least 0"
    for name in _INTS - {"warmup_steps", "seed", "max_length"}:
        if getattr(c, name) is not None and getattr(c, name) < 1:
            yield f"{name} is {getattr(c, name)}, but should be at least 1"
    if c.max_length is not None and c.max_length < 2:
        yield f"max_length is {c.max_length}, but a prompt and a completion token need at least 2"
    if len(c.betas) != 2 or not all(isinstance(b, float | int) and 0 <= b < 1 for b in c.betas):
        yield f"betas is {c.betas}, but should be two numbers, each at least 0 and below 1"
    if not 0 < c.confidence < 1:
        yield f"confidence is {c.confidence}, but should be between 0 and 1, for example 0.95"
    if c.lora is not None and (c.lora.rank < 1 or c.lora.alpha <= 0 or not c.lora.targets):
        yield f"lora is {c.lora}, but rank should be at least 1, alpha above 0, and targets not empty"


def _objective_problems(c: TrainConfig) -> Any:
    acting = OBJECTIVES[c.objective].options
    for name in ("label_smoothing", "gamma", "ipo_length"):
        if name not in acting and getattr(c, name) != _DEFAULTS[name]:
            users = ", ".join(key for key, value in OBJECTIVES.items() if name in value.options)
            yield f"{name}={getattr(c, name)} has no effect under objective={c.objective}: it acts on {users}"
    if c.objective == "robust" and not 0 <= c.label_smoothing < 0.5:
        yield f"label_smoothing is {c.label_smoothing}, but robust divides by 1 − 2ε: it should be in [0, 0.5)"
    if c.objective == "cdpo" and not 0 <= c.label_smoothing <= 0.5:
        yield f"label_smoothing is {c.label_smoothing}, but should be in [0, 0.5]: above, the labels are reversed"
    if not OBJECTIVES[c.objective].reference:
        for name in ("reference", "reference_logps"):
            if getattr(c, name) != _DEFAULTS[name]:
                yield f"{name}={getattr(c, name)} has no effect: {c.objective} has no reference"


def _combination_problems(c: TrainConfig) -> Any:
    def only(names: Sequence[str], acts: bool, rule: str) -> Any:
        for name in names:
            if not acts and getattr(c, name) != _DEFAULTS[name]:
                yield f"{name}={getattr(c, name)} has no effect: {rule}"

    yield from only(["momentum"], c.optimizer == "sgd", "it is SGD's, and optimizer=adamw")
    yield from only(["betas", "epsilon"], c.optimizer == "adamw", "it is AdamW's, and optimizer=sgd")
    yield from only(["warmup_first"], c.warmup_steps > 0, "there is no warm-up, warmup_steps=0")
    yield from only(
        ["reference_batch", "reference_cache"], c.reference_logps == "precomputed", "reference_logps=online"
    )
    yield from only(["keep_last"], c.save_every is not None, "no checkpoints are asked for: set save_every")
    if c.epochs is not None and c.steps is not None:
        yield f"epochs={c.epochs} and steps={c.steps} are both given: give one"
    if c.steps is not None and c.warmup_steps >= c.steps and c.warmup_steps > 0:
        yield f"warmup_steps is {c.warmup_steps}, but should be below steps={c.steps}"
    for name in c.eval:
        if name in RESERVED_SPLITS or not name or "/" in name:
            yield f"eval has a set named {name!r}: the names train and summary are taken, and / is not allowed"
    for name in c.trackers:
        if name not in TRACKERS:
            yield f"trackers has {name!r}, but knows {', '.join(TRACKERS)}; metrics.jsonl is always written"


def check_folders(config: TrainConfig) -> None:
    """Raises ConfigError for a setting that needs a folder where none is given (train() may be passed one)."""
    if config.output_dir is not None:
        return
    for name in ("save_every", "trackers"):
        if getattr(config, name):
            raise ConfigError(f"{name}={getattr(config, name)} needs output_dir")
    if config.reference_logps == "precomputed" and config.reference_cache is None:
        raise ConfigError("reference_logps=precomputed needs a folder: set output_dir or reference_cache")


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config of a YAML file, if one is given, with key=value settings laid over it.

    `${name}` in a value is another setting, `${oc.env:NAME}` an environment variable; both are resolved here.

    Raises:
        ConfigError: one line, with the key and what would be right.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    _refuse_repeats(overrides)
    try:
        layers = [OmegaConf.structured(TrainConfig)]
        if file is not None:
            layers.append(OmegaConf.load(file))
        layers.append(OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_object(OmegaConf.merge(*layers))
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"{str(file)!r} is neither a file nor a setting: write key=value or a YAML file") from error
    except OSError as error:
        raise ConfigError(f"config file {file}: {error.strerror or error}") from error
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(_one_line(error, file)) from error


def to_yaml(config: TrainConfig) -> str:
    """Every setting, resolved, as YAML that load_config reads back to an equal record."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _refuse_repeats(overrides: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals:
            raise ConfigError(f"{item!r} is not a setting: write key=value")
        if key in seen:
            raise ConfigError(f"{key} is set twice: {seen[key]} and {item}")
        seen[key] = item


def _one_line(error: Exception, file: str | Path | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = next((line for line in lines if line.startswith("full_key: ")), "").removeprefix("full_key: ")
    kept = [line for line in lines if not line.startswith(("full_key", "object_type", "reference_type"))]
    text = " ".join(kept).replace("'TrainConfig'", "the config")
    text = text.replace("TupleConfig length", "betas: length")  # the one list of a fixed length; no key is given
    return f"{where}: {text}" if where and where not in text else text or f"{file}: {type(error).__name__}"


_DEFAULTS = {
    f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
    for f in dataclasses.fields(TrainConfig)
}
_HINTS = {f.name: str(f.type) for f in dataclasses.fields(TrainConfig)}
_FLOATS = {name for name, hint in _HINTS.items() if hint.startswith("float")}
_INTS = {name for name, hint in _HINTS.items() if hint.startswith("int")}
_STRINGS = {name for name, hint in _HINTS.items() if hint.startswith("str")}
_BOOLS = {name for name, hint in _HINTS.items() if hint == "bool"}
_OPTIONAL = {name for name, hint in _HINTS.items() if hint.endswith("| None")}
_CHOICES: dict[str, tuple[str, ...]] = {
    name: ast.literal_eval(f"({hint.removeprefix('Literal[').removesuffix(']')},)")
    for name, hint in _HINTS.items()
    if hint.startswith("Literal[")
}
_ZERO_HINTS = {"beta": ": at 0 the loss is log 2 whatever the policy does", "clip_norm": ", or null for no clipping"}
