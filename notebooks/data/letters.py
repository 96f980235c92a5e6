"""Is this a summary, and not a letter? For `--score notebooks/data/letters.py:score`."""

import re

PERSONAL = re.compile(
    r"\b(I|me|my|mine|we|us|our|you|your|yours|dear|hi|hello|regards|sincerely)\b", re.IGNORECASE
)


def score(text: str, row: dict) -> bool:
    """One paragraph of at least eight words and at most three sentences, complete, that speaks as nobody and to nobody."""
    sentences = len(re.findall(r"[.!?](?:\s|$)", text))
    whole = len(text.split()) >= 8 and sentences <= 3 and "\n" not in text.strip()
    return whole and not text.endswith("…") and not PERSONAL.search(text)
