"""Claims about cost, measured as ratios within one run:

  context   the time of a COSD step with a 1000-token shared context over one with a 10-token context; read once for the
            run, once a step, and by every row
  chunks    peak memory and time of the chunked divergence over the plain one at V = 151,936 and 512 positions
  generate  tokens a second of `GPT.generate` over transformers' `generate`, same weights, dtype and greedy tokens (SmolLM2)
  step      time, its split, and peak memory of one COSD step on SmolLM2; beside TRL's SDFTTrainer where --trl-python has TRL installed
  cards     which model fits which card, by the plan's estimate

    python tests/benchmark.py context chunks       (about four minutes on two cores, 8 GB, random models)
    python tests/benchmark.py generate step cards --model out/SmolLM2-135M-Instruct [--threads 1] [--trl-python PYTHON]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import cosd
from cosd import Batch, Teacher, chunked_divergence, cosd_step, reverse_kl
from model import GPT, GPTConfig, add_adapters

V_BIG, POSITIONS, WIDTH = 151_936, 512, 512


def context_ratios(device: str, rounds: int) -> None:
    torch.manual_seed(0)
    student = GPT(GPTConfig(8192, n_layer=8, d_model=512, n_head=8, n_kv_head=8, head_dim=64, d_ff=1536, max_len=2048)).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    prompts = [torch.randint(8192, (16,)).tolist() for _ in range(16)]
    context = torch.randint(8192, (1000,)).tolist()
    cases = {}
    find = cosd.common_beginning                                                     # without it every row reads its whole prompt
    for name, length, kept, finder in [
        ("10 tokens, read once for the run", 10, True, find), ("1000 tokens, read once for the run", 1000, True, find),
        ("1000 tokens, read once a step", 1000, False, find), ("1000 tokens, re-read by every row", 1000, False, lambda prompts: []),
    ]:
        teacher_prompts = [context[:length] + prompt for prompt in prompts]
        cases[name] = Teacher(student, shared=context[:length] if kept else ()), teacher_prompts, finder, []
    for round_ in range(rounds + 1):                                                 # the cases take turns; round 0 warms up
        for teacher, teacher_prompts, cosd.common_beginning, seconds in cases.values():
            began = time.perf_counter()
            cosd_step(student, teacher, Batch(prompts, teacher_prompts), "forward_kl", eos=(), max_new_tokens=24)
            optimizer.step()
            optimizer.zero_grad()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if round_:
                seconds.append(time.perf_counter() - began)
    cosd.common_beginning = find
    base = statistics.median(next(iter(cases.values()))[-1])
    print(f"\nOne COSD step of 16 prompts x 24 new tokens, 8 layers x 512, {device}; median of {rounds}, relative to the first row ({base:.2f} s)")
    print("| shared context | time |\n|---|---|")
    for name, (*_, seconds) in cases.items():
        print(f"| {name} | {statistics.median(seconds) / base:.2f} |")


def resident_bytes(what: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process. Linux only; ru_maxrss will not do, it inherits the parent's peak."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024


def measure_chunk(chunk: int, frozen_head: bool, rounds: int) -> None:
    """In a process of its own: prints the peak bytes beyond weights, inputs and the gradients themselves; the median seconds; the loss."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True), torch.randn(POSITIONS, WIDTH)
    head, teacher_head = (torch.empty(V_BIG, WIDTH).normal_(0, 0.05) for _ in range(2))   # in place: no peak of its own
    head.requires_grad_(not frozen_head)
    Path("/proc/self/clear_refs").write_text("5")                                    # the peak starts from here
    before, seconds = resident_bytes("VmRSS"), []
    for _ in range(rounds):
        hidden.grad = head.grad = None
        began = time.perf_counter()
        if chunk:
            loss, _ = chunked_divergence(hidden, head, teacher_hidden, teacher_head, reverse_kl, chunk=chunk)
        else:
            loss = reverse_kl(hidden @ head.T, teacher_hidden @ teacher_head.T).mean()
        loss.backward()
        seconds.append(time.perf_counter() - began)
    gradients = sum(leaf.grad.nbytes for leaf in (hidden, head) if leaf.requires_grad)
    print(resident_bytes("VmHWM") - before - gradients, statistics.median(seconds), loss.item())


