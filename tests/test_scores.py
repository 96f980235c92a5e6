"""Scores: numbers as the graders of GSM8K and MATH read them, and the user's own function, whatever it does."""

import sys
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import ROOT

from contexts import BadInput

sys.path.insert(0, str(ROOT / "notebooks"))
from scores import final_number, make_scorer

NUMBERS = {  # text: the number it comes to
    "42": 42,
    "so 42.": 42,
    "42 …": 42,
    "+5": 5,
    "0.1": Fraction(1, 10),
    ".5": Fraction(1, 2),
    "-.5": Fraction(-1, 2),
    "5.": 5,
    "3.5.1": Fraction(7, 2),
    "1000": 1000,
    # signs: ASCII and U+2212; not where it stands behind a digit, or alone
    "-3": -3,
    "\u22125": -5,
    "(-2)": -2,
    "x=-5": -5,
    "--5": -5,
    "3-5": 5,
    "-5-3": 3,
    "3 - 5": 5,
    "- 5": 5,
    "10\u201312": 12,
    # commas: thousands in groups of three, else a list
    "1,234": 1234,
    "so 1,234.50 in all": Fraction(2469, 2),
    "1,234,567": 1234567,
    "1,2,3": 3,
    "12,34": 34,
    "2,5": 5,
    "1,0000": 0,
    "1{,}234": 1234,
    r"1\,234": 1234,
    r"1,\!234": 1234,
    # money, percent, units
    "$5": 5,
    "$ 5": 5,
    "-$5": -5,
    "$-5": -5,
    r"-\$5": -5,
    "$1,000.": 1000,
    "€7": 7,
    "50%": 50,
    "42 %": 42,
    "3eggs": 3,
    "5 apples, 6 pears": 6,
    # powers of ten and fractions
    "1e3": 1000,
    "2E2": 200,
    "1.5e-3": Fraction(3, 2000),
    "3/4": Fraction(3, 4),
    r"\frac{3}{4}": Fraction(3, 4),
    r"-\dfrac{3}{4}": Fraction(-3, 4),
    # MATH's box, GSM8K's mark, else the last number
    r"\boxed{42} in 3 steps": 42,
    r"\boxed{1} and \boxed{2}, 9": 2,
    r"\boxed{\frac{3}{4}}": Fraction(3, 4),
    "#### 42\nQuestion 7": 42,
    "1 + 1 #### -1,234": -1234,
    "12 + 30 = 42": 42,
    "42, no, 43": 43,
    # none, and none that costs anything to read
    "": None,
    "none": None,
    "####": None,
    "²": None,
    "5/0": None,
    "9" * 5000: None,
    "1e999": Fraction(10) ** 999,
}


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:20] or "nothing")
def test_final_numbers(text):
    assert final_number(text) == NUMBERS[text]


@pytest.mark.parametrize(
    "spec, text, answer, expected",
    [
        ("exact", " foxes \n", "foxes", 1),
        ("exact", "Foxes", "foxes", 0),
        ("exact", "foxes …", "foxes", 0),
        ("contains", "The answer is PARIS.", "Paris", 1),
        ("contains", "Lyon", "Paris", 0),
        ("regex", "it is 42", r"\b4\d\b", 1),
        ("regex", "it is 142", r"\b4\d\b", 0),
        ("number", "so 1,234.50 in all", "#### 1234.5", 1),
        ("number", "it is 0.750", r"\boxed{\frac{3}{4}}", 1),
        ("number", "42, no, 43", "42", 0),
        ("number", "none", "42", 0),
        ("number:42", "it is 42", None, 1),
        ("contains:arr", "ARR matey", None, 1),
        ("regex:^A.*y$", "Arr matey", None, 1),
        ("regex:^A.*x$", "Arr matey", None, 0),
        ("regex:a:b", "a:b", None, 1),
    ],
)
def test_scores(spec, text, answer, expected):
    row = {"where": "f:1"} if answer is None else {"where": "f:1", "answer": answer}
    assert make_scorer(spec, [row])(text, row) == {"score": expected}
    assert make_scorer("none", [row])(text, row) == {}


