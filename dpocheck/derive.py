"""How does a coarse capability answer a finer experiment?  By turning the fine experiment into coarse ones.

A plan names the coarse experiments and how the fine observation is read off their answers.  The realisation rule: a
fine experiment is realised so that faults of earlier stages do not change it.  A log-prob sits on one middle token,
all other tokens have probability one or cancel; batches are rectangular, prompts disjoint, all of one length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dpocheck.experiment import (
    DIVERGENCES,
    Experiment,
    LogpExperiment,
    LossExperiment,
    Objective,
    Pair,
    Recipe,
    Row,
    StepExperiment,
    Table,
    TrainExperiment,
)
from dpocheck.observation import LogpSeen, LossSeen, Seen, StepSeen, TrainSeen
from dpocheck.oracle.theory import Theory
from dpocheck.probes.tokenizers import plain_words
from dpocheck.reading import entries

STILL = 2.0**-30  # a learning rate, in logits, that moves no float32 weight: the run only shows its log
ONE_STEP = 2.0**14  # a rate so large that the rounding of the weights disappears in (before - after) / rate
NEVER = -128.0  # a logit whose probability is zero: e^-128 vanishes beside one, and bounds in |logit| stay small
CAPABILITY = {
    LossExperiment: "loss", LogpExperiment: "sequence_logps", StepExperiment: "step", TrainExperiment: "train",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The coarse experiments, and the fine observation read from their answers."""

    experiments: tuple[Experiment, ...]
    read: Callable[[tuple[Seen, ...]], Seen]


def plan(experiment: Experiment, capabilities: tuple[str, ...], theory: Theory) -> Plan | str:
    """The plan for an experiment that the subject does not answer natively, or the reason why there is none."""
    wanted = CAPABILITY[type(experiment)]
    if isinstance(experiment, TrainExperiment):
        return "the subject has no `train`"
    if "step" not in capabilities and "train" not in capabilities:
        return f"the subject has neither `{wanted}` nor a coarser capability"
    if isinstance(experiment, LossExperiment):
        return _loss(experiment, "step" if "step" in capabilities else "train", theory)
    if "train" not in capabilities:
        return f"the subject has neither `{wanted}` nor `train`"
    if theory.bos == "added" and experiment.body.kind != "silent":
        return "a whole run puts BOS before every row, where the model attends to it; this experiment has none"
    if isinstance(experiment, LogpExperiment):
        return _logps(experiment, theory)
    return _step(experiment, theory)


# --------------------------------------------------------------------------------------------------------------- step


def rows(pairs: tuple[Pair, ...], size: int, theory: Theory) -> tuple[Row, ...]:
    """Token pairs as text rows of the plain word tokenizer; the trainer appends EOS where the theory says so."""
    tokenizer = plain_words(size)

    def text(tokens: tuple[int, ...]) -> str:
        ids = tokens[:-1] if theory.eos == "appended" and tokens[-1:] == (tokenizer.eos,) else tokens
        return "".join(" " + tokenizer.word(token) for token in ids)

    return tuple(Row(text(pair.prompt).strip(), text(pair.chosen), text(pair.rejected)) for pair in pairs)


def _step(experiment: StepExperiment, theory: Theory) -> Plan | str:
    tokenizer = plain_words(experiment.policy.size)
    if experiment.calls != 1:
        return "what a step leaves behind is asked of whole runs where there is no `step`"
    if experiment.padding != "right" or experiment.pad != tokenizer.pad or experiment.eos != tokenizer.eos:
        return "a whole run pads as it likes; this experiment asks for a padding of its own"
    if any(pair.chosen[-1:] != (tokenizer.eos,) or pair.rejected[-1:] != (tokenizer.eos,) for pair in experiment.pairs):
        return "a whole run ends completions with EOS; this experiment does not"
    run = TrainExperiment(
        experiment.policy, experiment.reference, tokenizer, rows(experiment.pairs, tokenizer.size, theory),
        Recipe(experiment.objective, learning_rate=ONE_STEP, batch=len(experiment.pairs), dtype=experiment.dtype),
        body=experiment.body,
    )  # fmt: skip

    def read(answers: tuple[Seen, ...]) -> Seen:
        (answer,) = answers
        assert isinstance(answer, TrainSeen)
        logged = next((entry["metrics"] for entry in answer.history or () if entry["split"] == "train"), {})
        reference = answer.spies.get("reference", {})
        read_through = {name: answer.floor[name] for name in ("gradient", "attended") if name in answer.floor}
        return StepSeen(
            via="derived", loss=logged.get("loss"), metrics=logged or None, gradient=answer.gradient,
            attended=answer.attended, reference_gradient=reference.get("gradient"), spies=answer.spies,
            floor=_logged((answer,), loss="loss") | read_through,
        )  # fmt: skip

    return Plan((run,), read)


