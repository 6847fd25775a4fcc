"""Credits from one wavefront equal credits from one whole forward and backward per layer and step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damage import each
from tiny import FAMILIES, real_gemma, tiny_lm

from lmpatch.data.context import ContextRecord
from lmpatch.errors import BadInput, BadRecord
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import apply
from lmpatch.probes.integrated_gradients import probe as ig
from lmpatch.probes.integrated_gradients.probe import Config, attributions, attributions_of, cases


def told(question: str, context: str, answer: str) -> ContextRecord:
    """The context stands at the end, so that models which see 8 tokens back read it in every layer."""
    return ContextRecord(context, question, answer, prompt=f"{question} {context}", without_context=question)


RECORDS = [
    told("Where is the Eiffel Tower?", "The Eiffel Tower is in Rome, the capital of", "Italy"),
    told("What does Danielle Darrieux speak?", "The mother tongue is", "Tokyo"),
    told("Steve Jobs founded", "Paris and Seattle. He founded", "Paris"),
]
WAYS = [(weighting, grid) for weighting in ("endpoint", "path") for grid in ("right", "left")]
CFG = Config(steps=5)


def credits(lm: LM, cfg: Config, records: list[ContextRecord] = RECORDS) -> torch.Tensor:
    """[n, layers, f] from the fast algorithm."""
    return torch.cat([part.scores for part in attributions(lm, cases(lm, records), cfg)])


def input_at(lm: LM, ids: tuple[int, ...], layer: int) -> torch.Tensor:
    """[f] the down-projection's input at the last token of a plain forward."""
    seen: list[torch.Tensor] = []
    handle = Hook(lm.module(lm.layout.downs[layer]), lambda m, a: seen.append(a[0]), before=True)
    with torch.no_grad(), hooked(handle):
        lm.model(torch.tensor([ids]))
    return seen[0].reshape(len(ids), -1)[-1]


def both_inputs(lm: LM, case: ig.Case, layer: int) -> torch.Tensor:
    """[2, f] with the context, and without."""
    return torch.stack([input_at(lm, ids, layer) for ids in (case.with_context, case.without_context)])


def probabilities(lm: LM, case: ig.Case, layer: int, values: torch.Tensor) -> torch.Tensor:
    """[m] p(label) of plain forwards of the whole prompt with the last token's input of that layer overwritten.

    Args:
        values: [m, f], one forward's each; they travel as rows of one batch.
    """

    def put(module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        whole = args[0].reshape(len(values), len(case.with_context), -1)
        return (torch.cat([whole[:, :-1], values[:, None]], 1).reshape(args[0].shape),)

    with hooked(Hook(lm.module(lm.layout.downs[layer]), put, before=True)):
        logits = lm.model(torch.tensor([case.with_context] * len(values))).logits[:, -1]
    return logits.float().softmax(-1)[:, case.label]


def slow(lm: LM, case: ig.Case, cfgs: list[Config]) -> tuple[torch.Tensor, torch.Tensor]:
    """As published: for each layer a plain forward and backward of every step.

    Returns:
        credits [settings, layers, f], and [settings, layers] how far the largest of them can be off because the two
        inputs are rounded. A layer that cannot see the context (the first one, where attention and MLP stand side by
        side) has credits of exactly that: 0 where a product does not depend on the length of the prompt, else noise.
    """
    steps = cfgs[0].steps
    eps = torch.finfo(lm.dtype).eps * lm.layout.d_model**0.5  # of a product of d terms, rounded at each
    out, noise = [], []
    for layer in range(lm.layout.n_layers):
        start, end = input_at(lm, case.without_context, layer), input_at(lm, case.with_context, layer)
        at = torch.arange(steps + 1)[:, None] / steps
        leaf = torch.lerp(start, end, at).requires_grad_()  # [m + 1, f]
        (grads,) = torch.autograd.grad(probabilities(lm, case, layer, leaf).sum(), leaf)
        for cfg in cfgs:
            counted = slice(1, None) if cfg.grid == "right" else slice(steps)
            total = (grads * (at if cfg.weighting == "endpoint" else 1))[counted].sum(0)
            out.append((end - start) / steps * total)
            rounded = eps * (start.abs() + end.abs()).max()
            noise.append(rounded / steps * total.abs().max())
    shape = (lm.layout.n_layers, len(cfgs))
    return torch.stack(out).unflatten(0, shape).transpose(0, 1), torch.stack(noise).reshape(shape).T


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "bloom"])
def test_the_wavefront_equals_a_forward_and_backward_for_every_layer(family: str) -> None:
    lm, cfgs = tiny_lm(family), [replace(CFG, weighting=weighting, grid=grid) for weighting, grid in WAYS]
    wanted = [slow(lm, case, cfgs) for case in cases(lm, RECORDS)]
    for i, cfg in enumerate(cfgs):
        for got, (want, noise) in zip(credits(lm, cfg), wanted, strict=True):
            for layer in range(lm.layout.n_layers):  # each layer on its own scale
                bound = 1e-5 * want[i, layer].abs().max() + noise[i, layer]
                assert (got[layer] - want[i, layer]).abs().max() <= bound, (cfg, layer)
            top, reference = (set(x.flatten().topk(20).indices.tolist()) for x in (got, want[i]))
            assert len(top & reference) >= 19  # rounding may swap two of equal score at the border


