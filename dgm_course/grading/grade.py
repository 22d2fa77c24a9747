"""Grade one submission: run its notebook in the sandbox, ask its functions, judge the answers here."""

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dgm_course.grading import exercise as exercises
from dgm_course.grading.session import START, Broken, Late, Session, session
from dgm_course.grading.submission import Submission, cells
from dgm_course.homework import plain
from dgm_course.homework.values import decode, encode
from dgm_course.homework.verdict import judge, unfinished

__all__ = ["Limits", "HiddenTests", "failure", "grade"]


@dataclass(frozen=True)
class Limits:
    """What a submission may use.

    Arguments:
        notebook_seconds: For executing its cells.
        exercise_seconds: For all cases of one exercise.
        memory_gb: Addresses of each process; importing torch alone takes 3.3.
    """

    notebook_seconds: float = 60
    exercise_seconds: float = 10
    memory_gb: float = 6


@dataclass(frozen=True)
class HiddenTests:
    """The hidden tests of one homework, as text, so that they can be sent to another machine.

    Arguments:
        homework: Its name, such as "hw3".
        text: The Python source that defines EXERCISES.
        seed: Of the hidden cases.
    """

    homework: str
    text: str
    seed: int

    @property
    def exercises(self) -> dict[str, exercises.Exercise]:
        return exercises.parse(self.text, self.homework)

    @functools.lru_cache(maxsize=1)  # noqa: B019  a run has one
    def cases(self) -> dict[str, dict[str, tuple[list[dict], list[dict]]]]:
        """For each exercise and group the cases: with tensors, to be sent; with arrays, to be judged by."""
        made = {}
        for name, exercise in self.exercises.items():
            groups = {label: exercise.cases(label, self.seed) for label in exercise.groups}
            made[name] = {label: (group, [plain(case) for case in group]) for label, group in groups.items()}
        return made


def grade(submission: Submission, tests: HiddenTests, limits: Limits, level: str, stop: Sequence = ()) -> dict:
    """The result of one submission, whatever is wrong with it.

    Arguments:
        submission: As `submission.find` returns it.
        tests: The hidden tests.
        limits: What it may use.
        level: The isolation level to run it at.
        stop: Empty until the grader shall stop.

    Raises:
        KeyboardInterrupt: If the grader shall stop.
    """
    start = time.monotonic()
    result = blank(submission, tests, limits, level)
    answers: dict = {}
    if submission.problem is None:
        try:
            sources = cells(submission.content)
        except ValueError as error:
            result["problem"] = f"the file is no notebook that can be read: {error}"
        else:
            answers = run(sources, tests, limits, level, result, stop)
    for name, exercise in tests.exercises.items():
        result["exercises"].append(score(exercise, tests.cases()[name], answers.get(name, {})))
    result["score"] = sum(entry["score"] for entry in result["exercises"])
    result["seconds"] = round(time.monotonic() - start, 3)
    return result


def blank(submission: Submission, tests: HiddenTests, limits: Limits, level: str) -> dict:
    """A result that holds no points yet."""
    return {
        "student": submission.student,
        "homework": tests.homework,
        "file": submission.file,
        "sha256": submission.sha256,
        "score": 0.0,
        "max_score": float(sum(exercise.points for exercise in tests.exercises.values())),
        "isolation": level,
        "seed": tests.seed,
        "limits": asdict(limits),
        "seconds": 0.0,
        "problem": submission.problem,
        "cells": [],
        "output": "",
        "exercises": [],
    }


def failure(submission: Submission, tests: HiddenTests, limits: Limits, problem: str) -> dict:
    """The result of a submission that could not be graded for no fault of its own; it is tried again next time."""
    result = {**blank(submission, tests, limits, "none"), "problem": problem, "retry": True}
    result["exercises"] = [score(exercise, tests.cases()[name], {}) for name, exercise in tests.exercises.items()]
    return result


def run(sources: list[str], tests: HiddenTests, limits: Limits, level: str, result: dict, stop: Sequence) -> dict:
    """Execute the cells, ask every function; the answers by exercise and group. Fills in what concerns the notebook."""
    total = limits.notebook_seconds + limits.exercise_seconds * len(tests.exercises)
    processes = None if level == "none" else 64  # without a user of its own the instructor's processes would count too
    bounds = {"memory_gb": limits.memory_gb, "cpu_seconds": START + total, "processes": processes}
    answers = {}
    with session(level, bounds, stop) as runner:
        try:
            result["problem"] = execute(runner, sources, limits.notebook_seconds, result)
            if result["problem"] is None:
                for name, exercise in tests.exercises.items():
                    answers[name] = ask(runner, exercise, tests.cases()[name], limits.exercise_seconds)
        except Broken as error:
            result["problem"] = str(error)
        result["output"] = runner.output
    return answers


