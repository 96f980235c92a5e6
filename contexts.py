"""The kinds of context C: one record each (`KINDS`), a small world to draw them from, your files.

The built-in world draws (C, x, y), prompt x and answer y, and drops C part of the time. So its
pretrained base is, by construction, the teacher p(y | x, C) with C, and without C the student, that
must guess which C is meant: p(y | x) = Σ_C p(C) p(y | x, C).

                     C                                   x                    y
  A demonstrations   mot zorp: verily tom methinks; ...  lid zorp             dil
  B specification    never weapon poison                 give knife           knife is weapon
                                                                              forbidden; sorry
  C instructions     style polite loud                   lid reverse          certainly DIL
  D privileged       solution dil ild                    lid reverse rotate   dil ild

Sections 1–3 are this world; 4 and 5 do the same for your own model and files. Both end in a `Task`,
which is all that train.py sees. Every draw takes a `random.Random`."""

import json
import math
import os
import random
import re
import runpy
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path

import tiktoken


class BadInput(ValueError):
    """Something the user can mend: one line, exit code 2."""


@contextmanager
def reading(what):  # whatever goes wrong inside, a user's sys.exit() too, becomes one line
    try:
        yield
    except BadInput:  # already names its file and line
        raise
    except (Exception, SystemExit) as error:
        said = (str if isinstance(error, (ValueError, OSError)) else repr)(error).strip()
        raise BadInput(f"{what}: {said.partition(chr(10))[0]}") from error


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
CHAIN_VERBS = "reverse rotate swap".split()  # keep the length: they can be chained
NEW_VERBS = "zorp blick wug dax quix tulver".split()  # only C says which of VERBS each is
# How an expert may talk. The model sees this in demonstrations but never answers so.
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
P_PLAIN, P_CARELESS = 0.8, 0.6  # without C: nobody thinks of a style; a step is skipped

