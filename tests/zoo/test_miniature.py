"""Does the miniature compute DPO?  Against direct formulas, and against itself run another way."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from zoo_tiny import CHAT, ROWS, model, pair_batch, probe, tokenizer

from dpocheck.adapter import TokenBatch, Unsupported
from dpocheck.experiment import Lora, Objective, Recipe
from dpocheck.miniature import MINIATURE, batches_of, render, tokenize, truncate

SGD = Recipe(objective=Objective(beta=0.5), learning_rate=0.05, batch=2, steps=3)


def weights(policy):
    return torch.cat([p.detach().double().reshape(-1) for p in policy.parameters()])


def trained(tmp_path, recipe, name="run", rows=None, **kwargs):
    out = MINIATURE.train(probe(tmp_path / "probe", **kwargs), rows or {"train": ROWS}, recipe, tmp_path / name)
    return out, weights(out.policy)


def direct_logp(policy, ids, start):
    """Sum over completion tokens, one unpadded row at a time, by hand."""
    logits = policy(torch.tensor([ids])).logits[0].double()
    return sum(logits[t - 1, ids[t]] - logits[t - 1].logsumexp(0) for t in range(max(start, 1), len(ids)))


@pytest.mark.parametrize("side", ["right", "left"])
def test_sequence_logps_are_sums_over_completion_tokens(side):
    batch, policy = pair_batch(side), model(1)
    found = MINIATURE.sequence_logps(policy, batch)
    for row in range(6):
        real = batch.attention_mask[row].bool()
        ids = batch.input_ids[row][real].tolist()
        start = len(ids) - int(batch.completion_mask[row].sum())
        # 24 * 2^-24 relative: a float32 sum of at most 5 tokens whose softmax has 64 terms
        assert found[row].item() == pytest.approx(direct_logp(policy, ids, start).item(), rel=24 * 2**-24, abs=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_step_leaves_the_gradient_of_equation_7(side):
    batch, policy, reference = pair_batch(side), model(1).double(), model(2).double()
    out = MINIATURE.step(policy, reference, batch, objective=Objective(beta=0.5))
    found = torch.cat([p.grad.reshape(-1) for p in policy.parameters()])
    policy.zero_grad()
    total = 0.0
    for pair in range(3):
        terms = []
        for row in (pair, pair + 3):
            ids = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
            start = len(ids) - int(batch.completion_mask[row].sum())
            terms.append(direct_logp(policy, ids, start) - direct_logp(reference, ids, start).detach())
        total = total - torch.log(torch.sigmoid(0.5 * (terms[0] - terms[1]))) / 3
    total.backward()
    due = torch.cat([p.grad.reshape(-1) for p in policy.parameters()])
    # The norms of a stock Llama compute in float32: 2^-24 relative, a dozen operations deep.
    assert (found - due).abs().max() <= 1e-6 * due.abs().max()
    assert out.loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert all(p.grad is None for p in reference.parameters())


def test_a_reference_that_is_not_given_is_the_policy_as_it_was_passed(tmp_path):
    def edit(policy):
        policy.lm_head.weight.mul_(1.5)

    out, _ = trained(tmp_path, SGD, reference=None, edit=edit)
    assert out.history[0]["metrics"]["loss"] == pytest.approx(math.log(2), abs=2**-23)
    assert out.history[1]["metrics"]["loss"] != pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("objective", "due"),
    [  # lp_w = -3, lp_l = -4, rf_w = -3.5, rf_l = -4.25: h = 0.25; lengths 2 and 4
        (Objective(beta=0.5), math.log1p(math.exp(-0.125))),
        (
            Objective(beta=0.5, label_smoothing=0.1),
            0.9 * math.log1p(math.exp(-0.125)) + 0.1 * math.log1p(math.exp(0.125)),
        ),
        (
            Objective(kind="robust", beta=0.5, label_smoothing=0.1),
            (0.9 * math.log1p(math.exp(-0.125)) - 0.1 * math.log1p(math.exp(0.125))) / 0.8,
        ),
        (Objective(kind="hinge", beta=0.5), 1 - 0.125),
        (Objective(kind="ipo", beta=0.5), (0.25 - 1) ** 2),
        # u_w = e^0.5, u_l = e^0.25
        (Objective(kind="forward_kl", beta=0.5), math.log1p(math.exp(-0.5 * (math.exp(-0.25) - math.exp(-0.5))))),
        (
            Objective(kind="js_divergence", beta=0.5),
            math.log1p(math.sqrt((1 + math.exp(-0.5)) / (1 + math.exp(-0.25)))),
        ),
        (
            Objective(kind="alpha_divergence", beta=0.5, alpha=0.25),
            math.log1p(math.exp(-2 * (math.exp(-0.0625) - math.exp(-0.125)))),
        ),
        (Objective(kind="simpo", beta=2.0, gamma=0.25), math.log1p(math.exp(-(2 * (-1.5 + 1.0) - 0.25)))),
        (Objective(beta=0.5, length_normalised=True), math.log1p(math.exp(-0.5 * (0.25 - 0.0625)))),
        (Objective(beta=0.5, sft_weight=2.0), math.log1p(math.exp(-0.125)) + 2 * 1.5),
    ],
)  # fmt: skip
def test_each_objective_has_its_source_value(objective, due):
    four = [torch.tensor([value], dtype=torch.float64) for value in (-3.0, -4.0, -3.5, -4.25)]
    out = MINIATURE.loss(*four, objective=objective, lengths=(torch.tensor([2]), torch.tensor([4])))
    assert out.loss.item() == pytest.approx(due, rel=1e-14)


@pytest.mark.parametrize("objective", [Objective(kind="ipo", label_smoothing=0.1), Objective(gamma=0.5)])
def test_an_option_that_would_do_nothing_is_refused(objective):
    with pytest.raises(Unsupported):
        MINIATURE.loss(*torch.zeros(4, 1), objective=objective)


def test_a_window_is_the_same_however_it_is_split(tmp_path):
    whole, _ = trained(tmp_path, replace(SGD, batch=7, steps=1), "a")
    _, whole_weights = trained(tmp_path, replace(SGD, batch=7, steps=1), "a")
    split, split_weights = trained(tmp_path, replace(SGD, batch=3, accumulation=3, steps=1), "b")
    move = (whole_weights - weights(model(1))).abs().max()
    assert move > 1e-3
    assert (whole_weights - split_weights).abs().max() <= 1e-5 * move + 2**-22
    for name, value in whole.history[0]["metrics"].items():
        assert split.history[0]["metrics"][name] == pytest.approx(value, rel=1e-5)


def test_several_processes_are_refused_where_there_is_one(tmp_path):
    with pytest.raises(ValueError, match="asks for 2 processes and this is one of 1: start it with torchrun"):
        trained(tmp_path, replace(SGD, world_size=2))


@pytest.mark.parametrize("optimizer", [{"optimizer": "adamw"}, {"momentum": 0.9}])
@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(tmp_path, optimizer, stop):
    recipe = replace(SGD, steps=6, schedule="cosine", warmup_steps=2, shuffle=True, save_every=1, **optimizer)
    recipe = replace(recipe, precompute_reference=True)
    out, due = trained(tmp_path, recipe)
    again, found = trained(tmp_path, replace(recipe, resume_from=stop))
    assert torch.equal(found, due)
    assert list(again.history) == list(out.history)[stop:]


def test_resuming_without_a_checkpoint_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint-9"):
        trained(tmp_path, replace(SGD, resume_from=9))


def test_a_precomputed_reference_equals_the_one_computed_on_the_way(tmp_path):
    recipe = replace(SGD, shuffle=True, steps=8)
    rows = {"train": ROWS, "held out": ROWS[2:5]}
    online, due = trained(tmp_path, recipe, "a", rows)
    cached, found = trained(tmp_path, replace(recipe, precompute_reference=True), "b", rows)
    assert (found - due).abs().max() <= 1e-5
    for one, other in zip(online.history, cached.history, strict=True):
        assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-5)


def test_a_cache_of_another_reference_is_not_used(tmp_path):
    recipe = replace(SGD, precompute_reference=True)
    MINIATURE.train(probe(tmp_path / "one"), {"train": ROWS}, recipe, tmp_path / "run")
    there = probe(tmp_path / "two", reference=model(5))
    found = MINIATURE.train(there, {"train": ROWS}, recipe, tmp_path / "run")
    fresh = MINIATURE.train(there, {"train": ROWS}, recipe, tmp_path / "other")
    assert torch.equal(weights(found.policy), weights(fresh.policy))


def test_evaluation_does_not_depend_on_its_batch_size_and_touches_nothing(tmp_path):
    rows = {"train": ROWS, "held out": ROWS[:5]}
    plain, due = trained(tmp_path, SGD, "a")
    some = []
    for size in (1, 2, 8):
        out, found = trained(tmp_path, replace(SGD, eval_batch=size, eval_every=1), f"e{size}", rows)
        assert torch.equal(found, due)
        some.append([entry["metrics"] for entry in out.history if entry["split"] == "held out"])
    assert len(some[0]) == 3
    for other in some[1:]:
        for one, two in zip(some[0], other, strict=True):
            assert two == pytest.approx(one, rel=1e-5, abs=1e-6)
    assert len(plain.history) == 3


def test_dropout_in_the_configuration_changes_nothing(tmp_path):
    _, due = trained(tmp_path, SGD, "a")
    _, found = trained(tmp_path / "d", SGD, "a", policy=model(1, dropout=0.5))
    assert torch.equal(found, due)


def test_clipping_scales_the_gradient_to_the_limit(tmp_path):
    one = replace(SGD, steps=1)
    out, free = trained(tmp_path, one, "a")
    norm = out.history[0]["metrics"]["grad_norm"]
    _, clipped = trained(tmp_path, replace(one, clip_norm=norm / 4), "b")
    start = weights(model(1))
    assert (clipped - start).norm() == pytest.approx((free - start).norm().item() / 4, rel=1e-4)
    assert (free - start).norm().item() == pytest.approx(one.learning_rate * norm, rel=1e-4)


def test_the_schedule_is_as_written():
    from dpocheck.miniature import factor

    linear = Recipe(schedule="linear", warmup_steps=2)
    assert [factor(linear, k, 6) for k in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = Recipe(schedule="cosine")
    assert [factor(cosine, k, 4) for k in range(4)] == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    with pytest.raises(Unsupported, match="polynomial"):
        factor(Recipe(schedule="polynomial"), 0, 4)


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own():
    recipe = Recipe(batch=2, accumulation=2, shuffle=True, seed=3)
    epochs = [MINIATURE.order(7, recipe, epoch) for epoch in range(2)]
    for windows in epochs:
        assert sorted(index for window in windows for batch in window for index in batch) == list(range(7))
        assert [[len(batch) for batch in window] for window in windows] == [[2, 2], [2, 1]]
    assert epochs[0] != epochs[1]
    assert epochs[0] == MINIATURE.order(7, recipe, 0)
    dropped = MINIATURE.order(7, replace(recipe, drop_last=True), 0)
    assert [[len(batch) for batch in window] for window in dropped] == [[2, 2], [2]]


def test_a_seed_makes_a_run_repeatable_and_leaves_the_process_alone(tmp_path):
    before = torch.get_rng_state()
    _, one = trained(tmp_path, replace(SGD, shuffle=True), "a")
    _, two = trained(tmp_path, replace(SGD, shuffle=True), "b")
    _, three = trained(tmp_path, replace(SGD, shuffle=True, seed=1), "c")
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(before, torch.get_rng_state())


def test_rows_may_lie_on_disk(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    _, one = trained(tmp_path, SGD, "a")
    _, two = trained(tmp_path, SGD, "b", rows={"train": str(path)})
    assert torch.equal(one, two)


def test_text_is_closed_by_one_end_of_sequence_and_a_template_closes_itself():
    tokens = tokenizer()
    example = tokenize(render(ROWS[0], tokens), tokens, 0)
    assert example.chosen.ids == (1, 2, 3, 4, 5, 62)
    assert example.rejected.ids == (1, 2, 6, 7, 62)
    assert (example.chosen.start, example.rejected.start) == (2, 2)
    closed = {**ROWS[0], "chosen": "w3 </s>"}
    assert tokenize(render(closed, tokens), tokens, 0).chosen.ids == (1, 2, 3, 62)
    chat = tokenize(render(CHAT[0], tokens), tokens, 0)
    assert chat.chosen.ids == (61, 1, 2, 60, 3, 4, 5, 62)
    assert chat.chosen.start == 4


def test_the_tokenizers_own_beginning_of_sequence_stands_once_before_the_prompt():
    tokens = tokenizer(bos=True)
    assert tokenize(render(ROWS[0], tokens), tokens, 0).chosen.ids == (61, 1, 2, 3, 4, 5, 62)
    assert tokenize(render(CHAT[0], tokens), tokens, 0).chosen.ids == (61, 1, 2, 60, 3, 4, 5, 62)


@pytest.mark.parametrize("shape", ["text", "chat"])
def test_a_row_without_prompt_loses_nothing(shape):
    tokens = tokenizer()
    source = ROWS if shape == "text" else CHAT
    for row in source:
        implicit = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
        assert tokenize(render(implicit, tokens), tokens, 0) == tokenize(render(row, tokens), tokens, 0)
    same = {"chosen": "w1 w2", "rejected": "w1 w2"}
    assert tokenize(render(same, tokens), tokens, 0).chosen.ids == (1, 2, 62)
    inside = {"chosen": "w1 w22 w3", "rejected": "w1 w2 w3"}
    example = tokenize(render(inside, tokens), tokens, 0)
    assert (example.chosen.ids, example.rejected.ids) == ((1, 22, 3, 62), (1, 2, 3, 62))
    assert example.chosen.start == example.rejected.start == 1


def test_truncation_keeps_the_side_that_was_asked_for():
    tokens = tokenizer()
    example = tokenize(render(ROWS[0], tokens), tokens, 0)
    start = truncate(example, Recipe(max_length=4, truncation="keep_start"))
    assert (start.chosen.ids, start.chosen.start) == ((1, 2, 3, 4), 2)
    end = truncate(example, Recipe(max_length=4, truncation="keep_end"))
    assert (end.chosen.ids, end.chosen.start) == ((3, 4, 5, 62), 0)
    assert (end.rejected.ids, end.rejected.start) == ((2, 6, 7, 62), 1)
    assert truncate(example, Recipe(max_length=5, truncation="drop")) is None
    assert truncate(example, Recipe(max_length=2)) is None
    assert truncate(example, Recipe(max_length=6, truncation="drop")) is example


def test_lora_moves_only_the_adapter_and_starts_at_log_2(tmp_path):
    recipe = replace(SGD, lora=Lora(4, 8.0, ("q_proj", "lm_head")), learning_rate=1.0, save_every=1)
    out, found = trained(tmp_path, recipe, reference=None)
    assert out.history[0]["metrics"]["loss"] == pytest.approx(math.log(2), abs=2**-23)
    moved = {
        name
        for (name, p), (_, q) in zip(out.policy.named_parameters(), model(1).named_parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved == {"model.layers.0.self_attn.q_proj.weight", "lm_head.weight"}
    _, resumed = trained(tmp_path, replace(recipe, resume_from=2), reference=None)
    assert torch.equal(found, resumed)


def test_nan_and_infinity_at_masked_positions_change_nothing():
    batch = pair_batch()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, batch.input_ids.shape[1], 64, generator=generator, requires_grad=True)
    due = MINIATURE.logps(logits, batch)
    due.sum().backward()
    spoiled = logits.detach().clone()
    spoiled[:, -1] = float("nan")
    spoiled[0, 0] = -math.inf
    spoiled.requires_grad_()
    found = MINIATURE.logps(spoiled, batch)
    found.sum().backward()
    assert torch.equal(found, due)
    assert torch.equal(spoiled.grad, logits.grad)
    assert isinstance(batch, TokenBatch)


def test_pieces_are_consecutive():
    assert batches_of([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
