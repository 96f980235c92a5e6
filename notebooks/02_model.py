# %% [markdown]
# # 2. The model
#
# `model.py` holds one decoder-only GPT. Here it is taken apart on the pretrained base of the built-in world: from token ids to logits with all shapes,
# what attention looks at, what the KV cache saves, how tokens are drawn, and why right padding needs no mask. At the end its logits are held against
# transformers'.

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
import tempfile
import time

import matplotlib.pyplot as plt
import torch

from contexts import END, decode, encode, render
from model import GPT, GPTConfig, KVCache, pad_right, rotate, sample
from train import Config, get_base

COLOR = {"blue": "#0072B2", "orange": "#D55E00", "green": "#009E73", "grey": "#999999"}
plt.rc("figure", dpi=90)
plt.rc("figure.constrained_layout", use=True)
plt.rc("font", size=9)
plt.rc("axes.spines", top=False, right=False)
plt.rc("legend", frameon=False)

# %% [markdown]
# The base is found in `out/`, or made once in three or four minutes.

# %%
cfg = Config(device="cpu")
base, name = get_base(cfg, "out")
c = base.config
print(f"{c.n_layer} blocks, width D = {c.d_model}, {c.n_head} heads of E = {c.head_dim}")
print(f"MLP width {c.d_ff}, V = {c.vocab_size} tokens")
print(f"{c.norm} norm, {c.positions} positions, {c.mlp}")

# %% [markdown]
# ## 1. From ids to logits
# Two demonstrations of a new verb, then a prompt that uses it. What is the answer?

# %%
context, prompt = "mot zorp: tom; rav zorp: var", "lid zorp"
ids = render(context, prompt)
spelled = [decode([i]).replace(" ", "·") for i in ids]
print("│".join(spelled))
print(f"{len(ids)} tokens:", ids)

# %% [markdown]
# Every module below reports what goes in and what comes out. B rows (here one), T tokens, width D, V words.

# %%
shapes = []


def watch(name):
    return lambda module, args, out: shapes.append((name, tuple(args[0].shape), tuple(out.shape)))


block = base.blocks[0]
attention, mlp = block.attention, block.mlp
watched = {
    "embed": base.embed,
    "block 0": block,
    "  norm1": block.norm1,
    "  attention": attention,
    "    q": attention.q,
    "    k": attention.k,
    "    v": attention.v,
    "    out": attention.out,
    "  norm2": block.norm2,
    "  mlp": mlp,
    "    gate": mlp.gate,
    "    up": mlp.up,
    "    down": mlp.down,
    "block 2": base.blocks[2],
    "norm": base.norm,
    "head": base.head,
}
hooks = [module.register_forward_hook(watch(name)) for name, module in watched.items()]
with torch.no_grad():
    logits = base(torch.tensor([ids]))  # (1, T, V)
for hook in hooks:
    hook.remove()
order = list(watched)
for name, went_in, came_out in sorted(shapes, key=lambda s: order.index(s[0])):
    print(f"{name:14}{str(went_in):>16} -> {came_out}")
assert logits.shape == (1, len(ids), base.config.vocab_size)

# %% [markdown]
# Embedding and head are one matrix (`tied`); the three blocks add their findings to a stream of width D. Where do the parameters sit?


# %%
def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


blocks = base.blocks
parts = {
    "embedding = head": count(base.embed),
    "attention, 3 blocks": count(*(b.attention for b in blocks)),
    "MLP, 3 blocks": count(*(b.mlp for b in blocks)),
    "norms": count(base.norm, *(b.norm1 for b in blocks), *(b.norm2 for b in blocks)),
}
for name, number in parts.items():
    print(f"{name:20}{number:>9,}{number / count(base):>6.0%}")
assert (
    base.head.weight is base.embed.weight
    and sum(parts.values()) == count(base) == base.config.n_params()
)

# %% [markdown]
# The logits at the last position, the assistant header, are the model's prediction of the first letter. With the two demonstrations, and without:

# %%
with torch.no_grad():
    without = base(torch.tensor([render(None, prompt)]))[0, -1].softmax(-1)
p = logits[0, -1].softmax(-1)
top = (p + without).topk(6).indices
figure, axis = plt.subplots(figsize=(5.5, 2.3))
axis.bar(torch.arange(6) - 0.2, p[top], 0.38, color=COLOR["blue"], label="with the demonstrations")
axis.bar(torch.arange(6) + 0.2, without[top], 0.38, color=COLOR["orange"], label="without")
axis.set_xticks(range(6), [decode([i]) for i in top.tolist()])
axis.set(ylabel="probability", title=f"first letter of “{prompt}”")
axis.legend()
plt.show()
assert decode([p.argmax().item()]) == "d" and p.max() > 0.9  # "zorp" reverses: lid -> dil

