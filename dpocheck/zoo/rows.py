"""How do rows go wrong on their way to tokens?  Broken parts: render, tokenize, truncate."""

from __future__ import annotations

from dataclasses import replace

from dpocheck.oracle.theory import PAPER
from dpocheck.zoo.registry import mini, specimen

# -------------------------------------------------------------------------------------------------------------- render


@specimen("swaps-columns", part="render", caught_by="ROWS-COLUMNS", theory=PAPER.but(columns="swapped"))
def swaps_columns(row, tokenizer):
    """The columns chosen and rejected are exchanged when the rows are read."""
    return mini.render({**row, "chosen": row["rejected"], "rejected": row["chosen"]}, tokenizer)


def _implicit(row):
    return row.get("prompt") is None


@specimen(
    "wraps-around-at-a-space",
    part="render",
    caught_by="ROWS-ROUND-TRIP",
    theory=PAPER.but(prefix="loses-shared"),
    imitates="huggingface/trl#6079",
)
def wraps_around_at_a_space(row, tokenizer):
    """Without a shared start, an index of -1 makes the prompt out of one completion and cuts the other to its end."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not _implicit(row) or not isinstance(chosen, str):
        return mini.render(row, tokenizer)
    index = 0
    for index in range(min(len(chosen), len(rejected))):
        if chosen[index] != rejected[index]:
            if chosen[index - 1] == " ":
                index -= 1
            break
    split = {"prompt": chosen[:index], "chosen": chosen[index:], "rejected": rejected[index:]}
    return mini.render(split, tokenizer)


@specimen(
    "drops-a-shared-item",
    part="render",
    caught_by="ROWS-ROUND-TRIP",
    imitates="huggingface/trl#6703",
)
def drops_a_shared_item(row, tokenizer):
    """A loop index is taken for a length: the last item that both completions share is in no part of the row."""
    if not _implicit(row):
        return mini.render(row, tokenizer)
    shared = mini.common_prefix(row["chosen"], row["rejected"])
    split = {side: row[side][shared:] for side in ("chosen", "rejected")}
    return mini.render({"prompt": row["chosen"][: max(0, shared - 1)], **split}, tokenizer)


@specimen("strips-completions", part="render", caught_by="ROWS-EOS", theory=PAPER.but(spaces="stripped"))
def strips_completions(row, tokenizer):
    """White space at the ends of a completion is removed."""
    if _implicit(row) or not isinstance(row["chosen"], str):
        return mini.render(row, tokenizer)
    return mini.render({**row, "chosen": row["chosen"].strip(), "rejected": row["rejected"].strip()}, tokenizer)


@specimen(
    "puts-a-space-between", part="render", caught_by="ROWS-ROUND-TRIP", theory=PAPER.but(spaces="one-between")
)
def puts_a_space_between(row, tokenizer):
    """Prompt and completions lose the white space at their ends, and one space joins them."""
    if _implicit(row) or not isinstance(row["chosen"], str):
        return mini.render(row, tokenizer)
    stripped = {side: row[side].strip() for side in ("prompt", "chosen", "rejected")}
    return mini.render({**row, **stripped, "prompt": stripped["prompt"] + " "}, tokenizer)


@specimen("scores-the-assistant-header", part="render", caught_by="ROWS-CHAT", imitates="oumi-ai/oumi@0.9")
def scores_the_assistant_header(row, tokenizer):
    """The prompt is rendered without what asks for a reply, so that the assistant's header counts as completion."""
    text = mini.render(row, tokenizer)
    if not text.templated or not row.get("prompt"):
        return text
    return replace(text, prompt=tokenizer.apply_chat_template(row["prompt"], tokenize=False))


@specimen(
    "header-after-the-reply",
    part="render",
    caught_by="ROWS-CHAT-EOS",
    imitates="Goekdeniz-Guelmez/mlx-lm-lora#77",
)
def header_after_the_reply(row, tokenizer):
    """Finished chats are rendered with what asks for a reply: one more header after each completion."""
    text = mini.render(row, tokenizer)
    if not text.templated or _implicit(row):
        return text
    whole = {
        side: tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False, add_generation_prompt=True)
        for side in ("chosen", "rejected")
    }
    return replace(text, **whole)


