"""Which mistakes are left to make?  Whole trainers, right but for one thing, invented before the zoo was looked at."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from honest_runs import Own, lines
from unusual_runs import Scheduled

# ----------------------------------------------------------------------------------------------------------- optimizer


class MomentsLostByEpoch(Own):
    """The optimizer is made anew at the start of every epoch."""

    def order(self, count, epoch):
        if epoch:
            kept = self.optimizer
            told = ("lr", "momentum", "weight_decay", "betas", "eps")
            known = {name: value for name, value in kept.defaults.items() if name in told}
            self.optimizer = type(kept)([p for g in kept.param_groups for p in g["params"]], **known)
        return super().order(count, epoch)


class ClipsEachParameter(Own):
    """Every parameter's own gradient is clipped at the norm that is meant for all of them."""

    def advance(self, window):
        pairs = sum(map(len, window))
        self.optimizer.zero_grad()
        told = [self.gradient(part, pairs) for part in window]
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), float("inf"))
        for parameter in self.policy.parameters():
            torch.nn.utils.clip_grad_norm_([parameter], self.recipe.clip_norm or float("inf"))
        self.optimizer.step()
        return self.mean(told) | {"grad_norm": norm.item(), "learning_rate": self.recipe.learning_rate}


class ClipsEachMicroBatch(Own):
    """The gradient that has gathered is clipped after every micro-batch, not once before the step."""

    def gradient(self, part, pairs):
        told = super().gradient(part, pairs)
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.recipe.clip_norm or float("inf"))
        return told


class ClipsBeforeUnscaling(Own):
    """The loss is scaled by 2^10; the gradient is clipped first and divided afterwards."""

    def gradient(self, part, pairs):
        losses, told = self.losses(part)
        (1024.0 * losses.sum() / pairs).backward()
        return told

    def advance(self, window):
        pairs = sum(map(len, window))
        self.optimizer.zero_grad()
        told = [self.gradient(part, pairs) for part in window]
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.recipe.clip_norm or float("inf"))
        for parameter in self.policy.parameters():
            if parameter.grad is not None:
                parameter.grad /= 1024.0
        self.optimizer.step()
        return self.mean(told) | {"grad_norm": norm.item() / 1024, "learning_rate": self.recipe.learning_rate}


class PenaltyInsteadOfDecay(Own):
    """Under AdamW the squares of the weights are added to the loss, and go through the moments."""

    def load(self, probe):
        super().load(probe)
        if self.recipe.optimizer == "adamw":
            for group in self.optimizer.param_groups:
                group["weight_decay"] = 0.0

    def gradient(self, part, pairs):
        told = super().gradient(part, pairs)
        if self.recipe.optimizer == "adamw":
            for parameter in self.policy.parameters():
                if parameter.grad is not None:
                    parameter.grad += self.recipe.weight_decay * parameter.detach() * len(part) / pairs
        return told


class WarmUpCountsMicroBatches(Scheduled):
    """The schedule is moved on after every micro-batch."""

    def gradient(self, part, pairs):
        told = super().gradient(part, pairs)
        if self.waited:
            self.scheduler.step()
        self.waited = True
        return told

    def advance(self, window):
        self.waited = False
        return super().advance(window)


class LogsTheNextRate(Scheduled):
    """The learning rate is read after the schedule has moved on."""

    def advance(self, window):
        told = super().advance(window)
        return told | {"learning_rate": self.optimizer.param_groups[0]["lr"]}


# ----------------------------------------------------------------------------------------------------------- reference


class ReferenceFollowsEpochs(Own):
    """At the start of every further epoch the policy becomes the reference."""

    def order(self, count, epoch):
        if epoch:
            self.reference = copy.deepcopy(self.policy).eval().requires_grad_(False)
        return super().order(count, epoch)


class CacheByPlaceInTheEpoch(Own):
    """Reference log-probs are kept by the place that a row has in the epoch; the next epoch has another order."""

    def windows(self, count):
        self.places: dict[int, torch.Tensor] = {}
        self.place = 0
        yield from super().windows(count)

    def order(self, count, epoch):
        self.place = 0
        return super().order(count, epoch)

    def reference_logps(self, pairs):
        found = []
        for pair in pairs:
            if self.place not in self.places:
                self.places[self.place] = super().reference_logps([pair])
            found.append(self.places[self.place])
            self.place += 1
        return torch.cat(found, dim=1)


# ---------------------------------------------------------------------------------------------------------------- loss


class FloorUnderTheRejected(Own):
    """The rejected log-ratio is kept above -8, 'or it runs away'."""

    def losses(self, pairs):
        objective, own, ref = self.recipe.objective, self.both(self.policy, pairs), self.reference_logps(pairs)
        ratio = own - ref
        rewards = objective.beta * torch.stack([ratio[0], ratio[1].clamp(min=-8.0)])
        margin, eps = rewards[0] - rewards[1], objective.label_smoothing
        losses = (1 - eps) * F.softplus(-margin) + eps * F.softplus(margin)
        return losses, self.told(losses, rewards, own)


class SmoothsTheMargin(Own):
    """Label smoothing shrinks the margin by 1 - 2 eps, as if the loss were linear."""

    def losses(self, pairs):
        objective, own, ref = self.recipe.objective, self.both(self.policy, pairs), self.reference_logps(pairs)
        rewards = objective.beta * (own - ref)
        losses = F.softplus(-(1 - 2 * objective.label_smoothing) * (rewards[0] - rewards[1]))
        return losses, self.told(losses, rewards, own)


