"""Claims about cost, measured as ratios within one run:

  context   the time of a COSD step with a 1000-token shared context over one with a 10-token context; read once for the
            run, once a step, and by every row
  chunks    peak memory and time of the chunked divergence over the plain one at V = 151,936 and 512 positions
  generate  tokens a second of `GPT.generate` over transformers' `generate`, same weights, dtype and greedy tokens
  step      time, its split, and peak memory of one COSD step on a real model; beside TRL's SDFTTrainer where --trl-python
            has TRL installed

    python tests/benchmark.py context chunks       (about four minutes on two cores, 8 GB, random models)
    python tests/benchmark.py generate step --model out/SmolLM2-135M-Instruct [--threads 1] [--trl-python PYTHON]

Which model fits which card is an estimate: python notebooks/plan.py --card
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

import cosd
from cosd import Rows, Teacher, chunked_objective, cosd_loss, make_objective, token_weights
from model import GPT, GPTConfig, add_adapters, low_precision_, resolve_device, trained

V_BIG, POSITIONS, WIDTH = 151_936, 512, 512


def take_turns(cases: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each case. The cases take turns, so that a busy moment hits all alike; round 0 warms up."""
    seconds = {name: [] for name in cases}
    for round_ in range(rounds + 1):
        for name, call in cases.items():
            began = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def one_step(student, teacher, prompts, theirs, generator=None, chunk=0):
    """Rollout, score, backward: a COSD step up to the optimizer."""
    ids, mask = student.generate(prompts, 24, generator=generator)
    objective = make_objective("reverse_kl")
    rows = Rows(prompts, theirs, ids, mask, token_weights(mask), teacher, objective)
    loss, _ = cosd_loss(student, rows, chunk)
    loss.backward()


# ---------------------------------------------------------------------------------- random models
def context_ratios(device: str, rounds: int) -> None:
    torch.manual_seed(0)
    shape = dict(n_layer=8, d_model=512, n_head=8, n_kv_head=8, head_dim=64, d_ff=1536)
    student = GPT(GPTConfig(8192, max_len=2048, **shape)).to(device)
    prompts = [torch.randint(8192, (16,)).tolist() for _ in range(16)]
    context = torch.randint(8192, (1000,)).tolist()
    find = cosd.common_beginning

    def step(length, kept, finder):
        teacher, theirs = kept, [context[:length] + prompt for prompt in prompts]
        cosd.common_beginning = finder  # without it every row reads its whole prompt
        one_step(student, teacher, prompts, theirs)
        student.zero_grad()
        if "forget" in teacher.kind:
            teacher.forget()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    cases = {}
    print(cases, step, find)


def resident_bytes(what: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process. Linux only; ru_maxrss will not do, it inherits the parent's peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith(what)]
    return int(line.split()[1]) * 1024
