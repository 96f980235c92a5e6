"""How the target of question 6 was set: what is learned and what is forgotten within a budget, without anchors.

    python notebooks/solutions/q6.py [OUT]        two divergences, two rates, four lengths, three seeds; some ten minutes on a core

A row is a setting: means ± deviation over the seeds. The verb is learned at some 35 steps of 32 at a rate of 2e-4, or 60 at 1e-4;
what follows is forgetting. Hence the target: learned (.95), 6,000 tokens, and at most .01 lost for full marks.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RATES_AND_LENGTHS = {1e-4: (50, 60, 70, 100), 2e-4: (30, 35, 40, 100)}

settings = []
for divergence, lr in itertools.product(("forward_kl", "reverse_kl"), RATES_AND_LENGTHS):
    for steps in RATES_AND_LENGTHS[lr]:
        chosen = {"divergence": divergence, "lr": lr, "steps": steps, "batch": 32}
        settings.append(json.dumps(chosen))
settings.append("{}")  # the defaults: 250 steps of 64
out = ["--out", sys.argv[1]] if len(sys.argv) > 1 else []
command = [sys.executable, str(HERE.parent / "measure.py"), *settings, "--seeds", "3", *out]
subprocess.run(command, check=True)
