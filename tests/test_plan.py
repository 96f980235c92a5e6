"""The estimate of memory against what a process really takes: its peak on the CPU, step by step as train.py does it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_gpt

sys.path.insert(0, str(ROOT / "notebooks"))

import plan as planner

from model import GPTConfig, add_adapters
from train import Config

SHAPE = {
    "vocab_size": 8_000,
    "n_layer": 4,
    "d_model": 384,
    "n_head": 6,
    "n_kv_head": 3,
    "head_dim": 64,
    "d_ff": 1152,
    "max_len": 512,
}
CHILD = """
import json, sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, "tests")
import torch
import contexts
import train
from benchmark import resident_bytes
from model import GPT, GPTConfig

shape, changes, common, width = json.loads(sys.argv[1])
cfg = train.Config(**changes, steps=2, device="cpu").resolved("cosd")  # the moments are there in the second


def prompts(chat, row):
    return row


class RandomTask(contexts.Task):
    def draw_batch(self, seed, step, size):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(1, 64, (size, width), generator=generator)
        rows[:, :common] = 1
        return rows.tolist()


def fit(shape, cfg):
    chat = replace(contexts.WORLD_CHAT, ends=frozenset())  # every answer is as long as it may be
    task = RandomTask("random", chat, None, None, [], {}, None, [], show=prompts)
    model = GPT(GPTConfig(**shape))
    Path("/proc/self/clear_refs").write_text("5")  # what building it took is not the step's
    train.fit(train.assemble(cfg, task, model, {}, Path("run")))


