"""How a network is told the time and the label."""

import math

import torch
from torch import Tensor, nn

__all__ = ["LabelEmbedding", "TimeEmbedding", "WeightEmbedding", "sinusoids"]


def sinusoids(t: Tensor, dim: int, longest: float = 10_000.0) -> Tensor:
    r"""Sines and cosines of t at geometrically spaced frequencies.

    .. math:: \bigl(\cos(1000\,t\,\omega_k),\ \sin(1000\,t\,\omega_k)\bigr), \qquad \omega_k = 10000^{-k/(d/2)}, \quad k = 0 \dots d/2 - 1

    The factor 1000 gives t ∈ [0, 1] the range that the lecture's integers 1 … 1000 have.

    Arguments:
        t: Times in [0, 1], shape (B,).
        dim: Even number of features d.
        longest: Ratio of the longest to the shortest wave.

    Raises:
        ValueError: If `dim` is odd or t has no shape (B,).

    Source:
        | Attention Is All You Need (Vaswani et al., 2017), section 3.5; Ho et al. (2020), appendix B

    Example:
        >>> sinusoids(torch.zeros(1), 4).tolist()
        [[1.0, 1.0, 0.0, 0.0]]
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and positive; got {dim}")
    if t.ndim != 1:
        raise ValueError(f"t must have shape (B,); got {tuple(t.shape)}")
    half = dim // 2
    frequencies = torch.exp(-math.log(longest) / half * torch.arange(half, dtype=t.dtype, device=t.device))
    angles = 1000 * t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Sinusoids of t, then two linear layers: (B,) → (B, width)."""

    def __init__(self, width: int, features: int = 64):
        super().__init__()
        self.features = features
        self.layers = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.layers(sinusoids(t, self.features))


class LabelEmbedding(nn.Module):
    """A learned vector for each class and one more, the last, for "no label": (B,) → (B, width).

    Labels run from 0 to `num_classes`, which is the null label. Without labels every sample gets the null label.

    Raises:
        ValueError: If the labels are not int64 of shape (B,).

    Source:
        | Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), section 3.2, for the null label
    """

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, y: Tensor | None, batch: int) -> Tensor:
        if y is None:
            y = torch.full((batch,), self.num_classes, device=self.table.weight.device)
        if y.dtype != torch.int64 or y.shape != (batch,):
            raise ValueError(f"y must be int64 of shape ({batch},); got {y.dtype} of shape {tuple(y.shape)}")
        return self.table(y)


class WeightEmbedding(nn.Module):
    """Sinusoids of a weight of guidance w, then two linear layers, the second zero at the start: (B,) → (B, width).

    So a network that gets it begins as one without. The sinusoids have waves from about 0.6 in w upwards: shorter ones would tell apart
    weights whose guesses hardly differ.

    Source:
        | On Distillation of Guided Diffusion Models (Meng et al., 2023), section 3.1 and appendix A
    """

    def __init__(self, width: int, features: int = 64):
        super().__init__()
        self.features = features
        self.layers = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, w: Tensor) -> Tensor:
        return self.layers(sinusoids(w / 100, self.features))  # `sinusoids` multiplies by 1000
