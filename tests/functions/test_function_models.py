"""Do bare log-prob functions and bare steps give through their adapters the numbers that they compute?"""

from __future__ import annotations

import numpy as np
import pytest
from asking import ask, dpo_step, log_probs, logp_gradient, sequence_logp

from dpocheck.adapter import Unsupported
from dpocheck.experiment import LogpExperiment, Objective, Pair, StepExperiment, Table, TokenRow


def table(salt: int) -> Table:
    """Logits that are all different, in quarters."""
    cells = [[((7 * u + 3 * v + salt * u * v) % 13) / 4 - 1 for v in range(16)] for u in range(16)]
    return Table.of(np.array(cells))


PAD = 9
ROWS = (
    TokenRow((1, 2, 3, 4, 5), (1, 1, 1, 1, 1), (0, 0, 1, 1, 1)),
    TokenRow((6, 7, 0, PAD, PAD), (1, 1, 1, 0, 0), (0, 1, 1, 0, 0)),
)
LOGPS = LogpExperiment(table(1), ROWS)
EXPECTED = [sequence_logp(LOGPS.table, row.ids, row.completion) for row in ROWS]
FLOAT32 = 1e-5  # five log-softmaxes of 16 float32 logits below 3: 5 * 16 * 2^-24 * 3 = 1.4e-5 at the very worst

HONEST = [
    "get_batch_logps", "logps_and_count", "cross_entropy_logps", "masked_logprobs", "response_logprob",
    "raw_model_logp", "tuple_model_logp", "labelled_logp", "prompt_length_logp", "premoved_logps", "token_logps",
    "sequence_logprob", "caller", "Scorer.batch_log_probs", "Scorer.compute_logprobs",
    "concatenated_forward", "iterating_forward", "batch_logprob", "flat_logprob", "gradless_logps",
    "PaddingScorer.batch_logps",
]  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_log_prob_is_the_sum_over_the_completion(name, tmp_path):
    seen = ask(f"logps:{name}", LOGPS, tmp_path)
    assert seen["capabilities"] == ["sequence_logps"]
    assert seen["logps"] == pytest.approx(EXPECTED, abs=FLOAT32)
    for row, gradient in zip(ROWS, seen["gradient"], strict=True):
        assert gradient == pytest.approx(logp_gradient(LOGPS.table, row.ids, row.completion), abs=FLOAT32)


def test_a_function_of_one_sequence_is_called_row_by_row(tmp_path):
    rows = (ROWS[0], TokenRow((6, 7, 0, 8, 8), (1,) * 5, (0, 1, 1, 1, 1)))
    seen = ask("logps:prefix_logp", LogpExperiment(LOGPS.table, rows), tmp_path)
    expected = [sequence_logp(LOGPS.table, row.ids, row.completion) for row in rows]
    assert seen["logps"] == pytest.approx(expected, abs=FLOAT32)


def test_a_function_of_numpy_gives_values_and_no_gradient(tmp_path):
    seen = ask("logps:numpy_logps", LOGPS, tmp_path)
    assert seen["logps"] == pytest.approx(EXPECTED, abs=FLOAT32)
    assert "gradient" not in seen


def test_a_method_outside_of_its_class_that_uses_nothing_of_it_is_called(tmp_path):
    assert ask("logps:idle_logps", LOGPS, tmp_path)["logps"] == pytest.approx(EXPECTED, abs=FLOAT32)


def test_a_default_that_is_overruled_is_said(tmp_path):
    assert ask("logps:batch_logprob", LOGPS, tmp_path)["forced"]["batch_logprob: length_normalize"] == "False"


def test_a_function_that_knows_the_ignored_label_is_not_asked_with_plain_ids_when_it_fails_on_it(tmp_path):
    with pytest.raises(RuntimeError, match="-100"):
        ask("logps:wrong_hundred_logps", LOGPS, tmp_path)


def test_what_was_assumed_about_labels_is_said(tmp_path):
    assert "not moved" in ask("logps:get_batch_logps", LOGPS, tmp_path)["forced"]["get_batch_logps: labels"]
    assert "moved by one" in ask("logps:premoved_logps", LOGPS, tmp_path)["forced"]["premoved_logps: labels"]


def test_scoring_with_the_logits_of_the_same_place_shows(tmp_path):
    seen = ask("logps:wrong_unmoved_logps", LOGPS, tmp_path)
    each = log_probs(LOGPS.table)
    wrong = [sum(each[t, t] for t, c in zip(row.ids, row.completion, strict=True) if c) for row in ROWS]
    assert seen["logps"] == pytest.approx(wrong, abs=FLOAT32)


def test_a_mean_shows_as_the_sum_over_the_count(tmp_path):
    seen = ask("logps:wrong_mean_logp", LOGPS, tmp_path)
    assert seen["logps"] == pytest.approx([EXPECTED[0] / 3, EXPECTED[1] / 2], abs=FLOAT32)


