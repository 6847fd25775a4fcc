"""The promises that every method keeps, in fp32 and bf16, on tiny Llama-, Gemma3- and GPT-2-shaped models.

A method file is picked up by being there. It is tried through ``example(lm)``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from snapshot import Line, Lines, bits, changed, name, spread, state
from tiny import CORE, tiny_lm
from torch import Tensor

from lmpatch import registry
from lmpatch.config import describe_fields
from lmpatch.data.context import InContext
from lmpatch.data.edits import Edit
from lmpatch.inference.multiple_choice import next_logits
from lmpatch.models.lm import LM
from lmpatch.patches.file import load_patch
from lmpatch.patches.ledger import apply
from lmpatch.patches.merge import merge
from lmpatch.patches.patch import Law, Patch

ROOT = Path(__file__).parents[1]
METHODS = registry.names("methods")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # of the logits' spread; in bf16 rounding alone moves them by 0.03 to 0.07
PROMPT = "The Eiffel Tower is in Paris, the capital of France."

MODELS = [
    pytest.param(f, d, marks=[pytest.mark.slow] if d == "bf16" and f != "llama" else []) for f in CORE for d in DTYPES
]

every_model = pytest.mark.parametrize(("family", "dtype"), MODELS)
every_method = pytest.mark.parametrize("method", METHODS)

KIND: dict[str, type[Patch]] = {m: get_type_hints(registry.method(m).fit)["return"] for m in METHODS}
every_choice = pytest.mark.parametrize("method", [m for m in METHODS if len(KIND[m].mounts) > 1])

POINTS = 16  # lines of a fit at which it is interrupted
INTERRUPTED: set[Line] = set()  # what methods share is interrupted under one of them


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Statistics are kept in a folder of the test run, not the user's."""
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    yield


def tiny(family: str, dtype: str) -> LM:
    """A fresh model; two of one family and dtype have the same weights."""
    return tiny_lm(family, DTYPES[dtype])


def fit(method: str, lm: LM) -> Patch:
    """The method's example patch; an editor it needs is an untrained one."""
    module = registry.get("methods", method)
    edits, config = module.example(lm)
    editor = {"editor": module.example_editor(lm)} if hasattr(module, "example_editor") else {}
    patch: Patch = module.fit(lm, edits, config, **editor)
    return patch


@dataclass(frozen=True)
class Fitted:
    """The method's example patch. A patch is a value: all tests of one method and model share it."""

    patch: Patch
    left: list[str]
    """What of the model the fit changed."""


@cache
def fitted(method: str, family: str, dtype: str) -> Fitted:
    """Fitted once, on a model of its own."""
    lm = tiny(family, dtype)
    lm.parameter(lm.layout.weight(lm.layout.downs[0])).requires_grad_(True)  # a caller's flag must survive
    before = state(lm)
    patch = fit(method, lm)
    return Fitted(patch, changed(before, state(lm)))


