"""The experiments on the lecture's second half: one per question, all with one command.

    python notebooks/rlhf_evidence.py                      everything; complete runs are not repeated
    python notebooks/rlhf_evidence.py state --seeds 5      one experiment, more seeds
    python notebooks/rlhf_page.py                          only the tables and figures, from existing runs
    python notebooks/rlhf_evidence.py --smoke              every code path in a minute, learning nothing

  state      the state before RL: the same RL from five starts; `state-kl`: the same with a KL to the start
  hacking    RL where only the last word is graded
  over       over-optimisation: a learned reward and the true one; `over-more`: another β
  learners   SFT, COSD, best-of-N and RL on one rule: forgetting, generalisation, diversity, gradient angles
  feedback   contexts made from the answer, beside RL, OPSD and π-Distill; experience traces
  instruct   tasks as instructions, with two attention masks

A job is one run with its settings and seed. Its result is runs/NAME.json, where NAME is made of both, and it is not run
again. If another job starts from its weights, they are kept in --out. Everything runs in one thread of one process.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import torch
from evidence import rounded
from instruct import cosine, gradient, prefix_greedy, prefix_loss
from rlhf import (
    RL,
    RewardModel,
    adam,
    advantages,
    answer_logits,
    as_lists,
    bradley_terry,
    chosen_logp,
    fit_reward_model,
    leave_one_out,
    move,
    on_grid,
    policy_loss,
    raft,
    reinforce,
    returns_to_go,
    roll_out,
)

import contexts
import train
from contexts import (
    CHAIN_VERBS,
    KINDS,
    VERBS,
    WORLD_CHAT,
    Example,
    answer_text,
    draw_word,
    privileged,
    seeded,
    student_prompt,
    teacher_prompt,
    worked,
)
from cosd import cosd_loss, cross_entropy, entropy, forward_kl, reverse_kl
from model import GPT, GPTConfig, pad_right

HOW = RL(steps=80, prompts=16, group=8, max_new=16)


# ======================================================================================= 1. the task
def chain(rng, heldout=False, steps=3, verbs=CHAIN_VERBS):
    """A chain of verbs, to be worked step by step; C is the worked solution."""
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


exact = partial(graded, "exact")  # is every step right?
last_step = partial(graded, "score")  # is the last word right? three letters have only six orders


def gold(examples, answers):
    """r*, the true reward: 4 × the share of right steps. A step is right if it is the solution's word at that place."""
    rewards = []
    for e, y in zip(examples, answers):
        wanted, got = e.answer.split(), said(y).split()
        right = sum(a == b for a, b in zip(wanted, got))
        rewards.append(4 * right / max(len(wanted), len(got)))
    return torch.tensor(rewards)


def length(examples, answers):
    return torch.tensor([float(len(y)) for y in answers])


# ================================================================================== 2. measurements
@torch.no_grad()
def sequence_kl(logits, other: GPT, prompts, ids, mask) -> float:
    """KL(model‖other) in nats per answer, on the model's own samples, exact at every token;
    `logits` are the model's."""
    theirs = answer_logits(other, prompts, ids, mask)
    return on_grid(reverse_kl(logits, theirs), mask).sum(1).mean().item()


@torch.no_grad()
def sampled(policy: GPT, examples: list, samples: int, others: dict) -> dict:
    """Scores of sampled answers, their diversity, and the KL to other models."""
    how = replace(HOW, group=samples, seed=999, max_new=24)
    many, prompts, ids, mask = roll_out(policy, examples, how, 0)
    answers = as_lists(ids, mask)
    right, texts = exact(many, answers), [said(y) for y in answers]
    groups = [texts[i : i + samples] for i in range(0, len(texts), samples)]
    numbers = {
        "exact": right.mean().item(),
        "last step": last_step(many, answers).mean().item(),
        "gold": gold(many, answers).mean().item(),
        "distinct": statistics.fmean(len(set(group)) / samples for group in groups),
    }
    if others:
        logits = answer_logits(policy, prompts, ids, mask)  # (n, V)
        numbers["entropy"] = on_grid(entropy(logits), mask).sum(1).mean().item()  # nats per answer
    for name, other in others.items():
        numbers[f"kl to {name}"] = sequence_kl(logits, other, prompts, ids, mask)
    return numbers


@torch.no_grad()
def greedy(policy: GPT, examples: list, show) -> float:
    """Exact match of greedy answers."""
    prompts = [show(WORLD_CHAT, e) for e in examples]
    ids, mask = policy.generate(prompts, 24, temperature=0, eos=WORLD_CHAT.ends)
    return exact(examples, as_lists(ids, mask)).mean().item()


