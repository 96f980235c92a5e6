# %% [markdown]
# # 4. What is learned, what is forgotten
#
# The same new verb is taught twice: by imitating an expert (SFT) and by listening to oneself in context (COSD). Then comes the question that the
# post is about: what became of everything else? Three short runs are made here, live; after them come the figures of the full experiments.
#
# In all figures SFT is orange and dashed, COSD blue and solid, COSD with anchors green and dash-dotted.
#
# | in the post | claim or equation | in code | section |
# |---|---|---|---|
# | 2.1 | SFT "is free to overwrite general capabilities" | `--method sft` | 2, 3 |
# | 2.2 | RL's Razor: forgetting follows KL(base‖tuned) | `drift` in `train.py` | 5 |
# | 3.1 | replay, and the provenance gap of a proxy | `notebooks/evidence.py` | 4 |
# | 3.2 | LoRA learns less, forgets less | `--lora` | 4 |
# | 4.1 | trust region: SFT + λ KL to the base, ASFT | sums of `cross_entropy` and `forward_kl` | 6 |
# | 4.2 | forgetting is reversible | `Teacher(base)` on plain prompts | 7 |
#
# The evidence behind sections 4 and 5 was made by `python notebooks/evidence.py`; its tables and figures are in `notebooks/results/evidence`, and
# `notebooks/pages/evidence.md` explains them.

# %%
# This cell finds the project: in a clone it moves to the top folder; alone, as on Colab, it fetches everything.
REPOSITORY = ""  # build.py writes a public address here; without one you are asked, once

import os
import subprocess
import sys

above = [folder for folder in (".", "..", "../..") if os.path.exists(f"{folder}/cosd.py")]
if above:
    os.chdir(above[0])
else:
    if not os.path.exists("cosd"):
        address = REPOSITORY or input("The https address of this project's repository: ")
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", address, "cosd"], check=True)
    os.chdir("cosd")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "."], check=True)
sys.path[:0] = ["", "notebooks"]

# %%
import copy
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import figures
import torch
from IPython.display import Markdown, display

from contexts import WORLD_CHAT, student_prompt, teacher_prompt, world_task
from cosd import Rows, Teacher, cosd_loss, cross_entropy, forward_kl, make_objective, token_weights
from train import Config, assemble, get_base, measure, run_method, write

torch.set_num_threads(1)

# %% [markdown]
# ## 1. The task, and what must survive
# The base knows five verbs and four kinds of context. New is "zorp", which means *reverse*. The expert who demonstrates it says "verily … methinks", a
# mannerism that nobody wants.

# %%
shared = Config(
    context="demonstrations",
    method="cosd",
    steps=60,
    batch=32,
    eval_size=64,
    eval_every=10,
    device="cpu",
    lr=5e-4,
)
base, name = get_base(shared, "out")
task = world_task("demonstrations", 0, shared.eval_size)

example = task.heldout[0]
print(f"teacher reads   {example.context} │ {example.prompt}\nstudent reads   {example.prompt}")
print(f"expert writes   {example.expert}\nmodel's manner  {example.answer}")

# %%
cfg = shared.resolved("cosd")
looking_on = assemble(cfg, task, copy.deepcopy(base), {}, Path("no folder"))  # a run at step 0
start = measure(looking_on) | {"step": 0}
for suite, examples in task.probes.items():
    e, exact = examples[0], start[suite]["exact"]
    print(f"old skill {suite:15} exact match {exact:.2f}, e.g.")
    print(f"    {e.context or '—'} │ {e.prompt} → {e.answer}")

# %% [markdown]
# ## 2. Three runs
# All three have the same base, learning rate (5e-4), batch and number of steps. *Anchors* means that half of the batch are prompts under other contexts or none, with the base as
# teacher. The teacher of COSD is the base with two demonstrations in its prompt.
#
# **Question.** The expert's answers are right. What, besides the verb, will SFT learn from them?

