"""Is an over-long pair cut so that it is still a comparison: one prompt, something scored on both sides?"""

import pytest
from data_tokenizers import word_level
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_impl.data import DataError, load_pairs
from reference_impl.truncate import TRUNCATIONS, Fit, fit

P, C, R = (1, 2, 3, 4), (5, 6, 7), (8, 9)


def cut(how, max_length, prompt=P, chosen=C, rejected=R, bos=None):
    return fit(prompt, chosen, rejected, max_length=max_length, truncation=how, bos=bos)


@pytest.mark.parametrize("how", TRUNCATIONS)
@pytest.mark.parametrize("limit", [7, 8, None])
def test_a_pair_that_fits_is_left_alone(how, limit):
    assert cut(how, limit) == Fit(P, C, R, "")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (6, Fit(P, (5, 6), R, "completion_cut")),
        (5, Fit(P, (5,), (8,), "completion_cut")),
        (4, "prompt_too_long"),
        (3, "prompt_too_long"),
    ],
)
def test_keep_start_cuts_the_ends_of_completions(limit, expected):
    assert cut("keep_start", limit) == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (6, Fit((2, 3, 4), C, R, "prompt_cut")),
        (4, Fit((4,), C, R, "prompt_cut")),
        (3, "completion_too_long"),
    ],
)
def test_keep_end_cuts_the_prompt_alike_by_what_the_longer_side_needs(limit, expected):
    assert cut("keep_end", limit) == expected
    swapped = cut("keep_end", limit, chosen=R, rejected=C)
    assert swapped == (expected if isinstance(expected, str) else Fit(expected.prompt, R, C, expected.reason))


def test_keep_end_leaves_bos_in_front():
    assert cut("keep_end", 6, bos=1) == Fit((1, 3, 4), C, R, "prompt_cut")
    assert cut("keep_end", 4, bos=1) == Fit((1,), C, R, "prompt_cut")


def test_drop_drops():
    assert cut("drop", 6) == "too_long"


def test_completions_that_differ_only_after_the_cut_are_no_pair():
    assert cut("keep_start", 6, chosen=(5, 6, 7), rejected=(5, 6, 8)) == "identical_after_cut"


IDS = st.lists(st.integers(0, 9), min_size=1, max_size=8).map(tuple)


@settings(max_examples=500)
@given(IDS, IDS, IDS, st.integers(2, 12), st.sampled_from(TRUNCATIONS), st.sampled_from([None, 0, 1]))
def test_what_fits_is_scorable_shares_its_prompt_and_is_cut_no_more_than_needed(p, c, r, limit, how, bos):
    fitted = cut(how, limit, p, c, r, bos)
    longest = len(p) + max(len(c), len(r))
    if isinstance(fitted, str):
        assert longest > limit
        return
    assert fitted.prompt
    assert fitted.chosen
    assert fitted.rejected
    assert len(fitted.prompt) + max(len(fitted.chosen), len(fitted.rejected)) == min(longest, limit)
    if how == "keep_start":
        assert fitted.prompt == p
        assert fitted.chosen == c[: len(fitted.chosen)]
        assert fitted.rejected == r[: len(fitted.rejected)]
        # The side that fits alone keeps its end.
        assert len(fitted.chosen) == min(len(c), limit - len(p))
    else:
        assert (fitted.chosen, fitted.rejected) == (c, r)
        kept_bos = how == "keep_end" and p[0] == bos
        rest = fitted.prompt[1:] if kept_bos else fitted.prompt
        assert rest == p[len(p) - len(rest) :]
        assert not kept_bos or fitted.prompt[0] == bos


# ---- through the front door

WORDS = "a b c d e f g"
LONG = {"prompt": "a b c", "chosen": " d e f g", "rejected": " d g"}  # 3 + 5 and 3 + 3 tokens, EOS included


def test_a_cut_completion_has_no_eos_and_the_other_side_keeps_its_own():
    tokenizer = word_level(WORDS)
    data = load_pairs([LONG], tokenizer, max_length=6)
    pair = data.pairs[0]
    assert pair.chosen == (3, 4, 5)
    assert pair.rejected == (3, 6, tokenizer.eos_token_id)
    assert data.report.cut == {"completion_cut": 1}
    assert data.report.rows() == ["row 0: end of a completion cut: 3 + 5 / 3 tokens, limit 6"]


def test_keep_end_keeps_both_completions_whole():
    tokenizer = word_level(WORDS)
    pair = load_pairs([LONG], tokenizer, max_length=6, truncation="keep_end").pairs[0]
    assert pair.prompt == (2,)
    assert pair.chosen[-1] == pair.rejected[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("how", "limit", "said"),
    [
        ("keep_start", 3, "raise max_length, or use truncation keep_end"),
        ("keep_end", 4, "raise max_length, or use truncation keep_start"),
        ("drop", 7, "raise max_length, or use truncation keep_start or keep_end"),
    ],
)
def test_where_no_pair_fits_the_error_says_what_to_change(how, limit, said):
    with pytest.raises(DataError, match=said) as error:
        load_pairs([LONG], word_level(WORDS), max_length=limit, truncation=how)
    assert f"limit {limit}" in str(error.value)
    assert error.value.report.kept == 0


def test_length_bias_is_measured_before_the_cut():
    data = load_pairs([LONG], word_level(WORDS), max_length=6)
    assert data.report.length_bias.median_difference == 2
    assert data.report.chosen_tokens.max == 3
