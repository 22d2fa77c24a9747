"""Homework as a student has it: values as data, asking a function, refusing kernels, the verdict, the check."""

import functools

import numpy as np
import pytest
import torch

from dgm_course import homework, paths, samplers, toy
from dgm_course.grading.exercise import Exercise, Group, freeze
from dgm_course.homework import Affine, plain
from dgm_course.homework.ask import Forbidden, ask, without
from dgm_course.homework.values import Other, decode, encode
from dgm_course.homework.verdict import judge
from dgm_course.schedules import linear_betas

# Values ---------------------------------------------------------------------------------------------------------------


def there_and_back(value):
    arrays = []
    form = encode(value, arrays)
    return decode(form, arrays)


@pytest.mark.parametrize(
    "value", [None, True, 3, -1.5, float("inf"), "text", [1, [2.0, "x"]], (1, (2, None)), [], ()], ids=repr
)
def test_plain_values_come_back(value):
    back = there_and_back(value)
    assert back == value and type(back) is type(value)


def test_not_a_number_comes_back():
    assert np.isnan(there_and_back(float("nan")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 1, 4)])
def test_tensors_come_back(dtype, shape):
    value = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul(5).to(dtype)
    back = there_and_back({torch.float64: value.mT if value.ndim > 1 else value}.get(dtype, value))
    assert back.dtype == dtype and torch.equal(back.mT if dtype == torch.float64 and back.ndim > 1 else back, value)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "value, what",
    [
        (torch.ones(2, dtype=torch.bfloat16), "a tensor of torch.bfloat16"),
        (torch.ones(2).as_subclass(Subclass), "of type Subclass"),
        (np.ones(2), "of type ndarray"),
        ({1: 2}, "of type dict"),
        (type("Text", (str,), {})("x"), "of type Text"),
        (torch.eye(2).to_sparse(), "a tensor that does not store each value"),
        (torch.ones(2, device="meta"), "a tensor that does not store each value"),
    ],
)
def test_what_has_no_form_is_only_described(value, what):
    assert there_and_back([value]) == [Other(what)]


def test_a_view_comes_back_by_its_values():
    negative = torch.tensor([1 + 2j]).conj().imag  # PyTorch only notes the sign
    assert there_and_back(negative).tolist() == [-2.0]
    assert there_and_back(torch.ones(2, requires_grad=True)).requires_grad is False


def test_what_a_stranger_sends_is_no_more_than_it_may_be():
    assert decode({"other": "x" * 10**6}, []) == Other("x" * 200)
    with pytest.raises(ValueError, match="no float"):
        decode({"float": "0x1p99999"}, [])
    with pytest.raises(ValueError, match="hexadecimal"):
        decode({"float": "one"}, [])


@pytest.mark.parametrize(
    "form", [1.5, [1], {}, {"tensor": 1}, {"tensor": True}, {"tensor": -1}, {"float": 1}, {"list": 3}, {"affine": [1]}]
)
def test_other_forms_are_refused(form):
    with pytest.raises(ValueError, match="no value is written like this"):
        decode(form, [np.ones(2)])


def test_an_affine_denoiser_takes_one_time_or_many():
    d = there_and_back(Affine(torch.tensor([1.0, 0.5, 0.25]), torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)))
    x = torch.full((2, 3), 8.0)
    assert torch.equal(d(x, 1), torch.full((2, 3), 6.0))
    assert torch.equal(d(x, torch.tensor(2)), torch.full((2, 3), 6.0))
    assert torch.equal(d(x, torch.tensor([0, 1])), torch.tensor([[8.0] * 3, [6.0] * 3]))
    assert d(x.double(), 1).dtype == torch.float64


# Asking ---------------------------------------------------------------------------------------------------------------


def test_the_function_gets_copies_by_position():
    inputs = {"x": torch.ones(2), "times": [1, 2]}

    def spoil(a, b):
        a += 1
        b.append(3)
        return a

    reply = ask(spoil, inputs)
    assert torch.equal(inputs["x"], torch.ones(2)) and inputs["times"] == [1, 2]
    assert torch.equal(reply["inputs"]["x"], torch.full((2,), 2.0)) and reply["inputs"]["times"] == [1, 2, 3]


def test_an_error_is_told_with_its_line_and_place():
    def inner():
        raise KeyError("k")

    def f(x):
        y = x
        return inner() + y

    assert ask(f, {"x": 1}) == {"raised": "KeyError", "message": "'k'", "line": 3, "inside": "inner"}
    reply = ask(f, {"x": 1, "y": 2})
    assert reply["raised"] == "TypeError" and reply["line"] is None
    assert ask(lambda: exit(), {})["raised"] == "SystemExit"


