"""The repository as a course assignment: make the student's copy, and grade submissions.

    python notebooks/homework.py make FOLDER [--solved q1 q2]          the student's copy
    python notebooks/homework.py grade SUBMISSION [--results FILE]     a table, and a JSON in Gradescope's results format
    python notebooks/homework.py class FOLDER [--results FOLDER]       grades every folder and zip in it; writes grades.csv
    python notebooks/homework.py zip FILE                              an autograder for Gradescope, with a Dockerfile

`ASKED` lists what the student is to write: the functions of each question, with a hint. `make` puts `raise
NotImplementedError("q3: ...")` there, and checks that no removed line of 24 or more characters is left anywhere in the copy.

`grade` copies the functions that a question asks for, and any top-level names that the student added to that file, into the
instructor's file without answers. This runs in a process without access to anything, which maps inputs to outputs (`Student`,
grader/worker.py); another process judges the outputs (grader/judge.py). Submitted settings are data: measure.py trains with them
again, on the instructor's code. See homework.md.
"""

from __future__ import annotations

import argparse
import ast
import csv
import inspect
import json
import math
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT, GRADER = HERE.parent, HERE / "grader"
sys.path[:0] = [str(ROOT), str(HERE), str(GRADER)]
import base
import fifth
import judge
import measure
import worker

HANDOUT, SOLUTIONS = HERE / "homework.md", HERE / "solutions"
CODE = ("model.py", "cosd.py", "contexts.py", "train.py")
CODED = ("q1", "q2", "q3", "q4", "q5")
SHIPPED = (
    *CODE,
    "pyproject.toml",
    "LICENSE",
    ".gitignore",
    "notebooks/base.py",
    "notebooks/homework.md",
    "notebooks/measure.py",
    "notebooks/report.py",
    "tests/conftest.py",
    "tests/test_questions.py",
)
KEPT = ("PATH", "LANG", "LD_LIBRARY_PATH", "SYSTEMROOT")  # environment variables that are passed on
IMPORTS = set(
    """__future__ abc bisect cmath collections contextlib copy dataclasses decimal enum fractions functools heapq
    inspect itertools json logging math numbers operator os pathlib random re statistics string struct sys textwrap time
    traceback types typing typing_extensions unicodedata unittest uuid warnings weakref
    torch numpy einops opt_einsum tiktoken transformers safetensors tqdm""".split()
)  # what a submission may import; these are imported before its code runs


@dataclass(frozen=True)
class Question:
    about: str
    points: int  # given by the tests
    files: tuple[str, ...]  # to be submitted
    seconds: int  # time limit of a case, or of the training; with a wide margin
    by_hand: int = 0  # points that a person gives


QUESTIONS = {
    "q1": Question("divergences from logits", 15, ("cosd.py",), 10, by_hand=5),
    "q2": Question("the shift and the weights", 10, ("cosd.py",), 10),
    "q3": Question("rollouts with a KV cache", 15, ("model.py",), 20),
    "q4": Question("what the teacher sees", 10, ("contexts.py",), 10),
    "q5": Question("the loss", 15, ("cosd.py",), 10),
    "q6": Question("a verb learned, nothing forgotten", 15, ("q6.json",), 900),
    "q7": Question("an ablation", 5, ("q7.json", "q7.png", "q7.md"), 600, by_hand=10),
    "q8": Question("bonus: a fifth context", 10, ("q8.py",), 600),
}
WRITTEN = {"q1": "q1.md", "q7": "q7.md"}  # read by a person
LARGEST = 64 * 2**20  # bytes of a zip's unpacked files


# ============================================================================================ the student's copy
@dataclass(frozen=True)
class Asked:
    """What a question asks for: the body of a function, from the statement that starts with `begins` (or the first) to the one
    before the statement that starts with `ends` (or the last)."""

    question: str
    file: str
    function: str  # "GPT.generate"
    hint: str
    begins: str = ""
    ends: str = ""


