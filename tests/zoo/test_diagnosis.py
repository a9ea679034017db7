"""Is a name withheld that other observations contradict, and kept beside a second fault that it says nothing of?"""

from __future__ import annotations

import numpy as np

from dpocheck import obedient, runner
from dpocheck.diagnose import Diagnostician, Ranked
from dpocheck.experiment import Objective, Pair, StepExperiment, Table
from dpocheck.oracle.theory import FAULTS, PAPER, Theory

POLICY, REFERENCE = (Table.of(np.random.default_rng(seed).normal(size=(16, 16))) for seed in (1, 2))
TWO = (Pair((1, 2), (3, 14), (5, 14)), Pair((6,), (7, 14), (4, 14)))  # two counted tokens in each completion
THREE = (Pair((1, 2), (3, 8, 14), (5, 9, 14)), Pair((6,), (7, 8, 14), (4, 9, 14)))
FOUR = (Pair((1, 2), (3, 8, 10, 14), (5, 9, 10, 14)),)


def step(pairs: tuple[Pair, ...]) -> StepExperiment:
    return StepExperiment(POLICY, REFERENCE, pairs, Objective(beta=0.5), pad=15, eos=14, dtype="float64")


def names(obeys: Theory, failing: tuple[Pair, ...], *others: tuple[Pair, ...]) -> list[Ranked]:
    """What is said of a trainer that obeys a theory, of one failing step and other steps."""
    doctor = Diagnostician(PAPER, 2.0**-53, runner.cached_predict, runner.cached_bound, ("step",))
    seen = [(step(pairs), runner.cached_predict(step(pairs), obeys)) for pairs in (failing, *others)]
    return doctor.ranked(seen[:1], seen[1:])


def is_mean(name: str, theory: Theory) -> bool:
    return theory.logps != "sum" or theory.normalised == "always"


def test_a_coincidence_of_the_failing_scene_is_no_name():
    # at beta 1/2 the mean over two tokens is what beta squared, and beta halved, would give; over three it is neither
    mean = FAULTS["mean over tokens instead of sum"]
    with obedient.without(is_mean):
        alone = [one.name for one in names(mean, TWO)]
        assert {"beta twice", "beta halved"} <= set(alone)
        assert names(mean, TWO, THREE, FOUR) == []


def test_the_right_name_stands_where_coincidences_fall():
    mean = FAULTS["mean over tokens instead of sum"]
    assert names(mean, TWO, THREE, FOUR)[0].theory == mean


def test_a_fault_keeps_its_name_beside_one_elsewhere_that_it_says_nothing_of():
    answer = obedient.answer(FAULTS["clipping ignored"].but(margin="policy"))
    assert answer.names[0] == "clipping ignored"
