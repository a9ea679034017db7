"""How does an adapter answer an experiment?  The worker's side of every observation.

`observe` builds the tensors or models of the experiment, calls one method of the adapter, and reduces what comes back
to numbers.  It judges nothing.  Torch is imported only where a capability needs it, so that trainers of other
frameworks are driven by the same file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from dpocheck.adapter import LossOut, PairBatch, Probe, StepOut, TokenBatch, TrainOut
from dpocheck.experiment import (
    Experiment,
    LogpExperiment,
    LossExperiment,
    StepExperiment,
    TextExperiment,
    TrainExperiment,
)  # fmt: skip
from dpocheck.probes import tables
from dpocheck.worker import ranks
from dpocheck.worker.failure import BadAnswer, kind_of

Reply = tuple[dict[str, Any], dict[str, np.ndarray]]


def observe(adapter: Any, experiment: Experiment | TextExperiment, payload: dict[str, Any]) -> Reply:
    if isinstance(experiment, LossExperiment):
        return _loss(adapter, experiment)
    if isinstance(experiment, LogpExperiment):
        return _logps(adapter, experiment, payload)
    if isinstance(experiment, StepExperiment):
        return _step(adapter, experiment, payload)
    if isinstance(experiment, TrainExperiment):
        return _train(adapter, experiment, payload)
    if isinstance(experiment, TextExperiment):
        from dpocheck.probes import fed

        return {"rows": fed.observe(adapter, experiment, Path(payload["folder"]))}, {}
    raise ValueError(f"no adapter answers a {type(experiment).__name__}")


# --------------------------------------------------------------------------------------------------------------- loss


def _loss(adapter: Any, experiment: LossExperiment) -> Reply:
    import torch

    dtype = getattr(torch, experiment.dtype)
    vectors = [torch.tensor(row, dtype=dtype) for row in experiment.arguments().tolist()]
    for policy in vectors[:2]:
        policy.requires_grad_(True)
    before = [vector.detach().clone() for vector in vectors]
    lengths = None
    if experiment.lengths is not None:
        lengths = tuple(torch.tensor(column) for column in zip(*experiment.lengths, strict=True))
    for _ in range(experiment.calls):
        out = adapter.loss(*vectors, objective=experiment.objective, lengths=lengths)
    if isinstance(out, tuple) and len(out) == 3:
        out = LossOut(*out)
    elif not isinstance(out, LossOut):
        out = LossOut(out)
    pairs = len(experiment.policy_chosen)
    loss = _tensor(out.loss, "loss", pairs)
    arrays: dict[str, np.ndarray] = {}
    if loss.ndim == 1 or pairs == 1:
        arrays["per_pair"] = _numpy(loss.reshape(-1))
    reduced = loss.mean() if loss.ndim else loss
    if reduced.requires_grad:
        grads = torch.autograd.grad(reduced, vectors[:2], allow_unused=True)
        slopes = np.full((4, pairs), np.nan)
        for row, grad in enumerate(grads):
            slopes[row] = 0.0 if grad is None else _numpy(grad)
        arrays["slopes"] = slopes
    for name in ("rewards_chosen", "rewards_rejected"):
        value = getattr(out, name)
        if value is not None and torch.is_tensor(value) and value.shape == (pairs,):
            arrays[name] = _numpy(value)
    changed = not all(torch.equal(old, new.detach()) for old, new in zip(before, vectors, strict=True))
    fields = {"reduced": float(reduced.detach().double()), "inputs_changed": changed}
    return {"fields": fields, "scalar": loss.ndim == 0}, arrays


def _tensor(value: Any, what: str, pairs: int) -> Any:
    import torch

    if not torch.is_tensor(value):
        raise BadAnswer(f"{what}() returned {kind_of(value)}; expected a tensor of shape ({pairs},) or a scalar tensor")
    if value.device.type != "cpu":
        raise BadAnswer(f"{what}() returned a tensor on {value.device}; its arguments were on the CPU")
    if value.shape == (pairs, 1):
        raise BadAnswer(f"{what}() returned shape ({pairs}, 1); expected ({pairs},) or a scalar: squeeze the last axis")
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != pairs):
        raise BadAnswer(f"{what}() returned shape {tuple(value.shape)}; expected ({pairs},) or a scalar")
    return value


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().double().cpu().numpy().copy()


# -------------------------------------------------------------------------------------------------- logps and steps


def _models(experiment: Any, payload: dict[str, Any]) -> Probe:
    from dpocheck.probes import live

    reference = payload.get("reference")
    return live.probe(Path(payload["policy"]), Path(reference) if reference else None, dtype=experiment.dtype)


def _logps(adapter: Any, experiment: LogpExperiment, payload: dict[str, Any]) -> Reply:
    import torch

    model = _models(experiment, payload).policy().eval()
    rows = experiment.rows
    batch = TokenBatch(
        input_ids=torch.tensor([row.ids for row in rows]),
        attention_mask=torch.tensor([row.attention for row in rows]),
        completion_mask=torch.tensor([row.completion for row in rows]),
    )
    kept = [tensor.clone() for tensor in (batch.input_ids, batch.attention_mask, batch.completion_mask)]
    out = _tensor(adapter.sequence_logps(model, batch), "sequence_logps", len(rows))
    if out.ndim != 1:
        raise BadAnswer(f"sequence_logps() returned a scalar; expected shape ({len(rows)},): one log-prob a row")
    arrays = {"logps": _numpy(out)}
    if out.requires_grad:
        head = model.lm_head.weight
        size, k = experiment.table.size, tables.scales(experiment.dtype).k
        gradients = np.zeros((len(rows), size, size))
        for row in range(len(rows)):
            (grad,) = torch.autograd.grad(out[row], head, retain_graph=True, allow_unused=True)
            if grad is not None:
                gradients[row] = _numpy(grad)[:, :size].T / k
        arrays["gradient"] = gradients
    changed = not all(torch.equal(a, b) for a, b in zip(kept, vars(batch).values(), strict=True))
    return {"fields": {}, "inputs_changed": changed}, arrays


def _step(adapter: Any, experiment: StepExperiment, payload: dict[str, Any]) -> Reply:
    from dpocheck.worker import spies

    probe = _models(experiment, payload)
    policy, reference = probe.policy().train(), probe.reference().train()
    watched = {"policy": spies.watch(policy), "reference": spies.watch(reference)}
    batch = pair_batch(experiment)
    out: Any = None
    for _ in range(experiment.calls):
        if not getattr(adapter, "clears_gradients", False):
            policy.zero_grad(set_to_none=True)
        out = adapter.step(policy, reference, batch, objective=experiment.objective)
    if isinstance(out, tuple):
        out = StepOut(*out)
    elif not isinstance(out, StepOut):
        out = StepOut(out)
    loss = float(out.loss) if not hasattr(out.loss, "detach") else float(out.loss.detach().double().mean())
    metrics = {str(name): float(value) for name, value in dict(out.metrics or {}).items() if _number(value)}
    head = policy.lm_head.weight
    size, k = experiment.policy.size, tables.scales(experiment.dtype).k
    silent = [
        name for name, p in policy.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    arrays = {}
    taken = getattr(adapter, "gradient_of", None)
    grad = taken(head) if taken else head.grad
    if grad is not None:
        dense = _numpy(grad)
        arrays["gradient"] = dense[:, :size].T / k
        if experiment.body.kind in ("glass", "clock"):
            arrays["attended"] = dense[:, size : 2 * size].T / k
    seen = {name: spy.report() for name, spy in watched.items()}
    fields = {"loss": loss, "metrics": metrics or None, "silent": silent}
    fields["reference_gradient"] = seen["reference"]["gradient"]
    return {"fields": fields, "spies": seen}, arrays


def pair_batch(experiment: StepExperiment) -> PairBatch:
    """The token batch: chosen rows first, then rejected, padded on the experiment's side."""
    import torch

    rows = [(p.prompt, p.chosen) for p in experiment.pairs] + [(p.prompt, p.rejected) for p in experiment.pairs]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, attention, counted = [], [], []
    for prompt, completion in rows:
        gap = width - len(prompt) - len(completion)
        left, right = (gap, 0) if experiment.padding == "left" else (0, gap)
        ids.append([experiment.pad] * left + [*prompt, *completion] + [experiment.pad] * right)
        attention.append([0] * left + [1] * (width - gap) + [0] * right)
        counted.append([0] * (left + len(prompt)) + [1] * len(completion) + [0] * right)
    return PairBatch(torch.tensor(ids), torch.tensor(attention), torch.tensor(counted), experiment.pad)


