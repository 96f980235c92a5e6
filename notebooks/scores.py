"""The scores that `--score NAME` knows: each is (the answer's text, the line as it was read) -> right?

    --score number             the line's "answer" says what is wanted
    --score contains:arr       or the flag does, the same for all lines
    --score mine.py:function   a function of your own, of the same form; it may return any finite number

A score reads what the user would read: without the end token, and without a thought in <think> tags.
An answer that was cut off shows a trailing "…".
"""

import math
import re
import runpy
from decimal import Decimal
from fractions import Fraction

from contexts import reading

# A number as GSM8K's and MATH's graders read it: 1,234.50 (commas only between groups of three), .5, 1e3,
# 3/4 and \frac{3}{4}; with a sign in front, unless that stands behind a digit: 3-5 is a range or a difference,
# and ends in 5. Dollar, percent and units are not part of it.
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    rf"(?<![\d.])([-+]?)((?:{DIGITS})(?:e[-+]?\d{{1,3}}(?![\w.]))?)(?:/(\d+))?", re.I | re.A
)


def exact(text, row):
    return text.strip() == row["answer"].strip()


def contains(text, row):
    """In whatever case."""
    return row["answer"].lower() in text.lower()


def regex(text, row):
    return bool(re.search(row["answer"], text))


def number(text, row):
    """The same final number; 0 where the answer has none."""
    wanted = final_number(row["answer"])
    if wanted is None:
        raise ValueError(f"there is no number in the wanted {row['answer']!r}")
    return final_number(text) == wanted


def final_number(text):
    """The number that an answer comes to, as a Fraction; None where there is none.

    In this order: the last \\boxed{...} (MATH), what follows the first #### (GSM8K), the last number of all.
    """
    text = plain(text)
    boxed = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    marked = text.partition("####")[2]
    if boxed:
        return last_number(boxed[-1])
    if marked.strip():
        return last_number(marked.strip().splitlines()[0])
    return last_number(text)


def plain(text):
    """LaTeX and typography as ASCII: the minus sign, thousands, fractions, currencies, percent."""
    text = text.replace("\u2212", "-")
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,!]|,\\!)(?=\d{3})", ",", text)  # 1{,}234  1\,234  1,\!234
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    return re.sub(r"\\?[$€£¥]\s?(?=[-+]?[\d.])", "", text)  # -$5  $-5  $ 5


def last_number(text):
    for found in reversed(list(NUMBER.finditer(text))):
        sign, digits, below = found.groups()
        if len(found[0]) > 100 or (below and not int(below)):
            continue  # no answer to any question
        value = Fraction(Decimal(digits.replace(",", ""))) / int(below or 1)
        return -value if sign == "-" else value
    return None


def make_scorer(spec, rows):
    """--score -> f(answer's text, the line as read) -> {"score": number}, or {} for "none"; your own Python is run."""
    if spec == "none":
        return lambda text, row: {}
    path, _, function = spec.rpartition(":")
    wanted = ""
    if not path.endswith(".py"):
        path, (function, _, wanted) = __file__, spec.partition(":")
    with reading(f"--score {spec}"):
        found = runpy.run_path(path)
        if function not in (found if path != __file__ else KNOWN):
            ways = f"none, {', '.join(KNOWN)}, NAME:WANTED or path.py:function"
            raise ValueError(f"there is no {function}; choose {ways}")

    def score(text, row):
        with reading(f"{row['where']}: --score {spec} on {text!r}"):
            value = float(found[function](text, row | {"answer": wanted} if wanted else row))
            if not math.isfinite(value):
                raise ValueError(f"{value} is no score")
            return {"score": value}

    for row in (
        rows if path == __file__ else rows[:1]
    ):  # a missing answer or a bad pattern shows up now
        score("", row)
    return score


KNOWN = ["exact", "contains", "regex", "number"]
