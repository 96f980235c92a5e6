"""The homework: what the student's copy contains, and whether the grader is fair.

Wrong answers must lose points in the parts that they get wrong and nowhere else; correct but unusual answers must lose none; and
a submission that tries anything must not get access to anything. See answers.py. By default a tenth of the wrong answers are
judged, on the first part that they must lose; `-m slow` judges all of them on all parts.
"""

import ast
import csv
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile
import zlib
from contextlib import nullcontext
from xml.etree import ElementTree

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
import homework
from answers import CHEATING, CHEATS, RIGHT, WRONG, bodies, changed, file_with
from homework import (
    ASKED,
    CODE,
    CODED,
    QUESTIONS,
    SHIPPED,
    Student,
    base,
    blank_out,
    blanks,
    fifth,
    find,
    grade,
    judge,
    judge_code,
    make,
    measure,
    merge,
    merged,
    parse,
    survivors,
)

REFERENCE = {name: (ROOT / name).read_text() for name in CODE}
SECONDS = 1.5  # of a case, here
HANGING = {
    "the garbage collector's list of functions",
    "an endless loop",
    "an endless sleep",
    "a flood of words",
    "all of the memory",
}
SLOW = pytest.mark.slow
SEED = 3


# ================================================================================================= is it fair?
@pytest.fixture(scope="module")
def students():
    """One process per question, for all answers here; the grader starts one for each submission."""
    open_now = {}

    def of(question):
        if question not in open_now:
            open_now[question] = (
                Student(question, SECONDS).__enter__(),
                judge.cases_of(question, SEED),
            )
        return open_now[question]

    yield of
    for student, _ in open_now.values():
        student.__exit__()


@pytest.fixture
def judged(students, tmp_path):
    """(question, text of its file, numbers of the parts or all) -> {part: result}."""

    def run(question, text, numbers=""):
        (name,) = QUESTIONS[question].files
        (tmp_path / name).write_text(text)
        student, parts = students(question)
        student.load(*merged(tmp_path, question))
        chosen = [parts[int(n) - 1] for n in numbers] or parts
        return {part["name"]: part for part in judge_code(student, chosen, SEED)}

    return run


def lost(results):
    return "".join(
        str(1 + i)
        for i, part in enumerate(p for p in judge.PARTS if p.name in results)
        if results[part.name]["score"] < part.points
    )


NAMES = [f"{w[0]}: {w[1]}" for w in WRONG]


def thinned(answers, every):
    """All answers, most of them marked slow: by default a tenth of the wrong ones and a third of the right ones are judged."""
    return [pytest.param(*a, marks=[SLOW] * bool(i % every)) for i, a in enumerate(answers)]


@pytest.mark.parametrize("question, what, parts, old, new", thinned(WRONG, 10), ids=NAMES)
def test_a_wrong_answer_loses_points(question, what, parts, old, new, judged):
    """It loses the first part that it must lose, and the grader says why."""
    (part,) = judged(question, changed(question, old, new), parts[:1]).values()
    assert part["score"] < part["points"] and all(part["reasons"])


@SLOW
@pytest.mark.parametrize("question, what, parts, old, new", WRONG, ids=NAMES)
def test_a_wrong_answer_loses_exactly_its_parts(question, what, parts, old, new, judged):
    assert lost(judged(question, changed(question, old, new))) == parts


@pytest.mark.parametrize("question", CODED)
def test_the_reference_gets_all_points(question, judged):
    found = judged(question, REFERENCE[QUESTIONS[question].files[0]])
    assert [part for part in found.values() if part["reasons"]] == []
    assert sum(part["score"] for part in found.values()) == QUESTIONS[question].points


@SLOW
@pytest.mark.parametrize("question", CODED)
def test_the_model_answer_gets_all_points(question, judged):
    found = judged(question, file_with(question, bodies(question)))
    assert [part for part in found.values() if part["reasons"]] == []


@pytest.mark.parametrize(
    "question, what, own, beside", thinned(RIGHT, 3), ids=[f"{r[0]}: {r[1]}" for r in RIGHT]
)
def test_right_answers_that_look_otherwise(question, what, own, beside, judged):
    found = judged(question, file_with(question, bodies(question, own), beside))
    assert [part for part in found.values() if part["reasons"]] == []


def test_a_reason_says_where(judged):
    """Positions for the shift, rows and tokens for rollouts, turns for contexts."""
    known = {w[:2]: w for w in WRONG}
    for question, what, says in (
        (
            "q2",
            "shifted by one the other way",
            r"position \d+ of row \d; it is predicted at position",
        ),
        ("q2", "EOS not scored", r"shape \(\d+, 16\), should have \(\d+, 16\)"),
        ("q3", "the padding counts as read", r"row \d \(a prompt of \d+ tokens\)"),
        ("q4", "example turns dropped", "has the turns"),
    ):
        _, _, parts, old, new = known[question, what]
        found = judged(question, changed(question, old, new), parts[:1])
        reasons = [reason for part in found.values() for reason in part["reasons"]]
        assert any(re.search(says, reason) for reason in reasons), reasons


