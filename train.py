"""Train: pretrain the small base, then compile each kind of context into its weights, beside SFT on the same task.

    python train.py                                            the whole story: 4 kinds of context x (COSD, SFT)
    python train.py --context instructions --divergence jsd    one kind
    python train.py --resume                                   go on after Ctrl-C or kill

A method is two choices: who writes the completion, and what is minimised on its tokens.

    method    who writes y               objective per token
    sft       the expert                 cross-entropy
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
import io
import json
import math
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from tqdm import tqdm

import contexts
from contexts import END, TASKS, Example, decode, encode, render
from cosd import DIVERGENCES, Batch, Teacher, completion_states, cosd_step, forward_kl, jsd, top_k_divergence
from model import GPT, GPTConfig, pad_right

METHODS = ("cosd", "sft", "offline", "gkd")


class BadInput(ValueError):
    """Something the user can mend: one line, exit code 2."""


class Diverged(Exception):
    """The loss is no longer a number: one line, exit code 1."""


# ================================================================================================ 1. config
@dataclass(frozen=True)
class Config:
    # what to learn, and how
    context: Literal["all", "demonstrations", "specification", "instructions", "privileged"] = "all"
    method: Literal["all", "cosd", "sft", "offline", "gkd"] = "all"            # all: cosd and sft
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "policy_gradient"] = "forward_kl"
    beta: float = 0.5                      # of jsd
    top_k: int = 0                         # 0: the full vocabulary; else the student's top k and a tail bucket
    teacher: Literal["frozen", "ema", "live"] = "frozen"
    ema_rate: float = 0.02
    gkd_lambda: float = 0.5                # share of on-policy steps under gkd
    anchors: float | None = None           # share of the batch under other contexts; default 0.5, for sft 0
    steps: int = 250
    batch: int = 64
    micro_batch: int = 0                   # 0: the whole batch at once; the result does not depend on it
    lr: float | None = None                # default 5e-4, for sft 1e-4
    warmup: int = 10
    temperature: float = 1.0               # of the rollouts
    max_new_tokens: int = 24
    reduction: Literal["token", "sequence"] = "token"
    skip: int = 0                          # first completion tokens left out of the loss
    chunk: int = 0                         # rows of logits held at once; 0: all
    # the base
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
    save_every: int = 100
    out: str = "out"
    bases: str | None = None               # where pretrained bases are kept; default: --out
    resume: bool = False

    def __post_init__(self):
        hints = get_type_hints(Config)
        lowest = dict.fromkeys(("top_k", "micro_batch", "skip", "chunk", "warmup", "seed"), 0)
        for name, value in asdict(self).items():
            if get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
                raise BadInput(f"--{name} {value!r} is not a choice; choose from {', '.join(get_args(hints[name]))}")
            if hints[name] is int and value < lowest.get(name, 1):
                raise BadInput(f"--{name} {value} must be at least {lowest.get(name, 1)}")
        for name, high in dict(gkd_lambda=1, ema_rate=1, temperature=100, lr=10, pretrain_lr=10, anchors=1).items():
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= high:
                raise BadInput(f"--{name} {getattr(self, name)} must be between 0 and {high}")
        if self.anchors is not None and round(self.anchors * self.batch) == self.batch:
            raise BadInput(f"--anchors {self.anchors} leaves the task no prompt in a batch of {self.batch}")
        if not 0 < self.beta < 1:
            raise BadInput(f"--beta {self.beta} must lie strictly between 0 and 1; "
                           "for the ends use --divergence forward_kl or reverse_kl")
        if 0 < self.temperature < 0.01:
            raise BadInput(f"--temperature {self.temperature} is too close to 0 to sample; 0 is greedy")
        if self.max_new_tokens > 256 or self.skip >= self.max_new_tokens:
            raise BadInput(f"--max_new_tokens {self.max_new_tokens} must be at most 256, and --skip {self.skip} below it")
        if self.d_model % self.n_head or self.d_model // self.n_head % 2:
            raise BadInput(f"--d_model {self.d_model} / --n_head {self.n_head} must be an even whole number, the head width")
        if self.divergence == "policy_gradient" and (self.top_k or self.chunk):
            raise BadInput("--divergence policy_gradient looks at sampled tokens only: --top_k and --chunk do not apply")
        if self.divergence == "policy_gradient" and (self.method in ("offline", "gkd") or self.temperature != 1):
            raise BadInput("--divergence policy_gradient needs the student's own samples: --method cosd and --temperature 1")

    def for_method(self, method: str) -> Config:
        """Fill in the defaults that differ between methods."""
        lr, anchors = (1e-4, 0.0) if method == "sft" else (5e-4, 0.5)
        return replace(self, method=method, lr=lr if self.lr is None else self.lr,
                       anchors=anchors if self.anchors is None else self.anchors)


    @property
    def n_anchors(self) -> int:
        return round(self.anchors * self.batch)


PRESETS = {
    "default": {},
    "smoke": dict(pretrain_steps=40, pretrain_batch=32, steps=4, batch=8, n_layer=2, d_model=32, eval_size=8, save_every=20),
}


def parse(argv: list[str] | None) -> Config:
    """The command line is the dataclass: one flag a field, `-` or `_`, no abbreviations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in fields(Config):
        kind, about = get_type_hints(Config)[field.name], dict(default=argparse.SUPPRESS, help=f"default: {field.default}")
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
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choice, torch.float32)
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
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


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

    Learning rate: linear warm-up, constant, linear decay to zero over the second half. Gradients are clipped at norm 1.
    fp16 needs a scaler, which skips a step whose gradient overflows and halves its scale; bf16 and fp32 do not.
    """
    scaler = torch.amp.GradScaler(student.device.type, enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    checkpoint, metrics, start = folder / "checkpoint.pt", folder / "metrics.jsonl", 0
    ema = teacher.model if teacher and teacher.kind == "ema" else None
    if cfg.resume and checkpoint.exists():
        state = load(checkpoint, identity)
        start = state["step"]
        student.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if ema:
            ema.load_state_dict(state["ema"])
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
                rate = lr * min(1.0, (step + 1) / (warmup + 1), 2 * (1 - step / steps))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                student.train()
                log = step_fn(step, lambda loss: scaler.scale(loss).backward())
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).item()
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
                    save(checkpoint, {"identity": identity, "step": step + 1, "model": student.state_dict(),
                                      "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                                      "ema": ema.state_dict() if ema else None})
                if stop:
                    raise KeyboardInterrupt(f"stopped after step {step + 1} of {steps} ({label}), saved in {checkpoint}; "
                                            "go on with the same command and --resume")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ================================================================================================== 3. the base
def completions(texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Written answers with their end marker as (ids, mask), both (B, N): the form in which `generate` returns rollouts."""
    rows = [encode(text) + [END] for text in texts]
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
        batch = Batch(prompts, prompts, *completions([e.answer for e in examples], device))
        return cosd_step(base, None, batch, "cross_entropy", eos={END}, max_new_tokens=1, autocast=autocast, backward=backward)

    optimize(replace(cfg, resume=True), base, step_fn, label=f"base, seed {cfg.seed}", folder=folder, identity=identity,
             steps=cfg.pretrain_steps, lr=cfg.pretrain_lr, warmup=50, weight_decay=0.1, dtype=dtype)
    return base, fingerprint