# %%
METHODS = {
    "SFT": {"method": "sft"},
    "COSD": {"method": "cosd"},
    "COSD + anchors": {"method": "cosd", "anchors": 0.5},
}
results, tuned = {}, {}
with tempfile.TemporaryDirectory() as folder:
    for method, settings in METHODS.items():
        cfg = replace(shared, out=folder, **settings).resolved(settings["method"])
        tuned[method] = copy.deepcopy(base)
        results[method] = run_method(cfg, task, tuned[method], name)

# %% [markdown]
# This is what they say now. The new verb is asked for without any context, the old skills as they were always asked for: a known verb by itself, a style with its context.

# %%
asked = {
    "the new verb": (task.heldout[1], student_prompt),
    "a verb it knew": (task.probes["verbs"][1], teacher_prompt),
    "another style": (task.probes["instructions"][3], teacher_prompt),
}
for what, (e, read) in asked.items():
    prompt = read(WORLD_CHAT, e)
    print(f"{what}: {WORLD_CHAT.decode(prompt)}   (right: {e.answer})")
    for who, model in ({"before": base} | tuned).items():
        (y,) = write(looking_on, model, [prompt], 0)
        print(f"    {who:16}{WORLD_CHAT.decode(y).removesuffix('<|end|>')}")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Its mannerism: SFT says "verily vet methinks". COSD saw the same phrase in its teacher's context, but the teacher answers as itself, and so does its student. All three still know *reverse*. In the last prompt SFT has dropped the exclamation mark that the style
# asks for: something has been lost besides.
#
# </details>

# %% [markdown]
# ## 3. Step by step
# *New verb* counts the right word, with or without the expert's phrase; *in its own manner* counts only the word alone. *Drift* is KL(base‖tuned) in nats per
# token on the old prompts.
#
# **Question.** Which of the three will drift, and will anything be forgotten even where the known verbs are not?


# %% tags=["thumbnail"]
def obeyed(point):
    """The mean of exact match under other contexts of all four kinds."""
    return sum(point[kind]["exact"] for kind in task.probes if kind != "verbs") / 4


SHARE = "share of 64 prompts"
UNITS = {
    "new verb, no context": SHARE,
    "... in its own manner": SHARE,
    "known verbs": SHARE,
    "other contexts obeyed": SHARE,
    "drift": "nats per token",
}


def quantities(point):
    task, verbs = point["task"], point["verbs"]["exact"]
    values = task["score"], task["exact"], verbs, obeyed(point), point["drift"]
    return dict(zip(UNITS, values))


points = {method: [start, *result["curve"]] for method, result in results.items()}
drawn = {
    method: {title: [quantities(point)[title] for point in of] for title in UNITS}
    for method, of in points.items()
}
figures.curves([point["step"] for point in points["SFT"]], drawn, UNITS)

# %%
at_end = {method: result["after"] for method, result in results.items()}
for method, r in at_end.items():
    print(
        f"{method:16} drift {r['drift']:.3f}, known verbs {r['verbs']['exact']:.2f}, "
        f"other contexts {obeyed(r) - obeyed(start):+.3f}"
    )

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# All three learn the verb, and none of them forgets the known verbs (1.00 each): the damage is elsewhere. Under other contexts SFT loses 0.266 and COSD without anchors 0.180 of what the base did right; their drifts are 0.197 and 0.124 nats per token. COSD does better here, but this is one seed at one learning rate, and it
# drifts as well: *on-policy* is not a trust region by itself. With anchors 0.008 is lost, at a drift of 0.004. Only they refer to prompts that the new task never touches.
#
# </details>

# %% tags=["answer"]
assert all(r["task"]["score"] > 0.9 for r in at_end.values())  # all three learn the verb
assert at_end["SFT"]["task"]["exact"] < 0.1 < 0.9 < at_end["COSD"]["task"]["exact"]
held = at_end["COSD + anchors"]["drift"]
assert all(at_end[method]["drift"] > 5 * held for method in ("SFT", "COSD"))

# %% [markdown]
# ## 4. At equal skill
# One run says little; a gentler SFT forgets less. The full comparison crosses methods and learning rates on three seeds, for each kind of
# context. Every point below is one seed of one method at one learning rate: the farther to the right, the more is forgotten, and a hollow point has not learned the new task.

