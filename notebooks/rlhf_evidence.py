"""The lecture's second half in numbers: one experiment a question, one command for all.

    python notebooks/rlhf_evidence.py                      everything, one process; what is done is kept
    python notebooks/rlhf_evidence.py state --seeds 5      one experiment, more seeds
    python notebooks/rlhf_evidence.py --page               only the page and the figures, from what is there
    python notebooks/rlhf_evidence.py --smoke              every code path in a minute, learning nothing

  over       over-optimisation: a learned reward against the true one     feedback   contexts that look at the answer
  state      the state before RL: five starts, the same RL                instruct   tasks as instructions; two masks
  learners   SFT, COSD, best-of-N and RL on one rule: forgetting, generality, diversity, angles of gradients

A job is one run with its settings and seed. It ends in runs/NAME.json, with NAME made of both, and is not run twice;
its weights, where another job starts from them, stay in --out. Everything is on one thread. All means are over seeds,
± half the 95 % confidence interval (Student's t), differences in pairs.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import torch
from rlhf import RL, answer_logits, as_lists, on_grid, reinforce, roll_out

import contexts
import train
from contexts import (
    CHAIN_VERBS,
    VERBS,
    WORLD_CHAT,
    Example,
    answer_text,
    draw_word,
    privileged,
    seeded,
    teacher_prompt,
    worked,
)
from cosd import cosd_loss, entropy, reverse_kl
from model import GPT

torch.set_num_threads(1)
HOW = RL(steps=80, prompts=16, group=8, max_new=16)


# ======================================================================================= 1. the task
def chain(rng, heldout=False, steps=3, verbs=CHAIN_VERBS):
    """A chain of verbs, to be worked step by step; C would be the worked solution."""
    if verbs is CHAIN_VERBS:
        return privileged(rng, heldout, steps)
    prompt = f"{draw_word(rng, heldout)} {' '.join(rng.choice(verbs) for _ in range(steps))}"
    return Example("privileged", f"solution {worked(prompt)}", prompt, worked(prompt), "")


def draw(seed, how, step, steps=3):
    """The prompts of one RL step."""
    rng = seeded(seed, "prompts", step)
    return [chain(rng, steps=steps) for _ in range(how.prompts)]


def heldout(seed, count, steps=3, words=True, verbs=CHAIN_VERBS):
    """Prompts that no training step draws: held-out words."""
    rng = seeded(seed, "held-out", steps, words, len(verbs))
    return [chain(rng, words, steps, verbs) for _ in range(count)]


def said(answer):
    return answer_text(WORLD_CHAT, answer)


def graded(name, examples, answers):
    """Grades 0 or 1 of answers, by `contexts.grade` -> (B,)."""
    return torch.tensor([contexts.grade(e, said(y))[name] for e, y in zip(examples, answers)])


exact = partial(graded, "exact")  # every step is right
last_step = partial(graded, "score")  # the last word is right: three letters have six orders


def gold(examples, answers):
    """r*, the true reward: 4 × the share of right steps. A step is right where the same word stands in the solution."""
    rewards = []
    for e, y in zip(examples, answers):
        wanted, got = e.answer.split(), said(y).split()
        right = sum(a == b for a, b in zip(wanted, got))
        rewards.append(4 * right / max(len(wanted), len(got)))
    return torch.tensor(rewards)


# ================================================================================== 2. measurements
@torch.no_grad()
def sequence_kl(model: GPT, other: GPT, prompts, ids, mask) -> float:
    """KL(model‖other) in nats per answer, on the model's own samples, exact at every token."""
    mine, theirs = (answer_logits(m, prompts, ids, mask) for m in (model, other))
    return on_grid(reverse_kl(mine, theirs), mask).sum(1).mean().item()


@torch.no_grad()
def sampled(policy: GPT, examples: list, samples: int, others: dict) -> dict:
    """Scores of sampled answers, their diversity, and the KL to other models."""
    how = replace(HOW, group=samples, seed=999, max_new=24)
    many, prompts, ids, mask = roll_out(policy, examples, how, 0)
    answers = as_lists(ids, mask)
    right, texts = exact(many, answers), [said(y) for y in answers]
    groups = [texts[i : i + samples] for i in range(0, len(texts), samples)]
    h = on_grid(entropy(answer_logits(policy, prompts, ids, mask)), mask)  # (B, N)
    numbers = {
        "exact": right.mean().item(),
        "last step": last_step(many, answers).mean().item(),
        "gold": gold(many, answers).mean().item(),
        "entropy": h.sum(1).mean().item(),  # nats per answer
        "distinct": statistics.fmean(len(set(group)) / samples for group in groups),
    }
    for name, other in others.items():
        numbers[f"kl to {name}"] = sequence_kl(policy, other, prompts, ids, mask)
    return numbers


