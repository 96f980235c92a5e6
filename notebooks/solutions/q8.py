"""A fifth context: how a language makes its plural. `many mot` asks for it; only the context says what the ending is."""

from contexts import CONSONANTS, VOWELS, Example, Kind, draw_word

DESCRIPTION = "E, a rule of grammar: the context gives the ending of the plural, the prompt a word, the answer its plural."


def draw(rng, heldout=None, ending=None):
    word = draw_word(rng, heldout)
    ending = ending or rng.choice(CONSONANTS) + rng.choice(VOWELS)
    answer = word + ending
    return Example("plural", f"ends in {ending}", f"many {word}", answer, f"one says {answer}")


KIND = Kind("E", "a rule of grammar", draw, share=0.2, drop=0.2, task={"ending": "li"})
