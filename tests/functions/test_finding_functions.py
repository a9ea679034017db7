"""Is a function found in a file by its text alone, and is a refusal clear?"""

from __future__ import annotations

import subprocess
import sys

import pytest
from asking import SUBJECTS, ask

from dpocheck.experiment import LogpExperiment, LossExperiment, Objective, Table, TokenRow
from dpocheck.functions import as_adapter, find
from dpocheck.functions.find import candidates, recognise
from dpocheck.functions.parameters import NotRecognised
from dpocheck.worker import loading
from dpocheck.worker.failure import BadAnswer

AWKWARD = SUBJECTS / "awkward.py"
TWO = LossExperiment((-1.0, -2.0), (-2.0, -3.5), (-1.5, -2.0), (-1.0, -3.0), Objective(beta=0.5))


def test_a_script_is_read_and_not_run():
    found = {one.name: one.form for one in candidates(AWKWARD)}
    assert found == {
        "kwargs_dpo_loss": "loss",
        "positional_dpo_loss": "loss",
        "get_batch_logps": "sequence_logps",
        "fixed_loss": "loss",
        "keyword_dpo": "loss",
        "Trainer.dpo_loss": "loss",
        "Trainer.train_step": "step",
        "hidden_dpo_step": "step",
    }


def test_without_a_name_the_plainest_of_each_form_is_taken():
    assert [one.name for one in recognise(AWKWARD)] == ["kwargs_dpo_loss", "get_batch_logps", "hidden_dpo_step"]


def test_a_candidate_says_how_it_was_recognised_and_what_is_fixed():
    (named,), (placed,) = recognise(AWKWARD, "fixed_loss"), recognise(AWKWARD, "positional_dpo_loss")
    assert named.fixed == (("beta", 0.3),)
    assert named.by == "names"
    assert placed.by == "position"
    assert placed.fixed == ()
    assert "fixed_loss(pi_w, pi_l, ref_w, ref_l), line" in str(named)
    assert "loss, by names, beta fixed at 0.3" in str(named)


def test_the_judge_needs_no_torch_to_find():
    code = (
        "import sys; from dpocheck.functions.find import candidates; "
        f"candidates({str(AWKWARD)!r}); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("async_dpo_loss", "an async function"),
        ("yielding_dpo_loss", "a generator"),
        ("starred_dpo_loss", "it takes *args"),
        ("dpo_loss_three", "are not those of any known form"),
        ("dpo_loss_with_more", "'temperature_schedule': it is not known what to pass there"),
        ("loose", "it wants `self`"),
        ("kto_loss", "kto is not a loss of pairs that is audited here"),
    ],
)
def test_a_refusal_says_what_was_given_what_is_allowed_and_what_to_do(name, reason):
    with pytest.raises(NotRecognised) as refusal:
        recognise(AWKWARD, name)
    text = str(refusal.value)
    assert text.startswith(f"{AWKWARD}:{name} is none of the forms")
    assert reason in text
    assert "dpo_step(batch, policy, reference, optimizer)" in text
    assert "write an adapter" in text


def test_a_name_that_is_not_there_gets_near_matches():
    with pytest.raises(NotRecognised, match=r"has no 'get_batch_logp'.  Did you mean get_batch_logps"):
        recognise(AWKWARD, "get_batch_logp")
    with pytest.raises(NotRecognised, match=r"Did you mean Trainer.dpo_loss"):
        recognise(AWKWARD, "Trainer.dpo_los")


