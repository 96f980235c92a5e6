"""The program: the loop, its methods, the state, resume after a kill, Ctrl-C, bad input."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import contexts
import train
from contexts import KINDS, Example, Kind
from train import METHODS, PRESETS, Config, main, parse

ROOT = Path(__file__).parent.parent
SMOKE = PRESETS["smoke"]
TWELVE = ["--preset", "smoke", "--context", "instructions", "--method", "cosd", "--steps", "12"]
TWELVE += ["--teacher", "ema", "--device", "cpu"]


SMALL_WORLD = {"d_model": 32, "head_dim": 8, "d_ff": 96}  # fp16 is slow on a CPU


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "GPTConfig", partial(train.GPTConfig, **SMALL_WORLD))
        yield


def smoke(out, **changes):
    settings = {"out": str(out), "context": "instructions", "method": "cosd", "device": "cpu"}
    return Config(**SMOKE | settings | changes)


def run_one(out, **changes):
    (result,) = train.train(smoke(out, **changes))
    return result


def state_of(out, pattern="instructions-cosd-*-seed0"):
    (path,) = Path(out).glob(f"{pattern}/state.pt")
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def timeless(state):
    """A complete state without times and paths."""
    result = {
        key: value for key, value in state["result"].items() if key not in ("seconds", "folder")
    }
    return state | {"result": result, "log": [row | {"seconds": 0} for row in state["log"]]}


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """The table and the figure have their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        silent = SimpleNamespace(run=lambda *args, **kwargs: None, CalledProcessError=OSError)
        patch.setattr(train, "subprocess", silent)
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run of twelve steps, with its base."""
    out = tmp_path_factory.mktemp("reference")
    train.train(smoke(out, steps=12, teacher="ema"))
    return out


@pytest.fixture
def out(reference, tmp_path):
    """A fresh folder that has the base already."""
    for base in reference.glob("base-*"):
        shutil.copytree(base, tmp_path / base.name)
    return tmp_path


@pytest.fixture
def steps(monkeypatch):
    """Calls of the loss in a run's loop: (student, rows, its log), for tests that observe or change them."""
    seen, original = [], train.cosd_loss

    def cosd_loss(student, rows, chunk=0):
        loss, log = original(student, rows, chunk)
        seen.append((student, rows, chunk))
        return loss, log

    monkeypatch.setattr(train, "cosd_loss", cosd_loss)
    return seen


# -------------------------------------------------------------------------------------------------- the story
def test_the_whole_story_in_small(tmp_path):
    results = train.train(Config(**SMOKE | {"out": str(tmp_path), "device": "cpu"}))
    configs = [result["config"] for result in results]
    expected = [
        (kind, method, lr)
        for kind in KINDS
        for method, lr in (("cosd", 2e-4), ("sft", 1e-4), ("sft", 2e-4))
    ]
    assert [(c["context"], c["method"], c["lr"]) for c in configs] == expected
    assert len({(c["batch"], c["anchors"], c["steps"]) for c in configs}) == 1  # like for like
    for result in results:
        folder = Path(result["folder"])
        names = {"state.pt", "identity.json", "samples.json", "metrics.jsonl", "result.json"}
        assert {f.name for f in folder.iterdir()} == names
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(4))
        assert {"loss", "task", "entropy", "length", "grad_norm", "lr", "seconds"} <= rows[0].keys()
        assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
        samples = json.loads((folder / "samples.json").read_text())
        assert len(samples) == 5 and all(
            "→" in text for text in samples
        )  # before, and after each of 4 steps
    assert len(list(tmp_path.glob("base-*"))) == 1
    for three in zip(results[::3], results[1::3], results[2::3]):
        assert len({result["before"]["kl"] for result in three}) == 1  # each starts as the base


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "offline"},
        {"method": "gkd", "divergence": "jsd"},
        {"divergence": "reverse_kl", "teacher": "live"},
        {"divergence": "policy_gradient", "chunk": 7},
        {"top_k": 5, "chunk": 16},
        {"reduction": "sequence", "skip": 1, "micro_batch": 3, "anchors": 0.3},
        {"method": "sft", "anchors": 0.25, "chunk": 5},
        {"context": "demonstrations", "temperature": 0.5, "lora": 2},
        {"dtype": "bf16", "lora": 2, "anchors": 0.5, "teacher": "ema"},
        {"checkpointing": True, "eval_every": 2},
    ],
)
def test_every_choice_runs(out, changes):
    result = run_one(out, **changes)
    assert all(
        result["config"][key] == value for key, value in changes.items() if key in result["config"]
    )
    assert 0 <= result["after"]["drift"] < 5


