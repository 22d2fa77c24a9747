"""A table comes back as it was written or not at all, and each shipped one is what its recipe asks for."""

import itertools
import json
import math
import os
import shlex
from pathlib import Path

import pytest

from dgm_course import recipes, tables

TABLE = {
    "what": "größer − kleiner",
    "rows": [{"seed": 0, "loss": 0.1}, {"seed": 1, "loss": 1e-17}],
    "vary": {"seed": [0, 1]},
}


def test_round_trip(tmp_path):
    """What was written, in readable UTF-8, with every digit and in the same order; folders are made; the new one counts."""
    file = tmp_path / "new" / "folder" / "tiny.json"
    tables.write(file, {"old": True})
    tables.write(file, TABLE)
    assert tables.read(file) == TABLE and list(tables.read(file)) == list(TABLE)
    text = file.read_text(encoding="utf-8")
    assert "größer − kleiner" in text and text.endswith("}\n") and json.loads(text) == TABLE
    assert [path.name for path in file.parent.iterdir()] == ["tiny.json"]


def test_nothing_is_written_in_place(tmp_path, monkeypatch):
    """The content goes to another file beside, which is moved when it is whole."""
    moved, replace = [], os.replace

    def record(source, target):
        moved.append((Path(source), Path(target), tables.read(Path(source))))
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    tables.write(tmp_path / "tiny.json", TABLE)
    ((source, target, content),) = moved
    assert source != target == tmp_path / "tiny.json" and source.parent == target.parent and content == TABLE


@pytest.mark.parametrize("there", [False, True])
def test_a_crash_while_writing_leaves_no_half_file(there, tmp_path, monkeypatch):
    """Half of a file is written when the disk is full: the old table is there still, or none, and the next write works."""
    file, write = tmp_path / "tiny.json", Path.write_text
    if there:
        tables.write(file, {"old": True})

    def crash(self, content, **options):
        write(self, content[: len(content) // 2], **options)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", crash)
        with pytest.raises(OSError, match="no space"):
            tables.write(file, TABLE)
    assert tables.read(file) == {"old": True} if there else not file.exists()
    tables.write(file, TABLE)
    assert tables.read(file) == TABLE and [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_what_json_cannot_hold_leaves_the_old_table(tmp_path):
    """The error comes before the old file is touched."""
    tables.write(tmp_path / "tiny.json", TABLE)
    with pytest.raises(TypeError):
        tables.write(tmp_path / "tiny.json", {"rows": object()})
    assert tables.read(tmp_path / "tiny.json") == TABLE


def test_names_and_load(tmp_path, monkeypatch):
    """Each table in the folder is a name, in order; other files, and halves of tables, are none."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    assert tables.names() == []
    for name in ("b-table", "a-table"):
        tables.write(tmp_path / f"{name}.json", {"name": name})
    (tmp_path / "c-table.json.part").write_text("{")
    (tmp_path / "notes.txt").write_text("x")
    assert tables.names() == ["a-table", "b-table"]
    assert tables.load("b-table") == {"name": "b-table"}


@pytest.mark.parametrize("name", ["tinny", "", "tiny.json", "../tables/tiny", None])
def test_unknown_name(name, tmp_path, monkeypatch):
    """The error names what came and what there is."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    for known in ("tiny", "other"):
        tables.write(tmp_path / f"{known}.json", TABLE)
    with pytest.raises(ValueError, match=f"^name must be one of other, tiny; got {name!r}"):
        tables.load(name)


# The shipped tables -------------------------------------------------------------------------------------------------


def test_every_file_in_the_folder_is_a_table():
    """What is shipped is what is listed, and no half-written file is among it."""
    files = {path.name for path in tables.FOLDER.iterdir() if path.name not in ("__init__.py", "__pycache__")}
    assert files == {f"{name}.json" for name in tables.names()}


@pytest.mark.parametrize("name", tables.names())
def test_shipped_table_is_what_its_recipe_asks_for(name):
    """It says what it is and where it was measured, and its recipe is one that there is, with the same settings."""
    table = tables.load(name)
    for key, kind in {"what": str, "recipe": str, "machine": str, "rows": list, "images": int}.items():
        assert isinstance(table[key], kind) and table[key], key
    assert len(table["data_sha256"]) == 64 and int(table["data_sha256"], 16) >= 0
    command = shlex.split(table["recipe"])
    assert command[:3] == ["dgm-course", "train", name] and name in recipes.names()
    recipe = json.loads(json.dumps(recipes.RECIPES[name]))
    assert {key: table[key] for key in recipe} == recipe and "vary" in recipe


@pytest.mark.parametrize("name", tables.names())
def test_shipped_table_is_complete(name):
    """Each combination of what varies has one row, in order; rows of a kind have the same numbers, all of them finite."""
    table = tables.load(name)
    rows, vary = table["rows"], table["vary"]
    assert [tuple(row[key] for key in vary) for row in rows] == list(itertools.product(*vary.values()))
    for row in rows:
        alike = next(one for one in rows if one.get("kind") == row.get("kind"))
        assert row.keys() == alike.keys() and len(row) > len(vary)
        numbers = [value for key, value in row.items() if key not in vary]
        flat = [x for value in numbers for x in (value if isinstance(value, list) else [value])]
        assert flat and all(isinstance(x, int | float) and math.isfinite(x) for x in flat)
