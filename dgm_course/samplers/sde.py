r"""Samplers of the reverse SDE, the corrector that follows a score at one t, and the forward SDE that they undo."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dgm_course.paths.base import GaussianPath, Time, expand, same_shape
from dgm_course.samplers.ancestral import ddpm_coefficients
from dgm_course.samplers.grid import apply, checked_grid, coefficient_rows, noise_like, watched

__all__ = [
    "euler_maruyama",
    "euler_maruyama_step",
    "forward_euler_maruyama",
    "langevin",
    "langevin_step",
    "predictor_corrector",
]

# The forward SDE ------------------------------------------------------------------------------------------------------


def forward_euler_maruyama(
    path: GaussianPath, x: Tensor, times, *, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    r"""Walk from data to noise along the SDE :math:`dx = f(t)\,x\,dt + g(t)\,dw`, by Euler–Maruyama.

    .. math:: x_t = x_s + f(s)\,x_s\,h + g(s)\sqrt h\,z, \qquad h = t - s > 0

    `path.perturb` jumps to the same marginals without error. Here a state follows from the one before, as a path does.

    Arguments:
        path: A continuous Gaussian path.
        x: The state at times[0], shape (B, …).
        times: Strictly ascending, shape (N + 1,).
        generator: Source of the noise.

    Returns:
        An iterator over the N states after each step.

    Raises:
        ValueError, TypeError: At the call, if an argument does not fit, or f or g is infinite at a time but the last.
        FloatingPointError: At the step where a state is not finite.

    Source:
        | Slide "Forward Process is represented as SDE"; Song et al. (2021), eq. 5

    Example:
        >>> from dgm_course.paths import VE
        >>> [tuple(x.shape) for x in forward_euler_maruyama(VE(), torch.zeros(3, 2), [0.0, 0.5, 1.0])]
        [(3, 2), (3, 2)]
    """
    times = torch.as_tensor(times, dtype=torch.float64)
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() > 0).all()):
        raise ValueError(f"times must be strictly ascending, shape (N + 1,) with N ≥ 1; got {times.tolist()}")
    checked_grid(path, x, times.flip(0))
    s, h = times[:-1], times.diff()
    drift, spread = (path.drift(s) * h).tolist(), (path.diffusion2(s) * h).sqrt().tolist()

    def states(x):
        for fh, g_root_h in zip(drift, spread, strict=True):
            x = x.mul(1 + fh).add_(noise_like(x, generator), alpha=g_root_h)
            yield x

    return watched(states(x), times)


# Euler–Maruyama: the predictor ----------------------------------------------------------------------------------------


def euler_maruyama_step(
    path: GaussianPath, xt: Tensor, x0: Tensor, t: Time, s: Time, noise: Tensor | None = None
) -> Tensor:
    r"""A step of the reverse SDE :math:`dx = [f x - g^2\,\nabla\log p_t(x)]\,dt + g\,d\bar w`, back from t to s.

    .. math:: x_s = x_t - \bigl[f(t)\,x_t - g^2(t)\,\hat s\bigr]\,h + g(t)\sqrt h\,z,
              \qquad h = t - s > 0, \quad \hat s = (\alpha_t\hat x_0 - x_t)/\sigma_t^2

    At s = 0, where the score of most data is infinite, it returns x̂_0, the mean of the data given x_t.

    Arguments:
        path: A continuous Gaussian path.
        xt: State at t, shape (B, …).
        x0: The denoiser's x̂_0(x_t, t), same shape.
        t, s: Times with s < t; numbers, or tensors of shape (B,).
        noise: z, same shape as `xt`; without it the mean is returned.

    Raises:
        ValueError: If s ≥ t, the shapes differ, or f or g is infinite at t, as it is at t = 1 where α = 0.

    Source:
        | Slide "Inference consists of two steps", Predictor Step; Song et al. (2021), eq. 6 and appendix E
    """
    return apply(_euler_maruyama_coefficients(path, t, s), xt, x0, noise)


def euler_maruyama(
    denoiser: Callable, path: GaussianPath, x: Tensor, times, *, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Euler–Maruyama on the reverse SDE, one evaluation a step, see `euler_maruyama_step`.

    Arguments, Returns and Raises as for `ddpm`; times[0] must have a finite drift.

    Source:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), section 4.1

    Example:
        >>> from dgm_course.paths import VP
        >>> last = list(euler_maruyama(lambda xt, t: torch.ones_like(xt), VP(), torch.randn(4, 2), VP().times(5)))[-1]
        >>> last.unique()
        tensor([1.])
    """
    times = checked_grid(path, x, times)
    table = coefficient_rows(x, times, _euler_maruyama_coefficients(path, times[:-1], times[1:]))

    def states(x):
        for t, _s, *row in table:
            x = _move(x, denoiser(x, t), *row, generator)
            yield x

    return watched(states(x), times)


