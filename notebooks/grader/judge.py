"""The graded cases of questions 1 to 5: what goes in, and what must come out.

None of this is ever in a process where submitted code runs (see worker.py). The expected outputs come from slow, plain
definitions in float64, not from the reference's own functions. Each part has points, which its cases share equally, and each
case is judged separately. Numbers, shapes and prompts are drawn anew for every grading.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
import worker
from torch import Tensor

import cosd
from contexts import ASSISTANT, END, KINDS, SYSTEM, USER, encode
from model import GPT, GPTConfig, KVCache, add_adapters, without_adapters

INF, EOS, V = float("inf"), 7, 23
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class Wrong(Exception):
    """The reason why an output is wrong, in one line for the student."""


@dataclass
class Case:
    operation: str  # of worker.py
    given: dict
    judge: Callable  # the output -> None, or raises Wrong


@dataclass
class Part:
    question: str
    name: str
    points: int
    draw: Callable  # rng -> list[Case]


PARTS: list[Part] = []


def part(question: str, points: int):
    def keep(draw):
        PARTS.append(Part(question, draw.__name__, points, draw))
        return draw

    return keep


# ============================================================================================== to read an output by
def tensor(value, what: str) -> Tensor:
    try:
        found = worker.lively(value)
    except Exception:
        found = None
    if not isinstance(found, Tensor):
        raise Wrong(f"{what} must be a tensor, not {str(value)[:60]}")
    return found


def demand(condition, message: str) -> None:
    if not condition:
        raise Wrong(message)


def near(got, want: Tensor, what: str, rtol=1e-9, atol=1e-11, rows=None) -> None:
    """Equal shape and values; says where it is not. `rows`: what each row of `want` is called."""
    got = tensor(got, what)
    demand(
        got.shape == want.shape,
        f"{what} has shape {tuple(got.shape)}, should have {tuple(want.shape)}",
    )
    got, want = got.double(), want.detach().double()
    apart = ~torch.isclose(got, want, rtol=rtol, atol=atol, equal_nan=False)
    if not apart.any():
        return
    place = apart.nonzero()[0].tolist()
    name = f"{rows[place[0]]}: " if rows else f"at {place}: " if place else ""
    difference = (got - want).abs()[apart][0].item()
    raise Wrong(
        f"{what}: {name}{got[apart][0].item():.6g} should be {want[apart][0].item():.6g} "
        f"(off by {difference:.2g}; {int(apart.sum())} of {apart.numel()} values are wrong)"
    )


def same_gradients(got: dict, want: dict[str, Tensor], rtol=1e-6, atol=1e-8) -> None:
    demand(got, "no gradient reaches the student's weights")
    for name, gradient in want.items():
        demand(name in got, f"no gradient reaches {name}")
        near(got[name], gradient, f"the gradient of {name}", rtol, atol)


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ==================================================================================================== models, numbers
def normal(rng: random.Random, *shape: int, scale=3.0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


TINY = dict(vocab_size=V, n_layer=2, d_model=16, n_head=4, n_kv_head=2, head_dim=6, d_ff=20)


def tiny(rng: random.Random, dtype="float64", adapters=None, **changes) -> tuple[GPT, dict]:
    """A random GPT whose logits are far from uniform -> (the model here, how the worker makes it)."""
    config = TINY | {"max_len": 96} | changes
    torch.manual_seed(rng.getrandbits(40))
    model = GPT(GPTConfig(**config)).double()
    if adapters:
        add_adapters(model, adapters)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = model.to(getattr(torch, dtype))
    return model, how_made(model, config, dtype, adapters)


def how_made(model: GPT, config: dict, dtype="float64", adapters=None) -> dict:
    weights = {name: worker.plain(tensor) for name, tensor in model.state_dict().items()}
    return dict(config=config, weights=weights, dtype=dtype, adapters=adapters)


def tokens(rng: random.Random, count: int, but=()) -> list[int]:
    return rng.choices([i for i in range(V) if i not in but], k=count)


# ============================================================================================ q1: divergences from logits
def plain_divergence(name, s: Tensor, t: Tensor, beta=0.5) -> Tensor:
    """Term by term in float64, with 0 · log 0 = 0; differentiable in s where nothing is 0."""
    log_q, log_p = s.double().log_softmax(-1), t.double().detach().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()

    def average_of_log_ratio(a, log_a, log_b):
        possible = a.detach() > 0
        ratio = log_a.masked_fill(~possible, 0) - log_b.masked_fill(~possible, 0)
        return (a * ratio).sum(-1)

    if name == "forward_kl":
        return average_of_log_ratio(p, log_p, log_q)
    if name == "reverse_kl":
        return average_of_log_ratio(q, log_q, log_p)
    log_m = (beta * p + (1 - beta) * q).log()
    on_p, on_q = (average_of_log_ratio(x, y, log_m) for x, y in ((p, log_p), (q, log_q)))
    return beta * on_p + (1 - beta) * on_q


def judge_divergence(name, s, t, more, rtol, atol, out, dtype=None, gradient=True) -> None:
    """Value and gradient; the gradient is that of Σ_i (i + 1) · value_i."""
    s = s.clone().requires_grad_()
    want = plain_divergence(name, s, t, **more)
    value = tensor(out["value"], f"{name}'s value")
    near(out["value"], want, f"{name}'s value", rtol, atol)
    demand(dtype in (None, value.dtype), f"{name} is computed in {value.dtype}, not in {dtype}")
    if gradient:
        weights = torch.arange(1, want.numel() + 1).double().reshape(want.shape)
        (expected,) = torch.autograd.grad((want * weights).sum(), s)
        near(out["grad"], expected, f"{name}'s gradient", rtol, atol)
    demand(out["teacher_grad"] is None, f"{name} sends gradient into the teacher")
    demand(out["unchanged"], f"{name} changes the logits that it was given")


def divergence(name, s, t, rtol=1e-9, atol=1e-11, dtype=None, gradient=True, **more) -> Case:
    judge = partial(judge_divergence, name, s, t, more, rtol, atol, dtype=dtype, gradient=gradient)
    given = dict(name=name, student=s, teacher=t, more=more)
    return Case("q1_divergence", given, lambda out: judge(out=out))


@part("q1", 2)
def worked_by_hand(rng):
    """Small tables of probabilities, as on paper."""
    tables = ([0.5, 0.3, 0.2], [0.7, 0.2, 0.1]), ([0.25, 0.75], [0.5, 0.5])
    cases = []
    for q, p in tables:
        s, t = (torch.tensor(x, dtype=torch.float64).log() for x in (q, p))
        cases += [divergence(name, s, t) for name in DIVERGENCES]
        own = sum(a * (torch.tensor(a).log() - torch.tensor(b).log()).item() for a, b in zip(p, q))

        def judge(out, own=own):
            near(out["value"], torch.tensor(own, dtype=torch.float64), "kl(log P, log Q)", 1e-5)

        cases.append(Case("q1_kl", dict(log_a=t, log_b=s), judge))
    return cases


@part("q1", 3)
def values_by_definition(rng):
    cases = []
    for shape in ((), (rng.randint(2, 5),), (2, rng.randint(2, 4), 1), (3, 0)):
        size = rng.randint(6, 20)
        s, t = normal(rng, *shape, size), normal(rng, *shape, size)
        cases += [divergence(name, s, t, gradient=False) for name in DIVERGENCES]
    s, t = normal(rng, 3, 2000), normal(rng, 3, 2000)
    cases += [divergence(name, s, t, gradient=False) for name in DIVERGENCES]
    s = normal(rng, 4, 9)
    cases += [divergence(name, s, s + 5.0, gradient=False) for name in DIVERGENCES]
    s, t = normal(rng, 4, 9), normal(rng, 4, 9)
    for beta in (rng.uniform(0.1, 0.4), 0.8, 0.99):
        cases.append(divergence("jsd", s, t, beta=beta, gradient=False))
    return cases


@part("q1", 3)
def gradient_reaches_the_student_alone(rng):
    cases = []
    for shape in ((11,), (4, 11), (2, 3, 11)):
        s, t = normal(rng, *shape), normal(rng, *shape)
        cases += [divergence(name, s, t) for name in DIVERGENCES]
    cases.append(divergence("jsd", s, t, beta=rng.uniform(0.1, 0.4)))
    log_a, log_b = normal(rng, 3, 8).log_softmax(-1), normal(rng, 3, 8).log_softmax(-1)

    def judge(out):
        a, b = log_a.clone().requires_grad_(), log_b.clone().requires_grad_()
        value = (a.exp() * (a - b)).sum(-1)
        near(out["value"], value, "kl's value")
        on_a, on_b = torch.autograd.grad(value.sum(), (a, b))
        near(out["grad_a"], on_a, "kl's gradient by its first argument")
        near(out["grad_b"], on_b, "kl's gradient by its second argument")

    return [*cases, Case("q1_kl", dict(log_a=log_a, log_b=log_b), judge)]


@part("q1", 3)
def far_apart_in_fp32(rng):
    """Probabilities underflow; log-probabilities do not."""
    apart = rng.uniform(150, 400)
    s = torch.tensor([[0.0, -apart, 3.0], [2.0, 2.0, -apart]])
    t = torch.tensor([[-apart, 0.0, 3.0], [-apart, 2.0, 1.0]])
    cases = [divergence(name, s, t, 1e-5, 1e-6) for name in DIVERGENCES]
    high = normal(rng, 3, 7).float()  # a constant on all logits
    for name in DIVERGENCES:
        cases.append(divergence(name, high + 300, high.roll(1, 0) - 300, 1e-3, 1e-3))
    close = 40 * normal(rng, 2, 6).float()
    cases += [divergence(name, close, close.roll(1, -1), 1e-5, 1e-5) for name in DIVERGENCES]
    return cases


def impossible(name, s, t) -> Case:
    """Rows with −inf: the plain definition without the tokens that neither can say."""
    s, t = torch.tensor(s), torch.tensor(t)
    keep = ~(s.isneginf() & t.isneginf())

    def judge(out):
        demand(out["teacher_grad"] is None, f"{name} sends gradient into the teacher")
        value, gradient = (
            tensor(out["value"], "the value"),
            tensor(out["grad"], "the gradient"),
        )
        endless = {"forward_kl": s.isneginf() & keep, "reverse_kl": t.isneginf() & keep}
        if name in endless and endless[name].any():
            demand(value.item() == INF, f"{name} must be +inf where {name[0]}... is, not {value}")
            return
        a = s[keep].double().requires_grad_()
        want = plain_divergence(name, a, t[keep])
        near(out["value"], want, f"{name} with −inf logits", 1e-5, 1e-6)
        demand(gradient.isfinite().all(), f"{name} with −inf logits has the gradient {gradient}")
        demand((gradient[~keep] == 0).all(), "a token with P = Q = 0 must get no gradient")
        (expected,) = torch.autograd.grad(want, a)
        near(worker.plain(gradient[keep]), torch.nan_to_num(expected), "the gradient", 1e-5, 1e-6)

    return Case("q1_divergence", dict(name=name, student=s, teacher=t, more={}), judge)


@part("q1", 2)
def minus_infinity(rng):
    """A token that neither can say counts for nothing; one that only the averaging side can say costs infinitely much."""
    a, b = rng.uniform(0, 1), rng.uniform(1, 2)
    neither = [a, -INF, b, -INF], [b, -INF, a, -INF]
    student_cannot, teacher_cannot = ([b, a, -INF], [a, b, 0.1]), ([b, a, 0.3], [a, b, -INF])
    cases = []
    for name in DIVERGENCES:
        for rows in (neither, student_cannot, teacher_cannot):
            cases.append(impossible(name, *rows))
    return cases


@part("q1", 2)
def computed_in_fp32_or_better(rng):
    cases = []
    for name in DIVERGENCES:
        for low in (torch.bfloat16, torch.float16):
            s, t = normal(rng, 8, 500, dtype=low), normal(rng, 8, 500, dtype=low)
            cases.append(divergence(name, s, t, 1e-4, 1e-5, torch.float32, gradient=False))
        s, t = normal(rng, 2, 9), normal(rng, 2, 9)
        cases.append(divergence(name, s, t, dtype=torch.float64))

    s, t = normal(rng, 4, 50).float(), normal(rng, 4, 50).float()

    def judge(out):
        demand(out["graph"] == [True, False], "log Q must have a gradient, and log P none")
        for got, logits, who in zip(out["pair"], (s, t), ("log Q", "log P")):
            near(got, logits.double().log_softmax(-1), f"under autocast {who}", 1e-5, 1e-5)

    return [*cases, Case("q1_pair", dict(student=s, teacher=t), judge)]


# ======================================================================================= q2: the shift and the weights
def plain_states(model, prompts, ids, mask, prefix=None):
    """Each row alone, without padding or cache: the state that saw everything before a token, for every token."""
    rows = []
    for prompt, row, here in zip(prompts, ids, mask):
        whole = torch.tensor([[*prompt, *row[here].tolist()]])
        rows.append(model.hidden(whole[:, :-1])[0, len(prompt) - 1 :])
    return torch.cat(rows)


def plain_advance(self, ids, dtype):
    """With `plain_attend` it stands in for question 3 where a cache is filled by one call."""
    self.length, self.capacity = torch.full((len(ids),), ids.shape[1]), ids.shape[1]
    return torch.arange(ids.shape[1])[None]


def plain_attend(self, layer, q, k, v):
    self.keys[layer], self.values[layer] = k, v
    if self.prefix is not None:
        k = torch.cat([self.prefix.keys[layer].expand(len(q), -1, -1, -1), k], 2)
        v = torch.cat([self.prefix.values[layer].expand(len(q), -1, -1, -1), v], 2)
    seen = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=q.shape[1] != k.shape[1])


def standin_states(model, prompts, ids, mask, prefix=None):
    """Stands in for question 2 in question 5."""
    rows = []
    for prompt, row, here in zip(prompts, ids, mask):
        whole = torch.tensor([[*prompt, *row[here].tolist()]])[:, :-1]
        cache = KVCache(model.config, prefix=prefix) if prefix else None
        rows.append(model.hidden(whole, cache)[0, len(prompt) - 1 :])
    return torch.cat(rows)


def plain_log_softmax_pair(student_logits, teacher_logits):
    return student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)


def plain_weights(mask, reduction="token", skip=0):
    rows = [[float(m and j >= skip) for j, m in enumerate(row)] for row in mask.tolist()]
    counted = [sum(row) for row in rows]
    scored = sum(map(bool, counted))
    divisors = [sum(counted) if reduction == "token" else n * scored for n in counted]
    return torch.tensor([[x / (by or 1) for x in row] for row, by in zip(rows, divisors)])


def some_completions(rng, count=5, common=()):
    """-> (prompts of different lengths, completions): one is EOS alone, one a single token, one was cut off."""
    prompts = [[*common, *tokens(rng, n)] for n in rng.sample(range(1, count + 3), count)]
    lengths = [rng.randint(2, 4), rng.randint(5, 6), 0]
    completions = [[*tokens(rng, n, {EOS}), EOS] for n in lengths]
    completions += [tokens(rng, 1, {EOS}), tokens(rng, 3, {EOS})]
    rng.shuffle(completions)
    return prompts, completions[:count]


def as_tensors(completions, width=0, fill=0):
    width = max(width, *map(len, completions))
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in completions])
    mask = torch.tensor([[j < len(row) for j in range(width)] for row in completions])
    return ids, mask


def which_state(model, prompts, ids, mask, state) -> str:
    """Whose state this is, if it is any row's at any position."""
    for b, (prompt, row, here) in enumerate(zip(prompts, ids, mask)):
        states = model.hidden(torch.tensor([[*prompt, *row[here].tolist()]]))[0]
        for t in range(len(states)):
            if torch.allclose(states[t], state.to(states), rtol=1e-6):
                return f"the state at position {t} of row {b}"
    return "no state of these rows"


