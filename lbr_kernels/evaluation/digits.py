"""Numbers as tokens: one token per digit, those that begin a number and those that continue it being different.

As in WordPiece: the vocabulary's digits are ``3`` and ``##3``, the text shows plain ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

CONTINUES = "##"


def digit_tokens(radix: int) -> list[str]:
    """The tokens of all digits: those that begin a number, then those that continue one."""
    digits = [str(digit) for digit in range(radix)]
    return [*digits, *(CONTINUES + digit for digit in digits)]


def digit_ids(number: int, *, radix: int, digits: int, first: int) -> list[int]:
    """The ids of a number of so many digits, the most significant first; ``first`` is the id of the first of them."""
    places = [number // radix**place % radix for place in reversed(range(digits))]
    return [first + radix * (place > 0) + digit for place, digit in enumerate(places)]


def joined(ids: Iterable[int], vocabulary: Sequence[str]) -> str:
    """Tokens as text: words separated by spaces, a number's digits written together."""
    return " ".join(vocabulary[token] for token in ids).replace(" " + CONTINUES, "")
