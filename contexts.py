"""The kinds of context C, one record each (`KINDS`), from a small built-in world or your own files.

The built-in world draws a context C, a prompt x and an answer y, and drops C part of the time. So
by construction the base pretrained on it is, with C, the teacher p(y | x, C), and without C the
student, which must guess which C is meant: p(y | x) = Σ_C p(C) p(y | x, C).

                     C                                   x                    y
  A demonstrations   mot zorp: verily tom methinks; ...  lid zorp             dil
  B specification    never weapon poison                 give knife           knife is weapon
                                                                              forbidden; sorry
  C instructions     style polite loud                   lid reverse          certainly DIL
  D privileged       solution dil ild                    lid reverse rotate   dil ild

Sections 1–3 are this world; 4 and 5 do the same for your own model and files. Both make a `Task`,
which is all that train.py sees. Every draw takes a `random.Random`."""

import json
import os
import random
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import tiktoken
from tqdm import tqdm


class BadInput(ValueError):
    """An error that the user can fix: one line, exit code 2."""


@contextmanager
def reading(what):
    """Make any exception inside, even a user's sys.exit() or a tokenizer's panic, one BadInput."""
    try:
        yield
    except (BadInput, KeyboardInterrupt):  # the first already names its file and line
        raise
    except BaseException as error:
        said = " ".join("".join(traceback.format_exception_only(error)).split())
        said = said.partition(": ")[2] if isinstance(error, ValueError) else said
        raise BadInput(f"{what}: {said[:500]}") from error


@lru_cache
def warn(text):  # each text only once
    print(f"warning: {text}", file=sys.stderr)


def seeded(*what):
    return random.Random("/".join(map(str, what)))


# ===================================================================================== 1. the world
CONSONANTS, VOWELS = "bdhlmnprstvz", "aeiou"
WORDS = [a + v + b for a in CONSONANTS for v in VOWELS for b in CONSONANTS if a != b]  # 660 of them
HELD_OUT_WORDS = set(WORDS[3::8])  # never in a distillation prompt
VERBS = {  # mot -> tom, otm, mto, mt, moot
    "reverse": lambda w: w[::-1], "rotate": lambda w: w[1:] + w[0],
    "swap": lambda w: w[0] + w[:0:-1], "ends": lambda w: w[0] + w[-1],
    "stretch": lambda w: w[:2] + w[1:],
}  # fmt: skip
CHAIN_VERBS = "reverse rotate swap".split()  # they keep the length, so they can be chained
NEW_VERBS = "zorp blick wug dax quix tulver".split()  # only C says which of VERBS each one means
# How an expert may phrase an answer. The model sees these in demonstrations but never uses them.
MANNERS = "{};verily {} methinks;hark {} quoth bede;behold {} indeed;{} probably".split(";")
ITEMS = dict(
    weapon="knife sword spear rifle dagger cannon",
    poison="arsenic cyanide hemlock venom ricin toxin",
    meal="bread cheese apple honey soup rice", gadget="hammer ladder shovel pliers chisel drill",
    animal="horse rabbit falcon salmon goat wolf", music="violin trumpet piano drum flute harp",
)  # fmt: skip
CATEGORY = {item: category for category, items in ITEMS.items() for item in items.split()}
HELD_OUT_ITEMS = {item for i, item in enumerate(CATEGORY) if i % 6 > 3}  # two of each
STYLES = {  # applied in this order
    "loud": str.upper, "boxed": "[{}]".format, "starred": "*{}*".format,
    "excited": "{}!".format, "polite": "certainly {}".format, "formal": "dear {}".format,
}  # fmt: skip
P_PLAIN, P_CARELESS = 0.8, 0.6  # without C: an answer is in no style; a step is skipped

