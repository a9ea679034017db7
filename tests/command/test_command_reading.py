"""The gradient read off the files is the closed form, whichever optimizer the command line uses."""

import json

import numpy as np
import pytest
from command_bench import COMMAND, described, experiment, put, seen
from command_closed_form import PAIRS, SIZE, gradient, slopes
from safetensors.numpy import load_file

from dpocheck.command.file import Update
from dpocheck.command.reading import from_adam
from dpocheck.experiment import Objective

U = 2.0**-24  # unit roundoff of float32, in which weights are stored


def rounding(asked, right) -> float:
    """The relative error of g = k*(start - end)/rate: the stored end is off by U*|logit|/k, the start is exact.

    Logits of the tables are at most 1, and a step moves them by rate * max|g|.
    """
    largest, rate = np.max(np.abs(right)), asked.recipe.learning_rate
    return U * (1 + rate * largest) / (rate * largest)


def adam_rounding(update: Update, right) -> float:
    """The same for G = epsilon*r / (a - b*|r|) with dr = U*a*(1 + |r|/a), k = the power of two above 4*epsilon.

    dG = epsilon*a*dr / (a - b*|r|)^2, largest where |r| is.
    """
    a = 1.0 if update.bias_correction else 1 - update.betas[0]
    b = 1.0 if update.bias_correction else np.sqrt(1 - update.betas[1])
    unit = update.epsilon / 2.0 ** np.ceil(np.log2(4 * update.epsilon))  # epsilon in a logit's gradient
    largest = np.max(np.abs(right))
    r = a * largest / (b * largest + unit)
    return unit * a * U * (a + r) / (a - b * r) ** 2 / largest


def expected(asked, pairs=PAIRS, kind="sigmoid", smoothing=0.0):
    reference = asked.policy if asked.reference is None else asked.reference
    slope = slopes(kind, asked.recipe.objective.beta, smoothing)
    return gradient(asked.policy.logits(), reference.logits(), pairs, slope)


def error(found, right) -> float:
    return float(np.max(np.abs(found - right)) / np.max(np.abs(right)))


OPTIMIZERS = {
    "sgd": ("", '{ kind = "sgd" }'),
    "adam with a large epsilon": (
        "--optim adam --eps 1e12 --b1 0 --b2 0", '{ kind = "adam", epsilon = 1e12, betas = [0.0, 0.0] }'),
    "adam with a large epsilon and betas": (
        "--optim adam --eps 1e12", '{ kind = "adam", epsilon = 1e12, betas = [0.9, 0.999] }'),
    "adam out of reach": ("--optim adam", '{ kind = "adam" }'),
    "adam without bias correction": (
        "--optim adam --no-correction", '{ kind = "adam", bias_correction = false }'),
    "adam, large epsilon, no bias correction": (
        "--optim adam --no-correction --eps 1e12", '{ kind = "adam", epsilon = 1e12, bias_correction = false }'),
    "adam with an epsilon of one": ("--optim adam --eps 1", '{ kind = "adam", epsilon = 1 }'),
    "lora on the head": ("--optim lora --rank {rank} --scale 2", '{ kind = "lora", scale = 2.0 }'),
}  # fmt: skip
LORA = '{ last = "final.safetensors", lora_a = "head.A", lora_b = "head.B" }'


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_read_as_the_gradient(name, tmp_path):
    more, update = OPTIMIZERS[name]
    parts = {"weights": LORA} if "lora" in name else {}
    subject = described(tmp_path, more=more, update=update, **parts)
    asked = experiment()
    assert subject.supports(asked) is None
    _, arrays = put(subject, asked, tmp_path)
    right = expected(asked)
    if "lora" in name:  # B is stored in float32 and multiplied by the inverse of A's transpose
        a = load_file(tmp_path / "run/out/final.safetensors")["head.A"].astype(np.float64)
        bound = U * np.linalg.cond(a)
    elif "epsilon = 1e12" not in update and "adam" in update:
        bound = adam_rounding(subject.file.update, right)
    else:
        bound = rounding(asked, right)
    assert error(seen(arrays, asked), right) < bound


def test_adam_inversion_undoes_the_first_step_of_adam():
    # By hand: beta1 = 1/2, beta2 = 3/4, epsilon = 1, G = -2: without bias correction m = -1, v = 1, r = -1/2;
    # with it m = -2, sqrt(v) = 2, r = -2/3.
    r = np.array([-0.5])
    assert from_adam(r, Update("adam", 1.0, (0.5, 0.75), False)) == pytest.approx([-2.0], rel=1e-15)
    r = np.array([-2 / 3])
    assert from_adam(r, Update("adam", 1.0, (0.5, 0.75), True)) == pytest.approx([-2.0], rel=1e-15)


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (2, 2)])
def test_accumulated_rows_give_the_gradient_of_the_batch(batch, accumulation, tmp_path):
    asked = experiment(batch=batch, accumulation=accumulation)
    _, arrays = put(described(tmp_path), asked, tmp_path)
    right = expected(asked)
    assert error(seen(arrays, asked), right) < rounding(asked, right)


def test_a_reference_that_is_the_policy_or_absent_is_the_policy(tmp_path):
    for number, reference in enumerate((1, None)):
        asked = experiment(reference=reference)
        _, arrays = put(described(tmp_path), asked, tmp_path / str(number))
        right = expected(asked)
        assert error(seen(arrays, asked), right) < rounding(asked, right)


