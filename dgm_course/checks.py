"""Checks that a notebook shows: the same line on every machine, or a failure."""

__all__ = ["claim"]


def claim(text: str, condition) -> None:
    """Print "✓ text" if the condition holds, else fail the cell.

    Arguments:
        text: What is claimed.
        condition: A truth value: a bool, or a NumPy, PyTorch or SymPy scalar that is one.

    Raises:
        AssertionError: If the condition does not hold.
        TypeError: If it is no truth value, such as a number or a whole tensor.

    Example:
        >>> claim("a square is not negative", (-3) ** 2 >= 0)
        ✓ a square is not negative
    """
    value = condition.item() if hasattr(condition, "item") and getattr(condition, "shape", None) == () else condition
    if not isinstance(value, bool) and str(value) not in ("True", "False"):
        raise TypeError(f"condition must be true or false; got {value!r} for the claim {text!r}")
    if not value:
        raise AssertionError(f"✗ {text}")
    print(f"✓ {text}")
