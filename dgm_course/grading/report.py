"""The reports of a grading run: a gradebook, JUnit, Gradescope's results, and a feedback page for each student.

A result is what the grader keeps of one submission. Names, messages, errors and output in it may be a student's text and
hold anything: each report makes them harmless in its own way.
"""

import csv
import html
import io
import json
import os
import re
import tempfile
from pathlib import Path
from string import Template
from xml.etree import ElementTree as ET

__all__ = ["feedback", "gradebook", "gradescope", "junit", "write", "write_atomically"]

ASSETS = Path(__file__).parents[1] / "assets"
LONGEST = 200  # bytes in a student's name: with an ending it must fit into a file name, 255
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what a terminal shows as colours
NO_TEXT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0 cannot hold it, even escaped
# Full-width forms count too in some spreadsheets; where semicolons separate cells, one in a text starts a new cell.
FORMULA = re.compile(r'(^|[;,])([\s"]*)(?=[=+\-@＝＋－＠])')
ISOLATION = {
    "bubblewrap": "a sandbox without a network (bubblewrap)",
    "user": "a user without rights, but no sandbox (user)",
    "none": "none but the limits",
}


def write(out: Path, results: list[dict]) -> None:
    """Write `gradebook.csv`, `junit.xml`, `gradescope/<student>.json` and `feedback/<student>.html`, each atomically.

    Arguments:
        out: The folder of grades.
        results: One for each submission, in any order; the reports are in the order of the students' names.

    Raises:
        ValueError: If a student's name is no plain file name, or stands there twice. Nothing is written then.
    """
    students = [file_name(result["student"]) for result in results]
    if twice := sorted({student for student in students if students.count(student) > 1}):
        raise ValueError(f"results must hold each student once; got twice: {', '.join(twice)}")
    results = sorted(results, key=lambda result: result["student"])
    write_atomically(out / "gradebook.csv", gradebook(results))
    write_atomically(out / "junit.xml", junit(results))
    for result in results:
        student = result["student"]
        write_atomically(out / "gradescope" / f"{student}.json", json.dumps(gradescope(result), indent=1))
        write_atomically(out / "feedback" / f"{student}.html", feedback(result))


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all, readable by its owner only: grades are private.

    Nothing else remains after an exception. A process that is killed may leave a hidden `.part` file beside.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(suffix=".part", prefix=".", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else the name may reach the disk before the content
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def file_name(student: str) -> str:
    """The student's name, if a file can be named so.

    Example:
        >>> file_name("../ada")
        Traceback (most recent call last):
        ValueError: student must be a plain file name of at most 200 bytes; got '../ada'
    """
    plain = student == clean(student) and not re.search(r"^$|^\.|[/\\:\t\n\r]|\s$", student)
    if not plain or len(student.encode()) > LONGEST:
        raise ValueError(f"student must be a plain file name of at most {LONGEST} bytes; got {student[:80]!r}")
    return student


def clean(text) -> str:
    """The text with � for what no report can hold: control characters, halves of a surrogate pair."""
    return NO_TEXT.sub("\ufffd", COLOURS.sub("", str(text)))


def groups(exercise: dict) -> list[dict]:
    """The tests of an exercise; if it came to none, the exercise itself as one."""
    return exercise["tests"] or [{**exercise, "name": "all cases", "hidden": False}]


def passed(test: dict) -> bool:
    return test["score"] >= test["max_score"]


def gradebook(results: list[dict]) -> str:
    """A CSV table with one row for each student and one column for each exercise.

    It starts with a byte order mark: without it Excel reads UTF-8 in the local code page and garbles names. pandas and
    LibreOffice skip the mark; for `csv` open the file as "utf-8-sig".
    """
    exercises = list(dict.fromkeys(exercise["name"] for result in results for exercise in result["exercises"]))
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["student", "file", "score", "max_score", *exercises, "isolation", "seconds", "problem"])
    for result in results:
        scores = {exercise["name"]: exercise["score"] for exercise in result["exercises"]}
        scores = [scores.get(name, 0) for name in exercises]  # what was never tried is worth 0: the sum is right
        points = [f"{score:g}" for score in (result["score"], result["max_score"], *scores)]
        *names, isolation, problem = (cell(result[name] or "") for name in ("student", "file", "isolation", "problem"))
        rows.writerow([*names, *points, isolation, f"{result['seconds']:.1f}", problem])
    return "\ufeff" + table.getvalue()


def cell(text: str) -> str:
    """Text on one line that no spreadsheet takes for a formula: an apostrophe stands before what could begin one.

    Example:
        >>> cell("=1+1"), cell("a; -1"), cell("a-b")
        ("'=1+1", "a; '-1", 'a-b')
    """
    return FORMULA.sub(r"\1\2'", re.sub(r"[\t\r\n]+", " ", clean(text)))


