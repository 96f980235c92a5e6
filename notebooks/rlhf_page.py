"""Make tables and figures from the runs of rlhf_evidence.py: `python notebooks/rlhf_page.py`.

Each experiment with runs in results/rlhf/runs gets a NAME.md and a NAME.png in results/rlhf. Nothing is trained here. Each
table says which seeds it is from. Differences are taken seed by seed, over the seeds that both sides have.
"""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

from evidence_page import show, table
from rlhf_evidence import ENOUGH, pass_at_k

RESULTS = ROOT / "notebooks" / "results" / "rlhf"
COLORS = {
    "base": "#666666", "SFT": "#D55E00", "off-policy": "#CC79A7", "COSD": "#0072B2", "COSD + anchors": "#009E73",
    "SFT + replay": "#56B4E9", "RL": "#000000",
}  # fmt: skip


# =============================================================================== 1. records of runs
def read(folder: Path, smoke: bool = False) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]


def pick(records: list[dict], **job) -> dict[int, dict]:
    """The numbers of the runs whose settings include `job`, by seed."""
    found = {}
    for record in records:
        if job.items() <= record["job"].items():
            found[record["job"]["seed"]] = record["numbers"]
    return dict(sorted(found.items()))


def seeds_of(runs: list[dict]) -> str:
    """The seeds that all of these runs have, in words."""
    common = sorted(set.intersection(*[set(run) for run in runs])) if runs else []
    return f"{len(common)} seed{'s' * (len(common) != 1)} ({', '.join(map(str, common))})"


def across(runs: dict[int, dict], of, digits: int = 2) -> str:
    """Mean over seeds ± half the 95 % confidence interval of a number of each run."""
    values = [of(run) for run in runs.values()]
    return show(values, digits) if values else "–"


def paired(runs: dict[int, dict], others: dict[int, dict], of, digits: int = 2) -> str:
    """The mean difference to other runs of the same seeds."""
    values = [of(runs[seed]) - of(others[seed]) for seed in runs if seed in others]
    return show(values, digits) if values else "–"


def last(key: str):
    return lambda run: run["curve"][-1][key]


FOUR = ("verbs", "demonstrations", "specification", "instructions", "privileged")


def lost_of(suites):
    """The loss of exact match since the curve's first point, averaged over suites of old skills."""

    def lost(run: dict) -> float:
        before, after = run["curve"][0]["skills"], run["curve"][-1]["skills"]
        return statistics.fmean(before[name] - after[name] for name in suites)

    return lost


lost = lost_of(FOUR)


def pass_of(k: int):
    return lambda run: statistics.fmean(pass_at_k(64, right, k) for right in run["right of 64"])


def mean_curve(runs: dict[int, dict], x: str, y: str) -> tuple[list, list]:
    """The means of two numbers over seeds, point by point."""
    points = list(zip(*[run["curve"] for run in runs.values()]))
    return tuple([statistics.fmean(p[key] for p in point) for point in points] for key in (x, y))


# ================================================================================== 2. the questions
STARTS = ["base", "SFT", "off-policy", "COSD", "COSD + anchors"]


def steps_to(level: float):
    """Steps until `exact` first reaches a level, interpolated between measurements; the last step if it
    never does."""

    def steps(run):
        for a, b in zip(run["curve"], run["curve"][1:]):
            if a["exact"] >= level:
                return a["step"]
            if b["exact"] >= level:
                share = (level - a["exact"]) / (b["exact"] - a["exact"])
                return a["step"] + share * (b["step"] - a["step"])
        return run["curve"][-1]["step"]

    return steps


def dead(run: dict) -> float:
    """Share of groups, over the whole run, in which all answers earn the same reward."""
    return statistics.fmean(row["dead"] for row in run["log"])


