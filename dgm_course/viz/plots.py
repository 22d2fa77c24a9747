"""Every figure of the course. Importing this module sets the one style; each function returns the figure it drew.

A notebook shows each figure once, with or without a semicolon at the end of the cell. Where a function takes ``ax``, it draws
there and opens no figure of its own (``panels`` makes several). Points are tensors (N, 2); images (B, 1, H, W) in [−1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib.axes
import numpy as np
import torch
from matplotlib.collections import LineCollection
from torch import Tensor

from dgm_course.viz import inputs, style
from dgm_course.viz.animation import animate, apng
from dgm_course.viz.style import panels
from dgm_course.viz.tiles import film, grid, rows, spread

__all__ = ["animate", "apng", "curves", "density", "film", "film_points", "grid", "overlay", "panels", "rows", "scatter",
           "trajectories"]  # fmt: skip

style.use()

Axes = matplotlib.axes.Axes
_DOTS = {"s": 10, "alpha": 0.6, "linewidths": 0}


def density(log_prob: Callable[[Tensor], Tensor], *, extent: Sequence[float] = (-4, 4, -4, 4), resolution: int = 160,
            ax: Axes | None = None, title: str | None = None) -> style.Figure:  # fmt: skip
    """Draw a density in the plane, darker where it is higher; its logarithm need not be normalised.

    Arguments:
        log_prob: Maps points (N, 2) to log-densities (N,).
        extent: Left, right, bottom and top of the plane shown.
        resolution: Points on each side at which the density is asked.
        ax: Where to draw.
        title: Above it.

    Raises:
        ValueError: If the extent is empty, or log_prob returns another shape than (N,), or NaN.

    Example:
        >>> density(lambda x: -(x**2).sum(1) / 2)
        <Figure size 420x400 with 1 Axes>
    """
    left, right, bottom, top = _extent(extent)
    x, y = torch.linspace(left, right, resolution), torch.linspace(bottom, top, resolution)
    plane = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
    height = inputs.array("log_prob(points)", log_prob(plane))
    if height.shape != (len(plane),) or np.isnan(height).any():
        raise ValueError(f"log_prob must map ({len(plane)}, 2) to ({len(plane)},) without NaN, but gave {height.shape}")
    ax = ax or _axes(4.2, 4.0, title or "density in the plane")
    shown = np.exp(height - height.max()).reshape(resolution, resolution)
    ax.imshow(shown, extent=extent, origin="lower", cmap=style.DENSITY, interpolation="bilinear", zorder=0)
    ax.grid(False)
    return _plane(ax, extent, title)


def scatter(points: Tensor, *, labels: Sequence | Tensor | None = None, color: str = style.DATA,
            extent: Sequence[float] | None = None, ax: Axes | None = None, title: str | None = None) -> style.Figure:  # fmt: skip
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
    ax = ax or _axes(5.2 if names else 4.2, 4.0, title or f"{len(rows)} points in the plane")
    if names is None:
        ax.scatter(*rows.T, color=color, **_DOTS)
    else:
        for name in dict.fromkeys(sorted(names, key=lambda name: (len(name), name))):
            ax.scatter(*rows[np.array(names) == name].T, label=name, **_DOTS)
        _legend(ax)
    return _plane(ax, fixed, title)


def overlay(a: Tensor, b: Tensor, labels: Sequence[str] = ("data", "model"), *,
            colors: Sequence[str] = (style.DATA, style.MODEL), extent: Sequence[float] | None = None,
            ax: Axes | None = None, title: str | None = None) -> style.Figure:  # fmt: skip
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
    ax = ax or _axes(*((5.6, 3.3) if flat else (5.4, 4.0)), title or f"{names[0]} and {names[1]} on each other")
    if not flat:
        for rows, name, color in zip((one, two), names, colors, strict=True):
            ax.scatter(*rows.T, color=color, label=name, **_DOTS | {"alpha": 0.45})
        _legend(ax)
        return _plane(ax, fixed, title)
    low, high = fixed or (min(one.min(), two.min()), max(one.max(), two.max()))
    bins = np.linspace(low, high if high > low else low + 1, 61)
    for rows, name, color in zip((one, two), names, colors, strict=True):
        ax.hist(rows[:, 0], bins, density=True, histtype="stepfilled", facecolor=color + "40", ec=color, lw=1.6, label=name)
    ax.legend()
    return _words(ax, "x", "density", title)


def film_points(states: Sequence[Tensor], *, times: Sequence | None = None, labels: Sequence | Tensor | None = None,
                color: str = style.DATA, columns: int = 5, extent: Sequence[float] | None = None,
                title: str | None = None) -> style.Figure:  # fmt: skip
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
    if not len(states):
        raise ValueError("states must hold at least one set of points, not none")
    chosen = spread(len(states), columns)
    above = inputs.labels("times", times, len(states))
    clouds = [inputs.points(f"states[{i}]", states[i]) for i in chosen]
    names = None if labels is None else np.array(inputs.labels("labels", labels, len(clouds[0])))
    everything = np.concatenate(clouds)
    fixed = _extent(extent) if extent else _around(everything.min(0), everything.max(0))
    made, axes = panels(len(chosen), width=max(3.0, 1.75 * len(chosen)), height=2.2 + 0.25 * bool(title), share=True)
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


def trajectories(states: Sequence[Tensor], *, times: Sequence[float] | None = None, paths: int = 60,
                 color: str = style.MODEL, extent: Sequence[float] | None = None, ax: Axes | None = None,
                 title: str | None = None) -> style.Figure:  # fmt: skip
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
    ax = ax or _axes(*((5.6, 3.4) if flat else (4.2, 4.0)), title or f"the ways of {len(way)} points")
    ax.add_collection(LineCollection(way, colors=color, linewidths=1.0, alpha=0.55))
    ax.scatter(*way[:, 0].T, s=22, facecolors="white", edgecolors="#555555", linewidths=1.0, zorder=3, label="start")
    ax.scatter(*way[:, -1].T, s=22, color=color, linewidths=0, zorder=4, label="end")
    if not flat:
        return _plane(ax, fixed, title)
    ax.autoscale_view()
    return _words(ax, "step" if times is None else "t", "x", title)


def curves(x: Tensor | Mapping[str, Tensor], lines: Mapping[str, Tensor], xlabel: str, ylabel: str, *, logx: bool = False,
           logy: bool = False, colors: Mapping[str, str] | None = None, ax: Axes | None = None,
           title: str | None = None) -> style.Figure:  # fmt: skip
    """Draw labelled lines, each with its name written at its end.

    Arguments:
        x: Shape (N,), or one for each label.
        lines: For each label its values (N,); or (R, N) for R repetitions, drawn as their mean in the band of all.
        xlabel, ylabel: What the axes are, with units.
        logx, logy: Whether an axis is logarithmic.
        colors: For some labels a colour: ``{"exact": style.EXACT}``.
        ax: Where to draw.
        title: Above it.

    Raises:
        ValueError: If a line has another length than x.

    Example:
        >>> t = torch.linspace(0, 1, 50)
        >>> curves(t, {"alpha": 1 - t, "sigma": t}, "t", "coefficient")
        <Figure size 560x360 with 1 Axes>
    """
    if not isinstance(lines, Mapping) or not lines:
        raise TypeError(f"lines must be a dict of label: values with at least one entry, not {lines!r}")
    drawn = {name: _line(name, x[name] if isinstance(x, Mapping) else x, y) for name, y in lines.items()}
    ax = ax or _axes(5.6, 3.6, title or f"{ylabel} over {xlabel}: {', '.join(lines)}")
    ax.set_xscale("log" if logx else "linear")
    ax.set_yscale("log" if logy else "linear")
    ends = []
    for name, (across, values) in drawn.items():
        mean = values.mean(0)
        (line,) = ax.plot(across, mean, marker="o" if len(across) <= 16 else None, color=(colors or {}).get(name))
        if len(values) > 1:
            ax.fill_between(across, values.min(0), values.max(0), color=line.get_color(), alpha=0.18, linewidth=0)
        seen = np.flatnonzero(np.isfinite(mean))
        places = seen[[-1, int(0.8 * (len(seen) - 1))]] if len(seen) else []  # the end, and where lines that meet there differ
        ends += [(name, line.get_color(), across[places], mean[places])] if len(seen) else []
    if logx and not isinstance(x, Mapping) and len(across) <= 8:  # few places: name them, not the powers of ten
        ax.set_xticks(across, [inputs.text(float(place)) for place in across])
        ax.set_xticks([], minor=True)
    _names(ax, ends)
    return _words(ax, xlabel, ylabel, title)


def _line(name: str, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of one line: x (N,) and its repetitions (R, N)."""
    across, values = inputs.array("x", x), np.atleast_2d(inputs.array(f"lines[{name!r}]", y))
    if across.ndim != 1 or values.ndim != 2 or values.shape[1] != len(across):
        raise ValueError(f"lines[{name!r}] must have the length of x, {across.shape}, not {values.shape[-1:]}")
    return across, values


