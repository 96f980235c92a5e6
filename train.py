"""Train: compile a context into a model's weights, beside SFT on the same task.

    python train.py                                            the built-in world: 4 kinds of context x (COSD, SFT)
    python train.py --context instructions --divergence jsd    one kind
    python train.py --resume                                   go on after Ctrl-C or kill
    python train.py --model FOLDER --context instructions --context-file FILE --prompts FILE      your own; --dry-run: its plan

A method is two choices: who writes the completion, and what is minimised on its tokens.

    method    who writes y               objective per token
    sft       the expert                 cross-entropy, with --base-kl λ plus λ KL(base‖student)
    asft      the expert                 the same, each token weighted by its own probability (arXiv:2509.23753)
    offline   the teacher, given C       the divergence (offline context distillation)
    gkd       student with probability   the divergence (arXiv:2306.13649)
              λ, else the expert
    cosd      the student, without C     the divergence

Everything random in step s is seeded by (seed, s), so a checkpoint needs no random state, only weights, optimizer (and its
scaler), EMA teacher and step number: a resumed run equals an uninterrupted one. Left out: several devices, sweeps.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from tqdm import tqdm

import contexts
from contexts import END, TASKS, WORLD_CHAT, BadInput, Chat, Example, Task, encode, render
from cosd import DIVERGENCES, Batch, Objective, Teacher, completion_states, cosd_step, jsd, reverse_kl, top_k_divergence
from model import GPT, TARGETS, GPTConfig, add_adapters, pad_right, read_config

METHODS = ("cosd", "sft", "asft", "offline", "gkd")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(Exception):
    """The loss is no longer a number: one line, exit code 1."""


# ================================================================================================ 1. config
@dataclass(frozen=True)
class Config:
    # what to learn, and how
    context: Literal["all", "demonstrations", "specification", "instructions", "privileged"] = "all"
    method: Literal["all", "cosd", "sft", "asft", "offline", "gkd"] = "all"    # all: cosd and sft; with --model cosd
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "policy_gradient"] = "forward_kl"
    beta: float = 0.5                      # of jsd
    top_k: int = 0                         # 0: the full vocabulary; else the student's top k and a tail bucket
    teacher: Literal["frozen", "ema", "live"] = "frozen"
    ema_rate: float = 0.02
    gkd_lambda: float = 0.5                # share of on-policy steps under gkd
    base_kl: float | None = None           # λ of the KL to the base on SFT's own tokens; default 0, for asft 0.1
    anchors: float | None = None           # share of the batch under other contexts; default 0.5, for sft and --model 0
    replay: Literal["self", "real", "proxy"] = "self"          # of the anchors: own answers, KL to the base; or a corpus's, cross-entropy
    steps: int | None = None               # default 250, with --model 40
    batch: int | None = None               # default 64, with --model 8
    micro_batch: int = 0                   # 0: the whole batch at once; the result does not depend on it
    lr: float | None = None                # default 5e-4, for sft and asft 1e-4; with --model 5e-5, its adapters 5e-4
    schedule: Literal["decay", "cosine", "constant"] = "decay"     # after the warm-up; decay: linear over the second half
    warmup: int = 10
    temperature: float = 1.0               # of the rollouts
    max_new_tokens: int = 24
    reduction: Literal["token", "sequence"] = "token"
    skip: int = 0                          # first completion tokens left out of the loss
    chunk: int | None = None               # rows of logits held at once; 0: all; default 0, with --model 32
    lora: int = 0                          # rank of the adapters; 0: train all weights
    lora_alpha: float | None = None        # default: twice the rank
    lora_targets: str = ",".join(TARGETS)
    checkpointing: bool = False            # compute the blocks again in the backward pass: less memory, a slower step
    frozen_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"     # of weights without gradient: the frozen teacher, the base under LoRA
    # your own model and files
    model: str | None = None               # a folder or hub name; without: the built-in world
    prompts: str | None = None             # JSON lines to train on
    heldout: str | None = None             # JSON lines to score on; without: every eighth of --prompts
    context_file: str | None = None        # C: .txt or .md, .json (chat turns), .jsonl (solved problems)
    template: str | None = None            # a file in place of contexts.TEMPLATES
    demonstrations: Literal["pool", "own"] = "pool"    # A: of other prompts, as turns; or each prompt's own (SDFT's way)
    shots: int | None = None               # training lines shown before the prompt; default 4 for a pool, else 0
    score: str = "none"                    # none, exact, contains, regex, number, contains:TEXT, regex:PATTERN, path.py:function
    anchor_file: str | None = None         # JSON lines: prompts for --anchors, and for the drift
    unrelated: str | None = None           # a text whose perplexity must not change
    export: Literal["merged", "adapters", "none"] = "merged"       # what transformers will load
    dry_run: bool = False                  # print the plan and stop
    # the base of the built-in world
    pretrain_steps: int = 2000
    pretrain_batch: int = 96
    pretrain_lr: float = 3e-3
    n_layer: int = 3
    d_model: int = 128
    n_head: int = 4
    # the run
    seed: int = 0
    seeds: int = 1                         # how many, from `seed` on: the table then gives mean ± standard deviation
    device: str = "auto"                   # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    eval_size: int = 128                   # held-out prompts, and prompts per probe
    eval_every: int = 0                    # also measure every so many steps, for result.json's "curve"; 0: at the end only
    save_every: int = 100
    out: str = "out"
    bases: str | None = None               # where pretrained bases are kept; default: --out
    resume: bool = False

    def __post_init__(self):
        hints = get_type_hints(Config)
        lowest = dict.fromkeys(("top_k", "micro_batch", "skip", "chunk", "warmup", "seed", "lora", "shots", "eval_every"), 0)
        for name, value in asdict(self).items():
            if get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
                raise BadInput(f"--{name} {value!r} is not a choice; choose from {', '.join(get_args(hints[name]))}")
            whole = isinstance(value, int) and not isinstance(value, bool) and float not in (hints[name], *get_args(hints[name]))
            if whole and value < lowest.get(name, 1):
                raise BadInput(f"--{name} {value} must be at least {lowest.get(name, 1)}")
        for name, high in dict(gkd_lambda=1, ema_rate=1, temperature=100, lr=10, pretrain_lr=10, anchors=1, base_kl=1000).items():
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= high:
                raise BadInput(f"--{name} {getattr(self, name)} must be between 0 and {high}")
        if self.anchors and round(self.anchors * self.n_batch) == self.n_batch:
            raise BadInput(f"--anchors {self.anchors} leaves the task no prompt in a batch of {self.n_batch}")
        if not 0 < self.beta < 1:
            raise BadInput(f"--beta {self.beta} must lie strictly between 0 and 1; "
                           "for the ends use --divergence forward_kl or reverse_kl")
        if 0 < self.temperature < 0.01:
            raise BadInput(f"--temperature {self.temperature} is too close to 0 to sample; 0 is greedy")
        if (self.max_new_tokens > 256 and not self.model) or self.skip >= self.max_new_tokens:
            raise BadInput(f"--max_new_tokens {self.max_new_tokens} must be at most 256, and --skip {self.skip} below it")
        if self.d_model % self.n_head or self.d_model // self.n_head % 2:
            raise BadInput(f"--d_model {self.d_model} / --n_head {self.n_head} must be an even whole number, the head width")
        if self.divergence == "policy_gradient" and (self.top_k or self.chunk):
            raise BadInput("--divergence policy_gradient looks at sampled tokens only: --top_k and --chunk do not apply")
        if self.divergence == "policy_gradient" and (self.method in ("offline", "gkd") or self.temperature != 1):
            raise BadInput("--divergence policy_gradient needs the student's own samples: --method cosd and --temperature 1")
        if self.base_kl and self.method not in ("sft", "asft"):
            raise BadInput("--base_kl goes with --method sft or asft: the other methods have a teacher")
        if self.replay != "self" and not self.anchors:
            raise BadInput(f"--replay {self.replay} needs --anchors SHARE")
        if self.replay == "proxy" and self.model:
            raise BadInput("--replay proxy is the built-in world's; with --model any --anchor_file with answers is --replay real")
        if self.model and (self.context == "all" or not self.prompts):
            raise BadInput("--model needs --context (one type) and --prompts FILE")
        if given := [name for name in FILE_FIELDS if not self.model and getattr(self, name) != Config.__dataclass_fields__[name].default]:
            raise BadInput(f"--{given[0]} needs --model: the built-in world brings its own")
        if self.model and self.anchors and not self.anchor_file:
            raise BadInput("--anchors needs --anchor_file, JSON lines with other prompts")
        if unknown := set(self.targets) - set(TARGETS):
            raise BadInput(f"--lora_targets {', '.join(sorted(unknown))}: choose from {','.join(TARGETS)}")
        if (self.export == "adapters" or self.lora_alpha is not None) and not self.lora:
            raise BadInput("--export adapters and --lora_alpha need --lora RANK")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < 1e4:
            raise BadInput(f"--lora_alpha {self.lora_alpha} must be positive")
        if self.frozen_dtype != "fp32" and not self.lora and self.teacher != "frozen":
            raise BadInput(f"--frozen_dtype {self.frozen_dtype} has no weights to apply to: neither --teacher frozen nor --lora")
        if self.demonstrations == "own" and self.context != "demonstrations":
            raise BadInput("--demonstrations own goes with --context demonstrations")

    def for_method(self, method: str) -> Config:
        """Fill in the defaults that differ between methods, and between the small world and a real model."""
        lr, anchors = (1e-4, 0.0) if method in ("sft", "asft") else (5e-4, 0.5)
        if self.model:
            lr, anchors = 5e-4 if self.lora else 5e-5, 0.0
        defaults = dict(lr=lr, anchors=anchors, base_kl=0.1 if method == "asft" else 0.0, steps=40 if self.model else 250, batch=self.n_batch,
                        chunk=32 if self.model and self.divergence != "policy_gradient" else 0)
        return replace(self, method=method, **{k: v for k, v in defaults.items() if getattr(self, k) is None})

    @property
    def n_batch(self) -> int:
        return self.batch or (8 if self.model else 64)

    @property
    def supervised(self) -> bool:
        return self.method in ("sft", "asft")

    @property
    def n_anchors(self) -> int:
        return round(self.anchors * self.batch)

    @property
    def targets(self) -> list[str]:
        return [name.strip() for name in self.lora_targets.split(",")]


FILE_FIELDS = ("prompts", "heldout", "context_file", "template", "demonstrations", "shots", "score", "anchor_file", "unrelated",
               "export", "dry_run")
PRESETS = {
    "default": {},
    "smoke": dict(pretrain_steps=40, pretrain_batch=32, steps=4, batch=8, n_layer=2, d_model=32, eval_size=8, save_every=20),
}


def parse(argv: list[str] | None) -> Config:
    """The command line is the dataclass: one flag a field, `-` or `_`, no abbreviations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))       # the help is what the source says
    for field in fields(Config):
        told = f"{comments.get(field.name, '')} [{field.default}]".strip().replace("%", "%%")
        kind, about = get_type_hints(Config)[field.name], dict(default=argparse.SUPPRESS, help=told)
        flags = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
        if get_origin(kind) is Literal:
            parser.add_argument(*flags, choices=get_args(kind), **about)
        elif kind is bool:
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **about)
        else:
            parser.add_argument(*flags, type=next((k for k in get_args(kind) if k is not type(None)), kind), **about)
    parser.add_argument("--preset", choices=PRESETS, default="default", help="smoke: everything in seconds, learning nothing")
    given = vars(parser.parse_args(argv))
    return Config(**PRESETS[given.pop("preset")] | given)