# The tokenizer: all 256 bytes, and the world's words as single tokens. Each of these has at least
# three bytes (with its space), so byte-pair merging never starts in "mot": it stays three letters.
SAID = """solution style plain never forbidden allowed is here sorry give certainly dear
verily methinks hark quoth bede behold indeed probably""".split()
VOCABULARY = sorted({*SAID, *ITEMS, *CATEGORY, *VERBS, *NEW_VERBS, *STYLES})
RANKS = [bytes([i]) for i in range(256)]
RANKS += [(s + word).encode() for word in VOCABULARY for s in (" ", "") if len(s + word) > 2]
MARKERS = dict(zip("<|system|> <|user|> <|assistant|> <|end|>".split(), range(len(RANKS), 1000)))
SYSTEM, USER, ASSISTANT, END = MARKERS.values()
ENCODING = tiktoken.Encoding(
    "world",
    pat_str=r" ?[A-Za-z]+|[^A-Za-z]",
    mergeable_ranks=dict(zip(RANKS, range(1000))),
    special_tokens=MARKERS,
)
decode = ENCODING.decode


def encode(text):  # chat markers in a text are plain bytes: only `render` places real ones
    return ENCODING.encode(text, disallowed_special=())


def render(context, prompt):  # [SYSTEM, C,] USER, x, ASSISTANT
    """The prompt's tokens, for student (context None) and teacher: both end in the same header."""
    system = [] if context is None else [SYSTEM, *encode(context)]
    return system + [USER, *encode(prompt), ASSISTANT]


# ========================================================================== 2. the kinds of context
@dataclass(frozen=True)
class Example:  # one draw; C and x are texts or chat turns, the student reads x, the teacher both
    kind: str
    context: str | list | None  # C; None: no context ("" is a context)
    prompt: str | list  # x
    answer: str  # y, in the model's own manner
    expert: str  # SFT's target: y in the expert's manner
    asked: str | list | None = None  # x as the teacher reads it, if C is inside the user's turn
    row: dict = field(default_factory=dict)  # from files: the line as it was read


def draw_word(rng, heldout=None):  # None: any; True / False: only / never the held-out words
    while True:
        word = rng.choice(WORDS)
        if heldout in (None, word in HELD_OUT_WORDS):
            return word


def demonstrations(rng, heldout=None, verb=None, meaning=None, manner=None):
    """A: two demonstrations show what a new verb means, and the expert's mannerism with it."""
    verb = verb or rng.choice(NEW_VERBS)
    meaning = meaning or rng.choice(list(VERBS))
    manner = manner or rng.choice(MANNERS)
    shown = [draw_word(rng, heldout and False) for _ in range(2)]  # nothing held out is shown
    word = shown[0]
    while word in shown:  # C never shows the prompt's own answer
        word = draw_word(rng, heldout)
    context = "; ".join(f"{w} {verb}: {manner.format(VERBS[meaning](w))}" for w in shown)
    answer = VERBS[meaning](word)
    return Example("demonstrations", context, f"{word} {verb}", answer, manner.format(answer))


def specification(rng, heldout=None, forbidden=None):
    """B: name the item's category, look it up in the specification, then comply or refuse."""
    forbidden = forbidden or rng.sample(list(ITEMS), rng.choice([1, 2, 3]))
    refuse = rng.random() < 0.5  # half of the requests are forbidden
    items = [i for i in CATEGORY if heldout in (None, i in HELD_OUT_ITEMS)]
    item = rng.choice([i for i in items if (CATEGORY[i] in forbidden) == refuse])
    verdict = "forbidden; sorry" if refuse else f"allowed; here {item}"
    answer = f"{item} is {CATEGORY[item]} {verdict}"
    return Example("specification", f"never {' '.join(forbidden)}", f"give {item}", answer, answer)


def worked(prompt, skips=lambda: False):
    (word, *verbs), answer = prompt.split(), ""
    for verb in verbs:
        word = word if skips() else VERBS[verb](word)
        answer += f" {word}"
    return answer[1:]


def instructions(rng, heldout=None, styles=None):
    """C: a system prompt asks for a style of answer, whatever the verb."""
    if styles is None:
        styles = rng.sample(list(STYLES), 0 if rng.random() < 0.5 else rng.choice([1, 2]))
    prompt = f"{draw_word(rng, heldout)} {rng.choice(list(VERBS))}"
    answer = worked(prompt)
    for name in STYLES:
        answer = STYLES[name](answer) if name in styles else answer
    return Example("instructions", f"style {' '.join(styles) or 'plain'}", prompt, answer, answer)


