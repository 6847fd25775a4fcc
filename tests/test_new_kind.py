"""A new kind of patch costs one folder and one test file: it lives outside the package, and nothing in it is edited."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_lm
from torch import Tensor

import lmpatch as lp
from lmpatch import doctor
from lmpatch.inference.states import hidden
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.patches import file
from lmpatch.patches.base import Base
from lmpatch.patches.patch import Law, Patch
from lmpatch.provenance import hash_tensors

GAIN = '''"""Gain: what a module returns, times a number."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lmpatch.errors import BadPatch, WrongModel
from lmpatch.inference.interventions import Intervention
from lmpatch.models.hooks import Hook
from lmpatch.patches.handle import Handle
from lmpatch.patches.merge import merged_fields
from lmpatch.patches.patch import Law, Patch


@dataclass(eq=False)
class GainPatch(Patch):
    kind = "gain"
    mounts = ("side",)
    gains: dict = field(default_factory=dict)

    def parts(self):
        return {"modules": sorted(self.gains)}

    def tensors(self):
        return {name: torch.tensor([gain]) for name, gain in self.gains.items()}

    @classmethod
    def from_parts(cls, parts, tensors, **common):
        if parts != {"modules": sorted(tensors)}:
            raise BadPatch("its gains are not those it lists.")
        return cls(**common, gains={name: float(t) for name, t in tensors.items()})

    def describe(self):
        return [f"  {name}: times {gain:.3g}" for name, gain in self.gains.items()]

    def fits(self, lm):
        modules = dict(lm.model.named_modules())
        if missing := [name for name in self.gains if name not in modules]:
            raise WrongModel(f"{self.base.misfit(lm)}: it has no {missing[0]}.")

    def attach(self, lm, mount, others):
        def times(gain):
            return lambda module, args, output: output * gain

        return Handle([Intervention([Hook(lm.module(name), times(gain)) for name, gain in self.gains.items()])])

    def merged(self, others):
        gains = {}
        for patch in (self, *others):
            for name, gain in patch.gains.items():
                gains[name] = gains.get(name, 1.0) * gain
        return GainPatch(**merged_fields([self, *others]), gains=gains)

    def law(self):
        return Law.STACK


KIND = GainPatch
'''
HALF = '''"""Half: a new model with every second neuron, as a kind that makes a smaller model would."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from lmpatch.errors import CannotMerge
from lmpatch.models.load import wrap
from lmpatch.patches.patch import Law, Patch


@dataclass(eq=False)
class HalfPatch(Patch):
    kind = "half"
    mounts = ()

    def parts(self):
        return {}

    def tensors(self):
        return {}

    @classmethod
    def from_parts(cls, parts, tensors, **common):
        return cls(**common)

    def describe(self):
        return ["  every second neuron of every block"]

    def rebuild(self, lm):
        model = copy.deepcopy(lm.model)
        for down, ups in zip(lm.layout.downs, lm.layout.ups, strict=True):
            for name, dim in [(down, 1), *((up, 0) for up in ups)]:
                old = model.get_submodule(name)
                weight = old.weight.detach().unflatten(dim, (-1, 2)).select(dim + 1, 0).clone()
                new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
                new.weight = nn.Parameter(weight)
                model.set_submodule(name, new)
        model.config.intermediate_size //= 2
        return wrap(model, lm.tokenizer, name=f"half {lm.name}")

    def merged(self, others):
        raise CannotMerge("half of a half is another model.")

    def law(self):
        return Law.NONE


KIND = HalfPatch
'''


@pytest.fixture(params=["a folder on the path of patches", "an entry point of another package"])
def outside(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two kinds that lmpatch finds and does not hold."""
    folder = tmp_path / "site"
    for name, text in {"gain": GAIN, "half": HALF}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    patches = importlib.import_module("lmpatch.patches")
    if request.param.startswith("a folder"):
        monkeypatch.setattr(patches, "__path__", [*patches.__path__, str(folder)])
    else:
        monkeypatch.syspath_prepend(folder)
        points = [EntryPoint(name=name, value=name, group=file.GROUP) for name in ("gain", "half")]
        monkeypatch.setattr(file, "entry_points", lambda group: points if group == file.GROUP else [])
    yield folder
    for name in [m for m in sys.modules if m in ("gain", "half") or m.endswith(("patches.gain", "patches.half"))]:
        del sys.modules[name]


def new(kind: str, lm: LM, **own: Any) -> Any:
    cls: Any = file.find_kind(kind)
    assert cls is not None
    return cls(method="test", config={}, base=Base(lm.fingerprint(), lm.name), edits=({"prompt": "A"},), **own)


def states(lm: LM) -> Tensor:
    return hidden(lm, ["The Eiffel Tower is in", "Rome"])


def keeps_its_law(lm: LM, a: Patch, b: Patch) -> bool:
    """The law of the kind, on two patches of it."""
    with lp.apply(lm, a):
        once = states(lm)
        with lp.apply(lm, b):
            both = states(lm)
    if a.law() is Law.UNION:
        with lp.apply(lm, lp.merge(a, a)):
            return torch.allclose(states(lm), once, atol=1e-4)
    with lp.apply(lm, lp.merge(a, b)):
        return torch.allclose(states(lm), both, atol=1e-4) and not torch.allclose(both, once, atol=1e-3)


