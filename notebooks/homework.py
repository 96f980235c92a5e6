"""The repository as a course assignment: hand out a student's copy, grade what comes back.

    python notebooks/homework.py make FOLDER [--solved q1 q2]          the student's copy
    python notebooks/homework.py grade SUBMISSION [--results FILE]     a table, and a JSON in Gradescope's results format

What the student is to write is listed in `ASKED`: the functions of each question, by name, with a hint. It is a function's body
less its docstring, or the end of the body, from a given statement on. `make` puts `raise NotImplementedError("q3: ...")` there,
and checks that no removed line of 24 or more characters is left anywhere in the copy.

`grade` builds a project for each question: everything is the instructor's, but for the functions that this question asks
for. Those, and whatever top-level names the student added to that file, come from the submission. It is tested in a
process of its own, with a time limit, fresh numbers, and results that leave it by a file whose name the submitted code is not told.

Grading RUNS THE STUDENTS' CODE, with your rights. What is here guards against accidents and easy tricks, not against malice:
do it in a container without network, that holds nothing else. See homework.md.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HANDOUT, SOLUTIONS = Path(__file__).with_name("homework.md"), Path(__file__).with_name("solutions")
CODE = ("model.py", "cosd.py", "contexts.py", "train.py")
SHIPPED = (
    *CODE,
    "pyproject.toml",
    "LICENSE",
    ".gitignore",
    "notebooks/homework.md",
    "notebooks/report.py",
    "tests/conftest.py",
    "tests/test_questions.py",
    "tests/test_model.py",
    "tests/test_contexts.py",
)


@dataclass(frozen=True)
class Question:
    about: str
    points: int  # given by the tests
    files: tuple[str, ...]  # what the submission is asked for
    seconds: int  # time limit, with a wide margin
    by_hand: int = 0  # points that a person gives


QUESTIONS = {
    "q1": Question("divergences from logits", 15, ("cosd.py",), 60, by_hand=5),
    "q2": Question("the shift and the weights", 10, ("cosd.py",), 60),
    "q3": Question("rollouts with a KV cache", 15, ("model.py",), 60),
    "q4": Question("what the teacher sees", 10, ("contexts.py",), 60),
    "q5": Question("the step", 15, ("cosd.py",), 60),
    "q6": Question("a verb learned, nothing forgotten", 15, ("q6.json",), 600),
    "q7": Question("an ablation", 5, ("q7.json", "q7.png", "q7.md"), 60, by_hand=10),
    "q8": Question("bonus: a fifth context", 10, ("q8.py",), 60),
}
WRITTEN = {"q1": "q1.md", "q7": "q7.md"}  # read by a person
LONGEST_OUTPUT = 2000  # characters of a student's output that are shown
LARGEST_FILE = 64 * 2**20  # bytes that a submission may write into one file


# ============================================================================================ the student's copy
@dataclass(frozen=True)
class Asked:
    """What a question asks for: a function's body from its first statement on, or from the one that starts with `begins`."""

    question: str
    file: str
    function: str  # "GPT.generate"
    hint: str
    begins: str = ""