ASKED = (
    Asked(
        "q1",
        "cosd.py",
        "log_softmax_pair",
        "logits are not log-probabilities; who gets gradient?",
        "return",
    ),
    Asked(
        "q1",
        "cosd.py",
        "kl",
        "if a is 0, log a is −∞: keep it out of the forward and the backward pass",
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
        "leave out the tokens that `skip` says, then divide: by what?",
        "scored =",
    ),
    Asked(
        "q3",
        "model.py",
        "KVCache.advance",
        "the slots of these tokens; then self.bias: 0 where a query may see a slot, −∞ where it may not",
        "slots, S =",
    ),
    Asked(
        "q3",
        "model.py",
        "KVCache.attend",
        "store k and v in self.keys and self.values of this layer: on the first call with room after them, later in their slots",
        "if self.filling",
        "if self.bias",
    ),
    Asked(
        "q3",
        "model.py",
        "GPT.generate",
        "read the prompts at once, forget the padding, then generate a token at a time",
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
        "the context is system turn, example turns, shots; x and the shots go through `dressed`",
    ),
    Asked(
        "q5",
        "cosd.py",
        "cosd_loss",
        "states of both, then the objective at every token and the weighted sum; or all of it in chunks",
        "h_s =",
    ),
    Asked(
        "q5",
        "cosd.py",
        "token_probabilities",
        "the same states without gradient; then the probability of each sampled token",
        "h_s =",
    ),
)
SHOWN: set[str] = set()  # removed lines that also occur in a given function, where they may stay


@dataclass(frozen=True)
class Blank:
    """One place to fill: lines first..last (from 1) of the file are the student's."""

    asked: Asked
    first: int
    last: int
    indent: str


@lru_cache(maxsize=16)
def blanks(name: str, source: str) -> list[Blank]:
    """The places to fill in a version of a file, from top to bottom."""
    found, defs = [], functions(ast.parse(source))
    for asked in ASKED:
        if asked.file != name:
            continue
        if asked.function not in defs:
            raise LookupError(f"{name} has no function {asked.function} any more: see ASKED")
        body = defs[asked.function].body
        if ast.get_docstring(defs[asked.function]) is not None:
            body = body[1:]
        texts = [ast.get_source_segment(source, statement) for statement in body]
        first = statement_of(asked, texts, asked.begins)
        last = statement_of(asked, texts, asked.ends) - 1 if asked.ends else len(body) - 1
        indent = " " * body[first].col_offset
        found.append(Blank(asked, body[first].lineno, body[last].end_lineno, indent))
    return sorted(found, key=lambda blank: blank.first)


def statement_of(asked: Asked, texts: list[str], begins: str) -> int:
    """The index of the first statement that starts with `begins`."""
    for i, text in enumerate(texts):
        if text.startswith(begins):
            return i
    raise LookupError(f"{asked.function} has no statement {begins!r} any more: see ASKED")


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
        while lines[above - 1].strip().startswith("#"):  # comments above the first statement go too
            above -= 1
        removed += lines[above : blank.last]
        hint = f'raise NotImplementedError("{question}: {blank.asked.hint}")'
        lines[above : blank.last] = [f"{blank.indent}{hint}\n"]
    return "".join(lines), removed


