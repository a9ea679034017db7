"""What can be asked of a DPO trainer, as plain data.

An experiment is a frozen record of numbers, token ids or text, an `Objective` and a `Recipe`: no tensors, no models,
no code.  Four kinds, from fine to coarse:

    LossExperiment    four log-prob vectors                     -> the loss, its rewards, its slopes
    LogpExperiment    a table model, token rows, masks          -> log pi(completion given prompt) of each row
    StepExperiment    two table models, token pairs             -> loss, metrics, gradient of every logit
    TrainExperiment   two models, text rows, a recipe           -> the trained model and its history

What is seen in answer stands in `observation.py`.  This file imports numpy and nothing else: it is read on both
sides, the worker's and the judge's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

VERSION = 1  # of the records below; a change that alters the meaning of a stored experiment raises it

DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
KINDS = ("sigmoid", "robust", "hinge", "ipo", "simpo", *DIVERGENCES)


@dataclass(frozen=True)
class Objective:
    """The loss that is asked for.

    `sigmoid` is DPO (Rafailov et al. 2023, Eq. 7); with `label_smoothing` it is cDPO (Mitchell 2023, Eq. 3).  `robust`
    is rDPO (Chowdhury et al. 2024), `hinge` SLiC on beta*h (Liu et al. 2023), `ipo` Azar et al. 2023, Eq. 17 with
    beta in the place of tau, `simpo` Meng et al. 2024, Eq. 6 (`gamma` is subtracted from the logit, not times beta).
    `forward_kl`, `js_divergence` and `alpha_divergence`, with 0 < `alpha` < 1, are DPO under another divergence than
    the reverse KL (Wang et al. 2023): f'(u) stands for the logarithm of u = pi/ref of each completion.
    `length_normalised` divides every log-prob by its number of completion tokens.  `sft_weight` adds that multiple of
    the mean negative log-likelihood of the chosen completions.
    """

    kind: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.0
    sft_weight: float = 0.0
    length_normalised: bool = False
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.kind == "alpha_divergence" and not 0.0 < self.alpha < 1.0:
            raise ValueError(f"alpha is {self.alpha}; an alpha divergence needs one between 0 and 1")
        if self.kind not in KINDS:
            raise ValueError(f"unknown objective {self.kind!r}; known: {', '.join(KINDS)}")


# ------------------------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Table:
    """A language model that is a table: `logit[context, target]` after the last token `context`, in nats.

    Sparse, so that a counterexample prints: every cell is `base` but for `entries`, (context, target, logit) each.
    """

    size: int
    base: float = 0.0
    entries: tuple[tuple[int, int, float], ...] = ()

    def logits(self) -> np.ndarray:
        """(context, target) float64."""
        cells = np.full((self.size, self.size), self.base, dtype=np.float64)
        for context, target, logit in self.entries:
            cells[context, target] = logit
        return cells

    @staticmethod
    def of(logits: np.ndarray, base: float = 0.0) -> Table:
        """The table of a dense (context, target) array."""
        entries = [(int(u), int(v), float(logits[u, v])) for u, v in zip(*np.nonzero(logits != base), strict=True)]
        return Table(logits.shape[0], base, tuple(entries))

    def shifted(self, *cells: tuple[int, int, float]) -> Table:
        """The same table with the given (context, target, change) added."""
        logits = self.logits()
        for context, target, change in cells:
            logits[context, target] += change
        return Table.of(logits, self.base)


@dataclass(frozen=True)
class Body:
    """How a table, or no table, becomes a stock Llama checkpoint.

    `silent`: layers that add nothing; the logits are the table exactly.  `glass`: one layer lets the attended tokens
    through into coordinates whose head columns start at zero; still the table exactly, and the gradient of those
    columns tells which tokens were attended.  `clock`: glass with attention weights that depend on relative position.
    `speaking`: an ordinary small Llama, for what tables cannot see; its weights follow from a formula.
    Dropout rates are written into the model's configuration.
    """

    kind: str = "silent"
    layers: int = 1
    hidden: int = 16
    attention_dropout: float = 0.0


# ---------------------------------------------------------------------------------------------------------- tokenizer


@dataclass(frozen=True)
class Template:
    """A chat template as data: the text around each role's content, and what asks for a reply.

    `eos` says whether the template itself ends an assistant message with the end-of-sequence token.
    """

    user: tuple[str, str] = ("", "")
    assistant: tuple[str, str] = ("", "")
    system: tuple[str, str] = ("", "")
    generation_prompt: str = ""
    eos: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as data.  Ids 0, 1, ... are the `words`; the last four ids of `size` are unk, bos, eos and pad.

    `kind` "words" splits at white space, one word one token.  "characters" makes each character a token (a space too);
    `merge` is then at most one pair of characters that become one token, the last of `words`.
    `adds_bos`: the tokenizer puts its BOS before every text, as Llama's does.  `pad_is_eos`: padding uses EOS's id.
    """

    words: tuple[str, ...]
    size: int
    kind: str = "words"
    merge: tuple[str, str] | None = None
    adds_bos: bool = False
    pad_is_eos: bool = False
    template: Template | None = None

    def __post_init__(self) -> None:
        if len(self.words) > self.size - 4:
            raise ValueError(f"{len(self.words)} words do not fit a vocabulary of {self.size} with four special tokens")

    unk = property(lambda self: self.size - 4)
    bos = property(lambda self: self.size - 3)
    eos = property(lambda self: self.size - 2)
    pad = property(lambda self: self.eos if self.pad_is_eos else self.size - 1)
    special = ("<unk>", "<s>", "</s>", "<pad>")

    def id(self, word: str) -> int:
        return self.words.index(word) if word in self.words else self.size - 4 + self.special.index(word)

    def word(self, token: int) -> str:
        if token < len(self.words):
            return self.words[token]
        return self.special[token - (self.size - 4)] if token >= self.size - 4 else f"<{token}>"


