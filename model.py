"""One decoder-only GPT: the student, the teacher and the base are all instances of the class `GPT`.

It covers GPT-2 (LayerNorm, learned positions, GELU, biases, tied head) and the Llama / Qwen family
(RMSNorm, rotary positions, SwiGLU, grouped-query heads, q/k norm); each difference is one field of
`GPTConfig`. What the config cannot represent is refused by name, never approximated. Weights are
read from safetensors and written back exactly. Left out: dropout, mixture of experts, sliding
windows, quantization, multiple devices.

Four ideas carry the file:
  hidden, then project   `hidden` gives (B, T, D); only the positions that need a prediction go
                         through `head`.
  slot = position        The KV cache keeps the token at position p in slot p. Prompts of different
                         lengths are padded on the right; a pad sits in a slot that no query may see
                         until a real token has overwritten it: no position ids, no padding mask.
  shared prefix          A context that all rows share is read once, as one row.
  adapters               LoRA adds two factors to a `Linear`; without them the model is its base.

Dimension key
  B batch   T tokens in this call   S cache slots   P tokens of the shared prefix   V vocabulary
  D model width   F MLP width   E head width   H query heads   K key/value heads
  G = H/K query heads per key head
  r rank of the adapters
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------- config
CHOICES = {
    "norm": ("rms", "layer"),
    "positions": ("rotary", "learned"),
    "mlp": ("swiglu", "gelu", "gelu_tanh"),
}


@dataclass(frozen=True)
class GPTConfig:
    """The defaults are the small Llama-like model of the built-in world (0.7 M parameters)."""

    vocab_size: int
    n_layer: int = 3
    d_model: int = 128
    n_head: int = 4
    n_kv_head: int = 4  # fewer than n_head: grouped-query attention
    head_dim: int = 32  # need not be d_model / n_head
    d_ff: int = 384
    max_len: int = 512  # position limit: shared prefix + prompt + completion
    norm: str = "rms"
    norm_eps: float = 1e-5
    positions: str = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    mlp: str = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's query and key (Qwen3)
    tied: bool = True  # the head is the embedding, transposed

    def __post_init__(self):
        if min(astuple(self)[:8]) < 1:  # from vocab_size to max_len
            raise ValueError(f"every size must be at least 1: {self}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"GPTConfig.{name}={getattr(self, name)!r}: choose from {choices}")
        if self.n_head % self.n_kv_head or (self.positions == "rotary" and self.head_dim % 2):
            raise ValueError("n_head must be a multiple of n_kv_head and a rotary head_dim even")
        if self.rope_scaling and self.rope_scaling["rope_type"] not in ("linear", "llama3"):
            raise ValueError(f"rope_scaling={self.rope_scaling}: neither linear nor llama3")

    def n_params(self) -> int:
        """The number of parameters; no memory is allocated for them."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in GPT(self).parameters())


