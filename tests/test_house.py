"""The size and the structure of the four files: they are a textbook, and must stay one."""

import ast
import importlib.util
import io
import subprocess
import sys
import tokenize
from dataclasses import fields
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
BUDGET = {"cosd.py": 2900, "model.py": 5900, "contexts.py": 5000, "train.py": 6200}
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def tokens(text):
    """Python tokens; comments and layout do not count, and a string counts once however long."""
    return [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in LAYOUT]


def count(text):
    # From Python 3.12 on an f-string comes in pieces; here, as before, it is one token.
    depth, n = 0, 0
    for token in tokens(text):
        name = tokenize.tok_name[token.type]
        n += depth == 0
        depth += (name == "FSTRING_START") - (name == "FSTRING_END")
    return n


@pytest.mark.parametrize("name", BUDGET)
def test_each_file_keeps_its_budget(name):
    assert count((ROOT / name).read_text()) <= BUDGET[name]


def test_together_they_can_be_read_in_an_evening():
    texts = [(ROOT / name).read_text() for name in BUDGET]
    assert sum(map(count, texts)) <= 20_000
    assert sum(len(text.splitlines()) for text in texts) <= 2_700


def functions(name):
    tree = ast.parse((ROOT / name).read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("name", BUDGET)
def test_no_function_is_longer_than_a_page(name):
    assert max((f.end_lineno - f.lineno + 1, f.name) for f in functions(name)) <= (60, "~")


def test_the_loop_comes_early_is_short_and_calls_backward_itself():
    (fit,) = [f for f in functions("train.py") if f.name == "fit"]
    (loop,) = [
        node
        for node in ast.walk(fit)
        if isinstance(node, ast.For) and "step" in ast.unparse(node.target)
    ]
    source = (ROOT / "train.py").read_text()
    assert loop.end_lineno <= len(source.splitlines()) / 3
    assert loop.end_lineno - loop.lineno + 1 <= 45
    body = ast.get_source_segment(source, loop)
    in_order = [
        "lr",
        "task_rows",
        "anchor_rows",
        "cosd_loss",
        "backward",
        "clip_grad_norm_",
        "scaler.step",
        "teacher.update",
        "log.append",
        "evaluate(run)",
        "save_run",
    ]
    places = [body.index(word) for word in in_order]
    assert places == sorted(places)


def test_flags():
    assert len(fields(train.Config)) + 1 <= 40  # and --preset


def test_imports_run_one_way():
    allowed = {
        "model": set(),
        "cosd": {"model"},
        "contexts": set(),
        "train": {"model", "cosd", "contexts"},
    }
    for name, may in allowed.items():
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        assert imported & (allowed.keys() | {"notebooks"}) <= may


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("command", [["format", "--check"], ["check"]])
def test_ruff_has_nothing_to_say(command):
    said = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stdout + said.stderr
