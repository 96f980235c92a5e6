"""Your own model and files: chat templates, tokenizers, contexts, templates, shots, scores. What is
wrong is said in one line, with file and line number."""

import json
import random
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from conftest import CHATML, ROOT, tiny_checkpoint

import contexts
from contexts import (
    KINDS,
    BadInput,
    Chat,
    Kind,
    file_task,
    open_chat,
    read_context,
    read_prompts,
    reading,
    student_prompt,
    teacher_prompt,
)

NUMBERS = range(20, 36)
ROWS = [
    {
        "prompt": f"What is {a}?",
        "answer": f"{a}",
        "demonstration": f"It is {a}.",
        "solution": f"{a} = {a}",
    }
    for a in NUMBERS
]
PIRATE = [
    {"role": "system", "content": "Be a pirate."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Arr!"},
]
HEADER = "<|im_start|>assistant\n"


def lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turn(role, content):
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "pirate.json").write_text(json.dumps(PIRATE))
    (tmp_path / "spec.md").write_text("# Rules\n\nNever {say} no.\n")
    lines(tmp_path / "train.jsonl", ROWS)
    asked = [row | {"prompt": row["prompt"].replace("What is", "Tell me")} for row in ROWS[:6]]
    lines(tmp_path / "heldout.jsonl", asked)
    return tmp_path


def settings(files, context, **changes):
    """The fields of train.Config that file_task reads."""
    shown = {"specification": "spec.md", "instructions": "pirate.json"}.get(context)
    cfg = dict(
        context=context,
        prompts=str(files / "train.jsonl"),
        heldout=str(files / "heldout.jsonl"),
        context_file=shown and str(files / shown),
        template=None,
        shots=None,
        score="none",
        anchor_file=None,
        method="cosd",
        max_new_tokens=8,
        eval_size=128,
    )
    return SimpleNamespace(**cfg | changes)


def task_of(files, checkpoint, context, **changes):
    return file_task(settings(files, context, **changes), open_chat(checkpoint, 264), 512)


def texts(task, example):
    """(what the student reads, what the teacher reads)"""
    chat = task.chat
    return [chat.decode(f(chat, example)) for f in (student_prompt, teacher_prompt)]


# -------------------------------------------------------------------- what student and teacher read
def test_a_own_demonstration_is_sdfts_template(files, checkpoint):
    task = task_of(files, checkpoint, "demonstrations", shots=0)
    student, teacher = texts(task, task.heldout[0])
    assert student == turn("user", "Tell me 20?") + HEADER
    dressed = (
        "Tell me 20?\n\nThis is an example for a response to the question:\nIt is 20.\n\n"
        "Now answer with a response of your own, including the thinking process."
    )
    assert teacher == turn("user", dressed) + HEADER


def test_a_pool_shows_k_others_and_never_the_prompts_own(files, checkpoint):
    task = task_of(files, checkpoint, "demonstrations", shots=3)
    seen, rng = set(), random.Random(0)
    for example in [task.draw(rng) for _ in range(60)]:
        student, teacher = texts(task, example)
        asked = re.findall(r"user\n(.*?)<", teacher)
        assert len(set(asked)) == len(asked) == 4
        assert asked[-1] == example.prompt and teacher.endswith(student)
        said = re.findall(r"assistant\n(It is \d+\.)<", teacher)
        assert said == [f"It is {q[8:10]}." for q in asked[:3]]  # each with its own answer
        seen |= set(asked[:3])
    assert seen == {row["prompt"] for row in ROWS}  # and so no held-out one
    four = task_of(files, checkpoint, "demonstrations")  # is the default
    assert [text.count("user") for text in texts(four, four.heldout[0])] == [1, 5]


def test_b_specification_with_deliberation(files, checkpoint):
    task = task_of(files, checkpoint, "specification")
    student, teacher = texts(task, task.heldout[0])
    system = (
        "# Rules\n\nNever {say} no.\n\nBefore you answer, say which of these rules applies to the "
        "request, if any. Then act on it."
    )
    assert student == turn("user", "Tell me 20?") + HEADER
    assert teacher == turn("system", system) + student


