"""What the scorers make of answers: hand-made cases for every rule, and lm-eval's own MMMU functions on random ones."""

from __future__ import annotations

import random
from typing import Any

import benchmark_choice
import pytest
from lm_eval.tasks.mmmu import utils as lm_eval_mmmu

from matvlm.evaluate.tasks import vqa
from matvlm.evaluate.tasks.easyvqa import scorer as easyvqa
from matvlm.evaluate.tasks.gqa import scorer as gqa
from matvlm.evaluate.tasks.mmbench import scorer as mmbench
from matvlm.evaluate.tasks.mme import scorer as mme
from matvlm.evaluate.tasks.mmmu import scorer as mmmu
from matvlm.evaluate.tasks.mmvet import judge
from matvlm.evaluate.tasks.pope import scorer as pope
from matvlm.evaluate.tasks.scienceqa import scorer as scienceqa


@pytest.mark.parametrize(
    ("answer", "evalai", "official"),
    [
        ("The Cats.", "cats", "cats"),
        ("1,000", "1000", "1000"),
        ("U.S.A.", "usa", "usa"),
        ("T-shirt", "t shirt", "t shirt"),
        ("it's red", "it 's red", "it's red"),
        ("red/white", "red white", "red white"),
        ("red / white", "red white", "red white"),
        ("None", "0", "0"),
        ("A", "", ""),
        ("3.5 ft.", "3.5 ft", "3.5 ft"),
        ("$1.50", "$1.50", "$1.50"),
        ("10:30", "10:30", "10:30"),
        ("100%", "100%", "100%"),
        ("two an apple", "2 apple", "2 apple"),
        ("Ten", "10", "10"),
        ("eleven", "eleven", "eleven"),
        ("dont", "don't", "don't"),
        ("couldnt've", "couldn't've", "couldn't've"),
        ("oclock", "o'clock", "o'clock"),
        ("its", "its", "its"),  # not a contraction that lost its apostrophe
        ("red, white", "red white", "red white"),
        ("red,white", "redwhite", "red white"),  # EvalAI deletes commas before all else
        ("1,000 (about)", "1000 about", "1000 about"),
        ("10,000/20,000", "10000 20000", "1000020000"),  # a number with a comma: all marks are deleted, not spaced
        ("what?", "what", "what"),
        ("line\none\ttab", "line 1 tab", "line 1 tab"),
        (" (b) ", "b", "b"),
        ('"yes!"', "yes", "yes"),
        (".5", ".5", ".5"),
        ("", "", ""),
        ("the", "", ""),
        ("a.m.", "am", "am"),
    ],
)
def test_vqa_answers_are_normalised(answer: str, evalai: str, official: str) -> None:
    assert vqa.normalise_evalai(answer) == evalai
    assert vqa.normalise_vqa(answer) == official


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (5, 1), (10, 1)])
def test_soft_accuracy_leaves_one_annotator_out(matches: int, accuracy: float) -> None:
    """Also where annotators said the very same thing, which comparing records instead of places would get wrong."""
    expected = ["cat"] * matches + ["dog"] * (10 - matches)
    random.Random(matches).shuffle(expected)
    assert vqa.soft_accuracy("cat", expected) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "answers", "textvqa", "vqav2"),
    [
        ("Black.", ["black"] * 6 + ["dark"] * 3 + ["Black."], 1.0, 1.0),
        ("dark", ["black"] * 6 + ["dark"] * 3 + ["Black."], 0.9, 0.9),
        ("a vase", ["vase", "a vase", "the vase", *["plant"] * 7], 0.9, 0.9),
        ("Two", ["2"] * 10, 1.0, 1.0),
        ("2", ["two"] * 10, 1.0, 0.0),  # annotators who all agree are not normalised in VQA v2
        ("2", ["two"] * 9 + ["3"], 1.0, 1.0),
        ("yes", [" yes\n"] * 10, 1.0, 1.0),
        ("", ["yes"] * 10, 0.0, 0.0),
        ("it's", ["it 's"] * 5 + ["no"] * 5, 1.0, 0.0),
        ("teal", ["teal", *["gray"] * 9], 0.3, 0.3),
    ],
)
def test_vqa_questions_are_scored(answer: str, answers: list[str], textvqa: float, vqav2: float) -> None:
    before = list(answers)
    assert vqa.score_textvqa({"answers": answers}, [answer])["accuracy"] == pytest.approx(textvqa)
    scores = vqa.score_vqav2({"answers": answers, "answer_type": "yes/no"}, [answer])
    assert scores == pytest.approx({"accuracy": vqav2, "accuracy_yes_no": vqav2})
    assert answers == before


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("yes, there is.", True),
        ("No", False),
        ("no", False),
        ("No.", False),
        ("No, there is not", False),
        ("There is no dog in the image.", False),
        ("It is not there", False),
        ("NO", True),  # only "No", "no" and "not" say no
        ("None", True),
        ("nothing", True),
        ("Yes. But no dog.", True),  # the first sentence counts
        ("A dog, no, a cat", False),
        ("Is it?", True),
        ("", True),
        ("  no", False),
        ("no\nyes", True),  # words end at spaces alone
    ],
)
def test_pope_answers_are_read(answer: str, yes: bool) -> None:
    assert pope.says_yes(answer) is yes


