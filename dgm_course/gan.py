r"""Generative adversarial networks: two losses, what they aim at, and a model that trains both players at once."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dgm_course.nets import ConvDecoder, ConvEncoder

__all__ = [
    "GAN",
    "ConvGAN",
    "discriminator_loss",
    "generator_loss",
    "gradient_penalty",
    "loss",
    "optimal_logit",
]


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    r"""Binary cross-entropy of telling real from generated, from the logits :math:`\ell`, with D = sigmoid(ℓ).

    .. math:: L_D = -\mathbb E_{x \sim p}[\log D(x)] - \mathbb E_{x \sim q}[\log(1 - D(x))]

    The slide's value, which the discriminator maximizes, is :math:`-L_D`; at the best D it is 2·JS(p, q) − log 4.

    Arguments:
        real, fake: Logits of real and of generated samples.

    Source:
        | Slide "GAN"; Generative Adversarial Nets (Goodfellow et al., 2014), eq. 1

    Example:
        >>> round(discriminator_loss(torch.zeros(3), torch.zeros(3)).item(), 4)
        1.3863
    """
    softplus = nn.functional.softplus
    return softplus(-real).mean() + softplus(fake).mean()  # −log sigmoid(ℓ), and −log(1 − sigmoid(ℓ))


def generator_loss(fake: Tensor, saturating: bool = False) -> Tensor:
    r"""What the generator minimizes: the slide's E[log(1 − D)], or E[−log D], whose gradient does not vanish where D is near 0.

    .. math:: \frac{d}{d\ell}\log(1 - D) = -D, \qquad \frac{d}{d\ell}(-\log D) = -(1 - D)

    Where the discriminator is sure of a fake, D ≈ 0, the first gradient is lost and the second is not.

    Arguments:
        fake: Logits of generated samples.
        saturating: Whether to take the slide's loss.

    Source:
        | Slide "GAN"; Goodfellow et al. (2014), section 3

    Example:
        >>> round(generator_loss(torch.zeros(3)).item(), 4)
        0.6931
    """
    softplus = nn.functional.softplus
    return -softplus(fake).mean() if saturating else softplus(-fake).mean()


def optimal_logit(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""The best discriminator where both densities are known, as a logit: :math:`D^* = p/(p + q)`, :math:`\ell^* = \log p - \log q`.

    Source:
        | Goodfellow et al. (2014), eq. 2

    Example:
        >>> optimal_logit(torch.tensor(-1.0), torch.tensor(-1.0)).sigmoid().item()
        0.5
    """
    return log_p - log_q


def gradient_penalty(discriminator, x: Tensor) -> Tensor:
    r"""The mean of :math:`\lVert\nabla_x \ell(x)\rVert^2` over real samples: a discriminator that is not steep where the data are.

    Source:
        | Which Training Methods for GANs do actually Converge? (Mescheder et al., 2018), eq. 9

    Example:
        >>> gradient_penalty(lambda x: 3 * x.sum(1), torch.zeros(4, 2)).item()
        18.0
    """
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return slope.flatten(1).square().sum(1).mean()


class GAN(nn.Module):
    """A generator and a discriminator.

    Arguments:
        generator: (B, latent) → (B, …).
        discriminator: (B, …) → (B, 1), a logit. With `pack` = m it sees m samples at a time, side by side along
            dimension 1, so that it notices when samples are too much alike.
        latent: Size of the generator's noise.
        pack: m.

    Source:
        | Slide "GAN"; Goodfellow et al. (2014); packing: PacGAN (Lin et al., 2018), section 2

    Example:
        >>> GAN(nn.Linear(4, 2), nn.Linear(2, 1), latent=4).sample(3).shape
        torch.Size([3, 2])
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module, latent: int, pack: int = 1):
        super().__init__()
        self.generator, self.discriminator, self.latent, self.pack = generator, discriminator, latent, pack

    @torch.no_grad()
    def sample(self, number: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw samples; a temperature below 1 draws the noise closer to its mode."""
        like = next(self.parameters())
        noise = torch.randn(number, self.latent, generator=generator, dtype=like.dtype, device=like.device)
        return self.generator(temperature * noise)


class ConvGAN(GAN):
    """A convolutional GAN for images (B, 1, 28, 28) in [−1, 1], of the same two halves as `vae.ConvVAE`.

    Example:
        >>> ConvGAN(latent=8, width=8).sample(3).shape
        torch.Size([3, 1, 28, 28])
    """

    def __init__(self, latent: int = 16, width: int = 32, pack: int = 1):
        super().__init__(ConvDecoder(latent, width), ConvEncoder(1, width, image_channels=pack), latent, pack)


def loss(gan: GAN, x: Tensor, z: Tensor, saturating: bool = False, penalty: float = 0.0) -> Tensor:
    r"""Both players' losses in one number, whose gradient is for each player that of its own loss.

    .. math:: \nabla_{\theta_D} = \nabla_{\theta_D}\bigl(L_D + \tfrac\gamma2 R_1\bigr), \qquad \nabla_{\theta_G} = \nabla_{\theta_G} L_G

    The discriminator sees generated samples without their history, and the generator is judged by a discriminator whose
    weights are constants. So one optimizer moves both at the same time. The number itself has no meaning.

    Arguments:
        gan: The model.
        x: Real samples, shape (B, …), with B a multiple of `gan.pack`.
        z: The generator's noise, shape (B, latent).
        saturating: As in `generator_loss`.
        penalty: γ, the weight of `gradient_penalty`.

    Source:
        | Slide "GAN"; Goodfellow et al. (2014), algorithm 1, with both players moved at the same time

    Example:
        >>> gan = GAN(nn.Linear(4, 2), nn.Linear(2, 1), latent=4)
        >>> loss(gan, torch.zeros(6, 2), torch.zeros(6, 4)).shape
        torch.Size([])
    """
    if len(x) % gan.pack:
        raise ValueError(f"x must have a multiple of pack = {gan.pack} samples; got {len(x)}")
    fake = gan.generator(z)
    judge, real = gan.discriminator, _packed(x, gan.pack)
    judged = discriminator_loss(judge(real), judge(_packed(fake.detach(), gan.pack)))
    if penalty:
        judged = judged + penalty / 2 * gradient_penalty(judge, real)
    constants = {name: value.detach() for name, value in judge.named_parameters()}
    return judged + generator_loss(functional_call(judge, constants, _packed(fake, gan.pack)), saturating)


def _packed(x: Tensor, m: int) -> Tensor:
    """m samples side by side, (B, C, …) → (B/m, m·C, …)."""
    return x.reshape(len(x) // m, m * x.shape[1], *x.shape[2:])
