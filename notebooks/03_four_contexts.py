# %% [markdown]
# # 3. Four contexts, two roles, one step
#
# One model plays student and teacher; the only difference is what stands in the prompt. This notebook shows the four kinds of context, looks at a
# rollout token by token with both pairs of eyes, and takes one training step apart by hand.
#
# | in the post | equation or name | in code | section |
# |---|---|---|---|
# | 4.3 | student $p_\theta(\cdot \mid x)$ and teacher $p_\theta(\cdot \mid x, C)$ | `render(None, x)`, `render(C, x)`, `Teacher` | 1, 2, 8 |
# | 5.2–5.5 | types A to D | `KINDS` in `contexts.py` | 1–3 |
# | 4.2 | forward KL, reverse KL; JSD in its implementation note | `forward_kl`, `reverse_kl`, `jsd` | 3, 7 (and notebook 01) |
# | 5 | $\mathcal{L} = D_{KL}(p_\theta(y \mid x) \,\Vert\, p_\theta(y \mid x, C))$ | `reverse_kl`, summed over the tokens of a rollout | 4 |
# | 4.3 | "minimizes the divergence", on-policy | `cosd_loss` | 5–7, 9 |
#
# In the post's symbols the student is $p_\theta$; here $Q$ is the student's and $P$ the teacher's distribution of the next token. (The trust region of 4.1 has
# a notebook of its own.)

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
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

from contexts import END, KINDS, decode, render, world_task
from cosd import (
    DIVERGENCES,
    Rows,
    Teacher,
    completion_states,
    cosd_loss,
    forward_kl,
    k1,
    make_objective,
    reverse_kl,
    token_weights,
)
from train import Config, get_base

COLOR = {"teacher": "#0072B2", "student": "#D55E00"}
plt.rc("figure", dpi=90)
plt.rc("figure.constrained_layout", use=True)
plt.rc("font", size=9)
plt.rc("axes.spines", top=False, right=False)
plt.rc("legend", frameon=False)

# %% [markdown]
# The base: a small GPT, pretrained on a made-up world where contexts matter. Found in `out/`, or made once in three or four minutes.

# %%
cfg = Config(device="cpu")
base, name = get_base(cfg, "out")
print(f"{sum(p.numel() for p in base.parameters()):,} parameters, {base.config.vocab_size} tokens")

# %% [markdown]
# ## 1. What student and teacher read
# One prompt of each type. Bars separate tokens: a made-up word is spelled letter by letter, a known word is one token with its space.

# %%
tasks = {kind: world_task(kind, seed=0, size=64) for kind in KINDS}
examples = {kind: task.draw(random.Random(1)) for kind, task in tasks.items()}
LETTER = {kind: record.letter for kind, record in KINDS.items()}


def spelled(ids):
    return "│".join(decode([i]) for i in ids)


for kind, e in examples.items():
    x, x_with_C = render(None, e.prompt), render(e.context, e.prompt)
    print(f"{LETTER[kind]}  {kind}\n   student  {spelled(x)}\n   teacher  {spelled(x_with_C)}")
    print(f"   right answer: {e.answer}\n")
    assert x_with_C[-len(x) :] == x

# %% [markdown]
# The teacher's prompt is the student's with a system turn in front; both end with the same tokens. So the teacher can score, position by
# position, whatever the student writes.
#
# **A** shows what "zorp" means, in the voice of an expert whose mannerism nobody asked for. **B** is a rule. **C** asks for a style. **D** gives the
# solution away.

# %% [markdown]
# ## 2. Two distributions for one position
# The student writes an answer: for each type the first of its samples in which the teacher would hardly have said some token. Below, the position
# where the two disagree most.
#
# **Question.** For each type: what does the teacher know that the student does not, and at which token will it show?