def chunk_ratios(rounds: int) -> None:
    print(f"\nReverse KL, forward and backward, V = {V_BIG:,}, {POSITIONS} positions, width {WIDTH}, fp32, cpu; relative to the plain version")
    print("| head | chunk | extra peak memory | time |\n|---|---|---|---|")
    for frozen in (False, True):
        plain = None
        for chunk in (0, 16, 32, 64):
            def child(rounds: int, **environment: str) -> list[float]:
                command = [sys.executable, __file__, "measure", str(chunk), str(int(frozen)), "--rounds", str(rounds)]
                out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment).stdout
                return list(map(float, out.split()))

            # For the memory, every tensor gets pages of its own: what is counted is what is in use, not what malloc keeps back.
            memory, _, loss = child(1, MALLOC_MMAP_THRESHOLD_="65536")
            _, seconds, _ = child(rounds)
            plain = plain or (memory, seconds, loss)
            assert abs(loss / plain[2] - 1) < 1e-4, "the chunked loss differs from the plain one"
            shown = f"{memory / plain[0]:.2f} | {seconds / plain[1]:.2f}" if chunk else f"1 ({memory / 2**30:.1f} GiB) | 1 ({seconds:.1f} s)"
            print(f"| {'frozen' if frozen else 'trained'} | {chunk or 'plain'} | {shown} |", flush=True)


# ------------------------------------------------------------------------------------------------ a real model
def generate_ratios(folder: str, rounds: int) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    print(f"\ngenerate, greedy, 8 prompts x 48 new tokens, {torch.get_num_threads()} threads: tokens a second")
    print("| dtype | prompts | ours | transformers | ratio | rows with the same tokens |\n|---|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(1000, 20000, shape, generator=generator)
    shared = {"nothing in common": 0, "128 tokens in common": 128, "1000 tokens in common": 1000}
    for dtype in (torch.float32, torch.bfloat16):
        mine, theirs = GPT.from_pretrained(folder, dtype), transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for name, length in shared.items():
            ids = torch.cat([draw(1, length).expand(8, -1), draw(8, 24)], dim=1)
            calls = {
                "ours": lambda: mine.generate(ids.tolist(), 48, temperature=0)[0],
                "theirs": lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, min_new_tokens=48, do_sample=False)[:, ids.shape[1]:],
            }
            tokens, seconds = {}, {name: [] for name in calls}
            for _ in range(rounds):
                for who, call in calls.items():
                    began = time.perf_counter()
                    tokens[who] = call()
                    seconds[who].append(time.perf_counter() - began)
            ours, hf = (8 * 48 / statistics.median(seconds[who]) for who in ("ours", "theirs"))
            same = (tokens["ours"] == tokens["theirs"]).all(1).sum().item()
            print(f"| {str(dtype).removeprefix('torch.')} | {name} | {ours:.0f} | {hf:.0f} | {ours / hf:.2f} | {same} of 8 |", flush=True)


QUESTIONS = [json.loads(line)["prompt"] for line in (Path(__file__).parent.parent / "notebooks/data/questions.jsonl").read_text().splitlines()[:8]]


def context_text(tokenizer, length: int) -> str:
    words, text = "the old ship sails over the wide blue sea with a red flag and a loud crew ".split(), ""
    while len(tokenizer.encode(text)) < length:
        text += words[len(text) % len(words)] + " "
    return text


