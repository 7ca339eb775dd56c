"""Plots, judged by their pixels: every series is there in its colour, and longer bars mean larger values."""

import numpy as np
import pytest
from PIL import Image
from tiny_profile import point, result

from matvlm import plots


def pixels_of(path, colour):
    """bool [height, width]: where the picture has exactly ``colour`` (#RRGGBB)."""
    wanted = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    with Image.open(path) as image:
        assert image.format == "PNG"
        return (np.asarray(image.convert("RGB")) == wanted).all(-1)


def series_in(path):
    """The numbers of the palette's colours that the picture shows."""
    return [number for number, colour in enumerate(plots.COLOURS) if pixels_of(path, colour).sum() > 20]


def test_loss_curves_show_each_loss_and_follow_its_values(tmp_path):
    history = [{"update": n, "loss": 2.0 / n, "loss_prob": 1.5 / n, "lr": 1e-3 / n} for n in range(1, 30)]
    plots.loss_curves(history, tmp_path / "loss.png")
    assert series_in(tmp_path / "loss.png") == [0, 1]
    curve = pixels_of(tmp_path / "loss.png", plots.COLOURS[0])
    curve[:, curve.shape[1] * 2 // 3 :] = False  # the legend is at the right
    heights = [np.nonzero(column)[0].mean() for column in curve.T if column.any()]
    assert heights[-1] > heights[0] + 100  # a falling loss goes down the picture
    assert (np.diff(heights) > -2).all()


def test_loss_curves_take_losses_that_are_zero_or_missing_at_times(tmp_path):
    plots.loss_curves([{"update": 1, "loss": 1.0}, {"update": 2, "loss": 0.0, "loss_ce": 1.0}], tmp_path / "loss.png")
    assert 0 in series_in(tmp_path / "loss.png")


def test_speed_memory_has_every_model_in_each_panel(tmp_path):
    points = [
        point(label, prompt=prompt, kv=prompt * size, decode=[1e8 / (prompt * size)], first=[prompt * size * 1e-7])
        for label, size in (("teacher", 4096), ("student", 3072), ("random", 2048))
        for prompt in (256, 1024, 2048)
    ]
    plots.speed_memory(result(*points), tmp_path / "deep" / "profile.png")
    for colour in plots.COLOURS[:3]:
        panels = np.array_split(pixels_of(tmp_path / "deep" / "profile.png", colour), 3, axis=1)
        assert all(panel.sum() > 20 for panel in panels)
    assert 3 not in series_in(tmp_path / "deep" / "profile.png")


def test_what_was_out_of_memory_is_written_where_it_would_be(tmp_path):
    colour = plots.COLOURS[1]

    def draw(missing):
        points = [point(prompt=prompt) for prompt in (256, 1024)]
        for prompt in (256, 1024):  # the student's line is high up, over the teacher's
            points.append(point("student", prompt=prompt, decode=[900.0], out_of_memory=prompt in missing))
        plots.speed_memory(result(*points), tmp_path / "profile.png")
        first = np.array_split(pixels_of(tmp_path / "profile.png", colour), 3, axis=1)[0]
        return np.array_split(first[len(first) * 3 // 4 :], 2, axis=1)  # the lower quarter, left and right

    nothing, left, right = draw([]), draw([256]), draw([1024])
    assert [half.sum() for half in nothing] == [0, 0]
    assert left[0].sum() > 5 > left[1].sum()
    assert right[1].sum() > 5 > right[0].sum()
    draw([256, 1024])


def test_a_line_is_of_all_points_that_differ_in_length_only():
    both = result(*(point(label, stack, n) for label in "ab" for stack in ("engine", "hf") for n in (128, 64)))
    lines = plots.series(both)
    assert list(lines) == ["a, engine", "a, hf", "b, engine", "b, hf"]
    assert [p.prompt for p in lines["b, hf"]] == [64, 128]
    answers = result(*(point(new_tokens=n, batch_size=batch) for n in (16, 8) for batch in (1, 4)))
    assert list(plots.series(answers)) == ["teacher, engine, batch 1", "teacher, engine, batch 4"]
    assert [plots.length(answers, p) for p in answers.points] == [16, 16, 8, 8]
    all_vary = result(*(point(prompt=prompt, new_tokens=new) for prompt in (64, 128) for new in (8, 16)))
    assert list(plots.series(all_vary)) == ["teacher, engine, 8 new", "teacher, engine, 16 new"]


def test_memory_is_the_peak_where_it_is_known():
    title, unit, value = plots.profile_panels(result(point(kv=2**20 - 2**10)))[1]
    assert (title, unit, value(point(kv=2**20 - 2**10).measured)) == ("Cache (KV and recurrent state)", "MiB", 1.0)
    title, unit, value = plots.profile_panels(result(point(peak=3 * 2**30)))[1]
    assert (title, unit, value(point(peak=3 * 2**30).measured)) == ("Peak memory", "GiB", 3.0)


def test_accuracy_bars_are_as_long_as_the_accuracies(tmp_path):
    shares = [0.9, 0.45, 0.3]
    rows = [{"label": f"model {share}", "accuracy": share} for share in shares]
    plots.accuracy_bars(rows, tmp_path / "bars.png")
    widths = [pixels_of(tmp_path / "bars.png", colour).any(0).sum() for colour in plots.COLOURS[:3]]
    for width, share in zip(widths, shares, strict=True):
        assert width / widths[0] == pytest.approx(share / shares[0], abs=0.01)


def test_interval_is_the_binomials():
    assert plots._half_interval(0.5, 10_000) == pytest.approx(0.98)  # 1.96 * sqrt(0.25 / 10000) = 0.98 %
    assert plots._half_interval(0.5, None) == 0.0


def test_nothing_to_draw_is_said(tmp_path):
    path = tmp_path / "empty.png"
    with pytest.raises(ValueError, match="history has no loss"):
        plots.loss_curves([{"update": 1, "lr": 0.1}], path)
    with pytest.raises(ValueError, match="no point"):
        plots.speed_memory(result(), path)
    with pytest.raises(ValueError, match="no accuracy"):
        plots.accuracy_bars([], path)
    assert not path.exists()


def test_pictures_leave_matplotlibs_settings_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.accuracy_bars([{"label": "teacher", "accuracy": 0.5, "num_questions": 100}], tmp_path / "bars.png")
    assert dict(matplotlib.rcParams) == before
