"""The value search: fast equals plain, batched equals serial, limits hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CORE, tiny_lm
from torch.nn import functional as F

from lmpatch.data.edits import Edit
from lmpatch.errors import SubjectNotFound
from lmpatch.inference.forward import logits, short_head
from lmpatch.inference.tokens import encode
from lmpatch.locate.prefixes import prefixes
from lmpatch.locate.value_search import search
from lmpatch.methods.rome import Config
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM

EDITS = [
    Edit("The Eiffel Tower is in", subject="Eiffel Tower", target="Rome"),
    Edit("The mother tongue of Danielle Darrieux is", subject="Danielle Darrieux", target="English of Paris"),
    Edit("I think that Steve Jobs", subject="Steve Jobs", target="founded the Space Needle"),
]
CFG = Config(steps=6, short_prefixes=1, long_prefixes=1, lr=0.1)


def plain_search(lm: LM, edit: Edit, layer: int, cfg: Config) -> torch.Tensor:
    """One fact, full forwards, logits at every position, torch's own Adam: the definition, as a reference."""
    heads = prefixes(cfg.short_prefixes, cfg.long_prefixes)
    told = [encode(lm, head + edit.prompt, edit.target, edit.subject) for head in heads]
    essence = encode(lm, f"{edit.subject} is a", subject=edit.subject)
    module = lm.module(lm.layout.downs[layer])

    def run(row: object, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        seen = []

        def hook(m: object, a: object, out: torch.Tensor) -> torch.Tensor:
            flat = out.reshape(-1, out.shape[-1])
            seen.append(flat[row.subject_last].detach().clone())
            if delta is None:
                return out
            change = torch.zeros_like(flat)
            change = change.index_add(0, torch.tensor([row.subject_last]), delta[None])
            return (flat + change).reshape(out.shape)

        with hooked(Hook(module, hook)):
            z = lm.model(torch.tensor([row.ids])).logits[0].float()
        return z, seen[0]

    with torch.no_grad():
        _, clean = run(told[0], None)
        base = run(essence, None)[0][-1].log_softmax(-1)
    norm = clean.norm()
    delta = torch.zeros_like(clean, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=cfg.lr * float(norm) / len(clean) ** 0.5)
    for step in range(cfg.steps):
        loss = torch.zeros(())
        for row in told:
            z = run(row, delta)[0]
            want = torch.tensor(row.ids[row.target :])
            loss = loss + F.cross_entropy(z[row.target - 1 : len(row.ids) - 1], want) / len(told)
        now = run(essence, delta)[0][0 + (essence.subject_last if cfg.faithful else -1)].log_softmax(-1)
        then = run_base(lm, essence) if cfg.faithful else base
        size = delta.norm() if cfg.faithful else delta.norm() ** 2
        loss = loss + cfg.kl * (now.exp() * (now - then)).sum() + cfg.decay * size / norm**2
        if loss < cfg.stop or (cfg.faithful and step == cfg.steps - 1):
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            limit = cfg.clamp * norm
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    return delta.detach()


def run_base(lm: LM, essence: object) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([essence.ids])).logits[0, essence.subject_last].float().log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("family", [*CORE, "bloom"])
def test_the_fast_search_finds_the_delta_of_the_plain_one(family: str, faithful: bool) -> None:
    lm, cfg = tiny_lm(family), replace(CFG, faithful=faithful)
    found = search(lm, EDITS, [1], cfg)
    for i, edit in enumerate(EDITS):
        want = plain_search(lm, edit, 1, cfg)
        assert (found.delta[i, 0] - want).norm() <= 1e-4 * want.norm()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[1], [1, 2, 3]])
