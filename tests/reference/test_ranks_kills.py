"""Does a run of two processes end, go on and lose nothing, when one of them is killed at fifty random moments?

DPOCHECK_KILLS is another number of kills.  Run alone: pytest tests/reference/test_ranks_kills.py
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_ranks_checkpoint import history, tensors, train_in
from trainer_ranks import join, one_thread, start

from reference_impl.checkpoint import checkpoints
from reference_impl.files import check_folder
from reference_impl.processes import LostProcessError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forks")
KILLS = int(os.environ.get("DPOCHECK_KILLS", "50"))
LOST = 7
SETTINGS = {"steps": 40, "save_every": 1, "keep_last": 2}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def once(folder: Path, beside: Path) -> list[int]:
    """Starts a run, or goes on with it, in two processes; returns their ids."""

    def action(rank: int) -> None:
        try:
            train_in(folder, **SETTINGS)
        except LostProcessError:
            raise SystemExit(LOST) from None

    return start(2, action, beside)


def end_of(children: list[int], victim: int) -> int:
    """How the other process ends. As torchrun's agent does: SIGTERM soon after one has died; never SIGKILL."""
    survivor = children[1 - victim]
    end = time.monotonic() + 60
    termed = time.monotonic() + 3
    while time.monotonic() < end:
        done, status = os.waitpid(survivor, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > termed:
            os.kill(survivor, signal.SIGTERM)
            termed = end
        time.sleep(0.01)
    os.kill(survivor, signal.SIGKILL)
    os.waitpid(survivor, 0)
    return -signal.SIGKILL


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_fifty_random_kills_lose_nothing(tmp_path: Path) -> None:
    """Each kill hits one of the two, from soon after their start to the last checkpoint. After each, whatever has a
    checkpoint's name is whole, and the newest is no older than before; every run that ends equals the undisturbed one
    to the last bit."""
    whole, began = tmp_path / "whole", time.monotonic()
    assert join(once(whole, tmp_path / "said")) == [0, 0]
    length = time.monotonic() - began
    draw, ends, finished, run, newest = random.Random(0), Counter(), 0, tmp_path / "run-0", 0
    slowest = 0.0
    while ends.total() < KILLS:
        children, victim = once(run, tmp_path / "said"), draw.randrange(2)
        time.sleep(draw.uniform(0.02, 0.7) * length)
        done, status = os.waitpid(children[victim], os.WNOHANG)
        if done:  # it was done before the kill
            assert os.waitstatus_to_exitcode(status) == 0
            assert end_of(children, victim) == 0
            length *= 0.7  # the machine has become faster
        else:
            os.kill(children[victim], signal.SIGKILL)
            os.waitpid(children[victim], 0)
            moment = time.monotonic()
            code = end_of(children, victim)
            ends[code], slowest = ends[code] + 1, max(slowest, time.monotonic() - moment)
            # 0: it had nothing more to do with the other; −15: torchrun's SIGTERM, before they had met.
            assert code in (LOST, 0, -signal.SIGTERM), (tmp_path / "said" / f"said-{1 - victim}.txt").read_text()
            steps = [check_folder(path)["step"] for path in checkpoints(run).values()] if run.exists() else []
            assert max(steps, default=0) >= newest
            newest = max(steps, default=0)
            if newest < SETTINGS["steps"] or not (run / "final").exists():
                continue
            assert join(once(run, tmp_path / "said")) == [0, 0]
        left, right = tensors(whole / "final"), tensors(run / "final")
        assert all(torch.equal(left[name], right[name]) for name in left)
        assert history(run) == history(whole)
        finished, newest = finished + 1, 0
        run = tmp_path / f"run-{finished}"
    print(f"{KILLS} kills; the other process: {dict(ends)}; after {slowest:.1f} s at most; runs ended: {finished}")
    assert join(once(run, tmp_path / "said")) == [0, 0]
    left, right = tensors(whole / "final"), tensors(run / "final")
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert history(run) == history(whole)
