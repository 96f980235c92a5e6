"""Claims about cost, measured as ratios within one run:

  context   the time of a COSD step with a 1000-token shared context over one with a 10-token context; read once for the
            run, once a step, and by every row
  chunks    peak memory and time of the chunked divergence over the plain one at V = 151,936 and 512 positions
  generate  tokens a second of `GPT.generate` over transformers' `generate`, same weights, dtype and greedy tokens
  step      time, its split, and peak memory of one COSD step on a real model; beside TRL's SDFTTrainer where --trl-python
            has TRL installed

    python tests/benchmark.py context chunks       (about four minutes on two cores, 8 GB, random models)
    python tests/benchmark.py generate step --model out/SmolLM2-135M-Instruct [--threads 1] [--trl-python PYTHON]

Which model fits which card is an estimate: python notebooks/plan.py --card
"""

# ruff: noqa: E402   (the path is set before the imports)
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

from cosd import Rows, Teacher, chunked_objective, cosd_loss, make_objective, token_weights
from model import GPT, GPTConfig, add_adapters, low_precision_, resolve_device, trained

V_BIG, POSITIONS, WIDTH = 151_936, 512, 512
NEW = 24  # tokens of a completion, in steps


def take_turns(cases: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each case. They take turns, so that a busy moment hits all alike; round 0 warms up."""
    seconds = {name: [] for name in cases}
    for round_ in range(rounds + 1):
        for name, call in cases.items():
            began = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def cosd_step(student, teacher, prompts, theirs, optimizer, chunk=0, generator=None):
    """One step, as train.py takes it."""
    ids, mask = student.generate(prompts, NEW, generator=generator)
    objective = make_objective("reverse_kl")
    rows = Rows(prompts, theirs, ids, mask, token_weights(mask), teacher, objective)
    loss, _ = cosd_loss(student, rows, chunk)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained(student).values(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# ----------------------------------------------------------------------------------- random models
def context_ratios(device: str, rounds: int) -> None:
    torch.manual_seed(0)
    shape = {"n_layer": 8, "d_model": 512, "n_head": 8, "n_kv_head": 8, "head_dim": 64}
    student = GPT(GPTConfig(8192, d_ff=1536, max_len=2048, **shape)).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    prompts = [torch.randint(8192, (16,)).tolist() for _ in range(16)]
    context = torch.randint(8192, (1000,)).tolist()

    def case(length, shared, forgets=False):
        teacher = Teacher(student, shared=context[: length * shared])
        theirs = [context[:length] + prompt for prompt in prompts]

        def step():
            if forgets:
                teacher.forget()
            cosd_step(student, teacher, prompts, theirs, optimizer)
            if device.startswith("cuda"):
                torch.cuda.synchronize()

        return step

    cases = {
        "10 tokens, read once for the run": case(10, True),
        "1000 tokens, read once for the run": case(1000, True),
        "1000 tokens, read once a step": case(1000, True, forgets=True),
        "1000 tokens, re-read by every row": case(1000, False),
    }
    seconds = take_turns(cases, rounds)
    first = next(iter(seconds.values()))
    print(f"\nOne COSD step of 16 prompts x {NEW} new tokens, 8 layers x 512, {device};")
    print(f"median of {rounds}, relative to the first row ({first:.2f} s)")
    print("| shared context | time |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value / first:.2f} |")


def resident_bytes(what: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process. Linux only; ru_maxrss will not do, it inherits the parent's peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith(what)]
    return int(line.split()[1]) * 1024


def measure_chunk(chunk: int, frozen_head: bool, rounds: int) -> list[float]:
    """In a process of its own: the peak bytes beyond weights, inputs and the gradients themselves; the median seconds;
    the loss."""
    torch.manual_seed(0)
    hidden, theirs = (
        torch.randn(POSITIONS, WIDTH, requires_grad=True),
        torch.randn(POSITIONS, WIDTH),
    )
    # Drawn in place: no peak of its own.
    head, their_head = (torch.empty(V_BIG, WIDTH).normal_(0, 0.05) for _ in range(2))
    head.requires_grad_(not frozen_head)
    tokens = torch.zeros(POSITIONS, dtype=torch.long)
    weights, objective = torch.full((POSITIONS,), 1 / POSITIONS), make_objective("reverse_kl")
    losses = []

    def step():
        hidden.grad = head.grad = None
        if chunk:
            loss, _, _ = chunked_objective(
                hidden, head, theirs, their_head, tokens, objective, weights, chunk
            )
        else:
            loss = (weights * objective(hidden @ head.T, theirs @ their_head.T, tokens)).sum()
        loss.backward()
        losses.append(loss.item())

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident_bytes("VmRSS")
    seconds = take_turns({"step": step}, rounds)["step"]
    gradients = hidden.grad.nbytes + (0 if frozen_head else head.grad.nbytes)
    return [resident_bytes("VmHWM") - before - gradients, seconds, losses[-1]]


def child(command: list, python=sys.executable, **environment: str):
    """One measurement in a process of its own -> what it printed last, read as JSON; or the last line of its error."""
    said = subprocess.run(
        [python, __file__, *map(str, command)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if said.returncode:
        return said.stderr.strip().splitlines()[-1]
    return json.loads(said.stdout.strip().splitlines()[-1])


def chunk_ratios(rounds: int) -> None:
    print(
        f"\nReverse KL, forward and backward, V = {V_BIG:,}, {POSITIONS} positions, width {WIDTH},"
    )
    print("fp32, cpu; relative to the plain version")
    print("| head | chunk | extra peak memory | time |\n|---|---|---|---|")
    for head in ("trained", "frozen"):
        plain = None
        for chunk in (0, 16, 32, 64):
            # For the memory, every tensor gets pages of its own: what is counted is in use, not what malloc keeps back.
            command = ["measure-chunk", chunk, head, "--rounds"]
            memory, _, loss = child([*command, 1], MALLOC_MMAP_THRESHOLD_="65536")
            _, seconds, _ = child([*command, rounds])
            plain = plain or (memory, seconds, loss)
            assert abs(loss / plain[2] - 1) < 1e-4, "the chunked loss differs from the plain one"
            shown = f"{memory / plain[0]:.2f} | {seconds / plain[1]:.2f}"
            if not chunk:
                shown = f"1 ({memory / 2**30:.1f} GiB) | 1 ({seconds:.1f} s)"
            print(f"| {head} | {chunk or 'plain'} | {shown} |", flush=True)


# ------------------------------------------------------------------------------------ a real model
def generate_ratios(folder: str, rounds: int) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    threads, count = torch.get_num_threads(), 48
    print(f"\ngenerate, greedy, 8 prompts x {count} new tokens, {threads} threads: tokens a second")
    print("| dtype | tokens in common | ours | transformers | ratio | rows with the same tokens |")
    print("|---|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    greedy = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    for dtype in (torch.float32, torch.bfloat16):
        mine = GPT.from_pretrained(folder, dtype)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for length in (0, 128, 1000):
            common, own = (
                torch.randint(1000, 20000, (rows, columns), generator=generator)
                for rows, columns in ((1, length), (8, 24))
            )
            ids, tokens = torch.cat([common.expand(8, -1), own], dim=1), {}

            def ours(ids=ids, mine=mine, tokens=tokens):
                tokens["ours"], _ = mine.generate(ids.tolist(), count, temperature=0)

            def reference(ids=ids, theirs=theirs, tokens=tokens):
                whole = theirs.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
                tokens["reference"] = whole[:, ids.shape[1] :]

            seconds = take_turns({"ours": ours, "reference": reference}, rounds)
            speed, hf = 8 * count / seconds["ours"], 8 * count / seconds["reference"]
            same = (tokens["ours"] == tokens["reference"]).all(1).sum().item()
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {name} | {length} | {speed:.0f} | {hf:.0f} | {speed / hf:.2f} | {same} of 8 |",
                flush=True,
            )


def eight_questions() -> list[str]:
    lines = (ROOT / "notebooks/data/questions.jsonl").read_text().splitlines()[:8]
    return [json.loads(line)["prompt"] for line in lines]


def context_text(tokenizer, length: int) -> str:
    words = "the old ship sails over the wide blue sea with a red flag and a loud crew".split()
    text = ""
    while len(tokenizer.encode(text)) < length:
        text += words[len(text) % len(words)] + " "
    return text


def our_step(folder: str, length: int, how: str, rounds: int) -> dict:
    """One COSD step on 8 prompts x 24 new tokens: median seconds, peak bytes, and how the time is split."""
    from transformers import AutoTokenizer

    from contexts import open_chat

    dtype = "bf16" if "bf16" in how else "fp32"
    _, low, autocast = resolve_device("cpu", dtype)
    student = GPT.from_pretrained(folder)
    if "lora" in how:
        add_adapters(student, 16)
        low_precision_(student, low)
    student.checkpointing = "checkpointing" in how
    chat = open_chat(folder, student.config.vocab_size)
    context = context_text(AutoTokenizer.from_pretrained(folder), length)
    prompts = [chat.render(None, question) for question in eight_questions()]
    theirs = [chat.render(context, question) for question in eight_questions()]
    teacher = Teacher(student, shared=theirs[0][:length])
    low_precision_(teacher.model, low)
    optimizer = torch.optim.AdamW(trained(student).values(), lr=1e-6, fused=True)
    split = {"rollout": 0.0, "teacher": 0.0, "optimizer": 0.0}

    def timed(name, function):
        def call(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            split[name] += time.perf_counter() - began
            return result

        return call

    student.generate = timed("rollout", student.generate)
    teacher.states = timed("teacher", teacher.states)
    optimizer.step = timed("optimizer", optimizer.step)
    generator = torch.Generator().manual_seed(0)

    def step():
        with autocast():
            cosd_step(student, teacher, prompts, theirs, optimizer, 32, generator)

    step()  # warms up
    split.update(dict.fromkeys(split, 0.0))
    seconds = take_turns({"step": step}, rounds)["step"]
    split = {name: value / (rounds + 1) for name, value in split.items()}
    split["student"] = seconds - sum(split.values())
    return {"seconds": seconds, "peak": resident_bytes("VmHWM"), "split": split}


def trl_step(folder: str, length: int, how: str, rounds: int) -> dict:
    """The same run as a script for TRL's SDFTTrainer: re-reads the context, projects every position of the completion in
    full."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    context, rows = context_text(tokenizer, length), []
    for question in eight_questions():
        prompt = [{"role": "user", "content": question}]
        rows.append({"prompt": prompt, "privileged_context": context})
    config = SDFTConfig(
        output_dir="out/trl",
        per_device_train_batch_size=8,
        num_generations=1,
        max_steps=rounds + 1,
        max_prompt_length=None,
        max_completion_length=NEW,
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        learning_rate=1e-6,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16="bf16" in how,
        gradient_checkpointing=False,
        disable_tqdm=True,
        generation_kwargs={"min_new_tokens": NEW},
    )
    began, seconds = 0.0, []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            nonlocal began
            began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - began)

    trainer = SDFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows * (rounds + 1)),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    return {"seconds": statistics.median(seconds[1:]), "peak": resident_bytes("VmHWM"), "split": {}}


