"""Figures have the right panels, draw what they claim, and never warn."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from fastapd import metrics, plots

pytestmark = pytest.mark.filterwarnings("error")
PNG = b"\x89PNG\r\n\x1a\n"


def toy(n_instances: int = 3, n_components: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """The pentagon, feature f in component (f + 1) % 5, and components that carry nothing."""
    angle = torch.arange(5) * 2 * math.pi / 5
    weight = torch.stack([angle.cos(), angle.sin()], -1).repeat(n_instances, 1, 1)
    parts = weight.new_zeros(n_instances, n_components, 5, 2)
    for feature in range(5):
        parts[:, (feature + 1) % 5, feature] = weight[:, feature]
    return weight, parts


def written(fig, path) -> bytes:
    assert plots.save(fig, path) == path
    assert fig.axes == []
    data = path.read_bytes()
    assert data.startswith(PNG)
    return data


@pytest.mark.parametrize("n_components", [5, 9])
def test_polygons_draw_target_sum_and_each_component(tmp_path, n_components):
    weight, parts = toy(n_components=n_components)
    assignment = metrics.feature_recovery(weight, parts).assignment
    fig = plots.polygons(weight, parts, [2, 0], ["best", "worst"], assignment)
    names = ["target", "sum", *(f"component {c}" for c in range(n_components))]
    assert [ax.get_title() for ax in fig.axes] == names * 2
    assert [ax.get_ylabel() for ax in fig.axes if ax.get_ylabel()] == ["best", "worst"]
    assert len({ax.get_xlim() + ax.get_ylim() for ax in fig.axes}) == 1
    # component 1 carries feature 0 and has its colour; those past the fifth carry nothing and are grey
    panel = fig.axes[3]
    assert panel.get_xlabel() == "feature 0"
    dots = [line for line in panel.get_lines() if line.get_marker() == "o"]
    assert {line.get_color() for line in dots} == {plots.PALETTE[0]}
    assert max(abs(line.get_xdata()[0]) for line in dots) == pytest.approx(1)
    if n_components > 5:
        assert fig.axes[7].get_xlabel() == "no feature"
    assert written(fig, tmp_path / "new" / "polygons.png")


def test_polygons_survive_a_diverged_instance(tmp_path):
    weight, parts = toy()
    parts[1, 2] = math.nan
    assignment = metrics.feature_recovery(weight, parts).assignment
    fig = plots.polygons(weight.bfloat16(), parts.bfloat16(), [1], ["worst"], assignment)
    assert all(math.isfinite(limit) for ax in fig.axes for limit in ax.get_xlim())
    assert written(fig, tmp_path / "polygons.png")


def test_polygons_refuse_what_is_not_flat():
    weight, parts = toy()
    assignment = torch.zeros(3, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"polygons: weight must have shape \[n_instances, n_features, 2\]"):
        plots.polygons(torch.zeros(3, 5, 4), parts, [0], ["a"], assignment)
    with pytest.raises(ValueError, match="polygons: parts must have shape"):
        plots.polygons(weight, parts[0], [0], ["a"], assignment)
    with pytest.raises(ValueError, match="polygons: labels must name each of 1 instances, got 2"):
        plots.polygons(weight, parts, [0], ["a", "b"], assignment)
    with pytest.raises(ValueError, match="polygons: assignment must have shape"):
        plots.polygons(weight, parts, [0], ["a"], assignment[0])


def test_recovery_heatmap_stands_in_hungarian_order(tmp_path):
    weight, parts = toy(1)
    panels = {
        "fastapd": (weight[0], parts[0]),
        "SVD": (weight[0], metrics.svd_parts(weight, 5)[0]),
        "W/C": (weight[0], metrics.copies_parts(weight, 5)[0]),
    }
    fig = plots.recovery_heatmap(panels)
    assert len(fig.axes) == 4  # three panels and one colour bar
    assert [ax.get_title() for ax in fig.axes[:3]] == list(panels)
    images = [ax.get_images()[0] for ax in fig.axes[:3]]
    assert [image.get_clim() for image in images] == [(-1, 1)] * 3
    assert torch.as_tensor(images[0].get_array()) == pytest.approx(torch.eye(5).double(), abs=1e-6)
    assert torch.as_tensor(images[2].get_array()) == pytest.approx(torch.full((5, 5), 0.2).double(), abs=1e-6)
    assert [tick.get_text() for tick in fig.axes[0].get_xticklabels()] == ["1", "2", "3", "4", "0"]
    assert written(fig, tmp_path / "heatmap.png")


@pytest.mark.parametrize(("n_features", "n_components"), [(5, 3), (40, 50), (1, 1)])
def test_recovery_heatmap_takes_any_size(tmp_path, n_features, n_components):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_features, 10, generator=generator)
    parts = torch.randn(n_components, n_features, 10, generator=generator)
    fig = plots.recovery_heatmap({str(i): (weight, parts) for i in range(5)})
    assert len(fig.axes) == 6
    assert {ax.get_images()[0].get_array().shape for ax in fig.axes[:5]} == {(n_features, n_components)}
    assert written(fig, tmp_path / "heatmap.png")


def test_recovery_heatmap_refuses_nothing():
    with pytest.raises(ValueError, match="recovery_heatmap: panels must hold at least one"):
        plots.recovery_heatmap({})


def test_loss_curves_draw_the_terms_that_have_instances(tmp_path):
    rows = [
        {"step": s, "lr": 0.1, "seconds": s, "a": 1 / (s + 1), "a_per_instance": [1 / (s + 1)] * 3, "b": 2.0,
         "b_per_instance": [2.0, 2.0, 2.0]}
        for s in range(5)
    ]  # fmt: skip
    fig = plots.loss_curves(rows)
    assert [ax.get_title() for ax in fig.axes] == ["a", "b"]
    assert all(len(ax.get_lines()) == 4 for ax in fig.axes)  # three instances and the mean
    assert all(ax.get_yscale() == "log" for ax in fig.axes)
    widths = [line.get_linewidth() for line in fig.axes[0].get_lines()]
    assert widths[3] > 2 * max(widths[:3])
    low, high = fig.axes[1].get_ylim()
    assert low < 2 < high
    assert written(fig, tmp_path / "loss.png")


def test_loss_curves_drop_what_a_log_axis_cannot_show(tmp_path):
    values = [1.0, 0.0, -1.0, math.nan, math.inf, None, 0.5]
    rows = [{"step": s, "a": v, "a_per_instance": [v, 0.0]} for s, v in enumerate(values)]
    rows += [{"step": 7}, {"step": 8, "a": 0.25, "a_per_instance": None}]
    rows += [{"step": 9, "zero": 0.0, "zero_per_instance": [0.0]}, {"step": 10, "one": 1.0, "one_per_instance": []}]
    fig = plots.loss_curves(rows)
    assert len(fig.axes) == 3
    first, mean = fig.axes[0].get_lines()  # the second instance has nothing to show
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([0, 6], [1.0, 0.5])
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([0, 6, 8], [1.0, 0.5, 0.25])
    assert [text.get_text() for text in fig.axes[1].texts] == ["no positive values"]
    assert written(fig, tmp_path / "loss.png")


@pytest.mark.parametrize("value", [1e-300, 1e300, 5e-324, 1.7e308])
def test_loss_curves_scale_to_extreme_constants(tmp_path, value):
    fig = plots.loss_curves([{"step": s, "a": value, "a_per_instance": [value]} for s in range(3)])
    assert len(fig.axes[0].get_lines()) == (2 if 1e-300 <= value <= 1e300 else 0)
    assert written(fig, tmp_path / "loss.png")


def test_loss_curves_refuse_rows_without_terms():
    for rows in ([], [{"step": 0, "lr": 1.0}]):
        with pytest.raises(ValueError, match="loss_curves: rows must hold a term"):
            plots.loss_curves(rows)


def test_save_writes_the_same_bytes_twice(tmp_path):
    weight, parts = toy(1)
    one, two = (
        written(plots.recovery_heatmap({"a": (weight[0], parts[0])}), tmp_path / name) for name in ("1.png", "2.png")
    )
    assert one == two
    assert int.from_bytes(one[16:20], "big") > 400  # width in pixels


def test_plots_import_no_matplotlib_and_use_no_pyplot():
    code = (
        "import sys, torch\n"
        "from fastapd import metrics, plots, report\n"
        "heavy = {'matplotlib', 'scipy', 'jinja2'}\n"
        "before = heavy & set(sys.modules) - set(loaded)\n"
        "assert not before, before\n"
        "plots.loss_curves([{'step': 0, 'a': 1.0, 'a_per_instance': [1.0]}])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    # torch itself may load jinja2; only what comes on top of it counts
    code = "import sys, torch\nloaded = list(sys.modules)\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
