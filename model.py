"""One decoder-only GPT: the student, the teacher and the base are all instances of this file.

Wide enough to hold GPT-2 (LayerNorm, learned positions, GELU, biases, tied head) and the Llama / Qwen
family (RMSNorm, rotary positions, SwiGLU, grouped-query heads, q/k norm): each difference is one field of
`GPTConfig`. What the config cannot represent is refused by name, never approximated. Their weights come in from
safetensors and go out again, exactly. Left out: mixture of experts, sliding windows, quantization, several devices.

Four ideas carry the file:
  hidden, then project   `hidden` gives (B, T, D); only the positions that need a prediction go through `head`.
  slot = position        The KV cache keeps the token at position p in slot p. Prompts of different lengths are
                         padded on the right; a pad sits in a slot that no query may see until a real
                         token has overwritten it. No position ids, no padding mask.
  shared prefix          A context that all rows share is read once, as one row; only gradient or a short one is worth a copy per row.
  adapters               LoRA is two more factors in a `Linear`; switched off, the model is the base it started from.

Dimension key
  B batch   T tokens in this call   S cache slots   P tokens of the shared prefix   V vocabulary
  D model width   F MLP width   H query heads   K key/value heads   G = H/K query heads per key head   E head width
  r rank of the adapters
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


# ------------------------------------------------------------------------------------------------ config
ROPE_SCALINGS = {                                                      # type: what it needs to know
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


@dataclass(frozen=True)
class GPTConfig:
    """The defaults are the small modern variant that the built-in world uses (0.7 M parameters)."""

    vocab_size: int
    n_layer: int = 3
    d_model: int = 128
    n_head: int = 4
    n_kv_head: int = 4                     # fewer than n_head: grouped-query attention
    head_dim: int = 32                     # need not be d_model / n_head
    d_ff: int = 384
    max_len: int = 512                     # position limit: shared prefix + prompt + completion
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None       # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    mlp: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False                 # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False                  # RMSNorm over each head's query and key (Qwen3)
    tied: bool = True                      # the head is the embedding, transposed
    dropout: float = 0.0

    def __post_init__(self):
        hints = get_type_hints(GPTConfig)
        for field in fields(self):
            value, kind = getattr(self, field.name), hints[field.name]
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"GPTConfig.{field.name}={value!r} is not supported; "
                                 f"choose from {', '.join(get_args(kind))}")
            if kind is int and value < 1:
                raise ValueError(f"GPTConfig.{field.name}={value} must be at least 1")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"GPTConfig: n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"GPTConfig: rotary positions need an even head_dim, not {self.head_dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTConfig.dropout={self.dropout} must be in [0, 1)")
        if self.rope_scaling:
            kind = self.rope_scaling.get("rope_type")
            if kind not in ROPE_SCALINGS:
                raise ValueError(f"GPTConfig.rope_scaling type {kind!r} is not supported; choose from {', '.join(ROPE_SCALINGS)}")
            if missing := ROPE_SCALINGS[kind] - self.rope_scaling.keys():
                raise ValueError(f"GPTConfig.rope_scaling of type {kind} lacks {', '.join(sorted(missing))}")

    def n_params(self) -> int:
        """The parameter count as a formula; a test holds it against the module."""
        D, E, H, K, N = self.d_model, self.head_dim, self.n_head, self.n_kv_head, self.n_layer
        norm = D * (2 if self.norm == "layer" else 1)
        qkv = E * (H + 2 * K)
        attention = D * qkv + self.qkv_bias * qkv + H * E * D + self.out_bias * D + self.qk_norm * 2 * E
        mats = 3 if self.mlp == "swiglu" else 2
        mlp = mats * D * self.d_ff + self.mlp_bias * ((mats - 1) * self.d_ff + D)
        embeddings = self.vocab_size * D * (1 if self.tied else 2) + (self.positions == "learned") * self.max_len * D
        return embeddings + N * (attention + mlp + 2 * norm) + norm


# ---------------------------------------------------------------------------------------------- KV cache
class KVCache:
    """Keys and values of what has been read, for decoding and for continuing what several rows share.

    Row b's token at position p lies in slot p; a query at position p sees the slots <= p. So whatever lies
    beyond a row's own position (padding, say) is invisible, and is overwritten as the row grows.
    `prefix` is another cache of a single row (see `GPT.read`); the slots then count from its end.
    Growing a cache writes in place, without gradient. One that is filled by a single call keeps that call's own tensors:
    gradient flows through them, also from the rows into a shared prefix.
    """

    def __init__(self, config: GPTConfig, batch: int, capacity: int, prefix: KVCache | None = None):
        self.config, self.capacity, self.prefix = config, capacity, prefix
        self.keys: list[Tensor | None] = [None] * config.n_layer       # each (B, K, S, E)
        self.values: list[Tensor | None] = [None] * config.n_layer
        self.offset = prefix.used if prefix else 0                     # positions taken by the prefix
        self.length = torch.zeros(batch, dtype=torch.long)             # tokens read so far, per row
        self.used = 0                                                  # upper bound of length, known without a device sync

    def spread(self, batch: int, capacity: int) -> KVCache:
        """What this one row has read, as the beginning of `batch` rows that go on in a cache of their own."""
        cache = KVCache(self.config, batch, capacity)
        cache.keys, cache.values = ([F.pad(read.expand(batch, -1, -1, -1), (0, 0, 0, capacity - self.used)) for read in mine]
                                    for mine in (self.keys, self.values))
        cache.length, cache.used = self.length.repeat(batch), self.used
        return cache

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
        """Store this call's k, v (B, K, T, E) in `slots` (B, T), then attend q (B, H, T, E) to all visible slots."""
        if k.shape[2] == self.capacity:
            self.keys[layer], self.values[layer] = k, v
        else:
            if self.keys[layer] is None:
                shape = (k.shape[0], k.shape[1], self.capacity, k.shape[3])
                self.keys[layer], self.values[layer] = k.new_zeros(shape), v.new_zeros(shape)
            rows = torch.arange(k.shape[0], device=k.device)[:, None]  # (B, 1)  # q3: k and v go into self.keys and self.values of this layer
            self.keys[layer][rows, :, slots] = k.transpose(1, 2)       # (B, T, K, E)
            self.values[layer][rows, :, slots] = v.transpose(1, 2)
        keys, values = self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]  # q3: which slots may a query see?
        visible = torch.arange(self.used, device=k.device) <= slots[..., None]   # (B, T, S)
        if self.prefix is None:
            grouped = q.shape[1] != k.shape[1]
            return attend(q, keys, values, attn_mask=visible[:, None], enable_gqa=grouped)
        return attend_with_prefix(q, self.prefix.keys[layer], self.prefix.values[layer], keys, values, visible)


