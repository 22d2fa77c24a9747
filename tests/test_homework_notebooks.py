"""Homework notebooks: one tagged source makes the stub and the solution, and no solution gets into a stub."""

import ast
import hashlib
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell
from typer.testing import CliRunner

from dgm_course import cli, notebooks, stubs
from dgm_course.grading.exercise import load
from dgm_course.homework import plain
from dgm_course.homework.ask import ask
from dgm_course.homework.verdict import judge

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "solutions").glob("*.py"))
BOTH = [ROOT / folder / f"{source.stem}.ipynb" for source in SOURCES for folder in ("homework", "solutions")]

each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
each_notebook = pytest.mark.parametrize("path", BOTH, ids=lambda path: f"{path.parent.name}-{path.stem}")


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def stub_file(source: Path) -> Path:
    return ROOT / "homework" / f"{source.stem}.ipynb"


# Tags

CODE = """def f(x):
    y = 3
    # BEGIN SOLUTION
    total = x + y  # a secret
    return total * 1000
    # END SOLUTION

# BEGIN SOLUTION
z = f(12345678)
# END SOLUTION
last = 1"""

TEXT = """Why?

<!-- BEGIN SOLUTION -->
Because of a long secret.

And more.
<!-- END SOLUTION -->"""


def tagged(*cells):
    return notebooks.with_ids(new_notebook(cells=list(cells)))


def test_a_stub_has_one_hole_for_each_solution_and_a_solution_has_no_tags():
    notebook = tagged(new_code_cell(CODE), new_markdown_cell(TEXT), new_code_cell("plain"))
    hole = "def f(x):\n    y = 3\n    raise NotImplementedError\n\nraise NotImplementedError\nlast = 1"
    assert [cell.source for cell in stubs.stub(notebook).cells] == [hole, "Why?\n\n*Your answer:*", "plain"]
    whole = CODE.replace("    # BEGIN SOLUTION\n", "").replace("    # END SOLUTION\n", "")
    whole = whole.replace("# BEGIN SOLUTION\n", "").replace("# END SOLUTION\n", "")
    answer = "Why?\n\nBecause of a long secret.\n\nAnd more."
    assert [cell.source for cell in stubs.solved(notebook).cells] == [whole, answer, "plain"]
    assert notebook.cells[0].source == CODE, "the tagged notebook is left as it is"


def test_nothing_depends_on_metadata_and_ids_are_made_of_the_final_text():
    notebook = tagged(new_code_cell("1"), new_code_cell(CODE, metadata={"tags": ["solution"]}), new_markdown_cell(TEXT))
    bare = tagged(new_code_cell("1"), new_code_cell(CODE), new_markdown_cell(TEXT))
    for make in (stubs.stub, stubs.solved):
        cells = make(notebook).cells
        assert [cell.source for cell in cells] == [cell.source for cell in make(bare).cells]
        for place, cell in enumerate(cells):
            digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
            assert cell.id == f"{place:03d}-{digest}"


@pytest.mark.parametrize(
    ("cell", "say"),
    [
        (new_code_cell("# BEGIN SOLUTION\nx = 1"), "without '# END SOLUTION'"),
        (new_code_cell("x = 1\n# END SOLUTION"), "misplaced tag '# END SOLUTION'"),
        (new_code_cell("# BEGIN SOLUTION\n# BEGIN SOLUTION\n# END SOLUTION"), "misplaced tag '# BEGIN SOLUTION'"),
        (new_code_cell("if x:\n    # BEGIN SOLUTION\n    1\n# END SOLUTION"), "same indentation"),
        (new_code_cell("x = 1  # BEGIN SOLUTION\n# END SOLUTION"), "on a line of its own"),
        (new_code_cell("# begin solution\n# end solution"), "misplaced tag '# begin solution'"),
        (new_code_cell("#BEGIN SOLUTION\n#END SOLUTION"), "misplaced tag"),
        (new_code_cell("### BEGIN_SOLUTION"), "misplaced tag"),
        (new_code_cell("<!-- BEGIN SOLUTION -->\n<!-- END SOLUTION -->"), "misplaced tag"),
        (new_markdown_cell("<!-- BEGIN SOLUTION -->\nyes"), "without '<!-- END SOLUTION -->'"),
        (new_markdown_cell("# BEGIN SOLUTION\n# END SOLUTION"), "misplaced tag"),
        (new_raw_cell("# BEGIN SOLUTION\n# END SOLUTION"), "this cell can have none"),
    ],
)
def test_an_unclosed_or_misplaced_tag_names_its_cell(cell, say):
    for make in (stubs.stub, stubs.solved, stubs.secrets):
        with pytest.raises(notebooks.NotebookError, match="cell 2: ") as error:
            make(tagged(new_code_cell("1"), cell))
        assert say in str(error.value)