def survivors(folder: Path, removed: list[str]) -> list[str]:
    """Removed lines of 24 characters or more that are still in some file of the copy, also in a notebook's sources or outputs."""

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
    """All texts in a JSON value; a list of texts, as in a notebook, is joined."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ["".join(value)]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for v in inner for text in strings(v)]


DERIVED = (
    r"(?ms)^    Gradient .*?(?=^    \S+ {2,}|\n\n|\"\"\")"  # an entry of a docstring, to the next
)


def underived(source: str) -> str:
    """Without the gradient formulas in the docstrings of question 1, which q1.md asks to derive."""
    defs, edits = functions(ast.parse(source)), []
    lines = source.splitlines(keepends=True)
    for asked in ASKED:
        if asked.question == "q1":
            first = defs[asked.function].body[0]
            edits.append((first.lineno - 1, first.end_lineno))
    for first, last in sorted(edits, reverse=True):
        text = "".join(lines[first:last])
        note = "    Gradient   to the student only; you derive it in q1.md.\n"
        lines[first:last] = [re.sub(DERIVED, note, text)]
    return "".join(lines)


def make(folder: Path, solved: tuple[str, ...] = (), bases: Path = ROOT / "out") -> None:
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"homework.py: {folder} is not empty: give a new folder")
    files, removed = {name: (ROOT / name).read_text() for name in SHIPPED}, []
    handout = files["notebooks/homework.md"]  # README; questions; for instructors
    files["README.md"], files["notebooks/homework.md"] = re.search(
        r"<!-- README -->\n(.*?)<!-- questions -->\n(.*?)<!-- instructors -->", handout, re.S
    ).groups()
    for name, text in files.items():
        if name in CODE:
            text, gone = blank_out(name, text, solved)
            removed += gone
        if name == "cosd.py" and "q1" not in solved:
            text = underived(text)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.strip() + "\n")
    if left := survivors(folder, removed):
        shutil.rmtree(folder)
        raise SystemExit("homework.py: the copy would give solutions away:\n" + "\n".join(left))
    print(f"{folder}: {len(files)} files, {len(removed)} lines to write")
    try:
        base.pack(bases, folder / "base.safetensors")
    except base.Missing as missing:
        print(f"{missing}: the copy has none, and every student must make one (14 minutes)")


# ===================================================================================== a submission, one file merged
class Refused(Exception):
    """The reason why a question gets no points, in one line."""


def find(submission: Path) -> Path:
    """The folder with the files: `submission` itself, or the folder below it with the most of them (the one inside a zip)."""
    wanted = {name for q, asked in QUESTIONS.items() for name in (*asked.files, WRITTEN.get(q))}

    def held(folder):
        return sum((folder / name).is_file() for name in wanted if name)

    folders = [submission]
    for path in sorted(submission.rglob("*")):
        below = path.relative_to(submission).parts
        plain = not any(part.startswith((".", "__")) for part in below)
        if path.is_dir() and not path.is_symlink() and plain and len(below) <= 3:
            folders.append(path)
    return max(folders, key=lambda folder: (held(folder), -len(folder.parts)))


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
    """The reference, with the functions `wanted` and all new names from the submission, each where the student put it."""
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
    if not yours.keys() & set(wanted):
        raise Refused(f"{name} has no function {wanted[0]}")
    for function in wanted:
        if function not in yours:  # stays open
            continue
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
    """The names that a top-level statement defines. Statements that define none (a call, a `raise`) are dropped."""
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


def merged(submission: Path, question: str) -> tuple[str, list[str]]:
    """-> (the question's file: the functions asked for are the student's, the rest the instructor's without answers; its imports)."""
    (name,) = QUESTIONS[question].files
    text, tree = parse(name, handed_in(submission, name, question))
    if name in CODE:
        text = merge(given(name), text, tree, asked_for(question, name), name)
    return text, imports(parse(name, text.encode())[1])


@lru_cache(maxsize=8)
def given(name: str) -> str:
    """The instructor's file without any answer."""
    return blank_out(name, (ROOT / name).read_text())[0]


def imports(tree: ast.Module) -> list[str]:
    """The allowed modules that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [n for n in names if n.partition(".")[0] in IMPORTS and "__" not in n]


# ================================================================================================ the student's process
BOOT = "import sys; n = int(sys.stdin.buffer.readline()); exec(sys.stdin.buffer.read(n))"
CACHE = {"model.KVCache.advance": "plain_advance", "model.KVCache.attend": "plain_attend"}
STANDINS = {  # for the answers to other questions; the last entry: names in the submitted module that are replaced
    "q1": ("", {}, {}),
    "q2": ("plain_advance plain_attend", CACHE, {}),
    "q3": ("", {}, {}),
    "q4": ("", {}, {}),
    "q5": (
        "plain_advance plain_attend standin_states plain_log_softmax_pair",
        CACHE,
        {
            "completion_states": "standin_states",
            "shared_states": "standin_states",
            "log_softmax_pair": "plain_log_softmax_pair",
        },
    ),
    "q8": ("", {}, {}),
}
BESIDE = {"q1": ("model.py",), "q2": ("model.py",), "q5": ("model.py",), "q8": ("contexts.py",)}


NEEDED: dict[
    bool, list[str]
] = {}  # what PyTorch imports at first use, found out by the first process


class Student:
    """A process in which a submission's code for one question maps inputs to outputs; see grader/worker.py."""

    def __init__(self, question: str, seconds: float, megabytes: int = 1024):
        self.question, self.seconds, self.megabytes = question, seconds, megabytes
        self.empty, self.process, self.loaded = tempfile.mkdtemp(), None, None
        self.uid = 60_000 + os.getpid() % 5_000 if os.geteuid() == 0 else None
        os.chmod(self.empty, 0o755)

    def __enter__(self):
        self.start()
        standins, self.standins = self.standins, {}
        self.load("", [])
        found = self.ask("sealed", {})
        if "error" in found and self.uid is not None:  # root without the right to chroot
            self.uid = None
            found = self.ask("sealed", {})
        if found != {"out": {"opened": []}}:
            raise RuntimeError(f"submitted code could not be locked in here: {found}")
        self.standins = standins
        return self

    def __exit__(self, *_):
        self.stop()
        shutil.rmtree(self.empty, ignore_errors=True)

    def start(self) -> None:
        self.stop()
        source = (GRADER / "worker.py").read_bytes()
        environment = {key: os.environ[key] for key in KEPT if key in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", BOOT],
            cwd=self.empty,
            env=environment | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HOME": self.empty},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.process.stdin.write(b"%d\n" % len(source) + source)
        functions, patches, self.standins = STANDINS[self.question]
        header = "import torch\nimport torch.nn.functional as F\n"
        texts = [inspect.getsource(getattr(judge, name)) for name in functions.split()]
        if "standin_states" in functions:
            header += "from model import KVCache\n"
        order = {
            "empty": self.empty,
            "meta": self.question == "q5",
            "needed": NEEDED.get(self.question == "q5"),
            "given": {Path(n).stem: given(n) for n in BESIDE.get(self.question, ())},
            "standins": header + "\n".join(texts),
            "standin_names": functions.split(),
            "patches": patches,
        }
        self.send(order)
        NEEDED[self.question == "q5"] = self.receive(300)["needed"]
        if self.loaded:
            self.load(*self.loaded)

    def stop(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def send(self, value) -> None:
        data = json.dumps(worker.plain(value)).encode()
        self.process.stdin.write(b"%d\n" % len(data) + data)
        self.process.stdin.flush()

    def receive(self, seconds: float):
        """The next answer. EOFError if the process is silent for too long or has ended."""
        pipe, data, until = self.process.stdout.fileno(), b"", time.monotonic() + seconds
        while True:
            head, newline, body = data.partition(b"\n")
            if newline and len(body) >= int(head):
                return json.loads(body)
            ready, _, _ = select.select([pipe], [], [], max(0, until - time.monotonic()))
            part = os.read(pipe, 2**20) if ready else b""
            if not part:
                raise EOFError
            data += part

    def load(self, source: str, names: list[str]) -> None:
        self.loaded = source, names
        self.send({"submission": source, "imports": names})
        found = self.receive(60)
        if not found["ready"]:
            raise Refused(found["error"])

    def answers(self, cases: list) -> list[dict]:
        """For each case {"out": ...} or {"error": why there is no output}. Returns whatever the submission does."""
        module = Path(QUESTIONS[self.question].files[0]).stem
        inputs = [dict(operation=case.operation, given=case.given) for case in cases]
        order = dict(cases=inputs, module=module, standins=self.standins)
        limits = dict(uid=self.uid, seconds=self.seconds, megabytes=self.megabytes)
        try:
            self.send(order | limits)
            texts = self.receive((self.seconds + 5) * len(cases) + 30)
        except (EOFError, BrokenPipeError):  # possibly by a signal, if it ran as the same user
            self.start()
            if len(cases) > 1:
                return [self.answers([case])[0] for case in cases]
            texts = ['{"error": "it ended the process that it ran in"}']
        return [as_answer(text) for text in texts]

    def ask(self, operation: str, inputs: dict) -> dict:
        return self.answers([judge.Case(operation, inputs, None)])[0]


def as_answer(text: str) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"error": "it gave no readable output"}


def shorten(text: str, length: int = 300) -> str:
    """The first lines of a message, in printable characters."""
    text = " ".join(line.strip() for line in text.strip().splitlines()[:4])
    return "".join(c if c.isprintable() else "?" for c in text)[:length]


def verdict(case, answer: dict) -> str:
    """The reason why an answer is wrong, or "" if it is right."""
    if "out" not in answer:
        return shorten(str(answer.get("error", "no output")))
    try:
        case.judge(answer["out"])
    except judge.Wrong as reason:
        return shorten(str(reason))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        return shorten(f"the output does not have the right form: {type(error).__name__}: {error}")
    return ""


def judge_code(student: Student, parts: list, seed: int) -> list[dict]:
    """`parts` from judge.cases_of -> name, points, score and reasons of each. The cases are asked in random order."""
    reasons = {}
    for part, cases in random.Random(seed).sample(parts, len(parts)):
        cases = random.Random(seed).sample(cases, len(cases))
        found = [verdict(case, answer) for case, answer in zip(cases, student.answers(cases))]
        reasons[part.name] = [reason for reason in found if reason]
    return [scored(part, len(cases), reasons[part.name]) for part, cases in parts]


def scored(part, count: int, reasons: list[str]) -> dict:
    score = round(part.points * (count - len(reasons)) / count, 2)
    return dict(name=part.name, points=part.points, score=score, reasons=reasons)


# ========================================================================================== q6 to q8: what is handed in
def measured(arguments: list[str], bases: Path, seconds: float) -> dict:
    """The result of measure.py, which runs in another process and contains none of the student's code."""
    if base.FILE.exists():
        base.unpack(bases)
    command = [sys.executable, str(HERE / "measure.py"), *arguments, "--json", "--out", str(bases)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"training took longer than {seconds:g} seconds") from None
    if done.returncode:
        raise Refused(shorten(done.stderr.strip().splitlines()[-1] if done.stderr else "no result"))
    return json.loads(done.stdout.splitlines()[-1])


def one(name: str, points: int, score: float, reason: str = "") -> dict:
    return dict(name=name, points=points, score=score, reasons=[reason] if reason else [])


def read_json(submission: Path, name: str, question: str):
    try:
        return json.loads(handed_in(submission, name, question))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name} is not JSON: {error}") from None


def judge_q6(submission: Path, seed: int, seconds: float, bases: Path) -> list[dict]:
    """First, was it learned within the budget? If so, the less is forgotten the better."""
    text = json.dumps(read_json(submission, "q6.json", "q6"))
    try:
        measure.read_settings(text)
    except (ValueError, TypeError) as error:
        raise Refused(f"q6.json: {error}") from None
    valid = one("settings_are_valid", 1, 1)
    try:
        seeds = ["--seeds", "3", "--first", str(1 + seed % 997)]
        found = measured([text, *seeds], bases, seconds)
    except Refused as reason:
        failed = "learned_within_the_budget", 6, 0, str(reason)
        return [valid, one(*failed), one("forgets_little", 8, 0, "nothing was learned")]
    said = ", ".join(f"{name} {found[name]:.3f}" for name in measure.MEASURED)
    enough = found["exact"] >= measure.LEARNED and found["tokens"] <= measure.BUDGET
    forgot = round(max(0.0, -found["prior"], -found["steerability"]), 4)
    score = next((points for most, points in measure.FORGETTING if forgot <= most), 0)
    score = score if enough else 0
    why = "" if score == 8 else f"{forgot:.3f} forgotten: {said}"
    little = one("forgets_little", 8, score, why)
    if enough:  # the class is ranked by this
        little["forgotten"] = forgot
    return [valid, one("learned_within_the_budget", 6, 6 * enough, "" if enough else said), little]


ROW = {"divergence", "teacher", "anchors", "score", "prior", "drift"}


def judge_q7(submission: Path, seed: int, seconds: float, bases: Path) -> list[dict]:
    """Eight runs over three factors, one of which is run again; a plot and a page, which a person reads."""
    parts = []
    for name, points, check in (
        ("eight_runs_over_three_factors", 1, lambda: seven_rows(submission)),
        ("a_row_run_again", 3, lambda: run_again(submission, seed, seconds, bases)),
        ("a_plot_and_half_a_page", 1, lambda: plot_and_page(submission)),
    ):
        try:
            check()
            parts.append(one(name, points, points))
        except (Refused, ValueError, TypeError, KeyError) as reason:
            parts.append(one(name, points, 0, shorten(f"{reason}")))
    return parts


def seven_rows(submission: Path) -> dict:
    """q7.json, if it has eight runs or more that differ as required."""
    found = read_json(submission, "q7.json", "q7")
    if not isinstance(found, dict) or not {"settings", "runs"} <= found.keys():
        raise Refused('q7.json must be {"settings": {...}, "runs": [...]}')
    runs = found["runs"]
    for run in runs:
        if not isinstance(run, dict) or not ROW <= run.keys():
            raise Refused(f"each of the runs must have {', '.join(sorted(ROW))}")
        numbers = [run[name] for name in ("anchors", "score", "prior", "drift")]
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
            raise Refused(f"anchors, score, prior and drift must be numbers: {run}")
        if not (0 <= run["score"] <= 1 and -1 <= run["prior"] <= 1 and run["drift"] >= 0):
            raise Refused(f"score must be in [0, 1], prior in [-1, 1], drift at least 0: {run}")
        again_settings(found, run)
    different = {(run["divergence"], run["teacher"], run["anchors"]) for run in runs}
    varied = [len({row[i] for row in different}) > 1 for i in range(3)]
    if len(different) < 8 or not all(varied):
        raise Refused(f"{len(different)} different settings: at least 8, and each factor must vary")
    return found


def again_settings(found: dict, run: dict) -> str:
    chosen = {name: run[name] for name in ("divergence", "teacher", "anchors")}
    text = json.dumps(found["settings"] | chosen)
    measure.read_settings(text, ("anchors",))
    return text


def run_again(submission: Path, seed: int, seconds: float, bases: Path) -> None:
    found = seven_rows(submission)
    run = random.Random(seed).choice(found["runs"])
    again = measured([again_settings(found, run), "--as-trained"], bases, seconds)
    off = [
        abs(run["score"] - again["exact"]) > 0.1,
        abs(run["prior"] - again["prior"]) > 0.1,
        abs(math.log((run["drift"] + 0.003) / (again["drift"] + 0.003))) > math.log(2.5),
    ]
    if any(off):
        said = ", ".join(f"{k} {again[k]:.3f}" for k in ("exact", "prior", "drift"))
        raise Refused(f"{run}, when run again, gives {said}")


def plot_and_page(submission: Path) -> None:
    picture(handed_in(submission, "q7.png", "q7"))
    words = re.findall(r"\w+", handed_in(submission, "q7.md", "q7").decode("utf-8", "replace"))
    different = {word.lower() for word in words}
    if not 150 <= len(words) <= 700 or len(different) < 70:
        raise Refused(f"q7.md has {len(words)} words, {len(different)} different: 150 to 600 words")


def picture(data: bytes) -> None:
    """Accept a PNG that can be unpacked, has 300 pixels or more each way, and is not of one colour."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise Refused("q7.png is not a PNG")
    place, packed, header = 8, b"", None
    while place + 12 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + size]
        check = int.from_bytes(data[place + 8 + size : place + 12 + size], "big")
        if zlib.crc32(kind + body) != check:
            raise Refused("q7.png is damaged")
        header = body if kind == b"IHDR" else header
        packed += body if kind == b"IDAT" else b""
        place += 12 + size
    if header is None or len(header) != 13:
        raise Refused("q7.png is damaged")
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (0, 4))
    if not (300 <= width <= 10_000 and 300 <= height <= 10_000):
        raise Refused(f"q7.png is {width} by {height} pixels: at least 300 each way")
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(header[9], 1)
    row = 1 + (width * channels * header[8] + 7) // 8
    try:
        pixels = zlib.decompressobj().decompress(packed, row * height + 1)
    except zlib.error:
        raise Refused("q7.png is damaged") from None
    rows = {pixels[i : i + row] for i in range(0, len(pixels), row)}
    if header[12] == 0 and (len(pixels) != row * height or len(rows) < 20):
        raise Refused("q7.png is nearly empty")


def judge_q8(submission: Path, seed: int, seconds: float, bases: Path) -> list[dict]:
    """Is it a context? It is not in x, y depends on it, the teacher knows more with it, and the student can learn it."""
    source, names = merged(submission, "q8")
    with Student("q8", seconds / 30) as student:
        student.load(source, names)
        drawn = fifth.draw_all(student.ask, seed)
    parts, sound = fifth.judge_form(drawn)
    if not sound:
        failed = "the draws are not valid"
        return [*parts, *(one(name, points, 0, failed) for name, points in fifth.TRAINED)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "draws.json").write_text(json.dumps(drawn))
        found = measured(["--fifth", f"{folder}/draws.json"], bases, seconds)
    return parts + fifth.judge_training(found)


# ============================================================================================================= grading
def grade_question(
    submission: Path, question: str, seed: int, patience: float, bases: Path
) -> dict:
    """-> one entry of Gradescope's "tests". Returns whatever the submission does."""
    asked, began = QUESTIONS[question], time.perf_counter()
    seconds, lines, score, ranked = asked.seconds * patience, [], 0.0, {}
    try:
        if question in CODED:
            source, names = merged(submission, question)
            with Student(question, seconds) as student:
                student.load(source, names)
                parts = judge_code(student, judge.cases_of(question, seed), seed)
        else:
            judges = {"q6": judge_q6, "q7": judge_q7, "q8": judge_q8}
            parts = judges[question](submission, seed, seconds, bases)
        for part in parts:
            score = round(score + part["score"], 2)
            lines.append(f"{part['score']:g}/{part['points']} {part['name']}")
            lines += [f"    {reason}" for reason in dict.fromkeys(part["reasons"][:3])]
            ranked |= {"forgotten": part["forgotten"]} if "forgotten" in part else {}
    except Refused as reason:
        score, lines = 0.0, [str(reason)]
    except Exception as error:  # a submission may be anything; the others are still to be graded
        said = f"{type(error).__name__}: {shorten(str(error))}"
        score, lines = 0.0, [f"the grader cannot handle this submission: {said}"]
    if asked.by_hand:
        missing = "" if (submission / WRITTEN[question]).is_file() else " It is missing."
        lines.append(
            f"A person reads {WRITTEN[question]}: up to {asked.by_hand} more points, "
            f"not counted here.{missing}"
        )
    return {
        "name": f"{question}: {asked.about}",
        "number": question[1:],
        "score": score,
        "max_score": asked.points,
        "status": "passed" if score == asked.points else "failed",
        "output": "\n".join(lines),
        "extra_data": {"seconds": round(time.perf_counter() - began, 1)} | ranked,
    }


def grade(
    submission: Path,
    questions: list[str],
    seed: int | None = None,
    patience: float = 1.0,
    bases: Path = ROOT / "out",
) -> dict:
    """-> Gradescope's results: https://gradescope-autograders.readthedocs.io/en/latest/specs/"""
    seed = random.SystemRandom().randrange(1, 10**6) if seed is None else seed
    folder = find(submission)
    tests = [grade_question(folder, q, seed, patience, bases) for q in questions]
    by_hand = ", ".join(
        f"{WRITTEN[q]} ({QUESTIONS[q].by_hand})" for q in questions if QUESTIONS[q].by_hand
    )
    said = f"The cases were drawn with seed {seed}."
    if folder != submission:
        said += f" The files were found in {folder.relative_to(submission)}/."
    if os.geteuid():
        said += " The code ran as the grader's user: it could open nothing, but see homework.md."
    forgotten = [t["extra_data"]["forgotten"] for t in tests if "forgotten" in t["extra_data"]]
    board = [{"name": "forgotten in q6", "value": v, "order": "asc"} for v in forgotten]
    return {
        "tests": tests,
        "leaderboard": board,
        "score": round(sum(test["score"] for test in tests), 2),
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "output": said + (f" Read by a person, not in this score: {by_hand}." if by_hand else ""),
    }


def table(results: dict) -> str:
    rows = [["question", "points", "of", "by hand", "seconds", "what"]]
    for test in results["tests"]:
        asked, lines = QUESTIONS[f"q{test['number']}"], test["output"].splitlines()
        lost = [line for line in lines if not re.match(r"(\S+)/\1 |A person|    ", line)]
        why = [line.strip() for line in lines if line.startswith("    ")]
        what = " ".join([*lost[:1], *why[:1]]) if lost else ""
        numbers = test["score"], test["max_score"], asked.by_hand, test["extra_data"]["seconds"]
        rows.append([test["name"], *(f"{n:g}" for n in numbers), shorten(what, 110)])
    most = sum(test["max_score"] for test in results["tests"])
    rows.append(["sum", f"{results['score']:g}", f"{most:g}", "", "", results["output"]])
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join([*cells, row[5]]).rstrip())
    return "\n".join(lines)


