"""What does the batch of a hand-written step look like?  A dictionary with the keys that its source asks for."""

from __future__ import annotations

from typing import Any

from dpocheck.adapter import PairBatch, Unsupported
from dpocheck.functions.parameters import Concept, concept, option
from dpocheck.functions.source_facts import Facts

USUAL = ("input_ids", "attention_mask", "labels")


class Batch(dict):
    """A batch by any usual key, as `[...]` or `.`; it holds the keys the function's source names."""

    def __init__(self, by_name: Any, names: list[str]) -> None:
        self.__dict__["by_name"] = by_name
        super().__init__({name: by_name(name) for name in names})

    def __missing__(self, name: str) -> Any:
        return self.by_name(name)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.by_name(name)
        except KeyError as error:
            raise AttributeError(str(error)) from None

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def to(self, *_: Any, **__: Any) -> Batch:
        return self


class Keys:
    """Answers to the name of one tensor of a batch."""

    def __init__(self, batch: PairBatch, facts: Facts, policy: Any, reference: Any, labels: str) -> None:
        self.labels = labels
        self.batch, self.facts, self.policy, self.reference = batch, facts, policy, reference
        self.said = {name: concept(name) for name in facts.strings | facts.fields}
        kinds = {said.what for said in self.said.values() if said.which or said.completion}
        plain = {name for name in self.said if self.said[name].what == "mask"}
        self.separate = bool(facts.calls & {"cat", "concat", "concatenate"}) and any(
            said.prompt and said.what == "ids" for said in self.said.values()
        )
        handed = bool(plain & facts.attention_keys)
        self.mask = "attention" if handed or kinds & {"completion", "labels"} else "completion"
        if "attention" in kinds and not kinds & {"completion"}:
            self.mask = "completion"
        self.nested = facts.nested or (
            bool({"chosen", "rejected"} & set(self.said)) and "input_ids" in facts.strings and "ids" not in kinds
        )

    def names(self) -> list[str]:
        """The keys that the source names; the usual ones where it names none."""
        found = [name for name in self.facts.strings if self._is_key(self.said[name])]
        tensors = {"ids", "attention", "labels", "completion", "mask"}
        named = [name for name in found if self.said[name].which and self.said[name].what in tensors]
        found += [name.replace(a, b) for name in named for a, b in (("chosen", "rejected"), ("rejected", "chosen"))]
        if not self.nested and (not named or self.facts.calls & {"items", "keys", "startswith"}):
            found += [f"{side}_{name}" for side in ("chosen", "rejected") for name in USUAL]
        return sorted(name for name in set(found) if self._known(name))

    def _is_key(self, said: Concept) -> bool:
        if said.what == "logp":  # of the policy they are what a step computes, not what it is given
            return said.which != "" and said.who == "reference"
        return bool(said.which or said.prompt or said.what in ("ids", "attention", "labels", "completion", "mask"))

    def _known(self, name: str) -> bool:
        try:
            self(name)
        except KeyError:
            return False
        return True

    def __call__(self, name: str) -> Any:
        """The tensor of this name.  Raises KeyError for a name that says nothing."""
        import torch

        said = concept(name)
        if option(name) == "pad":
            return self.batch.pad_token_id
        pairs = self.batch.pairs
        rows = {"chosen": slice(0, pairs), "rejected": slice(pairs, None), "": slice(None)}[said.which]
        if said.what == "index" and said.which:
            return torch.arange(2 * pairs)[rows]
        if said.what == "side":
            if self.nested:
                return Batch(lambda inner: self._tensor(concept(inner), rows), list(USUAL))
            return self._tensor(Concept(which=said.which, what="ids"), rows)
        if said.what == "logp" and said.which:
            return self._precomputed(said, rows)
        return self._tensor(said, rows, name)

    def _tensor(self, said: Concept, rows: slice, name: str = "") -> Any:
        batch = self.batch
        ids, attention = batch.input_ids[rows].clone(), batch.attention_mask[rows].clone()
        counted = batch.completion_mask[rows].clone()
        if said.what == "length" and (said.prompt or not said.completion):
            first = counted.argmax(dim=1)
            joined = self.facts.calls & {"cat", "concat", "concatenate"}
            if rows == slice(None) and not joined and not bool((first[: batch.pairs] == first[batch.pairs :]).all()):
                raise Unsupported("left padding: it takes one prompt length for both completions of a pair")
            return first
        if said.what == "length":
            return counted.sum(dim=1)
        what = self.mask if said.what == "mask" else said.what
        if said.prompt or (self.separate and said.which):
            return self._part(said.prompt, what or "ids", rows)
        found = {"ids": ids, "attention": attention, "completion": counted}
        found["labels"] = ids.clone() if self.labels == "ids" else ids.masked_fill(counted == 0, -100)
        if what not in found:
            raise KeyError(
                f"{name!r} is not known as a key of a batch of pairs; known are names like chosen_input_ids, "
                "chosen_attention_mask, chosen_labels, chosen_response_mask, prompt_length"
            )
        return found[what]

    def _part(self, prompt: bool, what: str, rows: slice) -> Any:
        """Prompts padded on the left, or completions padded on the right, as tensors of their own."""
        import torch

        batch = self.batch
        if prompt and rows == slice(None):
            rows = slice(0, batch.pairs)
        ids, counted = batch.input_ids[rows], batch.completion_mask[rows]
        wanted = ((counted == 0) & (batch.attention_mask[rows] == 1)) if prompt else counted == 1
        parts = [row[keep] for row, keep in zip(ids, wanted, strict=True)]
        width = max(len(part) for part in parts)
        built = torch.full((len(parts), width), batch.pad_token_id, dtype=ids.dtype)
        real = torch.zeros_like(built)
        for row, part in enumerate(parts):
            where = slice(width - len(part), None) if prompt else slice(0, len(part))
            built[row, where], real[row, where] = part, 1
        return {"ids": built, "labels": built.masked_fill(real == 0, -100)}.get(what, real)

    def _precomputed(self, said: Concept, rows: slice) -> Any:
        """Log-probs computed beforehand, of the reference unless the name says policy."""
        import torch

        model = self.policy if said.who == "policy" else self.reference
        if model is None:
            raise KeyError("log-probs of the reference, where there is none")
        batch = self.batch
        kept, mode = model.training, torch.is_grad_enabled()
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids[rows], attention_mask=batch.attention_mask[rows])
            logits = getattr(logits, "logits", logits)
            logits = logits[0] if isinstance(logits, tuple) else logits
            each = logits[:, :-1].double().log_softmax(-1).gather(2, batch.input_ids[rows][:, 1:, None]).squeeze(2)
            total = (each * batch.completion_mask[rows][:, 1:]).sum(1)
        model.train(kept)
        assert torch.is_grad_enabled() == mode
        return total.to(logits.dtype)


def pair_batch(batch: PairBatch, facts: Facts, policy: Any, reference: Any, labels: str = "ignored") -> Batch:
    """The batch as the function's source asks for it.  `labels`: -100 outside the completion ("ignored"), or "ids"."""
    keys = Keys(batch, facts, policy, reference, labels)
    return Batch(keys, keys.names())
