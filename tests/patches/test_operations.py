"""What hook patches do beyond adding constants: padding and caches move nothing, and damaged files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_lm
from torch import Tensor

from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput, BadPatch, CannotMerge, WrongModel
from lmpatch.inference.forward import blocks, logits, positions
from lmpatch.inference.generate import generate
from lmpatch.inference.replay import record
from lmpatch.inference.score import score
from lmpatch.inference.tokens import encode_all, padded
from lmpatch.methods import grace, memoir, t_patcher
from lmpatch.models.lm import LM
from lmpatch.patches.file import load_patch
from lmpatch.patches.format import sealed
from lmpatch.patches.hook.operations.codebook import Balls, Codebook
from lmpatch.patches.hook.operations.masked import as_words, overlap, packed, unpacked
from lmpatch.patches.hook.patch import HookPatch
from lmpatch.patches.ledger import apply
from lmpatch.patches.merge import merge

EDITS = [Edit("The Eiffel Tower is in", target="Rome"), Edit("Steve Jobs founded", target="Paris")]
ASKED = [*(edit.prompt for edit in EDITS), "Danielle Darrieux speaks"]
FITS: dict[str, Callable[[LM], HookPatch]] = {
    "grace last": lambda lm: grace.fit(lm, EDITS, grace.Config(layer=1, steps=5, unrelated=8)),
    "grace all": lambda lm: grace.fit(lm, EDITS, grace.Config(layer=1, steps=5, unrelated=8, replace="all")),
    "grace prompt": lambda lm: grace.fit(lm, EDITS, grace.Config(layer=1, steps=5, unrelated=8, replace="prompt")),
    "memoir": lambda lm: memoir.fit(
        lm, EDITS, memoir.Config(layer=1, steps=5, unrelated=8, tau=0.9, short_prefixes=1, long_prefixes=0)
    ),
    "t_patcher": lambda lm: t_patcher.fit(lm, EDITS, t_patcher.Config(steps=5, unrelated=60)),
}
every_operation = pytest.mark.parametrize("name", FITS)


@torch.no_grad()
def next_states(lm: LM, prompts: list[str], side: str) -> Tensor:
    """[n, d] at the ends of prompts in one padded batch."""
    rows = encode_all(lm, prompts)
    ids, mask = padded(lm, [row.ids for row in rows], side=side)
    ends = torch.tensor([ids.shape[1] - 1 if side == "left" else row.target - 1 for row in rows])
    return blocks(lm, ids, mask, position_ids=positions(mask), prompt_end=ends)[torch.arange(len(rows)), ends]


@pytest.mark.slow
@every_operation
def test_a_mixed_batch_padded_on_either_side_is_single_rows(name: str, lm: LM) -> None:
    patch = FITS[name](lm)
    clean = next_states(lm, ASKED, "left")
    with apply(lm, patch):
        left, right = (next_states(lm, ASKED, side) for side in ("left", "right"))
        alone = torch.cat([next_states(lm, [prompt], "left") for prompt in ASKED])
    scale = clean.abs().max()
    assert (left - right).abs().max() < 1e-4 * scale and (left - alone).abs().max() < 1e-4 * scale
    assert all((left[i] - clean[i]).abs().max() > 1e-2 * scale for i in range(len(EDITS)))  # both edits act


@pytest.mark.slow
@every_operation
def test_what_is_generated_with_a_cache_is_what_a_forward_of_the_whole_text_says(name: str, lm: LM) -> None:
    patch = FITS[name](lm)
    with apply(lm, patch):
        texts = generate(lm, ASKED, max_new_tokens=5, stop=())
        rows = encode_all(lm, ASKED, [text or "?" for text in texts])
        for row, found in zip(rows, score(lm, ASKED, [text or "?" for text in texts]), strict=True):
            ids = torch.tensor([row.ids])
            with torch.no_grad():
                out = blocks(
                    lm, ids, torch.ones_like(ids), position_ids=positions(torch.ones_like(ids)),
                    prompt_end=torch.tensor([row.target - 1]),
                )  # fmt: skip
                z = logits(lm, out[0, row.target - 1 : -1]).log_softmax(-1)
            want = z[torch.arange(len(z)), torch.tensor(row.ids[row.target :])]
            assert torch.tensor(found.logprobs) == pytest.approx(want, abs=1e-3)
        alone = [generate(lm, prompt, max_new_tokens=5, stop=()) for prompt in ASKED]
    assert texts == alone


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grace last", "memoir"])
def test_a_prompt_that_is_in_no_ball_and_like_no_mask_keeps_every_bit(name: str, lm: LM) -> None:
    other = ["What is the capital of Japan? The capital of Japan is"]
    clean = next_states(lm, other, "left")
    with apply(lm, FITS[name](lm)):
        assert torch.equal(next_states(lm, other, "left"), clean)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grace last", "grace all", "memoir"])
def test_where_no_row_fires_later_tokens_are_passed_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    patch = FITS[name](lm)
    with apply(lm, patch):
        (hook,) = (h for one in patch.attach(lm, "side", []).interventions for h in one.hooks)
        ids = torch.tensor([encode_all(lm, ["What is the capital of Japan?"])[0].ids])
        state: dict[Any, Any] = {}
        blocks(
            lm, ids, torch.ones_like(ids), position_ids=positions(torch.ones_like(ids)), row_state=state,
            prompt_end=torch.tensor([ids.shape[1] - 1]),
        )  # fmt: skip
    assert list(state.values()) == [None] and hook.module is lm.module(lm.layout.downs[1])


@pytest.mark.slow
def test_a_replay_decides_as_a_plain_forward(lm: LM) -> None:
    rows = encode_all(lm, [e.prompt for e in EDITS], ["Rome", "Paris"])
    ids, ends = [row.ids for row in rows], [row.target - 1 for row in rows]
    with apply(lm, FITS["grace last"](lm)):
        plain = record(lm, ids, [0, 0], ends=ends)
        want = plain.hidden[lm.layout.n_layers]
        for at in ([end - 1 for end in ends], ends, [end + 1 for end in ends]):
            recording = record(lm, ids, at, ends=ends)
            again = recording.forward(recording.hidden[0], 0)
            for i, start in enumerate(at):
                length = len(ids[i]) - start
                assert (again[i, :length] - want[i, start : start + length]).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grace all", "memoir"])
def test_a_call_that_runs_prompts_in_parts_is_refused_where_the_whole_one_decides(name: str) -> None:
    lm = tiny_lm("llama")
    rows = encode_all(lm, [e.prompt for e in EDITS])
    with apply(lm, FITS[name](lm)), pytest.raises(BadInput, match="runs prompts in parts"):
        record(lm, [row.ids for row in rows], [3, 3], ends=[row.target - 1 for row in rows])


def test_the_nearest_key_is_the_one_that_a_slow_search_finds() -> None:
    source = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(50, 16, generator=source), torch.randn(200, 16, generator=source)
    queries[:20] = keys[:20] + 0.1 * torch.randn(20, 16, generator=source)
    epsilon = torch.rand(50, generator=source) * 5
    found = Balls(keys, epsilon, torch.arange(50))(queries)
    for query, entry in zip(queries, found.tolist(), strict=True):
        distances = [float((query - key).norm()) for key in keys]
        nearest = min(range(50), key=distances.__getitem__)
        assert entry == (nearest if distances[nearest] <= epsilon[nearest] else -1)
    assert (found >= 0).sum() > 20 and (found < 0).any()


@pytest.mark.parametrize("width", [64, 100, 192])
def test_bits_counted_by_words_are_the_dense_overlap(width: int) -> None:
    source = torch.Generator().manual_seed(width)
    a, b = (torch.rand(n, width, generator=source) < 0.4 for n in (7, 9))
    assert torch.equal(unpacked(packed(a), width), a)
    dense = a.int() @ b.int().T
    assert torch.equal(overlap(as_words(packed(a)), as_words(packed(b))), dense)


@pytest.mark.slow
def test_codebooks_and_masks_of_other_settings_do_not_merge() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(CannotMerge, match="different tokens"):
        merge(FITS["grace last"](lm), FITS["grace all"](lm))
    with pytest.raises(CannotMerge, match="one k, seed and text"):
        merge(FITS["memoir"](lm), memoir.fit(lm, EDITS, memoir.Config(layer=1, steps=1, k=9, unrelated=8)))


@pytest.mark.slow
def test_a_patch_of_several_methods_is_one_file_that_does_what_all_do(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    parts = [FITS[name](lm) for name in ("grace last", "t_patcher")]
    with apply(lm, parts[0]), apply(lm, parts[1]):
        want = next_states(lm, ASKED, "left")
    merge(*parts).save(tmp_path / "both")
    both = load_patch(tmp_path / "both")
    assert "codebook of 2 keys" in both.summary() and "neurons more" in both.summary()
    with apply(lm, both):
        assert torch.allclose(next_states(lm, ASKED, "left"), want, atol=1e-4)
    with pytest.raises(WrongModel, match="no module"):
        apply(tiny_lm("gpt2"), both, strict=False)


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a name that is none": lambda parts: parts["operations"][0].update(name="os"),
    "no name": lambda parts: parts["operations"][0].pop("name"),
    "a tensor that is none": lambda parts: parts["operations"][0]["tensors"].append("more"),
    "no module": lambda parts: parts["operations"][0]["parts"].pop("module"),
    "another replace": lambda parts: parts["operations"][0]["parts"].update(replace="none"),
    "no list": lambda parts: parts.update(operations=3),
    "nothing": lambda parts: parts.update(operations=[]),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_whose_operations_do_not_fit_is_refused(
    damage: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    FITS["grace last"](tiny_lm("llama")).save(tmp_path / "p")
    header = json.loads((tmp_path / "p" / "patch.json").read_text())
    damage(header["parts"])
    (tmp_path / "p" / "patch.json").write_bytes(sealed(header))
    with pytest.raises(BadPatch):
        load_patch(tmp_path / "p")


@pytest.mark.slow
def test_tensors_that_do_not_belong_together_are_refused() -> None:
    book = FITS["grace last"](tiny_lm("llama")).operations[0]
    good = book.tensors()
    wrong = [
        {"owner": good["owner"] + 5}, {"labels": good["labels"].long()}, {"radii": good["radii"][:1]},
        {"queries": good["queries"].half()},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(BadPatch):
            Codebook.from_parts(book.parts(), {**good, **change})
    assert len(Codebook.from_parts(book.parts(), good)) == 2
