"""DDPM: one random step of the reverse chain."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dgm_course.paths.base import GaussianPath, Time, expand
from dgm_course.samplers.grid import apply, checked_grid, coefficient_rows, noise_like, watched

__all__ = ["ddpm", "ddpm_coefficients", "ddpm_step"]


def ddpm_step(
    path: GaussianPath, xt: Tensor, x0: Tensor, t: Time, s: Time, *, variance: str = "beta", noise: Tensor | None = None
) -> Tensor:
    r"""Draw :math:`x_s \sim p_\theta(x_s \mid x_t)`: the mean of q(x_s given x_t, x̂_0), and noise of variance Σ_θ.

    .. math:: x_s = \tfrac{a\sigma_s^2}{\sigma_t^2}x_t + \tfrac{\alpha_s v}{\sigma_t^2}\hat x_0 + \sqrt{\Sigma_\theta}\,z,
              \qquad a = \alpha_t/\alpha_s,\quad v = \sigma_t^2 - a^2\sigma_s^2

    Arguments:
        path: The Gaussian path.
        xt: State at t, shape (B, …).
        x0: The denoiser's x̂_0(x_t, t), same shape.
        t, s: Times with s < t; numbers, or tensors of shape (B,).
        variance: Σ_θ, "beta" for v (β_t on the chain) or "posterior" for v·σ_s²/σ_t² (β̃_t). Where σ_s = 0 it is 0.
        noise: z, same shape as `xt`; without it the mean is returned.

    Raises:
        ValueError: If s ≥ t, the shapes differ, or `variance` is unknown.

    Source:
        | Slide "Algorithm 2 Sampling"; Ho et al. (2020), section 3.2
    """
    return apply(ddpm_coefficients(path, t, s, variance), xt, x0, noise)


def ddpm(
    denoiser: Callable,
    path: GaussianPath,
    x: Tensor,
    times,
    *,
    variance: str | Callable = "beta",
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    r"""Ancestral sampling: the lecture's Algorithm 2, on any grid of times.

    Arguments:
        denoiser: (x_t, t) → x̂_0.
        path: The Gaussian path.
        x: The first state, at times[0], shape (B, …): σ(times[0])·noise, as a rule.
        times: Strictly descending, shape (N + 1,). If the last is 0, the last state is x̂_0.
        variance: "beta" or "posterior" as in `ddpm_step`, or a function (x_t, x̂_0, t, s) → Σ_θ, a number, or a
            tensor of shape (B,) or that of x.
        generator: Source of the noise.

    Returns:
        An iterator over the N states after each step.

    Raises:
        ValueError, TypeError: At the call, if an argument does not fit.
        FloatingPointError: At the step where a state is not finite.

    Source:
        | Slide "Algorithm 2 Sampling"; Ho et al. (2020), Algorithm 2

    Example:
        >>> from dgm_course.paths import Cosine
        >>> from dgm_course.samplers import last
        >>> states = ddpm(lambda xt, t: torch.ones_like(xt), Cosine(), torch.randn(4, 2), Cosine().times(5))
        >>> last(states).unique()
        tensor([1.])
    """
    times = checked_grid(path, x, times)
    drawn = callable(variance)
    table = coefficient_rows(x, times, ddpm_coefficients(path, times[:-1], times[1:], "beta" if drawn else variance))

    def states(x):
        for t, s, keep, pull, std in table:
            x0 = denoiser(x, t)
            mean = x.mul(keep).add_(x0, alpha=pull)
            if s > 0 and drawn:
                var = torch.as_tensor(variance(x, x0, t, s), dtype=x.dtype, device=x.device)
                x = mean + (expand(var, x) if var.ndim == 1 else var).sqrt() * noise_like(x, generator)
            else:
                x = mean.add_(noise_like(x, generator), alpha=std) if s > 0 else mean
            yield x

    return watched(states(x), times)


def ddpm_coefficients(path: GaussianPath, t: Time, s: Time, variance: str):
    if variance not in ("beta", "posterior"):
        raise ValueError(f"variance must be 'beta', 'posterior' or, for ddpm, a function; got {variance!r}")
    keep, pull, posterior = path.bridge(s, t)
    var = path.transition(s, t)[1] if variance == "beta" else posterior
    return keep, pull, torch.where(path.sigma(s) > 0, var, 0).clamp(min=0).sqrt()
