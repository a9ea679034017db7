"""Does a stand-alone script show the failure where dpocheck is not installed?"""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dpocheck.experiment import Body, Objective, Recipe, Row, Sequence, Table, Template, Tokenizer, TrainExperiment
from dpocheck.literal import literal
from dpocheck.probes import tables
from dpocheck.probes.tokenizers import plain_words
from dpocheck.report.script import whole_runs, writer
from dpocheck.report.train_script import train_script, translated
from dpocheck.transports.isolated import SubjectError, Worker

TINY = f"{Path(__file__).parent / 'tiny_trainer.py'}:Adapter"
WORDS = plain_words(16)
# after a: b has logit 1 under the policy, c has logit 1 under the reference; after b and c EOS is likely
POLICY = Table(16, 0.0, ((0, 1, 1.0), (1, 14, 3.0), (2, 14, 3.0)))
REFERENCE = Table(16, 0.0, ((0, 2, 1.0), (1, 14, 3.0), (2, 14, 3.0)))
RUN = TrainExperiment(POLICY, REFERENCE, WORDS, (Row("a", " b", " c"),), Recipe(batch=1))


@pytest.fixture(autouse=True)
def undeclared(monkeypatch):
    """The results here are made up: what the real check of that id declares is not looked at, loaded or not."""
    monkeypatch.setattr("dpocheck.check.CHECKS", {})


@pytest.fixture(scope="module", autouse=True)
def worker(tmp_path_factory):
    with Worker(TINY, folder=tmp_path_factory.mktemp("worker")) as process:
        Asked.worker = process
        yield


class Asked:
    """A subject's answer to what a script needs, from the one worker of this module."""

    worker: Worker

    def __init__(self, subject: str) -> None:
        self.subject = subject

    def __call__(self, question):
        try:
            return self.worker.call("standalone", {"subject": self.subject} | question)[0]
        except SubjectError:
            return {}


def numbers(text: str, what: str) -> tuple[float, float]:
    found = re.search(rf"{re.escape(what)} +observed +(\S+) +expected +(\S+)", text)
    assert found, text
    return float(found[1]), float(found[2])


def failing(report, *experiments):
    return replace(report.results[1], experiments=experiments)


def script_of(report, *experiments, subject=TINY):
    header = replace(report.header, subject=subject, name="tiny", subject_version="1")
    report = replace(report, header=header, results=(failing(report, *experiments),))
    return writer(report, subject, Asked(subject))(report.results[0], report)


def test_the_block_blocks(alone):
    with pytest.raises(AssertionError, match="dpocheck is blocked"):
        alone("import dpocheck.adapter", 0)


def test_an_adapters_failure_runs_without_dpocheck_and_shows_both_numbers(report, alone):
    text = script_of(report, RUN)
    assert "import dpocheck" not in text
    assert "from dpocheck" not in text
    shown = alone(text)
    # h without reference = log-odds of b over c under the policy = 1; with it 1 − (−1) = 2: loss −log σ(0.1) and
    # −log σ(0.2)
    observed, expected = numbers(shown, "loss of train, step 1")
    assert observed == pytest.approx(0.6443967, abs=2e-6)
    assert expected == pytest.approx(0.5981389, abs=2e-6)
    assert "<-- not so" in next(row for row in shown.splitlines() if "loss of train" in row)


@pytest.mark.long
def test_a_run_on_two_processes_starts_them_and_the_first_shows(report, alone):
    two = replace(RUN, rows=RUN.rows * 2, recipe=replace(RUN.recipe, world_size=2))
    shown = alone(script_of(report, two))
    assert shown.count("Done: ") == 1
    assert "2 processes" in shown
    observed, expected = numbers(shown, "loss of train, step 1")  # of the same two rows, so as above
    assert observed == pytest.approx(0.6443967, abs=2e-6)
    assert expected == pytest.approx(0.5981389, abs=2e-6)


