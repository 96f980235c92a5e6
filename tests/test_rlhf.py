"""The RL half, by enumeration: a tiny model whose every answer is listed, in float64, so that an expectation is a sum."""

import copy
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import instruct
import rlhf
import rlhf_evidence as evidence
from conftest import tiny_gpt
from rlhf import RL, advantages, answer_logits, chosen_logp, policy_loss, returns_to_go
from test_house import count

import contexts
from cosd import completion_states, k1, k3, kl, reverse_kl
from model import GPT, GPTConfig, pad_right

END = 0


class Enumerated:
    """A policy π, a reference, and every answer to a prompt: up to N tokens, ended by END or by the limit."""

    def __init__(self, vocabulary=4, longest=3, seed=0):
        self.policy = tiny_gpt(seed, vocab_size=vocabulary)
        self.reference = tiny_gpt(seed + 1, vocab_size=vocabulary)
        answers = []
        for n in range(1, longest + 1):
            for y in itertools.product(range(vocabulary), repeat=n):
                inside_ends = END in y[:-1]
                if not inside_ends and (y[-1] == END or n == longest):
                    answers.append(list(y))
        self.answers = answers
        self.ids = pad_right(answers)  # (S, N)
        self.mask = pad_right([[1] * len(y) for y in answers]).bool()
        torch.manual_seed(seed)
        self.r = torch.randn(len(answers), dtype=torch.float64)

    def logp(self, model, prompt=(1, 2), rows=None):
        """Log-probability of every token of every answer -> (S, N)."""
        prompts = [list(prompt)] * len(self.ids)
        logits = answer_logits(model, prompts, self.ids, self.mask)
        return chosen_logp(logits, self.ids, self.mask)

    def gradient_of(self, loss):
        return instruct.gradient(self.policy, loss)

    def objective(self, beta, prompt=(1, 2)):
        """E[r] − β KL(π‖ref), summed over all answers."""
        log_pi = self.logp(self.policy, prompt).sum(1)
        log_ref = self.logp(self.reference, prompt).sum(1).detach()
        return log_pi.exp() @ (self.r - beta * (log_pi - log_ref))

    def expected_loss(self, group, beta, advantage):
        """The expectation of `policy_loss` over all groups of answers, as one weighted loss; its gradient is the expected gradient."""
        logp = self.logp(self.policy)  # (S, N)
        log_ratio = (logp - self.logp(self.reference)).detach()
        S = len(self.ids)
        groups = torch.cartesian_prod(*[torch.arange(S)] * group)  # (S^G, G)
        probability = logp.sum(1).detach().exp()[groups].prod(1)  # (S^G,)
        rows = groups.flatten()
        mask = self.mask[rows]
        a = advantage(returns_to_go(self.r[rows], log_ratio[rows], mask, beta), group)
        a = a * (probability * len(groups)).repeat_interleave(group)[:, None]
        return policy_loss(logp[rows], logp[rows], a, mask)


@pytest.fixture(scope="module")
def world():
    return Enumerated()


def rloo(returns, group):
    return advantages(returns, group, "rloo")


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_budget():
    assert count((ROOT / "notebooks" / "rlhf.py").read_text()) <= 2_000


def test_every_answer_is_listed(world):
    assert len(world.ids) == 40
    for model in (world.policy, world.reference):
        close(world.logp(model).sum(1).exp().sum(), torch.ones((), dtype=torch.float64))


def test_tokens_probabilities_are_the_models(world):
    """Against the model read without padding, one answer at a time."""
    logp = world.logp(world.policy)
    for y, row in zip(world.answers, logp):
        logits = world.policy(torch.tensor([[1, 2, *y]]))[0].log_softmax(-1)
        plain = [logits[1 + j, token] for j, token in enumerate(y)]
        close(row[: len(y)], torch.stack(plain))
        assert (row[len(y) :] == 0).all()


# ------------------------------------------------------------------------------------- the optimum
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_the_optimum_in_closed_form(world, beta):
    """J* = β log Z is reached by π*, and every other policy misses it by β KL(π‖π*)."""
    log_ref = world.logp(world.reference).sum(1).detach()
    log_star, best = rlhf.tilted(log_ref, world.r, beta)
    star = log_star.exp()
    close(star.sum(), torch.ones((), dtype=torch.float64))
    close(star @ world.r - beta * kl(log_star, log_ref), best)
    for seed in range(3):
        log_pi = torch.randn(40, dtype=torch.float64).log_softmax(-1) if seed else log_ref
        j = log_pi.exp() @ world.r - beta * kl(log_pi, log_ref)
        close(best - j, beta * kl(log_pi, log_star), 1e-11)


