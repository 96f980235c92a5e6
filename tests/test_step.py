"""The COSD step on a small random model: which positions are scored, under which weights, and who gets gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_gpt
from cosd import DIVERGENCES, Batch, Teacher, completion_states, cosd_step, forward_kl, jsd, reverse_kl, token_loss, token_weights, top_k_divergence

EOS = 7
CONTEXT = [20, 3, 5, 5, 11, 2]
PROMPTS = [[21, 4, 9], [21, 1], [21, 8, 8, 2, 6], [21, 0, 15]]
SHARED = CONTEXT + [21]                                                         # the context and the user's marker
TEACHER_PROMPTS = [CONTEXT + p for p in PROMPTS]
COMPLETIONS = [[3, 12, EOS], [5, 5, 1, 16, EOS], [2], [EOS]]                     # the third was cut off, the last is EOS alone


def padded(rows, width=0, fill=0):
    width = max(width, max(map(len, rows)))
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, mask


def batch(**kwargs):
    return Batch(PROMPTS, TEACHER_PROMPTS, *padded(COMPLETIONS, **kwargs))


def two_models():
    """A student that has already moved away from its teacher."""
    return tiny_gpt(0), Teacher(tiny_gpt(1))


def step(student, teacher, data, objective="reverse_kl", **kwargs):
    student.zero_grad()
    log = cosd_step(student, teacher, data, objective, eos={EOS}, max_new_tokens=6, **kwargs)
    return log, torch.cat([p.grad.flatten() for p in student.parameters()])


def naive_loss(student, teacher_model, divergence, reduction="token", skip=0):
    """By definition: one token at a time, each from a fresh forward pass over exactly what precedes it."""
    rows = []
    for prompt, teacher_prompt, completion in zip(PROMPTS, TEACHER_PROMPTS, COMPLETIONS):
        values = []
        for j in range(len(completion)):
            with torch.no_grad():
                teacher_logits = teacher_model(torch.tensor([teacher_prompt + completion[:j]]))[0, -1]
            values.append(divergence(student(torch.tensor([prompt + completion[:j]]))[0, -1], teacher_logits))
        rows.append(values[skip:])
    if reduction == "token":
        return torch.stack(sum(rows, [])).mean()
    return torch.stack([torch.stack(values).mean() for values in rows if values]).mean()


@pytest.mark.parametrize("reduction, skip", [("token", 0), ("sequence", 0), ("token", 2), ("sequence", 2)])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_step_equals_its_definition(name, reduction, skip):
    student, teacher = two_models()
    log, gradient = step(student, teacher, batch(), name, reduction=reduction, skip=skip)
    loss = naive_loss(student, teacher.model, DIVERGENCES[name], reduction, skip)
    student.zero_grad()
    loss.backward()
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in student.parameters()]), rtol=1e-5, atol=1e-8)


def test_hidden_states_are_those_before_each_token():
    """Not the state *at* the token: the first one sits on the prompt's last token."""
    model = tiny_gpt()
    ids, mask = padded(COMPLETIONS)
    states = completion_states(model, PROMPTS, ids, mask)
    assert states.shape[0] == sum(map(len, COMPLETIONS))
    torch.testing.assert_close(states[0], model.hidden(torch.tensor([PROMPTS[0]]))[0, -1])
    torch.testing.assert_close(states[-1], model.hidden(torch.tensor([PROMPTS[3]]))[0, -1])       # EOS alone: predicted from the prompt


