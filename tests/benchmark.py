"""Claims about cost, measured as ratios within one run:

  context   the time of a COSD step with a 1000-token shared context over one with a 10-token context; read once for the
            run, once a step, and by every row
  chunks    peak memory and time of the chunked divergence over the plain one at V = 151,936 and 512 positions
  generate  tokens a second of `GPT.generate` over transformers' `generate`, same weights, dtype and greedy tokens
  step      time, its split, and peak memory of one COSD step on a real model; beside TRL's SDFTTrainer where --trl-python
            has TRL installed
  logits    what rounding logits to bf16 before the divergence does to its gradient, and to learning in the world;
            real-logits: to the gradient on a real model
  merged    how far the policy that writes with adapters folded in is from the one that is scored with them apart
  gpu       all that a card has to show, on random models, with nothing to download: every dtype and shape, the smoke
            preset, resume, tokens a second and a COSD step beside what the card can do, peak memory beside the plan

    python tests/benchmark.py context chunks       (about four minutes on two cores, 8 GB, random models)
    python tests/benchmark.py generate step merged --model out/SmolLM2-135M-Instruct [--threads 1] [--trl-python PYTHON]
    python tests/benchmark.py gpu                  (written to take less than eight minutes; on a CPU it runs in small)

Which model fits which card is an estimate: python notebooks/plan.py --card
"""

# ruff: noqa: E402   (the path is set before the imports)
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # before it is imported
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

from cosd import (
    Rows,
    Teacher,
    chunked_objective,
    completion_states,
    cosd_loss,
    make_objective,
    token_weights,
)
from model import (
    DTYPES,
    GPT,
    GPTConfig,
    KVCache,
    add_adapters,
    low_precision_,
    merged_copy,
    merged_view,
    resolve_device,
    trained,
    without_adapters,
)

V_BIG, POSITIONS, WIDTH = 151_936, 512, 512
NEW = 24  # tokens of a completion, in steps


def take_turns(cases: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each case. The cases take turns, so that a busy moment affects all of them; round 0 is a warm-up."""
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
    """VmRSS (now) or VmHWM (peak) of this process. Linux only; ru_maxrss would include the parent's peak."""
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


# --------------------------------------------------------------------------------------- on a card
MATRIX = list(product(DTYPES, [False, True], [False, True], [False, True]))
NEAR = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}  # how far logits may be from fp32's, relatively
ASK = [[1, 2, 3], [4], [5, 6, 7, 8]]
COMMON = list(range(20))


