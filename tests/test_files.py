"""Your own model and files: chat templates, tokenizers, contexts, templates, shots, scores; what is wrong is said with file and line."""

import json
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CHATML, ROOT, tiny_checkpoint

import contexts
import train
from contexts import TEMPLATES, BadInput, file_task, final_number, make_scorer, open_chat, read_context, read_prompts
from model import merged_copy
from train import Config, main

ROWS = [{"prompt": f"What is {a}?", "answer": str(a), "demonstration": f"It is {a}.", "solution": f"{a} = {a}"} for a in range(20, 36)]
PIRATE = [{"role": "system", "content": "Be a pirate."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Arr!"}]


def lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "pirate.json").write_text(json.dumps(PIRATE))
    (tmp_path / "spec.md").write_text("# Rules\n\nNever {say} no.\n")
    (tmp_path / "text.txt").write_text("A plain text.\n\nWith two paragraphs.")
    lines(tmp_path / "train.jsonl", ROWS)
    lines(tmp_path / "heldout.jsonl", [row | {"prompt": row["prompt"].replace("What is", "Tell me")} for row in ROWS[:6]])
    return tmp_path


def config(files, checkpoint, context, **changes):
    paths = dict(prompts=str(files / "train.jsonl"), heldout=str(files / "heldout.jsonl"), model=checkpoint, out=str(files / "out"))
    if context in ("specification", "instructions"):
        paths["context_file"] = str(files / ("spec.md" if context == "specification" else "pirate.json"))
    return Config(**dict(context=context, method="cosd", max_new_tokens=8, device="cpu", steps=2, batch=2) | paths | changes)


def task_of(cfg, checkpoint):
    return file_task(cfg.for_method("cosd"), open_chat(checkpoint, 264), 512, 128)


def texts(task, example):
    """(what the student reads, what the teacher reads)"""
    return [task.chat.decode(task.chat.render(context, example.prompt)) for context in (None, example.context)]


def turn(role, content):
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


HEADER = "<|im_start|>assistant\n"


# ---------------------------------------------------------------------------------- what student and teacher read
def test_a_own_demonstration_is_sdfts_template(files, checkpoint):
    task = task_of(config(files, checkpoint, "demonstrations", demonstrations="own"), checkpoint)
    student, teacher = texts(task, task.heldout[0])
    assert student == turn("user", "Tell me 20?") + HEADER
    assert teacher == turn("user", "Tell me 20?\n\nThis is an example for a response to the question:\nIt is 20.\n\n"
                                   "Now answer with a response of your own, including the thinking process.") + HEADER


def test_a_pool_shows_k_others_and_never_the_prompts_own(files, checkpoint):
    task = task_of(config(files, checkpoint, "demonstrations", shots=3), checkpoint)
    seen, rng = set(), random.Random(0)
    for example in [task.draw(rng) for _ in range(60)]:
        student, teacher = texts(task, example)
        asked = re.findall(r"user\n(.*?)<", teacher)
        assert len(asked) == 4 and len(set(asked)) == 4 and asked[-1] == example.prompt and teacher.endswith(student)
        assert re.findall(r"assistant\n(It is \d+\.)<", teacher) == [f"It is {q[8:10]}." for q in asked[:3]]
        seen |= set(asked[:3])
    assert len(seen) == 16 and all(q.startswith("What is") for q in seen)                           # the held-out ones are never shown
    four = task_of(config(files, checkpoint, "demonstrations"), checkpoint)
    assert [text.count("user") for text in texts(four, four.heldout[0])] == [1, 5]                  # four is the default


def test_b_specification_with_deliberation(files, checkpoint):
    task = task_of(config(files, checkpoint, "specification"), checkpoint)
    student, teacher = texts(task, task.heldout[0])
    system = "# Rules\n\nNever {say} no.\n\nBefore you answer, say which of these rules applies to the request, if any. Then act on it."
    assert teacher == turn("system", system) + student and student == turn("user", "Tell me 20?") + HEADER


def test_c_turns_traces_and_a_context_of_ones_own(files, checkpoint):
    task = task_of(config(files, checkpoint, "instructions"), checkpoint)
    student, teacher = texts(task, task.heldout[0])
    assert teacher == turn("system", "Be a pirate.") + turn("user", "Hi") + turn("assistant", "Arr!") + student
    assert task.chat.decode(task.shared).startswith(turn("system", "Be a pirate.") + turn("user", "Hi") + turn("assistant", "Arr!"))
    lines(files / "traces.jsonl", [{"prompt": "1+1?", "solution": "2"}, {"prompt": "2+2?", "answer": "4"}])
    traced = task_of(config(files, checkpoint, "instructions", context_file=str(files / "traces.jsonl")), checkpoint)
    assert turn("system", "Problems that were solved before, and how:\n\nProblem: 1+1?\nSolution: 2\n\nProblem: 2+2?\nSolution: 4\n\n"
                          "Use what they teach.") in texts(traced, traced.heldout[0])[1]
    lines(files / "heldout.jsonl", [{"prompt": "x", "context": "Mine."}, {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "y"}]}])
    mine = task_of(config(files, checkpoint, "instructions"), checkpoint)
    assert texts(mine, mine.heldout[0])[1] == turn("system", "Mine.") + turn("user", "x") + HEADER
    assert texts(mine, mine.heldout[1])[0] == turn("system", "S") + turn("user", "y") + HEADER      # a prompt with a system turn of its own
    assert texts(mine, mine.heldout[1])[1].startswith(turn("system", "Be a pirate.\n\nS") + turn("user", "Hi"))


