"""Compile a context into a model's weights, and compare with SFT on the same task.

    python train.py                                            built-in world, 4 kinds of context
    python train.py --context instructions --divergence jsd    one kind
    python train.py --resume                                   continue after Ctrl-C or kill
    python train.py --model FOLDER --context KIND --prompts FILE --context-file FILE    your own

A method is two choices: who writes the completion y, and what is minimised on its tokens
(`METHODS`). The loop is `fit`. Everything random in step s is seeded by (seed, s), so a checkpoint
holds no random state, and on a CPU a resumed run equals an uninterrupted one bit for bit (on a GPU,
up to nondeterministic kernels). Left out: multiple devices, sweeps, experiment trackers."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow a busy machine down
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers.utils.hub import cached_file

import contexts
import cosd
from contexts import KINDS, BadInput, context_prompts, reading, student_prompt, teacher_prompt, warn
from cosd import DIVERGENCES, Rows, Teacher, cosd_loss, cross_entropy, make_objective, token_weights
from model import (
    GPT,
    GPTConfig,
    add_adapters,
    load_weights,
    low_precision_,
    pad_right,
    read_config,
    resolve_device,
    trained,
)


@dataclass(frozen=True)
class Method:
    writer: tuple[str, ...]  # who writes y: the student, the teacher (who sees C), or the expert
    minimised: str  # on the tokens of y: the divergence to the teacher, or cross-entropy
    lr: float  # in the built-in world; the smallest that learns all kinds (notebooks/rates.py)
    warmup: int = 10
    weight_decay: float = 0.0


METHODS = {
    "cosd": Method(("student",), "divergence", 2e-4),
    "sft": Method(("expert",), "cross_entropy", 1e-4),
    "offline": Method(("teacher",), "divergence", 2e-4),  # offline context distillation
    "gkd": Method(("student", "expert"), "divergence", 2e-4),  # at random; arXiv:2306.13649
    "pretrain": Method(("expert",), "cross_entropy", 3e-3, warmup=50, weight_decay=0.1),
}
SAVE_SECONDS = 60  # between two checkpoints
BAR = "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}] {postfix}"


# ====================================================================================== 1. the loop
@dataclass
class Run:
    """Everything that the loop works on; a checkpoint saves part of it (`save_run`)."""

    cfg: Config
    task: contexts.Task
    student: GPT
    teacher: Teacher
    base: Teacher  # the student as it was, frozen: it scores anchors and measures drift
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # fp16 needs one; bf16 and fp32 pass through it unchanged
    autocast: Callable
    divergence: Callable  # the objective chosen by --divergence and --top-k
    folder: Path
    identity: dict
    step: int = 0
    log: list[dict] = field(default_factory=list)  # one row per step
    curve: list[dict] = field(default_factory=list)  # measurements during training (--eval-every)
    samples: list[str] = field(default_factory=list)
    before: dict = field(default_factory=dict)  # measured before the first step
    result: dict | None = None  # of a complete run


def fit(run: Run) -> None:
    """The training loop."""
    cfg, method, student, scaler = run.cfg, METHODS[run.cfg.method], run.student, run.scaler
    bar = tqdm(total=cfg.steps, initial=run.step, desc=run.folder.stem, bar_format=BAR)
    save_at = time.perf_counter() + SAVE_SECONDS
    with stopping() as stop, bar:
        for step in range(run.step, cfg.steps):
            began = time.perf_counter()

            # The learning rate: a linear warm-up, and a linear decay over the second half.
            warm, left = (step + 1) / (method.warmup + 1), 2 * (1 - step / cfg.steps)
            rate = cfg.lr * min(1.0, warm) * min(1.0, left)
            for group in run.optimizer.param_groups:
                group["lr"] = rate

            # Prompts x with their contexts C, and completions y by the method's writer.
            with run.autocast():
                parts = {"task": task_rows(run, step)}
                if cfg.n_anchors:  # old prompts, so that nothing is forgotten
                    parts["anchors"] = anchor_rows(run, step)

            # The teacher scores y. Loss = Σ w · D, with weights that sum to one over all parts.
            losses = []
            for name, rows in parts.items():
                for micro_batch in rows.split(cfg.micro_batch):
                    with run.autocast():
                        loss, log = cosd_loss(student, micro_batch, cfg.chunk)
                    scaler.scale(loss).backward()
                    losses.append((name, log))

            # The student moves, the teacher follows.
            scaler.unscale_(run.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(trained(student).values(), 1.0)
            row = {"step": step, "lr": rate} | log_row(parts, losses, norm)
            demand_finite(run, row)
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
            run.teacher.update(student)

            # Log, evaluate, save.
            run.step = step + 1
            run.log.append(row | {"seconds": time.perf_counter() - began})
            bar.set_postfix(loss=row["loss"], refresh=False)
            bar.update()
            evaluate(run)
            if stop or run.step == cfg.steps or time.perf_counter() > save_at:
                save_run(run)
                save_at = time.perf_counter() + SAVE_SECONDS
            if stop:
                raise KeyboardInterrupt(f"stopped after {run.step} steps, saved in {run.folder}")


def task_rows(run: Run, step: int) -> Rows:
    """The task's prompts of this step, completed by the method's writer, to be scored by the
    teacher in context."""
    cfg, task, method = run.cfg, run.task, METHODS[run.cfg.method]
    examples = task.draw_batch(cfg.seed, step, cfg.batch - cfg.n_anchors)
    prompts = [task.show(task.chat, e) for e in examples]
    writer = contexts.seeded(cfg.seed, "writer", step).choice(method.writer)
    if writer == "expert":
        y = [task.chat.target(e.prompt, e.expert) for e in examples]
    elif writer == "teacher":
        theirs = context_prompts(task, examples)
        y = write(run, run.teacher.model, theirs, cfg.temperature, "offline", step)
    else:
        y = write(run, run.student, prompts, cfg.temperature, "rollout", step)
    scorer, theirs, objective = None, prompts, cross_entropy
    if method.minimised == "divergence":
        scorer, theirs = run.teacher, context_prompts(task, examples, y)
        objective = run.divergence
    share = 1 - cfg.n_anchors / cfg.batch
    return make_rows(prompts, y, scorer, theirs, objective, share, cfg.reduction, cfg.skip)


def anchor_rows(run: Run, step: int) -> Rows:
    """Old prompts with other contexts or none, answered by the student and scored by the base in
    the same context: replay of the model's own distribution, the same for every method."""
    cfg, task = run.cfg, run.task
    rng = contexts.seeded(cfg.seed, task.kind, "anchors", step)
    prompts = [teacher_prompt(task.chat, task.draw_anchor(rng)) for _ in range(cfg.n_anchors)]
    y = write(run, run.student, prompts, cfg.temperature, "anchors", step)
    share = cfg.n_anchors / cfg.batch
    return make_rows(prompts, y, run.base, prompts, run.divergence, share, cfg.reduction)


