"""Does an adapter that names what it passes on refuse everything else that it may be asked for?"""

from __future__ import annotations

import pytest

from dpocheck.adapter import Unsupported, refuse_others
from dpocheck.experiment import Lora, Objective, Recipe

TOLD = ("beta", "learning_rate", "batch", "accumulation", "steps", "epochs", "seed")


@pytest.mark.parametrize("recipe", [
    Recipe(), Recipe(objective=Objective(beta=0.7), learning_rate=3.0, batch=5, accumulation=2, steps=None, epochs=3),
    Recipe(objective=Objective("ipo")), Recipe(seed=4),
])  # fmt: skip
def test_what_is_passed_on_is_taken(recipe):
    refuse_others(recipe, *TOLD, kind=("sigmoid", "ipo"))


@pytest.mark.parametrize(("recipe", "what"), [
    (Recipe(weight_decay=0.1), "weight_decay 0.1"), (Recipe(warmup_steps=2), "warmup_steps 2"),
    (Recipe(shuffle=True), "shuffle True"), (Recipe(clip_norm=1.0), "clip_norm 1.0"),
    (Recipe(optimizer="adamw"), "optimizer adamw"), (Recipe(lora=Lora(2, 2.0, ("lm_head",))), "lora"),
    (Recipe(objective=Objective("hinge")), "kind hinge"),
    (Recipe(objective=Objective(label_smoothing=0.1)), "label_smoothing 0.1"),
    (Recipe(objective=Objective(sft_weight=1.0)), "sft_weight 1.0"),
])  # fmt: skip
def test_what_is_not_passed_on_is_refused_by_its_name(recipe, what):
    with pytest.raises(Unsupported, match=what):
        refuse_others(recipe, *TOLD, kind=("sigmoid", "ipo"))


def test_a_value_can_be_allowed_alone():
    refuse_others(Recipe(optimizer="adamw"), *TOLD, optimizer=("sgd", "adamw"))
    with pytest.raises(Unsupported, match="optimizer adamw"):
        refuse_others(Recipe(optimizer="adamw"), *TOLD, optimizer=("sgd",))


def test_a_name_that_no_recipe_has_is_an_error_of_the_adapter():
    with pytest.raises(TypeError, match=r"no field lr; it has .*learning_rate"):
        refuse_others(Recipe(), "lr")
