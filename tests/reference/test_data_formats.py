"""Is every usual way to write a preference read as the same preference?"""

import gzip
import json

import pytest
from data_tokenizers import CHATML, byte_bpe, text_of
from hypothesis import given
from hypothesis import strategies as st

from reference_impl.data import load_pairs
from reference_impl.rows import common_prefix_length

TOKENIZER = byte_bpe(eos="<|im_end|>", template=CHATML)
ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
U, A, B = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("assistant", "no")))


def texts(rows):
    data = load_pairs(rows, TOKENIZER, max_length=None)
    return data.report.format, [
        tuple(text_of(TOKENIZER, ids) for ids in (p.prompt, p.chosen, p.rejected)) for p in data.pairs
    ]


def share(role, text):
    return {"from": role, "value": text}


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("chat", {"prompt": [U], "chosen": [A], "rejected": [B]}),
        ("chat", {"prompt": "hi", "chosen": [A], "rejected": [B]}),
        ("chat", {"prompt": [U], "chosen": "yes", "rejected": "no"}),
        ("chat", {"prompt": [U], "chosen": A, "rejected": B}),
        ("chat", {"prompt": "hi", "chosen": [U, A], "rejected": [U, B]}),
        ("chat", {"prompt": [U], "chosen": [U, A], "rejected": [U, B]}),
        ("chat", {"prompt": [U], "chosen": [U, A], "rejected": [B]}),
        ("chat, implicit prompt", {"chosen": [U, A], "rejected": [U, B]}),
        ("chat, implicit prompt", {"chosen": [U, A], "rejected": [U, B], "score_chosen": 8.5, "messages": [U, A]}),
        (
            "ShareGPT",
            {"conversations": [share("human", "hi")], "chosen": share("gpt", "yes"), "rejected": share("gpt", "no")},
        ),
        ("ShareGPT", {"conversations": [U], "chosen": "yes", "rejected": "no"}),
        (
            "chat, implicit prompt",
            {
                "chosen": [share("human", "hi"), share("gpt", "yes")],
                "rejected": [share("human", "hi"), share("gpt", "no")],
            },
        ),
        (
            "chat",  # parts of content, and null keys as columnar files fill them in
            {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}],
                "chosen": [{**A, "tool_calls": None, "name": None}],
                "rejected": [B],
            },
        ),
    ],
)
def test_one_chat_preference_written_in_many_ways_is_the_same_tokens(form, row):
    assert texts([row]) == (form, [(ASKED, "yes<|im_end|>\n", "no<|im_end|>\n")])


def test_a_prompt_text_beside_whole_conversations_with_a_system_message_keeps_the_system_message():
    s = {"role": "system", "content": "brief"}
    ((prompt, _, _),) = texts([{"prompt": "hi", "chosen": [s, U, A], "rejected": [s, U, B]}])[1]
    assert prompt == "<|im_start|>system\nbrief<|im_end|>\n" + ASKED


@pytest.mark.parametrize("form", ["conversations", "prompt"])
def test_a_system_column_becomes_the_first_message(form):
    ((prompt, _, _),) = texts([{form: [U], "system": "brief", "chosen": [A], "rejected": [B]}])[1]
    assert prompt == "<|im_start|>system\nbrief<|im_end|>\n" + ASKED


@pytest.mark.parametrize("tools", [[{"name": "clock"}], '[{"name": "clock"}]'])
def test_tools_reach_the_template_as_list_or_as_json(tools):
    tokenizer = byte_bpe(eos="<|im_end|>", template="{% if tools %}[{{ tools[0].name }}]{% endif %}" + CHATML)
    row = {"prompt": [U], "chosen": [A], "rejected": [B], "tools": tools}
    pair = load_pairs([row], tokenizer, max_length=None).pairs[0]
    assert text_of(tokenizer, pair.prompt) == "[clock]" + ASKED