# -------------------------------------------------------------------------------------------------------------- logps


def _logps(experiment: LogpExperiment, theory: Theory) -> Plan | str:
    """Each row is the chosen completion of one pair; its log-prob is read from the log of a run that does not move.

    Such a run pads nothing.  Where the experiment pads with EOS, the tokenizer does, so that a mask made of token ids
    loses the real EOS.
    """
    size = experiment.table.size
    tokenizer = plain_words(size)
    pads = {i for row in experiment.rows for i, real in zip(row.ids, row.attention, strict=True) if not real}
    if pads == {tokenizer.eos}:
        tokenizer = replace(tokenizer, pad_is_eos=True)
    pairs = []
    for row in experiment.rows:
        real = sum(row.attention)
        start = row.completion.index(1) if 1 in row.completion else 0
        plain = row.attention == (1,) * real + (0,) * (len(row.ids) - real)
        if not start or not plain or row.completion != (0,) * start + (1,) * (real - start) + (0,) * (
            len(row.ids) - real
        ):
            return "a whole run builds its own masks; this experiment asks for one of its own"
        ids = row.ids[:real]
        if real - start == 1:
            return "a whole run may drop a row whose completion is empty but for EOS"
        if ids[-1] != tokenizer.eos or tokenizer.eos in ids[:-1] or max(ids[:-1]) >= len(tokenizer.words):
            return "a whole run ends completions with EOS and has no other special tokens"
        other = next(token for token in range(size) if token not in ids)
        pairs.append(Pair(ids[:start], ids[start:], (other, tokenizer.eos)))
    run = TrainExperiment(
        experiment.table, experiment.table, tokenizer, rows(tuple(pairs), size, theory),
        Recipe(learning_rate=STILL, batch=1, steps=len(pairs), dtype=experiment.dtype), body=experiment.body,
    )  # fmt: skip

    def read(answers: tuple[Seen, ...]) -> Seen:
        (answer,) = answers
        assert isinstance(answer, TrainSeen)
        logged = entries(answer.history, "train", "logps/chosen")
        logps = np.array(logged) if len(logged) == len(pairs) else None
        floor = _logged(answers, logps="logps/chosen")
        if theory.logps_logged == "mean":  # what the loss sums is looked at in the gradient
            lengths = np.array([float(len(pair.chosen)) for pair in pairs])
            logps = None if logps is None else logps * lengths
            floor = {name: off * float(lengths.max()) for name, off in floor.items()}
        return LogpSeen(via="derived", logps=logps, spies=answer.spies, floor=floor)

    return Plan((run,), read)


# --------------------------------------------------------------------------------------------------------------- loss


