"""From preferences to a policy: the reward model, and four ways to use it (the lecture's second half).

    preferences  ->  reward model r(x, y)  ->  best-of-N | RAFT | RL with a KL to a reference

One objective connects the lecture and the post. With a reference policy p_ref it is

    J(π) = E_{y ~ π(·|x)} [r(x, y)] − β KL(π(·|x) ‖ p_ref)

    p_ref = the initial policy, r a learned reward         RLHF (the lecture's step 3)
    p_ref = the same model shown C, r = 0                  COSD as one KL between whole answers
    p_ref = the same model shown C, r a reward             OPSD of PID (arXiv:2602.04942)

Its maximum is known in closed form (`tilted`), so every estimate below can be checked by enumeration
(tests/test_rlhf.py). Rewards and KLs are in nats per answer, summed over its tokens, not averaged.
Left out of PPO: the critic, GAE and the entropy bonus; the baseline comes from the group of answers.

Dimension key
  P prompts   G answers per prompt   B = P·G answers, grouped by prompt
  N tokens per answer, padded   n answer tokens of all rows   T tokens read   D width   V vocabulary
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contexts import WORLD_CHAT, seeded, student_prompt, teacher_prompt
from cosd import (
    Rows,
    completion_states,
    cosd_loss,
    cross_entropy,
    reverse_kl,
    token_weights,
)
from model import GPT, pad_right


# ==================================================================== 1. preferences, reward model
def bradley_terry(r_w: Tensor, r_l: Tensor) -> Tensor:
    """−log σ(r_w − r_l), (...) -> (...), from the rewards of the preferred answer and of the other.

    e^r_w / (e^r_w + e^r_l) = σ(r_w − r_l) is the probability of this preference under Bradley and
    Terry's model (1952). Only the difference counts: any function of x alone may be added to r, so
    the level of a reward is not identified. Gradient to both."""
    return -F.logsigmoid(r_w - r_l)


class RewardModel(nn.Module):
    """r(x, y): the policy's body, and one linear head on the state of the answer's last token."""

    def __init__(self, policy: GPT):
        super().__init__()
        self.body = copy.deepcopy(policy)
        self.value = nn.Linear(policy.config.d_model, 1, bias=False)  # a level is not identified
        nn.init.zeros_(self.value.weight)  # at first all answers have the same reward
        self.value.to(policy.embed.weight)

    def forward(self, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
        """Prompts and answers with their end token -> (B,)."""
        read = [x + y for x, y in zip(prompts, answers)]
        states = self.body.hidden(pad_right(read).to(self.body.device))  # (B, T, D)
        last = torch.tensor([len(tokens) - 1 for tokens in read], device=states.device)
        return self.value(states[torch.arange(len(read)), last])[:, 0]  # (B,)


def fit_reward_model(model: RewardModel, pairs, steps, lr=3e-4, batch=32, seed=0):
    """Maximum likelihood on triples (x, preferred y, other y), each a list of tokens. Yields the
    mean loss of every step, in nats per pair."""
    optimizer = adam(model, lr)
    for step in range(steps):
        chosen = seeded(seed, "pairs", step).choices(pairs, k=batch)
        prompts, winners, losers = map(list, zip(*chosen))
        r_w, r_l = model(prompts + prompts, winners + losers).chunk(2)  # (batch,) each
        loss = bradley_terry(r_w, r_l).mean()
        move(model, optimizer, loss)
        yield loss.item()


# ============================================================================ 2. what is known exactly
def tilted(log_ref: Tensor, r: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The maximum of E[r] − β KL(π‖ref): log π* = log ref + r/β − log Z, and J* = β log Z.

    Over all answers (..., S) -> (..., S), (...). For every other policy J* − J(π) = β KL(π‖π*)."""
    log_z = (log_ref + r / beta).logsumexp(-1)
    return log_ref + r / beta - log_z[..., None], beta * log_z


