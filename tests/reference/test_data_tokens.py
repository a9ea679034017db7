"""Are prompt and completion the tokens of the text, whatever merges, special tokens and templates do at their edge?"""

import pytest
from data_tokenizers import (
    CHATML,
    DEFAULT_SYSTEM,
    PLAIN_CHAT,
    REWRITING,
    THINKING,
    byte_bpe,
    text_of,
    trained_bpe,
    word_level,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_impl.data import DataError, load_pairs

# Bytes merge inside the words and across the end of the prompt.
MERGES = [("a", "b"), ("Ġ", "a"), ("Ġ", "ab"), ("b", "a"), ("Ċ", "Ċ"), ("c", "Ġ"), ("Ã", "©")]


def load(rows, tokenizer, **settings_):
    return load_pairs(rows, tokenizer, **{"max_length": None} | settings_)


def one(row, tokenizer, **settings_):
    data = load([row], tokenizer, **settings_)
    assert len(data.pairs) == 1
    return data.pairs[0]


def row(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat(*turns):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[t[0]], "content": t[2:]} for t in turns]


# ---- texts


def test_words_give_the_ids_counted_by_hand():
    # "the"=0, " cat"=1, " sat"=2, " ran"=3, then <s>=4, </s>=5.
    pair = one(row("the cat", " sat", " ran"), word_level("the cat sat ran"))
    assert (pair.row, pair.prompt, pair.chosen, pair.rejected) == (0, (0, 1), (2, 5), (3, 5))


def test_bos_stands_once_in_front_of_the_prompt_and_nowhere_else():
    pair = one(row("the cat", " sat", " ran"), word_level("the cat sat ran", bos=True))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((4, 0, 1), (2, 5), (3, 5))


def test_a_prompt_that_already_starts_with_bos_does_not_get_a_second_one():
    pair = one(row("<s>the cat", " sat", " ran"), word_level("the cat sat ran", bos=True))
    assert pair.prompt == (4, 0, 1)


def test_bos_inside_a_completion_drops_the_row():
    data = load([row("the", " cat<s>", " sat"), row("the", " cat", " sat")], word_level("the cat sat", bos=True))
    assert data.report.dropped == {"bos_inside": 1}


def test_an_eos_that_the_text_brings_is_not_doubled():
    pair = one(row("the", " cat</s>", " sat</s></s>"), word_level("the cat sat"))
    assert (pair.chosen, pair.rejected) == ((1, 4), (2, 4))


def test_text_after_eos_drops_the_row_and_says_so():
    data = load([row("the", " cat</s> sat", " sat"), row("the", " cat", " sat")], word_level("the cat sat"))
    assert data.report.dropped == {"eos_inside": 1}
    assert data.report.rows() == ["row 0: dropped, text after EOS: ' cat</s> sat'"]


def test_eos_that_is_also_the_pad_token_is_scored():
    tokenizer = word_level("the cat sat")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert one(row("the", " cat", " sat"), tokenizer).chosen[-1] == tokenizer.eos_token_id


def test_a_token_across_the_end_of_the_prompt_belongs_to_both_completions():
    tokenizer = byte_bpe([("Ġ", "y")])
    # "x y" is x | Ġy; "x n" is x | Ġ | n. Alone, the prompt "x " is x | Ġ. They share x.
    data = load([row("x ", "y", "n")], tokenizer)
    pair = data.pairs[0]
    assert [text_of(tokenizer, p) for p in (pair.prompt, pair.chosen, pair.rejected)] == ["x", " y</s>", " n</s>"]
    assert len(pair.chosen) == 2
    assert data.report.boundary_merges == 1
    assert "a prompt that ends with a space" in " ".join(data.report.hints)


def test_a_merge_on_one_side_moves_the_prompt_of_both_sides():
    tokenizer = byte_bpe([("b", "c")])
    pair = one(row("ab", "d", "c"), tokenizer)
    assert text_of(tokenizer, pair.prompt) == "a"
    assert text_of(tokenizer, pair.chosen) == "bd</s>"
    assert text_of(tokenizer, pair.rejected) == "bc</s>"


def test_an_empty_prompt_takes_bos_where_the_tokenizer_has_one():
    data = load([row("", "the", "the cat")], word_level("the cat", bos=True))
    assert data.pairs[0].prompt == (2,)
    assert data.pairs[0].chosen == (0, 3)


