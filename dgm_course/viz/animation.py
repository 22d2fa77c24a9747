"""Animations that play without a kernel, a player or a network: every browser plays an animated PNG."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dgm_course.viz import inputs, style
from dgm_course.viz.points import around
from dgm_course.viz.tiles import mosaic, spread

__all__ = ["animate", "apng"]

_GREYS = 16  # shades in an animation of images: noise does not compress, so fewer shades are what keeps it small
_HEAD = 26  # pixels above the images for the time


def animate(frames: Iterable, *, times: Sequence | None = None, seconds: float = 4.0, scale: float = 1.0) -> None:
    """Show an animation at once; it loops, and rests for a second on its last frame.

    Arguments:
        frames: At least two of one kind: batches of images (B, 1, H, W) in [−1, 1], drawn as a grid; points (N, 2); or
            PIL images of one size. More than 30 are thinned out evenly, and large batches further: 16 digits are a
            good size.
        times: One for each frame, written above it: a number, or a text that is written as it is.
        seconds: How long it moves.
        scale: Size; 1 draws 28×28 images 56 pixels wide.

    Raises:
        TypeError, ValueError: If the frames are of no such kind or differ in shape.
    """
    from IPython.display import Image as Shown
    from IPython.display import display

    shown = Shown(apng(frames, times=times, seconds=seconds, scale=scale), alt="animation")
    style.show_waiting()
    display(shown)


def apng(frames: Iterable, *, times: Sequence | None = None, seconds: float = 4.0, scale: float = 1.0) -> bytes:
    """The bytes of the animated PNG that :func:`animate` shows, to be written to a file."""
    frames = list(frames)
    if len(frames) < 2:
        raise ValueError(f"frames must hold at least two frames, not {len(frames)}")
    if not seconds > 0 or not scale > 0:
        raise ValueError(f"seconds and scale must be positive, not {seconds} and {scale}")
    words = inputs.labels("times", times, len(frames)) or [""] * len(frames)
    number = times is not None and not isinstance(times[0], str)
    chosen = spread(len(frames), _most(frames[0]))
    frames, words = [frames[i] for i in chosen], [f"t = {words[i]}" if number else words[i] for i in chosen]
    if all(isinstance(frame, Image.Image) for frame in frames):
        pictures = _one_palette(frames)
    elif getattr(frames[0], "ndim", 0) == 4:
        pictures = _grids(frames, words, scale)
    else:
        pictures = _clouds(frames, words, scale)
    return _save(pictures, seconds)


def _most(frame: object) -> int:
    """How many frames stay small: noise needs half a byte for each pixel, so 30 frames of 16 digits make 200 kB."""
    return max(12, min(30, 400_000 // frame.numel())) if isinstance(frame, Tensor) and frame.ndim == 4 else 30


def _save(pictures: list[Image.Image], seconds: float) -> bytes:
    if len({picture.size for picture in pictures}) > 1:
        raise ValueError(f"frames must have one size, not {sorted({picture.size for picture in pictures})}")
    each = round(1000 * seconds / len(pictures))
    durations = [each] * (len(pictures) - 1) + [each + 1000]
    out = io.BytesIO()
    pictures[0].save(
        out, format="png", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True
    )
    return out.getvalue()


def _grids(frames: Sequence[Tensor], words: Sequence[str], scale: float) -> list[Image.Image]:
    """A grid of images for each frame, each pixel of an image drawn as a square of whole pixels."""
    batches = [inputs.images(f"frames[{i}]", frame) for i, frame in enumerate(frames)]
    if len({batch.shape for batch in batches}) > 1:
        raise ValueError(f"frames must have one shape, not {sorted({batch.shape for batch in batches})}")
    count = len(batches[0])
    columns = next((many for many in (8, 10, 6, 5, 4) if count % many == 0), min(count, 8))
    zoom, gap = max(1, round(56 * scale / batches[0].shape[1])), max(1, batches[0].shape[1] // 14)
    head = _HEAD if any(words) else 0
    font = ImageFont.truetype(findfont("DejaVu Sans"), 16)
    pictures = []
    for batch, word in zip(batches, words, strict=True):
        sheet = mosaic([batch[i : i + columns] for i in range(0, count, columns)], gap, gap)
        shades = (sheet * (_GREYS - 1)).round() * 255 / (_GREYS - 1)
        large = np.kron(shades, np.ones((zoom, zoom, 1))).round().astype(np.uint8)
        large = np.pad(large, ((head, 0), (0, 0), (0, 0)), constant_values=255)
        picture = Image.fromarray(large.squeeze(-1) if large.shape[2] == 1 else large)
        ImageDraw.Draw(picture).text((2, 3), word, fill="black", font=font)
        pictures.append(picture)
    return pictures


def _clouds(frames: Sequence[Tensor], words: Sequence[str], scale: float) -> list[Image.Image]:
    """A scatter plot for each frame, all in the same axes."""
    clouds = [inputs.points(f"frames[{i}]", frame) for i, frame in enumerate(frames)]
    everything = np.concatenate(clouds)
    left, right, bottom, top = around(everything.min(0), everything.max(0))
    made = style.figure(4 * scale, 4 * scale)
    ax = made.add_subplot(aspect="equal", xlabel="first coordinate", ylabel="second coordinate", title=words[0] or None)
    ax.set(xlim=(left, right), ylim=(bottom, top))
    dots = ax.scatter(*clouds[0].T, s=8, alpha=0.6, linewidths=0, color=style.MODEL)
    pictures = []
    for cloud, word in zip(clouds, words, strict=True):
        dots.set_offsets(cloud)
        ax.set_title(word)
        raw = io.BytesIO()
        made.savefig(raw, format="png", dpi=100, pil_kwargs={"compress_level": 1})
        made.set_layout_engine("none")  # where the first frame put the axes, they stay
        pictures.append(Image.open(raw).convert("RGB"))
    plt.close(made)
    return _one_palette(pictures)


def _one_palette(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """All pictures in the same 32 colours: the format has one palette for all frames."""
    few = [pictures[i].convert("RGB") for i in spread(len(pictures), 8)]
    strip = Image.new("RGB", (sum(one.width for one in few), max(one.height for one in few)), "white")
    for i, one in enumerate(few):
        strip.paste(one, (sum(before.width for before in few[:i]), 0))
    palette = strip.quantize(32, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    return [one.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for one in pictures]