# %% [markdown]
# Final norm and head can be put after *any* block: what would the model say if it stopped there? Below, its likeliest next token after each block,
# while it answers.
#
# **Question.** After which block is each letter known?

# %%
answer, _ = base.generate([ids], 8, temperature=0, eos={END})
chat = ids + answer[0].tolist()
stream = []


def keep(module, args, out):
    stream.append(out)


hooks = [module.register_forward_hook(keep) for module in (base.embed, *base.blocks)]
with torch.no_grad():
    final = base(torch.tensor([chat]))
    early = torch.stack([base.head(base.norm(x))[0] for x in stream]).softmax(-1)  # (4, T, V)
for hook in hooks:
    hook.remove()
# after the last block it is the model
assert torch.allclose(early[-1], final[0].softmax(-1), atol=1e-6)

read = chat[len(ids) - 1 : -1]  # the assistant header and the answer's letters
best, token = early[:, len(ids) - 1 : -1].max(-1)  # (4, n)
figure, axis = plt.subplots(figsize=(4.8, 2.4))
image = axis.imshow(best, cmap="viridis", vmin=0, vmax=1, aspect="auto")
for row, column in torch.cartesian_prod(torch.arange(4), torch.arange(len(read))).tolist():
    axis.text(
        column,
        row,
        decode([token[row, column].item()]).strip("<|>"),
        ha="center",
        va="center",
        fontsize=9,
        color="black" if best[row, column] > 0.6 else "white",
    )
axis.set_xticks(range(len(read)), [decode([i]).strip("<|>") for i in read])
axis.set_yticks(range(4), ["embedding", "block 0", "block 1", "block 2"])
axis.set(xlabel="token read", title="likeliest next token, were this the last block")
figure.colorbar(image, label="its probability")
plt.show()
assert token[0].tolist() == read and token[-1].tolist() == chat[len(ids) :]

# %% [markdown]
# Before any block each token predicts itself: head and embedding are one matrix. From there on the work is to *find* letters, and that is what
# attention is for.

# %% [markdown]
# ## 2. What attention looks at
# The weights are made of queries and keys: softmax of $q \cdot k / \sqrt{E}$ over the past. Hooks catch what the model's own `q` and `k` put out; `rotate`
# turns them by their positions; the softmax is ours, so it is checked against the module: weights times values must give what `out` receives.
#
# The text is the same chat, with the model's answer.

# %%
T, H, E = len(chat), base.config.n_head, base.config.head_dim


def by_head(x):
    return x.view(T, H, E).transpose(0, 1)  # (1, T, H·E) -> (H, T, E)


def catch(model, chat):
    caught, hooks = {}, []

    def catcher(layer, part):
        def hook(module, args, out):
            caught[layer, part] = by_head(args[0] if part == "mixed" else out)

        return hook

    for layer, block in enumerate(model.blocks):
        modules = {name: getattr(block.attention, name) for name in "qkv"}
        for part, module in (modules | {"mixed": block.attention.out}).items():
            hooks.append(module.register_forward_hook(catcher(layer, part)))
    with torch.no_grad():
        model(torch.tensor([chat]))
    for hook in hooks:
        hook.remove()
    return caught


def attention_weights(model, chat):
    caught = catch(model, chat)
    angles = torch.arange(T)[:, None] * model.frequencies  # (T, E/2)
    cos = angles.cos().repeat(1, 2)  # (T, E): for both halves of a head
    sin = torch.cat([-angles.sin(), angles.sin()], dim=1)  # (T, E)
    future = torch.ones(T, T).triu(1).bool()
    weights = []
    for layer in range(len(model.blocks)):
        q, k = (rotate(caught[layer, part], cos, sin) for part in "qk")  # (H, T, E) each
        w = (q @ k.transpose(1, 2) / E**0.5).masked_fill(future, float("-inf")).softmax(-1)
        assert torch.allclose(w @ caught[layer, "v"], caught[layer, "mixed"], atol=1e-4)
        weights.append(w)
    return torch.stack(weights)  # (layers, H, T, T)


# %%
weights = attention_weights(base, chat)
print("answer:", decode(answer[0].tolist()), "  weights:", tuple(weights.shape))