# ----------------------------------------------------------------------------------------- KV cache
class KVCache:
    """Keys and values of the tokens read so far, for decoding and for continuing a shared prefix.

    Row b's token at position p is in slot p; a query at position p sees the slots <= p. So anything
    beyond a row's own position (padding, say) is invisible, and is overwritten as the row grows.
    The first call fills the cache, and gradient flows through the stored keys and values, also from
    the rows into a shared prefix. Then there is room for `room` more tokens, which are written in
    place, without gradient; every step attends to all slots, so that its shapes never change.
    `prefix` is another cache with a single row (see `GPT.read`); slots then count from its end.
    """

    def __init__(self, config: GPTConfig, room: int = 0, prefix: KVCache | None = None):
        self.room, self.prefix, self.group = room, prefix, config.n_head // config.n_kv_head
        self.keys = [None] * config.n_layer  # each (B, K, S, E)
        self.values = [None] * config.n_layer
        self.offset = prefix.capacity if prefix else 0  # positions taken by the prefix
        self.capacity = 0  # S, known after the first call
        self.length = None  # (B,), tokens read so far

    def advance(self, ids: Tensor, dtype) -> Tensor:
        """The slots of these tokens, (B or 1, T). Slots and bias (which slots a token may see) are
        the same for all layers, so they are computed here, once."""
        (B, T), device = ids.shape, ids.device
        slots, S = torch.arange(T, device=device)[None], T  # (1, T)
        self.filling = self.length is None
        if self.filling:
            self.length = torch.zeros(B, dtype=torch.long, device=device)
            self.capacity = T + self.room
        else:
            slots, S = slots + self.length[:, None], self.capacity  # (B, T): rows differ in length
        self.length += T
        self.slots, self.bias = slots, None  # a first call without a prefix is plainly causal
        if self.prefix or not self.filling:
            keys = torch.arange(-self.offset, S, device=device)  # (P + S,); the prefix is below 0
            later = keys > slots[..., None]  # (B or 1, T, P + S)
            bias = torch.zeros(later.shape, dtype=dtype, device=device)
            bias = bias.masked_fill(later, float("-inf"))[:, None]
            self.bias = bias.repeat(1, 1, self.group, 1)  # (B or 1, 1, G T, P + S)
        return slots

    def attend(self, layer: int, q, k, v) -> Tensor:
        """Store this call's k, v (B, K, T, E); attend with q (B, H, T, E) -> (B, H, T, E)."""
        if self.filling:
            self.keys[layer] = F.pad(k, (0, 0, 0, self.room))  # (B, K, S, E)
            self.values[layer] = F.pad(v, (0, 0, 0, self.room))
        else:
            where = self.slots[:, None, :, None].expand_as(k)
            k = self.keys[layer].scatter_(2, where, k)  # (B, K, S, E)
            v = self.values[layer].scatter_(2, where, v)
        if self.bias is None:
            return attend(q, k, v)
        # With a bias the kernels do not support grouped heads, so the G query heads of a key head
        # become G times as many queries, (B, K, G T, E).
        out = q.reshape(*k.shape[:2], -1, k.shape[3])
        if self.prefix:
            out = attend_with_prefix(out, self.prefix, layer, k, v, self.bias)
        else:
            out = attend(out, k, v, self.bias)
        return out.reshape(q.shape)


def attend(q, k, v, bias=None):
    """PyTorch's fused attention of q (B, H, T, E) to k, v (B, K, S, E) -> (B, H, T, E): causal, or
    with `bias` (B or 1, 1, T, S), 0 or −∞, added to the scores.

    Without a bias PyTorch can use flash attention. With one, in fp32, or on an older card it uses
    the memory-efficient kernel, which needs as many key heads as query heads; with fewer PyTorch
    would fall back to plain products that keep all scores. So the key heads are repeated here.
    """
    if q.device.type == "cpu" and q.dtype.itemsize == 2 and torch.is_grad_enabled():
        bias = None if bias is None else bias.float()  # half precision is six times slower here
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), bias).to(q.dtype)
    G = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, G, -1, -1).flatten(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)


def attend_with_prefix(q, prefix, layer, k, v, bias):
    """Attention over [shared prefix ; own slots], equal to attention over their concatenation.

    q (B, K, G T, E); the prefix's keys and values (1, K, P, E); k, v (B, K, S, E); bias
    (B or 1, 1, G T, P + S) -> (B, K, G T, E).
    With gradient this is the plain version: every row gets a copy of the prefix, and the fused
    kernel keeps no scores for the backward pass. Without gradient nothing is copied: the queries of
    all rows attend to the one prefix together.
    """
    prefix_k, prefix_v, P = prefix.keys[layer], prefix.values[layer], prefix.capacity
    if torch.is_grad_enabled():
        k = torch.cat([prefix_k.expand(len(k), -1, -1, -1), k], dim=2)  # (B, K, P + S, E)
        v = torch.cat([prefix_v.expand(len(v), -1, -1, -1), v], dim=2)
        return attend(q, k, v, bias)
    q = q / math.sqrt(q.shape[-1])
    to_prefix = torch.einsum("bkme,kpe->bkmp", q, prefix_k[0])
    scores = torch.cat([to_prefix, q @ k.mT], dim=-1) + bias  # (B, K, G T, P + S)
    weights = scores.softmax(-1)
    on_prefix = torch.einsum("bkmp,kpe->bkme", weights[..., :P], prefix_v[0])
    return on_prefix + weights[..., P:] @ v


