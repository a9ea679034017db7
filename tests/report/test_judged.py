"""Does a script show what its check judged: two runs beside each other, a model's state, or values and predictions?"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from dpocheck import checks  # noqa: F401  (declares them)
from dpocheck.adapter import TrainOut
from dpocheck.experiment import Body, Recipe, Row, Sequence, Table, TrainExperiment
from dpocheck.probes.tokenizers import plain_words
from dpocheck.report import calls, judged
from dpocheck.report.train_script import train_script
from dpocheck.worker import trace

WORDS = plain_words(16)
POLICY = Table(16, 0.0, ((0, 1, 1.0), (1, 14, 3.0), (2, 14, 3.0)))
REFERENCE = Table(16, 0.0, ((0, 2, 1.0), (1, 14, 3.0), (2, 14, 3.0)))
RUN = TrainExperiment(POLICY, REFERENCE, WORDS, (Row("a", " b", " c"),), Recipe(batch=1, learning_rate=16.0))
HEAD = "def train(policy_folder, reference_folder, tokenizer_folder, rows, eval_rows, out):\n"
FORWARD = "    model({name}=torch.tensor([[0, 1, 14]]))\n"


def script(report, id, *experiments, train):
    result = replace(report.results[1], id=id, experiments=experiments, where="")
    runs = tuple(run for one in experiments for run in (one.runs if isinstance(one, Sequence) else (one,)))
    return train_script(result, report, runs, {"train": train if isinstance(train, list) else [train] * len(runs)})


def moved(by: float) -> str:
    """A trainer that changes one logit."""
    return (
        HEAD + "    model = load(policy_folder)\n    with torch.no_grad():\n"
        f"        model.lm_head.weight[2, 1] += {by} / K\n    return model, []\n"
    )


def test_two_runs_that_should_agree_stand_beside_each_other(report, alone):
    four = replace(RUN, recipe=replace(RUN.recipe, accumulation=4))
    shown = alone(script(report, "ACCUM-TOKENS", RUN, four, train=[moved(-4.0), moved(-2.0)]))
    assert "run A: accumulation 1" in shown
    assert "run B: accumulation 4" in shown
    # the gradient is (before − after) / 16: 4 / 16 and 2 / 16
    row = next(row for row in shown.splitlines() if "not the same" in row)
    assert " ".join(row.partition("<--")[0].split()) == "gradient of 'c' after 'b' run A 0.25 run B 0.125"
    assert "Observed: 1 of 256 numbers differ." in shown


@pytest.mark.long
def test_two_runs_that_agree_exit_with_0(report, alone):
    shown = alone(script(report, "ACCUM-TOKENS", RUN, RUN, train=moved(-4.0)), 0)
    assert "they are the same" in shown
    assert "not the same" not in shown


@pytest.mark.long
def test_an_option_that_changes_nothing_is_shown_by_both_runs_and_the_change_due(report, alone):
    smooth = replace(RUN, recipe=replace(RUN.recipe, objective=replace(RUN.recipe.objective, label_smoothing=0.25)))
    shown = alone(script(report, "OPTION-ACTS", RUN, smooth, train=moved(-4.0)))
    assert "run B: label_smoothing 0.25" in shown
    assert "the two runs are the same" in shown
    # cDPO adds eps beta to the slope of the chosen logit: 0.25 · 0.1
    row = next(row for row in shown.splitlines() if "'b' after 'a'" in row)
    assert float(row.split()[-1]) == pytest.approx(0.025, abs=1e-6)
    acts = script(report, "OPTION-ACTS", RUN, smooth, train=[moved(-4.0), moved(0.0)])
    assert "the two runs differ" in alone(acts, 0)


@pytest.mark.long
@pytest.mark.parametrize(("mode", "code"), [("train", 1), ("eval", 0)])
def test_dropout_is_shown_by_the_random_numbers_of_a_forward(report, alone, mode, code):
    run = replace(RUN, body=Body("glass", attention_dropout=0.5))
    model = f"    model = load(policy_folder).{mode}()\n"
    hook = HEAD + model + FORWARD.format(name="input_ids") + "    return model, []\n"
    shown = alone(script(report, "POLICY-NO-DROPOUT", run, train=hook), code)
    assert f"of 1 forwards of the policy, those that drew random numbers            observed          {code}" in shown


@pytest.mark.long
def test_a_reference_that_moves_or_builds_a_graph_is_shown(report, alone):
    reference = "    model = load(reference_folder)\n"
    moves = reference + "    with torch.no_grad():\n        model.lm_head.weight += 1\n"
    shown = alone(script(report, "REF-FROZEN", RUN, train=HEAD + moves + "    return model, []\n"))
    assert "parameters of the reference that changed" in shown
    graph = reference + FORWARD.format(name="input_ids")
    shown = alone(script(report, "REF-NO-GRAPH", RUN, train=HEAD + graph + "    return model, []\n"))
    assert "of 1 forwards of the reference, those that built a graph" in shown
    quiet = reference + "    with torch.no_grad():\n    " + FORWARD.format(name="input_ids")
    alone(script(report, "REF-NO-GRAPH", RUN, train=HEAD + quiet + "    return model, []\n"), 0)


def test_a_command_line_shows_no_state(report):
    result = replace(report.results[1], id="REF-FROZEN", experiments=(RUN,))
    assert train_script(result, report, (RUN,), {"train": [moved(0.0)], "folders": True}) is None


def test_a_check_of_evaluation_shows_no_gradient_and_one_of_tokens_no_log(report):
    held = replace(RUN, evaluation=(("held", RUN.rows),), recipe=replace(RUN.recipe, learning_rate=2.0**-30))
    evaluation = replace(report.results[1], id="EVAL-BATCH", where="rewards/accuracies of held, step 1")
    (numbers,) = judged.predicted(evaluation, (held,), report)
    assert next(iter(numbers)) == "rewards/accuracies of held, step 1"
    assert all(" of held, step 1" in name for name in numbers)
    tokens = replace(report.results[1], id="ROWS-ROUND-TRIP", where="gradient of 'c' after 'a'")
    (numbers,) = judged.predicted(tokens, (RUN,), report)
    assert next(iter(numbers)) == "gradient of 'c' after 'a'"
    assert all(name.startswith("gradient of ") for name in numbers)


def test_a_step_too_small_to_show_its_gradient_is_not_read_as_one():
    assert judged.rate(RUN) == 16.0
    assert judged.rate(replace(RUN, recipe=replace(RUN.recipe, learning_rate=2.0**-30))) is None


def test_a_small_finding_gets_a_limit_between_it_and_rounding(report):
    small = replace(report.results[1], error=1e-5, bound=1e-7, experiments=(RUN,))
    assert judged.limit(small) == pytest.approx(1e-6)
    assert judged.limit(replace(small, error=0.1)) == 1e-4


# -------------------------------------------------------------------------------------------------------- traced calls


@pytest.fixture
def library(monkeypatch):
    """A package `toylib` with a configuration that has a default and a trainer."""
    module = ModuleType("toylib")

    class ToyConfig:
        def __init__(self, folder, rate=0.5, batch=8): ...

    class ToyTrainer:
        def __init__(self, model, config, rows): ...

        def train(self, resume=None):
            raise AssertionError("nothing is trained while calls are followed")

    module.ToyConfig, module.ToyTrainer = ToyConfig, ToyTrainer
    monkeypatch.setitem(sys.modules, "toylib", module)
    return module


class Adapter:
    package = "toylib"

    def train(self, probe, rows, recipe, folder):
        from toylib import ToyConfig, ToyTrainer

        config = ToyConfig(str(folder / "x"), rate=recipe.learning_rate, batch=recipe.batch)
        trainer = ToyTrainer(model=probe.policy(), config=config, rows=rows["train"])
        trainer.train(resume=None)
        return TrainOut(trainer.model, [dict(line) for line in trainer.log])


ASKED = {"reference": True, "sets": [], "on_disk": False}


def test_calls_are_followed_without_what_is_default(library):
    text = calls.function(trace.traced(Adapter(), ASKED, Recipe(learning_rate=0.5, batch=2)))
    assert text.split("\n\n") == [
        "def train(policy_folder, reference_folder, tokenizer_folder, rows, eval_rows, out):\n"
        "    from toylib import ToyConfig, ToyTrainer",
        '    config = ToyConfig(str(out / "x"), batch=2)\n'
        "    trainer = ToyTrainer(model=load(policy_folder), config=config, rows=rows)\n"
        "    trainer.train()\n"
        "    return trainer.model, trainer.log\n",
    ]
    assert sys.modules["toylib"] is library


def test_runs_that_differ_in_one_setting_share_their_text(library):
    runs = [trace.traced(Adapter(), ASKED, Recipe(batch=batch)) for batch in (2, 4)]
    text, own = calls.merged(runs)
    assert own == [{"batch": "2"}, {"batch": "4"}]
    assert "**options" in text.splitlines()[0]
    assert "batch" not in text


def test_an_adapter_that_computes_with_its_library_is_not_followed(library):
    class Computing(Adapter):
        def train(self, probe, rows, recipe, folder):
            from toylib import ToyConfig

            return TrainOut(ToyConfig(folder).size + 1)

    assert trace.traced(Computing(), ASKED, Recipe()) is None
    assert trace.traced(SimpleNamespace(package=None), ASKED, Recipe()) is None


# ---------------------------------------------------------------------------------------------------------------- TRL

SEVEN = {
    "REF-IS-POLICY-GIVEN": "loss of train, step 1", "ROWS-ROUND-TRIP": "gradient of 'd' after 'b'",
    "EVAL-BATCH": "rewards/accuracies of held, step 1", "OPTION-ACTS": "the two runs are the same",
    "ACCUM-TOKENS": "run B: batch 1, accumulation 4", "POLICY-NO-DROPOUT": "those that drew random numbers",
    "LOSS-DIVERGENCE": "alpha 0.25",
}  # fmt: skip


@pytest.fixture(scope="module")
def scripts():
    """The scripts of the seven findings."""
    trl = pytest.importorskip("trl", reason="the trainer under test is TRL")
    if trl.__version__ != "1.16.0":
        pytest.skip(f"the findings are those of TRL 1.16.0, this is {trl.__version__}")
    from dpocheck.report.script import writer
    from dpocheck.runner import Options, audited

    options = Options("trl", only=tuple(SEVEN))
    with audited(options) as (report, ask):
        make = writer(report, options, ask)
        return {result.id: make(result, report) for result in report.results if result.verdict == "fail"}


@pytest.mark.long
@pytest.mark.parametrize("id", SEVEN)
def test_a_finding_in_trl_is_shown_without_dpocheck(scripts, alone, id):
    text = scripts[id]
    assert "dpocheck" not in text
    assert len(text.splitlines()) <= 250
    shown = alone(text)
    assert SEVEN[id] in shown
    assert "Expected: " in shown
    assert len(shown.splitlines()) <= 16


def test_a_relation_is_the_checks_own_word():
    assert judged.kind(SimpleNamespace(id="ACCUM-TOKENS", experiments=(RUN, RUN)), (RUN, RUN)) == "same"
    assert judged.kind(SimpleNamespace(id="LOSS-ZERO-MARGIN", experiments=(RUN,)), (RUN,)) == "prediction"