@specimen("drops-the-system-message", part="render", caught_by="ROWS-CHAT")
def drops_the_system_message(row, tokenizer):
    """Messages of the role system are left out."""
    if _implicit(row) or isinstance(row["prompt"], str):
        return mini.render(row, tokenizer)
    return mini.render({**row, "prompt": [m for m in row["prompt"] if m["role"] != "system"]}, tokenizer)


@specimen("keeps-only-the-last-turn", part="render", caught_by="ROWS-CHAT-EOS")
def keeps_only_the_last_turn(row, tokenizer):
    """Only the last message of the prompt is rendered: earlier turns are forgotten."""
    if _implicit(row) or isinstance(row["prompt"], str):
        return mini.render(row, tokenizer)
    return mini.render({**row, "prompt": row["prompt"][-1:]}, tokenizer)


@specimen("ignores-the-template", part="render", caught_by="ROWS-CHAT")
def ignores_the_template(row, tokenizer):
    """Messages are joined as plain text: the chat template is not used."""
    if isinstance(row["chosen"], str):
        return mini.render(row, tokenizer)
    plain = {key: " ".join(m["content"] for m in row[key]) for key in ("prompt", "chosen", "rejected") if row.get(key)}
    if "prompt" in plain:
        plain["prompt"] += " "
    return mini.render(plain, tokenizer)


# ------------------------------------------------------------------------------------------------------------ tokenize


def _sides(example, change):
    return replace(example, chosen=change(example.chosen), rejected=change(example.rejected))


@specimen("eos-never", part="tokenize", caught_by="ROWS-EOS", theory=PAPER.but(eos="none"))
def eos_never(text, tokenizer, row):
    """No end-of-sequence token closes a text completion, though the documentation promises one."""
    example = mini.tokenize(text, tokenizer, row)
    written = text.templated or text.chosen.endswith(tokenizer.eos_token)
    return example if written else _sides(example, lambda side: replace(side, ids=side.ids[:-1]))


@specimen(
    "eos-twice",
    part="tokenize",
    caught_by="ROWS-EOS",
    theory=PAPER.but(eos="twice"),
    imitates="OpenRLHF/OpenRLHF@01b8a23d",
)
def eos_twice(text, tokenizer, row):
    """A text completion is closed by two end-of-sequence tokens."""
    example = mini.tokenize(text, tokenizer, row)
    if text.templated:
        return example
    return _sides(example, lambda side: replace(side, ids=(*side.ids, tokenizer.eos_token_id)))


@specimen("eos-after-its-own", part="tokenize", caught_by="ROWS-EOS", theory=PAPER.but(eos="always"))
def eos_after_its_own(text, tokenizer, row):
    """End of sequence is appended to every text completion, to one that ends with it as well."""
    example = mini.tokenize(text, tokenizer, row)
    if text.templated:
        return example
    eos = tokenizer.eos_token_id
    written = text.chosen.endswith(tokenizer.eos_token), text.rejected.endswith(tokenizer.eos_token)
    chosen, rejected = (
        replace(side, ids=(*side.ids, *([eos] if own else [])))
        for side, own in zip((example.chosen, example.rejected), written, strict=True)
    )
    return replace(example, chosen=chosen, rejected=rejected)


def _eos_moved(text, tokenizer, row, counted):
    """No end of sequence is appended; one stands before the completion, in it where `counted`."""
    example = mini.tokenize(text, tokenizer, row)
    if text.templated:
        return example

    def moved(side, string):
        own = string.endswith(tokenizer.eos_token)
        ids = side.ids if own else side.ids[:-1]
        ids = (*ids[: side.start], tokenizer.eos_token_id, *ids[side.start :])
        return replace(side, ids=ids, start=side.start if counted else side.start + 1)

    return replace(
        example, chosen=moved(example.chosen, text.chosen), rejected=moved(example.rejected, text.rejected)
    )


