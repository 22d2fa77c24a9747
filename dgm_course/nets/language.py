"""A small language model: a transformer that reads bytes and says which comes next."""

import torch
from torch import Tensor, nn

from dgm_course.nets.dit import Attention, DiTBlock

__all__ = ["CausalAttention", "LanguageModel", "generate", "later"]

BYTES = 256


def later(queries: int, keys: int) -> Tensor:
    """Where a token must not look: (queries, keys), True for the keys that come after it.

    The last keys belong to the queries; any that come before are seen by all, as a prefix is.

    Example:
        >>> later(2, 3).tolist()
        [[False, False, True], [False, False, False]]
    """
    return torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)


class CausalAttention(Attention):
    """Attention in which a token sees itself and what stands before it: the weights of later tokens are zero.

    Source:
        | Attention Is All You Need (Vaswani et al., 2017), section 3.2.3
    """

    def weights(self, h: Tensor, context: Tensor | None = None) -> Tensor:
        q, k = self._split(self.query(h)), self._split(self.key(h if context is None else context))
        hidden = later(q.shape[2], k.shape[2]).to(h.device)
        return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1)


class LanguageModel(nn.Module):
    r"""The chance of each byte, given those before it: :math:`p(x) = \prod_n p(x_n \mid x_1, \dots, x_{n-1})`.

    Blocks are a plain transformer's: attention, then a perceptron, each on a residual branch after a norm.

    Arguments:
        width, depth, heads, ratio: As in `DiT`.
        length: Most bytes that it can read.

    Shapes:
        x (B, N) int64 with N ≤ length → logits of the next byte (B, N, 256).

    Raises:
        ValueError: If x is not int64 of shape (B, N), or too long.

    Source:
        | Language Models are Unsupervised Multitask Learners (Radford et al., 2019), section 2.3, for the order of norm and branch

    Example:
        >>> LanguageModel(width=32, depth=1)(torch.tensor([list(b"flow")])).shape
        torch.Size([1, 4, 256])
    """

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4, ratio: float = 4.0, length: int = 128):
        super().__init__()
        self.length = length
        self.table, self.positions = nn.Embedding(BYTES, width), nn.Embedding(length, width)
        nn.init.normal_(self.table.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, ratio, "in-context") for _ in range(depth))
        for block in self.blocks:
            block.attention = CausalAttention(width, heads)
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, BYTES)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.int64 or x.ndim != 2 or not 1 <= x.shape[1] <= self.length:
            raise ValueError(
                f"x must be int64 of shape (B, N), N from 1 to {self.length}; got {x.dtype} of shape {tuple(x.shape)}"
            )
        h = self.table(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h, None)
        return self.leave(self.norm(h))


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: str,
    number: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> str:
    r"""Write on: draw one byte after the other from :math:`\mathrm{softmax}(\ell/\tau)`.

    Arguments:
        prompt: What it goes on from; not empty.
        number: How many bytes to draw.
        temperature: τ; 0 takes the likeliest byte each time.
        generator: Source of the draws.

    Returns:
        Prompt and continuation; bytes that are no text become �.

    Raises:
        ValueError: If the prompt is empty or the temperature negative.
    """
    if not prompt:
        raise ValueError("prompt must not be empty; got ''")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0; got {temperature}")
    x = torch.tensor([list(prompt.encode())], device=model.table.weight.device)
    for _ in range(number):
        logits = model(x[:, -model.length :])[0, -1]
        if temperature == 0:
            chosen = logits.argmax().view(1)
        else:
            chosen = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
        x = torch.cat([x, chosen[None]], dim=1)
    return bytes(x[0].tolist()).decode(errors="replace")