# %%
def rollout(model, e, seed=1):
    """The student's own answer, and both roles' logits for every token of it: (n,), (n, V), (n, V)."""
    prompt, teacher_prompt = [render(None, e.prompt)], [render(e.context, e.prompt)]
    y, mask = model.generate(prompt, 24, eos={END}, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        student = model.head(completion_states(model, prompt, y, mask))
        teacher = base.head(completion_states(base, teacher_prompt, y, mask))
    return y[mask], student, teacher


def chances(logits, y):
    return logits.softmax(-1).gather(-1, y[:, None])[:, 0]  # of the tokens y, (n,)


rollouts = {}
for kind, e in examples.items():
    for seed in range(1, 100):
        y, student, teacher = rollouts[kind] = rollout(base, e, seed)
        if chances(teacher, y).min() < 0.1:
            break

# %%
figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.2))
for axis, (kind, (y, student, teacher)) in zip(axes, rollouts.items()):
    t = forward_kl(student, teacher).argmax()
    q, p = student[t].softmax(-1), teacher[t].softmax(-1)
    top = (p + q).topk(3).indices.flip(0)
    for values, who, shift in [(p, "teacher", 0.2), (q, "student", -0.2)]:
        axis.barh(torch.arange(3) + shift, values[top], 0.4, color=COLOR[who], label=who)
    axis.set_yticks(range(3), [decode([i]).replace(" ", "·") for i in top.tolist()])
    where = f"after “{decode(y[:t].tolist())}”" if t else "first token"
    axis.set(title=f"{LETTER[kind]}: {where}", xlabel="probability", xlim=(0, 1.02))
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# A: which letter comes next depends on what the verb does. B: up to the verdict the two agree, then the student must guess. C: the student
# starts with the plain word, the teacher with "certainly". D: the student is careless, the teacher knows the step.
#
# The student is no fool: without $C$ its guess is the average over all contexts it has met, $p(y \mid x) = \sum_C p(C)\, p(y \mid x, C)$.

# %% [markdown]
# ## 3. Token by token
# The same rollouts in full: how likely each sampled token is to student and teacher, and forward KL at its position. Most tokens are settled: the signal
# sits on a few.


# %% tags=["thumbnail"]
def draw(axis, title, y, student, teacher):
    q, p = chances(student, y), chances(teacher, y)
    d = forward_kl(student, teacher)
    for row, (values, cmap, top) in enumerate(
        [(q, "cividis", 1), (p, "cividis", 1), (d, "viridis", 4)]
    ):
        place = (-0.5, len(y) - 0.5, row + 0.5, row - 0.5)
        axis.imshow(values[None], cmap=cmap, vmin=0, vmax=top, extent=place, aspect="auto")
        for t, value in enumerate(values.tolist()):
            axis.text(
                t,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="black" if value > 0.55 * top else "white",
            )
    axis.set(ylim=(2.5, -0.5), xlim=(-0.5, 8.5))
    axis.set_yticks(range(3), ["student Q(y)", "teacher P(y)", "KL(P‖Q), nats"])
    axis.set_xticks(range(len(y)), [decode([i]).replace(" ", "·") for i in y.tolist()])
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.set_title(title, loc="left", fontsize=9, pad=4)


figure, axes = plt.subplots(4, 1, figsize=(8, 5.6))
for axis, (kind, shown) in zip(axes, rollouts.items()):
    draw(axis, f"{LETTER[kind]}   {examples[kind].prompt} → {examples[kind].answer}", *shown)
plt.show()

# %% [markdown]
# Read D closely. Where a letter is wrong in the teacher's eyes, the teacher does *not* insist afterwards on the word that it had in mind: it scores what
# should follow **after the student's mistake**, and there the two agree again. That is what on-policy means, and what removes exposure
# bias: the student is taught in the states that it gets itself into.

# %%
for kind, (y, student, teacher) in rollouts.items():
    d = forward_kl(student, teacher)
    worst = decode([y[d.argmax()].item()])
    share = d.max() / d.sum()
    print(f"{LETTER[kind]}: {len(y):2} tokens, {d.sum():5.2f} nats, {share:.0%} of it at {worst!r}")
    assert d.max() > 0.3 and d.min() >= -1e-6

