"""How differently may a right DPO trainer be built?  Whole trainers that share neither the miniature's parts nor the
loops' in `loops.py`: packed rows, scaled losses, two passes, functional updates, left padding, an order of its own."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dpocheck.adapter import Says, TrainOut, Unsupported


def refuse(recipe: Any) -> None:
    """What none of these trainers offers."""
    asked = recipe.objective
    plain = asked.kind == "sigmoid" and not (asked.sft_weight or asked.length_normalised)
    for what, unknown in {
        f"objective {asked.kind}": not plain, "a schedule": recipe.schedule != "constant" or recipe.warmup_steps,
        "max_length": recipe.max_length, "resuming": recipe.resume_from, "LoRA": recipe.lora,
        "several processes": recipe.world_size > 1, "dtype": recipe.dtype not in ("float32", "float64"),
        f"optimizer {recipe.optimizer}": recipe.optimizer not in ("sgd", "adamw"),
    }.items():  # fmt: skip
        if unknown:
            raise Unsupported(what)


def lines(held: Any) -> list[dict]:
    return held if isinstance(held, list) else [json.loads(line) for line in Path(held).read_text().splitlines()]


def split(tokenizer: Any, row: dict) -> tuple[list[int], list[int], list[int]]:
    """(prompt, chosen, rejected) ids.  The prompt ends where the tokens of both texts leave its own."""
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    if prompt is None:
        at = 0
        while at < min(map(len, sides)) and sides[0][at] == sides[1][at]:
            at += 1
        at = at if isinstance(sides[0], str) else min(at, len(sides[0]) - 1, len(sides[1]) - 1)
        prompt, sides = sides[0][:at], [side[at:] for side in sides]
    if isinstance(prompt, str):
        whole = [tokenizer.encode(prompt + side) for side in sides]
        whole = [ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id] for ids in whole]
        alone = tokenizer.encode(prompt)
    else:
        chat = tokenizer.apply_chat_template
        whole = [list(chat(prompt + side, return_dict=True)["input_ids"]) for side in sides]
        opened = chat(prompt, add_generation_prompt=True, return_dict=True)["input_ids"] if prompt else []
        alone = list(opened)
    end = 0
    while end < len(alone) and all(len(ids) > end and ids[end] == alone[end] for ids in whole):
        end += 1
    return whole[0][:end], whole[0][end:], whole[1][end:]


class Own:
    """A trainer whose parts are the methods below; `right` padding and one backward per micro-batch by default."""

    says = Says(eos="appended", reward_scale="beta", uneven_accumulation="pairs", objectives=("sigmoid", "cdpo"))

    def train(self, probe, rows, recipe, folder):
        refuse(recipe)
        self.recipe, self.folder = recipe, Path(folder)
        tokenizer = probe.tokenizer()
        self.filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        sets = {name: [split(tokenizer, row) for row in lines(held)] for name, held in rows.items()}
        self.load(probe)
        self.known: dict[int, torch.Tensor] = {}
        if recipe.precompute_reference:
            every = [pair for held in sets.values() for pair in held]
            self.known = {id(pair): self.reference_logps([pair]) for pair in every}
        examples, history, saved = sets.pop("train"), [], {}
        number = 0
        for window in self.windows(len(examples)):
            number += 1
            metrics = self.advance([[examples[i] for i in part] for part in window])
            history.append({"step": number, "split": "train", "metrics": metrics})
            if recipe.eval_every and number % recipe.eval_every == 0:
                history += self.evaluations(number, sets)
            if recipe.save_every and number % recipe.save_every == 0:
                saved[number] = self.folder / f"step-{number}"
                self.save(saved[number])
        return TrainOut(self.policy, history + ([] if recipe.eval_every else self.evaluations(number, sets)), saved)

    def save(self, folder):
        self.policy.save_pretrained(folder)

    # ----------------------------------------------------------------------------------------------------- models

    def load(self, probe):
        self.policy = probe.policy()
        given = probe.reference()
        self.reference = (copy.deepcopy(self.policy) if given is None else given).eval()
        self.reference.requires_grad_(False)
        for module in self.policy.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        self.policy.train()
        recipe = self.recipe
        kind = {
            "sgd": lambda p: torch.optim.SGD(
                p, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay),
            "adamw": lambda p: torch.optim.AdamW(
                p, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.epsilon, weight_decay=recipe.weight_decay),
        }  # fmt: skip
        self.optimizer = kind[recipe.optimizer](list(self.policy.parameters()))

    def forward(self, model, rows):
        """(row,) log-probs of [(prompt, completion)], padded on the right."""
        width = max(len(x) + len(y) for x, y in rows)
        ids = torch.tensor([x + y + [self.filler] * (width - len(x) - len(y)) for x, y in rows])
        place = torch.arange(width)
        ends = torch.tensor([len(x) + len(y) for x, y in rows])[:, None]
        starts = torch.tensor([max(len(x), 1) for x, _ in rows])[:, None]
        logits = model(input_ids=ids, attention_mask=(place < ends).long()).logits
        each = -F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        return (each * ((place >= starts) & (place < ends))[:, 1:]).sum(dim=1)

    def both(self, model, pairs):
        """(2, pair)"""
        rows = [(x, y) for x, y, _ in pairs] + [(x, z) for x, _, z in pairs]
        return self.forward(model, rows).view(2, -1)

    @torch.no_grad()
    def reference_logps(self, pairs):
        if self.known:
            return torch.cat([self.known[id(pair)] for pair in pairs], dim=1)
        return self.both(self.reference, pairs)

    # ------------------------------------------------------------------------------------------------------ steps

    def windows(self, count):
        recipe, taken = self.recipe, 0
        for epoch in range(recipe.epochs or 10**6):
            order = self.order(count, epoch)
            parts = [order[i : i + recipe.batch] for i in range(0, count, recipe.batch)]
            if recipe.drop_last and len(parts[-1]) < recipe.batch:
                parts = parts[:-1]
            for i in range(0, len(parts), recipe.accumulation):
                if recipe.steps is not None and taken == recipe.steps:
                    return
                taken += 1
                yield parts[i : i + recipe.accumulation]

    def order(self, count, epoch):
        if not self.recipe.shuffle:
            return list(range(count))
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.recipe.seed + 7919 * epoch)).tolist()

    def losses(self, pairs):
        """(pair,) losses, and what is logged of each pair."""
        objective, own, ref = self.recipe.objective, self.both(self.policy, pairs), self.reference_logps(pairs)
        rewards = objective.beta * (own - ref)
        margin = rewards[0] - rewards[1]
        eps = objective.label_smoothing
        losses = (1 - eps) * F.softplus(-margin) + eps * F.softplus(margin)
        return losses, self.told(losses, rewards, own)

    @staticmethod
    def told(losses, rewards, own):
        margin = rewards[0] - rewards[1]
        logged = {"loss": losses, "rewards/chosen": rewards[0], "rewards/rejected": rewards[1],
                  "rewards/margins": margin, "rewards/accuracies": (margin > 0).double(), "logps/chosen": own[0],
                  "logps/rejected": own[1]}  # fmt: skip
        return {name: value.detach().double() for name, value in logged.items()}

    def advance(self, window):
        pairs = sum(map(len, window))
        self.optimizer.zero_grad()
        told = [self.gradient(part, pairs) for part in window]
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.recipe.clip_norm or float("inf"))
        self.optimizer.step()
        return self.mean(told) | {"grad_norm": norm.item(), "learning_rate": self.recipe.learning_rate}

    def gradient(self, part, pairs):
        losses, told = self.losses(part)
        (losses.sum() / pairs).backward()
        return told

    @staticmethod
    def mean(told):
        return {name: torch.cat([one[name] for one in told]).mean().item() for name in told[0]}

    @torch.no_grad()
    def evaluations(self, number, sets):
        found, size = [], self.recipe.eval_batch
        for name, pairs in sets.items():
            told = [self.losses(pairs[i : i + size])[1] for i in range(0, len(pairs), size)]
            found.append({"step": number, "split": name, "metrics": self.mean(told)})
        return found


class Packed(Own):
    """All rows of a micro-batch lie in one row, kept apart by a block mask and by positions that start anew."""

    def forward(self, model, rows):
        ids = torch.tensor([token for x, y in rows for token in x + y])
        owner = torch.tensor([i for i, (x, y) in enumerate(rows) for _ in x + y])
        place = torch.tensor([i for x, y in rows for i in range(len(x) + len(y))])
        scored = torch.tensor([i >= max(len(x), 1) for x, y in rows for i in range(len(x) + len(y))])
        mask = (owner[:, None] == owner[None]) & (place[:, None] >= place[None])
        logits = model(input_ids=ids[None], attention_mask=mask[None, None], position_ids=place[None]).logits[0]
        at = torch.nonzero(scored)[:, 0]
        each = torch.log_softmax(logits[at - 1], dim=-1)[torch.arange(len(at)), ids[at]]
        return torch.zeros(len(rows), dtype=each.dtype).index_add(0, owner[at], each)


class LeftPadded(Own):
    """Rows are padded on the left, with position ids of their own, so that all rows end in the same column."""

    def forward(self, model, rows):
        width = max(len(x) + len(y) for x, y in rows)
        ids = torch.full((len(rows), width), self.filler)
        first, start = torch.zeros(len(rows), 1), torch.zeros(len(rows), 1)
        for i, (x, y) in enumerate(rows):
            first[i], start[i] = width - len(x) - len(y), width - len(y) + (not x)
            ids[i, int(first[i]) :] = torch.tensor(x + y)
        column = torch.arange(width)
        position = (column - first).clamp(min=0).long()
        logits = model(input_ids=ids, attention_mask=(column >= first).long(), position_ids=position).logits
        each = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
        return each.masked_fill((column < start)[:, 1:], 0.0).sum(1)


class Scaled(Own):
    """The loss is multiplied by 2^12 before backward, the gradient divided before clipping; overflow skips the step."""

    scale = 2.0**12

    def gradient(self, part, pairs):
        losses, told = self.losses(part)
        (self.scale * losses.sum() / pairs).backward()
        return told

    def advance(self, window):
        pairs = sum(map(len, window))
        self.optimizer.zero_grad(set_to_none=False)
        told = [self.gradient(part, pairs) for part in window]
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / self.scale)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.recipe.clip_norm or float("inf"))
        if torch.isfinite(norm):
            self.optimizer.step()
        return self.mean(told) | {"grad_norm": norm.item(), "learning_rate": self.recipe.learning_rate}


class SummedThenNormalised(Own):
    """Gradients of summed losses are added up; at the end of a window they are divided by its pairs."""

    def gradient(self, part, pairs):
        losses, told = self.losses(part)
        losses.sum().backward()
        return told

    def advance(self, window):
        def divide(optimizer, *_):
            for parameter in self.policy.parameters():
                if parameter.grad is not None:
                    parameter.grad /= sum(map(len, window))

        self.optimizer.zero_grad()
        told = [self.gradient(part, None) for part in window]
        divide(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.recipe.clip_norm or float("inf"))
        self.optimizer.step()
        return self.mean(told) | {"grad_norm": norm.item(), "learning_rate": self.recipe.learning_rate}


class TwoPasses(Own):
    """First all log-probs without a graph, then each completion's own likelihood with the weight that it is due."""

    def gradient(self, part, pairs):
        with torch.no_grad():
            _, told = self.losses(part)
            objective = self.recipe.objective
            slope = objective.label_smoothing - torch.sigmoid(-told["rewards/margins"])
            weights = objective.beta * slope / pairs
        for sign, side in ((1.0, 1), (-1.0, 2)):
            for pair, weight in zip(part, weights, strict=True):
                (sign * float(weight) * self.forward(self.policy, [(pair[0], pair[side])]).sum()).backward()
        return told


