"""Measurements that take longer than a notebook may: shipped as tables, each with the recipe that wrote it."""

import json
import os
from pathlib import Path

__all__ = ["load", "names", "read", "write"]

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of the shipped tables.

    Example:
        >>> "mnist-predictions" in names()
        True
    """
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def load(name: str) -> dict:
    """A shipped table: what was measured, the recipe with all its settings, the machine, and the `rows`.

    Raises:
        ValueError: If there is no such table.

    Example:
        >>> load("mnist-predictions")["recipe"]
        'dgm-course train mnist-predictions'
    """
    if name not in names():
        raise ValueError(f"name must be one of {', '.join(names())}; got {name!r}")
    return read(FOLDER / f"{name}.json")


def read(file: Path) -> dict:
    """A table from a file."""
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, table: dict) -> None:
    """Write a table to a file beside, then rename: a crash leaves the old one or the new one, never half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, file)
