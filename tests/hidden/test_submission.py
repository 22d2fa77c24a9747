"""The hidden tests on one notebook, or on the solutions: a test for each group of cases."""

import secrets
from pathlib import Path

import pytest

from dgm_course.grading import sandbox, submission
from dgm_course.grading.exercise import load
from dgm_course.grading.grade import HiddenTests, Limits, grade

HERE = Path(__file__).parent
HOMEWORK = {file.stem: file for file in sorted(HERE.glob("hw*.py"))}
SOLUTIONS = HERE.parents[1] / "solutions"


def chosen(config) -> dict[str, Path]:
    """The notebook to test for each homework."""
    notebook = config.getoption("--submission", None)
    if notebook is None:
        return {name: next(SOLUTIONS.glob(f"{name}_*.ipynb")) for name in HOMEWORK}
    fitting = [name for name in HOMEWORK if notebook.name.startswith(f"{name}_") or notebook.stem == name]
    name = config.getoption("--homework", None) or (fitting[0] if fitting else None)
    if name not in HOMEWORK:
        known = ", ".join(HOMEWORK)
        raise pytest.UsageError(f"--homework must say which homework {notebook} is, one of {known}; got {name}")
    return {name: notebook}


def pytest_generate_tests(metafunc):
    tests = [
        pytest.param(name, notebook, exercise, group, id=f"{name}-{exercise}-{group}")
        for name, notebook in chosen(metafunc.config).items()
        for exercise, content in load(HOMEWORK[name]).items()
        for group in content.groups
    ]
    metafunc.parametrize("homework, notebook, exercise, group", tests)


@pytest.fixture(scope="module")
def graded(request):
    """The result of a notebook, made once."""
    results = {}

    def result(homework: str, notebook: Path) -> dict:
        level = sandbox.level()
        stranger = request.config.getoption("--submission", None) and not request.config.getoption("--trust", False)
        if level != "bubblewrap" and stranger:
            pytest.fail(f"no sandbox works here (level {level}); install bubblewrap, or say --trust", pytrace=False)
        if notebook not in results:
            (found,) = submission.find([notebook])
            seed = secrets.randbelow(2**31)
            tests = HiddenTests(homework, HOMEWORK[homework].read_text(encoding="utf-8"), seed)
            results[notebook] = grade(found, tests, Limits(), level)
        return results[notebook]

    return result


def test_exercise(graded, homework, notebook, exercise, group):
    result = graded(homework, notebook)
    if result["problem"]:
        pytest.fail(result["problem"], pytrace=False)
    (entry,) = [entry for entry in result["exercises"] if entry["name"] == exercise]
    (test,) = [test for test in entry["tests"] if test["name"] == group]
    if test["score"] != test["max_score"]:
        pytest.fail(f"{test['message']} (seed {result['seed']})", pytrace=False)
