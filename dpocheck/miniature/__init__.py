"""What does an honest DPO trainer look like when it is small enough to read?

`MINIATURE` trains as the papers say, in parts: each part is a plain function with a fixed signature, and
`dataclasses.replace(MINIATURE, loss=...)` changes exactly one.  The zoo is made of such replacements.  Read `rows.py`,
`scores.py`, `step.py`, `ranks.py`, `state.py`, then `trainer.py`, which puts them together.

Shapes: row = 2 * pair, chosen rows first; token = padded length; log-probs are sums over completion tokens, in nats.
"""

from dpocheck.miniature.ranks import added, exchange, here, share
from dpocheck.miniature.rows import (
    Batch,
    Example,
    Side,
    Text,
    batches_of,
    collate,
    common_prefix,
    read,
    render,
    tokenize,
    truncate,
)  # fmt: skip
from dpocheck.miniature.scores import (
    Scored,
    check,
    divergence,
    fingerprint,
    forward,
    frozen_copy,
    logps,
    loss,
    reference,
)
from dpocheck.miniature.state import Progress, checkpoint, resume
from dpocheck.miniature.step import accumulate, clip, evaluate, factor, gather, metrics, order, reduce, update
from dpocheck.miniature.trainer import MINIATURE, Miniature, models, optimizer_of

__all__ = [
    "MINIATURE", "Batch", "Example", "Miniature", "Progress", "Scored", "Side", "Text", "accumulate", "added",
    "batches_of", "check", "checkpoint", "clip", "collate", "common_prefix", "divergence", "evaluate", "exchange",
    "factor", "fingerprint", "forward", "frozen_copy", "gather", "here", "logps", "loss", "metrics", "models",
    "optimizer_of", "order", "read", "reduce", "reference", "render", "resume", "share", "tokenize", "truncate",
    "update",
]  # fmt: skip