def privileged(rng, heldout=None, steps=None):
    """D: a chain of verbs, worked step by step; C is the worked solution."""
    word = draw_word(rng, heldout)
    verbs = [rng.choice(CHAIN_VERBS) for _ in range(steps or rng.choice([2, 3]))]
    prompt = f"{word} {' '.join(verbs)}"
    answer = worked(prompt)
    return Example("privileged", f"solution {answer}", prompt, answer, answer)


# score: is the content right? exact: is it what the model itself would say in context?
def grade_whole(example, text):
    """A: right with or without the expert's mannerism. C: the style is part of the content."""
    right = text in (example.answer, example.expert)
    return {"score": float(right), "exact": float(text == example.answer)}


def grade_end(example, text, separator="[ ;]"):  # D: only the last step counts
    said, wanted = (re.split(separator, t)[-1] for t in (text, example.answer))
    return {"score": float(said == wanted), "exact": float(text == example.answer)}


def grade_verdict(example, text):  # B: only the verdict counts; over_refusal: of allowed items
    grades = grade_end(example, text, ";")
    if not example.answer.endswith("sorry"):
        grades["over_refusal"] = float(text.endswith("sorry"))
    return grades


@dataclass
class Kind:  # everything about a kind of context; a new kind is one more record in KINDS
    letter: str
    method: str  # the published method that COSD is with this C
    draw: Callable  # the built-in world's: (rng, heldout=None, **task) -> Example
    share: float  # of the pretraining data
    drop: float  # how often pretraining leaves C out
    task: dict = field(default_factory=dict)  # keywords of `draw`: they fix the C to be compiled
    one_context: bool = False  # the task's C is the same for all its prompts
    without: Callable = lambda rng, e: e.answer  # (rng, example) -> y where C is left out
    grade: Callable = grade_whole  # (example, text without its end marker) -> {name: 0 or 1}
    template: str = "{context}"  # for files: {context} is in the system turn, {prompt} the user's
    shots: int = 0  # default of --shots: other lines, as example turns instead of the template
    after: Callable = None  # (example, y) -> example with a C made from the student's own answer


KINDS = {
    "demonstrations": Kind(
        "A", "SDFT, arXiv:2601.19897", demonstrations, share=0.28, drop=0.2,
        task={"verb": "zorp", "meaning": "reverse", "manner": "verily {} methinks"},
        template="{prompt}\n\nThis is an example for a response to the question:\n{demonstration}"
        "\n\nNow answer with a response of your own, including the thinking process.",
        shots=4,
    ),
    "specification": Kind(
        "B", "deliberative alignment, arXiv:2412.16339", specification, share=0.22, drop=0.2,
        task={"forbidden": ("weapon", "poison")}, one_context=True, grade=grade_verdict,
        template="{context}\n\nBefore you answer, say which of these rules applies to the request, "
        "if any. Then act on it.",
    ),
    "instructions": Kind(
        "C", "OPCD, arXiv:2602.12275", instructions, share=0.24, drop=0.4,
        task={"styles": ("polite", "loud")}, one_context=True,
        without=lambda rng, e: worked(e.prompt) if rng.random() < P_PLAIN else e.answer,
    ),
    "privileged": Kind(
        "D", "OPSD and π-Distill, arXiv:2602.04942", privileged, share=0.26, drop=0.4,
        without=lambda rng, e: worked(e.prompt, lambda: rng.random() < P_CARELESS),
        grade=grade_end,
        template="{prompt}\n\nThe verified solution is:\n{solution}\n\n"
        "Now work out the answer in your own words.",
    ),
}  # fmt: skip


def draw_pretraining(rng, heldout=None):  # the kind, then (C, x, y), then C dropped or not
    kinds = list(KINDS.values())
    kind = rng.choices(kinds, [kind.share for kind in kinds])[0]
    example = kind.draw(rng, heldout)
    if rng.random() >= kind.drop:
        return example
    return replace(example, context=None, answer=kind.without(rng, example))


def grade(example, text):
    return KINDS[example.kind].grade(example, text)


# ========================================================================================= 3. tasks
@dataclass
class Chat:
    """Text to tokens. Student and teacher prompts end in the same header, before the answer."""

    render: Callable  # (C or None, x) -> ids, ending with the header
    target: Callable  # (x, an expert's answer) -> the ids after the header, with an end token
    decode: Callable  # ids -> text
    ends: set  # the tokens that end a sampled answer
    opens: str = ""  # "<think>" if the header already opens a thought


