"""Which world is so small that its true reward is known?  Short texts about a topic, judged by a noisy judge.

A prompt names a topic.  A completion is 3 to 12 words: some on the topic, some on other topics, some filler.  Its
reward is a sum over its words, and the judge prefers y_w to y_l with the probability of Eq. 6 (Bradley and Terry 1952),
σ(r(x, y_w) − r(x, y_l)): the model that DPO assumes, so its optimum has the implicit reward r up to a function of x.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

TOPICS = {
    "sea": ["wave", "salt", "tide", "shore", "whale", "reef"],
    "forest": ["moss", "pine", "fern", "owl", "trail", "acorn"],
    "city": ["street", "tram", "crowd", "tower", "market", "lamp"],
    "sky": ["cloud", "star", "moon", "wind", "swift", "dusk"],
}
FILLER = ["um", "well", "like", "so", "hmm", "anyway"]
ON_TOPIC, OFF_TOPIC, FILLER_WORD = 0.6, -0.1, -0.5
"""Reward of a word, in nats of preference."""
SPECIAL = ["<pad>", "<eos>", "<unk>"]
SHORTEST, LONGEST = 3, 12


@dataclass(frozen=True)
class Judged:
    """Two completions of a prompt, with their true rewards; `first` was preferred by the judge if `preferred` is 0."""

    prompt: str
    texts: tuple[str, str]
    rewards: tuple[float, float]
    preferred: int

    @property
    def row(self) -> dict[str, str]:
        """As a preference row; completions begin with the space that parts them from the prompt."""
        chosen, rejected = self.texts[self.preferred], self.texts[1 - self.preferred]
        return {"prompt": self.prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}

    @property
    def reward_margin(self) -> float:
        """r(x, chosen) − r(x, rejected); negative where the judge erred."""
        return self.rewards[self.preferred] - self.rewards[1 - self.preferred]


def prompts() -> list[str]:
    return [f"about {topic} :" for topic in TOPICS]


def words() -> list[str]:
    return [*SPECIAL, "about", ":", *TOPICS, *[word for topic in TOPICS.values() for word in topic], *FILLER]


def tokenizer() -> Any:
    """One word, one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def reward(prompt: str, text: str) -> float:
    """The true reward r(x, y): a sum over the completion's words."""
    topic = TOPICS[prompt.split()[1]]
    return sum(ON_TOPIC if w in topic else FILLER_WORD if w in FILLER else OFF_TOPIC for w in text.split())


def write_text(prompt: str, draw: random.Random) -> str:
    """A text as people of this world write it: half on the topic, with lapses; what the SFT model learns from."""
    topic = TOPICS[prompt.split()[1]]
    others = [word for name in TOPICS for word in TOPICS[name] if word not in topic]
    length = draw.randint(SHORTEST, LONGEST)
    pools = draw.choices([topic, others, FILLER], weights=[4, 3, 3], k=length)
    return " ".join(draw.choice(pool) for pool in pools)


def judge(prompt: str, texts: tuple[str, str], draw: random.Random) -> Judged:
    """The judge's choice, with the probability of the Bradley-Terry model."""
    rewards = reward(prompt, texts[0]), reward(prompt, texts[1])
    wins = draw.random() < 1 / (1 + math.exp(rewards[1] - rewards[0]))
    return Judged(prompt, texts, rewards, 0 if wins else 1)


def best_accuracy(judged: list[Judged]) -> float:
    """Share of the judge's choices that the true reward itself predicts, ties as one half: nothing can do better but by
    chance, since the rest is the judge's noise."""
    return sum(1.0 if j.reward_margin > 0 else 0.5 if j.reward_margin == 0 else 0.0 for j in judged) / len(judged)