def test_there_are_enough_of_both():
    questions = [w[0] for w in WRONG]
    assert len(WRONG) >= 150 and len(RIGHT) >= 18 and len(CHEATS) >= 30
    assert set(questions) == {r[0] for r in RIGHT} == set(CODED)
    assert len(set(NAMES)) == len(NAMES)


@SLOW
def test_other_numbers_are_as_just(students):
    """Every part, drawn again with other seeds, accepts the reference."""
    for question in CODED:
        student, _ = students(question)
        for seed in (11, 12):
            parts = judge.cases_of(question, seed)
            found = judge_code(student_with_reference(student, question), parts, seed)
            assert [part for part in found if part["reasons"]] == []


def student_with_reference(student, question):
    (name,) = QUESTIONS[question].files
    text = REFERENCE[name]
    student.load(
        merge(
            homework.given(name), text, ast.parse(text), homework.asked_for(question, name), name
        ),
        [],
    )
    return student


# ========================================================================================================= what it may do
def cheating(question, function, arguments, body):
    """The model answer, in which one function looks elsewhere."""
    (name,) = QUESTIONS[question].files
    text = textwrap.dedent(body).strip("\n")
    told = f'global here, given\nhere, given = "{function}", {arguments}\n'
    beside = CHEATING.format(module=name.removesuffix(".py"), root=str(ROOT))
    code = "\nCODE = b''\n"
    return file_with(question, bodies(question) | {function: told + text + "\n"}, beside + code)


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[SLOW] * (what in HANGING)) for what in CHEATS]
)
def test_a_cheat_gets_nothing_and_costs_nothing_else(what, judged):
    """The parts that need `render` are lost, the others are not; and the next submission is judged as usual."""
    found = judged("q4", cheating("q4", "render", "(context, prompt)", CHEATS[what]), "14")
    assert [part["score"] for part in found.values()] == [0, 1]
    again = judged("q4", file_with("q4", bodies("q4")), "1")
    assert [part["score"] for part in again.values()] == [2]


@SLOW
@pytest.mark.parametrize("what", CHEATS)
def test_a_cheat_gets_nothing_in_any_question(what, judged):
    found = judged("q4", cheating("q4", "render", "(context, prompt)", CHEATS[what]))
    assert [part["score"] for part in found.values()] == [0, 0, 0, 1, 2, 2]
    found = judged("q1", cheating("q1", "kl", "(log_a, log_b)", CHEATS[what]), "12345")
    assert sum(part["score"] for part in found.values()) == 0
    arguments = "(model, prompts, ids, mask, prefix)"
    found = judged("q2", cheating("q2", "completion_states", arguments, CHEATS[what]))
    assert [part["score"] for part in found.values()] == [0, 0, 0, 2, 2]


@pytest.mark.parametrize("how", ["while True: pass", "os._exit(0)", "bytearray(2**34)"])
def test_a_case_that_hangs_or_leaves_costs_its_own_points(how, judged):
    body = bodies("q4")["render"]
    body = f"import os\nif context == '':\n    {how}\n" + body
    found = judged("q4", file_with("q4", bodies("q4") | {"render": body}))
    reasons = [reason for part in found.values() for reason in part["reasons"]]
    assert len(reasons) == 1 and sum(part["score"] for part in found.values()) > 9.5


def test_what_the_students_process_can_see(students, tmp_path):
    """Nothing of this project, neither in files nor in memory."""
    student, _ = students("q4")
    seen = """
        import os, sys
        found = {"argv": sys.argv, "path": sys.path, "environment": sorted(os.environ), "modules": sorted(sys.modules)}
        found["user"], found["parent"] = os.getuid(), os.getppid()
        try:
            found["files"] = os.listdir("/")
        except OSError:
            found["files"] = []
        main = sys.modules["__main__"]
        found["main"] = sorted(vars(main))
        found["standins"] = sorted(main.STANDINS)
        return found"""
    text = file_with("q4", bodies("q4") | {"render": textwrap.dedent(seen).strip("\n") + "\n"})
    (tmp_path / "contexts.py").write_text(text)
    student.load(*merged(tmp_path, "q4"))
    found = student.ask("q4_render", dict(context=None, prompt="x"))["out"]
    assert found["argv"] == ["-c"] and found["path"] == [] and found["standins"] == []
    assert not {"judge", "homework", "cosd", "train", "pytest"} & set(found["modules"])
    assert not any("plain_" in name for name in found["main"])
    assert str(ROOT) not in json.dumps(found)
    assert {"PYTEST_CURRENT_TEST", "PWD", "OLDPWD"}.isdisjoint(found["environment"])
    assert found["files"] == [] or os.geteuid()
    assert found["user"] != 0 or os.geteuid()


