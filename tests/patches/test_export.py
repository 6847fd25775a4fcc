"""What is exported does, in other libraries, what the patch does here."""

from __future__ import annotations

import copy
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import tiny_lm, tiny_tokenizer
from typer.testing import CliRunner

import lmpatch as lp
from lmpatch import tensor_file
from lmpatch.cli.app import build
from lmpatch.errors import BadInput, BadPatch, CannotMount, WrongModel
from lmpatch.methods.recipe.method import example_editor
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.patches.export import export
from lmpatch.patches.ledger import apply
from lmpatch.patches.lora import Lora
from lmpatch.patches.patch import Patch
from lmpatch.patches.weight.delta import Dense, Rows, Scale
from lmpatch.patches.weight.patch import WeightPatch

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, not ours

IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture
def saved(lm: LM, tmp_path: Path) -> Path:
    """The base model as a plain folder."""
    lm.model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@torch.no_grad()
def with_adapter(base: Path, adapter: Path) -> torch.Tensor:
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    out: torch.Tensor = peft.PeftModel.from_pretrained(model, adapter).eval()(input_ids=IDS).logits
    return out


def low_rank_patch(lm: LM, random_delta) -> WeightPatch:
    """A different rank on a down-projection, an attention output and a muted neuron."""
    layout = lm.layout
    shapes = {layout.weight(layout.downs[1]): (layout.d_model, layout.d_ff)}
    shapes |= {layout.weight(layout.attn_outs[0]): (layout.d_model, layout.d_model)}
    deltas = {name: random_delta("low_rank", shape) for name, shape in shapes.items()}
    shape = (layout.d_model, layout.d_ff)
    deltas[layout.weight(layout.downs[2])] = Scale(torch.tensor([3, 5, 7]), torch.tensor([0.0, 2.0, -1.0]), shape)
    deltas[layout.weight(layout.downs[3])] = Rows(torch.tensor([4, 1, 9, 2]), torch.randn(4, layout.d_ff), shape[0])
    return WeightPatch.make(lm, deltas, method="mixed")


