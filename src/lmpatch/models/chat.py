"""Chat templates: what a chat model reads around a user's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PLACE = "\u2983words\u2984"
"""Stands for the user's words while the template is rendered."""


@dataclass(frozen=True)
class ChatFrame:
    """A template as two texts: the model reads ``head + words + tail`` and answers from there."""

    head: str
    tail: str


def chat_frame(tokenizer: Any) -> ChatFrame | None:
    """The tokenizer's chat template for one message of a user; None where it has none, or refuses such a message.

    A start token that the tokenizer adds by itself is left out of the head, so that there is one and not two.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    message = [{"role": "user", "content": PLACE}]
    try:
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template is a program of its own: what it raises is its author's choice
        return None
    head, place, tail = text.partition(PLACE)
    if not place:
        return None
    start = tokenizer.bos_token
    if start and head.startswith(start) and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
        head = head.removeprefix(start)
    return ChatFrame(head, tail)
