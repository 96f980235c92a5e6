# %% [markdown]
# # 2. The model
#
# `model.py` holds one decoder-only GPT. This notebook takes it apart on the pretrained base of the built-in world: the way from token ids to logits with all shapes,
# what attention looks at, what the KV cache saves, how tokens are drawn, and why right padding needs no mask. At the end its logits are compared with those of
# transformers.

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
import random
import tempfile
import time

import figures
import torch

from contexts import END, VERBS, WORDS, decode, encode, render
from cosd import completion_states
from model import GPT, GPTConfig, KVCache, pad_right, rotate, sample
from train import Config, get_base

# %% [markdown]
# The base is found in `out/`; the first time it is pretrained, which takes three or four minutes.

# %%
cfg = Config(device="cpu")
base, name = get_base(cfg, "out")
c = base.config
print(f"{c.n_layer} blocks, width D = {c.d_model}, {c.n_head} heads of E = {c.head_dim}")
print(f"MLP width {c.d_ff}, V = {c.vocab_size} tokens")
print(f"{c.norm} norm, {c.positions} positions, {c.mlp}")

# %% [markdown]
# ## 1. From ids to logits
# The prompt shows two demonstrations of a new verb and then uses it.
#
# **Question.** What is the answer, and which tokens does the model have to compare in order to find it?

# %%
context, prompt = "mot zorp: tom; rav zorp: var", "lid zorp"
ids = render(context, prompt)
spelled = [decode([i]).replace(" ", "·") for i in ids]
print("│".join(spelled))
print(f"{len(ids)} tokens:", ids)

# %% [markdown]
# Every module below reports the shapes of what goes in and what comes out: (rows, tokens, width); the head gives (rows, tokens, vocabulary).

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
# Embedding and head are one matrix (`tied`). Each of the three blocks adds its findings to a stream of width D.
#
# **Question.** Where do most of the parameters sit?


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

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# In the MLPs, 64 %. Attention, of which one hears more, has 28 %; the vocabulary is so small here that embedding and head need only 8 %.
#
# </details>

# %% [markdown]
# The last position, the assistant header, holds the model's prediction of the first letter. Here it is with the two demonstrations and without them:

# %%
with torch.no_grad():
    without = base(torch.tensor([render(None, prompt)]))[0, -1].softmax(-1)
p = logits[0, -1].softmax(-1)
top = (p + without).topk(6).indices
axis = figures.panels(height=2.4)
both = {"teacher: with the demonstrations": p[top], "student: without them": without[top]}
figures.bars(axis, [decode([i]) for i in top.tolist()], both, ylabel="probability")
figures.label(axis, xlabel="first letter of the answer", title=f"what follows “{prompt}”")
assert decode([p.argmax().item()]) == "d" and p.max() > 0.9  # "zorp" reverses: lid -> dil

# %% [markdown]
# Final norm and head can be applied after *any* block: what would the model say if it stopped there? The figure shows its likeliest next token after each block,
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
spelled = [[figures.spell(decode([i])) for i in row] for row in token.tolist()]
axis = figures.panels(width=4.8, height=2.4)
columns = [figures.spell(decode([i])) for i in read]
rows = ["embedding", "block 0", "block 1", "block 2"]
figures.table(axis, best, rows, columns, spelled, title="likeliest next token (shade: probability)")
figures.label(axis, xlabel="token that is read", ylabel="last module that is used")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Before any block each token predicts itself, because head and embedding are one matrix. In this model the second letter and the end are the likeliest tokens after block 0 already; the first and the third letter
# only after block 1. Block 2 makes the model sure. To *find* letters in other places of the text is the work of attention, which comes next.
#
# </details>

# %% tags=["answer"]
assert token[0].tolist() == read and token[-1].tolist() == chat[len(ids) :]

# %% [markdown]
# ## 2. What attention looks at
# The weights are made of queries and keys: they are the softmax of $q \cdot k / \sqrt{E}$ over the past. Hooks catch what the model's own `q` and `k` put out, and `rotate`
# turns both by their positions. The softmax is written out here, so it is checked against the module: weights times values must give what `out` receives.
#
# The text is the same chat, followed by the model's answer.

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
# All heads are drawn below. Rows are the tokens that look, columns the tokens that they look at.

# %%
figures.attention_maps(weights)
assert (
    torch.allclose(weights.sum(-1), torch.ones(3, H, T), atol=1e-5) and weights.triu(1).max() == 0
)

# %% [markdown]
# The upper triangle is the future and stays dark. Diagonals are heads that look a fixed number of tokens back; bright dots elsewhere are heads that look
# something up.
#
# Where a head looks is not yet what the answer depends on, because what one block fetches, the next may read elsewhere. There is a blunt test: replace one token of the prompt
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

