"""Which parameters are those of a loss, of log-probs, of a step?  One attempt for each shape that they come in."""

from __future__ import annotations

from dataclasses import dataclass

from dpocheck.functions.parameters import (
    ABBREVIATIONS,
    ENCODED,
    FOUR,
    MARGIN,
    POLICY,
    PROBS,
    REFERENCE,
    WHAT,
    Concept,
    Parameter,
    is_batch,
    words,
)

LOSS_WORDS = {"loss", "losses", "dpo", "ipo", "slic", "hinge", "simpo", "preference", "criterion", "objective"}
PAIR_WORDS = {"dpo", "ipo", "slic", "simpo", "preference", "cdpo", "rdpo"}
STEP_WORDS = {"step", "loss", "losses", "train", "update", "dpo", "backward", "objective", "batch"}
CANNOT_POSITION = {"logits", "ids", "labels", "mask", "attention", "completion", "model", "optimizer", "length", "side"}


MASKS = {"mask", "completion", "attention"}


@dataclass(frozen=True)
class Match:
    """A recognised function.  `roles`: parameter -> what it is given; `options`: option -> parameter.

    `shape`, of a loss: four, ratios (policy's and reference's chosen minus rejected), margins (policy minus reference
    of each completion), rows (all log-probs in one vector with two index vectors), halves (all in one vector or one
    matrix, chosen first), tokens (log-probs token by token, with a mask), records (policy's and reference's, each
    with its attributes), sides (the four, token by token, a mask for each side), margin (h alone), two (no reference,
    per token: SimPO), policy (no reference, in what calls itself DPO).
    Of log-probs: pairs (it takes a batch, of pairs or of rows).  Of a step: logits (it is given what the models say).
    """

    form: str
    roles: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str], ...] = ()
    shape: str = ""
    by: str = "names"

    def role(self, wanted: str) -> str | None:
        return next((name for name, role in self.roles if role == wanted), None)


Told = dict[str, Concept]
Options = tuple[tuple[str, str], ...]


def _four(name: str, rest: tuple[Parameter, ...], told: Told, options: Options, owner: str) -> Match | None:
    """Four log-probs, by their names in any order."""
    names = {p.name.lower(): p.name for p in rest}
    for letters in ABBREVIATIONS:
        if set(letters) <= set(names):
            roles = dict(zip((names[letter] for letter in letters), FOUR, strict=True))
            return Match("loss", tuple(roles.items()), options, "four")
    named = {"logp", "", "side"}
    if not any(c.what in ("labels", "mask", "completion", "attention", "ids") for c in told.values()):
        named.add("logits")  # so some call what are log-probs: logits would come with labels
    sided = {n: c for n, c in told.items() if c.which and c.what in named and not c.prompt}
    if len(sided) != 4:
        return None
    roles = {n: f"{c.who or 'policy'}_{c.which}" for n, c in sided.items()}
    if set(roles.values()) != set(FOUR):
        return None
    wanted = {p.name for p in rest if p.required}
    masks = {n: f"{c.which}_mask" for n, c in told.items() if n in wanted and c.which and c.what in MASKS}
    if sorted(masks.values()) == ["chosen_mask", "rejected_mask"]:
        return Match("loss", (*roles.items(), *masks.items()), options, "sides")
    return Match("loss", (*roles.items(), *_lengths(told)), options, "four")


def _lengths(told: Told) -> tuple[tuple[str, str], ...]:
    return tuple((n, f"{c.which}_length") for n, c in told.items() if c.what == "length" and c.which)


def _paper(name: str, rest: tuple[Parameter, ...], told: Told, options: Options, owner: str) -> Match | None:
    """All log-probs in one vector and the indices of chosen and rejected, as in the paper's appendix.

    Or log-probs of single tokens and their mask, chosen rows first.
    """
    roles = {}
    for n, c in told.items():
        if c.what == "index" and c.which:
            roles[n] = f"{c.which}_index"
        elif c.what == "logp" and c.who and not c.which:
            roles[n] = f"{c.who}_rows"
        elif c.what in ("mask", "completion") and not c.which:
            roles[n] = "token_mask"
    for shape, wanted in (("rows", {"chosen_index", "rejected_index"}), ("tokens", {"token_mask"})):
        if set(roles.values()) == {"policy_rows", "reference_rows"} | wanted:
            return Match("loss", tuple(roles.items()), options, shape)
    return None


def _halves(name: str, rest: tuple[Parameter, ...], told: Told, options: Options, owner: str) -> Match | None:
    """The policy's log-probs and the reference's, chosen rows first: `dpo_loss(policy_logps, ref_logps, beta)`."""
    if len(told) != 2 or not {*words(name), *words(owner)} & PAIR_WORDS:
        return None
    whose = {}
    for n, c in told.items():
        said = {*words(n)}
        if c.which or not said & (WHAT["logp"] | PROBS) or not said <= WHAT["logp"] | PROBS | POLICY | REFERENCE:
            return None
        whose[n] = c.who or "policy"
    if set(whose.values()) != {"policy", "reference"}:
        return None
    return Match("loss", tuple((n, f"{who}_rows") for n, who in whose.items()), options, "halves")


