"""Are the ways of writing that a fresh sample of public code showed recognised, or refused in one clear sentence?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from asking import SUBJECTS, ask, dpo_step, sequence_logp

from dpocheck.adapter import Unsupported
from dpocheck.experiment import LogpExperiment, LossExperiment, Objective, Pair, StepExperiment, Table, TokenRow
from dpocheck.functions.find import recognise
from dpocheck.functions.parameters import NotRecognised
from dpocheck.worker import loading

KINDS = SUBJECTS / "kinds.py"
PAIR_LOGPS = ((-3.5, -7.25), (-6.0, -4.5), (-4.0, -6.5), (-5.0, -5.75))
H = (1.5, -2.0)  # (pi_w - ref_w) - (pi_l - ref_l): (0.5 - -1.0), (-0.75 - 1.25)
TWO = LossExperiment(*PAIR_LOGPS, objective=Objective(beta=0.5))
EACH = [math.log1p(math.exp(-0.5 * h)) for h in H]  # -log sigma(beta h)
FLOAT32 = 1e-5  # as in test_function_models.py


def table(salt: int) -> Table:
    """Logits that are all different, in quarters."""
    return Table.of(np.array([[((7 * u + 3 * v + salt * u * v) % 13) / 4 - 1 for v in range(16)] for u in range(16)]))


PAD = 9
ROWS = (
    TokenRow((1, 2, 3, 4, 5), (1, 1, 1, 1, 1), (0, 0, 1, 1, 1)),
    TokenRow((6, 7, 8, PAD, PAD), (1, 1, 1, 0, 0), (0, 1, 1, 0, 0)),
)
LOGPS = LogpExperiment(table(1), ROWS)
COUNTED = [sequence_logp(LOGPS.table, row.ids, row.completion) for row in ROWS]
PAIRS = (Pair((1, 2), (3, 4, 15), (5, 15)), Pair((6,), (7, 15), (8, 10, 11, 15)))
STEP = StepExperiment(table(1), table(2), PAIRS, Objective(beta=0.1), pad=12, eos=15)


@pytest.mark.parametrize("name", [
    "lists_rejected_first_dpo_loss", "cut_rejected_first_dpo_loss", "masked_sides_dpo_loss", "short_sides_dpo_loss",
    "may_be_none_dpo_loss",
])  # fmt: skip
def test_a_loss_of_this_kind_gives_minus_log_sigmoid_of_beta_h(name):
    seen = ask(f"{KINDS}:{name}", TWO)
    assert seen["per_pair"] == pytest.approx(EACH, rel=1e-12)


def test_a_mean_over_masked_tokens_shows_in_a_loss_of_masked_sides():
    # two tokens of a chosen completion and four of a rejected one: the gains of H are divided by 2 and 4
    gains = [(0.5, -1.0), (-0.75, 1.25)]
    each = [math.log1p(math.exp(-0.5 * (w / 2 - r / 4))) for w, r in gains]
    assert ask(f"{KINDS}:wrong_masked_sides_dpo_loss", TWO)["per_pair"] == pytest.approx(each, rel=1e-12)


@pytest.mark.parametrize("name", [
    "encoded_logps", "listed_logp", "zeroed_labels_logps", "padded_labels_logps", "reduced_logps", "sides_logps",
    "targets_beside_its_model_logps", "first_of_output_logps",
])  # fmt: skip
def test_a_log_prob_of_this_kind_is_the_sum_over_the_completion(name, tmp_path):
    assert ask(f"{KINDS}:{name}", LOGPS, tmp_path)["logps"] == pytest.approx(COUNTED, abs=FLOAT32)


def test_what_a_log_prob_function_was_asked_for_against_its_default_is_said(tmp_path):
    forced = ask(f"{KINDS}:targets_beside_its_model_logps", LOGPS, tmp_path)["forced"]
    assert forced["targets_beside_its_model_logps: reduction"] == "'sum'"
    assert forced["targets_beside_its_model_logps: labels"] == "moved by one"


def test_simpo_that_takes_a_reference_and_leaves_it_is_given_log_probs_per_token():
    gamma = Objective("simpo", beta=2.0, gamma=0.5)
    seen = ask(f"{KINDS}:unused_reference_simpo_loss", LossExperiment(*PAIR_LOGPS, gamma, lengths=((2, 3), (5, 2))))
    margins = [2.0 * (-3.5 / 2 + 6.0 / 3) - 0.5, 2.0 * (-7.25 / 5 + 4.5 / 2) - 0.5]
    assert seen["per_pair"] == pytest.approx([math.log1p(math.exp(-m)) for m in margins])


def test_numbers_that_numpy_has_not_are_not_asked_of_it():
    brief = LossExperiment(*PAIR_LOGPS, objective=Objective(beta=0.5), dtype="bfloat16")
    with pytest.raises(Unsupported, match="bfloat16: numpy has no such numbers"):
        ask(f"{SUBJECTS / 'losses.py'}:numpy_dpo", brief)


def test_a_step_that_takes_text_is_not_asked_for_tokens(tmp_path):
    with pytest.raises(Unsupported, match="it asks its tokenizer for apply_chat_template"):
        ask(f"{KINDS}:text_dpo_loss", STEP, tmp_path)


def test_labels_that_are_the_ids_by_its_callers_are_given_as_ids(tmp_path):
    wrong = [sequence_logp(LOGPS.table, row.ids, row.attention) for row in ROWS]
    assert ask(f"{KINDS}:wrong_prompt_counting_logps", LOGPS, tmp_path)["logps"] == pytest.approx(wrong, abs=FLOAT32)


def test_a_function_that_knows_left_out_labels_by_zero_is_not_asked_about_token_zero(tmp_path):
    rows = (TokenRow((1, 2, 0, 4), (1, 1, 1, 1), (0, 0, 1, 1)),)
    with pytest.raises(Unsupported, match="a scored token of id 0"):
        ask(f"{KINDS}:zeroed_labels_logps", LogpExperiment(table(1), rows), tmp_path)


@pytest.mark.parametrize("name", [
    "maskless_dpo_step", "configured_dpo_step", "logits_or_logps_dpo_loss", "KeptDefaults.compute_dpo_loss",
])  # fmt: skip
def test_a_step_of_this_kind_leaves_the_gradient_of_the_paper(name, tmp_path):
    loss, gradient = dpo_step(STEP)
    seen = ask(f"{KINDS}:{name}", STEP, tmp_path)
    assert seen["loss"] == pytest.approx(loss, abs=FLOAT32)
    assert seen["gradient"] == pytest.approx(gradient, abs=FLOAT32)


def test_a_step_that_takes_no_attention_mask_is_not_asked_about_left_padding(tmp_path):
    left = StepExperiment(**vars(STEP) | {"padding": "left"})
    with pytest.raises(Unsupported, match="left padding: maskless_dpo_step takes no attention mask"):
        ask(f"{KINDS}:maskless_dpo_step", left, tmp_path)


@pytest.mark.parametrize(("name", "reason"), [
    ("numbered_dpo_loss", "do not say which completion is the preferred one"),
    ("weighted_dpo_loss", "weighted-DPO is another objective"),
    ("slic_hinge_loss", "slic is not a loss of pairs that is audited here"),
    ("HypoTrainer.dpo_loss", "hypo is not a loss of pairs that is audited here"),
    ("nca_pair_loss", "nca is not a loss of pairs that is audited here"),
    ("sequence_first_logps", r"it takes rows as \(sequence, batch\)"),
    ("targets_beside_logps", "it gives its model 'targets' beside the ids"),
])  # fmt: skip
def test_what_cannot_be_called_is_refused_with_the_reason_by_judge_and_worker(name, reason):
    with pytest.raises(NotRecognised, match=reason):
        recognise(KINDS, name)
    with pytest.raises(NotRecognised, match=reason):
        loading.load(f"{KINDS}:{name}")


def test_a_function_of_another_librarys_arrays_is_refused(tmp_path):
    path = tmp_path / "other.py"
    path.write_text("import jax\n\ndef dpo_loss(pc, pr, rc, rr, beta):\n    return -jax.nn.log_sigmoid(beta * pc)\n")
    with pytest.raises(NotRecognised, match="it computes with jax"):
        recognise(path, "dpo_loss")


# -------------------------------------------------------------------------------------- files that cannot be imported

ABSENT = SUBJECTS / "absent.py"


@pytest.mark.parametrize("name", [
    "dpo_loss", "PlainTrainer.dpo_loss", "Trainer.dpo_loss", "RegisteredLoss.compute_loss",
])  # fmt: skip
def test_a_function_is_run_without_the_imports_that_it_does_not_need(name):
    seen = ask(f"{ABSENT}:{name}", TWO)
    assert seen["per_pair"] == pytest.approx(EACH, rel=1e-12)
    assert "nobody_has_this" in seen["forced"][f"{name}: run without the rest of its file"]


def test_a_missing_import_that_is_needed_is_named_when_it_is_used():
    with pytest.raises(ImportError, match="helper is not there: No module named 'nobody_has_that'"):
        ask(f"{ABSENT}:helped_dpo_loss", TWO)


STOPPED = """
import sys
import torch.nn.functional as F

