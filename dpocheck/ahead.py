"""Which runs are made before a check asks for them, and side by side?

A trainer's run leaves the judge idle, and one worker leaves a core idle.  `Ahead` puts the whole runs of the coming
checks to several workers; whoever asks later takes the answer, or waits for it.  Answers do not depend on the worker:
each call starts from the same random state.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from dpocheck.experiment import Experiment, key


def default_jobs() -> int:
    """Two, where there are two cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2, cores)


class Ahead:
    """Workers that answer one experiment each at a time, and the runs that were put to them."""

    def __init__(self, first: Any, more: Iterable[Callable[[], Any]] = ()) -> None:
        self.idle: queue.Queue[Any] = queue.Queue()
        self.idle.put(first)
        self.started = [first]
        starters = list(more)
        self.threads = ThreadPoolExecutor(1 + len(starters)) if starters else None
        self.pending: dict[str, Future[Any]] = {}
        self.starting = [self.threads.submit(self._start, starter) for starter in starters] if self.threads else []

    def _start(self, starter: Callable[[], Any]) -> None:
        transport = starter()
        self.started.append(transport)
        self.idle.put(transport)

    @contextmanager
    def lease(self) -> Iterator[Any]:
        """A transport of one's own, for one experiment or one sequence."""
        transport = self.idle.get()
        try:
            yield transport
        finally:
            self.idle.put(transport)

    def submit(self, experiment: Experiment, run: Callable[[Experiment], Any]) -> None:
        """Have an experiment run as soon as a worker is free, unless it is under way."""
        if self.threads and key(experiment) not in self.pending:
            self.pending[key(experiment)] = self.threads.submit(run, experiment)

    def take(self, experiment: Experiment) -> Any | None:
        """The answer to an experiment that was submitted, once; None where it was not."""
        future = self.pending.pop(key(experiment), None)
        return None if future is None else future.result()

    def close(self) -> None:
        """End the threads and the workers; what is under way is not waited for longer than its own limit."""
        if self.threads:
            self.threads.shutdown(wait=True, cancel_futures=True)
        for transport in self.started:
            transport.close()
