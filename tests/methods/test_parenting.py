"""Parenting: scores against hand computations, gradients against separate backwards, frozen units, resumed runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import snapshot
import torch
import transformers
from snapshot import Lines, changed, spread, state
from tiny import tiny_lm
from torch import Tensor

from lmpatch.data.rag.reader import RagRecord
from lmpatch.errors import BadInput, Diverged
from lmpatch.inference.closed_book import ClosedBookAnswer
from lmpatch.locate.activations import activations
from lmpatch.methods.parenting import data as _parenting_data
from lmpatch.methods.parenting import method as parenting
from lmpatch.methods.parenting.config import Config
from lmpatch.methods.parenting.data import Rows, draws, prepare
from lmpatch.methods.parenting.method import fit
from lmpatch.methods.parenting.mine import (
    Tracker,
    active_tokens,
    balance,
    correlation,
    layer_weights,
    mine,
    typed,
    z_scores,
)
from lmpatch.methods.parenting.tune import Tuner, by_examples, by_tokens, gradients, mixes
from lmpatch.methods.parenting.units import TYPES, Adapter, Type, Unit, cut
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM
from lmpatch.patches.export import export
from lmpatch.patches.ledger import apply
from lmpatch.patches.weight.delta import LowRank
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.provenance import hash_tensors
from lmpatch.training.loop import Loop

LOSS = Adapter.loss


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def llama() -> LM:
    lm = tiny_lm("llama")
    lm.model.requires_grad_(False)
    return lm


def example(lm: LM) -> tuple[list[RagRecord], Config]:
    """The method's own without what its prompts tell the model to do, on the projections it tunes by default."""
    records, cfg = parenting.example(lm)
    bare = [(r.prompt.partition("[Supplementary knowledge]\n")[2]).partition("[Task]")[0] for r in records]
    prompts = [prompt if "[Answer]" in prompt else f"{prompt}[Answer]\n" for prompt in bare]
    records = [replace(r, prompt=prompt) for r, prompt in zip(records, prompts, strict=True)]
    return records, replace(cfg, modules="attention")


def ready(lm: LM, **settings: Any) -> tuple[Config, list[Unit], dict[str, Rows]]:
    records, cfg = example(lm)
    cfg = replace(cfg, **settings)
    units = cut(lm, cfg.units, cfg.rank, cfg.modules)
    return cfg, units, prepare(lm, records, cfg, len(units), None)[0]


@cache
def fitted(**settings: Any) -> tuple[WeightPatch, list[str]]:
    """The patch of all records with these settings, and what progress said: made once for all tests that look at it."""
    lm, told = tiny_lm("llama"), list[str]()
    records, cfg = example(lm)
    patch = fit(lm, records, replace(cfg, **settings), progress=lambda done, total, what: told.append(what))
    return patch, told


@pytest.mark.slow
def test_a_record_beyond_the_window_is_refused(llama: LM) -> None:
    records, cfg = example(llama)
    long = replace(records[0], prompt="The mayor is away. " * 200 + records[0].prompt)
    with pytest.raises(BadInput, match="Shorten its context: it is not cut for you"):
        fit(llama, [long, *records[1:]], cfg)


def in_turn(units: Sequence[Unit]) -> list[Type]:
    """All four types in turn."""
    return [TYPES[i % 4] for i in range(len(units))]


def one_step(sets: dict[str, Rows], cfg: Config) -> dict[str, Any]:
    counts = {"adherence": 2, "robustness": 2, "extraction": 1}
    return {kind: draws(sets[kind], n, 0, str(cfg.seed)) for kind, n in counts.items()}


def lively(adapter: Adapter) -> Adapter:
    """With B away from zero, so that A has a gradient too."""
    source = torch.Generator().manual_seed(1)
    for flat in adapter.flat.values():
        flat.data += 0.05 * torch.randn(flat.shape, generator=source)
    return adapter


def double(adapter: Adapter) -> Adapter:
    """Its values in fp64."""
    adapter.flat = {t: x.detach().double().requires_grad_(x.requires_grad) for t, x in adapter.flat.items()}
    return adapter


# Scores


def test_sensitivity_and_uncertainty_follow_a_hand_computation() -> None:
    theta = torch.tensor([2.0, -1.0], requires_grad=True)
    tracker = Tracker(theta, None, 0.85, 0.6)
    tracker.update(torch.tensor([1.0, 4.0]))  # s = 2, 4
    assert tracker.s.tolist() == pytest.approx([0.3, 0.6])  # 0.15 s
    assert tracker.u.tolist() == pytest.approx([0.68, 1.36])  # 0.4 |s - S|
    tracker.update(torch.tensor([-3.0, 0.0]))  # s = 6, 0
    assert tracker.s.tolist() == pytest.approx([0.85 * 0.3 + 0.9, 0.85 * 0.6])  # 1.155, 0.51
    assert tracker.u.tolist() == pytest.approx([0.6 * 0.68 + 0.4 * (6 - 1.155), 0.6 * 1.36 + 0.4 * 0.51])
    scores, odd = tracker.reduced([1, 1])
    assert scores.tolist() == pytest.approx([1.155 * 2.346, 0.51 * 1.02])
    assert odd == 0


