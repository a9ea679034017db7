"""Which single mistakes are known, and how does a report word them?

Each is one change of the paper (`theory.fault`).  `CHOICES` words, in the same way, the alternatives that the sources
leave open (`theory.CONVENTIONS`).
"""

from __future__ import annotations

from dpocheck.oracle.theory import FAULTS, PAPER, Theory, fault


def _rows_and_tokens() -> None:
    fault("chosen and rejected swapped", columns="swapped")
    fault("batch laid out in halves but read as alternating rows", pairing="interleaved")
    fault("rejected completion of another pair", pairing="rolled")
    fault("EOS appended twice", eos="twice")
    fault("EOS appended to text that ends with it", eos="always")
    fault("EOS between prompt and completion, none at the end", eos="between")
    fault("EOS after the prompt, none at the end", eos="after-prompt")
    fault("white space at the ends of completions removed", spaces="stripped")
    fault("one space put between prompt and completion, white space at their ends removed", spaces="one-between")
    fault("EOS appended after the chat template's own", template_eos="twice")
    fault("BOS inside the completion", bos="inside")
    fault("BOS twice", bos="twice")
    fault("completion loses tokens where the prompt merges into it", boundary="cut")
    fault("implicit prompt cut at the last index compared", prefix="loses-shared")
    fault("truncation not applied", truncation="none")
    fault("of rows with one prompt only the first kept", repeated_prompts="first")


def _positions() -> None:
    names = {
        "prompt": "counts the prompt's tokens",
        "last-prompt": "counts the last prompt token",
        "no-first": "does not count the completion's first token",
        "no-eos": "does not count EOS",
        "eos-twice": "counts EOS twice",
        "last-only": "counts the last token only",
        "padding": "counts padding",
        "padding-by-side": "counts padding, each side padded to its own longest row",
        "one-pad": "counts one pad",
        "no-pad-id": "does not count tokens that have the pad's id",
        "no-zero-id": "does not count token id 0",
        "unshifted": "labels not shifted",
        "unshifted-padding": "labels not shifted, and everything after the prompt counted",
        "unshifted-all": "labels not shifted, and the whole row counted",
        "shifted-back": "labels shifted the wrong way",
        "double-shift": "labels shifted twice",
        "mask-unshifted": "labels shifted, mask not",
        "chosen-mask": "rejected rows under the chosen rows' mask",
        "longest-loses-last": "the longest row of a batch loses its last token",
    }
    for value, name in names.items():
        fault(name, counted=value)
    for value in ("prompt", "last-prompt", "no-first", "no-eos", "eos-twice", "last-only", "padding", "double-shift"):
        fault(f"reference only: {names[value]}", counted_reference=value)
    fault("attends to padding", attention="pads")
    fault("all positions equal", attention="equal-positions")
    fault("positions counted backwards", attention="backwards")
    fault("attends to later tokens", attention="future")


def _logps() -> None:
    fault("mean over tokens instead of sum", logps="mean")
    fault("mean over padded length instead of sum", logps="mean-padded")
    fault("mean over all tokens of the batch instead of sum", logps="mean-batch")
    fault("reference only: mean over tokens instead of sum", logps_reference="mean")
    fault("logits not normalised", normaliser="none")
    fault("logits less their maximum, not normalised", normaliser="max")
    fault("probabilities instead of log-probs", normaliser="prob")
    fault("log-probs to base 2", normaliser="log2")
    fault("log-prob of the likeliest token instead of the label", normaliser="argmax")
    fault("log-probs with the sign of a cross-entropy", normaliser="negated")
    fault("temperature 2", temperature=2.0)
    fault("temperature 1/2", temperature=0.5)
    fault("token log-probs clamped at -3", token_floor=-3.0)


def _reference() -> None:
    fault("trains the checkpoint on disk, not the model it was given", policy="disk")
    fault("reference is the policy at the start, not the one given", reference="policy-start")
    fault("reference is the live policy", reference="policy-live")
    fault("reference is the live policy, with its gradient", reference="policy-graph")
    fault("reference is the checkpoint on disk, not the model it was given", reference="disk")
    fault("no reference", reference="none")
    fault("reference log-probs of chosen and rejected swapped", reference="swapped")
    fault("reference log-probs of another pair", reference="rolled")
    fault("reference log-probs averaged over the batch", reference="batch-mean")
    fault("reference copied from the policy at every step", reference_moves=1.0)
    fault("reference moves towards the policy", reference_moves=0.1)
    fault("reference log-probs of an earlier run", cache="stale")
    fault("cached reference log-probs indexed by position in the batch", cache="batch-position")
    fault("cached reference log-probs rounded to bfloat16", cache="bfloat16")


