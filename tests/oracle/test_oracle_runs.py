"""Does the oracle's replay do what SGD does?  Judged by replays whose gradients are finite differences of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from oracle_scenes import HELD_OUT, ROWS, SIZE, TOKENIZER, table, train

from dpocheck.experiment import Body, Lora, Objective, Pair, Recipe, Sequence, TrainExperiment
from dpocheck.oracle import PAPER, predict, tokenise
from dpocheck.oracle.schedule import plan, weights

OBJECTIVE = Objective(beta=0.5)


def recipe(**changes) -> Recipe:
    return Recipe(**({"objective": OBJECTIVE, "learning_rate": 4.0, "batch": 5, "dtype": "float64"} | changes))


def pair_loss(logits: np.ndarray, reference: np.ndarray, pair: Pair) -> float:
    """From the definition: -log sigma(beta h)."""

    def logp(z: np.ndarray, completion: tuple[int, ...]) -> float:
        contexts = (pair.prompt[-1], *completion[:-1])
        rows = z[list(contexts)]
        return float((rows[range(len(contexts)), list(completion)] - np.log(np.exp(rows).sum(axis=1))).sum())

    h = [logp(logits, y) - logp(reference, y) for y in (pair.chosen, pair.rejected)]
    return float(np.log1p(np.exp(-0.5 * (h[0] - h[1]))))


def difference(loss: Callable[[np.ndarray], float], logits: np.ndarray) -> np.ndarray:
    """The gradient by central differences; error about 1e-9."""
    gradient, step = np.zeros_like(logits), 2.0**-13
    for cell in np.ndindex(logits.shape):
        moved = logits.copy()
        moved[cell] += step
        up = loss(moved)
        moved[cell] -= 2 * step
        gradient[cell] = (up - loss(moved)) / (2 * step)
    return gradient


def brute(experiment: TrainExperiment, windows: list[list[tuple[int, ...]]], rates: list[float]) -> np.ndarray:
    """SGD with torch's momentum on the mean over micro-batches of the mean over pairs."""
    settings, pairs = experiment.recipe, tokenise(experiment)
    logits, reference = experiment.policy.logits(), experiment.reference.logits()
    buffer = None
    for window, rate in zip(windows, rates, strict=True):

        def loss(z: np.ndarray, window=window) -> float:
            return np.mean([np.mean([pair_loss(z, reference, pairs[i]) for i in batch]) for batch in window])

        gradient = difference(loss, logits)
        norm = np.sqrt((gradient**2).sum())
        if settings.clip_norm is not None and norm > settings.clip_norm:
            gradient = gradient * settings.clip_norm / norm
        buffer = gradient if buffer is None else settings.momentum * buffer + gradient
        logits = logits * (1 - rate * settings.weight_decay) - rate * buffer
    return logits


ALL = (0, 1, 2, 3, 4)
SCENES = [
    ({"steps": 2}, [[ALL]] * 2, [4.0] * 2),
    ({"steps": 3, "momentum": 0.5}, [[ALL]] * 3, [4.0] * 3),
    ({"steps": 2, "weight_decay": 0.01}, [[ALL]] * 2, [4.0] * 2),
    ({"steps": 2, "clip_norm": 0.03}, [[ALL]] * 2, [4.0] * 2),
    ({"batch": 2, "accumulation": 3, "steps": 1}, [[(0, 1), (2, 3), (4,)]], [4.0]),
    ({"batch": 2, "accumulation": 2, "steps": None, "epochs": 1}, [[(0, 1), (2, 3)], [(4,)]], [4.0] * 2),
    ({"batch": 2, "steps": 4}, [[(0, 1)], [(2, 3)], [(4,)], [(0, 1)]], [4.0] * 4),
    ({"batch": 2, "steps": 3, "drop_last": True}, [[(0, 1)], [(2, 3)], [(0, 1)]], [4.0] * 3),
    ({"steps": 4, "schedule": "linear", "warmup_steps": 2}, [[ALL]] * 4, [2.0, 4.0, 4.0, 2.0]),
    ({"steps": 2, "schedule": "cosine"}, [[ALL]] * 2, [4.0, 2.0]),
    ({"batch": 1, "world_size": 2, "steps": 2}, [[(0,), (1,)], [(2,), (3,)]], [4.0] * 2),
]


