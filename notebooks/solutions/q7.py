"""The reference's ablation: divergence x teacher x anchors on type A, eight runs -> q7.json and q7.png (some five minutes).

python notebooks/solutions/q7.py
"""

import itertools
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from train import Config, train

KNOWN = ("demonstrations", "specification", "instructions", "privileged")


def change(result, suite):
    """Of exact match, by training."""
    return result["after"][suite]["exact"] - result["before"][suite]["exact"]


runs = []
factors = ("forward_kl", "reverse_kl"), ("frozen", "live"), (0.0, 0.5)
for divergence, teacher, anchors in itertools.product(*factors):
    chosen = dict(divergence=divergence, teacher=teacher, anchors=anchors)
    same = dict(context="demonstrations", method="cosd", steps=120, batch=32, lr=5e-4)
    (result,) = train(Config(**chosen, **same, out="out", resume=True))
    measured = {
        "score": result["after"]["task"]["exact"],
        "prior": change(result, "verbs"),
        "steerability": sum(change(result, kind) for kind in KNOWN) / len(KNOWN),
        "drift": round(result["after"]["drift"], 4),
    }
    runs.append(chosen | measured)
(HERE / "q7.json").write_text("[" + ",\n ".join(map(json.dumps, runs)) + "]\n")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
for axis, key, label in zip(
    axes,
    ("score", "steerability"),
    ("learned: exact match on held-out words", "other contexts: change of exact match"),
):
    for run in runs:
        color, marker = (
            {"forward_kl": "#0072B2", "reverse_kl": "#D55E00"}[run["divergence"]],
            {"frozen": "o", "live": "^"}[run["teacher"]],
        )
        name = f"{run['divergence']}, {run['teacher']}, " + (
            "half anchors" if run["anchors"] else "no anchors"
        )
        axis.scatter(
            max(run["drift"], 1e-4),
            run[key],
            s=70,
            marker=marker,
            label=name,
            edgecolors=color,
            facecolors=color if run["anchors"] else "none",
        )
    axis.set(xscale="log", xlabel="drift: KL(base‖tuned), nats per token", ylabel=label)
axes[0].legend(fontsize=7, frameon=False)
figure.savefig(HERE / "q7.png", dpi=110)