def small_model(biases: bool, grouped: bool, adapters: bool) -> GPT:
    """A random model whose logits are far from uniform, and whose adapters do something."""
    bias = {"qkv_bias": biases, "out_bias": biases, "mlp_bias": biases}
    shape = {"d_model": 16, "n_head": 4, "n_kv_head": 2 if grouped else 4, "head_dim": 8}
    torch.manual_seed(0)
    model = GPT(GPTConfig(23, n_layer=1, d_ff=20, max_len=64, qk_norm=True, **shape, **bias))
    if adapters:
        add_adapters(model, 2)
    for name, parameter in model.named_parameters():
        if not name.endswith(".A"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def check_variant(device: str, dtype: str, biases: bool, grouped: bool, adapters: bool) -> float:
    """Fails unless logits are within rounding of fp32's, plain, cached, after a shared prefix with
    and without gradient; unless every greedy token is fp32's best or as good within rounding; unless
    the cache is in the dtype asked for; and if any kernel warns. Returns the largest relative error."""
    model, low, worst = small_model(biases, grouped, adapters).to(device), DTYPES[dtype], []
    ids = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
    after = torch.cat([torch.tensor([COMMON, COMMON], device=device), ids], dim=1)
    with torch.no_grad():
        exact, exact_after = model(ids), model(after)[:, len(COMMON) :]
        reference = merged_copy(model)
    if adapters:
        low_precision_(model, low)

    def compare(logits, truth):
        worst.append(((logits - truth).norm() / truth.norm()).item())
        assert logits.dtype == torch.float32, f"logits in {logits.dtype}"
        assert worst[-1] < NEAR[dtype], f"logits are off by {worst[-1]:.4f}"

    def in_pieces(cache):
        return torch.cat([model(part, cache) for part in ids.split([4, 1, 4], dim=1)], dim=1)

    mixed = torch.autocast(ids.device.type, low, enabled=low != torch.float32)
    with warnings.catch_warnings(), mixed:
        warnings.simplefilter("error")  # such as "fused path refused"
        with torch.no_grad():
            prefix = model.read(COMMON)
            compare(model(ids), exact)
            compare(in_pieces(KVCache(model.config, 5)), exact)
            compare(in_pieces(KVCache(model.config, 5, prefix)), exact_after)
        assert prefix.keys[0].dtype == low, f"a cache in {prefix.keys[0].dtype}"
        compare(model(ids, KVCache(model.config, prefix=model.read(COMMON))), exact_after)
        for common in ([], COMMON):
            prompts = [common + prompt for prompt in ASK]
            for captured in (False, True) if ids.is_cuda else (False,):
                tokens, _ = model.generate(prompts, 4, temperature=0, captured=captured)
                agree(reference, prompts, tokens.tolist(), NEAR[dtype])
    return max(worst)


@torch.no_grad()
def agree(reference: GPT, prompts: list, tokens: list, near: float) -> None:
    with torch.autocast(reference.device.type, enabled=False):
        for prompt, row in zip(prompts, tokens):
            ids = torch.tensor([prompt + row], device=reference.device)
            logits = reference(ids)[0, len(prompt) - 1 : -1]  # (N, V)
            chosen = logits.gather(1, torch.tensor(row, device=ids.device)[:, None])[:, 0]
            behind = (logits.amax(1) - chosen).max().item()
            assert behind <= 4 * near * logits.abs().max().item(), f"a token {behind:.3f} behind"


def waiting(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def waited(call, device: str):
    call()
    waiting(device)


def seconds_of(call, device: str, rounds: int = 3) -> float:
    return take_turns({"it": partial(waited, call, device)}, rounds)["it"]


def what_it_can(device: str, big: bool) -> dict[str, float]:
    """Measured: bytes a second read and written by a copy; matrix products, operations a second."""
    n = 2**28 if big else 2**22
    source, target = torch.empty(n, device=device), torch.empty(n, device=device)
    can = {"bandwidth": 2 * 4 * n / seconds_of(partial(target.copy_, source), device)}
    width = 8192 if big else 512
    for name, dtype in DTYPES.items():
        a = torch.randn(width, width, device=device).to(dtype)
        can[name] = 2 * width**3 / seconds_of(lambda a=a: a @ a, device)
    return can


QWEN = {  # the shapes of a 0.5 B Qwen2, and the same in small
    "vocab_size": 151_936,
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SMALL = {"vocab_size": 1000, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 96}


def speed(device: str, dtype: str, can: dict, big: bool) -> None:
    """Decoding compared with the card's bandwidth and with transformers; a COSD step compared with its matrix products."""
    import transformers

    torch.manual_seed(0)
    _, low, autocast = resolve_device(device, dtype)
    count, B = (128, 32) if big else (8, 4)
    shape = transformers.Qwen2Config(**(QWEN if big else QWEN | SMALL))
    with tempfile.TemporaryDirectory() as folder:
        transformers.Qwen2ForCausalLM(shape).save_pretrained(folder)
        student = GPT.from_pretrained(folder).to(device)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=low).to(device)
    config = student.config
    prompts = torch.randint(config.vocab_size, (B, 100)).tolist()
    context = torch.randint(config.vocab_size, (256,)).tolist()
    head = config.vocab_size * config.d_model
    blocks = config.n_params() - head
    floor = (low.itemsize * blocks + 4 * head) / can[
        "bandwidth"
    ]  # each weight is read once a token
    rows = {}
    for captured in (False, True) if device.startswith("cuda") else (False,):

        def decode(captured=captured):
            with autocast():
                student.generate(prompts, count, temperature=1.0, captured=captured)

        rows["recorded" if captured else "eager"] = decode
    ids = torch.tensor(prompts, device=device)
    fixed = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": True, "top_k": 0}
    rows["transformers, weights in half precision"] = lambda: theirs.generate(
        ids, attention_mask=torch.ones_like(ids), **fixed
    )
    seconds = take_turns({name: partial(waited, call, device) for name, call in rows.items()}, 2)
    print(f"\n{dtype}: {B} prompts of 100 x {count} new tokens, {config.n_params() / 1e6:.0f} M")
    print("| decoding | tokens a second | ms a token | over the first | of the bandwidth's floor |")
    print("|---|---|---|---|---|")
    first = next(iter(seconds.values()))
    for name, value in seconds.items():
        each = value / count
        print(
            f"| {name} | {B * count / value:.0f} | {1000 * each:.2f} | {first / value:.2f} | "
            f"{floor / each:.2f} |",
            flush=True,
        )
    del theirs
    teacher = Teacher(student, shared=context)
    low_precision_(teacher.model, low)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    theirs = [context + prompt for prompt in prompts]
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()

    def step():
        with autocast():
            cosd_step(student, teacher, prompts, theirs, optimizer, 32)

    took = seconds_of(step, device, 2)
    tokens = B * (100 + NEW)
    products = 2 * blocks * tokens * 4 + 2 * head * B * NEW * 4  # student there and back, teacher
    share = products / can[dtype] / took
    print(f"a COSD step with a context of 256 tokens: {took:.2f} s, its products alone {share:.0%}")
    if device.startswith("cuda"):
        sys.path.insert(0, str(ROOT / "notebooks"))
        from plan import plan

        from train import Config

        cfg = Config(batch=B, max_new_tokens=NEW, chunk=32).resolved("cosd")
        expected = plan(cfg, config, low, 100, 100, 0, 256)["peak"]
        peak = torch.cuda.max_memory_allocated()
        print(f"peak {peak / 1e9:.2f} GB, planned {expected / 1e9:.2f} GB")


def run_as_users_do(device: str) -> None:
    """The command of the smoke preset; then a run that is stopped and resumed, compared with one that is not."""
    import train

    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            "train.py",
            "--preset",
            "smoke",
            "--device",
            device,
            "--out",
            out,
        ]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(f"\nsmoke preset: exit {done.returncode} in {time.perf_counter() - began:.0f} s")
        if done.returncode:
            print(done.stderr[-2000:])
        train.subprocess.run = lambda *args, **kwargs: None  # the report
        cfg = train.Config(
            context="instructions", method="cosd", steps=6, batch=8, eval_size=4, pretrain_steps=20
        )
        losses = {}
        for name in ("whole", "stopped"):
            original, here = train.task_rows, replace(cfg, device=device, out=f"{out}/{name}")

            def rows(run, step, original=original, name=name):
                if name == "stopped" and step == 3 and run.cfg.method == "cosd":
                    train.save_run(run)
                    train.task_rows = original
                    raise KeyboardInterrupt
                return original(run, step)

            train.task_rows = rows
            try:
                train.train(here)
            except KeyboardInterrupt:
                train.train(replace(here, resume=True))
            train.task_rows = original
            (state,) = Path(here.out).glob("instructions-*/state.pt")
            losses[name] = [row["loss"] for row in torch.load(state, weights_only=True)["log"]]
        apart = max(abs(a - b) for a, b in zip(losses["whole"], losses["stopped"]))
        print(f"resumed and uninterrupted losses differ by at most {apart:.1e}")


def on_a_card(device: str, big: bool | None = None) -> None:
    began = time.perf_counter()
    device = str(resolve_device(device, "fp32")[0])
    big = device.startswith("cuda") if big is None else big
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "the CPU, in small"
    print(f"{name}; torch {torch.__version__}")
    failed = 0
    for variant in MATRIX:
        try:
            check_variant(device, *variant)
        except (AssertionError, RuntimeError, Warning) as error:
            failed += 1
            print("FAILED", variant, str(error).splitlines()[0])
    print(f"{len(MATRIX) - failed} of {len(MATRIX)}: dtypes x biases x grouped heads x adapters")
    run_as_users_do(device)
    can = what_it_can(device, big)
    print(f"\nmeasured: {can['bandwidth'] / 1e9:.0f} GB/s; matrix products, TFLOP/s: ", end="")
    print(", ".join(f"{dtype} {can[dtype] / 1e12:.2f}" for dtype in DTYPES))
    for dtype in ("bf16", "fp16"):
        speed(device, dtype, can, big)
    print(f"\n{time.perf_counter() - began:.0f} s in all; {failed} failed")
    sys.exit(failed > 0)


# ------------------------------------------------------------------------------- rounding the logits
def rounded(objective):
    """The objective on logits that were rounded to bf16, as autocast would round them."""

    def on_rounded(student_logits, teacher_logits, tokens):
        low = student_logits.bfloat16().float()
        return objective(low, teacher_logits.bfloat16().float(), tokens)

    return on_rounded


def logit_ratios(steps: int = 100, seeds: int = 3) -> None:
    """Four kinds in the world, bf16 autocast, paired by seed: the divergence on fp32 and on rounded
    logits. Along training of the first, the gradient of both on the same rows."""
    import contexts
    import train

    train.subprocess.run = lambda *args, **kwargs: None  # the report
    print(f"\nLogits rounded to bf16, or not; bf16 autocast, {steps} steps, seeds 0 to {seeds - 1}")
    print(
        "| kind | seed | score, fp32 | rounded | KL left, fp32 | rounded | gradient off by, start | end |"
    )
    print("|---|---|---|---|---|---|---|---|")
    original = train.make_objective
    for seed in range(seeds):
        for kind in contexts.KINDS:
            numbers = []
            for how in (lambda f: f, rounded):
                off = []

                def objective(*args, how=how, **kwargs):
                    return how(original(*args, **kwargs))

                def rows(run, step, task_rows=train.task_rows, off=off):
                    made = task_rows(run, step)
                    if step in (0, run.cfg.steps - 1) and run.cfg.method == "cosd":
                        off.append(off_by(run.student, made, "forward_kl", run.autocast))
                    return made

                kept = train.task_rows, train.make_objective
                train.task_rows, train.make_objective = rows, objective
                with tempfile.TemporaryDirectory() as out:
                    cfg = train.Config(
                        context=kind, method="cosd", seed=seed, steps=steps, dtype="bf16"
                    )
                    bases = Path(__file__).parent.parent / "out"
                    base, name = train.get_base(replace(cfg, dtype="auto"), bases)
                    task = contexts.world_task(kind, seed, 64)
                    result = train.run_method(
                        replace(cfg, out=out).resolved("cosd"), task, base, name
                    )
                train.task_rows, train.make_objective = kept
                after = result["after"]
                numbers.append((after["task"]["score"], after["kl"], off))
            (score, kl, off), (score_low, kl_low, _) = numbers
            print(
                f"| {kind} | {seed} | {score:.2f} | {score_low:.2f} | {kl:.4f} | {kl_low:.4f} | "
                f"{off[0]:.3f} | {off[-1]:.3f} |",
                flush=True,
            )


def logit_error(folder: str, steps: int = 20, seeds: int = 3) -> None:
    """The same on a real model that learns to talk like a pirate: only the gradient, during training."""
    from contexts import open_chat, read_context

    prompts_of = open_chat(folder, GPT.from_pretrained(folder).config.vocab_size).render
    context = read_context(ROOT / "notebooks/data/pirate.json")
    prompts = [prompts_of(None, question) for question in eight_questions()]
    theirs = [prompts_of(context, question) for question in eight_questions()]
    print(
        f"\n{Path(folder).name}, {steps} steps of 8 prompts x {NEW} tokens: loss, gradient off by"
    )
    print("| seed | objective | loss at the start | off by | at the end | off by |\n|" + "---|" * 6)
    autocast = resolve_device("cpu", "bf16")[2]
    for seed, name in product(range(seeds), ("forward_kl", "reverse_kl")):
        student = GPT.from_pretrained(folder)
        teacher = Teacher(student)
        low_precision_(teacher.model, torch.bfloat16)
        optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, fused=True)
        generator, row = torch.Generator().manual_seed(seed), []
        for step in range(steps + 1):
            with autocast():
                ids, mask = student.generate(prompts, NEW, eos={2}, generator=generator)
                rows = Rows(
                    prompts, theirs, ids, mask, token_weights(mask), teacher, make_objective(name)
                )
                loss, _ = cosd_loss(student, rows)
            if step in (0, steps):
                row += [f"{loss.item():.3f}", f"{off_by(student, rows, name, autocast):.3f}"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"| {seed} | {name} | " + " | ".join(row) + " |", flush=True)