def test_a_reference_is_handed_over_by_resuming(tmp_path):
    command = described(tmp_path).file.command.replace("{policy}", "{base}")
    subject = described(
        tmp_path, command=command, reference='{ how = "resume", option = "--resume {resume}" }',
        files="""{ "{resume}/state.json" = '{"step": 0, "batch": {batch}}' }""",
    )  # fmt: skip
    asked = experiment()
    _, arrays = put(subject, asked, tmp_path)
    right = expected(asked)
    assert error(seen(arrays, asked), right) < rounding(asked, right)
    assert (tmp_path / "run/resume/state.json").read_text() == '{"step": 0, "batch": 4}'


def test_the_loss_text_carries_its_parameters(tmp_path):
    asked = experiment(objective=Objective(beta=0.5, label_smoothing=0.125))
    _, arrays = put(described(tmp_path), asked, tmp_path)
    right = expected(asked, kind="cdpo", smoothing=0.125)
    assert error(seen(arrays, asked), right) < rounding(asked, right)


def test_clipping_is_handed_over_in_the_units_of_the_head(tmp_path):
    subject = described(tmp_path, options='{ clip_norm = { on = "--clip {clip_norm}", off = "--clip 0" } }')
    asked = experiment(clip_norm=0.0625)
    right = expected(asked)
    assert np.linalg.norm(right) > 0.0625
    _, arrays = put(subject, asked, tmp_path)
    clipped = right * 0.0625 / np.linalg.norm(right)
    assert error(seen(arrays, asked), clipped) < rounding(asked, clipped)


def test_weights_of_every_step_are_found_whether_counted_in_steps_or_in_micro_batches(tmp_path):
    asked = experiment(batch=2, accumulation=2, steps=3, learning_rate=8.0)
    _, arrays = put(described(tmp_path), asked, tmp_path)
    assert sorted(name for name in arrays if name.startswith("saved.")) == ["saved.1", "saved.2", "saved.3"]
    np.testing.assert_array_equal(arrays["saved.3"], arrays["head"])
    right = expected(asked)
    assert error(seen(arrays, asked, "saved.1"), right) < rounding(asked, right)


def test_bfloat16_weights_are_read_as_they_were_stored(tmp_path):
    asked = experiment()
    subject = described(tmp_path, more="--bf16", dtype='"bfloat16"')
    _, arrays = put(subject, asked, tmp_path)
    # The end is stored with a unit roundoff of 2^-9, and no logit is above 4.
    found = seen(arrays, asked)
    assert np.max(np.abs(found - expected(asked))) <= 4 * 2.0**-9 / 16
    assert subject.precision == "bfloat16"
    assert arrays["head"].dtype == np.float32


def test_a_head_by_another_name_is_found(tmp_path):
    weights = '{ last = "final.safetensors", head = "output.weight" }'
    asked = experiment()
    reply, arrays = put(described(tmp_path, more="--head output.weight", weights=weights), asked, tmp_path)
    right = expected(asked)
    assert error(seen(arrays, asked), right) < rounding(asked, right)
    assert reply["fields"]["moved"]["lm_head.weight"] > 0


@pytest.mark.parametrize("style", ["prompt-chosen-rejected", "messages", "hh"])
def test_rows_reach_the_trainer_in_its_own_format(style, tmp_path):
    more = {"messages": "--format messages", "hh": "--format hh"}.get(style, "")
    rows = f'{{ file = "train.jsonl", also = "valid.jsonl", format = "{style}", order = "kept" }}'
    asked = experiment()
    _, arrays = put(described(tmp_path, more=more, rows=rows), asked, tmp_path)
    right = expected(asked)
    assert error(seen(arrays, asked), right) < rounding(asked, right)
    assert (tmp_path / "run/rows/valid.jsonl").read_bytes() == (tmp_path / "run/rows/train.jsonl").read_bytes()


def test_digests_tell_the_start_from_the_end(tmp_path):
    reply, arrays = put(described(tmp_path), experiment(), tmp_path)
    fields = reply["fields"]
    assert fields["digest"] != fields["start_digest"]
    assert [name for name, size in fields["moved"].items() if size] == ["lm_head.weight"]
    assert arrays["start"].shape == (SIZE, SIZE)


def test_a_trainer_that_needs_a_chat_template_is_given_one_where_the_tokenizer_has_none(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = f'{{ file = "train.jsonl", order = "kept", template = "{template}" }}'
    subject = described(tmp_path, rows=rows)
    put(subject, experiment(), tmp_path)
    given = json.loads((tmp_path / "run/policy/tokenizer_config.json").read_text())
    assert given["chat_template"] == template
    assert "chat_template" not in json.loads((tmp_path / "policy/tokenizer_config.json").read_text())
    assert any(template in stub for stub in subject.stubs)


def test_what_people_run_is_the_plain_command_without_what_is_switched_off(tmp_path):
    options = '{ clip_norm = { on = "--clip {clip_norm}", off = "--no-such-option" } }'
    subject = described(tmp_path, options=options, plain=f'"""{COMMAND} --clip 64"""')
    asked = experiment(defaults=True)
    right = expected(asked)
    right *= 64 / (1024 * np.linalg.norm(right))  # the trainer clips the head's gradient, k = 2^10 times the logits'
    _, arrays = put(subject, asked, tmp_path)
    assert error(seen(arrays, asked), right) < rounding(asked, right)