def test_facts_in_a_batch_equal_facts_one_by_one(lm: LM, layers: list[int]) -> None:
    cfg = replace(CFG, stop=2.0)  # facts end at different steps and leave the batch
    together = search(lm, EDITS, layers, cfg)
    for i, edit in enumerate(EDITS):
        alone = search(lm, [edit], layers, cfg)
        assert (together.delta[i] - alone.delta[0]).norm() <= 1e-4 * alone.delta[0].norm().clamp(min=1e-6)
        assert together.steps[i] == alone.steps[0]
        for layer in layers:
            torch.testing.assert_close(together.keys[layer][i], alone.keys[layer][0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_order_of_facts_does_not_matter(lm: LM) -> None:
    forward, backward = search(lm, EDITS, [1], CFG), search(lm, EDITS[::-1], [1], CFG)
    torch.testing.assert_close(forward.delta, backward.delta.flip(0), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_delta_stays_inside_its_limit(lm: LM) -> None:
    found = search(lm, EDITS, [1, 2], replace(CFG, lr=1.0, clamp=0.5))
    assert (found.delta.norm(dim=-1) <= 0.5 * found.clean.norm(dim=-1) * 1.0001).all()


@pytest.mark.slow
def test_the_search_lowers_the_loss(lm: LM) -> None:
    few, many = (search(lm, EDITS, [1], replace(CFG, steps=n, lr=0.3, clamp=50.0, decay=0.0)) for n in (1, 25))
    assert sum(many.loss) < sum(few.loss) - 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # a random Gemma's last norms keep this target out of reach
def test_hits_stop_a_fact_once_its_target_has_been_first_choice(family: str) -> None:
    lm = tiny_lm(family)
    fact = Edit("I saw the Eiffel Tower", subject="Eiffel Tower", target="is")  # its last token is the subject's
    cfg = replace(CFG, steps=300, lr=2.0, stop=0.0, clamp=5000.0, decay=0.0, kl=0.0, short_prefixes=0, long_prefixes=0)
    early, later = (search(lm, [fact], [3], cfg, hits=n) for n in (2, 6))
    assert early.steps[0] + 4 == later.steps[0] < 300


def test_a_fact_without_its_subject_is_refused_before_anything_runs(lm: LM) -> None:
    with pytest.raises(SubjectNotFound, match="Louvre"):
        search(lm, [EDITS[0], Edit("The Eiffel Tower is in", subject="Louvre", target="Rome")], [1], CFG)


@pytest.mark.slow
def test_joint_keys_are_those_of_the_forward_in_which_the_changes_act() -> None:
    lm = tiny_lm("gemma3")
    found = search(lm, EDITS[:1], [1, 2], CFG)
    row = encode(lm, EDITS[0].prompt, EDITS[0].target, EDITS[0].subject)
    at, seen = row.subject_last, {}

    def add(place: int, layer: int) -> object:
        def hook(m: object, a: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
            seen[layer] = a[0][0, at], out[0, at].clone()
            out = out.clone()
            out[0, at] += found.delta[0, place]
            return out

        return hook

    handles = [Hook(lm.module(lm.layout.downs[x]), add(i, x)) for i, x in enumerate([1, 2])]
    with torch.no_grad(), hooked(*handles):
        lm.model(torch.tensor([row.ids]))
    for layer in (1, 2):
        torch.testing.assert_close(found.keys[layer][0, 0], seen[layer][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.written[0, layer - 1], seen[layer][1], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_short_head_is_exact_at_the_start_and_the_whole_one_has_the_last_word(lm: LM) -> None:
    short, whole = (replace(CFG, head_tokens=n) for n in (60, None))
    first = [search(lm, EDITS, [1], replace(cfg, steps=1, stop=0.0)) for cfg in (short, whole)]
    assert first[0].loss == pytest.approx(first[1].loss, rel=1e-4)
    last = search(lm, EDITS, [1], short)
    checked = search(lm, EDITS, [1], replace(short, steps=6))
    assert last.loss == checked.loss
    states = torch.randn(5, lm.layout.d_model)
    head = short_head(lm, states, 60, torch.tensor([3]))
    z = torch.cat([head.logits(states), head.others[:, None]], 1)
    torch.testing.assert_close(z.logsumexp(-1), logits(lm, states).logsumexp(-1), atol=1e-4, rtol=1e-4)
    assert len(head.tokens) <= 61 and 3 in head.tokens


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_short_head_reaches_the_targets_that_the_whole_one_reaches(family: str) -> None:
    lm = tiny_lm(family)
    cfg = replace(CFG, steps=60, lr=0.5, clamp=50.0, kl=0.0, short_prefixes=0, long_prefixes=0)
    whole, short = (search(lm, EDITS, [2], replace(cfg, head_tokens=n)) for n in (None, 60))
    for a, b in zip(whole.loss, short.loss, strict=True):
        assert (a < cfg.stop) == (b < cfg.stop) or abs(a - b) < 0.2


def test_no_short_head_where_it_saves_nothing_or_a_hook_acts_on_the_head(lm: LM) -> None:
    states, none = torch.randn(2, lm.layout.d_model), torch.zeros(0, dtype=torch.long)
    assert short_head(lm, states, lm.layout.vocab, none) is None
    with hooked(Hook(lm.module(lm.layout.head), lambda m, a, out: out)):
        assert short_head(lm, states, 60, none) is None
