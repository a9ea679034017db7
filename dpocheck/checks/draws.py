"""Which experiments does each check draw in the full tier?

A function of `Ask` per relation between runs, named in a check's `draw`: it answers with a Hypothesis strategy of
tuples of experiments, as many as the check's scenes have.  Hypothesis is imported when one of them is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dpocheck.experiment import Body, LogpExperiment, LossExperiment, Objective

if TYPE_CHECKING:
    from dpocheck.draw import Ask

Draw = Callable[["Ask"], Any]


def _alone(experiment: Any) -> tuple[Any]:
    return (experiment,)


# --------------------------------------------------------------------------------------------------------------- loss


def losses(ask: Ask) -> Any:
    from dpocheck import strategies

    return strategies.loss_experiments().map(_alone)


def of_objective(*kinds: str, regions: tuple[str, ...] = ("plain", "integers", "wide", "near")) -> Draw:
    def made(ask: Ask) -> Any:
        from dpocheck import strategies

        lengths = "drawn" if ask.native else "three"
        return strategies.loss_experiments(
            strategies.objectives(*kinds), regions=regions, lengths=lengths
        ).map(_alone)

    return made


def exchanged(ask: Ask) -> Any:
    """A batch, and the same with chosen and rejected exchanged."""
    return losses(ask).map(lambda drawn: (drawn[0], _exchanged(drawn[0])))


def _exchanged(whole: LossExperiment) -> LossExperiment:
    return replace(
        whole, policy_chosen=whole.policy_rejected, policy_rejected=whole.policy_chosen,
        reference_chosen=whole.reference_rejected, reference_rejected=whole.reference_chosen,
    )  # fmt: skip


def doubled(ask: Ask) -> Any:
    """A batch, and the same at twice the log-probs and half of beta."""

    def pair(drawn: tuple[LossExperiment]) -> tuple[LossExperiment, LossExperiment]:
        twice = (tuple(2 * x for x in row) for row in drawn[0].arguments().tolist())
        return drawn[0], LossExperiment(*twice, Objective(beta=drawn[0].objective.beta / 2))

    return losses(ask).map(pair)


def other_mates(ask: Ask) -> Any:
    """Five pairs or more, and the same with other numbers from the fourth on."""
    from dpocheck import strategies

    def pair(whole: LossExperiment) -> tuple[LossExperiment, LossExperiment]:
        row = whole.policy_chosen
        return whole, replace(whole, policy_chosen=(*row[:3], *(1.5 * x - 1.75 for x in row[3:])))

    return strategies.loss_experiments(sizes=(5, 8, 17)).map(pair)


def shifted(side: str) -> Draw:
    """A batch, and the same with a constant of each pair's own added to both log-probs of one model."""

    def made(ask: Ask) -> Any:
        def pair(drawn: tuple[LossExperiment]) -> tuple[LossExperiment, LossExperiment]:
            first, second = (getattr(drawn[0], f"{side}_{name}") for name in ("chosen", "rejected"))
            constants = [-0.25 - 0.5 * ((3 * i) % 17) for i in range(len(first))]
            moved = [tuple(x + c for x, c in zip(row, constants, strict=True)) for row in (first, second)]
            return drawn[0], replace(drawn[0], **{f"{side}_chosen": moved[0], f"{side}_rejected": moved[1]})

        return losses(ask).map(pair)

    return made


# ---------------------------------------------------------------------------------------------------------- log-probs


def logps(ask: Ask) -> Any:
    from dpocheck import strategies

    return strategies.logp_experiments(own_masks=ask.native).map(_alone)


def repadded(ask: Ask) -> Any:
    """Rows, and the same with pads on the other side, or more of them, or of another token."""
    from hypothesis import strategies as st

    from dpocheck import strategies

    def pair(drawn: tuple[LogpExperiment, str, int]) -> tuple[LogpExperiment, LogpExperiment]:
        whole, side, extra = drawn
        rows = [_parts(row) for row in whole.rows]
        return whole, replace(whole, rows=strategies.padded(rows, side, extra, strategies.WORDS.pad))

    choices = st.tuples(
        strategies.logp_experiments(own_masks=ask.native), strategies.choose("left", "right"), strategies.choose(2, 5)
    )
    return choices.map(pair)


def _parts(row: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and completion of a token row."""
    marked = list(zip(row.ids, row.attention, row.completion, strict=True))
    return tuple(i for i, real, c in marked if real and not c), tuple(i for i, _, c in marked if c)


def among_others(ask: Ask) -> Any:
    """Ten rows or more, and rows 1 and 7 of them."""
    from dpocheck import strategies

    def pair(whole: LogpExperiment) -> tuple[LogpExperiment, LogpExperiment]:
        rows = [_parts(whole.rows[i]) for i in (0, 6)]
        return whole, replace(whole, rows=strategies.padded(rows, "right", 0, strategies.WORDS.pad))

    return strategies.logp_experiments((5, 6), own_masks=ask.native).map(pair)


# --------------------------------------------------------------------------------------------------- steps and runs


def steps(counts: tuple[int, ...] = (1, 2, 3, 5, 6), *, rectangular: bool = False, body: str = "silent") -> Draw:
    def made(ask: Ask) -> Any:
        from dpocheck import strategies

        return strategies.step_experiments(
            counts=counts, rectangular=rectangular, body=body, own_masks=ask.native and not rectangular
        ).map(_alone)

    return made


def runs(*batches: str, **options: Any) -> Draw:
    def made(ask: Ask) -> Any:
        from dpocheck import strategies

        return strategies.train_experiments(batches=batches, theory=ask.theory, **options).map(_alone)

    return made


def long_rows(ask: Ask) -> Any:
    """Through a glass table, which shows what was attended: a cut prompt leaves the logits' gradient alone."""
    from dpocheck import strategies

    rows = strategies.chat_free_rows(limit=True, ahead=int(ask.theory.bos == "added"))
    return rows.map(lambda run: (replace(run, body=Body("glass")),))


def implicit_prompts(ask: Ask) -> Any:
    from dpocheck import strategies

    return strategies.letter_rows().map(_alone)
