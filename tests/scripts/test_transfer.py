"""Learning-rate transfer, read off runs whose losses are made up."""

import csv
import math

import pytest

from scripts import transfer
from scripts.report.runs import read_runs
from scripts.transfer import figure, lines, table
from tests.scripts.test_report import fake_run

pytest.importorskip("matplotlib")

LRS = (0.01, 0.02, 0.04, 0.08)
LOSSES = {  # by method and width; None diverged
    ("jordan", 64): (3.09, 3.0, 3.03, 4.6),
    ("jordan", 128): (3.0, 2.9, 2.7, None),
    ("jordan", 512): (2.8, 2.7, 2.6, 2.5),
    ("svd", 64): (None, 3.2, 3.0, 3.3),
    ("svd", 256): (None, 3.0, 3.4, 3.5),
}


def make(root, losses=LOSSES, lrs=LRS, **more):
    """A run for each loss, two heads at width 64 and as wide ones elsewhere."""
    for (method, width), own in losses.items():
        sizes = {"width": width, "heads": width // 32} | more
        model = "model: {" + ", ".join(f"{key}: {value}" for key, value in sizes.items()) + "}\n"
        for lr, loss in zip(lrs, own, strict=False):
            status = "diverged" if loss is None else "completed"
            fake_run(root, f"{method}-{sizes}-{lr}", method, lr, 0, loss, status, more=model)


def found(root, axis="model.width"):
    return lines(read_runs([root]).runs, axis)


def vertex(lr, left, middle, right):
    """Of the parabola through three points a factor of 2 apart, the middle one at lr: of its differences."""
    return lr * 2 ** ((left - right) / (left - 2 * middle + right) / 2)


def test_the_table_against_values_by_hand(tmp_path):
    make(tmp_path)
    assert table(found(tmp_path), "model.width").rows == [
        ("muon jordan", "64", "0.02", "3.0000", f"{vertex(0.02, 3.09, 3.0, 3.03):.3g}", "+0", "+0.0000"),
        ("muon jordan", "128", "0.04", "2.7000", "", "+1", "+0.2000"),
        ("muon jordan", "512", "0.08 (edge of the grid)", "2.5000", "", "+2", "+0.2000"),
        ("muon svd", "64", "0.04", "3.0000", "", "+0", "+0.0000"),  # between cliffs
        ("muon svd", "256", "0.02", "3.0000", "", "-1", "+0.4000"),
    ]


def test_the_interpolated_best_is_that_of_a_parabola_on_any_grid(tmp_path):
    def loss(lr):
        return 3 + 0.1 * math.log(lr / 0.0123) ** 2

    grid = (0.005, 0.01, 0.03)
    make(tmp_path, {("jordan", width): tuple(map(loss, grid)) for width in (64, 128)}, grid)
    assert [line.interpolated for line in found(tmp_path)] == pytest.approx([0.0123] * 2)
    make(tmp_path / "flat", {("svd", width): (3.0, 3.0, 3.0) for width in (64, 128)})
    assert all(line.interpolated in (None, line.best.lr) for line in found(tmp_path / "flat"))


def test_a_size_that_diverged_everywhere_or_where_the_smallest_is_best(tmp_path):
    losses = {("jordan", 64): (None, None), ("jordan", 128): (3.0, 3.5), ("jordan", 256): (None, 2.9)}
    make(tmp_path, losses | {("jordan", 512): ()})
    fake_run(tmp_path, "one", "jordan", 0.02, 0, 2.8, more="model: {width: 512, heads: 16}\n")
    rows = table(found(tmp_path), "model.width").rows
    assert [(row[1], row[2].split()[0], *row[-2:]) for row in rows] == [
        ("64", "diverged", "", ""),
        ("128", "0.01", "+0", "+0.0000"),
        ("256", "0.02", "+1", "diverged"),
        ("512", "0.02", "+1", "not run"),
    ]


def test_seeds_are_averaged(tmp_path):
    make(tmp_path, {("jordan", 64): (3.0, 3.1), ("jordan", 128): (3.0, 3.1)})
    for lr, loss in ((0.01, 3.4), (0.02, 3.1)):
        fake_run(tmp_path, f"more-{lr}", "jordan", lr, 1, loss, more="model: {width: 64, heads: 2}\n")
    small, large = found(tmp_path)
    assert (small.best.lr, small.best.mean) == (0.02, pytest.approx(3.1)) and large.best.lr == 0.01


def test_a_method_is_what_differs_in_more_than_the_size_and_what_follows_from_it(tmp_path):
    """Two axes in one folder, as of a sweep over widths and one over depths: each is found without the other's runs."""
    make(tmp_path, {("jordan", width): (3.0, 3.1) for width in (64, 128)}, layers=4)
    make(tmp_path, {("jordan", 64): (3.1, 3.0)}, layers=8)
    assert [(line.method, line.size) for line in found(tmp_path)] == [("muon jordan", 64), ("muon jordan", 128)]
    depths = found(tmp_path, "model.layers")
    assert [(line.method, line.size, line.best.lr) for line in depths] == [
        ("muon jordan", 4, 0.01),
        ("muon jordan", 8, 0.02),
    ]
    more = "model: {width: 128, heads: 4, layers: 4}\ntrain: {steps: 7}\n"
    fake_run(tmp_path, "longer", "jordan", 0.01, 0, 2.0, more=more)
    assert [line.best.mean for line in found(tmp_path)] == [3.0, 3.0]


def test_the_figure_shows_every_loss_the_best_ringed_and_what_diverged(tmp_path):
    from matplotlib.figure import Figure

    make(tmp_path)
    drawn = Figure()
    figure(found(tmp_path), "model.width")(drawn)
    jordan, svd = drawn.axes
    assert [axes.get_title() for axes in drawn.axes] == ["muon jordan", "muon svd"]
    curves = {
        line.get_label(): list(line.get_ydata()) for line in jordan.lines if line.get_label() in ("64", "128", "512")
    }
    assert curves == {str(w): [v for v in LOSSES["jordan", w] if v is not None] for w in (64, 128, 512)}
    rings = [(line.get_xdata()[0], line.get_ydata()[0]) for line in jordan.lines if line.get_markersize() == 10]
    assert rings == [(0.02, 3.0), (0.04, 2.7), (0.08, 2.5)]
    crosses = [tuple(line.get_xdata()) for line in svd.lines if line.get_marker() == "x"]
    assert crosses == [(0.01,), (0.01,)]
    assert jordan.get_ylim()[1] == pytest.approx(3.0 + transfer.HEADROOM)  # one very bad loss does not flatten the rest
    (legend,) = drawn.legends
    assert [label.get_text() for label in legend.get_texts()] == ["64", "128", "256", "512"]


def test_main_writes_every_run_the_table_and_the_figure(tmp_path, capsys):
    make(tmp_path / "runs")
    assert transfer.main([str(tmp_path / "runs"), "--axis", "model.width", "--out", str(tmp_path / "out")]) == 0
    rows = [tuple(row.values()) for row in csv.DictReader((tmp_path / "out" / "transfer.csv").open())]
    assert rows == [
        (f"muon {method}", str(width), str(lr), "" if loss is None else str(loss), "0")
        for (method, width), own in LOSSES.items()
        for lr, loss in zip(LRS, own, strict=True)
    ]
    assert (tmp_path / "out" / "table.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "out" / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "transfer.svg").read_text()


@pytest.mark.parametrize(
    ("axis", "sentence"),
    [
        ("model.layers", "model.layers does not vary"),
        ("model.widht", "did you mean model.width?"),
        ("optim.matrix.lr", "optim.matrix.lr is no key"),
        ("data.val_tokens", "data.val_tokens must be a number in every run"),
    ],
)
def test_an_axis_that_is_none_is_one_sentence(tmp_path, capsys, axis, sentence):
    make(tmp_path / "runs", layers=4)
    assert transfer.main([str(tmp_path / "runs"), "--axis", axis, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert not (tmp_path / "out").exists()