def test_stand_ins_are_those_of_other_questions():
    """Each question's process has the project without any answer."""
    for question, (functions, _, _) in homework.STANDINS.items():
        asked = {a.function for a in ASKED if a.question == question}
        texts = [homework.given(name) for name in homework.BESIDE.get(question, ())]
        for text in texts:
            assert text.count("raise NotImplementedError") >= 2
        if question == "q2":
            assert "states" not in functions and "completion_states" in asked


# ============================================================================================ the student's copy
@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "homework"
    make(folder, bases=folder / "none")
    return folder


def test_what_is_asked_for_is_as_it_should_be():
    """A hint fits into a string; a blank is short; each question asks for functions of one file."""
    for file in CODE:
        for blank in blanks(file, REFERENCE[file]):
            hint = blank.asked.hint
            assert '"' not in hint and "\\" not in hint and blank.last - blank.first < 26
            assert QUESTIONS[blank.asked.question].files == (file,)
    assert {asked.question for asked in ASKED} == set(CODED)
    assert len({(asked.file, asked.function) for asked in ASKED}) == len(ASKED)
    with pytest.raises(LookupError, match="forward_kl has no statement"):
        blanks("cosd.py", REFERENCE["cosd.py"].replace("return kl(log_p, log_q)", "pass"))
    with pytest.raises(LookupError, match="cosd.py has no function forward_kl any more"):
        blanks("cosd.py", REFERENCE["cosd.py"].replace("def forward_kl(", "def forwards_kl("))


def test_the_points_are_those_of_the_table():
    for question in CODED:
        points = sum(part.points for part in judge.PARTS if part.question == question)
        assert points == QUESTIONS[question].points
    assert sum(q.points + q.by_hand for name, q in QUESTIONS.items() if name != "q8") == 100


def test_points_and_lines_of_the_handout():
    handout = re.search(
        r"<!-- questions -->(.*)<!-- instructors -->", homework.HANDOUT.read_text(), re.S
    )[1]
    sections = dict(re.findall(r"^## (q\d)\b(.*?)(?=^## |\Z)", handout, re.M | re.S))
    assert sections.keys() == QUESTIONS.keys()
    for name, question in QUESTIONS.items():
        text = sections[name]
        assert f"({question.points + question.by_hand} points" in text
        assert " minutes. Hand in " in text.replace("\n", " ")
        assert all(f"`{file}`" in text for file in question.files)
        assert "*Hint.*" in text and "*Low on resources?*" in text
        to_write = []
        for file in CODE:
            lines = REFERENCE[file].splitlines()
            for blank in blanks(file, REFERENCE[file]):
                if blank.asked.question == name:
                    to_write += lines[blank.first - 1 : blank.last]
        to_write = [line for line in to_write if not line.strip().startswith("#")]
        if to_write:
            said = int(re.search(r" (\d+) lines, ", text)[1])
            assert abs(said - len(to_write)) <= 4, f"{name}: {len(to_write)} lines"
    (code,) = re.findall(r"```python\n(.*?)```", handout, re.S)
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.startswith(re.search(r"# (0\.\d+)\n", code)[1]), said.stderr


def test_the_copy_is_the_project_less_the_solutions(copy):
    shipped = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert shipped == {*SHIPPED, "README.md"}
    removed = []
    for file in CODE:
        text, gone = blank_out(file, REFERENCE[file])
        removed += gone
        ours, theirs = (
            homework.functions(ast.parse(t)) for t in (REFERENCE[file], (copy / file).read_text())
        )
        assert [ast.unparse(n.args) for n in ours.values()] == [
            ast.unparse(n.args) for n in theirs.values()
        ]
        if file != "cosd.py":
            assert (copy / file).read_text() == text
    assert len(removed) > 50 and survivors(copy, removed) == []
    assert "The first five minutes" in (copy / "README.md").read_text()
    assert "solutions" not in (copy / "notebooks" / "homework.md").read_text()


def test_the_copy_gives_nothing_else_away(copy):
    """The gradients that q1.md derives, definitions that are answers, model settings."""
    cosd = (copy / "cosd.py").read_text()
    for name in ("forward_kl", "reverse_kl", "jsd"):
        doc = ast.get_docstring(homework.functions(ast.parse(cosd))[name])
        assert "you derive it" in doc and "Q − P" not in doc and "⊙" not in doc
        assert "Source" in doc and "The same P, Q" in doc or "lecture's example" in doc
    tests = (copy / "tests" / "test_questions.py").read_text()
    for hint in ("log_softmax", "SYSTEM, *", "* d).sum()", "def plain_"):
        assert hint not in tests
    assert not any(path.name in ("judge.py", "worker.py") for path in copy.rglob("*"))
    settings = json.loads((homework.SOLUTIONS / "q6.json").read_text())
    texts = "".join(p.read_text() for p in copy.rglob("*.py"))
    assert f'"steps": {settings["steps"]}' not in texts


