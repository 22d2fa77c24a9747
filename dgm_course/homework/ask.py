"""Call a student's function: on copies of the inputs, and without the kernels that it is asked to replace."""

import contextlib
import copy
import importlib
import traceback
from collections.abc import Callable, Iterator

from torch import Tensor

__all__ = ["ask", "without"]


class Forbidden(RuntimeError):
    """A kernel was called that the exercise asks to write out."""


def ask(function: Callable, inputs: dict) -> dict:
    """What a function answers to the inputs, which are passed by position.

    Returns:
        ``{"value": …, "inputs": …}``: the value, and the inputs as they are afterwards; or
        ``{"raised": name, "message": …, "line": …, "inside": …}``, with the line of the function, counted from its `def`,
        if known, and the name of the function that raised the error.
    """
    given = {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in inputs.items()
    }
    try:
        return {"value": function(*given.values()), "inputs": given}
    except (Exception, SystemExit) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        where = {"line": line_of(error, function), "inside": frame.f_code.co_name}
        return {"raised": type(error).__name__, "message": str(error)[:500], **where}


def line_of(error: BaseException, function: Callable) -> int | None:
    """The line of the function at which the error arose, counted from its `def`; None where it is not known."""
    code = getattr(function, "__code__", None)
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code is code:
            return line - code.co_firstlineno + 1
    return None


@contextlib.contextmanager
def without(names: list[str]) -> Iterator[list[str]]:
    """Within the block the named functions of the course refuse to work; yields the list of those that were called.

    It is the code of each function that is exchanged, so that a reference to it that was taken before is refused too.

    Arguments:
        names: Dotted names below `dgm_course`, such as "paths.GaussianPath.posterior".
    """
    CALLED.clear()
    kept = [(layer, layer.__code__) for name in names for layer in layers(find(name))]
    for name in names:
        for layer in layers(find(name)):
            # A function's new code must have as many free variables as the old one; it uses none of them.
            layer.__code__ = refusal(name).replace(co_freevars=layer.__code__.co_freevars)
    try:
        yield CALLED
    finally:
        for layer, code in kept:
            layer.__code__ = code


CALLED: list[str] = []  # which forbidden kernels were called since the last `without` began


def refuse(name: str) -> None:
    """What a forbidden kernel does."""
    CALLED.append(name)
    raise Forbidden(f"{name} is what this exercise asks you to write out")


def refusal(name: str):
    """The code of a function that takes anything and refuses in the name of a kernel."""
    space = {}
    exec(f"def f(*args, **kwargs):\n    from {__name__} import refuse\n    refuse({name!r})", space)
    return space["f"].__code__


def find(name: str) -> Callable:
    """The function with a dotted name below `dgm_course`."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            value = importlib.import_module(".".join(["dgm_course", *parts[:split]]))
            for part in parts[split:]:
                value = getattr(value, part)
            return value
    raise ValueError(f"names must be dotted names below dgm_course; got {name!r}")


def layers(function: Callable) -> Iterator[Callable]:
    """A function and those that its decorators hide."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)
