"""What a user can get wrong, all through `main` in one process: exit code 2, and one line that says what is wrong, where,
and what to do. Nothing is trained. Each case represents a kind of mistake."""

import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

import train
from contexts import BadInput
from train import Config, main

PROMPTS = "".join(
    json.dumps({"prompt": f"What is {i}?", "answer": f"{i}"}) + "\n" for i in range(24)
)


@pytest.fixture(scope="module", autouse=True)
def no_report():
    with pytest.MonkeyPatch.context() as patch:
        silent = SimpleNamespace(run=lambda *args, **kwargs: None, CalledProcessError=OSError)
        patch.setattr(train, "subprocess", silent)
        yield


@pytest.fixture
def place(tmp_path, checkpoint, monkeypatch):
    """A folder with a model, prompts and a context, which is where the program runs."""
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "train.jsonl").write_text(PROMPTS)
    (tmp_path / "c.txt").write_text("Be brief.")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(**changes):
    chosen = {
        "model": "model",
        "context": "instructions",
        "method": "cosd",
        "prompts": "train.jsonl",
        "context_file": "c.txt",
        "max_new_tokens": 4,
        "steps": 1,
        "batch": 2,
        "eval_size": 2,
        "device": "cpu",
        "out": "out",
    }
    argv = []
    for name, value in (chosen | changes).items():
        if value is True:
            argv.append(train.spelled(name))
        elif value is not None:
            argv += [train.spelled(name), str(value)]
    try:
        return main(argv)
    except SystemExit as error:  # argparse
        return error.code


def config(**changes):
    """config.json with other entries; None takes one away."""

    def change(place):
        path = place / "model" / "config.json"
        entries = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))

    return change


def text(name, content):
    def change(place):
        path = place / name
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def tokenizer_config(**changes):
    def change(place):
        path = place / "model" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def template(source):
    return text("model/chat_template.jinja", source)


def missing(*names):
    def change(place):
        for name in names:
            (place / name).unlink()

    return change


def adapters(place):
    for path in (place / "model").iterdir():
        path.unlink()
    (place / "model" / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def index(content):
    def change(place):
        (place / "model" / "model.safetensors").rename(place / "model" / "part.safetensors")
        (place / "model" / "model.safetensors.index.json").write_text(content)

    return change


def cut(name, share):
    def change(place):
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[: int(share * len(content))])

    return change


def nothing(place):
    pass