looks = weights[:, :, first, :first].flatten(0, 1)  # (12 heads, first)
tokens = [figures.spell(decode([i])) for i in ids[:-1]]
figures.looks_and_losses(tokens, looks, lost, decode([letter]))
assert decode([ids[first - 2]]) == "d" and lost[first - 2] > 0.9  # the d of "lid"

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# No. It depends fully on the d, but also on "zorp", which says that there is something to look up, and on the i, without which "lzd" is no word that the model has ever seen. The l can go: a reversed word begins
# with its last letter. In the demonstrations, the separators of the first and a letter of the second matter in part: a single token can often be missed, because another says the same.
# On which of them the model leans is the habit of this one base; a base from another seed has other habits.
#
# </details>

# %% [markdown]
# The demonstrations as a whole decide everything. Now let one of them, or both, show *rotate* (lid → idl) in place of *reverse* (lid → dil).
#
# **Question.** What does the model make of two demonstrations that contradict each other?

# %%
for one, other in [("tom", "var"), ("otm", "var"), ("tom", "avr"), ("otm", "avr")]:
    shown = f"mot zorp: {one}; rav zorp: {other}"
    with torch.no_grad():
        p = base(torch.tensor([render(shown, prompt)]))[0, -1].softmax(-1)
    print(f"{shown:32} d {p[encode('d')].item():.2f}   i {p[encode('i')].item():.2f}")

# %% [markdown]
# Is that a rule, or this one prompt? Here are 300 random words with random pairs of demonstrations, one of which reverses while the other rotates:

# %%
rng, contradictory, likes = random.Random(0), [], []
for _ in range(300):
    one, other, word = rng.sample(WORDS, 3)
    first_verb, second_verb = rng.sample(["reverse", "rotate"], 2)
    shown = f"{one} zorp: {VERBS[first_verb](one)}; {other} zorp: {VERBS[second_verb](other)}"
    contradictory.append(render(shown, f"{word} zorp"))
    likes.append((VERBS[first_verb](word), VERBS[second_verb](word)))
greedy, mask = base.generate(contradictory, 12, temperature=0, eos={END})
said = [decode(row[m].tolist()).removesuffix("<|end|>") for row, m in zip(greedy, mask)]
follows = {"the first demonstration": 0, "the second one": 0, "neither": 0}
for text, (as_first, as_second) in zip(said, likes):
    follows[
        {as_first: "the first demonstration", as_second: "the second one"}.get(text, "neither")
    ] += 1
print({who: f"{number / 300:.0%}" for who, number in follows.items()})

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# It follows the second one: in 85 % of the cases, and the first one never. In the remaining 15 % it answers neither. In pretraining both demonstrations always agreed, so looking at one of them was enough,
# and this model has learned to look at the last. The formula does not say what is right here: no context $C$ of the world contains a contradiction, so $p(y \mid x, C)$ is defined only by how the network happens to generalise.
# A teacher is reliable only in the contexts that it was trained to read.
#
# </details>

# %% [markdown]
# ## 3. The KV cache
# A token's keys and values do not depend on what comes later (attention is causal), so they are computed once and kept. `generate` reads the prompt in one
# call and then one token at a time. Here 400 tokens come one by one, as in decoding. The first way reads everything again for each of them; the second reads only the new token. The logits
# are the same.
#
# **Question.** How does the time for one new token grow with the length of the text, without the cache and with it? (The machine was busy with other work when this notebook was built: look at the shape and not at the milliseconds.)

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
median = [torch.tensor(s).unfold(0, 9, 1).median(-1).values for s in (slow_seconds, fast_seconds)]
curves = {"read everything again": 1000 * median[0], "KV cache": 1000 * median[1]}
axis = figures.panels(width=6)
figures.lines(axis, range(5, 397), curves, xlabel="tokens so far", ylim=(0, None))
figures.label(axis, ylabel="milliseconds per new token", title="a GPT of 4 layers, width 256")
print(f"400 tokens: {sum(slow_seconds):.1f} s without, {sum(fast_seconds):.1f} s with the cache")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Without the cache it grows with the length, so that the whole text costs the square of its length. With the cache it hardly grows: the matrix products are those of one token,
# and only attention still looks at all that came before.
#
# </details>

# %% [markdown]
# ## 4. A shared context is read once
# In types B and C all teacher prompts begin with the same context. `read` makes a cache of a single row, and any batch can go on from it. No copy per row is made:
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
# With a frozen teacher the middle line is paid once for a whole training run. After that, the cost of a step hardly depends on the length of the context.

# %% [markdown]
# ## 5. Right padding changes nothing
# Rows of different length are filled up on the right, where a causal model never looks. So neither what is filled in can matter, nor who else is in the batch:

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
# the cache, and a row that ends early is masked out.
#
# One line deserves a second look: the first row has no context, and the greedy answer to it is one meaning of "zorp" among five. Section 6 asks how the model chooses.

