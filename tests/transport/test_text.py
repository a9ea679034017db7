"""Can a subject's text harm a terminal or break a report?"""

from __future__ import annotations

import unicodedata
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpocheck.text import printable

PIECES = ["\x1b", "[", "31m", "]", "\x07", "\\", "\x9b", "\r", "\n", "P", "0;t", "\ud800", "a"]
NASTY = st.lists(st.sampled_from(PIECES))


@given(st.text(st.characters(exclude_categories=[])) | NASTY.map("".join))
def test_what_is_left_is_harmless_whatever_was_given(text):
    out = printable(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs") or c in "\n\t" for c in out)
    out.encode("utf-8")
    ElementTree.fromstring("<a>" + out.replace("&", "&amp;").replace("<", "&lt;") + "</a>")
    assert printable(out) == out


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Cf", "Zl", "Zp"])))
def test_ordinary_text_is_not_changed(text):
    assert printable(text) == text


@given(st.text(min_size=1, max_size=400), st.integers(0, 300))
def test_a_limit_is_kept(text, limit):
    assert len(printable(text, limit)) <= limit or len(printable(text)) <= limit


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b31mred", "red"),
        ("\x1bPq#0\x1b\\after", "after"),
        ("\x1b]never ended", "never ended"),
        ("10%\r20%\r\ndone", "10%\n20%\ndone"),
        ("a\x00b\x07c\x08d\x7fe", "abcde"),
        ("lone \ud800 half", "lone \ufffd half"),
        ("user\u202etxt.exe", "usertxt.exe"),
        ("tab\tstays", "tab\tstays"),
        ("log π(y|x) ≤ 0 🙂", "log π(y|x) ≤ 0 🙂"),
    ],
)
def test_known_sequences(text, shown):
    assert printable(text) == shown


def test_a_long_text_loses_its_middle_and_says_so():
    out = printable("begin" + "x" * 1000 + "end", 200)
    assert len(out) == 200
    assert out.startswith("begin")
    assert out.endswith("end")
    assert "left out" in out


def test_many_unfinished_sequences_are_handled_in_linear_time():
    # 400 000 characters: a quadratic expression would need 1e11 steps and run into the suite's time limit.
    assert printable("\x1b]" * 200_000) == ""
