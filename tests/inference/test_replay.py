"""Replay equals the plain forward, on every layout, from any block, with windows, padding and gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, tiny_lm

from lmpatch.inference import replay as _replay
from lmpatch.inference.forward import blocks, logits, nll, positions
from lmpatch.inference.replay import record
from lmpatch.inference.tokens import encode_all, pad
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM

PROMPTS = [
    "The Eiffel Tower is in Paris, the capital of France, and it is very tall",
    "The Space Needle is in Seattle",
    "Steve Jobs founded Apple. The mother tongue of Danielle Darrieux",
]
AT = [3, 0, 5]


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest entry: fp32 rounding of two orders of summation, and no more."""
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def plain(lm: LM, rows: list[tuple[int, ...]], hook: object = None, module: str = "") -> list[torch.Tensor]:
    """Each row alone, whole, without padding or cache: the reference."""
    out = []
    for i, row in enumerate(rows):
        ids, mask = pad([row], 0)
        handles = [Hook(lm.module(module), lambda m, a, o, i=i: hook(i, o))] if hook else []
        with torch.no_grad(), hooked(*handles):
            out.append(blocks(lm, ids, mask, position_ids=positions(mask))[0])
    return out


@pytest.mark.parametrize("start", [0, 2, 3])
def test_replay_from_any_block_equals_the_plain_forward(any_lm: LM, start: int) -> None:
    rows = [row.ids for row in encode_all(any_lm, PROMPTS)]
    recording = record(any_lm, rows, AT)
    with torch.no_grad():
        out = recording.forward(recording.hidden[start], start)
    for i, want in enumerate(plain(any_lm, rows)):
        same(out[i, : len(rows[i]) - AT[i]], want[AT[i] :])