def test_a_kernel_is_refused_however_it_is_reached_and_works_again_afterwards():
    path, x = paths.DiscretePath(linear_betas(100)), torch.ones(1, 1)
    before, kept = path.posterior(x, x, 1, 2), path.posterior
    names = ["paths.GaussianPath.posterior", "samplers.ddpm", "samplers.ddpm_step"]
    for call in (
        lambda: path.posterior(x, x, 1, 2),
        lambda: kept(x, x, 1, 2),
        lambda: getattr(paths.DiscretePath, "post" + "erior")(path, x, x, 1, 2),
        lambda: samplers.ddpm(lambda xt, t: xt, path, x, path.times(2)),
        lambda: samplers.ddpm_step(path, x, x, 2, 1),
    ):
        with pytest.raises(Forbidden, match="write out"), without(names) as called:
            call()
        assert len(called) == 1 and called[0] in names
        assert torch.equal(path.posterior(x, x, 1, 2)[0], before[0])
    assert torch.isfinite(samplers.last(samplers.ddpm(lambda xt, t: 0 * xt, path, x, path.times(2)))).all()


def test_names_of_kernels_must_exist():
    posterior = paths.GaussianPath.posterior.__code__
    for name in ("no.such", "paths.GaussianPath.no_such", "paths"):
        with pytest.raises(ValueError, match=f"dotted names below dgm_course; got '{name}'"):
            with without(["paths.GaussianPath.posterior", name]):
                pass
    assert paths.GaussianPath.posterior.__code__ is posterior


def test_blocks_may_lie_in_each_other_and_end_in_an_error():
    path, x = paths.DiscretePath(linear_betas(100)), torch.ones(1, 1)
    names, posterior = ["paths.GaussianPath.posterior"], paths.GaussianPath.posterior.__code__
    with pytest.raises(ZeroDivisionError), without(names):
        with without([*names, *names, "toy.two_moons"]), pytest.raises(Forbidden):
            path.posterior(x, x, 1, 2)
        with pytest.raises(Forbidden):
            path.posterior(x, x, 1, 2)
        1 / 0  # noqa: B018
    assert paths.GaussianPath.posterior.__code__ is posterior


def test_what_a_decorator_hides_is_refused_too(monkeypatch):
    moons = toy.two_moons

    @functools.wraps(moons)
    def decorated(*args):
        return moons(*args)  # a closure

    monkeypatch.setattr(toy, "two_moons", decorated)
    for function in (decorated, moons):
        with without(["toy.two_moons"]), pytest.raises(Forbidden):
            function(3)
        assert len(function(3)) == 3


def test_a_static_method_is_refused_too():
    with without(["toy.GaussianMixture._mix"]) as called, pytest.raises(Forbidden):
        toy.GaussianMixture._mix(1, 2)
    assert called == ["toy.GaussianMixture._mix"]


# The verdict ----------------------------------------------------------------------------------------------------------

X = torch.tensor([1.0, -2.0, 3.0])
TEXTS = {
    "outputs": ["mean", "variance"],
    "tolerance": 1e-5,
    "mentions": ["alpha_bar"],
    "mistakes": {
        "you gave a deviation": "A variance is asked for.",
        "you gave 9 everywhere": "Why 9?",
        "you divided by 0": "",
    },
}


def two(x):
    return 2 * x, x**2


MISTAKES = {
    "you gave a deviation": lambda x: (2 * x, x.abs()),
    "you gave 9 everywhere": lambda x: (0 * x + 9, 0 * x + 9),
    "you divided by 0": lambda x: (0 * x / 0, x**2),
}


def verdict(function, texts=TEXTS, reference=two) -> str | None:
    inputs = {"x": X, "s": 3}
    drop = {"raised", "value"}

    def reply(f):
        return {key: value for key, value in ask(lambda x, s: f(x), inputs).items() if key in drop}

    case = {"label": "case 1", "inputs": inputs, "expected": reply(reference)}
    case["mistakes"] = {name: reply(mistake) for name, mistake in MISTAKES.items()}
    return judge([plain(case)], [plain(ask(lambda x, s: function(x), inputs))], texts)


@pytest.mark.parametrize(
    "function, says",
    [
        (lambda x: (2 * x, x.abs()), "mean is right, variance not: it looks as if you gave a deviation. A variance is"),
        (lambda x: (5 * x, x.abs()), "mean[2] is 15 and should be 6"),
        (lambda x: (0 * x + 9, x**2), "variance is right, mean not: it looks as if you gave 9 everywhere. Why 9?"),
        (lambda x: (0 * x / 0, x**2), "it looks as if you divided by 0"),
        (lambda x: (x.new_tensor(9.0), x.new_tensor(9.0)), "mean has shape (), asked is (3,)"),
        (lambda x: (2 * x, x), "mean is right, variance not: variance[1] is -2 and should be 4"),
        (lambda x: 2 * x, "it should return a tuple (mean, variance); a tensor came"),
        (lambda x: None, "it should return a tuple (mean, variance); None came"),
        (lambda x: (2 * x,), "it should return 2 values, mean, variance; 1 came"),
        (lambda x: [2 * x, x**2], "a list came"),
        (lambda x: (2 * x, 4.0), "variance should be a plain tensor; a float came"),
        (lambda x: (2 * x, (x**2).as_subclass(Subclass)), "plain tensor; a value of type Subclass came"),
        (lambda x: (2 * x, (x**2)[None]), "variance has shape (1, 3), asked is (3,)"),
        (lambda x: (2 * x.double(), x**2), "mean has dtype float64, asked is float32"),
        (lambda x: (2 * x, x**2 / 0), "variance is not finite: 3 of 3 values"),
        (lambda x: (x.mul_(2), (x / 2) ** 2), "it changed its input x"),
        (lambda x: 1 / 0, "it raised ZeroDivisionError in line 1 of the function: division by zero"),
    ],
)
def test_it_says_what_differs(function, says):
    said = verdict(function)
    assert says in said
    assert "looks as if" in said or said.endswith("(case 1; x float32 (3,); s = 3)")