y, student, teacher = rollouts["privileged"]
p = chances(teacher, y)
assert p[(p < 0.1).nonzero()[0, 0] + 1] > 0.9  # right after the wrong letter: agreement

# %% [markdown]
# ## 4. The post's equation
# Section 5 of the post writes one KL between distributions over *whole answers*. By the chain rule it is the expected sum of the reverse KLs at the
# positions of the student's own rollouts:
#
# $$D_{KL}\big(p_\theta(y \mid x) \,\Vert\, p_\theta(y \mid x, C)\big) = \mathbb{E}_{y \sim p_\theta(\cdot \mid x)} \sum_t D_{KL}\big(Q_t \,\Vert\, P_t\big)$$
#
# A check by sampling: the left side as the mean of $\log Q(y) - \log P(y)$ of whole answers, the right side with the exact KL at each token.

# %%
for kind, e in examples.items():
    prompts, teacher_prompts = [render(None, e.prompt)] * 1000, [render(e.context, e.prompt)] * 1000
    y, mask = base.generate(prompts, 24, eos={END}, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        log_q = base.head(completion_states(base, prompts, y, mask)).log_softmax(-1)  # (n, V)
        log_p = base.head(completion_states(base, teacher_prompts, y, mask)).log_softmax(-1)
    sampled = [x.gather(-1, y[mask][:, None])[:, 0] for x in (log_q, log_p)]
    row = mask.nonzero()[:, 0]  # whose token it is
    whole = torch.zeros(1000).index_add(0, row, k1(*sampled))
    by_token = torch.zeros(1000).index_add(0, row, reverse_kl(log_q, log_p))
    error = (whole - by_token).std() / 1000**0.5
    print(
        f"{LETTER[kind]}: whole answers {whole.mean():6.2f} ± {whole.std():5.2f}    "
        f"token by token {by_token.mean():6.2f} ± {by_token.std():5.2f} nats"
    )
    assert (whole - by_token).mean().abs() < 4 * error
    assert kind != "specification" or by_token.std() < whole.std() / 4

# %% [markdown]
# Equal, up to the error of sampling. (±: standard deviation over answers. In B, where one token decides, the right side hardly varies: it averages over all the tokens that
# could stand there, the left side sees one.)
#
# The training objective takes its gradient position by position, with the rollout held fixed; the gradient of the whole would have one more term, for how
# the sampling itself depends on θ. `cosd.py` says so in its first lines.

# %% [markdown]
# ## 5. Which logit predicts which token
# Three prompts of different length in one batch: the student's answers, up to and including their end token. Arrows lead from the position whose logits are
# used to the token that they predict.

# %%
e_list = [examples[kind] for kind in ("demonstrations", "specification", "privileged")]
prompts = [render(None, e.prompt) for e in e_list]
generator = torch.Generator().manual_seed(1)
y, mask = base.generate(prompts, 24, eos={END}, generator=generator)  # (B, N) both
rows = [p + c[m].tolist() for p, c, m in zip(prompts, y, mask)]
width = max(map(len, rows))

# %%
FILL = {"prompt": "#DDDDDD", "completion": "#F5C99B", "end": "#D55E00", "padding": "white"}
arrow = dict(arrowstyle="->", color=COLOR["teacher"], connectionstyle="arc3,rad=-0.6")
figure, axis = plt.subplots(figsize=(9.5, 2.9))
for b, (ids, prompt) in enumerate(zip(rows, prompts)):
    for t in range(width):
        kind = "completion"
        if t < len(prompt):
            kind = "prompt"
        elif t >= len(ids):
            kind = "padding"
        elif ids[t] == END:
            kind = "end"
        axis.add_patch(
            plt.Rectangle((t - 0.48, b - 0.2), 0.96, 0.5, facecolor=FILL[kind], edgecolor="#999999")
        )
        label = decode([ids[t]]) if t < len(ids) else "pad"
        label = label.replace("assistant", "asst").strip("<|>").replace(" ", "·")
        axis.text(
            t,
            b + 0.05,
            label,
            ha="center",
            va="center",
            fontsize=7,
            color="black" if t < len(ids) else "#AAAAAA",
        )
        if kind in ("completion", "end"):
            axis.annotate("", (t, b - 0.22), (t - 1, b - 0.22), arrowprops=arrow)
axis.set(
    xlim=(-0.6, width - 0.4), ylim=(2.5, -0.7), xticks=range(width), xlabel="position", yticks=[]
)
axis.spines[:].set_visible(False)
figure.legend(
    [plt.Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="#999999") for color in FILL.values()],
    ["prompt", "completion: scored", "end token: scored too", "padding: never scored"],
    loc="outside lower center",
    ncols=4,
    fontsize=8,
)
plt.show()

