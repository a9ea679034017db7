"""Do the derived bounds hold for correct trainers, in every usual form, and are they tight enough to see a fault?

The correct trainers are written here in torch, in the arithmetic under test: a table of logits as the only parameter.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_scenes import HELD_OUT, LOSS, PAIRS, step, train

from dpocheck.experiment import LogpExperiment, LossExperiment, Objective, Recipe, Sequence, TokenRow
from dpocheck.oracle import PAPER, predict, tokenise
from dpocheck.oracle.error_step import token_error
from dpocheck.tolerances import ROUNDOFF, bound

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

MARGINS = {
    "differences of models": lambda b, lw, ll, rw, rl: b * ((lw - rw) - (ll - rl)),
    "differences of completions": lambda b, lw, ll, rw, rl: b * ((lw - ll) - (rw - rl)),
    "rewards": lambda b, lw, ll, rw, rl: b * (lw - rw) - b * (ll - rl),
    "chained": lambda b, lw, ll, rw, rl: b * (lw - ll - rw + rl),
}
FORMS = {
    "logsigmoid": lambda m: -F.logsigmoid(m),
    "softplus": lambda m: F.softplus(-m),
    "logaddexp": lambda m: torch.logaddexp(torch.zeros_like(m), -m),
    "cross-entropy": lambda m: F.binary_cross_entropy_with_logits(m, torch.ones_like(m), reduction="none"),
}


def ratio(seen: object, expected: object, limit: object) -> float:
    """The greatest error over its bound; an exact agreement is 0 whatever the bound."""
    error = np.abs(np.asarray(seen, float) - np.asarray(expected, float))
    limit = np.broadcast_to(np.asarray(limit, float), error.shape)
    return float(np.max(np.where(error == 0.0, 0.0, error / np.where(limit > 0.0, limit, 1e-300)), initial=0.0))


scale = st.sampled_from([1.0, 50.0, 2000.0])
number = st.integers(-(2**20), -1).map(lambda i: i / 2**20)
numbers = st.lists(st.tuples(number, number, number, number), min_size=1, max_size=6)


@settings(deadline=None, max_examples=150)
@given(numbers, scale, st.sampled_from([0.01, 0.1, 0.5, 2.0]), st.sampled_from(list(DTYPES)))
def test_correct_losses_are_within_their_bounds(rows, size, beta, dtype):
    columns = tuple(tuple(size * z for z in column) for column in zip(*rows, strict=True))
    experiment = LossExperiment(*columns, Objective(beta=beta), dtype=dtype)
    predicted, u = predict(experiment), ROUNDOFF[dtype]
    for margin in MARGINS.values():
        for form in FORMS.values():
            z = torch.tensor(experiment.arguments(), dtype=DTYPES[dtype], requires_grad=True)
            per_pair = form(margin(beta, *z))
            reduced = per_pair.mean()
            reduced.backward()
            for name, seen in (("per_pair", per_pair), ("reduced", reduced), ("slopes", z.grad)):
                limit = bound(experiment, name, predicted, u)
                assert ratio(seen.detach().double().numpy(), getattr(predicted, name), limit) <= 1.0


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("objective", [
    Objective(beta=0.3, label_smoothing=0.1), Objective("robust", 0.3, 0.1), Objective("hinge", 0.3),
    Objective("ipo", 0.3), Objective("simpo", 0.3, gamma=0.7), Objective(beta=0.3, sft_weight=0.3),
    Objective(beta=0.3, length_normalised=True),
], ids=lambda o: f"{o.kind}-{o.sft_weight}")  # fmt: skip
def test_correct_variants_are_within_their_bounds(objective, dtype):
    generator = np.random.default_rng(7)
    for size in (1.0, 30.0, 1000.0):
        columns = tuple(tuple(float(-size * x) for x in generator.random(6)) for _ in range(4))
        lengths = tuple((int(a), int(b)) for a, b in generator.integers(1, 9, (6, 2)))
        experiment = LossExperiment(*columns, objective, lengths, dtype)
        predicted = predict(experiment)
        z = torch.tensor(experiment.arguments(), dtype=DTYPES[dtype], requires_grad=True)
        n = torch.tensor(np.array(lengths).T[[0, 1, 0, 1]], dtype=DTYPES[dtype])
        per_pair = torch_loss(objective, z, n)
        per_pair.mean().backward()
        for name, seen in (("per_pair", per_pair), ("slopes", z.grad)):
            limit = bound(experiment, name, predicted, ROUNDOFF[dtype])
            assert ratio(seen.detach().double().numpy(), getattr(predicted, name), limit) <= 1.0


def torch_loss(objective: Objective, z: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    b, e = objective.beta, objective.label_smoothing
    x = z / n if objective.kind == "simpo" or objective.length_normalised else z
    h = (x[0] - x[1]) - (x[2] - x[3])
    loss = {
        "sigmoid": lambda: -(1 - e) * F.logsigmoid(b * h) - e * F.logsigmoid(-b * h),
        "robust": lambda: (-(1 - e) * F.logsigmoid(b * h) + e * F.logsigmoid(-b * h)) / (1 - 2 * e),
        "hinge": lambda: torch.relu(1 - b * h),
        "ipo": lambda: (h - 1 / (2 * b)) ** 2,
        "simpo": lambda: -F.logsigmoid(b * (x[0] - x[1]) - objective.gamma),
    }[objective.kind]()
    return loss - objective.sft_weight * z[0] / n[0] if objective.sft_weight else loss


# ------------------------------------------------------------------------------------------------------------ tables


def torch_logps(table: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, form: str = "log_softmax") -> torch.Tensor:
    logits, labels = table[ids][:, :-1], ids[:, 1:]
    if form == "logsumexp":
        tokens = logits.gather(2, labels[..., None])[..., 0] - logits.logsumexp(-1)
    elif form == "cross-entropy":
        tokens = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    else:
        tokens = logits.log_softmax(-1).gather(2, labels[..., None])[..., 0]
    return (tokens * mask[:, 1:]).sum(-1)


def batch(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and completion masks of chosen rows, then rejected, padded on the right with 15."""
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = max(len(a) + len(b) for a, b in rows)
    ids = [[*a, *b, *[15] * (width - len(a) - len(b))] for a, b in rows]
    masks = [[0] * len(a) + [1] * len(b) + [0] * (width - len(a) - len(b)) for a, b in rows]
    return torch.tensor(ids), torch.tensor(masks)


