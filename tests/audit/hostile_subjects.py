"""What may a subject do to those who audit it?  Each class is a right loss that misbehaves at extreme margins."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from dpocheck.adapter import TrainOut
from dpocheck.miniature import MINIATURE

FAR = 500.0  # only the check of extreme margins asks for log-probs beyond this
LOUD = "the subject was here"


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no message")

    __repr__ = __str__


class Honest:
    """The loss; `deed` is called where a log-prob is far out, and what it returns, if anything, is the answer."""

    def loss(self, policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, objective, lengths=None):
        h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
        losses = -F.logsigmoid(objective.beta * h)
        if float(h.detach().abs().max()) > FAR:
            print(LOUD, flush=True)
            return self.deed(losses)
        return losses

    def deed(self, losses):
        return losses


class Raises(Honest):
    def deed(self, losses):
        raise ZeroDivisionError("margin too wide")


class RaisesUnprintable(Honest):
    def deed(self, losses):
        raise Unprintable


class Exits(Honest):
    def deed(self, losses):
        sys.exit(7)


class ExitsAtOnce(Honest):
    def deed(self, losses):
        os._exit(0)


class Segfaults(Honest):
    def deed(self, losses):
        ctypes.string_at(0)


class Aborts(Honest):
    def deed(self, losses):
        os.kill(os.getpid(), signal.SIGKILL)


class Interrupts(Honest):
    def deed(self, losses):
        raise KeyboardInterrupt


class Hangs(Honest):
    def deed(self, losses):
        while True:
            time.sleep(60)


class Forks(Honest):
    """A child that comes back must not answer in its parent's place."""

    def deed(self, losses):
        if os.fork() == 0:
            return losses + 1
        return losses


class Floods(Honest):
    def deed(self, losses):
        block = b"x" * (1 << 20)
        for _ in range(1024):
            os.write(1, block)
        return losses


class Hoards(Honest):
    def deed(self, losses):
        kept = bytearray()
        while True:
            kept += bytes(64 << 20)


class ChangesDtype(Honest):
    def deed(self, losses):
        torch.set_default_dtype(torch.float16)
        return losses


class ChangesRandom(Honest):
    def deed(self, losses):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return losses


class ChangesPlace(Honest):
    def deed(self, losses):
        os.environ["OMP_NUM_THREADS"] = "many"
        os.environ.pop("HOME", None)
        os.chdir("/")
        return losses


class Patches(Honest):
    def deed(self, losses):
        F.logsigmoid = lambda x: x
        torch.log_softmax = torch.softmax
        return losses


class ReturnsNan(Honest):
    def deed(self, losses):
        return losses * float("nan")


class ReturnsNothing(Honest):
    def deed(self, losses):
        return None


class ReturnsGenerator(Honest):
    def deed(self, losses):
        return (one for one in losses)


class ReturnsMatrix(Honest):
    def deed(self, losses):
        return losses[:, None] * losses[None]


class ReturnsMeta(Honest):
    def deed(self, losses):
        return losses.to("meta")


class ReturnsText(Honest):
    def deed(self, losses):
        return "0.693"


class ClosesEverything(Honest):
    def deed(self, losses):
        for fd in range(3, 256):
            with contextlib.suppress(OSError):
                os.close(fd)
        return losses


class Everything(Honest):
    """All that can be put back, at once."""

    def deed(self, losses):
        os.write(1, b"y" * (1 << 20) + b"\nthe subject was here\n")
        for other in (ChangesDtype, ChangesRandom, ChangesPlace, Patches, ClosesEverything, Forks):
            other.deed(self, losses)
        return losses


# -------------------------------------------------------------------------------------------------------- whole runs


class NothingBack:
    def train(self, probe, rows, recipe, folder):
        return None


class NotAModel:
    def train(self, probe, rows, recipe, folder):
        return TrainOut(policy=["weights"])


class Unmoved:
    def train(self, probe, rows, recipe, folder):
        return TrainOut(policy=probe.policy())


class TrainsTheReference:
    """The reference that was handed over is moved too, after the step."""

    says = MINIATURE.says

    def train(self, probe, rows, recipe, folder):
        kept = {}

        def load(what):
            kept[what] = probe.load(what)
            return kept[what]

        done = MINIATURE.train(replace(probe, load=load), rows, recipe, folder)
        if "reference" in kept:
            with torch.no_grad():
                for weights in kept["reference"].parameters():
                    weights.mul_(1.5)
        return done


class DiesWhenAccumulating:
    says = MINIATURE.says

    def train(self, probe, rows, recipe, folder):
        if recipe.accumulation > 1:
            print(LOUD, flush=True)
            ctypes.string_at(0)
        return MINIATURE.train(probe, rows, recipe, folder)
