"""Do the tokens that are scored spell the rows that were given?"""

from __future__ import annotations

from dataclasses import replace

from dpocheck.check import Case, Comparison, agree, check, logged, scene, worst
from dpocheck.checks import draws, scenes
from dpocheck.experiment import Body, Message, Objective, Recipe, Row, Template, Tokenizer, TrainExperiment
from dpocheck.oracle.theory import PAPER, Theory

LETTERS = Tokenizer(tuple("abcdefgh "), 64, kind="characters")
LINES = Tokenizer(tuple("abcdefgh \n"), 64, kind="characters")
ROW = "the row as the data set gives it"


def dense(salt: int, tokens: list[int]) -> scenes.Table:
    """Generic logits between all the given tokens."""
    cells = [(u, v) for u in tokens for v in tokens]
    return scenes.Table(64, 0.0, tuple((u, v, scenes.generic(29 * salt + i)) for i, (u, v) in enumerate(cells)))


def letters(*rows: Row, tokenizer: Tokenizer = LETTERS) -> TrainExperiment:
    """One full-batch step on rows of single letters: every character is a token, a space too."""
    recipe = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=len(rows))
    used = [*range(len(tokenizer.words)), tokenizer.eos]
    return TrainExperiment(dense(1, used), dense(2, used), tokenizer, rows, recipe)


def words(*rows: Row, tokenizer: Tokenizer = scenes.WORDS, **recipe: object) -> TrainExperiment:
    """One full-batch step on rows of one-letter words."""
    asked = Recipe(Objective(beta=0.5), learning_rate=scenes.ONE_STEP, batch=len(rows))
    used = [*range(16), tokenizer.bos, tokenizer.eos]
    return TrainExperiment(dense(3, used), dense(4, used), tokenizer, rows,
        replace(asked, **recipe))  # type: ignore[arg-type]


def tokens_agree(case: Case) -> Comparison:
    return worst([agree(case, "gradient", i) for i in range(len(case.experiments))])


@check(
    "ROWS-ROUND-TRIP", chapter="rows", stage="tokens", level="must", needs={"train.gradient"}, source=ROW,
    draw=draws.implicit_prompts,
    scenes=[
        scene("no prompt column, no shared start, chosen ends with a space",
              letters(Row(None, "ab ", "cd")), family="implicit prompt"),
        scene("no prompt column, a shared start", letters(Row(None, "efab", "efcd")), family="implicit prompt"),
        scene("white space at the ends and inside, a line break",
              letters(Row("a  b\n", " c  d ", "e\n\nf"), tokenizer=LINES), family="white space"),
    ],
    claim="Prompt + chosen and prompt + rejected spell the two texts of the row, character by character.",
    covers=("RUN-TOK-BOUNDARY",), why="A lost or invented character is trained into every completion.",
    bug="TRL 0.12 to 1.16, extract_prompt: 'Paris ' and 'London' give the prompt 'Paris', chosen ' ', rejected 'n'.",
    fix="Take the longest common prefix; where there is none the prompt is empty.",
)  # fmt: skip
def round_trip(case: Case) -> Comparison:
    """Before an empty prompt a trainer may put BOS, so that the first token can be scored, or leave that token out."""
    started = replace(case, theory=case.theory.but(bos="added"))
    told = [tokens_agree(one) for one in (case, started)]
    return next((one for one in told if one.verdict == "pass"), told[0])


@check(
    "ROWS-COLUMNS", chapter="rows", stage="tokens", level="must", needs={"train.gradient"}, source=ROW,
    scenes=[scene("one row", words(Row("a b", " c d", " e f")), family="columns")],
    claim="A step raises the chosen completion's tokens and lowers the rejected one's.",
    covers=("RUN-COLUMN", "STEP-TAB-DIRECTION"),
    why="With columns exchanged everything in the log looks right, and the model learns the opposite.",
    bug="Columns renamed by position instead of by name.", fix="Read `chosen` and `rejected` by name.",
)  # fmt: skip
def columns(case: Case) -> Comparison:
    gradient = case.observed[0].gradient
    chosen, rejected = float(gradient[1, 2]), float(gradient[1, 4])
    right = chosen < 0 < rejected
    return Comparison(
        "pass" if right else "fail", observed=f"{chosen:+.3g} at the chosen, {rejected:+.3g} at the rejected token",
        expected="- at the chosen, + at the rejected token", where="gradient after the last prompt token",
        error=None if right else max(chosen, -rejected), bound=None if right else 0.0,
    )  # fmt: skip


