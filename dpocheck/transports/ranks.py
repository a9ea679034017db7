"""How is one run put to N processes?  N workers with torchrun's environment, one question, one answer.

Each worker is told which of how many it is (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, ...), is given the
same experiment and the same folders, and calls the adapter's `train`.  The first rank's answer is the answer; what the
others went through stands in its spies under "ranks".  The first rank to raise, to die or to pass a limit ends the run:
the others, which wait for it in vain, are ended too.
"""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from dpocheck.experiment import Experiment, TrainExperiment
from dpocheck.probes import tables
from dpocheck.probes.handed import request
from dpocheck.transports import Broken, Refused, Reply, Transport
from dpocheck.transports.isolated import SubjectError, Worker, WorkerDied

GRACE = 5.0  # seconds for the other ranks to answer or to raise, once one has failed


class InRanks(Transport):
    """A subject given by name, in several processes at once."""

    isolation = "process"

    def __init__(self, subject: str, ranks: Ranks, about: dict[str, Any]) -> None:
        self.subject, self.ranks, self.about = subject, ranks, about

    def answer(self, experiment: Experiment, paths: dict[str, Path], folder: Path, number: int = 0) -> Reply:
        assert isinstance(experiment, TrainExperiment)
        asked = {"subject": self.subject, "rng_seed": number} | request(experiment, paths, folder)
        return self.ranks.call(asked, experiment, keep=self.about.get("keeps_group", False))

    def close(self) -> None:
        self.ranks.close()


class Ranks:
    """The workers of one subject's runs in several processes, copies of `like`.  Runs are made one after the other."""

    def __init__(self, like: Worker) -> None:
        self.like = like
        self.workers: dict[int, list[Worker]] = {}  # number of ranks -> one worker each
        self.lock = threading.Lock()

    def call(self, payload: dict[str, Any], experiment: TrainExperiment, *, keep: bool) -> Reply:
        """Have all ranks answer.  `keep`: the group that the trainer stays in serves its next run too.

        Raises Refused or Broken; the reason says which rank it was.
        """
        ranks = experiment.recipe.world_size
        with self.lock:
            if ranks not in self.workers:
                self.workers[ranks] = [self._started(rank, ranks) for rank in range(ranks)]
            again = False
            try:
                replies = _ask(self.workers[ranks], payload | {"port": _free_port()})
                again = keep or not any(reply.get("in_group") for reply, _ in replies)
            finally:
                if not again:  # who is still in a group, or failed in one, cannot join another
                    self._end(ranks)
        return _one(replies, experiment)

    def close(self) -> None:
        """End all processes."""
        with self.lock:
            for ranks in list(self.workers):
                self._end(ranks)

    def _end(self, ranks: int) -> None:
        for worker in self.workers.pop(ranks):
            worker.close()

    def _started(self, rank: int, ranks: int) -> Worker:
        like = self.like
        place = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0,
            "GROUP_WORLD_SIZE": 1, "ROLE_RANK": rank, "ROLE_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 29500,
        }  # fmt: skip
        told = like.environment | {name: str(value) for name, value in place.items()}
        return Worker(
            like.subject, python=like.python, limits=like.limits, folder=like.folder, environment=told,
            handler=like.handler, cwd=like.cwd,
        )  # fmt: skip


def _ask(workers: list[Worker], payload: dict[str, Any]) -> list[Reply]:
    """All ranks' replies, in their order."""
    with ThreadPoolExecutor(len(workers)) as threads:
        asked = [
            threads.submit(worker.call, "observe", payload | {"rank": rank}) for rank, worker in enumerate(workers)
        ]
        failed: int | None = 0
        try:
            failed = _wait(asked)
        finally:  # also where we are interrupted while we wait
            for worker in workers if failed is not None else ():
                worker.stop()
    if failed is None:
        return [future.result() for future in asked]
    fault = asked[failed].exception()
    if not isinstance(fault, SubjectError | WorkerDied):
        raise fault  # type: ignore[misc]
    raise _failure(failed, [future.exception() for future in asked])


def _failure(failed: int, faults: list[BaseException | None]) -> Refused | Broken:
    """What to raise for the rank that failed; the output is that of all ranks, each under its name."""
    fault, place = faults[failed], f"rank {failed} of {len(faults)}"
    if isinstance(fault, SubjectError):
        if fault.kind == "Unsupported":
            return Refused(f"{fault.message} ({place})")
        return Broken(f"{fault} ({place})", _output(failed, faults), in_adapter=fault.in_adapter)
    return Broken(f"{place}: {fault}", _output(failed, faults), died=True)


def _wait(asked: list[Future[Reply]]) -> int | None:
    """The rank that failed, or None once all have answered.

    A death is told before an exception: the others often raise because a peer is gone.
    """
    pending, until, first = set(asked), None, 0
    while pending and (until is None or time.monotonic() < until):
        done, pending = wait(pending, None if until is None else until - time.monotonic(), FIRST_COMPLETED)
        if until is None and any(future.exception() for future in done):
            first = next(rank for rank, future in enumerate(asked) if future in done and future.exception())
            until = time.monotonic() + GRACE
    if until is None:
        return None
    ended = [future.exception() if future.done() else None for future in asked]
    deaths = [rank for rank, fault in enumerate(ended) if isinstance(fault, WorkerDied)]
    return deaths[0] if deaths else first


def _output(failed: int, faults: list[BaseException | None]) -> str:
    """The failed rank's output and traceback, then the last lines of the others that did not answer."""
    told = []
    for rank, fault in sorted(enumerate(faults), key=lambda pair: pair[0] != failed):
        if not isinstance(fault, SubjectError | WorkerDied):
            continue
        text = "\n".join(part for part in (fault.output.rstrip(), getattr(fault, "traceback", "")) if part)
        if rank != failed and text:
            text = "\n".join([f"--- rank {rank}:", *text.splitlines()[-20:]])
        told.append(text)
    return "\n".join(text for text in told if text)


def _one(replies: list[Reply], experiment: TrainExperiment) -> Reply:
    """The first rank's reply, with what the others show of themselves."""
    payload, arrays = replies[0]
    told = [
        {"rank": rank, "apart": _apart(arrays, own, experiment)} | dict(reply.get("spies") or {})
        for rank, (reply, own) in enumerate(replies)
    ]
    return payload | {"spies": dict(payload.get("spies") or {}) | {"ranks": told}}, arrays


def _apart(first: dict[str, np.ndarray], other: dict[str, np.ndarray], experiment: TrainExperiment) -> float | None:
    """The largest difference of two ranks' trained weights, in logits where they are a table's; None: not shown."""
    names = [name for name in first if name == "head" or name.startswith("weights.")]
    if not names or any(name not in other for name in names):
        return None
    apart = max(float(np.max(np.abs(first[name].astype(np.float64) - other[name]), initial=0.0)) for name in names)
    return apart * (tables.scales(experiment.recipe.dtype).k if "head" in names else 1.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
