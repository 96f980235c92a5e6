"""Does a run fit into memory, and how long does it take?

    python notebooks/plan.py --model FOLDER --context instructions --context-file FILE --prompts FILE
    python notebooks/plan.py --card 24 ...          does it fit a card of 24 GB; if not, which flags help
    python notebooks/plan.py --table                known models, four ways to train, and the card each needs

All other flags are those of train.py. The script reads the files, counts tokens, and computes the memory from
shapes alone; on the CPU the estimated peak is within a quarter of the measured one (tests/test_plan.py). Then it
loads the model and makes two steps, whose result is thrown away; it times the second one. With --card the plan is
for another machine: no weights are loaded, no step is made, and --dtype auto is bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import contexts
import train
from contexts import BadInput, Task, reading, seeded, student_prompt, teacher_prompt
from cosd import cosd_loss
from model import GPT, GPTConfig, read_config, resolve_device
from train import METHODS, Config, comparison, parse, spelled

PARTS = (
    "weights teacher base gradients optimizer activations logits scoring casts generation".split()
)
SPARE = 1.0  # GB for the program itself (CUDA's kernels, fragments); a tenth of the peak is added
# Flags to change if it does not fit, harmless ones first: up to micro_batch the result is the same.
ADVICE = [
    {"chunk": 32},
    {"checkpointing": True},
    {"micro_batch": 4},
    {"micro_batch": 1},
    {"lora": 16},
    {"batch": 4},
    {"batch": 1},
]


def matrices(c: GPTConfig) -> dict[str, tuple[int, int]]:
    """The matrices of one block, (in, out) each."""
    D, Q, K, F = c.d_model, c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.d_ff
    shapes = {"q": (D, Q), "k": (D, K), "v": (D, K), "out": (Q, D), "up": (D, F), "down": (F, D)}
    return shapes | ({"gate": (D, F)} if c.mlp == "swiglu" else {})


def plan(
    cfg: Config,
    c: GPTConfig,
    dtype: torch.dtype,
    prompt: int,
    teacher_prompt: int,
    common: int = 0,
    shared: int = 0,
) -> dict[str, float]:
    """The memory of a step in bytes, by part, and its peak. `cfg` is resolved; `dtype` is autocast's.

    `prompt`, `teacher_prompt`: lengths of the longest prompts in tokens, without the beginning that
    is read once for all rows: `common` tokens of the student's, `shared` of the teacher's.

    Activations are what autograd keeps of the student's pass. The peak is the sum of weights, teacher,
    moments and either the activations with the teacher's pass or the logits (when the backward pass
    starts), or the gradients (when it ends)."""
    D, E, H, K, F = c.d_model, c.head_dim, c.n_head, c.n_kv_head, c.d_ff
    N, V, new = c.n_layer, c.vocab_size, cfg.max_new_tokens
    shapes = matrices(c).values()
    n, in_blocks = c.n_params(), N * sum(a * b for a, b in shapes)
    adapters = cfg.lora * N * sum(a + b for a, b in shapes)
    trained = adapters or n
    low, mixed = dtype.itemsize, dtype != torch.float32
    frozen = low * in_blocks + 4 * (n - in_blocks)  # as low_precision_ leaves it

    largest = max(cfg.batch - cfg.n_anchors, cfg.n_anchors)  # the task's rows, or the anchors
    rows = min(cfg.micro_batch or largest, largest)
    tokens, scored = common + rows * (prompt + new), rows * new
    # One block, in bytes per token: fp32 norms and residuals; the inputs of the matrix products; q,
    # and twice the output of attention; keys and values; the MLP.
    norms, inputs = 4 * 4 * D, low * 2 * D
    attention, mlp = low * 3 * H * E, low * F * (4 if c.mlp == "swiglu" else 2)
    block = tokens * (norms + inputs + attention + mlp)
    if common:  # with gradient, every row has a copy of the common beginning's keys and values
        block += (tokens + rows * (common + prompt + new)) * 2 * K * E * low
    else:  # keys and values are repeated for every query head, so that no kernel keeps scores
        block += tokens * 2 * H * E * low

    # Without gradient only one block's temporaries exist: the scores over all slots, and the MLP.
    def reading_once(rows: int, own: int, before: int) -> int:
        scores = 3 * low * H * (before + own) if before else 0
        return rows * own * (4 * 4 * D + 3 * low * F + scores)

    generating = 2 * cfg.batch  # evaluation answers this many prompts at once
    cache = 2 * low * N * K * E * (shared + generating * (teacher_prompt + new))
    sizes = {
        "weights": (frozen if adapters else 4 * n) + 4 * adapters,
        "teacher": {"frozen": 0, "ema": 4 * n, "live": 0}[cfg.teacher],
        "base": 0 if adapters else frozen,  # it is the frozen teacher; with adapters it is shared
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": N * tokens * 4 * D + block if cfg.checkpointing else N * block,
        "logits": 4 * V * 6 * min(cfg.chunk or scored, scored) + (0 if adapters else 4 * V * D),
        "scoring": reading_once(rows, teacher_prompt + new, shared),
        # autocast's copies of the fp32 weights; the head stays in fp32
        "casts": 0 if adapters else mixed * low * in_blocks,
        # for decoding, adapters are merged into new matrices, unless --checkpointing saves memory
        "generation": cache
        + reading_once(generating, teacher_prompt, shared)
        + (low * in_blocks if adapters and not cfg.checkpointing else 0),
    }
    if METHODS[cfg.method].minimised != "divergence" and not cfg.n_anchors:
        sizes["scoring"] = 0
    fixed = sum(sizes[part] for part in ("weights", "teacher", "base", "optimizer"))
    accumulated = sizes["gradients"] if rows < cfg.batch else 0
    forward = sizes["activations"] + max(sizes["logits"], sizes["scoring"]) + accumulated
    moving = max(forward, sizes["gradients"], sizes["generation"])
    counts = {"parameters": n + adapters, "trained": trained}
    counts["tokens a step"] = common + cfg.batch * (prompt + new)
    return sizes | {"peak": fixed + sizes["casts"] + moving} | counts


def lengths(task: Task) -> dict[str, int]:
    """Of the held-out prompts and 500 training prompts: the longest, and the length of their common beginning."""
    examples = task.heldout + [task.draw(seeded("plan", i)) for i in range(500)]
    examples += [e for suite in task.probes.values() for e in suite]
    students = [student_prompt(task.chat, e) for e in examples]
    teachers = [teacher_prompt(task.chat, e) for e in examples]
    common, shared = len(os.path.commonprefix(students)), len(task.shared)
    return {
        "prompt": max(map(len, students)) - common,
        "teacher_prompt": max(map(len, teachers)) - shared,
        "common": common,
        "shared": shared,
    }


def with_experts(cfg: Config, task: Task) -> Config:
    """If an expert writes, its longest answer counts."""
    if "expert" not in METHODS[cfg.method].writer:
        return cfg
    examples = task.heldout + [task.draw(seeded("plan", i)) for i in range(500)]
    written = max(len(task.chat.target(e.prompt, e.expert)) for e in examples)
    return replace(cfg, max_new_tokens=max(cfg.max_new_tokens, written))


def gigabytes(cfg: Config, c: GPTConfig, dtype: torch.dtype, counted: dict) -> float:
    return plan(cfg, c, dtype, **counted)["peak"] / 1e9


def fits(peak: float, card: float) -> bool:
    return 1.1 * peak + SPARE <= card


def advice(cfg: Config, c: GPTConfig, dtype: torch.dtype, counted: dict, card: float) -> str:
    """The flags that make it fit, added one after the other; those that do not help are left out."""
    peak, said = gigabytes(cfg, c, dtype, counted), {}
    for change in ADVICE:
        ((name, value),) = change.items()
        changed = replace(cfg, **change)
        if name != "checkpointing" and 0 < getattr(cfg, name) <= value:
            continue  # it is already as low
        lower = gigabytes(changed, c, dtype, counted)
        if lower > 0.99 * peak:
            continue
        cfg, peak, said[name] = changed, lower, "" if value is True else f" {value}"
        if fits(peak, card):
            flags = " ".join(spelled(name) + value for name, value in said.items())
            return f"It does not fit {card:g} GB. With {flags} it does: peak {peak:.2f} GB."
    least = f"peak {peak:.2f} GB, plus a tenth and {SPARE:g} GB in reserve"
    return f"It does not fit {card:g} GB with any of the flags ({least}): take a smaller model."


def show(cfg: Config, c: GPTConfig, dtype: torch.dtype, counted: dict, card: float | None) -> str:
    """The plan in words."""
    p = plan(cfg, c, dtype, **counted)
    prompt, in_context = counted["prompt"] + counted["common"], counted["teacher_prompt"]
    sizes = ", ".join(f"{part} {p[part] / 1e9:.2f}" for part in PARTS)
    lines = [
        f"{cfg.method}: {p['parameters'] / 1e6:.1f} M parameters, {p['trained'] / 1e6:.2f} M of them "
        f"trained; {cfg.steps} steps of {cfg.batch} prompts, autocast {str(dtype)[6:]}",
        f"tokens: prompt {prompt} ({counted['common']} common to all, read once), with context "
        f"{in_context + counted['shared']} ({counted['shared']} read once), answer "
        f"{cfg.max_new_tokens}; the student reads at most {p['tokens a step']} per step",
        f"memory, estimated, GB: {sizes}",
        f"peak {p['peak'] / 1e9:.2f} GB, without the program itself",
    ]
    if card and fits(p["peak"] / 1e9, card):
        lines.append(f"It fits {card:g} GB (with a tenth and {SPARE:g} GB in reserve).")
    elif card:
        lines.append(advice(cfg, c, dtype, counted, card))
    return "\n".join(lines)


def one_step(run: train.Run, step: int) -> float:
    """Seconds for a step as in `train.fit`, without logging."""
    began = time.perf_counter()
    with run.autocast():
        parts = [train.task_rows(run, step)]
        if run.cfg.n_anchors:
            parts.append(train.anchor_rows(run, step))
    for rows in parts:
        for micro_batch in rows.split(run.cfg.micro_batch):
            with run.autocast():
                loss, _ = cosd_loss(run.student, micro_batch, run.cfg.chunk)
            run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.teacher.update(run.student)
    loss.item()  # waits until the device has finished
    return time.perf_counter() - began


def duration(cfg: Config, task: Task) -> str:
    """The time of a step and of an answer on this machine, and an estimate for the whole run."""
    with reading(f"--model {cfg.model}"):
        student = GPT.from_pretrained(cfg.model).to(resolve_device(cfg.device, cfg.dtype)[0])
    with tempfile.TemporaryDirectory() as folder:
        run = train.assemble(cfg, task, student, {}, Path(folder))
        _, seconds = one_step(run, 0), one_step(run, 1)  # the first one warms up
        some = [student_prompt(task.chat, e) for e in task.heldout[: 2 * cfg.batch]]
        began = time.perf_counter()
        with run.autocast():
            train.write(run, student, some, 0)
        answer = (time.perf_counter() - began) / len(some)
    # Answers in evaluation: per held-out prompt 5 before the first step and 3 after the last; per probe 2 each time.
    suites = sum(len(suite) for suite in task.probes.values())
    measuring = answer * (8 * len(task.heldout) + 4 * suites)
    whole = cfg.steps * seconds + measuring
    return (
        f"time, measured here: {seconds:.1f} s per step, {clock(cfg.steps * seconds)} for {cfg.steps} steps; evaluation "
        f"before and after about {clock(measuring)}; together about {clock(whole)} for each of --seeds {cfg.seeds}"
    )


def clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def rates(cfg: Config) -> str:
    """Which learning rates to try. SDFT uses 2e-5 (all weights), Thinking Machines 1e-4 (LoRA); the real models of
    this project learned at 5e-5 and 5e-4; a small one did not learn at 1e-5."""
    low, high = (2e-4, 1e-3) if cfg.lora else (2e-5, 1e-4)
    where = "" if low <= cfg.lr <= high else ", which is unusual"
    return f"--lr {cfg.lr:g}{where}: try {low:g} to {high:g}, higher for smaller models"


def solved_before(cfg: Config, task: Task) -> str:
    """How many held-out prompts are solved in the context, where the teacher reads their solutions."""
    if not (cfg.context_file or "").endswith(".jsonl"):
        return ""
    solved = {str(row["prompt"]) for row in contexts.read_prompts(cfg.context_file)}
    count = sum(str(e.prompt) in solved for e in task.heldout)
    if not count:
        return ""
    return f"{count} held-out prompts are solved in {cfg.context_file}: their scores say nothing about new problems"


FAMILIES = {  # layers, width, heads, key heads, head width, MLP, vocabulary, tied, biases
    "SmolLM2-135M": (30, 576, 9, 3, 64, 1536, 49_152, True, False),
    "SmolLM2-360M": (32, 960, 15, 5, 64, 2560, 49_152, True, False),
    "Qwen2.5-0.5B": (24, 896, 14, 2, 64, 4864, 151_936, True, True),
    "Llama-3.2-1B": (16, 2048, 32, 8, 64, 8192, 128_256, True, False),
    "Qwen2.5-1.5B": (28, 1536, 12, 2, 128, 8960, 151_936, True, True),
    "SmolLM2-1.7B": (24, 2048, 32, 32, 64, 8192, 49_152, True, False),
    "Qwen2.5-3B": (36, 2048, 16, 2, 128, 11_008, 151_936, True, True),
    "Llama-3.2-3B": (28, 3072, 24, 8, 128, 8192, 128_256, True, False),
    "Llama-3.1-8B": (32, 4096, 32, 8, 128, 14_336, 128_256, False, False),
}
WAYS = {
    "all weights": {},
    "all, --checkpointing": {"checkpointing": True},
    "--lora 16": {"lora": 16},
    "--lora 16 --checkpointing": {"lora": 16, "checkpointing": True},
}


def table() -> str:
    """8 prompts of 100 tokens (20 in common) with 256 new ones, a context of 200; bf16, chunk 32."""
    rows = ["| model | parameters | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 2) + "|"]
    for name, numbers in FAMILIES.items():
        layers, width, heads, key_heads, head_dim, d_ff, vocabulary, tied, biases = numbers
        shape = GPTConfig(
            vocabulary,
            layers,
            width,
            heads,
            key_heads,
            head_dim,
            d_ff,
            8192,
            tied=tied,
            qkv_bias=biases,
        )
        cells = []
        for way in WAYS.values():
            cfg = Config(batch=8, max_new_tokens=256, chunk=32, **way).resolved("cosd")
            peak = plan(cfg, shape, torch.bfloat16, 80, 80, 20, 220)["peak"] / 1e9
            cards = [card for card in (16, 24, 80) if fits(peak, card)]
            cells.append(f"{peak:.1f} ({cards[0]} GB)" if cards else f"{peak:.1f} (none)")
        rows.append(f"| {name} | {shape.n_params() / 1e9:.2f} B | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--card", type=float, help="the card's memory in GB")
    own.add_argument("--table", action="store_true")
    given, rest = own.parse_known_args(argv)
    if given.table:
        print(table())
        return 0
    try:
        cfg = parse(rest)
        if not cfg.model:
            raise BadInput("--model FOLDER is missing; the built-in world fits anywhere")
        with reading(f"--model {cfg.model}"):
            shape = read_config(cfg.model)
            template_args = json.loads(cfg.chat_template_kwargs)
            chat = contexts.open_chat(cfg.model, shape.vocab_size, **template_args)
        dtype = torch.bfloat16
        if cfg.dtype != "auto" or not given.card:
            dtype = resolve_device(cfg.device, cfg.dtype)[1]
        for each in comparison(cfg):
            task = contexts.file_task(each, chat, shape.max_len)
            print(show(with_experts(each, task), shape, dtype, lengths(task), given.card))
            print(rates(each))
            if solved_before(each, task):
                print(solved_before(each, task))
            if not given.card:
                print(duration(each, task))
        return 0
    except (BadInput, OSError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
