"""A real model, SmolLM2-135M-Instruct: COSD beside SFT, scored for form and for content.

    python notebooks/smollm2.py                     makes the model, once
    python notebooks/evidence_real.py               every run, then the page
    python notebooks/evidence_real.py --smoke --out out/smoke      every code path, learning nothing
    python notebooks/evidence_real.py --page        the page alone, from the records that exist

Three tasks are learned (`STEPS`). For each of them one run measures the base without and with the context,
and one run for each method and seed trains a student and measures it without the context. COSD and SFT
of the same seed see the same prompts in the same order.

A run leaves one file in OUT/runs, written whole or not at all, and a run that has its file is not made
again. The file names the code and the data that it comes from by a digest; a file with another digest
does not count. The page is OUT/real.md with its figure real.png, and real.json has all its numbers.
Without --out the tables of notebooks/pages/real-model.md are replaced as well.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import re
import runpy
import shutil
import statistics
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import evidence
import torch
from perplexity import perplexity, read_paragraphs
from scores import number

import contexts
import train
from cosd import cross_entropy
from model import GPT, low_precision_, read_config, resolve_device
from train import Config, Run

DATA = ROOT / "notebooks" / "data"
HERE = DATA.parent
OUT = ROOT / "notebooks" / "results" / "real"
METHODS = {"COSD": "cosd", "SFT": "sft"}
SMOKE = dict(steps=1, batch=2, eval_size=4, max_new_tokens=4)


# ================================================================================== 1. the scores
def stated(text: str, row: dict) -> float:
    """Share of the line's facts that the answer names. A fact is a pattern: a|b accepts either word."""
    return statistics.fmean(
        bool(re.search(rf"(?<!\w)(?:{fact})(?!\w)", text, re.I)) for fact in row["facts"]
    )


def reason(text: str, row: dict) -> float:
    """The policy's word that the answer gives as its reason is the right one."""
    said = re.findall(r"\b(allowed|forbidden)\b", text.lower())
    return float(said[:1] == ["forbidden" if row["answer"] == "refuse" else "allowed"])


@lru_cache
def scorer(name: str):
    return runpy.run_path(str(DATA / f"{name}.py"))["score"]


def grade(form, content, example: contexts.Example, text: str) -> dict[str, float]:
    """Form: what the context asks for. Content: whether it is right. Both: their product."""
    row = example.row
    grades = {"form": float(form(text, row))}
    if content is not stated or "facts" in row:  # some questions have no wrong answer
        grades["content"] = float(content(text, row))
        grades["both"] = grades["form"] * grades["content"]
    return grades | {"cut_off": float(text.endswith("…"))}


# =================================================================================== 2. the tasks
# Flags of train.py; what SFT learns from in place of `prompts`; the scores of form and content.
TASKS = {
    "pirate": dict(
        flags=dict(
            context="instructions",
            context_file="pirate.json",
            prompts="questions.jsonl",
            heldout="questions-heldout.jsonl",
            max_new_tokens=32,
        ),
        sft="pirate-alien.jsonl",
        scores=(scorer("pirate"), stated),
    ),
    "summary": dict(
        flags=dict(
            context="instructions",
            context_file="summary.txt",
            prompts="letters.jsonl",
            heldout="letters-heldout.jsonl",
            max_new_tokens=80,
        ),
        scores=(scorer("letters"), stated),
    ),
    "policy": dict(
        flags=dict(
            context="specification",
            context_file="policy.json",
            prompts="requests.jsonl",
            heldout="requests-heldout.jsonl",
            max_new_tokens=24,
        ),
        scores=(scorer("policy"), reason),
    ),
    "sums": dict(  # only looked at, as an old skill
        flags=dict(
            context="privileged",
            shots=4,
            prompts="sums.jsonl",
            heldout="sums-heldout.jsonl",
            max_new_tokens=16,
        ),
        scores=(number, number),
    ),
}
# What the base can do besides: (a task whose held-out prompts are asked, with its context or without,
# new tokens, which grade). A task is never among its own old skills.
SKILLS = {
    "plain questions": ("pirate", False, 32, "content"),
    "policy, in context": ("policy", True, 24, "form"),
    "sums, in context": ("sums", True, 16, "content"),
}


