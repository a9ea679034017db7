"""Are the oracle's optima optimal, its floors floors and its certificates true?"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_scenes import table
from scipy.special import entr, expit, logsumexp

from dpocheck.experiment import Objective, Pair, StepExperiment, Table
from dpocheck.oracle import PAPER, certificate, loss_floor, optimum, predict, solve_counts
from dpocheck.oracle.optimum import completion_logps

# A tree with one token per node: after prompt 1: 2, 3 or 4; after 2: 5 or 6; each ends with EOS 14 or in 7, 8
TREE = ((2, 5), (2, 6), (3, 7), (3, 8), (4,))
STRENGTHS = dict(zip(TREE, (1, 2, 3, 6, 4), strict=True))


def rows(strengths: dict, pairs=None, copies: int = 1) -> tuple[Pair, ...]:
    """w_a rows that prefer a to b, for each a, b compared."""
    pairs = list(permutations(strengths, 2)) if pairs is None else pairs + [(b, a) for a, b in pairs]
    return tuple(Pair((1,), a, b) for a, b in pairs for _ in range(copies * strengths[a]))


def closed() -> Table:
    """A reference in which nothing outside the tree has any probability to speak of."""
    logits = np.full((16, 16), -200.0)
    for y in TREE:
        for u, v in zip((1, *y[:-1]), y, strict=True):
            logits[u, v] = 0.25 * ((3 * u + 7 * v) % 5) - 0.5
    return Table.of(logits)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("start", [table(2), closed()], ids=["open", "closed"])
def test_the_closed_form_has_no_gradient_and_reaches_the_floor(beta, start):
    found, pairs = optimum(start, 1, STRENGTHS, beta), rows(STRENGTHS)
    logits = np.full((16, 16), -200.0)  # a policy that writes nothing outside the tree
    for u, children in found.nodes.items():
        for v, logit in children.items():
            logits[u, v] = logit
    seen = predict(StepExperiment(Table.of(logits), start, pairs, Objective(beta=beta), dtype="float64"))
    assert seen.loss == pytest.approx(loss_floor(pairs), abs=1e-13)
    assert np.max(np.abs(seen.gradient)) < 1e-14
    assert found.log_policy == pytest.approx(completion_logps(logits, 1, TREE), abs=1e-12)


def test_the_optimum_by_hand():
    # pi_ref (1/2, 1/2), w = (1, 3), beta 1/2: pi* ~ (1, 9)
    found = optimum(Table(4), 0, {(1,): 1, (2,): 3}, 0.5)
    assert np.exp(found.log_policy) == pytest.approx([0.1, 0.9], abs=1e-15)
    assert found.nodes[0] == pytest.approx({1: np.log(0.1), 2: np.log(0.9)})


def test_the_optimum_depends_on_nothing_but_the_ratios():
    # T3.4: multiplicities, the graph of comparisons and the scale of the strengths do not matter
    start = closed()
    base = optimum(start, 1, STRENGTHS, 0.5)
    scaled = optimum(start, 1, {y: 3 * w for y, w in STRENGTHS.items()}, 0.5)
    assert scaled.log_policy == pytest.approx(base.log_policy, abs=1e-14)
    policy = Table.of(base.logits(start))
    chain = list(pairwise(TREE))
    for pairs in (rows(STRENGTHS, chain), rows(STRENGTHS, copies=2), rows(STRENGTHS)):
        seen = predict(StepExperiment(policy, start, pairs, Objective(beta=0.5), dtype="float64"))
        assert np.max(np.abs(seen.gradient)) < 1e-14


def test_log_ratios_at_the_optimum_are_log_strengths():
    # r = beta log(pi*/pi_ref) + constant = log w
    start = closed()
    found = optimum(start, 1, STRENGTHS, 0.25)
    rewards = 0.25 * (found.log_policy - completion_logps(start, 1, TREE))
    assert rewards - rewards[0] == pytest.approx(found.rewards - found.rewards[0], abs=1e-13)


def test_gradient_descent_ends_at_the_predicted_logits():
    # K = 4 complete, beta 1/2, rate 2/beta^2 = 8: the step 73 is within 1e-6, by the theory of depth-1 tables
    start = Table.of(np.where(np.arange(16)[None, :] < 4, 0.25 * np.arange(16)[None, :], -200.0) * np.ones((16, 1)))
    strengths = {(0,): 1, (1,): 2, (2,): 3, (3,): 6}
    pairs, logits = rows(strengths), start
    for _ in range(200):
        seen = predict(StepExperiment(logits, start, pairs, Objective(beta=0.5), dtype="float64"))
        logits = Table.of(logits.logits() - 8.0 * seen.gradient)
    assert logits.logits() == pytest.approx(optimum(start, 1, strengths, 0.5).logits(start), abs=1e-9)


def test_bad_trees_are_refused():
    with pytest.raises(ValueError, match="beginning"):
        optimum(Table(8), 0, {(1,): 1, (1, 2): 2}, 0.5)
    with pytest.raises(ValueError, match="two places"):
        optimum(Table(8), 0, {(1, 2): 1, (3, 1, 4): 2}, 0.5)
    with pytest.raises(ValueError, match="positive"):
        optimum(Table(8), 0, {(1,): 0, (2,): 2}, 0.5)


def test_floors_by_hand():
    a, b, c = (2,), (3,), (4,)
    assert loss_floor([Pair((1,), a, b)]) == 0.0
    assert loss_floor([Pair((1,), a, b), Pair((1,), b, a)]) == pytest.approx(np.log(2))
    assert loss_floor([Pair((1,), a, b), Pair((5,), b, a)]) == 0.0  # other prompts
    assert loss_floor([Pair((1,), a, a)]) == pytest.approx(np.log(2))
    mixed = [Pair((1,), a, b)] * 3 + [Pair((1,), b, a)] + [Pair((1,), a, c)] * 4
    assert loss_floor(mixed) == pytest.approx((entr(0.75) + entr(0.25)) / 2)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12), st.integers(0, 50))
def test_no_policy_is_below_the_floor(edges, seed):
    pairs = tuple(Pair((1,), (2 + a, 14), (2 + b, 14)) for a, b in edges)
    experiment = StepExperiment(table(seed), table(seed + 1), pairs, Objective(beta=2.0), dtype="float64")
    assert predict(experiment).loss >= loss_floor(pairs) - 1e-12
    # even the best one found: the identity N (L - floor) = sum n KL, at the data's own frequencies
    better = replace(experiment, policy=Table.of(8 * experiment.policy.logits()))
    assert predict(better).loss >= loss_floor(pairs) - 1e-12


def connected(draw_counts) -> np.ndarray:
    counts = np.array(draw_counts, dtype=float)
    np.fill_diagonal(counts, 0.0)
    k = len(counts)
    for i in range(k):  # a cycle through all: strongly connected
        counts[i, (i + 1) % k] += 1.0
    return counts


graphs = st.integers(2, 6).flatmap(
    lambda k: st.lists(st.lists(st.integers(0, 5), min_size=k, max_size=k), min_size=k, max_size=k)
).map(connected)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(graphs, st.sampled_from([0.1, 0.5, 1.0, 2.0]))
def test_newton_finds_the_stationary_point(counts, beta):
    found = solve_counts(counts, beta)
    m = beta * (found.u[:, None] - found.u[None, :])
    pull = counts * expit(-m)
    assert np.max(np.abs(pull.sum(axis=1) - pull.sum(axis=0))) / counts.sum() < 1e-13
    assert found.bound < 1e-10
    # DPO's margins do not depend on beta
    assert found.u * beta == pytest.approx(solve_counts(counts, 1.0).u, abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(graphs, st.sampled_from([0.25, 1.0]), st.integers(0, 1000), st.sampled_from([0.01, 0.1, 0.5]))
def test_the_certificate_bounds_every_margin(counts, beta, seed, size):
    best = solve_counts(counts, beta)
    off = best.u + size / beta * np.random.default_rng(seed).normal(size=len(counts))
    _, bound = certificate(off, counts, beta)
    moved = beta * ((off - best.u)[:, None] - (off - best.u)[None, :])
    compared = (counts + counts.T) > 0
    assert np.max(np.abs(moved[compared])) <= bound + 1e-9


def test_integer_strengths_are_solved_to_the_closed_form():
    w = np.array([1.0, 2.0, 3.0, 6.0])
    counts = np.tile(w[:, None], (1, 4))
    found = solve_counts(counts, 0.1)
    assert found.u - found.u[0] == pytest.approx((np.log(w) - np.log(w[0])) / 0.1, abs=1e-11)


def test_one_sided_preferences_have_no_optimum():
    with pytest.raises(ValueError, match="no finite optimum"):
        solve_counts(np.array([[0, 1], [0, 0]]), 1.0)


def test_unconnected_completions_are_solved_apart():
    counts = np.zeros((4, 4))
    counts[0, 1], counts[1, 0], counts[2, 3], counts[3, 2] = 1, 3, 2, 2
    found = solve_counts(counts, 1.0)
    assert found.u[1] - found.u[0] == pytest.approx(np.log(3), abs=1e-12)
    assert found.u[3] - found.u[2] == pytest.approx(0.0, abs=1e-12)


@given(st.integers(0, 100), st.sampled_from([0.25, 0.5, 2.0]))
def test_rewards_average_to_one_under_the_reference(seed, beta):
    # T8: sum_y pi_ref(y) exp(r(y)/beta) = sum_y pi(y) = 1, and E_pi[r] >= 0 >= E_ref[r]
    everything = [(v,) for v in range(16)]
    policy, reference = (completion_logps(table(s), 1, everything) for s in (seed, seed + 1))
    rewards = beta * (policy - reference)
    assert logsumexp(reference + rewards / beta) == pytest.approx(0.0, abs=1e-13)
    assert np.exp(policy) @ rewards >= 0 >= np.exp(reference) @ rewards


@pytest.mark.parametrize(("objective", "margin"), [
    # T11, at an edge compared three times one way and once the other: p = 3/4
    (Objective(beta=0.5), np.log(3.0)),
    (Objective(beta=0.5, label_smoothing=0.1), np.log(0.7 / 0.3)),  # sigma(m) = e + (1 - 2e) p = 0.7
    (Objective("robust", 0.5, 0.1), np.log(0.8125 / 0.1875)),  # sigma(m) = (p - e)/(1 - 2e)
    (Objective("ipo", 0.5), 0.5 * 0.5),  # h = (2p - 1)/(2 tau) = 1/2, here as beta h
    (Objective("hinge", 0.5), 1.0),
])  # fmt: skip
def test_edge_optima_of_the_variants(objective, margin):
    pairs = (Pair((1,), (2,), (3,)),) * 3 + (Pair((1,), (3,), (2,)),)

    def loss(m: float) -> float:
        policy = Table(16, 0.0, ((1, 2, m / objective.beta),))
        return predict(StepExperiment(policy, Table(16), pairs, objective, dtype="float64"), PAPER).loss

    lower, upper = (loss(margin + d) - loss(margin) for d in (-1e-2, 1e-2))
    assert lower > 0
    assert upper > 0
    if objective.kind != "hinge":  # smooth: the minimum is where both sides rise alike, to third order
        assert abs(lower - upper) < 1e-2 * (lower + upper)