def _logit() -> None:
    for kind in ("sigmoid", "robust", "hinge", "ipo", "simpo"):
        fault(f"{kind} loss whatever was asked for", kind=kind)
    for name, coefficients in {
        "policy's rejected log-prob is added where it should be subtracted": (1.0, 1.0, -1.0, 1.0),
        "reference's rejected log-prob is added where it should be subtracted": (1.0, -1.0, -1.0, -1.0),
        "policy's chosen and rejected swapped": (-1.0, 1.0, -1.0, 1.0),
        "reference log-ratio added instead of subtracted": (1.0, -1.0, 1.0, -1.0),
        "sign of the logit flipped": (-1.0, 1.0, 1.0, -1.0),
        "policy's log-ratio left out": (0.0, 0.0, -1.0, 1.0),
        "reference's log-ratio left out of the loss": (1.0, -1.0, 0.0, 0.0),
        "rejected completion left out": (1.0, 0.0, -1.0, 0.0),
        "chosen completion left out": (0.0, -1.0, 0.0, 1.0),
        "reference of rejected left out": (1.0, -1.0, -1.0, 0.0),
        "reference of chosen left out": (1.0, -1.0, 0.0, 1.0),
        "policy's rejected left out": (1.0, 0.0, -1.0, 1.0),
        "policy's chosen left out": (0.0, -1.0, -1.0, 1.0),
    }.items():
        fault(name, coefficients=coefficients)
    fault("beta ignored", beta_power=0.0)
    fault("beta twice", beta_power=2.0)
    fault("1/beta for beta", beta_power=-1.0)
    fault("beta halved", beta_scale=0.5)
    fault("beta doubled", beta_scale=2.0)
    fault("beta fixed at 0.1", beta_fixed=0.1)
    fault("beta on the policy's log-ratio only", beta_on="policy")
    fault("beta outside the logarithm", beta_on="outside")
    fault("beta inside and outside the logarithm", beta_on="both")
    fault("loss divided by beta", beta_on="divided")
    fault("target margin of 0.5 subtracted", offset=-0.5)
    fault("0.1 added to the logit", offset=0.1)
    fault("logit clamped at 10", clamp=10.0)
    fault("logit clamped at 1", clamp=1.0)
    fault("length normalisation ignored", normalised="ignored")
    fault("log-probs per token though not asked for", normalised="always")
    fault("target margin gamma ignored", gamma="ignored")
    fault("margins less their batch mean", margins="centred")
    fault("margins divided by their batch deviation", margins="standardised")
    fault("policy and reference log-ratios broadcast against each other", margins="broadcast")


def _curve() -> None:
    fault("label smoothing ignored", smoothing="ignored")
    fault("label smoothing of rDPO for that of cDPO", smoothing="robust")
    fault("label smoothing: e and 1-e swapped", smoothing="swapped")
    fault("label smoothing: e subtracted and not divided by 1-2e", smoothing="minus")
    fault("label smoothing halved", smoothing="half")
    fault("label smoothing without the weight 1-e", smoothing="unnormalised")
    fault("label smoothing 0.1 though not asked for", smoothing_default=0.1)
    for link, name in {
        "sigmoid": "1 - sigmoid, no logarithm", "minus-sigmoid": "-sigmoid, no logarithm",
        "logsigmoid-positive": "sign of the loss flipped", "exp": "exponential loss", "linear": "linear loss",
        "focal": "further factor sigmoid(-m)", "tanh": "logit squashed by tanh", "abs": "absolute value of the margin",
        "naive": "log of sigmoid, underflows",
        "log2": "logarithm to base 2",
    }.items():  # fmt: skip
        fault(name, link=link)
    for added in ("1e-8", "1e-5", "1e-6", "1e-7", "1e-9", "1e-10", "1e-12"):
        fault(f"{added} added inside the logarithm", epsilon=float(added))
    fault("IPO of beta times the log-ratios", ipo="beta-inside")
    fault("IPO times beta squared", ipo="beta-squared")
    fault("IPO's target without the half", ipo="no-half")
    fault("sign of the divergence's f' flipped", derivative="negated")
    fault("divergence of 1/u instead of u", derivative="inverted")
    fault("divergence: u for 1/u, and the sign flipped", derivative="mirrored")
    fault("alpha divergence with 1 - alpha for alpha", alpha="one-minus")
    fault("alpha divergence at 1/2 whatever was asked for", alpha_fixed=0.5)
    fault("loss halved", scale=0.5)
    fault("loss doubled", scale=2.0)
    fault("SFT term ignored", sft="ignored")
    fault("SFT weight on the preference term", sft="replaces")
    fault("SFT term summed over tokens", sft_mean="sum")
    fault("undeclared SFT term, weight 0.1", sft_extra=0.1)
    fault("undeclared SFT term, weight 1", sft_extra=1.0)
    fault("undeclared KL term, weight 0.05", kl_extra=0.05)