def pope_scores(cases: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    return [pope.score({"category": split, "target": target}, [said]) for split, target, said in cases]


def test_pope_measures() -> None:
    """Of the random split, true/false positives and negatives 2, 1, 2, 1."""
    said = [("yes", "Yes"), ("yes", "No"), ("no", "No"), ("no", "Yes"), ("no", "No."), ("yes", "Yes, there is")]
    scores = pope_scores([("random", *case) for case in said] + [("popular", "yes", "no"), ("popular", "no", "no")])
    measured = {name: getattr(pope, name)([score[name] for score in scores]) for name in scores[0] if name != "right"}
    two_thirds = pytest.approx(2 / 3)
    assert [measured[f"{name}_random"] for name in ("accuracy", "precision", "recall", "f1")] == [two_thirds] * 4
    assert measured["yes_ratio_random"] == 0.5
    assert measured["accuracy_popular"] == 0.5
    assert [measured[f"{name}_popular"] for name in ("precision", "recall", "f1", "yes_ratio")] == [0.0] * 4
    assert measured["f1_adversarial"] != measured["f1_adversarial"], "nothing was asked, which is no 0"
    assert measured["f1"] == pytest.approx(1 / 3), "the mean over the splits that were asked"
    assert [score["right"] for score in scores] == [1, 0, 1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("Y", "yes"),
        ("n", "no"),
        ("N.", "no"),
        ("x", "other"),
        ("Yes, it is", "yes"),
        ("Not sure", "no"),
        ("nope", "no"),
        ("Yeah", "other"),
        ("It is no", "other"),
        ("a yes", "other"),  # the fourth letter ends the look
        ("...yes", "yes"),
        (" yes ", "yes"),
        ("know", "no"),
        ("", "other"),
        ("YES", "yes"),
        ("eyes", "yes"),
    ],
)
def test_mme_answers_are_read(answer: str, read: str) -> None:
    assert mme.read(answer) == read


def test_mme_scores() -> None:
    """Two images of colours with 1, 1 and 1, 0 right give 75 + 50, OCR with 0, 0 gives 0."""
    asked = [
        ("color", "a", "yes", "yes"),
        ("color", "a", "no", "no"),
        ("color", "b", "yes", "yes"),
        ("color", "b", "no", "y"),
    ]
    asked += [("OCR", "a", "yes", "no"), ("OCR", "a", "no", "perhaps"), ("code_reasoning", "a", "yes", "Yes")]
    scores = [
        mme.score({"category": category, "image_id": f"{category}/{image}", "target": target}, [said])
        for category, image, target, said in asked
    ]
    measured = {name: getattr(mme, name)([score[name] for score in scores]) for name in scores[0] if name != "right"}
    assert measured["color"] == 125.0
    assert measured["OCR"] == 0.0
    assert measured["perception"] == 125.0
    assert measured["code_reasoning"] == measured["cognition"] == 200.0
    assert measured["scene"] != measured["scene"], "nothing was asked, which is no 0"
    assert [score["right"] for score in scores] == [1, 1, 1, 0, 0, 0, 1]
    assert set(mme.PERCEPTION) | set(mme.COGNITION) | {"perception", "cognition", "right"} == set(scores[0])