def test_d_solution_and_shots_in_the_same_form(files, checkpoint):
    task = task_of(config(files, checkpoint, "privileged", shots=1), checkpoint)
    student, teacher = texts(task, task.heldout[0])
    dressed = lambda q, s: f"{q}\n\nThe verified solution is:\n{s}\n\nNow work out the answer in your own words."
    shown = re.search(r"What is (\d+)\?", teacher)[1]
    assert teacher == (turn("user", dressed(f"What is {shown}?", f"{shown} = {shown}")) + turn("assistant", f"It is {shown}.")
                       + turn("user", dressed("Tell me 20?", "20 = 20")) + HEADER)
    assert "20 =" not in student


def test_b_example_turns_alone_still_get_the_deliberation_and_a_prompts_own_system_turn_no_template(files, checkpoint):
    (files / "turns.json").write_text(json.dumps(PIRATE[1:]))
    lines(files / "heldout.jsonl", [{"prompt": [{"role": "system", "content": "Mine."}, {"role": "user", "content": "y"}]}])
    task = task_of(config(files, checkpoint, "specification", context_file=str(files / "turns.json")), checkpoint)
    deliberation = "Before you answer, say which of these rules applies to the request, if any. Then act on it."
    assert texts(task, task.heldout[0])[1].startswith(turn("system", deliberation + "\n\nMine.") + turn("user", "Hi") + turn("assistant", "Arr!"))


def test_windows_line_ends_reach_no_token(files, checkpoint):
    (files / "spec.md").write_bytes(b"One.\r\n\r\nTwo.\r\n")
    task = task_of(config(files, checkpoint, "specification"), checkpoint)
    assert "One.\n\nTwo.\n\nBefore" in texts(task, task.heldout[0])[1]


def test_a_template_of_ones_own_and_braces_in_the_data(files, checkpoint):
    (files / "mine.txt").write_text("[{solution}] {prompt}")
    lines(files / "heldout.jsonl", [{"prompt": "{solution} {prompt}", "answer": "{prompt}"}])
    task = task_of(config(files, checkpoint, "privileged", template=str(files / "mine.txt")), checkpoint)
    assert texts(task, task.heldout[0])[1] == turn("user", "[{prompt}] {solution} {prompt}") + HEADER


def test_every_eighth_line_is_held_out_by_default(files, checkpoint):
    task = task_of(config(files, checkpoint, "instructions", heldout=None), checkpoint)
    held = [e.prompt for e in task.heldout]
    drawn = {task.draw(random.Random(i)).prompt for i in range(300)}
    assert held == ["What is 27?", "What is 35?"] and len(drawn) == 14 and not drawn & set(held)


# ---------------------------------------------------------------------------------------------- tokens and their ends
def test_all_end_tokens_of_the_generation_config_end_a_completion(tmp_path):
    chat = open_chat(str(tiny_checkpoint(tmp_path, eos=[256, 5])), 264)
    assert chat.ends == {256, 5, 257} and chat.end == 257
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(PIRATE[:2], add_generation_prompt=True)["input_ids"]
    assert chat.render(PIRATE[:2], "unused") == theirs


def test_plain_format_without_a_chat_template(tmp_path, files):
    folder = str(tiny_checkpoint(tmp_path / "base", template=None))
    chat = open_chat(folder, 264)
    assert chat.decode(chat.render(None, "Hi?")) == "Question: Hi?\n\nAnswer:"
    assert chat.decode(chat.render(PIRATE + [{"role": "user", "content": "Hi?"}], "Hi?")) == "Be a pirate.\n\nQuestion: Hi\n\nAnswer: Arr!\n\nQuestion: Hi?\n\nAnswer:"
    assert chat.decode(chat.encode("Yes")) == " Yes"


