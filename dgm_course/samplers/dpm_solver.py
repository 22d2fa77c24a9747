"""DPM-Solver++ of second order: the linear part of the ODE exactly, and x̂_0 by a line in λ, half the log-SNR."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dgm_course.paths.base import GaussianPath, Time, expand, same_shape
from dgm_course.samplers.grid import apply, checked_grid, coefficient_rows, watched, weighted_sum

__all__ = ["dpm_solver_pp_2m", "dpm_solver_pp_2m_step", "dpm_solver_pp_2s", "dpm_solver_pp_2s_step"]

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
    keep, pull, h = _exponential(path, t, s)
    if t_before is None:
        return keep, pull, 0 * pull
    past = h / (2 * _exponential(path, t_before, t)[2])  # 1/(2r)
    past = torch.where(h.isfinite(), past, 0)  # σ_s = 0: the last step is first order
    return keep, pull * (1 + past), -pull * past


def _exponential(path: GaussianPath, t: Time, s: Time):
    """keep and pull of the step x_s = keep·x_t + pull·D that is exact for a constant x̂_0 = D, and its length h in λ."""
    alpha_s, var_s, alpha_t, var_t = path.ends(s, t)
    h = (alpha_s.log() - var_s.log() / 2) - (alpha_t.log() - var_t.log() / 2)
    return (var_s / var_t).sqrt(), -alpha_s * torch.expm1(-h), h


# DPM-Solver++(2S): look into the middle of the step -------------------------------------------------------------------


def dpm_solver_pp_2s_step(denoiser: Callable, path: GaussianPath, xt: Tensor, t: Time, s: Time) -> Tensor:
    r"""A second-order step on its own, with a second evaluation at a time u in the middle of it.

    .. math:: x_u = \tfrac{\sigma_u}{\sigma_t}x_t - \alpha_u(e^{-rh}-1)\,\hat x_0(x_t, t), \qquad
              D = \bigl(1-\tfrac{1}{2r}\bigr)\hat x_0(x_t, t) + \tfrac{1}{2r}\hat x_0(x_u, u), \qquad
              x_s = \tfrac{\sigma_s}{\sigma_t}x_t - \alpha_s(e^{-h}-1)\,D

    with :math:`h = \lambda_s-\lambda_t` and :math:`r = (\lambda_u-\lambda_t)/h`. On a continuous path u has r = ½, and D is the
    second guess alone; on a chain u is the whole time nearest to that. Where α_t = 0 or σ_s = 0, h is infinite and the step is
    DDIM's; so it is on a chain for s = t − 1, which has no time between.

    Arguments:
        denoiser: (x_t, t) → x̂_0.
        path: The Gaussian path.
        xt: State at t, shape (B, …).
        t, s: Numbers with s < t.

    Raises:
        ValueError: If s ≥ t.

    Source:
        | DPM-Solver++ (Lu et al., 2022), Algorithm 1
    """
    ((t, _s, *row),) = _dpm_solver_pp_2s_table(path, xt, torch.tensor([t, s], dtype=torch.float64))
    return _dpm_solver_pp_2s(denoiser, xt, t, *row)


def dpm_solver_pp_2s(denoiser: Callable, path: GaussianPath, x: Tensor, times) -> Iterator[Tensor]:
    """DPM-Solver++(2S): second order, two evaluations a step and no memory, see `dpm_solver_pp_2s_step`.

    Arguments, Returns and Raises as for `ddpm`.

    Source:
        | DPM-Solver++ (Lu et al., 2022), Algorithm 1

    Example:
        >>> from dgm_course.paths import VP
        >>> from dgm_course.samplers import last
        >>> last(dpm_solver_pp_2s(lambda xt, t: torch.ones_like(xt), VP(), torch.randn(1, 2), VP().times(5)))
        tensor([[1., 1.]])
    """
    times = checked_grid(path, x, times)
    table = _dpm_solver_pp_2s_table(path, x, times)

    def states(x):
        for t, _s, *row in table:
            x = _dpm_solver_pp_2s(denoiser, x, t, *row)
            yield x

    return watched(states(x), times)


def _dpm_solver_pp_2s(denoiser, x, t, keep, pull, u, half_keep, half_pull, share):
    x0 = denoiser(x, t)
    if not share:
        return x.mul(keep).add_(x0, alpha=pull)
    ahead = x.mul(half_keep).add_(x0, alpha=half_pull)
    return weighted_sum((keep, x), (pull * (1 - share), x0), (pull * share, denoiser(ahead, u)))


def _dpm_solver_pp_2s_table(path: GaussianPath, x: Tensor, times: Tensor) -> list[tuple]:
    t, s = times[:-1], times[1:]
    keep, pull, h = _exponential(path, t, s)
    u = _middle(path, t, s)
    inside = (s < u) & h.isfinite()
    half_keep, half_pull, part = _exponential(path, t, torch.where(inside, u, s))
    share = torch.where(inside, h / (2 * part), 0)  # 1/(2r)
    path.tabulate(torch.cat([times, u[inside]]))
    return coefficient_rows(x, times, (keep, pull, u, half_keep, half_pull, share))


def _middle(path: GaussianPath, t: Tensor, s: Tensor) -> Tensor:
    """The times half way from t to s in λ, or on a chain the nearest whole ones between; s itself where there is none."""
    half = (path.logsnr(t) + path.logsnr(s)) / 2
    if path.horizon == 1:
        return torch.where(half.isfinite(), path.time_at(torch.where(half.isfinite(), half, path.logsnr(s))), s)
    whole = torch.arange(path.horizon + 1, dtype=torch.float64)
    off = (path.logsnr(whole) - half[:, None]).abs()
    between = (s[:, None] < whole) & (whole < t[:, None])
    return torch.where(between.any(1), torch.where(between, off, torch.inf).argmin(1).double(), s)
