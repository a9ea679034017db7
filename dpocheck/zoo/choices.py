"""Which right trainers differ in the loss, in the step, in a choice that is left open, or in what they offer?"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from dpocheck.experiment import DIVERGENCES
from dpocheck.zoo.registry import functional, mini, torch, variant


def _but(**parts):
    return replace(mini.MINIATURE, **parts)


# ---------------------------------------------------------------------------------------------------------------- loss


def _loss(sigmoid_loss):
    """The miniature with `sigmoid_loss(logit, smoothing)` for the sigmoid objective."""

    def loss(*four, objective, lengths=None):
        out = mini.loss(*four, objective=objective, lengths=lengths)
        if objective.kind != "sigmoid" or objective.sft_weight:
            return out
        four = [logps.to(torch.promote_types(logps.dtype, torch.float32)) for logps in four]
        chosen, rejected = four[0] - four[2], four[1] - four[3]
        if objective.length_normalised:
            chosen, rejected = chosen / lengths[0], rejected / lengths[1]
        return replace(out, loss=sigmoid_loss(objective.beta * (chosen - rejected), objective.label_smoothing))

    return _but(loss=loss)


@variant("divergence-of-ratios")
def divergence_of_ratios():
    """f' of a divergence is computed from the ratio u = exp(log pi - log ref), with another constant added."""

    def loss(*four, objective, lengths=None):
        out = mini.loss(*four, objective=objective, lengths=lengths)
        if objective.kind not in DIVERGENCES or objective.sft_weight or objective.length_normalised:
            return out
        four = [logps.to(torch.promote_types(logps.dtype, torch.float32)) for logps in four]
        u, a = [(four[i] - four[i + 2]).exp() for i in (0, 1)], objective.alpha
        scores = {
            "forward_kl": lambda u: -1 / u,
            "js_divergence": lambda u: torch.log(2 * u / (1 + u)),
            "alpha_divergence": lambda u: (1 - u**-a) / a,
        }[objective.kind]
        return replace(out, loss=-functional.logsigmoid(objective.beta * (scores(u[0]) - scores(u[1]))))

    return _but(loss=loss)


@variant("logaddexp")
def logaddexp():
    """The loss is log(exp(0) + exp(-m)) + epsilon m."""

    def value(logit, smoothing):
        return torch.logaddexp(torch.zeros_like(logit), -logit) + smoothing * logit

    return _loss(value)


@variant("binary-cross-entropy")
def binary_cross_entropy():
    """The loss is a binary cross-entropy with the soft label 1 - epsilon."""

    def value(logit, smoothing):
        label = torch.full_like(logit, 1 - smoothing)
        return functional.binary_cross_entropy_with_logits(logit, label, reduction="none")

    return _loss(value)


@variant("gradient-formed-in-forward")
def gradient_formed_in_forward():
    """The loss is a function with a backward of its own: the slope is computed together with the value."""

    def value(logit, smoothing):
        class Loss(torch.autograd.Function):
            @staticmethod
            def forward(ctx, logit):
                ctx.save_for_backward(smoothing - (-logit).sigmoid())
                return (1 - smoothing) * functional.softplus(-logit) + smoothing * functional.softplus(logit)

            @staticmethod
            def backward(ctx, grad):
                return grad * ctx.saved_tensors[0]

        return Loss.apply(logit)

    return _loss(value)


@variant("weight-without-graph")
def weight_without_graph():
    """The weight sigma(-m) - epsilon is computed without a graph and multiplies the margin: the paper's gradient."""

    def value(logit, smoothing):
        weight = (smoothing - (-logit).sigmoid()).detach()
        honest = -functional.logsigmoid(logit) + smoothing * logit
        return honest.detach() + weight * (logit - logit.detach())

    return _loss(value)


# ------------------------------------------------------------------------------------------------------------ the step


@variant("backward-of-the-sum")
def backward_of_the_sum():
    """Losses are summed, and the gradient is divided by the pairs of the window at its end."""

    def accumulate(trainer, policy, window, score, recipe):
        seen = []
        for batch in window:
            scored = score(batch)
            trainer.reduce(scored.losses, 1, recipe.world_size).backward()
            seen.append(scored.detached())
        pairs = mini.added(sum(batch.pairs for batch in window))
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(pairs)
        return seen

    return _but(accumulate=accumulate)


@variant("reference-always-precomputed")
def reference_always_precomputed():
    """The reference's log-probs are computed before training, asked for or not."""

    def reference(trainer, policy, given, recipe, examples, folder):
        once = bool(examples)
        return mini.reference(trainer, policy, given, replace(recipe, precompute_reference=once), examples, folder)

    return _but(reference=reference)


# ---------------------------------------------------------------------------------------------- choices that are open


@variant("ties-are-right")
def ties_are_right():
    """The accuracy counts a tie as right."""

    def metrics(seen):
        ties = torch.cat([scored.rewards_chosen >= scored.rewards_rejected for scored in seen])
        return mini.metrics(seen) | {"rewards/accuracies": ties.double().mean().item()}

    return _but(metrics=metrics)


def _says(**promises):
    return replace(mini.MINIATURE.says, **promises)


@variant("rewards-without-beta-declared")
def rewards_without_beta_declared():
    """Rewards are logged without beta, and the documentation says so."""

    def loss(*four, objective, lengths=None):
        out = mini.loss(*four, objective=objective, lengths=lengths)
        chosen, rejected = out.rewards_chosen / objective.beta, out.rewards_rejected / objective.beta
        return replace(out, rewards_chosen=chosen, rewards_rejected=rejected)

    return _but(loss=loss, says=_says(reward_scale="one"))