def test_gpt2_through_tiktoken(tmp_path):
    """The checkpoint's merges.txt and vocab.json, read by tiktoken, give transformers' own token ids."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or"]
    tokens = [alphabet[b] for b in (*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173)]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    theirs = transformers.GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    chat = open_chat(str(tmp_path), len(tokens), gpt2=True)
    for text in ("hello world, hello", " 1+1=2\n\n  tabs\t", "naïve café ☕"):
        assert chat.encode(text) == theirs.encode(" " + text) and chat.decode(chat.encode(text)) == " " + text
    assert contexts.gpt2_encoding(str(tmp_path)).n_vocab == len(tokens)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert contexts.gpt2_encoding(str(tmp_path)) is None                                            # then AutoTokenizer has its say
    assert chat.ends == {len(tokens) - 1} and chat.render(None, "hello") == theirs.encode("Question: hello\n\nAnswer:")


# ------------------------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize("spec, text, answer, expected", [
    ("exact", " foxes \n", "foxes", 1), ("exact", "Foxes", "foxes", 0), ("exact", "foxes …", "foxes", 0),
    ("contains", "The answer is PARIS.", "Paris", 1), ("contains", "Lyon", "Paris", 0),
    ("regex", "it is 42", r"\b4\d\b", 1), ("regex", "it is 142", r"\b4\d\b", 0),
    ("number", "so 1,234.50 in all", "#### 1234.5", 1), ("number", "12 + 30 = 42", "42", 1), ("number", "42, no, 43", "42", 0), ("number", "none", "42", 0),
    ("contains:arr", "ARR matey", "", 1), ("regex:^A.*y$", "Arr matey", "", 1), ("regex:^A.*x$", "Arr matey", "", 0),
])
def test_scores(spec, text, answer, expected):
    row = {"answer": answer, "where": "f:1"} if answer else {"where": "f:1"}
    assert make_scorer(spec, [row])(text, row) == expected
    assert make_scorer("none", [row]) is None and final_number("-3 and -4,000") == -4000


def test_a_python_function_scores_and_its_failures_name_it(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def short(text, row):\n    return len(text) < row['limit']\ndef broken(text, row):\n    return 1 / 0\n")
    row = {"limit": 5, "where": "f:7"}
    assert [make_scorer(f"{path}:short", [row])(text, row) for text in ("abc", "abcdefg")] == [1.0, 0.0]
    with pytest.raises(BadInput, match=r"broken\('x', ...\) fails for f:7: ZeroDivisionError"):
        make_scorer(f"{path}:broken", [row])("x", row)


def test_the_pirate_score_is_not_taken_in_by_degenerate_answers():
    sys.path.insert(0, str(ROOT / "notebooks" / "data"))
    from pirate import score

    assert score("Arr, matey! Italy be Rome, the capital of the world.", {})
    for degenerate in ("aye aye aye", "Arr, aye, aye, aye, aye, aye, aye, aye, a …", "arr matey ahoy ship sea", "The sea is salty because of the ship.",
                       "", "Arr, why, matey, why, why, why, why, why, why, why, why, why …", "Rome is the capital of Italy."):
        assert not score(degenerate, {}), degenerate


# ---------------------------------------------------------------------------------------------------------- bad input
def bad(files, name, content):
    path = files / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


CASES = [
    ("not JSON", '{"prompt": "a"}\n{"prompt": "b",}\n', {}, "train.jsonl:2: not valid JSON: "),
    ("a list", '["a"]\n', {}, 'train.jsonl:1: each line must be a JSON object with a "prompt", not list'),
    ("no prompt", '{"promt": "a"}\n', {}, 'train.jsonl:1: no "prompt"; the line has promt'),
    ("empty prompt", '\n{"prompt": " "}\n', {}, 'train.jsonl:2: "prompt" is empty'),
    ("wrong type", '{"prompt": 3}\n', {}, 'train.jsonl:1: "prompt" must be text or chat turns, not int'),
    ("answer a number", '{"prompt": "a", "answer": 3}\n', {}, 'train.jsonl:1: "answer" must be text, not int'),
    ("empty file", " \n", {}, "train.jsonl: the file is empty"),
    ("not UTF-8", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', {}, "train.jsonl:2: not UTF-8 text (byte 0xe9)"),
    ("chat without user", '{"prompt": [{"role": "assistant", "content": "a"}]}\n', {}, "user and assistant must alternate, user first"),
    ("chat ends wrongly", '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n', {}, "the last turn must be the user's"),
    ("chat with a bad role", '{"prompt": [{"role": "robot", "content": "a"}]}\n', {}, 'turn 1 needs a "role" (system, user, assistant)'),
    ("too few", '{"prompt": "a"}\n', dict(heldout=None), "1 prompts are too few to hold out every eighth"),
    ("missing file", None, dict(prompts="nowhere.jsonl"), "No such file or directory: 'nowhere.jsonl'"),
    ("no context", None, dict(context_file=None), "train.jsonl:1: no context: give --context-file"),
    ("context ends with user", None, dict(context_file='c.json=[{"role": "user", "content": "a"}]'), "c.json: the last turn must be the assistant's, not the user's"),
    ("context not JSON", None, dict(context_file="c.json=[\n{]"), "c.json:2: not valid JSON"),
    ("trace without solution", None, dict(context_file='c.jsonl={"prompt": "a"}'), 'c.jsonl:1: a past problem needs a "prompt" in text and a "solution"'),
    ("too long", None, dict(context_file="c.txt=" + "x" * 600), "shorten the context, or lower --max_new_tokens"),
    ("no demonstration", '{"prompt": "a"}\n{"prompt": "b"}\n', dict(context="demonstrations", demonstrations="own"), 'train.jsonl:1: --demonstrations own needs a "demonstration"'),
    ("small pool", '{"prompt": "a", "answer": "b"}\n', dict(context="demonstrations"), "--shots 4 needs more than 4 different prompts"),
    ("no solution", '{"prompt": "a"}\n', dict(context="privileged"), "train.jsonl:1: the context of type privileged is each line's"),
    ("nothing to imitate", '{"prompt": "a"}\n', dict(method="sft"), "train.jsonl:1: --method sft needs something to imitate"),
    ("no answer to score", None, dict(score="exact", heldout='h.jsonl={"prompt": "a"}'), 'h.jsonl:1: --score exact needs an "answer"'),
    ("no number", None, dict(score="number", heldout='h.jsonl={"prompt": "a", "answer": "b"}'), "h.jsonl:1: --score number, but there is no number"),
    ("bad pattern", None, dict(score="regex:("), "heldout.jsonl:1: not a regular expression"),
    ("unknown score", None, dict(score="vibes"), "--score 'vibes': choose from none, exact, contains"),
    ("score without file", None, dict(score="gone.py:f"), "there is no file gone.py"),
    ("score that does not load", None, dict(score="s.py=1/0:f"), "fails when it is loaded: ZeroDivisionError"),
    ("score without function", None, dict(score="s.py=x = 1:f"), "has no function f"),
    ("template without its place", None, dict(template="t.txt=nothing"), "t.txt: a template for instructions needs {context}, and no other name in braces"),
    ("template with another place", None, dict(template="t.txt={context} {answer}"), "t.txt: a template for instructions needs {context}, and no other"),
    ("pool of one prompt", '{"prompt": "a", "answer": "b"}\n' * 9, dict(context="demonstrations"), "--shots 4 needs more than 4 different prompts"),
    ("no shots", None, dict(context="demonstrations", shots=0, context_file=None), "--shots 0 leaves the teacher without any demonstration"),
    ("half a character", '{"prompt": "\\ud800"}\n', {}, "train.jsonl:1: half a surrogate pair"),
    ("line's context ends with user", '{"prompt": "a", "context": [{"role": "user", "content": "b"}]}\n', {}, "train.jsonl:1: \"context\": the last turn must be the assistant's"),
    ("no perplexity", None, dict(unrelated="u.txt=x"), "u.txt: no paragraph has two tokens"),
    ("missing text", None, dict(unrelated="u.txt"), "No such file or directory: 'u.txt'"),
    ("one anchor", None, dict(anchor_file='a.jsonl={"prompt": "a"}'), "a.jsonl: one prompt is too few"),
    ("score is no number", None, dict(score="s.py=f = lambda text, row: float('nan'):f"), "the score is not a number"),
    ("alpha without adapters", None, dict(lora_alpha=4), "--export adapters and --lora_alpha need --lora RANK"),
    ("negative alpha", None, dict(lora=2, lora_alpha=-1), "--lora_alpha -1.0 must be positive"),
    ("frozen dtype without frozen weights", None, dict(teacher="ema", frozen_dtype="bf16"), "--frozen_dtype bf16 has no weights to apply to"),
    ("two low precisions", None, dict(dtype="fp16", frozen_dtype="bf16"), "--frozen_dtype bf16 does not go with fp16 autocast: use --frozen_dtype fp16"),
    ("own demonstrations of another type", None, dict(demonstrations="own"), "--demonstrations own goes with --context demonstrations"),
    ("template for a pool", None, dict(context="demonstrations", template="t.txt={prompt}"), "--template is not used with --demonstrations pool"),
    ("no such model", None, dict(model="/nowhere/model"), "--model /nowhere/model: "),
    ("anchors without file", None, dict(anchors=0.5), "--anchors needs --anchor_file"),
    ("adapters without rank", None, dict(export="adapters"), "--export adapters and --lora_alpha need --lora RANK"),
    ("unknown target", None, dict(lora=2, lora_targets="q,z"), "--lora_targets z: choose from q,k,v"),
]


@pytest.mark.parametrize("prompts, changes, message", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_is_one_line_with_file_and_line_number(files, checkpoint, capsys, prompts, changes, message):
    if prompts is not None:
        bad(files, "train.jsonl", prompts)
    flags = dict(model=checkpoint, context="instructions", method="cosd", prompts=str(files / "train.jsonl"), heldout=str(files / "heldout.jsonl"),
                 context_file=str(files / "pirate.json"), steps="1", batch="2", max_new_tokens="4", out=str(files / "out"), device="cpu")
    for name, value in changes.items():
        if isinstance(value, str) and "=" in value and not value.startswith("regex"):               # "c.json=content" writes a file first
            file, _, content = value.partition("=")
            content, tail = content.rsplit(":", 1) if name == "score" else (content, "")
            value = bad(files, file, content) + (f":{tail}" if tail else "")
        flags[name] = value
    argv = [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]
    assert main(argv) == 2
    captured = capsys.readouterr().err.strip().splitlines()
    assert message in captured[-1] and "Traceback" not in "".join(captured)
    assert not list((files / "out").glob("*/checkpoint.pt"))


def test_too_long_says_by_how_many_tokens(files, checkpoint):
    cfg = config(files, checkpoint, "instructions", max_new_tokens=100)
    task = task_of(replace(cfg, max_new_tokens=8), checkpoint)
    longest = max(len(task.chat.render(task.draw(random.Random(i)).context, "")) for i in range(20))
    with pytest.raises(BadInput, match=rf"prompt with context \({longest} tokens\) and 460 new tokens exceed the model's 512 positions by {longest + 460 - 512}:"):
        task_of(replace(cfg, max_new_tokens=460), checkpoint)


def test_too_long_counts_what_sft_imitates_and_shots_in_tokens(files, checkpoint):
    lines(files / "train.jsonl", [{"prompt": "a", "answer": "x" * 600}, {"prompt": "b", "answer": "y"}])
    cfg = config(files, checkpoint, "instructions", method="sft", heldout=str(files / "heldout.jsonl"))
    with pytest.raises(BadInput, match="train.jsonl:1: the prompt .* and 601 new tokens exceed"):
        file_task(cfg.for_method("sft"), open_chat(checkpoint, 264), 512, 8)
    lines(files / "train.jsonl", [{"prompt": f"{i}", "answer": "x" * 100} for i in range(4)] + [{"prompt": f"{i}!", "answer": "☕" * 90} for i in range(3)])
    with pytest.raises(BadInput, match="exceed the model's 512 positions"):                         # fewer characters, three times the tokens
        task_of(config(files, checkpoint, "demonstrations", shots=2), checkpoint)


def test_solved_problems_that_are_held_out_are_a_warning(files, checkpoint, capsys):
    lines(files / "traces.jsonl", [{"prompt": "Tell me 21?", "solution": "2"}])
    task_of(config(files, checkpoint, "instructions", context_file=str(files / "traces.jsonl")), checkpoint)
    assert "shows the teacher the solution of" in capsys.readouterr().err


def test_held_out_anchors_measure_the_drift(files, checkpoint):
    anchors = lines(files / "anchors.jsonl", [{"prompt": f"Hello {i}."} for i in range(16)])
    task = task_of(config(files, checkpoint, "instructions", anchor_file=anchors), checkpoint)
    drawn = {task.draw_anchor(random.Random(i)).prompt for i in range(300)}
    assert [e.prompt for e in task.probes["anchors"]] == ["Hello 7.", "Hello 15."] and len(drawn) == 14 and not drawn & {"Hello 7.", "Hello 15."}
    with pytest.raises(BadInput, match="anchors.jsonl:1: --replay real needs an \"answer\""):
        task_of(config(files, checkpoint, "instructions", anchor_file=anchors, anchors=0.5, replay="real"), checkpoint)
    anchors = lines(files / "anchors.jsonl", [{"prompt": f"Hello {i}.", "answer": "Hi!" * (1 + 200 * (i == 3))} for i in range(16)])
    with pytest.raises(BadInput, match="anchors.jsonl:4: the prompt .* and 604 new tokens exceed"):
        task_of(config(files, checkpoint, "instructions", anchor_file=anchors, anchors=0.5, replay="real"), checkpoint)
    task = task_of(config(files, checkpoint, "instructions", anchor_file=anchors), checkpoint)        # nobody reads these answers
    assert task.draw_anchor(random.Random(0)).answer.startswith("Hi!") and task.draw_proxy is None


def test_the_world_takes_no_files_and_a_model_needs_them(capsys):
    assert main(["--prompts", "x.jsonl"]) == 2 and "--prompts needs --model" in capsys.readouterr().err
    assert main(["--model", "x"]) == 2 and "--model needs --context (one type) and --prompts FILE" in capsys.readouterr().err


def test_prompts_in_both_sets_are_a_warning(files, checkpoint, capsys):
    lines(files / "heldout.jsonl", ROWS[3:5])
    task_of(config(files, checkpoint, "instructions"), checkpoint)
    err = capsys.readouterr().err
    assert "warning: 2 held-out prompts are also trained on, the first at" in err and "heldout.jsonl:1" in err and "train.jsonl:4" in err


@pytest.mark.parametrize("template, message", [
    (CHATML.replace("{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for", 1), "refuses this chat (System role not supported)"),
    (CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"), "drops a system turn"),
])
def test_a_chat_template_without_a_system_role(tmp_path, files, template, message):
    folder = str(tiny_checkpoint(tmp_path / "model", template=template))
    with pytest.raises(BadInput, match=re.escape(message)):
        task_of(config(files, folder, "instructions"), folder)
    (files / "turns.json").write_text(json.dumps(PIRATE[1:]))                                       # what the message advises
    assert task_of(config(files, folder, "instructions", context_file=str(files / "turns.json")), folder).heldout


def test_a_tokenizer_that_does_not_match_the_weights(checkpoint):
    for vocabulary in (257, 400):
        with pytest.raises(BadInput, match=f"the tokenizer has 258 tokens, the weights have {vocabulary}: they do not belong together"):
            open_chat(checkpoint, vocabulary)


def test_an_unsupported_architecture_is_refused_by_name(tmp_path, files, capsys):
    transformers.BertConfig(vocab_size=10).save_pretrained(tmp_path / "bert")
    flags = ["--model", str(tmp_path / "bert"), "--context", "instructions", "--prompts", str(files / "train.jsonl"), "--context-file", str(files / "pirate.json")]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 2
    assert "bert: this architecture is not supported. Supported: gpt2, llama" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("changes", [
    dict(context="demonstrations", score="contains"), dict(context="demonstrations", demonstrations="own", method="sft"), dict(context="specification", teacher="ema", lora=2),
    dict(context="instructions", lora=2, frozen_dtype="bf16", dtype="bf16", checkpointing=True, export="adapters"), dict(context="instructions", schedule="cosine", micro_batch=1),
    dict(context="instructions", teacher="live", schedule="constant"), dict(context="privileged", method="offline", lora=4, lora_targets="q,v"), dict(context="instructions", method="all"),
    dict(context="instructions", frozen_dtype="bf16", anchors=0.5, score="exact"), dict(context="privileged", method="gkd", gkd_lambda=0.5, export="none"),
    dict(context="instructions", dtype="fp16", frozen_dtype="fp16"), dict(context="instructions", dtype="fp16", frozen_dtype="fp16", lora=2, teacher="live"),
    dict(context="instructions", lora=2, frozen_dtype="bf16", teacher="ema", dtype="bf16"), dict(context="instructions", divergence="policy_gradient"),
])
def test_every_choice_runs_and_its_export_answers_as_the_student_does(files, checkpoint, changes):
    if changes.get("anchors"):
        changes = changes | dict(anchor_file=lines(files / "anchors.jsonl", [{"prompt": f"Hello {i}."} for i in range(15)] + [{"prompt": "Bye.", "context": "Be brief."}]))
    cfg = config(files, checkpoint, **dict(unrelated=str(files / "text.txt")) | changes)
    kept, original = {}, train.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "measure", lambda base, tuned, *rest: kept.update({rest[2].method: tuned.model}) or original(base, tuned, *rest))
        story = train.train(cfg)
    for result in story["results"]:
        assert {"teacher", "before", "after", "kl_before", "kl_after", "perplexity_before", "perplexity_after"} <= result.keys() and len(result["samples"]) >= 4
        assert ("drift" in result) == bool(changes.get("anchors")) and result["kl_before"] >= 0
        folder = Path(cfg.out) / f"{cfg.context}-{result['method']}-seed0"
        assert (folder / "checkpoint.pt").exists() == (cfg.export == "none") and (folder / "result.json").exists()
        export = folder / "export"
        if cfg.export == "merged":
            student, theirs = kept[result["method"]], transformers.AutoModelForCausalLM.from_pretrained(export)
            ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(export).apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]])
            with torch.no_grad():
                torch.testing.assert_close(theirs(ids).logits, merged_copy(student)(ids), rtol=1e-4, atol=1e-5)
            assert theirs.generation_config.eos_token_id == [257]
        assert export.exists() == (cfg.export != "none") and (export / "adapter_config.json").exists() == (cfg.export == "adapters")
    assert [r["method"] for r in story["results"]] == [cfg.method if cfg.method != "all" else "cosd"]
    assert "| KL before | KL after |" in story["report"] and "teacher, with C" in story["report"]


def test_the_flags_reach_the_model_and_the_teachers(files, checkpoint, monkeypatch):
    """Rank, alpha, targets, checkpointing, the frozen teacher's dtype; anchors are always scored by the base."""
    import model as model_module

    anchors = lines(files / "anchors.jsonl", [{"prompt": f"Hello {i}."} for i in range(9)])
    seen, checkpoints, original, checkpoint_ = [], [], train.cosd_step, model_module.checkpoint
    monkeypatch.setattr(train, "cosd_step", lambda *args, **kwargs: seen.append(args) or original(*args, **kwargs))
    monkeypatch.setattr(model_module, "checkpoint", lambda *args, **kwargs: checkpoints.append(1) or checkpoint_(*args, **kwargs))
    train.train(config(files, checkpoint, "instructions", steps=1, lora=3, lora_targets="v,q", checkpointing=True, export="adapters"))
    adapters = json.loads((files / "out/instructions-cosd-seed0/export/adapter_config.json").read_text())
    assert (adapters["r"], adapters["lora_alpha"], adapters["target_modules"]) == (3, 6.0, ["q_proj", "v_proj"]) and checkpoints
    checkpoints.clear()
    train.train(config(files, checkpoint, "instructions", steps=1, lora=3, lora_alpha=5.0, export="adapters"))
    assert json.loads((files / "out/instructions-cosd-seed0/export/adapter_config.json").read_text())["lora_alpha"] == 5.0 and not checkpoints
    seen.clear()
    train.train(config(files, checkpoint, "instructions", steps=1, frozen_dtype="bf16"))
    train.train(config(files, checkpoint, "instructions", steps=1, teacher="ema", anchors=0.5, anchor_file=anchors))
    (_, frozen, *_), (_, ema, *_), (_, base, anchored, _) = seen
    assert frozen.model.embed.weight.dtype == torch.bfloat16 and (ema.kind, base.kind) == ("ema", "frozen")
    assert base.model is not ema.model and anchored.prompts == anchored.teacher_prompts and len(anchored.prompts) == 1