# %% [markdown]
# For a prompt of $L$ tokens, completion token $j$ is predicted at position $L - 1 + j$: the first one by the assistant header. The end token is predicted (or the
# model would never learn to stop) but need not be read. `completion_states` picks exactly these positions. Row by row, without any padding:

# %%
with torch.no_grad():
    packed = base.head(completion_states(base, prompts, y, mask))  # (n, V)
    alone = [
        base(torch.tensor([ids]))[0, len(p) - 1 : len(ids) - 1] for ids, p in zip(rows, prompts)
    ]
assert packed.shape[0] == mask.sum() and torch.allclose(packed, torch.cat(alone), atol=1e-4)
print(f"{mask.sum()} scored tokens in a batch of {mask.numel()} completion slots; the same logits")

# %% [markdown]
# ## 6. Weights
# The loss is $\sum_t w_t\, D_t$ with weights that sum to one over the whole batch. Two ways to share them out, for completions of 2, 4 and 8 tokens:
# every *token* counts the same, or every *completion* does. SDFT uses the second and skips the first three tokens.

# %%
lengths = torch.tensor([2, 4, 8])
mask = torch.arange(8) < lengths[:, None]  # (3, 8)
figure, axes = plt.subplots(1, 3, figsize=(9.5, 1.9))
for axis, (reduction, skip) in zip(axes, [("token", 0), ("sequence", 0), ("sequence", 3)]):
    w = token_weights(mask, reduction, skip)
    axis.imshow(w.masked_fill(~mask, float("nan")), cmap="cividis", vmin=0, vmax=0.5, aspect="auto")
    for b, j in mask.nonzero().tolist():
        axis.text(
            j,
            b,
            f"{w[b, j]:.2f}".replace("0.", "."),
            ha="center",
            va="center",
            fontsize=8,
            color="black" if w[b, j] > 0.25 else "white",
        )
    axis.set(title=f"{reduction}, skip {skip}", xlabel="completion token")
    axis.set_yticks(range(3), [f"{n} tokens" for n in lengths.tolist()])
    assert torch.isclose(w.sum(), torch.tensor(1.0))
plt.show()

by_hand = torch.stack([m / (3 * m.sum()) for m in mask.float()])
assert torch.allclose(token_weights(mask, "sequence"), by_hand)
assert torch.allclose(token_weights(mask, "token"), mask / mask.sum())

# %% [markdown]
# ## 7. One step by hand
# Sixteen prompts of type A, and nothing but the model: no padding, no gather, one row after the other.

# %%
rng = random.Random(0)
batch_of = [tasks["demonstrations"].draw(rng) for _ in range(16)]
prompts = [render(None, e.prompt) for e in batch_of]
teacher_prompts = [render(e.context, e.prompt) for e in batch_of]


def step_by_hand(student, teacher, divergence, reduction):
    # 1. Rollout: the student answers, without C.
    y, mask = student.generate(
        prompts, 24, temperature=1.0, eos={END}, generator=torch.Generator().manual_seed(7)
    )
    loss = 0.0
    for x, x_with_C, row, m in zip(prompts, teacher_prompts, y, mask):
        tokens = row[m].tolist()
        # 2. Score: the same tokens after x, with gradient, and after (C, x), without.
        student_logits = student(torch.tensor([x + tokens]))[0, len(x) - 1 : -1]  # (n, V)
        with torch.no_grad():
            begin = len(x_with_C) - 1
            teacher_logits = teacher(torch.tensor([x_with_C + tokens]))[0, begin:-1]  # (n, V)
        # 3. A divergence per token, and its weight.
        weight = 1 / mask.sum() if reduction == "token" else 1 / (16 * len(tokens))
        loss = loss + weight * divergence(student_logits, teacher_logits).sum()
    # 4. The gradient reaches the student alone.
    loss.backward()
    return loss.item()