def test_a_survivor_is_found_wherever_it_hides(tmp_path):
    removed = ["        running = running & ~torch.isin(token, eos_ids)\n"]
    line = "  running =  running & ~torch.isin(token, eos_ids)   # a comment\n"
    (tmp_path / "plain.py").write_text("x = 1\n" + line)
    source = ["a\n", "running = running & ~torch.isin(token, eos_ids)"]
    cell = {"cell_type": "code", "source": source, "outputs": []}
    halves = ["running = running & ", "~torch.isin(token, eos_ids)"]
    output = {"data": {"text/plain": halves}}
    shown = {"cell_type": "code", "source": [], "outputs": [output]}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell]}))
    (tmp_path / "b.ipynb").write_text(json.dumps({"cells": [shown]}))
    found = [name.partition(":")[0] for name in survivors(tmp_path, removed)]
    assert found == ["a.ipynb", "b.ipynb", "plain.py"]


def test_questions_can_be_handed_out_solved(tmp_path):
    make(tmp_path / "later", solved=("q1", "q2"), bases=tmp_path)
    texts = "".join((tmp_path / "later" / file).read_text() for file in CODE)
    assert set(CODED) - set(re.findall(r'Error\("(q\d):', texts)) == {"q1", "q2"}
    with pytest.raises(SystemExit, match="not empty"):
        make(tmp_path / "later")


def pytest_in(folder, *arguments):
    """-> {name of a case: its failure or None}."""
    report = folder.parent / f"{folder.name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        [*command, f"--junitxml={report}", *arguments],
        cwd=folder,
        capture_output=True,
        env=environment,
    )
    found = {}
    for case in ElementTree.parse(report).findall(".//testcase"):
        wrong = [case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None]
        text = wrong[0].get("message") + (wrong[0].text or "") if wrong else None
        found[f"{case.get('classname')}::{case.get('name')}"] = text
    return found


def test_what_is_not_asked_for_works_in_the_copy(copy):
    """Tests fail there only because an answer is missing; every question's own tests fail, with its hint."""
    found = pytest_in(copy)
    failed = {name: text for name, text in found.items() if text is not None}
    assert len(failed) > 30
    for name, text in failed.items():
        assert re.search(r"NotImplementedError: q\d: ", text), f"{name}: {text}"
    for name, text in found.items():
        if asked := re.search(r"test_(q[1-8])_", name):
            assert text and f"NotImplementedError: {asked[1]}: " in text, name


def answered(folder, questions):
    """Fill the copy in `folder` with answers like a student's."""
    for question in questions:
        (name,) = QUESTIONS[question].files
        answer = file_with(question, bodies(question))
        ours = (folder / name).read_text()
        wanted = homework.asked_for(question, name)
        (folder / name).write_text(merge(ours, answer, ast.parse(answer), wanted, name))


def test_the_copys_tests_take_right_answers(copy, tmp_path):
    folder = tmp_path / "answered"
    shutil.copytree(copy, folder)
    answered(folder, CODED)
    found = pytest_in(folder, "-m", " or ".join(CODED))
    assert len(found) > 30 and [text for text in found.values() if text] == []


@SLOW
def test_each_question_can_be_done_alone(copy, tmp_path):
    """In a copy where no other question is solved."""
    for question in CODED:
        folder = tmp_path / question
        shutil.copytree(copy, folder)
        answered(folder, [question])
        found = pytest_in(folder, "-m", question)
        assert found and [text for text in found.values() if text] == [], question


# The copy's own tests show most plain mistakes already, the grader's others too.
@SLOW
def test_the_copys_tests_see_plain_mistakes(copy, tmp_path):
    folder = tmp_path / "mistakes"
    shutil.copytree(copy, folder)
    missed = []
    for question, what, _, old, new in WRONG[::4]:
        (name,) = QUESTIONS[question].files
        (folder / name).write_text(changed(question, old, new))
        found = pytest_in(folder, "-m", question, "tests/test_questions.py", "-x")
        missed += [] if any(found.values()) else [f"{question}: {what}"]
        (folder / name).write_text((copy / name).read_text())
    print("\n".join(missed))
    assert len(missed) < len(WRONG[::4]) / 2


# ==================================================================================================== the grader
def submit(folder, **texts):
    """A folder with the reference, except for the files given by name; None omits a file."""
    folder.mkdir(parents=True)
    for name in {file for question in CODED for file in QUESTIONS[question].files}:
        text = texts.get(name.removesuffix(".py"), REFERENCE[name])
        if text is not None:
            (folder / name).write_text(text)
    return folder


def outcome(results):
    return {f"q{test['number']}": (test["score"], test["output"]) for test in results["tests"]}


