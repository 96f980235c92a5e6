# %% [markdown]
# # 6. From preferences to a policy
#
# The lecture's second half in one small model: people compare answers, a reward model learns from the comparisons, and the policy is moved toward what the
# reward model likes. Then the post's last claim: is a model that was tuned by COSD the *perfect state* to start this from?
#
# | in the lecture and the post | in code (`notebooks/rlhf.py`) | section |
# |---|---|---|
# | σ, and the pair's probability as a sigmoid | `bradley_terry` | 1 |
# | step 2: preferences, the reward model, maximum likelihood | `RewardModel`, `fit_reward_model` | 2, 3 |
# | max E[r] − β KL(π‖ref) | `tilted` | 4 |
# | best-of-N | `best_of_n_law` | 4, 5 |
# | RAFT | `raft` | 6 |
# | step 3: RL; the reward spread over tokens | `returns_to_go`, `advantages`, `policy_loss`, `reinforce` | 7 |
# | over-optimisation, and what β is for | `notebooks/rlhf_evidence.py over` | 8 |
# | post 6: "the perfect pre-RL state" | `notebooks/rlhf_evidence.py state` | 9 |
# | instruction tuning, FLAN, teacher forcing with a prefix-LM | `notebooks/instruct.py` | 11 |
# | cosine similarity; the post's GEM | `cosine`, `gradient` | 12 |
#
# What is trained here takes a minute or two once the base of notebook 03 is there. The figures of sections 8 to 12 are of committed runs.

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
import math
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display

from contexts import WORLD_CHAT
from cosd import kl
from train import Config, get_base

sys.path.insert(0, "notebooks")
from instruct import PrefixMask, cosine
from rlhf import (
    RL,
    RewardModel,
    advantages,
    as_lists,
    best_of_n_law,
    bradley_terry,
    fit_reward_model,
    policy_loss,
    raft,
    reinforce,
    returns_to_go,
    roll_out,
    tilted,
)
from rlhf_evidence import best_of_pool, draw, gold, heldout, judged, learned, preferences, said

plt.rc("figure", dpi=90)
plt.rc("figure.constrained_layout", use=True)
plt.rc("font", size=9)
plt.rc("axes.spines", top=False, right=False)
plt.rc("legend", frameon=False)
torch.set_num_threads(1)
_ = torch.manual_seed(0)

# %% [markdown]
# ## 1. One number from two
# Somebody is shown two answers of rewards $x$ and $y$. Bradley and Terry say that the first is preferred with probability $e^x / (e^x + e^y)$.
#
# **Question.** What happens to it if both rewards rise by 10?

# %%
x, y = torch.tensor(1.5, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
for level in (0, 10):
    a, b = (x + level).exp(), (y + level).exp()
    print(f"rewards {x + level:.1f} and {y + level:.1f}: {a / (a + b):.4f}")
print(f"σ(x − y) = {(x - y).sigmoid():.4f}")

# %% [markdown]
# Nothing: divide numerator and denominator by $e^x$, and what is left is $1 / (1 + e^{-(x-y)}) = \sigma(x-y)$. Only the difference counts, so *no amount of
# comparisons can tell the level of a reward*. Likewise $1 - \sigma(z) = \sigma(-z)$: the two answers' probabilities sum to one. The loss of a comparison is the
# cross-entropy of a coin whose outcome was "the first": one-hot, so that a single term $-\log \sigma(r_w - r_l)$ remains.

# %%
z = torch.linspace(-5, 5, 101, dtype=torch.float64)
assert torch.allclose(1 - z.sigmoid(), (-z).sigmoid(), atol=1e-15)
assert torch.allclose(bradley_terry(z, 0 * z), -z.sigmoid().log())
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.4))
left.plot(z, z.sigmoid())
left.set(xlabel="reward of the first less the second", ylabel="first preferred", title="σ")
right.plot(z, bradley_terry(z, 0 * z))
right.set(xlabel="r of the preferred less the other", ylabel="nats", title="−log σ: the loss")
plt.show()

# %% [markdown]
# The entropy of that coin says how much a comparison can teach at all. It is largest for the even coin, as a uniform distribution is always the most uncertain
# one; and by Gibbs' inequality nobody's predictions cost less than the coin's own: $H(p, q) = H(p) + D_{KL}(p \Vert q) \ge H(p)$.

