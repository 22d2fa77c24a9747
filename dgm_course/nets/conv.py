"""Convolutional networks without a time: the two halves of VAE and GAN, and the network inside a coupling layer."""

import torch
from torch import Tensor, nn

__all__ = ["ConvCoupler", "ConvDecoder", "ConvEncoder"]


class ConvEncoder(nn.Module):
    """From an image of 28×28 to a few numbers: a VAE's encoder, a GAN's discriminator.

    Arguments:
        outputs: How many numbers.
        width: Channels of the first layer.
        image_channels: Channels of the images; 1 for grey, m if m images are looked at together.

    Shapes:
        x (B, C, 28, 28) → (B, outputs).

    Example:
        >>> ConvEncoder(8)(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 8])
    """

    def __init__(self, outputs: int, width: int = 32, image_channels: int = 1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(image_channels, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 7 * 7, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvDecoder(nn.Module):
    """From a few numbers to an image of 28×28: a VAE's decoder, a GAN's generator.

    Arguments:
        latent: How many numbers.
        width: Channels of the last hidden layer.

    Shapes:
        z (B, latent) → (B, 1, 28, 28), in (−1, 1).

    Example:
        >>> ConvDecoder(8)(torch.zeros(3, 8)).shape
        torch.Size([3, 1, 28, 28])
    """

    def __init__(self, latent: int, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latent, 2 * width * 7 * 7),
            nn.Unflatten(1, (2 * width, 7, 7)),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class ConvCoupler(nn.Module):
    """Residual convolutions from the kept values of an image to a scale and a shift for each value; zero at the start.

    No normalization: a branch that starts at zero does not need it, and it would cost as much as the convolutions.

    Arguments:
        channels: Channels of the image.
        width: Channels inside.
        blocks: Residual blocks of two convolutions.

    Shapes:
        x (B, C, H, W) → (B, 2C, H, W).

    Source:
        | Fixup initialization (Zhang et al., 2019), section 3, for the zero at the end of each branch

    Example:
        >>> ConvCoupler(4, 16, 1)(torch.randn(3, 4, 7, 7)).abs().max().item()
        0.0
    """

    def __init__(self, channels: int, width: int, blocks: int):
        super().__init__()

        def branch() -> nn.Module:
            return nn.Sequential(
                nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), zero(nn.Conv2d(width, width, 3, padding=1))
            )

        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(branch() for _ in range(blocks))
        self.leave = zero(nn.Conv2d(width, 2 * channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = h + block(h)
        return self.leave(nn.functional.silu(h))


def zero(layer: nn.Module) -> nn.Module:
    """The layer, with weight and bias at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
