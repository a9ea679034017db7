"""Drawing examples for the tests of the strategies, and a subject that answers as the oracle predicts."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, find, given, seed, settings

from dpocheck.adapter import CAPABILITIES, Says
from dpocheck.oracle import predict
from dpocheck.oracle.theory import PAPER, Theory


def examples(strategy: Any, count: int = 150, number: int = 0) -> list[Any]:
    """The first examples of a seed."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count, database=None, deadline=None, phases=(Phase.generate,), derandomize=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


def simplest(strategy: Any) -> Any:
    """What everything shrinks to: the example in which every choice is the first, unless one of fewer choices is found
    among the next few."""
    some = settings(database=None, derandomize=True, deadline=None, max_examples=5, phases=(Phase.generate,))
    return find(strategy, lambda _: True, settings=some)


class Oracle:
    """A subject that computes what a theory says, exactly, and answers every kind itself."""

    capabilities = CAPABILITIES
    says = Says()
    theory = PAPER
    objective = None

    def __init__(self, obeys: Theory = PAPER) -> None:
        self.obeys, self.asked = obeys, []
        self.only: dict[str, Any] = {}

    def own(self, experiment: Any, check: str = "") -> Any:
        return experiment

    def cannot(self, experiment: Any) -> None:
        return None

    def precision(self, experiment: Any) -> float:
        return 2.0**-24

    def observe(self, experiment: Any) -> Any:
        self.asked.append(experiment)
        return predict(experiment, self.obeys)
