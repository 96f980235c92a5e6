"""The objectives on plain tensors: worked examples, brute force, oracles, gradients, limits."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from cosd import (
    DIVERGENCES,
    chunked_objective,
    cross_entropy,
    forward_kl,
    jsd,
    k1,
    k2,
    k3,
    kl,
    make_objective,
    on_distributions,
    policy_gradient_surrogate,
    reverse_kl,
    top_k_divergence,
)

INF = float("inf")
P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)  # teacher: mat, floor, chair
Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # student


def random_logits(*shape, seed=0, scale=3.0, dtype=torch.float64):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .mul(scale)
        .to(dtype)
    )


def brute_force(name, student_logits, teacher_logits):
    """Straight from the definitions, in Python floats, one token at a time."""

    def softmax(row):
        top = max(row)
        e = [math.exp(x - top) for x in row]
        return [x / sum(e) for x in e]

    def kl_of(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b))

    out = []
    for s, t in zip(student_logits.tolist(), teacher_logits.tolist()):
        q, p = softmax(s), softmax(t)
        m = [(x + y) / 2 for x, y in zip(p, q)]
        out.append(
            {
                "forward_kl": kl_of(p, q),
                "reverse_kl": kl_of(q, p),
                "jsd": (kl_of(p, m) + kl_of(q, m)) / 2,
            }[name]
        )
    return torch.tensor(out, dtype=torch.float64)


# -------------------------------------------------------------------------------------------------- values
def test_lecture_example_by_hand():
    assert forward_kl(Q.log(), P.log()).item() == pytest.approx(
        0.7 * math.log(1.4) + 0.2 * math.log(2 / 3) + 0.1 * math.log(0.5), abs=1e-12
    )
    assert forward_kl(Q.log(), P.log()).item() == pytest.approx(0.0851, abs=5e-5)
    assert reverse_kl(Q.log(), P.log()).item() == pytest.approx(0.0920, abs=5e-5)
    assert jsd(Q.log(), P.log()).item() == pytest.approx(0.0219, abs=5e-5)


def test_the_numbers_of_the_docstrings():
    for function, numbers in [(forward_kl, ".0851"), (reverse_kl, ".0920"), (jsd, ".0219")]:
        assert numbers in function.__doc__
        assert f"{function(Q.log(), P.log()).item():.4f}"[1:] == numbers


@pytest.mark.parametrize("name", DIVERGENCES)
def test_float64_brute_force(name):
    s, t = random_logits(16, 11, seed=1), random_logits(16, 11, seed=2)
    torch.testing.assert_close(
        DIVERGENCES[name](s, t), brute_force(name, s, t), rtol=1e-12, atol=1e-12
    )


def test_torch_distributions_as_oracle():
    s, t = random_logits(5, 7, 13, seed=3), random_logits(5, 7, 13, seed=4)
    torch.testing.assert_close(
        forward_kl(s, t),
        kl_divergence(Categorical(logits=t), Categorical(logits=s)),
        rtol=1e-12,
        atol=1e-12,
    )
    torch.testing.assert_close(
        reverse_kl(s, t),
        kl_divergence(Categorical(logits=s), Categorical(logits=t)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_f_kl_div_reads_backwards():
    """F.kl_div(log_a, log_b, log_target=True) is KL(b‖a): its *second* argument is the one averaged over."""
    s, t = random_logits(4, 9, seed=5).log_softmax(-1), random_logits(4, 9, seed=6).log_softmax(-1)
    torch.testing.assert_close(
        forward_kl(s, t),
        F.kl_div(s, t, log_target=True, reduction="none").sum(-1),
        rtol=1e-12,
        atol=1e-12,
    )


def test_entropy_identity():
    """Cross-entropy H(P, Q) = H(P) + KL(P‖Q)."""
    s, t = random_logits(9, seed=7), random_logits(9, seed=8)
    cross_entropy = -(t.softmax(-1) * s.log_softmax(-1)).sum()
    torch.testing.assert_close(
        cross_entropy, Categorical(logits=t).entropy() + forward_kl(s, t), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_definition_and_bound(beta):
    s, t = random_logits(50, 9, seed=9, scale=20), random_logits(50, 9, seed=10, scale=20)
    q, p = s.softmax(-1), t.softmax(-1)
    m = beta * p + (1 - beta) * q
    expected = beta * torch.xlogy(p, p / m).sum(-1) + (1 - beta) * torch.xlogy(q, q / m).sum(-1)
    torch.testing.assert_close(jsd(s, t, beta), expected, rtol=1e-9, atol=1e-12)
    assert (
        jsd(s, t, beta) <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) + 1e-12
    ).all()


def test_jsd_is_symmetric_and_at_most_log_2():
    s, t = random_logits(50, 9, seed=11, scale=30), random_logits(50, 9, seed=12, scale=30)
    torch.testing.assert_close(jsd(s, t), jsd(t, s), rtol=1e-12, atol=1e-14)
    assert jsd(s, t).max() <= math.log(2) + 1e-12
    disjoint = jsd(torch.tensor([0.0, -INF]), torch.tensor([-INF, 0.0]))
    assert disjoint.item() == pytest.approx(math.log(2), rel=1e-6)


def test_jsd_endpoint_trap():
    """The formula tends to 0 at both ends; divided by β (1−β) it tends to forward (reverse) KL. 0 and 1 are refused."""
    s, t = random_logits(9, seed=13), random_logits(9, seed=14)
    assert jsd(s, t, 1e-7) < 1e-5 and jsd(s, t, 1 - 1e-7) < 1e-5
    torch.testing.assert_close(jsd(s, t, 1e-6) / 1e-6, forward_kl(s, t), rtol=1e-3, atol=0)
    torch.testing.assert_close(jsd(s, t, 1 - 1e-6) / 1e-6, reverse_kl(s, t), rtol=1e-3, atol=0)
    for beta in (0, 1, -0.1, 1.5):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            jsd(s, t, beta)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_non_negative_and_zero_at_equality(name):
    s, t = random_logits(200, 17, seed=15), random_logits(200, 17, seed=16)
    assert (DIVERGENCES[name](s, t) > 0).all()
    s.requires_grad_()
    same = DIVERGENCES[name](s, s.detach() + 5.0)  # logits are defined up to a constant
    (gradient,) = torch.autograd.grad(same.sum(), s)
    assert same.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


# ----------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("name", DIVERGENCES)
def test_closed_form_gradients(name):
    s, t = (
        random_logits(6, 11, seed=17).requires_grad_(),
        random_logits(6, 11, seed=18).requires_grad_(),
    )
    log_q, log_p = s.detach().log_softmax(-1), t.detach().log_softmax(-1)
    q, p, beta = log_q.exp(), log_p.exp(), 0.3
    log_m = (beta * p + (1 - beta) * q).log()
    expected = {
        "forward_kl": q - p,
        "reverse_kl": q * (log_q - log_p - (q * (log_q - log_p)).sum(-1, keepdim=True)),
        "jsd": (1 - beta) * q * (log_q - log_m - (q * (log_q - log_m)).sum(-1, keepdim=True)),
    }[name]
    value = jsd(s, t, beta) if name == "jsd" else DIVERGENCES[name](s, t)
    value.sum().backward()
    torch.testing.assert_close(s.grad, expected, rtol=1e-11, atol=1e-13)
    assert t.grad is None  # the teacher gets none


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_against_finite_differences(name):
    s, t = random_logits(3, 5, seed=19).requires_grad_(), random_logits(3, 5, seed=20)
    assert torch.autograd.gradcheck(lambda x: DIVERGENCES[name](x, t), s)


def test_reverse_kl_gradient_vanishes_for_a_confident_wrong_student():
    confident_wrong, teacher = (
        torch.tensor([[20.0, 0.0]], requires_grad=True),
        torch.tensor([[0.0, 3.0]]),
    )
    (reverse,) = torch.autograd.grad(reverse_kl(confident_wrong, teacher).sum(), confident_wrong)
    (forward,) = torch.autograd.grad(forward_kl(confident_wrong, teacher).sum(), confident_wrong)
    assert reverse.abs().max() < 1e-6 and forward.abs().max() > 0.9


# ------------------------------------------------------------------------------------- dtypes and −inf logits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_computed_in_fp32_whatever_comes_in(name, dtype):
    s, t = (
        random_logits(32, 1000, seed=21, dtype=dtype).requires_grad_(),
        random_logits(32, 1000, seed=22, dtype=dtype),
    )
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            value = DIVERGENCES[name](s, t)
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value.double(), DIVERGENCES[name](s.double(), t.double()), rtol=2e-5, atol=1e-6
        )
        value.sum().backward()
        assert s.grad.dtype == dtype


def grad_of(divergence, s, t):
    s = torch.tensor(s, requires_grad=True)
    value = divergence(s, torch.tensor(t))
    value.backward()
    return value.item(), s.grad


@pytest.mark.parametrize("name", DIVERGENCES)
def test_masked_on_both_sides_contributes_nothing(name):
    value, gradient = grad_of(DIVERGENCES[name], [1.0, -INF, 0.5, -INF], [0.2, -INF, 0.9, -INF])
    expected, expected_gradient = grad_of(DIVERGENCES[name], [1.0, 0.5], [0.2, 0.9])
    assert value == pytest.approx(expected, abs=1e-7)
    torch.testing.assert_close(gradient[[0, 2]], expected_gradient)
    assert (gradient[[1, 3]] == 0).all()


def test_masked_on_one_side():
    student_cannot, teacher_cannot = (
        ([1.0, 0.5, -INF], [0.2, 0.9, 0.1]),
        ([1.0, 0.5, 0.3], [0.2, 0.9, -INF]),
    )
    assert grad_of(forward_kl, *student_cannot)[0] == INF
    assert grad_of(reverse_kl, *teacher_cannot)[0] == INF
    for divergence, (s, t) in [
        (forward_kl, teacher_cannot),
        (reverse_kl, student_cannot),
        (jsd, student_cannot),
        (jsd, teacher_cannot),
    ]:
        value, gradient = grad_of(divergence, s, t)
        q, p = torch.tensor(s).double().softmax(-1), torch.tensor(t).double().softmax(-1)
        m = (p + q) / 2
        expected = {
            forward_kl: torch.xlogy(p, p / q),
            reverse_kl: torch.xlogy(q, q / p),
            jsd: (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)) / 2,
        }
        assert value == pytest.approx(expected[divergence].nansum().item(), rel=1e-5)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_huge_logits_stay_finite_in_gradient(name):
    value, gradient = grad_of(DIVERGENCES[name], [0.0, -500.0, 3.0], [-500.0, 0.0, 3.0])
    assert math.isfinite(value) and gradient.isfinite().all()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="same shape"):
        forward_kl(torch.zeros(2, 3), torch.zeros(2, 4))
    assert all(
        d(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)).shape == (2, 3) for d in DIVERGENCES.values()
    )


# ---------------------------------------------------------------------------------------------- estimators
def enumerate_tokens(s, t):
    """-> q (V,) and the log-probabilities of every token: an expectation over y ~ Q becomes a sum."""
    return s.softmax(-1).detach(), s.log_softmax(-1), t.log_softmax(-1).detach()


def test_estimators_in_expectation():
    s, t = random_logits(9, seed=23), random_logits(9, seed=24)
    q, log_q, log_p = enumerate_tokens(s, t)
    exact = reverse_kl(s, t)
    torch.testing.assert_close((q * k1(log_q, log_p)).sum(), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close((q * k3(log_q, log_p)).sum(), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        (q * k2(log_q, log_p)).sum(), (q * (log_q - log_p) ** 2).sum() / 2, rtol=1e-12, atol=0
    )
    assert abs((q * k2(log_q, log_p)).sum() - exact) > 0.01  # biased
    assert k1(log_q, log_p).min() < 0 and k3(log_q, log_p).min() >= 0

    def variance(x):
        return (q * x**2).sum() - (q * x).sum() ** 2

    near = s + 0.1 * t  # k3's low variance is near P = Q
    q, log_q, log_p = enumerate_tokens(near, s)
    assert variance(k3(log_q, log_p)) < 0.2 * variance(k1(log_q, log_p))


@pytest.mark.parametrize(
    "estimator, truth",
    [(policy_gradient_surrogate, reverse_kl), (k2, reverse_kl), (k3, forward_kl)],
)
def test_enumerated_gradients(estimator, truth):
    """E_{y~Q}[∇ estimator]: the surrogate's (and k2's) is reverse KL's, k3's is forward KL's; k1's is zero."""
    s, t = random_logits(9, seed=25).requires_grad_(), random_logits(9, seed=26)
    q, log_q, log_p = enumerate_tokens(s, t)
    (expected,) = torch.autograd.grad(truth(s, t), s)
    (gradient,) = torch.autograd.grad((q * estimator(log_q, log_p)).sum(), s, retain_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)
    (gradient_k1,) = torch.autograd.grad((q * k1(log_q, log_p)).sum(), s)
    assert gradient_k1.abs().max() < 1e-14


# --------------------------------------------------------------------------------------------- top-k + tail
@pytest.mark.parametrize("of", ["student", "teacher"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_is_a_rising_lower_bound(name, of):
    s, t = random_logits(64, 12, seed=27).requires_grad_(), random_logits(64, 12, seed=28)
    exact = DIVERGENCES[name](s, t)
    values = [top_k_divergence(s, t, k, DIVERGENCES[name], of) for k in range(1, 13)]
    for smaller, larger in zip(values, values[1:]):
        assert (smaller <= larger + 1e-12).all()
    assert (values[0] < exact).any()
    torch.testing.assert_close(values[-1], exact, rtol=1e-12, atol=0)  # k = V
    torch.testing.assert_close(
        values[-2], exact, rtol=1e-10, atol=1e-13
    )  # a tail of one token loses nothing
    for value in (values[2], values[-1]):
        (gradient,) = torch.autograd.grad(value.sum(), s, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_top_k_by_hand():
    """Teacher's top 1 of the lecture's P: buckets (.7, .3) against (.5, .5)."""
    value = top_k_divergence(Q.log(), P.log(), 1, forward_kl, "teacher")
    assert value.item() == pytest.approx(0.7 * math.log(1.4) + 0.3 * math.log(0.6), abs=1e-12)
    other = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)  # a student who prefers the chair
    for of, (p, q) in {"teacher": (0.7, 0.2), "student": (0.1, 0.5)}.items():
        by_hand = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        assert top_k_divergence(other.log(), P.log(), 1, forward_kl, of).item() == pytest.approx(
            by_hand, abs=1e-12
        )
    with pytest.raises(ValueError, match="at least 1"):
        top_k_divergence(Q.log(), P.log(), 0)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_with_masked_logits_has_a_finite_gradient(name, k):
    """Two tokens are ruled out on both sides: from k = 2 on the tail is empty."""
    for of in ("student", "teacher"):
        value, gradient = grad_of(
            partial(top_k_divergence, k=k, divergence=DIVERGENCES[name], of=of),
            [1.0, 0.5, -INF, -INF],
            [0.2, 0.9, -INF, -INF],
        )
        assert gradient.isfinite().all() and (gradient[2:] == 0).all()
        assert value == pytest.approx(
            grad_of(DIVERGENCES[name], [1.0, 0.5], [0.2, 0.9])[0], abs=1e-6
        )


# -------------------------------------------------------------------------------------------------- chunked
@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_chunked_equals_plain(name, chunk):

    def make(*shape, seed):
        return random_logits(*shape, seed=seed, scale=0.7)

    h_s, w_s, h_t, w_t = (
        make(10, 8, seed=29),
        make(33, 8, seed=30),
        make(10, 6, seed=31),
        make(33, 6, seed=32),
    )
    weights = make(10, seed=33).abs()
    leaves = [x.clone().requires_grad_() for x in (h_s, w_s, h_t, w_t)]
    per_token = DIVERGENCES[name](leaves[0] @ leaves[1].T, leaves[2] @ leaves[3].T)
    (3 * (weights * per_token).sum()).backward()
    chunked = [x.clone().requires_grad_() for x in (h_s, w_s, h_t, w_t)]
    tokens = torch.arange(10)
    loss, values, h = chunked_objective(
        *chunked, tokens, on_distributions(DIVERGENCES[name]), weights, chunk
    )
    torch.testing.assert_close(h, Categorical(logits=leaves[0] @ leaves[1].T).entropy().float())
    (3 * loss).backward()
    torch.testing.assert_close(values, per_token.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss, (weights * per_token).sum(), rtol=1e-12, atol=0)
    for mine, plain in zip(chunked[:2], leaves[:2]):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-10, atol=1e-13)
    assert chunked[2].grad is None and chunked[3].grad is None


def test_chunked_with_a_frozen_head_under_autocast_and_without_gradient():
    h_s, w, h_t = (
        random_logits(*shape, seed=i, scale=0.7, dtype=torch.float32)
        for i, shape in enumerate([(10, 8), (33, 8), (10, 8)])
    )
    h_s.requires_grad_()
    tokens, mean, objective = torch.arange(10), torch.full((10,), 0.1), on_distributions(reverse_kl)
    loss, _, _ = chunked_objective(h_s, w, h_t, w, tokens, objective, mean, chunk=3)
    loss.backward()
    plain = h_s.detach().clone().requires_grad_()
    reverse_kl(plain @ w.T, h_t @ w.T).mean().backward()
    torch.testing.assert_close(h_s.grad, plain.grad, rtol=1e-5, atol=1e-7)
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        low, per_token, _ = chunked_objective(h_s, w, h_t, w, tokens, objective, mean, chunk=3)
    low.backward()
    assert per_token.dtype == w.grad.dtype == torch.float32 and low.item() == pytest.approx(
        loss.item(), rel=0.05
    )
    with torch.no_grad():
        assert chunked_objective(h_s, w, h_t, w, tokens, objective, mean, chunk=3)[
            0
        ].item() == pytest.approx(loss.item(), rel=1e-6)
    with pytest.raises(ValueError, match="equal, positive lengths"):
        chunked_objective(h_s, w, h_t, w, tokens[:4], objective, mean)


def test_chunked_fp16_gradients_do_not_underflow():
    """With a large vocabulary w · (Q − P) is below fp16's smallest number, so it must not be rounded to fp16."""
    n, V, D = 64, 20_000, 16
    h_s, head, h_t = (
        random_logits(*shape, seed=i, scale=0.3, dtype=torch.float32)
        for i, shape in enumerate([(n, D), (V, D), (n, D)])
    )
    exact, low = ([x.clone().requires_grad_() for x in (h_s, head)] for _ in range(2))
    forward_kl(exact[0] @ exact[1].T, h_t @ head.T).mean().backward()
    with torch.autocast("cpu", torch.float16):
        objective, mean = on_distributions(forward_kl), torch.full((n,), 1 / n)
        loss, _, _ = chunked_objective(
            *low, h_t, head, torch.zeros(n, dtype=torch.long), objective, mean, 16
        )
    (65536 * loss).backward()  # as the gradient scaler does
    for mine, true in zip(low, exact):
        assert ((mine.grad / 65536 - true.grad).norm() / true.grad.norm()) < 0.02
        assert (mine.grad == 0).float().mean() < 1e-3


