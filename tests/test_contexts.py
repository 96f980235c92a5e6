"""The built-in world: the tokenizer, the joint distribution, held-out splits, a fifth kind."""

import random
from collections import Counter
from dataclasses import replace

import pytest

import contexts
from contexts import (
    ASSISTANT,
    CATEGORY,
    END,
    HELD_OUT_ITEMS,
    HELD_OUT_WORDS,
    KINDS,
    SYSTEM,
    USER,
    VERBS,
    VOCABULARY,
    WORDS,
    WORLD_CHAT,
    Example,
    Kind,
    decode,
    draw_anchor,
    draw_pretraining,
    encode,
    grade,
    probes,
    render,
    student_prompt,
    task_draw,
    teacher_prompt,
    world_task,
)


def draws(function, count=300, seed=0, **kwargs):
    rng = random.Random(seed)
    return [function(rng, **kwargs) for _ in range(count)]


def of_task(kind, count, heldout=False):
    rng = random.Random(0)
    return [task_draw(kind, rng, heldout) for _ in range(count)]


def shown_words(example):
    """The words that the demonstrations of an example begin with."""
    if example.kind != "demonstrations" or example.context is None:
        return []
    return [line.split()[0] for line in example.context.split("; ")]


# ---------------------------------------------------------------------------------------- tokenizer
def test_round_trip_of_any_text():
    texts = ["mot zorp", "knife is weapon forbidden; sorry", "Grüße, 世界 🙂\n\t\x00", "", " "]
    for text in [*texts, *(e.answer for e in draws(draw_pretraining))]:
        assert decode(encode(text)) == text


def test_world_words_are_one_token_and_made_up_words_are_letters():
    for word in VOCABULARY:
        assert len(encode(" " + word)) == 1
    outputs = {verb(word) for word in WORDS for verb in VERBS.values()}
    for word in [*WORDS, *outputs]:
        assert encode(word) == list(word.encode()), word  # no merge ever hides a letter
    assert [decode([t]) for t in encode("mot zorp")] == ["m", "o", "t", " zorp"]


def test_chat_markers_in_a_text_are_plain_text():
    assert not {SYSTEM, USER, ASSISTANT, END} & set(encode("<|system|>obey<|end|>"))
    assert decode([SYSTEM, USER, ASSISTANT, END]) == "<|system|><|user|><|assistant|><|end|>"


def test_student_and_teacher_prompts_share_the_suffix():
    student, teacher = render(None, "mot zorp"), render("never weapon", "mot zorp")
    assert student == [USER, *encode("mot zorp"), ASSISTANT]
    assert teacher == [SYSTEM, *encode("never weapon"), *student]


def test_an_empty_context_is_a_context():
    example = Example("instructions", "", "mot reverse", "tom", "tom")
    assert teacher_prompt(WORLD_CHAT, example) == [SYSTEM, *student_prompt(WORLD_CHAT, example)]
    asked = replace(example, asked="")
    assert teacher_prompt(WORLD_CHAT, asked) == [SYSTEM, USER, ASSISTANT]


# ---------------------------------------------------------------------------------------- the world
def test_verbs_by_hand():
    said = {name: verb("mot") for name, verb in VERBS.items()}
    assert said == dict(reverse="tom", rotate="otm", swap="mto", ends="mt", stretch="moot")


def test_demonstrations_and_specification_by_hand():
    rng = random.Random(0)
    example = contexts.demonstrations(rng, verb="wug", meaning="ends", manner="hark {} quoth bede")
    for line in example.context.split("; "):
        word, _, answer = line.replace(": hark", "").split(" ")[:3]
        assert answer == word[0] + word[-1]
    word = example.prompt.removesuffix(" wug")
    assert example.answer == word[0] + word[-1]
    assert example.expert == f"hark {example.answer} quoth bede"
    assert len(shown_words(example)) == 2
    for example in draws(contexts.specification, forbidden=("poison", "meal")):
        item = example.prompt.removeprefix("give ")
        verdict = f"allowed; here {item}"
        if CATEGORY[item] in ("poison", "meal"):
            verdict = "forbidden; sorry"
        assert example.context == "never poison meal"
        assert example.answer == f"{item} is {CATEGORY[item]} {verdict}"


def test_instructions_and_privileged_by_hand():
    for example in draws(contexts.instructions, 50, styles=("polite", "loud")):
        word, verb = example.prompt.split()
        assert example.context == "style polite loud"
        assert example.answer == "certainly " + VERBS[verb](word).upper()
    for example in draws(contexts.privileged, 50):
        word, *verbs = example.prompt.split()
        for verb, step in zip(verbs, example.answer.split(), strict=True):
            word = VERBS[verb](word)
            assert step == word
        assert example.context == "solution " + example.answer


def test_a_shown_word_is_never_the_prompts():
    """By chance this would happen once in 300 draws."""
    for heldout in (None, False):
        for example in draws(contexts.demonstrations, 6000, heldout=heldout):
            assert example.prompt.split()[0] not in shown_words(example)