def _records(name: str, rest: tuple[Parameter, ...], told: Told, options: Options, owner: str) -> Match | None:
    """What each model said about both completions: `loss(policy_outputs, reference_outputs)` with `.chosen_logps`."""
    kinds = {"inputs", "input", "outputs", "output", "out", "logps", "batch"} | POLICY | REFERENCE
    whose = {n: c.who for n, c in told.items() if c.who and not c.which and {*words(n)} <= kinds}
    if len(told) != 2 or set(whose.values()) != {"policy", "reference"}:
        return None
    if not {*words(name), *words(owner)} & PAIR_WORDS or not any({*words(n)} - POLICY - REFERENCE for n in whose):
        return None
    return Match("loss", tuple((n, f"{who}_record") for n, who in whose.items()), options, "records")


def _ratios(name: str, rest: tuple[Parameter, ...], told: Told, options: Options, owner: str) -> Match | None:
    """Two log-ratios: of chosen over rejected under each model, or of policy over reference of each completion."""
    ratios = {n: c for n, c in told.items() if c.what == "ratio"}
    for shape, keys in (("ratios", ("policy", "reference")), ("margins", ("chosen", "rejected"))):
        roles = {n: f"{(c.who or 'policy') if shape == 'ratios' else c.which}_ratio" for n, c in ratios.items()}
        if len(ratios) == 2 and set(roles.values()) == {f"{key}_ratio" for key in keys}:
            return Match("loss", tuple(roles.items()), options, shape)
    return None


def _margin(name: str, rest: tuple[Parameter, ...], told: Told, options: Options, owner: str) -> Match | None:
    """h alone, the difference of the log-ratios, and a beta: `dpo_loss(margin, beta)`."""
    if len(told) != 1 or not any(key == "beta" for key, _ in options) or not {*words(name), *words(owner)} & PAIR_WORDS:
        return None
    ((n, said),) = told.items()
    if said.which or said.who or not {*words(n)} <= MARGIN | WHAT["ratio"]:
        return None
    return Match("loss", ((n, "margin"),), options, "margin")


def _two(name: str, rest: tuple[Parameter, ...], told: Told, options: Options, owner: str) -> Match | None:
    """Two log-probs and no reference: SimPO, or what calls itself DPO and has forgotten the reference."""
    simpo = "simpo" in f"{owner}.{name}".lower()
    if not simpo and "dpo" not in {*words(name), *words(owner)}:
        return None
    kinds = ("logp", "") if simpo else ("logp",)
    roles = {n: f"policy_{c.which}" for n, c in told.items() if c.which and c.what in kinds and c.who != "reference"}
    if set(roles.values()) != set(FOUR[:2]):
        return None
    lengths = _lengths(told) if simpo else ()
    return Match("loss", (*roles.items(), *lengths), options, "two" if simpo else "policy")


def _by_position(name: str, rest: tuple[Parameter, ...], told: Told, options: Options, owner: str) -> Match | None:
    """Four parameters in the usual order, where their names contradict nothing."""
    first = [p for p in rest if p.kind == "positional"][:4]
    plain = len([p for p in rest if p.required]) == 4 and any(key == "beta" for key, _ in options)
    if len(first) < 4 or not (plain or {*words(name), *words(owner)} & LOSS_WORDS):
        return None
    for parameter, role in zip(first, FOUR, strict=True):
        who, which = role.split("_")
        said = told[parameter.name]
        if said.what in CANNOT_POSITION or is_batch(parameter.name) or said.who not in ("", who):
            return None
        if said.which not in ("", which):
            return None
    roles = [(p.name, role) for p, role in zip(first, FOUR, strict=True)]
    further = [p for p in rest if p.kind == "positional" and p.required][4:]
    if further and not any(key == "beta" for key, _ in options):
        options = (*options, ("beta", further[0].name))
        roles.append((further[0].name, "option"))
    return Match("loss", tuple(roles), options, "four", by="position")