@torch.no_grad()
def merged_ratio(folder: str, rank: int = 16) -> None:
    """A real model, bf16 autocast over a bf16 base, random adapters that change it as much as
    training does: KL, nats per token, of the policy with folded adapters from the one without, beside
    that of the bf16 policy from fp32's, which rounding costs anyway. Teacher-forced on its own tokens."""
    from contexts import open_chat

    chat = open_chat(folder, GPT.from_pretrained(folder).config.vocab_size)
    prompts = [chat.render(None, question) for question in eight_questions()]
    print(
        "\n| adapters' scale | KL(adapted, base) | KL(folded, apart), both bf16 | KL(bf16, fp32) |"
    )
    print("|---|---|---|---|")
    for scale in (0.01, 0.03, 0.1):
        torch.manual_seed(0)
        model = GPT.from_pretrained(folder)
        add_adapters(model, rank)
        for layer in model.blocks.modules():
            if getattr(layer, "B", None) is not None:
                layer.B.normal_(std=scale)
        exact, base = merged_copy(model), without_adapters(model)
        ids, mask = exact.generate(prompts, NEW, generator=torch.Generator().manual_seed(0))

        def log_probs(model, ids=ids, mask=mask):
            states = completion_states(model, prompts, ids, mask)  # (n, D)
            return model.head(states).log_softmax(-1)  # (n, V)

        in_fp32, in_base = log_probs(exact), log_probs(base)
        low_precision_(model, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            apart, folded = log_probs(model), log_probs(merged_view(model))
        pairs = [(in_fp32, in_base), (folded, apart), (apart, in_fp32)]
        kls = [(p.exp() * (p - q)).sum(-1).mean().item() for p, q in pairs]
        print(f"| {scale} | " + " | ".join(f"{kl:.2e}" for kl in kls) + " |", flush=True)


def off_by(student: GPT, rows: Rows, name: str, autocast) -> float:
    """|g(rounded) − g| / |g| of these rows."""
    gradients = []
    for how in (lambda f: f, rounded):
        with autocast():
            loss, _ = cosd_loss(student, replace(rows, objective=how(make_objective(name))))
        parts = torch.autograd.grad(loss, list(trained(student).values()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    exact, low = gradients
    return ((low - exact).norm() / exact.norm()).item()


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
    """Every case in its own process, one after the other."""
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
        "logits": logit_ratios,
        "real-logits": lambda: logit_error(model),
        "merged": lambda: merged_ratio(model),
        "gpu": lambda: on_a_card("auto" if options.device == "cpu" else options.device),
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
