"""What a `train` call is given, and how what it returns becomes numbers (worker side)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpocheck.adapter import TrainOut, Unsupported
from dpocheck.experiment import TrainExperiment
from dpocheck.probes import live, tables
from dpocheck.worker.failure import BadAnswer


class TrainingProbe:
    """The probe of one run, its spies, and the reading of its result."""

    def __init__(self, experiment: TrainExperiment, payload: dict[str, Any]) -> None:
        self.experiment = experiment
        self.spies: dict[str, list[Any]] = {}  # of every model that was handed out
        self.trained: Any = None
        self.start = tables.read_state(Path(payload["policy"]))
        reference = payload.get("reference")
        edited = experiment.policy if experiment.edited is not None else None
        self.probe = live.probe(
            Path(payload["policy"]), Path(reference) if reference else None,
            dtype=experiment.recipe.dtype, edit=edited, watch=self._watch,
        )  # fmt: skip

    def _watch(self, name: str, model: Any) -> None:
        from dpocheck.worker import spies

        self.spies.setdefault(name, []).append(spies.watch(model))

    def reply(self, out: TrainOut) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        if self.experiment.edited is not None and "policy" not in self.spies:
            raise Unsupported("the trainer takes checkpoints: no model is handed over that could be edited in memory")
        self.trained, final = out.policy, self.fitting(self.state(out.policy))
        if self.experiment.edited is not None and self.experiment.policy is not None:
            edited = tables.weights(
                self.experiment.policy, self.experiment.policy.size, self.experiment.body, self.experiment.recipe.dtype
            )
            self.start = self.start | {tables.HEAD: edited[tables.HEAD]}
        arrays: dict[str, np.ndarray] = {}
        if self.experiment.body.kind == "speaking":
            arrays |= {f"weights.{name}": final[name] - old for name, old in self.start.items() if name in final}
        elif tables.HEAD in final:
            arrays |= {"start": self.start[tables.HEAD], "head": final[tables.HEAD]}
            for step, path in dict(out.checkpoints).items():
                state = self.fitting(tables.read_state(Path(path))) if Path(path).exists() else {}
                if tables.HEAD in state:
                    arrays[f"saved.{int(step)}"] = state[tables.HEAD]
        moved = {
            name: float(np.max(np.abs(final[name].astype(np.float64) - old))) if old.size else 0.0
            for name, old in self.start.items()
            if name in final and final[name].shape == old.shape
        }
        fields = {
            "history": [_entry(entry) for entry in out.history],
            "moved": moved, "digest": tables.digest(final), "start_digest": tables.digest(self.start),
            "floor": {f"history.train.{name}": 0.5 * 10.0**-places for name, places in dict(out.decimals).items()},
        }  # fmt: skip
        return {"fields": fields, "spies": self.told()}, arrays

    def told(self) -> dict[str, Any]:
        """What the spies saw: of each model, the copy that was trained, or else the one that ran most."""
        return {
            name: max(held, key=lambda spy: (spy.model is self.trained, spy.forwards)).report()
            for name, held in self.spies.items()
        }

    def fitting(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The state with the rows that the checkpoint had: a trainer may add tokens to the vocabulary.

        Raises `BadAnswer` where a tensor has another shape otherwise.
        """
        found = {}
        for name, array in state.items():
            old = self.start.get(name)
            if old is not None and array.shape != old.shape:
                if array.shape[1:] != old.shape[1:] or len(array) < len(old):
                    raise BadAnswer(
                        f"train() returned a policy whose {name} has shape {array.shape}; the checkpoint's has "
                        f"{old.shape}: return the model that was handed over, or one of its shape"
                    )
                array = array[: len(old)]
            found[name] = array
        return found

    @staticmethod
    def state(policy: Any) -> dict[str, np.ndarray]:
        if isinstance(policy, str | Path):
            return tables.read_state(Path(policy))
        if not callable(getattr(policy, "state_dict", None)):
            raise BadAnswer(
                f"train() returned a TrainOut whose policy is of type {type(policy).__name__}; "
                "expected the trained model, or the folder it was saved in"
            )
        return live.state(policy)


def _entry(entry: Any) -> dict[str, Any]:
    """A history entry with plain numbers; what is not a number is left out."""
    metrics = {}
    for name, value in dict(entry["metrics"]).items():
        try:
            metrics[str(name)] = float(value)
        except (TypeError, ValueError):
            continue
    return {"step": int(entry["step"]), "split": str(entry["split"]), "metrics": metrics}