def test_one_objective_joins_both_documents(world):
    """With r = 0 and the teacher as reference it is COSD's sequence KL; so it is with the base as reference, β = 1, and the reward log P(y|x,C) − log ref(y|x)."""
    log_pi = world.logp(world.policy).sum(1)
    log_teacher = world.logp(world.reference, prompt=(3, 1, 1, 2)).sum(1).detach()
    log_base = world.logp(world.reference).sum(1).detach()
    cosd = -kl(log_pi, log_teacher)
    as_rl = log_pi.exp() @ ((log_teacher - log_base) - (log_pi - log_base))
    close(cosd, as_rl)
    star, _ = rlhf.tilted(log_base, log_teacher - log_base, 1.0)
    close(star, log_teacher)


# --------------------------------------------------------------------------------------- best of N
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_best_of_n_law_against_all_draws(n, tied):
    world = Enumerated(vocabulary=3, longest=2)
    r = world.r.round() if tied else world.r
    assert tied == (len(r.unique()) < len(r))
    p = world.logp(world.policy).sum(1).detach().exp()
    law = torch.zeros_like(p)
    for draw in itertools.product(range(len(p)), repeat=n):
        best = [i for i in draw if r[i] == r[list(draw)].max()]
        for i in best:  # a tie is broken at random
            law[i] += p[list(draw)].prod() / len(best)
    close(rlhf.best_of_n_law(p, r, n), law)


@pytest.mark.parametrize("n", [2, 4, 16, 128])
def test_best_of_n_spends_less_than_its_bound_and_earns_less_than_the_tilt(world, n):
    log_p = world.logp(world.policy).sum(1).detach()
    law = rlhf.best_of_n_law(log_p.exp(), world.r, n)
    close(law.sum(), torch.ones((), dtype=torch.float64))
    spent = kl(law.log(), log_p)
    assert 0 < spent < math.log(n) - (n - 1) / n  # a bound, never reached by a finite world
    low, high = 1e-3, 1e3  # the β whose tilted policy spends as much
    for _ in range(200):
        beta = math.sqrt(low * high)
        star, _ = rlhf.tilted(log_p, world.r, beta)
        if kl(star, log_p) > spent:
            low = beta
        else:
            high = beta
    close(kl(star, log_p), spent, 1e-9)
    assert star.exp() @ world.r > law @ world.r


def test_raft_by_exact_refit_is_best_of_two_to_the_k(world):
    p = world.logp(world.policy).sum(1).detach().exp()
    policy = p
    for k in range(1, 5):
        policy = rlhf.best_of_n_law(policy, world.r, 2)
        close(policy, rlhf.best_of_n_law(p, world.r, 2**k))


# ---------------------------------------------------------------------------------- policy gradient
@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_is_unbiased(world, group, beta):
    """The expectation over all groups of answers is the gradient of E[r] − β KL(π‖ref) itself."""
    exact = world.gradient_of(-world.objective(beta))
    assert exact.norm() > 0.1
    close(world.gradient_of(world.expected_loss(group, beta, rloo)), exact)


@pytest.mark.parametrize("group", [2, 3])
def test_a_mean_that_includes_the_answer_shrinks_the_gradient(world, group):
    def own_mean(returns, group):
        total = returns[:, 0].view(-1, group)
        return returns - total.mean(1, keepdim=True).expand(-1, group).reshape(-1, 1)

    exact = world.gradient_of(-world.objective(0.0))
    shrunk = world.gradient_of(world.expected_loss(group, 0.0, own_mean))
    close(shrunk, exact * (group - 1) / group)


@pytest.mark.parametrize("group, same", [(2, True), (3, True), (4, False)])
def test_dividing_by_the_deviation_weighs_prompts(group, same):
    """With rewards of 0 and 1 the expected gradient of one prompt is f(p) ∇p, p the share that is right. RLOO has f = 1. GRPO's f is a constant for groups
    of 2 and 3, so nothing shows; from 4 on it depends on p, and prompts of different difficulty get other weights than E[r] gives them."""
    factors = []
    for right in (range(1), range(3)):  # a hard prompt and an easy one
        world = Enumerated(vocabulary=3, longest=2)
        world.r = torch.zeros_like(world.r)
        world.r[list(right)] = 1
        exact = world.gradient_of(-world.objective(0.0))
        got = world.gradient_of(
            world.expected_loss(group, 0.0, lambda a, g: advantages(a, g, "grpo"))
        )
        close(instruct.cosine(got, exact), torch.ones((), dtype=torch.float64), 1e-9)
        factors.append((got.norm() / exact.norm()).item())
    assert (abs(factors[0] / factors[1] - 1) < 1e-4) == same  # 1e-6 in the denominator


