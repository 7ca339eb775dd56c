"""easy-VQA's answers as sentences: every question has one, which says what the word says, and no two disagree."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable

import easy_vqa
import pytest

from matvlm.evaluate.tasks.easyvqa.phrasing import SENTENCE, in_a_sentence, sentence

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
WORLDS = frozenset((color, shape) for color in COLORS for shape in SHAPES)
"""All that an image can show: one shape of one colour."""

Told = tuple[str, str, int]
"""A question, its answer, and the number of the image."""


@pytest.fixture(scope="module")
def questions() -> dict[str, list[Told]]:
    """All questions of both splits."""
    splits = {"train": easy_vqa.get_train_questions(), "test": easy_vqa.get_test_questions()}
    return {name: list(zip(*split, strict=True)) for name, split in splits.items()}


def matching(*words: str) -> frozenset[tuple[str, str]]:
    """The worlds that have every colour and every shape among ``words``."""
    named = {*words} & {*COLORS, *SHAPES}
    return frozenset(world for world in WORLDS if named <= {*world})


def meant(said: str) -> frozenset[tuple[str, str]]:
    """The worlds that a sentence is true of, read word by word."""
    assert re.fullmatch(r"(?:(?:Yes|No), there is (?:a|no) |The )[a-z ]+\.", said)
    words = said.removesuffix(".").split(", ")[-1].split()
    return WORLDS - matching(*words) if "no" in words else matching(*words)


def told(question: str, answer: str) -> frozenset[tuple[str, str]]:
    """The worlds in which ``answer`` is the answer to ``question``, by its words alone."""
    words = question.rstrip("?").split()
    if answer not in ("yes", "no"):
        return matching(*words, answer)
    negated = ("no" in words or "not" in words) != (answer == "no")
    return WORLDS - matching(*words) if negated else matching(*words)


def contradicted(questions: Iterable[Told], meaning: Callable[[str, str], frozenset[tuple[str, str]]]) -> list[int]:
    """The images about which no world agrees with all that is said."""
    left: dict[int, frozenset[tuple[str, str]]] = defaultdict(lambda: WORLDS)
    for question, answer, image in questions:
        left[image] &= meaning(question, answer)
    return [image for image, worlds in left.items() if not worlds]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_sentence_means_what_the_word_means(split: str, questions: dict[str, list[Told]]) -> None:
    different = {(question, answer) for question, answer, _ in questions[split]}
    assert len(different) == 273
    for question, answer in different:
        said = sentence(question, answer)
        assert meant(said) == told(question, answer), (question, answer, said)
        assert len(WORLDS) > len(meant(said)) > 0
        if answer in ("yes", "no"):
            assert said.startswith(f"{answer.title()}, there is ")
        else:
            assert answer in said.removesuffix(".").split()


@pytest.mark.parametrize("split", ["train", "test"])
def test_sentences_about_an_image_agree(split: str, questions: dict[str, list[Told]]) -> None:
    def wrong(question: str, answer: str) -> frozenset[tuple[str, str]]:
        """As if the answer to a negated question said whether the thing is there."""
        return meant(sentence(re.sub(r" (?:not a|no) ", " a ", question), answer))

    assert contradicted(questions[split], lambda question, answer: meant(sentence(question, answer))) == []
    assert len(contradicted(questions[split], wrong)) > 900


@pytest.mark.parametrize(
    ("question", "answer", "said"),
    [
        ("what color is the shape?", "red", "The shape is red."),
        ("what is the color of the circle?", "red", "The circle is red."),
        ("what shape is in the image?", "circle", "The image shows a circle."),
        ("what is the red shape?", "circle", "The red shape is a circle."),
        ("is there a red shape?", "yes", "Yes, there is a red shape in the image."),
        ("is a circle present?", "no", "No, there is no circle in the image."),
        ("is there not a red shape in the image?", "yes", "Yes, there is no red shape in the image."),
        ("does the image not contain a circle?", "no", "No, there is a circle in the image."),
        ("is no circle present?", "yes", "Yes, there is no circle in the image."),
    ],
)
def test_sentences(question: str, answer: str, said: str) -> None:
    assert in_a_sentence(question, answer) == (question + SENTENCE, said)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("is there a pink shape?", "yes"),
        ("how many shapes are there?", "two"),
        ("is there a circle?", "circle"),
        ("what color is the shape?", "circle"),
    ],
)
def test_what_easyvqa_does_not_have_is_named(question: str, answer: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(question)) + f" with the answer '{answer}'"):
        sentence(question, answer)