def state(records, plt):
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), constrained_layout=True)
    before, after, paths, sides, said = [], [], [], [], []
    for beta in (0.0, 0.1):
        runs = {
            s: pick(records, experiment="state", start=s, reward="exact", beta=beta) for s in STARTS
        }
        runs = {name: found for name, found in runs.items() if found}
        if not runs:
            continue
        said.append(f"β = {beta}: {seeds_of(list(runs.values()))}")
        for name, found in runs.items():
            start = pick(records, experiment="start", start=name)
            start = {seed: run for seed, run in start.items() if seed in found}
            label = f"{name}, β = {beta}"
            if beta == 0:
                cells = [
                    across(start, lambda run: run[key])
                    for key in ("two verbs", "exact", "entropy", "kl to base")
                ]
                cells.insert(0, across(start, lambda run: run["steps"], 0))
                before.append([name, *cells, *[across(start, pass_of(k)) for k in (8, 64)]])
            less = lambda of: paired(found, runs.get("SFT", {}), of)
            paths.append([label, across(found, steps_to(0.5), 0), across(found, last("exact"))])
            paths[-1] += [
                less(steps_to(0.5)),
                less(last("exact")),
                less(pass_of(64)),
                across(found, dead),
            ]
            sides.append(
                [
                    label,
                    across(found, last("kl to start"), 1),
                    across(found, last("kl to base"), 1),
                    across(found, last("entropy")),
                    across(found, last("two verbs")),
                    across(found, lost, 3),
                ]
            )
            after.append([label, *[across(found, pass_of(k)) for k in (1, 2, 4, 8, 16, 32, 64)]])
            style = dict(color=COLORS[name], linestyle="-" if beta == 0 else ":", label=label)
            axes[0].plot(*mean_curve(found, "step", "exact"), **style)
            axes[1].plot(*mean_curve(found, "kl to base", "exact"), **style)
            if beta == 0:
                ks = [1, 2, 4, 8, 16, 32, 64]
                axes[2].plot(
                    ks, [statistics.fmean(map(pass_of(k), start.values())) for k in ks], **style
                )
                axes[3].plot(
                    ks, [statistics.fmean(map(pass_of(k), found.values())) for k in ks], **style
                )
    axes[0].set(xlabel="RL step", ylabel="three verbs, all steps right", title="on the way")
    axes[1].set(xlabel="KL(π‖base), nats per answer", title="for what it costs")
    axes[2].set(xlabel="k", xscale="log", title="pass@k before RL", ylim=(0, 1.02))
    axes[3].set(xlabel="k", xscale="log", title="pass@k after RL", ylim=(0, 1.02))
    axes[0].legend(fontsize=7)
    text = "\n\n".join([
        "Seeds: " + "; ".join(said) + f". Starts stop where {ENOUGH:.0%} of sampled answers to two verbs are right (measured every 10 steps).",
        "Before RL", table(["start", "steps of tuning", "two verbs", "three verbs", "entropy", "KL(π‖base)", "pass@8", "pass@64"], before),
        "RL on the way; the columns *less SFT's* are differences seed by seed",
        table(["start", "steps to .5", "three verbs at the end", "steps less SFT's", "three verbs less SFT's", "pass@64 less SFT's", "dead groups"], paths),
        "What it cost", table(["start", "KL(π‖start)", "KL(π‖base)", "entropy", "two verbs", "old skills lost"], sides),
        "pass@k after RL", table(["start", *[f"k = {k}" for k in (1, 2, 4, 8, 16, 32, 64)]], after),
    ])  # fmt: skip
    return "Is COSD the perfect state before RL?", text, figure


def hacking(records, plt):
    figure, axis = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
    found = pick(records, experiment="state", start="base", reward="score")
    for key in ("last step", "exact", "distinct"):
        axis.plot(*mean_curve(found, "step", key), label=key)
    axis.set(xlabel="RL step", title="reward: the last word alone")
    axis.legend()
    first = lambda key: lambda run: run["curve"][0][key]
    rows = []
    for key in ("last step", "exact", "two verbs", "distinct"):
        rows.append([key, across(found, first(key)), across(found, last(key))])
    text = f"{seeds_of([found])}; base, β = 0.\n\n" + table(
        ["", "before", "after RL on `score`"], rows
    )
    return "What does RL learn if only the last word is graded?", text, figure


