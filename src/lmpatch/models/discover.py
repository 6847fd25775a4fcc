"""``discover``: find the parts of a decoder by structure, and prove them by running.

Nothing is looked up by name. The model runs once on a few tokens with a hook on every module; the order of calls and
their widths tell the parts apart; further runs with small changes check that each part does what its name says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnknownLayout
from .calls import Call, Change, embed_scale, forward, mixes_tokens, post_norm, probe_ids, trace
from .layout import Layout

REMEDY = "If the model is a dense decoder, write its Layout by hand and pass it: wrap(model, tokenizer, layout=...)."


def discover(model: Any, tokenizer: Any = None) -> Layout:
    """Find the parts of a causal LM by structure, and verify them: three forwards of five tokens and some partial ones.

    Args:
        model: a transformers causal LM in evaluation mode. It is left as it was.
        tokenizer: makes the probe's token ids from a sentence; without it ids are spread over the vocabulary.
    Raises:
        UnknownLayout: the blocks hold experts, or the parts cannot be told apart, or a check fails. The message says
            what was found.
    """
    names = {module: name for name, module in model.named_modules()}
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    if not names.keys() >= set(modules):
        raise UnknownLayout(f"{type(model).__name__} has no language-model head. Load it as a causal LM.")
    if modules[0].weight.is_meta:
        raise UnknownLayout("the token embedding is offloaded. Keep it on a device: name one in device_map.")
    embed, head = (names[module] for module in modules)
    ids = probe_ids(model, tokenizer)
    calls = trace(model, ids)
    blocks = _blocks(model, Counter(call.name for call in calls))
    _refuse_experts(model, blocks)
    last = max(i for i, call in enumerate(calls) if call.name == blocks[-1])
    d_model = calls[last].d_out
    parts = [_parts(block, [c for c in calls if c.name.startswith(f"{block}.")], d_model) for block in blocks]
    downs, ups, attn_outs, attn_ins, widths = zip(*parts, strict=True)
    tail = [call.name for call in calls[last + 1 :] if call.leaf]
    if head not in tail:
        raise UnknownLayout(f"the head {head} does not run after the last block. Found: {tail}. {REMEDY}")
    tail = tail[: tail.index(head) + 1]
    weights = {name: getattr(model.get_submodule(name), "weight", None) for name in tail}
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    a, b = (module.weight for module in modules)
    layout = Layout(
        blocks=blocks,
        downs=downs,
        ups=ups,
        attn_outs=attn_outs,
        attn_ins=attn_ins,
        embed=embed,
        head=head,
        final_norm=next((name for name, w in weights.items() if isinstance(w, Tensor) and w.ndim == 1), None),
        tail=tuple(tail),
        softcap=float(softcap) if softcap else None,
        d_model=d_model,
        widths=widths,
        vocab=next(call.d_out for call in reversed(calls) if call.name == head),
        transposed=hasattr(model.get_submodule(downs[0]), "nf"),  # Conv1D is the projection that counts by nf
        post_norm=post_norm(model, ids, blocks[0], downs[0]),
        embed_scale=embed_scale(model, ids, embed, blocks[0]),
        tied=a is b or (a.data_ptr() == b.data_ptr() != 0 and a.shape == b.shape),
    )
    verify(model, layout, ids)
    return layout


def verify(model: Any, layout: Layout, ids: Tensor) -> None:
    """Check a layout by running it; raises ``UnknownLayout`` at the first promise that fails.

    Every named module is called exactly once per forward; a hook that changes nothing changes no bit; the tail turns
    the last block's output into the model's logits; attention moves information between tokens and the MLP does not.
    """
    singles = (layout.embed, *layout.blocks, *layout.downs, *layout.attn_outs, *layout.tail)
    names = (*singles, *(n for group in (*layout.ups, *layout.attn_ins) for n in group))
    if len(layout.widths) != layout.n_layers:
        raise UnknownLayout(f"the layout has {layout.n_layers} blocks and {len(layout.widths)} widths. Name one each.")
    known = {name for name, _ in model.named_modules()}
    if absent := [name for name in names if name not in known]:
        raise UnknownLayout(f"the layout names modules that the model does not have: {absent[:4]}.")
    counts: Counter[str] = Counter()
    states: list[Tensor] = []

    def watch(name: str) -> Change:
        def run(state: Tensor) -> Tensor:
            counts[name] += 1
            if name == layout.blocks[-1]:
                states.append(state)
            return state

        return run

    plain = forward(model, ids)
    watched = forward(model, ids, {name: watch(name) for name in names})
    odd = {name: counts[name] for name in names if counts[name] != 1}
    if odd:
        raise UnknownLayout(f"every part must run once per forward, but calls were {odd}. {REMEDY}")
    if not torch.equal(plain, watched):
        raise UnknownLayout("hooks that change nothing change the logits, so nothing measured by hooks would be true.")
    if states[0].shape != (*ids.shape, layout.d_model):
        raise UnknownLayout(f"{layout.blocks[-1]} returns {tuple(states[0].shape)}, not (1, T, d_model). {REMEDY}")
    _check_tail(model, layout, states[0], plain)
    if mixes_tokens(model, ids, layout.ups[0], layout.downs[0]):
        raise UnknownLayout(f"{layout.ups[0]} feed {layout.downs[0]} across tokens, so they are no MLP. {REMEDY}")
    if not mixes_tokens(model, ids, layout.attn_ins[0], layout.attn_outs[0]):
        raise UnknownLayout(f"{layout.attn_ins[0]} reach {layout.attn_outs[0]} at the same token only. {REMEDY}")


def _blocks(model: Any, ran: Counter[str]) -> tuple[str, ...]:
    """The longest ModuleList of one class whose members all ran once; lists inside another list are no candidates."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    runs = [
        tuple(f"{name}.{i}" for i in range(len(members)))
        for name, members in outer.items()
        if len({type(member) for member in members}) == 1 and all(ran[f"{name}.{i}"] == 1 for i in range(len(members)))
    ]
    if not runs:
        listed = ", ".join(f"{n} ({len(m)})" for n, m in lists.items()) or "none"
        raise UnknownLayout(f"no list of equal blocks that each run once. ModuleLists: {listed}. {REMEDY}")
    return max(runs, key=len)


