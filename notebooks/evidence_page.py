"""The evidence as tables and figures: a page for each experiment, made of runs.jsonl alone.

    python notebooks/evidence_page.py [FOLDER]        [notebooks/results/evidence]

Intervals are 95 % confidence intervals over seeds (Student's t): "mean ± half of it". A difference
is taken seed by seed before it is averaged: runs of a seed share the base, the prompts and their
order, and most of the spread between seeds is common to both. *Equal score*: a measure read where
the score first reaches a level, by straight lines between the measurements of the curve.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import evidence
import numpy as np
import torch
from evidence import BAND_AIDS, CARELESS, MIDDLE, RATES, SHARES, STAGES, TWO, WRITERS

from contexts import KINDS
from cosd import DIVERGENCES

T95 = [math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # by degrees of freedom
ENOUGH = 0.9  # of the teacher's score
LETTERS = dict(zip(KINDS, "ABCD"))
COLORS = {
    "SFT": "#D55E00",
    "off-policy": "#CC79A7",
    "GKD": "#E69F00",
    "COSD": "#0072B2",
    "COSD + anchors": "#009E73",
    "other": "#777777",
}
DASHES = {"SFT": "--", "off-policy": ":", "GKD": "-.", "COSD": "-", "COSD + anchors": (0, (5, 1))}
LOSSES = {  # divergence: colour, dashes
    "forward_kl": ("#0072B2", "-"),
    "reverse_kl": ("#D55E00", "--"),
    "jsd": ("#009E73", "-."),
    "policy_gradient": ("#CC79A7", ":"),
}


# ============================================================================================ 1. numbers over seeds
def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the 95 % confidence interval."""
    n = len(values)
    if n < 2:
        return (statistics.fmean(values) if values else math.nan), math.nan
    return statistics.fmean(values), T95[min(n - 1, 9)] * statistics.stdev(values) / math.sqrt(n)


def show(values: list[float], digits: int = 2) -> str:
    mean, half = interval(values)
    if not values:
        return "–"
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def signed(values: list[float], digits: int = 3) -> str:
    """A difference, with its sign; in bold where its interval leaves out zero."""
    if not values:
        return "–"
    mean, half = interval(values)
    text = f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")
    return f"**{text}**" if abs(mean) > half else text


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


Runs = dict[int, dict]  # seed: numbers


def select(records: list[dict], **wanted) -> Runs:
    """The runs whose job says so, by seed."""
    found = {}
    for r in records:
        if all(r["job"].get(key) == value for key, value in wanted.items()):
            found[r["job"]["seed"]] = r["numbers"]
    return found


def values(runs: Runs, key: str) -> list[float]:
    return [numbers[key] for numbers in runs.values()]


def paired(these: Runs, those: Runs, measure) -> list[float]:
    """`measure` of these less that of those, seed by seed; seeds where either has none are left out."""
    differences = []
    for seed in sorted(these.keys() & those.keys()):
        one, other = measure(these[seed]), measure(those[seed])
        if not math.isnan(one - other):
            differences.append(one - other)
    return differences


def at_score(numbers: dict, level: float, key: str) -> float:
    """The curve's `key` where its score first reaches `level`, by straight lines from the base
    (step 0: the score before, nothing lost); NaN if it never does."""
    last = {"score": numbers["before"], "step": 0, "lost": 0.0, "seconds": 0.0}
    for point in numbers["curve"]:
        if point["score"] >= level:
            way = point["score"] - last["score"]
            share = (level - last["score"]) / way if way > 0 else 1.0
            return last[key] + max(0.0, share) * (point[key] - last[key])
        last = point
    return math.nan


def reached(runs: Runs, key: str) -> list[float]:
    """`key` at .9 of the teacher's score, of the seeds that get there."""
    found = [at_score(n, ENOUGH * n["teacher"], key) for n in runs.values()]
    return [value for value in found if not math.isnan(value)]


def counted(runs: Runs, key: str, digits: int) -> str:
    """`reached`, and how many seeds did where not all."""
    there = reached(runs, key)
    if not there:
        return "never"
    few = "" if len(there) == len(runs) else f" ({len(there)} of {len(runs)})"
    return show(there, digits) + few


def bare(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)


# ====================================================================================================== 2. the pages
def family(method: str) -> str:
    """The colour of a method: its own, or that of those that are neither."""
    if "anchors" in method and method.startswith("COSD"):
        return "COSD + anchors"
    return method if method in COLORS else "other"


