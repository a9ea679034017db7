"""Which bugs must a check catch, and which trainers must it pass?  Specimens and variants of the miniature.

A specimen is the miniature with exactly one part broken, as a real trainer once was; a variant is right and written
differently.  One file per stage: `rows`, `forward`, `logps`, `reference`, `loss`, `objectives`, `divergences`,
`step`, `update`, `metrics`, `runs`, `ranks`, `options`; `found` of every stage; then `variants` and `choices`.  The
declarations are read without torch; `build` needs it.
"""

from dpocheck.zoo.registry import SPECIMENS, VARIANTS, Specimen, Variant, build, specimen, variant

from dpocheck.zoo import (  # isort: skip  # noqa: F401
    rows, forward, logps, reference, loss, objectives, divergences, step, update, metrics, runs, ranks, options, found,
    variants, choices,
)  # fmt: skip

__all__ = ["SPECIMENS", "VARIANTS", "Specimen", "Variant", "build", "specimen", "variant"]
