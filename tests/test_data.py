"""Preparing data: bad input is counted or refused by name, a killed or full run leaves nothing that is believed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import easy_vqa
import pytest
from PIL import Image
from tiny_teacher import Teacher

from matvlm.artifacts import DataManifest
from matvlm.config import Data
from matvlm.data.encoding import Encoder, TemplateError
from matvlm.data.prepare import MANIFEST, open_dataset, prepare, turns_of
from matvlm.data.sources import DataError, entries
from matvlm.evaluate.tasks.easyvqa.phrasing import SENTENCE, sentence
from matvlm.storage import StorageError

QUESTION, ANSWER = "what shape is the image", "a circle"

TINY_DISK_MIB = 1


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher()


def write_image(path: Path, color: str = "red", size: tuple[int, int] = (16, 16)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path.read_bytes()


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def sample(image: Any = "good.png", *texts: str, **more: Any) -> dict[str, Any]:
    return {"id": "s", "image": image, "conversations": talk(*(texts or (f"<image>\n{QUESTION}", ANSWER))), **more}


def source(folder: Path, samples: list[Any], **settings: Any) -> Data:
    """A LLaVA-format file in ``folder`` with ``samples`` and the image good.png beside it."""
    write_image(folder / "good.png")
    path = folder / "talk.json"
    path.write_text(json.dumps(samples), encoding="utf-8")
    return Data(source="llava", path=str(path), **settings)


def test_llava_samples_come_back_as_turns_and_rgb_images(tmp_path: Path) -> None:
    texts = [f"<image>\n{QUESTION}", ANSWER, "is it red", "yes"]
    at_end = [f"{QUESTION}\n<image>", ANSWER, "is it <image> red", "yes"]
    samples = [sample("good.png", *texts), sample("sub/grey.png", *at_end[:2]), sample("good.png", at_end[2], "yes")]
    data = source(tmp_path, samples, image_folder=str(tmp_path))
    (tmp_path / "sub").mkdir()
    Image.new("L", (8, 4), 7).save(tmp_path / "sub" / "grey.png")
    manifest = prepare(data, 0, tmp_path / "out")
    rows = list(open_dataset(manifest))
    assert [row["id"] for row in rows] == ["s-0", "s-1", "s-2"], "ids carry the number: the file's own may repeat"
    assert turns_of(rows[0]) == [(QUESTION, ANSWER), ("is it red", "yes")]
    assert turns_of(rows[1]) == [(QUESTION, ANSWER)]
    assert turns_of(rows[2]) == [("is it red", "yes")]
    assert [row["image"].mode for row in rows] == ["RGB"] * 3
    assert rows[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    assert rows[1]["image"].size == (8, 4)
    assert rows[1]["image"].getpixel((0, 0)) == (7, 7, 7)
    assert (manifest.num_samples, manifest.num_skipped, manifest.skipped) == (3, 0, {})


def test_easyvqa_takes_every_training_question() -> None:
    rows = [entry() for entry in entries(Data())]
    assert [row["id"] for row in rows] == [f"easyvqa-{n}" for n in range(4000)]
    assert Image.open(io.BytesIO(rows[0]["image"]["bytes"] or b"")).size == (64, 64)
    assert sum(len(row["turns"]) for row in rows) == 38_575


def test_easyvqa_answers_are_words_sentences_or_by_turns_both() -> None:
    settings = [Data(answers="words"), Data(answers="sentences"), Data(answers="both")]
    words_only, sentences_only, by_turns = ([entry()["turns"] for entry in entries(data)] for data in settings)
    told: dict[int, list[dict[str, str]]] = defaultdict(list)
    for question, answer, image in zip(*easy_vqa.get_train_questions(), strict=True):
        told[image].append({"question": question, "answer": answer})
    assert words_only == [told[image] for image in range(4000)]
    for image, (words, sentences, both) in enumerate(zip(words_only, sentences_only, by_turns, strict=True)):
        said = [(turn["question"] + SENTENCE, sentence(turn["question"], turn["answer"])) for turn in words]
        assert [(turn["question"], turn["answer"]) for turn in sentences] == said
        assert both == [(sentences, words)[(image + n) % 2][n] for n in range(len(words))]


def test_bad_samples_are_counted_by_reason(tmp_path: Path) -> None:
    whole = write_image(tmp_path / "big.png", size=(64, 64))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("this is no image")
    (tmp_path / "empty.png").touch()
    bad: dict[str, list[Any]] = {
        "broken image": [sample("cut.png"), sample("text.png"), sample("empty.png")],
        "missing image": [sample("absent.png"), sample("."), sample("null\0byte.png")],
        "text only": [{"conversations": talk("hello", "hi")}, sample(None, "hello", "hi")],
        "no image": [sample(None), sample("")],
        "several images": [sample("good.png", "<image> and <image>", "two")],
        "malformed entry": [
            17,
            {"image": "good.png"},
            sample(["good.png"]),
            sample("good.png", "a question alone"),
            sample(conversations=[]),
            sample(conversations=["hello", "hi"]),
            sample(conversations=talk("a", "b")[::-1]),
            sample(conversations=[{"from": "human", "value": 1}, {"from": "gpt", "value": "b"}]),
            sample("good.png", "half of a pair: \ud800", "b"),
        ],
    }
    samples = [sample(), *(one for group in bad.values() for one in group), sample()]
    manifest = prepare(source(tmp_path, samples, max_bad_share=0.95), 0, tmp_path / "out")
    assert manifest.skipped == {reason: len(group) for reason, group in bad.items()}
    assert (manifest.num_samples, manifest.num_skipped) == (2, 20)
    assert open_dataset(manifest)["id"][:] == ["s-0", "s-21"]
    assert prepare(source(tmp_path, samples, max_bad_share=0.95), 0, tmp_path / "out") == manifest


def test_skipped_samples_are_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text.png").write_text("no image")
    prepare(source(tmp_path, [sample(), sample("text.png"), sample(None)], max_bad_share=1.0), 0, tmp_path / "out")
    assert f"broken image: s-1: {tmp_path}/text.png" in caplog.text
    assert "no image: talk.json, sample 2" in caplog.text


def test_too_much_bad_data_is_refused(tmp_path: Path) -> None:
    data = source(tmp_path, [*[sample()] * 8, sample("absent.png"), sample(None)], max_bad_share=0.19)
    with pytest.raises(
        DataError,
        match=rf"^{tmp_path}/talk\.json: 2 of 10 samples are unusable \(1 missing image, 1 no image\), more than "
        r"data\.max_bad_share=0\.19",
    ):
        prepare(data, 0, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["good.png", "talk.json"]
    assert prepare(data.model_copy(update={"max_bad_share": 0.2}), 0, tmp_path / "out").num_samples == 8


def test_text_alone_is_counted_and_is_not_bad(tmp_path: Path) -> None:
    texts = [sample(None, "hello", "hi")] * 6
    manifest = prepare(source(tmp_path, [sample(), *texts], max_bad_share=0.0), 0, tmp_path / "out")
    assert (manifest.num_samples, manifest.skipped) == (1, {"text only": 6})
    with pytest.raises(DataError, match=r"1 of 2 samples are unusable \(1 missing image\), more than"):
        prepare(source(tmp_path, [sample(), sample("absent.png"), *texts], max_bad_share=0.4), 0, tmp_path / "other")
    with pytest.raises(DataError, match=r"no usable sample among 6 \(6 text only\)"):
        prepare(source(tmp_path, texts, max_bad_share=1.0), 0, tmp_path / "other")


@pytest.mark.parametrize(("samples", "why"), [([], "0 (it is empty)"), ([sample("absent.png")] * 2, "2 (2 missing")])
def test_nothing_usable_is_refused(tmp_path: Path, samples: list[Any], why: str) -> None:
    with pytest.raises(DataError, match=r"talk\.json: no usable sample among ") as refused:
        prepare(source(tmp_path, samples, max_bad_share=1.0), 0, tmp_path / "out")
    assert why in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'[{"id": 1},\n {"id": }]', r"malformed JSON at line 2, column 9"),
        (b'{"id": 1}\n{"id": 2}\n', r"malformed JSON at line 2, column 1: Extra data"),
        (b'{"id": 1}', r"expected a list of samples at the top, got dict"),
        (b"\xff\xfe\x00", r"cannot read the conversations \(data\.path\)"),
        (None, r"cannot read the conversations \(data\.path\): .*No such file"),
    ],
)
def test_an_unreadable_file_is_refused_whole(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "talk.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{path}: {complaint}"):
        prepare(Data(source="llava", path=str(path)), 0, tmp_path / "out")


def test_a_bad_line_of_jsonl_is_skipped_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(tmp_path / "good.png")
    path = tmp_path / "talk.jsonl"
    odd = json.dumps(sample("good.png", "line\u2028separator", "next\x85line"), ensure_ascii=False)
    path.write_text(f"\ufeff{json.dumps(sample())}\n\n{{torn\n{odd}\r\n", encoding="utf-8")
    manifest = prepare(Data(source="llava", path=str(path), max_bad_share=0.4), 0, tmp_path / "out")
    assert manifest.skipped == {"malformed JSON": 1}
    assert "malformed JSON: talk.jsonl, line 3, column 2" in caplog.text
    assert turns_of(open_dataset(manifest)[1]) == [("line\u2028separator", "next\x85line")]


def test_long_conversations_are_split(tmp_path: Path) -> None:
    texts = [f"{kind}{n}" for n in range(5) for kind in "qa"]
    manifest = prepare(source(tmp_path, [sample("good.png", *texts), sample()], max_turns=2), 0, tmp_path / "out")
    rows = open_dataset(manifest)
    assert rows["id"][:] == ["s-0.0", "s-0.1", "s-0.2", "s-1"]
    assert [turns_of(row) for row in rows][:3] == [
        [("q0", "a0"), ("q1", "a1")],
        [("q2", "a2"), ("q3", "a3")],
        [("q4", "a4")],
    ]


def test_max_samples_draws_by_seed_and_keeps_order(tmp_path: Path) -> None:
    data = source(tmp_path, [sample()] * 30, max_samples=10)

    def drawn(seed: int, name: str) -> list[str]:
        ids: list[str] = open_dataset(prepare(data, seed, tmp_path / name))["id"][:]
        return ids

    first = drawn(0, "a")
    assert len(first) == 10
    assert first == sorted(first, key=lambda id: int(id[2:]))
    assert drawn(0, "b") == first
    assert drawn(1, "c") != first


def test_the_fingerprint_changes_with_everything_a_sample_is(tmp_path: Path) -> None:
    def fingerprint(samples: list[Any], **settings: Any) -> str:
        data = source(tmp_path, samples, **settings)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return prepare(data, 0, tmp_path / "out").fingerprint

    write_image(tmp_path / "other.png", "blue")
    pair = [sample("good.png", "q", "a", "r", "b"), sample("other.png")]
    prints = [
        fingerprint(pair),
        fingerprint(pair[::-1]),
        fingerprint([sample("good.png", "q?", "a", "r", "b"), pair[1]]),
        fingerprint([sample("good.png", "q", "a.", "r", "b"), pair[1]]),
        fingerprint(pair, max_turns=1),
    ]
    assert fingerprint(pair) == prints[0]
    content = bytearray((tmp_path / "other.png").read_bytes())
    write_image(tmp_path / "other.png", (0, 0, 254))  # type: ignore[arg-type]
    assert (tmp_path / "other.png").read_bytes() != content
    prints.append(fingerprint(pair))
    assert len(set(prints)) == len(prints)


def test_a_finished_data_set_is_kept(tmp_path: Path) -> None:
    data = source(tmp_path, [sample()] * 2)
    manifest = prepare(data, 0, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    (tmp_path / "talk.json").unlink()
    assert prepare(data, 0, tmp_path / "out") == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = prepare(data, 0, tmp_path / "moved")
    assert len(open_dataset(moved)) == 2


def test_a_data_set_of_other_settings_is_refused(tmp_path: Path, teacher: Teacher) -> None:
    data = source(tmp_path, [sample()] * 3, max_samples=2)
    prepare(data, 0, tmp_path / "out")
    with pytest.raises(DataError, match=rf"^{tmp_path}/out: was prepared with seed=0 and this run has 1; remove"):
        prepare(data, 1, tmp_path / "out")
    with pytest.raises(DataError, match="with max_samples=2 and this run has 3"):
        prepare(data.model_copy(update={"max_samples": 3}), 0, tmp_path / "out")
    with pytest.raises(DataError, match="with checked_for_max_length=None and this run has 64"):
        prepare(data, 0, tmp_path / "out", encoder=teacher.encoder)
    with pytest.raises(DataError, match=r"prepared with (image_folder|max_samples|path|source)="):
        prepare(Data(), 0, tmp_path / "out")
    assert prepare(data, 0, tmp_path / "out").num_samples == 2


def test_a_damaged_data_set_is_named(tmp_path: Path) -> None:
    data = source(tmp_path, [sample()] * 2)
    manifest = prepare(data, 0, tmp_path / "out")
    with pytest.raises(DataError, match="2 of 3 samples are left"):
        open_dataset(manifest.model_copy(update={"num_samples": 3}))
    (arrow,) = (tmp_path / "out" / "arrow").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"^{tmp_path}/out: cannot open the prepared data .*remove this folder"):
        open_dataset(manifest)
    shutil.rmtree(tmp_path / "out" / "arrow")
    with pytest.raises(DataError, match=rf"^{tmp_path}/out: cannot open the prepared data"):
        open_dataset(manifest)
    for content in ("[]", "{}", '{"manifest": {"uri": "x"}, "made_with": {}}'):
        (tmp_path / "out" / MANIFEST).write_text(content)
        with pytest.raises(DataError, match=rf"^{tmp_path}/out/{MANIFEST}: not a manifest .*remove the folder"):
            prepare(data, 0, tmp_path / "out")


def test_samples_that_the_teacher_cannot_read_are_skipped(tmp_path: Path, teacher: Teacher) -> None:
    long = " ".join([QUESTION] * 20)
    samples = [sample(), sample("good.png", long, ANSWER, QUESTION, ANSWER), sample("good.png", QUESTION, long)]
    fits_at_first = sample("good.png", QUESTION, ANSWER, long, ANSWER)
    data = source(tmp_path, [*samples, fits_at_first], max_bad_share=0.5, max_length=64)
    manifest = prepare(data, 0, tmp_path / "out", encoder=teacher.encoder)
    assert manifest.skipped == {"too long": 2}
    rows = list(open_dataset(manifest))
    assert [row["id"] for row in rows] == ["s-0", "s-3"]
    assert len(teacher.batch(rows).ids) == 2

    parts = prepare(data.model_copy(update={"max_turns": 1}), 0, tmp_path / "parts", encoder=teacher.encoder)
    assert parts.skipped == {"too long": 3}
    assert open_dataset(parts)["id"][:] == ["s-0", "s-1.1", "s-3.0"], "only the long part of a sample goes"


def test_a_refusing_processor_costs_a_sample_and_a_bad_template_the_run(tmp_path: Path, teacher: Teacher) -> None:
    class Picky:
        """The tiny processor, but with Qwen2-VL's refusal of very long images."""

        tokenizer = teacher.processor.tokenizer

        def __call__(self, images: list[Image.Image], **inputs: Any) -> Any:
            if max(images[0].size) > 100 * min(images[0].size):
                raise ValueError("absolute aspect ratio must be smaller than 100")
            return teacher.processor(images=images, **inputs)

        def apply_chat_template(self, messages: list[Any], **options: Any) -> str:
            return str(teacher.processor.apply_chat_template(messages, **options))

    write_image(tmp_path / "strip.png", size=(300, 2))
    data = source(tmp_path, [sample(), sample("strip.png")], max_bad_share=0.5)
    manifest = prepare(data, 0, tmp_path / "out", encoder=Encoder(Picky()))
    assert manifest.skipped == {"refused by the processor": 1}

    Picky.apply_chat_template = lambda self, messages, **options: f"{len(messages)} messages"  # type: ignore
    with pytest.raises(TemplateError, match="rewrites earlier turns"):
        prepare(data, 0, tmp_path / "other", encoder=Encoder(Picky()))
    assert not (tmp_path / "other").exists()


