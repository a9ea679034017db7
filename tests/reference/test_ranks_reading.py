"""Does each process read its own rows of a model's files, and is the model then the one that from_pretrained loads?

Run alone: pytest tests/reference/test_ranks_reading.py
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_ranks_checkpoint import command, history, leave
from trainer_ranks import join, one_thread, start
from trainer_tiny import gpt2, llama, save

from reference_impl import TrainConfig, cli, models, parallel, processes
from reference_impl.reading import FOLDER, is_unread, read_parts
from reference_impl.shards import whole_tensor

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forks")
SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SMALL, "num_key_value_heads": 2}
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
TOKENS = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {**WIDE, "rope_parameters": SCALED},
    "GPT2": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "Qwen2": {**WIDE, "tie_word_embeddings": True},
    "Gemma": {**WIDE, "head_dim": 8},
    "StableLm": WIDE,
    "GPTJ": {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "Phi3": WIDE,
    "Falcon": {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def written(name: str, folder: Path, dtype: torch.dtype) -> str:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**ARCHITECTURES[name], **TOKENS})
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return str(folder)


# Stored, computed: bfloat16 read as float32, as `bf16` and `fp32` keep weights; float32 as float64.
@pytest.mark.parametrize(("stored", "dtype"), [(torch.bfloat16, "bf16"), (torch.float32, "fp64")], ids=str)
def test_model_read_in_parts_is_the_loaded_one_to_the_last_bit(
    stored: torch.dtype, dtype: str, tmp_path: Path
) -> None:
    """Weights, buffers that are in no file, names, ties, what is trained, generation settings, and the hash."""
    sources = {name: written(name, tmp_path / name, stored) for name in ARCHITECTURES}
    config = TrainConfig(dtype=dtype, device="cpu", batch=2)

    def action(rank: int) -> None:
        with processes.joined(config) as crew:
            mesh = parallel.mesh_of(config, crew)
            for name, source in sources.items():
                right = models.load_model(source, dtype, torch.device("cpu"))
                model = models.load_unread(source, dtype)
                assert all(p.is_meta for p in model.parameters()), name
                assert models.weights_hash(model) == models.weights_hash(right), name
                assert model.generation_config.to_dict() == right.generation_config.to_dict(), name
                twin = copy.deepcopy(model)  # the frozen reference is a copy of the policy
                for made in (model, twin):
                    parallel.spread(made, mesh, config, crew)
                    read_parts(made, crew)
                    assert not is_unread(made)
                    for kind in ("named_parameters", "named_buffers"):
                        mine, other = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (made, right))
                        assert mine.keys() == other.keys(), name
                        for key, tensor in other.items():
                            whole = whole_tensor(mine[key])
                            assert whole.dtype == tensor.dtype, (name, key)
                            assert torch.equal(whole, tensor), (name, key)
                            assert mine[key].requires_grad == tensor.requires_grad, (name, key)
                    assert all(p.to_local().shape[0] <= -(-p.shape[0] // 2) for p in made.parameters())

    assert join(start(2, action, tmp_path / "said")) == [0, 0], [p.read_text() for p in (tmp_path / "said").iterdir()]


def renamed(folder: Path) -> None:
    """As old GPT-2 files are: without the prefix of the model that the decoder is in."""
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})


def quantised(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(settings))


OTHERS = {
    "other names": renamed,
    "a variant beside it": lambda p: shutil.copy(p / "model.safetensors", p / "model.fp16.safetensors"),
    "no safetensors": lambda p: (p / "model.safetensors").unlink(),
    "cut": lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:200]),
    "quantised": quantised,
    "no config": lambda p: (p / "config.json").unlink(),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_left_to_the_models_own_loader(kind: str, tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    assert models.load_unread(str(tmp_path), "fp64") is not None
    OTHERS[kind](tmp_path)
    assert models.load_unread(str(tmp_path), "fp64") is None


CONVERTED = {
    "experts in one tensor": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**WIDE, num_local_experts=2, num_experts_per_tok=2)
    ),
    "a head of another name": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, **TOKENS)),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_weights_that_are_otherwise_in_their_files_are_left_to_the_models_own_loader(kind: str, tmp_path: Path) -> None:
    CONVERTED[kind]().save_pretrained(tmp_path)
    assert models.load_unread(str(tmp_path), "fp32") is None


def test_weights_in_several_files_and_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache as the hub's client keeps it, offline."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    llama().save_pretrained(snapshot, max_shard_size="10KB")
    assert len(list(snapshot.glob("*.safetensors"))) > 1
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    right = models.weights_hash(models.load_model(str(snapshot), "fp32", torch.device("cpu")))
    for source in (str(snapshot), "some/model"):
        model = models.load_unread(source, "fp32")
        assert getattr(model, FOLDER) == snapshot
        assert models.weights_hash(model) == right
    assert models.load_unread("some/other", "fp32") is None


@pytest.mark.parametrize("whose", ["policy", "reference"])
def test_weight_that_is_no_number_is_found_by_the_process_that_reads_it(whose: str, tmp_path: Path) -> None:
    """It is in the last row, the second process's."""
    bad = llama(3)
    with torch.no_grad():
        bad.lm_head.weight[-1, 2] = float("nan")
    given = command(tmp_path, "out")
    source = save(tmp_path / "bad", bad)
    if whose == "policy":
        given = [f"model={source}" if item.startswith("model=") else item for item in given]
    else:
        given.append(f"reference={source}")
    assert join(start(2, lambda rank: leave(cli.run(given)), tmp_path / "said")) == [2, 2]
    said = "".join((tmp_path / "said" / f"said-{rank}.txt").read_text() for rank in range(2))
    lines = [line for line in said.splitlines() if line.startswith("dpo-train: ")]
    assert len(lines) == 1
    assert f"the {whose}'s weight lm_head.weight has NaN or infinite values" in lines[0]