def over(records, plt):
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), constrained_layout=True)
    judges, sureness, best, runs = [], [], [], []
    for color, pairs in zip(("#D55E00", "#0072B2"), (100, 1000)):
        found = pick(records, experiment="reward", pairs=pairs)
        if not found:
            continue
        keys = [
            "accuracy",
            "Bayes accuracy",
            "agrees with r*",
            "correlation",
            "slope",
            "loss",
            "loss of r*",
        ]
        judges.append([str(pairs), *[across(found, lambda run: run[key]) for key in keys]])
        for low in range(5):  # bins of the model's confidence
            inside = [
                row
                for run in found.values()
                for row in run["calibration"]
                if 5 + low <= int(row[0] * 10 + 1e-6) < 6 + low
            ]
            count = sum(row[2] for row in inside)
            if count:
                sure, right = (sum(row[i] * row[2] for row in inside) / count for i in (0, 1))
                sureness.append([str(pairs), f"{sure:.2f}", f"{right:.2f}", str(count)])
        ns = list(next(iter(found.values()))["best of"])
        curves = [
            [statistics.fmean(run["best of"][n][i] for run in found.values()) for n in ns]
            for i in (0, 1)
        ]
        for i, (what, style) in enumerate((("r*", "-"), ("the model's", "--"))):
            axes[0].plot(
                [int(n) for n in ns], curves[i], style, color=color, label=f"{pairs} pairs: {what}"
            )
        best.append([str(pairs), *[across(found, lambda run: run["best of"][n][0]) for n in ns]])
        for method, beta, style in (
            ("RL", 0.0, "-"),
            ("RL", 0.03, "-."),
            ("RL", 0.1, "--"),
            ("RAFT", 0.0, ":"),
        ):
            found = pick(records, experiment="over", pairs=pairs, method=method, beta=beta)
            if not found:
                continue
            label = f"{pairs} pairs, {method}" + (f", β = {beta}" if method == "RL" else "")
            axes[1 + (pairs == 1000)].plot(
                *mean_curve(found, "kl to base", "gold"),
                style,
                color=color,
                marker=".",
                label=label,
            )
            peak = lambda run: max(point["gold"] for point in run["curve"])
            runs.append([
                label, str(len(found)), across(found, lambda run: run["curve"][0]["gold"]), across(found, peak), across(found, last("gold")),
                across(found, lambda run: run["curve"][-1]["gold"] - peak(run)), across(found, last("model's reward")), across(found, last("kl to base"), 1),
            ])  # fmt: skip
    axes[0].set(xlabel="N", xscale="log", title="best-of-N", ylabel="reward")
    axes[1].set(xlabel="KL(π‖base), nats per answer", title="100 pairs", ylabel="r*")
    axes[2].set(xlabel="KL(π‖base), nats per answer", title="1,000 pairs")
    for axis in axes:
        if axis.lines:
            axis.legend(fontsize=7)
    text = "\n\n".join([
        "The reward model, on 500 held-out pairs and on a pool of 256 samples for each of 48 prompts (correlation within a prompt)",
        table(["pairs", "accuracy", "of Bayes", "agrees with r*", "correlation with r*", "slope", "loss", "loss of r*"], judges),
        "Calibration: the probability that it gives to the answer it likes better, and how often that one was preferred",
        table(["pairs", "said", "happened", "held-out pairs"], sureness),
        "r* of best-of-N under the model", table(["pairs", *[f"N = {n}" for n in ns]], best),
        "RL and RAFT against the model's reward; r* looks on",
        table(["", "seeds", "r* before", "r* at its best", "r* at the end", "end − best", "the model's reward", "KL(π‖base)"], runs),
    ])  # fmt: skip
    return "How far can a learned reward be trusted?", text, figure


def learners(records, plt):
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    rows, wider, turned = [], [], []
    ways = {
        name: pick(records, experiment="learners", start=name)
        for name in ("SFT", "SFT + replay", "COSD", "COSD + anchors")
    }
    ways["RL"] = pick(records, experiment="state", start="base", reward="exact", beta=0.0)
    lookup = lambda name: lambda run: run["beyond"][name]
    names = ["trained words", "2 verbs", "3 verbs", "4 verbs", "5 verbs", "other verbs"]
    for name, found in ways.items():
        if not found:
            continue
        rows.append([name, str(len(found)), across(found, last("exact")), across(found, last("kl to base"), 1), across(found, last("razor"), 1), across(found, lost, 3), across(found, last("entropy")), across(found, last("distinct"))])  # fmt: skip
        wider.append([name, *[across(found, lookup(n)) for n in names], across(found, pass_of(64))])
        axes[0].plot(
            *mean_curve(found, "razor", "exact"), "o-", markersize=3, color=COLORS[name], label=name
        )
        for run in found.values():
            first = statistics.fmean(run["curve"][0]["skills"].values())
            drop = [first - statistics.fmean(p["skills"].values()) for p in run["curve"]]
            axes[1].plot([p["razor"] for p in run["curve"]], drop, ".", color=COLORS[name])
    best = pick(records, experiment="best of 16")
    if best:
        wider.append(["best of 16 (reward model)", *[across(best, lookup(n)) for n in names], "–"])
    for name in ("SFT", "SFT + replay", "COSD", "COSD + anchors"):
        found = pick(records, experiment="angles", start=name)
        if found:
            points = range(len(next(iter(found.values()))["curve"]))
            cell = lambda i: across(found, lambda run: run["curve"][i]["step's"])
            turned.append([name, *[cell(i) for i in points]])
    axes[0].set(
        xlabel="KL(base‖π) on the rule, nats per answer", ylabel="three verbs, all steps right"
    )
    axes[1].set(xlabel="KL(base‖π) on the rule, nats per answer", ylabel="old skills lost")
    axes[0].legend(fontsize=7)
    parts = [
        "At the end of each run", table(["", "seeds", "three verbs", "KL(π‖base)", "KL(base‖π)", "old skills lost", "entropy", "distinct of 4"], rows),
        "Beyond the training prompts (sampled answers, all steps right), and pass@64", table(["", *names, "pass@64"], wider),
    ]  # fmt: skip
    if turned:
        head = ["", *[f"step {p['step']}" for p in next(iter(found.values()))["curve"]]]
        parts += [
            "Cosine between the step's gradient and that of the old skills' loss",
            table(head, turned),
        ]
    return "Does RL forget less, and generalise more?", "\n\n".join(parts), figure


