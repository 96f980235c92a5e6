"""The report of a folder: all its complete runs as a table and a figure.

    python notebooks/report.py out

reads out/*-seed*/state.pt and writes results.json, results.md and figure.png beside them.
`python train.py` ends with it.

    python notebooks/report.py --readme

prints the README's table, and makes its figure and the tables of the results page again, from the
results.json of notebooks/results/story and notebooks/results/anchors.
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
    "lost": ("lost", 3),
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
    "lost": "drop in exact match on old skills, the mean over all suites",
    "prior": "change of exact match on the verbs that the base knew",
    "steerability": "mean change of exact match under other contexts",
    "drift": "KL(base‖tuned) on old prompts in their contexts, nats per token",
    "cut off": "share of the answers after training that --max-new-tokens cut off",
    "over-refusal": "share of allowed items that were refused",
    "tokens saved": "length of C in tokens, per prompt",
    "seconds": "training alone",
}
PANELS = [  # title, unit, before, after, teacher; drawn are the first two that some run has
    (
        "Learned: right answers without the context",
        "share of held-out prompts",
        "before.task.score",
        "after.task.score",
        "before.teacher.score",
    ),
    ("Forgotten: old skills lost", "drop in share of exact answers", "", "lost", ""),
    ("Left to learn: KL to the teacher", "nats per token", "before.kl", "after.kl", ""),
]
COLORS = {"sft": "#D55E00", "cosd": "#0072B2", "offline": "#CC79A7", "gkd": "#E69F00"}
ANCHORED = "#009E73"  # COSD + anchors
HATCHES = {"sft": "///", "offline": "xxx", "gkd": "\\\\\\"}
BEFORE = {"color": "#BBBBBB", "label": "before training"}
COMMITTED = Path(__file__).resolve().parent / "results"


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
    """With what became of exact match on old skills: lost is its mean drop over all suites, prior
    its change on the known verbs, steerability its mean change on the rest."""
    change = {}
    for name, before in result["before"].items():
        if isinstance(before, dict) and "exact" in before and name not in ("task", "teacher"):
            change[name] = result["after"][name]["exact"] - before["exact"]
    if "verbs" not in change:
        return result
    lost = -statistics.fmean(change.values())
    result = result | {"lost": lost + 0.0, "prior": change.pop("verbs")}  # + 0.0: no "-0.000"
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
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def legend(text: str) -> str:
    """What the columns that are shown mean."""
    head = text.partition("\n")[0]
    told = [f"*{title}*: {MEANING[title]}" for title in COLUMNS if f"| {title} |" in head]
    return ". ".join(told) + ". ±: standard deviation over seeds.\n"


def method_of(result: dict) -> str:
    anchors = result["config"].get("anchors")
    return result["config"]["method"].upper() + (f" + anchors {anchors:g}" if anchors else "")


def label(result: dict, results: list[dict]) -> str:
    told = [name for name in differences(results) if name != "anchors"]
    return ", ".join([method_of(result), *(f"{name} {result['config'][name]}" for name in told)])


def like_for_like(results: list[dict]) -> list[dict]:
    """Of a method that ran at several learning rates, one of which is COSD's, only that one."""
    rates = {}
    for result in results:
        rates.setdefault(method_of(result), set()).add(result["config"].get("lr"))

    def fair(result: dict) -> bool:
        shared = rates[method_of(result)] & rates.get("COSD", set())
        return not shared or result["config"].get("lr") in shared

    return [result for result in results if fair(result)]


def draw(results: list[dict], path: Path) -> None:
    """What was learned and what was forgotten: a bar a setting, a point a seed."""
    try:
        from matplotlib.figure import Figure  # not pyplot: a notebook's own pictures stay
    except ImportError:
        print("No figure: matplotlib is not installed (it comes with the extra [notebooks]).")
        return
    groups: dict[str, list[dict]] = {}
    for result in like_for_like(results):
        groups.setdefault(label(result, results), []).append(result)
    able = any(look_up(result, place) > 0 for result in results for place in PANELS[0][2:])
    panels = PANELS if able else PANELS[2:]  # who gets nothing right can lose nothing, either
    shown = [panel for panel in panels if anywhere(results, panel[3])][:2]
    if not shown:
        print("No figure: no run has a number to draw.")
        return
    groups = dict(sorted(groups.items(), key=lambda item: not item[0].startswith("SFT")))
    kinds = list(dict.fromkeys(kind_of(result) for result in results))
    width = max(4.2, 1 + len(kinds) * max(1.1, 0.35 * (1 + len(groups))))  # of a panel, in inches
    figure = Figure(figsize=(width * len(shown), 3.9), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, panel in zip(axes, shown):
        draw_panel(axis, panel, kinds, groups)
    named = {}
    for axis in axes:
        named |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    named = dict(sorted(named.items(), key=lambda item: not hasattr(item[1], "patches")))
    how = {"loc": "outside lower center", "frameon": False, "fontsize": 11}
    figure.legend(named.values(), named.keys(), ncols=min(len(named), 5), **how)
    unfinished = path.with_suffix(".tmp")
    figure.savefig(unfinished, dpi=160, format="png")
    os.replace(unfinished, path)


def draw_panel(axis, panel: tuple, kinds: list[str], groups: dict[str, list[dict]]) -> None:
    """One number of all settings, grouped by kind of context."""
    title, unit, before, after, teacher = panel
    everyone = [run for runs in groups.values() for run in runs]
    bars = [(before, everyone, BEFORE)] if before else []
    drawn: list[str] = []
    for name, runs in groups.items():
        color, hatch = style_of(runs[0]["config"])
        paler = 0.7 ** drawn.count(color)  # a second setting of the same method
        bars.append((after, runs, {"color": color, "hatch": hatch, "label": name, "alpha": paler}))
        drawn.append(color)
    width = 0.84 / len(bars)
    for i, (place, runs, style) in enumerate(bars):
        for x, kind in enumerate(kinds):
            at = x + (i - (len(bars) - 1) / 2) * width
            values = [look_up(run, place) for run in runs if kind_of(run) == kind]
            draw_bar(axis, at, 0.9 * width, values, style, points=place == after)
    for x, kind in enumerate(kinds if teacher else []):
        ceiling = over_seeds([look_up(run, teacher) for run in everyone if kind_of(run) == kind])[0]
        how = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.5}
        axis.hlines(
            ceiling, x - 0.45, x + 0.45, label="teacher, sees the context" * (x == 0), **how
        )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(kinds)), [f"{letter(kind)}\n{kind}" for kind in kinds], fontsize=10)
    axis.set_xlim(-0.6, len(kinds) - 0.4)
    low, high = axis.dataLim.intervaly
    axis.set_ylim(min(1.1 * low, 0), 1.15 * max(high, 1.0 if teacher else 0.1))
    axis.tick_params(axis="x", length=0)
    axis.tick_params(axis="y", labelsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=13)
    axis.set_ylabel(unit, fontsize=11)