MMBENCH_OPTIONS = {"A": "a cat", "B": "dog", "C": "red panda", "D": "fish"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("(C)", "C"),
        ("D: fish", "D"),
        ("The answer is B", "B"),
        ("B) dog", "B"),
        ("**D**", "D"),
        ("A or B", ""),
        ("A dog", "A"),  # among three words or fewer the letter
        ("A dog is there", "B"),  # an article, and one option is named
        ("A. because it is so", "A"),
        ("dog", "B"),
        ("It is a RED PANDA", "C"),
        ("a dog and a fish", ""),
        ("b", ""),
        ("E", ""),
        ("", ""),
        ("I do not know", ""),
        ("B, B", "B"),
        ("A or B, that is the dog", "B"),
    ],
)
def test_mmbench_answers_are_read(answer: str, letter: str) -> None:
    assert mmbench.read(answer, MMBENCH_OPTIONS) == letter


def test_mmbench_is_circular() -> None:
    """A question is right when it is right in every order of its options."""
    right = {1: [1, 1, 1, 1], 2: [1, 1, 0, 1], 3: [1], 4: [0, 0]}
    scores = [
        mmbench.score(
            {"index": number + order * 1_000_000, "options": ["A", "B"], "choices": ["cat", "dog"], "target": "A"},
            ["A" if each else "B"],
        )
        for number, orders in right.items()
        for order, each in enumerate(orders)
    ]
    random.Random(0).shuffle(scores)
    assert mmbench.circular_accuracy([score["circular_accuracy"] for score in scores]) == 0.5
    assert sum(score["right"] for score in scores) == 8


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("E", "E"),
        ("F", ""),
        ("b", ""),
        ("B.", ""),
        ("(B)", ""),
        ("B. Boston", "B"),
        ("B.Boston", ""),
        ("B ", "B"),
        ("The answer is C.", "C"),
        ("The answer is C", ""),  # something must follow the letter
        ("I think. The answer is D. Sure", "D"),
        ("The answer is A. The answer is B.", ""),
        ("the answer is A.", ""),
        ("AB", ""),
        ("", ""),
        ("Boston", ""),
        ("A. or B. ", "A"),
    ],
)
def test_scienceqa_answers_are_read(answer: str, letter: str) -> None:
    assert scienceqa.read(answer) == letter
    assert scienceqa.score({"target": "C"}, [answer]) == {"accuracy": float(letter == "C")}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *[("no", 1), ("No", 1), ("no.", 1), ("No..", 1), (" no ", 1), ("NO.", 1), ("\nno\n", 1)],
        *[("no!", 0), ("no no", 0), ("", 0), (".", 0), ("nope", 0), ("no, it is", 0), ("n o", 0), ("yes", 0)],
    ],
)
def test_gqa_is_exact_match(answer: str, right: int) -> None:
    assert gqa.score({"target": "no"}, [answer]) == {"accuracy": right}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *[("Teal", 1), (" teal.", 1), ("teal .", 1), ("TEAL", 1), ("teal\n", 1), ("teal..", 0), ("", 0), (".", 0)],
        *[
            ("teal teal", 0),
            ("\x00\ufffd", 0),
            ("a teal", 0),
            ("tea l", 0),
            ("teal!", 0),
            ("yes", 0),
            ("teal, gray", 0),
        ],
    ],
)
def test_easyvqa_is_exact_match(answer: str, right: int) -> None:
    assert easyvqa.score({"expected": "teal"}, [answer]) == {"accuracy": right, "accuracy_color": right}


MMMU_OPTIONS = {"A": "cat", "B": "dog", "C": "red panda", "D": "fish"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("The answer is B", "B"),
        ("(A) or (C)", "C"),
        ("(C) or (A)", "A"),
        ("A or C", "C"),
        ("(A) not B", "A"),  # brackets first
        ("I believe the picture shows a red panda sitting", "C"),
        ("It may be a cat but it is a dog", "B"),
        ("red panda", "guess"),  # too few words to look for an option in
        ("B. dog", "guess"),
        ("b", "guess"),
        ("", "guess"),
        ("!?A.", "A"),
        ("?!A.", "guess"),  # each mark is stripped once, in an order of its own
        ("E", "guess"),
        ("'D'", "D"),
    ],
)
def test_mmmu_choices_are_read(answer: str, letter: str) -> None:
    assert mmmu.read_choice(answer, MMMU_OPTIONS, lambda: "guess") == letter


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("3.14", "3.14", True),
        ("The answer is 3.14159", "3.14", True),
        ("3.15", "3.14", False),
        ("It is 1,000 dollars", "1000", True),
        ("about 1e3", "1000", True),
        ("x = -5", "-5", True),
        ("x = 5", "-5", False),
        ("Paris", "paris", True),
        ("The capital is Paris, of course", "Paris", True),
        ("Lyon", "Paris", False),
        ("a", "a", True),  # a lone letter must stand beside a space, as both sides are made to
        ("cat", "a", False),
        ("first line is 7\nso 8", "7", True),
        ("first line is 7\nso 8", "8", True),
        ("", "7", False),
        ("2 + 2 = 4", "4", True),
    ],
)
def test_mmmu_open_answers_are_read(answer: str, expected: str, right: bool) -> None:
    assert mmmu.is_right(mmmu.read_open(answer), [expected]) is right