def _gradient() -> None:
    fault("no gradient reaches the policy: nothing is learned", gradient_scale=0.0)
    fault("gradient halved, loss right", gradient_scale=0.5)
    fault("gradient a tenth, loss right", gradient_scale=0.1)
    fault("gradient doubled, loss right", gradient_scale=2.0)
    fault("no gradient through the chosen log-prob", detached="chosen")
    fault("no gradient through the rejected log-prob", detached="rejected")
    fault("gradient weight constant", weight="half")
    for value, name in {
        "rows": "divided by rows, not by pairs", "plus-one": "divided by pairs plus one", "first": "first pair only",
        "no-last": "last pair left out", "max": "greatest loss only", "median": "median loss only",
        "nonzero": "mean over losses that are not zero", "tokens": "pairs weighted by their tokens",
    }.items():  # fmt: skip
        fault(name, reduction=value)


def _steps() -> None:
    fault("gradient times the number of accumulation steps", accumulation="sum")
    fault("gradient divided by the number of accumulation steps twice", accumulation="twice")
    fault("last micro-batch only", accumulation="last")
    fault("accumulation ignored: each micro-batch is a step", accumulation="steps")
    fault("an update after each micro-batch", accumulation="updates")
    fault("an incomplete window divided as if it were full", incomplete_window="full-divisor")
    fault("an incomplete window divided as if it were full, and the run ended after as many steps as whole windows",
          incomplete_window="full-divisor-ended")  # fmt: skip
    fault("gradients of an incomplete window added to the next epoch's first", incomplete_window="carried")
    fault("last batch padded with the first pairs", last_batch="padded")
    fault("rows repeated until every process has as many", ranks_tail="repeated")
    fault("last batch kept though it should be dropped", last_batch="always-kept")
    fault("first row of each epoch left out", first_row="dropped")
    fault("clipped before the loss scale of 1024 is divided out", clip_scale=2.0**-10)
    fault("clipping ignored", clip="ignored")
    fault("clipped per micro-batch", clip="micro")
    fault("clipped by value, not by norm", clip="value")
    fault("always scaled to the clipping norm", clip="always")
    fault("gradient ascent", update=-1.0)
    fault("step halved", update=0.5)
    fault("step doubled", update=2.0)
    fault("gradients of earlier steps not cleared", stale="kept")
    fault("undeclared weight decay, 0.01", weight_decay_extra=0.01)
    fault("undeclared momentum, 0.9", momentum_extra=0.9)
    fault("constant learning rate whatever was asked for", schedule="constant")
    fault("linear learning rate whatever was asked for", schedule="linear")
    fault("cosine learning rate whatever was asked for", schedule="cosine")
    fault("schedule moves per micro-batch", schedule="micro-step")
    fault("warm-up ignored", first_rate="skipped")
    fault("resumes at the first row", resume="data-restarts")
    fault("resumes with the schedule at its start", resume="schedule-restarts")
    fault("resumes without the optimizer's state", resume="momentum-lost")
    fault("resumes with the checkpoint as reference", resume="reference-from-checkpoint")
    fault("resumes one batch too far", resume="skips-batch")
    fault("resumes from weights rounded to bfloat16", resume="weights-bfloat16")