# %%
p = torch.tensor([0.73, 0.27], dtype=torch.float64)  # rewards that differ by 1
for name, q in {
    "its own": p,
    "even": torch.full((2,), 0.5),
    "too sure": torch.tensor([0.95, 0.05]),
}.items():
    crossed = -(p * q.double().log()).sum()
    print(
        f"{name:9} H(p, q) = {crossed:.3f} = {-(p * p.log()).sum():.3f} + {kl(p.log(), q.double().log()):.3f}"
    )

# %% [markdown]
# ## 2. Preferences whose truth is known
# The task: chains of three verbs, worked step by step, without context. The base is sloppy there, it skips steps. The *true reward* r* is four times the share
# of right steps. In life nobody knows r*. Here we do, and can check everything that is built on comparisons alone.

# %%
base, _ = get_base(Config(device="cpu"), "out")
how = RL(steps=40, prompts=16, group=8, max_new=16)
examples, prompts, ids, mask = roll_out(base, heldout(0, 2), replace(how, group=4), 0)
answers = as_lists(ids, mask)
for e, answer, r in zip(examples, answers, gold(examples, answers)):
    print(f"{e.prompt:28} {said(answer):14} r* {r:.2f}   (right: {e.answer})")

# %% [markdown]
# A person sees two such answers and says which is better, with the probability of section 1: even a good answer loses now and then. Pairs that tie
# under r* would be decided by a coin, and are drawn again.

# %%
pairs = preferences(base, 0, 100, words=False)
test = preferences(base, 0, 300, words=True)
for prompt, preferred, other, difference in pairs[:4]:
    asked = WORLD_CHAT.decode(prompt).split("<|user|>")[1].split("<|")[0]
    print(f"{asked:28} {said(preferred):14} over {said(other):14} r* differs by {difference:+.2f}")
wrong = sum(difference < 0 for *_, difference in pairs)
print(f"{wrong} of {len(pairs)} preferences go to the worse answer")

# %% [markdown]
# ## 3. The reward model
# The policy's own body, and one linear head on the state of the last token. It starts at zero: all answers alike, a loss of $\log 2$ a pair.
#
# **Question.** Somebody who knows r* predicts the held-out preferences. How often is he right?

# %%
model = RewardModel(base)
losses = list(fit_reward_model(model, [pair[:3] for pair in pairs], steps=100))
found = judged(model, test)
print(
    f"loss {losses[0]:.3f} → {sum(losses[-10:]) / 10:.3f} on its 100 pairs, "
    f"{found['loss']:.3f} on held-out ones (r* itself: {found['loss of r*']:.3f})"
)
print(f"held-out accuracy {found['accuracy']:.2f}; with r* in hand {found['Bayes accuracy']:.2f}")
assert losses[0] > 0.69 and found["accuracy"] < found["Bayes accuracy"]

# %% [markdown]
# He is right as often as the preferences follow r*, the Bayes rate. The model has memorised its hundred pairs and is overconfident on others: the held-out loss
# says so. With more pairs its *differences* come nearer to those of r* (section 8); its level stays
# anything. This is what everything below will climb.

# %%
many, _, ids, mask = roll_out(base, heldout(0, 32), replace(how, group=64), 1)
drawn = as_lists(ids, mask)
true, guess = gold(many, drawn).view(-1, 64), learned(model)(many, drawn).view(-1, 64)
figure, axis = plt.subplots(figsize=(4.5, 2.8))
axis.plot(true.flatten() + 0.1 * torch.rand(true.numel()), guess.flatten(), ".", markersize=2)
axis.set(xlabel="r* (a little spread out)", ylabel="the model's reward")
centred = [(r - r.mean(1, keepdim=True)).flatten() for r in (true, guess)]
axis.set_title(f"within a prompt: correlation {torch.corrcoef(torch.stack(centred))[0, 1]:.2f}")
plt.show()

# %% [markdown]
# ## 4. What is best, on paper
# max E[r] − β KL(π‖ref). Written for 64 answers of a toy, the optimum is the reference, *tilted*: π* ∝ ref · e^{r/β}, and it earns β log Z.