def unpacked(path: Path, to: Path) -> Path:
    """A submission's folder; a zip is unpacked into `to`, and nowhere else."""
    if path.is_dir():
        return path
    with zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > LARGEST:
            raise Refused(f"{path.name} holds more than {LARGEST >> 20} MB")
        archive.extractall(to)  # drops leading slashes and ".."
    return to


def grade_class(folder: Path, results: Path, questions: list[str], **how) -> None:
    """Grade every folder or zip in `folder` -> a JSON for each, and grades.csv. One that has a JSON is not graded again."""
    results.mkdir(parents=True, exist_ok=True)
    found = [p for p in sorted(folder.iterdir()) if p.is_dir() or p.suffix == ".zip"]
    if not found:
        raise SystemExit(f"homework.py: {folder} contains neither folders nor zips")
    lines = [["who", *questions, "sum", "forgotten in q6"]]
    for path in found:
        kept = results / f"{path.stem}.json"
        if not kept.exists():
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    graded = grade(unpacked(path, Path(scratch)), questions, **how)
                except (Refused, zipfile.BadZipFile, OSError) as error:
                    print(f"{path.name}: {error}")
                    continue
            unfinished = kept.with_suffix(".tmp")
            unfinished.write_text(json.dumps(graded, indent=1))
            unfinished.replace(kept)
        graded = json.loads(kept.read_text())
        scores = [f"{test['score']:g}" for test in graded["tests"]]
        ranked = [f"{entry['value']:g}" for entry in graded["leaderboard"]]
        lines.append([path.stem, *scores, f"{graded['score']:g}", *ranked])
        print("  ".join(lines[-1]), flush=True)
        with open(results / "grades.csv", "w", newline="") as file:
            csv.writer(file).writerows(lines)