def test_mmmu_is_scored_as_by_lm_eval() -> None:
    """The same letters, guesses included, and the same meanings of open answers, for 4,000 random answers."""
    draw = random.Random(0)
    pieces = [
        "(A)",
        "(B)",
        "A",
        "B",
        "C",
        " ",
        " ",
        "cat",
        "red panda",
        "is ",
        "so ",
        "answer ",
        "=",
        ".",
        ",",
        "\n",
        "!",
    ]
    pieces += [
        "3.14159",
        "1,234",
        "-2",
        "1e5",
        "1.5e-3",
        ".5",
        "final ",
        "a",
        "nan",
        "thus ",
        "'",
        "x",
        "could be ",
        "7.",
    ]
    letters = list(MMMU_OPTIONS)
    seen = set()
    for case in range(4000):
        answer = "".join(draw.choice(pieces) + draw.choice(["", " "]) for _ in range(draw.randrange(10)))
        random.seed(case)
        theirs = lm_eval_mmmu.parse_multi_choice_response(answer, letters, MMMU_OPTIONS)
        random.seed(case)
        ours = mmmu.read_choice(answer, MMMU_OPTIONS, lambda: random.choice(letters))
        assert ours == theirs, answer
        meanings = lm_eval_mmmu.parse_open_response(answer)
        assert {repr(each) for each in mmmu.read_open(answer)} == {repr(each) for each in meanings}, answer
        for expected in ("3.14", "cat", "a", "1234", "b", "100000"):
            right = lm_eval_mmmu.eval_open(expected, meanings)
            assert mmmu.is_right(mmmu.read_open(answer), [expected]) is right, answer
            seen.add(right)
    assert seen == {True, False}


@pytest.mark.parametrize("row", benchmark_choice.mmmu_rows(), ids=lambda row: row["id"])
def test_mmmu_is_asked_as_by_lm_eval(row: dict[str, Any]) -> None:
    """The same prompt and the same images; and the same score for answers that are no guesses."""
    doc = mmmu.document(row)
    assert mmmu.prompt(doc) == lm_eval_mmmu.doc_to_text(row)
    assert doc["images"] == lm_eval_mmmu.doc_to_image(row)
    letters = mmmu.LETTERS[: len(doc["options"])]
    for answer in ("3.14", "It is 3.1415 metres", "5") if doc["open"] else (f"I say ({letter})." for letter in letters):
        assert mmmu.score(doc, [answer]) == {"accuracy": lm_eval_mmmu.process_results(row, [answer])["acc"]}


def test_mmmu_guesses_depend_on_the_question_alone() -> None:
    doc = {"open": False, "options": list("wxyz"), "target": "B"}
    once = [mmmu.score(doc | {"id": str(n)}, ["hm"])["accuracy"] for n in range(400)]
    assert once == [mmmu.score(doc | {"id": str(n)}, ["hm"])["accuracy"] for n in range(400)]
    assert 0.15 < sum(once) / 400 < 0.35


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("0.5", 0.5),
        ("1.0", 1.0),
        ("1", 1.0),
        ("0", 0.0),
        (" 0.3\n", 0.3),
        ("Correctness: 0.7", 0.7),
        ("0.7/1.0", 0.7),
        (".5", 0.5),
        ("**0.9**", 0.9),
        ("What is x? | -1 <AND> -5 | x = 1 | 0.2", 0.2),
        ("| q | 1 | 1 | 0.4 |", 0.4),
        ("I would say 0.6.", 0.6),
        ("", None),
        ("good", None),
        ("2", None),
        ("10", None),
        ("1.5", None),
    ],
)
def test_judges_replies_are_read(reply: str, grade: float | None) -> None:
    if grade is None:
        with pytest.raises(judge.JudgeError, match="holds no number from 0 to 1"):
            judge.read_grade(reply)
    else:
        assert judge.read_grade(reply) == grade