@pytest.mark.parametrize(
    "more", [[], *(pytest.param(more, marks=pytest.mark.long) for more in (
        ["reference=own"], ["reference_logps=precomputed"], ["lora.rank=2", "reference=own"], ["shard=1"]))], ids=str,
)  # fmt: skip
def test_run_from_a_folder_reads_in_parts_what_a_process_alone_loads(more: list[str], tmp_path: Path) -> None:
    """The history of three steps in float64; and nobody has the whole model, but with a new adapter."""
    save(tmp_path / "r", llama(7))
    given = [*command(tmp_path, "x"), "dtype=fp64", "steps=3", *more]
    given = [item for item in given if item not in ("steps=15", f"output_dir={tmp_path / 'x'}")]
    given = [f"reference={tmp_path / 'r'}" if item == "reference=own" else item for item in given]
    alone = [item for item in given if not item.startswith("shard=")]
    assert cli.run([*alone, f"output_dir={tmp_path / 'one'}"]) == 0
    whole = [] if any("lora" in item for item in more) else [str(tmp_path)]

    def action(rank: int) -> None:
        right = models.load_model

        def load(source: str, *rest: Any) -> Any:
            assert not whole, "the whole model was loaded"
            return right(source, *rest)

        models.load_model = load
        leave(cli.run([*given, f"output_dir={tmp_path / 'many'}"]))

    assert join(start(2, action, tmp_path / "said")) == [0, 0], (tmp_path / "said" / "said-0.txt").read_text()
    left, right = (history(tmp_path / name) for name in ("one", "many"))
    assert [row[:2] for row in left] == [row[:2] for row in right]
    for row, other in zip(left, right, strict=True):
        # Llama's norms are float32 inside; a step of AdamW from a gradient that is rounding alone may go either way.
        assert row[2]["loss"] == pytest.approx(other[2]["loss"], abs=1e-6)
    facts = [json.loads((tmp_path / name / "final" / "manifest.json").read_text())["facts"] for name in ("one", "many")]
    assert facts[0]["identity"] == facts[1]["identity"]
