"""Contextual On-Policy Self-Distillation: the divergences, their estimators, the teacher, the loss.

    student  Q = p_θ(· | x)      teacher  P = p_θ(· | x, C): the same model, shown a context C

The student samples a completion y ~ p_θ(·|x). The teacher scores every token of y given (C, x). The
student moves toward the teacher by forward KL, reverse KL or Jensen-Shannon divergence:

    L(θ) = E_{y ~ p_θ(·|x)}  Σ_t w_t · D( P(·|x, C, y_<t) , Q(·|x, y_<t) )

No gradient flows through the sampling of y, and none into the teacher: this is a token-level
objective. (The gradient of the sequence-level KL has one more term, the score function of y, which
on-policy distillation leaves out.) Four published methods are four choices of C (contexts.py);
nothing in this file depends on the task.

All values are in nats, over the full vocabulary unless a name says otherwise. Divergences are
computed in fp32 (float64 stays float64) whatever the input's dtype, also under autocast: in bf16 a
Jensen-Shannon divergence can come out negative.

Dimension key
  B batch   N completion tokens per row, padded   n completion tokens of all rows, padding dropped
  D model width   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model import (
    GPT,
    KVCache,
    common_beginning,
    merged_copy,
    merged_weights,
    pad_right,
    without_adapters,
)


# ============================================================================= 1. exact divergences
def log_softmax_pair(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """-> (log Q with gradient, log P without), both (..., V) in fp32 or float64."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits "
            f"{tuple(teacher_logits.shape)} must have the same shape"
        )
    at_least_fp32 = torch.promote_types(student_logits.dtype, torch.float32)
    return student_logits.log_softmax(-1, dtype=at_least_fp32), teacher_logits.detach().log_softmax(
        -1, dtype=at_least_fp32
    )


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) = Σ_v a_v (log a_v − log b_v) from log-probabilities, (..., V) -> (...).

    0·log 0 = 0: a token with a = 0 (also by underflow) adds nothing to the value or the gradient,
    even if b is 0 too. If a > 0 and b = 0 the result is +inf. The inner `where` keeps
    −inf − (−inf) out of the backward pass."""
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(P‖Q) = Σ_v P_v (log P_v − log Q_v), from teacher to student: mode-covering.

    Shapes     logits (..., V) -> (...), nats, one value per position, no reduction.
    Gradient   to the student only: dL/d student_logits = Q − P. The value is SFT's cross-entropy
               with the teacher's distribution as soft labels, minus the constant H(P).
    −inf       a token with Q = 0 and P > 0 makes the value +inf; one with Q = P = 0 adds nothing.
    Source     the loss in SDFT's code, arXiv:2601.19897; "KL-based divergences" in GKD,
               arXiv:2306.13649.

    The lecture's example, teacher P = (mat .7, floor .2, chair .1), student Q = (.5, .3, .2), as
    forward_kl(Q.log(), P.log()):
      .7 log(.7/.5) + .2 log(.2/.3) + .1 log(.1/.2) = .2355 − .0811 − .0693 = .0851 nats"""
    log_q, log_p = log_softmax_pair(student_logits, teacher_logits)
    return kl(log_p, log_q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(Q‖P) = Σ_v Q_v (log Q_v − log P_v), from student to teacher: mode-seeking, zero-forcing.

    Shapes     logits (..., V) -> (...), nats, one value per position, no reduction.
    Gradient   to the student only: dL/d student_logits = Q ⊙ (log Q − log P − KL(Q‖P)). It vanishes
               where the student is certain, rightly or wrongly: as Q_v -> 0 on the right token, so
               does the gradient that would raise it.
    −inf       a token with P = 0 and Q > 0 makes the value +inf; one with P = Q = 0 adds nothing.
    Source     the loss of MiniLLM, arXiv:2306.08543, and OPCD, arXiv:2602.12275; here it is exact
               at every token.

    The same P, Q:  .5 log(.5/.7) + .3 log(.3/.2) + .2 log(.2/.1) = −.1682 + .1216 + .1386 = .0920
    """
    log_q, log_p = log_softmax_pair(student_logits, teacher_logits)
    return kl(log_q, log_p)


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """JSD_β = β KL(P‖M) + (1−β) KL(Q‖M) with the mixture M = β P + (1−β) Q; 0 < β < 1.

    Shapes     logits (..., V) -> (...), nats, one value per position, no reduction.
    Gradient   to the student only (M depends on it): (1−β) Q ⊙ (log Q − log M − KL(Q‖M)).
    Bounds     0 <= JSD_β <= −β log β − (1−β) log(1−β), up to rounding; symmetric and at most log 2
               at β = ½. Always finite.
    Trap       In GKD, TRL and Liger β = 0 means forward KL and β = 1 reverse KL, but the formula
               tends to 0 at both ends (JSD_β/β -> forward KL as β -> 0, JSD_β/(1−β) -> reverse KL
               as β -> 1), so the loss jumps there. On one input: β = 0: 5.2, .001: .005, .5: .54,
               .999: .004, 1: 4.6. Here 0 and 1 are errors: use forward_kl or reverse_kl.
    Source     Eq. 1, arXiv:2306.13649 (GKD), with its β.

    The same P, Q at β = ½:  M = (.6, .25, .15)
      KL(P‖M) = .7 log(.7/.6) + .2 log(.2/.25) + .1 log(.1/.15) = .1079 − .0446 − .0405 = .0227
      KL(Q‖M) = .5 log(.5/.6) + .3 log(.3/.25) + .2 log(.2/.15) = −.0912 + .0547 + .0575 = .0211
      JSD = ½ (.0227 + .0211) = .0219 nats"""
    if not 0 < beta < 1:
        raise ValueError(
            f"jsd: beta={beta} must be strictly between 0 and 1; "
            "at the ends use forward_kl or reverse_kl"
        )
    log_q, log_p = log_softmax_pair(student_logits, teacher_logits)
    neither = log_q.isneginf() & log_p.isneginf()  # logaddexp(−inf, −inf) has a NaN gradient
    log_p_safe, log_q_safe = log_p.masked_fill(neither, 0), log_q.masked_fill(neither, 0)
    log_m = torch.logaddexp(log_p_safe + math.log(beta), log_q_safe + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}


def top_k_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    k: int,
    divergence: Callable[..., Tensor] = reverse_kl,
    of: str = "student",
) -> Tensor:
    """The divergence after all but the k likeliest tokens are merged into one tail bucket. (..., V)
    -> (...), nats.

    `of` says whose top k: the student's (OPCD's choice for reverse KL, k = 256, arXiv:2602.12275)
    or the teacher's. Merging outcomes can only lower a divergence (data processing), so this is a
    lower bound on the exact value, tight at k >= V − 1. Without the bucket there is no such bound:
    a renormalised top-1 is identically 0, and truncated sums can be negative. Gradient to the
    student only; the choice of the k tokens is not differentiated."""
    if k < 1 or of not in ("student", "teacher"):
        raise ValueError(
            f"top_k_divergence: k={k} must be at least 1 and of={of!r} 'student' or 'teacher'"
        )
    log_q, log_p = log_softmax_pair(student_logits, teacher_logits)
    if k >= log_q.shape[-1]:
        return divergence(log_q, log_p)  # log-probabilities are their own logits
    top = (log_q.detach() if of == "student" else log_p).topk(k, dim=-1).indices  # (..., k)
    buckets = []
    for x in (log_q, log_p):
        rest = x.scatter(-1, top, float("-inf"))
        empty = rest.isneginf().all(-1, keepdim=True)  # a logsumexp of only −inf has a NaN gradient
        tail = (
            rest.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, float("-inf"))
        )
        buckets.append(torch.cat([x.gather(-1, top), tail], dim=-1))  # (..., k + 1)
    return divergence(*buckets)


# ======================================================== 2. estimators from the sampled token only
# r = log Q(y) − log P(y) with y ~ Q, the student, so that E[r] is the reverse KL. The names come
# from J. Schulman's note "Approximating KL divergence". student_logp and teacher_logp are the
# log-probabilities of the sampled token, in any shape.
def k1(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """r: unbiased for KL(Q‖P), but with high variance; single values may be negative."""
    return student_logp - teacher_logp


def k2(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """r²/2: biased as an estimate of the value, but its gradient r ∇log Q(y) is in expectation that
    of reverse KL."""
    return (student_logp - teacher_logp) ** 2 / 2


def k3(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """e^−r − 1 + r: unbiased and never negative. Do not differentiate it: its expected gradient is
    that of forward KL."""
    r = student_logp - teacher_logp
    return torch.expm1(-r) + r


def policy_gradient_surrogate(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """stop_grad(r) · log Q(y): REINFORCE on the reward −r, per token (Thinking Machines; MiniLLM
    without its future terms).

    E_{y~Q}[gradient] = Σ_y Q r ∇log Q = ∇KL(Q‖P), exactly, because Σ_y Q ∇log Q = 0. This holds for
    samples of the student itself, at temperature 1. The value is not a KL."""
    return (student_logp - teacher_logp).detach() * student_logp


# =============================================================== 3. what is minimised on each token
# An objective maps (student_logits (n, V), teacher_logits (n, V) or None, tokens (n,)) to (n,), in
# nats.
Objective = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def on_distributions(divergence: Callable[[Tensor, Tensor], Tensor]) -> Objective:
    """A divergence as an objective: it compares two distributions and ignores the sampled token."""
    return lambda student_logits, teacher_logits, tokens: divergence(student_logits, teacher_logits)


def cross_entropy(student_logits: Tensor, teacher_logits: Tensor | None, tokens: Tensor) -> Tensor:
    """−log Q(token): on an expert's completions this is SFT. It is the forward KL from a one-hot
    teacher, so `teacher_logits` is not used."""
    at_least_fp32 = torch.promote_types(student_logits.dtype, torch.float32)
    return F.cross_entropy(student_logits.to(at_least_fp32), tokens, reduction="none")


def policy_gradient(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Tensor:
    """`policy_gradient_surrogate` of the sampled tokens, which must be the student's own, drawn at
    temperature 1."""
    log_q, log_p = log_softmax_pair(student_logits, teacher_logits)  # (n, V) each
    student_logp = log_q.gather(-1, tokens[:, None])[:, 0]  # (n,)
    teacher_logp = log_p.gather(-1, tokens[:, None])[:, 0]  # (n,)
    return policy_gradient_surrogate(student_logp, teacher_logp)


def make_objective(name: str, beta: float = 0.5, top_k: int = 0) -> Objective:
    """A divergence by name, or "policy_gradient". `beta` is for jsd; `top_k` > 0 restricts the
    divergence to the student's top k and a tail bucket."""
    if name == "policy_gradient":
        return policy_gradient
    if name not in DIVERGENCES:
        raise ValueError(f"{name!r}: choose from {', '.join(DIVERGENCES)}, policy_gradient")
    divergence = partial(jsd, beta=beta) if name == "jsd" else DIVERGENCES[name]
    if top_k:
        divergence = partial(top_k_divergence, k=top_k, divergence=divergence)
    return on_distributions(divergence)


