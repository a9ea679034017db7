"""Does the driver draw the same for the same seed, shrink within its budget, count honestly, and stay silent?"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from drawing import Oracle, examples, simplest

from dpocheck import checks, strategies  # noqa: F401  (declares every check)
from dpocheck.check import CHECKS, Comparison, Scene
from dpocheck.draw import Ask, Tally, draw, search
from dpocheck.experiment import LossExperiment, key
from dpocheck.oracle.theory import PAPER
from dpocheck.runner import cached_bound, cached_predict
from dpocheck.session import Session

PLAIN = strategies.loss_experiments().map(lambda experiment: (experiment,))
DRAWING = {name: check for name, check in CHECKS.items() if check.draw}


@dataclass(frozen=True)
class Told:
    comparison: Comparison
    experiments: tuple = ()


class Judge:
    """Answers by a rule of the pair count, and remembers what it was asked."""

    def __init__(self, rule) -> None:
        self.rule, self.asked = rule, []

    def __call__(self, experiments):
        self.asked.append(experiments)
        return Told(Comparison(self.rule(experiments[0]), reason="because"), experiments)


def pairs(experiment: LossExperiment) -> int:
    return len(experiment.policy_chosen)


def drawn_keys(seed: int) -> list[str]:
    judge = Judge(lambda _: "pass")
    search(PLAIN, Tally(judge), examples=20, seed=seed)
    return [key(experiments[0]) for experiments in judge.asked]


def test_a_seed_draws_the_same_experiments_and_another_seed_others():
    assert drawn_keys(3) == drawn_keys(3)
    assert drawn_keys(3) != drawn_keys(4)
    assert len(set(drawn_keys(3))) == len(drawn_keys(3)) > 10


def test_a_seed_draws_the_same_whatever_modules_are_loaded(tmp_path):
    """Hypothesis takes constants for its integers and floats from the local modules it finds loaded."""
    constants = f"NUMBERS = {list(range(64))}\nFLOATS = {[i / 7 for i in range(64)]}\n"
    (tmp_path / "full_of_constants.py").write_text(constants)
    code = "import sys; sys.path[:0] = {paths}; {extra}import test_draw; print(test_draw.drawn_keys(3))"
    here = str(__import__("pathlib").Path(__file__).parent)
    told = [
        subprocess.run(
            [sys.executable, "-c", code.format(paths=[here, str(tmp_path)], extra=extra)],
            capture_output=True, text=True, check=True, cwd=tmp_path,
        ).stdout
        for extra in ("", "import full_of_constants; ")
    ]  # fmt: skip
    assert told[0] == told[1]
    assert not (tmp_path / ".hypothesis").exists()


def test_the_smallest_failing_example_is_reported():
    judge = Judge(lambda e: "fail" if pairs(e) > 2 else "pass")
    tally = search(PLAIN, Tally(judge, budget=120), examples=30, seed=0)
    (smallest,) = tally.outcome().experiments
    assert smallest == replace(simplest(strategies.loss_experiments(sizes=(3,))), objective=smallest.objective)
    assert "to shrink the failure" in tally.outcome().comparison.reason


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_shrinking_keeps_to_its_budget(budget):
    judge = Judge(lambda e: "fail" if pairs(e) > 2 else "pass")
    tally = search(PLAIN, Tally(judge, budget), examples=30, seed=0)
    first = next(i for i, asked in enumerate(judge.asked) if pairs(asked[0]) > 2)
    assert len(judge.asked) - first - 1 == tally.spent <= budget
    assert pairs(tally.outcome().experiments[0]) > 2


def test_without_a_budget_the_first_failure_is_reported_as_it_was_drawn():
    judge = Judge(lambda e: "fail" if pairs(e) > 2 else "pass")
    tally = search(PLAIN, Tally(judge), examples=30, seed=0)
    assert tally.outcome().experiments == judge.asked[-1]


def test_nothing_is_drawn_or_shrunk_after_the_subject_died():
    judge = Judge(lambda e: "error" if pairs(e) > 2 else "pass")
    tally = search(PLAIN, Tally(judge, budget=50), examples=30, seed=0)
    assert tally.outcome().comparison.verdict == "error"
    assert pairs(judge.asked[-1][0]) > 2
    assert sum(pairs(asked[0]) > 2 for asked in judge.asked) == 1


def test_a_death_while_shrinking_is_reported_and_ends_it():
    answers = iter(["pass", "pass", "fail", "pass", "pass", "error"])
    judge = Judge(lambda _: next(answers))  # raises where it is asked once more
    tally = search(PLAIN, Tally(judge, budget=50), examples=30, seed=0)
    assert len(judge.asked) == 6
    assert tally.outcome().comparison.verdict == "error"


def test_examples_that_all_tell_nothing_make_the_verdict_unknown():
    tally = search(PLAIN, Tally(Judge(lambda _: "unknown")), examples=12, seed=0)
    told = tally.outcome().comparison
    assert told.verdict == "unknown"
    assert told.reason.startswith("nothing drawn told anything: because; ")
    assert f"{tally.drawn} drawn, 0 judged, {tally.drawn} told nothing" in told.reason


def test_some_that_tell_nothing_are_counted_beside_the_judged():
    tally = search(PLAIN, Tally(Judge(lambda e: "unknown" if pairs(e) == 1 else "pass")), examples=30, seed=0)
    assert tally.outcome().comparison.verdict == "pass"
    assert tally.unknown > 0
    assert tally.judged > 0
    assert tally.drawn == tally.judged + tally.unknown
    assert f"{tally.judged} judged, {tally.unknown} told nothing" in tally.outcome().comparison.reason


def test_what_does_not_apply_is_counted_and_reports_nothing_of_its_own():
    tally = search(PLAIN, Tally(Judge(lambda _: "not-applicable")), examples=12, seed=0)
    assert tally.outcome() is None
    assert tally.words() == f"{tally.drawn} drawn, 0 judged, {tally.drawn} not applicable"


def test_nothing_is_printed(capfd):
    search(PLAIN, Tally(Judge(lambda e: "fail" if pairs(e) > 2 else "pass"), budget=20), examples=30, seed=0)
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")


def test_a_subject_that_changes_its_mind_does_not_unsettle_the_search():
    answers = iter(["fail", *["pass"] * 500])
    tally = search(PLAIN, Tally(Judge(lambda _: next(answers)), budget=20), examples=5, seed=0)
    assert tally.outcome().comparison.verdict == "fail"


# -------------------------------------------------------------------------------------------------- in a whole audit


class OneBadSize(Oracle):
    """Right but for batches of more than five pairs, which no scene of LOSS-VALUE has."""

    def observe(self, experiment):
        seen = super().observe(experiment)
        if isinstance(experiment, LossExperiment) and pairs(experiment) > 5:
            return replace(seen, per_pair=seen.per_pair + 1.0, reduced=seen.reduced + 1.0)
        return seen


def session(subject, **options) -> Session:
    return Session(subject, cached_predict, cached_bound, **options)


def test_the_full_tier_finds_what_no_scene_shows_and_reports_the_smallest():
    result = session(OneBadSize(), tier="full", shrink=60).result(CHECKS["LOSS-VALUE"])
    assert (result.verdict, result.scene) == ("fail", "drawn")
    assert pairs(result.experiments[0]) == 8
    assert result.error == pytest.approx(1.0)


def test_the_quick_tier_draws_nothing():
    subject = OneBadSize()
    assert session(subject, tier="quick", shrink=60).result(CHECKS["LOSS-VALUE"]).verdict == "pass"
    assert len(subject.asked) == len(CHECKS["LOSS-VALUE"].scenes)


def test_where_a_scene_fails_nothing_is_drawn():
    subject = Oracle(PAPER.but(offset=0.5))
    assert session(subject, tier="full", shrink=60).result(CHECKS["LOSS-VALUE"]).verdict == "fail"
    assert len(subject.asked) == len(CHECKS["LOSS-VALUE"].scenes)


def test_a_pass_says_how_many_were_drawn():
    result = session(Oracle(), tier="full").result(CHECKS["LOSS-VALUE"])
    assert result.verdict == "pass"
    count = int(result.reason.split()[0])
    assert 25 < count <= 30  # the same experiment can be drawn twice, and counts once
    assert result.reason == f"{count} drawn, {count} judged"


def test_another_seed_asks_other_experiments():
    asked = []
    for seed in (0, 0, 1):
        subject = Oracle()
        session(subject, tier="full", seed=seed).result(CHECKS["LOSS-VALUE"])
        asked.append([key(experiment) for experiment in subject.asked])
    assert asked[0] == asked[1] != asked[2]


def test_whole_runs_are_drawn_less_often_than_what_is_answered_natively():
    subject = SimpleNamespace(capabilities=("train",))
    for capabilities, count in ((("loss",), 30), (subject.capabilities, 10)):
        judge = Judge(lambda _: "pass")
        draw(CHECKS["LOSS-VALUE"], PAPER, capabilities, judge, seed=0, shrink=0)
        assert 0.8 * count < len(judge.asked) <= count


# --------------------------------------------------------------------------------------------------- power of the draws


# Judged by `agree`, where the power rule is applied to every scene.
POWERFUL = ("GRAD-IDENTITY", "GRAD-RAGGED", "LOGP-VALUE", "ACCUM-EVEN", "STEP-TWO", "CLIP-NORM", "LOSS-SMOOTHING")


def judged(name: str, subject: Oracle, experiments: tuple) -> str:
    check = CHECKS[name]
    return session(subject, blocking=False).outcome(check, Scene("drawn", experiments)).comparison.verdict


@pytest.mark.parametrize("name", DRAWING)
def test_the_paper_passes_and_the_simplest_example_is_one_it_passes(name):
    check = DRAWING[name]
    for native in (True, False):
        strategy = check.draw(Ask(PAPER, native))
        told = {judged(name, Oracle(), each) for each in [simplest(strategy), *examples(strategy, 3)]}
        assert told <= {"pass", "unknown"}, told
        assert "pass" in told


@pytest.mark.parametrize("name", [name for name in DRAWING if DRAWING[name].rivals])
def test_every_rival_fails_some_drawn_example_and_never_passes_where_a_pass_would_be_claimed(name):
    """A subject that obeys a rival theory either fails a drawn example, or the example is one that proves nothing."""
    check = DRAWING[name]
    drawn = [simplest(check.draw(Ask(PAPER, True))), *examples(check.draw(Ask(PAPER, True)), 6)]
    for rival in check.rivals:
        told = [judged(name, Oracle(rival), each) for each in drawn]
        assert "fail" in told, (rival.differs(), told)
        if name in POWERFUL:
            assert "pass" not in told, (rival.differs(), told)


def test_numbers_of_the_oracle_subject_are_the_predictions():
    experiment = simplest(strategies.loss_experiments())
    assert np.array_equal(Oracle().observe(experiment).per_pair, cached_predict(experiment, PAPER).per_pair)