@dataclass(frozen=True)
class LossLayout:
    """Where the numbers of a `LossExperiment` sit in a table.

    Pair i has prompt p_i and completions (a_i, n, EOS) and (b_i, n, EOS).  After p_i both a_i and b_i have probability
    1/2, under policy and reference alike, and cancel.  After a_i the token n carries the chosen log-prob, the slack
    token takes the rest; after b_i the rejected one.  After n EOS is certain.
    """

    size: int
    pairs: int

    @property
    def number(self) -> int:
        return 3 * self.pairs

    @property
    def slack(self) -> int:
        return 3 * self.pairs + 1

    @property
    def eos(self) -> int:
        return plain_words(self.size).eos

    def pair(self, i: int) -> Pair:
        return Pair((3 * i,), (3 * i + 1, self.number, self.eos), (3 * i + 2, self.number, self.eos))

    def table(self, chosen: tuple[float, ...], rejected: tuple[float, ...]) -> Table:
        entries = [(self.number, self.eos, 0.0)]
        for i in range(self.pairs):
            entries += [(3 * i, 3 * i + 1, 0.0), (3 * i, 3 * i + 2, 0.0)]
            for context, logp in ((3 * i + 1, chosen[i]), (3 * i + 2, rejected[i])):
                entries += [(context, self.number, logp), (context, self.slack, float(np.log(-np.expm1(logp))))]
        return Table(self.size, NEVER, tuple(entries))


def layout(experiment: LossExperiment) -> LossLayout | str:
    """The smallest table that holds the experiment, or why a model cannot have these log-probs."""
    numbers = experiment.arguments()
    if experiment.lengths is not None and set(experiment.lengths) != {(3, 3)}:
        return "only completions of three tokens are realised"
    if experiment.calls != 1:
        return "what a call of the loss leaves behind is asked of whole runs where there is no `loss`"
    if experiment.dtype not in ("float32", "float64"):
        return f"the precision of the loss ({experiment.dtype}) cannot be asked of a whole run"
    if np.any(numbers > -1e-3):
        return "a model's log-probs are negative; this experiment has others"
    pairs = numbers.shape[1]
    size = next((size for size in (64, 256) if 3 * pairs + 2 <= size - 4), None)
    return LossLayout(size, pairs) if size else f"{pairs} pairs do not fit one table"


def _loss(experiment: LossExperiment, by: str, theory: Theory) -> Plan | str:
    place = layout(experiment)
    if isinstance(place, str):
        return place
    policy = place.table(experiment.policy_chosen, experiment.policy_rejected)
    reference = place.table(experiment.reference_chosen, experiment.reference_rejected)
    pairs = tuple(place.pair(i) for i in range(place.pairs))
    words = plain_words(place.size)
    common = {"objective": experiment.objective, "dtype": "float32"}
    if by == "step":
        singles = [
            StepExperiment(policy, reference, part, pad=words.pad, eos=words.eos, **common)
            for part in ((pair,) for pair in pairs)
        ]
        whole: Experiment = StepExperiment(policy, reference, pairs, pad=words.pad, eos=words.eos, **common)
        runs: tuple[Experiment, ...] = (whole, *singles)
    else:
        text = rows(pairs, place.size, theory)
        slopes = Recipe(learning_rate=ONE_STEP, batch=place.pairs, **common)
        values = Recipe(learning_rate=STILL, batch=1, steps=place.pairs, **common)
        runs = tuple(TrainExperiment(policy, reference, words, text, recipe) for recipe in (slopes, values))
    return Plan(runs, lambda answers: _read_loss(experiment, place, answers))


def _read_loss(experiment: LossExperiment, place: LossLayout, answers: tuple[Seen, ...]) -> LossSeen:
    whole, rest = answers[0], answers[1:]
    assert isinstance(whole, StepSeen | TrainSeen)
    logged: dict[str, list[float]] = {}
    for name in ("loss", "rewards/chosen", "rewards/rejected"):
        if isinstance(rest[0], TrainSeen):
            logged[name] = entries(rest[0].history, "train", name)
        else:
            every = [answer.loss if name == "loss" else (answer.metrics or {}).get(name) for answer in rest]  # type: ignore[attr-defined]
            logged[name] = [value for value in every if value is not None]
    per_pair, chosen, rejected = (
        np.array(values) if len(values) == place.pairs else None for values in logged.values()
    )
    fields = {"per_pair": per_pair, "rewards_chosen": chosen, "rewards_rejected": rejected}
    if isinstance(whole, StepSeen):
        fields["reduced"] = whole.loss
    else:
        first = entries(whole.history, "train", "loss")
        fields["reduced"] = first[0] if first else None
    if whole.gradient is not None:
        fields |= _slopes(experiment, place, whole.gradient)
    floor = _floor(experiment)
    for name, rounded in _logged(
        answers, per_pair="loss", reduced="loss", rewards_chosen="rewards/chosen", rewards_rejected="rewards/rejected"
    ).items():
        floor[name] += rounded
    return LossSeen(via="derived", spies=whole.spies, floor=floor, **fields)