def forgetting_page(records: list[dict], plt) -> tuple[str, object]:
    ways = [(name, lr) for name in WRITERS for lr in RATES]
    ways += [(name, 2e-4) for name in MIDDLE] + [(name, 5e-4) for name in CARELESS | BAND_AIDS]
    figure, axes = plt.subplots(1, 4, figsize=(11, 7), sharey=True, constrained_layout=True)
    short, less, full, there = [], [], [], []
    first = lambda runs: {seed: n for seed, n in runs.items() if seed < 3}  # `onoff` has more
    for method, lr in ways:
        row, difference = [method, f"{lr:g}"], [method, f"{lr:g}"]
        for context in KINDS:
            wanted = dict(context=context, method=method, settings=settings_of(method, lr))
            runs = first(select(records, **wanted))
            cosd = dict(context=context, method="COSD", settings=settings_of("COSD", lr))
            pairs = paired(runs, first(select(records, **cosd)), lambda n: n["lost"])
            row.append(counted(runs, "lost", 3) if runs else "")
            difference.append(signed(pairs) if runs else "")
            if not runs:
                continue
            full.append(
                [LETTERS[context], method, f"{lr:g}"]
                + [show(values(runs, key)) for key in ("score", "exact")]
                + [counted(runs, "step", 0), counted(runs, "lost", 3)]
                + [show(values(runs, key), 3) for key in ("lost", "drift", "drift_new")]
            )
        if any(row[2:]):
            short.append(row)
            there.append((method, lr))
            if method != "COSD":
                less.append(difference)
    for axis, context in zip(axes, KINDS):
        for y, (method, lr) in enumerate(there):
            wanted = dict(context=context, method=method, settings=settings_of(method, lr))
            for n in first(select(records, **wanted)).values():
                learned = n["score"] >= ENOUGH * n["teacher"]
                color = COLORS[family(method)]
                axis.plot(n["lost"], y, "o", color=color, mfc=color if learned else "white")
        axis.set(
            title=f"{LETTERS[context]}  {context}", xlim=(-0.04, 1.04), xlabel="exact match lost"
        )
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        bare(axis)
    axes[0].set_yticks(range(len(there)), [f"{method}, lr {lr:g}" for method, lr in there])
    axes[0].invert_yaxis()
    figure.suptitle(
        "Old skills lost after 100 steps; a point a seed, hollow: below .9 of the teacher on the new task"
    )
    short_head = ["method", "lr", *(f"{LETTERS[context]} {context}" for context in KINDS)]
    head = ["", "method", "lr", "score", "exact", "steps to .9", "lost at .9", "lost at the end"]
    text = (
        "Old skills lost (mean change of exact match over five suites) where the new task first scores .9 of the teacher.\n\n"
        + table(short_head, short)
        + "\n\nOld skills lost after 100 steps, less what COSD (forward KL, frozen teacher, no anchors) loses at the same rate, in pairs.\n\n"
        + table(short_head, less)
        + "\n\nEverything, at the end of 100 steps where nothing else is said.\n\n"
        + table([*head, "drift, old prompts", "KL, new prompts"], full)
    )
    return text, figure


def settings_of(method: str, lr: float) -> dict:
    return (WRITERS | MIDDLE | CARELESS | BAND_AIDS | SHARES)[method] | {"lr": lr}


def onoff_page(records: list[dict], plt) -> tuple[str, object]:
    """SFT, off-policy and GKD, each less COSD, in pairs."""
    others = ("SFT", "off-policy", "GKD")
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True, constrained_layout=True)
    learned, kept = [], []
    for axis, context in zip(axes, ("demonstrations", "instructions", "privileged")):
        for i, lr in enumerate(RATES):
            runs = {}
            for method in ("COSD", *others):
                wanted = dict(context=context, method=method, settings=settings_of(method, lr))
                runs[method] = select(records, **wanted)
            head = [LETTERS[context], f"{lr:g}"]
            row, other = [*head, show(values(runs["COSD"], "score"))], [*head]
            other.append(show(values(runs["COSD"], "lost"), 3))
            for j, method in enumerate(others):
                pair = runs[method], runs["COSD"]
                row.append(signed(paired(*pair, lambda n: n["curve"][0]["score"]), 2))
                row.append(signed(paired(*pair, lambda n: n["score"]), 2))
                steps = paired(*pair, lambda n: n["lost"])
                score = equal_score(*pair)
                other += [signed(steps), signed(score)]
                for k, (differences, mark) in enumerate(((steps, "s"), (score, "o"))):
                    if not differences:
                        continue
                    x = i + (j - 1) * 0.28 + (k - 0.5) * 0.12
                    mean, half = interval(differences)
                    color = COLORS[method]
                    axis.plot([x] * len(differences), differences, ".", color=color, alpha=0.35)
                    label = f"{method}, equal {('steps', 'score')[k]}"
                    axis.errorbar(
                        x, mean, half, fmt=mark, color=color, capsize=3, label=label if not i else None,
                        mfc=color if k else "white",
                    )  # fmt: skip
            learned.append(row)
            kept.append(other)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(
            title=f"{LETTERS[context]}  {context}",
            xticks=range(3),
            xticklabels=[f"{lr:g}" for lr in RATES],
            xlabel="learning rate",
        )
        bare(axis)
    axes[0].set_ylabel("old skills lost, less COSD's\n(exact match; above 0: COSD loses less)")
    axes[2].legend(frameon=False, fontsize=7)
    one = ["", "lr", "COSD: score at the end"]
    two = ["", "lr", "COSD: lost at the end"]
    for method in others:
        one += [f"{method} less COSD: after 25 steps", "at the end"]
        two += [f"{method} less COSD: at equal steps", "at equal score"]
    text = "Score on the new task, without context.\n\n" + table(one, learned)
    text += "\n\nOld skills lost.\n\n" + table(two, kept)
    return text, figure


