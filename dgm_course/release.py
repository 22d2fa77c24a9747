"""What students get: notebooks and stubs with a badge and a stamped set-up cell, and the package."""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path, PurePosixPath

__all__ = ["write"]

FILES = ("README.md", "LICENSE", "pyproject.toml", "environment.yml")
FOLDERS = ("notebooks", "homework", "dgm_course")
JUNK = {"__pycache__", ".ipynb_checkpoints"}

SET_UP = """\
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")"""

# Where there is no network, DGM_COURSE holds the path of a wheel, or any other requirement.
STAMPED = """\
import importlib.util
import os

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    course = os.environ.get("DGM_COURSE", "dgm-course @ git+https://github.com/{repo}@{tag}")
    get_ipython().run_line_magic("pip", f'install --quiet "{{course}}"')"""

COLAB = "https://colab.research.google.com"
BADGE = "[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{repo}/blob/{tag}/{name})"


def write(root: Path, repo: str, tag: str, out: Path) -> list[str]:
    """Write the students' tree of the course in `root` to `out`, whole or not at all.

    No solution, no hidden test and nothing else that only instructors need is in it.

    Arguments:
        root: The repository of the course. If it is a git checkout, only what git tracks is taken, as it is in the folder now.
        repo: The students' repository on GitHub, OWNER/NAME.
        tag: The tag, or branch, of it that badges and set-up cells name.
        out: The folder to make; it must not exist, or be empty.

    Returns:
        The files written, relative to `out`.

    Raises:
        ValueError: If `repo`, `tag` or `out` is not like that, a file is missing or untracked, or cannot be stamped.
    """
    check_names(repo, tag)
    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out must be a folder that is empty or does not exist; got {out}")
    names = members(root)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        tree = Path(folder) / out.name
        for name in names:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, tree / name)
            if name.endswith(".ipynb"):
                rewrite(tree / name, stamp(read(tree / name), name, repo, tag))
        rewrite(tree / "README.md", for_students(read(tree / "README.md")))
        rewrite(tree / "environment.yml", for_reading(read(tree / "environment.yml")))
        if out.exists():
            out.rmdir()
        tree.rename(out)
    return names


def check_names(repo: str, tag: str) -> None:
    """Refuse what GitHub or git would not take; what passes needs no quoting in a URL, a shell or Python."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9_.-]*[A-Za-z0-9_-]", repo):
        raise ValueError(f"repo must be OWNER/NAME, as GitHub spells it; got {repo!r}")
    plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./-]*", tag)
    if not plain or re.search(r"\.\.|//|/\.|[./]$|\.lock(/|$)", tag):
        raise ValueError(f"tag must be a git ref of letters, digits and . _ - / such as v1.0; got {tag!r}")


def members(root: Path) -> list[str]:
    """The files of the release, relative to `root`, with slashes.

    Raises:
        ValueError: If one is missing, or git does not track it.
    """
    if (root / ".git").exists():
        names, loose = git_files(root), git_files(root, "--others", "--exclude-standard")
        if loose := [name for name in loose if belongs(name)]:
            raise ValueError(f"git must track all of the release; `git add` or remove first: {', '.join(loose)}")
    else:  # an export
        found = (file for folder in FOLDERS for file in (root / folder).rglob("*"))
        names = [*FILES, *(file.relative_to(root).as_posix() for file in found)]
    names = sorted(name for name in names if belongs(name) and (root / name).is_file())
    if missing := [name for name in FILES if name not in names]:
        raise ValueError(f"root must hold {', '.join(missing)}, tracked by git; got {root}")
    return names


def git_files(root: Path, *options: str) -> list[str]:
    """What `git ls-files` says."""
    done = subprocess.run(["git", "ls-files", "-z", *options], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git does not list the files of {root}: {done.stderr.strip()}")
    return done.stdout.split("\0")[:-1]


def belongs(name: str) -> bool:
    """Whether a file is for students."""
    top, *rest = PurePosixPath(name).parts
    if top == "dgm_course":
        return JUNK.isdisjoint(rest)
    return name in FILES or (top in FOLDERS and len(rest) == 1 and name.endswith(".ipynb"))


def stamp(text: str, name: str, repo: str, tag: str) -> str:
    """A notebook with a badge above it and its set-up cell stamped; everything else is as it was."""
    notebook = json.loads(text)
    code = next((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), {"source": ""})
    if "".join(code["source"]) != SET_UP:
        raise ValueError(f"{name} must have the set-up cell as its first code cell; got {''.join(code['source'])!r}")
    code["source"] = STAMPED.format(repo=repo, tag=tag).splitlines(keepends=True)
    badge = BADGE.format(colab=COLAB, repo=repo, tag=tag, name=name)
    notebook["cells"].insert(0, {"cell_type": "markdown", "id": "badge", "metadata": {}, "source": [badge]})
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def for_students(readme: str) -> str:
    """The README without what stands between `<!-- instructors -->` and `<!-- /instructors -->`."""
    pieces = re.split(r"<!--\s*(/?)\s*instructors\s*-->\n*", readme, flags=re.IGNORECASE)
    marks = pieces[1::2]
    if marks != ["", "/"] * (len(marks) // 2):
        raise ValueError("README.md must close each <!-- instructors --> with one <!-- /instructors -->")
    return "".join(pieces[::4])


def for_reading(environment: str) -> str:
    """The conda door with JupyterLab, which runs notebooks, in place of the tools that develop the course."""
    if environment.count(".[dev]") != 1:
        raise ValueError(f"environment.yml must install .[dev] once; got {environment.count('.[dev]')} times")
    return environment.replace(".[dev]", ".[lab]")


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def rewrite(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
