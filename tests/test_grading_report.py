"""The reports of a grading run: right numbers, whole files, and nothing in them that a student's text could do."""

import csv
import io
import json
import os
import re
import stat
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from dgm_course.grading import report

HOSTILE = [
    "</pre></p></table><script>alert(1)</script><img src=http://example.org onerror=alert(2)>",
    '" onmouseover="alert(3)" x=\'',
    "]]> <!-- <![CDATA[ &amp; &lt; &#0;",
    '=HYPERLINK("http://example.org";"grade")',
    "\x00\x01\x08\x0b\x1f\x7f\x85\ufffe\uffff",
    "half \ud800 and \udfff of a pair",
    "$title ${style} $$ %s {0}",
    "\x1b[31mred\x1b[0m",
    "line one\r\nline two\ttab",
]


def a_test(name="visible cases", score=1.0, max_score=1.0, hidden=False, message="✓ right"):
    return {"name": name, "score": score, "max_score": max_score, "hidden": hidden, "message": message}


def exercise(name="skip_posterior", tests=None, message="✓ right", seconds=0.5):
    tests = [a_test()] if tests is None else tests
    points = {key: sum(test[key] for test in tests) for key in ("score", "max_score")}
    return {"name": name, **points, "message": message, "seconds": seconds, "tests": tests}


def result(student="ada", **changes):
    """The result of a submission; scores are 4.5 of 7 unless changed."""
    wrong = a_test("edge times", 0.0, 1.5, True, "✗ SECRET: the variance at s = 0 is 0.25 and should be 0")
    exercises = [
        exercise("perturb_zero_snr", [a_test(), a_test("odd shapes", 1.0, 1.0, True, "✓ SECRET shapes")], seconds=0.5),
        exercise(
            "complete", [a_test(), wrong, a_test("float64", 1.5, 1.5, True)], message=wrong["message"], seconds=0.75
        ),
        exercise("x0_weight", [a_test(score=0.0, message="✗ weight is not finite")], message="✗ weight is not finite"),
    ]
    return {
        "student": student,
        "homework": "hw3",
        "file": f"{student}/hw3_ddpm.ipynb",
        "sha256": "ab" * 32,
        "score": 4.5,
        "max_score": 7.0,
        "isolation": "bubblewrap",
        "seed": 123,
        "limits": {"notebook_seconds": 61, "exercise_seconds": 13, "memory_gb": 6},
        "seconds": 2.14,
        "problem": None,
        "cells": [],
        "output": "",
        "exercises": exercises,
        **changes,
    }


def broken(student="eve", problem="the file is no notebook: it is empty"):
    return result(student, score=0.0, problem=problem, exercises=[])


def hostile(text: str):
    """A result with the text wherever a student's text can be."""
    return result(
        "eve",
        file=text,
        problem=text,
        output=text,
        cells=[{"cell": 5, "first_line": text, "error": text}],
        exercises=[
            exercise(
                message=text,
                tests=[a_test(score=0.0, message=text), a_test(text, 0.0, 2.0, True, f"{text} again")],
            )
        ],
    )


