"""The scores of `--score NAME`. Each is a function (answer as text, line of the file) -> right?

    --score number             the wanted answer is the line's "answer"
    --score contains:arr       the wanted answer is in the flag, the same for all lines
    --score mine.py:function   your own function of the same form; it may return any finite number

A score reads what the user would read: no end token, and no thought in <think> tags. An answer that
was cut off ends with "…".
"""

import math
import re
import runpy
from decimal import Decimal
from fractions import Fraction

from contexts import reading

# A number as the graders of GSM8K and MATH read it: 1,234.50 (commas only between groups of three), .5, 1e3,
# 3/4 and \frac{3}{4}, with an optional sign. A sign after a digit does not count: 3-5 is a range or a difference,
# and ends in 5. Dollar and percent signs and units are not part of the number.
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    rf"(?<![\d.])([-+]?)((?:{DIGITS})(?:e[-+]?\d{{1,3}}(?![\w.]))?)(?:/(\d+))?", re.I | re.A
)


def exact(text, row):
    return text.strip() == row["answer"].strip()


def contains(text, row):
    """Ignores upper and lower case."""
    return row["answer"].lower() in text.lower()


def regex(text, row):
    return bool(re.search(row["answer"], text))


def number(text, row):
    """Is the final number the same? An answer without a number is wrong."""
    wanted = final_number(row["answer"])
    if wanted is None:
        raise ValueError(f"there is no number in the wanted answer {row['answer']!r}")
    return final_number(text) == wanted


def final_number(text):
    """The final number of an answer, as a Fraction, or None.

    In this order: in the last \\boxed{...} (MATH); after the first #### (GSM8K); the last number in the text.
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
    """Replace LaTeX and typographic signs by ASCII: minus, thousands, fractions, currencies."""
    text = text.replace("\u2212", "-")
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,!]|,\\!)(?=\d{3})", ",", text)  # 1{,}234  1\,234  1,\!234
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    return re.sub(r"\\?[$€£¥]\s?(?=[-+]?[\d.])", "", text)  # -$5  $-5  $ 5


def last_number(text):
    for found in reversed(list(NUMBER.finditer(text))):
        sign, digits, below = found.groups()
        if len(found[0]) > 100 or (below and not int(below)):
            continue  # more than 100 characters, or a division by zero
        value = Fraction(Decimal(digits.replace(",", ""))) / int(below or 1)
        return -value if sign == "-" else value
    return None


def make_scorer(spec, rows):
    """--score -> f(answer as text, line of the file) -> {"score": number}, or {} for "none". Runs the user's Python."""
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
            raise ValueError(f"there is no {function}; choose from {ways}")

    def score(text, row):
        with reading(f"{row['where']}: --score {spec} on {text!r}"):
            value = float(found[function](text, row | {"answer": wanted} if wanted else row))
            if not math.isfinite(value):
                raise ValueError(f"{value} is not a finite score")
            return {"score": value}

    for row in (
        rows if path == __file__ else rows[:1]
    ):  # a missing answer or a bad pattern shows up now
        score("", row)
    return score


KNOWN = ["exact", "contains", "regex", "number"]