# %% [markdown]
# All heads. Rows are the tokens that look, columns the tokens that they look at.

# %%
figure, axes = plt.subplots(3, H, figsize=(8, 6.3), sharex=True, sharey=True)
for layer in range(3):
    for head in range(H):
        axes[layer, head].imshow(weights[layer, head].sqrt(), cmap="viridis", vmin=0, vmax=1)
        axes[layer, head].set_title(f"block {layer}, head {head}", fontsize=8)
        axes[layer, head].set(xticks=[], yticks=[])
        axes[layer, head].spines[:].set_visible(False)
figure.supxlabel("looked at", fontsize=9)
figure.supylabel("looking (colour: square root of the weight)", fontsize=9)
plt.show()
assert (
    torch.allclose(weights.sum(-1), torch.ones(3, H, T), atol=1e-5) and weights.triu(1).max() == 0
)

# %% [markdown]
# The upper triangle is the future: dark. Diagonals are heads that look a fixed number of tokens back; bright dots elsewhere are heads that look
# something up.
#
# Where a head looks is not yet what the answer depends on: what one block fetches, the next may read elsewhere. A blunt test: replace one token of the prompt
# by the letter z and see how much of the first letter's probability is lost.
#
# **Question.** Which tokens does the "d" of "dil" depend on? Only on the d of "lid"?

# %% tags=["thumbnail"]
first = len(ids) - 1  # the assistant header: its logits predict the first letter
letter = answer[0, 0].item()
replaced = torch.tensor([ids] * first)
replaced[range(first), range(first)] = encode("z")[0]  # row t: token t replaced
with torch.no_grad():
    lost = p[letter] - base(replaced)[:, -1].softmax(-1)[:, letter]  # (first,)

figure, (top, bottom) = plt.subplots(2, 1, figsize=(9.5, 3.8), sharex=True, height_ratios=[3, 2])
image = top.imshow(
    weights[:, :, first, :first].flatten(0, 1), cmap="viridis", vmin=0, vmax=1, aspect="auto"
)
top.set_yticks([1.5, 5.5, 9.5], ["block 0", "block 1", "block 2"])
top.hlines([3.5, 7.5], -0.5, first - 0.5, color="white", linewidth=1)
top.set_title("where the assistant header's 12 heads look")
figure.colorbar(image, ax=top, label="weight")
bottom.bar(range(first), lost, color=COLOR["blue"])
bottom.set_xticks(
    range(first), [decode([i]).replace(" ", "·").strip("<|>") for i in ids[:-1]], rotation=90
)
bottom.set(
    title=f"probability of “{decode([letter])}” lost, when this token is replaced", ylim=(0, 1)
)
for axis in (top, bottom):
    axis.tick_params(axis="x", length=0)
plt.show()
assert decode([ids[first - 2]]) == "d" and lost[first - 2] > 0.9  # the d of "lid"

# %% [markdown]
# The letter itself, of course. On which others it leans is this model's habit; a base of another seed has other habits. The demonstrations as a whole decide
# everything. Let one of them, or both, show *rotate* (lid → idl) in place of *reverse* (lid → dil):
#
# **Question.** What does the model make of two demonstrations that contradict each other?

# %%
for one, other in [("tom", "var"), ("otm", "var"), ("tom", "avr"), ("otm", "avr")]:
    shown = f"mot zorp: {one}; rav zorp: {other}"
    with torch.no_grad():
        p = base(torch.tensor([render(shown, prompt)]))[0, -1].softmax(-1)
    print(f"{shown:32} d {p[encode('d')].item():.2f}   i {p[encode('i')].item():.2f}")
assert p[encode("i")] > 0.9

# %% [markdown]
# ## 3. The KV cache
# A token's keys and values do not depend on what comes later (attention is causal), so they are computed once and kept. `generate` reads the prompt in one
# call and then one token at a time. Here 400 tokens come one by one, as in decoding: once everything is read again for each, once only the new one. The logits
# are the same.

# %%
torch.manual_seed(0)
V = base.config.vocab_size
big = GPT(
    GPTConfig(V, n_layer=4, d_model=256, n_head=4, n_kv_head=4, head_dim=64, d_ff=768, max_len=1024)
)
text = torch.randint(0, V, (1, 400))
slow, fast, slow_seconds, fast_seconds = [], [], [], []
cache = KVCache(big.config, room=399)  # beside the first token
with torch.no_grad():
    for t in range(400):
        began = time.perf_counter()
        slow.append(big(text[:, : t + 1])[0, -1])  # all t + 1 tokens
        slow_seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        fast.append(big(text[:, t : t + 1], cache)[0, -1])  # one token; the cache has the others
        fast_seconds.append(time.perf_counter() - began)
