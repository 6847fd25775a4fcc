"""ITI finds the heads that know whose answer it is, and pushes them by so many standard deviations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_lm
from torch import Tensor

from lmpatch.data.context import ContextRecord
from lmpatch.errors import BadInput
from lmpatch.inference.generate import generate
from lmpatch.inference.states import hidden
from lmpatch.inference.tokens import join
from lmpatch.methods import iti
from lmpatch.methods.iti import HeadProbes, best_heads, head_outputs, logistic, observe
from lmpatch.models.lm import LM
from lmpatch.models.units import Head
from lmpatch.patches.ledger import apply

THINGS = ("tower", "capital", "needle", "apple", "tongue", "space")
RECORDS = [ContextRecord(f"The {t} is in Rome.", f"Where is the {t}?", "Rome", "Paris") for t in THINGS]
CFG = iti.Config(heads=3, strength=8.0)


def slow_outputs(lm: LM, text: str) -> Tensor:
    """[layers, heads, d_h] at the last token, one text at a time."""
    seen: list[Tensor] = []
    handles = [
        lm.module(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
        for name in lm.layout.attn_outs
    ]
    with torch.no_grad():
        lm.model(**lm.tokenizer(text, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return torch.stack(seen).unflatten(-1, (4, -1))


def descent(x: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """One logistic regression by plain gradient descent on the same objective."""
    w = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    b = torch.zeros((), dtype=x.dtype, requires_grad=True)
    exact = {"tolerance_grad": 1e-10, "tolerance_change": 1e-16}
    search = torch.optim.LBFGS([w, b], max_iter=1000, **exact, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        z = x @ w + b
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, right.to(x.dtype), reduction="sum")
        loss = loss + w.square().sum() / 2
        loss.backward()
        return loss

    search.step(closure)
    return w.detach(), b.detach()


def test_outputs_in_a_padded_batch_are_those_of_one_text_at_a_time(lm: LM) -> None:
    records = [*RECORDS[:2], ContextRecord("It is old.", "What else is known about this?", "nothing", "a lot")]
    outputs = head_outputs(lm, records)
    texts = [join(r.prompt, r.answer) for r in records] + [join(r.prompt, r.memory) for r in records]
    for got, text in zip(outputs, texts, strict=True):
        want = slow_outputs(lm, text)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.slow
def test_probes_side_by_side_are_those_fitted_one_by_one() -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, 7, generator=source, dtype=torch.float64) * torch.tensor([0.1, 1, 1, 3, 30])[:, None, None]
    right = torch.rand(40, generator=source) < 0.5
    x[2, :, 3] += 50 * right  # told apart perfectly
    w, b = logistic(x, right)
    for i in range(5):
        want = descent(x[i], right)
        assert torch.allclose(w[i], want[0], rtol=1e-4, atol=1e-6) and torch.allclose(
            b[i], want[1], rtol=1e-4, atol=1e-4
        )


def test_a_head_in_which_the_answer_is_written_is_found_first(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.Generator().manual_seed(1)
    outputs = torch.randn(2 * len(RECORDS), 4, 4, 16, generator=source)
    outputs[: len(RECORDS), 2, 1, 5] += 20
    monkeypatch.setattr(iti, "head_outputs", lambda *_: outputs)
    probes = observe(lm, RECORDS, CFG)
    assert best_heads(lm, probes, CFG)[0] == Head(2, 1)
    assert probes.accuracy[2, 1] == 1
    for direction in probes.directions.values():
        assert direction[2, 1, 5] > 0.9  # towards the context's answer
    spread = outputs[:, 2, 1].double() @ probes.directions["mass_mean"][2, 1]
    assert probes.spreads["mass_mean"][2, 1] == pytest.approx(float(spread.std()))


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["probe", "mass_mean"])
def test_the_patch_holds_alpha_sigma_theta_of_the_best_heads_heads_and_nothing_else(
    lm: LM, direction: iti.Direction
) -> None:
    cfg = replace(CFG, direction=direction)
    probes = observe(lm, RECORDS, cfg)
    patch = iti.fit(lm, RECORDS, cfg, probes=probes)
    pushed = {(layer, head) for layer, head, _ in patch.notes["heads"]}
    assert len(pushed) == 3
    for layer, name in enumerate(lm.layout.attn_outs):
        vector = patch.tensors().get(name, torch.zeros(64)).reshape(4, -1)
        for head in range(4):
            want = torch.zeros(16, dtype=torch.float64)
            if (layer, head) in pushed:
                want = 8 * probes.spreads[direction][layer, head] * probes.directions[direction][layer, head]
            assert torch.allclose(vector[head].double(), want, atol=1e-6)
    assert patch.hash() == iti.fit(lm, RECORDS, cfg).hash()


def test_heads_are_ordered_by_accuracy_then_likelihood_then_address() -> None:
    lm = tiny_lm("llama")
    accuracy, loss = torch.full((4, 4), 0.5), torch.ones(4, 4)
    accuracy[3, 3], loss[1, 2] = 0.9, 0.5
    probes = HeadProbes(accuracy, loss, {}, {})
    assert best_heads(lm, probes, CFG) == [Head(3, 3), Head(1, 2), Head(0, 0)]
    controls = [best_heads(lm, probes, replace(CFG, heads=16, control_seed=seed)) for seed in (0, 0, 1)]
    assert controls[0] == controls[1] != controls[2] and len(set(controls[0])) == 16


@pytest.mark.slow
def test_no_strength_is_no_change_and_more_of_it_moves_more(lm: LM) -> None:
    probes, clean = observe(lm, RECORDS, CFG), hidden(lm, ["The Eiffel Tower"])
    moved = []
    for strength in (0.0, 1.0, 100.0):
        with apply(lm, iti.fit(lm, RECORDS, replace(CFG, strength=strength), probes=probes)):
            moved.append(float((hidden(lm, ["The Eiffel Tower"]) - clean).norm()))
    assert moved[0] == 0 and moved[0] < moved[1] < moved[2]


@pytest.mark.slow
def test_at_the_newest_token_generation_is_pushed_as_released(lm: LM) -> None:
    patch = iti.fit(lm, RECORDS, replace(CFG, positions="newest", strength=40.0))
    prompt = "The Eiffel Tower is in"
    ids: list[int] = lm.tokenizer(prompt)["input_ids"]
    start, pushed = len(ids), dict.fromkeys(range(len(ids) - 1))
    handles = []
    for name, vector in patch.tensors().items():

        def push(_: object, args: tuple[Tensor, ...], vector: Tensor = vector) -> tuple[Tensor, ...]:
            x = args[0].clone()
            x[:, len(pushed) :] += vector  # from the prompt's last token on
            return x, *args[1:]

        handles.append(lm.module(name).register_forward_pre_hook(push))
    with torch.no_grad():
        for _ in range(4):  # without a cache: earlier tokens are read again, as they were
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
    for handle in handles:
        handle.remove()
    with apply(lm, patch):
        text = generate(lm, prompt, max_new_tokens=4, stop=())
    want = ids[start:]
    want = want[: want.index(2)] if 2 in want else want  # the end token
    assert text == lm.tokenizer.decode(want, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads is 0"),
        ({"heads": 17}, "heads is 17, and tiny-llama has 16"),
        ({"folds": 1}, "folds 1"),
        ({"strength": float("nan")}, "strength is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        iti.fit(tiny_lm("llama"), RECORDS, replace(CFG, **change))  # type: ignore[arg-type]


def test_records_need_an_answer_of_memory_that_is_another() -> None:
    same = [replace(r, memory=r.answer) for r in RECORDS[:3]] + [replace(RECORDS[3], memory=""), RECORDS[4]]
    with pytest.raises(BadInput, match="1 of 5 records have an answer of memory"):
        iti.fit(tiny_lm("llama"), same, CFG)


def test_a_record_beyond_the_window_is_refused(lm: LM) -> None:
    long = ContextRecord("The capital of Japan. " * 200, "Where?", "Rome", "Paris")
    with pytest.raises(BadInput, match="reads 512"):
        observe(lm, [*RECORDS, long], CFG)
