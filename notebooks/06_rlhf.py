# %% [markdown]
# # 6. From preferences to a policy
#
# This is the lecture's second half in one small model: people compare answers, a reward model learns from the comparisons, and the policy is moved toward what the
# reward model likes. Then comes the post's last claim: is a model that was tuned by COSD the *perfect state* to start this from?
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
import math
from dataclasses import replace
from pathlib import Path

import figures
import torch
import torch.nn.functional as F
from instruct import PrefixMask, cosine
from IPython.display import Markdown, display
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

from contexts import WORLD_CHAT
from cosd import kl
from train import Config, get_base

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

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Nothing: it stays at 0.7311. Divide numerator and denominator by $e^x$, and what is left is $1 / (1 + e^{-(x-y)}) = \sigma(x-y)$. Only the difference counts, so *no amount of
# comparisons can tell the level of a reward*.
#
# </details>

# %% [markdown]
# In the same way $1 - \sigma(z) = \sigma(-z)$: the two answers' probabilities sum to one. The loss of a comparison is the
# cross-entropy of a coin whose outcome was "the first": one-hot, so that a single term $-\log \sigma(r_w - r_l)$ remains.

# %%
z = torch.linspace(-5, 5, 101, dtype=torch.float64)
assert torch.allclose(1 - z.sigmoid(), (-z).sigmoid(), atol=1e-15)
assert torch.allclose(bradley_terry(z, 0 * z), -z.sigmoid().log())
left, right = figures.panels(2, width=8, height=2.5)
figures.lines(
    left, z, {"σ": z.sigmoid()}, legend=False, xlabel="reward of the first less the second"
)
figures.label(left, ylabel="probability: first preferred", title="σ")
figures.lines(right, z, {"loss": bradley_terry(z, 0 * z)}, legend=False, title="−log σ: the loss")
figures.label(right, xlabel="reward of the preferred less the other", ylabel="nats per comparison")

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
# The task is a chain of three verbs, worked step by step, without context. The base is sloppy there: it skips steps. The *true reward* r* is four times the share
# of right steps. In life nobody knows r*. Here we do, and we can check everything that is built on comparisons alone.

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
# The reward model is the policy's own body with one linear head on the state of the last token. The head starts at zero, so that all answers are alike and a pair costs $\log 2$.
#
# **Question.** Somebody who knows r* predicts the held-out preferences. How often are they right? And how often is the model, after 100 comparisons?

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

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# They are right as often as the preferences follow r*: 0.83, the Bayes rate. The model is right in 0.56 of the cases, hardly more than a coin. It has memorised its hundred pairs (loss 0.092) and is overconfident on others: the held-out loss of 1.076
# is above the $\log 2 = 0.693$ of knowing nothing. With more pairs its *differences* come nearer to those of r* (section 8); its level stays arbitrary.
#
# </details>

# %% [markdown]
# This is the reward that everything below will climb. The next figure sets it against r*, for 64 samples of each of 32 prompts.

# %%
many, _, ids, mask = roll_out(base, heldout(0, 32), replace(how, group=64), 1)
drawn = as_lists(ids, mask)
true, guess = gold(many, drawn).view(-1, 64), learned(model)(many, drawn).view(-1, 64)
spread = true.flatten() + 0.1 * torch.rand(true.numel())
figures.scatter(
    spread, guess.flatten(), xlabel="r* (spread out a little)", ylabel="the model's reward"
)
centred = [(r - r.mean(1, keepdim=True)).flatten() for r in (true, guess)]
print(f"within a prompt: correlation {torch.corrcoef(torch.stack(centred))[0, 1]:.2f}")

# %% [markdown]
# ## 4. What is best, on paper
# What is the best policy under max E[r] − β KL(π‖ref)? It is the reference, *tilted*: $\pi^* \propto \mathrm{ref} \cdot e^{r/\beta}$, and it earns $\beta \log Z$, where $Z$ is what makes it sum to one. The cell checks this on a toy with 64 answers.

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
# COSD with reverse KL over whole answers is the same objective. Take r = 0 and let the reference be the model that sees C: what is left is −β KL(π‖p(·|x,C)). Or keep the base as the reference and reward
# log p(y|x,C) − log p(y|x): that is the same again, at β = 1. The teacher *is* a tilted base.
#
# Best-of-N needs no training: draw N answers and keep the best. Its law can be written down, too.
#
# **Question.** At the same KL to the reference, which of the two earns more: best-of-N or
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
tilted_curve, points = (list(zip(*curves[name])) for name in ("tilted", "best-of-N"))
axis = figures.panels(width=5.5)
figures.lines(axis, None, {"tilted policy": tuple(tilted_curve)}, xlim=(-0.1, 4.2))
axis.plot(*points, "o", color="#D55E00", label="best-of-N, N = 1, 2, 4 … 64")
figures.label(axis, xlabel="KL to the reference, nats per answer", ylabel="E[r]")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The tilted one, by its definition as the optimum; but best-of-N is never far behind, and its KL stays under the bound $\log N - (N-1)/N$.
#
# </details>

