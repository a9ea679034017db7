"""Are rows judged rightly on a tokenizer of the user's own?  Right trainers pass; a fault of rows fails its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers_of_users as users
from transformers import AutoTokenizer

from dpocheck import audit, vocabulary
from dpocheck.check import CHECKS
from dpocheck.miniature import MINIATURE
from dpocheck.miniature import rows as parts
from dpocheck.open import UsageError, open_subject
from dpocheck.replay import replay
from dpocheck.report.files import gather
from dpocheck.runner import Options, run, select
from dpocheck.stored import read

IDS = tuple(id for id in CHECKS if id.startswith("TOK-"))
TOKENIZERS = {"plain": users.write, "chatml": users.chatml, "llama2": users.llama2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in TOKENIZERS.items()}


def verdicts(trainer: Any, tokenizer: Path, folder: Path, *, blocking: bool = True) -> dict[str, str]:
    """The chapter's verdicts on a live trainer, under the paper's conventions."""
    subject = open_subject(trainer, folder)
    try:
        found = vocabulary.results(subject, [CHECKS[id] for id in IDS], str(tokenizer), blocking=blocking)
    finally:
        subject.close()
    return {result.id: result.verdict for result in found}


def test_a_finding_is_stored_and_replayed(folders, tmp_path):
    """The stored rows and the tokenizer's folder are all that a replay needs."""
    subject = Path(__file__).with_name("trainer_that_upper_cases.py")
    options = Options(subject=f"{subject}:Adapter", tokenizer=str(folders["plain"]), only=("TOK-ROUND-TRIP",))
    report = run(options)
    (result,) = report.results
    assert result.verdict == "fail"
    _, contents = gather(report, options={})
    (path,) = [name for name in contents if name.startswith("experiments/")]
    (tmp_path / "stored.json").write_bytes(contents[path])
    found = replay(read(tmp_path / "stored.json"))
    assert (found.verdict, found.where) == ("fail", result.where)
    assert "on the tokenizer in" in contents["tok-round-trip.txt"].decode()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_right_trainer_passes_every_check(folders, name, tmp_path):
    assert verdicts(MINIATURE, folders[name], tmp_path) == dict.fromkeys(IDS, "pass")


def test_the_rows_have_tokens_across_the_boundary_and_templates_that_refuse(folders):
    """What the checks allow for does occur: a merge across the prompt's end, and a template without system messages."""
    tokenizer = AutoTokenizer.from_pretrained(folders["plain"])
    across = 0
    for row in vocabulary.TEXTS:
        prompt, whole = tokenizer(row.prompt)["input_ids"], tokenizer(row.prompt + row.chosen)["input_ids"]
        across += whole[: len(prompt)] != prompt
    assert across >= 3
    chat = vocabulary.CHATS[1].record()
    with pytest.raises(Exception, match="no system messages"):
        AutoTokenizer.from_pretrained(folders["llama2"]).apply_chat_template(chat["prompt"] + chat["chosen"])


# ----------------------------------------------------------------------------------------------- one fault at a time


def sides(change: Callable[..., parts.Side]) -> Callable[..., parts.Example]:
    """A tokenizing part whose sides are changed."""

    def tokenize(text: parts.Text, tokenizer: Any, row: int) -> parts.Example:
        right = parts.tokenize(text, tokenizer, row)
        return replace(
            right, chosen=change(right.chosen, tokenizer, text), rejected=change(right.rejected, tokenizer, text)
        )

    return tokenize


def stripped(row: Any, tokenizer: Any) -> parts.Text:
    text = parts.render(row, tokenizer)
    return replace(text, chosen=text.chosen.strip(), rejected=text.rejected.strip())


def second_bos(side: parts.Side, tokenizer: Any, text: parts.Text) -> parts.Side:
    again = text.templated and tokenizer.bos_token_id is not None
    return parts.Side((tokenizer.bos_token_id, *side.ids), side.start + 1) if again else side


def no_eos(side: parts.Side, tokenizer: Any, text: parts.Text) -> parts.Side:
    return side if text.templated else replace(side, ids=side.ids[:-1])


def eos_after_chats(side: parts.Side, tokenizer: Any, text: parts.Text) -> parts.Side:
    return replace(side, ids=(*side.ids, tokenizer.eos_token_id)) if text.templated else side