def test_results_in_gradescopes_format(tmp_path, capsys):
    """The command, on an empty folder."""
    (tmp_path / "empty").mkdir()
    results = tmp_path / "results.json"
    assert homework.main(["grade", str(tmp_path / "empty"), "--results", str(results)]) == 0
    results, shown = json.loads(results.read_text()), capsys.readouterr().out
    assert results["score"] == 0 and results["visibility"] == "visible"
    assert [test["number"] for test in results["tests"]] == [name[1:] for name in QUESTIONS]
    for test, (name, question) in zip(results["tests"], QUESTIONS.items()):
        assert test["score"] == 0 and test["max_score"] == question.points
        assert test["status"] == "failed" and test["name"] == f"{name}: {question.about}"
        assert f"{question.files[0]} is missing" in test["output"] and test["name"] in shown
    with pytest.raises(SystemExit, match="no folder"):
        homework.main(["grade", str(tmp_path / "nowhere")])


@SLOW
def test_the_command_gives_the_reference_full_marks(tmp_path):
    """As an instructor runs it, training included; some minutes. The base is looked for in out/."""
    submission = submit(tmp_path / "reference")
    for path in homework.SOLUTIONS.iterdir():
        if path.is_file():
            shutil.copy(path, submission)
    results = grade(submission, list(QUESTIONS), bases=bases())
    found = [test["score"] for test in results["tests"]]
    assert found == [question.points for question in QUESTIONS.values()], results


def bases():
    try:
        base.name_in(ROOT / "out")
    except base.Missing:
        pytest.skip("no pretrained base in out/: python train.py --method pretrain")
    return ROOT / "out"


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"x = (\n", "does not parse: line 1"),
        (b"x = '\0'", "does not parse"),
        (b"(" * 5000, "does not parse"),
        (b"", "no function"),
        (b"def render(): pass\n" * 400_000, "larger than 4 MB"),
    ],
)
def test_rubbish_is_refused_in_a_line(data, reason, tmp_path):
    (tmp_path / "contexts.py").write_bytes(data)
    score, output = outcome(grade(tmp_path, ["q4"]))["q4"]
    assert score == 0 and reason in output and len(output.splitlines()) == 1


def test_links_and_folders_are_no_files(tmp_path):
    (tmp_path / "contexts.py").symlink_to(ROOT / "contexts.py")
    (tmp_path / "model.py").mkdir()
    found = outcome(grade(tmp_path, ["q3", "q4"]))
    assert found["q3"] == (0, "model.py is not a plain file")
    assert found["q4"] == (0, "contexts.py is not a plain file")


def test_an_error_at_import_and_a_function_that_is_missing(judged, tmp_path):
    found = judged("q4", "BROKEN = 1 / 0\n" + REFERENCE["contexts.py"], "13")
    reasons = {reason for part in found.values() for reason in part["reasons"]}
    assert len(reasons) == 1 and "ZeroDivisionError" in reasons.pop()
    without = REFERENCE["contexts.py"].replace("def dressed(", "def undressed(")
    found = judged("q4", without)
    assert lost(found) == "456" and "NotImplementedError: q4" in str(found)


def test_what_a_student_adds_comes_along():
    """Helpers, constants, imports (a longer line of the file's own, one that may fail), methods, other indentation, line ends."""
    reference = "from __future__ import annotations\nimport torch\n\n\nclass A:\n    def f(self):\n        return 0\n\n\ndef g():\n    return 0\n\n\nlast = 1\n"
    submitted = (
        "from __future__ import annotations\nimport torch, math\ntry:\n    import einops\nexcept ImportError:\n    einops = None\n\nprint(1)\nTAU = 2\n\n"
        "class A:\n\t@property\n\tdef f(self):\n\t\treturn self.h() + TAU\n\tdef h(self):\n\t\treturn helper()\n\n"
        "def g():\n    raise ValueError\n\ndef helper():\n    return math.floor(40.5)\n\nif __name__ == '__main__':\n    g()\n"
    ).replace("\n", "\r\n")
    text = merge(reference, *parse("a.py", submitted.encode()), ["A.f"], "a.py")
    names = {}
    exec(text, names)
    assert names["A"]().f == 42 and names["g"]() == 0 and names["last"] == 1
    assert "print" not in text and "einops" in names


def test_imports_are_made_beforehand():
    tree = ast.parse(
        "import math, os.path\nfrom torch.nn import functional\nimport cosd, this, test.__main__\n"
        "def f():\n    from itertools import chain\n    from . import x"
    )
    assert set(homework.imports(tree)) == {
        "math",
        "os.path",
        "torch.nn",
        "torch.nn.functional",
        "itertools",
        "itertools.chain",
    }


