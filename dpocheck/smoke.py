"""Does the subject answer at all, and in which precision?  Asked before any check, and told to its author."""

from __future__ import annotations

import numpy as np

from dpocheck import fixed
from dpocheck.checks import scenes
from dpocheck.experiment import (
    LogpExperiment,
    LossExperiment,
    Pair,
    StepExperiment,
    Table,
    TokenRow,
)
from dpocheck.observation import LogpSeen, LossSeen, Seen, StepSeen, TrainSeen
from dpocheck.probes.tokenizers import plain_words
from dpocheck.subject import UNIT, Subject

WORDS = plain_words(64)
PAIRS = (Pair((0, 1), (2, 3, WORDS.eos), (4, 5, WORDS.eos)), Pair((6, 7), (8, 9, WORDS.eos), (10, 11, WORDS.eos)))
POLICY = Table(64, 0.0, ((1, 2, 0.75), (2, 3, 1.375), (1, 4, -0.625), (7, 8, 1.125), (9, 62, 0.4375), (10, 11, 0.875)))
REFERENCE = Table(64, 0.0, ((1, 2, -0.375), (4, 5, 0.9375), (7, 10, 0.6875)))


def experiments(subject: Subject) -> list:
    """One small experiment for each capability the subject has."""
    objective = fixed.ORDINARY if subject.objective else fixed.plain(subject.only)
    row = TokenRow((0, 1, 2, 3, WORDS.eos), (1, 1, 1, 1, 1), (0, 0, 1, 1, 1))
    made = {
        "loss": LossExperiment((-3.5, -6.3), (-6.1, -5.9), (-4.2, -5.7), (-5.3, -6.6), objective),
        "sequence_logps": LogpExperiment(POLICY, (row, row)),
        "step": StepExperiment(POLICY, REFERENCE, PAIRS, objective, pad=WORDS.pad, eos=WORDS.eos),
        "train": scenes.run(scenes.rectangular(6), subject.theory),
    }  # fmt: skip
    return [subject.own(made[name]) for name in subject.capabilities]


def test(subject: Subject) -> str | None:
    """None where everything answered; else what is wrong, in words meant for the adapter's author."""
    for experiment in experiments(subject):
        seen = subject.observe(experiment)
        if trouble := _trouble(experiment, seen):
            return trouble
        if unit := _precision(experiment, seen):
            subject.precisions[type(experiment)] = max(unit, subject.coarsest)
    return None


def _trouble(experiment: object, seen: Seen) -> str | None:
    what = {"LossSeen": "loss", "LogpSeen": "sequence_logps", "StepSeen": "step", "TrainSeen": "train"}[
        type(seen).__name__
    ]
    if seen.refused:
        return f"{what}() refused the plainest experiment, one batch at an ordinary beta: {seen.refused}"
    if seen.raised:
        tail = f"\n{seen.output}" if seen.output else ""
        return f"{what}() raised on a small ordinary experiment: {seen.raised}{tail}"
    numbers = {
        "loss": getattr(seen, "reduced", None), "sequence_logps": getattr(seen, "logps", None),
        "step": getattr(seen, "loss", None), "train": getattr(seen, "logits", None),
    }[what]  # fmt: skip
    if numbers is None and what == "train":
        return "train() returned a policy without a parameter lm_head.weight; expected the model it was given, trained"
    if numbers is not None and not np.all(np.isfinite(np.asarray(numbers, float))):
        return f"{what}() returned {numbers} at ordinary numbers; expected finite values"
    if isinstance(seen, TrainSeen) and not seen.history and not _moved(seen):
        return (
            "train() returned a policy whose parameters did not move and logged no loss: did it run? "
            "Expected: a trained policy and a history with 'loss' for step 1"
        )
    return None


def _moved(seen: TrainSeen) -> bool:
    return bool(seen.moved and any(seen.moved.values()))


def _precision(experiment: object, seen: Seen) -> float | None:
    """The unit roundoff of the subject's arithmetic, read from what no fault of DPO can spoil.

    Losses and log-probs: the coarsest dtype that holds every number that came back.  Gradients: every row of a
    gradient of log-softmaxes sums to zero; what is left of it, against its size, is rounding.  A wrong softmax leaves
    something too: it is taken for a coarse dtype only where the numbers have as few digits as one holds.
    """
    if isinstance(seen, LossSeen | LogpSeen):
        values = np.atleast_1d(seen.per_pair if isinstance(seen, LossSeen) and seen.per_pair is not None else (
            seen.reduced if isinstance(seen, LossSeen) else seen.logps))  # fmt: skip
        return UNIT["float32"] if np.all(values == values.astype(np.float32)) else UNIT["float64"]
    gradient = seen.gradient if isinstance(seen, StepSeen | TrainSeen) else None
    if gradient is None or not np.any(gradient):
        return None
    size = np.abs(gradient).sum(axis=1)
    told = size > 1e-3 * size.max()  # a gradient that is read through an adapter leaves noise in rows that have none
    rest = float(np.max(np.abs(gradient.sum(axis=1))[told] / size[told]))
    if rest < 1e-12:
        return UNIT["float64"]
    return UNIT["bfloat16"] if rest >= 1e-4 and few_digits(gradient) else UNIT["float32"]


def few_digits(values: np.ndarray) -> bool:
    """Whether most numbers are, up to a common factor, numbers of bfloat16 (8 digits of a binary mantissa) or float16
    (11): the factor takes the greatest of them to one of the mantissas that there are.

    Of other numbers one in fifty is that near to one of float16 by chance.
    """
    sizes = np.abs(values[np.abs(values) > 1e-3 * np.abs(values).max()])
    mantissas, _ = np.frexp(sizes / sizes.max())
    for digits in (8, 11):
        for top in range(2 ** (digits - 1), 2**digits):
            scaled, _ = np.frexp(mantissas * (top / 2**digits))
            off = np.abs(scaled * 2.0**digits - np.round(scaled * 2.0**digits))
            if np.mean(off < 5e-3) > 0.5:
                return True
    return False
