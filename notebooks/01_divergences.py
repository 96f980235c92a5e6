# %% [markdown]
# # 1. Divergences
#
# A student is moved toward a teacher. *How far apart are they?* has three answers here, and which one you minimise decides what the
# student becomes. Everything is computed by `cosd.py`: functions of logits, arguments always `(student, teacher)`, results in nats.
#
# | in the post and the lecture | formula | function | section |
# |---|---|---|---|
# | lecture: entropy and cross-entropy | $H(p, q) = H(p) + D_{KL}(p \,\Vert\, q)$ | `cross_entropy` | 2 |
# | post 4.2: forward KL, "SFT standard" | $D_{KL}(P \,\Vert\, Q)$ | `forward_kl` | 1, 3–7 |
# | post 4.2: reverse KL, "on-policy standard" | $D_{KL}(Q \,\Vert\, P)$ | `reverse_kl` | 1, 3–7 |
# | post 4.2, implementation note: JSD | $\beta D_{KL}(P \Vert M) + (1-\beta) D_{KL}(Q \Vert M)$ | `jsd` | 1, 3–7 |
# | its knob $\beta$ in GKD | | `jsd(..., beta)` | 8 |
# | reverse KL from sampled tokens | $r = \log Q(y) - \log P(y)$ | `k1`, `k2`, `k3`, `policy_gradient_surrogate` | 9 |
# | OPCD's top-k | | `top_k_divergence` | 11 |
#
# Throughout, $P$ is the teacher (the lecture's $p$) and $Q$ the student ($q$). Nothing is trained here but toy students; no base is needed.

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
import math

import matplotlib.pyplot as plt
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
COLOR = {
    "forward KL": "#009E73",
    "reverse KL": "#CC79A7",
    "JSD": "#E69F00",
    "teacher": "#0072B2",
    "student": "#D55E00",
}
plt.rc("figure", dpi=90)
plt.rc("figure.constrained_layout", use=True)
plt.rc("font", size=9)
plt.rc("axes.spines", top=False, right=False)
plt.rc("legend", frameon=False)
_ = torch.manual_seed(0)

# %% [markdown]
# ## 1. The lecture's example
# Two models predict the next word. By hand:

# %%
words = ["mat", "floor", "chair"]
P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)  # the lecture's P: teacher
Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # the lecture's Q: student
by_hand = 0.7 * math.log(0.7 / 0.5) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.2)
print(f"KL(P‖Q) by hand: {by_hand:.4f} nats")

# %% [markdown]
# And by function. Log-probabilities are logits too: their softmax is the distribution itself.
#
# **Question.** Is KL(Q‖P), the other direction, the same number?

# %%
for name, divergence in THREE.items():
    print(f"{name:11}{divergence(Q.log(), P.log()):.4f} nats")

M = (P + Q) / 2
assert math.isclose(forward_kl(Q.log(), P.log()), by_hand, rel_tol=1e-12)
assert math.isclose(
    reverse_kl(Q.log(), P.log()), sum(q * math.log(q / p) for p, q in zip(P, Q)), rel_tol=1e-12
)
to_middle = forward_kl(M.log(), P.log()), forward_kl(M.log(), Q.log())
assert math.isclose(jsd(Q.log(), P.log()), sum(to_middle) / 2, rel_tol=1e-12)

# %% [markdown]
# Word by word: where the one who is averaged over is the likelier of the two, the term is positive, elsewhere it is negative. Single terms may
# be negative, the sum never is (Gibbs' inequality).

# %%
terms = {"forward KL": P * (P / Q).log(), "reverse KL": Q * (Q / P).log()}
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6))
for i, (who, values) in enumerate([("teacher", P), ("student", Q)]):
    left.bar(
        torch.arange(3) + 0.38 * i - 0.19, values, 0.36, label=f"{who} {'PQ'[i]}", color=COLOR[who]
    )
for i, (name, values) in enumerate(terms.items()):
    right.bar(
        torch.arange(3) + 0.38 * i - 0.19,
        values,
        0.36,
        label=f"{name}: {values.sum():.4f}",
        color=COLOR[name],
    )
left.set(ylabel="probability", title="two predictions")
right.set(ylabel="nats", title="what each word contributes")
right.axhline(0, color="black", linewidth=0.8)
for axis in (left, right):
    axis.set_xticks(range(3), words)
    axis.legend()
plt.show()