def write(run: Run, model: GPT, prompts, temperature, *what) -> list:
    """A model's completions y of the prompts, as lists of tokens; `what` seeds the sampling, with
    the run's seed."""
    cfg, y, at_once = run.cfg, [], 2 * run.cfg.batch
    seed = contexts.seeded(cfg.seed, run.task.kind, *what).getrandbits(60)
    generator = torch.Generator(model.device).manual_seed(seed)
    how = {"temperature": temperature, "eos": run.task.chat.ends, "generator": generator}
    for i in range(0, len(prompts), at_once):
        some = prompts[i : i + at_once]
        ids, mask = model.generate(some, cfg.max_new_tokens, captured=cfg.compile, **how)
        y += [row[:n] for row, n in zip(ids.tolist(), mask.sum(1).tolist())]
    return y


def make_rows(prompts, y, scorer, theirs, objective, share=1.0, reduction="token", skip=0) -> Rows:
    """Lists of tokens as tensors, with weights that sum to `share`."""
    ids = pad_right(y)  # (B, N)
    mask = pad_right([[1] * len(row) for row in y]).bool()  # (B, N)
    weights = share * token_weights(mask, reduction, skip)
    return Rows(prompts, theirs, ids, mask, weights, scorer, objective)


def log_row(parts: dict, losses: list, norm) -> dict:
    """A row of the log: the loss and the student's entropy; the objective's mean over each part's
    tokens; the mean length of the task's answers; the norm of the gradient."""
    values = {"grad_norm": norm}
    for name, log in losses:
        mean = log["loss"] / parts[name].weights.sum()
        for key, value in {**log, name: mean}.items():
            values[key] = values.get(key, 0.0) + value
    numbers = torch.stack([*values.values()]).tolist()  # waits for the device only once
    mask = parts["task"].mask
    return dict(zip(values, numbers)) | {"length": mask.sum().item() / len(mask)}