def equal_score(these: Runs, those: Runs) -> list[float]:
    """Differences of what is lost, each pair read at the highest score that both of it reach."""
    differences = []
    for seed in sorted(these.keys() & those.keys()):
        tops = [max(p["score"] for p in runs[seed]["curve"]) for runs in (these, those)]
        one, other = (at_score(runs[seed], min(tops), "lost") for runs in (these, those))
        differences.append(one - other)
    return differences


STATES = {
    "own": "on the student's answers",
    "teacher's": "on the teacher's answers",
    "mistake": "after a mistake",
}


def exposure_page(records: list[dict], plt) -> tuple[str, object]:
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.4), constrained_layout=True)
    rows, ends = [], []
    for line, context in zip(axes, ("demonstrations", "privileged")):
        for name in WRITERS:
            runs = select(records, do="exposure", context=context, name=name)
            if not runs:
                continue
            curves = [n["curve"] for n in runs.values()]
            steps = [point["step"] for point in curves[0]]
            for axis, key in zip(line, (*STATES, "recovers")):
                means = [statistics.fmean(c[i][key] for c in curves) for i in range(len(steps))]
                axis.plot(steps, means, DASHES[name], color=COLORS[name], marker="o", label=name)
            last = [c[-1] for c in curves]
            of_seeds = lambda key, last=last: show([point[key] for point in last], 3)
            difference = [p["own"] - p["teacher's"] for p in last]
            cosd = select(records, do="exposure", context=context, name="COSD")
            less = paired(runs, cosd, lambda n: n["curve"][-1]["mistake"]) if name != "COSD" else []
            row = [LETTERS[context], name, show([p["score"] for p in last])]
            rows.append([*row, *map(of_seeds, STATES), signed(difference), signed(less)])
            if context == "privileged":
                share = [show([p[key] for p in last]) for key in ("recovers", "goes on")]
                ends.append([name, *share])
        for axis, what in zip(line, STATES.values()):
            axis.set(title=f"{LETTERS[context]}: {what}", xlabel="steps", yscale="log")
            bare(axis)
        line[0].set_ylabel("KL(teacher‖student), nats per token")
        line[3].set(title=f"{LETTERS[context]}: who recovers", xlabel="steps", ylim=(0, 1))
        line[3].set_ylabel("share of answers that end right")
        bare(line[3])
    axes[0, 3].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", frameon=False)
    teachers = select(records, do="exposure", context="privileged", name="COSD")
    ceiling = [show(values(teachers, f"teacher {key}")) for key in ("recovers", "goes on")]
    ends.append(["the teacher, who sees the solution", *ceiling])
    head = ["", "who writes y", "score", *(f"KL {what}" for what in STATES.values())]
    text = "After 100 steps at 2e-4. KL(teacher‖student), nats per token.\n\n"
    text += table([*head, "student's less teacher's", "after a mistake, less COSD's"], rows)
    text += "\n\nD, given a wrong first step (the right letters in another order): what the greedy answer ends in.\n\n"
    return text + table(
        ["who wrote y", "the right word", "what follows from the mistake"], ends
    ), figure


def razor_points(records: list[dict]) -> list[dict]:
    """Every measurement of every run, each seed for itself."""
    points = []
    for r in records:
        for row in r["numbers"]["curve"]:
            points.append({"context": r["job"]["context"], "method": r["job"]["method"]} | row)
    return points


def r_squared(x: np.ndarray, y: np.ndarray, degree: int) -> float:
    if not len(y) or y.std() == 0:
        return math.nan
    residual = y - np.polyval(np.polyfit(x, y, degree), x)
    return 1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()