assert torch.allclose(torch.stack(slow), torch.stack(fast), atol=1e-4)
print("keys in the cache, per layer:", tuple(cache.keys[0].shape), "= (B, K, S, E)")

# %% tags=["timing"]
figure, axis = plt.subplots(figsize=(6, 2.7))
curves = {
    "read everything again": (slow_seconds, COLOR["orange"]),
    "KV cache": (fast_seconds, COLOR["blue"]),
}
for label, (seconds, color) in curves.items():
    median_of_nine = torch.tensor(seconds).unfold(0, 9, 1).median(-1).values
    axis.plot(range(5, 397), 1000 * median_of_nine, color=color, label=label)
axis.set(
    xlabel="tokens so far",
    ylabel="ms per new token",
    ylim=(0, None),
    title="a GPT of 4 layers, width 256",
)
axis.legend()
plt.show()
print(f"400 tokens: {sum(slow_seconds):.1f} s without, {sum(fast_seconds):.1f} s with the cache")

# %% [markdown]
# ## 4. A shared context is read once
# In types B and C all teacher prompts begin with the same context. `read` makes a cache of a single row; any batch can go on from it. No copy per row is made:
# the queries of all rows meet the one prefix in a plain matrix product.

# %%
shared = torch.randint(0, V, (600,)).tolist()
tails = [torch.randint(0, V, (n,)).tolist() for n in (9, 12, 5, 12, 7, 10, 8, 12)]


@torch.no_grad()
def whole():
    return big(pad_right([shared + tail for tail in tails]))[:, len(shared) :]  # (8, 12, V)


@torch.no_grad()
def in_two(prefix):
    return big(pad_right(tails), KVCache(big.config, prefix=prefix))


with torch.no_grad():
    prefix = big.read(shared)
real = pad_right([[1] * len(tail) for tail in tails]).bool()
assert torch.allclose(whole()[real], in_two(prefix)[real], atol=1e-4)
print(
    "cache of the shared context:",
    tuple(prefix.keys[0].shape),
    "per layer: one row, whatever the batch",
)


# %% tags=["timing"]
def best_of(n, f, *args):
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        f(*args)
        seconds.append(time.perf_counter() - began)
    return 1000 * min(seconds)


with torch.no_grad():
    times = {
        "context in every row": best_of(3, whole),
        "context read once": best_of(3, big.read, shared),
        "rows that go on from it": best_of(3, in_two, prefix),
    }
for what, ms in times.items():
    print(f"{what:25}{ms:8.1f} ms")

# %% [markdown]
# With a frozen teacher the middle line is paid once for a whole training run: then the cost of a step hardly depends on the length of the context.

# %% [markdown]
# ## 5. Right padding changes nothing
# Rows of different length are filled up on the right. A causal model never looks there. So what is filled in cannot matter, nor who else is in the batch:

# %%
rows = [
    render(None, "lid zorp"),
    render(context, prompt),
    render("never weapon poison", "give sword"),
]
with torch.no_grad():
    alone = [base(torch.tensor([row]))[0] for row in rows]
    padding = pad_right([[1] * len(row) for row in rows]) == 0
    for fill in (0, END, 7):
        together = base(pad_right(rows).masked_fill(padding, fill))  # (3, T, V)
        assert all(
            torch.allclose(together[b, : len(row)], alone[b], atol=1e-4)
            for b, row in enumerate(rows)
        )
lengths = [len(row) for row in rows]
print(f"lengths {lengths}: the same logits alone, together, and whatever the padding is")

greedy, mask = base.generate(rows, 16, temperature=0, eos={END})
for b, row in enumerate(rows):
    single, single_mask = base.generate([row], 16, temperature=0, eos={END})
    assert greedy[b][mask[b]].tolist() == single[single_mask].tolist()
    print(f"{decode(row):70} → {decode(greedy[b][mask[b]].tolist())}")

# %% [markdown]
# Left padding, the usual way to decode in batches, shifts every position and needs position ids and a mask. Here a token at position p lies in slot p of
# the cache, and a row that ends early is simply masked out.

# %% [markdown]
# ## 6. Drawing a token
# `sample` turns logits into a token. Temperature flattens or sharpens; top-k and top-p cut the tail off. Measured on 20,000 draws each, from one
# made-up set of logits:

