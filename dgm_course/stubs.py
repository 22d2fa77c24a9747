"""Homework from one tagged source: a stub for students, the executed solution, and the visible cases frozen to data.

A source `solutions/hwN_topic.py` marks what students write, in the text of its cells: each tag is a line of its own.
In a code cell the lines between ``# BEGIN SOLUTION`` and ``# END SOLUTION`` become one ``raise NotImplementedError``; in
a Markdown cell those between ``<!-- BEGIN SOLUTION -->`` and ``<!-- END SOLUTION -->`` become a place for an answer.
"""

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dgm_course import notebooks
from dgm_course.notebooks import NotebookError

__all__ = ["build", "leaks", "secrets", "solved", "stale", "stub"]

TAGS = {
    "code": ("# BEGIN SOLUTION", "# END SOLUTION"),
    "markdown": ("<!-- BEGIN SOLUTION -->", "<!-- END SOLUTION -->"),
}
HOLES = {"code": "raise NotImplementedError", "markdown": "*Your answer:*"}
LIKE_A_TAG = re.compile(r"\b(begin|end)[ _-]*solution\b", re.IGNORECASE)
TRIVIAL = 12  # a shorter line, without its spaces, gives nothing away: `)`, `return x`


# From the tagged source to two notebooks


def stub(notebook):
    """What students get of a tagged notebook: a new one, with a hole in the place of each solution.

    Raises:
        NotebookError: If a tag has no partner, or is not on a line of its own; names the cell.
    """
    return transformed(notebook, lambda kind, indent, block: [indent + HOLES[kind]])


def solved(notebook):
    """The notebook of the solutions: a new one, without the tags.

    Raises:
        NotebookError: As `stub` does.
    """
    return transformed(notebook, lambda kind, indent, block: block)


def transformed(notebook, replace):
    """A copy of a tagged notebook; `replace` gets the kind of the cell, the indentation of the tags, and their lines."""
    notebook = copy.deepcopy(notebook)
    for number, cell in enumerate(notebook.cells, 1):
        lines = []
        for indent, block in pieces(cell, number):
            lines += block if indent is None else replace(cell.cell_type, indent, block)
        cell.source = "\n".join(lines)
    return notebooks.with_ids(notebook)


def pieces(cell, number: int) -> Iterator[tuple[str | None, list[str]]]:
    """The lines of a cell, piece by piece: (None, lines) outside of a solution, (indentation, lines) for a solution."""
    begin, end = TAGS.get(cell.cell_type, ("", ""))
    opened, lines = None, []
    for line in cell.source.split("\n"):
        text, indent = line.strip(), line[: len(line) - len(line.lstrip())]
        if not LIKE_A_TAG.search(line):
            lines.append(line)
        elif text == begin and opened is None:
            yield None, lines
            opened, lines = indent, []
        elif text == end and opened == indent:
            yield opened, lines
            opened, lines = None, []
        else:
            why = f"a tag is {begin!r}, then {end!r} at the same indentation, each on a line of its own"
            raise NotebookError(f"cell {number}: misplaced tag {text!r}; {why if begin else 'this cell can have none'}")
    if opened is not None:
        raise NotebookError(f"cell {number}: {begin!r} without {end!r}")
    yield None, lines


# No solution in a stub


def secrets(notebook) -> dict[str, set[str]]:
    """For each kind of cell the lines that stand in solutions only, without spaces and comments.

    A line that stands in a cell of the same kind outside of a solution too is public; a trivial one is left out.
    """
    inside, outside = {kind: set() for kind in TAGS}, {kind: set() for kind in TAGS}
    for number, cell in enumerate(notebook.cells, 1):
        for indent, block in pieces(cell, number):
            if cell.cell_type in TAGS:
                (outside if indent is None else inside)[cell.cell_type].update(bare(line, cell) for line in block)
    return {kind: {line for line in inside[kind] - outside[kind] if len(line) >= TRIVIAL} for kind in TAGS}


