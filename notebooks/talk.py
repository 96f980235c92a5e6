"""Ask a tuned model questions, and compare with its base, with and without the context.

    python notebooks/talk.py out/RUN/export                    type your questions; Ctrl-D ends
    python notebooks/talk.py out/RUN/export --show             colour every token by its KL to the teacher
    python notebooks/talk.py out/RUN/export --ask "Who was Newton?" --ask "Why is the sea salty?"

The base, the context and the arguments of the chat template are those of the run (out/RUN/identity.json). --base and
--context-file replace them, which makes this work for any checkpoint. Each question is a new conversation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import contexts
from contexts import KINDS, BadInput, Chat, reading, teacher_prompt
from cosd import completion_states, forward_kl
from model import GPT, KVCache, read_config, resolve_device, sample

# Terminal background colours (of 256), from "like the teacher" to "a very different distribution".
COLORS = {
    0.05: "",
    0.2: "\033[48;5;230m",
    0.5: "\033[48;5;223m",
    1.0: "\033[48;5;216m",
    2.0: "\033[48;5;209m",
}
WORST, PLAIN, BOLD = "\033[48;5;203m", "\033[0m", "\033[1m"


@torch.no_grad()
def stream(
    model: GPT, prompt: list[int], most: int, ends: set, temperature: float, seed: int
) -> Iterator[int]:
    """One answer, token by token."""
    generator = torch.Generator(model.device).manual_seed(seed)
    most = min(most, model.config.max_len - len(prompt))
    cache = KVCache(model.config, most)
    states = model.hidden(torch.tensor([prompt], device=model.device), cache)  # (1, L, D)
    logits = model.head(states[:, -1])  # (1, V)
    for _ in range(most):
        token = sample(logits, temperature, None, None, generator)  # (1,)
        yield token.item()
        if token.item() in ends:
            return
        logits = model.step(token, cache)


def say(chat: Chat, tokens: Iterator[int]) -> list[int]:
    """Print an answer as it is generated; Ctrl-C ends it. A character may take several tokens."""
    y, shown = [], ""
    try:
        for token in tokens:
            y.append(token)
            text = chat.decode([t for t in y if t not in chat.ends])
            if not text.endswith("\ufffd"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
    except KeyboardInterrupt:
        pass
    print("" if y and y[-1] in chat.ends else " …")
    return y


@torch.no_grad()
def divergences(
    student: GPT, prompt: list[int], teacher: GPT, in_context: list[int], y: list[int]
) -> list[float]:
    """KL(teacher‖student) at every token of y, in nats: the student reads `prompt`, the teacher `in_context`."""
    ids = torch.tensor([y])
    mask = torch.ones_like(ids, dtype=torch.bool)
    logits = [
        model.head(completion_states(model, [start], ids, mask))  # (n, V)
        for model, start in ((student, prompt), (teacher, in_context))
    ]
    return forward_kl(*logits).tolist()


def colored(chat: Chat, y: list[int], kl: list[float], plain: bool) -> str:
    """The answer again, each token coloured by its KL or, without colours, followed by the number."""
    said = ""
    for token, nats in zip(y, kl):
        text = chat.decode([token])
        if plain:
            said += f"{text}[{nats:.2f}]"
            continue
        color = next((color for most, color in COLORS.items() if nats < most), WORST)
        said += f"{color}{text}{PLAIN}" if color else text
    return said


def key() -> str:
    cells = [f"{color}< {most:g}{PLAIN}" for most, color in COLORS.items()]
    return "  ".join([*cells, f"{WORST}more{PLAIN}"]) + "   nats, KL(base with context‖this model)"


class Talk:
    """The three speakers: the tuned model, the base, and the base with the context in its prompt."""

    def __init__(self, options: argparse.Namespace):
        identity = Path(options.model).parent / "identity.json"
        ran = {}
        if identity.exists():
            with reading(identity):
                ran = json.loads(identity.read_text(encoding="utf-8"))
        base = options.base or ran.get("model")
        context_file = options.context_file or ran.get("context_file")
        args = options.chat_template_kwargs or ran.get("chat_template_kwargs", "{}")
        self.kind, self.template = ran.get("context", "instructions"), ran.get("template")
        device = resolve_device(options.device, "fp32")[0]
        with reading(options.model):
            self.tuned = GPT.from_pretrained(options.model).to(device).requires_grad_(False)
        if base is None:
            raise BadInput(f"{options.model} is not the export of a run: give its --base")
        with reading(base):
            self.base = GPT.from_pretrained(base).to(device).requires_grad_(False)
            self.chat = contexts.open_chat(base, read_config(base).vocab_size, **json.loads(args))
        self.context = contexts.read_context(context_file) if context_file else None
        if self.context is None:
            print("No single context applies to all questions, so the base answers without one.")
        self.options = options

    def in_context(self, question: str) -> list[int]:
        """What the teacher reads: C in the template of its kind, then the question."""
        template = contexts.read_text(self.template) if self.template else KINDS[self.kind].template
        template = "" if "{prompt}" in template else template
        example = contexts.file_example(self.kind, self.context, template, {"prompt": question})
        return teacher_prompt(self.chat, example)

    def speakers(self, question: str) -> Iterator[tuple[str, GPT, list[int]]]:
        prompt = self.chat.render(None, question)
        yield "tuned", self.tuned, prompt
        yield "base", self.base, prompt
        if self.context is not None:
            yield "base with context", self.base, self.in_context(question)

    def answer(self, question: str) -> None:
        how = self.options
        bold, plain = (BOLD, PLAIN) if colors() else ("", "")
        for name, model, prompt in self.speakers(question):
            print(f"{bold}{name}{plain} ({len(prompt)} tokens read): ", end="", flush=True)
            y = say(
                self.chat,
                stream(
                    model, prompt, how.max_new_tokens, self.chat.ends, how.temperature, how.seed
                ),
            )
            if how.show and y and self.context is not None and name != "base with context":
                kl = divergences(model, prompt, self.base, self.in_context(question), y)
                print(f"    {colored(self.chat, y, kl, not colors())}")
                print(f"    mean {sum(kl) / len(kl):.3f} nats per token")
        print()


def colors() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def questions(asked: list[str]) -> Iterator[str]:
    """Those of --ask, or the lines that are typed or piped in."""
    if asked:
        yield from asked
        return
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line.strip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="the folder of a tuned model")
    parser.add_argument("--base", help="the model before training [the run's]")
    parser.add_argument(
        "--context-file", help="C: .txt, .md, .json or .jsonl, as for train.py [the run's]"
    )
    parser.add_argument("--chat-template-kwargs", help="JSON, as for train.py [the run's]")
    parser.add_argument(
        "--ask", action="append", default=[], help="a question, instead of typing it"
    )
    parser.add_argument(
        "--show", action="store_true", help="colour every token by its KL to the teacher"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    try:
        talk = Talk(options)
        if options.show and colors():
            print(key())
        for question in questions(options.ask):
            if options.ask or not sys.stdin.isatty():
                print(f"> {question}")
            talk.answer(question)
        return 0
    except (BadInput, OSError) as error:
        print(f"talk.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
