"""What does a competent engineer do that a first trainer does not?  Right trainers with fused optimizers, cached
prompts, one tree for both completions, chunks, hooks, compiled models, buckets and schedules."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from honest_runs import Own
from torch.utils.checkpoint import checkpoint

from dpocheck.adapter import Says, Unsupported


class Fused(Own):
    """Fused optimizers; clipping with foreach kernels; gradients are set to None."""

    def load(self, probe):
        super().load(probe)
        recipe, held = self.recipe, [p for p in self.policy.parameters() if p.requires_grad]
        shared = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, "fused": True}
        self.optimizer = (
            torch.optim.SGD(held, momentum=recipe.momentum, **shared) if recipe.optimizer == "sgd"
            else torch.optim.AdamW(held, betas=recipe.betas, eps=recipe.epsilon, **shared)
        )  # fmt: skip

    def advance(self, window):
        pairs = sum(map(len, window))
        self.optimizer.zero_grad(set_to_none=True)
        told = [self.gradient(part, pairs) for part in window]
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.recipe.clip_norm is not None:
            held = [p for p in self.policy.parameters() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(held, self.recipe.clip_norm, norm, foreach=True)
        self.optimizer.step()
        return self.mean(told) | {"grad_norm": norm.item(), "learning_rate": self.recipe.learning_rate}


class CachedPrompt(Own):
    """The prompt goes through the model once a pair; both completions go on from copies of its keys and values."""

    def both(self, model, pairs):
        return torch.stack([self.pair(model, *pair) for pair in pairs], dim=1)

    def pair(self, model, prompt, *completions):
        if len(prompt) < 2:
            return self.forward(model, [(prompt, y) for y in completions])
        opened = model(input_ids=torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
        found = []
        for y in completions:
            ids = torch.tensor([prompt[-1:] + y])
            logits = model(input_ids=ids[:, :-1], past_key_values=copy_of(opened), use_cache=True).logits
            found.append(logits.log_softmax(-1)[0].gather(1, torch.tensor(y)[:, None]).sum())
        return torch.stack(found)


def copy_of(cache):
    """The same tensors, graph included, in a cache of their own."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


class Tree(Own):
    """Prompt, chosen and rejected in one row: each completion sees the prompt and itself, positions fork."""

    def both(self, model, pairs):
        return torch.stack([self.tree(model, *pair) for pair in pairs], dim=1)

    def tree(self, model, x, y, z):
        if not x:
            return self.forward(model, [(x, y), (x, z)])
        ids = torch.tensor(x + y + z)
        part = torch.tensor([0] * len(x) + [1] * len(y) + [2] * len(z))
        place = torch.tensor([*range(len(x) + len(y)), *range(len(x), len(x) + len(z))])
        order = torch.arange(len(ids))
        sees = (order[:, None] >= order) & ((part[:, None] == part) | (part == 0))
        logits = model(input_ids=ids[None], attention_mask=sees[None, None], position_ids=place[None]).logits[0]
        each = logits.log_softmax(-1)
        before = torch.tensor([len(x) - 1, *range(len(x), len(x) + len(y) - 1)])
        second = len(x) + len(y)
        after = torch.tensor([len(x) - 1, *range(second, second + len(z) - 1)])
        return torch.stack([each[before, torch.tensor(y)].sum(), each[after, torch.tensor(z)].sum()])


class Chunked(Own):
    """No logits of whole batches: hidden states meet the head three positions at a time, under checkpointing."""

    def forward(self, model, rows):
        totals = []
        for x, y in rows:
            ids = torch.tensor(x + y)
            states = model.model(input_ids=ids[None]).last_hidden_state[0]
            start, total = max(len(x), 1), torch.zeros((), dtype=states.dtype)
            for low in range(start, len(ids), 3):
                high = min(low + 3, len(ids))
                piece = (model.lm_head.weight, states[low - 1 : high - 1], ids[low:high])
                total = total + checkpoint(self.piece, *piece, use_reentrant=False)
            totals.append(total)
        return torch.stack(totals)

    @staticmethod
    def piece(head, states, targets):
        logits = states @ head.T
        return (logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, dim=1)).sum()


