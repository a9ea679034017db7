"""The gradient of DPO on a table, one pair at a time, from the papers and by hand: what a command line must leave.

With l[u] = log softmax(z[u]) and a completion's path u_0 (last prompt token), u_1, ..., u_n (EOS), its log-prob is
lp = sum_t l[u_{t-1}][u_t], so d lp / d z[u, v] = sum over t with u_{t-1} = u of ([v = u_t] - exp l[u][v]).
The loss is a function of r_w = lp_w - ref_w and r_l = lp_l - ref_l; its two slopes stand in `SLOPES`.
"""

import itertools
import math

import numpy as np

from dpocheck.experiment import Row, Table, Tokenizer
from dpocheck.probes import tokenizers

SIZE = 64
WORDS: Tokenizer = tokenizers.plain_words(SIZE)

# prompt, chosen, rejected, without EOS; all prompts end in tokens of their own and no token follows another twice
PAIRS = (
    ((1, 2), (3, 4), (5, 6)),
    ((7, 8), (9, 10, 11), (12, 13)),
    ((14,), (15, 16), (17, 18, 19)),
    ((20, 21), (22, 23), (24, 25)),
)


def table(number: int) -> Table:
    """A generic table of multiples of 1/64: no two rows alike, logits of order 1."""
    u, v = np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")
    return Table.of(np.round(64 * np.sin(number + 12.9898 * u + 78.233 * v + 0.37 * u * v)) / 64)


def rows(pairs=PAIRS) -> tuple[Row, ...]:
    def text(ids) -> str:
        return " ".join(WORDS.words[i] for i in ids)

    return tuple(Row(text(p), " " + text(w), " " + text(l)) for p, w, l in pairs)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slopes(kind: str, beta: float, smoothing: float = 0.0):
    """(r_w, r_l, n_w, n_l) -> (d loss / d lp_w, d loss / d lp_l) of one pair."""

    def antisymmetric(slope):
        return lambda rw, rl, nw, nl: (slope(beta * (rw - rl)) * beta, -slope(beta * (rw - rl)) * beta)

    def ipo_mean(rw, rl, nw, nl):  # (r_w/n_w - r_l/n_l - 1/(2 beta))^2, log-probs per token
        outer = 2 * (rw / nw - rl / nl - 1 / (2 * beta))
        return outer / nw, -outer / nl

    e = smoothing
    return {
        "sigmoid": antisymmetric(lambda m: -sigma(-m)),
        "cdpo": antisymmetric(lambda m: -(1 - e) * sigma(-m) + e * sigma(m)),
        "robust": antisymmetric(lambda m: (-(1 - e) * sigma(-m) - e * sigma(m)) / (1 - 2 * e)),
        "hinge": antisymmetric(lambda m: -1.0 if m < 1 else 0.0),
        "ipo": ipo_mean,
    }[kind]


def gradient(policy: np.ndarray, reference: np.ndarray, pairs, slope, weights=None) -> np.ndarray:
    """(context, target) gradient of the mean over pairs."""

    def log_softmax(z):
        top = z.max(axis=1, keepdims=True)
        return z - top - np.log(np.exp(z - top).sum(axis=1, keepdims=True))

    logp, logr = log_softmax(policy), log_softmax(reference)
    total = np.zeros_like(policy)
    weights = weights or [1 / len(pairs)] * len(pairs)
    for weight, (prompt, chosen, rejected) in zip(weights, pairs, strict=True):
        paths = [[prompt[-1], *completion, WORDS.eos] for completion in (chosen, rejected)]
        ratios = [sum((logp - logr)[u, v] for u, v in itertools.pairwise(path)) for path in paths]
        both = slope(*ratios, *(len(path) - 1 for path in paths))
        for outer, path in zip(both, paths, strict=True):
            for u, v in itertools.pairwise(path):
                total[u] -= weight * outer * np.exp(logp[u])
                total[u, v] += weight * outer
    return total
