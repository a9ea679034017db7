"""torchtune 0.6 at every depth: its loss, its log-probs, its forward pass, and its recipe of full training as a run."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import torchtune_recipe as parts

from dpocheck.adapter import LossOut, Says, StepOut, TrainOut, Unsupported


def dpo_loss(objective):
    """Its loss with the objective's settings; it has no others."""
    from torchtune.rlhf.loss import DPOLoss

    if objective.kind != "sigmoid" or objective.length_normalised or objective.sft_weight:
        more = ", length-normalised" * objective.length_normalised + ", with an SFT term" * bool(objective.sft_weight)
        raise Unsupported(f"the loss {objective.kind}{more}")
    return DPOLoss(beta=objective.beta, label_smoothing=objective.label_smoothing)


def labelled(batch):
    return batch.input_ids.masked_fill(batch.completion_mask == 0, -100)


def refuse(asked, rows, sets):
    """What the recipe does not offer, in words."""
    texts = [text for row in rows for text in row.values() if isinstance(text, str)]
    chat = any(not isinstance(text, str) for row in rows for text in row.values() if text is not None)
    reasons = {
        "an evaluation set": sets > 1, "rows without a prompt": any(row.get("prompt") is None for row in rows),
        "a tokenizer's chat template: it has its own": chat,
        "special tokens in a text: its own tokenizers read text": any("<s>" in t or "</s>" in t for t in texts),
        "a reference computed ahead": asked.precompute_reference, "LoRA: another recipe": asked.lora is not None,
        "checkpoints within an epoch": asked.save_every, "resuming within an epoch": asked.resume_from,
        "truncation that keeps the end": asked.max_length and asked.truncation != "keep_start",
        "an option for the last batch: it is always dropped": asked.drop_last,
        f"dtype {asked.dtype} on a CPU": asked.dtype != "float32",
        f"the schedule {asked.schedule}": asked.schedule not in ("constant", "cosine"),
        "a warm-up to a constant rate": asked.schedule == "constant" and asked.warmup_steps,
        "a run that ends within a later epoch": parts.passes(asked, len(rows)) is None,
    }  # fmt: skip
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise Unsupported(reason)


class Adapter:
    name = package = "torchtune"
    # DPOLoss: "losses: The DPO loss for each example in the batch", `label_smoothing` "encoding uncertainty about the
    # labels".  The recipe: "only supports the DistributedSamplers"; torch on these: "the sampler will add extra indices
    # to make the data evenly divisible across the replicas".
    says = Says(reduction="none", eos="appended", bos="added", objectives=("sigmoid", "cdpo"), uneven_ranks="repeated")
    forced = parts.FORCED
    ranks = True

    def loss(self, policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, objective, lengths=None):
        return LossOut(*dpo_loss(objective)(policy_chosen, policy_rejected, reference_chosen, reference_rejected))

    def sequence_logps(self, model, batch):
        from torchtune.rlhf import get_batch_log_probs

        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return get_batch_log_probs(logits, labelled(batch))

    def step(self, policy, reference, batch, *, objective):
        import torch

        lent = SimpleNamespace(_device=torch.device("cpu"), activations_handling_ctx=contextlib.nullcontext())

        def logps(model):
            def logits(ids):
                return model(input_ids=ids, attention_mask=batch.attention_mask).logits

            return parts.recipe().concatenated_forward(lent, logits, (batch.input_ids, labelled(batch)))[:2]

        with torch.no_grad():
            beside = logps(reference)
        own = logps(policy)
        losses, chosen, rejected = dpo_loss(objective)(*own, *beside)
        loss = losses.mean()
        loss.backward()
        return StepOut(loss, {"rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean(),
                              "rewards/accuracies": (chosen > rejected).float().mean(),
                              "logps/chosen": own[0].mean(), "logps/rejected": own[1].mean()})  # fmt: skip

    def train(self, probe, rows, recipe, folder):
        from omegaconf import OmegaConf

        held, sets = rows["train"], len(rows)
        held = held if isinstance(held, list) else [json.loads(line) for line in Path(held).read_text().splitlines()]
        refuse(recipe, held, sets)
        dpo_loss(recipe.objective)
        file, out = folder / f"rows-{recipe.world_size}.json", folder / "out"
        file.write_text(json.dumps([
            {side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
             for side in ("chosen", "rejected")} for row in held
        ]))  # fmt: skip
        told = OmegaConf.create(parts.settings(probe, recipe, file, parts.passes(recipe, len(held)), out))

        class Recipe(parts.recipe()):
            def _setup_lr_scheduler(self, cfg_lr_scheduler, **more):
                return super()._setup_lr_scheduler(cfg_lr_scheduler, **more) if cfg_lr_scheduler else None

        with parts.group(recipe.world_size):
            run = Recipe(told)
            run.setup(told)
            run.train()
        log = list(run._metric_logger) if run._is_rank_zero else []
        return TrainOut(policy=out / f"epoch_{run.total_epochs - 1}", history=log)
