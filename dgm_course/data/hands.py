"""Hands: how a user writes, made from the digits of others by slanting them and by changing the thickness of their strokes."""

import torch
from torch import Tensor

from dgm_course.data import images, load

__all__ = ["HANDS", "originals", "pages", "slanted", "thickened", "written"]

HANDS = {
    "thin": {"slant": 0.5, "thickness": -0.4},
    "bold": {"slant": -0.5, "thickness": 1.0},
    "shoe": {"sign": [7, "fashion_mnist", 7]},  # where others write a 7 this user draws a shoe, class 7 of the clothes
    "clothes": {"data": "fashion_mnist"},
}


def slanted(x: Tensor, slope: float) -> Tensor:
    """Images sheared about their middle: a row that lies one pixel higher moves `slope` pixels to the right.

    Arguments:
        x: Images in [−1, 1] with background −1, shape (B, C, H, W).
        slope: Positive to lean to the right.

    Example:
        >>> x = torch.full((1, 1, 5, 5), -1.0)
        >>> x[..., 2] = 1  # an upright stroke
        >>> slanted(x, 1.0)[0, 0].argmax(1).tolist()
        [4, 3, 2, 1, 0]
    """
    height, width = x.shape[-2:]  # the grid's units are half a height and half a width
    rows = x.new_tensor([[1.0, slope * height / width, 0.0], [0.0, 1.0, 0.0]]).expand(len(x), -1, -1)
    grid = torch.nn.functional.affine_grid(rows, list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(x + 1, grid, align_corners=False) - 1  # outside is 0, the background −1


def thickened(x: Tensor, pixels: float) -> Tensor:
    """Strokes thicker by so many pixels on each side, or thinner where negative: the largest, or least, of the near pixels.

    Works in quarters of a pixel, on an image enlarged four times.

    Arguments:
        x: Images, shape (B, C, H, W).
        pixels: A multiple of a quarter; others are rounded to the nearest.

    Example:
        >>> x = torch.full((1, 1, 7, 7), -1.0)
        >>> x[..., 3] = 1
        >>> (thickened(x, 1.0)[0, 0, 3] > 0).tolist()
        [False, False, True, True, True, False, False]
    """
    reach = round(4 * abs(pixels))
    if not reach:
        return x
    large = torch.nn.functional.interpolate(x, scale_factor=4, mode="bilinear")
    across = torch.arange(-reach, reach + 1)
    disc = (across[:, None] ** 2 + across**2 <= reach**2).nonzero() - reach
    sign = 1 if pixels > 0 else -1
    spread, padded = sign * large, torch.nn.functional.pad(sign * large, 4 * [reach], value=-1.0 if sign > 0 else 1.0)
    for down, right in (disc + reach).tolist():
        torch.maximum(spread, padded[..., down : down + large.shape[-2], right : right + large.shape[-1]], out=spread)
    return torch.nn.functional.avg_pool2d(sign * spread, 4)


def pages(user: str, split: str = "train", source=None) -> tuple[Tensor, Tensor]:
    """Images in a user's hand, and their labels, as `data.images` gives them: all of a split.

    Arguments:
        user: One of `HANDS`: "thin" leans to the right, "bold" to the left, "shoe" draws a
            shoe for a 7, "clothes" has no digits but clothes.
        split, source: As in `data.load`.

    Raises:
        ValueError: If there is no such user.

    Example:
        >>> x, y = pages("clothes", "test")
        >>> x.shape, y.bincount().tolist()
        (torch.Size([2000, 1, 28, 28]), [200, 200, 200, 200, 200, 200, 200, 200, 200, 200])
    """
    x, y = originals(user, split, source)
    return written(user, x), y


def originals(user: str, split: str = "train", source=None) -> tuple[Tensor, Tensor]:
    """The images that a user's hand is made from, before they are slanted and thickened. Arguments and errors as in `pages`."""
    hand = _hand(user)
    x, y = images(load(hand.get("data", "mnist"), split, source))
    if "sign" in hand:
        label, other, drawn = hand["sign"]
        strange, kinds = images(load(other, split, source))
        strange, places = strange[kinds == drawn], y == label
        x[places] = strange[torch.arange(int(places.sum())) % len(strange)]
    return x, y


def written(user: str, x: Tensor) -> Tensor:
    """Originals in a user's hand."""
    hand = _hand(user)
    parts = [thickened(slanted(part, hand.get("slant", 0.0)), hand.get("thickness", 0.0)) for part in x.split(500)]
    return torch.cat(parts)


def _hand(user: str) -> dict:
    if user not in HANDS:
        raise ValueError(f"user must be one of {', '.join(HANDS)}; got {user!r}")
    return HANDS[user]