def execute(runner: Session, sources: list[str], seconds: float, result: dict) -> str | None:
    """Run the notebook's cells; what went wrong with the whole, or None. Cells that failed are noted in the result."""
    number = None
    try:
        reply, _ = runner.ask({"execute": sources}, [], START)
        deadline = time.monotonic() + seconds
        while isinstance(reply, dict) and "cell" in reply:
            number = reply["cell"]
            reply, _ = runner.next(deadline - time.monotonic())
    except Late:
        where = f"code cell {number + 1}" if number in range(len(sources)) else "the start"
        return f"the notebook did not finish within {seconds:g} seconds; the time ran out in {where}"
    failed = reply.get("failed") if isinstance(reply, dict) else None
    result["cells"] = [noted(fault, sources) for fault in failed[: len(sources)]] if isinstance(failed, list) else []
    return None


def noted(fault, sources: list[str]) -> dict:
    """A cell that failed, as the sandbox tells it: where, and with what error."""
    fault = fault if isinstance(fault, dict) else {}
    number = fault.get("cell")
    source = sources[number] if type(number) is int and 0 <= number < len(sources) else ""
    first = next((line for line in source.splitlines() if line.strip()), "")
    return {"cell": number + 1 if source else 0, "first_line": first[:120], "error": str(fault.get("error"))[:400]}


def ask(runner: Session, exercise: exercises.Exercise, groups: dict, seconds: float) -> dict:
    """What the student's function answers to each group: a list of replies, or a sentence that says why there are none."""
    answers, left = {}, seconds
    for label, (cases, _) in groups.items():
        if left <= 0:
            answers[label] = "not tried: the time for this exercise had run out"
            continue
        arrays: list[np.ndarray] = []
        inputs = [{name: encode(value, arrays) for name, value in case["inputs"].items()} for case in cases]
        request = {"ask": exercise.name, "cases": inputs, "forbidden": list(exercise.forbidden), "seconds": left}
        start = time.monotonic()
        try:
            answers[label] = understand(*runner.ask(request, arrays, left + 5), cases, exercise.name)
        except Late:
            raise Broken(f"the notebook's process no longer answered while {exercise.name} was tried") from None
        left -= time.monotonic() - start
        if answers[label] == LATE:
            answers[label], left = f"no answer within {seconds:g} seconds; does it end?", 0.0
    answers["seconds"] = round(min(seconds, seconds - left), 3)
    return answers


LATE = object()


class Refused(str):
    """A sentence about one group that takes the points of the whole exercise."""


def understand(reply, arrays: list[np.ndarray], cases: list[dict], name: str) -> list[dict] | str | object:
    """A reply from the sandbox as answers to judge, a sentence, or LATE; whatever it is, it is only data."""
    try:
        return LATE if "late" in reply else sentence(reply, name) or answers_in(reply, arrays, cases)
    except Exception:  # a stranger's data, of any form: whatever trips over it
        return "the reply was malformed"


def sentence(reply: dict, name: str) -> str | None:
    """Why there are no answers in a reply, or None."""
    if "died" in reply:
        return f"the process ended before it answered (exit code {str(reply['died'])[:20]}): out of memory, or an exit in the code?"
    if "missing" in reply:
        close = ", ".join(reply["missing"][:1])[:80]
        return f"the notebook defines no function {name}{f'; there is {close}' if close else ''}"
    if reply.get("called"):
        return Refused(unfinished(name, [], [", ".join(reply["called"][:1])[:100]]))
    return None


def answers_in(reply: dict, arrays: list[np.ndarray], cases: list[dict]) -> list[dict]:
    """The answers in a reply, one for each case."""
    return [answer(form, arrays, case) for form, case in zip(reply["answers"], cases, strict=True)]


def answer(form: dict, arrays: list[np.ndarray], case: dict) -> dict:
    """One reply with arrays in it, its parts of the kinds that they should be."""
    if "raised" in form:
        line = form.get("line")
        words = {key: str(form.get(key))[:500] for key in ("raised", "message", "inside")}
        return {**words, "line": line if type(line) is int else None}
    value, after = (decode(form[key], arrays, tensor=lambda a: a) for key in ("value", "inputs"))
    return {"value": value, "inputs": dict(zip(case["inputs"], after, strict=True))}


def score(exercise: exercises.Exercise, groups: dict, answers: dict) -> dict:
    """The part of a result that is about one exercise."""
    tests, refused = [], next((reply for reply in answers.values() if isinstance(reply, Refused)), None)
    for label, (_, cases) in groups.items():
        reply = answers.get(label, "not tried")
        problem = refused or (reply if isinstance(reply, str) else None)
        problem = problem or unfinished(exercise.name, reply, []) or judge(cases, reply, exercise.texts)
        points = float(exercise.groups[label].points)
        tests.append(
            {
                "name": label,
                "score": 0.0 if problem else points,
                "max_score": points,
                "hidden": label != "like the visible cases",
                "message": f"✗ {problem}" if problem else "✓ right",
            }
        )
    problems = [test["message"] for test in tests if test["message"] != "✓ right"]
    return {
        "name": exercise.name,
        "score": sum(test["score"] for test in tests),
        "max_score": float(exercise.points),
        "message": problems[0] if problems else "✓ right",
        "seconds": answers.get("seconds", 0.0),
        "tests": tests,
    }
