# %% [markdown]
# # 1. Divergences
#
# A student is moved toward a teacher. *How far apart are they?* has three answers here, and the one that you minimise decides what the
# student becomes. Everything is computed by `cosd.py`: functions of logits, whose arguments are always `(student, teacher)` and whose results are in nats.
#
# | in the post and the lecture | formula | function | section |
# |---|---|---|---|
# | lecture: entropy and cross-entropy | $H(p, q) = H(p) + D_{KL}(p \,\Vert\, q)$ | `cross_entropy` | 2 |
# | post 4.2: forward KL, "SFT standard" | $D_{KL}(P \,\Vert\, Q)$ | `forward_kl` | 1, 3–7 |
# | post 4.2: reverse KL, "on-policy standard" | $D_{KL}(Q \,\Vert\, P)$ | `reverse_kl` | 1, 3–7 |
# | post 4.2, implementation note: JSD | $\beta D_{KL}(P \Vert M) + (1-\beta) D_{KL}(Q \Vert M)$ | `jsd` | 1, 3–7 |
# | its parameter $\beta$ in GKD | | `jsd(..., beta)` | 8 |
# | reverse KL from sampled tokens | $r = \log Q(y) - \log P(y)$ | `k1`, `k2`, `k3`, `policy_gradient_surrogate` | 9 |
# | OPCD's top-k | | `top_k_divergence` | 11 |
#
# Throughout, $P$ is the teacher (the lecture's $p$) and $Q$ the student ($q$). Only toy students are trained here, so no pretrained base is needed.
#
# **How to read these notebooks.** Each question stands before the cell that answers it. Write down your prediction, run the cell, and then unfold the answer.
# In all figures forward KL is blue and solid, reverse KL orange and dashed, JSD green and dash-dotted.

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
import math

import figures
import torch
import torch.nn.functional as F

from cosd import (
    cross_entropy,
    forward_kl,
    jsd,
    k1,
    k2,
    k3,
    kl,
    log_softmax_pair,
    policy_gradient_surrogate,
    reverse_kl,
    top_k_divergence,
)

THREE = {"forward KL": forward_kl, "reverse KL": reverse_kl, "JSD": jsd}
_ = torch.manual_seed(0)

# %% [markdown]
# ## 1. The lecture's example
# Two models predict the next word. Their divergence, calculated by hand:

# %%
words = ["mat", "floor", "chair"]
P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)  # the lecture's P: the teacher
Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # the lecture's Q: the student
by_hand = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.2)
print(f"KL(P‖Q) by hand: {by_hand:.4f} nats")

# %% [markdown]
# The function gives the same number. (Log-probabilities are logits too: their softmax is the distribution itself.)
#
# **Question.** Is KL(Q‖P), the other direction, the same number?

# %%
for name, divergence in THREE.items():
    print(f"{name:11}{divergence(Q.log(), P.log()):.4f} nats")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# No: 0.0851 nats in one direction, 0.0920 in the other. A KL is not a distance. JSD at $\beta = ½$ is symmetric, and much smaller (0.0219), because each side
# is compared with their mixture, which is close to both.
#
# </details>

# %% [markdown]
# The two KLs differ in who is averaged over. Each sum is an expectation, and an expectation can be sampled:
#
# | | as a sum | as an expectation | in the lecture's words |
# |---|---|---|---|
# | forward KL | $\sum_y P(y) \log \frac{P(y)}{Q(y)}$ | $\mathbb{E}_{y \sim P}\big[\log \frac{P(y)}{Q(y)}\big]$ | "You sample from the teacher, then ask: Can you imitate the teacher everywhere?" |
# | reverse KL | $\sum_y Q(y) \log \frac{Q(y)}{P(y)}$ | $\mathbb{E}_{y \sim Q}\big[\log \frac{Q(y)}{P(y)}\big]$ | "You sample from the student, then ask: Where you already speak, can you adjust slightly?" |
#
# The lecture writes them $\mathbb{E}_{x \sim p}[\log p/q]$ and $\mathbb{E}_{x \sim q}[\log q/p]$.

