"""Which of the choices that the sources leave open did this trainer make?  Asked before the checks that depend on it.

Each question has an experiment kept for it.  The oracle predicts it under every allowed answer, and the nearest is
taken where it is clearly nearer than the next: all later predictions follow it.  A finding needs a promise: only where
the trainer's documentation says otherwise (`Says`) is an answer a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dpocheck.checks import scenes
from dpocheck.derive import STILL
from dpocheck.experiment import (
    Body,
    Experiment,
    LossExperiment,
    Message,
    Objective,
    Recipe,
    Row,
    Template,
    Tokenizer,
    TrainExperiment,
    key,
)
from dpocheck.observation import Seen
from dpocheck.oracle.theory import CONVENTIONS, Theory
from dpocheck.result import Result
from dpocheck.session import Predict
from dpocheck.subject import Subject

CLEARLY = 5.0  # the nearest answer must be this many times nearer than the next


@dataclass(frozen=True)
class Question:
    """`field` of a `Theory`; the experiment that shows it; which observables tell; the answers in words."""

    id: str
    field: str
    chapter: str
    stage: str
    experiment: Callable[[Theory], Experiment]
    tells: tuple[str, ...]
    words: dict[str, str]
    capability: str = "train"
    says: str | None = None
    decide: Callable[[Subject], str | None] | None = None  # an answer that needs no oracle


def _one_pair(theory: Theory) -> Experiment:
    return scenes.run(scenes.rectangular(6), theory)


def _boundary(theory: Theory) -> Experiment:
    letters = Tokenizer((*"abcxyz", "xy"), 64, kind="characters", merge=("x", "y"))
    used = [*range(7), letters.eos]
    cells = [(u, v) for u in used for v in used]
    table = [
        scenes.Table(64, 0.0, tuple((u, v, scenes.generic(salt + i)) for i, (u, v) in enumerate(cells)))
        for salt in (5, 90)
    ]
    recipe = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=1)
    return TrainExperiment(table[0], table[1], letters, (Row("abx", "yc", "za"),), recipe)


def _chat(theory: Theory) -> Experiment:
    template = Template(user=(" k ", ""), assistant=(" l ", " m"), generation_prompt=" l ")
    row = Row((Message("user", "a b"),), (Message("assistant", "c d"),), (Message("assistant", "e f"),))
    run = scenes.run(scenes.rectangular(2), theory, body=Body("glass"))
    return replace(run, rows=(row,), tokenizer=replace(scenes.WORDS, template=template),
                   recipe=replace(run.recipe, batch=1))  # fmt: skip


def _bos(theory: Theory) -> Experiment:
    return _text(adds_bos=True)


def _text(*, adds_bos: bool) -> TrainExperiment:
    """One text row, on a tokenizer that has a BOS; a glass table shows every token that was attended to."""
    tokenizer = replace(scenes.WORDS, adds_bos=adds_bos)
    used = [*range(8), tokenizer.bos, tokenizer.eos]
    cells = [(u, v) for u in used for v in used]
    table = [
        scenes.Table(64, 0.0, tuple((u, v, scenes.generic(salt + i)) for i, (u, v) in enumerate(cells)))
        for salt in (7, 95)
    ]
    recipe = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=1)
    return TrainExperiment(table[0], table[1], tokenizer, (Row("a b", " c d", " e f"),), recipe, body=Body("glass"))


def _bos_seen(subject: Subject) -> str | None:
    """Which of two tokenizers, one that adds BOS and one that does not, had a BOS in the rows that were attended to."""
    seen = []
    for adds in (True, False):
        run = subject.own(_text(adds_bos=adds))
        attended = getattr(subject.observe(run), "attended", None)
        if attended is None:
            return None
        seen.append(bool(np.any(attended[run.tokenizer.bos])))
    return {(True, False): "tokenizer", (False, False): "none", (True, True): "added"}.get(tuple(seen))


def _ipo(theory: Theory) -> Experiment:
    pairs = scenes.ragged()[1:3]
    recipe = Recipe(Objective("ipo", beta=0.5), learning_rate=scenes.ONE_STEP, batch=2)
    return scenes.run(pairs, theory, recipe)


def _ipo_loss(theory: Theory) -> Experiment:
    return LossExperiment(
        (-3.5, -6.25), (-6.0, -4.75), (-4.0, -3.625), (-5.0, -5.5), Objective("ipo", beta=0.5), ((2, 5), (4, 3))
    )


def _reduction(theory: Theory) -> Experiment:
    return _copies(3)


def _copies(count: int) -> LossExperiment:
    """The same pair `count` times."""
    return LossExperiment((-3.5,) * count, (-6.0,) * count, (-4.0,) * count, (-5.0,) * count, Objective(beta=0.5))


def _reduced_by(subject: Subject) -> str | None:
    """Three copies of a pair give its own loss under a mean, three times as much under a sum."""
    one, three = (getattr(subject.observe(subject.own(_copies(count))), "reduced", None) for count in (1, 3))
    if not one or three is None:
        return None
    return {1.0: "mean", 3.0: "sum"}.get(round(three / one, 2))


def _uneven(theory: Theory) -> Experiment:
    recipe = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=2, accumulation=3)
    return scenes.run(scenes.rectangular(5), theory, recipe)


def _logged(theory: Theory) -> Experiment:
    recipe = Recipe(Objective(beta=0.5), learning_rate=STILL, batch=3, steps=2)
    return scenes.run(scenes.rectangular(6), theory, recipe)


def _tie(theory: Theory) -> Experiment:
    run = _logged(theory)
    return replace(run, reference=run.policy)


def _tail(theory: Theory) -> Experiment:
    recipe = Recipe(Objective(beta=0.5), learning_rate=8.0, batch=2, steps=None, epochs=1)
    return scenes.run(scenes.rectangular(5), theory, recipe)


def _sft(theory: Theory) -> Experiment:
    recipe = Recipe(Objective(beta=0.5, sft_weight=1.0), learning_rate=scenes.ONE_STEP, batch=4)
    return scenes.run(scenes.ragged()[:4], theory, recipe)


def _warm_up(theory: Theory) -> Experiment:
    recipe = Recipe(Objective(beta=0.5), learning_rate=8.0, batch=4, steps=3, warmup_steps=2)
    return scenes.run(scenes.rectangular(4), theory, recipe)


def _window(theory: Theory) -> Experiment:
    recipe = Recipe(Objective(beta=0.5), learning_rate=8.0, batch=2, accumulation=2, steps=None, epochs=1)
    return scenes.run(scenes.rectangular(6), theory, recipe)


def _clipped(theory: Theory) -> Experiment:
    recipe = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=6, clip_norm=2.0**-5)
    return scenes.run(scenes.rectangular(6), theory, recipe)


QUESTIONS = (
    Question("CONV-EOS", "eos", "rows", "tokens", _one_pair, ("gradient",), {
        "appended": "EOS is appended once to a text completion", "none": "no EOS is added to a text completion",
    }, says="eos"),
    Question("CONV-BOUNDARY", "boundary", "rows", "tokens", _boundary, ("gradient",), {
        "joint": "prompt and completion are tokenized as one text",
        "apart": "prompt and completion are tokenized apart",
    }),
    Question("CONV-BOS", "bos", "rows", "tokens", _bos, ("attended",), {
        "tokenizer": "text rows start with BOS where the tokenizer adds one", "none": "text rows start without BOS",
        "added": "text rows start with BOS, whatever the tokenizer does",
    }, says="bos", decide=_bos_seen),
    Question("CONV-CHAT-EOS", "template_eos", "rows", "tokens", _chat, ("attended",), {
        "once": "chat rows end as their template ends them", "ensured": "EOS is added where the chat template has none",
    }),
    Question("CONV-IPO", "ipo_length", "loss", "loss", _ipo, ("gradient",), {
        "sum": "IPO uses summed log-probs, as its paper", "mean": "IPO uses log-probs per token",
    }, says="ipo"),
    Question("CONV-IPO-LOSS", "ipo_length", "loss", "loss", _ipo_loss, ("per_pair", "reduced"), {
        "sum": "IPO uses summed log-probs, as its paper", "mean": "IPO uses log-probs per token",
    }, "loss", says="ipo"),
    Question("CONV-SFT", "sft_mean", "loss", "loss", _sft, ("gradient",), {
        "pair": "the SFT term is the mean over pairs of each chosen completion's mean over tokens",
        "tokens": "the SFT term is the mean over all chosen tokens of the batch",
    }),
    Question("CONV-REDUCTION", "reduction", "loss", "loss", _reduction, ("reduced",), {
        "mean": "the loss is the mean over the pairs", "sum": "the loss is the sum over the pairs",
    }, "loss", says="reduction", decide=_reduced_by),
    Question("CONV-REWARD-SCALE", "reward_scale", "metrics", "metrics", _logged,
        ("rewards/chosen", "rewards/rejected"), {
        "beta": "logged rewards are beta times the log-ratio", "one": "logged rewards are log-ratios, without beta",
    }, says="reward_scale"),
    Question("CONV-REWARD-LOGPS", "reward_logps", "metrics", "metrics", _logged,
        ("rewards/chosen", "rewards/rejected"), {
        "loss": "logged rewards are of the log-ratios as the loss compares them",
        "sum": "logged rewards are of summed log-ratios, whatever the loss makes of them",
    }),
    Question("CONV-LOGPS", "logps_logged", "metrics", "metrics", _logged, ("logps/chosen", "logps/rejected"), {
        "sum": "logged log-probs are sums over tokens", "mean": "logged log-probs are means over tokens",
    }),
    Question("CONV-TIE", "accuracy", "metrics", "metrics", _tie, ("rewards/accuracies",), {
        "greater": "a tie counts as wrong", "greater-equal": "a tie counts as right", "half": "a tie counts one half",
    }),
    Question("CONV-UNEVEN", "uneven", "step", "step", _uneven, ("gradient",), {
        "pairs": "in an uneven window every pair weighs the same",
        "micro-batches": "in an uneven window every micro-batch weighs the same (a mean of means)",
    }, says="uneven_accumulation"),
    Question("CONV-UNEVEN-METRICS", "uneven_metrics", "metrics", "metrics", _uneven, ("loss", "rewards/chosen"), {
        "pairs": "metrics of an uneven window are means over pairs",
        "micro-batches": "metrics of an uneven window are means of the micro-batches' means",
    }),
    Question("CONV-WARM-UP", "first_rate", "step", "run", _warm_up, ("logits",), {
        "full": "warm-up starts at the rate over the number of its steps", "zero": "warm-up starts at a rate of zero",
        "shifted": "step k of w warm-up steps has (k + 1) / (w + 1) of the rate",
    }),
    Question("CONV-LAST-BATCH", "last_batch", "runs", "run", _tail, ("logits",), {
        "kept": "the last, short batch of an epoch is used", "dropped": "the last, short batch of an epoch is dropped",
    }),
    Question("CONV-WINDOW", "incomplete_window", "runs", "run", _window, ("logits",), {
        "stepped": "a last, incomplete accumulation window takes a step",
        "dropped": "a last, incomplete window is dropped",
    }),
    Question("CONV-NORM", "norm_logged", "metrics", "metrics", _clipped, ("grad_norm",), {
        "whole": "the logged gradient norm is that before clipping",
        "clipped": "the logged gradient norm is that after clipping",
    }),
    Question("CONV-RATE", "rate_logged", "metrics", "metrics", _warm_up, ("learning_rate",), {
        "own": "the rate that is logged at a step is that step's",
        "next": "the rate that is logged at a step is the next step's",
    }),
)  # fmt: skip


def resolve(subject: Subject, predict: Predict, *, remembered: bool = False) -> list[Result]:
    """Ask every question that the subject can answer; set `subject.theory`; report what was found.

    `remembered`: ask only what was seen already; for the others the documentation's word is taken.
    """
    results = []
    for question in QUESTIONS:
        if question.capability not in subject.capabilities:
            continue
        if remembered and key(question.experiment(subject.theory)) not in subject.memory_keys():
            _promised(question, subject)
            continue
        if (result := ask(question, subject, predict)) is not None:
            results.append(result)
    return results


def asked_of(subject: Subject) -> list[Question]:
    """The questions that this subject can answer."""
    return [question for question in QUESTIONS if question.capability in subject.capabilities]


def ask(question: Question, subject: Subject, predict: Predict) -> Result | None:
    experiment = subject.own(question.experiment(subject.theory))
    seen = subject.observe(experiment)
    if seen.raised or seen.refused:
        return None
    if question.decide:
        answer = question.decide(subject)
        if answer is None:
            return _result(question, experiment, "unknown", None, "no allowed answer fits")
        return _answered(question, experiment, subject, answer)
    distances = {}
    for value in question.words:
        theory = subject.theory.but(**{question.field: value})
        distance = _distance(seen, predict(experiment, theory), question.tells)
        if distance is not None:
            distances[value] = distance
    if len(distances) < 2:
        return None
    (best, least), (_, second) = sorted(distances.items(), key=lambda item: item[1])[:2]
    if second - least < 1e-9:
        return None  # the answers do not differ here
    if least * CLEARLY > second:
        _promised(question, subject)
        return _result(question, experiment, "unknown", None, "no allowed answer is clearly the nearest")
    return _answered(question, experiment, subject, best)


def _promised(question: Question, subject: Subject) -> None:
    """Where nothing was seen, or a fault of another kind hides the answer, the documentation's word is taken."""
    promised = getattr(subject.says, question.says) if question.says else None
    if promised in question.words:
        subject.theory = subject.theory.but(**{question.field: promised})