def _metrics() -> None:
    fault("rewards with beta twice", reward_scale="squared")
    for value, name in {
        "swapped": "rewards of chosen and rejected swapped", "policy-only": "rewards without the reference",
        "sum": "rewards add the reference", "clipped": "rewards clipped at 5",
    }.items():  # fmt: skip
        fault(name, rewards=value)
    for value, name in {
        "sum": "margin is the sum of the rewards", "absolute": "margin is an absolute value",
        "policy": "margin without the reference",
    }.items():  # fmt: skip
        fault(name, margin=value)
    for value, name in {
        "less": "accuracy counts the wrong order", "logps": "accuracy of log-probs, not of rewards",
        "positive": "accuracy counts positive chosen rewards",
    }.items():  # fmt: skip
        fault(name, accuracy=value)
    fault("logps of chosen and rejected swapped in the log", logps_logged="swapped")
    fault("reference logps in the log", logps_logged="reference")
    fault("metrics of the last micro-batch only", window_metrics="last")
    fault("metrics summed over micro-batches", window_metrics="sum")
    fault("loss of the last micro-batch only in the log", loss_logged="last")
    fault("loss summed over micro-batches in the log", loss_logged="sum")
    fault("loss divided by the accumulation steps twice in the log", loss_logged="divided-twice")
    fault("evaluation metrics are an unweighted mean of batch means", eval_metrics="batches")
    fault("evaluation loss is an unweighted mean of batch means", eval_loss="batches")
    fault("last evaluation batch left out", eval_tail="dropped")


for _register in (
    _rows_and_tokens, _positions, _logps, _reference, _logit, _curve, _gradient, _steps, _metrics,
):  # fmt: skip
    _register()

# The allowed alternatives to `PAPER`, each one change: name -> the theory.
CHOICES: dict[str, Theory] = {
    "no EOS is appended to a text completion": PAPER.but(eos="none"),
    "EOS is appended where the chat template writes none": PAPER.but(template_eos="ensured"),
    "no BOS, though the tokenizer adds one": PAPER.but(bos="none"),
    "BOS, though the tokenizer adds none": PAPER.but(bos="added"),
    "prompt and completion tokenised apart": PAPER.but(boundary="apart"),
    "truncation keeps the start": PAPER.but(truncation="keep_start"),
    "truncation keeps the end": PAPER.but(truncation="keep_end"),
    "truncation drops the row": PAPER.but(truncation="drop"),
    "the last token kept is turned into EOS": PAPER.but(eos_cut="restored"),
    "IPO on log-probs per token": PAPER.but(ipo_length="mean"),
    "SimPO's gamma is a ratio to beta": PAPER.but(gamma="gamma-beta"),
    "SFT term averaged over all tokens of a batch": PAPER.but(sft_mean="tokens"),
    "sum over pairs": PAPER.but(reduction="sum"),
    "every pair weighs the same in an uneven window": PAPER.but(uneven="pairs"),
    "an incomplete window is dropped": PAPER.but(incomplete_window="dropped"),
    "an incomplete batch is dropped": PAPER.but(last_batch="dropped"),
    "weight decay is added to the gradient": PAPER.but(decay="coupled"),
    "weight decay acts on the final norm too": PAPER.but(decay="all"),
    "warm-up starts at rate 0": PAPER.but(first_rate="zero"),
    "warm-up ends one step after its last": PAPER.but(first_rate="shifted"),
    "rewards without beta": PAPER.but(reward_scale="one"),
    "rewards of summed log-probs": PAPER.but(reward_logps="sum"),
    "a tie counts as right": PAPER.but(accuracy="greater-equal"),
    "a tie counts as half": PAPER.but(accuracy="half"),
    "logps per token in the log": PAPER.but(logps_logged="mean"),
    "every pair weighs the same in the metrics of an uneven window": PAPER.but(uneven_metrics="pairs"),
    "the gradient's norm after clipping in the log": PAPER.but(norm_logged="clipped"),
    "the next step's learning rate in the log": PAPER.but(rate_logged="next"),
}


def words(theory: Theory) -> str:
    """The name of a fault or an allowed choice; where it has none, the fields that differ from the paper."""
    for name, known in (*FAULTS.items(), *CHOICES.items()):
        if known == theory:
            return name
    return ", ".join(f"{field.replace('_', ' ')} {value}" for field, value in theory.differs().items())
