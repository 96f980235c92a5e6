"""The built-in world: the tokenizer, the joint distribution, held-out splits, scoring."""

import random
from collections import Counter

import pytest

import contexts
from contexts import (ASSISTANT, CATEGORY, END, HELD_OUT_ITEMS, HELD_OUT_WORDS, SYSTEM, TASKS, USER, VERBS, VOCABULARY, WORDS, WORLD, Example, decode,
                      draw_anchor, draw_pretraining, draw_proxy, encode, grade, probes, render)


def draws(function, count=300, seed=0, **kwargs):
    rng = random.Random(seed)
    return [function(rng, **kwargs) for _ in range(count)]


# ------------------------------------------------------------------------------------------------ tokenizer
def test_round_trip_of_any_text():
    for text in ["mot zorp", "knife is weapon forbidden; sorry", "Grüße, 世界 🙂\n\t\x00", "", " ", *(e.answer for e in draws(draw_pretraining))]:
        assert decode(encode(text)) == text


def test_world_words_are_one_token_and_made_up_words_are_letters():
    for word in VOCABULARY:
        assert len(encode(" " + word)) == 1
    outputs = {verb(word) for word in WORDS for verb in VERBS.values()}
    for word in [*WORDS, *outputs]:
        assert encode(word) == list(word.encode()), word                        # no merge ever hides a letter
    assert [decode([t]) for t in encode("mot zorp")] == ["m", "o", "t", " zorp"]


def test_chat_markers_in_a_text_are_plain_text():
    assert not {SYSTEM, USER, ASSISTANT, END} & set(encode("<|system|>obey<|end|>"))
    assert decode([SYSTEM, USER, ASSISTANT, END]) == "<|system|><|user|><|assistant|><|end|>"


def test_student_and_teacher_prompts_share_the_suffix():
    student, teacher = render(None, "mot zorp"), render("never weapon", "mot zorp")
    assert student == [USER, *encode("mot zorp"), ASSISTANT]
    assert teacher == [SYSTEM, *encode("never weapon"), *student]


# ------------------------------------------------------------------------------------------------ the world
def test_verbs_by_hand():
    assert {name: verb("mot") for name, verb in VERBS.items()} == {"reverse": "tom", "rotate": "otm", "swap": "mto", "ends": "mt", "stretch": "moot"}


def test_the_four_kinds_by_hand():
    rng = random.Random(0)
    example = contexts.demonstrations(rng, verb="wug", meaning="ends", manner="hark {} quoth bede")
    shown = example.context.split("; ")
    assert len(shown) == 2
    for line in shown:
        word, _, answer = line.replace(": hark", "").split(" ")[:3]
        assert answer == word[0] + word[-1]
    word = example.prompt.removesuffix(" wug")
    assert example.answer == word[0] + word[-1] and example.expert == f"hark {example.answer} quoth bede" and word not in example.context

    for example in draws(contexts.specification, forbidden=("poison", "meal")):
        item = example.prompt.removeprefix("give ")
        bad = CATEGORY[item] in ("poison", "meal")
        assert example.context == "never poison meal"
        assert example.answer == f"{item} is {CATEGORY[item]} " + ("forbidden; sorry" if bad else f"allowed; here {item}")

    for example in draws(contexts.instructions, 50, styles=("polite", "loud")):
        word, verb = example.prompt.split()
        assert example.context == "style polite loud" and example.answer == "certainly " + VERBS[verb](word).upper()

    for example in draws(contexts.privileged, 50):
        word, *verbs = example.prompt.split()
        for verb, step in zip(verbs, example.answer.split(), strict=True):
            word = VERBS[verb](word)
            assert step == word
        assert example.context == "solution " + example.answer


def test_dropping_the_context_gives_the_prior_predictive():
    """Without C the model must guess: a new verb means any of the five, about half the requests are refused, styles are rare, chains careless."""
    dropped = [e for e in draws(draw_pretraining, 12000) if e.context is None]
    kinds = {kind: [e for e in dropped if e.kind == kind] for kind in WORLD}
    meanings = Counter(name for e in kinds["demonstrations"] for name, verb in VERBS.items() if verb(e.prompt.split()[0]) == e.answer)
    assert all(abs(meanings[name] / len(kinds["demonstrations"]) - 1 / 5) < 0.08 for name in VERBS)
    refused = sum(e.answer.endswith("sorry") for e in kinds["specification"]) / len(kinds["specification"])
    assert abs(refused - 0.5) < 0.07
    plain = sum(VERBS[e.prompt.split()[1]](e.prompt.split()[0]) == e.answer for e in kinds["instructions"]) / len(kinds["instructions"])
    assert abs(plain - 0.9) < 0.04
    solved = []
    for e in kinds["privileged"]:
        word, *verbs = e.prompt.split()
        steps = [word]
        for verb in verbs:
            steps.append(VERBS[verb](steps[-1]))
        solved.append(" ".join(steps[1:]) == e.answer)
    assert sum(solved) / len(solved) < 0.25
    share = Counter(e.kind for e in draws(draw_pretraining, 12000))
    assert all(abs(share[kind] / 12000 - WORLD[kind][1]) < 0.02 for kind in WORLD)
    assert sum(share for _, share, _ in WORLD.values()) == pytest.approx(1)


def test_everything_is_reproducible_from_a_seed():
    for function in (draw_pretraining, draw_proxy, *TASKS.values(), lambda rng: draw_anchor(rng, "privileged"), lambda rng: probes(rng, "specification", 2)):
        assert draws(function, 20, seed=5) == draws(function, 20, seed=5) != draws(function, 20, seed=6)


