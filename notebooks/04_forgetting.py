# %% [markdown]
# # 4. What is learned, what is forgotten
#
# The same new verb, taught twice: by imitating an expert (SFT) and by listening to oneself in context (COSD). Then the question that the
# post is about: what became of everything else? Three short runs here, live; after them the figures of the full experiments.
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
# `notebooks/pages/evidence.md` says with which state of the code.

# %%
# used only where the notebook stands alone, as on Colab
REPOSITORY = "https://github.com/OWNER/cosd"

import os
import subprocess
import sys

if os.path.exists("../cosd.py"):  # in a clone: work in its top folder
    os.chdir("..")
elif not os.path.exists("cosd.py"):  # alone: fetch the whole project, and what it imports
    if not os.path.exists("cosd"):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, "cosd"], check=True)
    os.chdir("cosd")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "."], check=True)
sys.path.insert(0, "")

# %%
import copy
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

from contexts import WORLD_CHAT, student_prompt, teacher_prompt, world_task
from cosd import Rows, Teacher, cosd_loss, cross_entropy, forward_kl, make_objective, token_weights
from train import Config, assemble, get_base, measure, run_method, write

COLOR = {"SFT": "#D55E00", "COSD": "#0072B2", "COSD + anchors": "#009E73"}
plt.rc("figure", dpi=90)
plt.rc("figure.constrained_layout", use=True)
plt.rc("font", size=9)
plt.rc("axes.spines", top=False, right=False)
plt.rc("legend", frameon=False)
torch.set_num_threads(1)

# %% [markdown]
# ## 1. The task, and what must survive
# The base knows five verbs and four kinds of context. New: "zorp", which means *reverse*. The expert who demonstrates it says "verily … methinks";
# nobody wants that.

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
# Same base, prompts, learning rate (5e-4) and number of steps. *Anchors*: half of the batch are prompts under other contexts, with the base as
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
# What they say now: to the new verb without any context, to the others as before.

# %%
asked = {
    "the new verb": task.heldout[1],
    "a verb it knew": task.probes["verbs"][1],
    "another style": task.probes["instructions"][3],
}
for what, e in asked.items():
    print(f"{what}: {e.context or ''} │ {e.prompt}   (right: {e.answer})")
    read = student_prompt if what == "the new verb" else teacher_prompt
    for who, model in ({"before": base} | tuned).items():
        (y,) = write(looking_on, model, [read(WORLD_CHAT, e)], 0)
        print(f"    {who:16}{WORLD_CHAT.decode(y).removesuffix('<|end|>')}")

# %% [markdown]
# ## 3. Step by step
# *New verb* counts the right word, with or without the expert's phrase; *in its own manner* only the word alone. *Drift* is KL(base‖tuned) in nats per
# token on the old prompts.


# %% tags=["thumbnail"]
def obeyed(point):
    """The mean of exact match under other contexts of all four kinds."""
    return sum(point[kind]["exact"] for kind in task.probes if kind != "verbs") / 4


def panels(point):
    return {
        "new verb, no context": point["task"]["score"],
        "... in its own manner": point["task"]["exact"],
        "known verbs": point["verbs"]["exact"],
        "other contexts obeyed": obeyed(point),
        "drift, nats per token": point["drift"],
    }


figure, axes = plt.subplots(1, 5, figsize=(11, 2.4))
for method, result in results.items():
    points = [start, *result["curve"]]
    steps = [point["step"] for point in points]
    for axis, title in zip(axes, panels(start)):
        values = [panels(point)[title] for point in points]
        axis.plot(steps, values, "o-", markersize=3, color=COLOR[method], label=method)
        axis.set(title=title, xlabel="step")
for axis in axes[:4]:
    axis.set_ylim(-0.05, 1.05)