# %%
for name, mine, other in [("E_P[log P/Q]", P, Q), ("E_Q[log Q/P]", Q, P)]:
    y = torch.multinomial(mine, 100_000, replacement=True)
    log_ratio = torch.log(mine / other)[y]
    exact = torch.xlogy(mine, mine / other).sum()
    print(f"{name}: the sum gives {exact:.4f}, 100,000 samples {log_ratio.mean():.4f} nats")

# %% [markdown]
# Word by word: a term is positive where the one who is averaged over is the likelier of the two, and negative elsewhere. Single terms may be negative, but
# their sum never is (Gibbs' inequality).

# %%
terms = {"forward KL": torch.xlogy(P, P / Q), "reverse KL": torch.xlogy(Q, Q / P)}
left, right = figures.panels(2, width=8, height=2.6)
predictions = {"teacher P": P, "student Q": Q}
figures.bars(left, words, predictions, ylabel="probability", title="two predictions")
summed = {f"{name}: {term.sum():.4f}": term for name, term in terms.items()}
figures.bars(right, words, summed, ylabel="nats", title="what each word contributes")

# %% tags=["answer"]
# Checks: the functions are the formulas.
M = (P + Q) / 2
assert math.isclose(forward_kl(Q.log(), P.log()), terms["forward KL"].sum(), rel_tol=1e-12)
assert math.isclose(reverse_kl(Q.log(), P.log()), terms["reverse KL"].sum(), rel_tol=1e-12)
to_middle = forward_kl(M.log(), P.log()), forward_kl(M.log(), Q.log())
assert math.isclose(jsd(Q.log(), P.log()), sum(to_middle) / 2, rel_tol=1e-12)

# %% [markdown]
# ## 2. Entropy, cross-entropy, and why SFT is forward KL
# $H(p, q) = H(p) + D_{KL}(p \,\Vert\, q)$. The entropy $H(p)$ does not depend on the student, so minimising the cross-entropy *is* minimising forward KL.

# %%
entropy = torch.special.entr(P).sum()
crossed = F.cross_entropy(Q.log(), P)  # PyTorch also takes a distribution as the label
excess = forward_kl(Q.log(), P.log())
print(f"H(P) {entropy:.4f} + KL(P‖Q) {excess:.4f} = H(P, Q) {crossed:.4f} nats")
assert torch.isclose(crossed, entropy + excess, rtol=1e-12)

# %% [markdown]
# Let the student say "mat" with probability $q$ and share out the rest as the teacher does. The floor is $H(P)$, whatever the student does; all
# that it can remove is the KL on top.

# %%
q = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
students = torch.cat([q[:, None], (1 - q)[:, None] * P[1:] / P[1:].sum()], dim=1)  # (97, 3)
above = forward_kl(students.log(), P.log().expand(97, 3))
axis = figures.panels(height=2.6)
names = ["entropy H(P)", "KL(P‖Q)", "cross-entropy H(P, Q)"]
figures.stack(axis, q, entropy.expand(97), above, names, ylim=(0, 3))
figures.label(axis, xlabel="student's probability of “mat”", ylabel="nats")

# %% [markdown]
# SFT knows no $P$, only the one word that the expert wrote. Its $P$ is one-hot, $H(P) = 0$, and the loss is $-\log Q(\text{word})$: forward KL
# from a teacher who is always certain.

# %%
for i, word in enumerate(words):
    one_hot = F.one_hot(torch.tensor(i), 3).double()
    sft = cross_entropy(Q.log()[None], None, torch.tensor([i]))[0]
    to_one_hot = forward_kl(Q.log(), one_hot.log())
    print(f"expert wrote {word:6} SFT loss {sft:.4f} = −log {Q[i]:.1f}", end=" ")
    print(f"= KL(one-hot‖Q) {to_one_hot:.4f}")
    assert math.isclose(sft, to_one_hot, rel_tol=1e-6)

# %% [markdown]
# ## 3. The whole picture with two words
# With two words one number describes each model: the teacher says "yes" with probability $p$, the student with $q$.
#
# **Question.** Along which edges of the square does each divergence blow up, and which one never does?