ASKED = (
    Asked(
        "q1",
        "cosd.py",
        "log_softmax_pair",
        "logits are not log-probabilities; who gets gradient?",
        "return",
    ),
    Asked(
        "q1", "cosd.py", "kl", "where a is 0, log a is no number to multiply, forward or backward"
    ),
    Asked("q1", "cosd.py", "forward_kl", "one call of kl; the average is the teacher's", "return"),
    Asked("q1", "cosd.py", "reverse_kl", "one call of kl; the average is the student's", "return"),
    Asked(
        "q1",
        "cosd.py",
        "jsd",
        "log M by torch.logaddexp, which has a NaN gradient at (−inf, −inf)",
        "neither =",
    ),
    Asked(
        "q2",
        "cosd.py",
        "completion_states",
        "read what is needed, then pick the states that predict the completion",
    ),
    Asked(
        "q2",
        "cosd.py",
        "token_weights",
        "leave out what `skip` says, then divide: by what?",
        "scored =",
    ),
    Asked(
        "q3",
        "model.py",
        "KVCache.attend",
        "k and v go into self.keys and self.values of this layer; which slots may a query see?",
        "if k.shape[2]",
    ),
    Asked(
        "q3",
        "model.py",
        "GPT.generate",
        "read the prompts at once, forget the padding, then write a token at a time",
        "states =",
    ),
    Asked("q4", "contexts.py", "render", "[SYSTEM, C,] USER, x, ASSISTANT"),
    Asked(
        "q4",
        "contexts.py",
        "dressed",
        "earlier turns stay as they are; only a template with {prompt} dresses the last",
    ),
    Asked(
        "q4",
        "contexts.py",
        "file_example",
        "the context is system, example turns, shots; x and shots are dressed alike",
    ),
    Asked(
        "q5",
        "cosd.py",
        "cosd_loss",
        "states of both, then the objective on every token and the sum under the weights; or all by chunks",
        "h_s =",
    ),
    Asked(
        "q5",
        "cosd.py",
        "token_probabilities",
        "the same states without gradient; the probability of the token that came",
        "h_s =",
    ),
)
# Lines that a given function has too: they may stay.
SHOWN = {"return attend(q, keys, values, attn_mask=visible[:, None])"}


@dataclass(frozen=True)
class Blank:
    """One place to fill: lines first..last (from 1) of the file are the student's."""

    asked: Asked
    first: int
    last: int
    indent: str


@lru_cache(maxsize=16)
def blanks(name: str, source: str) -> list[Blank]:
    """The places to fill in this version of a file, from top to bottom."""
    found, defs = [], functions(ast.parse(source))
    for asked in ASKED:
        if asked.file != name:
            continue
        body = defs[asked.function].body
        if ast.get_docstring(defs[asked.function]) is not None:
            body = body[1:]
        texts = [ast.get_source_segment(source, statement) for statement in body]
        starts = [i for i, text in enumerate(texts) if text.startswith(asked.begins)]
        if not starts:
            raise LookupError(f"{asked.function} has no statement {asked.begins!r}: see ASKED")
        first = body[starts[0]]
        found.append(Blank(asked, first.lineno, body[-1].end_lineno, " " * first.col_offset))
    return sorted(found, key=lambda blank: blank.first)


def functions(tree: ast.Module) -> dict[str, ast.AST]:
    """All functions and methods, as `name` and `Class.name`."""
    defs = {
        node.name: node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            defs |= {
                f"{node.name}.{part.name}": part
                for part in node.body
                if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))
            }
    return defs


