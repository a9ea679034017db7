"""Is the log-prob of a completion the sum over exactly its tokens?"""

from __future__ import annotations

from dataclasses import replace

from dpocheck.check import Case, Comparison, agree, check, close, equal, scene
from dpocheck.checks import draws, scenes
from dpocheck.experiment import LogpExperiment, Pair, Table, TokenRow
from dpocheck.oracle.theory import PAPER

SUM = "the autoregressive factorisation: log pi(y|x) is the sum of the tokens' log-probs"
EOS, PAD = scenes.WORDS.eos, scenes.WORDS.pad


def row(prompt: tuple[int, ...], completion: tuple[int, ...], *, left: int = 0, right: int = 0,
    pad: int = PAD) -> TokenRow:
    """One row with `left` and `right` pads."""
    ids = (pad,) * left + prompt + completion + (pad,) * right
    attention = (0,) * left + (1,) * (len(prompt) + len(completion)) + (0,) * right
    counted = (0,) * (left + len(prompt)) + (1,) * len(completion) + (0,) * right
    return TokenRow(ids, attention, counted)


# Through `train` each row is a batch of its own, which pads nothing: GRAD-RAGGED and RUN-GRADIENT look at batches.
# What needs no padding is asked of it all the same.
ALONE = Comparison("not-applicable", reason="a whole run pads as it likes; ragged batches are looked at elsewhere")

PAIRS = scenes.ragged()
TABLE = scenes.table(PAIRS, 1)


