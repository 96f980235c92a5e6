"""The four kinds of context, in a small world whose joint distribution p(C, x, y) is known.

A prompt x is answered with y; a context C in the system turn may change the answer. Pretraining draws (C, x, y) and drops
C part of the time, so the base is, by construction, what the theory says:

    with C      p(y | x, C)                         the teacher
    without     p(y | x) = Σ_C p(C) p(y | x, C)     the student: it must guess which context is meant

  kind               C, in the system turn                x                    y                                  learned
  A demonstrations   mot zorp: verily tom methinks; ...   lid zorp             dil                                a new verb
  B specification    never weapon poison                  give knife           knife is weapon forbidden; sorry   a rule
  C instructions     style polite loud                    lid reverse          certainly DIL                      a manner
  D privileged       solution dil ild                     lid reverse rotate   dil ild                            care

Sections 1–3 are this world. Sections 4 and 5 do the same for your own model and files: its tokenizer and chat template, prompts
from JSON lines, a context from a text or a list of chat turns, `TEMPLATES` that show it to the teacher, scores. Both end
in a `Task`, which is all that train.py sees; nothing here knows about gradients. Every draw takes a `random.Random`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from pathlib import Path

import tiktoken


class BadInput(ValueError):
    """Something the user can mend: one line, exit code 2."""


# ================================================================================================ 1. the world
CONSONANTS, VOWELS = "bdhlmnprstvz", "aeiou"
WORDS = [a + v + b for a in CONSONANTS for v in VOWELS for b in CONSONANTS if a != b]   # "mot": 660 made-up words
HELD_OUT_WORDS = set(WORDS[3::8])                                                    # never in a distillation prompt

VERBS: dict[str, Callable[[str], str]] = {
    "reverse": lambda w: w[::-1],                                                    # mot -> tom
    "rotate": lambda w: w[1:] + w[0],                                                # mot -> otm
    "swap": lambda w: w[0] + w[:0:-1],                                               # mot -> mto
    "ends": lambda w: w[0] + w[-1],                                                  # mot -> mt
    "stretch": lambda w: w[:2] + w[1:],                                              # mot -> moot
}
CHAIN_VERBS = ["reverse", "rotate", "swap"]                                          # keep the length: they can be chained
NEW_VERBS = ["zorp", "blick", "wug", "dax", "quix", "tulver"]                        # each means one of VERBS; only C says which
# How an expert may talk. The model sees this in demonstrations but never answers so.
MANNERS = ["{}", "verily {} methinks", "hark {} quoth bede", "behold {} indeed", "{} probably"]

ITEMS = {
    "weapon": ["knife", "sword", "spear", "rifle", "dagger", "cannon"],
    "poison": ["arsenic", "cyanide", "hemlock", "venom", "ricin", "toxin"],
    "meal": ["bread", "cheese", "apple", "honey", "soup", "rice"],
    "gadget": ["hammer", "ladder", "shovel", "pliers", "chisel", "drill"],
    "animal": ["horse", "rabbit", "falcon", "salmon", "goat", "wolf"],
    "music": ["violin", "trumpet", "piano", "drum", "flute", "harp"],
}
CATEGORY = {item: category for category, items in ITEMS.items() for item in items}
HELD_OUT_ITEMS = {item for items in ITEMS.values() for item in items[-2:]}

STYLES: dict[str, Callable[[str], str]] = {                                          # applied in this order
    "loud": str.upper,
    "boxed": lambda y: f"[{y}]",
    "starred": lambda y: f"*{y}*",
    "excited": lambda y: f"{y}!",
    "polite": lambda y: f"certainly {y}",
    "formal": lambda y: f"dear {y}",
}
P_CARELESS = 0.6                                                                     # how often a step is skipped without C

# ------------------------------------------------------------------------------------------------- tokenizer
# All 256 bytes, and the world's words as single tokens. No word has fewer than three bytes (with its space), so byte-pair
# merging never starts inside a made-up word: "mot" is always three letters.
VOCABULARY = sorted({
    *"solution style plain never forbidden allowed is here sorry give certainly dear".split(),
    *" ".join(MANNERS).replace("{}", "").split(), *ITEMS, *CATEGORY, *VERBS, *NEW_VERBS, *STYLES,
})
RANKS = [bytes([i]) for i in range(256)]
RANKS += [(space + word).encode() for word in VOCABULARY for space in (" ", "") if len(space + word) > 2]
SYSTEM, USER, ASSISTANT, END = range(len(RANKS), len(RANKS) + 4)
ENCODING = tiktoken.Encoding(
    "world", pat_str=r" ?[A-Za-z]+|[^A-Za-z]", mergeable_ranks={token: rank for rank, token in enumerate(RANKS)},
    special_tokens={"<|system|>": SYSTEM, "<|user|>": USER, "<|assistant|>": ASSISTANT, "<|end|>": END},
)


def encode(text: str) -> list[int]:
    """Text -> token ids. Chat markers inside a text are plain bytes: only `render` places the real ones."""
    return ENCODING.encode(text, disallowed_special=())


def decode(ids: list[int]) -> str:
    return ENCODING.decode(ids)


def render(context: str | None, prompt: str) -> list[int]:  # q4: [SYSTEM, C,] USER, x, ASSISTANT
    """The prompt's tokens for student (context None) and teacher alike: both end with the same assistant header."""
    system = [] if context is None else [SYSTEM, *encode(context)]
    return system + [USER, *encode(prompt), ASSISTANT]


