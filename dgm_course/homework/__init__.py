"""Homework as a student has it: the visible cases of each exercise, frozen to data, and a check that says what is wrong.

A file `hwN.safetensors` in this folder holds inputs, the right values, and what known mistakes give: numbers only. It is
made from the exercises that instructors keep; neither a solution nor the code of a mistake is in it.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import torch

from dgm_course.homework.ask import ask, without
from dgm_course.homework.values import Affine, decode, encode
from dgm_course.homework.verdict import judge, unfinished

__all__ = ["Affine", "Homework", "load", "names", "read"]

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The homework there is."""
    return sorted(file.stem for file in FOLDER.glob("*.safetensors"))


def load(name: str) -> "Homework":
    """One homework by its name.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> load("hw3").check(lambda: None)
        Traceback (most recent call last):
        ValueError: hw3 asks for no function <lambda>; ...
    """
    if name not in names():
        raise ValueError(f"name must be one of {', '.join(names())}; got {name!r}")
    return Homework(name)


class Homework:
    """The exercises of one homework, with their visible cases.

    Arguments:
        name: Such as "hw3".
    """

    def __init__(self, name: str):
        self.name = name
        self.exercises = read(FOLDER / f"{name}.safetensors")

    def __repr__(self):
        return f"Homework({self.name!r}: {', '.join(self.exercises)})"

    def check(self, function: Callable) -> bool:
        """Try a function on the visible cases of its exercise, print what came of it, and return whether all is right.

        The exercise is found by the function's name. While an instructor's grader runs a notebook, nothing is tried.

        Raises:
            ValueError: If no exercise has the function's name.
        """
        name = getattr(function, "__name__", None)
        if name not in self.exercises:
            asked = ", ".join(self.exercises)
            raise ValueError(f"{self.name} asks for no function {name or repr(function)}; it asks for: {asked}")
        if "DGM_GRADING" in os.environ:
            return False
        exercise = self.exercises[name]
        with without(exercise["forbidden"]) as called:
            answers = [ask(function, case["inputs"]) for case in exercise["cases"]]
        problem = unfinished(name, answers, called)
        if problem == "not implemented yet":
            print(f"· {name}: {problem} ({exercise['points']:g} points, about {exercise['minutes']} minutes)")
            return False
        problem = problem or judge([plain(case) for case in exercise["cases"]], list(map(plain, answers)), exercise)
        print(
            f"✗ {name}: {problem}"
            if problem
            else f"✓ {name}: right in the {len(answers)} visible cases; hidden ones count too"
        )
        return problem is None


def plain(value):
    """The same with an array in the place of each tensor, as if it had been written to a file and read."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    arrays: list[np.ndarray] = []
    return decode(encode(value, arrays), arrays, tensor=lambda array: array)


@functools.cache
def read(file: Path) -> dict[str, dict]:
    """The exercises in a file: for each its texts, and `cases` with tensors in them."""
    with safetensors.safe_open(file, framework="pt") as content:
        forms = json.loads(content.metadata()["exercises"])
        tensors = [content.get_tensor(str(place)) for place in range(len(content.keys()))]

    def value(form):
        return decode(form, tensors, tensor=torch.clone)

    def reply(form):
        return {key: value(item) for key, item in form.items()}

    for exercise in forms.values():
        for case in exercise["cases"]:
            case["inputs"] = {name: value(form) for name, form in case["inputs"].items()}
            case["expected"] = reply(case["expected"])
            case["mistakes"] = {name: reply(form) for name, form in case["mistakes"].items()}
    return forms