@torch.no_grad()
def greedy(policy: GPT, examples: list, show) -> float:
    """Exact match of greedy answers."""
    prompts = [show(WORLD_CHAT, e) for e in examples]
    ids, mask = policy.generate(prompts, 24, temperature=0, eos=WORLD_CHAT.ends)
    return exact(examples, as_lists(ids, mask)).mean().item()


def skills(policy: GPT, seed: int, count: int) -> dict:
    """Old skills: known verbs, and all kinds under their contexts, greedy."""
    probes = contexts.probes(seeded(seed, "privileged", "probes"), "privileged", count)
    return {name: greedy(policy, suite, teacher_prompt) for name, suite in probes.items()}


@lru_cache
def own_samples(base: GPT, seed: int, count: int):
    """The base's answers to held-out prompts: on these the Razor's KL(base‖tuned) is measured."""
    return roll_out(base, heldout(seed, count), replace(HOW, group=2, seed=998), 0)


def measure(policy: GPT, base: GPT, seed: int, size: dict, others: dict) -> dict:
    """A point of a curve."""
    numbers = sampled(policy, heldout(seed, size["prompts"]), 4, others)
    two = sampled(policy, heldout(seed, size["prompts"], steps=2), 2, {})
    _, prompts, ids, mask = own_samples(base, seed, size["prompts"])
    return numbers | {
        "two verbs": two["exact"],
        "skills": skills(policy, seed, size["probes"]),
        "razor": sequence_kl(base, policy, prompts, ids, mask),
    }


@torch.no_grad()
def right_of(policy: GPT, examples: list, samples: int, seed: int) -> list[int]:
    """How many of `samples` answers to each prompt are right."""
    many, _, ids, mask = roll_out(policy, examples, replace(HOW, group=samples, seed=seed), 0)
    return exact(many, as_lists(ids, mask)).view(-1, samples).sum(1).int().tolist()


def beyond(policy: GPT, seed: int, count: int) -> dict:
    """Outside what was trained: longer chains, trained words, and verbs that no chain has had."""
    trained = sampled(policy, heldout(seed, count, words=False), 4, {})
    numbers = {"trained words": trained["exact"]}
    for steps in (2, 3, 4, 5):
        found = sampled(policy, heldout(seed, count, steps=steps), 4, {})
        numbers[f"{steps} verbs"] = found["exact"]
    other = heldout(seed, count, steps=2, verbs=list(VERBS))
    other = [e for e in other if not set(e.prompt.split()[1:]) <= set(CHAIN_VERBS)]
    return numbers | {"other verbs": sampled(policy, other, 4, {})["exact"]}


# ================================================================================= 3. the experiments
def base_of(job, options) -> GPT:
    small = dict(pretrain_steps=10, d_model=32) if options.smoke else {}
    cfg = train.Config(seed=job["seed"], device="cpu", **small)
    return train.get_base(cfg, str(options.out))[0]


def sizes(options) -> dict:
    return dict(prompts=4, probes=4) if options.smoke else dict(prompts=128, probes=48)


def scaled(how: RL, options) -> RL:
    return replace(how, steps=2, prompts=2, group=4, max_new=6) if options.smoke else how


STARTS = {
    "SFT": {"method": "sft"},
    "off-policy": {"method": "offline"},
    "COSD": {"method": "cosd"},
    "COSD + anchors": {"method": "cosd", "anchors": 0.5},
}
ENOUGH = 0.8  # of sampled answers to two verbs are right: all starts stop there


