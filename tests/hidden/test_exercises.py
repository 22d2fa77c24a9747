"""Every homework's exercises do what they are for: each known mistake is found and named, each right answer accepted.

The frozen visible cases, which students have, say the same as the exercises and hold no line of code.
"""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm_course import homework
from dgm_course.grading.exercise import VISIBLE, freeze, load
from dgm_course.homework import plain
from dgm_course.homework.ask import ask, without
from dgm_course.homework.values import Affine, encode
from dgm_course.homework.verdict import close, judge

FILES = {file.stem: file for file in sorted(Path(__file__).parent.glob("hw*.py"))}
HOMEWORK = {stem: load(file) for stem, file in FILES.items()}
EXERCISES = {f"{stem} {name}": exercise for stem, all_ in HOMEWORK.items() for name, exercise in all_.items()}
MISTAKES = [(key, name) for key, exercise in EXERCISES.items() for name in exercise.mistakes]
RIGHT = [(key, name) for key, exercise in EXERCISES.items() for name in ["the reference", *exercise.correct]]
SEEDS = (1, 2, 3)

each_homework = pytest.mark.parametrize("stem", HOMEWORK)
each_exercise = pytest.mark.parametrize("key", EXERCISES)


def verdict(exercise, function, label="like the visible cases", seed=VISIBLE) -> str | None:
    cases = exercise.cases(label, seed)
    return judge(
        [plain(case) for case in cases], [plain(ask(function, case["inputs"])) for case in cases], exercise.texts
    )


def test_there_is_homework():
    assert "hw3" in HOMEWORK and len(EXERCISES) >= 6


@each_exercise
def test_an_exercise_has_five_mistakes_three_other_right_answers_and_hidden_cases(key):
    exercise = EXERCISES[key]
    assert len(exercise.mistakes) >= 5 and len(exercise.correct) >= 3 and len(exercise.hidden) >= 2
    functions = [exercise.reference, *exercise.correct.values(), *(wrong for wrong, _ in exercise.mistakes.values())]
    assert len(set(functions)) == len(functions)


@each_homework
def test_points_and_minutes_fit_one_homework(stem):
    exercises = HOMEWORK[stem].values()
    assert sum(exercise.points for exercise in exercises) == 20
    assert 60 <= sum(exercise.minutes for exercise in exercises) <= 150
    assert all(1 <= exercise.difficulty <= 5 for exercise in exercises)


@pytest.mark.parametrize(("key", "name"), RIGHT)
def test_a_right_answer_passes(key, name):
    exercise = EXERCISES[key]
    function = exercise.reference if name == "the reference" else exercise.correct[name]
    assert verdict(exercise, function) is None
    for label in exercise.hidden:
        for seed in SEEDS:
            assert verdict(exercise, function, label, seed) is None, (label, seed)


@pytest.mark.parametrize(("key", "name"), MISTAKES)
def test_a_mistake_is_named_on_the_visible_cases(key, name):
    exercise = EXERCISES[key]
    function, sentence = exercise.mistakes[name]
    assert verdict(exercise, function).endswith(f"it looks as if {name}. {sentence}")


@pytest.mark.parametrize(("key", "name"), MISTAKES)
def test_a_mistake_loses_points_on_the_hidden_cases(key, name):
    exercise = EXERCISES[key]
    for seed in SEEDS:
        assert any(verdict(exercise, exercise.mistakes[name][0], label, seed) for label in exercise.hidden), seed


@each_exercise
def test_the_message_for_a_mistake_reads_as_sentences(key):
    for name, (_, sentence) in EXERCISES[key].mistakes.items():
        assert name[0].islower() and name[-1] != "." and sentence.endswith(".")


# Answers that are wrong whatever the exercise -------------------------------------------------------------------------