def start(node: ast.AST) -> int:
    """Its first line, decorators included."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


def blank_out(name: str, source: str, solved: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """-> (the student's version of a file, the lines that were taken out)."""
    lines, removed = source.splitlines(keepends=True), []
    for blank in reversed(blanks(name, source)):
        question = blank.asked.question
        if question in solved:
            continue
        above = blank.first - 1
        while (
            lines[above - 1].strip().startswith("#")
        ):  # what introduces the first statement goes too
            above -= 1
        removed += lines[above : blank.last]
        hint = f'raise NotImplementedError("{question}: {blank.asked.hint}")'
        lines[above : blank.last] = [f"{blank.indent}{hint}\n"]
    return "".join(lines), removed


def survivors(folder: Path, removed: list[str]) -> list[str]:
    """Removed lines of 24 characters or more that some file of the copy still holds, in notebooks' sources and outputs too."""

    def bare(line):
        return re.sub(r"\s+", " ", re.sub(r"  +#.*", "", line)).strip()

    wanted = {
        text
        for line in removed
        for text in (bare(line), re.sub(r"\s+", " ", line).strip())
        if len(text) >= 24 and text not in SHOWN
    }
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        text = path.read_bytes().decode("utf-8", "ignore")
        if path.suffix == ".ipynb":
            text = "\n".join(strings(json.loads(text)))
        text = re.sub(r"\s+", " ", text)
        found += [f"{path.relative_to(folder)}: {line}" for line in sorted(wanted) if line in text]
    return found


def strings(value) -> list[str]:
    """All texts in a JSON value; a notebook's lists of lines come joined."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ["".join(value)]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for v in inner for text in strings(v)]


def make(folder: Path, solved: tuple[str, ...] = ()) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"homework.py: {folder} is not empty: name a new folder")
    files, removed = {name: (ROOT / name).read_text() for name in SHIPPED}, []
    handout = files[
        "notebooks/homework.md"
    ]  # its first part is the README, its last for instructors
    files["README.md"], files["notebooks/homework.md"] = re.search(
        r"<!-- README -->\n(.*?)<!-- questions -->\n(.*?)<!-- instructors -->", handout, re.S
    ).groups()
    for name, text in files.items():
        if name in CODE:
            text, gone = blank_out(name, text, solved)
            removed += gone
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.strip() + "\n")
    if left := survivors(folder, removed):
        shutil.rmtree(folder)
        raise SystemExit("homework.py: the copy would give solutions away:\n" + "\n".join(left))
    print(f"{folder}: {len(files)} files, {len(removed)} lines to write")


# ===================================================================================== one question, one project
class Refused(Exception):
    """Why a question gets no points: one readable line."""


def handed_in(submission: Path, name: str, question: str) -> bytes:
    path = submission / name
    if not os.path.lexists(path):
        raise Refused(f"{name} is missing: see {question} in homework.md")
    if path.is_symlink() or not path.is_file():
        raise Refused(f"{name} is not a plain file")
    if path.stat().st_size > 4 * 2**20:
        raise Refused(f"{name} is larger than 4 MB")
    return path.read_bytes()


def parse(name: str, data: bytes) -> tuple[str, ast.Module]:
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
        return text, ast.parse(text)
    except UnicodeDecodeError:
        raise Refused(f"{name} is not UTF-8 text") from None
    except SyntaxError as error:
        raise Refused(f"{name} does not parse: line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise Refused(f"{name} does not parse: {type(error).__name__}: {error}") from None


def merge(reference: str, submitted: str, theirs: ast.Module, wanted: list[str], name: str) -> str:
    """The reference, with the functions `wanted` and all new names from the submission, each where the student has put it."""
    ours, lines, edits = ast.parse(reference), reference.splitlines(keepends=True), []

    def source(node: ast.AST, column: int = 0) -> str:
        text = (
            "".join(submitted.splitlines(keepends=True)[start(node) - 1 : node.end_lineno]).rstrip(
                "\n"
            )
            + "\n"
        )
        return (
            text
            if node.col_offset == column
            else textwrap.indent(textwrap.dedent(text), " " * column)
        )

    mine, yours = functions(ours), functions(theirs)
    for function in wanted:
        if function not in yours:
            raise Refused(f"{name} has no function {function}")
        edits.append(
            (
                start(mine[function]) - 1,
                mine[function].end_lineno,
                source(yours[function], mine[function].col_offset),
            )
        )
    known = {n: node for node in ours.body for n in bound(node)}
    after = imports = max(
        node.end_lineno for node in ours.body if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    for node in theirs.body:
        names = bound(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and names - known.keys():
            edits.append((imports, imports, source(node)))
        elif names & known.keys():
            after = max(imports, *(known[n].end_lineno for n in names & known.keys()))
        elif names:
            edits.append((after, after, source(node)))
    classes = {node.name: node for node in ours.body if isinstance(node, ast.ClassDef)}
    for function, node in yours.items():  # a new method goes to the end of its class
        owner = function.partition(".")[0]
        if (
            function not in mine
            and owner in classes
            and any(w.startswith(f"{owner}.") for w in wanted)
        ):
            edits.append(
                (classes[owner].end_lineno, classes[owner].end_lineno, "\n" + source(node, 4))
            )
    for _, (first, last, text) in sorted(
        enumerate(edits), key=lambda e: (e[1][0], e[0]), reverse=True
    ):
        lines[first:last] = [text]
    return "".join(lines)


def bound(node: ast.AST) -> set[str]:
    """The names that a top-level statement defines. What defines none (a call, a `raise`) is not taken over."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Import) or (
        isinstance(node, ast.ImportFrom) and node.module != "__future__"
    ):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, (ast.If, ast.Try, ast.With)):
        parts = [
            *node.body,
            *getattr(node, "orelse", ()),
            *(part for handler in getattr(node, "handlers", ()) for part in handler.body),
        ]
        return {name for part in parts for name in bound(part)}
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def asked_for(question: str, name: str) -> list[str]:
    return [a.function for a in ASKED if (a.question, a.file) == (question, name)]


