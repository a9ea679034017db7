"""Which objectives, and which four log-probs, are worth asking a loss about?"""

from __future__ import annotations

from hypothesis import strategies as st

from dpocheck.experiment import LossExperiment, Objective
from dpocheck.strategies.choose import choose, generic, mantissa, sized

SIZES = (1, 2, 3, 5, 8, 17)  # one pair hides broadcasting, two hide which of several reductions is meant
BETAS = (0.5, 0.125, 2.0, 0.25, 2.0**-4, 2.0**-10, 8.0, 64.0)
RATES = (0.125, 0.375)  # of label smoothing, either side of 1/4: eps and 1 - eps must not be confused with 1/2
REGIONS = ("plain", "integers", "wide", "near", "cancelling", "edges")
EDGES = (0.75, 17.0, 20.5, 37.0, 88.0, 104.0, 745.0, 20.0, 1e4, 1e-8, 2.0**-40, 0.0)  # margins
LARGEST = {"bfloat16": 63, "float16": 511, "float32": 2**22 - 1, "float64": 2**22 - 1}  # integers whose sums are exact


def sigmoids(betas: tuple[float, ...] = BETAS) -> st.SearchStrategy[Objective]:
    """DPO itself (Rafailov et al. 2023, Eq. 7) at several beta."""
    return choose(*(Objective(beta=beta) for beta in betas))


def objectives(*kinds: str, betas: tuple[float, ...] = BETAS[:5]) -> st.SearchStrategy[Objective]:
    """Objectives of the given kinds, all of `experiment.KINDS` and "cdpo" by default, each with what belongs to it:
    smoothing for cDPO and rDPO, a target margin for SimPO, alpha off 1/2, where it is 1 - alpha too.
    Raises KeyError on an unknown kind."""
    made = {
        "sigmoid": [Objective(beta=b) for b in betas],
        "cdpo": [Objective(beta=b, label_smoothing=e) for b in betas for e in RATES],
        "robust": [Objective("robust", beta=b, label_smoothing=e) for b in betas for e in RATES],
        "hinge": [Objective("hinge", beta=b) for b in betas],
        "ipo": [Objective("ipo", beta=b) for b in betas],
        "forward_kl": [Objective("forward_kl", beta=b) for b in betas],
        "js_divergence": [Objective("js_divergence", beta=b) for b in betas],
        "alpha_divergence": [Objective("alpha_divergence", beta=b, alpha=a) for b in betas for a in (0.25, 0.75)],
        "simpo": [Objective("simpo", beta=b, gamma=g) for b in betas for g in (0.5, 1.5)],
    }
    return choose(*(each for kind in kinds or tuple(made) for each in made[kind]))


@st.composite
def loss_experiments(
    draw: st.DrawFn,
    objective: st.SearchStrategy[Objective] | None = None,
    *,
    sizes: tuple[int, ...] = SIZES,
    regions: tuple[str, ...] = REGIONS,
    dtype: str = "float64",
    lengths: str | None = None,
) -> LossExperiment:
    """Four log-probs per pair, negative, in nats, and an objective (DPO by default).

    Regions: `plain`, log-probs of a few nats; `integers`, exact in every order of operations, in every dtype; `wide`,
    magnitudes log-uniform from 0.002 to 16 000, each side of each pair its own; `near`, a reference within 1e-6 to 10
    nats of such a policy; `cancelling`, log-probs near -5000 whose h is near 0.001; `edges`, margins at which a loss
    overflows, saturates or changes its branch, up to 10 000 on either side.
    `lengths`: None; "three", three tokens everywhere; "drawn", one to eight.  In bfloat16 and float16 keep to `plain`
    and `integers`.
    """
    wanted = draw(objective if objective is not None else sigmoids())
    count = draw(sized(*sizes))
    region = draw(choose(*regions))
    start = draw(choose(*range(0, 60, 7)))
    size = draw(choose(0, 1, 2, 3, 6, 9, 12, 16))  # drawn in every region: the fewest draws count as simplest
    pairs = [_pair(draw, region, start + 4 * i, wanted.beta) for i in range(count)]
    if region in ("integers", "plain"):
        room = (LARGEST[dtype] // 63).bit_length() - 1 if region == "integers" else 3
        pairs = [tuple(2.0 ** min(size, room) * x for x in pair) for pair in pairs]
    counted = None
    if lengths == "three":
        counted = ((3, 3),) * count
    elif lengths == "drawn":
        shape = draw(choose((3, 5), (4, 1), (1, 2), (8, 7), (3, 3)))
        counted = tuple((1 + (shape[0] + 3 * i) % 8, 1 + (shape[1] + 5 * i) % 8) for i in range(count))
    columns = zip(*pairs, strict=True)
    return LossExperiment(*(tuple(column) for column in columns), wanted, counted, dtype)


def _pair(draw: st.DrawFn, region: str, at: int, beta: float) -> tuple[float, float, float, float]:
    """(policy chosen, policy rejected, reference chosen, reference rejected)."""
    m = [mantissa(at + j) for j in range(4)]
    if region == "plain":
        return -m[0], -m[1], -m[2], -m[3]
    if region == "integers":
        whole = [-64.0 * (x - 1) for x in m]
        return whole[0], whole[1], whole[2], whole[3]
    if region == "cancelling":
        chosen, rejected, common = -5000 - m[0], -5000 - m[1], generic(at)
        return chosen, rejected, chosen + common, rejected + common + generic(at + 1) / 1024
    if region == "edges":
        h = draw(choose(*(sign * edge for edge in EDGES for sign in (1, -1)))) / beta
        return -m[0] - max(-h, 0.0), -m[1] - max(h, 0.0), -m[0], -m[1]
    exponents = range(-9, 14)
    ordered = sorted(exponents, key=lambda k: (abs(k - 2), k))
    first, second = (draw(choose(*ordered)) for _ in range(2))
    chosen, rejected = -m[0] * 2.0**first, -m[1] * 2.0**second
    if region == "wide":
        return chosen, rejected, -m[2] * 2.0**first, -m[3] * 2.0**second
    distance = 2.0 ** draw(choose(0, -10, -20, 3))
    return chosen, rejected, _near(chosen, distance * generic(at + 2)), _near(rejected, distance * generic(at + 3))


def _near(logp: float, change: float) -> float:
    """The log-prob moved by `change`, or by its opposite where that would leave less than 1/512."""
    return logp + change if logp + change <= -(2.0**-9) else logp - abs(change)
