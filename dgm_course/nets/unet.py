"""A U-Net small enough to train on two processor cores."""

import torch
from torch import Tensor, nn

from dgm_course.nets.embeddings import LabelEmbedding, TimeEmbedding, WeightEmbedding

__all__ = ["ResBlock", "SelfAttention", "UNet"]


class ResBlock(nn.Module):
    r"""Two convolutions on a residual branch; time and label scale and shift the features between them.

    .. math:: h + W_2 * \mathrm{SiLU}\bigl((1 + s)\,\mathrm{norm}(W_1 * \mathrm{SiLU}(\mathrm{norm}(h))) + b\bigr), \qquad (s, b) = W c

    W_2 starts at zero, so that the block starts as the identity (up to a 1×1 convolution where the width changes).

    Source:
        | Improved DDPM (Nichol & Dhariwal, 2021), section 3.1 ("scale-shift norm"); Ho et al. (2020), appendix B
    """

    def __init__(self, inside: int, outside: int, condition: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inside), nn.GroupNorm(8, outside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * outside)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(nn.functional.silu(condition))[:, :, None, None].chunk(2, dim=1)
        branch = self.conv1(nn.functional.silu(self.norm1(h)))
        branch = self.norm2(branch) * (1 + scale) + shift
        return self.skip(h) + self.conv2(self.dropout(nn.functional.silu(branch)))


class SelfAttention(nn.Module):
    r"""Every position looks at every other: :math:`h + W_o\,\mathrm{softmax}(QK^\top/\sqrt d)\,V`, with W_o zero at the start.

    Source:
        | Attention Is All You Need (Vaswani et al., 2017), eq. 1; Ho et al. (2020), appendix B
    """

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h: Tensor) -> Tensor:
        batch, channels, height, width = h.shape
        qkv = self.qkv(self.norm(h)).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each (B, heads, positions, channels of a head)
        mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return h + self.out(mixed.transpose(-1, -2).reshape(batch, channels, height, width))


class UNet(nn.Module):
    """A two-level U-Net that first folds `fold`×`fold` pixels into channels.

    Folding is free and exact, and it makes every convolution fold² times cheaper: a 28×28 digit is worked on at 14×14
    and 7×7. That is what lets this network see thousands of batches in minutes on a processor.

    Arguments:
        image_channels: Channels of the images, 1 for grey.
        channels: Widths at the first and the second level, multiples of 8.
        blocks: Residual blocks at each level; the first level has as many again on the way up.
        attention: Whether the second level also has self-attention, after each block.
        num_classes: 0 for a network without labels; else the null label is `num_classes`.
        condition: Width of the embedding of time and label.
        fold: Side of the square of pixels that becomes channels.
        dropout: Share of features dropped in each block while training.
        skip: Whether what the first level saw on the way down is handed to the way up; without, to see what it is for.
        out_channels: Channels of the output, those of the images if not given; twice as many for a learned variance.
        guided: Whether it is told a weight of guidance w, as a student of a guided teacher is.

    Shapes:
        xt (B, C, H, W) with H and W divisible by 2·fold, t (B,) in [0, 1], y (B,) int64 or None, w (B,) if guided
        → (B, out_channels, H, W).

    Raises:
        ValueError: If the image does not fold, labels come to a network without them, or w is missing, or given without need.

    Source:
        | Slide "Model architecture"; U-Net (Ronneberger et al., 2015); Ho et al. (2020), appendix B;
        | the folding is the space-to-depth of Shi et al. (2016), section 2.2

    Example:
        >>> UNet(num_classes=10)(torch.zeros(2, 1, 28, 28), torch.zeros(2), torch.tensor([3, 10])).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        image_channels: int = 1,
        channels: tuple[int, int] = (32, 64),
        blocks: tuple[int, int] = (2, 3),
        attention: bool = False,
        num_classes: int = 0,
        condition: int = 128,
        fold: int = 2,
        dropout: float = 0.0,
        skip: bool = True,
        out_channels: int | None = None,
        guided: bool = False,
    ):
        super().__init__()
        wide, deep = channels
        out_channels = out_channels or image_channels
        self.fold, self.skip = fold, skip
        self.time = TimeEmbedding(condition)
        self.label = LabelEmbedding(num_classes, condition) if num_classes else None
        self.weight = WeightEmbedding(condition) if guided else None
        self.enter = nn.Conv2d(image_channels * fold**2, wide, 3, padding=1)
        self.down = nn.ModuleList(ResBlock(wide, wide, condition, dropout) for _ in range(blocks[0]))
        self.shrink = nn.Conv2d(wide, deep, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(ResBlock(deep, deep, condition, dropout) for _ in range(blocks[1]))
        self.attention = nn.ModuleList(SelfAttention(deep) if attention else nn.Identity() for _ in range(blocks[1]))
        self.grow = nn.Sequential(nn.Conv2d(deep, 4 * wide, 1), nn.PixelShuffle(2))
        widths = [2 * wide if skip else wide] + [wide] * (blocks[0] - 1)
        self.up = nn.ModuleList(ResBlock(width, wide, condition, dropout) for width in widths)
        self.leave = nn.Sequential(
            nn.GroupNorm(8, wide), nn.SiLU(), nn.Conv2d(wide, out_channels * fold**2, 3, padding=1)
        )
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def forward(self, xt: Tensor, t: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        if xt.ndim != 4 or any(side % (2 * self.fold) for side in xt.shape[2:]):
            raise ValueError(
                f"xt must have shape (B, C, H, W), H and W divisible by {2 * self.fold}; got {tuple(xt.shape)}"
            )
        if y is not None and self.label is None:
            raise ValueError("y was given, but this UNet was built with num_classes = 0")
        if (w is None) != (self.weight is None) or w is not None and w.shape != (len(xt),):
            raise ValueError(
                f"w must have shape ({len(xt)},) for a UNet built with guided = True, and be given to no other; "
                f"got {'None' if w is None else tuple(w.shape)}"
            )
        condition = self.time(t)
        if self.label is not None:
            condition = condition + self.label(y, len(xt))
        if w is not None:
            condition = condition + self.weight(w)
        h = self.enter(nn.functional.pixel_unshuffle(xt, self.fold))
        for block in self.down:
            h = block(h, condition)
        seen, h = h, self.shrink(h)
        for block, attention in zip(self.middle, self.attention, strict=True):
            h = attention(block(h, condition))
        h = torch.cat([self.grow(h), seen], dim=1) if self.skip else self.grow(h)
        for block in self.up:
            h = block(h, condition)
        return nn.functional.pixel_shuffle(self.leave(h), self.fold)
