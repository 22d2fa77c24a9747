"""What the figures accept, and the messages for what they do not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["array", "images", "labels", "points", "text"]


def array(name: str, value: object) -> np.ndarray:
    """A float64 array from a tensor, an array or numbers, whatever device or gradient it carries."""
    try:
        return torch.as_tensor(value).detach().cpu().double().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or numbers, not {type(value).__name__}: {error}") from None


def images(name: str, value: Tensor) -> np.ndarray:
    """Images (B, 1, H, W) or (B, 3, H, W) in [−1, 1] as (B, H, W, 1 or 3) in [0, 1]; what is beyond is clipped."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a float tensor of images in [-1, 1], not {came}")
    if value.ndim != 4 or value.shape[1] not in (1, 3) or 0 in value.shape:
        raise ValueError(f"{name} must have the shape (B, 1, H, W), not {tuple(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"{name} must be finite, but {int((~value.isfinite()).sum())} pixels are NaN or infinite")
    return array(name, value.clamp(-1, 1).permute(0, 2, 3, 1)) / 2 + 0.5


def points(name: str, value: Tensor, dims: tuple[int, ...] = (2,)) -> np.ndarray:
    """Points as an array (N, D) with D among ``dims``; where 1 is allowed, so is the shape (N,)."""
    rows = array(name, value)
    if rows.ndim == 1 and 1 in dims:
        rows = rows[:, None]
    if rows.ndim != 2 or rows.shape[1] not in dims or not len(rows):
        asked = " or ".join(f"(N, {dim})" for dim in dims)
        raise ValueError(f"{name} must have the shape {asked}, not {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} must be finite, but {int((~np.isfinite(rows)).any(1).sum())} points are not")
    return rows


def labels(name: str, value: Sequence | Tensor | None, count: int) -> list[str] | None:
    """As many labels as there are things to label, as text."""
    if value is None:
        return None
    if isinstance(value, str) or len(value) != count:
        came = f"the text {value!r}" if isinstance(value, str) else len(value)
        raise ValueError(f"{name} must have {count} entries, one for each, not {came}")
    return [text(one) for one in value]


def text(value: object) -> str:
    """How a value is written under a picture: numbers short, the rest as it is.

    Example:
        >>> text(0.30000000000000004), text(torch.tensor(1000.0)), text("DDIM")
        ('0.3', '1000', 'DDIM')
    """
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.3g}"
    return str(value)
