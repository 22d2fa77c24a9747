r"""Noise schedules for the lecture's chain: each returns β_1 … β_T, float64, for :class:`dgm_course.paths.DiscretePath`.

The published numbers belong to T = 1000. With another T the same β would add more or less noise in all, so the constant,
linear and quadratic schedules scale with 1000/T.
"""

import math

import torch
from torch import Tensor

from dgm_course.paths import DiscretePath, Sigmoid

__all__ = ["constant_betas", "linear_betas", "quadratic_betas", "cosine_betas", "sigmoid_betas", "zero_terminal"]


def _check(T: int, **betas: float) -> None:
    if not (isinstance(T, int) and T >= 1):
        raise ValueError(f"T must be a whole number of at least 1; got {T!r}")
    for name, beta in betas.items():
        if not 0 < beta <= 1:
            raise ValueError(f"{name}, scaled by 1000/T, must lie in (0, 1]; got {beta:g} for T = {T}")


def constant_betas(T: int = 1000, beta: float = 0.01) -> Tensor:
    r"""The same noise in every step, :math:`\beta_t = \beta\cdot 1000/T`.

    Source:
        | Slide "Noise schedule"; Ho et al. (2020), appendix B

    Example:
        >>> constant_betas(500).unique().tolist()
        [0.02]
    """
    return linear_betas(T, beta, beta)


def linear_betas(T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    r"""DDPM's schedule, even steps from :math:`\beta_1 = 10^{-4}` to :math:`\beta_T = 0.02`, both times 1000/T.

    Arguments:
        T: Number of steps.
        first, last: β_1 and β_T as they would be at T = 1000.

    Raises:
        ValueError: If T is no positive whole number, or a scaled β leaves (0, 1] (T too small).

    Source:
        | Slide "Noise schedule"; Ho et al. (2020), section 4; the scaling is that of Improved DDPM's code

    Example:
        >>> betas = linear_betas(1000)
        >>> f"{(1 - betas).prod():.2e}"
        '4.04e-05'
    """
    _check(T)
    first, last = 1000 / T * first, 1000 / T * last
    _check(T, first=first, last=last)
    return torch.linspace(first, last, T, dtype=torch.float64)


def quadratic_betas(T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    r"""Even steps of :math:`\sqrt{\beta_t}`: less noise early than the linear schedule between the same ends.

    Source:
        | Slide "Noise schedule"; Ho et al. (2020), appendix B

    Example:
        >>> quadratic_betas(1000)[[0, -1]].tolist()
        [0.0001, 0.02]
    """
    first, last = linear_betas(T, first, last)[[0, -1]].sqrt().tolist()
    return torch.linspace(first, last, T, dtype=torch.float64) ** 2


def cosine_betas(T: int = 1000, offset: float = 0.008, clip: float = 0.999) -> Tensor:
    r"""Improved DDPM's schedule, from :math:`\bar\alpha_t \propto \cos^2\bigl(\tfrac{t/T + o}{1 + o}\tfrac{\pi}{2}\bigr)`.

    .. math:: \beta_t = \min\bigl(1 - f(t)/f(t-1),\ 0.999\bigr), \qquad f(t) = \cos^2\bigl(\tfrac{t/T+o}{1+o}\tfrac\pi2\bigr)

    The clip acts on the last step only; without it β_T = 1 and x_T would hold no trace of x_0.

    Arguments:
        T: Number of steps.
        offset: Keeps β_1 from vanishing, in units of T.
        clip: Largest β allowed, in (0, 1]; 1 gives zero terminal signal.

    Source:
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eq. 17

    Example:
        >>> betas = cosine_betas(1000)
        >>> (betas == 0.999).sum().item()
        1
    """
    _check(T, clip=clip)
    if not offset >= 0:
        raise ValueError(f"offset must be at least 0; got {offset!r}")
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.sin(math.pi / 2 * (1 - t) / (1 + offset)) ** 2  # cos² of the complement, exactly 0 at t = T
    return (1 - f[1:] / f[:-1]).clamp(max=clip)


def sigmoid_betas(
    T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, clip: float = 0.999
) -> Tensor:
    r"""The chain whose ᾱ_t follow :class:`dgm_course.paths.Sigmoid` at t/T: :math:`\beta_t = 1 - \bar\alpha_t/\bar\alpha_{t-1}`, clipped.

    Source:
        | On the Importance of Noise Scheduling for Diffusion Models (Chen, 2023), Algorithm 1

    Example:
        >>> sigmoid_betas(1000)[-1].item()
        0.999
    """
    _check(T, clip=clip)
    alpha_bars = Sigmoid(start, end, tau).alpha(torch.arange(T + 1, dtype=torch.float64) / T) ** 2
    return (1 - alpha_bars[1:] / alpha_bars[:-1]).clamp(max=clip)


def zero_terminal(betas: Tensor) -> Tensor:
    r"""A schedule with the last trace of signal taken out: α is moved down to 0 at T, and stretched to keep its start.

    .. math:: \alpha'_t = \alpha_1\,\frac{\alpha_t - \alpha_T}{\alpha_1 - \alpha_T}, \qquad \alpha_t = \sqrt{\bar\alpha_t}

    Its β_T is 1. There x_T is pure noise, so noise prediction says nothing about x_0: predict v or x_0.

    Arguments:
        betas: β_1 … β_T, in (0, 1], at least two.

    Raises:
        ValueError: If the shape or a value does not fit.

    Source:
        | Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2024), algorithm 1

    Example:
        >>> betas = zero_terminal(linear_betas(1000))
        >>> betas[-1].item(), f"{betas[0]:.2e}"
        (1.0, '1.00e-04')
    """
    alpha = DiscretePath(betas).alpha_bars.sqrt()
    if len(alpha) < 3:
        raise ValueError(f"betas must be at least two; got {len(alpha) - 1}")
    alpha[1:] = alpha[1] * (alpha[1:] - alpha[-1]) / (alpha[1] - alpha[-1])
    return 1 - (alpha[1:] / alpha[:-1]) ** 2