# ================================================================================================ 4. evaluation
def answers(model: GPT, prompts: list[list[int]], cfg: Config) -> list[str]:
    """Greedy answers as text, without the end marker; an answer that never ended shows a trailing …"""
    ids, mask = model.generate(prompts, cfg.max_new_tokens, temperature=0, eos={END})
    rows = [row[m].tolist() for row, m in zip(ids, mask)]
    return [decode(row[:-1]) if row[-1] == END else decode(row) + " …" for row in rows]


def evaluate(model: GPT, examples: list[Example], with_context: bool, cfg: Config) -> dict[str, float]:
    """Mean of each of `contexts.grade`'s grades over the examples that have it."""
    texts = answers(model, [render(e.context if with_context else None, e.prompt) for e in examples], cfg)
    grades = [contexts.grade(e, text) for e, text in zip(examples, texts)]
    return {key: statistics.fmean(g[key] for g in grades if key in g) for key in {k: 0 for g in grades for k in g}}


@torch.no_grad()
def drift(base: GPT, tuned: GPT, examples: list[Example], cfg: Config) -> float:
    """KL(base‖tuned) in nats per token, on the base's own samples to prior prompts in their contexts."""
    prompts = [render(e.context, e.prompt) for e in examples]
    generator = torch_generator(base.device, cfg.seed, "drift")
    ids, mask = base.generate(prompts, cfg.max_new_tokens, eos={END}, generator=generator)
    logits = [model.head(completion_states(model, prompts, ids, mask)) for model in (tuned, base)]     # (n, V) each
    return forward_kl(*logits).mean().item()


