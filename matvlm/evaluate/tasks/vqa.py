"""VQA soft accuracy, and the two ways in which answers are made comparable for it.

``normalise_evalai`` is EvalAI's answer processor, which TextVQA and every upload use; ``normalise_vqa`` the evaluation
of VQA v2, which leaves out its first steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, letter in enumerate(word) if letter == "'"
}
"""Each with one of its apostrophes forgotten -> how it is written."""


def normalise_vqa(answer: str) -> str:
    """Without punctuation and articles, in lower case, number words as digits, contractions with their apostrophe."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    in_number = _COMMA_IN_NUMBER.search(answer) is not None
    bare = answer
    for mark in _MARKS:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        bare = bare.replace(mark, "" if beside_space or in_number else " ")
    words = (_DIGITS.get(word, word) for word in _FULL_STOP.sub("", bare).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise_evalai(answer: str) -> str:
    """As ``normalise_vqa``, after commas and question marks are deleted and ``'s`` is set apart."""
    return normalise_vqa(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def soft_accuracy(answer: str, expected: Sequence[str]) -> float:
    """The mean over all annotators of min(1, how many of the *others* said ``answer`` / 3)."""
    same = [each == answer for each in expected]
    return sum(min(1.0, (sum(same) - said) / 3) for said in same) / len(same)


def score_textvqa(doc: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
    """Soft accuracy of the first of ``answers``, everything normalised as EvalAI does."""
    expected = [normalise_evalai(each) for each in doc["answers"]]
    return {"accuracy": soft_accuracy(normalise_evalai(answers[0]), expected)}


def score_vqav2(doc: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
    """Soft accuracy, over all questions and by type of answer. Annotators who all agree are taken at their word."""
    expected = [each.replace("\n", " ").replace("\t", " ").strip() for each in doc["answers"]]
    if len(set(expected)) > 1:
        expected = [normalise_vqa(each) for each in expected]
    accuracy = soft_accuracy(normalise_vqa(answers[0]), expected)
    return {"accuracy": accuracy, f"accuracy_{doc['answer_type'].replace('/', '_')}": accuracy}