def demand_finite(run: Run, row: dict) -> None:
    """Stop if the loss or the gradient is not finite, unless fp16's scaler will skip the step."""
    may_overflow = run.scaler.is_enabled() and run.scaler.get_scale() >= 1
    if math.isfinite(row["loss"]) and (math.isfinite(row["grad_norm"]) or may_overflow):
        return
    raise FloatingPointError(
        f"{run.folder.stem}: loss {row['loss']}, gradient norm {row['grad_norm']} at step "
        f"{row['step']}: not a finite number. Try a lower --lr or --dtype fp32; the last good "
        f"state is in {run.folder}, if one was saved"
    )


@contextmanager
def stopping() -> Iterator[list]:
    """Note Ctrl-C or kill, so that the loop stops between two steps; a second one stops at once."""
    asked, before = [], {}

    def note(number: int, _) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ======================================================================================== 2. config
def flag(default, about: str, low: float | None = None):
    """A field of Config: its default, its line in --help, its minimum."""
    return field(default=default, metadata={"about": about, "low": low})


@dataclass(frozen=True)
class Config:
    context: str = flag("all", "demonstrations, specification, instructions, privileged, or all")
    method: str = flag("all", "cosd, sft, offline, gkd; all: cosd and sft; pretrain: the base only")
    divergence: str = flag("forward_kl", "forward_kl, reverse_kl, jsd, policy_gradient (sampled)")
    top_k: int = flag(0, "keep the student's top k and a tail bucket; 0: full vocabulary", 0)
    teacher: str = flag("frozen", "frozen (the base), ema (of the student) or live (the student)")
    ema_rate: float = flag(0.02, "weight of the student in each update of an ema teacher", 0)
    anchors: float = flag(0.0, "share of the batch for old prompts, scored by the base", 0)
    steps: int | None = flag(None, "optimizer steps [250; with --model 40]", 1)
    batch: int | None = flag(None, "prompts per step [64; with --model 8]", 1)
    micro_batch: int = flag(0, "prompts per backward pass, to save memory (same result); 0: all", 0)
    lr: float | None = flag(None, "learning rate [cosd 2e-4, sft 1e-4; model 5e-5, lora 5e-4]", 0)
    temperature: float = flag(1.0, "of the rollouts; 0 is greedy", 0)
    max_new_tokens: int | None = flag(None, "longest answer, in tokens [24; with --model 256]", 1)
    reduction: str = flag("token", "what has equal weight in the loss: token or sequence")
    skip: int = flag(0, "number of first tokens of each answer left out of the loss", 0)
    chunk: int | None = flag(None, "rows of logits held at once; 0: all [0; with --model 32]", 0)
    lora: int = flag(0, "rank of the adapters; 0: train all weights", 0)
    checkpointing: bool = flag(False, "recompute blocks in the backward pass, to save memory")
    model: str | None = flag(None, "a folder or hub name; without it, the built-in world")
    prompts: str | None = flag(None, "JSON lines to train on")
    heldout: str | None = flag(None, "JSON lines to score on [every eighth line of --prompts]")
    context_file: str | None = flag(None, "C: .txt, .md, .json (chat), .jsonl (solved problems)")
    template: str | None = flag(None, "a file that says how C is shown, instead of contexts.KINDS")
    shots: int | None = flag(None, "lines shown before the prompt [demonstrations 4, else 0]", 0)
    score: str = flag("none", "exact, contains, regex, number, contains:TEXT, path.py:function")
    anchor_file: str | None = flag(None, "JSON lines: prompts for --anchors and for the drift")
    chat_template_kwargs: str = flag("{}", 'JSON, for instance {"enable_thinking": false}')
    dry_run: bool = flag(False, "read and check all files, then stop")
    seed: int = flag(0, "for everything random", 0)
    seeds: int = flag(1, "how many, from --seed on; the table gives mean ± standard deviation", 1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "for autocast: fp32, bf16 or fp16; the weights stay fp32")
    compile: bool = flag(False, "decode faster: on CUDA with a graph, else with torch.compile")
    eval_size: int = flag(128, "number of held-out prompts, and of probes in each suite", 1)
    eval_every: int = flag(0, "measure every so many steps, for the curve; 0: only at the end", 0)
    out: str = flag("out", "folder for bases and runs")
    resume: bool = flag(False, "continue what was stopped, skip what is complete")
    pretrain_steps: int = flag(2000, "steps of pretraining for the built-in world's base", 1)

    def __post_init__(self):
        check_flags(self)
        check_combinations(self)

    def resolved(self, method: str) -> Config:
        """Fill in the defaults that depend on the method, and on the built-in world or --model."""
        world = dict(steps=250, batch=64, lr=METHODS[method].lr, chunk=0, max_new_tokens=24)
        own = dict(steps=40, batch=8, lr=5e-4 if self.lora else 5e-5, chunk=32, max_new_tokens=256)
        chosen = {"method": method}
        for name, default in (own if self.model else world).items():
            if getattr(self, name) is None:
                chosen[name] = default
        return replace(self, **chosen)

    @property
    def n_anchors(self) -> int:
        return min(round(self.anchors * self.batch), self.batch - 1)


