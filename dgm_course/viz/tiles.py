"""Images side by side, pixel for pixel: one picture in one axes, so that a hundred digits are drawn as fast as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.textpath import TextPath
from torch import Tensor

from dgm_course.viz import inputs, style

__all__ = ["film", "grid", "mosaic", "rows", "spread"]

_DPI = 200  # of the stored file; a multiple of it by whole pixels keeps the tiles crisp
_TILE, _WIDTH = 0.58, 7.2  # inches of a tile, and of a whole figure
_SIZE, _LINE = 11, 0.22  # points of text, and inches of a line of it


def grid(
    images: Tensor,
    *,
    columns: int | None = None,
    labels: Sequence | None = None,
    title: str | None = None,
    scale: float = 1.0,
) -> style.Figure:
    """Draw a batch of images as a grid.

    Arguments:
        images: Shape (B, 1, H, W) or (B, 3, H, W), in [−1, 1]; values beyond are clipped.
        columns: Images in a row; by default what fits.
        labels: One for each image, written above it.
        title: Above all.
        scale: Size of an image; 1 is about 0.6 inch.

    Raises:
        TypeError, ValueError: If the images are no float tensor of that shape, or the labels are too many or too few.

    Example:
        >>> import torch
        >>> grid(torch.zeros(32, 1, 28, 28)).alt
        'grid of 32 images'
    """
    batch = inputs.images("images", images)
    captions = inputs.labels("labels", labels, len(batch))
    if columns is None:
        fitting = int(_WIDTH / max(_TILE * scale, _widest(captions)))
        best = [many for many in (10, 8, 9, 7, 6) if many <= fitting and len(batch) % many == 0]
        columns = min(len(batch), best[0] if best else min(fitting, 10))
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    cut = range(0, len(batch), columns)
    captions = captions and [captions[i : i + columns] for i in cut]
    alt = title or f"grid of {len(batch)} images"
    return _draw([batch[i : i + columns] for i in cut], alt, captions=captions, title=title, scale=scale)


def rows(
    batches: Iterable[Tensor], labels: Sequence | None = None, *, title: str | None = None, scale: float = 1.0
) -> style.Figure:
    """Draw each batch of images as a row, with its label on the left: a row for each class, or for each sampler.

    Arguments:
        batches: Images (B, 1, H, W) in [−1, 1]; B may differ.
        labels: One for each row.
        title: Above all.
        scale: Size of an image.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches must hold at least one batch of images, not none")
    drawn = [inputs.images(f"batches[{i}]", batch) for i, batch in enumerate(batches)]
    left = inputs.labels("labels", labels, len(drawn))
    alt = title or "rows of images" + (f": {', '.join(left)}" if left else "")
    return _draw(drawn, alt, left=left, title=title, scale=scale)


