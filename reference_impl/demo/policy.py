"""Where does the policy before DPO come from, and what does it write?  Supervised training and sampling, small."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reference_impl.demo import world
from reference_impl.logps import pair_logps


def new_model(tokenizer: Any, seed: int) -> nn.Module:
    """A Llama of about 0.1 M parameters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def supervised(
    model: nn.Module, tokenizer: Any, steps: int, batch: int, seed: int, tell: Callable[[int, float], None]
) -> None:
    """Learns to write as people of the world do: mean negative log-likelihood of completion tokens, AdamW."""
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        rows = []
        for _ in range(batch):
            prompt = draw.choice(world.prompts())
            rows.append((prompt, world.write_text(prompt, draw)))
        ids, mask = _rows(rows, tokenizer)
        logits = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits[mask[:, 1:]], ids[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tell(step, loss.item())


def sample(model: nn.Module, tokenizer: Any, asked: list[str], seed: int, batch: int = 1024) -> list[str]:
    """One completion for each prompt, drawn from the model itself (temperature 1)."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    for start in range(0, len(asked), batch):
        # All prompts have the same number of tokens: no padding.
        prompt_ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in asked[start : start + batch]])
        drawn = _draw(model, tokenizer, prompt_ids, generator)
        texts += [tokenizer.decode(row, skip_special_tokens=True) for row in drawn]
    return texts


@torch.no_grad()
def _draw(model: nn.Module, tokenizer: Any, ids: Tensor, generator: torch.Generator) -> list[list[int]]:
    model.eval()
    start, ended = ids.shape[1], torch.zeros(len(ids), dtype=torch.bool)
    cache, feed = None, ids
    for _ in range(2 * world.LONGEST):
        out = model(input_ids=feed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        feed = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
        feed = torch.where(ended.unsqueeze(1), torch.full_like(feed, tokenizer.eos_token_id), feed)
        ended |= feed.squeeze(1) == tokenizer.eos_token_id
        ids = torch.cat([ids, feed], 1)
        if ended.all():
            break
    rows = ids[:, start:].tolist()
    return [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row for row in rows]


@torch.no_grad()
def implicit_rewards(policy: nn.Module, reference: nn.Module, pairs: Any, beta: float) -> Tensor:
    """β (log π − log π_ref) of both completions of each pair: (pair, 2), chosen first."""
    columns = []
    for side in range(2):
        parts = []
        for start in range(0, len(pairs), 256):
            batch = pairs[start : start + 256]
            logps = [pair_logps(model.eval(), batch, pad_id=0)[side] for model in (policy, reference)]
            parts.append(beta * (logps[0] - logps[1]))
        columns.append(torch.cat(parts))
    return torch.stack(columns, 1)


def _rows(rows: list[tuple[str, str]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids and completion mask, padded on the right, both (row, token)."""
    coded = [(tokenizer(p)["input_ids"], [*tokenizer(c)["input_ids"], tokenizer.eos_token_id]) for p, c in rows]
    width = max(len(p) + len(c) for p, c in coded)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, (prompt, completion) in enumerate(coded):
        end = len(prompt) + len(completion)
        ids[index, :end] = torch.tensor([*prompt, *completion])
        mask[index, len(prompt) : end] = True
    return ids, mask