def test_a_change_at_t_reaches_the_same_states_as_in_a_plain_forward(any_lm: LM) -> None:
    lm, layer = any_lm, 1
    rows = [row.ids for row in encode_all(lm, PROMPTS)]
    delta = torch.randn(len(rows), lm.layout.d_model)
    recording = record(lm, rows, AT, lowest=layer)

    def add(output: torch.Tensor) -> torch.Tensor:
        return output + delta.reshape(len(rows), 1, -1).reshape_as(output)

    with torch.no_grad():
        with hooked(Hook(lm.module(lm.layout.downs[layer]), lambda m, a, o: add(o))):
            column = recording.forward(recording.hidden[layer][:, :1], layer, end=layer + 1)
        out = recording.forward(torch.cat([column, recording.hidden[layer + 1][:, 1:]], 1), layer + 1)

    def add_plain(i: int, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed.reshape(-1, lm.layout.d_model)[AT[i]] += delta[i]
        return changed

    for i, want in enumerate(plain(lm, rows, add_plain, lm.layout.downs[layer])):
        same(out[i, : len(rows[i]) - AT[i]], want[AT[i] :])


def test_selected_rows_replay_as_before(lm: LM) -> None:
    rows = [row.ids for row in encode_all(lm, PROMPTS)]
    recording = record(lm, rows, AT)
    picked = recording.select(torch.tensor([2, 0, 2]))
    with torch.no_grad():
        out = recording.forward(recording.hidden[1], 1)
        again = picked.forward(picked.hidden[1], 1)
    same(again, out[[2, 0, 2]])


def test_replaying_twice_gives_the_same_bits(lm: LM) -> None:
    recording = record(lm, [row.ids for row in encode_all(lm, PROMPTS)], AT)
    with torch.no_grad():
        once, twice = (recording.forward(recording.hidden[1], 1) for _ in range(2))
    assert torch.equal(once, twice)


def test_recorded_keys_and_values_are_those_of_the_down_projection_at_t(any_lm: LM) -> None:
    lm = any_lm
    rows = [row.ids for row in encode_all(lm, PROMPTS)]
    recording = record(lm, rows, AT)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.append((args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])))

    with hooked(Hook(lm.module(lm.layout.downs[2]), keep)):
        plain(lm, rows)
    for i, (key, value) in enumerate(seen):
        same(recording.keys[2][i], key[AT[i]])
        same(recording.values[2][i], value[AT[i]])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_replay_equal_those_of_the_plain_forward(family: str) -> None:
    lm, layer = tiny_lm(family), 2
    row = encode_all(lm, PROMPTS[:1])[0].ids
    at, label = 4, torch.tensor([7])
    recording = record(lm, [row], [at], lowest=layer)
    fast = recording.hidden[layer].clone().requires_grad_()
    nll(lm, recording.forward(fast, layer)[:, -1], label).sum().backward()

    leaf: list[torch.Tensor] = []

    def watch(module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> object:
        inside = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        leaf.append(inside)
        return ((inside, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": inside})

    handle = Hook(lm.module(lm.layout.blocks[layer]), watch, kwargs=True, before=True)
    with hooked(handle):
        out = lm.model(torch.tensor([row])).logits[:, -1]
    torch.nn.functional.cross_entropy(out.float(), label).backward()
    same(fast.grad, leaf[0].grad[:, at:])


def test_the_head_loss_taken_in_chunks_has_the_gradient_of_the_whole(lm: LM) -> None:
    hidden = torch.randn(7, lm.layout.d_model)
    labels = torch.arange(7)
    chunked, whole = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    weights = torch.rand(7)
    value = (nll(lm, chunked, labels, chunk=3) * weights).sum()
    value.backward()
    reference = (torch.nn.functional.cross_entropy(logits(lm, whole), labels, reduction="none") * weights).sum()
    reference.backward()
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(chunked.grad, whole.grad)


def test_versions_of_a_token_side_by_side_equal_rows_of_their_own(any_lm: LM) -> None:
    rows = [row.ids for row in encode_all(any_lm, PROMPTS)]
    recording = record(any_lm, rows, [len(row) - 1 for row in rows])
    noise = torch.Generator().manual_seed(0)
    versions = recording.hidden[1] * torch.randn(len(rows), 5, 1, generator=noise)  # [n, 5, d]
    with torch.no_grad():
        together = recording.fan(versions, 1)
        for v in range(5):
            same(together[:, v : v + 1], recording.forward(versions[:, v : v + 1].clone(), 1))


def test_a_long_prefix_runs_in_pieces_and_no_mask_is_square(any_lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row.ids for row in encode_all(any_lm, PROMPTS[:1])]
    at = [len(rows[0]) - 1]
    whole = record(any_lm, rows, at)
    monkeypatch.setattr(_replay, "PIECE", 5)
    shapes: list[tuple[int, ...]] = []

    def see(module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        masks = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() == 4]
        shapes.extend(tuple(mask.shape) for mask in masks)

    with hooked(Hook(any_lm.module(any_lm.layout.blocks[0]), see, before=True, kwargs=True)):
        pieces = record(any_lm, rows, at)
    assert all(shape[2] <= 5 for shape in shapes)
    for i in range(any_lm.layout.n_layers):
        for a, b in zip(pieces.past[i], whole.past[i], strict=True):
            same(a[..., 1:, :], b[..., 1:, :])  # the first column is padding
    same(pieces.hidden[any_lm.layout.n_layers], whole.hidden[any_lm.layout.n_layers])


def test_a_recording_that_stops_early_replays_up_to_there(lm: LM) -> None:
    rows = [row.ids for row in encode_all(lm, PROMPTS)]
    whole, part = record(lm, rows, AT), record(lm, rows, AT, lowest=1, last=2)
    assert sorted(part.hidden) == [1, 2, 3] and (part.n, part.suffix) == (whole.n, whole.suffix)
    with torch.no_grad():
        same(part.bare().forward(part.hidden[1], 1, end=3), whole.hidden[3])