OWN = """
from __future__ import annotations
import sys
from dataclasses import dataclass, field, make_dataclass

LIMIT = 5

@dataclass(frozen=True)
class Rule:
    most: int
    names: list[str] = field(default_factory=list)

class Mute(Exception):
    def __str__(self):
        raise TypeError

def short(text, row):
    return len(text) < Rule(LIMIT).most + row["more"]

def late(text, row):
    return make_dataclass("Late", ["x"])(text).x == text

def broken(text, row):
    return 1 / (text != "x")

def leaves(text, row):
    if text:
        sys.exit(0)
    return 0

def mute(text, row):
    raise Mute

def infinite(text, row):
    return float("inf") if text else 1

def nan(text, row):
    return float("nan") if text else 1

def word(text, row):
    return "good" if text else 1

def nothing(text, row):
    return None if text else 1
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_a_python_function_scores(own):
    row = {"more": 1, "where": "f:7"}
    short = make_scorer(f"{own}:short", [row])
    assert [short(text, row)["score"] for text in ("abcde", "abcdefg")] == [1.0, 0.0]
    assert make_scorer(f"{own}:late", [row])("x", row) == {"score": 1.0}


@pytest.mark.parametrize(
    "name, message",
    [
        ("broken", "ZeroDivisionError: division by zero"),
        ("leaves", "SystemExit: 0"),
        ("infinite", "inf is not a finite score"),
        ("nan", "nan is not a finite score"),
        ("word", "could not convert string to float: 'good'"),
        ("nothing", "TypeError: float"),
    ],
)
def test_its_failures_are_one_line_with_the_line_of_the_file(own, name, message):
    row = {"more": 1, "where": "f:7"}
    with pytest.raises(BadInput) as error:
        make_scorer(f"{own}:{name}", [row])("x", row)
    said = str(error.value)
    assert said.startswith(f"f:7: --score {own}:{name} on 'x': {message}") and "\n" not in said


@pytest.mark.parametrize(
    "text, name, message",
    [
        (OWN, "mute", "f:7: --score {}:mute on '': <run_path>.Mute: <exception str() failed>"),
        (
            OWN,
            "gone",
            "--score {}:gone: there is no gone; choose from none, exact, contains, regex, number",
        ),
        ("raise SystemExit", "f", "--score {}:f: SystemExit"),
        ("import nowhere_to_be_found", "f", "--score {}:f: ModuleNotFoundError"),
        ("def f(:", "f", "--score {}:f: "),
    ],
)
def test_a_file_that_cannot_be_used_is_found_before_training(own, text, name, message):
    own.write_text(text)
    with pytest.raises(BadInput) as error:
        make_scorer(f"{own}:{name}", [{"more": 1, "where": "f:7"}])
    said = str(error.value)
    assert said.startswith(message.format(own)) and "\n" not in said


def test_what_a_score_needs_is_missed_before_training():
    rows = [{"where": "f:1", "answer": "4"}, {"where": "f:2"}]
    with pytest.raises(BadInput, match="f:2: --score exact on '': KeyError: 'answer'"):
        make_scorer("exact", rows)
    with pytest.raises(BadInput, match="f:1: --score number on '': there is no number .* 'four'"):
        make_scorer("number", [{"where": "f:1", "answer": "four"}])
    with pytest.raises(BadInput, match=r"f:1: --score regex:\( on ''"):
        make_scorer("regex:(", rows)


def test_the_pirate_score_is_not_taken_in_by_degenerate_answers():
    sys.path.insert(0, str(ROOT / "notebooks" / "data"))
    from pirate import score

    assert score("Arr, matey! Italy be Rome, the capital of the world.", {})
    for degenerate in (
        "aye aye aye",
        "Arr, aye, aye, aye, aye, aye, aye, aye, a …",
        "arr matey ahoy ship sea",
        "The sea is salty because of the ship.",
        "",
        "Arr, why, matey, why, why, why, why, why, why, why, why, why …",
        "Rome is the capital of Italy.",
    ):
        assert not score(degenerate, {}), degenerate


def test_the_shipped_scores_read_as_files_of_ones_own():
    path = Path(make_scorer.__globals__["__file__"])
    row = {"where": "f:1", "answer": "4"}
    assert make_scorer(f"{path}:number", [row])("2 + 2 = 4", row) == {"score": 1.0}
