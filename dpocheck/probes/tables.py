"""How does an experiment become checkpoint folders, and how are trained weights read back as logits?

A table becomes a *stock* Llama that is that table exactly.  Hidden size H = vocabulary V (silent) or 4 V (glass), a
power of 4, so that 1/sqrt(H) is a power of two and the norm is exact.  Embedding c*I; final norm k/sqrt(H); head W/k,
untied; the layer adds nothing.  The hidden state after token u is then exactly k*e_u and the logits are row u of the
table.  c and k are so large that training moves the head alone: under SGD with learning rate eta/k^2 a step moves the
logits by eta times their gradient.

Only numpy and safetensors are imported: trainers of any framework, and the judge, share this one piece.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from dpocheck.experiment import Body, Recipe, Table, Tokenizer
from dpocheck.probes import tokenizers

HEAD = "lm_head.weight"
ATTENDED = 1.0  # the scale `a` at which the glass layer writes the attended tokens: far below c


@dataclass(frozen=True)
class Scales:
    """c and k of a dtype; powers of two, so that scaling is exact."""

    c: float
    k: float


def scales(dtype: str) -> Scales:
    """Large enough that nothing but the head moves, small enough not to overflow."""
    return Scales(2.0**20, 2.0**14) if dtype == "float64" else Scales(2.0**14, 2.0**10)


def hidden_size(size: int, body: Body) -> int:
    """H for a table of `size` tokens.  Raises ValueError unless it is a power of 4."""
    if body.kind == "speaking":
        return body.hidden
    hidden = size if body.kind == "silent" else 4 * size
    if 4 ** round(math.log(hidden, 4)) != hidden:
        raise ValueError(f"a {body.kind} table has a hidden size of {hidden}; it must be a power of 4, as 64 or 256")
    return hidden


def weights(table: Table | None, size: int, body: Body, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The parameters of the checkpoint, by transformers' names for Llama, in `dtype` (bfloat16 stored as float32)."""
    build = _speaking(size, body) if body.kind == "speaking" else _table(table, body, scales(dtype))
    stored = np.float64 if dtype == "float64" else np.float32
    return {name: np.ascontiguousarray(array, dtype=stored) for name, array in build.items()}