@pytest.mark.parametrize("schedule, left", [
    ("decay", [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]), ("constant", [1] * 10), ("cosine", [(1 + math.cos(math.pi * s / 10)) / 2 for s in range(10)])])
def test_schedules(files, checkpoint, schedule, left):
    cfg = config(files, checkpoint, "instructions", steps=10, warmup=3, lr=1e-3, schedule=schedule, export="none")
    train.train(cfg)
    rates = [json.loads(line)["lr"] * 1e3 for line in (Path(cfg.out) / "instructions-cosd-seed0/metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([warm * rest for warm, rest in zip([0.25, 0.5, 0.75] + [1] * 7, left)], abs=1e-9)


def test_kl_to_the_teacher_by_hand(files, checkpoint):
    """KL(student‖teacher) on the student's own samples: the student without the context, the teacher with it."""
    cfg = config(files, checkpoint, "instructions", chunk=3).for_method("cosd")
    task, model = task_of(cfg, checkpoint), train.GPT.from_pretrained(checkpoint)
    examples = task.heldout[:3]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    prompts = [task.chat.render(None, e.prompt) for e in examples]
    ids, mask = model.generate(prompts, 8, eos=task.chat.ends, generator=train.torch_generator(model.device, 0, "held-out KL"))
    values = []
    for e, prompt, row, m in zip(examples, prompts, ids, mask):
        said = row[m].tolist()
        logs = []
        for start in (prompt, task.chat.render(e.context, e.prompt)):
            with torch.no_grad():
                logs.append(model(torch.tensor([start + said]))[0, len(start) - 1 : -1].log_softmax(-1))
        values.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1))
    live, frozen = train.Teacher(model, "live"), train.Teacher(model, "frozen", shared=task.shared)
    assert train.kl_to_teacher(live, frozen, examples, cfg, task.chat) == pytest.approx(torch.cat(values).mean().item(), rel=1e-4)