def leaks(notebook, student) -> list[str]:
    """Lines of a solution that a stub shows, one sentence each: in its code, its prose, a comment or an output.

    Arguments:
        notebook: The tagged one.
        student: The stub made of it, executed or not.
    """
    hidden = set().union(*secrets(notebook).values())
    found = []
    for number, cell in enumerate(student.cells, 1):
        lines = {bare(line, cell) for line in cell.source.splitlines()}
        code = cell.cell_type == "code"
        comments = [line.partition("#")[2] for line in cell.source.splitlines()] if code else [cell.source]
        prose = "\n".join(squeezed(text) for text in [*comments, *strings(cell.get("outputs", []))])
        found += [
            f"cell {number} shows the solution's {line}" for line in sorted(hidden) if line in lines or line in prose
        ]
    return found


def bare(line: str, cell) -> str:
    """A line without its spaces, and in code without its comment."""
    return squeezed(line.partition("#")[0] if cell.cell_type == "code" else line)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def strings(node) -> Iterator[str]:
    """Every text in nested lists and dicts."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, (dict, list)):
        for item in node.values() if isinstance(node, dict) else node:
            yield from strings(item)


# Files


def places(source: Path) -> tuple[Path, Path, Path, Path]:
    """Of a source in solutions/: its stub, its solution, its hidden tests and its frozen visible cases."""
    root, name = source.parents[1], source.stem.partition("_")[0]
    stub_file, solution = root / "homework" / f"{source.stem}.ipynb", source.with_suffix(".ipynb")
    return stub_file, solution, root / "tests/hidden" / f"{name}.py", root / f"dgm_course/homework/{name}.safetensors"


def build(source: str | Path, timeout: float = 300) -> None:
    """Freeze the visible cases, then make the executed stub and solution; both are written only if every cell of both ran.

    Raises:
        NotebookError: If a cell fails, a tag is misplaced, there are no hidden tests, or the stub shows a solution.
    """
    source = Path(source).resolve()
    student, solution, hidden, frozen = places(source)
    tagged = notebooks.from_source(source)
    wanted = {student: stub(tagged), solution: solved(tagged)}
    cases = visible_cases(hidden)
    if not holds(frozen, cases):
        part = frozen.with_name(frozen.name + ".part")
        part.write_bytes(cases)
        os.replace(part, frozen)
    student.parent.mkdir(exist_ok=True)
    for target, notebook in wanted.items():
        notebooks.finished(notebook, target, timeout)
    if found := leaks(tagged, wanted[student]):
        raise NotebookError("\n".join([f"{source.stem}: the stub gives a solution away", *found]))
    for target, notebook in wanted.items():
        notebooks.write(notebook, target)


def stale(source: str | Path) -> list[str]:
    """What of a homework is not up to date with its source and its hidden tests, one sentence each.

    Raises:
        NotebookError: If a tag is misplaced, or there are no hidden tests.
    """
    source = Path(source).resolve()
    student, solution, hidden, frozen = places(source)
    tagged = notebooks.from_source(source)
    wanted = {student: stub(tagged), solution: solved(tagged)}
    found = [f"{path.parent.name}: {why}" for path, made in wanted.items() for why in notebooks.compare(made, path)]
    if not holds(frozen, visible_cases(hidden)):
        found.append(f"{frozen.name} does not hold the visible cases of {hidden.name}")
    return found


def visible_cases(hidden: Path) -> bytes:
    """The content of the frozen file that belongs to a file of hidden tests."""
    from dgm_course.grading import exercise

    try:
        return exercise.freeze(exercise.load(hidden))
    except ValueError as error:
        raise NotebookError(str(error)) from error


def holds(frozen: Path, content: bytes) -> bool:
    """Whether a frozen file has this content, up to rounding: the last digits of a result depend on the machine."""
    from safetensors import SafetensorError

    try:
        (old_texts, old), (texts, new) = opened(frozen.read_bytes()), opened(content)
    except (OSError, KeyError, ValueError, SafetensorError):  # there is none, or it is damaged
        return False

    def alike(a, b) -> bool:
        relative, absolute = (1e-5, 1e-6) if a.dtype.itemsize == 4 else (1e-8, 1e-10)
        same_form = (a.dtype, a.shape) == (b.dtype, b.shape)
        return same_form and a.double().allclose(b.double(), relative, absolute, equal_nan=True)

    return texts == old_texts and all(alike(new[name], old[name]) for name in new)


def opened(content: bytes):
    """The texts and the tensors in the content of a frozen file."""
    from safetensors.torch import load

    tensors = load(content)
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    return json.loads(header)["__metadata__"]["exercises"], tensors
