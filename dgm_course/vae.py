r"""Variational autoencoders: the bound on the evidence, and a linear model in which nothing about it is hidden."""

import math

import torch
from torch import Tensor, nn

from dgm_course.divergences import gaussian_kl, standard_kl
from dgm_course.nets import ConvDecoder, ConvEncoder

__all__ = ["VAE", "ConvVAE", "LinearGaussian", "gaussian_log_prob", "importance_bound", "loss", "principal"]


def gaussian_log_prob(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    r"""log N(x; mean, diag e^{log_var}), summed over the last dimension. The slide's "~L2" is its first part.

    .. math:: -\log p(x) = \sum_i \frac{(x_i - \mu_i)^2}{2\sigma_i^2} + \tfrac12\log(2\pi\sigma_i^2)

    Arguments:
        x, mean, log_var: Shapes that broadcast, (…, D).

    Source:
        | Slide "VAE"; Auto-Encoding Variational Bayes (Kingma & Welling, 2014), appendix C.2

    Example:
        >>> round(gaussian_log_prob(torch.zeros(1), torch.zeros(1), torch.zeros(1)).item(), 4)
        -0.9189
    """
    return -0.5 * ((x - mean) ** 2 * (-log_var).exp() + log_var + math.log(2 * math.pi)).sum(-1)


class VAE(nn.Module):
    r"""A decoder :math:`p(x \mid z) = \mathcal N(\mu_\theta(z), \sigma^2 I)` and an encoder
    :math:`q(z \mid x) = \mathcal N(m_\phi(x), \mathrm{diag}\,s_\phi^2(x))`, on p(z) = N(0, I).

    Arguments:
        encoder: (B, …) → (B, 2·latent), the means and the log-variances of q.
        decoder: (N, latent) → (N, …), the means of x.
        latent: Size of z.
        log_var: log σ², learned from this start on; a number for all values of x.

    Source:
        | Slide "VAE"; Kingma & Welling (2014), section 3; σ learned as in Simple and Effective VAE Training with Calibrated
        | Decoders (Rybkin et al., 2021), section 3

    Example:
        >>> vae = VAE(nn.Linear(3, 4), nn.Linear(2, 3), latent=2)
        >>> reconstruction, kl = vae.terms(torch.zeros(5, 3), torch.zeros(5, 2))
        >>> reconstruction.shape, kl.shape
        (torch.Size([5]), torch.Size([5, 2]))
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent: int, log_var: float = 0.0):
        super().__init__()
        self.encoder, self.decoder, self.latent = encoder, decoder, latent
        self.log_var = nn.Parameter(torch.tensor(log_var))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z given x), each (B, latent)."""
        mean, log_var = self.encoder(x).to(x.dtype).chunk(2, dim=1)
        return mean, log_var

    def decode(self, z: Tensor) -> Tensor:
        """Mean of p(x given z)."""
        return self.decoder(z).to(z.dtype)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x given z), shape (B,)."""
        return gaussian_log_prob(x.flatten(1), self.decode(z).flatten(1), self.log_var)

    def terms(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        r"""The two terms of the bound, ELBO = reconstruction − Σ KL, by one draw of z.

        .. math:: \mathrm{ELBO}(x) = \mathbb E_q[\log p(x \mid z)] - D_{KL}\bigl(q(z \mid x)\,\Vert\,p(z)\bigr),
                  \qquad z = m + s\,\epsilon

        Arguments:
            x: Shape (B, …).
            eps: ε, standard normal, shape (B, latent); with z a function of it, gradients reach m and s.

        Returns:
            log p(x given z), shape (B,), and the KL of each latent, shape (B, latent), both in nats.
        """
        mean, log_var = self.encode(x)
        z = mean + (0.5 * log_var).exp() * eps
        return self.log_likelihood(x, z), standard_kl(mean, log_var)

    @torch.no_grad()
    def sample(self, number: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Decoder means of draws of z; the decoder's own noise, of variance σ², is left out, as is usual."""
        noise = torch.randn(
            number, self.latent, generator=generator, dtype=self.log_var.dtype, device=self.log_var.device
        )
        return self.decode(temperature * noise)


class ConvVAE(VAE):
    """A convolutional VAE for images (B, 1, 28, 28) in [−1, 1].

    Example:
        >>> ConvVAE(latent=2, width=8).sample(3).shape
        torch.Size([3, 1, 28, 28])
    """

    def __init__(self, latent: int = 16, width: int = 32):
        super().__init__(ConvEncoder(2 * latent, width), ConvDecoder(latent, width), latent, log_var=-2.0)


def loss(vae: VAE, x: Tensor, eps: Tensor, beta: float = 1.0) -> Tensor:
    r"""What a VAE is trained on, −ELBO for each value of x; with β ≠ 1 the KL counts β times.

    .. math:: L = \frac1D\,\Bigl(\beta\,D_{KL}\bigl(q(z \mid x)\,\Vert\,p(z)\bigr) - \mathbb E_q[\log p(x \mid z)]\Bigr)

    Arguments:
        vae, x, eps: As in `VAE.terms`.
        beta: Weight of the KL.

    Source:
        | Slide "VAE"; β: Higgins et al. (2017), eq. 4

    Example:
        >>> vae = VAE(nn.Linear(3, 4), nn.Linear(2, 3), latent=2)
        >>> loss(vae, torch.zeros(5, 3), torch.zeros(5, 2)).shape
        torch.Size([])
    """
    reconstruction, kl = vae.terms(x, eps)
    return (beta * kl.sum(1) - reconstruction).mean() / x[0].numel()


