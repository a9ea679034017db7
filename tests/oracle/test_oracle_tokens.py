"""Are dataset rows tokenised as they should be?  Worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from oracle_scenes import TOKENIZER, train

from dpocheck.experiment import Message, Objective, Pair, Recipe, Row, Template, Tokenizer
from dpocheck.oracle import PAPER, predict, tokenise
from dpocheck.oracle.counting import padded, positions, sides_of

# words a..l are 0..11; of 16 ids the last four are unk 12, bos 13, eos 14, pad 15
A, B, C, D, E_ = range(5)
UNK, BOS, EOS = 12, 13, 14
LETTERS = Tokenizer((*"abcxyz", "xy"), 16, kind="characters", merge=("x", "y"))  # xy is 6; a space is unknown


def tokens(row: Row, theory=PAPER, tokenizer: Tokenizer = TOKENIZER, **recipe) -> tuple[Pair, ...]:
    return tokenise(train(Recipe(**recipe), rows=(row,), tokenizer=tokenizer), theory)


TEXT = Row("a b", " c", " d e")


def test_text_gets_one_eos():
    assert tokens(TEXT) == (Pair((A, B), (C, EOS), (D, E_, EOS)),)
    ended = Row("a b", " c</s>", " d e")
    assert tokens(ended) == tokens(TEXT)
    assert tokens(TEXT, PAPER.but(eos="none")) == (Pair((A, B), (C,), (D, E_)),)
    assert tokens(TEXT, PAPER.but(eos="twice")) == (Pair((A, B), (C, EOS, EOS), (D, E_, EOS, EOS)),)


def test_eos_in_wrong_places():
    ended = Row("a b", " c</s>", " d e")
    assert tokens(ended, PAPER.but(eos="always")) == (Pair((A, B), (C, EOS, EOS), (D, E_, EOS)),)
    assert tokens(TEXT, PAPER.but(eos="always")) == tokens(TEXT)
    assert tokens(TEXT, PAPER.but(eos="between")) == (Pair((A, B), (EOS, C), (EOS, D, E_)),)
    assert tokens(TEXT, PAPER.but(eos="after-prompt")) == (Pair((A, B, EOS), (C,), (D, E_)),)
    assert tokens(ended, PAPER.but(eos="between"))[0].chosen == (EOS, C, EOS)  # its own is kept


def test_white_space_at_the_ends():
    # "a b" + "c" is the text "a bc", one unknown word; with one space between nothing runs together
    assert tokens(TEXT, PAPER.but(spaces="stripped")) == (Pair((A,), (UNK, EOS), (UNK, E_, EOS)),)
    assert tokens(Row(" a b\n", "c ", "d  e"), PAPER.but(spaces="one-between")) == tokens(TEXT)
    assert tokens(Row(None, "a b c", "a b d"), PAPER.but(spaces="stripped")) == tokens(Row(None, "a b c", "a b d"))


def test_unknown_words_and_special_tokens_inside_words():
    assert tokens(Row("a nope", " c<s>d", " d")) == (Pair((A, UNK), (C, BOS, D, EOS), (D, EOS)),)


def test_without_a_space_the_words_at_the_boundary_run_together():
    # "a b" + "c" is the text "a bc": one unknown word; the prompt is what all three texts share
    assert tokens(Row("a b", "c", " d")) == (Pair((A,), (UNK, EOS), (B, D, EOS)),)


@pytest.mark.parametrize(("bos", "front", "inside"), [
    ("tokenizer", (BOS,), ()), ("none", (), ()), ("added", (BOS,), ()), ("inside", (BOS,), (BOS,)),
    ("twice", (BOS, BOS), ()),
])  # fmt: skip
def test_bos(bos, front, inside):
    adds = replace(TOKENIZER, adds_bos=True)
    assert tokens(TEXT, PAPER.but(bos=bos), adds) == (Pair((*front, A, B), (*inside, C, EOS), (*inside, D, E_, EOS)),)


def test_bos_of_a_tokenizer_that_adds_none():
    assert tokens(TEXT, PAPER.but(bos="added"))[0].prompt == (BOS, A, B)
    assert tokens(TEXT, PAPER.but(bos="inside")) == tokens(TEXT)


def test_a_merge_over_the_boundary_belongs_to_the_completion():
    # "abx" + "yc" is a b xy c: the prompt's x is inside the merged token
    row = Row("abx", "yc", "za")
    assert tokens(row, tokenizer=LETTERS) == (Pair((0, 1), (6, 2, EOS), (3, 5, 0, EOS)),)
    assert tokens(row, PAPER.but(boundary="apart"), LETTERS) == (Pair((0, 1, 3), (4, 2, EOS), (5, 0, EOS)),)
    # "cut": the joint tokens after three; y is lost
    assert tokens(row, PAPER.but(boundary="cut"), LETTERS) == (Pair((0, 1, 3), (2, EOS), (5, 0, EOS)),)


def test_merges_are_made_from_the_left():
    letters = replace(LETTERS, words=(*"abcxyz", "xx"), merge=("x", "x"))
    assert tokens(Row("a", "xxx", "b"), tokenizer=letters)[0].chosen == (6, 3, EOS)


def test_an_implicit_prompt_is_what_both_texts_share():
    assert tokens(Row(None, "a b c", "a b d e")) == (Pair((A, B), (C, EOS), (D, E_, EOS)),)
    # one the beginning of the other: nothing is lost
    assert tokens(Row(None, "a b", "a b c")) == (Pair((A, B), (EOS,), (C, EOS)),)


def test_the_last_index_is_not_the_length_of_what_is_shared():
    # "ab " against "cd": index 0, and the character before it is the last one, a space: index -1
    wrong = PAPER.but(prefix="loses-shared")
    row = Row(None, "ab ", "cb")
    assert tokens(row, tokenizer=LETTERS) == (Pair((), (0, 1, UNK, EOS), (2, 1, EOS)),)
    assert tokens(row, wrong, LETTERS) == (Pair((0, 1), (UNK, EOS), (1, EOS)),)


TEMPLATE = Template(user=("a ", " b "), assistant=("c ", " d "), generation_prompt="c ", eos=True)
CHAT = Row((Message("user", "e"),), (Message("assistant", "f"),), (Message("assistant", "g h"),))
CHATS = replace(TOKENIZER, template=TEMPLATE)


def test_chat_rows_go_through_the_template():
    # user: a e b; the reply is asked for with c; then f d and the template's own EOS
    assert tokens(CHAT, tokenizer=CHATS) == (Pair((0, 4, 1, 2), (5, 3, EOS), (6, 7, 3, EOS)),)


def test_a_templates_eos_is_not_doubled_and_none_is_added():
    doubled = tokens(CHAT, PAPER.but(template_eos="twice"), CHATS)
    assert doubled[0].chosen == (5, 3, EOS, EOS)
    without = replace(CHATS, template=replace(TEMPLATE, eos=False))
    assert tokens(CHAT, tokenizer=without)[0].chosen == (5, 3)
    assert tokens(CHAT, PAPER.but(template_eos="ensured"), without)[0].chosen == (5, 3, EOS)
    assert tokens(CHAT, PAPER.but(template_eos="ensured"), CHATS)[0].chosen == (5, 3, EOS)


def test_a_chat_template_writes_its_own_bos():
    adds = replace(CHATS, adds_bos=True)
    assert tokens(CHAT, tokenizer=adds) == tokens(CHAT, tokenizer=CHATS)
    written = replace(adds, template=replace(TEMPLATE, user=("<s>a ", " b ")))
    assert tokens(CHAT, tokenizer=written)[0].prompt == (BOS, 0, 4, 1, 2)


def test_without_a_generation_prompt_the_role_belongs_to_the_completion():
    silent = replace(CHATS, template=replace(TEMPLATE, generation_prompt=""))
    assert tokens(CHAT, tokenizer=silent)[0] == Pair((0, 4, 1), (2, 5, 3, EOS), (2, 6, 7, 3, EOS))


def test_an_implicit_chat_prompt_is_the_shared_messages():
    whole = Row(None, CHAT.prompt + CHAT.chosen, CHAT.prompt + CHAT.rejected)
    assert tokens(whole, tokenizer=CHATS) == tokens(CHAT, tokenizer=CHATS)


def test_several_turns():
    turns = (Message("user", "e"), Message("assistant", "f"), Message("user", "g"))
    row = Row(turns, (Message("assistant", "h"),), (Message("assistant", "i"),))
    assert tokens(row, tokenizer=CHATS)[0].prompt == (0, 4, 1, 2, 5, 3, EOS, 0, 6, 1, 2)


def test_a_chat_row_without_a_template_is_refused():
    with pytest.raises(ValueError, match="template"):
        tokens(CHAT)


def test_truncation():
    # rows of 2 + 2 and 2 + 3 tokens, cut to 4
    row = Row("a b", " c", " d e")
    assert tokens(row, max_length=4) == (Pair((A, B), (C, EOS), (D, E_)),)
    assert tokens(row, PAPER.but(eos_cut="restored"), max_length=4) == (Pair((A, B), (C, EOS), (D, EOS)),)
    assert tokens(row, max_length=4, truncation="keep_end") == (Pair((A, B), (C, EOS), (D, E_, EOS)),)
    assert tokens(row, max_length=4, truncation="drop") == ()
    assert tokens(row, PAPER.but(truncation="none"), max_length=4) == tokens(row)
    assert tokens(row, PAPER.but(truncation="drop"), max_length=4) == ()
    assert tokens(row, PAPER.but(truncation="drop"), max_length=5) == tokens(row)


def test_truncation_keeps_its_own_end_of_each_row():
    # keep_end at 3: chosen b c eos, rejected d e eos, whose first token has lost its context and is not counted
    kept = train(Recipe(Objective(beta=0.5), max_length=3, truncation="keep_end"), rows=(Row("a b", " c", " d e"),))
    seen = predict(kept)
    cells = {(int(u), int(v)) for u, v in zip(*(seen.gradient > 0).nonzero(), strict=True)}
    assert (D, E_) in cells  # the rejected side is pushed down
    assert not seen.gradient[A].any()
    assert seen.gradient[B].any()


def test_a_prompt_that_fills_the_limit_leaves_nothing_to_score():
    seen = predict(train(Recipe(Objective(beta=0.5), max_length=2), rows=(Row("a b", " c", " d e"),)))
    assert not seen.gradient.any()
    assert seen.history[0]["metrics"]["logps/chosen"] == 0.0


def test_dropped_rows_are_absent_from_training():
    short, long = Row("a", " c", " d"), Row("a b c d e", " f", " g")
    recipe = Recipe(Objective(beta=0.5), batch=2, max_length=4, truncation="drop")
    assert len(tokenise(train(recipe, rows=(short, long)))) == 1
    alone = predict(train(recipe, rows=(short,)))
    assert predict(train(recipe, rows=(short, long))).gradient == pytest.approx(alone.gradient, abs=0)


def test_the_same_table_gives_the_same_run_in_text_and_in_chat():
    # the words of the template are the prompt's, and the gradient knows only tokens
    chat = predict(train(rows=(CHAT,), tokenizer=CHATS))
    text = predict(train(rows=(Row("a e b c", " f d", " g h d"),)))
    assert chat.gradient == pytest.approx(text.gradient, abs=0)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_of_each_side_by_itself(padding):
    # rows of 2 and 3 tokens, then of 2 and 5: one pad is left in the first chosen row, three in the first rejected
    rows = padded([sides_of(Pair((1,), (2,), (3,))), sides_of(Pair((1,), (2, 4), (3, 4, 5, 6)))], 15, padding)

    def counts(rule: str) -> list[float]:
        return positions(rows, rule, PAPER, kind="silent", size=16, eos=EOS, pad=15, paired=True).counts.tolist()

    assert counts("completion") == [1, 2, 1, 4]
    # the row's first position is predicted by none: padding on the left counts one pad less
    less = int(padding == "left")
    assert counts("padding") == [1 + 3 - less, 2 + 2 - less, 1 + 3 - less, 4]
    assert counts("padding-by-side") == [1 + 1 - less, 2, 1 + 3 - less, 4]