def learn_chains(job, options, steps, stop=None, every=10, limit=300):
    """The base taught chains of `steps` verbs by one of STARTS, one learning rate for all. Yields
    (steps taken, student) every so often; the caller stops."""
    base, settings = base_of(job, options), dict(STARTS[job["start"]])
    batch = 64 if "anchors" in settings else 32  # as many prompts of the task for all
    cfg = train.Config(
        context="privileged", seed=job["seed"], device="cpu", lr=3e-4, batch=batch, **settings
    )
    cfg = cfg.resolved(settings["method"])
    task = contexts.world_task("privileged", job["seed"], 4)
    task = replace(task, draw=partial(chain, steps=steps))
    run = train.assemble(cfg, task, copy.deepcopy(base), {}, Path("none"))
    for step in range(limit + 1):
        if step % every == 0:
            yield step, run.student
        for group in run.optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / 11)
        parts = [train.task_rows(run, step)]
        if cfg.n_anchors:
            parts.append(train.anchor_rows(run, step))
        for rows in parts:
            cosd_loss(run.student, rows)[0].backward()
        torch.nn.utils.clip_grad_norm_(run.student.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()


def start(job, options) -> dict:
    """One of the five states before RL, matched on the score of two verbs."""
    base, seed, size = base_of(job, options), job["seed"], sizes(options)
    student, steps, curve = base, 0, []
    if job["start"] != "base":
        examples = heldout(seed, size["prompts"], steps=2)
        for steps, student in learn_chains(job, options, 2, limit=2 if options.smoke else 400):
            curve.append((steps, sampled(student, examples, 4, {})["exact"]))
            if curve[-1][1] >= ENOUGH:
                break
    torch.save(student.state_dict(), weights(job, options))
    examples = heldout(seed, size["prompts"])
    found = measure(student, base, seed, size, {"base": base})
    right = right_of(student, examples, 64, 1)
    return found | {
        "steps": steps,
        "curve": curve,
        "right of 64": right,
        "beyond": beyond(student, seed, size["probes"]),
    }


def state(job, options) -> dict:
    """The same RL from one of five states: `exact` on three verbs (or `score`, which can be hacked)."""
    base, seed, size = base_of(job, options), job["seed"], sizes(options)
    before = load(base, dict(experiment="start", start=job["start"], seed=seed), options)
    policy, reward = copy.deepcopy(before), {"exact": exact, "score": last_step}[job["reward"]]
    how = scaled(replace(HOW, beta=job["beta"], seed=seed), options)
    others = {"base": base, "start": before}
    curve, log = [{"step": 0} | measure(policy, base, seed, size, others)], []
    rl = reinforce(policy, before, lambda step: draw(seed, how, step), reward, how)
    for step, row in enumerate(rl, 1):
        log.append(row)
        if step % 10 == 0 or step == how.steps:
            curve.append({"step": step} | measure(policy, base, seed, size, others))
    torch.save(policy.state_dict(), weights(job, options))
    right = right_of(policy, heldout(seed, size["prompts"]), 64, 1)
    return {
        "curve": curve,
        "log": log,
        "right of 64": right,
        "beyond": beyond(policy, seed, size["probes"]),
    }


# ====================================================================================== 4. the jobs
def name_of(job) -> str:
    """A run by its settings."""
    return "-".join(str(value).replace(" ", "") for value in job.values())


def weights(job, options) -> Path:
    folder = options.out / "rlhf"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name_of(job)}{'-smoke' * options.smoke}.pt"


def load(base: GPT, job, options) -> GPT:
    model = copy.deepcopy(base)
    model.load_state_dict(torch.load(weights(job, options), weights_only=True))
    return model


def jobs(what: str, seed: int) -> list[dict]:
    """In the order in which they need each other."""
    five = ["base", *STARTS]
    if what == "state":
        starts = [dict(experiment="start", start=name, seed=seed) for name in five]
        runs = [
            dict(experiment="state", start=s, reward="exact", beta=0.0, seed=seed) for s in five
        ]
        return starts + runs
    if what == "state-kl":
        return [
            dict(experiment="state", start=s, reward="exact", beta=0.1, seed=seed) for s in five
        ]
    if what == "hacking":
        return [dict(experiment="state", start="base", reward="score", beta=0.0, seed=seed)]
    raise ValueError(f"unknown experiment {what!r}: choose from {', '.join(EXPERIMENTS)}")


DO = {"start": start, "state": state}
EXPERIMENTS = ["state", "hacking", "state-kl"]


def do(job, options) -> None:
    """Run a job that is not done, and write its record at once, whole or not at all."""
    path = options.results / "runs" / f"{name_of(job)}.json"
    if path.exists() and (job["experiment"] != "start" or weights(job, options).exists()):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    numbers = DO[job["experiment"]](job, options)
    record = {"job": job, "seconds": round(time.time() - began, 1), "numbers": numbers}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(rounded(record)))
    unfinished.replace(path)
    print(f"{name_of(job)}: {record['seconds']:.0f} s", flush=True)


def rounded(value):
    """Five digits are enough for a record."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="*", help=f"of {', '.join(EXPERIMENTS)} [all]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="bases and weights")
    parser.add_argument("--results", type=Path, default=ROOT / "notebooks" / "results" / "rlhf")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(argv)
    for seed in range(options.first, options.first + options.seeds):
        for what in options.what or EXPERIMENTS:
            for job in jobs(what, seed):
                do(job, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
