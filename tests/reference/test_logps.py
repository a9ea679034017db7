"""Do rows become the log-probabilities that a plain forward gives?  Run alone: pytest tests/reference/test_logps.py"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers

from reference_impl import logps


@dataclass(frozen=True)
class Pair:
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


VOCABULARY = 37
PAIRS = [Pair((0, 5), (7, 0, 2), (3,)), Pair((1,), (9,), (4, 4, 4, 8, 2)), Pair((6, 6, 2), (2,), (2, 2))]
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
OWN = {
    "gemma": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 2},
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 64},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 1.0},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 1.0},
}


def tiny(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **HEADS, **special, **OWN.get(kind, {})})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():  # larger than the initialisation: soft-capping then bends the logits
        parameter.data.mul_(4.0)
    return model


def plain_logps(model: torch.nn.Module, row: tuple[int, ...], completion: int) -> torch.Tensor:
    """One unpadded row through the model's own forward, torch's log_softmax: nothing of ours."""
    ids = torch.tensor([row])
    table = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0], -1)
    return sum(table[t - 1, row[t]] for t in range(len(row) - completion, len(row)))


def gradients(model: torch.nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", sorted(logps.KNOWN_HEADS))
def test_chunked_path_equals_the_models_own_forward(kind: str) -> None:
    """Values and gradients, in float64: 1e-12 relative is the rounding of some hundred operations of 2e-16 each."""
    if kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    model = tiny(kind)
    assert logps.choose_path(model)[0] == "chunked"
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    results = {}
    for path in ("chunked", "full"):
        chosen, rejected = logps.pair_logps(model, PAIRS, pad_id=0, path=path)
        results[path] = chosen, rejected, gradients(model, (weights * (chosen - 3 * rejected)).sum())
    for chunked, full in zip(results["chunked"][:2], results["full"][:2], strict=True):
        torch.testing.assert_close(chunked, full, rtol=1e-12, atol=1e-12)
    scale = max(g.abs().max() for g in results["full"][2].values())
    for name, grad in results["full"][2].items():
        torch.testing.assert_close(results["chunked"][2][name], grad, rtol=1e-10, atol=1e-12 * scale.item(), msg=name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padded_batch_equals_one_row_at_a_time_without_padding(kind: str) -> None:
    model = tiny(kind)
    chosen, rejected = logps.pair_logps(model, PAIRS, pad_id=2)
    for index, pair in enumerate(PAIRS):
        for got, completion in ((chosen, pair.chosen), (rejected, pair.rejected)):
            expected = plain_logps(model, (*pair.prompt, *completion), len(completion))
            # Llama's norms work in float32 whatever the dtype: 2^-24 relative at each of 5 norms, on |logp| < 60.
            assert got[index].item() == pytest.approx(expected.item(), abs=5 * 60 * 2.0**-24)


def test_padding_id_never_matters() -> None:
    model = tiny("llama")
    for pad_id in (0, 2, VOCABULARY - 1):
        got = torch.stack(logps.pair_logps(model, PAIRS, pad_id=pad_id))
        expected = torch.stack(logps.pair_logps(model, PAIRS, pad_id=1))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_size_of_a_chunk_never_matters(chunk: int) -> None:
    model = tiny("gemma2")
    rows = [(p.prompt, p.chosen) for p in PAIRS] + [(p.prompt, p.rejected) for p in PAIRS]
    batch = logps.collate(rows, 0, torch.device("cpu"))
    torch.testing.assert_close(
        logps.chunked_row_logps(model, batch, chunk), logps.full_row_logps(model, batch), rtol=1e-12, atol=1e-12
    )


def test_no_tensor_of_all_logits_exists() -> None:
    """Every tensor that any operation makes is smaller than (completion position, vocabulary), forward and backward."""
    model = tiny("llama", torch.float32)
    pairs = [Pair((1,), tuple(range(3, 23)), tuple(range(4, 24)))] * 4
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    batch = logps.collate(rows, 0, torch.device("cpu"))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (VOCABULARY,):
                largest = max(largest, out.numel())
            return out

    with Watch():
        logps.chunked_row_logps(model, batch, chunk=8).sum().backward()
    # The head's weight gradient is (hidden, vocabulary); a chunk is 8 × vocabulary; all logits are 160 × vocabulary.
    assert 8 * VOCABULARY <= largest <= 16 * VOCABULARY
    with Watch():
        logps.full_row_logps(model, batch)
    assert largest >= 160 * VOCABULARY  # the watch sees what it should


def test_unknown_architecture_takes_the_full_path_and_says_why() -> None:
    class Custom(transformers.LlamaForCausalLM):
        pass

    Custom.__module__ = "somebodys.model"
    model = Custom(tiny("llama").config)
    path, reason = logps.choose_path(model)
    assert path == "full"
    assert "Custom" in reason


def test_replaced_forward_is_run() -> None:
    model = tiny("llama")
    calls = []
    original = model.forward

    def forward(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = forward
    assert logps.choose_path(model)[0] == "full"
    logps.pair_logps(model, PAIRS, pad_id=0)
    assert calls == [1]


@pytest.mark.parametrize("targets", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_adapter_on_the_head_counts(targets: dict) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(**{"target_modules": ["q_proj"], **targets}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    chunked, full = (torch.stack(logps.pair_logps(model, PAIRS, pad_id=0, path=path)) for path in ("chunked", "full"))
    torch.testing.assert_close(chunked, full, rtol=1e-12, atol=1e-12)
    with model.disable_adapter():
        off = torch.stack(logps.pair_logps(model, PAIRS, pad_id=0))
    assert (off - chunked).abs().min() > 1e-3


@pytest.mark.parametrize(("prompt", "chosen"), [((), (1,)), ((1,), ())])
def test_row_that_cannot_be_scored_is_refused(prompt: tuple, chosen: tuple) -> None:
    with pytest.raises(ValueError, match="at least one"):
        logps.pair_logps(tiny("llama"), [Pair(prompt, chosen, (3,))], pad_id=0)
