"""Can the reference be asked once, before training, and leave memory?  Its log-probs, kept on disk under a key.

The key is a hash of everything the numbers depend on: the reference's weights and settings, the token rows with their
tokenizer and truncation, what is summed, and the precision.  A folder whose key, hashes or rows do not fit is made
again, never used.  Values are found by the pair's row in its source: shuffling, resuming, other batch sizes and other
numbers of processes read the same numbers.  Of several processes the first reads and writes, and tells the others.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference_impl.data import PairData, TokenPair
from reference_impl.files import DamagedError, check_folder, whole_folder
from reference_impl.models import ModelError
from reference_impl.order import parts
from reference_impl.processes import Processes
from reference_impl.reference import Reference

log = logging.getLogger("reference_impl")
FILE = "logps.safetensors"
WEIGHTING = "sum over all completion tokens, weight 1"


@dataclass(frozen=True)
class CachedReference:
    """Log-probs by row; (pair,) tensors in the data set's order."""

    place: dict[int, int]
    chosen: Tensor
    rejected: Tensor

    def __call__(self, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
        index = torch.tensor([self.place[pair.row] for pair in pairs])
        return self.chosen[index], self.rejected[index]

    def close(self) -> None:
        pass


def cache_key(reference_hash: str, data: PairData, dtype: str, path: str) -> str:
    """Name of the folder that holds these log-probs."""
    parts = {
        "version": 1,
        "reference": reference_hash,
        "data": data.fingerprint,
        "weighting": WEIGHTING,
        "dtype": dtype,
        "logps": path,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cached_reference(
    source: Reference, data: PairData, folder: Path, key: str, batch: int, crew: Processes
) -> CachedReference:
    """The log-probs under `key`, from disk if they are there and whole, else from `source`, `batch` pairs at a time."""
    target = folder / key
    found = crew.together(lambda: _find(target, data, key) if crew.first else None)
    if crew.tell(found is not None):
        return _reference(_same(found, data, crew))
    made = _score(source, data, batch, crew)
    bad = ~(made["chosen"].isfinite() & made["rejected"].isfinite())
    if bad.any():
        row = made["row"][bad][0].item()
        raise ModelError(f"the reference gives row {row} a log-probability that is not finite")
    crew.together(lambda: _write(target, key, made) if crew.first else None)
    return _reference(made)


def _find(target: Path, data: PairData, key: str) -> dict[str, Tensor] | None:
    """The tensors on disk; None where they have to be made."""
    if target.exists():
        try:
            return _read(target, data, key)
        except (DamagedError, SafetensorError, OSError, KeyError) as error:
            log.warning("the reference's log-probs are made again: %s", error)
    else:
        log.info("the reference's log-probs are made once: %d pairs, kept in %s", len(data.pairs), target)
    return None


def _score(source: Reference, data: PairData, batch: int, crew: Processes) -> dict[str, Tensor]:
    """Each process scores its share; all get all."""
    scored: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
    for part in parts(range(len(data.pairs)), batch, crew.rank, crew.world):
        both = source([data.pairs[index] for index in part.indices])
        for side, logps in zip(scored.values(), both, strict=True):
            side.append(logps.cpu()[:0] if part.idle else logps.cpu())
    made = {name: torch.cat(crew.gather(torch.cat(logps))) for name, logps in scored.items()}
    return {"row": _rows(data), **made}


def _same(found: dict[str, Tensor] | None, data: PairData, crew: Processes) -> dict[str, Tensor]:
    """What the first process found, in all of them."""
    if crew.world == 1:
        return found
    wide = crew.tell(found and str(found["chosen"].dtype).removeprefix("torch."))
    mine = found or dict.fromkeys(("chosen", "rejected"), torch.zeros(0, dtype=getattr(torch, wide)))
    return {"row": _rows(data), **{name: crew.gather(mine[name])[0] for name in ("chosen", "rejected")}}


def _write(target: Path, key: str, tensors: dict[str, Tensor]) -> None:
    with whole_folder(target, {"key": key}) as writing:
        save_file(tensors, writing / FILE)


def _read(target: Path, data: PairData, key: str) -> dict[str, Tensor]:
    if check_folder(target).get("key") != key:
        raise DamagedError(f"{target} was written under another key")
    tensors = load_file(target / FILE)
    if not torch.equal(tensors["row"], _rows(data)):
        raise DamagedError(f"{target} holds other rows")
    return tensors


def _rows(data: PairData) -> Tensor:
    return torch.tensor([pair.row for pair in data.pairs], dtype=torch.int64)


def _reference(tensors: dict[str, Tensor]) -> CachedReference:
    place = {row: index for index, row in enumerate(tensors["row"].tolist())}
    return CachedReference(place, tensors["chosen"], tensors["rejected"])
