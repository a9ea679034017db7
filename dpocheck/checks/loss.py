"""Does the loss of four log-probs equal -log sigma(beta * h), in value, in slope, and at the edges?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpocheck.check import Case, Comparison, agree, check, close, equal, scene, worst
from dpocheck.checks import draws
from dpocheck.experiment import LossExperiment, Objective
from dpocheck.oracle.theory import PAPER

EQ7 = "Rafailov et al. 2023, Eq. 7"
HALF = Objective(beta=0.5)

# Five pairs: margins on both sides of zero, beyond +1 and -1, chosen above and below rejected; no number twice.
ORDINARY = LossExperiment(
    (-3.5, -6.25, -2.75, -9.5, -4.125), (-6.0, -4.75, -2.25, -12.875, -7.625),
    (-4.0, -3.625, -5.375, -8.25, -4.875), (-5.0, -5.5, -1.875, -6.75, -8.75), HALF,
)  # fmt: skip
# The worked example: log-ratios +0.5 and -1, rewards +0.25 and -0.5, margin 0.75, loss 0.3868.
SINGLE = LossExperiment((-3.5,), (-6.0,), (-4.0,), (-5.0,), HALF)
CANCELLING = LossExperiment((-4999.5, -5000.25), (-5001.0, -4998.75), (-5000.0, -4999.0), (-5001.25, -4997.0), HALF)
NEAR = LossExperiment((-7.125, -3.0), (-2.5, -8.625), (-7.1240234375, -3.0009765625), (-2.5, -8.6240234375), HALF)


def at(margins: tuple[float, ...], beta: float = 0.5) -> LossExperiment:
    """Pairs with the given margins beta * h, all log-probs negative."""
    h = [margin / beta for margin in margins]
    chosen = tuple(-2.0 - max(-x, 0.0) for x in h)
    rejected = tuple(-3.0 - max(x, 0.0) for x in h)
    flat = len(margins)
    return LossExperiment(chosen, rejected, (-2.0,) * flat, (-3.0,) * flat, Objective(beta=beta))


def values(case: Case, index: int = 0) -> Comparison:
    """The losses of the pairs, and what the batch is reduced to."""
    return worst([agree(case, "per_pair", index), agree(case, "reduced", index)])


@check(
    "LOSS-VALUE", chapter="loss", stage="loss", level="must", needs=set(), source=EQ7,
    draw=draws.losses,
    rivals=(PAPER.but(coefficients=(-1.0, 1.0, -1.0, 1.0)), PAPER.but(coefficients=(1.0, 1.0, -1.0, 1.0))),
    scenes=[
        scene("five pairs", ORDINARY), scene("one pair", SINGLE), scene("policy near the reference", NEAR),
        scene("large log-probs, small margins", CANCELLING),
    ],
    claim="The loss of a pair is -log sigma(beta * [(log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))]).",
    covers=("LOSS-VALUE", "LOSS-REDUCE"), why="It is the objective.",
    bug="Liger-Kernel 0.5.0 to 0.5.2 had the sign reversed and no reference term.",
    fix="Write the log-ratios of chosen and rejected apart, then their difference, then beta, then logsigmoid.",
)  # fmt: skip
def value(case: Case) -> Comparison:
    return values(case)


@check(
    "LOSS-ZERO-MARGIN", chapter="loss", stage="loss", level="must", needs=set(), source=EQ7,
    scenes=[scene("policy and reference equal, and both log-ratios equal", LossExperiment(
        (-3.5, -6.25, -4.5), (-6.0, -4.75, -7.25), (-3.5, -6.25, -5.75), (-6.0, -4.75, -8.5), HALF))],
    rivals=(PAPER.but(reference="none"), PAPER.but(offset=0.5)),
    claim="Where the two log-ratios are equal, the loss is log 2, whatever the numbers and beta.",
    covers=("LOSS-ZERO",), why="It is where every run starts.",
    bug="A target margin left over from SimPO shifts the start away from log 2.",
    fix="Nothing but beta times the difference of the log-ratios belongs inside the sigmoid.",
)  # fmt: skip
def zero_margin(case: Case) -> Comparison:
    return values(case)


@check(
    "LOSS-SWAP", chapter="loss", stage="loss", level="must", needs={"loss.per_pair"},
    source=EQ7 + " and softplus(t) - softplus(-t) = t",
    draw=draws.exchanged,
    scenes=[scene("five pairs and the same with chosen and rejected exchanged", ORDINARY, LossExperiment(
        ORDINARY.policy_rejected, ORDINARY.policy_chosen, ORDINARY.reference_rejected, ORDINARY.reference_chosen,
        HALF))],
    claim="L(m) - L(-m) = -m: exchanging chosen and rejected changes the loss by the margin.",
    covers=("LOSS-SWAP",), why="It holds for no other link function, and names a wrong sign or a wrong beta.",
    bug="-log sigma(-m): the trainer that learns to prefer the rejected completion.",
    fix="The argument of the sigmoid is chosen minus rejected.",
)  # fmt: skip
def swap(case: Case) -> Comparison:
    first, second = (seen.per_pair for seen in case.observed)
    paper = case.predicted(0).per_pair - case.predicted(1).per_pair
    limit = case.bound("per_pair", 0) + np.asarray(case.bound("per_pair", 1))
    return close(first - second, paper, limit, label=lambda cell: f"L(m) - L(-m), pair {cell[0] + 1}")


RAY = tuple(float(m) for m in (-24, -16, -12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12, 16))


@check(
    "LOSS-SHAPE", chapter="loss", stage="loss", level="must", needs={"loss.per_pair"},
    source=EQ7 + "; convexity of softplus",
    scenes=[scene("eighteen margins from -24 to 16", at(RAY))],
    claim="The loss falls strictly with the margin, is convex, and lies between max(0, -m) and max(0, -m) + log 2.",
    covers=("LOSS-MONOTONE", "LOSS-CONVEX", "LOSS-BOUND", "LOSS-SIGN"),
    why="A clamp, an absolute value or another link function bends the curve where no single value looks wrong.",
    bug="Clamped log-ratios stop the gradient for the pairs that are most wrong.",
    fix="Use logsigmoid of the unclamped margin.",
)  # fmt: skip
def shape(case: Case) -> Comparison:
    losses, m = case.observed[0].per_pair, np.array(RAY)
    noise = np.broadcast_to(np.asarray(case.bound("per_pair")), m.shape)
    slopes = np.diff(losses) / np.diff(m)
    rough = (noise[1:] + noise[:-1]) / np.diff(m)
    low = np.maximum(0, -m)
    told = [
        _at_most(slopes, -1 / (1 + np.exp(m[1:])) + rough, rough, "slope of the loss after margin {}", m),
        _at_most(-np.diff(slopes), rough[1:] + rough[:-1], rough[1:] + rough[:-1], "bend of the loss at margin {}",
            m[1:]),
        _at_most(low - losses, noise, noise, "max(0, -m) - loss at margin {}", m),
        _at_most(losses - low - np.log(2), noise, noise, "loss - max(0, -m) - log 2 at margin {}", m),
    ]
    return worst(told)


def _at_most(seen: np.ndarray, limit: np.ndarray, noise: np.ndarray, where: str, m: np.ndarray) -> Comparison:
    """`seen` exceeds `limit`, which includes the noise, nowhere; the worst place is named."""
    over = np.where(np.isnan(seen), np.inf, seen - limit)
    i = int(np.argmax(over))
    verdict = "fail" if over[i] > 0 else "pass"
    error = float(max(seen[i] - limit[i] + noise[i], 0.0)) if verdict == "fail" else 0.0
    return Comparison(
        verdict, error, float(noise[i]), float(seen[i]), f"at most {limit[i]:.6g}", where.format(f"{m[i]:g}")
    )


EDGES = (20.0, 20.5, 37.0, 60.0, 88.0, 104.0, 745.0, 1e4)


@check(
    "LOSS-EXTREME", chapter="loss", stage="loss", level="must", needs={"loss.per_pair"}, source=EQ7,
    scenes=[scene("margins up to +-10 000", at((*EDGES, *(-edge for edge in EDGES))))],
    claim="The loss is finite and right at margins up to 10 000 on either side.",
    covers=("LOSS-EXTREME", "LOSS-ASYMPT", "LOSS-SATURATE"),
    why="One infinite pair makes the batch, and then the model, NaN.",
    bug="-log(sigmoid(m)) is infinite at m = -104 in float32.", fix="Use logsigmoid or softplus.",
)  # fmt: skip
def extreme(case: Case) -> Comparison:
    return values(case)


def _dtype(name: str) -> LossExperiment:
    # thirteen bits before the rounding to the dtype: float32 holds them, and whoever casts to a smaller one loses some
    whole = LossExperiment(
        (-3.0185546875, -17.0283203125, -9.0087890625), (-11.0322265625, -5.0205078125, -9.0419921875),
        (-6.0302734375, -16.0400390625, -2.0166015625), (-7.0126953125, -13.0478515625, -30.0361328125), HALF,
    )  # fmt: skip
    return replace(whole, dtype=name)


@check(
    "LOSS-DTYPES", chapter="loss", stage="loss", level="must", needs={"loss.per_pair"}, source=EQ7,
    scenes=[scene(name, _dtype(name), family=name) for name in ("float32", "bfloat16", "float16")],
    claim="In float32, bfloat16 and float16 the loss is right to the precision of the dtype.",
    covers=("LOSS-LOWPREC", "LOSS-DTYPE"), why="Real runs are not in float64.",
    bug="A +1e-8 inside the logarithm is zero in bfloat16 and the loss infinite.", fix="Use logsigmoid; upcast.",
)  # fmt: skip
def dtypes(case: Case) -> Comparison:
    return values(case)


@check(
    "LOSS-PARTIALS", chapter="loss", stage="gradient", level="must", needs={"loss.slopes"},
    source=EQ7 + ", differentiated",
    draw=draws.losses,
    scenes=[
        scene("five pairs", ORDINARY),
        scene("margins up to +-88", at((-88.0, -20.5, -3.0, 0.5, 3.0, 20.5, 60.0))),
        scene("policy equal to the reference", LossExperiment(
            (-3.5, -6.25), (-6.0, -4.75), (-3.5, -6.25), (-6.0, -4.75), HALF)),
    ],
    claim="The slope in log pi(y_w) is -beta * sigma(-m), in log pi(y_l) it is +beta * sigma(-m), over the number of "
    "pairs.",
    covers=("LOSS-GRAD", "LOSS-GRAD-STRUCT"), why="A right value with a wrong slope trains wrongly and logs well.",
    bug="A detached rejected log-prob turns DPO into weighted fine-tuning on the chosen completions.",
    fix="Detach nothing but the reference.",
)  # fmt: skip
def partials(case: Case) -> Comparison:
    seen, paper = case.observed[0].slopes[:2], case.predicted().slopes[:2]
    limit = np.broadcast_to(np.asarray(case.bound("slopes")), case.predicted().slopes.shape)[:2]
    names = ("policy chosen", "policy rejected")
    outcome = close(seen, paper, limit, label=lambda c: f"slope in the {names[c[0]]} log-prob of pair {c[1] + 1}")
    if case.observed[0].via != "derived":
        return outcome
    exact = close(case.observed[0].margin_slopes, case.predicted().margin_slopes, case.bound("margin_slopes"))
    return worst([outcome, exact])


def _nudged(amount: float) -> tuple[LossExperiment, ...]:
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    return tuple(replace(ORDINARY, **{name: tuple(x - amount for x in getattr(ORDINARY, name))}) for name in names)


ARGUMENTS = (ORDINARY, *_nudged(0.5))


@check(
    "LOSS-ARGUMENTS", chapter="loss", stage="loss", level="must", needs={"loss.per_pair"}, source=EQ7,
    scenes=[scene("each of the four log-probs lowered by 1/2", *ARGUMENTS)],
    claim="Each of the four log-probs enters the loss with its own sign and with weight beta.",
    covers=("LOSS-COEF-FIT", "LOSS-SIGN"), why="It names the term that is missing, doubled or turned round.",
    bug="The reference's rejected log-prob added where it should be subtracted.",
    fix="h = (lp_w - rf_w) - (lp_l - rf_l).",
)  # fmt: skip
def arguments(case: Case) -> Comparison:
    names = ("policy chosen", "policy rejected", "reference chosen", "reference rejected")
    told = []
    for j, name in enumerate(names, start=1):
        change = case.observed[j].per_pair - case.observed[0].per_pair
        due = case.predicted(j).per_pair - case.predicted(0).per_pair
        limit = case.bound("per_pair", j) + np.asarray(case.bound("per_pair", 0))
        told.append(close(
            change, due, limit, label=lambda c, name=name: f"lowering the {name} log-prob of pair {c[0] + 1}"
        ))  # fmt: skip
    return worst(told)


STEP = 2.0**-6


@check(
    "LOSS-VALUE-GRADIENT", chapter="loss", stage="gradient", level="must", needs={"loss.per_pair", "loss.slopes"},
    scenes=[scene("five pairs, chosen raised and lowered, rejected raised and lowered", ORDINARY, *(
        replace(ORDINARY, **{name: tuple(x + d for x in getattr(ORDINARY, name))})
        for name in ("policy_chosen", "policy_rejected") for d in (STEP, -STEP)))],
    claim="The gradient is the derivative of the value, by central differences of the subject's own loss.",
    source="definition of the derivative; remainder step^2 * beta^3 / (6 * 6 sqrt(3))", covers=("LOSS-FD",),
    why="It needs no oracle: a custom backward that disagrees with its forward is wrong by itself.",
    bug="A fused kernel whose backward lags behind its forward.", fix="Differentiate the forward that is used.",
)  # fmt: skip
def value_gradient(case: Case) -> Comparison:
    base = case.observed[0]
    pairs, beta = len(case.experiments[0].policy_chosen), case.experiments[0].objective.beta
    step = case.experiments[1].policy_chosen[0] - case.experiments[0].policy_chosen[0]
    told = []
    for row, name in enumerate(("policy chosen", "policy rejected")):
        up, down = case.observed[1 + 2 * row].per_pair, case.observed[2 + 2 * row].per_pair
        noise = np.asarray(case.bound("per_pair", 1 + 2 * row)) + np.asarray(case.bound("per_pair", 2 + 2 * row))
        slope = base.slopes[row] * (1 if case.theory.reduction == "sum" else pairs)
        limit = noise / (2 * step) + step**2 * beta**3 / (36 * np.sqrt(3)) + pairs * np.max(case.bound("slopes"))
        told.append(close(
            slope, (up - down) / (2 * step), limit,
            label=lambda c, n=name: f"slope in the {n} log-prob, pair {c[0] + 1}",
        ))  # fmt: skip
    return worst(told)


DOUBLED = LossExperiment(*(tuple(2 * x for x in row) for row in ORDINARY.arguments().tolist()), Objective(beta=0.25))


@check(
    "LOSS-BETA-SCALE", chapter="loss", stage="loss", level="must", needs=set(), source=EQ7,
    draw=draws.doubled,
    scenes=[scene("beta 1/2, and beta 1/4 at doubled log-probs", ORDINARY, DOUBLED)],
    claim="L(c beta; z) = L(beta; c z): beta only scales the log-ratios.", covers=("LOSS-BETA-SCALE",),
    why="A beta outside the logarithm, squared, or hard-coded breaks it.",
    bug="beta applied both to the rewards and again inside the sigmoid.",
    fix="Multiply by beta once, inside the sigmoid.",
)  # fmt: skip
def beta_scale(case: Case) -> Comparison:
    name = "per_pair" if case.observed[0].per_pair is not None and case.observed[1].per_pair is not None else "reduced"
    return equal(case, name)


@check(
    "LOSS-BETA-LIMITS", chapter="loss", stage="loss", level="must", needs=set(), source=EQ7,
    scenes=[scene(f"beta {beta:g}", replace(ORDINARY, objective=Objective(beta=beta)))
            for beta in (2.0**-10, 0.125, 8.0, 128.0)],
    claim="The loss is right from beta = 0.001, where it is nearly log 2 - m/2, to beta = 128, where it is nearly "
    "linear.",
    covers=("LOSS-BETA-SMALL", "LOSS-BETA-LARGE"), why="A clamp or a constant hides at beta 0.1.",
    bug="beta hard-coded to 0.1 in one branch.", fix="Use the beta that was asked for.",
)  # fmt: skip
def beta_limits(case: Case) -> Comparison:
    return values(case)


@check(
    "LOSS-SMOOTHING", chapter="loss", stage="loss", level="must", needs=set(), source="Mitchell 2023 (cDPO), Eq. 3",
    draw=draws.of_objective("cdpo"),
    scenes=[scene(f"label smoothing {eps}", replace(ORDINARY, objective=Objective(beta=0.5, label_smoothing=eps)),
        family="smoothing")
            for eps in (0.125, 0.375)],
    claim="With label smoothing eps the loss is (1 - eps) * softplus(-m) + eps * softplus(m).",
    rivals=(PAPER.but(smoothing="ignored"), PAPER.but(smoothing="half"), PAPER.but(smoothing="robust")),
    covers=("LOSS-SMOOTH-VALUE", "LOSS-SMOOTH-SWAP", "LOSS-EPS-LIMIT"), why="Tests at eps = 0 see none of its bugs.",
    bug="A minus sign between the two terms rewards the wrong completion.", fix="The two weights add up to one.",
)  # fmt: skip
def smoothing(case: Case) -> Comparison:
    if case.says.objectives is not None and "cdpo" not in case.says.objectives:
        return Comparison("not-applicable", reason="the subject's documentation does not offer cDPO")
    return values(case)


@check(
    "LOSS-PAIRS-INDEPENDENT", chapter="loss", stage="loss", level="must", needs={"loss.slopes"},
    source=EQ7 + ": a mean over pairs",
    draw=draws.other_mates,
    scenes=[scene("five pairs, and the same with other numbers in the last two", ORDINARY, LossExperiment(
        *((*row[:3], row[3] - 1.75 - i / 4, row[4] - 3.25 + i / 8) if i % 2 == 0 else tuple(row)
          for i, row in enumerate(ORDINARY.arguments().tolist())), HALF))],
    claim="Each pair's slope depends on that pair alone.", covers=("LOSS-PAIR-WEIGHT", "LOSS-PERM"),
    why="Broadcasting (B, 1) against (B,) compares every chosen with every rejected completion.",
    bug="keepdim=True in one of the sums: a B x B loss that looks plausible.", fix="Check shapes before subtracting.",
)  # fmt: skip
def independent(case: Case) -> Comparison:
    first, second = case.observed
    limit = np.broadcast_to(np.asarray(case.bound("slopes", 0)) + np.asarray(case.bound("slopes", 1)),
        first.slopes.shape)
    return close(second.slopes[:2, :3], first.slopes[:2, :3], limit[:2, :3],
        label=lambda c: f"slope of pair {c[1] + 1}")


@check(
    "LOSS-PURE", chapter="loss", stage="loss", level="must", needs={"loss.reduced", "loss.inputs_changed"},
    source="a loss is a function",
    scenes=[scene("five pairs, called three times", replace(ORDINARY, calls=3), family="state")],
    claim="The loss keeps no memory between calls and leaves its arguments untouched.", covers=("LOSS-PURE",),
    why="The order of the batches would change the objective.", bug="A running mean of rewards inside the loss.",
    fix="Keep state out of the loss; work on copies.",
)  # fmt: skip
def pure(case: Case) -> Comparison:
    if case.observed[0].inputs_changed:
        return Comparison("fail", observed="the arguments were changed in place", expected="arguments untouched")
    return values(case)


@check(
    "LOSS-REWARDS", chapter="loss", stage="rewards", level="must",
    needs={"loss.rewards_chosen", "loss.rewards_rejected"},
    draw=draws.losses,
    scenes=[scene("five pairs", ORDINARY)], rivals=(PAPER.but(rewards="swapped"), PAPER.but(rewards="policy-only")),
    claim="The implicit rewards are beta * (log pi - log ref) of chosen and of rejected.",
    source="Rafailov et al. 2023, Eq. 5, up to the prompt's constant", covers=("REW-IDENT", "LOSS-BETA-TRIANGLE"),
    why="They are what is logged and what is compared.",
    bug="Rewards without the reference look like rewards that grow.",
    fix="Return beta * (policy - reference), detached.",
)  # fmt: skip
def rewards(case: Case) -> Comparison:
    return worst([agree(case, "rewards_chosen"), agree(case, "rewards_rejected")])


def _objective(
    id: str, objective: Objective, claim: str, source: str, bug: str, *, covers: tuple[str, ...], betas: tuple = (),
) -> None:  # fmt: skip
    experiments = {
        f"beta {beta:g}": replace(ORDINARY, objective=replace(objective, beta=beta), lengths=((3, 3),) * 5)
        for beta in (objective.beta, *betas)
    }

    @check(
        id, chapter="loss", stage="loss", level="must", needs=set(), claim=claim, source=source, bug=bug, covers=covers,
        scenes=[scene(f"five pairs, {name}", one, family=objective.kind) for name, one in experiments.items()],
        draw=draws.of_objective(objective.kind),
        why="An objective that is offered is what the user thinks it is.",
        fix="Take the formula from the paper, and say which length the log-probs are divided by, if any.",
    )  # fmt: skip
    def judge(case: Case) -> Comparison:
        told = [values(case)]
        if case.observed[0].slopes is not None and case.observed[0].via == "native":
            paper = case.predicted().slopes
            limit = np.broadcast_to(np.asarray(case.bound("slopes")), paper.shape)[:2]
            told.append(close(case.observed[0].slopes[:2], paper[:2], limit))
        return worst(told)


_objective(
    "LOSS-ROBUST", Objective("robust", beta=0.5, label_smoothing=0.125),
    "rDPO is [(1 - eps) * softplus(-m) - eps * softplus(m)] / (1 - 2 eps); it may be negative.",
    "Chowdhury et al. 2024 (arXiv:2403.00409)", "The normaliser 1 - 2 eps left out.",
    covers=("LOSS-ROBUST-VALUE", "LOSS-ROBUST-UNBIASED"),
)  # fmt: skip
_objective(
    "LOSS-HINGE", Objective("hinge", beta=0.5), "The hinge loss is max(0, 1 - beta * h).",
    "Liu et al. 2023 (RSO, arXiv:2309.06657)", "ms-swift's Megatron path trained hinge and ipo as sigmoid.",
    covers=("LOSS-HINGE-VALUE",),
)  # fmt: skip
_objective(
    "LOSS-IPO", Objective("ipo", beta=0.5), "The IPO loss is (h - 1 / (2 tau))^2, with beta in the place of tau.",
    "Azar et al. 2023 (arXiv:2310.12036), Eq. 17", "The sum where the average was meant, and the other way round.",
    covers=("LOSS-IPO-VALUE", "LOSS-IPO-LEN"), betas=(0.25,),  # at 1/2 the targets 1/beta and 1/(2 beta^2) are one
)  # fmt: skip
_objective(
    "LOSS-SIMPO", Objective("simpo", beta=2.0, gamma=0.5),
    "The SimPO loss is softplus(-(beta * (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma)).",
    "Meng et al. 2024 (arXiv:2405.14734), Eq. 6", "Rewards of SimPO computed with the reference.",
    covers=("LOSS-SIMPO-VALUE", "LOSS-SIMPO-REFIND"),
)  # fmt: skip
