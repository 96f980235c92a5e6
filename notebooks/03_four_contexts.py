# %% [markdown]
# # 3. Four contexts, two roles, one step
#
# One model plays student and teacher; the only difference is what stands in the prompt. This notebook shows the four kinds of context, reads a
# rollout token by token with the eyes of both, and takes one training step apart by hand.
#
# | in the post | equation or name | in code | section |
# |---|---|---|---|
# | 4.3 | student $p_\theta(\cdot \mid x)$ and teacher $p_\theta(\cdot \mid x, C)$ | `render(None, x)`, `render(C, x)`, `Teacher` | 1, 2, 8 |
# | 4.3 | "it collapses into a degenerate state": it does not | the same with $C$ left out | 7 |
# | 5.2–5.5 | types A to D | `KINDS` in `contexts.py` | 1–3 |
# | 4.2 | forward KL, reverse KL; JSD in its implementation note | `forward_kl`, `reverse_kl`, `jsd` | 3, 7 (and notebook 01) |
# | 5 | $\mathcal{L} = D_{KL}(p_\theta(y \mid x) \,\Vert\, p_\theta(y \mid x, C))$ | `reverse_kl`, summed over the tokens of a rollout | 4 |
# | 4.3 | "minimizes the divergence", on-policy | `cosd_loss` | 5–7, 9 |
#
# In the post's symbols the student is $p_\theta$; here $Q$ is the student's and $P$ the teacher's distribution of the next token. (The trust region of 4.1 comes
# in notebook 04.)

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
from dataclasses import replace

import figures
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

# %% [markdown]
# The base is a small GPT, pretrained on a made-up world in which contexts matter. It is found in `out/`; the first time it is pretrained, which takes three or four minutes.

# %%
cfg = Config(device="cpu")
base, name = get_base(cfg, "out")
print(f"{sum(p.numel() for p in base.parameters()):,} parameters, {base.config.vocab_size} tokens")

# %% [markdown]
# ## 1. What student and teacher read
# Here is one prompt of each type. Bars separate tokens: a made-up word is spelled letter by letter, a known word is one token together with its space.

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
# The teacher's prompt is the student's with a system turn in front; both end with the same tokens. Therefore the teacher can score, position by
# position, whatever the student writes.
#
# **A** shows what "zorp" means, in the voice of an expert whose mannerism nobody asked for. **B** is a rule. **C** asks for a style. **D** gives the
# solution away.

# %% [markdown]
# ## 2. Two distributions for one position
# The student writes an answer. (For each type we take the first of its samples that contains a token which the teacher would hardly have said.) The figure shows the position
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
for axis, (kind, (y, student, teacher)) in zip(figures.panels(4, 10, 2.4), rollouts.items()):
    t = forward_kl(student, teacher).argmax()
    q, p = student[t].softmax(-1), teacher[t].softmax(-1)
    top = (p + q).topk(3).indices
    both = {"teacher": p[top], "student": q[top]}
    where = f"after “{decode(y[:t].tolist())}”" if t else "first token"
    letters, legend = [figures.spell(decode([i])) for i in top.tolist()], kind == "specification"
    figures.bars(axis, letters, both, legend, ylim=(0, 1.05), ylabel="probability")
    axis.set_title(f"{LETTER[kind]}: {where}")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# A: which letter comes next depends on what the verb does. B: up to the verdict the two agree, then the student must guess. C: the student
# starts with the plain word, the teacher with "certainly". D: the student is careless, the teacher knows the step.
#
# The student is no fool: without $C$ its best guess is the average over all contexts that it has met, $p(y \mid x) = \sum_C p(C)\, p(y \mid x, C)$. This base comes close to it on average over many words, but for a single prompt
# it can be far from it. In A, the rule gives the second letter after "d" two meanings out of three with a v (*swap*, *ends*) and one with an a (*stretch*); the student says v with .78 and a with about .2.
# Notebook 02, section 6, measures this for all words: there, "lid zorp" has .47 where the formula has .20, and the mean over all words is right.
#
# </details>

# %% [markdown]
# ## 3. Token by token
# Here are the same rollouts in full: how likely each sampled token is to the student and to the teacher, and forward KL at its position.
#
# **Question.** On how many tokens of an answer will the signal sit? And what will the teacher say *after* a token that it would never have written: will it insist on its own answer?


# %% tags=["thumbnail"]
def draw(axis, title, y, student, teacher):
    tokens = [decode([i]) for i in y.tolist()]
    q, p = chances(student, y), chances(teacher, y)
    figures.rollout(axis, title, tokens, q, p, forward_kl(student, teacher))


