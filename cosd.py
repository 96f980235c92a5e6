"""Contextual On-Policy Self-Distillation: the divergences, their estimators, the teachers, the step.

    student  Q = p_θ(· | x)        teacher  P = p_θ(· | x, C)        the same model, shown a context C

The student samples a completion y ~ p_θ(·|x); the teacher scores every token of it under (C, x); the student
moves toward the teacher by forward KL, reverse KL or Jensen-Shannon divergence:

    L(θ) = E_{y ~ p_θ(·|x)}  Σ_t w_t · D( P(·|x, C, y_<t) , Q(·|x, y_<t) )

No gradient flows through the sampling of y, and none into the teacher: a token-level objective. (The gradient of the
sequence-level KL would have one more term, the score function of y; on-policy distillation leaves it out.) Four
methods are four choices of C (contexts.py); this file knows no task.

Everything is in nats, over the full vocabulary unless a name says otherwise, and in fp32 (float64 stays float64)
whatever comes in, also under autocast: in bf16 a Jensen-Shannon divergence can come out negative.

Dimension key
  B batch   N completion tokens per row, padded   n completion tokens in the whole batch, padding dropped
  D model width   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, KVCache, adapters_off, common_beginning, evaluating, merged_copy, merged_weights, pad_right


# ==================================================================================== 1. exact divergences
def log_softmax_pair(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """-> (log Q with gradient, log P without), both (..., V) in fp32 or float64."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} "
                         "must have the same shape")
    at_least_fp32 = torch.promote_types(student_logits.dtype, torch.float32)  # q1: logits are not log-probabilities; who gets gradient?
    return student_logits.log_softmax(-1, dtype=at_least_fp32), teacher_logits.detach().log_softmax(-1, dtype=at_least_fp32)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:  # q1: where a is 0, log a is no number to multiply, forward or backward
    """KL(a‖b) = Σ_v a_v (log a_v − log b_v) from log-probabilities, (..., V) -> (...).

    0·log 0 = 0: where a is 0 (or underflows to it) a token contributes nothing, value or gradient, even if b is 0 too.
    Where a > 0 and b = 0 the result is +inf. The inner `where` keeps −inf − (−inf) out of the backward pass.
    """
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(P‖Q) = Σ_v P_v (log P_v − log Q_v), from teacher to student: mode-covering.

    Shapes     logits (..., V) -> (...), nats, one value per position, no reduction.
    Gradient   to the student only: dL/d student_logits = Q − P. It is SFT's cross-entropy with the teacher's
               distribution as soft label, less the constant H(P).
    −inf       a token the student cannot say (Q = 0) but the teacher does: +inf. Both −inf: contributes 0.
    Source     the loss of SDFT's code, arXiv:2601.19897; "KL-based divergences" in GKD, arXiv:2306.13649.

    The lecture's example, teacher P = (mat .7, floor .2, chair .1), student Q = (.5, .3, .2), as forward_kl(Q.log(), P.log()):
      .7 log(.7/.5) + .2 log(.2/.3) + .1 log(.1/.2) = .2355 − .0811 − .0693 = .0851 nats
    """
    log_q, log_p = log_softmax_pair(student_logits, teacher_logits)  # q1: one call of kl; the average is the teacher's
    return kl(log_p, log_q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(Q‖P) = Σ_v Q_v (log Q_v − log P_v), from student to teacher: mode-seeking, zero-forcing.

    Shapes     logits (..., V) -> (...), nats, one value per position, no reduction.
    Gradient   to the student only: dL/d student_logits = Q ⊙ (log Q − log P − KL(Q‖P)). It vanishes where the
               student is certain, right or wrong: Q_v -> 0 on the right token leaves nothing to pull it up.
    −inf       a token the teacher rules out (P = 0) but the student says: +inf. Both −inf: contributes 0.
    Source     the loss of MiniLLM, arXiv:2306.08543, and OPCD, arXiv:2602.12275, here exact per token.

    The same P, Q:  .5 log(.5/.7) + .3 log(.3/.2) + .2 log(.2/.1) = −.1682 + .1216 + .1386 = .0920 nats
    """
    log_q, log_p = log_softmax_pair(student_logits, teacher_logits)  # q1: one call of kl; the average is the student's
    return kl(log_q, log_p)


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """JSD_β = β KL(P‖M) + (1−β) KL(Q‖M) with the mixture M = β P + (1−β) Q; 0 < β < 1.

    Shapes     logits (..., V) -> (...), nats, one value per position, no reduction.
    Gradient   to the student only (M moves with it): (1−β) Q ⊙ (log Q − log M − KL(Q‖M)).
    Bounds     0 <= JSD_β <= −β log β − (1−β) log(1−β), to rounding; at β = ½ symmetric and at most log 2. Always finite.
    Trap       In GKD, TRL and Liger one knob β means forward KL at 0 and reverse KL at 1, but the formula tends to
               0 at both ends (JSD_β/β -> forward KL as β -> 0, JSD_β/(1−β) -> reverse KL as β -> 1): the knob jumps.
               On one input: β = 0: 5.2, .001: .005, .5: .54, .999: .004, 1: 4.6. Here 0 and 1 are errors; name the KL.
    Source     Eq. 1, arXiv:2306.13649 (GKD), with its β.

    The same P, Q at β = ½:  M = (.6, .25, .15)
      KL(P‖M) = .7 log(.7/.6) + .2 log(.2/.25) + .1 log(.1/.15) = .1079 − .0446 − .0405 = .0227
      KL(Q‖M) = .5 log(.5/.6) + .3 log(.3/.25) + .2 log(.2/.15) = −.0912 + .0547 + .0575 = .0211
      JSD = ½ (.0227 + .0211) = .0219 nats
    """
    if not 0 < beta < 1:
        raise ValueError(f"jsd: beta={beta} must lie strictly between 0 and 1; use forward_kl or reverse_kl for the ends")
    log_q, log_p = log_softmax_pair(student_logits, teacher_logits)  # q1: log M by torch.logaddexp, which has a NaN gradient at (−inf, −inf)
    neither = log_q.isneginf() & log_p.isneginf()                      # logaddexp(−inf, −inf) has a NaN gradient
    log_p_safe, log_q_safe = log_p.masked_fill(neither, 0), log_q.masked_fill(neither, 0)
    log_m = torch.logaddexp(log_p_safe + math.log(beta), log_q_safe + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def top_k_divergence(
    student_logits: Tensor, teacher_logits: Tensor, k: int, divergence: Callable[..., Tensor] = reverse_kl, of: str = "student"
) -> Tensor:
    """The divergence after all tokens but the k likeliest are merged into one tail bucket. (..., V) -> (...), nats.

    `of` says whose top k: the student's (OPCD's choice for reverse KL, k = 256, arXiv:2602.12275) or the teacher's.
    Merging outcomes can only lower a divergence (data processing), so this is a lower bound on the exact value,
    tight at k >= V − 1. Without the bucket it is no bound: renormalised top-1 is identically 0, truncated sums go negative.
    Gradient to the student only; the choice of the k tokens is not differentiated.
    """
    if k < 1 or of not in ("student", "teacher"):
        raise ValueError(f"top_k_divergence: k={k} must be at least 1 and of={of!r} 'student' or 'teacher'")
    log_q, log_p = log_softmax_pair(student_logits, teacher_logits)
    if k >= log_q.shape[-1]:
        return divergence(log_q, log_p)                                # log-probabilities are their own logits
    top = (log_q.detach() if of == "student" else log_p).topk(k, dim=-1).indices        # (..., k)
    buckets = []
    for x in (log_q, log_p):
        rest = x.scatter(-1, top, float("-inf"))
        empty = rest.isneginf().all(-1, keepdim=True)                  # logsumexp of nothing but −inf has a NaN gradient
        tail = rest.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, float("-inf"))
        buckets.append(torch.cat([x.gather(-1, top), tail], dim=-1))   # (..., k + 1)
    return divergence(*buckets)


