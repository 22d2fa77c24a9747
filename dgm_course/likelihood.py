r"""How probable a model finds data: the variational bound on −log p_θ(x_0) term by term, and the density of its ODE."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dgm_course import losses
from dgm_course.denoisers import read_as
from dgm_course.paths.base import GaussianPath, Time, expand
from dgm_course.samplers import checked_grid

__all__ = ["bits_per_dim", "bound", "ode_log_prob", "prior_term"]


@torch.no_grad()
def bound(
    d: Callable,
    path: GaussianPath,
    x0: Tensor,
    times,
    *,
    variance: str | float = "beta",
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


@torch.no_grad()
def ode_log_prob(
    d: Callable,
    path: GaussianPath,
    x0: Tensor,
    times=None,
    *,
    probes: int | None = None,
    prior_log_prob: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The log-density of the model whose samples are drawn by the probability-flow ODE, a continuous normalizing flow.

    .. math:: \log p_{t_{min}}(x) = \log p_1(x_1) + \int_{t_{min}}^1 \mathrm{tr}\,\nabla_x u(x_t, t)\,dt,
              \qquad \dot x_t = u(x_t, t) = \alpha'\hat x_0 + \sigma'\hat\epsilon

    State and integral are carried together, from the data to the noise, by the classical Runge–Kutta rule: four evaluations for a
    step of length h, an error of order h⁴.

    Arguments:
        d: A denoiser (x_t, t) → x̂_0 that can be differentiated.
        path: A continuous Gaussian path.
        x0: Data, shape (B, …), taken as the state at t_min.
        times: Strictly descending, as for a sampler, shape (N + 1,); the last is t_min > 0. If not given, 150 steps from 1 to 1e-5, short
            near the data.
        probes: Number of directions of random signs for Hutchinson's estimate of the trace, drawn once; each costs one
            gradient. Without it the trace is exact, at one gradient for each value in a sample.
        prior_log_prob: The log-density of x at times[0], (B, …) → (B,); that of N(0, I) if not given.
        generator: Source of the probes.

    Returns:
        Nats for each sample, shape (B,), in the units of `x0`: a density, not yet a probability of grey levels.

    Raises:
        ValueError: If the times do not descend to some t_min > 0, or `probes` is below 1.

    Source:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), section 4.3 and appendix D; Neural Ordinary
        | Differential Equations (Chen et al., 2018), theorem 1

    Example:
        >>> from dgm_course.paths import Cosine
        >>> from dgm_course.toy import GaussianMixture
        >>> normal = GaussianMixture(torch.zeros(1, 2), 1.0)
        >>> round(ode_log_prob(normal.denoiser(Cosine()), Cosine(), torch.zeros(1, 2)).item(), 4)  # −log 2π
        -1.8379
    """
    if times is None:
        times = 1e-5 + (1 - 1e-5) * torch.linspace(1, 0, 151, dtype=torch.float64) ** 2
    times = checked_grid(path, x0, times).flip(0).tolist()
    if times[0] == 0:
        raise ValueError(
            "times must end in some t_min > 0: at 0 the score of data on a surface is infinite; got 0 as the last"
        )
    if probes is not None and not (isinstance(probes, int) and probes >= 1):
        raise ValueError(f"probes must be a whole number of at least 1, or None for the exact trace; got {probes!r}")
    signs = [torch.randint(2, x0.shape, generator=generator).to(x0) * 2 - 1 for _ in range(probes or 0)] or [None]
    velocity = read_as("velocity", d, path)

    def rates(x, t):
        """How fast the state moves there, and the trace."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = velocity(x, t)
            trace = sum(losses.jacobian_trace(u, x, v).detach() for v in signs) / len(signs)
        return u.detach(), trace

    x, change = x0, 0
    for t, later in pairwise(times):
        h = later - t
        k1, trace1 = rates(x, t)
        k2, trace2 = rates(x + h / 2 * k1, t + h / 2)
        k3, trace3 = rates(x + h / 2 * k2, t + h / 2)
        k4, trace4 = rates(x + h * k3, later)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        change = change + h / 6 * (trace1 + 2 * trace2 + 2 * trace3 + trace4)
    return (prior_log_prob or _log_normal)(x) + change


def _log_normal(x: Tensor) -> Tensor:
    return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)


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
