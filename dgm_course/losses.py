r"""Training losses. Times and noise are arguments, so that a loss is an exact function and can be tested as one."""

import math

import torch
from torch import Tensor

from dgm_course.denoisers import Denoiser
from dgm_course.paths.base import GaussianPath, Time, expand, same_shape

__all__ = ["bound_term", "simple"]


def simple(d: Denoiser, x0: Tensor, t: Time, eps: Tensor, weight: Tensor | None = None, **cond) -> Tensor:
    r"""DDPM's training loss: the squared error of what the network predicts, at one noisy version of each sample.

    .. math:: L = \mathbb E\,\bigl[w\,\lVert r - r_\theta(x_t, t)\rVert^2\bigr] / D, \qquad x_t = \alpha x_0 + \sigma\epsilon

    r is what the network predicts: ε on the slide, x_0 or v elsewhere. D is the number of values in one sample.

    Arguments:
        d: The denoiser in training.
        x0: Clean data, shape (B, …).
        t: Times, shape (B,) or a number.
        eps: Standard normal noise, same shape as `x0`.
        weight: Weight of each sample, shape (B,); 1 if not given.
        cond: What the network is conditioned on, for example y=labels.

    Returns:
        The mean over samples and values, shape ().

    Raises:
        ValueError: If a shape does not fit.

    Source:
        | Slide "Algorithm 1 Training", line 6; Ho et al. (2020), eq. 14

    Example:
        >>> from dgm_course.paths import Straight
        >>> d = Denoiser(lambda xt, t: torch.zeros_like(xt), Straight(), predicts="eps")
        >>> simple(d, torch.zeros(2, 3), 0.5, torch.full((2, 3), 2.0)).item()
        4.0
    """
    target = d.path.quantity(d.predicts, x0, eps, t)
    error = (d.output(d.path.perturb(x0, t, eps), t, **cond) - target).square().flatten(1).mean(1)
    if weight is not None:
        if weight.shape != error.shape:
            raise ValueError(f"weight must have shape {tuple(error.shape)}; got {tuple(weight.shape)}")
        error = weight * error
    return error.mean()


def bound_term(
    d, path: GaussianPath, x0: Tensor, xt: Tensor, s: Time, t: Time, *, variance: str = "beta", bins: int | None = None
) -> Tensor:
    r"""One term of the variational bound for each sample, in nats: what the step from t to s costs.

    .. math:: L = D_{KL}\bigl(q(x_s \mid x_t, x_0)\,\Vert\,p_\theta(x_s \mid x_t)\bigr)\ \text{for}\ s > 0,
              \qquad L = -\log p_\theta(x_0 \mid x_t)\ \text{for}\ s = 0

    Both Gaussians have the posterior's form, one with x_0 and one with x̂_0, so that their means differ by a multiple of
    x_0 − x̂_0. With Σ_θ = β̃ the variances cancel and only that difference is left.

    Arguments:
        d: A denoiser (x_t, t) → x̂_0.
        path: The Gaussian path.
        x0, xt: Clean data and their noisy version at t, shape (B, …).
        s, t: Numbers with 0 ≤ s < t.
        variance: Σ_θ, "beta" for the variance v of q(x_t given x_s) or "posterior" for β̃ = v·σ_s²/σ_t².
            At s = 0 the posterior's variance is 0, so v is used there in either case.
        bins: At s = 0, the number of grey levels in [−1, 1] over which p_θ is integrated (256 for images); without it
            the density is used. Ignored for s > 0.

    Returns:
        Nats for each sample, summed over its values, shape (B,).

    Raises:
        ValueError: If s ≥ t, shapes differ, or an option is unknown.

    Source:
        | Slide "our loss function is splitted into 3 terms"; Ho et al. (2020), eq. 5, 8 and 13

    Example:
        >>> from dgm_course.paths import DiscretePath
        >>> path, x0 = DiscretePath([0.5, 0.5]), torch.zeros(1, 2)
        >>> bound_term(lambda xt, t: x0, path, x0, torch.ones(1, 2), 1, 2, variance="posterior").item()
        0.0
    """
    same_shape(x0=x0, xt=xt)
    if variance not in ("beta", "posterior"):
        raise ValueError(f"variance must be 'beta' or 'posterior'; got {variance!r}")
    if any(isinstance(time, Tensor) and time.ndim for time in (s, t)):
        raise ValueError("s and t must be numbers: one term of the bound is one step of the chain")
    if bins is not None and bins < 2:
        raise ValueError(f"bins must be at least 2; got {bins}")
    _, step = path.transition(s, t)
    _, pull, posterior = path.bridge(s, t)
    x0_hat = d(xt, t)
    if s > 0:
        ratio = posterior / (step if variance == "beta" else posterior)
        shift = (expand(pull, x0) * (x0 - x0_hat)).square() / expand(posterior, x0)
        kl = 0.5 * (expand(ratio, x0) * shift + expand(ratio - 1 - ratio.log(), x0))  # 1 + shift would round shift away
        return kl.flatten(1).sum(1)
    std = expand(step.sqrt(), x0)
    if bins is None:
        nll = 0.5 * ((x0 - x0_hat) / std).square() + std.log() + 0.5 * math.log(2 * math.pi)
    else:
        nll = -_log_bin(x0, x0_hat, std, bins)
    return nll.flatten(1).sum(1)


def _log_bin(x0: Tensor, mean: Tensor, std: Tensor, bins: int) -> Tensor:
    """log of the Gaussian mass in the grey level of x0; the first and last level reach to ±∞."""
    half = 1 / (bins - 1)
    above = torch.where(x0 > 1 - half, torch.inf, (x0 + half - mean) / std)
    below = torch.where(x0 < -1 + half, -torch.inf, (x0 - half - mean) / std)
    right = above + below > 0  # measure in the left tail, where log Φ keeps its digits; the normal is symmetric
    above, below = torch.where(right, -below, above), torch.where(right, -above, below)
    upper, lower = torch.special.log_ndtr(above), torch.special.log_ndtr(below)
    return upper + torch.log1p(-torch.exp(lower - upper))
