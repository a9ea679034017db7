"""What do the papers predict?  `predict(experiment)`, in float64, from the experiment's data alone."""

from dpocheck.oracle.predict import predict
from dpocheck.oracle.theory import CONVENTIONS, FAULTS, PAPER, Theory
from dpocheck.oracle.tokens import tokenise

__all__ = ["CONVENTIONS", "FAULTS", "PAPER", "Theory", "predict", "tokenise"]
