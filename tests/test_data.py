"""The embedded images and texts are the ones that were shipped, and arrive as kernels want them."""

import hashlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import einops
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch

import dgm_course
from dgm_course import data
from dgm_course.data import cut

FILES = [(name, split) for name in ("mnist", "fashion_mnist") for split in ("train", "test")]
EACH = {"train": 1000, "test": 200}


def tiny(count: int, start: int = 0, classes: int = 10) -> datasets.Dataset:
    """Images of one grey level each, which is also their number, and labels that run through the classes."""
    levels = range(start, start + count)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(c) for c in range(classes)])}
    )
    images = [PIL.Image.fromarray(np.full((28, 28), level, np.uint8)) for level in levels]
    return datasets.Dataset.from_dict({"image": images, "label": [i % classes for i in levels]}, features=features)


@pytest.fixture
def source(tmp_path):
    """A folder of full sets, as `source` wants it; the full sets are tiny."""
    for number, (name, split) in enumerate(FILES):
        (tmp_path / name).mkdir(exist_ok=True)
        tiny(50, start=50 * number).to_parquet(str(tmp_path / name / f"{split}.parquet"))
    return tmp_path


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the embedded files, which a test may damage; `data` reads it."""
    for file in data.FOLDER.glob("*.*"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    return tmp_path


# The embedded cuts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split"), FILES)
def test_embedded_images(name, split):
    """Every pixel is the PNG's, read here without `datasets`; classes are balanced, types and range as asked."""
    table = pyarrow.parquet.read_table(data.FOLDER / f"{name}-{split}.parquet")
    pixels = np.stack([np.array(PIL.Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()])
    labels = table["label"].to_numpy()

    dataset = data.load(name, split)
    assert isinstance(dataset, datasets.Dataset)
    assert dataset.column_names == ["image", "label"]
    assert isinstance(dataset.features["image"], datasets.Image)
    assert isinstance(dataset.features["label"], datasets.ClassLabel)
    assert dataset[3]["image"].size == (28, 28)

    x, y = data.images(dataset)
    assert x.shape == (10 * EACH[split], 1, 28, 28) and x.dtype == torch.float32 and x.is_contiguous()
    assert y.shape == (10 * EACH[split],) and y.dtype == torch.int64
    assert x.min() == -1 and x.max() == 1
    np.testing.assert_allclose(x[:, 0].double().numpy(), pixels / 127.5 - 1, rtol=0, atol=1e-7)
    assert y.tolist() == labels.tolist()
    assert y.bincount().tolist() == [EACH[split]] * 10

    content = pixels.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()
    assert data.content_hash(x, y) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", [*(f"{name}-{split}.parquet" for name, split in FILES), "prose.txt", "code.txt"])
def test_embedded_files_have_the_listed_hashes(name):
    """`hashes.json` lists the SHA-256 sum of each file, and of no others."""
    listed = json.loads((data.FOLDER / "hashes.json").read_text())
    assert listed[name] == hashlib.sha256((data.FOLDER / name).read_bytes()).hexdigest()
    assert set(listed) == {file.name for kind in ("*.parquet", "*.txt") for file in data.FOLDER.glob(kind)}


def test_mnist_is_mnist():
    """The well-known first labels, mean and standard deviation of the training set."""
    x, y = data.images(data.load("mnist").select(range(2000)))
    assert y[:6].tolist() == [5, 0, 4, 1, 9, 2]
    assert ((x + 1) / 2).mean() == pytest.approx(0.1307, abs=0.004)
    assert ((x + 1) / 2).std() == pytest.approx(0.3081, abs=0.004)


def test_content_hash_sees_every_change():
    """One grey level or one label more is another hash; the format that holds the images is not in it."""
    x, y = data.images(tiny(20))
    before = data.content_hash(x, y)
    assert data.content_hash(x.double(), y.int()) == before
    brighter, other = x.clone(), y.clone()
    brighter[7, 0, 3, 3] += 2 / 255
    other[7] = 8
    assert len({before, data.content_hash(brighter, y), data.content_hash(x, other)}) == 3


def test_notice_names_sources_and_licences():
    """What the licences ask to be told is told, and so is the shuffled split."""
    notice = (data.FOLDER / "NOTICE.md").read_text(encoding="utf-8")
    for said in ("LeCun", "CC BY-SA 3.0", "Copyright © 2017 Zalando SE, https://tech.zalando.com", "hashes.json"):
        assert said in notice
    assert "Permission is hereby granted, free of charge" in notice and "not the original one" in notice


# Images -------------------------------------------------------------------------------------------------------------


def test_images_of_a_part():
    """A selection is taken in its own order, also after another format was set."""
    dataset = tiny(30).with_format("numpy").select([4, 29, 0])
    x, y = data.images(dataset)
    assert y.tolist() == [4, 9, 0]
    assert ((x[:, 0, 14, 14] + 1) * 127.5).round().tolist() == [4, 29, 0]
    assert dataset.format["type"] == "numpy"


def test_images_from_files(tmp_path):
    """A dataset that holds paths of files instead of their bytes, as `datasets` makes from a folder."""
    PIL.Image.fromarray(np.full((28, 28), 51, np.uint8)).save(tmp_path / "grey.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / "grey.png")], "label": [3]}, features=features)
    x, y = data.images(dataset)
    assert y.tolist() == [3]
    torch.testing.assert_close(x, torch.full((1, 1, 28, 28), -0.6))


# Other resolutions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 7, 14, 28])
@pytest.mark.parametrize("channels", [1, 3])
def test_smaller_images_are_means_over_squares(size, channels, generator):
    """By einops, and with it the same mean of the whole image; 28 is the image itself."""
    x = torch.randn(3, channels, 28, 28, generator=generator, dtype=torch.float64)
    small = data.resized(x, size)
    expected = einops.reduce(x, "b c (h p) (w q) -> b c h w", "mean", h=size, w=size)
    torch.testing.assert_close(small, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(small.mean((2, 3)), x.mean((2, 3)), rtol=1e-12, atol=1e-13)
    if size == 28:
        assert torch.equal(small, x)


@pytest.mark.parametrize("side, times", [(4, 2), (3, 3), (2, 4), (1, 5)])
def test_larger_images_are_bilinear(side, times, generator):
    """Each new pixel lies between the centres of four old ones, by loops; outside the last centres the edge goes on."""
    x = torch.randn(2, 1, side, side, generator=generator, dtype=torch.float64)
    large = data.resized(x, times * side)
    assert large.shape == (2, 1, times * side, times * side)

    def weights(k):
        place = min(max((k + 0.5) / times - 0.5, 0.0), side - 1.0)  # of a new centre, counted in old ones
        low = min(int(place), max(side - 2, 0))
        return [(low, 1 - place + low), (min(low + 1, side - 1), place - low)]

    for i in range(times * side):
        for j in range(times * side):
            value = sum(p * q * x[:, 0, r, c] for r, p in weights(i) for c, q in weights(j))
            torch.testing.assert_close(large[:, 0, i, j], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [14, 28, 56])
def test_resized_images_keep_type_and_range(size):
    """Digits stay float32 in [−1, 1], and an even image is even at every size."""
    x, _ = data.images(data.load("mnist", "test").select(range(5)))
    other = data.resized(x, size)
    assert other.shape == (5, 1, size, size) and other.dtype == torch.float32
    assert -1 <= other.min() and other.max() <= 1
    torch.testing.assert_close(
        data.resized(torch.full((1, 1, 28, 28), -0.3), size), torch.full((1, 1, size, size), -0.3)
    )


def test_down_undoes_copying_pixels(generator):
    """Means over squares of copies are the pixels."""
    x = torch.randn(2, 1, 14, 14, generator=generator, dtype=torch.float64)
    copies = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(data.resized(copies, 14), x, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("size", [0, -28, 3, 27, 29, 42])
def test_resized_checks_the_size(size):
    """Neither a divisor nor a multiple: the error says what came and what is asked."""
    with pytest.raises(ValueError, match=f"^size must be a divisor or a multiple of 28; got {size}"):
        data.resized(torch.zeros(1, 1, 28, 28), size)


# Texts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", data.TEXTS)
def test_text(name):
    """The file's bytes as whole numbers: the first nine tenths to train on, the rest to test on, nothing twice and nothing left out."""
    content = (data.FOLDER / f"{name}.txt").read_bytes()
    train, test = data.text(name), data.text(name, "test")
    assert train.dtype == test.dtype == torch.int64 and train.ndim == test.ndim == 1
    assert train.tolist() == list(content[: len(content) * 9 // 10]) and train.tolist() + test.tolist() == list(content)
    assert len(content) > 100_000 and content.decode().isprintable() is False
    assert torch.equal(data.text(name, "train"), train)


def test_prose_and_code_are_what_they_are_called():
    """Code parses up to where it was cut; prose is sentences, without displayed formulas."""
    prose, code = (
        bytes(torch.cat([data.text(name), data.text(name, "test")]).tolist()).decode() for name in data.TEXTS
    )
    assert "$$" not in prose and prose.count(". ") > 1000 and "import torch" not in prose[:1000]
    assert code.count("\n") > 1000 and "import torch" in code and len(code.encode()) <= 120_000


# Sources ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "name", "split"), [(n, *file) for n, file in enumerate(FILES)])
def test_source_folder(number, name, split, source):
    """The set comes from the folder, whole and in its order."""
    for folder in (source, str(source)):
        x, y = data.images(data.load(name, split, source=folder))
        assert ((x[:, 0, 0, 0] + 1) * 127.5).round().tolist() == list(range(50 * number, 50 * number + 50))
        assert y.tolist() == [i % 10 for i in range(50)]


def test_source_hub_asks_for_the_right_set(monkeypatch):
    """The full sets are asked for by their names on the hub; no network is touched here."""
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or "full set")
    assert data.load("mnist", "test", source="hub") == "full set"
    assert data.load("fashion_mnist", source="hub") == "full set"
    assert asked == [
        (("ylecun/mnist",), {"split": "test"}),
        (("zalando-datasets/fashion_mnist",), {"split": "train"}),
    ]


def test_no_source_asks_no_network(monkeypatch):
    """Neither the embedded cut nor a folder goes through `load_dataset`."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("the hub was asked"))
    assert len(data.load("mnist", "test")) == 2000


def test_source_folder_without_the_file(source):
    """The error names the file that is not there."""
    file = source / "mnist" / "test.parquet"
    file.unlink()
    with pytest.raises(FileNotFoundError, match="source") as failure:
        data.load("mnist", "test", source=source)
    assert str(file) in str(failure.value)


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", lambda content: b"no parquet"])
def test_source_folder_with_a_damaged_file(damage, source):
    """The error names the file that is no parquet file."""
    file = source / "mnist" / "test.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="is no parquet file") as failure:
        data.load("mnist", "test", source=source)
    assert str(file) in str(failure.value)


def test_source_folder_with_other_columns(source):
    """The error names the file and the columns that it should have; further columns do no harm."""
    file = source / "mnist" / "test.parquet"
    tiny(5).add_column("number", list(range(5))).to_parquet(str(file))
    assert data.load("mnist", "test", source=source).column_names == ["image", "label"]
    tiny(5).rename_column("label", "digit").to_parquet(str(file))
    with pytest.raises(ValueError, match="columns image and label") as failure:
        data.load("mnist", "test", source=source)
    assert str(file) in str(failure.value)


@pytest.mark.parametrize("name", ["MNIST", "cifar10", "", None])
def test_unknown_name(name):
    """The error names what came and what there is."""
    with pytest.raises(ValueError, match=f"name must be one of mnist, fashion_mnist; got {name!r}"):
        data.load(name)


@pytest.mark.parametrize("name", ["Prose", "mnist", "", None])
def test_unknown_text(name):
    """The error names what came and what there is."""
    with pytest.raises(ValueError, match=f"^name must be one of prose, code; got {name!r}"):
        data.text(name)


@pytest.mark.parametrize("split", ["validation", "Train", "", None])
def test_unknown_split(split):
    """The error names what came and what there is."""
    for read, name in ((data.load, "mnist"), (data.text, "prose")):
        with pytest.raises(ValueError, match=f"^split must be one of train, test; got {split!r}"):
            read(name, split)


# Damage -------------------------------------------------------------------------------------------------------------


FLIPPED = [lambda content, place=place: flipped(content, place) for place in (0.001, 0.5, 0.999)]
READERS = {"mnist-test.parquet": lambda: data.load("mnist", "test"), "prose.txt": lambda: data.text("prose", "test")}
all_readers = pytest.mark.parametrize(("name", "read"), READERS.items(), ids=READERS)


def flipped(content: bytes, place: float) -> bytes:
    """The content with one bit of the byte at a place, counted from 0 to 1, turned over."""
    content = bytearray(content)
    content[int(place * len(content))] ^= 1
    return bytes(content)


@all_readers
@pytest.mark.parametrize("damage", [*FLIPPED, lambda content: content[:-1]], ids=["begin", "middle", "end", "cut off"])
def test_damage_is_noticed(damage, name, read, copy):
    """One flipped bit, or one byte less: the error names the file, and only that file is refused."""
    file = copy / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="is damaged.*reinstall") as failure:
        read()
    assert str(file) in str(failure.value)
    assert len(data.load("fashion_mnist", "test")) == 2000 and len(data.text("code", "test")) > 0


@all_readers
def test_missing_file_is_noticed(name, read, copy):
    """The error names the file."""
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match="is missing.*reinstall") as failure:
        read()
    assert str(copy / name) in str(failure.value)


# What loading leaves behind -----------------------------------------------------------------------------------------


def test_loading_is_silent_and_leaves_no_files(tmp_path):
    """No progress bar on a notebook's error stream, and no cache in the user's home."""
    code = "from dgm_course import data; data.images(data.load('mnist', 'test').select(range(100, 400, 2)))"
    hidden = {"TQDM_DISABLE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"}  # a user has none of them
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(dgm_course.__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


# How the cuts were made ---------------------------------------------------------------------------------------------


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """An empty folder in place of the embedded files, with the hash of another's file."""
    embedded = tmp_path / "embedded"
    embedded.mkdir()
    (embedded / "hashes.json").write_text('{"other": "1"}')
    for module in (data, cut):
        monkeypatch.setattr(module, "FOLDER", embedded)
    return embedded


def test_cut_takes_the_first_of_each_class_in_order(source, embedded, monkeypatch):
    """The files that it writes are what `load` then finds, and their hashes fit; other files keep theirs."""
    monkeypatch.setattr(cut, "PER_CLASS", {"train": 2, "test": 1})
    mixed = tiny(50).select(np.random.default_rng(0).permutation(50))
    mixed.to_parquet(str(source / "mnist" / "train.parquet"))
    cut.cut(source)

    labels = mixed["label"][:]
    expected = [i for i in range(50) if labels[:i].count(labels[i]) < 2]  # fewer than two of its class came before
    x, y = data.images(data.load("mnist", "train"))
    assert len(x) == 20
    assert torch.equal(x, data.images(mixed)[0][expected])
    assert y.tolist() == [labels[i] for i in expected]
    assert len(data.load("fashion_mnist", "test")) == 10
    assert json.loads((embedded / "hashes.json").read_text())["other"] == "1"


def notebook(*cells: str | list[str]) -> str:
    """A notebook as JSON: cells that begin with "#" or "$" or are a list are prose, the others code."""
    kinds = ["markdown" if isinstance(cell, list) or cell[0] in "#$" else "code" for cell in cells]
    return json.dumps({"cells": [{"cell_type": kind, "source": cell} for kind, cell in zip(kinds, cells, strict=True)]})


NOTEBOOKS = {
    "02_b.ipynb": notebook("# Later: größer.\n", "z = 1"),
    "01_a.ipynb": notebook(
        ["# A title\n", "One: $x$ stays.\n", "$$y =\n", "z$$\n", "Two.\n", "$$x$$\n", "Three."],
        "import sys\n",
        "print(sys.path)",
        "# Said once.",
        "import sys",
        "# Said once.\n",
    ),
    "notes.txt": "not read",
}


def test_cut_of_texts(tmp_path, embedded):
    """Cells in order of the notebooks, each once; prose without displayed formulas, their place a break; hashes fit, others stay."""
    sources = tmp_path / "notebooks"
    sources.mkdir()
    for name, content in NOTEBOOKS.items():
        (sources / name).write_text(content, encoding="utf-8")
    cut.cut_text(str(sources))
    texts = {name: (embedded / f"{name}.txt").read_text(encoding="utf-8") for name in data.TEXTS}
    assert texts == {
        "prose": "# A title\nOne: $x$ stays.\n\nTwo.\n\nThree.\n\n# Said once.\n\n# Later: größer.",
        "code": "import sys\n\nprint(sys.path)\n\nz = 1",
    }
    assert bytes(data.text("code").tolist()).decode() == texts["code"][:30]  # of 34; and the hash fits
    listed = json.loads((embedded / "hashes.json").read_text())
    assert sorted(listed) == ["code.txt", "other", "prose.txt"] and listed["other"] == "1"


def test_code_is_cut_at_a_whole_character(tmp_path, embedded):
    """At most 120,000 bytes of code, and no half of a character at the end; prose has no such end."""
    (tmp_path / "01_a.ipynb").write_text(notebook("#" + "é" * 70_000, "a = '" + "é" * 70_000), encoding="utf-8")
    cut.cut_text(str(tmp_path))
    assert (embedded / "code.txt").read_text(encoding="utf-8") == "a = '" + "é" * 59_997
    assert (embedded / "prose.txt").read_text(encoding="utf-8") == "#" + "é" * 70_000


def test_cut_from_the_command_line(source, tmp_path, embedded, monkeypatch):
    """A folder cuts images, "text" and a folder texts; without a folder, or with another word, it says how it is called."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cut", *map(str, arguments)])
        monkeypatch.delitem(sys.modules, "dgm_course.data.cut", raising=False)
        runpy.run_module("dgm_course.data.cut", run_name="__main__")

    for arguments in ((), ("pictures", source), ("text", source, "more")):
        with pytest.raises(SystemExit, match="^usage: .*FOLDER.*text NOTEBOOKS"):
            run(*arguments)
    assert [file.name for file in embedded.iterdir()] == ["hashes.json"]
    (source / "01_a.ipynb").write_text(notebook("a = 1"))
    run("text", source)
    assert (embedded / "code.txt").read_text() == "a = 1" and (embedded / "prose.txt").read_text() == ""
    run(source)
    assert len(data.load("mnist")) == 50 and len(json.loads((embedded / "hashes.json").read_text())) == 7