def logits(lm: LM, ends: Sequence[int] = range(8, len(PROMPT), 8)) -> Tensor:
    """[n, V] after prompts of several lengths, through the call that every patch acts in."""
    # the two end differently: a tiny model with tied embeddings repeats its last token, and both would say the same
    pairs = [(PROMPT[:end], PROMPT[end // 2 : end - 1]) for end in ends]
    prompts = [
        InContext(*pair)
        for full, without_context in pairs
        for pair in ((full, without_context), (without_context, full))
    ]
    return next_logits(lm, prompts, range(len(lm.parameter(lm.layout.weight(lm.layout.head)))))


@cache
def clean_logits(family: str, dtype: str) -> Tensor:
    """``logits`` of the model without a patch."""
    return logits(tiny(family, dtype))


def says(lm: LM, patch: Patch, mount: str) -> Tensor:
    """What the model says with this patch on it, in short: of weights that were written, the weights."""
    if mount == "bake":
        return torch.cat([lm.parameter(name).detach().flatten() for name in patch.base.touched])
    return logits(lm, (16, 40))


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference over the spread."""
    return float((a - b).abs().max() / b.std())


@pytest.mark.slow
@every_method
@every_model
def test_fit_leaves_the_model_as_it_was(method: str, family: str, dtype: str) -> None:
    assert fitted(method, family, dtype).left == []


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("points", [POINTS, pytest.param(10 * POINTS, marks=pytest.mark.slow)])
def test_an_interrupt_at_a_line_of_fit_leaves_the_model_as_it_was(method: str, points: int) -> None:
    """At its distinct lines, spread over the fit, each before the first time it runs."""
    lm = tiny("llama", "fp32")
    lm.parameter(lm.layout.weight(lm.layout.downs[0])).requires_grad_(True)
    before, lines = state(lm), Lines(lambda: fit(method, lm))
    for line in spread([line for line in lines.times if line not in INTERRUPTED], points):
        assert lines.interrupted(line)
        assert changed(before, state(lm)) == [], name(line)
        INTERRUPTED.add(line)


@pytest.mark.slow
@every_method
def test_it_fits_a_model_with_a_bias_for_each_head(method: str) -> None:
    lm = tiny("bloom", "fp32")
    clean = logits(lm)
    with apply(lm, fit(method, lm)):
        assert logits(lm).isfinite().all()
    assert torch.equal(logits(lm), clean)


@every_method
@every_model
def test_fit_makes_the_kind_of_patch_it_promises(method: str, family: str, dtype: str) -> None:
    assert type(fitted(method, family, dtype).patch) is KIND[method]


@every_method
@every_model
def test_apply_changes_the_model_and_remove_restores_every_bit(method: str, family: str, dtype: str) -> None:
    lm, patch = tiny(family, dtype), fitted(method, family, dtype).patch
    clean, before = clean_logits(family, dtype), state(lm)
    for mount in patch.mounts:
        with apply(lm, patch, mount=mount):
            assert not torch.equal(logits(lm), clean)
            assert (bits(lm) != before["bits"]) == (mount == "bake")
        assert torch.equal(logits(lm), clean)
        assert changed(before, state(lm)) == []


@pytest.mark.slow
@every_method
@every_model
def test_patches_come_off_in_any_order(method: str, family: str, dtype: str) -> None:
    lm, patch = tiny(family, dtype), fitted(method, family, dtype).patch
    for mount in patch.mounts:
        levels = [says(lm, patch, mount)]  # levels[n]: n of the patch are on
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(apply(lm, patch, mount=mount, strict=False))
                levels.append(says(lm, patch, mount))
        for order in permutations(range(3)):
            on = [apply(lm, patch, mount=mount, strict=False) for _ in range(3)]
            for left, index in zip((2, 1, 0), order, strict=True):
                on[index].remove()
                if left == 1 or (left == 2 and order[1] < order[2]):  # two orders begin alike; what stays is seen later
                    assert torch.equal(says(lm, patch, mount), levels[left])
        assert torch.equal(logits(lm), clean_logits(family, dtype))


@every_choice
@every_model
def test_all_its_mounts_agree(method: str, family: str, dtype: str) -> None:
    lm, patch = tiny(family, dtype), fitted(method, family, dtype).patch
    seen = []
    for mount in patch.mounts:
        with apply(lm, patch, mount=mount):
            seen.append(logits(lm))
    assert all(gap(other, seen[0]) <= TOLERANCE[dtype] for other in seen)


@every_method
@every_model
def test_saved_and_loaded_it_does_the_same(method: str, family: str, dtype: str, tmp_path: Path) -> None:
    lm, patch = tiny(family, dtype), fitted(method, family, dtype).patch
    patch.save(tmp_path / "patch")
    loaded = load_patch(tmp_path / "patch")
    assert type(loaded) is type(patch)
    assert loaded.hash() == patch.hash()
    assert (loaded.method, loaded.config, loaded.edits) == (patch.method, patch.config, patch.edits)
    for mount in patch.mounts:
        with apply(lm, patch, mount=mount):
            first = says(lm, patch, mount)
        with apply(lm, loaded, mount=mount):
            assert torch.equal(says(lm, patch, mount), first)


@every_method
@every_model
def test_merged_with_itself_it_follows_the_algebra_of_its_kind(method: str, family: str, dtype: str) -> None:
    """Two that stack act twice; of facts each is held once, and what is decided stays so (grd)."""
    lm, patch = tiny(family, dtype), fitted(method, family, dtype).patch
    with apply(lm, patch):
        once = logits(lm)
        with apply(lm, patch):
            twice = logits(lm)
    with apply(lm, merge(patch, patch)):
        merged = logits(lm)
    same, other = (once, twice) if patch.law() is Law.UNION else (twice, once)
    assert gap(merged, same) <= TOLERANCE[dtype]
    assert gap(merged, other) > gap(merged, same) or torch.equal(once, twice)


@every_method
@every_model
def test_fit_repeats(method: str, family: str, dtype: str) -> None:
    lm = tiny(family, dtype)
    torch.rand(3)  # the global random state must not matter
    assert fit(method, lm).hash() == fitted(method, family, dtype).patch.hash()


@every_method
@pytest.mark.parametrize("family", CORE)
def test_a_patch_fitted_in_fp32_goes_on_the_bf16_copy_of_its_model(method: str, family: str) -> None:
    copy = tiny(family, "fp32")
    copy.model.to(torch.bfloat16)
    clean = bits(copy)
    patch = fitted(method, family, "fp32").patch
    with apply(copy, patch, mount=patch.mounts[-1]):
        assert logits(copy).isfinite().all()
    assert bits(copy) == clean


@every_method
def test_the_patch_says_how_it_was_made(method: str) -> None:
    lm, patch = tiny("llama", "fp32"), fitted(method, "llama", "fp32").patch
    edits, config = registry.get("methods", method).example(lm)
    assert patch.method == method
    assert patch.config == json.loads(json.dumps(asdict(config)))
    assert len(patch.edits) == len(edits)
    for kept, edit in zip(patch.edits, edits, strict=True):
        if isinstance(edit, Edit):
            assert kept["prompt"] == edit.prompt
        else:  # what was read with a question may be long or private
            assert edit.prompt not in str(kept)
            assert kept.get("id", "") == edit.id and kept.get("prompt", edit.question) == edit.question
    assert patch.made["seconds"] >= 0
    assert patch.base.fingerprint == lm.fingerprint()
    assert method in patch.summary()


@every_method
def test_its_config_is_frozen_numbers_and_each_says_what_it_means(method: str) -> None:
    config = registry.get("methods", method).Config
    assert is_dataclass(config)
    assert config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    config()  # every field has a default
    assert [field for field, _, _, meaning in describe_fields(config) if not meaning] == []
    forbidden = re.compile(r"path|file|device|dtype|model")
    assert [field.name for field in fields(config) if forbidden.search(field.name)] == []


@every_method
def test_it_names_its_source(method: str) -> None:
    module = registry.get("methods", method)
    assert re.search(r"^\s*Source: \S", module.fit.__doc__ or "", re.M), "fit has no Source: line"


@every_method
def test_it_has_a_row_in_the_docs_and_a_test_file(method: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "methods.md").read_text(), re.M)
    assert rows.count(method) == 1, f"docs/methods.md has {rows.count(method)} rows for {method}"
    (module,) = [listed.module for listed in registry.listing("methods") if listed.name == method]
    assert (ROOT / "tests" / "methods" / f"test_{module}.py").is_file()


def test_there_are_methods_to_try() -> None:
    assert len(METHODS) >= 1
