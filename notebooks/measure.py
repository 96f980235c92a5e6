"""Measure what questions 6, 7 and 8 of the homework ask for, with your own code.

    python notebooks/measure.py q6.json --seeds 3                             q6: settings, or a file that holds them
    python notebooks/measure.py '{"anchors": 0.5}' --as-trained               q7: one run, exactly as `train` makes it
    python notebooks/measure.py q8.py                                         q8: teacher and student, before and after

Everything starts from the base of seed 0; q6 and q7 are type A. q6 draws prompts, held-out words and probes anew for every
seed, and counts the tokens of the answers that were learned from. Without a base in out/ one is pretrained first (a few minutes).
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import runpy
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import contexts
import train
from contexts import END, KINDS, Example, Kind, encode, render
from cosd import Rows, cosd_loss, cross_entropy, token_weights
from model import pad_right

FIELDS = (
    "method divergence teacher ema_rate lr steps batch temperature reduction skip top_k".split()
)
LARGEST = {"steps": 250, "batch": 64}
MEASURED = ("exact", "prior", "steerability", "drift", "tokens")
# q6, three seeds: python notebooks/solutions/q6.py
LEARNED, BUDGET = 0.95, 6000
FORGETTING = ((0.01, 8), (0.03, 6), (0.06, 4), (0.12, 2))  # at most so much -> points


def read_settings(text: str, also: tuple[str, ...] = ()) -> train.Config:
    """A student's settings as a Config; ValueError says what is wrong with them."""
    chosen, allowed = json.loads(text), [*FIELDS, *also]
    if not isinstance(chosen, dict) or not chosen.keys() <= set(allowed):
        raise ValueError(f"settings must be an object with fields among {', '.join(allowed)}")
    for name, most in LARGEST.items():
        if not 1 <= chosen.get(name, 1) <= most:
            raise ValueError(f"{name} must be from 1 to {most}")
    for name in ("lr", "temperature", "ema_rate", "anchors"):  # JSON may write 1.0 as 1
        if isinstance(chosen.get(name), int):
            chosen[name] = float(chosen[name])
    chosen = {"method": "cosd"} | chosen
    if chosen["method"] not in ("cosd", "sft", "offline", "gkd"):
        raise ValueError("method must be one of cosd, sft, offline, gkd")
    cfg = train.Config(context="demonstrations", device="cpu", **chosen)
    return cfg.resolved(cfg.method)


def learned(cfg: train.Config, task_seed: int, bases: str) -> dict[str, float]:
    """Train on the task of that seed -> the numbers of MEASURED."""
    base, name = train.get_base(replace(cfg, seed=0), bases)
    task, out = contexts.world_task("demonstrations", task_seed, cfg.eval_size), tempfile.mkdtemp()
    try:
        result = train.run_method(replace(cfg, out=out), task, copy.deepcopy(base), name)
        log = (Path(result["folder"]) / "metrics.jsonl").read_text().splitlines()
    finally:
        shutil.rmtree(out)
    change = {}
    for suite in ("verbs", *KINDS):
        change[suite] = result["after"][suite]["exact"] - result["before"][suite]["exact"]
    prior = change.pop("verbs")
    return {
        "exact": result["after"]["task"]["exact"],
        "prior": prior,
        "steerability": statistics.mean(change.values()),
        "drift": result["after"]["drift"],
        "tokens": sum(json.loads(row)["length"] for row in log) * cfg.batch,
    }


def fresh(cfg: train.Config, seed: int, bases: str) -> dict[str, float]:
    """`learned`, with prompts, held-out words and probes drawn for this seed alone."""
    heldout = random.Random(f"{seed}/held out").getrandbits(30)
    return learned(replace(cfg, seed=1000 + seed), heldout, bases)


# ================================================================================================ q8: a fifth context
MORE_STEPS = 250  # of pretraining, in which half the examples are of the fifth kind