def razor_page(records: list[dict], plt) -> tuple[str, object]:
    points = [p for p in razor_points(records) if p["method"] != "COSD, live teacher"]
    helped = lambda p: "anchors" in p["method"] or "replay" in p["method"]
    groups = {"all": points}
    groups["without anchors or replay"] = [p for p in points if not helped(p)]
    groups["with anchors or replay"] = [p for p in points if helped(p)]
    groups |= {LETTERS[c]: [p for p in points if p["context"] == c] for c in KINDS}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    marks = {
        "without anchors or replay": ("o", "#0072B2"),
        "with anchors or replay": ("x", "#D55E00"),
    }
    for axis, key, on in zip(axes, ("drift_new", "drift"), ("the new task's", "the old")):
        for name, (mark, color) in marks.items():
            x, y = ([p[k] for p in groups[name]] for k in (key, "lost"))
            axis.plot(x, y, mark, color=color, markersize=4, alpha=0.6, label=name)
        axis.set(title=f"Measured on {on} prompts", xlim=(0, None))
        axis.set_xscale("symlog", linthresh=0.01)
        bare(axis)
    figure.supxlabel(
        "KL(base‖tuned), nats per token: linear below .01, logarithmic above", fontsize=10
    )
    axes[0].set_ylabel("old skills lost (exact match)")
    axes[0].legend(frameon=False, fontsize=8)
    rows = []
    for name, own in groups.items():
        y, fits = np.array([p["lost"] for p in own]), []
        for key in ("drift_new", "drift"):
            x = np.array([p[key] for p in own])
            fits += [f"{r_squared(x, y, degree):.2f}" for degree in (1, 2)]
        rows.append([name, str(len(own)), *fits])
    head = ["runs", "measurements", "KL on new prompts: R² of a line", "of a parabola"]
    return table([*head, "KL on old prompts: R² of a line", "of a parabola"], rows), figure


def rote_page(records: list[dict], plt) -> tuple[str, object]:
    """B: items trained on and held out. D: chains of lengths trained on, and longer ones."""
    ways = [(name, 5e-4) for name in [*WRITERS, *CARELESS, *BAND_AIDS]]
    ways += [(name, 2e-4) for name in MIDDLE]
    lengths, rows = [f"{n} verbs" for n in (2, 3, 4, 5)], []
    figure, axis = plt.subplots(figsize=(7.5, 3.4), constrained_layout=True)
    bars, place = ["SFT", "off-policy", "COSD", "COSD + anchors 1/2"], 0
    for method, lr in ways:
        wanted = dict(method=method, settings=settings_of(method, lr))
        b, d = (select(records, context=context, **wanted) for context in (evidence.B, evidence.D))
        if not b:
            continue
        row = [method, f"{lr:g}", show([n["beyond"]["trained"] for n in b.values()])]
        row += [show(values(b, "score"))]
        by_length = [[n["beyond"][name] for n in d.values()] for name in lengths]
        rows.append([*row, *map(show, by_length)])
        if method in bars:
            x = [i + 0.2 * (place - 1.5) for i in range(4)]
            means, halves = zip(*map(interval, by_length))
            hatch = ["//", "..", "", "xx"][place]
            color = COLORS[family(method)]
            axis.bar(x, means, 0.2, yerr=halves, color=color, hatch=hatch, label=method, capsize=2)
            place += 1
    axis.set(xticks=range(4), xticklabels=lengths, ylabel="share of answers that end right")
    axis.set(ylim=(0, 1.35), yticks=[0, 0.5, 1], title="D: trained on chains of 2 and 3 verbs")
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="upper right")
    bare(axis)
    head = ["method", "lr", "B: trained", "B: held out", *(f"D: {name}" for name in lengths)]
    return table(head, rows), figure


def anchors_page(records: list[dict], plt) -> tuple[str, object]:
    ways = ["COSD", *(f"COSD + anchors 1/{n}" for n in (16, 8, 4, 2))]
    ways += ["COSD, EMA teacher", "COSD, EMA teacher + anchors 1/8"]
    ways += ["COSD, live teacher", "COSD, live teacher + anchors 1/2"]
    ways += ["SFT", "SFT + anchors 1/8", "SFT + anchors 1/2"]
    ways += [f"SFT + replay 1/{n}" for n in (16, 8, 2)]
    kinds = (evidence.A, evidence.C)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, constrained_layout=True)
    rows = []
    for axis, context in zip(axes, kinds):
        for y, method in enumerate(ways):
            wanted = dict(context=context, method=method, settings=settings_of(method, 5e-4))
            runs = {seed: n for seed, n in select(records, **wanted).items() if seed < 3}
            if not runs:
                continue
            replay = dict(method="SFT + replay 1/8", settings=settings_of("SFT + replay 1/8", 5e-4))
            budget = select(records, context=context, **replay)
            both = sorted(runs.keys() & budget.keys())
            spent = [at_seconds(runs[seed], budget[seed]["seconds"]) for seed in both]
            rows.append(
                [LETTERS[context], method, show(values(runs, "score")), counted(runs, "step", 0)]
                + [counted(runs, "lost", 3)]
                + [show(values(runs, key), 3) for key in ("lost", "drift")]
                + [show([new for new, _ in spent]), show([old for _, old in spent], 3)]
            )
            color = COLORS["SFT"] if method.startswith("SFT") else COLORS["COSD"]
            for n in runs.values():
                learned = n["score"] >= ENOUGH * n["teacher"]
                axis.plot(n["lost"], y, "o", color=color, mfc=color if learned else "white")
        axis.set(title=f"{LETTERS[context]}  {context}", xlabel="old skills lost (exact match)")
        axis.set(xlim=(-0.04, 1.04))
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        bare(axis)
    axes[0].set_yticks(range(len(ways)), ways)
    axes[0].invert_yaxis()
    head = ["", "method", "score", "steps to .9", "lost at .9", "lost at the end", "drift"]
    return table([*head, "score at equal seconds", "lost at equal seconds"], rows), figure


