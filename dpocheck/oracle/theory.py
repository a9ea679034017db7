"""Which choices does a prediction depend on?  A `Theory` names them all, stage by stage.

`PAPER` is what the papers say, with the commonest of the choices that they leave open.  Every other value is either
another *allowed* choice (`CONVENTIONS`) or a *known fault*.  The oracle predicts under any theory, so conventions, the
fitted equation, the name of the bug and the power of a check are one mechanism: predict under the alternatives, and
see which one the subject is nearest to.  The formulas of the papers stay free of all this; the theory composes them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Theory:
    """One way to compute DPO, right or wrong.  Stages in the order in which a trainer goes through them."""

    # rows and tokens
    columns: str = "given"  # "swapped": chosen and rejected exchanged in the data
    eos: str = "appended"  # to a text completion: "appended" once, "none", "twice"
    template_eos: str = "once"  # after a chat template that ends with EOS itself: "once", "twice"
    bos: str = "tokenizer"  # "tokenizer": as the tokenizer does; "none"; "added"; "inside" (the completion too)
    boundary: str = "joint"  # "joint": prompt+completion tokenised as one, split at the common prefix; "apart"
    prefix: str = "text"  # rows without prompt: "text" keeps all; "loses-shared" drops a shared item
    truncation: str = "asked"  # "asked", "keep_start", "keep_end", "drop", "none"
    eos_cut: str = "truncated"  # with truncation: EOS is cut with the rest; "restored": the last token becomes EOS

    # which positions count
    counted: str = "completion"  # "prompt", "last-prompt", "no-first", "no-eos", "eos-twice", "last-only", "padding",
    #                              "one-pad", "no-pad-id" (tokens equal to the pad id), "no-zero-id" (token id 0),
    #                              "unshifted" (logit t scored on token t), "mask-unshifted", "double-shift",
    #                              "chosen-mask" (the rejected row under the chosen row's mask), "longest-loses-last"
    counted_reference: str | None = None  # the reference's own rule; None: the same

    # log-probs
    logps: str = "sum"  # "mean", "mean-padded", "mean-batch"
    logps_reference: str | None = None  # None: the same
    normaliser: str = "logsumexp"  # "none" (raw logits), "max", "prob" (not log), "log2"
    temperature: float = 1.0  # logits are divided by it
    token_floor: float | None = None  # token log-probs are clamped from below

    # reference
    reference: str = "given"  # "policy-start", "policy-live", "disk" (the checkpoint, not the model in memory), "none",
    #                           "swapped" (its two rows), "rolled" (another pair's), "batch-mean", "policy-graph"
    reference_moves: float = 0.0  # moving average towards the policy, per step

    # loss
    kind: str | None = None  # another objective than the one asked for, e.g. "sigmoid" where "ipo" was asked
    coefficients: tuple[float, float, float, float] = (1.0, -1.0, -1.0, 1.0)  # of lp_w, lp_l, rf_w, rf_l in the logit
    beta_power: float = 1.0  # beta enters as beta ** power: 0 ignored, 2 twice, -1 inverted
    beta_scale: float = 1.0  # and times this
    beta_fixed: float | None = None  # or is a constant whatever was asked for
    beta_on: str = "logit"  # "policy": only the policy's half; "outside": -beta log sigma(h); "both"
    offset: float = 0.0  # added to the logit
    smoothing: str = "cdpo"  # "ignored", "robust", "swapped", "minus", "half", "unnormalised"
    smoothing_default: float = 0.0  # used where none was asked for
    link: str = "logsigmoid"  # "sigmoid", "minus-sigmoid", "logsigmoid-positive", "exp", "linear",
    #                           "focal", "tanh", "abs", "naive" (log of sigmoid), "epsilon" (log(sigmoid + 1e-8)), "log2"
    clamp: float | None = None  # |beta h| is clamped to it
    ipo_length: str = "sum"  # "mean": log-probs per token, as TRL
    gamma: str = "gamma"  # SimPO: "gamma" subtracted from the logit; "gamma-beta": gamma times beta; "ignored"
    margins: str = "own"  # "centred" over the batch, "standardised", "broadcast" (B x B)
    scale: float = 1.0  # of the loss and the gradient
    sft_extra: float = 0.0  # an undeclared multiple of -lp_w / length
    kl_extra: float = 0.0  # an undeclared multiple of (lp_w - rf_w)

    # gradient
    gradient_scale: float = 1.0  # of the gradient only
    detached: str = "none"  # "chosen", "rejected"
    weight: str = "sigmoid"  # of the gradient: "half" constant

    # reduction and step
    reduction: str = "mean"  # "sum", "none", "rows" (by 2B), "plus-one", "first", "no-last", "max", "tokens"
    uneven: str = "micro-batches"  # weights over an uneven window: "pairs", "micro-batches"
    accumulation: str = "mean"  # "sum", "twice" (divided twice), "last" (only it), "steps" (one each)
    incomplete_window: str = "stepped"  # "dropped"
    last_batch: str = "kept"  # "dropped", "padded"
    clip: str = "norm"  # "ignored", "micro", "value", "always"
    update: float = 1.0  # -1: ascent
    stale: str = "cleared"  # gradients of earlier steps: "kept"
    weight_decay_extra: float = 0.0
    momentum_extra: float = 0.0
    schedule: str = "asked"  # "constant", "linear", "cosine", per "micro-step"
    first_rate: str = "full"  # with warm-up: "full" (k+1)/w; "zero" k/w

    # metrics
    reward_scale: str = "beta"  # "one", "squared"
    rewards: str = "log-ratio"  # "swapped", "policy-only", "sum" (policy + reference), "clipped" at 5
    margin: str = "difference"  # "sum", "absolute", "policy"
    accuracy: str = "greater"  # "greater-equal", "half", "less", "logps", "positive"
    logps_logged: str = "sum"  # "mean", "swapped", "reference"
    window_metrics: str = "mean"  # over micro-batches: "last", "sum"
    loss_logged: str = "mean"  # over micro-batches: "last", "sum", "divided-twice"
    uneven_metrics: str = "micro-batches"  # "pairs": every pair weighs the same
    eval_metrics: str = "pairs"  # "batches": unweighted mean of batch means (exact where batches are equal)
    eval_loss: str = "pairs"  # "batches"
    eval_tail: str = "kept"  # "dropped"

    def differs(self, other: Theory | None = None) -> dict[str, object]:
        """The fields that differ from `other`, by default from `PAPER`."""
        other = other or PAPER
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)}

    def but(self, **changes: object) -> Theory:
        return replace(self, **changes)


PAPER = Theory()

# What the sources leave open: field -> the values that are all right, unless the trainer's documentation promises one.
CONVENTIONS: dict[str, tuple[object, ...]] = {
    "eos": ("appended", "none"),
    "bos": ("tokenizer", "none", "added"),
    "boundary": ("joint", "apart"),
    "truncation": ("asked", "keep_start", "keep_end", "drop"),
    "eos_cut": ("truncated", "restored"),
    "ipo_length": ("sum", "mean"),
    "gamma": ("gamma", "gamma-beta"),
    "reduction": ("mean", "sum", "none"),
    "uneven": ("micro-batches", "pairs"),
    "incomplete_window": ("stepped", "dropped"),
    "last_batch": ("kept", "dropped"),
    "first_rate": ("full", "zero"),
    "reward_scale": ("beta", "one"),
    "accuracy": ("greater", "greater-equal", "half"),
    "logps_logged": ("sum", "mean"),
    "uneven_metrics": ("micro-batches", "pairs"),
}

# Known faults, each one change of the paper: name -> the theory.  The names are what a report says.
FAULTS: dict[str, Theory] = {}


def fault(name: str, **changes: object) -> None:
    """Register a known fault under the words a report uses for it."""
    if name in FAULTS:
        raise ValueError(f"the fault {name!r} is registered twice")
    FAULTS[name] = PAPER.but(**changes)