def config(job: dict, options: argparse.Namespace) -> Config:
    task, method = TASKS[job["task"]], METHODS.get(job["who"], "cosd")
    flags = dict(task["flags"])
    if method == "sft":
        flags["prompts"] = task.get("sft", flags["prompts"])
    files = ("context_file", "prompts", "heldout")
    flags |= {name: str(DATA / flags[name]) for name in files if name in flags}
    settings = dict(
        method=method,
        model=str(options.model),
        steps=job["steps"],
        batch=8,
        lr=1e-4,
        seed=job["seed"],
        dtype=job["dtype"],
        device="cpu",
        eval_size=32,
        out=str(options.out / "work"),
    )
    return Config(**flags | settings | (SMOKE if job["smoke"] else {})).resolved(method)


def read_task(cfg: Config, chat: contexts.Chat, max_len: int, name: str) -> contexts.Task:
    task = contexts.file_task(cfg, chat, max_len)
    task.grade = partial(grade, *TASKS[name]["scores"])
    return task


# ==================================================================================== 3. the runs
def in_low_precision(model: GPT, dtype: torch.dtype) -> GPT:
    """A copy to decode with: autocast gives the same outputs, and casts no weights on the way."""
    kept = copy.deepcopy(model).requires_grad_(False)
    low_precision_(kept, dtype)
    return kept


def answers(model: GPT, chat: contexts.Chat, prompts: list, new: int) -> list[list[int]]:
    """Greedy."""
    y = []
    for i in range(0, len(prompts), 16):
        ids, mask = model.generate(prompts[i : i + 16], new, temperature=0, eos=chat.ends)
        y += [row[:n] for row, n in zip(ids.tolist(), mask.sum(1).tolist())]
    return y


def relevance(run: Run, prompts: list, y: list) -> float:
    """By how many nats a token the answers are likelier after their own prompt than after the next two
    of the file, under the base and without any context. Whatever an answer owes to its style it has
    after every prompt, so the style cancels; an answer that fits every question has 0."""
    nats = [
        train.mean_loss(run, run.base.model, prompts[i:] + prompts[:i], y, cross_entropy)
        for i in range(3)
    ]
    return statistics.fmean(nats[1:]) - nats[0]


def judged(run: Run, y: list) -> dict:
    """Everything about a set of answers to the held-out prompts."""
    task = run.task
    prompts = [contexts.student_prompt(task.chat, e) for e in task.heldout]
    return task.grades(task.heldout, y) | {
        "relevance": relevance(run, prompts, y),
        "length": statistics.fmean(map(len, y)),
        "said": [contexts.answer_text(task.chat, row) for row in y],
    }


def measured(job: dict, run: Run, options: argparse.Namespace, suites: dict) -> dict:
    """The student as it is now: its answers without the context, and what else it can do."""
    task, chat, cfg = run.task, run.task.chat, run.cfg
    fast = in_low_precision(run.student, run.dtype)
    prompts = [contexts.student_prompt(chat, e) for e in task.heldout]
    some = prompts[:16]
    sampled = train.write(run, fast, some, 1, "held-out KL")
    theirs = contexts.context_prompts(task, task.heldout[:16], sampled)
    numbers = {
        "answers": judged(run, answers(fast, chat, prompts, cfg.max_new_tokens)),
        "kl": train.mean_loss(run, fast, some, sampled, train.REVERSE_KL, run.teacher, theirs),
        "perplexity": perplexity(fast, options.paragraphs),
        "skills": {},
    }
    for name, (other, shown, new, key) in SKILLS.items():
        if other != job["task"]:
            suite = suites[other]
            show = contexts.teacher_prompt if shown else contexts.student_prompt
            asked = [show(chat, e) for e in suite.heldout]
            y = answers(fast, chat, asked, SMOKE["max_new_tokens"] if job["smoke"] else new)
            numbers["skills"][name] = suite.grades(suite.heldout, y)[key]
    return numbers