def test_a_file_that_does_not_parse_is_named_with_its_line(tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(NotRecognised, match=r"broken.py, line 2: "):
        recognise(tmp_path / "broken.py")


def test_a_step_that_asks_its_model_for_what_none_has_is_refused(tmp_path):
    body = "    won = policy.score(batch['chosen_input_ids'])\n    lost = policy.score(batch['rejected_input_ids'])\n"
    (tmp_path / "own.py").write_text(f"def dpo_step(policy, reference, batch, beta):\n{body}    return lost - won\n")
    with pytest.raises(NotRecognised, match=r"it calls score\(\) of its model, which a causal language model"):
        recognise(tmp_path / "own.py", "dpo_step")


def test_a_method_of_a_model_that_stands_under_a_condition_is_no_reason_to_refuse(tmp_path):
    body = "    if reference is None:\n        policy.disable_adapters_of_mine()\n    return batch['chosen_ids']\n"
    (tmp_path / "own.py").write_text(f"def dpo_step(policy, reference, batch, beta):\n{body}")
    assert recognise(tmp_path / "own.py", "dpo_step")[0].form == "step"


def test_a_margin_is_not_taken_for_a_loss():
    assert "dpo_pair_margin" not in [one.name for one in candidates(SUBJECTS / "losses.py")]


def test_a_loss_that_is_passed_over_is_told(tmp_path):
    (tmp_path / "two.py").write_text("def dpo_loss(logits, chosen, rejected, beta):\n    return logits\n")
    (told,) = find.passed_over(tmp_path / "two.py")
    assert told.startswith("dpo_loss(logits, chosen, rejected, beta), line 1: ")


@pytest.mark.parametrize("content", [b"\x00\x01", "x = 'é'".encode("latin-1")])
def test_a_file_that_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "binary.py").write_bytes(content)
    with pytest.raises(NotRecognised, match=r"binary\.py"):
        recognise(tmp_path / "binary.py")


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(NotRecognised, match="is not a file"):
            recognise(path)


def test_a_file_without_any_lists_what_it_has_and_the_known_forms(tmp_path):
    (tmp_path / "empty.py").write_text("def area(width, height=2):\n    return width * height\n")
    with pytest.raises(NotRecognised) as refusal:
        recognise(tmp_path / "empty.py")
    assert "area(width, height=2), line 1" in str(refusal.value)
    assert "get_batch_logps(logits, labels)" in str(refusal.value)


def test_what_a_file_only_imports_or_builds_is_left_to_the_worker(tmp_path):
    (tmp_path / "file.py").write_text("from other import dpo_loss\nloss = make(beta=0.1)\n")
    assert recognise(tmp_path / "file.py", "dpo_loss")[0].form == "unknown"
    assert recognise(tmp_path / "file.py", "loss")[0].form == "unknown"


@pytest.mark.parametrize("subject", ["losses", "logps", "steps"])
def test_judge_and_worker_recognise_the_same(subject):
    path = SUBJECTS / f"{subject}.py"
    found = candidates(path)
    assert len(found) > 10
    for one in found:
        (target,) = loading.load(f"{path}:{one.name}").targets.values() if "." in one.name else [
            loading.load(f"{path}:{one.name}").targets[one.form]
        ]
        assert target.match.form == one.form
        assert tuple(p.name for p in target.parameters) == one.parameters
        assert target.match.by == one.by


# ------------------------------------------------------------------------------------------------------ in the worker


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("on_another_device", "returned a tensor on meta"),
        ("generator_out", "returned a generator"),
        ("none_out", "returned None"),
        ("wrong_shape", r"returned shape \(6,\); expected \(2,\) or a scalar"),
        ("column_shape", r"returned shape \(2, 1\)"),
        ("text_out", "returned a str"),
    ],
)
def test_an_answer_of_the_wrong_kind_is_the_authors_to_mend(name, says):
    with pytest.raises(BadAnswer, match=says):
        ask(f"bad_answers:{name}", TWO)


@pytest.mark.parametrize(
    ("name", "says"), [("get_logps", r"returned shape \(2, 4, 4\)"), ("get_logps_on_meta", "on meta")]
)
def test_a_log_prob_of_the_wrong_kind_is_the_authors_to_mend(name, says, tmp_path):
    rows = (TokenRow((0, 1, 2, 3), (1,) * 4, (0, 0, 1, 1)), TokenRow((1, 2, 3, 0), (1,) * 4, (0, 0, 1, 1)))
    with pytest.raises(BadAnswer, match=says):
        ask(f"bad_answers:{name}", LogpExperiment(Table(4), rows), tmp_path)


def test_not_a_number_is_handed_on_as_it_is():
    seen = ask("bad_answers:not_a_number", TWO)
    assert seen["reduced"] != seen["reduced"]