DEEP = "[" * 1000 + "]" * 1000
LONG = "7" * 5000
CASES = {  # what is wrong: how it comes about, flags, what the line says
    # the model's folder
    "mistyped folder": (nothing, {"model": "./nowhere/modle"}, ["--model ./nowhere/modle: "]),
    "mistyped, absolute": (nothing, {"model": "/nowhere/model"}, ["no config.json there"]),
    "mistyped, beside it": (lambda place: os.mkdir("models"), {"model": "models/tiny"}, ["no config.json there"]),
    "a file": (nothing, {"model": "c.txt"}, ["--model c.txt: "]),
    "empty folder": (missing("model/config.json"), {}, ["no config.json there"]),
    "adapters": (adapters, {}, ["no config.json there", "not adapters"]),
    "config cut off": (cut("model/config.json", 0.5), {}, ["--model model: ", "config.json"]),
    "config is a list": (text("model/config.json", "[]"), {}, ["--model model: "]),
    "no model type": (config(model_type=None), {}, ["--model model: ", "model_type"]),
    "unknown model type": (config(model_type="robot"), {}, ["--model model: ", "robot"]),
    "a field of the wrong type": (config(num_hidden_layers="two"), {}, ["num_hidden_layers", "'two'"]),
    "layers below zero": (config(num_hidden_layers=-1), {}, ["every size must be at least 1"]),
    "heads that do not divide": (config(num_key_value_heads=3), {}, ["--model model: ", "multiple"]),
    "rope is a text": (config(rope_parameters="fast"), {}, ["--model model: "]),
    "rope without factor": (config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), {}, ["factor"]),
    "rope of another kind": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), {}, ["yarn"]),
    "rope, factor is a text": (config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}), {}, ["--model model: "]),
    # its weights
    "no weights": (missing("model/model.safetensors"), {}, ["--model model: ", "safetensors"]),
    "weights cut off": (cut("model/model.safetensors", 0.7), {}, ["--model model: "]),
    "header of the weights": (text("model/model.safetensors", b"\xff" * 64), {}, ["--model model: "]),
    "shard index is no JSON": (index("{"), {}, ["--model model: "]),
    "shard index without a map": (index("{}"), {}, ["--model model: "]),
    "shard index to nowhere": (index('{"metadata": {}, "weight_map": {"lm_head.weight": "gone.safetensors"}}'), {}, ["--model model: ", "gone"]),
    # tokenizer, template, generation config
    "no tokenizer": (missing("model/tokenizer.json", "model/tokenizer_config.json"), {}, ["model: its tokenizer: "]),
    "tokenizer cut off": (cut("model/tokenizer.json", 0.5), {}, ["model: its tokenizer: "]),
    "tokenizer is a number": (text("model/tokenizer.json", "7"), {}, ["model: its tokenizer: "]),
    "tokenizer of no model": (text("model/tokenizer.json", "{}"), {}, ["model: its tokenizer: "]),
    "tokenizer config": (text("model/tokenizer_config.json", "{"), {}, ["model: "]),
    "no end token": (tokenizer_config(eos_token=None), {}, ["model: its tokenizer: it has no end token"]),
    "template, type": (template("{{ messages + 1 }}"), {}, ["model: chat template", "TypeError"]),
    "template, recursion": (template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), {}, ["chat template", "RecursionError"]),
    "template, syntax": (template("{% if %}"), {}, ["chat template", "TemplateSyntaxError"]),
    "template, division": (template("{{ 1 // 0 }}"), {}, ["chat template", "ZeroDivisionError"]),
    "template refuses a system turn": (template("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"), {}, ["no system", "give C as turns"]),
    "template, arguments": (nothing, {"chat_template_kwargs": "{"}, ["--model model: "]),
    "template, arguments as a list": (nothing, {"chat_template_kwargs": "[1]"}, ["--model model: "]),
    "generation config cut off": (text("model/generation_config.json", "{"), {}, ["model: its end tokens: "]),
    "generation config, end is a text": (text("model/generation_config.json", '{"eos_token_id": "end"}'), {}, ["model: its end tokens: "]),
    # prompts
    "nested a thousand deep": (text("train.jsonl", PROMPTS + '{"prompt": "a", "id": ' + DEEP + "}\n"), {}, ["train.jsonl:25: "]),
    "deep all by itself": (text("train.jsonl", DEEP), {}, ["train.jsonl:1: "]),
    "an integer of 5,000 digits": (text("train.jsonl", '{"prompt": "a", "id": ' + LONG + "}\n"), {}, ["train.jsonl:1: ", "digits"]),
    "half a character": (text("train.jsonl", '{"prompt": "a\\ud800"}\n'), {}, ["train.jsonl:1: ", "surrogates"]),
    "a folder": (lambda place: os.mkdir("folder"), {"prompts": "folder"}, ["folder: ", "IsADirectoryError"]),
    "not UTF-8": (text("train.jsonl", '{"prompt": "é"}'.encode("latin-1")), {}, ["train.jsonl: ", "utf-8"]),
    "no messages": (text("train.jsonl", '{"messages": []}\n'), {}, ["train.jsonl:1: "]),
    "messages of texts": (text("train.jsonl", '{"messages": ["a", "b"]}\n'), {}, ["train.jsonl:1: "]),
    "messages end with the user": (text("train.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n'), {}, ["train.jsonl:1: prompt: after an optional"]),
    "content is a list": (text("train.jsonl", '{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}\n'), {}, ["train.jsonl:1: "]),
    # contexts
    "context, half a character": (text("c.json", '[{"role": "system", "content": "\\ud800"}]'), {"context_file": "c.json"}, ["c.json: ", "surrogates"]),
    "context, nested deep": (text("c.json", DEEP), {"context_file": "c.json"}, ["c.json: "]),
    "context, long integer": (text("c.json", LONG), {"context_file": "c.json"}, ["c.json: ", "digits"]),
    "context is an object": (text("c.json", '{"role": "system"}'), {"context_file": "c.json"}, ["c.json: "]),
    "context is binary": (text("c.txt", bytes(range(256))), {}, ["c.txt: ", "utf-8"]),
    "context missing": (nothing, {"context_file": "c.md"}, ["c.md: ", "No such file"]),
    # flags
    "a seed of 20 digits": (nothing, {"seed": 10**20}, ["--seed 100000000000000000000: must be at least 0"]),
    "a batch for no machine": (nothing, {"batch": 10**9}, ["--batch 1000000000: "]),
    "not a number": (nothing, {"lr": "nan"}, ["--lr nan: must be at least 0"]),
    "a flag of before": (nothing, {"anchors": 0.5}, ["--anchors needs --anchor-file"]),
    "an --out that is no text": (nothing, {"out": "out\udcff"}, ["--out 'out\\udcff': ", "surrogates"]),
    "an --out that is a file": (nothing, {"out": "c.txt"}, ["c.txt"]),
    "a device that is not here": (nothing, {"device": "cuda:77"}, ["--device cuda:77"]),
    "score is no file": (nothing, {"score": "gone.py:f"}, ["--score gone.py:f: ", "gone.py"]),
    "score has no such function": (text("s.py", "x = 1"), {"score": "s.py:f"}, ["--score s.py:f: there is no f"]),
    "score leaves": (text("s.py", "import os\ndef f(text, row):\n    raise SystemExit(0)"), {"score": "s.py:f"}, ["train.jsonl:8: --score s.py:f", "SystemExit"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_code_2(place, capsys, case):
    change, flags, said = CASES[case]
    change(place)
    began = time.monotonic()
    assert run(**flags) == 2
    err = capsys.readouterr().err
    line = err.strip().splitlines()[-1]
    assert line.startswith("train.py: error: ") and "Traceback" not in err
    for words in said:
        assert words in line, line
    assert len(line) < 800 and time.monotonic() - began < 10
    assert not list(place.glob("*/*/state.pt"))


# ------------------------------------------------------------------------- what is no input, but fails
def test_an_export_that_cannot_be_written_is_one_line_and_resumed(place, capsys, monkeypatch):
    class RustError(Exception):
        """Like that of safetensors: neither an OSError nor a RuntimeError."""

    def full(self, folder, eos):
        raise RustError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr(train.GPT, "save_pretrained", full)
    assert run() == 2
    (work,) = place.glob("out/*.unfinished")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: {work.relative_to(place)}/export could not be written: " in said
    assert "No space left on device" in said
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setattr(
        train, "subprocess", SimpleNamespace(run=lambda *a, **k: None, CalledProcessError=OSError)
    )
    shutil.rmtree(work / "export", ignore_errors=True)
    (work / "export").write_text("a file")
    assert run(resume=True) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{work.relative_to(place)}/export could not be written: FileExistsError" in said
    (work / "export").unlink()
    assert run(resume=True) == 0 and not list(place.glob("out/*.unfinished"))
    assert list(place.glob("out/*/export/model.safetensors"))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"steps": "5"}, "--steps '5': TypeError"),
        ({"lr": "high"}, "--lr 'high': TypeError"),
        ({"context": 3}, "--context 3: choose from all, demonstrations"),
        ({"out": "\udcff"}, "--out '\\udcff': "),
    ],
)
def test_a_config_from_a_notebook_is_checked_as_well(changes, said):
    with pytest.raises(BadInput) as error:
        Config(**changes)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_terminal_without_the_signs_and_a_reader_who_leaves_stop_nothing(place):
    """`python train.py ... | head` in ASCII."""
    argv = [sys.executable, str(ROOT / "train.py"), "--model", "model", "--context", "instructions"]
    argv += ["--prompts", "train.jsonl", "--context-file", "c.txt", "--max-new-tokens", "2"]
    argv += ["--steps", "2", "--batch", "2", "--eval-size", "1", "--device", "cpu"]
    here = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    child = subprocess.Popen(argv, env=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    err = child.stderr.read().decode()
    assert child.wait() == 0, err
    assert "student {'cut_off': 1.0}, teacher {'cut_off': 1.0}, KL 0.0" in err
    assert "the teacher hardly beats the student: C can teach this model nothing" in err
    assert "most answers are cut off by --max-new-tokens 2" in err
    assert list(place.glob("out/*/export/model.safetensors"))
    assert "‖" in (place / "out" / "results.md").read_text(encoding="utf-8")