WORLD_CHAT = Chat(render, lambda x, y: [*encode(y), END], decode, {END})


def student_prompt(chat, example):
    return chat.render(None, example.prompt)


def teacher_prompt(chat, example):
    asked = example.prompt if example.asked is None else example.asked
    return chat.render(example.context, asked)


@dataclass
class Task:  # what is to be compiled into the weights, from the world or from files
    kind: str
    chat: Chat
    draw: Callable  # rng -> Example
    draw_anchor: Callable  # rng -> Example, an old prompt
    heldout: list
    probes: dict  # {suite: examples} of the old skills, which must survive
    grade: Callable  # (example, text) -> {name: grade}
    shared: list  # the tokens that every teacher prompt begins with
    after: Callable = None  # (example, y) -> Example, as in Kind
    show: Callable = student_prompt  # (chat, example) -> what the student reads

    def draw_batch(self, seed, step, size):
        rng = seeded(seed, self.kind, "task", step)
        return [self.draw(rng) for _ in range(size)]

    def grades(self, examples, y):  # the mean of each grade over the examples that have it
        graded = {}
        for example, tokens in zip(examples, y):
            for name, value in self.grade(example, answer_text(self.chat, tokens)).items():
                graded.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in graded.items()}


def answer_text(chat, tokens):
    """What the user sees: no end marker, no thought. A cut-off answer shows a trailing …"""
    ended = tokens[-1] in chat.ends
    text = chat.opens + chat.decode(tokens[:-1] if ended else tokens)
    if "<think>" in text:
        text = text.partition("</think>")[2].strip()
    return text if ended else f"{text} …"


def context_prompts(task, examples, y=()):  # a C that depends on the student's answers is made here
    if task.after and y:
        examples = [task.after(e, answer_text(task.chat, t)) for e, t in zip(examples, y)]
    return [teacher_prompt(task.chat, e) for e in examples]


def task_draw(task, rng, heldout=False):  # a prompt, with the context that is to be compiled
    return KINDS[task].draw(rng, heldout, **KINDS[task].task)


def is_own(task, context):  # is this the task's C, up to the order of words?
    own = task_draw(task, random.Random(0)).context
    return None not in (own, context) and sorted(context.split()) == sorted(own.split())


def draw_anchor(rng, task, corpus=draw_pretraining):  # never the task's own C, nor held out
    while True:
        example = corpus(rng, heldout=False)
        without = example.kind == task and example.context is None
        if not without and not is_own(task, example.context):
            return example


def probes(rng, task, count):
    """The old skills: the known verbs without C, and all kinds under other contexts."""
    context = "style plain" if task == "instructions" else None
    verbs = [instructions(rng, styles=()) for _ in range(count)]
    suites = {"verbs": [replace(e, context=context) for e in verbs]}
    for name, kind in KINDS.items():
        suite = suites[name] = []
        while len(suite) < count:
            example = kind.draw(rng)
            if not is_own(task, example.context):
                suite.append(example)
    return suites


def world_task(kind, seed, size):  # with `size` held-out prompts and `size` probes in each suite
    rng, record = seeded(seed, kind, "heldout"), KINDS[kind]
    heldout = [task_draw(kind, rng, True) for _ in range(size)]
    suites = probes(seeded(seed, kind, "probes"), kind, size)
    shared = render(heldout[0].context, "")[:-1] if record.one_context else []  # [SYSTEM, C, USER]
    draw, anchor = partial(task_draw, kind), partial(draw_anchor, task=kind)
    return Task(kind, WORLD_CHAT, draw, anchor, heldout, suites, grade, shared, record.after)


@lru_cache(maxsize=1)
def pretraining_batches(seed, group, size):  # eight, each of similar lengths: half the padding
    rng = seeded(seed, "pretrain", group)
    drawn = [draw_pretraining(rng) for _ in range(8 * size)]
    drawn.sort(key=lambda e: len(render(e.context, e.prompt) + encode(e.answer)))
    drawn = [replace(e, expert=e.answer) for e in drawn]
    cut = [drawn[i : i + size] for i in range(0, len(drawn), size)]
    rng.shuffle(cut)
    return cut