def _answered(question: Question, experiment: Experiment, subject: Subject, best: str) -> Result:
    """Take the answer for all later predictions, and hold it against what is promised."""
    assert best in CONVENTIONS[question.field]
    subject.theory = subject.theory.but(**{question.field: best})
    promised = getattr(subject.says, question.says) if question.says else None
    if promised in question.words and promised != best:
        reason = f"the documentation promises: {question.words[promised]}"
        return _result(question, experiment, "fail", best, reason, expected=promised)
    return _result(question, experiment, "info", best, question.words[best])


def _distance(seen: Seen, paper: Seen, tells: tuple[str, ...]) -> float | None:
    """Largest deviation over the telling observables, in units of their size; None where none is visible."""
    from dpocheck.reading import entries

    found = []
    for name in tells:
        pair: list[Any] = []
        for record in (seen, paper):
            value = getattr(record, name, None)
            if value is None and getattr(record, "history", None):
                value = entries(record.history, "train", name) or None  # type: ignore[attr-defined]
            pair.append(value)
        if pair[0] is None or pair[1] is None:
            continue
        left, right = np.asarray(pair[0], float), np.asarray(pair[1], float)
        if left.shape != right.shape:
            found.append(1e3)
            continue
        size = float(np.max(np.abs(right))) or 1.0
        error = np.abs(left - right)
        found.append(float(np.max(np.where(np.isfinite(error), error, 1e3))) / size)
    return max(found) if found else None


def _result(
    question: Question, experiment: Experiment, verdict: str, value: str | None, reason: str, expected: Any = None
) -> Result:
    return Result(
        id=question.id, version=1, level="info" if verdict != "fail" else "must", tier="quick",
        chapter=question.chapter, stage=question.stage, verdict=verdict, reason=reason,
        claim=f"Which choice is made: {' or '.join(question.words.values())}?",
        source="left open by the papers; the trainer's documentation decides", observed=value, expected=expected,
        convention=(question.field, value) if value else None, experiments=(experiment,), scene=question.id.lower(),
    )  # fmt: skip
