"""What do people call the parameters of a hand-written DPO function, and the keys of its batch?

The words of a name are read, not the whole name: `policy_chosen_logps`, `logp_w_policy`, `pi_yw_logp` and
`modelPreferredLogprob` all say *log-prob of the chosen completion under the policy*.  Standard library only: the judge
reads names from source text, the worker from live functions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

POLICY = {"policy", "pi", "model", "actor", "theta", "pol", "student", "trained", "online", "main"}
REFERENCE = {"ref", "reference", "refs", "frozen", "base", "sft", "old", "initial"}
CHOSEN = {
    "chosen", "w", "yw", "win", "winner", "winning", "preferred", "prefered", "pref", "positive", "pos", "accepted",
    "accept", "good", "better", "ch",
}  # fmt: skip
REJECTED = {
    "rejected", "reject", "l", "yl", "lose", "loser", "losing", "loss_side", "dispreferred", "disprefered", "dispref",
    "unpreferred", "nonpreferred", "negative", "neg", "bad", "worse", "rej", "rj",
}  # fmt: skip

# what a name is about: the first of these that one of its words belongs to
WHAT = {
    "optimizer": {"optimizer", "optimiser", "optim", "opt"},
    "ratio": {"ratio", "ratios", "delta", "deltas", "diff", "diffs", "difference", "d"},
    "reward": {"reward", "rewards"},
    "logp": {"logp", "lp", "lps", "ll"},
    "length": {"len", "lens", "length", "lengths", "start", "starts"},
    "attention": {"attention", "attn", "attend"},
    "completion": {"completionmask", "cmask", "cmasks"},
    "mask": {"mask", "masks"},
    "labels": {"label", "labels", "target", "targets"},
    "logits": {"logits", "logit"},
    "index": {"idx", "idxs", "index", "indices"},
    "ids": {"ids", "id", "tokens", "token", "seq", "seqs", "sequence", "sequences", "input", "inputs"},
}
MARGIN = {"margin", "margins", "h", "gap", "logit", "logits"}  # so some call h, the difference of the log-ratios
PROBS = {"prob", "probs"}  # so some call log-probs, where nothing but the model is said beside it
WHOLE = {"y", "completion", "response", "sequence", "concat", "concatenated", "full"}  # beside a side: its rows
PROMPT = {"prompt", "prompts", "query", "question", "context"}
COMPLETION = {"completion", "response", "resp", "answer", "loss", "selection", "action", "generation", "reply"}

_SPELLING = (
    (r"(?<=[a-z0-9])(?=[A-Z])", "_"),
    (r"(?<=[A-Z])(?=[A-Z][a-z])", "_"),
    (r"[βΒ]", "beta"),
    (r"π", "pi"),
    (r"θ", "theta"),
)
_COMPOUNDS = (
    (r"log_?(probabilit(y|ies)|probas?|probs?|ps?|likelihoods?)(?=_|$)", "logp"),
    (r"log_?pi(?=_|$)", "logp_pi"),
    (r"log_?ref(?=_|$)", "logp_ref"),
    (r"log_?ratios?(?=_|$)", "ratio"),
    (r"(non|not|dis|un)_?(preferred|prefered|chosen)", "rejected"),
    (r"(^|_)y_(w|l)(?=_|$)", r"\1\2"),
    (r"(attention|attn|attend|padding|pad|input)_?masks?(?=_|$)", "attention"),
    (r"(completion|response|resp|answer|loss|label|labels|selection|target|action|generation|reply|output)_?masks?(?=_|$)",
     "completionmask"),
    (r"input_?ids?(?=_|$)", "ids"),
    (r"sim_po(?=_|$)", "simpo"),
)  # fmt: skip

# the four log-probs in one or two letters; used only where all four of a set are there
ABBREVIATIONS = (("pc", "pr", "rc", "rr"), ("pw", "pl", "rw", "rl"), ("lw", "ll", "rw", "rl"))
FOUR = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")

# options by the names they go by; the values passed are chosen in `functions/options.py`
OPTIONS = {
    "beta": {"beta", "dpo_beta", "beta_dpo", "tau", "ipo_tau", "kl_beta", "beta_train"},
    "label_smoothing": {"label_smoothing", "smoothing", "label_smooth", "smooth", "label_noise", "cdpo_eps"},
    "kind": {"loss_type", "kind", "variant", "loss_kind", "loss_name", "dpo_type", "dpo_variant", "method"},
    "ipo": {"ipo", "use_ipo", "is_ipo"},
    "gamma": {"gamma", "simpo_gamma"},
    "gamma_beta_ratio": {"gamma_beta_ratio"},
    "reference_free": {"reference_free", "ref_free", "reference_less"},
    "use_reference": {"use_ref", "use_reference"},
    "average": {
        "average_log_prob", "average_log_probs", "average_logprob", "average_logps", "average", "avg", "return_average",
        "return_average_logprobs", "length_normalize", "length_normalized", "length_normalise", "normalize",
        "normalise", "normalize_length", "normalise_length", "mean", "use_mean", "take_mean", "length_norm",
        "normalize_by_length", "average_over_tokens",
    },
    "ignored": {"label_pad_token_id", "ignore_index", "ignore_id", "ignored_label", "label_pad"},
    "pad": {"pad_token_id", "pad_id", "pad", "padding_value", "padding_idx", "pad_idx", "pad_token"},
    "encoder_decoder": {"is_encoder_decoder"},
    "device": {"device"},
    "tokenizer": {"tokenizer"},
    "config": {"config", "cfg", "args", "hparams", "conf", "settings", "training_args", "loss_config"},
    "gradient": {"requires_grad", "with_grad", "enable_grad", "differentiable", "is_policy_model", "is_policy"},
    "reduction": {"reduction", "reduce"},
    "rank": {"rank", "local_rank", "process_index"},
    "processes": {"world_size", "num_processes"},
    "accelerator": {"accelerator", "fabric"},
    "scheduler": {"scheduler", "lr_scheduler", "sched"},
    "scaler": {"scaler", "grad_scaler"},
    "clip": {"max_grad_norm", "max_norm", "clip_norm", "grad_clip", "clip_grad_norm", "gradient_clip", "clip"},
    "pairs": {"batch_size", "bsz", "num_pairs", "n_pairs", "half"},
    "counter": {"step", "global_step", "epoch", "iteration", "batch_idx", "step_idx"},
    "accumulation": {"grad_accum", "accumulation_steps", "gradient_accumulation_steps", "accum_steps"},
}  # fmt: skip
ENCODED = {"enc", "encoded", "encoding", "encodings", "model_inputs"}  # what a tokenizer returned
BATCH = {"batch", "inputs", "examples", "data", "sample", "samples", "micro_batch", "minibatch", "pairs", "pair_batch"}
BARE_POLICY = {"policy", "model", "pi", "actor", "net", "student", "lm", "network", "causal_lm", "module"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a function.  `kind`: positional, keyword, star (`*args`) or stars (`**kwargs`)."""

    name: str
    kind: str = "positional"
    required: bool = True
    default: Any = None  # where it is a literal
    nullable: bool = False  # its annotation says that it may be None


