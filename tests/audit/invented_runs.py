"""Which mistakes did somebody invent who has not written the checks?  In whole trainers; each is right but for one
thing, most of them on top of the plain trainer of `honest_runs.py`."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from honest_runs import Own, split

from dpocheck.adapter import TrainOut
from dpocheck.experiment import Objective
from dpocheck.miniature import MINIATURE
from dpocheck.miniature import rows as mini_rows

# --------------------------------------------------------------------------------------------------------------- rows


class Rows(Own):
    """`text(row)` changes a row before it is tokenised."""

    def train(self, probe, rows, recipe, folder):
        rows = {name: [self.text(row) for row in held] if isinstance(held, list) else held
                for name, held in rows.items()}  # fmt: skip
        return super().train(probe, rows, recipe, folder)

    def text(self, row):
        return row


class JoinsWithASpace(Rows):
    """Prompt and completion are joined by a space, whether or not one is there."""

    def text(self, row):
        if not isinstance(row.get("prompt"), str):
            return row
        return row | {side: " " + row[side] for side in ("chosen", "rejected")}


class CollapsesWhiteSpace(Rows):
    """Runs of white space become one space."""

    def text(self, row):
        def tidy(text):
            edges = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
            return edges[0] + " ".join(text.split()) + edges[1] if isinstance(text, str) and text.strip() else text

        return {name: tidy(value) if isinstance(value, str) else value for name, value in row.items()}


class ShufflesColumnsApart(Own):
    """Chosen and rejected are shuffled by two draws from one generator."""

    def train(self, probe, rows, recipe, folder):
        if recipe.shuffle and isinstance(rows["train"], list):
            chance = torch.Generator().manual_seed(recipe.seed)
            order = torch.randperm(len(rows["train"]), generator=chance).tolist()
            rows = rows | {"train": [row | {"rejected": rows["train"][i]["rejected"]}
                                     for row, i in zip(rows["train"], order, strict=True)]}  # fmt: skip
        return super().train(probe, rows, recipe, folder)


class Tokens(Own):
    """`ids(pair)` changes a tokenised pair."""

    def both(self, model, pairs):
        return super().both(model, [self.ids(pair) for pair in pairs])

    def ids(self, pair):
        return pair


class EosAfterThePrompt(Tokens):
    """The tokenizer adds EOS to whatever it is given, the prompt too."""

    def train(self, probe, rows, recipe, folder):
        self.eos = probe.tokenizer().eos_token_id
        return super().train(probe, rows, recipe, folder)

    def ids(self, pair):
        return ([*pair[0], self.eos], *pair[1:])


class WidthOfTheFirstBatch(Own):
    """Rows are cut to the width of the first batch that was ever collated."""

    width = None

    def train(self, probe, rows, recipe, folder):
        self.width = None
        return super().train(probe, rows, recipe, folder)

    def forward(self, model, rows):
        self.width = self.width or max(len(x) + len(y) for x, y in rows)
        return super().forward(model, [(x[: self.width], y[: max(0, self.width - len(x))]) for x, y in rows])


class LimitInCharacters:
    """`max_length` is applied to the text: so many characters, not tokens."""

    says = MINIATURE.says

    def train(self, probe, rows, recipe, folder):
        limit = recipe.max_length

        def render(row, tokenizer):
            text = mini_rows.render(row, tokenizer)
            return text if limit is None else replace(text, chosen=text.chosen[:limit], rejected=text.rejected[:limit])

        return replace(MINIATURE, render=render).train(probe, rows, replace(recipe, max_length=None), folder)


# ------------------------------------------------------------------------------------------------------------- models


class PadTokenAdded(Own):
    """A pad token is added and the policy's embeddings are resized; the reference's are not."""

    def load(self, probe):
        super().load(probe)
        size = self.policy.config.vocab_size
        head = self.policy.lm_head
        wider = torch.nn.Linear(head.in_features, size + 1, bias=False, dtype=head.weight.dtype)
        with torch.no_grad():
            wider.weight[:size], wider.weight[size] = head.weight, head.weight.mean(0)
        self.policy.lm_head = wider
        self.optimizer = torch.optim.SGD(self.policy.parameters(), lr=self.recipe.learning_rate)


class CacheByPrompt(Own):
    """Precomputed log-probs of the reference are kept by prompt: the first pair of a prompt speaks for all."""

    @torch.no_grad()
    def reference_logps(self, pairs):
        if not self.recipe.precompute_reference:
            return super().reference_logps(pairs)
        held = self.__dict__.setdefault("by_prompt", {})
        return torch.cat([held.setdefault(tuple(p[0]), self.both(self.reference, [p])) for p in pairs], dim=1)

    def load(self, probe):
        super().load(probe)
        self.by_prompt = {}


class ReferenceLosesItsLastLayer(Own):
    """The reference is loaded with one layer less, as a smaller twin would be."""

    def load(self, probe):
        super().load(probe)
        self.reference = copy.deepcopy(self.reference)
        self.reference.model.layers = self.reference.model.layers[:-1]
        self.reference.config.num_hidden_layers -= 1


# -------------------------------------------------------------------------------------------------- loss and gradient


class ZLoss(Own):
    """The squared log-normaliser of pretraining is still added to the loss."""

    def losses(self, pairs):
        self.normalisers = []
        losses, told = super().losses(pairs)
        return losses + 1e-3 * sum(self.normalisers), told

    def forward(self, model, rows):
        def keep(module, given, logits):
            if logits.requires_grad:
                self.normalisers.append(logits.logsumexp(-1).square().mean())

        handle = model.lm_head.register_forward_hook(keep)
        try:
            return super().forward(model, rows)
        finally:
            handle.remove()


class BetaDecays(Own):
    """Beta falls by a tenth after every step."""

    def train(self, probe, rows, recipe, folder):
        self.taken = 0
        return super().train(probe, rows, recipe, folder)

    def advance(self, window):
        asked = self.recipe
        self.recipe = replace(asked, objective=replace(asked.objective, beta=asked.objective.beta * 0.9**self.taken))
        try:
            return super().advance(window)
        finally:
            self.taken, self.recipe = self.taken + 1, asked


class HeadLearnsFaster(Own):
    """The head has a group of its own with ten times the rate."""

    def load(self, probe):
        super().load(probe)
        head = list(self.policy.lm_head.parameters())
        rest = [p for p in self.policy.parameters() if all(p is not h for h in head)]
        group = self.optimizer.param_groups[0]
        group["params"] = rest
        self.optimizer.add_param_group({name: value for name, value in group.items() if name != "params"}
                                       | {"params": head, "lr": 10 * self.recipe.learning_rate})  # fmt: skip


class GradientsCarriedOver(Own):
    """A window that an epoch leaves unfinished takes no step; its gradients are still there in the next epoch."""

    def load(self, probe):
        super().load(probe)
        self.left = None

    def advance(self, window):
        if len(window) == self.recipe.accumulation:
            return super().advance(window)
        pairs = self.recipe.batch * self.recipe.accumulation
        self.optimizer.zero_grad()
        told = [self.gradient(part, pairs) for part in window]
        self.left = [None if p.grad is None else p.grad.clone() for p in self.policy.parameters()]
        return self.mean(told) | {"grad_norm": 0.0, "learning_rate": self.recipe.learning_rate}

    def gradient(self, part, pairs):
        left, self.left = self.left, None
        for parameter, held in zip(self.policy.parameters(), left or (), strict=False):
            if held is not None:
                parameter.grad = held if parameter.grad is None else parameter.grad + held
        return super().gradient(part, pairs)


# ---------------------------------------------------------------------------------------------------------- optimizer


class Optimizers(Own):
    """`wrong(group)` changes what the optimizer does."""

    def load(self, probe):
        super().load(probe)
        for group in self.optimizer.param_groups:
            self.wrong(group)

    def wrong(self, group):
        return None


class Dampened(Optimizers):
    """Momentum is damped by as much: the steps are (1 - momentum) times too small."""

    def wrong(self, group):
        if "dampening" in group:
            group["dampening"] = group["momentum"]


class DecayGrows(Optimizers):
    """The sign of the weight decay is wrong: weights grow."""

    def wrong(self, group):
        group["weight_decay"] = -group["weight_decay"]


class DecayDoubled(Optimizers):
    """Weight decay is handed to the optimizer and once more to the loss."""

    def wrong(self, group):
        group["weight_decay"] = 2 * group["weight_decay"]


class EpsilonUnderTheRoot(Own):
    """Adam's epsilon is added under the square root."""

    def advance(self, window):
        if self.recipe.optimizer == "adamw":
            self.optimizer.param_groups[0]["eps"] = math.sqrt(self.recipe.epsilon)
        return super().advance(window)


