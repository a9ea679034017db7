"""READ FIRST.  What a trainer has to offer to be audited: the adapter, its records, and the legend of shapes.

An adapter is any class with one or more of four methods.  Each method it has is a *capability*; what it lacks is
derived from the coarser ones, so `train` alone, 15 to 30 lines, is enough for nearly the whole catalogue.

    class Adapter:
        says = Says(eos="appended")                      # what the trainer's own documentation promises

        def train(self, probe, rows, recipe, folder):
            policy = probe.policy()                      # a transformers model; probe.policy_path is its checkpoint
            ...                                          # train it with your trainer, as `recipe` asks
            return TrainOut(policy=policy, history=...)

Several processes.  `ranks = True` on the class says that `train` may run as one of N processes, each started with
torchrun's variables in its environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); there is no GPU, so
that the group is gloo's.  `recipe.world_size` is N, `recipe.batch` the pairs of one process in a micro-batch.  All call
`train` with the same arguments and the same folder.  The first one's `TrainOut` is read: its policy holds whole
weights, or names the folder where they were saved.  The others return the same, or None.  A process is used for another
run if the trainer left its group, or if the class says `keeps_group = True`: the next run works in the same group.

Shapes: pair = number of preference pairs in a batch, row = 2 * pair rows, **chosen rows first, then rejected**,
token = padded length.  Log-probs are *sums* over completion tokens, in nats.  Keyword names are the contract.

What a trainer cannot do, the adapter says with `raise Unsupported("ipo")`: the checks that need it become
not-applicable, with that reason, never a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from dpocheck.experiment import Objective, Recipe

__all__ = [
    "CAPABILITIES", "Adapter", "LossOut", "Objective", "PairBatch", "Probe", "Recipe", "Says", "StepOut", "TokenBatch",
    "TrainOut", "Unsupported", "refuse_others",
]  # fmt: skip

CAPABILITIES = ("loss", "sequence_logps", "step", "train")


class Unsupported(Exception):
    """The trainer does not offer what the experiment asks for; the message says what."""


def refuse_others(recipe: Recipe, *told: str, **only: tuple[Any, ...]) -> None:
    """Raise Unsupported for what a recipe asks for and this adapter does not pass on to its trainer.

    `told`: fields of `Recipe` and of its `Objective` (dpocheck/experiment.py) that the adapter passes on, whatever they
    hold; `only`: those with the values it can pass on, as `kind=("sigmoid", "ipo")`.  Every other field has to hold its
    default.  An adapter that begins so ignores nothing in silence, which would count against its trainer.
    Raises TypeError for a name that is no field.
    """
    usual, seen = Recipe(), set()
    for asked, ordinary in ((recipe, usual), (recipe.objective, usual.objective)):
        for one in fields(asked):
            seen.add(one.name)
            value = getattr(asked, one.name)
            allowed = only.get(one.name, (getattr(ordinary, one.name),))
            if one.name not in ("objective", *told) and value not in allowed:
                raise Unsupported(f"{one.name} {value}")
    if unknown := sorted({*told, *only} - seen):
        raise TypeError(f"a recipe has no field {', '.join(unknown)}; it has {', '.join(sorted(seen))}")


@dataclass(frozen=True)
class Says:
    """What the trainer's own documentation promises.  None: it says nothing, and what is measured is reported.

    A finding needs a promise or a theorem: what neither the sources nor the trainer's documentation say is reported
    as a convention, never as a failure.
    """

    eos: str | None = None  # "appended": EOS is added to a text completion; "none": only what text or template says
    bos: str | None = None  # "none", "tokenizer": what the tokenizer adds; "added"
    truncation: str | None = None  # "keep_start", "keep_end", "drop"
    ipo: str | None = None  # "sum" or "mean" of the log-probs
    reward_scale: str | None = None  # "beta": logged rewards are beta * log-ratio; "one": without beta
    reduction: str | None = None  # of `loss`: "none", "mean", "sum"
    uneven_accumulation: str | None = None  # "pairs": every pair weighs the same; "micro-batches": mean of means
    # of a batch that does not fill all processes: "repeated", rows from the start of the epoch fill it and count again;
    # None or "kept": each pair counts once
    uneven_ranks: str | None = None
    # "bfloat16" or "float16": what the reference's weights and logits are in, whatever the policy's are (the
    # log-softmax is that of the policy); None: what the policy's are
    reference_dtype: str | None = None
    objectives: tuple[str, ...] | None = None  # the kinds offered; None: ask and see, but for divergences
    options: tuple[str, ...] = ()  # further options the documentation promises to honour


@dataclass(frozen=True)
class LossOut:
    """What `loss` may return instead of a bare tensor: per-pair losses (pair,) or a scalar, and implicit rewards."""

    loss: Any
    rewards_chosen: Any = None  # (pair,)
    rewards_rejected: Any = None


@dataclass(frozen=True)
class TokenBatch:
    """Token rows: three integer tensors (row, token)."""

    input_ids: Any
    attention_mask: Any
    completion_mask: Any  # 1 at completion tokens, EOS included; 0 at prompt and padding


@dataclass(frozen=True)
class PairBatch(TokenBatch):
    """The same with row = 2 * pair: chosen rows first, then rejected, in the same order."""

    pad_token_id: int = 0

    @property
    def pairs(self) -> int:
        return self.input_ids.shape[0] // 2


@dataclass(frozen=True)
class StepOut:
    """What `step` returns: the loss, a scalar, and metrics by TRL's names.  Gradients are left in the policy."""

    loss: Any
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainOut:
    """What `train` returns.

    `policy`: the trained model, or the folder it was saved in.  `history`: one entry per log line, each
    `{"step": int, "split": str, "metrics": {name: number}}`, numbers as the trainer logs them, by TRL's names
    (`loss`, `grad_norm`, `learning_rate`, `rewards/chosen`, `rewards/rejected`, `rewards/margins`,
    `rewards/accuracies`, `logps/chosen`, `logps/rejected`); `split` is "train", an evaluation set's name or "summary".
    `checkpoints`: step -> folder.  `decimals`: the places after the point that the trainer rounds a metric of the split
    "train" to before it logs it, as `{"loss": 4}` for transformers before 5.
    """

    policy: Any
    history: Sequence[Mapping[str, Any]] = ()
    checkpoints: Mapping[int, str | Path] = field(default_factory=dict)
    decimals: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """The models and the tokenizer of an experiment, as checkpoint folders and, when asked for, as live objects.

    `policy()`, `reference()` (None where the experiment hands over none) and `tokenizer()` load them with
    transformers, anew at each call: a second `policy()` is a copy, as a reference needs.  The policy is edited in
    memory where the experiment says so.
    """

    policy_path: Path
    reference_path: Path | None
    tokenizer_path: Path
    load: Callable[[str], Any] = field(repr=False, compare=False, default=None)  # type: ignore[assignment]

    def policy(self) -> Any:
        return self.load("policy")

    def reference(self) -> Any | None:
        return None if self.reference_path is None else self.load("reference")

    def tokenizer(self) -> Any:
        return self.load("tokenizer")