# Leaks


def test_what_stands_outside_of_solutions_or_is_trivial_is_no_secret():
    notebook = tagged(new_code_cell(CODE), new_markdown_cell(TEXT), new_code_cell("z = f( 12345678 )  # public"))
    secrets = stubs.secrets(notebook)
    assert secrets["code"] == {"returntotal*1000"}  # z = … is public, total = x + y too short
    assert secrets["markdown"] == {"Becauseofalongsecret."}


SECRET = "    return total * 1000"


@pytest.mark.parametrize(
    "cell",
    [
        new_code_cell(f"def g(x):\n{SECRET}"),
        new_code_cell("1  # in short: return total*1000, and done"),
        new_markdown_cell("A hint: write `return total * 1000`."),
        new_code_cell("1", outputs=[new_output("stream", name="stdout", text=f"the source:\n{SECRET}\n")]),
        new_code_cell("1", outputs=[new_output("display_data", data={"text/html": f"<pre>{SECRET}</pre>"})]),
        new_markdown_cell("It is so *because*: Because of a long secret."),
    ],
)
def test_a_leak_is_found_wherever_it_is(cell):
    notebook = tagged(new_code_cell(CODE), new_markdown_cell(TEXT))
    student = stubs.stub(notebook)
    assert stubs.leaks(notebook, student) == []
    student.cells.append(cell)
    (found,) = stubs.leaks(notebook, student)
    assert found.startswith("cell 3 shows") and ("total*1000" in found or "longsecret" in found)


# Building

SOURCE = '''# %% [markdown]
# # Homework 9
# *Question.* Why twice?
#
# <!-- BEGIN SOLUTION -->
# Because once is not enough.
# <!-- END SOLUTION -->

# %%
def twice(x):
    """Two times x."""
    # BEGIN SOLUTION
    result_of_it = x + x + 0.0
    return result_of_it
    # END SOLUTION


# %%
try:
    print(twice(21))
except NotImplementedError:
    print("not yet")
'''

