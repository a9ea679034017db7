"""How is a run started from a shell?  dpo-train CONFIG.yaml key=value ...

Exit codes: 0 done, 2 a setting, row, model or file was refused before training, 1 training could not go on,
143 ended by SIGTERM after a checkpoint (the same command goes on).

Under torchrun all processes run this; what a person is to read comes from one of them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from reference_impl.config import TrainConfig
    from reference_impl.progress import Screen


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("settings", nargs=-1, metavar="[rows|export] [CONFIG.yaml] [KEY=VALUE]...")
@click.option("--show-config", is_flag=True, help="Print the settings that would be used, and stop.")
@click.option("--row", type=int, help="With rows: show this row (from 0), token by token.")
@click.option("--reason", help="With rows: only rows dropped or cut for this reason.")
def command(settings: tuple[str, ...], show_config: bool, row: int | None, reason: str | None) -> None:
    """Train a language model on preferences.

    CONFIG.yaml holds settings; KEY=VALUE lays one over it. What a run needs: model, train and output_dir.

    With `rows` in front nothing is trained: the rows that were dropped or cut are listed, or one row is shown as the
    model sees it.

    `export CHECKPOINT FOLDER` writes the model of a checkpoint into a new folder, as from_pretrained loads it.

    A run that was stopped goes on from its last checkpoint when the same command is given again.
    """
    # cuBLAS reads this once, before its first use; without it matrix products on a GPU may differ between runs.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if settings[:1] == ("rows",):
        sys.exit(list_rows(settings[1:], row, reason))
    if row is not None or reason is not None:
        raise click.UsageError("--row and --reason belong to: dpo-train rows ...")
    if settings[:1] == ("export",):
        sys.exit(export(settings[1:]))
    sys.exit(run(settings, show_config))


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of dpo-train."""
    command.main(args=list(args) if args is not None else None, prog_name="dpo-train")


def run(settings: Sequence[str], show_config: bool = False) -> int:
    """Loads the config, trains, and turns every refusal into one line; returns the exit code."""
    from reference_impl.config import ConfigError, to_yaml

    _log_to_stderr()
    try:
        config = _config(settings)
        if show_config:
            click.echo(to_yaml(config), nl=False)
            return 0
        _needs(config, "model", "train", "output_dir")
    except ConfigError as error:
        return _refused(error, 2)
    return _train(config)


def list_rows(settings: Sequence[str], row: int | None, reason: str | None) -> int:
    """Prints what became of the rows of `train`; returns the exit code."""
    from reference_impl import models, show
    from reference_impl.config import ConfigError
    from reference_impl.data import DataError

    try:
        config = _config(settings)
        _needs(config, "train")
        source = config.tokenizer or config.model
        if source is None:
            raise ConfigError("tokenizer is not set: write tokenizer=... or model=...")
        lines = show.list_rows(
            config.train,
            models.load_tokenizer(source),
            max_length=config.max_length,
            truncation=config.truncation,
            chat_template_kwargs=dict(config.chat_template_kwargs),
            reason=reason,
            row=row,
        )
    except KeyError as error:
        return _refused(ValueError(str(error.args[0])), 2)
    except (ConfigError, DataError, models.ModelError) as error:
        return _refused(error, 2)
    click.echo("\n".join(lines))
    return 0


def export(folders: Sequence[str]) -> int:
    """Writes a checkpoint's model into a new folder; returns the exit code."""
    from reference_impl.checkpoint import CheckpointError
    from reference_impl.config import ConfigError
    from reference_impl.export import export as export_model
    from reference_impl.files import DiskError
    from reference_impl.models import ModelError

    if len(folders) != 2:
        raise click.UsageError("write: dpo-train export CHECKPOINT FOLDER")
    _quiet_transformers()
    try:
        export_model(*map(Path, folders))
    except (ConfigError, ModelError) as error:
        return _refused(error, 2)
    except (CheckpointError, DiskError) as error:
        return _refused(error, 1)
    click.echo(f"model: {folders[1]}")
    return 0


def _config(settings: Sequence[str]) -> TrainConfig:
    from reference_impl.config import load_config

    file = next((item for item in settings if "=" not in item), None)
    return load_config(file, [item for item in settings if item is not file])


def _needs(config: TrainConfig, *names: str) -> None:
    from reference_impl.config import ConfigError

    missing = [name for name in names if getattr(config, name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not set: write {missing[0]}=... or put it into CONFIG.yaml")


def _train(config: TrainConfig) -> int:
    from reference_impl.checkpoint import CheckpointError
    from reference_impl.config import ConfigError
    from reference_impl.data import DataError
    from reference_impl.files import DiskError
    from reference_impl.models import ModelError
    from reference_impl.processes import LostProcessError, OtherProcessError
    from reference_impl.progress import Screen
    from reference_impl.training import TrainingError, train

    _quiet_transformers()
    with Screen(config.print_every) as screen:
        try:
            result = train(config, watcher=screen)
        except (ConfigError, DataError, ModelError) as error:
            return _refused(error, 2, screen)
        except (CheckpointError, DiskError, TrainingError, LostProcessError, OtherProcessError) as error:
            return _refused(error, 1, screen)
    if result.stopped:
        step, path = max(result.checkpoints.items())
        _say(f"stopped after step {step}; saved {path}; the same command goes on from there")
        return 143
    _say(f"model: {result.final}")
    return 0


def _refused(error: Exception, code: int, screen: Screen | None = None) -> int:
    if screen is not None:
        screen.close()
    if _speaks():
        click.echo(f"dpo-train: {' '.join(str(error).split())}", err=True)
    return code


def _speaks() -> bool:
    """One message, however many processes a launcher has started."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from reference_impl.processes import speaks_first

    return speaks_first()


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        click.echo(line)


def _log_to_stderr() -> None:
    logger = logging.getLogger("reference_impl")
    if not logger.handlers:
        logger.addHandler(_Stderr())
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # one for each file read or written, between our own lines
