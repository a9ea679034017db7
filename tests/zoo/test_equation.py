"""Does the printed equation say which reference, clipping and dropout were found, and only what was seen?"""

from __future__ import annotations

import numpy as np
import pytest

from dpocheck import identify, selftest
from dpocheck.check import CHECKS

RUN = ("LOSS-ARGUMENTS", "LOGP-VALUE", "GRAD-TOKENS", "REF-IS-POLICY-GIVEN", "CLIP-NORM", "REF-NO-DROPOUT")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    made = selftest.Zoo(tmp_path_factory.mktemp("equation"))
    yield made
    made.close()


def lines(zoo, name: str, checks: tuple[str, ...] = RUN, only: str | None = None) -> list[str]:
    subject = selftest.restricted(zoo.subject(name), only)
    subject.theory, subject.precisions = zoo.honest(only)
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


@pytest.mark.parametrize(("name", "only", "end"), [
    ("counts-padding", None, "padding counted"),  # its log-probs hold pads, and say nothing of the prompt
    ("counts-padding-by-side", "train", "prompt 0, padding counted, each side padded to its own longest row"),
    ("counts-prompt", None, "prompt counted, padding 0"),
])  # fmt: skip
def test_which_tokens_count_beside_the_completions_is_measured(zoo, name, only, end):
    checks = ("LOSS-ARGUMENTS", "LOGP-VALUE", "GRAD-TOKENS")
    assert lines(zoo, name, checks, only)[1].split("; ")[1] == end


def test_a_loss_that_none_of_the_four_log_probs_enters_is_no_fit(zoo):
    # each completion token is scored by the logits after itself: those that a scene sets are never read
    subject = selftest.restricted(zoo.subject("unshifted"), "train")
    subject.theory, subject.precisions = zoo.honest("train")
    found = identify.equation(subject)
    assert found.text.startswith("not fitted: what it optimises does not depend on the four log-probs")
    assert found.residual is None
    assert found.same is False


def test_what_was_not_run_is_left_out(zoo):
    found = lines(zoo, "two-forwards", ("LOSS-ARGUMENTS",))
    assert [line.split(":")[0] for line in found[1:]] == ["lp, rf", "rows"]


def test_a_factor_describes_a_gradient_only_along_the_one_that_is_due():
    due = np.array([[3.0, 0.0], [0.0, 4.0]])
    assert identify.against(due / 2, due) == "0.500 of it"
    assert identify.against(-due, due) == "-1.000 of it"
    assert identify.against(due + 1e-3, due) == "1.000 of it"  # 2e-4 off the line
    assert identify.against(np.array([[3.0, 0.0], [0.0, 0.0]]), due) == "in another direction (cosine 0.600)"