def _logged(answers: tuple[Seen, ...], **names: str) -> dict[str, float]:
    """field -> how far the metric that it is read from is rounded in the log."""
    found = {}
    for field, metric in names.items():
        rounded = max(answer.floor.get(f"history.train.{metric}", 0.0) for answer in answers)
        found |= {field: rounded} if rounded else {}
    return found


def _slopes(experiment: LossExperiment, place: LossLayout, gradient: np.ndarray) -> dict[str, np.ndarray]:
    """Row a_i of the gradient is dL/dlogp * (e_n - p); row p_i is (dL/dlp_w - dL/dlp_l) / 2 at a_i."""
    slopes = np.full((4, place.pairs), np.nan)
    for i in range(place.pairs):
        for row, logp in enumerate((experiment.policy_chosen[i], experiment.policy_rejected[i])):
            direction = np.zeros(place.size)
            direction[place.number], direction[place.slack] = -np.expm1(logp), np.expm1(logp)
            slopes[row, i] = gradient[3 * i + 1 + row] @ direction / (direction @ direction)
    margin = np.array([gradient[3 * i, 3 * i + 1] for i in range(place.pairs)])
    return {"slopes": slopes, "margin_slopes": margin}


def _floor(experiment: LossExperiment) -> dict[str, float]:
    """The noise that the realisation adds: rounding of three token log-probs on each side, under both models.

    TOL-TOK for each of them is u (3 |lp| + 2 ln V + 14), V = 256 at most and u of float32.  A log-ratio h that is off
    by that moves the loss by its slope in h, and the slope by its curvature; the reading adds u |logit| / rate.
    """
    u, beta = 2.0**-24, abs(experiment.objective.beta)
    four = np.abs(experiment.arguments())
    noise = 3 * u * float(np.max(np.sum(3 * four + 2 * np.log(256) + 14, axis=0)))
    h = np.array([1, -1, -1, 1]) @ experiment.arguments()
    if experiment.objective.kind in DIVERGENCES:
        ratios = experiment.arguments()[:2] - experiment.arguments()[2:]
        steep = steepest(experiment.objective, float(np.max(-ratios)) + noise)
        slope, curvature, beta = beta * steep, beta * steep * (1 + beta * steep / 4), beta * steep
    else:
        slope, curvature = steepness(experiment.objective, float(np.max(np.abs(h))) + noise)
    reading = 4 * u * float(np.max(four)) / ONE_STEP
    values, rewards = slope * noise, beta * noise
    return {
        "per_pair": values, "reduced": values, "rewards_chosen": rewards, "rewards_rejected": rewards,
        "slopes": curvature * noise + reading, "margin_slopes": curvature * noise,
    }  # fmt: skip


def steepest(objective: Objective, largest: float) -> float:
    """A bound on df'(u)/d log u and its own derivative where -log u <= `largest`: u^-1, u^-alpha, or sigma(-log u)."""
    if objective.kind == "js_divergence":
        return 1.0
    return float(np.exp((objective.alpha if objective.kind == "alpha_divergence" else 1.0) * max(largest, 0.0)))


def steepness(objective: Objective, largest: float) -> tuple[float, float]:
    """Bounds on |dL/dh| and |d2L/dh2| where |h| <= `largest`, of the formulas in `oracle/losses.py`."""
    beta, smoothing = abs(objective.beta), objective.label_smoothing
    if objective.kind == "ipo":
        return 2 * (largest + 1 / (2 * beta)), 2.0
    if objective.kind == "hinge":
        return beta, 0.0
    flipped = 1 / (1 - 2 * smoothing) if objective.kind == "robust" and smoothing < 0.5 else 1.0
    return beta * flipped, beta * beta * flipped / 4
