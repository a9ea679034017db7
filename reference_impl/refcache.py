"""Can the reference be asked once, before training, and leave memory?  Its log-probs, kept on disk under a key.

The key is a hash of everything the numbers depend on: the reference's weights and settings, the token rows with their
tokenizer and truncation, what is summed, and the precision.  A folder whose key, hashes or rows do not fit is made
again, never used.  Values are found by the pair's row in its source: shuffling, resuming, other batch sizes and other
numbers of processes read the same numbers.
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


def cached_reference(source: Reference, data: PairData, folder: Path, key: str, batch: int) -> CachedReference:
    """The log-probs under `key`, from disk if they are there and whole, else from `source`, `batch` pairs at a time."""
    target = folder / key
    if target.exists():
        try:
            return _read(target, data, key)
        except (DamagedError, SafetensorError, OSError, KeyError) as error:
            log.warning("the reference's log-probs are made again: %s", error)
    else:
        log.info("the reference's log-probs are made once: %d pairs, kept in %s", len(data.pairs), target)
    chosen, rejected = [], []
    for start in range(0, len(data.pairs), batch):
        logps_w, logps_l = source(data.pairs[start : start + batch])
        chosen.append(logps_w.cpu())
        rejected.append(logps_l.cpu())
    tensors = {"row": _rows(data), "chosen": torch.cat(chosen), "rejected": torch.cat(rejected)}
    bad = ~(tensors["chosen"].isfinite() & tensors["rejected"].isfinite())
    if bad.any():
        row = tensors["row"][bad][0].item()
        raise ModelError(f"the reference gives row {row} a log-probability that is not finite")
    with whole_folder(target, {"key": key}) as writing:
        save_file(tensors, writing / FILE)
    return _reference(tensors)


def _read(target: Path, data: PairData, key: str) -> CachedReference:
    if check_folder(target).get("key") != key:
        raise DamagedError(f"{target} was written under another key")
    tensors = load_file(target / FILE)
    if not torch.equal(tensors["row"], _rows(data)):
        raise DamagedError(f"{target} holds other rows")
    return _reference(tensors)


def _rows(data: PairData) -> Tensor:
    return torch.tensor([pair.row for pair in data.pairs], dtype=torch.int64)


def _reference(tensors: dict[str, Tensor]) -> CachedReference:
    place = {row: index for index, row in enumerate(tensors["row"].tolist())}
    return CachedReference(place, tensors["chosen"], tensors["rejected"])
