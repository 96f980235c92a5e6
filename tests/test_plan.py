"""The estimate of memory against what a process really takes: its peak on the CPU, step by step as train.py does it."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, tiny_gpt

sys.path.insert(0, str(ROOT / "notebooks"))

import plan as planner
from model import GPTConfig, add_adapters
from train import Config

SHAPE = {
    "vocab_size": 8_000,
    "n_layer": 6,
    "d_model": 384,
    "n_head": 6,
    "n_kv_head": 3,
    "head_dim": 64,
    "d_ff": 1152,
    "max_len": 512,
}
CHILD = """
import json, sys
from functools import partial
from pathlib import Path

sys.path.insert(0, "tests")
import torch
from benchmark import resident_bytes
import contexts
from model import GPT, GPTConfig
from train import Config, assemble, fit

shape, changes, common, width = json.loads(sys.argv[1])
cfg = Config(**changes, steps=2, device="cpu").resolved("cosd")
chat = contexts.WORLD_CHAT


def draw_batch(self, seed, step, size):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(1, self.vocab, (size, width), generator=generator).tolist()


class Random(contexts.Task):
    vocab = 64
    draw_batch = draw_batch


def same(chat, row):
    return [1] * common + row[common:]


def run_on(shape, cfg):
    Random.vocab = shape["vocab_size"]
    silent = contexts.replace(chat, ends=frozenset()) if hasattr(contexts, "replace") else chat
    task = Random("random", silent, None, None, [], {}, None, [], show=same)
    return assemble(cfg, task, GPT(GPTConfig(**shape)), {}, Path(sys.argv[2]))


import train
train.context_prompts = lambda task, examples, y=(): [same(chat, row) for row in examples]
train.save_run = lambda run: None
fit(run_on(shape | dict(n_layer=1, vocab_size=64), contexts.replace(cfg, batch=2, micro_batch=0)))
Path("/proc/self/clear_refs").write_text("5")
before = resident_bytes("VmRSS")
run = run_on(shape, cfg)
Path("/proc/self/clear_refs").write_text("5")  # what building it took is not the step's
fit(run)
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
def test_estimate_within_a_quarter_of_the_measured_peak(changes, common, tmp_path):
    changes = {"batch": 16, "chunk": 32, "dtype": "fp32"} | changes
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([SHAPE, changes, common, 60]), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert child.returncode == 0, child.stderr
    measured, cfg = int(child.stdout), Config(**changes, steps=2).resolved("cosd")
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    p = planner.plan(cfg, GPTConfig(**SHAPE), dtype, 60 - common, 60, common)
    print({part: f"{p[part] / 1e6:.0f}" for part in planner.PARTS}, "measured", measured // 10**6)
    assert 0.75 <= p["peak"] / measured <= 1.25, (
        f"estimated {p['peak'] / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB"
    )
