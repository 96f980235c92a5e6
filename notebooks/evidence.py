"""The evidence: what each way of fine-tuning learns, and what it forgets. One experiment a claim, one command for all.

    python notebooks/evidence.py                          everything: 510 runs, a good hour on two cores
    python notebooks/evidence.py forgetting razor         some of it: the names below
    python notebooks/evidence.py --seeds 5 --jobs 4       more seeds, more cores (one process a core)
    python notebooks/evidence.py --smoke                  every code path in a minute, learning nothing

  forgetting     new task against old skills, all methods             recovery    skills back from the original model
  razor          which KL predicts forgetting                         continual   three skills in a row
  modes          what each divergence does with two modes             quality     student against teacher as C gets worse
  rote           rule or rote: new items, longer problems             straight    the line from base to tuned weights
  real           SmolLM2: SFT on alien demonstrations, and COSD

An experiment is a list of jobs (one training run and its measurements, in a process of its own) and a page: a table and a
figure made from their numbers. A job that is done is not done again. Everything lands in --out: runs/ (one JSON file a job,
with its settings and the commit), index.json (all of them), and for each experiment a page .md, its figure .png, and .json
(razor and rote read forgetting.json). All numbers are means over seeds ± half the 95 % confidence interval (Student's t).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing import active_children, get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import numpy as np
import torch
from perplexity import perplexity, read_paragraphs
from tqdm import tqdm

import contexts
import train
from contexts import KINDS, VERBS, Example, demonstrations, draw_word, privileged, seeded, task_draw
from cosd import DIVERGENCES, Teacher, completion_states, cosd_loss, cross_entropy, forward_kl
from model import GPT, read_config
from train import Config, Run

T95 = [math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # by degrees of freedom
DATA = ROOT / "notebooks" / "data"
WORLD = dict(steps=100, batch=32, eval_size=64)
SMOKE = dict(pretrain_steps=10, steps=2, batch=8, eval_size=4)
OWN = ("weighted", "base_kl", "replay")  # settings that train.py does not know: see `parts`


# ================================================================================================ 1. what a job does
def config(job: dict, options: argparse.Namespace, **more) -> Config:
    settings = job["scale"] | job["settings"] | more | (SMOKE if options.smoke else {})
    if options.smoke and job["settings"].get("pretrain_steps"):
        settings["pretrain_steps"] = 5
    settings |= dict(
        context=job["context"],
        seed=job["seed"],
        device="cpu",
        out=str(options.out / "work" / slug(job)),
    )
    settings = {name: value for name, value in settings.items() if name not in OWN}
    return Config(**settings).resolved(settings.get("method", "cosd"))


def world(cfg: Config, options: argparse.Namespace) -> tuple[GPT, contexts.Task]:
    base, _ = train.get_base(cfg, str(options.bases))
    return base, contexts.world_task(cfg.context, cfg.seed, cfg.eval_size)


def start(cfg: Config, task: contexts.Task, student: GPT, name: str = "run") -> Run:
    """A run at step 0, in a folder of its own."""
    folder = Path(cfg.out) / name
    folder.mkdir(parents=True, exist_ok=True)
    return train.assemble(cfg, task, student, {}, folder)


def draw_proxy(rng: random.Random, heldout: bool | None = None) -> Example:
    """Another corpus in place of the one that is not to be had: near, not equal. The same prompts, answered by people: they have
    manners (A), choose a style without being told (C), and are careful (D)."""
    kinds = list(KINDS.values())
    kind = rng.choices(kinds, [kind.share for kind in kinds])[0]
    example = kind.draw(rng, heldout)
    return replace(
        example,
        context=None if rng.random() < kind.drop else example.context,
        answer=example.expert,
    )


def weighted_cross_entropy(student_logits, teacher_logits, tokens) -> torch.Tensor:
    """stop_grad(Q(token)) · −log Q(token): what the student finds unlikely counts less (DFT, arXiv:2508.05629)."""
    loss = cross_entropy(student_logits, teacher_logits, tokens)
    return (-loss).exp().detach() * loss


def near_the_base(imitate, weight: float):
    """SFT inside a soft trust region: imitation plus λ KL(base‖student) on the same tokens. With `weighted_cross_entropy`: ASFT (arXiv:2509.23753)."""
    return lambda student_logits, teacher_logits, tokens: (
        imitate(student_logits, teacher_logits, tokens)
        + weight * forward_kl(student_logits, teacher_logits)
    )


def parts(run: Run, step: int, settings: dict) -> dict:
    """The rows of a step. What train.py does not have: a base that holds SFT back, and replay of a corpus's own answers."""
    rows = {"task": train.task_rows(run, step)}
    if settings.get("weighted") or settings.get("base_kl"):
        imitate = weighted_cross_entropy if settings.get("weighted") else cross_entropy
        rows["task"] = replace(
            rows["task"], scorer=run.base, objective=near_the_base(imitate, settings["base_kl"])
        )
    if run.cfg.n_anchors and settings.get("replay"):
        rng, chat = seeded(run.cfg.seed, run.task.kind, "anchors", step), run.task.chat
        corpus = draw_proxy if settings["replay"] == "proxy" else contexts.draw_pretraining
        drawn = [contexts.draw_anchor(rng, run.task.kind, corpus) for _ in range(run.cfg.n_anchors)]
        prompts = [contexts.teacher_prompt(chat, e) for e in drawn]
        y = [chat.target(e.prompt, e.answer) for e in drawn]
        rows["anchors"] = train.make_rows(
            prompts, y, None, prompts, cross_entropy, run.cfg.n_anchors / run.cfg.batch
        )
    elif run.cfg.n_anchors:
        rows["anchors"] = train.anchor_rows(run, step)
    return rows


