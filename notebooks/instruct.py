"""Instruction tuning: SFT with two attention masks, and the angle between two gradients.

    a decoder        position t sees s <= t
    a prefix-LM      the same, and every position of the prompt sees the whole prompt (the lecture's
                     "teacher forcing: SFT with prefix LM")

Training needs only another mask. The cache of model.py cannot be used for decoding under such a
mask, so `prefix_greedy` reads everything again for each token.

Dimension key
  B rows   T tokens read (prompt and answer), padded   D width   V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, KVCache, attend, pad_right


class PrefixMask(KVCache):
    """Takes the place of a cache but stores nothing: attention in both directions in the prompt.

    visible[b, t, s]: may position t see s? s <= t (a decoder), or s in the prompt (a prefix-LM)."""

    def __init__(self, config, prompt_lengths: Tensor, width: int):
        super().__init__(config)
        t = torch.arange(width)
        self.visible = (t <= t[:, None]) | (t < prompt_lengths[:, None, None])  # (B, T, T)

    def attend(self, layer, q, k, v):
        bias = torch.zeros(self.visible.shape, dtype=q.dtype).masked_fill(~self.visible, -torch.inf)
        return attend(q, k, v, bias[:, None])  # (B, 1, T, T): the same for all heads


def prefix_states(model: GPT, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """States (B, T, D) of prompts, each followed by its answer; prompts are read in both directions."""
    tokens = pad_right([x + y for x, y in zip(prompts, answers)])  # (B, T)
    lengths = torch.tensor([len(x) for x in prompts])
    return model.hidden(tokens, PrefixMask(model.config, lengths, tokens.shape[1]))


def prefix_loss(model: GPT, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """SFT by teacher forcing as a prefix-LM: −log p(y_t | x, y_<t), mean over answer tokens -> ()."""
    states = prefix_states(model, prompts, answers)
    wanted = [[-100] * (len(x) - 1) + y for x, y in zip(prompts, answers)]  # state t: token t + 1
    width = states.shape[1]
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in wanted])  # (B, T)
    return F.cross_entropy(model.head(states).flatten(0, 1), labels.flatten())  # skips −100


@torch.no_grad()
def prefix_greedy(model: GPT, prompts: list[list[int]], max_new: int, ends: set) -> list[list[int]]:
    """Greedy answers; everything is read again for each token, because no cache fits this mask."""
    answers = [[] for _ in prompts]
    for _ in range(max_new):
        states = prefix_states(model, prompts, answers)
        last = torch.tensor([len(x) + len(y) - 1 for x, y in zip(prompts, answers)])
        best = model.head(states[torch.arange(len(last)), last]).argmax(-1)  # (B,)
        for y, token in zip(answers, best.tolist()):
            if not (y and y[-1] in ends):
                y.append(token)
    return answers


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """∇loss with respect to all parameters, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def cosine(v: Tensor, w: Tensor) -> Tensor:
    """v·w / (|v| |w|), in [−1, 1]; it is 1 exactly if v is a positive multiple of w.

    GEM (arXiv:1706.08840) uses it for two gradients: if those of the new task and of the old skills
    have a negative cosine, a small step on the new task raises the loss of the old skills."""
    return v @ w / (v.norm() * w.norm())