# %%
grid = torch.linspace(0.002, 0.998, 250, dtype=torch.float64)
p, q = torch.meshgrid(grid, grid, indexing="ij")  # (250, 250)


def two(a):
    return torch.stack([a, 1 - a], dim=-1).log()  # log-probabilities of yes and no


maps = {name: divergence(two(q), two(p)) for name, divergence in THREE.items()}
figures.two_word_maps(grid, maps)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Forward KL punishes a student who rules out what the teacher says: it blows up at the left and right edges. Reverse KL punishes a student who says what the
# teacher rules out: it blows up at the bottom and the top. JSD stays below log 2 = 0.69 nats everywhere.
#
# </details>

# %% tags=["answer"]
assert maps["JSD"].max() < math.log(2) < maps["forward KL"].max()
assert torch.allclose(maps["JSD"], maps["JSD"].T)  # symmetric at β = ½; the KLs are not

# %% [markdown]
# ## 4. Mode covering and mode seeking
# The teacher has two modes. The student is a single Gaussian with a mean μ and a width σ, so it *cannot* match the teacher. What it does instead
# depends on the divergence. The figure shows the landscape over its two parameters, with gradient descent from two starting points.
#
# **Question.** Where will each of the three students end: on the left mode, on the right one, or across both?

# %%
x = torch.linspace(-6, 6, 121, dtype=torch.float64)


def bump(mean, width):
    return (-(((x - mean) / width) ** 2) / 2).softmax(-1)


def student_logits(mu, log_sigma):
    return -(((x - mu[..., None]) / log_sigma[..., None].exp()) ** 2) / 2  # (..., 121)


def descend(divergence, teacher, start, steps=1000):
    at = torch.tensor(start, dtype=torch.float64, requires_grad=True)  # (μ, log σ)
    optimizer, path = torch.optim.Adam([at], lr=0.05), []
    for _ in range(steps):
        path.append(at.detach().clone())
        optimizer.zero_grad()
        divergence(student_logits(*at), teacher.log()).backward()
        optimizer.step()
    return torch.stack(path)  # (steps, 2)


def fit(divergence, teacher, start, steps=1000):
    return student_logits(*descend(divergence, teacher, start, steps)[-1]).softmax(-1)


# %% tags=["thumbnail"]
teacher = 0.55 * bump(-2.5, 0.6) + 0.45 * bump(2.5, 0.6)  # (121,)
STARTS = [(-1.0, math.log(0.5)), (1.0, math.log(0.5))]  # narrow, left or right of the middle
means, log_widths = torch.linspace(-5, 5, 101), torch.linspace(math.log(0.3), math.log(5), 81)
mu, log_sigma = torch.meshgrid(means, log_widths, indexing="ij")
everywhere, paths, landscapes = student_logits(mu, log_sigma), {}, {}
for name, divergence in THREE.items():
    landscapes[name] = divergence(everywhere, teacher.log().expand_as(everywhere))
    paths[name] = [descend(divergence, teacher, start) for start in STARTS]
fits = {name: [student_logits(*path[-1]).softmax(-1) for path in paths[name]] for name in THREE}
figures.descents(x, teacher, mu, log_sigma.exp(), landscapes, paths, fits)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Dark is low. Forward KL has one valley: the student must cover both modes and puts much of its mass between them, where the teacher says next to
# nothing. Reverse KL has a deep valley at each mode: the student takes the one that it started near and drops the other. JSD has those two valleys and a
# shallow one that covers both, so it lies between the two KLs.
#
# </details>

# %% [markdown]
# For forward KL the answer is known without descending: the best Gaussian has the teacher's mean and variance.


# %%
def moments(probability):
    mean = (probability * x).sum()
    return torch.stack([mean, (probability * (x - mean) ** 2).sum().sqrt()])


between = (x > -1) & (x < 1)
for name, students in ({"teacher": [teacher]} | fits).items():
    for student in students:
        mean, width = moments(student)
        mass = student[between].sum()
        print(f"{name:11} mean {mean:5.2f}  width {width:.2f}  mass between the modes {mass:.3f}")