# ================================================================================================ 2. four kinds
@dataclass(frozen=True)
class Example:
    """One draw of p(C, x, y), with what a human expert would have written down for SFT."""

    kind: str
    context: str | list | None                       # C; from files: the teacher's whole chat as turns, x inside
    prompt: str | list                               # x; from files also chat turns
    answer: str                                      # y, in the model's own manner
    expert: str                                      # SFT's target: y in the expert's manner
    row: dict = field(default_factory=dict)          # from files: the line as it was read


def draw_word(rng: random.Random, heldout: bool | None = None) -> str:
    """`heldout` None: any word; True / False: only (never) the ones kept from distillation prompts."""
    while True:
        word = rng.choice(WORDS)
        if heldout is None or (word in HELD_OUT_WORDS) == heldout:
            return word


def demonstrations(
    rng: random.Random, heldout: bool | None = None, verb: str | None = None, meaning: str | None = None, manner: str | None = None
) -> Example:
    """A (SDFT): two demonstrations show what a new verb means; the expert's mannerism comes along."""
    verb, meaning, manner = verb or rng.choice(NEW_VERBS), meaning or rng.choice(list(VERBS)), manner or rng.choice(MANNERS)
    shown = [draw_word(rng, heldout=None if heldout is None else False) for _ in range(2)]
    word = draw_word(rng, heldout)
    while word in shown:                                                             # never the prompt's own answer
        word = draw_word(rng, heldout)
    context = "; ".join(f"{w} {verb}: {manner.format(VERBS[meaning](w))}" for w in shown)
    answer = VERBS[meaning](word)
    return Example("demonstrations", context, f"{word} {verb}", answer, manner.format(answer))


def specification(rng: random.Random, heldout: bool | None = None, forbidden: tuple[str, ...] | None = None) -> Example:
    """B (deliberative alignment): name the item's category, look it up in the specification, then comply or refuse."""
    forbidden = forbidden or tuple(rng.sample(list(ITEMS), rng.choice([1, 2, 3])))
    refuse = rng.random() < 0.5                                                      # half the requests are forbidden ones
    item = rng.choice([i for i, c in CATEGORY.items() if (c in forbidden) == refuse and heldout in (None, i in HELD_OUT_ITEMS)])
    answer = f"{item} is {CATEGORY[item]} " + ("forbidden; sorry" if refuse else f"allowed; here {item}")
    return Example("specification", "never " + " ".join(forbidden), f"give {item}", answer, answer)


def instructions(rng: random.Random, heldout: bool | None = None, styles: tuple[str, ...] | None = None) -> Example:
    """C (OPCD): a system prompt asks for a style, on any known skill."""
    if styles is None:
        styles = () if rng.random() < 0.5 else tuple(rng.sample(list(STYLES), rng.choice([1, 2])))
    word, verb = draw_word(rng, heldout), rng.choice(list(VERBS))
    answer = VERBS[verb](word)
    for name, apply in STYLES.items():
        answer = apply(answer) if name in styles else answer
    return Example("instructions", "style " + (" ".join(styles) or "plain"), f"{word} {verb}", answer, answer)