def test_rounding_is_forgiven_and_more_is_not():
    assert verdict(lambda x: (2 * x * (1 + 3e-6), x**2)) is None
    assert verdict(lambda x: (2 * x * (1 + 3e-4), x**2)) is not None


def fail(x):
    raise ValueError("alpha_bar must be positive")


@pytest.mark.parametrize(
    "function, says",
    [
        (two, "a ValueError should be raised here, but a value came back"),
        (
            lambda x: [][0],
            "it raised IndexError in line 1 of the function: list index out of range; a ValueError is what should be raised here",
        ),
        (lambda x: float("no"), "the message of the ValueError should name alpha_bar"),
    ],
)
def test_an_error_that_is_asked_for(function, says):
    assert says in verdict(function, reference=fail)
    assert verdict(fail, reference=fail) is None


# The check ------------------------------------------------------------------------------------------------------------


def posterior_mean(x):
    """The reference: no kernel."""
    return 2 * x


@pytest.fixture
def hw(tmp_path, monkeypatch):
    """A homework of one exercise, frozen to a folder of its own."""
    make = Group(3, lambda g: [{"x": torch.randn(4, generator=g)}, {"x": torch.zeros(1)}])
    mistakes = {"you tripled": (lambda x: 3 * x, "Twice is asked.")}
    forbidden = ("paths.GaussianPath.posterior",)
    exercise = Exercise(
        "posterior_mean", 3, 5, 1, posterior_mean, ("mean",), make, {}, mistakes, {}, forbidden=forbidden
    )
    (tmp_path / "hwX.safetensors").write_bytes(freeze({"posterior_mean": exercise}))
    monkeypatch.setattr(homework, "FOLDER", tmp_path)
    monkeypatch.delenv("DGM_GRADING", raising=False)
    return homework.load("hwX")


def named(function):
    function.__name__ = "posterior_mean"
    return function


@pytest.mark.parametrize(
    "body, says",
    [
        ("return 2 * x", "✓ posterior_mean: right in the 2 visible cases; hidden ones count too"),
        ("raise NotImplementedError", "· posterior_mean: not implemented yet (3 points, about 5 minutes)"),
        ("return helper(x)", "✗ posterior_mean: it calls helper, which is not implemented yet"),
        ("return 3 * x", "✗ posterior_mean: it looks as if you tripled. Twice is asked."),
        ("return path.posterior(x, x, 1, 2)[0]", "✗ posterior_mean: it calls paths.GaussianPath.posterior, itself or"),
        (
            "try:\n        path.posterior(x, x, 1, 2)\n    except Exception:\n        return 2 * x",
            "✗ posterior_mean: it calls",
        ),
        ("x.add_(x)\n    return x", "✗ posterior_mean: it changed its input x"),
    ],
)
def test_the_check_prints_a_line_and_says_whether_all_is_right(hw, capsys, body, says):
    space = {"path": paths.DiscretePath(linear_betas(100))}
    exec(f"def helper(x):\n    raise NotImplementedError\n\n\ndef posterior_mean(x):\n    {body}\n", space)
    assert hw.check(space["posterior_mean"]) == says.startswith("✓")
    said = capsys.readouterr().out
    assert said.startswith(says) and said.count("\n") == 1


def test_while_it_is_graded_a_check_tries_nothing(hw, capsys, monkeypatch):
    monkeypatch.setenv("DGM_GRADING", "1")
    assert hw.check(named(lambda x: 1 / 0)) is False and capsys.readouterr().out == ""


def test_typos_are_named(hw):
    with pytest.raises(ValueError, match="hwX asks for no function posterior_maen; it asks for: posterior_mean"):
        exec("def posterior_maen(x): pass\nhw.check(posterior_maen)", {"hw": hw})
    with pytest.raises(ValueError, match="hwX asks for no function 3"):
        hw.check(3)
    with pytest.raises(ValueError, match="name must be one of hwX; got 'hw9'"):
        homework.load("hw9")


def test_what_students_have_holds_no_code(hw, tmp_path):
    content = (tmp_path / "hwX.safetensors").read_bytes()
    assert b"2 * x" not in content and b"lambda" not in content and b"Twice is asked." in content