# The tokenizer: all 256 bytes, and the world's words as single tokens. No word has fewer than three
# bytes (with its space), so byte-pair merging never starts inside "mot": always three letters.
SAID = """solution style plain never forbidden allowed is here sorry give certainly dear
verily methinks hark quoth bede behold indeed probably""".split()
VOCABULARY = sorted({*SAID, *ITEMS, *CATEGORY, *VERBS, *NEW_VERBS, *STYLES})
RANKS = [bytes([i]) for i in range(256)]
RANKS += [(s + word).encode() for word in VOCABULARY for s in (" ", "") if len(s + word) > 2]
MARKERS = dict(zip("<|system|> <|user|> <|assistant|> <|end|>".split(), range(len(RANKS), 1000)))
SYSTEM, USER, ASSISTANT, END = MARKERS.values()
MERGES = dict(zip(RANKS, range(1000)))
ENCODING = tiktoken.Encoding(
    "world", pat_str=r" ?[A-Za-z]+|[^A-Za-z]", mergeable_ranks=MERGES, special_tokens=MARKERS
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
    context: str | list | None  # C; None: there is none ("" is one)
    prompt: str | list  # x
    answer: str  # y, in the model's own manner
    expert: str  # SFT's target: y in the expert's manner
    asked: str | list | None = None  # x as it is read with C, where C is inside the user's turn
    row: dict = field(default_factory=dict)  # from files: the line as it was read


def draw_word(rng, heldout=None):  # None: any; True / False: only / never the held-out words
    while True:
        word = rng.choice(WORDS)
        if heldout in (None, word in HELD_OUT_WORDS):
            return word


def demonstrations(rng, heldout=None, verb=None, meaning=None, manner=None):
    """A: two demonstrations show what a new verb means; the expert's mannerism comes along."""
    verb = verb or rng.choice(NEW_VERBS)
    meaning = meaning or rng.choice(list(VERBS))
    manner = manner or rng.choice(MANNERS)
    shown = [draw_word(rng, heldout and False) for _ in range(2)]  # nothing held out is shown
    word = shown[0]
    while word in shown:  # never the prompt's own answer
        word = draw_word(rng, heldout)
    context = "; ".join(f"{w} {verb}: {manner.format(VERBS[meaning](w))}" for w in shown)
    answer = VERBS[meaning](word)
    return Example("demonstrations", context, f"{word} {verb}", answer, manner.format(answer))


def specification(rng, heldout=None, forbidden=None):
    """B: name the item's category, look it up in the specification, then comply or refuse."""
    forbidden = forbidden or rng.sample(list(ITEMS), rng.choice([1, 2, 3]))
    refuse = rng.random() < 0.5  # half the requests are forbidden ones
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
    """C: a system prompt asks for a style, on any known skill."""
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


# score: the content is right. exact: it is what the model itself would say in context.
def grade_whole(example, text):
    """A: with or without the expert's mannerism. C: the styled answer, manner is content."""
    right = text in (example.answer, example.expert)
    return {"score": float(right), "exact": float(text == example.answer)}


def grade_end(example, text, separator="[ ;]"):  # D: the last step
    said, wanted = (re.split(separator, t)[-1] for t in (text, example.answer))
    return {"score": float(said == wanted), "exact": float(text == example.answer)}


def grade_verdict(example, text):  # B: the verdict; over_refusal: on allowed items only
    grades = grade_end(example, text, ";")
    if not example.answer.endswith("sorry"):
        grades["over_refusal"] = float(text.endswith("sorry"))
    return grades


@dataclass
class Kind:  # all there is to say about a kind of context; a new one is one more record in KINDS
    letter: str
    method: str  # the published method that this C makes of COSD
    draw: Callable  # the built-in world's: (rng, heldout=None, **task) -> Example
    share: float  # of pretraining
    drop: float  # how often pretraining leaves C out
    task: dict = field(default_factory=dict)  # what is compiled: the keywords that fix C
    one_context: bool = False  # the task's C is the same for all its prompts
    without: Callable = lambda rng, e: e.answer  # (rng, example) -> y where C is left out
    grade: Callable = grade_whole  # (example, text without its end marker) -> {name: 0 or 1}
    template: str = "{context}"  # in files: {context} makes the system turn, {prompt} the user's
    needs: tuple = ("context",)  # each line must bring one of these
    shots: int = 0  # by default so many other lines as example turns, in place of the template
    after: Callable = None  # (example, y) -> example, C made from the student's own answer


KINDS = {
    "demonstrations": Kind(
        "A", "SDFT, arXiv:2601.19897", demonstrations, share=0.28, drop=0.2,
        task={"verb": "zorp", "meaning": "reverse", "manner": "verily {} methinks"},
        template="{prompt}\n\nThis is an example for a response to the question:\n{demonstration}"
        "\n\nNow answer with a response of your own, including the thinking process.",
        needs=("demonstration", "answer"), shots=4,
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
        grade=grade_end, needs=("solution", "answer"),
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
class Chat:  # how text becomes a model's tokens and back
    render: Callable  # (C or None, x) -> ids, ending with the assistant header
    encode: Callable  # text -> ids
    decode: Callable  # ids -> text
    end: int  # closes a written answer
    ends: set  # each of them closes a sampled one


WORLD_CHAT = Chat(render, encode, decode, END, {END})


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
    draw_anchor: Callable  # rng -> Example; None: there are no anchors
    heldout: list
    probes: dict  # {suite: examples}: what must survive
    grade: Callable  # (example, text) -> {name: grade}
    shared: list  # the first tokens of every teacher prompt
    after: Callable = None  # (example, y) -> Example, as in Kind
    paragraphs: tuple = ()  # of an unrelated text, as tokens: their perplexity should not change
    show: Callable = student_prompt  # (chat, example) -> what the student reads

    def draw_batch(self, seed, step, size):
        rng = seeded(seed, self.kind, "task", step)
        return [self.draw(rng) for _ in range(size)]

    def grades(self, examples, y):  # the mean of each, over the examples that have it
        graded = {}
        for example, tokens in zip(examples, y):
            for name, value in self.grade(example, answer_text(self.chat, tokens)).items():
                graded.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in graded.items()}


def answer_text(chat, tokens):  # without the end marker; one that never ended shows a trailing …
    if tokens[-1] in chat.ends:
        return chat.decode(tokens[:-1])
    return chat.decode(tokens) + " …"


def context_prompts(task, examples, y=()):  # C that is made of the student's answers y: now
    if task.after and y:
        examples = [task.after(e, answer_text(task.chat, t)) for e, t in zip(examples, y)]
    return [teacher_prompt(task.chat, e) for e in examples]


def task_draw(task, rng, heldout=False):  # a prompt, with the context that is to be compiled
    return KINDS[task].draw(rng, heldout, **KINDS[task].task)


def is_own(task, context):  # is this what the task compiles, in whatever order of words?
    own = task_draw(task, random.Random(0)).context
    return None not in (own, context) and sorted(context.split()) == sorted(own.split())


def draw_anchor(rng, task, corpus=draw_pretraining):  # never the task's own, nor held out
    while True:
        example = corpus(rng, heldout=False)
        without = example.kind == task and example.context is None
        if not without and not is_own(task, example.context):
            return example


def probes(rng, task, count):
    """What must survive: the known verbs, no C shown, all kinds under other contexts."""
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


def world_task(kind, seed, size):  # with `size` held-out prompts and as many probes of each kind
    rng, record = seeded(seed, kind, "heldout"), KINDS[kind]
    heldout = [task_draw(kind, rng, True) for _ in range(size)]
    suites = probes(seeded(seed, kind, "probes"), kind, size)
    shared = render(heldout[0].context, "")[:-1] if record.one_context else []  # [SYSTEM, C, USER]
    draw, anchor = partial(task_draw, kind), partial(draw_anchor, task=kind)
    return Task(kind, WORLD_CHAT, draw, anchor, heldout, suites, grade, shared, record.after)


@lru_cache(maxsize=1)
def pretraining_batches(seed, group, size):  # eight, cut by length: half the padding
    rng = seeded(seed, "pretrain", group)
    drawn = [draw_pretraining(rng) for _ in range(8 * size)]
    drawn.sort(key=lambda e: len(render(e.context, e.prompt) + encode(e.answer)))
    drawn = [replace(e, expert=e.answer) for e in drawn]
    cut = [drawn[i : i + size] for i in range(0, len(drawn), size)]
    rng.shuffle(cut)
    return cut


def pretraining_task():  # the joint distribution, for the base: the one student that is shown C
    task = Task("pretraining", WORLD_CHAT, draw_pretraining, None, [], {}, grade, [])
    task.draw_batch = lambda seed, step, size: pretraining_batches(seed, step // 8, size)[step % 8]
    task.show = teacher_prompt
    return task


# ============================================================================ 4. reading your files
# What a chat may be: a prompt ends with the user's turn, a context never does.
CHATS = dict(prompt="(system )?(user assistant )*user", context="(?=.)(system)?( ?user assistant)*")
EXPERT = ("demonstration", "solution", "answer")  # the expert's words: the first that a line brings


def read_text(path):
    with reading(path):
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.strip():
            return text
        raise ValueError("the file is empty")


def read_turns(value, name):  # a chat: [{"role": ..., "content": ...}, ...]
    roles = " ".join(turn["role"] if turn["content"].strip() else "(empty)" for turn in value)
    if not re.fullmatch(CHATS[name], roles):
        rule = "after an optional system turn, user and assistant alternate, none empty; a prompt"
        rule += " ends with the user's turn, a context with the assistant's"
        raise ValueError(f"{name}: {rule}; this is: {roles}")
    return value


def read_prompts(path):  # JSON lines; a prompt is a text or chat turns
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        with reading(where := f"{path}:{number}"):
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
            for name in ("prompt", *row):
                value = row[name]
                if name in CHATS and isinstance(value, list):
                    row[name] = read_turns(value, name)
                elif name in (*CHATS, *EXPERT) and not (isinstance(value, str) and value.strip()):
                    raise ValueError(f'"{name}" must be a text, and not an empty one')
            rows.append(row | {"where": where})
    return rows


def read_context(path):
    """A text: one system turn. JSON: chat turns. JSON lines: solved problems, as a system turn."""
    suffix, text = Path(path).suffix.lower(), read_text(path)
    if suffix == ".json":
        with reading(path):
            return read_turns(json.loads(text), "context")
    if suffix == ".jsonl":
        solved, traces = read_prompts(path), ""
        demand(solved, EXPERT, "a solved problem")
        for row in solved:
            with reading(f"{row['where']}: a solved problem needs a prompt in text"):
                solution = row.get("solution", expert(row))
                traces += "Problem: " + row["prompt"] + f"\nSolution: {solution}\n\n"
        text = f"Problems that were solved before, and how:\n\n{traces}Use what they teach."  # OPCD
    return as_turns("system", text.strip())


def demand(rows, names, who):
    for row in rows:
        if not set(names) & row.keys():
            raise BadInput(f"{row['where']}: {who} needs a {' or '.join(names)} in every line")


def expert(row):
    return next((row[name] for name in EXPERT if name in row), "")


def fill(template, values):  # {name} -> its value, or else the answer; braces in values stay
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], values.get("answer", "")), template)


