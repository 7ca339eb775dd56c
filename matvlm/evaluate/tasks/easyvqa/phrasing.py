"""easy-VQA's answers, single words, as sentences.

lm-eval loads this file by its path, and ``matvlm.data`` imports it: training and evaluation are phrased alike. Every
image has one shape of one colour, and a negated question is answered by whether it is so: "is no circle present?" by
"yes" where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator

SENTENCE = " Answer in a sentence."
"""What a question ends with that asks for a sentence."""

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
PRESENT = ("is there a {}?", "is there a {} in the image?", "does the image contain a {}?", "is a {} present?")
ABSENT = (
    *("is there not a {}?", "is there not a {} in the image?"),
    *("does the image not contain a {}?", "is no {} present?"),
)
COLOR = ("what color is the {}?", "what is the color of the {}?")
SHAPE = ("what shape is in the image?", "what shape is present?", "what shape does the image contain?")
SHAPE_OF_COLOR = "what is the {} shape?"


def in_a_sentence(question: str, answer: str) -> tuple[str, str]:
    """``question`` as it asks for a sentence, and the sentence that says ``answer``.

    Raises:
        ValueError: as ``sentence`` does.
    """
    return question + SENTENCE, sentence(question, answer)


def sentence(question: str, answer: str) -> str:
    """The sentence that answers ``question`` with the word ``answer``.

    Raises:
        ValueError: easy-VQA has no such question, or no such answer to it.
    """
    said = _SENTENCES.get((question, answer))
    if said is None:
        raise ValueError(f"no sentence is known for the question {question!r} with the answer {answer!r} of easy-VQA")
    return said


def _sentences() -> Iterator[tuple[tuple[str, str], str]]:
    """Every question with each answer that it can have, and the sentence."""
    for thing in (*(f"{color} shape" for color in COLORS), *SHAPES):
        there, none = f"there is a {thing} in the image.", f"there is no {thing} in the image."
        for templates, yes, no in ((PRESENT, there, none), (ABSENT, none, there)):
            for template in templates:
                yield (template.format(thing), "yes"), f"Yes, {yes}"
                yield (template.format(thing), "no"), f"No, {no}"
    for color in COLORS:
        for thing in ("shape", *SHAPES):
            for template in COLOR:
                yield (template.format(thing), color), f"The {thing} is {color}."
        for shape in SHAPES:
            yield (SHAPE_OF_COLOR.format(color), shape), f"The {color} shape is a {shape}."
    for shape in SHAPES:
        for question in SHAPE:
            yield (question, shape), f"The image shows a {shape}."


_SENTENCES = dict(_sentences())