def entropy(logits: Tensor) -> Tensor:
    """H(Q) = −Σ_v Q_v log Q_v, (..., V) -> (...), nats, without gradient, for logging."""
    return torch.special.entr(logits.detach().float().softmax(-1)).sum(-1)


# ============================================================== 4. the same, for large vocabularies
class ChunkedObjective(torch.autograd.Function):
    """Logits exist for `chunk` positions at a time; their gradient is taken immediately and passed
    on to the student's states h_s (n, D) and head W_s (V, D)."""

    @staticmethod
    def forward(ctx, h_s, W_s, h_t, W_t, tokens, objective, weights, chunk):
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(h_s) if wants_hidden else None  # (n, D)
        grad_head = torch.zeros_like(W_s) if wants_head else None  # (V, D)
        per_token, entropies = [], []
        for i in range(0, len(weights), chunk):
            rows = slice(i, i + chunk)
            student_logits = F.linear(h_s[rows], W_s)  # (chunk, V)
            student_logits.requires_grad_(wants_hidden or wants_head)
            teacher_logits = None
            if W_t is not None:
                teacher_logits = F.linear(h_t[rows], W_t)  # (chunk, V)
            with torch.enable_grad():
                d = objective(student_logits, teacher_logits, tokens[rows])  # (chunk,)
            if wants_hidden or wants_head:
                (grad,) = torch.autograd.grad(d, student_logits, weights[rows])  # (chunk, V)
            if wants_hidden:
                grad_hidden[rows] = grad @ W_s
            if wants_head:  # in place: no second (V, D)
                grad_head.addmm_(grad.T, h_s[rows])
            per_token.append(d.detach())
            entropies.append(entropy(student_logits))
        per_token, entropies = torch.cat(per_token), torch.cat(entropies)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(per_token, entropies)
        return (weights * per_token).sum(), per_token, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(upstream)  # in place: backward can run only once
        if grad_head is not None:
            grad_head = grad_head.mul_(upstream)
        return grad_hidden, grad_head, None, None, None, None, None, None


