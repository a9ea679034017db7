"""Where does a subject live?  Three transports that answer alike, `(payload, arrays)`.

A worker process (an adapter or a function given by name), a command line, and this process (a live object:
`isolation: none`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dpocheck.experiment import Experiment, TrainExperiment
from dpocheck.probes.handed import request
from dpocheck.worker import failure

Reply = tuple[dict[str, Any], dict[str, np.ndarray]]
# Globals that no trainer has to change; seeds, caches and variables of the environment many set, and that is no news.
TELLING = (
    "default dtype", "default device", "grad mode", "inference mode", "autocast", "deterministic", "patched", "cwd",
    "output",
)  # fmt: skip


class Refused(Exception):
    """The subject said `Unsupported`."""


class Broken(Exception):
    """The subject raised, died or hung.  `in_adapter`: in the adapter's own frame; `died`: its process is gone."""

    def __init__(self, reason: str, output: str = "", *, in_adapter: bool = False, died: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.output, self.in_adapter, self.died = reason, output, in_adapter, died


class Transport(Protocol):
    """Where a subject lives.  `answer` raises `Refused` or `Broken`."""

    about: dict[str, Any]
    isolation: str
    changes: tuple[str, ...] = ()  # what the last call left changed and would have reached later answers
    said: str | None = None  # what the subject itself printed while it changed that

    def answer(self, experiment: Experiment, paths: dict[str, Path], folder: Path, number: int = 0) -> Reply: ...

    @property
    def together(self) -> Transport:
        """Where runs in several processes go."""
        return self

    def standalone(self, question: dict[str, Any]) -> dict[str, Any]:
        """What the subject offers for a script without dpocheck (`worker.standalone`); {} where it cannot be asked."""
        return {}

    def refuses(self, experiment: TrainExperiment) -> str | None:
        """Why a run cannot be asked, where that is known without asking."""
        return None

    def close(self) -> None: ...


def against_ranks(transport: Transport) -> str | None:
    """Why a subject cannot be put to several processes; None where it can."""
    about = transport.about
    if about.get("form") == "command line":
        return None if about.get("ranks") else "the description has no `launch`: the command is run with one process"
    if not about.get("ranks"):
        return "the adapter does not declare `ranks = True`: it is run with one process"
    if transport.isolation == "none":
        return "a live object is audited in this one process; give the subject by name to run it in several"
    return None


class InProcess(Transport):
    """A live object, audited in this process: what it does to this process it does to the audit."""

    isolation = "none"

    def __init__(self, adapter: Any) -> None:
        from dpocheck.worker import requests

        self.handle: Callable[..., Reply] = requests.handle
        self.state = {"adapter": adapter}
        self.about = requests.describe(adapter)

    def answer(self, experiment: Experiment, paths: dict[str, Path], folder: Path, number: int = 0) -> Reply:
        from dpocheck.adapter import Unsupported

        payload = json.loads(json.dumps({"subject": None} | request(experiment, paths, folder)))
        try:
            return self.handle("observe", payload, {}, self.state)
        except Unsupported as refusal:
            raise Refused(str(refusal)) from refusal
        except Exception as fault:
            told = failure.describe(fault, "", self.state)
            lines = "\n".join(told["traceback_lines"])
            raise Broken(failure.headline(told["type"], told["message"]), lines) from fault

    def close(self) -> None:
        """Nothing to end."""


class InWorker(Transport):
    """A subject given by name, in a process of its own."""

    isolation = "process"

    def __init__(self, subject: str, worker: Any, ranks: Any = None) -> None:
        """`worker` is an `isolated.Worker`, `ranks` are `ranks.Ranks`; the subjects of the self-test share them."""
        from dpocheck.transports import isolated
        from dpocheck.transports.ranks import InRanks, Ranks

        self.module, self.worker, self.subject = isolated, worker, subject
        self.about = self._open()
        self.in_ranks = InRanks(subject, ranks or Ranks(worker), self.about)

    @staticmethod
    def start(
        subject: str, folder: Path, *, seconds: float, memory_gb: float, python: str = sys.executable
    ) -> InWorker:
        """A worker of its own for one subject."""
        from dpocheck.transports import isolated

        limits = isolated.Limits(seconds=seconds, memory_gb=memory_gb)
        return InWorker(subject, isolated.Worker(subject, python=python, limits=limits, folder=folder))

    @property
    def together(self) -> Transport:
        return self.in_ranks

    def _open(self) -> dict[str, Any]:
        return self._call("open", {"subject": self.subject})[0]

    def answer(self, experiment: Experiment, paths: dict[str, Path], folder: Path, number: int = 0) -> Reply:
        asked = {"subject": self.subject, "rng_seed": number} | request(experiment, paths, folder)
        return self._call("observe", asked)

    def standalone(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._call("standalone", {"subject": self.subject} | question)[0]
        except (Broken, Refused):  # a finding stands without its script
            return {}

    def _call(self, op: str, payload: dict[str, Any]) -> Reply:
        try:
            return self.worker.call(op, payload)
        except self.module.WorkerDied as death:
            raise Broken(str(death), death.output, died=True) from death
        except self.module.SubjectError as fault:
            if fault.kind == "Unsupported":
                raise Refused(fault.message) from fault
            told = "\n".join(text for text in (fault.output.rstrip(), fault.traceback) if text)
            raise Broken(str(fault), told, in_adapter=fault.in_adapter) from fault
        finally:
            self.changes = tuple(line for line in self.worker.last_changes if line.startswith(TELLING))
            self.said = self.worker.output if self.changes else None

    def close(self) -> None:
        self.in_ranks.close()
        self.worker.close()


class InFiles(Transport):
    """A command line: only files go in and come out."""

    isolation = "process"

    def __init__(self, subject: Any) -> None:
        self.subject = subject
        self.about = {
            "capabilities": subject.capabilities, "says": subject.says, "name": subject.name, "form": "command line",
            "version": subject.version, "forced": subject.forced, "lines": None, "stubs": subject.stubs,
            "ranks": subject.file.launch is not None, "only": subject.only, "precision": subject.precision,
        }  # fmt: skip

    def answer(self, experiment: Experiment, paths: dict[str, Path], folder: Path, number: int = 0) -> Reply:
        from dpocheck.command import CommandFailed

        assert isinstance(experiment, TrainExperiment)
        if reason := self.refuses(experiment):
            raise Refused(reason)
        try:
            return self.subject.answer(experiment, paths, folder)
        except CommandFailed as fault:
            raise Broken(fault.reason, fault.output) from fault

    def refuses(self, experiment: TrainExperiment) -> str | None:
        return self.subject.supports(experiment)

    def close(self) -> None:
        """Every run has ended by itself."""