@pytest.mark.long
def test_a_run_on_two_processes_that_breaks_off_shows_no_numbers(report, alone):
    adam = Recipe(batch=1, world_size=2, optimizer="adamw")  # which the tiny trainer refuses
    text = script_of(report, replace(RUN, recipe=adam))
    assert "launch()" in text
    assert "expected" not in alone(text, 2)


def test_the_script_says_what_was_claimed_seen_and_needed(report):
    text = script_of(report, RUN)
    head = text.partition("\nfrom __future__")[0]
    for part in ("# REF-IS-POLICY-GIVEN: REF-IS-POLICY-GIVEN holds.", "observed 1.3180, expected 0.69315",
                 "the reference is re-read from disk", "python ref_is_policy_given.py", "Seen with tiny"):  # fmt: skip
        assert part in head
    assert max(map(len, text.splitlines())) <= 125


def test_the_checkpoint_a_script_writes_is_the_probes_own(report, tmp_path):
    """Weights, configuration and tokenizer are equal to those the audit used, for every kind of body and tokenizer."""
    import json

    import numpy as np
    from safetensors.numpy import load_file
    from transformers import AutoConfig, AutoTokenizer

    chat = Template(("<u>", "\n"), ("<a>", "\n"), ("", ""), "<a>", eos=True)
    letters = Tokenizer(("a", "b", " ", "ab"), 16, kind="characters", merge=("a", "b"), pad_is_eos=True, template=chat)
    cases = [
        (RUN, {}),
        (replace(RUN, body=Body("glass")), {}),
        (replace(RUN, body=Body("clock", attention_dropout=0.5), tokenizer=replace(WORDS, adds_bos=True)), {}),
        (replace(RUN, policy=None, reference=None, body=Body("speaking", layers=2)), {}),
        (replace(RUN, tokenizer=letters, recipe=Recipe(dtype="float64")), {}),
    ]
    for number, (run, _) in enumerate(cases):
        text = train_script(failing(report, run), report, (run,), {"train": ["def train(*_):\n    return None, []"]})
        scope: dict = {"__name__": "script"}
        exec(compile(text, f"script{number}", "exec"), scope)
        mine, theirs = tmp_path / f"mine{number}", tmp_path / f"theirs{number}"
        scope["write"](mine, scope["RUN_1"]["policy"], scope["RUN_1"])
        tables.write_checkpoint(theirs, run.policy, run.tokenizer, run.body, run.recipe.dtype)
        ours, due = load_file(mine / "model.safetensors"), load_file(theirs / "model.safetensors")
        assert ours.keys() == due.keys()
        for name in due:
            assert ours[name].dtype == due[name].dtype
            assert np.array_equal(ours[name], due[name]), (number, name)
        written, wanted = (AutoConfig.from_pretrained(folder) for folder in (mine, theirs))
        for name in json.loads((theirs / "config.json").read_text()):
            if name not in ("torch_dtype", "rope_theta"):  # which releases of transformers rename
                assert getattr(written, name) == getattr(wanted, name), (number, name)
        written, wanted = (AutoTokenizer.from_pretrained(folder) for folder in (mine, theirs))
        assert written.get_vocab() == wanted.get_vocab()
        assert written.special_tokens_map == wanted.special_tokens_map
        assert written.chat_template == wanted.chat_template
        for sample in ("a b", "ab  </s>a", "b"):
            assert written(sample)["input_ids"] == wanted(sample)["input_ids"], (number, sample)
            assert written.decode(written(sample)["input_ids"]) == wanted.decode(wanted(sample)["input_ids"])


@pytest.mark.long
def test_a_hook_is_taken_as_the_trainers_own_text_and_equal_recipes_share_it(report, alone):
    hook = (
        "def train(policy_folder, reference_folder, tokenizer_folder, rows, eval_rows, out):\n"
        "    model = load(policy_folder)\n"
        "    return model, [{'step': 1, 'loss': 0.5}]\n"
    )
    changed = replace(RUN, recipe=replace(RUN.recipe, batch=2))
    text = train_script(failing(report, RUN, changed), report, (RUN, changed), {"train": [hook, hook]})
    assert text.count("def train(") == 1
    assert text.count("def train_") == 0
    shown = alone(text)
    assert numbers(shown, "loss of train, step 1")[0] == 0.5
    assert "run 2 of 2" in shown
    two = train_script(failing(report, RUN, changed), report, (RUN, changed), {"train": [hook, hook + "\n# other"]})
    assert "def train_2(" in two