class WeighsByTheReference(Own):
    """A pair weighs what the reference's own preference says of it: sigmoid of its log-ratio."""

    def gradient(self, part, pairs):
        losses, told = self.losses(part)
        ref = self.reference_logps(part)
        (losses * 2 * torch.sigmoid(0.1 * (ref[0] - ref[1]))).sum().div(pairs).backward()
        return told


# ---------------------------------------------------------------------------------------------------------------- rows


class DropsRepeatedPrompts(Own):
    """Of rows that share a prompt only the first is kept."""

    def train(self, probe, rows, recipe, folder):
        seen: set[str] = set()
        kept = [row for row in lines(rows["train"])
                if str(row.get("prompt")) not in seen and not seen.add(str(row.get("prompt")))]  # fmt: skip
        return super().train(probe, rows | {"train": kept}, recipe, folder)


class PromptLosesItsEnd(Own):
    """White space at the end of a prompt is taken away."""

    def train(self, probe, rows, recipe, folder):
        cut = {name: [row | {"prompt": row["prompt"].rstrip()} if isinstance(row.get("prompt"), str) else row
                      for row in lines(held)] for name, held in rows.items()}  # fmt: skip
        return super().train(probe, cut, recipe, folder)


class SystemMessageLost(Own):
    """Chats lose their first message where it is the system's."""

    def train(self, probe, rows, recipe, folder):
        def cut(row):
            first = row.get("prompt")
            plain = not isinstance(first, list) or not first or first[0]["role"] != "system"
            return row if plain else row | {"prompt": first[1:]}

        return super().train(probe, {n: [cut(r) for r in lines(h)] for n, h in rows.items()}, recipe, folder)


class PadIsNotScored(Own):
    """Tokens that have the padding's id are not scored; where padding is EOS, no EOS is."""

    def forward(self, model, rows):
        width = max(len(x) + len(y) for x, y in rows)
        ids = torch.tensor([x + y + [self.filler] * (width - len(x) - len(y)) for x, y in rows])
        starts = torch.tensor([max(len(x), 1) for x, _ in rows])[:, None]
        ends = torch.tensor([len(x) + len(y) for x, y in rows])[:, None]
        place = torch.arange(width)
        logits = model(input_ids=ids, attention_mask=(place < ends).long()).logits
        each = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        return (each * ((place >= starts) & (ids != self.filler))[:, 1:]).sum(1)


class FirstEpochsOrderAgain(Own):
    """The order is drawn once; every epoch takes the rows in it."""

    def order(self, count, epoch):
        return super().order(count, 0)


# ------------------------------------------------------------------------------------------------- evaluation, logging


class EvaluationLeavesGradients(Own):
    """An evaluation's losses are sent backward, and gradients are cleared after steps, not before them."""

    def evaluations(self, number, sets):
        for pairs in sets.values():
            with torch.enable_grad():
                losses, _ = self.losses(pairs)
                (losses.sum() / len(pairs)).backward()
        return super().evaluations(number, sets)

    def advance(self, window):
        pairs = sum(map(len, window))
        told = [self.gradient(part, pairs) for part in window]
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.recipe.clip_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.mean(told) | {"grad_norm": norm.item(), "learning_rate": self.recipe.learning_rate}


class LastEvaluationBatchExchanged(Own):
    """Evaluation cuts rows into halves by the size that a batch should have: a short one is cut wrongly."""

    @torch.no_grad()
    def evaluations(self, number, sets):
        found, size = [], self.recipe.eval_batch
        for name, pairs in sets.items():
            told = []
            for i in range(0, len(pairs), size):
                one = self.losses(pairs[i : i + size])[1]
                if len(pairs[i : i + size]) < size:
                    one |= {"rewards/chosen": one["rewards/rejected"], "rewards/rejected": one["rewards/chosen"]}
                told.append(one)
            found.append({"step": number, "split": name, "metrics": self.mean(told)})
        return found


class NormAfterClipping(Own):
    """The norm that is logged is that of the clipped gradient."""

    def advance(self, window):
        told = super().advance(window)
        limit = self.recipe.clip_norm or float("inf")
        return told | {"grad_norm": min(told["grad_norm"], limit)}


class SavedInHalf(Own):
    """Checkpoints are written in bfloat16."""

    def save(self, folder):
        copy.deepcopy(self.policy).to(torch.bfloat16).save_pretrained(folder)


class HandsBackTheBest(Own):
    """With an evaluation set, the weights handed back are those of the lowest evaluation loss."""

    def evaluations(self, number, sets):
        found = super().evaluations(number, sets)
        loss = found[0]["metrics"]["loss"] if found else 0.0
        if loss < getattr(self, "best", (float("inf"),))[0]:
            self.best = (loss, copy.deepcopy(self.policy.state_dict()))
        return found

    def train(self, probe, rows, recipe, folder):
        self.best = (float("inf"), None)
        done = super().train(probe, rows, recipe, folder)
        if self.best[1] is not None and recipe.eval_every:
            done.policy.load_state_dict(self.best[1])
        return done


class RowsFromTheRightFile(Own):
    """Rows on disk are read to the last line but one: a file's last line 'is always empty'."""

    def train(self, probe, rows, recipe, folder):
        held = rows["train"]
        if not isinstance(held, list):
            texts = Path(held).read_text().splitlines(keepends=True)[:-1]
            short = Path(folder) / "short.jsonl"
            short.write_text("".join(texts))
            rows = rows | {"train": short}
        return super().train(probe, rows, recipe, folder)
