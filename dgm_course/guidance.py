r"""Guidance: denoisers made of denoisers, whose samples fit a condition better than the data do."""

from collections.abc import Callable

import torch
from torch import Tensor

from dgm_course.paths.base import GaussianPath, Time, expand

__all__ = ["classifier", "classifier_free", "interval"]

Scale = float | Tensor | Callable[[Time], float | Tensor]


def classifier_free(cond: Callable, uncond: Callable, scale: Scale) -> Callable:
    r"""Go from the guess without the condition towards the one with it, and beyond.

    .. math:: \hat x_0 = \hat x_0(x_t) + w\,\bigl(\hat x_0(x_t, y) - \hat x_0(x_t)\bigr)

    The same line holds for ε, v and the score: each is x̂_0 times a number plus x_t times a number, and the factors 1 − w and w sum to 1.
    w is the weight of the slide on ε̃; in "Algorithm 2" of the slides it is 1 + w.

    Arguments:
        cond, uncond: Denoisers (x_t, t) → x̂_0 with and without the condition. In the place of the second, one with another label
            leads away from that label.
        scale: w; a number, one for each sample, shape (B,), or a function of t. Where it is the number 1 only `cond` is asked, where it
            is 0 only `uncond`; elsewhere a step costs two evaluations.

    Returns:
        A denoiser. Clip it, if at all, on its outside.

    Raises:
        TypeError: If `scale` is none of these.
        ValueError: On a call, if `scale` has another shape.

    Source:
        | Slide "Classifier Free Guidance"; Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), eq. 6

    Example:
        >>> d = classifier_free(lambda xt, t: torch.ones(1), lambda xt, t: torch.zeros(1), scale=3.0)
        >>> d(torch.zeros(1), 0.5).item()
        3.0
    """
    if not (callable(scale) or isinstance(scale, (int, float, Tensor))):
        raise TypeError(f"scale must be a number, a tensor or a function of t; got {type(scale).__name__}")

    def guided(xt: Tensor, t: Time) -> Tensor:
        w = scale(t) if callable(scale) else scale
        if not isinstance(w, Tensor):
            if w in (0, 1):
                return cond(xt, t) if w == 1 else uncond(xt, t)
            return torch.lerp(uncond(xt, t), cond(xt, t), w)
        if w.shape not in ((), (len(xt),)):
            raise ValueError(f"scale must be a number or have shape ({len(xt)},); got shape {tuple(w.shape)}")
        return torch.lerp(uncond(xt, t), cond(xt, t), expand(w, xt))

    return guided


def interval(scale: float, low: float, high: float) -> Callable[[Time], Time]:
    """A weight for times from `low` to `high` only; outside it is 1, the plain conditional model, at one evaluation a step.

    Arguments:
        scale: The weight inside.
        low, high: Ends of the interval, low < high.

    Raises:
        ValueError: If low ≥ high.

    Source:
        | Applying Guidance in a Limited Interval (Kynkäänniemi et al., 2024), section 3

    Example:
        >>> [interval(3.0, 0.2, 0.8)(t) for t in (0.1, 0.5, 0.9)]
        [1.0, 3.0, 1.0]
    """
    if not low < high:
        raise ValueError(f"low must be less than high; got {low} and {high}")

    def weight(t: Time) -> Time:
        if isinstance(t, Tensor) and t.ndim:
            return torch.where((low <= t) & (t <= high), scale, 1.0)
        return scale if low <= t <= high else 1.0

    return weight


def classifier(
    d: Callable, path: GaussianPath, log_prob: Callable[[Tensor, Time], Tensor], scale: float = 1.0
) -> Callable:
    r"""Bayes for scores: add the gradient of a classifier's log-probability to the score.

    .. math:: \nabla\log p_t(x_t) + w\nabla\log p_t(y \mid x_t) \quad\Longleftrightarrow\quad
              \hat x_0 + w\,\frac{\sigma^2}{\alpha}\nabla_{x_t}\log p_t(y \mid x_t)

    The gradient is taken at x_t, where the score is, not at the mean of the step. Where α = 0, the factor is infinite and the gradient of
    the true log-probability is 0. Their product has a limit, but the gradient cannot tell it: there the guess is left as it is.

    Arguments:
        d: A denoiser (x_t, t) → x̂_0 on `path`.
        path: The Gaussian path.
        log_prob: (x_t, t) → log p_t(y given x_t) of each sample, shape (B,), to be differentiated. It must know noisy data.
        scale: w.

    Returns:
        A denoiser, which turns gradients on for `log_prob` alone.

    Raises:
        ValueError: On a call, if `log_prob` gives another shape.

    Source:
        | Slide "How to control the generating process?"; Diffusion Models Beat GANs (Dhariwal & Nichol, 2021), eq. 14

    Example:
        >>> from dgm_course.paths import Straight
        >>> up = classifier(lambda xt, t: xt, Straight(), lambda xt, t: 3 * xt.sum(1))
        >>> up(torch.zeros(1, 2), 0.5).tolist()
        [[1.5, 1.5]]
    """

    def guided(xt: Tensor, t: Time) -> Tensor:
        x0 = d(xt, t)
        alpha, sigma = path.alpha(t), path.sigma(t)
        if not bool(alpha.any()):
            return x0
        with torch.enable_grad():
            leaf = xt.detach().requires_grad_()
            values = log_prob(leaf, t)
            if values.shape != (len(xt),):
                raise ValueError(f"log_prob must return shape ({len(xt)},); got {tuple(values.shape)}")
            if not values.requires_grad:
                raise ValueError("log_prob must depend on x_t by operations that can be differentiated")
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        shift = torch.where(alpha > 0, scale * sigma**2 / alpha, 0)
        return x0 + expand(shift, xt) * gradient

    return guided