def best_of_n_law(p: Tensor, r: Tensor, n: int) -> Tensor:
    """Probability that each answer is the best of n draws from p: F(r)^n − F(r⁻)^n, (S,) -> (S,).

    F(r) is the probability of a reward of at most r, F(r⁻) of less. Answers of equal reward share
    theirs in proportion to p. KL(best-of-n‖p) <= log n − (n−1)/n, a bound (arXiv:2401.01879)."""
    at_most = ((r[None] <= r[:, None]) * p).sum(1)  # (S,)
    less = ((r[None] < r[:, None]) * p).sum(1)
    return (at_most**n - less**n) * p / (at_most - less)


# ================================================================================ 3. policy gradient
def answer_logits(model: GPT, prompts: list[list[int]], ids: Tensor, mask: Tensor) -> Tensor:
    """The logits that predict every answer token -> (n, V)."""
    return model.head(completion_states(model, prompts, ids, mask))


def chosen_logp(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of every token of the answers, 0 after their end -> (B, N)."""
    logp = logits.log_softmax(-1).gather(-1, ids[mask][:, None])[:, 0]  # (n,)
    return on_grid(logp, mask)


def on_grid(values: Tensor, mask: Tensor) -> Tensor:
    """(n,) -> (B, N), 0 where there is no token."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def returns_to_go(r: Tensor, log_ratio: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The return of each token: the rewards from this token on, with the KL in the reward -> (B, N).

    Each token earns −β (log π − log ref), which is −β k1, and the last one also earns r. Token t's
    return is the sum from t on. E[Σ_t return_t ∇log π_t] is exactly the gradient of
    E[r] − β KL(π‖ref). No gradient flows through r or the ratio."""
    earned = -beta * log_ratio.detach() * mask  # (B, N)
    to_go = earned.flip(1).cumsum(1).flip(1) + r[:, None]
    return to_go * mask


def leave_one_out(total: Tensor) -> Tensor:
    """The mean of the *other* answers to the same prompt, (P, G) -> (P, G): RLOO's baseline
    (arXiv:2402.14740). It does not depend on the answer itself, so the gradient stays unbiased; the
    mean of all G answers would scale the expected gradient by exactly (G−1)/G."""
    return (total.sum(1, keepdim=True) - total) / (total.shape[1] - 1)


def advantages(returns: Tensor, group: int, name: str) -> Tensor:
    """Returns to go (B, N) -> advantages (B, N).

    rloo   returns minus the mean of the other answers' totals: unbiased
    grpo   (total − mean) / standard deviation of the group, the same at every token
           (arXiv:2402.03300): easy and hard prompts count alike, which is another objective"""
    total = returns[:, 0].reshape(-1, group)  # (P, G): all that an answer earns
    if name == "rloo":
        return returns - leave_one_out(total).reshape(-1, 1)
    if name != "grpo":
        raise ValueError(f"advantage {name!r}: choose from rloo, grpo")
    normal = (total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-6)
    return normal.reshape(-1, 1).expand_as(returns)


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor, clip=0.2
) -> Tensor:
    """−mean over answers of Σ_t min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t), ρ = π/π_old (PPO, Eq. 7,
    arXiv:1707.06347) -> ().

    old_logp belongs to the policy that sampled. In the first update ρ = 1, so the clip is inactive
    and the gradient is that of REINFORCE, A ∇log π. Gradient to logp only."""
    ratio = (logp - old_logp.detach()).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(gain * mask).sum(1).mean()


def kl_in_loss(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """Σ_t KL(π_t‖ref_t) along sampled answers, exact at every token, mean over answers -> ().

    Its value is an unbiased estimate of the sequence KL. Its gradient is not: it ignores that each
    token also decides which later positions are reached. `reached` is the missing term."""
    return on_grid(reverse_kl(logits, ref_logits), mask).sum(1).mean()


def reached(logits: Tensor, ref_logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Surrogate of Σ_t KL_t ∇log π(y_<t) -> (). With `kl_in_loss` it gives the gradient of the sequence KL."""
    kl_t = on_grid(reverse_kl(logits, ref_logits), mask).detach()  # (B, N)
    logp = chosen_logp(logits, ids, mask)
    return (kl_t * (logp.cumsum(1) - logp)).sum(1).mean()