def importance_bound(vae: VAE, x: Tensor, eps: Tensor) -> Tensor:
    r"""A tighter bound from K draws; K = 1 gives an estimate of the ELBO, and on average it rises to log p(x) as K grows.

    .. math:: L_K = \mathbb E\Bigl[\log \frac1K \sum_{k=1}^K \frac{p(x \mid z_k)\,p(z_k)}{q(z_k \mid x)}\Bigr] \le \log p(x)

    Arguments:
        x: Shape (B, …).
        eps: Standard normal, shape (K, B, latent).

    Returns:
        Nats, shape (B,).

    Source:
        | Importance Weighted Autoencoders (Burda et al., 2016), eq. 8

    Example:
        >>> vae = VAE(nn.Linear(3, 4), nn.Linear(2, 3), latent=2)
        >>> importance_bound(vae, torch.zeros(5, 3), torch.randn(10, 5, 2)).shape
        torch.Size([5])
    """
    mean, log_var = vae.encode(x)
    log_weights = []
    for one in eps:
        z = mean + (0.5 * log_var).exp() * one
        prior = gaussian_log_prob(z, z.new_zeros(()), z.new_zeros(()))
        log_weights.append(vae.log_likelihood(x, z) + prior - gaussian_log_prob(z, mean, log_var))
    return torch.stack(log_weights).logsumexp(0) - math.log(len(eps))


class LinearGaussian:
    r"""x = Wz + b + σ·noise on z standard normal: evidence and posterior are Gaussian, so the bound's gap can be seen.

    .. math:: p(x) = \mathcal N(b,\; WW^\top + \sigma^2 I), \qquad
              p(z \mid x) = \mathcal N\bigl(M^{-1}W^\top(x - b),\; \sigma^2 M^{-1}\bigr), \quad M = W^\top W + \sigma^2 I

    Arguments:
        weight: W, shape (D, k).
        bias: b, shape (D,).
        var: σ², positive.

    Source:
        | Probabilistic Principal Component Analysis (Tipping & Bishop, 1999), section 3.1

    Example:
        >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
        >>> mean, cov = model.posterior(torch.ones(1, 1))
        >>> mean.item(), cov.item()
        (0.5, 0.5)
    """

    def __init__(self, weight: Tensor, bias: Tensor, var: float):
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"weight and bias must have shapes (D, k) and (D,); got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        if not var > 0:
            raise ValueError(f"var must be positive; got {var}")
        self.weight, self.bias, self.var = weight, bias, var

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), shape (B,)."""
        eye = torch.eye(len(self.bias), dtype=x.dtype)
        cov = self.weight @ self.weight.T + self.var * eye
        return torch.distributions.MultivariateNormal(self.bias, cov).log_prob(x)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, k) and covariance (k, k) of p(z given x); the covariance is the same for every x."""
        m = self.weight.T @ self.weight + self.var * torch.eye(self.weight.shape[1], dtype=x.dtype)
        return torch.linalg.solve(m, (x - self.bias) @ self.weight, left=False), self.var * m.inverse()

    def terms(self, x: Tensor, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        r"""Both terms of the ELBO for q(z given x) = N(mean, cov), without sampling.

        .. math:: \mathbb E_q[\log p(x \mid z)] = -\frac{\lVert x - b - Wm\rVert^2 + \mathrm{tr}\,W C W^\top}{2\sigma^2}
                  - \frac D2\log 2\pi\sigma^2

        Arguments:
            x: Shape (B, D).
            mean, cov: m, shape (B, k), and C, shape (k, k) or (B, k, k).

        Returns:
            The reconstruction term and the KL to p(z), each (B,).
        """
        size = self.weight.shape[1]
        missed = (x - self.bias - mean @ self.weight.T).square().sum(1)
        spread = torch.einsum("di,...ij,dj->...", self.weight, cov, self.weight)
        fit = -(missed + spread) / (2 * self.var) - 0.5 * x.shape[1] * math.log(2 * math.pi * self.var)
        return fit, gaussian_kl(mean, cov, mean.new_zeros(size), torch.eye(size, dtype=mean.dtype))


def principal(x: Tensor, latent: int, var: float) -> LinearGaussian:
    r"""The linear model that maximizes the bound for a fixed variance: principal axes, each as long as its variance exceeds σ².

    .. math:: W = U_k\,\bigl(\Lambda_k - \sigma^2 I\bigr)_+^{1/2}

    An axis with less variance than σ² gets length 0: that latent has collapsed. With a weight β on the KL the maximum is
    that of the variance βσ².

    Arguments:
        x: Data, shape (N, D).
        latent: k, at most D.
        var: σ², or βσ².

    Source:
        | Tipping & Bishop (1999), section 3.2 and appendix A; Don't Blame the ELBO! (Lucas et al., 2019)

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(1000, 2, generator=g) * torch.tensor([3.0, 0.1])
        >>> (principal(x, 2, var=1.0).weight.norm(dim=0) > 0).tolist()
        [True, False]
    """
    centre = x.mean(0)
    variances, axes = torch.linalg.eigh((x - centre).T @ (x - centre) / len(x))
    variances, axes = variances.flip(0)[:latent], axes.flip(1)[:, :latent]
    return LinearGaussian(axes * (variances - var).clamp(min=0).sqrt(), centre, var)
