"""What students get: all that they need, stamped; no solution, no hidden test; and it runs where they will open it."""

import ast
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from packaging.requirements import Requirement
from typer.testing import CliRunner

from dgm_course import cli, release

ROOT = Path(__file__).parents[1]
REPO, TAG = "owner/name", "v1.0"
STUBS = sorted(f"homework/{file.name}" for file in (ROOT / "homework").glob("*.ipynb"))
ALL = sorted(f"notebooks/{file.name}" for file in (ROOT / "notebooks").glob("*.ipynb")) + STUBS

spec = importlib.util.spec_from_file_location("bench_colab", ROOT / "bench" / "colab.py")
colab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(colab)

# A small course

SET_UP = """\
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")"""

README = """# Course
<!-- instructors -->
Grade with care.
<!-- /instructors -->

Read.
<!--Instructors-->Never mind.<!-- /instructors -->
"""

SOLUTION = """# %%
def mean(x):
    # BEGIN SOLUTION
    total = x.sum()  # all of them
    return total / len(x)
    # END SOLUTION

# %% [markdown]
# Why?
#
# <!-- BEGIN SOLUTION -->
# Because it is the balance point.
# <!-- END SOLUTION -->
"""

HIDDEN = '''
def reference(x):
    """The mean."""
    weights = torch.ones_like(x) / x.numel()
    return (weights * x).sum()

EXERCISES = [lambda x: x.double().mean().to(x.dtype)]
'''

FOR_STUDENTS = """LICENSE README.md dgm_course/__init__.py dgm_course/homework/hw1.safetensors dgm_course/paths.py environment.yml
    homework/hw1_means.ipynb notebooks/01_one.ipynb pyproject.toml""".split()
FOR_OTHERS = """homework/notes.txt notebooks/src/01_one.py
    solutions/hw1_means.ipynb tests/test_x.py bench/x.py Makefile dgm_course/__pycache__/paths.pyc build/a.html
    .venv/lib/dgm_course/x.py runs/x.ipynb notebooks/.ipynb_checkpoints/01_one.ipynb""".split()


def notebook(*cells):
    return nbformat.writes(new_notebook(cells=[new_markdown_cell("# Ä title"), new_code_cell(SET_UP), *cells])) + "\n"


@pytest.fixture
def course(tmp_path):
    """A small repository in a folder with a space, not under git."""
    root = tmp_path / "a course"
    picture = new_output("display_data", data={"image/png": "aGVsbG8=", "text/plain": "<Figure> ∑"})
    stub = new_code_cell("def mean(x):\n    raise NotImplementedError")
    texts = dict.fromkeys(FOR_STUDENTS + FOR_OTHERS, "text") | {
        "README.md": README,
        "environment.yml": "- -e .[dev]\n",
        "dgm_course/paths.py": "def kernel(x):\n    return x.exp().sum()\n",
        "notebooks/01_one.ipynb": notebook(new_code_cell("plot()", outputs=[picture], execution_count=2)),
        "homework/hw1_means.ipynb": notebook(stub),
        "solutions/hw1_means.py": SOLUTION,
        "tests/hidden/hw1.py": HIDDEN,
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def files(tree: Path) -> list[str]:
    return sorted(file.relative_to(tree).as_posix() for file in tree.rglob("*") if file.is_file())


def test_a_release_holds_what_students_need_and_nothing_else(course, tmp_path):
    out = tmp_path / "new" / "tree"
    assert release.write(course, REPO, TAG, out) == files(out) == sorted(FOR_STUDENTS)
    assert (out / "dgm_course/paths.py").read_bytes() == (course / "dgm_course/paths.py").read_bytes()
    assert (out / "README.md").read_text() == "# Course\nRead.\n"
    assert (out / "environment.yml").read_text() == "- -e .[lab]\n"


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_of_a_checkout_only_what_git_tracks_is_taken_and_a_stranger_is_named(course, tmp_path):
    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=course, check=True, capture_output=True)

    git("init")
    (course / ".gitignore").write_text("*.secret\n")
    (course / "dgm_course" / "reference.secret").touch()
    git("add", ".")
    assert release.write(course, REPO, TAG, tmp_path / "tree") == sorted(FOR_STUDENTS)
    (course / "scratch.py").touch()  # outside of what is released
    (course / "dgm_course" / "ä new.py").touch()
    with pytest.raises(ValueError, match="git must track all of the release.*: dgm_course/ä new.py$"):
        release.write(course, REPO, TAG, tmp_path / "other")


@pytest.mark.parametrize(
    "repo", ["name", "a/b/c", "a b/c", "/name", "owner/", "-a/b", "https://github.com/a/b", 'a/b"', "a/.."]
)
def test_a_wrong_repository_is_refused(course, tmp_path, repo):
    with pytest.raises(ValueError, match=f"repo must be OWNER/NAME, .*; got {re.escape(repr(repo))}"):
        release.write(course, repo, TAG, tmp_path / "tree")