def test_a_killed_prepare_leaves_nothing_believed(tmp_path: Path) -> None:
    data, out = source(tmp_path, [*[sample()] * 20, sample("pipe.png"), sample()]), tmp_path / "out"
    os.mkfifo(tmp_path / "pipe.png")  # reading this "image" waits until somebody opens it for writing
    writer = multiprocessing.get_context("fork").Process(target=prepare, args=(data, 0, out))
    writer.start()
    with (tmp_path / "pipe.png").open("wb"):  # opens when the 21st sample is being read
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert not out.exists()
    assert [name for name in os.listdir(tmp_path) if name.startswith(".out")], "killed too early to be a test"
    (tmp_path / "pipe.png").unlink()
    write_image(tmp_path / "pipe.png")
    manifest = prepare(data, 0, out)
    assert manifest.num_samples == len(open_dataset(manifest)) == 22
    assert sorted(os.listdir(tmp_path)) == ["good.png", "out", "pipe.png", "talk.json"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path, tiny_disk: Path) -> None:
    data = source(tmp_path, [sample("good.png", "why " * 20_000, "because " * n) for n in range(20)])
    with pytest.raises(StorageError, match=rf"^{tiny_disk}/out: cannot write: .*MiB free there"):
        prepare(data, 0, tiny_disk / "out")
    assert os.listdir(tiny_disk) == []
    few = data.model_copy(update={"max_samples": 1})
    assert isinstance(prepare(few, 0, tiny_disk / "out"), DataManifest)
