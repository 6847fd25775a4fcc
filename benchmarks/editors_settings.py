"""Who takes part in ``editors.py``, and with which settings: as many are tried of each editor as of any other.

    python benchmarks/editors_settings.py DATA MODEL [--only rome rag] [--effort 20]

writes results/sweep-editors-MODEL.json and goes on where it stopped. The axes are read from a method's ``Config``: a
number is halved and doubled, a choice takes each of its values, a layer five depths. They are searched as in sweeps.py,
on counterfact/train, one commit of all facts at a time, by efficacy, paraphrase and exp(-KL) of neighbours. What a
paper tuned is no reason for more tries.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sweeps import TOKENS, Axis, Facts, Row, Settings, Sweep, times
from tables.rows import RESULTS

import lmpatch as lp
from lmpatch import api, registry
from lmpatch.benches.facts.compare import Entrant
from lmpatch.config import parse
from lmpatch.data.edits import read_edits
from lmpatch.data.lines import read_text
from lmpatch.errors import ForeignWrite, LmpatchError
from lmpatch.models.lm import LM
from lmpatch.patches.editor import load_editor
from lmpatch.provenance import hardware, now, versions

FORMS = {
    "ft_l": "finetune limit=0.002 layer=2",
    "locft_bf": "finetune end=eos",
    "lora": "finetune rank=8 lr=0.002",
    "memit_alphaedit": "memit solver=alphaedit ridge=0.3",
    "memit_nas": "memit nas=true spread=joint",
    "memit_encore": "memit frobenius=0.001 hits=2",
    "rag_always": "rag gate=always",
}
"""Further forms of methods, in the words of ``lp.compare``. One whose method or setting does not exist is left out."""
FIXED = {
    "seed", "faithful", "batch", "batch_size", "moment_tokens", "nas", "loss", "lookup", "top_k", "insert", "spread",
    "short_prefixes", "long_prefixes", "short_length", "long_length",
}  # fmt: skip
"""Settings that decide what is compared, or only how fast it is."""
NOTHING: Row = {"efficacy": 0.0, "paraphrase": 0.0, "kl": 0.0, "score": 0.0}
EFFORT, FACTS = 20, 100
ANCHORS = Path(__file__).parents[1] / "examples/facts.jsonl"


@dataclass
class Field:
    """The editors of one model, built by name."""

    lm: LM
    text: Sequence[str]
    editors: Sequence[lp.Editor] = ()
    only: Sequence[str] | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Every method that writes facts, and the forms, where both exist."""
        known = [who.name for who in api.entrants(self.lm)]
        every = [*known, *(name for name, words in FORMS.items() if words.split()[0] in known)]
        return [name for name in every if not self.only or name in self.only]

    def build(self, name: str, settings: Mapping[str, Any]) -> Entrant:
        """The editor of that name with these settings on top of its form's. What it would be refused for is taken."""
        words = FORMS.get(name, name)
        own = [editor for editor in self.editors if editor.method == words.split()[0]]
        words = " ".join([words, *written(settings)])
        (who,) = api.entrants(
            self.lm, [words], editors=own, text=self.text or None, anchors=read_edits(ANCHORS), force=True
        )
        return replace(who, name=name)

    def built(self, best: Mapping[str, Any]) -> dict[str, Entrant]:
        """All of them, with what tuning found best; a best at the end of an axis is taken as it is."""
        made = {}
        for name in self.names():
            chosen = best.get(name, {})
            try:
                made[name] = self.build(name, chosen.get("settings") or chosen.get("at_edge") or {})
            except LmpatchError as error:
                self.left_out[name] = str(error)
        return made


def written(settings: Mapping[str, Any]) -> Iterator[str]:
    """Settings as they are written on a command line."""
    for key, value in settings.items():
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        yield f"{key}={text.lower() if value is None or isinstance(value, bool) else text}"


def start_of(name: str) -> tuple[type[Any], Settings]:
    """The ``Config`` of an editor, and the defaults that its form leaves open."""
    method, *pairs = FORMS.get(name, name).split()
    config = registry.method(method).config
    own = parse(config, pairs, method)
    free = [each for each in fields(config) if each.default is not MISSING and each.name not in own]
    return config, {each.name: each.default for each in free}


def axes_of(config: type[Any], start: Settings, layers: int) -> list[Axis]:
    """What is searched: numbers above zero, choices, and the layer, where one stands."""
    hints, axes = get_type_hints(config), []
    depths = sorted({round((layers - 1) * share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)})
    for name, value in start.items():
        if name in FIXED:
            continue
        if name == "layer":
            axes.append(Axis(name, [value, *(depth for depth in depths if depth != value)]))
        elif choices := _choices(hints[name]):
            axes.append(Axis(name, choices))
        elif isinstance(value, float) and value > 0:
            axes.append(Axis(name, [value / 2, value, value * 2], times(2)))
        elif isinstance(value, int) and value > 1:
            axes.append(Axis(name, sorted({value // 2, value, value * 2}), times(2, 1)))
    return axes


def _choices(hint: Any) -> list[Any]:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if bool in options:
        return [False, True]
    named = [value for option in options if get_origin(option) is Literal for value in get_args(option)]
    return [*([None] if named and type(None) in options else []), *named]


def tune(them: Field, data: Path, file: Path, effort: int = EFFORT, n: int = FACTS) -> None:
    """Search the settings of each editor; the file keeps every try."""
    lm, edits = them.lm, read_edits(data / "counterfact/train.jsonl.gz", limit=n)
    facts = Facts(lm, edits, list(them.text))
    record = {"made": now(), "model": lm.name, "dtype": str(lm.dtype), "facts": len(edits), "tokens": TOKENS}
    file.parent.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(file, record | {"effort": effort, "versions": versions(), "hardware": hardware()})
    for name in them.names():

        def measure(settings: Settings, name: str = name) -> Row:
            try:
                return facts.measure([edits], [them.build(name, settings).make(lm, edits)])
            except ForeignWrite:
                raise
            except LmpatchError as error:
                return NOTHING | {"refused": str(error)}

        config, start = start_of(name)
        axes = axes_of(config, start, lm.layout.n_layers)
        begin = {axis.name: start[axis.name] for axis in axes}
        sweep.search(name, axes, begin, measure, ("efficacy", "kl", True), effort)


def opened(model: str, data: Path, editors: Sequence[Path], only: Sequence[str] | None, **how: Any) -> Field:
    """The model and everything that its editors read."""
    text = read_text(data / "wikitext2/raw_train_part.txt.gz")
    return Field(lp.load(model, **how), text, [load_editor(path) for path in editors], only)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("--only", nargs="+", help="these editors only")
    parser.add_argument("--effort", type=int, default=EFFORT, help="settings of each editor that may be tried")
    parser.add_argument("--facts", type=int, default=FACTS)
    parser.add_argument("--editors", nargs="+", type=Path, default=[], help="editors that lmpatch train wrote")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    them = opened(args.model, args.data, args.editors, args.only, dtype=args.dtype, device="cpu")
    tune(them, args.data, RESULTS / f"sweep-editors-{Path(args.model).name}.json", args.effort, args.facts)


if __name__ == "__main__":
    main()
