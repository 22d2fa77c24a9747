r"""Distillation: a student that does in one evaluation what its teacher does in several.

Every target here is an x̂_0, so that a student is a denoiser like any other, and every sampler can use it. What it says is no longer
:math:`\mathbb E[x_0 \mid x_t]`, but the x̂_0 with which one DDIM step ends where the teacher's steps end.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchdiffeq import odeint

from dgm_course.denoisers import read_as
from dgm_course.paths.base import GaussianPath, Time, expand, same_shape
from dgm_course.samplers.ode import ddim_coefficients, ddim_step

__all__ = ["consistency_function", "consistency_target", "matching", "progressive_target", "step_x0", "truncated_snr"]


def step_x0(path: GaussianPath, xt: Tensor, xs: Tensor, t: Time, s: Time) -> Tensor:
    r"""The x̂_0 with which one DDIM step leads from x_t to x_s: the step, solved for its guess.

    .. math:: x_s = \alpha_s\hat x_0 + \tfrac{\sigma_s}{\sigma_t}(x_t - \alpha_t\hat x_0) \quad\Longleftrightarrow\quad
              \hat x_0 = \frac{x_s - (\sigma_s/\sigma_t)\,x_t}{\alpha_s - (\sigma_s/\sigma_t)\,\alpha_t}

    Where s = 0 it is x_s / α_0. It divides by about the length of the step, so very short steps lose digits.

    Arguments:
        path: The Gaussian path.
        xt: State at t, shape (B, …).
        xs: State at s, same shape.
        t, s: Times with s < t; numbers, or tensors of shape (B,).

    Raises:
        ValueError: If s ≥ t anywhere, or the shapes differ.

    Source:
        | Progressive Distillation (Salimans & Ho, 2022), Algorithm 2 and appendix G

    Example:
        >>> from dgm_course.paths import Straight
        >>> step_x0(Straight(), torch.full((1,), 0.5), torch.full((1,), 0.25), t=1.0, s=0.5).item()
        0.0
    """
    same_shape(xt=xt, xs=xs)
    keep, pull, _ = ddim_coefficients(path, t, s, 0.0)
    return (xs - expand(keep, xt) * xt) / expand(pull, xt)


@torch.no_grad()
def progressive_target(teacher: Callable, path: GaussianPath, xt: Tensor, t: Time, m: Time, s: Time) -> Tensor:
    r"""What a student has to say at (x_t, t) for its one DDIM step to s to equal two of its teacher's, t → m → s.

    .. math:: x_m = \mathrm{DDIM}(x_t;\, t \to m), \quad x_s = \mathrm{DDIM}(x_m;\, m \to s), \quad
              \tilde x_0 = \frac{x_s - (\sigma_s/\sigma_t)\,x_t}{\alpha_s - (\sigma_s/\sigma_t)\,\alpha_t}

    It is a mean of the teacher's two guesses, weighted by the lengths of its steps in :math:`u = \alpha/\sigma`, so it stays in
    their range, up to rounding:

    .. math:: \tilde x_0 = \frac{(u_m - u_t)\,\hat x_0(x_t, t) + (u_s - u_m)\,\hat x_0(x_m, m)}{u_s - u_t}

    Arguments:
        teacher: A denoiser (x_t, t) → x̂_0, with its conditions bound; clipped, if it is to be sampled clipped.
        path: The Gaussian path.
        xt: State at t, shape (B, …).
        t, m, s: Times with s < m < t; numbers, or tensors of shape (B,).

    Returns:
        The target x̃_0, of the shape of `xt`, without a gradient.

    Raises:
        ValueError: Unless s < m < t everywhere, or if the shapes differ.

    Source:
        | Slide "Knowledge Distillation"; Progressive Distillation (Salimans & Ho, 2022), Algorithm 2

    Example:
        >>> from dgm_course.paths import Straight
        >>> progressive_target(lambda xt, t: xt, Straight(), torch.ones(1), t=1.0, m=0.5, s=0.0).item()
        1.0
    """
    middle = path._time(m, "m")
    if not bool(((path._time(s, "s") < middle) & (middle < path._time(t))).all()):
        raise ValueError(f"m must lie between s and t; got s = {s}, m = {m} and t = {t}")
    xm = ddim_step(path, xt, teacher(xt, t), t, m)
    xs = ddim_step(path, xm, teacher(xm, m), m, s)
    return step_x0(path, xt, xs, t, s)


def truncated_snr(path: GaussianPath, t: Time) -> Tensor:
    r"""The weight :math:`\max(\alpha^2/\sigma^2,\ 1)` of an error in x̂_0.

    The signal-to-noise ratio alone would make it an error in ε̂, and forget x̂_0 where α = 0: the first step of every student. With the 1
    no time is forgotten. On a path with α² + σ² = 1 it lies between ½ and 1 times the weight 1/σ², an error in v.

    Arguments:
        path: The Gaussian path.
        t: Times with σ(t) > 0; a number, or a tensor of shape (B,).

    Returns:
        float64, of the shape of `t`.

    Raises:
        ValueError: If σ = 0 anywhere.

    Source:
        | Progressive Distillation (Salimans & Ho, 2022), section 4, eq. 9

    Example:
        >>> from dgm_course.paths import Straight
        >>> [round(truncated_snr(Straight(), t).item(), 4) for t in (0.2, 0.5, 1.0)]
        [16.0, 1.0, 1.0]
    """
    sigma = path.sigma(t)
    if not bool((sigma > 0).all()):
        raise ValueError(f"t must be times with σ(t) > 0; got {t}")
    return (path.alpha(t) / sigma).square().clamp(min=1)


def matching(student: Callable, xt: Tensor, t: Time, target: Tensor, weight: Tensor | None = None, **cond) -> Tensor:
    r"""The loss of every student: the squared distance of its x̂_0 from a target.

    .. math:: L = \mathbb E\,\bigl[w\,\lVert\hat x_0^{student}(x_t, t) - \tilde x_0\rVert^2\bigr] / D

    D is the number of values in one sample.

    Arguments:
        student: The denoiser in training.
        xt: Noisy data at t, shape (B, …).
        t: A number, or a tensor of shape (B,).
        target: x̃_0, same shape as `xt`.
        weight: One for each sample, shape (B,), or one for all; 1 if not given.
        cond: What the student is conditioned on: y=labels, w=weights of guidance.

    Returns:
        The mean over samples and values, shape ().

    Raises:
        ValueError: If a shape does not fit.

    Source:
        | Slide "Stage-one distillation"; Progressive Distillation (Salimans & Ho, 2022), Algorithm 2; On Distillation of Guided
        | Diffusion Models (Meng et al., 2023), eq. 3

    Example:
        >>> matching(lambda xt, t: xt, torch.zeros(2, 3), 0.5, torch.full((2, 3), 2.0)).item()
        4.0
    """
    x0 = student(xt, t, **cond)
    same_shape(xt=xt, target=target, x0=x0)
    errors = (x0 - target).square().reshape(len(xt), -1)
    if weight is None:
        return errors.mean()
    if weight.shape not in ((), (len(xt),)):
        raise ValueError(f"weight must be a number or have shape ({len(xt)},); got shape {tuple(weight.shape)}")
    return (expand(weight, errors) * errors).mean()


# Consistency: every point of a path of the ODE says where the path ends -----------------------------------------------


@torch.no_grad()
def consistency_target(
    student: Callable, teacher: Callable, path: GaussianPath, xt: Tensor, t: Time, s: Time
) -> Tensor:
    r"""What a student has to say at (x_t, t) to agree with itself one teacher's step further on.

    .. math:: \tilde x_0 = f_\theta(x_s, s), \qquad x_s = \mathrm{DDIM}(x_t;\, t \to s)\ \text{with the teacher}

    Nothing but f(x, 0) = x holds the student to the truth, so this must be so by construction. A denoiser that predicts v, on a path with
    α(0) = 1 and σ(0) = 0, has it: :math:`\hat x_0 = \alpha x_t - \sigma v`. At s = 0 the target is then x_s itself.

    Arguments:
        student: The denoiser in training; it gets no gradient from here.
        teacher: A denoiser (x_t, t) → x̂_0.
        path: The Gaussian path.
        xt: State at t, shape (B, …).
        t, s: Times with s < t; numbers, or tensors of shape (B,).

    Returns:
        The target, of the shape of `xt`, without a gradient.

    Raises:
        ValueError: If s ≥ t anywhere, or the shapes differ.

    Source:
        | Consistency Models (Song et al., 2023), Algorithm 2

    Example:
        >>> from dgm_course.paths import Straight
        >>> consistency_target(lambda xt, s: xt, lambda xt, t: 0 * xt, Straight(), torch.ones(1), t=0.5, s=0.25).item()
        0.5
    """
    return student(ddim_step(path, xt, teacher(xt, t), t, s), s)


@torch.no_grad()
def consistency_function(
    denoiser: Callable, path: GaussianPath, xt: Tensor, t: float, tolerance: float = 1e-10
) -> Tensor:
    r"""Where the probability-flow ODE leads from (x_t, t): its state at t = 0, by torchdiffeq's adaptive solver.

    .. math:: f(x_t, t) = x_t + \int_t^0 \bigl(\alpha'_u\hat x_0 + \sigma'_u\hat\epsilon\bigr)\,du

    In one dimension the ODE keeps the order of points, and so the share of the data to the left of each:
    :math:`f = F_0^{-1}\circ F_t` with the distribution functions F, see `toy.GaussianMixture.cdf`.

    Arguments:
        denoiser: (x_t, t) → x̂_0, smooth; for the stated tolerance, in float64.
        path: A continuous path.
        xt: State at t, shape (B, …).
        t: A number in (0, 1] where the velocity is finite.
        tolerance: Relative and absolute error allowed in each step.

    Raises:
        ValueError: If t is no number above `1e-9`, or the velocity is not determined there.

    Source:
        | Consistency Models (Song et al., 2023), section 3

    Example:
        >>> from dgm_course.paths import Cosine
        >>> from dgm_course.toy import GaussianMixture
        >>> one = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), 4.0)
        >>> x = torch.ones(1, 1, dtype=torch.float64)
        >>> round(consistency_function(one.denoiser(Cosine()), Cosine(), x, 1.0).item(), 6)  # from N(0, 1) to N(0, 4)
        2.0
    """
    low = 1e-9  # one DDIM step from there is exact up to σ²
    if not (isinstance(t, (int, float)) and t > low):
        raise ValueError(f"t must be a number above {low:g}; got {t!r}")
    velocity = read_as("velocity", denoiser, path)
    ends = torch.tensor([t, low], dtype=torch.float64)
    inside = {"step_t": ends[1:]}  # else the last step may look at a t below 0
    x = odeint(lambda u, x: velocity(x, u.clamp(low, t)), xt, ends, rtol=tolerance, atol=tolerance, options=inside)[-1]
    return ddim_step(path, x, denoiser(x, low), low, 0.0)