def _logps(name: str, rest: tuple[Parameter, ...], told: Told, options: Options, owner: str) -> Match | None:
    """Sequence log-probs from logits or from a model."""
    roles: dict[str, str] = {}
    plain: list[str] = []
    if (batch := _pairs(name, told, owner)) is not None:
        return Match("sequence_logps", batch, options, "pairs")
    for n, c in told.items():
        if c.what == "model" and c.who == "policy" and "model" not in roles.values():
            roles[n] = "model"
        elif c.which and c.what != "logits":
            return None
        elif n.lower() in ENCODED:
            roles[n] = "encoded"
        elif c.what in ("logits", "labels", "attention", "completion"):
            roles.setdefault(n, c.what)
        elif c.what == "ids" and (c.prompt or c.completion):
            roles[n] = "prompt_ids" if c.prompt else "completion_ids"
        elif c.what == "ids" or n.lower() in ("x", "input", "text_ids"):
            roles[n] = "ids"
        elif c.what == "length" or n.lower() in ("prompt_lens", "prompt_end", "response_start"):
            roles[n] = "prompt_length"
        elif c.what == "mask":
            plain.append(n)
        elif n.lower() in ("y", "labels"):
            roles[n] = "labels"
    given = set(roles.values())
    if given >= {"model", "logits"} or not (owner or given & {"model", "logits"}) or len(roles) != len(given):
        return None
    for n in plain:
        spare = "completion" if "completion" not in given and not (given >= {"labels", "ids"}) else "attention"
        if "prompt_length" in given and "attention" not in given:
            spare = "attention"
        if spare in given:
            return None
        roles[n] = spare
        given.add(spare)
    tokens = given & {"labels", "ids", "encoded"} or given >= {"prompt_ids", "completion_ids"}
    which = given & {"labels", "completion", "prompt_length", "completion_ids"}
    if "attention" in given and "logp" in words(name):
        which.add("attention")  # nothing tells it where the completion begins: it counts the prompt, and is told so
    return Match("sequence_logps", tuple(roles.items()), options) if tokens and which else None


def _pairs(name: str, told: Told, owner: str) -> tuple[tuple[str, str], ...] | None:
    """`concatenated_forward(model, batch)`: log-probs of chosen and of rejected."""
    if not {*words(name)} & {"forward", "logp"} or name in ("forward", "__call__"):
        return None
    roles = {n: "batch" if is_batch(n) else "model" for n, c in told.items() if is_batch(n) or c.what == "model"}
    given = sorted(roles.values())
    return tuple(roles.items()) if given == ["batch", "model"] or (owner and given == ["batch"]) else None


def _step(name: str, rest: tuple[Parameter, ...], told: Told, options: Options, owner: str) -> Match | None:
    """A step: a batch (whole, or by its tensors) and the models, which a method may hold in its attributes."""
    roles: dict[str, str] = {}
    indexed = {c.which for c in told.values() if c.what == "index"} == {"chosen", "rejected"}
    for n, c in told.items():
        if is_batch(n):
            roles[n] = "batch"
        elif c.what == "model" and not c.which:
            roles[n] = c.who
        elif c.what == "optimizer":
            roles[n] = "optimizer"
        elif _is_tensor(c) or (indexed and c.what in ("ids", "labels", "attention", "completion", "mask")):
            roles[n] = "key"
    given = list(roles.values())
    if any(given.count(once) > 1 for once in ("batch", "policy", "reference", "optimizer")):
        return None
    if "batch" not in given:
        tensors = [told[n] for n, role in roles.items() if role == "key"]
        sides = {c.which for c in tensors if c.what in ("ids", "side")}
        if sides != {"chosen", "rejected"} and not (indexed and any(c.what == "ids" for c in tensors)):
            return None
    if "policy" not in given and not owner:
        return None
    if not owner and not ({"reference", "optimizer"} & set(given)) and not {*words(name)} & STEP_WORDS:
        return None
    return Match("step", tuple(roles.items()), options)


def _logits(name: str, rest: tuple[Parameter, ...], told: Told, options: Options, owner: str) -> Match | None:
    """A step behind its models: both completions' logits and labels, and log-probs where they are known already."""
    roles: dict[str, str] = {}
    for n, c in told.items():
        if c.which and c.what in ("logits", "logp"):
            roles[n] = f"{c.who or 'policy'}_{c.which}" + ("_logits" if c.what == "logits" else "")
        elif c.which and c.what in ("labels", "ids", "side", "mask", "completion", "attention"):
            roles[n] = "key"
    optional = {p.name for p in rest if not p.required}
    roles = {n: r for n, r in roles.items() if n not in optional or f"{r}_logits" not in roles.values()}
    models = {role.removesuffix("_logits") for role in roles.values() if role != "key"}
    logits = {role for role in roles.values() if role.endswith("_logits")}
    marked = {told[n].which for n, role in roles.items() if role == "key" and told[n].what in ("labels", "ids", "side")}
    if models != set(FOUR) or not logits >= {f"{one}_logits" for one in FOUR[:2]} or marked != {"chosen", "rejected"}:
        return None
    known = {n: "key" for n, role in roles.items() if role in FOUR}  # the reference's, computed beforehand
    return Match("step", tuple((roles | known).items()), options, "logits")


def _is_tensor(said: Concept) -> bool:
    """Is a parameter of this name one of the tensors of a batch?"""
    if said.which:
        return said.what not in ("reward", "ratio", "logits", "optimizer")
    return said.prompt and said.what in ("ids", "length", "attention", "mask")


ATTEMPTS = (_four, _paper, _halves, _ratios, _margin, _two, _records, _logps, _logits, _step, _by_position)
