"""What text does a conversation become, and where does the completion start in it?

Prompt and completion are never rendered apart: the completion is what the chat template appends to the prompt when it
renders the whole conversation. So no default system prompt and no second header can get into a completion.
"""

from collections.abc import Mapping
from typing import Any

from reference_impl.columns import Message
from reference_impl.datareport import RowNote
from reference_impl.rows import ChatPair, TextPair, common_prefix_length, dropped
from reference_impl.sources import DataError

RESERVED = (
    "conversation", "tokenize", "add_generation_prompt", "continue_final_message", "tools", "return_dict",
    "padding", "truncation", "max_length", "return_tensors", "return_assistant_tokens_mask",
)  # fmt: skip


def check_template(tokenizer: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that cannot render chats, and arguments that would change how they are rendered."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the rows are chats, but the tokenizer has no chat template; take the tokenizer of a chat model, set "
            "tokenizer.chat_template, or give prompt, chosen and rejected as texts"
        )
    reserved = [k for k in kwargs if k in RESERVED]
    if reserved:
        raise DataError(
            f"chat_template_kwargs may not set {', '.join(reserved)}, which the loader decides; "
            "allowed are the template's own variables"
        )


def render(pair: ChatPair, tokenizer: Any, kwargs: Mapping[str, Any]) -> TextPair | RowNote:
    """Texts of a chat pair; `chosen` and `rejected` are whole conversations, `prompt` ends with the assistant's header.

    Some templates render the assistant's header differently when the reply follows (a generation prompt that opens a
    thought, for instance). Then the prompt ends where the three renderings part, after the last whole message at the
    earliest; a template that changes earlier messages is refused, for the row.
    """
    options = {**kwargs, "tools": list(pair.tools)} if pair.tools else dict(kwargs)

    def text(messages: tuple[Message, ...], header: bool) -> str:
        return tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=header, **options
        )

    unanswered = ""
    try:
        prompt = text(pair.prompt, True) if pair.prompt else ""
        chosen, rejected = (text(pair.prompt + side, False) for side in (pair.chosen, pair.rejected))
        if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
            parts = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
            whole = len(text(pair.prompt, False))
            if parts < whole:
                return dropped(pair, "template_rewrites", prompt[max(0, parts - 20) : parts + 40])
            prompt, unanswered = prompt[:parts], prompt[parts:]
    except Exception as error:  # jinja raises what the template raises, and templates raise anything
        return dropped(pair, "template_refuses", f"{type(error).__name__}: {error}")
    if not prompt:  # no prompt messages: what both sides start with (header, default system prompt) is the prompt
        prompt = chosen[: common_prefix_length(chosen, rejected)]
    if chosen == rejected:
        return dropped(pair, "identical", chosen[len(prompt) :])
    return TextPair(pair.row, pair.place, prompt, chosen, rejected, unanswered)
