"""An exercise as data: a reference, cases, known mistakes; and its visible cases frozen to a file for students."""

import functools
import json
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save

from dgm_course.homework.ask import ask
from dgm_course.homework.values import encode

__all__ = ["Exercise", "Group", "freeze", "load", "parse"]

VISIBLE = 2026  # the seed of the cases that students have


@dataclass(frozen=True)
class Group:
    """Cases that are worth points together: all of them right, or none of the points.

    Arguments:
        points: What they are worth.
        make: Makes the inputs of each case from a `torch.Generator`: a list of dicts, the inputs by name, in the order
            of the function's parameters.
    """

    points: float
    make: Callable[[torch.Generator], list[dict]]


@dataclass(frozen=True)
class Exercise:
    """One function that a student is asked to write.

    Arguments:
        name: The function's name.
        points: The sum of the points of its groups.
        minutes, difficulty: What is said to the student; difficulty from 1 to 5.
        reference: The right function. A ValueError that it raises is asked for too.
        outputs: The names of what it returns, one or several.
        visible: The cases that students have.
        hidden: The others, by their labels.
        mistakes: Wrong functions that people really write, each with the sentence that helps; the name of each fits
            after "it looks as if".
        correct: Right functions, written in other ways.
        tolerance: How far an answer may be off, relative to the right one.
        mentions: Words that the message of an error must hold.
        forbidden: Kernels of the course, dotted names below `dgm_course`, that the function must not call.

    Raises:
        ValueError: If the points do not add up.
    """

    name: str
    points: float
    minutes: int
    difficulty: int
    reference: Callable
    outputs: tuple[str, ...]
    visible: Group
    hidden: dict[str, Group]
    mistakes: dict[str, tuple[Callable, str]]
    correct: dict[str, Callable]
    tolerance: float = 1e-5
    mentions: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = field(default=())

    def __post_init__(self):
        total = sum(group.points for group in self.groups.values())
        if total != self.points:
            raise ValueError(f"points of {self.name} must be the sum of its groups, {total:g}; got {self.points:g}")

    @property
    def groups(self) -> dict[str, Group]:
        """All groups by label, the visible one first."""
        return {"like the visible cases": self.visible, **self.hidden}

    @property
    def texts(self) -> dict:
        """What `judge` needs to know, and what students are told."""
        return {
            "points": self.points,
            "minutes": self.minutes,
            "outputs": list(self.outputs),
            "tolerance": self.tolerance,
            "mentions": list(self.mentions),
            "forbidden": list(self.forbidden),
            "mistakes": {name: sentence for name, (_, sentence) in self.mistakes.items()},
        }

    def cases(self, label: str, seed: int) -> list[dict]:
        """The cases of a group, each with `label`, `inputs`, the `expected` reply and those of the `mistakes`.

        Students have the visible cases with the seed `VISIBLE`; a grader's seed makes others of the same form, so that an
        answer learnt by heart from the file is worth nothing.
        """
        g = torch.Generator().manual_seed(seed)
        return [self.case(f"case {number}", inputs) for number, inputs in enumerate(self.groups[label].make(g), 1)]

    def case(self, label: str, inputs: dict) -> dict:
        expected = short(ask(self.reference, inputs))
        assert expected.get("raised", "ValueError") == "ValueError", f"{self.name}, {label}: {expected}"
        mistakes = {name: short(ask(function, inputs)) for name, (function, _) in self.mistakes.items()}
        return {"label": label, "inputs": inputs, "expected": expected, "mistakes": mistakes}


def short(reply: dict) -> dict:
    """A reply without what a comparison does not use."""
    return {"value": reply["value"]} if "value" in reply else {"raised": reply["raised"]}


def load(file: str | Path) -> dict[str, Exercise]:
    """The exercises in a file of hidden tests, by name.

    Raises:
        ValueError: If there is no such file, or it defines no EXERCISES.
    """
    file = Path(file)
    if not file.is_file():
        known = ", ".join(sorted(other.stem for other in file.parent.glob("hw*.py"))) or "none"
        raise ValueError(f"there is no file of hidden tests {file}; homework with hidden tests there: {known}")
    return parse(file.read_text(encoding="utf-8"), file.stem)


@functools.lru_cache(maxsize=8)
def parse(text: str, name: str) -> dict[str, Exercise]:
    """The exercises that a Python source defines as `EXERCISES`, a list, by name.

    Raises:
        ValueError: If it defines none.
    """
    module = types.ModuleType(f"hidden_{name}")
    exec(compile(text, f"<hidden tests of {name}>", "exec"), vars(module))
    if not getattr(module, "EXERCISES", None):
        raise ValueError(f"the hidden tests of {name} must define EXERCISES, a list of Exercise")
    return {exercise.name: exercise for exercise in module.EXERCISES}


def freeze(exercises: dict[str, Exercise]) -> bytes:
    """The file that students get: texts and visible cases, as numbers."""
    arrays = []

    def reply(value: dict) -> dict:
        return {key: encode(item, arrays) for key, item in value.items()}

    forms = {}
    for name, exercise in exercises.items():
        cases = [
            {
                "label": case["label"],
                "inputs": reply(case["inputs"]),
                "expected": reply(case["expected"]),
                "mistakes": {mistake: reply(value) for mistake, value in case["mistakes"].items()},
            }
            for case in exercise.cases("like the visible cases", VISIBLE)
        ]
        forms[name] = {**exercise.texts, "cases": cases}
    tensors = {str(place): torch.from_numpy(array) for place, array in enumerate(arrays)}
    return save(tensors, {"exercises": json.dumps(forms, ensure_ascii=False)})