# ==================================================================== 2. estimators from the sampled token only
# r = log Q(y) − log P(y) with y ~ Q = the student. E[r] is the reverse KL. Names after J. Schulman's note
# "Approximating KL divergence". student_logp, teacher_logp: log-probability of the sampled token, any shape.
def k1(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """r: unbiased for KL(Q‖P), high variance, single values may be negative."""
    return student_logp - teacher_logp


def k2(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """r²/2: biased as a value. Its gradient r ∇log Q(y), though, is that of reverse KL in expectation."""
    return (student_logp - teacher_logp) ** 2 / 2


def k3(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """e^−r − 1 + r: unbiased and never negative. Do not differentiate it: its expected gradient is forward KL's."""
    r = student_logp - teacher_logp
    return torch.expm1(-r) + r


def policy_gradient_surrogate(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """stop_grad(r) · log Q(y): REINFORCE on the reward −r, per token (Thinking Machines; MiniLLM less its future terms).

    E_{y~Q}[gradient] = Σ_y Q r ∇log Q = ∇KL(Q‖P), exactly, because Σ_y Q ∇log Q = 0: for samples of the student itself,
    at temperature 1. The value is not a KL.
    """
    return (student_logp - teacher_logp).detach() * student_logp


# ====================================================================== 3. exact divergence, big vocabularies
class ChunkedDivergence(torch.autograd.Function):
    """Logits exist for `chunk` positions at a time; their gradient is taken at once and folded into (n, D) and (V, D)."""

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, weights, divergence, chunk):
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(student_hidden) if wants_hidden else None   # (n, D)
        grad_head = torch.zeros_like(student_head) if wants_head else None         # (V, D)
        kind = student_hidden.device.type
        if torch.is_autocast_enabled(kind):                                        # cast the heads once, not for every chunk
            head, teacher_head = (w.to(torch.get_autocast_dtype(kind)) for w in (student_head, teacher_head))
        else:
            head = student_head
        scale = weights.abs().max().clamp(min=1e-30)                               # in fp16, w · (Q − P) would underflow
        per_token = []
        for i in range(0, len(weights), chunk):
            h_s, h_t, w = (x[i : i + chunk] for x in (student_hidden, teacher_hidden, weights))
            student_logits = F.linear(h_s, head).requires_grad_(wants_hidden or wants_head)   # (chunk, V)
            with torch.enable_grad():
                d = divergence(student_logits, F.linear(h_t, teacher_head))        # (chunk,)
                if wants_hidden or wants_head:
                    (g,) = torch.autograd.grad(d, student_logits, w / scale)       # (chunk, V)
            del student_logits
            if wants_hidden:
                grad_hidden[i : i + chunk] = g @ head.to(g.dtype)
            if wants_head:
                grad_head.addmm_(g.T.to(grad_head.dtype), h_s.to(grad_head.dtype)) # in place: no second (V, D)
            per_token.append(d.detach())
        per_token = torch.cat(per_token)
        ctx.save_for_backward(grad_hidden, grad_head, scale)
        ctx.mark_non_differentiable(per_token)
        return (weights * per_token).sum(), per_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, _):
        *gradients, scale = ctx.saved_tensors
        grad_hidden, grad_head = (None if g is None else g.mul_(upstream * scale) for g in gradients)   # in place: once only
        return grad_hidden, grad_head, None, None, None, None, None


def chunked_divergence(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor] = reverse_kl, weights: Tensor | None = None, chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """Σ_i w_i D(student_i, teacher_i) from hidden states (n, D) and head weights (V, D), exactly -> (loss (), per_token (n,)).

    Equal in value and gradients to `(weights * divergence(h_s @ W_sᵀ, h_t @ W_tᵀ)).sum()`, without ever holding more than
    `chunk` rows of logits: at V = 150k, 512 positions of student and teacher logits and their temporaries are gigabytes.
    `weights` (n,) default to 1/n, the mean. Gradient to student_hidden and student_head only; per_token is for logging.
    """
    if weights is None:
        weights = torch.full((len(student_hidden),), 1 / len(student_hidden), device=student_hidden.device)
    if chunk < 1 or not len(student_hidden) == len(teacher_hidden) == len(weights) or not len(weights):
        raise ValueError(f"chunked_divergence: chunk={chunk} must be at least 1 and the inputs have equal, positive lengths, "
                         f"not {len(student_hidden)}, {len(teacher_hidden)}, {len(weights)}")
    frozen = teacher_hidden.detach(), teacher_head.detach()
    return ChunkedDivergence.apply(student_hidden, student_head, *frozen, weights, divergence, chunk)


# ============================================================================================ 4. the teachers
class Teacher:
    """The model that scores: p(· | x, C), never given a gradient.

    frozen   the student as it was at the start: a copy (in `dtype`), or, where the student has adapters, the student
             itself with adapters switched off: no second copy of the weights
    ema      a copy that follows: θ_T <- (1−rate) θ_T + rate θ after every step (SDFT: rate .01–.05). With adapters θ is
             the product W + (α/r) B A: the mean of the factors would be another matrix
    live     the student itself, stop-gradient (tends to diverge: teacher and student chase each other)

    `shared` are the first tokens of all teacher prompts: the context, where it is one for all (types B and C). A frozen
    teacher reads it once for the whole run, so the cost of a step does not grow with |C|; the others once per step.
    """

    def __init__(
        self, student: GPT, kind: str = "frozen", ema_rate: float = 0.02, shared: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ):
        if kind not in ("frozen", "ema", "live"):
            raise ValueError(f"teacher kind {kind!r} is not supported; choose from frozen, ema, live")
        self.kind, self.ema_rate, self.shared = kind, ema_rate, list(shared)
        self.prefix: KVCache | None = None
        adapted = any(name.endswith(".A") for name, _ in student.named_parameters())
        self.without_adapters = adapted and kind == "frozen"
        if kind == "live" or self.without_adapters:
            self.model = student
            return
        self.model = merged_copy(student, dtype if kind == "frozen" else None).requires_grad_(False)

    @contextmanager
    def role(self) -> Iterator[GPT]:
        """`with teacher.role() as model`: the teacher's weights, dropout off."""
        with evaluating(self.model), adapters_off(self.model) if self.without_adapters else nullcontext():
            yield self.model

    @torch.no_grad()
    def states(self, prompts: Sequence[Sequence[int]], completion: Tensor, mask: Tensor) -> Tensor:
        """As `completion_states`, (n, D), with the shared context's keys and values taken from the cache."""
        cut = len(self.shared)
        with self.role() as model:
            if not cut or any(p[:cut] != self.shared or len(p) == cut for p in prompts):
                return completion_states(model, prompts, completion, mask)
            self.prefix = self.prefix or model.read(self.shared)
            return completion_states(model, [p[cut:] for p in prompts], completion, mask, self.prefix)

    @torch.no_grad()
    def update(self, student: GPT) -> None:
        """Call after every optimizer step."""
        if self.kind == "ema":
            mine = dict(self.model.named_parameters())
            for name, theirs in merged_weights(student):
                mine[name].lerp_(theirs.to(mine[name].dtype), self.ema_rate)
        if self.kind != "frozen":
            self.prefix = None                                         # its weights have moved: read the context again


# ================================================================================================ 5. the step
@dataclass
class Batch:
    """What one step learns from. Student and teacher prompts end with the same assistant header; both continue with
    the very same completion tokens. `completion` None: the student is to write it (on-policy)."""

    prompts: list[list[int]]                                           # x, as the student sees it
    teacher_prompts: list[list[int]]                                   # (C, x)
    completion: Tensor | None = None                                   # (B, N) token ids
    mask: Tensor | None = None                                         # (B, N) True up to and including EOS

    def split(self, size: int | None) -> Iterator[tuple[slice, Batch]]:
        size = size or len(self.prompts)
        for rows in (slice(i, i + size) for i in range(0, len(self.prompts), size)):
            yield rows, Batch(self.prompts[rows], self.teacher_prompts[rows], self.completion[rows], self.mask[rows])


def completion_states(
    model: GPT, prompts: Sequence[Sequence[int]], completion: Tensor, mask: Tensor, prefix: KVCache | None = None
) -> Tensor:
    """Hidden states that predict the completion's tokens -> (n, D), n = mask.sum(), row by row.

    The logit at position t predicts token t + 1: for a prompt of L tokens, completion token j is predicted at L − 1 + j.
    Prompt positions and padding never reach the vocabulary; the last token (EOS) is predicted but need not be read.
    What all prompts begin with is read once, with its gradient. `prefix` continues a context that was read before.
    """
    common = [] if prefix else common_beginning(prompts)
    prompts = [p[len(common) :] for p in prompts]
    read = [list(p) + c[: n - 1] for p, c, n in zip(prompts, completion.tolist(), mask.sum(1).tolist())]
    ids, embedded = pad_right(read).to(model.device), None             # (B, T)
    if common:                                                         # one lookup: each costs a gradient of (V, D)
        looked_up = model.embed(torch.cat([torch.tensor(common, device=ids.device), ids.flatten()]))
        first, embedded = looked_up[None, : len(common)], looked_up[len(common) :].view(*ids.shape, -1)
        prefix = model.read(common, first)
    cache = KVCache(model.config, *ids.shape, prefix) if prefix else None  # q2: from all states of ids, those that predict the completion
    row, j = mask.nonzero(as_tuple=True)                               # (n,), (n,)
    start = torch.tensor([len(p) - 1 for p in prompts], device=model.device)
    return model.hidden(ids, cache, embedded)[row, start[row] + j]     # (n, D)


def token_weights(mask: Tensor, reduction: str = "token", skip: int = 0) -> Tensor:
    """Weights (B, N) that sum to 1, so that loss = Σ w · d: the denominator is fixed here, for the whole batch.

    token      every completion token counts the same: 1 / #tokens
    sequence   every completion counts the same: mean over rows of the mean over its tokens (SDFT)
    `skip` leaves out the first tokens of each completion (SDFT skips 3, which open with phrases about the context).
    Because the loss is a plain sum under these weights, splitting the batch into micro-batches changes nothing.
    """
    if reduction not in ("token", "sequence") or skip < 0:
        raise ValueError(f"token_weights: reduction={reduction!r} must be 'token' or 'sequence' and skip={skip} not negative")
    scored = mask.float()  # q2: leave out what `skip` says, then divide: by what?
    scored[:, :skip] = 0
    if reduction == "token":
        return scored / scored.sum().clamp(min=1)
    per_row = scored.sum(1, keepdim=True)                              # (B, 1); rows that `skip` empties do not count
    return scored / per_row.clamp(min=1) / (per_row > 0).sum().clamp(min=1)


Objective = str | Callable[[Tensor, Tensor], Tensor] | dict


def token_loss(objective: Objective, student_logits: Tensor, teacher_logits: Tensor | None, tokens: Tensor) -> Tensor:
    """(n, V), (n, V), (n,) -> (n,), nats. What is minimised on each completion token:

    a divergence                by name or as a function of (student_logits, teacher_logits)
    "policy_gradient"           reverse KL from the sampled tokens alone; they must be the student's own, drawn at temperature 1
    "cross_entropy"             −log Q(token), no teacher: on an expert's completions this is SFT
    "weighted_cross_entropy"    stop_grad(Q(token)) · −log Q(token): what the student finds unlikely counts less (DFT, arXiv:2508.05629)
    {objective: coefficient}    their weighted sum: with the base as teacher {"weighted_cross_entropy": 1, "forward_kl": .1} is
                                ASFT (arXiv:2509.23753), cross_entropy in its place SFT inside a soft trust region
    """
    if isinstance(objective, dict):
        return sum(c * token_loss(part, student_logits, teacher_logits, tokens) for part, c in objective.items())
    if callable(objective):
        return objective(student_logits, teacher_logits)
    if objective in DIVERGENCES:
        return DIVERGENCES[objective](student_logits, teacher_logits)
    if objective in ("cross_entropy", "weighted_cross_entropy"):
        at_least_fp32 = torch.promote_types(student_logits.dtype, torch.float32)
        loss = F.cross_entropy(student_logits.to(at_least_fp32), tokens, reduction="none")
        return loss if objective == "cross_entropy" else (-loss).exp().detach() * loss
    if objective == "policy_gradient":
        log_q, log_p = (x.gather(-1, tokens[:, None])[:, 0] for x in log_softmax_pair(student_logits, teacher_logits))
        return policy_gradient_surrogate(log_q, log_p)
    raise ValueError(f"objective {objective!r} is not supported; "
                     f"choose from {', '.join(DIVERGENCES)}, policy_gradient, cross_entropy, weighted_cross_entropy")


def cosd_step(
    student: GPT, teacher: Teacher | None, batch: Batch, objective: Objective = "forward_kl", *,
    eos: Collection[int], max_new_tokens: int, temperature: float = 1.0, generator: torch.Generator | None = None,
    reduction: str = "token", skip: int = 0, weight: float = 1.0, micro_batch: int | None = None, chunk: int | None = None,
    autocast: Callable = nullcontext, backward: Callable[[Tensor], None] = Tensor.backward,
) -> dict[str, float]:
    """One step without the optimizer: rollout -> score -> divergence -> weighted sum -> backward. Returns what to log.

    `objective` as in `token_loss`. A batch that brings its completions makes the step off-policy: the expert's (SFT, GKD's
    1−λ) or the teacher's own (context distillation); otherwise the rollout is left in `batch`, so take a new one for the
    next step. `chunk` bounds the rows of logits held at once (divergences only).
    """
    # 1. Rollout: the student answers x, without C, at temperature T.
    if batch.completion is None:  # q5: into batch.completion and batch.mask
        with autocast():
            batch.completion, batch.mask = student.generate(
                batch.prompts, max_new_tokens, temperature=temperature, eos=eos, generator=generator)          # (B, N)
    weights = weight * token_weights(batch.mask, reduction, skip)                                               # (B, N)
    logs = []
    for rows, part in batch.split(micro_batch):
        w, tokens = weights[rows][part.mask], part.completion[part.mask]                                        # (n,), (n,)
        with autocast():  # q5: h_s, h_t and d for every token, then the loss; with a chunk, by chunked_divergence
            # 2. Score: the same completion tokens under (x) with gradient, and under (C, x) without.
            h_s = completion_states(student, part.prompts, part.completion, part.mask)                          # (n, D)
            h_t = teacher.states(part.teacher_prompts, part.completion, part.mask) if teacher else None         # (n, D)
            # 3. A divergence per token, summed under weights that add up to one over the whole batch.
            if chunk and (callable(objective) or (isinstance(objective, str) and objective in DIVERGENCES)):
                divergence = DIVERGENCES.get(objective, objective)
                loss, d = chunked_divergence(h_s, student.head.weight, h_t, teacher.model.head.weight, divergence, w, chunk)
            else:
                teacher_logits = teacher.model.head(h_t).detach() if teacher else None                          # (n, V)
                d = token_loss(objective, student.head(h_s), teacher_logits, tokens)                            # (n,)
                loss = (w * d).sum()
        # 4. The gradient reaches the student alone.
        backward(loss)
        with autocast():
            logs.append({"loss": loss.item(), "objective": (w * d).sum().item() / weight}
                        | diagnostics(student, teacher, h_s, h_t, len(w) / batch.mask.sum().item(), chunk or 256))
    ends = torch.isin(batch.completion, torch.tensor(sorted(eos), device=batch.mask.device)) & batch.mask
    sums = {key: sum(log[key] for log in logs) for key in logs[0]}
    return sums | {"length": batch.mask.sum(1).float().mean().item(), "eos_rate": ends.any(1).float().mean().item()}


@torch.no_grad()
def diagnostics(
    student: GPT, teacher: Teacher | None, h_s: Tensor, h_t: Tensor | None, share: float, rows: int
) -> dict[str, float]:
    """The student's entropy and the exact reverse KL to the teacher, nats per token, from the first `rows` positions,
    times `share`, the part of the batch's tokens that these stand for: summed over micro-batches they are the means."""
    log_q = student.head(h_s[:rows]).float().log_softmax(-1)           # (<= rows, V)
    log = {"entropy": share * -(log_q.exp() * log_q).sum(-1).mean().item()}
    return log | ({"kl": share * reverse_kl(log_q, teacher.model.head(h_t[:rows])).mean().item()} if teacher else {})