def test_a_run_with_adapters_is_resumed_to_the_same_bits(files, checkpoint, monkeypatch):
    cfg = config(files, checkpoint, "instructions", lora=2, steps=6, save_every=2, teacher="ema", export="adapters")
    train.train(replace(cfg, out=str(files / "whole")))
    original, calls = train.cosd_step, []

    def cosd_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "cosd_step", cosd_step)
        with pytest.raises(KeyboardInterrupt):
            train.train(cfg)
    run = Path(cfg.out) / "instructions-cosd-seed0"
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and all(name.endswith((".A", ".B")) for name in state["model"])       # small: the adapters alone
    train.train(replace(cfg, resume=True))
    adapters = [(Path(out) / "instructions-cosd-seed0/export/adapter_model.safetensors").read_bytes() for out in (cfg.out, files / "whole")]
    assert adapters[0] == adapters[1]
    with pytest.raises(BadInput, match="another configuration: files"):                             # the same names, another content
        (files / "pirate.json").write_text(json.dumps(PIRATE[:1]))
        train.train(replace(cfg, resume=True))


def test_a_refused_resume_overwrites_nothing_and_a_missing_export_is_said(files, checkpoint):
    cfg = config(files, checkpoint, "instructions", export="none")
    train.train(cfg)
    run = Path(cfg.out) / "instructions-cosd-seed0"
    with pytest.raises(BadInput, match="is complete, but there is no .*model.safetensors: run without --resume"):
        train.train(replace(cfg, resume=True, export="merged"))
    (run / "result.json").unlink()                                                                  # as if stopped before the evaluation
    before = (run / "config.json").read_bytes()
    with pytest.raises(BadInput, match="another configuration: divergence"):
        train.train(replace(cfg, resume=True, divergence="jsd"))
    assert (run / "config.json").read_bytes() == before and (run / "checkpoint.pt").exists()
    train.train(replace(cfg, resume=True, export="merged"))
    assert (run / "export" / "model.safetensors").exists()