def build(submission: Path, question: str, folder: Path) -> None:
    """The instructor's project with this question's part of the submission. Raises `Refused`."""
    files = {
        name: (ROOT / name).read_bytes()
        for name in (*CODE, "pyproject.toml", "tests/conftest.py", "tests/test_questions.py")
    }
    for name in QUESTIONS[question].files:
        data = handed_in(submission, name, question)
        if name in CODE:
            reference = files[name].decode()
            wanted = asked_for(question, name)
            data = merge(reference, *parse(name, data), wanted, name).encode()
        files[name] = data
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# ================================================================================================ running tests
class Points:
    """A pytest plugin: each test function of a question has points, shared evenly by its cases."""

    def __init__(self, question: str):
        self.question, self.tests, self.broken = question, {}, None

    def pytest_collection_modifyitems(self, items):
        for item in items:
            if mark := item.get_closest_marker(self.question):
                self.tests.setdefault(
                    item.originalname, {"points": mark.kwargs["points"], "cases": {}, "reason": ""}
                )["cases"][item.name] = False

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken = shorten(
                str(report.longrepr).strip().splitlines()[-1].removeprefix("E").strip()
            )

    def pytest_runtest_logreport(self, report):
        case = report.nodeid.rpartition("::")[2]
        test = self.tests[case.partition("[")[0]]
        if report.when == "call":
            test["cases"][case] = report.passed
        if not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            test["reason"] = test["reason"] or shorten(
                crash.message if crash else str(report.longrepr)
            )

    def result(self, status: int) -> dict:
        tests = [
            dict(
                name=name,
                points=test["points"],
                reason=test["reason"],
                score=round(test["points"] * sum(test["cases"].values()) / len(test["cases"]), 2),
            )
            for name, test in self.tests.items()
        ]
        return {"tests": tests, "broken": self.broken, "status": int(status)}


def shorten(text: str, length: int = 300) -> str:
    """The first lines of a message, in printable characters."""
    text = " ".join(line.strip() for line in text.strip().splitlines()[:4])
    return "".join(c if c.isprintable() else "?" for c in text)[:length]


def run() -> None:
    """In a process of its own. What to test comes by stdin, before any of the student's code is imported."""
    order = json.loads(sys.stdin.read())
    import pytest

    sys.argv[1:], sys.path[:] = (
        [],
        [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent],
    )
    to_json, to_file = json.dumps, open
    for job in order["jobs"]:
        folder, points = job["folder"], Points(job["question"])
        os.environ["COSD_SEED"] = str(job["seed"])
        os.chdir(folder)
        status = pytest.main(
            [
                "-q",
                "-c",
                f"{folder}/pyproject.toml",
                "--rootdir",
                folder,
                "-p",
                "no:cacheprovider",
                "-p",
                "no:unraisableexception",
                "--tb=short",
                "-m",
                job["question"],
                f"--maxfail={job.get('maxfail', 0)}",
                f"--assert={job.get('assert', 'rewrite')}",
                f"{folder}/tests/test_questions.py",
            ],
            plugins=[points],
        )
        with to_file(order["results"], "a") as file:
            file.write(order["token"] + to_json(points.result(status)) + "\n")
        for name in [
            n
            for n in sys.modules
            if n in ("model", "cosd", "contexts", "train", "conftest", "test_questions", "q8")
        ]:
            del sys.modules[name]