for axis, (kind, shown) in zip(figures.panels(rows=4, width=8, height=5.6), rollouts.items()):
    draw(axis, f"{LETTER[kind]}   {examples[kind].prompt} → {examples[kind].answer}", *shown)

# %%
for kind, (y, student, teacher) in rollouts.items():
    d = forward_kl(student, teacher)
    worst = decode([y[d.argmax()].item()])
    share = d.max() / d.sum()
    print(f"{LETTER[kind]}: {len(y):2} tokens, {d.sum():5.2f} nats, {share:.0%} of it at {worst!r}")

# %% [markdown]
# The rollout of D as a moving picture. At each position the student draws a token from its distribution; the teacher, who reads the same text so far plus the solution, would have drawn from its own.

# %%
y, student, teacher = rollouts["privileged"]
q, p = student.softmax(-1), teacher.softmax(-1)
top = [(a + b).topk(4).indices for a, b in zip(q, p)]
figures.rollout_film(
    examples["privileged"].prompt,
    [decode([i]) for i in y.tolist()],
    [[decode([i]) for i in best.tolist()] for best in top],
    [values[best] for values, best in zip(q, top)],
    [values[best] for values, best in zip(p, top)],
    forward_kl(student, teacher),
)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# On one to three tokens; the others are settled. And the teacher hardly ever insists. Read D closely: the first letter, h, is wrong in the teacher's eyes, since its solution begins with "iph". Once the h stands there, the teacher does not go back: it scores what
# should follow **after the student's mistake**, the rest of "hip", and there the two agree. That is what on-policy means, and what removes exposure
# bias: the student is taught in the states that it gets itself into. But at the beginning of the second word the teacher returns to its solution, "hpi", and wants another h, although reversing the student's own "hip" would have given the p that
# the student drew. The teacher reads its context; it does not think the student's mistake through.
#
# </details>

# %% tags=["answer"]
for y, student, teacher in rollouts.values():
    d = forward_kl(student, teacher)
    p = chances(teacher, y)
    assert d.max() > 0.3 and d.min() >= -1e-6
# Of D, the last one:
assert p[(p < 0.1).nonzero()[0, 0] + 1] > 0.9  # right after the wrong letter: agreement

# %% [markdown]
# ## 4. The post's equation
# Section 5 of the post writes one KL between distributions over *whole answers*. By the chain rule it is the expected sum of the reverse KLs at the
# positions of the student's own rollouts:
#
# $$D_{KL}\big(p_\theta(y \mid x) \,\Vert\, p_\theta(y \mid x, C)\big) = \mathbb{E}_{y \sim p_\theta(\cdot \mid x)} \sum_t D_{KL}\big(Q_t \,\Vert\, P_t\big)$$
#
# This is checked by sampling: the left side is the mean of $\log Q(y) - \log P(y)$ of whole answers, the right side uses the exact KL at each token.
#
# **Question.** Both have the same mean. Which one has the smaller spread?

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

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# They are equal up to the error of sampling. (±: standard deviation over answers.) The right side mostly varies less, because at each position it averages over all the tokens that could stand there, while the left side sees one. In B,
# where one token decides, the difference is largest: 0.47 against 4.24. In C, where the first letter decides and the student hardly ever says "certainly", the two spread alike.
#
# </details>

# %% [markdown]
# The training objective takes its gradient position by position, with the rollout held fixed. The gradient of the whole would have one more term, for how
# the sampling itself depends on θ; `cosd.py` says so in its first lines.

# %% [markdown]
# ## 5. Which logit predicts which token
# Three prompts of different length stand in one batch, with the student's answers up to and including their end token. Arrows lead from the position whose logits are
# used to the token that they predict.
#
# **Question.** Where does the first arrow of each row begin? Is the end token scored? Is it read?

# %%
e_list = [examples[kind] for kind in ("demonstrations", "specification", "privileged")]
prompts = [render(None, e.prompt) for e in e_list]
generator = torch.Generator().manual_seed(1)
y, mask = base.generate(prompts, 24, eos={END}, generator=generator)  # (B, N) both
rows = [p + c[m].tolist() for p, c, m in zip(prompts, y, mask)]
width = max(map(len, rows))

# %%
NAMES = ["prompt", "completion: scored", "end token: scored too", "padding: never scored"]
figures.shift([[decode([i]) for i in ids] for ids in rows], [len(p) for p in prompts], NAMES)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The first arrow begins at the assistant header, the last token of the prompt: for a prompt of $L$ tokens, completion token $j$ is predicted at position $L - 1 + j$. The end token is scored, or the
# model would never learn to stop; it need not be read, because nothing follows it.
#
# </details>

