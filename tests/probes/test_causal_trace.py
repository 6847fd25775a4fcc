"""Causal tracing by replay equals tracing by one full forward per place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import CORE, real_gemma, tiny_lm

from lmpatch.data.edits import Edit
from lmpatch.errors import SubjectNotFound
from lmpatch.inference.forward import first
from lmpatch.inference.tokens import encode
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM
from lmpatch.probes import causal_trace
from lmpatch.probes.causal_trace import Config, Trace, Traces

FACTS = [
    Edit("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Paris"),
    Edit("Steve Jobs founded", subject="Steve Jobs", target="Apple"),
]


def slow(lm: LM, edit: Edit, trace: Trace, cfg: Config) -> torch.Tensor:
    """Every place, every sample: one full forward with hooks."""
    ids = torch.tensor([encode(lm, edit.prompt).ids])
    begin = ids.shape[1] - len(trace.tokens)
    layout = lm.layout
    names = {"state": layout.blocks, "mlp": layout.downs, "attention": layout.attn_outs}[cfg.kind]
    clean: dict[int, torch.Tensor] = {}
    entering: list[torch.Tensor] = []

    def keep(i: int) -> object:
        return lambda m, a, o: clean.__setitem__(i, first(o).detach().clone().reshape(ids.shape[1], -1))

    def enter(m: object, a: tuple[torch.Tensor, ...], k: dict[str, torch.Tensor]) -> None:
        entering.append((a[0] if a else k["hidden_states"]).detach().clone())

    handles = [Hook(lm.module(name), keep(i)) for i, name in enumerate(names)]
    handles.append(Hook(lm.module(layout.blocks[0]), enter, kwargs=True, before=True))
    with torch.no_grad(), hooked(*handles):
        answer = int(lm.model(ids).logits[0, -1].argmax())
    span = slice(begin, begin + trace.subject)
    sigma = cfg.noise * entering[0][:, span].std()
    generator = torch.Generator().manual_seed(cfg.seed)
    noise = torch.randn(cfg.samples, trace.subject, layout.d_model, generator=generator) * sigma
    scores = torch.zeros(len(trace.tokens), layout.n_layers)
    for t in range(len(trace.tokens)):
        for centre in range(layout.n_layers):
            low = centre if cfg.kind == "state" else max(0, centre - cfg.window // 2)
            high = centre + 1 if cfg.kind == "state" else min(layout.n_layers, centre - cfg.window // 2 + cfg.window)
            for sample in range(cfg.samples):

                def corrupt(m: object, a: object, k: object, s: int = sample) -> object:
                    hidden = (a[0] if a else k["hidden_states"]).clone()
                    hidden[:, span] += noise[s]
                    return ((hidden, *a[1:]), k) if a else (a, {**k, "hidden_states": hidden})

                def restore(i: int, at: int = begin + t) -> object:
                    def hook(m: object, a: object, o: object) -> object:
                        whole = first(o).clone()
                        whole.reshape(ids.shape[1], -1)[at] = clean[i][at]
                        return (whole, *o[1:]) if isinstance(o, tuple) else whole

                    return hook

                handles = [Hook(lm.module(names[i]), restore(i)) for i in range(low, high)]
                handles.append(Hook(lm.module(layout.blocks[0]), corrupt, kwargs=True, before=True))
                with torch.no_grad(), hooked(*handles):
                    p = lm.model(ids).logits[0, -1].float().softmax(-1)[answer]
                scores[t, centre] += p / cfg.samples
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["state", "mlp", "attention"])
@pytest.mark.parametrize(("family", "fact"), [*zip([*CORE, "bloom"], FACTS * 2, strict=True)])
def test_the_wavefront_equals_one_full_forward_per_place(family: str, fact: Edit, kind: str) -> None:
    lm, cfg = tiny_lm(family), Config(kind=kind, samples=2, window=2)
    (trace,) = causal_trace.run(lm, [fact], cfg)
    torch.testing.assert_close(trace.scores, slow(lm, fact, trace, cfg), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_restoring_the_last_token_at_the_last_layer_restores_everything(lm: LM) -> None:
    (trace,) = causal_trace.run(lm, FACTS[:1], Config(samples=3))
    assert float(trace.scores[-1, -1]) == pytest.approx(trace.clean, rel=1e-4)


@pytest.mark.slow
def test_without_noise_nothing_is_lost(lm: LM) -> None:
    (trace,) = causal_trace.run(lm, FACTS[:1], Config(samples=1, noise=0.0))
    assert trace.corrupted == pytest.approx(trace.clean, rel=1e-4)
    torch.testing.assert_close(trace.scores, torch.full_like(trace.scores, trace.clean), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_subjects_tokens_are_the_noised_ones(lm: LM) -> None:
    for fact in FACTS:
        (trace,) = causal_trace.run(lm, [fact], Config(samples=1))
        assert "".join(trace.tokens[: trace.subject]).strip() == fact.subject


@pytest.mark.slow
def test_the_model_is_the_same_to_the_bit_afterwards(lm: LM) -> None:
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    causal_trace.run(lm, FACTS, Config(samples=2))
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


@pytest.mark.slow
def test_the_heat_map_is_written_as_a_picture(lm: LM, tmp_path: Path) -> None:
    (trace,) = causal_trace.run(lm, FACTS[:1], Config(samples=1))
    trace.plot(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_where_noise_lowers_nothing_no_place_is_called_best(tmp_path: Path) -> None:
    scores = torch.tensor([[0.1, 0.4], [0.2, 0.3]])
    lost, risen, same = (
        Trace("The Louvre is in", " Paris", (" Louvre", " is"), 1, "state", 0.277, noisy, scores)
        for noisy in (0.1, 0.374, 0.277)
    )
    said = "noise did not lower the probability"
    assert "best at ' Louvre', layer 1" in repr(lost) and said not in repr(lost) and lost.lowered
    for trace in (risen, same):
        assert "best" not in repr(trace) and said in repr(trace) and not trace.lowered
    columns, rows = Traces([lost, risen]).table()
    assert dict(zip(columns, rows[0], strict=True))["layer"] == 1 and said not in rows[0]
    assert rows[1] == ("The Louvre is in", " Paris", 0.277, 0.374, "", said, "")
    pytest.importorskip("matplotlib")
    Traces([lost, risen]).save(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "causal_trace.jsonl").read_text().splitlines()]
    assert [record["lowered"] for record in records] == [True, False]


def test_a_prompt_without_its_subject_is_refused(lm: LM) -> None:
    with pytest.raises(SubjectNotFound):
        causal_trace.run(lm, [Edit("The Louvre is in", subject="Eiffel Tower", target="Paris")], Config())


@pytest.mark.real
def test_gemma_holds_facts_at_the_subjects_last_token_in_early_layers() -> None:
    lm = real_gemma()
    (trace,) = causal_trace.run(
        lm,
        [Edit("The mother tongue of Danielle Darrieux is", subject="Danielle Darrieux", target="French")],
        Config(samples=4),
    )
    assert trace.clean > 2 * trace.corrupted
    early = trace.scores[:, : lm.layout.n_layers // 2]
    assert int(early.max(1).values.argmax()) == trace.subject - 1
