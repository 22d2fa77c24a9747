"""For students: jump further than the next time, and come back up to it with fresh noise."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dgm_course.paths.base import GaussianPath, Time
from dgm_course.samplers.grid import apply, checked_grid, coefficient_rows, noise_like, watched

__all__ = ["overshoot", "overshoot_step"]


def overshoot_step(
    path: GaussianPath, xt: Tensor, x0: Tensor, t: Time, low: Time, s: Time, noise: Tensor | None = None
) -> Tensor:
    r"""Go from t down to `low` by DDIM, then up to s by the forward process.

    .. math:: x_s = \tfrac{\alpha_s}{\alpha_l}\,x_l + \sqrt{\sigma_s^2 - \tfrac{\alpha_s^2}{\alpha_l^2}\sigma_l^2}\;z,
              \qquad x_l = \alpha_l\hat x_0 + \sigma_l\,\frac{x_t - \alpha_t\hat x_0}{\sigma_t}

    With low = s this is DDIM. With low = 0 nothing of x_t is left but x̂_0: :math:`x_s = \alpha_s\hat x_0 + \sigma_s z`, if σ_0 = 0.

    Arguments:
        path: The Gaussian path.
        xt: State at t, shape (B, …).
        x0: The student's x̂_0(x_t, t), meant for the jump from t to `low`; same shape.
        t, low, s: Times with low ≤ s < t; numbers, or tensors of shape (B,).
        noise: z, same shape as `xt`; needed if low < s.

    Raises:
        ValueError: Unless low ≤ s < t everywhere; if the shapes differ, or the noise is missing.

    Source:
        | On Distillation of Guided Diffusion Models (Meng et al., 2023), section 3.3, for low below s; Consistency Models (Song et
        | al., 2023), Algorithm 1, for low = 0
    """
    coefficients = overshoot_coefficients(path, t, low, s)
    if noise is None and bool((coefficients[2] > 0).any()):
        raise ValueError("noise must be given where low < s; got None")
    return apply(coefficients, xt, x0, noise)


def overshoot(
    denoiser: Callable,
    path: GaussianPath,
    x: Tensor,
    times,
    *,
    low=None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    r"""The stochastic sampler of a student: every jump goes as far as it is meant to, and noise brings it back up to the next time.

    Without `low` it is `ddim`. A student for jumps of 1/4 can be asked at every eighth, times = [1, 7/8, 6/8, …, 2/8, 0] with
    low = [6/8, 5/8, 4/8, …, 0]: the sampler of Meng et al., whose end is a little different. With low = [0, …, 0] it is multistep
    consistency sampling.

    Arguments:
        denoiser: (x_t, t) → x̂_0, at times[i] meant for the jump to low[i].
        path: The Gaussian path.
        x: The first state, at times[0], shape (B, …): σ(times[0])·noise, as a rule.
        times: Strictly descending, shape (N + 1,).
        low: Where each jump ends, shape (N,), low[i] ≤ times[i + 1]; the next time if not given.
        generator: Source of the noise.

    Returns:
        An iterator over the N states after each evaluation.

    Raises:
        ValueError, TypeError: At the call, if an argument does not fit.
        FloatingPointError: At the step where a state is not finite.

    Source:
        | On Distillation of Guided Diffusion Models (Meng et al., 2023), section 3.3; Consistency Models (Song et al., 2023),
        | Algorithm 1

    Example:
        >>> from dgm_course.paths import Cosine
        >>> states = overshoot(lambda xt, t: torch.ones_like(xt), Cosine(), torch.randn(4, 2), [1.0, 0.5, 0.0], low=[0.0, 0.0])
        >>> [tuple(x.shape) for x in states]
        [(4, 2), (4, 2)]
    """
    times = checked_grid(path, x, times)
    low = times[1:] if low is None else torch.as_tensor(low, dtype=torch.float64)
    if low.shape != times[1:].shape:
        raise ValueError(f"low must have shape ({len(times) - 1},), one for each jump; got {tuple(low.shape)}")
    table = coefficient_rows(x, times, overshoot_coefficients(path, times[:-1], low, times[1:]))

    def states(x):
        for t, _s, keep, pull, std in table:
            x = x.mul(keep).add_(denoiser(x, t), alpha=pull)
            if std:
                x.add_(noise_like(x, generator), alpha=std)
            yield x

    return watched(states(x), times)


def overshoot_coefficients(path: GaussianPath, t: Time, low: Time, s: Time):
    alpha_s, var_s, alpha_t, var_t = path.ends(s, t)
    low = path._time(low, "low")
    if not bool((low <= path._time(s, "s") + 1e-12).all()):  # low = t − 1/N may round to just above s
        raise ValueError(f"low must not be above s; got low = {low.tolist()} and s = {s}")
    alpha_low, var_low, *_ = path.ends(low, t)
    up = alpha_s / alpha_low
    keep = up * (var_low / var_t).sqrt()
    fresh = (var_s - up**2 * var_low).clamp(min=0)  # variance that the way from low up to s adds
    return keep, alpha_s - keep * alpha_t, fresh.sqrt()
