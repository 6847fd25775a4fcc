"""The command line on a tiny model folder: what each command does, and one line for everything that is wrong."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_lm, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from lmpatch import api
from lmpatch import resources as room
from lmpatch.cli import demo as demo_command
from lmpatch.cli import options, screen
from lmpatch.cli.app import COMMANDS, build
from lmpatch.cli.ask import in_context, text_of
from lmpatch.data.context import InContext
from lmpatch.data.edits import Edit, read_edits
from lmpatch.inference.generate import generate
from lmpatch.methods.recipe.method import example_editor
from lmpatch.models import packaged
from lmpatch.models.lm import LM
from lmpatch.models.load import load
from lmpatch.patches.decode.patch import DecodePatch
from lmpatch.patches.decode.rules import Power
from lmpatch.patches.file import load_patch
from lmpatch.patches.ledger import apply

FACTS: list[dict[str, Any]] = [
    {
        "prompt": "The Eiffel Tower is in",
        "subject": "Eiffel Tower",
        "target": "Rome",
        "old": "Paris",
        "rephrases": ["You find the Eiffel Tower in"],
        "locality": {"same_relation": [{"prompt": "The Colosseum is in", "answers": ["Rome"]}]},
    },
    {
        "prompt": "Steve Jobs founded",
        "subject": "Steve Jobs",
        "target": "Paris",
        "rephrases": ["The founder Steve Jobs started"],
        "locality": {"same_relation": [{"prompt": "The capital of Japan is", "answers": ["Tokyo"]}]},
    },
]
QUICK = ["--set", "steps=2", "--set", "layer=1", "--set", "covariance=false", "--set", "long_prefixes=0"]


def lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(*words: Any) -> Result:
    """``lmpatch words``; any exception but a clean exit is an error of the test."""
    return CliRunner(env={"COLUMNS": "160", "TERM": "dumb"}).invoke(
        build(), [str(word) for word in words], catch_exceptions=False
    )


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics are kept in a folder of the test run, not the user's, where the real model is."""
    if not request.node.get_closest_marker("real"):
        monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, facts, and a patch made of them by the command line."""
    path = tmp_path_factory.mktemp("cli")
    for name, seed in (("model", 0), ("other", 1)):
        tiny_model("llama", seed=seed).save_pretrained(path / name)
        tiny_tokenizer().save_pretrained(path / name)
    lines(path / "facts.jsonl", FACTS)
    made = run("fit", path / "model", "rome", path / "facts.jsonl", "-o", path / "patch", *QUICK)
    assert made.exit_code == 0, made.output
    return path


@pytest.mark.slow
def test_fit_writes_a_patch_and_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    done = run("fit", folder / "model", "rome", folder / "facts.jsonl", "-o", tmp_path / "new", *QUICK)
    assert done.exit_code == 0
    assert "rome: 2 edits for model" in done.stdout
    patch = load_patch(tmp_path / "new")
    assert patch.hash() == load_patch(folder / "patch").hash()
    assert patch.config["steps"] == 2


@pytest.mark.slow
def test_fit_on_top_of_a_patch_is_made_with_it_in_place(folder: Path, tmp_path: Path) -> None:
    words = ("finetune", folder / "facts.jsonl", "--set", "epochs=1", "--set", "layer=1")
    plain = run("fit", folder / "model", *words, "-o", tmp_path / "plain")
    on_top = run("fit", folder / "model", *words, "-o", tmp_path / "on_top", "-p", folder / "patch", "--mount", "side")
    assert (plain.exit_code, on_top.exit_code) == (0, 0)
    first, second = load_patch(tmp_path / "plain"), load_patch(tmp_path / "on_top")
    assert first.hash() != second.hash()
    assert first.base == second.base


@pytest.mark.slow
def test_ask_shows_the_answers_before_and_after_side_by_side(folder: Path) -> None:
    lm = load(folder / "model")
    prompt = FACTS[0]["prompt"]
    before = generate(lm, prompt, max_new_tokens=3)
    with apply(lm, load_patch(folder / "patch")):
        after = generate(lm, prompt, max_new_tokens=3)
    for mount in ("bake", "side"):
        words = ("ask", folder / "model", prompt, "-p", folder / "patch", "--tokens", 3, "--mount", mount)
        shown = run(*words).stdout
        assert shown.index("before") < shown.index("after")
        row = next(line for line in shown.splitlines() if prompt in line)
        assert screen.clean(before.strip()) in row
        assert screen.clean(after.strip()) in row


@pytest.mark.slow
def test_ask_with_a_context_puts_it_before_the_question(folder: Path) -> None:
    question, context = "Where is the Eiffel Tower?", "The Eiffel Tower is in Rome."
    file = folder / "context.txt"
    file.write_text(context + "\n")
    want = [InContext(f"{context}\nQ:{question}\nA:", f"Q:{question}\nA:")]
    assert in_context(context, [question]) == in_context(text_of(f"@{file}").rstrip("\n"), [question]) == want
    DecodePatch.make(load(folder / "model"), Power(2.0), method="cad").save(folder / "cad")
    words = ("ask", folder / "model", question, "-p", folder / "cad", "--tokens", 3)
    given, read = (run(*words, "--context", text) for text in (context, f"@{file}"))
    assert (given.exit_code, read.exit_code) == (0, 0)
    assert "before" in given.stdout and given.stdout == read.stdout
    refused("^lmpatch: cad compares .* Give one with --context.$", *words)
    refused("cannot be read", *words, "--context", f"@{folder / 'nowhere.txt'}")
    file.write_text(context * 200)
    refused("Shorten its context: it is not cut for you", *words, "--context", f"@{file}")


@pytest.mark.slow
def test_ask_without_a_patch_shows_answers_alone(folder: Path) -> None:
    done = run("ask", folder / "model", "The Eiffel Tower is in", "--tokens", 2)
    assert done.exit_code == 0
    assert "before" not in done.stdout


@pytest.mark.slow
def test_show_needs_no_model(folder: Path) -> None:
    done = run("show", folder / "patch")
    assert "The Eiffel Tower is in -> Rome" in done.stdout


@pytest.mark.slow
def test_merge_makes_one_patch_of_several(folder: Path, tmp_path: Path) -> None:
    done = run("merge", folder / "patch", folder / "patch", "-o", tmp_path / "both")
    assert done.exit_code == 0
    assert len(load_patch(tmp_path / "both").edits) == 4


@pytest.mark.slow
def test_an_exported_checkpoint_is_the_patched_model_in_plain_transformers(folder: Path, tmp_path: Path) -> None:
    done = run("export", folder / "model", "-p", folder / "patch", "--to", "checkpoint", "-o", tmp_path / "whole")
    assert done.exit_code == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    lm = load(folder / "model")
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad(), apply(lm, load_patch(folder / "patch")):
        assert torch.equal(plain(ids).logits, lm.model(ids).logits)


@pytest.mark.slow
def test_an_adapter_is_written(folder: Path, tmp_path: Path) -> None:
    done = run("export", folder / "model", "-p", folder / "patch", "-o", tmp_path / "adapter")
    assert done.exit_code == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_methods_lists_what_there_is_and_the_settings_of_one() -> None:
    listed = run("methods").stdout
    for name in ("rome", "memit", "finetune", "causal_trace", "facts"):
        assert name in listed
    assert "Block whose down-projection is written" in run("methods", "rome").stdout


@pytest.mark.slow
def test_doctor_finds_a_sound_model_sound(folder: Path) -> None:
    done = run("doctor", folder / "model")
    assert done.exit_code == 0
    assert "NO" not in done.stdout
    assert "every hook fires" in done.stdout


@pytest.mark.slow
def test_doctor_says_no_with_exit_code_1(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmpatch import doctor

    monkeypatch.setattr(doctor, "examine", lambda lm, progress: [doctor.Finding("it works", False, "it does not")])
    done = run("doctor", folder / "model")
    assert done.exit_code == 1
    assert "NO" in done.stdout


@pytest.mark.slow
def test_probe_writes_numbers_and_a_picture(folder: Path, tmp_path: Path) -> None:
    words = ("probe", folder / "model", "causal_trace", folder / "facts.jsonl", "--set", "samples=2", "--limit", 1)
    done = run(*words, "-o", tmp_path / "traces")
    assert done.exit_code == 0
    assert (tmp_path / "traces" / "000.png").read_bytes()[:4] == b"\x89PNG"
    (record,) = (tmp_path / "traces" / "causal_trace.jsonl").read_text().splitlines()
    assert json.loads(record)["prompt"] == FACTS[0]["prompt"]


BENCH = ["--set", "max_new_tokens=2", "--set", "latency=false", "--set", "bootstrap=10", "--set", "health=false"]


@pytest.mark.slow
def test_bench_of_a_patch_keeps_rows_and_a_page_and_a_second_run_adds_nothing(folder: Path, tmp_path: Path) -> None:
    words = ("bench", folder / "model", "facts", folder / "facts.jsonl", "-p", folder / "patch", *BENCH)
    done = run(*words, "-o", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "fact_in_prompt" in done.stdout and "tf_reliability" not in done.stdout
    rows = (tmp_path / "run" / "rows.jsonl").read_bytes()
    assert (tmp_path / "run" / "report.html").is_file()
    assert "tf_reliability" in run(*words, "-o", tmp_path / "run", "--all").stdout
    assert (tmp_path / "run" / "rows.jsonl").read_bytes() == rows


@pytest.mark.slow
def test_bench_of_a_method_makes_its_own_patches(folder: Path) -> None:
    settings = ["--method-set", "epochs=1", "--method-set", "layer=1"]
    words = ("bench", folder / "model", "facts", folder / "facts.jsonl", "--method", "finetune", *settings, *BENCH)
    done = run(*words, "--set", "n=2")
    assert done.exit_code == 0, done.output
    assert "finetune" in done.stdout


# Bad input


def tampered(folder: Path, to: Path) -> Path:
    """A copy of the patch with one bit of its tensors turned."""
    shutil.copytree(folder / "patch", to)
    file = to / "patch.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return to


def truncated(folder: Path, to: Path) -> Path:
    shutil.copytree(folder / "patch", to)
    file = to / "patch.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    return to


def pickled(folder: Path, to: Path) -> Path:
    to.write_bytes(pickle.dumps({"weights": [1.0]}))
    return to


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([{**FACTS[0], "subject": "Louvre"}], "subject 'Louvre' does not occur in prompt"),
        ([{**FACTS[0], "target": " "}], "line 1: .*empty target"),
        ([FACTS[0], FACTS[1], {**FACTS[0], "target": "Oslo"}], "line 1 says 'Rome', line 3 says 'Oslo'"),
        ([{"prompt": "x"}], "line 1: target is missing"),
        ([], "holds no records"),
    ],
    ids=["subject", "target", "contradiction", "missing", "empty"],
)
def test_bad_facts_get_one_line_and_leave_nothing(
    folder: Path, tmp_path: Path, record: list[Any], message: str
) -> None:
    facts = lines(tmp_path / "facts.jsonl", record)
    refused(message, "fit", folder / "model", "rome", facts, "-o", tmp_path / "out", *QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["layer=9"], "layer 9 asked for, the model has 4"),
        (["layers=1"], "rome has no setting 'layers'. Did you mean layer"),
        (["steps=many"], "setting steps is 'many'; it must be a whole number"),
        (["steps"], "Write it as key=value"),
    ],
)
def test_bad_settings_get_one_line(folder: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    extra = [word for setting in settings for word in ("--set", setting)]
    refused(message, "fit", folder / "model", "rome", folder / "facts.jsonl", "-o", tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [(tampered, "patch"), (truncated, "patch"), (pickled, "pickle")],
    ids=["tampered", "truncated", "pickled"],
)
@pytest.mark.parametrize("command", ["show", "ask"])
def test_a_broken_patch_gets_one_line(folder: Path, tmp_path: Path, make: Any, message: str, command: str) -> None:
    bad = make(folder, tmp_path / "bad")
    words = ["show", bad] if command == "show" else ["ask", folder / "model", "Paris", "-p", bad]
    refused(message, *words)


@pytest.mark.slow
def test_a_patch_for_another_model_gets_one_line(folder: Path) -> None:
    refused("does not fit other", "ask", folder / "other", "The Eiffel Tower is in", "-p", folder / "patch")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["fit", "{}/model", "roma", "{}/facts.jsonl", "-o", "{}/new"],
            "no method is called 'roma'. Did you mean rome",
        ),
        (["fit", "{}/model", "rome", "{}/none.jsonl", "-o", "{}/new"], "none.jsonl"),
        (["fit", "{}/model", "rome", "{}/facts.jsonl", "-o", "{}/patch"], "patch exists already"),
        (["fit", "{}/none", "rome", "{}/facts.jsonl", "-o", "{}/new"], "there is no file or folder"),
        (["fit", "{}/model", "finetune", "{}/facts.jsonl", "-o", "{}/new", "--text", "{}/facts.jsonl"], "text"),
        (["ask", "{}/model", "x", "--device", "toaster"], "device 'toaster' cannot be used here"),
        (["show", "{}/none"], "none"),
        (["methods", "roma"], "Did you mean rome"),
        (["probe", "{}/model", "trace", "{}/facts.jsonl"], "no probe is called 'trace'"),
        (["bench", "{}/model", "fact", "{}/facts.jsonl"], "Did you mean facts"),
        (["bench", "{}/model", "facts", "{}/facts.jsonl", "-p", "{}/patch", "--method", "rome"], "not both"),
        (["merge", "{}/patch", "-o", "{}/patch"], "exists already"),
        (["merge", "{}/patch", "-o", "{}/new"], "Give two or more"),
        (["help"], "No such command 'help'[.] lmpatch COMMAND --help explains one[.] See .* --help[.]"),
        (["apply"], "'apply'[.] A patch acts where -p names it"),
        (["undo"], "leave -p out"),
        (["list"], "lmpatch memory list"),
        (["memory", "lst"], "Did you mean 'list'[?] See"),
        (["ask", "{}/model", "--tokn", "0"], "No such option.*--tokn[^.]*[.] See .* ask --help[.]"),
        (["export", "{}/model", "-p", "{}/patch", "-o", "{}/facts.jsonl"], "exists already"),
    ],
)
def test_a_wrong_word_gets_one_line(folder: Path, words: list[str], message: str) -> None:
    refused(message, *(word.replace("{}", str(folder)) for word in words))
    assert not (folder / "new").exists()


def refused(message: str, *words: Any) -> None:
    """The command ends with code 2 and one line on stderr that matches, after the one that says what is loaded."""
    done = run(*words)
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("loading ")]
    assert line.startswith("lmpatch: ")
    assert re.search(message, line), line
    assert done.stdout == ""


@pytest.mark.slow
def test_too_little_memory_is_said_before_starting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda device: 1000)
    refused("1000 B is free", "bench", folder / "model", "facts", folder / "facts.jsonl", *BENCH)


# Stopping


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_ctrl_c_in_fit_says_that_nothing_was_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "fit", stop)
    done = run("fit", folder / "model", "rome", folder / "facts.jsonl", "-o", tmp_path / "out")
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1].startswith("lmpatch: stopped. The model is as it was and")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_in_bench_says_what_was_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "bench", stop)
    done = run("bench", folder / "model", "facts", folder / "facts.jsonl", "-o", tmp_path / "run")
    assert done.exit_code == 130
    assert f"What was scored is in {tmp_path / 'run'}; the same command goes on" in done.stderr


@pytest.mark.slow
def test_a_mistake_of_the_library_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(api, "fit", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("fit", folder / "model", "rome", folder / "facts.jsonl", "-o", folder / "new")


# Help and the demo


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_help_has_an_example(command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0
    assert "Example" in done.stdout
    assert f"lmpatch {command}" in done.stdout


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_help_breaks_no_line_in_mid_sentence(command: str) -> None:
    done = CliRunner(env={"COLUMNS": "400", "TERM": "dumb"}).invoke(build(), [command, "--help"])
    text = re.split("Examples:|Arguments|Options", done.stdout)[0].partition("Usage: ")[2].partition("\n")[2]
    assert all(line.strip().endswith(".") for line in text.splitlines() if line.strip()), text


def test_a_slip_in_a_models_name_is_said_before_anything_is_loaded() -> None:
    done = run("ask", "gemma-3-270", "x")
    assert done.exit_code == 2 and "Did you mean gemma-3-270m" in done.stderr and "loading" not in done.stderr


@pytest.mark.slow
def test_the_demo_holds_itself_to_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(lm: LM, method: str, edits: Any, **options: Any) -> Any:
        known = {"editor": example_editor(lm), "gate": "always"} if method == "recipe" else {}
        return fit(lm, method, edits, **known, **options)

    fit, lm = api.fit, tiny_lm("gemma3")
    weights = {name: p.clone() for name, p in lm.model.state_dict().items()}
    monkeypatch.setattr(options.Source, "open", lambda _: lm)
    monkeypatch.setattr(api, "fit", untrained)
    done = run("demo", "--count", 3, "-o", tmp_path / "patch")
    assert done.exit_code == 1  # an editor that was never trained keeps none of the promises
    assert "Every bit is back" in done.stdout
    assert re.search(r"changed: \d of 3. In other words: \d of 3. Neighbours as they were: \d of 3.", done.stdout)
    assert re.search(r"Says the target twice or more: \d of 3", done.stdout)
    assert done.stdout.count("[as before]") + done.stdout.count("[MOVED]") == 4  # three in a memory, one in the weights
    assert len(load_patch(tmp_path / "patch").edits) == 3
    assert all(torch.equal(p, weights[name]) for name, p in lm.model.state_dict().items())


def test_the_answers_of_the_demo_are_judged_as_they_are() -> None:
    edit = Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower", old=("Paris",))
    assert demo_command.states(edit, " Rome, not Paris") and not demo_command.states(edit, " Paris, not Rome")
    assert demo_command.said(edit, "Rome. Rome") == 2 and demo_command.said(edit, "Rome, the Romeo") == 1
    assert demo_command.sentence(" Rome. It is\nthere") == "Rome."


@pytest.mark.real
def test_the_demo_keeps_its_promises_on_the_real_model(tmp_path: Path) -> None:
    done = run("demo", "--json", "-o", tmp_path / "patch")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["changed"] == 12 and shown["reworded"] >= 10 and shown["neighbours"] >= 11 and shown["restored"]
    assert len(load_patch(tmp_path / "patch").edits) == 12


def test_example_writes_the_facts_file_and_never_over_another(tmp_path: Path) -> None:
    done = run("example", "-o", tmp_path / "facts.jsonl")
    assert done.exit_code == 0
    assert len(read_edits(tmp_path / "facts.jsonl", check=True)) == 32
    refused("exists already", "example", "-o", tmp_path / "facts.jsonl")
    refused("cannot be written", "example", "-o", tmp_path / "facts.jsonl" / "more")


QUESTIONS = [
    {"context": "The Eiffel Tower is in Rome.", "question": "Where is the Eiffel Tower?", "answer": "Rome"},
    {"context": "The capital of Japan is Seattle.", "question": "What is the capital of Japan?", "answer": "Seattle"},
]


@pytest.mark.slow
def test_fit_and_probe_read_questions_with_contexts(folder: Path, tmp_path: Path) -> None:
    questions = lines(tmp_path / "q.jsonl", QUESTIONS)
    made = run("fit", folder / "model", "ircan", questions, "-o", tmp_path / "patch", "--set", "steps=2")
    assert made.exit_code == 0, made.output
    assert load_patch(tmp_path / "patch").method == "ircan"
    words = ("probe", folder / "model", "integrated_gradients", questions, "-o", tmp_path / "out", "--set", "steps=2")
    first, again = run(*words), run(*words)
    assert first.exit_code == again.exit_code == 0, first.output
    assert first.stdout == again.stdout
    assert len((tmp_path / "out" / "integrated_gradients.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_rule_of_decoding_needs_no_records_and_other_methods_say_that_they_do(folder: Path, tmp_path: Path) -> None:
    made = run("fit", folder / "model", "cad", "-o", tmp_path / "cad", "--set", "alpha=1")
    assert made.exit_code == 0 and load_patch(tmp_path / "cad").config == {"alpha": 1.0}
    assert made.stdout.startswith("cad for model (") and made.stdout.splitlines()[0].endswith("): alpha=1.0")
    assert run("show", tmp_path / "cad").stdout == made.stdout.splitlines()[0] + "\n"
    refused = run("fit", folder / "model", "ircan", "-o", tmp_path / "ircan")
    assert refused.exit_code == 2 and "ircan learns from records" in refused.output


# One object, prompts by pipe, what is found before a model is loaded


def shown(*words: Any) -> Any:
    """The JSON object that a command prints."""
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.slow
def test_json_is_one_object_with_the_same_answers(folder: Path, tmp_path: Path) -> None:
    prompt, model = FACTS[0]["prompt"], folder / "model"
    rows = shown("ask", model, prompt, "Steve Jobs founded", "-p", folder / "patch", "--tokens", 3)["rows"]
    assert [list(row) for row in rows] == [["prompt", "before", "after"]] * 2
    assert rows[0]["before"] == generate(load(model), prompt, max_new_tokens=3)
    patch = load_patch(folder / "patch")
    assert shown("show", folder / "patch")["hash"] == patch.hash()
    made = shown("fit", model, "rome", folder / "facts.jsonl", "-o", tmp_path / "new", *QUICK)
    assert made["hash"] == patch.hash() and made["path"] == str(tmp_path / "new")
    assert "rome" in {row["method"] for row in shown("methods")["facts"]}
    assert {row["proof"] for row in shown("doctor", model)["proofs"]}
    export = shown("export", model, "-p", folder / "patch", "--rank", 1, "-o", tmp_path / "adapter")
    assert set(export["ranks"].values()) == {1} and max(export["discarded"].values()) > 0
    bench = shown("bench", model, "facts", folder / "facts.jsonl", "-p", folder / "patch", *BENCH)
    assert {"none", "fact_in_prompt", "rome"} == {run["run_id"] for run in bench["runs"]} and bench["verdict"]


@pytest.mark.slow
def test_prompts_come_from_stdin(folder: Path) -> None:
    words, prompts = ["ask", str(folder / "model"), "--tokens", "2", "--json"], "Steve Jobs founded\n\nParis is\n"
    dash, pipe = (CliRunner().invoke(build(), [*words, *more], input=prompts) for more in (["-"], []))
    assert [row["prompt"] for row in json.loads(dash.stdout)["rows"]] == ["Steve Jobs founded", "Paris is"]
    assert dash.stdout == pipe.stdout
    refused("stdin holds no prompt", "ask", folder / "model")


@pytest.mark.slow
def test_what_is_wrong_on_disk_is_found_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmpatch.models.load.load", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    model, facts, none = folder / "model", folder / "facts.jsonl", tmp_path / "none"
    refused("none", "ask", model, "x", "-p", none)
    refused("none", "fit", model, "rome", facts, "-o", tmp_path / "new", "-p", none)
    refused("none", "bench", model, "facts", facts, "-p", none)
    refused("none", "probe", model, "causal_trace", facts, "-p", none)
    refused("cannot be written", "fit", model, "rome", facts, "-o", tmp_path / "file" / "new")
    refused("cannot be written", "bench", model, "facts", facts, "-o", tmp_path / "file" / "run")


def test_the_version_and_what_a_shell_completes() -> None:
    assert run("--version").stdout == f"lmpatch {version('lmpatch')}\n"
    assert list(options.MODELS) == list(packaged.MODELS)
    assert options.named("methods")("rom") == ["rome"]


@pytest.mark.slow
def test_where_there_is_no_terminal_a_line_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(screen, "EVERY", 0.05)
    with screen.progress("waiting") as report:
        time.sleep(0.2)
        report(3, 8, "counting")
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("waiting (") and lines[-1].startswith("counting: 3 of 8 (")


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_mistake() -> None:
    command = f"{sys.executable} -m lmpatch methods | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_cache_is_listed_and_cleared_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path / "cache"))
    assert "0 B" in run("cache").stdout
    names = ("moments", "tiny-0123456789abcdef", "my-papers", "other-0123456789abcdef", "tiny-0123456789abcdee.partial")
    for name in names:
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "data").write_bytes(b"x" * 1024)
    (tmp_path / "cache" / "tiny-0123456789abcdef" / "config.json").write_text("{}")
    listed = run("cache").stdout
    assert str(tmp_path / "cache") in listed and "converted model" in listed and "1.0 KiB" in listed
    assert [row["folder"] for row in shown("cache")["rows"]] == ["moments", "tiny-0123456789abcdef"]
    assert "moments" in run("cache", "--clear").stdout
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(names[2:])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "words", [["methods"], ["methods", "--json"], ["--help"], ["--version"], ["example", "-o", "OUT"]]
)
def test_a_stdout_that_cannot_be_written_gets_one_line(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "facts.jsonl"
    command = [sys.executable, "-m", "lmpatch", *(str(out) if word == "OUT" else word for word in words)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    kept = f" {out} was written." if "OUT" in words else ""
    said = f"lmpatch: stdout cannot be written: No space left on device.{kept}\n"
    assert (done.returncode, done.stderr) == (2, said)
    assert out.exists() == bool(kept)