def _names(ax: Axes, ends: list[tuple[str, str, np.ndarray, np.ndarray]]) -> None:
    """Write each line's name at its right end, moved apart where lines end close together."""
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [to_axes.transform(np.stack([x, y], axis=1))[:, 1] for *_, x, y in ends]
    apart = 0.09 * 3.6 / ax.figure.get_figheight()
    order = sorted(range(len(ends)), key=lambda i: (round(heights[i][0], 2), heights[i][1]))
    at = [float(height[0]) for height in heights]
    for _ in range(100):  # neighbours push each other away, inside the axes, until all have room
        for low, high in zip(order, order[1:], strict=False):
            push = max(0.0, apart - (at[high] - at[low])) / 2
            at[low], at[high] = max(0.0, at[low] - push), min(1.0, at[high] + push)
    for (name, color, *_), height in zip(ends, at, strict=True):
        ax.text(1.015, height, name, color=color, transform=ax.transAxes, va="center")


def _axes(width: float, height: float, alt: str) -> Axes:
    return style.figure(width, height, alt).add_subplot()


def _legend(ax: Axes) -> None:
    """A legend beside the points, not on them, with markers large enough to tell their colours."""
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), markerscale=2.5, handletextpad=0.1, borderaxespad=0)


def _extent(extent: Sequence[float], count: int = 4) -> tuple[float, ...]:
    sides = tuple(float(side) for side in extent)
    if len(sides) != count or not all(low < high for low, high in zip(sides[::2], sides[1::2], strict=True)):
        asked = "(left, right, bottom, top)" if count == 4 else "(left, right)"
        raise ValueError(f"extent must be {asked}, each pair ascending, not {tuple(extent)}")
    return sides


def _around(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """A square around all points with a little room: left, right, bottom, top."""
    middle, half = (low + high) / 2, max((high - low).max() * 0.53, 1e-6)
    return np.stack([middle - half, middle + half], axis=1).ravel()


def _plane(ax: Axes, extent: Sequence[float] | None, title: str | None) -> style.Figure:
    """Axes of a plane: both coordinates named, and a unit as long in both."""
    if extent is None and not ax.images:  # on a density, its limits stay
        extent = _around(*ax.dataLim.get_points())
    if extent is not None:
        ax.set(xlim=extent[:2], ylim=extent[2:])
    ax.set_aspect("equal")
    return _words(ax, "$x_1$", "$x_2$", title)


def _words(ax: Axes, xlabel: str, ylabel: str, title: str | None) -> style.Figure:
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if title:  # what is drawn on a figure keeps that figure's title
        ax.set_title(title)
    return ax.figure