# %% [markdown]
# ## 2. Entropy, cross-entropy, and why SFT is forward KL
# $H(p, q) = H(p) + D_{KL}(p \,\Vert\, q)$. The entropy $H(p)$ does not depend on the student: to minimise cross-entropy *is* to minimise forward KL.

# %%
entropy = -(P * P.log()).sum()
crossed = F.cross_entropy(Q.log(), P)  # PyTorch takes a distribution as label, too
excess = forward_kl(Q.log(), P.log())
print(f"H(P) {entropy:.4f} + KL(P‖Q) {excess:.4f} = H(P, Q) {crossed:.4f} nats")
assert torch.isclose(entropy, torch.distributions.Categorical(P).entropy())
assert torch.isclose(crossed, entropy + excess, rtol=1e-12)

# %% [markdown]
# Let the student say "mat" with probability $q$ and share out the rest as the teacher does. The floor is $H(P)$, whatever the student does; all
# that it can remove is the KL on top.

# %%
q = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
students = torch.stack([q, (1 - q) * 2 / 3, (1 - q) / 3], dim=-1)  # (97, 3)
floor, above = entropy.expand(97), forward_kl(students.log(), P.log().expand(97, 3))
figure, axis = plt.subplots(figsize=(5.5, 2.6))
axis.stackplot(
    q, floor, above, labels=["entropy H(P)", "KL(P‖Q)"], colors=["#BBBBBB", COLOR["forward KL"]]
)
axis.plot(q, floor + above, color="black", label="cross-entropy H(P, Q)")
axis.axvline(0.7, color="black", linestyle=":", linewidth=1)
axis.set(
    xlabel="student's probability of “mat”",
    ylabel="nats",
    ylim=(0, 3),
    title="cross-entropy = entropy + forward KL",
)
axis.legend(loc="upper right")
plt.show()
assert q[above.argmin()].item() == q[(q - 0.7).abs().argmin()].item()

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
# One number each: the teacher says "yes" with probability $p$, the student with $q$.
#
# **Question.** Along which edges does each divergence blow up, and which one never does?

# %%
grid = torch.linspace(0.002, 0.998, 250, dtype=torch.float64)
p, q = torch.meshgrid(grid, grid, indexing="ij")  # (250, 250)


def two(a):
    return torch.stack([a, 1 - a], dim=-1).log()  # log-probabilities of yes and no


figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.1), sharey=True)
for axis, (name, divergence) in zip(axes, THREE.items()):
    value = divergence(two(q), two(p))
    image = axis.contourf(
        grid, grid, value, levels=torch.linspace(0, 2, 41), cmap="viridis", extend="max"
    )
    lines = axis.contour(
        grid, grid, value, levels=[0.1, 0.5, 1, 1.5], colors="white", linewidths=0.8
    )
    axis.set(title=f"{name}, at most {value.max():.2f} here", xlabel="student's q", aspect="equal")
    if name == "forward KL":
        axis.set_ylabel("teacher's p")
        figure.colorbar(
            image, ax=axes, label="nats", ticks=[0, 0.5, 1, 1.5, 2], shrink=0.9
        ).add_lines(lines)
plt.show()
assert jsd(two(q), two(p)).max() < math.log(2) < forward_kl(two(q), two(p)).max()
# symmetric at β = ½; the KLs are not
assert torch.allclose(jsd(two(q), two(p)), jsd(two(p), two(q)))

# %% [markdown]
# Forward KL punishes a student who rules out what the teacher says (left and right edges); reverse KL one who says what the teacher rules out
# (bottom and top). JSD stays below log 2 = 0.69 everywhere.

# %% [markdown]
# ## 4. Mode covering and mode seeking
# The teacher has two modes. The student is a single Gaussian, with a mean μ and a width σ: it *cannot* match. What it does instead
# depends on the divergence. First the landscape over its two parameters, with gradient descent from two starting points.

# %%
x = torch.linspace(-6, 6, 121, dtype=torch.float64)


def bump(mean, width):
    return (-(((x - mean) / width) ** 2) / 2).softmax(-1)


teacher_logits = (0.55 * bump(-2.5, 0.6) + 0.45 * bump(2.5, 0.6)).log()  # (121,)


def student_logits(mu, log_sigma):
    return -(((x - mu[..., None]) / log_sigma[..., None].exp()) ** 2) / 2  # (..., 121)


