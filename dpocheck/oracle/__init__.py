"""What do the papers predict?  `predict(experiment)`, in float64, from the experiment's data alone."""

from dpocheck.oracle.faults import CHOICES
from dpocheck.oracle.optimum import Certified, certificate, loss_floor, optimum, solve_counts
from dpocheck.oracle.predict import predict
from dpocheck.oracle.theory import CONVENTIONS, FAULTS, PAPER, Theory
from dpocheck.oracle.tokens import tokenise

__all__ = [
    "CHOICES", "CONVENTIONS", "FAULTS", "PAPER", "Certified", "Theory", "certificate", "loss_floor", "optimum",
    "predict", "solve_counts", "tokenise",
]  # fmt: skip