@pytest.mark.parametrize(
    "tag",
    [
        "",
        "v 1",
        "-f",
        "v1\n",
        "a..b",
        "/v1",
        "v1/",
        "v1.",
        "v1.lock",
        "a/.b",
        "a//b",
        "v~1",
        "v1@{0}",
        "'",
        "$(x)",
        "{x}",
    ],
)
def test_a_wrong_tag_is_refused(course, tmp_path, tag):
    with pytest.raises(ValueError, match=f"tag must be a git ref .*; got {re.escape(repr(tag))}"):
        release.write(course, REPO, tag, tmp_path / "tree")


@pytest.mark.parametrize("tag", ["v1.0", "2026-spring", "main", "course/2026_1"])
@pytest.mark.parametrize("repo", ["owner/name", "A-1/deep.generative_models-2", "o/x.y"])
def test_a_right_repository_and_tag_are_taken(course, tmp_path, repo, tag):
    assert release.write(course, repo, tag, tmp_path / "tree")


def test_a_folder_with_something_in_it_is_left_alone_and_an_empty_one_is_filled(course, tmp_path):
    out = tmp_path / "tree"
    out.mkdir()
    assert release.write(course, REPO, TAG, out) == files(out)
    before = {name: (out / name).read_bytes() for name in files(out)}
    for full in [out, out / "README.md"]:
        with pytest.raises(ValueError, match=f"out must be a folder that is empty or does not exist; got {full}"):
            release.write(course, REPO, "v2", full)
    assert {name: (out / name).read_bytes() for name in files(out)} == before


@pytest.mark.parametrize(
    ("name", "text", "say"),
    [
        (
            "homework/hw1_means.ipynb",
            notebook().replace("--quiet", "--upgrade"),
            "hw1_means.ipynb must have the set-up cell",
        ),
        ("homework/hw1_means.ipynb", nbformat.writes(new_notebook()), "hw1_means.ipynb must have the set-up cell"),
        ("README.md", README.replace("<!-- /", "<!-- ", 1), "README.md must close"),
        ("README.md", README + "<!-- instructors -->", "README.md must close"),
        ("environment.yml", "", "environment.yml must install .\\[dev\\] once; got 0 times"),
        ("LICENSE", None, "root must hold LICENSE"),
    ],
)
def test_a_course_that_cannot_be_stamped_is_named_and_nothing_half_written_stays(course, tmp_path, name, text, say):
    (course / name).unlink()
    if text is not None:
        (course / name).write_text(text)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=say):
        release.write(course, REPO, TAG, tmp_path / "there" / "tree")
    assert list((tmp_path / "there").iterdir()) == []


def test_the_command_says_what_it_wrote_and_what_is_wrong(course, tmp_path, monkeypatch):
    monkeypatch.chdir(course / "notebooks")

    def invoke(repo):
        return CliRunner().invoke(cli.app, ["release", "--repo", repo, "--tag", TAG, "--out", str(tmp_path / "tree")])

    wrong = invoke("name")
    assert wrong.exit_code == 2 and "OWNER/NAME" in wrong.output and not (tmp_path / "tree").exists()
    done = invoke(REPO)
    assert done.exit_code == 0 and files(tmp_path / "tree") == sorted(FOR_STUDENTS)
    assert all(part in done.output for part in ["homework/hw1_means.ipynb", "9 files", TAG, REPO]), done.output


# Badge and stamp


def check_notebook(tree: Path, root: Path, name: str) -> None:
    """The released notebook is the committed one with a badge above it and a stamped set-up cell, and is valid."""
    released, committed = (nbformat.read(folder / name, as_version=4) for folder in (tree, root))
    nbformat.validate(released)
    badge, *cells = released.cells
    assert badge.cell_type == "markdown" and badge.source.splitlines()[0] == (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/owner/name/blob/v1.0/{name})"
    )
    place = next(place for place, cell in enumerate(cells) if cell.cell_type == "code")
    assert "git+https://github.com/owner/name@v1.0" in cells[place].source
    cells[place].source = SET_UP
    assert {**released, "cells": cells} == dict(committed)  # sources, outputs, counts, ids and metadata


@pytest.mark.parametrize("name", ["notebooks/01_one.ipynb", "homework/hw1_means.ipynb"])
def test_a_notebook_gets_badge_and_stamp_and_keeps_the_rest(course, tmp_path, name):
    release.write(course, REPO, TAG, tmp_path / "tree")
    check_notebook(tmp_path / "tree", course, name)
    # Only the new lines differ in the file: no other line is written in another way.
    old, new = ((folder / name).read_text().splitlines() for folder in (course, tmp_path / "tree"))
    assert [line.strip() for line in old if line not in new] == [json.dumps(SET_UP.splitlines()[-1])]


