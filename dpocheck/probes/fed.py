"""Which token rows does a trainer feed its policy, on a tokenizer of the user's own?  Worker side; it judges nothing.

The policy is an ordinary small Llama with the tokenizer's vocabulary.  A hook on its decoder records ids and attention
mask; the gradient of the last hidden states tells which positions are scored: after the last layer a position's state
reaches the loss through its own logits alone.  One pair a step, so that rows stay in order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from dpocheck.adapter import Probe, Recipe
from dpocheck.experiment import Body, Row, TextExperiment
from dpocheck.probes import tables

BODY = Body("speaking")
BATCHED = 2  # decoder calls are seen as (row, position)


class Unreadable(Exception):
    """The folder holds no tokenizer that transformers loads."""


@dataclass
class Recorder:
    """The rows of every decoder call that carried a graph, in order."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def watch(self, decoder: Any) -> None:
        calls: list[tuple[Any, Any] | None] = []

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            import torch

            ids = kwargs.get("input_ids", args[0] if args else None)
            mask = kwargs.get("attention_mask")
            plain = torch.is_tensor(ids) and ids.ndim == BATCHED and (mask is None or mask.shape == ids.shape)
            calls.append((ids.detach().clone(), None if mask is None else mask.detach().bool()) if plain else None)

        def leave(module: Any, args: Any, output: Any) -> None:
            call, hidden = calls.pop(), output[0]
            if call is not None and hidden.requires_grad:
                ids, mask = call
                rows = [{"ids": ids[i][mask[i]].tolist() if mask is not None else ids[i].tolist(), "scored": []}
                        for i in range(len(ids))]  # fmt: skip
                self.rows += rows
                hidden.register_hook(lambda gradient: _scored(rows, gradient, mask))

        decoder.register_forward_pre_hook(enter, with_kwargs=True)
        decoder.register_forward_hook(leave)


def _scored(rows: list[dict[str, Any]], gradient: Any, mask: Any) -> None:
    """A position with a gradient predicts the next token; that one is scored."""
    reached = gradient.detach().abs().sum(dim=-1) > 0
    for i, row in enumerate(rows):
        own = reached[i] if mask is None else reached[i][mask[i]]
        row["scored"] = [position + 1 for position in own.nonzero().flatten().tolist()]


def observe(adapter: Any, experiment: TextExperiment, folder: Path) -> dict[str, Any]:
    """Run the rows that the template accepts; what was fed, and what the tokenizer says is due."""
    tokenizer = _tokenizer(experiment.tokenizer)
    due, kept, left_out = [], [], []
    for row in experiment.rows:
        try:
            due.append(_due(row, tokenizer))
            kept.append(row)
        except Exception as refusal:  # a template refuses what it has no words for: a system message, say
            left_out.append(f"{type(refusal).__name__}: {refusal}")
    if not kept:
        return {"pairs": [], "fed": [], "left_out": left_out}
    recorder = Recorder()
    for name in ("policy", "reference"):
        _checkpoint(folder / name, tokenizer)
    recipe = Recipe(experiment.objective, learning_rate=2.0**-20, batch=1, steps=len(kept))
    (folder / "run").mkdir(parents=True, exist_ok=True)
    records = [row.record() for row in kept]
    adapter.train(_probe(folder, experiment.tokenizer, recorder), {"train": records}, recipe, folder / "run")
    again = _tokenizer(experiment.tokenizer)  # as it was before the trainer had it
    return {"pairs": due, "fed": [_told(row, again) for row in recorder.rows], "left_out": left_out}


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as fault:
        raise Unreadable(f"{path} holds no tokenizer that transformers loads: {fault}") from fault


def _checkpoint(folder: Path, tokenizer: Any) -> None:
    """A small Llama whose vocabulary is the tokenizer's, and the tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    size = max([len(tokenizer), *(token + 1 for token in tokenizer.get_vocab().values())])
    ids = _Ids(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    save_file(tables.weights(None, size, BODY), folder / "model.safetensors", metadata={"format": "pt"})
    configuration = tables.configuration(size, BODY, "float32", ids)  # type: ignore[arg-type]
    (folder / "config.json").write_text(json.dumps(configuration), encoding="utf-8")
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class _Ids:
    bos: int | None
    eos: int | None
    pad: int | None


def _probe(folder: Path, tokenizer: str, recorder: Recorder) -> Probe:
    from dpocheck.probes import live

    def seen(name: str, model: Any) -> None:
        if name == "policy":
            recorder.watch(model.model)

    models = live.probe(folder / "policy", folder / "reference", dtype="float32", watch=seen)
    kept: dict[str, Any] = {}

    def load(what: str) -> Any:
        if what != "tokenizer":
            return models.load(what)
        return kept.setdefault(what, _tokenizer(tokenizer))

    return Probe(folder / "policy", folder / "reference", folder / "policy", load)


# ------------------------------------------------------------------------------------------------- what is due, and was


def _due(row: Row, tokenizer: Any) -> dict[str, Any]:
    """The texts of a pair, and how many BOS and EOS the tokenizer itself puts into them."""
    record = row.record()
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if isinstance(chosen, str):
        sides, opening, special = [(prompt or "") + side for side in (chosen, rejected)], prompt, True
    else:
        sides = [tokenizer.apply_chat_template((prompt or []) + side, tokenize=False) for side in (chosen, rejected)]
        opening, special = None, False
        if prompt is not None:
            opening = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    told: dict[str, Any] = {"prompt": opening, "chat": not special}
    for name, text in zip(("chosen", "rejected"), sides, strict=True):
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        told[name] = {
            "text": text, "faithful": _decoded(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]),
            "bos": _count(ids, tokenizer.bos_token_id), "eos": _count(ids, tokenizer.eos_token_id),
            "ends": ids[-1:] == [tokenizer.eos_token_id],
        }  # fmt: skip
    return told


def _told(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A row that was fed, as text: whole, before the first scored token, and one token less or more."""
    ids, scored = row["ids"], row["scored"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = scored[0] if scored else len(ids)
    return {
        "text": _decoded(tokenizer, ids), "ids": ids, "scored": scored, "start": start,
        "before": _decoded(tokenizer, ids[: max(0, start - 1)]), "prompt": _decoded(tokenizer, ids[:start]),
        "through": _decoded(tokenizer, ids[: start + 1]), "bos": _count(ids, bos), "eos": _count(ids, eos),
        "bos_first": bos is not None and ids[:1] == [bos], "eos_last": eos is not None and ids[-1:] == [eos],
        "bos_text": tokenizer.bos_token or "", "eos_text": tokenizer.eos_token or "", "same": bos == eos,
    }  # fmt: skip


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _count(ids: list[int], token: int | None) -> int:
    return 0 if token is None else ids.count(token)
