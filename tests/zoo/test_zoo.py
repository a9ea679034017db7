"""Is every specimen the miniature with one part broken, visibly, and every variant the miniature to rounding?"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from zoo_tiny import CHAT, ROWS, model, pair_batch, probe, tokenizer

from dpocheck.adapter import CAPABILITIES, PairBatch
from dpocheck.experiment import DIVERGENCES, Lora, Objective, Recipe
from dpocheck.miniature import MINIATURE
from dpocheck.oracle.theory import PAPER, Theory
from dpocheck.zoo import SPECIMENS, VARIANTS, build

PARTS = {field.name for field in dataclasses.fields(MINIATURE)} - {"says", "ranks"}
# What only particular inputs show, which the runs of this file are not; the kill matrix has who fails them.
PARTICULAR = {
    "unfinished-window-carried-over": "two epochs that end within a window",
    "last-window-divided-as-if-full": "an epoch that ends within a window", "slope-lost-at-zero": "a margin of zero",
    "collapses-white-space": "two spaces in a text", "reference-without-its-last-layer": "two layers",
    "eos-after-its-own": "a text that ends with EOS", "last-line-lost": "rows in a file",
    "goes-back-to-the-best": "an evaluation that grows worse",
}

# ------------------------------------------------------------------------------------------------------- declarations


def test_declarations_are_read_without_torch():
    code = "import sys, dpocheck.zoo; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_there_are_enough_and_every_part_is_broken_somewhere():
    assert len(SPECIMENS) >= 110
    assert len(VARIANTS) >= 15
    assert {specimen.part for specimen in SPECIMENS.values()} == PARTS


@pytest.mark.parametrize("name", SPECIMENS)
def test_a_specimen_changes_exactly_one_part(name):
    specimen, built = SPECIMENS[name], build(name)
    changed = [f.name for f in dataclasses.fields(built) if getattr(built, f.name) is not getattr(MINIATURE, f.name)]
    assert changed == [specimen.part]
    assert specimen.summary.endswith(".")
    assert set(specimen.at) <= set(CAPABILITIES)
    assert specimen.theory is None or (isinstance(specimen.theory, Theory) and specimen.theory != PAPER)


def test_two_specimens_do_not_have_one_theory():
    """Two that are one in every prediction would be one specimen, unless their parts or capabilities differ."""
    found = Counter((s.theory, s.part, s.at) for s in SPECIMENS.values() if s.theory is not None)
    assert [key for key, count in found.items() if count > 1] == []


def test_an_unknown_name_is_refused_with_the_nearest_ones():
    with pytest.raises(ValueError, match="did you mean counts-prompt"):
        build("count-prompt")


# ----------------------------------------------------------------------------------------------------------- scenarios

BASE = Recipe(objective=Objective(beta=0.5), learning_rate=0.05, batch=2, steps=3)
FOUR = [torch.tensor(row, dtype=torch.float64) for row in (
    [-3.0, -20.0, -55.0, -7.0], [-4.5, -11.0, -24.0, -95.0], [-3.5, -12.0, -10.0, -12.0], [-4.25, -12.5, -12.0, -7.0],
)]  # fmt: skip
LENGTHS = (torch.tensor([2, 3, 5, 4]), torch.tensor([4, 2, 3, 6]))
OBJECTIVES = (
    Objective(beta=0.5), Objective(beta=2.0), Objective(beta=0.5, label_smoothing=0.125),
    Objective(kind="robust", beta=0.5, label_smoothing=0.125), Objective(kind="hinge", beta=0.5),
    Objective(kind="ipo", beta=0.5), Objective(kind="simpo", beta=2.0, gamma=0.5),
    Objective(beta=0.5, sft_weight=0.5), Objective(beta=0.5, length_normalised=True),
    *(Objective(kind, beta=0.5, alpha=0.25) for kind in DIVERGENCES),
)  # fmt: skip


def _loss(adapter):
    for objective in OBJECTIVES:
        four = [logps.clone().requires_grad_() for logps in FOUR]
        kept = [logps.detach().clone() for logps in four]
        out = adapter.loss(*four, objective=objective, lengths=LENGTHS)
        loss = getattr(out, "loss", out)
        slopes = torch.autograd.grad(loss.sum(), four[:2], allow_unused=True)
        slopes = [torch.zeros(4) if slope is None else slope for slope in slopes]
        moved = [torch.equal(now, before) for now, before in zip(four, kept, strict=True)]
        rewards = [getattr(out, "rewards_chosen", None), getattr(out, "rewards_rejected", None)]
        yield from (loss.detach(), *slopes, torch.tensor(moved).double(), *[r for r in rewards if r is not None])


def _batches():
    yield pair_batch("right")
    yield pair_batch("left")
    plain = pair_batch("right")
    eos = plain.input_ids.masked_fill(plain.attention_mask == 0, 62)
    yield PairBatch(eos, plain.attention_mask, plain.completion_mask, pad_token_id=62)
    yield PairBatch(*(tensor[[0, 3]] for tensor in (plain.input_ids, plain.attention_mask, plain.completion_mask)), 63)


def _loud(seed):
    """A model sure of itself: some tokens are all but impossible under it."""
    return model(seed, scale=2.0)


def _sequence_logps(adapter):
    for batch in _batches():
        for policy in (model(1), _loud(1)):
            logps = adapter.sequence_logps(policy, batch)
            policy.zero_grad()
            logps[0].backward()
            gradient = policy.model.embed_tokens.weight.grad
            yield logps.detach()
            yield torch.zeros(1) if gradient is None else gradient


def _step(adapter):
    plain = OBJECTIVES[0]
    cases = [(model(1, dropout=d), model(2, dropout=d), b, plain) for d in (0.0, 0.5) for b in _batches()]
    cases += [(model(1), None, pair_batch(), plain), (_loud(1), _loud(2), pair_batch(), plain)]
    cases += [(model(1), model(2), pair_batch(), objective) for objective in OBJECTIVES[1:]]
    for policy, reference, batch, objective in cases:
        torch.manual_seed(0)
        for other in () if reference is None else reference.parameters():
            other.requires_grad_(False)
        ids = batch.input_ids.clone()
        out = adapter.step(policy, reference, batch, objective=objective)
        yield torch.tensor([float(out.loss)])
        yield torch.tensor([value for _, value in sorted(out.metrics.items())])
        yield from (torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters())
        gradients = [] if reference is None else [p.grad for p in reference.parameters() if p.grad is not None]
        yield torch.tensor([len(gradients), float(torch.equal(ids, batch.input_ids))])


TEXT = {"train": ROWS, "held out": ROWS[:5]}
SPACES = [{**row, "prompt": row["prompt"].strip(), "chosen": " " + row["chosen"]} for row in ROWS]
SYSTEM = [
    {**row, "prompt": [{"role": "system", "content": "w58"}, {"role": "assistant", "content": "w59"}, *row["prompt"]]}
    for row in CHAT
]
IMPLICIT = [
    {"chosen": "w1 w2 w3", "rejected": "w1 w2"},
    {"chosen": "w5 ", "rejected": "ow6 w7 w8"},
    *({side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in ROWS),
]
IMPLICIT_CHAT = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHAT]
ACCUMULATED = replace(BASE, batch=3, accumulation=3, steps=2)
LORA = replace(BASE, lora=Lora(2, 8.0, ("q_proj", "lm_head")), learning_rate=1.0)

# name -> what is run; each is (rows, recipes of runs in one folder, arguments of the probe)
RUNS = {
    "plain": (TEXT, [BASE], {}),
    "long": (TEXT, [replace(BASE, steps=9, shuffle=True, seed=3, learning_rate=0.2)], {}),
    "accumulated": (TEXT, [ACCUMULATED], {}),
    "decay": (TEXT, [replace(ACCUMULATED, schedule="linear", warmup_steps=2, steps=5, weight_decay=0.5)], {}),
    "momentum": (TEXT, [replace(BASE, momentum=0.5)], {}),
    "adamw": (TEXT, [replace(BASE, optimizer="adamw", betas=(0.5, 0.75), epsilon=0.25, steps=4)], {}),
    "adamw decay": (TEXT, [replace(BASE, optimizer="adamw", epsilon=0.25, weight_decay=0.5)], {}),
    "one prompt twice": ({"train": [{**ROWS[0], "prompt": ROWS[1]["prompt"]}, *ROWS[1:]]}, [BASE], {}),
    "clipped": (TEXT, [replace(ACCUMULATED, clip_norm=0.05)], {}),
    "loose clip": (TEXT, [replace(BASE, clip_norm=1e6, learning_rate=1e-6)], {}),
    "evaluated": (TEXT, [replace(BASE, eval_batch=2, eval_every=1)], {}),
    "drop last": (TEXT, [replace(BASE, drop_last=True, steps=None, epochs=2)], {}),
    "no reference": (TEXT, [BASE], {"reference": None, "edit": lambda policy: policy.lm_head.weight.mul_(1.5)}),
    "dropout": (TEXT, [BASE], {"policy": model(1, dropout=0.5), "reference": model(2, dropout=0.5)}),
    "precomputed": (TEXT, [replace(BASE, precompute_reference=True, shuffle=True, steps=8)], {}),
    "precomputed itself": (TEXT, [replace(BASE, precompute_reference=True, shuffle=True)], {"reference": None}),
    "resumed": (
        TEXT,
        [
            replace(BASE, steps=6, save_every=1, momentum=0.5, shuffle=True, schedule="linear"),
            replace(BASE, steps=6, save_every=1, momentum=0.5, shuffle=True, schedule="linear", resume_from=5),
        ],
        {},
    ),
    "chat": ({"train": CHAT}, [BASE], {}),
    "system": ({"train": SYSTEM}, [BASE], {"tokens": tokenizer(bos=True)}),
    "implicit": ({"train": IMPLICIT}, [BASE], {}),
    "implicit chat": ({"train": IMPLICIT_CHAT}, [BASE], {}),
    "spaces": ({"train": SPACES}, [BASE], {}),
    "bos": (TEXT, [BASE], {"tokens": tokenizer(bos=True)}),
    "pad is eos": (TEXT, [BASE], {"tokens": tokenizer(pad_is_eos=True)}),
    "keep start": (TEXT, [replace(BASE, max_length=5)], {}),
    "long prompt": (
        {"train": [{"prompt": "w1 w2 w3 w4 w5 w6 ", "chosen": "w7", "rejected": "w8"}, *ROWS]},
        [replace(BASE, max_length=5)],
        {},
    ),
    "keep end": (TEXT, [replace(BASE, max_length=5, truncation="keep_end")], {}),
    "loud": (TEXT, [BASE], {"policy": _loud(1), "reference": _loud(2)}),
    "cdpo": (TEXT, [replace(BASE, objective=OBJECTIVES[2])], {}),
    "robust": (TEXT, [replace(BASE, objective=OBJECTIVES[3])], {}),
    "hinge": (TEXT, [replace(BASE, objective=OBJECTIVES[4])], {}),
    "ipo": (TEXT, [replace(BASE, objective=OBJECTIVES[5])], {}),
    "simpo": (TEXT, [replace(BASE, objective=OBJECTIVES[6])], {}),
    "sft": (TEXT, [replace(BASE, objective=OBJECTIVES[7])], {}),
    "by length": (TEXT, [replace(BASE, objective=OBJECTIVES[8])], {}),
    **{o.kind: (TEXT, [replace(BASE, objective=o)], {}) for o in OBJECTIVES[9:]},
    "lora": (TEXT, [LORA], {}),
    "lora itself": (TEXT, [LORA], {"reference": None}),
}


def _digest(out, folder):
    """What can be seen of a run: its weights, its history, its checkpoints."""
    from safetensors.torch import load_file

    yield from (parameter.detach().clone() for parameter in out.policy.parameters())
    for entry in out.history:
        yield torch.tensor([float(entry["step"]), *(value for _, value in sorted(entry["metrics"].items()))])
    for _, path in sorted(out.checkpoints.items()):
        saved = load_file(path / "model.safetensors")
        yield from (saved[name] for name in sorted(saved))


def _run(adapter, name, folder):
    rows, recipes, arguments = RUNS[name]
    asked = probe(folder / "probe", **arguments)
    for recipe in recipes:
        yield from _digest(adapter.train(asked, rows, recipe, folder / "run"), folder)


def _stale(adapter, folder):
    """Two runs in one folder whose references, and then whose rows, differ."""
    recipe = replace(BASE, precompute_reference=True)
    for index, (reference, rows) in enumerate(((model(2), ROWS), (model(5), ROWS), (model(5), ROWS[::-1]))):
        asked = probe(folder / f"probe{index}", reference=reference)
        yield from _digest(adapter.train(asked, {"train": rows}, recipe, folder / "run"), folder)


def _spied(adapter, folder):
    """The reference's weights, and whether it was left with gradients, after a run."""
    asked = probe(folder / "probe")
    reference = asked.reference()
    given = replace(asked, load=lambda name: reference if name == "reference" else asked.load(name))
    adapter.train(given, {"train": ROWS}, BASE, folder / "run")
    yield from (parameter.detach().clone() for parameter in reference.parameters())
    yield torch.tensor([sum(parameter.grad is not None for parameter in reference.parameters())])