def our_step(folder: str, length: int, how: str, rounds: int) -> dict:
    """One COSD step on 8 prompts x 24 new tokens, as train.py takes it."""
    from contexts import open_chat
    from transformers import AutoTokenizer

    lora, low, checkpointing = "lora" in how, "bf16" in how, "checkpointing" in how
    student = GPT.from_pretrained(folder, torch.bfloat16 if lora and low else torch.float32)
    if lora:
        add_adapters(student, 16, 32)
    student.checkpointing = checkpointing
    chat, tokenizer = open_chat(folder, student.config.vocab_size), AutoTokenizer.from_pretrained(folder)
    system = {"role": "system", "content": context_text(tokenizer, length)}
    prompts = [chat.render(None, question) for question in QUESTIONS]
    teacher_prompts = [chat.render([system, {"role": "user", "content": question}], question) for question in QUESTIONS]
    teacher = Teacher(student, shared=teacher_prompts[0][:length], dtype=torch.bfloat16 if low else None)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-6, fused=True)
    split = dict.fromkeys(("rollout", "teacher", "student", "optimizer"), 0.0)

    def timed(name, function):
        def call(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                split[name] += time.perf_counter() - began
        return call

    student.generate, teacher.states = timed("rollout", student.generate), timed("teacher", teacher.states)
    seconds = []
    for round_ in range(rounds + 1):
        if round_ == 1:
            split.update(dict.fromkeys(split, 0.0))                                  # round 0 warms up
        began = time.perf_counter()
        cosd_step(student, teacher, Batch(prompts, teacher_prompts), "reverse_kl", eos=(), max_new_tokens=24, chunk=32,
                  generator=torch.Generator().manual_seed(round_), autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=low))
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        timed("optimizer", optimizer.step)()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    split["student"] = sum(seconds[1:]) - sum(split.values())
    return {"seconds": statistics.median(seconds[1:]), "peak": resident_bytes("VmHWM"), "split": {k: v / rounds for k, v in split.items()}}