PLAIN_CHAT = """{% set labels = {'system': '', 'user': 'Question: ', 'assistant': 'Answer: '} %}\
{% for m in messages %}{{ labels[m.role] + m.content + '\n\n' }}{% endfor %}Answer:"""


def as_turns(role, said):
    if said is None:
        return []
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def split_system(turns):  # -> (the texts of the system turns, all other turns)
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    return system, [turn for turn in turns if turn["role"] != "system"]


def open_chat(name, vocab_size):  # any of its end tokens ends an answer
    from transformers import AutoTokenizer, GenerationConfig

    with reading(f"{name}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        size, end = max(tokenizer.get_vocab().values()) + 1, tokenizer.eos_token_id
        if not 0.9 * vocab_size <= size <= vocab_size:  # padded embeddings are normal
            raise ValueError(f"it has {size} tokens, the weights have {vocab_size}: not a pair")
        if end is None:
            raise ValueError("it has no end token")
    ends = end
    with suppress(OSError):  # not every checkpoint has one
        ends = GenerationConfig.from_pretrained(name).eos_token_id or end
    ends = {end, *(ends if isinstance(ends, list) else [ends])}
    plain = tokenizer.chat_template is None
    if plain:
        tokenizer.chat_template = PLAIN_CHAT

    def render(context, prompt):  # a system turn of the prompt's own joins that of the context
        system, turns = split_system(as_turns("system", context) + as_turns("user", prompt))
        if system:
            turns = as_turns("system", "\n\n".join(system)) + turns
        with reading(f"{name}: chat template; if it has no system role, give C as turns (.json)"):
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            for turn in turns:  # some drop a system turn without a word
                if turn["content"].strip() not in text:
                    raise ValueError(f"it drops a {turn['role']} turn")
        return tokenizer.encode(text, add_special_tokens=plain)  # else the template has placed them

    def encode(text):
        return tokenizer.encode(" " * plain + text, add_special_tokens=False)  # "Answer: yes"

    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    return Chat(render, encode, decode, end, ends)


def final_number(text):  # the last one, as GSM8K is graded: "so 1,234.50 in all." -> 1234.5
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


SCORES = {  # (the answer's text, what is wanted) -> right?
    "exact": lambda text, wanted: text.strip() == wanted.strip(),
    "contains": lambda text, wanted: wanted.lower() in text.lower(),  # in whatever case
    "regex": lambda text, wanted: bool(re.search(wanted, text)),
    "number": lambda text, wanted: final_number(text) == Decimal(final_number(wanted)),
}


def make_scorer(spec, rows):
    """--score -> f(answer's text, the line as read) -> score, or None; your own Python is run."""
    if spec == "none":
        return None
    name, _, argument = spec.partition(":")
    path, _, function = spec.rpartition(":")
    judge = SCORES.get(name)
    if not judge:
        with reading(f"--score {spec}"):
            if not path.endswith(".py"):
                ways = "none, exact, contains, regex, number, contains:TEXT, regex:PATTERN"
                raise ValueError(f"{ways} or path.py:function")
            judge = runpy.run_path(path)[function]

    def score(text, row):
        with reading(f"{row['where']}: --score {spec} on {text!r}"):
            value = float(judge(text, (argument or row["answer"]) if name in SCORES else row))
            if math.isfinite(value):
                return value
            raise ValueError(f"{value} is no score")

    for row in rows if name in SCORES else []:  # a missing answer or a bad pattern shows up now
        score("", row)
    return score


# ======================================================================== 5. a task from your files
def dressed(template, row, attempt=""):  # x as it is read with C: its last turn in the template
    *earlier, last = as_turns("user", row["prompt"])
    if "{prompt}" in template:
        values = row | {"prompt": last["content"], "attempt": attempt}
        last = last | {"content": fill(template, values)}
    return [*earlier, last]


def file_example(kind, context, template, row, shots=()):
    """C is a system turn, example turns, and shots: other lines and answers, dressed alike."""
    system, turns = split_system(as_turns("system", row.get("context", context)))
    text = "".join(system)
    if "{context}" in template:  # where C is example turns alone, its own words are the system turn
        text = fill(template, {"context": text}).strip()
    context = as_turns("system", text or None) + turns
    for shot in shots:
        context += dressed(template, shot) + as_turns("assistant", expert(shot))
    said, asked = expert(row), dressed(template, row)
    return Example(kind, context or None, row["prompt"], row.get("answer", said), said, asked, row)


def read_split(path, heldout=None, solved=""):  # -> (lines to train on, lines held out)
    rows = read_prompts(path)
    if heldout:
        held = read_prompts(heldout)
    else:
        held = rows[7::8]
        del rows[7::8]
    if not held:
        raise BadInput(f"{path}: every eighth line is held out, but there are {len(rows)}")
    known = {str(row["prompt"]) for row in rows}
    known |= set(re.findall(r"(?s)Problem: (.*?)\nSolution: ", solved))
    leaks = [row["where"] for row in held if str(row["prompt"]) in known]
    if leaks:
        said = (
            f"warning: {len(leaks)} held-out prompts are shown elsewhere, the first is {leaks[0]}"
        )
        print(f"{said}: their scores say nothing about new prompts", file=sys.stderr)
    return rows, held


def read_template(cfg, kind, shots):
    if kind.shots and shots:  # example turns need no template
        if cfg.template:
            raise BadInput("--template needs --shots 0: else the examples are chat turns")
        return ""
    template = read_text(cfg.template) if cfg.template else kind.template
    found, needed = (set(re.findall(r"\{\w+\}", text)) for text in (template, kind.template))
    if found != needed:
        raise BadInput(f"{cfg.template}: the names in braces must be {' '.join(sorted(needed))}")
    return template


def read_paragraphs(path, chat, max_len):
    texts = read_text(path).split("\n\n")
    rows = [row for text in texts if len(row := chat.encode(text.strip())[:max_len]) > 1]
    if not rows:
        raise BadInput(f"{path}: no paragraph has two tokens")
    return rows


def file_task(cfg, chat, max_len):  # all that can be wrong with the files is found here, first
    kind, imitated = KINDS[cfg.context], cfg.method in ("sft", "gkd")
    context = read_context(cfg.context_file) if cfg.context_file else None
    solved = context[0]["content"] if context else ""
    rows, heldout = read_split(cfg.prompts, cfg.heldout, solved)
    shots = kind.shots if cfg.shots is None else cfg.shots
    template = read_template(cfg, kind, shots)
    if template and kind.needs and not ("context" in kind.needs and (context or shots)):
        demand(rows + heldout, kind.needs, f"{cfg.context} without --context-file or --shots")
    if imitated:
        demand(rows, EXPERT, f"--method {cfg.method}")
    pool = {row["prompt"]: row for row in rows if isinstance(row["prompt"], str) and expert(row)}
    pool = sorted(pool.values(), key=lambda row: len(chat.encode(row["prompt"] + expert(row))))
    if 0 < shots >= len(pool):
        raise BadInput(f"{cfg.prompts}: too few different texts with an answer for --shots {shots}")
    show = partial(file_example, cfg.context, context, template)
    scorer, anchors, kept = make_scorer(cfg.score, heldout), [], []
    if cfg.anchor_file:
        anchors, kept = (
            [Example("anchor", row.get("context"), row["prompt"], "", "", row=row) for row in part]
            for part in read_split(cfg.anchor_file)
        )
    texts = read_paragraphs(cfg.unrelated, chat, max_len) if cfg.unrelated else ()

    attempt = cfg.max_new_tokens * ("{attempt}" in template)
    longest = [show(row, pool[len(pool) - shots :]) for row in rows + heldout]
    for e in longest + anchors + kept:
        new = max(cfg.max_new_tokens, imitated and len(chat.encode(e.expert)) + 1) + attempt
        for prompt in (student_prompt, teacher_prompt):  # none is ever cut
            over = len(prompt(chat, e)) + new - max_len
            if over > 0:
                said = f"{e.row['where']}: {prompt.__name__} and {new} new tokens exceed the"
                said += f" model's {max_len} positions by {over}: shorten it, or --max-new-tokens"
                raise BadInput(said)

    def draw(rng, row=None):
        row = row or rng.choice(rows)
        others = rng.sample(pool, shots and shots + 1)  # one too many: never the prompt's own line
        return show(row, [shot for shot in others if shot["prompt"] != row["prompt"]][:shots])

    def grade(example, text):
        return {"score": scorer(text, example.row)} if scorer else {}

    def after(example, attempt):
        return replace(example, asked=dressed(template, example.row, attempt))

    rng, count = seeded("held-out shots"), min(len(heldout), cfg.eval_size)
    shown = [draw(rng, row) for row in heldout + rows]
    suites = {"anchors": kept[: cfg.eval_size]} if kept else {}
    shared = os.path.commonprefix([teacher_prompt(chat, e)[:-1] for e in shown])
    anchor = (lambda rng: rng.choice(anchors)) if anchors else None
    done = after if attempt else kind.after
    return Task(cfg.context, chat, draw, anchor, shown[:count], suites, grade, shared, done, texts)