# %%
log_ref = torch.randn(64, dtype=torch.float64).log_softmax(-1)
r = torch.randn(64, dtype=torch.float64)
star, best = tilted(log_ref, r, beta=0.5)
earned = star.exp() @ r - 0.5 * kl(star, log_ref)
print(f"E[r] − β KL at π*: {earned:.6f}; β log Z: {best:.6f}")
other = torch.randn(64, dtype=torch.float64).log_softmax(-1)
missed = best - (other.exp() @ r - 0.5 * kl(other, log_ref))
print(f"another policy misses {missed:.6f} = β KL(π‖π*) = {0.5 * kl(other, star):.6f}")
assert math.isclose(earned, best, rel_tol=1e-12) and math.isclose(
    missed, 0.5 * kl(other, star), rel_tol=1e-9
)

# %% [markdown]
# COSD is the same objective. Take r = 0 and let the reference be the model that sees C: what is left is −β KL(π‖p(·|x,C)). Or keep the base as the reference and reward
# log p(y|x,C) − log p(y|x): the same again, at β = 1. The teacher *is* a tilted base.
#
# Best-of-N needs no training: draw N answers, keep the best. It has a law, too. **Question.** At the same KL to the reference, who earns more: best-of-N or
# the tilted policy?

# %% tags=["thumbnail"]
ref = log_ref.exp()
curves = {"tilted": [], "best-of-N": []}
for beta in torch.logspace(1.5, -1.5, 60).tolist():
    star, _ = tilted(log_ref, r, beta)
    curves["tilted"].append((kl(star, log_ref), star.exp() @ r))
for n in (1, 2, 4, 8, 16, 32, 64):
    law = best_of_n_law(ref, r, n)
    spent = kl(law.log(), log_ref)
    curves["best-of-N"].append((spent, law @ r))
    assert spent <= math.log(n) - (n - 1) / n + 1e-12
figure, axis = plt.subplots(figsize=(5, 2.8))
for (name, points), style in zip(curves.items(), ("-", "o")):
    axis.plot(*zip(*points), style, label=name)
axis.set(xlabel="KL to the reference, nats", ylabel="E[r]", xlim=(-0.1, 4.2))
axis.legend()
plt.show()

# %% [markdown]
# The tilted one, by its definition as the optimum; but best-of-N is never far, and its KL stays under $\log N - (N-1)/N$, a bound. RAFT is best-of-N and a refit, in rounds:
# with an exact refit, k rounds of best-of-2 are best-of-2^k.

# %%
policy = ref
for _ in range(3):
    policy = best_of_n_law(policy, r, 2)
assert torch.allclose(policy, best_of_n_law(ref, r, 8), atol=1e-14)

# %% [markdown]
# ## 5. Best-of-N under the learned reward
# Back to the model: 64 samples for each of 32 held-out prompts are sorted by the *model's* reward. From one pool, order statistics give every N.
#
# **Question.** As N grows, what will the model's reward do, and what r*?

# %%
order = guess.argsort(1)
columns = {"the model's reward": guess, "r*": true}
figure, axis = plt.subplots(figsize=(5, 2.6))
ns = [2**k for k in range(7)]
for name, values in columns.items():
    ranked = values.gather(1, order).double()
    axis.plot(ns, [(ranked @ best_of_pool(64, n)).mean() for n in ns], "o-", label=name)
axis.set(xlabel="N", xscale="log", ylabel="reward of the one chosen")
axis.legend()
plt.show()

# %% [markdown]
# The model's reward can only rise: it is what is maximised. r* rises with it while the model is right about the better half, then stays behind: at large N the
# winner is, more and more, the answer about which the model errs most in the good direction. Section 8 has it over three draws of preferences.
#
# ## 6. RAFT
# Rounds of best-of-8, and SFT on what was kept.

# %%
reward, test_prompts = learned(model), heldout(0, 48)


def look(policy):
    examples, _, ids, mask = roll_out(policy, test_prompts, replace(how, group=4, seed=9), 0)
    answers = as_lists(ids, mask)
    return gold(examples, answers).mean().item(), reward(examples, answers).mean().item()


prompts_of = lambda step: draw(0, how, step)
student = copy.deepcopy(base)
rounds = replace(how, steps=4, updates=6)
print("          r*   the model's reward\nbefore  %.2f   %+.2f" % look(student))
for i, log in enumerate(raft(student, prompts_of, reward, rounds), 1):
    print(
        f"round {i} {look(student)[0]:.2f}   {look(student)[1]:+.2f}   "
        f"(kept {log['kept']:+.2f} of mean {log['reward']:+.2f})"
    )