def trl_step(folder: str, length: int, how: str, rounds: int) -> dict:
    """The same run as a script for TRL's SDFTTrainer: re-reads the context, projects every position of the completion in full."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    rows = [{"prompt": [{"role": "user", "content": question}], "privileged_context": context_text(tokenizer, length)} for question in QUESTIONS] * (rounds + 1)
    config = SDFTConfig(
        output_dir="out/trl", per_device_train_batch_size=8, num_generations=1, max_steps=rounds + 1, max_prompt_length=None, max_completion_length=24,
        distillation_mode="full_logits", distillation_alpha=1.0, learning_rate=1e-6, report_to="none", save_strategy="no", use_cpu=True, bf16="bf16" in how,
        gradient_checkpointing=False, disable_tqdm=True, generation_kwargs={"min_new_tokens": 24})
    began, seconds = 0.0, []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            nonlocal began
            began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - began)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    SDFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()]).train()
    return {"seconds": statistics.median(seconds[1:]), "peak": resident_bytes("VmHWM")}


def step_ratios(folder: str, rounds: int, threads: int, trl_python: str | None) -> None:
    """Each case in a process of its own; they take turns within this one run."""
    cases = [("ours", how, length) for how in ("fp32", "bf16", "bf16 checkpointing", "bf16 lora") for length in (125, 1000)]
    if trl_python:
        cases = [("trl", how, length) for how in ("fp32", "bf16") for length in (125, 1000)] + cases
    print(f"\nOne step, SmolLM2-135M, 8 prompts x 24 new tokens, {threads} threads, median of {rounds}; bf16 is autocast over fp32 weights,"
          "\nthe frozen teacher (under LoRA: the base) in bf16")
    print("| who | how | context | s a step | over the first row | peak GB | over the first row | rollout / teacher / student / optimizer |\n|---|---|---|---|---|---|---|---|")
    first = None
    for who, how, length in cases:
        command = [trl_python if who == "trl" else sys.executable, __file__, f"measure-{who}", how, str(length), "--model", folder, "--rounds", str(rounds)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
        child = subprocess.run(command, capture_output=True, text=True, env=environment)
        if child.returncode:
            print(f"| {who} | {how} | {length} | failed: {child.stderr.strip().splitlines()[-1]} |")
            continue
        m = json.loads(child.stdout.strip().splitlines()[-1])
        first = first or m
        split = " / ".join(f"{v:.2f}" for v in m["split"].values()) if "split" in m else ""
        print(f"| {who} | {how} | {length} | {m['seconds']:.1f} | {m['seconds'] / first['seconds']:.2f} | {m['peak'] / 1e9:.2f} | {m['peak'] / first['peak']:.2f} | {split} |", flush=True)


CARDS = {                                                                            # shapes from the models' published configs
    "SmolLM2-135M": GPTConfig(49152, 30, 576, 9, 3, 64, 1536, 8192),
    "SmolLM2-360M": GPTConfig(49152, 32, 960, 15, 5, 64, 2560, 8192),
    "Qwen2.5-0.5B": GPTConfig(151936, 24, 896, 14, 2, 64, 4864, 32768, qkv_bias=True),
    "Llama-3.2-1B": GPTConfig(128256, 16, 2048, 32, 8, 64, 8192, 131072),
    "SmolLM2-1.7B": GPTConfig(49152, 24, 2048, 32, 32, 64, 8192, 8192),
    "Qwen2.5-1.5B": GPTConfig(151936, 28, 1536, 12, 2, 128, 8960, 32768, qkv_bias=True),
    "Qwen2.5-3B": GPTConfig(151936, 36, 2048, 16, 2, 128, 11008, 32768, qkv_bias=True),
    "Llama-3.2-3B": GPTConfig(128256, 28, 3072, 24, 8, 128, 8192, 131072),
    "Llama-3.1-8B": GPTConfig(128256, 32, 4096, 32, 8, 128, 14336, 131072, tied=False),
}


def cards() -> None:
    from train import Config, plan

    print("\nEstimated peak, GB, and the smallest of 16, 24 and 80 GB cards that holds it with a tenth to spare; 8 prompts of 100 tokens with 256 new ones, "
          "bf16 autocast, chunk 32, frozen teacher in bf16")
    print("| model | parameters | all weights | all, --checkpointing | --lora 16 | --lora 16 --checkpointing |\n|---|---|---|---|---|---|")
    common = dict(model="x", context="instructions", prompts="x", method="cosd", max_new_tokens=256, frozen_dtype="bf16")
    for name, shape in CARDS.items():
        row = []
        for changes in ({}, {"checkpointing": True}, {"lora": 16}, {"lora": 16, "checkpointing": True}):
            peak = plan(Config(**common | changes).for_method("cosd"), shape, torch.bfloat16, 100, 100)["peak"] / 1e9
            card = next((f"{size} GB" for size in (16, 24, 80) if 1.1 * peak <= size), "none")
            row.append(f"{peak:.1f} ({card})")
        print(f"| {name} | {shape.n_params() / 1e9:.2f} B | {' | '.join(row)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("what", nargs="*", default=["context", "chunks"], help="context, chunks (default: both), generate, step, cards")
    parser.add_argument("--model", default="out/SmolLM2-135M-Instruct", help="folder of a checkpoint, for generate and step")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--trl-python", help="a Python interpreter that has TRL, for step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.what[0] == "measure":
        measure_chunk(int(options.what[1]), options.what[2] == "1", options.rounds)
    elif options.what[0] in ("measure-ours", "measure-trl"):
        measure = our_step if options.what[0] == "measure-ours" else trl_step
        print(json.dumps(measure(options.model, int(options.what[2]), options.what[1], options.rounds)))
    else:
        known = ("context", "chunks", "generate", "step", "cards")
        if unknown := set(options.what) - set(known):
            parser.error(f"unknown benchmark: {', '.join(unknown)}; choose from {', '.join(known)}")
        if options.threads:
            torch.set_num_threads(options.threads)
        if "context" in options.what:
            context_ratios(options.device, options.rounds)
        if "chunks" in options.what:
            chunk_ratios(options.rounds)
        if "generate" in options.what:
            generate_ratios(options.model, options.rounds)
        if "step" in options.what:
            step_ratios(options.model, options.rounds, options.threads or torch.get_num_threads(), options.trl_python)
        if "cards" in options.what:
            cards()