def chunked_objective(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    tokens: Tensor,
    objective: Objective,
    weights: Tensor,
    chunk: int = 32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_i w_i d_i from hidden states (n, D) and head weights (V, D) -> (loss (), d (n,), entropy
    (n,)), exactly.

    Equal in value and gradients to `(weights * objective(h_s @ W_sᵀ, h_t @ W_tᵀ, tokens)).sum()`,
    but never holds more than `chunk` rows of logits: at V = 150k, student and teacher logits of 512
    positions and their temporaries take gigabytes. Gradient to student_hidden and student_head
    only; d and entropy are for logging."""
    lengths = len(student_hidden), len(tokens), len(weights)
    if chunk < 1 or not len(weights) or len(set(lengths)) > 1:
        raise ValueError(
            f"chunked_objective: chunk={chunk} must be at least 1, and states, tokens and weights "
            f"of equal, positive lengths, not {lengths}"
        )
    if teacher_head is not None:
        teacher_hidden = teacher_hidden.to(teacher_head.dtype)
    student = student_hidden.to(student_head.dtype), student_head
    with torch.autocast(student_head.device.type, enabled=False):  # fp32 logits, as in model.Head
        return ChunkedObjective.apply(
            *student, teacher_hidden, teacher_head, tokens, objective, weights, chunk
        )


# ============================================================================= 5. shift and weights
def completion_states(
    model: GPT,
    prompts: Sequence[list[int]],
    ids: Tensor,
    mask: Tensor,
    prefix: KVCache | None = None,
) -> Tensor:
    """Hidden states that predict the completions' tokens -> (n, D), n = mask.sum(), row by row.

    The shift: the state at position t predicts token t + 1. After a prompt of L tokens, completion
    token j is at position L + j, so the state at L − 1 + j predicts it; the first one is predicted
    at the prompt's last token. Prompt positions and padding are never projected to the vocabulary;
    the last token (EOS) is predicted, but need not be read. With `prefix`, the prompts continue a
    context that was read before."""
    lengths = mask.sum(1).tolist()
    read = [p + row[: n - 1] for p, row, n in zip(prompts, ids.tolist(), lengths)]
    tokens = pad_right(read).to(model.device)  # (B, T)
    cache = None if prefix is None else KVCache(model.config, prefix=prefix)
    states = model.hidden(tokens, cache)  # (B, T, D)
    start = torch.tensor([len(p) - 1 for p in prompts])  # (B,)
    row, j = mask.cpu().nonzero(as_tuple=True)  # (n,), (n,)
    place = row * tokens.shape[1] + start[row] + j
    return states.flatten(0, 1)[place.to(model.device)]  # (n, D)


def shared_states(model: GPT, prompts: Sequence[list[int]], ids: Tensor, mask: Tensor) -> Tensor:
    """`completion_states`, but faster: a beginning that all prompts share is read once, with
    gradient."""
    common = common_beginning(prompts)
    if not common:
        return completion_states(model, prompts, ids, mask)
    rest = [p[len(common) :] for p in prompts]
    return completion_states(model, rest, ids, mask, prefix=model.read(common))


def token_weights(mask: Tensor, reduction: str = "token", skip: int = 0) -> Tensor:
    """Weights (B, N) that sum to 1, so that loss = Σ w · d: the denominator is fixed here, for the
    whole batch.

    token      every completion token counts the same: 1 / #tokens
    sequence   every completion counts the same: mean over rows of the mean over its tokens (SDFT)
    `skip` leaves out that many first tokens of each completion (SDFT skips 3, because completions
    tend to open with phrases about the context). Because the loss is a plain sum under these
    weights, splitting the batch into micro-batches changes nothing."""
    if reduction not in ("token", "sequence") or skip < 0:
        raise ValueError(
            f"token_weights: reduction={reduction!r} must be 'token' or 'sequence', "
            f"and skip={skip} not negative"
        )
    scored = mask.float()  # (B, N)
    scored[:, :skip] = 0
    if reduction == "token":
        return scored / scored.sum().clamp(min=1)
    per_row = scored.sum(1, keepdim=True)  # (B, 1)
    rows = (per_row > 0).sum()  # rows that `skip` leaves empty do not count
    return scored / per_row.clamp(min=1) / rows.clamp(min=1)


# =================================================================================== 6. the teacher
class Teacher:
    """The model that scores, p(· | x, C). It never gets a gradient.

    frozen   the student as it was at the start: a copy or, if the student has adapters, a second
             model without them that shares the base's weights
    ema      an exponential moving average of the student: θ_T <- (1−rate) θ_T + rate θ after every
             step (SDFT: rate .01–.05). With adapters θ is the merged W + (α/r) B A, because
             averaging A and B separately would give another matrix
    live     the student itself, with stop-gradient (tends to diverge: teacher and student chase
             each other)

    `shared` holds the tokens that every teacher prompt begins with: the context, if all prompts
    have the same one (types B and C). A frozen teacher reads them once for the whole run, the
    others once per step."""

    def __init__(
        self, student: GPT, kind: str = "frozen", ema_rate: float = 0.02, shared: Sequence[int] = ()
    ):
        if kind not in ("frozen", "ema", "live"):
            raise ValueError(
                f"teacher kind {kind!r} is not supported; choose from frozen, ema, live"
            )
        self.kind, self.ema_rate, self.shared = kind, ema_rate, list(shared)
        self.prefix: KVCache | None = None
        if kind == "live":
            self.model = student
        elif kind == "frozen" and student.adapted:
            self.model = without_adapters(student)
        else:
            self.model = merged_copy(student)

    @torch.no_grad()
    def states(self, prompts: Sequence[list[int]], ids: Tensor, mask: Tensor) -> Tensor:
        """As `completion_states`, (n, D), but the shared context is read only once."""
        cut = len(self.shared)
        continues = all(len(p) > cut and p[:cut] == self.shared for p in prompts)
        if not cut or not continues:
            return completion_states(self.model, prompts, ids, mask)
        if self.prefix is None:
            self.prefix = self.model.read(self.shared)
        return completion_states(self.model, [p[cut:] for p in prompts], ids, mask, self.prefix)

    @torch.no_grad()
    def update(self, student: GPT) -> None:
        """Call after every optimizer step."""
        if self.kind == "ema":
            mine = dict(self.model.named_parameters())
            for name, theirs in merged_weights(student):
                mine[name].lerp_(theirs.to(mine[name].dtype), self.ema_rate)
        if self.kind != "frozen":
            self.forget()

    def forget(self) -> None:
        """The weights have changed, so the context must be read again."""
        self.prefix = None


# ====================================================================================== 7. the loss
@dataclass(frozen=True)
class Rows:
    """Completions to learn from, who scores them, and the weight of each token.

    Student and scorer read different prompts, which end with the same assistant header, and then
    the same completion. A step may have several `Rows`: the task's, scored by the teacher, who sees
    C, and anchors (old prompts), scored by the frozen base in the student's own context. All their
    weights together sum to one. Keep the tensors on the CPU: then it is known without waiting for
    the device which positions are scored."""

    prompts: list[list[int]]  # x
    scorer_prompts: list[list[int]]  # (C, x)
    ids: Tensor  # (B, N) token ids of y
    mask: Tensor  # (B, N) True up to and including EOS
    weights: Tensor  # (B, N)
    scorer: Teacher | None  # None where the objective needs no teacher
    objective: Objective

    def split(self, size: int) -> list[Rows]:
        """Micro-batches of at most `size` rows (0: all rows in one). Their losses add up, because
        the weights were fixed for the whole batch."""
        parts, names = [], ("prompts", "scorer_prompts", "ids", "mask", "weights")
        size = size or len(self.prompts)
        for i in range(0, len(self.prompts), size):
            some = {name: getattr(self, name)[i : i + size] for name in names}
            parts.append(replace(self, **some))
        return parts


def cosd_loss(student: GPT, rows: Rows, chunk: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ_t w_t d_t over the rows' tokens -> (loss () with gradient to the student only, the log).

    The log has "loss" and the student's "entropy", each Σ w · value over the tokens, without
    gradient; summed over all parts of a step they are means, since the weights sum to one. At most
    `chunk` rows of logits exist at once (0: all of them). Changes none of its arguments, and does
    not call backward."""
    tokens = rows.ids[rows.mask].to(student.device)  # (n,)
    weights = rows.weights[rows.mask].to(student.device)  # (n,)
    # The same completion tokens: given x with gradient, and given (C, x) without.
    h_s = shared_states(student, rows.prompts, rows.ids, rows.mask)  # (n, D)
    h_t = head = None
    if rows.scorer is not None:
        h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)  # (n, D)
        head = rows.scorer.model.head
    if chunk:
        theirs = None if h_t is None else head.weight  # (V, D)
        loss, _, h = chunked_objective(
            h_s, student.head.weight, h_t, theirs, tokens, rows.objective, weights, chunk
        )
    else:
        with torch.no_grad():
            teacher_logits = None if h_t is None else head(h_t)  # (n, V)
        student_logits = student.head(h_s)  # (n, V)
        d = rows.objective(student_logits, teacher_logits, tokens)  # (n,)
        loss, h = (weights * d).sum(), entropy(student_logits)
    return loss, {"loss": loss.detach(), "entropy": (weights * h).sum()}


@torch.no_grad()
def token_probabilities(student: GPT, rows: Rows) -> tuple[Tensor, Tensor]:
    """The probability of every completion token under the student and under the scorer, for
    inspection -> (n,), (n,)."""
    tokens = rows.ids[rows.mask][:, None].to(student.device)  # (n, 1)
    h_s = completion_states(student, rows.prompts, rows.ids, rows.mask)  # (n, D)
    h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)  # (n, D)
    q, p = student.head(h_s).softmax(-1), rows.scorer.model.head(h_t).softmax(-1)  # (n, V)
    return q.gather(-1, tokens)[:, 0], p.gather(-1, tokens)[:, 0]