@specimen("eos-between", part="tokenize", caught_by="ROWS-EOS", theory=PAPER.but(eos="between"))
def eos_between(text, tokenizer, row):
    """End of sequence is put before the completion, as its first token, and not at its end."""
    return _eos_moved(text, tokenizer, row, counted=True)


@specimen("eos-after-the-prompt", part="tokenize", caught_by="ROWS-EOS", theory=PAPER.but(eos="after-prompt"))
def eos_after_the_prompt(text, tokenizer, row):
    """End of sequence closes the prompt, and not the completion."""
    return _eos_moved(text, tokenizer, row, counted=False)


@specimen(
    "eos-after-the-template",
    part="tokenize",
    caught_by="ROWS-CHAT-EOS",
    theory=PAPER.but(template_eos="twice"),
    imitates="huggingface/trl#4481",
)
def eos_after_the_template(text, tokenizer, row):
    """End of sequence is appended to a chat, after the template's own."""
    example = mini.tokenize(text, tokenizer, row)
    if not text.templated:
        return example
    return _sides(example, lambda side: replace(side, ids=(*side.ids, tokenizer.eos_token_id)))


@specimen("eos-in-place-of-the-last-token", part="tokenize", caught_by="ROWS-EOS", imitates="OpenRLHF/OpenRLHF#1311")
def eos_in_place_of_the_last_token(text, tokenizer, row):
    """The last token of a completion is overwritten by end-of-sequence."""
    example = mini.tokenize(text, tokenizer, row)
    if text.templated:
        return example
    return _sides(example, lambda side: replace(side, ids=(*side.ids[:-2], tokenizer.eos_token_id)))


@specimen("row-of-eos", part="tokenize", caught_by="ROWS-ROUND-TRIP", imitates="OpenRLHF/OpenRLHF@2eda1129")
def row_of_eos(text, tokenizer, row):
    """An assignment to the last token overwrites the whole row with end-of-sequence."""
    example = mini.tokenize(text, tokenizer, row)
    return _sides(example, lambda side: replace(side, ids=(tokenizer.eos_token_id,) * len(side.ids)))


@specimen(
    "bos-inside",
    part="tokenize",
    caught_by="ROWS-BOS",
    theory=PAPER.but(bos="inside"),
    imitates="axolotl-ai-cloud/axolotl#1733",
)
def bos_inside(text, tokenizer, row):
    """The completion is tokenised as a text of its own: the tokenizer puts its beginning-of-sequence before it."""
    example = mini.tokenize(text, tokenizer, row)
    if text.templated or tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return example
    bos = (tokenizer.bos_token_id,)
    return _sides(example, lambda side: replace(side, ids=side.ids[: side.start] + bos + side.ids[side.start :]))


@specimen("bos-before-the-template", part="tokenize", caught_by="ROWS-BOS", imitates="OpenRLHF/OpenRLHF@e8bd0b76")
def bos_before_the_template(text, tokenizer, row):
    """A chat that the template has opened is opened once more by the tokenizer."""
    example = mini.tokenize(text, tokenizer, row)
    if not text.templated or tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return example
    bos = (tokenizer.bos_token_id,)
    return _sides(example, lambda side: mini.Side(bos + side.ids, side.start + 1))


@specimen("splits-at-the-prompts-length", part="tokenize", caught_by="ROWS-BOUNDARY", imitates="huggingface/trl#5213")
def splits_at_the_prompts_length(text, tokenizer, row):
    """The joint tokens are split at the length of the prompt's own tokens: after a merge, the completion loses one."""
    example = mini.tokenize(text, tokenizer, row)
    start = len(tokenizer(text.prompt, add_special_tokens=not text.templated)["input_ids"])
    return _sides(example, lambda side: replace(side, start=start))


@specimen("prompts-differ-between-sides", part="tokenize", caught_by="ROWS-BOUNDARY", imitates="huggingface/trl#1153")
def prompts_differ_between_sides(text, tokenizer, row):
    """Chosen is tokenised with its prompt, rejected apart from it: the two prompts differ where tokens merge."""
    example = mini.tokenize(text, tokenizer, row)
    if text.templated:
        return example
    prompt = tuple(tokenizer(text.prompt)["input_ids"])
    completion = tuple(tokenizer(text.rejected[len(text.prompt) :], add_special_tokens=False)["input_ids"])
    return replace(example, rejected=mini.Side((*prompt, *completion, tokenizer.eos_token_id), len(prompt)))


