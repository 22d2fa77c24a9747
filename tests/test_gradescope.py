"""The autograder zip: what is in it, and what it does in a copy of Gradescope's layout."""

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_grading import DOUBLE, MOMENTS, call, hidden, notebook

from dgm_course.grading import gradescope
from dgm_course.grading.sandbox import level

ROOT = Path(__file__).parents[1]
# A function that is right only where the package that the zip brought is the one that runs.
GOOD = "import dgm_course\ndef double(x):\n    return dgm_course.FACTOR * x"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A course with the homework hwX, a package that can be told from ours, and what must not leave it."""
    root = tmp_path_factory.mktemp("repository")
    large = shutil.ignore_patterns("__pycache__", "*.parquet", "weights", "mathjax")
    shutil.copytree(ROOT / "dgm_course", root / "dgm_course", ignore=large)
    with open(root / "dgm_course" / "__init__.py", "a") as file:
        file.write("\nFACTOR = 2\n")
    (root / "tests").mkdir()
    hidden(root / "tests" / "hidden")
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    caches = "dgm_course/__pycache__/x.pyc dgm_course/nets/.ipynb_checkpoints/x.py dgm_course/.DS_Store"
    secrets = (
        "tests/hidden/hw9.py tests/hidden/conftest.py solutions/hwX.py solutions/hwX.ipynb homework/hwX.ipynb .git/x"
    )
    for name in (*caches.split(), *secrets.split()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("SECRET")
    return root


@pytest.fixture(scope="module")
def bundle(repository):
    return gradescope.bundle(repository, "hwX", repository / "build" / "deep" / "hwX_autograder.zip")


@pytest.fixture
def layout(bundle, tmp_path):
    """Gradescope's folders; grades what is in `submission`, with a Python that has what ours has."""
    source = tmp_path / "source"
    with zipfile.ZipFile(bundle) as file:
        file.extractall(source)
    (source / ".venv").symlink_to(sys.prefix)
    shutil.copy(source / "run_autograder", tmp_path / "run_autograder")
    for name in ("submission", "results"):
        (tmp_path / name).mkdir()
    return tmp_path