def judge_states(model, prompts, ids, mask, gradient, out):
    want = plain_states(model, prompts, ids, mask)
    demand(out["unchanged"], "prompts, ids and mask must stay as they were given")
    got = tensor(out["states"], "what completion_states returns")
    shape = f"({len(want)}, {want.shape[1]}): a state for each True of the mask, EOS too"
    demand(got.shape == want.shape, f"states have shape {tuple(got.shape)}, should have {shape}")
    for k, (b, j) in enumerate(mask.nonzero().tolist()):
        if not torch.allclose(got[k], want[k], rtol=1e-8, atol=1e-9):
            found = which_state(model, prompts, ids, mask, got[k])
            length = len(prompts[b])
            raise Wrong(
                f"for token {j} of row {b}, whose prompt has {length} tokens, there is {found}; "
                f"it is predicted at position {length - 1 + j}"
            )
    if gradient:
        weights = torch.arange(1, want.numel() + 1).double().reshape(want.shape)
        same_gradients(out["gradients"], gradients(model, (want * weights.cos()).sum()))


def states_case(rng, completions, prompts, width=0, fill=0, cut=0, gradient=False, **changes):
    model, made = tiny(rng, **changes)
    ids, mask = as_tensors(completions, width, fill)
    judge = partial(judge_states, model, prompts, ids, mask, gradient)
    given = dict(gpt=made, prompts=[p[cut:] for p in prompts], ids=ids, mask=mask)
    return Case("q2_states", given | {"prefix": prompts[0][:cut]}, lambda out: judge(out))