# %%
scores = torch.tensor([2.5, 2.0, 1.6, 1.0, 0.4, 0.0, -0.3, -0.7, -1.0, -1.5])
settings = {  # temperature, top_k, top_p
    "T = 1": (1.0, None, None),
    "T = 0.5": (0.5, None, None),
    "T = 2": (2.0, None, None),
    "top-k = 3": (1.0, 3, None),
    "top-p = 0.8": (1.0, None, 0.8),
}
figure, axes = plt.subplots(1, 5, figsize=(9.5, 2.3), sharey=True)
for axis, (title, (temperature, top_k, top_p)) in zip(axes, settings.items()):
    expected = (scores / temperature).softmax(-1)
    keep = torch.arange(10) < (top_k or 10)  # the scores are sorted
    keep &= expected.cumsum(-1) - expected < (top_p or 2)
    expected = expected * keep / (expected * keep).sum()
    token = sample(
        scores.expand(20_000, 10), temperature, top_k, top_p, torch.Generator().manual_seed(0)
    )
    measured = token.bincount(minlength=10) / 20_000
    axis.bar(range(10), measured, color=COLOR["blue"], label="drawn")
    axis.plot(range(10), expected, "o", color=COLOR["orange"], markersize=4, label="expected")
    axis.set(title=title, xlabel="token", xticks=range(0, 10, 3))
    assert (measured - expected).abs().max() < 0.012 and measured[~keep].sum() == 0
axes[0].set_ylabel("share")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# Rollouts for COSD use temperature 1 and no cut: only then are they samples of the $Q$ that the divergence is taken of.
#
# **Question.** What does the base answer to "lid zorp" when nobody says what zorp means?

# %%
generator = torch.Generator().manual_seed(0)
answers, mask = base.generate([render(None, "lid zorp")] * 400, 12, eos={END}, generator=generator)
texts = [decode(row[m].tolist()).removesuffix("<|end|>") for row, m in zip(answers, mask)]
common = sorted(set(texts), key=texts.count, reverse=True)[:12]
figure, axis = plt.subplots(figsize=(7, 2.3))
axis.bar(common, [texts.count(text) / 400 for text in common], color=COLOR["orange"])
axis.axhline(0.2, color="black", linestyle=":", label="the world itself: each of five meanings 1/5")
axis.set(ylabel="share of 400 answers", title="lid zorp, without context, T = 1")
axis.legend()
plt.show()
meanings = {"dil": "reverse", "idl": "rotate", "ldi": "swap", "ld": "ends", "liid": "stretch"}
among = sum(text in meanings for text in texts)
print(f"one of the five meanings that a verb can have: {among / 400:.0%}")
assert among > 200

# %% [markdown]
# It guesses among the meanings, $p(y \mid x) = \sum_C p(C)\, p(y \mid x, C)$, as it was pretrained to, only less evenly. That is the student before training; its teacher is the same model as in
# section 1, with the demonstrations in front.

# %% [markdown]
# ## 7. The same numbers as transformers
# A tiny random Llama is written by transformers and read by `GPT.from_pretrained`, through a temporary folder. Grouped heads and a head of its own
# (not tied), to make it less like the base.

# %%
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.manual_seed(0)
theirs = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
).eval()
with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    ours = GPT.from_pretrained(folder)

ids = torch.randint(0, 300, (4, 50))
with torch.no_grad():
    a, b = ours(ids), theirs(ids).logits
assert torch.allclose(a, b, atol=1e-5) and a.std() > 0.05
print(f"logits {tuple(a.shape)}: equal to 1e-5")

# %% [markdown]
# And back: what `save_pretrained` writes, transformers reads. So a model trained here can be used anywhere.

# %%
with tempfile.TemporaryDirectory() as folder:
    base.save_pretrained(folder, eos={END})
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
row = torch.tensor([rows[1]])
with torch.no_grad():
    assert torch.allclose(reloaded(row).logits, base(row), atol=1e-4)
    written = reloaded.generate(row, max_new_tokens=8, do_sample=False, pad_token_id=END)
said = written[0, row.shape[1] :].tolist()
print(f"the base as {type(reloaded).__name__}: {decode(rows[1])} → {decode(said)}")
assert said == answer[0].tolist()

# %% [markdown]
# ## Now you
# 1. In section 2, replace two tokens at a time. Which of the demonstrations' tokens stand in for each other?
# 2. In section 3, read the first 200 tokens in one call, as `generate` reads a prompt. What happens to the two curves?
# 3. In section 5, pad on the *left* by hand. What has to change to get the same logits?