@dataclass(frozen=True)
class Concept:
    """What a name is about.  Empty strings: the name does not say."""

    who: str = ""  # policy, reference
    which: str = ""  # chosen, rejected
    what: str = ""  # one of WHAT, or model
    prompt: bool = False
    completion: bool = False


class NotRecognised(Exception):
    """Nothing here has a form that is known; the message says what was given, what is allowed and what to do."""


def words(name: str) -> list[str]:
    """The words of a name, in lower case, compounds made one: `log_probs_yw` is logp, w."""
    for pattern, text in _SPELLING:
        name = re.sub(pattern, text, name)
    name = re.sub(r"\W+", "_", name.lower()).strip("_")
    for pattern, text in _COMPOUNDS:
        name = re.sub(pattern, text, name)
    return [word for word in name.split("_") if word]


def option(name: str) -> str | None:
    """The option that a parameter or attribute of this name sets."""
    plain = name.lower().lstrip("_").replace("β", "beta")
    said = {plain, plain.removeprefix("dpo_")}
    return next((key for key, names in OPTIONS.items() if said & names), None)


def concept(name: str) -> Concept:
    """Which model, which completion and which kind of thing a name speaks of."""
    said = words(name)
    found = set(said)
    which = "rejected" if found & REJECTED else "chosen" if found & CHOSEN else ""
    who = "reference" if found & REFERENCE else "policy" if found & POLICY else ""
    what = next((key for key, names in WHAT.items() if found & names), "")
    if not which and (who or what == "logp") and found & {"c", "r"}:
        which = "chosen" if "c" in found else "rejected"
    elif which and not who and found & {"p", "r"}:
        who = "policy" if "p" in found else "reference"
    if what == "mask" and found & COMPLETION:
        what = "completion"
    if not what and not which and who:
        what = "model" if who == "reference" or found <= POLICY | {"lm", "network", "net"} else ""
    elif not what and name.lower() in BARE_POLICY:
        who, what = "policy", "model"
    if what == "" and which and found <= CHOSEN | REJECTED | WHOLE:
        what = "side"  # `chosen` alone: the ids of a row, or all its tensors
    return Concept(who, which, what, bool(found & PROMPT), bool(found & COMPLETION))


def admits_none(annotation: str) -> bool:
    """`Tensor | None`, `Optional[Tensor]`"""
    return bool(re.search(r"\bNone\b|\bOptional\[", annotation))


def is_batch(name: str) -> bool:
    return name.lower() in BATCH


def spelled(parameters: tuple[Parameter, ...]) -> str:
    """A signature for people: `policy_chosen, ..., *, beta=0.1`."""
    parts, keyword = [], False
    for parameter in parameters:
        if parameter.kind == "keyword" and not keyword:
            keyword = True
            parts.append("*")
        name = {"star": "*", "stars": "**"}.get(parameter.kind, "") + parameter.name
        if not parameter.required and parameter.kind in ("positional", "keyword"):
            name += "=…" if parameter.default is None else f"={parameter.default!r}"
        keyword = keyword or parameter.kind == "star"
        parts.append(name)
    return ", ".join(parts)