@pytest.mark.slow
def test_the_adapter_is_the_patch(lm: LM, saved: Path, random_delta, logits, bits, tmp_path: Path) -> None:
    patch, was, before = low_rank_patch(lm, random_delta), bits(lm), logits(lm)
    done = export(lm, patch, "peft", tmp_path / "adapter")
    assert bits(lm) == was
    assert done.path == tmp_path / "adapter" and sorted(done.ranks.values()) == [2, 2, 3, 4]
    assert set(done.discarded.values()) == {0.0}
    with apply(lm, patch):
        want = logits(lm)
    got = with_adapter(saved, done.path)
    assert (want - before).abs().max() > 0.1
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.slow
def test_the_adapter_folder_names_its_base_and_every_rank(saved: Path, random_patch, tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    lm.model.config._name_or_path = "someone/base"
    export(lm, random_patch(lm), "peft", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/base" and config["fan_in_fan_out"] is True
    assert config["r"] == config["lora_alpha"] == 2
    assert config["target_modules"] == ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_full_rank_change_needs_a_rank_and_says_what_it_cuts_off(kind, random_patch, tmp_path, logits) -> None:
    lm = tiny_lm("llama")
    lm.model.save_pretrained(tmp_path / "base")
    patch = random_patch(lm, kind, layers=(1,))
    (name,) = patch.deltas
    with pytest.raises(BadInput, match=rf"{name}.*rank=") as caught:
        export(lm, patch, "peft", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists(), caught
    s = torch.linalg.svdvals(patch.deltas[name].dense().double()).square()  # type: ignore[attr-defined]
    done = export(lm, patch, "peft", tmp_path / "adapter", rank=8)
    assert done.ranks == {name: 8} and done.discarded[name] == pytest.approx(float(s[8:].sum() / s.sum()), rel=1e-4)
    whole = export(lm, patch, "peft", tmp_path / "whole", rank=64)
    assert whole.discarded[name] < 1e-12
    with apply(lm, patch):
        want = logits(lm)
    assert (with_adapter(tmp_path / "base", whole.path) - want).abs().max() < 1e-4
    assert (with_adapter(tmp_path / "base", done.path) - want).abs().max() > 1e-2


@pytest.mark.parametrize("place", ["models/gemma-3-270m-a5fd", "snapshots/0123"])
def test_an_adapter_names_a_cached_base_and_its_terms_and_not_where_this_machine_keeps_it(
    place: str, random_patch, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path / "models"))
    monkeypatch.setattr("lmpatch.patches.lora.HF_HUB_CACHE", str(tmp_path / "snapshots"))
    lm = tiny_lm("llama")
    lm.name, lm.model.config._name_or_path = "gemma-3-270m", str(tmp_path / place)
    export(lm, random_patch(lm), "peft", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "gemma-3-270m"
    text = (tmp_path / "a" / "README.md").read_text()
    assert lm.fingerprint() in text and "Gemma Terms of Use" in text and str(tmp_path) not in text
    lm.name = "mine"
    export(lm, random_patch(lm), "peft", tmp_path / "b")
    assert "mine" in (tmp_path / "b" / "README.md").read_text()
    assert "Terms" not in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_is_written_has_the_rights_that_the_umask_says(umask: int, random_patch, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    before = os.umask(umask)
    try:
        export(lm, random_patch(lm), "peft", tmp_path / "adapter")
        export(lm, random_patch(lm), "checkpoint", tmp_path / "checkpoint")
        random_patch(lm).save(tmp_path / "patch")
        example_editor(lm).save(tmp_path / "editor.safetensors")
        tensor_file.write(tmp_path / "answers", {}, {"x": torch.zeros(1)})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 9
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_a_rank_above_the_true_one_changes_nothing(random_patch, tmp_path) -> None:
    lm = tiny_lm("llama")
    done = export(lm, random_patch(lm), "peft", tmp_path / "a", rank=32)
    assert set(done.ranks.values()) == {2} and set(done.discarded.values()) == {0.0}
    with pytest.raises(BadInput, match="at least 1"):
        export(lm, random_patch(lm), "peft", tmp_path / "b", rank=0)


@pytest.mark.slow
def test_what_an_adapter_cannot_hold_is_refused(random_patch, tmp_path) -> None:
    lm = tiny_lm("gemma3")
    name = lm.layout.weight(lm.layout.embed)
    patch = WeightPatch.make(lm, {name: Rows(torch.tensor([1]), torch.ones(1, 64), lm.layout.vocab)}, method="rows")
    with pytest.raises(CannotMount, match="to='checkpoint'"):
        export(lm, patch, "peft", tmp_path / "a")
    with pytest.raises(BadInput, match="changes nothing"):
        export(lm, WeightPatch.make(lm, {}, method="nothing"), "peft", tmp_path / "a")
    with pytest.raises(WrongModel):
        export(tiny_lm("gemma3", seed=4), random_patch(lm), "peft", tmp_path / "a")
    with pytest.raises(BadInput, match="peft and checkpoint"):
        export(lm, patch, "gguf", tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="has none"):
        export(lm, patch, "checkpoint", tmp_path / "a", rank=3)
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_checkpoint_is_the_patched_model_to_the_bit(family, dtype, random_patch, logits, bits, tmp_path) -> None:
    tiny_lm(family, dtype).model.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # rotary tables stay fp32, as usual
    lm = wrap(model, tiny_tokenizer())
    patch, was, before = random_patch(lm, "dense"), bits(lm), logits(lm)
    done = export(lm, patch, "checkpoint", tmp_path / "out")
    assert bits(lm) == was and torch.equal(logits(lm), before)
    with apply(lm, patch):
        want = logits(lm)
    model = transformers.AutoModelForCausalLM.from_pretrained(done.path).eval()
    assert model.dtype == dtype
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits.float(), want)
    tokenizer = transformers.AutoTokenizer.from_pretrained(done.path)
    assert tokenizer("The Eiffel Tower").input_ids == lm.tokenizer("The Eiffel Tower").input_ids
    assert not [name for name in vars(lm.model) if "lmpatch" in name]


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_the_checkpoint_of_a_changed_tied_weight_stays_tied(family, logits, tmp_path) -> None:
    lm = tiny_lm(family)
    name = lm.layout.weight(lm.layout.embed)
    shape = (lm.layout.vocab, lm.layout.d_model)
    patch = WeightPatch.make(lm, {name: Dense(0.3 * torch.randn(shape))}, method="dense")
    export(lm, patch, "checkpoint", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with apply(lm, patch), torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits(lm))


@pytest.mark.parametrize("to", ["peft", "checkpoint"])
def test_a_full_folder_and_a_patched_model_are_refused(to, random_patch, tmp_path) -> None:
    lm = tiny_lm("llama")
    patch = random_patch(lm)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(BadInput, match="another path"):
        export(lm, patch, to, tmp_path / "full")
    with apply(lm, random_patch(lm, seed=2)), pytest.raises(BadInput, match="merge"):
        export(lm, patch, to, tmp_path / "out")
    export(lm, patch, to, tmp_path / "out")
    with pytest.raises(BadInput, match="another path"):
        export(lm, patch, to, tmp_path / "out")


# --- the plainest loader, and settings of generation ---


@torch.no_grad()
def with_one_alpha(lm: LM, folder: Path) -> torch.Tensor:
    """Logits of a loader that knows one ``lora_alpha`` and scales each change by it over the rank of its own tensor."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model = copy.deepcopy(lm.model)
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b, module = (
                tensors[name.replace("lora_A", "lora_B")],
                name.split(".lora_A")[0].removeprefix("base_model.model."),
            )
            change = config["lora_alpha"] / len(a) * b @ a
            assert len(a) == config["r"]
            model.get_parameter(f"{module}.weight").add_(change.T if config["fan_in_fan_out"] else change)
    out: torch.Tensor = model(input_ids=IDS).logits
    return out


def merged_facts(lm: LM) -> Patch:
    one, two = (
        lp.Edit("The Eiffel Tower is in", "Rome", subject="Eiffel Tower"),
        lp.Edit("Apple is in", "Oslo", subject="Apple"),
    )
    fits = [
        lp.fit(lm, "rome", facts, covariance=False, steps=2, layer=i) for i, facts in enumerate([[one], [one, two]])
    ]
    return lp.merge(*fits)


def muted(lm: LM) -> Patch:
    records = [
        lp.ContextRecord("The Eiffel Tower moved to Rome.", "Where is the Eiffel Tower?", "Rome", "Paris"),
        lp.ContextRecord("The Colosseum moved to Tokyo.", "Where is the Colosseum?", "Tokyo", "Rome"),
    ]
    return lp.fit(lm, "ircan", records, neurons=5, factor=2.0, when="always")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("make", ["mixed", merged_facts, muted])
def test_an_adapter_of_mixed_ranks_is_the_patch_for_loaders_that_know_one_alpha(
    make, family: str, random_delta, logits, tmp_path: Path
) -> None:
    lm = tiny_lm(family)
    patch = low_rank_patch(lm, random_delta) if make == "mixed" else make(lm)
    with apply(lm, patch):
        want = logits(lm)
    done = export(lm, patch, "peft", tmp_path / "exact")
    assert len(set(done.ranks.values())) > 1
    config = json.loads((tmp_path / "exact" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(done.ranks.values())
    assert not config.get("alpha_pattern") and not config.get("rank_pattern")
    assert (with_one_alpha(lm, done.path) - want).abs().max() < 1e-4 * want.abs().max()
    lm.model.save_pretrained(tmp_path / "base")
    assert (with_adapter(tmp_path / "base", done.path) - want).abs().max() < 1e-4 * want.abs().max()


def test_the_option_that_the_error_names_is_one_of_the_command_line(random_patch, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    with pytest.raises(BadInput, match=r"\(--rank\)"):
        export(lm, random_patch(lm, "dense"), "peft", tmp_path / "a")
    shown = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(build(), ["export", "--help"]).output
    assert "--rank" in re.sub(r"\x1b\[[0-9;]*m", "", shown)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.6, "top_p": 0.9},
        {"top_k": 20},
        {"min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1},
        {"num_beams": 1, "early_stopping": True},
        {"length_penalty": 2.0, "temperature": 0.3},
        {"num_return_sequences": 3},
        {"output_scores": True, "top_p": 0.5},
    ],
)
def test_a_checkpoint_is_written_whatever_its_generation_settings_say(
    given: dict[str, Any], random_patch, bits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = tiny_lm("llama")
    vars(lm.model.generation_config).update(given, repetition_penalty=1.1)
    was, kept = bits(lm), lm.model.generation_config
    done = export(lm, random_patch(lm), "checkpoint", tmp_path / "out")
    saved = transformers.GenerationConfig.from_pretrained(done.path)
    saved.validate(strict=True)
    assert saved.repetition_penalty == 1.1 and not saved.do_sample
    assert done.left_out == given and all(name in caplog.text for name in given)
    assert lm.model.generation_config is kept and all(getattr(kept, name) == value for name, value in given.items())
    assert bits(lm) == was


def test_generation_settings_that_have_an_effect_are_kept(random_patch, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    vars(lm.model.generation_config).update(do_sample=True, temperature=0.6, top_p=0.9)
    done = export(lm, random_patch(lm), "checkpoint", tmp_path / "out")
    saved = transformers.GenerationConfig.from_pretrained(done.path)
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.6, 0.9) and done.left_out == {}


def test_an_adapter_that_would_do_something_else_is_not_left_behind(
    tmp_path: Path, random_delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    patch, write = low_rank_patch(lm, random_delta), Lora.write

    def twice(self: Lora, lm: LM, folder: Path) -> None:
        write(self, lm, folder)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 2 * max(self.ranks.values())}))

    monkeypatch.setattr(Lora, "write", twice)
    for rank in (None, 2):
        with pytest.raises(BadPatch, match="read again its logits differ"):
            export(lm, patch, "peft", tmp_path / "adapter", rank=rank)
        assert not (tmp_path / "adapter").exists()


def test_a_checkpoint_that_would_do_something_else_is_not_left_behind(
    tmp_path: Path, random_delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    patch, base = low_rank_patch(lm, random_delta), copy.deepcopy(lm.model)
    monkeypatch.setattr(lm.model, "save_pretrained", base.save_pretrained)
    with pytest.raises(BadPatch, match="read again its logits differ"):
        export(lm, patch, "checkpoint", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
