"""A submission as it comes in: which files there are, whose they are, and what cells are in them. Nothing of it is run here."""

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Submission", "cells", "find"]

LARGEST = 50 * 2**20  # bytes of a notebook; one with all its pictures has two million
LONGEST = 120  # bytes of a student's name: with a number and an ending it must fit into a file name, 255


@dataclass(frozen=True)
class Submission:
    """One student's notebook.

    Arguments:
        student: A name that is safe for files, unique in a run.
        file: The path as it was found, for people.
        content: The bytes of the notebook; empty where there is a problem.
        problem: Why there is no content, or None.
    """

    student: str
    file: str
    content: bytes
    problem: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content or (self.problem or "").encode()).hexdigest()


def find(places: list[Path]) -> list[Submission]:
    """All submissions in the files and folders, each under a student's name.

    A notebook that lies in a folder of its own is named after that folder, others by their path. A file that is no notebook
    and a folder without one are submissions too: ones with a problem.

    Raises:
        FileNotFoundError: If a place does not exist.
    """
    found = []
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"SUBMISSIONS must be files or folders; there is no {place}")
        if place.is_dir():
            for child in sorted(place.iterdir()):
                found += inside(child, place)
        else:
            found.append((place.stem, place))
    taken: set[str] = set()
    return [take(unique(safe(name), taken), file) for name, file in found]


def inside(child: Path, top: Path) -> list[tuple[str, Path]]:
    """The submissions in one entry of a folder, as names and files."""
    if not visible(Path(child.name)):
        return []
    if child.is_symlink() or not child.is_dir():
        return [(child.stem, child)]
    notebooks = sorted(
        file for file in child.rglob("*.ipynb") if visible(file.relative_to(child)) and not file.is_dir()
    )
    if len(notebooks) > 1:
        return [("_".join(file.relative_to(top).with_suffix("").parts), file) for file in notebooks]
    return [(child.name, notebooks[0] if notebooks else child)]


def visible(file: Path) -> bool:
    """Whether no part of a path is hidden, and none is what macOS adds to archives."""
    return not any(part.startswith((".", "__MACOSX")) for part in file.parts)


def safe(name: str) -> str:
    """A name that a file can have anywhere: letters, digits, and - _ . inside; accents are written in one way."""
    name = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", name)).strip("._-")
    return name.encode()[:LONGEST].decode(errors="ignore").rstrip("._-") or "unnamed"


def unique(name: str, taken: set[str]) -> str:
    """The name, with a number if it is taken already; upper and lower case count as the same, as on some disks."""
    number, chosen = 1, name
    while chosen.casefold() in taken:
        number += 1
        chosen = f"{name}-{number}"
    taken.add(chosen.casefold())
    return chosen


def take(student: str, file: Path) -> Submission:
    """Read a submission's bytes, or say what is wrong with it."""
    try:
        problem = fault(file)
        return Submission(student, str(file), b"" if problem else file.read_bytes(), problem)
    except OSError as error:
        return Submission(student, str(file), b"", f"it cannot be read: {error.strerror}")


def fault(file: Path) -> str | None:
    """Why a file is not even opened, or None."""
    if file.is_symlink():
        return "it is a link, not a file"
    if file.is_dir():
        return "there is no notebook (.ipynb) in it"
    if file.suffix != ".ipynb":
        ending = repr(file.suffix[:20]) if file.suffix else "nothing"  # a name may hold anything
        return f"it is no notebook: its name ends in {ending}, not in .ipynb"
    if not file.is_file():
        return "it is no ordinary file"
    size = file.stat().st_size
    return f"it has {size / 2**20:.0f} MB; at most {LARGEST // 2**20} are read" if size > LARGEST else None


def cells(content: bytes) -> list[str]:
    """The sources of the code cells of a notebook.

    Raises:
        ValueError: If it is no notebook of version 4; the message fits after "the file is no notebook that can be read: ".
    """
    if not content.strip():
        raise ValueError("it is empty")
    try:
        notebook = json.loads(content.decode("utf-8-sig"))
        sources = [cell.get("source", "") for cell in notebook["cells"] if cell.get("cell_type") == "code"]
        return ["".join(source) for source in sources]
    except UnicodeDecodeError:
        raise ValueError("it is no text in UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON is broken in line {error.lineno}: {error.msg}") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise ValueError("it has no list of cells as notebooks of version 4 have") from None
