"""Your own model and files, whole runs of the program: what is learned, exported, resumed, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, tiny_checkpoint
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "notebooks"))

import adapters

import train
from contexts import KINDS, open_chat, student_prompt
from model import GPT, merged_copy
from train import main, parse

ROWS = [
    {
        "prompt": f"What is {a}?",
        "answer": f"{a}",
        "demonstration": f"It is {a}.",
        "solution": f"{a} = {a}",
    }
    for a in range(20, 36)
]
PIRATE = [
    {"role": "system", "content": "Be a pirate."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Arr!"},
]
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """The table and the figure have their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        silent = SimpleNamespace(run=lambda *args, **kwargs: None, CalledProcessError=OSError)
        patch.setattr(train, "subprocess", silent)
        yield


def lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "pirate.json").write_text(json.dumps(PIRATE))
    (tmp_path / "spec.md").write_text("# Rules\n\nNever {say} no.\n")
    lines(tmp_path / "train.jsonl", ROWS)
    asked = [row | {"prompt": row["prompt"].replace("What is", "Tell me")} for row in ROWS[:6]]
    lines(tmp_path / "heldout.jsonl", asked)
    lines(tmp_path / "anchors.jsonl", [{"prompt": f"Hello {i}."} for i in range(16)])
    return tmp_path


def flags(files, checkpoint, context="instructions", **changes):
    """The command line of a small run; a change to None removes a flag."""
    shown = {"specification": "spec.md", "instructions": "pirate.json"}.get(context)
    chosen = {
        "model": checkpoint,
        "context": context,
        "method": "cosd",
        "prompts": files / "train.jsonl",
        "heldout": files / "heldout.jsonl",
        "context_file": shown and files / shown,
        "max_new_tokens": 6,
        "steps": 2,
        "batch": 2,
        "device": "cpu",
        "out": files / "out",
    }
    argv = []
    for name, value in (chosen | changes).items():
        if value is True:
            argv.append(train.spelled(name))
        elif value is not None:
            argv += [train.spelled(name), str(value)]
    return argv


def run_one(*args, **changes):
    (result,) = train.train(parse(flags(*args, **changes)))
    return result


def state_of(result):
    return torch.load(Path(result["folder"]) / "state.pt", weights_only=True)


def contents(folder):
    """Every file below the folder, with its bytes."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@torch.no_grad()
def their_logits(folder):
    """What transformers makes of an exported folder, on a prompt of its own chat template."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(HI, add_generation_prompt=True)["input_ids"]
    return torch.tensor([ids]), theirs(torch.tensor([ids])).logits


@pytest.fixture
def students(monkeypatch):
    """The student of every run, as it was when it was exported, with its adapters merged in."""
    kept, original = [], train.export

    def export(run):
        kept.append(merged_copy(run.student))
        original(run)

    monkeypatch.setattr(train, "export", export)
    return kept


# ------------------------------------------------------------------------------- runs and exports
@pytest.mark.parametrize("method", ["cosd", "sft", "offline", "gkd"])
@pytest.mark.parametrize("context", KINDS)
def test_every_kind_by_every_method(files, checkpoint, students, context, method):
    result = run_one(files, checkpoint, context, method=method, score="contains")
    assert (
        {"score", "cut_off"} == result["before"]["teacher"].keys() == result["after"]["task"].keys()
    )
    assert result["before"]["kl"] > 0 < result["after"]["kl"] and result["after"]["drift_new"] > 0
    assert result["before"]["drift_new"] == pytest.approx(0, abs=1e-6)
    assert result["before"]["tokens_saved"] > 0
    folder = Path(result["folder"])
    names = {path.name for path in folder.iterdir()}
    projections = {"identity.json", "metrics.jsonl", "samples.json", "result.json"}
    assert names == projections | {"state.pt", "export"}
    assert state_of(result)["model"] == {}  # the export has the weights
    ids, theirs = their_logits(folder / "export")
    torch.testing.assert_close(theirs, students[0](ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": 2, "micro_batch": 1, "checkpointing": True},
        {"lora": 2, "dtype": "bf16", "teacher": "ema"},
        {"lora": 2, "dtype": "fp16", "teacher": "live"},
        {"dtype": "bf16", "divergence": "reverse_kl", "reduction": "sequence", "skip": 1},
        {"divergence": "policy_gradient", "shots": 2},
        {"method": "all", "heldout": None},
    ],
)
def test_other_choices_and_their_export(files, checkpoint, students, changes):
    result = run_one(files, checkpoint, **changes)
    export = Path(result["folder"]) / "export"
    ids, theirs = their_logits(export)
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(theirs, students[0](ids), rtol=1e-4, atol=1e-5)


