"""Question 8: is a submitted fifth kind a context? Its draws come in as plain data; measure.py trains on them."""

from __future__ import annotations

import random

from contexts import KINDS, encode, render

TRAINED = (("the_teacher_beats_the_student", 2), ("the_student_learns_it", 2))
TEXTS = ("context", "prompt", "answer", "expert")
WANTED = {  # draws: how many, held out?, with the keywords that fix C?
    "mixed": (3000, None, False),
    "kept": (400, True, False),
    "other": (400, False, False),
    "train": (600, False, True),
    "heldout": (200, True, True),
}


def draw_all(ask, seed: int) -> dict:
    """All draws, some of them twice, each in a process of its own, and the grades that the kind itself gives."""
    rng, drawn = random.Random(f"{seed}/q8"), {}
    for name, (count, heldout, task) in WANTED.items():
        seeds = [rng.getrandbits(40) for _ in range(count)]
        given = dict(seeds=seeds, heldout=heldout, task=task)
        drawn[name] = ask("q8_draw", given)
        if "out" not in drawn[name]:  # the others would fail too
            return drawn
        if name == "mixed":
            drawn["again"] = ask("q8_draw", given | {"seeds": seeds[:50]})
    examples = drawn["mixed"].get("out", {}).get("examples", [])[:20]
    texts = [e.get("answer") for e in examples] if all(map(readable, examples)) else []
    if texts:
        for name, said in (("right", texts), ("wrong", ["no such answer"] * len(texts))):
            drawn[name] = ask("q8_grade", dict(examples=examples, texts=said))
    return drawn


def readable(example) -> bool:
    """Four texts, none of them empty."""
    texts = [example.get(name) for name in TEXTS] if isinstance(example, dict) else [None]
    return all(isinstance(text, str) and text.strip() for text in texts)


def disorder(drawn: dict) -> str:
    """The reason why these are not valid draws of a kind, or "" if they are."""
    for name, answer in drawn.items():
        if "out" not in answer:
            return f"{name}: {answer.get('error')}"
    for name in WANTED:
        examples = drawn[name]["out"]["examples"]
        if len(examples) != WANTED[name][0] or not all(map(readable, examples)):
            return "context, prompt, answer and expert must be texts, none of them empty"
    mixed, record = drawn["mixed"]["out"]["examples"], drawn["mixed"]["out"]["kind"]
    named = {e["kind"] for name in WANTED for e in drawn[name]["out"]["examples"]}
    if len(named) != 1 or named & KINDS.keys():
        return f"all examples must have one new kind, not {', '.join(map(str, named))}"
    if drawn["again"]["out"]["examples"] != mixed[:50]:
        return "the same rng must give the same example: everything random comes from `rng`"
    if not (drawn["mixed"]["out"]["is_kind"] == "Kind" and 0 < record["share"] <= 1):
        return "KIND must be a Kind with a share above 0 and at most 1"
    if not 0 < record["drop"] < 1:
        return "drop must be between 0 and 1: pretraining must also show prompts without C"
    longest = max(len(render(e["context"], e["prompt"]) + encode(e["answer"])) for e in mixed)
    if longest >= 128:
        return f"the longest example has {longest} tokens; it must have fewer than 128"
    prompts, answers = ({e[name] for e in mixed} for name in ("prompt", "answer"))
    if len(prompts) < 20 or len(answers) < 4:
        return f"{len(prompts)} prompts and {len(answers)} answers in all: too few"
    kept, other = ({e["prompt"] for e in drawn[n]["out"]["examples"]} for n in ("kept", "other"))
    kept |= {e["prompt"] for e in drawn["heldout"]["out"]["examples"]}
    other |= {e["prompt"] for e in drawn["train"]["out"]["examples"]}
    if shared := kept & other:
        return f"{min(shared)!r} is both a held-out prompt and another one"
    fixed = {e["context"] for name in ("train", "heldout") for e in drawn[name]["out"]["examples"]}
    if not record["task"] or len(fixed) > len({e["context"] for e in mixed}) / 2:
        return "`task` must not be empty, and must fix one context, or few"
    for name, least in (("right", 1), ("wrong", 0)):
        grades = drawn[name]["out"]
        if not all(g["score"] == g["exact"] == least for g in grades):
            return f"grade gives {grades[0]} for a {name} answer"
    if len(str(drawn["mixed"]["out"]["description"]).split()) < 10:
        return "DESCRIPTION must be a sentence of ten words or more"
    return ""


def told(mixed: list[dict]) -> str:
    """How the prompt gives the context or the answer away, or ""."""
    for e in mixed:
        if e["context"] in e["prompt"]:
            return f"the context {e['context']!r} is in the prompt {e['prompt']!r}"
        if e["answer"] in e["prompt"].split():
            return f"the answer {e['answer']!r} is in the prompt {e['prompt']!r}"
    return ""


def undecided(mixed: list[dict]) -> str:
    """Why y does not depend on C, or depends on more than C and x; else ""."""
    by_prompt, by_both = {}, {}
    for e in mixed:
        by_prompt.setdefault(e["prompt"], set()).add(e["answer"])
        by_both.setdefault((e["context"], e["prompt"]), []).append(e["answer"])
    if max(map(len, by_prompt.values())) < 2:
        return "the same prompt always has the same answer: the context decides nothing"
    repeated = [answers for answers in by_both.values() if len(answers) > 1]
    same = sum(len(set(answers)) == 1 for answers in repeated)
    if repeated and same < 0.9 * len(repeated):
        return "the same context and prompt have different answers: something else decides"
    return ""


def judge_form(drawn: dict) -> tuple[list[dict], bool]:
    """-> (parts, are the draws good enough to train on?)."""
    why = disorder(drawn)
    parts = [
        dict(name="draws_in_order", points=3, score=0 if why else 3, reasons=[why] * bool(why))
    ]
    mixed = [] if why else drawn["mixed"]["out"]["examples"]
    for name, points, check in (
        ("the_prompt_does_not_tell", 1, told),
        ("the_context_decides", 2, undecided),
    ):
        reason = "the draws are not valid" if why else check(mixed)
        score = 0 if reason else points
        parts.append(dict(name=name, points=points, score=score, reasons=[reason] * bool(reason)))
    return parts, not why


def judge_training(found: dict) -> list[dict]:
    """`found`: exact match on held-out prompts, of teacher and student before training and of the student after it."""
    said = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    teacher, before, after = found["teacher"], found["student"], found["after"]
    beats = teacher >= 0.6 and teacher >= before + 0.3
    learns = beats and after >= 0.8 * teacher
    parts = []
    for (name, points), right in zip(TRAINED, (beats, learns)):
        score, reasons = (points, []) if right else (0, [said])
        parts.append(dict(name=name, points=points, score=score, reasons=reasons))
    return parts