def descend(divergence, start, steps=1000):
    at = torch.tensor(start, dtype=torch.float64, requires_grad=True)  # (μ, log σ)
    optimizer, path = torch.optim.Adam([at], lr=0.05), []
    for _ in range(steps):
        path.append(at.detach().clone())
        optimizer.zero_grad()
        divergence(student_logits(*at), teacher_logits).backward()
        optimizer.step()
    return torch.stack(path)  # (steps, 2)


# narrow, a little left or right of the middle
STARTS = [(-1.0, math.log(0.5)), (1.0, math.log(0.5))]
paths = {
    name: [descend(divergence, start) for start in STARTS] for name, divergence in THREE.items()
}

# %% tags=["thumbnail"]
means, log_widths = torch.linspace(-5, 5, 101), torch.linspace(math.log(0.3), math.log(5), 81)
mu, log_sigma = torch.meshgrid(means, log_widths, indexing="ij")
figure, axes = plt.subplots(2, 3, figsize=(9.5, 5), height_ratios=[3, 2])
for (top, bottom), (name, divergence) in zip(axes.T, THREE.items()):
    value = divergence(student_logits(mu, log_sigma), teacher_logits.expand(101, 81, 121))
    top.contourf(
        mu, log_sigma.exp(), value.clamp(max=value.quantile(0.9)), levels=25, cmap="viridis"
    )
    bottom.fill_between(
        x, teacher_logits.exp(), color=COLOR["teacher"], alpha=0.35, linewidth=0, label="teacher"
    )
    for path, dashes in zip(paths[name], ["-", "--"]):
        top.plot(path[:, 0], path[:, 1].exp(), dashes, color="white", linewidth=1.5)
        top.plot(path[0, 0], path[0, 1].exp(), "o", color="white", markersize=4)
        top.plot(
            path[-1, 0],
            path[-1, 1].exp(),
            "o",
            color=COLOR["student"],
            markersize=8,
            markeredgecolor="white",
        )
        label = "student" if dashes == "-" else None
        bottom.plot(
            x, student_logits(*path[-1]).softmax(-1), dashes, color=COLOR["student"], label=label
        )
        bottom.set(xlabel="x", ylim=(0, 0.075))
    top.set(title=name, xlabel="student's mean μ", yscale="log")
    top.set_yticks([0.5, 1, 2, 4], [0.5, 1, 2, 4])
    top.minorticks_off()
axes[0, 0].set_ylabel("student's width σ")
axes[1, 0].set_ylabel("probability")
axes[1, 0].legend(loc="upper right", fontsize=8)
plt.show()

# %% [markdown]
# Dark is low. Forward KL has one valley: the student must cover both modes and puts much of its mass between them, where the teacher says next to
# nothing. Reverse KL has a deep valley at each mode: the student takes the one that it started near and drops the other. JSD has those and a
# shallow one that covers: it is between the two.
#
# For forward KL the answer is known without descending: the best Gaussian has the teacher's mean and variance.


# %%
def moments(probability):
    mean = (probability * x).sum()
    return torch.stack([mean, (probability * (x - mean) ** 2).sum().sqrt()])


between = (x > -1) & (x < 1)
rows = {name: [student_logits(*path[-1]).softmax(-1) for path in paths[name]] for name in THREE}
for name, fits in ({"teacher": [teacher_logits.exp()]} | rows).items():
    for fit in fits:
        mean, width = moments(fit)
        mass = fit[between].sum()
        print(f"{name:11} mean {mean:5.2f}  width {width:.2f}  mass between the modes {mass:.3f}")

assert all(
    torch.allclose(moments(fit), moments(teacher_logits.exp()), atol=2e-3)
    for fit in rows["forward KL"]
)
assert rows["reverse KL"][0][x < 0].sum() > 0.99 and rows["reverse KL"][1][x > 0].sum() > 0.99

# %% [markdown]
# ### The same with words
# The student writes two letters, each without looking at the other (no capacity for more). The teacher says "to" or "ot", hardly anything else.
#
# **Question.** What does each student write?

# %%
letters = "otm"
joint = torch.full((3, 3), 0.01, dtype=torch.float64)
joint[1, 0], joint[0, 1] = 0.55, 0.38  # "to", "ot"


def table(at):  # log Q(first) + log Q(second)
    return at[0].log_softmax(-1)[:, None] + at[1].log_softmax(-1)  # (3, 3)


figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.7))
shown, void = {"teacher": joint}, ~((joint == joint[1, 0]) | (joint == joint[0, 1]))
for name, divergence in THREE.items():
    at = torch.tensor([[0.0, 0.1, 0.0], [0.1, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([at], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        divergence(table(at).flatten(), joint.log().flatten()).backward()
        optimizer.step()
    shown[name] = table(at).exp().detach()
for axis, (name, probability) in zip(axes, shown.items()):
    axis.imshow(probability, cmap="cividis", vmin=0, vmax=0.8)
    for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
        word = f"{letters[i]}{letters[j]}"
        axis.text(
            j,
            i,
            f"{word}\n{probability[i, j]:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color="black" if probability[i, j] > 0.4 else "white",
        )
    axis.set(title=f"{name}\nnonsense: {probability[void].sum():.2f}", xticks=[], yticks=[])
plt.show()
product_of_marginals = joint.sum(1)[:, None] * joint.sum(0)
assert torch.allclose(shown["forward KL"], product_of_marginals, atol=1e-3)
assert shown["forward KL"][void].sum() > 0.4 > 0.1 > shown["reverse KL"][void].sum()

# %% [markdown]
# Forward KL gets each letter's frequency right and half of the words wrong: "oo" and "tt", the post's *void regions*. Reverse KL commits to one word
# and never learns that there were two. That is the trade, and it exists only where the student cannot match the teacher; where it can, all
# three have their minimum, 0, at $Q = P$.

# %% [markdown]
# ## 5. Gradients, checked
# The docstrings in `cosd.py` give each gradient with respect to the student's logits. Autograd agrees:

# %%
student, teacher = torch.randn(2, 1000, dtype=torch.float64)
student.requires_grad_()
log_q, log_p = log_softmax_pair(student.detach(), teacher)
q, p = log_q.exp(), log_p.exp()
log_m = ((p + q) / 2).log()
formulas = {
    "forward KL": q - p,
    "reverse KL": q * (log_q - log_p - kl(log_q, log_p)),
    "JSD": 0.5 * q * (log_q - log_m - kl(log_q, log_m)),
}
for name, divergence in THREE.items():
    (gradient,) = torch.autograd.grad(divergence(student, teacher), student)
    assert torch.allclose(gradient, formulas[name], rtol=1e-9, atol=1e-14)
    print(f"{name:11} gradient as in its docstring")

# %% [markdown]
# ## 6. Gradients, drawn
# All students over three words form a triangle; the teacher is the star. An arrow shows what a small gradient step *on the logits* does to the
# student's probabilities, $\Delta Q = -(\mathrm{diag}\,Q - QQ^\top)\,\nabla$.
#
# **Question.** A student in the far corner is certain of the wrong word. Does it get out?

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
figure, axes = plt.subplots(1, 3, figsize=(9.5, 3))
for axis, (name, divergence) in zip(axes, THREE.items()):
    value = divergence(fine.log(), log_star.expand_as(fine))
    print(f"{name:11} infinite for {value.isinf().sum()} of {len(value)} students")
    colour = value.clamp(max=9).sqrt()
    axis.tricontourf(*(fine @ corners).T, colour, levels=25, cmap="viridis")
    logits = coarse.log().requires_grad_()
    value = divergence(logits, log_star.expand_as(logits))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    gradient[value.isinf()] = 0  # from an infinite divergence nothing points anywhere
    step = -coarse * (gradient - (coarse * gradient).sum(-1, keepdim=True))  # −(diag Q − Q Qᵀ) ∇
    assert torch.allclose(step.sum(-1), torch.zeros(len(step), dtype=torch.float64), atol=1e-12)
    scale = 0.5 if name == "JSD" else 2.2
    axis.quiver(*(coarse @ corners).T, *(step @ corners).T, color="white", width=0.006, scale=scale)
    axis.plot(
        *(log_star.exp() @ corners),
        "*",
        color=COLOR["student"],
        markersize=13,
        markeredgecolor="white",
    )
    for word, at, where in zip(
        words, corners, [("right", "top"), ("left", "top"), ("center", "bottom")]
    ):
        axis.text(*at, word, ha=where[0], va=where[1])
    axis.set(title=f"{name}", aspect="equal", xlim=(-0.15, 1.15), ylim=(-0.1, 1))
    axis.axis("off")
plt.show()

# %% [markdown]
# (Colour: the square root of the divergence. JSD's arrows are drawn 4.4 times longer.) Along the edges the arrows shrink for all three, because a softmax moves
# little where probabilities are small. The next section looks at the gradient alone.

# %% [markdown]
# ## 7. A confident student
# The student gives the right word the probability $\varepsilon$ and is certain of another.

# %%
epsilon = torch.logspace(-8, -0.4, 60, dtype=torch.float64)
confident = torch.stack([epsilon, 1 - 1.5 * epsilon, epsilon / 2], dim=-1).log().requires_grad_()
figure, axis = plt.subplots(figsize=(5.5, 2.8))
for name, divergence in THREE.items():
    (gradient,) = torch.autograd.grad(
        divergence(confident, P.log().expand_as(confident)).sum(), confident
    )
    norms = gradient.norm(dim=-1)
    axis.loglog(epsilon, norms, color=COLOR[name], label=name)
    print(f"{name:11} gradient at ε = 1e-8: {norms[0]:.1e}")
    assert norms[0] > 0.5 if name == "forward KL" else norms[0] < 1e-6
axis.set(
    xlabel="ε = student's probability of the right word",
    ylabel="norm of the gradient",
    title="who still pulls?",
)
axis.legend()
plt.show()

# %% [markdown]
# Forward KL's gradient is $Q - P$: it stays. Reverse KL's and JSD's are multiplied by $Q$ and vanish with it: the student never says the word, so
# nothing tells it that it should. One reason why this project's default is forward KL on the student's own samples.

# %% [markdown]
# ## 8. The β trap
# $JSD_\beta$ weighs the two sides by β. In GKD and the libraries after it, one knob β also stands for forward KL at 0 and for reverse KL at 1.
#
# **Question.** Is that where the formula goes?

# %%
student, teacher = torch.tensor([[4.0, 0, 0], [0, 4.0, 1]], dtype=torch.float64)
beta = torch.linspace(0.001, 0.999, 500)
values = torch.stack([jsd(student, teacher, b.item()) for b in beta])
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.8))
left.plot(beta, values, color=COLOR["JSD"], label="JSD(β), the formula")
for at, name in [(0, "forward KL"), (1, "reverse KL")]:
    exact, share = THREE[name](student, teacher), beta if at == 0 else 1 - beta
    left.plot(at, exact, "o", color=COLOR[name], label=f"β = {at} in GKD: {name}", clip_on=False)
    right.plot(
        beta, values / share, color=COLOR[name], label=f"JSD(β) / {'β' if at == 0 else '(1−β)'}"
    )
    right.plot(at, exact, "o", color=COLOR[name], clip_on=False)
left.set(xlabel="β", ylabel="nats", title="the knob jumps at both ends", ylim=(0, None))
right.set(xlabel="β", ylabel="nats", title="divided by its weight, it does not", ylim=(0, None))
for axis in (left, right):
    axis.legend(fontsize=8)
plt.show()
print(
    f"β = 0.001: {values[0]:.4f} nats by the formula, {forward_kl(student, teacher):.4f} at GKD's β = 0"
)
assert math.isclose(jsd(student, teacher, 1e-7) / 1e-7, forward_kl(student, teacher), rel_tol=1e-4)
assert math.isclose(
    jsd(student, teacher, 1 - 1e-7) / 1e-7, reverse_kl(student, teacher), rel_tol=1e-4
)

# %% [markdown]
# Two settings that look alike, two losses that are not: a learning rate that suits one does nothing, or far too much, under the other. So here the
# ends are errors:

# %%
try:
    jsd(student, teacher, beta=0)
except ValueError as error:
    print(error)

# %% [markdown]
# ## 9. Estimates from one token
# With a big vocabulary or an API one may know only the probabilities of the token $y$ that the student sampled: $r = \log Q(y) - \log P(y)$. Three
# estimators of reverse KL: $k_1 = r$, $k_2 = r^2/2$, $k_3 = e^{-r} - 1 + r$. Because the vocabulary is small here, their mean and spread can be summed
# exactly, over all $y$ weighted by $Q(y)$.

# %%
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
start, direction = torch.randn(2, 500, dtype=torch.float64)
print("distance   exact KL" + "".join(f"{name + ' mean':>11}{'± std':>8}" for name in ESTIMATORS))
for distance in [0.1, 0.5, 1.0, 2.0]:
    log_q, log_p = log_softmax_pair(start, start + distance * direction)
    exact = reverse_kl(log_q, log_p)
    line, spread = f"{distance:8.1f}{exact:11.4f}", {}
    for name, estimator in ESTIMATORS.items():
        values = estimator(log_q, log_p)  # for every possible y
        mean = (log_q.exp() * values).sum()
        spread[name] = (log_q.exp() * (values - mean) ** 2).sum().sqrt()
        line += f"{mean:11.4f}{spread[name]:8.4f}"
        assert name == "k2" or torch.isclose(mean, exact)  # k1 and k3 are unbiased
        assert name == "k1" or values.min() >= 0  # k2 and k3 are never negative
    assert (spread["k1"] > spread["k3"]) == (distance < 2)
    print(line)

# %% [markdown]
# $k_1$ and $k_3$ have the right mean at any distance, $k_2$ only nearby. Nearby $k_1$ is noisy, with a spread of many times the KL that it
# measures; far away $k_3$ is the noisier one, its $e^{-r}$ has a long tail. How wrong is the mean of $n$ tokens, at distance 0.5? Bias and
# spread together are $\sqrt{\text{bias}^2 + \text{std}^2 / n}$ (lines); the dots are measured on samples.

# %%
log_q, log_p = log_softmax_pair(start, start + 0.5 * direction)
exact, counts = reverse_kl(log_q, log_p), 4 ** torch.arange(8)
y = torch.multinomial(log_q.exp(), 200 * 4**7, replacement=True).view(
    200, -1
)  # 200 times 4⁷ tokens
figure, axis = plt.subplots(figsize=(5.5, 2.9))
for (name, estimator), color in zip(ESTIMATORS.items(), ["#0072B2", "#56B4E9", "#D55E00"]):
    values = estimator(log_q, log_p)
    mean = (log_q.exp() * values).sum()
    variance = (log_q.exp() * (values - mean) ** 2).sum()
    measured = torch.stack(
        [(values[y[:, :n]].mean(1) - exact).square().mean().sqrt() for n in counts.tolist()]
    )
    axis.loglog(counts, ((mean - exact) ** 2 + variance / counts).sqrt(), color=color, label=name)
    axis.loglog(counts, measured, "o", color=color, markersize=4)
axis.axhline(exact, color="black", linestyle=":", label="the KL itself")
axis.set(
    xlabel="tokens averaged over",
    ylabel="typical error, nats",
    title="near agreement: noisy, biased, neither",
)
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# ### Which of them may be differentiated?
# A good *value* need not have a good *gradient*: the sampling depends on the student too, and autograd does not see that. The expected gradient, again
# summed exactly: each token's own gradient, weighted by how often it is sampled.
#
# **Question.** Which estimators push where reverse KL pushes?

# %%
student, teacher = torch.tensor(
    [[1.0, 0.5, 0.0, -1.0], [-0.5, 1.5, 0.5, -2.0]], dtype=torch.float64
)
student.requires_grad_()


def expected_gradient(estimator):
    log_q, log_p = log_softmax_pair(student, teacher)
    return torch.autograd.grad((log_q.detach().exp() * estimator(log_q, log_p)).sum(), student)[0]


candidates = ESTIMATORS | {"surrogate": policy_gradient_surrogate}
gradients = {name: expected_gradient(estimator) for name, estimator in candidates.items()}
exact = {
    name: torch.autograd.grad(THREE[name](student, teacher), student)[0]
    for name in ("reverse KL", "forward KL")
}
figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.6), sharey=True)
for axis, (name, gradient) in zip(axes, gradients.items()):
    axis.bar(range(4), gradient, 0.75, color="#BBBBBB")
    for divergence, marker in [("reverse KL", "o"), ("forward KL", "x")]:
        axis.plot(
            range(4),
            exact[divergence],
            marker,
            color=COLOR[divergence],
            label=f"∇ {divergence}",
            markersize=7,
            markeredgewidth=2,
        )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title=f"E[∇ {name}]", xticks=range(4), xlabel="logit")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %%