def torch_step(policy: torch.Tensor, reference: torch.Tensor, pairs, beta: float, form: str) -> torch.Tensor:
    ids, masks = batch(pairs)
    own = torch_logps(policy, ids, masks, form)
    with torch.no_grad():
        other = torch_logps(reference, ids, masks, form)
    n = len(pairs)
    return -F.logsigmoid(beta * ((own[:n] - other[:n]) - (own[n:] - other[n:]))).mean()


@pytest.mark.parametrize("form", ["log_softmax", "logsumexp", "cross-entropy"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_correct_steps_are_within_their_bounds(dtype, form, size):
    plain = step(dtype=dtype)
    experiment = replace(plain, policy=type(plain.policy).of(size * plain.policy.logits()))
    tables = (experiment.policy, experiment.reference)
    policy, reference = (torch.tensor(t.logits(), dtype=DTYPES[dtype]) for t in tables)
    policy.requires_grad_(True)
    loss = torch_step(policy, reference, PAIRS, 0.5, form)
    loss.backward()
    predicted, u = predict(experiment), ROUNDOFF[dtype]
    assert ratio(loss.item(), predicted.loss, bound(experiment, "loss", predicted, u)) <= 1.0
    assert ratio(policy.grad.double().numpy(), predicted.gradient, bound(experiment, "gradient", predicted, u)) <= 1.0


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_correct_log_probs_are_within_their_bounds(dtype):
    ids, masks = batch(PAIRS)
    rows = tuple(
        TokenRow(tuple(i), tuple(int(x != 15) for x in i), tuple(m))
        for i, m in zip(ids.tolist(), masks.tolist(), strict=True)
    )
    experiment = LogpExperiment(step().policy, rows, dtype=dtype)
    predicted, u = predict(experiment), ROUNDOFF[dtype]
    table = torch.tensor(experiment.table.logits(), dtype=DTYPES[dtype], requires_grad=True)
    logps = torch_logps(table, ids, masks)
    assert ratio(logps.detach().double().numpy(), predicted.logps, bound(experiment, "logps", predicted, u)) <= 1.0
    for row in range(len(rows)):
        (gradient,) = torch.autograd.grad(logps[row], table, retain_graph=True)
        limit = bound(experiment, "gradient", predicted, u)[row]
        assert ratio(gradient.double().numpy(), predicted.gradient[row], limit) <= 1.0


RUNS = [
    {"steps": 1}, {"steps": 1, "learning_rate": 2.0**12}, {"steps": 2, "clip_norm": 0.02},
    {"steps": 3, "momentum": 0.5}, {"steps": 20}, {"steps": 2, "weight_decay": 0.01}, {"steps": 3, "batch": 2},
    {"steps": 1, "batch": 2, "accumulation": 2},
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_correct_runs_are_within_their_bounds(changes, dtype):
    recipe = Recipe(**({"objective": Objective(beta=0.5), "learning_rate": 4.0, "batch": 5, "dtype": dtype} | changes))
    experiment = train(recipe, evaluation=(("held", HELD_OUT),))
    predicted, u, pairs = predict(experiment), ROUNDOFF[dtype], tokenise(experiment)
    table, reference = (
        torch.tensor(t.logits(), dtype=DTYPES[dtype]) for t in (experiment.policy, experiment.reference)
    )
    before = table.double().numpy().copy()
    table.requires_grad_(True)
    optimizer = torch.optim.SGD([table], recipe.learning_rate, recipe.momentum)
    at, losses, norms = 0, [], []
    for _ in range(recipe.steps):
        parts = []
        for _ in range(recipe.accumulation):
            loss = torch_step(table, reference, pairs[at : at + recipe.batch], 0.5, "log_softmax")
            (loss / recipe.accumulation).backward()
            parts.append(loss.item())
            at = (at + recipe.batch) % 5 if (at + recipe.batch) < 5 else 0
        losses.append(np.mean(parts))
        norms.append(table.grad.norm().item())
        if recipe.clip_norm:
            table.grad *= min(1.0, recipe.clip_norm / norms[-1])
        with torch.no_grad():
            table.mul_(1 - recipe.learning_rate * recipe.weight_decay)
        optimizer.step()
        optimizer.zero_grad()
    seen = table.detach().double().numpy()
    assert ratio(seen, predicted.logits, bound(experiment, "logits", predicted, u)) <= 1.0
    if recipe.steps == 1:
        read = (before - seen) / recipe.learning_rate
        assert ratio(read, predicted.gradient, bound(experiment, "gradient", predicted, u)) <= 1.0
    expected = [entry["metrics"]["loss"] for entry in predicted.history if entry["split"] == "train"]
    assert ratio(losses, expected, bound(experiment, "history.train.loss", predicted, u)) <= 1.0
    expected = [entry["metrics"]["grad_norm"] for entry in predicted.history if entry["split"] == "train"]
    assert ratio(norms, expected, bound(experiment, "history.train.grad_norm", predicted, u)) <= 1.0
    held = torch_step(table, reference, tokenise(replace(experiment, rows=HELD_OUT)), 0.5, "log_softmax").item()
    last = predicted.history[-1]["metrics"]["loss"]
    assert ratio([held], [last], bound(experiment, "history.held.loss", predicted, u)) <= 1.0


def test_bounds_are_small_against_what_faults_do():
    # float32: an error of a thousandth of the greatest number would hide no fault that this suite knows
    u = ROUNDOFF["float32"]
    one, run = step(dtype="float32"), train(Recipe(Objective(beta=0.5), learning_rate=16.0, batch=5))
    for experiment, name in ((one, "gradient"), (run, "gradient"), (one, "loss"), (LOSS, "per_pair"), (LOSS, "slopes")):
        predicted = predict(experiment)
        size = np.max(np.abs(getattr(predicted, name)))
        assert np.max(bound(experiment, name, predicted, u)) < 1e-3 * size
    wrong = predict(one, PAPER.but(counted="no-eos")).gradient
    apart = np.abs(wrong - predict(one).gradient) / np.maximum(bound(one, "gradient", predict(one), u), 1e-300)
    assert np.max(apart) > 1e3


def test_cells_that_no_gradient_reaches_must_not_move():
    run = train(Recipe(Objective(beta=0.5), learning_rate=16.0, batch=5))
    predicted = predict(run)
    limit = bound(run, "logits", predicted, ROUNDOFF["float32"])
    untouched = ~predicted.gradient.any(axis=1)
    assert untouched.any()
    assert not limit[untouched].any()


def test_softplus_with_a_threshold_is_allowed_its_constant():
    # softplus(25) = 25 exactly in some libraries: 1.4e-11 off, within log1p(e^-20) = 2.06e-9
    deep = LossExperiment((-25.0,), (0.0,), (0.0,), (0.0,), Objective(beta=1.0))
    limit = bound(deep, "per_pair", predict(deep), ROUNDOFF["float64"])
    assert 1.4e-11 < limit[0] < 2.2e-9


def test_names_of_metrics_histories_and_sequences():
    experiment = step(dtype="float32")
    u, predicted = ROUNDOFF["float32"], predict(experiment)
    assert bound(experiment, "metrics.rewards/chosen", predicted, u) > 0
    with pytest.raises(KeyError, match="known: "):
        bound(experiment, "logits", predicted, u)
    settings_ = Recipe(Objective(beta=0.5), batch=2, steps=4, save_every=2)
    run = train(settings_, evaluation=(("held", HELD_OUT),))
    pair = Sequence((run, train(replace(settings_, resume_from=2), evaluation=run.evaluation)))
    whole, halves = predict(run), predict(pair)
    assert bound(run, "history.train.loss", whole, u).shape == (4,)
    assert bound(run, "history.held.rewards/margins", whole, u).shape == (1,)
    assert np.all(np.isfinite(bound(run, "history.train.grad_norm", whole, u)))
    second = bound(pair, "runs.1.logits", halves, u)
    assert np.array_equal(second, bound(run, "logits", whole, u))
    assert bound(pair, "runs.1.history.train.loss", halves, u).shape == (2,)


def test_exponentials_that_are_added_one_after_the_other_are_allowed_their_roundings():
    """A softmax over a dimension that is not the last is such a sum.  After 1 each of 1023 terms of 0.6 ulp rounds up
    to 1 ulp = 2^-23: the sum is off by 1023 * 0.4 ulp = 4.9e-5.  A tree's bound, u (max|z| + 2 |lp| + 2 log V + 8 +
    log2 V + 1), is 2.9e-6; that of V - 1 roundings 6.3e-5."""
    logits = np.full((1, 1024), np.log(0.6 * 2.0**-23))
    logits[0, 0] = 0.0
    total = np.add.accumulate(np.exp(logits[0]).astype(np.float32), dtype=np.float32)[-1]
    exact = np.log(np.exp(logits[0]).sum())
    error, u = abs(float(np.log(np.float64(total))) - exact), ROUNDOFF["float32"]
    assert error == pytest.approx(1023 * 0.4 * 2.0**-23, rel=1e-3)
    tree = u * (np.abs(logits).max() + 2 * exact + 2 * np.log(1024) + 8 + 10 + 1)
    assert tree < error < token_error(logits, logits - exact, u)[0, 0]


DIVERGENT = {  # f'(u) as people write it, of t = log u
    "forward_kl": [lambda t, a: 1 - torch.exp(-t), lambda t, a: -1 / torch.exp(t), lambda t, a: -torch.expm1(-t)],
    "js_divergence": [
        lambda t, a: F.logsigmoid(t), lambda t, a: torch.log(2 * torch.exp(t) / (1 + torch.exp(t))),
        lambda t, a: t - F.softplus(t),
    ],
    "alpha_divergence": [
        lambda t, a: (torch.exp(-a * t) - 1) * (1 / -a), lambda t, a: (1 - torch.exp(t) ** -a) / a,
        lambda t, a: -torch.expm1(-a * t) / a,
    ],
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("reach", [0.01, 1.0, 16.0])
@pytest.mark.parametrize("kind", DIVERGENT)
def test_correct_divergences_are_within_their_bounds(kind, reach, dtype):
    generator = np.random.default_rng(3)
    reference = -40.0 * generator.random((2, 40)) - reach
    policy = reference + reach * (2.0 * generator.random((2, 40)) - 1.0)
    objective = Objective(kind, beta=0.3, alpha=0.7)
    rows = (tuple(float(x) for x in row) for row in (*policy, *reference))
    experiment = LossExperiment(*rows, objective, dtype=dtype)
    predicted, u = predict(experiment), ROUNDOFF[dtype]
    for form in DIVERGENT[kind]:
        z = torch.tensor(experiment.arguments(), dtype=DTYPES[dtype], requires_grad=True)
        per_pair = -F.logsigmoid(0.3 * (form(z[0] - z[2], 0.7) - form(z[1] - z[3], 0.7)))
        per_pair.mean().backward()
        for name, seen in (("per_pair", per_pair), ("slopes", z.grad)):
            limit = bound(experiment, name, predicted, u)
            assert ratio(seen.detach().double().numpy(), getattr(predicted, name), limit) <= 1.0
    wrong = predict(experiment, PAPER.but(kind="sigmoid")).slopes
    apart = np.abs(wrong - predicted.slopes) / bound(experiment, "slopes", predicted, u)
    assert np.max(apart) > 1e3  # and the bound is small beside what DPO itself would do