# ---------------------------------------------------------------------------------------------- who writes, who scores
def a_run(out, **changes):
    cfg = smoke(out, **changes)
    base, name = train.get_base(cfg, str(out))
    task = contexts.world_task(cfg.context, cfg.seed, cfg.eval_size)
    return train.assemble(cfg.resolved(cfg.method), task, base, {"base": name}, Path(out) / "x")


def said(rows):
    return [contexts.decode(row[m].tolist()) for row, m in zip(rows.ids, rows.mask)]


def test_the_method_table_says_who_writes_and_what_is_minimised():
    assert METHODS["cosd"].writer == ("student",) and METHODS["cosd"].minimised == "divergence"
    assert METHODS["sft"].writer == ("expert",) and METHODS["sft"].minimised == "cross_entropy"
    assert METHODS["offline"].writer == ("teacher",) and METHODS["gkd"].writer == (
        "student",
        "expert",
    )


def test_methods_differ_in_who_writes(out):
    runs = {m: a_run(out, context="demonstrations", method=m) for m in ("cosd", "sft", "offline")}
    rows = {method: train.task_rows(run, 0) for method, run in runs.items()}
    prompts = rows["cosd"].prompts
    assert all(r.prompts == prompts for r in rows.values())
    drawn = runs["sft"].task.draw_batch(0, 0, 8)
    assert said(rows["sft"]) == [f"{e.expert}<|end|>" for e in drawn]
    assert rows["sft"].scorer is None and rows["cosd"].scorer is runs["cosd"].teacher
    in_context = [contexts.teacher_prompt(contexts.WORLD_CHAT, e) for e in drawn]
    assert rows["cosd"].scorer_prompts == rows["offline"].scorer_prompts == in_context
    run = runs["offline"]
    for model, theirs, name, mine in (
        (run.teacher.model, in_context, "offline", rows["offline"]),
        (runs["cosd"].student, prompts, "rollout", rows["cosd"]),
    ):
        y = train.write(run, model, theirs, 1.0, name, 0)
        assert [row[m].tolist() for row, m in zip(mine.ids, mine.mask)] == y


def test_rollouts_have_the_flags_temperature_and_a_new_seed_each_step(out):
    run = a_run(out, context="demonstrations", method="offline")
    first, second = said(train.task_rows(run, 0)), said(train.task_rows(run, 1))
    assert first != second
    hot = replace(run, cfg=replace(run.cfg, temperature=2.5))
    assert said(train.task_rows(hot, 0)) != first
    one_prompt = [contexts.render(None, "mot reverse")] * 8
    cosd = a_run(out)
    again = [
        train.write(cosd, cosd.student, one_prompt, 1.0, "rollout", step) for step in (0, 1, 0)
    ]
    assert again[0] == again[2] != again[1]


def test_gkd_lets_the_student_write_half_of_the_steps(out, monkeypatch):
    run = a_run(out, method="gkd")
    wrote = []
    monkeypatch.setattr(
        train,
        "write",
        lambda run, model, prompts, *rest: wrote.append(rest[-1]) or [[3]] * len(prompts),
    )
    for step in range(60):
        train.task_rows(run, step)
    assert 18 < len(wrote) < 42