def prompt_scored(side: parts.Side, tokenizer: Any, text: parts.Text) -> parts.Side:
    return replace(side, start=max(1, side.start - 2))


def completion_half_scored(side: parts.Side, tokenizer: Any, text: parts.Text) -> parts.Side:
    return replace(side, start=(side.start + len(side.ids)) // 2)


def chosen_prompt_cut(text: parts.Text, tokenizer: Any, row: int) -> parts.Example:
    right = parts.tokenize(text, tokenizer, row)
    chosen = right.chosen
    cut = min(2, chosen.start - 1)
    return replace(right, chosen=parts.Side(chosen.ids[cut:], chosen.start - cut))


def long_ones_dropped(example: parts.Example, recipe: Any) -> parts.Example | None:
    return example if len(example.chosen.ids) < 32 else None


FAULTS = {
    "white space is stripped": ({"render": stripped}, "plain", "TOK-ROUND-TRIP"),
    "chats get the tokenizer's BOS too": ({"tokenize": sides(second_bos)}, "llama2", "TOK-BOS"),
    "no EOS after texts": ({"tokenize": sides(no_eos)}, "plain", "TOK-EOS"),
    "EOS after chats that have theirs": ({"tokenize": sides(eos_after_chats)}, "chatml", "TOK-EOS"),
    "the prompt's last tokens are scored": ({"tokenize": sides(prompt_scored)}, "chatml", "TOK-SCORED"),
    "half of a completion is scored": ({"tokenize": sides(completion_half_scored)}, "plain", "TOK-SCORED"),
    "the chosen row's prompt is shorter": ({"tokenize": chosen_prompt_cut}, "plain", "TOK-SAME-PROMPT"),
    "long pairs are dropped": ({"truncate": long_ones_dropped}, "chatml", "TOK-PAIRS-FED"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_rows_fails_its_check(folders, fault, tmp_path):
    changes, name, caught_by = FAULTS[fault]
    found = verdicts(replace(MINIATURE, **changes), folders[name], tmp_path, blocking=False)
    assert found[caught_by] == "fail"


def test_one_fault_of_the_text_is_one_finding(folders, tmp_path):
    def without_system(row: Any, tokenizer: Any) -> parts.Text:
        prompt = row.get("prompt")
        kept = [m for m in prompt if m["role"] != "system"] if isinstance(prompt, list) else prompt
        return parts.render({**row, "prompt": kept}, tokenizer)

    found = verdicts(replace(MINIATURE, render=without_system), folders["chatml"], tmp_path)
    assert [id for id, verdict in found.items() if verdict == "fail"] == ["TOK-ROUND-TRIP"]


def test_every_check_of_the_chapter_is_failed_by_a_fault():
    assert {caught_by for _, _, caught_by in FAULTS.values()} == set(IDS)


# --------------------------------------------------------------------------------------------------- when it is asked


def test_the_chapter_is_chosen_with_a_tokenizer_only():
    assert not [check.id for check in select(Options(subject="x")) if check.id in IDS]
    assert {check.id for check in select(Options(subject="x", tokenizer="y"))} >= set(IDS)
    with pytest.raises(UsageError, match="give its folder with --tokenizer"):
        select(Options(subject="x", only=("TOK-EOS",)))


def test_a_folder_without_a_tokenizer_is_the_users_mistake_not_the_trainers(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no tokenizer that transformers loads"):
        verdicts(MINIATURE, tmp_path / "empty", tmp_path / "work")
    with pytest.raises(UsageError, match=r"holds none of tokenizer\.json"):
        audit(MINIATURE, tokenizer=tmp_path / "empty")


def test_a_subject_without_train_is_not_applicable(folders):
    def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        h = policy_chosen_logps - reference_chosen_logps - (policy_rejected_logps - reference_rejected_logps)
        return -h.sigmoid().log()

    report = audit(dpo_loss, only=IDS, tokenizer=folders["plain"])
    assert {result.reason for result in report.results} == {"the subject has no `train`"}


@pytest.mark.long
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("subject", ["trl", "reference"])
def test_real_trainers_pass(folders, subject, name):
    report = audit(subject, only=IDS, tokenizer=folders[name])
    assert {result.id: result.verdict for result in report.results} == dict.fromkeys(IDS, "pass")
