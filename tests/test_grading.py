"""The grader: which submissions there are, what becomes of each, and that nothing is lost or done twice."""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dgm_course import cli
from dgm_course.grading import report, run, session, submission
from dgm_course.grading.exercise import load
from dgm_course.grading.grade import blank
from dgm_course.grading.sandbox import level

ROOT = Path(__file__).parents[1]
# A limit that no other run has: it marks our processes. No zero ends it, so that it is written the same everywhere.
MEMORY = f"{6 + os.getpid() % 100_000 / 1e6:.6f}1"

HIDDEN = """
import torch
from dgm_course.grading.exercise import Exercise, Group

def double(x):
    return 2 * x

def moments(x):
    return x.mean(), ((x - x.mean()) ** 2).mean()

def numbers(*lengths):
    return lambda g: [{"x": torch.randn(n, generator=g, dtype=torch.float64)} for n in lengths]

EXERCISES = [
    Exercise("double", 3, 5, 1, double, ("y",), Group(1, numbers(3, 4)), {"long": Group(2, numbers(1, 99))},
             mistakes={"you tripled": (lambda x: 3 * x, "Twice is asked.")}, correct={"sum": lambda x: x + x}),
    Exercise("moments", 2, 5, 1, moments, ("mean", "var"), Group(1, numbers(5)), {"long": Group(1, numbers(99))},
             mistakes={"you divided by n - 1": (lambda x: (x.mean(), x.var()), "")}, correct={}),
]
"""
DOUBLE = "def double(x):\n    return x + x"
MOMENTS = "def moments(x):\n    m = x.sum() / len(x)\n    return m, (x * x).mean() - m * m"
CLASS = {
    "ada": [DOUBLE, MOMENTS],
    "bob": ["def double(x):\n    return 3 * x", MOMENTS],
    "cem": None,  # broken JSON
    "dee": ["def doubel(x):\n    return 2 * x"],
    "eve": ["def double(x):\n    while True:\n        pass", MOMENTS],
    "fay": ["# first\nx = 1 / 0", "import torch\nheld = torch.empty(2**28, dtype=torch.float64)", DOUBLE, MOMENTS],
}
SEEN = "like the visible cases"
SCORES = {"ada": (3, 2), "bob": (0, 2), "cem": (0, 0), "dee": (0, 0), "eve": (0, 2), "fay": (3, 2)}


def notebook(*sources: str, **changes) -> bytes:
    """A notebook with these code cells."""
    cells = [{"cell_type": "code", "metadata": {}, "outputs": [], "source": source} for source in sources]
    text = {"cell_type": "markdown", "metadata": {}, "source": "raise ValueError('text is not run')"}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [text, *cells], **changes}).encode()


def hand_in(folder: Path, students: dict) -> Path:
    """A folder of submissions."""
    folder.mkdir()
    for student, sources in students.items():
        (folder / f"{student}.ipynb").write_bytes(b'{"cells": [\n{,' if sources is None else notebook(*sources))
    return folder


def hidden(folder: Path) -> Path:
    """A folder with the hidden tests of hwX."""
    folder.mkdir()
    (folder / "hwX.py").write_text(HIDDEN)
    return folder


def arguments(folder: Path, out: Path, *more) -> list[str]:
    place = ["--homework", "hwX", "--tests", str(folder / "hidden"), "--out", str(out)]
    return ["grade", str(folder / "subs"), *place, *map(str, more)]


def call(*words):
    """Run the command line in this process; an error that it does not explain fails the test."""
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def read(out: Path) -> dict[str, dict]:
    """The results in a folder of grades, without their times and places."""
    results = {}
    for file in (out / "results").glob("*.json"):
        results[file.stem] = result = json.loads(file.read_text(encoding="utf-8"))
        result.pop("file")
        for timed in (result, *result["exercises"]):
            timed.pop("seconds")
    return results


def gradebook(out: Path) -> list[dict]:
    rows = list(csv.DictReader((out / "gradebook.csv").read_text(encoding="utf-8-sig").splitlines()))
    for row in rows:
        del row["seconds"], row["file"]
    return rows


def stamps(out: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (out / "results").glob("*.json")}


@pytest.fixture(scope="module")
def bubblewrap():
    if level() != "bubblewrap":
        pytest.skip("bubblewrap does not work here, so nothing was graded")


