"""Where is the minimum of the DPO loss, on data for which it can be computed?

Two cases.  With integer strengths w, where each two completions a, b are compared in both directions in the ratio
w_a : w_b, the minimiser is pi* ~ pi_ref w^(1/beta): Rafailov et al. 2023, Eq. 4 with the reward r = log w.  With any
other counts it is a Bradley-Terry maximum-likelihood fit, found by Newton's method with a bound on what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.special import entr, expit, logsumexp

from dpocheck.experiment import Pair, Table
from dpocheck.oracle.logps import dense, log_softmax
from dpocheck.oracle.losses import softplus

Completion = tuple[int, ...]


# ------------------------------------------------------------------------------------------- closed form on a tree


@dataclass(frozen=True, eq=False)
class Optimum:
    """The optimal policy on a set of completions.

    `log_policy` (completion,): log pi*(y), given that y is one of them; only differences of it are determined where
    the model can also write something else.  `nodes`: context token -> next token -> log pi*(next token), given that
    the completion stays in the set.  `rewards` (completion,): log w.
    """

    completions: tuple[Completion, ...]
    log_policy: np.ndarray
    nodes: dict[int, dict[int, float]]
    rewards: np.ndarray

    def logits(self, start: Table) -> np.ndarray:
        """(context, target): where plain SGD from `start` ends if nothing outside the tree has any probability.

        The gradient of a log-softmax sums to zero over the targets, so a node's logits keep their sum.
        """
        logits = dense(start).copy()
        for context, children in self.nodes.items():
            targets = list(children)
            found = np.array([children[v] for v in targets])
            logits[context, targets] = found - found.mean() + logits[context, targets].mean()
        return logits


def completion_logps(table: Table | np.ndarray, context: int, completions: Sequence[Completion]) -> np.ndarray:
    """(completion,): log pi(y) of each completion after the token `context`."""
    logits = dense(table) if isinstance(table, Table) else table
    logarithms = log_softmax(logits)
    return np.array([
        sum(logarithms[u, v] for u, v in zip((context, *y[:-1]), y, strict=True)) for y in completions
    ])  # fmt: skip


def optimum(reference: Table, context: int, strengths: Mapping[Completion, float], beta: float) -> Optimum:
    """pi* ~ pi_ref w^(1/beta) on the completions of one prompt, whose last token is `context`.

    `strengths`: completion -> w > 0.  No completion may be the beginning of another, and each token may stand at one
    place of the tree only, so that a context token names a node; ValueError otherwise.
    """
    completions = tuple(strengths)
    strength = np.array([float(strengths[y]) for y in completions])
    if np.any(strength <= 0) or beta <= 0:
        raise ValueError(f"strengths and beta must be positive; given {dict(strengths)} and {beta}")
    weight = completion_logps(reference, context, completions) + np.log(strength) / beta
    below: dict[int, dict[int, list[float]]] = {}
    place: dict[int, Completion] = {context: ()}
    for y, value in zip(completions, weight, strict=True):
        for depth, (u, v) in enumerate(zip((context, *y[:-1]), y, strict=True)):
            if place.setdefault(u, y[:depth]) != y[:depth]:
                raise ValueError(f"token {u} stands at two places of the tree: after {place[u]} and {y[:depth]}")
            below.setdefault(u, {}).setdefault(v, []).append(value)
        if any(other != y and other[: len(y)] == y for other in completions):
            raise ValueError(f"completion {y} is the beginning of another; end each with an EOS")
    nodes = {}
    for u, children in below.items():
        mass = {v: float(logsumexp(values)) for v, values in children.items()}
        total = float(logsumexp(list(mass.values())))
        nodes[u] = {v: m - total for v, m in mass.items()}
    return Optimum(completions, weight - logsumexp(weight), nodes, np.log(strength))


# ------------------------------------------------------------------------------------------------- floor of the loss


def loss_floor(pairs: Sequence[Pair]) -> float:
    """No policy of any architecture has a mean DPO loss below this on these pairs, whatever beta and the reference.

    Of two completions compared n times, a share p of them one way round, the loss is n (H(p) + KL(p, sigma(m))):
    (1/N) sum of n H(p), with H the binary entropy in nats.
    """
    counts: dict[tuple, list[int]] = {}
    for pair in pairs:
        ends = (pair.chosen, pair.rejected)
        first = min(ends)
        counts.setdefault((pair.prompt, first, max(ends)), [0, 0])[0 if pair.chosen == first else 1] += 1
    floor = 0.0
    for (_, first, second), (there, back) in counts.items():
        n = there + back
        # A completion against itself has margin 0 under every policy.
        share = 0.5 if first == second else there / n
        floor += n * float(entr(share) + entr(1.0 - share))
    return floor / len(pairs)


# ------------------------------------------------------------------------------------------------- arbitrary counts


@dataclass(frozen=True, eq=False)
class Certified:
    """A Bradley-Terry fit in u = log pi - log pi_ref, up to a constant per connected component.

    `bound`: no margin beta (u_a - u_b) of a compared pair is further than this from its value at the optimum.
    """

    u: np.ndarray  # (completion,)
    loss: float
    decrement: float
    bound: float
    iterations: int


def _terms(u: np.ndarray, counts: np.ndarray, beta: float) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss, gradient and Hessian of the mean DPO loss in u; counts[a, b]: rows that prefer a to b."""
    total = counts.sum()
    m = beta * (u[:, None] - u[None, :])
    loss = float((counts * softplus(-m)).sum() / total)
    pull = counts * expit(-m) / total
    gradient = -beta * (pull.sum(axis=1) - pull.sum(axis=0))
    curvature = beta**2 * (counts + counts.T) / total * expit(m) * expit(-m)
    return loss, gradient, np.diag(curvature.sum(axis=1)) - curvature