# %% [markdown]
# RAFT is best-of-N and a refit, in rounds. With an exact refit, k rounds of best-of-2 are best-of-2^k:

# %%
policy = ref
for _ in range(3):
    policy = best_of_n_law(policy, r, 2)
assert torch.allclose(policy, best_of_n_law(ref, r, 8), atol=1e-14)

# %% [markdown]
# ## 5. Best-of-N under the learned reward
# Back to the model. The 64 samples for each of 32 held-out prompts are sorted by the *model's* reward; from one such pool, order statistics give the result for every N.
#
# **Question.** As N grows, what will the model's reward do, and what r*?

# %%
order = guess.argsort(1)
columns = {"the model's reward": guess, "r*": true}
ns, chosen = [2**k for k in range(7)], {}
for name, values in columns.items():
    ranked = values.gather(1, order).double()
    chosen[name] = [(ranked @ best_of_pool(64, n)).mean().item() for n in ns]
axis = figures.panels()
figures.lines(axis, ns, chosen, markers=True, scale="log linear", xlabel="N, answers drawn")
figures.label(axis, ylabel="reward of the one chosen", xticks=ns, xticklabels=ns)
axis.minorticks_off()
print({name: [round(value, 2) for value in values] for name, values in chosen.items()})

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The model's reward can only rise, since it is what is maximised: from −0.37 to 2.75. r* rises too, but little and then no more: from 0.98 to 1.29 at N = 32 and 64. The larger N is, the more the winner is the answer about which the model errs most in the good direction.
# Section 8 has the same over three draws of preferences and up to N = 256, where r* falls again.
#
# </details>

# %% [markdown]
# ## 6. RAFT
# RAFT repeats two things: best-of-8 for each prompt, and SFT on what was kept.
#
# **Question.** Both rewards are measured after each round. Will they go on rising together?

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

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# For a while. The model's reward rises in every round, from −0.43 to +1.05. r* rises from 0.96 to 1.35 in the third round and to 1.34 in the fourth: it has stopped. Ten rounds, as in section 8, bring it down to less than it was at the beginning.
#
# </details>

# %% [markdown]
# ## 7. RL
# RL raises the probability of each sampled answer by as much as it was better than expected, and lowers it by as much as it was worse. *Expected* is here the mean reward
# of the other answers to the same prompt (RLOO). Here are four answers to one prompt.
#
# **Question.** Two of them are right. What would be learned if all four were?

# %%
r4 = torch.tensor([1.0, 0.0, 0.0, 1.0])
one_token = torch.ones(4, 1, dtype=torch.bool)
returns = returns_to_go(r4, torch.zeros(4, 1), one_token, beta=0.0)
print("rewards    ", r4.tolist())
print("less others", [round(a, 3) for a in advantages(returns, 4, "rloo")[:, 0].tolist()])
print("GRPO       ", [round(a, 3) for a in advantages(returns, 4, "grpo")[:, 0].tolist()])

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Nothing: all advantages would be 0, and the group would be *dead*. GRPO divides by the group's standard deviation, which makes easy and
# hard prompts count alike; `tests/test_rlhf.py` shows by enumeration that RLOO's gradient is exactly that of E[r], and that GRPO's is another one.
#
# </details>

# %% [markdown]
# The reward belongs to the whole answer, but the update goes token by token. With the KL *in the reward*, each token earns −β log(π/ref), the last one earns r as well, and each
# is held responsible for what comes after it. For an answer of three tokens with r = 1 and β = 0.5:

# %%
log_ratio = torch.tensor([[0.2, -0.4, 0.6]])
returns = returns_to_go(torch.tensor([1.0]), log_ratio, torch.ones(1, 3, dtype=torch.bool), 0.5)
print("log(π/ref) of the tokens:", [round(v, 2) for v in log_ratio[0].tolist()])
print("what each is credited with:", [round(v, 2) for v in returns[0].tolist()])