SETUP = """#!/usr/bin/env bash
apt-get update && apt-get install -y python3 python3-pip
pip3 install --break-system-packages {needs} || pip3 install {needs}
chmod -R go-rwx /autograder/source
"""
RUN = """#!/usr/bin/env bash
cd /autograder
python3 source/notebooks/homework.py grade submission --results results/results.json --bases source/out
"""
DOCKERFILE = """FROM python:3.12-slim
RUN pip install --no-cache-dir {needs}
COPY . /project
RUN chmod -R go-rwx /project
ENTRYPOINT ["python", "/project/notebooks/homework.py"]
"""


def pack(path: Path, bases: Path) -> None:
    """A zip for Gradescope, with the project, the base and a Dockerfile in it."""
    texts = {"setup.sh": SETUP, "run_autograder": RUN, "Dockerfile": DOCKERFILE}
    files = [ROOT / name for name in (*CODE, "pyproject.toml", "LICENSE")]
    files += [*sorted(GRADER.glob("*.py")), HANDOUT]
    files += [HERE / name for name in ("homework.py", "measure.py", "base.py")]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o755 << 16
            archive.writestr(info, text.format(needs=dependencies()))
        for file in files:
            archive.write(file, str(file.relative_to(ROOT)))
        with tempfile.TemporaryDirectory() as folder:
            try:
                base.pack(bases, Path(folder) / "base.safetensors")
                archive.write(f"{folder}/base.safetensors", "base.safetensors")
            except base.Missing as missing:
                print(f"{missing}: the zip has none, and q6 to q8 cannot be graded in time")
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MB")


