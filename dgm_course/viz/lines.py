"""Lines with their names at their ends."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from dgm_course.viz import inputs, style

__all__ = ["curves"]


def curves(
    x: Tensor | Mapping[str, Tensor],
    lines: Mapping[str, Tensor],
    xlabel: str,
    ylabel: str,
    *,
    logx: bool = False,
    logy: bool = False,
    colors: Mapping[str, str] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> style.Figure:
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
        >>> import torch
        >>> t = torch.linspace(0, 1, 50)
        >>> curves(t, {"alpha": 1 - t, "sigma": t}, "t", "coefficient")
        <Figure size 560x360 with 1 Axes>
    """
    if not isinstance(lines, Mapping) or not lines:
        raise TypeError(f"lines must be a dict of label: values with at least one entry, not {lines!r}")
    drawn = {name: _line(name, x[name] if isinstance(x, Mapping) else x, y) for name, y in lines.items()}
    ax = ax or style.axes(5.6, 3.6, title or f"{ylabel} over {xlabel}: {', '.join(lines)}")
    ax.set_xscale("log" if logx else "linear")
    ax.set_yscale("log" if logy else "linear")
    ends = []
    for name, (across, values) in drawn.items():
        mean = values.mean(0)
        (line,) = ax.plot(across, mean, marker="o" if len(across) <= 16 else None, color=(colors or {}).get(name))
        if len(values) > 1:
            ax.fill_between(across, values.min(0), values.max(0), color=line.get_color(), alpha=0.18, linewidth=0)
        seen = np.flatnonzero(np.isfinite(mean))
        if len(seen):  # the end, and a place before it where lines that meet at the end still differ
            places = seen[[-1, int(0.8 * (len(seen) - 1))]]
            ends.append((name, line.get_color(), across[places], mean[places]))
    if logx and not isinstance(x, Mapping) and len(across) <= 8:  # few places: name them, not the powers of ten
        ax.set_xticks(across, [inputs.text(float(place)) for place in across])
        ax.set_xticks([], minor=True)
    _names(ax, ends)
    return style.words(ax, xlabel, ylabel, title)


def _line(name: str, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of one line: x (N,) and its repetitions (R, N)."""
    across, values = inputs.array("x", x), np.atleast_2d(inputs.array(f"lines[{name!r}]", y))
    if across.ndim != 1 or values.ndim != 2 or values.shape[1] != len(across):
        raise ValueError(f"lines[{name!r}] must have the length of x, {across.shape}, not {values.shape[-1:]}")
    return across, values


def _names(ax: Axes, ends: list[tuple[str, str, np.ndarray, np.ndarray]]) -> None:
    """Write each line's name at its right end, moved apart where lines end close together."""
    ax.autoscale_view()  # matplotlib puts it off until the figure is drawn
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
