"""The continuous paths of the course, a few lines each."""

import math

import torch
from torch import Tensor

from dgm_course.paths.base import GaussianPath

__all__ = ["VE", "VP", "Cosine", "Scaled", "Sigmoid", "Straight", "SubVP"]


class VP(GaussianPath):
    r"""Variance preserving: the limit of the lecture's chain with linear β, :math:`\beta(t) = \beta_{min} + t(\beta_{max}-\beta_{min})`.

    .. math:: \log\alpha(t) = -\tfrac12\int_0^t\beta(u)\,du, \qquad \sigma^2 = 1 - \alpha^2

    Source:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), eq. 11 and 32

    Example:
        >>> round(VP().diffusion2(0.5).item(), 6)  # g² = β(t)
        10.05
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        super().__init__()
        if not 0 <= beta_min <= beta_max or beta_max == 0:
            raise ValueError(
                f"beta_min and beta_max must satisfy 0 ≤ beta_min ≤ beta_max and beta_max > 0; got {beta_min}, {beta_max}"
            )
        self.beta_min, self.beta_max = beta_min, beta_max

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2)

    def _alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def _variance(self, t: Tensor) -> Tensor:
        return 0 - torch.expm1(2 * self._log_alpha(t))


class SubVP(VP):
    r"""The α of :class:`VP` with less noise, :math:`\sigma = 1 - \alpha^2`: its variance stays below VP's.

    Source:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), eq. 12 and 35
    """

    def _sigma(self, t: Tensor) -> Tensor:
        return 0 - torch.expm1(2 * self._log_alpha(t))

    def _variance(self, t: Tensor) -> Tensor:
        return self._sigma(t) ** 2


class VE(GaussianPath):
    r"""Variance exploding: the data stay, the noise grows geometrically from σ(0) = 0.

    .. math:: \alpha = 1, \qquad \sigma^2(t) = \sigma_{min}^2\bigl((\sigma_{max}/\sigma_{min})^{2t} - 1\bigr)

    Source:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), eq. 9 and 31, started at the data
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        super().__init__()
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max; got {sigma_min}, {sigma_max}"
            )
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 + 0 * t  # not ones_like: autograd has to find t in it

    def _variance(self, t: Tensor) -> Tensor:
        return self.sigma_min**2 * torch.expm1(2 * t * math.log(self.sigma_max / self.sigma_min))


class Cosine(GaussianPath):
    r"""A quarter turn from data to noise: :math:`\alpha = \cos(\pi t/2),\ \sigma = \sin(\pi t/2)`; no signal is left at t = 1.

    The chain of Nichol & Dhariwal is this path with a small offset and a clip, see `schedules.cosine_betas`.

    Arguments:
        shift: Added to the log-SNR at every t, :math:`-2\log\tan(\pi t/2) + \text{shift}`. Images with r times the side whose
            pixels are copies have the same task left at the same t with shift −2 log r.

    Raises:
        ValueError: If `shift` is not finite.

    Source:
        | Progressive Distillation (Salimans & Ho, 2022), section 2; Improved DDPM (Nichol & Dhariwal, 2021), eq. 17; the
        | shift: Simple Diffusion (Hoogeboom et al., 2023), section 3.1

    Example:
        >>> round(Cosine(shift=-2.0).logsnr(0.5).item(), 6)
        -2.0
    """

    def __init__(self, shift: float = 0.0):
        super().__init__()
        if not math.isfinite(shift):
            raise ValueError(f"shift must be finite; got {shift!r}")
        self.shift = shift

    def _legs(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Signal and noise before they are normalised, and the norm."""
        signal = torch.sin(math.pi / 2 * (1 - t))  # the cosine, but exactly 0 at t = 1
        noise = math.exp(-self.shift / 2) * torch.sin(math.pi / 2 * t)
        return signal, noise, torch.hypot(signal, noise)

    def _alpha(self, t: Tensor) -> Tensor:
        signal, _, norm = self._legs(t)
        return signal / norm

    def _sigma(self, t: Tensor) -> Tensor:
        _, noise, norm = self._legs(t)
        return noise / norm


class Sigmoid(GaussianPath):
    r"""α² falls along a piece of the logistic function, rescaled to run from 1 to 0.

    .. math:: \alpha^2(t) = \frac{s(e/\tau) - s\bigl((t(e-b)+b)/\tau\bigr)}{s(e/\tau) - s(b/\tau)}, \qquad s(u) = 1/(1+e^{-u})

    Arguments:
        start, end: The piece [b, e] of the logistic function.
        tau: Its temperature, above 0; smaller is steeper.

    Source:
        | On the Importance of Noise Scheduling for Diffusion Models (Chen, 2023), Algorithm 1
    """

    def __init__(self, start: float = -3.0, end: float = 3.0, tau: float = 1.0):
        super().__init__()
        if not (start < end and tau > 0):
            raise ValueError(f"start, end and tau must satisfy start < end and tau > 0; got {start}, {end}, {tau}")
        self.start, self.end, self.tau = start, end, tau

    def _fraction(self, share: Tensor, t: Tensor, edge: float) -> Tensor:
        """s between the time t and the other edge, from s(u) − s(w) = sinh((u − w)/2) / (2 cosh(u/2) cosh(w/2))."""
        width = (self.end - self.start) / self.tau
        u = self.start / self.tau + t * width
        return torch.sinh(share * width / 2) / math.sinh(width / 2) * math.cosh(edge / self.tau / 2) / torch.cosh(u / 2)

    def _alpha(self, t: Tensor) -> Tensor:
        return self._fraction(1 - t, t, self.start).sqrt()

    def _variance(self, t: Tensor) -> Tensor:
        return self._fraction(t, t, self.end)


class Straight(GaussianPath):
    r"""Straight lines from data to noise, :math:`x_t = (1-t)\,x_0 + t\,\epsilon`: the path of flow matching.

    Source:
        | Flow Matching for Generative Modeling (Lipman et al., 2023); Flow Straight and Fast (Liu et al., 2023)
    """

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t


class Scaled(GaussianPath):
    r"""Another path with its data made smaller, :math:`x_t = \alpha(t)\,b\,x_0 + \sigma(t)\,\epsilon`.

    That adds 2 log b to the log-SNR. A network wants inputs of one size, so divide what *it* sees by the deviation of x_t,
    :math:`\sqrt{b^2\alpha^2 + \sigma^2}` for data of variance 1. The state x_t of a sampler stays as it is, and at t = 0 it
    ends in b·x_0.

    Arguments:
        path: A continuous path.
        scale: b, above 0.

    Raises:
        ValueError: If `scale` is not positive and finite, or the path is a chain.

    Source:
        | On the Importance of Noise Scheduling for Diffusion Models (Chen, 2023), section 2.2

    Example:
        >>> path = Scaled(Cosine(), 0.5)
        >>> path.alpha(0.0).item(), round((path.logsnr(0.5) - Cosine().logsnr(0.5)).exp().item(), 6)
        (0.5, 0.25)
    """

    def __init__(self, path: GaussianPath, scale: float):
        super().__init__()
        if path.horizon != 1:
            raise ValueError(f"path must be continuous, with t in [0, 1]; got {path!r}")
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale must be positive; got {scale!r}")
        self.path, self.scale = path, scale

    def _alpha(self, t: Tensor) -> Tensor:
        return self.scale * self.path._alpha(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.path._sigma(t)

    def _variance(self, t: Tensor) -> Tensor:
        return self.path._variance(t)
