"""The program: config, checkpoints, resume after a kill, Ctrl-C, non-finite losses, bad input, mixed precision, the report."""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

import contexts
import train
from contexts import TASKS
from train import PRESETS, Config, main, parse

ROOT = Path(__file__).parent.parent
SMOKE = PRESETS["smoke"]


def smoke(out, **changes):
    return Config(**SMOKE | {"out": str(out), "context": "instructions", "method": "cosd", "device": "cpu"} | changes)


def world_task(kind, size=8):
    return contexts.world_task(kind, train.seeded(0), train.seeded(1), size)


def final_state(out, run="instructions-cosd-seed0"):
    return torch.load(Path(out) / run / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run, 12 steps, with its base."""
    out = tmp_path_factory.mktemp("reference")
    return out, train.train(smoke(out, steps=12, save_every=5, teacher="ema"))


@pytest.fixture
def out(reference, tmp_path):
    """A fresh folder that has the base already."""
    for base in reference[0].glob("base-*"):
        shutil.copytree(base, tmp_path / base.name)
    return tmp_path


# -------------------------------------------------------------------------------------------------- the story
def test_whole_story_in_small(tmp_path, capsys):
    story = train.train(Config(**SMOKE | {"out": str(tmp_path), "device": "cpu"}))
    assert [(r["context"], r["method"]) for r in story["results"]] == [(c, m) for c in TASKS for m in ("cosd", "sft")]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(story["results"]))
    printed = capsys.readouterr().out
    assert story["report"] == (tmp_path / "results.md").read_text() and story["report"] in printed
    assert printed.count("The teacher does not beat the student") == 8          # four steps of pretraining teach nothing
    assert (tmp_path / "figure.png").exists() == bool(importlib.util.find_spec("matplotlib"))
    for result in story["results"]:
        folder = tmp_path / f"{result['context']}-{result['method']}-seed0"
        assert {f.name for f in folder.iterdir()} == {"config.json", "metrics.jsonl", "samples.txt", "result.json", "checkpoint.pt"}
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(4))
        assert {"loss", "kl", "entropy", "length", "eos_rate", "grad_norm", "lr"} <= rows[0].keys()
        assert ("anchor_kl" in rows[0]) == (result["method"] == "cosd")
        assert "→" in (folder / "samples.txt").read_text()
        assert result["config"]["lr"] == (1e-4 if result["method"] == "sft" else 5e-4)
        assert result["prompt_tokens_saved"] > 0 and result["drift"] >= 0
    assert len(list(tmp_path.glob("base-*"))) == 1


@pytest.mark.parametrize("changes", [
    dict(method="offline"), dict(method="gkd", divergence="jsd", beta=0.3), dict(divergence="reverse_kl", teacher="live"), dict(divergence="policy_gradient"),
    dict(top_k=5, chunk=16), dict(anchors=0.0, reduction="sequence", skip=1, micro_batch=3), dict(method="sft", anchors=0.25), dict(context="demonstrations", temperature=0.5),
])
def test_every_choice_runs(out, changes):
    (result,) = train.train(smoke(out, **changes))["results"]
    assert result["method"] == changes.get("method", "cosd")


def test_settings_reach_the_step(out, monkeypatch):
    """Every flag about the objective arrives at cosd_step, on task and anchor prompts."""
    seen, original = [], train.cosd_step
    monkeypatch.setattr(train, "cosd_step", lambda *args, **kwargs: seen.append((args, kwargs)) or original(*args, **kwargs))
    train.train(smoke(out, steps=1, divergence="jsd", beta=0.3, top_k=7, micro_batch=3, chunk=5, skip=1, reduction="sequence", temperature=0.7, batch=7, anchors=0.3))
    (task, task_settings), (anchors, anchor_settings) = seen
    for (_, _, batch, objective), settings in ((task, task_settings), (anchors, anchor_settings)):
        assert objective.keywords["k"] == 7 and objective.keywords["divergence"].keywords == {"beta": 0.3}
        assert {k: settings[k] for k in ("micro_batch", "chunk", "reduction", "temperature", "max_new_tokens", "eos")} == {
            "micro_batch": 3, "chunk": 5, "reduction": "sequence", "temperature": 0.7, "max_new_tokens": 24, "eos": {train.END}}
    assert (len(task[2].prompts), len(anchors[2].prompts)) == (5, 2)
    assert (task_settings["weight"], anchor_settings["weight"]) == (pytest.approx(5 / 7), pytest.approx(2 / 7))
    assert task_settings["skip"] == 1 and "skip" not in anchor_settings and task[1].kind == "frozen"
    assert task[2].prompts != task[2].teacher_prompts and anchors[2].prompts == anchors[2].teacher_prompts


def test_the_shared_context_is_read_once_for_b_and_c(out, monkeypatch):
    reads, original = [], train.GPT.read
    monkeypatch.setattr(train.GPT, "read", lambda self, ids: reads.append(list(ids)) or original(self, ids))
    counts = {}
    for context in TASKS:
        reads.clear()
        train.train(smoke(out, context=context))
        counts[context] = len(reads)
        assert all(contexts.decode(ids) == f"<|system|>{TASKS[context](train.seeded(0)).context}<|user|>" for ids in reads)
    assert counts == {"demonstrations": 0, "specification": 1, "instructions": 1, "privileged": 0}


def test_result_says_which_model_saw_what(out, monkeypatch):
    """teacher: the base with C; before: the base without; after: the tuned model without."""
    asked = []

    def answers(model, prompts, cfg, chat):
        with_context = prompts[0][0] == train.contexts.SYSTEM
        asked.append((model.embed.weight.detach().clone(), with_context, len(prompts)))
        return ["certainly" if with_context else "plain"] * len(prompts)

    graded = []
    monkeypatch.setattr(train, "answers", answers)
    monkeypatch.setattr(train.contexts, "grade", lambda e, text: graded.append(text) or {"score": float(text == "certainly"), "exact": 0.0})
    (result,) = train.train(smoke(out))["results"]
    assert (result["teacher"]["score"], result["before"]["score"], result["after"]["score"]) == (1.0, 0.0, 0.0)
    (base, first, _), (same_base, second, _), *later = asked
    assert torch.equal(base, same_base) and (first, second) == (True, False)
    after = [(weights, size) for weights, with_context, size in later if not with_context and size == 8]
    assert len(after) == 1 and not torch.equal(after[0][0], base)                                    # the held-out prompts, tuned


def test_methods_differ_in_who_writes(out):
    """sft: the expert; offline: the teacher, in context; gkd: λ decides; cosd: nobody yet, so the student will."""
    cfg = smoke(out, context="demonstrations")
    base, _ = train.get_base(cfg, *train.resolve_device(cfg))
    teacher, task = train.Teacher(base), world_task("demonstrations")
    written = {m: train.make_batch(cfg.for_method(m), task, 0, teacher) for m in ("cosd", "sft", "offline")}
    assert written["cosd"].completion is None
    text = [contexts.decode(row[m].tolist()) for row, m in zip(written["sft"].completion, written["sft"].mask)]
    assert all(t.startswith("verily ") and t.endswith(" methinks<|end|>") for t in text)
    ids, mask = written["offline"].completion, written["offline"].mask
    assert ids.shape == mask.shape and ids.shape[0] == 4 and written["offline"].prompts == written["sft"].prompts[:4]
    on_policy = [train.make_batch(replace(cfg, gkd_lambda=lam).for_method("gkd"), task, s, teacher).completion is None for lam in (0.0, 0.5, 1.0) for s in range(40)]
    assert sum(on_policy[:40]) == 0 and 8 < sum(on_policy[40:80]) < 32 and sum(on_policy[80:]) == 40


def test_replay_is_cross_entropy_on_the_corpus_own_answers(out):
    cfg = smoke(out, context="demonstrations", method="sft", anchors=0.5).for_method("sft")
    task, device = world_task("demonstrations"), torch.device("cpu")
    drawn = {}
    for replay in ("self", "real", "proxy"):
        batch = train.make_anchors(replace(cfg, replay=replay), task, 3, device)
        assert batch.prompts == batch.teacher_prompts and len(batch.prompts) == 4
        drawn[replay] = None if batch.completion is None else [contexts.decode(row[m].tolist()) for row, m in zip(batch.completion, batch.mask)]
    rng = train.seeded(cfg.seed, "demonstrations", "anchors", 3)
    assert drawn["self"] is None and drawn["real"] == [contexts.draw_anchor(rng, "demonstrations").answer + "<|end|>" for _ in range(4)]
    rng = train.seeded(cfg.seed, "demonstrations", "anchors", 3)
    assert drawn["proxy"] == [contexts.draw_anchor(rng, "demonstrations", contexts.draw_proxy).expert + "<|end|>" for _ in range(4)]
    (result,) = train.train(smoke(out, method="sft", anchors=0.5, replay="proxy"))["results"]
    rows = [json.loads(line) for line in (out / "instructions-sft-seed0" / "metrics.jsonl").read_text().splitlines()]
    assert result["config"]["replay"] == "proxy" and not any("anchor_kl" in row for row in rows)


def test_the_base_holds_sft_back(reference, tmp_path):
    """λ KL(base‖student) on SFT's own tokens, the base without C too: nothing at the first step, and a large λ lets nothing move."""
    shutil.copytree(reference[0], tmp_path, dirs_exist_ok=True)
    drifts, first = [], []
    for base_kl in (0.0, 100.0):
        (result,) = train.train(smoke(tmp_path, method="sft", base_kl=base_kl, steps=12, lr=3e-3))["results"]
        drifts.append(result["drift_new"])
        rows = [json.loads(line) for line in (tmp_path / "instructions-sft-seed0" / "metrics.jsonl").read_text().splitlines()]
        first.append(rows[0]["loss"])
    assert first[0] == pytest.approx(first[1], rel=1e-5) and rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert drifts[1] < drifts[0] / 3
    (asft,) = train.train(smoke(tmp_path, method="asft", steps=2))["results"]
    assert asft["config"]["base_kl"] == 0.1 and asft["config"]["lr"] == 1e-4 and asft["config"]["anchors"] == 0.0


def test_what_each_imitation_minimises():
    """forward_kl with the base as teacher is KL(base‖student); ASFT weighs, SFT does not."""
    objective = lambda **settings: train.make_objective(Config(**settings).for_method(settings["method"]))
    assert objective(method="sft") == "cross_entropy"
    assert objective(method="sft", base_kl=0.5) == {"cross_entropy": 1.0, "forward_kl": 0.5}
    assert objective(method="asft") == {"weighted_cross_entropy": 1.0, "forward_kl": 0.1}
    assert objective(method="asft", base_kl=0.0) == "weighted_cross_entropy"


def test_replay_needs_no_teacher(out, monkeypatch):
    seen, step = [], train.cosd_step
    monkeypatch.setattr(train, "cosd_step", lambda student, teacher, *rest, **more: seen.append(teacher) or step(student, teacher, *rest, **more))
    train.train(smoke(out, anchors=0.5, replay="real", steps=2))
    own, replayed = seen[-4::2], seen[-3::2]
    assert all(teacher is not None for teacher in own) and replayed == [None, None]


def test_change_is_after_less_before_and_measuring_is_not_training(out, monkeypatch):
    scores, measure = iter([{"verbs": 1.0, "a": 0.8, "b": 0.6}] + [{"verbs": 0.25, "a": 0.7, "b": 0.1}] * 4), train.measure
    monkeypatch.setattr(train, "skills", lambda *rest: next(scores))

    clock, late = time.perf_counter, [0]

    def slow(*rest):
        late[0] += 10_000
        return measure(*rest)

    monkeypatch.setattr(train, "measure", slow)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock() + late[0])
    (result,) = train.train(smoke(out, steps=4, eval_every=1))["results"]
    assert result["prior_change"] == -0.75 and result["steerability_change"] == pytest.approx(-0.3)
    assert [row["prior_change"] for row in result["curve"]] == [-0.75] * 4 and result["seconds"] < 10_000