def test_the_tracker_is_the_loop_over_units_and_counts_what_is_not_finite() -> None:
    source = torch.Generator().manual_seed(0)
    sizes = [3, 5, 2]
    theta = torch.randn(10, generator=source).requires_grad_()
    tracker = Tracker(theta, None, 0.85, 0.85)
    s, u = torch.zeros(10), torch.zeros(10)
    for step in range(6):
        grad = torch.randn(10, generator=source)
        tracker.update(torch.where(torch.arange(10) == step, torch.tensor(float("nan")), grad))
        now = (theta.detach() * grad).abs()
        now[step] = 0.0
        s = 0.85 * s + 0.15 * now
        u = 0.85 * u + 0.15 * (now - s).abs()
    scores, odd = tracker.reduced(sizes)
    wanted = [float(part.mean()) for part in (s * u).split(sizes)]
    assert scores.tolist() == pytest.approx(wanted, rel=1e-6) and odd == 6


def test_no_step_of_the_tracker_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(torch.ones(4, requires_grad=True), None, 0.85, 0.85)

    def refuse(_: Tensor) -> Any:
        raise AssertionError("a host sync inside a step")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    tracker.update(torch.ones(4))


def test_with_full_parameters_the_weight_itself_is_what_is_sensitive() -> None:
    tracker = Tracker(torch.zeros(2, requires_grad=True), torch.tensor([3.0, -2.0]), 0.85, 0.85)
    tracker.update(torch.tensor([1.0, 1.0]))
    assert tracker.s.tolist() == pytest.approx([0.45, 0.3])


@pytest.mark.slow
def test_active_tokens_equal_a_loop_without_padding(lm: LM) -> None:
    _, _, sets = ready(lm)
    rows = sorted(sets["adherence"].train, key=lambda row: len(row.ids))
    rows = [rows[0], *sets["extraction"].train[:1]]  # of very different length
    counts, tokens = active_tokens(lm, rows), sum(len(row.ids) for row in rows)
    single = [active_tokens(lm, [row]) for row in rows]
    assert counts.tolist() == pytest.approx(sum(single).tolist(), rel=1e-3)  # type: ignore[union-attr]
    assert bool((counts > 0).all()) and bool((counts < tokens).all())
    wanted = torch.zeros(lm.layout.n_layers, dtype=torch.float64)
    for layer, name in enumerate(activations(lm)):  # by hand: what stands behind the activation, token after token
        seen: list[Tensor] = []
        see = partial(lambda kept, m, a, out: kept.append(out), seen)
        with torch.no_grad(), hooked(Hook(lm.module(name), see)):
            for row in rows:
                lm.model(torch.tensor([row.ids]))
        wanted[layer] = sum(float((x.reshape(-1, lm.layout.d_ff) > 0).double().mean(1).sum()) for x in seen)
    assert counts.tolist() == pytest.approx(wanted.tolist(), rel=1e-3)


def test_layer_weights_sum_to_one_and_the_released_softmax_is_a_plain_ratio() -> None:
    counts = torch.tensor([10.0, 40.0, 25.0, 12.0], dtype=torch.float64)
    plain = 1 + counts - counts.min()
    assert torch.allclose(layer_weights(counts, 100, "count"), plain / plain.sum())
    for cue in ("rate", "count", "none"):
        weights = layer_weights(counts, 100, cue)  # type: ignore[arg-type]
        assert float(weights.sum()) == pytest.approx(1) and bool((weights > 0).all())
    assert torch.allclose(layer_weights(counts, 100, "rate"), layer_weights(2 * counts, 200, "rate"))
    assert not torch.allclose(layer_weights(counts, 100, "count"), layer_weights(2 * counts, 200, "count"))
    assert layer_weights(torch.ones(2, dtype=torch.float64), 9, "rate").tolist() == [0.5, 0.5]


def test_types_part_the_units_and_the_released_rule_is_z_above_0_where_the_variance_is_small() -> None:
    source = torch.Generator().manual_seed(0)
    a, r = (1e-4 * torch.rand(40, generator=source, dtype=torch.float64) for _ in range(2))
    types = typed(a, r, 0.0)
    assert types == typed(a, r, 0.0, "variance")
    assert {t: types.count(t) > 0 for t in TYPES} == dict.fromkeys(TYPES, True)
    z = z_scores(a), z_scores(r)
    for i, t in enumerate(types):
        assert t == (
            "entangled"
            if z[0][i] > 0 and z[1][i] > 0
            else "adherence"
            if z[0][i] > 0
            else "robustness"
            if z[1][i] > 0
            else "others"
        )
    assert typed(a, r, 1.0).count("others") > types.count("others")
    assert typed(torch.ones(3), torch.ones(3), 0.0) == ["others"] * 3


def test_the_balance_of_entangled_units_is_the_ratio_of_their_mean_z() -> None:
    a, r = torch.tensor([9.0, 8.0, 0.0, 1.0]), torch.tensor([5.0, 0.0, 1.0, 0.0])
    types: list[Type] = ["entangled", "adherence", "others", "others"]
    za, zr = float(z_scores(a)[0]), float(z_scores(r)[0])
    assert balance(a, r, types) == pytest.approx(za / (za + zr))
    assert balance(a, r, ["others"] * 4) == 0.5