# %% [markdown]
# PPO takes several steps from one rollout. The ratio π/π_old tells how far the policy has moved since, and the clip ends the incentive to move further. The figure shows what is maximised for one token, against this ratio.

# %%
ratio = torch.linspace(0.5, 1.6, 111)
gains = {}
for a in (1.0, -1.0):
    advantage = torch.full((1, 1), a)
    losses = [
        policy_loss(x.log().view(1, 1), torch.zeros(1, 1), advantage, one_token[:1]) for x in ratio
    ]
    gains[f"advantage {a:+.0f}"] = [-loss for loss in losses]
axis = figures.panels(height=2.5)
figures.lines(axis, ratio, gains, xlabel="ratio π / π_old")
figures.label(axis, ylabel="objective, in units of reward")

# %% [markdown]
# Now RL runs against the learned reward: once without a KL, once with β = .1 in the reward.
#
# **Question.** Which of the two ends with more of the model's reward, and which with more r*?

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
found = {f"β = {beta}": list(zip(*path)) for beta, path in paths.items()}
left, right = figures.panels(2, width=8.5, height=2.7, sharex=True)
of_model = {name: (spent, model_r) for name, (spent, _, model_r) in found.items()}
of_truth = {name: (spent, true_r) for name, (spent, true_r, _) in found.items()}
figures.lines(left, None, of_model, markers=True, title="the model's reward", ylabel="reward")
figures.lines(right, None, of_truth, markers=True, title="r*", ylabel="reward")
for axis in (left, right):
    axis.set_xlabel("KL(π‖base), nats per answer")
for name, (spent, true_r, model_r) in found.items():
    print(f"{name}: at the end KL {spent[-1]:.1f}, the model's reward {model_r[-1]:.2f}, ", end="")
    print(f"r* {true_r[-1]:.2f} (at its best {max(true_r):.2f})")


# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Without a KL the policy earns more of the model's reward (1.80 against 1.54) and less of the true one (0.90 against 1.20, after 1.32 and 1.34 on the way), at 5.0 nats against 2.7. It goes where the reward model has never been asked, and is believed there. "The second term prevents the model from deviating too far from the
# distribution on which the reward model is accurate", says the lecture.
#
# </details>

# %% tags=["answer"]
assert paths[0.0][-1][0] > paths[0.1][-1][0]

# %% [markdown]
# Why in the *reward*? A KL added to the loss, token by token, has the right value and the wrong gradient: it forgets that a token also decides which later positions are
# reached. The test file has the missing term and closes the gap to 1e-12.
#
# ## 8. Over-optimisation
# Here is the same with 100 and with 1,000 pairs, over three draws of preferences and more steps.
#
# **Question.** With 1,000 pairs the reward model is more accurate, and its reward correlates better with r* (first table). Is it then safe to climb? What would you watch, if you did not know r*?

# %%
RESULTS = Path("notebooks/results/rlhf")


def tables(name, *which):
    blocks = (RESULTS / f"{name}.md").read_text().split("\n\n")
    found = [block for block in blocks if block.startswith("|")]
    for i in which:
        display(Markdown(found[i]))


figures.picture(RESULTS / "over.png", 3.6)
tables("over", 0, 3)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# It is not. RL without a KL first raises r* to 1.63 and then ends at 0.82, below where it began (0.97); with 100 pairs it peaks at 1.43 and ends at 0.99. Ten times the pairs give a higher peak, and no safety. With β = .1 it ends at 1.54 with 1,000 pairs and at 1.23 with 100; RAFT falls to 0.41 in both.
# Without r* one can watch the KL that has been spent, the reward under a second model that was fitted on other comparisons, and the answers themselves.
#
# </details>

# %% [markdown]
# ## 9. The perfect state before RL?
# The post ends with the claim that this approach yields the "Perfect Pre-RL State", a model "ready to be further optimized by Reinforcement Learning without the risk of collapse". The experiment compares five starts: the base; SFT on solutions; distillation
# from the teacher that sees the solution, off-policy and on-policy (COSD); and COSD with anchors. They learn chains of *two* verbs, until they are about equally good at these.
# Then each gets the same RL on chains of *three*, where the reward is 1 if every step is right.
#
# **Question.** What would have to differ in the figure if the claim were true?