def feedback(records, plt):
    figure, axis = plt.subplots(figsize=(6.5, 3.8), constrained_layout=True)
    rows = []
    looks = {
        "COSD D": ("#0072B2", "-"), "SDPO verdict": ("#56B4E9", "--"), "SDPO sibling": ("#56B4E9", ":"),
        "own draft": ("#E69F00", "-."), "RL": ("#000000", "-"), "OPSD": ("#CC79A7", "--"),
        "pi-Distill": ("#CC79A7", "-"),
    }  # fmt: skip
    for name, (color, dashes) in looks.items():
        found = pick(records, experiment="feedback", method=name)
        if not found:
            continue
        seen = name in next(iter(found.values()))["teacher"]
        row = [
            name,
            str(len(found)),
            across(found, lambda run: run["teacher"][name]) if seen else "–",
        ]
        row += [across(found, lambda run: run["curve"][0]["exact"]), across(found, last("exact"))]
        row += [across(found, lost_of(FOUR), 3), across(found, lost_of(("feedback", "draft")), 3)]
        rows.append(row + [across(found, last("kl to base"), 1), across(found, last("entropy"))])
        curve = mean_curve(found, "step", "exact")
        axis.plot(*curve, dashes, marker="o", markersize=3, color=color, label=name)
    axis.set(xlabel="step (16 prompts × 8 answers)", ylabel="three verbs, all steps right")
    axis.legend(fontsize=7)
    text = table(
        [
            "",
            "seeds",
            "the base in context",
            "three verbs before",
            "after",
            "old skills lost",
            "reading feedback and drafts lost",
            "KL(π‖base)",
            "entropy",
        ],
        rows,
    )
    found = pick(records, experiment="experience")
    if found:
        of = lambda key: across(found, lambda run: run[key])
        gone = lambda run: statistics.fmean(
            run["skills before"][n] - run["skills"][n] for n in run["skills"]
        )
        row = [of("before"), of("teacher"), of("after"), across(found, gone, 3)]
        text += f"\n\nExperience traces, {seeds_of([found])}: a new verb, without context\n\n"
        text += table(["before", "the base in context", "after", "old skills lost"], [row])
    return "What do contexts teach that look at the student's answer?", text, figure


def instruct(records, plt):
    figure, axis = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
    rows = []
    for mask, color in (("decoder", "#0072B2"), ("prefix", "#D55E00")):
        groups = [pick(records, experiment="instruct", mask=mask, families=n) for n in range(5)]
        ns = [n for n, found in enumerate(groups) if found]
        groups = [groups[n] for n in ns]
        means = [statistics.fmean(run["unseen"] for run in found.values()) for found in groups]
        axis.plot(ns, means, "o-", color=color, label=mask)
        rows.append(
            [
                f"{mask}: a family never shown",
                *[across(found, lambda run: run["unseen"]) for found in groups],
            ]
        )
        seen = [
            across(found, lambda run: run["seen"]) if n else "–" for n, found in zip(ns, groups)
        ]
        rows.append([f"{mask}: the families shown", *seen])
    axis.set(
        xlabel="families shown as instructions",
        ylabel="a family never shown: right",
        ylim=(-0.03, 1.03),
    )
    axis.legend()
    text = f"{seeds_of(groups)}\n\n" + table(["", *[f"{n} families" for n in ns]], rows)
    return "Does a base that was taught some instructions follow others?", text, figure


# ========================================================================================= 3. pages
PAGES = {
    "state": state,
    "hacking": hacking,
    "over": over,
    "learners": learners,
    "feedback": feedback,
    "instruct": instruct,
}
NEEDS = {
    "state": dict(experiment="state", reward="exact"), "hacking": dict(experiment="state", reward="score"),
    "over": dict(experiment="reward"), "learners": dict(experiment="learners"),
    "feedback": dict(experiment="feedback"), "instruct": dict(experiment="instruct"),
}  # fmt: skip


def write(folder: Path = RESULTS) -> list[str]:
    """Write every page that has runs -> the names of the pages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records, made = read(folder), []
    for name, page in PAGES.items():
        if not pick(records, **NEEDS[name]):
            continue
        question, text, figure = page(records, plt)
        figure.savefig(folder / f"{name}.png", dpi=100, metadata={"Software": None})
        plt.close(figure)
        text = f"# {question}\n\n    python notebooks/rlhf_evidence.py {name}\n\n![{name}]({name}.png)\n\n{text}\n"
        (folder / f"{name}.md").write_text(text)
        made.append(name)
    return made


if __name__ == "__main__":
    print("made:", ", ".join(write(Path(sys.argv[1]) if sys.argv[1:] else RESULTS)))
