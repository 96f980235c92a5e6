"""What questions 6 and 7 of the homework measure, on the code beside it.

    python notebooks/measure.py '{"lr": 1e-4, "steps": 100}' --seeds 3         a row a seed, then mean ± deviation

Type A, from the base of seed 0: the settings are trained on prompts of their own, and measured on held-out words and probes
of their own. Tokens are those of the answers that were learned from, task and anchors: what a rollout costs.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import contexts
import train

FIELDS = "method divergence teacher ema_rate lr steps batch temperature reduction skip top_k".split()
LARGEST = {"steps": 250, "batch": 64}
MEASURED = ("exact", "prior", "steerability", "drift", "tokens")


def read_settings(text: str, also: tuple[str, ...] = ()) -> train.Config:
    """What a student chose, as a Config; ValueError says what is wrong with it."""
    chosen, allowed = json.loads(text), [*FIELDS, *also]
    if not isinstance(chosen, dict) or not chosen.keys() <= set(allowed):
        raise ValueError(f"settings are an object with fields among {', '.join(allowed)}")
    for name, most in LARGEST.items():
        if not 1 <= chosen.get(name, 1) <= most:
            raise ValueError(f"{name} is from 1 to {most}")
    for name in ("lr", "temperature", "ema_rate", "anchors"):  # JSON writes 1.0 as 1, too
        if isinstance(chosen.get(name), int):
            chosen[name] = float(chosen[name])
    chosen = {"method": "cosd"} | chosen
    if chosen["method"] not in ("cosd", "sft", "offline", "gkd"):
        raise ValueError("method is one of cosd, sft, offline, gkd")
    cfg = train.Config(context="demonstrations", device="cpu", **chosen)
    return cfg.resolved(cfg.method)


def learned(cfg: train.Config, seed: int, bases: str) -> dict[str, float]:
    """Train on fresh prompts, measure on fresh words -> the numbers of MEASURED."""
    base, name = train.get_base(replace(cfg, seed=0), bases)
    heldout = random.Random(f"{seed}/held out").getrandbits(30)
    task = contexts.world_task("demonstrations", heldout, cfg.eval_size)
    out = tempfile.mkdtemp()
    try:
        cfg = replace(cfg, seed=1000 + seed, out=out)
        result = train.run_method(cfg, task, copy.deepcopy(base), name)
        log = (Path(result["folder"]) / "metrics.jsonl").read_text().splitlines()
    finally:
        shutil.rmtree(out)
    change = {}
    for suite in ("verbs", *contexts.KINDS):
        change[suite] = result["after"][suite]["exact"] - result["before"][suite]["exact"]
    prior = change.pop("verbs")
    return {
        "exact": result["after"]["task"]["exact"],
        "prior": prior,
        "steerability": statistics.mean(change.values()),
        "drift": result["after"]["drift"],
        "tokens": sum(json.loads(row)["length"] for row in log) * cfg.batch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="+", help="JSON, or a file that holds it")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", default=str(ROOT / "out"), help="where the base is")
    args = parser.parse_args()
    for given in args.settings:
        text = Path(given).read_text() if given.endswith(".json") else given
        cfg, rows = read_settings(text, ("anchors",)), []
        for seed in range(args.seeds):
            rows.append(learned(cfg, seed, args.out))
        said = []
        for name in MEASURED:
            values = [row[name] for row in rows]
            spread = f"±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
            said.append(f"{name} {statistics.mean(values):.3f}{spread}")
        print(text.strip(), "|", ", ".join(said), flush=True)


if __name__ == "__main__":
    main()