def do(job: dict, options: argparse.Namespace) -> dict:
    """One run -> its numbers. The base is the run that takes no step."""
    shape = read_config(str(options.model))
    chat = contexts.open_chat(str(options.model), shape.vocab_size)
    options.paragraphs = read_paragraphs(str(DATA / "plain.txt"), str(options.model), shape.max_len)
    cfg = config(job, options)
    suites = {
        name: read_task(
            config(job | {"task": name, "who": "base"}, options), chat, shape.max_len, name
        )
        for name in ("pirate", "policy", "sums")
    }
    task = read_task(cfg, chat, shape.max_len, job["task"])
    folder = Path(cfg.out) / slug(job)
    folder.mkdir(parents=True, exist_ok=True)
    run = train.assemble(cfg, task, GPT.from_pretrained(cfg.model), {}, folder)
    run.dtype = resolve_device(cfg.device, cfg.dtype)[1]
    numbers, train.SAVE_SECONDS = {}, math.inf  # short runs need no checkpoints on the way
    if job["who"] != "base":
        train.fit(run)
        numbers["seconds"] = sum(row["seconds"] for row in run.log)
    with torch.no_grad(), run.autocast():
        numbers |= measured(job, run, options, suites)
        if job["who"] == "base":
            prompts = [contexts.student_prompt(chat, e) for e in task.heldout]
            theirs = contexts.context_prompts(task, task.heldout)
            y = answers(run.base.model, chat, theirs, cfg.max_new_tokens)
            numbers["teacher"] = judged(run, y)
            saved = sum(map(len, theirs)) - sum(map(len, prompts))
            numbers["context tokens"] = saved / len(prompts)
    shutil.rmtree(folder)
    return numbers


# ================================================================================= 4. the records
STEPS = {"pirate": 16, "summary": 14, "policy": 16}  # the tasks that are learned


def jobs(options: argparse.Namespace) -> list[dict]:
    """The bases first, then seed by seed."""
    rest = {"dtype": options.dtype, "smoke": options.smoke}
    pairs = [
        (seed, name, who) for seed in range(options.seeds) for name in STEPS for who in METHODS
    ]
    bases = [dict(task=name, who="base", seed=0, steps=1) | rest for name in STEPS]
    return bases + [
        dict(task=name, who=who, seed=seed, steps=STEPS[name]) | rest for seed, name, who in pairs
    ]


def slug(job: dict) -> str:
    return f"{job['task']}-{job['who']}-{job['seed']}"