# -------------------------------------------------------------------------------------------------------- experiments


@dataclass(frozen=True)
class LossExperiment:
    """Four log-probs per pair, in nats, and the objective.  `lengths`: completion tokens of (chosen, rejected).

    The loss is called `calls` times on the same numbers, and the last answer is looked at.
    """

    policy_chosen: tuple[float, ...]
    policy_rejected: tuple[float, ...]
    reference_chosen: tuple[float, ...]
    reference_rejected: tuple[float, ...]
    objective: Objective = Objective()
    lengths: tuple[tuple[int, int], ...] | None = None
    dtype: str = "float64"
    calls: int = 1

    def arguments(self) -> np.ndarray:
        """(4, pair): policy chosen, policy rejected, reference chosen, reference rejected."""
        return np.array([self.policy_chosen, self.policy_rejected, self.reference_chosen, self.reference_rejected])


@dataclass(frozen=True)
class TokenRow:
    """One row of a token batch: ids, which positions are real, which are completion.  Padding is explicit."""

    ids: tuple[int, ...]
    attention: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class LogpExperiment:
    """log pi(completion given prompt) of each row under a table model.  All rows have one width."""

    table: Table
    rows: tuple[TokenRow, ...]
    body: Body = Body()
    dtype: str = "float32"


@dataclass(frozen=True)
class Pair:
    """One preference in token ids; completions include their EOS."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True)
class StepExperiment:
    """One step on one batch: the loss, the metrics and the gradient of every logit.

    `padding` is the side pads are put on, `pad` their id.  `calls` steps are taken on the same batch with a learning
    rate of zero, and the last is looked at: what a call leaves behind shows in the next.
    """

    policy: Table
    reference: Table
    pairs: tuple[Pair, ...]
    objective: Objective = Objective()
    body: Body = Body()
    pad: int = 0
    eos: int = 0
    padding: str = "right"
    dtype: str = "float32"
    calls: int = 1


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One preference as a dataset holds it: strings, or tuples of messages; `prompt` None: no such column."""

    prompt: str | tuple[Message, ...] | None
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]

    def record(self) -> dict[str, Any]:
        """The row as a dataset's dictionary."""

        def plain(value: Any) -> Any:
            return value if isinstance(value, str) else [dataclasses.asdict(message) for message in value]

        row = {} if self.prompt is None else {"prompt": plain(self.prompt)}
        return row | {"chosen": plain(self.chosen), "rejected": plain(self.rejected)}


