"""Adapters: small layers put into a frozen transformer, which begin as the identity."""

from torch import Tensor, nn

from dgm_course.peft.freezing import freeze

__all__ = ["PLACEMENTS", "Adapter", "add_adapters"]

PLACEMENTS = ("Houlsby", "Pfeiffer")


class Adapter(nn.Module):
    r"""A narrow detour beside a straight way.

    .. math:: a(h) = h + W_{\mathrm{up}}\,\mathrm{GELU}(W_{\mathrm{down}} h + b_{\mathrm{down}}) + b_{\mathrm{up}}

    W_up and b_up are zero at the start, so that a(h) = h exactly.

    Arguments:
        width: Numbers in a token.
        bottleneck: Numbers in the middle.

    Shapes:
        h (…, width) → (…, width).

    Raises:
        ValueError: If `bottleneck` is less than 1.

    Source:
        | Slide "Emerging Trends in Deep Learning Model"; Parameter-Efficient Transfer Learning for NLP (Houlsby et al., 2019), section 2.1

    Example:
        >>> import torch
        >>> h = torch.randn(3, 8)
        >>> (Adapter(8, 2)(h) == h).all().item()
        True
    """

    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        if not (isinstance(bottleneck, int) and bottleneck >= 1):
            raise ValueError(f"bottleneck must be a whole number of at least 1; got {bottleneck!r}")
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(nn.functional.gelu(self.down(h)))


def add_adapters(model: nn.Module, *, bottleneck: int, placement: str = "Houlsby") -> nn.Module:
    """Freeze a transformer and put adapters at the ends of its branches, before what they say is added to the stream, in place.

    "Houlsby" has one after the attention and one after the perceptron of each block, "Pfeiffer" the second only.

    Arguments:
        model: A `nets.DiT` or `nets.LanguageModel`: its `blocks` have an `attention.out` and a `perceptron`.
        bottleneck: Numbers in the middle of each adapter.
        placement: "Houlsby" or "Pfeiffer".

    Returns:
        The model.

    Raises:
        ValueError: If `placement` is another, `bottleneck` is less than 1, or the model has adapters already.
        TypeError: If the model has no such blocks.

    Source:
        | Houlsby et al. (2019), figure 2; AdapterFusion (Pfeiffer et al., 2021), section 3.2.2 and appendix

    Example:
        >>> from dgm_course.nets import DiT
        >>> model = add_adapters(DiT(width=32, depth=2), bottleneck=4, placement="Pfeiffer")
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        584
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}; got {placement!r}")
    blocks = transformer_blocks(model)
    if any(isinstance(layer, Adapter) for layer in model.modules()):
        raise ValueError("model must not have adapters yet; build it anew for others")
    device = next(model.parameters())
    width = model.norm.normalized_shape[0]

    def new() -> Adapter:
        return Adapter(width, bottleneck).to(device)

    made = [(new() if placement == "Houlsby" else None, new()) for _ in blocks]
    freeze(model)
    for block, (after_attention, after_perceptron) in zip(blocks, made, strict=True):
        if after_attention is not None:
            attention = getattr(block.attention, "attention", block.attention)  # behind a prefix
            attention.out = nn.Sequential(attention.out, after_attention)
        block.perceptron.append(after_perceptron)
    return model


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a transformer of the course; raises a TypeError for another model."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not all(
        hasattr(block, "attention") and hasattr(block, "perceptron") for block in blocks
    ):
        raise TypeError(
            f"model must be a transformer of the course, a DiT or a LanguageModel; got {type(model).__name__}"
        )
    return blocks
