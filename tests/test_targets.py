"""The target store on a tiny VLM: exactness, resume, damage, full disk, and stores of something else."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors import safe_open
from tiny_families import FAMILIES
from tiny_teacher import SETTINGS, Teacher, made_up
from torch import Tensor
from torch.nn.functional import pad

from matvlm.data.encoding import IGNORE, Batch, Encoder, Sample
from matvlm.data.placed import PlacedImage
from matvlm.losses import sparse_kl
from matvlm.models.fusing import compile_, fuse_activations_
from matvlm.models.hybrid import decoder_layers
from matvlm.reporting import Reporter
from matvlm.storage import StorageError
from matvlm.targets import TargetError, batch_targets, join_shards, open_targets, shard_rows, write_shard

ANSWER = 5

STORED_LOGPROB = {"rtol": 2.0**-11, "atol": 5e-4}
"""Float16 rounds by half a unit in the last of 11 bits. Giving a position's buckets the sum one then moves all of them
by one small amount, measured here: 2e-4. (bfloat16 would need an rtol of 2**-8.)"""


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher()


@pytest.fixture(scope="module")
def finished(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store that no test may change."""
    folder = tmp_path_factory.mktemp("store")
    teacher.store(folder)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- what is stored


def test_lookup_equals_direct_computation(teacher: Teacher, finished: Path) -> None:
    reader = open_targets(str(finished), teacher.identity)
    order = [5, 0, 6, 3]
    rows = [teacher.rows[i] for i in order]
    ids, logprobs, tail = reader.lookup([row["id"] for row in rows])
    exact_ids, exact_logprobs, exact_tail = teacher.exact(rows)
    assert (ids.dtype, logprobs.dtype, tail.dtype) == (torch.int64, torch.float32, torch.float32)
    assert torch.equal(ids, exact_ids)
    torch.testing.assert_close(logprobs, exact_logprobs.float(), **STORED_LOGPROB)
    torch.testing.assert_close(tail, exact_tail.float(), **STORED_LOGPROB)
    assert [reader.count(row["id"]) for row in rows] == [int(teacher.batch([row]).kept.sum()) for row in rows]
    assert len(reader) == len(teacher.rows)


def test_loss_from_the_store_equals_loss_from_exact_targets(teacher: Teacher, finished: Path) -> None:
    stored = open_targets(str(finished)).lookup([row["id"] for row in teacher.rows])
    exact = teacher.exact(teacher.rows)
    generator = torch.Generator().manual_seed(0)
    vocabulary = teacher.model.config.text_config.vocab_size
    student = torch.randn(len(stored[0]), vocabulary, generator=generator, dtype=torch.float64) * 3
    student.requires_grad_()
    losses = [sparse_kl(student, *targets, temperature=2.0) for targets in (stored, exact)]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    # Measured over five students: loss 6e-6, gradient 4.4e-5.
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=5e-5)
    assert (gradients[0] - gradients[1]).norm() < 2e-4 * gradients[1].norm()


def test_stored_buckets_sum_to_one(finished: Path, teacher: Teacher) -> None:
    _, logprobs, tail = open_targets(str(finished)).lookup([row["id"] for row in teacher.rows])
    # As stored, the float16 values sum to one within 2e-4 only.
    torch.testing.assert_close(logprobs.exp().sum(-1) + tail.exp(), torch.ones(len(tail)), rtol=0, atol=1e-6)


def test_report_of_size_and_kept_mass(teacher: Teacher, tmp_path: Path) -> None:
    class Recorder(Reporter):
        def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
            seen.update(values)

    seen: dict[str, float] = {}
    store = teacher.store(tmp_path, Recorder())
    mass = teacher.exact(teacher.rows)[1].exp().sum(-1).float()
    shard_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert (store.num_samples, store.num_positions) == (7, len(mass))
    assert store.kept_mass_mean == seen["targets/kept_mass_mean"] == pytest.approx(mass.mean().item(), abs=1e-3)
    assert seen["targets/kept_mass_p1"] == pytest.approx(mass.quantile(0.01).item(), abs=1e-3)
    assert store.bytes_per_position == seen["targets/bytes_per_position"] == shard_bytes / len(mass)
    assert store.identity == teacher.identity.sha256


