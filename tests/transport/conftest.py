"""A worker whose subject is written by the test itself."""

from __future__ import annotations

import textwrap
import uuid

import pytest

from dpocheck.transports.isolated import Limits, Worker

COMMON = '''
import os, signal, sys, threading, time
import numpy as np

def handle(op, payload, arrays, state):
    if op == "open":
        return {"opened": payload}, {}
    return globals()[op](payload, arrays)

def echo(payload, arrays):
    return payload, arrays

def pid(payload, arrays):
    return {"pid": os.getpid()}, {}
'''


def _builder(folder, workers):
    def build(source: str = "", **options) -> Worker:
        name = f"subject_{uuid.uuid4().hex}"
        (folder / f"{name}.py").write_text(COMMON + textwrap.dedent(source))
        options = {"limits": Limits(seconds=20, start_seconds=30), "folder": folder / "folder"} | options
        workers.append(Worker(f"{name}:handle", handler=f"{name}:handle", cwd=folder, **options))
        return workers[-1]

    return build


@pytest.fixture
def worker_of(tmp_path):
    """`worker_of(source, **options)`: a worker that answers with the functions of `source`, closed at the end."""
    workers: list[Worker] = []
    yield _builder(tmp_path, workers)
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def shared_worker_of(tmp_path_factory):
    """The same, one worker for all tests of a module that give the same source: what one leaves, the next meets."""
    workers: list[Worker] = []
    build = _builder(tmp_path_factory.mktemp("shared"), workers)
    known: dict[str, Worker] = {}

    def shared(source: str) -> Worker:
        if source not in known:
            known[source] = build(source)
        return known[source]

    yield shared
    for worker in workers:
        worker.close()


@pytest.fixture(scope="module")
def deeds():
    """A source with a function `deed_N` for the N-th of the given statements, which prints first."""
    return lambda statements: "".join(
        f"def deed_{n}(payload, arrays):\n    print('before', flush=True)\n    {statement}\n    return {{}}, {{}}\n"
        for n, statement in enumerate(statements)
    )