{top}

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    return -F.logsigmoid(beta * (policy_chosen - policy_rejected - ref_chosen + ref_rejected))

def uses(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    return F.logsigmoid(beta * policy_chosen) * len(data)

class Adapter:
    def train(self, probe, rows, recipe, folder):
        return data
"""


def stopped(folder, top: str):
    path = folder / "script.py"
    path.write_text(STOPPED.format(top=top))
    return path


@pytest.mark.parametrize(("top", "told"), [
    ("data = open('no/such/data.json').read()", "FileNotFoundError"),
    ("data = sys.exit('usage: script.py FOLDER')", "SystemExit: usage: script.py FOLDER"),
    ("data = undefined_in_a_script", "NameError"),
    ("data = F.no_such_function()", "AttributeError"),
    ("assert len(sys.argv) > 99", "AssertionError"),
])  # fmt: skip
def test_a_function_is_run_without_the_top_of_its_file_where_that_raises(tmp_path, top, told):
    seen = ask(f"{stopped(tmp_path, top)}:dpo_loss", TWO)
    assert seen["per_pair"] == pytest.approx(EACH, rel=1e-12)
    assert seen["forced"]["dpo_loss: run without the rest of its file"].startswith(told)


def test_what_stopped_a_file_is_named_with_its_line_where_no_part_will_do(tmp_path):
    path = stopped(tmp_path, "data = open('no/such/data.json').read()")
    for name in ("Adapter", "nothing_such"):
        with pytest.raises(loading.NotLoadable, match=r"line 5 of .*script\.py raises .*FileNotFoundError.*__main__"):
            loading.load(f"{path}:{name}")


def test_an_adapter_is_never_taken_in_part():
    with pytest.raises(ModuleNotFoundError, match="nobody_has_this"):
        loading.load(f"{ABSENT}:Adapter")


def test_a_name_that_is_not_in_the_file_gives_the_files_own_error():
    with pytest.raises(ModuleNotFoundError, match="nobody_has_this"):
        loading.load(f"{ABSENT}:nothing_such")