# %% [markdown]
# ## 6. Drawing a token
# `sample` turns logits into a token. Temperature flattens or sharpens; top-k and top-p cut the tail off. The figure counts 20,000 draws for each setting, from one
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
shown = {}
for title, (temperature, top_k, top_p) in settings.items():
    expected = (scores / temperature).softmax(-1)
    kept = torch.arange(10) < (top_k or 10)  # the scores are sorted
    kept &= expected.cumsum(-1) - expected < (top_p or 2)
    expected = expected * kept / (expected * kept).sum()
    generator = torch.Generator().manual_seed(0)
    token = sample(scores.expand(20_000, 10), temperature, top_k, top_p, generator)
    shown[title] = token.bincount(minlength=10) / 20_000, expected
    assert (shown[title][0] - expected).abs().max() < 0.012 and shown[title][0][~kept].sum() == 0
figures.sampled(shown)

# %% [markdown]
# Rollouts for COSD use temperature 1 and no cut: only then are they samples of the $Q$ that the divergence is taken of.
#
# ### What the base says when nobody tells it the meaning
# In pretraining a new verb has each of five meanings equally often, and the context that tells which is left out in a fifth of the cases. The best that a model can do
# without context is therefore the average over the contexts, $p(y \mid x) = \sum_C p(C)\, p(y \mid x, C)$: one fifth for each meaning.
#
# **Question.** Does this model give each of the five answers to "lid zorp" one fifth? Does it do so on average over all words?

# %%
generator = torch.Generator().manual_seed(0)
answers, mask = base.generate([render(None, "lid zorp")] * 400, 12, eos={END}, generator=generator)
texts = [decode(row[m].tolist()).removesuffix("<|end|>") for row, m in zip(answers, mask)]
common = sorted(set(texts), key=texts.count, reverse=True)[:9]
among = sum(text in [verb("lid") for verb in VERBS.values()] for text in texts) / 400
print(f"400 answers to “lid zorp”: {among:.0%} are one of the five meanings")

prompts = [render(None, f"{word} zorp") for word in WORDS for _ in VERBS]
y = [[*encode(verb(word)), END] for word in WORDS for verb in VERBS.values()]
ids, mask = pad_right(y), pad_right([[1] * len(row) for row in y]).bool()
with torch.no_grad():  # log p(y | x) of every meaning of every word, as in notebook 03
    log_p = base.head(completion_states(base, prompts, ids, mask)).log_softmax(-1)
log_p = log_p.gather(-1, ids[mask][:, None])[:, 0]
p = torch.zeros(len(y)).index_add(0, mask.nonzero()[:, 0], log_p).exp().view(len(WORDS), len(VERBS))
print("verb      lid    mean and standard deviation over all words")
for verb, of_lid, mean, std in zip(VERBS, p[WORDS.index("lid")], p.mean(0), p.std(0)):
    print(f"{verb:8} {of_lid:.2f}    {mean:.2f} ± {std:.2f}")
print(f"all five: {p.sum(1).mean():.2f}; the likeliest of the five: {p.max(1).values.mean():.2f}")
named = [
    f"{text}\n{ {verb('lid'): name for name, verb in VERBS.items()}.get(text, '–') }"
    for text in common
]
figures.meanings(
    (named, {"drawn": [texts.count(text) / 400 for text in common]}), p, list(VERBS), "lid"
)

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# Not for "lid": *rotate* has .47 and *reverse* .05. On average over all 660 words it nearly does: the five means lie between .17 and .20, and the missing .07 are answers that no meaning gives. The formula describes the
# best possible model, and pretraining was finite: each word was met with "zorp" and without context 2.7 times on average (2,000 steps × 96 draws × .28 of this kind × .2 without context, over 660 words and 6 new verbs), with whatever meanings chance gave it, and the network remembers some of that. So for a single word the likeliest
# meaning has .28 on average, and "lid" is one of the extreme words. When notebook 03 speaks of the average over contexts, it is this: right on average, uneven for a single prompt.
#
# </details>

# %% tags=["answer"]
assert among > 0.5 and ((p.mean(0) - 0.2).abs() < 0.05).all() and p[WORDS.index("lid")].max() > 0.3

# %% [markdown]
# This is the student before training. Its teacher is the same model as in section 1, with the demonstrations in front.

# %% [markdown]
# ## 7. The same numbers as transformers
# A tiny random Llama is written by transformers and read by `GPT.from_pretrained`, through a temporary folder. It has grouped heads and a head of its own
# (not tied to the embedding), to make it less like the base.

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
# It works in the other direction, too: what `save_pretrained` writes, transformers reads. So a model that was trained here can be used anywhere.

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
#
# Next: `03_four_contexts`, where this model plays two roles.

# %% [markdown] tags=["answer"]
# <details><summary>Answers</summary>
#
# 1. Look for pairs where replacing either token alone costs little and replacing both costs much: the letters of the two demonstrations that carry the same information, such as the first letters of
#    "tom" and "var", both of which say *reverse*. Which pairs they are depends on the seed of the base.
# 2. Without the cache nothing changes: every token still reads all of the text. With it, the first 200 tokens cost one pass, and the curve begins at token 200, as low as before. That pass is
#    much cheaper than 200 single ones, since a matrix product of 200 rows uses the processor better.
# 3. Positions have to count from the first real token and not from the start of the row, and attention must be told not to look at the padding (a mask). Right padding needs neither.
#
# </details>
