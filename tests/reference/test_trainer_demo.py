"""Does the demonstration measure what it says?  Run alone: pytest tests/reference/test_trainer_demo.py"""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from reference_impl.demo import policy, world


def test_reward_by_hand() -> None:
    # wave, tide: on the topic; moss: off; um: filler. 2 × 0.6 − 0.1 − 0.5 = 0.6
    assert world.reward("about sea :", "wave um tide moss") == pytest.approx(0.6, rel=1e-12)


def test_judge_follows_bradley_and_terry() -> None:
    # Rewards 0.6 and −0.5: the first wins with σ(1.1) = 0.7503; 4 standard errors of 4000 draws are 0.0274.
    draw = random.Random(0)
    wins = sum(world.judge("about sea :", ("wave", "um"), draw).preferred == 0 for _ in range(4000))
    assert abs(wins / 4000 - 1 / (1 + math.exp(-1.1))) < 4 * math.sqrt(0.75 * 0.25 / 4000)


def test_best_accuracy_counts_ties_as_one_half() -> None:
    judged = [
        world.Judged("about sea :", ("wave", "um"), (0.6, -0.5), 0),
        world.Judged("about sea :", ("wave", "um"), (0.6, -0.5), 1),
        world.Judged("about sea :", ("wave", "tide"), (0.6, 0.6), 1),
        world.Judged("about sea :", ("um", "wave"), (-0.5, 0.6), 1),
    ]
    assert world.best_accuracy(judged) == (1 + 0 + 0.5 + 1) / 4


def test_every_word_is_one_token_and_prompts_have_one_length() -> None:
    tokenizer = world.tokenizer()
    assert len(tokenizer) == len(world.words())
    assert {len(tokenizer(prompt)["input_ids"]) for prompt in world.prompts()} == {3}
    draw = random.Random(0)
    for prompt in world.prompts():
        text = world.write_text(prompt, draw)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_samples_follow_the_models_own_distribution() -> None:
    """First words of 4000 samples against the softmax: every frequency within 5 standard errors."""
    tokenizer = world.tokenizer()
    model = policy.new_model(tokenizer, 0).eval()
    prompt = world.prompts()[0]
    texts = policy.sample(model, tokenizer, [prompt] * 4000, seed=1)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    expected = model(input_ids=ids).logits[0, -1].softmax(-1)
    words = [text.split()[0] if text else "<eos>" for text in texts]
    for index, word in enumerate(world.words()):
        if word in ("<pad>", "<unk>", "<eos>"):  # dropped from the text, so the next word stands in their place
            continue
        p = expected[index].item()
        assert words.count(word) / 4000 < p + 5 * math.sqrt(p * (1 - p) / 4000) + expected[:3].sum().item() * 2 * p
        assert words.count(word) / 4000 > p - 5 * math.sqrt(p * (1 - p) / 4000)


@pytest.mark.long
@pytest.mark.parametrize("labels", ["as judged", "reversed"])
def test_demonstration_recovers_the_reward_and_reversed_labels_its_opposite(
    labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from reference_impl.demo.__main__ import Sizes, demonstrate

    if labels == "reversed":
        judge = world.judge

        def reverse(*args: object) -> world.Judged:
            row = judge(*args)
            return world.Judged(row.prompt, row.texts, row.rewards, 1 - row.preferred)

        monkeypatch.setattr(world, "judge", reverse)
    numbers = demonstrate(tmp_path / "out", 0, Sizes(1200, 300, 80, 3))
    assert (tmp_path / "out" / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # 300 independent pairs: a correlation of 0.4 is 7 standard errors (1/√300) from none.
    if labels == "reversed":
        assert numbers["correlation"] < -0.4
        assert numbers["reward after"] < numbers["reward before"]
        assert numbers["best accuracy"] < 0.5
    else:
        assert numbers["correlation"] > 0.4
        assert numbers["reward after"] > numbers["reward before"]
        assert 0.5 < numbers["accuracy"] <= 1
