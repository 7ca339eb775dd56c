"""Loading while training: the same samples whatever the workers, a bad one is named, no worker outlives its trainer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from s3_server import BUCKET
from tiny_teacher import Teacher

from matvlm.config import Data
from matvlm.data import loading
from matvlm.data.encoding import Encoder, Sample, TemplateError
from matvlm.data.loading import Loaded, LoadError, batches
from matvlm.data.prepare import open_dataset, prepare
from matvlm.storage import s3

COUNT = 12
LISTS = [[3, 1, 2], [0], [7, 7, 11], [], [5, 4]]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher()


@pytest.fixture
def dataset(tmp_path: Path) -> Any:
    """Twelve samples with one to three turns; images 6 to 11 are in an archive."""
    (tmp_path / "images").mkdir()
    samples = []
    for number in range(COUNT):
        Image.new("RGB", (16, 16), (number, 20 * number, 7)).save(tmp_path / "images" / f"{number}.png")
        turns = [text for turn in range(number % 3 + 1) for text in (f"what shape is {turn}", "a circle")]
        talk = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
        samples.append({"id": "s", "image": f"{number}.png", "conversations": talk})
    with tarfile.open(tmp_path / "images" / "late.tar", "w") as archive:
        for number in range(6, COUNT):
            archive.add(tmp_path / "images" / f"{number}.png", f"{number}.png")
            (tmp_path / "images" / f"{number}.png").unlink()
    (tmp_path / "talk.json").write_text(json.dumps(samples))
    data = Data(source="llava", path=str(tmp_path / "talk.json"), image_folder=str(tmp_path / "images"))
    return open_dataset(prepare(data, 0, tmp_path / "out"))


def assert_same(one: Loaded, other: Loaded) -> None:
    assert one.bad == other.bad
    assert [sample.id for sample in one.samples] == [sample.id for sample in other.samples]
    for left, right in zip(one.samples, other.samples, strict=True):
        assert left.image_inputs.keys() == right.image_inputs.keys() != set()
        pairs = [(left.input_ids, right.input_ids), (left.labels, right.labels)]
        pairs += [(left.image_inputs[name], right.image_inputs[name]) for name in left.image_inputs]
        for mine, theirs in pairs:
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


def test_workers_change_nothing(dataset: Any, teacher: Teacher, tmp_path: Path) -> None:
    (tmp_path / "images" / "2.png").unlink()
    before = torch.get_rng_state()
    alone = list(batches(dataset, teacher.encoder, LISTS, 0))
    assert [[sample.id for sample in loaded.samples] for loaded in alone] == [
        ["s-3", "s-1"],
        ["s-0"],
        ["s-7", "s-7", "s-11"],
        [],
        ["s-5", "s-4"],
    ]
    ((id, why),) = alone[0].bad.items()
    assert id == "s-2"
    assert why.startswith(f"missing image: s-2: {tmp_path}/images/2.png: ")
    for workers in (1, 2):
        together = list(batches(dataset, teacher.encoder, iter(LISTS), workers))
        assert len(together) == len(alone)
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other)
    assert torch.equal(torch.get_rng_state(), before), "a resumed run would notice"


def test_what_is_loaded_is_what_the_encoder_makes(dataset: Any, teacher: Teacher) -> None:
    (loaded,) = batches(dataset, teacher.encoder, [[8, 2]], 0)
    expected = teacher.batch([dataset[8], dataset[2]])
    batch = teacher.encoder.collate(loaded.samples)
    assert batch.ids == expected.ids == ["s-8", "s-2"]
    assert torch.equal(batch.labels, expected.labels)
    assert all(torch.equal(batch.inputs[name], value) for name, value in expected.inputs.items())


def test_workers_read_from_s3(dataset: Any, teacher: Teacher, tmp_path: Path, bucket: str) -> None:
    client = s3._client()
    client.upload_file(str(tmp_path / "images" / "late.tar"), BUCKET, "tars/late.tar")
    for number in range(6):
        client.upload_file(str(tmp_path / "images" / f"{number}.png"), BUCKET, f"tars/{number}.png")
    data = Data(source="llava", path=str(tmp_path / "talk.json"), image_folder=f"{bucket}/tars")
    remote = open_dataset(prepare(data, 0, tmp_path / "remote"))
    client.delete_object(Bucket=BUCKET, Key="tars/2.png")
    for one, other in zip(
        batches(dataset, teacher.encoder, [[0, 8], [11]], 0),
        batches(remote, teacher.encoder, [[0, 8], [11]], 2),
        strict=True,
    ):
        assert_same(one, other)
    (gone,) = batches(remote, teacher.encoder, [[2, 1]], 1)
    assert [sample.id for sample in gone.samples] == ["s-1"]
    assert gone.bad.keys() == {"s-2"}
    assert re.match(rf"missing image: s-2: {bucket}/tars/2\.png: .*NoSuchKey", gone.bad["s-2"])


class Failing:
    """The tiny processor as one that fails, in a worker as well."""

    image_token_id = None

    def __init__(self, processor: Any, error: Exception):
        self.processor, self.error = processor, error
        self.tokenizer = processor.tokenizer

    def __call__(self, **inputs: Any) -> Any:
        raise self.error

    def apply_chat_template(self, messages: list[Any], **options: Any) -> str:
        return str(self.processor.apply_chat_template(messages, **options))


@pytest.mark.parametrize("workers", [0, 1])
def test_only_what_is_a_samples_own_fault_is_skipped(
    dataset: Any, teacher: Teacher, tmp_path: Path, workers: int
) -> None:
    def encoder(error: Exception) -> Encoder:
        return Encoder(Failing(teacher.processor, error))

    ((samples, bad),) = batches(dataset, encoder(ValueError("too thin")), [[1, 2]], workers)
    assert samples == []
    assert bad["s-2"] == f"refused by the processor: {tmp_path}/images/2.png: too thin"
    broken = batches(dataset, encoder(KeyError("pixels")), [[0, 9]], workers)
    with pytest.raises(LoadError, match=rf"^sample s-0 \({tmp_path}/images/0\.png\): KeyError: 'pixels'$"):
        next(broken)
    with pytest.raises(TemplateError, match="rewrites"):
        next(batches(dataset, encoder(TemplateError("rewrites")), [[0]], workers))


def test_a_damaged_archive_costs_its_samples(dataset: Any, teacher: Teacher, tmp_path: Path) -> None:
    archive = tmp_path / "images" / "late.tar"
    archive.write_bytes(archive.read_bytes()[:600])
    ((samples, bad),) = batches(dataset, teacher.encoder, [[0, 6, 9]], 0)
    assert [sample.id for sample in samples] == ["s-0"]
    assert bad["s-9"].startswith(f"broken image: s-9: {archive}, member 9.png: ")


class Reporting:
    """The tiny processor, which says of the process that it is in instead of the pixels."""

    image_token_id = None

    def __init__(self, processor: Any):
        self.processor, self.tokenizer = processor, processor.tokenizer

    def __call__(self, **inputs: Any) -> Any:
        encoded = self.processor(**inputs)
        fork_server = "forkserver" in " ".join(psutil.Process(os.getppid()).cmdline())
        facts = [os.getpid(), torch.get_num_threads(), int(os.environ.get("MATVLM_TEST", 0)), fork_server]
        return {"input_ids": encoded["input_ids"], "facts": torch.tensor([facts])}

    def apply_chat_template(self, messages: list[Any], **options: Any) -> str:
        return str(self.processor.apply_chat_template(messages, **options))


def test_workers_have_one_thread_and_the_trainers_environment(
    dataset: Any, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MATVLM_TEST", "17")
    torch.set_num_threads(2)
    try:
        loaded = list(batches(dataset, Encoder(Reporting(teacher.processor)), LISTS, 2))
    finally:
        torch.set_num_threads(1)
    facts = torch.cat([sample.image_inputs["facts"] for each in loaded for sample in each.samples])
    assert len(facts[:, 0].unique()) == 2
    assert os.getpid() not in facts[:, 0]
    assert facts[:, 1:].unique(dim=0).tolist() == [[1, 17, 1]]


def test_rows_are_taken_only_a_little_ahead_and_workers_end_with_the_iterator(dataset: Any, teacher: Teacher) -> None:
    taken: list[int] = []

    def rows() -> Any:
        for number in range(1000):
            taken.append(number)
            yield [number % COUNT]

    loaded = batches(dataset, Encoder(Reporting(teacher.processor)), rows(), 1, prefetch=2)
    pid = int(next(loaded).samples[0].image_inputs["facts"][0, 0])
    assert len(taken) <= 4
    assert psutil.pid_exists(pid)
    loaded.close()  # type: ignore[attr-defined]
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5)
    assert not psutil.pid_exists(pid)


def test_a_killed_worker_is_one_clear_error(dataset: Any, teacher: Teacher) -> None:
    lists = ([number % COUNT] for number in range(10_000))
    loaded = batches(dataset, Encoder(Reporting(teacher.processor)), lists, 1)
    os.kill(int(next(loaded).samples[0].image_inputs["facts"][0, 0]), signal.SIGKILL)
    with pytest.raises(LoadError, match=r"loading ended in a worker: .*give more or use fewer workers"):
        for _ in loaded:
            pass


TRAINER = """
import sys, time
sys.path.insert(0, {tests!r})