def attend(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
    """PyTorch's fused attention. Training on a CPU it runs in fp32: the half-precision backward pass takes six times as long there."""
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **how).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, **how)


def attend_with_prefix(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One softmax over [shared prefix ; own slots], equal to attention over their concatenation.

    q (B, H, T, E); prefix_k, prefix_v (1, K, P, E); k, v (B, K, S, E); visible (B, T, S) -> (B, H, T, E).
    The queries of all rows are laid side by side against the one prefix: a plain matrix product, no (B, K, P, E) copy.
    With gradient the copy is made: autograd would keep all scores, quadratic in length, where the fused kernel keeps none.
    """
    (B, H, T, E), K = q.shape, k.shape[1]
    if torch.is_grad_enabled():
        keys, values = (torch.cat([shared.expand(B, -1, -1, -1), own], dim=2) for shared, own in ((prefix_k, k), (prefix_v, v)))
        seen = torch.cat([visible.new_ones(*visible.shape[:2], prefix_k.shape[2]), visible], dim=2)     # (B or 1, T, P + S)
        return attend(q, keys, values, attn_mask=seen[:, None], enable_gqa=H != K)
    G = H // K
    q = q.reshape(B, K, G * T, E) / math.sqrt(E)                                        # head h uses key head h // G
    q_flat = q.transpose(0, 1).reshape(K, B * G * T, E)
    to_prefix = (q_flat @ prefix_k[0].transpose(-1, -2)).view(K, B, G * T, -1).transpose(0, 1)   # (B, K, GT, P)
    to_own = q @ k.transpose(-1, -2)                                                    # (B, K, GT, S)
    to_own = to_own.masked_fill(~visible.repeat(1, G, 1)[:, None], float("-inf"))
    scores = torch.cat([to_prefix, to_own], dim=-1)                                     # (B, K, GT, P + S)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    on_prefix, on_own = weights.split([prefix_k.shape[2], k.shape[2]], dim=-1)
    out = on_prefix.transpose(0, 1).reshape(K, B * G * T, -1) @ prefix_v[0]             # (K, B·GT, E)
    out = out.view(K, B, G * T, E).transpose(0, 1) + on_own @ v                         # (B, K, GT, E)
    return out.reshape(B, H, T, E)


# ---------------------------------------------------------------------------------------------- the model
def rotary_frequencies(config: GPTConfig) -> Tensor:
    """Angle per position of each pair of dimensions, (E/2,). Scalings: `linear` stretches all wavelengths;
    `llama3` stretches the long ones, keeps the short ones and blends in between (Llama 3.1)."""
    freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if scaling["rope_type"] == "linear":
        return freq / scaling["factor"]
    original, low, high = scaling["original_max_position_embeddings"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * freq / (2 * math.pi)                            # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / scaling["factor"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Hugging Face's Llama. x (B, H, T, E); cos, sin (B or 1, 1, T, E/2)."""
    a, b = x.chunk(2, dim=-1)                                          # fp32 from here: cos and sin are
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(width, eps=config.norm_eps)


class Linear(nn.Linear):
    """y = W x + b, and with adapters (LoRA, arXiv:2106.09685) + (α/r) B A x: see `add_adapters`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_parameter("A", None)                             # (r, in)
        self.register_parameter("B", None)                             # (out, r)
        self.scale, self.adapting = 0.0, True

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled():
            y = (self.weight @ x[:, 0].T).T[:, None]                   # decoding: W xᵀ takes two thirds of the time of x Wᵀ (CPU, bf16)
            y = y if self.bias is None else y + self.bias
        else:
            y = super().forward(x)
        if self.A is None or not self.adapting:
            return y
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.A.dtype)
        return torch.add(y, F.linear(F.linear(x, self.A), self.B).to(y.dtype), alpha=self.scale)

    def merged(self) -> Tensor:
        """W + (α/r) B A, with adapters in the adapters' dtype: rounded to a bf16 base's, small changes would be lost."""
        return self.weight if self.A is None else self.weight.to(self.A.dtype) + self.scale * self.B @ self.A


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        D, E, self.n_head, self.n_kv_head = config.d_model, config.head_dim, config.n_head, config.n_kv_head
        self.q = Linear(D, self.n_head * E, bias=config.qkv_bias)
        self.k = Linear(D, self.n_kv_head * E, bias=config.qkv_bias)
        self.v = Linear(D, self.n_kv_head * E, bias=config.qkv_bias)
        self.out = Linear(self.n_head * E, D, bias=config.out_bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(E, eps=config.norm_eps) if config.qk_norm else nn.Identity() for _ in "qk")
        self.dropout = config.dropout

    def forward(self, x: Tensor, rope: tuple | None, cache: KVCache | None, layer: int, slots: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q(x).view(B, T, self.n_head, -1)).transpose(1, 2)       # (B, H, T, E)
        k = self.k_norm(self.k(x).view(B, T, self.n_kv_head, -1)).transpose(1, 2)    # (B, K, T, E)
        v = self.v(x).view(B, T, self.n_kv_head, -1).transpose(1, 2)
        if rope:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache:
            y = cache.attend(layer, q, k, v, slots)
        else:
            dropout, grouped = self.dropout if self.training else 0.0, self.n_head != self.n_kv_head
            y = attend(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))                         # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        wide = partial(Linear, config.d_model, config.d_ff, bias=config.mlp_bias)
        self.gate = wide() if config.mlp == "swiglu" else None
        self.up, self.down = wide(), Linear(config.d_ff, config.d_model, bias=config.mlp_bias)
        self.gelu = nn.GELU(approximate="tanh" if config.mlp == "gelu_tanh" else "none")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x) if self.gate else self.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1, self.norm2 = make_norm(config, config.d_model), make_norm(config, config.d_model)
        self.attention, self.mlp = Attention(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *where) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), *where))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_position = nn.Embedding(config.max_len, config.d_model) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config, config.d_model)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.checkpointing = False                                     # True: blocks are computed again in the backward pass
        self.frequencies = rotary_frequencies(config)                  # no buffer: `model.bfloat16()` must not round the angles
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:                                    # GPT-2's init: 0.02 at width 768, residuals less
                std = 0.55 / math.sqrt(config.d_model)
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=std / math.sqrt(2 * config.n_layer) if residual else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V); the logits at t predict token t + 1."""
        return self.head(self.hidden(ids, cache))

    def hidden(self, ids: Tensor, cache: KVCache | None = None, embedded: Tensor | None = None) -> Tensor:
        """ids (B, T) -> states after the final norm (B, T, D): `head` turns the chosen ones into logits.

        With a cache ids continue each row where it stood, and the cache advances by T: under no_grad, unless this one
        call fills it. `embedded` (B, T, D) are the ids' embeddings where they have been looked up already.
        """
        if ids.dim() != 2:
            raise ValueError(f"ids must be (B, T), not {tuple(ids.shape)}")
        (B, T), device = ids.shape, ids.device
        offset, used = (cache.offset, cache.used) if cache else (0, 0)
        if (needed := offset + used + T) > self.config.max_len:
            raise ValueError(f"{needed} positions (shared prefix {offset}, read before {used}, new {T}) "
                             f"exceed the model's limit of {self.config.max_len} by {needed - self.config.max_len}")
        slots = torch.arange(T, device=device)[None]                   # (1, T)
        if cache:
            if torch.is_grad_enabled() and T != cache.capacity:
                raise RuntimeError("a growing KV cache is written in place: use it under torch.no_grad()")
            if used + T > cache.capacity:
                raise ValueError(f"the KV cache holds {cache.capacity} tokens per row, {used + T} needed")
            cache.length = cache.length.to(device)
            if used:
                slots = slots + cache.length[:, None]                  # (B, T): the rows have come to different lengths
            cache.used += T
        positions = slots + offset
        x = self.embed(ids) if embedded is None else embedded          # (B, T, D)
        rope = None
        if self.embed_position:
            x = x + self.embed_position(positions)
        else:
            self.frequencies = self.frequencies.to(device)
            angles = (positions[..., None] * self.frequencies)[:, None]   # (B or 1, 1, T, E/2), fp32
            rope = angles.cos(), angles.sin()
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():         # decoding has no gradient: it keeps its cache
                x = checkpoint(block, x, rope, cache, layer, slots, use_reentrant=False)
            else:
                x = block(x, rope, cache, layer, slots)
        if cache:
            cache.length = cache.length + T
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> GPT:
        """A GPT-2, Llama, Mistral, Qwen2 or Qwen3 checkpoint by hub name or folder; others are refused by name."""
        return load_pretrained(name_or_folder, dtype)

    def save_pretrained(self, folder: str | os.PathLike, tokenizer=None, eos: Collection[int] = ()) -> None:
        """Write what `AutoModelForCausalLM.from_pretrained(folder)` and vLLM read; adapters are folded in."""
        save_pretrained(self, folder, tokenizer, eos)

    def save_adapters(self, folder: str | os.PathLike, base: str = "") -> None:
        """Write the adapters alone, as PEFT and vLLM read them; `base` is the name of the model that they belong to."""
        save_adapters(self, folder, base)

    def read(self, ids: Sequence[int], embedded: Tensor | None = None) -> KVCache:
        """Read a context once: the cache to hand as `prefix` to any batch that starts with it."""
        cache = KVCache(self.config, 1, len(ids))
        self.hidden(torch.tensor([list(ids)], device=self.device), cache, embedded)
        return cache

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, eos: Collection[int] = (), generator: torch.Generator | None = None,
        prefix: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Continue each prompt -> (ids, mask), both (B, N) with N <= max_new_tokens.

        A row ends at its first token in `eos`; `mask` is True up to and including it, False after. Temperature 0 is
        greedy; then a row's tokens do not depend on the rest of the batch. Sampling is reproducible from `generator`.
        With `prefix`, every prompt continues that shared context; without, what all prompts begin with (a system turn,
        say) is found and read once. Dropout is off.
        """
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("generate needs at least one prompt, and a token in each")
        if max_new_tokens < 1 or temperature < 0 or not (top_k is None or top_k >= 1) or not (top_p is None or 0 < top_p <= 1):
            raise ValueError("generate: max_new_tokens >= 1, temperature >= 0, top_k >= 1 and 0 < top_p <= 1 are required, "
                             f"not {max_new_tokens}, {temperature}, {top_k}, {top_p}")
        device = self.device
        with evaluating(self):
            if prefix is None:
                common = common_beginning(prompts)
                prefix, prompts = self.read(common) if common else None, [p[len(common) :] for p in prompts]
            ids = pad_right(prompts).to(device)                        # (B, L)
            lengths = torch.tensor([len(p) for p in prompts], device=device)
            eos_ids = torch.tensor(sorted(eos), dtype=torch.long, device=device)
            B, L = ids.shape
            if prefix and prefix.used <= 256:                          # two attentions cost more than to read a short one per row
                cache = prefix.spread(B, prefix.used + L + max_new_tokens)
            else:
                cache = KVCache(self.config, B, L + max_new_tokens, prefix)
            start = cache.length.to(device)  # q3: read the prompts at once, forget the padding, then write a token at a time
            h = self.hidden(ids, cache)[torch.arange(B, device=device), lengths - 1][:, None]   # (B, 1, D) at each last token
            cache.length = start + lengths                             # the padding is forgotten: its slots will be overwritten
            running = torch.ones(B, dtype=torch.bool, device=device)
            tokens, mask = [], []
            while True:
                token = sample(self.head(h)[:, 0].float(), temperature, top_k, top_p, generator)  # (B,)
                tokens.append(token * running)                         # rows that have ended are filled with 0
                mask.append(running)
                running = running & ~torch.isin(token, eos_ids)
                if len(tokens) == max_new_tokens or not running.any():
                    return torch.stack(tokens, dim=1), torch.stack(mask, dim=1)
                h = self.hidden(tokens[-1][:, None], cache)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """logits (B, V) -> token (B,). top_k / top_p change the policy: rollouts are then off-policy for the divergence."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(dim=-1, descending=True)
        outside = probs.cumsum(-1) - probs >= top_p                    # (B, V) sorted; the token that crosses top_p stays in
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    cumulative = logits.softmax(-1).cumsum(-1)                         # (B, V); one uniform number a row picks the token:
    uniform = 1 - torch.rand(len(logits), 1, device=logits.device, generator=generator)   # in (0, 1], so never one of probability 0
    return (cumulative < uniform * cumulative[:, -1:]).sum(-1)         # torch.multinomial draws V numbers a row: far slower


def common_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with (a system turn, say), to be read once; a token of each is left over."""
    common = os.path.commonprefix([list(p) for p in prompts])[: min(map(len, prompts)) - 1]
    return common if len(prompts) > 1 and len(common) >= 16 else []    # fewer are not worth a pass of their own


def pad_right(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Ragged rows -> (B, longest), filled on the right. What the fill is does not matter: no causal query sees it."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`with evaluating(model)`: dropout off inside, the previous mode restored after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ------------------------------------------------------------------------------------------ adapters (LoRA)
TARGETS = ("q", "k", "v", "out", "gate", "up", "down")


def add_adapters(model: GPT, rank: int, alpha: float, targets: Collection[str] = TARGETS) -> None:
    """Freeze the model and train a rank-r change of the target matrices instead: W x + (α/r) B A x, in fp32.

    A starts random and B at zero, so the model starts as itself; with `adapters_off` it is the base again, bit for
    bit. That is why a frozen teacher needs no second copy of the weights.
    """
    if unknown := set(targets) - set(TARGETS):
        raise ValueError(f"adapter targets {', '.join(sorted(unknown))} do not exist; choose from {', '.join(TARGETS)}")
    if rank < 1 or not targets:
        raise ValueError(f"add_adapters: rank={rank} must be at least 1, with at least one target")
    if not any(hasattr(block, part) and getattr(getattr(block, part), name, None) is not None
               for block in model.blocks for part in ("attention", "mlp") for name in targets):
        raise ValueError(f"this model has none of the adapter targets {', '.join(targets)}")
    model.requires_grad_(False)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and name.rpartition(".")[2] in targets:
            layer.A = nn.Parameter(torch.empty(rank, layer.in_features, device=model.device))
            layer.B = nn.Parameter(torch.zeros(layer.out_features, rank, device=model.device))
            layer.scale = alpha / rank
            nn.init.kaiming_uniform_(layer.A, a=math.sqrt(5))          # the paper's code: uniform in ±1/√in


@contextmanager
def adapters_off(model: GPT) -> Iterator[None]:
    """`with adapters_off(model)`: the base inside, the adapted model after."""
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    before = [layer.adapting for layer in layers]
    for layer in layers:
        layer.adapting = False
    try:
        yield
    finally:
        for layer, adapting in zip(layers, before):
            layer.adapting = adapting


def merged_weights(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The weights by name, adapters folded in, one at a time; a tied head comes once, as the embedding."""
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        if not name.endswith((".A", ".B")):
            yield name, layer.merged() if isinstance(layer, Linear) and name.endswith(".weight") else parameter


@torch.no_grad()
def merged_copy(model: GPT, dtype: torch.dtype | None = None) -> GPT:
    """A second model with the same weights, adapters folded in, by default in fp32 or better."""
    dtype = dtype or torch.promote_types(model.embed.weight.dtype, torch.float32)
    with torch.device("meta"):
        twin = GPT(model.config)
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in merged_weights(model)}
    twin.load_state_dict(weights, strict=not model.config.tied, assign=True)
    if model.config.tied:
        twin.head.weight = twin.embed.weight
    twin.frequencies = model.frequencies
    return twin.train(model.training)


