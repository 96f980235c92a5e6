"""The plan's memory estimate against what a process really takes: its peak on the CPU, step by step as train.py does it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from model import TARGETS, GPTConfig, add_adapters
from train import Config, plan

SHAPE = dict(vocab_size=16_000, n_layer=8, d_model=512, n_head=8, n_kv_head=4, head_dim=64, d_ff=1536, max_len=512)
CHILD = """
import json, sys, torch
sys.path.insert(0, "tests")
from pathlib import Path
from benchmark import resident_bytes
from cosd import Batch, Teacher, cosd_step
from model import GPT, GPTConfig, add_adapters, merged_copy
from train import Config, resolve_device

shape, changes, common = json.loads(sys.argv[1])
cfg = Config(**changes).for_method("cosd")
device, dtype, autocast = resolve_device(cfg)
tiny = GPT(GPTConfig(**shape | dict(n_layer=1, vocab_size=64)))                 # everything that is loaded once
cosd_step(tiny, Teacher(tiny), Batch([[1]], [[1]]), eos=(), max_new_tokens=2, chunk=4, autocast=autocast)
Path("/proc/self/clear_refs").write_text("5")
before = resident_bytes("VmRSS")
frozen = torch.bfloat16 if cfg.frozen_dtype == "bf16" else None
student = GPT(GPTConfig(**shape))
if cfg.lora:
    student = student.to(frozen) if frozen else student
    add_adapters(student, cfg.lora, 2 * cfg.lora, cfg.targets)
Path("/proc/self/clear_refs").write_text("5")                                   # what building it took is not the step's
student.checkpointing = cfg.checkpointing
teacher = Teacher(student, dtype=frozen)
parameters = [p for p in student.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
for step in range(2):                                                           # the moments are there in the second
    generator = torch.Generator().manual_seed(step)
    prompts = torch.randint(shape["vocab_size"], (cfg.batch, 60), generator=generator)
    prompts[:, :common] = prompts[0, :common]
    prompts = prompts.tolist()
    cosd_step(student, teacher, Batch(prompts, prompts), eos=(), max_new_tokens=cfg.max_new_tokens, chunk=cfg.chunk, autocast=autocast, generator=generator,
              micro_batch=cfg.micro_batch or None)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(resident_bytes("VmHWM") - before)
"""


@pytest.mark.parametrize("changes, common", [(c, 30 if "max_new_tokens" in c else 0) for c in [
    dict(), dict(dtype="bf16"), dict(batch=4, max_new_tokens=160), dict(dtype="bf16", frozen_dtype="bf16", checkpointing=True), dict(micro_batch=4),
    dict(lora=8), dict(lora=8, dtype="bf16", frozen_dtype="bf16"),
]], ids=lambda c: " ".join(c) or "all weights" if isinstance(c, dict) else "")
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures through Linux's /proc")
def test_estimate_within_a_quarter_of_the_measured_peak(changes, common):
    changes = dict(batch=16, max_new_tokens=24, chunk=32, device="cpu", dtype="fp32") | changes
    child = subprocess.run([sys.executable, "-c", CHILD, json.dumps([SHAPE, changes, common])], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    assert child.returncode == 0, child.stderr
    measured, cfg = int(child.stdout), Config(**changes).for_method("cosd")
    estimate = plan(cfg, GPTConfig(**SHAPE), {"bf16": torch.bfloat16}.get(cfg.dtype, torch.float32), 60 - common, 60, common)
    print({name: f"{value / 1e6:.0f}" for name, value in estimate.items()}, "measured", measured // 10**6)
    assert 0.75 <= estimate["peak"] / measured <= 1.25, f"estimated {estimate['peak'] / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB"


def test_counts_are_those_of_the_module():
    from conftest import tiny_gpt

    assert plan(Config(batch=4).for_method("cosd"), GPTConfig(64), torch.float32, 5, 20, common=7)["tokens a step"] == 7 + 4 * (5 + 24)
    for targets in (TARGETS, ("q", "down")):
        model = tiny_gpt()
        add_adapters(model, 3, 6.0, targets)
        p = plan(Config(lora=3, lora_targets=",".join(targets)).for_method("cosd"), model.config, torch.float32, 10, 20)
        assert p["trainable"] == sum(x.numel() for x in model.parameters() if x.requires_grad)
        assert p["parameters"] == sum(x.numel() for x in model.parameters())
        assert p["tokens a step"] == 64 * (10 + 24) and p["teacher"] == 0