def test_an_empty_prompt_takes_bos_even_where_the_tokenizer_does_not_add_it():
    tokenizer = word_level("the cat")
    tokenizer.bos_token = "</s>"  # as GPT-2 has it
    data = load([row("", "the", "the cat")], tokenizer)
    assert data.pairs[0].prompt == (3,)
    assert data.report.bos_added == 1


def test_without_bos_a_row_without_prompt_token_is_dropped_as_unscorable():
    data = load([row("", "the", "the cat"), row("the", " cat", " the")], word_level("the cat"))
    assert data.report.dropped == {"unscorable": 1}


def test_unknown_words_that_make_both_sides_equal_drop_the_row():
    data = load([row("the", " dog", " cow"), row("the", " cat", " dog")], word_level("the cat"))
    assert data.report.dropped == {"identical_tokens": 1}
    assert data.report.not_round_trip == 1


def test_a_tokenizer_that_adds_eos_itself_does_not_end_the_prompt_with_it():
    from tokenizers import processors

    tokenizer = word_level("the cat sat")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)]
    )
    pair = one(row("the", " cat", " sat"), tokenizer)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((3, 0), (1, 4), (2, 4))


def test_state_left_in_the_tokenizer_by_other_calls_does_not_cut_or_pad():
    tokenizer = word_level("the cat sat ran")
    clean = load([row("the cat", " sat", " ran")], tokenizer)
    tokenizer(["the cat sat"], padding="max_length", max_length=2, truncation=True)
    again = load([row("the cat", " sat", " ran")], tokenizer)
    assert again.pairs == clean.pairs
    assert again.fingerprint == clean.fingerprint


TEXTS = st.text(alphabet="ab c\né中", min_size=0, max_size=12)
# With GPT-2's splitting into words, white space at the end of a text is other tokens than before a word.
CORPUS = ["ab abc  ca\n\nba 中é c", "a b\n  cab   bac é中 "] * 4


@settings(max_examples=400, deadline=None)
@given(
    prompt=TEXTS, chosen=TEXTS, rejected=TEXTS, bos=st.booleans(), given_prompt=st.booleans(), words=st.booleans()
)  # fmt: skip
def test_prompt_and_completion_decode_to_the_text(prompt, chosen, rejected, bos, given_prompt, words):
    tokenizer = trained_bpe(CORPUS, 300, bos=bos) if words else byte_bpe(MERGES, bos=bos)
    texts = (prompt + chosen, prompt + rejected)
    given_row = row(prompt, chosen, rejected) if given_prompt else {"chosen": texts[0], "rejected": texts[1]}
    try:
        data = load([given_row], tokenizer)
    except DataError as error:
        (reason,) = error.report.dropped
        # Nothing else may go: equal sides, sides without text, a first token that nothing precedes.
        expected = {"identical": chosen == rejected, "empty": given_prompt and "" in (chosen, rejected)}
        assert expected.get(reason, reason == "unscorable" and not bos)
        return
    pair = data.pairs[0]
    head = "<s>" if bos else ""
    for side, text in ((pair.chosen, texts[0]), (pair.rejected, texts[1])):
        assert text_of(tokenizer, pair.prompt + side) == head + text + "</s>"
        assert side.count(tokenizer.eos_token_id) == 1
        assert side[-1] == tokenizer.eos_token_id
        assert len(side) >= 1
    assert len(pair.prompt) >= 1
    assert data.report.not_round_trip == data.report.spacing_only == 0
    if given_prompt:  # nothing of a completion is in the prompt
        assert (head + prompt).startswith(tokenizer.decode(pair.prompt).rstrip("\ufffd"))


# ---- chats


def chat_row(*prompt, chosen="yes", rejected="no"):
    return row(chat(*prompt), chat("a:" + chosen), chat("a:" + rejected))


def parts(tokenizer, pair):
    return [text_of(tokenizer, ids) for ids in (pair.prompt, pair.chosen, pair.rejected)]


def test_the_prompt_ends_with_the_assistants_header_and_the_template_ends_the_turn():
    tokenizer = byte_bpe(eos="<|im_end|>", template=CHATML)
    assert parts(tokenizer, one(chat_row("u:hi"), tokenizer)) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>\n", "no<|im_end|>\n"
    ]  # fmt: skip


def test_eos_is_appended_once_where_the_template_ends_turns_with_something_else():
    tokenizer = byte_bpe(template=PLAIN_CHAT)
    data = load([chat_row("u:hi")], tokenizer)
    assert parts(tokenizer, data.pairs[0]) == ["user: hi\nassistant: ", "yes\n</s>", "no\n</s>"]
    assert any("do not end with EOS '</s>'" in hint for hint in data.report.hints)


