"""Which equation does the subject optimise?  Fitted from what it did, not from what it says.

For a loss of the sigmoid family L = -log sigma(s) the logit is s = -log(expm1(L)), exactly.  It is fitted as
s = beta * (a1 lp_w + a2 lp_l + a3 rf_w + a4 rf_l) + b by least squares over pairs whose four log-probs differ in every
direction; the residual tells whether the family is right at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from dpocheck import fixed
from dpocheck.budget import is_costly
from dpocheck.check import CHECKS
from dpocheck.checks import scenes
from dpocheck.checks.gradient import SIX
from dpocheck.checks.loss import ARGUMENTS
from dpocheck.checks.step import BASE
from dpocheck.experiment import Objective, TrainExperiment
from dpocheck.oracle import predict
from dpocheck.oracle.theory import PAPER
from dpocheck.subject import Subject

NAMES = ("lp_w", "lp_l", "rf_w", "rf_l")
DUE = np.array([1.0, -1.0, -1.0, 1.0, 0.0])
NEAR = 0.01  # a relative distance of gradients: reductions, rounding and float32 logs stay far below it
NOTHING_FITTED = "not fitted: this route shows no losses of single pairs"


@dataclass(frozen=True)
class Equation:
    """The fitted equation in words, the one that was asked for, and how far the fit is off (in the logit)."""

    text: str = ""
    asked: str = ""
    residual: float | None = None
    coefficients: tuple[float, ...] = ()
    same: bool | None = None


def equation(subject: Subject) -> Equation:
    """Fit the loss of `subject` on experiments that the checks have already put to it."""
    objective = subject.own(ARGUMENTS[0]).objective
    beta, asked = objective.beta, words(DUE, objective.beta)
    if objective != Objective(beta=beta):
        return Equation("not fitted: the fit is of the sigmoid loss without extra terms", fixed.words(objective))
    if subject.only.get("reference") == "policy":
        return Equation("not fitted: the reference is always the policy it starts from; all log-ratios are zero", asked)
    if is_costly(subject):
        rows, logits = from_weights(subject)
    else:
        rows, logits = from_losses(subject)
    if rows is None:
        return Equation(NOTHING_FITTED, asked)
    if len(rows) < 6:
        return Equation("not of the family -log sigma(...): not all its losses are positive", asked)
    fitted, *_ = np.linalg.lstsq(np.array(rows), np.array(logits), rcond=None)
    residual = float(np.max(np.abs(np.array(rows) @ fitted - logits)))
    if residual > 1e-3:
        text = f"not of the form -log sigma(beta * linear): off by up to {residual:.2g} in the logit"
        return Equation(text, asked, residual, tuple(fitted))
    exact = max(1e-4, 100 * residual)
    if np.max(np.abs(fitted[:4])) < exact:
        text = "not fitted: what it optimises does not depend on the four log-probs as a DPO loss does"
        return Equation("\n".join([text, *around(subject), *gradients(subject)]), asked, same=False)
    same = bool(np.allclose(fitted, DUE, atol=exact))
    parts = [words(fitted, beta), tokens(subject), *around(subject), *gradients(subject)]
    text = "\n".join(part for part in parts if part)
    return Equation(text, asked, residual, tuple(float(x) for x in fitted), same)


def gradients(subject: Subject) -> list[str]:
    """How large the gradient is, against the paper's, in one batch and in micro-batches; from what was seen already."""
    pairs = scenes.rectangular(len(SIX.pairs))
    split = scenes.run(pairs, subject.theory, replace(BASE, batch=2, accumulation=3))
    found = []
    for experiment, name in ((subject.own(SIX), "in one batch"), (subject.own(split), "in three micro-batches")):
        if subject.cannot(experiment) or not subject.remembers(experiment):
            continue
        seen, due = (getattr(one, "gradient", None) for one in (subject.observe(experiment), predict(experiment)))
        if seen is not None and due is not None:
            found.append(f"{against(seen, due)} {name}")
    return [f"gradient: {', '.join(found)}"] if found else []


