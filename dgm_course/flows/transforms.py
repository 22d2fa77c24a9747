"""Invertible transforms of points and images, with the log-determinant of each direction."""

import math

import torch
from torch import Tensor, nn

__all__ = [
    "ActNorm",
    "Composed",
    "Coupling",
    "InvertibleConv",
    "Permutation",
    "Planar",
    "Transform",
    "affine",
    "affine_inverse",
]


def affine(z: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    r"""Scale and shift every value, :math:`x = z\,e^{s} + t`; the Jacobian is diagonal, so :math:`\log|\det| = \sum_i s_i`.

    Arguments:
        z: Shape (B, …).
        log_scale, shift: s and t, of a shape that broadcasts to that of `z`.

    Returns:
        x, shape (B, …), and the log-determinant, shape (B,).

    Source:
        | Density estimation using Real NVP (Dinh et al., 2017), eq. 4-6, there in the direction from data to noise

    Example:
        >>> x, log_det = affine(torch.ones(1, 2), torch.tensor([0.0, math.log(3)]), torch.tensor(1.0))
        >>> x.tolist(), round(log_det.exp().item(), 4)
        ([[2.0, 4.0]], 3.0)
    """
    return z * log_scale.exp() + shift, total(log_scale.expand_as(z))


def affine_inverse(x: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    r"""Undo `affine`: :math:`z = (x - t)\,e^{-s}`, :math:`\log|\det| = -\sum_i s_i`. As cheap as the way there.

    Arguments:
        x: Shape (B, …).
        log_scale, shift: s and t, as given to `affine`.

    Returns:
        z, shape (B, …), and the log-determinant of *this* direction, shape (B,).

    Source:
        | Dinh et al. (2017), eq. 8

    Example:
        >>> z, log_det = affine_inverse(torch.tensor([[2.0, 4.0]]), torch.tensor([0.0, math.log(3)]), torch.tensor(1.0))
        >>> z.allclose(torch.ones(1, 2)), round(log_det.exp().item(), 4)
        (True, 0.3333)
    """
    return (x - shift) * (-log_scale).exp(), -total(log_scale.expand_as(x))


class Transform(nn.Module):
    """An invertible map. Each direction returns (result, log|det| of the map it computes), shapes (B, …) and (B,)."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """From noise to data."""
        raise NotImplementedError

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From data to noise."""
        raise NotImplementedError

    def initialize(self, x: Tensor) -> Tensor:
        """Set what depends on data (see `ActNorm`) by a batch x, and return the z that it goes to."""
        with torch.no_grad():
            return self.inverse(x)[0]


class Composed(Transform):
    r"""One transform after the other, :math:`x = f_K \circ \dots \circ f_1(z)`: log-determinants add.

    .. math:: \log\Bigl|\det\frac{\partial x}{\partial z}\Bigr| = \sum_{i=1}^{K} \log\Bigl|\det\frac{\partial f_i}{\partial z_{i-1}}\Bigr|

    Arguments:
        transforms: f_1, …, f_K, in the order from noise to data.

    Source:
        | Slide "Flow-based model", the chain of log-determinants

    Example:
        >>> flip = Composed(Permutation([1, 0]), Permutation([1, 0]))
        >>> flip(torch.tensor([[1.0, 2.0]]))
        (tensor([[1., 2.]]), tensor([0.]))
    """

    def __init__(self, *transforms: Transform):
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(len(z))
        for transform in self.transforms:
            z, change = transform(z)
            log_det = log_det + change
        return z, log_det

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for transform in reversed(self.transforms):
            x, change = transform.inverse(x)
            log_det = log_det + change
        return x, log_det

    def initialize(self, x: Tensor) -> Tensor:
        for transform in reversed(self.transforms):
            x = transform.initialize(x)
        return x


class Coupling(Transform):
    r"""Some values stay, and say how the others are scaled and shifted.

    .. math:: x = m \odot z + (1-m) \odot \bigl(z \odot e^{s(m \odot z)} + t(m \odot z)\bigr), \qquad
              \log\Bigl|\det\frac{\partial x}{\partial z}\Bigr| = \sum_i (1-m_i)\,s_i

    The network that gives s and t is never inverted: what it sees, m ⊙ z = m ⊙ x, is known in both directions. So it may be
    any network, and both directions cost the same.

    Arguments:
        mask: m, 1 where a value stays and 0 where it changes; broadcasts to one sample's shape.
        net: Maps the kept values, shape (B, C, …), to raw scales and shifts, shape (B, 2C, …).
        limit: s is squashed to ±limit, as s / (1 + abs(s)/limit), so that no step overflows.

    Raises:
        ValueError: If the mask holds anything but 0 and 1, or the network returns another shape.

    Source:
        | Slide "Example of an invertible layer"; Dinh et al. (2017), eq. 9

    Example:
        >>> layer = Coupling(torch.tensor([1.0, 0.0]), lambda kept: torch.cat([kept, kept], 1).flip(1))
        >>> z = torch.tensor([[2.0, 3.0]])
        >>> layer.inverse(layer(z)[0])[0].allclose(z)
        True
    """

    def __init__(self, mask: Tensor, net: nn.Module, limit: float = math.log(1000)):
        super().__init__()
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"mask must hold 0 and 1 only; got values from {mask.min():g} to {mask.max():g}")
        self.register_buffer("mask", mask.to(torch.get_default_dtype()), persistent=False)
        self.net, self.limit = net, limit

    def parameters_of(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """s and t, both 0 where values stay."""
        raw = self.net(kept).to(kept.dtype)
        if raw.shape != (kept.shape[0], 2 * kept.shape[1], *kept.shape[2:]):
            raise ValueError(f"net must return twice the channels of {tuple(kept.shape)}; got shape {tuple(raw.shape)}")
        log_scale, shift = ((1 - self.mask) * part for part in raw.chunk(2, dim=1))
        return log_scale / (1 + log_scale.abs() / self.limit), shift

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return affine(z, *self.parameters_of(self.mask * z))

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return affine_inverse(x, *self.parameters_of(self.mask * x))


class ActNorm(Transform):
    r"""A scale and a shift for each channel, :math:`x = z\,e^{s} + t`, learned; `initialize` makes z standard on a first batch.

    The same numbers serve every position of an image, so the log-determinant is (positions) · Σ s.

    Arguments:
        channels: Size of dimension 1.

    Source:
        | Glow (Kingma & Dhariwal, 2018), section 3.1, in the direction from data to noise

    Example:
        >>> layer = ActNorm(2)
        >>> z = layer.initialize(torch.randn(1000, 2) * 5 + 3)
        >>> bool(z.mean().abs() < 1e-4 and (z.std(0) - 1).abs().max() < 1e-3)
        True
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale, self.shift = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return affine(z, along_channels(self.log_scale, z), along_channels(self.shift, z))

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return affine_inverse(x, along_channels(self.log_scale, x), along_channels(self.shift, x))

    def initialize(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            values = x.movedim(1, -1).flatten(0, -2)
            self.shift.copy_(values.mean(0))
            self.log_scale.copy_(values.std(0, correction=0).clamp(min=1e-6).log())
        return super().initialize(x)


class Permutation(Transform):
    """Channels in another order, x = z[:, order]. Volume stays, so the log-determinant is 0.

    Arguments:
        order: The channel of z that comes to each place of x.

    Raises:
        ValueError: If `order` is no permutation.

    Example:
        >>> Permutation([2, 0, 1])(torch.tensor([[10.0, 20.0, 30.0]]))[0].tolist()
        [[30.0, 10.0, 20.0]]
    """

    def __init__(self, order: list[int]):
        super().__init__()
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"order must hold each of 0 … {len(order) - 1} once; got {list(order)}")
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z[:, self.order], z.new_zeros(len(z))

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.order.argsort()], x.new_zeros(len(x))


class InvertibleConv(Transform):
    r"""A learned mix of the channels, the same at each position: :math:`x = W z`, a 1×1 convolution.

    .. math:: \log\Bigl|\det\frac{\partial x}{\partial z}\Bigr| = (\text{positions}) \cdot \log|\det W|

    It starts as a random orthogonal matrix; a permutation is a special case.

    Arguments:
        channels: Size of dimension 1.
        generator: Source of the first W.

    Source:
        | Glow (Kingma & Dhariwal, 2018), section 3.2, eq. 9

    Example:
        >>> bool(InvertibleConv(3)(torch.randn(2, 3, 4, 4))[1].abs().max() < 1e-4)
        True
    """

    def __init__(self, channels: int, generator: torch.Generator | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._mix(self.weight, z), self._log_det(z)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._mix(self.weight.inverse(), x), -self._log_det(x)

    def _log_det(self, x: Tensor) -> Tensor:
        return (x[0, 0].numel() * torch.linalg.slogdet(self.weight).logabsdet).expand(len(x))

    @staticmethod
    def _mix(matrix: Tensor, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 the inverse would not undo the way there
            return torch.einsum("ij,bj...->bi...", matrix, x)


class Planar(Transform):
    r"""A ridge that pushes points along one direction: :math:`x = z + u\,\tanh(w^\top z + b)`. The counterexample.

    .. math:: \Bigl|\det\frac{\partial x}{\partial z}\Bigr| = 1 + u^\top w\,\bigl(1 - \tanh^2(w^\top z + b)\bigr)

    The determinant is cheap. The inverse has no closed form: :math:`a = w^\top z` solves
    :math:`a + u^\top w \tanh(a + b) = w^\top x`, and is found here by halving an interval, 60 times. For the left-hand
    side to rise, u is changed so that :math:`u^\top w > -1`.

    Arguments:
        dim: Dimension of a point.
        generator: Source of the first u and w.

    Source:
        | Variational Inference with Normalizing Flows (Rezende & Mohamed, 2015), eq. 10-12 and appendix A.1

    Example:
        >>> layer, z = Planar(2), torch.randn(5, 2)
        >>> layer.inverse(layer(z)[0])[0].allclose(z, atol=1e-5)
        True
    """

    def __init__(self, dim: int, generator: torch.Generator | None = None):
        super().__init__()
        self.raw = nn.Parameter(torch.randn(dim, generator=generator))
        self.w = nn.Parameter(torch.randn(dim, generator=generator))
        self.b = nn.Parameter(torch.zeros(()))

    @property
    def u(self) -> Tensor:
        """The direction of the push, with uᵀw > −1 up to rounding."""
        along = self.raw @ self.w
        return self.raw + (nn.functional.softplus(along) - 1 - along) * self.w / self.w.square().sum()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        ridge = torch.tanh(z @ self.w + self.b)
        return z + ridge[:, None] * self.u, torch.log1p((self.u @ self.w) * (1 - ridge**2))

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        along, slope = x @ self.w, self.u @ self.w
        with torch.no_grad():
            low, high = along - slope.abs(), along + slope.abs()  # as |tanh| < 1
            for _ in range(60):
                a = (low + high) / 2
                below = a + slope * torch.tanh(a + self.b) < along
                low, high = torch.where(below, a, low), torch.where(below, high, a)
        ridge = torch.tanh(a + self.b)
        rise = (1 + slope * (1 - ridge**2)).detach()
        a = a - (a + slope * ridge - along) / rise  # a step of Newton: it hardly moves a, and gives it its gradient
        z = x - torch.tanh(a + self.b)[:, None] * self.u
        return z, -self.forward(z)[1]


def total(values: Tensor) -> Tensor:
    """The sum over everything but the batch, shape (B,)."""
    return values.flatten(1).sum(1)


def along_channels(values: Tensor, like: Tensor) -> Tensor:
    """One number for each channel, shaped to broadcast along dimension 1."""
    return values.reshape(-1, *[1] * (like.ndim - 2))