def test_only_what_may_be_edited_is_taken(tmp_path, judged):
    """Tests, settings, given functions and other files of the submission are ignored."""
    text = REFERENCE["contexts.py"].replace("def encode(", "def encode_(")
    for name in ("conftest.py", "sitecustomize.py", "torch.py", "judge.py"):
        (tmp_path / name).write_text("raise SystemExit")
    assert lost(judged("q4", text)) == ""


def test_a_submission_in_a_folder_of_its_own_is_found(tmp_path):
    deep = submit(tmp_path / "ada" / "my homework")
    (tmp_path / "ada" / "__MACOSX").mkdir()
    (tmp_path / "ada" / "__MACOSX" / "cosd.py").write_text("")
    (tmp_path / "ada" / "notes").mkdir()
    (tmp_path / "ada" / "notes" / "q1.md").write_text("")
    assert find(tmp_path / "ada") == deep and find(deep) == deep
    assert find(tmp_path / "ada" / "notes") == tmp_path / "ada" / "notes"


def test_a_whole_class(tmp_path, capsys):
    """Folders and zips; existing results are kept; one that cannot be opened does not stop the others."""
    everyone = tmp_path / "all"
    submit(everyone / "ada", contexts=None)
    with zipfile.ZipFile(everyone / "bob.zip", "w") as archive:
        archive.writestr("bob/model.py", "x = (")
        archive.writestr("../outside.py", "x = 1")
    (everyone / "eve.zip").write_bytes(b"no zip")
    results = tmp_path / "graded"
    (results).mkdir()
    board = [{"name": "forgotten in q6", "value": 0.02, "order": "asc"}]
    kept = {"tests": [{"score": 7}], "score": 7, "leaderboard": board}
    (results / "ada.json").write_text(json.dumps(kept))
    arguments = ["class", str(everyone), "--results", str(results), "--only", "q3"]
    assert homework.main(arguments) == 0
    rows = list(csv.reader(open(results / "grades.csv")))
    head = ["who", "q3", "sum", "forgotten in q6"]
    assert rows == [head, ["ada", "7", "7", "0.02"], ["bob", "0", "0"]]
    output = json.loads((results / "bob.json").read_text())["tests"][0]["output"]
    assert output.startswith("model.py does not parse: line 1")
    assert "eve.zip" in capsys.readouterr().out and not (tmp_path / "outside.py").exists()


def test_a_zip_for_gradescope(tmp_path):
    """It contains everything that grading needs: a submission is graded from it alone."""
    homework.main(["zip", str(tmp_path / "grader.zip"), "--bases", str(tmp_path / "none")])
    with zipfile.ZipFile(tmp_path / "grader.zip") as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "source")
        assert archive.getinfo("run_autograder").external_attr >> 16 & 0o111
    assert {"setup.sh", "run_autograder", "Dockerfile", "cosd.py"} <= names
    assert not any("solutions" in name or "test" in name for name in names)
    submission = submit(tmp_path / "submission")
    command = [sys.executable, "notebooks/homework.py", "grade", str(submission)]
    done = subprocess.run(
        [*command, "--only", "q4", "--results", str(tmp_path / "results.json")],
        cwd=tmp_path / "source",
        capture_output=True,
        text=True,
    )
    assert json.loads((tmp_path / "results.json").read_text())["score"] == 10, done.stderr


# q6 to q8: what is handed in as a file, and what training says of it
FOUND = {"exact": 1.0, "prior": 0.0, "steerability": -0.004, "drift": 0.004, "tokens": 4500.0}


@pytest.fixture
def trained(monkeypatch):
    """The output of measure.py, without training."""
    said = dict(FOUND)
    monkeypatch.setattr(homework, "measured", lambda *_: dict(said))
    return said


def handed(tmp_path, **texts):
    for path in homework.SOLUTIONS.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    for name, data in texts.items():
        path = tmp_path / name.replace("_", ".")
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return tmp_path


@pytest.mark.parametrize(
    "changes, score",
    [
        ({}, 15),
        ({"steerability": -0.02}, 13),
        ({"steerability": -0.05}, 11),
        ({"prior": -0.1}, 9),
        ({"steerability": -0.3}, 7),
        ({"exact": 0.94}, 1),
        ({"tokens": 6001}, 1),
    ],
)
def test_q6_points(changes, score, trained, tmp_path):
    trained |= changes
    results = grade(handed(tmp_path), ["q6"])
    assert outcome(results)["q6"][0] == score, results
    assert bool(results["leaderboard"]) == (score >= 7)


@pytest.mark.parametrize(
    "text",
    [
        '{"steps": 251}',
        '{"batch": 65}',
        '{"batch": 0}',
        '{"anchors": 0.5}',
        '{"pretrain_steps": 1}',
        '{"out": "/"}',
        "{steps: 100}",
        "[]",
        '{"method": "dpo"}',
        '{"method": "pretrain"}',
        '{"steps": "100"}',
        '{"lr": -1}',
        "[" * 100_000,
    ],
)
def test_q6_settings_that_are_not_valid(text, trained, tmp_path):
    score, output = outcome(grade(handed(tmp_path, q6_json=text), ["q6"]))["q6"]
    assert score == 0 and output.startswith("q6.json")


