"""Is a step the step of the whole window, and does a run do what its config says?

Run alone: pytest tests/reference/test_trainer_step.py
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy
import pytest
import torch
import transformers
from trainer_tiny import gpt2, llama, numbers, pairs, same_bits, state

from reference_impl import TrainConfig, train
from reference_impl.objectives import OBJECTIVES
from reference_impl.training import TrainingError

SGD = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant", "clip_norm": None, "dtype": "fp64"}


def run(model: torch.nn.Module, data: Any, eval_rows: Any = None, reference: Any = None, **settings: Any) -> Any:
    return train(
        TrainConfig(**{**SGD, "steps": 1, **settings}),
        model=model,
        train_rows=data,
        eval_rows=eval_rows,
        reference=reference,
    )


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name in left:
        # Float64 sums of a few thousand products, taken in another order: 1e3 × 2e-16 relative to values of order 1.
        torch.testing.assert_close(left[name], right[name], rtol=1e-12, atol=1e-12, msg=name)


def plain_logp(model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    row = [*prompt, *completion]
    table = torch.log_softmax(model(input_ids=torch.tensor([row]), use_cache=False).logits[0], -1)
    return sum(table[t - 1, row[t]] for t in range(len(prompt), len(row)))


def plain_loss(policy: torch.nn.Module, reference: torch.nn.Module, data: Any, beta: float) -> torch.Tensor:
    """Eq. 7 written again, one unpadded pair at a time."""
    total = 0.0
    for pair in data:
        with torch.no_grad():
            ref_w, ref_l = (plain_logp(reference, pair.prompt, y) for y in (pair.chosen, pair.rejected))
        w, l = (plain_logp(policy, pair.prompt, y) for y in (pair.chosen, pair.rejected))
        total = total - torch.nn.functional.logsigmoid(beta * ((w - ref_w) - (l - ref_l)))
    return total / len(data)


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_run_equals_a_loop_written_again(clip_norm: float | None) -> None:
    """Three SGD steps with momentum on another reference, clipped or not, against autograd on unpadded rows."""
    data, momentum, rate = pairs(12), 0.9, 0.1
    policy, twin, reference = gpt2(0), gpt2(0), gpt2(1)
    settings = {"steps": 3, "batch": 3, "accumulation": 2, "shuffle": False, "momentum": momentum, "beta": 0.3}
    result = run(policy, data, reference=reference, clip_norm=clip_norm, **settings)
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step, window in enumerate((data[:6], data[6:], data[:6])):
        twin.zero_grad()
        loss = plain_loss(twin, reference, window, 0.3)
        loss.backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in twin.parameters()))
        scale = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
        metrics = result.history[step]["metrics"]
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-12)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-12)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                velocity[name] = momentum * velocity[name] + scale * p.grad
                p -= rate * velocity[name]
    close(state(policy), state(twin))


def test_first_adamw_step_is_the_sign_of_the_gradient_and_decay_is_decoupled() -> None:
    # At step 1 the bias-corrected moments are g and g²: θ₁ = θ₀ (1 − η λ) − η g / (|g| + ε).
    data, policy, twin = pairs(4), gpt2(0), gpt2(0)
    plain_loss(twin, gpt2(1), data, 0.1).backward()
    settings = {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "epsilon": 1e-4}
    run(policy, data, reference=gpt2(1), **settings)
    for name, p in twin.named_parameters():
        expected = p.data * (1 - 0.01 * 0.1) - 0.01 * p.grad / (p.grad.abs() + 1e-4)
        torch.testing.assert_close(policy.get_parameter(name).data, expected, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("batch", "accumulation"), [(3, 3), (2, 4), (1, 7), (5, 2)])
def test_any_split_of_seven_pairs_equals_one_batch(objective: str, batch: int, accumulation: int) -> None:
    """Uneven windows: parts of 3, 3, 1 or 5, 2 pairs with ragged rows, with an SFT term, two steps."""
    extra = {"objective": objective, "sft_weight": 0.5, "steps": 2}
    if objective in ("cdpo", "robust"):
        extra["label_smoothing"] = 0.1
    reference = gpt2(1) if OBJECTIVES[objective].reference else None
    whole, split = gpt2(0), gpt2(0)
    one = run(whole, pairs(7), reference=reference, batch=7, **extra)
    other = run(split, pairs(7), reference=reference, batch=batch, accumulation=accumulation, **extra)
    close(state(whole), state(split))
    for a, b in zip(numbers(one.history), numbers(other.history), strict=True):
        assert a[2] == pytest.approx(b[2], rel=1e-11, abs=1e-12)


def test_short_last_step_of_an_epoch_is_the_mean_over_its_own_pairs() -> None:
    data, policy, twin = pairs(5), gpt2(0), gpt2(0)
    result = run(policy, data, reference=gpt2(1), batch=2, accumulation=2, epochs=1, steps=None, shuffle=False)
    assert [row["metrics"]["pairs"] for row in result.history if row["split"] == "train"] == [4.0, 1.0]
    for window in (data[:4], data[4:]):
        twin.zero_grad()
        plain_loss(twin, gpt2(1), window, 0.1).backward()
        with torch.no_grad():
            for p in twin.parameters():
                p -= 0.1 * p.grad
    close(state(policy), state(twin))


def test_short_last_step_can_be_dropped() -> None:
    result = run(gpt2(), pairs(5), batch=2, epochs=2, steps=None, last_step="drop")
    assert [row["metrics"]["pairs"] for row in result.history if row["split"] == "train"] == [2.0] * 4


def test_first_step_has_loss_log_two_with_the_policy_as_it_was_passed() -> None:
    """The policy is edited in memory and saved nowhere: the reference is this one, not one read from a disk."""
    model = llama()
    model.config._name_or_path = "/nowhere"
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    result = run(model, pairs(6), dtype="fp32", batch=6)
    metrics = result.history[0]["metrics"]
    assert metrics["loss"] == pytest.approx(math.log(2), abs=2**-24)
    assert metrics["rewards/chosen"] == 0.0
    assert metrics["kl/k1"] == 0.0


def test_reference_passed_is_neither_trained_nor_changed_nor_left_frozen() -> None:
    reference = gpt2(1)
    reference.train()
    before = state(reference)
    run(gpt2(0), pairs(8), reference=reference, steps=3)
    assert same_bits(before, state(reference))
    assert reference.training
    assert all(p.requires_grad and p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("shared", ["the same object", "shared weights"])
def test_policy_given_as_its_own_reference_is_copied(shared: str) -> None:
    """A reference that moved along would keep the loss at log 2 for ever."""
    policy, expected = gpt2(0), gpt2(0)
    reference = policy
    if shared == "shared weights":
        reference = gpt2(1)
        for name, p in policy.named_parameters():
            reference.get_parameter(name).data = p.data
    result = run(policy, pairs(6), reference=reference, steps=3, batch=6)
    plain = run(expected, pairs(6), steps=3, batch=6)
    assert numbers(result.history) == numbers(plain.history)
    assert result.history[2]["metrics"]["loss"] < 0.69


def test_reference_copy_does_not_follow_a_policy_whose_forward_is_replaced() -> None:
    policy = gpt2(0)
    original = policy.forward
    policy.forward = lambda *args, **kwargs: original(*args, **kwargs)
    result = run(policy, pairs(6), steps=3, batch=6)
    assert result.history[2]["metrics"]["loss"] < 0.69


def test_same_config_gives_the_same_bits_and_another_seed_another_order() -> None:
    models = [llama() for _ in range(3)]
    histories = [
        run(model, pairs(9), dtype="fp32", batch=2, steps=7, optimizer="adamw", seed=seed).history
        for model, seed in zip(models, (5, 5, 6), strict=True)
    ]
    assert same_bits(state(models[0]), state(models[1]))
    assert numbers(histories[0]) == numbers(histories[1])
    assert numbers(histories[0]) != numbers(histories[2])


def test_run_leaves_the_callers_generators_alone() -> None:
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    run(llama(), pairs(4), eval_rows=pairs(2), dtype="fp32")
    torch.manual_seed(3)  # llama() seeds too
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == numpy.random.get_state()[1]).all()


def test_evaluation_does_not_change_training() -> None:
    quiet, watched = llama(), llama()
    run(quiet, pairs(8), dtype="fp32", batch=2, steps=4)
    run(watched, pairs(8), dtype="fp32", batch=2, steps=4, eval_rows={"a": pairs(5, 1), "b": pairs(3, 2)}, eval_every=1)
    assert same_bits(state(quiet), state(watched))


def test_evaluation_does_not_depend_on_its_batches() -> None:
    """Five pairs in batches of 1, 2, 3 and 5; a mean of batch means would differ in the first digit."""
    results = [
        run(gpt2(0), pairs(4), reference=gpt2(1), eval_rows={"held": pairs(5, 1)}, eval_batch=size).history
        for size in (1, 2, 3, 5)
    ]
    for history in results[1:]:
        for (_, split, first), (_, _, other) in zip(numbers(results[0]), numbers(history), strict=True):
            assert first == pytest.approx(other, rel=1e-11, abs=1e-12), split


def test_evaluation_rows_come_before_between_and_after_the_steps() -> None:
    history = run(llama(), pairs(8), eval_rows={"a": pairs(3), "b": pairs(2)}, steps=5, eval_every=2).history
    assert [(r["step"], r["split"]) for r in history if r["split"] in ("a", "b")] == [
        (step, name) for step in (0, 2, 4, 5) for name in ("a", "b")
    ]
    assert history[-1]["split"] == "summary"


def test_evaluation_at_the_start_can_be_left_out() -> None:
    history = run(llama(), pairs(4), eval_rows={"a": pairs(3)}, steps=2, eval_at_start=False).history
    assert [r["step"] for r in history if r["split"] == "a"] == [2]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: llama(attention_dropout=0.5), ["attention_dropout"]),
        (lambda: gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), ["resid_pdrop", "embd_pdrop", "attn_pdrop"]),
    ],
)
def test_dropout_is_off_while_training_and_back_afterwards(model: Any, names: list[str]) -> None:
    dropping, still = model(), model()
    for name in names:
        setattr(still.config, name, 0.0)
    still = type(still)(still.config).to(next(dropping.parameters()).dtype)
    still.load_state_dict(dropping.state_dict())
    first, second = (run(m, pairs(8), steps=3, batch=4) for m in (dropping, still))
    assert numbers(first.history) == numbers(second.history)
    assert first.history[0]["metrics"]["loss"] == pytest.approx(math.log(2), abs=1e-15)
    assert [getattr(dropping.config, name) for name in names] == [0.5] * len(names)
    dropping.train()
    ids = torch.arange(12).unsqueeze(0)
    assert not torch.equal(dropping(ids).logits, dropping(ids).logits)  # it would drop again


def test_functional_dropout_and_dropped_layers_are_off() -> None:
    """OPT drops by function, with probabilities kept as attributes, and drops whole layers."""
    settings = {"vocab_size": 32, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    settings |= {"word_embed_proj_dim": 16, "max_position_embeddings": 64}
    dropping = {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5, "layerdrop": 0.5}
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**settings, **dropping))
    result = run(model, pairs(6), steps=2, batch=6)
    assert result.history[0]["metrics"]["loss"] == pytest.approx(math.log(2), abs=1e-15)


def test_modes_and_flags_of_a_live_model_come_back() -> None:
    model = llama()
    model.eval()
    model.model.layers[0].train()
    modes = [m.training for m in model.modules()]
    result = run(model, pairs(4), gradient_checkpointing=True)
    assert result.model is model
    assert [m.training for m in model.modules()] == modes
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_gradient_checkpointing_changes_no_bit() -> None:
    with_it, without = gpt2(), gpt2()
    run(with_it, pairs(6), steps=3, batch=3, gradient_checkpointing=True)
    run(without, pairs(6), steps=3, batch=3)
    assert same_bits(state(with_it), state(without))


def test_bf16_keeps_float32_weights_and_starts_at_log_two() -> None:
    model = llama(dtype=torch.bfloat16)
    result = run(model, pairs(6), dtype="bf16", steps=2, batch=6, optimizer="adamw", learning_rate=1e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.history[0]["metrics"]["loss"] == pytest.approx(math.log(2), abs=2**-24)
    assert result.history[1]["metrics"]["loss"] < 0.693


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns(objective: str) -> None:
    extra = {"label_smoothing": 0.1} if objective in ("cdpo", "robust") else {}
    extra |= {"gamma": 0.5} if objective == "simpo" else {}
    result = run(gpt2(), pairs(6), steps=20, batch=6, optimizer="adamw", objective=objective, beta=0.5, **extra)
    first, last = (result.history[i]["metrics"] for i in (0, 19))
    assert last["loss"] < first["loss"] - 0.1
    assert last["rewards/margins"] > first["rewards/margins"]


def test_nan_stops_the_run_names_the_rows_and_leaves_the_weights() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[5] = 3e38  # finite, but the logits overflow
    before = state(model)
    with pytest.raises(TrainingError, match=r"step 1: loss is nan.*Rows of the step: \[1, 4"):
        run(model, pairs(4, longest=3), dtype="fp32", batch=4, shuffle=False)
    assert same_bits(before, state(model))


def test_tokens_and_pairs_are_counted() -> None:
    data = pairs(5)
    history = run(llama(), data, batch=2, epochs=1, steps=None).history
    tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in data)
    assert history[-1]["metrics"]["tokens"] == tokens
    assert history[-1]["metrics"]["pairs"] == 5.0
    assert sum(r["metrics"]["tokens"] for r in history if r["split"] == "train") == tokens


def test_summary_loss_is_the_mean_over_pairs_not_over_steps() -> None:
    history = run(gpt2(0), pairs(5), reference=gpt2(1), batch=4, epochs=1, steps=None).history
    four, one = (r["metrics"]["loss"] for r in history if r["split"] == "train")
    assert history[-1]["metrics"]["loss"] == pytest.approx((4 * four + one) / 5, rel=1e-14)