def resolve_device(cfg: Config) -> tuple[torch.device, torch.dtype, Callable]:
    """-> (device, dtype, autocast context). Weights stay fp32: mixed precision is autocast's, per operation."""
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("choose from auto, cpu, cuda, mps")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {cfg.device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    choice = cfg.dtype
    if choice == "auto" and device.type == "cuda":                     # bf16 needs no scaler; a T4 has only fp16
        choice = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if choice in ("bf16", "fp16") and cfg.frozen_dtype not in ("fp32", choice):
        raise BadInput(f"--frozen_dtype {cfg.frozen_dtype} does not go with {choice} autocast: use --frozen_dtype {choice}")
    dtype = DTYPES.get(choice, torch.float32)
    return device, dtype, partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)


def seeded(*what) -> random.Random:
    return random.Random("/".join(map(str, what)))


def torch_generator(device: torch.device, *what) -> torch.Generator:
    return torch.Generator(device).manual_seed(seeded(*what).getrandbits(60))


# ======================================================================================== 2. the optimizer loop
def write(path: Path, data: bytes) -> None:
    """Atomic: a kill at any moment leaves either the old file or the new one."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


def save(path: Path, state: dict) -> None:
    """As `write`, but straight to the disk: a checkpoint can be gigabytes."""
    unfinished = path.with_suffix(".tmp")
    try:
        torch.save(state, unfinished)
    except (RuntimeError, OSError) as error:                           # torch's file writer reports a full disk as RuntimeError
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written (is the disk full?): {str(error).splitlines()[0]}") from None
    os.replace(unfinished, path)


def trained(model: GPT) -> dict[str, Tensor]:
    """What a checkpoint needs of a model: with adapters, these alone."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load(path: Path, identity: dict) -> dict:
    """A checkpoint of exactly this configuration, or one clear line. Never unpickles code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs = {**state["identity"]}
    except Exception as error:                                         # torch.load has no one error for a damaged file
        raise BadInput(f"{path} is not a checkpoint of this program, or is damaged ({type(error).__name__}): "
                       "delete it, or choose another --out") from None
    demand_same(path, theirs, identity)
    return state


def demand_same(path: Path, theirs: dict, ours: dict) -> None:
    if differs := [k for k in ours | theirs if theirs.get(k) != ours.get(k)]:
        told = ", ".join(f"{k} ({theirs.get(k)!r} there, {ours.get(k)!r} here)" for k in differs)
        raise BadInput(f"{path} comes from another configuration: {told}; run without --resume, or choose another --out")


def optimize(
    cfg: Config, student: GPT, step_fn: Callable[[int, Callable], dict], *, label: str, folder: Path, identity: dict,
    steps: int, lr: float, warmup: int, weight_decay: float, dtype: torch.dtype,
    teacher: Teacher | None = None, on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW over `steps` calls of step_fn(step, backward), which leaves gradients behind and returns what to log.

    Learning rate: linear warm-up, then `cfg.schedule`. Gradients are clipped at norm 1.
    fp16 needs a scaler, which skips a step whose gradient overflows and halves its scale; bf16 and fp32 do not.
    """
    scaler = torch.amp.GradScaler(student.device.type, enabled=dtype == torch.float16)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    checkpoint, metrics, start = folder / "checkpoint.pt", folder / "metrics.jsonl", 0
    ema = teacher.model if teacher and teacher.kind == "ema" else None
    if cfg.resume and checkpoint.exists():
        state = load(checkpoint, identity)
        start = state["step"]
        with torch.no_grad():
            for name, parameter in trained(student).items():
                parameter.copy_(state["model"][name])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if ema:
            ema.load_state_dict(state["ema"])
        if teacher:
            teacher.prefix = None                                      # read before these weights were loaded
        if start >= steps:                                             # complete: nothing is written, so a base may be shared
            return
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        metrics.write_text("".join(row + "\n" for row in rows if json.loads(row)["step"] < start))
    else:
        checkpoint.unlink(missing_ok=True)
        metrics.write_text("")

    # Ctrl-C and kill are noted, and acted upon between two steps, when weights and optimizer agree; a second one at once.
    stop: list[int] = []

    def note(number: int, _) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=steps, initial=start, desc=label, unit="step", dynamic_ncols=True, mininterval=0.5)
    try:
        with metrics.open("a") as metrics_file, bar:
            for step in range(start, steps):
                began = time.perf_counter()
                torch.manual_seed(seeded(cfg.seed, label, "dropout", step).getrandbits(60))
                left = {"decay": min(1.0, 2 * (1 - step / steps)), "cosine": (1 + math.cos(math.pi * step / steps)) / 2, "constant": 1.0}
                rate = lr * min((step + 1) / (warmup + 1), 1.0) * left[cfg.schedule]
                for group in optimizer.param_groups:
                    group["lr"] = rate
                student.train()
                log = step_fn(step, lambda loss: scaler.scale(loss).backward())
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
                overflow_is_normal = scaler.is_enabled() and scaler.get_scale() >= 1
                if not math.isfinite(log["loss"]) or not (math.isfinite(norm) or overflow_is_normal):
                    kept = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "no checkpoint yet"
                    raise Diverged(f"{label}: loss {log['loss']}, gradient norm {norm} at step {step}: not a finite number. "
                                   f"Try a lower --lr or --dtype fp32; {kept}")
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if teacher:
                    teacher.update(student)
                seconds = round(time.perf_counter() - began, 4)
                log |= {"step": step, "lr": rate, "grad_norm": norm if math.isfinite(norm) else None, "seconds": seconds}
                metrics_file.write(json.dumps(log) + "\n")
                shown = {"loss": "loss", "kl": "kl", "entropy": "H", "length": "len", "eos_rate": "eos"}
                bar.set_postfix({short: f"{log[key]:.3g}" for key, short in shown.items() if key in log}, refresh=False)
                bar.update()
                on_step(step)
                if stop or (step + 1) % cfg.save_every == 0 or step + 1 == steps:
                    metrics_file.flush()
                    save(checkpoint, {"identity": identity, "step": step + 1, "model": trained(student),
                                      "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                                      "ema": ema.state_dict() if ema else None})
                if stop:
                    raise KeyboardInterrupt(f"stopped after step {step + 1} of {steps} ({label}), saved in {checkpoint}; "
                                            "go on with the same command and --resume")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ================================================================================================== 3. the base
def completions(chat: Chat, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Written answers with their end marker as (ids, mask), both (B, N): the form in which `generate` returns rollouts."""
    rows = [chat.encode(text) + [chat.end] for text in texts]
    return pad_right(rows).to(device), pad_right([[1] * len(row) for row in rows]).bool().to(device)


@lru_cache(maxsize=1)
def pretraining_batches(seed: int, group: int, size: int) -> list[list[Example]]:
    """Eight batches drawn at once and cut by length: half the padding, hence half the time."""
    rng = seeded(seed, "pretrain", group)
    drawn = [contexts.draw_pretraining(rng) for _ in range(8 * size)]
    drawn.sort(key=lambda e: len(render(e.context, e.prompt)) + len(encode(e.answer)))
    cut = [drawn[i : i + size] for i in range(0, len(drawn), size)]
    rng.shuffle(cut)
    return cut


def get_base(cfg: Config, device: torch.device, dtype: torch.dtype, autocast: Callable) -> tuple[GPT, str]:
    """The base for this configuration and seed, and its fingerprint. Pretraining always goes on from where it stood, so a
    complete base is simply loaded. The folder's name is the fingerprint, of the settings and of a sample of the data
    itself: a changed world means a new base.
    """
    D, H = cfg.d_model, cfg.n_head
    shape = GPTConfig(contexts.ENCODING.n_vocab, cfg.n_layer, D, H, n_kv_head=H, head_dim=D // H, d_ff=3 * D)
    keys = ("seed", "dtype", "pretrain_steps", "pretrain_batch", "pretrain_lr")
    identity = {"model": asdict(shape)} | {key: getattr(cfg, key) for key in keys}
    rng = seeded("fingerprint")
    sample = [render(e.context, e.prompt) + encode(e.answer) for e in (contexts.draw_pretraining(rng) for _ in range(256))]
    fingerprint = hashlib.sha256(json.dumps([identity, sample, contexts.VOCABULARY]).encode()).hexdigest()[:10]
    folder = Path(cfg.bases or cfg.out) / f"base-{fingerprint}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    base = GPT(shape).to(device)

    def step_fn(step: int, backward: Callable) -> dict:
        examples = pretraining_batches(cfg.seed, step // 8, cfg.pretrain_batch)[step % 8]
        prompts = [render(e.context, e.prompt) for e in examples]
        batch = Batch(prompts, prompts, *completions(WORLD_CHAT, [e.answer for e in examples], device))
        return cosd_step(base, None, batch, "cross_entropy", eos={END}, max_new_tokens=1, autocast=autocast, backward=backward)

    optimize(replace(cfg, resume=True, schedule="decay"), base, step_fn, label=f"base, seed {cfg.seed}", folder=folder, identity=identity,
             steps=cfg.pretrain_steps, lr=cfg.pretrain_lr, warmup=50, weight_decay=0.1, dtype=dtype)
    return base, fingerprint


# ================================================================================================ 4. evaluation
def answers(model: GPT, prompts: list[list[int]], cfg: Config, chat: Chat) -> list[str]:
    """Greedy answers as text, without the end marker; an answer that never ended shows a trailing …"""
    texts = []
    for i in range(0, len(prompts), 2 * cfg.batch):
        ids, mask = model.generate(prompts[i : i + 2 * cfg.batch], cfg.max_new_tokens, temperature=0, eos=chat.ends)
        rows = [row[m].tolist() for row, m in zip(ids, mask)]
        texts += [chat.decode(row[:-1]) if row[-1] in chat.ends else chat.decode(row) + " …" for row in rows]
    return texts


def evaluate(model: GPT, examples: list[Example], with_context: bool, cfg: Config, task: Task) -> dict[str, float]:
    """Mean of each of the task's grades over the examples that have it."""
    prompts = [task.chat.render(e.context if with_context else None, e.prompt) for e in examples]
    grades = [task.grade(e, text) for e, text in zip(examples, answers(model, prompts, cfg, task.chat))]
    return {key: statistics.fmean(g[key] for g in grades if key in g) for key in {k: 0 for g in grades for k in g}}


@torch.no_grad()
def kl_on_own_samples(
    model: Teacher, prompts: list[list[int]], other: Teacher, other_prompts: list[list[int]], cfg: Config, chat: Chat, *what
) -> float:
    """KL(model‖other) in nats per token, on the model's own samples, exact at every token."""
    generator, values = torch_generator(model.model.device, cfg.seed, *what), []
    at_once = 2 * cfg.batch if cfg.model else len(prompts)
    for i in range(0, len(prompts), at_once):
        part, other_part = prompts[i : i + at_once], other_prompts[i : i + at_once]
        with model.role() as sampler:
            ids, mask = sampler.generate(part, cfg.max_new_tokens, eos=chat.ends, generator=generator)
        h, h_other = model.states(part, ids, mask), other.states(other_part, ids, mask)                # (n, D) each
        rows = cfg.chunk or len(h)
        values += [reverse_kl(model.model.head(a), other.model.head(b)) for a, b in zip(h.split(rows), h_other.split(rows))]
    return torch.cat(values).mean().item()


def drift(base: Teacher, tuned: Teacher, examples: list[Example], cfg: Config, chat: Chat) -> float:
    """KL(base‖tuned) in nats per token, on the base's own samples to prior prompts in their contexts."""
    prompts = [chat.render(e.context, e.prompt) for e in examples]
    return kl_on_own_samples(base, prompts, tuned, prompts, cfg, chat, "drift")


def kl_to_teacher(student: Teacher, teacher: Teacher, examples: list[Example], cfg: Config, chat: Chat) -> float:
    """KL(student‖teacher) in nats per token, on the student's own samples: what is still to be learned from C."""
    prompts, with_context = ([chat.render(c and e.context, e.prompt) for e in examples] for c in (None, True))
    return kl_on_own_samples(student, prompts, teacher, with_context, cfg, chat, "held-out KL")


@torch.no_grad()
def perplexity(model: GPT, path: str, cfg: Config, chat: Chat) -> float:
    """exp of the mean −log p of the text's tokens, each paragraph on its own, from its second token on."""
    rows = [chat.encode(paragraph.strip())[: model.config.max_len] for paragraph in contexts.read_text(path).split("\n\n")]
    nll = []
    for row in (row for row in rows if len(row) > 1):
        states = model.hidden(torch.tensor([row], device=model.device))[0, :-1]                        # (T − 1, D)
        targets = torch.tensor(row[1:], device=model.device)
        for h, y in zip(states.split(cfg.chunk or 256), targets.split(cfg.chunk or 256)):
            nll.append(torch.nn.functional.cross_entropy(model.head(h).float(), y, reduction="none"))
    return torch.cat(nll).mean().exp().item()


def before_training(student: Teacher, teacher: Teacher, task: Task, cfg: Config) -> dict:
    """The student is still the base: with C it is the ceiling, without the floor; and what it can do besides."""
    with student.role() as model:
        result = {"teacher": evaluate(model, task.heldout, True, cfg, task), "before": evaluate(model, task.heldout, False, cfg, task)}
        result |= {"skills_before": skills(model, task, cfg)}
        if cfg.unrelated:
            result["perplexity_before"] = perplexity(model, cfg.unrelated, cfg, task.chat)
    if cfg.model:
        result["kl_before"] = kl_to_teacher(student, teacher, task.heldout, cfg, task.chat)
    return result


def skills(model: GPT, task: Task, cfg: Config) -> dict[str, float]:
    """Exact match on each suite of probes. Prompts from files have no right answer."""
    return {} if cfg.model else {name: evaluate(model, suite, True, cfg, task)["exact"] for name, suite in task.probes.items()}


def measure(base: Teacher, student: Teacher, teacher: Teacher, task: Task, cfg: Config, before: dict) -> dict:
    """What was learned, without context, and what became of everything else."""
    chat, everything = task.chat, [e for suite in task.probes.values() for e in suite]
    with student.role() as model:
        result = {"after": evaluate(model, task.heldout, False, cfg, task), "skills": skills(model, task, cfg)}
        if cfg.unrelated:
            result["perplexity_after"] = perplexity(model, cfg.unrelated, cfg, chat)
    if change := {name: after - before["skills_before"][name] for name, after in result["skills"].items()}:
        result |= {"prior_change": change.pop("verbs"), "steerability_change": statistics.fmean(change.values())}
    if everything:
        result["drift"] = drift(base, student, everything, cfg, chat)
    result["drift_new"] = drift(base, student, [replace(e, context=None) for e in task.heldout], cfg, chat)
    if cfg.model:
        result["kl_after"] = kl_to_teacher(student, teacher, task.heldout, cfg, chat)
    return result


def what_they_say(base: Teacher, student: Teacher, task: Task, cfg: Config) -> dict:
    """Answers to read: a few held-out prompts without context, some of the probes, and the teacher's."""
    chat, own = task.chat, task.heldout[: 4 if cfg.model else 2]
    shown, said = [replace(e, context=None) for e in own] + [e for suite in task.probes.values() for e in suite[:4]], []
    for role in (base, student):
        with role.role() as model:
            said.append(answers(model, [chat.render(e.context, e.prompt) for e in shown], cfg, chat))
    with base.role() as model:
        in_context = answers(model, [chat.render(e.context, e.prompt) for e in own], cfg, chat)
    return {
        "prompt_tokens_saved": statistics.fmean(len(chat.render(e.context, e.prompt)) - len(chat.render(None, e.prompt)) for e in task.heldout),
        "samples": [{"context": e.context, "prompt": e.prompt, "reference": e.answer, "before": before, "after": after}
                    for e, before, after in zip(shown, *said)],
        "teacher_said": in_context}


# ======================================================================================= 5. one run of one method
def make_batch(cfg: Config, task: Task, step: int, teacher: Teacher) -> Batch:
    """The task's prompts of this step, and their completions unless the student is to write them."""
    rng, device, chat = seeded(cfg.seed, task.kind, "task", step), teacher.model.device, task.chat
    examples = [task.draw(rng) for _ in range(cfg.batch - cfg.n_anchors)]
    batch = Batch([chat.render(None, e.prompt) for e in examples], [chat.render(e.context, e.prompt) for e in examples])
    if cfg.supervised or (cfg.method == "gkd" and rng.random() >= cfg.gkd_lambda):
        batch.completion, batch.mask = completions(chat, [e.expert for e in examples], device)
    elif cfg.method == "offline":
        with teacher.role() as model:
            batch.completion, batch.mask = model.generate(
                batch.teacher_prompts, cfg.max_new_tokens, temperature=cfg.temperature, eos=chat.ends,
                generator=torch_generator(device, cfg.seed, task.kind, "offline", step))
    return batch


def make_anchors(cfg: Config, task: Task, step: int, device: torch.device) -> Batch:
    """Prompts under other contexts or none, the same for student and teacher. Their answers are the student's own, replay from
    the model's own distribution; or with --replay those of the pretraining data or of another corpus."""
    rng, draw = seeded(cfg.seed, task.kind, "anchors", step), task.draw_proxy if cfg.replay == "proxy" else task.draw_anchor
    examples = [draw(rng) for _ in range(cfg.n_anchors)]
    prompts = [task.chat.render(e.context, e.prompt) for e in examples]
    return Batch(prompts, prompts, *(() if cfg.replay == "self" else completions(task.chat, [e.answer for e in examples], device)))


def make_objective(cfg: Config) -> Objective:
    if cfg.supervised:
        imitate = "weighted_cross_entropy" if cfg.method == "asft" else "cross_entropy"
        return {imitate: 1.0, "forward_kl": cfg.base_kl} if cfg.base_kl else imitate
    if cfg.divergence == "policy_gradient":
        return "policy_gradient"
    divergence = partial(jsd, beta=cfg.beta) if cfg.divergence == "jsd" else DIVERGENCES[cfg.divergence]
    return partial(top_k_divergence, k=cfg.top_k, divergence=divergence) if cfg.top_k else divergence


def sample_text(student: GPT, teacher: Teacher, examples: list[Example], cfg: Config, chat: Chat, step: int) -> str:
    """A few rollouts, with the student's and the teacher's probability of every token."""
    prompts, teacher_prompts = ([chat.render(c and e.context, e.prompt) for e in examples] for c in (None, True))
    generator = torch_generator(student.device, cfg.seed, "samples", step)
    ids, mask = student.generate(prompts, cfg.max_new_tokens, temperature=cfg.temperature, eos=chat.ends, generator=generator)
    with torch.no_grad():
        q = student.head(completion_states(student, prompts, ids, mask)).float().softmax(-1)           # (n, V)
        p = teacher.model.head(teacher.states(teacher_prompts, ids, mask)).float().softmax(-1)
    text, start = f"--- step {step}: a rollout, then its tokens with their probability under student→teacher\n", 0
    for example, row, m in zip(examples, ids, mask):
        tokens = row[m].tolist()
        views = [f"{chat.decode([t])!r} {q[i, t]:.2f}→{p[i, t]:.2f}" for i, t in enumerate(tokens, start)]
        text += f"C: {spoken(example.context)}\nx: {spoken(example.prompt)}\ny: {chat.decode(tokens)}\n   {'  '.join(views)}\n"
        start += len(tokens)
    return text


def spoken(turns: str | list) -> str:
    """Chat turns as text to read."""
    return turns if isinstance(turns, str) else "\n   ".join(f"{turn['role']}: {turn['content']}" for turn in turns)


# These do not change a run's result, or by rounding only.
NOT_IDENTITY = ("out", "bases", "resume", "seeds", "device", "save_every", "micro_batch", "chunk", "checkpointing", "export", "dry_run")


def run(cfg: Config, task: Task, student: GPT, fingerprint: str, dtype: torch.dtype, autocast: Callable) -> dict:
    """Compile one context into `student` by one method, with evaluation before and after. Writes out/<run>/."""
    device, label = student.device, f"{task.kind} / {cfg.method}, seed {cfg.seed}"
    folder = run_folder(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    samples, curve, identity = folder / "samples.txt", folder / "curve.jsonl", run_identity(cfg, fingerprint)
    if cfg.resume and (folder / "checkpoint.pt").exists():
        demand_same(folder / "config.json", json.loads((folder / "config.json").read_text()), identity)
    (folder / "result.json").unlink(missing_ok=True)
    write(folder / "config.json", json.dumps(identity, indent=1).encode())

    if cfg.lora:
        torch.manual_seed(cfg.seed)
        add_adapters(student, cfg.lora, cfg.lora_alpha or 2 * cfg.lora, cfg.targets)
    student.checkpointing = cfg.checkpointing
    frozen_dtype = DTYPES[cfg.frozen_dtype] if cfg.frozen_dtype != "fp32" else None
    teacher = Teacher(student, cfg.teacher, cfg.ema_rate, task.shared, frozen_dtype)
    base = teacher if cfg.teacher == "frozen" else Teacher(student, "frozen", dtype=frozen_dtype)
    tuned = Teacher(student, "live")                                   # the student in the same terms, to be measured

    # Pre-flight: the teacher is the ceiling. If it does not beat the student there is nothing to distil.
    with autocast() if cfg.model else nullcontext():
        before = before_training(tuned, teacher, task, cfg)
    ceiling, floor = before["teacher"].get("score"), before["before"].get("score")
    found = "no --score" if ceiling is None else f"held-out score with C (teacher) {ceiling:.2f}, without (student) {floor:.2f}"
    print(f"\n{label}: {found}" + (f"; KL(student‖teacher) {before['kl_before']:.3f} nats per token" if "kl_before" in before else ""))
    if ceiling is not None and ceiling <= floor:
        print("  The teacher does not beat the student: this context cannot teach this model anything. Going on, to show it.")

    objective = make_objective(cfg)
    common = dict(eos=task.chat.ends, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, reduction=cfg.reduction,
                  micro_batch=cfg.micro_batch or None, chunk=cfg.chunk or None, autocast=autocast)

    def step_fn(step: int, backward: Callable) -> dict:
        step_only = dict(generator=torch_generator(device, cfg.seed, task.kind, "rollout", step), backward=backward)
        batch, scorer, share = make_batch(cfg, task, step, teacher), teacher, cfg.n_anchors / cfg.batch
        if cfg.base_kl:                                                # SFT near the base: it scores the same prompts, without C
            batch.teacher_prompts, scorer = batch.prompts, base
        elif cfg.supervised and step % 10:                             # SFT alone needs no teacher, but for its log
            scorer = None
        log = cosd_step(student, scorer, batch, objective, skip=cfg.skip, weight=1 - share, **common, **step_only)
        if share:
            replayed = cfg.replay != "self"
            on_anchors = "cross_entropy" if replayed else "forward_kl" if cfg.supervised else objective
            anchored = cosd_step(student, None if replayed else base, make_anchors(cfg, task, step, device), on_anchors, weight=share,
                                 **common, **step_only)
            log |= {"loss": log["loss"] + anchored["loss"]} | ({} if replayed else {"anchor_kl": anchored["kl"]})
        return log

    def write_samples(step: int) -> None:
        done = samples.read_text() if samples.exists() and step else ""
        if f"--- step {step}:" not in done:                            # a resumed run may pass a step again
            with autocast():
                samples.write_text(done + sample_text(student, teacher, task.heldout[:3], cfg, task.chat, step))

    def on_step(step: int) -> None:
        nonlocal began
        paused = time.perf_counter()
        if (step + 1) % max(1, cfg.steps // 3) == 0:
            write_samples(step + 1)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            with autocast() if cfg.model else nullcontext():
                row = {"step": step + 1} | measure(base, tuned, teacher, task, cfg, before)
            kept = [line for line in curve.read_text().splitlines() if json.loads(line)["step"] <= step] if curve.exists() and step else []
            curve.write_text("".join(line + "\n" for line in [*kept, json.dumps(row)]))
        began += time.perf_counter() - paused                          # "seconds" are training alone

    if not (cfg.resume and (folder / "checkpoint.pt").exists()):
        write_samples(0)
        curve.unlink(missing_ok=True)
    began = time.perf_counter()
    optimize(cfg, student, step_fn, label=label, folder=folder, identity=identity, steps=cfg.steps, lr=cfg.lr,
             warmup=cfg.warmup, weight_decay=0.0, dtype=dtype, teacher=teacher, on_step=on_step)
    seconds = time.perf_counter() - began

    with autocast() if cfg.model else nullcontext():
        after = measure(base, tuned, teacher, task, cfg, before) | what_they_say(base, tuned, task, cfg)
    result = {"config": identity, "context": task.kind, "method": cfg.method, "seed": cfg.seed, "seconds": round(seconds, 1)}
    result |= before | after
    if cfg.eval_every:
        measured = [json.loads(line) for line in curve.read_text().splitlines()] if curve.exists() else []
        result["curve"] = [*measured, {"step": cfg.steps} | {k: v for k, v in after.items() if k in ("after", "skills") or isinstance(v, float)}]
    if cfg.model and cfg.export != "none":
        export(cfg, student, task, folder / "export")
    write(folder / "result.json", json.dumps(result, indent=1).encode())
    if cfg.model and cfg.export != "none":
        (folder / "checkpoint.pt").unlink()                            # the export has the weights; the moments are of no more use
    return result


def run_folder(cfg: Config) -> Path:
    return Path(cfg.out) / f"{cfg.context}-{cfg.method}-seed{cfg.seed}"


def run_identity(cfg: Config, fingerprint: str) -> dict:
    """What a checkpoint or a result belongs to: the settings, the base, and what the user's files say."""
    paths = [cfg.prompts, cfg.heldout, cfg.context_file, cfg.template, cfg.anchor_file, cfg.unrelated, cfg.score.rpartition(":")[0]]
    files = [hashlib.sha256(Path(path).read_bytes()).hexdigest()[:10] for path in paths if path and Path(path).is_file()]
    return {k: v for k, v in asdict(cfg).items() if k not in NOT_IDENTITY} | {"base": fingerprint, "files": files}


def finished(cfg: Config, fingerprint: str) -> dict | None:
    """With --resume: the result of a run that is complete."""
    path = run_folder(cfg) / "result.json"
    if not cfg.resume or not path.exists():
        return None
    result = json.loads(path.read_text())                              # written whole or not at all
    demand_same(path, result.get("config", {}), run_identity(cfg, fingerprint))
    wanted = {"merged": "model.safetensors", "adapters": "adapter_model.safetensors"}.get(cfg.export)
    if cfg.model and wanted and not (path.parent / "export" / wanted).exists():
        raise BadInput(f"{path} is complete, but there is no {path.parent / 'export' / wanted}: run without --resume")
    print(f"{cfg.context} / {cfg.method}, seed {cfg.seed}: complete, taken from {path}")
    return result


# ============================================================================================== 6. your own model
def export(cfg: Config, student: GPT, task: Task, folder: Path) -> None:
    """What transformers and vLLM load: the model with its adapters folded in, or the adapters alone for PEFT."""
    from transformers import AutoTokenizer

    shutil.rmtree(folder, ignore_errors=True)                          # nothing of an earlier export may stay beside this one
    if cfg.export == "adapters":
        student.save_adapters(folder, cfg.model)
    else:
        student.save_pretrained(folder, AutoTokenizer.from_pretrained(cfg.model), task.chat.ends)


def plan(cfg: Config, c: GPTConfig, dtype: torch.dtype, prompt: int, teacher_prompt: int, common: int = 0) -> dict[str, float]:
    """What a step will hold, in bytes, from shapes alone. `prompt`, `teacher_prompt`: tokens, longest, without what is
    read once for all; that is `common` tokens of the student's prompts.

    Activations are what autograd keeps of the student's pass. At the peak they stand beside weights, teacher and moments,
    either with the logits (start of the backward pass) or replaced by the gradients (its end).
    """
    D, E, H, K, F, N, V = c.d_model, c.head_dim, c.n_head, c.n_kv_head, c.d_ff, c.n_layer, c.vocab_size
    shapes = {"q": D + H * E, "k": D + K * E, "v": D + K * E, "out": H * E + D, "up": D + F, "down": F + D,
              "gate": D + F if c.mlp == "swiglu" else 0}
    adapters = cfg.lora * N * sum(shapes[name] for name in cfg.targets)
    n, mixed, frozen = c.n_params(), dtype != torch.float32, DTYPES[cfg.frozen_dtype].itemsize
    trainable = adapters or n
    rows = cfg.micro_batch or cfg.batch
    tokens, scored = common + rows * (prompt + cfg.max_new_tokens), rows * cfg.max_new_tokens
    low = 2 if mixed else 4
    # one block, numbers per token: fp32 norms and residuals; inputs of the matrix products; q, k, v, attention; the MLP
    norms, inputs = 4 * 4 * D, low * D * (5 if mixed else 2)
    attention, mlp = low * (3 * H * E + 2 * K * E), low * F * (4 if c.mlp == "swiglu" else 2)
    block = tokens * (norms + inputs + attention + mlp)
    parts = {
        "weights": n * (frozen if adapters else 4) + 4 * adapters,
        "teacher": {"frozen": 0 if adapters else n * frozen, "ema": n * 4, "live": 0}[cfg.teacher],
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,
        "activations": N * tokens * 4 * D + block if cfg.checkpointing else N * block,
        "logits": 4 * V * 6 * min(cfg.chunk or scored, scored) + (0 if adapters else 4 * V * D),
        "casts": 2 * n if mixed and not (adapters and frozen == 2) else 0,         # autocast's copies of the fp32 weights
        "cache": 2 * low * N * K * E * cfg.batch * (teacher_prompt + cfg.max_new_tokens),
    }
    fixed = parts["weights"] + parts["teacher"] + parts["optimizer"]
    accumulated = parts["gradients"] if rows < cfg.batch else 0
    pass_ = parts["casts"] + max(parts["activations"] + parts["logits"] + accumulated, parts["gradients"])
    return parts | {"peak": fixed + max(pass_, parts["cache"])} | {
        "parameters": n + adapters, "trainable": trainable, "tokens a step": tokens * cfg.batch // rows}


def show_plan(cfg: Config, c: GPTConfig, dtype: torch.dtype, task: Task) -> str:
    """Counts the tokens of held-out prompts and of some 500 to train on, and puts the plan into words."""
    examples = task.heldout + [task.draw(seeded("plan", i)) for i in range(500)]
    students, teachers = ([task.chat.render(ctx and e.context, e.prompt) for e in examples] for ctx in (None, True))
    if cfg.supervised or cfg.method == "gkd":
        cfg = replace(cfg, max_new_tokens=max(len(task.chat.encode(e.expert)) + 1 for e in examples))
    prompt, teacher_prompt, shared = max(map(len, students)), max(map(len, teachers)), len(task.shared)
    common = len(os.path.commonprefix(students))
    p = plan(cfg, c, dtype, prompt - common, teacher_prompt - shared, common)
    sizes = ", ".join(f"{name} {p[name] / 1e9:.2f}" for name in
                      ("weights", "teacher", "gradients", "optimizer", "activations", "logits", "casts", "cache"))
    return (f"{p['parameters'] / 1e6:.1f} M parameters, {p['trainable'] / 1e6:.2f} M of them trained; {cfg.steps} steps of {cfg.batch} prompts\n"
            f"tokens: prompt {prompt} ({common} common to all), with context {teacher_prompt} ({shared} common to all), "
            f"answer <= {cfg.max_new_tokens}; what is common is read once; student pass <= {p['tokens a step']} a step\n"
            f"memory, estimated, GB: {sizes}; peak {p['peak'] / 1e9:.2f} and the program itself")


def own_model(cfg: Config, device: torch.device, dtype: torch.dtype) -> tuple[Task, Callable[[], GPT], str]:
    """-> (the task from the user's files, a loader of the weights, the plan). Whatever is wrong with the files shows up first."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        config = read_config(cfg.model)
        if cfg.export == "adapters" and config.positions == "learned":
            raise BadInput("--export adapters: GPT-2 holds q, k and v in one matrix, our adapters do not; use --export merged")
        if cfg.lora and config.mlp != "swiglu" and cfg.targets == ["gate"]:
            raise BadInput("--lora_targets gate: this model's MLP has no gate")
        chat = contexts.open_chat(cfg.model, config.vocab_size, gpt2=config.positions == "learned")
        task = contexts.file_task(cfg, chat, config.max_len, cfg.eval_size)
        if cfg.unrelated and all(len(chat.encode(text)) < 2 for text in contexts.read_text(cfg.unrelated).split("\n\n")):
            raise BadInput(f"{cfg.unrelated}: no paragraph has two tokens, so there is no perplexity")
    except (ValueError, OSError, StrictDataclassError) as error:
        if isinstance(error, BadInput) or getattr(error, "filename", None):
            raise
        raise BadInput(f"--model {cfg.model}: {str(error).strip().splitlines()[0]}") from None

    def load_model() -> GPT:
        try:
            return GPT.from_pretrained(cfg.model, DTYPES[cfg.frozen_dtype] if cfg.lora else torch.float32).to(device)
        except (ValueError, OSError, SafetensorError) as error:
            raise BadInput(f"--model {cfg.model}: {str(error).strip().splitlines()[0]}") from None

    return task, load_model, show_plan(cfg, config, dtype, task)


# ================================================================================================ 7. the report
def value(*path: str) -> Callable[[dict], float]:
    """A reader of result[path[0]][path[1]]...; NaN where a run has no such number."""
    def read(result: dict) -> float:
        for key in path:
            result = result.get(key, {})
        return result if isinstance(result, (int, float)) else math.nan
    return read


COLUMNS: dict[str, tuple[Callable[[dict], float], int]] = {            # title: (value of a result, digits)
    "teacher": (value("teacher", "score"), 2),
    "before": (value("before", "score"), 2),
    "after": (value("after", "score"), 2),
    "exact": (value("after", "exact"), 2),
    "KL before": (value("kl_before"), 3),
    "KL after": (value("kl_after"), 3),
    "prior": (value("prior_change"), 3),
    "steerability": (value("steerability_change"), 3),
    "drift": (value("drift"), 4),
    "perplexity before": (value("perplexity_before"), 2),
    "perplexity after": (value("perplexity_after"), 2),
    "over-refusal": (value("after", "over_refusal"), 2),
    "tokens saved": (value("prompt_tokens_saved"), 0),
    "seconds": (value("seconds"), 0),
}
LEGEND = """\
Shares of held-out prompts answered rightly, greedy. teacher: the base with C in its prompt; before, after: without C.
before and after count content, exact also the manner. prior: change of exact match on the known verbs; steerability: its
mean change over four kinds of other contexts. drift: KL(base‖tuned) on all these prompts, nats per token. over-refusal:
allowed items refused. KL: KL(student‖teacher) on the student's own held-out samples, nats per token. perplexity: on the
unrelated text. tokens saved: |C| per prompt. seconds: training alone. ±: standard deviation over seeds."""


def spread(values: list[float], digits: int) -> str:
    if math.isnan(values[0]):
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def report(results: list[dict], out: Path) -> str:
    """results.json, results.md and figure.png from the runs; returns what results.md says."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result["context"], result["method"]), []).append(result)
    columns = {title: c for title, c in COLUMNS.items() if not all(math.isnan(c[0](r)) for r in results)}
    table = [["context", "method", *columns]]
    for key, runs in groups.items():
        table.append([*key, *(spread([read(r) for r in runs], digits) for read, digits in columns.values())])
    said = [["context", "prompt", "reference", "before", *dict.fromkeys(method for _, method in groups), "teacher, with C"]]
    for context in dict.fromkeys(context for context, _ in groups):
        first = [runs[0] for (name, _), runs in groups.items() if name == context]
        samples, in_context = [r["samples"] for r in first], first[0]["teacher_said"]
        changed = lambda i: -sum(s[i]["after"] != s[i]["before"] for s in samples)
        own = len(in_context)
        for i in [*range(own), *sorted(range(own, len(samples[0])), key=changed)[:2]]:
            s = samples[0][i]
            prompt = f"({s['context']}) {s['prompt']}" if isinstance(s["context"], str) else spoken(s["prompt"])
            cells = [context, prompt, s["reference"], s["before"], *(s[i]["after"] for s in samples), in_context[i] if i < own else ""]
            said.append([re.sub(r"\s*\n\s*", " ⏎ ", cell).replace("|", "\\|") for cell in cells])
    markdown = lambda rows: "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
    text = (f"{markdown(table)}\n\n{LEGEND}\n\nAnswers of the first seed: held-out prompts of each task, without context, "
            f"and the two probes of prior skills that changed the most.\n\n{markdown(said)}\n")
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "results.md").write_text(text)
    draw_figure(groups, out / "figure.png")
    return text


def draw_figure(groups: dict[tuple[str, str], list[dict]], path: Path) -> None:
    """What was learned; what was forgotten, at home and under other contexts. Error bars: standard deviation over seeds."""
    try:
        from matplotlib.figure import Figure                           # not pyplot: a notebook's own pictures stay as they are
    except ImportError:
        print("No figure: matplotlib is not installed (it comes with the extra [notebooks]).")
        return
    names, methods = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    letters = dict(zip(TASKS, "ABCD"))
    colors = dict(zip(METHODS, ["#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"]))          # Okabe-Ito: colour-blind safe
    around = lambda column, before, label: [("before", "#BBBBBB", methods[0], before), *bars(column)] + (
        [(label, "#555555", methods[0], "teacher")] if label else [])
    bars = lambda column: [(method.upper(), colors[method], method, column) for method in methods]
    panels = [("Learned: held-out score, no context given", "share right", around("after", "before", "teacher, with C")),
              ("Forgotten: known verbs", "change of exact match", bars("prior")),
              ("Forgotten: other contexts", "change of exact match", bars("steerability")),
              ("Left to learn: KL to the teacher", "nats per token", around("KL after", "KL before", "")),
              ("Forgotten: unrelated text", "perplexity", around("perplexity after", "perplexity before", ""))]
    read = lambda name, method, column: [COLUMNS[column][0](r) for r in groups.get((name, method), [])] or [math.nan]
    panels = [panel for panel in panels if not all(math.isnan(read(name, *bar[2:])[0]) for name in names for bar in panel[2])]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), width_ratios=[3, *[2] * (len(panels) - 1)], squeeze=False)
    for axis, (title, ylabel, shown) in zip(axes[0], panels):
        width = 0.8 / len(shown)
        for i, (label, color, method, column) in enumerate(shown):
            values = [read(name, method, column) for name in names]
            error = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
            at = [x + (i - (len(shown) - 1) / 2) * width for x in range(len(names))]
            axis.bar(at, list(map(statistics.fmean, values)), width, label=label, color=color,
                     yerr=error if any(error) else None, capsize=2)
        axis.set_xticks(range(len(names)), [f"{letters[name]}\n{name}" for name in names], fontsize=7)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(title=title, ylabel=ylabel)
        if ylabel == "share right":
            axis.set(ylim=(0, 1.3), yticks=[0, 0.25, 0.5, 0.75, 1])
        elif ylabel.startswith("change"):
            axis.set_ylim(min(-0.1, *(v for name in names for m in methods for c in ("prior", "steerability") for v in read(name, m, c))) * 1.1, 0.05)
    axes[0, 0].legend(fontsize=8, ncols=2, frameon=False, loc="upper center")
    figure.savefig(path, dpi=120)


# ================================================================================================= 8. the whole
def train(cfg: Config) -> dict:
    """Everything that `python train.py` does, for notebooks and tests -> {"results": [...], "report": Markdown}."""
    out, (device, dtype, autocast) = Path(cfg.out), resolve_device(cfg)
    out.mkdir(parents=True, exist_ok=True)
    results, planned = [], None
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        base = None
        for context in TASKS if cfg.context == "all" else [cfg.context]:
            for method in [cfg.method] if cfg.method != "all" else ["cosd"] if cfg.model else ["cosd", "sft"]:
                run_cfg = replace(cfg, seed=seed, context=context).for_method(method)
                if cfg.model:
                    task, load_model, planned = own_model(run_cfg, device, dtype)
                    print(planned)
                    if cfg.dry_run:
                        return {"results": [], "report": planned}
                    student = load_model()
                    fingerprint = hashlib.sha256(b"".join(p.flatten()[:8].float().numpy(force=True) for p in student.parameters())).hexdigest()[:10]
                else:
                    base, fingerprint = (base, fingerprint) if base else get_base(run_cfg, device, dtype, autocast)
                    task = contexts.world_task(context, seeded(seed, context, "heldout"), seeded(seed, context, "probes"), cfg.eval_size)
                    student = copy.deepcopy(base)
                results.append(finished(run_cfg, fingerprint) or run(run_cfg, task, student, fingerprint, dtype, autocast))
    text = report(results, out)
    print(f"\n{text}\nWritten to {out}/: results.md, results.json, figure.png; "
          "and for each run config.json, metrics.jsonl, samples.txt, result.json"
          + (", export/" if cfg.model and cfg.export != "none" else "" if cfg.model else ", checkpoint.pt"))
    return {"results": results, "report": text}


def main(argv: list[str] | None = None) -> int:
    try:
        train(parse(argv))
        return 0
    except KeyboardInterrupt as stopped:
        print(f"\n{str(stopped) or 'stopped; go on with the same command and --resume'}", file=sys.stderr)
        return 130
    except Diverged as error:
        print(f"\ntrain.py: {error}", file=sys.stderr)
        return 1
    except (BadInput, OSError) as error:
        print(f"\ntrain.py: error: {error}", file=sys.stderr)
        return 2
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        print("\ntrain.py: error: out of memory: lower --micro-batch, set --chunk 32 and --checkpointing (the result stays the same); "
              "or --lora 16, --frozen-dtype bf16, a lower --batch or --max-new-tokens; --dry-run shows what takes how much", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
