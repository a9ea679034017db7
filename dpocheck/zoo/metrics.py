"""How are right numbers logged wrongly?  Broken parts: metrics, evaluate, and loss for the rewards it returns."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import LOSSES, STEPS, mini, specimen, torch

# ------------------------------------------------------------------------------------------------------------- rewards


def _rewarded(id, change, summary, theory, imitates=None, caught_by="LOSS-REWARDS"):
    """Declare a specimen: `change(chosen, rejected, four, beta)` in the place of the honest rewards."""

    def part(*four, objective, lengths=None):
        out = mini.loss(*four, objective=objective, lengths=lengths)
        values = [logps.detach() for logps in four]
        chosen, rejected = change(out.rewards_chosen, out.rewards_rejected, values, objective.beta)
        return replace(out, rewards_chosen=chosen, rewards_rejected=rejected)

    specimen(id, part="loss", caught_by=caught_by, theory=theory, imitates=imitates, at=LOSSES, summary=summary)(part)


_rewarded(
    "rewards-without-beta",
    lambda c, r, four, beta: (c / beta, r / beta),
    "Rewards are logged without beta, though the documentation promises beta times the log-ratio.",
    PAPER.but(reward_scale="one"),
    caught_by="METRIC-REWARDS",
)
_rewarded(
    "rewards-with-beta-twice",
    lambda c, r, four, beta: (c * beta, r * beta),
    "Rewards are multiplied by beta twice.",
    PAPER.but(reward_scale="squared"),
)
_rewarded(
    "rewards-swapped",
    lambda c, r, four, beta: (r, c),
    "The rewards of chosen and rejected are exchanged.",
    PAPER.but(rewards="swapped"),
)
_rewarded(
    "rewards-of-the-policy-alone",
    lambda c, r, four, beta: (beta * four[0], beta * four[1]),
    "Rewards leave the reference out.",
    PAPER.but(rewards="policy-only"),
)
_rewarded(
    "rewards-add-the-reference",
    lambda c, r, four, beta: (beta * (four[0] + four[2]), beta * (four[1] + four[3])),
    "The reference is added in the rewards, not subtracted.",
    PAPER.but(rewards="sum"),
)
_rewarded(
    "rewards-clipped",
    lambda c, r, four, beta: (c.clamp(-5, 5), r.clamp(-5, 5)),
    "Rewards are clipped at 5.",
    PAPER.but(rewards="clipped"),
    caught_by="METRIC-REWARDS",
)
_rewarded(
    "rewards-doubled",
    lambda c, r, four, beta: (3 * c, 3 * r),
    "Rewards are added once for each of three losses.",
    None,
    "huggingface/trl#2544",
    "METRIC-REWARDS",
)

# ------------------------------------------------------------------------------------------------- one window's metrics


@specimen("window-cut-to-its-last-batch", part="metrics", caught_by="METRIC-WINDOW")
def window_cut_to_its_last_batch(seen):
    """Of each micro-batch of a window only as many pairs are logged as the last one has; the loss is right."""
    kept = len(seen[-1].losses)
    cut = [mini.Scored(*(getattr(s, f.name)[:kept] for f in dataclasses.fields(mini.Scored))) for s in seen]
    return mini.metrics(cut) | {"loss": mini.metrics(seen)["loss"]}


def _pairs(seen):
    """All pairs of a window, field by field, in float64."""
    return mini.Scored(
        *(torch.cat([getattr(s, f.name) for s in seen]).double() for f in dataclasses.fields(mini.Scored))
    )


def _logs(id, change, summary, caught_by, theory=None, imitates=None, at=STEPS):
    """Declare a specimen: `change(pairs)` gives the per-pair values that replace honest metrics, by name."""

    def part(seen):
        wrong = {name: values.double().mean().item() for name, values in change(_pairs(seen)).items()}
        return mini.metrics(seen) | wrong

    specimen(id, part="metrics", caught_by=caught_by, theory=theory, imitates=imitates, at=at, summary=summary)(part)


_logs(
    "margin-is-the-sum",
    lambda p: {"rewards/margins": p.rewards_chosen + p.rewards_rejected},
    "The margin is the sum of the rewards.",
    "METRIC-MARGIN",
    PAPER.but(margin="sum"),
)
_logs(
    "margin-is-absolute",
    lambda p: {"rewards/margins": (p.rewards_chosen - p.rewards_rejected).abs()},
    "The margin is an absolute value.",
    "METRIC-MARGIN",
    PAPER.but(margin="absolute"),
)
_logs(
    "margin-without-reference",
    lambda p: {"rewards/margins": p.policy_chosen - p.policy_rejected},
    "The margin is of the policy's log-probs.",
    "METRIC-MARGIN",
)
_logs(
    "accuracy-upside-down",
    lambda p: {"rewards/accuracies": p.rewards_chosen < p.rewards_rejected},
    "The accuracy counts the pairs that are ranked wrongly.",
    "METRIC-ACCURACY",
    PAPER.but(accuracy="less"),
)
_logs(
    "accuracy-of-log-probs",
    lambda p: {"rewards/accuracies": p.policy_chosen > p.policy_rejected},
    "The accuracy compares log-probs, not rewards.",
    "METRIC-ACCURACY",
    PAPER.but(accuracy="logps"),
)
_logs(
    "accuracy-of-positive-rewards",
    lambda p: {"rewards/accuracies": p.rewards_chosen > 0},
    "The accuracy counts positive rewards of chosen completions.",
    "METRIC-ACCURACY",
    PAPER.but(accuracy="positive"),
)
_logs(
    "accuracy-of-the-mean-rewards",
    lambda p: {"rewards/accuracies": (p.rewards_chosen.mean() > p.rewards_rejected.mean()).reshape(1)},
    "The accuracy compares the batch's mean rewards, so that it is 0 or 1.",
    "METRIC-ACCURACY",
    None,
    "mlx-lm-lora 5.10.2",
)
_logs(
    "log-probs-swapped",
    lambda p: {"logps/chosen": p.policy_rejected, "logps/rejected": p.policy_chosen},
    "The logged log-probs of chosen and rejected are exchanged.",
    "METRIC-LOGPS",
    PAPER.but(logps_logged="swapped"),
    "hiyouga/LLaMA-Factory#6050",
)
_logs(
    "log-probs-of-the-reference",
    lambda p: {"logps/chosen": p.reference_chosen, "logps/rejected": p.reference_rejected},
    "The reference's log-probs are logged as the policy's.",
    "METRIC-LOGPS",
    PAPER.but(logps_logged="reference"),
)

# ------------------------------------------------------------------------------------------- metrics over micro-batches


def _window(id, change, names, summary, theory=None, imitates=None, caught_by="METRIC-REWARDS"):
    """Declare a specimen: `change(list of each micro-batch's value)` for the metrics of those names ("" is all)."""

    def part(seen):
        honest = mini.metrics(seen)
        each = [mini.metrics([scored]) for scored in seen]
        return honest | {n: change([one[n] for one in each]) for n in honest if n.startswith(names)}

    specimen(id, part="metrics", caught_by=caught_by, theory=theory, imitates=imitates, summary=summary)(part)


_REWARDS = ("rewards", "logps")
_window(
    "metrics-of-the-last-micro-batch",
    lambda values: values[-1],
    _REWARDS,
    "Rewards and log-probs are logged for the last micro-batch of a step only.",
    PAPER.but(window_metrics="last"),
    "pytorch/torchtune@0.6.1",
)
_window(
    "metrics-summed",
    sum,
    _REWARDS,
    "Rewards and log-probs are summed over the micro-batches of a step: accuracies above 1.",
    PAPER.but(window_metrics="sum"),
    "ByteDance-Seed/VeOmni#1130",
)
_window(
    "loss-of-the-last-micro-batch",
    lambda values: values[-1],
    "loss",
    "The logged loss is the last micro-batch's.",
    PAPER.but(loss_logged="last"),
    caught_by="METRIC-LOSS",
)
_window(
    "loss-summed",
    sum,
    "loss",
    "The logged loss is summed over the micro-batches of a step.",
    PAPER.but(loss_logged="sum"),
    caught_by="METRIC-LOSS",
)
_window(
    "loss-divided-twice",
    lambda values: sum(values) / len(values) ** 2,
    "loss",
    "The logged loss is divided by the number of micro-batches twice.",
    PAPER.but(loss_logged="divided-twice"),
    caught_by="METRIC-LOSS",
)

# ---------------------------------------------------------------------------------------------------------- evaluation


def _batch_means(trainer, score, batches):
    with torch.no_grad():
        seen = [score(batch) for batch in batches]
    honest = trainer.metrics(seen)
    each = [trainer.metrics([scored]) for scored in seen]
    return honest, {name: sum(one[name] for one in each) / len(each) for name in honest}


@specimen(
    "evaluation-averages-batches",
    part="evaluate",
    caught_by="EVAL-BATCH",
    theory=PAPER.but(eval_metrics="batches"),
    imitates="huggingface/trl#7045",
)
def evaluation_averages_batches(trainer, policy, score, batches):
    """Evaluation metrics other than the loss are means of batch means: a short last batch counts too much."""
    honest, means = _batch_means(trainer, score, batches)
    return means | {"loss": honest["loss"]}


@specimen(
    "evaluation-loss-averages-batches",
    part="evaluate",
    caught_by="EVAL-BATCH",
    theory=PAPER.but(eval_loss="batches"),
    imitates="OpenRLHF/OpenRLHF#1336",
)
def evaluation_loss_averages_batches(trainer, policy, score, batches):
    """The evaluation loss is a mean of batch means."""
    honest, means = _batch_means(trainer, score, batches)
    return honest | {"loss": means["loss"]}


@specimen(
    "evaluation-drops-the-tail",
    part="evaluate",
    caught_by="EVAL-BATCH",
    theory=PAPER.but(eval_tail="dropped"),
    imitates="OpenRLHF/OpenRLHF#1332",
)
def evaluation_drops_the_tail(trainer, policy, score, batches):
    """A short last evaluation batch is dropped."""
    full = [batch for batch in batches if batch.pairs == batches[0].pairs]
    return mini.evaluate(trainer, policy, score, full)


@specimen("evaluation-counts-filled-up-rows", part="evaluate", caught_by="EVAL-BATCH", imitates="huggingface/trl#6943")
def evaluation_counts_filled_up_rows(trainer, policy, score, batches):
    """A short last evaluation batch is filled up with rows of the first, and the copies are counted."""
    with torch.no_grad():
        seen = [score(batch) for batch in batches]
    missing = batches[0].pairs - batches[-1].pairs
    names = [field.name for field in dataclasses.fields(seen[0])]
    copies = type(seen[0])(*(getattr(seen[0], name)[:missing] for name in names))
    return trainer.metrics([*seen, copies] if missing else seen)


@specimen("evaluation-casts-the-policy", part="evaluate", caught_by="EVAL-PURE")
def evaluation_casts_the_policy(trainer, policy, score, batches):
    """For evaluation the policy is cast to bfloat16 and back: training goes on with rounded weights."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return mini.evaluate(trainer, policy, score, batches)


@specimen("evaluation-leaves-gradients", part="evaluate", caught_by="EVAL-PURE")
def evaluation_leaves_gradients(trainer, policy, score, batches):
    """The evaluation loss is differentiated and its gradient left for the next step."""
    seen = []
    for batch in batches:
        scored = score(batch)
        (scored.losses.sum() / sum(b.pairs for b in batches)).backward()
        seen.append(scored.detached())
    return trainer.metrics(seen)


@specimen("evaluation-without-reference", part="evaluate", caught_by="EVAL-VALUE", imitates="huggingface/trl#6434")
def evaluation_without_reference(trainer, policy, score, batches):
    """In evaluation the policy is its own reference: the loss is log 2 and the rewards are 0."""

    def itself(batch):
        scored = score(batch)
        same = {"reference_chosen": scored.policy_chosen, "reference_rejected": scored.policy_rejected}
        zero = torch.zeros_like(scored.losses)
        losses = zero + 0.6931471805599453
        return replace(scored, losses=losses, rewards_chosen=zero, rewards_rejected=zero, **same)

    return mini.evaluate(trainer, policy, itself, batches)
