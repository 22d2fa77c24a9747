r"""How far one distribution is from another: Kullback–Leibler both ways round, Jensen–Shannon, and the Gaussians nearest in each."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["gaussian_kl", "jensen_shannon", "kl", "nearest_reverse", "standard_kl"]


def gaussian_kl(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor) -> Tensor:
    r"""KL(p‖q) of two Gaussians, in nats.

    .. math:: D_{KL}(p \Vert q) = \tfrac12\Bigl(\mathrm{tr}\,C_q^{-1}C_p + (m_q - m_p)^\top C_q^{-1}(m_q - m_p) - d
              + \log\frac{\det C_q}{\det C_p}\Bigr)

    Arguments:
        mean_p, mean_q: Shapes (…, d), which broadcast.
        cov_p, cov_q: Symmetric and positive definite, shapes (…, d, d).

    Returns:
        Shape (…).

    Raises:
        ValueError: If a matrix is not positive definite, or the dimensions differ.

    Source:
        | Slide "Effect of framing"; Auto-Encoding Variational Bayes (Kingma & Welling, 2014), appendix B, for q standard

    Example:
        >>> eye = torch.eye(2)
        >>> gaussian_kl(torch.zeros(2), eye, torch.tensor([3.0, 4.0]), eye).item()
        12.5
    """
    factor_p, factor_q = _cholesky("cov_p", cov_p, mean_p), _cholesky("cov_q", cov_q, mean_q)
    if mean_p.shape[-1] != mean_q.shape[-1]:
        raise ValueError(f"mean_q must have {mean_p.shape[-1]} dimensions, like mean_p; got {mean_q.shape[-1]}")
    spread = torch.linalg.solve_triangular(factor_q, factor_p, upper=False).square().sum((-1, -2))
    shift = torch.linalg.solve_triangular(factor_q, (mean_q - mean_p)[..., None], upper=False).square().sum((-1, -2))
    log_det = 2 * (_log_diagonal(factor_q) - _log_diagonal(factor_p))
    return 0.5 * (spread + shift - mean_p.shape[-1] + log_det)


def standard_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    r"""KL from each :math:`\mathcal N(\mu_i, \sigma_i^2)` to :math:`\mathcal N(0, 1)`: the VAE's second term, one number for each latent.

    .. math:: D_{KL} = \tfrac12\bigl(\mu^2 + \sigma^2 - 1 - \log\sigma^2\bigr)

    Arguments:
        mean, log_var: μ and log σ², same shape.

    Returns:
        Nats, of that shape; a sum over the last dimension is the KL of the vectors.

    Source:
        | Slide "VAE"; Kingma & Welling (2014), appendix B

    Example:
        >>> standard_kl(torch.tensor([0.0, 2.0]), torch.zeros(2))
        tensor([0., 2.])
    """
    if mean.shape != log_var.shape:
        raise ValueError(f"log_var must have the shape of mean, {tuple(mean.shape)}; got {tuple(log_var.shape)}")
    return 0.5 * (mean.square() + log_var.expm1() - log_var)


def kl(log_p: Tensor, log_q: Tensor, cell: float) -> Tensor:
    r"""KL(p‖q) of two densities given on a grid, :math:`\sum p\,(\log p - \log q)\,\Delta`; swap the first two for KL(q‖p).

    Arguments:
        log_p, log_q: Log-densities at the grid's points, same shape.
        cell: Δ, the length, area or volume of a cell.

    Raises:
        ValueError: If the shapes differ.

    Source:
        | Slide "Effect of framing"

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> round(kl(p.log(), q.log(), cell=1.0).item(), 4)
        0.1438
    """
    if log_p.shape != log_q.shape:
        raise ValueError(f"log_q must have the shape of log_p, {tuple(log_p.shape)}; got {tuple(log_q.shape)}")
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum() * cell  # 0 · log 0 = 0


def jensen_shannon(log_p: Tensor, log_q: Tensor, cell: float) -> Tensor:
    r"""The Jensen–Shannon divergence of two densities on a grid, at most log 2.

    .. math:: JS(p, q) = \tfrac12 D_{KL}(p \Vert m) + \tfrac12 D_{KL}(q \Vert m), \qquad m = \tfrac12(p + q)

    Arguments:
        log_p, log_q, cell: As in `kl`.

    Source:
        | Generative Adversarial Nets (Goodfellow et al., 2014), eq. 6

    Example:
        >>> apart = torch.tensor([0.0, -torch.inf])
        >>> round(jensen_shannon(apart, apart.flip(0), cell=1.0).item(), 4)
        0.6931
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (kl(log_p, log_m, cell) + kl(log_q, log_m, cell))