def test_curve_on_the_way_changes_nothing_and_survives_a_resume(reference, tmp_path, monkeypatch):
    out, first = reference
    shutil.copytree(out, tmp_path / "a", dirs_exist_ok=True)
    shutil.copytree(out, tmp_path / "b", dirs_exist_ok=True)
    cfg = smoke(tmp_path / "a", steps=12, teacher="ema", eval_every=5)
    (result,) = train.train(cfg)["results"]
    assert same(final_state(out)["model"], final_state(tmp_path / "a")["model"])
    assert [row["step"] for row in result["curve"]] == [5, 10, 12]
    assert {k: result["curve"][-1][k] for k in ("drift", "drift_new", "after", "skills")} == {k: first["results"][0][k] for k in ("drift", "drift_new", "after", "skills")}
    assert result["curve"][0]["drift"] != result["curve"][1]["drift"]
    assert result["prior_change"] == result["skills"]["verbs"] - result["skills_before"]["verbs"]
    save = train.save

    def stop_at_eight(path, state):
        save(path, state)
        if state["step"] == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", stop_at_eight)
    with pytest.raises(KeyboardInterrupt):
        train.train(replace(cfg, out=str(tmp_path / "b"), save_every=8))
    monkeypatch.setattr(train, "save", save)
    (resumed,) = train.train(replace(cfg, out=str(tmp_path / "b"), save_every=8, resume=True))["results"]
    assert resumed["curve"] == result["curve"]


