"""What a notebook prints: checked claims, the same line on every machine, and the source of a kernel worth reading."""

import ast
import inspect
import textwrap

__all__ = ["claim", "show_source"]


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
    if not isinstance(value, bool) and type(value).__name__ not in ("BooleanTrue", "BooleanFalse"):  # SymPy's two
        raise TypeError(f"condition must be true or false; got {value!r} for the claim {text!r}")
    if not value:
        raise AssertionError(f"✗ {text}")
    print(f"✓ {text}")


def show_source(kernel) -> None:
    """Show the code of a function or class, without its docstring.

    Arguments:
        kernel: A function, method or class of the course.

    Example:
        >>> show_source(claim)
        <IPython.core.display.Markdown object>
    """
    from IPython.display import Markdown, display

    source = textwrap.dedent(inspect.getsource(kernel))
    lines = source.splitlines()
    first = ast.parse(source).body[0].body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        del lines[first.lineno - 1 : first.end_lineno]
    display(Markdown("```python\n" + "\n".join(lines) + "\n```"))
