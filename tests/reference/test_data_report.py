"""Does the data report say what is in the data, with numbers that can be counted by hand?"""

import json

import pytest
from data_tokenizers import CHATML, byte_bpe, word_level
from tokenizers.normalizers import Replace

from reference_impl.data import load_pairs
from reference_impl.datareport import length_bias, lengths
from reference_impl.show import list_rows, show_pair
from reference_impl.tokens import tokenizer_hash

WORDS = "a b c d e f g"


def row(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def report(rows, **settings):
    return load_pairs(rows, word_level(WORDS), **{"max_length": None} | settings).report


def test_rows_are_read_kept_dropped_and_the_sum_is_right():
    found = report([row("a", " b", " c"), row("a", " b", " b"), row("a", "", " b"), row("a", " c", " b d")])
    assert (found.read, found.kept, found.dropped) == (4, 2, {"identical": 1, "empty": 1})
    assert found.lines()[0] == (
        "4 rows of a list in memory (standard): 2 pairs kept, 1 dropped (chosen = rejected), "
        "1 dropped (a completion without text); dpo-train rows lists them"
    )


def test_duplicates_and_contradictions_are_counted_by_tokens():
    found = report(
        [
            row("a", " b", " c"),
            row("a", " b", " c"),  # repeats row 0
            row("a", " c", " b"),  # contradicts rows 0 and 1, which contradict it
            row("d", " c", " b"),  # another prompt
            row("a", " c", " d"),
        ]
    )
    assert (found.duplicates, found.contradictory) == (1, 3)
    assert "1 pairs repeat an earlier pair" in found.lines()
    assert any(line.startswith("3 pairs contradict another pair") for line in found.lines())


def test_prompt_and_completion_are_not_confused_when_counting_repeats():
    # The same tokens in a row, a b c EOS d EOS, parted elsewhere.
    rows = [row("a b", " c", " d"), row("a", " b c", " d")]
    assert report(rows).duplicates == 0
    assert fingerprint(rows[:1]) != fingerprint(rows[1:])


def test_length_statistics_by_hand():
    # Median of 1..20 is 10.5; the 95th percentile by nearest rank is the 19th of 20.
    found = lengths(list(range(20, 0, -1)))
    assert (found.median, found.p95, found.max) == (10.5, 19, 20)
    assert lengths([]) is None


def test_length_bias_and_its_sign_test_by_hand():
    # Differences 1, 1, 1, 1, 0, -2: four longer, one shorter, one tie. Two-sided sign test of 4 in 5:
    # 2 * (C(5,4) + C(5,5)) / 2^5 = 12/32.
    found = length_bias([2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 2, 4])
    assert (found.chosen_longer, found.rejected_longer, found.equal) == (4, 1, 1)
    assert found.share == pytest.approx(4 / 6)
    assert found.median_difference == 1
    assert found.p == pytest.approx(12 / 32, rel=1e-12)
    assert not found.likely


def test_length_bias_of_ties_alone_is_no_evidence():
    assert length_bias([3, 3], [3, 3]).p == 1.0
    assert length_bias([], []) is None


def test_a_clear_length_bias_is_called_one():
    # 10 of 10 longer: p = 2 / 2^10 = 0.00195.
    found = report([row("a", " b c" + " d" * i, " b") for i in range(10)])
    assert found.length_bias.p == pytest.approx(2 / 1024)
    assert any(
        "chosen is longer than rejected in 100% of pairs" in s and "length bias likely" in s for s in found.lines()
    )


def test_the_share_of_cut_pairs_is_shown_with_what_it_costs():
    found = report([row("a", " b c d", " e"), row("a", " b", " c")], max_length=3)
    assert found.cut == {"completion_cut": 1}
    assert any("1 pairs (50.0%) cut to 3 tokens" in s and "raise max_length" in s for s in found.lines())


def test_text_rows_beside_a_chat_template_are_pointed_out():
    data = load_pairs([row("a", " b", " c")], byte_bpe(template=CHATML), max_length=None)
    assert "the rows are texts: the tokenizer's chat template is not applied to them" in data.report.lines()


def test_completions_that_repeat_the_prompt_are_pointed_out():
    prompt = "What is the capital of France?"
    rows = [row(prompt, prompt + " Paris", prompt + " Rome"), row(prompt, " Paris", " Rome"), row("a", "a b", "a c")]
    found = load_pairs(rows, byte_bpe(), max_length=None).report
    assert any(line.startswith("1 pairs repeat the prompt at the start of both completions") for line in found.lines())


def test_tokens_that_do_not_decode_to_the_text_are_counted():
    found = report([row("a", " b", " zebra"), row("a", " b", " c")])
    assert (found.not_round_trip, found.spacing_only) == (1, 0)
    assert any("1 pairs do not decode to their text" in s for s in found.lines())


def test_white_space_that_the_tokenizer_normalises_is_no_lost_text():
    tokenizer = word_level(WORDS)
    tokenizer.backend_tokenizer.normalizer = Replace("  ", " ")
    found = load_pairs([row("a", "  b", " c"), row("a", " b", " d")], tokenizer, max_length=None).report
    assert (found.not_round_trip, found.spacing_only) == (0, 1)
    assert "1 pairs decode to their text but for white space" in found.lines()


def test_the_report_is_json_with_every_note():
    found = report([row("a", " b", " b"), row("a", " b", " c")])
    value = json.loads(found.to_json())
    assert value["kept"] == 1
    assert value["notes"] == [{"row": 0, "place": "row 0", "kind": "dropped", "reason": "identical", "detail": "' b'"}]
    assert value["length_bias"]["equal"] == 1


def test_rows_are_listed_in_order_and_by_reason():
    rows = [row("a", " b c d", " e"), row("a", " b", " b"), row("a", "", " b"), row("a", " d", " d")]
    found = report(rows, max_length=3)
    assert [line.split(":")[0] for line in found.rows()] == ["row 0", "row 1", "row 2", "row 3"]
    assert [line.split(":")[0] for line in found.rows("identical")] == ["row 1", "row 3"]
    with pytest.raises(KeyError, match="no reason is called 'bad'; there are identical"):
        found.rows("bad")


def test_the_listing_works_where_nothing_is_left():
    said = list_rows([row("a", " b", " b")], word_level(WORDS), max_length=None)
    assert said == ["row 0: dropped, chosen = rejected: ' b'"]


def test_a_listing_of_nothing_says_so():
    rows = [row("a", " b", " c")]
    assert list_rows(rows, word_level(WORDS), max_length=None) == ["no row was dropped or cut"]
    said = list_rows(rows, word_level(WORDS), max_length=None, reason="identical")
    assert said == ["no row was dropped or cut for identical"]


def test_one_row_is_shown_with_what_is_scored():
    tokenizer = word_level(WORDS)
    rows = [row("a b", " c", " d e"), row("a", " b", " b")]
    assert list_rows(rows, tokenizer, max_length=None, row=0) == [
        "row 0",
        "prompt, 2 tokens, not scored: 'a b'",
        "chosen, 2 tokens, all scored, EOS '</s>' in it: ' c</s>'",
        "chosen at the end of the prompt: 'a' ' b' || ' c' '</s>'",
        "rejected, 3 tokens, all scored, EOS '</s>' in it: ' d e</s>'",
        "rejected at the end of the prompt: 'a' ' b' || ' d' ' e' '</s>'",
    ]
    assert list_rows(rows, tokenizer, max_length=None, row=1) == ["row 1: dropped, chosen = rejected: ' b'"]
    with pytest.raises(ValueError, match="has rows 0 to 1, not 2"):
        list_rows(rows, tokenizer, max_length=None, row=2)


def test_a_cut_completion_is_shown_as_cut():
    pair = load_pairs([row("a", " b c d", " e")], word_level(WORDS), max_length=3).pairs[0]
    assert "chosen, 2 tokens, all scored, no EOS: it was cut: ' b c'" in show_pair(pair, word_level(WORDS))


# ---- fingerprint

BASE = [row("a", " b", " c d"), row("b", " c", " d")]


def fingerprint(rows=BASE, tokenizer=None, **settings):
    return load_pairs(rows, tokenizer or word_level(WORDS), **{"max_length": 8} | settings).fingerprint


def test_the_hash_of_a_tokenizer_is_not_changed_by_using_it():
    tokenizer = word_level(WORDS)
    before = tokenizer_hash(tokenizer)
    tokenizer(["a b c"], padding="max_length", max_length=2, truncation=True)
    assert tokenizer_hash(tokenizer) == before


def test_the_same_load_has_the_same_fingerprint():
    assert fingerprint() == fingerprint()
    assert len(fingerprint()) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"rows": BASE[::-1]},
        {"rows": BASE[:1]},
        {"rows": [row("a", " b", " c d"), row("b", " d", " c")]},
        {"max_length": 9},
        {"max_length": None},
        {"truncation": "keep_end"},
        {"tokenizer": word_level(WORDS + " h")},  # same ids for these texts, but another tokenizer
        {"tokenizer": word_level(WORDS, template=CHATML)},
    ],
    ids=str,
)
def test_the_fingerprint_changes_with_rows_tokenizer_and_truncation(change):
    assert fingerprint(**change) != fingerprint()