def test_adapters_for_peft_give_the_students_logits(files, checkpoint, students):
    peft = pytest.importorskip("peft")
    result = run_one(files, checkpoint, lora=3, lr=0.02)
    assert adapters.main([result["folder"]]) == 0
    export = Path(result["folder"]) / "adapters"
    assert {f.name for f in export.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.tensor([[256, *range(30, 60)]])
    with torch.no_grad():
        before = base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, export)(ids).logits
    torch.testing.assert_close(theirs, students[0](ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(theirs, before, atol=1e-3)


def test_a_second_end_token_is_kept_in_the_export(files, tmp_path):
    folder = str(tiny_checkpoint(tmp_path / "model", eos=[257, 5]))
    result = run_one(files, folder)
    ends = transformers.GenerationConfig.from_pretrained(f"{result['folder']}/export").eos_token_id
    assert sorted(ends) == [5, 257]
    assert open_chat(f"{result['folder']}/export", 264).ends == {5, 257}


def test_the_export_has_the_files_of_the_original_tokenizer(files, tmp_path):
    """Byte for byte: another version of transformers may write the name of a class that others do not have."""
    folder = tiny_checkpoint(tmp_path / "model")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told["tokenizer_class"] = "PreTrainedTokenizerFast"  # as transformers 4 writes it
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    for name in ("special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("of the base")
    (folder / "tokenizers").mkdir()
    export = Path(run_one(files, str(folder))["folder"]) / "export"
    names = {path.name for path in export.iterdir()}
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    theirs = {path.name for path in folder.iterdir() if path.is_file()} - weights - {"README.md"}
    assert names == weights | theirs and "chat_template.jinja" in theirs
    for name in theirs:
        assert (export / name).read_bytes() == (folder / name).read_bytes()


def test_the_students_kl_to_the_teacher_falls(files, checkpoint):
    result = run_one(files, checkpoint, steps=40, batch=8, lr=0.003, eval_every=20)
    kl = [result["before"]["kl"], *[row["kl"] for row in result["curve"]], result["after"]["kl"]]
    assert len(kl) == 4 and kl[-1] < 0.7 * kl[0]


@torch.no_grad()
def kl_by_hand(student, teacher, chat, examples, y):
    """KL(student‖teacher), mean over the tokens: the student without the context, the teacher with it."""
    values = []
    for example, said in zip(examples, y):
        shown = chat.render(PIRATE, example.prompt)
        logs = []
        for model, prompt in ((student, student_prompt(chat, example)), (teacher, shown)):
            logits = model(torch.tensor([prompt + said])).logits
            logs.append(logits[0, len(prompt) - 1 : -1].log_softmax(-1))
        values.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
    return torch.cat(values).mean().item()


def test_kl_before_and_after_by_hand(files, checkpoint, monkeypatch):
    """On the student's own samples at temperature 1."""
    seen, original = [], train.write

    def write(run, model, prompts, temperature, *what):
        y = original(run, model, prompts, temperature, *what)
        if what == ("held-out KL",):
            seen.append((model is run.student, temperature, run.task, y))
        return y

    monkeypatch.setattr(train, "write", write)
    result = run_one(files, checkpoint, lr=0.03, chunk=3)
    base, tuned = (
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        for folder in (checkpoint, f"{result['folder']}/export")
    )
    before, after = seen
    for (own, temperature, task, y), student, name in (
        (before, base, "before"),
        (after, tuned, "after"),
    ):
        assert own and temperature == 1
        by_hand = kl_by_hand(student, base, task.chat, task.heldout, y)
        assert result[name]["kl"] == pytest.approx(by_hand, rel=1e-3)
    assert result["after"]["kl"] != pytest.approx(result["before"]["kl"], rel=0.01)


def test_the_perplexity_of_a_text_by_hand(files, checkpoint, capsys):
    sys.path.insert(0, str(ROOT / "notebooks"))
    import perplexity

    (files / "text.txt").write_text("A plain text.\n\nWith two paragraphs.\n\nx\n")
    result = run_one(files, checkpoint, lr=0.01)
    folders = [checkpoint, f"{result['folder']}/export"]
    capsys.readouterr()
    assert perplexity.main([str(files / "text.txt"), *folders]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    for folder, said in zip(folders, capsys.readouterr().out.splitlines()):
        theirs, nats = transformers.AutoModelForCausalLM.from_pretrained(folder), []
        for text in ("A plain text.", "With two paragraphs."):
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
            logs = theirs(ids).logits.detach()[0, :-1].log_softmax(-1)
            nats += [-row[token].item() for row, token in zip(logs, ids[0, 1:])]
        assert said == f"{torch.tensor(nats).mean().exp():8.2f}  {folder}"
    (files / "text.txt").write_text("x")
    assert perplexity.main([str(files / "text.txt"), checkpoint]) == 2
    assert "text.txt: no paragraph has two tokens" in capsys.readouterr().err


def test_anchors_from_a_file_are_scored_by_the_base(files, checkpoint, monkeypatch):
    anchors = [{"prompt": f"Hello {i}.", "context": "Be brief."} for i in range(16)]
    lines(files / "anchors.jsonl", anchors)
    seen, original = [], train.anchor_rows

    def anchor_rows(run, step):
        rows = original(run, step)
        seen.append((run, rows))
        return rows

    monkeypatch.setattr(train, "anchor_rows", anchor_rows)
    changes = {"anchor_file": files / "anchors.jsonl", "anchors": 0.5, "teacher": "ema"}
    result = run_one(files, checkpoint, batch=4, steps=6, lr=0.01, ema_rate=0.5, **changes)
    assert len(seen) == 6 and result["after"]["drift"] > 0
    chat = open_chat(checkpoint, 264)
    drawn = {tuple(prompt) for _, rows in seen for prompt in rows.prompts}
    trained_on = {tuple(chat.render("Be brief.", row["prompt"])) for row in anchors}
    held_out = {tuple(chat.render("Be brief.", anchors[i]["prompt"])) for i in (7, 15)}
    assert len(drawn) > 4 and drawn <= trained_on - held_out
    run, rows = seen[-1]
    assert rows.scorer is run.base is not run.teacher and rows.prompts == rows.scorer_prompts
    base, student = GPT.from_pretrained(checkpoint), run.student.state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(run.base.model.state_dict()[name], tensor)  # after all the steps
        assert not torch.equal(student[name], tensor)
    assert rows.weights.sum().item() == pytest.approx(0.5)
    for prompt in run.task.heldout:
        assert tuple(student_prompt(chat, prompt)) not in drawn


def test_what_saves_memory_changes_nothing_but_rounding(files, checkpoint):
    whole = run_one(files, checkpoint, batch=5, chunk=0)
    parts = {"micro_batch": 2, "chunk": 3, "checkpointing": True}
    cut = run_one(files, checkpoint, batch=5, out=files / "cut", **parts)
    assert Path(cut["folder"]).name == Path(whole["folder"]).name
    for key in ("kl", "drift_new"):
        assert cut["after"][key] == pytest.approx(whole["after"][key], rel=1e-3, abs=1e-6)
    for mine, theirs in zip(state_of(cut)["log"], state_of(whole)["log"]):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    exports = [load_file(f"{r['folder']}/export/model.safetensors") for r in (cut, whole)]
    for name, tensor in exports[0].items():
        torch.testing.assert_close(tensor, exports[1][name], rtol=0, atol=5e-6)


# ----------------------------------------------------------------------- resumed, kept, overwritten
KILL = """
import os, signal, sys, train
train.SAVE_SECONDS, train.subprocess.run = 0, None
calls, original = [], train.{target}
def killing(*args):
    calls.append(1)
    if len(calls) == {when}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
train.{target} = killing
train.main(sys.argv[1:])
"""


def killed(argv, target, when):
    code = KILL.format(target=target, when=when)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", code, *argv]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr


@pytest.mark.parametrize(
    "target, when, changes",
    [
        ("task_rows", 4, {"teacher": "ema", "lora": 2}),
        ("save_run", 7, {}),  # the export is written, the result not saved
    ],
)
def test_resume_after_kill_9_equals_an_uninterrupted_run(files, checkpoint, target, when, changes):
    changes = {"steps": 6, "lr": 0.01, "score": "exact"} | changes
    argv = flags(files, checkpoint, **changes)
    killed(argv, target, when)
    (work,) = (files / "out").glob("*.unfinished")
    assert torch.load(work / "state.pt", weights_only=True)["step"] == min(when - 1, 6)
    assert main([*argv, "--resume"]) == 0
    whole = run_one(files, checkpoint, out=files / "whole", **changes)
    folder = files / "out" / Path(whole["folder"]).name
    resumed = json.loads((folder / "result.json").read_text())
    for key in ("before", "after", "curve", "config", "setting"):
        assert resumed[key] == json.loads(json.dumps(whole[key]))
    logs = [state_of(result)["log"] for result in (resumed, whole)]
    assert [row | {"seconds": 0} for row in logs[0]] == [row | {"seconds": 0} for row in logs[1]]
    exports = [sorted(place.glob("export/*")) for place in (folder, Path(whole["folder"]))]
    mine, theirs = exports
    assert [path.name for path in mine] == [path.name for path in theirs]
    for one, other in zip(mine, theirs):
        assert one.read_bytes() == other.read_bytes()
    assert not list((files / "out").glob("*.unfinished"))


def test_a_complete_run_is_not_made_again(files, checkpoint, monkeypatch):
    result = run_one(files, checkpoint)
    before = contents(result["folder"])
    monkeypatch.setattr(train, "fit", None)
    assert run_one(files, checkpoint, resume=True) == state_of(result)["result"]
    assert contents(result["folder"]) == before
    (files / "pirate.json").write_text(json.dumps(PIRATE[:1]))  # the same name, another content
    with pytest.raises(TypeError):  # fit is called: it is another run
        run_one(files, checkpoint, resume=True)
    assert contents(result["folder"]) == before


def test_other_settings_do_not_overwrite(files, checkpoint):
    first = run_one(files, checkpoint)
    before = contents(first["folder"])
    second = run_one(files, checkpoint, divergence="jsd")
    assert second["folder"] != first["folder"] and contents(first["folder"]) == before
    assert Path(second["folder"], "export", "model.safetensors").exists()
    assert len(list((files / "out").glob("instructions-cosd-*"))) == 2


def test_a_new_export_leaves_nothing_of_a_stopped_one(files, checkpoint, monkeypatch):
    original = train.save_run
    monkeypatch.setattr(train, "save_run", lambda run: 1 / 0 if run.result else original(run))
    with pytest.raises(ZeroDivisionError):
        run_one(files, checkpoint, lora=2)
    (stopped,) = (files / "out").glob("*.unfinished/export")
    (stopped / "left-over.safetensors").write_text("of an earlier try")
    monkeypatch.setattr(train, "save_run", original)
    result = run_one(files, checkpoint, lora=2, resume=True)
    found = [path.stem for path in Path(result["folder"]).glob("export/*.safetensors")]
    assert found == ["model"] and not list((files / "out").glob("*.unfinished"))


def test_adapters_that_cannot_be_written_are_refused_in_one_line(files, checkpoint, capsys):
    result = run_one(files, checkpoint)
    for folder, message in [(result["folder"], "--lora"), (files / "nowhere", "No such file")]:
        assert adapters.main([str(folder)]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_help_comes_in_groups_and_names_each_flag_once(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = capsys.readouterr().out
    titles = ["what to learn, and how:", "your own model:", "the run:"]
    places = [said.index(title) for title in titles]
    assert places == sorted(places)
    for flag, group in (("--steps", 0), ("--context-file", 1), ("--resume", 2)):
        assert said.count(f"  {flag} ") + said.count(f"  {flag},") == 1
        later = [place for place in places if place > said.index(f"  {flag}")]
        assert len(later) == 2 - group


def test_threads_that_have_nothing_to_do_sleep():
    """In another process, because it must be set before torch is imported."""
    code = "import os, train; print(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in ({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"):
        here = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
        said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=here, capture_output=True)
        assert said.stdout.decode().strip() == expected


def test_a_damaged_state_is_named(files, checkpoint, capsys):
    result = run_one(files, checkpoint)
    path = Path(result["folder"]) / "state.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    before = contents(files)
    assert main(flags(files, checkpoint, resume=True)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{path} cannot be used; delete it, or choose another --out" in said
    assert contents(files) == before


def test_dry_run_writes_nothing_and_loads_no_weights(files, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(GPT, "from_pretrained", None)
    before = contents(files)
    assert main(flags(files, checkpoint, dry_run=True, lora=4)) == 0
    assert "memory and time: python notebooks/plan.py" in capsys.readouterr().err
    assert contents(files) == before and not (files / "out").exists()
    assert main(flags(files, checkpoint, dry_run=True, score="vibes")) == 2


# ----------------------------------------------------------------------------------------- bad input
CASES = {  # what is wrong: {file: content}, flags, what is said
    "not JSON": ({"train.jsonl": '{"prompt": "a"}\n{"prompt": "b",}\n'}, {}, "train.jsonl:2: "),
    "no prompt": ({"train.jsonl": '{"promt": "a"}\n'}, {}, "train.jsonl:1: "),
    "empty": ({"train.jsonl": " \n"}, {}, "train.jsonl: the file is empty"),
    "not UTF-8": ({"train.jsonl": b"\xe9"}, {}, "train.jsonl: "),
    "missing": ({}, {"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
    "too few": ({"train.jsonl": '{"prompt": "a"}'}, {"heldout": None}, "every eighth line"),
    "no context": ({}, {"context_file": None}, "train.jsonl:1: "),
    "bad chat": ({"pirate.json": '[{"role": "user", "content": "a"}]'}, {}, "pirate.json: "),
    "too deep": ({"pirate.json": "[" * 100_000}, {}, "pirate.json: "),
    "too long": ({"pirate.json": json.dumps(PIRATE).replace("pirate", "p" * 600)}, {}, "too many"),
    "nothing to imitate": (
        {"train.jsonl": '{"prompt": "a"}'},
        {"method": "sft"},
        "train.jsonl:1: ",
    ),
    "no answer": ({"heldout.jsonl": '{"prompt": "a"}'}, {"score": "exact"}, "heldout.jsonl:1: "),
    "unknown score": ({}, {"score": "vibes"}, "--score vibes: "),
    "score exits": ({"s.py": "import sys\nsys.exit(3)"}, {"score": "s.py:f"}, "s.py"),
    "score fails": (
        {"s.py": "def f(text, row):\n    return 1 / 0"},
        {"score": "s.py:f"},
        "ZeroDiv",
    ),
    "template": ({"t.txt": "nothing"}, {"template": "t.txt"}, "must be {context}"),
    "anchors": ({"a.jsonl": '{"prompt": "a"}'}, {"anchor_file": "a.jsonl"}, "a.jsonl: "),
    "no model": ({}, {"model": "/nowhere/model"}, "--model /nowhere/model: "),
}


@pytest.mark.parametrize("what", ["model", "prompts", "deep", "unfinished"])
def test_an_input_inside_a_runs_folder_is_refused(files, checkpoint, capsys, what):
    """The run might replace what it reads."""
    folder = Path(run_one(files, checkpoint)["folder"])
    if what == "unfinished":
        folder = folder.rename(folder.with_suffix(".unfinished"))
    changes = {"model": folder / "export"}
    if what in ("prompts", "deep"):
        place = folder / "my" / "files" if what == "deep" else folder
        place.mkdir(parents=True, exist_ok=True)
        changes = {"prompts": lines(place / "mine.jsonl", ROWS)}
    before = contents(files)
    for out in (files / "out", files / "elsewhere"):
        for method in ("cosd", "sft"):
            settings = changes | {"method": method, "out": out}
            assert main(flags(files, checkpoint, **settings)) == 2
            said = capsys.readouterr().err.strip().splitlines()[-1]
            assert "is in a run's folder, which may be replaced: copy it first" in said
    assert contents(files) == before and not (files / "elsewhere").exists()


def test_one_context_after_the_other(files, checkpoint):
    """A run may start from a copy of another run's export."""
    first = run_one(files, checkpoint, lr=0.01)
    copy = shutil.copytree(f"{first['folder']}/export", files / "first")
    second = run_one(files, str(copy), "specification", lr=0.01)
    (_, one), (_, two) = (their_logits(f"{result['folder']}/export") for result in (first, second))
    assert not torch.allclose(one, two, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_bad_files_are_one_line_and_exit_code_2(files, checkpoint, capsys, monkeypatch, case):
    contents_, changes, message = CASES[case]
    for name, content in contents_.items():
        content = content if isinstance(content, bytes) else content.encode()
        (files / name).write_bytes(content)
    monkeypatch.chdir(files)
    assert main(flags(files, checkpoint, **changes)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and "Traceback" not in "".join(said)
    assert not list((files / "out").glob("*/state.pt"))


def test_weights_that_cannot_be_used(files, tmp_path, capsys):
    folder = tiny_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"xx")
    transformers.BertConfig(vocab_size=10).save_pretrained(tmp_path / "bert")
    for model, message in ((folder, f"--model {folder}: "), (tmp_path / "bert", "bert")):
        assert main(flags(files, str(model))) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in said and "error: --model" in said
    assert not (files / "out").exists()
