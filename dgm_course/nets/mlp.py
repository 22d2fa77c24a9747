"""Small networks for points."""

from itertools import pairwise

from torch import Tensor, nn

from dgm_course.nets.embeddings import LabelEmbedding, TimeEmbedding

__all__ = ["MLP", "perceptron"]


class MLP(nn.Module):
    """Residual layers on points of R^dim, steered by time and label.

    Arguments:
        dim: Dimension of a point.
        width: Width of the hidden layers.
        depth: Number of residual layers.
        num_classes: 0 for a network without labels.

    Shapes:
        xt (B, dim), t (B,) in [0, 1], y (B,) int64 or None → (B, dim).

    Example:
        >>> import torch
        >>> MLP(2)(torch.zeros(3, 2), torch.zeros(3)).shape
        torch.Size([3, 2])
    """

    def __init__(self, dim: int = 2, width: int = 128, depth: int = 3, num_classes: int = 0):
        super().__init__()
        self.time = TimeEmbedding(width)
        self.label = LabelEmbedding(num_classes, width) if num_classes else None
        self.enter = nn.Linear(dim, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.leave = nn.Linear(width, dim)

    def forward(self, xt: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if y is not None and self.label is None:
            raise ValueError("y was given, but this MLP was built with num_classes = 0")
        condition = self.time(t)
        if self.label is not None:
            condition = condition + self.label(y, len(xt))
        h = self.enter(xt)
        for layer in self.layers:
            h = h + layer(h + condition)
        return self.leave(nn.functional.silu(h))


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with SiLU between them, for points and without a time.

    Arguments:
        widths: Sizes, from the input's to the output's.

    Example:
        >>> import torch
        >>> perceptron(2, 64, 64, 1)(torch.zeros(3, 2)).shape
        torch.Size([3, 1])
    """
    layers = [layer for inside, outside in pairwise(widths) for layer in (nn.Linear(inside, outside), nn.SiLU())]
    return nn.Sequential(*layers[:-1])
