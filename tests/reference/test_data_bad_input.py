"""Does every unusable input get one message that says where, what was given, what is allowed and what to do?"""

import gzip
import json
import re
import subprocess
import sys

import pytest
from data_tokenizers import CHATML, byte_bpe, word_level

from reference_impl.data import DataError, load_pairs

GOOD = {"prompt": "q", "chosen": " yes", "rejected": " no"}
U, A, B = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("assistant", "no")))
CHAT = {"prompt": [U], "chosen": [A], "rejected": [B]}
HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
SHARE = {"conversations": [{"from": "human", "value": "a"}], "chosen": "b", "rejected": "c"}


def without(row, *keys):
    return {k: v for k, v in row.items() if k not in keys}


def lines(*rows):
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()


FILES = {
    "empty file": ("d.jsonl", b"", "d.jsonl has no rows"),
    "blank lines only": ("d.jsonl", b"\n \n", "d.jsonl has no rows"),
    "empty json file": ("d.json", b"", "d.json has no rows"),
    "empty json array": ("d.json", b"[]", "d.json has no rows"),
    "broken json on line 3": ("d.jsonl", lines(GOOD, GOOD, '{"prompt": "q", '), r"line 3: not valid JSON .*'{\"prompt"),
    "two objects on a line": ("d.jsonl", lines(json.dumps(GOOD) * 2), r"line 1: not valid JSON \(Extra data"),
    "json array named jsonl": ("d.jsonl", json.dumps([GOOD]).encode(), r"line 1: a JSON array.*name the file \.json"),
    "long json array named jsonl": ("d.jsonl", json.dumps([GOOD], indent=1).encode(), r"line 1: .*name it \.json"),
    "jsonl named json": ("d.json", lines(GOOD, GOOD), r"line 2: .*one object per line: name it \.jsonl"),
    "json that is an object": ("d.json", b'{"train": []}', "one JSON dict with keys 'train'.* must hold an array"),
    "json that is a number": ("d.json", b"7", r"one JSON int; .* must hold an array of rows"),
    "broken json file": ("d.json", b'[\n{"a": }]', "line 2: not valid JSON"),
    "row that is text": ("d.jsonl", lines(GOOD, '"hello"'), "line 2: a row is an object .* not str 'hello'"),
    "row that is null": ("d.json", b"[null]", "row 0: a row is an object"),
    "gz that is not gzip": ("d.jsonl.gz", lines(GOOD), "is not a gzip file .*rename it without .gz"),
    "gz cut short": ("d.jsonl.gz", gzip.compress(lines(*[GOOD] * 99))[:-20], "is damaged after line .*copy the file"),
    "empty gz": ("d.jsonl.gz", b"", "has no rows"),
    "invalid utf-8": ("d.jsonl", lines(GOOD) + b'{"prompt": "\xff"}', "line 2: byte 13 .0xff. is not valid UTF-8"),
    "utf-16": ("d.jsonl", lines(GOOD).decode().encode("utf-16"), "line 1: byte 1 .* is not valid UTF-8"),
    "unknown extension": ("d.csv", b"a,b", r"unknown file type '\.csv'; allowed are \.jsonl, \.jsonl\.gz, \.json"),
    "no extension": ("data", b"", "unknown file type ''; allowed are"),
    "parquet that is none": ("d.parquet", lines(GOOD), "is not a readable Parquet file"),
    "nested too deep": ("d.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
    "half a character": ("d.jsonl", lines({**GOOD, "chosen": "x\ud800"}), "line 1: chosen holds half a character"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_an_unusable_file_is_refused_with_its_place(tmp_path, case):
    name, body, said = FILES[case]
    path = tmp_path / name
    path.write_bytes(body)
    with pytest.raises(DataError, match=said) as error:
        load_pairs(path, byte_bpe(), max_length=None)
    assert str(path) in str(error.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(GOOD))
    with pytest.raises(DataError, match=r"trian\.jsonl does not exist; did you mean train\.jsonl\?"):
        load_pairs(tmp_path / "trian.jsonl", byte_bpe(), max_length=None)
    with pytest.raises(DataError, match="does not exist, nor does the folder"):
        load_pairs(tmp_path / "no" / "train.jsonl", byte_bpe(), max_length=None)


def test_a_folder_is_no_file_but_its_files_are_named(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(GOOD))
    with pytest.raises(DataError, match=r"is a folder, not a data file; data files in it: train\.jsonl"):
        load_pairs(tmp_path, byte_bpe(), max_length=None)


SECOND = {  # the first row is good, the second is not
    "missing column": (GOOD, without(GOOD, "rejected"), "row 1: no column 'rejected'; the columns are 'prompt',"),
    "null": (GOOD, {**GOOD, "chosen": None}, "row 1: column 'chosen' is null; every row needs it"),
    "null prompt": (GOOD, {**GOOD, "prompt": None}, "row 1: column 'prompt' is null"),
    "number": (GOOD, {**GOOD, "rejected": 7}, "row 1: column 'rejected' is a number, not text .*: 7"),
    "true": (GOOD, {**GOOD, "rejected": True}, "row 1: column 'rejected' is true or false"),
    "chat among texts": (GOOD, CHAT, "row 1: column 'prompt' holds messages, but text in the first .*standard"),
    "text among chats": (CHAT, GOOD, "row 1: column 'prompt' holds text, but messages in the first .*chat"),
    "text among conversations": (without(CHAT, "prompt"), HH, "row 1: column 'chosen' holds text, but"),
    "prompt appears": (without(GOOD, "prompt"), GOOD, "row 1: a column 'prompt', which the first row has not"),
    "conversations appear": (CHAT, {**CHAT, **SHARE}, "row 1: .*; give one format per file"),
    "text among transcripts": (HH, without(GOOD, "prompt"), "row 1: not an HH transcript, .*: ' yes'"),
    "transcript among texts": (without(GOOD, "prompt"), HH, "row 1: an HH transcript, unlike the first row"),
    "unknown role": (CHAT, {**CHAT, "chosen": [{"role": "boss", "content": "x"}]}, "role 'boss'; allowed are system,"),
    "number as role": (CHAT, {**CHAT, "chosen": [{"role": 3, "content": "x"}]}, r"chosen\[0\] has the role 3; allowed"),
    "no role": (CHAT, {**CHAT, "chosen": [{"content": "x"}]}, r"chosen\[0\] lacks its role: it has 'content'"),
    "no content": (CHAT, {**CHAT, "chosen": [{"role": "user"}]}, r"chosen\[0\] lacks its 'content': it has 'role'"),
    "content is a number": (CHAT, {**CHAT, "chosen": [{**A, "content": 5}]}, "is a number, not text: 5"),
    "image": (CHAT, {**CHAT, "prompt": [{**U, "content": [{"type": "image"}]}]}, "content of type image; only"),
    "ragged list": (CHAT, {**CHAT, "prompt": [U, "hello"]}, r"prompt\[1\] is text, not a message .*: 'hello'"),
    "list of lists": (CHAT, {**CHAT, "prompt": [[U]]}, r"prompt\[0\] is a list, not a message"),
    "empty list": (CHAT, {**CHAT, "rejected": []}, "column 'rejected' is an empty list; it needs"),
    "other prompt": (
        {**CHAT, "prompt": "hi"}, {"prompt": "ho", "chosen": [U, A], "rejected": [U, B]},
        "row 1: 'prompt' is not in the conversations .*: 'ho' against 'hi'; give",
    ),
    "system is a list": (CHAT, {**CHAT, "system": ["x"]}, "column 'system' is a list, not text"),
    "two systems": (
        CHAT, {**CHAT, "system": "x", "prompt": [{"role": "system", "content": "y"}, U]},
        "two system prompts: 'x' and 'y'",
    ),
    "system beside texts": (GOOD, {**GOOD, "system": "be brief"}, "'system' beside texts would be ignored: 'be brief'"),
    "tools no json": (CHAT, {**CHAT, "tools": "{"}, "column 'tools' is text that is not JSON"),
    "tools no list": (CHAT, {**CHAT, "tools": {"name": "x"}}, "'tools' must be a list of function .* not an object"),
    "row is a list": (GOOD, ["q", "a", "b"], "row 1: a row is an object"),
}  # fmt: skip


@pytest.mark.parametrize("case", SECOND)
def test_a_bad_row_is_refused_with_its_number_and_value(case):
    good, bad, said = SECOND[case]
    with pytest.raises(DataError, match=said) as error:
        load_pairs([good, bad], byte_bpe(eos="<|im_end|>", template=CHATML), max_length=None)
    assert str(error.value).startswith("row 1")


FIRST = {
    "misspelt column": ({**without(GOOD, "chosen"), "choosen": "x"}, "no column 'chosen'; .*did you mean 'choosen'"),
    "capital column": ({**without(GOOD, "chosen"), "Chosen ": "x"}, "did you mean 'Chosen '[?] Rename it to 'chosen'"),
    "unpaired rows": ({"prompt": "q", "completion": "x", "label": True}, "are unpaired .KTO."),
    "no columns": ({}, "no column 'chosen'; the columns are .none."),
    "question for prompt": ({**without(GOOD, "prompt"), "question": "q"}, "'question' looks like one; rename it"),
    "prompts for prompt": ({**without(GOOD, "prompt"), "prompts": "q"}, "'prompts' looks like one; rename it"),
    "question beside replies": ({"chosen": [A], "rejected": [B], "question": "q"}, "'question' looks like one"),
    "system beside implicit": ({**without(GOOD, "prompt"), "system": "s"}, "a column 'system' beside texts"),
    "prompt twice": ({**CHAT, **SHARE}, "both 'prompt' and 'conversations'; remove the one"),
    "text against messages": ({**GOOD, "chosen": [A]}, "'chosen' holds messages and 'rejected' text; write"),
    "conversations is text": ({**SHARE, "conversations": "hi"}, "must be a list of messages, not text: 'hi'"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIRST)
def test_unusable_columns_are_refused_with_what_was_probably_meant(case):
    row, said = FIRST[case]
    with pytest.raises(DataError, match=said):
        load_pairs([row], byte_bpe(eos="<|im_end|>", template=CHATML), max_length=None)


EVERYWHERE = {
    "chosen = rejected": (
        [{**GOOD, "rejected": " yes"}] * 3,
        {},
        "none of 3 rows .*chosen = rejected.; check that",
    ),
    "prompt too long": (
        [GOOD] * 2,
        {"max_length": 2, "prompt": "long"},
        "none of 2 rows .*no room .*raise max",
    ),
    "no text": (
        [{**GOOD, "chosen": ""}],
        {},
        "a completion must have text. For example row 0",
    ),
    "eos in the text": ([{**GOOD, "chosen": "a</s>b"}], {}, "text after EOS.; remove the EOS text"),
    "nothing before": (
        [{**GOOD, "prompt": ""}],
        {},
        "no BOS.; give the rows a prompt",
    ),
}


@pytest.mark.parametrize("case", EVERYWHERE)
def test_where_no_row_is_left_the_reasons_the_remedy_and_an_example_are_given(case):
    rows, settings, said = EVERYWHERE[case]
    rows = [{**r, "prompt": settings.get("prompt", r["prompt"])} for r in rows]
    with pytest.raises(DataError, match=said):
        load_pairs(rows, byte_bpe(), max_length=settings.get("max_length"))


SETTINGS = {
    "unknown truncation": (
        {"truncation": "keep_middle"},
        "'keep_middle' is unknown; allowed are keep_start, keep_end, drop",
    ),
    "max_length 1": ({"max_length": 1}, "max_length 1 must be a whole number from 2"),
    "negative max_length": ({"max_length": -5}, "max_length -5 must be"),
    "fractional max_length": ({"max_length": 10.0}, "max_length 10.0 must be"),
    "true as max_length": ({"max_length": True}, "max_length True must be"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_unusable_settings_are_refused_before_anything_is_read(case):
    settings, said = SETTINGS[case]
    with pytest.raises(DataError, match=said):
        load_pairs("/nowhere/d.jsonl", byte_bpe(), **{"max_length": None} | settings)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "a data source is a path, 'hub:name.:split.' or a list of rows, not NoneType"),
        (7, "not int 7"),
        ({"train": [GOOD], "test": [GOOD]}, "mapping with keys 'train', 'test'; give a list of rows, or one split"),
        ([], "a list in memory has no rows"),
        ("hub:", "names no dataset; write hub:name or hub:name:split"),
        (b"bytes", "a data source is a path"),
    ],
)
def test_what_is_no_source_is_refused(source, said):
    with pytest.raises(DataError, match=said):
        load_pairs(source, byte_bpe(), max_length=None)


def test_a_hub_dataset_that_cannot_be_loaded_is_one_clear_error(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(name, split):
        raise FileNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="hub:x/y:test cannot be loaded: FileNotFoundError: no such dataset"):
        load_pairs("hub:x/y:test", byte_bpe(), max_length=None)


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(DataError, match=r"no EOS token, so no completion could end; set tokenizer.eos_token"):
        load_pairs([GOOD], byte_bpe(eos=None), max_length=None)


def test_chats_without_a_chat_template_are_refused():
    with pytest.raises(
        DataError, match="rows are chats, but the tokenizer has no chat template; take"
    ):
        load_pairs([CHAT], byte_bpe(), max_length=None)


@pytest.mark.parametrize("tokenizer", [None, "gpt2", object()])
def test_what_is_no_tokenizer_is_refused(tokenizer):
    with pytest.raises(DataError, match="must be a transformers tokenizer, not"):
        load_pairs([GOOD], tokenizer, max_length=None)


def test_a_text_that_the_tokenizer_cannot_take_is_named():
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": "a", "chosen": " zebra", "rejected": " c"}]
    with pytest.raises(DataError, match="row 1: the tokenizer cannot tokenise 'a zebra': "):
        load_pairs(rows, word_level("a b c", unk=False), max_length=None)


def test_every_message_is_one_line_of_bearable_length(tmp_path):
    huge = "x" * 100_000
    for row in (
        {**GOOD, "chosen": [huge]},
        {**GOOD, "rejected": {"a": huge}},
        {huge[:50]: huge},
        {**CHAT, "chosen": [huge]},
    ):
        with pytest.raises(DataError) as error:
            load_pairs(
                [GOOD if "prompt" in row and isinstance(row["prompt"], str) else CHAT, row],
                byte_bpe(template=CHATML),
                max_length=None,
            )
        assert len(str(error.value)) < 400
        assert not re.search(r"[\r\n]", str(error.value))


def test_json_needs_neither_datasets_nor_pyarrow(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines(GOOD))
    code = (
        "import sys; from reference_impl.sources import read_rows; "
        f"rows = list(read_rows({str(path)!r})); "
        "assert len(rows) == 1; assert not {'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