def table(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline="")))


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and what is left open or closed too often."""

    VOID = {"meta", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        return " ".join(data for tag, data in self.texts if tag != "style")

    def inside(self, tag: str) -> list[str]:
        return [data for where, data in self.texts if where == tag]


# Files


def test_write_writes_the_gradebook_junit_and_two_files_for_each_student(tmp_path):
    report.write(tmp_path / "grades", [result("grace"), broken("eve"), result("Émilie du Châtelet")])
    files = sorted(str(f.relative_to(tmp_path / "grades")) for f in tmp_path.rglob("*") if f.is_file())
    students = ["Émilie du Châtelet", "eve", "grace"]
    assert files == sorted(
        ["gradebook.csv", "junit.xml"]
        + [f"gradescope/{student}.json" for student in students]
        + [f"feedback/{student}.html" for student in students]
    )
    assert (tmp_path / "grades" / "gradebook.csv").read_bytes().startswith(b"\xef\xbb\xbfstudent,file,score")
    names = [row["student"] for row in table((tmp_path / "grades" / "gradebook.csv").read_text("utf-8"))]
    assert names == ["eve", "grace", "Émilie du Châtelet"]  # by name, in whatever order they were graded
    assert json.loads((tmp_path / "grades/gradescope/grace.json").read_text())["score"] == 4.5
    assert "grace" in Page((tmp_path / "grades/feedback/grace.html").read_text("utf-8")).inside("h1")


def test_no_results_make_an_empty_gradebook(tmp_path):
    report.write(tmp_path, [])
    assert table((tmp_path / "gradebook.csv").read_text("utf-8")) == []
    assert len(ET.parse(tmp_path / "junit.xml").getroot()) == 0


@pytest.mark.parametrize(
    "student",
    [
        "../x",
        "a/b",
        "a\\b",
        "..",
        ".",
        "",
        "/etc/x",
        "C:x",
        "x" * 201,
        "é" * 101,
        "a\x00b",
        "a\nb",
        "\ud800",
        ".x",
        "x ",
    ],
)
def test_a_name_that_is_no_plain_file_name_is_refused_before_anything_is_written(student, tmp_path):
    out = tmp_path / "one" / "two" / "grades"
    with pytest.raises(ValueError, match="student must be a plain file name"):
        report.write(out, [result("ada"), result(student)])
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("student", ["x" * 200, "é" * 100, "李 明", "o'neil-smith", "مریم\u200cبانو", "<b>&"])
def test_an_odd_name_that_a_file_can_have_is_kept(student, tmp_path):
    report.write(tmp_path, [result(student)])
    assert (tmp_path / "feedback" / f"{student}.html").is_file()
    (row,) = table((tmp_path / "gradebook.csv").read_text("utf-8"))
    assert row["student"] == student


def test_a_student_who_is_there_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="results must hold each student once; got twice: ada$"):
        report.write(tmp_path, [result("ada"), result("bob"), result("ada")])
    assert list(tmp_path.iterdir()) == []


def test_a_write_makes_folders_replaces_the_file_and_keeps_it_private(tmp_path):
    file = tmp_path / "new" / "folder" / "grades.json"
    report.write_atomically(file, "one ✓\r\n")
    report.write_atomically(file, "two ✓\r\n")
    assert file.read_bytes() == "two ✓\r\n".encode()
    assert [f.name for f in file.parent.iterdir()] == ["grades.json"]
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace", None])
def test_after_a_failed_write_the_old_file_stands_and_nothing_else(failing, tmp_path, monkeypatch):
    file = tmp_path / "grades.json"
    file.write_text("old")

    def fail(*_):
        raise KeyboardInterrupt

    if failing:
        monkeypatch.setattr(failing, fail)
    with pytest.raises(KeyboardInterrupt if failing else UnicodeEncodeError):
        report.write_atomically(file, "new" if failing else "\ud800")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("grades.json", "old")]


def test_the_content_is_in_a_file_of_another_name_until_it_is_whole(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.extend((f.name, f.read_text()) for f in tmp_path.iterdir()))
    report.write_atomically(tmp_path / "grades.json", "whole")
    ((name, text),) = seen
    assert text == "whole" and name.startswith(".") and not name.endswith(".json")


def test_reports_load_nothing_heavy():
    code = "import sys, dgm_course.grading.report; print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Gradebook


def test_the_gradebook_has_a_column_for_each_exercise_and_zeros_for_what_was_never_tried():
    text = report.gradebook([result("ada"), broken("eve")])
    ada, eve = table(text)
    assert ada == {
        "student": "ada",
        "file": "ada/hw3_ddpm.ipynb",
        "score": "4.5",
        "max_score": "7",
        "perturb_zero_snr": "2",
        "complete": "2.5",
        "x0_weight": "0",
        "isolation": "bubblewrap",
        "seconds": "2.1",
        "problem": "",
    }
    assert list(ada) == text.removeprefix("\ufeff").splitlines()[0].split(",")
    assert [eve[name] for name in ("perturb_zero_snr", "complete", "x0_weight", "score")] == ["0"] * 4
    assert eve["problem"] == "the file is no notebook: it is empty"


def test_points_are_written_without_the_dust_of_binary_fractions():
    (row,) = table(report.gradebook([result(score=0.1 + 0.2)]))
    assert row["score"] == "0.3"


@pytest.mark.parametrize("separator", [",", ";"])
@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1",
        "-1",
        "@SUM(1)",
        "\t=1",
        "\r=1",
        "\n=1",
        " =1",
        '"=1',
        "＝1",
        "x;=1",
        'x; "=1',
        "x,@y",
        "a;b;-1",
        *HOSTILE,
    ],
)
def test_no_cell_of_a_students_text_is_a_formula(text, separator):
    """Read as a spreadsheet may read it: with either separator, and blanks before a cell dropped."""
    numbers = re.compile(r"-?\d+(\.\d+)?$")
    content = report.gradebook([hostile(text)]).removeprefix("\ufeff")
    rows = list(csv.reader(io.StringIO(content, newline=""), delimiter=separator))
    assert len(rows) == 2
    for value in rows[1]:
        assert numbers.match(value) or value.lstrip(' \t\r\n"\ufeff')[:1] not in set("=+-@＝＋－＠"), value
        assert not value.startswith(("\t", "\r", "\n"))


def test_the_guard_leaves_ordinary_text_alone():
    problem = "the file is no notebook: line 1 - column 2, a+b = c@d"
    (row,) = table(report.gradebook([broken(problem=problem)]))
    assert row["problem"] == problem


# JUnit


def test_junit_counts_times_and_failures():
    root = ET.fromstring(report.junit([result("ada"), broken("eve")]).encode())
    ada, eve = root
    assert root.tag == "testsuites" and [suite.get("name") for suite in root] == ["ada", "eve"]
    assert (ada.get("tests"), ada.get("failures"), ada.get("errors"), ada.get("time")) == ("6", "2", "0", "2.140")
    cases = [(case.get("classname"), case.get("name"), case.get("time")) for case in ada.iter("testcase")]
    assert cases == [
        ("hw3.perturb_zero_snr", "visible cases", "0.250"),
        ("hw3.perturb_zero_snr", "odd shapes", "0.250"),
        ("hw3.complete", "visible cases", "0.250"),
        ("hw3.complete", "edge times", "0.250"),
        ("hw3.complete", "float64", "0.250"),
        ("hw3.x0_weight", "visible cases", "0.500"),
    ]
    failures = {case.get("name"): case.find("failure").get("message") for case in ada.iter("testcase") if len(case)}
    assert failures == {
        "edge times": "✗ SECRET: the variance at s = 0 is 0.25 and should be 0",
        "visible cases": "✗ weight is not finite",
    }
    properties = {p.get("name"): p.get("value") for p in ada.find("properties")}
    assert (properties["score"], properties["max_score"], properties["isolation"]) == ("4.5", "7.0", "bubblewrap")


def test_junit_reports_a_problem_of_the_submission_as_an_error():
    (suite,) = ET.fromstring(report.junit([broken()]).encode())
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "1")
    assert suite.find("testcase/error").get("message") == "the file is no notebook: it is empty"
    assert suite.find("testcase").get("classname") == "hw3"


def test_an_exercise_without_tests_counts_as_one():
    bare = {"name": "complete", "score": 0.0, "max_score": 3.0, "message": "✗ no function", "seconds": 0.2, "tests": []}
    graded = result(exercises=[bare])
    (suite,) = ET.fromstring(report.junit([graded]).encode())
    assert [failure.get("message") for failure in suite.iter("failure")] == ["✗ no function"]
    (test,) = report.gradescope(graded)["tests"]
    assert (test["score"], test["max_score"], test["status"], test["output"]) == (0.0, 3.0, "failed", "✗ no function")
    assert "0 / 3" in Page(report.feedback(graded)).inside("td")


def test_a_part_of_the_points_is_a_failure():
    graded = result(exercises=[exercise(tests=[a_test(score=0.5, message="✗ half")])])
    (suite,) = ET.fromstring(report.junit([graded]).encode())
    assert suite.get("failures") == "1"
    assert report.gradescope(graded)["tests"][0]["status"] == "failed"


@pytest.mark.parametrize("text", HOSTILE)
def test_junit_is_xml_whatever_a_student_writes(text):
    root = ET.fromstring(report.junit([hostile(text)]).encode("utf-8"))
    assert {element.tag for element in root.iter()} == {
        "testsuites", "testsuite", "properties", "property", "testcase", "error", "failure"
    }  # fmt: skip
    assert len(list(root.iter("testcase"))) == 3


def test_junit_keeps_the_text_but_for_what_xml_cannot_hold():
    (suite,) = ET.fromstring(report.junit([broken(problem="a\x00<b>&\ud800 ]]> ✓ 😀")]).encode())
    assert suite.find("testcase/error").get("message") == "a\ufffd<b>&\ufffd ]]> ✓ 😀"


# Gradescope


def test_gradescope_has_the_documented_fields():
    content = report.gradescope(result())
    documented = {"score", "execution_time", "output", "output_format", "test_output_format", "test_name_format"}
    assert set(content) == documented | {"visibility", "stdout_visibility", "tests"}
    assert (content["score"], content["execution_time"]) == (4.5, 2.14)
    assert (content["visibility"], content["stdout_visibility"]) == ("visible", "hidden")
    assert content["output_format"] == "text"  # the default there is a kind of HTML
    assert content["tests"][0] == {
        "name": "perturb_zero_snr: visible cases",
        "number": "1.1",
        "score": 1.0,
        "max_score": 1.0,
        "status": "passed",
        "output": "✓ right",
        "visibility": "visible",
    }
    assert [test["number"] for test in content["tests"]] == ["1.1", "1.2", "2.1", "2.2", "2.3", "3.1"]
    assert [test["status"] for test in content["tests"]] == ["passed"] * 3 + ["failed", "passed", "failed"]
    hidden = [test["number"] for test in content["tests"] if test["visibility"] == "after_published"]
    assert hidden == ["1.2", "2.2", "2.3"]


def test_gradescope_shows_nothing_of_the_hidden_tests_before_publication():
    content = report.gradescope(result(output="SECRET inputs that a function printed"))
    assert sum("SECRET" in test["output"] for test in content["tests"]) == 2
    content["tests"] = [test for test in content["tests"] if test["visibility"] == "visible"]
    assert len(content["tests"]) == 3
    assert "SECRET" not in json.dumps(content) and "0.25" not in json.dumps(content)


def test_gradescope_says_the_problem_the_failed_cells_and_the_limits():
    cells = [{"cell": 5, "first_line": "x = 1/0", "error": "ZeroDivisionError: division by zero"}]
    lines = report.gradescope(result(problem="it ran too long", cells=cells))["output"].splitlines()
    assert lines[0] == "Problem: it ran too long"
    assert all(part in lines[1] for part in ("5", "x = 1/0", "ZeroDivisionError: division by zero"))
    assert all(part in lines[2] for part in ("bubblewrap", "61 s", "13 s", "6 GB"))
    assert report.gradescope(broken())["tests"] == [] and report.gradescope(broken())["score"] == 0


@pytest.mark.parametrize("text", HOSTILE)
def test_gradescope_is_json_of_characters_only(text, tmp_path):
    report.write(tmp_path, [hostile(text)])
    content = json.loads((tmp_path / "gradescope" / "eve.json").read_bytes())
    flat = json.dumps(content, ensure_ascii=False)
    flat.encode("utf-8")  # no half of a pair
    assert not re.search("[\x00-\x08\x0b\x0e-\x1f]|" + r"\\u00[01]", flat)


# Feedback


def test_the_page_says_score_exercises_tests_sentences_cells_output_and_conditions():
    cells = [{"cell": 5, "first_line": "x = 1/0", "error": "ZeroDivisionError: division by zero"}]
    page = Page(report.feedback(result(cells=cells, output="loss 0.5\nloss 0.4", isolation="none")))
    assert page.open == []
    assert page.inside("strong") == ["4.5"]
    codes = page.inside("code")
    assert [codes.count(name) for name in ("perturb_zero_snr", "complete", "x0_weight")] == [2, 2, 2]
    points = [data for data in page.inside("td") if " / " in data]
    assert points == ["2 / 2", "2.5 / 4", "0 / 1", "1 / 1", "1 / 1", "1 / 1", "0 / 1.5", "1.5 / 1.5", "0 / 1"]
    marks = [attributes["class"] for tag, attributes in page.elements if attributes.get("class") in ("right", "wrong")]
    assert marks == [{"✓": "right", "✗": "wrong"}[mark] for mark in "✓✗✗✓✓✓✗✓✗"]
    assert page.inside("small") == ["hidden"] * 3
    assert "✗ SECRET: the variance at s = 0 is 0.25 and should be 0" in page.inside("p")
    assert [data.strip() for data in page.inside("pre")] == [
        "ZeroDivisionError: division by zero",
        "loss 0.5\nloss 0.4",
    ]
    assert all(part in page.text for part in ("x = 1/0", "none but the limits", "61 s", "13 s", "6 GB", "ab" * 32))
    targets = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert targets == {f"#{attributes['id']}" for _, attributes in page.elements if "id" in attributes}


def test_a_test_that_says_something_else_than_its_exercise_says_it_in_its_row():
    graded = exercise(
        tests=[a_test(score=0.0, message="✗ one"), a_test("odd shapes", 0.0, 1.0, True, "✗ two")], message="✗ one"
    )
    page = Page(report.feedback(result(exercises=[graded])))
    assert (page.inside("p").count("✗ one"), page.inside("td").count("✗ one")) == (1, 0)
    assert page.inside("td").count("✗ two") == 1
    assert "✓ SECRET shapes" not in Page(report.feedback(result())).text  # a right test has nothing to add


def test_the_page_of_a_broken_submission_says_the_problem_and_has_no_empty_part():
    page = Page(report.feedback(broken()))
    assert "the file is no notebook: it is empty" in page.text and page.inside("strong") == ["0"]
    assert page.inside("h2") == ["How it was graded"]
    assert "pre" not in {tag for tag, _ in page.elements}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_students_text_is_only_text_on_the_page(text):
    plain, page = (Page(report.feedback(hostile(words))) for words in ("plain words", text))
    assert page.elements == plain.elements and page.open == []
    report.feedback(hostile(text)).encode("utf-8")


def test_the_page_keeps_a_students_text():
    text = "</pre><script>$title &amp; \x1b[31m1 < 2\x1b[0m"
    page = Page(report.feedback(hostile(text)))
    assert page.inside("pre") == ["\n</pre><script>$title &amp; 1 < 2"] * 2
    assert Page(report.feedback(result("<b>&"))).inside("h1") == ["<b>&"]


def test_the_name_of_an_exercise_stays_in_its_attribute():
    page = Page(report.feedback(result(exercises=[exercise('a" onclick="x')])))
    (heading,) = [attributes for _, attributes in page.elements if "id" in attributes]
    assert heading == {"id": 'a" onclick="x'}


def test_the_page_loads_and_runs_nothing():
    text = report.feedback(result())
    page = Page(text)
    assert {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "form", "base", "object"} == set()
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy and "http" not in policy
    assert not re.search(r"https?:|url\(|@import", text)
    assert text.index("Content-Security-Policy") < text.index("<style")
    assert "prefers-color-scheme: dark" in text and "@media print" in text and 'name="viewport"' in text