def run_jobs(jobs: list[dict], seconds: float, scratch: Path) -> tuple[list[dict], str, str]:
    """Test the projects one after the other in one process -> (a result for each that was finished, how it ended, its output).

    The grader gives one job at a time. `scratch` is the process's own; its results lie beside, in a folder without a telling name.
    """
    token, closed = secrets.token_hex(16), Path(tempfile.mkdtemp())
    threads = (
        os.environ.get("OMP_NUM_THREADS", "2") if jobs[0]["question"] == "q6" else "1"
    )  # tiny models: one is fastest
    order = {"jobs": jobs, "token": token, "results": str(closed / "results")}
    environment = {
        key: os.environ[key]
        for key in ("PATH", "LANG", "LD_LIBRARY_PATH", "SYSTEMROOT")
        if key in os.environ
    }
    environment |= {
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": threads,
        "PYTHONUTF8": "1",
        "MPLCONFIGDIR": str(scratch),
    }

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))

    with open(closed / "output", "w+b") as output, open(closed / "order", "w+") as stdin:
        stdin.write(json.dumps(order))
        stdin.seek(0)
        (closed / "order").unlink()
        process = subprocess.Popen(
            [sys.executable, __file__, "run"],
            cwd=scratch,
            env=environment,
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=limit,
        )
        try:
            code = process.wait(seconds)
            ended = (
                f"it ended by itself (exit code {code}) before its tests had"
                if code >= 0
                else f"it was killed by signal {-code}"
            )
        except subprocess.TimeoutExpired:
            ended = f"it took longer than {seconds:g} seconds"
        try:
            os.killpg(process.pid, signal.SIGKILL)  # whatever it has started goes with it
        except ProcessLookupError:
            pass
        process.wait()
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - LONGEST_OUTPUT))
        said = output.read().decode("utf-8", "replace")
    lines = (
        (closed / "results").read_text(errors="replace").splitlines()
        if (closed / "results").exists()
        else []
    )
    shutil.rmtree(closed)
    return [json.loads(line[len(token) :]) for line in lines if line.startswith(token)], ended, said


