"""Which equation does the subject optimise?  Fitted from what it did, not from what it says."""

from __future__ import annotations

from dataclasses import dataclass

from dpocheck.session import Predict
from dpocheck.subject import Subject


@dataclass(frozen=True)
class Equation:
    text: str = ""
    asked: str = ""
    residual: float | None = None


def equation(subject: Subject, predict: Predict) -> Equation:
    return Equation()