HIDDEN = """import torch
from dgm_course.grading.exercise import Exercise, Group

some = Group(1, lambda g: [{"x": torch.ones(2)}])
EXERCISES = [Exercise("twice", 2, 5, 1, lambda x: 2.0 * x, ("y",), some, {"more": some}, {}, {})]
"""


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A small repository with one homework and one notebook; the current folder is in it."""
    root = tmp_path / "a course"
    for folder in ["notebooks/src", "solutions", "tests/hidden", "dgm_course/homework"]:
        (root / folder).mkdir(parents=True)
    (root / "solutions/hw9_toy.py").write_text(SOURCE)
    (root / "tests/hidden/hw9.py").write_text(HIDDEN)
    (root / "notebooks/src/01_one.py").write_text("# %%\n1 + 1\n")
    monkeypatch.chdir(root)
    return root


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def test_building_a_homework_makes_its_stub_its_solution_and_its_frozen_cases_and_nothing_else(course):
    done = invoke("build", "hw9")
    assert done.exit_code == 0, done.output
    assert "✓ hw9_toy" in done.output and "01_one" not in done.output
    made = {str(path.relative_to(course)) for path in course.rglob("*") if path.is_file()}
    assert made == {
        "solutions/hw9_toy.py",
        "tests/hidden/hw9.py",
        "notebooks/src/01_one.py",
        "homework/hw9_toy.ipynb",
        "solutions/hw9_toy.ipynb",
        "dgm_course/homework/hw9.safetensors",
    }
    student, solution = (read(course / folder / "hw9_toy.ipynb") for folder in ("homework", "solutions"))
    assert student.cells[2].outputs[0].text == "not yet\n" and solution.cells[2].outputs[0].text == "42.0\n"
    assert student.cells[1].source == 'def twice(x):\n    """Two times x."""\n    raise NotImplementedError'
    assert student.cells[0].source.endswith("*Your answer:*")
    assert "result_of_it" not in (course / "homework/hw9_toy.ipynb").read_text()


def test_building_all_builds_notebooks_and_homework_and_then_nothing_is_stale(course):
    assert invoke("build", "--check").exit_code == 1
    done = invoke("build")
    assert done.exit_code == 0 and "2 of 2 notebooks built" in done.output
    assert invoke("build", "--check").exit_code == 0
    again = invoke("build", "--stale")
    assert again.exit_code == 0 and "0 of 0 notebooks built" in again.output


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        (
            "solutions/hw9_toy.py",
            "x + x",
            "x * 2 ",
            ["solutions: cell 2: the text differs", "solutions: cell 2: the id"],
        ),
        ("solutions/hw9_toy.py", "Two times", "Twice", ["homework: cell 2: the text", "solutions: cell 2: the text"]),
        ("solutions/hw9_toy.py", "Because", "Since", ["solutions: cell 1: the text"]),
        ("solutions/hw9_toy.py", "    # END", "    # THE END", ["cell 2: misplaced tag"]),
        ("tests/hidden/hw9.py", "ones", "zeros", ["hw9.safetensors does not hold the visible cases of hw9.py"]),
        ("tests/hidden/hw9.py", "5, 1", "6, 1", ["hw9.safetensors does not hold"]),
        ("tests/hidden/hw9.py", "EXERCISES", "OTHERS", ["must define EXERCISES"]),
    ],
)
def test_what_is_stale_is_said(course, file, old, new, says):
    stubs.build(course / "solutions/hw9_toy.py")
    assert stubs.stale(course / "solutions/hw9_toy.py") == []
    (course / file).write_text((course / file).read_text().replace(old, new))
    done = invoke("build", "hw9", "--check")
    assert done.exit_code == 1 and "hw9_toy is stale" in done.output
    assert all(part in done.output for part in says), done.output


def test_missing_files_are_stale_and_a_homework_without_hidden_tests_is_refused(course):
    stubs.build(course / "solutions/hw9_toy.py")
    for file in ["homework/hw9_toy.ipynb", "solutions/hw9_toy.ipynb", "dgm_course/homework/hw9.safetensors"]:
        (course / file).unlink()
    assert len(stubs.stale(course / "solutions/hw9_toy.py")) == 3
    (course / "tests/hidden/hw9.py").unlink()
    done = invoke("build", "hw9")
    assert done.exit_code == 1 and "no file of hidden tests" in done.output


def test_frozen_cases_are_written_only_if_they_differ_by_more_than_rounding(course):
    source, frozen = course / "solutions/hw9_toy.py", course / "dgm_course/homework/hw9.safetensors"
    hidden = course / "tests/hidden/hw9.py"
    stubs.build(source)
    before = frozen.stat()
    hidden.write_text(HIDDEN.replace("2.0 * x", "(2.0 + 1e-7) * x + 0 * torch.rand(1)"))
    stubs.build(source)
    assert frozen.stat().st_mtime_ns == before.st_mtime_ns
    hidden.write_text(HIDDEN.replace("2.0 * x", "2.001 * x"))
    assert stubs.stale(source) != []
    stubs.build(source)
    assert stubs.stale(source) == [] and frozen.stat().st_mtime_ns != before.st_mtime_ns
    frozen.write_bytes(b"damaged")
    assert stubs.stale(source) != []


def test_a_solution_in_a_stub_fails_the_build_and_leaves_the_old_files(course, monkeypatch):
    source = course / "solutions/hw9_toy.py"
    stubs.build(source)
    old = {path: path.read_bytes() for path in course.rglob("*.ipynb")}
    source.write_text(SOURCE.replace("# *Question.*", "# Write `result_of_it = x + x + 0.0`. *Question.*"))
    done = invoke("build", "hw9")
    assert done.exit_code == 1 and "cell 1 shows the solution's result_of_it=x+x+0.0" in done.output
    assert {path: path.read_bytes() for path in course.rglob("*.ipynb")} == old
    source.write_text(SOURCE)
    monkeypatch.setattr(stubs, "stub", stubs.solved)  # a builder that forgets the holes
    with pytest.raises(notebooks.NotebookError, match="gives a solution away"):
        stubs.build(source)


def test_a_failing_solution_leaves_the_old_files(course):
    source = course / "solutions/hw9_toy.py"
    stubs.build(source)
    old = {path: path.read_bytes() for path in course.rglob("*.ipynb")}
    source.write_text(SOURCE.replace("x + x", "x + None").replace("Two", "2"))
    with pytest.raises(notebooks.NotebookError, match="hw9_toy: cell 3 failed"):
        stubs.build(source)
    assert {path: path.read_bytes() for path in course.rglob("*.ipynb")} == old


# The homework of the course


def exercises(source: Path) -> dict:
    return load(ROOT / "tests/hidden" / f"{source.stem.partition('_')[0]}.py")


def stdout(path: Path) -> list[str]:
    texts = [out.text for cell in code_cells(path) for out in cell.outputs if out.output_type == "stream"]
    return "".join(texts).splitlines()


@each_source
def test_all_that_is_made_of_a_source_is_up_to_date(source):
    assert stubs.stale(source) == []


@each_source
def test_the_stub_runs_to_its_end_and_every_check_says_not_implemented_yet(source):
    asked = exercises(source)
    wanted = [
        f"· {name}: not implemented yet ({one.points} points, about {one.minutes} minutes)"
        for name, one in asked.items()
    ]
    assert stdout(stub_file(source)) == wanted


@each_source
def test_every_check_of_the_solution_is_right(source):
    lines = stdout(source.with_suffix(".ipynb"))
    assert all(line.startswith("✓ ") for line in lines), lines
    checked = [line.partition(": right in the ")[0][2:] for line in lines if ": right in the " in line]
    assert checked == list(exercises(source))


def squeeze(line: str) -> str:
    return "".join(line.split("#")[0].split())


@each_source
def test_no_line_of_a_solution_stands_in_the_stub(source):
    """The lines are found here by another way than the builder's."""
    text = source.read_text()
    blocks = re.findall(r"^ *# BEGIN SOLUTION$(.*?)^ *# END SOLUTION$", text, re.MULTILINE | re.DOTALL)
    answers = re.findall(r"<!-- BEGIN SOLUTION -->\n(.*?)\n# <!-- END SOLUTION -->", text, re.DOTALL)
    rest = {squeeze(line) for line in re.sub("|".join(map(re.escape, blocks)), "", text).splitlines()}
    lines = {squeeze(line) for block in blocks for line in block.splitlines()} - rest
    secrets = {line for line in lines if len(line) > 12} | {"".join(part.split("# ", 1)[1].split()) for part in answers}
    assert len(blocks) == len(exercises(source)) and len(secrets) > 3 * len(blocks)
    stub = "".join(
        "".join(cell.source.split()) + json.dumps(cell.get("outputs")) for cell in read(stub_file(source)).cells
    )
    assert [secret for secret in secrets if secret in stub] == []
    whole = "".join("".join(cell.source.split()) for cell in read(source.with_suffix(".ipynb")).cells)
    found = [secret for secret in secrets if secret in whole]
    assert len(found) > 0.9 * len(secrets), "the search would find them"