@part("q2", 3)
def states_are_those_before_each_token(rng):
    prompts, completions = some_completions(rng)
    cases = [states_case(rng, completions, prompts, gradient=True)]
    learned = dict(norm="layer", positions="learned", mlp="gelu", n_kv_head=4)
    prompts, completions = some_completions(rng)
    cases.append(states_case(rng, completions, prompts, gradient=True, **learned))
    cases.append(states_case(rng, [tokens(rng, 4)], [tokens(rng, 5)]))  # one row alone
    cases.append(states_case(rng, [[EOS], [EOS]], [tokens(rng, 1), tokens(rng, 1)]))
    long = [tokens(rng, 30), tokens(rng, 2)]  # the longest prompt has the shortest completion
    cases.append(states_case(rng, [tokens(rng, 1), tokens(rng, 9)], long))
    return cases


@part("q2", 2)
def padding_changes_nothing(rng):
    cases = []
    for fill in (0, EOS, V - 1):
        prompts, completions = some_completions(rng)
        cases.append(states_case(rng, completions, prompts, rng.randint(9, 12), fill))
    prompts, completions = some_completions(rng)
    again = [row + [EOS] for row in completions]  # EOS as token within a row, too
    cases.append(states_case(rng, [[EOS, *row] for row in again], prompts, 14, EOS))
    return cases


