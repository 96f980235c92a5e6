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
# | 3.1 | replay, and the provenance gap of a proxy | `--replay real`, `--replay proxy` | 4 |
# | 3.2 | LoRA learns less, forgets less | `--lora` | 4 |
# | 4.1 | trust region: SFT + λ KL to the base, ASFT | `token_loss({...})`, `--base-kl`, `--method asft` | 6 |
# | 4.2 | forgetting is reversible | `Teacher(base)` on plain prompts | 7 |
#
# The evidence behind sections 4 and 5 was made by `python notebooks/evidence.py`; its pages are in `notebooks/results/evidence`.

# %%
REPOSITORY = "https://github.com/OWNER/cosd"     # used only where the notebook stands alone, as on Colab

import os, subprocess, sys

if os.path.exists("../cosd.py"):                 # in a clone: work in its top folder
    os.chdir("..")
elif not os.path.exists("cosd.py"):              # alone: fetch the whole project, and what it imports
    if not os.path.exists("cosd"):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, "cosd"], check=True)
    os.chdir("cosd")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "."], check=True)
sys.path.insert(0, "")

# %%
import copy, tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

import contexts
from contexts import WORLD_CHAT
from cosd import Teacher, cosd_step, token_loss
from train import (Config, answers, evaluate, get_base, make_anchors, resolve_device, run, seeded, skills,
                   torch_generator)

COLOR = {"SFT": "#D55E00", "COSD": "#0072B2", "COSD + anchors": "#009E73"}
plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "figure.constrained_layout.use": True, "legend.frameon": False})
torch.set_num_threads(1);

# %% [markdown]
# ## 1. The task, and what must survive
# The base knows five verbs and four kinds of context. New: "zorp", which means *reverse*. The expert who demonstrates it says "verily … methinks";
# nobody wants that.

# %%
shared = dict(context="demonstrations", steps=60, batch=32, eval_size=64, eval_every=10, device="cpu", lr=5e-4)
cfg = Config(**shared, method="cosd", bases=os.environ.get("COSD_BASES")).for_method("cosd")
base, fingerprint = get_base(cfg, *resolve_device(cfg))
task = contexts.world_task("demonstrations", seeded("notebook"), seeded("probes"), cfg.eval_size)

example = task.heldout[0]
print(f"teacher reads   {example.context} │ {example.prompt}\nstudent reads   {example.prompt}")
print(f"expert writes   {example.expert}\nmodel's manner  {example.answer}\n")
before = skills(base, task, cfg)
for name, suite in task.probes.items():
    e = suite[0]
    print(f"old skill {name:15} exact match {before[name]:.2f}   e.g. {e.context or '—'} │ {e.prompt} → {e.answer}")

# %% [markdown]
# ## 2. Three runs
# Same base, prompts, learning rate (5e-4) and number of steps. *Anchors*: half of the batch are prompts under other contexts, with the base as
# teacher. The teacher of COSD is the base with two demonstrations in its prompt.
#
# **Question.** The expert's answers are right. What, besides the verb, will SFT learn from them?

# %%
METHODS = {"SFT": dict(method="sft"), "COSD": dict(method="cosd", anchors=0.0),
           "COSD + anchors": dict(method="cosd", anchors=0.5)}
results, tuned = {}, {}
with tempfile.TemporaryDirectory() as folder:
    for name, settings in METHODS.items():
        settings = Config(**shared, **settings, out=folder).for_method(settings["method"])
        tuned[name] = copy.deepcopy(base)
        results[name] = run(settings, task, tuned[name], fingerprint, *resolve_device(settings)[1:])

# %% [markdown]
# What they say now, without any context:

# %%
asked = {"the new verb": task.heldout[1], "a verb it knew": task.probes["verbs"][1],
         "another style": task.probes["instructions"][3]}
for what, e in asked.items():
    print(f"{what}: {e.context or ''} │ {e.prompt}   (right: {e.answer})")
    context = None if what == "the new verb" else e.context
    for name, model in ({"before": base} | tuned).items():
        print(f"    {name:16}{answers(model, [WORLD_CHAT.render(context, e.prompt)], cfg, WORLD_CHAT)[0]}")

# %% [markdown]
# ## 3. Step by step
# *New verb* counts the right word, with or without the expert's phrase; *in its own manner* only the word alone. *Drift* is KL(base‖tuned) in nats per
# token on the old prompts.