def _number(value: Any) -> bool:
    try:
        float(value)
    except Exception:
        return False
    return True


# -------------------------------------------------------------------------------------------------------------- train


def _train(adapter: Any, experiment: TrainExperiment, payload: dict[str, Any]) -> Reply:
    from dpocheck.worker.training_probe import TrainingProbe

    watched = TrainingProbe(experiment, payload)
    folder = Path(payload["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {"train": [row.record() for row in experiment.rows]}
    rows |= {name: [row.record() for row in held] for name, held in experiment.evaluation}
    if experiment.rows_on_disk:
        rows = {name: _jsonl(folder / "rows" / f"{name}.jsonl", records) for name, records in rows.items()}
    recipe = tables.translate(experiment.recipe, experiment.body)
    ranks.enter(payload)
    out = adapter.train(watched.probe, rows, recipe, folder)
    if ranks.is_silent(out, payload):
        return {"spies": watched.told(), "in_group": ranks.in_group()}, {}
    if not isinstance(out, TrainOut):
        raise BadAnswer(f"train() returned {kind_of(out)}; expected a TrainOut(policy=..., history=...)")
    reply, arrays = watched.reply(out)
    return reply | {"in_group": ranks.in_group()}, arrays


def _jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write them in one go: each rank of a run writes the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(path)
    return path
