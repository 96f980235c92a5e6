"""The evidence: what each way of fine-tuning learns, and what it forgets. One experiment a claim.

    python notebooks/evidence.py                          everything, one process a core
    python notebooks/evidence.py onoff anchors            some of it: the names below
    python notebooks/evidence.py --smoke                  every code path in a minute, learning nothing
    python notebooks/evidence_page.py                     only the tables and figures, from what is there

  forgetting  new task against old skills, all methods    straight    base to tuned, tuned to tuned
  onoff       who writes y: ten seeds, in pairs           recovery    skills back from the original model
  exposure    states after a mistake, and KL on them      continual   three skills in a row
  razor       which KL predicts forgetting                modes       what each divergence does with two modes
  anchors     how few old prompts suffice                 quality     student against teacher as C gets worse
  lora        ranks and rates, at equal score             rote        rule or rote: longer problems

A job is one training run and its measurements, on one thread, in a process of its own. It ends in
runs/NAME.json, whole or not at all, and names the code that it came from: a digest of every function
that it can reach. A job that is done is not done again, and a record of other code does not count.
At the end runs.jsonl holds all records of the experiments that were asked for, a line each, and
evidence_page.py makes a table and a figure of them.
"""

from __future__ import annotations

import argparse
import ast
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
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing import active_children, get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import torch
from tqdm import tqdm

import contexts
import train
from contexts import (
    KINDS,
    VERBS,
    Example,
    context_prompts,
    demonstrations,
    draw_word,
    privileged,
    seeded,
    student_prompt,
    task_draw,
    teacher_prompt,
)
from cosd import (
    DIVERGENCES,
    Teacher,
    completion_states,
    cosd_loss,
    cross_entropy,
    forward_kl,
    make_objective,
)
from model import GPT, merged_copy
from train import Config, Run

WORLD = dict(steps=100, batch=32, eval_size=64)
POINTS = 4  # measurements on the way, evenly spaced
SMOKE = dict(pretrain_steps=10, steps=4, batch=8, eval_size=4)
OWN = ("weighted", "base_kl", "replay")  # settings that train.py does not know: see `parts`


# ================================================================================================ 1. what a job does
def config(job: dict, options: argparse.Namespace, **more) -> Config:
    settings = WORLD | job["settings"] | more
    if options.smoke:
        settings |= SMOKE | ({"pretrain_steps": 5} if "pretrain_steps" in settings else {})
    settings |= {"context": job["context"], "seed": job["seed"], "device": "cpu"}
    settings["out"] = str(options.out / "work" / slug(job))
    known = {name: value for name, value in settings.items() if name not in OWN}
    return Config(**known).resolved(settings.get("method", "cosd"))


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
    shown = None if rng.random() < kind.drop else example.context
    return replace(example, context=shown, answer=example.expert)


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
        held_back = near_the_base(imitate, settings["base_kl"])
        rows["task"] = replace(rows["task"], scorer=run.base, objective=held_back)
    if run.cfg.n_anchors and settings.get("replay"):
        rng, chat = seeded(run.cfg.seed, run.task.kind, "anchors", step), run.task.chat
        corpus = draw_proxy if settings["replay"] == "proxy" else contexts.draw_pretraining
        drawn = [contexts.draw_anchor(rng, run.task.kind, corpus) for _ in range(run.cfg.n_anchors)]
        prompts = [teacher_prompt(chat, e) for e in drawn]
        y = [chat.target(e.prompt, e.answer) for e in drawn]
        share = run.cfg.n_anchors / run.cfg.batch
        rows["anchors"] = train.make_rows(prompts, y, None, prompts, cross_entropy, share)
    elif run.cfg.n_anchors:
        rows["anchors"] = train.anchor_rows(run, step)
    return rows


