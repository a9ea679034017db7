"""How is the gradient read off what an optimizer left, when it was not plain SGD?

The rest of dpocheck reads a run of one step as (start - head) / lr' = G with lr' = eta / k^2, as plain SGD leaves it:
`eta` is the experiment's learning rate in logits, k the scale of the checkpoint (`probes.tables`), G = k * gradient of
the logits is the gradient of the head.  A command that offers only Adam or only LoRA is handed another learning rate,
and what it wrote is turned into what SGD would have left, exactly:

    adam   r = (start - end) / lr = a*G / (b*abs(G) + epsilon), so G = epsilon*r / (a - b*abs(r)); a = b = 1 with bias
           correction, else a = 1 - beta1 and b = sqrt(1 - beta2)  (Kingma and Ba 2015, Algorithm 1, first step).
           Where epsilon >> G that is SGD with rate a*lr/epsilon, for any number of steps if both betas are 0.
           Elsewhere the checkpoint is handed over with a k so small that G is about epsilon, and one step can be read.
    lora   rank = hidden size, on the head alone, B = 0 at the start: A gets no gradient in the first step, and
           dB = -lr*s*G*A^T gives G = -dB*(A^T)^-1 / (lr*s), s = alpha / rank.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

from dpocheck.command.file import CommandFile, Update, Weights
from dpocheck.command.run import CommandFailed
from dpocheck.experiment import Body, Recipe
from dpocheck.probes import tables

NORM = "model.norm.weight"
LARGE = 2.0**20  # epsilon / k from which on Adam is SGD to a relative abs(gradient of a logit) / LARGE < 1e-6
LARGEST = 2**30  # bytes of weights in a file; the largest probe has some MB
STRONG = 2.0**2  # with k = STRONG * epsilon a logit's gradient of 1/4 makes G = epsilon, where r is read best


@dataclass(frozen=True)
class Reading:
    """The scale of the checkpoint handed over (`k`), the learning rate handed over, and what they stand for."""

    update: Update
    k: float  # of the checkpoint handed over
    rate: float  # the learning rate handed over
    k_start: float  # of the experiment's own checkpoint
    rate_sgd: float  # lr': what plain SGD would have been handed
    linear: bool  # what is left is what SGD leaves, up to a factor that `rate` makes up for

    @staticmethod
    def of(file: CommandFile, recipe: Recipe, body: Body) -> Reading:
        update = file.update
        rate = tables.translate(recipe, body).learning_rate
        k = 1.0 if body.kind == "speaking" else tables.scales(recipe.dtype).k
        if update.kind != "adam":
            return Reading(update, k, rate, k, rate, update.kind == "sgd")
        if update.epsilon >= LARGE * k:
            return Reading(update, k, rate * update.epsilon / _factors(update)[0], k, rate, True)
        small = 2.0 ** math.ceil(math.log2(STRONG * update.epsilon))
        # r is about a; with this rate a step is of the size of the weights, so that their rounding costs no digits.
        return Reading(update, small, 1 / (small * _factors(update)[0]), k, rate, False)

    def watches(self, name: str) -> bool:
        """Whether it means something that the parameter moved.

        With a small k, Adam moves the norm and the embedding by far more than they are: the first gradient of the head
        does not depend on it, and nothing is read after it.
        """
        return self.k == self.k_start or name not in (NORM, "model.embed_tokens.weight")

    def rescaled(self, checkpoint: Path, copy: Path) -> Path:
        """The same table with this reading's k; powers of two, so that the logits stay exact."""
        if self.k == self.k_start:
            return checkpoint
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint, copy)
        state = load_file(copy / "model.safetensors")
        factor = self.k / self.k_start
        state |= {NORM: (state[NORM] * factor).astype(state[NORM].dtype),
                  tables.HEAD: (state[tables.HEAD] / factor).astype(state[tables.HEAD].dtype)}  # fmt: skip
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    def as_sgd(
        self, start: dict[str, np.ndarray], end: dict[str, np.ndarray], weights: Weights
    ) -> dict[str, np.ndarray]:
        """The weights that plain SGD would have left, in the scale of `start`."""
        if self.update.kind == "lora":
            gradient = self._from_lora(end, weights)
        elif self.linear:
            return end
        else:
            factor = self.k_start / self.k
            moved = start[tables.HEAD] * factor - end[tables.HEAD].astype(np.float64)
            gradient = factor * from_adam(moved / self.rate, self.update)
        return end | {tables.HEAD: start[tables.HEAD] - self.rate_sgd * gradient}

    def _from_lora(self, end: dict[str, np.ndarray], weights: Weights) -> np.ndarray:
        """G, (target, hidden), from the adapter's A (rank, hidden) and B (target, rank)."""
        for name in (weights.lora_a, weights.lora_b):
            if name not in end:
                known = ", ".join(sorted(end))[:300]
                raise CommandFailed(f"wrote no tensor {name!r} (weights.lora_a, lora_b); the adapter holds: {known}")
        a, b = (end[name].astype(np.float64) for name in (weights.lora_a, weights.lora_b))
        if a.ndim != 2 or a.shape[0] != a.shape[1] or b.shape[1:] != a.shape[:1]:
            raise CommandFailed(
                f"the adapter's A and B have shapes {a.shape} and {b.shape}; the gradient can only be read if the rank "
                "is the hidden size: give the trainer {rank}"
            )
        return -np.linalg.solve(a, b.T).T / (self.rate * self.update.scale)


    def noise(self, end: dict[str, np.ndarray], weights: Weights) -> float:
        """How far rounding puts a logit's gradient that is read through an adapter; 0 where it is read directly.

        An element of dB is a sum over the batch's tokens, with a relative error of about sqrt(tokens) * u of the sum of
        its magnitudes (Higham and Mary 2019, with lambda = 4), and (A^T)^-1 adds such errors up in quadrature.
        """
        if self.update.kind != "lora":
            return 0.0
        a, gradient = end[weights.lora_a].astype(np.float64), self._from_lora(end, weights)
        tokens = np.count_nonzero(np.abs(gradient).max(axis=0) > 1e-4 * np.abs(gradient).max())
        errors = 4 * math.sqrt(tokens + 8) * 2.0**-24 * (np.abs(gradient) @ np.abs(a).T)
        spread = np.sqrt(errors**2 @ np.linalg.inv(a.T) ** 2)
        return float(spread.max()) / self.k_start


