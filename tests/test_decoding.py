"""Decoding as a GPU needs it: few operations a token, a step whose shapes never change, the whole matrix
of dtypes and shapes, and kernels that keep no scores."""

import shutil
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from benchmark import MATRIX, check_variant, small_model
from conftest import tiny_gpt
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from cosd import Rows, Teacher, cosd_loss, forward_kl, on_distributions, token_weights
from model import DTYPES, GPT, GPTConfig, KVCache, add_adapters, low_precision_, resolve_device

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8]]
COMMON = list(range(20))
VIEWS = (
    "view t transpose slice unsqueeze expand select _unsafe_view alias permute split unbind".split()
)
VIEWS += "split_with_sizes chunk detach squeeze as_strided reshape _reshape_alias".split()


# ------------------------------------------------------------------------- one step, always the same
class FakeGraph:
    """What a CUDA graph does, on the CPU: the operations of one step, run again on the same tensors."""

    def __init__(self):
        self.tape = []

    def replay(self):
        for operation, args, kwargs, out in self.tape:
            again = operation(*args, **kwargs)
            for old, new in zip(tree.tree_leaves(out), tree.tree_leaves(again)):
                # What was done in place, or is a view, is there already.
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


@contextmanager
def recording(graph):
    """Capturing runs nothing: in-place changes made meanwhile are undone."""
    changed = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            assert operation != torch.ops.aten._local_scalar_dense.default, (
                "the host reads a number"
            )
            for value, argument in zip(args, operation._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    changed.setdefault(id(value), (value, value.clone()))
            out = operation(*args, **(kwargs or {}))
            graph.tape.append((operation, args, kwargs or {}, out))
            return out

    with Recorder():
        yield
    for tensor, before in changed.values():
        tensor.copy_(before)


class OnCuda(torch.Tensor):
    """A token that claims to be on a GPU; its copy is a normal tensor."""

    device = property(lambda self: torch.device("cuda"))

    def clone(self):
        return self.as_subclass(torch.Tensor).clone()


SHAPES = {
    "grouped heads": {},
    "biases, learned positions": dict(
        positions="learned", norm="layer", mlp="gelu", qkv_bias=True, out_bias=True, mlp_bias=True
    ),
    "q/k norm": dict(qk_norm=True, n_kv_head=4),
}


@pytest.mark.parametrize("common", [[], COMMON])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_recorded_step_draws_the_same_tokens(shape, common, temperature, monkeypatch):
    model, graphs = tiny_gpt(**SHAPES[shape]), []
    prompts = [common + prompt for prompt in PROMPTS]

    def generate(captured):
        generator = torch.Generator().manual_seed(0)
        how = {"temperature": temperature, "generator": generator, "captured": captured}
        return model.generate(prompts, 12, eos={3, 11}, **how)

    plain = generate(False)
    capture = model_module.capture
    monkeypatch.setattr(
        model_module, "capture", lambda step, token: capture(step, token.as_subclass(OnCuda))
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(FakeGraph()) or graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph", recording)
    recorded = generate(True)
    assert len(graphs) == 1 and len(graphs[0].tape) > 50
    names = {str(operation) for operation, *_ in graphs[0].tape}
    assert not [
        name for name in names if "scalar_tensor" in name or "lift" in name
    ]  # from the host
    assert torch.equal(plain[0], recorded[0]) and torch.equal(plain[1], recorded[1])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")
def test_a_compiled_step_draws_the_same_tokens():
    model = tiny_gpt().float()
    plain, compiled = (
        model.generate(PROMPTS, 10, temperature=0, captured=captured) for captured in (False, True)
    )
    assert torch.equal(plain[0], compiled[0]) and torch.equal(plain[1], compiled[1])


# ------------------------------------------------------------------------------ operations a token
class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen[operation._schema.name.removeprefix("aten::")] += 1
        return operation(*args, **(kwargs or {}))


def operations_a_token(n_layer, dtype, adapters):
    """Views do not count, because they launch no kernel."""
    shape = {"d_model": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "d_ff": 96}
    model = GPT(GPTConfig(100, n_layer=n_layer, **shape))
    _, low, autocast = resolve_device("cpu", dtype)
    if adapters:
        add_adapters(model, 4)
        low_precision_(model, low)
    counts = []
    for tokens in (9, 25):
        with autocast(), Counting() as counting:
            model.generate([[1, 2, 3], [4, 5]], tokens, temperature=0)
        counts.append(sum(n for name, n in counting.seen.items() if name not in VIEWS))
    return (counts[1] - counts[0]) / 16


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("dtype, most", [("fp32", 34), ("bf16", 38)])
def test_operations_of_a_layer_for_a_decoded_token(dtype, most, adapters):
    two, four = (operations_a_token(n, dtype, adapters) for n in (2, 4))
    assert (four - two) / 2 <= most
    assert 2 * two - four <= 36  # what is done once a token, whatever the depth


# ---------------------------------------------------------------------------------------- the matrix
@pytest.mark.parametrize("dtype, biases, grouped, adapters", MATRIX)
def test_every_dtype_every_shape(dtype, biases, grouped, adapters):
    """The same function that `benchmark.py gpu` calls on a card."""
    check_variant("cpu", dtype, biases, grouped, adapters)


def test_the_matrix_can_fail(monkeypatch):
    with monkeypatch.context() as patch:  # logits as autocast would leave them
        patch.setattr(model_module.Head, "forward", torch.nn.Linear.forward)
        with pytest.raises(AssertionError, match="logits in torch.bfloat16"):
            check_variant("cpu", "bf16", True, True, False)
    rotate = model_module.rotate
    with monkeypatch.context() as patch:  # positions are lost in decoding alone
        patch.setattr(
            model_module, "rotate", lambda x, *how: x if x.shape[2] == 1 else rotate(x, *how)
        )
        with pytest.raises(AssertionError, match="logits are off"):
            check_variant("cpu", "bf16", True, True, False)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_residual_stream_is_fp32_also_over_a_half_precision_base(dtype):
    """Some models' residuals exceed fp16's 65,504."""
    model = small_model(False, True, True)
    model.embed.weight.data *= 1e6
    low_precision_(model, DTYPES[dtype])
    with torch.autocast("cpu", DTYPES[dtype]):
        logits = model(torch.tensor([[1, 2, 3]]))
        tokens, _ = model.generate(PROMPTS, 4, temperature=0)
    assert logits.isfinite().all() and tokens.shape == (3, 4)


# ----------------------------------------------------------------------------------- logits in fp32
@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_in_fp32_wherever_they_are_scored_or_sampled(dtype, chunk, monkeypatch):
    student, teacher, seen = tiny_gpt(0).float(), Teacher(tiny_gpt(1).float()), []

    def objective(student_logits, teacher_logits, tokens):
        seen.extend([student_logits.dtype, teacher_logits.dtype])
        return forward_kl(student_logits, teacher_logits)

    def sample(logits, *args, original=model_module.sample):
        seen.append(logits.dtype)
        return original(logits, *args)

    monkeypatch.setattr(model_module, "sample", sample)
    with torch.autocast("cpu", dtype):
        ids, mask = student.generate(PROMPTS, 4)
        rows = Rows(PROMPTS, PROMPTS, ids, mask, token_weights(mask), teacher, objective)
        cosd_loss(student, rows, chunk)[0].backward()
    assert len(seen) > 4 and set(seen) == {torch.float32}
    assert student.head.weight.grad.dtype == torch.float32


def test_rounded_logits_would_change_the_gradient():
    """Why: near the optimum a divergence is small, and the rounding of two large logits is not."""
    generator = torch.Generator().manual_seed(0)
    teacher = 10 * torch.randn(64, 500, generator=generator)
    student = teacher + 0.05 * torch.randn(64, 500, generator=generator)

    def gradient(dtype):
        logits = student.detach().to(dtype).requires_grad_()
        on_distributions(forward_kl)(logits, teacher.to(dtype), None).sum().backward()
        return logits.grad.double().flatten()

    exact, rounded = gradient(torch.float32), gradient(torch.bfloat16)
    assert ((rounded - exact).norm() / exact.norm()).item() > 0.2


# ------------------------------------------------------------------------------------------- kernels
def test_no_kernel_sees_grouped_heads_and_causal_attention_has_no_mask(monkeypatch):
    """With grouped heads under a mask PyTorch would keep all scores on most cards."""
    calls, original = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **how):
        calls.append((q.shape[1] == k.shape[1], attn_mask is None, how.get("is_causal")))
        return original(q, k, v, attn_mask=attn_mask, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = tiny_gpt()
    model(torch.tensor([[1, 2, 3]]))  # training, scoring
    assert calls == [(True, True, True)] * 2
    calls.clear()
    model.generate(PROMPTS, 3, temperature=0)
    assert calls == [(True, True, True)] * 2 + [(True, False, False)] * 4  # prompt, then two tokens
    calls.clear()
    model(torch.tensor([[1, 2, 3]]), KVCache(model.config, prefix=model.read(COMMON)))
    assert calls == [(True, True, True)] * 2 + [(True, False, False)] * 2