def step_ratios(folder: str, rounds: int, threads: int, trl_python: str | None) -> None:
    """Each case in a process of its own, one after the other."""
    pythons = {"trl": trl_python, "ours": sys.executable}
    hows = {"trl": ["fp32", "bf16"], "ours": ["fp32", "bf16", "bf16 checkpointing", "bf16 lora"]}
    environment = {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    print(
        f"\nOne step, 8 prompts x {NEW} new tokens, {threads} threads, median of {rounds}; bf16 is"
    )
    print("autocast over fp32 weights, what is frozen (teacher, base of LoRA) kept in bf16")
    print(
        "| who | how | context | s a step | over the first row | peak GB | over the first row | split |"
    )
    print("|---|---|---|---|---|---|---|---|")
    first = None
    for who in pythons if trl_python else ["ours"]:
        for how in hows[who]:
            for length in (125, 1000):
                command = [f"measure-{who}", how, length, "--model", folder, "--rounds", rounds]
                m = child(command, pythons[who], **environment)
                if isinstance(m, str):
                    print(f"| {who} | {how} | {length} | failed: {m} |")
                    continue
                first = first or m
                time_, memory = m["seconds"] / first["seconds"], m["peak"] / first["peak"]
                split = ", ".join(f"{name} {value:.2f}" for name, value in m["split"].items())
                numbers = f"{m['seconds']:.1f} | {time_:.2f} | {m['peak'] / 1e9:.2f} | {memory:.2f}"
                print(f"| {who} | {how} | {length} | {numbers} | {split} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="*", default=["context", "chunks"])
    parser.add_argument("--model", default="out/SmolLM2-135M-Instruct")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--trl-python", help="a Python interpreter that has TRL, for step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    threads, rounds, model = torch.get_num_threads(), options.rounds, options.model
    benchmarks = {
        "context": lambda: context_ratios(options.device, rounds),
        "chunks": lambda: chunk_ratios(rounds),
        "generate": lambda: generate_ratios(model, rounds),
        "step": lambda: step_ratios(model, rounds, threads, options.trl_python),
    }
    first, *rest = options.what
    if first == "measure-chunk":
        print(json.dumps(measure_chunk(int(rest[0]), rest[1] == "frozen", rounds)))
    elif first == "measure-ours":
        print(json.dumps(our_step(model, int(rest[1]), rest[0], rounds)))
    elif first == "measure-trl":
        print(json.dumps(trl_step(model, int(rest[1]), rest[0], rounds)))
    elif unknown := set(options.what) - set(benchmarks):
        parser.error(f"no benchmark {', '.join(unknown)}; choose from {', '.join(benchmarks)}")
    else:
        for name in options.what:
            benchmarks[name]()