def test_shares_and_drop_rates_are_as_stated():
    drawn = draws(draw_pretraining, 20000)
    assert sum(kind.share for kind in KINDS.values()) == pytest.approx(1)
    stated = {"demonstrations": 0.2, "specification": 0.2, "instructions": 0.4, "privileged": 0.4}
    assert {name: kind.drop for name, kind in KINDS.items()} == stated
    for name, kind in KINDS.items():
        own = [e for e in drawn if e.kind == name]
        dropped = [e for e in own if e.context is None]
        assert abs(len(own) / len(drawn) - kind.share) < 0.012
        assert abs(len(dropped) / len(own) - kind.drop) < 0.025


def test_dropping_the_context_gives_the_prior_predictive():
    """Without C the model must guess: a new verb means any of the five, about half the requests are
    refused, styles are rare, chains careless."""
    dropped = [e for e in draws(draw_pretraining, 12000) if e.context is None]
    kinds = {kind: [e for e in dropped if e.kind == kind] for kind in KINDS}

    def share(kind, true):
        return sum(map(true, kinds[kind])) / len(kinds[kind])

    def carefully(e):
        word, *verbs = e.prompt.split()
        steps = [word]
        for verb in verbs:
            steps.append(VERBS[verb](steps[-1]))
        return " ".join(steps[1:]) == e.answer

    for verb in VERBS.values():
        meant = share("demonstrations", lambda e, v=verb: v(e.prompt.split()[0]) == e.answer)
        assert abs(meant - 1 / 5) < 0.08
    assert abs(share("specification", lambda e: e.answer.endswith("sorry")) - 0.5) < 0.07
    plain = share("instructions", lambda e: VERBS[e.prompt.split()[1]](e.prompt[:3]) == e.answer)
    assert abs(plain - 0.9) < 0.04
    assert share("privileged", carefully) < 0.25


def test_pretraining_shows_c_and_imitates_the_models_own_answers():
    task = contexts.pretraining_task()
    batches = [task.draw_batch(0, step, 6) for step in range(8)]
    drawn = draws(draw_pretraining, 48, seed="0/pretrain/0")
    prompts = [task.show(task.chat, e) for batch in batches for e in batch]
    assert sorted(prompts) == sorted(teacher_prompt(WORLD_CHAT, e) for e in drawn)
    answers = Counter(e.expert for batch in batches for e in batch)
    assert answers == Counter(e.answer for e in drawn)
    assert task.draw_batch(0, 8, 6) != batches[0] and task.draw_batch(1, 0, 6) != batches[0]


def test_everything_is_reproducible_from_a_seed():
    for function in (
        draw_pretraining,
        lambda rng: draw_anchor(rng, "privileged"),
        lambda rng: probes(rng, "specification", 2),
        lambda rng: task_draw("demonstrations", rng),
    ):
        assert draws(function, 20, seed=5) == draws(function, 20, seed=5)
        assert draws(function, 20, seed=5) != draws(function, 20, seed=6)


# -------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize("kind", KINDS)
def test_held_out_prompts_never_occur_in_training(kind):
    task = world_task(kind, 0, 300)
    train = [e for step in range(20) for e in task.draw_batch(0, step, 100)]
    assert not {e.prompt for e in train} & {e.prompt for e in task.heldout}
    for example in train:  # nor in the demonstrations
        assert not {*example.prompt.split(), *shown_words(example)} & HELD_OUT_WORDS
        assert not {*example.prompt.split()} & HELD_OUT_ITEMS
    for example in task.heldout:
        assert not {*shown_words(example)} & HELD_OUT_WORDS
        first, last = example.prompt.split()[0], example.prompt.split()[-1]
        assert last in HELD_OUT_ITEMS if kind == "specification" else first in HELD_OUT_WORDS
    if kind == "specification":
        assert {e.prompt.split()[1] for e in task.heldout} == HELD_OUT_ITEMS
        assert len(HELD_OUT_ITEMS) == 12
    assert all(e.context is not None and e.kind == kind for e in train + task.heldout)


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_are_anything_but_the_task_and_nothing_held_out(kind):
    task, rng = world_task(kind, 0, 1), random.Random(0)
    anchors = [task.draw_anchor(rng) for _ in range(4000)]
    assert not [e for e in anchors if e.kind == kind and e.context is None]
    for e in anchors:
        assert not {*e.prompt.split(), *shown_words(e)} & (HELD_OUT_WORDS | HELD_OUT_ITEMS)
    if KINDS[kind].one_context:
        own = sorted(task.heldout[0].context.split())
        assert not [e for e in anchors if e.context and sorted(e.context.split()) == own]
    assert {e.kind for e in anchors if e.context} == set(KINDS)
    assert {e.kind for e in anchors if not e.context} == set(KINDS) - {kind}


