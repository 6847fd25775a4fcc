"""Logits of a few chosen tokens: for the letters of a question with options, 5 rows of the head instead of 262,144."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BadInput
from ..models.lm import LM
from ..progress import Progress
from .forward import HEAD_CHUNK, capped, logits
from .interventions import Prompt, Rule, combined, initial_states, streams
from .states import last_states
from .tokens import Row, encode_all


@torch.no_grad()
def next_logits(
    lm: LM,
    prompts: Sequence[Prompt],
    token_ids: Sequence[int],
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Tensor:
    """Logits [n, k] fp32 of k tokens behind each prompt, from the model with everything that is on it.

    A decode patch gives them up to a constant per prompt, and reads ``InContext``.

    Raises:
        BadInput: a decode patch is on and a prompt is a plain text.
    """
    inputs, wanted = streams(lm, prompts), list(token_ids)
    states = last_states(lm, inputs, batch_size=batch_size, progress=progress)  # [streams, n, d]
    return combined_options(lm, states, inputs.rules, wanted)


def combined_options(lm: LM, states: Tensor, rules: Sequence[Rule], token_ids: Sequence[int]) -> Tensor:
    """Logits [n, k] fp32 of k first tokens under the rules.

    Args:
        states: [streams, n, d] after the last block; one stream without rules, two with.
    """
    wanted, state = list(token_ids), initial_states(lm, rules, states.shape[1])
    if not all(rule.pointwise for rule in rules):  # the rule looks at all tokens
        return torch.cat([z[:, wanted] for _, z in combined(lm, states.to(lm.dtype), rules, state)])
    out = option_logits(lm, states.flatten(0, 1), wanted).view(*states.shape[:2], -1)  # [streams, n, k]
    with_context = out[0]
    for rule, known in zip(rules, state, strict=True):
        with_context = rule.combine(with_context, out[-1], known)
    return with_context


@torch.no_grad()
def option_logits(lm: LM, hidden: Tensor, token_ids: Sequence[int]) -> Tensor:
    """``logits`` [n, k] of k tokens: only their rows of the head run, where it is a plain linear layer.

    The rows are multiplied in fp32, so that close options do not tie in bf16.
    """
    head, wanted = lm.module(lm.layout.head), list(token_ids)
    if type(head) is not nn.Linear or head.weight.is_meta or head._forward_hooks or head._forward_pre_hooks:
        # a quantised, offloaded or hooked head: its rows alone would miss what else it does
        return torch.cat([logits(lm, part.to(lm.dtype))[:, wanted] for part in hidden.split(HEAD_CHUNK)])
    out = hidden.to(lm.dtype)
    for name in lm.layout.tail[:-1]:
        out = lm.module(name)(out)
    bias = None if head.bias is None else head.bias[wanted].float()
    return capped(lm, F.linear(out.float(), head.weight[wanted].float(), bias))  # [n, k]


def option_tokens(lm: LM, prompt: str, options: Sequence[str]) -> tuple[Row, tuple[int, ...]]:
    """Where options part behind a prompt: the tokens before that place, and each option's token there.

    Two options may still share theirs. ``target`` says where the options begin.

    Raises:
        BadInput: an option tokenises to nothing, or two are the same.
    """
    inputs = encode_all(lm, [prompt] * len(options), options)
    columns = zip(*(row.ids for row in inputs), strict=False)
    at = next((k for k, tokens in enumerate(columns) if len(set(tokens)) > 1), None)
    if at is None:
        raise BadInput(f"the options {', '.join(options)} cannot be told apart behind a prompt. Give different ones.")
    return Row(inputs[0].ids[:at], inputs[0].target), tuple(row.ids[at] for row in inputs)
