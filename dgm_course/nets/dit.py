"""A diffusion transformer small enough to train on two processor cores."""

import torch
from torch import Tensor, nn

from dgm_course.nets.conv import zero
from dgm_course.nets.embeddings import LabelEmbedding, TimeEmbedding, sinusoids

__all__ = ["Attention", "DiT", "DiTBlock", "attention_maps", "positions"]

CONDITIONING = ("adaLN-Zero", "cross-attention", "in-context")


class Attention(nn.Module):
    r"""Each token asks all tokens of a context, or of its own sequence, and takes a weighted mean of their values.

    .. math:: \mathrm{softmax}\bigl(QK^\top/\sqrt{d}\bigr)\,V\,W_o, \qquad Q = hW_q,\quad K = cW_k,\quad V = cW_v

    Arguments:
        width: Numbers in a token, in all heads together.
        heads: Heads, each with d = width / heads of the numbers.

    Shapes:
        h (B, N, width), context c (B, M, width) or None for h itself → (B, N, width).

    Raises:
        ValueError: If the heads do not divide the width.

    Source:
        | Attention Is All You Need (Vaswani et al., 2017), eq. 1 and section 3.2.2

    Example:
        >>> Attention(32, 4)(torch.zeros(2, 9, 32)).shape
        torch.Size([2, 9, 32])
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width, {width}; got {heads}")
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        v = self._split(self.value(h if context is None else context))
        mixed = self.weights(h, context) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))

    def weights(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Who looks at whom: (B, heads, N, M), each row a distribution over the context."""
        q, k = self._split(self.query(h)), self._split(self.key(h if context is None else context))
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)

    def _split(self, h: Tensor) -> Tensor:
        """(B, N, width) → (B, heads, N, d)."""
        return h.unflatten(2, (self.heads, -1)).transpose(1, 2)


class DiTBlock(nn.Module):
    r"""Attention and a perceptron on residual branches, told the time and the label in one of three ways.

    "adaLN-Zero": each branch f is scaled, shifted and gated by the condition c. W starts at zero, so the gate g is zero and
    the block starts as the identity:

    .. math:: h \leftarrow h + g\,f\bigl((1 + s)\,\mathrm{norm}(h) + b\bigr), \qquad (b, s, g) = W\,\mathrm{SiLU}(c)

    "cross-attention": a third branch, between the two, attends to the tokens of the condition. "in-context": the tokens of
    the condition stand in the sequence itself, and the block is a plain transformer's.

    Arguments:
        width, heads: As in `Attention`.
        ratio: Hidden width of the perceptron, in units of `width`.
        conditioning: "adaLN-Zero", "cross-attention" or "in-context".

    Shapes:
        h (B, N, width), condition (B, M, width), a token for each thing told → (B, N, width).

    Raises:
        ValueError: If `conditioning` is another.

    Source:
        | Slide "DiT"; Scalable Diffusion Models with Transformers (Peebles & Xie, 2023), section 3.2 and figure 3

    Example:
        >>> h, condition = torch.randn(2, 49, 32), torch.randn(2, 2, 32)
        >>> (DiTBlock(32, 4)(h, condition) == h).all().item()
        True
    """

    def __init__(self, width: int, heads: int, ratio: float = 4.0, conditioning: str = "adaLN-Zero"):
        super().__init__()
        if conditioning not in CONDITIONING:
            raise ValueError(f"conditioning must be one of {', '.join(CONDITIONING)}; got {conditioning!r}")
        self.adaptive, self.crossed = conditioning == "adaLN-Zero", conditioning == "cross-attention"
        hidden = int(ratio * width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, 1e-6, elementwise_affine=not self.adaptive) for _ in range(2))
        self.attention = Attention(width, heads)
        self.perceptron = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        if self.adaptive:
            self.modulation = zero(nn.Linear(width, 6 * width))
        if self.crossed:
            self.norm_cross, self.cross = nn.LayerNorm(width, 1e-6), Attention(width, heads)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        if self.adaptive:
            c = nn.functional.silu(condition.sum(1, keepdim=True))
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
            h = h + gate1 * self.attention(self.norm1(h) * (1 + scale1) + shift1)
            return h + gate2 * self.perceptron(self.norm2(h) * (1 + scale2) + shift2)
        h = h + self.attention(self.norm1(h))
        if self.crossed:
            h = h + self.cross(self.norm_cross(h), condition)
        return h + self.perceptron(self.norm2(h))


