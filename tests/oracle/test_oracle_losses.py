"""Are the oracle's losses and their slopes right?  Judged by hand, by 50-digit arithmetic and by their limits."""

from __future__ import annotations

from dataclasses import replace

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle_scenes import LOSS

from dpocheck.experiment import LossExperiment, Objective
from dpocheck.oracle import PAPER, losses, predict

MARGINS = [s * m for m in (0.0, 1e-300, 1e-8, 1e-3, 0.75, 1.0, 17.0, 20.5, 37.0, 88.0, 104.0, 700.0, 745.0, 1e4)
           for s in (1.0, -1.0)]  # fmt: skip
EPSILONS = (0.0, 0.1, 0.37)

ordinary = st.integers(-4096, 0).map(lambda i: i / 64)
pairs = st.lists(st.tuples(ordinary, ordinary, ordinary, ordinary), min_size=1, max_size=5)
betas = st.sampled_from([0.125, 0.25, 0.5, 1.0, 2.0])


def experiment(rows: list[tuple[float, ...]], objective: Objective) -> LossExperiment:
    return LossExperiment(*(tuple(column) for column in zip(*rows, strict=True)), objective=objective)


def test_one_pair_worked_by_hand():
    # log-ratios -3.5 + 4 = 0.5 and -6 + 5 = -1; times beta 0.5: rewards 0.25 and -0.5, margin 0.75;
    # loss log(1 + e^-0.75) = 0.3868710; slope in the chosen log-prob -0.5 sigma(-0.75) = -0.1604107
    seen = predict(LossExperiment((-3.5,), (-6.0,), (-4.0,), (-5.0,), Objective(beta=0.5)))
    assert seen.rewards_chosen == 0.25
    assert seen.rewards_rejected == -0.5
    assert seen.reduced == pytest.approx(0.38687100611, abs=1e-11)
    assert seen.slopes[:, 0] == pytest.approx(0.5 * 0.32082130082 * np.array([-1, 1, 1, -1]), abs=1e-11)


def test_policy_equal_to_reference_gives_log_2_and_weight_one_half():
    seen = predict(LossExperiment((-3.0, -90.0), (-7.0, -1.0), (-3.0, -90.0), (-7.0, -1.0), Objective(beta=0.3)))
    assert seen.per_pair == pytest.approx(np.log(2.0), abs=1e-16)
    assert seen.slopes[0] == pytest.approx(-0.3 / 2 / 2, abs=1e-17)


def precise(name: str, m: float, e: float, tau: float):
    """(value, slope) with 50 digits, from the definitions."""
    with mpmath.workdps(50):
        x, e, tau = mpmath.mpf(m), mpmath.mpf(e), mpmath.mpf(tau)

        def loss(t):
            return mpmath.log1p(mpmath.exp(-t))

        def slope(t):
            return -1 / (1 + mpmath.exp(t))

        return {
            "dpo": lambda: (loss(x), slope(x)),
            "cdpo": lambda: ((1 - e) * loss(x) + e * loss(-x), (1 - e) * slope(x) - e * slope(-x)),
            "rdpo": lambda: (
                ((1 - e) * loss(x) - e * loss(-x)) / (1 - 2 * e),
                ((1 - e) * slope(x) + e * slope(-x)) / (1 - 2 * e),
            ),
            "hinge": lambda: (max(mpmath.mpf(0), 1 - x), mpmath.mpf(-1 if x < 1 else 0)),
            "ipo": lambda: ((x - 1 / (2 * tau)) ** 2, 2 * (x - 1 / (2 * tau))),
        }[name]()


@pytest.mark.parametrize("m", MARGINS)
@pytest.mark.parametrize("name", ["dpo", "cdpo", "rdpo", "hinge", "ipo"])
def test_every_loss_and_slope_to_fifty_digits(name, m):
    for e in EPSILONS:
        for tau in (0.1, 0.5):
            x = np.array([m])
            further = {"cdpo": (e,), "rdpo": (e,), "ipo": (tau,)}.get(name, ())
            value, slope = getattr(losses, name)(x, *further)
            exact = precise(name, m, e, tau)
            # Rounding: a few units in the last place of the terms that are added, 2^-1074 where they underflow.
            size = (float(abs(losses.softplus(-x[0])) + abs(m) + 1), 2.0) if name == "rdpo" else (0.0, 0.0)
            if name == "ipo":
                size = ((abs(m) + 5) ** 2, abs(m) + 5)
            if name == "cdpo":
                size = (e * (abs(m) + 1), e)
            if name == "hinge":
                size = (1.0, 0.0)
            for got, want, terms in zip((value[0], slope[0]), exact, size, strict=True):
                assert abs(mpmath.mpf(got) - want) <= 8 * 2.0**-53 * (float(abs(want)) + terms) + 2.0**-1074


