"""DDIM, there and back: the first-order solver of the probability-flow ODE. And Heun, of second order."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dgm_course.paths.base import GaussianPath, Time
from dgm_course.samplers.grid import apply, checked_grid, coefficient_rows, noise_like, watched, weighted_sum

__all__ = ["ddim", "ddim_coefficients", "ddim_inversion", "ddim_step", "heun", "heun_step"]

# DDIM: the same marginals with less noise, or none --------------------------------------------------------------------


def ddim_step(
    path: GaussianPath, xt: Tensor, x0: Tensor, t: Time, s: Time, eta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    r"""Move x̂_0 and ε̂ to time s, with a share η of the posterior's noise drawn anew.

    .. math:: x_s = \alpha_s\hat x_0 + \sqrt{\sigma_s^2 - \eta^2\tilde\beta}\;\hat\epsilon + \eta\sqrt{\tilde\beta}\,z,
              \qquad \hat\epsilon = (x_t - \alpha_t\hat x_0)/\sigma_t

    η = 0 is deterministic; η = 1 is `ddpm_step` with the posterior's variance β̃.

    Arguments:
        path: The Gaussian path.
        xt: State at t, shape (B, …).
        x0: The denoiser's x̂_0(x_t, t), same shape.
        t, s: Times with s < t; numbers, or tensors of shape (B,).
        eta: Share of noise in [0, 1].
        noise: z, same shape as `xt`; needed if eta > 0.

    Raises:
        ValueError: If s ≥ t, the shapes differ, eta leaves [0, 1], or the noise is missing.

    Source:
        | Denoising Diffusion Implicit Models (Song et al., 2021), eq. 12 and 16 (its α_t is the lecture's ᾱ_t)
    """
    if eta and noise is None:
        raise ValueError(f"noise must be given for eta = {eta}; got None")
    return apply(ddim_coefficients(path, t, s, eta), xt, x0, noise)


def ddim(
    denoiser: Callable,
    path: GaussianPath,
    x: Tensor,
    times,
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    r"""Denoising diffusion implicit models: with η = 0 a first-order solver of the probability-flow ODE.

    Arguments, Returns and Raises as for `ddpm`; `eta` as in `ddim_step`.

    Source:
        | Denoising Diffusion Implicit Models (Song et al., 2021), section 4

    Example:
        >>> from dgm_course.paths import Cosine
        >>> states = ddim(lambda xt, t: torch.ones_like(xt), Cosine(), torch.randn(4, 2), [1.0, 0.5, 0.0])
        >>> [tuple(x.shape) for x in states]
        [(4, 2), (4, 2)]
    """
    times = checked_grid(path, x, times)
    table = coefficient_rows(x, times, ddim_coefficients(path, times[:-1], times[1:], eta))

    def states(x):
        for t, _s, keep, pull, std in table:
            x = x.mul(keep).add_(denoiser(x, t), alpha=pull)
            if std:
                x.add_(noise_like(x, generator), alpha=std)
            yield x

    return watched(states(x), times)


def ddim_inversion(denoiser: Callable, path: GaussianPath, x: Tensor, times) -> Iterator[Tensor]:
    r"""DDIM backwards, from data to noise: an Euler step of the same ODE in the other direction.

    .. math:: x_t = \alpha_t\hat x_0(x_s, s) + \tfrac{\sigma_t}{\sigma_s}\bigl(x_s - \alpha_s\hat x_0(x_s, s)\bigr)

    `ddim` on the reversed grid leads back to nearly the same data. Each asks the denoiser at its own end of a step, so the two cancel up
    to an error that falls like the length of the steps.

    Arguments:
        denoiser: (x_t, t) → x̂_0.
        path: The Gaussian path.
        x: The state at times[0], shape (B, …): data, or data with a little noise.
        times: Strictly ascending, shape (N + 1,), from a time above 0: at σ = 0 there is no noise to ask for.

    Returns:
        An iterator over the N states after each step.

    Raises:
        ValueError, TypeError: At the call, if an argument does not fit.
        FloatingPointError: At the step where a state is not finite.

    Source:
        | Denoising Diffusion Implicit Models (Song et al., 2021), section 4.3 and eq. 14

    Example:
        >>> from dgm_course.paths import Cosine
        >>> states = ddim_inversion(lambda xt, t: torch.zeros_like(xt), Cosine(), torch.ones(1, 1), [0.5, 1.0])
        >>> [round(x.item(), 4) for x in states]
        [1.4142]
    """
    ascending = torch.atleast_1d(torch.as_tensor(times, dtype=torch.float64))
    if ascending.ndim != 1 or len(ascending) < 2 or not bool((ascending.diff() > 0).all()):
        raise ValueError(f"times must be strictly ascending, shape (N + 1,) with N ≥ 1; got {ascending.tolist()}")
    checked_grid(path, x, ascending.flip(0))
    s, t = ascending[:-1], ascending[1:]
    if not path.sigma(s[0]) > 0:
        raise ValueError(f"times must start where σ > 0; got {s[0]:g} as the first")
    keep = path.sigma(t) / path.sigma(s)
    table = coefficient_rows(x, ascending, (keep, path.alpha(t) - keep * path.alpha(s)))

    def states(x):
        for s, _t, keep, pull in table:
            x = x.mul(keep).add_(denoiser(x, s), alpha=pull)
            yield x

    return watched(states(x), ascending)


def ddim_coefficients(path: GaussianPath, t: Time, s: Time, eta: float):
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1]; got {eta}")
    alpha_s, var_s, alpha_t, var_t = path.ends(s, t)
    posterior = (var_t - (alpha_t / alpha_s) ** 2 * var_s) * var_s / var_t
    keep = ((var_s - eta**2 * posterior).clamp(min=0) / var_t).sqrt()
    return keep, alpha_s - keep * alpha_t, eta * posterior.sqrt()


# Heun: go, look, and average the two directions -----------------------------------------------------------------------


def heun_step(denoiser: Callable, path: GaussianPath, xt: Tensor, t: Time, s: Time) -> Tensor:
    r"""A step of the probability-flow ODE by Heun's rule, second order, two evaluations.

    In the variables :math:`\bar x = x/\alpha` and :math:`\bar\sigma = \sigma/\alpha` the ODE is
    :math:`d\bar x/d\bar\sigma = \hat\epsilon`. An Euler step in them is DDIM; Heun repeats it with the mean of ε̂ at both ends:

    .. math:: x_s = \tfrac{\alpha_s}{\alpha_t}x_t + \alpha_s(\bar\sigma_s - \bar\sigma_t)\,\tfrac{\hat\epsilon_t + \hat\epsilon_s}{2}

    Where α_t = 0 or σ_s = 0 one end has no ε̂ or an infinite σ̄, and the DDIM step is kept.

    Arguments:
        denoiser: (x_t, t) → x̂_0.
        path: The Gaussian path.
        xt: State at t, shape (B, …).
        t, s: Numbers with s < t.

    Source:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), Algorithm 1
    """
    coefficients = [c.item() for c in _heun_coefficients(path, t, s)]
    return _heun(denoiser, xt, float(t), float(s), *coefficients)


def heun(denoiser: Callable, path: GaussianPath, x: Tensor, times) -> Iterator[Tensor]:
    """Heun's second-order solver of the probability-flow ODE; two evaluations a step, see `heun_step`.

    Arguments, Returns and Raises as for `ddpm`.

    Source:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), Algorithm 1
    """
    times = checked_grid(path, x, times)
    table = coefficient_rows(x, times, _heun_coefficients(path, times[:-1], times[1:]))

    def states(x):
        for row in table:
            x = _heun(denoiser, x, *row)
            yield x

    return watched(states(x), times)


def _heun(denoiser, x, t, s, keep, pull, stay, old, half_t, half_s):
    x0 = denoiser(x, t)
    ahead = x.mul(keep).add_(x0, alpha=pull)
    if not math.isfinite(stay) or not math.isfinite(half_s):
        return ahead
    return weighted_sum((stay, x), (old, x0), (half_s, ahead), (half_t, denoiser(ahead, s)))


def _heun_coefficients(path: GaussianPath, t: Time, s: Time):
    alpha_s, var_s, alpha_t, var_t = path.ends(s, t)
    sigma_s, sigma_t = var_s.sqrt(), var_t.sqrt()
    keep = sigma_s / sigma_t
    half = (sigma_s - sigma_t * alpha_s / alpha_t) / 2  # multiplies ε̂_t + ε̂_s, where ε̂ = (x − α·x̂_0)/σ
    stay, old = alpha_s / alpha_t + half / sigma_t, -half * alpha_t / sigma_t
    return keep, alpha_s - keep * alpha_t, stay, old, -half * alpha_s / sigma_s, half / sigma_s