@part("q2", 1)
def states_after_a_common_beginning(rng):
    cases = []
    for cut in (17, 3):
        prompts, completions = some_completions(rng, common=tokens(rng, cut))
        cases.append(states_case(rng, completions, prompts, cut=cut, gradient=True))
    return cases


def judge_weights(mask, reduction, skip, out):
    want, got = plain_weights(mask, reduction, skip), tensor(out["weights"], "the weights")
    demand(
        torch.equal(tensor(out["mask"], "the mask"), mask), "the mask itself must stay as it was"
    )
    demand(got.dtype == torch.float32, f"the weights are {got.dtype}, should be fp32")
    names = [f"completion {b}" for b in range(len(mask))]
    near(out["weights"], want, f"{reduction!r}, skip={skip}", 1e-5, 1e-7, names)


def weights_case(mask, reduction, skip=0):
    judge = partial(judge_weights, mask, reduction, skip)
    return Case("q2_weights", dict(mask=mask, reduction=reduction, skip=skip), judge)


@part("q2", 2)
def weights_by_definition(rng):
    cases = []
    for reduction in ("token", "sequence"):
        _, mask = as_tensors(some_completions(rng)[1], width=9)
        cases.append(weights_case(mask, reduction))
        cases.append(weights_case(mask[:1], reduction))
        cases.append(weights_case(torch.ones(3, 4).bool(), reduction))
        gaps = torch.tensor([[rng.random() < 0.5 for _ in range(6)] for _ in range(3)])
        gaps[:, 2] = True
        cases.append(weights_case(gaps, reduction))
    return cases


@part("q2", 2)
def skip_leaves_out_the_first_tokens(rng):
    """A row that `skip` empties counts for nothing, in the denominator neither; nothing left is zero, not NaN."""
    cases = []
    for reduction in ("token", "sequence"):
        for skip in (1, 2, 9):
            _, mask = as_tensors(some_completions(rng)[1], width=9)
            cases.append(weights_case(mask, reduction, skip))
    return cases


# ============================================================================================ q3: rollouts with a KV cache
def plain_rollout(model, prompt, count, eos=()):
    """Greedy, the whole row read anew for every token."""
    row = list(prompt)
    while len(row) < len(prompt) + count and (len(row) == len(prompt) or row[-1] not in eos):
        row.append(model(torch.tensor([row]))[0, -1].argmax().item())
    return row[len(prompt) :]


@part("q3", 3)
def reading_in_pieces_equals_reading_at_once(rng):
    cases = []
    first = rng.randint(2, 5)
    for pieces, room in (([9], 3), ([9], 0), ([1] * 9, 8), ([first, 1, 8 - first], 20)):
        model, made = tiny(rng)
        ids = torch.tensor([tokens(rng, 9) for _ in range(3)])
        want = model(ids).detach()
        names = [f"row {b}" for b in range(3)]
        given = dict(gpt=made, ids=ids, pieces=pieces, room=room)

        def judge(out, want=want, pieces=pieces, names=names):
            near(out["logits"], want, f"read in pieces of {pieces}: logits", 1e-7, 1e-8, names)

        cases.append(Case("q3_read", given, judge))
    model, made = tiny(rng)
    prefix, ids = tokens(rng, 5), torch.tensor([tokens(rng, 4) for _ in range(2)])

    def judge_through(out):
        whole = torch.cat([torch.tensor([prefix]).expand(2, -1), ids], 1)
        logits = model(whole)[:, 5:]
        near(out["logits"], logits, "logits after a prefix", 1e-7, 1e-8)
        same_gradients(out["gradients"], gradients(model, logits.square().sum()))

    cases.append(Case("q3_through", dict(gpt=made, prefix=prefix, ids=ids), judge_through))
    return cases


def judge_rollout(model, prompts, how, prefix, out):
    """Greedy: each row's tokens are those that it would write alone, in no more reading than it takes."""
    count, eos = how["max_new_tokens"], how.get("eos", ())
    want = [plain_rollout(model, [*prefix, *p], count, eos) for p in prompts]
    width = max(map(len, want))
    demand(out["unchanged"], "the prompts must stay as they were given")
    for run in out["runs"]:
        ids, mask = tensor(run["ids"], "ids"), tensor(run["mask"], "the mask")
        demand(mask.dtype == torch.bool, f"the mask is {mask.dtype}, should be bool")
        said = f"{tuple(ids.shape)} and {tuple(mask.shape)}, should be {(len(prompts), width)}"
        demand(ids.shape == mask.shape == (len(prompts), width), f"ids and mask are {said}")
        for b, row in enumerate(want):
            got = ids[b][mask[b]].tolist()
            first = next((j for j, (x, y) in enumerate(zip(got, row)) if x != y), None)
            said = f"row {b} (a prompt of {len(prompts[b])} tokens)"
            demand(first is None, f"{said} differs from the row alone at its token {first}")
            demand(len(got) == len(row), f"{said} has {len(got)} tokens, should have {len(row)}")
            demand(
                mask[b].int().diff().le(0).all(),
                f"{said}: the mask must be True up to its end, False after",
            )
        demand((ids[~mask] == 0).all(), "after the end of a row, ids must be 0")
        longest = max(map(len, prompts))
        most = len(prompts) * (longest + width) + longest
        demand(run["read"] <= most, f"{run['read']} tokens were read; {most} are enough")
        demand(not run["graph"], "a rollout must not have a gradient")


def rollout_case(rng, prompts, count, prefix=(), times=1, eos=None, model=None):
    model, made = model or tiny(rng)
    how = {"max_new_tokens": count, "temperature": 0.0} | ({"eos": sorted(eos)} if eos else {})
    given = dict(gpt=made, prompts=prompts, how=how, seed=1, prefix=list(prefix), times=times)
    judge = partial(judge_rollout, model, prompts, how, list(prefix))
    return Case("q3_generate", given | {"autocast": False}, lambda out: judge(out))