def test_weights_sum_to_one_over_task_and_anchors(out):
    run = a_run(out, batch=7, anchors=0.3, reduction="sequence", skip=1)
    task, anchors = train.task_rows(run, 0), train.anchor_rows(run, 0)
    assert (len(task.prompts), len(anchors.prompts)) == (5, 2)
    assert task.weights.sum().item() == pytest.approx(5 / 7)
    assert anchors.weights.sum().item() == pytest.approx(2 / 7)
    counted = task.mask[:, 1:].any(1)  # rows that --skip leaves a token
    each = torch.full((5,), 5 / 7) / counted.sum() * counted
    torch.testing.assert_close(task.weights.sum(1), each)  # --reduction sequence
    assert task.weights[:, 0].sum() == 0 < anchors.weights[:, 0].sum()  # skip is the task's
    assert anchors.prompts == anchors.scorer_prompts and anchors.scorer is run.base
    assert task.prompts != task.scorer_prompts


def test_anchors_of_a_moving_teacher_are_scored_by_the_base(out):
    run = a_run(out, teacher="live", anchors=0.5)
    assert run.teacher.model is run.student and run.base.model is not run.student
    assert (
        train.anchor_rows(run, 0).scorer is run.base
        and train.task_rows(run, 0).scorer is run.teacher
    )


def test_flags_of_the_objective_reach_the_loss(out, steps):
    train.train(
        smoke(
            out,
            steps=1,
            divergence="jsd",
            top_k=7,
            micro_batch=3,
            chunk=5,
            batch=7,
            anchors=0.3,
        )
    )
    in_loop = [(rows, chunk) for _, rows, chunk in steps if len(rows.prompts) <= 3 and rows.scorer][
        -3:
    ]
    assert [len(rows.prompts) for rows, _ in in_loop] == [3, 2, 2] and {
        chunk for _, chunk in in_loop
    } == {5}
    student, teacher, tokens = (
        torch.randn(4, 300),
        torch.randn(4, 300),
        torch.zeros(4, dtype=torch.long),
    )
    expected = train.make_objective("jsd", top_k=7)(student, teacher, tokens)
    assert torch.equal(in_loop[0][0].objective(student, teacher, tokens), expected)
    assert not torch.equal(train.make_objective("jsd")(student, teacher, tokens), expected)


def test_the_log_has_the_loss_of_every_part(out):
    run_one(out, anchors=0.5, batch=6)
    rows = state_of(out)["log"]
    for row in rows:
        assert row["loss"] == pytest.approx((row["task"] + row["anchors"]) / 2, rel=1e-5)
    whole = [row["loss"] for row in rows]
    run_one(out, anchors=0.5, batch=6, micro_batch=2)  # the same run: made again
    assert [row["loss"] for row in state_of(out)["log"]] == pytest.approx(whole, rel=1e-4)


def test_the_teacher_follows_after_every_step(out, monkeypatch):
    calls = []
    monkeypatch.setattr(train.Teacher, "update", lambda self, student: calls.append(self.kind))
    run_one(out, teacher="ema")
    assert calls == ["ema"] * 4


def test_gradients_are_clipped_after_they_are_unscaled(out, monkeypatch):
    """fp16 scales gradients by 65,536: norms would all be huge, and clipping would leave nothing."""
    moved, clip = [], torch.nn.utils.clip_grad_norm_

    def clip_grad_norm_(parameters, limit):
        parameters = list(parameters)
        norm = clip(parameters, limit)
        after = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        moved.append((norm.item(), limit, after.item()))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)
    run_one(out, dtype="fp16", method="sft")
    assert all(limit == 1.0 and after <= 1.001 for _, limit, after in moved)
    fp16 = [norm for norm, _, _ in moved][-4:]
    moved.clear()
    run_one(out, method="sft")
    assert fp16 == pytest.approx([norm for norm, _, _ in moved][-4:], rel=0.1)