def _factors(update: Update) -> tuple[float, float]:
    """a and b of the first step."""
    if update.bias_correction:
        return 1.0, 1.0
    return 1 - update.betas[0], math.sqrt(1 - update.betas[1])


def from_adam(r: np.ndarray, update: Update) -> np.ndarray:
    """G from r = (start - end) / lr of Adam's first step, elementwise."""
    a, b = _factors(update)
    return update.epsilon * r / (a - b * np.abs(r))


def read_weights(path: Path, what: str) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, or of a folder of them; bfloat16 as float32.  Raises CommandFailed."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise CommandFailed(f"wrote no weights: {path} is not there ({what})")
    state: dict[str, np.ndarray] = {}
    for file in files:
        if file.stat().st_size > LARGEST:
            raise CommandFailed(f"wrote {file.stat().st_size / 2**30:.1f} GB of weights into {file.name}; too much")
        try:
            for name, tensor in safetensors.deserialize(file.read_bytes()):
                state[name] = _array(tensor)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise CommandFailed(f"wrote unreadable weights: {file}: {error}") from None
    return state


_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8,
           "BOOL": np.bool_}  # fmt: skip


def _array(tensor: dict) -> np.ndarray:
    if tensor["dtype"] == "BF16":
        bits = np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor["shape"])
    return np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"]).copy()
