"""How else may a whole DPO run be written?  One plain loop in the styles that people use; none shares the miniature's
parts."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from dpocheck.adapter import Says, TrainOut, Unsupported

NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
         "logps/rejected")  # fmt: skip


def sides(tokenizer, row):
    """[(ids, start of the completion)] of chosen and rejected; the split lies where the prompt's tokens end in both."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if prompt is None:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if not isinstance(chosen, str):
            shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if isinstance(chosen, str):
        before = tokenizer(prompt)["input_ids"]
        texts = [tokenizer(prompt + text)["input_ids"] for text in (chosen, rejected)]
        texts = [ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id] for ids in texts]
    else:
        def template(messages, **more):
            return tokenizer.apply_chat_template(messages, return_dict=True, **more)["input_ids"]

        before = template(prompt, add_generation_prompt=True) if prompt else []
        texts = [list(template([*prompt, *reply])) for reply in (chosen, rejected)]
    parts = [[i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b] for ids in texts]
    start = min(len(before), *(i for differing in parts for i in differing), len(before))
    return [(ids, start) for ids in texts]


class Loop:
    """`style`: right, left (padding), two forwards, labels, copied reference, own cache, LoRA or autocast."""

    says = Says(ipo="sum", reward_scale="beta", uneven_accumulation="pairs")

    def __init__(self, style: str = "right") -> None:
        self.style, self.name = style, f"loop, {style}"

    def train(self, probe, rows, recipe, folder):
        self.refuse(recipe)
        torch.manual_seed(recipe.seed)
        tokenizer = probe.tokenizer()
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        sets = {name: self.read(tokenizer, held) for name, held in rows.items()}
        self.models(probe, recipe)
        self.cache = {}
        if recipe.precompute_reference or self.style == "own cache":
            with torch.no_grad():
                self.cache = {id(side): self.refer([side]) for held in sets.values() for pair in held for side in pair}
        history, saved = [], {}
        train = sets.pop("train")
        for step, window in enumerate(self.windows(train, recipe), 1):
            history.append({"step": step, "split": "train", "metrics": self.update(window, recipe)})
            if recipe.eval_every and step % recipe.eval_every == 0:
                history += self.evaluate(step, sets, recipe)
            if recipe.save_every and step % recipe.save_every == 0:
                saved[step] = Path(folder) / f"checkpoint-{step}"
                self.policy.save_pretrained(saved[step])
        history += [] if recipe.eval_every else self.evaluate(step, sets, recipe)
        return TrainOut(self.policy.merge_and_unload() if recipe.lora else self.policy, history, saved)

    def refuse(self, recipe):
        asked = recipe.objective
        for unknown, what in (
            (recipe.schedule != "constant" or recipe.warmup_steps, "schedules"),
            (recipe.resume_from is not None, "resuming"), (recipe.max_length, "truncation"),
            (recipe.dtype != "float32", recipe.dtype), (recipe.world_size > 1, "ranks"),
            (recipe.lora and self.style != "LoRA", "LoRA"),
            (recipe.optimizer not in ("sgd", "adamw"), recipe.optimizer),
            (asked.kind != "sigmoid" or asked.sft_weight or asked.length_normalised, asked.kind),
            (recipe.lora and self.style == "LoRA" and recipe.precompute_reference, "a cache with LoRA"),
        ):  # fmt: skip
            if unknown:
                raise Unsupported(what)

    def read(self, tokenizer, rows):
        if not isinstance(rows, list):
            rows = [json.loads(line) for line in Path(rows).read_text().splitlines()]
        return [sides(tokenizer, row) for row in rows]

    def models(self, probe, recipe):
        self.policy, self.reference = probe.policy(), probe.reference()
        for module in self.policy.modules():
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        if recipe.lora:
            import peft

            if self.reference is not None:
                raise Unsupported("LoRA with a reference of its own")
            asked = recipe.lora
            config = peft.LoraConfig(r=asked.rank, lora_alpha=asked.alpha, target_modules=list(asked.targets))
            self.policy = peft.get_peft_model(self.policy, config)
        elif self.reference is None:
            self.reference = copy.deepcopy(self.policy)
        elif self.style == "copied reference":
            self.reference = copy.deepcopy(self.reference)
        if self.reference is not None:
            self.reference.eval().requires_grad_(False)
        self.policy.train()
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        decay = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        self.optimizer = (
            torch.optim.SGD(parameters, momentum=recipe.momentum, **decay) if recipe.optimizer == "sgd"
            else torch.optim.AdamW(parameters, betas=recipe.betas, eps=recipe.epsilon, **decay)
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ log-probs

    def scores(self, model, held):
        if self.style == "two forwards":
            half = len(held) // 2
            return torch.cat([self.forward(model, part) for part in (held[:half], held[half:]) if part])
        return self.forward(model, held)

    def forward(self, model, held):
        width = max(len(ids) for ids, _ in held)
        gaps = [width - len(ids) for ids, _ in held]
        fill = (lambda row, gap, value: [value] * gap + row) if self.style == "left" else (
            lambda row, gap, value: row + [value] * gap)  # fmt: skip
        ids = torch.tensor([fill(list(row), gap, self.pad) for (row, _), gap in zip(held, gaps, strict=True)])
        real = torch.tensor([fill([1] * len(row), gap, 0) for (row, _), gap in zip(held, gaps, strict=True)])
        # a row's first token has nothing before it
        counted = torch.tensor([fill([int(i >= max(start, 1)) for i in range(len(row))], gap, 0)
                                for (row, start), gap in zip(held, gaps, strict=True)])  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=self.style == "autocast"):
            positions = (real.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=real, position_ids=positions).logits[:, :-1]
        if self.style == "labels":
            labels = ids.masked_fill(counted == 0, -100)[:, 1:]
            return -F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none").sum(-1)
        scores = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (scores * counted[:, 1:]).sum(-1)

    @torch.no_grad()
    def refer(self, held):
        if self.cache:
            return torch.cat([self.cache[id(side)] for side in held])
        if self.reference is None:
            with self.policy.disable_adapter():
                return self.scores(self.policy, held)
        return self.scores(self.reference, held)

    # ------------------------------------------------------------------------------------------------------- the loop

    def windows(self, train, recipe):
        done = 0
        for epoch in range(recipe.epochs or 10**6):
            order = list(range(len(train)))
            if recipe.shuffle:
                generator = torch.Generator().manual_seed(997 * recipe.seed + epoch)
                order = torch.randperm(len(train), generator=generator).tolist()
            micro = [order[i : i + recipe.batch] for i in range(0, len(order), recipe.batch)]
            micro = [batch for batch in micro if len(batch) == recipe.batch or not recipe.drop_last]
            for first in range(0, len(micro), recipe.accumulation):
                if done == recipe.steps:
                    return
                done += 1
                yield [[train[i] for i in batch] for batch in micro[first : first + recipe.accumulation]]

    def look(self, pairs, objective):
        """(7, pair): the loss and what is logged, in the order of NAMES."""
        held = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        (a, b), (c, d) = self.scores(self.policy, held).chunk(2), self.refer(held).chunk(2)
        chosen, rejected = objective.beta * (a - c), objective.beta * (b - d)
        m, eps = chosen - rejected, objective.label_smoothing
        losses = -(1 - eps) * F.logsigmoid(m) - eps * F.logsigmoid(-m)
        return torch.stack([losses, chosen, rejected, m, (m > 0).to(m), a, b])

    def update(self, window, recipe):
        self.optimizer.zero_grad()
        total, seen = sum(len(batch) for batch in window), []
        for batch in window:
            looked = self.look(batch, recipe.objective)
            (looked[0].sum() / total).backward()
            seen.append(looked.detach())
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_norm or math.inf)
        self.optimizer.step()
        return self.means(seen) | {"grad_norm": float(norm), "learning_rate": recipe.learning_rate}

    @torch.no_grad()
    def evaluate(self, step, sets, recipe):
        size = recipe.eval_batch
        return [
            {"step": step, "split": name, "metrics": self.means(
                [self.look(pairs[i : i + size], recipe.objective) for i in range(0, len(pairs), size)])}
            for name, pairs in sets.items()
        ]  # fmt: skip

    @staticmethod
    def means(seen):
        return dict(zip(NAMES, torch.cat(seen, dim=1).double().mean(dim=1).tolist(), strict=True))
