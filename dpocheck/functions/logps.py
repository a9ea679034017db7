"""How does a hand-written sum of log-probs become the capability `sequence_logps`?"""

from __future__ import annotations

import re
from typing import Any

from dpocheck.adapter import Objective, PairBatch, TokenBatch, Unsupported
from dpocheck.functions.batches import pair_batch
from dpocheck.functions.forms import SUMS, of_rows
from dpocheck.functions.losses import library
from dpocheck.functions.models import outside, speaking
from dpocheck.functions.options import PadToken
from dpocheck.functions.parameters import concept
from dpocheck.functions.target import Target

MOVED = re.compile(r"shift|next|target", re.I)


def wants_moved(target: Target) -> bool:
    """Are logits (or the ids of which its model makes them) and labels to be handed over already moved by one?

    So if it does not move them itself and either its callers in the file hand over moved ones or its parameters are
    called targets.  Where nothing tells, labels are given as transformers takes them: unmoved.
    """
    facts, match = target.facts, target.match
    beside = match.role("model") and match.role("ids") and match.role("labels")
    if not (match.role("logits") or beside) or not facts.known or facts.shifts:
        return False
    labels = match.role("labels") or match.role("ids") or ""
    return facts.callers_shift or bool(MOVED.search(labels)) or labels == "y"


class SequenceLogps:
    """Calls a log-prob function with a token batch, in the form it takes it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.moved = wants_moved(target)
        single = target.facts.known and not target.facts.calls & SUMS  # the mask comes after it
        apart = {"completion", "prompt_length"} & {role for _, role in target.match.roles}
        self.labels = "ids" if single or (apart and not target.facts.ignores) else "ignored"
        self.singular = (target.match.role("prompt_length") or "").endswith(("len", "length", "start", "end"))
        given = {role for _, role in target.match.roles}
        self.flat = {role for name, role in target.match.roles if name in target.facts.unsqueezed}  # one row, no batch
        self.singular = self.singular or bool(self.flat)
        self.single = bool({"prompt_ids", "completion_ids"} & given)
        self.lists = {role for name, role in target.match.roles if name in target.facts.habits.lists}
        options = {key for key, _ in target.match.options}
        self.padless = self.singular and not given & {"attention", "labels", "completion"} and "pad" not in options
        self.numpy = library(target) == "numpy"

    def __call__(self, model: Any, batch: TokenBatch) -> Any:
        rows = batch.input_ids.shape[0]
        if self.single or self.singular:
            return self._row_by_row(model, batch)
        if self.target.match.shape == "pairs":
            return self._rows(model, batch) if of_rows(self.target.facts) else self._pairs(model, batch)
        out = reduce(self._ask(model, batch), batch)
        if out.ndim == 0 and rows > 1:  # written for one sequence
            return self._row_by_row(model, batch)
        return out.reshape(1) if out.ndim == 0 else out

    def _rows(self, model: Any, batch: TokenBatch) -> Any:
        """A function of a batch of rows, `batch["input_ids"]`, is given them under the keys that it asks for."""
        fields = (batch.input_ids, batch.attention_mask, batch.completion_mask)
        filled = pair_batch(PairBatch(*fields, max(pad_id(batch), 0)), self.target.facts, model, None)
        given = {"model": model, "batch": filled, "settings": _settings(batch)}
        with speaking(self.target.facts, model, pad=_spare(batch, model)):
            return reduce(self.target.call(given, Objective(), {"policy": model}), batch)

    def _pairs(self, model: Any, batch: TokenBatch) -> Any:
        """A function of a batch of pairs is asked for each row as a pair with itself; the chosen's answer is taken."""
        import torch

        twice = (torch.cat([field, field]) for field in (batch.input_ids, batch.attention_mask, batch.completion_mask))
        filled = pair_batch(PairBatch(*twice, max(pad_id(batch), 0)), self.target.facts, model, None)
        given = {"model": model, "batch": filled, "settings": _settings(batch)}
        with speaking(self.target.facts, model, pad=_spare(batch, model)):
            out = self.target.call(given, Objective(), {"policy": model})
        if hasattr(out, "items"):
            named = {name: concept(str(name)) for name in out}
            wanted = [n for n, c in named.items() if c.which == "chosen" and c.what in ("logp", "") and not c.who]
            wanted = wanted or [n for n, c in named.items() if c.which == "chosen" and c.what == "logp"]
            out = out[wanted[0]] if wanted else next(iter(out.values()))
        out = out[0] if isinstance(out, tuple | list) else out
        rows = batch.input_ids.shape[0]
        return out[:rows] if getattr(out, "ndim", 0) == 1 and len(out) == 2 * rows else out

    def _leave_out(self, given: dict[str, Any], batch: TokenBatch, model: Any) -> None:
        """Labels that a function leaves out by another number than -100 get that number, where it is known of it.

        If those who call it hand it the ids as they are, so is it here: only padding has that number.
        """
        facts = self.target.facts
        if not facts.habits.sentinel or facts.ignores or "labels" not in given:
            return
        number = 0 if facts.habits.sentinel == "zero" else _spare(batch, model)
        if number == 0 and bool(((batch.input_ids == 0) & (batch.completion_mask == 1)).any()):
            raise Unsupported(f"a scored token of id 0: by 0 {self.target.name} knows the labels that it leaves out")
        outside_it = batch.attention_mask == 0 if facts.habits.callers_give_ids else batch.completion_mask == 0
        given["labels"] = batch.input_ids.masked_fill(outside_it, number)

    def _row_by_row(self, model: Any, batch: TokenBatch) -> Any:
        import torch

        rows = []
        for row in range(batch.input_ids.shape[0]):
            fields = (batch.input_ids, batch.attention_mask, batch.completion_mask)
            one = TokenBatch(*(field[row : row + 1] for field in fields))
            if self.padless:  # nothing would tell it what is padding
                real = one.attention_mask[0] == 1
                one = TokenBatch(*(field[row : row + 1, real] for field in fields))
            rows.append(reduce(self._ask(model, one), one).reshape(-1))
        return torch.cat(rows)

    def _ask(self, model: Any, batch: TokenBatch) -> Any:
        device, rows = batch.input_ids.device, len(batch.input_ids)
        given = {"model": model, "settings": {"pad": pad_id(batch), "device": device, "pairs": rows}}
        given["settings"]["tokenizer"] = PadToken(_spare(batch, model))
        given |= tensors(batch, self.labels, self.singular)
        given["encoded"] = {"input_ids": given["ids"], "attention_mask": given["attention"]}
        self._leave_out(given, batch, model)
        if self.target.match.role("logits"):
            given["logits"] = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        if self.moved:
            before, after = slice(None, -1), slice(1, None)
            moved = {"logits": before, "labels": after, "ids": after, "completion": after, "attention": after}
            if "logits" not in given:  # its model makes them of the ids
                moved |= {"ids": before, "attention": before}
            given |= {key: given[key][:, where] for key, where in moved.items() if key in given}
        for role in self.flat & set(given):
            given[role] = given[role][0]
        for role in self.lists & set(given):
            given[role] = given[role].flatten().tolist()
        if self.numpy:
            given = {role: _as_numpy(value) for role, value in given.items()}
        try:
            with speaking(self.target.facts, model, pad=_spare(batch, model)):
                return self.target.call(given, Objective(), {"policy": model})
        except (IndexError, RuntimeError) as error:
            if self.labels == "ids" or not self.target.match.role("labels") or not outside(error):
                raise
            if self.target.facts.ignores:  # it knows -100 and fails on it: plain ids would be another question
                raise
            self.labels = "ids"
            return self._ask(model, batch)


