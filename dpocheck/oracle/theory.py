"""Which choices does a prediction depend on?  A `Theory` names them all, stage by stage.

`PAPER` is what the papers say, with the commonest of the choices that they leave open.  Every other value is either
another *allowed* choice (`CONVENTIONS`) or a *known fault*.  The oracle predicts under any theory, so conventions, the
fitted equation, the name of the bug and the power of a check are one mechanism: predict under the alternatives, and
see which one the subject is nearest to.  The formulas of the papers stay free of all this; the theory composes them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Literal, get_args, get_type_hints

Counted = Literal[
    "completion",
    "prompt",  # the prompt's tokens too
    "last-prompt",  # the last token of the prompt too
    "no-first",  # not the completion's first token
    "no-eos",  # not the completion's EOS
    "eos-twice",  # the completion's last token twice
    "last-only",
    "padding",  # every pad too
    "padding-by-side",  # every pad too, where chosen and rejected rows are each padded to their own longest
    "one-pad",  # the pad next to the completion too
    "no-pad-id",  # not tokens that have the pad's id
    "no-zero-id",  # not token id 0
    "unshifted",  # logit t scored on token t
    "unshifted-padding",  # and from the completion's first token to the end of the row
    "unshifted-all",  # and on the whole row
    "shifted-back",  # logit t + 1 scored on token t
    "double-shift",  # logit t - 2 scored on token t
    "mask-unshifted",  # labels shifted, mask not
    "chosen-mask",  # the rejected row under its chosen row's mask
    "longest-loses-last",  # the longest row of a batch loses its last token
]
Logps = Literal["sum", "mean", "mean-padded", "mean-batch"]


@dataclass(frozen=True)
class Theory:
    """One way to compute DPO, right or wrong.  Stages in the order in which a trainer goes through them.

    Raises ValueError for a value that no stage knows.
    """

    # rows and tokens
    columns: Literal["given", "swapped"] = "given"  # chosen and rejected exchanged in the data
    # rows 2i and 2i+1 of a batch laid out in halves; each chosen with the next pair's rejected
    pairing: Literal["given", "interleaved", "rolled"] = "given"
    # to a text completion that does not end with it; "always": to one that does as well; "between": not there but
    # before the completion, as its first token; "after-prompt": there, as the prompt's last
    eos: Literal["appended", "none", "twice", "always", "between", "after-prompt"] = "appended"
    template_eos: Literal["once", "twice", "ensured"] = "once"  # "once": as the chat template writes it
    bos: Literal["tokenizer", "none", "added", "inside", "twice"] = "tokenizer"  # "inside": in the completion too
    # prompt+completion tokenised as one and split at the common prefix, or apart; "cut": the joint tokens after the
    # first n, where the prompt alone has n tokens
    boundary: Literal["joint", "apart", "cut"] = "joint"
    # rows without a prompt; "loses-shared": the index of the last item compared is taken for the prefix's length
    prefix: Literal["text", "loses-shared"] = "text"
    # white space at the ends of texts, where there is a prompt; "stripped": of the completions; "one-between": of
    # the prompt too, and one space joins them
    spaces: Literal["kept", "stripped", "one-between"] = "kept"
    repeated_prompts: Literal["kept", "first"] = "kept"  # "first": of rows with one prompt only the first is kept
    truncation: Literal["asked", "keep_start", "keep_end", "drop", "none"] = "asked"
    eos_cut: Literal["truncated", "restored"] = "truncated"  # "restored": the last token kept is turned into EOS

    # which positions count, and what they see
    counted: Counted = "completion"
    counted_reference: Counted | None = None  # the reference's own rule; None: the same
    attention: Literal["masked", "pads", "equal-positions", "backwards", "future"] = "masked"

    # log-probs
    logps: Logps = "sum"
    logps_reference: Logps | None = None  # None: the same
    # "none": raw logits; "max": minus the greatest; "prob": not logarithms; "argmax": of the likeliest token
    normaliser: Literal["logsumexp", "none", "max", "prob", "log2", "argmax", "negated"] = "logsumexp"
    temperature: float = 1.0  # logits are divided by it
    token_floor: float | None = None  # token log-probs are clamped from below

    # models
    policy: Literal["memory", "disk"] = "memory"  # "disk": the checkpoint is trained, not the model handed over
    # "disk": the checkpoint, not the model in memory; "swapped": its two rows; "rolled": the next pair's;
    # "policy-graph": the live policy, and the gradient flows through it
    reference: Literal[
        "given", "policy-start", "policy-live", "policy-graph", "disk", "none", "swapped", "rolled", "batch-mean"
    ] = "given"
    reference_dtype: Literal["policy", "bfloat16", "float16"] = "policy"  # as declared: it widens bounds alone
    reference_moves: float = 0.0  # share of the policy that the reference takes over after each step
    # of precomputed log-probs; "stale": an earlier run's; "batch-position": row i of a batch gets those of row i
    cache: Literal["fresh", "stale", "batch-position", "bfloat16"] = "fresh"

    # loss
    kind: Literal["sigmoid", "robust", "hinge", "ipo", "simpo"] | None = None  # another objective than was asked for
    coefficients: tuple[float, float, float, float] = (1.0, -1.0, -1.0, 1.0)  # of lp_w, lp_l, rf_w, rf_l in the logit
    beta_power: float = 1.0  # beta enters as beta ** power: 0 ignored, 2 twice, -1 inverted
    beta_scale: float = 1.0  # and times this
    beta_fixed: float | None = None  # or is a constant whatever was asked for
    # "policy": only the policy's half; "outside": -beta log sigma(h); "both"; "divided": the loss over beta
    beta_on: Literal["logit", "policy", "outside", "both", "divided"] = "logit"
    offset: float = 0.0  # added to the logit
    smoothing: Literal["asked", "ignored", "robust", "swapped", "minus", "half", "unnormalised"] = "asked"
    smoothing_default: float = 0.0  # used where none was asked for
    link: Literal[
        "logsigmoid", "sigmoid", "minus-sigmoid", "logsigmoid-positive", "exp", "linear", "focal", "tanh", "abs",
        "naive", "log2",
    ] = "logsigmoid"  # "naive": log of sigmoid  # fmt: skip
    epsilon: float = 0.0  # log(sigmoid + epsilon)
    clamp: float | None = None  # |beta h| is clamped to it
    normalised: Literal["asked", "ignored", "always"] = "asked"  # log-probs per token, in SimPO and where asked
    ipo_length: Literal["sum", "mean"] = "sum"  # IPO on summed log-probs, or per token
    # "beta-inside": beta h in the place of h; "beta-squared": the whole times beta squared; "no-half": target 1/beta
    ipo: Literal["paper", "beta-inside", "beta-squared", "no-half"] = "paper"
    gamma: Literal["gamma", "gamma-beta", "ignored"] = "gamma"  # SimPO: subtracted from the logit; first times beta
    # under a divergence: f'(u) negated; f'(1/u); both, as with the sign of the exponent or the logarithm flipped
    derivative: Literal["paper", "negated", "inverted", "mirrored"] = "paper"
    alpha: Literal["asked", "one-minus"] = "asked"  # of the alpha divergence
    alpha_fixed: float | None = None  # or is a constant whatever was asked for
    margins: Literal["own", "centred", "standardised", "broadcast"] = "own"  # over the batch; B x B
    scale: float = 1.0  # of the loss and the gradient
    # the SFT term: mean over pairs of token means, over all tokens of a batch, or over pairs of token sums
    sft_mean: Literal["pair", "tokens", "sum"] = "pair"
    sft: Literal["added", "ignored", "replaces"] = "added"  # "replaces": the weight is on the preference term instead
    sft_extra: float = 0.0  # an undeclared multiple of -lp_w / length
    kl_extra: float = 0.0  # an undeclared multiple of (lp_w - rf_w)

    # gradient
    gradient_scale: float = 1.0  # of the gradient only
    detached: Literal["none", "chosen", "rejected"] = "none"
    weight: Literal["sigmoid", "half"] = "sigmoid"  # of the gradient; "half": that at margin 0, constant

    # reduction and step
    # "none": left to the caller, who takes the mean; "rows": by 2B; "plus-one": by B + 1; "nonzero": mean of the
    # losses that are not 0; "tokens": pairs weighted by their completion tokens
    reduction: Literal[
        "mean", "sum", "none", "rows", "plus-one", "first", "no-last", "max", "median", "nonzero", "tokens"
    ] = "mean"
    uneven: Literal["micro-batches", "pairs"] = "micro-batches"  # what weighs the same in a window
    # "sum": not divided; "twice": divided twice; "last": only the last micro-batch; "steps": each micro-batch is a
    # step; "updates": an update after each, of the divided gradient
    accumulation: Literal["mean", "sum", "twice", "last", "steps", "updates"] = "mean"
    # of an epoch; "carried": no step, and its gradients, divided as in a full one, are added to the next epoch's first
    # "full-divisor-ended": and the run ends after as many steps as its epochs have whole windows
    incomplete_window: Literal["stepped", "dropped", "full-divisor", "full-divisor-ended", "carried"] = "stepped"
    last_batch: Literal["kept", "dropped", "padded", "always-kept"] = "kept"  # "kept": unless `drop_last` asks
    # of a batch that does not fill all processes; "repeated": rows from the start of the epoch fill it
    ranks_tail: Literal["kept", "repeated"] = "kept"
    first_row: Literal["kept", "dropped"] = "kept"  # of each epoch
    clip_scale: float = 1.0  # of the threshold
    clip: Literal["norm", "ignored", "micro", "value", "always"] = "norm"
    update: float = 1.0  # -1: ascent
    stale: Literal["cleared", "kept"] = "cleared"  # gradients of earlier steps
    weight_decay_extra: float = 0.0
    momentum_extra: float = 0.0
    decay: Literal["decoupled", "coupled", "all"] = "decoupled"  # "coupled": momentum sees it; "all": the norm's too
    schedule: Literal["asked", "constant", "linear", "cosine", "micro-step"] = "asked"
    first_rate: Literal["full", "zero", "shifted", "skipped"] = "full"  # (k+1)/w; k/w; (k+1)/(w+1); no warm-up
    resume: Literal[
        "full", "data-restarts", "schedule-restarts", "momentum-lost", "reference-from-checkpoint", "skips-batch",
        "weights-bfloat16",
    ] = "full"  # fmt: skip

    # metrics
    reward_scale: Literal["beta", "one", "squared"] = "beta"
    reward_logps: Literal["loss", "sum"] = "loss"  # the log-probs of the loss (per token where normalised), or sums
    rewards: Literal["log-ratio", "swapped", "policy-only", "sum", "clipped"] = "log-ratio"  # "clipped": at 5
    margin: Literal["difference", "sum", "absolute", "policy"] = "difference"
    accuracy: Literal["greater", "greater-equal", "half", "less", "logps", "positive"] = "greater"
    logps_logged: Literal["sum", "mean", "swapped", "reference"] = "sum"
    window_metrics: Literal["mean", "last", "sum"] = "mean"  # over the micro-batches of a step
    loss_logged: Literal["mean", "last", "sum", "divided-twice"] = "mean"
    uneven_metrics: Literal["micro-batches", "pairs"] = "micro-batches"
    eval_metrics: Literal["pairs", "batches"] = "pairs"  # "batches": unweighted mean of batch means
    eval_loss: Literal["pairs", "batches"] = "pairs"
    eval_tail: Literal["kept", "dropped"] = "kept"  # the last, short batch
    norm_logged: Literal["whole", "clipped"] = "whole"  # of the gradient before clipping, or after it
    rate_logged: Literal["own", "next"] = "own"  # of the step that is logged, or of the one after it

    def __post_init__(self) -> None:
        for name, allowed in values().items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"no theory has {name}={getattr(self, name)!r}; known: {', '.join(map(str, allowed))}")

    def differs(self, other: Theory | None = None) -> dict[str, object]:
        """The fields that differ from `other`, by default from `PAPER`."""
        other = other or PAPER
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)}

    def but(self, **changes: object) -> Theory:
        return replace(self, **changes)


@cache
def values() -> dict[str, tuple[str | None, ...]]:
    """Field -> the values it may have, of every field that is a choice among words."""

    def words(hint: object) -> tuple[str | None, ...]:
        if isinstance(hint, str) or hint is None:
            return (hint,)
        if hint is type(None):
            return (None,)
        return tuple(word for part in get_args(hint) for word in words(part))

    hints = get_type_hints(Theory)
    return {name: found for name in hints if len(found := words(hints[name])) > 1}


PAPER = Theory()

# What the sources leave open: field -> the values that are all right, unless the trainer's documentation promises one.
CONVENTIONS: dict[str, tuple[object, ...]] = {
    "eos": ("appended", "none"),
    "template_eos": ("once", "ensured"),
    "bos": ("tokenizer", "none", "added"),
    "boundary": ("joint", "apart"),
    "truncation": ("asked", "keep_start", "keep_end", "drop"),
    "eos_cut": ("truncated", "restored"),
    "ipo_length": ("sum", "mean"),
    "gamma": ("gamma", "gamma-beta"),
    "sft_mean": ("pair", "tokens"),
    "reduction": ("mean", "sum", "none"),
    "uneven": ("micro-batches", "pairs"),
    "incomplete_window": ("stepped", "dropped"),
    "last_batch": ("kept", "dropped"),
    "decay": ("decoupled", "coupled", "all"),
    "first_rate": ("full", "zero", "shifted"),
    "reward_scale": ("beta", "one"),
    "reward_logps": ("loss", "sum"),
    "accuracy": ("greater", "greater-equal", "half"),
    "logps_logged": ("sum", "mean"),
    "uneven_metrics": ("micro-batches", "pairs"),
    "norm_logged": ("whole", "clipped"),
    "rate_logged": ("own", "next"),
}

# Known faults, each one change of the paper: name -> the theory.  The names are what a report says.
FAULTS: dict[str, Theory] = {}


def fault(name: str, **changes: object) -> None:
    """Register a known fault under the words a report uses for it."""
    if name in FAULTS:
        raise ValueError(f"the fault {name!r} is registered twice")
    FAULTS[name] = PAPER.but(**changes)