@pytest.mark.parametrize(("changes", "windows", "rates"), SCENES, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_the_replay_is_sgd_by_finite_differences(changes, windows, rates):
    experiment = train(recipe(**changes))
    expected = brute(experiment, windows, rates)
    # each step adds rate * 1e-9 per cell, and maps what is there by a factor of order 1
    assert predict(experiment).logits == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize(("theory", "rates"), [
    ({"first_rate": "zero"}, [0.0, 2.0, 4.0]), ({"first_rate": "skipped"}, [4.0, 3.0, 2.0]),
    ({"schedule": "constant"}, [2.0, 4.0, 4.0]),
])  # fmt: skip
def test_learning_rates_by_hand(theory, rates):
    # warm-up of two steps, then a line from 4 down to 0 at step 4
    settings = recipe(steps=4, schedule="linear", warmup_steps=2)
    history = predict(train(settings), PAPER.but(**theory)).history
    assert [entry["metrics"]["learning_rate"] for entry in history][:3] == rates


def test_one_step_reads_the_gradient():
    experiment = train(recipe(weight_decay=0.01))
    seen = predict(experiment)
    read = (experiment.policy.logits() - seen.logits) / 4.0
    assert seen.gradient == pytest.approx(read, abs=1e-15)


def test_a_glass_run_is_sgd_on_the_table_and_the_block():
    # two steps: the second sees the block that the first has moved.  Judged by the loss of a linear model of shares.
    experiment = train(recipe(steps=2), rows=ROWS[:2], body=Body("glass"))
    pairs, reference = tokenise(experiment), experiment.reference.logits()

    def loss(parameters: np.ndarray) -> float:
        table_, block = parameters[:SIZE], parameters[SIZE:]

        def logp(z: np.ndarray, extra: np.ndarray, prompt: tuple, completion: tuple) -> float:
            ids, total = prompt + completion, 0.0
            for t in range(len(prompt), len(ids)):
                shares = np.bincount(ids[:t], minlength=SIZE) / t
                row = z[ids[t - 1]] + shares @ extra
                total += row[ids[t]] - np.log(np.exp(row).sum())
            return total

        losses = []
        for pair in pairs:
            h = [logp(table_, block, pair.prompt, y) - logp(reference, 0 * block, pair.prompt, y)
                 for y in (pair.chosen, pair.rejected)]  # fmt: skip
            losses.append(np.log1p(np.exp(-0.5 * (h[0] - h[1]))))
        return float(np.mean(losses))

    parameters = np.concatenate([experiment.policy.logits(), np.zeros((SIZE, SIZE))])
    for _ in range(2):
        parameters = parameters - 4.0 * difference(loss, parameters)
    assert predict(experiment).logits == pytest.approx(parameters[:SIZE], abs=2e-7)


def test_the_reference_defaults_to_the_policy_in_memory():
    absent = train(reference=None, edited=table(3))
    given = train(reference=table(1), edited=table(3))
    assert predict(absent).history == predict(given).history
    on_disk = predict(absent, PAPER.but(reference="disk"))
    assert on_disk.history == predict(train(reference=table(3))).history


def test_one_full_batch_is_the_accumulated_micro_batches():
    rows = ROWS[:4]
    whole = predict(train(recipe(batch=4), rows=rows))
    parts = predict(train(recipe(batch=1, accumulation=4), rows=rows))
    assert parts.logits == pytest.approx(whole.logits, abs=1e-14)
    assert parts.history[0]["metrics"] == pytest.approx(whole.history[0]["metrics"], abs=1e-14)


def test_uneven_windows_weigh_micro_batches_or_pairs():
    experiment = train(recipe(batch=2, accumulation=3))
    by_pairs = predict(experiment, PAPER.but(uneven="pairs"))
    assert by_pairs.gradient == pytest.approx(predict(train(recipe(batch=5))).gradient, abs=1e-15)
    single = [predict(train(recipe(batch=1), rows=(row,))).gradient for row in ROWS]
    weights = [1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 3]
    expected = sum(w * g for w, g in zip(weights, single, strict=True))
    assert predict(experiment).gradient == pytest.approx(expected, abs=1e-15)


def test_a_lost_division_multiplies_by_the_number_of_micro_batches():
    experiment = train(recipe(batch=1, accumulation=4), rows=ROWS[:4])
    paper = predict(experiment).gradient
    assert predict(experiment, PAPER.but(accumulation="sum")).gradient == pytest.approx(4 * paper, abs=1e-14)
    assert predict(experiment, PAPER.but(accumulation="twice")).gradient == pytest.approx(paper / 4, abs=1e-14)


def test_evaluation_is_a_mean_over_pairs():
    held = (("held", HELD_OUT),)
    seen = predict(train(recipe(learning_rate=0.0, eval_batch=2), evaluation=held))
    entry = next(e for e in seen.history if e["split"] == "held")
    alone = [predict(train(recipe(learning_rate=0.0), rows=(row,))).history[0]["metrics"] for row in HELD_OUT]
    for name, value in entry["metrics"].items():
        assert value == pytest.approx(np.mean([metrics[name] for metrics in alone]), abs=1e-14)
    batches = predict(train(recipe(learning_rate=0.0, eval_batch=2), evaluation=held), PAPER.but(eval_loss="batches"))
    uneven = (alone[0]["loss"] + alone[1]["loss"]) / 4 + alone[2]["loss"] / 2
    assert batches.history[1]["metrics"]["loss"] == pytest.approx(uneven, abs=1e-14)


def test_evaluations_and_checkpoints_are_where_they_were_asked_for():
    settings = recipe(steps=5, eval_every=2, save_every=2)
    seen = predict(train(settings, evaluation=(("held", HELD_OUT),)))
    assert [e["step"] for e in seen.history if e["split"] == "held"] == [2, 4, 5]
    assert sorted(seen.saved) == [2, 4]
    shorter = predict(train(recipe(steps=4)))
    assert np.array_equal(seen.saved[4], shorter.logits)


def test_shuffled_rows_are_predicted_where_their_order_does_not_matter():
    ordered, shuffled = (predict(train(recipe(steps=2, shuffle=s))) for s in (False, True))
    assert np.array_equal(ordered.logits, shuffled.logits)
    unknown = predict(train(recipe(batch=2, steps=2, shuffle=True)))
    assert unknown.logits is None
    assert [entry["metrics"] for entry in unknown.history] == [{"learning_rate": 4.0}] * 2


def test_other_optimizers_determine_the_first_step_of_the_history_alone():
    for settings in (recipe(optimizer="adamw", steps=2), recipe(steps=2, lora=Lora(2, 4.0, ("lm_head",)))):
        seen = predict(train(settings))
        assert seen.logits is None
        assert seen.gradient is None
        first, second = (entry["metrics"] for entry in seen.history)
        sgd = predict(train(recipe(steps=2))).history[0]["metrics"]
        assert {name: sgd[name] for name in first} == first
        assert set(second) == {"learning_rate"}


def test_a_resumed_run_ends_where_the_uninterrupted_one_does():
    settings = recipe(batch=2, steps=5, momentum=0.5, schedule="linear", save_every=3)
    whole = train(settings, evaluation=(("held", HELD_OUT),))
    resumed = replace(whole, recipe=replace(settings, resume_from=3))
    first, second = predict(Sequence((whole, resumed))).runs
    assert np.array_equal(first.logits, second.logits)
    assert second.history == tuple(entry for entry in first.history if entry["step"] > 3)
    assert predict(resumed).logits is None  # on its own it has nothing to resume


@pytest.mark.parametrize(
    "resume", ["data-restarts", "schedule-restarts", "momentum-lost", "reference-from-checkpoint", "skips-batch"]
)
def test_a_resumed_run_that_forgets_something_ends_elsewhere(resume):
    settings = recipe(batch=2, steps=5, momentum=0.5, schedule="linear", save_every=2)
    whole = train(settings)
    runs = Sequence((whole, replace(whole, recipe=replace(settings, resume_from=2))))
    paper, wrong = predict(runs).runs, predict(runs, PAPER.but(resume=resume)).runs
    assert np.array_equal(paper[0].logits, wrong[0].logits)
    assert np.max(np.abs(paper[1].logits - wrong[1].logits)) > 1e-3


def test_a_resumed_run_with_the_checkpoint_as_reference_starts_at_log_2():
    settings = recipe(steps=4, save_every=2)
    runs = Sequence((train(settings), train(replace(settings, resume_from=2))))
    wrong = predict(runs, PAPER.but(resume="reference-from-checkpoint")).runs[1]
    assert wrong.history[0]["metrics"]["loss"] == pytest.approx(np.log(2), abs=1e-15)


def test_a_speaking_model_that_is_its_own_reference_starts_at_log_2():
    speaking = TrainExperiment(None, None, TOKENIZER, ROWS, recipe(), body=Body("speaking"))
    assert predict(speaking).history[0]["metrics"]["loss"] == pytest.approx(np.log(2), abs=1e-16)
    assert predict(speaking).logits is None
    smoothed = replace(speaking, recipe=recipe(objective=Objective("ipo", 0.5)))
    assert predict(smoothed).history[0]["metrics"]["loss"] == 1.0  # (1 / (2 * 0.5))^2


def test_the_logits_of_a_node_keep_their_sum_under_sgd():
    # T5.3: each log-softmax gradient sums to 0 over the targets
    experiment = train(recipe(steps=20))
    drift = predict(experiment).logits.sum(axis=1) - experiment.policy.logits().sum(axis=1)
    assert np.max(np.abs(drift)) < 1e-12


def test_weight_decay_and_momentum_in_their_orders():
    # decoupled: logits *= 1 - rate wd; coupled: wd * logits joins the gradient and the buffer.  The same without
    # momentum, up to rounding; with the norm decayed too, twice the factor at the first step
    settings = recipe(steps=2, weight_decay=0.01)
    one, other = (predict(train(settings), PAPER.but(decay=d)).logits for d in ("decoupled", "coupled"))
    assert one == pytest.approx(other, abs=1e-14)
    still = recipe(steps=1, weight_decay=0.01, objective=Objective(beta=1e-9))
    start = train(still).policy.logits()
    assert predict(train(still), PAPER.but(decay="all")).logits == pytest.approx(start * 0.96**2, abs=1e-8)


@pytest.mark.parametrize(("rule", "due"), [
    ("stepped", ["01", "2", "01", "2"]), ("dropped", ["01", "01"]), ("carried", ["01", "201"]),
])  # fmt: skip
def test_windows_at_the_end_of_an_epoch(rule, due):
    # three micro-batches of one pair in windows of two, twice over
    recipe = Recipe(batch=1, accumulation=2, steps=None, epochs=2)
    theory = PAPER.but(incomplete_window=rule)
    found = plan(3, recipe, theory)
    told = ["".join(str(i) for batch in found.window(n) for i in batch) for n in range(found.steps)]
    assert told == due
    shares = [weights(found.window(n), found, theory) for n in range(found.steps)]
    assert [sum(share) for share in shares] == ([1.0, 1.5] if rule == "carried" else [1.0] * len(due))
    first = plan(3, replace(recipe, steps=2, epochs=None), theory)
    assert [first.window(n) for n in range(2)] == [found.window(n) for n in range(2)]
