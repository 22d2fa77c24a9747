"""Points and densities: in the plane, on a line, and on their way from noise to data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

from dgm_course.viz import inputs, style
from dgm_course.viz.tiles import spread

__all__ = ["around", "density", "film_points", "overlay", "scatter", "trajectories"]

_DOTS = {"s": 10, "alpha": 0.6, "linewidths": 0}


def density(
    log_prob: Callable[[Tensor], Tensor],
    *,
    extent: Sequence[float] = (-4, 4, -4, 4),
    resolution: int = 160,
    ax: Axes | None = None,
    title: str | None = None,
) -> style.Figure:
    """Draw a density in the plane, darker where it is higher; its logarithm need not be normalised.

    Arguments:
        log_prob: Maps points (N, 2) to log-densities (N,).
        extent: Left, right, bottom and top of the plane shown.
        resolution: Points on each side at which the density is asked.
        ax: Where to draw.
        title: Above it.

    Raises:
        ValueError: If the extent is empty, or log_prob returns another shape than (N,), NaN or infinity.

    Example:
        >>> density(lambda x: -(x**2).sum(1) / 2)
        <Figure size 420x400 with 1 Axes>
    """
    left, right, bottom, top = _extent(extent)
    x, y = torch.linspace(left, right, resolution), torch.linspace(bottom, top, resolution)
    plane = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
    height = inputs.array("log_prob(points)", log_prob(plane))
    if height.shape != (len(plane),) or not np.isfinite(height.max()):
        raise ValueError(
            f"log_prob must map ({len(plane)}, 2) to ({len(plane)},), finite, but gave {height.shape}, {height.max()}"
        )
    ax = ax or style.axes(4.2, 4.0, title or "density in the plane")
    shown = np.exp(height - height.max()).reshape(resolution, resolution)
    ax.imshow(shown, extent=extent, origin="lower", cmap=style.DENSITY, interpolation="bilinear", zorder=0)
    ax.grid(False)
    return _plane(ax, extent, title)


def scatter(
    points: Tensor,
    *,
    labels: Sequence | Tensor | None = None,
    color: str = style.DATA,
    extent: Sequence[float] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> style.Figure:
    """Draw points in the plane.

    Arguments:
        points: Shape (N, 2).
        labels: A class for each point (N,); each class gets a colour and an entry in the legend.
        color: Of all points, if there are no classes: ``style.DATA``, ``style.MODEL``, ``style.NOISE``, …
        extent: Left, right, bottom, top; by default all points are seen.
        ax: Where to draw; on a density, the points lie on it.
        title: Above it.
    """
    rows, names = inputs.points("points", points), inputs.labels("labels", labels, len(points))
    fixed = extent and _extent(extent)
    ax = ax or style.axes(5.0 if names else 4.2, 4.0, title or f"{len(rows)} points in the plane")
    if names is None:
        ax.scatter(*rows.T, color=color, **_DOTS)
    else:
        for name in dict.fromkeys(sorted(names, key=lambda name: (len(name), name))):
            ax.scatter(*rows[np.array(names) == name].T, label=name, **_DOTS)
        _legend(ax)
    return _plane(ax, fixed, title)


def overlay(
    a: Tensor,
    b: Tensor,
    labels: Sequence[str] = ("data", "model"),
    *,
    colors: Sequence[str] = (style.DATA, style.MODEL),
    extent: Sequence[float] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> style.Figure:
    """Lay two sets of samples on each other, to see whether they have the same distribution.

    Arguments:
        a, b: Points (N, 2), drawn as clouds; or numbers (N,) or (N, 1), drawn as histograms. N may differ.
        labels: What a and b are.
        colors: Of a and b.
        extent: Left, right (and bottom, top for clouds); by default all is seen.
        ax: Where to draw.
        title: Above it.
    """
    one, two = inputs.points("a", a, (1, 2)), inputs.points("b", b, (1, 2))
    names = inputs.labels("labels", labels, 2)
    if one.shape[1] != two.shape[1]:
        raise ValueError(f"a and b must have the same dimension, not {one.shape} and {two.shape}")
    flat = one.shape[1] == 1
    fixed = extent and _extent(extent, 2 if flat else 4)
    ax = ax or style.axes(*((5.6, 3.3) if flat else (5.4, 4.0)), title or f"{names[0]} and {names[1]} on each other")
    if not flat:
        for rows, name, color in zip((one, two), names, colors, strict=True):
            ax.scatter(*rows.T, color=color, label=name, **_DOTS | {"alpha": 0.45})
        _legend(ax)
        return _plane(ax, fixed, title)
    low, high = fixed or (min(one.min(), two.min()), max(one.max(), two.max()))
    bins = np.linspace(low, high if high > low else low + 1, 61)
    for rows, name, color in zip((one, two), names, colors, strict=True):
        ax.hist(rows[:, 0], bins, density=True, histtype="stepfilled", fc=(color, 0.25), ec=color, lw=1.6, label=name)
    ax.legend()
    return style.words(ax, "x", "density", title)


def film_points(
    states: Iterable[Tensor],
    *,
    times: Sequence | None = None,
    labels: Sequence | Tensor | None = None,
    color: str = style.DATA,
    columns: int = 5,
    extent: Sequence[float] | None = None,
    title: str | None = None,
) -> style.Figure:
    """Draw a cloud of points at successive times, a panel for each, all on the same axes.

    Arguments:
        states: Points (N, 2) at successive times, as a sampler yields them.
        times: One for each state: a number, or a text that is written as it is.
        labels: A class for each point (N,), for its colour.
        color: Of all points, if there are no classes.
        columns: At most so many states, evenly spread, with the first and the last.
        extent: Left, right, bottom, top; by default all points of all panels are seen.
        title: Above all.
    """
    states = list(states)
    if not states:
        raise ValueError("states must hold at least one set of points, not none")
    chosen = spread(len(states), columns)
    above = inputs.labels("times", times, len(states))
    clouds = [inputs.points(f"states[{i}]", states[i]) for i in chosen]
    names = None if labels is None else np.array(inputs.labels("labels", labels, len(clouds[0])))
    everything = np.concatenate(clouds)
    fixed = _extent(extent) if extent else around(everything.min(0), everything.max(0))
    made, axes = style.panels(len(chosen), width=0.5 + 1.55 * len(chosen), height=2.3 + 0.25 * bool(title), share=True)
    made.alt = title or f"{len(chosen)} panels of points at successive times"
    for ax, cloud, i in zip(axes, clouds, chosen, strict=True):
        groups = [cloud] if names is None else [cloud[names == name] for name in dict.fromkeys(sorted(names))]
        for group in groups:
            ax.scatter(*group.T, color=color if names is None else None, **_DOTS | {"s": 4})
        number = above and not isinstance(times[i], str)
        _plane(ax, fixed, above and (f"t = {above[i]}" if number else above[i]))
        ax.locator_params(nbins=4, steps=[1, 2, 4, 5, 10])
        ax.label_outer()
    made.suptitle(title) if title else None
    return made


def trajectories(
    states: Iterable[Tensor],
    *,
    times: Sequence[float] | None = None,
    paths: int = 60,
    color: str = style.MODEL,
    extent: Sequence[float] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> style.Figure:
    """Draw the ways that points take: from an open marker, where they start, to a filled one, where they end.

    Arguments:
        states: Points at successive times: (N, 2), drawn in the plane; or (N,) or (N, 1), drawn over the time.
        times: The time of each state, for points on a line; by default they are counted.
        paths: At most so many points, the first of them.
        color: Of the lines.
        extent: Left, right, bottom, top; by default all is seen.
        ax: Where to draw; on a density, the lines lie on it.
        title: Above it.
    """
    states = list(states)
    if len(states) < 2:
        raise ValueError(f"states must hold at least two sets of points, not {len(states)}")
    walks = [inputs.points(f"states[{i}]", state, (1, 2))[:paths] for i, state in enumerate(states)]
    if len({walk.shape for walk in walks}) > 1:
        raise ValueError(f"states must all have the same shape, not {sorted({walk.shape for walk in walks})}")
    way = np.stack(walks, axis=1)  # (N, steps, D)
    flat = way.shape[2] == 1
    if flat:
        inputs.labels("times", times, len(states))
        clock = inputs.array("times", range(len(states)) if times is None else times)
        way = np.concatenate([np.broadcast_to(clock[:, None], way.shape), way], axis=2)
    fixed = extent and _extent(extent)
    ax = ax or style.axes(*((5.6, 3.4) if flat else (4.2, 4.0)), title or f"the ways of {len(way)} points")
    ax.add_collection(LineCollection(way, colors=color, linewidths=1.0, alpha=0.55))
    ax.scatter(*way[:, 0].T, s=22, facecolors="white", edgecolors="#555555", linewidths=1.0, zorder=3, label="start")
    ax.scatter(*way[:, -1].T, s=22, color=color, linewidths=0, zorder=4, label="end")
    if not flat:
        return _plane(ax, fixed, title)
    ax.autoscale_view()
    return style.words(ax, "step" if times is None else "t", "x", title)


def _legend(ax: Axes) -> None:
    """A legend beside the points, not on them, with markers large enough to tell their colours."""
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), markerscale=2.5, handletextpad=0.1, borderaxespad=0)


def _extent(extent: Sequence[float], count: int = 4) -> tuple[float, ...]:
    sides = tuple(float(side) for side in extent)
    if len(sides) != count or not all(low < high for low, high in zip(sides[::2], sides[1::2], strict=True)):
        asked = "(left, right, bottom, top)" if count == 4 else "(left, right)"
        raise ValueError(f"extent must be {asked}, each pair ascending, not {tuple(extent)}")
    return sides


def around(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """A square around all points with a little room: left, right, bottom, top."""
    middle, half = (low + high) / 2, max((high - low).max() * 0.53, 1e-6)
    return np.stack([middle - half, middle + half], axis=1).ravel()


def _plane(ax: Axes, extent: Sequence[float] | None, title: str | None) -> style.Figure:
    """Axes of a plane: both coordinates named, and a unit as long in both."""
    if extent is None and not ax.images:  # on a density, its limits stay
        extent = around(*ax.dataLim.get_points())
    if extent is not None:
        ax.set(xlim=extent[:2], ylim=extent[2:])
    ax.set_aspect("equal")
    return style.words(ax, "first coordinate", "second coordinate", title)