def test_a_late_mask_shows_as_the_first_token_lost_and_a_pad_gained(tmp_path):
    seen = ask("logps:wrong_mask_logp", LOGPS, tmp_path)
    masks = [(0, 0, 0, 1, 1), (0, 0, 1, 1, 0)]
    wrong = [sequence_logp(LOGPS.table, row.ids, mask) for row, mask in zip(ROWS, masks, strict=True)]
    assert seen["logps"] == pytest.approx(wrong, abs=FLOAT32)


@pytest.mark.parametrize("name", ["wrong_all_logp", "wrong_labels_logp", "wrong_attention_logps"])
def test_a_counted_prompt_shows(name, tmp_path):
    seen = ask(f"logps:{name}", LOGPS, tmp_path)
    wrong = [sequence_logp(LOGPS.table, row.ids, row.attention) for row in ROWS]
    assert seen["logps"] == pytest.approx(wrong, abs=FLOAT32)


# -------------------------------------------------------------------------------------------------------------- steps

PAIRS = (Pair((1, 2), (3, 4, 15), (5, 15)), Pair((6,), (7, 15), (8, 10, 11, 15)))
STEP = StepExperiment(table(1), table(2), PAIRS, Objective(beta=0.1), pad=12, eos=15)
LOSS, GRADIENT = dpo_step(STEP)

HONEST_STEPS = [
    "dpo_step", "clears_last_step", "compute_loss", "masks_without_attention_loss", "one_mask_loss", "nested_loss",
    "tensors_loss", "cached_reference_step", "joined_prompt_loss", "Trainer.train_step", "losses_of", "Trainer",
    "full_step", "clipping_step", "Indexed.compute_dpo_loss", "Indexed", "logits_dpo_loss", "moved_logits_dpo_loss",
    "half_logits_dpo_loss", "shared_length_loss",
]  # fmt: skip


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("name", HONEST_STEPS)
def test_an_honest_step_leaves_the_gradient_of_the_paper(name, calls, tmp_path):
    experiment = StepExperiment(**vars(STEP) | {"calls": calls})
    seen = ask(f"steps:{name}", experiment, tmp_path)
    assert seen["capabilities"] == ["step"]
    assert seen["loss"] == pytest.approx(LOSS, abs=FLOAT32)
    assert seen["gradient"] == pytest.approx(GRADIENT, abs=FLOAT32)
    assert seen["spies"]["policy"]["changed"] == []
    assert seen["reference_gradient"] == 0


def test_gradients_that_are_never_cleared_show_in_the_second_call(tmp_path):
    once = ask("steps:wrong_never_clears", STEP, tmp_path / "once")
    twice = ask("steps:wrong_never_clears", StepExperiment(**vars(STEP) | {"calls": 2}), tmp_path / "twice")
    assert once["gradient"] == pytest.approx(GRADIENT, abs=FLOAT32)
    assert twice["gradient"] == pytest.approx(2 * GRADIENT, abs=FLOAT32)


def test_a_policy_that_is_its_own_reference_shows_as_log_two(tmp_path):
    assert ask("steps:wrong_live_reference_step", STEP, tmp_path)["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_one_prompt_length_for_a_pair_has_no_meaning_under_left_padding(tmp_path):
    with pytest.raises(Unsupported, match="one prompt length for both completions"):
        ask("steps:shared_length_loss", StepExperiment(**vars(STEP) | {"padding": "left"}), tmp_path)


def test_a_loss_of_logits_that_takes_the_policy_for_the_reference_shows(tmp_path):
    assert abs(ask("steps:wrong_logits_dpo_loss", STEP, tmp_path)["loss"] - LOSS) > 0.01


def test_a_sum_over_pairs_shows_in_the_gradient(tmp_path):
    seen = ask("steps:wrong_sum_loss", STEP, tmp_path)
    assert seen["gradient"] == pytest.approx(2 * GRADIENT, abs=FLOAT32)


def test_metrics_with_clear_names_come_back_under_common_ones(tmp_path):
    assert ask("steps:Trainer.train_step", STEP, tmp_path)["metrics"] == {"rewards/chosen": 1.5}
    assert ask("steps:clears_last_step", STEP, tmp_path / "2")["metrics"] == {"rewards/chosen": 0.25}


def test_a_step_is_told_beta_or_its_module_is(tmp_path):
    for name in ("dpo_step", "clears_last_step", "Trainer.train_step"):
        other = StepExperiment(**vars(STEP) | {"objective": Objective(beta=0.4)})
        seen = ask(f"steps:{name}", other, tmp_path / name)
        assert seen["loss"] == pytest.approx(dpo_step(other)[0], abs=FLOAT32)


def test_a_step_that_cannot_smooth_says_so(tmp_path):
    with pytest.raises(Unsupported, match="label_smoothing: dpo_step has no such parameter"):
        ask("steps:dpo_step", StepExperiment(**vars(STEP) | {"objective": Objective(label_smoothing=0.1)}), tmp_path)


def test_a_clipping_that_acts_is_in_units_of_logits(tmp_path):
    seen = ask("steps:tight_clipping_step", STEP, tmp_path)
    norm = np.sqrt((GRADIENT**2).sum())
    assert norm > 0.01
    assert seen["gradient"] == pytest.approx(GRADIENT * 0.01 / norm, abs=FLOAT32)
