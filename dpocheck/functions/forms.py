"""Which form has a function: a loss, sequence log-probs or a step?  Judged from the names of its parameters alone.

The judge asks it of source text, the worker of live functions; both get the same answer.  Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from dpocheck.functions.habits import FOREIGN
from dpocheck.functions.parameters import Parameter, concept, option, spelled, words
from dpocheck.functions.shapes import ATTEMPTS, LOSS_WORDS, PAIR_WORDS, STEP_WORDS, Match
from dpocheck.functions.source_facts import Facts

EXAMPLES = {
    "loss": "dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, "
    "beta), dpo_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta)",
    "sequence_logps": "get_batch_logps(logits, labels), sequence_logps(logits, input_ids, completion_mask), "
    "response_logprob(model, input_ids, attention_mask, response_mask)",
    "step": "dpo_step(batch, policy, reference, optimizer), compute_loss(model, ref_model, batch, beta)",
}
OTHER = {
    "kto", "orpo", "ppo", "grpo", "cpo", "rso", "bco", "apo", "sdpo", "tdpo", "gkd", "dpop",
    "nca", "exo", "sppo", "aot", "discopop", "caldpo", "odpo", "wpo", "asft", "chipo", "focalpo", "hypo",
    "slic",  # its own loss has no reference, the hinge of DPO has one: nothing tells which of the two is meant
}  # fmt: skip
VARIANTS = {  # before dpo: another objective
    "alpha", "epsilon", "adaptive", "dynamic", "weighted", "budget", "aware", "cal", "calibrated", "offset", "focal",
}  # fmt: skip
OTHER_WORK = {
    "eval", "evaluate", "evaluation", "valid", "validate", "validation", "accuracy", "metric", "metrics", "generate",
    "sample", "collate", "collator", "log", "plot", "save", "prepare", "load", "test", "reward", "rewards", "init",
    "from", "setup", "data",
}  # fmt: skip
NAMELESS = {"compute", "calculate", "calc", "call", "get", "apply", "run", "value"}  # its class says what is computed
PARTS = {"margin", "margins", "logit", "logits", "gradient", "grad", "weight", "weights"}
SUMS = {"sum", "mean", "cross_entropy", "CrossEntropyLoss", "nansum", "einsum", "loss_fct", "loss_fn", "nll_loss"}


@dataclass(frozen=True)
class Refusal:
    """Why a function has none of the forms."""

    reason: str


def recognise(name: str, parameters: tuple[Parameter, ...], owner: str = "") -> Match | Refusal:
    """The form of the function `name`, its `self` left out.

    `owner`: the class it is a method of; a step's models may then stand in its attributes.
    """
    other = sorted(OTHER & {*words(name), *words(owner)})
    if other:
        return Refusal(f"{other[0]} is not a loss of pairs that is audited here")
    said = words(name)
    variant = next((a for a, b in pairwise(said) if a in VARIANTS and b == "dpo"), None)
    if variant:
        return Refusal(f"{variant}-DPO is another objective than the papers' that are audited here")
    usable = tuple(p for p in parameters if p.kind in ("positional", "keyword"))
    keys = {p.name: option(p.name) for p in usable}
    if "ipo" in words(name) and "beta" not in keys.values():
        keys |= {n: "beta" for n in keys if n == "eta"}
    options = tuple((key, n) for n, key in keys.items() if key)
    set_already = (bool, float, str)  # a switch with a default is no tensor, whatever its name speaks of
    rest = tuple(p for p in usable if not keys[p.name] and (p.required or not isinstance(p.default, set_already)))
    told = {p.name: concept(p.name) for p in rest}
    for attempt in ATTEMPTS:
        match = attempt(name, rest, told, options, owner)
        if match is None:
            continue
        missing = [p.name for p in rest if p.required and not p.nullable and p.name not in dict(match.roles)]
        if missing:
            return Refusal(f"{match.form}, but for {', '.join(map(repr, missing))}: it is not known what to pass there")
        return match
    if any(p.kind == "star" for p in parameters):
        return Refusal("it takes *args, so that its parameters have no names")
    numbered = [p.name for p in rest if concept(p.name).what == "logp" and re.search(r"\d$", p.name)]
    if len(numbered) > 1:
        return Refusal(f"the names of {', '.join(numbered)} do not say which completion is the preferred one")
    return Refusal(f"its parameters ({spelled(parameters)}) are not those of any known form")


def doubt(match: Match, name: str, owner: str, facts: Facts) -> str | None:
    """Why a function that nobody asked for by name is perhaps not what its parameters look like; None: no doubt."""
    own = {*words(name)} if name not in ("forward", "__call__") else {*words(owner)}
    if own <= NAMELESS and match.form == "loss":
        own |= {*words(owner)} & LOSS_WORDS
    if own & OTHER_WORK and not own & PAIR_WORDS:
        return f"looks like {match.form}, but its name says otherwise"
    if facts.foreign:
        return f"it reads {', '.join(f'self.{one}' for one in sorted(facts.foreign)[:3])}, which is not known"
    if match.form == "loss" and own & PARTS and not own & {"loss", "losses", "criterion", "objective"}:
        return "looks like a loss, but its name says that it is a part of one"
    if match.form == "loss" and not own & (PAIR_WORDS if match.by == "position" else LOSS_WORDS):
        return "looks like a loss, but its name does not say so"
    said = [concept(text) for text in facts.strings | facts.fields | facts.attributes | set(dict(match.roles))]
    sides = {c.which for c in said} >= {"chosen", "rejected"}
    if match.form == "sequence_logps":
        if match.shape == "pairs" and not sides and not (own & {"logp"} and of_rows(facts)):
            return "looks like log-probs of pairs, but nothing in it speaks of chosen and rejected"
        if not own & {"logp"} and match.shape != "pairs":
            return "looks like sequence log-probs, but its name does not say so"
        if facts.known and not facts.calls & SUMS:
            return "looks like log-probs of single tokens"
    if match.form == "step":
        if match.shape == "logits":
            return None if own & LOSS_WORDS else "looks like a loss of logits, but its name does not say so"
        if not own & STEP_WORDS or not sides:
            return "looks like a step, but nothing in it speaks of chosen and rejected"
        if not own & PAIR_WORDS and not any(c.who == "reference" for c in said):
            return "looks like a step, but nothing in it speaks of a reference"
    if match.shape == "records" and not sides:
        return "looks like a loss of two records, but nothing in it speaks of chosen and rejected"
    return None


def of_rows(facts: Facts) -> bool:
    """Does a function of a batch take rows as they are, by keys that speak of tokens and of no side?"""
    said = [concept(text) for text in facts.strings]
    asked = {c.what for c in said if not c.which}
    sides = {c.which for c in [*said, *map(concept, facts.fields | facts.attributes)]} >= {"chosen", "rejected"}
    return not sides and "ids" in asked and bool(asked & {"labels", "completion", "mask"})


def uncallable(match: Match, facts: Facts) -> str | None:
    """Why a function cannot be given torch's tensors, or a model of transformers; None: it can."""
    habits = facts.habits
    foreign = sorted(habits.libraries & FOREIGN)
    if foreign and "torch" not in habits.libraries:
        return f"it computes with {foreign[0]}; functions are given arrays of torch or numpy, or plain numbers"
    if match.form == "loss":
        return None
    if match.role("model") and "numpy" in habits.libraries and "torch" not in habits.libraries:
        return "it computes with numpy what a model says; a model of transformers wants torch"
    if habits.sequence_first:
        return "it takes rows as (sequence, batch); models of transformers take (batch, sequence)"
    if habits.beside:
        return f"it gives its model {habits.beside!r} beside the ids, which a causal language model does not take"
    if not facts.asked_of_models:
        return None
    listed = ", ".join(f"{one}()" for one in sorted(facts.asked_of_models)[:3])
    return f"it calls {listed} of its model, which a causal language model of transformers does not have"


def rank(match: Match, name: str) -> int:
    """Among several of one form in a file, which comes first: the plain one before its variants."""
    said = set(words(name))
    if match.form == "loss":
        if "dpo" in said:
            return 0 if said & {"loss", "losses"} else 1
        return 3 if said & (PAIR_WORDS | {"hinge"}) else 2
    if match.form == "sequence_logps":
        return 1 if match.shape == "pairs" else 0
    return 0 if match.role("optimizer") else 1