def style_of(config: dict) -> tuple[str, str]:
    """A method's colour and hatch."""
    method = config["method"]
    color, hatch = COLORS.get(method, "#555555"), HATCHES.get(method, "")
    if config.get("anchors"):
        return (ANCHORED if method == "cosd" else color), "..."
    return color, hatch


def draw_bar(axis, at: float, width: float, values: list, style: dict, points: bool) -> None:
    """A bar at the mean, with its number: zeros are seen too. A point a seed."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return
    mean = statistics.fmean(values)
    if style["label"] in axis.get_legend_handles_labels()[1]:
        style = style | {"label": None}
    axis.bar(at, mean, width, edgecolor="white", linewidth=0, **style)
    axis.hlines(mean, at - width / 2, at + width / 2, color=style["color"], linewidth=2.5)
    if points and len(values) > 1:
        how = {"s": 16, "facecolor": "white", "edgecolor": "black", "linewidth": 0.8, "zorder": 3}
        seen = "a seed" in axis.get_legend_handles_labels()[1]
        how["clip_on"] = False  # a point at zero is whole
        axis.scatter([at] * len(values), values, label=None if seen else "a seed", **how)
    top = (at, max(0.0, mean, *(values if points else [])))
    how = {"ha": "center", "va": "bottom", "fontsize": 9.5}
    axis.annotate(short(mean), top, xytext=(0, 4), textcoords="offset points", **how)


def short(value: float) -> str:
    """.25 for 0.25, 1 for 1.00."""
    text = f"{value:.2f}"
    if text.endswith(".00"):
        return text[:-3].replace("-0", "0")
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


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


def committed(name: str) -> list[dict]:
    """The results of notebooks/results/NAME."""
    path = COMMITTED / name / "results.json"
    with reading(path):
        return [with_changes(result) for result in json.loads(path.read_text(encoding="utf-8"))]


def readme_table() -> str:
    """The README's ten rows: what was learned and what was lost, a column a kind of context."""
    story, anchors = committed("story"), committed("anchors")
    methods: dict[tuple, list[dict]] = {}
    for result in [*story, *anchors]:
        config = result["config"]
        methods.setdefault((method_of(result), f"{config['lr']:g}"), []).append(result)
    one = next(iter(methods.values()))  # any: all methods start from the same bases
    rows = [("exact", "before training", "", one, "before.task.exact")]
    rows.append(("exact", "teacher, shown C", "", one, "before.teacher.exact"))
    for place, title in (("after.task.exact", "exact"), ("lost", "old skills lost")):
        rows += [(title, *name, runs, place) for name, runs in methods.items()]
    lines = [["", "method", "lr", *(record.letter for record in KINDS.values())]]
    lines.append(["---"] * len(lines[0]))
    for title, method, rate, runs, place in rows:
        cells = [[look_up(r, place) for r in runs if kind_of(r) == kind] for kind in KINDS]
        lines.append([title, method, rate, *(spread(values, 2) for values in cells)])
    return markdown(lines)


def readme() -> str:
    """Makes the committed tables and the figure again; returns the README's table."""
    for name in ("story", "anchors"):
        text = table(committed(name))
        replace_text(COMMITTED / name / "results.md", f"{text}\n\n{legend(text)}")
    draw(committed("story"), COMMITTED / "story" / "figure.png")
    return readme_table()


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python notebooks/report.py FOLDER, or --readme", file=sys.stderr)
        return 2
    try:
        if argv == ["--readme"]:
            print(readme())
            return 0
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
