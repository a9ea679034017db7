"""A worker whose subject is written by the test itself."""

from __future__ import annotations

import sys
import textwrap
import uuid

import pytest

from dpocheck.transport import Limits, Worker

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


@pytest.fixture
def worker_of(tmp_path):
    """`worker_of(source, **options)`: a worker that answers with the functions of `source`, closed at the end."""
    workers = []

    def build(source: str = "", **options) -> Worker:
        name = f"subject_{uuid.uuid4().hex}"
        (tmp_path / f"{name}.py").write_text(COMMON + textwrap.dedent(source))
        options = {"limits": Limits(seconds=20, start_seconds=30), "folder": tmp_path / "folder"} | options
        workers.append(Worker(f"{name}:handle", handler=f"{name}:handle", cwd=tmp_path, **options))
        return workers[-1]

    yield build
    for worker in workers:
        worker.close()


linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