def test_a_new_export_leaves_nothing_of_the_old_one(files, checkpoint):
    for export, name in (("adapters", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        train.train(config(files, checkpoint, "instructions", lora=2, export=export))
        found = {f.name for f in (files / "out/instructions-cosd-seed0/export").iterdir()}
        assert name in found and len({"adapter_model.safetensors", "model.safetensors"} & found) == 1


def test_broken_weights_and_adapters_that_gpt2_cannot_have(tmp_path, files, capsys):
    folder = tiny_checkpoint(tmp_path / "model")
    flags = ["--context", "instructions", "--prompts", str(files / "train.jsonl"), "--context-file", str(files / "pirate.json"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    (folder / "model.safetensors").write_bytes(b"xx")
    assert main(["--model", str(folder), *flags]) == 2 and f"--model {folder}: " in capsys.readouterr().err
    transformers.GPT2Config(vocab_size=264, n_embd=8, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    assert main(["--model", str(tmp_path / "gpt2"), *flags, "--lora", "2", "--export", "adapters"]) == 2
    assert "GPT-2 holds q, k and v in one matrix" in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "gpt2"), *flags, "--lora", "2", "--lora-targets", "gate"]) == 2
    assert "this model's MLP has no gate" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_loads_no_weights(files, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(train.GPT, "from_pretrained", None)
    assert train.train(config(files, checkpoint, "instructions", dry_run=True, lora=4))["results"] == []
    out = capsys.readouterr().out
    assert "M parameters" in out and "common to all" in out and "memory, estimated, GB: weights" in out
    assert not list((files / "out").iterdir())


def test_the_shipped_files_are_sound(checkpoint):
    """64 to 128 prompts for each type, train and held out apart, all readable."""
    data = ROOT / "notebooks" / "data"
    for name, field in (("questions", None), ("plurals", "answer"), ("requests", "answer"), ("sums", "solution")):
        rows, heldout = read_prompts(str(data / f"{name}.jsonl")), read_prompts(str(data / f"{name}-heldout.jsonl"))
        prompts = [row["prompt"] for row in rows + heldout]
        assert 64 <= len(rows) <= 128 and len(heldout) >= 32 and len(set(prompts)) == len(prompts)
        assert field is None or all(row[field] for row in rows + heldout)
    for name in ("pirate", "policy"):
        assert read_context(str(data / f"{name}.json"))[0]["role"] == "system"
    both = [read_prompts(str(data / f"sums{part}.jsonl")) for part in ("", "-heldout")]
    terms = [{frozenset(re.findall(r"\d+", row["prompt"])) for row in rows} for rows in both]
    assert not terms[0] & terms[1]                                                                  # nor in the other order
    assert all(eval(row["prompt"][8:-1]) == int(row["answer"]) for row in read_prompts(str(data / "sums.jsonl")))
    assert set(TEMPLATES) == set(contexts.TASKS)
