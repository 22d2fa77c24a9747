r"""Toy data: a Gaussian mixture whose noised density, score and ideal denoiser are known exactly, and 2-D point sets."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dgm_course.paths.base import GaussianPath, Time, expand

__all__ = ["GaussianMixture", "checkerboard", "ring", "swiss_roll", "two_moons"]


class GaussianMixture:
    r"""A mixture :math:`\sum_k w_k\,\mathcal N(m_k, C_k)`, which stays one under every Gaussian path.

    .. math:: p_t(x) = \sum_k w_k\,\mathcal N\bigl(x;\ \alpha_t m_k,\ \alpha_t^2 C_k + \sigma_t^2 I\bigr)

    So everything that a network would have to learn is known in closed form.

    Arguments:
        means: m_k, shape (K, d).
        covs: C_k: one variance for all, a variance for each of the K, or matrices (K, d, d).
        weights: w_k, positive, shape (K,); normalised here. Equal if not given.

    Raises:
        ValueError: If a shape does not fit, a weight is not positive, or a matrix is not symmetric and non-negative.

    Example:
        >>> one = GaussianMixture(torch.zeros(1, 2), 1.0)
        >>> one.score(torch.ones(1, 2))
        tensor([[-1., -1.]])
    """

    def __init__(self, means: Tensor, covs: Tensor | float, weights: Tensor | None = None):
        means = torch.as_tensor(means)
        if means.ndim != 2 or not means.is_floating_point():
            raise ValueError(
                f"means must be floating-point of shape (K, d); got {means.dtype} of shape {tuple(means.shape)}"
            )
        count, dim = means.shape
        covs = torch.as_tensor(covs, dtype=means.dtype)
        if covs.ndim < 2 and covs.shape in ((), (count,)):
            covs = covs.reshape(-1, 1, 1).expand(count, 1, 1) * torch.eye(dim, dtype=means.dtype)
        if covs.shape != (count, dim, dim) or not torch.allclose(covs, covs.mT):
            raise ValueError(
                f"covs must be a number, ({count},) or symmetric ({count}, {dim}, {dim}); got shape {tuple(covs.shape)}"
            )
        weights = (
            torch.ones(count, dtype=means.dtype) if weights is None else torch.as_tensor(weights, dtype=means.dtype)
        )
        if weights.shape != (count,) or not bool((weights > 0).all()):
            raise ValueError(f"weights must be positive, shape ({count},); got {weights.tolist()}")
        self.means, self.weights = means, weights / weights.sum()
        self._spread, self._axes = torch.linalg.eigh(covs)  # C_k = axes · diag(spread) · axesᵀ
        if self._spread.min() < -1e-6:
            raise ValueError(f"covs must have no negative eigenvalue; got {self._spread.min().item():g}")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n points of the data distribution, shape (n, d)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + torch.einsum("nde,ne->nd", self._axes[k], self._spread[k].clamp(min=0).sqrt() * z)

    @property
    def mean(self) -> Tensor:
        """The mixture's mean, shape (d,)."""
        return self.weights @ self.means

    @property
    def cov(self) -> Tensor:
        r"""The mixture's covariance, (d, d): that within the components and that between them.

        .. math:: C = \sum_k w_k\,\bigl(C_k + (m_k - m)(m_k - m)^\top\bigr)
        """
        within = torch.einsum("k,kde,ke,kfe->df", self.weights, self._axes, self._spread, self._axes)
        off = self.means - self.mean
        return within + torch.einsum("k,kd,ke->de", self.weights, off, off)

    def log_prob(self, x: Tensor, path: GaussianPath | None = None, t: Time = 0.0) -> Tensor:
        """log p_t(x), shape (B,), for x of shape (B, d); without a path, the log-density of the data."""
        return self._terms(x, path, t)[0].logsumexp(1)

    def score(self, x: Tensor, path: GaussianPath | None = None, t: Time = 0.0) -> Tensor:
        """∇ log p_t(x), of the shape of x."""
        joint, turned, var, _ = self._terms(x, path, t)
        return -self._mix(joint, torch.einsum("kde,bke->bkd", self._axes.to(x), turned / var))

    def denoiser(self, path: GaussianPath) -> Callable[[Tensor, Time], Tensor]:
        r"""The ideal denoiser :math:`(x_t, t) \mapsto \mathbb E[x_0 \mid x_t]`, a mean of the components' regressions.

        .. math:: \mathbb E[x_0 \mid x_t] = \sum_k p(k \mid x_t)\,
                  \bigl(m_k + \alpha_t C_k(\alpha_t^2 C_k + \sigma_t^2 I)^{-1}(x_t - \alpha_t m_k)\bigr)
        """

        def denoise(xt: Tensor, t: Time) -> Tensor:
            joint, turned, var, alpha = self._terms(xt, path, t)
            back = torch.einsum("kde,bke->bkd", self._axes.to(xt), alpha * self._spread.to(xt) * turned / var)
            return self._mix(joint, self.means.to(xt) + back)

        return denoise

    def cdf(self, x: Tensor, path: GaussianPath | None = None, t: Time = 0.0) -> Tensor:
        r"""The distribution function in one dimension, F_t(x) = P(x_t ≤ x), for x of shape (B, 1); of its shape.

        .. math:: F_t(x) = \sum_k w_k\,\Phi\bigl((x - \alpha m_k)/\sqrt{\alpha^2 C_k + \sigma^2}\bigr)
        """
        means, var = self._line(x, path, t)
        return (self.weights.to(x) * torch.erfc((means - x) / (2 * var).sqrt()) / 2).sum(1, keepdim=True)

    def quantile(self, p: Tensor, path: GaussianPath | None = None, t: Time = 0.0) -> Tensor:
        """The inverse of `cdf`, by bisection: x with F_t(x) = p, for p in (0, 1), shape (B, 1); of its shape.

        Close to 1, numbers lie 1e-16 apart: beyond seven standard deviations on the right a point is not found again to 8 digits.
        """
        if not bool(((p > 0) & (p < 1)).all()):
            raise ValueError(f"p must lie in (0, 1); got {p.min().item():g} to {p.max().item():g}")
        means, var = self._line(p, path, t)
        reach = 40 * var.sqrt().amax(1, keepdim=True)  # beyond which float64 knows no probability
        low, high = means.amin(1, keepdim=True) - reach, means.amax(1, keepdim=True) + reach
        for _ in range(100):
            middle = (low + high) / 2
            left = self.cdf(middle, path, t) < p
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        return (low + high) / 2

    def _line(self, x: Tensor, path: GaussianPath | None, t: Time) -> tuple[Tensor, Tensor]:
        """Means and variances of the components at t on the line, each (B or 1, K)."""
        if self.means.shape[1] != 1 or x.ndim != 2 or x.shape[1] != 1:
            raise ValueError(
                f"a distribution function needs points (B, 1) and data of one dimension; "
                f"got {tuple(x.shape)} and means {tuple(self.means.shape)}"
            )
        alpha, sigma = (
            (expand(path.alpha(t), x), expand(path.sigma(t), x)) if path else (x.new_ones(()), x.new_zeros(()))
        )
        return alpha * self.means.to(x).mT, alpha**2 * self._spread.to(x).mT + sigma**2

    def _terms(self, x: Tensor, path: GaussianPath | None, t: Time):
        """log w_k + log N_k (B, K); x − αm_k along each component's axes (B, K, d); its variance there; α."""
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(f"x must have shape (B, {self.means.shape[1]}); got {tuple(x.shape)}")
        like = x[:, None, :]
        alpha, sigma = (
            (expand(path.alpha(t), like), expand(path.sigma(t), like)) if path else (x.new_ones(()), x.new_zeros(()))
        )
        turned = torch.einsum("kde,bkd->bke", self._axes.to(x), like - alpha * self.means.to(x))
        var = alpha**2 * self._spread.to(x) + sigma**2
        log_normal = -0.5 * (turned**2 / var + var.log() + math.log(2 * math.pi)).sum(2)
        return self.weights.to(x).log() + log_normal, turned, var, alpha

    @staticmethod
    def _mix(joint: Tensor, values: Tensor) -> Tensor:
        return (joint.softmax(1)[:, :, None] * values).sum(1)


