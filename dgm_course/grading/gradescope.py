"""The grader as a Gradescope autograder: the zip to upload, and what runs inside it.

`python -m dgm_course.grading.gradescope ROOT HOMEWORK` grades ROOT/submission and writes ROOT/results/results.json.
"""

import json
import secrets
import sys
import zipfile
from pathlib import Path

from dgm_course.grading import report, run, submission
from dgm_course.grading.exercise import load
from dgm_course.grading.grade import HiddenTests, Limits

__all__ = ["bundle", "main"]

ASSETS = Path(__file__).parents[1] / "assets" / "gradescope"


def bundle(root: Path, homework: str, target: Path) -> Path:
    """Write the autograder zip: set-up, runner, the package, and the hidden tests of one homework.

    Arguments:
        root: The course's repository.
        homework: Such as "hw3".
        target: The .zip file.

    Raises:
        ValueError: If there are no hidden tests of that homework.
    """
    tests = root / "tests" / "hidden" / f"{homework}.py"
    load(tests)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("setup.sh", "run_autograder"):
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            entry.external_attr = 0o100755 << 16  # may be executed
            file.writestr(entry, (ASSETS / name).read_text(encoding="utf-8").replace("@homework@", homework))
        file.write(tests, f"hidden/{homework}.py")
        for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
            file.write(root / name, name)
        for path in sorted((root / "dgm_course").rglob("*")):
            name = path.relative_to(root)
            if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in name.parts):
                file.write(path, name)
    part.replace(target)
    return target


def main(root: Path, homework: str) -> None:
    """Grade the submission of one student in Gradescope's layout; the container is the sandbox where there is no other."""
    file = root / "source" / "hidden" / f"{homework}.py"
    tests = HiddenTests(homework, file.read_text(encoding="utf-8"), secrets.randbelow(2**31))
    handed_in = submission.find([root / "submission"])
    if len(handed_in) > 1:
        handed_in = [one for one in handed_in if Path(one.file).name.startswith(homework) and one.problem is None]
    if len(handed_in) == 1:
        result = report.gradescope(run.one(handed_in[0], tests, Limits(), trust=True))
    else:
        result = {"score": 0, "output": f"Hand in one notebook, with its name as it was given ({homework}_….ipynb)."}
    report.write_atomically(root / "results" / "results.json", json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