@given(pairs, betas)
def test_swapping_chosen_and_rejected_adds_the_margin(rows, beta):
    # T1: sp(-m) - sp(m) = -m
    seen = predict(experiment(rows, Objective(beta=beta)))
    swapped = predict(experiment([(b, a, d, c) for a, b, c, d in rows], Objective(beta=beta)))
    margin = seen.rewards_chosen - seen.rewards_rejected
    assert seen.per_pair - swapped.per_pair == pytest.approx(-margin, abs=1e-11)


@given(pairs, betas, st.integers(-64, 64))
def test_log_z_cancels(rows, beta, shift):
    # T2: adding one constant to both policy log-probs, to both reference log-probs, or to one completion's two
    base = predict(experiment(rows, Objective(beta=beta)))
    for direction in ((1, 1, 0, 0), (0, 0, 1, 1), (1, 0, 1, 0), (0, 1, 0, 1)):
        moved = experiment([tuple(z + shift * d for z, d in zip(row, direction, strict=True)) for row in rows],
                           Objective(beta=beta))  # fmt: skip
        assert predict(moved).per_pair == pytest.approx(base.per_pair, abs=1e-11)
        assert predict(moved).slopes == pytest.approx(base.slopes, abs=1e-12)


@given(pairs, betas)
def test_loss_is_between_its_bounds(rows, beta):
    # T1: max(0, -m) < loss <= max(0, -m) + log 2; and the quartic bound around log 2 - m/2 + m^2/8
    seen = predict(experiment(rows, Objective(beta=beta)))
    m = seen.rewards_chosen - seen.rewards_rejected
    assert np.all(seen.per_pair >= np.maximum(0, -m))
    assert np.all(seen.per_pair <= np.maximum(0, -m) + np.log(2) + 1e-12)
    rest = seen.per_pair - (np.log(2) - m / 2 + m**2 / 8)
    assert np.all(rest <= 1e-12 * (1 + m**2))
    assert np.all(rest >= -(m**4) / 192 - 1e-12 * (1 + m**2))


@given(pairs, st.sampled_from([2.0, 4.0]))
def test_beta_scales_the_log_probs(rows, factor):
    # T1: L(c beta; z) = L(beta; c z), exactly for powers of two
    large = predict(experiment(rows, Objective(beta=0.25 * factor)))
    scaled = predict(experiment([tuple(factor * z for z in row) for row in rows], Objective(beta=0.25)))
    assert np.array_equal(large.per_pair, scaled.per_pair)


@given(pairs, betas, st.sampled_from([0.1, 0.25, 0.37]))
def test_smoothed_losses_are_shifts_of_the_plain_one(rows, beta, e):
    # T9: cDPO = sp(-m) + e m; rDPO = sp(-m) - e/(1-2e) m; so their mean over labels (1-e, e) is unbiased
    plain = predict(experiment(rows, Objective(beta=beta)))
    m = plain.rewards_chosen - plain.rewards_rejected
    cdpo = predict(experiment(rows, Objective(beta=beta, label_smoothing=e)))
    rdpo = predict(experiment(rows, Objective("robust", beta=beta, label_smoothing=e)))
    assert cdpo.per_pair == pytest.approx(plain.per_pair + e * m, abs=1e-10)
    assert rdpo.per_pair == pytest.approx(plain.per_pair - e / (1 - 2 * e) * m, abs=1e-9)


@given(pairs, betas)
def test_means_obey_jensen_and_accuracy_bounds(rows, beta):
    # T10: mean loss >= loss(mean margin); mean loss >= (1 - accuracy) log 2
    seen = predict(experiment(rows, Objective(beta=beta)))
    m = seen.rewards_chosen - seen.rewards_rejected
    assert seen.reduced >= losses.dpo(np.array(m.mean()))[0] - 1e-12
    assert seen.reduced >= np.mean(m <= 0) * np.log(2) - 1e-12