def tensors(batch: TokenBatch, labels: str, singular: bool) -> dict[str, Any]:
    """The batch by role.  `labels`: "ignored", -100 outside the completion, or "ids", the tokens as they are."""
    ids, counted = batch.input_ids, batch.completion_mask
    first = counted.argmax(dim=1)  # the position of the first completion token
    found = {"ids": ids.clone(), "attention": batch.attention_mask.clone(), "completion": counted.clone()}
    found["prompt_length"] = int(first[0]) if singular else first
    found["labels"] = ids.clone() if labels == "ids" else ids.masked_fill(counted == 0, -100)
    real = batch.attention_mask[0] == 1
    found["prompt_ids"] = ids[:1, (real & (counted[0] == 0))]
    found["completion_ids"] = ids[:1, (real & (counted[0] == 1))]
    return found


def pad_id(batch: TokenBatch) -> int:
    """The id that stands at padding; where there is none, an id that is nowhere."""
    padding = batch.input_ids[batch.attention_mask == 0]
    return int(padding[0]) if padding.numel() else -1


def _spare(batch: TokenBatch, model: Any) -> int:
    """The id that stands at padding; where there is none, one of the vocabulary that is nowhere in the batch."""
    if (pad := pad_id(batch)) >= 0:
        return pad
    used = set(batch.input_ids.flatten().tolist())
    return next((token for token in reversed(range(model.config.vocab_size)) if token not in used), pad)


def reduce(out: Any, batch: TokenBatch) -> Any:
    """(row,) of what came back: itself, the first of a tuple, or the sum of log-probs token by token."""
    import torch

    if type(out).__module__ == "numpy":
        out = torch.as_tensor(out)
    if isinstance(out, dict):
        out = next(value for value in out.values() if torch.is_tensor(value))
    if isinstance(out, tuple | list) and out and torch.is_tensor(out[0]) and not _list_of_rows(out, batch):
        flat = (part for part in out if torch.is_tensor(part) and part.ndim < 3)  # not the logits beside it
        out = next(flat, out[0])
    elif isinstance(out, list) and _list_of_rows(out, batch):
        out = torch.stack([torch.as_tensor(value).reshape(()) for value in out])
    elif isinstance(out, float):
        out = torch.tensor(out)
    rows, width = batch.input_ids.shape
    if torch.is_tensor(out) and out.ndim == 2 and out.shape in ((rows, width), (rows, width - 1)) and width > 2:
        mask = batch.completion_mask[:, width - out.shape[1] :]
        return torch.where(mask == 1, out, torch.zeros_like(out)).sum(dim=1)
    return out


def _settings(batch: TokenBatch) -> dict[str, Any]:
    return {"device": batch.input_ids.device, "pad": max(pad_id(batch), 0)}


def _as_numpy(value: Any) -> Any:
    import torch

    return value.detach().numpy() if torch.is_tensor(value) else value


def _list_of_rows(out: Any, batch: TokenBatch) -> bool:
    return isinstance(out, list) and len(out) == batch.input_ids.shape[0]
