"""DDIM, and the second-order solvers of the probability-flow ODE: Heun and DPM-Solver++(2M)."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dgm_course.paths.base import GaussianPath, Time, expand, same_shape
from dgm_course.samplers.grid import apply, checked_grid, coefficient_rows, noise_like, watched, weighted_sum

__all__ = ["ddim", "ddim_step", "dpm_solver_pp_2m", "dpm_solver_pp_2m_step", "heun", "heun_step"]

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
    return apply(_ddim_coefficients(path, t, s, eta), xt, x0, noise)


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
    table = coefficient_rows(x, times, _ddim_coefficients(path, times[:-1], times[1:], eta))

    def states(x):
        for t, _s, keep, pull, std in table:
            x = x.mul(keep).add_(denoiser(x, t), alpha=pull)
            if std:
                x.add_(noise_like(x, generator), alpha=std)
            yield x

    return watched(states(x), times)


def _ddim_coefficients(path: GaussianPath, t: Time, s: Time, eta: float):
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1]; got {eta}")
    alpha_s, var_s, alpha_t, var_t = path.ends(s, t)
    posterior = (var_t - (alpha_t / alpha_s) ** 2 * var_s) * var_s / var_t
    keep = ((var_s - eta**2 * posterior).clamp(min=0) / var_t).sqrt()
    return keep, alpha_s - keep * alpha_t, eta * posterior.sqrt()


# Heun: go, look, and average the two directions -----------------------------------------------------------------------


def heun_step(denoiser: Callable, path: GaussianPath, xt: Tensor, t: Time, s: Time) -> Tensor:
    r"""A step of the probability-flow ODE by Heun's rule, second order, two evaluations.

    In the variables :math:`\bar x = x/\alpha` and :math:`\varsigma = \sigma/\alpha` the ODE is
    :math:`d\bar x/d\varsigma = \hat\epsilon`. An Euler step in them is DDIM; Heun repeats it with the mean of ε̂ at both ends:

    .. math:: x_s = \tfrac{\alpha_s}{\alpha_t}x_t + \alpha_s(\varsigma_s - \varsigma_t)\,\tfrac{\hat\epsilon_t + \hat\epsilon_s}{2}

    Where α_t = 0 or σ_s = 0 one end has no ε̂ or an infinite ς, and the DDIM step is kept.

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


# DPM-Solver++(2M): remember the last x̂_0 ------------------------------------------------------------------------------


def dpm_solver_pp_2m_step(
    path: GaussianPath,
    xt: Tensor,
    x0: Tensor,
    t: Time,
    s: Time,
    x0_before: Tensor | None = None,
    t_before: Time | None = None,
) -> Tensor:
    r"""A second-order step that extrapolates x̂_0 from this time and the one before, linearly in λ, half the log-SNR.

    .. math:: x_s = \tfrac{\sigma_s}{\sigma_t}x_t - \alpha_s(e^{-h}-1)\,D, \qquad
              D = \bigl(1+\tfrac{1}{2r}\bigr)\hat x_0 - \tfrac{1}{2r}\hat x_0^{before}, \qquad
              h = \lambda_s - \lambda_t,\quad r = (\lambda_t - \lambda_{before})/h

    D is the extrapolated x̂_0 in the middle of the step. Without a time before, or where σ_s = 0, the step is DDIM's.

    Arguments:
        path: The Gaussian path.
        xt: State at t, shape (B, …).
        x0, x0_before: x̂_0 at t and at t_before, same shape.
        t, s, t_before: Times with s < t < t_before; numbers, or tensors of shape (B,).

    Raises:
        ValueError: If the times are out of order or the shapes differ.

    Source:
        | DPM-Solver++ (Lu et al., 2022), Algorithm 2 and eq. 4.1-4.2
    """
    if (x0_before is None) != (t_before is None):
        raise ValueError("x0_before and t_before must be given together; got one of them")
    keep, now, before = _dpm_solver_pp_2m_coefficients(path, t, s, t_before)
    out = apply((keep, now, torch.zeros(())), xt, x0, None)
    if x0_before is None:
        return out
    same_shape(xt=xt, x0_before=x0_before)
    return out + expand(before, xt) * x0_before


def dpm_solver_pp_2m(denoiser: Callable, path: GaussianPath, x: Tensor, times) -> Iterator[Tensor]:
    """DPM-Solver++(2M): second order at one evaluation a step, see `dpm_solver_pp_2m_step`.

    Arguments, Returns and Raises as for `ddpm`.

    Source:
        | DPM-Solver++ (Lu et al., 2022), Algorithm 2

    Example:
        >>> from dgm_course.paths import VP
        >>> from dgm_course.samplers import last
        >>> last(dpm_solver_pp_2m(lambda xt, t: torch.ones_like(xt), VP(), torch.randn(1, 2), VP().times(5)))
        tensor([[1., 1.]])
    """
    times = checked_grid(path, x, times)
    first = _dpm_solver_pp_2m_coefficients(path, times[:1], times[1:2], None)
    later = _dpm_solver_pp_2m_coefficients(path, times[1:-1], times[2:], times[:-2])
    table = coefficient_rows(x, times, [torch.cat(pair) for pair in zip(first, later, strict=True)])

    def states(x):
        x0_before = None
        for t, _s, keep, now, before in table:
            x0 = denoiser(x, t)
            x = x.mul(keep).add_(x0, alpha=now)
            if before:
                x.add_(x0_before, alpha=before)
            x0_before = x0
            yield x

    return watched(states(x), times)


def _dpm_solver_pp_2m_coefficients(path: GaussianPath, t: Time, s: Time, t_before: Time | None):
    alpha_s, var_s, alpha_t, var_t = path.ends(s, t)
    lambda_s, lambda_t = alpha_s.log() - var_s.log() / 2, alpha_t.log() - var_t.log() / 2
    h = lambda_s - lambda_t
    keep = (var_s / var_t).sqrt()
    pull = -alpha_s * torch.expm1(-h)
    if t_before is None:
        return keep, pull, 0 * pull
    _, _, alpha_before, var_before = path.ends(t, t_before)
    past = h / (2 * (lambda_t - alpha_before.log() + var_before.log() / 2))  # 1/(2r)
    past = torch.where(h.isfinite(), past, 0)  # σ_s = 0: the last step is first order
    return keep, pull * (1 + past), -pull * past