@pytest.mark.parametrize(("first_token", "bytes_per_position"), [(0, 130), (1 << 16, 194)])
def test_a_position_takes_130_bytes(
    tmp_path: Path, teacher: Teacher, first_token: int, bytes_per_position: int
) -> None:
    samples = made_up(["a"], positions=4000, k=32, first_token=first_token)
    write_shard(str(tmp_path), 0, 1, samples, teacher.identity)
    store = join_shards(str(tmp_path), 1, teacher.identity)
    assert bytes_per_position < store.bytes_per_position < bytes_per_position + 1
    assert torch.equal(open_targets(str(tmp_path)).lookup(["a"])[0], samples[0].token_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_of_a_padded_batch_are_those_of_each_sample_alone(name: str, teacher: Teacher) -> None:
    """Of every family: with its mask or without, in float64 as its own forward gives them."""
    model = FAMILIES[name].build().double()
    samples = [FAMILIES[name].sample(model, length, length) for length in (9, 14, 11)]
    model_inputs = [{n: v.double() if v.is_floating_point() else v for n, v in sample.items()} for sample in samples]
    batch = padded(model_inputs)
    identity = teacher.identity.model_copy(update={"top_k": 8})
    for inputs, found in zip(model_inputs, batch_targets(model, batch, identity), strict=True):
        with torch.no_grad():
            logits = model(**inputs).logits[0, -ANSWER - 1 : -1].double() / identity.temperature
        assert torch.equal(found.token_ids, logits.topk(8).indices)
        logprobs = logits.log_softmax(-1)
        torch.testing.assert_close(found.logprobs.double(), logprobs.gather(-1, found.token_ids), rtol=0, atol=1e-5)
        tail = logprobs.scatter(-1, found.token_ids, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(found.tail.double(), tail, rtol=0, atol=1e-5)


def padded(samples: list[dict[str, Any]]) -> Batch:
    """``samples`` padded on the right, each with an answer of ``ANSWER`` tokens."""
    length = max(sample["input_ids"].shape[1] for sample in samples)

    def joined(name: str) -> Tensor:
        parts = [sample[name] for sample in samples]
        if name in ("input_ids", "attention_mask") or "type" in name:
            parts = [pad(part, (0, length - part.shape[1])) for part in parts]
        return torch.cat(parts)

    inputs = {name: joined(name) for name in samples[0]}
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    for row, sample in enumerate(samples):
        end = sample["input_ids"].shape[1]
        labels[row, end - ANSWER : end] = sample["input_ids"][0, -ANSWER:]
    return Batch([str(row) for row in range(len(samples))], inputs, labels)


def test_a_shard_keeps_the_order_of_the_data_and_little_is_padded(teacher: Teacher, tmp_path: Path) -> None:
    lengths: list[list[int]] = []

    class Watched(Encoder):
        def collate(self, samples: Sequence[Sample]) -> Batch:
            lengths.append([len(sample.input_ids) for sample in samples])
            return super().collate(samples)

    teacher.maker(tmp_path, settings=SETTINGS, encoder=Watched(teacher.processor, 64)).make([0])
    with safe_open(tmp_path / "shard-00000-of-00002.safetensors", framework="pt") as file:
        assert json.loads(file.get_tensor("ids").numpy().tobytes()) == [f"sample-{row}" for row in (0, 2, 4, 6)]
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)
    assert len(set(flat)) > 1


def test_workers_write_the_same_bytes(teacher: Teacher, tmp_path: Path) -> None:
    for workers in (0, 2):
        teacher.store(tmp_path / f"{workers}", settings=SETTINGS.model_copy(update={"workers": workers}))
    for path in (tmp_path / "0").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_compiled_layers_compute_the_same(teacher: Teacher, tmp_path: Path) -> None:
    copied = Teacher()
    fuse_activations_(copied.model)
    compile_(decoder_layers(copied.model))
    copied.store(tmp_path / "compiled")
    teacher.store(tmp_path / "plain")
    ids = [row["id"] for row in teacher.rows]
    plain, compiled = (open_targets(str(tmp_path / name)).lookup(ids) for name in ("plain", "compiled"))
    assert torch.equal(plain[0], compiled[0])
    for ours, theirs in zip(plain[1:], compiled[1:], strict=True):
        torch.testing.assert_close(ours, theirs, **STORED_LOGPROB)


def test_what_the_time_goes_into_is_reported(teacher: Teacher, tmp_path: Path) -> None:
    class Recorder(Reporter):
        def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
            seen.update(values)

    seen: dict[str, float] = {}
    teacher.maker(tmp_path).make([0, 1], Recorder())
    assert {name.removeprefix("targets/share_") for name in seen} == {"data", "teacher", "top_k", "write"}
    assert sum(seen.values()) == pytest.approx(1.0)
    assert min(seen.values()) > 0


def test_shards_share_out_every_row_once() -> None:
    assert sorted(i for shard in range(3) for i in shard_rows(10, 3, shard)) == list(range(10))


def test_more_shards_than_samples(tmp_path: Path, teacher: Teacher) -> None:
    write_shard(str(tmp_path), 0, 2, [], teacher.identity)
    write_shard(str(tmp_path), 1, 2, made_up(["a"]), teacher.identity)
    join_shards(str(tmp_path), 2, teacher.identity)
    assert open_targets(str(tmp_path)).count("a") == 5


# ---- interrupted, damaged, full


def test_a_finished_shard_is_kept_untouched(teacher: Teacher, tmp_path: Path) -> None:
    first = teacher.maker(tmp_path).make([0])
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()}
    assert teacher.maker(tmp_path, model=None).make([0]) == first, "no teacher is needed"
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()} == before
    with pytest.raises(TargetError, match="shard-00001-of-00002 is not finished"):
        join_shards(str(tmp_path), 2, teacher.identity)
    with pytest.raises(TargetError, match=r"manifest\.json is missing; run teacher_targets"):
        open_targets(str(tmp_path))


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_a_kill_leaves_nothing_half_written_that_is_believed(tmp_path: Path, teacher: Teacher, moment: int) -> None:
    """``moment``: the process dies at its n-th fsync, which is before and after each of the two renames."""
    samples = made_up(["a", "b"])
    child = os.fork()
    if child == 0:
        calls = iter(range(1, 100))
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == moment else None
        write_shard(str(tmp_path), 0, 1, samples, teacher.identity)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    if (tmp_path / "shard-00000-of-00001.json").exists():
        assert moment == 4, "the checksum file comes last"
        join_shards(str(tmp_path), 1, teacher.identity)
    else:
        with pytest.raises(TargetError, match="not finished"):
            join_shards(str(tmp_path), 1, teacher.identity)
    write_shard(str(tmp_path), 0, 1, samples, teacher.identity)
    join_shards(str(tmp_path), 1, teacher.identity)
    assert files(tmp_path) == {"manifest.json", "shard-00000-of-00001.json", "shard-00000-of-00001.safetensors"}


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path, teacher: Teacher) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"shard-00000-of-00001\.safetensors: cannot write: .*MiB free"):
            write_shard(str(tmp_path), 0, 1, made_up(["a", "b"]), teacher.identity)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == set()