class DiT(nn.Module):
    """A diffusion transformer: squares of pixels become tokens, and every token looks at every other in each block.

    The tokens know where they are by the sinusoids of their row and column, added once. Time and label come as two tokens
    of a condition; how the blocks use it is `conditioning`.

    Arguments:
        image_channels: Channels of the images, 1 for grey.
        size: Side of the images, a multiple of `patch`.
        patch: Side of the square that becomes a token.
        width: Numbers in a token, a multiple of 4 and of `heads`.
        depth: Number of blocks.
        heads: Heads of each attention.
        ratio: Hidden width of the perceptrons, in units of `width`.
        num_classes: 0 for a network without labels; else the null label is `num_classes`.
        conditioning: "adaLN-Zero", "cross-attention" or "in-context", see `DiTBlock`.

    Shapes:
        xt (B, C, size, size), t (B,) in [0, 1], y (B,) int64 or None → (B, C, size, size).

    Raises:
        ValueError: If the sizes do not fit, or labels come to a network without them.

    Source:
        | Slide "DiT"; Scalable Diffusion Models with Transformers (Peebles & Xie, 2023), section 3.2

    Example:
        >>> DiT(width=32, depth=1, num_classes=10)(torch.zeros(2, 1, 28, 28), torch.zeros(2), torch.tensor([3, 10])).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        image_channels: int = 1,
        size: int = 28,
        patch: int = 4,
        width: int = 96,
        depth: int = 6,
        heads: int = 4,
        ratio: float = 4.0,
        num_classes: int = 0,
        conditioning: str = "adaLN-Zero",
    ):
        super().__init__()
        if patch < 1 or size % patch:
            raise ValueError(f"patch must divide the size of the images, {size}; got {patch}")
        if width % 4:
            raise ValueError(f"width must be a multiple of 4, for the sinusoids of row and column; got {width}")
        self.image_shape, self.patch = (image_channels, size, size), patch
        self.adaptive, self.in_context = conditioning == "adaLN-Zero", conditioning == "in-context"
        numbers = image_channels * patch**2
        self.time = TimeEmbedding(width)
        self.label = LabelEmbedding(num_classes, width) if num_classes else None
        self.enter = nn.Linear(numbers, width)
        self.register_buffer("positions", positions(size // patch, width), persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, ratio, conditioning) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-6, elementwise_affine=not self.adaptive)
        if self.adaptive:
            self.modulation = zero(nn.Linear(width, 2 * width))
        self.leave = zero(nn.Linear(width, numbers))

    def forward(self, xt: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if xt.shape[1:] != self.image_shape:
            raise ValueError(f"xt must have shape (B, {', '.join(map(str, self.image_shape))}); got {tuple(xt.shape)}")
        if y is not None and self.label is None:
            raise ValueError("y was given, but this DiT was built with num_classes = 0")
        told = [self.time(t)] + ([self.label(y, len(xt))] if self.label is not None else [])
        condition = torch.stack(told, dim=1)  # (B, 2, width): a token for the time, a token for the label
        patches = nn.functional.pixel_unshuffle(xt, self.patch).flatten(2).mT  # (B, N, numbers of a patch)
        h = self.enter(patches) + self.positions
        if self.in_context:
            h = torch.cat([condition, h], dim=1)
        for block in self.blocks:
            h = block(h, condition)
        h = self.norm(h[:, -patches.shape[1] :])
        if self.adaptive:
            shift, scale = self.modulation(nn.functional.silu(condition.sum(1, keepdim=True))).chunk(2, dim=-1)
            h = h * (1 + scale) + shift
        side = xt.shape[-1] // self.patch
        return nn.functional.pixel_shuffle(self.leave(h).mT.unflatten(2, (side, side)), self.patch)


def positions(side: int, width: int) -> Tensor:
    """Where each token is: sinusoids of its row, then of its column, shape (side², width).

    Arguments:
        side: Tokens in a row, and in a column.
        width: Numbers in a token, a multiple of 4.

    Source:
        | Attention Is All You Need (Vaswani et al., 2017), section 3.5, for one dimension; An Image is Worth 16x16 Words
        | (Dosovitskiy et al., 2021), appendix D.4, for two

    Example:
        >>> positions(7, 32).shape
        torch.Size([49, 32])
    """
    line = sinusoids(torch.arange(side) / 1000, width // 2)  # `sinusoids` multiplies by 1000
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


@torch.no_grad()
def attention_maps(net: DiT, xt: Tensor, t: Tensor, y: Tensor | None = None) -> list[Tensor]:
    """Who looks at whom in each block: a tensor (B, heads, N, N) for each, rows that sum to 1.

    Arguments:
        net: With "in-context" conditioning the two told tokens come first, so N is larger by 2.
        xt, t, y: What the network is given.

    Example:
        >>> maps = attention_maps(DiT(width=32, depth=3), torch.zeros(2, 1, 28, 28), torch.zeros(2))
        >>> len(maps), maps[0].shape
        (3, torch.Size([2, 4, 49, 49]))
    """
    maps = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda attention, h: maps.append(attention.weights(*h)))
        for block in net.blocks
    ]
    try:
        net(xt, t, y)
    finally:
        for hook in hooks:
            hook.remove()
    return maps