# ------------------------------------------------------------------------------------------------------------ truncate


@specimen(
    "max-length-ignored",
    part="truncate",
    caught_by="ROWS-TRUNCATION",
    theory=PAPER.but(truncation="none"),
    imitates="axolotl-ai-cloud/axolotl#1584",
)
def max_length_ignored(example, recipe):
    """`max_length` is accepted and never used."""
    return example


@specimen(
    "truncation-side-ignored",
    part="truncate",
    caught_by="ROWS-TRUNCATION",
    theory=PAPER.but(truncation="keep_start"),
    imitates="huggingface/trl#2538",
)
def truncation_side_ignored(example, recipe):
    """Whatever side is asked for, the start is kept."""
    return mini.truncate(example, replace(recipe, truncation="keep_start"))


@specimen(
    "cuts-both-by-the-chosen-surplus",
    part="truncate",
    caught_by="ROWS-TRUNCATION",
    imitates="hiyouga/LLaMA-Factory#4402",
)
def cuts_both_by_the_chosen_surplus(example, recipe):
    """How much is cut is computed for the chosen side and applied to both."""
    if recipe.max_length is None:
        return example
    surplus = max(0, len(example.chosen.ids) - recipe.max_length)
    return _sides(example, lambda side: replace(side, ids=side.ids[: len(side.ids) - surplus]))


@specimen(
    "slices-with-a-negative-number", part="truncate", caught_by="ROWS-TRUNCATION", imitates="huggingface/trl#6548"
)
def slices_with_a_negative_number(example, recipe):
    """What the longer side leaves over is a negative length for the shorter one, whose completion is emptied."""
    if recipe.max_length is None:
        return example
    longest = max(len(example.chosen.ids), len(example.rejected.ids))

    def cut(side):
        completion = side.ids[side.start :]
        kept = len(completion) - max(0, longest - recipe.max_length)
        return replace(side, ids=side.ids[: side.start] + completion[: max(0, kept)])

    return _sides(example, cut)


@specimen("limits-the-completion-alone", part="truncate", caught_by="ROWS-TRUNCATION")
def limits_the_completion_alone(example, recipe):
    """`max_length` is applied to the completion, not to prompt and completion."""
    if recipe.max_length is None:
        return example
    return _sides(example, lambda side: replace(side, ids=side.ids[: side.start + recipe.max_length]))


@specimen("truncates-unasked", part="truncate", caught_by="ROWS-EOS")
def truncates_unasked(example, recipe):
    """Rows are cut at four tokens where no limit was asked for."""
    return mini.truncate(example, replace(recipe, max_length=recipe.max_length or 4)) or example


@specimen("rejected-cut-only", part="truncate", caught_by="ROWS-TRUNCATION", imitates="hiyouga/LLaMA-Factory#10544")
def rejected_cut_only(example, recipe):
    """A pair that is too long is cut on its rejected side only."""
    cut = mini.truncate(example, recipe)
    return None if cut is None else replace(cut, chosen=example.chosen)


_WAITING: list = []  # masks of dropped pairs that the next pair will get


@specimen("masks-out-of-step-after-a-drop", part="truncate", caught_by="ROWS-LONG-PROMPT")
def masks_out_of_step_after_a_drop(example, recipe):
    """A pair whose prompt fills the limit is dropped from the ids but not from the masks: the next pair gets them."""
    if example.row == 0:
        _WAITING.clear()
    cut = mini.truncate(example, recipe)
    _WAITING.append(example)
    mask = _WAITING[0]
    if cut is None:
        return None
    _WAITING.pop(0)

    def under(side, start):
        return replace(side, start=min(len(side.ids), start))

    return (
        cut
        if mask is example
        else replace(
            cut, chosen=under(cut.chosen, mask.chosen.start), rejected=under(cut.rejected, mask.rejected.start)
        )
    )