RUNS = [
    dict(divergence=d, teacher=t, anchors=a, score=1.0, prior=0.0, drift=0.004)
    for d in ("jsd", "forward_kl")
    for t in ("ema", "live")
    for a in (0, 0.5)
]


def seven(runs, **settings):
    return json.dumps({"settings": {"steps": 120, "batch": 32} | settings, "runs": runs})


@pytest.mark.parametrize(
    "text, score",
    [
        (seven(RUNS), 5),
        (seven(RUNS[:7]), 1),
        (seven(RUNS[:1] * 8), 1),
        (seven([*RUNS[:7], RUNS[7] | {"score": 3}]), 1),
        (seven([*RUNS[:7], RUNS[7] | {"drift": float("nan")}]), 1),
        (seven([run | {"anchors": 0.1 * i} for i, run in enumerate(RUNS)], lr=-1), 1),
        (seven([run | {"score": 0.5} for run in RUNS]), 2),  # numbers that nobody has measured
        (seven([run | {"drift": 0.2} for run in RUNS]), 2),
        (seven([run | {"prior": -0.5} for run in RUNS]), 2),
        (seven(RUNS, steps=10_000), 1),
        ("{}", 1),
        ("[]", 1),
        ("no JSON", 1),
    ],
)
def test_q7_points(text, score, trained, tmp_path):
    results = grade(handed(tmp_path, q7_json=text), ["q7"])
    assert outcome(results)["q7"][0] == score, results


def png(width, height, row=lambda y: bytes([y % 251])):
    """A grey picture."""

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = b"".join(b"\0" + row(y) * width for y in range(height))
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    "file, data",
    [
        ("q7_png", b"hello"),
        (
            "q7_png",
            b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">II", 900, 900),
        ),  # 24 bytes
        ("q7_png", png(200, 400)),
        ("q7_png", png(400, 400, lambda y: b"\0")),
        ("q7_png", png(400, 400)[:-200]),
        ("q7_png", png(400, 400).replace(b"IDAT", b"IDAX")),
        ("q7_md", "it works"),
        ("q7_md", "word " * 160),
        ("q7_md", " ".join(f"w{i}" for i in range(2000))),
    ],
)
def test_q7_a_plot_and_a_page_that_are_none(file, data, trained, tmp_path):
    results = grade(handed(tmp_path, q7_json=seven(RUNS), **{file: data}), ["q7"])
    assert outcome(results)["q7"][0] == 4, results


def test_q7_a_picture_is_one():
    homework.picture(png(400, 300))
    homework.picture((homework.SOLUTIONS / "q7.png").read_bytes())


PLURAL = (homework.SOLUTIONS / "q8.py").read_text()
LEARNED = {"teacher": 0.98, "student": 0.02, "after": 0.97}
NONSENSE = """
from contexts import Example, Kind

DESCRIPTION = "Words without any sense at all, drawn at random, with a context that says nothing of what is asked."

def some(rng):
    return "".join(rng.choices("abcdefgh", k=6))

def draw(rng, heldout=None, fixed=False):
    prompt = some(rng) + ("x" if heldout else "y" if heldout is False else rng.choice("xy"))
    context = "always" if fixed else some(rng)
    return Example("nonsense", context, prompt, some(rng), some(rng))

KIND = Kind("E", "nonsense", draw, share=0.2, drop=0.2, task={"fixed": True})
"""


@pytest.fixture
def plural(monkeypatch, students):
    """`measured` for a kind that can be learned, and one that cannot. One process for all."""

    def measured(arguments, *_):
        drawn = json.load(open(arguments[1]))
        sense = drawn["mixed"]["out"]["examples"][0]["kind"] != "nonsense"
        return dict(LEARNED) if sense else {"teacher": 0.0, "student": 0.0, "after": 0.0}

    monkeypatch.setattr(homework, "measured", measured)
    monkeypatch.setattr(homework, "Student", lambda *_: nullcontext(students("q8")[0]))