def functions(path: Path) -> dict:
    """What the imports and function definitions of a notebook define."""
    space = {}
    for cell in code_cells(path):
        tree = ast.parse(cell.source)
        kept = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))]
        exec(compile(ast.Module(kept, []), str(path), "exec"), space)
    return space


def problem(exercise, label: str, function) -> str | None:
    cases = exercise.cases(label, seed=11)
    answers = [ask(function, case["inputs"]) for case in cases]
    return judge([plain(case) for case in cases], [plain(answer) for answer in answers], exercise.texts)


@each_source
def test_each_stub_fails_all_its_tests_and_each_solution_passes_them(source):
    holes, answers = functions(stub_file(source)), functions(source.with_suffix(".ipynb"))
    for name, exercise in exercises(source).items():
        for label in exercise.groups:
            assert "NotImplementedError" in problem(exercise, label, holes[name]), (name, label)
            assert problem(exercise, label, answers[name]) is None, (name, label)


@each_source
def test_the_text_states_points_minutes_and_difficulty_as_they_are(source):
    text = "\n".join(cell.source for cell in read(stub_file(source)).cells if cell.cell_type == "markdown")
    asked = exercises(source)
    for number, (name, one) in enumerate(asked.items(), 1):
        stars = "●" * one.difficulty + "○" * (5 - one.difficulty)
        assert f"| {number} | `{name}` | {one.points:g} | {stars} | {one.minutes} |" in text
        assert re.search(
            rf"^## {number}\. .* \({one.points:g} points\)\n\n{stars} · {one.minutes} minutes · read again: sections? ",
            text,
            re.M,
        )
    points, minutes = sum(one.points for one in asked.values()), sum(one.minutes for one in asked.values())
    assert f"| **{points:g}** | | **{minutes}** |" in text and 60 <= minutes <= 150