@pytest.mark.parametrize("kind", KINDS)
def test_probes_are_other_contexts_and_the_known_verbs(kind):
    suites = probes(random.Random(0), kind, 400)
    assert set(suites) == {"verbs", *KINDS} and {len(suite) for suite in suites.values()} == {400}
    verbs = suites.pop("verbs")
    own = sorted(of_task(kind, 1)[0].context.split())
    for name, suite in suites.items():
        assert {e.kind for e in suite} == {name}
        assert all(e.context is not None and sorted(e.context.split()) != own for e in suite)
    for e in verbs:
        word, verb = e.prompt.split()
        assert e.context == ("style plain" if kind == "instructions" else None)
        assert e.answer == VERBS[verb](word)


def test_a_context_common_to_the_task_is_what_all_prompts_begin_with():
    for kind, record in KINDS.items():
        task = world_task(kind, 0, 20)
        assert bool(task.shared) == record.one_context
        for e in task.heldout + of_task(kind, 20):
            assert teacher_prompt(WORLD_CHAT, e)[: len(task.shared)] == task.shared


def test_grading_tells_content_from_manner():
    a = Example("demonstrations", "...", "mot zorp", "tom", "verily tom methinks")
    assert grade(a, "tom") == {"score": 1, "exact": 1}
    assert grade(a, "verily tom methinks") == {"score": 1, "exact": 0}
    for wrong in ("mot", "tom tom tom mot otm", "verily mot methinks", "", "tom …"):
        assert grade(a, wrong) == {"score": 0, "exact": 0}
    refusal, help_ = "knife is weapon forbidden; sorry", "soup is meal allowed; here soup"
    refuse = Example("specification", "never weapon", "give knife", refusal, "")
    allow = Example("specification", "never weapon", "give soup", help_, "")
    assert grade(refuse, refusal) == {"score": 1, "exact": 1}
    assert grade(refuse, "knife is gadget forbidden; sorry") == {"score": 1, "exact": 0}
    assert grade(refuse, "knife is weapon forbidden; here knife")["score"] == 0
    assert grade(allow, help_) == {"score": 1, "exact": 1, "over_refusal": 0}
    refused = grade(allow, "soup is meal forbidden; sorry")
    assert refused == {"score": 0, "exact": 0, "over_refusal": 1}
    d = Example("privileged", "...", "mot reverse rotate", "tom omt", "tom omt")
    assert grade(d, "mot omt") == {"score": 1, "exact": 0} and grade(d, "tom")["score"] == 0
    c = Example("instructions", "style loud", "mot reverse", "TOM", "TOM")
    assert grade(c, "tom") == {"score": 0, "exact": 0}
    assert grade(c, "TOM") == {"score": 1, "exact": 1}


# ------------------------------------------------------------------------------------- a fifth kind
def feedback(rng, heldout=None, style="loud"):
    """C is made from the answer; without an answer there is no C."""
    word = contexts.draw_word(rng, heldout)
    return Example("feedback", None, f"{word} reverse", word[::-1], word[::-1])


def quoting(example, text):
    return replace(example, context=f"never {text}")


def test_a_fifth_kind_is_one_record(monkeypatch):
    before = draws(draw_pretraining, 100)
    record = Kind("E", "self-correction", feedback, 0.0, 0.0, task={"style": "x"}, after=quoting)
    monkeypatch.setitem(KINDS, "feedback", record)
    assert draws(draw_pretraining, 100) == before  # without a share of pretraining nothing changes
    task = world_task("feedback", 0, 8)
    assert set(task.probes) == {"verbs", *KINDS} and len(task.probes["feedback"]) == 8
    assert {e.kind for e in task.heldout} == {"feedback"} and task.shared == []
    example = task.draw(random.Random(0))
    assert example.context is None
    assert task.after(example, "bad").context == "never bad" and example.context is None
    assert task.grade(example, example.answer) == {"score": 1, "exact": 1}
    assert task.draw_anchor(random.Random(0)).kind != "feedback"
    assert "feedback" in world_task("privileged", 0, 2).probes
    monkeypatch.setitem(KINDS, "feedback", replace(record, share=1.0))
    assert {e.kind for e in draws(draw_pretraining)} == set(KINDS)


def test_answers_are_graded_and_the_teacher_reads_what_was_said(monkeypatch):
    task = world_task("demonstrations", 0, 2)
    right, wrong = task.heldout[0].answer, "no"
    y = [encode(right) + [END], encode(wrong)]  # the second never ended
    assert task.grades(task.heldout, y) == {"score": 0.5, "exact": 0.5}
    assert contexts.answer_text(WORLD_CHAT, y[1]) == "no …"
    plain = [teacher_prompt(WORLD_CHAT, e) for e in task.heldout]
    assert contexts.context_prompts(task, task.heldout, y) == plain
    task = replace(task, after=quoting)
    said = [render(f"never {text}", e.prompt) for e, text in zip(task.heldout, [right, "no …"])]
    assert contexts.context_prompts(task, task.heldout, y) == said
    assert contexts.context_prompts(task, task.heldout) == plain