@part("q3", 4)
def a_row_does_not_depend_on_the_others(rng):
    cases = []
    llama, gpt2 = {}, dict(norm="layer", positions="learned", mlp="gelu", n_kv_head=4)
    qwen = dict(qk_norm=True, qkv_bias=True, n_kv_head=1)
    for variant in (llama, gpt2, qwen):
        prompts = [tokens(rng, n) for n in rng.sample(range(1, 13), 5)]
        cases.append(rollout_case(rng, prompts, 8, model=tiny(rng, **variant)))
    cases.append(rollout_case(rng, [tokens(rng, 6)], 5))
    cases.append(rollout_case(rng, [tokens(rng, 1) for _ in range(3)], 1))
    same = tokens(rng, 7)
    cases.append(rollout_case(rng, [same, same, same[:3]], 6))
    cases.append(rollout_case(rng, [tokens(rng, 2), tokens(rng, 3)], 60))  # long answers
    return cases


@part("q3", 3)
def eos_ends_a_row_and_belongs_to_it(rng):
    """Also where it is the very first token, and where it is the last that was allowed."""
    cases = []
    model, made = tiny(rng)
    prompts = [tokens(rng, n) for n in (4, 9, 6)]
    free = [plain_rollout(model, p, 12) for p in prompts]
    everywhere = {row[0] for row in free}
    for eos, count in (
        ({free[0][2]}, 12),
        ({free[0][1], free[1][4]}, 12),
        (everywhere, 12),
        (everywhere, 1),
        ({free[0][free.index(free[0]) + 3]}, 4),
        ({free[1][5], free[2][5]}, 6),
        ({V - 1 - i for i in range(V) if all(V - 1 - i not in row for row in free)} or {EOS}, 12),
    ):
        cases.append(rollout_case(rng, prompts, count, eos=eos, model=(model, made)))
    last = plain_rollout(
        model, prompts[0], 9
    )  # EOS is the last token allowed, and comes only there
    count = next((n for n in range(2, 10) if last[n - 1] not in last[: n - 1]), 1)
    eos = {last[count - 1]}
    cases.append(rollout_case(rng, prompts[:1], count, eos=eos, model=(model, made)))
    return cases


@part("q3", 2)
def a_common_beginning_changes_no_token(rng):
    """Found by itself, or handed over; the prefix is as good as new afterwards."""
    cases = []
    for length in (20, 300):
        model, made = tiny(rng, max_len=400)
        common = tokens(rng, length)
        rest = [tokens(rng, n) for n in (2, 7, 4)]
        whole = [common + r for r in rest]
        cases.append(rollout_case(rng, whole, 5, model=(model, made)))
        cases.append(rollout_case(rng, rest, 5, prefix=common, times=2, model=(model, made)))
    cases.append(rollout_case(rng, [tokens(rng, 1)], 4, prefix=tokens(rng, 3), times=2))
    return cases


MANY, AGAIN = 5000, 300


def fixed_logits(rng, logits: list[float], dtype="float32"):
    """A model that always has these logits, to the bit: its norm gives a constant."""
    changes = dict(norm="layer", vocab_size=len(logits), tied=False, d_model=16)
    model, _ = tiny(rng, dtype, **changes)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.zero_()
        model.norm.bias[0] = 1
        model.head.weight.zero_()
        model.head.weight[:, 0] = torch.tensor(logits)
    return model, how_made(model, TINY | {"max_len": 96} | changes, dtype)


def shares(ids: Tensor, size: int) -> Tensor:
    return torch.bincount(ids, minlength=size)[:size].double() / len(ids)


def judge_samples(want: list[Tensor], out) -> None:
    """`want`: the distribution of the first, the second, ... token."""
    (run,) = out["runs"]
    ids = tensor(run["ids"], "ids")
    demand(ids.shape == (MANY, len(want)), f"ids have shape {tuple(ids.shape)}")
    demand(run["moved"], "the generator that was given must be used: its state did not move")
    demand(((ids >= 0) & (ids < len(want[0]))).all(), "ids beyond the vocabulary")
    for j, q in enumerate(want):
        found = shares(ids[:, j], len(q))
        off, never = (found - q).abs().max().item(), found[q == 0].sum().item()
        demand(off < 0.03, f"token {j} follows another distribution: a share is off by {off:.3f}")
        demand(never == 0, f"token {j}: {never:.3f} of the tokens are outside of top_k or top_p")


def sample_case(rng, model, made, prompt, want, **how):
    how = {"max_new_tokens": len(want)} | how
    given = dict(gpt=made, prompts=[prompt] * MANY, seed=rng.getrandbits(30), prefix=[], times=1)
    given |= dict(autocast=how.pop("autocast", False), how=how)
    return Case("q3_generate", given, partial(judge_samples, want))


def judge_random_numbers(out) -> None:
    runs = out["runs"]
    for run in runs:
        demand(run["moved"], "the generator that was given must be used: its state did not move")
        demand(run["global"], "the global random state must stay as it was")
        demand(run["ids"] == runs[0]["ids"], "the same generator state must give the same tokens")
    ids = tensor(runs[0]["ids"], "ids")
    demand((ids[:, 0] != ids[:, 1]).any(), "each token needs random numbers of its own")


def random_numbers_case(rng, made, temperature):
    prompts = [tokens(rng, n) for n in rng.choices(range(1, 6), k=AGAIN)]
    how = dict(max_new_tokens=3, temperature=temperature)
    given = dict(gpt=made, prompts=prompts, how=how, seed=rng.getrandbits(30), prefix=[], times=2)
    return Case("q3_generate", given | {"autocast": False}, judge_random_numbers)