# ------------------------------------------------------------------------------- reproducible, resumable, atomic
def test_same_seed_same_weights_other_seed_others(reference, tmp_path):
    out, first = reference
    again = train.train(smoke(tmp_path, steps=12, save_every=7, teacher="ema"))                     # saving at other steps changes nothing
    assert same(final_state(out), final_state(tmp_path))
    drop = lambda r: {k: v for k, v in r.items() if k != "seconds"}
    assert drop(first["results"][0]) == drop(again["results"][0])
    train.train(smoke(tmp_path, steps=12, teacher="ema", seed=1))
    assert not same(final_state(out)["model"], final_state(tmp_path, "instructions-cosd-seed1")["model"])


@pytest.mark.parametrize("phase, when, dtype", [("base", 23, "fp32"), ("run", 7, "fp32"), ("run", 7, "bf16"), ("run", 7, "fp16")])
def test_resume_after_kill_9_equals_an_uninterrupted_run(reference, tmp_path_factory, phase, when, dtype):
    """A child process kills itself without warning in the middle of a step; --resume reaches the same bits."""
    code = f"""
import os, signal, sys, train
from model import GPT
wanted, seen, original = {"'base, seed 0'" if phase == "base" else "'instructions / cosd, seed 0'"}, [], train.optimize
def optimize(cfg, student, step_fn, **kwargs):
    def step(number, backward):
        if kwargs["label"] == wanted and number == {when}:
            os.kill(os.getpid(), signal.SIGKILL)
        return step_fn(number, backward)
    return original(cfg, student, step, **kwargs)
train.optimize = optimize
sys.exit(train.main(sys.argv[1:]))
"""
    whole, killed_out = reference[0], tmp_path_factory.mktemp("killed")
    if dtype != "fp32":
        whole = tmp_path_factory.mktemp("whole")
        train.train(smoke(whole, steps=12, save_every=5, teacher="ema", dtype=dtype))
    flags = ["--preset", "smoke", "--context", "instructions", "--method", "cosd", "--steps", "12", "--save-every", "5", "--teacher", "ema",
             "--device", "cpu", "--dtype", "auto" if dtype == "fp32" else dtype, "--out", str(killed_out)]
    killed = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main([*flags, "--resume"]) == 0
    assert same(final_state(whole), final_state(killed_out))
    runs = [folder / "instructions-cosd-seed0" for folder in (killed_out, whole)]
    rows = [[json.loads(line) | {"seconds": 0} for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert rows[0] == rows[1] and len(rows[0]) == 12
    assert (runs[0] / "samples.txt").read_text() == (runs[1] / "samples.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_save_and_say_how_to_go_on(reference, out, monkeypatch, capsys, number):
    original, calls = train.cosd_step, []

    def cosd_step(student, teacher, *args, **kwargs):
        calls.append(1)
        if teacher and len(calls) == 7:                                                             # in the middle of step 3
            os.kill(os.getpid(), number)
        return original(student, teacher, *args, **kwargs)

    monkeypatch.setattr(train, "cosd_step", cosd_step)
    flags = ["--preset", "smoke", "--context", "instructions", "--method", "cosd", "--steps", "12", "--save-every", "5", "--teacher", "ema",
             "--device", "cpu", "--out", str(out)]
    handler = signal.getsignal(number)
    assert main(flags) == 130
    err = capsys.readouterr().err
    assert "stopped after step 4 of 12" in err and "go on with the same command and --resume" in err
    assert final_state(out)["step"] == 4 and signal.getsignal(number) == handler                            # as it was before
    assert main([*flags, "--resume"]) == 0
    assert same(final_state(reference[0]), final_state(out))


def test_ctrl_c_outside_the_loop_says_how_to_go_on_too(out, monkeypatch, capsys):
    monkeypatch.setattr(train, "evaluate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert main(["--preset", "smoke", "--device", "cpu", "--out", str(out)]) == 130
    assert "go on with the same command and --resume" in capsys.readouterr().err


def test_resume_takes_finished_runs_as_they_are(reference, capsys):
    out, first = reference
    stamp = (out / "instructions-cosd-seed0" / "checkpoint.pt").stat().st_mtime_ns
    again = train.train(smoke(out, steps=12, save_every=5, teacher="ema", resume=True))
    assert again["results"] == json.loads(json.dumps(first["results"])) and "complete, taken from" in capsys.readouterr().out
    assert (out / "instructions-cosd-seed0" / "checkpoint.pt").stat().st_mtime_ns == stamp


def test_a_refused_resume_destroys_nothing(out, capsys):
    flags = ["--preset", "smoke", "--context", "instructions", "--method", "cosd", "--device", "cpu", "--out", str(out), "--resume"]
    assert main(flags) == 0
    run = out / "instructions-cosd-seed0"
    before = {f.name: f.read_bytes() for f in run.iterdir()}
    assert main([*flags, "--divergence", "jsd"]) == 2
    assert "result.json comes from another configuration: divergence ('forward_kl' there, 'jsd' here)" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in run.iterdir()} == before
    assert main([*flags, "--micro-batch", "2", "--chunk", "4"]) == 0                               # these change no result


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, capsys):
    path = tmp_path / "checkpoint.pt"
    train.save(path, {"identity": {}, "step": 1})
    (tmp_path / "checkpoint.tmp").symlink_to("/dev/full")                                            # a disk without space
    with pytest.raises(OSError, match="checkpoint.pt could not be written .is the disk full"):
        train.save(path, {"identity": {}, "step": 2})
    assert train.load(path, {})["step"] == 1 and not os.path.lexists(tmp_path / "checkpoint.tmp")
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(RuntimeError("PytorchStreamWriter failed writing file")))
    assert main(["--preset", "smoke", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "could not be written (is the disk full?)" in capsys.readouterr().err


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_non_finite_loss_or_gradient_stops_and_keeps_the_last_good_checkpoint(out, monkeypatch, capsys, poison):
    original = train.cosd_step

    def cosd_step(student, teacher, batch, *args, **kwargs):
        log = original(student, teacher, batch, *args, **kwargs)
        calls.append(1)
        if teacher and len(calls) == 8:
            if poison == "loss":
                log["loss"] = float("nan")
            else:
                student.embed.weight.grad[0, 0] = float("inf")
        return log

    calls = []
    monkeypatch.setattr(train, "cosd_step", cosd_step)
    flags = ["--preset", "smoke", "--context", "instructions", "--method", "cosd", "--steps", "12", "--anchors", "0", "--save-every", "5", "--device", "cpu"]
    assert main([*flags, "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert "at step 7: not a finite number" in err and "last good checkpoint is" in err
    state = final_state(out)
    assert state["step"] == 5 and all(value.isfinite().all() for value in state["model"].values())


# --------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("flags, message", [
    (["--contxt", "all"], "unrecognized arguments: --contxt"),
    (["--cont", "all"], "unrecognized arguments: --cont"),                                          # no abbreviations
    (["--context", "poems"], "invalid choice: 'poems'"),
    (["--steps", "many"], "invalid int value: 'many'"),
    (["--steps", "0"], "--steps 0 must be at least 1"),
    (["--anchors", "1"], "--anchors 1.0 leaves the task no prompt"),
    (["--base-kl", "0.1"], "--base_kl goes with --method sft or asft"),
    (["--method", "sft", "--replay", "real"], "--replay real needs --anchors SHARE"),
    (["--model", "x", "--context", "instructions", "--prompts", "x", "--anchors", "0.5", "--anchor-file", "x", "--replay", "proxy"], "--replay proxy is the built-in world's"),
    (["--anchors", "inf"], "--anchors inf must be between 0 and 1"),
    (["--temperature", "1e-40"], "too close to 0 to sample"),
    (["--max-new-tokens", "600"], "--max_new_tokens 600 must be at most 256"),
    (["--skip", "24"], "--skip 24 below it"),
    (["--divergence", "policy_gradient", "--method", "offline"], "needs the student's own samples"),
    (["--divergence", "policy_gradient", "--temperature", "0.5"], "needs the student's own samples"),
    (["--device", "meta"], "choose from auto, cpu, cuda, mps"),
    (["--d-model", "40000000"], "out of memory: lower --micro-batch"),
    (["--beta", "1"], "use --divergence forward_kl or reverse_kl"),
    (["--d-model", "130"], "--d_model 130 / --n_head 4 must be an even whole number"),
    (["--divergence", "policy_gradient", "--top-k", "5"], "--top_k and --chunk do not apply"),
    (["--device", "toaster"], "--device 'toaster' cannot be used here"),
    (["--lr", "nan"], "--lr nan must be between"),
    (["--out", "/proc/nowhere"], "/proc/nowhere"),
])
def test_bad_input_is_one_readable_line_and_exit_code_2(flags, message, capsys, tmp_path):
    try:
        code = main(["--preset", "smoke", "--out", str(tmp_path), *flags])
    except SystemExit as argparse_exit:
        code = argparse_exit.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and message in lines[-1] and "Traceback" not in "".join(lines)


def test_damaged_and_foreign_checkpoints(out, capsys):
    flags = ["--preset", "smoke", "--context", "instructions", "--method", "cosd", "--device", "cpu", "--out", str(out), "--resume"]
    assert main(flags) == 0
    for path in (out / "instructions-cosd-seed0" / "checkpoint.pt", next(out.glob("base-*/checkpoint.pt"))):
        (out / "instructions-cosd-seed0" / "result.json").unlink(missing_ok=True)
        whole = path.read_bytes()
        buffers = []
        for foreign in (torch.zeros(3), {"identity": None}, {"identity": [1]}, {"weights": 1}):
            buffers.append(io.BytesIO())
            torch.save(foreign, buffers[-1])
        for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2], *(b.getvalue() for b in buffers)):
            path.write_bytes(damaged)
            assert main(flags) == 2
            assert re.search(rf"{path} is not a checkpoint of this program, or is damaged .*: delete it", capsys.readouterr().err)
        path.write_bytes(whole)
    assert main([*flags, "--lr", "0.5"]) == 2
    assert "another configuration: lr (0.0005 there, 0.5 here); run without --resume" in capsys.readouterr().err


def test_a_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"identity": {}, "step": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        train.load(tmp_path / "checkpoint.pt", {})
    assert not (tmp_path / "owned").exists()


# ------------------------------------------------------------------------------------------------------- config
def test_the_command_line_is_the_dataclass():
    assert parse([]) == Config()
    cfg = parse(["--preset", "smoke", "--steps", "9", "--gkd-lambda", "0.25", "--gkd_lambda", "0.75", "--lr", "2.0", "--resume", "--divergence", "jsd"])
    assert cfg == Config(**SMOKE | dict(steps=9, gkd_lambda=0.75, lr=2.0, resume=True, divergence="jsd"))
    with pytest.raises(Exception, match="cannot assign"):
        cfg.steps = 3


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{field.name}" in text for field in fields(Config)) and "--preset" in text
    assert "share of on-policy steps under gkd [0.5]" in " ".join(text.split())                       # the comment of the field


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), RuntimeError("MPS backend out of memory")])
def test_out_of_memory_says_which_flags_to_turn(out, monkeypatch, capsys, error):
    monkeypatch.setattr(train, "cosd_step", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    assert main(["--preset", "smoke", "--device", "cpu", "--out", str(out)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", line)}
    assert flags <= {field.name for field in fields(Config)} and {"micro_batch", "chunk", "checkpointing", "lora", "frozen_dtype"} <= flags


def test_base_is_found_by_fingerprint(out):
    before = {f.name for f in out.glob("base-*")}
    train.train(smoke(out, steps=1, divergence="jsd"))
    assert {f.name for f in out.glob("base-*")} == before                                           # the same base serves
    train.train(smoke(out, steps=1, pretrain_steps=2))
    assert len(list(out.glob("base-*"))) == len(before) + 1


def test_pretraining_batches_cover_the_draws_and_are_cut_by_length():
    batches = train.pretraining_batches(0, 0, 16)
    lengths = [[len(train.render(e.context, e.prompt)) + len(train.encode(e.answer)) for e in batch] for batch in batches]
    assert len(batches) == 8 and all(len(batch) == 16 for batch in batches)
    spans = sorted((min(batch), max(batch)) for batch in lengths)
    assert all(b <= c for (_, b), (c, _) in zip(spans, spans[1:]))


# --------------------------------------------------------------------------------------------- mixed precision
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_trains_fp32_masters(tmp_path, dtype):
    cfg = smoke(tmp_path, dtype=dtype)
    device, low, autocast = train.resolve_device(cfg)
    assert low == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == low
    train.train(cfg)
    state = final_state(tmp_path)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in state["model"].values())
    assert bool(state["scaler"]) == (dtype == "fp16")


def test_fp16_overflow_skips_the_step_and_lowers_the_scale(tmp_path, monkeypatch):
    """An infinite scaled gradient is the scaler's business, not an error; the weights do not move in that step."""
    cfg, calls, original = smoke(tmp_path, dtype="fp16", anchors=0.0), [], train.cosd_step

    def cosd_step(student, teacher, *args, **kwargs):
        log = original(student, teacher, *args, **kwargs)
        if teacher:
            calls.append(student.embed.weight.detach().clone())
            if len(calls) == 2:
                student.embed.weight.grad[0, 0] = float("inf")
        return log

    monkeypatch.setattr(train, "cosd_step", cosd_step)
    train.train(cfg)
    assert torch.equal(calls[1], calls[2]) and not torch.equal(calls[0], calls[1])
    assert final_state(tmp_path)["scaler"]["scale"] == 65536 / 2


def test_fp16_that_overflows_for_ever_is_an_error(tmp_path, monkeypatch, capsys):
    original = train.cosd_step

    def cosd_step(student, teacher, *args, **kwargs):
        log = original(student, teacher, *args, **kwargs)
        if teacher:
            student.embed.weight.grad[0, 0] = float("inf")
        return log

    monkeypatch.setattr(train, "cosd_step", cosd_step)
    flags = ["--preset", "smoke", "--context", "instructions", "--method", "cosd", "--steps", "40", "--anchors", "0", "--batch", "2"]
    assert main([*flags, "--dtype", "fp16", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "not a finite number" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- report
def test_table_gives_mean_and_standard_deviation_over_seeds(out):
    story = train.train(smoke(out, seeds=2, method="sft"))
    assert [r["seed"] for r in story["results"]] == [0, 1]
    drifts = torch.tensor([r["drift"] for r in story["results"]])
    assert f"{drifts.mean():.4f} ± {drifts.std():.4f}" in story["report"]
    assert train.spread([0.5, 0.7], 2) == "0.60 ± 0.14" and train.spread([0.5], 2) == "0.50"


def test_without_matplotlib_there_is_no_figure_but_everything_else(reference, monkeypatch, capsys, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    train.report(reference[1]["results"], tmp_path)
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert {f.name for f in tmp_path.iterdir()} == {"results.json", "results.md"}


def test_drift_by_hand(out):
    """KL(base‖tuned) on the base's samples: zero for the base itself, and not symmetric."""
    cfg = smoke(out)
    base, _ = train.get_base(cfg, *train.resolve_device(cfg))
    cfg, chat, live = cfg.for_method("cosd"), contexts.WORLD_CHAT, lambda model: train.Teacher(model, "live")
    examples = train.contexts.probes(train.seeded(0), "instructions", 8)["specification"]
    assert train.drift(live(base), live(base), examples, cfg, chat) == pytest.approx(0, abs=1e-7)
    tuned = train.copy.deepcopy(base)
    with torch.no_grad():
        tuned.norm.weight.mul_(3.0)
    prompts = [train.render(e.context, e.prompt) for e in examples]
    ids, mask = base.generate(prompts, cfg.max_new_tokens, eos={contexts.END}, generator=train.torch_generator(base.device, cfg.seed, "drift"))
    values = []
    with torch.no_grad():
        for prompt, row, m in zip(prompts, ids, mask):
            whole = torch.tensor([prompt + row[m].tolist()])
            p, q = (model(whole)[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (base, tuned))
            values.append((p.exp() * (p - q)).sum(-1))
    drift = train.drift(live(base), live(tuned), examples, cfg, chat)
    assert drift == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)
    assert train.drift(live(base), live(tuned), examples, replace(cfg, chunk=5), chat) == pytest.approx(drift, rel=1e-5)


def test_a_complete_base_is_only_read(reference, tmp_path):
    """Several programs may share a folder of bases."""
    cfg = smoke(tmp_path, bases=str(reference[0]))
    folder = next(reference[0].glob("base-*"))
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    train.get_base(cfg, *train.resolve_device(cfg))
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_a_share_may_be_a_whole_number():
    """From JSON or a notebook 0 is an int; `anchors` and `base_kl` are shares, not counts."""
    assert Config(anchors=0, method="cosd").for_method("cosd").n_anchors == 0 and Config(base_kl=0).base_kl == 0
    with pytest.raises(contexts.BadInput, match="--steps 0 must be at least 1"):
        Config(steps=0)


def test_a_figure_leaves_the_notebook_its_own_backend(reference, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("svg")
    train.report(reference[1]["results"], tmp_path)
    assert matplotlib.get_backend() == "svg" and (tmp_path / "figure.png").stat().st_size > 1000