def film(
    states: Iterable[Tensor],
    *,
    times: Sequence | None = None,
    labels: Sequence | None = None,
    rows: int = 4,
    columns: int = 10,
    title: str | None = None,
    scale: float = 1.0,
) -> style.Figure:
    """Draw a film strip: a row for each sample, a column for each time; noising or denoising, in the order given.

    Arguments:
        states: Images (B, 1, H, W) at successive times, as a sampler yields them.
        times: One for each state: a number, or a text that is written as it is.
        labels: One for each row.
        rows: At most so many samples, the first of the batch.
        columns: At most so many states, evenly spread, with the first and the last.
        title: Above all.
        scale: Size of an image.
    """
    states = list(states)
    if not states:
        raise ValueError("states must hold at least one batch of images, not none")
    chosen = spread(len(states), columns)
    above = inputs.labels("times", times, len(states))
    above = above and [above[i] for i in chosen]
    drawn = np.stack([inputs.images(f"states[{i}]", states[i])[:rows] for i in chosen], axis=1)
    left = inputs.labels("labels", labels, len(drawn))
    numbers = above and not isinstance(times[0], str)
    alt = title or f"film of {len(drawn)} samples" + (f", t from {above[0]} to {above[-1]}" if numbers else "")
    corner = "t =" if numbers else ""
    return _draw(list(drawn), alt, left=left, above=above, corner=corner, title=title, scale=scale)


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices below ``count``, evenly spread, with both ends.

    Example:
        >>> spread(9, 3), spread(2, 5)
        ([0, 4, 8], [0, 1])
    """
    if most < 2:
        raise ValueError(f"at least 2 of {count} must be shown, not {most}")
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def mosaic(batches: Sequence[np.ndarray], across: int, down: int) -> np.ndarray:
    """Put rows of images (B, H, W, C) in [0, 1] on white, so many pixels apart, as one image (H', W', C)."""
    high, wide, channels = batches[0].shape[1:]
    most = max(len(batch) for batch in batches)
    sheet = np.ones((len(batches) * (high + down) - down, most * (wide + across) - across, channels))
    for i, batch in enumerate(batches):
        if batch.shape[1:] != (high, wide, channels):
            raise ValueError(f"all images must have one shape, not {batch.shape[1:]} beside {batches[0].shape[1:]}")
        for j, image in enumerate(batch):
            top, left = i * (high + down), j * (wide + across)
            sheet[top : top + high, left : left + wide] = image
    return sheet


def _widest(words: Sequence[str] | None) -> float:
    """Inches of the longest of some texts; 0 if there are none."""
    lengths = [TextPath((0, 0), word, size=_SIZE).get_extents().width for word in words or () if word.strip()]
    return max(lengths) / 72 + 0.1 if lengths else 0.0


def _draw(batches, alt, *, captions=None, above=None, left=None, corner="", title=None, scale=1.0) -> style.Figure:
    """One picture of all tiles, and around it room for the words: measured, so that nothing is cut or blurred."""
    high, wide = batches[0].shape[1:3]
    many = max(len(batch) for batch in batches)
    heads = captions or ([above] if above else [])  # a line of words above each row, or above the first
    zoom = max(1, int(min(_TILE, _WIDTH / many) * scale * _DPI / max(high, wide)))
    inch, widest = zoom / _DPI, _widest(sum(heads, []))
    across = max(high // 14, 1, int(np.ceil(widest / inch)) - wide)
    down = int(np.ceil((_LINE + 0.03) / inch)) if captions else max(high // 14, 1)
    sheet = mosaic(batches, across, down)
    tall, broad = sheet.shape[0] * inch, sheet.shape[1] * inch
    over = max(0.02, (widest - wide * inch) / 2)  # by how much the words stand out over the tiles
    names = max(_widest(left), _widest([corner]))
    names = np.ceil(20 * (names + over)) / 20 - over  # tiles begin at a whole pixel, or they would blur
    topic = _widest([title or ""]) * 12 / _SIZE
    size = (max(names + over + broad + over, topic), (bool(heads) + bool(title)) * _LINE + tall + 0.06)
    size = (np.ceil(10 * size[0]) / 10, size[1])  # and the same on machines that measure text a little differently
    made = style.figure(*size, alt)
    made.set_layout_engine("none")
    ax = made.add_axes(((names + over) / size[0], 0.02 / size[1], broad / size[0], tall / size[1]))
    ax.imshow(sheet.squeeze(-1) if sheet.shape[2] == 1 else sheet, vmin=0, vmax=1, aspect="auto")
    ax.axis("off")
    tops = [i * (high + down) - 0.5 for i in range(len(batches))]
    for top, line in zip(tops, heads, strict=False):
        for j, word in enumerate(line):
            ax.text(j * (wide + across) + wide / 2 - 0.5, top - 0.04 / inch, word, ha="center", va="bottom", size=_SIZE)
    edge = -0.5 - (over + 0.03) / inch
    ax.text(edge, -0.5 - 0.04 / inch, corner, ha="right", va="bottom", size=_SIZE)
    for top, word in zip(tops, left or [], strict=False):
        ax.text(edge, top + high / 2, word, ha="right", va="center", size=_SIZE)
    middle = min(max(names + over + broad / 2, topic / 2), size[0] - topic / 2)
    made.text(middle / size[0], 1 - 0.04 / size[1], title or "", ha="center", va="top", size=12)
    return made