@cache
def _honest(kind, name=None, folder=None):
    return list(_seen(MINIATURE, kind, name, folder))


def _seen(adapter, kind, name, folder):
    if kind == "train":
        special = {"stale": _stale, "spied": _spied}
        yield from special[name](adapter, folder) if name in special else _run(adapter, name, folder)
    else:
        yield from {"loss": _loss, "sequence_logps": _sequence_logps, "step": _step}[kind](adapter)


def _same(mine, due, tolerance):
    if len(mine) != len(due):
        return False
    return all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
        for a, b in zip(mine, due, strict=True)
    )


def _likely(specimen):
    """Runs in the order in which they are likely to show the fault."""
    hints = {
        "render": "implicit, chat, system, spaces, implicit chat",
        "tokenize": "plain, chat, bos, system, spaces",
        "truncate": "keep start, keep end, long prompt, plain",
        "clip": "clipped, loose clip",
        "resume": "resumed",
        "checkpoint": "resumed",
        "evaluate": "evaluated",
        "metrics": "accumulated",
        "accumulate": "accumulated, clipped",
        "reduce": "plain, accumulated",
        "update": "decay, momentum, adamw, plain",
        "order": "long, drop last, accumulated, resumed",
        "loss": "plain, loud, cdpo, robust, hinge, ipo, simpo, sft, by length",
        "reference": "plain, precomputed, precomputed itself, no reference, lora, lora itself, stale, spied, resumed",
    }.get(specimen.part)
    hints = hints.split(", ") if hints else []
    return hints + [name for name in [*RUNS, "stale", "spied"] if name not in hints]


