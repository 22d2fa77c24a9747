"""Prefix tuning: learned keys and values that every token of a frozen transformer can look at."""

from functools import partial

import torch
from torch import Tensor, nn

from dgm_course.nets.dit import Attention
from dgm_course.nets.language import CausalAttention, later
from dgm_course.peft.adapters import transformer_blocks
from dgm_course.peft.freezing import freeze

__all__ = ["Prefix", "PrefixAttention", "add_prefix", "fold"]


class Prefix(nn.Module):
    r"""Keys and values of a prefix for every layer: a table, or while it is trained a perceptron that writes the table.

    .. math:: P = W_2 \tanh(W_1 E + b_1) + b_2, \qquad E \in \mathbb R^{P \times d},\quad P \in \mathbb R^{P \times 2Ld}

    Li and Liang found the table unstable to train by itself. After training `fold` keeps the table alone.

    Arguments:
        length: Tokens in the prefix.
        layers: Layers L that read it.
        width: Numbers d in a key and in a value, in all heads together.
        hidden: Width of the perceptron, or None for the table itself.

    Shapes:
        () → (layers, 2, length, width); `layer(i)` → keys and values, each (length, width).

    Raises:
        ValueError: If a size is less than 1.

    Source:
        | Slide "Emerging Trends in Deep Learning Model"; Prefix-Tuning (Li & Liang, 2021), sections 4.2 and 4.3

    Example:
        >>> Prefix(5, layers=4, width=8, hidden=16)().shape
        torch.Size([4, 2, 5, 8])
    """

    def __init__(self, length: int, layers: int, width: int, hidden: int | None = None):
        super().__init__()
        for name, value in {"length": length, "layers": layers, "width": width, "hidden": hidden}.items():
            if not (isinstance(value, int) and value >= 1) and (value, name) != (None, "hidden"):
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        numbers, self.shape = 2 * layers * width, (layers, 2, width)
        self.table = nn.Embedding(length, width if hidden else numbers)
        self.transform = None
        if hidden:
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, numbers))

    def forward(self) -> Tensor:
        rows = self.table.weight if self.transform is None else self.transform(self.table.weight)
        return rows.unflatten(1, self.shape).permute(1, 2, 0, 3)

    def layer(self, i: int) -> Tensor:
        return self()[i]


class PrefixAttention(nn.Module):
    r"""Attention whose context begins with P learned keys and values.

    .. math:: \mathrm{softmax}\bigl(Q\,[P_K; K]^\top/\sqrt d\bigr)\,[P_V; V]\,W_o

    The queries are as before, so there are P more keys than tokens, and a causal mask leaves all of the prefix in sight. There is no
    start at which this is the attention it wraps: zero keys still take their share of the softmax.

    Arguments:
        attention: An `Attention`, causal or not.
        read: A function () → keys and values, (2, P, width).

    Shapes:
        As the attention's; its weights are (B, heads, N, P + M).
    """

    def __init__(self, attention: Attention, read):
        super().__init__()
        self.attention, self.read = attention, read

    def forward(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        k, v = self._keys_values(h if context is None else context)
        return self.attention.out((self._weights(h, k) @ v).transpose(1, 2).flatten(2))

    def weights(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        """Who looks at whom: (B, heads, N, P + M), the prefix first."""
        return self._weights(h, self._keys_values(h if context is None else context)[0])

    def _weights(self, h: Tensor, k: Tensor) -> Tensor:
        q = self.attention._split(self.attention.query(h))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if isinstance(self.attention, CausalAttention):
            scores = scores.masked_fill(later(q.shape[2], k.shape[2]).to(h.device), -torch.inf)
        return scores.softmax(-1)

    def _keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of prefix and context, each (B, heads, P + M, d)."""
        both = torch.stack([self.attention.key(context), self.attention.value(context)])  # (2, B, M, width)
        prefix = self.read()[:, None].expand(-1, len(context), -1, -1)
        k, v = torch.cat([prefix, both], dim=2)
        return self.attention._split(k), self.attention._split(v)


def add_prefix(model: nn.Module, *, length: int, hidden: int | None = None) -> nn.Module:
    """Freeze a transformer and put a prefix before the keys and values of every block, in place.

    Arguments:
        model: A `nets.DiT` or `nets.LanguageModel`.
        length: Tokens in the prefix.
        hidden: Width of the perceptron that writes it while it is trained, or None.

    Returns:
        The model; its `prefix` is the `Prefix`.

    Raises:
        ValueError: If a size is less than 1, or there is a prefix already.
        TypeError: If the model is no such transformer.

    Source:
        | Prefix-Tuning (Li & Liang, 2021), section 4

    Example:
        >>> from dgm_course.nets import DiT
        >>> model = add_prefix(DiT(width=32, depth=2), length=4)
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        512
    """
    blocks = transformer_blocks(model)
    if hasattr(model, "prefix"):
        raise ValueError("model must not have a prefix yet; build it anew for another")
    weight = next(model.parameters())
    prefix = Prefix(length, len(blocks), model.norm.normalized_shape[0], hidden).to(weight)
    freeze(model)
    model.prefix = prefix
    for i, block in enumerate(blocks):
        block.attention = PrefixAttention(block.attention, partial(prefix.layer, i))
    return model


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Keep of a trained prefix the table alone, in place: what it says stays, and its perceptron goes.

    Raises:
        ValueError: If the model has no prefix.
    """
    if not isinstance(getattr(model, "prefix", None), Prefix):
        raise ValueError(f"model must have a prefix; this {type(model).__name__} has none")
    prefix = model.prefix
    if prefix.transform is not None:
        rows = prefix().permute(2, 0, 1, 3).flatten(1).clone()
        prefix.table, prefix.transform = nn.Embedding.from_pretrained(rows, freeze=False), None
    return model
