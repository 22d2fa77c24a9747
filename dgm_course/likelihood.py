r"""How probable a model finds data: the variational bound on −log p_θ(x_0), term by term."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dgm_course import losses
from dgm_course.paths.base import GaussianPath, Time, expand
from dgm_course.samplers import checked_grid

__all__ = ["bits_per_dim", "bound", "prior_term"]


@torch.no_grad()
def bound(
    d: Callable,
    path: GaussianPath,
    x0: Tensor,
    times,
    *,
    variance: str = "beta",
    bins: int | None = None,
    prior_std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The terms of the variational bound :math:`-\log p_\theta(x_0) \le L_T + \sum_{t>1} L_{t-1} + L_0`, on any path and grid.

    .. math:: L_T = D_{KL}\bigl(q(x_T \mid x_0)\,\Vert\,p(x_T)\bigr),\quad
              L_{t-1} = D_{KL}\bigl(q(x_{t-1} \mid x_t, x_0)\,\Vert\,p_\theta(x_{t-1} \mid x_t)\bigr),\quad
              L_0 = -\log p_\theta(x_0 \mid x_1)

    T, …, 1, 0 count the times of the grid. Each x_t is one draw of q(x_t given x_0), so a term is an unbiased estimate of its
    mean; the sum over terms estimates the bound of the chain that `samplers.ddpm` draws from on the same grid, up to the last
    step: there the bound needs a variance, the sampler draws none.

    Arguments:
        d: A denoiser (x_t, t) → x̂_0.
        path: The Gaussian path.
        x0: Clean data, shape (B, …).
        times: Strictly descending and ending in 0, shape (N,). The chain of the lecture is `path.times(path.T)`.
        variance, bins: Σ_θ and the grey levels of the last step, as in `losses.bound_term`; 256 bins for images.
        prior_std: Standard deviation of p(x_T): 1, or σ(times[0]) on a path whose noise grows beyond 1 (VE).
        generator: Source of the noise.

    Returns:
        Nats, shape (N, B): first L_T, then the terms in the order of `times`, last L_0.

    Raises:
        ValueError: If the times do not descend to 0, or an option does not fit.

    Source:
        | Slide "In summary, our loss function"; Ho et al. (2020), eq. 5

    Example:
        >>> from dgm_course.paths import DiscretePath
        >>> path, x0 = DiscretePath([0.5, 0.5, 0.9]), torch.zeros(4, 2)
        >>> bound(lambda xt, t: torch.zeros_like(xt), path, x0, [3, 2, 1, 0], variance="posterior").shape
        torch.Size([4, 4])
    """
    times = checked_grid(path, x0, times)
    if times[-1] != 0:
        raise ValueError(f"times must end in 0, where the data are; got {times[-1].item():g} as the last")
    terms = [prior_term(path, x0, times[0], prior_std)]
    for t, s in pairwise(times.tolist()):
        eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        xt = path.perturb(x0, t, eps)
        terms.append(losses.bound_term(d, path, x0, xt, s, t, variance=variance, bins=bins))
    return torch.stack(terms)


def prior_term(path: GaussianPath, x0: Tensor, t: Time, prior_std: float = 1.0) -> Tensor:
    r"""What the start of the reverse process costs: how far q(x_T given x_0) is from p(x_T), in nats for each sample.

    .. math:: L_T = \tfrac12 \sum_i \Bigl(\frac{\alpha_T^2 x_{0,i}^2}{s^2} + \frac{\sigma_T^2}{s^2} - 1
              - \log\frac{\sigma_T^2}{s^2}\Bigr), \qquad p(x_T) = \mathcal N(0, s^2 I)

    Arguments:
        path: The Gaussian path.
        x0: Clean data, shape (B, …).
        t: The time T at which the reverse process starts.
        prior_std: s.

    Raises:
        ValueError: If s is not positive.

    Source:
        | Slide "In summary, our loss function", first term; Ho et al. (2020), eq. 5

    Example:
        >>> from dgm_course.paths import Cosine
        >>> prior_term(Cosine(), torch.ones(3, 2), 1.0).tolist()
        [0.0, 0.0, 0.0]
    """
    if not prior_std > 0:
        raise ValueError(f"prior_std must be positive; got {prior_std}")
    ratio = path.sigma(t) ** 2 / prior_std**2
    mean = expand(path.alpha(t) / prior_std, x0) * x0
    return 0.5 * (mean.square() + expand(ratio - 1 - ratio.log(), x0)).flatten(1).sum(1)


def bits_per_dim(nats: Tensor, x0: Tensor) -> Tensor:
    r"""Nats for a sample, as bits for one of its values: :math:`\text{nats} / (D \log 2)`, with D values in a sample.

    Of images in 8 bits, an even guess over all grey levels costs 8. Only with `bins` is the bound that of the 8-bit image.

    Arguments:
        nats: Any shape.
        x0: The data that they belong to, shape (B, …); only its shape is used.

    Source:
        | Density estimation using Real NVP (Dinh et al., 2017), section 4.1

    Example:
        >>> bits_per_dim(torch.tensor(784 * math.log(256)), torch.zeros(1, 1, 28, 28)).item()
        8.0
    """
    return nats / (x0[0].numel() * math.log(2))