def measure(base: GPT, tuned: GPT, heldout: list[Example], probes: dict[str, list[Example]], cfg: Config) -> dict:
    """After training: what was learned, without context, and what became of everything else."""
    prior = {name: [evaluate(model, suite, True, cfg)["exact"] for model in (base, tuned)] for name, suite in probes.items()}
    change = {name: after - before for name, (before, after) in prior.items()}
    shown = [replace(e, context=None) for e in heldout[:2]] + [e for suite in probes.values() for e in suite[:4]]
    said = [answers(model, [render(e.context, e.prompt) for e in shown], cfg) for model in (base, tuned)]
    return {
        "after": evaluate(tuned, heldout, False, cfg), "prior": prior,
        "prior_change": change.pop("verbs"), "steerability_change": statistics.fmean(change.values()),
        "drift": drift(base, tuned, [e for suite in probes.values() for e in suite], cfg),
        "prompt_tokens_saved": statistics.fmean(len(render(e.context, "")) - len(render(None, "")) for e in heldout),
        "samples": [{"context": e.context, "prompt": e.prompt, "reference": e.answer, "before": before, "after": after}
                    for e, before, after in zip(shown, *said)],
    }


# ======================================================================================= 5. one run of one method
def make_batch(cfg: Config, context: str, step: int, teacher: Teacher) -> Batch:
    """The task's prompts of this step, and their completions unless the student is to write them."""
    rng, device = seeded(cfg.seed, context, "task", step), teacher.model.device
    examples = [TASKS[context](rng) for _ in range(cfg.batch - cfg.n_anchors)]
    batch = Batch([render(None, e.prompt) for e in examples], [render(e.context, e.prompt) for e in examples])
    if cfg.method == "sft" or (cfg.method == "gkd" and rng.random() >= cfg.gkd_lambda):
        batch.completion, batch.mask = completions([e.expert for e in examples], device)
    elif cfg.method == "offline":
        batch.completion, batch.mask = teacher.model.generate(
            batch.teacher_prompts, cfg.max_new_tokens, temperature=cfg.temperature, eos={END},
            generator=torch_generator(device, cfg.seed, context, "offline", step))
    return batch


def make_anchors(cfg: Config, context: str, step: int) -> Batch:
    """Prompts under other contexts or none, the same for student and teacher: replay from the model's own distribution."""
    rng = seeded(cfg.seed, context, "anchors", step)
    examples = [contexts.draw_anchor(rng, context) for _ in range(cfg.n_anchors)]
    prompts = [render(e.context, e.prompt) for e in examples]
    return Batch(prompts, prompts)


def make_objective(cfg: Config) -> str | Callable:
    if cfg.method == "sft":
        return "cross_entropy"
    if cfg.divergence == "policy_gradient":
        return "policy_gradient"
    divergence = partial(jsd, beta=cfg.beta) if cfg.divergence == "jsd" else DIVERGENCES[cfg.divergence]
    return partial(top_k_divergence, k=cfg.top_k, divergence=divergence) if cfg.top_k else divergence


def sample_text(student: GPT, teacher: Teacher, examples: list[Example], cfg: Config, step: int) -> str:
    """A few rollouts, with the student's and the teacher's probability of every token."""
    prompts, teacher_prompts = [render(None, e.prompt) for e in examples], [render(e.context, e.prompt) for e in examples]
    generator = torch_generator(student.device, cfg.seed, "samples", step)
    ids, mask = student.generate(prompts, cfg.max_new_tokens, temperature=cfg.temperature, eos={END}, generator=generator)
    with torch.no_grad():
        q = student.head(completion_states(student, prompts, ids, mask)).float().softmax(-1)           # (n, V)
        p = teacher.model.head(teacher.states(teacher_prompts, ids, mask)).float().softmax(-1)
    text, start = f"--- step {step}: a rollout, then its tokens with their probability under student→teacher\n", 0
    for example, row, m in zip(examples, ids, mask):
        tokens = row[m].tolist()
        views = [f"{decode([t])!r} {q[i, t]:.2f}→{p[i, t]:.2f}" for i, t in enumerate(tokens, start)]
        text += f"C: {example.context}\nx: {example.prompt}\ny: {decode(tokens)}\n   {'  '.join(views)}\n"
        start += len(tokens)
    return text


# These do not change a run's result, or by rounding only.
NOT_IDENTITY = ("out", "bases", "resume", "seeds", "device", "save_every", "micro_batch", "chunk")