@variant("ipo-by-length-declared")
def ipo_by_length_declared():
    """IPO averages log-probs over tokens, and the documentation says so."""

    def loss(*four, objective, lengths=None):
        mean = objective.kind == "ipo" and lengths is not None
        objective = replace(objective, length_normalised=True) if mean else objective
        return mini.loss(*four, objective=objective, lengths=lengths)

    return _but(loss=loss, says=_says(ipo="mean"))


@variant("micro-batches-weigh-the-same-declared")
def micro_batches_weigh_the_same_declared():
    """Uneven micro-batches weigh the same in the gradient, and the documentation says so."""

    def accumulate(trainer, policy, window, score, recipe):
        seen, parts = [], mini.added(sum(1 for batch in window if batch.pairs))
        for batch in window:
            scored = score(batch)
            trainer.reduce(scored.losses, batch.pairs * parts, recipe.world_size).backward()
            seen.append(scored.detached())
        return seen

    return _but(accumulate=accumulate, says=_says(uneven_accumulation="micro-batches"))


@variant("tokenised-apart")
def tokenised_apart():
    """Prompt and completion of a text row are tokenised apart."""

    def tokenize(text, tokenizer, row):
        if text.templated:
            return mini.tokenize(text, tokenizer, row)
        prompt = tuple(tokenizer(text.prompt)["input_ids"])

        def side(whole):
            completion = tokenizer(whole[len(text.prompt) :], add_special_tokens=False)["input_ids"]
            closed = completion[-1:] == [tokenizer.eos_token_id] or tokenizer.eos_token_id is None
            eos = () if closed else (tokenizer.eos_token_id,)
            return mini.Side((*prompt, *completion, *eos), len(prompt))

        return mini.Example(row, side(text.chosen), side(text.rejected))

    return _but(tokenize=tokenize)


@variant("text-without-bos-declared")
def text_without_bos_declared():
    """Text rows are tokenised without special tokens, and the documentation says so."""

    def tokenize(text, tokenizer, row):
        example, bos = mini.tokenize(text, tokenizer, row), (tokenizer.bos_token_id,)
        if text.templated or example.chosen.ids[:1] != bos:
            return example
        chosen, rejected = (mini.Side(side.ids[1:], side.start - 1) for side in (example.chosen, example.rejected))
        return replace(example, chosen=chosen, rejected=rejected)

    return _but(tokenize=tokenize, says=_says(bos="none"))


@variant("text-with-bos-declared")
def text_with_bos_declared():
    """Text rows start with BOS, whatever the tokenizer does by itself, and the documentation says so."""

    def tokenize(text, tokenizer, row):
        example, bos = mini.tokenize(text, tokenizer, row), (tokenizer.bos_token_id,)
        if text.templated or example.chosen.ids[:1] == bos:
            return example
        chosen, rejected = (mini.Side(bos + side.ids, side.start + 1) for side in (example.chosen, example.rejected))
        return replace(example, chosen=chosen, rejected=rejected)

    return _but(tokenize=tokenize, says=_says(bos="added"))


@variant("warm-up-from-zero")
def warm_up_from_zero():
    """Warm-up starts at a rate of zero, as Hugging Face's schedules do."""

    def update(optimizer, recipe, clock, total):
        warmup = recipe.warmup_steps
        if clock >= warmup:
            return mini.update(optimizer, recipe, clock, total)
        flat = replace(recipe, learning_rate=recipe.learning_rate * clock / warmup, schedule="constant", warmup_steps=0)
        return mini.update(optimizer, flat, clock, total)

    return _but(update=update)


def _coarse(trainer, policy, given, recipe, examples, folder):
    """The reference in bfloat16; its logits too, and log-softmax and sums of them in float32."""
    kept = mini.frozen_copy(policy) if given is None and recipe.lora is None else given
    kept = kept if kept is None else kept.to(torch.bfloat16)
    return mini.reference(trainer, policy, kept, recipe, examples, folder)


@variant("reference-in-bfloat16-declared")
def reference_in_bfloat16_declared():
    """The reference is kept in bfloat16 beside a policy that is not, and the documentation says so."""
    return _but(reference=_coarse, says=_says(reference_dtype="bfloat16"))


@variant("rate-of-the-next-step-logged")
def rate_of_the_next_step_logged():
    """The learning rate is read after the schedule has moved on: what is logged is the next step's."""

    def update(optimizer, recipe, clock, total):
        mini.update(optimizer, recipe, clock, total)
        return recipe.learning_rate * mini.factor(recipe, clock + 1, total)

    return _but(update=update)


@variant("norm-after-clipping-logged")
def norm_after_clipping_logged():
    """The gradient norm is taken after clipping."""

    def clip(parameters, limit):
        mini.clip(parameters, limit)
        return mini.clip(parameters, None)

    return _but(clip=clip)


# ------------------------------------------------------------------------------------------------------- fewer methods


@variant("trains-only")
def trains_only():
    """Of the four methods there is `train` alone."""
    honest = mini.MINIATURE
    return SimpleNamespace(train=honest.train, says=honest.says)


@variant("steps-only")
def steps_only():
    """Of the four methods there is `step` alone."""
    honest = mini.MINIATURE
    return SimpleNamespace(step=honest.step, says=honest.says)


@variant("mean-loss-only")
def mean_loss_only():
    """Of the four methods there is `loss` alone, which returns the mean and no rewards."""

    def loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, objective, lengths=None):
        four = policy_chosen, policy_rejected, reference_chosen, reference_rejected
        return mini.loss(*four, objective=objective, lengths=lengths).loss.mean()

    return SimpleNamespace(loss=loss, says=replace(mini.MINIATURE.says, reduction="mean"))
