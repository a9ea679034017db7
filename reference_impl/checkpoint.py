"""How does a run survive being killed?  Checkpoints that are there whole or not at all, and continue bit for bit.

A checkpoint is the model, and under trainer/ what the run needs besides: the optimizer and the generators as
safetensors, the step, the data's position and the history as JSON.  Nothing is a pickle.  A process alone writes the
model as `from_pretrained` loads it, and so is an adapter written; several write weights/, each its own rows, from which
export.py makes such a model.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from reference_impl import randomness
from reference_impl.config import ConfigError, TrainConfig, load_config
from reference_impl.files import DamagedError, check_folder, remove_folder
from reference_impl.metrics import from_line, to_line
from reference_impl.optimize import load_optimizer_state, optimizer_state
from reference_impl.order import Position
from reference_impl.processes import OtherProcessError, is_loss
from reference_impl.shards import save_tensors, shared_folder
from reference_impl.weights import load_policy, save_policy_to_go_on

if TYPE_CHECKING:
    from reference_impl.prepare import Run

log = logging.getLogger("reference_impl")
FINAL = "final"
TRAINER, OPTIMIZER = "trainer", "optimizer"

# A continued run may change where things are and what is reported, and how a step's pairs are split; the objective, the
# data, the steps and the precision it may not.  Paths of models and data are compared by content, not by name.
MAY_DIFFER = frozenset(
    [
        *("model", "reference", "tokenizer", "train", "eval", "output_dir", "device", "batch", "accumulation"),
        *("logps", "reference_batch", "reference_cache", "eval_batch", "eval_every", "eval_at_start", "confidence"),
        *("save_every", "keep_last", "resume", "print_every", "trackers", "gradient_checkpointing"),
        *("shard", "cpu_offload", "compile"),
    ]
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or continued from; says what to do."""


@dataclass(frozen=True)
class State:
    """Where a run stands after `step` optimizer steps."""

    step: int
    position: Position
    history: list[dict[str, Any]]


def checkpoints(folder: Path) -> dict[int, Path]:
    """step → checkpoint, oldest first."""
    found = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return dict(sorted(found.items()))


def save_checkpoint(run: Run, state: State) -> Path:
    """Writes checkpoint-<step> in one piece, then removes those beyond keep_last.

    Raises:
        CheckpointError: the disk is full or gone; earlier checkpoints are whole.
    """
    target, crew = run.folder / f"checkpoint-{state.step:08d}", run.crew
    facts = {
        "step": state.step,
        "position": dataclasses.asdict(state.position),
        "identity": run.identity,
        "config": dataclasses.asdict(run.config),
    }
    try:
        with shared_folder(target, facts, crew) as writing:
            save_policy_to_go_on(run.policy, writing, crew)
            inside = writing / TRAINER
            crew.together(lambda: inside.mkdir() if crew.first else None)
            save_tensors(optimizer_state(run.policy.model, run.optimizer), inside / OPTIMIZER, crew)
            crew.together(lambda: _save_state(inside, state) if crew.first else None)
        if run.config.keep_last is not None:
            old = list(checkpoints(run.folder).values())[: -run.config.keep_last]
            crew.together(lambda: [remove_folder(path) for path in old] if crew.first else None)
    except (OSError, SafetensorError, OtherProcessError) as error:
        raise CheckpointError(
            f"{target} could not be written ({error}); nothing of it is left and earlier checkpoints are whole: "
            "make room, then run the same command to go on"
        ) from error
    return target


def _save_state(folder: Path, state: State) -> None:
    save_file(randomness.capture(), folder / "generators.safetensors")
    lines = "".join(to_line(row) for row in state.history)
    (folder / "history.jsonl").write_text(lines, encoding="utf-8")


