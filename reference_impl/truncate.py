"""How is a pair that is longer than the limit made to fit, without losing the comparison?

The prompt is cut by the same tokens for both sides, and no side is left without a scored token. Three ways:

- keep_start: completions lose their end (EOS with it: the text no longer ends there); the prompt is whole;
- keep_end: the prompt loses its start, as much as the longer side needs; completions are whole; a BOS stays in front;
- drop: a pair that does not fit is dropped.
"""

from dataclasses import dataclass

TRUNCATIONS = ("keep_start", "keep_end", "drop")


@dataclass(frozen=True)
class Fit:
    """A pair that fits. `reason` is a key of datareport.CUT, or "" for a pair that fitted as it was."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    reason: str


def fit(
    prompt: tuple[int, ...],
    chosen: tuple[int, ...],
    rejected: tuple[int, ...],
    *,
    max_length: int | None,
    truncation: str,
    bos: int | None,
) -> Fit | str:
    """Fit token sequences of one pair into `max_length` tokens per side (prompt + completion); None is no limit.

    Returns the fitted pair, or the reason (a key of datareport.DROPPED) why there is none.
    """
    longest = max(len(chosen), len(rejected))
    if max_length is None or len(prompt) + longest <= max_length:
        return Fit(prompt, chosen, rejected, "")
    if truncation == "drop":
        return "too_long"
    if truncation == "keep_start":
        room = max_length - len(prompt)
        if room < 1:
            return "prompt_too_long"
        if chosen[:room] == rejected[:room]:
            return "identical_after_cut"
        return Fit(prompt, chosen[:room], rejected[:room], "completion_cut")
    room = max_length - longest
    front = prompt[:1] if bos is not None and prompt[:1] == (bos,) else ()
    # One prompt token must stay, or nothing would predict the first completion token; BOS alone is one.
    if room < 1:
        return "completion_too_long"
    kept = room - len(front)
    return Fit(front + prompt[len(prompt) - kept :], chosen, rejected, "prompt_cut")