def test_grpo_by_hand():
    returns = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    a = advantages(returns, 4, "grpo")  # mean ½, deviation √(1/3)
    close(a[:, 0], torch.tensor([-1.0, 1, 1, -1], dtype=torch.float64) * math.sqrt(3) / 2, 1e-5)
    assert torch.equal(a[:, 0], a[:, 1])
    with pytest.raises(ValueError, match="choose from rloo, grpo"):
        advantages(returns, 4, "ppo")


def test_returns_to_go_by_hand():
    """Two answers; β = .5. Tokens earn −.5 × (.2, −.4, .6), the last one 1 more."""
    log_ratio = torch.tensor([[0.2, -0.4, 0.6], [0.4, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    got = returns_to_go(torch.tensor([1.0, 2.0]), log_ratio, mask, 0.5)
    torch.testing.assert_close(got, torch.tensor([[0.8, 0.9, 0.7], [1.8, 0.0, 0.0]]))
    assert not got.requires_grad


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_equal_rewards_teach_nothing_unless_the_kl_is_in_the_reward(world, name):
    r = torch.ones(4, dtype=torch.float64)
    rows = torch.tensor([0, 7, 20, 39])
    mask, logp = world.mask[rows], world.logp(world.policy)[rows]
    log_ratio = (logp - world.logp(world.reference)[rows]).detach()
    without, within = (
        advantages(returns_to_go(r, log_ratio, mask, b), 4, name) for b in (0.0, 0.3)
    )
    assert world.gradient_of(policy_loss(logp, logp, without, mask)).norm() < 1e-9
    logp = world.logp(world.policy)[rows]
    assert world.gradient_of(policy_loss(logp, logp, within, mask)).norm() > 1e-2


def test_clip_by_hand():
    """ρ = e^.5 = 1.65 and e^−.5 = .61, ε = .2: what would leave the interval in the direction of its advantage counts as its edge."""
    logp = torch.tensor([[0.5], [0.5], [-0.5], [-0.5]], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    mask = torch.ones(4, 1, dtype=torch.bool)
    up, down = math.exp(0.5), math.exp(-0.5)
    loss = policy_loss(logp, torch.zeros_like(logp), advantage, mask)
    assert loss.item() == pytest.approx(-(1.2 - up + down - 0.8) / 4)
    loss.backward()
    expected = torch.tensor([[0.0], [up], [-down], [0.0]], dtype=torch.float64) / 4
    close(logp.grad, expected)


def test_at_ratio_one_the_clip_is_inactive(world):
    advantage = torch.randn(world.mask.shape, dtype=torch.float64)
    gradients = []
    for clip in (1e-9, 0.2, 1e9):
        logp = world.logp(world.policy)
        gradients.append(world.gradient_of(policy_loss(logp, logp, advantage, world.mask, clip)))
    logp = world.logp(world.policy)
    plain = -(advantage * world.mask * logp).sum(1).mean()  # REINFORCE
    gradients.append(world.gradient_of(plain))
    for g in gradients[:-1]:
        close(g, gradients[-1])


# -------------------------------------------------------------------- the KL in the reward or the loss
def over_all_answers(world, term):
    """Σ_y π(y) term(y), where π(y) is held fixed: the expectation of what is computed on samples."""
    p = world.logp(world.policy).sum(1).detach().exp()
    total = 0.0
    for i in range(len(p)):
        ids, mask = world.ids[i : i + 1], world.mask[i : i + 1]
        logits = answer_logits(world.policy, [[1, 2]], ids, mask)
        with torch.no_grad():
            theirs = answer_logits(world.reference, [[1, 2]], ids, mask)
        total = total + p[i] * term(logits, theirs, ids, mask)
    return total


def test_a_kl_in_the_loss_needs_its_missing_term(world):
    log_pi, log_ref = (world.logp(m).sum(1) for m in (world.policy, world.reference))
    sequence = kl(log_pi, log_ref.detach())
    exact = world.gradient_of(sequence)
    in_loss = over_all_answers(world, lambda a, b, ids, mask: rlhf.kl_in_loss(a, b, mask))
    close(in_loss, sequence.detach())  # the value is unbiased
    got = world.gradient_of(in_loss)
    assert instruct.cosine(got, exact) < 0.99  # the gradient is not
    rest = world.gradient_of(over_all_answers(world, rlhf.reached))
    close(got + rest, exact)


def test_estimators_in_the_loss(world):
    """k1 in the loss has no gradient at all; k3 another one than the KL's; in the reward k1 is exact (test_rloo_is_unbiased, β > 0)."""
    log_pi, log_ref = (world.logp(m).sum(1) for m in (world.policy, world.reference))
    exact = world.gradient_of(kl(log_pi, log_ref.detach()))

    def of(estimator):
        def term(logits, theirs, ids, mask):
            mine, other = chosen_logp(logits, ids, mask), chosen_logp(theirs, ids, mask)
            return (estimator(mine, other) * mask).sum()

        return world.gradient_of(over_all_answers(world, term))

    assert exact.norm() > 0.1 and of(k1).norm() < 1e-12
    assert instruct.cosine(of(k3), exact) < 0.99


# -------------------------------------------------------------------------------------- Bradley–Terry
def test_the_lectures_sigmoid():
    x = torch.linspace(-6, 6, 25, dtype=torch.float64)
    s = x.sigmoid()
    close(1 - s, (-x).sigmoid())
    close(s, x.exp() / (x.exp() + 1))
    r_w, r_l = x, x.flip(0) / 3
    close(r_w.exp() / (r_w.exp() + r_l.exp()), (r_w - r_l).sigmoid())
    close(rlhf.bradley_terry(r_w, r_l), -(r_w - r_l).sigmoid().log())
    one = torch.tensor(1.0, dtype=torch.float64)
    assert rlhf.bradley_terry(one, 0 * one).item() == pytest.approx(0.31326, abs=1e-5)


def test_bradley_terry_recovers_differences_not_levels(world):
    """Maximum likelihood on the exact preference probabilities of all pairs."""
    true, guess = world.r, torch.zeros(40, dtype=torch.float64, requires_grad=True)
    preferred = (true[:, None] - true[None]).sigmoid()  # (S, S): i over j

    def loss():
        i_over_j = rlhf.bradley_terry(guess[:, None], guess[None])
        return (preferred * i_over_j).sum() / 40

    optimizer = torch.optim.LBFGS([guess], max_iter=500, tolerance_grad=1e-14, tolerance_change=0)
    optimizer.step(lambda: (optimizer.zero_grad(), loss(), None)[1].backward() or loss())
    with torch.no_grad():
        close(guess - guess.mean(), true - true.mean(), 1e-5)
        before = loss()
        guess += 7  # another level
        close(loss(), before)
    (gradient,) = torch.autograd.grad(loss(), guess)
    close(gradient.sum(), torch.zeros((), dtype=torch.float64))


def test_reward_model_reads_the_last_token(gpt):
    model = rlhf.RewardModel(gpt)
    prompts, answers = [[1, 2, 3], [4], [5, 6]], [[7, 8], [9, 10, 11], [12]]
    assert (model(prompts, answers) == 0).all()  # before it has learned
    torch.nn.init.normal_(model.value.weight)
    got = model(prompts, answers)
    for x, y, r in zip(prompts, answers, got):
        state = gpt.hidden(torch.tensor([x + y]))[0, -1]  # no padding, no batch
        close(r, state @ model.value.weight[0])
    ids, mask = pad_right(answers), pad_right([[1] * len(y) for y in answers]).bool()
    assert completion_states(gpt, prompts, ids, mask).shape[0] == 6  # these never read the last one


def test_reward_model_learns_a_known_reward():
    """Answers of one token, each with its own reward; what is preferred follows Bradley and Terry. Held-out pairs are predicted nearly as well as knowing r* would."""
    base = tiny_gpt(3, vocab_size=12).float()
    torch.manual_seed(0)
    true = torch.randn(12) * 2
    pairs = []
    for _ in range(600):
        a, b = torch.randperm(12)[:2].tolist()
        if torch.rand(()) > (true[a] - true[b]).sigmoid():
            a, b = b, a
        pairs.append(([1, 2], [a], [b]))
    model = rlhf.RewardModel(base)
    losses = list(rlhf.fit_reward_model(model, pairs, steps=150, lr=3e-3))
    assert losses[0] == pytest.approx(math.log(2)) and sum(losses[-20:]) / 20 < 0.5
    with torch.no_grad():
        r = model([[1, 2]] * 12, [[i] for i in range(12)])
    assert torch.corrcoef(torch.stack([r, true]))[0, 1] > 0.95
    again = list(rlhf.fit_reward_model(rlhf.RewardModel(base), pairs, steps=5, lr=3e-3))
    assert again == losses[:5]


# ---------------------------------------------------------------------------------- finite differences
def test_finite_differences(world):
    torch.manual_seed(1)
    mask = torch.tensor([[True, True], [True, False]])
    ids = torch.tensor([[2, 1], [3, 0]])
    logits, ref = torch.randn(2, 3, 4, dtype=torch.float64)
    logits.requires_grad_()
    advantage, old = torch.randn(2, 2, 2, dtype=torch.float64)
    old = chosen_logp(logits.detach() + 0.1, ids, mask) + 0.1 * old
    check = torch.autograd.gradcheck
    assert check(lambda x: policy_loss(chosen_logp(x, ids, mask), old, advantage, mask), logits)
    assert check(lambda x: rlhf.kl_in_loss(x, ref, mask), logits)
    r_w, r_l = torch.randn(2, 5, dtype=torch.float64)
    assert check(rlhf.bradley_terry, (r_w.requires_grad_(), r_l.requires_grad_()))

    # `reached` holds KL_t fixed, so its differences are those of Σ_t KL_t log π(y_<t), KL_t a constant
    kl_t = reverse_kl(logits, ref).detach()

    def before(x):
        logp = x.log_softmax(-1)
        return kl_t[1] * logp[0, ids[0, 0]] / 2  # the only position behind another; a mean of two

    (got,) = torch.autograd.grad(rlhf.reached(logits, ref, ids, mask), logits)
    (wanted,) = torch.autograd.grad(before(logits), logits)
    close(got, wanted)
    assert check(before, logits)


def test_the_whole_chain_by_finite_differences(world):
    """The expected RLOO gradient against differences of E[r] − β KL(π‖ref) in a few weights of the model."""
    gradient = -world.gradient_of(world.expected_loss(2, 0.3, rloo))
    weights = torch.nn.utils.parameters_to_vector(world.policy.parameters()).detach()
    for i in gradient.abs().topk(5).indices.tolist():
        values = []
        for step in (1e-5, -1e-5):
            moved = weights.clone()
            moved[i] += step
            torch.nn.utils.vector_to_parameters(moved, world.policy.parameters())
            values.append(world.objective(0.3).item())
        torch.nn.utils.vector_to_parameters(weights, world.policy.parameters())
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient[i].item(), rel=1e-6)


# --------------------------------------------------------------------------------------------- the loops
@pytest.fixture
def small():
    """A random policy with the world's vocabulary, three words to ask about, and a reward that is easy: the first token's number is even."""
    torch.manual_seed(0)
    policy = GPT(GPTConfig(contexts.ENCODING.n_vocab, n_layer=1, d_model=32, head_dim=8, d_ff=48))
    task = contexts.world_task("privileged", 0, 3)

    def even(examples, answers):
        return torch.tensor([float(y[0] % 2 == 0) for y in answers])

    return policy, (lambda step: task.heldout), even


HOW = RL(steps=3, prompts=3, group=4, max_new=8)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.1},
        {"beta": 0.1, "kl_in_loss": True},
        {"beta": 0.1, "in_context": True},
        {"updates": 3},
    ]
    + [{"advantage": "grpo", "kl_in_loss": True, "beta": 0.1, "updates": 2}],
)
def test_reinforce_changes_the_policy_alone_and_repeats_itself(small, changes):
    policy, draw, reward = small
    runs = []
    for _ in range(2):
        mine, reference = copy.deepcopy(policy), copy.deepcopy(policy)
        logs = list(rlhf.reinforce(mine, reference, draw, reward, replace(HOW, **changes)))
        assert len(logs) == 3
        for a, b in zip(reference.parameters(), policy.parameters()):
            assert torch.equal(a, b)
        assert not torch.equal(mine.embed.weight, policy.embed.weight)
        runs.append((logs, mine.embed.weight))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    in_context = changes.get("in_context", False)
    assert (
        abs(runs[0][0][0]["kl"]) < 1e-4
    ) != in_context  # at the start the policy is its reference


