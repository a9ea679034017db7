"""Does the printed equation say which reference, clipping and dropout were found, and only what was seen?"""

from __future__ import annotations

import numpy as np
import pytest

from dpocheck import identify, selftest
from dpocheck.check import CHECKS

RUN = ("LOSS-ARGUMENTS", "REF-IS-POLICY-GIVEN", "CLIP-NORM", "REF-NO-DROPOUT")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    made = selftest.Zoo(tmp_path_factory.mktemp("equation"))
    yield made
    made.close()


def lines(zoo, name: str, checks: tuple[str, ...] = RUN) -> list[str]:
    subject = zoo.subject(name)
    subject.theory, subject.precisions = zoo.honest()
    run = selftest.session(subject)
    for id in checks:
        run.result(CHECKS[id])
    return identify.equation(subject).text.splitlines()


def test_an_honest_trainer(zoo):
    assert lines(zoo, "miniature") == [
        "mean over pairs of −log σ( 0.500 · [ 1.000 lp_w − 1.000 rf_w − 1.000 lp_l + 1.000 rf_l ] )",
        "lp, rf: sums over the completion's tokens, EOS appended and counted once; prompt 0, padding 0",
        "rows: BOS where the tokenizer puts it; beyond the limit the side asked for is kept",
        "reference: the model handed over; without one, the policy as it was passed",
        "clipping: at 1.000 of the norm asked for",
        "dropout: none in the policy, none in the reference",
    ]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("reference-from-disk",
         "reference: the model handed over; without one, the checkpoint that the policy was loaded from"),
        ("policy-dropout-on", "dropout: drawn in the policy, none in the reference"),
    ],
)  # fmt: skip
def test_what_is_otherwise_is_told(zoo, name, line):
    assert line in lines(zoo, name)


def test_what_was_not_run_is_left_out(zoo):
    found = lines(zoo, "two-forwards", ("LOSS-ARGUMENTS",))
    assert [line.split(":")[0] for line in found[1:]] == ["lp, rf", "rows"]


def test_a_factor_describes_a_gradient_only_along_the_one_that_is_due():
    due = np.array([[3.0, 0.0], [0.0, 4.0]])
    assert identify.against(due / 2, due) == "0.500 of it"
    assert identify.against(-due, due) == "-1.000 of it"
    assert identify.against(due + 1e-3, due) == "1.000 of it"  # 2e-4 off the line
    assert identify.against(np.array([[3.0, 0.0], [0.0, 0.0]]), due) == "in another direction (cosine 0.600)"