def at_seconds(numbers: dict, seconds: float) -> tuple[float, float]:
    """(score, lost) of the curve after so many seconds of training, by straight lines."""
    points = [{"seconds": 0.0, "score": numbers["before"], "lost": 0.0}, *numbers["curve"]]
    times = [point["seconds"] for point in points]
    found = [np.interp(seconds, times, [p[key] for p in points]) for key in ("score", "lost")]
    return float(found[0]), float(found[1])


def lora_page(records: list[dict], plt) -> tuple[str, object]:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, constrained_layout=True)
    rows = []
    for axis, method in zip(axes, ("SFT", "COSD")):
        ways = [(method, lr) for lr in RATES]
        ways += [(f"{method}, LoRA {rank}", 1e-3) for rank in (2, 8, 32)]
        ways += [(f"{method}, LoRA 8", lr) for lr in (5e-4, 3e-3)]
        for name, lr in ways:
            runs = select(records, context=evidence.A, method=name, name=f"{name}, lr {lr:g}")
            runs = {seed: n for seed, n in runs.items() if seed < 3}
            if not runs:
                continue
            rows.append(
                [name, f"{lr:g}", show(values(runs, "score")), counted(runs, "step", 0)]
                + [counted(runs, "lost", 3), show(values(runs, "lost"), 3)]
                + [show(values(runs, "drift"), 3), show(values(runs, "moved"), 3)]
                + [show(values(runs, "rank"), 1)]
            )
            adapted = "LoRA" in name
            x, y = ([statistics.fmean(values(runs, key))] for key in ("moved", "lost"))
            color = COLORS[method]
            axis.plot(x, y, "^" if adapted else "o", color=color, mfc="white" if adapted else color)
            for n in runs.values():
                axis.plot(
                    n["moved"], n["lost"], "^" if adapted else "o", color=color, alpha=0.3, ms=4
                )
            label = f"{name.rpartition('LoRA ')[2] if adapted else 'full'}, {lr:g}"
            axis.annotate(
                label, (x[0], y[0]), xytext=(5, 3), textcoords="offset points", fontsize=7
            )
        axis.set(title=f"{method}: full (●) and LoRA (△: rank, rate)", ylim=(-0.03, 1))
        axis.set(xlabel="how far the matrices moved: ‖ΔW‖ / ‖W‖")
        bare(axis)
    axes[0].set_ylabel("old skills lost (exact match)")
    head = ["method", "lr", "score", "steps to .9", "lost at .9", "lost at the end", "drift"]
    return table([*head, "‖ΔW‖ / ‖W‖", "stable rank of ΔW"], rows), figure


