"""What the samplers share: the checked grid of times, the table of coefficients, and the watch over every state."""

import math
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from dgm_course.paths.base import GaussianPath, expand, same_shape

__all__ = ["apply", "checked_grid", "coefficient_rows", "last", "logsnr_times", "noise_like", "watched", "weighted_sum"]


def last(states: Iterator[Tensor]) -> Tensor:
    """The final state of a sampler.

    Example:
        >>> last(iter([torch.zeros(1), torch.ones(1)]))
        tensor([1.])
    """
    (x,) = deque(states, maxlen=1)
    return x


def logsnr_times(path: GaussianPath, steps: int, start: float, end: float) -> Tensor:
    """A grid for samplers: steps of equal length in the log-SNR from `start` down to `end`, then one to 0.

    Arguments:
        path: A continuous path.
        steps: Number of steps in all, at least 2.
        start, end: The first time and the last but one, 0 < end < start, where the log-SNR is finite.

    Returns:
        Times, float64, shape (steps + 1,).

    Raises:
        ValueError: If an argument does not fit, or the path has whole times only.

    Source:
        | DPM-Solver (Lu et al., 2022), section 3.3; Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), Algorithm 2

    Example:
        >>> from dgm_course.paths import Straight
        >>> logsnr_times(Straight(), 3, start=0.9, end=0.1).tolist()
        [0.9, 0.5, 0.1, 0.0]
    """
    if not (isinstance(steps, int) and steps >= 2):
        raise ValueError(f"steps must be a whole number of at least 2; got {steps!r}")
    if not 0 < end < start:
        raise ValueError(f"start and end must satisfy 0 < end < start; got {start} and {end}")
    ends = path.logsnr(torch.tensor([start, end], dtype=torch.float64))
    if not bool(ends.isfinite().all()):
        raise ValueError(
            f"start and end must be times with a finite log-SNR; got {start} and {end}, with {ends.tolist()}"
        )
    inner = path.time_at(torch.linspace(*ends.tolist(), steps, dtype=torch.float64)[1:-1])
    return torch.tensor([start, *inner.tolist(), end, 0.0], dtype=torch.float64)


def checked_grid(path: GaussianPath, x: Tensor, times) -> Tensor:
    """Check what every sampler is given, and evaluate the path on the grid; returns the times as float64."""
    if not isinstance(path, GaussianPath):
        raise TypeError(f"path must be a GaussianPath; got {type(path).__name__}")
    same_shape(x=x)
    times = times.cpu() if isinstance(times, Tensor) else torch.tensor(times, dtype=torch.float64)  # lists keep digits
    times = path.tabulate(torch.atleast_1d(times))
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
        raise ValueError(f"times must be strictly descending, shape (N + 1,) with N ≥ 1; got {times.tolist()}")
    return times


def coefficient_rows(x: Tensor, times: Tensor, coefficients) -> list[tuple]:
    """A row (t, s, keep, …) for each step: Python floats, but `keep` a 0-d tensor of x's dtype, faster to multiply by."""
    keep, *others = coefficients
    columns = [
        times[:-1].tolist(),
        times[1:].tolist(),
        keep.to(x.dtype).unbind(),
        *(column.tolist() for column in others),
    ]
    return list(zip(*columns, strict=True))


def apply(coefficients, xt: Tensor, x0: Tensor, noise: Tensor | None) -> Tensor:
    same_shape(xt=xt, x0=x0, **({} if noise is None else {"noise": noise}))
    keep, pull, std = (expand(c, xt) for c in coefficients)
    mean = keep * xt + pull * x0
    return mean if noise is None else mean + std * noise


def weighted_sum(*terms: tuple[float, Tensor]) -> Tensor:
    (first, x), *rest = terms
    out = x.mul(first)
    for factor, tensor in rest:
        out.add_(tensor, alpha=factor)
    return out


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


@torch.no_grad()  # on a generator function it holds while the sampler runs, and not while its caller does
def watched(states: Iterator[Tensor], times: Tensor) -> Iterator[Tensor]:
    for step, x in enumerate(states):
        if not math.isfinite(x.sum()):  # the sum is finite only if every value is
            t, s = times[step : step + 2].tolist()
            raise FloatingPointError(
                f"the state is not finite after step {step + 1} of {len(times) - 1}, from t = {t:g} to {s:g}"
            )
        yield x