class NesterovUnasked(Optimizers):
    """Where there is momentum it is Nesterov's."""

    def wrong(self, group):
        if group.get("momentum"):
            group["nesterov"] = True


# --------------------------------------------------------------------------------------------------- runs and the log


class LastFullBatchLost(Own):
    """`range(0, rows - batch, batch)`: an epoch ends one batch early."""

    def windows(self, count):
        recipe, taken = self.recipe, 0
        for epoch in range(recipe.epochs or 10**6):
            order = self.order(count, epoch)
            parts = [order[i : i + recipe.batch] for i in range(0, max(1, count - recipe.batch), recipe.batch)]
            for i in range(0, len(parts), recipe.accumulation):
                if recipe.steps is not None and taken == recipe.steps:
                    return
                taken += 1
                yield parts[i : i + recipe.accumulation]


class SavesTheStepBefore(Own):
    """Checkpoints are written before the optimizer's step."""

    def advance(self, window):
        self.before = copy.deepcopy(self.policy)
        return super().advance(window)

    def save(self, folder):
        self.before.save_pretrained(folder)


class LogsAfterTheStep(Own):
    """Metrics are computed again after the step, on the policy that it has made."""

    def advance(self, window):
        logged = super().advance(window)
        with torch.no_grad():
            return logged | self.mean([self.losses(part)[1] for part in window])