# %% [markdown]
# `completion_states` picks exactly these positions. The same logits come out row by row, without any padding:

# %%
with torch.no_grad():
    packed = base.head(completion_states(base, prompts, y, mask))  # (n, V)
    alone = [
        base(torch.tensor([ids]))[0, len(p) - 1 : len(ids) - 1] for ids, p in zip(rows, prompts)
    ]
assert packed.shape[0] == mask.sum() and torch.allclose(packed, torch.cat(alone), atol=1e-4)
print(f"{mask.sum()} scored tokens in a batch of {mask.numel()} completion slots; the same logits")

# %% [markdown]
# ### The token between header and answer
# Between the last token of the prompt, the header, and the first token of the answer lies a border that is easy to get wrong by one. The header itself is never scored: it is given. But its *state* predicts the first
# token of the answer, and that prediction is scored. The cell below asks how much of the teacher's signal sits exactly there.
#
# **Question.** For which types would a code that begins one position too late lose most of what there is to learn?

# %%
for kind, task in tasks.items():
    drawn = [task.draw(random.Random(i)) for i in range(200)]
    x = [render(None, e.prompt) for e in drawn]
    x_with_C = [render(e.context, e.prompt) for e in drawn]
    y, mask = base.generate(x, 24, eos={END}, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        student = base.head(completion_states(base, x, y, mask))
        d = forward_kl(student, base.head(completion_states(base, x_with_C, y, mask)))
    first = mask.nonzero()[:, 1] == 0  # predicted by the state of the header
    print(f"{LETTER[kind]}: {first.float().mean():.0%} of the tokens are first tokens", end=", ")
    print(f"and they hold {d[first].sum() / d.sum():.0%} of the KL")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# For C above all: 88 % of the KL sits on the first token, because the teacher begins with "certainly" and the student does not. In A it is half. In B nothing would be lost, since "sword" is said by both and the
# verdict comes later. So such a mistake can hide: a test on type B alone would not find it. Real chat templates have more than one token in the header, and there is a trap of another kind; notebook 05 shows it.
#
# </details>

# %% [markdown]
# ## 6. Weights
# The loss is $\sum_t w_t\, D_t$ with weights that sum to one over the whole batch. There are two ways to share them out, shown here for completions of 2, 4 and 8 tokens:
# every *token* counts the same, or every *completion* does. SDFT uses the second and skips the first three tokens.
#
# **Question.** If the first three tokens are skipped, what happens to the weight of the completion that has only two?

# %%
lengths = torch.tensor([2, 4, 8])
mask = torch.arange(8) < lengths[:, None]  # (3, 8)
settings = [("token", 0), ("sequence", 0), ("sequence", 3)]
for axis, (reduction, skip) in zip(figures.panels(3, 9.5, 2.1), settings):
    w = token_weights(mask, reduction, skip)
    seen = w.masked_fill(~mask, float("nan"))
    names = [f"{n} tokens" for n in lengths.tolist()]
    figures.table(axis, seen, names, range(8), top=0.5, title=f"{reduction}, skip {skip}")
    axis.set_xlabel("completion token")
    assert torch.isclose(w.sum(), torch.tensor(1.0))

by_hand = torch.stack([m / (3 * m.sum()) for m in mask.float()])
assert torch.allclose(token_weights(mask, "sequence"), by_hand)
assert torch.allclose(token_weights(mask, "token"), mask / mask.sum())

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# It vanishes: that completion has no scored token left and does not count at all. The other two share the whole weight, so that the single token that is left of the second counts .50.
#
# </details>

# %% [markdown]
# ## 7. One step by hand
# Here are sixteen prompts of type A and nothing but the model: no padding, no gathering, one row after the other.

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
# Now the same with `generate` and `cosd_loss`, which is what `train.py` calls: the rollout first, then the loss of its rows. The loss and every gradient
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
# ### Without a context
# Leave $C$ out, and teacher and student are the same. The post says in 4.3: "if the model minimizes Reverse KL against its own unguided distribution, it collapses into a degenerate state."
#
# **Question.** What do the loss and its gradient say about that?

# %%
same = copy.deepcopy(base)
seven = torch.Generator().manual_seed(7)
_, loss = step(same, Teacher(same), prompts, prompts, seven, "reverse_kl")
largest = max(p.grad.abs().max().item() for p in same.parameters())
print(f"without C: loss {loss:.1e}, largest gradient {largest:.1e}")
assert abs(loss) < 1e-6 and largest < 1e-5

# %% [markdown]
# A KL has its minimum, 0, where the two are equal. So the first step says: stay. Do sixty steps say the same? They are run twice without a context, with a frozen and with a live teacher (section 8), and a third time with a target
# that is a little *sharper* than the live student itself: its logits divided by .8. The figure shows the entropy of the student, which would be 0 in a degenerate state.


# %%
def without_context(kind, temperature=1.0, steps=60):
    student = copy.deepcopy(base)
    teacher = Teacher(student, kind)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0)
    rng, entropies = random.Random(1), []

    def objective(student_logits, teacher_logits, tokens):
        return reverse_kl(student_logits, teacher_logits / temperature)

    for number in range(steps):
        x = [render(None, tasks["demonstrations"].draw(rng).prompt) for _ in range(16)]
        y, mask = student.generate(
            x, 24, eos={END}, generator=torch.Generator().manual_seed(number)
        )
        loss, log = cosd_loss(student, Rows(x, x, y, mask, token_weights(mask), teacher, objective))
        loss.backward()
        entropies.append(log["entropy"].item())
        optimizer.step()
        optimizer.zero_grad()
    return entropies