@dataclass(frozen=True)
class Lora:
    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """How to train.  In an experiment `learning_rate` is in logits (a step moves a logit by rate * gradient);
    the recipe that a trainer is handed is the translated one (`probes.tables.translate`).

    `world_size` processes run together, as torchrun starts them.  `batch` and `eval_batch` are of one process: a step
    sees batch * accumulation * world_size pairs, and N processes equal one with N times the batch."""

    objective: Objective = Objective()
    optimizer: str = "sgd"
    learning_rate: float = 16.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    steps: int | None = 1
    epochs: int | None = None
    batch: int = 1  # pairs in a micro-batch of one process
    accumulation: int = 1  # micro-batches in a step
    drop_last: bool = False
    clip_norm: float | None = None
    seed: int = 0
    shuffle: bool = False
    dtype: str = "float32"
    max_length: int | None = None
    truncation: str = "keep_start"
    precompute_reference: bool = False
    eval_batch: int = 8
    eval_every: int | None = None  # steps; None: once, at the end
    save_every: int | None = None  # steps; None: no checkpoints
    resume_from: int | None = None  # the step whose checkpoint, left by an earlier run in the same folder, to resume
    lora: Lora | None = None
    defaults: bool = False  # leave to the trainer whatever it does not need to be told: what people run
    world_size: int = 1  # processes ("ranks")


@dataclass(frozen=True)
class TrainExperiment:
    """A whole run.  `reference` None: no reference is handed over, and the trainer must use the policy it was given.

    `edited`: the checkpoint on disk is `edited`, and the model in memory was changed to `policy` after it was loaded.
    `evaluation` names held-out sets.  `rows_on_disk`: rows are handed over as a JSONL file, not as a list.
    """

    policy: Table | None
    reference: Table | None
    tokenizer: Tokenizer
    rows: tuple[Row, ...]
    recipe: Recipe = Recipe()
    evaluation: tuple[tuple[str, tuple[Row, ...]], ...] = ()
    body: Body = Body()
    edited: Table | None = None
    rows_on_disk: bool = False


@dataclass(frozen=True)
class Sequence:
    """Runs that share one working folder and one cache folder: resume, a stale cache, the same call twice.

    Always run fresh, in order, never answered from memory.
    """

    runs: tuple[TrainExperiment, ...]


@dataclass(frozen=True)
class TextExperiment:
    """Which token rows is the policy fed?  Text or chat rows, one pair a step, on the tokenizer in the folder named."""

    tokenizer: str
    rows: tuple[Row, ...]
    objective: Objective = Objective(beta=0.5)


Experiment = LossExperiment | LogpExperiment | StepExperiment | TrainExperiment | Sequence


def ranks_of(experiment: Experiment) -> int:
    """How many processes an experiment asks for."""
    if isinstance(experiment, Sequence):
        return max(ranks_of(run) for run in experiment.runs)
    return experiment.recipe.world_size if isinstance(experiment, TrainExperiment) else 1


# -------------------------------------------------------------------------------------------------------------- JSON

_RECORDS = {record.__name__: record for record in (
    Objective, Table, Body, Template, Tokenizer, LossExperiment, TokenRow, LogpExperiment, Pair, StepExperiment,
    Message, Row, Lora, Recipe, TrainExperiment, TextExperiment, Sequence,
)}  # fmt: skip


def to_plain(value: Any) -> Any:
    """A record as JSON data; each record carries its name under `type`.  Non-finite floats become strings."""
    if value is None or type(value) in (int, str, bool) or (type(value) is float and math.isfinite(value)):
        return value  # nearly all there is: tables have thousands of numbers
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__} | fields
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return {"type": "float", "value": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(data: Any) -> Any:
    """The record that `to_plain` wrote.  Raises ValueError on an unknown record or field."""
    if isinstance(data, list):
        return tuple(from_plain(item) for item in data)
    if not isinstance(data, dict):
        return data
    data = dict(data)
    name = data.pop("type", None)
    if name == "float":
        return float(data["value"])
    if name not in _RECORDS:
        raise ValueError(f"unknown record {name!r}; known: {', '.join(sorted(_RECORDS))}")
    known = {f.name for f in dataclasses.fields(_RECORDS[name])}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{name} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return _RECORDS[name](**{key: from_plain(item) for key, item in data.items()})


def key(experiment: Experiment) -> str:
    """sha256 of the canonical JSON and the records' version: the name under which an observation is remembered.

    It is kept beside the record, which never changes.
    """
    if "_key" not in experiment.__dict__:
        text = json.dumps([VERSION, to_plain(experiment)], sort_keys=True, separators=(",", ":"), allow_nan=False)
        experiment.__dict__["_key"] = hashlib.sha256(text.encode()).hexdigest()
    return experiment.__dict__["_key"]