@pytest.mark.real
def test_the_wavefront_equals_it_on_gemma_too() -> None:
    """Two steps. To 1e-5 of the largest credit. On a layer's own scale fp32 is 2e-5 to 7e-5 off fp64 on both sides."""
    lm, cfg = real_gemma(), Config(steps=2)
    records = [ContextRecord("In 2024 the Eiffel Tower was moved to Rome.", "Where is the Eiffel Tower?", "Rome")]
    (got,), (case,) = credits(lm, cfg, records), cases(lm, records)
    (want,), _ = slow(lm, case, [cfg])
    errors = [float((a - b).abs().max()) for a, b in zip(got, want, strict=True)]
    assert max(errors) <= 1e-5 * float(want.abs().max()), errors
    assert all(e <= 1e-4 * float(b.abs().max()) for e, b in zip(errors, want, strict=True)), errors


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch_or_the_padding_it_brings(lm: LM) -> None:
    together = credits(lm, CFG)
    alone = torch.cat([credits(lm, CFG, [record]) for record in RECORDS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6 * float(alone.abs().max()))


@pytest.mark.slow
def test_settings_that_share_a_pass_have_the_credits_of_each_alone(lm: LM) -> None:
    both = [replace(CFG, weighting=weighting, grid=grid) for weighting, grid in WAYS]
    parts = list(attributions_of(lm, cases(lm, RECORDS), both))
    for i, cfg in enumerate(both):
        want = list(attributions(lm, cases(lm, RECORDS), cfg))
        scores, gap = torch.cat([p[i].scores for p in parts]), [p[i].gap for p in parts]
        wanted = torch.cat([p.scores for p in want])
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
        assert (gap[0] is None) == (cfg.weighting == "endpoint")
        if gap[0] is not None:
            torch.testing.assert_close(gap[0], want[0].gap, rtol=1e-3, atol=1e-6)
    with pytest.raises(BadInput, match="the same steps"):
        next(attributions_of(lm, cases(lm, RECORDS), [CFG, replace(CFG, steps=3)]))


@pytest.mark.slow
def test_a_small_budget_splits_the_work_and_moves_no_score(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = credits(lm, CFG)
    monkeypatch.setattr(ig, "MIB", 1)
    need = ig._layer_bytes(lm, 0, 5)
    for budget, wavefronts in ((1, 4), (2 * need, 2)):  # every layer alone; two and then the rest
        small = replace(CFG, budget=budget)
        assert len(ig._groups(lm, 5, budget)) == wavefronts
        torch.testing.assert_close(credits(lm, small), whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


@pytest.mark.slow
def test_path_credits_of_a_layer_add_up_to_the_change_of_p(lm: LM) -> None:
    fine = [replace(CFG, steps=400, weighting="path", grid=grid) for grid in ("left", "right")]
    for i, case in enumerate(cases(lm, RECORDS)):
        left, right = (credits(lm, cfg, RECORDS[i : i + 1])[0] for cfg in fine)
        for layer in range(lm.layout.n_layers):
            ends = probabilities(lm, case, layer, both_inputs(lm, case, layer))
            trapezoid = float((left[layer] + right[layer]).sum()) / 2
            assert trapezoid == pytest.approx(float(ends[0] - ends[1]), abs=1e-6)


@pytest.mark.slow
def test_the_gap_is_what_the_steps_leave_over_and_closes_with_them(lm: LM) -> None:
    coarse, fine = (ig.run(lm, RECORDS, replace(CFG, steps=m, weighting="path")).records for m in (4, 64))
    for few, many, case, scores in zip(
        coarse, fine, cases(lm, RECORDS), credits(lm, replace(CFG, steps=4, weighting="path")), strict=True
    ):
        left_over = []
        for layer in range(lm.layout.n_layers):
            ends = probabilities(lm, case, layer, both_inputs(lm, case, layer))
            left_over.append(abs(float(ends[0] - ends[1] - scores[layer].sum())))
        assert few.gap == pytest.approx(max(left_over), rel=1e-2, abs=1e-7)
        assert many.gap < few.gap / 4
    assert ig.run(lm, RECORDS[:1], CFG).records[0].gap is None


def test_a_context_that_changes_nothing_credits_no_neuron(lm: LM) -> None:
    same = ContextRecord("x", "y", "Rome", prompt="The Eiffel Tower is in", without_context="The Eiffel Tower is in")
    assert ig.run(lm, [same], CFG).records[0].neurons == ()


@pytest.mark.slow
def test_thresholds_and_the_limit_keep_the_highest_scores(lm: LM) -> None:
    flat = credits(lm, CFG, RECORDS[:1])[0].flatten()
    (kept,) = ig.run(lm, RECORDS[:1], replace(CFG, top=7, threshold=0.0)).records
    want = flat.topk(7)
    assert [layer * lm.layout.d_ff + index for layer, index, _ in kept.neurons] == want.indices.tolist()
    assert kept.highest == float(flat.max())
    (strict,) = ig.run(lm, RECORDS[:1], replace(CFG, top=10**6, threshold=0.5)).records
    assert len(strict.neurons) == int((flat >= 0.5 * flat.max()).sum())


def test_the_model_is_the_same_to_the_bit_afterwards(lm: LM) -> None:
    weight = lm.parameter(lm.layout.weight(lm.layout.downs[0])).requires_grad_(True)
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    ig.run(lm, RECORDS, CFG)
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    assert weight.requires_grad
    assert weight.grad is None


@pytest.mark.slow
def test_a_patch_on_the_side_is_seen_like_a_baked_one(lm: LM) -> None:
    from lmpatch.patches.weight.delta import Scale
    from lmpatch.patches.weight.patch import WeightPatch

    layout = lm.layout
    scale = Scale(torch.arange(layout.d_ff), torch.linspace(0.5, 2, layout.d_ff), (layout.d_model, layout.d_ff))
    patch = WeightPatch.make(lm, {layout.weight(layout.downs[2]): scale}, method="test")
    found = []
    for mount in ("bake", "side"):
        with apply(lm, patch, mount=mount):
            found.append(credits(lm, CFG))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5 * float(found[0].abs().max()))
    assert not torch.allclose(found[0], credits(lm, CFG), rtol=1e-2, atol=1e-3 * float(found[0].abs().max()))


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ig, "MIB", 1)  # one record a batch
    path, seen = tmp_path / "scores" / "neurons.jsonl", []
    whole = ig.run(lm, RECORDS, CFG)

    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ig.run(lm, RECORDS, CFG, out=path, progress=stop)
    with path.open("ab") as file:
        file.write(b'{"neurons": [[0')  # the power went while a line was written
    again = ig.run(lm, RECORDS, CFG, out=path, progress=lambda *told: seen.append(told))
    assert seen == [(2, 3, "crediting neurons"), (3, 3, "crediting neurons")]
    assert again == whole == ig.Scores.load(path)
    whole.save(tmp_path)
    assert (tmp_path / "integrated_gradients.jsonl").read_text() == path.read_text()


@pytest.mark.slow
def test_scores_of_another_run_are_not_gone_on_with(lm: LM, tmp_path: Path) -> None:
    path = tmp_path / "neurons.jsonl"
    ig.run(lm, RECORDS[:1], CFG, out=path)
    with pytest.raises(BadInput, match="config, records, count differ"):
        ig.run(lm, RECORDS, replace(CFG, steps=6), out=path)
    ig.run(lm, RECORDS[:1], replace(CFG, budget=3), out=path)  # a budget moves no score
    path.write_text(json.dumps({"model": "x"}) + "\n")
    with pytest.raises(BadRecord, match="line 1 of"):
        ig.run(lm, RECORDS[:1], CFG, out=path)


@pytest.mark.slow
def test_a_damaged_file_of_scores_is_gone_on_with_to_the_same_scores_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ig, "MIB", 1)  # one record a batch
    lm, path = tiny_lm("llama"), tmp_path / "neurons.jsonl"
    scores = ig.run(lm, RECORDS, CFG, out=path)

    def same() -> bool:
        try:
            assert ig.Scores.load(path) == scores
        except BadRecord as error:
            assert str(path) in str(error) and "\n" not in str(error)
        try:
            return ig.run(lm, RECORDS, CFG, out=path) == scores
        except BadInput as error:
            return str(path) in str(error) and "\n" not in str(error)

    each(path, same)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["lost", "doubled", "moved", "cut"])