@pytest.mark.parametrize("given", [None, "/a folder/dgm_course-0.1.0-py3-none-any.whl"])
def test_the_stamped_cell_installs_this_release_or_what_the_environment_says(course, tmp_path, monkeypatch, given):
    release.write(course, REPO, TAG, tmp_path / "tree")
    cell = nbformat.read(tmp_path / "tree/notebooks/01_one.ipynb", as_version=4).cells[2].source
    assert len(cell.splitlines()) <= 6 and re.findall(r"^(?:import|from) (\S+)", cell, re.M) == ["importlib.util", "os"]
    monkeypatch.delenv("DGM_COURSE", raising=False)
    if given:
        monkeypatch.setenv("DGM_COURSE", given)
    calls = []
    shell = SimpleNamespace(run_line_magic=lambda *call: calls.append(call))
    exec(cell, {"get_ipython": lambda: shell})
    assert calls == []  # it is installed here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(cell, {"get_ipython": lambda: shell})
    ((magic, line),) = calls
    *start, requirement = shlex.split(line)  # the magic hands its line to a shell
    assert [magic, *start] == ["pip", "install", "--quiet"]
    if given:
        assert requirement == given
    else:
        assert Requirement(requirement).name == "dgm-course"
        assert Requirement(requirement).url == "git+https://github.com/owner/name@v1.0"


# No solution and no reference

# Lines that a kernel of the course and a solution or reference share by design: students have the kernel. They are
# listed one by one, so that a solution cannot slip into the package unseen; in the homework they are secrets all the same.
SHARED = frozenset(
    {
        "for_inrange(rounds):",
        "fori,blockinenumerate(blocks):",
        "foroneineps:",
        "fort,sinpairwise(times.tolist()):",
        "keep=sigma_s/sigma_t",
        "middle=(low+high)/2",
        "returnfound",
        "returntorch.stack(terms)",
        "returnvalues.flatten(1).sum(1)",
        "returnweight",
        "std=(0.5*log_var).exp()",
        "t,s=times[:-1],times[1:]",
        "withtorch.enable_grad():",
        "z=mean+(0.5*log_var).exp()*eps",
    }
)


def normal(text: str) -> set[str]:
    """The lines of a text without spaces and comments; blank and trivial ones, shorter than `return x + y`, are dropped."""
    lines = (re.sub(r"\s+", "", line.partition("#")[0]) for line in text.splitlines())
    return {line for line in lines if len(line) >= 10}