def test_the_rate_warms_up_and_falls_over_the_second_half(out):
    run_one(out, steps=40, method="sft", lr=1e-3)
    rates = [row["lr"] for row in state_of(out, "instructions-sft-*-seed0")["log"]]
    assert rates[0] == pytest.approx(1e-3 / 11) and rates[9] == pytest.approx(1e-2 / 11)
    assert rates[10] == rates[20] == pytest.approx(1e-3) and rates[30] == pytest.approx(5e-4)


def test_the_base_has_its_own_recipe(reference):
    method = METHODS["pretrain"]
    assert (method.lr, method.warmup, method.weight_decay) == (3e-3, 50, 0.1)
    run = a_run(reference)
    assert (
        run.optimizer.defaults["betas"] == (0.9, 0.95)
        and run.optimizer.defaults["weight_decay"] == 0.0
    )
    pretraining = Config(method="pretrain", steps=9, batch=96, device="cpu").resolved("pretrain")
    task, student = contexts.pretraining_task(), run.student
    base = train.assemble(pretraining, task, student, {}, Path("x"))
    assert base.optimizer.defaults["weight_decay"] == 0.1
    identity = state_of(reference, "base-*")["identity"]
    assert (identity["batch"], identity["lr"], identity["seed"]) == (96, 3e-3, 0)


def test_the_base_reads_contexts_and_imitates_its_own_answers(reference):
    cfg = Config(method="pretrain", steps=9, batch=96, device="cpu").resolved("pretrain")
    task = contexts.pretraining_task()
    run = train.assemble(cfg, task, a_run(reference).student, {}, Path("x"))
    rows, drawn = train.task_rows(run, 3), task.draw_batch(0, 3, 96)
    whole = [contexts.render(e.context, e.prompt) for e in drawn]
    assert rows.prompts == whole and rows.scorer is None
    assert said(rows) == [f"{e.answer}<|end|>" for e in drawn]
    assert 20 < sum(contexts.SYSTEM in prompt for prompt in rows.prompts) < 96


def test_the_scaler_is_resumed_too(out):
    run, again = a_run(out, dtype="fp16"), a_run(out, dtype="fp16")
    run.folder.mkdir()
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 512.0, "_growth_tracker": 7})
    train.save_run(run)
    train.restore(again)
    assert again.scaler.state_dict() == run.scaler.state_dict()


def test_each_seed_has_a_base_and_each_run_a_copy_of_it(tmp_path):
    train.train(smoke(tmp_path, seeds=2, steps=2))
    bases = [torch.load(path, weights_only=True) for path in tmp_path.glob("base-*/state.pt")]
    assert {base["identity"]["seed"] for base in bases} == {0, 1}
    assert not same(bases[0]["model"], bases[1]["model"])
    results = train.train(smoke(tmp_path, context="all", steps=2, resume=True, method="sft"))
    first = [result["before"]["drift"] for result in results]
    assert first == pytest.approx([0.0] * 4, abs=1e-6)  # each starts as the base


def test_a_base_is_found_again_and_only_read(out):
    (folder,) = out.glob("base-*")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    train.get_base(smoke(out, divergence="jsd", steps=9), str(out))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    train.get_base(smoke(out, pretrain_steps=2), str(out))
    train.get_base(smoke(out, seed=1, pretrain_steps=2), str(out))
    assert len(list(out.glob("base-*"))) == 3


# --------------------------------------------------------------------------------------------- a fifth kind of context
def feedback(rng, heldout=None):
    """The student's own attempt, and whether it was right: C looks at y (SDPO, self-correction)."""
    word = contexts.draw_word(rng, heldout)
    attempt = rng.choice([word, word[::-1]])
    verdict = "right" if attempt == word[::-1] else "wrong"
    return Example(
        "feedback", f"tried {attempt} {verdict}", f"{word} reverse", word[::-1], word[::-1]
    )