def main():
    from tiny_teacher import Teacher
    from test_data_loading import Reporting
    from matvlm.artifacts import DataManifest
    from matvlm.data.encoding import Encoder
    from matvlm.data.loading import batches
    from matvlm.data.prepare import open_dataset
    dataset = open_dataset(DataManifest(uri={uri!r}, num_samples={count}, num_skipped=0, skipped={{}}, fingerprint=""))
    lists = ([number % {count}] for number in range(10_000))
    for loaded in batches(dataset, Encoder(Reporting(Teacher().processor)), lists, 2):
        print(int(loaded.samples[0].image_inputs["facts"][0, 0]), flush=True)
        time.sleep(0.05)

if __name__ == "__main__":
    main()
"""


def test_workers_do_not_outlive_a_killed_trainer(dataset: Any, tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    tests = str(Path(__file__).parent)
    script.write_text(TRAINER.format(tests=tests, uri=str(tmp_path / "out"), count=COUNT))
    trainer = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pids = {int(trainer.stdout.readline()) for _ in range(6)}
    assert len(pids) == 2
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 10
    while any(map(_runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_runs, pids))


def _runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_packing_keeps_shapes_and_order() -> None:
    samples = [
        Sample(f"s{n}", torch.arange(n), torch.arange(n) - 1, {"pixels": torch.full((1, n, 2), n / 2)})
        for n in (3, 1, 2)
    ]
    outcomes = [samples[0], loading.BadRow("b", "why"), samples[1], samples[2]]
    unpacked = loading._pack(list(outcomes)).unpack()
    assert unpacked[1] == outcomes[1]
    assert_same(Loaded([one for one in unpacked if isinstance(one, Sample)], {}), Loaded(samples, {}))
    assert loading._pack([outcomes[1]]).unpack() == [outcomes[1]]