train.context_prompts = lambda task, examples, y=(): examples
train.save_run = lambda run: None
fit(shape | {"n_layer": 1}, cfg)  # everything that is loaded once, kernels for these shapes too
before = resident_bytes("VmRSS")
fit(shape, cfg)
print(resident_bytes("VmHWM") - before)
"""
MEASURED = [
    ({}, 0),
    ({"lora": 8, "dtype": "bf16"}, 30),
]


@pytest.mark.parametrize("changes, common", MEASURED, ids=["all weights", "adapters"])
@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="measures through Linux's /proc"
)
def test_estimate_within_a_quarter_of_the_measured_peak(changes, common):
    changes = {"batch": 8, "max_new_tokens": 16, "chunk": 32, "dtype": "fp32"} | changes
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([SHAPE, changes, common, 60])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert child.returncode == 0, child.stderr
    measured, cfg = int(child.stdout), Config(**changes, steps=2).resolved("cosd")
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    p = planner.plan(cfg, GPTConfig(**SHAPE), dtype, 60 - common, 60, common)
    print({part: round(p[part] / 1e6) for part in planner.PARTS}, "measured", measured // 10**6)
    assert 0.75 <= p["peak"] / measured <= 1.25, (
        f"estimated {p['peak'] / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB"
    )


def peak(shape=SHAPE, dtype=torch.bfloat16, **changes):
    cfg = Config(**{"batch": 16, "max_new_tokens": 64} | changes).resolved("cosd")
    return planner.plan(cfg, GPTConfig(**shape), dtype, 40, 60, 20, 100)["peak"]


@pytest.mark.parametrize(
    "name, values",
    [
        ("batch", [1, 8, 64]),
        ("chunk", [8, 32, 128, 0]),
        ("micro_batch", [1, 4, 8]),
        ("lora", [1, 16, 64, 0]),
        ("max_new_tokens", [8, 64, 256]),
        ("checkpointing", [True, False]),
    ],
)
def test_more_never_takes_less(name, values):
    peaks = [peak(**{name: value}) for value in values]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


def test_the_teachers_that_are_copies_take_more():
    assert peak(teacher="live") == peak(teacher="frozen") < peak(teacher="ema")
    assert peak(teacher="frozen", lora=8) < peak(teacher="ema", lora=8)


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_counts_are_those_of_the_module(mlp):
    model = tiny_gpt(mlp=mlp)
    add_adapters(model, 3)
    p = planner.plan(
        Config(lora=3, batch=4).resolved("cosd"), model.config, torch.float32, 5, 20, 7
    )
    assert p["trained"] == sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert p["parameters"] == sum(x.numel() for x in model.parameters())
    assert p["tokens a step"] == 7 + 4 * (5 + 24)
    assert p["teacher"] == p["base"] == 0


def test_the_command_says_whether_it_fits_and_what_to_turn(checkpoint, tmp_path, capsys):
    lines = [json.dumps({"prompt": f"Say {i}.", "answer": str(i)}) for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    (tmp_path / "context.txt").write_text("Answer in one word.")
    given = ["--model", checkpoint, "--context", "instructions"]
    given += ["--prompts", str(tmp_path / "prompts.jsonl")]
    given += ["--context-file", str(tmp_path / "context.txt")]
    assert planner.main([*given, "--card", "16"]) == 0
    said = capsys.readouterr().out
    assert "It fits 16 GB" in said and "autocast bfloat16" in said
    assert planner.main([*given, "--card", "0.5"]) == 0
    assert "It does not fit 0.5 GB with any of the flags" in capsys.readouterr().out
    assert "--lr 5e-05: try 2e-05 to 0.0001" in said and "s per step" not in said
    assert planner.main([*given, "--lora", "2", "--lr", "5e-5", "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert "--lr 5e-05, which is unusual: try 0.0002 to 0.001" in said
    assert re.search(
        r"measured here: [\d.]+ s per step, .* for 40 steps; evaluation .* together about", said
    )
    assert planner.main(["--card", "16"]) == 2
    assert "--model FOLDER is missing" in capsys.readouterr().err


def test_problems_that_the_context_has_solved_say_nothing_held_out(checkpoint, tmp_path, capsys):
    rows = [json.dumps({"prompt": f"Say {i}.", "answer": str(i)}) + "\n" for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    given = ["--model", checkpoint, "--context", "instructions", "--card", "16"]
    given += ["--prompts", str(tmp_path / "prompts.jsonl")]
    for lines, said in ((rows[5:9], "1 held-out prompts are solved in"), (rows[:5], "")):
        (tmp_path / "solved.jsonl").write_text("".join(lines))
        assert planner.main([*given, "--context-file", str(tmp_path / "solved.jsonl")]) == 0
        out = capsys.readouterr().out
        assert said in out and ("are solved in" in out) == bool(said)


def test_a_measured_step_is_that_of_the_loop(checkpoint, tmp_path, monkeypatch):
    """It leaves the same weights as a step of `train.fit`."""
    import train
    from contexts import file_task, open_chat
    from model import GPT

    rows = [json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(16)]
    (tmp_path / "p.jsonl").write_text("".join(rows))
    (tmp_path / "c.txt").write_text("Answer in one word.")
    how = dict(model=checkpoint, context="instructions", device="cpu", max_new_tokens=4, batch=4)
    how |= dict(prompts=str(tmp_path / "p.jsonl"), context_file=str(tmp_path / "c.txt"), steps=1)
    cfg = Config(**how, lr=1e-3).resolved("cosd")
    task = file_task(cfg, open_chat(checkpoint, 264), 512)
    monkeypatch.setattr(train, "save_run", lambda run: None)
    monkeypatch.setattr(train, "evaluate", lambda run: None)
    runs = [train.assemble(cfg, task, GPT.from_pretrained(checkpoint), {}, tmp_path) for _ in "ab"]
    train.fit(runs[0])
    for group in runs[1].optimizer.param_groups:  # the rate of the first step
        group["lr"] = cfg.lr / (train.METHODS["cosd"].warmup + 1)
    planner.one_step(runs[1], 0)
    for one, other in zip(*(run.student.parameters() for run in runs)):
        torch.testing.assert_close(
            one, other, rtol=0, atol=2e-4 * cfg.lr + 1e-7
        )  # but for clipping


def test_the_advice_is_the_first_that_fits():
    cfg, shape = Config(batch=8, chunk=32).resolved("cosd"), GPTConfig(**SHAPE)
    counted = {"prompt": 400, "teacher_prompt": 400}

    def card(**changes):  # just large enough after these changes
        changed = Config(**{"batch": 8, "chunk": 32} | changes).resolved("cosd")
        needed = planner.gigabytes(changed, shape, torch.bfloat16, counted)
        return 1.1 * needed + planner.SPARE + 1e-6

    assert planner.fits(planner.gigabytes(cfg, shape, torch.bfloat16, counted), card())
    said = planner.advice(cfg, shape, torch.bfloat16, counted, card(checkpointing=True))
    assert "With --checkpointing it does" in said
    said = planner.advice(cfg, shape, torch.bfloat16, counted, card(checkpointing=True, lora=16))
    assert "--lora 16" in said
