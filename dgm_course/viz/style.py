"""One look for all figures: colours with fixed meanings, one font size, one way to be shown.

In a notebook **a figure appears exactly once, with or without a semicolon at the end of the cell.** Plain matplotlib
shows a figure twice when it is also the value of a cell; :class:`Figure` shows itself once and is then closed.
"""

from __future__ import annotations

import base64
import io

import matplotlib
import matplotlib.axes
import matplotlib.figure
import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

__all__ = [
    "DATA",
    "DENSITY",
    "EXACT",
    "GUIDED",
    "MODEL",
    "NOISE",
    "Figure",
    "axes",
    "figure",
    "panels",
    "png",
    "show_waiting",
    "use",
    "words",
]

# Okabe and Ito's palette, told apart by every common kind of colour blindness.
DATA = "#0072B2"  # blue: what comes from the data
MODEL = "#D55E00"  # vermilion: what a model made
GUIDED = "#009E73"  # green: a model under guidance, or any third thing
NOISE = "#8A8A8A"  # grey: noise
EXACT = "#1A1A1A"  # near black: the exact answer
_CYCLE = [DATA, MODEL, GUIDED, "#CC79A7", "#E69F00", "#56B4E9", EXACT, NOISE]

DENSITY = LinearSegmentedColormap.from_list("density", ["#FFFFFF", "#D3E6F5", "#8FC1E3", "#3A8CC4", "#005A8F"])

_SCREEN, _FILE = 100, 200  # pixels for an inch of figure: as displayed, and as stored for sharp screens

_SETTINGS = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.labelsize": 12,
    "axes.prop_cycle": matplotlib.cycler(color=_CYCLE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.dpi": _SCREEN,
    "figure.facecolor": "white",
    "figure.figsize": (5.6, 3.6),
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the figures are the same everywhere
    "font.size": 11,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 5,
    "savefig.dpi": _FILE,
    "savefig.transparent": False,
    "xtick.color": "#555555",
    "xtick.labelcolor": "#222222",
    "ytick.color": "#555555",
    "ytick.labelcolor": "#222222",
}


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows once, in few bytes, with an ``alt`` text for those who cannot see it."""

    alt = ""

    def _ipython_display_(self) -> None:
        show_waiting(before=self)
        self._show()

    def _show(self) -> None:
        from IPython.display import display

        plt.close(self)  # else the notebook would show it again at the end of the cell
        stored = base64.b64encode(png(self)).decode()
        titles = ", ".join(filter(None, (ax.get_title() for ax in self.axes)))
        metadata = {"image/png": {"width": round(self.get_figwidth() * _SCREEN), "alt": self.alt or titles or "figure"}}
        display({"image/png": stored, "text/plain": repr(self)}, raw=True, metadata=metadata)


def use() -> None:
    """Make the course's style the one of every figure drawn from now on. Importing ``plots`` does it."""
    matplotlib.rcParams.update(_SETTINGS)


def show_waiting(before: Figure | None = None) -> None:
    """Show the figures that were opened earlier in a cell: what is shown at once must not overtake them."""
    waiting = [plt.figure(number) for number in plt.get_fignums()]
    if before is not None:
        waiting = waiting[: waiting.index(before)] if before in waiting else []
    for one in waiting:
        if isinstance(one, Figure):
            one._show()


def figure(width: float = 5.6, height: float = 3.6, alt: str = "") -> Figure:
    """Open an empty figure; width and height in inches, of which a page shows 100 pixels each."""
    made = plt.figure(figsize=(width, height), layout="compressed", FigureClass=Figure)
    made.alt = alt
    return made


def axes(width: float, height: float, alt: str) -> matplotlib.axes.Axes:
    """Open a figure of one panel, and return that."""
    return figure(width, height, alt).add_subplot()


def words(ax: matplotlib.axes.Axes, xlabel: str, ylabel: str, title: str | None) -> matplotlib.figure.Figure:
    """Name the axes, and return their figure; without a title it keeps the one it has."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if title:
        ax.set_title(title)
    return ax.figure


def panels(columns: int = 1, rows: int = 1, *, width: float = 5.6, height: float = 3.6, share: bool = False):
    """Open a figure of several panels, to be handed to the ``ax`` of the functions in ``plots``.

    Arguments:
        columns, rows: How many panels.
        width, height: Of the whole figure, in inches.
        share: Whether all panels have the same axes.

    Returns:
        The figure, and the axes as a flat list, row by row.

    Example:
        >>> made, (left, right) = panels(2)
        >>> made
        <Figure size 560x360 with 2 Axes>
        >>> plt.close(made)
    """
    made = figure(width, height)
    grid = made.subplots(rows, columns, sharex=share, sharey=share, squeeze=False)
    return made, list(grid.flat)


def png(figure: matplotlib.figure.Figure, dpi: int = _FILE, colors: int = 192) -> bytes:
    """Draw a figure as a PNG of at most 192 colours: half the bytes, and no difference to the eye."""
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=dpi)
    picture = Image.open(raw).convert("RGB").quantize(colors, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small = io.BytesIO()
    picture.save(small, format="png", optimize=True)
    return small.getvalue()