assert gradients["k1"].abs().max() < 1e-15  # nothing at all: Σ Q ∇log Q = 0
assert torch.allclose(
    gradients["k2"], exact["reverse KL"]
)  # a biased value with the right gradient
assert torch.allclose(gradients["k3"], exact["forward KL"])  # an unbiased value, the wrong gradient
assert torch.allclose(gradients["surrogate"], exact["reverse KL"])  # made to have it
print("k1: 0    k2: reverse KL's    k3: forward KL's    surrogate: reverse KL's")

# %% [markdown]
# So: log $k_3$ (or better the exact KL), train with the exact divergence, or, where only sampled tokens are known, with
# `policy_gradient_surrogate`: REINFORCE on the reward $-r$. Its *value* means nothing. It must be fed the student's own samples at temperature 1; on
# anyone else's the expectation is another one.

# %% [markdown]
# ## 10. Why bf16 is not enough
# Near the end of training teacher and student nearly agree and the divergence is a small difference of large numbers. bf16 keeps 8 bits. Below, the
# same bf16 logits: once with softmax and sums in bf16 too, once by `jsd`, which goes to fp32 first.

# %%
student = torch.randn(2000, 200).bfloat16()
teacher = (student.float() + 0.05 * torch.randn(2000, 200)).bfloat16()
p, q = teacher.softmax(-1), student.softmax(-1)  # bf16 all the way
m = (p + q) / 2
naive = (kl(p.log(), m.log()) / 2 + kl(q.log(), m.log()) / 2).float()
good, exact = jsd(student, teacher), jsd(student.double(), teacher.double())
figure, axis = plt.subplots(figsize=(6, 2.6))
bins = torch.linspace(-0.005, 0.005, 81)
axis.hist(naive, bins=bins, color="#BBBBBB", label="bf16 throughout")
axis.hist(good, bins=bins, color=COLOR["JSD"], label="jsd() of the same bf16 logits")
axis.axvline(0, color="black", linewidth=0.8)
axis.set(
    xlabel="JSD, nats",
    ylabel="pairs",
    yscale="log",
    title=f"{(naive < 0).float().mean():.0%} of the bf16 values are negative",
)
axis.legend(fontsize=8)
plt.show()
print(f"exact mean {exact.mean():.6f}, by jsd() {good.mean():.6f}, in bf16 {naive.mean():.6f}")
assert naive.min() < 0 and good.min() >= 0 and torch.allclose(good.double(), exact, atol=1e-6)