def glass(run: TrainExperiment) -> TrainExperiment:
    """The same through a glass table: a token that both completions share in one context cancels in the gradient of
    the logits, but not in what it attended to."""
    return replace(run, body=Body("glass"))


def _eos(theory: Theory) -> list:
    return [
        scene("text without EOS", glass(words(Row("a b", " c d", " e f"))), family="eos"),
        scene("text that ends with EOS itself", glass(words(Row("a b", " c d </s>", " e f </s>"))), family="eos"),
    ]


@check(
    "ROWS-EOS", chapter="rows", stage="tokens", level="must", needs={"train.gradient", "train.attended"}, scenes=_eos,
    rivals=(PAPER.but(eos="twice"),), source=ROW + "; the trainer's documentation on EOS",
    claim="A completion ends with EOS at most once, and once where its text or the documentation says so.",
    covers=("RUN-TOK-EOS",), why="Without EOS the model never stops; with two it learns to write EOS after EOS.",
    bug="TRL 0.12 to 0.27 appended EOS after the chat template's own.",
    fix="Append EOS only where it is not there yet.",
)  # fmt: skip
def eos(case: Case) -> Comparison:
    return agree(case, "attended")


HEADERS = Template(user=(" k ", ""), assistant=(" l ", " m"), system=(" n ", ""), generation_prompt=" l ")
ENDING = replace(HEADERS, assistant=(" l ", " "), eos=True)
OPENING = replace(HEADERS, system=("<s> n ", ""))  # the template writes BOS itself, as Llama's does


def _chat(template: Template, *, adds_bos: bool = False) -> TrainExperiment:
    """A system message and three turns, then two replies."""
    asked = (Message("system", "o p"), Message("user", "a b"), Message("assistant", "g h"), Message("user", "i"))
    row = Row(asked, (Message("assistant", "c d"),), (Message("assistant", "e f"),))
    return words(row, tokenizer=replace(scenes.WORDS, template=template, adds_bos=adds_bos))


def clock(run: TrainExperiment) -> TrainExperiment:
    """The same through a clock table: what each scored token attended to shows every token before it, and where."""
    return replace(run, body=Body("clock"))


@check(
    "ROWS-CHAT", chapter="rows", stage="tokens", level="must", needs={"train.attended"},
    source=ROW + "; the chat template",
    scenes=[scene("a system message and three turns, then two replies", clock(_chat(HEADERS)), family="chat")],
    claim="A chat row is rendered by the template with its generation prompt, and the last reply alone is scored.",
    covers=("RUN-TOK-BOUNDARY",), why="Headers that are scored, or missing, shift what the model learns to say.",
    bug="mlx-lm-lora put another assistant header after each response.",
    fix="Render the prompt with the generation prompt, the whole chat without, and score the difference.",
)  # fmt: skip
def chat(case: Case) -> Comparison:
    # A header scored in both completions cancels in the gradient; it shows in the log-probs.
    told = [agree(case, "gradient"), agree(case, "attended")]
    return worst(told + [logged(case, f"logps/{side}") for side in ("chosen", "rejected")])


@check(
    "ROWS-CHAT-EOS", chapter="rows", stage="tokens", level="must", needs={"train.attended"},
    source=ROW + "; the chat template",
    scenes=[scene("a template that writes EOS itself", glass(_chat(ENDING)), family="chat")],
    rivals=(PAPER.but(template_eos="twice"),),
    claim="Where the chat template ends a reply with EOS, no second one is added.", covers=("RUN-TOK-EOS",),
    why="The model learns to write EOS after EOS.", bug="TRL 0.12 to 0.27 trained on two (its #4481).",
    fix="Leave chat rows to their template.",
)  # fmt: skip
def chat_eos(case: Case) -> Comparison:
    return agree(case, "attended")


MERGING = Tokenizer((*"abcxyz", "xy"), 64, kind="characters", merge=("x", "y"))


@check(
    "ROWS-BOUNDARY", chapter="rows", stage="tokens", level="must", needs={"train.gradient"}, source=ROW,
    scenes=[
        scene("a token that merges across the boundary, in one completion",
            letters(Row("abx", "yc", "za"), tokenizer=MERGING), family="boundary"),
        scene("and in both", letters(Row("abx", "yc", "yza"), tokenizer=MERGING), family="boundary"),
    ],
    claim="Where a token merges across the boundary, prompt and completion still spell the text, and both completions "
    "share one prompt.",
    covers=("RUN-TOK-BOUNDARY",), why="The two completions would be conditioned on different prompts.",
    bug="TRL 0.29 to 1.14 cut by the prompt's own length, and the completion lost tokens.",
    fix="Tokenize the joined text, and split where the token sequences part.",
)  # fmt: skip
def boundary(case: Case) -> Comparison:
    return tokens_agree(case)