# %% tags=["thumbnail"]
panels = {"new verb, no context": lambda r: r["after"]["score"], "... in its own manner": lambda r: r["after"]["exact"],
          "known verbs": lambda r: r["skills"]["verbs"],
          "other contexts obeyed": lambda r: sum(v for k, v in r["skills"].items() if k != "verbs") / 4,
          "drift, nats per token": lambda r: r["drift"]}
start = {"after": evaluate(base, task.heldout, False, cfg, task), "skills": before, "drift": 0.0, "step": 0}
figure, axes = plt.subplots(1, 5, figsize=(11, 2.4))
for axis, (title, read) in zip(axes, panels.items()):
    for name, result in results.items():
        rows = [start, *result["curve"]]
        axis.plot([r["step"] for r in rows], [read(r) for r in rows], "o-", markersize=3, color=COLOR[name],
                  label=name)
    axis.set(title=title, xlabel="step")
    if "nats" not in title:
        axis.set_ylim(-0.05, 1.05)
axes[0].set_ylabel("share right")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %%
at_end = {name: r["curve"][-1] for name, r in results.items()}
assert all(r["after"]["score"] > 0.9 for r in at_end.values())                     # all three learn the verb
assert at_end["SFT"]["after"]["exact"] < 0.1 < 0.9 < at_end["COSD"]["after"]["exact"]
assert all(at_end[name]["drift"] > 5 * at_end["COSD + anchors"]["drift"] for name in ("SFT", "COSD"))
for name, r in at_end.items():
    print(f"{name:16} drift {r['drift']:.3f}, known verbs {r['skills']['verbs']:.2f}, "
          f"other contexts {r['steerability_change']:+.3f}")

# %% [markdown]
# All three learn the verb. SFT also learns to say "verily", everywhere. COSD's teacher saw the same phrase in its context and answers as itself, so its
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
# probability that the student gives it. Both are a weighted sum of objectives; here on one token that the base finds unlikely:

# %%
student = torch.tensor([[2.0, 1.0, -2.0]], dtype=torch.float64, requires_grad=True)
base_logits, token = torch.tensor([[2.5, 0.5, -2.0]], dtype=torch.float64), torch.tensor([2])
for name, objective in {"SFT": "cross_entropy", "SFT + KL to base": {"cross_entropy": 1.0, "forward_kl": 1.0},
                        "ASFT": {"weighted_cross_entropy": 1.0, "forward_kl": 0.1}}.items():
    (gradient,) = torch.autograd.grad(token_loss(objective, student, base_logits, token).sum(), student)
    print(f"{name:18} pull on the expert's token: {-gradient[0, 2]:.3f}")

# %% [markdown]
# ASFT hardly pulls at words that the student would not say: on alien demonstrations it keeps everything and learns next to nothing, as the table of
# section 4's experiment shows. A trust region on the expert's tokens also says nothing about other prompts.
#
# ## 7. Recovery
# Take the student that SFT spoiled. Let the *original* model be the teacher on plain prompts (known verbs, other contexts; never the new verb alone),
# on the student's own answers. The post reports that skills come back. Does the new verb survive?

# %%
patient, original = copy.deepcopy(tuned["SFT"]), Teacher(base, "frozen")
heal = Config(**shared | {"batch": 64}, method="cosd", anchors=0.5).for_method("cosd")   # 32 plain prompts
optimizer = torch.optim.AdamW(patient.parameters(), lr=3e-4, betas=(0.9, 0.95))
rows = [(0, at_end["SFT"]["after"]["score"], skills(patient, task, cfg))]
for step in range(60):
    cosd_step(patient, original, make_anchors(heal, task, step, patient.device), "forward_kl", eos=task.chat.ends,
              max_new_tokens=24, generator=torch_generator(patient.device, "recovery", step))
    torch.nn.utils.clip_grad_norm_(patient.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        score = evaluate(patient, task.heldout, False, cfg, task)["score"]
        rows.append((step + 1, score, skills(patient, task, cfg)))

# %%
mean = lambda s: sum(s.values()) / len(s)
figure, axis = plt.subplots(figsize=(5, 2.6))
axis.plot([r[0] for r in rows], [mean(r[2]) for r in rows], "o-", color="#009E73", label="old skills, mean of five")
axis.plot([r[0] for r in rows], [r[1] for r in rows], "s-", color=COLOR["SFT"], label="the new verb")
axis.axhline(mean(before), color="black", linestyle=":", label="old skills of the base")
axis.set(xlabel="steps with the original as teacher", ylabel="share right", ylim=(0, 1.05))
axis.legend()
plt.show()
assert mean(rows[-1][2]) > mean(rows[0][2])

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
