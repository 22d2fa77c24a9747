"""Which parameters are trained, and which stay as they are."""

from torch import Tensor, nn

__all__ = ["freeze", "train_biases", "trainable"]


def freeze(model: nn.Module) -> nn.Module:
    """Hold every parameter of a model, in place; what is added later can still be trained.

    Example:
        >>> sum(p.requires_grad for p in freeze(nn.Linear(2, 3)).parameters())
        0
    """
    return model.requires_grad_(False)


def train_biases(model: nn.Module) -> nn.Module:
    """Hold every parameter but the biases, in place: the smallest fine-tuning that adds nothing.

    Raises:
        ValueError: If the model has no bias.

    Source:
        | BitFit: Simple Parameter-efficient Fine-tuning (Ben Zaken et al., 2022), section 3

    Example:
        >>> list(trainable(train_biases(nn.Linear(2, 3))))
        ['bias']
    """
    biases = [p for name, p in model.named_parameters() if name.split(".")[-1] == "bias"]
    if not biases:
        raise ValueError(f"model must have biases; this {type(model).__name__} has none")
    freeze(model)
    for bias in biases:
        bias.requires_grad_(True)
    return model


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name: all that a user's file has to hold.

    Example:
        >>> sum(p.numel() for p in trainable(nn.Linear(2, 3)).values())
        9
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