def autograde(layout: Path, **notebooks: bytes) -> dict:
    """What `run_autograder` writes for a submission, started as Gradescope does it."""
    for name, content in notebooks.items():
        (layout / "submission" / f"{name}.ipynb").write_bytes(content)
    (layout / "submission" / "json.py").write_text("raise SystemExit('a file of the student was imported')")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    # Started in the student's folder: what lies there must not be imported.
    done = subprocess.run(
        ["bash", layout / "run_autograder"], cwd=layout / "submission", env=clean, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads((layout / "results" / "results.json").read_text())


def test_the_zip_holds_what_the_autograder_needs_and_nothing_else(bundle, repository):
    with zipfile.ZipFile(bundle) as file:
        assert file.testzip() is None
        names = set(file.namelist())
        content = b"".join(file.read(name) for name in names)
        modes = {name: file.getinfo(name).external_attr >> 16 for name in ("setup.sh", "run_autograder")}
        assert file.read("hidden/hwX.py") == (repository / "tests" / "hidden" / "hwX.py").read_bytes()
    top = "setup.sh run_autograder hidden/hwX.py pyproject.toml constraints.txt README.md LICENSE"
    package = {name for name in names if name.startswith("dgm_course/")}
    assert names - package == set(top.split())
    wanted = {str(file.relative_to(repository)) for file in (repository / "dgm_course").rglob("*.*") if file.is_file()}
    wanted |= {"dgm_course/assets/gradescope/run_autograder"}
    assert package == {name for name in wanted if not any(part in name for part in ("__pycache__", "/.", "SECRET"))}
    assert b"SECRET" not in content
    assert all(mode & stat.S_IXUSR for mode in modes.values())
    assert [file.name for file in bundle.parent.iterdir()] == [bundle.name]


def test_the_scripts_are_valid(layout):
    for name in ("setup.sh", "run_autograder"):
        subprocess.run(["bash", "-n", layout / "source" / name], check=True)
        assert "@homework@" not in (layout / "source" / name).read_text()


def test_a_good_and_a_broken_notebook_get_their_scores(layout):
    if level() != "bubblewrap":
        pytest.skip("bubblewrap does not work here, so nothing was graded")
    (layout / "results" / "results.json").write_text('{"score": 100}')  # of an earlier run
    good = autograde(layout, hwX_topic=notebook(GOOD, MOMENTS))
    assert good["score"] == 5 and [test["status"] for test in good["tests"]] == ["passed"] * 4
    assert [test["visibility"] for test in good["tests"]] == ["visible", "after_published"] * 2
    assert sum(test["max_score"] for test in good["tests"]) == 5 and "bubblewrap" in good["output"]

    bad = autograde(layout, hwX_topic=notebook("def double(x):\n    return 3 * x", "1 / 0", MOMENTS))
    assert bad["score"] == 2 and [test["status"] for test in bad["tests"]] == ["failed"] * 2 + ["passed"] * 2
    assert "ZeroDivisionError" in bad["output"]


def test_a_notebook_that_cannot_be_read_gets_nothing_and_the_reason(layout):
    result = autograde(layout, hwX_topic=b'{"cells": [')
    assert result["score"] == 0 and "JSON is broken" in result["output"]


def test_a_machine_without_python_says_that_the_autograder_failed(layout):
    (layout / "source" / ".venv").unlink()
    shutil.rmtree(layout / "results")
    result = autograde(layout, hwX_topic=notebook(DOUBLE, MOMENTS))
    assert result["score"] == 0 and "autograder itself failed (exit code 127)" in result["output"]


HANDED_IN = {  # the files, and the one that is graded, or what is said
    "none": ("", None, "Hand in one notebook"),
    "two": ("hwX_a.ipynb hwX_b.ipynb", None, "Hand in one notebook"),
    "two by other names": ("a.ipynb b.ipynb", None, "Hand in one notebook"),
    "no notebook": ("hwX.txt", None, "no notebook"),
    "one and a picture": ("a.png hwX_a.ipynb", "hwX_a.ipynb", ""),
    "one and another": ("a.ipynb hwX_a.ipynb", "hwX_a.ipynb", ""),
    "one by another name": ("mine.ipynb", "mine.ipynb", ""),
    "one in a folder": ("folder/mine.ipynb", "mine.ipynb", ""),
}


@pytest.mark.parametrize("case", HANDED_IN)
def test_one_notebook_is_graded_and_anything_else_explained(layout, monkeypatch, case):
    graded = []

    def fake(submission, tests, limits, isolation, stop):
        graded.append(None if submission.problem else Path(submission.file).name)
        return gradescope.run.failure(submission, tests, limits, submission.problem) | {"score": 5.0}

    monkeypatch.setattr(gradescope.run, "grade", fake)
    files, chosen, said = HANDED_IN[case]
    for name in files.split():
        (layout / "submission" / name).parent.mkdir(exist_ok=True)
        (layout / "submission" / name).write_bytes(notebook())
    gradescope.main(layout, "hwX")
    result = json.loads((layout / "results" / "results.json").read_text())
    assert said in result["output"] and (graded or [None]) == [chosen]
    assert result["score"] == (5 if graded else 0)


def test_the_command_writes_the_zip_or_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = call("gradescope", "--homework", "hw77", "--out", tmp_path / "x.zip")
    assert result.exit_code == 2 and "no file of hidden tests" in result.output and "hw3" in result.output
    assert not list(tmp_path.iterdir())
    result = call("gradescope", "--homework", "hw3", "--out", tmp_path / "x.zip")
    assert result.exit_code == 0 and str(tmp_path / "x.zip") in result.output.replace("\n", "")
    with zipfile.ZipFile(tmp_path / "x.zip") as file:
        names = file.namelist()
        assert {"hidden/hw3.py", "dgm_course/homework/hw3.safetensors", "dgm_course/cli.py"} <= set(names)
        assert not [name for name in names if name.startswith(("tests", "solutions", "homework"))]
        assert b'grading.gradescope "$root" hw3\n' in file.read("run_autograder")
