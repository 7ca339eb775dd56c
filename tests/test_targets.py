"""The target store on a tiny VLM: exactness, resume, damage, full disk, and stores of something else."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teacher import Teacher, made_up

from matvlm.losses import sparse_kl
from matvlm.reporting import Reporter
from matvlm.storage import StorageError
from matvlm.targets import TargetError, join_shards, open_targets, shard_rows, write_shard

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


def test_shards_share_out_every_row_once() -> None:
    assert sorted(i for shard in range(3) for i in shard_rows(10, 3, shard)) == list(range(10))


def test_more_shards_than_samples(tmp_path: Path, teacher: Teacher) -> None:
    write_shard(str(tmp_path), 0, 2, [], teacher.identity)
    write_shard(str(tmp_path), 1, 2, made_up(["a"]), teacher.identity)
    join_shards(str(tmp_path), 2, teacher.identity)
    assert open_targets(str(tmp_path)).count("a") == 5


# ---- interrupted, damaged, full


def test_a_finished_shard_is_kept_untouched(teacher: Teacher, tmp_path: Path) -> None:
    first = teacher.compute(tmp_path, 0)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()}
    assert teacher.compute(tmp_path, 0, model=None) == first, "no teacher is needed"
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


def test_a_flipped_byte_is_refused_and_computed_again(teacher: Teacher, tmp_path: Path) -> None:
    teacher.store(tmp_path)
    damaged = tmp_path / "shard-00001-of-00002.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    for use in (lambda: open_targets(str(tmp_path)), lambda: join_shards(str(tmp_path), 2, teacher.identity)):
        with pytest.raises(TargetError, match=r"shard-00001-of-00002\.safetensors: the shard is damaged"):
            use()
    teacher.compute(tmp_path, 1)
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
        lambda: teacher.compute(finished, 0, identity=run),
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
