r"""Training losses. Times and noise are arguments, so that a loss is an exact function and can be tested as one."""

import math

import torch
from torch import Tensor

from dgm_course.denoisers import Denoiser, with_fraction
from dgm_course.paths.base import GaussianPath, Time, expand, same_shape

__all__ = ["bound_term", "dsm", "esm", "hybrid", "jacobian_trace", "simple", "ssm"]


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
    return _mean((d.output(d.path.perturb(x0, t, eps), t, **cond) - target).square().flatten(1).mean(1), weight)


# Score matching -------------------------------------------------------------------------------------------------------


def dsm(d: Denoiser, x0: Tensor, t: Time, eps: Tensor, weight: Tensor | None = None, **cond) -> Tensor:
    r"""Denoising score matching: the squared error of the score against that of q(x_t given x_0), which is known.

    .. math:: L = \tfrac12\,\mathbb E\bigl[\lambda\,\lVert s_\theta(x_t, t) + \epsilon/\sigma_t\rVert^2\bigr],
              \qquad x_t = \alpha x_0 + \sigma\epsilon

    It has the gradient of `esm` at the same times, and so its minimiser, the score of p_t. Its value is larger by a number without θ.
    With λ = σ² it is D/2 times the `simple` loss of a network that predicts the noise.

    Arguments:
        d: The denoiser in training, whatever it predicts; read as a score.
        x0: Clean data, shape (B, …).
        t: Times with σ(t) > 0, shape (B,) or a number.
        eps: Standard normal noise, same shape as `x0`.
        weight: λ of each sample, shape (B,); 1 if not given.
        cond: What the network is conditioned on.

    Returns:
        The mean over samples of the sum over values, shape ().

    Raises:
        ValueError: If a shape does not fit, or σ = 0.

    Source:
        | Slide "In summary, we optimize this equation"; A Connection Between Score Matching and Denoising Autoencoders
        | (Vincent, 2011), eq. 12; Score-Based Generative Modeling through SDEs (Song et al., 2021), eq. 7

    Example:
        >>> from dgm_course.paths import Straight
        >>> d = Denoiser(lambda xt, t: torch.zeros_like(xt), Straight(), predicts="score")
        >>> dsm(d, torch.zeros(1, 3), 0.5, torch.ones(1, 3)).item()
        6.0
    """
    xt = d.path.perturb(x0, t, eps)
    error = _score(d, xt, t, **cond) - d.path.quantity("score", x0, eps, t)
    return _mean(0.5 * error.square().flatten(1).sum(1), weight)


def esm(d: Denoiser, x0: Tensor, t: Time, eps: Tensor, weight: Tensor | None = None, **cond) -> Tensor:
    r"""Score matching with the exact trace: needs no target at all, but D gradients for D values in a sample.

    .. math:: L = \mathbb E\bigl[\lambda\,\bigl(\mathrm{tr}\,\nabla_x s_\theta(x_t, t) + \tfrac12\lVert s_\theta(x_t, t)\rVert^2\bigr)\bigr]

    Up to a number without θ this is :math:`\tfrac12\mathbb E\,\lambda\lVert s_\theta - \nabla\log p_t\rVert^2`, by parts, if
    :math:`p_t s_\theta` vanishes at infinity.

    Arguments, Returns and Raises as for `dsm`.

    Source:
        | Slide "How to train score function model?"; Estimation of Non-Normalized Statistical Models by Score Matching
        | (Hyvärinen, 2005), eq. 4

    Example:
        >>> from dgm_course.paths import Straight
        >>> d = Denoiser(lambda xt, t: -xt, Straight(), predicts="score")
        >>> esm(d, torch.zeros(1, 3), 0.5, torch.full((1, 3), 2.0)).item()
        -1.5
    """
    with torch.enable_grad():
        xt = d.path.perturb(x0, t, eps).requires_grad_()
        score = _score(d, xt, t, **cond)
        return _mean(jacobian_trace(score, xt) + 0.5 * score.square().flatten(1).sum(1), weight)


def ssm(
    d: Denoiser,
    x0: Tensor,
    t: Time,
    eps: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    reduced: bool = True,
    **cond,
) -> Tensor:
    r"""Sliced score matching: the trace looked at along one random direction, for one gradient whatever D is.

    .. math:: L = \mathbb E\bigl[\lambda\,\bigl(v^\top\nabla_x s_\theta\,v + \tfrac12\lVert s_\theta\rVert^2\bigr)\bigr], \qquad
              \text{or}\ \tfrac12(v^\top s_\theta)^2\ \text{for}\ \tfrac12\lVert s_\theta\rVert^2\ \text{if not reduced}

    With :math:`\mathbb E\,vv^\top = I` both are `esm` on average; the reduced form has less variance. With v of length 1 the second is only
    scaled by 1/D, and the reduced one is wrong: for N(0, I) its minimiser is −x/D.

    Arguments, Returns and Raises as for `dsm`, and

    Arguments:
        v: Directions with mean 0 and covariance I, normal or of random signs, same shape as `x0`.
        reduced: Whether the second term is exact.

    Source:
        | Slide "Sliced score matching"; Sliced Score Matching (Song et al., 2019), eq. 7-8

    Example:
        >>> from dgm_course.paths import Straight
        >>> d = Denoiser(lambda xt, t: -xt, Straight(), predicts="score")
        >>> ssm(d, torch.zeros(1, 3), 0.5, torch.full((1, 3), 2.0), torch.ones(1, 3)).item()
        -1.5
    """
    same_shape(x0=x0, v=v)
    with torch.enable_grad():
        xt = d.path.perturb(x0, t, eps).requires_grad_()
        score = _score(d, xt, t, **cond)
        size = score.square() if reduced else (v * score).flatten(1).sum(1, keepdim=True).square()
        return _mean(jacobian_trace(score, xt, v) + 0.5 * size.flatten(1).sum(1), weight)


