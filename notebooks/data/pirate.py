"""Is this an answer in the voice of a pirate? For `--score notebooks/data/pirate.py:score`."""

import re

# What nobody else says, and what a pirate says besides.
SPEECH = set("arr arrr arrgh ahoy aye avast matey mateys yarr".split())
BESIDES = """me ye yer booty sail sails sea seas ship treasure parrot captain cap'n crew landlubber
scallywag be shiver plank grog hearties"""
PIRATE = SPEECH | set(BESIDES.split())


def score(text: str, row: dict) -> bool:
    """At least two different pirate words, one of them unmistakable, in a sentence that also says something else: "aye aye aye"
    repeats one word, and a list of pirate words has nothing else."""
    words = re.findall(r"[a-z']+", text.lower())
    distinct = set(words)
    says_something = len(distinct - PIRATE) >= 4 and len(distinct) >= 0.6 * len(words)
    return bool(distinct & SPEECH) and len(distinct & PIRATE) >= 2 and says_something