def _truncation(theory: Theory) -> list:
    row = Row("a b c", " d e f", " h i j")  # of one length: sides may be cut each by its own excess
    return [
        scene(f"completions beyond the limit, {side}", glass(words(row, max_length=5, truncation=side)),
            family=f"truncation {side}")
        for side in ("keep_start", "keep_end")
    ]


@check(
    "ROWS-TRUNCATION", chapter="rows", stage="tokens", level="must", needs={"train.gradient"}, scenes=_truncation,
    draw=draws.long_rows,
    source=ROW + "; the limit that was asked for", rivals=(PAPER.but(truncation="none"),),
    claim="A row beyond the limit keeps the side that was asked for, and no token appears that was not in it.",
    covers=("RUN-TRUNC",), why="Truncation decides what long completions teach.",
    bug="OpenRLHF overwrites the last token that fits by EOS.", fix="Cut ids and masks together, once.",
)  # fmt: skip
def truncation(case: Case) -> Comparison:
    return worst([agree(case, "attended"), agree(replace(case, rivals=()), "gradient")])


def _long_prompt(theory: Theory) -> list:
    rows = (Row("a b c d e f", " g h", " i j"), Row("k l", " m n", " o p"))
    return [scene("a prompt as long as the limit, beside an ordinary row", words(*rows, max_length=5),
        family="long prompt")]


@check(
    "ROWS-LONG-PROMPT", chapter="rows", stage="tokens", level="must", needs={"train.gradient"}, scenes=_long_prompt,
    source=ROW + "; the limit that was asked for", hears_refusals=True,
    claim="A prompt that leaves no room for its completions spoils nothing: the pair is dropped, refused, or has no "
    "effect.",
    covers=("RUN-TRUNC", "LOGP-EDGE", "MET-RANGE"), why="A row without scored tokens divides zero by zero.",
    bug="A negative slice emptied the shorter completion (TRL #6548).", fix="Drop the pair, and say so.",
)  # fmt: skip
def long_prompt(case: Case) -> Comparison:
    seen = case.observed[0]
    if seen.refused:
        return Comparison("not-applicable", reason=seen.refused)
    if seen.died:
        return Comparison("error", reason=seen.raised or "")
    if seen.raised:
        return Comparison("pass", reason=f"refused: {seen.raised}")
    if not _finite(seen.gradient):
        return Comparison("fail", observed="not finite", expected="finite", where="gradient of the batch")
    due = case.predicted().gradient[11]  # after the ordinary row's prompt
    got = seen.gradient[11]
    size = float(abs(due).max())
    share = float(abs(got).max()) / size  # the long row may or may not count in the mean
    if share < 0.4:
        return Comparison("fail", observed=f"{share:.3g} of the gradient", expected="all of it",
            where="the ordinary row")
    return Comparison("pass", observed=f"{share:.3g} of the gradient", expected="one half or all of it")


def _finite(values: object) -> bool:
    import numpy as np

    return values is not None and bool(np.all(np.isfinite(values)))  # type: ignore[call-overload]


def _bos(theory: Theory) -> list:
    tokenizer = replace(scenes.WORDS, adds_bos=True)
    run = clock(words(Row("a b", " c d", " e f"), tokenizer=tokenizer))
    return [
        scene("a tokenizer that puts BOS before every text", run, family="bos"),
        scene("and a chat whose template writes BOS itself", clock(_chat(OPENING, adds_bos=True)), family="bos chat"),
    ]


@check(
    "ROWS-BOS", chapter="rows", stage="tokens", level="must", needs={"train.attended"}, scenes=_bos, source=ROW,
    rivals=(PAPER.but(bos="inside"),), claim="BOS stands at most once, at the start, and never inside a completion.",
    covers=("RUN-TOK-BOS",), why="A BOS inside the completion is scored and learned.",
    bug="axolotl put a BOS into the middle of every row, twice.",
    fix="Tokenize the completion with add_special_tokens=False.",
)  # fmt: skip
def bos(case: Case) -> Comparison:
    if case.experiments[0].tokenizer.template is not None:
        return agree(replace(case, rivals=()), "attended")
    return worst([agree(case, "gradient"), agree(case, "attended")])