def test_kl_from_log_probabilities():
    assert kl(P.log(), Q.log()).item() == pytest.approx(0.0851, abs=5e-5)


def test_top_k_defaults_are_opcds():
    """The student's top k, reverse KL: here the teacher's top 1 and forward KL give other numbers."""
    q, p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), P
    by_hand = 0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.9)
    assert top_k_divergence(q.log(), p.log(), 1).item() == pytest.approx(by_hand, abs=1e-12)
    made = make_objective("reverse_kl", top_k=1)(q.log(), p.log(), None)
    assert made.item() == pytest.approx(by_hand, abs=1e-12)


def test_objectives_by_name():
    s, t, tokens = random_logits(4, 9, seed=40), random_logits(4, 9, seed=41), torch.arange(4)
    for name in ("forward_kl", "reverse_kl"):
        assert torch.equal(make_objective(name, beta=0.2)(s, t, tokens), DIVERGENCES[name](s, t))
    assert torch.equal(make_objective("jsd", beta=0.2)(s, t, tokens), jsd(s, t, 0.2))
    surrogate = make_objective("policy_gradient")(s, t, tokens)
    log_q, log_p = (x.log_softmax(-1)[tokens, tokens] for x in (s, t))
    torch.testing.assert_close(surrogate, (log_q - log_p) * log_q)


@pytest.mark.parametrize("name", [*DIVERGENCES, "policy_gradient"])
def test_bf16_logits_give_an_fp32_loss(name):
    s, t, tokens = random_logits(8, 300, seed=1), random_logits(8, 300, seed=2), torch.arange(8)
    s, t = s.bfloat16(), t.bfloat16()
    objectives = [make_objective(name), cross_entropy]
    if name in DIVERGENCES:
        objectives.append(make_objective(name, top_k=4))
    for objective in objectives:
        value = objective(s, t, tokens)
        assert value.dtype == torch.float32
        exact = objective(s.double(), t.double(), tokens).float()
        torch.testing.assert_close(value, exact, rtol=2e-5, atol=1e-5)


def test_an_unknown_objective_is_named():
    with pytest.raises(ValueError, match="'kl': choose from .*jsd.*policy_gradient"):
        make_objective("kl")