# ====================================================================================================== grading
def grade_question(
    submission: Path, question: str, seed: int, seconds: float, base: Path | None = None
) -> dict:
    """-> one entry of Gradescope's "tests". Whatever the submission does, this returns."""
    asked, began = QUESTIONS[question], time.perf_counter()
    score, lines, folder = 0.0, [], Path(tempfile.mkdtemp())
    try:
        build(submission, question, folder)
        if base:
            shutil.copytree(base, folder / "out" / base.name)
        results, ended, said = run_jobs(
            [dict(folder=str(folder), question=question, seed=seed)], seconds, folder
        )
        if not results:
            raise Refused(f"{ended}; no points for {question}. The end of what it printed:\n{said}")
        (result,) = results
        if result["broken"] or result["status"] not in (0, 1):
            raise Refused(
                result["broken"]
                or f"pytest was interrupted (status {result['status']}); the end of what was printed:\n{said}"
            )
        for test in result["tests"]:
            score = round(score + test["score"], 2)
            lines.append(
                f"{test['score']:g}/{test['points']} {test['name']}"
                + (f": {test['reason']}" if test["reason"] else "")
            )
    except Refused as reason:
        score, lines = 0.0, [str(reason)]
    except Exception as error:  # a submission may be anything; the others are still to be graded
        score, lines = (
            0.0,
            [
                f"the grader cannot make anything of this: {type(error).__name__}: {shorten(str(error))}"
            ],
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if asked.by_hand:
        lines.append(
            f"A person reads {WRITTEN[question]}: up to {asked.by_hand} more points, not counted here."
            + ("" if (submission / WRITTEN[question]).is_file() else " It is missing.")
        )
    return {
        "name": f"{question}: {asked.about}",
        "number": question[1:],
        "score": score,
        "max_score": asked.points,
        "status": "passed" if score == asked.points else "failed",
        "output": "\n".join(lines),
        "extra_data": {"seconds": round(time.perf_counter() - began, 1)},
    }


def grade(
    submission: Path, seconds: dict[str, float], seed: int | None = None, bases: Path = ROOT / "out"
) -> dict:
    """The questions in `seconds`, each with its time limit -> Gradescope's results: https://gradescope-autograders.readthedocs.io/en/latest/specs/"""
    seed, questions, tests = (
        random.SystemRandom().randrange(1, 10**6) if seed is None else seed,
        list(seconds),
        [],
    )
    for question in questions:
        base = (
            pretrained(bases) if question == "q6" and (submission / "q6.json").is_file() else None
        )
        tests.append(grade_question(submission, question, seed, seconds[question], base))
    by_hand = ", ".join(
        f"{WRITTEN[q]} ({QUESTIONS[q].by_hand})" for q in questions if QUESTIONS[q].by_hand
    )
    return {
        "tests": tests,
        "score": sum(test["score"] for test in tests),
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "output": f"Numbers drawn with seed {seed}."
        + (f" Read by a person, and not in this score: {by_hand}." if by_hand else ""),
    }


def pretrained(bases: Path) -> Path:
    """The base for q6, by the reference's code; made here once if `bases` does not hold it (five minutes)."""
    sys.path.insert(0, str(ROOT))
    import train

    cfg = train.Config(device="cpu", out=str(bases))
    return bases / train.get_base(cfg, str(bases))[1]


def table(results: dict) -> str:
    rows = [["question", "points", "of", "by hand", "seconds", "what"]]
    for test in results["tests"]:
        asked, what = QUESTIONS[f"q{test['number']}"], test["output"].splitlines()
        lost = [line for line in what if not re.match(r"(\S+)/\1 |A person", line)]
        rows.append(
            [
                test["name"],
                f"{test['score']:g}",
                f"{test['max_score']:g}",
                f"{asked.by_hand or ''}",
                f"{test['extra_data']['seconds']:g}",
                shorten(lost[0], 100) if lost else "",
            ]
        )
    rows.append(
        [
            "sum",
            f"{results['score']:g}",
            f"{sum(t['max_score'] for t in results['tests']):g}",
            "",
            "",
            results["output"],
        ]
    )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[5]]).rstrip()
        for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    hand_out, mark = commands.add_parser("make"), commands.add_parser("grade")
    commands.add_parser("run")
    hand_out.add_argument("folder", type=Path)
    hand_out.add_argument(
        "--solved",
        nargs="*",
        default=[],
        choices=QUESTIONS,
        help="leave the solutions of these questions in",
    )
    mark.add_argument("submission", type=Path)
    mark.add_argument("--results", type=Path, default=Path("results.json"))
    mark.add_argument("--only", nargs="*", default=list(QUESTIONS), choices=QUESTIONS)
    mark.add_argument("--seed", type=int, help="draw the same numbers again")
    mark.add_argument(
        "--patience", type=float, default=1.0, help="multiplies the time limits, for a slow machine"
    )
    mark.add_argument(
        "--bases",
        type=Path,
        default=ROOT / "out",
        help="where the pretrained base of q6 is kept; default out/",
    )
    args = parser.parse_args(argv)
    if args.command == "run":
        run()
    elif args.command == "make":
        make(args.folder, tuple(args.solved))
    else:
        if not args.submission.is_dir():
            raise SystemExit(f"homework.py: there is no folder {args.submission}")
        seconds = {q: args.patience * QUESTIONS[q].seconds for q in args.only}
        results = grade(args.submission, seconds, args.seed, args.bases)
        args.results.write_text(json.dumps(results, indent=1))
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