def nearest_reverse(
    log_p: Callable[[Tensor], Tensor], mean: Tensor, cov: Tensor, *, nodes: int = 40, steps: int = 200
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The Gaussian q that a descent from a start reaches in :math:`D_{KL}(q \Vert p) = \mathbb E_q[\log q(x) - \log p(x)]`.

    There are several such minima as a rule, and the start decides. The expectation is taken by Gauss–Hermite quadrature, so
    the result is the same each time.

    Arguments:
        log_p: Log-density, (B, d) → (B,), differentiable.
        mean, cov: The start, shapes (d,) and (d, d), in float64.
        nodes: Quadrature points in each dimension, nodes^d in all.
        steps: Most iterations of L-BFGS.

    Returns:
        The mean, the covariance, and the divergence reached in nats.

    Raises:
        ValueError: If the start is no Gaussian.

    Source:
        | Slide "Effect of framing", second question

    Example:
        >>> normal = lambda x: -0.5 * (x**2).sum(1) - math.log(2 * math.pi)
        >>> _, cov, value = nearest_reverse(normal, torch.ones(2).double(), 3 * torch.eye(2).double())
        >>> bool((cov - torch.eye(2)).abs().max() < 1e-5), bool(value.abs() < 1e-6)
        (True, True)
    """
    import numpy as np

    dim = len(mean)
    factor = _cholesky("cov", cov, mean)
    places, weights = (torch.as_tensor(a, dtype=mean.dtype) for a in np.polynomial.hermite_e.hermegauss(nodes))
    z = torch.cartesian_prod(*[places] * dim).reshape(-1, dim)
    w = torch.cartesian_prod(*[weights / weights.sum()] * dim).reshape(-1, dim).prod(1)
    centre = mean.clone().requires_grad_()
    lower = (
        factor.tril(-1) + factor.diagonal().log().diag()
    ).requires_grad_()  # log of the diagonal: it stays positive
    optimizer = torch.optim.LBFGS(
        [centre, lower], max_iter=steps, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def divergence() -> Tensor:
        factor = lower.tril(-1) + lower.diagonal().exp().diag()
        entropy = lower.diagonal().sum() + dim / 2 * math.log(2 * math.pi * math.e)
        return -entropy - w @ log_p(centre + z @ factor.T)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = divergence()
        value.backward()
        return value

    optimizer.step(closure)
    factor = (lower.tril(-1) + lower.diagonal().exp().diag()).detach()
    return centre.detach(), factor @ factor.T, divergence().detach()


def _cholesky(name: str, cov: Tensor, mean: Tensor) -> Tensor:
    if cov.shape[-2:] != (mean.shape[-1], mean.shape[-1]):
        raise ValueError(f"{name} must have shape (…, {mean.shape[-1]}, {mean.shape[-1]}); got {tuple(cov.shape)}")
    factor, failed = torch.linalg.cholesky_ex(cov)
    if bool(failed.any()) or not torch.allclose(cov, cov.mT):
        raise ValueError(f"{name} must be symmetric and positive definite; got {cov.tolist()}")
    return factor


def _log_diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
