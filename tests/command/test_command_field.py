"""What real trainers need of a description: rows drawn anew, digits that are printed, a reference that is fixed."""

from dataclasses import replace

import numpy as np
import pytest
from command_bench import COMMAND, described, experiment, put, seen

from dpocheck import smoke
from dpocheck.command import CommandError
from dpocheck.command.file import Log
from dpocheck.command.log import rounding
from dpocheck.command.subject import record
from dpocheck.experiment import Row
from dpocheck.open import open_subject
from dpocheck.subject import UNIT, Subject
from dpocheck.transports import InFiles

LORA = '{ last = "final.safetensors", lora_a = "head.A", lora_b = "head.B" }'


def test_where_batches_are_drawn_anew_only_one_batch_of_all_rows_has_a_known_content(tmp_path):
    subject = described(tmp_path, rows='{ file = "train.jsonl", order = "drawn" }')
    assert subject.supports(experiment()) is None
    assert "draws each batch anew" in subject.supports(experiment(batch=2, accumulation=2))
    assert subject.supports(experiment(batch=2, accumulation=2, shuffle=True)) is None


def test_rows_without_a_prompt_are_asked_only_where_the_trainer_says_it_takes_them(tmp_path):
    asked = replace(experiment(), rows=(Row(None, "a b", "a c"),) * 4)
    assert "without a prompt column" in described(tmp_path).supports(asked)
    optional = '{ file = "train.jsonl", order = "kept", prompt = "optional" }'
    assert described(tmp_path, rows=optional).supports(asked) is None


@pytest.mark.parametrize("text", ["a b ", "\na b", "  a b"])
def test_white_space_around_a_text_is_not_asked_of_chat_rows(text, tmp_path):
    subject = described(tmp_path, rows='{ file = "train.jsonl", format = "messages", order = "kept" }')
    assert "white space" in subject.supports(replace(experiment(), rows=(Row("a", text, " c"),) * 4))
    assert subject.supports(replace(experiment(), rows=(Row("a", " a b", " c"),) * 4)) is None


def test_conversations_hold_the_prompt_in_both_columns():
    user = {"role": "user", "content": "a"}
    assert record(Row("a", " b", " c"), "conversations") == {
        "chosen": [user, {"role": "assistant", "content": "b"}],
        "rejected": [user, {"role": "assistant", "content": "c"}],
    }


@pytest.mark.parametrize(
    ("log", "value", "half"),
    [
        (Log("x", digits=3), 12.3, 0.05),  # the third digit is the first place after the point
        (Log("x", digits=3), 0.0123, 0.00005),
        (Log("x", decimals=3), 12.3, 0.0005),
        (Log("x", digits=2, decimals=3), 12.0, 0.5),  # the coarser of the two
    ],
)
def test_half_a_unit_of_the_last_place_printed_is_allowed_for(log, value, half):
    entries = [{"step": 1, "split": "train", "metrics": {"loss": value}}]
    assert rounding(log, entries) == {"history.train.loss": pytest.approx(half, rel=1e-12)}


def test_what_the_log_rounds_reaches_the_bound_of_the_observation(tmp_path):
    log = r"{ step = 'loss (?P<loss>\S+)', decimals = 2 }"
    fields = put(described(tmp_path, log=log), experiment(), tmp_path)[0]["fields"]
    assert fields["floor"] == {"history.train.loss": pytest.approx(0.005)}


def test_a_default_that_names_a_variable_is_its_value_and_its_absence_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_PLACE", "/a/checkout")
    assert described(tmp_path, defaults='{ checkout = "$DPO_PLACE" }').file.defaults == {"checkout": "/a/checkout"}
    monkeypatch.delenv("DPO_PLACE")
    with pytest.raises(CommandError, match=r"defaults.checkout is '\$DPO_PLACE', and the environment has no DPO_PLACE"):
        described(tmp_path, defaults='{ checkout = "$DPO_PLACE" }')


def test_the_last_weights_may_be_those_of_the_last_step(tmp_path):
    weights = '{ last = "{step}.safetensors", step = "{step}.safetensors", counts = "microsteps" }'
    asked = experiment(steps=2, learning_rate=8.0)
    found = [put(described(tmp_path / name, **parts), asked, tmp_path / name)[1]["head"]
             for name, parts in (("last", {"weights": weights}), ("ordinary", {}))]  # fmt: skip
    assert np.array_equal(*found)


def test_a_trainer_that_counts_epochs_is_asked_for_whole_ones(tmp_path):
    command = COMMAND.replace("--steps {steps}", "--epochs {passes}")
    subject = described(tmp_path, command=command, options='{ steps = "" }')
    assert subject.supports(experiment(steps=3)) is None  # four rows in one batch: a step is a pass
    asked = experiment(batch=2, steps=3)  # three steps of two of four rows: a pass and a half
    assert "counts epochs" in subject.supports(asked)


def test_a_gradient_read_through_an_adapter_carries_its_rounding(tmp_path):
    subject = described(
        tmp_path, more="--optim lora --rank {rank} --scale 2", update='{ kind = "lora", scale = 2.0 }', weights=LORA
    )
    asked = experiment()
    reply, arrays = put(subject, asked, tmp_path)
    gradient, floor = seen(arrays, asked), reply["fields"]["floor"]["gradient"]
    rest = np.max(np.abs(gradient.sum(axis=1)))  # each row of a gradient of log-softmaxes adds up to zero
    assert rest < np.sqrt(len(gradient)) * floor
    assert floor < 1e-3 * np.max(np.abs(gradient))


@pytest.mark.parametrize("how", ["steps", "adapter-off", "none"])
def test_where_no_reference_can_be_handed_over_experiments_are_put_with_the_policy_as_reference(how, tmp_path):
    subject = Subject("fake", InFiles(described(tmp_path, reference=f'{{ how = "{how}" }}')), tmp_path)
    own = subject.own(experiment(), "GRAD-IDENTITY")
    assert own.reference == own.policy == experiment().policy
    assert subject.transport.refuses(own) is None
    assert subject.own(experiment(), "REF-CACHE-FRESH") == experiment()  # it needs two models, and is refused


def test_a_missing_interpreter_is_said(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(
        'command = "x"\npython = "/nowhere/python"\nrows = { file = "a" }\nweights = { last = "b" }\n'
        'losses = { sigmoid = "" }\n'
    )
    with pytest.raises(Exception, match="is no program"):
        open_subject(path, tmp_path)


def test_a_run_that_is_ended_leaves_no_lock_that_the_next_would_wait_for(tmp_path):
    import sys

    from dpocheck.command.run import CommandFailed, run

    lock = tmp_path / "extensions" / "adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    with pytest.raises(CommandFailed, match="still running"):
        run([sys.executable, "-c", "input = __import__('time').sleep(60)"], environment=environment, folder=tmp_path,
            seconds=0.5, memory_gb=1)  # fmt: skip
    assert not lock.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_that_a_command_line_declares_is_its_precision_at_least(tmp_path, dtype):
    """A gradient whose numbers have many digits may still come from a coarse forward pass: it is not seen in them."""
    subject = Subject("fake", InFiles(described(tmp_path, dtype=f'"{dtype}"')), tmp_path)
    assert smoke.test(subject) is None
    (asked,) = smoke.experiments(subject)
    assert subject.precision(asked) == UNIT[dtype]
