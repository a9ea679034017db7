"""How do the parts make a trainer?  `Miniature`: the parts, in the order a run goes through them, and four methods."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpocheck.adapter import PairBatch, Probe, Says, StepOut, TokenBatch, TrainOut, Unsupported
from dpocheck.experiment import KINDS, Objective, Recipe
from dpocheck.miniature import ranks, scores, state, step
from dpocheck.miniature import rows as rows_parts
from dpocheck.miniature.rows import Batch, Example, batches_of
from dpocheck.miniature.scores import Scored
from dpocheck.miniature.state import Progress

SAYS = Says(
    eos="appended", bos="tokenizer", ipo="sum", reward_scale="beta", reduction="none", uneven_accumulation="pairs",
    objectives=(*KINDS, "cdpo"),
)  # fmt: skip


@dataclass(frozen=True)
class Miniature:
    """The parts; the part `loss` is the adapter's method of that name as it stands."""

    read: Callable[..., list[dict[str, Any]]] = rows_parts.read
    render: Callable[..., rows_parts.Text] = rows_parts.render
    tokenize: Callable[..., Example] = rows_parts.tokenize
    truncate: Callable[..., Example | None] = rows_parts.truncate
    collate: Callable[..., Batch] = rows_parts.collate
    forward: Callable[..., torch.Tensor] = scores.forward
    logps: Callable[..., torch.Tensor] = scores.logps
    reference: Callable[..., Callable[[TokenBatch], torch.Tensor]] = scores.reference
    loss: Callable[..., scores.LossOut] = scores.loss
    share: Callable[..., Sequence[Any]] = ranks.share
    reduce: Callable[..., torch.Tensor] = step.reduce
    accumulate: Callable[..., list[Scored]] = step.accumulate
    exchange: Callable[..., None] = ranks.exchange
    clip: Callable[..., float] = step.clip
    update: Callable[..., float] = step.update
    order: Callable[..., list[list[list[int]]]] = step.order
    gather: Callable[..., list[Scored]] = step.gather
    metrics: Callable[..., dict[str, float]] = step.metrics
    evaluate: Callable[..., dict[str, float]] = step.evaluate
    checkpoint: Callable[..., None] = state.checkpoint
    resume: Callable[..., Progress] = state.resume
    says: Says = SAYS
    ranks: bool = True  # `train` may run in several processes

    # ------------------------------------------------------------------------------------------ the adapter's methods

    def sequence_logps(self, model: Any, batch: TokenBatch) -> torch.Tensor:
        """(row,) summed log-probs of the completion tokens."""
        return self.logps(self.forward(model, batch), batch)

    def step(self, policy: Any, reference: Any, batch: PairBatch, *, objective: Objective) -> StepOut:
        """A window of one micro-batch; the policy's earlier gradients are cleared first."""
        policy.zero_grad()
        refer = self.reference(self, policy, reference, Recipe(), (), None)
        score = partial(self.score, policy, refer, objective)
        seen = self.accumulate(self, policy, [batch], score, Recipe())
        loss = self.reduce(torch.cat([scored.losses for scored in seen]), batch.pairs, 1)
        return StepOut(loss, self.metrics(seen))

    def train(self, probe: Probe, rows: Mapping[str, Any], recipe: Recipe, folder: Path) -> TrainOut:
        """A whole run; the process's own random state is left as it was."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]), ranks.together(recipe.world_size):
            torch.manual_seed(recipe.seed)
            return self.run(probe, rows, recipe, Path(folder))

    # ------------------------------------------------------------------------------------------------ how they do it

    def score(
        self, policy: Any, refer: Callable[[TokenBatch], torch.Tensor], objective: Objective, batch: PairBatch
    ) -> Scored:
        """Log-probs, losses and rewards of a batch, per pair."""
        four = [*self.sequence_logps(policy, batch).chunk(2), *refer(batch).chunk(2)]
        lengths = batch.completion_mask[:, 1:].sum(1).to(four[0].device).chunk(2)
        out = self.loss(*four, objective=objective, lengths=lengths)
        return Scored(*four, out.loss, out.rewards_chosen, out.rewards_rejected)

    def run(self, probe: Probe, rows: Mapping[str, Any], recipe: Recipe, folder: Path) -> TrainOut:
        """Rows, models, reference, optimizer, and the loop."""
        tokenizer = probe.tokenizer()
        sets = self.examples(rows, tokenizer, recipe)
        pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        policy, given = models(probe, recipe)
        refer = self.reference(self, policy, given, recipe, list(itertools.chain(*sets.values())), folder)
        score = partial(self.score, policy, refer, recipe.objective)
        held_out = {
            name: self.shares(batches_of(examples, recipe.eval_batch * recipe.world_size), recipe.eval_batch, pad)
            for name, examples in sets.items()
            if name != "train"
        }
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = optimizer_of(parameters, recipe)
        per_epoch = len(self.order(len(sets["train"]), recipe, 0))
        if not per_epoch:
            raise ValueError(f"{len(sets['train'])} pairs do not fill a batch of {recipe.batch}: use a smaller batch")
        total = recipe.steps if recipe.steps is not None else (recipe.epochs or 1) * per_epoch
        progress = Progress()
        if recipe.resume_from is not None:
            progress = self.resume(folder / f"checkpoint-{recipe.resume_from}", policy, optimizer)
        history: list[dict[str, Any]] = []
        checkpoints: dict[int, Path] = {}
        for window in itertools.islice(self.windows(sets["train"], recipe), progress.data, None):
            if progress.step >= total:
                break
            seen = self.accumulate(self, policy, self.shares(window, recipe.batch, pad), score, recipe)
            self.exchange(parameters)
            logged = self.metrics(self.gather(seen))
            logged["grad_norm"] = self.clip(parameters, recipe.clip_norm)
            logged["learning_rate"] = self.update(optimizer, recipe, progress.schedule, total)
            progress = progress.next()
            history.append({"step": progress.step, "split": "train", "metrics": logged})
            if progress.step % (recipe.eval_every or total) == 0:
                for name, chunks in held_out.items():
                    found = self.evaluate(self, policy, score, chunks)
                    history.append({"step": progress.step, "split": name, "metrics": found})
            if recipe.save_every and progress.step % recipe.save_every == 0:
                checkpoints[progress.step] = folder / f"checkpoint-{progress.step}"
                if ranks.here()[0] == 0:
                    self.checkpoint(checkpoints[progress.step], policy, optimizer, progress)
                ranks.wait()
        trained = policy.merge_and_unload() if recipe.lora else policy
        return TrainOut(trained, history, checkpoints)

    def shares(self, batches: Sequence[Sequence[Example]], size: int, pad: int) -> list[Batch]:
        """This rank's part of each batch over all ranks; none of a batch that does not reach it."""
        return [self.collate(own, pad) for batch in batches if (own := self.share(batch, size))]

    def examples(self, rows: Mapping[str, Any], tokenizer: Any, recipe: Recipe) -> dict[str, list[Example]]:
        """Every set's tokenised pairs, numbered through all sets."""
        number = itertools.count()
        sets = {}
        for name, given in rows.items():
            pairs = (self.tokenize(self.render(row, tokenizer), tokenizer, next(number)) for row in self.read(given))
            sets[name] = [cut for pair in pairs if (cut := self.truncate(pair, recipe)) is not None]
        return sets

    def windows(self, examples: Sequence[Example], recipe: Recipe) -> Iterator[list[list[Example]]]:
        """Windows of micro-batches of examples, epoch after epoch, without end."""
        for epoch in itertools.count():
            for window in self.order(len(examples), recipe, epoch):
                yield [[examples[index] for index in micro_batch] for micro_batch in window]


def models(probe: Probe, recipe: Recipe) -> tuple[Any, Any]:
    """The policy, with an adapter where one is asked for, and the reference that was given, if any."""
    dtype = getattr(torch, recipe.dtype)
    policy, given = probe.policy().to(dtype), probe.reference()
    if recipe.lora:
        import peft

        lora = recipe.lora
        policy = peft.get_peft_model(
            policy, peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
        )
    return policy, given if given is None else given.to(dtype).requires_grad_(False)


def optimizer_of(parameters: Sequence[torch.Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer of a recipe; its rate is set anew at every step."""
    shared = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=recipe.momentum, **shared)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, betas=recipe.betas, eps=recipe.epsilon, **shared)
    raise Unsupported(f"optimizer {recipe.optimizer!r}: sgd or adamw")


MINIATURE = Miniature()