def test_c_turns_in_order_and_a_context_of_ones_own(files, checkpoint):
    shown = turn("system", "Be a pirate.") + turn("user", "Hi") + turn("assistant", "Arr!")
    task = task_of(files, checkpoint, "instructions")
    student, teacher = texts(task, task.heldout[0])
    assert teacher == shown + student
    assert task.chat.decode(task.shared).startswith(shown)
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "y"}]
    lines(files / "heldout.jsonl", [{"prompt": "x", "context": "Mine."}, {"prompt": chat}])
    task = task_of(files, checkpoint, "instructions")
    own = turn("system", "Mine.") + turn("user", "x") + HEADER
    assert texts(task, task.heldout[0])[1] == own
    merged = shown.replace("Be a pirate.", "Be a pirate.\n\nS")
    student = turn("system", "S") + turn("user", "y") + HEADER
    assert texts(task, task.heldout[1]) == [student, merged + turn("user", "y") + HEADER]


def test_c_traces(files, checkpoint):
    solved = [{"prompt": "1+1?", "solution": "2"}, {"prompt": "2+2?", "answer": "4"}]
    path = lines(files / "traces.jsonl", solved)
    task = task_of(files, checkpoint, "instructions", context_file=path)
    traces = (
        "Problems that were solved before, and how:\n\nProblem: 1+1?\nSolution: 2\n\n"
        "Problem: 2+2?\nSolution: 4\n\nUse what they teach."
    )
    student, teacher = texts(task, task.heldout[0])
    assert teacher == turn("system", traces) + student


def test_d_solution_and_shots_in_the_same_form(files, checkpoint):
    def dressed(q, s):
        text = (
            f"{q}\n\nThe verified solution is:\n{s}\n\nNow work out the answer in your own words."
        )
        return turn("user", text)

    task = task_of(files, checkpoint, "privileged", shots=1)
    student, teacher = texts(task, task.heldout[0])
    n = re.search(r"What is (\d+)\?", teacher)[1]
    shot = dressed(f"What is {n}?", f"{n} = {n}") + turn("assistant", f"It is {n}.")
    assert teacher == shot + dressed("Tell me 20?", "20 = 20") + HEADER
    assert "20 =" not in student


def test_rows_of_messages_are_read_as_they_are_everywhere(files, checkpoint):
    said = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    begin = [{"role": role, "content": content} for role, content in said]
    row = {"id": 7, "messages": [*begin, {"role": "assistant", "content": "d"}]}
    lines(files / "heldout.jsonl", [row])
    (read,) = read_prompts(str(files / "heldout.jsonl"))
    assert read["prompt"] == begin and read["answer"] == "d" and read["id"] == 7
    task = task_of(files, checkpoint, "instructions", score="exact")
    (example,) = task.heldout
    asked = "".join(turn(*what) for what in said) + HEADER
    assert texts(task, example)[0] == asked
    assert task.chat.decode(task.chat.target(example.prompt, example.expert)) == "d<|im_end|>"
    assert task.grade(example, "d") == {"cut_off": False, "score": 1.0}
    short = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    lines(files / "train.jsonl", [short] + [{"prompt": f"{i}", "answer": f"{i}"} for i in range(3)])
    task = task_of(files, checkpoint, "demonstrations", shots=3)  # a chat may be a shot, too
    teacher = texts(task, task.heldout[0])[1]
    assert turn("user", "a") + turn("assistant", "b") in teacher
    assert teacher.count("<|im_start|>") == 6 + len(said) + 1 and "Be kind." in teacher


def test_only_the_last_turn_of_a_chat_is_dressed(files, checkpoint):
    said = [("user", "a"), ("assistant", "b"), ("user", "c")]
    chat = [{"role": role, "content": content} for role, content in said]
    lines(files / "heldout.jsonl", [{"prompt": chat, "solution": "s"}])
    (files / "mine.txt").write_text("[{solution}] {prompt}")
    task = task_of(files, checkpoint, "privileged", template=str(files / "mine.txt"))
    begin = turn("user", "a") + turn("assistant", "b")
    student, teacher = texts(task, task.heldout[0])
    assert student == begin + turn("user", "c") + HEADER
    assert teacher == begin + turn("user", "[s] c") + HEADER