# ================================================================================= Hugging Face, in and out
SUPPORTED = "gpt2, llama, mistral (no active sliding window), qwen2, qwen3 (dense)"
LLAMA_NAMES = {                                                        # Hugging Face's words -> ours
    "model.embed_tokens": "embed", "lm_head": "head", "model.norm": "norm", "model.layers": "blocks",
    "input_layernorm": "norm1", "post_attention_layernorm": "norm2", "self_attn": "attention",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}
GPT2_NAMES = {
    "transformer.wte": "embed", "transformer.wpe": "embed_position", "lm_head": "head", "transformer.ln_f": "norm",
    "transformer.h": "blocks", "ln_1": "norm1", "ln_2": "norm2", "attn.c_proj": "attention.out", "attn.c_attn": "attention.qkv",
    "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down",
}
CONSTANTS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")   # older files carry them


def config_from_hugging_face(hf) -> GPTConfig:
    """A transformers config -> ours. What `GPT` cannot represent exactly is refused by name."""
    def need(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"{hf.model_type}: {what} is not supported. Supported: {SUPPORTED}; safetensors, not quantized")

    need(hf.model_type in ("gpt2", "llama", "mistral", "qwen2", "qwen3"), "this architecture")
    need(getattr(hf, "quantization_config", None) is None, "a quantized checkpoint")
    if hf.model_type == "gpt2":
        activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
        need(hf.activation_function in activations, f"activation {hf.activation_function!r}")
        need(hf.scale_attn_weights and not hf.scale_attn_by_inverse_layer_idx, "another scaling of the attention scores")
        need(not hf.add_cross_attention, "cross-attention")
        D, H = hf.n_embd, hf.n_head
        return GPTConfig(hf.vocab_size, hf.n_layer, D, H, H, D // H, hf.n_inner or 4 * D, hf.n_positions, norm="layer",
                         norm_eps=hf.layer_norm_epsilon, positions="learned", mlp=activations[hf.activation_function],
                         qkv_bias=True, out_bias=True, mlp_bias=True, tied=hf.tie_word_embeddings)
    need(hf.hidden_act in ("silu", "swish"), f"activation {hf.hidden_act!r}")
    window = getattr(hf, "sliding_window", None)
    active = window is not None and window < hf.max_position_embeddings and getattr(hf, "use_sliding_window", True)
    need(not active and "sliding_attention" not in (getattr(hf, "layer_types", None) or ()), "an active sliding window")
    rope = dict(hf.rope_parameters)
    kind, theta = rope.get("rope_type", "default"), rope.pop("rope_theta")
    need(kind in ("default", *ROPE_SCALINGS), f"rope scaling {kind!r}")
    need(rope.get("partial_rotary_factor", 1.0) == 1.0, "a partial rotary embedding")
    biased = bool(getattr(hf, "attention_bias", False))                # Qwen2 has biases on q, k, v only, always
    return GPTConfig(hf.vocab_size, hf.num_hidden_layers, hf.hidden_size, hf.num_attention_heads, hf.num_key_value_heads,
                     getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads, hf.intermediate_size,
                     hf.max_position_embeddings, norm_eps=hf.rms_norm_eps, rope_theta=theta,
                     rope_scaling=None if kind == "default" else rope, qkv_bias=biased or hf.model_type == "qwen2",
                     out_bias=biased, mlp_bias=bool(getattr(hf, "mlp_bias", False)), qk_norm=hf.model_type == "qwen3",
                     tied=hf.tie_word_embeddings)