def against(seen: np.ndarray, due: np.ndarray) -> str:
    """A gradient as a multiple of the one that is due; where it points elsewhere no factor describes it."""
    size = float(np.linalg.norm(seen) * np.linalg.norm(due))
    cosine = float(np.sum(seen * due)) / size if size else 1.0
    if abs(cosine) < 1 - NEAR**2 / 2:  # further than NEAR off the line
        return f"in another direction (cosine {cosine:.3f})"
    return f"{float(np.sum(seen * due) / np.sum(due * due)):.3f} of it"


def around(subject: Subject) -> list[str]:
    """Rows, reference, clipping and dropout, from runs that were made already; what was not run is left out."""
    return [part for part in (rows(subject), which_reference(subject), clipping(subject), dropout(subject)) if part]


def rows(subject: Subject) -> str:
    """What stands before the prompt, and what a limit leaves, under the conventions found."""
    if "train" not in subject.capabilities:
        return ""
    theory = subject.theory
    starts = {"tokenizer": "BOS where the tokenizer puts it", "none": "no BOS", "added": "BOS added"}
    kept = {
        "asked": "the side asked for is kept", "keep_start": "the start is kept", "keep_end": "the end is kept",
        "drop": "the row is dropped", "none": "nothing is cut",
    }  # fmt: skip
    start, rest = starts.get(theory.bos, theory.bos), kept.get(theory.truncation, theory.truncation)
    return f"rows: {start}; beyond the limit {rest}"


REFERENCES = {
    "given": "the policy as it was passed", "disk": "the checkpoint that the policy was loaded from",
    "none": "there is none", "policy-live": "the live policy",
}  # fmt: skip


def which_reference(subject: Subject) -> str:
    """Where no reference is handed over, what is taken for it: the nearest of four, if one is near."""
    run = _ran(subject, "REF-IS-POLICY-GIVEN")
    gradient = None if run is None else getattr(subject.observe(run), "gradient", None)
    if run is None or gradient is None:
        return ""
    away = {}
    for name in REFERENCES:
        due = predict(run, subject.theory.but(reference=name)).gradient
        away[name] = float(np.linalg.norm(gradient - due) / np.linalg.norm(due))
    best = min(away, key=away.get)  # type: ignore[arg-type]
    found = REFERENCES[best] if away[best] < NEAR else "none of those known"
    return f"reference: the model handed over; without one, {found}"


def clipping(subject: Subject) -> str:
    """At which share of the norm that was asked for the gradient is clipped."""
    run = _ran(subject, "CLIP-NORM")
    seen = None if run is None else getattr(subject.observe(run), "gradient", None)
    if run is None or seen is None:
        return ""
    due = predict(run, subject.theory).gradient
    return f"clipping: at {np.linalg.norm(seen) / np.linalg.norm(due):.3f} of the norm asked for"


def dropout(subject: Subject) -> str:
    """In which of the two models dropout was drawn where its configuration has some."""
    run = _ran(subject, "REF-NO-DROPOUT")
    spies = {} if run is None else getattr(subject.observe(run), "spies", {})
    told = [f"{'drawn' if spies[model]['drawn'] else 'none'} in the {model}" for model in ("policy", "reference")
            if model in spies and spies[model].get("forwards")]  # fmt: skip
    return f"dropout: {', '.join(told)}" if told else ""


def _ran(subject: Subject, id: str) -> TrainExperiment | None:
    """The first experiment of a check, if its answer is known already."""
    run = subject.own(CHECKS[id].staged(subject.theory)[0].experiments[0], id)
    return run if not subject.cannot(run) and subject.remembers(run) else None


Sample = tuple[list[list[float]] | None, list[float]]


def from_losses(subject: Subject) -> Sample:
    """The logits behind the losses of single pairs."""
    rows, logits = [], []
    for asked in ARGUMENTS:
        experiment = subject.own(asked)
        losses = getattr(subject.observe(experiment), "per_pair", None)
        if losses is None:
            return None, []
        for arguments, loss in zip(experiment.arguments().T, losses, strict=True):
            if not (np.isfinite(loss) and loss > 0):
                return [], []  # one such loss is enough: -log sigma is positive everywhere
            rows.append([*(experiment.objective.beta * arguments), 1.0])
            logits.append(float(-np.log(np.expm1(loss))))
    return rows, logits