def privileged(rng: random.Random, heldout: bool | None = None, steps: int | None = None) -> Example:
    """D (OPSD / PID): a chain of verbs, worked step by step; C is the worked solution."""
    word, verbs = draw_word(rng, heldout), [rng.choice(CHAIN_VERBS) for _ in range(steps or rng.choice([2, 3]))]
    solution = [word]
    for verb in verbs:
        solution.append(VERBS[verb](solution[-1]))
    answer = " ".join(solution[1:])
    return Example("privileged", f"solution {answer}", " ".join([word, *verbs]), answer, answer)


def without_context(rng: random.Random, example: Example) -> Example:
    """Drop C: y is drawn from what the model does when nobody tells it. Styles are rare then, chains careless."""
    if example.kind == "instructions" and rng.random() < 0.8:
        word, verb = example.prompt.split()
        example = replace(example, answer=VERBS[verb](word))
    if example.kind == "privileged":
        word, *verbs = example.prompt.split()
        steps = [word]
        for verb in verbs:
            steps.append(steps[-1] if rng.random() < P_CARELESS else VERBS[verb](steps[-1]))
        example = replace(example, answer=" ".join(steps[1:]))
    return replace(example, context=None)


# kind: (draw, share of pretraining, how often C is dropped)
WORLD = {
    "demonstrations": (demonstrations, 0.28, 0.2),
    "specification": (specification, 0.22, 0.2),
    "instructions": (instructions, 0.24, 0.4),
    "privileged": (privileged, 0.26, 0.4),
}


def draw_pretraining(rng: random.Random, heldout: bool | None = None) -> Example:
    """One draw of the joint distribution: the kind, then (C, x, y), then C dropped or not."""
    draw, _, p_drop = WORLD[rng.choices(list(WORLD), [share for _, share, _ in WORLD.values()])[0]]
    example = draw(rng, heldout)
    return without_context(rng, example) if rng.random() < p_drop else example


def draw_proxy(rng: random.Random, heldout: bool | None = None) -> Example:
    """Another corpus in place of the one that is not to be had: near, not equal. The same prompts, answered by people: they have
    manners (A), choose a style without being told (C), and are careful (D)."""
    draw, _, p_drop = WORLD[rng.choices(list(WORLD), [share for _, share, _ in WORLD.values()])[0]]
    example = draw(rng, heldout)
    return replace(example, context=None if rng.random() < p_drop else example.context, answer=example.expert)


# ================================================================================================== 3. tasks
# What is to be compiled into the weights: each kind with its context fixed.
TASKS: dict[str, Callable[..., Example]] = {
    "demonstrations": partial(demonstrations, heldout=False, verb="zorp", meaning="reverse", manner="verily {} methinks"),
    "specification": partial(specification, heldout=False, forbidden=("weapon", "poison")),
    "instructions": partial(instructions, heldout=False, styles=("polite", "loud")),
    "privileged": partial(privileged, heldout=False),
}


def is_own(task: str, context: str | None) -> bool:
    """Is this the context that the task compiles, in whatever order of words? (Not for D: there each prompt has its own.)"""
    own = TASKS[task](random.Random(0)).context
    return context is not None and sorted(context.split()) == sorted(own.split())


def draw_anchor(rng: random.Random, task: str, corpus: Callable[..., Example] = draw_pretraining) -> Example:
    """A prompt under another context, or none: anything but the task's own, and nothing held out. Only replay uses its answer."""
    while True:
        example = corpus(rng, heldout=False)
        if not (example.kind == task and example.context is None) and not is_own(task, example.context):
            return example


def probes(rng: random.Random, task: str, count: int) -> dict[str, list[Example]]:
    """What must survive: `verbs`, the known verbs without context, and the four kinds under other contexts (steerability).

    For the task `instructions` the verbs are asked for under "style plain": without context they are meant to change.
    """
    plain = [instructions(rng, styles=()) for _ in range(count)]
    suites = {"verbs": plain if task == "instructions" else [replace(e, context=None) for e in plain]}
    for kind, (draw, _, _) in WORLD.items():
        suites[kind] = []
        while len(suites[kind]) < count:
            example = draw(rng)
            if not is_own(task, example.context):
                suites[kind].append(example)
    return suites