# Which submissions there are ------------------------------------------------------------------------------------------


def test_files_and_folders_are_named_after_their_students(tmp_path, monkeypatch):
    files = "ada.ipynb bob/hw3.ipynb cem/a/b/hw3.ipynb dan/one.ipynb dan/sub/two.ipynb eve/notes.txt fay.txt gus"
    ignored = ".git/x.ipynb bob/.ipynb_checkpoints/hw3-checkpoint.ipynb __MACOSX/bob/hw3.ipynb dan/__MACOSX/one.ipynb"
    top = tmp_path / ".hidden" / "subs"  # where the whole lies does not matter
    for name in (*files.split(), *ignored.split()):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(name.encode())
    (top / "hal" / "folder.ipynb").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / ".hidden")
    for place in (top, Path("subs"), Path("../.hidden/subs")):
        found = {one.student: one for one in submission.find([place])}
        good = {"ada": "ada.ipynb", "bob": "bob/hw3.ipynb", "cem": "cem/a/b/hw3.ipynb"}
        good |= {"dan_one": "dan/one.ipynb", "dan_sub_two": "dan/sub/two.ipynb"}
        assert {name: one.content.decode() for name, one in found.items() if not one.problem} == good
        assert all(found[name].file == str(place / file) for name, file in good.items())
        bad = {"eve": "no notebook", "fay": "'.txt'", "gus": "ends in nothing", "hal": "no notebook"}
        assert {*good, *bad} == set(found)
        assert all(part in found[name].problem and found[name].content == b"" for name, part in bad.items())
    assert [one.student for one in submission.find([top / "bob" / "hw3.ipynb", top / "ada.ipynb"])] == ["hw3", "ada"]
    with pytest.raises(FileNotFoundError, match="SUBMISSIONS must be .*nowhere"):
        submission.find([top, top / "nowhere"])


def test_links_are_not_followed(tmp_path):
    secret = tmp_path / "secret.ipynb"
    secret.write_bytes(notebook("secret"))
    top = tmp_path / "subs"
    (top / "bob").mkdir(parents=True)
    for link, target in {"ada.ipynb": secret, "bob/hw3.ipynb": secret, "cem": tmp_path, "dan.ipynb": "nowhere"}.items():
        (top / link).symlink_to(target)
    found = submission.find([top])
    assert [one.student for one in found] == ["ada", "bob", "cem", "dan"]
    assert all("link" in one.problem and one.content == b"" for one in found)


HOSTILE = [
    "a..",
    "etc/../../b",
    "-rf",
    "a\nb",
    "=1+1",
    "CON",
    "ada.",
    " ",
    "é" * 120,
    "e\u0301",
    "名" * 80,
    "💥",
    "\x1b[31m",
]


def test_names_are_safe_and_unique_whatever_the_files_are_called(tmp_path):
    names = [os.fsencode(name.replace("/", "∕") + ".ipynb") for name in HOSTILE]
    names += [b"\xff\xfe.ipynb", b"ada.ipynb", b"Ada.ipynb", b"ADA.ipynb", b"ada-2.ipynb", b"x.\xff", b"y.\n\x1b[0m"]
    top = os.fsencode(tmp_path / "subs")
    os.mkdir(top)
    for name in names:
        Path(os.fsdecode(os.path.join(top, name))).write_bytes(notebook())
    found = submission.find([tmp_path / "subs"])
    assert len(found) == len(names)
    assert len({one.student.casefold() for one in found}) == len(found)
    for one in found:
        assert report.file_name(one.student) == one.student and not one.student.startswith("-")
        assert one.sha256 and (one.problem or "").isprintable()
        report.write_atomically(tmp_path / "out" / f"{one.student}.json", "{}")
    assert {file.parent for file in tmp_path.rglob("*.json")} == {tmp_path / "out"}
    assert submission.safe("Jose\u0301") == "Jos\u00e9" == submission.safe("Jos\u00e9")