own = {
    "frozen teacher, itself": without_context("frozen"),
    "live teacher, itself": without_context("live"),
    "live teacher, sharpened (T = 0.8)": without_context("live", 0.8),
}
axis = figures.panels(width=6.5)
figures.lines(axis, range(60), own, xlabel="step", ylim=(0, None))
figures.label(axis, ylabel="student's entropy, nats per token", title="no context")
for who, entropies in own.items():
    ends = [sum(part) / 10 for part in (entropies[:10], entropies[-10:])]
    print(f"{who:34} entropy: first ten steps {ends[0]:.2f}, last ten {ends[1]:.3f}")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Nothing collapses, and our computation disagrees with the post here. The loss is 0 and the gradient is 0 up to rounding. After sixty steps the entropy is what it was (0.52 nats in the last ten steps, 0.50 in the first), for the frozen and for the live teacher:
# a model cannot learn anything from itself, but it does not lose anything either. With the exact KL the post's sentence is therefore not true; "there is nothing to learn" would be.
#
# What does collapse is a model that learns from something *sharper* than itself: with the logits of its live teacher divided by .8, the entropy falls from 0.39 to 0.001. Practice does this easily without meaning to: by sampling with top-p or at a low
# temperature and training on the result, or by keeping the best of several answers. Perhaps that is what the post has in mind. Its conclusion stands in any case: a target that is internal *and* superior is what the context is for.
#
# </details>

# %% tags=["answer"]
for who, entropies in own.items():
    kept = sum(entropies[-10:]) / sum(entropies[:10])
    assert kept < 0.05 if "sharpened" in who else kept > 0.7

# %% [markdown]
# ## 8. The teacher gets no gradient
# It is the same network, so gradient *could* flow into the teacher. It must not: otherwise the model would make its better self worse until the two agree.

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
# gradient; then they part. Below are eighty steps of type A with each (no anchors and a small batch: this is a demonstration, not a result).
#
# **Question.** There are two curves for each teacher: how far the student still is from *it*, and how far from the teacher it started with. Which of the two can fool you?


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
figures.teachers({kind: curve for kind, (_, _, curve) in learned.items()})


def length(model):
    pairs = zip(model.parameters(), base.parameters())
    return sum(((p - p0) ** 2).sum() for p, p0 in pairs).sqrt().item()


for kind, (student, teacher, _) in learned.items():
    share = length(teacher.model) / length(student)
    print(f"{kind:7} teacher has moved {share:4.0%} of the student's way")
# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The KL to its own teacher can. With a *live* teacher it stays small while the two wander off together: agreement alone proves nothing. A frozen teacher's KL can be trusted, since it is the
# distance to something that does not move; there the two curves are one. An EMA teacher lies in between, and its rate says where: here it has moved 84 % of the student's way.
#
# </details>

# %% tags=["answer"]
late = {kind: curve[-5:].mean(0) for kind, (_, _, curve) in learned.items()}
assert late["live"][1] > 10 * late["live"][0]  # to the base with C, to its teacher
assert torch.allclose(*late["frozen"], rtol=1e-3, atol=1e-5)
first = [curve[0] for _, _, curve in learned.values()]
assert torch.allclose(first[0], first[1]) and torch.allclose(first[0], first[2])
assert length(learned["frozen"][1].model) == 0
assert 0 < length(learned["ema"][1].model) < length(learned["ema"][0])