def config_to_hugging_face(config: GPTConfig):
    """Ours -> the transformers config of the simplest family that is the same function."""
    import transformers

    c = config
    if c.norm == "layer":
        biased = c.qkv_bias and c.out_bias and c.mlp_bias
        whole = c.n_kv_head == c.n_head and c.n_head * c.head_dim == c.d_model
        if not (biased and whole and c.tied) or c.positions != "learned" or c.mlp == "swiglu" or c.qk_norm:
            raise ValueError("this GPTConfig is no family that transformers knows: LayerNorm, but otherwise not GPT-2")
        return transformers.GPT2Config(
            vocab_size=c.vocab_size, n_layer=c.n_layer, n_embd=c.d_model, n_head=c.n_head, n_inner=c.d_ff,
            n_positions=c.max_len, layer_norm_epsilon=c.norm_eps, architectures=["GPT2LMHeadModel"],
            activation_function={"gelu_tanh": "gelu_new", "gelu": "gelu"}[c.mlp], bos_token_id=None, eos_token_id=None)
    family = "Qwen3" if c.qk_norm else "Qwen2" if c.qkv_bias and not c.out_bias else "Llama"
    odd_bias = (c.mlp_bias and family != "Llama") or (c.qkv_bias != c.out_bias and family != "Qwen2")
    if c.positions != "rotary" or c.mlp != "swiglu" or odd_bias:
        raise ValueError(f"this GPTConfig is no family that transformers knows: RMSNorm, but otherwise not {family}")
    extra = {"Llama": dict(attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias), "Qwen2": {},
             "Qwen3": dict(attention_bias=c.qkv_bias)}[family]
    return getattr(transformers, f"{family}Config")(
        vocab_size=c.vocab_size, num_hidden_layers=c.n_layer, hidden_size=c.d_model, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, intermediate_size=c.d_ff, max_position_embeddings=c.max_len,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied, architectures=[f"{family}ForCausalLM"], bos_token_id=None,
        eos_token_id=None, **extra,
        rope_parameters={"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_theta})


def from_hugging_face(name: str, tensor: Tensor, gpt2: bool) -> Iterator[tuple[str, Tensor]]:
    """One tensor of a checkpoint -> ours, by name. GPT-2 stores its matrices transposed, and q, k, v as one."""
    if gpt2 and not name.startswith(("transformer.", "lm_head.")):
        name = "transformer." + name                                   # the original GPT-2 files lack the prefix
    for theirs, ours in (GPT2_NAMES if gpt2 else LLAMA_NAMES).items():
        name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.)", rf"\g<1>{ours}", name, count=1)
    if gpt2 and tensor.dim() == 2 and re.search(r"\.(qkv|out|up|down)\.", name):
        tensor = tensor.T
    parts = "qkv" if ".qkv." in name else [None]
    for part, piece in zip(parts, tensor.chunk(len(parts))):
        yield name.replace(".qkv.", f".{part}."), piece


def to_hugging_face(name: str, gpt2: bool) -> str:
    for theirs, ours in (GPT2_NAMES if gpt2 else LLAMA_NAMES).items():
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", name, count=1)
    return name


def read_config(name_or_folder: str | os.PathLike) -> GPTConfig:
    """The shapes of a checkpoint, without its weights."""
    from transformers import AutoConfig

    return config_from_hugging_face(AutoConfig.from_pretrained(name_or_folder, trust_remote_code=False))


def load_pretrained(name_or_folder: str | os.PathLike, dtype: torch.dtype) -> GPT:
    """`GPT.from_pretrained`: weights from safetensors, one tensor at a time: no second copy, no pickles, no remote code."""
    from safetensors import safe_open
    from transformers import AutoConfig
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    hf = AutoConfig.from_pretrained(name_or_folder, trust_remote_code=False)
    config = config_from_hugging_face(hf)
    with torch.device("meta"):
        model = GPT(config)
    model.frequencies = rotary_frequencies(config)
    index = cached_file(name_or_folder, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = sorted(set(json.loads(Path(index).read_text())["weight_map"].values())) if index else [SAFE_WEIGHTS_NAME]
    wanted = dict(model.named_parameters())
    for file in files:
        path = cached_file(name_or_folder, file, _raise_exceptions_for_missing_entries=False)
        if path is None:
            raise ValueError(f"{name_or_folder} has no {file}: only safetensors are loaded; convert the checkpoint first")
        with safe_open(path, framework="pt") as tensors:
            for theirs in tensors.keys():
                if (theirs == "lm_head.weight" and config.tied) or CONSTANTS.search(theirs):
                    continue
                for name, tensor in from_hugging_face(theirs, tensors.get_tensor(theirs), hf.model_type == "gpt2"):
                    if name not in wanted or wanted[name].shape != tensor.shape:
                        expected = tuple(wanted[name].shape) if name in wanted else "no such weight"
                        raise ValueError(f"{path}: {theirs} {tuple(tensor.shape)} does not fit the config ({expected})")
                    owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                    setattr(owner, leaf, nn.Parameter(tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)))
    if config.tied:
        model.head.weight = model.embed.weight
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{name_or_folder} lacks {len(missing)} weights, among them {missing[0]}")
    return model


def save_pretrained(model: GPT, folder: str | os.PathLike, tokenizer, eos: Collection[int]) -> None:
    """`GPT.save_pretrained`: config, safetensors, generation config and tokenizer, in transformers' format; in the model's
    own dtype, in fp32 where adapters are folded in."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    hf = config_to_hugging_face(model.config)
    gpt2, state, weights = hf.model_type == "gpt2", {}, {name: tensor.detach() for name, tensor in merged_weights(model)}
    hf.dtype = torch.float32 if any(layer.A is not None for layer in model.modules() if isinstance(layer, Linear)) else model.embed.weight.dtype
    for name, tensor in weights.items():
        if gpt2:
            for ours, theirs in [("attention.out.", "attn.c_proj."), ("mlp.up.", "mlp.c_fc."), ("mlp.down.", "mlp.c_proj.")]:
                name = name.replace(ours, theirs)
            if re.search(r"attention\.[kv]\.", name):
                continue                                               # stored with q
            if ".attention.q." in name:
                tensor = torch.cat([weights[name.replace(".q.", f".{part}.")] for part in "qkv"])
                name = name.replace("attention.q.", "attn.c_attn.")
            tensor = tensor.T if tensor.dim() == 2 and ".c_" in name else tensor
        state[to_hugging_face(name, gpt2)] = tensor.to(hf.dtype).contiguous()
    hf.save_pretrained(folder)
    save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})
    GenerationConfig(eos_token_id=sorted(eos) or None).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_adapters(model: GPT, folder: str | os.PathLike, base: str) -> None:
    """`GPT.save_adapters`: adapter_config.json and adapter_model.safetensors, in PEFT's format."""
    from safetensors.torch import save_file

    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear) and layer.A is not None}
    if not adapted or config_to_hugging_face(model.config).model_type == "gpt2":
        raise ValueError("no adapters to save" if not adapted else
                         "GPT-2 holds q, k and v in one matrix, our adapters do not: save the merged model")
    state, targets = {}, set()
    for name, layer in adapted.items():
        theirs = to_hugging_face(f"{name}.weight", gpt2=False).removesuffix(".weight")
        targets.add(theirs.rpartition(".")[2])
        for factor in "AB":
            state[f"base_model.model.{theirs}.lora_{factor}.weight"] = getattr(layer, factor).detach().contiguous()
    rank = len(layer.A)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_dropout": 0.0,
              "lora_alpha": layer.scale * rank, "target_modules": sorted(targets), "bias": "none", "inference_mode": True}
    os.makedirs(folder, exist_ok=True)
    save_file(state, f"{folder}/adapter_model.safetensors", metadata={"format": "pt"})
    Path(folder, "adapter_config.json").write_text(json.dumps(config, indent=1))