def read_more(base, kind: Kind, mixed: list[Example]) -> None:
    """Continue pretraining, so that the base knows the fifth kind: with C, and without it as often as `drop` says."""
    optimizer = torch.optim.AdamW(base.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(MORE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20, 2 * (1 - step / MORE_STEPS))
        rng = random.Random(f"read more/{step}")
        drawn = [contexts.draw_pretraining(rng) for _ in range(48)]
        for e in rng.choices(mixed, k=48):
            drawn.append(e if rng.random() >= kind.drop else replace(e, context=None))
        prompts = [render(e.context, e.prompt) for e in drawn]
        y = [[*encode(e.answer), END] for e in drawn]
        mask = pad_right([[1] * len(row) for row in y]).bool()
        rows = Rows(prompts, prompts, pad_right(y), mask, token_weights(mask), None, cross_entropy)
        loss, _ = cosd_loss(base, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def exact(model, examples: list[Example], with_context: bool) -> float:
    """Share of greedy answers that are exactly right."""
    prompts = [render(e.context if with_context else None, e.prompt) for e in examples]
    ids, mask = model.generate(prompts, 32, temperature=0, eos={END})
    said = [contexts.answer_text(contexts.WORLD_CHAT, row[m].tolist()) for row, m in zip(ids, mask)]
    return statistics.mean(float(text == e.answer) for text, e in zip(said, examples))


def fifth(drawn: dict[str, list[Example]], kind: Kind, bases: str) -> dict[str, float]:
    """Exact match on held-out prompts under the C of `task`: of the teacher, and of the student before and after training."""
    cfg = train.Config(method="cosd", device="cpu", steps=80, batch=32).resolved("cosd")
    base, _ = train.get_base(cfg, bases)
    read_more(base, kind, drawn["mixed"])
    teacher, student = (exact(base, drawn["heldout"], there) for there in (True, False))

    def draw(rng, heldout=None, **task):
        return rng.choice(drawn["train" if task else "mixed"])

    name = drawn["mixed"][0].kind
    KINDS[name] = replace(kind, draw=draw, task={"fixed": True}, grade=contexts.grade_whole)
    task = contexts.world_task(name, 0, 8)
    with tempfile.TemporaryDirectory() as out:
        train.run_method(replace(cfg, context=name, out=out), task, base, "fifth")
    del KINDS[name]
    return {"teacher": teacher, "student": student, "after": exact(base, drawn["heldout"], False)}


def draw_here(path: str) -> tuple[dict, Kind]:
    """Draws of your own q8.py."""
    kind, drawn = runpy.run_path(path)["KIND"], {}
    for name, count, heldout, task in (
        ("mixed", 3000, None, {}),
        ("train", 600, False, kind.task),
        ("heldout", 200, True, kind.task),
    ):
        rng = random.Random(name)
        drawn[name] = [kind.draw(rng, heldout, **task) for _ in range(count)]
    return drawn, kind


def draws_from(path: str) -> tuple[dict, Kind]:
    """The grader's draws, which are plain data."""
    found = json.loads(Path(path).read_text())
    record, drawn = found["mixed"]["out"]["kind"], {}
    for name in ("mixed", "train", "heldout"):
        drawn[name] = [Example(**e) for e in found[name]["out"]["examples"]]
    return drawn, Kind("E", "", None, share=record["share"], drop=record["drop"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help="settings as JSON or in a .json file, or a q8.py")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--as-trained", action="store_true", help="seed 0 and its task, as `train`")
    parser.add_argument("--fifth", help="for the grader: a file with its draws of a fifth kind")
    parser.add_argument(
        "--json", action="store_true", help="also print the means as a line of JSON"
    )
    parser.add_argument("--out", default=str(ROOT / "out"), help="where the base is")
    args = parser.parse_args()
    if args.fifth or args.what[0].endswith(".py"):
        found = fifth(
            *(draws_from(args.fifth) if args.fifth else draw_here(args.what[0])), args.out
        )
        print(json.dumps(found))
        return
    for given in args.what:
        text = Path(given).read_text() if given.endswith(".json") else given
        cfg, rows = read_settings(text, ("anchors",)), []
        if args.as_trained:
            rows.append(learned(replace(cfg, seed=0), 0, args.out))
        else:
            for seed in range(args.first, args.first + args.seeds):
                rows.append(fresh(cfg, seed, args.out))
        means, said = {}, []
        for name in MEASURED:
            values = [row[name] for row in rows]
            means[name] = statistics.mean(values)
            spread = f"±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
            said.append(f"{name} {means[name]:.3f}{spread}")
        print(text.strip(), "|", ", ".join(said), flush=True)
        if args.json:
            print(json.dumps(means))


if __name__ == "__main__":
    main()