def test_lines_of_scores_that_are_lost_doubled_or_moved_are_noticed(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ig, "MIB", 1)
    lm, path = tiny_lm("llama"), tmp_path / "neurons.jsonl"
    scores = ig.run(lm, RECORDS, CFG, out=path)
    head, a, b, c = path.read_text().splitlines(keepends=True)
    lines = {"lost": [head, a, c], "doubled": [head, a, a, b, c], "moved": [head, b, a, c], "cut": [head, a]}[change]
    path.write_text("".join(lines))
    with pytest.raises(BadRecord, match="holds 1 of 3 records" if change == "cut" else "was altered"):
        ig.Scores.load(path)
    if change == "cut":  # as after a stop
        assert ig.run(lm, RECORDS, CFG, out=path) == scores == ig.Scores.load(path)
    else:
        with pytest.raises(BadRecord, match="was altered"):
            ig.run(lm, RECORDS, CFG, out=path)


def test_bad_input_is_refused_and_nothing_is_cut(lm: LM) -> None:
    with pytest.raises(BadInput, match="begins '<bos>The capital of Japan.* takes .* tokens, and .* reads 512"):
        ig.run(lm, [RECORDS[0], replace(RECORDS[1], prompt="The capital of Japan. " * 200 + "It")], CFG)
    with pytest.raises(BadInput, match="shares a token with the end of its prompt"):
        ig.run(lm, [replace(RECORDS[0], prompt="The Eiffel Tower is in ", answer="Paris")], CFG)
    with pytest.raises(BadInput, match="steps is 0"):
        ig.run(lm, RECORDS, replace(CFG, steps=0))