@lru_cache
def code() -> str:
    """A digest of what a run depends on: the code, whatever its messages and comments say, and the data."""
    parts = [evidence.code("do", __file__)]
    for name in ("scores", "perplexity"):
        parts.append(json.dumps(evidence.nested(evidence.said_nothing(HERE / f"{name}.py"))))
    data = "plain.txt pirate.py letters.py policy.py pirate-alien.jsonl".split()
    data += [value for task in TASKS.values() for value in task["flags"].values()]
    files = sorted({DATA / value for value in data if isinstance(value, str)})
    parts += [file.read_text() for file in files if file.is_file()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


def record_of(job: dict, options: argparse.Namespace) -> dict | None:
    """The record of exactly this job by this code, or None."""
    path = options.out / "runs" / f"{slug(job)}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    return record if record.get("job") == job and record.get("code") == code() else None


def make(job: dict, options: argparse.Namespace) -> None:
    began, cpu = time.perf_counter(), time.process_time()
    record = {"job": job, "code": code(), "numbers": do(job, options)}
    record["wall seconds"] = round(time.perf_counter() - began)
    record["core seconds"] = round(time.process_time() - cpu)
    path = options.out / "runs" / f"{slug(job)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=0, ensure_ascii=False)
    train.replace_file(path, lambda unfinished: unfinished.write_text(text))


# ==================================================================================== 5. the page
PAGE = ROOT / "notebooks" / "pages" / "real-model.md"
WORDS = {
    "base": "base, without context",
    "teacher": "teacher: base, with context",
    "COSD": "COSD, without context",
    "SFT": "SFT, without context",
}
COLORS = {"COSD": ("#0072B2", "//"), "SFT": ("#D55E00", "\\\\")}


def numbers_of(records: list[dict]) -> dict:
    """{task: {who: [numbers, one for each seed]}}; the teacher's answers are a part of the base's run."""
    found = {}
    for record in records:
        job, numbers = record["job"], record["numbers"]
        who = found.setdefault(job["task"], {})
        who.setdefault(job["who"], []).append(numbers)
        if job["who"] == "base":
            who["teacher"] = [{"answers": numbers["teacher"]}]
    return found


def show(values: list[float], digits: int = 2) -> str:
    """Every seed's value: of two seeds a mean and its deviation would say less."""
    return " / ".join(f"{value:.{digits}f}" for value in values)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


def experts_words(task: str, runs: dict) -> set[str]:
    """What the writer of SFT's demonstrations says in four lines or more, and nobody else ever does:
    not the prompts, not the context, not the base with the context or without."""
    import collections  # here, so that the runs do not depend on it

    flags = TASKS[task]["flags"]
    said = [r["demonstration"] for r in contexts.read_prompts(DATA / sft_file(task))]
    others = [
        r["prompt"] for n in ("prompts", "heldout") for r in contexts.read_prompts(DATA / flags[n])
    ]
    others += [(DATA / flags["context_file"]).read_text()]
    others += [text for who in ("base", "teacher") for text in runs[who][0]["answers"]["said"]]
    count = collections.Counter(word for line in said for word in words(line))
    return {word for word, n in count.items() if n >= 4} - set().union(*map(words, others))


def sft_file(task: str) -> str:
    return TASKS[task].get("sft", TASKS[task]["flags"]["prompts"])


def score_table(found: dict) -> str:
    names = {"form": 2, "content": 2, "both": 2, "relevance": 2, "length": 0, "cut_off": 2}
    rows = []
    for task, runs in found.items():
        manner = experts_words(task, runs)
        for who in [who for who in WORDS if who in runs]:
            answers = [run["answers"] for run in runs[who]]
            shares = [statistics.fmean(bool(words(t) & manner) for t in a["said"]) for a in answers]
            cells = [show([a[name] for a in answers], n) for name, n in names.items()]
            rows.append([task, WORDS[who], *cells, show(shares)])
    heads = ["form", "content", "both", "relevance", "tokens", "cut off", "expert's words"]
    return table(["task", "whose answers", *heads], rows)


def cost_table(found: dict) -> str:
    rows = [
        [task, who, show([run["kl"] for run in runs[who]])]
        + [show([run["perplexity"] for run in runs[who]])]
        + [
            show([run["skills"][name] for run in runs[who] if name in run["skills"]])
            for name in SKILLS
        ]
        for task, runs in found.items()
        for who in ("base", *METHODS)
        if who in runs
    ]
    return table(["task", "model", "KL to the teacher", "perplexity", *SKILLS], rows)


def answer_table(task: str, runs: dict, count: int = 2) -> str:
    """The first held-out prompts and what the first seed's models answer."""
    said = [runs[who][0]["answers"]["said"][:count] for who in WORDS if who in runs]
    prompts = contexts.read_prompts(DATA / TASKS[task]["flags"]["heldout"])[:count]
    cell = lambda text: text.strip().replace("\n\n", "\n").replace("\n", " ⏎ ").replace("|", "\\|")
    rows = [[cell(p["prompt"]), *map(cell, texts)] for p, *texts in zip(prompts, *said)]
    return table([task, *(WORDS[who] for who in WORDS if who in runs)], rows)


def draw(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    change = lambda runs, who: [
        statistics.fmean(run["skills"][k] - runs["base"][0]["skills"][k] for k in run["skills"])
        for run in runs[who]
    ]
    answered = lambda name: lambda runs, who: [run["answers"][name] for run in runs[who]]
    panels = [
        ("form: what the context asks for", "share of held-out prompts", answered("form")),
        ("content: what is right", "share of held-out prompts, or of facts", answered("content")),
        ("old skills", "change of score, mean of the skills", change),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), constrained_layout=True)
    for axis, (title, unit, values_of) in zip(axes, panels):
        for i, (_, runs) in enumerate(found.items()):
            for shift, who in zip((-0.2, 0.2), METHODS):
                if who not in runs:
                    continue
                values, (color, hatch) = values_of(runs, who), COLORS[who]
                style = dict(color=color, alpha=0.45, edgecolor=color, hatch=hatch)
                label = who if i == 0 else None
                axis.bar(i + shift, statistics.fmean(values), 0.36, label=label, **style)
                axis.plot([i + shift] * len(values), values, "o", color="black", markersize=4)
            for who, line in {"teacher": "-", "base": ":"}.items() if title != "old skills" else ():
                (value,) = values_of(runs, who)
                label = WORDS[who] if i == 0 else None
                axis.hlines(value, i - 0.42, i + 0.42, color="black", linestyle=line, label=label)
        axis.set(title=title, ylabel=unit, xlim=(-0.6, len(found) - 0.4))
        axis.set_xticks(range(len(found)), list(found))
        axis.axhline(0, color="black", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:2]:
        axis.set_ylim(0, 1.05)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def write_page(records: list[dict], out: Path) -> dict[str, str]:
    """Writes the three files, and returns the tables by name."""
    found = numbers_of(records)
    draw(found, out / "real.png")
    minutes = sum(r["core seconds"] for r in records) / 60
    about = (
        f"{len(records)} runs in {minutes:.0f} core-minutes, dtype {records[0]['job']['dtype']}. "
        f"Digest of code and data: {records[0]['code']}. A cell with several values has one for "
        "each seed, in order."
    )
    tables = {"scores": score_table(found), "costs": cost_table(found)}
    tables |= {task: answer_table(task, runs) for task, runs in found.items()}
    head = ["# SmolLM2: form and content", "    python notebooks/evidence_real.py", about]
    (out / "real.md").write_text(
        "\n\n".join([*head, "![form, content, old skills](real.png)", *tables.values()]) + "\n"
    )
    lines = [{"job": r["job"], "code": r["code"], "numbers": unsaid(r["numbers"])} for r in records]
    text = ",\n".join(json.dumps(line) for line in lines)
    (out / "real.json").write_text(f"[\n{text}\n]\n")
    return tables


def insert(page: str, tables: dict[str, str]) -> str:
    """The page with its tables replaced: each stands between <!-- NAME --> and <!-- end -->."""
    for name, text in tables.items():
        old = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = old.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)
    return page