def test_what_cannot_be_read_is_a_submission_with_a_problem(tmp_path, monkeypatch):
    with open(tmp_path / "large.ipynb", "wb") as file:
        file.truncate(submission.LARGEST + 1)
    os.mkfifo(tmp_path / "pipe.ipynb")
    (tmp_path / "private.ipynb").touch()
    opened, plain = [], Path.read_bytes

    def deny(path):
        opened.append(path.name)
        if path.name == "private.ipynb":
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", deny)
    problems = {one.student: one.problem for one in submission.find([tmp_path])}
    assert problems == {
        "large": "it has 50 MB; at most 50 are read",
        "pipe": "it is no ordinary file",
        "private": "it cannot be read: Permission denied",
    }
    assert opened == ["private.ipynb"]


def test_cells_are_the_code_of_a_notebook_of_version_4():
    assert submission.cells(notebook("a = 1\nb = 2", "")) == ["a = 1\nb = 2", ""]
    assert submission.cells(notebook(["a = 1\n", "b = 2"])) == ["a = 1\nb = 2"]
    assert submission.cells(b"\xef\xbb\xbf" + notebook("ᾱ = 1")) == ["ᾱ = 1"]
    assert submission.cells(notebook(cells=[])) == []


BROKEN = {
    "empty": (b" \n", "it is empty"),
    "not UTF-8": (notebook("a").decode().encode("utf-16"), "no text in UTF-8"),
    "broken": (b'{"cells":\n [}', "broken in line 2"),
    "cut off": (notebook("a")[:-1], "broken in line 1"),
    "deep": (b"[" * 100_000, "no list of cells"),
    "deep and whole": (b'{"cells":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "no list of cells"),
    "no cells": (b'{"nbformat": 4}', "no list of cells"),
    "version 3": (b'{"nbformat": 3, "worksheets": [{"cells": []}]}', "no list of cells"),
    "a number": (b"12", "no list of cells"),
    "nothing": (b"null", "no list of cells"),
    "cells of text": (b'{"cells": "code"}', "no list of cells"),
    "cells that are none": (b'{"cells": [1]}', "no list of cells"),
    "sources that are none": (b'{"cells": [{"cell_type": "code", "source": [1]}]}', "no list of cells"),
    "a long number": (b'{"cells": ' + b"9" * 10_000 + b"}", "no list of cells"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_notebook_is_refused_with_the_reason(name):
    content, reason = BROKEN[name]
    with pytest.raises(ValueError, match=reason):
        submission.cells(content)


# The command, with a grader that only counts -------------------------------------------------------------------------


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A folder with hidden tests and three submissions; `graded` lists whom a fake grader was asked about."""
    hidden(tmp_path / "hidden")
    hand_in(tmp_path / "subs", {"ada": [DOUBLE], "bob": [DOUBLE], "cem": [DOUBLE]})

    class Course:
        folder, subs, out, graded = tmp_path, tmp_path / "subs", tmp_path / "out", []
        failing, endless = set(), set()

        def grade(self, *more, out=None):
            self.graded.clear()
            return call(*arguments(self.folder, out or self.out, "--trust", *more))

    course = Course()

    def fake(one, tests, limits, isolation, stop):
        course.graded.append(one.student)
        if one.student in course.endless:
            assert until(lambda: stop, 10)
            raise KeyboardInterrupt
        if one.student in course.failing:
            raise MemoryError("no room")
        return {**blank(one, tests, limits, isolation), "score": float(len(one.content) % 7)}

    monkeypatch.setattr(run, "grade", fake)
    return course


def test_a_second_run_grades_nothing_twice_and_what_changed_anew(course):
    assert course.grade().exit_code == 0
    assert sorted(course.graded) == ["ada", "bob", "cem"]
    before, book = stamps(course.out), (course.out / "gradebook.csv").read_bytes()
    (course.out / "gradebook.csv").unlink()
    assert course.grade().exit_code == 0
    assert course.graded == [] and stamps(course.out) == before
    assert (course.out / "gradebook.csv").read_bytes() == book

    (course.subs / "bob.ipynb").write_bytes(notebook(DOUBLE, "more = 1"))
    (course.subs / "dee.ipynb").write_bytes(notebook(DOUBLE))
    course.grade()
    assert sorted(course.graded) == ["bob", "dee"]
    (course.out / "results" / "ada.json").write_text('["half')
    (course.out / "results" / "cem.json").write_text("[]")
    course.grade()
    assert sorted(course.graded) == ["ada", "cem"]
    assert [row["student"] for row in gradebook(course.out)] == ["ada", "bob", "cem", "dee"]


def test_a_seed_belongs_to_a_run(course):
    course.grade()
    (course.subs / "dee.ipynb").write_bytes(notebook(DOUBLE))
    course.grade()
    seeds = {result["seed"] for result in read(course.out).values()}
    assert len(read(course.out)) == 4 and seeds == {json.loads((course.out / "run.json").read_text())["seed"]}
    course.grade(out=course.folder / "other")
    assert {result["seed"] for result in read(course.folder / "other").values()}.isdisjoint(seeds)


def test_other_tests_or_limits_are_refused_and_nothing_is_overwritten(course):
    course.grade()
    everything = {file: file.read_bytes() for file in course.out.rglob("*") if file.is_file()}
    limits = course.grade("--exercise-seconds", 11)
    (course.folder / "hidden" / "hwX.py").write_text(HIDDEN + "# changed\n")
    tests = course.grade()
    for refused, word in ((limits, "limits"), (tests, "tests: their file has changed")):
        assert refused.exit_code == 2 and course.graded == []
        assert "OUT must be new or of the same run" in refused.output and word in refused.output
    assert {file: file.read_bytes() for file in course.out.rglob("*") if file.is_file()} == everything


def test_a_fault_of_the_grader_stops_no_other_and_is_tried_again(course):
    course.failing.add("bob")
    first = course.grade("--jobs", 1)
    assert first.exit_code == 1 and course.graded == ["ada", "bob", "cem"] and "1 left" in first.output
    failed = read(course.out)["bob"]
    assert "MemoryError" in failed["problem"] and failed["score"] == 0 and failed["max_score"] == 5
    assert [entry["score"] for entry in failed["exercises"]] == [0, 0]
    assert [bool(row["problem"]) for row in gradebook(course.out)] == [False, True, False]
    course.failing.clear()
    assert course.grade().exit_code == 0 and course.graded == ["bob"]
    assert read(course.out)["bob"]["problem"] is None
    course.grade()
    assert course.graded == []


def test_what_a_killed_grader_left_is_swept_away(course):
    for place in (course.out, course.out / "results"):
        place.mkdir(exist_ok=True)
        (place / ".x123.part").write_text("half")
        assert course.grade().exit_code == 0  # the first time, OUT holds nothing else
    assert not list(course.out.rglob("*.part"))


class Unseen:
    """Something whose end is a moment at which Python throws every exception away."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_counts_wherever_it_comes(course, monkeypatch):
    def press(file, text):
        unseen = Unseen() if file.stem == "ada" else None
        del unseen
        report.write_atomically(file, text)

    course.endless |= {"bob", "cem"}
    monkeypatch.setattr(run, "write_atomically", press)
    result = course.grade("--jobs", 1)
    assert result.exit_code == 130 and "1 of 3 submissions" in result.output
    assert set(read(course.out)) == {"ada"} and [row["student"] for row in gradebook(course.out)] == ["ada"]


def test_ctrl_c_pressed_again_cuts_no_report_short(course, monkeypatch):
    write = report.write_atomically
    monkeypatch.setattr(report, "write_atomically", lambda *args: (signal.raise_signal(signal.SIGINT), write(*args)))
    assert course.grade().exit_code == 0
    assert [row["student"] for row in gradebook(course.out)] == ["ada", "bob", "cem"]
    assert len(list(course.out.glob("feedback/*.html"))) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_grader_ends_what_runs(course, monkeypatch):
    def full(file, text):
        if file.stem == "ada":
            raise OSError("no space left on the device")
        report.write_atomically(file, text)

    course.endless |= {"bob", "cem"}
    monkeypatch.setattr(run, "write_atomically", full)
    with pytest.raises(OSError, match="no space left") as held:  # with its frames, as by a process that ends of it
        CliRunner().invoke(cli.app, arguments(course.folder, course.out, "--trust"), catch_exceptions=False)
    assert held.tb and not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_ctrl_c_waits_for_no_process_that_cannot_be_killed(tmp_path, monkeypatch):
    # As a sandbox whose outer half was killed while it made its walls: the inner half waits, and keeps the pipes open.
    @contextlib.contextmanager
    def stuck(level):
        yield ["sh", "-c", f"setsid sleep 20 & touch {tmp_path}/started; wait"], {}

    def press():
        until((tmp_path / "started").exists, 20)
        os.kill(os.getpid(), signal.SIGINT)

    hidden(tmp_path / "hidden")
    hand_in(tmp_path / "subs", {"ada": [DOUBLE], "bob": [DOUBLE]})
    monkeypatch.setattr(run, "level", lambda: "bubblewrap")
    monkeypatch.setattr(session, "sandboxed", stuck)
    finger = threading.Thread(target=press)
    finger.start()
    start = time.monotonic()
    result = call(*arguments(tmp_path, tmp_path / "out", "--jobs", 1))
    finger.join()
    assert result.exit_code == 130 and "Stopped. 2 left" in result.output
    assert time.monotonic() - start < 10


def test_without_a_sandbox_nothing_is_graded_unless_trusted(course, monkeypatch):
    monkeypatch.setattr(run, "level", lambda: "none")
    refused = call(*arguments(course.folder, course.out))
    assert refused.exit_code == 2 and "bubblewrap" in refused.output and "--trust" in refused.output
    assert course.graded == [] and not (course.out / "results").exists() and not (course.out / "gradebook.csv").exists()
    assert course.grade().exit_code == 0
    assert {result["isolation"] for result in read(course.out).values()} == {"none"}


def test_hostile_names_come_through_to_every_report(course):
    for name in HOSTILE:
        (course.subs / (name.replace("/", "∕") + ".ipynb")).write_bytes(notebook())
    Path(os.fsdecode(os.path.join(os.fsencode(course.subs), b"x.\xff"))).touch()
    assert course.grade().exit_code == 0
    for folder in ("results", "feedback", "gradescope"):
        assert len(list((course.out / folder).iterdir())) == len(HOSTILE) + 4
    assert len(gradebook(course.out)) == len(HOSTILE) + 4


def refused(course, *words) -> str:
    """What a call with a mistake in it says; it must say it in a sentence, and grade nothing."""
    result = call(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output and course.graded == []
    return " ".join(result.output.split())


def test_mistakes_in_the_call_are_explained(course):
    right = arguments(course.folder, course.out)
    assert "there is no file of hidden tests" in refused(course, *[word.replace("hwX", "hw77") for word in right])
    assert "hwX" in refused(course, *[word.replace("hwX", "hwx") for word in right])
    assert "there is no" in refused(course, "grade", course.folder / "sbus", *right[2:])
    assert "--jobs" in refused(course, *right, "--jobs", "0")
    assert "--exercise-seconds" in refused(course, *right, "--exercise-seconds", "0")
    assert "--memory-gb" in refused(course, *right, "--memory-gb", "2")
    (course.folder / "empty").mkdir()
    assert "there is nothing in" in refused(course, "grade", course.folder / "empty", *right[2:])
    assert not course.out.exists()


def test_a_folder_that_is_none_of_grades_is_left_alone(course):
    taken, inside, file, strange = (course.folder / name for name in ("taken", "subs/out", "file", "strange"))
    taken.mkdir()
    (taken / "thesis.tex").touch()
    file.touch()
    strange.mkdir()
    (strange / "run.json").write_text('["of another program"]')
    assert "holds other files" in refused(course, *arguments(course.folder, taken))
    assert "outside of SUBMISSIONS" in refused(course, *arguments(course.folder, inside))
    assert "is a file" in refused(course, *arguments(course.folder, file))
    assert "something else" in refused(course, *arguments(course.folder, strange))
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"] and not inside.exists()


# The command as it is -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graded(bubblewrap, tmp_path_factory):
    """A class, graded."""
    folder = tmp_path_factory.mktemp("class")
    hidden(folder / "hidden")
    hand_in(folder / "subs", CLASS)
    result = call(*arguments(folder, folder / "out", "--jobs", 2, "--exercise-seconds", 1, "--memory-gb", MEMORY))
    assert result.exit_code == 0 and "6 of 6 submissions" in result.output
    return folder


def test_a_result_is_complete(graded):
    result = json.loads((graded / "out" / "results" / "ada.json").read_text())
    assert 0 < result.pop("seconds") < 60 and all(0 < one.pop("seconds") < 1 for one in result["exercises"])
    tests = [
        {"name": name, "score": points, "max_score": points, "hidden": name == "long", "message": "✓ right"}
        for name, points in (("like the visible cases", 1.0), ("long", 2.0), (SEEN, 1.0), ("long", 1.0))
    ]
    right = {"message": "✓ right"}
    assert result == {
        "student": "ada",
        "homework": "hwX",
        "file": str(graded / "subs" / "ada.ipynb"),
        "sha256": hashlib.sha256((graded / "subs" / "ada.ipynb").read_bytes()).hexdigest(),
        "score": 5.0,
        "max_score": 5.0,
        "isolation": "bubblewrap",
        "seed": json.loads((graded / "out" / "run.json").read_text())["seed"],
        "limits": {"notebook_seconds": 60.0, "exercise_seconds": 1.0, "memory_gb": float(MEMORY)},
        "problem": None,
        "cells": [],
        "output": "",
        "exercises": [
            {"name": "double", "score": 3.0, "max_score": 3.0, **right, "tests": tests[:2]},
            {"name": "moments", "score": 2.0, "max_score": 2.0, **right, "tests": tests[2:]},
        ],
    }


def test_every_student_gets_a_score_and_the_reason(graded):
    results = read(graded / "out")
    assert {name: tuple(one["score"] for one in result["exercises"]) for name, result in results.items()} == SCORES
    said = {name: result["exercises"][0]["message"] for name, result in results.items()}
    assert "you tripled. Twice is asked." in said["bob"] and "there is doubel" in said["dee"]
    assert "no answer within 1 second" in said["eve"]
    assert "broken in line 2" in results["cem"]["problem"] and results["cem"]["score"] == 0
    (cell,) = results["fay"]["cells"]
    assert cell == {"cell": 1, "first_line": "# first", "error": "ZeroDivisionError: division by zero"}


def test_the_gradebook_holds_everybody_in_order(graded):
    rows = gradebook(graded / "out")
    assert [row["student"] for row in rows] == list(CLASS)
    for row in rows:
        double, moments = SCORES[row["student"]]
        assert (row["double"], row["moments"]) == (str(double), str(moments))
        assert (row["score"], row["max_score"], row["isolation"]) == (str(double + moments), "5", "bubblewrap")
        assert bool(row["problem"]) == (row["student"] == "cem")


def test_limits_take_effect(bubblewrap, tmp_path):
    hidden(tmp_path / "hidden")
    held = "import torch\nheld = torch.empty(7 * 2**26, dtype=torch.float64)"  # 3.5 GB
    hand_in(tmp_path / "subs", {"fay": [held, DOUBLE, MOMENTS], "gus": [DOUBLE, "while True:\n    pass"]})
    call(*arguments(tmp_path, tmp_path / "out", "--notebook-seconds", 1.5, "--memory-gb", 4))
    results = read(tmp_path / "out")
    assert "did not finish within 1.5 seconds; the time ran out in code cell 2" in results["gus"]["problem"]
    (cell,) = results["fay"]["cells"]
    assert cell["cell"] == 1 and "allocate" in cell["error"]
    assert {name: result["score"] for name, result in results.items()} == {"fay": 5, "gus": 0}


# Killed in the middle -------------------------------------------------------------------------------------------------


def ours(mark: str) -> dict[str, str]:
    """The programs of all processes that live and have a mark on their command lines, by their ids."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if any(mark in word for word in words) and "dgm_course.cli" not in words and state not in "ZX":
                found[folder.name] = Path(words[0]).name.rstrip("0123456789.")
    return found


def until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(met)


@pytest.fixture
def started(tmp_path):
    """Starts a grader in a process of its own."""
    processes = []

    def start(*more):
        words = arguments(tmp_path, tmp_path / "out", "--exercise-seconds", 1, "--memory-gb", MEMORY, *more)
        command = [sys.executable, "-m", "dgm_course.cli", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        processes.append(subprocess.Popen(command, cwd=tmp_path, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_killed_in_the_middle_it_loses_nothing_and_leaves_nothing(graded, started, tmp_path):
    out, mounts = tmp_path / "out", Path("/proc/self/mounts").read_text().splitlines()
    hidden(tmp_path / "hidden")
    hand_in(tmp_path / "subs", CLASS | {"eve": ["import os\nos.fork()\nwhile True:\n    pass"]})
    out.mkdir()
    shutil.copy(graded / "out" / "run.json", out)  # the same seed
    grader = started("--jobs", 1)
    assert until(lambda: {"ada.json", "dee.json"} <= set(stamps(out)), 60)
    assert until(lambda: list(ours(MEMORY).values()).count("python") == 2, 30), ours(MEMORY)
    os.kill(grader.pid, signal.SIGKILL)
    assert until(lambda: not ours(MEMORY), 2), ours(MEMORY)
    assert not set(Path("/proc/self/mounts").read_text().splitlines()) - set(mounts)
    assert set(read(out)) == {"ada", "bob", "cem", "dee"}  # and each of them parses

    (tmp_path / "subs" / "eve.ipynb").write_bytes(notebook(*CLASS["eve"]))
    before = stamps(out)
    words = ["--jobs", 3, "--exercise-seconds", 1, "--memory-gb", MEMORY]
    assert call(*arguments(tmp_path, out, *words)).exit_code == 0
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before
    assert read(out) == read(graded / "out") and gradebook(out) == gradebook(graded / "out")
    assert not list(out.rglob("*.part"))


def test_ctrl_c_ends_it_soon_with_the_grades_that_there_are(bubblewrap, started, tmp_path):
    out = tmp_path / "out"
    hidden(tmp_path / "hidden")
    hand_in(tmp_path / "subs", {"ada": [DOUBLE], "gus": ["while True:\n    pass"], "hal": ["while 1: pass"]})
    grader = started("--jobs", 2)
    assert until((out / "results" / "ada.json").exists, 120)  # on a busy machine; that is not what is tested
    start = time.monotonic()
    os.kill(grader.pid, signal.SIGINT)
    said, _ = grader.communicate(timeout=60)
    assert time.monotonic() - start < 15  # the notebooks have a minute
    assert grader.returncode == 130 and "Traceback" not in said
    assert "1 of 3 submissions" in said and "2 left: the same command goes on" in said
    assert [row["student"] for row in gradebook(out)] == ["ada"]
    assert until(lambda: not ours(MEMORY), 2), ours(MEMORY)


# The hidden tests as pytest -------------------------------------------------------------------------------------------

HW3 = ROOT / "tests" / "hidden" / "hw3.py"


def hidden_tests(*words, cwd=ROOT):
    """Run pytest; its exit code, and what it said."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_hidden_tests_run_on_one_notebook(bubblewrap, tmp_path):
    good, bad = tmp_path / "hw3_mine.ipynb", tmp_path / "answer.ipynb"
    text = HW3.read_text(encoding="utf-8")  # the references have the names that are asked for
    good.write_bytes(notebook(text))
    bad.write_bytes(notebook(text, "def complete(xt, value, given, alpha_bar):\n    return None"))
    code, said = hidden_tests("tests/hidden", "--submission", good)
    groups = sum(len(one.groups) for one in load(HW3).values())
    assert code == 0 and f"{groups} passed" in said and " failed" not in said and "hw3" not in said, said
    folder = ROOT / "tests" / "hidden" / "test_submission.py"
    code, said = hidden_tests(folder, "--submission", "answer.ipynb", "--homework", "hw3", cwd=tmp_path)
    failed = [line for line in said.splitlines() if line.startswith("FAILED")]
    assert code == 1 and failed and all("hw3-complete-" in line for line in failed), said
    report = said.partition("short test summary info")[0]  # the summary repeats it where pytest does not cut its lines
    assert report.count("it should return a tuple (x0, eps, v); None came") == len(failed)


def test_the_hidden_tests_say_what_is_wrong_with_their_options(tmp_path):
    (tmp_path / "answer.ipynb").write_bytes(notebook())
    code, said = hidden_tests("tests/hidden/test_submission.py", "--submission", tmp_path / "answer.ipynb")
    assert code not in (0, 1) and "--homework must say which homework" in said and "hw3" in said, said
    assert "Traceback" not in said


def test_without_an_option_the_hidden_tests_are_those_of_the_solutions():
    # As `make test` does it: from the root, so that the conftest with the options is loaded late.
    others = ["--ignore-glob=tests/test_*.py", "--ignore=tests/parity", "--ignore-glob=*_references.py"]
    code, said = hidden_tests("tests", "--collect-only", *others)
    assert code == 0 and "test_submission.py::test_exercise[hw3-complete-" in said, said[-2000:]