# ---------------------------------------------------------------------------------------- the model
def rotary_frequencies(config):
    """Angle per position of each pair of dimensions, (E/2,). Scalings: `linear` stretches all
    wavelengths; `llama3` stretches the long ones, keeps the short ones and blends in between (Llama
    3.1)."""
    pairs = torch.arange(0, config.head_dim, 2, device="cpu").float()
    freq = config.rope_theta ** (-pairs / config.head_dim)
    scaling = config.rope_scaling or {"rope_type": "linear", "factor": 1}
    stretched = freq / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return stretched
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    turns = original * freq / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * stretched


def rotate(x, cos, sin):
    """Turn (a, b), the two halves of each head, to (a cos − b sin, b cos + a sin), in fp32 as cos
    and sin are. x (B, H, T, E); cos (B or 1, 1, T, E), sin likewise with its first half negated."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (b, a)
    return (x * cos + swapped * sin).to(x.dtype)


def low(x):
    """x as autocast would cast it for each product, but cast once for all products that use it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def make_norm(config):
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.d_model, config.norm_eps)


class Linear(nn.Linear):
    """y = W x + b, and with adapters (LoRA, arXiv:2106.09685) + (α/r) B A x: see `add_adapters`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.A = self.B = self.scale = None  # with adapters: (r, in), (out, r), α/r

    def forward(self, x):
        y = super().forward(x)
        if self.A is None:
            return y
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.A.dtype)
        return torch.add(y, F.linear(F.linear(x, self.A), self.B).to(y.dtype), alpha=self.scale)

    def merged(self):
        """W + (α/r) B A in fp32, the adapters' dtype: a base's bf16 would lose small changes."""
        if self.A is None:
            return self.weight
        return self.weight.to(self.A.dtype) + self.scale * self.B @ self.A


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, E, self.head_dim = config.d_model, config.head_dim, config.head_dim
        self.q = Linear(D, config.n_head * E, config.qkv_bias)
        self.k = Linear(D, config.n_kv_head * E, config.qkv_bias)
        self.v = Linear(D, config.n_kv_head * E, config.qkv_bias)
        self.out = Linear(config.n_head * E, D, config.out_bias)
        norms = (nn.RMSNorm(E, config.norm_eps) if config.qk_norm else None for _ in "qk")
        self.q_norm, self.k_norm = norms

    def forward(self, x, rope, cache, layer):  # x (B, T, D)
        q, k, v = (  # (B, H, T, E), (B, K, T, E) twice
            proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q, self.k, self.v)
        )
        if self.q_norm:  # under autocast the heads are half precision, the norm's weight is not
            exact = self.q_norm.weight.dtype
            q, k = self.q_norm(q.to(exact)).to(v.dtype), self.k_norm(k.to(exact)).to(v.dtype)
        if rope:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = cache.attend(layer, q, k, v) if cache else attend(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, width, bias = config.d_model, config.d_ff, config.mlp_bias
        self.gate = Linear(D, width, bias) if config.mlp == "swiglu" else None
        self.up = Linear(D, width, bias)
        self.down = Linear(width, D, bias)
        self.gelu = nn.GELU(approximate="tanh" if config.mlp == "gelu_tanh" else "none")

    def forward(self, x):
        if self.gate:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(self.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attention, self.mlp = Attention(config), MLP(config)

    def forward(self, x, *where):
        x = x + self.attention(low(self.norm1(x)), *where)
        return x + self.mlp(low(self.norm2(x)))


class Head(nn.Linear):
    """Logits in fp32 also under autocast: rounding them to bf16 would change the gradient of a
    divergence by several percent, and by half near its optimum."""

    def forward(self, h):
        with torch.autocast(h.device.type, enabled=False):
            return super().forward(h.to(self.weight.dtype))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.source = None  # of a loaded model: the transformers config that it came with
        self.checkpointing = False  # True: blocks are recomputed in the backward pass
        self.frequencies = rotary_frequencies(config)  # no buffer: `bfloat16()` must not round it
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.embed_position = nn.Embedding(config.max_len, config.d_model) if learned else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = Head(config.d_model, config.vocab_size, False)
        if config.tied:
            self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # GPT-2's init: std 0.02 at width 768, less on residual outputs
                std = 0.55 / math.sqrt(config.d_model)
                if name.endswith(("out.weight", "down.weight")):
                    std /= math.sqrt(2 * config.n_layer)
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def adapted(self) -> bool:
        return any(name.endswith(".A") for name, _ in self.named_parameters())

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V); the logits at t predict token t + 1."""
        return self.head(self.hidden(ids, cache))

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) -> states after the final norm (B, T, D): `head` turns the chosen ones into
        logits.

        With a cache, ids continue each row where it ended, and the cache advances by T. Only the
        call that fills the cache may have gradient; later ones need no_grad.
        """
        (_, T), device = ids.shape, ids.device
        x = self.embed(ids)  # (B, T, D)
        positions, end = torch.arange(T, device=device)[None], T  # (1, T)
        if cache:
            if torch.is_grad_enabled() and cache.length is not None:
                raise RuntimeError("a KV cache grows in place: use torch.no_grad()")
            positions = cache.advance(ids, low(x).dtype) + cache.offset  # (B or 1, T)
            end = cache.offset + cache.capacity
        if end > self.config.max_len:
            raise ValueError(f"{end} positions exceed the model's limit of {self.config.max_len}")
        rope = None
        if self.embed_position:
            x = x + self.embed_position(positions)
        else:
            self.frequencies = self.frequencies.to(device)
            angles = (positions[..., None] * self.frequencies)[:, None]  # (B or 1, 1, T, E/2), fp32
            cos, sin = angles.cos(), angles.sin()
            rope = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        for layer, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():  # not while decoding
                x = checkpoint(block, x, rope, cache, layer, use_reentrant=False)
            else:
                x = block(x, rope, cache, layer)
        return self.norm(x)

    def read(self, ids: Sequence[int]) -> KVCache:
        """Read a context once -> a cache, to pass as `prefix` for any batch that starts with it."""
        cache = KVCache(self.config)
        self.hidden(torch.tensor([list(ids)], device=self.device), cache)
        return cache

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: Collection[int] = (),
        generator: torch.Generator | None = None,
        prefix: KVCache | None = None,
        captured: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Continue each prompt -> (ids, mask), both (B, N) with N <= max_new_tokens.

        A row ends at its first token in `eos`; `mask` is True up to and including it, False after.
        Temperature 0 is greedy; then a row's tokens do not depend on the rest of the batch.
        Sampling is reproducible from `generator`. Adapters are merged first. With `prefix`, every
        prompt continues that shared context; without it, a beginning that all prompts share (a
        system turn, say) is found and read once. `captured`: see `capture`.
        """
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("generate needs at least one prompt, and a token in each")
        outside = not 0 < (top_p or 1) <= 1 or (top_k or 1) < 1 or 0 in (top_k, top_p)
        if max_new_tokens < 1 or temperature < 0 or outside:
            raise ValueError("generate: max_new_tokens, temperature, top_k or top_p out of range")
        device, model = self.device, self
        if self.adapted and not self.checkpointing:  # with checkpointing, memory comes before speed
            model = merged_view(self)
        if prefix is None and (common := common_beginning(prompts)):
            prefix, prompts = model.read(common), [p[len(common) :] for p in prompts]
        ids = pad_right(prompts).to(device)
        B, L = ids.shape
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        eos_ids = torch.tensor(sorted(eos), dtype=torch.long, device=device)
        cache = KVCache(self.config, max_new_tokens - 1, prefix)  # the last token is not read
        states = model.hidden(ids, cache)  # (B, L, D)
        logits = model.head(states[torch.arange(B, device=device), lengths - 1])  # (B, V)
        cache.length = lengths  # the padding is forgotten: its slots will be overwritten
        step = partial(model.step, cache=cache)
        running = torch.ones_like(lengths, dtype=torch.bool)
        patience = 1 if device.type == "cpu" else 8  # asking a GPU means waiting for it
        tokens, mask = [], []
        while True:
            token = sample(logits, temperature, top_k, top_p, generator)  # (B,)
            tokens.append(token * running)  # rows that have ended are filled with 0
            mask.append(running)
            running = running & ~torch.isin(token, eos_ids)
            count = len(tokens)
            if count == max_new_tokens or (count % patience == 0 and not running.any()):
                return torch.stack(tokens, dim=1), torch.stack(mask, dim=1)
            logits = step(tokens[-1])
            if captured and count == 1:  # the first step has warmed up
                step = capture(step, token)

    def step(self, token: Tensor, cache: KVCache) -> Tensor:
        """Read one token of every row, (B,) -> logits of the next, (B, V)."""
        return self.head(self.hidden(token[:, None], cache)[:, 0])

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32) -> GPT:
        """Load a GPT-2, Llama, Mistral, Qwen2 or Qwen3 checkpoint by folder or hub name; others are
        refused by name. Reads safetensors without a second copy; never pickles or remote code. A
        missing or an unexpected weight is an error."""
        config = read_config(folder)  # refuses before any weight is read
        theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        # transformers only warns about missing weights, and initialises them at random
        for kind, names in found.items():
            # old GPT-2 files contain one more buffer
            if names := sorted(name for name in names if "attn.masked_bias" not in name):
                raise ValueError(f"{folder}: {kind}: {names[:3]}")
        weights = {}
        for name, tensor in theirs.state_dict().items():
            if not torch.stack(tensor.aminmax()).isfinite().all():
                raise ValueError(f"{folder}: {name} holds a weight that is not a finite number")
            if ".c_" in name:  # GPT-2 stores its matrices transposed, and q, k, v as one
                tensor = tensor.t().contiguous()
            ours = our_names(name)
            weights.update(zip(ours, tensor.chunk(len(ours))))
        if config.tied and not torch.equal(weights["head.weight"], weights["embed.weight"]):
            raise ValueError(f"{folder}: the head is tied, but its matrix is not the embedding's")
        return assemble(config, weights, theirs.config).requires_grad_(True)

    @torch.no_grad()
    def save_pretrained(self, folder: str, eos: Collection[int] = ()):
        """Write a checkpoint for `AutoModelForCausalLM.from_pretrained(folder)` and vLLM, in the
        model's own dtype; adapters are merged in, in fp32."""
        os.makedirs(folder, exist_ok=True)
        theirs, weights = their_model(self), dict(merged_weights(self))
        adapted = len(weights) < len(list(self.parameters()))
        dtype = torch.float32 if adapted else self.embed.weight.dtype
        weights.setdefault("head.weight", weights["embed.weight"])
        state = {}
        for name in theirs.state_dict():
            tensor = torch.cat([weights[ours] for ours in our_names(name)])
            tensor = tensor.t() if ".c_" in name else tensor
            state[name] = tensor.to("cpu", dtype).contiguous()  # no second copy on the device
        theirs.load_state_dict(state, assign=True)
        theirs.tie_weights()
        theirs.generation_config = transformers.GenerationConfig(eos_token_id=sorted(eos) or None)
        if self.config.positions == "rotary":  # transformers 4 reads these, 5 its rope_parameters
            rope = {name: getattr(self.config, name) for name in ("rope_theta", "rope_scaling")}
            vars(theirs.config).update(rope)
        theirs.save_pretrained(folder)


