"""Does the screen say everything, in order, safely, and the same without colour?"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dpocheck.report.failure import long_form
from dpocheck.report.terminal import render
from dpocheck.report.words import cause, deviation, number, ordered, shown_pair
from dpocheck.result import Report
from dpocheck.stored import handle


def test_the_screen_tells_subject_chapters_equation_findings_blind_spots_and_counts_in_this_order(report):
    text = render(report)
    expected = [
        "auditing trl 1.16.0 through train   adapter 24 lines   tier quick", "with: torch 2.13.0", "bf16=False",
        "  rows ", "  loss ",
        "fitted from what it did (residual 3e-08)", "asked for: dpo, beta 0.1", "ipo length mean", "2 findings",
        "REF-IS-POLICY-GIVEN", "LOSS-SHOULD", "2 checks without a verdict", "LOSS-ODD", "LOSS-WEAK",
        "train cannot show: derivatives with respect to the reference", "9 checks, 5 of 8 applicable ran",
    ]  # fmt: skip
    places = [text.index(part, text.index("findings") if part.startswith("LOSS-") else 0) for part in expected]
    assert places == sorted(places)


def test_an_equation_that_is_the_one_asked_for_is_said_to_be_the_same(report):
    asked = "mean over pairs of −log σ(x)"
    assert "asked for: the same" in render(replace(report, equation=f"{asked}\nlp: sums", asked=asked))
    assert "asked for: dpo, beta 0.1" in render(report)


def test_the_audit_fits_one_screen(report):
    many = replace(report.results[1], id="REF-MANY")
    crowded = replace(report, results=report.results + (many,) * 40)
    assert len(render(crowded).splitlines()) <= 50
    assert "and 30 more in" in render(crowded)  # 42 findings, 12 shown


def test_each_chapter_shows_one_mark_a_check(report):
    row = next(line for line in render(report).splitlines() if line.startswith("  loss "))
    assert row.split()[1:8] == ["✔", "✘", "▫", "i", "E", "?", "6"]


def test_counts_are_executed_of_applicable_of_total(report):
    # 9 results: pass 2, fail 2, info 1 were executed; 1 is not applicable, so 8 are.
    assert (
        "9 checks, 5 of 8 applicable ran: 2 passed, 2 failed, 1 convention, 1 blocked, 1 error, 1 unknown, "
        "1 not applicable (one process)"
    ) in " ".join(render(report, width=120).split())


def test_colour_adds_nothing_but_colour(report):
    colored = render(report, color=True)
    assert "\x1b[" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored).split() == render(report, color=False).split()


def test_a_terminal_without_unicode_gets_ascii(report):
    text = render(report, unicode=False, detail=report.results)
    assert text.isascii()
    assert "?" not in text.replace("? 1 undecided", "").replace("? LOSS-WEAK", "").replace("i E ?", ""), text


def test_a_subject_cannot_write_on_the_terminal(hostile):
    text = render(hostile, detail=hostile.results)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e]", text)
    assert "owned" not in text
    assert "[red]x[/y] <b>&" in text  # shown as it is, not as markup


def test_a_failed_smoke_stage_is_the_adapters_and_blames_no_trainer(report):
    text = render(replace(report, results=(), smoke="train() returned no policy", equation=""))
    assert "did not get through the smoke stage, so nothing is said about the trainer" in text
    assert "train() returned no policy" in text
    assert "no check ran" in text


def test_the_long_form_holds_its_parts_in_order(report):
    result = replace(report.results[1], script="scripts/ref.py")
    text = long_form(result, report, "out/x")
    parts = [
        "✘ REF-IS-POLICY-GIVEN · must · version 1", "holds.", "source: Rafailov", "observed    1.3180",
        "expected    0.69315", "off by      0.6249 = 6.2e+05 times the bound (1.0e-06)", "first loss",
        "tokens ✔  reference log-probs ✘", "experiment", "prompt   chosen   rejected   log π_θ of y_w, y_l",
        "probably    the reference is",
        f"dpocheck replay out/x/{handle(result)}", "out/x/scripts/ref.py",
    ]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_the_loss_experiment_is_shown_with_its_h():
    # h = (−3.5 + 4.0) − (−6.0 + 5.0) = 0.5 + 1.0
    from dpocheck.experiment import LossExperiment
    from dpocheck.report.describe import describe

    _, table = describe([LossExperiment((-3.5,), (-6.0,), (-4.0,), (-5.0,))])
    assert table[1].split() == ["1", "−3.500", "−6.000", "−4.000", "−5.000", "1.500"]


def test_a_relation_names_only_what_differs_between_its_experiments(report):
    from dpocheck.report.describe import describe

    first = report.results[1].experiments[0]
    second = replace(first, recipe=replace(first.recipe, batch=4, accumulation=2))
    _, table = describe([first, second])
    assert table[-1].strip() == "2. the same, but recipe.batch 4, recipe.accumulation 2"


def test_a_step_shows_the_log_probs_its_tables_give():
    # logits (0, 0, 0, log 3) after token 0: log(3/6) = −0.6931 and log(1/6); the flat reference: log(1/4) = −1.386
    from math import log

    from dpocheck.experiment import Pair, StepExperiment, Table
    from dpocheck.report.describe import describe

    step = StepExperiment(Table(4, 0.0, ((0, 3, log(3.0)),)), Table(4), (Pair((0,), (3,), (2,)),))
    _, table = describe([step])
    assert table[1].split()[-2:] == ["−0.6931", "−1.386"]
    assert table[2].split()[-2:] == ["−1.792", "−1.386"]  # log(1/6)


def test_rows_are_shown_with_the_log_probs_of_policy_reference_and_disk():
    # flat table of 16: each token −log 16 = −2.773; two tokens (word, EOS) −5.545. One logit log 3 at b after a:
    # log(3/18) = −1.792, with EOS −4.564; its sibling log(1/18) − log 16 = −5.663
    from math import log

    from dpocheck.experiment import Row, Table, Tokenizer, TrainExperiment
    from dpocheck.report.describe import describe

    words = Tokenizer(("a", "b", "c"), 16)
    raised = Table(16, 0.0, ((0, 1, log(3.0)),))
    run = TrainExperiment(raised, None, words, (Row("a", " b", " c"),), edited=Table(16))
    _, table = describe([run])
    assert table[-2].split("   ")[-1] == "log π on disk of y_w, y_l"
    assert table[-1].split()[-4:] == ["−4.564,", "−5.663", "−5.545,", "−5.545"]


def test_numbers_that_differ_look_different():
    assert shown_pair(0.69314718, 0.69314719) == ("0.693147180", "0.693147190")
    assert shown_pair(1.0, 1.0) == ("1.0000", "1.0000")
    assert [number(value) for value in (0.0, 12.5, -3.0e-7, float("-inf"))] == ["0", "12.50", "−3.000e-07", "−∞"]


def test_an_error_without_allowance_is_not_divided(report):
    assert deviation(replace(report.results[1], bound=0.0)) == "off by 0.6249; no error allowed"


def test_findings_stand_in_the_order_to_fix_them(report):
    assert [r.id for r in ordered(report.findings)] == ["REF-IS-POLICY-GIVEN", "LOSS-SHOULD"]
    assert ordered(report.findings[::-1]) == ordered(report.findings)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "the reference is re-read from disk"),
        ({"diagnosis": (), "reason": "it crashed"}, "it crashed"),
        ({"diagnosis": ()}, "first loss: 1.3180, expected 0.69315"),
        ({"diagnosis": (), "observed": None}, "not so: REF-IS-POLICY-GIVEN holds."),
        ({"verdict": "unexpected-pass", "known": {"reason": "was broken"}},
         "passes, though it is a known failure: was broken"),
    ],
)  # fmt: skip
def test_a_finding_is_told_by_its_cause_else_its_reason_else_its_numbers(report: Report, fields, said):
    assert cause(replace(report.results[1], **fields)) == said
