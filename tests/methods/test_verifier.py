"""The verifier: a fact that was found is used if the question asks for it, told as text if the answer follows from it,
and left out if the question asks for something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from methods.test_recipe import FACTS, QUICK
from tiny import tiny_lm
from torch.nn import functional as F

from lmpatch import Ask, BadInput, Edit
from lmpatch.methods import recipe
from lmpatch.methods.recipe.verify import pairs
from lmpatch.patches.editor import Editor, find_editor, load_editor
from lmpatch.patches.memory.patch import MemoryPatch, build_memory
from lmpatch.patches.memory.search import MemoryIntervention
from lmpatch.retrieval import Fact, Scope
from lmpatch.retrieval.recipe import Recipe
from lmpatch.retrieval.verifier import KINDS, SLACK, Verifier
from lmpatch.training.facts import Split

VERIFIED = replace(QUICK, key_steps=0, prompt_steps=0, verifier_steps=3, verifier=8, verifier_batch=16, adapt=0)


def test_the_verifier_is_a_layer_over_difference_and_product_in_any_words() -> None:
    torch.manual_seed(0)
    made, (facts, asked) = Verifier(6, 5), torch.randn(2, 3, 6)
    made.start(torch.Generator().manual_seed(1))
    for row, f, q in zip(made(facts, asked), facts, asked, strict=True):
        inner = made.first.weight @ torch.cat([(f - q).abs(), f * q]) + made.first.bias
        wanted = F.log_softmax(made.second.weight @ inner.clamp(min=0) + made.second.bias, -1)
        assert torch.allclose(row, wanted, atol=1e-6)
    assert torch.allclose(made(facts, asked), made(asked, facts))  # it does not matter which of the two is the fact


def test_pairs_are_wordings_of_a_fact_what_follows_from_it_and_what_else_its_subject_is_asked() -> None:
    follows = {"reasoning": [Ask("The river of the city of the tower of Paris is", ("Tiber",))]}
    alias = {"alias": [Ask("The tower of Lutetia is in", ("Rome",))]}
    near = {"near": [Ask("Who built the tower of Paris?", ("Eiffel",)), Ask("Who lives in Rome?", ("Romans",))]}
    told = [replace(FACTS[0], portability=follows | alias, locality=near), *FACTS[1:]]
    asks, after, other = pairs(Split(told, (), ()), 0)
    prompt = FACTS[0].prompt
    own = {pair for pair in asks if prompt in pair}
    again = FACTS[0].rephrases[0]
    assert own == {(prompt, prompt), (prompt, again), (again, prompt), (prompt, "The tower of Lutetia is in")}
    assert after == [(prompt, follows["reasoning"][0].prompt)]
    assert other == [(prompt, "Who built the tower of Paris?")]  # the other question does not name the subject


@pytest.fixture(scope="module")
def editor() -> Editor:
    """The packaged retrieval with a verifier that was hardly trained."""
    return recipe.train(tiny_lm("llama"), FACTS, VERIFIED)


@pytest.mark.slow
def test_training_a_verifier_leaves_retrieval_as_it_was_and_resumes(tmp_path: Path, editor: Editor) -> None:
    half = find_editor("recipe", None)
    assert editor.base.any_model and editor.parts["shape"]["verifier"] == 8
    for name, tensor in half.tensors.items():
        assert name.startswith("verifier.") or torch.equal(editor.tensors[name], tensor)

    def interrupt(done: int, total: int, what: str) -> None:
        if (done, what) == (2, "verifier"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.train(tiny_lm("llama"), FACTS, VERIFIED, out=tmp_path, progress=interrupt)
    assert recipe.train(tiny_lm("llama"), FACTS, VERIFIED, out=tmp_path).hash() == editor.hash()
    editor.save(tmp_path / "own.safetensors")
    assert load_editor(tmp_path / "own.safetensors").hash() == editor.hash()


class Judge:
    """Says what it was told to about each question."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kinds: dict[str, str]) -> None:
        self.kinds, self.asked = kinds, list[tuple[Fact, str]]()
        monkeypatch.setattr(Recipe, "verify", lambda _, facts, prompts: self.chances(facts, prompts))

    def chances(self, facts: list[Fact], prompts: list[str]) -> torch.Tensor:
        self.asked += zip(facts, prompts, strict=True)
        return torch.tensor([[0.8 if name == self.kinds[prompt] else 0.1 for name in KINDS] for prompt in prompts])


