"""How far from the exact replay may a correct run be, in its logits, checkpoints and logged numbers?

Follows the run step by step with one number: a bound on the Euclidean norm of the error of all logits.  A step of SGD
adds rate times the error of the gradient and the rounding of the stored weights, and maps the error already there by
I - rate * H, H the mean Hessian between the two points.  The Hessian's eigenvalues are bounded from the pairs' own
gradients: nothing is assumed about convexity.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.special import expit

from dpocheck.experiment import TrainExperiment
from dpocheck.oracle import tokens
from dpocheck.oracle.error_loss import gamma
from dpocheck.oracle.error_step import BatchError, batch_error
from dpocheck.oracle.logps import divisors, score, spread, state_gradient
from dpocheck.oracle.numbers import ROUNDOFF, TINY
from dpocheck.oracle.objective import Preference, beta_of, kind_of, score_of
from dpocheck.oracle.optimizer import State, clipped
from dpocheck.oracle.schedule import Plan, plan, rate, weights
from dpocheck.oracle.step import BatchOut
from dpocheck.oracle.theory import Theory
from dpocheck.oracle.training import Run, evaluation_batches, outcome, replay, stacked

# Clipping divides by |g| + 1e-6 in the units of a parameter; one unit of a logit's gradient is at least 2^10 of them.
CLIP_EPSILON = 1e-6 / 2.0**10


@dataclass
class Errors:
    """What is left open, per step; arrays are stacked like the parameters."""

    gradient: np.ndarray | None = None  # of the first step, as a change of stored weights over the rate
    logits: dict[int, np.ndarray] = field(default_factory=dict)  # step -> bound per cell
    metrics: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)  # (step, split) -> name -> bound


def run_errors(experiment: TrainExperiment, theory: Theory, u: float) -> Errors:
    """Bounds for a run of SGD, and of the first step's metrics for any other optimizer."""
    errors = Errors()
    run = replay(experiment, theory, keep=True)
    if not run.states:
        return errors
    plan_ = plan(len(run.pairs), experiment.recipe, theory)
    carried, buffered = 0.0, 0.0
    errors.logits[0] = np.zeros_like(run.states[0].logits)
    for number in range(plan_.steps):
        if number not in run.states or not plan_.known:
            break
        carried, buffered = _step(run, plan_, number, carried, buffered, errors, u)
        for name, rows in experiment.evaluation:
            if any(entry["step"] == number + 1 and entry["split"] == name for entry in run.history):
                errors.metrics[number + 1, name] = _evaluation(run, run.states[number + 1], rows, carried, u)
    return errors


def _batch_error(run: Run, state: State, pairs: tuple, index: tuple, out: BatchOut, u: float, by: float) -> BatchError:
    batch, theory = run.batch(pairs, index), run.theory
    reference = score(*run.split(state.reference), batch.reference, theory)
    tiny = TINY[run.experiment.recipe.dtype]
    return batch_error(
        *run.split(state.logits), reference, batch, out.preference, run.experiment.recipe.objective, theory, u, tiny, by
    )


def _step(
    run: Run, plan_: Plan, number: int, carried: float, buffered: float, errors: Errors, u: float
) -> tuple[float, float]:
    """One step: note the bounds on its metrics and on the logits after it; return the norms of the errors after it."""
    recipe, theory, state = run.experiment.recipe, run.theory, run.states[number]
    window = plan_.window(number)
    shares = weights(window, plan_, theory)
    outs = [outcome(run, state, run.pairs, index) for index in window]
    exact = [_batch_error(run, state, run.pairs, i, out, u, 0.0) for i, out in zip(window, outs, strict=True)]
    drifted = exact if carried == 0.0 else [
        _batch_error(run, state, run.pairs, i, out, u, carried) for i, out in zip(window, outs, strict=True)
    ]  # fmt: skip
    by_pairs = theory.uneven_metrics == "pairs"
    errors.metrics[number + 1, "train"] = _means(drifted, outs, [len(i) if by_pairs else 1 for i in window], u)
    size = len(window)

    def summed(found: list[BatchError]) -> np.ndarray:
        # A sum over micro-batches and the product with their share.
        rounding = gamma(size + 1, u)
        return sum(
            share * (stacked(e.table, e.block) + rounding * np.abs(stacked(out.table, out.block)))
            for share, e, out in zip(shares, found, outs, strict=True)
        )

    gradient = sum(share * stacked(out.table, out.block) for share, out in zip(shares, outs, strict=True))
    open_, norm = summed(exact), float(np.linalg.norm(gradient))
    errors.metrics[number + 1, "train"]["grad_norm"] = float(np.linalg.norm(summed(drifted))) + _norm_error(norm, u)
    speed = rate(number, plan_.steps, recipe, theory)
    logged = speed if theory.rate_logged == "own" else rate(number + 1, plan_.steps, recipe, theory)
    errors.metrics[number + 1, "train"]["learning_rate"] = 4.0 * u * logged
    if number + 1 not in run.states:
        return np.inf, np.inf
    active = recipe.clip_norm is not None and norm > recipe.clip_norm and theory.clip == "norm"
    if active:
        open_ = _clipped_error(gradient, open_, recipe.clip_norm, u)
        gradient = clipped(gradient, recipe.clip_norm, "norm")
    return _moved(run, number, gradient, open_, speed, _reach(run, state, window, shares, outs, carried, active, speed),
                  carried, buffered, errors, u)  # fmt: skip