# %%
figures.picture(RESULTS / "state.png", 3.6)
tables("state", 0, 1, 2)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# COSD's curves would have to lie above the others by more than the seeds vary, and the other starts would have to collapse. The first is not shown, the second does not happen. Tuning on two verbs, by whatever method, saves RL many steps: 32 to 43 instead of 63 to reach .5. COSD's curves do lie a little higher, on average:
# it needs 10.36 steps less than SFT, ± 14.69, and ends .07 higher, ± .11; five seeds cannot tell that from nothing. No start collapses: the old skills lost are .004 to .009. And COSD is not closer to the base before RL, as "mathematically anchored" would have it: it is at 3.31 nats, SFT at 2.63.
# `notebooks/pages/rlhf.md` says what was run and what else was found: a reward that is hacked, and what does not generalise.
#
# </details>

# %% [markdown]
# ## 10. Contexts that look at the answer
# RL learns from one number per answer. A context can say more, and it may depend on the student's own attempt: "tried rid dir: wrong" (SDPO), a right answer of the same
# group, or only the draft itself, to be read again. The base was first taught to read such contexts. The last two rows of the table have a reward, too: PID's OPSD (RL with the teacher that sees the solution
# as reference) and π-Distill. Each row has three seeds.
#
# **Question.** "The own draft" gets no verdict at all. Where does what it teaches come from?

# %%
figures.picture(RESULTS / "feedback.png", 3.6)
tables("feedback", 0)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# It comes from pretraining: with a draft in context this base is careful (.77 right, ± .52 over three seeds), without one it is not. The student goes from .04 to .67 of the three-verb chains, as with the verdict. A teacher must know better than its student, not more than the world.
#
# </details>

# %% [markdown]
# ## 11. Instruction tuning, and two masks
# The model that answers comes from a base that continues text. In the lecture SFT is drawn as teacher forcing with a *prefix-LM*: the prompt is read in both
# directions, the answer from left to right. Only the mask differs from that of a decoder. In the figure x is a prompt of four tokens, y an answer of three, and dark is what may be seen.

# %%
begins = {"decoder": 1, "prefix-LM": 4}  # how many tokens are seen in both directions
visible = {
    name: PrefixMask(base.config, torch.tensor([n]), 7).visible[0] for name, n in begins.items()
}
figures.masks(visible)

# %% [markdown]
# FLAN's question in small: a base that has read "mot reverse tom" in running text is shown *some* verbs as instructions.
#
# **Question.** Does it then follow a verb that it was never shown as an instruction? Does it help to have seen more of the others?

# %%
figures.picture(RESULTS / "instruct.png", 3.6)
tables("instruct", 0)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Sometimes, and the more, the more it has seen: for the decoder 0.00 after no family and 0.49 ± 0.50 after four, for the prefix-LM 0.00 and 0.42 ± 1.29. In between it depends on the seed (0.39 ± 1.32 and 0.44 ± 1.27 after two): which verb is left out, and which are shown. So variety helps, as FLAN found, and three seeds do not tell the masks apart.
#
# </details>

# %% [markdown]
# ## 12. The angle between two gradients
# cos(v, w) = v·w / (|v| |w|) is at most 1, with equality exactly when v is a positive multiple of w. The post's GEM asks for the cosine of two gradients, that of the new task and that of the old
# skills' loss: if it is negative, a small step on the first makes the second worse. (The second line that is printed belongs to section 1: with a one-hot label only one term of the cross-entropy remains.)

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

# %% [markdown]
# **Question.** In the figure's runs on chains of three verbs, will the two gradients point against each other?

# %%
figures.picture(RESULTS / "learners.png", 3.6)
tables("learners", 2)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Hardly: over three seeds every interval in the table includes zero, and most means are nearly a right angle. By this measure the new task neither clearly helps nor hurts the old skills to first order; what is lost comes from the sum of many steps.
#
# </details>


# %% [markdown]
# ## Now you
# 1. Fit the reward model of section 3 on 1,000 pairs and run sections 5 and 7 again.
# 2. Reward the last word alone (`rlhf_evidence.last_step`). What does RL learn?
# 3. Set `kl_in_loss=True` in section 7. Which β spends as many nats as .1 does in the reward?

# %% [markdown] tags=["answer"]
# <details><summary>Answers</summary>
#
# 1. The second table of section 8 has both: at 1,000 pairs the peak of r* is higher, and without a KL it is followed by a fall all the same.
# 2. `notebooks/results/rlhf/hacking.md` has three seeds: right last words rise from 0.16 to 0.39, answers whose every step is right only from 0.02 to 0.12 ± 0.30. Most of what is earned is a last word that wrong steps led to, or a guess.
# 3. Find it by halving and doubling β. The two are not the same objective: a KL that is added to the loss token by token forgets that a token also decides which later positions are reached.
#
# </details>
