"""How the built-in world's learning rates were chosen.

    python notebooks/rates.py                       writes out/rates; some twenty minutes on two cores
    python notebooks/rates.py --smoke               a test in seconds, whose numbers mean nothing

Every method is run at every rate on the four kinds, with one seed and no anchors. The default of a
method is the smallest rate at which every kind reaches .95 of its teacher's score in context. The rule
is the same for all methods, so that none is tuned more than another. Complete runs are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from contexts import KINDS, BadInput, world_task

RATES = [5e-5, 1e-4, 2e-4, 5e-4]
COMPARED = ["cosd", "sft"]
ENOUGH = 0.95  # of the teacher's score


def reached(result: dict) -> float:
    """The score after training as a share of the teacher's."""
    return result["after"]["task"]["score"] / max(result["before"]["teacher"]["score"], 1e-9)


def smallest(shares: dict[float, dict[str, float]]) -> float | None:
    """The smallest rate at which every kind reaches ENOUGH; shares[rate][kind]."""
    for rate in sorted(shares):
        if min(shares[rate].values()) >= ENOUGH:
            return rate
    return None


def run(out: str, seed: int, preset: dict) -> dict[str, dict[float, dict[str, float]]]:
    """-> shares[method][rate][kind], each also printed at once. Like train.train, but without its
    report, which would be made for every run."""
    shares: dict = {method: {rate: {} for rate in RATES} for method in COMPARED}
    start = train.Config(**preset, seed=seed, anchors=0.0, out=out, resume=True)
    base, name = train.get_base(start, out)
    for kind in KINDS:
        task = world_task(kind, seed, start.eval_size)
        for method, by_rate in shares.items():
            for rate in RATES:
                cfg = replace(start, context=kind, lr=rate).resolved(method)
                result = train.run_method(cfg, task, copy.deepcopy(base), name)
                by_rate[rate][kind] = reached(result)
                print(f"{kind} {method} {rate:g}: {by_rate[rate][kind]:.3f}", flush=True)
    return shares


def table(shares: dict) -> str:
    """Markdown: score after training / teacher's score, a row per method and rate."""
    lines = ["| method | rate | " + " | ".join(KINDS) + " |", "|---|---|" + "---|" * len(KINDS)]
    for method, by_rate in shares.items():
        for rate, row in by_rate.items():
            cells = " | ".join(f"{row[kind]:.2f}" for kind in KINDS)
            lines.append(f"| {method} | {rate:g} | {cells} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", default="out/rates", help="where bases and runs are kept")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="the smoke preset, in OUT-smoke")
    given = parser.parse_args(argv)
    preset = train.PRESETS["smoke" if given.smoke else "default"]
    out = given.out + "-smoke" * given.smoke  # never beside real runs
    try:
        shares = run(out, given.seed, preset)
    except KeyboardInterrupt as stopped:
        print(f"\nrates.py: {stopped}: continue with the same command", file=sys.stderr)
        return 130
    except (BadInput, OSError, FloatingPointError) as error:
        print(f"rates.py: error: {error}", file=sys.stderr)
        return 2
    print(
        f"\nScore after training as a share of the teacher's, seed {given.seed}\n\n{table(shares)}\n"
    )
    for method, by_rate in shares.items():
        chosen = smallest(by_rate) or "none"
        print(f"{method}: the smallest rate with every kind at {ENOUGH} or more: {chosen}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