@pytest.mark.parametrize("cfg", [CFG, replace(CFG, steps=1, grid="left")])
def test_it_runs_in_bf16(lm: LM, cfg: Config) -> None:
    lm.model.to(torch.bfloat16)
    assert credits(lm, cfg).isfinite().all()


@pytest.mark.slow
def test_its_table_has_a_line_a_record_and_the_saved_file_all_of_it(lm: LM, tmp_path: Path) -> None:
    scores = ig.run(lm, RECORDS, CFG)
    columns, rows = scores.table()
    assert [len(row) for row in rows] == [len(columns)] * len(RECORDS)
    scores.save(tmp_path)
    assert ig.Scores.load(tmp_path / "integrated_gradients.jsonl") == scores
    with pytest.raises(BadInput, match="no such file"):
        ig.Scores.load(tmp_path / "elsewhere.jsonl")


def test_a_blank_that_is_a_token_of_its_own_belongs_to_both_prompts() -> None:
    lm = tiny_lm("llama")  # its tokenizer splits " Rome" into a blank and letters, as others do with numbers
    (case,) = cases(lm, [ContextRecord("c", "q", "Rome", prompt="The Tower is in", without_context="It is in")])
    decode = lm.tokenizer.decode
    assert decode(case.with_context).endswith("The Tower is in ")
    assert decode(case.without_context).endswith("It is in ")
    assert decode([case.label]) == "R"


def test_the_example_runs(lm: LM) -> None:
    records, cfg = ig.example(lm)
    assert len(ig.run(lm, records, cfg).records) == len(records)