# %%
EVIDENCE = Path("notebooks/results/evidence")


def table(name, which=0):
    blocks = (EVIDENCE / f"{name}.md").read_text().split("\n\n")
    return [block for block in blocks if block.startswith("|")][which]


figures.picture(EVIDENCE / "forgetting.png", 4.2)

# %% [markdown]
# The table gives what a method has lost of the old skills when it first scores .9 of the teacher on the new task; *never* means that no seed got there in 100 steps. Read along a row for one method, down a column for one kind of context.
#
# **Question.** In which columns does SFT at 2e-4 do no more harm than COSD? What do the expert's answers have in common there?

# %%
display(Markdown(table("forgetting")))

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# In B and C: SFT loses 0.019 and 0.005, COSD 0.016 and 0.050, with intervals wider than the differences; in D SFT loses 0.011, and COSD has not learned the task by then. In all three the expert's answers are what the base itself says in context. In A, where the expert's manner is alien, SFT loses 0.033 at 2e-4 and 0.226 at 5e-4, COSD 0.003 and 0.123. Three seeds do not settle this; ten seeds, compared in pairs, do (`notebooks/pages/forgetting.md`).
# So SFT by itself does not forget more; SFT on *alien* data does. And look at the rows with replay or anchors: they keep nearly everything in all four columns, for SFT as well as for COSD.
#
# </details>


# %% [markdown]
# ## 5. RL's Razor
# The post says that forgetting is "directly proportional" to the KL between base and tuned model. The figure has this KL twice: measured on the *new* task's prompts, as in the paper, and on the old prompts. In the table, $R^2$ is the share of the variance of
# forgetting that a line, or a parabola, through the points explains.
#
# **Question.** Which KL predicts better, and is a line enough?

# %%
figures.picture(EVIDENCE / "razor.png", 4.2)
display(Markdown(table("razor")))

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The KL on the old prompts predicts better: over all 1920 measurements $R^2$ is 0.87 for a line and 0.93 for a parabola, against 0.61 and 0.64 for the KL on the new prompts. Among runs with anchors or replay the KL on the new prompts explains next to nothing (0.11).
# "Directly proportional" is not what we measure, and the paper itself fits a quadratic function.
#
# The KL on the new prompts can fail because it says nothing about other prompts: a model that talks like a pirate *only when it is asked the new question* has a large KL there and has forgotten nothing. The KL on the old prompts is the better judge, and it needs the old prompts.
#
# </details>

# %% [markdown]
# ## 6. A trust region for SFT
# The post's section 4.1 adds to the cross-entropy on the expert's words λ times the KL to the base on the same tokens. ASFT also weighs each token by the
# probability that the student gives it. Both are sums of objectives. Here they act on one token that the base finds unlikely.
#
# **Question.** Which of the three pulls hardest at the expert's token, and which hardly at all?


# %%
def sft_near_base(student_logits, base_logits, tokens):
    sft = cross_entropy(student_logits, None, tokens)
    return sft + forward_kl(student_logits, base_logits)


def asft(student_logits, base_logits, tokens):
    sft = cross_entropy(student_logits, None, tokens)
    return (-sft).exp().detach() * sft + 0.1 * forward_kl(student_logits, base_logits)


student = torch.tensor([[2.0, 1.0, -2.0]], dtype=torch.float64, requires_grad=True)
base_logits = torch.tensor([[2.5, 0.5, -2.0]], dtype=torch.float64)
token = torch.tensor([2])
objectives = {"SFT": cross_entropy, "SFT + KL to base": sft_near_base, "ASFT": asft}
for method, objective in objectives.items():
    (gradient,) = torch.autograd.grad(objective(student, base_logits, token).sum(), student)
    print(f"{method:18} pull on the expert's token: {-gradient[0, 2]:.3f}")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Plain SFT pulls with 0.987 nats per unit of logit, the KL to the base takes next to nothing off (0.983), and ASFT pulls with 0.013: it hardly moves words that the student would not say. On alien demonstrations, column A of the table in section 4, ASFT therefore keeps everything and learns next to nothing (score 0.06).
