"""Is docs/catalogue.md what the declarations say, and does every property have a check or a reason?"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from dpocheck.check import CHECKS
from dpocheck.explain import explain, mathematics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def docs_page():
    spec = importlib.util.spec_from_file_location("docs_page", ROOT / "ci" / "docs_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_catalogue_page_is_made_of_the_declarations_as_they_are(docs_page):
    written = (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8")
    assert written == docs_page.page(), "docs/catalogue.md is stale; run ci/docs"


def test_every_property_is_covered_or_excused_and_not_both(docs_page):
    chapters, excused = docs_page.properties()
    listed = [id for ids in chapters.values() for id in ids]
    assert len(listed) == len(set(listed)) == 167
    assert docs_page.open_properties() == []
    known = docs_page.covered()
    assert not set(excused) & set(known), "excused and covered: take it out of `excused`"
    assert set(excused) <= set(listed)
    assert set(known) <= set(listed), "a check covers a property that docs/properties.toml does not list"


def test_an_excuse_names_only_what_exists(docs_page):
    import re

    from dpocheck.conventions import QUESTIONS

    asked = {question.id for question in QUESTIONS}
    for reason in docs_page.properties()[1].values():
        for id in re.findall(r"\b[A-Z]{3,}(?:-[A-Z]+)+\b", reason):
            assert id in CHECKS or id in asked, id


def test_a_property_that_nobody_covers_is_named(docs_page, monkeypatch):
    monkeypatch.setattr(docs_page, "properties", lambda: ({"loss": ["LOSS-VALUE", "LOSS-NEW"]}, {}))
    assert docs_page.open_properties() == ["LOSS-NEW"]


def test_the_command_says_that_all_is_well():
    done = subprocess.run([sys.executable, str(ROOT / "ci" / "docs"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("plain", "pretty"),
    [
        ("-log sigma(beta * [(log pi(y_w) - log ref(y_w))])", "−log σ(β · [(log π(y_w) − log π_ref(y_w))])"),
        ("becomes pi_ref * w^(1/beta)", "becomes π_ref · w^(1/β)"),
        ("(h - 1 / (2 tau))^2", "(h − 1 / (2 τ))²"),
        ("a full-batch step of the log-probs", "a full-batch step of the log-probs"),
        ("betas and epsilon as asked for", "betas and ε as asked for"),
    ],
)
def test_formulas_are_written_as_people_write_them(plain, pretty):
    assert mathematics(plain) == pretty


def test_explain_shows_the_formula():
    text = explain(CHECKS["LOSS-VALUE"])
    assert "−log σ(β · [(log π(y_w) − log π_ref(y_w))" in text
