"""DDPM: one random step of the reverse chain."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dgm_course.denoisers import with_fraction
from dgm_course.paths.base import GaussianPath, Time, expand, same_shape
from dgm_course.samplers.grid import apply, checked_grid, coefficient_rows, noise_like, watched

__all__ = ["ddpm", "ddpm_coefficients", "ddpm_step"]


def ddpm_step(
    path: GaussianPath,
    xt: Tensor,
    x0: Tensor,
    t: Time,
    s: Time,
    *,
    variance: str | float | Tensor = "beta",
    noise: Tensor | None = None,
) -> Tensor:
    r"""Draw :math:`x_s \sim p_\theta(x_s \mid x_t)`: the mean of q(x_s given x_t, x̂_0), and noise of variance Σ_θ.

    .. math:: x_s = \tfrac{a\sigma_s^2}{\sigma_t^2}x_t + \tfrac{\alpha_s v}{\sigma_t^2}\hat x_0 + \sqrt{\Sigma_\theta}\,z,
              \qquad a = \alpha_t/\alpha_s,\quad v = \sigma_t^2 - a^2\sigma_s^2

    Arguments:
        path: The Gaussian path.
        xt: State at t, shape (B, …).
        x0: The denoiser's x̂_0(x_t, t), same shape.
        t, s: Times with s < t; numbers, or tensors of shape (B,).
        variance: Σ_θ, "beta" for v (β_t on the chain), "posterior" for v·σ_s²/σ_t² (β̃_t), or between them a number in [0, 1] or the
            fraction that a network says, of the shape of `xt`; see `GaussianPath.log_variance`. Where σ_s = 0 it is 0.
        noise: z, same shape as `xt`; without it the mean is returned.

    Raises:
        ValueError: If s ≥ t, the shapes differ, or `variance` is unknown.

    Source:
        | Slide "Algorithm 2 Sampling"; Ho et al. (2020), section 3.2; Classifier-Free Diffusion Guidance (Ho & Salimans, 2022),
        | Algorithm 2, for the number; Improved DDPM (Nichol & Dhariwal, 2021), eq. 15, for the fraction
    """
    if not isinstance(variance, Tensor):
        return apply(ddpm_coefficients(path, t, s, variance), xt, x0, noise)
    mean = apply(ddpm_coefficients(path, t, s, "beta"), xt, x0, None)
    if noise is None:
        return mean
    same_shape(xt=xt, variance=variance, noise=noise)
    std = (0.5 * path.log_variance(s, t, variance)).exp()
    return torch.where(expand(path.sigma(s), xt) > 0, mean + std * noise, mean)


def ddpm(
    denoiser: Callable,
    path: GaussianPath,
    x: Tensor,
    times,
    *,
    variance: str | float | Callable = "beta",
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    r"""Ancestral sampling: the lecture's Algorithm 2, on any grid of times.

    Arguments:
        denoiser: (x_t, t) → x̂_0; if the variance is learned, (x_t, t) → (x̂_0, fraction), as `Denoiser.with_variance`.
        path: The Gaussian path.
        x: The first state, at times[0], shape (B, …): σ(times[0])·noise, as a rule.
        times: Strictly descending, shape (N + 1,). If the last is 0, the last state is x̂_0.
        variance: "beta", "posterior" or a number in [0, 1] as in `ddpm_step`; "learned"; or a function (x_t, x̂_0, t, s) → Σ_θ,
            whose value is a number, or a tensor of shape (B,) or that of x.
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
    if isinstance(variance, str) and variance not in ("beta", "posterior", "learned"):
        asked = "'beta', 'posterior' or a number in [0, 1], or 'learned', or a function"
        raise ValueError(f"variance must be {asked}; got {variance!r}")
    if callable(variance) or variance == "learned":
        return watched(_drawn(denoiser, path, x, times, variance, generator), times)
    table = coefficient_rows(x, times, ddpm_coefficients(path, times[:-1], times[1:], variance))

    def states(x):
        for t, s, keep, pull, std in table:
            x = x.mul(keep).add_(denoiser(x, t), alpha=pull)
            yield x.add_(noise_like(x, generator), alpha=std) if s > 0 else x

    return watched(states(x), times)


def _drawn(denoiser, path, x, times, variance, generator):
    """`ddpm` where Σ_θ depends on the state: a function gives it, or the network."""
    mean = path.bridge(times[1:], times[:-1])[:2]
    logs = [path.log_variance(times[1:], times[:-1], v) for v in ("posterior", "beta")]
    for t, s, keep, pull, lower, upper in coefficient_rows(x, times, [*mean, *logs]):
        if variance == "learned":
            x0, fraction = with_fraction(denoiser, x, t)
            std = fraction.mul(upper - lower).add_(lower).mul_(0.5).exp_()
        else:
            x0 = denoiser(x, t)
            var = torch.as_tensor(variance(x, x0, t, s), dtype=x.dtype, device=x.device)
            std = (expand(var, x) if var.ndim == 1 else var).sqrt()
        x = x.mul(keep).add_(x0, alpha=pull)
        if s > 0:
            x.addcmul_(std.expand(x.shape), noise_like(x, generator))
        yield x


def ddpm_coefficients(path: GaussianPath, t: Time, s: Time, variance: str | float):
    keep, pull, _ = path.bridge(s, t)
    std = (0.5 * path.log_variance(s, t, variance)).exp()
    return keep, pull, torch.where(path.sigma(s) > 0, std, 0)