# %% [markdown]
# ## 11. Top-k with a tail bucket
# OPCD keeps the student's 256 likeliest tokens. `top_k_divergence` puts all others into *one* bucket: merging outcomes can only lower a divergence, so the
# result is a lower bound that rises to the exact value. To drop the rest and renormalise is common, and no bound at all.

# %%
V, ks = 2000, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2000]
teacher = -torch.arange(1, V + 1, dtype=torch.float64).log()  # a Zipf-like vocabulary
noise = torch.randn(V, dtype=torch.float64)
students = {
    "differs everywhere": teacher + 0.7 * noise,
    "differs in ten words": teacher + 0.7 * noise * (torch.arange(V) < 10),
}
figure, axes = plt.subplots(1, 2, figsize=(8.5, 2.8), sharey=True)
for axis, (title, student) in zip(axes, students.items()):
    exact = reverse_kl(student, teacher).item()
    bound = [top_k_divergence(student, teacher, k).item() for k in ks]
    top = [student.topk(k).indices for k in ks]
    renormalised = [
        reverse_kl(student[t], teacher[t]).item() for t in top
    ]  # softmax renormalises what is left
    axis.axhline(exact, color="black", linestyle=":", label="exact reverse KL")
    axis.semilogx(ks, bound, "o-", color=COLOR["reverse KL"], label="top k and a tail bucket")
    axis.semilogx(ks, renormalised, "x--", color="#777777", label="top k renormalised")
    axis.set(title=f"a student who {title}", xlabel="k")
    assert max(bound) <= exact + 1e-12 and math.isclose(bound[-1], exact, rel_tol=1e-9)
    assert renormalised[0] == 0  # one word alone is always right
axes[0].set_ylabel("nats")
axes[0].legend(fontsize=8)
plt.show()
assert max(renormalised) > exact  # too small there, too large here

# %% [markdown]
# ## Now you
# 1. In section 4, move the modes together until reverse KL's two valleys become one. How far apart are they then, in widths?
# 2. In section 6, put the teacher on an edge (`star = (.7, .3, 0)`). Which divergence becomes infinite, and for which students?
# 3. In section 9, sample $y$ at temperature 0.5 but score at 1. What does the surrogate's expected gradient become?
#
# Next: `02_model`, the network that produces these logits.