def after(example, y):
    attempt = y.replace("<|end|>", "")
    verdict = "right" if attempt == example.answer else "wrong"
    return replace(example, context=f"tried {attempt} {verdict}")


def test_a_fifth_kind_is_one_record(tmp_path, monkeypatch, steps):
    monkeypatch.setitem(KINDS, "feedback", Kind("E", "SDPO", feedback, 0.1, 0.2, after=after))
    contexts.pretraining_batches.cache_clear()
    (result,) = train.train(smoke(tmp_path, context="feedback", anchors=0.5))
    assert result["config"]["context"] == "feedback" and result["after"]["feedback"].keys() >= {
        "exact"
    }
    tasks = [
        rows
        for _, rows, _ in steps
        if len(rows.prompts) == 4 and rows.prompts != rows.scorer_prompts
    ]
    assert len(tasks) == 4
    for rows in tasks:
        for prompt, theirs, y in zip(rows.prompts, rows.scorer_prompts, said(rows)):
            assert contexts.decode(theirs).startswith(
                f"<|system|>tried {y.replace('<|end|>', '')} "
            )
            assert contexts.decode(theirs).endswith(contexts.decode(prompt))
    assert (
        main(
            [
                "--preset",
                "smoke",
                "--context",
                "feedback",
                "--method",
                "sft",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    import report

    text = report.report(tmp_path)
    assert "| feedback | cosd |" in text and "| feedback | sft |" in text
    assert report.letter("feedback") == "E"
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "figure.png").exists() == has_matplotlib


# ------------------------------------------------------------------------------- reproducible, resumable, atomic
def test_same_seed_same_weights_other_seed_others(reference, out):
    train.train(smoke(out, steps=12, teacher="ema"))
    assert same(timeless(state_of(reference)), timeless(state_of(out)))
    train.train(smoke(out, steps=12, teacher="ema", seed=1))
    assert not same(state_of(reference)["model"], state_of(out, "*cosd-*-seed1")["model"])


KILL = """
import os, signal, sys
from functools import partial
import torch, train
torch.set_num_threads({threads})  # as many as here: sums are split among them
train.GPTConfig = partial(train.GPTConfig, **{shape})
train.SAVE_SECONDS, train.subprocess.run = 0, lambda *args, **kwargs: None
calls, original = [], {target}
def killing(*args, **kwargs):
    calls.append(1)
    if len(calls) == {when}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
{target} = killing
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "target, when, dtype",
    [
        ("train.cosd_loss", 12, "fp32"),  # in the loop, the base being there
        ("train.os.replace", 12, "fp32"),  # between the state and its projections
        pytest.param("train.os.replace", 14, "fp32", marks=pytest.mark.slow),
        pytest.param("train.torch.save", 13, "fp32", marks=pytest.mark.slow),  # the last save
        ("train.shutil.rmtree", 2, "fp32"),  # while the folder gets its name
        ("train.cosd_loss", 12, "fp16"),
    ],
)
def test_resume_after_kill_9_equals_an_uninterrupted_run(
    reference, out, tmp_path_factory, target, when, dtype
):
    whole = reference
    if dtype != "fp32":
        whole = tmp_path_factory.mktemp("whole")
        train.train(smoke(whole, steps=12, teacher="ema", dtype=dtype))
        for base in whole.glob("base-*"):
            shutil.copytree(base, out / base.name, dirs_exist_ok=True)
    flags = [*TWELVE, "--dtype", "auto" if dtype == "fp32" else dtype, "--out", str(out)]
    code = KILL.format(target=target, when=when, threads=torch.get_num_threads(), shape=SMALL_WORLD)
    killed = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main([*flags, "--resume"]) == 0
    assert same(timeless(state_of(whole)), timeless(state_of(out)))
    (folder,) = out.glob("instructions-cosd-*-seed0")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(12))
    assert not list(out.glob("*.unfinished")) and not list(out.glob("*.replaced"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_save_and_say_how_to_go_on(reference, out, monkeypatch, capsys, number):
    original, calls = train.task_rows, []

    def task_rows(run, step):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
        return original(run, step)

    monkeypatch.setattr(train, "task_rows", task_rows)
    handler = signal.getsignal(number)
    assert main([*TWELVE, "--out", str(out)]) == 130
    err = capsys.readouterr().err
    assert "stopped after 4 steps" in err and "continue with the same command and --resume" in err
    assert state_of(out, "*.unfinished")["step"] == 4 and signal.getsignal(number) == handler
    assert main([*TWELVE, "--out", str(out), "--resume"]) == 0
    assert same(timeless(state_of(reference)), timeless(state_of(out)))


def test_a_complete_run_is_taken_as_it_is(reference, monkeypatch):
    monkeypatch.setattr(train, "fit", None)
    before = state_of(reference)["result"]
    assert train.train(smoke(reference, steps=12, teacher="ema", resume=True)) == [before]


def test_other_settings_another_folder(out):
    one, two = run_one(out), run_one(out, divergence="jsd")
    assert one["folder"] != two["folder"] and one["setting"] != two["setting"]
    assert Path(one["folder"]).exists() and Path(two["folder"]).exists()
    assert run_one(out, micro_batch=2, chunk=4)["folder"] == one["folder"]  # these change no result


def test_a_failing_repeat_leaves_the_earlier_result(out, monkeypatch):
    folder = Path(run_one(out)["folder"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    monkeypatch.setattr(train, "evaluate", lambda run: 1 / 0 if run.step == 3 else None)
    with pytest.raises(ZeroDivisionError):
        run_one(out)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_second_process_in_one_folder_is_told_and_stops(out, capsys, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    inner = []

    def evaluate(run):
        if run.step == 2 and not inner:
            inner.append(main([*TWELVE, "--out", str(out)]))

    monkeypatch.setattr(train, "evaluate", evaluate)
    main([*TWELVE, "--out", str(out)])
    assert inner == [2] and "in use by another process" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "nan", "part", "empty"])
def test_a_damaged_state_is_named_and_never_trained_on(reference, out, monkeypatch, capsys, damage):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    original = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda run: original(run) if run.step < 6 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([*TWELVE, "--out", str(out)])
    monkeypatch.setattr(train, "evaluate", original)
    (path,) = out.glob("*.unfinished/state.pt")
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    if damage == "nan":
        state["model"]["norm.weight"][0] = float("nan")
        torch.save(state, path)
    elif damage == "part":
        del state["model"]["norm.weight"]
        torch.save(state, path)
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        at = len(whole) // 2
        flipped = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
        path.write_bytes({"cut": whole[:at], "flip": flipped, "empty": b""}[damage])
    assert main([*TWELVE, "--out", str(out), "--resume"]) == 2
    assert f"{path} cannot be used; delete it, or choose another --out" in capsys.readouterr().err
    path.write_bytes(whole)
    assert main([*TWELVE, "--out", str(out), "--resume"]) == 0
    assert same(state_of(reference)["model"], state_of(out)["model"])


def test_a_state_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"identity": {}, "model": {}, "step": Evil()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="cannot be used"):
        train.load_state(tmp_path / "state.pt", {})
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    path.write_text("old")
    (tmp_path / "state.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="state.pt could not be written .is the disk full"):
        train.replace_file(path, lambda unfinished: unfinished.write_text("new"))
    assert path.read_text() == "old" and not os.path.lexists(tmp_path / "state.tmp")


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_number_that_is_none_stops_and_keeps_the_last_good_state(
    out, monkeypatch, capsys, poison
):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    original = train.log_row

    def log_row(parts, losses, norm):
        row = original(parts, losses, norm)
        calls.append(1)
        if len(calls) == 8:
            row["loss" if poison == "loss" else "grad_norm"] = float("nan")
        return row

    calls = []
    monkeypatch.setattr(train, "log_row", log_row)
    assert main([*TWELVE, "--out", str(out)]) == 1
    assert "at step 7: not a finite number" in capsys.readouterr().err
    state = state_of(out, "*.unfinished")
    assert state["step"] == 7 and all(p.isfinite().all() for p in state["model"].values())


@pytest.mark.parametrize("how_often", ["once", "for ever"])
def test_fp16_overflow_skips_a_step_and_lowers_the_scale(out, monkeypatch, capsys, how_often):
    original, weights = train.log_row, []

    def log_row(parts, losses, norm):
        return original(parts, losses, norm)

    def unscale(self, optimizer):
        parameter = optimizer.param_groups[0]["params"][0]
        weights.append(parameter.detach().clone())
        if len(weights) == 2 or how_often == "for ever":
            parameter.grad[0, 0] = float("inf")
        return unscale_(self, optimizer)

    unscale_ = torch.amp.GradScaler.unscale_
    train.get_base(smoke(out, dtype="fp16"), str(out))
    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscale)
    monkeypatch.setattr(train, "log_row", log_row)
    flags = [
        "--preset",
        "smoke",
        "--context",
        "instructions",
        "--method",
        "cosd",
        "--dtype",
        "fp16",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    if how_often == "once":
        assert main(flags) == 0
        assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])
    else:
        assert main([*flags, "--steps", "40", "--batch", "2"]) == 1
        assert "not a finite number" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- measuring
def test_drift_by_hand(out):
    """KL(base‖tuned) on the base's samples: zero for the base itself, and not symmetric."""
    run = a_run(out)
    prompts = [
        contexts.teacher_prompt(contexts.WORLD_CHAT, e) for e in run.task.probes["specification"]
    ]
    assert train.drift(run, prompts) == pytest.approx(0, abs=1e-7)
    with torch.no_grad():
        run.student.norm.weight.mul_(3.0)
    base, values = run.base.model, []
    for prompt, row in zip(prompts, train.write(run, base, prompts, 1, "drift")):
        with torch.no_grad():
            p, q = (
                m(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1].log_softmax(-1)
                for m in (base, run.student)
            )
        values.append((p.exp() * (p - q)).sum(-1))
    by_hand = torch.cat(values).mean().item()
    assert train.drift(run, prompts) == pytest.approx(by_hand, rel=1e-4)
    chunked = replace(run, cfg=replace(run.cfg, chunk=5))
    assert train.drift(chunked, prompts) == pytest.approx(by_hand, rel=1e-4)


def test_what_is_measured_under_which_prompts(out, monkeypatch):
    """The task and drift_new without C; probes in their own contexts; the teacher's score with C, from the base."""
    run, asked = a_run(out), []
    original = train.write

    def write(run, model, prompts, temperature, *what):
        asked.append((what, temperature, prompts, model is run.base.model))
        return original(run, model, prompts, temperature, *what)

    monkeypatch.setattr(train, "write", write)
    train.preflight(run)
    bare = [contexts.student_prompt(contexts.WORLD_CHAT, e) for e in run.task.heldout]
    whole = [contexts.teacher_prompt(contexts.WORLD_CHAT, e) for e in run.task.heldout]
    greedy = [prompts for _, temperature, prompts, _ in asked if temperature == 0]
    drifts = [prompts for what, _, prompts, of_base in asked if what == ("drift",) and of_base]
    assert greedy[0] == bare and greedy[-1] == whole and drifts[0] == bare
    for prompts, suite in zip(greedy[1:], run.task.probes.values()):
        assert prompts == [contexts.teacher_prompt(contexts.WORLD_CHAT, e) for e in suite]
    assert len(drifts[1]) == 5 * len(bare)


def test_measuring_on_the_way_changes_nothing(reference, out):
    result = run_one(out, steps=12, teacher="ema", eval_every=5)
    assert same(state_of(reference)["model"], state_of(out)["model"])
    assert [row["step"] for row in result["curve"]] == [5, 10]
    assert result["curve"][0]["drift"] != result["curve"][1]["drift"]
    assert result["after"] == state_of(reference)["result"]["after"]


# ------------------------------------------------------------------------------------------------------- config
def test_the_command_line_is_the_dataclass():
    assert parse([]) == Config()
    cfg = parse(
        ["--preset", "smoke", "--steps", "9", "--lr", "2.0", "--resume", "--divergence", "jsd"]
    )
    assert cfg == Config(**SMOKE | {"steps": 9, "lr": 2.0, "resume": True, "divergence": "jsd"})
    with pytest.raises(Exception, match="cannot assign"):
        cfg.steps = 3


def test_help_names_every_flag_with_a_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for item in fields(Config):
        assert train.spelled(item.name) in text and " ".join(item.metadata["about"].split()) in text


def test_defaults_depend_on_the_method_and_on_the_model(tmp_path):
    assert Config().resolved("cosd").lr == 2e-4 and Config().resolved("sft").lr == 1e-4
    own = Config(model="x", context="instructions", prompts="x").resolved("cosd")
    assert (own.steps, own.batch, own.lr, own.chunk) == (40, 8, 5e-5, 32)
    assert replace(own, lora=4, lr=None).resolved("cosd").lr == 5e-4
    assert [c.method for c in train.comparison(Config(lr=1e-3))] == ["cosd", "sft"]
    assert {c.lr for c in train.comparison(Config(lr=1e-3, anchors=0.25))} == {1e-3}
    assert Config(anchors=0).resolved("cosd").n_anchors == 0  # 0 is a share too
    assert Config(anchors=0.99, batch=8).n_anchors == 7  # the task keeps a prompt


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--contxt", "all"], "unrecognized arguments: --contxt"),
        (["--cont", "all"], "unrecognized arguments: --cont"),
        (["--context", "poems"], "--context 'poems': choose from all, demonstrations"),
        (["--method", "dpo"], "--method 'dpo': choose from all, cosd, sft"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--anchors", "1.5"], "shares: at most 1"),
        (["--anchors", "-1"], "--anchors -1.0: must be at least 0"),
        (["--skip", "24"], "--skip 24 must be below"),
        (["--divergence", "policy_gradient", "--method", "offline"], "needs --method cosd"),
        (["--divergence", "policy_gradient", "--temperature", "0.5"], "and --temperature 1"),
        (["--divergence", "policy_gradient", "--top-k", "5"], "no --top-k"),
        (["--device", "toaster"], "--device toaster"),
        (["--lr", "nan"], "--lr nan: must be at least 0"),
        (["--seed", "100000000000000000000"], "--seed 100000000000000000000"),
        (["--score", "exact"], "--score without --model"),
        (["--model", "x", "--context", "instructions"], "--model needs --prompts"),
        (["--model", "x", "--prompts", "x"], "--model needs --context"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_bad_input_is_one_readable_line_and_exit_code_2(flags, message, capsys, tmp_path):
    try:
        code = main(["--preset", "smoke", "--out", str(tmp_path), *flags])
    except SystemExit as argparse_exit:
        code = argparse_exit.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and message in lines[-1] and "Traceback" not in "".join(lines)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("MPS backend out of memory")],
)
def test_out_of_memory_says_which_flags_to_turn(out, monkeypatch, capsys, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(train, "task_rows", fail)
    assert main([*TWELVE, "--out", str(out)]) == 2
    assert "lower --micro-batch, set --chunk 32" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- mixed precision
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_trains_fp32_masters(out, dtype):
    run = a_run(out, dtype=dtype)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    with run.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == low
    assert run.scaler.is_enabled() == (dtype == "fp16")
    assert all(p.dtype == torch.float32 for p in run.student.parameters())
    assert run.teacher.model.blocks[0].mlp.up.weight.dtype == low  # frozen: as autocast casts it
    run_one(out, dtype=dtype)
    assert all(p.dtype == torch.float32 for p in state_of(out)["model"].values())