# %% [markdown]
# ## 7. RL
# RL raises the probability of each sampled answer by as much as it was better than expected, and lowers it by as much as it was worse. *Expected* is here the mean reward
# of the other answers to the same prompt (RLOO). Four answers, by hand:

# %%
r4 = torch.tensor([1.0, 0.0, 0.0, 1.0])
one_token = torch.ones(4, 1, dtype=torch.bool)
returns = returns_to_go(r4, torch.zeros(4, 1), one_token, beta=0.0)
print("rewards    ", r4.tolist())
print("less others", [round(a, 3) for a in advantages(returns, 4, "rloo")[:, 0].tolist()])
print("GRPO       ", [round(a, 3) for a in advantages(returns, 4, "grpo")[:, 0].tolist()])

# %% [markdown]
# **Question.** All four answers are right. What is learned? Nothing: the advantages are 0, the group is *dead*. GRPO divides by the group's standard deviation, which makes easy and
# hard prompts count alike; `tests/test_rlhf.py` shows by enumeration that RLOO's gradient is exactly that of E[r], and that GRPO's is another one.
#
# The reward belongs to the whole answer; the update goes token by token. With the KL *in the reward*, a token earns −β log(π/ref), the last one r as well, and each
# is held responsible for what comes after it:

# %%
log_ratio = torch.tensor([[0.2, -0.4, 0.6]])
print(returns_to_go(torch.tensor([1.0]), log_ratio, torch.ones(1, 3, dtype=torch.bool), beta=0.5))

# %% [markdown]
# PPO takes several steps from one rollout. The ratio π/π_old tells how far the policy has moved since, and the clip ends the incentive to move further:

# %%
ratio = torch.linspace(0.5, 1.6, 111)
figure, axis = plt.subplots(figsize=(5, 2.4))
for a in (1.0, -1.0):
    gain = [
        -policy_loss(x.log().view(1, 1), torch.zeros(1, 1), torch.full((1, 1), a), one_token[:1])
        for x in ratio
    ]
    axis.plot(ratio, gain, label=f"advantage {a:+.0f}")
axis.axvline(1, color="black", linewidth=0.5)
axis.set(xlabel="π / π_old", ylabel="what is maximised")
axis.legend()
plt.show()

# %% [markdown]
# Now RL against the learned reward: once without a KL, once with β = .1 in the reward. **Question.** Which ends with more of the model's reward, which with more r*?

# %%
paths = {}
for beta in (0.0, 0.1):
    policy = copy.deepcopy(base)
    paths[beta] = [(0.0, *look(policy))]
    for step, log in enumerate(
        reinforce(policy, base, prompts_of, reward, replace(how, beta=beta)), 1
    ):
        if step % 8 == 0:
            paths[beta].append((log["kl"], *look(policy)))
figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharex=True)
for beta, path in paths.items():
    spent, true_r, model_r = zip(*path)
    axes[0].plot(spent, model_r, "o-", label=f"β = {beta}")
    axes[1].plot(spent, true_r, "o-", label=f"β = {beta}")
axes[0].set(xlabel="KL(π‖base), nats per answer", title="the model's reward")
axes[1].set(xlabel="KL(π‖base), nats per answer", title="r*")
axes[0].legend()
plt.show()
assert paths[0.0][-1][0] > paths[0.1][-1][0]

# %% [markdown]
# Without a KL the policy goes where the reward model has never been asked, and is believed there. "The second term prevents the model from deviating too far from the
# distribution on which the reward model is accurate", says the lecture.
#
# Why in the *reward*? A KL added to the loss, token by token, has the right value and the wrong gradient: it forgets that a token also decides which later positions are
# reached. The test file has the missing term and closes the gap to 1e-12.
#
# ## 8. Over-optimisation
# The same with 100 and 1,000 pairs, and more of everything:

# %%
RESULTS = Path("notebooks/results/rlhf")


def picture(name):
    figure, axis = plt.subplots(figsize=(11, 3.6))
    axis.imshow(plt.imread(RESULTS / f"{name}.png"))
    axis.axis("off")
    plt.show()