def from_weights(subject: Subject) -> Sample:
    """The logits behind the weights of six pairs in one gradient: a weight is beta * sigma(-s) / pairs.

    After the last token of a prompt of its own a pair's gradient is weight * (e_rejected - e_chosen).
    """
    six = subject.own(SIX)
    gradient, pairs, beta = getattr(subject.observe(six), "gradient", None), six.pairs, six.objective.beta
    if gradient is None:
        return None, []
    policy, reference = (_log_softmax(table.logits()) for table in (six.policy, six.reference))
    rows, logits = [], []
    for pair in pairs:
        share = -gradient[pair.prompt[-1], pair.chosen[0]] * len(pairs) / beta
        four = [_score(table, pair.prompt, y) for table in (policy, reference) for y in (pair.chosen, pair.rejected)]
        if 0 < share < 1:
            rows.append([*(beta * np.array(four)), 1.0])
            logits.append(float(-np.log(share / (1 - share))))
    return rows, logits


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    high = logits.max(axis=1, keepdims=True)
    return logits - high - np.log(np.exp(logits - high).sum(axis=1, keepdims=True))


def _score(table: np.ndarray, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    return float(sum(table[u, v] for u, v in pairwise((prompt[-1], *completion))))


def words(coefficients: np.ndarray, beta: float) -> str:
    """The equation as people write it, chosen terms first."""
    order = (0, 2, 1, 3)
    terms = "".join(
        f" {'-' if coefficients[i] < 0 else '+'} {abs(coefficients[i]):.3f} {NAMES[i]}" for i in order
    ).replace("-", "−")
    first = terms.removeprefix(" + ").removeprefix(" ")
    offset = coefficients[4] if abs(coefficients[4]) > 5e-4 else 0.0
    shift = f" {'−' if offset < 0 else '+'} {abs(offset):.3f}" if offset else ""
    return f"mean over pairs of −log σ( {beta:.3f} · [ {first} ]{shift} )"


def tokens(subject: Subject) -> str:
    """Which tokens count: under the conventions found, and as far as runs that were made already show it."""
    if set(subject.capabilities) <= {"loss"}:
        return "lp, rf: the log-probs that it is handed"
    ends = {"appended": "EOS appended and counted once", "none": "EOS only where the text has it"}
    end = ends.get(subject.theory.eos, subject.theory.eos)
    beside = [told for told in (
        _counted(subject, "LOGP-VALUE", "logps", PROMPT), _counted(subject, "GRAD-TOKENS", "gradient", PADDING),
    ) if told]  # fmt: skip
    return "; ".join([f"lp, rf: sums over the completion's tokens, {end}", *([", ".join(beside)] if beside else [])])


PROMPT = {"completion": "prompt 0", "prompt": "prompt counted", "last-prompt": "the prompt's last token counted"}
PADDING = {
    "completion": "padding 0", "padding": "padding counted", "one-pad": "one pad counted",
    "padding-by-side": "padding counted, each side padded to its own longest row",
}  # fmt: skip


def _counted(subject: Subject, id: str, field: str, rules: dict[str, str]) -> str:
    """The words of the first rule under which the check's numbers point where they were seen to, whatever their size;
    nothing where none does, or they were not seen."""
    run = _ran(subject, id)
    seen = None if run is None else getattr(subject.observe(run), field, None)
    for rule, told in rules.items() if seen is not None else ():
        due = getattr(predict(run, subject.theory.but(counted=rule)), field)
        size = float(np.linalg.norm(seen) * np.linalg.norm(due))
        if size and np.sum(seen * due) / size > 1 - NEAR**2 / 2:
            return told
    return ""


__all__ = ["PAPER", "Equation", "equation", "words"]