def jacobian_trace(y: Tensor, x: Tensor, v: Tensor | None = None) -> Tensor:
    r"""The trace of ∂y/∂x for each sample: exact, with one gradient for each of the D values; or Hutchinson's estimate along v.

    .. math:: \mathrm{tr}\,J = \sum_i J_{ii} = \mathbb E\,v^\top J\,v \quad\text{if}\quad \mathbb E\,vv^\top = I

    Arguments:
        y: Values computed from `x`, sample by sample, same shape (B, …).
        x: A tensor that requires its gradient.
        v: Random directions, same shape; without them the trace is exact.

    Returns:
        One trace for each sample, shape (B,), which can be differentiated further.

    Raises:
        ValueError: If the shapes differ.

    Source:
        | A Stochastic Estimator of the Trace of the Influence Matrix (Hutchinson, 1990); FFJORD (Grathwohl et al., 2019), eq. 7

    Example:
        >>> x = torch.ones(2, 3, requires_grad=True)
        >>> jacobian_trace(x**2, x).tolist()
        [6.0, 6.0]
    """
    same_shape(x=x, y=y, **({} if v is None else {"v": v}))
    if not y.requires_grad:  # y does not depend on x
        return x.new_zeros(len(x))
    if v is not None:
        (row,) = torch.autograd.grad((v * y).sum(), x, create_graph=True, materialize_grads=True)
        return (v * row).flatten(1).sum(1)
    total = 0
    for i, value in enumerate(y.flatten(1).sum(0)):
        (row,) = torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)
        total = total + row.flatten(1)[:, i]
    return total


def _score(d: Denoiser, xt: Tensor, t: Time, **cond) -> Tensor:
    return d.path.convert(d.output(xt, t, **cond), xt, t, given=d.predicts, to="score")


def _mean(error: Tensor, weight: Tensor | None) -> Tensor:
    """The mean over samples, weighted where asked."""
    if weight is not None:
        if weight.shape != error.shape:
            raise ValueError(f"weight must have shape {tuple(error.shape)}; got {tuple(weight.shape)}")
        error = weight.to(error) * error
    return error.mean()


# The variational bound ------------------------------------------------------------------------------------------------


def bound_term(
    d, path: GaussianPath, x0: Tensor, xt: Tensor, s: Time, t: Time, *, variance="beta", bins: int | None = None
) -> Tensor:
    r"""One term of the variational bound for each sample, in nats: what the step from t to s costs.

    .. math:: L = D_{KL}\bigl(q(x_s \mid x_t, x_0)\,\Vert\,p_\theta(x_s \mid x_t)\bigr)\ \text{for}\ s > 0,
              \qquad L = -\log p_\theta(x_0 \mid x_t)\ \text{for}\ s = 0

    Both Gaussians have means of the posterior's form, one with x_0 and one with x̂_0, which therefore differ by a multiple of
    x_0 − x̂_0. With Σ_θ = β̃ the variances cancel and only that difference is left.

    Arguments:
        d: A denoiser (x_t, t) → x̂_0; for a learned variance, (x_t, t) → (x̂_0, fraction), as `Denoiser.with_variance`.
        path: The Gaussian path.
        x0, xt: Clean data and their noisy version at t, shape (B, …).
        s, t: Times with 0 ≤ s < t; numbers, or tensors of shape (B,).
        variance: Σ_θ, "beta" for the variance v of q(x_t given x_s), "posterior" for β̃ = v·σ_s²/σ_t², a number from 0 (β̃) to
            1 (β) for those between, or "learned"; see `GaussianPath.log_variance`. At s = 0, β̃ is 0, so v is used there in any case.
        bins: At s = 0, the number of grey levels in [−1, 1] over which p_θ is integrated (256 for images); without it
            the density is used. Ignored for s > 0.

    Returns:
        Nats for each sample, summed over its values, shape (B,).

    Raises:
        ValueError: If s ≥ t, shapes differ, or an option is unknown.

    Source:
        | Slide "our loss function is splitted into 3 terms"; Ho et al. (2020), eq. 5, 8 and 13; Nichol & Dhariwal (2021), eq. 15

    Example:
        >>> from dgm_course.paths import DiscretePath
        >>> path, x0 = DiscretePath([0.5, 0.5]), torch.zeros(1, 2)
        >>> bound_term(lambda xt, t: x0, path, x0, torch.ones(1, 2), 1, 2, variance="posterior").item()
        0.0
    """
    same_shape(x0=x0, xt=xt)
    if bins is not None and bins < 2:
        raise ValueError(f"bins must be at least 2; got {bins}")
    if isinstance(variance, str) and variance not in ("beta", "posterior", "learned"):
        raise ValueError(f"variance must be 'beta', 'posterior' or a number in [0, 1], or 'learned'; got {variance!r}")
    _, pull, posterior = path.bridge(s, t)
    x0_hat, variance = with_fraction(d, xt, t) if variance == "learned" else (d(xt, t), variance)
    log_var = path.log_variance(s, t, variance)
    last = path.sigma(s) == 0
    if log_var.ndim < 2:  # the same for all values of a sample
        excess = torch.where(last, 0, posterior.log() - log_var)  # log β̃/Σ_θ, in float64: 0 for Σ_θ = β̃
        log_var, excess = expand(log_var, x0), expand(excess, x0)
    else:
        excess = expand(torch.where(last, 0, posterior.log()), x0) - log_var
    nats = []
    if not bool(last.all()):
        kl = (expand(pull, x0) * (x0 - x0_hat)).square() / log_var.exp() + torch.expm1(excess) - excess
        nats.append((0.5 * kl).flatten(1).sum(1))
    if bool(last.any()):
        std = (0.5 * log_var).exp()
        if bins is None:
            nll = 0.5 * ((x0 - x0_hat) / std).square() + 0.5 * log_var + 0.5 * math.log(2 * math.pi)
        else:
            nll = -_log_bin(x0, x0_hat, std, bins)
        nats.append(nll.expand(x0.shape).flatten(1).sum(1))
    return nats[0] if len(nats) == 1 else torch.where(last.to(x0.device), nats[1], nats[0])