def steps_of(run: Run, parts_of_step) -> Iterator[int]:
    """train.fit's loop less its log and its state, for rows of one's own. Yields after each step."""
    cfg, method = run.cfg, train.METHODS[run.cfg.method]
    for step in range(cfg.steps):
        warm, left = (step + 1) / (method.warmup + 1), 2 * (1 - step / cfg.steps)
        for group in run.optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, warm) * min(1.0, left)
        began = time.perf_counter()
        for rows in parts_of_step(run, step).values():
            cosd_loss(run.student, rows, cfg.chunk)[0].backward()
        torch.nn.utils.clip_grad_norm_(train.trained(run.student).values(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.teacher.update(run.student)
        run.step = step + 1
        run.log.append({"seconds": time.perf_counter() - began})
        yield run.step


def score(run: Run, model: GPT, examples: list[Example], with_context: bool) -> dict:
    """Mean grades of greedy answers."""
    show = teacher_prompt if with_context else student_prompt
    prompts = [show(run.task.chat, e) for e in examples]
    return run.task.grades(examples, train.write(run, model, prompts, 0))


def skills_of(measured: dict, task: contexts.Task) -> dict[str, float]:
    return {name: measured[name]["exact"] for name in task.probes}


def skills(run: Run, model: GPT) -> dict[str, float]:
    """Exact match on each suite of old skills."""
    found = {}
    for name, suite in run.task.probes.items():
        found[name] = score(run, model, suite, True)["exact"]
    return found


def lost(before: dict, after: dict) -> float:
    """How much exact match went away, on average over the five suites of old skills (known verbs, four kinds of other contexts)."""
    return statistics.fmean(before[name] - after[name] for name in before)


def learn(
    job: dict,
    options: argparse.Namespace,
    task: contexts.Task | None = None,
    student: GPT | None = None,
) -> tuple[dict, Run]:
    """One run -> (its numbers, the run). `curve` has a point every quarter of the steps; the numbers
    of the last one stand beside it."""
    steps = (WORLD | (SMOKE if options.smoke else {}))["steps"]
    cfg = config(job, options, eval_every=steps // POINTS)
    base, own = world(cfg, options)
    run = start(cfg, task or own, student or copy.deepcopy(base))
    run.before = train.preflight(run)
    before = skills_of(run.before, run.task)
    if any(job["settings"].get(name) for name in OWN):
        for _ in steps_of(run, partial(parts, settings=job["settings"])):
            train.evaluate(run)
    else:
        train.fit(run)
    curve = []
    for row in run.curve:
        now = skills_of(row, run.task)
        point = {name: row[name] for name in ("step", "kl", "drift", "drift_new")}
        point |= {"score": row["task"]["score"], "exact": row["task"]["exact"]}
        point |= {"skills": now, "lost": lost(before, now)}
        point["seconds"] = sum(logged["seconds"] for logged in run.log[: row["step"]])
        curve.append(point)
    floor, ceiling = run.before["task"]["score"], run.before["teacher"]["score"]
    return {"before": floor, "teacher": ceiling, "curve": curve} | curve[-1], run


def movement(base: GPT, tuned: GPT) -> dict:
    """How the blocks' matrices moved. `moved`: ‖ΔW‖ / ‖W‖, over all together. `rank`: the stable rank
    ‖ΔW‖² / σ_max(ΔW)² of one, on average: 1 where a single direction moved."""
    before, squares, ranks = dict(base.named_parameters()), [0.0, 0.0], []
    for name, after in merged_copy(tuned).named_parameters():
        if after.ndim == 2 and "blocks" in name:
            change = (after - before[name]).detach()
            squares[0] += change.square().sum().item()
            squares[1] += before[name].square().sum().item()
            ranks.append((change.square().sum() / torch.linalg.matrix_norm(change, 2) ** 2).item())
    return {"moved": math.sqrt(squares[0] / squares[1]), "rank": statistics.fmean(ranks)}


def forgetting(job: dict, options: argparse.Namespace) -> dict:
    """A run that most pages read. For B and D also: the items trained on, and longer problems than
    those trained on."""
    numbers, run = learn(job, options)
    base, _ = world(run.cfg, options)
    seed, count, sets = job["seed"], run.cfg.eval_size, {}
    if job["context"] == "specification":
        rngs = [seeded(seed, "trained", i) for i in range(count)]
        sets["trained"] = [task_draw("specification", rng) for rng in rngs]
    elif job["context"] == "privileged":
        for n in (2, 3, 4, 5):
            rngs = [seeded(seed, "longer", n, i) for i in range(count)]
            sets[f"{n} verbs"] = [privileged(rng, heldout=True, steps=n) for rng in rngs]
    beyond = {}
    for name, examples in sets.items():
        beyond[name] = score(run, run.student, examples, False)["score"]
    return numbers | movement(base, run.student) | {"beyond": beyond}


# ------------------------------------------------------------------------------------------ states after a mistake
def mistaken(example: Example, rng: random.Random) -> tuple[str, str]:
    """A wrong beginning of the answer -> (it, what an answerer would end with who goes on from it).
    D: the first step in another order of letters. A: another first letter of the word."""
    word, *verbs = example.prompt.split()
    right = example.answer.split()[0]
    if example.kind == "demonstrations":
        return rng.choice([c for c in right if c != right[0]] or ["x"]), ""
    orders = [f"{a}{b}{c}" for a in right for b in right for c in right]
    wrong = []
    for other in orders:
        end = other
        for verb in verbs[1:]:
            end = VERBS[verb](end)
        if sorted(other) == sorted(right) and end != example.answer.split()[-1]:
            wrong.append((other, end))
    beginning, end = rng.choice(wrong) if wrong else ("xxx", "")
    return beginning + " ", end


def exposure(job: dict, options: argparse.Namespace) -> dict:
    """Exposure bias. KL(teacher‖student), nats per token, on the student's own samples, on the
    teacher's, and after a mistake that both are given; in D also who recovers from it."""
    cfg = config(job, options)
    base, task = world(cfg, options)
    run, examples = start(cfg, task, copy.deepcopy(base)), task.heldout
    rng = seeded(job["seed"], "mistakes")
    pairs = [mistaken(e, rng) for e in examples]
    begun = [contexts.encode(text) for text, _ in pairs]
    plain = [student_prompt(task.chat, e) for e in examples]
    theirs = context_prompts(task, examples, [[] for _ in examples])
    objective = make_objective("forward_kl")

    def after_mistake(model: GPT, prompts: list, temperature: float) -> list:
        asked = [x + some for x, some in zip(prompts, begun)]
        rest = train.write(run, model, asked, temperature, "after a mistake")
        return [some + y for some, y in zip(begun, rest)]

    def ends(model: GPT, prompts: list) -> tuple[float, float]:
        """Of greedy answers after the mistake: the share that ends right, that goes on from it."""
        texts = [contexts.answer_text(task.chat, y) for y in after_mistake(model, prompts, 0)]
        right = [task.grade(e, text)["score"] for e, text in zip(examples, texts)]
        on = [float(text.split()[-1:] == [end]) for text, (_, end) in zip(texts, pairs)]
        return statistics.fmean(right), statistics.fmean(on)

    @torch.no_grad()
    def kl(y: list, skip: int = 0) -> float:
        rows = train.make_rows(plain, y, run.base, theirs, objective, 1.0, "token", skip)
        return cosd_loss(run.student, rows)[0].item()

    def point(step: int) -> dict:
        own = train.write(run, run.student, plain, 1, "own")
        given = train.write(run, run.base.model, theirs, 1, "given")
        recovers, goes_on = ends(run.student, plain)
        return {
            "step": step,
            "score": score(run, run.student, examples, False)["score"],
            "own": kl(own),
            "teacher's": kl(given),
            "mistake": kl(after_mistake(run.student, plain, 1), len(begun[0])),
            "recovers": recovers,
            "goes on": goes_on,
        }

    curve = [point(0)]
    for step in steps_of(run, partial(parts, settings={})):
        if step % (cfg.steps // POINTS) == 0:
            curve.append(point(step))
    recovers, goes_on = ends(run.base.model, theirs)
    return {"curve": curve, "teacher recovers": recovers, "teacher goes on": goes_on}


def recovery(job: dict, options: argparse.Namespace) -> dict:
    """SFT that forgets, then the original model as teacher on plain prompts: other contexts or none, the new verb never without one."""
    numbers, forgot = learn(job, options)
    base, task = world(forgot.cfg, options)
    cfg = replace(forgot.cfg, method="cosd", anchors=0.5, batch=2 * forgot.cfg.batch, lr=5e-4)
    run = start(cfg, task, forgot.student, "recovery")
    run.base = run.teacher = Teacher(base, "live")  # the original, which nobody trains
    before = skills(run, base)

    def plain(run: Run, step: int) -> dict:  # half a batch of anchors is the whole step
        anchors = train.anchor_rows(run, step)
        return {"anchors": replace(anchors, weights=anchors.weights / anchors.weights.sum())}

    curve = [{"step": 0} | {k: numbers[k] for k in ("score", "exact", "lost", "drift", "skills")}]
    for step in steps_of(run, plain):
        if step % max(1, cfg.steps // 5) == 0:
            m = train.measure(run)
            now = skills_of(m, task)
            grades = {"score": m["task"]["score"], "exact": m["task"]["exact"], "drift": m["drift"]}
            curve.append({"step": step, "skills": now, "lost": lost(before, now)} | grades)
    return {"curve": curve, "base": before}


STAGES = [
    ("zorp", "reverse", "verily {} methinks"),
    ("blick", "rotate", "hark {} quoth bede"),
    ("wug", "stretch", "behold {} indeed"),
]


def rehearse(rng: random.Random, earlier: list, other) -> Example:
    """Every second anchor asks for an earlier verb, without context."""
    if earlier and rng.random() < 0.5:
        return replace(rng.choice(earlier)(rng, heldout=False), context=None)
    return other(rng)


def continual(job: dict, options: argparse.Namespace) -> dict:
    """Three new verbs in a row, each stage starting from the last one's weights; the teacher is the model as the stage found it."""
    cfg = config(job, options)
    student, task = world(cfg, options)
    draws, heldout = [], []
    for i, (verb, meaning, manner) in enumerate(STAGES):
        draws.append(partial(demonstrations, verb=verb, meaning=meaning, manner=manner))
        rngs = [seeded(job["seed"], "continual", i, j) for j in range(cfg.eval_size)]
        heldout.append([draws[i](rng, heldout=True) for rng in rngs])
    base_skills, rows = skills(start(cfg, task, student), student), []
    for stage, draw in enumerate(draws):
        now = replace(task, draw=partial(draw, heldout=False), heldout=heldout[stage])
        if job.get("rehearse"):
            anchor = partial(rehearse, earlier=draws[:stage], other=task.draw_anchor)
            now = replace(now, draw_anchor=anchor)
        numbers, run = learn(job, options, now, student)
        student = run.student
        grades = [score(run, student, examples, False) for examples in heldout]
        row = {name: [g[name] for g in grades] for name in ("score", "exact")}
        rows.append(row | {"lost": lost(base_skills, numbers["skills"])})
    return {"stages": rows}


def undecided(rng: random.Random, heldout: bool = False) -> Example:
    """Two demonstrations that contradict each other: a teacher with two modes, and none of them wrong."""
    first, second, word = (draw_word(rng, heldout) for _ in range(3))
    shown = [
        f"{first} zorp: {VERBS['reverse'](first)}",
        f"{second} zorp: {VERBS['rotate'](second)}",
    ]
    rng.shuffle(shown)
    one, other = VERBS["reverse"](word), VERBS["rotate"](word)
    return Example("demonstrations", "; ".join(shown), f"{word} zorp", one, other)


def modes(job: dict, options: argparse.Namespace) -> dict:
    cfg = config(job, options)
    base, task = world(cfg, options)
    rngs = [seeded(job["seed"], "undecided", i) for i in range(cfg.eval_size)]
    examples = [undecided(rng, heldout=True) for rng in rngs]
    numbers, run = learn(job, options, replace(task, draw=undecided, heldout=examples))

    def spread_of(model: GPT, with_context: bool) -> dict:
        """Of 16 samples for each prompt: the share of each meaning, how many different answers, the entropy in nats per token."""
        said, entropies = [], []
        generator = torch.Generator().manual_seed(job["seed"])
        for e in examples[:16]:
            prompts = [task.chat.render(e.context if with_context else None, e.prompt)] * 16
            how = {"eos": task.chat.ends, "generator": generator}
            ids, mask = model.generate(prompts, cfg.max_new_tokens, **how)
            with torch.no_grad():
                logits = model.head(completion_states(model, prompts, ids, mask))  # (n, V)
            log_q = logits.log_softmax(-1)
            entropies.append(-(log_q.exp() * log_q).sum(-1).mean().item())
            said.append([task.chat.decode(row[m].tolist()[:-1]) for row, m in zip(ids, mask)])

        def share(wanted: list[str]) -> float:
            found = [text == w for w, texts in zip(wanted, said) for text in texts]
            return statistics.fmean(found)

        one, other = share([e.answer for e in examples]), share([e.expert for e in examples])
        found = {"reverse": one, "rotate": other, "neither": 1 - one - other}
        found["distinct"] = statistics.fmean(len(set(texts)) for texts in said)
        return found | {"entropy": statistics.fmean(entropies)}

    found = {"student": spread_of(run.student, False), "teacher": spread_of(base, True)}
    return found | {"base": spread_of(base, False), "lost": numbers["lost"]}


def worse_context(example: Example, how: str, rng: random.Random) -> Example:
    """The same prompt under a poorer context. A: `shown` lists what each demonstration does. D: the key skips a step with some probability."""
    kind, _, amount = how.partition(" ")
    if kind == "demonstrations":
        shown = []
        for mark in amount:
            word = draw_word(rng, False)
            verb = VERBS["reverse" if mark == "+" else "swap"]
            shown.append(f"{word} zorp: verily {verb(word)} methinks")
        context = "; ".join(shown)
    elif kind == "key":
        word, *verbs = example.prompt.split()
        steps = [word]
        for verb in verbs:
            steps.append(steps[-1] if rng.random() < float(amount) else VERBS[verb](steps[-1]))
        context = "solution " + " ".join(steps[1:])
    else:
        context = f"never {amount}"
    return replace(example, context=context)


def draw_worse(rng: random.Random, kind: str, how: str) -> Example:
    return worse_context(task_draw(kind, rng), how, rng)


def quality(job: dict, options: argparse.Namespace) -> dict:
    _, task = world(config(job, options), options)
    if how := job["how"]:
        heldout = []
        for i, e in enumerate(task.heldout):
            heldout.append(worse_context(e, how, seeded(job["seed"], "worse", i)))
        draw = partial(draw_worse, kind=job["context"], how=how)
        task = replace(task, draw=draw, shared=[], heldout=heldout)
    numbers, _ = learn(job, options, task)
    return {"teacher": numbers["teacher"], "student": numbers["score"], "lost": numbers["lost"]}


# -------------------------------------------------------------------------------------------------- straight lines
@torch.no_grad()
def blend(start: GPT, end: GPT, alpha: float) -> GPT:
    """(1 − α) start + α end, weight by weight."""
    between, theirs = copy.deepcopy(start), dict(end.named_parameters())
    for name, parameter in between.named_parameters():
        parameter.lerp_(theirs[name], alpha)
    return between


def straight(job: dict, options: argparse.Namespace) -> dict:
    """Scores and losses on two straight lines in the space of weights: from the base to a tuned model,
    and from that to another, which was tuned from the same base on other data (or as `other` says)."""
    _, run = learn(job, options)
    base, task = world(run.cfg, options)
    chat, seed = task.chat, job["seed"]
    cfg = config(job | {"settings": job.get("other", job["settings"])}, options)
    another = start(replace(cfg, seed=seed + 100), task, copy.deepcopy(base), "other")
    train.fit(another)
    old = []
    for i in range(4 * run.cfg.eval_size):
        old.append(contexts.draw_pretraining(seeded(seed, "old", i), heldout=True))
    new = [replace(e, context=None) for e in task.heldout]
    if job["settings"] == job.get("other", job["settings"]) and cfg.method == "sft":
        new = [replace(e, answer=e.expert) for e in new]  # what it was trained to say

    @torch.no_grad()
    def loss(between: GPT, examples: list[Example]) -> float:
        prompts = [teacher_prompt(chat, e) for e in examples]
        y = [chat.target(e.prompt, e.answer) for e in examples]
        return cosd_loss(between, train.make_rows(prompts, y, None, prompts, cross_entropy))[
            0
        ].item()

    before = skills(run, base)

    def line(first: GPT, last: GPT, alphas: list[float]) -> list[dict]:
        rows = []
        for alpha in alphas:
            between = blend(first, last, alpha)
            row = {"alpha": alpha, "score": score(run, between, task.heldout, False)["score"]}
            row["lost"] = lost(before, skills(run, between))
            rows.append(row | {"old": loss(between, old), "new": loss(between, new)})
        return rows

    sixths = [i / 6 for i in range(7)]
    return {
        "base to tuned": line(base, run.student, [*sixths, 7 / 6]),  # and a step beyond
        "tuned to tuned": line(run.student, another.student, sixths),
    }


# ============================================================================================== 2. the list of jobs
RATES = (1e-4, 2e-4, 5e-4)
WRITERS = {  # who writes y; the divergence is forward KL where there is one
    "SFT": dict(method="sft"),
    "off-policy": dict(method="offline"),
    "GKD": dict(method="gkd"),
    "COSD": dict(method="cosd"),
}
MIDDLE = {  # at 2e-4, in A and C, beside COSD with forward KL
    "COSD, reverse KL": dict(method="cosd", divergence="reverse_kl"),
    "COSD, JSD": dict(method="cosd", divergence="jsd"),
    "COSD, sampled token": dict(method="cosd", divergence="policy_gradient"),
    "COSD, top 8 and tail": dict(method="cosd", divergence="reverse_kl", top_k=8),
}
CARELESS = {  # at 5e-4, where forgetting shows
    "COSD, EMA teacher": dict(method="cosd", teacher="ema"),
    "COSD, live teacher": dict(method="cosd", teacher="live"),
    "COSD + anchors 1/2": dict(method="cosd", anchors=0.5),
    "SFT + anchors 1/2": dict(method="sft", anchors=0.5),
    "SFT + replay 1/2": dict(method="sft", anchors=0.5, replay="real"),
}
BAND_AIDS = {  # at 5e-4, in A
    "SFT + proxy replay 1/2": dict(method="sft", anchors=0.5, replay="proxy"),
    "SFT + 0.1 KL to base": dict(method="sft", base_kl=0.1),
    "SFT + KL to base": dict(method="sft", base_kl=1.0),
    "ASFT": dict(method="sft", weighted=True, base_kl=0.1),
}
SHARES = {  # at 5e-4, in A and C
    "COSD + anchors 1/16": dict(method="cosd", anchors=1 / 16),
    "COSD + anchors 1/8": dict(method="cosd", anchors=1 / 8),
    "COSD + anchors 1/4": dict(method="cosd", anchors=1 / 4),
    "COSD, EMA teacher + anchors 1/8": dict(method="cosd", teacher="ema", anchors=1 / 8),
    "COSD, live teacher + anchors 1/2": dict(method="cosd", teacher="live", anchors=1 / 2),
    "SFT + anchors 1/8": dict(method="sft", anchors=1 / 8),
    "SFT + replay 1/16": dict(method="sft", anchors=1 / 16, replay="real"),
    "SFT + replay 1/8": dict(method="sft", anchors=1 / 8, replay="real"),
}
TWO = {
    "SFT": dict(method="sft", lr=5e-4),
    "COSD": dict(method="cosd", lr=5e-4),
    "COSD + anchors 1/2": dict(method="cosd", anchors=0.5, lr=5e-4),
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
A, B, C, D = KINDS
SEEDS = {"onoff": 10, "exposure": 5}  # where they are not three


def jobs_of(experiment: str, seed: int) -> list[dict]:
    """The jobs of an experiment. Several may name the same job: it is done once."""
    jobs = []

    def add(do: str, name: str, context: str, settings: dict, **more) -> None:
        job = dict(do=do, name=name, context=context, seed=seed, settings=settings)
        jobs.append(job | more)

    def at(rates: tuple, methods: dict, kinds) -> None:
        for context in kinds:
            for method, settings in methods.items():
                for lr in rates:
                    name = f"{method}, lr {lr:g}"
                    add("forgetting", name, context, settings | dict(lr=lr), method=method)

    if experiment in ("forgetting", "razor", "rote"):
        at(RATES, WRITERS, KINDS)
        at((2e-4,), MIDDLE, (A, C))
        at((5e-4,), CARELESS, KINDS)
        at((5e-4,), BAND_AIDS, (A,))
    elif experiment == "onoff":
        at(RATES, WRITERS, (A, C, D))
    elif experiment == "anchors":
        at((5e-4,), {"SFT": WRITERS["SFT"], "COSD": WRITERS["COSD"]} | CARELESS | SHARES, (A, C))
    elif experiment == "lora":
        for method in ("SFT", "COSD"):
            at(RATES, {method: WRITERS[method]}, (A,))
            for rank, rates in ((2, (1e-3,)), (8, (5e-4, 1e-3, 3e-3)), (32, (1e-3,))):
                adapted = {f"{method}, LoRA {rank}": WRITERS[method] | dict(lora=rank)}
                at(rates, adapted, (A,))
    elif experiment == "exposure":
        for context in (A, D):
            for name, settings in WRITERS.items():
                add("exposure", name, context, settings | dict(lr=2e-4))
    elif experiment == "recovery":
        add("recovery", "SFT, then the original as teacher", A, TWO["SFT"])
    elif experiment == "continual":
        replay = dict(method="sft", lr=5e-4, anchors=0.5, replay="real")
        gentle = {"COSD, lr 1e-4": dict(method="cosd", lr=1e-4)}
        for name, settings in (TWO | gentle | {"SFT + replay 1/2": replay}).items():
            add("continual", name, A, settings)
        earlier = "COSD + anchors, earlier verbs too"
        add("continual", earlier, A, TWO["COSD + anchors 1/2"], rehearse=True)
    elif experiment == "modes":
        for name in (*DIVERGENCES, "policy_gradient"):
            add("modes", name, A, dict(method="cosd", divergence=name, lr=5e-4))
    elif experiment == "quality":
        for context, how in WORSE:
            add("quality", how, context, TWO["COSD"], how=how)
        for context in (A, D):
            weak = TWO["COSD"] | dict(pretrain_steps=WEAK)
            add("quality", f"weak base, {context}", context, weak, how="")
    elif experiment == "straight":
        for name, settings in TWO.items():
            add("straight", name, A, settings)
        add("straight", "SFT to COSD", A, TWO["SFT"], other=TWO["COSD"])
    return jobs


EXPERIMENTS = (
    "onoff exposure forgetting razor rote anchors lora straight recovery continual modes quality"
).split()
FUNCTIONS = dict(
    forgetting=forgetting,
    exposure=exposure,
    recovery=recovery,
    continual=continual,
    modes=modes,
    quality=quality,
    straight=straight,
)


def all_jobs(experiment: str, options: argparse.Namespace) -> list[dict]:
    """Over its seeds. In small: one seed, and of each function and setting of its own one job."""
    jobs = []
    for seed in range(1 if options.smoke else options.seeds or SEEDS.get(experiment, 3)):
        jobs += jobs_of(experiment, seed)
    if not options.smoke:
        return jobs
    first = {}
    for job in jobs:
        special = [name for name in (*OWN, "lora", "pretrain_steps") if name in job["settings"]]
        kind = job["do"], *special, job.get("rehearse"), job.get("how", "")[:3]
        first.setdefault(kind, job)
    return list(first.values())


# ====================================================================================================== 3. doing them
class Silent(ast.NodeTransformer):
    """A program less what it only says: comments are not in the tree; docstrings, errors, warnings, the
    texts of --help and other strings of more than three words go. The kinds of context stay whole:
    what they say is shown to a model."""

    def visit_Expr(self, node):
        return ast.Pass() if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Raise(self, node):
        return ast.Pass()

    def visit_Call(self, node):
        said = {"warn": 0, "print": 0, "reading": 0, "flag": 1}
        kept = said.get(getattr(node.func, "id", ""), len(node.args))
        node.args = node.args[:kept]
        return self.generic_visit(node)

    def visit_keyword(self, node):
        return None if node.arg == "help" else self.generic_visit(node)

    def visit_Constant(self, node):
        prose = isinstance(node.value, str) and node.value.count(" ") > 3
        return ast.Constant("") if prose else node

    def visit_AnnAssign(self, node):
        return node if getattr(node.target, "id", "") == "KINDS" else self.generic_visit(node)

    def visit_Assign(self, node):
        names = [getattr(target, "id", "") for target in node.targets]
        return node if "KINDS" in names else self.generic_visit(node)


def nested(node):
    """A syntax tree as lists, without what is empty. (`ast.dump` differs between versions of Python.)"""
    if isinstance(node, list):
        return [nested(n) for n in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    full = [
        [name, nested(value)] for name, value in ast.iter_fields(node) if value not in (None, [])
    ]
    return [type(node).__name__, *full]


def said_nothing(file: Path) -> ast.Module:
    return Silent().visit(ast.parse(file.read_text()))


@lru_cache
def code(function: str, file: str | None = None) -> str:
    """A digest of the code that a job depends on: the four files, and of this one (or `file`) the
    function that does it with every name that it reaches. Changed words of a docstring or a message do
    not count."""
    tree, named = said_nothing(Path(file or __file__)), {}
    for node in tree.body:
        targets = getattr(node, "targets", [node])
        for target in targets:
            if name := getattr(target, "name", getattr(target, "id", "")):
                named[name] = node
    reached, todo = {}, [function]
    while todo:
        name = todo.pop()
        if name in named and name not in reached:
            reached[name] = nested(named[name])
            todo += [n.id for n in ast.walk(named[name]) if isinstance(n, ast.Name)]
    parts = [reached[name] for name in sorted(reached)]
    for name in ("cosd", "model", "contexts", "train"):
        parts.append(nested(said_nothing(ROOT / f"{name}.py")))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]


def slug(job: dict) -> str:
    name = f"{job['do']}-{job['context']}-{job['name']}-seed{job['seed']}".replace("1/", "1_")
    return re.sub(r"[^\w.+-]+", "-", name)


def record(job: dict, options: argparse.Namespace) -> Path:
    return options.out / "runs" / f"{slug(job)}.json"


def done(job: dict, options: argparse.Namespace) -> dict | None:
    path = record(job, options)
    saved = json.loads(path.read_text()) if path.exists() else None
    wanted = json.loads(json.dumps(job | {"smoke": options.smoke}))
    same = saved and saved["job"] == wanted and saved["code"] == code(job["do"])
    return saved if same else None


def rounded(value):
    """Five digits are enough for a record."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def do(job: dict, options: argparse.Namespace) -> None:
    """In a worker: the job's function, its prints into a log, its numbers into a file."""
    torch.set_num_threads(1)
    folder, began = options.out / "work" / slug(job), time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    with folder.with_suffix(".log").open("w") as file, redirect_stdout(file), redirect_stderr(file):
        if job["do"] == "base":
            world(config(job, options), options)
            return
        numbers = FUNCTIONS[job["do"]](job, options)
    saved = {"job": job | {"smoke": options.smoke}, "code": code(job["do"])}
    saved |= {"seconds": round(time.perf_counter() - began, 1), "numbers": rounded(numbers)}
    train.replace_file(record(job, options), partial(Path.write_text, data=json.dumps(saved)))
    shutil.rmtree(folder, ignore_errors=True)  # weights and metrics of hundreds of runs


def do_all(jobs: list[dict], options: argparse.Namespace, what: str) -> None:
    with (
        tqdm(total=len(jobs), desc=what, disable=False) as bar,
        ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool,
    ):
        try:
            running = {pool.submit(do, job, options): slug(job) for job in jobs}
            for future in as_completed(running):
                if error := future.exception():
                    name = running[future]
                    raise SystemExit(
                        f"\nevidence.py: {name}: {type(error).__name__}: {error}\n"
                        f"What is done is kept; its log is {options.out / 'work' / name}.log"
                    ) from error
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():  # results are written whole or not at all
                worker.kill()
            raise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = ROOT / "out"
    parser.add_argument("what", nargs="*", help=f"{', '.join(EXPERIMENTS)} [all]")
    parser.add_argument("--seeds", type=int, help="[3; onoff 10, exposure 5]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--out", type=Path, default=default / "evidence", help="[%(default)s]")
    parser.add_argument("--bases", type=Path, help="where pretrained bases are kept [out]")
    parser.add_argument("--smoke", action="store_true", help="every code path, learning nothing")
    options = parser.parse_args(argv)
    if unknown := set(options.what) - set(EXPERIMENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(EXPERIMENTS)}")
    if min(options.seeds or 1, options.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    options.bases = options.bases or (options.out if options.smoke else default)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # for the workers
    for folder in (options.out / "runs", options.out / "work"):
        folder.mkdir(parents=True, exist_ok=True)

    wanted = {}
    for experiment in options.what or EXPERIMENTS:
        for job in all_jobs(experiment, options):
            wanted[slug(job)] = job
    todo = [job for job in wanted.values() if not done(job, options)]
    bases = {}  # every run needs its base
    for job in todo:
        steps = job["settings"].get("pretrain_steps", "")
        kept = {"pretrain_steps": steps} if steps else {}
        base = dict(do="base", name=f"base {steps}", context=A, seed=job["seed"], settings=kept)
        bases[slug(base)] = base
    do_all([*bases.values()], options, "bases")
    do_all(todo, options, "runs")
    records = [done(job, options) for job in wanted.values()]
    if not all(records):
        raise SystemExit("evidence.py: the code has changed while it ran: run the command again")
    lines = [json.dumps(saved) + "\n" for saved in records]
    (options.out / "runs.jsonl").write_text("".join(lines))
    import evidence_page

    evidence_page.write(options.out, options.what or EXPERIMENTS)
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
