"""Which mistakes were planted around TRL?  Each class spoils one thing: a model that it is handed, a batch that its
collator makes, its recipe, or the history that it returns; everything else is TRL's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

from planted_runs import Damaged, _loading, _logged


class Around(Damaged):
    """TRL's adapter.  `changed` may alter a model when it is loaded, `collated` the examples and the batch of each
    micro-batch."""

    def __init__(self) -> None:
        from conformance.adapters.trl import Adapter

        super().__init__(Adapter())

    def train(self, probe, rows, recipe, folder):
        import trl

        fault = self

        class Trainer(trl.DPOTrainer):
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **named)
                collate = self.data_collator
                self.data_collator = lambda examples: fault.collated(collate, examples)

        with mock.patch.object(trl, "DPOTrainer", Trainer):
            return super().train(probe, rows, recipe, folder)

    def models(self, probe):
        self.loaded: dict[str, Any] = {}

        def load(what):
            held = self.loaded[what] = probe.load(what)
            if what != "tokenizer" and held is not None:
                self.changed(what, held)
            return held

        return _loading(probe, load)

    def changed(self, what: str, model: Any) -> None: ...

    def collated(self, collate: Any, examples: list[dict]) -> dict[str, Any]:
        return collate(examples)


# ------------------------------------------------------------------------------------------------------------- models


class FreezesTheQueries(Around):
    """The query projections of the first layer are left out of training."""

    def changed(self, what, model):
        if what == "policy":
            model.model.layers[0].self_attn.q_proj.requires_grad_(False)


class DoublesTheNorm(Around):
    """The last norm's weight is doubled in both models, and with it every logit."""

    def changed(self, what, model):
        model.model.norm.weight.data.mul_(2.0)


class HalvesTheGradient(Around):
    """A hook for gradient clipping by hand is left on the head."""

    def changed(self, what, model):
        if what == "policy":
            model.lm_head.weight.register_hook(lambda gradient: 0.5 * gradient)


class ReferenceStaysInTraining(Around):
    """Something switches the reference back to training mode whenever it is put into evaluation mode."""

    def changed(self, what, model):
        if what == "reference":
            model.train()
            model.eval = lambda: model.train()


class ReferenceSharesTheHead(Around):
    """The heads are tied, as the embeddings of two models in one process may be: the reference learns."""

    def changed(self, what, model):
        if what == "reference" and "policy" in self.loaded:
            model.lm_head.weight = self.loaded["policy"].lm_head.weight


class ReferenceForgetsItsHead(Around):
    """The reference is loaded without its head, whose logits are then all equal."""

    def changed(self, what, model):
        if what == "reference":
            model.lm_head.weight.data.zero_()


class ModelsHandedOverCrosswise(Around):
    def models(self, probe):
        other = {"policy": "reference", "reference": "policy"} if probe.reference_path else {}
        return _loading(probe, lambda what: probe.load(other.get(what, what)))


# ----------------------------------------------------------------------------------------------------------- collator


class CollatorDropsTheEos(Around):
    """The end of sequence is taken off again before the rows are padded."""

    def collated(self, collate, examples):
        eos = self.loaded["tokenizer"].eos_token_id

        def cut(ids):
            return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids

        sides = ("chosen_ids", "rejected_ids")
        return collate([example | {side: cut(example[side]) for side in sides} for example in examples])


class CollatorScoresThePromptsEnd(Around):
    """The completion mask starts one token too early."""

    def collated(self, collate, examples):
        batch = collate(examples)
        mask = batch["completion_mask"]
        early = mask.roll(-1, dims=1)
        early[:, -1] = 0
        return batch | {"completion_mask": mask | early}


class CollatorMasksTheLastToken(Around):
    """The last completion token of each row is not scored."""

    def collated(self, collate, examples):
        batch = collate(examples)
        mask = batch["completion_mask"]
        following = mask.roll(-1, dims=1)
        following[:, -1] = 0
        return batch | {"completion_mask": mask & following}


class CollatorMasksTheFirstToken(Around):
    def collated(self, collate, examples):
        batch = collate(examples)
        mask = batch["completion_mask"]
        before = mask.roll(1, dims=1)
        before[:, 0] = 0
        return batch | {"completion_mask": mask & before}


# ---------------------------------------------------------------------------------------------------------- optimizer


class DecaysUnasked(Around):
    """AdamW's own default for the weight decay, under every optimizer."""

    def recipe(self, recipe):
        return replace(recipe, weight_decay=recipe.weight_decay or 0.01)


# ------------------------------------------------------------------------------------------------------------ history


def _exchanged(metrics: dict[str, float]) -> dict[str, float]:
    """As if the two rewards had been unpacked in the wrong order: margin and accuracy follow."""
    other = {"rewards/chosen": "rewards/rejected", "rewards/rejected": "rewards/chosen"}
    follow = {"rewards/margins": lambda margin: -margin, "rewards/accuracies": lambda share: 1.0 - share}
    return {other.get(name, name): follow.get(name, lambda x: x)(value) for name, value in metrics.items()}


class LogsRewardsCrosswise(Around):
    def out(self, done, probe):
        return _logged(done, _exchanged)


class LogsRewardsTimesBeta(Around):
    """Beta, which the rewards hold already, is multiplied in once more."""

    def recipe(self, recipe):
        self.beta = recipe.objective.beta
        return recipe

    def out(self, done, probe):
        scaled = ("rewards/chosen", "rewards/rejected", "rewards/margins")
        return _logged(done, lambda metrics: {
            name: self.beta * value if name in scaled else value for name, value in metrics.items()
        })  # fmt: skip
