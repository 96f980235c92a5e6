"""The loss of a step on a small random model: which positions are scored, under which weights, and
who gets gradient."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt

from cosd import (
    DIVERGENCES,
    Rows,
    Teacher,
    completion_states,
    cosd_loss,
    cross_entropy,
    forward_kl,
    make_objective,
    on_distributions,
    shared_states,
    token_probabilities,
    token_weights,
)

EOS = 7
CONTEXT = [20, 3, 5, 5, 11, 2]
PROMPTS = [[21, 4, 9], [21, 1], [21, 8, 8, 2, 6], [21, 0, 15]]
SHARED = CONTEXT + [21]  # the context and the user's marker
SCORER_PROMPTS = [CONTEXT + p for p in PROMPTS]
COMPLETIONS = [[3, 12, EOS], [5, 5, 1, 16, EOS], [2], [EOS]]  # the third was cut off


def padded(rows, width=0, fill=0):
    width = max(width, max(map(len, rows)))
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, mask


def rows(scorer, objective="reverse_kl", reduction="token", skip=0, share=1.0, **kwargs):
    ids, mask = padded(COMPLETIONS, **kwargs)
    weights = share * token_weights(mask, reduction, skip)
    objective = make_objective(objective) if isinstance(objective, str) else objective
    return Rows(PROMPTS, SCORER_PROMPTS, ids, mask, weights, scorer, objective)


def two_models():
    """A student that has already moved away from its teacher."""
    return tiny_gpt(0), Teacher(tiny_gpt(1))


def gradient_of(student, loss):
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    return torch.cat([g.flatten() for g in gradients])


def step(student, *parts, chunk=0, size=0):
    """-> the log, summed over all parts and micro-batches, and the gradient."""
    log, gradient = {"loss": 0.0, "entropy": 0.0}, 0
    for part in (micro for each in parts for micro in each.split(size)):
        loss, values = cosd_loss(student, part, chunk)
        assert not any(value.requires_grad for value in values.values())
        log = {name: log[name] + values[name].item() for name in log}
        gradient = gradient + gradient_of(student, loss)
    return log, gradient


def naive_loss(student, scorer, divergence, reduction="token", skip=0, prompts=SCORER_PROMPTS):
    """By definition: a token at a time, each from a fresh pass over exactly what precedes it."""
    values = []
    for prompt, scorer_prompt, completion in zip(PROMPTS, prompts, COMPLETIONS):
        row = []
        for j in range(len(completion)):
            with torch.no_grad():
                teacher = scorer(torch.tensor([scorer_prompt + completion[:j]]))[0, -1]
            row.append(divergence(student(torch.tensor([prompt + completion[:j]]))[0, -1], teacher))
        values.append(row[skip:])
    if reduction == "token":
        return torch.stack(sum(values, [])).mean()
    return torch.stack([torch.stack(row).mean() for row in values if row]).mean()


@pytest.mark.parametrize(
    "reduction, skip", [("token", 0), ("sequence", 0), ("token", 2), ("sequence", 2)]
)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("split", [{}, {"chunk": 4}, {"size": 1}, {"size": 3}])
def test_step_equals_its_definition(name, reduction, skip, split):
    student, teacher = two_models()
    log, gradient = step(student, rows(teacher, name, reduction, skip), **split)
    loss = naive_loss(student, teacher.model, DIVERGENCES[name], reduction, skip)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient, gradient_of(student, loss), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("split", [{}, {"chunk": 2}, {"size": 1}])
def test_the_log_is_a_mean_over_all_tokens(split):
    student, teacher = two_models()
    log, _ = step(student, rows(teacher), **split)

    def entropy(s, t):
        return -(s.softmax(-1) * s.log_softmax(-1)).sum()

    assert log["entropy"] == pytest.approx(naive_loss(student, student, entropy).item(), rel=1e-5)


def test_hidden_states_are_those_before_each_token():
    model = tiny_gpt()
    states = completion_states(model, PROMPTS, *padded(COMPLETIONS))
    assert len(states) == sum(map(len, COMPLETIONS))
    torch.testing.assert_close(states[0], model.hidden(torch.tensor([PROMPTS[0]]))[0, -1])
    torch.testing.assert_close(states[-1], model.hidden(torch.tensor([PROMPTS[3]]))[0, -1])


@pytest.mark.parametrize("fill", [0, EOS, 22])
def test_padding_changes_nothing(fill):
    student, teacher = two_models()
    log, gradient = step(student, rows(teacher))
    wide, wide_gradient = step(student, rows(teacher, width=11, fill=fill))
    assert log["loss"] == pytest.approx(wide["loss"], rel=1e-7)
    torch.testing.assert_close(gradient, wide_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("split", [{}, {"chunk": 3}, {"size": 1}])
def test_cross_entropy_needs_no_scorer(split):
    student = tiny_gpt()
    log, gradient = step(student, rows(None, cross_entropy), **split)
    values = [
        -student(torch.tensor([p + c[:j]]))[0, -1].log_softmax(-1)[c[j]]
        for p, c in zip(PROMPTS, COMPLETIONS)
        for j in range(len(c))
    ]
    loss = torch.stack(values).mean()
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient, gradient_of(student, loss), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("split", [{}, {"chunk": 3}, {"size": 1}, {"size": 3}])
def test_task_and_anchors_add_up(split):
    student, teacher = two_models()
    base = Teacher(tiny_gpt(2))
    task = rows(teacher, share=0.75)
    anchors = replace(rows(base, "forward_kl", share=0.25), scorer_prompts=PROMPTS)
    assert (task.weights.sum() + anchors.weights.sum()).item() == pytest.approx(1)
    log, gradient = step(student, task, anchors, **split)
    loss = 0.75 * naive_loss(student, teacher.model, DIVERGENCES["reverse_kl"])
    loss = loss + 0.25 * naive_loss(student, base.model, forward_kl, prompts=PROMPTS)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient, gradient_of(student, loss), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("chunk", [0, 3])
def test_rows_stay_as_they_are_and_a_second_call_gives_the_same(chunk):
    student, teacher = two_models()
    given = rows(teacher)
    before = copy.deepcopy((given.prompts, given.scorer_prompts))
    tensors = [t.clone() for t in (given.ids, given.mask, given.weights)]
    first, second = (cosd_loss(student, given, chunk)[0].item() for _ in range(2))
    assert first == second and before == (given.prompts, given.scorer_prompts)
    assert all(map(torch.equal, tensors, (given.ids, given.mask, given.weights)))
    assert all(p.grad is None for p in student.parameters())  # no backward inside


def test_weights_by_hand():
    mask = padded([[1, 1, 1], [1], [1, 1]])[1]
    assert token_weights(mask).unique().tolist() == pytest.approx([0, 1 / 6])
    by_hand = torch.tensor([[1 / 9, 1 / 9, 1 / 9], [1 / 3, 0, 0], [1 / 6, 1 / 6, 0]])
    torch.testing.assert_close(token_weights(mask, "sequence"), by_hand)
    by_hand = torch.tensor([[0, 1 / 4, 1 / 4], [0, 0, 0], [0, 1 / 2, 0]])
    torch.testing.assert_close(token_weights(mask, "sequence", skip=1), by_hand)
    assert token_weights(mask, skip=9).sum() == 0  # nothing left: a zero loss, not NaN
    for bad in ({"reduction": "batchmean"}, {"skip": -1}):
        with pytest.raises(ValueError, match="token_weights"):
            token_weights(mask, **bad)


def test_teacher_gets_no_gradient_and_is_not_changed():
    student, teacher = two_models()
    before = copy.deepcopy(teacher.model.state_dict())
    teacher.model.requires_grad_(True)  # even if someone turns it on
    given = rows(teacher)
    assert not teacher.states(given.scorer_prompts, given.ids, given.mask).requires_grad
    for chunk in (0, 3):
        cosd_loss(student, given, chunk)[0].backward()
        assert all(p.grad is None for p in teacher.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())


@pytest.mark.parametrize("chunk", [0, 2])
def test_an_objective_of_ones_own_lets_no_gradient_into_a_live_teacher(chunk):
    def squared(student_logits, teacher_logits, tokens):  # detaches nothing
        return ((student_logits - teacher_logits) ** 2).sum(-1)

    student = tiny_gpt()
    live, frozen = (
        step(student, rows(Teacher(student, kind), squared), chunk=chunk)[1]
        for kind in ("live", "frozen")
    )
    torch.testing.assert_close(live, frozen)


@pytest.mark.parametrize("kind", ["frozen", "ema", "live"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_same_model_without_context_gives_zero(name, kind):
    student = tiny_gpt()
    with_context = rows(Teacher(student, kind), name)
    log, gradient = step(student, replace(with_context, scorer_prompts=PROMPTS))
    assert abs(log["loss"]) < 1e-12 and gradient.abs().max() < 1e-12
    log, gradient = step(student, with_context)
    assert log["loss"] > 1e-3 and gradient.abs().max() > 1e-4


def test_policy_gradient_equals_reverse_kl_in_expectation():
    student, teacher = two_models()

    def gradient(token, name):
        ids, mask = padded([[token]])
        weights, objective = token_weights(mask), make_objective(name)
        one = Rows(PROMPTS[:1], SCORER_PROMPTS[:1], ids, mask, weights, teacher, objective)
        return step(student, one)[1]

    q = student(torch.tensor(PROMPTS[:1]))[0, -1].softmax(-1).detach()
    expected = sum(q[token] * gradient(token, "policy_gradient") for token in range(23))
    torch.testing.assert_close(expected, gradient(0, "reverse_kl"), rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------- teachers
@pytest.mark.parametrize("kind", ["frozen", "ema", "live"])
def test_context_read_once_equals_context_read_by_every_row(kind):
    student = tiny_gpt()
    shared, plain = (Teacher(student, kind, ema_rate=0.5, shared=s) for s in (SHARED, ()))
    for _ in range(3):  # also after the teacher has moved
        torch.testing.assert_close(step(student, rows(shared))[1], step(student, rows(plain))[1])
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.05)
        shared.update(student), plain.update(student)


@pytest.mark.parametrize("more", [[], [4] * 20])
@pytest.mark.parametrize("start", [SHARED, [9] * len(SHARED)])
def test_only_what_begins_with_the_context_continues_it(start, more):
    """Also where what remains after the context has a long common beginning of its own."""
    model = tiny_gpt(1)
    prompts = [start + more + p for p in PROMPTS]
    given = padded(COMPLETIONS)
    states = Teacher(model, shared=SHARED).states(prompts, *given)
    torch.testing.assert_close(states, completion_states(model, prompts, *given))
    torch.testing.assert_close(shared_states(model, prompts, *given), states)


def test_a_rollout_that_fills_the_model_can_be_scored():
    model = tiny_gpt()
    ids = torch.full((4, 64 - 5), 3)
    mask = torch.ones_like(ids, dtype=torch.bool)
    prompts = [[21, 1, 2, 3, 4, 5]] * 4  # 6 + 59: the last token is predicted, not read
    assert len(completion_states(model, prompts, ids, mask)) == ids.numel()
    assert len(Teacher(model, shared=[21, 1]).states(prompts, ids, mask)) == ids.numel()


def test_how_often_a_teacher_reads_its_context(monkeypatch):
    student, reads = tiny_gpt(), []
    original = type(student).read

    def counted(self, ids):
        reads.append(len(ids))
        return original(self, ids)

    monkeypatch.setattr(type(student), "read", counted)
    for kind, times in {"frozen": 1, "ema": 3, "live": 3}.items():
        teacher = Teacher(student, kind, shared=SHARED)
        reads.clear()
        for _ in range(3):
            step(student, rows(teacher), size=2)
            teacher.update(student)
        assert len(reads) == times


def test_teacher_kinds_follow_the_student_as_they_should():
    student = tiny_gpt()
    kinds = {"frozen": {}, "ema": {}, "live": {}}
    teachers = {kind: Teacher(student, kind) for kind in kinds}
    start = student.embed.weight.detach().clone()
    with torch.no_grad():
        student.embed.weight.add_(1.0)
    for teacher in teachers.values():
        teacher.update(student)
        teacher.update(student)
    moved = {k: (t.model.embed.weight - start).mean().item() for k, t in teachers.items()}
    assert moved == pytest.approx({"frozen": 0.0, "ema": 1 - 0.98**2, "live": 1.0})
    with pytest.raises(ValueError, match="choose from frozen, ema, live"):
        Teacher(student, "momentum")


def test_token_probabilities():
    student, teacher = two_models()
    q, p = token_probabilities(student, rows(teacher))
    prefix = torch.tensor([PROMPTS[1] + COMPLETIONS[1][:2]])
    scorer_prefix = torch.tensor([SCORER_PROMPTS[1] + COMPLETIONS[1][:2]])
    assert q[5].item() == pytest.approx(student(prefix)[0, -1].softmax(-1)[1].item(), rel=1e-5)
    exact = teacher.model(scorer_prefix)[0, -1].softmax(-1)[1].item()
    assert p[5].item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [0, 4])
def test_autocast_keeps_fp32_masters_and_nearly_the_gradient(dtype, chunk):
    student, teacher = tiny_gpt(0).float(), Teacher(tiny_gpt(1).float(), shared=SHARED)
    _, exact = step(student, rows(teacher))
    with torch.autocast("cpu", dtype):
        loss, _ = cosd_loss(student, rows(teacher), chunk)
    gradient = gradient_of(student, 1024 * loss)
    assert loss.dtype == gradient.dtype == torch.float32
    assert F.cosine_similarity(gradient, exact, dim=0) > 0.99
    assert (gradient.norm() / exact.norm() / 1024 - 1).abs() < 0.1


def test_chunk_bounds_the_rows_of_logits():
    student, teacher = two_models()
    seen = []

    def objective(student_logits, teacher_logits, tokens):
        seen.append((len(student_logits), len(teacher_logits), len(tokens)))
        return forward_kl(student_logits, teacher_logits)

    cosd_loss(student, rows(teacher, objective), chunk=2)
    assert seen == [(2, 2, 2)] * 5
    assert on_distributions(forward_kl)(torch.zeros(1, 3), torch.zeros(1, 3), None).item() == 0


def test_sft_is_forward_kl_from_a_one_hot_teacher():
    logits, token = torch.randn(5, 23, dtype=torch.float64), torch.tensor([3, 1, 22, 0, 9])
    one_hot = torch.full_like(logits, float("-inf")).scatter(1, token[:, None], 0.0)
    expected = cross_entropy(logits, None, token)
    torch.testing.assert_close(forward_kl(logits, one_hot), expected, rtol=1e-12, atol=0)


def test_eos_is_scored_like_any_other_token():
    student, teacher = two_models()
    whole = rows(teacher)
    without = whole.mask & (whole.ids != EOS)
    less = replace(whole, mask=without, weights=token_weights(without))
    assert whole.weights[0, 2] > 0 and whole.weights[3, 0] > 0  # rows 0 and 3 end in EOS there
    assert step(student, less)[0]["loss"] != pytest.approx(
        step(student, whole)[0]["loss"], rel=1e-3
    )


def test_a_step_along_the_gradient_brings_the_student_nearer():
    student, teacher = two_models()
    for name in DIVERGENCES:
        before, gradient = step(student, rows(teacher, name))
        with torch.no_grad():
            for parameter, part in zip(
                student.parameters(), gradient.split([p.numel() for p in student.parameters()])
            ):
                parameter -= 0.02 * part.view_as(parameter)
        assert step(student, rows(teacher, name))[0]["loss"] < before["loss"]


@pytest.mark.parametrize("how", [("jsd", 0.2, 0), ("jsd", 0.5, 5), ("reverse_kl", 0.5, 5)])
def test_chunks_change_nothing_for_any_objective(how):
    student, teacher = two_models()
    objective = make_objective(*how)
    (plain, gradient), (chunked, same) = (
        step(student, rows(teacher, objective), chunk=chunk) for chunk in (0, 3)
    )
    assert chunked["loss"] == pytest.approx(plain["loss"], rel=1e-12)
    torch.testing.assert_close(gradient, same, rtol=1e-9, atol=1e-12)
