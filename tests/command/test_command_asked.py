"""What a command line does not offer is not applicable, with the reason; it is never asked, and never passes."""

import re
from dataclasses import replace

import pytest
from command_bench import described, experiment
from command_closed_form import rows, table

from dpocheck.command.asked import loss_texts
from dpocheck.experiment import Body, Lora, Message, Objective, Row

CHAT = Row((Message("user", "a"),), (Message("assistant", "b"),), (Message("assistant", "c"),))
ADAM = {"update": '{ kind = "adam" }'}
LORA = {"update": '{ kind = "lora" }', "weights": '{ last = "w", lora_a = "a", lora_b = "b" }'}
MESSAGES = {"rows": '{ file = "a", format = "messages", order = "kept" }'}
HH = {"rows": '{ file = "a", format = "hh", order = "kept" }'}
SHUFFLED = {"rows": '{ file = "a" }'}

REFUSED = {
    "a loss": ({}, {"objective": Objective("ipo", 0.5)}, "no ipo loss"),
    "an extra": ({}, {"objective": Objective(sft_weight=1.0)}, r"no sigmoid\+sft loss"),
    "smoothing of another loss": ({}, {"objective": Objective("hinge", label_smoothing=0.1)}, "hinge with label smoo"),
    "clipping": ({}, {"clip_norm": 1.0}, "no option for clipping"),
    "weight decay": ({}, {"weight_decay": 0.1}, "no option for weight decay"),
    "a schedule": ({}, {"schedule": "linear"}, "no option for a linear schedule"),
    "warm-up": ({}, {"warmup_steps": 1}, "no option for warm-up"),
    "AdamW": ({}, {"optimizer": "adamw"}, "no option for AdamW"),
    "truncation": ({}, {"max_length": 8}, "no option for truncation"),
    "a seed": ({}, {"seed": 1}, "another seed than 0"),
    "epochs": ({}, {"steps": None, "epochs": 2}, "no option for epochs"),
    "resuming": ({}, {"resume_from": 1}, "no option for resuming"),
    "defaults": ({}, {"defaults": True}, "no `plain` command"),
    "ranks": ({}, {"world_size": 2}, "one process"),
    "LoRA": ({}, {"lora": Lora(8, 8.0, ("lm_head",))}, "full weights"),
    "another dtype": ({}, {"dtype": "float64"}, "computes in float32, not in float64"),
    "order": (SHUFFLED, {"batch": 2}, "shuffles the rows"),
    "two steps of adam": (ADAM, {"steps": 2}, "only one step can be read through the adam"),
    "clipped adam": (ADAM | {"options": '{ clip_norm = "x" }'}, {"clip_norm": 1.0}, "clipping cannot be read"),
    "decayed lora": (LORA | {"options": '{ weight_decay = "x" }'}, {"weight_decay": 1.0}, "decay cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_offered_is_refused_with_the_reason(name, tmp_path):
    parts, recipe, reason = REFUSED[name]
    subject = described(tmp_path, **parts)
    assert subject.supports(experiment()) is None
    asked = experiment(**recipe)
    assert re.search(reason, subject.supports(asked)), subject.supports(asked)
    with pytest.raises(ValueError, match="cannot be asked"):
        subject.answer(asked, {}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("parts", "change", "reason"),
    [
        ({}, {"edited": table(3)}, "changed in memory"),
        ({}, {"evaluation": (("test", rows()),)}, "no option for an evaluation set"),
        ({}, {"evaluation": (("a", rows()), ("b", rows()))}, "one evaluation set at most"),
        (HH, {"rows": (CHAT,) * 4}, "chat rows cannot be written as hh"),
        (MESSAGES, {"rows": (Row(None, "a b", "a c"),) * 4}, "without a prompt column"),
        (ADAM, {"policy": None, "reference": None, "body": Body("speaking")}, "only a table's head"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_with_the_reason(parts, change, reason, tmp_path):
    assert reason in described(tmp_path, **parts).supports(replace(experiment(), **change))


@pytest.mark.parametrize(
    ("how", "reason"),
    [("steps", "only the steps of a run"), ("adapter-off", "the model without the adapter"), ("none", "no option")],
)
def test_without_a_way_to_hand_over_a_reference_only_the_policy_can_be_it(how, reason, tmp_path):
    subject = described(tmp_path, reference=f'{{ how = "{how}" }}')
    assert reason in subject.supports(experiment())
    assert subject.supports(experiment(reference=1)) is None
    assert subject.supports(experiment(reference=None)) is None


def test_a_trainer_that_omits_the_reference_is_not_asked_without_one(tmp_path):
    subject = described(tmp_path, reference='{ how = "option", option = "--ref {reference}", omitted = "none" }')
    assert "no reference is used" in subject.supports(experiment(reference=None))


def test_order_can_be_asked_where_an_option_keeps_it(tmp_path):
    subject = described(tmp_path, options='{ shuffle = { on = "--shuffle 1", off = "--shuffle 0" } }', **SHUFFLED)
    assert subject.supports(experiment(batch=2)) is None
    assert subject.supports(experiment(batch=2, shuffle=True)) is None


def test_bfloat16_trainers_are_asked_in_float32(tmp_path):
    assert described(tmp_path, dtype='"bfloat16"').supports(experiment()) is None


def test_extras_are_appended_unless_the_combination_has_a_text_of_its_own(tmp_path):
    losses = '{ sigmoid = "", ipo = "-i", "+sft" = "-s {sft_weight}", "sigmoid+length_normalised" = "-n" }'
    file = described(tmp_path, losses=losses).file
    assert loss_texts(file, Objective("ipo", sft_weight=0.5)) == ["-i", "-s {sft_weight}"]
    assert loss_texts(file, Objective(length_normalised=True)) == ["-n"]
    assert loss_texts(file, Objective("ipo", length_normalised=True)) == "ipo+length_normalised"