OBJECTIVES = [
    Objective(beta=0.5), Objective(beta=0.5, label_smoothing=0.2), Objective("robust", 0.5, 0.2),
    Objective("hinge", 0.5), Objective("ipo", 0.5), Objective("simpo", 2.0, gamma=0.75),
    Objective(beta=0.5, length_normalised=True), Objective(beta=0.5, sft_weight=0.3),
    Objective("forward_kl", 0.5), Objective("js_divergence", 0.5), Objective("alpha_divergence", 0.5, alpha=0.25),
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.kind}-{o.label_smoothing}-{o.sft_weight}")
def test_slopes_are_central_differences(objective):
    # error: step^2 / 6 times the third derivative (below 1; under a divergence, whose f' has a slope of at most u^-1,
    # below (beta/u)^3/10 + 3 (beta/u)^2/4 + beta/u) plus rounding 1e-15 / step
    arguments, step = LOSS.arguments(), 2.0**-13
    third = 1.0
    if objective.kind in DIVERGENCES:
        power = objective.alpha if objective.kind == "alpha_divergence" else 1.0
        steep = 0.5 * np.exp(power * np.max(arguments[2:] - arguments[:2]))
        third = max(steep**3 / 10 + 3 * steep**2 / 4 + steep, 1.0)
    seen = predict(replace(LOSS, objective=objective))
    for i in range(4):
        for j in range(arguments.shape[1]):
            ends = []
            for sign in (1, -1):
                moved = arguments.copy()
                moved[i, j] += sign * step
                columns = [tuple(float(z) for z in row) for row in moved]
                ends.append(predict(LossExperiment(*columns, objective, LOSS.lengths)).reduced)
            assert seen.slopes[i, j] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-8 * third, rel=1e-9)
    # the derivative in the direction that raises lp_w and lowers lp_l by a half each
    assert np.array_equal(seen.margin_slopes, (seen.slopes[0] - seen.slopes[1]) / 2)


def test_simpo_by_hand():
    # 2 (-6/3 + 8/2) - 0.5 = 3.5; loss log(1 + e^-3.5) = 0.02975; no reference
    simpo = LossExperiment((-6.0,), (-8.0,), (-1.0,), (-2.0,), Objective("simpo", 2.0, gamma=0.5), ((3, 2),))
    seen = predict(simpo)
    assert seen.reduced == pytest.approx(float(mpmath.log1p(mpmath.exp(-3.5))), abs=1e-15)
    assert seen.rewards_chosen == -4.0
    assert not seen.slopes[2:].any()
    # gamma as a ratio to beta: 4 - 2 * 0.5 = 3
    assert predict(simpo, PAPER.but(gamma="gamma-beta")).reduced == pytest.approx(np.log1p(np.exp(-3.0)), abs=1e-15)


def test_ipo_with_beta_in_it_by_hand():
    # h = (0.5) - (-1.0) = 1.5, beta 0.5: (0.5 * 1.5 - 1)^2 = 1/16, slope 2 * 0.5 * -0.25; 0.25 * (1.5 - 1)^2 = 1/16
    four = LossExperiment((-3.5,), (-6.0,), (-4.0,), (-5.0,), Objective("ipo", 0.5))
    inside, squared = (predict(four, PAPER.but(ipo=how)) for how in ("beta-inside", "beta-squared"))
    assert predict(four, PAPER.but(ipo="no-half")).reduced == 0.25  # (1.5 - 2)^2
    assert inside.reduced == squared.reduced == 0.0625
    assert inside.slopes[:, 0].tolist() == [-0.25, 0.25, 0.25, -0.25]
    assert squared.slopes[:, 0].tolist() == [0.25, -0.25, -0.25, 0.25]


def test_ipo_by_hand():
    # h = 1.5, 1/(2 * 0.5) = 1: 0.25; per token: 0.5/1 + 1/2 = 1.0: 0
    ipo = LossExperiment((-3.5,), (-6.0,), (-4.0,), (-5.0,), Objective("ipo", 0.5), ((1, 2),))
    assert predict(ipo).reduced == 0.25
    assert predict(ipo, PAPER.but(ipo_length="mean")).reduced == 0.0


DIVERGENCES = {  # f of Wang et al. 2023, and the objective's slope in t = log u
    "forward_kl": (lambda u: -mpmath.log(u), losses.forward_kl),
    "js_divergence": (lambda u: u * mpmath.log(u) - (u + 1) * mpmath.log((u + 1) / 2), losses.jensen_shannon),
    "alpha_divergence": (
        lambda u: (u ** mpmath.mpf("0.7") - mpmath.mpf("0.7") * u - mpmath.mpf("0.3")) / mpmath.mpf("-0.21"),
        lambda t: losses.alpha_divergence(t, 0.3),
    ),
}


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergences_score_is_the_derivative_of_its_f(kind):
    # f' and f'' by numerical differentiation of f itself; d f'(u) / d log u = u f''(u); f is convex with f(1) = 0
    f, curve = DIVERGENCES[kind]
    for t in (-20.0, -1.75, -0.375, 0.0, 0.5, 1.5, 20.0):
        value, slope = curve(np.array(t))
        with mpmath.workdps(150):  # second differences of a step 1e-20
            assert abs(f(mpmath.mpf(1))) < 1e-100
            u = mpmath.exp(t)
            first, second = (mpmath.diff(f, u, n, h=u * mpmath.mpf("1e-20")) for n in (1, 2))
            assert second > 0
        assert float(value) == pytest.approx(float(first), rel=1e-13, abs=1e-15)
        assert float(slope) == pytest.approx(float(u * second), rel=1e-13)