# %% tags=["answer"]
assert all(torch.allclose(moments(f), moments(teacher), atol=2e-3) for f in fits["forward KL"])
assert fits["reverse KL"][0][x < 0].sum() > 0.99 and fits["reverse KL"][1][x > 0].sum() > 0.99

# %% [markdown]
# ### Moving the modes apart
# Below, the distance between the modes grows from panel to panel. All three students start at the left mode.
#
# **Question.** From which distance on, in widths of a mode, do the students become different?

# %%
distances = [1, 2, 3, 4, 5, 6]  # in widths of a mode
teachers = [0.55 * bump(-0.3 * d, 0.6) + 0.45 * bump(0.3 * d, 0.6) for d in distances]
made = []
for d, moved in zip(distances, teachers):
    starts = [(side * 0.3 * d, math.log(0.5)) for side in (-1, 1)]
    made.append({name: fit(THREE[name], moved, starts[0]) for name in THREE})
    ends = [moments(fit(reverse_kl, moved, start))[0] for start in starts]
    valleys = 1 if abs(ends[0] - ends[1]) < 0.05 else 2
    lost = {name: moved[student < moved / 10].sum() for name, student in made[-1].items()}
    print(
        f"distance {d}: valleys of reverse KL: {valleys}; teacher's mass that is all but lost: "
        + ", ".join(f"{name} {share:.2f}" for name, share in lost.items())
    )