@pytest.mark.usefixtures("outside")
def test_it_goes_on_and_off_in_any_order_with_others(lm: LM) -> None:
    clean, bits = states(lm), hash_tensors(lm.model.state_dict().items(), exact=True)
    gain = new("gain", lm, gains={lm.layout.ups[1][0]: 2.0})
    (weight,) = (p for p in (k.trial(lm, 0, 1.0) for k in file.kinds()) if p is not None and p.kind == "weight")
    first, second = lp.apply(lm, gain), lp.apply(lm, weight)
    assert not torch.equal(states(lm), clean) and [on.patch for on in lp.applied(lm)] == [gain, weight]
    first.remove()
    with lp.apply(lm, weight.scaled(-1)):
        assert torch.equal(states(lm), clean)
    second.remove()
    assert torch.equal(states(lm), clean) and hash_tensors(lm.model.state_dict().items(), exact=True) == bits
    with pytest.raises(lp.CannotMount, match="mounted 'bake'.*mount='side'"):
        lp.apply(lm, gain, "bake")
    with pytest.raises(lp.WrongModel, match="has no nowhere"):
        lp.apply(lm, new("gain", lm, gains={"nowhere": 2.0}), strict=False)


@pytest.mark.usefixtures("outside")
def test_saved_loaded_shown_and_merged_it_keeps_the_law_of_its_kind(lm: LM, tmp_path: Path) -> None:
    one, two = (new("gain", lm, gains={lm.layout.ups[i][0]: 2.0 + i, lm.layout.ups[3][0]: 0.5}) for i in (0, 1))
    one.save(tmp_path / "one")
    again = lp.load_patch(tmp_path / "one")
    assert type(again) is type(one) and again.hash() == one.hash()
    assert f"{lm.layout.ups[0][0]}: times 2" in again.summary()
    assert repr(again) == repr(one) and "\n" not in repr(one)
    with lp.apply(lm, one):
        want = states(lm)
    with lp.apply(lm, again):
        assert torch.equal(states(lm), want)
    assert keeps_its_law(lm, one, two)
    with pytest.raises(lp.BadInput, match="kind gain cannot be a LoRA"):
        lp.export(lm, one, "peft", tmp_path / "out")
    with pytest.raises(lp.BadInput, match="gain patch changes no weight"):
        lp.export(lm, one, "checkpoint", tmp_path / "out")


def test_where_its_package_is_missing_its_patches_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    patches = importlib.import_module("lmpatch.patches")
    (tmp_path / "gain").mkdir()
    (tmp_path / "gain" / "__init__.py").write_text(GAIN)
    with monkeypatch.context() as here:
        here.setattr(patches, "__path__", [*patches.__path__, str(tmp_path)])
        new("gain", lm, gains={"model": 1.0}).save(tmp_path / "patch")
    sys.modules.pop("lmpatch.patches.gain", None)
    with pytest.raises(lp.BadPatch, match=r"kind 'gain'.*\['decode', 'memory', 'steer', 'weight'\].*package"):
        lp.load_patch(tmp_path / "patch")


@pytest.mark.slow
@pytest.mark.usefixtures("outside")
def test_the_doctor_passes_over_a_kind_without_a_trial(lm: LM) -> None:
    assert all(finding.holds for finding in doctor.examine(lm))


@pytest.mark.slow
@pytest.mark.usefixtures("outside")
def test_a_kind_that_makes_a_new_model_is_rebuilt_and_not_applied(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    half, clean = new("half", lm), states(lm)
    bits = hash_tensors(lm.model.state_dict().items(), exact=True)
    with pytest.raises(lp.CannotMount, match=r"half patch makes a new model.*rebuild\(lm, patch\)"):
        lp.apply(lm, half)
    half.save(tmp_path / "half")
    small = lp.rebuild(lm, lp.load_patch(tmp_path / "half"))
    assert small.layout.d_ff == lm.layout.d_ff // 2 and states(small).isfinite().all()
    assert hash_tensors(lm.model.state_dict().items(), exact=True) == bits and torch.equal(states(lm), clean)
    with pytest.raises(lp.CannotMerge):
        lp.merge(half, half)
    with pytest.raises(lp.WrongModel):
        lp.rebuild(small, half)
    done = lp.export(lm, half, "checkpoint", tmp_path / "small")
    loaded = type(lm.model).from_pretrained(done.path).eval()
    assert torch.equal(states(wrap(loaded, lm.tokenizer)), states(small))


@pytest.mark.usefixtures("outside")
def test_rebuild_is_for_such_kinds_and_for_a_model_without_patches(lm: LM) -> None:
    gain = new("gain", lm, gains={lm.layout.ups[1][0]: 2.0})
    with pytest.raises(lp.BadInput, match=r"kind gain acts on the model itself.*apply\(lm, patch\)"):
        lp.rebuild(lm, gain)
    with lp.apply(lm, gain), pytest.raises(lp.BadInput, match="carries 1 patches"):
        lp.rebuild(lm, new("half", lm))


def test_no_file_of_lmpatch_lists_the_kinds() -> None:
    """What serves every kind names none of them."""
    root = Path(lp.__file__).parent
    names = {cls.__name__ for cls in file.kinds()}
    shared = [*(root / "patches").glob("*.py"), root / "doctor.py", *(root / "benches").rglob("*.py")]
    assert names == {"WeightPatch", "HookPatch", "DecodePatch", "MemoryPatch"}
    naming = {f.name: sorted(n for n in names if n in f.read_text().partition('"""\n\nfrom')[2]) for f in shared}
    assert {name: found for name, found in naming.items() if found} == {}