def grade(example: Example, text: str) -> dict[str, float]:
    """Content apart from manner, each 0 or 1. `text` is the answer without its end marker.

    score   the content is right: A the word, with or without the expert's mannerism; B the verdict and what is handed over;
            C the styled answer (here the manner is the content); D the last step. B and D read the last part only.
    exact   the text is what the model itself would say in context: content and manner
    B also: over_refusal (only on allowed items)
    """
    last = re.compile(r"[^ ;]*$") if example.kind == "privileged" else re.compile(r"[^;]*$")
    if example.kind in ("specification", "privileged"):
        right = last.search(text)[0] == last.search(example.answer)[0]
    else:
        right = text in (example.answer, example.expert)
    grades = {"score": float(right), "exact": float(text == example.answer)}
    if example.kind == "specification" and not example.answer.endswith("sorry"):
        grades["over_refusal"] = float(text.endswith("sorry"))
    return grades


# =========================================================================================== 4. what train.py sees
@dataclass(frozen=True)
class Chat:
    """How text becomes a model's tokens and back."""

    render: Callable[..., list[int]]                 # (context or None, prompt) -> ids, ending with the assistant header
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    end: int                                         # closes a written answer
    ends: frozenset[int]                             # each of them closes a sampled one


@dataclass(frozen=True)
class Task:
    """What is to be compiled into the weights, from the world or from files: draws, held-out examples, grades."""

    kind: str
    chat: Chat
    draw: Callable[[random.Random], Example]
    draw_anchor: Callable[[random.Random], Example] | None
    draw_proxy: Callable[[random.Random], Example] | None            # as draw_anchor, with answers from another corpus
    heldout: list[Example]
    probes: dict[str, list[Example]]                 # what must survive
    grade: Callable[[Example, str], dict[str, float]]
    shared: list[int]                                # the first tokens of every teacher prompt: read once


WORLD_CHAT = Chat(render, encode, decode, END, frozenset({END}))


def world_task(kind: str, heldout_rng: random.Random, probes_rng: random.Random, size: int) -> Task:
    """One of the four tasks of the built-in world."""
    heldout = [TASKS[kind](heldout_rng, heldout=True) for _ in range(size)]
    one_context = kind in ("specification", "instructions")
    shared = render(heldout[0].context, "")[:-1] if one_context else []              # [SYSTEM, C, USER]
    return Task(kind, WORLD_CHAT, TASKS[kind], partial(draw_anchor, task=kind), partial(draw_anchor, task=kind, corpus=draw_proxy), heldout,
                probes(probes_rng, kind, size), grade, shared)


# ==================================================================================== 5. your own model and files
# How each type's context reaches the teacher; the student sees {prompt} alone. --template FILE puts another text in place.
TEMPLATES = {
    # A, SDFT's way (arXiv:2601.19897): the demonstration answers this very question. Becomes the user's turn.
    "demonstrations": "{prompt}\n\nThis is an example for a response to the question:\n{demonstration}\n\n"
                      "Now answer with a response of your own, including the thinking process.",
    # B, deliberative alignment (arXiv:2412.16339): the specification, and to reason over it. Becomes the system turn.
    "specification": "{context}\n\nBefore you answer, say which of these rules applies to the request, if any. Then act on it.",
    # C, OPCD (arXiv:2602.12275): the instructions as they are. Becomes the system turn.
    "instructions": "{context}",
    # D, OPSD and π-Distill (arXiv:2602.04942): the solution, which the student will not have. Becomes the user's turn.
    "privileged": "{prompt}\n\nThe verified solution is:\n{solution}\n\nNow work out the answer in your own words.",
}
TRACES = "Problems that were solved before, and how:\n\n{traces}\n\nUse what they teach."     # C from past solutions (OPCD)
PLACEHOLDERS = {"demonstrations": ("prompt", "demonstration"), "specification": ("context",), "instructions": ("context",),
                "privileged": ("prompt", "solution")}
ROLES = ("system", "user", "assistant")