# %% [markdown]
# And the same with `generate` and `cosd_loss`, which is what `train.py` calls: the rollout first, then the loss of its rows. Loss and every gradient
# agree, for each divergence and both reductions:


# %%
def step(
    student, teacher, prompts, teacher_prompts, generator, name="forward_kl", reduction="token"
):
    """One rollout and its gradient. -> the rows, the loss"""
    y, mask = student.generate(prompts, 24, eos={END}, generator=generator)
    weights, objective = token_weights(mask, reduction), make_objective(name)
    rows = Rows(prompts, teacher_prompts, y, mask, weights, teacher, objective)
    loss, log = cosd_loss(student, rows)
    loss.backward()
    return rows, log["loss"].item()


print("objective    reduction    by hand   cosd_loss")
for name, divergence in DIVERGENCES.items():
    for reduction in ("token", "sequence"):
        mine, theirs = copy.deepcopy(base), copy.deepcopy(base)
        teacher = Teacher(theirs, "frozen")
        loss = step_by_hand(mine, base, divergence, reduction)
        seven = torch.Generator().manual_seed(7)
        _, ours = step(theirs, teacher, prompts, teacher_prompts, seven, name, reduction)
        print(f"{name:13}{reduction:10}{loss:10.5f}{ours:12.5f}")
        assert abs(loss - ours) < 1e-5 * abs(loss) + 1e-7
        for a, b in zip(mine.parameters(), theirs.parameters()):
            assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6)

# %% [markdown]
# And without a context? Then teacher and student are one and the same, and there is nothing to learn. (The post's 4.3: a target that is internal *and*
# superior is what the context is for.)

# %%
same = copy.deepcopy(base)
_, loss = step(
    same, Teacher(same), prompts, prompts, torch.Generator().manual_seed(7), "reverse_kl"
)
largest = max(p.grad.abs().max().item() for p in same.parameters())
assert abs(loss) < 1e-6 and largest < 1e-5
print("without C: loss 0, gradient 0")

# %% [markdown]
# ## 8. The teacher gets no gradient
# It is the same network, so gradient *could* flow. It must not: otherwise the model would make its better self worse until the two agree.

# %%
rolled_out = base.generate(prompts, 24, eos={END}, generator=torch.Generator().manual_seed(7))
h = teacher.states(teacher_prompts, *rolled_out)


def having(model):
    return sum(p.grad is not None for p in model.parameters())


print("teacher's states require a gradient:", h.requires_grad)
print(f"parameters with a gradient: teacher {having(teacher.model)}, student {having(theirs)}")
assert not h.requires_grad and having(teacher.model) == 0
assert having(theirs) == len(list(theirs.parameters()))

# %% [markdown]
# Three kinds of teacher. **frozen**: the student as it was at the start; the target stands still. **ema**: a copy that follows slowly (SDFT).
# **live**: the student's own current weights, so every step also moves the target. In the first step all three are the same model and give the same
# gradient; then they part. Eighty steps of type A with each (no anchors, a small batch: a demonstration, not a result):
#
# **Question.** Two curves per teacher: how far the student still is from *it*, and how far from the teacher it started with. Which of them can fool you?


# %%
@torch.no_grad()
def reverse(student, rows, scorer):
    """KL(student‖scorer), whatever is minimised."""
    rows = replace(rows, scorer=scorer, objective=make_objective("reverse_kl"))
    return cosd_loss(student, rows)[0].item()