def dependencies() -> str:
    """The project's dependencies, as arguments for pip."""
    text = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^dependencies = \[(.*?)\]", text, re.M | re.S)
    return " ".join(f"'{need}'" for need in re.findall(r'"([^"]+)"', listed))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    hand_out, mark = commands.add_parser("make"), commands.add_parser("grade")
    everyone, packed = commands.add_parser("class"), commands.add_parser("zip")
    hand_out.add_argument("folder", type=Path)
    about = "include the solutions of these questions"
    hand_out.add_argument("--solved", nargs="*", default=[], choices=QUESTIONS, help=about)
    mark.add_argument("submission", type=Path)
    mark.add_argument("--results", type=Path, default=Path("results.json"))
    everyone.add_argument("folder", type=Path)
    everyone.add_argument("--results", type=Path, default=Path("graded"))
    packed.add_argument("file", type=Path)
    for command in (mark, everyone):
        command.add_argument("--only", nargs="*", default=list(QUESTIONS), choices=QUESTIONS)
        command.add_argument("--seed", type=int, help="draw the same numbers again")
        about = "multiply the time limits, for a slow machine"
        command.add_argument("--patience", type=float, default=1.0, help=about)
    for command in (hand_out, mark, everyone, packed):
        about = "the folder of the pretrained base [out/]; it is made there if it is missing"
        command.add_argument("--bases", type=Path, default=ROOT / "out", help=about)
    args = parser.parse_args(argv)
    if args.command == "make":
        make(args.folder, tuple(args.solved), args.bases)
    elif args.command == "zip":
        pack(args.file, args.bases)
    elif args.command == "class":
        how = dict(seed=args.seed, patience=args.patience, bases=args.bases)
        grade_class(args.folder, args.results, args.only, **how)
    else:
        if not args.submission.exists():
            raise SystemExit(f"homework.py: there is no folder {args.submission}")
        with tempfile.TemporaryDirectory() as scratch:
            folder = unpacked(args.submission, Path(scratch))
            results = grade(folder, args.only, args.seed, args.patience, args.bases)
        args.results.write_text(json.dumps(results, indent=1))
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
