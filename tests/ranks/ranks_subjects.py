"""Adapters that run as several processes and know no framework: what each process is told, and how one goes wrong."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from dpocheck.adapter import TrainOut, Unsupported

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Adapter:
    """Trains nothing: the first process returns the checkpoint as it was given, the others nothing."""

    ranks = True

    def train(self, probe, rows, recipe, folder):
        rank = int(os.environ["RANK"])
        told = {name: os.environ[name] for name in PLACE} | {"pid": os.getpid(), "rows": len(rows["train"])}
        (Path(folder).parents[1] / f"told{rank}.json").write_text(json.dumps(told | {"folder": str(folder)}))
        print(f"this is rank {rank}", flush=True)
        self.deed(rank)
        return TrainOut(probe.policy_path) if rank == 0 else None

    def deed(self, rank):
        """Nothing."""


class Raises(Adapter):
    def deed(self, rank):
        if rank == 1:
            raise ValueError("the second half of the batch is missing")
        time.sleep(600)  # as a collective waits for a peer that never comes


class Dies(Adapter):
    def deed(self, rank):
        if rank == 1:
            print("last words", flush=True)
            os._exit(3)
        time.sleep(0.5)
        raise ConnectionError("a peer closed the connection")


class Hangs(Adapter):
    def deed(self, rank):
        if rank == 1:
            wait_in_vain()


class Refuses(Adapter):
    def deed(self, rank):
        raise Unsupported("more than one process")


class Alone:
    def train(self, probe, rows, recipe, folder):
        return TrainOut(probe.policy_path)


class StaysInGroup(Adapter):
    """As a trainer that is still in its process group when it returns."""

    def deed(self, rank):
        from types import SimpleNamespace

        sys.modules["torch.distributed"] = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True)


class KeepsGroup(StaysInGroup):
    keeps_group = True


def wait_in_vain():
    time.sleep(600)