@pytest.mark.parametrize("fill", [0, EOS, 22])
def test_padding_amount_and_pad_id_change_nothing(fill):
    student, teacher = two_models()
    (log, gradient), (padded_log, padded_gradient) = step(student, teacher, batch()), step(student, teacher, batch(width=11, fill=fill))
    assert log["loss"] == pytest.approx(padded_log["loss"], rel=1e-12) and log["eos_rate"] == padded_log["eos_rate"] == 0.75
    torch.testing.assert_close(gradient, padded_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_nothing(reduction, micro_batch):
    student, teacher = two_models()
    (log, gradient), (split_log, split_gradient) = (step(student, teacher, batch(), reduction=reduction, skip=1, micro_batch=m) for m in (None, micro_batch))
    assert log["loss"] == pytest.approx(split_log["loss"], rel=1e-7)
    torch.testing.assert_close(gradient, split_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("objective", [*DIVERGENCES.values(), lambda s, t: jsd(s, t, 0.2), lambda s, t: top_k_divergence(s, t, 5)])
def test_chunks_change_nothing(objective):
    student, teacher = two_models()
    (log, gradient), (chunked_log, chunked_gradient) = step(student, teacher, batch(), objective), step(student, teacher, batch(), objective, chunk=4)
    assert log["loss"] == pytest.approx(chunked_log["loss"], rel=1e-12)
    torch.testing.assert_close(gradient, chunked_gradient, rtol=1e-9, atol=1e-12)


def test_eos_is_scored_and_prompt_tokens_are_not():
    student, teacher = two_models()
    ids, mask = padded(COMPLETIONS)
    weights = token_weights(mask)
    assert weights[0, 2] > 0 and weights[3, 0] > 0                                               # rows 0 and 3 end in EOS there
    assert weights.sum() == pytest.approx(1) and (weights > 0).sum() == sum(map(len, COMPLETIONS))
    without_eos = Batch(PROMPTS, TEACHER_PROMPTS, ids, mask & (ids != EOS))
    assert step(student, teacher, without_eos)[0]["loss"] != pytest.approx(step(student, teacher, batch())[0]["loss"], rel=1e-3)
    # Cross-entropy sees exactly the completion's tokens, at the logits one position earlier.
    log, _ = step(student, None, batch(), "cross_entropy")
    by_hand = [-student(torch.tensor([p + c[:j]]))[0, -1].log_softmax(-1)[c[j]] for p, c in zip(PROMPTS, COMPLETIONS) for j in range(len(c))]
    assert log["loss"] == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-6)


def test_weights_by_hand():
    mask = padded([[1, 1, 1], [1], [1, 1]])[1]
    assert token_weights(mask).unique().tolist() == pytest.approx([0, 1 / 6])
    torch.testing.assert_close(token_weights(mask, "sequence"), torch.tensor([[1 / 9, 1 / 9, 1 / 9], [1 / 3, 0, 0], [1 / 6, 1 / 6, 0]]))
    # skip=1 empties the second row: it then counts for nothing, in the denominator neither
    torch.testing.assert_close(token_weights(mask, "sequence", skip=1), torch.tensor([[0, 1 / 4, 1 / 4], [0, 0, 0], [0, 1 / 2, 0]]))
    assert token_weights(mask, skip=9).sum() == 0                                                # nothing left: a zero loss, not NaN
    for bad in (dict(reduction="batchmean"), dict(skip=-1)):
        with pytest.raises(ValueError, match="token_weights"):
            token_weights(mask, **bad)


def test_teacher_gets_no_gradient_and_is_not_changed():
    student, teacher = two_models()
    before = copy.deepcopy(teacher.model.state_dict())
    teacher.model.requires_grad_(True)                                                            # even if someone turns it on
    given = batch()
    assert not teacher.states(given.teacher_prompts, given.completion, given.mask).requires_grad   # nor a graph: it costs a second student's memory
    for chunk in (None, 3):
        step(student, teacher, batch(), chunk=chunk)
        assert all(p.grad is None for p in teacher.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())


@pytest.mark.parametrize("kind", ["frozen", "ema", "live"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_same_model_without_context_gives_zero(name, kind):
    student = tiny_gpt()
    data = Batch(PROMPTS, PROMPTS, *padded(COMPLETIONS))
    log, gradient = step(student, Teacher(student, kind), data, name)
    assert abs(log["loss"]) < 1e-12 and gradient.abs().max() < 1e-12
    log, gradient = step(student, Teacher(student, kind), batch(), name)                          # and with context it does not
    assert log["loss"] > 1e-3 and gradient.abs().max() > 1e-4


def test_the_gradient_moves_the_student_toward_the_teacher():
    student, teacher = two_models()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
    for name in DIVERGENCES:
        before, _ = step(student, teacher, batch(), name)
        optimizer.step()
        assert step(student, teacher, batch(), name)[0]["loss"] < before["loss"]


def test_policy_gradient_equals_reverse_kl_in_expectation():
    """All one-token completions, each once, weighted by the student's probability: the exact reverse-KL gradient."""
    student, teacher = two_models()
    prompt, teacher_prompt = PROMPTS[0], TEACHER_PROMPTS[0]
    with torch.no_grad():
        q = student(torch.tensor([prompt]))[0, -1].softmax(-1)
    expected_gradient = 0
    for token in range(23):
        _, gradient = step(student, teacher, Batch([prompt], [teacher_prompt], *padded([[token]])), "policy_gradient")
        expected_gradient = expected_gradient + q[token] * gradient
    _, exact = step(student, teacher, Batch([prompt], [teacher_prompt], *padded([[0]])), "reverse_kl")
    torch.testing.assert_close(expected_gradient, exact, rtol=1e-6, atol=1e-9)


def test_sft_is_forward_kl_from_a_one_hot_teacher():
    logits, token = torch.randn(5, 23, dtype=torch.float64), torch.tensor([3, 1, 22, 0, 9])
    one_hot = torch.full_like(logits, float("-inf")).scatter(1, token[:, None], 0.0)
    torch.testing.assert_close(forward_kl(logits, one_hot), F.cross_entropy(logits, token, reduction="none"), rtol=1e-12, atol=0)


def test_weighted_cross_entropy_by_hand():
    """Q = (.5, .3, .2) and the token of .2: −log .2 = 1.6094, times .2 = .3219. The weight carries no gradient: Q(y) (Q − one-hot)."""
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log().requires_grad_()
    loss = token_loss("weighted_cross_entropy", logits, None, torch.tensor([2]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(loss, torch.tensor([0.32188758], dtype=torch.float64))
    torch.testing.assert_close(gradient, 0.2 * torch.tensor([[0.5, 0.3, -0.8]], dtype=torch.float64))


@pytest.mark.parametrize("imitate", ["cross_entropy", "weighted_cross_entropy"])
def test_a_weighted_sum_of_objectives(imitate):
    """ASFT, and SFT near the base: loss and gradient are the sums of the parts'; chunks and micro-batches change nothing."""
    student, teacher = two_models()
    both, gradient = step(student, teacher, batch(), {imitate: 1.0, "forward_kl": 0.3})
    (one, g_one), (other, g_other) = (step(student, teacher, batch(), objective) for objective in (imitate, "forward_kl"))
    assert both["loss"] == pytest.approx(one["loss"] + 0.3 * other["loss"], rel=1e-6)
    torch.testing.assert_close(gradient, g_one + 0.3 * g_other)
    for split in (dict(chunk=2), dict(micro_batch=1)):
        again, same = step(student, teacher, batch(), {imitate: 1.0, "forward_kl": 0.3}, **split)
        assert again["loss"] == pytest.approx(both["loss"], rel=1e-6)
        torch.testing.assert_close(same, gradient)


# --------------------------------------------------------------------------------------------------- rollouts
def test_rollouts_come_from_the_student_without_context():
    student, teacher = two_models()
    data = Batch(PROMPTS, TEACHER_PROMPTS)
    log, _ = step(student, teacher, data, generator=torch.Generator().manual_seed(3))
    expected = student.generate(PROMPTS, 6, eos={EOS}, generator=torch.Generator().manual_seed(3))
    assert torch.equal(data.completion, expected[0]) and torch.equal(data.mask, expected[1])
    assert log["length"] == pytest.approx(expected[1].sum(1).float().mean().item())
    on_these, _ = step(student, teacher, Batch(PROMPTS, TEACHER_PROMPTS, *expected))
    assert log["loss"] == on_these["loss"]


def test_temperature_applies_to_rollouts_only():
    """T changes which completions are drawn, not how a given completion is scored (no T in the logits, no T² in the loss)."""
    student, teacher = two_models()
    assert step(student, teacher, batch(), temperature=2.0)[0]["loss"] == step(student, teacher, batch())[0]["loss"]
    hot, cold = Batch(PROMPTS, TEACHER_PROMPTS), Batch(PROMPTS, TEACHER_PROMPTS)
    step(student, teacher, hot, temperature=50.0, generator=torch.Generator().manual_seed(0))
    step(student, teacher, cold, temperature=0.0)
    assert torch.equal(cold.completion, student.generate(PROMPTS, 6, temperature=0, eos={EOS})[0])
    assert hot.completion.shape != cold.completion.shape or not torch.equal(hot.completion, cold.completion)


def test_weight_scales_loss_and_gradient_but_not_the_divergence():
    student, teacher = two_models()
    (log, gradient), (half_log, half_gradient) = step(student, teacher, batch()), step(student, teacher, batch(), weight=0.5)
    assert half_log["loss"] == pytest.approx(log["loss"] / 2) and half_log["objective"] == pytest.approx(log["objective"])
    torch.testing.assert_close(half_gradient, gradient / 2)


def test_unknown_objective():
    for chunk in (None, 2):
        with pytest.raises(ValueError, match="'kl' is not supported; choose from forward_kl, reverse_kl, jsd, policy_gradient, cross_entropy"):
            step(*two_models(), batch(), "kl", chunk=chunk)


def test_diagnostics_are_means_over_tokens():
    student, teacher = two_models()
    log, _ = step(student, teacher, batch(), "reverse_kl")
    assert log["kl"] == pytest.approx(log["loss"], rel=1e-5)                                      # fewer than 256 tokens: the whole batch
    entropy = naive_loss(student, teacher.model, lambda s, t: -(s.softmax(-1) * s.log_softmax(-1)).sum())
    assert log["entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    split, _ = step(student, teacher, batch(), "reverse_kl", micro_batch=1)
    assert (split["kl"], split["entropy"]) == pytest.approx((log["kl"], log["entropy"]), rel=1e-5)
    assert "kl" not in step(student, None, batch(), "cross_entropy")[0]


def test_chunk_bounds_the_rows_of_logits():
    student, teacher = two_models()
    rows = []
    for model in (student, teacher.model):
        model.head.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    step(student, teacher, batch(), chunk=2)
    assert max(rows) <= 2


# --------------------------------------------------------------------------------------------------- teachers
@pytest.mark.parametrize("kind", ["frozen", "ema", "live"])
def test_context_read_once_equals_context_read_by_every_row(kind):
    student = tiny_gpt()
    shared, plain = (Teacher(student, kind, ema_rate=0.5, shared=s) for s in (SHARED, ()))
    for _ in range(3):                                                                            # also after the teacher has moved
        (log, gradient), (plain_log, plain_gradient) = step(student, shared, batch()), step(student, plain, batch())
        assert log["loss"] == pytest.approx(plain_log["loss"], rel=1e-9)
        torch.testing.assert_close(gradient, plain_gradient, rtol=1e-8, atol=1e-11)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.05)
        shared.update(student), plain.update(student)
    foreign = Batch(PROMPTS, [[9, 9] + p for p in PROMPTS], *padded(COMPLETIONS))                 # does not begin with the shared context
    assert step(student, shared, foreign)[0]["loss"] == pytest.approx(step(student, plain, foreign)[0]["loss"], rel=1e-12)


def test_a_frozen_teacher_reads_its_context_once(monkeypatch):
    student = tiny_gpt()
    reads = []
    original = type(student).read
    monkeypatch.setattr(type(student), "read", lambda self, ids: reads.append(len(ids)) or original(self, ids))
    counts = {}
    for kind in ("frozen", "ema", "live"):
        teacher = Teacher(student, kind, shared=SHARED)
        reads.clear()
        for _ in range(3):
            step(student, teacher, batch(), micro_batch=2)
            teacher.update(student)
        counts[kind] = len(reads)
    assert counts == {"frozen": 1, "ema": 3, "live": 3}


def test_teacher_kinds_follow_the_student_as_they_should():
    student = tiny_gpt()
    teachers = {kind: Teacher(student, kind, ema_rate=0.25) for kind in ("frozen", "ema", "live")}
    start = student.embed.weight.detach().clone()
    with torch.no_grad():
        student.embed.weight.add_(1.0)
    for teacher in teachers.values():
        teacher.update(student)
        teacher.update(student)
    moved = {kind: (teacher.model.embed.weight - start).mean().item() for kind, teacher in teachers.items()}
    assert moved == pytest.approx({"frozen": 0.0, "ema": 1 - 0.75**2, "live": 1.0})
    with pytest.raises(ValueError, match="choose from frozen, ema, live"):
        Teacher(student, "momentum")


def test_dropout_is_on_for_the_student_and_off_for_the_teacher():
    student = tiny_gpt(dropout=0.3)
    teacher = Teacher(student)
    assert teacher.model.training
    data = Batch(PROMPTS, PROMPTS, *padded(COMPLETIONS))
    ids, mask = data.completion, data.mask
    assert torch.equal(teacher.states(PROMPTS, ids, mask), teacher.states(PROMPTS, ids, mask))
    assert step(student, teacher, data)[0]["loss"] > 1e-4


# --------------------------------------------------------------------------------------------- mixed precision
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 4])
def test_autocast_keeps_fp32_masters_and_nearly_the_gradient(dtype, chunk):
    student, teacher = (tiny_gpt(0).float(), Teacher(tiny_gpt(1).float(), shared=SHARED))
    _, exact = step(student, teacher, batch())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    log, gradient = step(student, teacher, batch(), chunk=chunk, autocast=lambda: torch.autocast("cpu", dtype), backward=lambda loss: scaler.scale(loss).backward())
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in student.parameters())
    assert F.cosine_similarity(gradient, exact, dim=0) > 0.99 and (gradient.norm() / exact.norm() / 1024 - 1).abs() < 0.1
    rollout = Batch(PROMPTS, TEACHER_PROMPTS)
    assert step(student, teacher, rollout, autocast=lambda: torch.autocast("cpu", dtype))[0]["loss"] > 0


@pytest.mark.parametrize("chunk", [None, 2])
def test_an_objective_of_ones_own_cannot_let_gradient_into_the_teacher(chunk):
    """With a live teacher its head is the student's own weight: the step itself must cut it off, not only our divergences."""
    def squared(student_logits, teacher_logits):                                                    # detaches nothing
        return ((student_logits - teacher_logits) ** 2).sum(-1)

    batch = lambda: Batch([[1, 2, 3], [4, 5]], [[7, 1, 2, 3], [7, 4, 5]], torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.bool))
    gradients = []
    for kind in ("live", "frozen"):                                                                 # equal weights: equal gradients, or some went through
        model = tiny_gpt()
        cosd_step(model, Teacher(model, kind), batch(), squared, eos=(), max_new_tokens=3, chunk=chunk)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)