def unsaid(numbers):
    """Without the answers' texts, which the records have."""
    if not isinstance(numbers, dict):
        return numbers
    return {name: unsaid(value) for name, value in numbers.items() if name != "said"}


# ==================================================================================== 6. the whole
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--model", type=Path, default=ROOT / "out" / "SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bf16", help="of autocast: bf16, or fp32")
    parser.add_argument("--page", action="store_true", help="make no run")
    parser.add_argument("--smoke", action="store_true", help="seconds a run; learns nothing")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    if options.smoke and options.out == OUT:
        parser.error("--smoke needs an --out of its own")
    torch.set_num_threads(1)  # as many as the records were made with
    listed = jobs(options)
    for job in [] if options.page else listed:
        if not record_of(job, options):
            print(f"{slug(job)} ...", file=sys.stderr, flush=True)
            make(job, options)
    records = [found for job in listed if (found := record_of(job, options))]
    missing = len(listed) - len(records)
    if missing:
        print(f"{missing} of {len(listed)} runs are missing or of other code", file=sys.stderr)
    if not any(record["job"]["who"] in METHODS for record in records):
        return 1
    tables = write_page(records, options.out)
    if options.out == OUT:
        PAGE.write_text(insert(PAGE.read_text(), tables))
    print(options.out / "real.md")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; what is done is kept, the same command goes on", file=sys.stderr)
        sys.exit(130)
    except contexts.BadInput as error:
        print(f"evidence_real.py: error: {error}", file=sys.stderr)
        sys.exit(2)
