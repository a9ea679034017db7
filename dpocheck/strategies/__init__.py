"""Which experiments are worth drawing?  Hypothesis strategies, for the full tier and for people's own property tests.

    from hypothesis import given
    from dpocheck import strategies
    from dpocheck.oracle import predict

    @given(strategies.loss_experiments())
    def test_my_loss(experiment):
        seen = my_loss(*experiment.arguments(), beta=experiment.objective.beta)
        assert abs(seen - predict(experiment).reduced) < 1e-9

Structure is drawn: sizes, lengths, regions, hard cases.  Numbers are generic dyadics by position, so that an example
shrinks to a small and readable one and never to zeros, where most faults are invisible.  All drawing is done with
coin flips: Hypothesis mixes constants from the modules that happen to be loaded into its integers and floats, and the
same seed would then not give the same examples everywhere.
"""

from dpocheck.strategies.choose import choose
from dpocheck.strategies.losses import REGIONS, loss_experiments, objectives, sigmoids
from dpocheck.strategies.renumbered import renumbered
from dpocheck.strategies.runs import chat_free_rows, letter_rows, train_experiments
from dpocheck.strategies.tokens import (
    CASES,
    WORDS,
    log_ratios,
    logp_experiments,
    padded,
    pairs,
    step_experiments,
    tables,
    tells_apart,
)

__all__ = [
    "CASES", "REGIONS", "WORDS", "chat_free_rows", "choose", "letter_rows", "log_ratios", "logp_experiments",
    "loss_experiments", "objectives", "padded", "pairs", "renumbered", "sigmoids", "step_experiments", "tables",
    "tells_apart", "train_experiments",
]  # fmt: skip
