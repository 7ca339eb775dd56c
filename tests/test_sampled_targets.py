"""Targets with draws from the tail, and every choice of positions: unbiased, repeatable, of the size they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_teacher import Teacher
from torch import Tensor

from matvlm.artifacts import DataManifest
from matvlm.config import Targets
from matvlm.data.encoding import Encoder
from matvlm.losses import bucket_logprobs, dense_kl, sampled_kl, sparse_kl
from matvlm.recipes import parse_recipe
from matvlm.targets import (
    Identity,
    SampleTargets,
    TargetReader,
    batch_targets,
    check_gradients,
    join_shards,
    open_targets,
    write_shard,
)
from matvlm.targets.sampling import draw_tail, uniforms

VOCABULARY, K, S = 40, 4, 3


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher()


@pytest.fixture(scope="module")
def identity(teacher: Teacher) -> Identity:
    return sampled(teacher.identity)


def sampled(identity: Identity, **other: Any) -> Identity:
    return identity.model_copy(update={"scheme": "topk_sampled", "top_k": K, "samples": S, "seed": 5, **other})


def store(teacher: Teacher, folder: Path, identity: Identity, shards: int = 2, batch_size: int = 2) -> TargetReader:
    teacher.store(folder, identity=identity, settings=Targets(shards=shards, batch_size=batch_size))
    return open_targets(str(folder), identity)


def flat(seed: int) -> Tensor:
    """[1, V] logits, float64, of a distribution whose tail matters."""
    return torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws_of(logits: Tensor, token_ids: Tensor, repeats: int) -> Tensor:
    uniform = torch.cat([uniforms(f"sample-{number}", 1, S, seed=0) for number in range(repeats)])
    return draw_tail(logits.expand(repeats, -1), token_ids.expand(repeats, -1), uniform)


# ---- the loss


def test_the_mean_gradient_over_draws_is_the_dense_one_where_the_tail_bucket_is_biased() -> None:
    repeats, temperature = 20_000, 2.0
    teacher, student = flat(0), flat(1)
    token_ids = (teacher / temperature).topk(K).indices
    logprobs, tail = bucket_logprobs(teacher / temperature, token_ids)
    drawn = draws_of(teacher / temperature, token_ids, repeats)

    many = student.repeat(repeats, 1).requires_grad_()
    same = (token_ids.expand(repeats, -1), logprobs.expand(repeats, -1))
    loss = sampled_kl(many, *same, drawn, tail.expand(repeats), temperature)
    (each,) = torch.autograd.grad(loss, many)

    one = student.clone().requires_grad_()
    exact_loss = dense_kl(teacher / temperature, one / temperature)
    (exact,) = torch.autograd.grad(exact_loss, one)
    (bucket,) = torch.autograd.grad(sparse_kl(one, token_ids, logprobs, tail, temperature), one)
    standard_error = each.std(0) / repeats**0.5
    off, bias = each.mean(0) - exact[0], bucket[0] - exact[0]
    assert (off.abs() < 5 * standard_error + 1e-12).all()
    # Measured: 0.98 and 23; the bucket's gradient is off by 75 %.
    assert off.norm() < 2 * standard_error.norm()
    assert bias.norm() > 10 * standard_error.norm()

    rest = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, token_ids[0], False)
    within = (teacher[0, rest] / temperature).log_softmax(-1)
    entropy = -(within.exp() * within).sum()
    expected = exact_loss + tail.exp()[0] * entropy
    assert loss.item() / repeats == pytest.approx(expected.item(), rel=2e-3)  # measured: 4e-4


def test_sampled_kl_by_hand() -> None:
    # teacher (1/2, 1/4, 1/8, 1/8), student uniform, k = 1, the tail's draws are 1, 1 and 3
    student = torch.zeros(1, 4, requires_grad=True)
    half = torch.log(torch.tensor([0.5]))
    loss = sampled_kl(student, torch.tensor([[0]]), half[None], torch.tensor([[1, 1, 3]]), half)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    loss.backward()
    # dL/dz = q - p_0 - p_tail times how often each was drawn
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([1 / 4 - 1 / 2, 1 / 4 - 1 / 3, 1 / 4, 1 / 4 - 1 / 6], abs=1e-7)


def test_without_a_tail_it_is_the_dense_loss() -> None:
    teacher, student = flat(0), flat(1)
    token_ids = teacher.topk(VOCABULARY).indices
    drawn = draws_of(teacher, token_ids, 1)
    loss = sampled_kl(student, token_ids, *bucket_logprobs(teacher, token_ids)[:1], drawn, torch.tensor([-torch.inf]))
    assert loss.item() == pytest.approx(dense_kl(teacher, student).item(), rel=1e-12)


def test_targets_of_other_positions_are_refused() -> None:
    token_ids = flat(0).topk(K).indices
    logprobs, tail = bucket_logprobs(flat(0), token_ids)
    with pytest.raises(ValueError, match=r"must share their positions, got shapes .*\(2, 3\)"):
        sampled_kl(flat(1), token_ids, logprobs, torch.zeros(2, 3, dtype=torch.int64), tail)


# ---- the draws


def test_draws_come_from_the_tail_alone() -> None:
    teacher = flat(0) * 4
    token_ids = teacher.topk(K).indices
    drawn = draws_of(teacher, token_ids, 3000)
    assert not torch.isin(drawn, token_ids).any()
    extremes = torch.tensor([[0.0, 1 - 2.0**-53]], dtype=torch.float64)
    assert not torch.isin(draw_tail(teacher, token_ids, extremes), token_ids).any()


def test_numbers_are_one_in_each_interval() -> None:
    rows = uniforms("a", 50, 4, seed=1)
    assert (rows * 4).floor().tolist() == [[0, 1, 2, 3]] * 50
    assert not torch.equal(rows, uniforms("b", 50, 4, seed=1))
    assert not torch.equal(rows, uniforms("a", 50, 4, seed=2))


def test_neither_batch_nor_shard_changes_a_sample(teacher: Teacher, identity: Identity, tmp_path: Path) -> None:
    stores = [store(teacher, tmp_path / f"{n}", identity, shards=n, batch_size=size) for n, size in ((1, 7), (3, 1))]
    ids = [row["id"] for row in teacher.rows]
    one, other = (reader.draws(ids) for reader in stores)
    assert one is not None
    assert one.shape == (len(stores[0].lookup(ids)[2]), S)
    assert torch.equal(one, other)
    reseeded = store(teacher, tmp_path / "reseeded", sampled(teacher.identity, seed=6))
    assert not torch.equal(one, reseeded.draws(ids))


def test_loss_from_the_store(teacher: Teacher, identity: Identity, tmp_path: Path) -> None:
    reader = store(teacher, tmp_path, identity)
    batch = teacher.batch(teacher.rows[2:5])
    made = batch_targets(teacher.model, batch, identity)
    parts = [torch.cat(part) for part in zip(*(sample[1:] for sample in made), strict=True)]
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(len(parts[0]), teacher.model.config.text_config.vocab_size, generator=generator)
    token_ids, logprobs, tail, drawn = parts
    exact = sampled_kl(student, token_ids, logprobs, drawn, tail, temperature=2.0).item()
    assert reader.kl(student, batch.ids, temperature=2.0).item() == pytest.approx(exact, rel=2e-4)  # measured: 1.1e-5


@pytest.mark.parametrize(("first_token", "bytes_per_position"), [(0, 98), (1 << 16, 162)])
def test_a_position_takes_98_bytes(
    tmp_path: Path, identity: Identity, first_token: int, bytes_per_position: int
) -> None:
    tokens = torch.arange(16).expand(4000, -1) + first_token
    even = torch.full((4000, 16), 1 / 32).log()
    sample = SampleTargets("a", tokens, even, torch.full((4000,), 0.5).log(), tokens + 16)
    write_shard(str(tmp_path), 0, 1, [sample], identity)
    joined = join_shards(str(tmp_path), 1, identity)
    assert bytes_per_position < joined.bytes_per_position < bytes_per_position + 1
    assert torch.equal(open_targets(str(tmp_path)).draws(["a"]), sample.sampled_ids)


# ---- identity and positions


def test_a_recipe_decides_positions_and_scheme(teacher: Teacher) -> None:
    data = DataManifest(uri="", num_samples=1, num_skipped=0, skipped={}, fingerprint="d")

    def of(*overrides: str) -> Identity:
        return Identity.of(parse_recipe("name: x", overrides=overrides), data, teacher.processor, "t")

    plain = of("seed=3", "targets.samples=4")
    assert (plain.positions, plain.scheme, plain.samples, plain.seed) == ("answer", "topk_tail", None, None)
    drawn = of("seed=3", "targets.samples=4", "targets.scheme=topk_sampled", "targets.positions=all")
    assert (drawn.positions, drawn.scheme, drawn.samples, drawn.seed) == ("all", "topk_sampled", 4, 3)
    hashes = {made.sha256 for made in (plain, drawn, of("targets.scheme=topk_sampled"), of("targets.positions=all"))}
    assert len(hashes) == 4


def test_a_store_of_the_first_format_is_still_known(teacher: Teacher, tmp_path: Path) -> None:
    """It was written when there was one scheme, without ``samples`` and ``seed``."""
    teacher.store(tmp_path)
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_text())
        del record["identity"]["samples"], record["identity"]["seed"]
        path.write_text(json.dumps(record))
    assert len(open_targets(str(tmp_path), teacher.identity)) == len(teacher.rows)
    assert teacher.identity.sha256 == "8d1b5bf01f99df454895df9d73f5c81190acd33d0ac75504bdea43874b625819"


@pytest.mark.parametrize("positions", ["text", "all"])
def test_targets_at_every_position(teacher: Teacher, tmp_path: Path, positions: Any) -> None:
    reader = store(teacher, tmp_path, teacher.identity.model_copy(update={"positions": positions, "top_k": 1000}))
    row = teacher.rows[4]
    batch = Encoder(teacher.processor, 64, positions).collate(
        [teacher.encoder.encode(row["id"], row["image"], [(t["question"], t["answer"]) for t in row["turns"]])]
    )
    with torch.no_grad():
        logits = teacher.model(**batch.inputs).logits[0].double()
    chosen = [
        position
        for position, token in enumerate(batch.inputs["input_ids"][0].tolist())
        if positions == "all" or is_text(teacher, batch.inputs["input_ids"][0], position)
    ]
    token_ids, logprobs, _ = reader.lookup([row["id"]])
    expected = (logits[chosen] / 2).log_softmax(-1).gather(-1, token_ids).float()
    torch.testing.assert_close(logprobs, expected, rtol=2.0**-11, atol=5e-4)


def is_text(teacher: Teacher, ids: Tensor, position: int) -> bool:
    image = teacher.processor.image_token_id
    return position + 1 < len(ids) and image not in (ids[position], ids[position + 1])


# ---- the report, and reading


def test_the_gradient_report_against_a_direct_computation(teacher: Teacher, identity: Identity, tmp_path: Path) -> None:
    reader = store(teacher, tmp_path, identity)
    student = Teacher().model
    with torch.no_grad():
        student.lm_head.weight.mul_(0.5)
    place = str(tmp_path)
    report = check_gradients(teacher.model, student, teacher.encoder, teacher.dataset, 3, place, reader, identity)
    assert json.loads((tmp_path / "gradient_error.json").read_text()) == report.model_dump(mode="json")
    assert [(error.scheme, error.top_k, error.samples) for error in report.errors] == [
        ("topk_sampled", K, S),
        ("topk_tail", 32, None),
    ]
    batch = teacher.batch(teacher.rows)
    with torch.no_grad():
        p, q = (
            (model(**batch.inputs).logits[batch.kept].double() / 2).softmax(-1) for model in (teacher.model, student)
        )
    exact = q - p
    token_ids, logprobs, tail = reader.lookup(batch.ids)
    estimate = torch.zeros_like(q).scatter_(1, token_ids, logprobs.exp().double())
    drawn = reader.draws(batch.ids)
    assert drawn is not None
    estimate.scatter_add_(1, drawn, (tail.exp() / S)[:, None].expand(-1, S).double())
    difference = (q - estimate) - exact
    expected = (difference.norm(dim=-1) / exact.norm(dim=-1)).mean().item()
    own, other = report.errors
    assert report.num_positions == len(q)
    assert own.mean == pytest.approx(expected, rel=1e-3)
    assert own.pooled == pytest.approx((difference.norm() / exact.norm()).item(), rel=1e-3)
    assert own.summed == pytest.approx((difference.sum(0).norm() / exact.sum(0).norm()).item(), rel=1e-3)
    assert own.summed < own.pooled, "noise averages out"
    assert other.mean < own.mean


def test_reading_maps_the_file_and_takes_what_is_looked_up(tmp_path: Path, teacher: Teacher) -> None:
    tokens = torch.arange(32).expand(40_000, -1)
    even = torch.full((40_000, 32), 1 / 64).log()
    samples = [SampleTargets(f"{n}", tokens, even, torch.full((40_000,), 0.5).log()) for n in range(10)]
    shard = write_shard(str(tmp_path), 0, 1, samples, teacher.identity)
    path = str(tmp_path / shard.file)
    reader = TargetReader(str(tmp_path), [shard])
    reader.lookup(["3"])
    mapped = sum(part.rss for part in psutil.Process().memory_maps(grouped=False) if part.path == path)
    # A tenth of it is looked up. Measured: 12.6 of 52 MB, as neighbouring pages come along.
    assert 0 < mapped < 0.4 * shard.num_bytes