def test_a_shard_that_cannot_be_written_leaves_those_before_it(
    teacher: Teacher, finished: Path, tmp_path: Path
) -> None:
    small, large = ((finished / f"shard-0000{n}-of-00002.safetensors").stat().st_size for n in (1, 0))
    assert small < large
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (large - 1, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"shard-00000-of-00002\.safetensors: cannot write"):
            teacher.maker(tmp_path).make([1, 0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == {"shard-00001-of-00002.json", "shard-00001-of-00002.safetensors"}


def test_more_bad_samples_than_allowed_are_refused_and_named(
    teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = tmp_path / "gone.png"
    stored = teacher.dataset.cast_column("image", datasets.Image(decode=False)).to_list()
    stored[2]["image"] = {"bytes": None, "path": str(gone)}
    dataset = datasets.Dataset.from_list(stored).cast_column("image", PlacedImage())
    message = r"shard-00000-of-00002: 1 of 4 samples cannot be loaded .* allows 0: missing image: sample-2: .*gone\.png"
    with pytest.raises(TargetError, match=message):
        teacher.maker(tmp_path / "store", dataset=dataset).make([0])
    assert not (tmp_path / "store").exists()
    teacher.store(tmp_path / "store", dataset=dataset, max_bad_share=0.25)
    assert caplog.text.count(f"shard-00000-of-00002 lacks a sample: missing image: sample-2: {gone}") == 2
    reader = open_targets(str(tmp_path / "store"), teacher.identity)
    whole = [row["id"] for row in teacher.rows if row["id"] != "sample-2"]
    assert list(reader.unusable) == ["sample-2"]
    assert torch.equal(reader.lookup(whole)[0], teacher.exact([row for row in teacher.rows if row["id"] in whole])[0])


def test_a_flipped_byte_is_refused_and_computed_again(teacher: Teacher, tmp_path: Path) -> None:
    teacher.store(tmp_path)
    damaged = tmp_path / "shard-00001-of-00002.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    for use in (lambda: open_targets(str(tmp_path)), lambda: join_shards(str(tmp_path), 2, teacher.identity)):
        with pytest.raises(TargetError, match=r"shard-00001-of-00002\.safetensors: the shard is damaged"):
            use()
    teacher.maker(tmp_path).make([1])
    assert damaged.read_bytes() == whole
    open_targets(str(tmp_path))


# ---- stores of something else


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("teacher", "another"),
        ("data", "x"),
        ("template", "x"),
        ("max_length", 65),
        ("max_turns", 1),
        ("top_k", 5),
        ("temperature", 1.0),
        ("positions", "all"),
        ("scheme", "topk_sampled"),
        ("samples", 4),
        ("seed", 0),
    ],
)
def test_another_identity_is_refused_with_its_field(finished: Path, teacher: Teacher, field: str, value: Any) -> None:
    run = teacher.identity.model_copy(update={field: value})
    message = rf"\({field}: store has {getattr(teacher.identity, field)!r}, run has {value!r}\); use another folder"
    uses: list[Callable[[], Any]] = [
        lambda: open_targets(str(finished), run),
        lambda: join_shards(str(finished), 2, run),
        lambda: teacher.maker(finished, run).make([0]),
    ]
    for use in uses:
        with pytest.raises(TargetError, match=message):
            use()


def test_unknown_sample_is_named(finished: Path) -> None:
    with pytest.raises(TargetError, match="no targets for sample 'sample-99'"):
        open_targets(str(finished)).lookup(["sample-1", "sample-99"])


def test_an_id_twice_is_refused(tmp_path: Path, teacher: Teacher) -> None:
    with pytest.raises(TargetError, match="'a' occurs twice"):
        write_shard(str(tmp_path), 0, 2, made_up(["a", "b", "a"]), teacher.identity)
    write_shard(str(tmp_path), 0, 2, made_up(["a", "b"]), teacher.identity)
    write_shard(str(tmp_path), 1, 2, made_up(["c", "b"]), teacher.identity)
    with pytest.raises(TargetError, match="'b' occurs twice"):
        join_shards(str(tmp_path), 2, teacher.identity)


def test_a_teacher_that_yields_nan_is_refused(tmp_path: Path, teacher: Teacher) -> None:
    good, bad = made_up(["good", "bad"])
    bad.tail[2] = torch.nan
    with pytest.raises(TargetError, match="'bad' is not a number"):
        write_shard(str(tmp_path), 0, 1, [good, bad], teacher.identity)
    assert files(tmp_path) == set()