def straight_page(records: list[dict], plt) -> tuple[str, object]:
    names = [*TWO, "SFT to COSD"]
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), constrained_layout=True)
    rows, everything = [], []
    titles = {"score": "new verb (score)", "lost": "old skills lost (exact match)", "old": "old data (−log p, nats per token)"}  # fmt: skip
    looks = dict(zip(names, [("SFT", "s"), ("COSD", "o"), ("COSD + anchors", "^"), ("other", "D")]))
    for line, which in zip(axes, ("base to tuned", "tuned to tuned")):
        for name in names:
            runs = select(records, do="straight", name=name)
            if not runs or (which, name) == ("base to tuned", "SFT to COSD"):
                continue
            lines = [n[which] for n in runs.values()]
            alphas = [row["alpha"] for row in lines[0]]
            method, mark = looks[name]
            for axis, key in zip(line, titles):
                means = [statistics.fmean(own[i][key] for own in lines) for i in range(len(alphas))]
                axis.plot(alphas, means, marker=mark, color=COLORS[method], label=name)
            inside = [i for i, alpha in enumerate(alphas) if alpha <= 1.001]
            barriers = [
                [barrier([own[i] for i in inside], key) for own in lines] for key in ("new", "old")
            ]
            worst = [min(own[i]["score"] for i in inside) for own in lines]
            most = [max(own[i]["lost"] for i in inside) for own in lines]
            rows.append([which, name, *(show(b, 3) for b in barriers), show(worst), show(most, 3)])
            for i, alpha in enumerate(alphas):
                cells = [
                    show([own[i][key] for own in lines], 3)
                    for key in ("score", "lost", "new", "old")
                ]
                everything.append([which, name, f"{alpha:.2f}", *cells])
        for axis, title in zip(line, titles.values()):
            ends = {"base to tuned": "base (0) to tuned (1), and beyond"}
            axis.set(
                title=title, xlabel=f"α: {ends.get(which, 'one tuned model (0) to another (1)')}"
            )
            bare(axis)
        line[0].set(ylabel=which, ylim=(-0.03, 1.05))
        line[0].legend(frameon=False, fontsize=7)
    head = ["line", "method", "barrier, new task", "barrier, old data", "lowest score", "most lost"]
    text = "A barrier: how far the loss (nats per token) rises above the straight line between its two ends, at most.\n\n"
    text += table(head, rows) + "\n\n"
    head = [
        "line",
        "method",
        "α",
        "score",
        "old skills lost",
        "loss on the new task",
        "on old data",
    ]
    return text + table(head, everything), figure


def barrier(line: list[dict], key: str) -> float:
    """The most by which the loss on the line exceeds the straight line between its ends."""
    first, last = line[0][key], line[-1][key]
    return max(row[key] - (1 - row["alpha"]) * first - row["alpha"] * last for row in line)


def recovery_page(records: list[dict], plt) -> tuple[str, object]:
    runs = [r["numbers"] for r in records]
    figure, axis = plt.subplots(figsize=(6, 3.8), constrained_layout=True)
    steps = [row["step"] for row in runs[0]["curve"]]
    looks = {"score": ("#0072B2", "-", "knows the new verb"), "lost": ("#D55E00", "--", "old skills lost")}  # fmt: skip
    for key, (color, dashes, label) in looks.items():
        for n in runs:
            axis.plot(steps, [row[key] for row in n["curve"]], dashes, color=color, alpha=0.35)
        means = [statistics.fmean(n["curve"][i][key] for n in runs) for i in range(len(steps))]
        axis.plot(steps, means, dashes, color=color, marker="o", linewidth=2, label=label)
    axis.set(xlabel="steps of distillation from the original, on plain prompts", ylim=(-0.03, 1.05))
    axis.set(ylabel="share of prompts", title="Recovery after SFT (thin: each seed)")
    axis.legend(frameon=False)
    bare(axis)
    rows = []
    for i, step in enumerate(steps):
        cells = [
            show([n["curve"][i][key] for n in runs], 3)
            for key in ("score", "exact", "lost", "drift")
        ]
        rows.append([str(step), *cells, show([n["curve"][i]["skills"]["verbs"] for n in runs])])
    head = [
        "steps after SFT",
        "new verb: score",
        "exact",
        "old skills lost",
        "drift",
        "known verbs",
    ]
    return table(head, rows), figure


def continual_page(records: list[dict], plt) -> tuple[str, object]:
    groups: dict[str, list] = {}
    for r in records:
        groups.setdefault(r["job"]["name"], []).append(r["numbers"]["stages"])
    figure, axes = plt.subplots(1, len(groups), figsize=(2.1 * len(groups), 2.9), squeeze=False)
    rows = []
    for axis, (name, runs) in zip(axes[0], groups.items()):
        matrix = np.array(
            [[[stage["score"][v] for v in range(3)] for stage in run] for run in runs]
        )
        mean = matrix.mean(0)  # (stage, verb)
        axis.imshow(mean, vmin=0, vmax=1, cmap="cividis")
        for s in range(3):
            for v in range(3):
                color = "white" if mean[s, v] < 0.6 else "black"
                axis.text(v, s, f"{mean[s, v]:.2f}", ha="center", va="center", color=color)
            scores = [show(matrix[:, s, v].tolist()) for v in range(3)]
            rows.append([name, STAGES[s][0], *scores, show([run[s]["lost"] for run in runs], 3)])
        axis.set_title(name.replace(", ", ",\n").replace(" + ", "\n+ "), fontsize=9)
        axis.set_xticks(range(3), [s[0] for s in STAGES])
        axis.set_yticks(
            range(3), [f"after {s[0]}" for s in STAGES] if axis is axes[0, 0] else [""] * 3
        )
    figure.suptitle("Score on each verb (columns) after each stage (rows)")
    figure.tight_layout()
    head = ["method", "after learning", *(f"score on {s[0]}" for s in STAGES), "old skills lost"]
    return table(head, rows), figure