class Adapter(Protocol):
    """Any subset of the methods."""

    says: Says = Says()

    def loss(
        self, policy_chosen: Any, policy_rejected: Any, reference_chosen: Any, reference_rejected: Any, *,
        objective: Objective, lengths: Any = None,
    ) -> Any:  # fmt: skip
        """Four float vectors (pair,) -> per-pair losses (pair,), their mean or sum, or a `LossOut`."""

    def sequence_logps(self, model: Any, batch: TokenBatch) -> Any:
        """A causal LM and token rows -> (row,) summed log-probs of the completion tokens."""

    def step(self, policy: Any, reference: Any, batch: PairBatch, *, objective: Objective) -> StepOut:
        """One forward and backward; no optimizer step.  Gradients are left in `policy`."""

    def train(self, probe: Probe, rows: Mapping[str, Any], recipe: Recipe, folder: Path) -> TrainOut:
        """A whole run.  `rows`: "train" and evaluation sets by name, each a list of dicts or a JSONL path.

        `folder` is the run's own working folder; a run with `recipe.resume_from` gets the folder of the run it resumes.
        """


def capabilities(adapter: Any) -> tuple[str, ...]:
    """The capabilities an adapter offers, finest first."""
    return tuple(name for name in CAPABILITIES if callable(getattr(adapter, name, None)))
