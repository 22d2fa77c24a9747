"""A claim holds, fails, or was not a claim; a kernel's source is shown as it is."""

import IPython.display
import numpy as np
import pytest
import sympy
import torch

from dgm_course.checks import claim, show_source

x = sympy.Symbol("x")
YES = [
    True,
    np.True_,
    np.array(True),
    np.float64(1) < 2,
    torch.tensor(True),
    torch.ones(3).eq(1).all(),
    sympy.true,
    sympy.Eq(x + x, 2 * x),
]
NO = [False, np.False_, np.array(False), torch.tensor(False), torch.zeros(3).eq(1).any(), sympy.false, sympy.Eq(1, 2)]
NEITHER = [
    1,
    0,
    1.0,
    np.float64(1),
    np.int64(0),
    torch.tensor(1.0),
    torch.tensor(1),
    torch.tensor([True]),
    torch.tensor([True, False]),
    np.array([True, True]),
    sympy.Integer(1),
    x > 0,
    sympy.And(x > 0, x < 1),
    None,
    "True",
    "False",
    "",
    [],
    [True],
]


@pytest.mark.parametrize("condition", YES, ids=repr)
def test_what_holds_is_printed(condition, capsys):
    """One line with a tick, and nothing else."""
    assert claim("α² + σ² = 1", condition) is None
    assert capsys.readouterr() == ("✓ α² + σ² = 1\n", "")


@pytest.mark.parametrize("condition", NO, ids=repr)
def test_what_does_not_hold_fails(condition, capsys):
    """The cell fails with the claim's text, and no tick is printed."""
    with pytest.raises(AssertionError) as failure:
        claim("α² + σ² = 1", condition)
    assert str(failure.value) == "✗ α² + σ² = 1"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("condition", NEITHER, ids=repr)
def test_what_is_no_truth_value_is_refused(condition, capsys):
    """A number, a string or a whole tensor would hold by accident."""
    with pytest.raises(TypeError, match="condition must be true or false") as failure:
        claim("the sum is positive", condition)
    assert "the sum is positive" in str(failure.value)
    assert capsys.readouterr().out == ""


def documented(a):
    """Not shown."""
    return a + 1


def bare(a):
    return f"""{a}"""


def stub(a): ...


class Documented:
    """Not shown either."""

    size = 3


@pytest.mark.parametrize(
    ("kernel", "lines"),
    [
        (documented, ["def documented(a):", "    return a + 1"]),
        (bare, ["def bare(a):", '    return f"""{a}"""']),
        (stub, ["def stub(a): ..."]),
        (Documented, ["class Documented:", "", "    size = 3"]),
    ],
)
def test_the_source_is_shown_without_its_docstring(kernel, lines, monkeypatch):
    """The code as it stands in the file, as a Python block."""
    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    show_source(kernel)
    assert [block.data for block in shown] == ["```python\n" + "\n".join(lines) + "\n```"]
