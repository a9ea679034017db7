"""What is seen while an audit works?  One bar on stderr, removed at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from dpocheck.report.words import line


class _Label(TextColumn):
    """The label as it is: it may hold a subject's text, which is not markup."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Any) -> Text:
        return Text(task.description)


@contextlib.contextmanager
def bar(console: Console | None = None) -> Iterator[Callable[[Any], None]]:
    """A function that takes the runner's `Progress` records."""
    columns = (BarColumn(bar_width=30), TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False))
    with Progress(
        *columns, TimeElapsedColumn(), _Label(), console=console or Console(stderr=True), transient=True
    ) as progress:
        task = progress.add_task("", total=1)

        def update(report: Any) -> None:
            progress.update(task, completed=report.done, total=max(report.total, 1), description=line(report.label))

        yield update