def run(cfg: Config, context: str, method: str, base: GPT, fingerprint: str, dtype: torch.dtype, autocast: Callable) -> dict:
    """Compile one context into the weights by one method, with evaluation before and after. Writes out/<run>/."""
    cfg, device, label = replace(cfg.for_method(method), context=context), base.device, f"{context} / {method}, seed {cfg.seed}"
    folder = Path(cfg.out) / f"{context}-{method}-seed{cfg.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    result_file, samples = folder / "result.json", folder / "samples.txt"
    identity = {k: v for k, v in asdict(cfg).items() if k not in NOT_IDENTITY} | {"base": fingerprint}
    if cfg.resume and result_file.exists():
        result = json.loads(result_file.read_text())                   # written whole or not at all
        demand_same(result_file, result.get("config", {}), identity)
        print(f"{label}: complete, taken from {result_file}")
        return result
    result_file.unlink(missing_ok=True)
    write(folder / "config.json", json.dumps(identity, indent=1).encode())

    student = copy.deepcopy(base)
    rng = seeded(cfg.seed, context, "heldout")
    heldout = [TASKS[context](rng, heldout=True) for _ in range(cfg.eval_size)]
    probes = contexts.probes(seeded(cfg.seed, context, "probes"), context, cfg.eval_size)
    one_context = context in ("specification", "instructions")         # the same C for all prompts: it is read once
    shared = render(heldout[0].context, "")[:-1] if one_context else ()            # [SYSTEM, C, USER]
    teacher = Teacher(student, cfg.teacher, cfg.ema_rate, shared)
    anchor_teacher = teacher if cfg.teacher == "frozen" else Teacher(base, "frozen")

    # Pre-flight: the teacher is the ceiling. If it does not beat the student there is nothing to distil.
    ceiling, before = evaluate(base, heldout, True, cfg), evaluate(base, heldout, False, cfg)
    print(f"\n{label}: held-out score with C (teacher) {ceiling['score']:.2f}, without (student) {before['score']:.2f}")
    if ceiling["score"] <= before["score"]:
        print("  The teacher does not beat the student: this context cannot teach this model anything. Going on, to show it.")

    objective = make_objective(cfg)
    common = dict(eos={END}, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, reduction=cfg.reduction,
                  micro_batch=cfg.micro_batch or None, chunk=cfg.chunk or None, autocast=autocast)

    def step_fn(step: int, backward: Callable) -> dict:
        step_only = dict(generator=torch_generator(device, cfg.seed, context, "rollout", step), backward=backward)
        scorer = teacher if method != "sft" or step % 10 == 0 else None            # SFT needs no teacher, but for its log
        share = cfg.n_anchors / cfg.batch
        log = cosd_step(student, scorer, make_batch(cfg, context, step, teacher), objective, skip=cfg.skip, weight=1 - share,
                        **common, **step_only)
        if share:
            on_anchors = "forward_kl" if method == "sft" else objective
            anchored = cosd_step(student, anchor_teacher, make_anchors(cfg, context, step), on_anchors, weight=share,
                                 **common, **step_only)
            log |= {"loss": log["loss"] + anchored["loss"], "anchor_kl": anchored["kl"]}
        return log

    def write_samples(step: int) -> None:
        done = samples.read_text() if samples.exists() and step else ""
        if f"--- step {step}:" not in done:                            # a resumed run may pass a step again
            with autocast():
                samples.write_text(done + sample_text(student, teacher, heldout[:3], cfg, step))

    def on_step(step: int) -> None:
        if (step + 1) % max(1, cfg.steps // 3) == 0:
            write_samples(step + 1)

    if not (cfg.resume and (folder / "checkpoint.pt").exists()):
        write_samples(0)
    began = time.perf_counter()
    optimize(cfg, student, step_fn, label=label, folder=folder, identity=identity, steps=cfg.steps, lr=cfg.lr,
             warmup=cfg.warmup, weight_decay=0.0, dtype=dtype, teacher=teacher, on_step=on_step)
    seconds = time.perf_counter() - began

    result = {"config": identity, "context": context, "method": method, "seed": cfg.seed, "seconds": round(seconds, 1),
              "teacher": ceiling, "before": before} | measure(base, student, heldout, probes, cfg)
    write(result_file, json.dumps(result, indent=1).encode())
    return result


# ================================================================================================ 6. the report
COLUMNS: dict[str, tuple[Callable[[dict], float], int]] = {            # title: (value of a result, digits)
    "teacher": (lambda r: r["teacher"]["score"], 2),
    "before": (lambda r: r["before"]["score"], 2),
    "after": (lambda r: r["after"]["score"], 2),
    "exact": (lambda r: r["after"]["exact"], 2),
    "prior": (lambda r: r["prior_change"], 3),
    "steerability": (lambda r: r["steerability_change"], 3),
    "drift": (lambda r: r["drift"], 4),
    "over-refusal": (lambda r: r["after"].get("over_refusal", math.nan), 2),
    "tokens saved": (lambda r: r["prompt_tokens_saved"], 0),
    "seconds": (lambda r: r["seconds"], 0),
}
LEGEND = """\
Shares of held-out prompts answered rightly, greedy. teacher: the base with C in its prompt; before, after: without C.
before and after count content, exact also the manner. prior: change of exact match on the known verbs; steerability: its
mean change over four kinds of other contexts. drift: KL(base‖tuned) on all these prompts, nats per token. over-refusal:
allowed items refused. tokens saved: |C| per prompt. seconds: training alone. ±: standard deviation over seeds."""


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
    table = [["context", "method", *COLUMNS]]
    for key, runs in groups.items():
        table.append([*key, *(spread([value(r) for r in runs], digits) for value, digits in COLUMNS.values())])
    said = [["context", "prompt", "reference", "before", *dict.fromkeys(method for _, method in groups)]]
    for context in dict.fromkeys(context for context, _ in groups):
        samples = [runs[0]["samples"] for (name, _), runs in groups.items() if name == context]
        changed = lambda i: -sum(s[i]["after"] != s[i]["before"] for s in samples)
        for i in [0, 1, *sorted(range(2, len(samples[0])), key=changed)[:2]]:
            s = samples[0][i]
            prompt = f"({s['context']}) {s['prompt']}" if s["context"] else s["prompt"]
            said.append([context, prompt, s["reference"], s["before"], *(s[i]["after"] for s in samples)])
    markdown = lambda rows: "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
    text = (f"{markdown(table)}\n\n{LEGEND}\n\nAnswers of the first seed: two held-out prompts of each task, without context, "
            f"and the two probes of prior skills that changed the most.\n\n{markdown(said)}\n")
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "results.md").write_text(text)
    draw_figure(groups, out / "figure.png")
    return text


