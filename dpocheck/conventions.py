"""Which of the choices that the sources leave open did this trainer make?  Asked before the checks that depend on it."""

from __future__ import annotations

from dpocheck.result import Result
from dpocheck.session import Predict
from dpocheck.subject import Subject


def resolve(subject: Subject, predict: Predict) -> list[Result]:
    return []