# And a trust region on the expert's tokens says nothing about other prompts: "SFT + KL to base" still loses 0.072 in A, at a score of only 0.30.
#
# </details>

# %% [markdown]
# ## 7. Recovery
# Take the student that SFT spoiled, and let the *original* model be the teacher on old prompts (known verbs, other contexts; never the new verb alone),
# on the student's own answers. The post reports that skills come back.
#
# **Question.** Do they? And does the new verb survive?

# %%
patient, original = copy.deepcopy(tuned["SFT"]), Teacher(base, "frozen")
optimizer = torch.optim.AdamW(patient.parameters(), lr=3e-4, betas=(0.9, 0.95))
rng, generator = random.Random(0), torch.Generator().manual_seed(0)
points = [at_end["SFT"] | {"step": 0}]
for step in range(60):
    prompts = [teacher_prompt(WORLD_CHAT, task.draw_anchor(rng)) for _ in range(32)]
    y, mask = patient.generate(prompts, 24, eos=WORLD_CHAT.ends, generator=generator)
    weights, objective = token_weights(mask), make_objective("forward_kl")
    loss, _ = cosd_loss(patient, Rows(prompts, prompts, y, mask, weights, original, objective))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(patient.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        points.append(measure(replace(looking_on, student=patient)) | {"step": step + 1})


# %%
def skills(point):
    return sum(point[suite]["exact"] for suite in task.probes) / 5


steps = [point["step"] for point in points]
old, new = [skills(point) for point in points], [point["task"]["score"] for point in points]
axis = figures.panels(width=5.5)
both = {"old skills, mean of five": old, "the new verb": new}
figures.lines(axis, steps, both, markers=True, xlabel="steps with the original as teacher")
figures.level(axis, skills(start), "old skills of the base")
figures.label(axis, ylabel="share right", ylim=(0, 1.05))
print(
    "steps",
    steps,
    " old skills",
    [round(s, 2) for s in old],
    " new verb",
    [round(s, 2) for s in new],
)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The old skills do: from 0.79 to 0.99 after twenty steps, and to 1.00 after forty. Nothing had been erased; it was a few steps away. The new verb survives in part: 1.00 after twenty steps, 0.77 after sixty, and still falling. The original model, who does not know the verb, was never asked about it, but
# prompts that resemble it were, and each step moves all weights. Over three seeds, from an SFT that had done more damage, the new verb had fallen to 0.15 ± 0.36 after sixty steps (`notebooks/results/evidence/recovery.md`): recovery and forgetting are the same process, and the verb is now on the losing side.
#
# </details>

# %% tags=["answer"]
assert old[-1] > old[0]

# %% [markdown]
# ## Now you
# 1. Lower SFT's learning rate to 2e-4 (60 steps). Is there a rate at which it learns the verb and forgets as little as COSD?
# 2. Replace forward KL by `divergence="reverse_kl"` in section 2. Which of the two drifts more?
# 3. Give COSD a live teacher (`teacher="live"`). What goes wrong, and after how many steps?
#
# Next: `05_your_own_model`.

# %% [markdown] tags=["answer"]
# <details><summary>Answers</summary>
#
# 1. Not within 60 steps: at 2e-4 the score of the new verb is 0.08 at the end (drift 0.012), at 1e-4 also 0.08 (drift 0.002). A gentle rate needs more steps, and the table of section 4, which allows for that, still has SFT behind COSD in column A (0.033 against 0.003 at 2e-4).
# 2. About the same here: with reverse KL the drift after 60 steps is 0.101, with forward KL 0.124. One seed does not decide; in the table of section 4 the two are alike in A and C within their intervals.
# 3. It learns the verb, 1.00 after 20 steps, and then unlearns it: 0.36 after 30 steps, 0.08 after 40. By step 60 other contexts are obeyed in 0.35 of the cases, and the drift is 0.824. Nothing holds a live teacher, as section 8 of notebook 03 shows.
#
# </details>