@pytest.mark.parametrize(
    "what, text, score",
    [
        ("the model answer", PLURAL, 10),
        ("the context in the prompt", PLURAL.replace('f"many {word}"', 'f"ends in {ending} {word}"'), 7),
        ("the answer in the prompt", PLURAL.replace('f"many {word}"', 'f"many {word} {answer}"'), 7),
        ("a random state of its own", PLURAL.replace("rng.choice(VOWELS)", "__import__('random').choice(VOWELS)"), 0),
        ("one that moves on", PLURAL.replace("rng.choice(VOWELS)", "VOWELS[__import__('time').time_ns() % 5]"), 0),
        ("always the same", PLURAL.replace("draw_word(rng, heldout)", "'mot'"), 0),
        ("held-out words leak", PLURAL.replace("draw_word(rng, heldout)", "draw_word(rng)"), 0),
        ("the context decides nothing", PLURAL.replace("word + ending", "word + 'li'"), 8),
        ("something else decides", PLURAL.replace("word + ending", "word + rng.choice('aeiou')"), 8),
        ("no description", PLURAL.replace("DESCRIPTION = ", "DESCRIPTION = '' and "), 0),
        ("an empty answer", PLURAL.replace("answer = word + ending", "answer = ''"), 0),
        ("a kind that exists", PLURAL.replace('"plural"', '"privileged"'), 0),
        ("no record", PLURAL.replace("KIND = Kind(", "KIND = dict(zip('abc', "), 0),
        ("never drawn in pretraining", PLURAL.replace("share=0.2", "share=0.0"), 0),
        ("the student is never met", PLURAL.replace("drop=0.2", "drop=0.0"), 0),
        ("no C to compile", PLURAL.replace(', task={"ending": "li"}', ""), 0),
        ("a grade that takes everything", PLURAL.replace("drop=0.2", "drop=0.2, grade=lambda e, t: {'score': 1, 'exact': 1}"), 0),
        ("too long", PLURAL.replace('f"ends in {ending}"', 'f"ends in {ending}" * 20'), 0),
        ("nonsense", NONSENSE, 6),
        ("not Python", "def draw(:", 0),
        ("an endless loop", "while True: pass", 0),
        ("an exit", "import os; os._exit(0)", 0),
        ("the grader's file", "import sys; KIND = open(sys.argv[0])", 0),
    ],
)  # fmt: skip
def test_q8_points(what, text, score, plural, tmp_path):
    results = grade(handed(tmp_path, q8_py=text), ["q8"], seed=5)
    assert outcome(results)["q8"][0] == score, results


def test_q8_what_training_must_show():
    def points(**found):
        return [part["score"] for part in fifth.judge_training(LEARNED | found)]

    assert points() == [2, 2]
    assert points(teacher=0.3) == [0, 0]  # it does not know what the context means
    assert points(student=0.9) == [0, 0]  # the student knew without
    assert points(after=0.5) == [2, 0]


@SLOW
@pytest.mark.parametrize("text, learns", [(PLURAL, True), (NONSENSE, False)])
def test_q8_a_kind_is_learned_and_nonsense_is_not(text, learns, tmp_path):
    (tmp_path / "q8.py").write_text(text)
    command = [sys.executable, str(ROOT / "notebooks" / "measure.py"), str(tmp_path / "q8.py")]
    said = subprocess.run([*command, "--out", str(bases())], capture_output=True, text=True)
    found = json.loads(said.stdout.splitlines()[-1])
    assert all(part["score"] for part in fifth.judge_training(found)) == learns, found


@SLOW
def test_q6_the_model_answer_and_the_default(tmp_path):
    """Three seeds each. The default settings learn too, but use ten times the tokens and forget."""
    found = {}
    for name, text in (("model", (homework.SOLUTIONS / "q6.json").read_text()), ("default", "{}")):
        found[name] = homework.measured([text, "--seeds", "3"], bases(), 900)
    assert found["model"]["exact"] >= measure.LEARNED
    assert found["model"]["tokens"] <= measure.BUDGET < found["default"]["tokens"]
    assert found["model"]["steerability"] >= -measure.FORGETTING[0][0]
    assert found["default"]["steerability"] < -measure.FORGETTING[1][0]


def test_the_base_goes_into_one_file_and_back(tmp_path):
    """With the name and settings that train.py expects."""
    import torch

    cfg = homework.measure.train.Config(method="pretrain", device="cpu")
    kept = {}

    def remember(value):
        if isinstance(value, dict) and "shape" in value:
            kept["identity"] = json.loads(json.dumps(value))
        return digest(value)

    train = homework.measure.train
    digest, train.digest = train.digest, remember
    try:
        with pytest.raises(base.Missing):
            base.name_in(tmp_path / "out")
    finally:
        train.digest = digest
    gpt = homework.measure.train.GPT(homework.measure.train.GPTConfig(**kept["identity"]["shape"]))
    weights = {name: p.detach() for name, p in gpt.named_parameters()}
    folder = tmp_path / "out" / f"base-{digest(kept['identity'])}"
    folder.mkdir(parents=True)
    torch.save({"identity": kept["identity"], "model": weights}, folder / "state.pt")
    base.pack(tmp_path / "out", tmp_path / "base.safetensors")
    assert base.unpack(tmp_path / "other", tmp_path / "base.safetensors") == folder.name
    taken, name = train.get_base(cfg, str(tmp_path / "other"))
    assert name == folder.name
    assert all(torch.equal(p, weights[n]) for n, p in taken.named_parameters())
