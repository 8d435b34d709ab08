"""The words the model reads and writes: every sentence is a template over the names of digits."""

from __future__ import annotations

from collections.abc import Iterable

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# {0} is the digit, {1} the second image's digit.
ONE_IMAGE = (
    "{0}",
    "the digit {0}",
    "here is a {0}",
    "this picture shows a {0}",
    "i see the digit {0} in this picture",
)
TWO_IMAGES = (
    "{0} {1}",
    "first a {0} then a {1}",
    "the left picture shows a {0} and the right picture shows a {1}",
)
# {0}, {1}, {2}, {3} are consecutive digits, zero after nine.
TEXT_ONLY = (
    "after {0} comes {1}",
    "{0} plus one is {1}",
    "{1} minus one is {0}",
    "count from {0} {1} {2} {3}",
)
# What the drawing is asked for with, and which digit is then wanted, counted from {0}.
DRAW = ("draw a {0}", "please draw the digit {0}")
DRAW_AFTER_IMAGE = (("now draw the same digit", 0), ("now draw the next digit", 1))

PAD, BEGIN, END, IMAGE, DRAWING = range(5)  # END is a word of every sentence; IMAGE and DRAWING hold a patch's place
SPECIAL = ("<pad>", "<begin>", "<end>", "<image>", "<drawing>")


def _words(templates: Iterable[str]) -> list[str]:
    return sorted({word for template in templates for word in template.split() if "{" not in word})


_SENTENCES = (*ONE_IMAGE, *TWO_IMAGES, *TEXT_ONLY, *DRAW, *dict(DRAW_AFTER_IMAGE))
VOCABULARY = tuple(dict.fromkeys((*SPECIAL, *DIGITS, *_words(_SENTENCES))))
_ID_OF = {word: idx for idx, word in enumerate(VOCABULARY)}


def render_sentence(template: str, *digits: int) -> str:
    """The template with the names of the digits, each taken modulo 10."""
    return template.format(*(DIGITS[digit % 10] for digit in digits))


def encode(sentence: str) -> list[int]:
    """Token ids of the sentence's words."""
    return [_ID_OF[word] for word in sentence.split()]


def decode(tokens: Iterable[int]) -> str:
    """The sentence, special tokens in angle brackets."""
    return " ".join(VOCABULARY[token] for token in tokens)
