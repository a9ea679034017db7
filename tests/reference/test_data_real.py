"""Are two real preference sets, in two formats that people train on, read without losing or inventing anything?

DPOCHECK_DATA names a folder with hh_harmless_test.jsonl.gz (Anthropic HH) and dpo_en_demo.json.gz (ShareGPT).
"""

import gzip
import json
import os
from pathlib import Path

import pytest
from data_tokenizers import CHATML, DEFAULT_SYSTEM, PLAIN_CHAT, text_of, trained_bpe

from reference_impl.data import load_pairs

FOLDER = Path(os.environ.get("DPOCHECK_DATA", "/nonexistent"))
HH, SHAREGPT = FOLDER / "hh_harmless_test.jsonl.gz", FOLDER / "dpo_en_demo.json.gz"
pytestmark = pytest.mark.skipif(
    not (HH.is_file() and SHAREGPT.is_file()), reason="DPOCHECK_DATA names no folder with the real preference sets"
)


@pytest.fixture(scope="module")
def transcripts():
    with gzip.open(HH, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.fixture(scope="module")
def conversations():
    with gzip.open(SHAREGPT, "rt", encoding="utf-8") as stream:
        return json.load(stream)


@pytest.fixture(scope="module")
def words(transcripts):
    return [row["chosen"] for row in transcripts[:500]]


@pytest.mark.parametrize("bos", [False, True])
def test_every_transcript_is_kept_whole_or_accounted_for(transcripts, words, bos):
    tokenizer = trained_bpe(words, 2000, bos=bos)
    data = load_pairs(HH, tokenizer, max_length=None)
    report = data.report
    assert report.format == "HH transcript"
    # Counted apart from this code: five pairs part before the last reply, four have a reply of white space.
    assert (report.read, report.kept) == (2312, 2303)
    assert report.dropped == {"parts_early": 5, "empty": 4}
    assert report.not_round_trip == report.spacing_only == report.boundary_merges == 0
    head = "<s>" if bos else ""
    for pair in data.pairs:
        row = transcripts[pair.row]
        assert text_of(tokenizer, pair.prompt).endswith("\n\nAssistant:")
        for name in ("chosen", "rejected"):
            side = getattr(pair, name)
            assert text_of(tokenizer, pair.prompt + side) == head + row[name] + "</s>"
            assert "\n\nHuman:" not in text_of(tokenizer, side)


@pytest.mark.parametrize("how", ["keep_start", "keep_end", "drop"])
def test_truncated_transcripts_keep_the_limit_and_every_row_is_accounted_for(transcripts, words, how):
    tokenizer = trained_bpe(words, 2000, bos=True)
    rows = transcripts[:500]
    whole = {p.row: p for p in load_pairs(rows, tokenizer, max_length=None).pairs}
    data = load_pairs(rows, tokenizer, max_length=256, truncation=how)
    report = data.report
    assert report.kept + sum(report.dropped.values()) == report.read
    cut = {note.row for note in report.notes if note.kind == "cut"}
    assert len(cut) == sum(report.cut.values())
    for pair in data.pairs:
        assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= 256
        assert pair.chosen != pair.rejected
        assert pair.prompt[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in pair.prompt[1:]
        original = whole[pair.row]
        assert (pair == original) == (pair.row not in cut)
        for name in ("chosen", "rejected"):
            assert getattr(pair, name) == getattr(original, name)[: len(getattr(pair, name))]


@pytest.mark.parametrize(
    ("template", "eos"),
    [(CHATML, "<|im_end|>"), (CHATML, "</s>"), (PLAIN_CHAT, "</s>"), (DEFAULT_SYSTEM, "<|im_end|>")],
)
def test_every_conversation_is_what_the_template_renders(conversations, words, template, eos):
    tokenizer = trained_bpe(words, 2000, eos=eos, template=template)
    data = load_pairs(SHAREGPT, tokenizer, max_length=None)
    assert (data.report.format, data.report.read, data.report.kept) == ("ShareGPT", 300, 300)
    assert data.report.not_round_trip == 0
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for pair in data.pairs:
        row = conversations[pair.row]
        messages = [{"role": roles[m["from"]], "content": m["value"]} for m in row["conversations"]]
        for name in ("chosen", "rejected"):
            reply = {"role": "assistant", "content": row[name]["value"]}
            rendered = tokenizer.apply_chat_template([*messages, reply], tokenize=False)
            side = getattr(pair, name)
            assert text_of(tokenizer, pair.prompt + side) == rendered + ("" if eos in rendered else eos)
            assert side.count(tokenizer.eos_token_id) == 1
            # Nothing but this reply and its end is scored; the space of "assistant: " may be one token with its start.
            scored = text_of(tokenizer, side).removesuffix("</s>").strip().removesuffix("<|im_end|>")
            assert scored.strip() == row[name]["value"].strip()


def test_transcripts_without_spaces_after_the_header_merge_nothing_away(transcripts, words):
    """The same rows with explicit prompts that end with a space: a token spans the edge in almost every row."""
    tokenizer = trained_bpe(words, 2000)
    rows = []
    for row in transcripts[:300]:
        end = row["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant: ")
        if (
            row["chosen"][:end] == row["rejected"][:end]
            and row["chosen"][end:].strip()
            and row["rejected"][end:].strip()
        ):
            rows.append(
                {"prompt": row["chosen"][:end], "chosen": row["chosen"][end:], "rejected": row["rejected"][end:]}
            )
    data = load_pairs(rows, tokenizer, max_length=None)
    assert data.report.boundary_merges > 0.9 * len(rows)
    for pair in data.pairs:
        row = rows[pair.row]
        assert text_of(tokenizer, pair.prompt + pair.chosen) == row["prompt"] + row["chosen"] + "</s>"
        assert text_of(tokenizer, pair.prompt + pair.rejected) == row["prompt"] + row["rejected"] + "</s>"