figures.strip(x, teachers, made, [f"{d} width{'s' * (d > 1)} apart" for d in distances])

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Up to 4 widths all three students cover both modes, and nearly agree: while the modes overlap, one wide Gaussian is a good match. At 5 widths reverse KL has let go of one mode (.42 of the
# teacher's mass is all but lost); at 6 JSD has done the same. Forward KL covers at any distance, however empty the middle is. So "mode seeking" is not a property of reverse KL alone, but of
# reverse KL *and* a teacher that the student cannot match.
#
# </details>

# %% [markdown]
# ### The same with words
# The student writes two letters, each without looking at the other: it has no capacity for more. The teacher says "to" or "ot" and hardly anything else.
#
# **Question.** What does each student write?

# %%
letters = "otm"
joint = torch.full((3, 3), 0.01, dtype=torch.float64)
joint[1, 0], joint[0, 1] = 0.55, 0.38  # "to", "ot"


def pair(at):  # log Q(first) + log Q(second)
    return at[0].log_softmax(-1)[:, None] + at[1].log_softmax(-1)  # (3, 3)


shown, nonsense = {"teacher": joint}, joint < 0.1
for name, divergence in THREE.items():
    at = torch.tensor([[0.0, 0.1, 0.0], [0.1, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([at], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        divergence(pair(at).flatten(), joint.log().flatten()).backward()
        optimizer.step()
    shown[name] = pair(at).exp().detach()
figures.word_tables(letters, shown, nonsense)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Forward KL gets the frequency of each letter right and half of the words wrong: "oo" and "tt" are the post's *void regions*. Reverse KL commits to one word
# and never learns that there were two. This trade exists only where the student cannot match the teacher. Where it can, all
# three divergences have their minimum, 0, at $Q = P$.
#
# </details>

# %% tags=["answer"]
assert torch.allclose(shown["forward KL"], joint.sum(1)[:, None] * joint.sum(0), atol=1e-3)
assert shown["forward KL"][nonsense].sum() > 0.4 > 0.1 > shown["reverse KL"][nonsense].sum()

# %% [markdown]
# ## 5. Gradients, checked
# The docstrings in `cosd.py` give each gradient with respect to the student's logits. Autograd agrees:

# %%
student, other = torch.randn(2, 1000, dtype=torch.float64)
student.requires_grad_()
log_q, log_p = log_softmax_pair(student.detach(), other)
q, p = log_q.exp(), log_p.exp()
log_m = ((p + q) / 2).log()
formulas = {
    "forward KL": q - p,
    "reverse KL": q * (log_q - log_p - kl(log_q, log_p)),
    "JSD": 0.5 * q * (log_q - log_m - kl(log_q, log_m)),
}
for name, divergence in THREE.items():
    (gradient,) = torch.autograd.grad(divergence(student, other), student)
    assert torch.allclose(gradient, formulas[name], rtol=1e-9, atol=1e-14)
    print(f"{name:11} the gradient is the one in the docstring")

# %% [markdown]
# ## 6. Gradients, drawn
# All students over three words form a triangle; the teacher is the star. An arrow shows what a small gradient step *on the logits* does to the
# student's probabilities, $\Delta Q = -(\mathrm{diag}\,Q - QQ^\top)\,\nabla$.
#
# **Question.** A student in the corner of "chair" or "floor" is certain of the wrong word. Does it get out?

# %%
corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)


def students_in_triangle(n, margin):
    a, b = torch.meshgrid(torch.arange(n + 1), torch.arange(n + 1), indexing="ij")
    inside = torch.stack([a, b, n - a - b], dim=-1)[a + b <= n].double() / n  # (·, 3)
    return inside * (1 - 3 * margin) + margin


fine, coarse = students_in_triangle(80, 0.003), students_in_triangle(12, 0.02)
star = P.tolist()  # the teacher

# %%
log_star = torch.tensor(star).double().log()
colours, steps = {}, {}
for name, divergence in THREE.items():
    value = divergence(fine.log(), log_star.expand_as(fine))
    print(f"{name:11} infinite for {value.isinf().sum()} of {len(value)} students")
    colours[name] = value.clamp(max=9).sqrt()
    logits = coarse.log().requires_grad_()
    value = divergence(logits, log_star.expand_as(logits))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    gradient[value.isinf()] = 0  # an infinite divergence points nowhere
    steps[name] = -coarse * (gradient - (coarse * gradient).sum(-1, keepdim=True))
scales = {"forward KL": 2.2, "reverse KL": 2.2, "JSD": 0.5}
figures.triangles(words, corners, log_star.exp(), fine, colours, coarse, steps, scales)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Very slowly. (The shade is the square root of the divergence; JSD's arrows are drawn 4.4 times longer.) Along the edges the arrows shrink for all three,
# because a softmax moves little where probabilities are small. The next section looks at the gradient alone, and there the three differ.
#
# </details>

# %% [markdown]
# ## 7. A confident student
# The student gives the right word the probability $\varepsilon$ and is certain of another.
#
# **Question.** As $\varepsilon$ goes to 0, whose gradient still pulls?

# %%
epsilon = torch.logspace(-8, -0.4, 60, dtype=torch.float64)
confident = torch.stack([epsilon, 1 - 1.5 * epsilon, epsilon / 2], dim=-1).log().requires_grad_()
norms = {}
for name, divergence in THREE.items():
    value = divergence(confident, P.log().expand_as(confident)).sum()
    norms[name] = torch.autograd.grad(value, confident)[0].norm(dim=-1)
    print(f"{name:11} norm of the gradient at ε = 1e-8: {norms[name][0]:.1e}")
axis = figures.panels(height=2.8)
figures.lines(axis, epsilon, norms, scale="log log", xlabel="ε, the right word's probability")
figures.label(axis, ylabel="norm, nats per unit of logit", title="norm of the gradient")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Only forward KL's, whose gradient is $Q - P$: its norm stays at 1.1. Reverse KL's and JSD's gradients are multiplied by $Q$ and vanish with it (3.6e-7 and 1.6e-7 at $\varepsilon = 10^{-8}$): the
# student never says the word, so nothing tells it that it should. This is one reason why this project's default is forward KL on the student's own samples.
#
# </details>

# %% tags=["answer"]
assert norms["forward KL"][0] > 0.5 and max(norms["reverse KL"][0], norms["JSD"][0]) < 1e-6

# %% [markdown]
# ## 8. The β trap
# $JSD_\beta$ weighs the two sides by β. In GKD and the libraries after it, one parameter β also stands for forward KL at 0 and for reverse KL at 1.
#
# **Question.** Is that where the formula goes?

# %%
student, other = torch.tensor([[4.0, 0, 0], [0, 4.0, 1]], dtype=torch.float64)
beta = torch.linspace(0.001, 0.999, 500)
values = torch.stack([jsd(student, other, b.item()) for b in beta])
ends = {name: THREE[name](student, other) for name in ("forward KL", "reverse KL")}
figures.beta_trap(beta, values, ends)
print(f"β = 0.001: {values[0]:.4f} nats by the formula; GKD's β = 0: {ends['forward KL']:.4f} nats")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# No: the formula goes to 0 at both ends (0.0037 nats at β = 0.001), while GKD's β = 0 is forward KL, 3.6931 nats. Only after division by its weight does the formula tend to the two KLs.
# So two settings that look alike are two losses that are not: a learning rate that suits one does nothing, or far too much, under the other.
#
# </details>

# %% tags=["answer"]
small = 1e-7
assert math.isclose(jsd(student, other, small) / small, ends["forward KL"], rel_tol=1e-4)
assert math.isclose(jsd(student, other, 1 - small) / small, ends["reverse KL"], rel_tol=1e-4)

# %% [markdown]
# In this project the two ends are errors:

# %%
try:
    jsd(student, other, beta=0)
except ValueError as error:
    print(error)

# %% [markdown]
# ### What β does to a student
# Back to the teacher of section 4, with its two modes. Because JSD can have several valleys, each student starts from five places and the best one is shown.
#
# **Question.** As β grows from 0 to 1, does the student move from seeking to covering, or the other way round?

# %%
betas = [0.01, 0.2, 0.4, 0.45, 0.5, 0.99]
best_fits = []
for b in betas:
    starts = [(m, s) for m in (-2.5, 2.5) for s in (-0.5, 0.5)] + [(0.0, 1.0)]
    students = [fit(lambda s, t, b=b: jsd(s, t, b), teacher, start, 600) for start in starts]
    losses = [jsd(student.log(), teacher.log(), b).item() for student in students]
    best_fits.append({"JSD": students[losses.index(min(losses))]})
    mean, width = moments(best_fits[-1]["JSD"])
    print(f"β = {b:4}: mean {mean:5.2f}, width {width:.2f}")
figures.strip(x, [teacher] * len(betas), best_fits, [f"β = {b}" for b in betas])

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# From covering to seeking, and it jumps: up to β = 0.4 the best student covers both modes (width 2.55), from β = 0.45 on it sits on the left mode. Near β = 0, $JSD_\beta$ is β times
# forward KL, near 1 it is (1 − β) times reverse KL, as in the right panel of the figure before, and the students are those of the two KLs.
#
# </details>

# %% [markdown]
# ## 9. Estimates from one token
# With a big vocabulary, or through an API, one may know only the probabilities of the token $y$ that the student sampled: $r = \log Q(y) - \log P(y)$. Three
# estimators of reverse KL are $k_1 = r$, $k_2 = r^2/2$ and $k_3 = e^{-r} - 1 + r$. Because the vocabulary is small here, their mean and spread can be summed
# exactly, over all $y$ weighted by $Q(y)$.
#
# **Question.** $k_1$ is the definition itself. Why would anyone want another one?

# %%
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
start, direction = torch.randn(2, 500, dtype=torch.float64)
print("distance   exact KL" + "".join(f"{name + ' mean':>11}{'± std':>8}" for name in ESTIMATORS))
for distance in [0.1, 0.5, 1.0, 2.0]:
    log_q, log_p = log_softmax_pair(start, start + distance * direction)
    line = f"{distance:8.1f}{reverse_kl(log_q, log_p):11.4f}"
    for estimator in ESTIMATORS.values():
        values = estimator(log_q, log_p)  # for every possible y
        mean = (log_q.exp() * values).sum()
        line += f"{mean:11.4f}{(log_q.exp() * (values - mean) ** 2).sum().sqrt():8.4f}"
    print(line)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Because of the noise. $k_1$ and $k_3$ have the right mean at any distance, $k_2$ only nearby. At distance 0.1 the spread of $k_1$ is twenty times the KL that it
# measures; that of $k_3$ is one and a half times the KL. Far away (distance 2) $k_3$ is the noisier of the two: its $e^{-r}$ has a long tail.
#
# </details>

# %% [markdown]
# How wrong is the mean of $n$ tokens, at distance 0.5? Bias and spread together are $\sqrt{\text{bias}^2 + \text{std}^2 / n}$ (lines); the marks are measured on samples.

# %%
log_q, log_p = log_softmax_pair(start, start + 0.5 * direction)
exact, counts = reverse_kl(log_q, log_p), 4 ** torch.arange(8)
y = torch.multinomial(log_q.exp(), 200 * 4**7, replacement=True).view(200, -1)  # 200 trials
predicted, measured = {}, {}
for name, estimator in ESTIMATORS.items():
    values = estimator(log_q, log_p)
    mean = (log_q.exp() * values).sum()
    variance = (log_q.exp() * (values - mean) ** 2).sum()
    predicted[name] = ((mean - exact) ** 2 + variance / counts).sqrt()
    errors = [values[y[:, :n]].mean(1) - exact for n in counts.tolist()]
    measured[name] = [error.square().mean().sqrt() for error in errors]
figures.errors(counts, predicted, measured, exact)

# %% [markdown]
# Near agreement $k_1$ is noisy, $k_2$ stops improving at its bias, and $k_3$ is neither.
#
# ### Which of them may be differentiated?
# A good *value* need not have a good *gradient*: the sampling depends on the student too, and autograd does not see that. The expected gradient is, again
# summed exactly, each token's own gradient, weighted by how often it is sampled.
#
# **Question.** Which estimators push where reverse KL pushes?

# %%
student, other = torch.tensor([[1.0, 0.5, 0.0, -1.0], [-0.5, 1.5, 0.5, -2.0]], dtype=torch.float64)
student.requires_grad_()


def expected_gradient(estimator):
    log_q, log_p = log_softmax_pair(student, other)
    return torch.autograd.grad((log_q.detach().exp() * estimator(log_q, log_p)).sum(), student)[0]


candidates = ESTIMATORS | {"surrogate": policy_gradient_surrogate}
gradients = {name: expected_gradient(estimator) for name, estimator in candidates.items()}
exact = {}
for name in ("reverse KL", "forward KL"):
    (exact[name],) = torch.autograd.grad(THREE[name](student, other), student)
figures.expected_gradients(gradients, exact)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# $k_1$ pushes nowhere, because $\sum_y Q \nabla \log Q = 0$. $k_2$, whose value is biased, has reverse KL's gradient. $k_3$, whose value is unbiased, has forward KL's. The surrogate was made to have
# reverse KL's. So log $k_3$, or better the exact KL, and train with the exact divergence; where only sampled tokens are known, train with
# `policy_gradient_surrogate`, which is REINFORCE on the reward $-r$. Its *value* means nothing. It must be fed the student's own samples at temperature 1; on
# anyone else's samples the expectation is another one.
#
# </details>

# %% tags=["answer"]
assert gradients["k1"].abs().max() < 1e-15
assert torch.allclose(gradients["k2"], exact["reverse KL"])
assert torch.allclose(gradients["k3"], exact["forward KL"])
assert torch.allclose(gradients["surrogate"], exact["reverse KL"])

# %% [markdown]
# ## 10. Why bf16 is not enough
# Near the end of training, teacher and student nearly agree, and the divergence is a small difference of large numbers. bf16 keeps 8 bits. Below, the
# same bf16 logits are treated in two ways: once with softmax and sums in bf16 too, once by `jsd`, which goes to fp32 first.
#
# **Question.** A divergence is never negative. Are both?

# %%
student = torch.randn(2000, 200).bfloat16()
other = (student.float() + 0.05 * torch.randn(2000, 200)).bfloat16()
p, q = other.softmax(-1), student.softmax(-1)  # bf16 all the way
m = (p + q) / 2
naive = (kl(p.log(), m.log()) / 2 + kl(q.log(), m.log()) / 2).float()
good, exact = jsd(student, other), jsd(student.double(), other.double())
both = {"bf16 throughout": naive, "jsd() of the same bf16 logits": good}
bins = torch.linspace(-0.005, 0.005, 81)
figures.histograms(both, bins, xlabel="JSD, nats", ylabel="pairs of models", yscale="log")
print(f"{(naive < 0).float().mean():.0%} of the bf16 values are negative")
print(f"means: exact {exact.mean():.6f}, by jsd() {good.mean():.6f}, in bf16 {naive.mean():.6f}")
assert naive.min() < 0 <= good.min() and torch.allclose(good.double(), exact, atol=1e-6)

# %% [markdown]
# ## 11. Top-k with a tail bucket
# OPCD keeps the student's 256 likeliest tokens. `top_k_divergence` puts all others into *one* bucket: merging outcomes can only lower a divergence, so the
# result is a lower bound that rises to the exact value. Dropping the rest and renormalising is common, too.
#
# **Question.** Is the renormalised value also a bound?

# %%
V, ks = 2000, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2000]
zipf = -torch.arange(1, V + 1, dtype=torch.float64).log()  # a vocabulary as in natural language
noise = torch.randn(V, dtype=torch.float64)
students = {
    "differs everywhere": zipf + 0.7 * noise,
    "differs in ten words": zipf + 0.7 * noise * (torch.arange(V) < 10),
}
for axis, (title, student) in zip(
    figures.panels(2, width=8.5, height=2.8, sharey=True), students.items()
):
    exact = reverse_kl(student, zipf).item()
    bound = [top_k_divergence(student, zipf, k).item() for k in ks]
    top = [student.topk(k).indices for k in ks]
    renormalised = [reverse_kl(student[t], zipf[t]).item() for t in top]  # by the softmax
    named = {"top k, renormalised": renormalised, "reverse KL, top k and a tail bucket": bound}
    figures.lines(axis, ks, named, markers=True, scale="log linear", xlabel="k, tokens kept")
    figures.level(axis, exact, "exact reverse KL")
    figures.label(axis, title=f"a student who {title}", ylabel="nats")
    assert max(bound) <= exact + 1e-12 and math.isclose(bound[-1], exact, rel_tol=1e-9)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# No. One word alone is always right after renormalising, so the value at $k = 1$ is 0; and in the right panel the renormalised value rises above the exact one. It
# can be wrong in either direction.
#
# </details>

# %% tags=["answer"]
assert renormalised[0] == 0 and max(renormalised) > exact

# %% [markdown]
# ## Now you
# 1. In section 4, find the distance at which reverse KL's two valleys become one, to a tenth of a width. Does it change when both modes weigh the same?
# 2. In section 6, put the teacher on an edge (`star = (.7, .3, 0)`). Which divergence becomes infinite, and for which students?
# 3. In section 9, sample $y$ at temperature 0.5 but score at 1. What does the surrogate's expected gradient become?
#
# Next: `02_model`, the network that produces these logits.

# %% [markdown] tags=["answer"]
# <details><summary>Answers</summary>
#
# 1. With the weights of section 4 (.55 and .45) the two descents part at 4.8 widths; with equal weights at 4.9. With unequal weights the second valley is at first not
#    the right mode but a wide student in the middle (at 5 widths the descent from the right ends at μ = −0.12).
# 2. Reverse KL, for every student inside the triangle: each gives "chair" some probability, and the teacher rules it out. Its panel has no contours and no arrows. Forward KL and JSD stay
#    finite: forward KL does not ask about words that the teacher never says.
# 3. It becomes $\sum_y \tilde Q(y)\, r(y)\, (e_y - Q)$, where $\tilde Q \propto Q^2$ is what is sampled and $e_y$ the one-hot vector of $y$. At temperature 1 a constant in $r$ has no effect, because
#    $\sum_y Q(y) (e_y - Q) = 0$. Now a constant $c$ adds $c\,(\tilde Q - Q)$: for $c > 0$ a step against it flattens the student, for $c < 0$ it sharpens it, whatever the teacher says.
#
# </details>