def draw_figure(groups: dict[tuple[str, str], list[dict]], path: Path) -> None:
    """What was learned; what was forgotten, at home and under other contexts. Error bars: standard deviation over seeds."""
    try:
        import matplotlib
    except ImportError:
        print("No figure: matplotlib is not installed (it comes with the extra [notebooks]).")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, methods = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    letters = dict(zip(TASKS, "ABCD"))
    colors = dict(zip(METHODS, ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]))          # Okabe-Ito: colour-blind safe
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=[3, 2, 2], constrained_layout=True)
    panels = {"after": "Learned: held-out score, no context given", "prior": "Forgotten: known verbs",
              "steerability": "Forgotten: other contexts"}
    for axis, (column, title) in zip(axes, panels.items()):
        bars = [(method.upper(), colors[method], method, column) for method in methods]
        if column == "after":
            bars = [("before", "#BBBBBB", methods[0], "before"), *bars, ("teacher, with C", "#555555", methods[0], "teacher")]
        width = 0.8 / len(bars)
        for i, (label, color, method, quantity) in enumerate(bars):
            values = [[COLUMNS[quantity][0](r) for r in groups[name, method]] for name in names]
            error = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
            at = [x + (i - (len(bars) - 1) / 2) * width for x in range(len(names))]
            axis.bar(at, list(map(statistics.fmean, values)), width, label=label, color=color,
                     yerr=error if any(error) else None, capsize=2)
        axis.set_xticks(range(len(names)), [f"{letters[name]}\n{name}" for name in names], fontsize=7)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(title=title, ylabel="share right" if column == "after" else "change of exact match")
    axes[0].set(ylim=(0, 1.3), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes[0].legend(fontsize=8, ncols=2, frameon=False, loc="upper center")
    lowest = min(axes[1].get_ylim()[0], axes[2].get_ylim()[0], -0.1)
    for axis in axes[1:]:
        axis.set_ylim(lowest, 0.05)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ================================================================================================= 7. the story
def train(cfg: Config) -> dict:
    """Everything that `python train.py` does, for notebooks and tests -> {"results": [...], "report": Markdown}."""
    out, (device, dtype, autocast) = Path(cfg.out), resolve_device(cfg)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        seed_cfg = replace(cfg, seed=seed)
        base, fingerprint = get_base(seed_cfg, device, dtype, autocast)
        for context in TASKS if cfg.context == "all" else [cfg.context]:
            for method in ("cosd", "sft") if cfg.method == "all" else [cfg.method]:
                results.append(run(seed_cfg, context, method, base, fingerprint, dtype, autocast))
    text = report(results, out)
    print(f"\n{text}\nWritten to {out}/: results.md, results.json, figure.png; "
          "and for each run config.json, metrics.jsonl, samples.txt, result.json, checkpoint.pt")
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
        print("\ntrain.py: error: out of memory: set --micro-batch 16, then --chunk 32 (the result stays the same); "
              "or lower --batch, --d-model", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