# %% [markdown]
# ### The spikes
# The frozen teacher's curve has spikes near its end: single steps at which the KL is many times that of their neighbours, although nothing changed in between.
#
# **Question.** What can make one batch of sixteen answers so different from the next?

# %%
frozen_curve = learned["frozen"][2][:, 0]
late_steps = frozen_curve.clone()
late_steps[:40] = 0
spike = late_steps.argmax().item()
student, _, _ = learn("frozen", spike)  # the student as it was before that step
rng = random.Random(1)
for _ in range(spike + 1):
    drawn = [tasks["demonstrations"].draw(rng) for _ in range(16)]
x, x_with_C = (
    [render(c, e.prompt) for c, e in zip(cs, drawn)]
    for cs in ([None] * 16, [e.context for e in drawn])
)
y, mask = student.generate(x, 24, eos={END}, generator=torch.Generator().manual_seed(spike))
with torch.no_grad():
    q = student.head(completion_states(student, x, y, mask))
    p = base.head(completion_states(base, x_with_C, y, mask))
d, row = reverse_kl(q, p), mask.nonzero()[:, 0]
odd = row == row[d.argmax()]
e = drawn[row[d.argmax()]]
neighbours = frozen_curve[spike - 5 : spike].mean()
print(f"step {spike}: {d.mean():.3f} nats per token, the five steps before {neighbours:.4f}")
print(f"{d[odd].sum() / d.sum():.0%} of it in one answer: {e.prompt} → {e.answer}, but it wrote")
print("token      Q(y)      P(y)   KL(Q‖P)")
for token, a, b, nats in zip(
    y[mask][odd], chances(q, y[mask])[odd], chances(p, y[mask])[odd], d[odd]
):
    print(f"{decode([token.item()]):8}{a:8.4f}  {b:8.4f}  {nats:8.2f}")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# A single token. The student drew a first letter to which it gives a chance of 0.0029, a capital T. From there on student and teacher stand in a place where no training has brought them together: the student, having seen a capital, goes on in capitals (0.94),
# while the teacher, who still has the lower-case demonstrations before its eyes, gives the capital I almost nothing. $\log Q/P$ has no upper bound, so this one token costs 14.90 nats, which is 0.247 when it is shared out over all the tokens of the batch.
#
# Nothing went wrong, then. This is on-policy learning at work: the step after a spike teaches the student what to do after such a slip. And because all three runs draw their prompts and tokens from the same seeds, they can slip at the same steps. But never judge a run
# by the last value of its reverse KL: take a mean over many steps, or look at forward KL or JSD too.
#
# </details>

# %% [markdown]
# ## 9. After eighty steps
# Here is a held-out word, before and after, answered by the student of the frozen teacher, still without context:

# %%
student = learned["frozen"][0]
heldout = tasks["demonstrations"].heldout
word = heldout[0]
for axis, (when, model) in zip(
    figures.panels(rows=2, width=8, height=2.9), [("before", base), ("after", student)]
):
    draw(axis, f"{when}:   {word.prompt} → {word.answer}", *rollout(model, word))

# %% [markdown]
# **Question.** Of 64 such prompts, answered greedily, how many were right before and how many are right now?


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

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# A share of 0.02 before and 1.00 after, which is what the base reaches with the context in its prompt.
#
# </details>

# %% [markdown]
# The context is in the weights now. Did anything else change there? `train.py` measures that too, as the README's *prior*,
# *steerability* and *drift*; notebook 04 looks at them.

# %% [markdown]
# ## Now you
# 1. In section 3, feed `draw` the *right* answer instead of the rollout (as SFT does). Where is the KL now? What does the student never get to see?
# 2. In section 7, break the step on purpose: shift the positions by one, or forget the weights. Which of the printed numbers tells you?
# 3. In section 8, give the live teacher 200 steps.
#
# Next: `04_forgetting`.

# %% [markdown] tags=["answer"]
# <details><summary>Answers</summary>
#
# 1. It sits where the right answer departs from what the student would have said, that is on the first token of each right word; after that the student agrees. It never sees what follows one of its own mistakes.
# 2. Shifted by one position, student and teacher are still compared with each other, so the loss looks harmless; but it no longer agrees with the loss by hand, and neither do the gradients. Without the weights the loss grows with the
#    number of tokens in the batch (it is their sum).
# 3. The agreement with itself stays, and so does the distance to the base with C: the curves of the live teacher do not come back together. There is nothing that could bring them back, since nothing in the loss refers to the base.
#
# </details>