@part("q3", 3)
@torch.no_grad()
def samples_follow_the_distribution(rng):
    model, made = tiny(rng, "float32")
    prompt, cases = tokens(rng, 3), []

    def softmax(logits, temperature=1.0):
        return (logits.double() / temperature).softmax(-1)

    logits = model(torch.tensor([prompt]))[0, -1]
    for temperature in (1.0, 2.0, 0.3, 0.45):
        want = [softmax(logits, temperature)]
        cases.append(sample_case(rng, model, made, prompt, want, temperature=temperature))
    cases += [random_numbers_case(rng, made, temperature) for temperature in (1.0, 0.7)]
    follow = softmax(model(torch.tensor([[*prompt, i] for i in range(V)]))[:, -1])
    cases.append(sample_case(rng, model, made, prompt, [softmax(logits), softmax(logits) @ follow]))
    q = softmax(logits)
    best = q.topk(3).indices
    want = torch.zeros_like(q).scatter(0, best, q[best] / q[best].sum())
    cases.append(sample_case(rng, model, made, prompt, [want], top_k=3))
    # a nucleus whose edge is well away from any sum of probabilities
    model, made = fixed_logits(rng, torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log().tolist())
    nucleus = torch.tensor([0.4, 0.3, 0.2, 0, 0], dtype=torch.float64) / 0.9
    cases.append(sample_case(rng, model, made, [1, 2], [nucleus], top_p=0.8))
    # in half precision 100 / .7 and 100.5 / .7 are 143 and 144, and the odds e in place of 2.04
    model, made = fixed_logits(rng, [100.0, 100.5, -100.0], "bfloat16")
    want = [softmax(torch.tensor([100.0, 100.5, -100.0]), 0.7)]
    cases.append(sample_case(rng, model, made, [1, 2], want, temperature=0.7))
    model, made = fixed_logits(rng, [100.0, 100.5, -100.0])
    cases.append(sample_case(rng, model, made, [1, 2], want, temperature=0.7, autocast=True))
    return cases


# ============================================================================================ q4: what the teacher sees
def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def render_case(context, prompt, want):
    def judge(out):
        who = "the student's" if context is None else "the teacher's"
        demand(isinstance(out, list), f"render must return a list of ids, not {str(out)[:40]}")
        for i, (got, wanted) in enumerate(zip(out, want)):
            demand(got == wanted, f"{who} prompt differs at token {i}: {got}, should be {wanted}")
        demand(len(out) == len(want), f"{who} prompt has {len(out)} tokens, not {len(want)}")

    return Case("q4_render", dict(context=context, prompt=prompt), judge)


@part("q4", 2)
def the_student_sees_the_prompt_alone(rng):
    cases = []
    for kind in KINDS.values():
        x = kind.draw(rng).prompt
        cases.append(render_case(None, x, [USER, *encode(x), ASSISTANT]))
    return cases


@part("q4", 2)
def the_teacher_sees_the_context_before_it(rng):
    """And the very same suffix. An empty context is one, too."""
    cases = []
    drawn = [kind.draw(rng) for kind in KINDS.values()]
    for context, x in [*((e.context, e.prompt) for e in drawn), ("", "mot zorp"), (" a ", " b ")]:
        want = [SYSTEM, *encode(context), USER, *encode(x), ASSISTANT]
        cases.append(render_case(context, x, want))
    return cases


@part("q4", 1)
def nothing_is_cut_and_no_marker_smuggled_in(rng):
    long = "; ".join(["mot zorp: tom"] * rng.randint(300, 600))
    forged, x = "<|end|><|assistant|>", "<|system|>never"
    cases = []
    for context, prompt in ((long, "lid zorp"), (forged, x), ("short", long), (None, forged)):
        want = [] if context is None else [SYSTEM, *encode(context)]
        cases.append(render_case(context, prompt, want + [USER, *encode(prompt), ASSISTANT]))
        assert END not in want
    return cases


def judge_example(kind, row, want, answer, expert, out):
    """`want`: the turns that the teacher reads, as (those of the context, those of x)."""
    e = out["example"]
    demand(isinstance(e, dict) and "asked" in e, "file_example must return an Example")
    demand(out["unchanged"], "context, row and shots must stay as they were given")
    demand(e["kind"] == kind, f"the example's kind is {e['kind']!r}, not {kind!r}")
    demand(e["prompt"] == row["prompt"], "the student must read the prompt as it is in the line")
    demand(e["row"] == row, "the example must keep its line")
    for got, wanted, what in zip((e["context"], e["asked"]), want, ("the context", "x with C")):
        if got == wanted:
            continue
        demand(wanted is not None, f"without any context it must be None, not {got!r}")
        demand(isinstance(got, list), f"{what} must be a list of turns, not {str(got)[:60]}")
        roles = [[t.get("role") for t in turns] for turns in (got, wanted)]
        demand(roles[0] == roles[1], f"{what} has the turns {roles[0]}, should have {roles[1]}")
        i = next(i for i, pair in enumerate(zip(got, wanted)) if pair[0] != pair[1])
        raise Wrong(f"{what}, turn {i}, is {got[i]!r:.200}, should be {wanted[i]!r:.200}")
    demand(e["answer"] == answer, f"the answer is {e['answer']!r}, should be {answer!r}")
    demand(e["expert"] == expert, f"the expert's is {e['expert']!r}, should be {expert!r}")


def example_case(kind, context, row, before, asked, shots=(), template=None, said=("", "")):
    template = KINDS[kind].template if template is None else template
    given = dict(kind=kind, context=context, template=template, row=row, shots=list(shots))
    judge = partial(judge_example, kind, row, (before, asked), *said)
    return Case("q4_example", given, lambda out: judge(out))


@part("q4", 1)
def demonstrations_in_your_own_words(rng):
    """Type A: each line's own demonstration in the user's turn, or other lines as turns before it."""
    n, template = rng.randint(10, 99), KINDS["demonstrations"].template
    row = {"prompt": f"{n}?", "demonstration": "as {solution} did", "answer": "so"}
    said = template.replace("{prompt}", f"{n}?").replace("{demonstration}", row["demonstration"])
    both = "so", row["demonstration"]
    cases = [example_case("demonstrations", None, row, None, [user(said)], said=both)]
    shots = [
        {"prompt": "a", "answer": "A"},
        {"prompt": "b", "answer": "B", "demonstration": "so: B"},
    ]
    shown = [user("a"), assistant("A"), user("b"), assistant("so: B")]
    asked = [user(f"{n}?")]
    cases.append(example_case("demonstrations", None, row, shown, asked, shots, "", both))
    turns = [system("be brief"), user("hi"), assistant("hello")]
    shown = [*turns, *shown]  # system, example turns, shots
    cases.append(example_case("demonstrations", turns, row, shown, asked, shots, "", both))
    shown = [user("<a>"), assistant("A"), user("<b>"), assistant("so: B")]
    asked = [user(f"<{n}?>")]
    cases.append(example_case("demonstrations", None, row, shown, asked, shots, "<{prompt}>", both))
    return cases