# ====================================================================================== 4. the loops
@dataclass(frozen=True)
class RL:
    """The settings of the loops below."""

    steps: int = 60
    prompts: int = 32
    group: int = 8
    lr: float = 3e-4
    beta: float = 0.0
    kl_in_loss: bool = False  # True: the KL is in the loss; False: in the reward
    in_context: bool = False  # the reference reads C
    advantage: str = "rloo"
    clip: float = 0.2
    updates: int = 1  # of the policy, on each rollout
    max_new: int = 24
    seed: int = 0


def roll_out(policy: GPT, examples: list, how: RL, step: int, show=student_prompt) -> tuple:
    """`group` answers to every prompt -> (examples (B), prompts (B), ids (B, N), mask (B, N))."""
    many = [e for e in examples for _ in range(how.group)]
    prompts = [show(WORLD_CHAT, e) for e in many]
    generator = torch.Generator(policy.device).manual_seed(
        seeded(how.seed, "rl", step).getrandbits(60)
    )
    ids, mask = policy.generate(prompts, how.max_new, eos=WORLD_CHAT.ends, generator=generator)
    return many, prompts, ids, mask


def adam(model, lr):
    return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)


def move(model, optimizer, loss):
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def as_lists(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[kept].tolist() for row, kept in zip(ids, mask)]


def log_of(r: Tensor, log_ratio: Tensor, group: int) -> dict:
    """A row of the log; a group is dead if all its answers earn the same reward."""
    groups = r.reshape(-1, group)
    return {
        "reward": r.mean().item(),
        "kl": log_ratio.sum(1).mean().item(),  # nats per answer, to the reference
        "dead": (groups == groups[:, :1]).all(1).float().mean().item(),
    }


def reinforce(policy: GPT, reference: GPT, draw, reward, how: RL):
    """Maximise E[r] − β KL(π‖ref). draw(step) -> P examples; reward(examples, answers) -> (B,), where
    an answer is a list of tokens. Changes `policy`; yields the log of each step."""
    optimizer = adam(policy, how.lr)
    ref_reads = teacher_prompt if how.in_context else student_prompt
    in_loss = how.beta * how.kl_in_loss
    for step in range(how.steps):
        many, prompts, ids, mask = roll_out(policy, draw(step), how, step)
        logits = answer_logits(policy, prompts, ids, mask)  # (n, V)
        with torch.no_grad():
            r = reward(many, as_lists(ids, mask))  # (B,)
            theirs = [ref_reads(WORLD_CHAT, e) for e in many]
            ref_logits = answer_logits(reference, theirs, ids, mask)  # (n, V)
            old_logp = chosen_logp(logits, ids, mask)  # (B, N)
            log_ratio = old_logp - chosen_logp(ref_logits, ids, mask)
            returns = returns_to_go(r, log_ratio, mask, how.beta - in_loss)
            advantage = advantages(returns, how.group, how.advantage)
        for update in range(how.updates):
            if update:
                logits = answer_logits(policy, prompts, ids, mask)
            logp = chosen_logp(logits, ids, mask)
            loss = policy_loss(logp, old_logp, advantage, mask, how.clip)
            if in_loss:
                loss = loss + in_loss * kl_in_loss(logits, ref_logits, mask)
            move(policy, optimizer, loss)
        yield log_of(r, log_ratio, how.group)


def raft(policy: GPT, draw, reward, how: RL):
    """RAFT (arXiv:2304.06767): each round keeps the best of every prompt's G answers and imitates
    them by `updates` steps of SFT; the next round samples from the new policy."""
    optimizer = adam(policy, how.lr)
    for step in range(how.steps):
        many, prompts, ids, mask = roll_out(policy, draw(step), how, step)
        with torch.no_grad():
            r = reward(many, as_lists(ids, mask))
        groups = r.reshape(-1, how.group)  # (P, G)
        best = groups.argmax(1) + torch.arange(len(groups)) * how.group  # (P,)
        x, y, kept = [prompts[i] for i in best.tolist()], ids[best], mask[best]
        rows = Rows(x, x, y, kept, token_weights(kept), None, cross_entropy)
        for _ in range(how.updates):
            move(policy, optimizer, cosd_loss(policy, rows)[0])
        yield {"reward": r.mean().item(), "kept": groups.amax(1).mean().item()}