def test_the_alpha_divergence_lies_between_the_two_kl_divergences():
    # (1 - u^-a)/a: its expansion in a is t - a t^2/2 + ...; at a = 1 it is 1 - 1/u
    t = np.linspace(-2.0, 2.0, 9)
    assert losses.alpha_divergence(t, 1e-6)[0] == pytest.approx(t, abs=2.1e-6)
    assert losses.alpha_divergence(t, 1.0)[0] == pytest.approx(1.0 + losses.forward_kl(t)[0], abs=1e-14)


def test_divergences_by_hand():
    # u_w = e^0.5, u_l = e^-1; forward KL: -e^-0.5 + e^1 = 2.1117512; beta 0.5: m = 1.0558756, loss 0.2987060
    four = LossExperiment((-3.5,), (-6.0,), (-4.0,), (-5.0,), Objective("forward_kl", 0.5))
    m = (np.e - np.exp(-0.5)) / 2
    assert predict(four).reduced == pytest.approx(np.log1p(np.exp(-m)), abs=1e-15)
    # rewards are beta (f'(u) - f'(1)): 0.5 (1 - e^-0.5)
    assert predict(four).rewards_chosen == pytest.approx(0.5 * (1 - np.exp(-0.5)), abs=1e-15)
    assert predict(four, PAPER.but(reward_logps="sum")).rewards_chosen == 0.25
    # slopes: -beta sigma(-m) e^-0.5 in lp_w, beta sigma(-m) e^1 in lp_l: not each other's opposites
    weight = 0.5 / (1 + np.exp(m))
    assert predict(four).slopes[:, 0] == pytest.approx(weight * np.array([-1, np.e**1.5, 1, -(np.e**1.5)]) / np.e**0.5)
    # sigma(0.5) / sigma(-1) under a sum of logarithms
    jensen_shannon = predict(replace(four, objective=Objective("js_divergence", 0.5)))
    m = 0.5 * np.log((1 + np.e) / (1 + np.exp(-0.5)))
    assert jensen_shannon.reduced == pytest.approx(np.log1p(np.exp(-m)), abs=1e-15)
    alpha = Objective("alpha_divergence", 0.5, alpha=0.25)
    m = 0.5 * (np.exp(0.25) - np.exp(-0.125)) / 0.25
    assert predict(replace(four, objective=alpha)).reduced == pytest.approx(np.log1p(np.exp(-m)), abs=1e-15)
    wrong = predict(replace(four, objective=alpha), PAPER.but(alpha="one-minus"))
    right = predict(replace(four, objective=replace(alpha, alpha=0.75)))
    assert wrong.reduced == right.reduced


def test_wrong_signs_of_a_divergence_by_hand():
    # of the forward KL: 1/u; -u; u
    four = LossExperiment((-3.5,), (-6.0,), (-4.0,), (-5.0,), Objective("forward_kl", 0.5))
    for how, m in {
        "negated": np.exp(-0.5) - np.e, "inverted": np.exp(-1.0) - np.exp(0.5), "mirrored": np.exp(0.5) - np.exp(-1.0),
    }.items():  # fmt: skip
        assert predict(four, PAPER.but(derivative=how)).reduced == pytest.approx(np.log1p(np.exp(-m / 2)), abs=1e-15)


def test_sft_term_by_hand():
    # RPO adds alpha * NLL / length: 0.3 * 3.5 / 2
    plain = LossExperiment((-3.5,), (-6.0,), (-4.0,), (-5.0,), Objective(beta=0.5), ((2, 3),))
    with_sft = replace(plain, objective=Objective(beta=0.5, sft_weight=0.3))
    assert predict(with_sft).reduced - predict(plain).reduced == pytest.approx(0.525, abs=1e-15)


def test_unknown_lengths_leave_per_token_losses_open():
    assert predict(replace(LOSS, objective=Objective("simpo", 2.0), lengths=None)).per_pair is None


def test_arguments_are_rounded_to_their_type():
    # -3.3 in bfloat16 is -3.296875; the bfloat16 below 1 + 2^-8 and above 1 is a tie, to even: 1
    seen = predict(LossExperiment((-3.3,), (0.0,), (0.0,), (0.0,), Objective(beta=1.0), dtype="bfloat16"))
    assert seen.rewards_chosen == -3.296875
    tie = predict(LossExperiment((1 + 2.0**-8,), (0.0,), (0.0,), (0.0,), Objective(beta=1.0), dtype="bfloat16"))
    assert tie.rewards_chosen == 1.0