class AccuracyOfMeans(Own):
    """Accurate is the batch whose mean chosen reward is above its mean rejected one."""

    @staticmethod
    def mean(told):
        logged = Own.mean(told)
        return logged | {"rewards/accuracies": float(logged["rewards/chosen"] > logged["rewards/rejected"])}


class EvaluatesWithTheDefaultBeta(Own):
    def evaluations(self, number, sets):
        asked, self.recipe = self.recipe, replace(self.recipe, objective=Objective(beta=0.1))
        try:
            return super().evaluations(number, sets)
        finally:
            self.recipe = asked


class ScaledByTheRootOfTheRank:
    """LoRA's scale is alpha / sqrt(rank), unasked.

    Not found: merged weights do not tell the scale from how the adapter's first matrix was drawn.
    """

    says = MINIATURE.says

    def train(self, probe, rows, recipe, folder) -> TrainOut:
        def refer(trainer, policy, given, recipe, examples, folder):
            for module in policy.modules():
                if isinstance(getattr(module, "scaling", None), dict):
                    module.scaling = {k: v * math.sqrt(recipe.lora.rank) for k, v in module.scaling.items()}
            return MINIATURE.reference(trainer, policy, given, recipe, examples, folder)

        return replace(MINIATURE, reference=refer).train(probe, rows, recipe, folder)


class EarlierRepliesScored(Own):
    """In a chat with several turns the assistant's earlier replies are scored too."""

    def train(self, probe, rows, recipe, folder):
        self.tokenizer = probe.tokenizer()
        self.earlier = {}
        for held in rows.values():
            for row in held if isinstance(held, list) else []:
                self.note(row)
        return super().train(probe, rows, recipe, folder)

    def note(self, row):
        prompt = row.get("prompt")
        replies = [i for i, m in enumerate(prompt) if m["role"] == "assistant"] if isinstance(prompt, list) else []
        if replies:
            whole = split(self.tokenizer, row)[0]
            before = self.tokenizer.apply_chat_template(prompt[: replies[0]], return_dict=True,
                                                        add_generation_prompt=True)["input_ids"]  # fmt: skip
            self.earlier[tuple(whole)] = len(before)

    def both(self, model, pairs):
        def wider(pair):
            start = self.earlier.get(tuple(pair[0]), len(pair[0]))
            return pair[0][:start], pair[0][start:] + pair[1], pair[0][start:] + pair[2]

        return super().both(model, [wider(pair) for pair in pairs])
