"""A flow: a standard normal, carried by an invertible transform."""

import math

import torch
from torch import Tensor, nn

from dgm_course.flows.images import Logit, Split, Squeeze, channel_mask, checkerboard, squeeze
from dgm_course.flows.transforms import ActNorm, Composed, Coupling, Transform, total
from dgm_course.nets import ConvCoupler, perceptron
from dgm_course.nets.conv import zero

__all__ = ["Flow", "RealNVP", "coupling_flow"]


class Flow(nn.Module):
    r"""The distribution of x = f(z) with z standard normal, and its exact density.

    .. math:: \log p(x) = \log \mathcal N(z; 0, I) + \log\Bigl|\det\frac{\partial z}{\partial x}\Bigr|, \qquad z = f^{-1}(x)

    Arguments:
        transform: f, from noise to data.
        shape: Shape of one sample; noise has the same.

    Source:
        | Slide "Flow-based model"; Density estimation using Real NVP (Dinh et al., 2017), eq. 2-3

    Example:
        >>> flow = Flow(ActNorm(2), shape=(2,))
        >>> round(flow.log_prob(torch.zeros(1, 2)).item(), 4)
        -1.8379
    """

    def __init__(self, transform: Transform, shape: tuple[int, ...]):
        super().__init__()
        self.transform, self.shape = transform, tuple(shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of x, in nats, shape (B,).

        Raises:
            ValueError: If x is not of shape (B, …) with the shape of one sample.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.shape))}); got {tuple(x.shape)}")
        z, log_det = self.transform.inverse(x)
        return total(-0.5 * z**2 - 0.5 * math.log(2 * math.pi)) + log_det

    @torch.no_grad()
    def sample(self, number: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw samples; a temperature below 1 draws the noise closer to its mode."""
        like = next(self.parameters(), torch.empty(0))  # a flow may have none
        noise = torch.randn(number, *self.shape, generator=generator, dtype=like.dtype, device=like.device)
        return self.transform(temperature * noise)[0]


class RealNVP(Flow):
    """A multi-scale flow for square grey images of numbers in [0, 1].

    From data to noise: logit; at half the resolution couplings with checkerboard masks of the *full* resolution, and with
    channel masks; then half of the channels leave, and the others go through couplings at a quarter of the resolution.
    A normalization per channel stands before each.

    Arguments:
        side: Height and width, a multiple of 4.
        widths: Channels of the coupling networks at the two resolutions.
        blocks: Residual blocks in a coupling network.
        couplings: How many couplings have checkerboard masks, channel masks, and channel masks at the lower resolution.
        margin: That of `Logit`.

    Source:
        | Dinh et al. (2017), section 3.6; the normalization as in Glow (Kingma & Dhariwal, 2018), section 3.1

    Example:
        >>> flow = RealNVP(side=8, widths=(8, 8), blocks=1, couplings=(2, 2, 2))
        >>> flow.log_prob(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        side: int = 28,
        widths: tuple[int, int] = (32, 64),
        blocks: int = 2,
        couplings: tuple[int, int, int] = (4, 4, 8),
        margin: float = 1e-5,
    ):
        if side % 4:
            raise ValueError(f"side must be a multiple of 4; got {side}")

        def layers(channels, width, masks):
            for mask in masks:
                yield Coupling(mask, ConvCoupler(channels, width, blocks))
                yield ActNorm(channels)

        # Folded by `squeeze`, a checkerboard is a mask of whole channels, and the networks work on a quarter of the pixels.
        boards = [squeeze(checkerboard(side, side, i % 2)[None])[0] for i in range(couplings[0])]
        low = [channel_mask(8, i % 2) for i in range(couplings[2])]
        high = [channel_mask(4, i % 2) for i in range(couplings[1])]
        deep = Split(Squeeze(Composed(*layers(8, widths[1], low))))
        folded = Composed(deep, *layers(4, widths[0], high), *layers(4, widths[0], boards))
        super().__init__(Composed(Squeeze(folded), Logit(margin)), (1, side, side))


def coupling_flow(dim: int = 2, depth: int = 8, width: int = 64, limit: float = math.log(1000)) -> Flow:
    """A flow for points: couplings that keep every other coordinate in turn, each with a network of two hidden layers.

    Arguments:
        dim: Dimension of a point, at least 2.
        depth: Number of couplings.
        width: Width of the hidden layers.
        limit: That of `Coupling`; a small one keeps training steady at a high learning rate.

    Example:
        >>> flow = coupling_flow(dim=3, depth=4)
        >>> flow.sample(5).shape, flow.log_prob(torch.zeros(5, 3)).shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    if dim < 2:
        raise ValueError(f"dim must be at least 2, as one coordinate must stay; got {dim}")

    def network() -> nn.Module:
        net = perceptron(dim, width, width, 2 * dim)
        zero(net[-1])  # the flow starts as the identity
        return net

    masks = [((torch.arange(dim) + i) % 2).float() for i in range(depth)]
    return Flow(Composed(*(Coupling(mask, network(), limit) for mask in masks)), (dim,))