def test_an_answer_in_numpy_has_a_value_and_no_slopes():
    seen = ask("bad_answers:detached_numpy", TWO)
    assert seen["per_pair"] == pytest.approx([1.0, 1.5])
    assert "slopes" not in seen


@pytest.mark.parametrize("name", ["losses:nothing_here", "losses:BigTrainer.dpo_los"])
def test_the_worker_too_gives_near_matches(name):
    with pytest.raises(loading.NotLoadable, match=r"is not there; (did you mean dpo_loss|defined are)"):
        ask(name, TWO)


def test_several_functions_of_a_file_are_one_subject(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    text = (SUBJECTS / "logps.py").read_text() + "\n" + (SUBJECTS / "losses.py").read_text()
    (folder / "train.py").write_text(text)
    both = loading.load(f"{folder / 'train.py'}:get_batch_logps,four_names")
    assert both.name == "four_names, get_batch_logps"
    assert callable(both.loss)
    assert callable(both.sequence_logps)
    alone = loading.load(str(folder / "train.py"))
    assert set(alone.targets) == {"loss", "sequence_logps"}


def test_two_files_of_one_name_do_not_disturb_each_other(tmp_path):
    for folder, sign in (("a", "-"), ("b", "")):
        (tmp_path / folder).mkdir()
        body = f"    return {sign}beta * (pi_w - pi_l - ref_w + ref_l)\n"
        (tmp_path / folder / "train.py").write_text("def dpo(pi_w, pi_l, ref_w, ref_l, beta):\n" + body)
    first, second = (ask(f"{tmp_path / folder / 'train.py'}:dpo", TWO)["reduced"] for folder in "ab")
    assert first == -second != 0


def test_a_file_that_shadows_a_library_shadows_nothing(tmp_path):
    text = "import torch\nimport torch.nn.functional as F\n\n"
    text += "def dpo(pi_w, pi_l, ref_w, ref_l, beta):\n    return F.softplus(-beta * (pi_w - pi_l - ref_w + ref_l))\n"
    (tmp_path / "torch.py").write_text(text)
    assert ask(f"{tmp_path / 'torch.py'}:dpo", TWO)["reduced"] > 0


def test_a_file_with_relative_imports_goes_by_its_package(tmp_path):
    package = tmp_path / "somebodys_package_for_dpo"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "scale.py").write_text("def scaled(x, beta):\n    return beta * x\n")
    text = "from .scale import scaled\n\n\ndef dpo(pi_w, pi_l, ref_w, ref_l, beta):\n"
    (package / "loss.py").write_text(text + "    return scaled(pi_w - pi_l - ref_w + ref_l, beta)\n")
    assert ask(f"{package / 'loss.py'}:dpo", TWO)["per_pair"] == pytest.approx([0.75, 0.25])  # 0.5 * (1.5, 0.5)


def test_relative_imports_without_a_package_say_what_is_missing(tmp_path):
    (tmp_path / "loss.py").write_text("from .scale import scaled\n")
    with pytest.raises(loading.NotLoadable, match=r"an __init__.py is missing"):
        loading.load(f"{tmp_path / 'loss.py'}:scaled")


def test_a_module_of_torch_is_no_adapter_for_having_a_train_method():
    assert not loading.is_adapter(loading.load(f"{SUBJECTS / 'losses.py'}:DPOCriterion").targets["loss"].owner)


def test_a_live_function_without_a_file_is_audited_too():
    space: dict = {}
    exec("def dpo(pi_w, pi_l, ref_w, ref_l, beta):\n    return beta * (pi_l - pi_w + ref_w - ref_l)\n", space)
    import torch

    ones = torch.ones(1, dtype=torch.float64)
    out = as_adapter(space["dpo"]).loss(ones, 2 * ones, 4 * ones, 3 * ones, objective=Objective(beta=0.5))
    assert float(out.loss) == pytest.approx(1.0)  # 0.5 * (2 - 1 + 4 - 3)


def test_the_finder_reads_every_candidate_of_an_unknown_name_once():
    assert [c.name for c in find.recognise(AWKWARD, "fixed_loss, get_batch_logps")] == ["fixed_loss", "get_batch_logps"]