def test_a_default_system_prompt_stays_in_the_prompt_and_bos_comes_from_the_template_alone():
    tokenizer = byte_bpe(bos=True, eos="<|im_end|>", template=DEFAULT_SYSTEM)
    prompt, chosen, _ = parts(tokenizer, one(chat_row("u:hi"), tokenizer))
    assert (
        prompt == "<s><|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chosen == "yes<|im_end|>\n"


def test_no_bos_is_added_where_the_template_writes_none():
    tokenizer = byte_bpe(bos=True, eos="<|im_end|>", template=CHATML)
    assert tokenizer.bos_token_id not in one(chat_row("u:hi"), tokenizer).prompt


def test_a_generation_prompt_that_the_finished_chat_lacks_is_left_out_of_the_prompt():
    tokenizer = byte_bpe(eos="<|im_end|>", template=THINKING)
    data = load([chat_row("u:hi", chosen="<yes", rejected="no")], tokenizer)
    assert any("1 prompts are cut before '<think>\\n'" in hint for hint in data.report.hints)
    assert parts(tokenizer, data.pairs[0]) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<yes<|im_end|>\n", "no<|im_end|>\n"
    ]  # fmt: skip


def test_a_template_that_rewrites_the_prompt_is_refused_not_guessed():
    with pytest.raises(DataError, match="prompt changed by the chat template once a reply follows"):
        load([chat_row("u:hi")], byte_bpe(eos="<|im_end|>", template=REWRITING))


def test_what_a_template_refuses_is_dropped_with_the_templates_words():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    data = load([chat_row("s:be brief", "u:hi"), chat_row("u:hi")], byte_bpe(eos="<|im_end|>", template=template))
    assert [p.row for p in data.pairs] == [1]
    assert "no system role" in data.report.rows("template_refuses")[0]


def test_only_the_last_reply_is_scored_in_a_long_conversation():
    tokenizer = byte_bpe(eos="<|im_end|>", template=CHATML)
    prompt, chosen, rejected = parts(tokenizer, one(chat_row("u:hi", "a:hello", "u:how"), tokenizer))
    assert prompt.endswith("hello<|im_end|>\n<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n")
    assert (chosen, rejected) == ("yes<|im_end|>\n", "no<|im_end|>\n")


@pytest.mark.parametrize("variable", ["tokenize", "add_generation_prompt", "tools"])
def test_template_arguments_that_change_the_rendering_are_refused(variable):
    with pytest.raises(DataError, match=f"may not set {variable}"):
        load([chat_row("u:hi")], byte_bpe(template=CHATML), chat_template_kwargs={variable: True})


def test_template_arguments_of_the_templates_own_reach_it():
    tokenizer = byte_bpe(template="{{ mood }}" + CHATML)
    assert parts(tokenizer, one(chat_row("u:hi"), tokenizer, chat_template_kwargs={"mood": "gay"}))[0].startswith("gay")


WORDS = st.text(alphabet="ab é\n", min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    asked=st.lists(WORDS, min_size=1, max_size=3), chosen=WORDS, rejected=WORDS,
    template=st.sampled_from([CHATML, PLAIN_CHAT, DEFAULT_SYSTEM, THINKING]),
    eos=st.sampled_from(["</s>", "<|im_end|>"]),
    whole=st.booleans(),
)  # fmt: skip
def test_chats_decode_to_what_the_template_renders(asked, chosen, rejected, template, eos, whole):
    tokenizer = byte_bpe(MERGES, eos=eos, template=template)
    turns = chat(*(("u:", "a:")[i % 2] + text for i, text in enumerate(asked if len(asked) % 2 else asked[:1])))
    sides = [[*turns, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
    given_row = {"chosen": sides[0], "rejected": sides[1]} if whole else row(turns, sides[0][-1:], sides[1][-1:])
    if chosen == rejected:
        with pytest.raises(DataError, match="chosen = rejected"):
            load([given_row], tokenizer)
        return
    pair = one(given_row, tokenizer)
    for side, messages in ((pair.chosen, sides[0]), (pair.rejected, sides[1])):
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        ends = "" if eos in rendered else eos
        assert text_of(tokenizer, pair.prompt + side) == rendered + ends
        assert side.count(tokenizer.eos_token_id) == 1
    assert text_of(tokenizer, pair.prompt).rstrip().endswith(("assistant", "assistant:"))
