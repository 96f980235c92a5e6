"""Two claims about cost, measured as ratios within one run on a random model:

  context   the time of a COSD step with a 1000-token shared context over one with a 10-token context; read once, and re-read by every row
  chunks    peak memory and time of the chunked divergence over the plain one at V = 151,936 and 512 positions

    python tests/benchmark.py              (both; about four minutes on two cores, 8 GB)
    python tests/benchmark.py context --device cuda
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from cosd import Batch, Teacher, chunked_divergence, cosd_step, reverse_kl
from model import GPT, GPTConfig

V_BIG, POSITIONS, WIDTH = 151_936, 512, 512


def context_ratios(device: str, rounds: int) -> None:
    torch.manual_seed(0)
    student = GPT(GPTConfig(8192, n_layer=8, d_model=512, n_head=8, n_kv_head=8, head_dim=64, d_ff=1536, max_len=2048)).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    prompts = [torch.randint(8192, (16,)).tolist() for _ in range(16)]
    context = torch.randint(8192, (1000,)).tolist()
    cases = {}
    for name, length, read_once in [("10 tokens, read once", 10, True), ("1000 tokens, read once", 1000, True), ("1000 tokens, re-read by every row", 1000, False)]:
        teacher_prompts = [context[:length] + prompt for prompt in prompts]
        cases[name] = Teacher(student, shared=context[:length] if read_once else ()), teacher_prompts, []
    for round_ in range(rounds + 1):                                                 # the cases take turns; round 0 warms up
        for teacher, teacher_prompts, seconds in cases.values():
            began = time.perf_counter()
            cosd_step(student, teacher, Batch(prompts, teacher_prompts), "forward_kl", eos=(), max_new_tokens=24)
            optimizer.step()
            optimizer.zero_grad()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if round_:
                seconds.append(time.perf_counter() - began)
    base = statistics.median(cases["10 tokens, read once"][2])
    print(f"\nOne COSD step of 16 prompts x 24 new tokens, 8 layers x 512, {device}; median of {rounds}, relative to the first row ({base:.2f} s)")
    print("| shared context | time |\n|---|---|")
    for name, (_, _, seconds) in cases.items():
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("what", nargs="*", default=["context", "chunks"], help="context, chunks (default: both)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.what[0] == "measure":
        measure_chunk(int(options.what[1]), options.what[2] == "1", options.rounds)
    else:
        if unknown := set(options.what) - {"context", "chunks"}:
            parser.error(f"unknown benchmark: {', '.join(unknown)}; choose from context, chunks")
        if "context" in options.what:
            context_ratios(options.device, options.rounds)
        if "chunks" in options.what:
            chunk_ratios(options.rounds)
