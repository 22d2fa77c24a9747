"""A classifier of small grey images, clean or noisy; the features of one that saw clean images also score generated ones."""

from torch import Tensor, nn

from dgm_course.nets.embeddings import TimeEmbedding

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """Five convolutions, two of them with stride 2, then a linear layer on the mean over positions.

    The mean over positions, `width` numbers for each image, is what the scores in `metrics` compare.

    Arguments:
        image_channels: Channels of the images, 1 for grey.
        num_classes: Number of classes.
        width: Number of features, a multiple of 32.
        timed: Whether it classifies noisy images, and is told the time. What the first two layers see is then moved by an
            embedding of t.

    Shapes:
        x (B, C, H, W), and t (B,) in [0, 1] if timed → logits (B, num_classes).

    Raises:
        ValueError: If x is not a batch of images, or t is missing, or given without need.

    Source:
        | All convolutional net (Springenberg et al., 2015), section 2; features in place of Inception's, as in Heusel et al.
        | (2017), section 2; with the time: Diffusion Models Beat GANs (Dhariwal & Nichol, 2021), section 4

    Example:
        >>> import torch
        >>> net = Classifier()
        >>> net(torch.zeros(3, 1, 28, 28)).shape, net.features(torch.zeros(3, 1, 28, 28)).shape
        (torch.Size([3, 10]), torch.Size([3, 128]))
    """

    def __init__(self, image_channels: int = 1, num_classes: int = 10, width: int = 128, timed: bool = False):
        super().__init__()
        self.image_channels = image_channels
        layers, inside = [], image_channels
        for outside, stride in [(width // 4, 1), (width // 4, 2), (width // 2, 1), (width // 2, 2), (width, 1)]:
            layers += [nn.Conv2d(inside, outside, 3, stride, padding=1), nn.GroupNorm(8, outside), nn.SiLU()]
            inside = outside
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(width, num_classes))
        self.time = TimeEmbedding(width // 4) if timed else None

    def features(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """What the last layer sees of each image, shape (B, width)."""
        if x.ndim != 4 or x.shape[1] != self.image_channels:
            raise ValueError(f"x must have shape (B, {self.image_channels}, H, W); got {tuple(x.shape)}")
        if (t is None) != (self.time is None):
            raise ValueError("t must be given to a classifier that is timed, and to no other")
        h = self.trunk[:6](x)  # two layers
        if t is not None:
            h = h + self.time(t)[:, :, None, None]
        return self.trunk[6:](h).mean((2, 3))

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return self.head(self.features(x, t))
