"""The report of a folder: all its complete runs as a table and a figure.

    python notebooks/report.py out

reads out/*-seed*/state.pt and writes results.json, results.md and figure.png beside them.
`python train.py` ends with it.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from contexts import KINDS, BadInput, reading

COLUMNS = {  # title: (where it stands in a result, digits)
    "teacher": ("before.teacher.score", 2),
    "before": ("before.task.score", 2),
    "after": ("after.task.score", 2),
    "exact": ("after.task.exact", 2),
    "KL before": ("before.kl", 3),
    "KL after": ("after.kl", 3),
    "prior": ("prior", 3),
    "steerability": ("steerability", 3),
    "drift": ("after.drift", 4),
    "cut off": ("after.task.cut_off", 2),
    "over-refusal": ("after.task.over_refusal", 2),
    "tokens saved": ("before.tokens_saved", 0),
    "seconds": ("seconds", 0),
}
MEANING = {
    "teacher": "score of the base with C in its prompt",
    "before": "score of the base without C: share of held-out prompts answered rightly, greedily",
    "after": "the same after training",
    "exact": "the score that counts the manner as well as the content",
    "KL before": "KL(student‖teacher) on the student's own held-out samples, nats per token",
    "KL after": "the same after training",
    "prior": "change of exact match on skills that the base had without any context",
    "steerability": "mean change of exact match under other contexts",
    "drift": "KL(base‖tuned) on old prompts in their contexts, nats per token",
    "cut off": "share of the answers after training that --max-new-tokens cut off",
    "over-refusal": "share of allowed items that were refused",
    "tokens saved": "length of C in tokens, per prompt",
    "seconds": "training alone",
}
PANELS = {  # the figure's, the first four that some run has
    "Learned: content and manner, without C": "after.task.exact",
    "Kept: change under other contexts": "steerability",
    "Forgotten: skills known without context": "prior",
    "Moved: KL(base‖tuned)": "after.drift",
    "Learned: score without C": "after.task.score",
    "Left to learn: KL to the teacher": "after.kl",
}
COLORS = {"cosd": "#0072B2", "sft": "#D55E00", "offline": "#CC79A7", "gkd": "#009E73"}


def read_results(out: Path) -> list[dict]:
    """The results of the complete runs of a folder, kinds in their order."""
    results = []
    for path in sorted(out.glob("*-seed*/state.pt")):
        if path.parent.suffix:  # .unfinished
            continue
        with reading(f"{path} cannot be used; delete it"):
            result = torch.load(path, map_location="cpu", weights_only=True)["result"]
            if result is not None:  # None: the run is not complete
                results.append(with_changes(result))
    order = list(KINDS)

    def place(result: dict) -> tuple:
        config, kind = result["config"], kind_of(result)
        known = order.index(kind) if kind in order else len(order)
        return known, config["method"], config.get("lr") or 0.0, config.get("seed") or 0

    return sorted(results, key=place)


def kind_of(result: dict) -> str:
    return result["config"]["context"]


def with_changes(result: dict) -> dict:
    """With the change of exact match on old skills: the known verbs, and the mean of the rest."""
    change = {}
    for name, before in result["before"].items():
        if isinstance(before, dict) and "exact" in before and name not in ("task", "teacher"):
            change[name] = result["after"][name]["exact"] - before["exact"]
    if "verbs" not in change:
        return result
    result = result | {"prior": change.pop("verbs")}
    if change:
        result["steerability"] = statistics.fmean(change.values())
    return result


def look_up(result: dict, path: str) -> float:
    """result["a"]["b"] for "a.b"; NaN where a run has no such number."""
    value = result
    for key in path.split("."):
        value = value.get(key, math.nan) if isinstance(value, dict) else math.nan
    return value


def over_seeds(values: list[float]) -> tuple[float, float]:
    """(mean, standard deviation) of the runs that have the number; NaN where none has it, or where
    one alone cannot deviate."""
    there = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(there) if there else math.nan
    return mean, statistics.stdev(there) if len(there) > 1 else math.nan


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation over seeds."""
    mean, deviation = over_seeds(values)
    if math.isnan(mean):
        return ""
    text = f"{mean:.{digits}f}"
    return text if math.isnan(deviation) else f"{text} ± {deviation:.{digits}f}"


def anywhere(results: list[dict], path: str) -> bool:
    return not all(math.isnan(look_up(result, path)) for result in results)


