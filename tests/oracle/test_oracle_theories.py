"""Does every theory predict something of its own?  A fault that changes nothing could never be found."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from functools import cache

import numpy as np
import pytest
from oracle_scenes import HELD_OUT, LOSS, PLAIN, ROWS, TOKENIZER, step, table, train

from dpocheck.experiment import Body, Message, Objective, Pair, Recipe, Row, Sequence, Template, Tokenizer
from dpocheck.oracle import CHOICES, CONVENTIONS, FAULTS, PAPER, Theory, predict
from dpocheck.oracle.theory import fault, values

TEMPLATE = Template(user=("a ", " b "), assistant=("c ", " d "), generation_prompt="c ", eos=True)
CHAT = Row((Message("user", "e"),), (Message("assistant", "f"),), (Message("assistant", "g h"),))
LETTERS = Tokenizer((*"abcxyz", "xy"), 16, kind="characters", merge=("x", "y"), adds_bos=True)
MANY = Recipe(PLAIN, learning_rate=4.0, batch=2, accumulation=2, dtype="float64", steps=5, momentum=0.5, eval_batch=2,
              clip_norm=0.05, schedule="linear", warmup_steps=1, weight_decay=0.01, save_every=2)  # fmt: skip
CACHED = replace(MANY, precompute_reference=True)


def scenes() -> dict[str, object]:
    """Few experiments that between them show every stage."""
    smooth = Objective(beta=0.5, label_smoothing=0.1)
    many = train(MANY, evaluation=(("held", HELD_OUT),), reference=None, edited=table(3))
    return {
        "loss": LOSS,
        "smoothed": replace(LOSS, objective=smooth),
        "extreme": replace(LOSS, policy_chosen=(-3.5, -6.25, -2.0, -2e3), dtype="float32"),
        "ipo": replace(LOSS, objective=Objective("ipo", 0.5)),
        "alpha": replace(LOSS, objective=Objective("alpha_divergence", 0.5, alpha=0.25)),
        "simpo": replace(LOSS, objective=Objective("simpo", 0.5, gamma=0.75)),
        "flat": replace(LOSS, objective=Objective("hinge", 0.5), policy_chosen=(-3.5, 90.0, -2.0, 60.0)),
        "tie": replace(step(), reference=table(1)),
        "step": step(smooth),
        "glass": step(body="glass", padding="left"),
        "clock": step(body="clock", padding="left"),
        "sft": step(Objective(beta=0.5, sft_weight=0.5)),
        "pads": step(pairs=(Pair((1, 2), (15, 3, 14), (4, 14)), Pair((5,), (6, 14), (0, 7, 8, 14)))),
        "calls": step(calls=2),
        "run": many,
        "sure": train(Recipe(replace(PLAIN, beta=4.0), learning_rate=4.0, batch=5, dtype="float64")),
        "uneven": train(replace(MANY, clip_norm=None, steps=None, epochs=1, accumulation=2, drop_last=True)),
        "ranks": train(replace(MANY, clip_norm=None, batch=1, world_size=2, accumulation=1, steps=None, epochs=1)),
        "window": train(replace(MANY, clip_norm=None, accumulation=3, steps=None, epochs=1)),
        "unclipped": train(replace(MANY, clip_norm=10.0)),
        "epochs": train(replace(MANY, clip_norm=None, accumulation=2, steps=None, epochs=2)),
        "one prompt": train(rows=(ROWS[0], replace(ROWS[1], prompt=ROWS[0].prompt))),
        "warm": train(replace(MANY, schedule="constant", warmup_steps=2)),
        "text": train(rows=(Row("abx", "yc", "za"), Row(None, "ab ", "cb")), tokenizer=LETTERS),
        "words": train(rows=ROWS, tokenizer=replace(TOKENIZER, adds_bos=True)),
        "ended": train(rows=(Row("a b", " c d </s>", " e f </s>"),), body=Body("glass")),
        "bos": train(rows=ROWS, tokenizer=replace(TOKENIZER, adds_bos=True), body=Body("glass")),
        "chat": train(rows=(CHAT,), tokenizer=replace(TOKENIZER, template=TEMPLATE)),
        "bare chat": train(rows=(CHAT,), tokenizer=replace(TOKENIZER, template=replace(TEMPLATE, eos=False))),
        "long": train(Recipe(PLAIN, batch=5, max_length=4, dtype="float64")),
        "end": train(Recipe(PLAIN, batch=5, max_length=4, truncation="keep_end", dtype="float64")),
        "cached": Sequence((train(CACHED), train(CACHED, policy=table(5), reference=table(6)))),
        "resumed": Sequence(tuple(train(replace(MANY, save_every=3, resume_from=n)) for n in (None, 3))),
    }


SCENES = scenes()


def same(left: object, right: object) -> bool:
    """Equal records, numbers within 1e-12 of their size."""
    if is_dataclass(left):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, np.ndarray | float) and isinstance(right, np.ndarray | float):
        return np.shape(left) == np.shape(right) and np.allclose(left, right, rtol=1e-12, atol=1e-13, equal_nan=True)
    return left == right


@cache
def paper(name: str):
    return predict(SCENES[name], PAPER)


def shows(theory: Theory) -> bool:
    """Whether some scene's prediction is not the paper's."""
    return any(not same(paper(name), predict(scene, theory)) for name, scene in SCENES.items())


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_changes_a_prediction(name):
    assert shows(FAULTS[name])


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_changes_a_prediction(name):
    assert shows(CHOICES[name])


VALUES = [(field, value) for field, allowed in values().items() for value in allowed
          if value != getattr(PAPER, field) and (field, value) != ("reduction", "none") and field != "reference_dtype"
          and (field, value) not in (("counted_reference", "completion"), ("logps_reference", "sum"))]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), VALUES)
def test_every_value_of_every_field_changes_a_prediction(field, value):
    # left out: "none" leaves the mean to the caller, the reference's own rule equal to the policy's is no change, and
    # the type that a reference is declared to be kept in widens bounds alone
    assert shows(PAPER.but(**{field: value}))


NUMBERS = [f.name for f in fields(Theory) if f.name not in values()]


def test_every_number_of_a_theory_has_a_fault():
    changed = {field for theory in FAULTS.values() for field in theory.differs()}
    assert set(NUMBERS) <= changed


def test_every_word_of_a_theory_has_a_name():
    # what is not the paper's is a named fault or a named choice
    named = {(field, value) for theory in [*FAULTS.values(), *CHOICES.values()]
             for field, value in theory.differs().items()}  # fmt: skip
    rules = {("counted_reference", v) for v in values()["counted_reference"]}
    means = {("logps_reference", v) for v in values()["logps_reference"]}
    assert set(VALUES) - named - rules - means == set()


def test_every_named_theory_is_one_change():
    for theory in [*FAULTS.values(), *CHOICES.values()]:
        assert len(theory.differs()) == 1
    assert len({*FAULTS, *CHOICES}) == len(FAULTS) + len(CHOICES)


def test_conventions_are_values_of_their_fields_and_hold_the_papers():
    for field, allowed in CONVENTIONS.items():
        assert getattr(PAPER, field) in allowed
        for value in allowed:
            assert PAPER.but(**{field: value})
    named = {(f, v) for theory in CHOICES.values() for f, v in theory.differs().items()}
    allowed = {(f, v) for f, vs in CONVENTIONS.items() for v in vs if v != getattr(PAPER, f)}
    assert named == allowed - {("reduction", "none")}


def test_an_unknown_value_is_refused():
    with pytest.raises(ValueError, match=r"counted='promt'; known: completion, prompt"):
        PAPER.but(counted="promt")
    with pytest.raises(ValueError, match="twice"):
        fault("beta twice", beta_power=2.0)


def test_prompt_tokens_cancel_in_the_gradient_and_show_in_the_log():
    # E-04: counted on both sides of both models they change logps alone
    wrong, right = predict(step(), PAPER.but(counted="prompt")), predict(step())
    assert wrong.gradient == pytest.approx(right.gradient, abs=1e-15)
    assert wrong.loss == pytest.approx(right.loss, abs=1e-15)
    assert abs(wrong.metrics["logps/chosen"] - right.metrics["logps/chosen"]) > 0.1


def test_swapping_columns_and_the_sign_of_the_logit_is_a_double_negation():
    # E-06
    both = PAPER.but(columns="swapped", coefficients=(-1.0, 1.0, 1.0, -1.0))
    assert predict(step(), both).gradient == pytest.approx(predict(step()).gradient, abs=1e-16)


def test_right_pads_are_after_every_scored_position():
    # E-08: attending to them changes nothing
    right = step(body="clock")
    assert same(predict(right, PAPER.but(attention="pads")), predict(right))


def test_even_micro_batches_weigh_the_same_either_way():
    # E-16
    even = train(Recipe(PLAIN, batch=2, accumulation=2, dtype="float64"), rows=ROWS[:4])
    assert same(predict(even, PAPER.but(uneven="pairs")), predict(even))