@pytest.mark.slow
def test_what_the_verifier_says_decides_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = find_editor("recipe", None)
    told, again, after, else_ = "The tower of Paris is in", "You find the tower of Paris in", "It follows", "Other"
    texts = [told, again, f"{told} {after}", f"{told} {else_}"]
    judge = Judge(monkeypatch, dict(zip(texts, ("asks", "asks", "follows", "other"), strict=True)))
    patch = build_memory(editor, FACTS[:1], Scope(insert="text", doubt=0.5))
    found = [hits[0] for hits in patch.finder().search(texts)]
    assert [hit.fired for hit in found] == [True, True, True, False]
    assert [hit.follows for hit in found] == [False, False, True, False]
    assert judge.asked == [((FACTS[0].prompt, FACTS[0].target), text) for text in texts]
    sure = [hits[0] for hits in replace(patch, scope=Scope(insert="text", doubt=0.9)).finder().search(texts)]
    assert all(hit.fired for hit in sure)  # nobody is as sure as that

    judge.asked.clear()
    alone = replace(patch, scope=Scope(insert="text", doubt=1.0)).finder().search(texts)
    assert not judge.asked and all(hits[0].fired for hits in alone)
    for hit, hits in zip(found, alone, strict=True):
        assert hit.gate == pytest.approx(hits[0].gate - SLACK) and hit.score == pytest.approx(hits[0].score)
    for gate in ("always", "cosine"):
        other = replace(patch, scope=Scope(insert="text", gate=gate))  # type: ignore[arg-type]
        assert all(hits[0].fired for hits in other.finder().search(texts[:1])) and not judge.asked


@pytest.mark.slow
def test_what_follows_from_a_fact_is_told_as_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, both = tiny_lm("llama"), recipe.example_editor(tiny_lm("llama"))
    texts = ["The tower of Paris is in", "The tower of Paris is in a country called"]
    patch = recipe.fit(lm, FACTS[:1], recipe.Config(insert="both"), editor=both)
    monkeypatch.setattr(Recipe, "verifies", property(lambda _: True))
    monkeypatch.setattr(Recipe, "gate", lambda _, queries: torch.full((len(queries),), -1e6, dtype=torch.float64))
    Judge(monkeypatch, dict(zip(texts, ("asks", "follows"), strict=True)))
    asked, after = MemoryIntervention(lm, patch.finder()).retrieve(texts)
    assert asked is not None and after is not None
    assert asked.text == after.text and asked.vectors is not None and after.vectors is None
    vectors = replace(patch, scope=replace(patch.scope, insert="vectors"))
    (only,) = MemoryIntervention(lm, vectors.finder()).retrieve(texts[1:])
    assert only is not None and only.vectors is not None and not only.text  # as it was asked for


def test_retrieval_without_a_verifier_says_so() -> None:
    patch = recipe.fit(tiny_lm("gemma3"), FACTS[:1], recipe.Config(), editor=recipe.example_editor(tiny_lm("gemma3")))
    assert not patch.retriever.verifies
    with pytest.raises(BadInput, match="verifier_steps"):
        patch.retriever.verify([("a", "b")], ["c"])


@pytest.mark.slow
def test_a_memory_of_a_file_that_names_no_doubt_asks_no_verifier(tmp_path: Path) -> None:
    patch = build_memory(find_editor("recipe", None), FACTS[:1], Scope(insert="text"))
    parts = patch.parts()
    del parts["scope"]["doubt"]
    common = {name: getattr(patch, name) for name in ("method", "base", "config", "edits", "made")}
    again = MemoryPatch.from_parts(parts, patch.tensors(), **common)
    assert again.scope.doubt == 1.0 and patch.scope.doubt < 1


@pytest.mark.slow
def test_the_packaged_verifier_tells_relations_of_one_subject_apart() -> None:
    facts = [
        Edit("Marie Curie was born in", "Lisbon", "Marie Curie"),
        Edit("The author of Moby-Dick is", "Jane Austen", "Moby-Dick"),
        Edit("The headquarters of Siemens is in", "Oslo", "Siemens"),
        Edit("The official language of Peru is", "Danish", "Peru"),
    ]
    again = [
        "What is the birthplace of Marie Curie?",
        "Who wrote Moby-Dick?",
        "In which city is the head office of Siemens?",
        "What language do people speak in Peru?",
    ]
    other = [
        "What did Marie Curie discover?",
        "How many pages does Moby-Dick have?",
        "Who founded Siemens?",
        "How high is the highest mountain of Peru?",
    ]
    finder = build_memory(find_editor("recipe", None), facts, Scope(insert="text")).finder()
    told, asked, beside = (
        [hits[0].fired for hits in finder.search(texts)] for texts in ([f.prompt for f in facts], again, other)
    )
    assert all(told) and sum(asked) >= 3 and sum(beside) <= 1, (asked, beside)