def tables(name, *which):
    blocks = (RESULTS / f"{name}.md").read_text().split("\n\n")
    found = [block for block in blocks if block.startswith("|")]
    for i in which:
        display(Markdown(found[i]))


picture("over")
tables("over", 0, 3)

# %% [markdown]
# **Question.** With 1,000 pairs the reward model is better by every measure of the first table. Is it safe to climb? What would you watch, if you did not know r*?
#
# ## 9. The perfect state before RL?
# The post ends: COSD "yields the perfect pre-RL state … ready to be further optimized by Reinforcement Learning without the risk of collapse". So: five starts. The base; SFT on solutions; distillation
# from the teacher that sees the solution, off-policy and on-policy (COSD), the latter also with anchors. They learn chains of *two* verbs, until they are equally good at these.
# Then each gets the same RL on chains of *three*, where the reward is 1 if every step is right.
#
# **Question.** What would have to differ in the figure if the claim were true?

# %%
picture("state")
tables("state", 0, 1, 2)

# %% [markdown]
# Tuning on two verbs, by whatever method, saves RL many steps. Read the columns of differences with their intervals: does the *way* of tuning make one that these seeds can
# show? `notebooks/pages/rlhf.md` says what was run, and what else was found: a reward that is hacked, what does not generalise.
#
# ## 10. Contexts that look at the answer
# RL learns from one number per answer. A context can say more, and it may depend on the student's own attempt: "tried rid dir: wrong" (SDPO), a right answer of the same
# group, or only the draft itself, to be read again. The base was first taught to read such contexts. The last rows have a reward, too: PID's OPSD (RL with the teacher that sees the solution
# as reference) and π-Distill.
#
# **Question.** "The own draft" gets no verdict at all. Where does what it teaches come from?

# %%
picture("feedback")
tables("feedback", 0)

# %% [markdown]
# From pretraining: with a draft in context this base is careful, without one it is not. A teacher must know better than its student, not more than the world.
#
# ## 11. Instruction tuning, and two masks
# Where does the model that answers come from? From a base that continues text. In the lecture SFT is drawn as teacher forcing with a *prefix-LM*: the prompt is read in both
# directions, the answer from left to right. Only the mask differs (rows: who looks; columns: what is seen; prompt of four tokens, answer of three):

# %%
figure, axes = plt.subplots(1, 2, figsize=(5, 2.4))
for axis, (name, prompt) in zip(axes, {"decoder": 1, "prefix-LM": 4}.items()):
    visible = PrefixMask(base.config, torch.tensor([prompt]), 7).visible[0]
    axis.imshow(visible, cmap="Greys", vmin=0, vmax=1.6)
    axis.set(title=name, xticks=range(7), yticks=range(7))
    axis.set_xticklabels("xxxxyyy")
    axis.set_yticklabels("xxxxyyy")
plt.show()

# %% [markdown]
# FLAN's question in small: a base that has read "mot reverse tom" in running text is shown *some* verbs as instructions. Does it then follow one that it was never shown as
# an instruction?

# %%
picture("instruct")
tables("instruct", 0)

# %% [markdown]
# ## 12. The angle between two gradients
# cos(v, w) = v·w / |v||w| is at most 1, with equality exactly when v is a positive multiple of w. The post's GEM asks it of two gradients, that of the new task and that of the old
# skills' loss: if the cosine is negative, a small step on the first makes the second worse.

# %%
v, w = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
print(
    f"cos((3, 4), (4, 3)) = 24/25 = {cosine(v, w):.2f}; with 2v: {cosine(v, 2 * v):.2f}; with −v: {cosine(v, -v):.2f}"
)
one_hot = F.one_hot(torch.tensor(0), 3).double()
q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
print(
    f"a one-hot p leaves one term of the cross-entropy: {-(one_hot * q.log()).sum():.4f} = −log .5"
)

# %%
picture("learners")
tables("learners", 2)

# %% [markdown]
# ## Now you
# 1. Fit the reward model of section 3 on 1,000 pairs and run sections 5 and 7 again.
# 2. Reward the last word alone (`rlhf_evidence.last_step`). What does RL learn?
# 3. `kl_in_loss=True` in section 7: which β spends as many nats as .1 does in the reward?