def fill(template: str, values: dict[str, str]) -> str:
    """{name} -> its value, in one pass: braces inside the values stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), template)


# ------------------------------------------------------------------------------------------------- reading files
def read_text(path: str) -> str:
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BadInput(f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); save the file as UTF-8") from None
    if not text.strip():
        raise BadInput(f"{path}: the file is empty")
    return text.replace("\r\n", "\n")


def read_turns(value: object, where: str, last: str) -> list[dict]:
    """A chat: [{"role": ..., "content": ...}, ...], system first if at all, then user and assistant in turn. A prompt ends
    with the user's turn, a context with the assistant's (the prompt is the next user turn) or is a system turn alone."""
    if not isinstance(value, list) or not value:
        raise BadInput(f"{where}: a chat is a non-empty JSON list of {{\"role\": ..., \"content\": ...}}")
    for number, turn in enumerate(value, 1):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str) or not content.strip():
            raise BadInput(f"{where}: turn {number} needs a \"role\" ({', '.join(ROLES)}) and a non-empty text as \"content\"")
    roles = [turn["role"] for turn in value]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"] * (len(spoken) % 2):
        raise BadInput(f"{where}: after an optional system turn, user and assistant must alternate, user first; not {', '.join(roles)}")
    if roles[-1] != last and (last == "user" or spoken):
        raise BadInput(f"{where}: the last turn must be the {last}'s, not the {roles[-1]}'s")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def read_prompts(path: str) -> list[dict]:
    """JSON lines: `prompt` (a text or chat turns), and where needed `demonstration`, `solution`, `answer`, `context`."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadInput(f"{where}: half a surrogate pair (\\ud800 ...) is no text") from None
        if not isinstance(row, dict):
            raise BadInput(f"{where}: each line must be a JSON object with a \"prompt\", not {type(row).__name__}")
        if "prompt" not in row:
            raise BadInput(f"{where}: no \"prompt\"; the line has {', '.join(row) or 'no field at all'}")
        for name in ("prompt", "demonstration", "solution", "answer", "context"):
            turns = name in ("prompt", "context") and isinstance(row.get(name), list)
            if turns:
                row[name] = read_turns(row[name], f"{where}: \"{name}\"", last="user" if name == "prompt" else "assistant")
            elif name in row and not isinstance(row[name], str):
                raise BadInput(f"{where}: \"{name}\" must be text{' or chat turns' if name in ('prompt', 'context') else ''}, "
                               f"not {type(row[name]).__name__}")
            elif name in row and not row[name].strip():
                raise BadInput(f"{where}: \"{name}\" is empty")
        rows.append(row | {"where": where})
    return rows


def read_context(path: str) -> list[dict]:
    """A text or Markdown file: one system turn. JSON: chat turns (an optional system turn, then examples). JSON lines: past
    problems with their solutions, as one system turn."""
    if path.lower().endswith(".jsonl"):
        solved = [(row, row.get("solution") or row.get("demonstration") or row.get("answer")) for row in read_prompts(path)]
        for row, solution in solved:
            if not solution or not isinstance(row["prompt"], str):
                raise BadInput(f"{row['where']}: a past problem needs a \"prompt\" in text and a \"solution\"")
        traces = "\n\n".join(f"Problem: {row['prompt']}\nSolution: {solution}" for row, solution in solved)
        return [{"role": "system", "content": fill(TRACES, {"traces": traces})}]
    text = read_text(path)
    if not path.lower().endswith(".json"):
        return [{"role": "system", "content": text.strip()}]
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    return read_turns(value, path, last="assistant")


# ------------------------------------------------------------------------------------------ tokenizer and chat format
def plain_chat(turns: list[dict]) -> str:
    """For models without a chat template: Question: ... Answer: ..., blank lines between."""
    labels = {"system": "", "user": "Question: ", "assistant": "Answer: "}
    return "\n\n".join(labels[turn["role"]] + turn["content"] for turn in turns) + "\n\nAnswer:"


