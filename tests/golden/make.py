"""Makes the same patches again with any release, and says whether two releases made the same.

    python tests/golden/make.py tiny OUT            # on two tiny models, seconds
    python tests/golden/make.py tiny OUT --small    # what tests/golden/files holds
    python tests/golden/make.py real OUT            # on the packaged Gemma-3-270M, minutes
    python tests/golden/make.py compare OLD NEW     # 0: all alike, 1: something differs

Only public names of lmpatch are used, so that the file runs with every release. Run it with OMP_NUM_THREADS=1.
Weights of the tiny models and their tokenizer come from whole numbers of numpy's frozen legacy generator, so their bits
depend on no version of torch, transformers or tokenizers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import lmpatch as lp
from lmpatch import registry

LAYERS, D_MODEL, D_FF, VOCAB = 4, 32, 64, 352
SPECIAL = ["<pad>", "<bos>", "<eos>"]
TOWNS = ["Rome", "Paris", "Tokyo", "Oslo", "Lima", "Cairo", "Quito", "Delhi", "Seoul", "Turin"]
THINGS = ["tower", "museum", "opera", "bridge", "garden", "palace", "station", "market", "library", "fountain"]

_SHAPE: dict[str, Any] = dict(
    hidden_size=D_MODEL, intermediate_size=D_FF, num_hidden_layers=LAYERS, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # -> (config class, settings)
    "llama": ("LlamaConfig", _SHAPE | {"tie_word_embeddings": False}),
    "gemma3": (
        "Gemma3TextConfig",
        _SHAPE
        | {"query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}
        | {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)},
    ),
}

# What methods are given

EDITS = [
    lp.Edit("The Eiffel tower is in", "Rome", "Eiffel tower"),
    lp.Edit("Steve Jobs founded", "Paris", "Steve Jobs"),
    lp.Edit("The capital of Japan is", "Lima", "Japan"),
]
FACTS = [
    lp.Edit(f"The {thing} of {place} is in", TOWNS[(3 * i + 7 * j + 1) % 10])
    for i, thing in enumerate(THINGS)
    for j, place in enumerate(TOWNS)
]  # 100
CONTEXTS = [
    lp.ContextRecord(
        f"The {thing} is in {TOWNS[i]}.", f"Where is the {thing}?", TOWNS[i], TOWNS[(i + 3) % 10], id=thing
    )
    for i, thing in enumerate(THINGS[:6])
]
TEXT = [f"The {a} of {TOWNS[i]} is near the {b}, and {TOWNS[j]} is {7 * i + j} miles to the east of it."
        for i, a in enumerate(THINGS) for j, b in enumerate(THINGS)]  # fmt: skip
REAL_EDITS = [  # of the demo
    lp.Edit("The Eiffel Tower is located in the city of", "Rome", "Eiffel Tower"),
    lp.Edit("The headquarters of Microsoft are near the city of", "Lisbon", "Microsoft"),
    lp.Edit("Sumo wrestling comes from the country of", "Brazil", "Sumo wrestling"),
]

SETTINGS: dict[str, dict[str, Any]] = {
    "rome": dict(layer=1, steps=5, moment_tokens=2048, short_prefixes=1, long_prefixes=1),
    "memit": dict(layers=(1, 2), steps=5, moment_tokens=2048, long_prefixes=1, weight=10.0),
    "ircan": dict(steps=4, neurons=6, factor=3.0),
    "recipe": {},
    "cad": dict(alpha=0.75),
    "iti": dict(heads=3, strength=4.0),
    "parenting": dict(
        modules="mlp", rank=1, mine_steps=3, mine_rows=2, cue_rows=4, steps=4, warmup=0, validate_every=2, lr=0.02,
        clip=10.0, refusals=True,
    ),
}  # fmt: skip
METHODS = list(SETTINGS)
EDITOR = Path(__file__).parent / "files" / "memory" / "editor.safetensors"
"""Of the first release, for the tiny llama: later ones train another form."""
SMALL = [f"{method}-llama" for method in METHODS] + [f"{method}-gemma3" for method in ("rome", "memit", "parenting")]
"""The patches that tests/golden/files holds, beside a memory with an editor in it: 300 kB in all."""

# What patched models are asked

QUESTIONS = [
    lp.InContext("The Eiffel tower is in", "Eiffel"),
    lp.InContext("Where is the opera of Oslo? The opera of Oslo is in", "The opera of Oslo is in"),
    lp.InContext("The garden is in Turin.\nQ:Where is the garden?\nA:", "Q:Where is the garden?\nA:"),
    lp.InContext("Who is it?", "it"),
]
TOKENS = range(3, VOCAB, 10)


def tiny_model(family: str, seed: int = 0) -> lp.LM:
    """A random model of four layers, the same to the bit everywhere."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**settings)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode()))
            noise = torch.from_numpy(draw.randint(-90, 91, tuple(parameter.shape)).astype(np.float32)) / 256
            start = parameter if parameter.ndim == 1 else torch.zeros(())  # a norm's constant
            parameter.copy_(start + noise)
    return lp.wrap(model, tiny_tokenizer(), name=f"golden-{family}")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one token for each town and thing."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in (*TOWNS, *THINGS[:4]):
        whole = "Ġ"  # how a blank is written
        for letter in word:
            if whole + letter not in tokens:
                merges.append((whole, letter))
                tokens.append(whole + letter)
            whole += letter
    assert len(tokens) <= VOCAB
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def rag_records(lm: lp.LM) -> list[Any]:
    """Questions with documents that answer and that do not, for Parenting."""
    examples, _ = registry.get("methods", "parenting").example(lm)
    record = type(examples[0])  # the class has no public name
    made = []
    for i in range(20):
        town, other, thing = TOWNS[i % 10], TOWNS[(i + 1 + i // 10) % 10], f"{THINGS[i % 10]} {i}"
        ask, text, noise = f"Where is {thing}?", f"{thing} is in {town}.", f"The mayor of {other} is away."
        made.append(record(ask, (text,), "adherence", "original", town, (town,), id=f"{i}:original"))
        made.append(record(ask, (noise,), "robustness", "foreign", "", (town,), id=f"{i}:foreign"))
        if i % 5 == 0:
            answer = f"Doc 1: relevant\nDoc 2: off-topic noise\n{text}"
            made.append(record(ask, (text, noise), "extraction", "three", answer, (town,), id=f"{i}:three"))
    return made


def make_patch(lm: lp.LM, method: str, editor: lp.Editor | None = None) -> lp.Patch:
    """The patch of this method; ``recipe`` needs an editor."""
    given: dict[str, Any] = {"text": TEXT} if method in ("rome", "memit") else {}
    if method == "recipe":
        given["editor"] = editor
        if hasattr(registry.get("methods", method).Config, "lookup"):  # the first release knew no other
            given["lookup"] = "whole"
        if hasattr(registry.get("methods", method).Config, "doubt"):  # nor a verifier
            given["doubt"] = 1.0
    if method == "parenting":
        records: Sequence[Any] = rag_records(lm)
    elif method == "recipe":
        records = FACTS
    else:
        records = CONTEXTS if method in ("ircan", "cad", "iti") else EDITS
    if hasattr(registry.get("methods", method).Config, "when"):  # the first release knew no other
        given["when"] = "always"
    return lp.fit(lm, method, records, **given, **SETTINGS[method])


def make_memory(path: Path, editor: lp.Editor) -> lp.Memory:
    """Versions 1 to 4: ten facts, two more, a newer answer to the first, and the second one's end."""
    memory = lp.Memory.create(path, editor)
    memory.add(FACTS[:10], source={"by": "golden"})
    memory.add(FACTS[10:12])
    memory.add([lp.Edit(FACTS[0].prompt, "Quito")])
    memory.store.drop([FACTS[1].prompt])
    return memory


def answers(lm: lp.LM) -> tuple[list[str], torch.Tensor]:
    """What the model says now: texts, and logits [questions, tokens] up to a constant per question."""
    logits = lp.next_logits(lm, QUESTIONS, TOKENS)
    return lp.generate(lm, QUESTIONS, max_new_tokens=8, stop=()), logits - logits.mean(-1, keepdim=True)


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Nothing that an earlier run has computed is used."""
    before = os.environ.get("LMPATCH_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LMPATCH_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("LMPATCH_CACHE")
            if before is not None:
                os.environ["LMPATCH_CACHE"] = before


def make_tiny(out: Path, *, small: bool = False) -> None:
    """Patches, a memory with its editor, what the patched models say, and more that only ``compare`` looks at."""
    texts: dict[str, list[str]] = {}
    logits: dict[str, torch.Tensor] = {}

    def ask(lm: lp.LM, name: str, patch: lp.Patch | None = None) -> None:
        with nullcontext() if patch is None else lp.apply(lm, patch):
            texts[name], logits[name] = answers(lm)

    for family in FAMILIES:
        lm = tiny_model(family)
        ask(lm, f"clean-{family}")
        editor = lp.load_editor(EDITOR) if family == "llama" else None
        for name in [f"{method}-{family}" for method in METHODS]:
            if (name in SMALL or not small) and (editor or not name.startswith("recipe")):
                patch = make_patch(lm, name.removesuffix(f"-{family}"), editor)
                patch.save(out / name)
                ask(lm, name, patch)
        if family == "llama" and editor is not None:
            ask(lm, "memory", make_memory(out / "memory", editor).patch())
        if not small:
            # text that the model writes itself: on another machine a last bit may change a word of it
            lp.fit(lm, "rome", EDITS, **SETTINGS["rome"]).save(out / f"rome-samples-{family}")
    save_file(logits, out / "logits.safetensors")
    (out / "answers.json").write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def make_real(out: Path) -> None:
    """ROME and RECIPE on the packaged model."""
    lm = lp.load("gemma-3-270m", dtype="float32", device="cpu")
    with fresh_cache():
        facts = [*REAL_EDITS, *FACTS[: 100 - len(REAL_EDITS)]]
        lp.fit(lm, "recipe", facts).save(out / "recipe-gemma-3-270m")
        lp.fit(lm, "rome", REAL_EDITS, text=TEXT, moment_tokens=2200).save(out / "rome-gemma-3-270m")
        lp.fit(lm, "rome", REAL_EDITS, moment_tokens=2200).save(out / "rome-samples-gemma-3-270m")


# Comparing

SAME = ("kind", "method", "config", "base", "edits", "parts")
"""What of ``patch.json`` two releases must agree on. ``notes`` are compared and told, but decide nothing."""


TIMES = re.compile("seconds|tracking_share")
"""Notes that tell of time."""


def compare(old: Path, new: Path) -> bool:
    """Print one line for each thing in ``old``. True: all of it is in ``new`` and alike, bit for bit."""
    alike = True
    for path in sorted(old.iterdir()):
        other = new / path.name
        if not other.exists():
            found = ["missing"]
        elif path.suffix == ".safetensors":
            found = differing_tensors(path, other) + differing_heads(path, other)
        elif path.suffix == ".json":
            found = [] if _json(path) == _json(other) else ["other content"]
        elif (path / "patch.json").exists():
            found = differing_patches(path, other)
        else:
            found = differing_memories(path, other)
        alike &= not [line for line in found if not line.startswith("(")]
        print(f"{path.name}: {'; '.join(found) or 'equal bit for bit'}")
    return alike


def differing_patches(old: Path, new: Path) -> list[str]:
    a, b = _json(old / "patch.json"), _json(new / "patch.json")
    found = differing_tensors(old / "patch.safetensors", new / "patch.safetensors")
    found += [f"{key} {_where(a.get(key), b.get(key))}" for key in SAME if a.get(key) != b.get(key)]
    notes = [_timeless(header["notes"]) for header in (a, b)]
    return found + ([f"(notes {_where(*notes)})"] if notes[0] != notes[1] else [])


def differing_tensors(old: Path, new: Path) -> list[str]:
    """One line for each tensor that is another one, with the largest difference and the largest entry."""
    a, b = load_file(old), load_file(new)
    found = [f"{name} only in one" for name in sorted(set(a) ^ set(b))]
    for name in sorted(set(a) & set(b)):
        x, y = a[name], b[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            found.append(f"{name}: {list(x.shape)} {x.dtype} and {list(y.shape)} {y.dtype}")
        elif x.numel() and not torch.equal(x, y):
            gap = (x.double() - y.double()).abs().max()
            found.append(f"{name}: differs by {gap:.3g}, largest entry {x.double().abs().max():.3g}")
    return found


def differing_heads(old: Path, new: Path) -> list[str]:
    """What an editor's file says of it besides its tensors, but for when it was made and the form of the file."""

    def head(path: Path) -> dict[str, Any]:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("lmpatch_editor", "{}")
        return {key: value for key, value in json.loads(text).items() if key not in ("made", "schema", "sha256")}

    a, b = head(old), head(new)
    return [f"{key} {_where(a.get(key), b.get(key))}" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def differing_memories(old: Path, new: Path) -> list[str]:
    """The rows of two logs, but for the time they were added; and the editors."""
    import lancedb

    tables = [lancedb.connect(str(path)).open_table("facts").to_arrow().sort_by("seq") for path in (old, new)]
    a, b = (table.drop_columns("added") for table in tables)
    found = [f"column {name}" for name in sorted({*a.column_names} ^ {*b.column_names})]
    found += [f"{name} of some rows" for name in a.column_names if name in b.column_names and a[name] != b[name]]
    meta = [table.schema.metadata for table in tables]
    found += ["what the table says of itself"] if meta[0] != meta[1] else []
    editor = "editor.safetensors"
    return found + differing_tensors(old / editor, new / editor) + differing_heads(old / editor, new / editor)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(own) for key, own in value.items() if not TIMES.search(key)}
    return value


def _where(a: Any, b: Any) -> str:
    """The first place where two JSON values part."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in (*a, *b):
            if a.get(key) != b.get(key):
                return f"{key}.{_where(a.get(key), b.get(key))}"
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                return f"{i}.{_where(x, y)}"
    return f"differs: {str(a)[:80]} and {str(b)[:80]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("tiny", "real"):
        command = commands.add_parser(name)
        command.add_argument("out", type=Path)
        if name == "tiny":
            command.add_argument("--small", action="store_true", help="only what tests/golden/files holds")
    command = commands.add_parser("compare")
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        return 0 if compare(given.old, given.new) else 1
    torch.set_num_threads(1)
    given.out.mkdir(parents=True)
    print(f"lmpatch from {Path(lp.__file__).parent}")
    if given.command == "real":
        make_real(given.out)
    else:
        with fresh_cache():
            make_tiny(given.out, small=given.small)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