def sample(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> token (B,). With top_k or top_p the policy is no longer the model's own."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(descending=True)
        outside = probs.cumsum(-1) - probs >= top_p  # (B, V) sorted; the token that crosses stays
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    probs = logits.softmax(-1)
    reached = probs.cumsum(-1).masked_fill(probs == 0, 0)  # (B, V); 0 is below every threshold
    uniform = 1 - torch.rand(len(probs), 1, device=probs.device, generator=generator)  # in (0, 1]
    threshold = uniform * reached.amax(-1, keepdim=True)  # (B, 1); multinomial would draw (B, V)
    return (reached >= threshold).int().argmax(-1)  # the first that reaches it


def capture(step, token):
    """A decode step with a single launch: on CUDA a graph, recorded here and then replayed;
    elsewhere torch.compile. A small model's step is a thousand kernels of a few microseconds, and
    launching a kernel takes as long. Shapes never change, and all state is in tensors."""
    if token.device.type != "cuda":
        return torch.compile(step)
    graph, token = torch.cuda.CUDAGraph(), token.clone()
    with torch.cuda.graph(graph):
        logits = step(token)

    def replay(new_token):
        token.copy_(new_token)
        graph.replay()
        return logits

    return replay


def common_beginning(prompts):
    """The tokens that all prompts begin with, to be read once; at least one per prompt remains."""
    common = os.path.commonprefix(prompts)[: min(map(len, prompts)) - 1]
    return common if len(prompts) > 1 and len(common) >= 16 else []  # fewer are not worth a pass


def pad_right(rows: Sequence[Sequence[int]]) -> Tensor:
    """Ragged rows -> (B, longest), padded with 0 on the right, where no causal query sees it."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


# --------------------------------------------------------------------------------- devices, weights
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str, dtype: str):
    """Names as on the command line -> (device, dtype, autocast). Weights stay fp32; autocast lowers
    the precision per operation. Device "auto" is CUDA, else MPS, else the CPU. Dtype "auto" is fp32
    except on CUDA: there bf16, which needs no scaler, or fp16 on a card without bf16."""
    if name == "auto":
        found = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator() if found else "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise OSError(f"--device {name} cannot be used here: {error}") from None
    low = DTYPES.get(dtype, torch.float32)
    if dtype == "auto" and device.type == "cuda":  # a T4 has only fp16
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        low = torch.bfloat16 if has_bf16 else torch.float16
    return device, low, partial(torch.autocast, device.type, dtype=low, enabled=low.itemsize < 4)


def trained(model: GPT) -> dict[str, Tensor]:
    """The parameters that are trained, all that a checkpoint needs; with adapters, only these."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_weights(model: GPT, weights: dict[str, Tensor]):
    """The reverse of `trained`: copy the weights into the model. A missing one is a KeyError."""
    for name, parameter in trained(model).items():
        parameter.copy_(weights[name])


# ----------------------------------------------------------------- other models of the same weights
def assemble(config, weights, source=None):
    """A frozen GPT whose parameters are these very tensors: nothing is copied or initialised."""
    with torch.device("meta"):
        model = GPT(config).requires_grad_(False)
    model.load_state_dict({"head.weight": weights["embed.weight"], **weights}, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    model.source = source
    return model


def add_adapters(model: GPT, rank: int, alpha: float | None = None):
    """Freeze the model and train a rank-r change of every matrix in the blocks instead:
    W x + (α/r) B A x, in fp32.

    A is initialised at random and B with zeros, so the model's outputs are unchanged at first. α is
    2r unless it is given. The base's weights never change, so a frozen teacher can share them: see
    `without_adapters`.
    """
    if rank < 1:
        raise ValueError(f"adapters of rank {rank}: the rank must be at least 1")
    model.requires_grad_(False)
    for layer in model.blocks.modules():
        if isinstance(layer, Linear):
            layer.A = nn.Parameter(torch.empty(rank, layer.in_features, device=model.device))
            layer.B = nn.Parameter(torch.zeros(layer.out_features, rank, device=model.device))
            layer.scale = 2.0 if alpha is None else alpha / rank
            nn.init.kaiming_uniform_(layer.A, a=math.sqrt(5))  # the paper's code: uniform in ±1/√in


def merged_weights(model: GPT, merge=True):
    """Yield (name, weight) of the base with adapters merged in; a tied head comes once."""
    for name, parameter in model.named_parameters():
        if not name.endswith((".A", ".B")):
            layer = model.get_submodule(name.rpartition(".")[0])
            folded = merge and isinstance(layer, Linear) and parameter is layer.weight
            yield name, layer.merged() if folded else parameter


def without_adapters(model: GPT) -> GPT:
    """The base under the adapters, as another GPT that holds the same Parameters."""
    weights = dict(merged_weights(model, merge=False))
    if any(parameter.requires_grad for parameter in weights.values()):
        raise ValueError("without_adapters: the base's weights must be frozen")
    return assemble(model.config, weights, model.source)


@torch.no_grad()
def merged_copy(model: GPT) -> GPT:
    """A frozen copy of the model, with adapters merged in, in fp32 or better."""
    dtype = torch.promote_types(model.embed.weight.dtype, torch.float32)
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in merged_weights(model)}
    return assemble(model.config, weights, model.source)


def merged_view(model: GPT) -> GPT:
    """The model with its adapters merged in, in the base's dtype, so that decoding costs no more
    than without them. Other weights are shared; merged ones do not follow later updates."""
    weights = {}
    for name, tensor in merged_weights(model):
        weights[name] = tensor.detach().to(model.get_parameter(name).dtype)
    return assemble(model.config, weights, model.source)


def low_precision_(model: GPT, dtype: torch.dtype):
    """Store the matrices of the blocks in `dtype`, which halves their memory. Run the model under
    autocast to that dtype, which would cast them at every use anyway: the outputs are the same bit
    for bit. For weights that are not trained."""
    for layer in model.blocks.modules():
        if isinstance(layer, Linear):
            layer.weight.data = layer.weight.data.to(dtype)


# ========================================================================= Hugging Face, in and out
SUPPORTED = "gpt2, llama, mistral (no active sliding window), qwen2, qwen3 (dense)"
NAMES = {  # parts of transformers' names -> ours, replaced in this order
    "transformer.": "",
    "model.": "",
    "embed_tokens": "embed",
    "wte": "embed",
    "wpe": "embed_position",
    "lm_head": "head",
    "layers.": "blocks.",
    "h.": "blocks.",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "ln_f": "norm",
    "ln_": "norm",
    "self_attn": "attention",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
    "o_proj": "out",
    "_proj": "",
}

SHAPES = {  # fields of GPTConfig -> of transformers' configs; GPT-2 has the first six
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_head": "num_attention_heads",
    "max_len": "max_position_embeddings",
    "tied": "tie_word_embeddings",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "qkv_bias": "attention_bias",
    "out_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}


def our_names(name):
    """Our names for one of transformers': three where GPT-2 holds q, k and v in one matrix."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return [name.replace("qkv", part) for part in "qkv"] if "qkv" in name else [name]


def our_config(hf) -> GPTConfig:
    """A transformers config -> ours; ValueError names what `GPT` cannot represent exactly."""

    def need(condition, what):
        if not condition:
            raise ValueError(f"{hf.model_type}: {what} is not supported. Supported: {SUPPORTED}")

    need(hf.model_type in ("gpt2", "llama", "mistral", "qwen2", "qwen3"), "this architecture")
    need(getattr(hf, "quantization_config", None) is None, "a quantized checkpoint")
    shapes = {
        "n_kv_head": hf.num_attention_heads,
        "head_dim": hf.hidden_size // hf.num_attention_heads,
    }
    for ours, theirs in SHAPES.items():
        if (value := getattr(hf, theirs, None)) is not None:
            shapes[ours] = value
    if hf.model_type == "gpt2":
        scaled = hf.scale_attn_weights and not hf.scale_attn_by_inverse_layer_idx
        need(scaled, "another scaling of the attention scores")
        need(not hf.add_cross_attention, "cross-attention")
        tanh = hf.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        shapes |= dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
        return GPTConfig(
            **shapes,
            d_ff=hf.n_inner or 4 * hf.n_embd,
            norm="layer",
            norm_eps=hf.layer_norm_epsilon,
            positions="learned",
            mlp="gelu_tanh" if tanh else hf.activation_function,
        )
    need(hf.hidden_act in ("silu", "swish"), f"activation {hf.hidden_act!r}")
    window = getattr(hf, "sliding_window", None) or hf.max_position_embeddings
    need(window >= hf.max_position_embeddings, "an active sliding window")
    rope = {"rope_type": "default", **hf.rope_parameters}
    need(rope.get("partial_rotary_factor", 1.0) == 1.0, "a partial rotary embedding")
    if hf.model_type == "qwen2":
        shapes["qkv_bias"] = True  # always, though its config does not say so
    return GPTConfig(
        **shapes,
        rope_theta=rope.pop("rope_theta"),
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        qk_norm=hf.model_type == "qwen3",
    )


def their_model(model: GPT) -> transformers.PreTrainedModel:
    """The same model in transformers, without weights: as it was loaded, or else a Llama, or with
    q/k norm a Qwen3."""
    c, hf = model.config, model.source
    if hf is None:
        hf = transformers.AutoConfig.for_model(
            "qwen3" if c.qk_norm else "llama",
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}
            | (c.rope_scaling or {}),
            bos_token_id=None,
            eos_token_id=None,
            **{theirs: getattr(c, ours) for ours, theirs in SHAPES.items()},
        )
        if our_config(hf) != c or (c.qk_norm and c.mlp_bias):  # it must represent every field
            raise ValueError("this GPTConfig fits no family of transformers: not Llama, not Qwen3")
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(hf)


def read_config(folder: str) -> GPTConfig:
    """The GPTConfig of a checkpoint, without reading its weights."""
    return our_config(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))