class OwnOrder(Own):
    """The standard library shuffles: rows are drawn from a bag that is filled anew for every epoch."""

    def order(self, count, epoch):
        bag, drawn = list(range(count)), []
        chance = random.Random(f"{self.recipe.seed}/{epoch}")
        while bag:
            drawn.append(bag.pop(chance.randrange(len(bag)) if self.recipe.shuffle else 0))
        return drawn


class Functional(Own):
    """Parameters are a dictionary; gradients come from `torch.autograd.grad`, updates are written out by hand."""

    def load(self, probe):
        super().load(probe)
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.policy.named_parameters()}
        self.count = 0

    def advance(self, window):
        pairs, held, told = sum(map(len, window)), dict(self.policy.named_parameters()), []
        total = {name: torch.zeros_like(p) for name, p in held.items()}
        for part in window:
            losses, one = self.losses(part)
            found = torch.autograd.grad(losses.sum() / pairs, list(held.values()), allow_unused=True)
            for name, gradient in zip(held, found, strict=True):
                total[name] += 0.0 if gradient is None else gradient
            told.append(one)
        norm = torch.stack([g.square().sum() for g in total.values()]).sum().sqrt()
        limit = self.recipe.clip_norm or float("inf")
        self.count += 1
        with torch.no_grad():
            for name, parameter in held.items():
                self.move(name, parameter, total[name] * min(1.0, limit / (norm.item() + 1e-6)))
        return self.mean(told) | {"grad_norm": norm.item(), "learning_rate": self.recipe.learning_rate}

    def move(self, name, parameter, gradient):
        recipe, (first, second) = self.recipe, self.moments[name]
        if recipe.optimizer == "sgd":
            gradient = gradient + recipe.weight_decay * parameter
            first.copy_(gradient if self.count == 1 else recipe.momentum * first + gradient)
            parameter -= recipe.learning_rate * first
            return
        parameter *= 1 - recipe.learning_rate * recipe.weight_decay
        a, b = recipe.betas
        first.lerp_(gradient, 1 - a)
        second.mul_(b).add_((1 - b) * gradient.square())
        size = (second / (1 - b**self.count)).sqrt() + recipe.epsilon
        parameter -= recipe.learning_rate * (first / (1 - a**self.count)) / size


class AsksTwice(Own):
    """Where no reference is handed over, it asks for the policy once more and freezes that one."""

    def load(self, probe):
        super().load(probe)
        if probe.reference_path is None:
            self.reference = probe.policy().eval().requires_grad_(False)


class LogsPerToken(Own):
    """Log-probs are logged per token, and only logged so."""

    def losses(self, pairs):
        losses, told = super().losses(pairs)
        for name, side in (("logps/chosen", 1), ("logps/rejected", 2)):
            # a row's first token has nothing before it that predicts it
            scored = torch.tensor([len(pair[side]) - (not pair[0]) for pair in pairs])
            told[name] = told[name] / scored
        return losses, told