def ring(count: int = 8, radius: float = 2.0, std: float = 0.15) -> GaussianMixture:
    """Gaussians on a circle, the classic test for lost modes."""
    angle = 2 * math.pi * torch.arange(count) / count
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], dim=1), std**2)


def two_moons(n: int, generator: torch.Generator | None = None, noise: float = 0.08) -> Tensor:
    """Two interleaved half circles, shape (n, 2), centred, about 1 in size."""
    angle = math.pi * torch.rand(n, generator=generator)
    side = torch.randint(2, (n,), generator=generator) * 2 - 1
    moon = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1) * side[:, None]
    return moon + noise * torch.randn(n, 2, generator=generator)


def swiss_roll(n: int, generator: torch.Generator | None = None, noise: float = 0.03) -> Tensor:
    """A spiral of one and a half turns, shape (n, 2), within about [−1.2, 1.2]²."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    spiral = angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) / 12
    return spiral + noise * torch.randn(n, 2, generator=generator)


def checkerboard(n: int, generator: torch.Generator | None = None) -> Tensor:
    """The dark squares of a 4×4 board on [−2, 2]², shape (n, 2)."""
    column = torch.randint(4, (n,), generator=generator)
    row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
    return torch.stack([column, row], dim=1) - 2 + torch.rand(n, 2, generator=generator)
