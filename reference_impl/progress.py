"""What does a person see of a run?  A bar on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from reference_impl.prepare import Run

SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "logps/chosen": "logps chosen",
    "logps/rejected": "rejected",
    "kl/k1": "kl",
}


class Screen:
    """A watcher for train(): prints to `stream`, which is a terminal or not."""

    def __init__(self, print_every: int, stream: TextIO | None = None, title: str = "DPO") -> None:
        self._stream = stream or sys.stdout
        self._every = print_every
        self._title = title
        self._total = self._first = 0
        self._began = time.monotonic()
        self._bar = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def started(self, run: Run, first_step: int) -> None:
        trained = sum(p.numel() for p in run.policy.model.parameters() if p.requires_grad)
        self._say(f"{trained / 1e6:.3g} M parameters trained in {run.config.dtype}, {run.total_steps} steps")
        if first_step:
            self._say(f"going on after step {first_step}")
        self.begin(run.total_steps, first_step)

    def begin(self, total: int, first_step: int = 0) -> None:
        """Starts counting: `total` steps, of which `first_step` are done."""
        self._total, self._first, self._began = total, first_step, time.monotonic()
        if not self._stream.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
        fields = TextColumn("{task.fields[shown]}", markup=False)
        self._bar = Progress(*columns, TimeRemainingColumn(), fields, console=Console(file=self._stream))
        self._task = self._bar.add_task(self._title, total=total, completed=first_step, shown="")
        self._bar.start()

    def row(self, step: int, split: str, metrics: dict[str, float]) -> None:
        if split == "train":
            self.step(step, "  ".join(f"{SHOWN[k]} {metrics[k]:.3f}" for k in SHOWN if k in metrics) + _speed(metrics))
        elif split != "summary":
            low, high = metrics["rewards/accuracies/low"], metrics["rewards/accuracies/high"]
            self._say(
                f"step {step}  {split}: loss {metrics['loss']:.4f} "
                f"[{metrics['loss/low']:.4f}, {metrics['loss/high']:.4f}]  "
                f"accuracy {metrics['rewards/accuracies']:.3f} [{low:.3f}, {high:.3f}]  {metrics['pairs']:.0f} pairs"
            )

    def step(self, step: int, shown: str) -> None:
        """Shows that a step is done, with a text about it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
        elif step % self._every == 0 or step == self._total:
            left = (time.monotonic() - self._began) / max(1, step - self._first) * (self._total - step)
            clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
            self._say(f"{self._title} step {step}/{self._total}  {shown}  ETA {clock}")

    def close(self) -> None:
        """Ends the bar; what was printed stays."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        if self._bar is not None:
            from rich.text import Text

            self._bar.console.print(Text(line))
        else:
            print(line, file=self._stream, flush=True)


def _speed(metrics: dict[str, float]) -> str:
    return f"  {metrics['pairs/s']:.1f} pairs/s"
