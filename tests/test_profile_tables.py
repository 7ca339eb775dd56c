"""What is read off a profile: the stack's gain, the layers' gain, tables, CSV; from results written by hand."""

from __future__ import annotations

import csv
import io

import pytest
from tiny_profile import point, result

from matvlm.artifacts import ProfileResult
from matvlm.profiling import compare, stack_gains
from matvlm.profiling.tables import as_csv, method, tables

GIB = 2**30


def cells(found: ProfileResult, title: str) -> list[list[str]]:
    (table,) = [table for table in tables(found) if table.title == title]
    return table.rows


def test_ratios_pair_the_repeats() -> None:
    """Medians alone would give 1 and 1."""
    teacher = point("teacher", prefill=[1.0, 8.0, 2.0], decode=[4.0, 1.0, 2.0])
    student = point("student", prefill=[0.5, 2.0, 2.0], decode=[8.0, 2.0, 2.0])
    (row,) = compare(result(teacher, student))
    assert (row.prefill_speed, row.decode_speed) == (2.0, 2.0)


def test_the_layers_gain_is_on_one_stack_at_one_place_over_the_first_model() -> None:
    points = [
        point("a", "engine", 64, prefill=[2.0], decode=[10.0], kv=2048 * 1024, peak=4 * GIB, step_bytes=300),
        point("a", "engine", 128, prefill=[8.0], decode=[5.0], step_bytes=900),
        point("a", "hf", 64, prefill=[4.0], decode=[1.0]),
        point("b", "engine", 64, prefill=[4.0], decode=[12.0], kv=1023 * 1024, peak=3 * GIB, step_bytes=200),
        point("b", "engine", 128, prefill=[2.0], decode=[10.0], step_bytes=450),
        point("b", "hf", 64, prefill=[1.0], decode=[3.0]),
    ]
    rows = compare(result(*points))
    assert [(row.label, row.stack, row.place) for row in rows] == [
        ("b", "engine", (64, 4, 1)),
        ("b", "engine", (128, 4, 1)),
        ("b", "hf", (64, 4, 1)),
    ]
    assert [(row.prefill_speed, row.decode_speed) for row in rows] == [(0.5, 1.2), (4.0, 2.0), (4.0, 3.0)]
    assert [row.decode_speed_by_bytes for row in rows] == [1.5, 2.0, 1.0]
    assert (rows[0].peak_bytes, rows[1].peak_bytes) == (0.75, None)
    assert rows[0].cache_bytes == pytest.approx(1024 / 2049)


def test_the_stacks_gain_is_over_the_best_of_transformers() -> None:
    points = [
        point("a", "engine", 64, decode=[400.0], first=[0.1]),
        point("a", "hf", 64, decode=[10.0], first=[0.2]),
        point("a", "hf_static", 64, decode=[200.0], first=[0.3]),
        point("a", "engine", 128, decode=[100.0], first=[0.1]),
        point("a", "hf", 128, decode=[10.0], first=[0.2]),
        point("a", "hf_static", 128, out_of_memory=True),
        point("a", "engine", 256),
        point("a", "hf", 256, out_of_memory=True),
        point("a", "hf_static", 256, out_of_memory=True),
        point("a", "engine", 512, out_of_memory=True),
        point("a", "hf", 512),
        point("a", "hf_static", 512, out_of_memory=True),
    ]
    found = [(gain.prompt, gain.best, gain.decode_speed) for gain in stack_gains(result(*points))]
    assert found == [(64, "hf_static", 2.0), (128, "hf", 10.0), (256, None, None), (512, "hf", None)]
    assert stack_gains(result(*points))[0].first_token_speed == pytest.approx(3.0)
    assert stack_gains(result(points[0])) == stack_gains(result(points[1], points[2])) == []


PROFILE = result(
    point("teacher", prefill=[0.1, 0.3, 0.2], first=[0.4] * 3, decode=[50.0, 1234.5, 60.0], floor=120.0, step_bytes=3),
    point("teacher", "hf", prefill=[0.2] * 3, decode=[30.0] * 3),
    point("student", decode=[90.0] * 3, kv=2**19, step_bytes=2),
    point("student", "hf", out_of_memory=True),
)


def test_tables_show_medians_with_their_spread_and_what_was_out_of_memory() -> None:
    head, *rows = cells(PROFILE, "Speed")
    assert head == ["model", "stack", "prompt", "prefill ms", "first token ms", "tokens/s", "floor", "of the floor"]
    assert rows[0][:3] == ["teacher", "engine", "64"]
    assert rows[0][3:] == ["200 (100 to 300)", "400 (400 to 400)", "60 (50 to 1,234)", "120", "50%"]
    assert rows[3] == ["student", "hf", "64", "OOM", "OOM", "OOM", "1,000", "OOM"]


def test_tables_keep_the_stacks_gain_and_the_layers_apart() -> None:
    head, *rows = cells(PROFILE, "Gains")
    assert head == [
        *("model", "prompt", "stack over", "stack: first token", "stack: tokens/s"),
        *("layers: prefill", "layers: tokens/s", "by bytes", "cache"),
    ]
    assert rows == [
        ["teacher", "64", "hf", "0.50 x", "2.00 x", "", "", "", ""],
        ["student", "64", "OOM", "", "", "2.00 x", "1.50 x", "1.50 x", "0.50 x"],
    ]
    alone = result(*(p for p in PROFILE.points if p.stack == "hf" and p.measured))
    assert cells(alone, "Gains")[0] == ["model", "prompt"]


def test_memory_is_shown_by_what_it_is_for() -> None:
    found = result(point(peak=4 * 2**20), point("student", "hf", out_of_memory=True))
    head, first, second = cells(found, "Memory")
    assert head[3:] == ["weights MiB", "KV MiB", "state MiB", "rest MiB", "peak MiB", "reserved MiB", ""]
    assert first[3:] == ["2", "1", "0.000977", "0.999", "4", "5", ""]
    assert second[3:] == ["", "", "", "", "", "", "OOM"]


def test_what_does_not_vary_is_said_once() -> None:
    how = "batch 1, 4 new tokens, medians (lowest to highest) of 3 interleaved repeats, floor at 40.0 GB/s; gains on "
    assert method(PROFILE).startswith(f"{how}engine: ")
    varied = result(point(), point(new_tokens=2048, batch_size=8, setup=30.5))
    assert method(varied).startswith("medians")
    head, first, second = cells(varied, "Speed")
    assert head[2:5] == ["prompt", "new", "batch"]
    assert (first[2:5], second[2:5]) == (["64", "4", "1"], ["64", "2,048", "8"])
    assert head[-2:] == ["total s", "set-up s"]
    assert second[-1] == "30.5"


def test_csv_has_every_figure_of_every_point() -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(PROFILE))))
    assert [(line["label"], line["stack"], line["out_of_memory"]) for line in lines] == [
        ("teacher", "engine", "0"),
        ("teacher", "hf", "0"),
        ("student", "engine", "0"),
        ("student", "hf", "1"),
    ]
    first, last = lines[0], lines[-1]
    spread = ("decode_tokens_per_second", "decode_tokens_per_second_low", "decode_tokens_per_second_high")
    assert [float(first[name]) for name in spread] == [60.0, 50.0, 1234.5]
    assert float(first["share_of_floor"]) == 0.5
    assert [int(first[f"{name}_bytes"]) for name in ("weights", "kv", "state")] == [2**21, 2**20, 2**10]
    assert {last[name] for name in spread} == {""} == {last["kv_bytes"], first["peak_allocated_bytes"]}
    assert len({len(line) for line in lines}) == 1