class NormsWithoutDecay(Own):
    """Vectors and embeddings are never decayed, as most training scripts have it."""

    def load(self, probe):
        super().load(probe)
        flat = [p for n, p in self.policy.named_parameters() if p.ndim < 2 or "embed" in n]
        rest = [p for n, p in self.policy.named_parameters() if not (p.ndim < 2 or "embed" in n)]
        kept = self.optimizer.defaults
        groups = [{"params": rest, "weight_decay": self.recipe.weight_decay}, {"params": flat, "weight_decay": 0.0}]
        made = type(self.optimizer)(groups, lr=self.recipe.learning_rate)
        for group in made.param_groups:
            group.update({k: v for k, v in kept.items() if k not in ("weight_decay", "fused", "foreach")})
        self.optimizer = made


class FunctionalGradient(Own):
    """`torch.func`: the loss is a function of a dictionary of parameters, its gradient another."""

    def gradient(self, part, pairs):
        ref = self.reference_logps(part)
        held = {n: p.detach() for n, p in self.policy.named_parameters()}

        def objective(parameters):
            def model(**given):
                return torch.func.functional_call(self.policy, parameters, kwargs=given)

            own = self.both(model, part)
            margin = self.recipe.objective.beta * (own[0] - own[1] - ref[0] + ref[1])
            eps = self.recipe.objective.label_smoothing
            losses = (1 - eps) * F.softplus(-margin) + eps * F.softplus(margin)
            return losses.sum() / pairs, (losses, own)

        found, (losses, own) = torch.func.grad(objective, has_aux=True)(held)
        for name, parameter in self.policy.named_parameters():
            parameter.grad = found[name] if parameter.grad is None else parameter.grad + found[name]
        return self.told(losses, self.recipe.objective.beta * (own - ref), own)


class Buckets(Own):
    """With shuffling, pairs of like length go together: shuffled bags of four batches, sorted, then the batches mixed.
    """

    def order(self, count, epoch):
        if not self.recipe.shuffle:
            return list(range(count))
        chance = random.Random(1_000_003 * self.recipe.seed + epoch)
        order = chance.sample(range(count), count)
        size = 4 * self.recipe.batch
        bags = [sorted(order[i : i + size], key=lambda n: self.lengths[n]) for i in range(0, count, size)]
        return [n for bag in bags for n in bag]

    def windows(self, count):
        self.lengths = [(7 * n) % 5 for n in range(count)]  # a stand-in: equal lengths are ties like any other
        return super().windows(count)


class Compiled(Own):
    """The models are compiled, and stay the modules that are saved."""

    def load(self, probe):
        super().load(probe)
        for model in (self.policy, self.reference):
            model.forward = torch.compile(model.forward, backend="eager", dynamic=True)


class StepsInHooks(Own):
    """Each parameter is stepped by its own optimizer as soon as its gradient is there; then the gradient is freed."""

    def load(self, probe):
        super().load(probe)
        recipe = self.recipe
        if recipe.accumulation > 1 or recipe.clip_norm is not None:
            raise Unsupported("accumulation and clipping")
        shared = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        self.own = {
            p: torch.optim.SGD([p], momentum=recipe.momentum, **shared) if recipe.optimizer == "sgd"
            else torch.optim.AdamW([p], betas=recipe.betas, eps=recipe.epsilon, **shared)
            for p in self.policy.parameters()
        }  # fmt: skip
        for parameter in self.own:
            parameter.register_post_accumulate_grad_hook(self.move)

    def move(self, parameter):
        self.own[parameter].step()
        parameter.grad = None

    def advance(self, window):
        told = [self.gradient(part, sum(map(len, window))) for part in window]
        return self.mean(told) | {"learning_rate": self.recipe.learning_rate}


class Margin(torch.autograd.Function):
    """-log sigma of a margin whose slope, sigma - 1, is written by hand."""

    @staticmethod
    def forward(ctx, margin):
        ctx.save_for_backward(margin)
        return F.softplus(-margin)

    @staticmethod
    def backward(ctx, upstream):
        (margin,) = ctx.saved_tensors
        return -upstream * torch.sigmoid(-margin)