CHOICES = {
    "method": ["all", *METHODS],
    "divergence": [*DIVERGENCES, "policy_gradient"],
    "teacher": ["frozen", "ema", "live"],
    "reduction": ["token", "sequence"],
    "dtype": ["auto", "fp32", "bf16", "fp16"],
}
PRESETS = {
    "default": {},
    "smoke": {"pretrain_steps": 20, "steps": 4, "batch": 8, "eval_size": 8},
}


OWN = "prompts heldout context_file template shots score anchor_file chat_template_kwargs dry_run"
GROUPS = {"context": "what to learn, and how", "model": "your own model", "seed": "the run"}


def check_flags(cfg: Config) -> None:
    """Check each flag by itself: its choices, or its minimum."""
    for item in fields(Config):
        name, value, low = item.name, getattr(cfg, item.name), item.metadata["low"]
        choices = CHOICES.get(name, [value])
        if name == "context":
            choices = ["all", *KINDS]  # looked up here, so that a new kind is accepted
        with reading(f"{spelled(name)} {value!r}"):
            str(value).encode()  # some file names are not valid text
            if value not in choices:
                raise ValueError(f"choose from {', '.join(choices)}")
            if None not in (low, value) and not low <= value < 1e9:
                raise ValueError(f"must be at least {low}, and below 1e9")


def check_combinations(cfg: Config) -> None:
    """Refuse flags that contradict each other, or that would silently be ignored."""
    idle = [spelled(f) for f in OWN.split() if getattr(cfg, f) != getattr(Config, f)]
    sampled = cfg.divergence == "policy_gradient"
    off_policy = cfg.method in ["offline", "gkd"] or cfg.temperature != 1
    for wrong, message in [
        (idle and not cfg.model, f"{' '.join(idle)} without --model has no effect"),
        (cfg.model and cfg.context == "all", "--model needs --context with one kind"),
        (cfg.model and not cfg.prompts, "--model needs --prompts FILE"),
        (cfg.model and cfg.anchors and not cfg.anchor_file, "--anchors needs --anchor-file FILE"),
        (max(cfg.anchors, cfg.ema_rate) > 1, "--anchors and --ema-rate are shares: at most 1"),
        (sampled and cfg.top_k, "policy_gradient uses sampled tokens only: no --top-k"),
        (sampled and off_policy, "policy_gradient needs --method cosd and --temperature 1"),
        (
            cfg.skip >= (cfg.max_new_tokens or 24),
            f"--skip {cfg.skip} must be below --max-new-tokens",
        ),
        (cfg.model and cfg.method == "pretrain", "--method pretrain is for the built-in world"),
    ]:
        if wrong:
            raise BadInput(message)