def find_checkpoint(config: TrainConfig, folder: Path | None) -> Path | None:
    """The checkpoint to continue from; None: start anew.

    Raises:
        CheckpointError: the one asked for is not there or damaged, all in the folder are damaged, or it belongs to
            another config.
        ConfigError: the folder has the model of a run that is done, with other settings.
    """
    if config.resume not in ("auto", "never"):
        try:
            _same_config(Path(config.resume), check_folder(Path(config.resume)), config)
        except DamagedError as error:
            raise CheckpointError(f"resume={config.resume} cannot be continued from: {error}") from error
        return Path(config.resume)
    found = checkpoints(folder) if folder is not None else {}
    if config.resume == "never" and found:
        raise ConfigError(f"resume=never, but {folder} has checkpoints: remove them, or give another output_dir")
    for path in reversed(found.values()):
        try:
            facts = check_folder(path)
        except DamagedError as error:
            log.warning("passed over: %s", error)
        else:
            _same_config(path, facts, config)
            return path
    if found:
        raise CheckpointError(f"all checkpoints in {folder} are damaged: remove them to start anew")
    if folder is not None and (folder / FINAL / "train_config.yaml").exists():
        _same_finished(folder / FINAL, config)
    return None


def load_checkpoint(path: Path, run: Run) -> State:
    """Puts policy, optimizer and generators where they were; returns where the run stands.

    Raises:
        CheckpointError: it belongs to another model, data set or config.
    """
    crew = run.crew
    facts = crew.tell(crew.together(lambda: _checked(path, run) if crew.first else None))
    try:
        load_policy(run.policy, path, crew)
        load_optimizer_state(run.policy.model, run.optimizer, path / TRAINER / OPTIMIZER, crew)
        crew.together(lambda: randomness.restore(load_file(path / TRAINER / "generators.safetensors")))
        lines = (path / TRAINER / "history.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        if is_loss(error):
            raise
        raise CheckpointError(f"{path} cannot be continued from: {error}") from error
    return State(facts["step"], Position(**facts["position"]), [from_line(line) for line in lines])


def _checked(path: Path, run: Run) -> dict[str, Any]:
    """The facts of a whole checkpoint of this run."""
    facts = check_folder(path)
    _same_config(path, facts, run.config)
    _same_inputs(path, facts, run.identity)
    return facts


def _same_inputs(path: Path, facts: dict[str, Any], identity: dict[str, Any]) -> None:
    names = {"policy": "the policy before training", "reference": "the reference", "data": "the training pairs"}
    for key, words in names.items():
        if facts["identity"].get(key) != identity[key]:
            raise CheckpointError(
                f"{path} belongs to another run: {words} differ (hash {str(facts['identity'].get(key))[:12]} there, "
                f"{str(identity[key])[:12]} here); give another output_dir, or the inputs of that run"
            )


def _same_finished(final: Path, config: TrainConfig) -> None:
    """The same command makes the same model again; another one must not take its place."""
    there = _plain(load_config(final / "train_config.yaml"))
    if changes := _changes(there, config, MAY_DIFFER - {"model", "reference", "tokenizer", "train"}):
        raise ConfigError(f"{final} is the model of another run ({changes}): give another output_dir, or remove it")


def _changes(there: dict[str, Any], config: TrainConfig, but: frozenset[str]) -> str:
    """Settings that differ, with both values; '' where none does."""
    here = _plain(config)
    changed = [name for name, value in here.items() if name not in but and there.get(name) != value]
    return ", ".join(f"{name}: {there.get(name)} there, {here[name]} here" for name in changed)


def _plain(config: TrainConfig) -> dict[str, Any]:
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _same_config(path: Path, facts: dict[str, Any], config: TrainConfig) -> None:
    if changes := _changes(facts["config"], config, MAY_DIFFER):
        raise CheckpointError(
            f"{path} belongs to another config ({changes}); give another output_dir, or the old values"
        )
    there = facts["config"]["batch"] * facts["config"]["accumulation"]
    if there != config.pairs_per_step:
        raise CheckpointError(
            f"{path} has {there} pairs in a step, batch × accumulation is now {config.pairs_per_step}: keep the product"
        )