def test_the_correlation_of_two_skills_is_that_of_their_scores() -> None:
    source = torch.Generator().manual_seed(0)
    a, r = (torch.rand(40, generator=source, dtype=torch.float64) for _ in range(2))
    assert correlation(a, r) == pytest.approx(float(torch.corrcoef(torch.stack([a, r]))[0, 1]))
    assert correlation(a, 3 * a + 1) == pytest.approx(1) and correlation(a, -a) == pytest.approx(-1)


def test_the_scores_are_reduced_without_a_copy_of_all_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(torch.ones(90, requires_grad=True), None, 0.85, 0.85)
    tracker.update(torch.ones(90))
    real, copied = Tensor.double, []
    monkeypatch.setattr(Tensor, "double", lambda t: copied.append(t.numel()) or real(t))
    tracker.reduced([30, 60])
    assert max(copied) == 60


# Units


@pytest.mark.parametrize("kind", ["matrix", "factor", "lora_rank"])
def test_however_units_are_cut_the_adapter_starts_as_the_same(lm: LM, kind: Any) -> None:
    whole = Adapter(lm, cut(lm, "matrix", 3, "all"), 2.0, 7).factors()
    units = cut(lm, kind, 3, "all")
    other = Adapter(lm, units, 2.0, 7, in_turn(units)).factors()
    assert whole.keys() == other.keys()
    for module, own in whole.items():
        assert torch.equal(own["a"], other[module]["a"]) and torch.equal(own["b"], other[module]["b"])
    per = {"matrix": 1, "factor": 2, "lora_rank": 3}[kind]
    assert len(units) == per * len(whole) and len({u.name for u in units}) == len(units)


@pytest.mark.parametrize("kind", ["matrix", "lora_rank", "full_matrix"])
def test_hooks_do_what_the_patch_does(lm: LM, kind: Any) -> None:
    from lmpatch.inference.states import hidden
    from lmpatch.patches.ledger import apply
    from lmpatch.patches.weight.patch import WeightPatch

    units = cut(lm, kind, 2, "all")
    adapter = lively(Adapter(lm, units, 2.0, 0, in_turn(units)))
    with torch.no_grad(), hooked(*adapter.hooks(lm)):
        wanted = hidden(lm, ["The Eiffel Tower"])
    with apply(lm, WeightPatch.make(lm, adapter.deltas(lm), method="test"), mount="side"):
        assert torch.allclose(hidden(lm, ["The Eiffel Tower"]), wanted, atol=1e-4)


# Boundary control


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["matrix", "lora_rank", "full_matrix"])
def test_gradients_are_those_of_three_separate_backwards(llama: LM, kind: Any) -> None:
    cfg, units, sets = ready(llama, units=kind, rank=1)
    adapter, mix, rows = lively(Adapter(llama, units, 2.0, 0, in_turn(units))), mixes(0.8, 0.3), one_step(sets, cfg)
    found = gradients(llama, adapter, rows, mix)
    for t, leaf in adapter.leaves.items():
        wanted = torch.zeros_like(leaf)
        for k in ("adherence", "robustness", "extraction"):
            (g,) = torch.autograd.grad(adapter.loss(llama, rows[k]), leaf)
            wanted += mix[t].get(k, 0.0) * g
        assert torch.allclose(found[t], wanted, atol=1e-6, rtol=1e-5), t
    assert "others" not in found