def spelled(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv: list[str] | None) -> Config:
    """The command line is the dataclass: one flag per field, no abbreviations."""
    parser = argparse.ArgumentParser(
        usage="python train.py [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for item in fields(Config):
        about, kind = item.metadata["about"], item.type.split()[0]
        if item.default is not None:
            about += f" [{item.default}]"
        how = {"type": {"int": int, "float": float}.get(kind, str)}
        if kind == "bool":
            how = {"action": argparse.BooleanOptionalAction}
        if title := GROUPS.get(item.name):
            group = parser.add_argument_group(title)
        group.add_argument(spelled(item.name), help=about, **how)
    parser.add_argument(
        "--preset", choices=PRESETS, default="default", help="smoke: a test in seconds"
    )
    given = vars(parser.parse_args(argv))
    return Config(**PRESETS[given.pop("preset")] | given)


# ==================================================================================== 3. evaluation
@torch.no_grad()
def mean_loss(run: Run, model: GPT, prompts, y, objective, scorer=None, theirs=()) -> float:
    """The objective's mean over all tokens of y, in nats, with `model` as the student."""
    rows = make_rows(prompts, y, scorer, theirs, objective)
    losses = [cosd_loss(model, part, run.cfg.chunk)[0] for part in rows.split(2 * run.cfg.batch)]
    return sum(losses).item()


REVERSE_KL = make_objective("reverse_kl")  # KL(model‖scorer), exact at every token of y


def drift(run: Run, prompts: list[list[int]]) -> float:
    """KL(base‖student) on the base's own samples of these prompts, in nats per token."""
    base, student = run.base.model, Teacher(run.student, "live")
    y = write(run, base, prompts, 1, "drift")
    return mean_loss(run, base, prompts, y, REVERSE_KL, student, prompts)


def measure(run: Run) -> dict:
    """What the student can do now: the task without C, the KL that is left to the teacher, old
    skills, and how far it has moved from the base."""
    task, student, probes = run.task, run.student, []
    prompts = [student_prompt(task.chat, e) for e in task.heldout]
    y = write(run, student, prompts, 1, "held-out KL")
    theirs = context_prompts(task, task.heldout, y)
    result = {
        "task": task.grades(task.heldout, write(run, student, prompts, 0)),
        "drift_new": drift(run, prompts),
    }
    result["kl"] = mean_loss(run, student, prompts, y, REVERSE_KL, run.teacher, theirs)
    for name, suite in task.probes.items():
        in_context = [teacher_prompt(task.chat, e) for e in suite]
        result[name] = task.grades(suite, write(run, student, in_context, 0))
        probes += in_context
    if probes:
        result["drift"] = drift(run, probes)
    return result


def evaluate(run: Run) -> None:
    """Samples, three times in a run, and with --eval-every a point of the curve."""
    cfg = run.cfg
    with run.autocast():
        if run.before and run.step % max(1, cfg.steps // 3) == 0:
            run.samples.append(sample_text(run))
        if cfg.eval_every and run.step % cfg.eval_every == 0:
            run.curve.append({"step": run.step} | measure(run))


def preflight(run: Run) -> dict:
    """Measure before training. The teacher is the ceiling: if it does not beat the student, there
    is nothing to distil."""
    before, heldout = measure(run), run.task.heldout  # the student is still the base
    prompts = [student_prompt(run.task.chat, e) for e in heldout]
    theirs = context_prompts(run.task, heldout, write(run, run.student, prompts, 0))
    before["teacher"] = run.task.grades(heldout, write(run, run.student, theirs, 0))
    before["tokens_saved"] = (sum(map(len, theirs)) - sum(map(len, prompts))) / len(prompts)
    floor, ceiling, kl = before["task"], before["teacher"], before["kl"]
    name = run.folder.stem
    print(f"\n{name}: student {floor}, teacher {ceiling}, KL {kl:.3f} nats", file=sys.stderr)
    if ceiling.get("score", kl) <= floor.get("score", 0.02):
        warn(f"{name}: the teacher hardly beats the student: C can teach this model nothing")
    if ceiling.get("cut_off", 0) > 0.5:
        warn(f"{name}: most answers are cut off by --max-new-tokens {run.cfg.max_new_tokens}")
    return before


def sample_text(run: Run) -> str:
    """A few rollouts, with the student's and the teacher's probability of every token."""
    chat, student, text = run.task.chat, run.student, f"step {run.step}: student→teacher\n"
    for e in run.task.heldout[:3]:
        prompt = [student_prompt(chat, e)]
        y = write(run, student, prompt, run.cfg.temperature, "samples", run.step)
        theirs = context_prompts(run.task, [e], y)
        text += chat.decode(theirs[0] + y[0]) + "\n  "
        rows = make_rows(prompt, y, run.teacher, theirs, None)
        both = torch.stack(cosd.token_probabilities(student, rows)).T.tolist()  # (n, 2)
        for token, (q, p) in zip(y[0], both):
            text += f" {chat.decode([token])!r} {q:.2f}→{p:.2f}"
        text += "\n"
    return text


# ===================================================================================== 4. the state
def replace_file(path: Path, write_to: Callable) -> None:
    """Write atomically: a kill at any moment leaves either the old file or the new one."""
    unfinished = path.with_suffix(".tmp")
    try:
        write_to(unfinished)
    except (RuntimeError, OSError) as error:  # torch reports a full disk as RuntimeError
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written (is the disk full?): {error}") from None
    os.replace(unfinished, path)


KEPT = "identity step log curve samples before result".split()  # fields of a Run


def save_run(run: Run) -> None:
    """Save the whole state in one file, then readable copies of parts, which nothing reads back."""
    state = {name: getattr(run, name) for name in KEPT}
    state["model"] = {name: p.detach() for name, p in trained(run.student).items()}
    if run.result is None:
        state["optimizer"], state["scaler"] = run.optimizer.state_dict(), run.scaler.state_dict()
        state["teacher"] = run.teacher.model.state_dict() if run.teacher.kind == "ema" else {}
    elif run.cfg.model and not run.cfg.lora:  # its export has the weights
        state["model"] = {}
    replace_file(run.folder / "state.pt", partial(torch.save, state))
    lines = [json.dumps(row) + "\n" for row in run.log]
    replace_file(run.folder / "metrics.jsonl", lambda path: path.write_text("".join(lines)))
    for name in ("identity", "samples", "result"):
        text = json.dumps(state[name], indent=1, ensure_ascii=False)
        replace_file(run.folder / f"{name}.json", partial(Path.write_text, data=text))


def load_state(path: Path, identity: dict) -> dict:
    """The state of exactly this run, or a BadInput. Runs no code, accepts no damaged weights."""
    with reading(f"{path} cannot be used; delete it, or choose another --out"):
        if damaged := zipfile.ZipFile(path).testzip():
            raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not all(p.isfinite().all() for p in state["model"].values()):
            raise ValueError("its weights are not finite")
        theirs = state["identity"]
        if differs := [key for key in theirs | identity if theirs.get(key) != identity.get(key)]:
            raise ValueError(f"it comes from another configuration: {', '.join(differs)}")
    return state


def restore(run: Run) -> None:
    """Continue from the saved state, if there is one."""
    path = run.folder / "state.pt"
    if not path.exists():
        return
    state = load_state(path, run.identity)
    with reading(f"{path} cannot be used; delete it, or choose another --out"):
        for name in KEPT:
            setattr(run, name, state[name])
        if run.result is None:
            load_weights(run.student, state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
            run.scaler.load_state_dict(state["scaler"])
            if run.teacher.kind == "ema":
                run.teacher.model.load_state_dict(state["teacher"])


@contextmanager
def working_in(folder: Path) -> Iterator[Path]:
    """Work in FOLDER.unfinished, locked for other processes. On success it becomes FOLDER, in place
    of an earlier one."""
    work, old = folder.with_suffix(".unfinished"), folder.with_suffix(".replaced")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield work
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                os.replace(folder, old)
            os.replace(work, folder)
            shutil.rmtree(old, ignore_errors=True)
    except Timeout:
        raise BadInput(f"{work} is in use by another process; choose another --out") from None


# ====================================================================================== 5. the runs
def assemble(cfg: Config, task: contexts.Task, student: GPT, identity: dict, folder: Path) -> Run:
    """A run at step 0."""
    device, dtype, autocast = resolve_device(cfg.device, cfg.dtype)
    # With half precision, the products that stay in fp32 (the head's) may use TF32.
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    if cfg.lora:
        torch.manual_seed(cfg.seed)
        add_adapters(student, cfg.lora)
        low_precision_(student, dtype)  # frozen weights are stored as autocast would cast them
    student.checkpointing = cfg.checkpointing
    teacher = Teacher(student, cfg.teacher, cfg.ema_rate, task.shared)
    base = teacher if cfg.teacher == "frozen" else Teacher(student, "frozen")
    low_precision_(base.model, dtype)
    how = {"betas": (0.9, 0.95), "weight_decay": METHODS[cfg.method].weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(trained(student).values(), **how)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    made = optimizer, scaler, autocast, make_objective(cfg.divergence, top_k=cfg.top_k)
    return Run(cfg, task, student, teacher, base, *made, folder, identity)


# Flags that do not say what is computed, only where and how.
NOT_IDENTITY = "out resume seeds device micro_batch chunk checkpointing compile dry_run".split()


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def get_base(cfg: Config, root: str) -> tuple[GPT, str]:
    """The built-in world's base for this configuration and seed, and its name. Pretraining uses the
    same loop, and continues where it was stopped; a complete base is only loaded. The name is a
    digest of the settings and of a sample of the data, so that a changed world gets a new base."""
    kept = {"seed": cfg.seed, "dtype": cfg.dtype, "steps": cfg.pretrain_steps, "batch": 96}
    cfg = Config(method="pretrain", teacher="live", device=cfg.device, **kept).resolved("pretrain")
    shape, rng = GPTConfig(contexts.ENCODING.n_vocab), contexts.seeded("data")
    data = [asdict(contexts.draw_pretraining(rng)) for _ in range(256)]
    identity = kept | {"lr": cfg.lr, "shape": asdict(shape), "data": digest(data)}
    folder = Path(root) / f"base-{digest(identity)}"
    torch.manual_seed(cfg.seed)
    base = GPT(shape).to(resolve_device(cfg.device, cfg.dtype)[0])
    if not folder.exists():
        with working_in(folder) as work:
            run = assemble(cfg, contexts.pretraining_task(), base, identity, work)
            restore(run)
            fit(run)
    load_weights(base, load_state(folder / "state.pt", identity)["model"])
    return base, folder.name


def run_method(cfg: Config, task: contexts.Task, student: GPT, base: str) -> dict:
    """Compile one context into `student` by one method, measured before and after. Returns the
    result."""
    identity = {key: value for key, value in asdict(cfg).items() if key not in NOT_IDENTITY}
    identity["files"] = [digest(file.read_text()) for file in input_files(cfg)]
    setting = f"{cfg.context}-{cfg.method}-{digest(identity | {'seed': 0})[:4]}"
    folder = Path(cfg.out) / f"{setting}-seed{cfg.seed}"  # other settings, another folder
    identity["base"] = base
    if cfg.resume and folder.exists():
        return load_state(folder / "state.pt", identity)["result"]
    with working_in(folder) as work:
        run = assemble(cfg, task, student, identity, work)
        if cfg.resume:
            restore(run)
        if run.result:  # killed after the last save, before the folder was renamed
            return run.result
        with run.autocast():
            if not run.before:
                run.before, run.samples = preflight(run), [sample_text(run)]
        fit(run)
        with run.autocast():
            run.result = {
                "setting": setting,
                "folder": str(folder),
                "config": identity,
                "seconds": sum(row["seconds"] for row in run.log),
                "before": run.before,
                "after": measure(run),
                "curve": run.curve,
            }
        if cfg.model:
            export(run)
        save_run(run)
    return run.result


def export(run: Run) -> None:
    """Write what transformers 4 and 5 and vLLM load: the merged model and its tokenizer's files."""
    folder = run.folder / "export"
    shutil.rmtree(folder, ignore_errors=True)  # left by a stopped run
    with reading(f"{folder} could not be written"):
        run.student.save_pretrained(folder, run.task.chat.ends)
        for path in Path(cached_file(run.cfg.model, "config.json")).parent.iterdir():
            if path.is_file() and re.search(r"token|vocab|merges|template|\.model$", path.name):
                shutil.copy(path, folder)


def input_files(cfg: Config) -> list[Path]:
    named = [str(value).rpartition(":")[0] or str(value) for value in asdict(cfg).values()]
    return [Path(name) for name in named if os.path.isfile(name)]  # score: path.py:function


def run_own(cfg: Config) -> dict:
    """A run on your model and files. Errors in the files are found before weights are loaded."""
    path = Path(cfg.model)
    for file in [path, *input_files(cfg)]:
        if any((place / "state.pt").exists() for place in file.resolve().parents):
            raise BadInput(f"{file} is in a run's folder, which may be replaced: copy it first")
    with reading(f"--model {cfg.model}"):
        # A hub name or a path? out/x is a path if there is a folder out.
        local = cfg.model[0] in "./~" or path.exists() or path.parent.name and path.parent.is_dir()
        if local and not (path / "config.json").is_file():
            raise ValueError("no config.json there: give a complete model's folder, not adapters")
        shape = read_config(cfg.model)
        extra = json.loads(cfg.chat_template_kwargs)
        chat = contexts.open_chat(cfg.model, shape.vocab_size, **extra)
    task = contexts.file_task(cfg, chat, shape.max_len)
    if cfg.dry_run:
        warn("nothing is trained; memory and time: python notebooks/plan.py with the same flags")
        return {}
    with reading(f"--model {cfg.model}"):
        student = GPT.from_pretrained(cfg.model).to(resolve_device(cfg.device, cfg.dtype)[0])
    sample = [p.flatten()[:8].tolist() for p in student.parameters()]
    return run_method(cfg, task, student, digest(sample))


# ===================================================================================== 6. the whole
def comparison(cfg: Config) -> list[Config]:
    """The runs to make. By default COSD and SFT, each at its own learning rate, and SFT at COSD's,
    with everything else the same; on your own model COSD alone."""
    if cfg.method != "all":
        return [cfg.resolved(cfg.method)]
    if cfg.model:
        return [cfg.resolved("cosd")]
    runs = [cfg.resolved("cosd"), cfg.resolved("sft")]
    return runs if cfg.lr else [*runs, replace(runs[1], lr=runs[0].lr)]


def train(cfg: Config) -> list[dict]:
    """Everything that `python train.py` does, for notebooks and tests. Returns a result per run."""
    results = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        cfg = replace(cfg, seed=seed)
        if cfg.model:
            results += [run_own(run_cfg) for run_cfg in comparison(cfg)]
            continue
        base, name = get_base(cfg, cfg.out)
        for kind in KINDS if cfg.context == "all" else [cfg.context]:
            task = contexts.world_task(kind, seed, cfg.eval_size)
            for run_cfg in comparison(replace(cfg, context=kind)):
                if cfg.method != "pretrain":
                    results.append(run_method(run_cfg, task, copy.deepcopy(base), name))
    if any(results):  # the table and the figure
        report = f"{Path(__file__).parent}/notebooks/report.py"
        subprocess.run([sys.executable, report, cfg.out], check=True)
    return results


def main(argv=None):
    try:
        train(parse(argv))
        return 0
    except KeyboardInterrupt as stopped:
        said, code = f"{stopped}: continue with the same command and --resume", 130
    except FloatingPointError as error:
        said, code = error, 1
    except (BadInput, OSError) as error:
        said, code = f"error: {error}", 2
    except subprocess.CalledProcessError as error:
        said, code = "the report failed", error.returncode
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)):
            raise
        said, code = "error: out of memory: lower --micro-batch, set --chunk 32 and ", 2
        said += "--checkpointing (the result stays the same); or use --lora 16 or a lower --batch"
    print(f"\ntrain.py: {said}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