@pytest.fixture(scope="session")
def honest_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("honest")


# What needs several processes is run in tests/ranks.
@pytest.mark.parametrize("name", [
    name for name, one in SPECIMENS.items() if not one.caught_by.startswith("RANKS-") and name not in PARTICULAR
])  # fmt: skip
def test_a_specimen_runs_and_shows_at_each_capability_that_it_names(name, tmp_path, honest_folder):
    specimen, adapter = SPECIMENS[name], build(name)
    for capability in specimen.at:
        if capability != "train":
            mine = list(_seen(adapter, capability, None, None))
            assert not _same(mine, _honest(capability), 1e-7), f"{name} does not show at {capability}"
            continue
        for run in _likely(specimen):
            due = _honest("train", run, honest_folder / run.replace(" ", "-"))
            if not _same(list(_seen(adapter, "train", run, tmp_path / run.replace(" ", "-"))), due, 1e-7):
                break
        else:
            pytest.fail(f"{name} shows in none of {len(RUNS)} runs")


# Bounds between two ways to add and to round in float32: 2^-24 relative each, a few dozen operations deep, in logits of
# about 5 and log-probs of about 30; gradients carry beta and the loss's slope, both at most 1.
ROUNDING = 1e-4
OPEN_CHOICES = {
    "ties-are-right", "rewards-without-beta-declared", "ipo-by-length-declared", "warm-up-from-zero",
    "micro-batches-weigh-the-same-declared", "tokenised-apart", "mean-loss-only", "text-without-bos-declared",
    "text-with-bos-declared", "rate-of-the-next-step-logged", "reference-in-bfloat16-declared",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - OPEN_CHOICES))