def _table(table: Table, body: Body, scale: Scales) -> dict[str, np.ndarray]:
    size, hidden = table.size, hidden_size(table.size, body)
    token, root = np.eye(size, hidden), math.sqrt(hidden)
    norm = np.full(hidden, scale.k / root)
    built = _empty_layers(hidden, body.layers)
    if body.kind != "silent":
        layer = "model.layers.0.self_attn."
        built[layer + "v_proj.weight"] = np.eye(hidden) / root
        lift = np.zeros((hidden, hidden))
        lift[np.arange(size, 2 * size), np.arange(size)] = ATTENDED
        built[layer + "o_proj.weight"] = lift
        norm[size : 2 * size] *= scale.c / ATTENDED
        if body.kind == "clock":
            # k = 8 e_0 and q = 4 (e_0 + e_half) for every token; RoPE turns the pair (e_0, e_half) by the position,
            # so that the score q.k / 16 is 2 (cos d - sin d) at the distance d = i - j.
            built[layer + "k_proj.weight"][0, :size] = 0.5
            built[layer + "q_proj.weight"][[0, hidden // 2], :size] = 0.25
    head = np.zeros((size, hidden))
    head[:, :size] = table.logits().T / scale.k
    return built | {"model.embed_tokens.weight": scale.c * token, "model.norm.weight": norm, HEAD: head}


def _empty_layers(hidden: int, layers: int) -> dict[str, np.ndarray]:
    built = {}
    for number in range(layers):
        layer = f"model.layers.{number}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            built[f"{layer}self_attn.{name}.weight"] = np.zeros((hidden, hidden))
        for name in ("gate_proj", "up_proj"):
            built[f"{layer}mlp.{name}.weight"] = np.zeros((8, hidden))
        built[f"{layer}mlp.down_proj.weight"] = np.zeros((hidden, 8))
        for name in ("input_layernorm", "post_attention_layernorm"):
            built[f"{layer}{name}.weight"] = np.ones(hidden)
    return built


def _speaking(size: int, body: Body) -> dict[str, np.ndarray]:
    """An ordinary small Llama whose weights follow from a formula: no seed, the same in every numpy."""
    shapes = {name: array.shape for name, array in _empty_layers(body.hidden, body.layers).items()}
    shapes |= {"model.embed_tokens.weight": (size, body.hidden), "model.norm.weight": (body.hidden,)}
    shapes |= {HEAD: (size, body.hidden)}
    built, start = {}, 1
    for name, shape in sorted(shapes.items()):
        count = int(np.prod(shape))
        wave = np.sin(np.arange(start, start + count) * 12.9898) * 43758.5453
        noise = (wave - np.floor(wave) - 0.5).reshape(shape)
        built[name] = 1 + 0.2 * noise if "norm" in name else noise * 2.0
        start += count
    return built


def longest(body: Body) -> int:
    """Tokens a row may have: few, for transformers 4.38 builds masks as wide as this, squared, for every row."""
    return 2048 if body.kind == "speaking" else 256


def configuration(size: int, body: Body, dtype: str, tokenizer: Tokenizer) -> dict:
    """config.json of the checkpoint."""
    hidden = hidden_size(size, body)
    heads = 2 if body.kind == "speaking" else 1
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size, "hidden_size": hidden,
        "intermediate_size": 8, "num_hidden_layers": body.layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": hidden // heads, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": longest(body), "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
        "attention_dropout": body.attention_dropout, "tie_word_embeddings": False, "use_cache": False,
        "torch_dtype": dtype, "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }  # fmt: skip


def write_checkpoint(
    folder: Path, table: Table | None, tokenizer: Tokenizer, body: Body, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Write model, configuration and tokenizer as transformers reads them; return the parameters as stored."""
    folder.mkdir(parents=True, exist_ok=True)
    state = weights(table, tokenizer.size, body, dtype)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(configuration(tokenizer.size, body, dtype, tokenizer), indent=1)
    (folder / "config.json").write_text(text, encoding="utf-8")
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    (folder / "generation_config.json").write_text(json.dumps(ids), encoding="utf-8")
    tokenizers.write(folder, tokenizer)
    return state


def translate(recipe: Recipe, body: Body) -> Recipe:
    """The recipe in a trainer's own units: rates, clipping and decay of logits become those of the head."""
    if body.kind == "speaking":
        return recipe
    k = scales(recipe.dtype).k
    clip = None if recipe.clip_norm is None else recipe.clip_norm * k
    return replace(
        recipe, learning_rate=recipe.learning_rate / k**2, clip_norm=clip, weight_decay=recipe.weight_decay * k**2
    )


def read_state(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a saved model: a safetensors file, or a folder with one or several (adapters are not merged)."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} holds no .safetensors file; the trained policy is expected there")
    state: dict[str, np.ndarray] = {}
    for file in files:
        state |= _tensors(file)
    return state


def _tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file; numpy knows no bfloat16: those come as float32, which holds them exactly."""
    try:
        return load_file(file)
    except TypeError:
        raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, said in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        low, high = said["data_offsets"]
        part = raw[start + low : start + high]
        if said["dtype"] == "BF16":
            held = (np.frombuffer(part, "<u2").astype("<u4") << 16).view("<f4")
        else:
            held = np.frombuffer(part, NUMPY[said["dtype"]])
        found[name] = held.reshape(said["shape"])
    return found


NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}


def logits(head: np.ndarray, size: int, dtype: str) -> np.ndarray:
    """(context, target) logits of a head (target, hidden)."""
    return np.asarray(head, np.float64)[:, :size].T * scales(dtype).k


def attended(head: np.ndarray, size: int, dtype: str) -> np.ndarray:
    """(attended token, target): the columns of a glass head that start at zero, in logits."""
    return np.asarray(head, np.float64)[:, size : 2 * size].T * scales(dtype).k


def digest(state: dict[str, np.ndarray]) -> str:
    """sha256 over names, shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        total.update(f"{name}{array.shape}{array.dtype}".encode())
        total.update(array.tobytes())
    return total.hexdigest()