def junit(results: list[dict]) -> str:
    """JUnit XML for instructors, hidden tests included: a suite for each student, a case for each test.

    The tests of an exercise share its seconds evenly. A problem of the whole submission is an error in a case of its own.
    """
    root = ET.Element("testsuites")
    for result in results:
        suite = ET.SubElement(root, "testsuite", name=clean(result["student"]), time=f"{result['seconds']:.3f}")
        properties = ET.SubElement(suite, "properties")
        for name in ("score", "max_score", "file", "sha256", "isolation", "seed"):
            ET.SubElement(properties, "property", name=name, value=clean(result[name]))
        if result["problem"]:
            about = {"classname": clean(result["homework"]), "time": "0"}
            case = ET.SubElement(suite, "testcase", about, name="the submission")
            ET.SubElement(case, "error", message=clean(result["problem"]))
        for exercise in result["exercises"]:
            classname, seconds = f"{result['homework']}.{exercise['name']}", exercise["seconds"] / len(groups(exercise))
            about = {"classname": clean(classname), "time": f"{seconds:.3f}"}
            for test in groups(exercise):
                case = ET.SubElement(suite, "testcase", about, name=clean(test["name"]))
                if not passed(test):
                    ET.SubElement(case, "failure", message=clean(test["message"]))
        for count, tag in {"tests": "testcase", "failures": "failure", "errors": "error"}.items():
            suite.set(count, str(len(list(suite.iter(tag)))))
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8", xml_declaration=True).decode()


def gradescope(result: dict) -> dict:
    """The content of Gradescope's `results.json`. Students see it before the deadline, all but the hidden tests.

    So the sentence of an exercise, which may be a hidden test's, is left out; and what was printed, because a function
    sees the hidden inputs and can print them. Gradescope knows no `max_score` of the whole, and shows no student the total
    while tests are hidden.
    """
    problem = [f"Problem: {result['problem']}"] if result["problem"] else []
    cells = [
        f"Cell {cell['cell']} failed: {cell['error']} (it begins: {cell['first_line']})" for cell in result["cells"]
    ]
    return {
        "score": result["score"],
        "execution_time": result["seconds"],
        "output": clean("\n".join([*problem, *cells, conditions(result)])),
        "output_format": "text",  # else Gradescope takes it for HTML, and a part of it is the student's
        "test_output_format": "text",
        "test_name_format": "text",
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "tests": [
            {
                "name": clean(f"{exercise['name']}: {test['name']}"),
                "number": f"{i}.{j}",
                "score": test["score"],
                "max_score": test["max_score"],
                "status": "passed" if passed(test) else "failed",
                "output": clean(test["message"]),
                "visibility": "after_published" if test["hidden"] else "visible",
            }
            for i, exercise in enumerate(result["exercises"], 1)
            for j, test in enumerate(groups(exercise), 1)
        ],
    }


def conditions(result: dict) -> str:
    """Under which isolation and limits a submission ran."""
    limit, isolation = result["limits"], ISOLATION.get(result["isolation"], result["isolation"])
    return (
        f"Isolation: {isolation}. Limits: {limit['notebook_seconds']:g} s for the notebook, "
        f"{limit['exercise_seconds']:g} s for each exercise, {limit['memory_gb']:g} GB of memory."
    )


def feedback(result: dict) -> str:
    """A web page for the student that loads and runs nothing. It says what hidden tests say: for after the deadline."""
    page = Template((ASSETS / "feedback.html").read_text(encoding="utf-8"))
    cells, printed = "\n".join(map(failed_cell, result["cells"])), f"<pre>\n{say(result['output'])}</pre>"
    return page.substitute(
        {name: say(result[name]) for name in ("homework", "student", "sha256")},
        file=say(Path(result["file"]).name),
        style=(ASSETS / "feedback.css").read_text(encoding="utf-8"),
        score=f"{result['score']:g}",
        max_score=f"{result['max_score']:g}",
        problem=f'<p class="problem said"><b>Problem:</b> {say(result["problem"])}</p>' if result["problem"] else "",
        summary="\n".join(row(exercise, link(exercise)) for exercise in result["exercises"]),
        exercises="\n".join(map(section, result["exercises"])),
        cells=f"<h2>Cells that failed</h2>\n{cells}" if result["cells"] else "",
        output=f"<h2>What the notebook printed</h2>\n{printed}" if result["output"] else "",
        conditions=say(conditions(result)),
        seconds=f"{result['seconds']:.1f}",
    )


def say(text) -> str:
    """Text for a page: no character of it is markup."""
    return html.escape(clean(text))


def row(thing: dict, what: str) -> str:
    """A row for an exercise or a test: right or not, what it is, its points."""
    mark = '<td class="right">✓</td>' if passed(thing) else '<td class="wrong">✗</td>'
    return f'<tr>{mark}<td class="said">{what}</td><td>{thing["score"]:g} / {thing["max_score"]:g}</td></tr>'


def link(exercise: dict) -> str:
    return f'<a href="#{say(exercise["name"])}"><code>{say(exercise["name"])}</code></a>'


def section(exercise: dict) -> str:
    """An exercise: its sentence, and its tests, each with what it says unless that is the same."""
    name, rows = say(exercise["name"]), ""
    for test in groups(exercise):
        hidden = " <small>hidden</small>" if test["hidden"] else ""
        message = "" if passed(test) or test["message"] == exercise["message"] else f"<br>{say(test['message'])}"
        rows += row(test, f"{say(test['name'])}{hidden}{message}") + "\n"
    heading = f'<h2 id="{name}"><code>{name}</code></h2>\n<p class="said">{say(exercise["message"])}</p>'
    return f"<section>\n{heading}\n<table>\n{rows}</table>\n</section>"


def failed_cell(failed: dict) -> str:
    where = f"<p>Cell {say(failed['cell'])}: <code>{say(failed['first_line'])}</code></p>"
    return f"{where}\n<pre>\n{say(failed['error'])}</pre>"  # a browser drops the first newline
