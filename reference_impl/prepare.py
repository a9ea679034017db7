"""What has to be ready before the first step?  Data, policy, reference, optimizer, the cheap and fallible first."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from reference_impl import models, parallel
from reference_impl.config import RESERVED_SPLITS, ConfigError, TrainConfig
from reference_impl.data import DataError, PairData, TokenPair, load_pairs
from reference_impl.files import write_text
from reference_impl.folder import close_folder
from reference_impl.logps import unwrapped
from reference_impl.models import ModelError, Policy
from reference_impl.objectives import OBJECTIVES
from reference_impl.optimize import build_optimizer
from reference_impl.order import steps_per_epoch
from reference_impl.processes import OtherProcessError, Processes
from reference_impl.reading import is_unread
from reference_impl.refcache import cache_key, cached_reference
from reference_impl.reference import OnlineReference, Reference, online_reference

log = logging.getLogger("reference_impl")


@dataclass
class Run:
    """Everything the loop needs.

    folder: the same for all processes; the first one writes.
    references: data set's name ('train' or a held-out set's) → its frozen reference; empty for an objective without.
    identity: hashes by which a checkpoint knows its run.
    """

    config: TrainConfig
    crew: Processes
    folder: Path | None
    policy: Policy
    references: dict[str, Reference]
    train: PairData
    held_out: dict[str, PairData]
    optimizer: torch.optim.Optimizer
    total_steps: int
    identity: dict[str, Any]

    def close(self) -> None:
        """Gives the models back as they came, and the folder free."""
        for reference in {id(r): r for r in self.references.values()}.values():
            reference.close()
        self.policy.give_back()
        if self.folder is not None and self.crew.first:
            close_folder(self.folder)


def prepare(
    config: TrainConfig,
    crew: Processes,
    folder: Path | None,
    model: nn.Module | None,
    reference: nn.Module | None,
    tokenizer: Any,
    train_rows: Any,
    eval_rows: Any,
) -> Run:
    """Reads data before models, and checks everything that can be checked before the first step."""
    live = model is not None
    train, held_out, tokenizer, pad_id, total_steps = crew.together(
        lambda: _data(config, folder if crew.first else None, model, reference, tokenizer, train_rows, eval_rows)
    )
    sets = {"train": train, **held_out}
    _same_everywhere(crew, {name: data.fingerprint for name, data in sets.items()}, DataError)
    unread = _unread(config, crew, live)
    policy = crew.together(lambda: _policy(config, crew, folder, model, tokenizer, pad_id, sets, unread))
    try:
        given = crew.together(lambda: _given_reference(config, crew, policy, reference, tokenizer, unread))
        identity = _identity(crew, folder, policy, given, live) | {"data": train.fingerprint}
        references = _references(config, crew, folder, policy, given, sets, live)
        if config.compile:
            parallel.compile_layers(policy)
    except BaseException:
        policy.give_back()
        raise
    optimizer = build_optimizer(policy.model, config)
    return Run(config, crew, folder, policy, references, train, held_out, optimizer, total_steps, identity)


def _data(
    config: TrainConfig,
    folder: Path | None,
    model: nn.Module | None,
    reference: nn.Module | None,
    tokenizer: Any,
    train_rows: Any,
    eval_rows: Any,
) -> tuple[PairData, dict[str, PairData], Any, int, int]:
    """Training pairs, held-out sets, tokenizer, the id to pad with and the number of steps."""
    _check_inputs(config, model, reference, train_rows)
    tokenizer = tokenizer or _own_tokenizer(config, model, train_rows)
    pad_id = models.check_tokenizer(tokenizer) if tokenizer is not None else _pad_id(model)
    train = _pairs(train_rows if train_rows is not None else config.train, tokenizer, config)
    held_out = {
        name: _pairs(rows, tokenizer, config) for name, rows in (_named(eval_rows) or dict(config.eval)).items()
    }
    for name, data in {"train": train, **held_out}.items():
        _tell_report(name, data, folder)
    per_epoch = steps_per_epoch(len(train.pairs), config.pairs_per_step, config.last_step)
    total_steps = config.steps or (config.epochs or 1) * per_epoch
    _check_steps(config, len(train.pairs), per_epoch, total_steps)
    return train, held_out, tokenizer, pad_id, total_steps


def _policy(
    config: TrainConfig,
    crew: Processes,
    folder: Path | None,
    model: nn.Module | None,
    tokenizer: Any,
    pad_id: int,
    sets: dict[str, PairData],
    unread: dict[str, nn.Module],
) -> Policy:
    model = model if model is not None else unread.get("model") or _load(config.model, config, crew)
    models.check_model(model, tokenizer, "policy")
    if folder is not None and crew.first:
        models.check_can_be_saved(model)
    _check_ids(model, sets)
    return models.prepare_policy(model, tokenizer, pad_id, config)


def _given_reference(
    config: TrainConfig,
    crew: Processes,
    policy: Policy,
    reference: nn.Module | None,
    tokenizer: Any,
    unread: dict[str, nn.Module],
) -> nn.Module | None:
    if reference is None and config.reference is not None:
        reference = unread.get("reference") or _load(config.reference, config, crew, policy.device)
    if reference is not None:
        models.check_model(reference, tokenizer, "reference")
    return reference


def _unread(config: TrainConfig, crew: Processes, live: bool) -> dict[str, nn.Module]:
    """Of several processes, the models whose files each can read its own rows of: setting → a model without weights."""
    if crew.world == 1:
        return {}
    # A new adapter is put on a model that has its weights.
    sources = {"model": None if live or config.lora else config.model, "reference": config.reference}
    made = crew.together(
        lambda: {name: models.load_unread(source, config.dtype) for name, source in sources.items() if source}
    )
    said = crew.ask([name for name, model in made.items() if model is not None])
    return {name: model for name, model in made.items() if all(name in able for able in said)}


def _load(source: str, config: TrainConfig, crew: Processes, device: torch.device | None = None) -> nn.Module:
    """A model from a folder or the hub.  Of several processes the first reads the weights, into the computer's memory;
    laying them out sends each process its part."""
    if crew.world == 1:
        return models.load_model(source, config.dtype, device or models.pick_device(config.device))
    if crew.first:
        return models.load_model(source, config.dtype, torch.device("cpu"))
    return models.load_skeleton(source, config.dtype)


def _identity(
    crew: Processes, folder: Path | None, policy: Policy, given: nn.Module | None, live: bool
) -> dict[str, str | None]:
    """Hashes of the models before training; where no folder is written nobody asks for them."""

    def of(model: nn.Module) -> str | None:
        known = crew.first if is_unread(model) else not any(p.is_meta for p in model.parameters())
        return models.weights_hash(model) if known and folder is not None else None

    mine = {"policy": of(policy.model), "reference": "policy" if given is None else of(given)}
    if live:
        _same_everywhere(crew, mine, ModelError)
    return crew.tell(mine)


def _same_everywhere(crew: Processes, hashes: dict[str, str | None], kind: type[Exception]) -> None:
    """Raises where processes were given different things: each trains on its share of what all have."""
    said = crew.ask(hashes)
    for rank, other in enumerate(said):
        for name, known in said[0].items():
            if known is not None and other.get(name) not in (known, None):
                raise kind(f"{name} of process {rank} is not that of process 0: give all processes the same")


def _tell_report(name: str, data: PairData, folder: Path | None) -> None:
    if data.report is None:
        return
    for line in data.report.lines():
        log.info("%s", line)
    if folder is not None:
        write_text(folder / f"data_report.{name}.json", data.report.to_json())


def _references(
    config: TrainConfig,
    crew: Processes,
    folder: Path | None,
    policy: Policy,
    given: nn.Module | None,
    sets: dict[str, PairData],
    live: bool,
) -> dict[str, Reference]:
    """The frozen references; from here on the models lie over the processes."""
    wanted = OBJECTIVES[config.objective].reference
    precomputed = wanted and config.reference_logps == "precomputed"
    source: Reference | None = None
    if precomputed and given is None:
        # Before the first step the policy is the reference: no copy is needed to ask it once.
        source = OnlineReference(policy.model, policy)
    elif wanted:
        source = crew.together(lambda: online_reference(policy, given))
    digest = crew.tell(models.weights_hash(source.model) if precomputed and crew.first else None)
    if crew.world > 1:
        parallel.spread_run(policy, source, given, config, crew, live)
    if not precomputed:
        return dict.fromkeys(sets, source) if wanted else {}
    place = Path(config.reference_cache) if config.reference_cache else folder / "reference_cache"
    batch = config.reference_batch or config.batch

    def cached(data: PairData) -> Reference:
        return cached_reference(source, data, place, cache_key(digest, data, config.dtype, config.logps), batch, crew)

    try:
        return {name: cached(data) for name, data in sets.items()}
    except (OSError, SafetensorError, OtherProcessError) as error:
        words = getattr(error, "strerror", None) or error
        raise ConfigError(f"reference_cache {place} cannot be written: {words}") from error
    finally:
        source.close()


def _check_inputs(config: TrainConfig, model: nn.Module | None, reference: nn.Module | None, train_rows: Any) -> None:
    if model is None and config.model is None:
        raise ConfigError("no policy: set model to a folder or a hub name, or pass a live model")
    if train_rows is None and config.train is None:
        raise ConfigError("no training data: set train to a file or 'hub:name', or pass train_rows")
    if reference is not None and config.reference is not None:
        raise ConfigError(f"two references: a live one was passed, and reference={config.reference}: give one")
    if reference is not None and not OBJECTIVES[config.objective].reference:
        raise ConfigError(f"a reference was passed, but {config.objective} has none")


def _check_steps(config: TrainConfig, pairs: int, per_epoch: int, total: int) -> None:
    if per_epoch == 0:
        raise ConfigError(
            f"{pairs} pairs do not fill one optimizer step of batch {config.batch} × accumulation "
            f"{config.accumulation}: set last_step=keep, or lower them"
        )
    if 0 < total <= config.warmup_steps:
        raise ConfigError(f"warmup_steps is {config.warmup_steps}, but the run has only {total} steps")


def _own_tokenizer(config: TrainConfig, model: nn.Module | None, train_rows: Any) -> Any:
    if config.tokenizer is None and _is_tokenised(train_rows):
        return None
    source = config.tokenizer or config.model or getattr(unwrapped(model), "name_or_path", None)
    if not source:
        raise ConfigError("no tokenizer: pass one, or set tokenizer to a folder or a hub name")
    return models.load_tokenizer(source)


def _pad_id(model: nn.Module | None) -> int:
    config = getattr(unwrapped(model), "config", None) if model is not None else None
    known = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((value for value in known if isinstance(value, int) and value >= 0), 0)


def _is_tokenised(rows: Any) -> bool:
    if isinstance(rows, PairData):
        return True
    return isinstance(rows, Sequence) and len(rows) > 0 and isinstance(rows[0], TokenPair)


def _pairs(rows: Any, tokenizer: Any, config: TrainConfig) -> PairData:
    if isinstance(rows, PairData):
        return rows
    if _is_tokenised(rows):
        numbers = [pair.row for pair in rows]
        if len(set(numbers)) < len(numbers):
            raise ConfigError("two TokenPairs have one row number: give each its own, log-probs are found by it")
        digest = hashlib.sha256(repr([dataclasses.astuple(pair) for pair in rows]).encode()).hexdigest()
        return PairData(tuple(rows), None, digest)
    if tokenizer is None:
        raise ConfigError("rows of text need a tokenizer: pass one, or set tokenizer")
    return load_pairs(
        rows,
        tokenizer,
        max_length=config.max_length,
        truncation=config.truncation,
        chat_template_kwargs=dict(config.chat_template_kwargs),
    )


def _named(eval_rows: Any) -> dict[str, Any] | None:
    if eval_rows is None:
        return None
    named = dict(eval_rows) if isinstance(eval_rows, Mapping) else {"eval": eval_rows}
    taken = [name for name in named if name in RESERVED_SPLITS]
    if taken:
        raise ConfigError(f"a held-out set is named {taken[0]!r}: this name is taken")
    return named


def _check_ids(model: nn.Module, sets: dict[str, PairData]) -> None:
    rows = unwrapped(model).get_input_embeddings().weight.shape[0]
    for name, data in sets.items():
        for pair in data.pairs:
            largest = max(*pair.prompt, *pair.chosen, *pair.rejected)
            if largest >= rows:
                raise ModelError(f"row {pair.row} of {name} has token {largest}, but the embedding has {rows} rows")