def _euler_maruyama_coefficients(path: GaussianPath, t: Time, s: Time):
    alpha_s, var_s, alpha_t, var_t = path.ends(s, t)
    h = torch.as_tensor(t, dtype=torch.float64) - torch.as_tensor(s, dtype=torch.float64)
    noise = path.diffusion2(t) * h  # g²h, the variance of the step
    keep, pull = 1 - path.drift(t) * h - noise / var_t, alpha_t * noise / var_t
    end = var_s == 0
    return torch.where(end, 0, keep), torch.where(end, alpha_s, pull), torch.where(end, 0, noise).sqrt()


def _move(x: Tensor, x0: Tensor, keep: Tensor, pull: float, std: float, generator: torch.Generator | None) -> Tensor:
    x = x.mul(keep).add_(x0, alpha=pull)
    return x.add_(noise_like(x, generator), alpha=std) if std else x


# Langevin: the corrector ----------------------------------------------------------------------------------------------


def langevin_step(xt: Tensor, score: Tensor, step: float | Tensor, noise: Tensor) -> Tensor:
    r"""A step of Langevin dynamics at one fixed t: uphill in log-density, and as much noise as keeps the cloud wide.

    .. math:: x \leftarrow x + \delta\,\nabla\log p_t(x) + \sqrt{2\delta}\,z

    As δ → 0 the density that it leaves unchanged tends to p_t. For :math:`p_t = \mathcal N(0, \sigma^2 I)` its variance is
    too large by the factor :math:`1/(1 - \delta/2\sigma^2)`.

    Arguments:
        xt: State at t, shape (B, …).
        score: The score at `xt`, same shape.
        step: δ > 0, a number or one for each sample, shape (B,).
        noise: z, same shape.

    Raises:
        ValueError: If the shapes differ or δ is not positive.

    Source:
        | Slide "Inference consists of two steps", Corrector Step, whose Δt is this δ and not the predictor's

    Example:
        >>> langevin_step(torch.zeros(1, 1), torch.ones(1, 1), 0.5, torch.ones(1, 1)).item()
        1.5
    """
    same_shape(xt=xt, score=score, noise=noise)
    step = torch.as_tensor(step, dtype=torch.float64)
    if step.ndim and step.shape != xt.shape[:1]:
        raise ValueError(f"step must be a number or have shape ({len(xt)},); got shape {tuple(step.shape)}")
    if not bool((step > 0).all()):
        raise ValueError(f"step must be positive; got {step.tolist()}")
    return xt + expand(step, xt) * score + expand((2 * step).sqrt(), xt) * noise


def langevin(
    denoiser: Callable,
    path: GaussianPath,
    x: Tensor,
    t: float,
    *,
    snr: float = 0.16,
    steps: int = 1,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    r"""Langevin dynamics at one fixed t, its step set by a signal-to-noise ratio r.

    .. math:: \delta = 2\,(r\,\sigma_t)^2

    r compares what the score s adds, :math:`\delta\lVert s\rVert`, with what the noise adds, :math:`\sqrt{2\delta}\lVert z\rVert`, and the
    score of noised data has the size :math:`\lVert s\rVert \approx \lVert z\rVert/\sigma_t`. The paper's rule has measured norms,
    :math:`\delta = 2\,(r\lVert z\rVert/\lVert s\rVert)^2`. Then the step depends on where a sample is, or on its batch, and the
    density that is left unchanged is not p_t, however small r. With σ_t it tends to p_t as r → 0.

    Arguments:
        denoiser: (x_t, t) → x̂_0.
        path: The Gaussian path.
        x: The first state, shape (B, …).
        t: A time with σ(t) > 0.
        snr: r, in (0, 1).
        steps: Number of steps.
        generator: Source of the noise.

    Returns:
        An iterator over the states after each step.

    Raises:
        ValueError, TypeError: At the call, if an argument does not fit.
        FloatingPointError: At the step where a state is not finite.

    Source:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), appendix G, Algorithms 4-5

    Example:
        >>> from dgm_course.paths import VP
        >>> x = torch.zeros(3, 2)
        >>> [tuple(x.shape) for x in langevin(lambda xt, t: torch.ones_like(xt), VP(), x, 0.5, steps=2)]
        [(3, 2), (3, 2)]
    """
    if not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"steps must be a whole number of at least 1; got {steps!r}")
    checked_grid(path, x, [1.0, 0.0])
    if not path.sigma(t) > 0:
        raise ValueError(f"t must have σ(t) > 0: without noise there is no corrector; got {t}")
    times = path.tabulate(torch.full((steps + 1,), float(t), dtype=torch.float64))
    ((*_, keep, pull, std),) = coefficient_rows(x, times[:2], _langevin_coefficients(path, times[:1], snr))

    def states(x):
        for _ in range(steps):
            x = _move(x, denoiser(x, float(t)), keep, pull, std, generator)
            yield x

    return watched(states(x), times)