def secrets(root: Path) -> set[str]:
    """The lines of solutions and of all functions in hidden tests that stand in no public part of a homework's source."""
    found, shown = set(), set()
    for source in sorted((root / "solutions").glob("hw*.py")):
        text, inside = source.read_text(), set()
        block = r"^[ #]*(<!-- |)BEGIN SOLUTION.*\n((?:.*\n)*?)[ #]*(?:<!-- )?END SOLUTION.*\n"
        for markdown, lines in re.findall(block, text, re.MULTILINE):
            inside |= normal(re.sub("^# ?", "", lines, flags=re.MULTILINE) if markdown else lines)
        public = re.sub(block, "", text, flags=re.MULTILINE)
        found |= inside
        shown |= normal(public) | normal(re.sub("^# ?", "", public, flags=re.MULTILINE))
    for hidden in sorted((root / "tests" / "hidden").glob("hw*.py")):
        text = hidden.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Lambda):
                found |= normal(ast.get_source_segment(text, node))
            elif isinstance(node, ast.FunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                first, last = (body[0].lineno, body[-1].end_lineno) if body else (0, 0)
                found |= normal("\n".join(text.splitlines()[first - 1 : last]))
    return found - shown


def leaks(tree: Path, hidden: set[str], shared: frozenset[str] = frozenset()) -> set[tuple[str, str]]:
    """Where a line of a solution or of a reference stands in a released tree; `shared` lines count in homework only."""
    found = set()
    for name in files(tree):
        try:
            text = (tree / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and numbers
        if name.endswith(".ipynb"):
            text = "\n".join(cell.source for cell in nbformat.reads(text, as_version=4).cells)
        homework = name.startswith(("homework/", "dgm_course/homework/"))
        found |= {(name, line) for line in normal(text) & (hidden if homework else hidden - shared)}
    return found


PLANTS = {
    "a line of a solution": ("total = x.sum()", "total=x.sum()"),
    "with another comment and more spaces": ("if x:\n        total  =  x.sum() # sum", "total=x.sum()"),
    "a written answer": ("Because it is the balance point.", "Becauseitisthebalancepoint."),
    "a line of a reference": ("return (weights * x).sum()", "return(weights*x).sum()"),
    "a lambda": ("lambda x: x.double().mean().to(x.dtype)", "lambdax:x.double().mean().to(x.dtype)"),
}


@pytest.mark.parametrize("name", ["homework/hw1_means.ipynb", "notebooks/01_one.ipynb", "dgm_course/paths.py"])
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_leak_is_found(course, tmp_path, name, plant):
    release.write(course, REPO, TAG, tmp_path / "tree")
    assert leaks(tmp_path / "tree", secrets(course)) == set()
    text, line = PLANTS[plant]
    if name.endswith(".ipynb"):
        (course / name).write_text(notebook(new_code_cell(f"y = 2\n{text}")))
    else:
        (course / name).write_text(f"y = 2\n{text}\n")
    release.write(course, REPO, TAG, tmp_path / "leaky")
    assert leaks(tmp_path / "leaky", secrets(course)) == {(name, line)}


def test_a_shared_line_is_a_secret_in_the_homework_only(course, tmp_path):
    release.write(course, REPO, TAG, tmp_path / "tree")
    homework = {"homework/hw1_means.ipynb", "dgm_course/homework/load.py"}
    for name in [*homework, "dgm_course/paths.py", "notebooks/01_one.ipynb"]:
        text = notebook(new_code_cell("total = x.sum()")) if name.endswith(".ipynb") else "total = x.sum()"
        (tmp_path / "tree" / name).write_text(text)
    found = leaks(tmp_path / "tree", secrets(course), frozenset({"total=x.sum()"}))
    assert {name for name, _ in found} == homework


# The course itself


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The release of the course as it is in the folder, whether git tracks it yet or not."""
    copy = tmp_path_factory.mktemp("copy")
    for name in [*release.FILES, *release.FOLDERS]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy / name)
    tree = tmp_path_factory.mktemp("release") / "a tree"
    release.write(copy, REPO, TAG, tree)
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return colab.build_wheel(tree, tmp_path_factory.mktemp("wheels"))


def test_every_notebook_and_stub_is_released(tree):
    assert [name for name in files(tree) if name.endswith(".ipynb")] == sorted(ALL)
    assert not {"solutions", "tests", "bench"} & {file.name for file in tree.iterdir()}


@pytest.mark.parametrize("name", ALL)
def test_it_has_badge_and_stamp_and_its_outputs(tree, name):
    check_notebook(tree, ROOT, name)


def test_no_solution_and_no_reference_is_in_the_release(tree):
    hidden = secrets(ROOT)
    assert len(hidden) > 10 * len(STUBS)  # about what an exercise takes; none would make this test empty
    assert leaks(tree, hidden, SHARED) == set()
    assert SHARED <= hidden  # no line stays listed for nothing


def test_links_in_the_release_lead_somewhere(tree):
    for name in files(tree):
        if name.endswith(".ipynb"):
            cells = nbformat.read(tree / name, as_version=4).cells
            text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        elif name == "README.md":
            text = (tree / name).read_text()
        else:
            continue
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`|\$[^$]*\$", "", text)):
            parts = urlsplit(link)
            if not parts.scheme and parts.path:
                assert ((tree / name).parent / parts.path).exists(), f"{name} links to {link}, which is not released"


def test_the_released_package_needs_nothing_that_was_left_out(tree):
    code = (
        "import importlib, pkgutil, sys, dgm_course as d\n"
        "for module in pkgutil.walk_packages(d.__path__, 'dgm_course.'): importlib.import_module(module.name)\n"
        "print(*{m.__file__ or '' for name, m in sys.modules.items() if name.startswith('dgm_course')}, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # An editable install, as ours, would find in the repository what the release lacks.
    assert [file for file in done.stdout.splitlines() if file and tree not in Path(file).parents] == []
    assert str(tree / "dgm_course" / "cli.py") in done.stdout


def test_the_wheel_holds_every_file_of_the_released_package(tree, wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("dgm_course/")}
    wanted = {name for name in files(tree) if name.startswith("dgm_course/")}
    assert held == wanted
    frozen = {f"dgm_course/homework/{Path(stub).name.partition('_')[0]}.safetensors" for stub in STUBS}
    assert held >= frozen | {"dgm_course/assets/page.html", "dgm_course/weights/mnist-unet.safetensors"}


@pytest.mark.parametrize("name", ["notebooks/03_ddpm.ipynb", *STUBS[:1]])
def test_it_runs_where_it_is_opened(tree, wheel, tmp_path, name):
    """One notebook and one stub, alone in an empty folder and without a network, as on Colab; the benchmark runs all."""
    done, changed = colab.run(tree / name, wheel, tmp_path)
    assert changed == {"dgm_course", "dgm_course-0.1.0.dist-info"}  # nothing that was there is replaced
    cells = [cell for cell in nbformat.read(done, as_version=4).cells if cell.cell_type == "code" and cell.source]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