def _norm_error(norm: float, u: float) -> float:
    """Squares, a sum as a tree of depth 32 at most, and the root (which halves the relative error)."""
    return float(gamma(18, u)) * norm + CLIP_EPSILON


def _clipped_error(gradient: np.ndarray, error: np.ndarray, limit: float, u: float) -> np.ndarray:
    """g * limit / |g|: the scale is off by the norm's own error; two roundings for the quotient and the product."""
    norm = float(np.linalg.norm(gradient))
    relative = (float(np.linalg.norm(error)) + _norm_error(norm, u)) / norm
    return limit / norm * (error + np.abs(gradient) * (relative + gamma(2, u)))


def _moved(
    run: Run, number: int, gradient: np.ndarray, open_: np.ndarray, speed: float, reach: tuple[float, float],
    carried: float, buffered: float, errors: Errors, u: float,
) -> tuple[float, float]:  # fmt: skip
    recipe = run.experiment.recipe
    before, after = run.states[number].logits, run.states[number + 1].logits
    stored = ROUNDOFF[recipe.dtype]
    moving = (gradient != 0.0) | (open_ > 0.0)
    decay = recipe.weight_decay + run.theory.weight_decay_extra
    # The weight is stored after the step, to nearest; the rate is rounded, and its product with the gradient.
    rounding = np.where(moving | bool(decay), stored * np.maximum(np.abs(before), np.abs(after)), 0.0)
    rounding = rounding + 2.0 * u * np.abs(before - after)
    cells = speed * open_ + rounding
    if number == 0:
        errors.gradient = cells / recipe.learning_rate if recipe.learning_rate else np.full_like(cells, np.inf)
    factor, lipschitz = reach
    momentum = recipe.momentum + run.theory.momentum_extra
    if momentum:
        buffered = momentum * buffered + float(np.linalg.norm(open_)) + lipschitz * carried
        total = carried + speed * buffered + float(np.linalg.norm(rounding))
    else:
        total = factor * carried + speed * float(np.linalg.norm(open_)) + float(np.linalg.norm(rounding))
    touched = moving | (errors.logits[number] > 0.0)
    errors.logits[number + 1] = cells if number == 0 else np.where(touched, total, 0.0)
    return total, buffered


def _reach(
    run: Run, state: State, window: tuple, shares: list[float], outs: list[BatchOut], carried: float, active: bool,
    speed: float,
) -> tuple[float, float]:  # fmt: skip
    """How much a step can stretch an error, and the gradient's Lipschitz constant, near this state.

    H = sum_i w_i (f''(m_i) d_i d_i' + f'(m_i) (Hess lw - Hess ll)), d_i = grad m_i.  The first part's greatest
    eigenvalue is that of the pairs' Gram matrix.  The Hessian of a log-softmax is -(diag p - p p'), whose eigenvalues
    lie in [-1/2, 0] (the variance of a variable on an interval of length sqrt 2).
    """
    if carried == 0.0:
        return 1.0, 0.0
    gram, up, down, longest = 0.0, 0.0, 0.0, 0.0
    for index, share, out in zip(window, shares, outs, strict=True):
        batch = run.batch(run.pairs, index)
        scores = score(*run.split(state.logits), batch.policy, run.theory)
        directions = _directions(run, batch, scores, out.preference.steepness)
        bend = share / batch.pairs * _curvature(run, out.preference.margins)
        bent, unbent = _score_curvature(run, batch, scores, out.preference, share / batch.pairs)
        own = directions * np.sqrt(bend)[:, None]
        gram += _greatest(np.concatenate([own, bent]) if len(bent) else own)
        down += _greatest(unbent)
        slope = np.zeros(batch.policy.rows)
        for which, side in enumerate((batch.chosen, batch.rejected)):
            np.add.at(slope, side, share * out.preference.slopes[which])
        slope = slope / divisors(batch.policy, run.theory.logps)
        up += _softmax_curvature(batch.policy, -slope)
        down += _softmax_curvature(batch.policy, slope)
        longest = max(longest, float(batch.policy.counts.max()))
    # Between the two points the margins move by at most this, and sigma, sigma' by a factor exp of it.
    beta = 1.0 if kind_of(run.experiment.recipe.objective, run.theory) == "ipo" else beta_of(
        run.experiment.recipe.objective, run.theory
    )  # fmt: skip
    if score_of(run.experiment.recipe.objective, run.theory):  # f' and f'' move too, by factors of their own
        beta = beta * max(float(np.max(out.preference.steepness)) for out in outs) + 1.0
    stretch = float(np.exp(min(2.0 * np.sqrt(2.0) * longest * beta * carried, 50.0)))
    most, least = stretch * (gram + up), stretch * down
    lipschitz = max(most, least)
    if active:  # clipping is a projection, which does not stretch, but I - rate * P(g) has no symmetric derivative
        return 1.0 + speed * lipschitz, lipschitz
    return max(1.0 + speed * least, speed * most - 1.0), lipschitz