def test_a_variant_agrees_with_the_miniature_to_rounding(name, tmp_path, honest_folder):
    adapter = build(name)
    for capability in ("loss", "sequence_logps", "step"):
        if hasattr(adapter, capability):
            mine, due = list(_seen(adapter, capability, None, None)), _honest(capability)
            assert _same(mine, due, ROUNDING), f"{name} differs at {capability}"
    if hasattr(adapter, "train"):
        for run in ("plain", "accumulated", "dropout", "no reference", "chat", "evaluated", "resumed", "lora itself"):
            mine = list(_seen(adapter, "train", run, tmp_path / run.replace(" ", "-")))
            due = _honest("train", run, honest_folder / run.replace(" ", "-"))
            assert _same(mine, due, ROUNDING), f"{name} differs in {run}"


# Another token in front is attended to, and changes everything in a model that has attention; a coarser reference does
# so too.
@pytest.mark.parametrize(
    "name", sorted(OPEN_CHOICES - {"mean-loss-only", "text-with-bos-declared", "reference-in-bfloat16-declared"})
)
def test_an_open_choice_changes_nothing_but_itself(name, tmp_path, honest_folder):
    adapter = build(name)
    run = "clipped" if name != "micro-batches-weigh-the-same-declared" else "plain"
    mine, due = (
        list(a.train(probe(tmp_path / n / "p"), {"train": ROWS}, RUNS[run][1][0], tmp_path / n).policy.parameters())
        for n, a in (("a", adapter), ("b", MINIATURE))
    )
    assert _same(mine, due, ROUNDING)


def test_the_mean_loss_is_the_mean_of_the_miniatures():
    found = build("mean-loss-only").loss(*FOUR, objective=OBJECTIVES[0], lengths=LENGTHS)
    due = MINIATURE.loss(*FOUR, objective=OBJECTIVES[0], lengths=LENGTHS).loss
    assert found.item() == pytest.approx(due.mean().item(), rel=1e-15)
    assert math.isfinite(found.item())