# ---------------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize("kind", TASKS)
def test_held_out_prompts_never_occur_in_training(kind):
    train, heldout = draws(TASKS[kind], 2000), draws(TASKS[kind], 300, heldout=True)
    assert not {e.prompt for e in train} & {e.prompt for e in heldout}
    for example in train:
        inputs = {example.prompt.split()[0], *(shown.split()[0] for shown in example.context.split("; "))}   # also those of the demonstrations
        assert not inputs & HELD_OUT_WORDS and (kind != "specification" or example.prompt.split()[1] not in HELD_OUT_ITEMS)
    if kind == "specification":
        assert {e.prompt.split()[1] for e in heldout} == HELD_OUT_ITEMS and len(HELD_OUT_ITEMS) == 12
        assert 0.4 < sum(e.answer.endswith("sorry") for e in heldout) / 300 < 0.6
    assert all(e.context is not None and e.kind == kind for e in train + heldout)


@pytest.mark.parametrize("kind", TASKS)
def test_anchors_are_anything_but_the_task_without_context(kind):
    anchors = draws(lambda rng: draw_anchor(rng, kind), 2000) + draws(lambda rng: draw_anchor(rng, kind, draw_proxy), 2000)
    assert not [e for e in anchors if e.kind == kind and e.context is None]
    inputs = lambda e: {*e.prompt.split(), *(shown.split()[0] for shown in (e.context or "").split("; ") if e.kind == "demonstrations" and shown)}
    assert not [e for e in anchors if inputs(e) & (HELD_OUT_WORDS | HELD_OUT_ITEMS)]
    if kind in ("specification", "instructions"):
        own = TASKS[kind](random.Random(0)).context.split()
        assert not [e for e in anchors if e.context and set(e.context.split()) == set(own)]
    assert {e.kind for e in anchors if e.context} == set(WORLD) and {e.kind for e in anchors if not e.context} == set(WORLD) - {kind}


@pytest.mark.parametrize("kind", TASKS)
def test_probes_are_other_contexts_and_the_known_verbs(kind):
    suites = probes(random.Random(0), kind, 40)
    assert set(suites) == {"verbs", *WORLD} and all(len(suite) == 40 for suite in suites.values())
    own = sorted(TASKS[kind](random.Random(0)).context.split())
    assert all(e.context is not None and sorted(e.context.split()) != own for name, suite in suites.items() if name != "verbs" for e in suite)
    assert all(e.context == ("style plain" if kind == "instructions" else None) and e.answer == VERBS[e.prompt.split()[1]](e.prompt.split()[0]) for e in suites["verbs"])


def test_grading_tells_content_from_manner():
    a = Example("demonstrations", "...", "mot zorp", "tom", "verily tom methinks")
    assert grade(a, "tom") == {"score": 1, "exact": 1}
    assert grade(a, "verily tom methinks") == {"score": 1, "exact": 0}
    for wrong in ("mot", "tom tom tom mot otm", "verily mot methinks", "", "tom …"):
        assert grade(a, wrong) == {"score": 0, "exact": 0}
    refuse = Example("specification", "never weapon", "give knife", "knife is weapon forbidden; sorry", "")
    allow = Example("specification", "never weapon", "give soup", "soup is meal allowed; here soup", "")
    assert grade(refuse, refuse.answer) == {"score": 1, "exact": 1}
    assert grade(refuse, "knife is gadget forbidden; sorry") == {"score": 1, "exact": 0}
    assert grade(refuse, "knife is weapon forbidden; here knife")["score"] == 0
    assert grade(allow, "soup is meal allowed; here soup") == {"score": 1, "exact": 1, "over_refusal": 0}
    assert grade(allow, "soup is meal forbidden; sorry") == {"score": 0, "exact": 0, "over_refusal": 1}
    d = Example("privileged", "...", "mot reverse rotate", "tom omt", "tom omt")
    assert grade(d, "mot omt") == {"score": 1, "exact": 0} and grade(d, "tom")["score"] == 0
    c = Example("instructions", "style loud", "mot reverse", "TOM", "TOM")
    assert grade(c, "tom") == {"score": 0, "exact": 0} and grade(c, "TOM") == {"score": 1, "exact": 1}


def test_the_proxy_corpus_is_near_and_not_equal():
    """The same prompts and contexts; but its people have manners (A), styles nobody asked for (C), and are careful (D)."""
    real, proxy = draws(draw_pretraining, 4000), draws(draw_proxy, 4000)
    for kind in TASKS:
        rows = [[e for e in corpus if e.kind == kind] for corpus in (real, proxy)]
        assert abs(len(rows[0]) - len(rows[1])) < 250
        without = [sum(e.context is None for e in corpus) / len(corpus) for corpus in rows]
        assert abs(without[0] - without[1]) < 0.1
    assert all(e.answer == e.expert for e in proxy)
    manners = lambda corpus: sum(" " in e.answer for e in corpus if e.kind == "demonstrations")
    assert manners(real) == 0 and manners(proxy) > 500
    styled = lambda corpus: sum(bool(set(e.answer) & set("[]*! ") or e.answer.isupper()) for e in corpus if e.kind == "instructions" and e.context is None)
    assert styled(proxy) > 2 * styled(real)
    careless = lambda corpus: sum(e.answer != e.expert for e in corpus if e.kind == "privileged" and e.context is None)
    assert careless(real) > 200 and careless(proxy) == 0