axes[0].set_ylabel("share right")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %%
at_end = {method: result["after"] for method, result in results.items()}
assert all(r["task"]["score"] > 0.9 for r in at_end.values())  # all three learn the verb
assert at_end["SFT"]["task"]["exact"] < 0.1 < 0.9 < at_end["COSD"]["task"]["exact"]
held = at_end["COSD + anchors"]["drift"]
assert all(at_end[method]["drift"] > 5 * held for method in ("SFT", "COSD"))
for method, r in at_end.items():
    print(
        f"{method:16} drift {r['drift']:.3f}, known verbs {r['verbs']['exact']:.2f}, "
        f"other contexts {obeyed(r) - obeyed(start):+.3f}"
    )

# %% [markdown]
# All three learn the verb. SFT also learns to say "verily". COSD's teacher saw the same phrase in its context and answers as itself, so its
# student does too; but without anchors it drifts as well, here less than SFT, from another base and at this rate perhaps more: *on-policy* is not a
# trust region by itself. Only anchors hold what the prompts of the new task never touch.
#
# ## 4. At equal skill
# One run says little: a gentler SFT forgets less. The full comparison crosses methods, learning rates and steps on three seeds, for each kind of
# context. Every point below is one method at one learning rate and one moment; top right is best.

# %%
EVIDENCE = Path("notebooks/results/evidence")


def picture(name):
    figure, axis = plt.subplots(figsize=(11, 4.2))
    axis.imshow(plt.imread(EVIDENCE / f"{name}.png"))
    axis.axis("off")
    plt.show()


def table(name, which=0):
    blocks = (EVIDENCE / f"{name}.md").read_text().split("\n\n")
    return [block for block in blocks if block.startswith("|")][which]


picture("forgetting")

# %%
display(Markdown(table("forgetting")))

# %% [markdown]
# Read along a row for one method, down a column for one kind of context. **Question.** In which columns does plain SFT do no harm? What do the expert's answers
# have in common there?

# %% [markdown]
# ## 5. RL's Razor
# Does the KL between base and tuned model predict how much was forgotten? Measured on the *new* task, as the paper has it, and on the old prompts:

# %%
picture("razor")
display(Markdown(table("razor")))

# %% [markdown]
# **Question.** The KL on the old prompts predicts well, and it needs the old prompts. Why can the KL on the new prompts fail? (Hint: a model that talks like a
# pirate *only when asked the new question* has a large KL there.)
#
# ## 6. A trust region for SFT
# The post's section 4.1: cross-entropy on the expert's words, plus λ times the KL to the base on the same tokens. ASFT also weighs each token by the
# probability that the student gives it. Both are sums of objectives; here on one token that the base finds unlikely:


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

# %% [markdown]
# ASFT hardly pulls at words that the student would not say: on alien demonstrations it keeps everything and learns next to nothing, as the table of
# section 4's experiment shows. A trust region on the expert's tokens also says nothing about other prompts.
#
# ## 7. Recovery
# Take the student that SFT spoiled. Let the *original* model be the teacher on plain prompts (known verbs, other contexts; never the new verb alone),
# on the student's own answers. The post reports that skills come back. Does the new verb survive?

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
figure, axis = plt.subplots(figsize=(5, 2.6))
axis.plot(steps, old, "o-", color="#009E73", label="old skills, mean of five")
axis.plot(steps, new, "s-", color=COLOR["SFT"], label="the new verb")
axis.axhline(skills(start), color="black", linestyle=":", label="old skills of the base")
axis.set(xlabel="steps with the original as teacher", ylabel="share right", ylim=(0, 1.05))
axis.legend()
plt.show()
assert old[-1] > old[0]

# %% [markdown]
# Nothing was erased: the skills were a few dozen steps away. How much of the new verb is kept varies with seed and learning rate; three seeds stand in
# `notebooks/results/evidence/recovery.md`.
#
# ## Now you
# 1. Lower SFT's learning rate to 2e-4 (60 steps): is there a rate at which it learns the verb and forgets as little as COSD?
# 2. Replace forward KL by `divergence="reverse_kl"` in section 2. Which of the two drifts more?
# 3. Give COSD a live teacher (`teacher="live"`). What goes wrong, and after how many steps?
#
# Next: `05_your_own_model`.
