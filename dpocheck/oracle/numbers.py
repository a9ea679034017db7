"""How are numbers stored?  Rounding to the storage types of tensors, and the unit roundoff of each."""

from __future__ import annotations

import numpy as np

# Half the distance from 1 to the next number: the greatest relative error of rounding to nearest.
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

# The smallest positive normal number.
TINY = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers as `dtype` stores them (to nearest, ties to even), as float64.  Raises ValueError if unknown."""
    if dtype == "float64":
        return np.asarray(x, dtype=np.float64)
    if dtype in ("float32", "float16"):
        with np.errstate(over="ignore"):
            return np.asarray(x, dtype=np.float64).astype(dtype).astype(np.float64)
    if dtype == "bfloat16":
        return _bfloat16(np.asarray(x, dtype=np.float64))
    raise ValueError(f"unknown storage type {dtype!r}; known: {', '.join(ROUNDOFF)}")


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """Eight significant bits, float32's exponents.  Rounded once, from float64: by way of float32 would round twice."""
    mantissa, exponent = np.frexp(x)  # |mantissa| in [1/2, 1)
    bits = np.minimum(8, 8 + (exponent + 125))  # fewer below the smallest normal number, 2^-126 = 1/2 * 2^-125
    return np.where(np.isfinite(x), np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits), x)