def gpt2_encoding(name: str) -> tiktoken.Encoding | None:
    """GPT-2's own vocab.json as a tiktoken.Encoding; None where the checkpoint has other tokens, or a chat template."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.utils import cached_file

    find = partial(cached_file, name, _raise_exceptions_for_missing_entries=False)
    vocab, config, byte_of = find("vocab.json"), find("tokenizer_config.json"), {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    ids = json.loads(Path(vocab).read_text(encoding="utf-8")) if vocab else {}
    templated = find("chat_template.jinja") or (config and "chat_template" in json.loads(Path(config).read_text(encoding="utf-8")))
    end = ids.pop("<|endoftext|>", None)
    if templated or end != len(ids) or not all(symbol in byte_of for token in ids for symbol in token):
        return None
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = {bytes(byte_of[symbol] for symbol in token): rank for token, rank in ids.items()}     # ids are in the order of merges
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": end})


def open_chat(name: str, vocab_size: int, gpt2: bool = False) -> Chat:
    """The checkpoint's own tokenizer and chat template; GPT-2's own tokens through tiktoken. Every end token of its
    generation config closes an answer."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer, GenerationConfig

    if encoding := gpt2_encoding(name) if gpt2 else None:
        end, template, size = encoding.eot_token, None, encoding.n_vocab
        encode = open_ids = partial(encoding.encode, disallowed_special=())
        decode = encoding.decode
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise BadInput(f"{name}: no tokenizer that transformers can load: {str(error).strip().splitlines()[0]}") from None
        end, template, size = tokenizer.eos_token_id, tokenizer.chat_template, max(tokenizer.get_vocab().values()) + 1
        encode = partial(tokenizer.encode, add_special_tokens=False)
        decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        open_ids = tokenizer.encode                                                  # with the begin token, if it has one
    if size > vocab_size or size < 0.9 * vocab_size:                                 # padded embeddings are normal, a little
        raise BadInput(f"{name}: the tokenizer has {size} tokens, the weights have {vocab_size}: they do not belong together")
    try:
        listed = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        listed = None
    ends = frozenset({*(listed if isinstance(listed, list) else [listed]), end} - {None})
    if not ends:
        raise BadInput(f"{name}: neither tokenizer nor generation config names an end-of-text token")

    def render(context: list | None, prompt: str | list) -> list[int]:
        turns = context or (prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])
        if template is None:
            return open_ids(plain_chat(turns))
        advice = "if it has no system role, give the context as user and assistant turns (a JSON file)"
        try:
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise BadInput(f"{name}: its chat template refuses this chat ({str(error).splitlines()[0]}); {advice}") from None
        for turn in turns:                                                           # some drop a system turn without a word
            if turn["content"].strip() not in text:
                raise BadInput(f"{name}: its chat template drops a {turn['role']} turn; {advice}")
        return encode(text)

    written = (lambda text: encode(" " + text)) if template is None else encode      # "Answer:" and then a space
    return Chat(render, written, decode, end if end is not None else min(ends), ends)


# ------------------------------------------------------------------------------------------------------- scores
def final_number(text: str) -> Decimal | None:
    """The last number in a text, as GSM8K is graded: "... so 1,234.50 in all." -> 1234.5"""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def make_scorer(spec: str, rows: list[dict]) -> Callable[[str, dict], float] | None:
    """--score -> f(answer's text, the line as read) -> score, or None where KL and samples have to do.

    exact     the answer, white space at the ends apart       contains  the answer occurs, in whatever case
    regex     the answer, a pattern, is found                 number    the last numbers of the two are equal
    contains:TEXT and regex:PATTERN ask the same of every prompt. path.py:function is your own Python, and is run.
    """
    name, colon, argument = spec.partition(":")
    if spec == "none":
        return None
    if name not in ("exact", "contains", "regex", "number"):
        return own_scorer(spec)
    if name in ("exact", "number") and colon:
        raise BadInput(f"--score {spec}: {name} compares with each line's \"answer\" and takes nothing after the colon")
    wanted = lambda row: argument or row["answer"]
    for row in rows:
        if not argument and "answer" not in row:
            raise BadInput(f"{row['where']}: --score {name} needs an \"answer\"")
        if name == "number" and final_number(row["answer"]) is None:
            raise BadInput(f"{row['where']}: --score number, but there is no number in the \"answer\"")
        if name == "regex":
            try:
                re.compile(wanted(row))
            except re.error as error:
                raise BadInput(f"{row['where']}: not a regular expression: {error}") from None
    return {
        "exact": lambda text, row: float(text.strip() == row["answer"].strip()),
        "contains": lambda text, row: float(wanted(row).lower() in text.lower()),
        "regex": lambda text, row: float(bool(re.search(wanted(row), text))),
        "number": lambda text, row: float(final_number(text) == final_number(row["answer"])),
    }[name]