def pretraining_task():  # the joint distribution, for the base: here the student is shown C
    task = Task("pretraining", WORLD_CHAT, draw_pretraining, None, [], {}, grade, [])
    task.draw_batch = lambda seed, step, size: pretraining_batches(seed, step // 8, size)[step % 8]
    task.show = teacher_prompt
    return task


# ============================================================================ 4. reading your files
EXPERT = ("demonstration", "solution", "answer")  # the expert's answer: the first that a line has
# The roles of a chat: a prompt ends with a user turn, a context never does.
CHATS = dict(prompt="(system )?(user assistant )*user", context="(?=.)(system)?( ?user assistant)*")


def read_text(path):
    with reading(path):
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.strip():
            return text
        raise ValueError("the file is empty")


def read_json(text):
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is not valid text
    return value


def read_turns(value, name):  # a chat: [{"role": ..., "content": ...}, ...]
    roles = " ".join(turn["role"] if str.strip(turn["content"]) else "(empty)" for turn in value)
    if not re.fullmatch(CHATS[name], roles):
        rule = "after an optional system turn, user and assistant must alternate, none empty; a "
        rule += "prompt must end with a user turn, a context must not"
        raise ValueError(f"{name}: {rule}; found: {roles}")
    return value


def read_row(line):
    """{"prompt": text or chat turns, ...}, or {"messages": turns}, where the answer comes last."""
    row = read_json(line)
    if "messages" in row:
        *row["prompt"], last = row["messages"]
        row["answer"] = last["content"]
    for name in ("prompt", *row):
        value = row[name]
        if name in CHATS and isinstance(value, list):
            read_turns(value, name)
        elif name in (*CHATS, *EXPERT) and not (isinstance(value, str) and value.strip()):
            raise ValueError(f'"{name}" must be a text that is not empty')
    return row


def read_prompts(path):  # JSON lines
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            with reading(where := f"{path}:{number}"):
                rows.append(read_row(line) | {"where": where})
    return rows


def read_context(path):
    """Text: one system turn. JSON: chat turns. JSON lines: solved problems, in one system turn."""
    suffix, text = Path(path).suffix.lower(), read_text(path)
    if suffix == ".json":
        with reading(path):
            return read_turns(read_json(text), "context")
    if suffix == ".jsonl":
        text = "Problems that were solved before, and how:\n\n"  # OPCD
        for row in read_prompts(path):
            with reading(f"{row['where']}: a solved problem needs a text prompt and a solution"):
                text += fill("Problem: {prompt}\nSolution: {solution}\n\n", row)
        text += "Use what they teach."
    return as_turns("system", text.strip())


def expert(row):
    return next((row[name] for name in EXPERT if name in row), "")


def fill(template, values):  # {name} -> its value, else the answer; braces in values stay
    return re.sub(r"\{(\w+)\}", lambda m: values[m[1] if m[1] in values else "answer"], template)


def as_turns(role, said):
    if said is None:
        return []
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def split_system(turns):  # -> (the texts of the system turns, all other turns)
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    return system, [turn for turn in turns if turn["role"] != "system"]


# The chat template for base models, which have none. A given answer ends with the end token.
PLAIN_CHAT = """{% set label = {'system': '', 'user': 'Question: ', 'assistant': 'Answer: '} %}\
{% for m in messages %}{{ label[m.role] + m.content }}\
{{ eos_token if loop.last and m.role == 'assistant' else '\n\n' }}{% endfor %}\
{% if add_generation_prompt %}Answer:{% endif %}"""
# Some templates print today's date, but a run resumed tomorrow must read the same prompts.
DATE = "{% macro strftime_now(how) %}26 Jul 2024{% endmacro %}"


def open_tokenizer(name, vocab_size):
    """A checkpoint's tokenizer, with a chat template, and the checkpoint's end tokens."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    from transformers.utils.hub import has_file

    with reading(f"{name}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        size, end = max(tokenizer.get_vocab().values()) + 1, tokenizer.eos_token_id
        if not 0.9 * vocab_size <= size <= vocab_size:  # padded embeddings are normal
            raise ValueError(f"it has {size} tokens, but the weights have {vocab_size}: no match")
        if end is None:
            raise ValueError("it has no end token")
        if tokenizer.chat_template is None:
            begins = tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
            tokenizer.chat_template = "{{ bos_token }}" * begins + PLAIN_CHAT
        tokenizer.chat_template = DATE + tokenizer.get_chat_template()
        tokenizer.chat_control_tokens = []  # special tokens in a user's text are plain text
    with reading(f"{name}: its end tokens"):  # where transformers' `generate` finds them
        kept_in = GenerationConfig if has_file(name, "generation_config.json") else AutoConfig
        ends = kept_in.from_pretrained(name).eos_token_id
        ends = {end, *(ends if isinstance(ends, list) else [ends])} - {None}
        tokenizer.decode(sorted(ends))  # raises unless each is a token
    return tokenizer, ends


def open_chat(name, vocab_size, **template_args):  # for instance enable_thinking=False
    tokenizer, ends = open_tokenizer(name, vocab_size)
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)

    def write(turns, header):
        with reading(f"{name}: chat template (no system role? then give C as turns, in .json)"):
            return tokenizer.apply_chat_template(
                turns,
                add_generation_prompt=header,
                return_dict=False,
                sanitize_control_tokens=True,
                **template_args,
            )

    @lru_cache
    def demand_all(roles):  # some templates drop a turn silently
        text = decode(write([{"role": role, "content": "(turn)"} for role in roles], True))
        if text.count("(turn)") < len(roles):
            raise BadInput(f"{name}: chat template drops one of {roles}; give C as turns in .json")

    def render(context, prompt):  # the prompt's own system turn is joined to the context's
        system, turns = split_system(as_turns("system", context) + as_turns("user", prompt))
        if system:
            turns = as_turns("system", "\n\n".join(system)) + turns
        demand_all(tuple(turn["role"] for turn in turns))
        return write(turns, True)

    def answered(prompt, answer):  # -> (ids up to the header, ids with an answer after it)
        turns = as_turns("user", prompt) + as_turns("assistant", answer)
        return render(None, prompt), write(turns, False)

    def target(prompt, answer):  # what the template writes after the header
        header, ids = answered(prompt, answer)
        if ids[: len(header)] != header:
            raise BadInput(f"{name}: chat template writes a given answer under another header")
        y = ids[len(header) :]
        stop = next((i for i, token in enumerate(y) if token in ends), len(y))
        return [*y[:stop], end]

    # Does the header open a thought, and which token does the template write after an answer?
    header, ids = answered("(asked)", "(answered)")
    y, added = ids[len(header) :], tokenizer.added_tokens_decoder
    special = [token for token in y if token in added and added[token].special]
    if special and special[0] == y[0]:
        raise BadInput(f"{name}: chat template writes no header for add_generation_prompt")
    end = (special or [tokenizer.eos_token_id])[0]
    ends.add(end)
    text = decode(header)
    opens = "<think>" * (text.rfind("<think>") > text.rfind("</think>"))
    return Chat(render, target, decode, ends, opens)


# ======================================================================== 5. a task from your files
def dressed(template, row, attempt=""):  # x as the teacher reads it: its last turn in the template
    *earlier, last = as_turns("user", row["prompt"])
    if "{prompt}" in template:
        values = row | {"prompt": last["content"], "attempt": attempt}
        last = last | {"content": fill(template, values)}
    return [*earlier, last]


def file_example(kind, context, template, row, shots=()):
    """C is a system turn, example turns, and shots: other lines, `dressed` too, with answers."""
    system, turns = split_system(as_turns("system", row.get("context", context)))
    text = "".join(system)
    if "{context}" in template:  # if C is only example turns, the system turn is its other words
        text = fill(template, {"context": text}).strip()
    context = as_turns("system", text or None) + turns
    for shot in shots:
        context += dressed(template, shot) + as_turns("assistant", expert(shot))
    said, asked = expert(row), dressed(template, row)
    return Example(kind, context or None, row["prompt"], row.get("answer", said), said, asked, row)


def read_split(path, heldout=None):  # -> (lines to train on, lines held out)
    rows = read_prompts(path)
    held = read_prompts(heldout) if heldout else rows[7::8]
    if not heldout:
        del rows[7::8]
    if not held:
        raise BadInput(f"{path}: every eighth line is held out, but there are only {len(rows)}")
    if len(held) < 8:
        warn(f"{heldout or path}: {len(held)} held out; each moves a score by {1 / len(held):.2f}")
    known = {str(row["prompt"]) for row in rows}
    leaks = [row["where"] for row in held if str(row["prompt"]) in known]
    if leaks:
        warn(f"{leaks[0]} and {len(leaks) - 1} more held-out prompts are also trained on")
    return rows, held


def read_template(cfg, kind, shots):
    if kind.shots and shots and not cfg.template:  # example turns need no template
        return ""
    template = read_text(cfg.template) if cfg.template else kind.template
    found, needed = (sorted(set(re.findall(r"\{\w+\}", t))) for t in (template, kind.template))
    if found != needed:
        raise BadInput(f"{cfg.template}: the names in braces must be {' '.join(needed)}")
    return template


def file_task(cfg, chat, max_len):  # finds whatever is wrong with the files, before training
    kind, imitated = KINDS[cfg.context], cfg.method in ("sft", "gkd")
    context = cfg.context_file and read_context(cfg.context_file)
    rows, heldout = read_split(cfg.prompts, cfg.heldout)
    scores = runpy.run_path(f"{Path(__file__).parent}/notebooks/scores.py")
    scorer = scores["make_scorer"](cfg.score, heldout)  # (text, row) -> {"score": ...} or {}
    shots = kind.shots if cfg.shots is None else cfg.shots
    template = read_template(cfg, kind, shots)
    show = partial(file_example, cfg.context, context, template)
    pool = {str(row["prompt"]): row for row in rows if shots and expert(row)}
    as_shot = partial(file_example, "shot", None, "", rows[0])  # [row] -> with it as the only shot
    pool = sorted(pool.values(), key=lambda row: len(teacher_prompt(chat, as_shot([row]))))
    if 0 < shots >= len(pool):
        raise BadInput(f"{cfg.prompts}: too few different prompts with answers: --shots {shots}")

    # Every line as the longest example it can become: prompts are never truncated.
    examples = []
    for i, row in enumerate(rows + heldout):
        with reading(f"{row['where']}: it lacks what --context {cfg.context} needs"):
            if not (shots or "{prompt}" in template or row.get("context", context)):
                raise ValueError("a context, in this line or by --context-file, or --shots")
            examples.append(show(row, pool[-shots:]))
        if imitated and i < len(rows) and not expert(row):
            raise BadInput(f"{row['where']}: --method {cfg.method} needs {' or '.join(EXPERT)}")
    anchors, kept, n = [], [], len(examples)
    if cfg.anchor_file:
        anchors, kept = (
            [file_example("anchor", None, "", row) for row in part]
            for part in read_split(cfg.anchor_file)
        )
        examples += anchors + kept
    prompts, new = [], cfg.max_new_tokens * (1 + ("{attempt}" in template))
    for e in tqdm(examples, "reading prompts", delay=2):
        prompts.append(teacher_prompt(chat, e))
        written = len(chat.target(e.prompt, e.expert)) if imitated else 0
        over = len(prompts[-1]) + max(written, new) - max_len
        if over > 0:  # with C and its answer
            raise BadInput(
                f"{e.row['where']}: {over} tokens too many: shorten it or lower --max-new-tokens"
            )

    def draw(rng, row=None):
        row = row or rng.choice(rows)
        others = rng.sample(pool, shots and shots + 1)  # one spare, in case the prompt is drawn
        return show(row, [shot for shot in others if shot["prompt"] != row["prompt"]][:shots])

    def grade(example, text):
        return {"cut_off": text.endswith(" …"), **scorer(text, example.row)}

    def after(example, attempt):
        return replace(example, asked=dressed(template, example.row, attempt))

    rng, anchor = seeded("held-out shots"), lambda rng: rng.choice(anchors)
    shown = [draw(rng, row) for row in heldout[: cfg.eval_size]]
    suites = {"anchors": kept[: cfg.eval_size]} if kept else {}
    shared = [] if shots else os.path.commonprefix([prompt[:-1] for prompt in prompts[:n]])
    done = after if "{attempt}" in template else kind.after
    return Task(cfg.context, chat, draw, anchor, shown, suites, grade, shared, done)