@pytest.mark.long
def test_a_policy_changed_in_memory_is_changed_by_the_script_too(report, alone):
    edited = replace(RUN, edited=REFERENCE, reference=None)
    hook = (
        "def train(policy_folder, reference_folder, tokenizer_folder, rows, eval_rows, out):\n"
        "    from safetensors.torch import load_file as disk\n"
        "    now = load(policy_folder).lm_head.weight * K\n"
        "    then = disk(policy_folder / 'model.safetensors')['lm_head.weight'] * K\n"
        "    print('now', float(now[1, 0]), float(now[2, 0]), 'disk', float(then[1, 0]), float(then[2, 0]),\n"
        "          file=sys.__stdout__)\n"
        "    return load(policy_folder), []\n"
    )
    text = train_script(failing(report, edited), report, (edited,), {"train": [hook]})
    assert "now 1.0 0.0 disk 0.0 1.0" in alone(text)


def test_runs_of_a_sequence_share_their_folder(report):
    pair = Sequence((RUN, replace(RUN, recipe=replace(RUN.recipe, resume_from=1))))
    text = script_of(report, pair)
    assert 'folder.parent / "shared"' in text
    assert text.count("mkdtemp") == 1
    assert "RUN_2 = RUN_1 | {" in text


def test_a_recipe_is_handed_over_in_the_trainers_own_units():
    # k = 2^10, so a rate of 16 in logits is 16 / 2^20
    assert translated(RUN).learning_rate == 16 / 2**20


def test_a_fine_experiment_is_shown_by_the_runs_it_was_derived_from(report):
    from dpocheck.experiment import LossExperiment

    loss = LossExperiment((-3.5,), (-6.0,), (-4.0,), (-5.0,), dtype="float32")
    (run, *_) = whole_runs(failing(report, loss), report)
    assert isinstance(run, TrainExperiment)


def test_no_script_is_made_of_a_live_object_or_of_our_own_parts(report):
    live = replace(report, header=replace(report.header, isolation="none"))
    assert writer(live, TINY, Asked(TINY))(failing(live, RUN), live) is None
    assert script_of(report, RUN, subject="zoo:anything") is None


def test_a_subject_that_cannot_be_asked_gives_no_script_and_no_error():
    assert Asked("no.such.module:Adapter")({"experiments": [], "recipes": [], "asked": []}) == {}


def test_hostile_text_stays_text(hostile):
    text = script_of(hostile, replace(RUN, rows=(Row('a"""\n\x00', "\\", "' # \ud800"),)))
    ast.parse(text)
    assert "owned" not in text


@pytest.mark.parametrize(
    "value",
    [[1.0, float("inf"), -float("inf")], {"a": [(0, 1, 0.5)] * 40, "b": {"c": None}}, ("x",), [], "é\ud800\n", {1: ()}],
)
def test_a_literal_reads_back_equal(value):
    text = literal(value, 60)
    assert eval(text) == value
    assert all(len(row) <= 75 for row in text.splitlines())


# ------------------------------------------------------------------------------------------------------ command lines


@pytest.mark.long
def test_a_command_line_is_run_by_the_script_with_the_same_arguments(report, alone):
    pytest.importorskip("trl", reason="the command line under test is TRL's")
    toml = Path(__file__).parents[2] / "conformance" / "commands" / "trl.toml"
    words = plain_words(64)
    policy = Table(64, 0.0, ((0, 1, 1.0), (1, words.eos, 3.0), (2, words.eos, 3.0)))
    reference = Table(64, 0.0, ((0, 2, 1.0), (1, words.eos, 3.0), (2, words.eos, 3.0)))
    run = TrainExperiment(
        policy, reference, words, (Row("a", " b", " c"),), Recipe(Objective(beta=0.1), learning_rate=2.0**14)
    )
    text = script_of(report, run, subject=str(toml))
    assert "/tmp/dpocheck-" not in text  # nothing of the folder it was made in
    # policy log-odds 1, reference −1, h = 2: the slope in the chosen logit is −β σ(−0.2) = −0.1 · 0.450166
    shown = alone(text, 0)
    assert numbers(shown, "gradient of 'b' after 'a'") == pytest.approx((-0.0450166, -0.0450166), abs=1e-6)