def test_reinforce_earns_more_and_a_kl_holds_it_back(small):
    policy, draw, reward = small
    spent = {}
    for beta in (0.0, 1.0):
        mine, how = copy.deepcopy(policy), replace(HOW, steps=40, group=16, lr=1e-2, beta=beta)
        logs = list(rlhf.reinforce(mine, policy, draw, reward, how))
        spent[beta] = logs[-1]["kl"]
        if beta == 0:
            assert logs[0]["reward"] < 0.6 and logs[-1]["reward"] > 0.75
    assert spent[1.0] < spent[0.0] / 2


@pytest.mark.parametrize("in_loss", [False, True])
def test_without_a_reward_the_kl_alone_draws_back(small, in_loss):
    """From other weights and without a reward, the policy returns to its reference."""
    reference, draw, _ = small
    mine = copy.deepcopy(reference)
    with torch.no_grad():
        mine.embed.weight[:100] += 0.3 * torch.randn(100, 32)
    how = replace(HOW, steps=30, group=16, lr=1e-2, beta=1.0, kl_in_loss=in_loss)
    nothing = lambda examples, answers: torch.zeros(len(answers))
    logs = [row["kl"] for row in rlhf.reinforce(mine, reference, draw, nothing, how)]
    assert sum(logs[-5:]) < 0.5 * sum(logs[:5]) and logs[0] > 0.5