class Liar(Tensor):
    """Equal to everything."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return (
            True
            if function in (Tensor.__eq__, torch.allclose)
            else super().__torch_function__(function, types, args, kwargs)
        )


def with_each_value(change):
    """The reference, with `change` done to each tensor that it returns."""

    def spoil(reference):
        def answer(*inputs):
            value = reference(*inputs)
            return tuple(map(change, value)) if isinstance(value, tuple) else change(value)

        return answer

    return spoil


def in_place(reference):
    def answer(*inputs):
        value = reference(*(part.clone() if isinstance(part, Tensor) else part for part in inputs))
        next(part for part in inputs if isinstance(part, Tensor) and part.is_floating_point()).mul_(2)
        return value

    return answer


BAD = {
    "changes its inputs": (in_place, "it changed its input"),
    "another dtype": (
        with_each_value(lambda x: x.float() if x.dtype == torch.float64 else x.double()),
        "has dtype",
    ),
    "half precision": (with_each_value(lambda x: x.half()), "has dtype float16"),
    "another shape": (with_each_value(lambda x: x[None]), "has shape"),
    "nan": (with_each_value(lambda x: x * torch.nan), "not finite"),
    "one nan": (with_each_value(lambda x: torch.where(x == x.max(), torch.nan, x)), "not finite"),
    "a subclass": (with_each_value(lambda x: x.as_subclass(Liar)), "of type Liar came"),
    "an array": (with_each_value(lambda x: x.numpy()), "of type ndarray came"),
    "a list": (with_each_value(lambda x: x.tolist()), "a list came"),
    "nothing": (with_each_value(lambda x: None), "None came"),
    "no tuple": (lambda reference: lambda *inputs: None, "None came"),
    "one tuple more": (lambda reference: lambda *inputs: (reference(*inputs),), "it should return "),
    "an error": (lambda reference: lambda *inputs: 1 / 0, "it raised ZeroDivisionError"),
    "the end": (lambda reference: lambda *inputs: exit(), "it raised SystemExit"),
}


@each_exercise
@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_refused_and_told_why(key, name):
    exercise = EXERCISES[key]
    spoil, say = BAD[name]
    for label in exercise.groups:
        assert say in verdict(exercise, spoil(exercise.reference), label, 1), label


@each_exercise
def test_an_error_that_names_nothing_is_refused(key):
    exercise = EXERCISES[key]
    errors = [case for label in exercise.groups for case in exercise.cases(label, 1) if "raised" in case["expected"]]
    if not errors:
        assert not exercise.mentions
        return

    def silent(*inputs):
        try:
            return exercise.reference(*inputs)
        except ValueError:
            raise ValueError("no") from None

    assert f"should name {', '.join(exercise.mentions)}" in verdict(exercise, silent)


# Cases ----------------------------------------------------------------------------------------------------------------


def numbers(value):
    """All values in a nest of cases, flat."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in numbers(item)]
    if isinstance(value, Affine):
        return numbers([value.scale, value.shift])
    return [np.asarray(value)]


@each_exercise
def test_all_cases_are_drawn_by_the_seed(key):
    exercise = EXERCISES[key]
    for label in exercise.groups:
        one, again, other = ([case["inputs"] for case in exercise.cases(label, seed)] for seed in (1, 1, 2))
        assert same(one, again)
        assert not same(one, other)


def same(a, b) -> bool:
    a, b = numbers(a), numbers(b)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@each_exercise
def test_cases_hold_only_what_can_be_sent(key):
    for label in EXERCISES[key].groups:
        for case in EXERCISES[key].cases(label, 1):
            for part in ("inputs", "expected"):
                assert '"other"' not in str(encode(list(case[part].values()), [])).replace("'", '"')


@each_exercise
def test_the_right_answers_call_no_forbidden_kernel_and_the_names_exist(key):
    exercise = EXERCISES[key]
    assert exercise.forbidden
    for function in [exercise.reference, *exercise.correct.values()]:
        with without(list(exercise.forbidden)) as called:
            assert verdict(exercise, function) is None and called == []


# What students have ---------------------------------------------------------------------------------------------------


def frozen(stem: str) -> Path:
    return homework.FOLDER / f"{stem}.safetensors"


@each_homework
def test_the_frozen_cases_are_those_of_the_exercises(stem, tmp_path):
    (tmp_path / "anew").write_bytes(freeze(HOMEWORK[stem]))
    agree(homework.read(frozen(stem)), homework.read(tmp_path / "anew"), stem)


def agree(old, new, where: str) -> None:
    """Texts are equal, numbers to 8 digits, or to 5 in single precision: the last bits differ between machines."""
    assert type(old) is type(new), where
    if isinstance(old, dict):
        assert list(old) == list(new), where
        for key in old:
            agree(old[key], new[key], f"{where}, {key}")
    elif isinstance(old, (list, tuple)):
        assert len(old) == len(new), where
        for place, (a, b) in enumerate(zip(old, new, strict=True)):
            agree(a, b, f"{where}, {place}")
    elif isinstance(old, Affine):
        agree([old.scale, old.shift], [new.scale, new.shift], where)
    elif isinstance(old, Tensor):
        assert close(old.numpy(), new.numpy(), 1e-5 if old.dtype == torch.float32 else 1e-8), where
    else:
        assert old == (pytest.approx(new, rel=1e-8) if isinstance(old, float) else new), where


@each_homework
def test_no_line_of_code_stands_in_the_frozen_file(stem):
    content, source = frozen(stem).read_bytes().decode(errors="ignore"), FILES[stem].read_text()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    lines = {line.strip() for node in functions for line in ast.get_source_segment(source, node).splitlines()}
    lines = {line for line in lines if len(line) > 12}
    assert len(lines) > 100
    assert [line for line in lines if line in content] == []
    assert [node.name for node in functions if hasattr(node, "name") and f"{node.name}(" in content] == []


@each_exercise
def test_the_check_that_students_call_says_the_same(key, capsys, monkeypatch):
    monkeypatch.delenv("DGM_GRADING", raising=False)
    stem, name = key.split()
    exercise, check = EXERCISES[key], homework.load(stem).check

    def named(function):
        def answer(*inputs):
            return function(*inputs)

        answer.__name__ = name
        return answer

    assert check(named(exercise.reference)) and capsys.readouterr().out.startswith(f"✓ {name}: right in the ")
    for mistake, (function, sentence) in exercise.mistakes.items():
        assert not check(named(function))
        said = capsys.readouterr().out
        assert said.startswith(f"✗ {name}: ") and said.endswith(f"it looks as if {mistake}. {sentence}\n")
