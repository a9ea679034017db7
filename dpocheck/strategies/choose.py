"""How is one of several choices drawn, and where do the numbers come from?"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

PRIME = 61  # 2 is a primitive root of it: 2^0, 2^1, ... are 60 different residues, in no visible order


def choose(*options: Any) -> st.SearchStrategy[Any]:
    """One of the options, by coin flips; shrinks to the first.  Raises ValueError without any.

    Near uniform: where the number of options is no power of two, some are twice as likely as others.
    """
    if not options:
        raise ValueError("there is nothing to choose from; give at least one option")
    flips = (len(options) - 1).bit_length()

    def pick(bits: tuple[bool, ...]) -> Any:
        number = sum(bit << i for i, bit in enumerate(reversed(bits)))
        return options[number * len(options) >> flips]

    return st.tuples(*(st.booleans() for _ in range(flips))).map(pick)


def sized(*options: Any) -> st.SearchStrategy[Any]:
    """One of a few options in order of size, by coin flips that add up: taking one back gives a smaller size, so that
    examples shrink step by step.  The middle is drawn more often than the ends."""
    most = len(options) - 1
    weights = [2] * (most // 3) + [1] * (most - 2 * (most // 3))
    flips = st.tuples(*(st.booleans() for _ in weights))
    return flips.map(lambda bits: options[sum(w for w, bit in zip(weights, bits, strict=True) if bit)])


def mantissa(position: int) -> float:
    """A dyadic in (1, 2) with six binary places; 60 neighbours are all different.

    With the four log-probs of a pair at positions 4i to 4i + 3, h in units of 1/64 is 3 * 2^(4i) modulo 61, which is
    never zero: no pair is a tie.
    """
    return 1 + pow(2, position % 60, PRIME) / 64


def generic(position: int) -> float:
    """A dyadic in (-2, 2) with six binary places, never zero; 126 neighbours are all different."""
    return GENERIC[position % len(GENERIC)]


# 3 is a primitive root of 127.  A longer period than `mantissa`'s: tables have up to a hundred cells, and pairs that
# lie a simple fraction of the period apart mirror each other.
GENERIC = tuple((2 * pow(3, k, 127) - 127) / 64 for k in range(126))