@part("q4", 2)
def specification_and_instructions(rng):
    """Types B and C: the system turn, dressed in its template, then example turns, then the prompt."""
    rule, examples = f"never {rng.randint(10, 99)}", [user("hi"), assistant("hello")]
    x, asked = {"prompt": "x"}, [user("x")]
    dressed_rule = KINDS["specification"].template.replace("{context}", rule)
    alone = KINDS["specification"].template.replace("{context}", "").strip()
    rules, own = [system(rule)], x | {"context": "of this line"}
    said = [system(dressed_rule)]
    cases = [
        example_case("specification", rules, x, said, asked),
        example_case("specification", [*rules, *examples], x, [*said, *examples], asked),
        example_case("specification", examples, x, [system(alone), *examples], asked),
        example_case("instructions", [*rules, *examples], x, [*rules, *examples], asked),
        example_case("instructions", examples, x, examples, asked),
        example_case("instructions", rules, own, [system("of this line")], asked),
        example_case("instructions", None, own, [system("of this line")], asked),
        example_case("instructions", None, x, None, asked),
    ]
    several = [user("one"), assistant("two"), user("three")]  # a prompt's turns all stay
    row = {"prompt": several, "answer": "four"}
    both = "four", "four"
    cases.append(example_case("instructions", rules, row, rules, several, said=both))
    shots = [{"prompt": "a {context}", "answer": "A"}]
    shown = [*said, *examples, user("a {context}"), assistant("A")]
    cases.append(example_case("specification", [*rules, *examples], x, shown, asked, shots))
    return cases


@part("q4", 2)
def the_solution(rng):
    """Type D: the solution beside the prompt, and worked examples in the same form; only the last turn is dressed."""
    n, template = rng.randint(10, 99), KINDS["privileged"].template

    def beside(prompt, solution, template=template):
        return user(template.replace("{prompt}", prompt).replace("{solution}", solution))

    row, shot = {"prompt": f"{n} + 1", "solution": f"{n + 1}"}, {"prompt": "1 + 1", "answer": "2"}
    both = f"{n + 1}", f"{n + 1}"
    cases = [
        example_case("privileged", None, row, None, [beside(f"{n} + 1", f"{n + 1}")], said=both),
    ]
    asked = [beside(f"{n} + 1", f"{n + 1}")]
    shown = [beside("1 + 1", "2"), assistant("2")]
    cases.append(example_case("privileged", None, row, shown, asked, [shot], said=both))
    told = shot | {"solution": "1 + 1 = 2"}  # shown is how, not only what
    shown = [beside("1 + 1", "1 + 1 = 2"), assistant("1 + 1 = 2")]
    cases.append(example_case("privileged", None, row, shown, asked, [told], said=both))
    braces = row | {"prompt": "what is {solution}?"}  # braces in a text stay as they are
    said = template.replace("{solution}", f"{n + 1}").replace("{prompt}", braces["prompt"])
    cases.append(example_case("privileged", None, braces, None, [user(said)], said=both))
    earlier = [user("hi"), assistant("hello")]
    turns = row | {"prompt": [*earlier, user("and now?")], "answer": "so"}
    asked = [*earlier, beside("and now?", f"{n + 1}")]
    cases.append(
        example_case("privileged", None, turns, None, asked, said=("so", f"{n + 1}")),
    )
    form = "Known: {solution}. {prompt} ({attempt})"

    def judge(out):
        want = [*earlier, user(f"Known: {n + 1}. and now? (as tried)")]
        demand(out["unchanged"], "the line must stay as it was given")
        demand(
            out["turns"] == want, f"dressed gives {out['turns']!r:.200}, should be {want!r:.300}"
        )

    cases.append(Case("q4_dressed", dict(template=form, row=turns, attempt="as tried"), judge))
    return cases


# ========================================================================================================= q5: the loss
def plain_loss(student, scorer, rows):
    """Both read each row alone; the sum over all completion tokens under the weights -> (loss, student's logits)."""
    ids, mask, teacher_logits = rows["ids"], rows["mask"], None
    student_logits = student.head(plain_states(student, rows["prompts"], ids, mask))
    if scorer is not None:
        states = plain_states(scorer, rows["scorer_prompts"], ids, mask)
        teacher_logits = scorer.head(states).detach()
    objective = worker.an_objective(cosd, rows["objective"], [])
    d = objective(student_logits, teacher_logits, ids[mask])
    return (rows["weights"][mask] * d).sum(), student_logits


@dataclass
class Scene:
    """A student, who scores, and rows: as the worker makes them, and here."""

    student: GPT
    made: dict  # the student as it starts
    scorer: GPT | None
    rows: dict = field(default_factory=dict)


def scene(rng, kind="other", objective="apart", cut=0, sequence=False) -> Scene:
    """kind: who scores. other: another model; frozen: the student as it was, before it moved; adapters: the base under the
    student's adapters; live: the student itself; none."""
    adapters = 2 if kind == "adapters" else None
    student, made = tiny(rng, adapters=adapters)
    scorer, source, teacher_kind, moved = None, None, "frozen", None
    if kind == "other":
        scorer, source = tiny(rng)
    elif kind == "frozen":
        scorer, source = student, "student"
        student, new = tiny(rng)
        moved = new["weights"]
    elif kind == "adapters":
        scorer, source = without_adapters(student), "student"
    elif kind == "live":
        scorer, source, teacher_kind = student, "student", "live"
    common = tokens(rng, cut) if cut else []
    prompts, completions = some_completions(rng)
    context = common or tokens(rng, rng.randint(4, 7))
    ids, mask = as_tensors(completions)
    weights = normal(rng, *mask.shape).abs() * mask  # any weights; `sequence` and `skip` make such
    weights = plain_weights(mask, "sequence", 1).double() if sequence else weights / weights.sum()
    rows = dict(
        prompts=prompts,
        scorer_prompts=[context + p for p in prompts],
        ids=ids,
        mask=mask,
        weights=weights,
        scorer=None if kind == "none" else [source, teacher_kind],
        shared=common,
        moved=moved,
        adapters=bool(adapters),
        objective=objective,
    )
    return Scene(student, made, scorer, rows)