@each_source
def test_each_exercise_has_a_typed_signature_a_docstring_and_its_check_in_the_next_cell(source):
    cells = code_cells(stub_file(source))
    for name in exercises(source):
        (place,) = [i for i, cell in enumerate(cells) if re.search(rf"^def {name}\(", cell.source, re.MULTILINE)]
        (node,) = ast.parse(cells[place].source).body
        assert node.returns and all(argument.annotation for argument in node.args.args)
        assert ast.get_docstring(node) and isinstance(node.body[-1], ast.Raise)
        assert f"if hw.check({name}):" in cells[place + 1].source
    text = "\n".join(cell.source for cell in read(stub_file(source)).cells if cell.cell_type == "markdown")
    assert (
        text.count("**Question.**") == text.count("*Your answer:*") == len(exercises(source)) <= text.count("<details>")
    )


@each_notebook
def test_it_is_valid_was_run_in_order_and_weighs_less_than_a_megabyte(path):
    nbformat.validate(read(path))
    assert path.stat().st_size < 1_000_000
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert all(out.output_type != "error" and out.get("name") != "stderr" for out in cell.outputs), cell.source
        assert len(cell.source.splitlines()) <= 20, cell.source
        assert not re.search(r"\bat 0x[0-9a-f]{6,}|widget-view", json.dumps(cell.outputs)), cell.source
        assert not re.search(r"NBVAL|PYTEST_VALIDATE", cell.source) and not cell.metadata.get("tags")


@each_notebook
def test_the_set_up_cell_is_that_of_the_notebooks(path):
    others = {code_cells(other)[0].source for other in (ROOT / "notebooks").glob("*.ipynb")}
    assert {code_cells(path)[0].source} == others