def by_setting(results: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(result["setting"], []).append(result)
    return groups


def differences(results: list[dict]) -> list[str]:
    """The settings, beside method and seed, in which runs of one kind and method differ."""
    names = []
    for name in results[0]["config"]:
        for result in results:
            same = [r for r in results if r["config"]["method"] == result["config"]["method"]]
            values = {json.dumps(r["config"][name]) for r in same if kind_of(r) == kind_of(result)}
            if len(values) > 1 and name not in ("seed", "base", *names):
                names.append(name)
    return names


def table(results: list[dict]) -> str:
    """Markdown, a row for each setting, its seeds together; columns that nobody fills left out."""
    titles = []
    for title, (path, _) in COLUMNS.items():
        if anywhere(results, path):
            titles.append(title)
    told = differences(results)
    rows = [["context", "method", *told, *titles]]
    rows.append(["---"] * len(rows[0]))
    for runs in by_setting(results).values():
        config = runs[0]["config"]
        cells = [kind_of(runs[0]), config["method"], *(str(config[name]) for name in told)]
        for title in titles:
            path, digits = COLUMNS[title]
            cells.append(spread([look_up(run, path) for run in runs], digits))
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def legend(text: str) -> str:
    """What the columns that are shown mean."""
    head = text.partition("\n")[0]
    told = [f"*{title}*: {MEANING[title]}" for title in COLUMNS if f"| {title} |" in head]
    return ". ".join(told) + ". ±: standard deviation over seeds.\n"


def draw(results: list[dict], path: Path) -> None:
    """What was learned and what was lost, a bar a setting; error bars over seeds."""
    try:
        from matplotlib.figure import Figure  # not pyplot: a notebook's own pictures stay
    except ImportError:
        print("No figure: matplotlib is not installed (it comes with the extra [notebooks]).")
        return
    shown = {title: place for title, place in PANELS.items() if anywhere(results, place)}
    if not shown:
        print("No figure: no run has a number to draw.")
        return
    while len(shown) > 4:  # the last ones are told best by the table
        shown.popitem()
    kinds = list(dict.fromkeys(kind_of(result) for result in results))
    settings = list(dict.fromkeys(label(result, results) for result in results))
    width = max(4.0, 0.95 * len(kinds))  # the kinds' names stay apart
    figure = Figure(figsize=(width * len(shown), 3.6), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (title, place) in zip(axes, shown.items()):
        draw_panel(axis, place, kinds, settings, results)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("nats per token" if "KL" in title else "share of prompts", fontsize=8)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(settings),
        frameon=False,
        fontsize=9,
    )
    unfinished = path.with_suffix(".tmp")
    figure.savefig(unfinished, dpi=120, format="png")
    os.replace(unfinished, path)


def label(result: dict, results: list[dict]) -> str:
    told = [f"{name} {result['config'][name]}" for name in differences(results)]
    return ", ".join([result["config"]["method"].upper(), *told])


def draw_panel(axis, place: str, kinds: list, settings: list, results: list[dict]) -> None:
    """One number of all settings, grouped by kind of context."""
    width = 0.8 / len(settings)
    hatches = ["", "///", "...", "xxx", "\\\\\\"]
    for i, setting in enumerate(settings):
        runs = [r for r in results if label(r, results) == setting]
        means, errors = [], []
        for kind in kinds:
            values = [look_up(r, place) for r in runs if kind_of(r) == kind]
            mean, deviation = over_seeds(values)
            means.append(mean)
            errors.append(0.0 if math.isnan(deviation) else deviation)
        at = [x + (i - (len(settings) - 1) / 2) * width for x in range(len(kinds))]
        method = runs[0]["config"]["method"]
        style = {"color": COLORS.get(method, "#555555"), "edgecolor": "white", "label": setting}
        earlier = [s for s in settings[:i] if s.partition(",")[0] == method.upper()]
        axis.bar(at, means, width, yerr=errors, capsize=2, hatch=hatches[len(earlier) % 5], **style)
    axis.set_xticks(range(len(kinds)), [f"{letter(kind)}\n{kind}" for kind in kinds], fontsize=7)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    if place.startswith("after.task"):
        axis.set_ylim(0, 1.05)


def letter(kind: str) -> str:
    return KINDS[kind].letter if kind in KINDS else ""


def replace_text(path: Path, text: str) -> None:
    """Atomic: a kill leaves the old file or the new one."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def report(out: Path) -> str:
    """Writes results.json, results.md and figure.png; returns the Markdown."""
    results = read_results(out)
    if not results:
        raise BadInput(f"{out} holds no complete run")
    text = table(results)
    text += f"\n\n{legend(text)}"
    replace_text(out / "results.json", json.dumps(results, indent=1))
    replace_text(out / "results.md", text)
    draw(results, out / "figure.png")
    return text


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python notebooks/report.py FOLDER", file=sys.stderr)
        return 2
    try:
        text = report(Path(argv[0]))
        print(f"\n{text}\nWritten to {argv[0]}: results.md, results.json, figure.png", flush=True)
        return 0
    except BrokenPipeError:  # `| head` has seen enough, and the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (BadInput, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that has no ‖
    sys.exit(main(sys.argv[1:]))