def learn(kind, steps=80):
    student = copy.deepcopy(base)
    teacher = Teacher(student, kind, ema_rate=0.05)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, betas=(0.9, 0.95))
    original, rng, curve = Teacher(base), random.Random(1), []
    for number in range(steps):
        drawn = [tasks["demonstrations"].draw(rng) for _ in range(16)]
        prompts = [render(None, e.prompt) for e in drawn]
        teacher_prompts = [render(e.context, e.prompt) for e in drawn]
        generator = torch.Generator().manual_seed(number)
        rows, _ = step(student, teacher, prompts, teacher_prompts, generator)
        curve.append([reverse(student, rows, scorer) for scorer in (teacher, original)])
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(student)
    return student, teacher, torch.tensor(curve)  # (steps, 2)


learned = {kind: learn(kind) for kind in ("frozen", "ema", "live")}

# %%
figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.5), sharey=True)
for axis, (kind, (_, _, curve)) in zip(axes, learned.items()):
    axis.semilogy(curve[:, 1], color="black", linestyle=":", label="KL to the base with C")
    axis.semilogy(curve[:, 0], color=COLOR["teacher"], label="KL to its teacher")
    axis.set(title=kind, xlabel="step")
axes[0].set_ylabel("nats per token")
axes[0].legend(fontsize=8)
plt.show()


def length(model):
    pairs = zip(model.parameters(), base.parameters())
    return sum(((p - p0) ** 2).sum() for p, p0 in pairs).sqrt().item()


for kind, (student, teacher, _) in learned.items():
    share = length(teacher.model) / length(student)
    print(f"{kind:7} teacher has moved {share:4.0%} of the student's way")
# to its teacher, to the base with C
late = {kind: curve[-5:].mean(0) for kind, (_, _, curve) in learned.items()}
assert late["live"][1] > 10 * late["live"][0]
assert torch.allclose(*late["frozen"], rtol=1e-3, atol=1e-5)
first = [curve[0] for _, _, curve in learned.values()]
assert torch.allclose(first[0], first[1]) and torch.allclose(first[0], first[2])
assert length(learned["frozen"][1].model) == 0
assert 0 < length(learned["ema"][1].model) < length(learned["ema"][0])

# %% [markdown]
# The KL to a *live* teacher stays small while the two wander off together: agreement alone proves nothing. A frozen teacher's KL can be trusted, it is the
# distance to something that does not move. An EMA teacher is in between; its rate says where.

# %% [markdown]
# ## 9. After eighty steps
# A held-out word, before and after. The student of the frozen teacher, still without context:

# %%
student = learned["frozen"][0]
heldout = tasks["demonstrations"].heldout
word = heldout[0]
figure, axes = plt.subplots(2, 1, figsize=(8, 2.9))
for axis, (when, model) in zip(axes, [("before", base), ("after", student)]):
    draw(axis, f"{when}:   {word.prompt} → {word.answer}", *rollout(model, word))
plt.show()

# %% [markdown]
# And 64 such prompts, answered greedily: how many words are right?


# %%
def share_right(model, with_context):
    prompts = [render(e.context if with_context else None, e.prompt) for e in heldout]
    y, mask = model.generate(prompts, 24, temperature=0, eos={END})
    answers = [row[m].tolist() for row, m in zip(y, mask)]
    return tasks["demonstrations"].grades(heldout, answers)["exact"]


before, after = share_right(base, False), share_right(student, False)
print(f"without context: before {before:.2f}, after {after:.2f}")
print(f"with context, the base: {share_right(base, True):.2f}")
assert before < 0.3 < after

# %% [markdown]
# The context is in the weights now. Did anything else change there? `train.py` measures that, too: the README's *prior*,
# *steerability* and *drift*.

# %% [markdown]
# ## Now you
# 1. In section 3, feed `draw` the *right* answer instead of the rollout (as SFT does). Where is the KL now? What does the student never get to see?
# 2. In section 7, break the step on purpose: shift the positions by one, or forget the weights. Which of the printed numbers tells you?
# 3. In section 8, give the live teacher 200 steps.