def fit_gaussian(divergence, x, teacher_logits, start: float) -> tuple[float, float, float]:
    """The student is one Gaussian, as logits on a grid: our own divergences apply. -> (its mean, its deviation, the divergence)."""
    mu = torch.tensor(start, dtype=x.dtype, requires_grad=True)
    log_sigma = torch.zeros((), dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([mu, log_sigma], lr=0.05)
    for _ in range(600):
        loss = divergence(-(((x - mu) / log_sigma.exp()) ** 2) / 2, teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mu.item(), log_sigma.exp().item(), loss.item()


def fit_factors(divergence, teacher_logits: torch.Tensor, seed: int) -> torch.Tensor:
    """The student says two words independently of each other, logits u_a + v_b: too small for "the one or the other". -> Q (4, 4)."""
    words = []
    for i in (0, 100):
        generator = torch.Generator().manual_seed(seed + i)
        words.append(torch.randn(4, generator=generator).double().requires_grad_())
    u, v = words
    optimizer = torch.optim.Adam(words, lr=0.05)
    for _ in range(1000):
        loss = divergence((u[:, None] + v).flatten(), teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (u[:, None] + v).flatten().softmax(-1).view(4, 4).detach()


def modes_page(records: list[dict], plt) -> tuple[str, object]:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    toy = gaussians(axes[0])
    pulls(axes[1])
    groups = {name: select(records, name=name) for name in (*DIVERGENCES, "policy_gradient")}
    groups = {name: runs for name, runs in groups.items() if runs}
    first = next(iter(groups.values()))
    bars = {who: values(first, who) for who in ("base", "teacher")}
    bars |= {name: values(runs, "student") for name, runs in groups.items()}
    keys, rows = ("reverse", "rotate", "neither", "distinct", "entropy"), []
    for i, (name, found) in enumerate(bars.items()):
        rows.append([name, *(show([n[key] for n in found]) for key in keys)])
        bottom = 0.0
        for key, color, hatch in zip(keys[:3], ("#0072B2", "#E69F00", "#BBBBBB"), ("", "//", "..")):
            mean = statistics.fmean(n[key] for n in found)
            label = key if i == 0 else None
            axes[2].bar(i, mean, bottom=bottom, color=color, hatch=hatch, label=label)
            bottom += mean
    axes[2].set(title="In the world: two demonstrations that disagree", ylim=(0, 1.35))
    axes[2].set(ylabel="share of 16 samples", yticks=[0, 0.5, 1])
    axes[2].set_xticks(range(len(bars)), [name.replace("_", "\n") for name in bars])
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
        bare(axis)
    head = ["divergence", "Gaussian: mean", "deviation", "divergence left"]
    head += ["two words: on the two modes", "on mixtures of them", "on the likelier mode"]
    text = table(head, toy) + "\n\n"
    head = ["who", "says reverse", "rotate", "neither", "different answers of 16"]
    return text + table([*head, "entropy, nats per token"], rows), figure


def gaussians(axis) -> list[list[str]]:
    """One Gaussian for a mixture of two, one pair of independent words for two pairs -> rows."""
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    left = math.log(0.65) - ((x + 2) / 0.6) ** 2 / 2 - math.log(0.6)
    right = math.log(0.35) - ((x - 2) / 0.9) ** 2 / 2 - math.log(0.9)
    teacher = torch.logaddexp(left, right)
    both = torch.full((4, 4), 0.02 / 14, dtype=torch.float64)
    both[0, 0] = both[1, 1] = 0.49
    pairs = both.log().flatten()
    density = lambda logits: logits.softmax(-1) / (x[1] - x[0])
    axis.fill_between(x, density(teacher), color="#CCCCCC", label="teacher")
    rows = []
    for name, divergence in DIVERGENCES.items():
        fits = [fit_gaussian(divergence, x, teacher, start) for start in (-2.0, 0.0, 2.0)]
        mu, sigma, value = min(fits, key=lambda fit: fit[2])
        color, dashes = LOSSES[name]
        axis.plot(x, density(-(((x - mu) / sigma) ** 2) / 2), dashes, color=color, label=name)
        factors = [fit_factors(divergence, pairs, seed) for seed in range(8)]
        q = min(factors, key=lambda q: divergence(q.log().flatten(), pairs).item())
        on = q[0, 0] + q[1, 1], q[0, 1] + q[1, 0], max(q[0, 0], q[1, 1])
        rows.append([name, f"{mu:.2f}", f"{sigma:.2f}", f"{value:.3f}", *(f"{p:.2f}" for p in on)])
    axis.set(title="One Gaussian for two modes", xlabel="x", ylabel="density")
    return rows


def pulls(axis) -> None:
    """The gradient on the logit of the right one of ten tokens, against the student's probability of it."""
    right = torch.logspace(-6, -0.01, 60, dtype=torch.float64)[:, None]
    rest = ((1 - right) * 0.01 / 8).expand(-1, 8)
    student = torch.cat([right, (1 - right) * 0.99, rest], dim=1).log().requires_grad_()
    knows = torch.tensor([0.991] + [0.001] * 9, dtype=torch.float64).log().expand_as(student)
    for name, divergence in DIVERGENCES.items():
        (gradient,) = torch.autograd.grad(divergence(student, knows).sum(), student)
        color, dashes = LOSSES[name]
        axis.loglog(right, gradient[:, 0].abs(), dashes, color=color, label=name)
    axis.set(title="A confident student: pull on the right token", ylabel="|dL / dlogit|")
    axis.set(xlabel="student's probability of it")


def quality_page(records: list[dict], plt) -> tuple[str, object]:
    figure, axis = plt.subplots(figsize=(7, 3.8), constrained_layout=True)
    rows, names = [], []
    for job in evidence.jobs_of("quality", 0):
        runs = select(records, context=job["context"], name=job["name"])
        if not runs:
            continue
        cells = [show(values(runs, key)) for key in ("teacher", "student", "lost")]
        better = signed([n["student"] - n["teacher"] for n in runs.values()], 2)
        rows.append([LETTERS[job["context"]], job["name"], *cells[:2], better, cells[2]])
        y, looks = (
            len(names),
            {"teacher": ("s", "#777777", -0.15), "student": ("o", "#0072B2", 0.15)},
        )
        for key, (mark, color, shift) in looks.items():
            label = key if not names else None
            axis.plot(
                statistics.fmean(values(runs, key)), y + shift, mark, color=color, label=label
            )
            axis.plot(
                values(runs, key), [y + shift] * len(runs), mark, color=color, alpha=0.3, ms=4
            )
        names.append(f"{LETTERS[job['context']]}  {job['name']}")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="score (the teacher's in its worse context, the student's without any)")
    axis.set(xlim=(-0.03, 1.03), title="The student beside its teacher")
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    bare(axis)
    head = ["", "context", "teacher", "student after", "student less teacher", "old skills lost"]
    return table(head, rows), figure


# ====================================================================================================== 3. writing
PAGES = {  # name: (page, question)
    "forgetting": (forgetting_page, "At equal score on the new task, which method loses least of what the model knew?"),
    "onoff": (onoff_page, "Does it matter who writes the answers that the teacher scores?"),
    "exposure": (exposure_page, "Who agrees with the teacher where the student really is, and who recovers from a mistake?"),
    "razor": (razor_page, "Does KL(base‖tuned) on the new task predict forgetting, or KL on the old prompts?"),
    "rote": (rote_page, "Is it the rule that is learned, or the examples?"),
    "anchors": (anchors_page, "How few old prompts suffice, and what do they cost?"),
    "lora": (lora_page, "Does LoRA forget less at equal score?"),
    "straight": (straight_page, "Is there a barrier between the base and a tuned model, or between two tuned models?"),
    "recovery": (recovery_page, "Do skills that SFT destroyed come back when the original model is the teacher, and does the new one stay?"),
    "continual": (continual_page, "Three new verbs in a row: what is left of the first when the third is learned?"),
    "modes": (modes_page, "What does each divergence do with a teacher that has two modes?"),
    "quality": (quality_page, "Can the student be better than a teacher with a bad context?"),
}  # fmt: skip


def of_experiment(records: list[dict], name: str) -> list[dict]:
    """The records of the jobs that an experiment names."""
    slugs = set()
    for seed in {r["job"]["seed"] for r in records}:
        slugs |= {evidence.slug(job) for job in evidence.jobs_of(name, seed)}
    return [r for r in records if evidence.slug(r["job"]) in slugs]


def page(records: list[dict], name: str, plt) -> tuple[str, object]:
    """An experiment's page as Markdown, and its figure."""
    own = of_experiment(records, name)
    make, question = PAGES[name]
    text, figure = make(own, plt)
    seeds = len({r["job"]["seed"] for r in own})
    spent = sum(r["seconds"] for r in own) / 60
    about = f"{len(own)} runs, up to {seeds} seeds, {spent:.0f} core-minutes; mean ± half the 95 % confidence interval; bold: a difference whose interval leaves out zero."
    command = f"    python notebooks/evidence.py {name}"
    return f"# {question}\n\n{command}\n\n{about}\n\n![{name}]({name}.png)\n\n{text}\n", figure


def write(folder: Path, names: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    for name in names:
        text, figure = page(records, name, plt)
        (folder / f"{name}.md").write_text(text)
        figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})
        plt.close(figure)
        print(folder / f"{name}.md")


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "notebooks" / "results" / "evidence"
    write(where, list(PAGES))
