"""Does a whole run end at the optimum that is known in closed form?

The policy is an ordinary Llama that is an exact table: its layers add nothing (o_proj and down_proj are zero), its
embedding is c·I, its final norm k/√H, so the logits after token u are column u of W where lm_head = W/k, and lm_head
alone is trained.  Preferences between completions a and b come in w_a copies of (a over b) and w_b of (b over a).  The
minimiser of Eq. 7 over all policies then has β h(a, b) = log w_a/w_b for each two (set the derivative of
w_a log σ(βh) + w_b log σ(−βh) to zero): π* ∝ π_ref · w^(1/β).

Run alone: pytest tests/reference/test_trainer_optimum.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from trainer_tiny import llama

from reference_impl import TokenPair, TrainConfig, train
from reference_impl.logps import pair_logps

SIZE, STRENGTHS = 16, {4: 1, 5: 2, 6: 3, 7: 6}
SCALE_IN, SCALE_OUT = 2.0**14, 2.0**10


def table_model(dtype: torch.dtype) -> Any:
    model = llama(vocab_size=SIZE, hidden_size=SIZE, intermediate_size=8, num_hidden_layers=1).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.zero_()
        model.model.embed_tokens.weight.copy_(SCALE_IN * torch.eye(SIZE))
        model.model.norm.weight.fill_(SCALE_OUT / math.sqrt(SIZE))
        # Dyadic numbers, all different: logits of both signs up to 2.
        logits = (torch.arange(SIZE * SIZE, dtype=dtype).reshape(SIZE, SIZE) * 37 % 256 - 128) / 64
        model.lm_head.weight.copy_(logits / SCALE_OUT)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    return model


def preferences() -> list[TokenPair]:
    """w_a copies of (a preferred to b) for each two of the four completions, each one token long."""
    rows = []
    for a, weight_a in STRENGTHS.items():
        for b in STRENGTHS:
            rows += [(3, a, b)] * (weight_a if a != b else 0)
    return [TokenPair(index, (prompt,), (a,), (b,)) for index, (prompt, a, b) in enumerate(rows)]


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # fp64: convergence is linear at a rate below ½ a step, so 200 steps leave rounding. fp32: W/k near 2 has steps of
    # 2⁻²³, so a log-prob is off by 2⁻²² and β h, four of them times β = ½, by 2⁻²¹; the gradient vanishes within that.
    [("fp64", 1e-9), ("fp32", 4 * 2.0**-21)],
)
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.long), 3])
def test_run_recovers_the_closed_form_optimum(dtype: str, bound: float, accumulation: int) -> None:
    """36 pairs as one batch and as 13 + 13 + 10; β = ½."""
    beta, data = 0.5, preferences()
    assert len(data) == 36
    wide = {"fp64": torch.float64, "fp32": torch.float32}[dtype]
    config = TrainConfig(
        beta=beta, optimizer="sgd", learning_rate=4 / beta**2 / SCALE_OUT**2, schedule="constant", clip_norm=None,
        dtype=dtype, steps=200, batch=-(-36 // accumulation), accumulation=accumulation, seed=1,
    )  # fmt: skip
    model = table_model(wide)
    result = train(config, model=model, train_rows=data)
    asked = [TokenPair(0, (3,), (a,), (b,)) for a in STRENGTHS for b in STRENGTHS if a < b]
    with torch.no_grad():
        margins = [w - l for w, l in (pair_logps(m, asked, pad_id=0) for m in (model, table_model(wide)))]
    found = beta * (margins[0] - margins[1])
    expected = torch.tensor(
        [math.log(STRENGTHS[p.chosen[0]] / STRENGTHS[p.rejected[0]]) for p in asked], dtype=torch.float64
    )
    assert (found.double() - expected).abs().max().item() < bound
    assert result.history[-2]["metrics"]["grad_norm"] / SCALE_OUT < 1e-6  # of the logits
    assert abs(expected).max().item() > 1.5  # the optimum is far from where the run began