class SlopeByHand(Own):
    """The loss is an autograd function of its own; rows of both sides are interleaved, rejected first."""

    def both(self, model, pairs):
        rows = [row for x, y, z in pairs for row in ((x, z), (x, y))]
        each = self.forward(model, rows)
        return torch.stack([each[1::2], each[0::2]])

    def losses(self, pairs):
        objective, own, ref = self.recipe.objective, self.both(self.policy, pairs), self.reference_logps(pairs)
        rewards = objective.beta * (own - ref)
        margin, eps = rewards[0] - rewards[1], objective.label_smoothing
        losses = (1 - eps) * Margin.apply(margin) + eps * Margin.apply(-margin)
        return losses, self.told(losses, rewards, own)


class ReferencePaddedOnTheLeft(Own):
    """The policy's rows are padded on the right, the reference's on the left: rotary positions are relative."""

    def both(self, model, pairs):
        if model is not self.reference:
            return super().both(model, pairs)
        rows = [(x, y) for x, y, _ in pairs] + [(x, z) for x, _, z in pairs]
        width = max(len(x) + len(y) for x, y in rows)
        ids = torch.tensor([[self.filler] * (width - len(x) - len(y)) + x + y for x, y in rows])
        first = torch.tensor([width - len(x) - len(y) for x, y in rows])[:, None]
        start = torch.tensor([width - len(y) + (not x) for x, y in rows])[:, None]
        place = torch.arange(width).expand(len(rows), -1)
        logits = model(input_ids=ids, attention_mask=(place >= first).long(), position_ids=place).logits
        each = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        return each.masked_fill((place < start)[:, 1:], 0.0).sum(1).view(2, -1)


class WidePadding(Own):
    """Rows are padded to a multiple of 16, with any token that is at hand."""

    def forward(self, model, rows):
        width = -(-max(len(x) + len(y) for x, y in rows) // 16) * 16
        ids, real, counted = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
        for i, (x, y) in enumerate(rows):
            ids[i] = torch.tensor((x + y + [*range(1, 17)] * 2)[:1] * width)
            ids[i, : len(x) + len(y)] = torch.tensor(x + y)
            real[i, : len(x) + len(y)] = 1
            counted[i, max(len(x), 1) : len(x) + len(y)] = 1
        logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].double()
        each = logits.gather(2, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        return (each * counted[:, 1:]).sum(1)


class Scheduled(Own):
    """A learning rate by step: warm-up from zero, then constant, linear to zero, or half a cosine."""

    says = replace(Own.says, options=())

    def train(self, probe, rows, recipe, folder):
        self.asked = recipe
        return super().train(probe, rows, replace(recipe, schedule="constant", warmup_steps=0), folder)

    def windows(self, count):
        self.plan = list(super().windows(count))
        asked, whole = self.asked, len(self.plan)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: self.part(n, asked, whole))
        return iter(self.plan)

    @staticmethod
    def part(done, asked, whole):
        if done < asked.warmup_steps:
            return done / asked.warmup_steps
        left = (whole - done) / max(1, whole - asked.warmup_steps)
        if asked.schedule == "linear":
            return max(0.0, left)
        if asked.schedule == "cosine":
            return 0.5 * (1 + torch.cos(torch.tensor((1 - left) * torch.pi, dtype=torch.float64)).item())
        return 1.0

    def advance(self, window):
        rate = self.optimizer.param_groups[0]["lr"]
        told = super().advance(window)
        self.scheduler.step()
        return told | {"learning_rate": rate}


class LogsEveryOther(Own):
    """A log line every second step, of the two steps' pairs, and a last one of what is left."""

    says = Says(eos="appended", reward_scale="beta", uneven_accumulation="pairs", objectives=("sigmoid", "cdpo"))

    def train(self, probe, rows, recipe, folder):
        self.waiting = []
        done = super().train(probe, rows, recipe, folder)
        lines = [line for line in done.history if line["split"] != "train" or line["metrics"]]
        last = max((line["step"] for line in done.history if line["split"] == "train"), default=0)
        if self.waiting:
            lines.append({"step": last, "split": "train", "metrics": self.mean(self.waiting)})
        return replace(done, history=lines)

    def mean(self, told):
        return super().mean(told)

    def advance(self, window):
        pairs = sum(map(len, window))
        self.optimizer.zero_grad()
        self.waiting += [self.gradient(part, pairs) for part in window]
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.recipe.clip_norm or float("inf"))
        self.optimizer.step()
        self.second = not getattr(self, "second", True)
        if not self.second:
            return {}
        told, self.waiting = self.waiting, []
        return self.mean(told) | {"learning_rate": self.recipe.learning_rate}
