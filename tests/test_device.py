"""No GPU is needed to show that no line mixes devices, and how often the host waits for one.

A child process registers a device of its own ("fake", PyTorch's PrivateUse1) whose tensors hold their
numbers in a CPU tensor that nobody sees. Operations between the two kinds are refused, as CUDA refuses
them, but for tensors without dimensions, which CUDA takes for numbers. Whatever makes the host read a
number of the device (`tolist`, `item`, `nonzero`, a copy to the CPU) is counted as a wait.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as tree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
HOOK = "_setup_privateuseone_for_python_backend"
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
READS = (aten._local_scalar_dense.default, aten.nonzero.default)
waits = Counter()


class Fake(torch.Tensor):
    """A tensor on the device; `numbers` is where it is computed."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        strides, offset = numbers.stride(), numbers.storage_offset()
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides, offset, dtype=numbers.dtype, device="fake:0"
        )

    def __init__(self, numbers):
        self.numbers = numbers

    def tolist(self):
        waits["tolist"] += 1
        return self.numbers.tolist()

    def __repr__(self, **kwargs):
        return f"Fake({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class WithFactories(TorchDispatchMode):
    """Catches torch.zeros(..., device="fake"), which has no tensor among its arguments."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    leaves = tree.tree_leaves((args, kwargs))
    ours = [x for x in leaves if isinstance(x, Fake)]
    foreign = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Fake)]
    strays = [tuple(x.shape) for x in foreign if x.dim()]
    if ours and strays and operation not in COPIES:
        raise RuntimeError(f"{operation}: a tensor on the device and one on the CPU, {strays}")
    device = kwargs.get("device")
    if device is not None:
        kwargs = kwargs | {"device": "meta" if torch.device(device).type == "meta" else "cpu"}
        lands_here = torch.device(device).type == "fake"
    elif operation == aten.copy_.default:
        lands_here = isinstance(args[0], Fake)
    else:
        lands_here = bool(ours)
    if ours and (operation in READS or not lands_here):
        waits[str(operation)] += 1
    inner_args, inner_kwargs = tree.tree_map_only(Fake, lambda x: x.numbers, (args, kwargs))
    known = {id(x.numbers): x for x in ours}  # in place: the very tensor comes back

    def outside(numbers):
        if id(numbers) in known:
            return known[id(numbers)]
        return Fake(numbers) if lands_here else numbers

    return tree.tree_map_only(torch.Tensor, outside, operation(*inner_args, **inner_kwargs))


# ------------------------------------------------------------------------------- in the child process
def everywhere():
    """The device, for the whole process."""
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    getattr(backend_registration, HOOK)("fake", module)
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # torch.tensor(..., device=...) is copied in our sight
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied in .to()
    save = torch.save

    class Generator(torch.Generator):  # the numbers are drawn where they are computed
        def __new__(cls, device="cpu"):
            return super().__new__(cls)

    torch.Generator = Generator

    def saved(state, path):  # a storage of the device cannot be pickled
        save(tree.tree_map_only(Fake, lambda x: x.numbers, state), path)

    torch.save = saved


def on_both(cfg, folder):
    """A run on the device and the same on the CPU -> what they measured."""
    import train

    measured = []
    for device in ("fake", "cpu"):
        (result,) = train.train(replace(cfg, device=device, out=f"{folder}/{device}"))
        measured.append([result["before"], result["after"], result["curve"]])
    return measured


SMALL = {"steps": 2, "batch": 4, "pretrain_steps": 2, "eval_size": 2, "dtype": "fp32"}
SMALL |= {"method": "cosd", "max_new_tokens": 4}
EVERYTHING = {"micro_batch": 3, "chunk": 5, "checkpointing": True, "eval_every": 2, "anchors": 0.5}
WORLD = [
    {"context": "instructions", "teacher": "live", "divergence": "jsd"},
    {"context": "specification", "teacher": "ema"} | EVERYTHING,
    {"context": "privileged", "lora": 2, "divergence": "reverse_kl", "top_k": 3} | EVERYTHING,
    {"context": "demonstrations", "method": "offline", "steps": 1},
]
OWN = [{}, {"lora": 2, "anchors": 0.5, "teacher": "ema"}]


def in_the_world(folder):
    """Base, four kinds, teachers, LoRA, chunks, micro-batches, checkpointing, evaluation."""
    import train
    from model import GPTConfig

    shape = {"n_layer": 2, "d_model": 32, "n_kv_head": 2, "head_dim": 8, "d_ff": 48}
    train.GPTConfig = partial(GPTConfig, qkv_bias=True, **shape)
    return [on_both(train.Config(**SMALL | case), folder) for case in WORLD]


def own_model(folder):
    """A model from files, stopped and resumed, anchors, export."""
    from conftest import tiny_checkpoint

    import train

    checkpoint = tiny_checkpoint(Path(folder) / "model")
    lines = [json.dumps({"prompt": f"What is {a}?", "answer": str(a)}) for a in range(16)]
    prompts, context = Path(folder, "prompts.jsonl"), Path(folder, "context.txt")
    prompts.write_text("\n".join(lines))
    context.write_text("Answer like a pirate, in rhymes, always.")
    own = {"model": str(checkpoint), "prompts": str(prompts), "context_file": str(context)}
    own |= {"context": "instructions", "anchor_file": str(prompts)}
    measured = []
    for case in OWN:
        cfg = train.Config(**SMALL | own | case, device="fake", out=f"{folder}/fake")
        original = train.task_rows

        def stops(run, step, original=original):
            if step:
                train.save_run(run)
                train.task_rows = original
                raise KeyboardInterrupt
            return original(run, step)

        train.task_rows = stops
        with pytest.raises(KeyboardInterrupt):
            train.train(cfg)
        measured.append(on_both(replace(cfg, resume=True), folder))
        (export,) = Path(folder, "fake").glob("*/export/model.safetensors")
        export.rename(export.with_name("seen"))
    return measured


def count_waits(folder):
    """How often the host waits: for a decoded token; in a step, by its micro-batches."""
    import train
    from model import GPT, GPTConfig, KVCache

    small = GPTConfig(100, n_layer=1, d_model=16, n_head=2, n_kv_head=1, head_dim=8, d_ff=16)
    model = GPT(small).to("fake")
    waits.clear()
    model.generate([[1, 2, 3], [4]], 64, eos={1000})
    per_token = sum(waits.values()) / 64
    ids, cache = torch.tensor([[1, 2, 3, 4]], device="fake"), KVCache(small, 2)
    with torch.no_grad():
        model(ids[:, :2], cache), model(ids[:, 2:], cache)  # continued by hand

    shape = {"n_layer": 1, "d_model": 16, "n_head": 2, "n_kv_head": 1, "head_dim": 8, "d_ff": 16}
    train.GPTConfig = partial(GPTConfig, **shape)
    per_step, original, log_row = {}, train.task_rows, train.log_row

    def counted(run, step):
        waits.clear()
        return original(run, step)

    def stops_counting(*args):
        per_step[str(micro_batch)] = dict(waits)
        return log_row(*args)

    train.task_rows, train.log_row = counted, stops_counting
    for micro_batch in (0, 2):
        case = {"context": "specification", "micro_batch": micro_batch, "batch": 6}
        train.train(train.Config(**SMALL | case, device="fake", out=f"{folder}/{micro_batch}"))
    return per_token, per_step


def mixing(folder):
    try:
        return (torch.ones(2, device="fake") + torch.ones(2)).tolist()
    except RuntimeError as error:
        return str(error)


def child(what, folder):
    """This file as a separate program, because registering a device cannot be undone."""
    environment = os.environ | {"TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, what, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------- the tests
needs_the_hook = pytest.mark.skipif(
    not hasattr(backend_registration, HOOK), reason="this torch has no device in Python"
)


def flat(measured):
    numbers = {}
    for path, value in tree.tree_flatten_with_path(measured)[0]:
        numbers[str(path)] = value
    return numbers


@needs_the_hook
@pytest.mark.parametrize("what, count", [("in_the_world", len(WORLD)), ("own_model", len(OWN))])
def test_on_a_device_it_measures_what_it_measures_on_the_cpu(what, count, tmp_path):
    pairs = child(what, tmp_path)
    assert len(pairs) == count
    for device, cpu in pairs:
        theirs, ours = flat(device), flat(cpu)
        assert len(ours) > 8 and ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@needs_the_hook
def test_how_often_the_host_waits(tmp_path):
    per_token, per_step = child("count_waits", tmp_path)
    assert per_token <= 1 / 8
    for micro_batch, parts in (("0", 1), ("2", 3)):
        assert sum(per_step[micro_batch].values()) <= 6 + 2 * parts, per_step


@needs_the_hook
def test_a_stray_tensor_is_refused(tmp_path):
    """The check can fail."""
    assert "a tensor on the device and one on the CPU" in child("mixing", tmp_path)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    everywhere()
    import train

    train.subprocess.run = lambda *args, **kwargs: None  # the report
    with WithFactories():
        print(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