def test_b_example_turns_alone_still_get_the_deliberation(files, checkpoint):
    (files / "turns.json").write_text(json.dumps(PIRATE[1:]))
    chat = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "y"}]
    lines(files / "heldout.jsonl", [{"prompt": chat}])
    path = str(files / "turns.json")
    task = task_of(files, checkpoint, "specification", context_file=path)
    system = (
        "Before you answer, say which of these rules applies to the request, if any. "
        "Then act on it."
        "\n\nMine."  # the prompt's own system turn, without the template
    )
    shown = turn("system", system) + turn("user", "Hi") + turn("assistant", "Arr!")
    assert texts(task, task.heldout[0])[1].startswith(shown)


def test_windows_line_ends_reach_no_token(files, checkpoint):
    (files / "spec.md").write_bytes(b"One.\r\n\r\nTwo.\r\n")
    task = task_of(files, checkpoint, "specification")
    assert "One.\n\nTwo.\n\nBefore" in texts(task, task.heldout[0])[1]


def test_braces_in_the_data_are_text(files, checkpoint):
    (files / "mine.txt").write_text("[{solution}] {prompt}")
    lines(files / "heldout.jsonl", [{"prompt": "{solution} {prompt}", "answer": "{prompt}"}])
    task = task_of(files, checkpoint, "privileged", template=str(files / "mine.txt"))
    expected = turn("user", "[{prompt}] {solution} {prompt}") + HEADER
    assert texts(task, task.heldout[0])[1] == expected


def test_an_empty_context_is_a_context(checkpoint):
    chat = open_chat(checkpoint, 264)
    empty = turn("system", "") + turn("user", "x") + HEADER
    assert chat.decode(chat.render("", "x")) == empty
    assert chat.decode(chat.render(None, "x")) == turn("user", "x") + HEADER
    assert chat.render([], "x") == chat.render(None, "x")


def test_every_eighth_line_is_held_out_by_default(files, checkpoint):
    task = task_of(files, checkpoint, "instructions", heldout=None)
    held = [e.prompt for e in task.heldout]
    drawn = {task.draw(random.Random(i)).prompt for i in range(300)}
    assert held == ["What is 27?", "What is 35?"] and len(drawn) == 14 and not drawn & set(held)


def test_held_out_lines_are_never_shots(files, checkpoint):
    task = task_of(files, checkpoint, "demonstrations", heldout=None)
    for example in [task.draw(random.Random(i)) for i in range(100)] + task.heldout:
        shown = [t["content"] for t in example.context]
        assert len(shown) == 8 and not {"What is 27?", "What is 35?"} & set(shown)


def test_a_fifth_kind_from_files_with_the_students_own_attempt(files, checkpoint, monkeypatch):
    template = "{prompt}\nYou said: {attempt}\nIt should be: {solution}"
    fifth = Kind("E", "feedback", None, 0.0, 0.0, template=template)
    monkeypatch.setitem(KINDS, "feedback", fifth)
    task = task_of(files, checkpoint, "feedback")
    example = task.heldout[0]
    done = task.after(example, "{solution} {prompt}")
    student, teacher = texts(task, done)
    said = "Tell me 20?\nYou said: {solution} {prompt}\nIt should be: 20 = 20"
    assert student == turn("user", "Tell me 20?") + HEADER
    assert teacher == turn("user", said) + HEADER
    assert task.after(done, "other").asked == task.after(example, "other").asked
    lines(files / "heldout.jsonl", [{"prompt": "a"}])
    with pytest.raises(BadInput, match="heldout.jsonl:1: it lacks what --context feedback needs"):
        task_of(files, checkpoint, "feedback")
    monkeypatch.setitem(KINDS, "feedback", replace(KINDS["instructions"], after=lambda e, y: y))
    (files / "heldout.jsonl").write_text('{"prompt": "a"}')
    task = task_of(files, checkpoint, "feedback", context_file=str(files / "pirate.json"))
    assert task.after(task.heldout[0], "said") == "said"