def test_keys_of_messages_reach_the_template_but_null_ones_do_not():
    named = "{% if 'name' in m %}{{ m.name }}:{% endif %}{{ m.content }}"  # as templates ask for tool calls
    tokenizer = byte_bpe(eos="<|im_end|>", template=CHATML.replace("{{ m.content }}", named))
    row = {"prompt": [{**U, "name": "Ann"}], "chosen": [{**A, "name": None}], "rejected": [B]}
    pair = load_pairs([row], tokenizer, max_length=None).pairs[0]
    assert text_of(tokenizer, pair.prompt).startswith("<|im_start|>user\nAnn:hi")
    assert text_of(tokenizer, pair.chosen) == "yes<|im_end|>\n"


def test_turns_that_both_completions_share_belong_to_the_prompt():
    row = {"prompt": [U], "chosen": [A, U, A], "rejected": [A, U, B]}
    ((prompt, chosen, _),) = texts([row])[1]
    assert prompt == ASKED + "yes<|im_end|>\n" + ASKED
    assert chosen == "yes<|im_end|>\n"


@pytest.mark.parametrize(
    ("reason", "chosen", "rejected"),
    [
        ("parts_early", [U, A, U, A], [U, B, U, A]),
        ("parts_early", [U, A], [U, A, U, B]),
        ("not_assistant", [U, A], [{"role": "user", "content": "ho"}, A]),
        ("empty", [U, A], [U, {"role": "assistant", "content": ""}]),
        ("identical", [U, A], [U, A]),
    ],
)
def test_conversations_that_are_no_pair_of_last_replies_are_dropped(reason, chosen, rejected):
    data = load_pairs(
        [{"chosen": chosen, "rejected": rejected}, {"chosen": [U, A], "rejected": [U, B]}], TOKENIZER, max_length=None
    )
    assert data.report.dropped == {reason: 1}
    assert [p.row for p in data.pairs] == [1]


# ---- texts


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Paris is", "Paris was", "Paris "),
        ("Paris", "Paris is", "Paris"),  # one is the start of the other: nothing of it may be lost
        ("Paris is", "Paris", "Paris"),
        ("2+2= 4", "2+2= 5", "2+2= "),
        ("aa ", "aa", "aa"),
        ("\n\nHuman: hi", "\n\nHuman: ho", "\n\nHuman: h"),
    ],
)
def test_an_implicit_prompt_is_what_both_texts_share(chosen, rejected, prompt):
    form, ((got, first, second),) = texts([{"chosen": chosen, "rejected": rejected}])
    assert form == "text, implicit prompt"
    assert got == prompt
    assert (got + first, got + second) == (chosen + "<|im_end|>", rejected + "<|im_end|>")


def test_columns_that_are_no_prompt_do_not_stop_an_implicit_one():
    row = {"prompt_id": "a1", "input": None, "question": "", "context": 3, "chosen": "a b", "rejected": "a c"}
    assert texts([row])[0] == "text, implicit prompt"


@pytest.mark.parametrize(("chosen", "rejected"), [("Paris ", "London"), (" ", " x"), ("a ", "b")])
def test_texts_that_share_little_reassemble_too(chosen, rejected):
    tokenizer = byte_bpe(bos=True)
    pair = load_pairs([{"chosen": chosen, "rejected": rejected}], tokenizer, max_length=None).pairs[0]
    for side, text in ((pair.chosen, chosen), (pair.rejected, rejected)):
        assert text_of(tokenizer, pair.prompt + side) == f"<s>{text}</s>"


def transcript(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}:{t}" for i, t in enumerate(turns))