def _greatest(rows: np.ndarray) -> float:
    """The greatest eigenvalue of the sum of the rows' outer products."""
    return float(np.linalg.eigvalsh(rows @ rows.T).max()) if len(rows) else 0.0


def _score_curvature(run: Run, batch, scores, loss: Preference, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(pair, parameter) each: rows whose outer products are what a divergence's f'' adds to the Hessian and takes off.

    It is dL/dm * beta * f'' of a completion times its gradient's outer product; |d f' / d log u| bounds that of f''.
    f'' is negative: the chosen completions bend the loss up, the rejected ones down.
    """
    if not score_of(run.experiment.recipe.objective, run.theory):
        return np.zeros((0, 1)), np.zeros((0, 1))
    beta = beta_of(run.experiment.recipe.objective, run.theory)
    factors = np.sqrt(share * beta * expit(-loss.margins) * loss.steepness)
    sides = np.eye(2)[:, :, None] * factors[:, None, :]  # (which, side, pair): one completion of each pair alone
    up, down = (_directions(run, batch, scores, side) for side in sides)
    return up, down


def _directions(run: Run, batch, scores, steepness: np.ndarray) -> np.ndarray:
    """(pair, parameter): the gradient of each pair's difference of log-probs, or of scores where these are steeper."""
    weights = steepness * np.array([[1.0], [-1.0]])
    rows = []
    for chosen, rejected, pair in zip(batch.chosen, batch.rejected, weights.T, strict=True):
        one = np.zeros(batch.policy.rows)
        one[chosen], one[rejected] = pair
        states = state_gradient(scores, one / divisors(batch.policy, run.theory.logps), run.theory)
        if batch.policy.mix is not None:
            states = stacked(*spread(states, batch.policy, run.size))
        rows.append(states.ravel())
    return np.array(rows)


def _curvature(run: Run, margins: np.ndarray) -> np.ndarray:
    """(pair,): the second derivative of the loss in the difference of log-probs.  The hinge has none off its kink."""
    objective = run.experiment.recipe.objective
    kind = kind_of(objective, run.theory)
    if kind == "ipo":
        return np.full_like(margins, 2.0)
    if kind == "hinge":
        return np.zeros_like(margins)
    m = margins - (objective.gamma if kind == "simpo" else 0.0)
    half = np.abs(m) / 2.0
    return beta_of(objective, run.theory) ** 2 / (4.0 * np.cosh(np.minimum(half, 350.0)) ** 2)


def _softmax_curvature(positions, slope: np.ndarray) -> float:
    """The greatest eigenvalue of sum of slope * (diag p - p p') over positions, of the positive slopes alone."""
    own = positions.times * np.maximum(slope, 0.0)[positions.row]
    if positions.mix is not None:  # one position's features have a squared norm of at most 2, and overlap with others'
        return float(own.sum())
    return 0.5 * float(np.bincount(positions.state, own, minlength=len(positions.contexts)).max(initial=0.0))


def _means(found: list[BatchError], outs: list[BatchOut], counts: list[int], u: float) -> dict[str, float]:
    """Of weighted means over batches."""
    rounding = gamma(len(found) + 1, u)

    def mean(name: str) -> float:
        terms = [e.metrics[name] + rounding * abs(out.metrics[name]) for e, out in zip(found, outs, strict=True)]
        return float(np.average(terms, weights=counts))

    return {name: mean(name) for name in found[0].metrics}


def _evaluation(run: Run, state: State, rows: tuple, carried: float, u: float) -> dict[str, float]:
    pairs = tokens.dataset(run.experiment, rows, run.theory)
    batches = evaluation_batches(run, len(pairs))
    outs = [outcome(run, state, pairs, index, backward=False) for index in batches]
    found = [_batch_error(run, state, pairs, i, out, u, carried) for i, out in zip(batches, outs, strict=True)]
    by_pairs = run.theory.eval_metrics == "pairs"
    return _means(found, outs, [len(i) if by_pairs else 1 for i in batches], u) if found else {}