def test_the_four_kinds_have_nothing_to_do_after_the_rollout(files, checkpoint):
    assert all(task_of(files, checkpoint, kind).after is None for kind in KINDS)


def test_ten_thousand_prompts_take_no_longer_each_than_a_thousand(files, monkeypatch):
    bars = []
    monkeypatch.setattr(contexts, "tqdm", lambda rows, said, delay: bars.append(len(rows)) or rows)
    chat = Chat(lambda c, x: list(range(20)), lambda x, y: [0], str, {0})
    seconds = []
    for count in (1000, 8000):
        lines(files / "train.jsonl", [{"prompt": f"{i}", "answer": "a"} for i in range(count)])
        lines(files / "anchors.jsonl", [{"prompt": f"{i}"} for i in range(count)])
        cfg = settings(files, "demonstrations", anchor_file=str(files / "anchors.jsonl"))
        began = time.process_time()
        file_task(cfg, chat, 512)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 24 * seconds[0]  # 8 times as many; quadratic would be 64
    assert bars == [2 * 1000 + 6, 2 * 8000 + 6]  # each is read once, under a bar


# ---------------------------------------------------------------------------- tokens and their ends
def test_all_end_tokens_of_the_generation_config_end_a_completion(tmp_path):
    chat = open_chat(str(tiny_checkpoint(tmp_path, eos=[256, 5])), 264)
    assert chat.ends == {256, 5, 257} and chat.target("Hi", "")[-1] == 257
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = tokenizer.apply_chat_template(PIRATE[:2], add_generation_prompt=True)["input_ids"]
    assert chat.render(PIRATE[:1], "Hi") == theirs


def test_plain_format_without_a_chat_template(tmp_path):
    chat = open_chat(str(tiny_checkpoint(tmp_path / "base", template=None)), 264)
    assert chat.decode(chat.render(None, "Hi?")) == "Question: Hi?\n\nAnswer:"
    shown = "Be a pirate.\n\nQuestion: Hi\n\nAnswer: Arr!\n\nQuestion: Hi?\n\nAnswer:"
    assert chat.decode(chat.render(PIRATE, "Hi?")) == shown
    assert chat.decode(chat.target("Hi?", "Yes")) == " Yes<|im_end|>"


REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
)
LOOP = "{% for m in messages %}"


@pytest.mark.parametrize(
    "template, message",
    [
        (REFUSES + CHATML, "No system role"),
        (
            CHATML.replace(LOOP, LOOP[:-3] + " if m['role'] != 'system' %}"),
            "drops one of .'system'",
        ),
    ],
)
def test_a_chat_template_without_a_system_role(tmp_path, files, template, message):
    folder = str(tiny_checkpoint(tmp_path / "model", template=template))
    with pytest.raises(BadInput, match=message) as error:
        task_of(files, folder, "instructions")
    assert "give C as turns" in str(error.value)  # and that works:
    (files / "turns.json").write_text(json.dumps(PIRATE[1:]))
    path = str(files / "turns.json")
    assert task_of(files, folder, "instructions", context_file=path).heldout


def test_a_tokenizer_that_does_not_match_the_weights(checkpoint):
    for vocabulary in (257, 400):
        message = f"it has 258 tokens, but the weights have {vocabulary}: no match"
        with pytest.raises(BadInput, match=message):
            open_chat(checkpoint, vocabulary)


# ---------------------------------------------------------------------------------------- bad input
class Unprintable(Exception):
    def __str__(self):
        raise TypeError("no text")