def test_dead_groups_are_counted(small):
    """Of three groups, one earns nothing, one everything, and in the third the answers differ."""
    policy, draw, _ = small
    r = torch.tensor([0.0] * 4 + [1.0] * 4 + [0, 1, 0, 0])
    how = replace(HOW, steps=1)
    (log,) = rlhf.reinforce(policy, copy.deepcopy(policy), draw, lambda e, y: r, how)
    assert log["dead"] == pytest.approx(2 / 3) and log["reward"] == pytest.approx(5 / 12)


def test_raft_imitates_the_best_of_each_group(small):
    """One round, one update: the same step as SFT on the answers that earned most."""
    policy, draw, reward = small
    how = replace(HOW, steps=1, group=6)
    _, prompts, ids, mask = rlhf.roll_out(policy, draw(0), how, 0)
    score = torch.rand(18)
    best = [max(range(i, i + 6), key=lambda j: score[j]) for i in (0, 6, 12)]
    mine, theirs = copy.deepcopy(policy), copy.deepcopy(policy)
    (log,) = rlhf.raft(mine, draw, lambda e, y: score, how)
    assert log["kept"] == pytest.approx(score[best].mean().item())
    logits = answer_logits(theirs, [prompts[i] for i in best], ids[best], mask[best])
    loss = F.cross_entropy(logits, ids[best][mask[best]])
    rlhf.move(theirs, rlhf.adam(theirs, how.lr), loss)
    for a, b in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------- masks of SFT, gradients