def hybrid(
    d: Denoiser, x0: Tensor, s: Time, t: Time, eps: Tensor, bound_weight: float = 1.0, bins: int | None = 256, **cond
) -> Tensor:
    r"""Improved DDPM's loss: the mean learns from the simple loss, the variance from a term of the bound.

    .. math:: L_{hybrid} = L_{simple} + \lambda L_{vlb}, \qquad
              \lambda L_{vlb} = \lambda T\;\mathbb E_t\,\frac{L_{t-1}\bigl(\operatorname{stop}(\hat x_0), \Sigma_\theta\bigr)}{D\ln 2}

    The bound is a sum over the T steps of a chain, so one step drawn at random counts T times. It is in bits per dimension. The gradient
    does not go through x̂_0 in it: the terms have weights too uneven to learn the mean from, but nothing else can teach the variance.

    Arguments:
        d: The denoiser in training, with `learned_variance`.
        x0: Clean data, shape (B, …).
        s, t: Both ends of a step of the chain for each sample, s < t, shape (B,) or numbers.
        eps: Standard normal noise, same shape as `x0`.
        bound_weight: λT. The paper has λ = 0.001 and T = 1000.
        bins: Grey levels of the last step, as in `bound_term`.
        cond: What the network is conditioned on.

    Returns:
        The mean over samples, shape ().

    Raises:
        ValueError: If a shape does not fit, or the denoiser has no learned variance.

    Source:
        | Slide "How can we shorten the diffusion steps?"; Improved DDPM (Nichol & Dhariwal, 2021), eq. 16

    Example:
        >>> from dgm_course.paths import Cosine
        >>> net = lambda xt, t: torch.cat([torch.zeros_like(xt), torch.ones_like(xt)], 1)
        >>> d = Denoiser(net, Cosine(), predicts="eps", learned_variance=True)
        >>> x0 = torch.zeros(2, 3)
        >>> hybrid(d, x0, 0.4, 0.5, x0, bound_weight=0.0).item()
        0.0
    """
    if not d.learned_variance:
        raise ValueError("d must be a Denoiser built with learned_variance=True")
    xt = d.path.perturb(x0, t, eps)
    output, fraction = d.outputs(xt, t, **cond)
    error = (output - d.path.quantity(d.predicts, x0, eps, t)).square().mean()
    x0_hat = d.path.convert(output.detach(), xt, t, given=d.predicts, to="x0")
    nats = bound_term(lambda xt, t: (x0_hat, fraction), d.path, x0, xt, s, t, variance="learned", bins=bins)
    return error + bound_weight * nats.mean() / (x0[0].numel() * math.log(2))


def _log_bin(x0: Tensor, mean: Tensor, std: Tensor, bins: int) -> Tensor:
    """log of the Gaussian mass in the grey level of x0; the first and last level reach to ±∞."""
    half = 1 / (bins - 1)
    above = torch.where(x0 > 1 - half, torch.inf, (x0 + half - mean) / std)
    below = torch.where(x0 < -1 + half, -torch.inf, (x0 - half - mean) / std)
    right = above + below > 0  # measure in the left tail, where log Φ keeps its digits; the normal is symmetric
    above, below = torch.where(right, -below, above), torch.where(right, -above, below)
    upper, lower = torch.special.log_ndtr(above), torch.special.log_ndtr(below)
    return upper + torch.log1p(-torch.exp(lower - upper))
