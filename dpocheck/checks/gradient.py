"""Does the gradient of the batch equal the sigmoid-weighted difference of SFT gradients, token by token?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, agree, check, labels, scene
from dpocheck.checks import draws, scenes
from dpocheck.experiment import Body, Objective, Pair, StepExperiment
from dpocheck.oracle import optimum
from dpocheck.oracle.theory import PAPER

SOURCE = "Rafailov et al. 2023, section 4, 'What does the DPO update do?'"
SIX = scenes.step(scenes.rectangular(6))
RAGGED = scenes.step(scenes.ragged(), body=Body("clock"))


@check(
    "GRAD-IDENTITY", chapter="gradient", stage="gradient", level="must", needs={"step.gradient"},
    draw=draws.steps(rectangular=True),
    scenes=[scene("six pairs, policy away from the reference", SIX)],
    rivals=(PAPER.but(reference="none"), PAPER.but(beta_power=2.0), PAPER.but(logps="mean")),
    claim="The gradient is -beta * sigma(-m) * (grad log pi(y_w) - grad log pi(y_l)), averaged over the pairs.",
    source=SOURCE, covers=("STEP-GRAD", "STEP-SGD", "STEP-PAIR-LINEAR", "GRAD-SWAP", "GRAD-COLLIN"),
    why="Everything that training does, it does through this gradient.",
    bug="mlx-lm-lora 0.7.0 to 0.8.4: the policy ran outside value_and_grad, and nothing was learned.",
    fix="Follow the first earlier check that fails: log-probs, reference, loss, reduction.",
)  # fmt: skip
def identity(case: Case) -> Comparison:
    return agree(case, "gradient")


@check(
    "GRAD-START", chapter="gradient", stage="gradient", level="must", needs={"step.gradient"},
    scenes=[scene("six pairs, reference = policy", replace(SIX, reference=SIX.policy))],
    rivals=(PAPER.but(sft_extra=0.1), PAPER.but(offset=0.5)),
    claim="Where policy and reference are equal, the gradient is -beta / 2 times the difference of SFT gradients.",
    source=SOURCE, covers=("INIT-GRAD", "STEP-FIXED-TIE", "GRAD-SWAP-FREE"),
    why="The first step of every run.", bug="An undeclared SFT term shows here as a gradient along log pi(y_w) alone.",
    fix="Add no term that was not asked for.",
)  # fmt: skip
def start(case: Case) -> Comparison:
    return agree(case, "gradient")


@check(
    "GRAD-TOKENS", chapter="gradient", stage="mask", level="must", needs={"step.gradient"},
    draw=draws.steps(),
    scenes=[scene("five pairs of unequal lengths", RAGGED, family="ragged")],
    rivals=(PAPER.but(counted="no-eos"), PAPER.but(counted="no-first")),
    claim="Gradient reaches exactly the positions that predict completion tokens, EOS included.",
    source="the autoregressive factorisation", covers=("LOGP-GRAD-SUPPORT", "RUN-TOK-EOS", "STEP-PAD"),
    why="A token that is not scored is not learned; a pad that is scored is.",
    bug="TRL 0.12: the longest row of a padded batch lost its last token, the EOS.",
    fix="Build the mask from positions, beside the ids, before anything is cut or padded.",
)  # fmt: skip
def tokens(case: Case) -> Comparison:
    seen, paper = case.observed[0].gradient, case.predicted().gradient
    limit = np.broadcast_to(np.asarray(case.bound("gradient")), paper.shape)
    missing = (np.abs(paper) > 4 * limit) & (np.abs(seen) <= limit)
    extra = (np.abs(paper) == 0) & (np.abs(seen) > limit)
    if not (missing | extra).any():
        return Comparison("pass", error=0.0, bound=float(limit.max()))
    with np.errstate(divide="ignore", invalid="ignore"):
        wrong = np.where(missing | extra, np.abs(seen - paper) / limit, 0.0)
    cell = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    return Comparison(
        "fail", error=float(abs(seen[cell] - paper[cell])), bound=float(limit[cell]), observed=float(seen[cell]),
        expected=float(paper[cell]),
        where=f"{labels(case.experiments[0], 'gradient')(tuple(int(i) for i in cell))}; "
        f"{int(missing.sum())} cells without the gradient due, {int(extra.sum())} with one that is not",
    )  # fmt: skip


@check(
    "GRAD-RAGGED", chapter="gradient", stage="gradient", level="must", needs={"step.gradient"},
    draw=draws.steps((2, 3, 5, 6)),
    scenes=[
        scene("five pairs of unequal lengths", RAGGED, family="ragged"),
        scene("five pairs of unequal lengths, padded on the left", replace(RAGGED, padding="left"), family="left pad"),
    ],
    rivals=(PAPER.but(logps="mean"), PAPER.but(counted="longest-loses-last"), PAPER.but(reduction="tokens")),
    claim="The gradient is right where prompts and completions have unequal lengths.", source=SOURCE,
    covers=("STEP-PAD-L", "STEP-LOSS"), why="Real batches are ragged; padding bugs hide in rectangular ones.",
    bug="OpenRLHF once padded on the left under a mask built for the right.",
    fix="Weigh pairs equally, whatever their lengths; mask by position.",
)  # fmt: skip
def ragged(case: Case) -> Comparison:
    return agree(case, "gradient")


@check(
    "GRAD-ATTENTION", chapter="gradient", stage="gradient", level="must", needs={"step.attended"},
    draw=draws.steps(body="clock"),
    scenes=[
        scene("five pairs of unequal lengths", RAGGED, family="ragged"),
        scene("the same, padded on the left", replace(RAGGED, padding="left"), family="left pad"),
    ],
    claim="Each scored position attends to its own row's real tokens before it, at their right relative positions.",
    source="causal self-attention over the row", covers=("LOGP-PAD-L", "LOGP-PACK", "LOGP-CAUSAL", "RUN-TOK-BOS"),
    why="A missing attention mask, a leak between packed rows or shifted positions change every real model.",
    bug="LLaMA-Factory v1: the rejected completion attends to the chosen one in the same row.",
    fix="Pass the attention mask, and position ids that follow it.",
)  # fmt: skip
def attention(case: Case) -> Comparison:
    return agree(case, "attended")


STRENGTHS = (1, 2, 3, 6)
START = (0.5, -0.75, 0.25, -1.125)


def bradley_terry(
    beta: float, at_optimum: bool, logits: tuple[float, ...] = START
) -> tuple[StepExperiment, np.ndarray]:
    """One prompt, four completions of integer strengths, each compared with each as often as they say.

    The empirical DPO minimiser of the table is exactly pi* ~ pi_ref * w^(1/beta) (Rafailov et al. 2023, Eq. 4 with
    r = log w).  `logits`: the reference's.  Returns the step on all 36 rows and the log of pi* over the four.
    """
    eos, pad = scenes.WORDS.eos, scenes.WORDS.pad
    pairs = []
    for a in range(4):
        for b in range(4):
            if a != b:
                pairs += [Pair((0,), (1 + a, eos), (1 + b, eos))] * STRENGTHS[a]
    reference = _completions(np.array(logits))
    node = optimum(reference, 0, {(1 + i, eos): w for i, w in enumerate(STRENGTHS)}, beta).nodes[0]
    best = np.array([node[1 + i] for i in range(4)])
    policy = _completions(best) if at_optimum else reference
    step = StepExperiment(policy, reference, tuple(pairs), Objective(beta=beta), pad=pad, eos=eos)
    return step, best


def _completions(logits: np.ndarray) -> scenes.Table:
    certain = tuple((1 + i, scenes.WORDS.eos, 0.0) for i in range(4))
    return scenes.Table(64, scenes.NEVER, tuple((0, 1 + i, float(x)) for i, x in enumerate(logits)) + certain)


@check(
    "GRAD-OPTIMUM", chapter="gradient", stage="gradient", level="must", needs={"step.gradient"},
    scenes=[scene("36 comparisons of four completions, policy at the closed-form optimum",
                  bradley_terry(0.5, True)[0], family="optimum")],
    rivals=(PAPER.but(beta_power=2.0), PAPER.but(sft_extra=0.1)),
    claim="At the closed-form optimum pi* ~ pi_ref * exp(r / beta) the gradient is zero.",
    source="Rafailov et al. 2023, Eq. 4 and 7", covers=("STEP-FIXED-OPT", "RUN-FIXED"),
    why="A trainer whose gradient does not vanish there optimises something else.",
    bug="beta applied twice moves the optimum to pi_ref * w^(1/beta^2).", fix="Follow the earlier checks.",
)  # fmt: skip
def zero_at_optimum(case: Case) -> Comparison:
    return agree(case, "gradient")
