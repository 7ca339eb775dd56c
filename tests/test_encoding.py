"""Encoding conversations: what is a label, what the model sees before an answer, and how samples are batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tiny_chat import build_processor as build_chat_processor
from tiny_teacher import TINY, WORDS, Teacher

from matvlm.config import Positions
from matvlm.data.encoding import IGNORE, Encoder, Sample, TemplateError, TooLong, Turn
from matvlm.models.small import CHAT_TEMPLATE, SPEAKERS, build_processor, build_tokenizer

TURNS = [
    Turn("what shape is the image", "a circle"),
    Turn("is there a blue circle", "no"),
    Turn("what color", "red"),
]
IMAGE_TOKENS = (TINY.image_size // TINY.patch_size) ** 2
IMAGE = Image.new("RGB", (16, 16), "red")


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher()


@pytest.fixture(scope="module")
def sample(teacher: Teacher) -> Sample:
    return teacher.encoder.encode("one", IMAGE, TURNS)


def with_template(template: str, **tokenizer: Any) -> Encoder:
    processor = build_processor(TINY, build_tokenizer(WORDS))
    processor.chat_template = template
    for name, value in tokenizer.items():
        setattr(processor.tokenizer, name, value)
    return Encoder(processor)


def spans(sample: Sample) -> list[list[int]]:
    """The labels of each answer, apart."""
    found: list[list[int]] = [[]]
    for label in sample.labels.tolist():
        if label != IGNORE:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [span for span in found if span]


def test_labels_are_the_answers_and_their_end_marks(teacher: Teacher, sample: Sample) -> None:
    tokenizer = teacher.processor.tokenizer
    answers = [tokenizer(turn.answer, add_special_tokens=False)["input_ids"] for turn in TURNS]
    assert spans(sample) == [[*answer, tokenizer.eos_token_id] for answer in answers]
    marked = sample.labels != IGNORE
    assert torch.equal(sample.labels[marked], sample.input_ids[marked])
    assert sample.input_ids.dtype == sample.labels.dtype == torch.int64
    assert sample.labels[-1] == tokenizer.eos_token_id


def test_what_precedes_the_first_answer_is_the_prompt_of_generation(teacher: Teacher, sample: Sample) -> None:
    prompt = teacher.encoder.prompt(TURNS[0].question)
    generation = teacher.processor(text=[prompt], images=[IMAGE], return_tensors="pt", add_special_tokens=False)
    first = int((sample.labels != IGNORE).int().argmax())
    assert torch.equal(sample.input_ids[:first], generation["input_ids"][0])
    assert torch.equal(sample.image_inputs["pixel_values"], generation["pixel_values"])
    assert int((sample.input_ids == teacher.processor.image_token_id).sum()) == IMAGE_TOKENS


def test_what_precedes_each_answer_is_the_processors_own_prompt(teacher: Teacher, sample: Sample) -> None:
    starts = [i for i in range(1, len(sample.labels)) if sample.labels[i - 1] == IGNORE != sample.labels[i]]
    assert len(starts) == len(TURNS)
    messages: list[dict[str, Any]] = []
    for number, (turn, start) in enumerate(zip(TURNS, starts, strict=True)):
        image = [{"type": "image"}] * (number == 0)
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": turn.question}]})
        text = teacher.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        own = teacher.processor(text=[text], images=[IMAGE], return_tensors="pt", add_special_tokens=False)
        assert torch.equal(sample.input_ids[:start], own["input_ids"][0])
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})


def test_turns_that_do_not_fit_are_left_off(teacher: Teacher, sample: Sample) -> None:
    two = len(teacher.encoder.encode("two", IMAGE, TURNS[:2]).input_ids)
    for max_length, kept in [(two, 2), (two - 1, 1), (len(sample.input_ids), 3)]:
        short = Encoder(teacher.processor, max_length).encode("short", IMAGE, TURNS)
        assert len(spans(short)) == kept
        assert torch.equal(short.input_ids, sample.input_ids[: len(short.input_ids)])
        assert len(short.input_ids) <= max_length
    one = len(teacher.encoder.encode("one", IMAGE, TURNS[:1]).input_ids)
    with pytest.raises(TooLong, match=f"sample short: its first turn needs more than max_length={one - 1}"):
        Encoder(teacher.processor, one - 1).encode("short", IMAGE, TURNS)


def test_a_batch_is_padded_and_masked_on_the_right(teacher: Teacher, sample: Sample) -> None:
    other = teacher.encoder.encode("other", Image.new("RGB", (16, 16), "blue"), TURNS[2:])
    batch = teacher.encoder.collate([other, sample])
    length = len(other.input_ids)
    assert batch.ids == ["other", "one"]
    assert torch.equal(batch.inputs["input_ids"][0, :length], other.input_ids)
    assert (batch.inputs["input_ids"][0, length:] == teacher.processor.tokenizer.pad_token_id).all()
    assert batch.inputs["attention_mask"].sum(1).tolist() == [length, len(sample.input_ids)]
    assert batch.inputs["attention_mask"][0, :length].all()
    assert (batch.labels[0, length:] == IGNORE).all()
    for row, one in enumerate((other, sample)):
        assert torch.equal(batch.inputs["pixel_values"][row], one.image_inputs["pixel_values"][0])
    assert not torch.equal(*batch.inputs["pixel_values"])
    moved = batch.to("meta")
    assert (moved.labels.device.type, moved.inputs["input_ids"].device.type) == ("meta", "meta")


def test_kept_positions_are_those_before_answer_tokens(teacher: Teacher, sample: Sample) -> None:
    batch = teacher.encoder.collate([sample, teacher.encoder.encode("other", IMAGE, TURNS[1:])])
    rows, positions = batch.kept.nonzero(as_tuple=True)
    assert not batch.kept[:, -1].any()
    assert torch.equal(batch.inputs["input_ids"][rows, positions + 1], batch.labels[batch.labels != IGNORE])


@pytest.mark.parametrize("positions", ["text", "all"])
def test_other_kept_positions(teacher: Teacher, positions: Positions) -> None:
    encoder = Encoder(teacher.processor, 64, positions)
    batch = encoder.collate([encoder.encode("a", IMAGE, TURNS[:1]), encoder.encode("b", IMAGE, TURNS)])
    ids, real = batch.inputs["input_ids"].tolist(), batch.inputs["attention_mask"].tolist()
    image = teacher.processor.image_token_id
    for row, kept in enumerate(batch.kept.tolist()):
        length = sum(real[row])
        assert length < len(kept) or row == 1, "one sample is padded"
        text = [position < length and token != image for position, token in enumerate(ids[row])]
        before_text = [here and there for here, there in zip(text, [*text[1:], False], strict=True)]
        assert kept == (before_text if positions == "text" else [flag == 1 for flag in real[row]])
    assert batch.to("meta").kept.device.type == "meta"


@pytest.mark.parametrize("positions", ["answer", "text", "all"])
def test_labels_of_kept_positions(teacher: Teacher, positions: Positions) -> None:
    encoder = Encoder(teacher.processor, 64, positions)
    batch = encoder.collate([encoder.encode("a", IMAGE, TURNS[:1]), encoder.encode("b", IMAGE, TURNS)])
    expected = [
        int(batch.labels[row, position + 1]) if position + 1 < batch.labels.shape[1] else IGNORE
        for row, position in batch.kept.nonzero().tolist()
    ]
    assert batch.kept_labels.tolist() == expected
    answers = batch.labels[batch.labels != IGNORE]
    assert torch.equal(batch.kept_labels[batch.kept_labels != IGNORE], answers), "every answer token counts once"


def test_text_needs_to_know_the_image_token() -> None:
    class Plain:
        tokenizer = build_tokenizer(WORDS)

    assert Encoder(Plain(), positions="all").positions == "all"
    with pytest.raises(ValueError, match=r"targets\.positions: Plain has no image_token_id.*use answer or all"):
        Encoder(Plain(), positions="text")


def test_padding_changes_no_logits(teacher: Teacher, sample: Sample) -> None:
    other = teacher.encoder.encode("other", IMAGE, TURNS[:1])
    batch, alone = teacher.encoder.collate([other, sample]), teacher.encoder.collate([other])
    with torch.inference_mode():
        padded = teacher.model(**batch.inputs).logits[0, : len(other.input_ids)]
        logits = teacher.model(**alone.inputs).logits[0]
    # Measured: 6e-6 apart at most, of logits up to 37.
    torch.testing.assert_close(padded, logits, atol=1e-4, rtol=0)


def test_remembered_conversations_do_not_carry_an_image_over() -> None:
    """The same question about images that take different numbers of tokens."""
    encoder = with_template(CHAT_TEMPLATE)
    make = encoder.processor

    class TokensBySize:
        tokenizer = make.tokenizer
        apply_chat_template = make.apply_chat_template

        def __call__(self, text: list[str], images: list[Image.Image], **options: Any) -> Any:
            encoded = make(text=text, images=images, **options)
            image = torch.full((1, images[0].width), make.image_token_id)
            encoded["input_ids"] = torch.cat([image, encoded["input_ids"]], dim=1)
            return encoded

    encoder = Encoder(TokensBySize())
    sizes = (3, 7, 3)
    lengths = [len(encoder.encode("x", Image.new("RGB", (size, size)), TURNS).input_ids) for size in sizes]
    assert lengths == [lengths[0], lengths[0] + 4, lengths[0]]
    assert encoder._segments.cache_info().hits == 2


def test_text_after_an_end_mark_is_no_label() -> None:
    encoder = with_template(CHAT_TEMPLATE.replace("<eos>", "<eos> there "))
    sample = encoder.encode("x", IMAGE, TURNS[:2])
    reference = with_template(CHAT_TEMPLATE).encode("x", IMAGE, TURNS[:2])
    assert spans(sample) == spans(reference)
    there = encoder.tokenizer.convert_tokens_to_ids("there")
    assert sample.input_ids.tolist().count(there) == reference.input_ids.tolist().count(there) + 1
    assert sample.input_ids[-1] == encoder.tokenizer.eos_token_id


def test_a_tokenizer_without_padding_or_end_mark_is_fine() -> None:
    encoder = with_template(CHAT_TEMPLATE.replace("<eos>", " "), pad_token=None, eos_token=None)
    batch = encoder.collate([encoder.encode("x", IMAGE, TURNS), encoder.encode("y", IMAGE, TURNS[:1])])
    assert int(batch.labels.ne(IGNORE).sum()) == 2 + 1 + 1 + 2
    assert batch.inputs["input_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}" + CHAT_TEMPLATE,
        CHAT_TEMPLATE.replace("{% else %}ASSISTANT:", "{% elif not loop.last %}(left out){% else %}ASSISTANT:"),
        CHAT_TEMPLATE.replace("%}ASSISTANT:{% endif", "%}yes{% endif"),
    ],
    ids=["counts turns", "drops earlier answers", "another generation prompt"],
)
def test_a_template_that_rewrites_turns_is_refused(template: str) -> None:
    with pytest.raises(TemplateError, match="rewrites earlier turns"):
        with_template(template).encode("x", IMAGE, TURNS)


def test_speakers_and_marks_are_single_tokens(teacher: Teacher) -> None:
    tokenizer = teacher.processor.tokenizer
    for mark in (*SPEAKERS, "<image>", "<eos>"):
        assert tokenizer(mark, add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids(mark)]


def test_what_is_said_of_each_token_is_said_of_every_token() -> None:
    processor = build_chat_processor(typed=True)
    encoder = Encoder(processor)
    batch = encoder.collate([encoder.encode(f"{count}", IMAGE, TURNS[:count]) for count in (3, 1)])
    expected = (batch.inputs["input_ids"] == processor.image_token_id).long()
    assert torch.equal(batch.inputs["mm_token_type_ids"], expected)
    assert expected.sum() == 2 * IMAGE_TOKENS