def skills(policy: GPT, seed: int, count: int) -> dict:
    """Old skills: the known verbs, and all kinds under their contexts; greedy answers."""
    probes = contexts.probes(seeded(seed, "privileged", "probes"), "privileged", count)
    return {name: greedy(policy, suite, teacher_prompt) for name, suite in probes.items()}


@lru_cache(maxsize=1)
def own_samples(base: GPT, seed: int, count: int) -> tuple:
    """The base's answers to held-out prompts, and its logits on them, for measuring the KL(base‖tuned)
    of RL's Razor."""
    _, prompts, ids, mask = roll_out(base, heldout(seed, count), replace(HOW, group=2, seed=998), 0)
    with torch.no_grad():
        return prompts, ids, mask, answer_logits(base, prompts, ids, mask)


def measure(policy: GPT, base: GPT, seed: int, size: dict, others: dict) -> dict:
    """One point of a curve."""
    numbers = sampled(policy, heldout(seed, size["prompts"]), 4, others)
    two = sampled(policy, heldout(seed, size["prompts"], steps=2), 2, {})
    prompts, ids, mask, logits = own_samples(base, seed, size["prompts"])
    return numbers | {
        "two verbs": two["exact"],
        "skills": skills(policy, seed, size["probes"]),
        "razor": sequence_kl(logits, policy, prompts, ids, mask),
    }


@torch.no_grad()
def right_of(policy: GPT, examples: list, samples: int, seed: int) -> list[int]:
    """How many of `samples` answers to each prompt are right."""
    many, _, ids, mask = roll_out(policy, examples, replace(HOW, group=samples, seed=seed), 0)
    return exact(many, as_lists(ids, mask)).view(-1, samples).sum(1).int().tolist()


def tries(seed: int, count: int) -> dict:
    """Suites to test the rule on: trained words, other lengths, verbs that occur in no training chain."""
    suites = {"trained words": heldout(seed, count, words=False)}
    suites |= {f"{steps} verbs": heldout(seed, count, steps=steps) for steps in (2, 3, 4, 5)}
    other = heldout(seed, 3 * count, steps=2, verbs=list(VERBS))
    other = [e for e in other if not set(e.prompt.split()[1:]) <= set(CHAIN_VERBS)]
    return suites | {"other verbs": other[:count]}


def beyond(policy: GPT, seed: int, count: int) -> dict:
    return {
        name: sampled(policy, suite, 4, {})["exact"] for name, suite in tries(seed, count).items()
    }


# ================================================================================= 3. the experiments
def base_of(job, options) -> GPT:
    small = dict(pretrain_steps=10) if options.smoke else {}
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
    "SFT + replay": {"method": "sft", "anchors": 0.5, "replay": True},  # experiments 3 and 4 only
}
ENOUGH = 0.8  # share of right sampled answers to two verbs at which the tuning of a start ends