def test_a_transcripts_prompt_ends_with_the_last_shared_assistant():
    # Both replies start with " No": an implicit prompt by characters would take it for the prompt.
    row = {"chosen": transcript(" hi", " yo", " a?", " No."), "rejected": transcript(" hi", " yo", " a?", " Not now.")}
    assert texts([row]) == (
        "HH transcript", [(transcript(" hi", " yo", " a?", ""), " No.<|im_end|>", " Not now.<|im_end|>")]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "chosen", "rejected"),
    [
        ("parts_early", (" hi", " yo", " a?", " No."), (" hi", " yes", " a?", " No.")),
        ("parts_early", (" hi", " yo"), (" ho", " yo")),
        ("empty", (" hi", " yo"), (" hi", " ")),
        ("identical", (" hi", " yo"), (" hi", " yo")),
    ],
)
def test_transcripts_that_are_no_pair_of_last_replies_are_dropped(reason, chosen, rejected):
    good = {"chosen": transcript(" hi", " yes"), "rejected": transcript(" hi", " no")}
    bad = {"chosen": transcript(*chosen), "rejected": transcript(*rejected)}
    data = load_pairs([good, bad], TOKENIZER, max_length=None)
    assert data.report.dropped == {reason: 1}


@given(st.text("ab", max_size=8), st.text("ab", max_size=8), st.booleans())
def test_common_prefix_length_is_the_first_difference(a, b, as_list):
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix_length(*((list(a), list(b)) if as_list else (a, b))) == expected


# ---- sources

ROWS = [{"prompt": f"q{i}é", "chosen": " yes", "rejected": " no"} for i in range(3)]


def write(path, rows=ROWS):
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    if path.name.endswith(".parquet"):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    body = (lines if ".jsonl" in path.name.lower() else json.dumps(rows)).encode()
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz", "d.parquet", "D.JSONL"])
def test_every_file_type_gives_the_same_pairs_and_fingerprint(tmp_path, name):
    memory = load_pairs(ROWS, TOKENIZER, max_length=None)
    data = load_pairs(write(tmp_path / name), TOKENIZER, max_length=None)
    assert data.pairs == memory.pairs
    assert data.fingerprint == memory.fingerprint


def test_chat_rows_from_parquet_give_the_same_pairs(tmp_path):
    rows = [{"prompt": [U], "chosen": [A], "rejected": [B]}, {"prompt": [U], "chosen": [B], "rejected": [A]}]
    data = load_pairs(write(tmp_path / "d.parquet", rows), TOKENIZER, max_length=None)
    assert data.pairs == load_pairs(rows, TOKENIZER, max_length=None).pairs


def test_a_dataset_object_is_read_as_rows():
    datasets = pytest.importorskip("datasets")
    data = load_pairs(datasets.Dataset.from_list(ROWS), TOKENIZER, max_length=None)
    assert data.pairs == load_pairs(ROWS, TOKENIZER, max_length=None).pairs


def test_a_hub_name_asks_for_the_named_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or ROWS)
    for source in ("hub:owner/set", "hub:owner/set:test[:10%]"):
        assert len(load_pairs(source, TOKENIZER, max_length=None).pairs) == 3
    assert asked == [("owner/set", "train"), ("owner/set", "test[:10%]")]


def test_blank_lines_and_a_byte_order_mark_are_no_rows_but_count_as_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    good, same = (json.dumps({"prompt": "q", "chosen": c, "rejected": "no"}) for c in ("yes", "no"))
    path.write_bytes(b"\xef\xbb\xbf" + f"{good}\n\n  \n{same}\n\n".encode())
    data = load_pairs(path, TOKENIZER, max_length=None)
    assert [p.row for p in data.pairs] == [0]
    assert (data.report.notes[0].row, data.report.notes[0].place) == (1, f"{path} line 4")


def test_rows_are_read_one_by_one_not_all_at_once():
    alive = []

    def stream():
        for i in range(5000):
            alive.append(i)
            yield {"prompt": f"q{i}", "chosen": " yes", "rejected": " no" if i < 4000 else 7}

    with pytest.raises(ValueError, match="row 4000"):
        load_pairs(stream(), TOKENIZER, max_length=None)
    assert len(alive) == 4001