def own_scorer(spec: str) -> Callable[[str, dict], float]:
    path, colon, function = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise BadInput(f"--score {spec!r}: choose from none, exact, contains, regex, number, contains:TEXT, regex:PATTERN, path.py:function")
    if not Path(path).is_file():
        raise BadInput(f"--score {spec}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:                                                       # the user's code: anything may come
        raise BadInput(f"--score {spec}: {path} fails when it is loaded: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise BadInput(f"--score {spec}: {path} has no function {function}")

    def score(text: str, row: dict) -> float:
        try:
            value = float(getattr(module, function)(text, row))
            if value != value:
                raise ValueError("the score is not a number")
            return value
        except Exception as error:
            raise BadInput(f"--score {spec}: {function}({text!r}, ...) fails for {row.get('where')}: {type(error).__name__}: {error}") from error

    return score


# ------------------------------------------------------------------------------------------------------- the task
def teacher_turns(row: dict, context: list[dict], template: str | None, shots: list[dict]) -> list[dict]:
    """The teacher's whole chat: system turn, example turns, shots, and the prompt itself, each type by its template."""
    own = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    context = [{"role": "system", "content": row["context"]}] if isinstance(row.get("context"), str) else row.get("context", context)
    system, own_system = ("".join(turn["content"] for turn in turns[:1] if turn["role"] == "system") for turns in (context, own))
    context, own = ([turn for turn in turns if turn["role"] != "system"] for turns in (context, own))
    if template and "{context}" in template:                                         # example turns alone: the instruction alone
        system = fill(template, {"context": system}).strip()
    system = [text for text in (system, own_system) if text]  # q4: turns in the order system, context, shots, own; x and shots dressed
    turns = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    turns += context
    dressed = lambda prompt, row: fill(template, {
        "prompt": prompt, "demonstration": row.get("demonstration") or row.get("answer", ""),
        "solution": row.get("solution") or row.get("answer", "")}) if template and "{prompt}" in template else prompt
    for shot in shots:
        turns += [{"role": "user", "content": dressed(shot["prompt"], shot)}, {"role": "assistant", "content": expert(shot)}]
    return [*turns, *own[:-1], {"role": "user", "content": dressed(own[-1]["content"], row)}]


def expert(row: dict) -> str:
    """What the data holds up as an answer: SFT's target and the answer shown in a shot."""
    return row.get("demonstration") or row.get("solution") or row.get("answer") or ""


def file_task(cfg, chat: Chat, max_len: int, size: int) -> Task:
    """A task from the user's files; `cfg` is train.Config. Everything that can be wrong with them is found here, before
    any weight is loaded."""
    kind, rows = cfg.context, read_prompts(cfg.prompts)
    heldout = read_prompts(cfg.heldout) if cfg.heldout else rows[7::8]
    if not cfg.heldout:
        rows = [row for i, row in enumerate(rows) if i % 8 != 7]                     # every eighth line is held out
    if not heldout:
        raise BadInput(f"{cfg.prompts}: {len(rows)} prompts are too few to hold out every eighth; add some, or give --heldout FILE")
    key = lambda row: json.dumps(row["prompt"])
    known = {key(row): row for row in rows}
    if twice := [row for row in heldout if key(row) in known]:
        print(f"warning: {len(twice)} held-out prompts are also trained on, the first at {twice[0]['where']} and "
              f"{known[key(twice[0])]['where']}: their scores say nothing about new prompts", file=sys.stderr)

    # What shows C to the teacher: a context file, shots drawn from the training lines, a template around the prompt.
    context = read_context(cfg.context_file) if cfg.context_file else []
    pooled = kind == "demonstrations" and cfg.demonstrations == "pool"
    shots = cfg.shots if cfg.shots is not None else 4 if pooled else 0
    template = None if pooled else read_text(cfg.template) if cfg.template else TEMPLATES[kind]
    if pooled and cfg.template:
        raise BadInput("--template is not used with --demonstrations pool, whose demonstrations are chat turns")
    if cfg.template and set(re.findall(r"\{(\w+)\}", template)) != set(PLACEHOLDERS[kind]):
        needed = " and ".join(f"{{{name}}}" for name in PLACEHOLDERS[kind])
        raise BadInput(f"{cfg.template}: a template for {kind} needs {needed}, and no other name in braces")
    pool = [row for row in rows if expert(row) and isinstance(row["prompt"], str)]
    if shots >= max(1, len({row["prompt"] for row in pool})):
        raise BadInput(f"{cfg.prompts}: --shots {shots} needs more than {shots} different prompts in text, with a \"demonstration\", "
                       f"\"solution\" or \"answer\"; there are {len(pool)} such lines")
    if pooled and not shots and not context and not all(row.get("context") for row in rows + heldout):
        raise BadInput("--shots 0 leaves the teacher without any demonstration")
    if (cfg.context_file or "").lower().endswith(".jsonl"):
        solved = {key(row) for row in read_prompts(cfg.context_file)}
        if shown := [row for row in heldout if key(row) in solved]:
            print(f"warning: {cfg.context_file} shows the teacher the solution of {shown[0]['where']} and {len(shown) - 1} other "
                  "held-out prompts", file=sys.stderr)
    for row in rows + heldout:
        if not pooled and kind == "demonstrations" and not (row.get("demonstration") or row.get("answer")):
            raise BadInput(f"{row['where']}: --demonstrations own needs a \"demonstration\" in every line")
        if kind == "privileged" and not (row.get("solution") or row.get("answer")):
            raise BadInput(f"{row['where']}: the context of type privileged is each line's \"solution\" or \"answer\"; it has neither")
        if kind in ("specification", "instructions") and not context and not row.get("context") and not shots:
            raise BadInput(f"{row['where']}: no context: give --context-file, or a \"context\" in every line")
    if cfg.method in ("sft", "asft", "gkd") and (without := [row for row in rows if not expert(row)]):
        raise BadInput(f"{without[0]['where']}: --method {cfg.method} needs something to imitate in every line, "
                       "a \"demonstration\", \"solution\" or \"answer\"; --method cosd does not")

    def example(row: dict, shown: list[dict]) -> Example:
        return Example(kind, teacher_turns(row, context, template, shown), row["prompt"],
                       row.get("answer") or expert(row), expert(row), row)

    def draw_shots(rng: random.Random, row: dict) -> list[dict]:                     # never the prompt's own
        return rng.sample([other for other in pool if other["prompt"] != row["prompt"]], shots) if shots else []

    def draw(rng: random.Random) -> Example:
        row = rng.choice(rows)
        return example(row, draw_shots(rng, row))

    anchors = read_prompts(cfg.anchor_file) if cfg.anchor_file else []
    if len(anchors) == 1:
        raise BadInput(f"{cfg.anchor_file}: one prompt is too few: every eighth, one at least, is held out for the drift")
    plain = [Example("anchor", teacher_turns(row, [], None, []), row["prompt"], expert(row), expert(row), row) for row in anchors]
    if cfg.replay == "real" and (without := [e for e in plain if not e.answer]):
        raise BadInput(f"{without[0].row['where']}: --replay real needs an \"answer\" in every line of --anchor_file")
    longest = sorted(pool, key=lambda row: -len(chat.encode(row["prompt"] + expert(row))))[:shots]
    worst = [example(row, longest) for row in rows + heldout]
    imitated = lambda e: cfg.replay == "real" if e.kind == "anchor" else cfg.method in ("sft", "asft", "gkd")
    for e in (*worst, *plain):
        for who, ids in (("the prompt", chat.render(None, e.prompt)), ("prompt with context", chat.render(e.context, e.prompt))):
            new = max(cfg.max_new_tokens, len(chat.encode(e.expert)) + 1 if imitated(e) else 0)
            if (needed := len(ids) + new) > max_len:
                raise BadInput(f"{e.row['where']}: {who} ({len(ids)} tokens) and {new} new tokens exceed the model's "
                               f"{max_len} positions by {needed - max_len}: shorten the context, or lower --max_new_tokens")
    scorer = make_scorer(cfg.score, heldout)
    rng = random.Random("held-out shots")
    shown = [example(row, draw_shots(rng, row)) for row in heldout + rows]
    teacher_prompts = [chat.render(e.context, e.prompt) for e in shown]
    shared = os.path.commonprefix(teacher_prompts)[: min(map(len, teacher_prompts)) - 1]
    kept = plain[7::8] or plain[-1:]                                                 # for the drift, never trained on
    trained = [e for e in plain if e not in kept]
    return Task(
        kind, chat, draw, (lambda rng: rng.choice(trained)) if trained else None, None,
        shown[: min(size, len(heldout))], {"anchors": kept[:size]} if plain else {},
        lambda e, text: {"score": scorer(text, e.row)} if scorer else {}, shared)
