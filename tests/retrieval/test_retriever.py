"""Retrievers: what a memory keeps of them, and that one from another package needs no edit here."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from tiny import tiny_lm

from lmpatch import BadInput, BadPatch, Edit, apply, load_patch, merge, retrieval
from lmpatch.inference.states import hidden
from lmpatch.methods import rag, recipe
from lmpatch.patches.editor import Editor
from lmpatch.patches.memory.patch import build_memory, retriever_of
from lmpatch.retrieval import Retriever, Scope, load_retriever
from lmpatch.retrieval.encoder import shared_encoder
from lmpatch.retrieval.network import Network, Shape
from lmpatch.retrieval.recipe import Recipe

FACTS = [Edit("The Eiffel Tower is in", "Rome"), Edit("The opera of Japan is in", "Oslo")]

OUTSIDE = '''
from lmpatch.inference.interventions import Insert
from lmpatch.retrieval.cosine import Cosine, load as load_cosine
import torch

class Both(Cosine):
    """A cosine that puts a vector and the fact in front."""
    name = "both"

    def insert(self, lm, facts, keys, form):
        width = lm.layout.d_model
        texts = super().insert(lm, facts, keys, form)
        return [Insert(insert.text, torch.ones(1, width) * float(key[0])) for insert, key in zip(texts, keys)]

def load(parts, tensors):
    return Both(**vars(load_cosine(parts, tensors)))
'''


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipe", "cosine"])
def test_it_is_rebuilt_from_its_parts_and_tensors(name: str) -> None:
    lm = tiny_lm("llama")
    one = retriever_of(recipe.example_editor(lm) if name == "recipe" else rag.editor_for(lm))
    again: Retriever = load_retriever(one.name, one.parts(), one.tensors())
    facts, prompts = [(e.prompt, e.target) for e in FACTS], ["Where is it?", FACTS[0].prompt]
    assert one.name == name and again.parts() == one.parts()
    keys, queries = one.keys(facts), one.queries(prompts)
    assert keys.shape == (2, one.width) and queries.shape == (2, one.matched)
    assert torch.equal(again.keys(facts), keys) and torch.equal(again.queries(prompts), queries)


@pytest.mark.slow
def test_a_cosine_compares_mean_states_of_length_one() -> None:
    retriever = retriever_of(rag.editor_for(tiny_lm("llama")))
    encoder, texts = retriever.encoder, ["Where is it?", "The Eiffel Tower is in the city of"]
    alone = [encoder.states([ids])[0][0].mean(0) for ids in encoder.tokenise(texts)]
    queries = retriever.queries(texts)
    torch.testing.assert_close(queries, torch.stack([v / v.norm() for v in alone]), atol=1e-5, rtol=1e-5)
    with pytest.raises(BadInput, match="no knowledge sentinel"):
        retriever.gate(queries)


@pytest.mark.parametrize("name", ["nothing", "index", "encoder", "../methods/rome", ""])
def test_a_name_that_is_no_retriever_is_refused(name: str) -> None:
    with pytest.raises(BadPatch, match="retriever called"):
        load_retriever(name, {}, {})


def test_parts_of_another_retriever_are_refused() -> None:
    with pytest.raises(BadPatch, match="no recipe retriever"):
        load_retriever("recipe", retriever_of(rag.editor_for(tiny_lm("llama"))).parts(), {})


SIZES = ("width", "content", "prompt_tokens", "target_tokens", "sentinel_tokens", "features", "d_model")
PROMPT_SIZES = ("d_model", "shared_tokens", "target_tokens", "hidden")
LIES: list[dict[str, object]] = [
    *({key: value} for key in SIZES for value in (None, "8", -1, 0, 7.5, 10**11, float("nan"), [8])),
    *({"adapt": value} for value in ("\x1b[2J", 10**11, -1, 2.5, None)),
    *({"encoder": value} for value in (5, None, float("nan"), ["x"])),
    {"content": 99}, {"pooler": "yes"}, {"pooler": True}, {"more": 1},
]  # fmt: skip


@cache
def example() -> Retriever:
    return retriever_of(recipe.example_editor(tiny_lm("llama")))


@pytest.mark.parametrize("lie", LIES)
def test_a_shape_that_its_tensors_do_not_have_is_refused_before_anything_is_allocated(lie: dict[str, object]) -> None:
    one = example()
    shape = one.parts()["shape"]
    if not all(key in shape and shape[key] is value for key, value in lie.items()):
        with pytest.raises(BadPatch):
            load_retriever("recipe", {**one.parts(), "shape": {**shape, **lie}}, one.tensors())


@pytest.mark.parametrize("lie", [{k: v} for k in PROMPT_SIZES for v in (None, "8", -1, 0, 7.5, 10**11, [8])])
def test_a_prompt_shape_that_its_tensors_do_not_have_is_refused(lie: dict[str, object]) -> None:
    one = example()
    with pytest.raises(BadPatch):
        load_retriever("recipe", {**one.parts(), "prompt": {**one.parts()["prompt"], **lie}}, one.tensors())


@pytest.mark.parametrize("lost", ["prompt.end", "prompt.scale", "key.first.weight"])
def test_a_retriever_that_lacks_a_tensor_is_refused(lost: str) -> None:
    one = example()
    with pytest.raises(BadPatch):
        load_retriever("recipe", one.parts(), {k: t for k, t in one.tensors().items() if k != lost})


def test_a_shape_of_the_first_release_reads_statements_alone() -> None:
    one = example()
    shape = {key: value for key, value in one.parts()["shape"].items() if key != "asked"}
    old = load_retriever("recipe", {**one.parts(), "shape": shape}, one.tensors())
    assert isinstance(old, Recipe) and not old.shape.asked and isinstance(one, Recipe) and one.shape.asked


@pytest.mark.slow
def test_a_key_is_made_of_the_prompt_too() -> None:
    one = example()
    assert isinstance(one, Recipe)
    net, (prompt, target) = one.network, (FACTS[0].prompt, FACTS[0].target)
    features = net.features([f"{prompt} {target}", prompt]).mean(0, keepdim=True)
    torch.testing.assert_close(one.keys([(prompt, target)]), net.matched_of(features), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_both_are_the_vectors_and_behind_them_the_text() -> None:
    lm = tiny_lm("llama")
    editor = recipe.example_editor(lm)
    inserts = {}
    for insert in ("vectors", "text", "both"):
        patch = recipe.fit(lm, FACTS[:1], recipe.Config(gate="always", insert=insert), editor=editor)  # type: ignore[arg-type]
        (inserts[insert],) = patch.intervention(lm).retrieve(["Where is it?"])
    vectors, text, both = inserts["vectors"], inserts["text"], inserts["both"]
    assert vectors and text and both and vectors.vectors is not None and both.vectors is not None
    assert (vectors.text, text.vectors, both.text) == ("", None, text.text) and text.text.endswith("Rome. ")
    assert torch.equal(both.vectors, vectors.vectors)


@pytest.mark.parametrize("name", ["recipe", "cosine"])
@pytest.mark.parametrize("value", [None, 5, [], {}, float("nan")])
def test_parts_of_other_types_are_refused(name: str, value: object) -> None:
    lm = tiny_lm("llama")
    one = retriever_of(recipe.example_editor(lm) if name == "recipe" else rag.editor_for(lm))
    for key in one.parts():
        if (key, value) != ("width", 5):
            with pytest.raises(BadPatch):
                load_retriever(name, {**one.parts(), key: value}, one.tensors())
        with pytest.raises(BadPatch):
            load_retriever(name, {k: v for k, v in one.parts().items() if k != key}, one.tensors())


def test_a_network_for_an_encoder_of_another_width_is_refused() -> None:
    encoder = shared_encoder("all-MiniLM-L6-v2")
    net = Network(Shape(encoder=encoder.name, features=8, width=16), encoder)
    with pytest.raises(BadPatch, match="width"):
        Network.of(net.shape, encoder, net.state_dict())


@pytest.mark.slow
def test_a_retriever_of_another_package_is_kept_found_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_retriever.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("both", "outside_retriever", "lmpatch.retrievers")
    monkeypatch.setattr(retrieval, "entry_points", lambda group: [point] if group == point.group else [])
    lm, plain = tiny_lm("llama"), rag.editor_for(tiny_lm("llama"))
    editor = Editor("outside", plain.config, plain.base, {**plain.parts, "retriever": "both"}, {})
    scope = Scope(gate="always", insert="text")
    patch = merge(build_memory(editor, FACTS[:1], scope), build_memory(editor, FACTS[1:], scope))
    patch.save(tmp_path / "patch")
    loaded = load_patch(tmp_path / "patch")
    assert loaded.hash() == patch.hash() and len(loaded.edits) == 2
    states = []
    for one in (patch, loaded, rag.fit(lm, FACTS, rag.Config(gate="always"))):
        with apply(lm, one):
            states.append(hidden(lm, [FACTS[0].prompt]))
    assert torch.equal(states[0], states[1]) and not torch.allclose(states[0], states[2])
    monkeypatch.setattr(retrieval, "entry_points", lambda group: [])
    with pytest.raises(BadPatch, match="'both', which is not here"):
        load_patch(tmp_path / "patch")
