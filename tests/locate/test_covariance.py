"""Second moments equal a hook-by-hook reference, are cached by what they depend on, and ignore patches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import TEXT, tiny_lm

from lmpatch.errors import BadInput
from lmpatch.locate import covariance as _moments
from lmpatch.locate.covariance import estimate_covariance
from lmpatch.methods import rome
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import applied, apply

CORPUS = list(TEXT) * 60


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_all_layers_in_one_pass_equal_one_pass_per_layer_over_the_same_tokens(lm: LM) -> None:
    found = estimate_covariance(lm, [0, 2], text=CORPUS, tokens=2600)
    rows = _moments.text_rows(lm, CORPUS, 2600)[: found.tokens // (_moments.LENGTH - 1) + 1]
    for layer in (0, 2):
        keys = []
        hook = Hook(
            lm.module(lm.layout.downs[layer]),
            lambda m, a, keys=keys: keys.append(a[0].reshape(-1, lm.layout.d_ff)),
            before=True,
        )
        with torch.no_grad(), hooked(hook):
            lm.model(rows)
        wanted = (rows != lm.tokenizer.bos_token_id).reshape(-1)
        k = keys[0][wanted].double()
        assert len(k) == found.tokens
        torch.testing.assert_close(found.c[layer].double(), k.T @ k / len(k), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_second_call_reads_the_cache_and_another_text_does_not(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    once = estimate_covariance(lm, [1], text=CORPUS, tokens=2600)
    calls = []
    whole = _moments.accumulate
    monkeypatch.setattr(_moments, "accumulate", lambda *a: calls.append(1) or whole(*a))
    again = estimate_covariance(lm, [1], text=CORPUS, tokens=2600)
    assert not calls and torch.equal(once.c[1], again.c[1])
    assert (again.tokens, again.source) == (once.tokens, once.source)
    estimate_covariance(lm, [1], text=CORPUS[1:], tokens=2600)
    assert len(calls) == 1


@pytest.mark.slow
def test_another_model_gets_moments_of_its_own() -> None:
    a, b = tiny_lm("llama", seed=0), tiny_lm("llama", seed=1)
    first, second = (estimate_covariance(lm, [1], text=CORPUS, tokens=2600) for lm in (a, b))
    assert first.source != second.source and not torch.equal(first.c[1], second.c[1])


@pytest.mark.slow
def test_a_torn_cache_file_is_made_again(lm: LM, own_cache: Path) -> None:
    once = estimate_covariance(lm, [1], text=CORPUS, tokens=2600)
    (file,) = own_cache.rglob("1.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(estimate_covariance(lm, [1], text=CORPUS, tokens=2600).c[1], once.c[1])


@pytest.mark.slow
def test_patches_are_set_aside_and_put_on_again(lm: LM) -> None:
    clean = estimate_covariance(lm, [2], text=CORPUS, tokens=2600, cache=False)
    edits, cfg = rome.example(lm)
    with apply(lm, rome.fit(lm, edits, cfg)) as on:
        patched = {k: v.clone() for k, v in lm.model.state_dict().items()}
        assert torch.equal(estimate_covariance(lm, [2], text=CORPUS, tokens=2600, cache=False).c[2], clean.c[2])
        assert applied(lm) == (on,)
        assert all(torch.equal(v, patched[k]) for k, v in lm.model.state_dict().items())


@pytest.mark.slow
def test_without_text_the_model_writes_its_own_the_same_every_time(lm: LM) -> None:
    a, b = (estimate_covariance(lm, [1], tokens=2048, cache=False) for _ in range(2))
    assert torch.equal(a.c[1], b.c[1])


def test_too_little_text_is_refused_with_the_count(lm: LM) -> None:
    with pytest.raises(BadInput, match="too few"):
        estimate_covariance(lm, [1], text=["The Eiffel Tower is in Paris."], tokens=2600)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "text", "least"), [(1000, CORPUS, 2032), (300, None, 2032), (-1, None, 2032)])
def test_a_setting_that_is_too_small_is_named_and_the_text_is_not_blamed(
    tokens: int, text: list[str] | None, least: int
) -> None:
    lm = tiny_lm("llama")
    with pytest.raises(BadInput, match=f"moment_tokens is {tokens}, too few .* at least {least}"):
        estimate_covariance(lm, [1], text=text, tokens=tokens)
    assert estimate_covariance(lm, [1], text=text, tokens=least).tokens > 1000


def test_the_default_is_enough_on_a_narrow_model() -> None:
    """10 times d_ff would be fewer tokens than two halves of a text need."""
    lm = tiny_lm("llama")
    assert 10 * lm.layout.d_ff < 2032 <= estimate_covariance(lm, [1], text=CORPUS).tokens
