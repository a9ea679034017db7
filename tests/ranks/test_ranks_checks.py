"""The chapter on several processes: the honest miniature passes it, each specimen fails its check, and the weight of
every pair that is read of a run is what was put in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dpocheck import runner, selftest
from dpocheck.adapter import Says
from dpocheck.check import CHECKS, Case
from dpocheck.checks import ranks, scenes
from dpocheck.experiment import Objective, Recipe
from dpocheck.oracle import predict
from dpocheck.oracle.schedule import plan
from dpocheck.oracle.theory import PAPER, Theory
from dpocheck.tolerances import bound
from dpocheck.zoo import SPECIMENS

CHAPTER = {id: check for id, check in CHECKS.items() if check.chapter == "ranks"}
BROKEN = {name: declared.caught_by for name, declared in SPECIMENS.items() if declared.caught_by in CHAPTER}
MAY_FAIL = {  # what else each specimen spoils: the step of unequal ranks is part of three checks
    "every-rank-sees-the-same-rows": {"RANKS-PAIRS", "RANKS-METRICS", "RANKS-EVALUATION", "RANKS-PRECOMPUTED"},
    "ranks-filled-up": {"RANKS-EVALUATION", "RANKS-PRECOMPUTED"},
    "short-rank-left-out": {"RANKS-EVALUATION", "RANKS-PRECOMPUTED"},
    "ranks-added": {"RANKS-PAIRS", "RANKS-PRECOMPUTED"},
    "mean-of-rank-means": {"RANKS-PRECOMPUTED"},
    "ranks-not-synchronised": {"RANKS-WEIGHTS", "RANKS-PAIRS", "RANKS-PRECOMPUTED"},
    "metrics-of-the-first-rank": {"RANKS-EVALUATION"},
    "reference-trained-on-other-ranks": {"RANKS-EVALUATION"},
}


# ------------------------------------------------------------------------------------------------------------ real runs


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    made = selftest.Zoo(tmp_path_factory.mktemp("zoo"))
    yield made
    made.close()


def judged(zoo, name: str) -> dict[str, object]:
    subject = selftest.restricted(zoo.subject(name), "train")
    subject.theory, subject.precisions = PAPER.but(uneven="pairs", uneven_metrics="pairs"), {}
    run = selftest.session(subject)
    return {id: run.result(check) for id, check in CHAPTER.items()}


def test_the_miniature_passes_on_two_processes(zoo):
    results = judged(zoo, "miniature")
    assert {id: result.verdict for id, result in results.items()} == dict.fromkeys(CHAPTER, "pass")


@pytest.mark.parametrize("name", BROKEN)
def test_a_specimen_fails_its_check_and_no_other_that_it_does_not_touch(name, zoo):
    failed = {id for id, result in judged(zoo, name).items() if result.verdict != "pass"}
    assert BROKEN[name] in failed
    assert failed <= {BROKEN[name], *MAY_FAIL.get(name, set())}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ranks-filled-up", "count again: the pairs weigh 0.333, 0.167, 0.167, 0.167, 0.167"),  # 2/6, then 1/6 each
        ("mean-of-rank-means", "means is taken: the pairs weigh 0.167, 0.167, 0.167, 0.250, 0.250"),  # 1/2 1/3, 1/2 1/2
        ("short-rank-left-out", "lost: pair 4, 5; the pairs weigh 0.333, 0.333, 0.333, 0.000, 0.000"),
    ],
)
def test_the_report_says_what_each_pair_weighs(name, words, zoo):
    assert words in judged(zoo, name)["RANKS-PAIRS"].reason


@pytest.mark.long
def test_the_miniature_passes_with_accumulation_clipping_three_processes_and_a_last_step_for_one(zoo):
    subject = selftest.restricted(zoo.subject("miniature"), "train")
    subject.theory, subject.precisions = zoo.honest("train")
    run = selftest.session(subject)
    run.tier = "full"
    assert {id: run.result(check).verdict for id, check in CHAPTER.items()} == dict.fromkeys(CHAPTER, "pass")


@pytest.mark.long
@pytest.mark.parametrize("changes", [{"shuffle": True, "momentum": 0.5}, {"precompute_reference": True}], ids=str)
@pytest.mark.parametrize(("processes", "batch"), [(2, 3), (3, 2)])
def test_n_processes_end_where_one_does(changes, processes, batch, zoo):
    """Seven pairs in steps of six: the second step has one pair for all processes."""
    subject = selftest.restricted(zoo.subject("miniature"), "train")
    steps, rate = 4, 0.5
    recipe = Recipe(Objective(beta=0.5), learning_rate=rate, dtype="float64", steps=steps, **changes)
    alone = scenes.run(scenes.rectangular(7), PAPER, replace(recipe, batch=6))
    together = replace(alone, recipe=replace(recipe, batch=batch, world_size=processes))
    one, many = subject.observe(alone), subject.observe(together)
    # A gradient is at most 1 and is a sum of six shares, in two orders: 8 roundings each.  Momentum of 1/2 doubles it.
    # A logit, at most 4 and stored once a step, is rounded on both sides.  A step of rate 1/2 stretches what came
    # before by at most 1 + rate * (the largest curvature, beta^2 / 4 * 6 tokens + 1/2) < 1.5.
    each = 2.0**-53 * (2 * 8 * rate * 2 + 2 * 4)
    assert np.max(np.abs(one.logits - many.logits)) <= sum(each * 1.5**step for step in range(steps))
    assert np.max(np.abs(one.logits - alone.policy.logits())) > 0.1
    assert len(many.history) == steps
    for mine, due in zip(many.history, one.history, strict=True):
        assert mine["metrics"] == pytest.approx(due["metrics"], rel=1e-12)


# ---------------------------------------------------------------------------------------------------- what is predicted


SILENT = Says()


def case(theory: Theory, says: Says = SILENT) -> Case:
    """Five pairs on two processes of three, seen as `theory` predicts."""
    (scene,) = ranks._uneven(PAPER)
    (experiment,) = scene.experiments
    limit = lambda e, name, t, u: bound(e, name, predict(e, t), u, t)  # noqa: E731
    theories = PAPER.but(uneven="pairs")
    return Case((experiment,), (predict(experiment, theory),), theories, says, predict=predict, limit=limit)


@pytest.mark.parametrize(
    ("theory", "due"),
    [
        (PAPER.but(uneven="pairs"), [1 / 5] * 5),
        (PAPER.but(uneven="micro-batches"), [1 / 6] * 3 + [1 / 4] * 2),
        (PAPER.but(ranks_tail="repeated"), [2 / 6] + [1 / 6] * 4),
        (PAPER.but(uneven="pairs", gradient_scale=2.0), [2 / 5] * 5),
    ],
)
def test_the_weight_of_each_pair_is_read_from_its_own_logits(theory, due):
    one = case(theory)
    seen, _ = ranks.weights(one, one.observed[0].logits)
    assert seen == pytest.approx(due, abs=1e-12)


def test_an_error_in_a_logit_moves_a_weight_no_further_than_said():
    one = case(PAPER.but(uneven="pairs"))
    seen, reach = ranks.weights(one, one.observed[0].logits)
    error = 1e-3 * np.sign(np.random.default_rng(0).normal(size=one.observed[0].logits.shape))
    moved, _ = ranks.weights(one, one.observed[0].logits + error)
    assert np.all(np.abs(moved - seen) <= 1e-3 * reach)
    assert np.all(np.abs(moved - seen) > 0)


@pytest.mark.parametrize(
    ("theory", "says", "verdict"),
    [
        (PAPER.but(uneven="pairs"), Says(), "pass"),
        (PAPER.but(ranks_tail="repeated"), Says(), "fail"),
        (PAPER.but(ranks_tail="repeated"), Says(uneven_ranks="repeated"), "info"),
        (PAPER.but(uneven="micro-batches"), Says(uneven_ranks="repeated"), "fail"),
        (PAPER.but(uneven="micro-batches"), Says(uneven_accumulation="micro-batches"), "info"),
        (PAPER.but(uneven="pairs", gradient_scale=2.0), Says(uneven_ranks="repeated"), "fail"),
    ],
)
def test_a_pair_that_counts_twice_is_a_choice_only_where_it_is_documented(theory, says, verdict):
    outcome = ranks.each_pair(case(theory, says))
    assert outcome.verdict == verdict
    assert ("as documented" in outcome.reason) == (verdict == "info")


@pytest.mark.parametrize(
    ("pairs", "changes", "windows"),
    [
        (5, {"batch": 3, "world_size": 2}, [((0, 1, 2), (3, 4, 0))]),
        (5, {"batch": 1, "world_size": 2}, [((0,), (1,)), ((2,), (3,)), ((4,), (0,))]),
        (3, {"batch": 4, "world_size": 2}, [((0, 1, 2, 0), (1, 2, 0, 1))]),  # more than once round
        (6, {"batch": 3, "world_size": 2}, [((0, 1, 2), (3, 4, 5))]),  # nothing to fill
        (5, {"batch": 3}, [((0, 1, 2),), ((3, 4),)]),  # one process fills nothing
    ],
)
def test_rows_fill_the_last_processes_from_the_start_of_the_epoch(pairs, changes, windows):
    recipe = Recipe(steps=None, epochs=1, **changes)
    assert list(plan(pairs, recipe, PAPER.but(ranks_tail="repeated")).windows) == windows


def test_an_even_step_is_the_same_under_every_choice_that_is_left_open():
    (scene,) = ranks._even(PAPER)
    (experiment,) = scene.experiments
    for choice in ({"uneven": "pairs"}, {"ranks_tail": "repeated"}, {"incomplete_window": "dropped"}):
        assert np.array_equal(predict(experiment, PAPER.but(**choice)).gradient, predict(experiment, PAPER).gradient)
    alone = replace(experiment, recipe=replace(experiment.recipe, world_size=1, batch=6))
    assert predict(alone, PAPER).gradient == pytest.approx(predict(experiment, PAPER).gradient, abs=1e-15)


def test_fillers_in_the_evaluation_would_show():
    """Five held-out pairs, the first of them once more: each metric moves by over four bounds, as a rival must."""
    one = case(PAPER.but(uneven="pairs"))
    (experiment,) = one.experiments
    name, held = experiment.evaluation[0]
    filled = replace(experiment, evaluation=((name, (*held, held[0])),))
    for metric in ranks.METRICS:
        due, other = (
            next(entry["metrics"][metric] for entry in predict(e, PAPER).history if entry["split"] == name)
            for e in (experiment, filled)
        )
        assert abs(due - other) > 4 * np.max(one.bound(f"history.{name}.{metric}"))


def test_the_chapter_is_not_applicable_where_nobody_says_that_the_trainer_runs_in_several_processes(zoo):
    subject = selftest.restricted(zoo.subject("miniature"), "train")
    subject.transport.about["ranks"] = False
    result = selftest.session(subject).result(CHECKS["RANKS-SPLIT"])
    assert (result.verdict, "ranks = True" in result.reason) == ("not-applicable", True)
    assert runner.wants(runner.Options(subject="zoo", tier="full"), CHECKS["RANKS-SPLIT"])
    assert not runner.wants(runner.Options(subject="zoo"), CHECKS["RANKS-SPLIT"])  # N imports of the trainer
