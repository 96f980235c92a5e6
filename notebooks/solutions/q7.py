"""The reference's ablation: divergence x teacher x anchors on type A, eight runs -> q7.json and q7.png (some three minutes).

python notebooks/solutions/q7.py [OUT]
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
from contexts import KINDS
from train import Config, train

SETTINGS = {"steps": 120, "batch": 32, "lr": 5e-4}
OUT = sys.argv[1] if len(sys.argv) > 1 else "out"


def change(result, suite):
    """Of exact match, by training."""
    return result["after"][suite]["exact"] - result["before"][suite]["exact"]


runs, steerability = [], []
factors = ("forward_kl", "reverse_kl"), ("frozen", "live"), (0.0, 0.5)
for divergence, teacher, anchors in itertools.product(*factors):
    chosen = dict(divergence=divergence, teacher=teacher, anchors=anchors)
    same = dict(context="demonstrations", method="cosd", device="cpu", out=OUT, resume=True)
    (result,) = train(Config(**chosen, **same, **SETTINGS))
    measured = {
        "score": result["after"]["task"]["exact"],
        "prior": change(result, "verbs"),
        "drift": round(result["after"]["drift"], 4),
    }
    runs.append(chosen | measured)
    steerability.append(sum(change(result, kind) for kind in KINDS) / len(KINDS))
    print(runs[-1], f"steerability {steerability[-1]:.3f}")
lines = ",\n ".join(map(json.dumps, runs))
text = f'{{"settings": {json.dumps(SETTINGS)},\n "runs": [\n {lines}]}}\n'
(HERE / "q7.json").write_text(text)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
panels = (
    ([run["score"] for run in runs], "learned: exact match on held-out words"),
    (steerability, "other contexts: change of exact match"),
)
for axis, (values, label) in zip(axes, panels):
    for run, value in zip(runs, values):
        color = {"forward_kl": "#0072B2", "reverse_kl": "#D55E00"}[run["divergence"]]
        anchored = "half anchors" if run["anchors"] else "no anchors"
        axis.scatter(
            max(run["drift"], 1e-4),
            value,
            s=70,
            marker={"frozen": "o", "live": "^"}[run["teacher"]],
            label=f"{run['divergence']}, {run['teacher']}, {anchored}",
            edgecolors=color,
            facecolors=color if run["anchors"] else "none",
        )
    axis.set(xscale="log", xlabel="drift: KL(base‖tuned), nats per token", ylabel=label)
axes[0].legend(fontsize=7, frameon=False)
figure.savefig(HERE / "q7.png", dpi=110)