class Panic(BaseException):
    """Like the exception of a tokenizer whose file is damaged."""


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("a\nb"), "a b"),
        (KeyError("x"), "KeyError: 'x'"),
        (SystemExit(3), "SystemExit: 3"),
        (RecursionError("deep"), "RecursionError: deep"),
        (Unprintable(), "test_files.Unprintable: <exception str() failed>"),
        (Panic("at src/lib.rs:7"), "test_files.Panic: at src/lib.rs:7"),
        (ValueError("x" * 10_000), "x" * 500),
        (BadInput("g.json:3: bad"), None),
    ],
)
def test_whatever_goes_wrong_is_one_line(error, said):
    with pytest.raises(BadInput) as raised, reading("f.json"):
        raise error
    assert str(raised.value) == ("g.json:3: bad" if said is None else f"f.json: {said}")
    with pytest.raises(KeyboardInterrupt), reading("f.json"):
        raise KeyboardInterrupt


CHAT = '{"prompt": [{"role": "%s", "content": "a"}%s]}\n'
CASES = {
    "not JSON": ('{"prompt": "a"}\n{"prompt": "b",}\n', {}, "train.jsonl:2: "),
    "a list": ('["a"]\n', {}, "train.jsonl:1: "),
    "no prompt": ('{"promt": "a"}\n', {}, "train.jsonl:1: KeyError: 'prompt'"),
    "empty prompt": ('\n{"prompt": " "}\n', {}, 'train.jsonl:2: "prompt" must be a text'),
    "wrong type": ('{"prompt": 3}\n', {}, 'train.jsonl:1: "prompt" must be a text'),
    "a number": ('{"prompt": "a", "answer": 3}\n', {}, 'train.jsonl:1: "answer" must be a text'),
    "empty context": ('{"prompt": "a", "context": ""}\n', {}, 'train.jsonl:1: "context" must be'),
    "empty file": (" \n", {}, "train.jsonl: the file is empty"),
    "not UTF-8": (b'{"prompt": "\xe9"}\n', {}, "train.jsonl: 'utf-8' codec can't decode"),
    "half a character": (
        '{"prompt": "\\ud800"}\n',
        {},
        "train.jsonl:1: 'utf-8' codec can't encode",
    ),
    "too deep": ("[" * 100000, {}, "train.jsonl:1: RecursionError"),
    "chat without user": (CHAT % ("assistant", ""), {}, "train.jsonl:1: prompt: after an"),
    "chat of a robot": (CHAT % ("robot", ""), {}, "found: robot"),
    "empty turn": (CHAT.replace('"a"', '" "') % ("user", ""), {}, "none empty"),
    "chat ends wrongly": (
        CHAT % ("user", ', {"role": "assistant", "content": "b"}'),
        {},
        "found: user assistant",
    ),
    "context ends with user": (
        '{"prompt": "a", "context": [{"role": "user", "content": "b"}]}\n',
        {},
        "train.jsonl:1: context: after an optional system turn",
    ),
    "too few": ('{"prompt": "a"}\n', dict(heldout=None), "every eighth line is held out"),
    "missing file": (None, dict(prompts="nowhere.jsonl"), "No such file or directory"),
    "no context": (None, dict(context_file=None), "train.jsonl:1: it lacks what"),
    "file ends with user": (
        None,
        dict(context_file='c.json=[{"role": "user", "content": "a"}]'),
        "c.json: context: after an optional system turn",
    ),
    "empty chat": (None, dict(context_file="c.json=[]"), "c.json: context: after an"),
    "context not JSON": (
        None,
        dict(context_file="c.json=[\n{]"),
        "c.json: Expecting property name",
    ),
    "trace without solution": (
        None,
        dict(context_file='c.jsonl={"prompt": "a"}'),
        "c.jsonl:1: a solved problem needs a text prompt and a solution: KeyError: 'answer'",
    ),
    "trace of turns": (
        None,
        dict(context_file="c.jsonl=" + CHAT[:-2] % ("user", "") + ', "answer": "b"}'),
        "c.jsonl:1: a solved problem needs a text prompt and a solution: TypeError",
    ),
    "too long": (None, dict(context_file="c.txt=" + "x" * 600), "tokens too many"),
    "no demonstration": (
        '{"prompt": "a", "solution": "s"}\n',
        dict(context="demonstrations", shots=0),
        "train.jsonl:1: it lacks what --context demonstrations needs: KeyError: 'answer'",
    ),
    "no solution": (
        '{"prompt": "a", "demonstration": "s"}\n',
        dict(context="privileged"),
        "train.jsonl:1: it lacks what --context privileged needs: KeyError: 'answer'",
    ),
    "small pool": (
        '{"prompt": "a", "answer": "b"}\n' * 9,
        dict(context="demonstrations"),
        "too few different prompts with answers: --shots 4",
    ),
    "nothing to imitate": (
        '{"prompt": "a"}\n',
        dict(method="sft"),
        "train.jsonl:1: --method sft needs demonstration or solution or answer",
    ),
    "no answer": (
        None,
        dict(score="exact", heldout='h.jsonl={"prompt": "a"}'),
        "h.jsonl:1: --score exact on '': KeyError: 'answer'",
    ),
    "no number": (
        None,
        dict(score="number", heldout='h.jsonl={"prompt": "a", "answer": "b"}'),
        "h.jsonl:1: --score number",
    ),
    "bad pattern": (None, dict(score="regex:("), "heldout.jsonl:1: --score regex:("),
    "unknown score": (
        None,
        dict(score="vibes"),
        "--score vibes: there is no vibes; choose from none, exact, contains",
    ),
    "score without file": (None, dict(score="gone.py:f"), "gone.py"),
    "template without its place": (
        None,
        dict(template="t.txt=nothing"),
        "t.txt: the names in braces must be {context}",
    ),
    "template with another place": (
        None,
        dict(template="t.txt={context} {answer}"),
        "t.txt: the names in braces must be {context}",
    ),
    "one anchor": (None, dict(anchor_file='a.jsonl={"prompt": "a"}'), "a.jsonl: every eighth line"),
}


