"""What flows need for images: from grey levels to real numbers, masks, and work at several resolutions."""

import math

import torch
from torch import Tensor, nn

from dgm_course.flows.transforms import Transform, total

__all__ = [
    "Logit",
    "Split",
    "Squeeze",
    "channel_mask",
    "checkerboard",
    "dequantize",
    "quantize",
    "squeeze",
    "unsqueeze",
]


def dequantize(x: Tensor, noise: Tensor, levels: int = 256) -> Tensor:
    r"""Spread each grey level k over its own interval, :math:`y = (k + u)/L` with u uniform in [0, 1): a density exists.

    Of grey levels themselves a density could be infinite. With this noise, what the density integrates to over a level's
    cell is a probability, and by Jensen

    .. math:: \log P(k) = \log \int_{[0,1)^D} p\bigl(\tfrac{k+u}{L}\bigr)\,\frac{du}{L^D}
              \;\ge\; \mathbb E_u\bigl[\log p(y)\bigr] - D \log L.

    Arguments:
        x: Images in [−1, 1], whose values are grey levels.
        noise: u, same shape.
        levels: L, 256 for 8 bits.

    Raises:
        ValueError: If the shapes differ, noise leaves [0, 1), or a value of x is no grey level.

    Source:
        | A note on the evaluation of generative models (Theis et al., 2016), eq. 3-6

    Example:
        >>> dequantize(torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5]), levels=2)
        tensor([0.2500, 0.7500])
    """
    if noise.shape != x.shape:
        raise ValueError(f"noise must have the shape of x, {tuple(x.shape)}; got {tuple(noise.shape)}")
    if noise.numel() and not (noise.min() >= 0 and noise.max() < 1):
        raise ValueError(f"noise must lie in [0, 1); got values from {noise.min():g} to {noise.max():g}")
    level = (x + 1) / 2 * (levels - 1)
    known = ((level - level.round()).abs() < 1e-2) & (level > -0.5) & (level < levels - 0.5)
    if not bool(known.all()):
        raise ValueError(f"x must hold {levels} grey levels in [−1, 1]; got values that are none of them")
    noise = noise.clamp(max=1 - 2**-15)  # closer to 1, float32 would round a high level up into the next
    return (level.round() + noise) / levels


def quantize(y: Tensor, levels: int = 256) -> Tensor:
    """The grey level, in [−1, 1], of the interval in which y lies; beyond [0, 1) the nearest.

    Example:
        >>> quantize(torch.tensor([-0.1, 0.25, 0.75]), levels=2).tolist()
        [-1.0, -1.0, 1.0]
    """
    return 2 * (y * levels).floor().clamp(0, levels - 1) / (levels - 1) - 1


def checkerboard(height: int, width: int, parity: int = 0) -> Tensor:
    """A mask (1, H, W) with 1 where row + column is even (odd for parity 1).

    Source:
        | Density estimation using Real NVP (Dinh et al., 2017), section 3.4

    Example:
        >>> checkerboard(2, 3).tolist()
        [[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]]
    """
    place = torch.arange(height)[:, None] + torch.arange(width)
    return ((place + parity) % 2 == 0).float()[None]


def channel_mask(channels: int, parity: int = 0) -> Tensor:
    """A mask (C, 1, 1) with 1 for the first half of the channels (the second half for parity 1).

    Source:
        | Dinh et al. (2017), section 3.4

    Example:
        >>> channel_mask(4).flatten().tolist()
        [1.0, 1.0, 0.0, 0.0]
    """
    first = torch.arange(channels) < (channels + 1) // 2
    return (first ^ bool(parity)).float()[:, None, None]


