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

One list of tasks, one `render`, one `grade`: nothing here knows about gradients. Every draw takes a `random.Random`.
Left out: your own files as context, and other tokenizers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import tiktoken

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


def render(context: str | None, prompt: str) -> list[int]:
    """The prompt's tokens for student (context None) and teacher alike: both end with the same assistant header."""
    system = [] if context is None else [SYSTEM, *encode(context)]
    return system + [USER, *encode(prompt), ASSISTANT]


# ================================================================================================ 2. four kinds
@dataclass(frozen=True)
class Example:
    """One draw of p(C, x, y), with what a human expert would have written down for SFT."""

    kind: str
    context: str | None                                                              # C
    prompt: str                                                                      # x
    answer: str                                                                      # y, in the model's own manner
    expert: str                                                                      # SFT's target: y in the expert's manner


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


def draw_anchor(rng: random.Random, task: str) -> Example:
    """A prompt under another context, or none: anything but the task's own. No answer is used, and nothing held out."""
    while True:
        example = draw_pretraining(rng, heldout=False)
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