def test_prefix_mask_by_hand(gpt):
    mask = instruct.PrefixMask(gpt.config, torch.tensor([1, 3]), 4).visible
    decoder = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    prefix = [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert mask.int().tolist() == [decoder, prefix]  # a prompt of one token changes nothing


def test_prefix_states(gpt):
    prompts, answers = [[1, 2, 3], [4]], [[5, 6], [7, 8, 9]]
    states = instruct.prefix_states(gpt, prompts, answers)
    plain = gpt.hidden(torch.tensor([[4, 7, 8, 9]]))
    close(states[1, :4], plain[0])  # a prompt of one token: a decoder
    alone = instruct.prefix_states(gpt, prompts[:1], answers[:1])
    close(states[0, :5], alone[0])  # padding is not seen
    other = instruct.prefix_states(gpt, [[1, 2, 10]], answers[:1])
    assert (other[0, 0] - alone[0, 0]).abs().max() > 1e-3  # the first token sees the prompt's last
    later = instruct.prefix_states(gpt, prompts[:1], [[5, 11]])
    close(later[0, :4], alone[0, :4])  # nobody sees an answer's future


def test_prefix_loss_against_one_token_at_a_time(gpt):
    prompts, answers = [[1, 2, 3], [4, 5]], [[5, 6], [7, 8, 9]]
    logps = []
    for x, y in zip(prompts, answers):
        for j, token in enumerate(y):  # reading anew what stands before each token
            h = instruct.prefix_states(gpt, [x], [y[:j]])[0, -1]
            logps.append(gpt.head(h).log_softmax(-1)[token])
    close(instruct.prefix_loss(gpt, prompts, answers), -torch.stack(logps).mean())


def test_prefix_greedy_is_the_likeliest_token_each_time(gpt):
    prompts = [[1, 2, 3], [4, 5]]
    (free, _) = instruct.prefix_greedy(gpt, prompts, 5, set())
    assert len(free) == 5
    ended, other = instruct.prefix_greedy(gpt, prompts, 5, {free[2]})
    assert ended == free[: free.index(free[2]) + 1]
    states = instruct.prefix_states(gpt, prompts[:1], [free])
    assert gpt.head(states[0, 2:7]).argmax(-1).tolist() == free


def test_cosine():
    v, w = torch.randn(2, 9, dtype=torch.float64)
    assert instruct.cosine(
        torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    ).item() == pytest.approx(0.96)
    close(instruct.cosine(v, 2.5 * v), torch.ones((), dtype=torch.float64))
    close(instruct.cosine(v, -v), -torch.ones((), dtype=torch.float64))
    assert instruct.cosine(v, w) < 1 and (v / w).std() > 0  # not proportional: below 1


def test_a_negative_cosine_means_a_step_that_forgets(gpt):
    """GEM's condition, to first order: the other loss changes by −rate · |g| |h| cosine."""
    read = [[1, 2, 3]]
    losses = [
        lambda: instruct.prefix_loss(gpt, read, [[4]]),
        lambda: instruct.prefix_loss(gpt, read, [[5]]),
    ]
    g, h = (instruct.gradient(gpt, loss()) for loss in losses)
    before = losses[1]().item()
    weights = torch.nn.utils.parameters_to_vector(gpt.parameters()).detach()
    torch.nn.utils.vector_to_parameters(weights - 1e-6 * g, gpt.parameters())
    change = losses[1]().item() - before
    assert change == pytest.approx(
        (-1e-6 * g.norm() * h.norm() * instruct.cosine(g, h)).item(), rel=1e-3
    )


def test_gibbs_and_the_most_uncertain_distribution():
    """H(p, q) >= H(p), equal at q = p; a one-hot p leaves −log q of its class; no distribution has more entropy than the uniform one."""
    torch.manual_seed(0)
    for _ in range(50):
        log_p, log_q = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
        p = log_p.exp()
        entropy, crossed = -(p @ log_p), -(p @ log_q)
        assert crossed > entropy and entropy < math.log(6)
        close(crossed, entropy + kl(log_p, log_q))
        one_hot = F.one_hot(torch.tensor(2), 6).double()
        close(-(one_hot @ log_q), F.cross_entropy(log_q[None], torch.tensor([2])))


# --------------------------------------------------------------------------------- the experiments' parts
def test_pi_distill_by_enumeration(world):
    """One set of weights reads (C, x) as teacher and x as student. The expected gradient is that of its two terms, each with one side held fixed."""
    alpha, beta, seen = 0.3, 0.4, (3, 1, 1, 2)
    how = replace(HOW, group=2, beta=beta)
    log_t, log_s = (world.logp(world.policy, x).sum(1) for x in (seen, (1, 2)))
    bracket = log_t.exp() @ (world.r - beta * (log_t - log_s.detach()))
    other = log_s.exp() @ world.r - beta * kl(log_t.detach(), log_s)  # Σ_y T (S/T) r = Σ_y S r
    exact = world.gradient_of(-alpha * bracket - (1 - alpha) * other)
    p, total = log_t.detach().exp(), 0.0
    for pair in itertools.combinations_with_replacement(range(0, 40), 2):
        times = 1 if pair[0] == pair[1] else 2
        rows = list(pair)
        ids, mask = world.ids[rows], world.mask[rows]
        logits = [answer_logits(world.policy, [list(x)] * 2, ids, mask) for x in (seen, (1, 2))]
        loss = evidence.pi_distill_loss(*logits, world.r[rows], ids, mask, how, alpha)
        total = total + times * p[rows].prod() * loss
    close(world.gradient_of(total), exact)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_pool_against_all_subsets(n):
    values = torch.tensor([3.0, 1.0, 4.0, 1.5, 5.0], dtype=torch.float64).sort().values
    subsets = list(itertools.combinations(values.tolist(), n))
    wanted = sum(max(subset) for subset in subsets) / len(subsets)
    assert (evidence.best_of_pool(5, n) @ values).item() == pytest.approx(wanted)


def test_pass_at_k_against_all_subsets():
    for right in range(6):
        subsets = list(itertools.combinations([1] * right + [0] * (5 - right), 2))
        share = sum(max(subset) for subset in subsets) / len(subsets)
        assert evidence.pass_at_k(5, right, 2) == pytest.approx(share)


def example(prompt="mot reverse swap rotate"):
    answer = contexts.worked(prompt)
    return contexts.Example("privileged", f"solution {answer}", prompt, answer, answer)


def tokens(text):
    return contexts.encode(text) + [contexts.END]


def test_the_true_reward_by_hand():
    e = example()  # tom, tmo, mot
    assert e.answer == "tom tmo mot"
    texts = ["tom tmo mot", "tom tmo", "mot tmo mot", "mot", "tom tmo mot mot"]
    got = evidence.gold([e] * 5, [tokens(text) for text in texts])
    torch.testing.assert_close(got, torch.tensor([4.0, 8 / 3, 8 / 3, 0.0, 3.0]))
    assert evidence.exact([e] * 5, [tokens(text) for text in texts]).tolist() == [1, 0, 0, 0, 0]
    assert evidence.last_step([e] * 2, [tokens("tom tmo mot"), tokens("mot")]).tolist() == [1, 1]


def test_preferences_follow_bradley_and_terry(small, monkeypatch):
    """Many pairs of known difference: the better one is preferred with probability σ(difference), ties never appear."""
    policy, _, _ = small

    def coin(examples, answers):  # rewards 0 and 1 by the first token
        return torch.tensor([float(y[0] % 2) for y in answers])

    pairs = evidence.preferences(policy, 0, 400, False, coin)
    assert {pair[3] for pair in pairs} == {1.0, -1.0}
    share = sum(pair[3] > 0 for pair in pairs) / 400
    assert abs(share - 1 / (1 + math.exp(-1))) < 3 * math.sqrt(0.73 * 0.27 / 400)
    assert all(pair[3] == pair[1][0] % 2 - pair[2][0] % 2 for pair in pairs)
    assert pairs == evidence.preferences(policy, 0, 400, False, coin)  # repeatable
    other = evidence.preferences(policy, 0, 50, True, coin)
    word = contexts.decode(other[0][0]).split("<|user|>")[1].split()[0]
    assert word in contexts.HELD_OUT_WORDS


def test_a_reward_model_is_judged(gpt):
    """On pairs with known rewards, by one that is r* itself and by its opposite."""
    rewards = {4: 0.0, 5: 1.0, 6: 3.0}
    pairs = [([1], [a], [b], rewards[a] - rewards[b]) for a in rewards for b in rewards if a > b]

    def judge(scale):
        model = lambda x, y: torch.tensor([scale * rewards[t[-1]] for t in y])
        return evidence.judged(model, pairs)

    good, bad = judge(1.0), judge(-1.0)
    assert (good["accuracy"], bad["accuracy"]) == (1, 0) and good["agrees with r*"] == 1
    assert good["slope"] == pytest.approx(1) and judge(0.5)["slope"] == pytest.approx(0.5)
    assert good["loss"] == pytest.approx(good["loss of r*"]) and bad["loss"] > good["loss"]
    bayes = sum(1 / (1 + math.exp(-d)) for d in (1, 3, 2)) / 3
    assert good["Bayes accuracy"] == pytest.approx(bayes)


def test_contexts_that_look_at_the_answer():
    e, wrong, right = example(), "mot mot mot", "tom tmo mot"
    assert evidence.told(e, wrong).context == "tried mot mot mot: wrong"
    assert evidence.told(e, right).context == "tried tom tmo mot: right"
    assert evidence.own_draft(e, wrong).context == "draft mot mot mot"
    answers = [tokens(wrong), tokens(right)]
    shown = evidence.show_sibling([e, e], answers)
    assert [s.context for s in shown] == ["solution tom tmo mot"] * 2
    alone = evidence.show_sibling([e], answers[:1])  # nobody in the group was right
    assert alone[0].context == "tried mot mot mot: wrong"
    assert evidence.show_solution([e], answers[:1])[0].context == "solution tom tmo mot"


def test_the_four_kinds_come_back():
    before = list(contexts.KINDS)
    with pytest.raises(KeyError), evidence.looking():
        assert list(contexts.KINDS) == [*before, "feedback", "draft"]
        kinds = {contexts.draw_pretraining(contexts.seeded(i)).kind for i in range(200)}
        assert kinds == {*before, "feedback", "draft"}
        raise KeyError
    assert list(contexts.KINDS) == before


def test_a_wrong_attempt_is_called_wrong():
    for i in range(50):
        e = evidence.draw_feedback(contexts.seeded("feedback", i))
        said, verdict = e.context.removeprefix("tried ").split(": ")
        assert (said == e.answer) == (verdict == "right")


def test_tries_leave_the_training_words_and_chains():
    suites = evidence.tries(0, 12)
    assert {name: len(suite) for name, suite in suites.items()} == dict.fromkeys(suites, 12)
    for name, suite in suites.items():
        for e in suite:
            word, *verbs = e.prompt.split()
            assert (word in contexts.HELD_OUT_WORDS) == (name != "trained words")
            assert (set(verbs) <= set(contexts.CHAIN_VERBS)) == (name != "other verbs")
            assert e.answer == contexts.worked(e.prompt)


@pytest.mark.slow
def test_smoke_runs_every_experiment_once(tmp_path, capsys):
    """All jobs in small; the second time there is nothing to do. Then the page is made from the runs."""
    options = ["--smoke", "--seeds", "1", "--out", str(tmp_path / "out")]
    options += ["--results", str(tmp_path / "results")]
    assert evidence.main(options) == 0
    records = sorted((tmp_path / "results" / "runs").glob("*.json"))
    wanted = {evidence.name_of(j) for what in evidence.EXPERIMENTS for j in evidence.jobs(what, 0)}
    assert {path.stem for path in records} == wanted
    times = [path.stat().st_mtime_ns for path in records]
    capsys.readouterr()
    assert evidence.main(options) == 0
    assert times == [path.stat().st_mtime_ns for path in records]
    for name in ("state", "hacking", "over", "learners", "feedback", "instruct"):
        page = (tmp_path / "results" / f"{name}.md").read_text()
        assert "nan" not in page and (tmp_path / "results" / f"{name}.png").exists()


def test_the_page_shows_what_was_committed():
    """Each row of each table of pages/rlhf.md is in a page that was made from the records; each figure of the notebook exists."""
    pages = ROOT / "notebooks" / "results" / "rlhf"
    written = "".join(path.read_text() for path in pages.glob("*.md"))
    page = (ROOT / "notebooks" / "pages" / "rlhf.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) > 40 and all(f"\n{row}\n" in written for row in rows)