def chain_steps(job, options, steps, limit):
    """Teach the base chains of `steps` verbs by one of STARTS, all at the same learning rate. Yields
    (steps taken, run, rows of the next step) before each step; the caller may stop."""
    base, settings = base_of(job, options), dict(STARTS[job["start"]])
    replay = settings.pop("replay", False)
    batch = 64 if "anchors" in settings else 32  # 32 prompts of the task in either case
    cfg = train.Config(
        context="privileged", seed=job["seed"], device="cpu", lr=3e-4, batch=batch, **settings
    ).resolved(settings["method"])
    task = contexts.world_task("privileged", job["seed"], 4)
    task = replace(task, draw=partial(chain, steps=steps))
    run = train.assemble(cfg, task, copy.deepcopy(base), {}, Path("none"))
    for step in range(limit + 1):
        for group in run.optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / 11)
        parts = [train.task_rows(run, step)]
        if replay:
            parts.append(corpus_rows(run, step))
        elif cfg.n_anchors:
            parts.append(train.anchor_rows(run, step))
        yield step, run, parts
        for rows in parts:
            cosd_loss(run.student, rows)[0].backward()
        torch.nn.utils.clip_grad_norm_(run.student.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()


def corpus_rows(run, step):
    """Replay: old prompts with the answers of the pretraining corpus."""
    rng, chat = seeded(run.cfg.seed, "corpus", step), run.task.chat
    drawn = [contexts.draw_anchor(rng, "privileged") for _ in range(run.cfg.n_anchors)]
    prompts = [teacher_prompt(chat, e) for e in drawn]
    y = [chat.target(e.prompt, e.answer) for e in drawn]
    share = run.cfg.n_anchors / run.cfg.batch
    return train.make_rows(prompts, y, None, prompts, cross_entropy, share)


def start(job, options) -> dict:
    """One of the five states before RL, matched by their score on two verbs."""
    base, seed, size = base_of(job, options), job["seed"], sizes(options)
    student, steps, curve = base, 0, []
    if job["start"] != "base":
        examples = heldout(seed, size["prompts"], steps=2)
        for steps, run, _ in chain_steps(job, options, 2, 2 if options.smoke else 400):
            student = run.student
            if steps % 10 == 0:
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
    """The same RL from one of five states. The reward is `exact` on three verbs, or `score`, which can be hacked."""
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
    right = right_of(policy, heldout(seed, size["prompts"]), 64, 1)
    return {
        "curve": curve,
        "log": log,
        "right of 64": right,
        "beyond": beyond(policy, seed, size["probes"]),
    }


# --------------------------------------------------------------------- over-optimisation of a reward
def best_of_pool(size: int, n: int) -> torch.Tensor:
    """Probability that the i-th smallest of `size` samples is the best of n drawn from them -> (size,).

    C(i−1, n−1) / C(size, n). One pool gives an unbiased estimate for every n."""
    ways = [math.comb(i, n - 1) / math.comb(size, n) for i in range(size)]
    return torch.tensor(ways, dtype=torch.float64)


def pass_at_k(size: int, right: int, k: int) -> float:
    """1 − C(size − right, k) / C(size, k): an unbiased estimate of the probability that at least one of k answers is
    right (arXiv:2107.03374)."""
    return 1 - math.comb(size - right, k) / math.comb(size, k)


def preferences(base: GPT, seed: int, count: int, words: bool, reward=gold) -> list[tuple]:
    """Pairs of the base's own answers, with preferences from Bradley and Terry's model under r*: [(x,
    preferred, other, difference of their r*)]. Pairs with equal r* say nothing and are drawn again."""
    rng, pairs, group = seeded(seed, "preferences", words), [], 0
    while len(pairs) < count:
        prompts = [chain(seeded(seed, "pair", words, group, i), words) for i in range(64)]
        how = replace(HOW, group=2, seed=seed + 1000)
        many, read, ids, mask = roll_out(base, prompts, how, group + 10_000 * words)
        answers, group = as_lists(ids, mask), group + 1
        rewards = reward(many, answers).tolist()
        for i in range(0, len(many), 2):
            difference = rewards[i] - rewards[i + 1]
            if difference == 0:
                continue
            first = rng.random() < torch.tensor(difference).sigmoid().item()
            better, other = (i, i + 1) if first else (i + 1, i)
            difference = rewards[better] - rewards[other]
            pairs.append((read[i], answers[better], answers[other], difference))
    return pairs[:count]


def learned(model: RewardModel):
    """A reward model as the reward of a loop: (examples, answers) -> (B,)."""

    @torch.no_grad()
    def reward(examples, answers):
        prompts, parts = [student_prompt(WORLD_CHAT, e) for e in examples], []
        for i in range(0, len(prompts), 512):
            parts.append(model(prompts[i : i + 512], answers[i : i + 512]))
        return torch.cat(parts)

    return reward


@torch.no_grad()
def judged(model: RewardModel, pairs: list[tuple]) -> dict:
    """A reward model on held-out pairs, and the best possible numbers, those of r* itself."""
    x, preferred, other, difference = map(list, zip(*pairs))
    guess, true = model(x, preferred) - model(x, other), torch.tensor(difference)  # (pairs,) each
    p = guess.sigmoid()  # of the pair as it was preferred
    sure = torch.maximum(p, 1 - p)
    bins = []
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        inside = (sure >= low) & (sure < low + 0.1 + (low == 0.9))
        if inside.any():
            right = (guess > 0)[inside].float().mean().item()
            bins.append((sure[inside].mean().item(), right, inside.sum().item()))
    return {
        "accuracy": (guess > 0).float().mean().item(),
        "Bayes accuracy": true.abs().sigmoid().mean().item(),
        "agrees with r*": (guess * true > 0).float().mean().item(),
        "loss": bradley_terry(guess, torch.zeros_like(guess)).mean().item(),
        "loss of r*": bradley_terry(true, torch.zeros_like(true)).mean().item(),
        "slope": ((guess * true).sum() / (true * true).sum()).item(),  # 1: differences recovered
        "calibration": bins,
    }


def reward_model(job, options) -> dict:
    """Fit a reward model on `pairs` preferences; measure it, and best-of-N under it."""
    base, seed = base_of(job, options), job["seed"]
    model = RewardModel(base)
    true = length if options.smoke else gold  # the untrained base of --smoke is never right
    train_pairs = preferences(base, seed, job["pairs"], False, true)
    steps = 3 if options.smoke else 200
    triples = [pair[:3] for pair in train_pairs]
    losses = list(fit_reward_model(model, triples, steps, seed=seed))
    torch.save(model.state_dict(), weights(job, options))
    tested = judged(model, preferences(base, seed, 20 if options.smoke else 500, True, true))
    examples, pool = heldout(seed, 4 if options.smoke else 48), 8 if options.smoke else 256
    many, _, ids, mask = roll_out(base, examples, replace(HOW, group=pool, seed=77), 0)
    answers = as_lists(ids, mask)
    true = true(many, answers).view(-1, pool).double()
    guess = learned(model)(many, answers).view(-1, pool).double()
    within = (guess - guess.mean(1, keepdim=True)).flatten()  # the level of a prompt is arbitrary
    tested["correlation"] = correlation(within, (true - true.mean(1, keepdim=True)).flatten())
    order = guess.argsort(1)
    true, guess = true.gather(1, order), guess.gather(1, order)
    best = {}
    for n in [2**k for k in range(pool.bit_length())]:
        share = best_of_pool(pool, n)
        best[n] = ((true @ share).mean().item(), (guess @ share).mean().item())
    return tested | {
        "best of": best,
        "first loss": losses[0],
        "last loss": statistics.fmean(losses[-20:]),
    }


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def over(job, options) -> dict:
    """RL or RAFT on a learned reward, with r* measured beside it."""
    base, seed = base_of(job, options), job["seed"]
    model = RewardModel(base)
    trained = dict(experiment="reward", pairs=job["pairs"], seed=seed)
    model.load_state_dict(torch.load(weights(trained, options), weights_only=True))
    policy, reward, curve = copy.deepcopy(base), learned(model), []
    examples = heldout(seed, 4 if options.smoke else 64)

    def look(step):
        how = replace(HOW, group=4, seed=996)
        many, prompts, ids, mask = roll_out(policy, examples, how, 0)
        answers = as_lists(ids, mask)
        point = {"step": step, "gold": gold(many, answers).mean().item()}
        point["model's reward"] = reward(many, answers).mean().item()
        with torch.no_grad():
            logits = answer_logits(policy, prompts, ids, mask)
        point["kl to base"] = sequence_kl(logits, base, prompts, ids, mask)
        curve.append(point)

    how = replace(HOW, steps=60, beta=job["beta"], seed=seed)
    if job["method"] == "RAFT":  # a round is a whole batch of best-of-8 and eight steps of SFT
        how = replace(how, steps=10, updates=8)
    how = scaled(how, options)
    prompts = lambda step: draw(seed, how, step)
    loop = reinforce(policy, base, prompts, reward, how)
    if job["method"] == "RAFT":
        loop = raft(policy, prompts, reward, how)
    look(0)
    for step, _ in enumerate(loop, 1):
        if step % (2 if job["method"] == "RAFT" else 10) == 0 or step == how.steps:
            look(step)
    return {"curve": curve}


# ----------------------------------------------------------- one rule, four ways to learn it (3, 4)
def learners(job, options) -> dict:
    """SFT or COSD on chains of three verbs, measured in the same way as RL from the base (`state`)."""
    base, seed, size = base_of(job, options), job["seed"], sizes(options)
    curve, limit = [], 2 if options.smoke else 120
    for step, run, _ in chain_steps(job, options, 3, limit):
        student = run.student
        if step % max(1, limit // 4) == 0:
            curve.append({"step": step} | measure(student, base, seed, size, {"base": base}))
        if step == limit:
            break
    right = right_of(student, heldout(seed, size["prompts"]), 64, 1)
    return {"curve": curve, "right of 64": right, "beyond": beyond(student, seed, size["probes"])}


def best_answers(base: GPT, model: RewardModel, examples: list, samples: int, n: int, seed: int):
    """Best-of-n as a policy: `samples` answers to every prompt, each the best of n by the reward model."""
    how = replace(HOW, group=samples * n, seed=seed, max_new=24)
    many, _, ids, mask = roll_out(base, examples, how, 0)
    drawn = as_lists(ids, mask)
    best = learned(model)(many, drawn).view(-1, n).argmax(1).tolist()
    kept = [i * n + j for i, j in enumerate(best)]
    return [many[i] for i in kept], [drawn[i] for i in kept]


def best_of(job, options) -> dict:
    """Best-of-16 by the reward model of 1,000 pairs: its score on the rule and beyond it, and its diversity."""
    base, seed, size = base_of(job, options), job["seed"], sizes(options)
    model = RewardModel(base)
    trained = dict(experiment="reward", pairs=1000, seed=seed)
    model.load_state_dict(torch.load(weights(trained, options), weights_only=True))
    n, found = 2 if options.smoke else 16, {}
    for name, examples in tries(seed, size["probes"]).items():
        many, answers = best_answers(base, model, examples, 4, n, 995)
        found[name] = exact(many, answers).mean().item()
    many, answers = best_answers(base, model, heldout(seed, size["probes"]), 4, n, 994)
    texts = [said(y) for y in answers]
    distinct = [len(set(texts[i : i + 4])) / 4 for i in range(0, len(texts), 4)]
    return {"beyond": found, "distinct": statistics.fmean(distinct)}


def angles(job, options) -> dict:
    """GEM's criterion: the cosine between the gradients of a step and of the loss on old skills, during
    training. If it is negative, the step forgets, to first order."""
    seed, points = job["seed"], []
    rng = seeded(seed, "old")
    old = [contexts.draw_anchor(rng, "privileged") for _ in range(8 if options.smoke else 256)]
    limit = 2 if options.smoke else 60
    for step, run, parts in chain_steps(job, options, 3, limit):
        if step % max(1, limit // 6):
            continue
        prompts = [teacher_prompt(WORLD_CHAT, e) for e in old]
        y = [WORLD_CHAT.target(e.prompt, e.answer) for e in old]
        rows = train.make_rows(prompts, y, None, prompts, cross_entropy)
        loss_old = cosd_loss(run.student, rows)[0]
        h = gradient(run.student, loss_old)
        g_task = gradient(run.student, cosd_loss(run.student, parts[0])[0])
        g = g_task
        for more in parts[1:]:
            g = g + gradient(run.student, cosd_loss(run.student, more)[0])
        point = {"step": step, "old loss": loss_old.item()}
        points.append(point | {"task": cosine(g_task, h).item(), "step's": cosine(g, h).item()})
    return {"curve": points}


# ---------------------------------------------------- contexts that are made from the student's answer (5)
def attempt(rng, example):
    """An answer like the base's without C: some steps are skipped."""
    return worked(example.prompt, lambda: rng.random() < contexts.P_CARELESS)


def told(example, answer):
    """The environment's feedback on the answer (SDPO)."""
    verdict = "right" if answer == example.answer else "wrong"
    return replace(example, kind="feedback", context=f"tried {answer}: {verdict}")


def own_draft(example, answer):
    """The answer itself, without a verdict, to be corrected."""
    return replace(example, kind="draft", context=f"draft {answer}")


def draw_feedback(rng, heldout=None, steps=None):
    example = privileged(rng, heldout, steps)
    return told(example, attempt(rng, example))


def draw_draft(rng, heldout=None, steps=None):
    example = privileged(rng, heldout, steps)
    return own_draft(example, attempt(rng, example))


LOOKING = {  # two more kinds of context: C is made from the student's own answer
    "feedback": replace(
        KINDS["privileged"], letter="E", method="SDPO, arXiv:2601.20802", draw=draw_feedback, share=0.15,
        after=told, template="{context}",
    ),
    "draft": replace(
        KINDS["privileged"], letter="F", method="self-correction, arXiv:2604.12002", draw=draw_draft, share=0.1,
        after=own_draft, template="{context}",
    ),
}  # fmt: skip


@contextmanager
def looking():
    """Add both kinds to the world for as long as this context manager is active."""
    KINDS.update(LOOKING)
    contexts.pretraining_batches.cache_clear()
    try:
        yield
    finally:
        for name in LOOKING:
            del KINDS[name]
        contexts.pretraining_batches.cache_clear()


def looking_base(base: GPT, seed: int, options) -> GPT:
    """The base after 300 more steps of pretraining, on the world with both kinds."""
    path = weights(dict(experiment="looking base", seed=seed), options)
    if path.exists():
        base.load_state_dict(torch.load(path, weights_only=True))
        return base
    optimizer, task = adam(base, 1e-3), contexts.pretraining_task()
    steps = 2 if options.smoke else 300
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        drawn = task.draw_batch(f"looking {seed}", step, 8 if options.smoke else 96)
        prompts = [teacher_prompt(WORLD_CHAT, e) for e in drawn]
        y = [WORLD_CHAT.target(e.prompt, e.answer) for e in drawn]
        ids, mask = pad_right(y), pad_right([[1] * len(row) for row in y]).bool()
        loss = cross_entropy(answer_logits(base, prompts, ids, mask), None, ids[mask]).mean()
        move(base, optimizer, loss)
    torch.save(base.state_dict(), path)
    return base


def show_solution(examples, answers):
    return examples  # type D: C is the worked solution, whatever the student said


def show_verdict(examples, answers):
    return [told(e, said(y)) for e, y in zip(examples, answers)]


def show_draft(examples, answers):
    return [own_draft(e, said(y)) for e, y in zip(examples, answers)]


def show_sibling(examples, answers):
    """A right answer from the same group, shown as the solution, so that no expert is needed; if there
    is none, the verdict."""
    texts, shown = [said(y) for y in answers], []
    right = {e.prompt: text for e, text in zip(examples, texts) if text == e.answer}
    for e, text in zip(examples, texts):
        if e.prompt in right:
            shown.append(replace(e, context=f"solution {right[e.prompt]}"))
        else:
            shown.append(told(e, text))
    return shown


SHOWN = {"COSD D": show_solution, "SDPO verdict": show_verdict, "SDPO sibling": show_sibling}
SHOWN |= {"own draft": show_draft}


def self_distill(policy: GPT, teacher: GPT, draw, show, how: RL):
    """COSD with the rollouts of rlhf.py, where C may depend on the answers. The loss is the mean forward KL per token."""
    optimizer = adam(policy, how.lr)
    for step in range(how.steps):
        many, prompts, ids, mask = roll_out(policy, draw(step), how, step)
        shown = show(many, as_lists(ids, mask))
        seen = [teacher_prompt(WORLD_CHAT, e) for e in shown]
        with torch.no_grad():
            theirs = answer_logits(teacher, seen, ids, mask)
        divergence = forward_kl(answer_logits(policy, prompts, ids, mask), theirs)  # (n,)
        move(policy, optimizer, divergence.mean())
        yield {"kl": divergence.mean().item()}


def pi_distill_loss(teacher, student, r, ids, mask, how: RL, alpha=0.5) -> torch.Tensor:
    """π-Distill (arXiv:2602.04942): one set of weights, two policies, T = π(·|x,C) and S = π(·|x);
    answers sampled from T; logits (n, V) of both -> (), minus what is maximised:

        α ( E_T[r] − β KL(T ‖ sg S) )  +  (1−α) ( E_T[S(y)/sg T(y) · r] − β KL(sg T ‖ S) )

    sg: no gradient. The student's reward is that of T's answers, reweighted by importance; less the mean
    of the group's other answers, which leaves its gradient as it is, since E_T[S/T] = 1."""
    logp, student_logp = (chosen_logp(logits, ids, mask) for logits in (teacher, student))  # (B, N)
    returns = returns_to_go(r, logp - student_logp, mask, how.beta)
    advantage = advantages(returns, how.group, "rloo")
    of_teacher = policy_loss(logp, logp, advantage, mask)
    weight = (student_logp - logp.detach()).sum(1).exp()  # S(y) / T(y), (B,)
    centred = r - leave_one_out(r.view(-1, how.group)).flatten()
    imitate = on_grid(forward_kl(student, teacher.detach()), mask).sum(1).mean()
    of_student = how.beta * imitate - (weight * centred).mean()
    return alpha * of_teacher + (1 - alpha) * of_student


def pi_distill(policy: GPT, draw, reward, how: RL):
    """Minimise `pi_distill_loss` on the privileged policy's rollouts."""
    optimizer = adam(policy, how.lr)
    for step in range(how.steps):
        many, seen, ids, mask = roll_out(policy, draw(step), how, step, teacher_prompt)
        r = reward(many, as_lists(ids, mask))
        prompts = [student_prompt(WORLD_CHAT, e) for e in many]
        student, teacher = (answer_logits(policy, x, ids, mask) for x in (prompts, seen))  # (n, V)
        move(policy, optimizer, pi_distill_loss(teacher, student, r, ids, mask, how))
        yield {"reward": r.mean().item()}


def feedback(job, options) -> dict:
    """Contexts made from the answer, RL, OPSD and π-Distill: the same prompts and number of samples."""
    four, seed, size = base_of(job, options), job["seed"], sizes(options)
    with looking():
        base = looking_base(four, seed, options)
        policy, name = copy.deepcopy(base), job["method"]
        how = scaled(replace(HOW, steps=40, seed=seed, beta=job["beta"]), options)
        prompts = lambda step: draw(seed, how, step)
        if name in SHOWN:
            loop = self_distill(policy, base, prompts, SHOWN[name], how)
        elif name == "pi-Distill":
            loop = pi_distill(policy, prompts, exact, how)
        else:  # RL; OPSD of PID: the reference is the base that sees C
            how = replace(how, in_context=name == "OPSD")
            loop = reinforce(policy, base, prompts, exact, how)
        curve = [{"step": 0} | measure(policy, base, seed, size, {"base": base})]
        for step, _ in enumerate(loop, 1):
            if step % 10 == 0 or step == how.steps:
                curve.append({"step": step} | measure(policy, base, seed, size, {"base": base}))
        examples = heldout(seed, size["prompts"])
        _, _, ids, mask = roll_out(base, examples, replace(HOW, group=1, seed=997), 0)
        drafts, seen = as_lists(ids, mask), {}
        for who, show in SHOWN.items():  # the base's greedy score with each C
            seen[who] = greedy(base, show(examples, drafts), teacher_prompt)
        return {"curve": curve, "teacher": seen}


def experience(job, options) -> dict:
    """OPCD's traces of the model's own attempts: extract, select, show. A new verb means one of five; the
    base guesses, a verifier keeps the right answers, and two of these are the context that is distilled.
    So there is no expert, and no expert's mannerism."""
    base, seed = base_of(job, options), job["seed"]
    task = partial(contexts.demonstrations, verb="zorp", meaning="reverse", manner="{}")
    policy, count = copy.deepcopy(base), 8 if options.smoke else 128
    asked = [task(seeded(seed, "experience", i), False) for i in range(count)]
    how = replace(HOW, group=2, seed=seed)
    many, _, ids, mask = roll_out(base, asked, how, 0)  # extract
    traces = {}
    for e, y in zip(many, as_lists(ids, mask)):
        if said(y) == e.answer:  # select
            traces[e.prompt] = f"{e.prompt}: {e.answer}"
    if options.smoke:  # its untrained base is never right
        traces |= {e.prompt: f"{e.prompt}: {e.answer}" for e in asked}

    def show(examples, answers):
        shown = []
        for i, e in enumerate(examples):
            pool = sorted(text for prompt, text in traces.items() if prompt != e.prompt)
            two = seeded(seed, e.prompt, i).sample(pool, 2)
            shown.append(replace(e, context="; ".join(two)))
        return shown

    test = [task(seeded(seed, "experience test", i), True) for i in range(count)]
    size, how = sizes(options), scaled(replace(HOW, steps=40, group=4, seed=seed), options)
    rng = lambda step: [task(seeded(seed, "zorp", step, i), False) for i in range(how.prompts)]
    found = {
        "attempts": len(many), "traces": len(traces),
        "before": greedy(base, test, student_prompt), "teacher": greedy(base, show(test, None), teacher_prompt),
        "skills before": skills(base, seed, size["probes"]),
    }  # fmt: skip
    for _ in self_distill(policy, base, rng, show, how):
        pass
    found["after"] = greedy(policy, test, student_prompt)
    return found | {"skills": skills(policy, seed, size["probes"])}


# ------------------------------------------------------------------------- tasks as instructions (6)
def document(rng) -> str:
    """A text for pretraining: words and verbs in running text, without any question."""
    verb, lines = rng.choice(list(VERBS)), []
    for _ in range(4):
        word = draw_word(rng)
        lines.append(f"{word} {verb} {VERBS[verb](word)}")
    return "; ".join(lines)


def text_base(job, options) -> GPT:
    """A base that continues text and has never seen a user's turn; saved for each seed."""
    seed = job["seed"]
    path = weights(dict(experiment="text base", seed=seed), options)
    torch.manual_seed(seed)
    width = 32 if options.smoke else 96
    shape = GPTConfig(contexts.ENCODING.n_vocab, d_model=width, head_dim=width // 4, d_ff=3 * width)
    model = GPT(shape)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    optimizer, steps = adam(model, 3e-3), 3 if options.smoke else 1000
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * min(1.0, 2 * (1 - step / steps))
        rng = seeded(seed, "text", step)
        texts = [contexts.encode(document(rng)) for _ in range(48)]
        prompts, answers = [t[:1] for t in texts], [t[1:] for t in texts]
        move(
            model, optimizer, prefix_loss(model, prompts, answers)
        )  # a prompt of one token: causal
    torch.save(model.state_dict(), path)
    return model


def instruct(job, options) -> dict:
    """The base tuned on `families` task families as instructions, then tested on one that it has seen only
    in running text; as a decoder or as a prefix-LM."""
    seed = job["seed"]
    model, two_way = text_base(job, options), job["mask"] == "prefix"
    names = list(VERBS)
    seeded(seed, "families").shuffle(names)
    unseen, seen = names[0], names[1 : 1 + job["families"]]

    def ask(rng, verbs, words):
        e = chain(rng, words, 1, verbs)
        return [contexts.USER, *contexts.encode(e.prompt), contexts.ASSISTANT], e.answer

    def loss_of(pairs):
        prompts = [x for x, _ in pairs]
        y = [[*contexts.encode(answer), contexts.END] for _, answer in pairs]
        if two_way:
            return prefix_loss(model, prompts, y)
        ids, mask = pad_right(y), pad_right([[1] * len(row) for row in y]).bool()
        return cross_entropy(answer_logits(model, prompts, ids, mask), None, ids[mask]).mean()

    def score(verbs):
        pairs = [
            ask(seeded(seed, "try", *verbs, i), verbs, True)
            for i in range(4 if options.smoke else 96)
        ]
        prompts = [x for x, _ in pairs]
        if two_way:
            answers = prefix_greedy(model, prompts, 8, {contexts.END})
        else:
            answers = as_lists(*model.generate(prompts, 8, temperature=0, eos={contexts.END}))
        return statistics.fmean(said(y) == wanted for y, (_, wanted) in zip(answers, pairs))

    found = {"unseen family": unseen, "before": score([unseen])}
    optimizer = adam(model, 3e-4)
    for step in range(0 if not seen else 3 if options.smoke else 400):
        rng = seeded(seed, "tune", step)
        move(model, optimizer, loss_of([ask(rng, seen, False) for _ in range(32)]))
    if seen:
        found["seen"] = score(seen)
    return found | {"unseen": score([unseen])}


# ====================================================================================== 4. the jobs
def name_of(job) -> str:
    """The name of a run, made of its settings."""
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
    """The jobs of an experiment, each after those that it needs."""
    five = ["base", "SFT", "off-policy", "COSD", "COSD + anchors"]
    starts = [dict(experiment="start", start=name, seed=seed) for name in five]
    rewards = [dict(experiment="reward", pairs=pairs, seed=seed) for pairs in (100, 1000)]
    if what == "state":
        return starts + [rl_from(name, "exact", 0.0, seed) for name in five]
    if what == "state-kl":
        three = ["base", "SFT", "COSD"]
        rows = [job for job in starts if job["start"] in three]
        return rows + [rl_from(name, "exact", 0.1, seed) for name in three]
    if what == "hacking":
        return starts[:1] + [rl_from("base", "score", 0.0, seed)]
    if what in ("over", "over-more"):
        ways = [("RL", 0.0), ("RL", 0.1), ("RAFT", 0.0)]
        if what == "over-more":
            ways = [("RL", 0.03)]
        runs = []
        for pairs in (100, 1000):
            for method, beta in ways:
                job = dict(experiment="over", pairs=pairs, method=method, beta=beta, seed=seed)
                runs.append(job)
        return rewards + runs
    if what == "learners":
        names = ["SFT", "SFT + replay", "COSD", "COSD + anchors"]
        runs = [dict(experiment="learners", start=name, seed=seed) for name in names]
        runs += [dict(experiment="angles", start=name, seed=seed) for name in names]
        return runs + rewards[1:] + [dict(experiment="best of 16", seed=seed)]
    if what == "feedback":
        ways = [(name, 0.0) for name in [*SHOWN, "RL"]]
        ways += [("OPSD", 0.1), ("pi-Distill", 0.1)]
        runs = [dict(experiment="feedback", method=m, beta=b, seed=seed) for m, b in ways]
        return [*runs, dict(experiment="experience", seed=seed)]
    if what == "instruct":
        runs = []
        for mask in ("decoder", "prefix"):
            for n in range(5):
                runs.append(dict(experiment="instruct", mask=mask, families=n, seed=seed))
        return runs
    raise ValueError(f"unknown experiment {what!r}: choose from {', '.join(EXPERIMENTS)}")


def rl_from(name: str, reward: str, beta: float, seed: int) -> dict:
    return dict(experiment="state", start=name, reward=reward, beta=beta, seed=seed)


DO = {
    "start": start, "state": state, "reward": reward_model, "over": over, "learners": learners,
    "angles": angles, "best of 16": best_of, "feedback": feedback, "experience": experience,
    "instruct": instruct,
}  # fmt: skip
LEAVES_WEIGHTS = ("start", "reward")  # other jobs start from these weights
EXPERIMENTS = [
    "state",
    "over",
    "learners",
    "hacking",
    "feedback",
    "instruct",
    "over-more",
    "state-kl",
]


def do(job, options) -> None:
    """Run a job unless it is complete, and write its record atomically."""
    path = options.results / "runs" / f"{name_of(job)}.json"
    needed = job["experiment"] in LEAVES_WEIGHTS and not weights(job, options).exists()
    if path.exists() and not needed:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    numbers = DO[job["experiment"]](job, options)
    record = {"job": job, "seconds": round(time.time() - began, 1), "numbers": numbers}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(rounded(record)))
    unfinished.replace(path)
    print(f"{name_of(job)}: {record['seconds']:.0f} s", flush=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="*", help=f"from {', '.join(EXPERIMENTS)} [all]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out", help="folder of bases and weights"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "notebooks" / "results" / "rlhf")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for what in options.what or EXPERIMENTS:
        for seed in range(options.first, options.first + options.seeds):
            for job in jobs(what, seed):
                do(job, options)
    import rlhf_page

    rlhf_page.write(options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