# ------------------------------------------------------------------------------------------------------ bare functions

FUNCTIONS = Path(__file__).parent / "wrong_functions.py"


def function_report(report, name, route, *experiments):
    header = replace(report.header, subject=f"{FUNCTIONS}:{name}", name=name, subject_version=None, route=route)
    return replace(report, header=header, results=(failing(report, *experiments),))


def shown_by(report, name, route, experiment, alone):
    report = function_report(report, name, route, experiment)
    text = writer(report, report.header.subject, Asked(report.header.subject))(report.results[0], report)
    assert "dpocheck" not in text.partition("\nimport")[2]
    return alone(text)


def test_a_loss_is_called_with_the_numbers_and_shown_with_its_slopes(report, alone):
    from dpocheck.experiment import LossExperiment

    numbers_ = LossExperiment((-3.5,), (-6.0,), (-4.0,), (-5.0,), Objective(beta=0.5))
    shown = shown_by(report, "dpo_loss", "loss", numbers_, alone)
    # due: h = 1.5, −log σ(0.75) = 0.386871; written: h = −3.5 + 4 + 6 + 5 = 11.5, −log σ(5.75) = 0.0031777
    assert numbers(shown, "loss of pair") == pytest.approx((0.0031777, 0.386871), abs=1e-6)
    # −β σ(−0.75) = −0.5 · 0.320821
    assert numbers(shown, "slope in policy_chosen_logps")[1] == pytest.approx(-0.160411, abs=1e-6)


@pytest.mark.long
def test_log_probs_from_logits_and_from_a_model_are_shown_beside_those_due(report, alone):
    # after 0: token 1 has logit log 3 of four, so log 3/6 = −0.693147; after 1: 3 likewise. Sum −1.386294, mean half.
    from math import log

    from dpocheck.experiment import LogpExperiment, TokenRow

    table = Table(4, 0.0, ((0, 1, log(3.0)), (1, 3, log(3.0))))
    rows = (TokenRow((0, 1, 3), (1, 1, 1), (0, 1, 1)),)
    for name in ("get_batch_logps", "response_logprob"):
        shown = shown_by(report, name, "sequence_logps", LogpExperiment(table, rows), alone)
        assert numbers(shown, "log-prob of row") == pytest.approx((-0.693147, -1.386294), abs=1e-5)


@pytest.mark.long
def test_a_step_is_shown_with_its_loss_and_gradient(report, alone):
    from dpocheck.experiment import Pair, StepExperiment

    step = StepExperiment(
        Table(16), Table(16), (Pair((0,), (1, 14), (2, 14)),), Objective(beta=0.5), pad=15, eos=14
    )
    shown = shown_by(report, "dpo_step", "step", step, alone)
    assert numbers(shown, "loss") == pytest.approx((0.693147, 0.693147), abs=1e-5)
    # due: −β/2 = −0.25 on the chosen token; written: half the gradient
    assert numbers(shown, "d loss / d logit of token 1 after 0:") == pytest.approx((-0.125, -0.25), abs=1e-6)


def test_a_method_and_a_call_that_cannot_be_written_give_no_script(report):
    from dpocheck.experiment import LossExperiment

    experiment = LossExperiment((-3.5,), (-6.0,), (-4.0,), (-5.0,))
    report = function_report(report, "Loss", "loss", experiment)
    ask = Asked(report.header.subject)
    assert writer(report, report.header.subject, ask)(report.results[0], report) is None