def fit(run: Run, parts_of_step, steps: int | None = None) -> None:
    """train.fit's loop less its log and its state, for rows of one's own."""
    method, steps = train.METHODS[run.cfg.method], steps or run.cfg.steps
    for step in range(steps):
        warm, left = (step + 1) / (method.warmup + 1), 2 * (1 - step / steps)
        for group in run.optimizer.param_groups:
            group["lr"] = run.cfg.lr * min(1.0, warm) * min(1.0, left)
        began = time.perf_counter()
        for rows in parts_of_step(run, step).values():
            cosd_loss(run.student, rows, run.cfg.chunk)[0].backward()
        torch.nn.utils.clip_grad_norm_(train.trained(run.student).values(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.teacher.update(run.student)
        run.step = step + 1
        run.log.append({"seconds": time.perf_counter() - began})
        train.evaluate(run)


def score(run: Run, model: GPT, examples: list[Example], with_context: bool) -> dict:
    """Mean grades of greedy answers."""
    show = contexts.teacher_prompt if with_context else contexts.student_prompt
    prompts = [show(run.task.chat, e) for e in examples]
    return run.task.grades(examples, train.write(run, model, prompts, 0))


def skills_of(measured: dict, task: contexts.Task) -> dict[str, float]:
    return {name: measured[name]["exact"] for name in task.probes}


def skills(run: Run, model: GPT) -> dict[str, float]:
    """Exact match on each suite of old skills."""
    return {
        name: score(run, model, suite, True)["exact"] for name, suite in run.task.probes.items()
    }


def learn(
    job: dict,
    options: argparse.Namespace,
    task: contexts.Task | None = None,
    student: GPT | None = None,
    **more,
) -> tuple[dict, Run]:
    """One run -> (its numbers, the run)."""
    cfg = config(job, options, **more)
    base, own = world(cfg, options)
    run = start(cfg, task or own, student or copy.deepcopy(base))
    run.before = train.preflight(run)
    before = skills_of(run.before, run.task)
    if any(job["settings"].get(name) for name in OWN):
        fit(run, partial(parts, settings=job["settings"]))
    else:
        train.fit(run)
    rows = run.curve or [{"step": cfg.steps} | train.measure(run)]
    curve = []
    for row in rows:
        now = skills_of(row, run.task)
        curve.append(
            {
                "step": row["step"],
                "score": row["task"]["score"],
                "exact": row["task"]["exact"],
                "skills": now,
                "drift": row["drift"],
                "drift_new": row["drift_new"],
                "lost": lost(before, now),
            }
        )
    numbers = {
        "teacher": run.before["teacher"]["score"],
        "seconds": sum(row["seconds"] for row in run.log),
        "curve": curve,
    }
    return numbers | curve[-1], run


def lost(before: dict, after: dict) -> float:
    """How much exact match went away, on average over the five suites of old skills (known verbs, four kinds of other contexts)."""
    return statistics.fmean(before[name] - after[name] for name in before)


def pretrain(job: dict, options: argparse.Namespace) -> dict:
    cfg = config(job, options, method="cosd")
    base, task = world(cfg, options)
    run = start(cfg, task, base)
    return {"with C": score(run, base, task.heldout, True)["score"]}


def forgetting(job: dict, options: argparse.Namespace) -> dict:
    """A run of experiment 1; for B and D also what experiment 7 asks: the items trained on, longer problems than trained on."""
    steps = (SMOKE if options.smoke else WORLD)["steps"]
    numbers, run = learn(job, options, eval_every=steps // 2)
    seed, count = job["seed"], run.cfg.eval_size
    sets = {}
    if job["context"] == "specification":
        sets = {
            "trained": [
                task_draw("specification", seeded(seed, "trained", i)) for i in range(count)
            ]
        }
    elif job["context"] == "privileged":
        for n in (2, 3, 4, 5):
            sets[f"{n} verbs"] = [
                privileged(seeded(seed, "longer", n, i), heldout=True, steps=n)
                for i in range(count)
            ]
    return numbers | {
        "beyond": {
            name: score(run, run.student, examples, False)["score"]
            for name, examples in sets.items()
        }
    }


def recovery(job: dict, options: argparse.Namespace) -> dict:
    """SFT that forgets, then the original model as teacher on plain prompts: other contexts or none, the new verb never without one."""
    numbers, forgot = learn(job, options)
    base, task = world(forgot.cfg, options)
    cfg = replace(
        forgot.cfg, method="cosd", anchors=0.5, batch=2 * forgot.cfg.batch, lr=5e-4, eval_every=0
    )
    run = start(cfg, task, forgot.student, "recovery")
    run.base = run.teacher = Teacher(base, "live")  # the original, which nobody trains
    before = skills(run, base)
    rows = [{"step": 0} | {k: numbers[k] for k in ("score", "exact", "lost", "drift", "skills")}]

    def plain(run: Run, step: int) -> dict:  # half a batch of anchors is the whole step
        if step and step % max(1, cfg.steps // 5) == 0:
            rows.append(row(step))
        anchors = train.anchor_rows(run, step)
        return {"anchors": replace(anchors, weights=anchors.weights / anchors.weights.sum())}

    def row(step: int) -> dict:
        m = train.measure(run)
        now = skills_of(m, task)
        return {
            "step": step,
            "score": m["task"]["score"],
            "exact": m["task"]["exact"],
            "skills": now,
            "drift": m["drift"],
            "lost": lost(before, now),
        }

    fit(run, plain)
    return {"curve": [*rows, row(cfg.steps)], "base": before}


STAGES = [
    ("zorp", "reverse", "verily {} methinks"),
    ("blick", "rotate", "hark {} quoth bede"),
    ("wug", "stretch", "behold {} indeed"),
]


def rehearse(rng: random.Random, earlier: list, other) -> Example:
    """Every second anchor asks for an earlier verb, without context."""
    return (
        replace(rng.choice(earlier)(rng, heldout=False), context=None)
        if earlier and rng.random() < 0.5
        else other(rng)
    )


def continual(job: dict, options: argparse.Namespace) -> dict:
    """Three new verbs in a row, each stage starting from the last one's weights; the teacher is the model as the stage found it."""
    cfg = config(job, options)
    student, task = world(cfg, options)
    draws = [
        partial(demonstrations, verb=verb, meaning=meaning, manner=manner)
        for verb, meaning, manner in STAGES
    ]
    heldout = [
        [draw(seeded(job["seed"], "continual", i, j), heldout=True) for j in range(cfg.eval_size)]
        for i, draw in enumerate(draws)
    ]
    base_skills, rows = skills(start(cfg, task, student), student), []
    for stage, draw in enumerate(draws):
        anchor = (
            partial(rehearse, earlier=draws[:stage], other=task.draw_anchor)
            if job.get("rehearse")
            else task.draw_anchor
        )
        now = replace(
            task, draw=partial(draw, heldout=False), heldout=heldout[stage], draw_anchor=anchor
        )
        numbers, run = learn(job, options, now, student)
        student = run.student
        grades = [score(run, student, examples, False) for examples in heldout]
        rows.append(
            {
                "score": [g["score"] for g in grades],
                "exact": [g["exact"] for g in grades],
                "lost": lost(base_skills, numbers["skills"]),
            }
        )
    return {"stages": rows}


def undecided(rng: random.Random, heldout: bool = False) -> Example:
    """Two demonstrations that contradict each other: a teacher with two modes, and none of them wrong."""
    first, second, word = (draw_word(rng, heldout) for _ in range(3))
    shown = [
        f"{first} zorp: {VERBS['reverse'](first)}",
        f"{second} zorp: {VERBS['rotate'](second)}",
    ]
    rng.shuffle(shown)
    return Example(
        "demonstrations",
        "; ".join(shown),
        f"{word} zorp",
        VERBS["reverse"](word),
        VERBS["rotate"](word),
    )


def diversity(job: dict, options: argparse.Namespace) -> dict:
    cfg = config(job, options)
    base, task = world(cfg, options)
    examples = [
        undecided(seeded(job["seed"], "undecided", i), heldout=True) for i in range(cfg.eval_size)
    ]
    numbers, run = learn(job, options, replace(task, draw=undecided, heldout=examples))

    def spread_of(model: GPT, with_context: bool) -> dict:
        """Of 16 samples for each prompt: the share of each meaning, how many different answers, the entropy in nats per token."""
        said, entropies = [], []
        generator = torch.Generator().manual_seed(job["seed"])
        for e in examples[:16]:
            prompts = [task.chat.render(e.context if with_context else None, e.prompt)] * 16
            ids, mask = model.generate(
                prompts, cfg.max_new_tokens, eos=task.chat.ends, generator=generator
            )
            with torch.no_grad():
                log_q = model.head(completion_states(model, prompts, ids, mask)).log_softmax(
                    -1
                )  # (n, V)
            entropies.append(-(log_q.exp() * log_q).sum(-1).mean().item())
            said.append([task.chat.decode(row[m].tolist()[:-1]) for row, m in zip(ids, mask)])
        share = lambda wanted: statistics.fmean(
            text == wanted(e) for e, texts in zip(examples, said) for text in texts
        )
        one, other = share(lambda e: e.answer), share(lambda e: e.expert)
        return {
            "reverse": one,
            "rotate": other,
            "neither": 1 - one - other,
            "distinct": statistics.fmean(len(set(texts)) for texts in said),
            "entropy": statistics.fmean(entropies),
        }

    return {
        "student": spread_of(run.student, False),
        "teacher": spread_of(base, True),
        "base": spread_of(base, False),
        "lost": numbers["lost"],
    }


def worse_context(example: Example, how: str, rng: random.Random) -> Example:
    """The same prompt under a poorer context. A: `shown` lists what each demonstration does. D: the key skips a step with some probability."""
    kind, _, amount = how.partition(" ")
    if kind == "demonstrations":
        words = [draw_word(rng, False) for _ in amount]
        context = "; ".join(
            f"{w} zorp: verily {VERBS['reverse' if mark == '+' else 'swap'](w)} methinks"
            for w, mark in zip(words, amount)
        )
    elif kind == "key":
        word, *verbs = example.prompt.split()
        steps = [word]
        for verb in verbs:
            steps.append(steps[-1] if rng.random() < float(amount) else VERBS[verb](steps[-1]))
        context = "solution " + " ".join(steps[1:])
    else:
        context = f"never {amount}"
    return replace(example, context=context)


def quality(job: dict, options: argparse.Namespace) -> dict:
    _, task = world(config(job, options), options)
    if how := job["how"]:
        heldout = [
            worse_context(e, how, seeded(job["seed"], "worse", i))
            for i, e in enumerate(task.heldout)
        ]
        draw = partial(draw_worse, kind=job["context"], how=how)
        task = replace(task, draw=draw, shared=[], heldout=heldout)
    numbers, _ = learn(job, options, task)
    return {"teacher": numbers["teacher"], "student": numbers["score"], "lost": numbers["lost"]}


def draw_worse(rng: random.Random, kind: str, how: str) -> Example:
    return worse_context(task_draw(kind, rng), how, rng)


@torch.no_grad()
def blend(base: GPT, tuned: GPT, alpha: float) -> GPT:
    """(1 − α) base + α tuned, weight by weight."""
    between, theirs = copy.deepcopy(base), dict(tuned.named_parameters())
    for name, parameter in between.named_parameters():
        parameter.lerp_(theirs[name], alpha)
    return between


def straight(job: dict, options: argparse.Namespace) -> dict:
    """Scores and losses at (1 − α) base + α tuned."""
    numbers, run = learn(job, options)
    (base, task), chat = world(run.cfg, options), run.task.chat
    old = [
        contexts.draw_pretraining(seeded(job["seed"], "old", i), heldout=True)
        for i in range(4 * run.cfg.eval_size)
    ]

    @torch.no_grad()
    def loss(between: GPT, examples: list[Example]) -> float:
        prompts = [contexts.teacher_prompt(chat, e) for e in examples]
        y = [chat.target(e.prompt, e.answer) for e in examples]
        return cosd_loss(between, train.make_rows(prompts, y, None, prompts, cross_entropy))[
            0
        ].item()

    rows, before = [], skills(run, base)
    for alpha in [i / 6 for i in range(8)]:  # and a step beyond
        between = blend(base, run.student, alpha)
        rows.append(
            {
                "alpha": alpha,
                "score": score(run, between, task.heldout, False)["score"],
                "lost": lost(before, skills(run, between)),
                "loss on old data": loss(between, old),
                "loss on the new task": loss(
                    between, [replace(e, context=None) for e in task.heldout]
                ),
            }
        )
    return {"line": rows}


# ------------------------------------------------------------------------------------------------- the real model
def real(job: dict, options: argparse.Namespace) -> dict:
    """SmolLM2: one style or one skill, learned from alien demonstrations or from the model's own context; and what became of the rest."""
    style, alien = job["context"] == "pirate", job["settings"]["method"] == "sft"
    own = (
        ("pirate-alien.jsonl" if alien else "questions.jsonl")
        if style
        else ("plurals-alien.jsonl" if alien else "plurals.jsonl")
    )
    common = dict(
        model=str(options.model),
        prompts=str(DATA / own),
        dtype="bf16" if options.bf16 else "fp32",
        max_new_tokens=24 if style else 12,
        device="cpu",
        seed=job["seed"],
        out=str(options.out / "work" / slug(job)),
        eval_size=4 if options.smoke else 32,
        lr=5e-5,
        **({"steps": 1, "batch": 2} if options.smoke else {"steps": 30}),
    )
    how = (
        dict(
            context="instructions",
            context_file=str(DATA / "pirate.json"),
            heldout=str(DATA / "questions-heldout.jsonl"),
            score=f"{DATA}/pirate.py:score",
        )
        if style
        else dict(
            context="demonstrations",
            shots=4,
            heldout=str(DATA / "plurals-heldout.jsonl"),
            score="contains",
        )
    )
    cfg = Config(**common | how | job["settings"]).resolved(job["settings"]["method"])
    with contexts.reading(f"--model {cfg.model}"):
        shape = read_config(cfg.model)
    chat = contexts.open_chat(cfg.model, shape.vocab_size)
    task = contexts.file_task(cfg, chat, shape.max_len)
    student, scored = GPT.from_pretrained(cfg.model), task.grade
    if not style:  # the word alone, or wrapped in somebody's manner
        task = replace(
            task,
            grade=lambda e, text: (
                scored(e, text) | {"exact": float(text.strip() == e.row["answer"])}
            ),
        )

    others = {}  # what the model could do in context before
    for name, settings in {
        "sums, worked out in context": dict(
            context="privileged",
            shots=4,
            prompts="sums.jsonl",
            heldout="sums-heldout.jsonl",
            score="number",
            max_new_tokens=16,
        ),
        "policy, in context": dict(
            context="specification",
            context_file=str(DATA / "policy.json"),
            prompts="requests.jsonl",
            heldout="requests-heldout.jsonl",
            score=f"{DATA}/policy.py:score",
            max_new_tokens=24,
        ),
    }.items():
        files = {key: str(DATA / settings[key]) for key in ("prompts", "heldout")}
        other = Config(**common | settings | files, method="cosd").resolved("cosd")
        others[name] = start(
            other, contexts.file_task(other, chat, shape.max_len), student, name.partition(",")[0]
        )

    def other_scores() -> dict:
        scores = {}
        for name, other in others.items():
            with other.autocast():
                scores[name] = score(other, student, other.task.heldout, True)["score"]
        return scores

    paragraphs = read_paragraphs(str(DATA / "plain.txt"), cfg.model, shape.max_len)

    def plain() -> float:
        with run.autocast():
            return perplexity(student, paragraphs)

    before, run = other_scores(), start(cfg, task, student)
    plain_before = plain()
    with run.autocast():
        run.before = train.preflight(run)
    train.fit(run)
    with run.autocast():
        after = train.measure(run)
        said = train.write(
            run, student, [contexts.student_prompt(chat, e) for e in task.heldout[:4]], 0
        )
    return {
        "kl_before": run.before["kl"],
        "kl_after": after["kl"],
        "perplexity_before": plain_before,
        "perplexity_after": plain(),
        "drift_new": after["drift_new"],
        "seconds": sum(row["seconds"] for row in run.log),
        "teacher": run.before["teacher"]["score"],
        "before": run.before["task"]["score"],
        "after": after["task"]["score"],
        "exact": after["task"].get("exact"),
        "others before": before,
        "others after": other_scores(),
        "said": [chat.decode(row) for row in said],
    }


# ============================================================================================== 2. the list of jobs
def share(anchors: float, **settings) -> dict:
    return dict(method="cosd", anchors=anchors) | settings


# family, then method: (settings, learning rates)
METHODS = {
    "SFT": (dict(method="sft"), (3e-5, 1e-4, 2e-4, 5e-4)),
    "SFT + replay": (dict(method="sft", anchors=0.5, replay="real"), (2e-4, 5e-4)),
    "SFT + proxy replay": (dict(method="sft", anchors=0.5, replay="proxy"), (2e-4, 5e-4)),
    "SFT + ⅒ KL to base": (dict(method="sft", base_kl=0.1), (5e-4,)),
    "SFT + KL to base": (dict(method="sft", base_kl=1.0), (5e-4,)),
    "ASFT": (dict(method="sft", weighted=True, base_kl=0.1), (2e-4, 5e-4)),
    "SFT, LoRA": (dict(method="sft", lora=8), (3e-4, 1e-3)),
    "SFT + anchors ½": (dict(method="sft", anchors=0.5), (5e-4,)),
    "offline": (dict(method="offline", anchors=0.0), (1e-4, 5e-4)),
    "GKD": (dict(method="gkd", anchors=0.0, divergence="jsd"), (1e-4, 5e-4)),
    "COSD forward KL": (share(0.0), (1e-4, 5e-4)),
    "COSD reverse KL": (share(0.0, divergence="reverse_kl"), (1e-4, 5e-4)),
    "COSD JSD": (share(0.0, divergence="jsd"), (1e-4, 5e-4)),
    "COSD sampled token": (share(0.0, divergence="policy_gradient"), (1e-4, 5e-4)),
    "COSD top 8 + tail": (share(0.0, divergence="reverse_kl", top_k=8), (1e-4, 5e-4)),
    "COSD, EMA teacher": (share(0.0, teacher="ema"), (1e-4, 5e-4)),
    "COSD, live teacher": (share(0.0, teacher="live"), (5e-4,)),
    "COSD, LoRA": (share(0.0, lora=8), (1e-3,)),
    "COSD + anchors ¼": (share(0.25), (5e-4,)),
    "COSD + anchors ½": (share(0.5), (5e-4,)),
}
TWO = {
    "SFT": dict(method="sft", lr=5e-4),
    "COSD": share(0.0, lr=5e-4),
    "COSD + anchors ½": share(0.5, lr=5e-4),
}
WORSE = [
    ("demonstrations", "demonstrations ++"),
    ("demonstrations", "demonstrations +"),
    ("demonstrations", "demonstrations +-"),
    ("demonstrations", "demonstrations --"),
    ("specification", "specification weapon"),
    ("privileged", "key 0.25"),
    ("privileged", "key 0.5"),
    ("privileged", "key 1.0"),
]
WEAK = 600  # pretraining steps of the weaker base


def jobs_of(experiment: str, seed: int, smoke: bool = False, bf16: bool = False) -> list[dict]:
    """A run that was made from another job, or at another scale, does not count as done."""
    scale = SMOKE if smoke else WORLD
    job = lambda name, context, settings, **more: (
        dict(
            experiment=experiment,
            name=name,
            context=context,
            seed=seed,
            settings=settings,
            scale=scale,
        )
        | more
    )
    if experiment == "base":
        return [
            job("base", "demonstrations", {}),
            job("weak base", "demonstrations", dict(pretrain_steps=WEAK)),
        ]
    if experiment == "forgetting":
        return [
            job(f"{name}, lr {lr:g}", context, settings | dict(lr=lr), method=name)
            for context in KINDS
            for name, (settings, rates) in METHODS.items()
            for lr in rates[: 1 if smoke else None]
            if not smoke or context == "demonstrations" or name in ("SFT", "COSD + anchors ½")
        ]
    if experiment == "recovery":
        return [job("SFT, then the original as teacher", "demonstrations", TWO["SFT"])]
    if experiment == "continual":
        more = {
            "COSD, lr 1e-4": share(0.0, lr=1e-4),
            "SFT + replay": dict(method="sft", lr=5e-4, anchors=0.5, replay="real"),
        }
        plain = [job(name, "demonstrations", settings) for name, settings in (TWO | more).items()]
        return plain[: 1 if smoke else None] + [
            job(
                "COSD + anchors, earlier verbs too",
                "demonstrations",
                TWO["COSD + anchors ½"],
                rehearse=True,
            )
        ]
    if experiment == "modes":
        return [
            job(name, "demonstrations", share(0.0, divergence=name, lr=5e-4))
            for name in (*DIVERGENCES, "policy_gradient")
        ]
    if experiment == "quality":
        return [
            job(how, context, share(0.0, lr=5e-4), how=how)
            for context, how in (WORSE[2::2] if smoke else WORSE)
        ] + [
            job(f"weak base, {context}", context, share(0.0, lr=5e-4, pretrain_steps=WEAK), how="")
            for context in ("demonstrations", "privileged")
        ]
    if experiment == "straight":
        return [job(name, "demonstrations", settings) for name, settings in TWO.items()]
    if experiment == "real":
        return [
            job(f"{task}, {name}", task, dict(method=method), bf16=bf16)
            for task in ("pirate", "plurals")
            for name, method in (("COSD", "cosd"), ("SFT", "sft"))
        ]
    return []  # razor and rote read the runs of forgetting


FUNCTIONS = dict(
    base=pretrain,
    forgetting=forgetting,
    recovery=recovery,
    continual=continual,
    modes=diversity,
    quality=quality,
    straight=straight,
    real=real,
)


def slug(job: dict) -> str:
    return re.sub(
        r"[^\w.+-]+",
        "-",
        f"{job['experiment']}-{job['context']}-{job['name']}-seed{job['seed']}".replace("½", "half")
        .replace("¼", "quarter")
        .replace("⅒", "tenth"),
    )


def do(job: dict, options: argparse.Namespace) -> None:
    """In a worker: the job's function, its prints into a log, its numbers into a file, written whole or not at all."""
    torch.set_num_threads(1)
    path, began, log = (
        record(job, options),
        time.perf_counter(),
        options.out / "work" / f"{slug(job)}.log",
    )
    shutil.rmtree(options.out / "work" / slug(job), ignore_errors=True)
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        numbers = FUNCTIONS[job["experiment"]](job, options)
    written = {
        "job": job,
        "commit": options.commit,
        "code": code(),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "numbers": numbers,
    }
    train.replace_file(path, lambda unfinished: unfinished.write_text(json.dumps(written)))
    shutil.rmtree(
        options.out / "work" / slug(job), ignore_errors=True
    )  # weights and metrics of hundreds of runs


def record(job: dict, options: argparse.Namespace) -> Path:
    return options.out / "runs" / f"{slug(job)}.json"


def done(job: dict, options: argparse.Namespace) -> dict | None:
    path = record(job, options)
    saved = json.loads(path.read_text()) if path.exists() else None
    same = saved and saved["job"] == json.loads(json.dumps(job)) and saved.get("code") == code()
    return saved if same else None


@lru_cache
def code() -> str:
    """A digest of the code that a run depends on: a run of other code does not count as done."""
    files = [ROOT / f"{name}.py" for name in ("cosd", "model", "contexts", "train")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]


# ===================================================================================== 3. tables and figures
COLORS = {
    "SFT": "#D55E00",
    "trust region": "#E69F00",
    "replay": "#F0E442",
    "off-policy": "#CC79A7",
    "COSD": "#0072B2",
    "anchors": "#009E73",
    "teacher": "#56B4E9",
}
FAMILY = {
    "SFT": "SFT",
    "SFT, LoRA": "SFT",
    "SFT + ⅒ KL to base": "trust region",
    "SFT + KL to base": "trust region",
    "ASFT": "trust region",
    "SFT + replay": "replay",
    "SFT + proxy replay": "replay",
    "offline": "off-policy",
    "GKD": "off-policy",
    "SFT + anchors ½": "anchors",
    "COSD + anchors ¼": "anchors",
    "COSD + anchors ½": "anchors",
    "COSD, EMA teacher": "teacher",
    "COSD, live teacher": "teacher",
}
MARKERS = dict(zip(METHODS, "osvPp^DXosDosv^P<>dpX*"))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the 95 % confidence interval."""
    n = len(values)
    return statistics.fmean(values), (
        T95[min(n - 1, 9)] * statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
    )


def show(values: list[float], digits: int = 2) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def by(records: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Records in groups of equal job[key]; inside a group one for each seed."""
    groups: dict[tuple, list[dict]] = {}
    for r in records:
        groups.setdefault(tuple(r["job"][key] for key in keys), []).append(r["numbers"])
    return groups


def gentlest(points: list[tuple], score: float) -> tuple[tuple, bool]:
    """Of ((score, ±), (lost, ±), ...) the point that loses least among those with enough score, else the one with the best score."""
    enough = [p for p in points if p[0][0] >= score]
    return (
        min(enough, key=lambda p: p[1][0]) if enough else max(points, key=lambda p: p[0][0])
    ), bool(enough)


def forgetting_page(records: list[dict], plt) -> tuple[str, object]:
    figure, axes = plt.subplots(1, 4, figsize=(15, 5.2), sharey=True, constrained_layout=True)
    rows, groups, short = (
        [],
        by(records, "context", "method", "name"),
        {method: [method] for method in METHODS},
    )
    for axis, (context, letter) in zip(axes, zip(KINDS, "ABCD")):
        teacher = statistics.fmean(
            n["teacher"] for key, runs in groups.items() if key[0] == context for n in runs
        )
        for method in METHODS:
            points = [
                (
                    interval([n["curve"][i]["score"] for n in runs]),
                    interval([n["curve"][i]["lost"] for n in runs]),
                    runs,
                    i,
                )
                for (c, m, _), runs in groups.items()
                if (c, m) == (context, method)
                for i in range(len(runs[0]["curve"]))
            ]
            if not points:
                short[method].append("")
                continue
            color = COLORS[FAMILY.get(method, "COSD")]
            axis.errorbar(
                [p[0][0] for p in points],
                [-p[1][0] for p in points],
                fmt=MARKERS[method],
                color=color,
                markeredgecolor="black",
                markeredgewidth=0.5,
                markersize=6,
                label=method if axis is axes[0] else None,
            )
            (_, _, runs, i), enough = gentlest(points, 0.9 * teacher)
            at = lambda key: [n["curve"][i][key] for n in runs]
            short[method].append(
                show(at("lost"), 3)
                + ("" if enough else f" (score {statistics.fmean(at('score')):.2f})")
            )
            lr = next(name for (c, m, name), r in groups.items() if r is runs).rpartition("lr ")[2]
            rows.append(
                [
                    letter,
                    method,
                    lr,
                    str(runs[0]["curve"][i]["step"]),
                    show(at("score")),
                    show(at("exact")),
                    show(at("lost"), 3),
                    show(at("drift"), 3),
                    show(at("drift_new")),
                    show(
                        [
                            n["seconds"] * n["curve"][i]["step"] / n["curve"][-1]["step"]
                            for n in runs
                        ],
                        0,
                    ),
                    "" if enough else "never .9",
                ]
            )
        axis.axhline(0, color="black", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_yscale("symlog", linthresh=0.02)  # most of what matters is close to 0
        axis.set_yticks(
            [0, -0.01, -0.02, -0.05, -0.1, -0.2, -0.5, -1],
            ["0", "−.01", "−.02", "−.05", "−.1", "−.2", "−.5", "−1"],
        )
        axis.minorticks_off()
        axis.set(
            title=f"{letter}  {context}",
            xlabel="new task: score, no context",
            xlim=(-0.05, 1.05),
            ylim=(-1.2, 0.01),
        )
    axes[0].set_ylabel("old skills: change of exact match")
    figure.legend(loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    text = (
        "Old skills lost (mean change of exact match over five suites) at the point of a method's runs, over its learning rates and at half and full "
        "length, that loses least while the new task scores at least .9 of the teacher; where none does, at its best score.\n\n"
    )
    return text + table(
        ["method", *(f"{letter} {context}" for letter, context in zip("ABCD", KINDS))],
        list(short.values()),
    ) + "\n\n" + table(
        [
            "",
            "method",
            "lr",
            "steps",
            "score",
            "exact",
            "skills lost",
            "drift, old prompts",
            "KL, new prompts",
            "seconds",
            "note",
        ],
        rows,
    ), figure


def razor_points(records: list[dict]) -> list[dict]:
    """Every measurement of every run, each seed for itself."""
    return [
        {"context": r["job"]["context"], "method": r["job"]["method"]} | row
        for r in records
        for row in r["numbers"]["curve"]
    ]


def r_squared(x: np.ndarray, y: np.ndarray, degree: int) -> float:
    if y.std() == 0:
        return math.nan
    residual = y - np.polyval(np.polyfit(x, y, degree), x)
    return 1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()


def razor_page(records: list[dict], plt) -> tuple[str, object]:
    points, rows = razor_points(records), []
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, constrained_layout=True)
    for axis, key, label in zip(
        axes,
        ("drift_new", "drift"),
        ("measured on the new task's prompts", "measured on the old prompts"),
    ):
        for context, color, marker in zip(
            KINDS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), "osD^"
        ):
            own = [p for p in points if p["context"] == context]
            axis.plot(
                [p[key] for p in own],
                [p["lost"] for p in own],
                marker,
                color=color,
                markersize=3.5,
                alpha=0.7,
                label=context,
            )
        axis.set(xlabel=f"KL(base‖tuned), nats per token, {label}")
        axis.set_xscale("symlog", linthresh=0.01)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("old skills lost (exact match)")
    axes[0].legend(frameon=False, fontsize=8)
    for context in ("all", "all but live teachers", *KINDS):
        own = [
            p
            for p in points
            if context in ("all", p["context"])
            or (context == "all but live teachers" and p["method"] != "COSD, live teacher")
        ]
        y = np.array([p["lost"] for p in own])
        fits = []
        for key in ("drift_new", "drift"):
            x = np.array([p[key] for p in own])
            fits += [f"{r_squared(x, y, 1):.2f}", f"{r_squared(x, y, 2):.2f}"]
        rows.append([context, str(len(own)), *fits])
    return table(
        [
            "context",
            "measurements",
            "KL on new prompts: R² of a line",
            "of a parabola",
            "KL on old prompts: R² of a line",
            "of a parabola",
        ],
        rows,
    ), figure


def recovery_page(records: list[dict], plt) -> tuple[str, object]:
    runs = [r["numbers"] for r in records]
    figure, axis = plt.subplots(figsize=(6, 3.8), constrained_layout=True)
    steps = [row["step"] for row in runs[0]["curve"]]
    for key, color, label in (
        ("score", "#0072B2", "new verb: score"),
        ("lost", "#D55E00", "old skills lost"),
    ):
        means, halves = zip(
            *(interval([n["curve"][i][key] for n in runs]) for i in range(len(steps)))
        )
        axis.errorbar(steps, means, halves, color=color, marker="o", capsize=3, label=label)
    axis.set(
        xlabel="steps of distillation from the original on plain prompts",
        ylabel="exact match",
        ylim=(-0.05, 1.1),
        title="Recovery after SFT",
    )
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    rows = [
        [
            str(step),
            *(
                show([n["curve"][i][key] for n in runs], 3)
                for key in ("score", "exact", "lost", "drift")
            ),
            show([n["curve"][i]["skills"]["verbs"] for n in runs]),
        ]
        for i, step in enumerate(steps)
    ]
    return table(
        ["steps after SFT", "new verb: score", "exact", "old skills lost", "drift", "known verbs"],
        rows,
    ), figure


def continual_page(records: list[dict], plt) -> tuple[str, object]:
    groups = {key[0]: runs for key, runs in by(records, "name").items()}
    figure, axes = plt.subplots(
        1, len(groups), figsize=(2.5 * len(groups), 2.9), constrained_layout=True
    )
    rows = []
    for axis, (name, runs) in zip(axes, groups.items()):
        matrix = np.array(
            [
                [statistics.fmean(n["stages"][s]["score"][v] for n in runs) for v in range(3)]
                for s in range(3)
            ]
        )
        axis.imshow(matrix, vmin=0, vmax=1, cmap="cividis")
        for s in range(3):
            for v in range(3):
                axis.text(
                    v,
                    s,
                    f"{matrix[s, v]:.2f}",
                    ha="center",
                    va="center",
                    color="white" if matrix[s, v] < 0.6 else "black",
                )
            rows.append(
                [
                    name,
                    STAGES[s][0],
                    *(show([n["stages"][s]["score"][v] for n in runs]) for v in range(3)),
                    show([n["stages"][s]["lost"] for n in runs], 3),
                ]
            )
        axis.set(
            title=name.replace(", ", ",\n"),
            xticks=range(3),
            xticklabels=[s[0] for s in STAGES],
            yticks=range(3),
            yticklabels=[f"after {s[0]}" for s in STAGES] if axis is axes[0] else [""] * 3,
        )
    return table(
        ["method", "after learning", *(f"score on {s[0]}" for s in STAGES), "old skills lost"], rows
    ), figure


def fit_gaussian(
    divergence, x: torch.Tensor, teacher_logits: torch.Tensor, start: float
) -> tuple[float, float, float]:
    """The student is one Gaussian, as logits on a grid: our own divergences apply. -> (its mean, its deviation, the divergence)."""
    mu, log_sigma = (
        torch.tensor(start, dtype=x.dtype, requires_grad=True),
        torch.zeros((), dtype=x.dtype, requires_grad=True),
    )
    optimizer = torch.optim.Adam([mu, log_sigma], lr=0.05)
    for _ in range(600):
        loss = divergence(-(((x - mu) / log_sigma.exp()) ** 2) / 2, teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mu.item(), log_sigma.exp().item(), loss.item()


def fit_factors(divergence, teacher_logits: torch.Tensor, seed: int) -> torch.Tensor:
    """The student says two words independently of each other, logits u_a + v_b: too small for "the one or the other". -> Q (4, 4)."""
    u, v = (
        torch.randn(4, generator=torch.Generator().manual_seed(seed + i)).double().requires_grad_()
        for i in (0, 100)
    )
    optimizer = torch.optim.Adam([u, v], lr=0.05)
    for _ in range(1000):
        loss = divergence((u[:, None] + v).flatten(), teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (u[:, None] + v).flatten().softmax(-1).view(4, 4).detach()


def modes_page(records: list[dict], plt) -> tuple[str, object]:
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), constrained_layout=True)
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    teacher = torch.logaddexp(
        math.log(0.65) - ((x + 2) / 0.6) ** 2 / 2 - math.log(0.6),
        math.log(0.35) - ((x - 2) / 0.9) ** 2 / 2 - math.log(0.9),
    )
    both = torch.full((4, 4), 0.02 / 14, dtype=torch.float64)
    both[0, 0] = both[1, 1] = 0.49
    density = lambda logits: logits.softmax(-1) / (x[1] - x[0])
    axes[0].fill_between(x, density(teacher), color="#CCCCCC", label="teacher")
    toy, colors = (
        [],
        dict(zip((*DIVERGENCES, "policy_gradient"), ("#0072B2", "#D55E00", "#009E73", "#CC79A7"))),
    )
    for name, divergence in DIVERGENCES.items():
        mu, sigma, value = min(
            (fit_gaussian(divergence, x, teacher, start) for start in (-2.0, 0.0, 2.0)),
            key=lambda fit: fit[2],
        )
        axes[0].plot(x, density(-(((x - mu) / sigma) ** 2) / 2), color=colors[name], label=name)
        fits = [fit_factors(divergence, both.log().flatten(), seed) for seed in range(8)]
        q = min(fits, key=lambda q: divergence(q.log().flatten(), both.log().flatten()).item())
        toy.append(
            [
                name,
                f"{mu:.2f}",
                f"{sigma:.2f}",
                f"{value:.3f}",
                f"{q[0, 0] + q[1, 1]:.2f}",
                f"{q[0, 1] + q[1, 0]:.2f}",
                f"{max(q[0, 0], q[1, 1]):.2f}",
            ]
        )
    axes[0].set(title="One Gaussian for two modes", xlabel="x", ylabel="density")
    right = torch.logspace(
        -6, -0.01, 60, dtype=torch.float64
    )  # the student's probability of the right one of ten tokens
    student = (
        torch.cat(
            [
                right[:, None],
                ((1 - right) * 0.99)[:, None],
                ((1 - right) * 0.01 / 8)[:, None].expand(-1, 8),
            ],
            dim=1,
        )
        .log()
        .requires_grad_()
    )
    knows = torch.tensor([0.991] + [0.001] * 9, dtype=torch.float64).log().expand_as(student)
    for name, divergence in DIVERGENCES.items():
        (gradient,) = torch.autograd.grad(divergence(student, knows).sum(), student)
        axes[1].loglog(right, gradient[:, 0].abs(), color=colors[name], label=name)
    axes[1].set(
        title="A confident student: pull on the right token",
        xlabel="student's probability of it",
        ylabel="|dL / dlogit|",
    )
    groups = {key[0]: runs for key, runs in by(records, "name").items()}
    rows, bars = (
        [],
        {
            "base": [n["base"] for n in next(iter(groups.values()))],
            "teacher": [n["teacher"] for n in next(iter(groups.values()))],
        }
        | {name: [n["student"] for n in runs] for name, runs in groups.items()},
    )
    for i, (name, runs) in enumerate(bars.items()):
        keys = ("reverse", "rotate", "neither", "distinct", "entropy")
        rows.append([name, *(show([n[key] for n in runs]) for key in keys)])
        bottom = 0.0
        for key, color in zip(keys[:3], ("#0072B2", "#E69F00", "#BBBBBB")):
            mean = statistics.fmean(n[key] for n in runs)
            axes[2].bar(i, mean, bottom=bottom, color=color, label=key if not i else None)
            bottom += mean
    axes[2].set(
        title="In the world: two demonstrations that disagree",
        ylabel="share of 16 samples",
        xticks=range(len(bars)),
        xticklabels=[n.replace("_", "\n") for n in bars],
        ylim=(0, 1.35),
    )
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    text = table(
        [
            "divergence",
            "Gaussian: mean",
            "deviation",
            "divergence left",
            "two words: on the two modes",
            "on mixtures of them",
            "on the likelier mode",
        ],
        toy,
    )
    return text + "\n\n" + table(
        [
            "who",
            "says reverse",
            "rotate",
            "neither",
            "different answers of 16",
            "entropy, nats per token",
        ],
        rows,
    ), figure


def quality_page(records: list[dict], plt) -> tuple[str, object]:
    figure, axis = plt.subplots(figsize=(5.4, 5), constrained_layout=True)
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    rows, groups = [], by(records, "context", "name")
    for (context, name), runs in groups.items():
        (x, dx), (y, dy) = (interval([n[key] for n in runs]) for key in ("teacher", "student"))
        axis.errorbar(
            x,
            y,
            dy,
            dx,
            fmt="s" if name.startswith("weak") else "o",
            color=dict(zip(KINDS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7")))[context],
            capsize=2,
        )
        axis.annotate(
            name.replace("demonstrations ", "").replace(f", {context}", ""),
            (x, y),
            textcoords="offset points",
            xytext=(6, 6 if name.startswith("weak") else -10),
            fontsize=8,
        )
        rows.append(
            [
                context,
                name,
                *(show([n[key] for n in runs]) for key in ("teacher", "student", "lost")),
            ]
        )
    axis.set(
        xlabel="teacher's score, in its worse context",
        ylabel="student's score after COSD",
        xlim=(-0.05, 1.1),
        ylim=(-0.05, 1.1),
    )
    axis.spines[["top", "right"]].set_visible(False)
    return table(["type", "context", "teacher", "student after", "old skills lost"], rows), figure


def rote_page(records: list[dict], plt) -> tuple[str, object]:
    """Each method at its highest learning rate."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    sets, rows = (
        {
            "specification": ["trained", "held out"],
            "privileged": [f"{n} verbs" for n in (2, 3, 4, 5)],
        },
        [],
    )
    for method, (_, rates) in METHODS.items():
        row = [method, f"{rates[-1]:g}"]
        for axis, (context, names) in zip(axes, sets.items()):
            runs = by(records, "context", "method", "name").get(
                (context, method, f"{method}, lr {rates[-1]:g}"), []
            )
            values = [[n["beyond"].get(name, n["score"]) for n in runs] for name in names]
            row += [show(v) if v else "" for v in values]
            if runs and method in (
                "SFT",
                "SFT + replay",
                "offline",
                "COSD forward KL",
                "COSD + anchors ½",
            ):
                axis.plot(
                    names,
                    [statistics.fmean(v) for v in values],
                    marker=MARKERS[method],
                    color=COLORS[FAMILY.get(method, "COSD")],
                    label=method,
                )
        rows.append(row)
    for axis, title in zip(
        axes, ("B: items trained on, and held out", "D: trained on chains of 2 and 3 verbs")
    ):
        axis.set(title=title, ylabel="score, no context", ylim=(0, 1.05))
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=8)
    return table(
        [
            "method",
            "lr",
            *(f"{letter}: {name}" for letter, names in zip("BD", sets.values()) for name in names),
        ],
        rows,
    ), figure


def straight_page(records: list[dict], plt) -> tuple[str, object]:
    groups = {key[0]: runs for key, runs in by(records, "name").items()}
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), constrained_layout=True)
    rows = []
    for name, runs in groups.items():
        alphas = [row["alpha"] for row in runs[0]["line"]]
        for axis, key in zip(axes, ("score", "lost", "loss on the new task", "loss on old data")):
            axis.plot(
                alphas,
                [statistics.fmean(n["line"][i][key] for n in runs) for i in range(len(alphas))],
                marker="o",
                color={"SFT": "#D55E00", "COSD": "#0072B2"}.get(name, "#009E73"),
                label=name,
            )
        rows += [
            [
                name,
                f"{alpha:.2f}",
                *(
                    show([n["line"][i][key] for n in runs], 3)
                    for key in ("score", "lost", "loss on the new task", "loss on old data")
                ),
            ]
            for i, alpha in enumerate(alphas)
        ]
    for axis, title, unit in zip(
        axes,
        ("new verb", "old skills lost", "new task", "old data"),
        ("score", "exact match", "−log p, nats per token", "−log p, nats per token"),
    ):
        axis.set(title=title, ylabel=unit, xlabel="α: base (0) to tuned (1)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    return table(
        ["method", "α", "score", "old skills lost", "loss on the new task", "loss on old data"],
        rows,
    ), figure


def real_page(records: list[dict], plt) -> tuple[str, object]:
    groups = {key[0]: runs for key, runs in by(records, "name").items()}
    others, rows = list(next(iter(groups.values()))[0]["others before"]), []
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for i, (name, runs) in enumerate(groups.items()):
        change = lambda after, before: [n[after] - n[before] for n in runs]
        moved = {
            other: [n["others after"][other] - n["others before"][other] for n in runs]
            for other in others
        }
        rows.append(
            [
                name,
                *(
                    ""
                    if runs[0][key] is None or (key == "teacher" and name.endswith("SFT"))
                    else show([n[key] for n in runs])
                    for key in (
                        "teacher",
                        "before",
                        "after",
                        "exact",
                        "perplexity_before",
                        "perplexity_after",
                    )
                ),
                *(show(values) for values in moved.values()),
                show([n["drift_new"] for n in runs], 3),
                show([n["seconds"] for n in runs], 0),
            ]
        )
        color = "#0072B2" if name.endswith("COSD") else "#D55E00"
        for axis, values in zip(
            axes,
            (
                [n["after"] for n in runs],
                change("perplexity_after", "perplexity_before"),
                [statistics.fmean(v) for v in zip(*moved.values())],
            ),
        ):
            mean, half = interval(values)
            axis.bar(i, mean, yerr=half, color=color, capsize=3)
    for axis, title, unit in zip(
        axes,
        ("new behaviour", "plain English", "two other skills, in context"),
        ("score", "change of perplexity", "change of score"),
    ):
        axis.set(
            title=title,
            ylabel=unit,
            xticks=range(len(groups)),
            xticklabels=[name.replace(", ", "\n") for name in groups],
        )
        axis.axhline(0, color="black", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    said = [
        [name, *(text.replace("\n", " ⏎ ").replace("|", "\\|") for text in runs[0]["said"][:3])]
        for name, runs in groups.items()
    ]
    return (
        table(
            [
                "run",
                "teacher",
                "before",
                "after",
                "exact",
                "perplexity before",
                "after",
                *(f"{o}: change" for o in others),
                "KL(base‖tuned)",
                "seconds",
            ],
            rows,
        )
        + "\n\nFirst answers, without context, of the first seed:\n\n"
        + table(["run", "", "", ""], said)
    ), figure


# name: (where its runs are, its page, question)
EXPERIMENTS = {
    "forgetting": (
        "forgetting",
        forgetting_page,
        "At equal score on the new task, which method loses least of what the model knew?",
    ),
    "razor": (
        "forgetting",
        razor_page,
        "Does KL(base‖tuned) on the new task predict forgetting, or KL on the old prompts?",
    ),
    "recovery": (
        "recovery",
        recovery_page,
        "Do skills that SFT destroyed come back when the original model is the teacher, and does the new one stay?",
    ),
    "continual": (
        "continual",
        continual_page,
        "Three new verbs in a row: what is left of the first when the third is learned?",
    ),
    "modes": (
        "modes",
        modes_page,
        "What does each divergence do with a teacher that has two modes?",
    ),
    "quality": (
        "quality",
        quality_page,
        "Can the student be better than a teacher with a bad context?",
    ),
    "rote": ("forgetting", rote_page, "Is it the rule that is learned, or the examples?"),
    "straight": (
        "straight",
        straight_page,
        "Is there a barrier on the straight line from base to tuned weights?",
    ),
    "real": (
        "real",
        real_page,
        "SmolLM2: do alien demonstrations cost more than the model's own words?",
    ),
}


# ========================================================================================================= 4. main
def commit() -> str:
    git = lambda *what: subprocess.run(
        ["git", "-C", str(ROOT), *what], capture_output=True, text=True
    )
    head = git("rev-parse", "--short", "HEAD")
    return (
        head.stdout.strip()
        + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")
        if head.returncode == 0
        else "unknown"
    )


def write_page(name: str, records: list[dict], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    source, page, question = EXPERIMENTS[name]
    text, figure = page(records, plt)
    figure.savefig(options.out / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    seeds = len({r["job"]["seed"] for r in records})
    about = f"{seeds} seeds, mean ± half the 95 % confidence interval; {sum(r['wall_seconds'] for r in records) / 60:.0f} core-minutes of runs."
    (options.out / f"{name}.md").write_text(
        f"# {question}\n\n    python notebooks/evidence.py {name}\n\n{about}\n\n![{name}]({name}.png)\n\n{text}\n"
    )
    (options.out / f"{source}.json").write_text(
        json.dumps(
            [
                {"name": r["job"]["name"], "context": r["job"]["context"], "seed": r["job"]["seed"]}
                | r["numbers"]
                for r in records
            ],
            indent=0,
        )
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="*", help=f"{', '.join(EXPERIMENTS)}; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes at a time, one thread each"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "evidence")
    parser.add_argument(
        "--bases", type=Path, default=ROOT / "out", help="where pretrained bases are kept"
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=ROOT / "out" / "SmolLM2-135M-Instruct",
        help="for `real`; without it that one is left out",
    )
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="`real` in bf16 autocast: for CPUs that have it in hardware",
    )
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(argv)
    if unknown := set(options.what) - set(EXPERIMENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(EXPERIMENTS)}")
    if min(options.seeds, options.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    wanted = options.what or list(EXPERIMENTS)
    if "real" in wanted and not (options.model / "config.json").exists():
        print(
            f"real is left out: no model in {options.model} (python notebooks/smollm2.py makes it)"
        )
        wanted.remove("real")
    if options.smoke and options.bases == ROOT / "out":
        options.bases = options.out
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
    }  # for the workers: one process a core is faster than one on all
    options.commit = commit()
    for folder in (options.out / "runs", options.out / "work"):
        folder.mkdir(parents=True, exist_ok=True)

    sources = list(dict.fromkeys(EXPERIMENTS[name][0] for name in wanted))
    seeds = range(options.seeds)
    bases = [
        job
        for seed in seeds
        for job in jobs_of("base", seed, options.smoke)
        if sources != ["real"] and (job["name"] == "base" or "quality" in sources)
    ]
    jobs = {
        source: [
            job for seed in seeds for job in jobs_of(source, seed, options.smoke, options.bf16)
        ]
        for source in sources
    }
    for stage in (bases, sum(jobs.values(), [])):  # every run needs its base
        todo = [job for job in stage if not done(job, options)]
        with (
            tqdm(
                total=len(stage), initial=len(stage) - len(todo), desc="runs", disable=False
            ) as bar,
            ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool,
        ):
            try:
                running = {pool.submit(do, job, options): job for job in todo}
                for future in as_completed(running):
                    if error := future.exception():
                        raise SystemExit(
                            f"\nevidence.py: {slug(running[future])}: {type(error).__name__}: {error}\nWhat is done is kept; its log is "
                            f"{options.out / 'work' / slug(running[future])}.log"
                        ) from error
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in active_children():  # results are written whole or not at all
                    worker.kill()
                raise
    records = {source: [done(job, options) for job in own] for source, own in jobs.items()}
    if not all(record for own in records.values() for record in own):
        raise SystemExit("evidence.py: the code has changed while it ran: run the command again")
    index = [json.loads(path.read_text()) for path in sorted((options.out / "runs").glob("*.json"))]
    lines = [
        r["job"]
        | {"commit": r["commit"], "wall_seconds": r["wall_seconds"]}
        | {k: v for k, v in r["numbers"].items() if isinstance(v, float)}
        for r in index
    ]
    (options.out / "index.json").write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")
    for name in wanted:
        write_page(name, records[EXPERIMENTS[name][0]], options)
        print(f"{name}: {options.out / name}.md")
    return 0


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # as Ctrl-C: the workers must not outlive this process
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; what is done is kept, the same command goes on", file=sys.stderr)
        sys.exit(130)