@pytest.mark.parametrize("prompts, changes, message", CASES.values(), ids=CASES)
def test_bad_input_is_one_line_with_file_and_line_number(
    files, checkpoint, prompts, changes, message
):
    if prompts is not None:
        content = prompts if isinstance(prompts, bytes) else prompts.encode()
        (files / "train.jsonl").write_bytes(content)
    for name, value in changes.items():
        if name != "score" and "=" in str(value):  # "c.json=content" writes a file first
            file, _, content = value.partition("=")
            (files / file).write_text(content)
            changes = changes | {name: str(files / file)}
    with pytest.raises(BadInput) as error:
        task_of(files, checkpoint, **dict(context="instructions") | changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_too_long_says_by_how_many_tokens(files, checkpoint):
    task = task_of(files, checkpoint, "instructions")
    longest = max(len(teacher_prompt(task.chat, task.draw(random.Random(i)))) for i in range(20))
    assert task_of(files, checkpoint, "instructions", max_new_tokens=512 - longest).heldout
    with pytest.raises(
        BadInput, match="train.jsonl:1: 27 tokens too many: shorten it or lower --max-new-tokens"
    ):
        task_of(files, checkpoint, "instructions", max_new_tokens=460)
    with pytest.raises(BadInput, match=": 1 tokens too many"):
        task_of(files, checkpoint, "instructions", max_new_tokens=513 - longest)


def test_too_long_counts_what_sft_imitates_shots_in_tokens_and_attempts(
    files, checkpoint, monkeypatch
):
    lines(files / "train.jsonl", [{"prompt": "a", "answer": "x" * 600}])
    assert task_of(files, checkpoint, "instructions").heldout
    with pytest.raises(BadInput, match="train.jsonl:1: 158 tokens too many"):
        task_of(files, checkpoint, "instructions", method="sft")
    rows = [{"prompt": f"{i}", "answer": "x" * 100} for i in range(4)]
    rows += [{"prompt": f"{i}!", "answer": "☕" * 90} for i in range(3)]
    lines(files / "train.jsonl", rows)  # fewer characters, three times the tokens
    with pytest.raises(BadInput, match="tokens too many"):
        task_of(files, checkpoint, "demonstrations", shots=2)
    template = "{prompt} {attempt}"
    fifth = Kind("E", "feedback", None, 0.0, 0.0, template=template)
    monkeypatch.setitem(KINDS, "feedback", fifth)
    lines(files / "train.jsonl", ROWS)
    assert task_of(files, checkpoint, "feedback", max_new_tokens=230).heldout
    with pytest.raises(BadInput, match="tokens too many"):
        task_of(files, checkpoint, "feedback", max_new_tokens=250)  # the attempt, and the answer


def test_what_leaks_is_a_warning(files, checkpoint, capsys):
    lines(files / "heldout.jsonl", [{"prompt": f"Tell me {i}?"} for i in range(6)] + ROWS[3:5])
    task_of(files, checkpoint, "instructions")
    err = capsys.readouterr().err
    assert "heldout.jsonl:7 and 1 more held-out prompts are also trained on" in err
    lines(files / "heldout.jsonl", [{"prompt": f"Tell me {i}?"} for i in range(8)])
    task_of(files, checkpoint, "instructions")
    assert not capsys.readouterr().err


def test_few_held_out_prompts_are_a_warning(files, checkpoint, capsys):
    lines(files / "ten.jsonl", ROWS[:10])
    path = str(files / "ten.jsonl")
    for _ in range(2):
        task_of(files, checkpoint, "instructions", prompts=path, heldout=None)
    said = capsys.readouterr().err
    assert said == f"warning: {path}: 1 held out; each moves a score by 1.00\n"  # once


def test_held_out_anchors_measure_the_drift(files, checkpoint):
    rows = [{"prompt": f"Hello {i}."} for i in range(16)] + [
        {"prompt": "Bye.", "context": "Brief."}
    ]
    anchors = lines(files / "anchors.jsonl", rows)
    task = task_of(files, checkpoint, "instructions", anchor_file=anchors)
    drawn = {e.prompt: e for e in [task.draw_anchor(random.Random(i)) for i in range(300)]}
    held = [e.prompt for e in task.probes["anchors"]]
    assert held == ["Hello 7.", "Hello 15."] and len(drawn) == 15 and not set(held) & set(drawn)
    assert texts(task, drawn["Bye."])[1].startswith(turn("system", "Brief."))
    assert len(set(texts(task, drawn["Hello 1."]))) == 1  # no C of the task's
    assert task_of(files, checkpoint, "instructions").probes == {}


def test_the_shipped_files_are_sound():
    """64 to 128 prompts for each type, no held-out prompt among the training prompts, all readable."""
    data = ROOT / "notebooks" / "data"
    fields = {"questions": "prompt", "plurals": "answer", "requests": "answer", "sums": "solution"}
    for name, field in fields.items():
        rows = read_prompts(str(data / f"{name}.jsonl"))
        heldout = read_prompts(str(data / f"{name}-heldout.jsonl"))
        prompts = [row["prompt"] for row in rows + heldout]
        assert 64 <= len(rows) <= 128 and len(heldout) >= 32 and len(set(prompts)) == len(prompts)
        assert all(row[field] for row in rows + heldout)
    for name in ("pirate", "policy"):
        assert read_context(str(data / f"{name}.json"))[0]["role"] == "system"
    both = [read_prompts(str(data / f"sums{part}.jsonl")) for part in ("", "-heldout")]
    terms = [{frozenset(re.findall(r"\d+", row["prompt"])) for row in rows} for rows in both]
    assert not terms[0] & terms[1]  # nor in the other order
    for row in both[0]:
        assert eval(row["prompt"][8:-1]) == int(row["answer"])


def test_main_says_it_in_one_line(files, checkpoint, capsys):
    from train import main

    (files / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b",}\n')
    flags = f"--model {checkpoint} --context instructions --method cosd --device cpu --steps 1"
    flags += f" --prompts {files}/train.jsonl --context-file {files}/pirate.json --out {files}/out"
    assert main(flags.split()) == 2
    err = capsys.readouterr().err
    assert "train.jsonl:2: " in err and "Traceback" not in err
    assert contexts.BadInput is BadInput and not list(files.glob("out/*/state.pt"))