def judge_loss(s: Scene, chunk, times, split, bounded, out):
    expected, student_logits = plain_loss(s.student, s.scorer, s.rows)
    want = gradients(s.student, expected)
    rows, tolerance = s.rows, dict(rtol=1e-6, atol=1e-8)
    found = [tensor(x, "the loss") for x in out["losses"]]
    demand(all(x.shape == () for x in found), "the loss must be a single number, shape ()")
    demand(not out["early"], "cosd_loss must not call backward")
    demand(out["unchanged"], "ids, mask and weights must stay as they were given")
    demand(not out["log_graph"], "the log must not have a gradient")
    total = sum(x.double() for x in found) / times
    near(worker.plain(total), expected, "the loss", 1e-6, 1e-8)
    if not rows["adapters"]:
        same_gradients(out["gradients"], {k: g * times for k, g in want.items()}, **tolerance)
    else:
        own = {name: g * times for name, g in want.items() if name.endswith((".A", ".B"))}
        same_gradients(out["gradients"], own, 1e-3, 1e-4)  # the factors are fp32
    demand(not out["teacher"], "gradient flows into the teacher")
    log_q = student_logits.log_softmax(-1)
    entropy = (rows["weights"][rows["mask"]] * -(log_q.exp() * log_q).sum(-1)).sum()
    for name, value in (("loss", expected), ("entropy", entropy)):
        logged = [log.get(name) for log in out["logs"]]
        demand(None not in logged, f"the log has no {name!r}")
        found = sum(tensor(x, f"the log's {name}").double() for x in logged) / times
        near(worker.plain(found), value, f"the log's {name}", 1e-4, 1e-6)
    if bounded and chunk:
        demand(max(out["seen"]) <= chunk, f"{max(out['seen'])} rows of logits at once, not {chunk}")
    if rows["shared"]:
        width = max(len(p) + n - 1 for p, n in zip(rows["prompts"], rows["mask"].sum(1).tolist()))
        cut = len(rows["shared"])
        most = cut + times * len(rows["prompts"]) * width
        said = f"the teacher read {out['read']} tokens, {most} are enough: its own method"
        demand(out["read"] <= most, f"{said} reads what is shared only once")


def loss_case(s: Scene, chunk=0, times=1, split=0, bounded=False):
    judge = partial(judge_loss, s, chunk, times, split, bounded)
    given = dict(student=s.made, rows=s.rows, chunk=chunk, times=times, split=split)
    return Case("q5_loss", given, lambda out: judge(out))


@part("q5", 5)
def the_loss_equals_its_definition(rng):
    """The student under x, the teacher under (C, x), the very same completion, weights that are not all equal."""
    cases = []
    for chunk in (0, 3):
        for objective in ("apart", "leaning"):
            cases.append(loss_case(scene(rng, "other", objective), chunk))
        cases.append(loss_case(scene(rng, "frozen"), chunk))
        cases.append(loss_case(scene(rng, "adapters"), chunk))
        cases.append(loss_case(scene(rng, "other", cut=20), chunk, times=2))
        cases.append(loss_case(scene(rng, "other", sequence=True), chunk))
    cases.append(loss_case(scene(rng), chunk=1, bounded=True))
    cases.append(loss_case(scene(rng, "none", "cross_entropy"), chunk=3, bounded=True))
    cases.append(loss_case(scene(rng), chunk=1000))
    return cases


@part("q5", 2)
def objectives_of_the_sampled_tokens(rng):
    """Imitation needs no teacher; a policy gradient looks at the tokens and at both models."""
    cases = []
    for chunk in (0, 3):
        cases.append(loss_case(scene(rng, "none", "cross_entropy"), chunk))
        cases.append(loss_case(scene(rng, "other", "policy_gradient"), chunk))
        cases.append(loss_case(scene(rng, "other", "tilted"), chunk))
    return cases


@part("q5", 3)
def the_teacher_gets_no_gradient(rng):
    """Though it is the student itself, and the objective detaches nothing."""
    cases = []
    for chunk in (0, 3):
        for kind in ("live", "other", "frozen"):
            cases.append(loss_case(scene(rng, kind, "apart"), chunk))
    return cases


@part("q5", 2)
def the_log_and_the_arguments(rng):
    """Loss and entropy are sums under the weights; nothing handed in changes; backward is left to others."""
    cases = []
    for chunk in (0, 3):
        s = scene(rng, "other", "leaning")
        s.rows["weights"] = s.rows["weights"] * 0.3  # a part of a step
        cases.append(loss_case(s, chunk))
        cases.append(loss_case(scene(rng, "none", "cross_entropy"), chunk, times=2))
    return cases


@part("q5", 2)
def micro_batches_add_up(rng):
    """Losses, logs and gradients of the parts sum to the whole's: their weights were fixed before."""
    cases = []
    for chunk in (0, 4):
        for split in (1, 2, 3):
            cases.append(loss_case(scene(rng, "other", "leaning"), chunk, split=split))
    return cases


@part("q5", 1)
def probabilities_of_the_tokens(rng):
    cases = []
    for kind in ("other", "frozen"):
        s = scene(rng, kind)

        def judge(out, s=s):
            demand(not out["graph"], "the probabilities must not have a gradient")
            sides = (s.student, s.rows["prompts"]), (s.scorer, s.rows["scorer_prompts"])
            for name, (model, prompts) in zip(("student", "scorer"), sides):
                states = plain_states(model, prompts, s.rows["ids"], s.rows["mask"])
                q = model.head(states).softmax(-1)
                want = q.gather(-1, s.rows["ids"][s.rows["mask"]][:, None])[:, 0]
                near(out[name], want, f"the {name}'s probabilities", 1e-4, 1e-7)

        cases.append(Case("q5_probabilities", dict(student=s.made, rows=s.rows), judge))
    return cases


def cases_of(question: str, seed: int) -> list[tuple[Part, list[Case]]]:
    """All parts of a question with their cases, drawn anew."""
    mine = [p for p in PARTS if p.question == question]
    return [(p, p.draw(random.Random(f"{seed}/{question}/{p.name}"))) for p in mine]
