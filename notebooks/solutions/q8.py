"""A fifth context: a rate of exchange. `3 mot` asks what three coins are worth; only the context says how much one is."""

from contexts import Example, Kind, draw_word

DESCRIPTION = "E, a table: the context gives what one coin of that name is worth today, the prompt how many there are, the answer the sum."


def draw(rng, heldout=None):
    coin, count, worth = draw_word(rng, heldout), rng.randint(2, 9), rng.randint(2, 9)
    answer, said = str(count * worth), f"that makes {count * worth}"
    return Example("exchange", f"one {coin} is {worth}", f"{count} {coin}", answer, said)


KIND = Kind(letter="E", method="a rate of exchange", draw=draw, share=0.2, drop=0.2)