@pytest.mark.slow
def test_a_unit_never_hears_of_the_other_skills_loss(llama: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is the same to the bit whatever the other set holds, even where that loss is no number."""
    cfg, units, sets = ready(llama)
    adapter, mix, rows = lively(Adapter(llama, units, 2.0, 0, in_turn(units))), mixes(0.8, 0.5), one_step(sets, cfg)
    clean = gradients(llama, adapter, rows, mix)
    for other, own in (("robustness", "adherence"), ("adherence", "robustness")):
        spoiled = list(rows[other])

        def poisoned(own: Adapter, lm: LM, given: Any, *rest: Any, spoiled: Any = spoiled) -> Tensor:
            return LOSS(own, lm, given, *rest) * (float("nan") if given == spoiled else 1.0)

        monkeypatch.setattr(Adapter, "loss", poisoned)
        found = gradients(llama, adapter, rows, mix)
        assert torch.equal(found[own], clean[own])  # type: ignore[index]
        assert bool(found[other].isnan().all()) and bool(found["entangled"].isnan().all())  # type: ignore[index]


@pytest.mark.slow
def test_masked_tuning_is_a_slow_loop_over_parameters_and_others_keep_every_bit() -> None:
    """In fp64. Adam divides by the root of the mean square, so an entry whose gradient is smaller than the rounding of
    fp32 (1e-7 against 4e-7 here) takes a step that rounding decides. In fp32 each of the two is 1e-5 or more off fp64,
    how much depends on the processor; in fp64 they agree to 4e-15."""
    llama = tiny_lm("llama", torch.float64)
    llama.model.requires_grad_(False)
    cfg, units, sets = ready(llama, steps=4, decay=0.1, lr=0.02, clip=0.5, warmup=2, validate_every=10)
    types, mix = in_turn(units), mixes(cfg.delta, 0.4)
    tuner = Tuner(llama, double(Adapter(llama, units, 2.0, cfg.seed, types)), sets, mix, cfg)
    slow = double(Adapter(llama, units, 2.0, cfg.seed, types))  # every unit takes gradients here, with its own Adam
    frozen = slow.flat["others"].clone()
    loop = tuner.run()
    moments: dict[Type, list[Tensor]] = {t: [torch.zeros_like(x), torch.zeros_like(x)] for t, x in slow.leaves.items()}
    for step in range(cfg.steps):
        rows = {
            k: draws(sets[k], n, step, f"{cfg.seed}/{k}", cfg.known_share if k == "robustness" else 0.0)
            for k, n in tuner.counts.items()
        }
        grads = {}
        for t, leaf in slow.leaves.items():
            total = torch.zeros_like(leaf)
            for k in rows:
                total += mix[t].get(k, 0.0) * torch.autograd.grad(slow.loss(llama, rows[k]), leaf)[0]
            grads[t] = total
        norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
        rate = cfg.lr * min(1.0, (step + 1) / cfg.warmup) * (1 - step / cfg.steps)
        for t, leaf in slow.leaves.items():
            g = grads[t] * min(1.0, cfg.clip / (norm + 1e-6))
            m, v = moments[t]
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            with torch.no_grad():
                leaf.mul_(1 - rate * cfg.decay)
                leaf -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    for t, leaf in slow.leaves.items():
        assert torch.allclose(tuner.adapter.flat[t], leaf, atol=1e-10, rtol=0), t
    assert torch.equal(tuner.adapter.flat["others"], frozen)
    assert "others" not in tuner.leaves and loop.optimiser is not None and len(loop.optimiser.state) == 3


@pytest.mark.slow
def test_frozen_units_have_no_part_in_the_patch() -> None:
    patch, _ = fitted()
    frozen = {f"{name}.weight" for name, _, _, t in patch.notes["units"] if t == "others"}
    assert frozen and not frozen & set(patch.deltas)
    assert {f"{name}.weight" for name, _, _, t in patch.notes["units"]} - frozen == set(patch.deltas)
    assert patch.notes["parameters"] * 4 == patch.nbytes


@pytest.mark.slow
def test_without_boundary_control_one_mix_holds_for_all_that_is_tuned(
    llama: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = Tuner.__init__

    def watch(self: Tuner, lm: LM, adapter: Adapter, sets: Any, mix: Any, *rest: Any) -> None:
        seen.append(mix)
        real(self, lm, adapter, sets, mix, *rest)

    monkeypatch.setattr(Tuner, "__init__", watch)
    records, cfg = example(llama)
    fit(llama, records, replace(cfg, boundary=False, steps=1))
    assert len({tuple(sorted(own.items())) for own in seen[0].values()}) == 1


# Merging three adapters


@pytest.mark.slow
def test_merged_in_the_space_of_products_it_is_the_weighted_mean_of_the_three_changes(llama: LM) -> None:
    records, cfg = example(llama)
    made: list[Adapter] = []
    real = Tuner.run

    def keep(self: Tuner, *rest: Any) -> Loop:
        loop = real(self, *rest)
        copy = Adapter(self.lm, self.adapter.units, self.adapter.scale, 0)
        copy.flat["entangled"] = self.adapter.flat["entangled"].detach().clone()
        made.append(copy)
        return loop

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tuner, "run", keep)
        patch = fit(llama, records, replace(cfg, mode="merge"))
    assert [c for c in patch.notes["validation"]] == ["tuning adherence", "tuning robustness", "tuning all"]
    changes = [adapter.deltas(llama) for adapter in made]
    for name, _, _, t in patch.notes["units"]:
        wanted = sum(w * c[f"{name}.weight"].dense() for w, c in zip(parenting.MERGE[t], changes, strict=True))  # type: ignore[attr-defined]
        assert torch.allclose(patch.deltas[f"{name}.weight"].dense(), wanted, atol=1e-6)  # type: ignore[attr-defined]
    official = fit(llama, records, replace(cfg, mode="merge", merge_space="factors"))
    assert {d.rank for d in official.deltas.values() if isinstance(d, LowRank)} == {cfg.rank}


@pytest.mark.slow
def test_merged_factor_by_factor_a_and_b_are_the_released_weighted_means(llama: LM) -> None:
    cfg, units, _ = ready(llama)
    made = [lively(Adapter(llama, units, 2.0, seed)) for seed in range(3)]
    types = in_turn(units)
    wanted = []
    for i, (unit, t) in enumerate(zip(units, types, strict=True)):
        released = {
            "entangled": (0.4, 0.4, 0.2), "adherence": (0.8, 0.0, 0.2), "robustness": (0.0, 0.8, 0.2),
            "others": (0.1, 0.1, 0.8),
        }[t]  # fmt: skip
        parts = [adapter.flat["entangled"].detach().split([u.size for u in units])[i] for adapter in made]
        flat = sum(w * part for w, part in zip(released, parts, strict=True))
        a, b = flat.split([piece.size for piece in unit.pieces])  # type: ignore[union-attr]
        a, b = (x.view(piece.shape) for x, piece in zip((a, b), unit.pieces, strict=True))
        wanted.append((f"{unit.name}.weight", 2.0 * b @ a))
    merged = parenting._averaged(llama, made, types, replace(cfg, mode="merge", merge_space="factors"))
    for name, change in wanted:
        assert torch.allclose(merged[name].dense(), change, atol=1e-6), name  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"mode": m} for m in ("merge", "masked", "mixed", "plain")])
def test_with_delta_1_every_mode_does_without_extraction_records(llama: LM, settings: dict[str, Any]) -> None:
    records, cfg = example(llama)
    patch = fit(
        llama,
        [r for r in records if r.kind != "extraction"],
        replace(cfg, delta=1.0, steps=1, **settings),
    )
    assert all("extraction" not in point for curve in patch.notes["validation"].values() for point in curve)


# Rows


def test_known_rows_get_their_share_and_all_rows_come_once_before_any_comes_again() -> None:
    rows = Rows(list("abcdefgh"), [], [True, True] + [False] * 6)  # type: ignore[arg-type]
    drawn: list[Any] = [r for step in range(6) for r in draws(rows, 2, step, "s", 0.5)]
    assert [r in "ab" for r in drawn] == [False, True] * 6
    assert sorted(r for r in drawn if r not in "ab") == list("cdefgh")
    assert sorted(r for step in range(4) for r in draws(rows, 2, step, "s")) == list("abcdefgh")


@pytest.mark.slow
def test_refusals_are_kept_apart_and_counted(llama: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    records, cfg = example(llama)
    own = [r for r in records if r.kind == "robustness"]
    texts = ["", "I do not know.", own[2].documents[0].split()[4], *[r.gold[0] for r in own[3:]]]
    said = [ClosedBookAnswer(text, True) for text in texts]
    monkeypatch.setattr(_parenting_data, "closed_book_answers", lambda *_, **__: said)
    _, kept = prepare(llama, records, replace(cfg, refusals=False), 16, None)
    assert kept["own_answers"]["refused"] == 2 and kept["own_answers"]["known"] > 0
    sets, told = prepare(llama, records, cfg, 16, None)
    ends = [llama.tokenizer.decode(row.ids[row.target : -1]) for row in sets["robustness"].train]
    more = told["rows"]["robustness"] - kept["rows"]["robustness"]
    assert more in (1, 2) and ends.count("I do not know.") <= 2  # an eighth of the rows validates


@pytest.mark.slow
def test_an_answer_that_was_cut_off_is_no_target(llama: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end token behind it would teach the model to stop in the middle."""
    records, cfg = example(llama)
    own = [r for r in records if r.kind == "robustness"]
    said = [
        ClosedBookAnswer("the town of", i % 2 == 1) if i < 4 else ClosedBookAnswer(r.gold[0], i > 4)
        for i, r in enumerate(own)
    ]
    monkeypatch.setattr(_parenting_data, "closed_book_answers", lambda *_, **__: said)
    sets, counts = prepare(llama, records, replace(cfg, refusals=False), 16, None)
    assert counts["own_answers"]["cut_off"] == 3
    rows = sets["robustness"]
    assert len(rows.train) + len(rows.validate) == len(own) - 3
    told = prepare(llama, records, cfg, 16, None)[0]["robustness"]
    ends = [llama.tokenizer.decode(row.ids[row.target : -1]) for row in (*told.train, *told.validate)]
    assert ends.count("I do not know.") == 2 and len(ends) == len(own) - 1  # what it knows is not unlearned


@pytest.mark.slow
def test_validation_holds_out_whole_questions(llama: LM) -> None:
    """The original and the substituted record of a question differ by a word: one must not give the other away."""
    made = [
        RagRecord(
            f"Where is tower {i}?", (f"Tower {i} is in {town}.",), "adherence", variant, town, id=f"{i}:{variant}"
        )  # type: ignore[arg-type]
        for i in range(60)
        for variant, town in (("original", "Paris"), ("substituted", "Rome"))
    ]
    records, cfg = example(llama)
    sets = prepare(llama, made + [r for r in records if r.kind != "adherence"], cfg, 16, None)[0]["adherence"]
    sides = [
        {llama.tokenizer.decode(row.ids[: row.target]).partition("[Question]")[2] for row in rows}
        for rows in (sets.train, sets.validate)
    ]
    assert len(sets.validate) == 12 and len(sides[1]) == 6 and not sides[0] & sides[1]


@pytest.mark.slow
def test_rows_end_with_the_end_token_and_only_the_answer_is_scored(llama: LM) -> None:
    _, _, sets = ready(llama)
    row = sets["adherence"].train[0]
    assert row.ids[-1] == llama.tokenizer.eos_token_id
    assert llama.tokenizer.decode(row.ids[: row.target], skip_special_tokens=True).endswith("[Answer]\n")


# Bad input, stops, resumes


def test_full_weights_of_a_model_that_is_shared_out_are_refused(llama: LM, tmp_path: Path) -> None:
    from torch import distributed as dist
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        module = llama.module(llama.layout.downs[0])
        whole = distribute_tensor(module.weight.detach(), init_device_mesh("cpu", (1,)))
        module.weight = torch.nn.Parameter(whole, requires_grad=False)
        records, cfg = example(llama)
        with pytest.raises(BadInput, match="shared among processes. Leave --shard out"):
            fit(llama, records, replace(cfg, units="full_matrix"))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("drop", "settings", "complaint"),
    [
        ("robustness", {}, "no robustness records"),
        ("extraction", {}, "no extraction records"),
        ("", {"units": "lora_rank", "rank": 8}, "24 adherence records for 128 units"),
        ("", {"delta": 1.5}, "delta is 1.5"),
        ("", {"steps": 0}, "steps is 0"),
        ("", {"mode": "merge", "units": "factor"}, "merge_space=factors"),
    ],
)
def test_what_cannot_work_is_said_before_the_model_is_asked(
    llama: LM, monkeypatch: pytest.MonkeyPatch, drop: str, settings: dict[str, Any], complaint: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was asked")

    monkeypatch.setattr(_parenting_data, "closed_book_answers", refuse)
    records, cfg = example(llama)
    with pytest.raises(BadInput, match=complaint):
        fit(llama, [r for r in records if r.kind != drop], replace(cfg, **settings))


def failing_from(call: int) -> Callable[..., Tensor]:
    """The validation loss, infinite from the given call on."""
    seen = 0

    def spoiled(adapter: Adapter, *rest: Any) -> Tensor:
        nonlocal seen
        value = LOSS(adapter, *rest)
        if not value.requires_grad:
            seen += 1
            value = value + (float("inf") if seen >= call else 0.0)
        return value

    return spoiled


@pytest.mark.slow
def test_a_divergent_run_stops_and_keeps_its_last_good_state(llama: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    records, cfg = example(llama)
    good = fit(llama, records, replace(cfg, steps=6, validate_every=2, warmup=0))
    monkeypatch.setattr(Adapter, "loss", failing_from(7))  # three losses each at step 0, 2 and 4
    with pytest.warns(UserWarning, match="kept is the state of step 2"):
        stopped = fit(llama, records, replace(cfg, steps=6, validate_every=2, warmup=0))
    assert "diverged by step 4" in stopped.notes["stopped"][0]
    assert stopped.notes["validation"]["tuning"][1] == good.notes["validation"]["tuning"][1]
    assert all(d.is_finite() for d in stopped.deltas.values())


@pytest.mark.slow
def test_a_run_that_diverges_at_once_is_an_error(llama: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    records, cfg = example(llama)
    monkeypatch.setattr(Adapter, "loss", failing_from(4))
    with pytest.raises(Diverged, match="Lower lr"):
        fit(llama, records, replace(cfg, mode="mixed"))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_patch(tmp_path: Path) -> None:
    records, cfg = example(tiny_lm("llama"))
    cfg = replace(cfg, steps=5, validate_every=2)
    whole = fit(tiny_lm("llama"), records, cfg)

    def stop_at(what: str, when: int) -> Callable[[int, int, str], None]:
        def told(done: int, _: int, said: str) -> None:
            if said == what and done == when:
                raise KeyboardInterrupt

        return told

    lm = tiny_lm("llama")
    before = hash_tensors(lm.model.state_dict().items(), exact=True)
    for what, when in (("mining robustness", 1), ("tuning", 1), ("tuning", 4)):
        with pytest.raises(KeyboardInterrupt):
            fit(lm, records, cfg, out=tmp_path, progress=stop_at(what, when))
        assert hash_tensors(lm.model.state_dict().items(), exact=True) == before
        assert not any(m._forward_hooks for m in lm.model.modules())
    assert fit(lm, records, cfg, out=tmp_path).hash() == whole.hash()
    with pytest.raises(BadInput, match="another run"):
        fit(lm, records, replace(cfg, lr=0.04), out=tmp_path)


@pytest.mark.slow
def test_an_interrupt_inside_a_step_leaves_the_last_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the optimiser's step and its count, weights have moved that would be kept under the old count."""
    records, cfg = example(tiny_lm("llama"))
    cfg = replace(cfg, mode="mixed", steps=5, validate_every=2)
    whole = fit(tiny_lm("llama"), records, cfg)
    real, steps = torch.optim.AdamW.step, 0

    def torn(self: Any, *rest: Any) -> Any:
        nonlocal steps
        steps += 1
        real(self, *rest)
        if steps == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch.optim.AdamW, "step", torn)
        fit(tiny_lm("llama"), records, cfg, out=tmp_path)
    assert fit(tiny_lm("llama"), records, cfg, out=tmp_path).hash() == whole.hash()


@pytest.mark.slow
def test_an_interrupt_at_a_line_leaves_the_model_as_it_was_and_the_run_goes_on_to_the_same_patch(
    tmp_path: Path,
) -> None:
    lm = tiny_lm("llama")
    lm.parameter(lm.layout.weight(lm.layout.downs[0])).requires_grad_(True)  # a caller's flag must survive
    records, cfg = example(lm)
    cfg = replace(cfg, steps=1, validate_every=1)
    whole, before, folders = fit(lm, records, cfg).hash(), state(lm), (tmp_path / str(n) for n in count())
    lines = Lines(lambda: fit(lm, records, cfg, out=next(folders)))
    for i, line in enumerate(spread([*lines.times], 40)):
        out = tmp_path / f"cut {i}"
        lines.run = partial(fit, lm, records, cfg, out=out)
        assert lines.interrupted(line, lines.times[line] if i % 2 else 1)
        assert changed(before, state(lm)) == [] and torch.is_grad_enabled(), snapshot.name(line)
        assert fit(lm, records, cfg, out=out).hash() == whole, snapshot.name(line)


@pytest.mark.slow
def test_scores_of_the_other_skill_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    records, cfg = example(lm)
    cfg = replace(cfg, steps=1, mine_steps=2)
    fit(lm, records, cfg, out=tmp_path)
    (tmp_path / "mined-adherence.safetensors").replace(tmp_path / "mined-robustness.safetensors")
    with pytest.raises(BadInput, match="mined-robustness.safetensors is of another run"):
        fit(lm, records, cfg, out=tmp_path)


@pytest.mark.slow
def test_scores_are_shared_by_runs_that_differ_only_after_mining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    records, cfg = example(lm)
    cfg = replace(cfg, steps=1)
    fit(lm, records, cfg, out=tmp_path)
    (tmp_path / "tuning.safetensors").unlink()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("mined again")

    monkeypatch.setattr(Tracker, "update", refuse)
    without = fit(lm, records, replace(cfg, cue="none", boundary=False), out=tmp_path)
    assert without.notes["layers"]["adherence"] == [0.25] * 4


# What comes of it


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, not ours
def test_the_patch_is_a_lora_adapter(llama: LM, tmp_path: Path) -> None:
    patch, _ = fitted()
    llama.model.save_pretrained(tmp_path / "base")
    made = export(llama, patch, "peft", tmp_path / "adapter")
    assert set(made.ranks) == set(patch.deltas) and set(made.ranks.values()) == {example(llama)[1].rank}
    peft = pytest.importorskip("peft")
    ids = torch.arange(3, 27).reshape(2, 12)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad(), apply(llama, patch, "side"):
        assert torch.allclose(loaded(input_ids=ids).logits, llama.model(input_ids=ids).logits, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(loaded(input_ids=ids).logits, llama.model(input_ids=ids).logits, atol=1e-3)


@pytest.mark.slow
def test_units_that_score_high_are_those_the_loss_misses() -> None:
    """Rank correlation of a unit's smoothed sensitivity with what its removal costs, after some tuning."""
    lm = tiny_lm("llama")
    lm.model.requires_grad_(False)
    _, units, sets = ready(lm)
    rows = sets["adherence"].train
    adapter = Adapter(lm, units, 8.0, 0)
    (leaf,) = adapter.leaves.values()
    adam = torch.optim.Adam([leaf], lr=0.01)
    tracker = Tracker(leaf, None, 0.85, 0.85)
    for step in range(30):
        (leaf.grad,) = torch.autograd.grad(adapter.loss(lm, draws(sets["adherence"], 4, step, "s")), leaf)
        tracker.update(leaf.grad)
        adam.step()
    whole = adapter.loss(lm, rows)
    sizes = [u.size for u in units]
    parts, scores = leaf.detach().split(sizes), [float(s.sum()) for s in tracker.s.split(sizes)]
    costs = []
    with torch.no_grad():
        for part in parts:
            kept = part.clone()
            part.zero_()
            costs.append(float(adapter.loss(lm, rows) - whole))
            part.copy_(kept)
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (scores, costs)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.3


@pytest.mark.slow
def test_mining_tells_units_apart_and_says_what_it_cost(llama: LM) -> None:
    cfg, units, sets = ready(llama)
    found = mine(llama, units, sets["adherence"], cfg, "adherence")
    scores = found.importance / found.layers[[unit.layer for unit in units]]
    assert len(scores) == len(units) and bool((scores >= 0).all()) and float(scores.std()) > 0
    plain = mine(llama, units, sets["adherence"], replace(cfg, cue="none"), "adherence")
    assert found.notes["tracking_bytes"] == 3 * 4 * sum(u.size for u in units)
    assert torch.allclose(plain.importance * 4, scores)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["before_step", "after_step"])
def test_mining_is_a_plain_loop_over_units(llama: LM, point: Any) -> None:
    """Losses, rate, clipping, moments and scores, each written out."""
    cfg, units, sets = ready(
        llama,
        cue="none",
        update_point=point,
        mine_steps=4,
        mine_warmup=2,
        mine_lr=0.02,
        clip=0.05,
        decay=0.1,
        beta1=0.7,
        beta2=0.6,
    )
    rows = sets["robustness"]
    found = mine(llama, units, rows, cfg, "robustness")
    adapter = Adapter(llama, units, cfg.alpha / cfg.rank, cfg.seed)
    theta = adapter.flat["entangled"]
    s, u, m, v = (torch.zeros_like(theta) for _ in range(4))
    for step in range(4):
        picked = draws(rows, cfg.mine_rows, step, f"{cfg.seed}/mine/robustness", cfg.known_share)
        (g,) = torch.autograd.grad(adapter.loss(llama, picked), theta)
        clipped = g * min(1.0, cfg.clip / (float(g.norm()) + 1e-6))
        assert float(g.norm()) > cfg.clip  # or both modes would take the same gradient
        was = theta.detach().clone()
        rate = cfg.mine_lr * min(1.0, (step + 1) / 2)
        m, v = 0.9 * m + 0.1 * clipped, 0.999 * v + 0.001 * clipped**2
        with torch.no_grad():
            theta.mul_(1 - rate * cfg.decay)
            theta -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        now = ((was * g) if point == "before_step" else (theta.detach() * clipped)).abs()
        s = 0.7 * s + 0.3 * now
        u = 0.6 * u + 0.4 * (now - s).abs()
    wanted = [float(part.mean()) for part in (s.double() * u.double()).split([unit.size for unit in units])]
    assert (4 * found.importance).tolist() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
def test_a_divergent_mining_is_an_error_even_if_its_scores_stay_finite(
    llama: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that are not finite count as 0, so the scores alone do not show it."""
    cfg, units, sets = ready(llama, mine_steps=3)
    real, steps = torch.optim.AdamW.step, 0

    def blown(self: Any, *rest: Any) -> Any:
        nonlocal steps
        steps += 1
        real(self, *rest)
        if steps == 3:
            self.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", blown)
    with pytest.raises(Diverged, match="Lower mine_lr"):
        mine(llama, units, sets["adherence"], cfg, "adherence")


@pytest.mark.slow
def test_how_alike_the_skills_are_is_said_right_after_mining() -> None:
    patch, told = fitted()
    (said,) = [what for what in told if what.startswith("units: ")]
    types = patch.notes["types"]
    assert said.startswith(f"units: {types['entangled']} entangled, {types['adherence']} adherence")
    assert f"correlate {patch.notes['correlation']:.2f}, gamma {patch.notes['gamma']:.2f}" in said
    after = told[told.index(said) + 1 :]
    assert not any(what.startswith("mining") for what in after) and after[0] == "tuning"


@pytest.mark.slow
def test_plain_mixed_tuning_trains_every_unit_without_mining(llama: LM) -> None:
    records, cfg = example(llama)
    patch, _ = fitted(mode="mixed")
    assert len(patch.deltas) == 16 and not patch.notes["units"]
    few = [r for kind in ("adherence", "robustness", "extraction") for r in [x for x in records if x.kind == kind][:3]]
    fit(llama, few, replace(cfg, mode="mixed", steps=1))  # no units, so no least number of records


@pytest.mark.slow
def test_plain_tuning_takes_one_mean_over_all_answer_tokens_of_a_step(llama: LM) -> None:
    cfg, units, sets = ready(llama, mode="plain")
    adapter, rows = lively(Adapter(llama, units, 2.0, 0)), one_step(sets, cfg)
    every = [row for own in rows.values() for row in own]
    (wanted,) = torch.autograd.grad(adapter.loss(llama, every), adapter.flat["entangled"])
    found = gradients(llama, adapter, rows, by_tokens(rows))
    assert torch.allclose(found["entangled"], wanted, atol=1e-6, rtol=1e-5)

    plain, mixed = (fitted(mode=mode)[0] for mode in ("plain", "mixed"))
    assert len(plain.deltas) == 16 and not plain.notes["units"] and plain.hash() != mixed.hash()


@pytest.mark.slow
def test_by_examples_every_row_of_a_step_weighs_the_same_however_long_its_answer(llama: LM) -> None:
    cfg, units, sets = ready(llama, mode="plain")
    adapter, rows = lively(Adapter(llama, units, 2.0, 0)), one_step(sets, cfg)
    every = [row for own in rows.values() for row in own]
    assert len({len(row.ids) - row.target for row in every}) > 1
    wanted = torch.zeros_like(adapter.flat["entangled"])
    for row in every:  # each alone, without padding
        wanted += torch.autograd.grad(adapter.loss(llama, [row]), adapter.flat["entangled"])[0] / len(every)
    found = gradients(llama, adapter, rows, by_examples(rows), mean="examples")
    assert torch.allclose(found["entangled"], wanted, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(gradients(llama, adapter, rows, by_tokens(rows))["entangled"], wanted, atol=1e-4)

    tokens, examples = (fitted(mode="plain", mean=mean)[0] for mean in ("tokens", "examples"))
    assert tokens.hash() == fitted(mode="plain")[0].hash() != examples.hash()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "mixed"])
def test_without_units_one_sort_of_rows_is_enough(llama: LM, mode: Any) -> None:
    records, cfg = example(llama)
    told = [r for r in records if r.kind == "adherence"]
    alone = replace(cfg, mode=mode, rows_robustness=0, rows_extraction=0, rows_adherence=4)
    patch = fit(llama, told, alone)
    assert patch.deltas and {*patch.notes["validation"]["tuning"][0]} == {"step", "adherence"}
    with pytest.raises(BadInput, match="no robustness records"):
        fit(llama, told, replace(alone, rows_robustness=1))
    with pytest.raises(BadInput, match="at least one row in all"):
        fit(llama, told, replace(alone, rows_adherence=0))
    with pytest.raises(BadInput, match="rows_robustness is 0; it must be at least 1"):
        fit(llama, records, replace(alone, mode="masked"))


@pytest.mark.slow
def test_plots_show_units_by_layer_and_projection(llama: LM, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records, cfg = example(llama)
    found = parenting.plots(fit(llama, records, cfg), tmp_path)
    assert [path.name for path in found] == ["types.png", "importance.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)
    with pytest.raises(BadInput, match="holds no units"):
        parenting.plots(fit(llama, records, replace(cfg, mode="mixed")), tmp_path)


def test_records_are_checked(llama: LM) -> None:
    with pytest.raises(BadInput, match="no documents"):
        RagRecord("Who?", ())
    with pytest.raises(BadInput, match="has no answer"):
        RagRecord("Who?", ("Anna came.",))