def certificate(u: np.ndarray, counts: np.ndarray, beta: float) -> tuple[float, float]:
    """Newton decrement at u, and a bound on how far each compared pair's margin is from the optimum's.

    With lambda the decrement and kappa = max_e beta |e_a - e_b| in the norm of the inverse Hessian, the margins are
    within -log(1 - kappa lambda) if kappa lambda < 1 (self-concordance of the logistic loss, Bach 2010, EJS 4:384);
    infinite otherwise.
    """
    _, gradient, hessian = _terms(u, counts, beta)
    inverse = np.linalg.pinv(hessian, hermitian=True)
    decrement = float(np.sqrt(max(gradient @ inverse @ gradient, 0.0)))
    diagonal = np.diag(inverse)
    spread = diagonal[:, None] + diagonal[None, :] - 2.0 * inverse
    kappa = beta * float(np.sqrt(np.max(np.where((counts + counts.T) > 0, spread, 0.0))))
    reach = kappa * decrement
    return decrement, float(-np.log1p(-reach)) if reach < 1.0 else np.inf


def solve_counts(counts: np.ndarray, beta: float, tolerance: float = 1e-14) -> Certified:
    """Minimise the mean DPO loss over policies on K completions; counts[a, b]: rows that prefer a to b.

    Newton's method with step halving, stopped on the decrement.  ValueError where no minimum exists: it does exactly
    if, in each connected component, every completion is preferred along some chain to every other (Ford 1957;
    Hunter 2004, Annals of Statistics 32:384, Assumption 1).
    """
    counts = np.array(counts, dtype=np.float64)
    np.fill_diagonal(counts, 0.0)
    weak, _ = connected_components(counts > 0, directed=True, connection="weak")
    strong, _ = connected_components(counts > 0, directed=True, connection="strong")
    if weak != strong:
        raise ValueError("these preferences have no finite optimum: some completions are never preferred to others")
    u = np.zeros(len(counts))
    if not counts.any():
        return Certified(u, 0.0, 0.0, 0.0, 0)
    iterations = 0
    while iterations < 200:
        loss, gradient, hessian = _terms(u, counts, beta)
        inverse = np.linalg.pinv(hessian, hermitian=True)
        direction = -inverse @ gradient
        decrement = float(np.sqrt(max(-gradient @ direction, 0.0)))
        if decrement < tolerance:
            break
        size = 1.0
        # Near the optimum loss differences are below rounding, and the full step is right.
        while decrement > 1e-3 and _terms(u + size * direction, counts, beta)[0] > loss - 0.25 * size * decrement**2:
            size /= 2.0
        u = u + size * direction
        iterations += 1
    u = u - u.mean()
    return Certified(u, _terms(u, counts, beta)[0], *certificate(u, counts, beta), iterations)