def batch(rows: list[tuple[tuple[int, ...], tuple[int, ...]]], *, side: str = "right", extra: int = 0, pad: int = PAD,
          table: Table = TABLE) -> LogpExperiment:  # fmt: skip
    """Rows padded to one width on one side."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows) + extra
    made = []
    for prompt, completion in rows:
        gap = width - len(prompt) - len(completion)
        made.append(row(prompt, completion, pad=pad, **{side: gap}))
    return LogpExperiment(table, tuple(made))


ROWS = [(pair.prompt, pair.chosen) for pair in PAIRS] + [(pair.prompt, pair.rejected) for pair in PAIRS]
WRONG = (
    *(PAPER.but(counted=rule) for rule in ("prompt", "last-prompt", "no-first", "no-eos", "padding", "one-pad")),
    PAPER.but(logps="mean"),
)


@check(
    "LOGP-VALUE", chapter="logps", stage="logps", level="must", needs={"logps.logps"}, source=SUM, rivals=WRONG,
    draw=draws.logps,
    scenes=[
        scene("ten rows of unequal lengths", batch(ROWS), family="logps"),
        scene("completions that repeat a token", batch(
            [((0, 1), (2, 2, 3, 2, EOS)), ((0, 4), (5, 3, 5, EOS))],
            table=Table(64, 0.0, ((1, 2, 1.5), (2, 2, -1.25), (2, 3, 0.75), (3, 2, 0.5), (4, 5, 1.0), (5, 3, 0.25)))),
            family="logps"),
    ],
    claim="The log-prob of a completion is the sum of the log-probs of its tokens, EOS included, given all before "
    "them.",
    covers=("LOGP-VALUE", "LOGP-EOS", "LOGP-FIRST", "LOGP-EDGE"),
    why="Of the hand-written implementations that are wrong most are wrong here, not in the formula.",
    bug="A mean over tokens instead of the sum: Liger-Kernel 0.5.3 to 0.5.9.",
    fix="Gather the log-softmax at the next token, mask, and sum.",
)  # fmt: skip
def value(case: Case) -> Comparison:
    return agree(case, "logps")


@check(
    "LOGP-TOKENS", chapter="logps", stage="mask", level="must", needs={"logps.counted"}, source=SUM,
    draw=draws.logps,
    scenes=[scene("ten rows of unequal lengths", batch(ROWS), family="logps")],
    claim="Exactly the completion's tokens are scored, each once, at the position before it.",
    covers=("LOGP-TRACER", "LOGP-GRAD-SUPPORT"), why="It names the token that is missing or too much.",
    bug="The last prompt token scored, the first completion token lost, padding scored as completion.",
    fix="Shift logits and labels against each other once, and the mask with the labels.",
)  # fmt: skip
def tokens(case: Case) -> Comparison:
    for number, (seen, paper) in enumerate(zip(case.observed[0].counted, case.predicted().counted, strict=True)):
        found = {(u, v): times for u, v, times in seen}
        due = {(u, v): times for u, v, times in paper}
        for cell in sorted(set(found) | set(due)):
            if abs(found.get(cell, 0.0) - due.get(cell, 0)) > 0.05:
                name = f"token {scenes.WORDS.word(cell[1])!r} after {scenes.WORDS.word(cell[0])!r} in row {number + 1}"
                return Comparison(
                    "fail", observed=f"scored {found.get(cell, 0.0):g} times", expected=f"{due.get(cell, 0):g} times",
                    where=name, error=abs(found.get(cell, 0.0) - due.get(cell, 0)), bound=0.05,
                )  # fmt: skip
    return Comparison("pass", error=0.0, bound=0.05)


@check(
    "LOGP-PROMPT-MATTERS", chapter="logps", stage="logps", level="must", needs={"logps.logps"}, source=SUM,
    scenes=[scene("one completion after two prompts", batch(
        [((0, 1), (2, 3, EOS)), ((0, 4), (2, 3, EOS))],
        table=Table(64, 0.0, ((1, 2, 1.5), (4, 2, -1.25), (2, 3, 0.75), (3, EOS, 0.5)))), family="logps")],
    claim="The log-prob of a completion depends on its prompt.", covers=("LOGP-CAUSAL",),
    why="It is pi(y|x), not pi(y).", bug="Completions tokenized and scored alone.",
    fix="Run the model on prompt and completion together.",
)  # fmt: skip
def prompt_matters(case: Case) -> Comparison:
    seen, paper = case.observed[0].logps, case.predicted().logps
    limit = case.bound("logps")
    return close(seen[0] - seen[1], paper[0] - paper[1],
        2 * float(max(limit)) if hasattr(limit, "__len__") else 2 * limit,
                 label=lambda _: "difference between the two prompts")  # fmt: skip


@check(
    "LOGP-PADDING", chapter="logps", stage="mask", level="must", needs={"logps.logps"}, source=SUM,
    draw=draws.repadded,
    scenes=[
        scene("seven more pads on the right", batch(ROWS), batch(ROWS, extra=7), family="padding"),
        scene("pads on the left", batch(ROWS), batch(ROWS, side="left"), family="padding"),
        scene("padding filled with an ordinary token", batch(ROWS), batch(ROWS, extra=3, pad=0), family="padding"),
    ],
    claim="Padding on either side, whatever it holds, changes no log-prob.",
    covers=("LOGP-PAD-R", "LOGP-PAD-L", "LOGP-PAD-VALUE"), why="Else the loss depends on who shares the batch.",
    bug="Labels padded with the pad id instead of -100 in the original implementation's first version.",
    fix="Mask by position, never by token id; take position ids from the attention mask.",
)  # fmt: skip
def padding(case: Case) -> Comparison:
    return ALONE if case.observed[0].via == "derived" else equal(case, "logps")


@check(
    "LOGP-BATCH-MATES", chapter="logps", stage="logps", level="must", needs={"logps.logps"}, source=SUM,
    draw=draws.among_others,
    scenes=[scene("a row among ten, and among two", batch(ROWS), batch([ROWS[0], ROWS[6]]), family="padding")],
    claim="The log-prob of a row does not depend on the other rows of the batch.",
    covers=("LOGP-BATCH", "LOGP-ROWPERM"),
    why="Else the order of the data changes the objective.", bug="A sum divided by the tokens of the whole batch.",
    fix="Reduce over the row's own tokens only.",
)  # fmt: skip
def batch_mates(case: Case) -> Comparison:
    if case.observed[0].via == "derived":
        return ALONE
    many, few = case.observed
    limit = case.bound("logps", 0)
    return close(few.logps, many.logps[[0, 6]], 2 * (limit if not hasattr(limit, "__len__") else limit[[0, 6]]),
                 label=lambda at: f"log-prob of row {(1, 7)[at[0]]}")  # fmt: skip


ZERO = (Pair((7, 8), (0, 9, EOS), (10, 0, EOS)),)


@check(
    "LOGP-TOKEN-ZERO", chapter="logps", stage="mask", level="must", needs={"logps.logps"}, source=SUM,
    scenes=[scene("completions that hold the token with id 0", batch(
        [(p.prompt, c) for p in ZERO for c in (p.chosen, p.rejected)], table=scenes.table(ZERO, 4)), family="logps")],
    rivals=(PAPER.but(counted="no-zero-id"),),
    claim="A completion token with id 0 is scored like any other.", covers=("LOGP-MASK-ID",),
    why="Id 0 is an ordinary token in many vocabularies.", bug="labels[labels == 0] = -100.", fix="Mask by position.",
)  # fmt: skip
def token_zero(case: Case) -> Comparison:
    return agree(case, "logps")


@check(
    "LOGP-PAD-IS-EOS", chapter="logps", stage="mask", level="must", needs={"logps.logps"}, source=SUM,
    scenes=[scene("padding with the EOS token", batch(ROWS, extra=2, pad=EOS), family="pad is eos")],
    rivals=(PAPER.but(counted="no-pad-id"),),
    claim="Where padding uses the EOS token, the real EOS is scored and the pads are not.", covers=("LOGP-PAD-EOS",),
    why="Most base models are trained with pad = eos; a lost EOS is a model that never stops.",
    bug="mask = (ids != pad_id), with pad_id = eos_id.", fix="Mask by position.",
)  # fmt: skip
def pad_is_eos(case: Case) -> Comparison:
    return agree(case, "logps")


@check(
    "LOGP-EXTREME", chapter="logps", stage="logps", level="must", needs={"logps.logps"}, source=SUM,
    scenes=[scene("logits times 256", replace(batch(ROWS), table=scenes.table(PAIRS, 1, scale=256.0)), family="logps")],
    claim="Log-probs are finite and right where probabilities underflow.", covers=("LOGP-EXTREME", "LOGP-LOGIT-SHIFT"),
    why="One -inf makes the loss NaN.", bug="log(softmax(logits)).", fix="Use log_softmax.",
)  # fmt: skip
def extreme(case: Case) -> Comparison:
    return agree(case, "logps")
