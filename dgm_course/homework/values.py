"""What goes into an exercise's function and what comes out, as JSON and arrays: for files, and for the grader's pipe."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Affine", "decode", "encode"]

DTYPES = {"float16", "float32", "float64", "int32", "int64", "bool"}  # plain numbers, the same in NumPy and PyTorch


@dataclass(frozen=True)
class Affine:
    r"""A denoiser that is data: :math:`\hat x_0(x_t, t) = a_t x_t + b_t`.

    For Gaussian data this is the exact denoiser; a table instead of a network makes every test exact, and it can be
    written to a file.

    Arguments:
        scale, shift: Tables of a and b, shape (T + 1,).

    Example:
        >>> d = Affine(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0]))
        >>> d(torch.ones(2), 1)
        tensor([2.5000, 2.5000])
    """

    scale: Tensor
    shift: Tensor

    def __call__(self, xt: Tensor, t) -> Tensor:
        t = torch.as_tensor(t).long()
        a, b = (table[t].to(xt.dtype) for table in (self.scale, self.shift))
        return a.reshape(a.shape + (1,) * (xt.ndim - a.ndim)) * xt + b.reshape(b.shape + (1,) * (xt.ndim - b.ndim))


def encode(value, arrays: list[np.ndarray]):
    """The value as JSON; arrays in it are appended to `arrays`, and stand in the JSON by their place there.

    What is neither a number, a string, a list or tuple of such values, a plain tensor nor an `Affine` becomes
    ``{"other": what it is}``: a subclass of a tensor, for it may lie about its comparison, or an array of a dtype that
    the file has no name for.
    """
    if type(value) in (type(None), bool, int, float, str):
        return value if not isinstance(value, float) else {"float": value.hex()}
    if type(value) in (list, tuple):
        return {type(value).__name__: [encode(item, arrays) for item in value]}
    if type(value) is Affine:
        return {"affine": [encode(value.scale, arrays), encode(value.shift, arrays)]}
    if type(value) is not Tensor:
        return {"other": f"of type {type(value).__name__}"[:200]}
    if str(value.dtype).removeprefix("torch.") not in DTYPES:
        return {"other": f"a tensor of {value.dtype}"}
    if value.layout is not torch.strided or value.is_meta:
        return {"other": "a tensor that does not store each value"}  # NumPy has no such arrays
    arrays.append(np.array(value.detach().cpu().resolve_neg().numpy(), order="C"))
    return {"tensor": len(arrays) - 1}


def decode(form, arrays: list[np.ndarray], tensor: Callable = torch.from_numpy):
    """The value that `encode` wrote; `tensor` makes a tensor of an array.

    Raises:
        ValueError: If it is no form that `encode` writes.
    """
    if form is None or type(form) in (bool, int, str):
        return form
    if type(form) is dict and len(form) == 1:
        ((kind, content),) = form.items()
        if kind == "float" and type(content) is str:
            return number(content)
        if kind in ("list", "tuple") and type(content) is list:
            return {"list": list, "tuple": tuple}[kind](decode(item, arrays, tensor) for item in content)
        if kind == "affine" and type(content) is list and len(content) == 2:
            return Affine(*(decode(item, arrays, tensor) for item in content))
        if kind == "tensor" and type(content) is int and 0 <= content < len(arrays):
            return tensor(arrays[content])
        if kind == "other" and type(content) is str:
            return Other(content[:200])
    raise ValueError(f"no value is written like this: {str(form)[:80]}")


def number(text: str) -> float:
    try:
        return float.fromhex(text)
    except OverflowError:
        raise ValueError(f"no float is written like this: {text[:80]}") from None


@dataclass(frozen=True)
class Other:
    """Stands for a value that is not passed on."""

    what: str