def _refuse_experts(model: Any, blocks: Sequence[str]) -> None:
    for block in blocks:
        for name, module in model.get_submodule(block).named_modules():
            fused = [n for n, p in module.named_parameters(recurse=False) if p.ndim == 3]
            listed = isinstance(module, nn.ModuleList) and len(module) > 1
            if listed or (fused and not isinstance(module, nn.Conv1d)):
                what = f"{block}.{name}" + (f" with fused weights {fused}" if fused else f", a list of {len(module)}")
                raise UnknownLayout(
                    f"mixture of experts: found {what}. A block then has no single down-projection, and no method "
                    "here can write into it. Use a dense model."
                )


def _parts(block: str, calls: Sequence[Call], d_model: int) -> tuple[str, tuple[str, ...], str, tuple[str, ...], int]:
    """Down, ups, attention's output and its inputs, and the MLP's width, told apart by the order of calls.

    Attention runs first, also in parallel blocks. The down-projection is the last one of width ``d_model``. Before it
    stand one or more projections that read the same values: gate and up. The one before them is attention's output,
    and those before that its inputs.
    """
    linears = [call for call in calls if call.projection]
    down = max((i for i, call in enumerate(linears) if call.d_out == d_model), default=0)
    first = down - 1
    while first > 0 and linears[first].same_input:
        first -= 1
    ups, attn_out = linears[max(first, 0) : down], linears[first - 1] if first > 0 else None
    ins = tuple(call.name for call in linears[: max(first - 1, 0)] if call.d_in == d_model)
    width = linears[down].d_in if linears else 0
    fits = all(up.d_in == d_model and up.d_out in (width, 2 * width) for up in ups)
    if not (ups and ins and fits and attn_out and attn_out.d_out == d_model):
        order = ", ".join(f"{call.name.removeprefix(f'{block}.')} {call.d_in}->{call.d_out}" for call in linears)
        raise UnknownLayout(f"{block} has no attention followed by an MLP. Projections in order: {order}. {REMEDY}")
    return linears[down].name, tuple(up.name for up in ups), attn_out.name, ins, width


def _check_tail(model: Any, layout: Layout, state: Tensor, logits: Tensor) -> None:
    with torch.no_grad():
        for name in layout.tail:
            state = model.get_submodule(name)(state)
        if layout.softcap is not None:
            state = layout.softcap * torch.tanh(state / layout.softcap)
        error = float((state.float() - logits.float()).norm() / logits.float().norm())
    if not error < (1e-4 if state.dtype == torch.float32 else 2e-2):
        steps = " -> ".join(layout.tail)
        raise UnknownLayout(
            f"{steps} miss the model's logits by {error:.1%}. Something else changes them, such as a logit scale; only "
            "the soft-cap config.final_logit_softcapping is supported."
        )