def _langevin_coefficients(path: GaussianPath, t: Tensor, snr: float):
    """`langevin_step` with δ = 2(rσ)² and the score (α·x̂_0 − x)/σ²: σ cancels in all but the noise."""
    if not 0 < snr < 1:
        raise ValueError(f"snr must lie in (0, 1); got {snr}")
    share = torch.full_like(t, 2 * snr**2)
    return 1 - share, share * path.alpha(t), 2 * snr * path.sigma(t)


# Predictor and corrector in turn --------------------------------------------------------------------------------------


def predictor_corrector(
    denoiser: Callable,
    path: GaussianPath,
    x: Tensor,
    times,
    *,
    snr: float = 0.16,
    corrector_steps: int = 1,
    order: str = "predictor first",
    predictor: str = "euler_maruyama",
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    r"""The lecture's Algorithm 4: the predictor moves to the next time, the corrector repairs the cloud at a fixed time.

    Arguments, Returns and Raises as for `ddpm`; a step takes 1 + `corrector_steps` evaluations, and where s = 0 there is nothing
    to correct, so that the last one of "predictor first" takes one.

    Arguments:
        snr: Signal-to-noise ratio of the corrector, see `langevin`.
        corrector_steps: Langevin steps at each time; 0 leaves the predictor alone.
        order: "predictor first" as in the lecture and the paper's Algorithm 1, then the corrector works at s; or
            "corrector first" as in the paper's code, then it works at t.
        predictor: "euler_maruyama", or "ddpm" for ancestral sampling with Σ_θ = β, which also starts where α = 0.

    Source:
        | Slide "Algorithm 4 Sampling"; Score-Based Generative Modeling through SDEs (Song et al., 2021), Algorithm 1

    Example:
        >>> from dgm_course.paths import VP
        >>> states = predictor_corrector(lambda xt, t: torch.ones_like(xt), VP(), torch.randn(4, 2), [1.0, 0.5, 0.0])
        >>> list(states)[-1].unique()
        tensor([1.])
    """
    if order not in ("predictor first", "corrector first"):
        raise ValueError(f"order must be 'predictor first' or 'corrector first'; got {order!r}")
    if predictor not in ("euler_maruyama", "ddpm"):
        raise ValueError(f"predictor must be 'euler_maruyama' or 'ddpm'; got {predictor!r}")
    if not (isinstance(corrector_steps, int) and corrector_steps >= 0):
        raise ValueError(f"corrector_steps must be a whole number of at least 0; got {corrector_steps!r}")
    times = checked_grid(path, x, times)
    first = order == "predictor first"
    t, s = times[:-1], times[1:]
    moves = (
        _euler_maruyama_coefficients(path, t, s)
        if predictor == "euler_maruyama"
        else ddpm_coefficients(path, t, s, "beta")
    )
    predict = coefficient_rows(x, times, moves)
    correct = coefficient_rows(x, times, _langevin_coefficients(path, s if first else t, snr))

    def corrected(x, t, row):
        for _ in range(corrector_steps):
            x = _move(x, denoiser(x, t), *row, generator)
        return x

    def states(x):
        for (t, s, *move), (_t, _s, *correction) in zip(predict, correct, strict=True):
            if not first:
                x = corrected(x, t, correction)
            x = _move(x, denoiser(x, t), *move, generator)
            if first and s > 0:
                x = corrected(x, s, correction)
            yield x

    return watched(states(x), times)