def squeeze(x: Tensor) -> Tensor:
    """Fold 2×2 pixels into 4 channels, (B, C, H, W) → (B, 4C, H/2, W/2): a reordering, so volume stays.

    Example:
        >>> squeeze(torch.arange(4.0).reshape(1, 1, 2, 2)).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    return nn.functional.pixel_unshuffle(x, 2)


def unsqueeze(x: Tensor) -> Tensor:
    """Undo `squeeze`.

    Example:
        >>> unsqueeze(torch.zeros(1, 4, 7, 7)).shape
        torch.Size([1, 1, 14, 14])
    """
    return nn.functional.pixel_shuffle(x, 2)


class Squeeze(Transform):
    """Another transform, at half the resolution and with four times the channels.

    Arguments:
        inner: A transform of images (B, 4C, H/2, W/2); this one is of (B, C, H, W).

    Source:
        | Dinh et al. (2017), section 3.6

    Example:
        >>> from dgm_course.flows.transforms import Permutation
        >>> Squeeze(Permutation([3, 2, 1, 0]))(torch.arange(4.0).reshape(1, 1, 2, 2))[0].flatten().tolist()
        [3.0, 2.0, 1.0, 0.0]
    """

    def __init__(self, inner: Transform):
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self.inner(squeeze(z))
        return unsqueeze(x), log_det

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.inner.inverse(squeeze(x))
        return unsqueeze(z), log_det

    def initialize(self, x: Tensor) -> Tensor:
        return unsqueeze(self.inner.initialize(squeeze(x)))


class Split(Transform):
    """Another transform, on the first half of the channels; the second half is noise already, and stays.

    So that, on the way from data to noise, half of the numbers leave early and the deeper layers are cheaper: the
    multi-scale architecture.

    Arguments:
        inner: A transform of the first half of the channels, rounded up.

    Source:
        | Dinh et al. (2017), section 3.6, eq. 14-16

    Example:
        >>> from dgm_course.flows.transforms import Permutation
        >>> Split(Permutation([1, 0]))(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))[0].tolist()
        [[2.0, 1.0, 3.0, 4.0]]
    """

    def __init__(self, inner: Transform):
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        first, second = z.chunk(2, dim=1)
        x, log_det = self.inner(first)
        return torch.cat([x, second], dim=1), log_det

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, dim=1)
        z, log_det = self.inner.inverse(first)
        return torch.cat([z, second], dim=1), log_det

    def initialize(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([self.inner.initialize(first), second], dim=1)


class Logit(Transform):
    r"""From all real numbers to [0, 1] and, by the margin, a little beyond; back it takes [0, 1] only.

    .. math:: x = \frac{\mathrm{sigmoid}(z) - \lambda}{1 - 2\lambda}, \qquad
              \log\Bigl|\frac{dx}{dz}\Bigr| = \log\mathrm{sigmoid}(z) + \log\mathrm{sigmoid}(-z) - \log(1 - 2\lambda)

    The margin λ keeps black and white away from ±∞. Its price: x lies between −λ/(1 − 2λ) and 1 + λ/(1 − 2λ), so a part of
    the probability is lost outside of [0, 1]: little for each pixel, but most images with hundreds of black ones have one there.

    Arguments:
        margin: λ, in (0, 1/2).

    Raises:
        ValueError: If the margin is out of range, or x, on the way to noise, leaves [0, 1].

    Source:
        | Dinh et al. (2017), section 4.1, there with a margin on one side only

    Example:
        >>> Logit()(torch.zeros(1, 1))[0].item()
        0.5
    """

    def __init__(self, margin: float = 0.05):
        super().__init__()
        if not 0 < margin < 0.5:
            raise ValueError(f"margin must lie between 0 and 1/2; got {margin}")
        self.margin = margin

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return (z.sigmoid() - self.margin) / (1 - 2 * self.margin), self._log_det(z)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise ValueError(f"x must lie in [0, 1]; got values from {x.min():g} to {x.max():g}")
        z = torch.logit(self.margin + (1 - 2 * self.margin) * x)
        return z, -self._log_det(z)

    def _log_det(self, z: Tensor) -> Tensor:
        log_sigmoid = nn.functional.logsigmoid
        return total(log_sigmoid(z) + log_sigmoid(-z) - math.log(1 - 2 * self.margin))
