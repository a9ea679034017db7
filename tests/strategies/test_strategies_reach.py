"""Do the strategies reach every hard case they promise, and is each example an experiment the oracle can answer?"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import permutations

import numpy as np
import pytest
from drawing import examples, simplest
from hypothesis import find, settings
from hypothesis import strategies as st

from dpocheck import strategies
from dpocheck.experiment import KINDS, LossExperiment, StepExperiment, TrainExperiment, from_plain, key, to_plain
from dpocheck.oracle import predict
from dpocheck.oracle.numbers import rounded
from dpocheck.oracle.theory import PAPER
from dpocheck.oracle.tokens import dataset
from dpocheck.strategies.losses import SIZES
from dpocheck.strategies.runs import SHAPES
from dpocheck.strategies.tokens import CASES

EVERY = {
    "losses": strategies.loss_experiments(),
    "losses in bfloat16": strategies.loss_experiments(regions=("plain", "integers"), dtype="bfloat16"),
    "objectives": strategies.loss_experiments(strategies.objectives(), lengths="drawn"),
    "logps": strategies.logp_experiments(),
    "logps of whole runs": strategies.logp_experiments(own_masks=False),
    "steps": strategies.step_experiments(),
    "rectangular steps": strategies.step_experiments(rectangular=True),
    "attended": strategies.step_experiments(body="clock"),
    "runs": strategies.train_experiments(),
    "clipped runs": strategies.train_experiments(batches=("whole", "even"), clip=True),
    "evaluated runs": strategies.train_experiments(batches=("logged",), still=True, held_out=True),
    "letters": strategies.letter_rows(),
    "truncated rows": strategies.chat_free_rows(limit=True),
    "plain rows": strategies.chat_free_rows(),
}
NAMES = tuple(EVERY)
EVERY["edges"] = strategies.loss_experiments(regions=("edges",))
EVERY["pairs"] = strategies.pairs()
EVERY["rectangular runs"] = strategies.train_experiments(rectangular=True)


@cache
def drawn_from(name: str, count: int) -> list:
    return examples(EVERY[name], count)


def numbers(seen) -> np.ndarray:
    """What the oracle says of an experiment of any kind."""
    for name in ("per_pair", "logps", "gradient", "logits"):
        if (value := getattr(seen, name, None)) is not None:
            return np.asarray(value)
    raise AssertionError("the oracle says nothing")


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_answers_every_example_with_finite_numbers(name):
    for experiment in drawn_from(name, 20):
        assert np.all(np.isfinite(numbers(predict(experiment)))), experiment


@pytest.mark.parametrize("name", NAMES)
def test_examples_survive_json(name):
    for experiment in drawn_from(name, 20):
        back = from_plain(to_plain(experiment))
        assert back == experiment
        assert key(back) == key(experiment)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_is_drawn_is_thrown_away(name):
    began, ended = [], []

    @st.composite
    def counted(draw):
        began.append(1)
        experiment = draw(EVERY[name])
        ended.append(1)
        return experiment

    drawn = examples(counted(), 60)
    assert len(drawn) > 20
    # The engine keeps its first trials short and cuts off those that need more choices; nothing else is lost.
    assert len(began) - len(ended) <= 0.4 * len(began)


def test_losses_shrink_to_one_plain_pair():
    found = find(EVERY["losses"], lambda _: True, settings=settings(database=None, derandomize=True, deadline=None))
    assert found == simplest(EVERY["losses"])
    assert found.arguments().tolist() == [[-1 - 1 / 64], [-1 - 2 / 64], [-1 - 4 / 64], [-1 - 8 / 64]]


@pytest.mark.parametrize("name", NAMES)
def test_the_simplest_example_moves_something(name):
    """Most faults are invisible where all numbers are zero or equal."""
    experiment = simplest(EVERY[name])
    if isinstance(experiment, LossExperiment):
        flat = experiment.arguments().ravel()
        assert len(set(flat)) == flat.size == 4
        lw, ll, rw, rl = flat
        assert (lw - rw) - (ll - rl) != 0
        assert np.all(flat < 0)
    elif isinstance(experiment, StepExperiment):
        assert len(experiment.pairs) == 1
        assert np.abs(predict(experiment).gradient).max() > 0.01
    elif isinstance(experiment, TrainExperiment):
        assert experiment.policy != experiment.reference
        assert np.abs(predict(experiment).gradient if experiment.recipe.steps == 1 else 1.0).max() > 1e-4
    else:
        lengths = {sum(row.completion) for row in experiment.rows}
        assert len(experiment.rows) == 2
        assert len(lengths) == 2


# -------------------------------------------------------------------------------------------------------------- losses


def h(experiment: LossExperiment) -> np.ndarray:
    lw, ll, rw, rl = experiment.arguments()
    return (lw - rw) - (ll - rl)


def margins(experiment: LossExperiment) -> np.ndarray:
    return experiment.objective.beta * h(experiment)


def some_within(values: np.ndarray, low: float, high: float) -> bool:
    return bool(np.any((values > low) & (values < high)))


def test_losses_reach_every_batch_size_and_stay_negative():
    drawn = drawn_from("losses", 300)
    assert {len(e.policy_chosen) for e in drawn} == set(SIZES)
    assert all(np.all(e.arguments() < -1e-3) for e in drawn)


@pytest.mark.parametrize(("case", "holds"), [
    ("small and large log-probs in one batch", lambda e: (z := -e.arguments()).min() < 0.02 and z.max() > 2000),
    ("a reference within 1e-5 of the policy", lambda e: 0 < np.abs(e.arguments()[0] - e.arguments()[2]).max() < 1e-5),
    ("a reference within 0.01, not 1e-5", lambda e: 1e-5 < np.abs(e.arguments()[0] - e.arguments()[2]).max() < 0.01),
    ("cancellation: 5000 nats, h near 0.001", lambda e: e.arguments().max() < -4000 and 0 < np.abs(h(e)).max() < 0.01),
    ("a tie beside other pairs", lambda e: len(h(e)) > 1 and (h(e) == 0).any() and (h(e) != 0).any()),
    ("beta 0.001", lambda e: e.objective.beta < 0.001),
    ("beta 64", lambda e: e.objective.beta == 64),
])  # fmt: skip
def test_losses_reach(case, holds):
    assert any(holds(e) for e in drawn_from("losses", 300)), case


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_integers_are_exact_in_every_order(dtype):
    """All partial sums of four integers below LARGEST are below 4 * LARGEST in steps of their common power of two, and
    LARGEST was chosen so that two of them are representable: no order of subtraction rounds a pairwise difference."""
    strategy = strategies.loss_experiments(regions=("integers",), dtype=dtype)
    for experiment in examples(strategy, 40):
        z = experiment.arguments()
        assert np.array_equal(rounded(z, dtype), z)
        for a, b in permutations(range(4), 2):
            assert np.array_equal(rounded(z[a] - z[b], dtype), z[a] - z[b])


@pytest.mark.parametrize(("case", "holds"), [
    ("a margin of 10 000", lambda e: some_within(margins(e), 9999, 10001)),
    ("a margin of -10 000", lambda e: some_within(margins(e), -10001, -9999)),
    ("where float32's exponential overflows", lambda e: some_within(np.abs(margins(e)), 87.9, 110)),
    ("where softplus turns linear", lambda e: some_within(margins(e), 20.4, 20.6)),
    ("a margin below 1e-7, not zero", lambda e: some_within(np.abs(margins(e)), 0, 1e-7)),
])  # fmt: skip
def test_edges_reach(case, holds):
    assert any(holds(e) for e in drawn_from("edges", 150)), case


def test_objectives_reach_every_kind_with_what_belongs_to_it():
    drawn = examples(strategies.objectives(), 300)
    assert {o.kind for o in drawn} == set(KINDS)
    assert {o.label_smoothing for o in drawn if o.kind == "sigmoid"} == {0.0, 0.125, 0.375}
    assert {o.label_smoothing for o in drawn if o.kind == "robust"} == {0.125, 0.375}
    assert all(o.gamma > 0 for o in drawn if o.kind == "simpo")
    assert {o.alpha for o in drawn if o.kind == "alpha_divergence"} == {0.25, 0.75}
    with pytest.raises(KeyError):
        strategies.objectives("ppo")


# ---------------------------------------------------------------------------------------------------- tokens and steps


def test_pairs_keep_their_promises():
    for of in drawn_from("pairs", 200):
        starts = [token for pair in of for token in pair.prompt]
        assert len(starts) == len(set(starts))
        for pair in of:
            assert 1 <= len(pair.prompt) <= 6
            assert pair.chosen != pair.rejected
            for completion in (pair.chosen, pair.rejected):
                assert completion.index(strategies.WORDS.eos) == len(completion) - 1
                assert len(completion) <= 11
                assert max(completion[:-1], default=0) < len(strategies.WORDS.words)


@pytest.mark.parametrize(("case", "holds"), [
    ("one pair", lambda of: len(of) == 1),
    ("an odd number of pairs", lambda of: len(of) == 5),
    ("a prompt of one token", lambda of: any(len(p.prompt) == 1 for p in of)),
    ("a prompt of six", lambda of: any(len(p.prompt) == 6 for p in of)),
    ("a chosen completion that is EOS", lambda of: any(len(p.chosen) == 1 for p in of)),
    ("a rejected completion that is EOS", lambda of: any(len(p.rejected) == 1 for p in of)),
    ("nine tokens with EOS", lambda of: any(len(p.chosen) == 9 for p in of)),
    ("a shared first token", lambda of: any(p.chosen[0] == p.rejected[0] and p.chosen[1] != p.rejected[1] for p in of)),
    ("a shared prefix of two", lambda of: any(p.chosen[:2] == p.rejected[:2] for p in of)),
    ("a repeated token", lambda of: any(a == b for p in of for a, b in zip(p.chosen, p.chosen[1:], strict=False))),
    ("token 0", lambda of: any(0 in p.chosen for p in of) and any(0 in p.rejected for p in of)),
    ("longer chosen here, longer rejected there", lambda of: any(len(p.chosen) > len(p.rejected) for p in of)
     and any(len(p.chosen) < len(p.rejected) for p in of)),
    ("the longest prompt beside another pair's longest completion", lambda of: len(of) > 1 and max(
        range(len(of)), key=lambda i: len(of[i].prompt)) != max(range(len(of)), key=lambda i: len(of[i].chosen))),
])  # fmt: skip
def test_pairs_reach(case, holds):
    assert any(holds(of) for of in drawn_from("pairs", 200)), case


def test_every_case_can_be_asked_for_alone():
    for case in CASES:
        assert examples(strategies.pairs(cases=(case,)), 5), case


def ids(experiment, which: str, value: int) -> set[int]:
    """The ids at positions whose `attention` or `completion` has a value."""
    return {i for row in experiment.rows for i, mark in zip(row.ids, getattr(row, which), strict=True) if mark == value}


@pytest.mark.parametrize(("case", "holds"), [
    ("left", lambda e: any(row.attention[0] == 0 for row in e.rows)),
    ("right", lambda e: any(row.attention[-1] == 0 for row in e.rows)),
    ("a whole column of pads", lambda e: not any(row.attention[-1] for row in e.rows)),
    ("pad is EOS", lambda e: ids(e, "attention", 0) == {strategies.WORDS.eos}),
    ("the pad's id is content", lambda e: ids(e, "attention", 0) & ids(e, "completion", 1) - {strategies.WORDS.eos}),
    ("token 0 as pad and as content", lambda e: ids(e, "attention", 0) == {0} and 0 in ids(e, "completion", 1)),
])  # fmt: skip
def test_rows_reach_padding(case, holds):
    assert any(holds(e) for e in drawn_from("logps", 100)), case


def test_nearly_all_batches_of_three_tell_apart_and_the_models_differ_everywhere():
    large = apart = 0
    for name in ("steps", "rectangular steps"):
        for e in drawn_from(name, 40):
            if len(e.pairs) >= 3:
                large += 1
                apart += strategies.tells_apart(strategies.log_ratios(e.pairs, e.policy, e.reference))
            assert all(a != b for a, b in zip(e.policy.entries, e.reference.entries, strict=True))
    assert large > 15
    assert apart >= 0.9 * large  # three pairs of very unequal lengths can have no choice: the longer is the less likely


def test_the_log_ratios_that_choose_the_numbers_are_the_oracles():
    for e in drawn_from("steps", 15):
        lw, ll, _, rl = strategies.log_ratios(e.pairs, e.policy, e.reference)
        metrics, beta = predict(e).metrics, e.objective.beta
        assert metrics["logps/chosen"] == pytest.approx(lw.mean(), rel=1e-12)
        assert metrics["rewards/rejected"] == pytest.approx(beta * (ll - rl).mean(), rel=1e-9, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------- runs


def test_runs_reach_every_shape_of_batch():
    def shape(e):
        return len(e.rows), e.recipe.batch, e.recipe.accumulation, e.recipe.steps

    drawn = drawn_from("rectangular runs", 200) + examples(EVERY["rectangular runs"], 200, 1)
    wanted = {each for name in ("whole", "even", "uneven", "steps") for each in SHAPES[name]}
    assert {shape(e) for e in drawn} == wanted
    assert {e.recipe.clip_norm for e in drawn_from("clipped runs", 60)} == {2.0**-5, 2.0**-7, 2.0**-9}


def test_held_out_sets_end_in_a_short_batch():
    for e in drawn_from("evaluated runs", 40):
        (_, held), = e.evaluation
        assert len(held) % e.recipe.eval_batch


def test_truncation_cuts_something_and_leaves_something():
    sides = set()
    for e in drawn_from("truncated rows", 80):
        sides.add(e.recipe.truncation)
        (whole,), (cut,) = dataset(replace(e, recipe=replace(e.recipe, max_length=None)), e.rows), dataset(e, e.rows)
        assert any(len(now.ids) < len(was.ids) for was, now in zip(whole, cut, strict=True))
        assert all(len(now.ids) > now.start for now in cut)
    assert sides == {"keep_start", "keep_end"}


@pytest.mark.parametrize(("case", "holds"), [
    ("no shared start", lambda row: row.chosen[0] != row.rejected[0]),
    ("a shared start that ends in a space", lambda row: row.chosen[:3] == row.rejected[:3] == "ef "),
    ("a text that ends in a space", lambda row: row.chosen.endswith(" ")),
    ("one text is the start of the other", lambda row: row.rejected.startswith(row.chosen)),
])  # fmt: skip
def test_letters_reach(case, holds):
    assert any(holds(row) for e in drawn_from("letters", 100) for row in e.rows), case


def test_an_option_shrinks_to_the_first_and_all_are_reached():
    for count in (1, 2, 3, 5, 7, 12):
        options = tuple(range(count))
        assert simplest(strategies.choose(*options)) == 0
        assert set(examples(strategies.choose(*options), 200)) == set(options)
    with pytest.raises(ValueError, match="at least one option"):
        strategies.choose()


@pytest.mark.parametrize(("bos", "ahead"), [("tokenizer", 0), ("added", 1)])
def test_a_row_that_is_cut_keeps_some_of_its_completion_behind_the_bos_of_the_trainer(bos, ahead):
    theory = PAPER.but(bos=bos)
    for experiment in examples(strategies.chat_free_rows(limit=True, ahead=ahead), 40):
        ((chosen, _),) = dataset(experiment, experiment.rows, theory)
        assert chosen.start < len(chosen.ids) == experiment.recipe.max_length
