"""Pictures of a decomposition: polygons, recovery heat map, loss curves.

Every function returns a `matplotlib.figure.Figure` made through the object API: no pyplot, no global state, nothing to
close but what `save` closes. matplotlib is imported inside the functions. Features and components are numbered from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastapd.metrics import feature_recovery, projection_share

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 140
# Okabe and Ito's colours, told apart under every common colour blindness; a brown for their yellow, illegible on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31")
_GREY, _PALE, _INK = "#8a8a8a", "#d9d9d9", "#222222"
_WIDTH = 11.0  # inches: at 140 dpi the width of a report on a large screen
_MAX_COLUMNS = 8
_PER_INSTANCE = "_per_instance"
_LOWEST, _HIGHEST = 1e-300, 1e300  # beyond these matplotlib's powers of ten overflow


def save(fig: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG of 140 dpi and free it.

    Args:
        fig: the figure; it is empty afterwards.
        path: where to; folders are created.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # without the name of the matplotlib version the same picture is the same file
    fig.savefig(path, dpi=DPI, format="png", facecolor="white", metadata={"Software": None})
    fig.clear()
    return path


def polygons(
    weight: Float[Tensor, "I F 2"],
    parts: Float[Tensor, "I C F 2"],
    instances: Sequence[int],
    labels: Sequence[str],
    assignment: Int[Tensor, "I F"],
) -> Figure:
    """Draw 2-D features as spokes: the target, the sum of the components, then each component alone.

    A component has the colour of the feature it is assigned to (grey: none) and stands before the target's spokes,
    drawn faintly. All panels share one scale; the circle has radius 1.

    Args:
        weight: target [n_instances, n_features, 2].
        parts: components [n_instances, n_components, n_features, 2].
        instances: which instances to show, one row each (more rows when there are more than 6 components).
        labels: the name of each shown instance.
        assignment: component of each feature, -1 for none, as `feature_recovery` gives it.

    Returns:
        A figure with `len(instances) * (n_components + 2)` axes.

    Raises:
        ValueError: the shapes do not belong together, or there is nothing to show.
    """
    from matplotlib.figure import Figure

    if weight.ndim != 3 or weight.shape[-1] != 2:
        raise ValueError(f"polygons: weight must have shape [n_instances, n_features, 2], got {list(weight.shape)}")
    if parts.ndim != 4 or (parts.shape[0], *parts.shape[2:]) != weight.shape:
        raise ValueError(
            f"polygons: parts must have shape [{weight.shape[0]}, n_components, {weight.shape[1]}, 2], "
            f"got {list(parts.shape)}"
        )
    if not instances or len(instances) != len(labels):
        raise ValueError(f"polygons: labels must name each of {len(instances)} instances, got {len(labels)} labels")
    if assignment.shape != weight.shape[:2]:
        raise ValueError(f"polygons: assignment must have shape {list(weight.shape[:2])}, got {list(assignment.shape)}")

    chosen = list(instances)
    W, P = _array(weight)[chosen], _array(parts)[chosen]  # [R, F, 2], [R, C, F, 2]
    owners = assignment.detach().cpu()[chosen].tolist()
    n_components, n_features = P.shape[1:3]
    spokes = torch.cat([_flat(W), _flat(P), _flat(P.sum(1))])
    reach = spokes[spokes.isfinite().all(-1)].norm(dim=-1)
    limit = 1.18 * max([1.0, *reach.tolist()])

    columns = min(n_components + 2, _MAX_COLUMNS)
    lines = math.ceil((n_components + 2) / columns)
    cell = min(_WIDTH / columns, 2.2)
    fig = Figure(figsize=(cell * columns, (cell + 0.42) * lines * len(chosen)), layout="constrained")
    for row, label in enumerate(labels):
        owned: dict[int, list[int]] = {}
        for feature, component in enumerate(owners[row]):
            owned.setdefault(component, []).append(feature)
        own_colours = [_colour(feature) for feature in range(n_features)]
        for panel in range(n_components + 2):
            line, column = divmod(panel, columns)
            ax = fig.add_subplot(lines * len(chosen), columns, (row * lines + line) * columns + column + 1)
            _polar_frame(ax, limit)
            if panel == 0:
                _spokes(ax, W[row], own_colours)
                _number_tips(ax, W[row], limit)
                ax.set_title("target", fontsize=9, color=_INK)
                ax.set_ylabel(label, fontsize=9, color=_INK)
                continue
            _spokes(ax, W[row], [_PALE] * n_features, dots=False)
            if panel == 1:
                _spokes(ax, P[row].sum(0), own_colours)
                ax.set_title("sum", fontsize=9, color=_INK)
                continue
            component = panel - 2
            features = owned.get(component, [])
            colour = _colour(features[0]) if features else _GREY
            _spokes(ax, P[row, component], [colour] * n_features)
            ax.set_title(f"component {component}", fontsize=9, color=_INK)
            about = "feature " + ", ".join(map(str, features)) if features else "no feature"
            ax.set_xlabel(about, fontsize=8, color=_INK, labelpad=2)
    return fig


def recovery_heatmap(panels: Mapping[str, tuple[Float[Tensor, "F H"], Float[Tensor, "C F H"]]]) -> Figure:
    """Draw how much of each feature each component carries, one heat map per named decomposition.

    The value is the signed projection share `S[f, c] = <P_cf, W_f> / ‖W_f‖²`; 1 on the diagonal and 0 elsewhere is a
    perfect split. Components stand in the order of the Hungarian assignment, the unassigned ones last.

    Args:
        panels: name -> (target [n_features, d_hidden], components [n_components, n_features, d_hidden]).

    Returns:
        A figure with one axes per panel and one for the colour bar.

    Raises:
        ValueError: there is no panel, or a panel's shapes do not belong together.
    """
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("recovery_heatmap: panels must hold at least one decomposition, got none")
    columns = min(len(panels), 5 if len(panels) == 5 else 4)
    lines = math.ceil(len(panels) / columns)
    cell = _WIDTH / max(columns, 3)
    fig = Figure(figsize=(cell * columns + 0.8, (cell + 0.35) * lines), layout="constrained")
    axes, image, beyond = [], None, False
    for index, (name, (weight, parts)) in enumerate(panels.items()):
        share = projection_share(weight[None], parts[None])[0].detach().cpu()  # [F, C]
        assigned = [c for c in feature_recovery(weight[None], parts[None]).assignment[0].tolist() if c >= 0]
        order = assigned + [c for c in range(share.shape[1]) if c not in assigned]
        share = share[:, order]
        beyond |= bool((share.abs() > 1.005).any())
        n_features, n_components = share.shape
        ax = fig.add_subplot(lines, columns, index + 1)
        image = ax.imshow(share.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        ax.set_title(name, fontsize=10, color=_INK)
        if max(n_features, n_components) <= 8:
            for f in range(n_features):
                for c in range(n_components):
                    value = float(share[f, c])
                    colour = "white" if abs(value) > 0.6 else _INK
                    ax.text(c, f, _short(value), ha="center", va="center", fontsize=7.5, color=colour)
        if n_components <= 12:
            ax.set_xticks(range(n_components), [str(c) for c in order])
            ax.set_xlabel("component", fontsize=8.5)
        else:
            ax.set_xticks([])
            ax.set_xlabel(f"{n_components} components, assigned first", fontsize=8.5)
        if n_features <= 12:
            ax.set_yticks(range(n_features))
        if index % columns == 0:
            ax.set_ylabel("feature", fontsize=8.5)
        ax.tick_params(labelsize=8, length=0)
        for spine in ax.spines.values():
            spine.set_color(_PALE)
        axes.append(ax)
    assert image is not None, "panels is not empty"
    bar = fig.colorbar(
        image, ax=axes, fraction=0.03, pad=0.015, ticks=[-1, -0.5, 0, 0.5, 1], extend="both" if beyond else "neither"
    )
    bar.set_label("share of the feature carried", fontsize=8.5)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_edgecolor(_PALE)
    return fig


def loss_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw every loss term over the steps on a logarithmic axis: instances thin, their mean thick.

    A term is a key that also occurs with the suffix `_per_instance`. Values that cannot stand on the axis are dropped:
    missing, not finite, not positive, or outside 1e-300 to 1e300.

    Args:
        rows: the lines of a run's `metrics.jsonl`, each with `step`.

    Returns:
        A figure with one axes per term.

    Raises:
        ValueError: no row holds a term.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = dict.fromkeys(key for row in rows for key in row)
    terms = [name for name in names if name + _PER_INSTANCE in names]
    if not terms:
        raise ValueError(f"loss_curves: rows must hold a term and its {_PER_INSTANCE} values, got keys {list(names)}")
    columns = min(len(terms), 4)
    lines = math.ceil(len(terms) / columns)
    cell = _WIDTH / max(columns, 3)
    fig = Figure(figsize=(cell * columns, cell * 0.82 * lines + 0.3), layout="constrained")
    thin = {"color": PALETTE[4], "linewidth": 0.6, "alpha": 0.55}
    thick = {"color": PALETTE[0], "linewidth": 1.8, "zorder": 3}
    for index, term in enumerate(terms):
        ax = fig.add_subplot(lines, columns, index + 1)
        ax.set_yscale("log")
        twins = [(row["step"], row.get(term + _PER_INSTANCE) or []) for row in rows]
        drawn = []
        for instance in range(max(len(values) for _, values in twins)):
            points = [(step, values[instance]) for step, values in twins if instance < len(values)]
            drawn += _curve(ax, points, **thin)
        drawn += _curve(ax, [(row["step"], row.get(term)) for row in rows], **thick)
        if drawn:
            # a constant curve leaves autoscaling nothing to scale to
            low, high = min(drawn), max(drawn)
            ax.set_ylim(low / 1.3, high * 1.3)
            ax.locator_params(axis="x", nbins=4)
        else:
            ax.set_yscale("linear")
            ax.set_yticks([])
            ax.set_xticks([])
            ax.text(0.5, 0.5, "no positive values", transform=ax.transAxes, ha="center", color=_GREY, fontsize=9)
        ax.set_title(term.replace("_", " "), fontsize=10, color=_INK)
        ax.set_xlabel("step", fontsize=8.5)
        ax.tick_params(which="both", labelsize=8)
        ax.grid(True, which="major", color=_PALE, linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    keys = [Line2D([], [], **thick, label="mean"), Line2D([], [], **thin, label="one instance")]
    fig.legend(handles=keys, loc="outside lower right", ncols=2, frameon=False, fontsize=8.5)
    return fig


def _array(tensor: Tensor) -> Tensor:
    """On the CPU, in float64, without a graph: matplotlib knows neither devices nor bfloat16."""
    return tensor.detach().cpu().double()


def _flat(vectors: Float[Tensor, "... 2"]) -> Float[Tensor, "n 2"]:
    return vectors.reshape(-1, 2)


def _colour(feature: int) -> str:
    return PALETTE[feature % len(PALETTE)]


def _short(value: float) -> str:
    """Two digits, without a sign on zero."""
    return f"{value:.2f}".replace("-0.00", "0.00")


def _polar_frame(ax: Axes, limit: float) -> None:
    """A square panel with a unit circle and a cross for axes."""
    from matplotlib.patches import Circle

    ax.set_xlim(-limit, limit)
    ax.set_ylim(-limit, limit)
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.add_patch(Circle((0, 0), 1, fill=False, edgecolor=_PALE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0))
    ax.axhline(0, color=_PALE, linewidth=0.5, zorder=0)
    ax.axvline(0, color=_PALE, linewidth=0.5, zorder=0)


def _spokes(ax: Axes, vectors: Float[Tensor, "F 2"], colours: Sequence[str], dots: bool = True) -> None:
    """Lines from the origin, with dots at the tips; a vector that is not finite is not drawn."""
    for (x, y), colour in zip(vectors.tolist(), colours, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            ax.plot([0, x], [0, y], color=colour, linewidth=1.6, solid_capstyle="round", zorder=2 if dots else 1)
            if dots:
                ax.plot([x], [y], "o", color=colour, markersize=4.5, markeredgewidth=0, zorder=3)


def _number_tips(ax: Axes, vectors: Float[Tensor, "F 2"], limit: float) -> None:
    """The feature's number just beyond its tip, so that nothing is told by colour alone."""
    for feature, (x, y) in enumerate(vectors.tolist()):
        length = math.hypot(x, y)
        if math.isfinite(length) and length > 0.05 * limit:
            beyond = min(length + 0.13 * limit, 0.96 * limit) / length
            ax.text(x * beyond, y * beyond, str(feature), fontsize=7, color=_INK, ha="center", va="center", zorder=4)


def _curve(ax: Axes, points: Sequence[tuple[int, Any]], **style: Any) -> list[float]:
    """Draw what a logarithmic axis can show and return it."""
    kept = [(step, value) for step, value in points if value is not None and _LOWEST <= value <= _HIGHEST]
    if not kept:
        return []
    # a lone point has no line to show
    ax.plot(*zip(*kept, strict=True), marker="o" if len(kept) == 1 else None, markersize=3, **style)
    return [value for _, value in kept]
