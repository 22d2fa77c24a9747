"""The notebooks are complete and fresh; what executes, builds and shows them works, and fails where it should."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.testing import CliRunner

from dgm_course import cli, notebooks, pages

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
SOURCES = sorted((FOLDER / "src").glob("*.py"))
BUILT = sorted(FOLDER.glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"

each = pytest.mark.parametrize("path", BUILT, ids=lambda path: path.stem)


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


# The stored notebooks


def test_every_source_has_its_notebook_and_every_notebook_its_source():
    assert [path.stem for path in SOURCES] == [path.stem for path in BUILT]
    assert all(re.fullmatch(r"\d\d_\w+", path.stem) for path in SOURCES)


@each
def test_it_is_valid_and_not_stale(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert notebooks.stale(FOLDER / "src" / f"{path.stem}.py", path) == []


@each
def test_every_code_cell_was_run_in_order_and_none_failed(path):
    # nbval compares nothing in a cell without an execution count, so this is what makes its green mean something.
    ran = [cell for cell in code_cells(path) if cell.source.strip()]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
    for cell in ran:
        assert all(output.output_type != "error" for output in cell.outputs), cell.source


@each
def test_outputs_are_whole_and_hold_no_progress_bar(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.output_type != "stream" or output.name == "stdout", f"stderr is stored in: {cell.source}"
            data = output.get("data", {})
            assert WIDGET not in data or "text/html" in data, f"a live widget without a still, or a bar: {cell.source}"
            assert "truncated" not in str(output.get("text", "")).lower()


@each
def test_no_output_shows_the_address_of_an_object(path):
    for cell in code_cells(path):
        assert not re.search(r"\bat 0x[0-9a-f]{6,}", json.dumps(cell.outputs)), cell.source


@each
def test_it_weighs_at_most_two_megabytes(path):
    assert path.stat().st_size <= 2_000_000


@each
def test_no_code_cell_is_over_twenty_lines(path):
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= 20, cell.source


@each
def test_no_cell_is_exempt_from_comparison(path):
    for cell in code_cells(path):
        assert not re.search(r"^\s*#\s*(NBVAL|PYTEST_VALIDATE)_", cell.source, re.MULTILINE), cell.source
        assert not any(tag.startswith("nbval-") for tag in cell.metadata.get("tags", [])), cell.source


def test_the_set_up_cell_comes_first_and_is_the_same_in_all():
    first = {code_cells(path)[0].source for path in BUILT}
    assert len(first) <= 1, first
    for source in first:
        assert "find_spec" in source and re.search(r"install --quiet dgm-course\b", source)
        assert re.findall(r"^\s*(?:import|from) (\S+)", source, re.MULTILINE) == ["importlib.util"]


# Executing and building

SOURCE = r"""# %% [markdown]
# # A title
# See [the next](02_next.ipynb).

# %%
total = 1 + 1
print(total)
"""


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A small repository with one source, in a folder with a space; the current folder is in it."""
    root = tmp_path / "a course"
    (root / "notebooks" / "src").mkdir(parents=True)
    (root / "notebooks" / "src" / "01_one.py").write_text(SOURCE)
    monkeypatch.chdir(root)
    return root / "notebooks"


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def test_build_makes_the_same_notebook_twice_and_it_is_fresh(course):
    source = course / "src" / "01_one.py"
    target = notebooks.build(source, course)
    once = target.read_bytes()
    assert notebooks.build(source, course).read_bytes() == once
    assert notebooks.stale(source, target) == []
    (cell,) = code_cells(target)
    assert cell.outputs[0].text == "2\n" and cell.execution_count == 1
    assert list(course.glob("*.part")) == []


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("1 + 1", "1 + 2", "cell 2: the text"),
        ("# %% [markdown]", "# %%", "cell 1: the type"),
        ("\n# %%\n", '\n# %% tags=["raises-exception"]\n', "cell 2: the tags"),
        ("total = 1", "# %%\ntotal = 1", "3 cells, the notebook 2"),
    ],
)
def test_a_changed_source_makes_the_notebook_stale(course, old, new, what):
    source = course / "src" / "01_one.py"
    target = notebooks.build(source, course)
    source.write_text(SOURCE.replace(old, new))
    assert any(what in sentence for sentence in notebooks.stale(source, target))
    done = invoke("build", "--check")
    assert done.exit_code == 1 and "01_one is stale" in done.output


def test_a_changed_notebook_is_stale_unless_only_its_outputs_changed(course):
    source = course / "src" / "01_one.py"
    target = notebooks.build(source, course)
    notebook = nbformat.read(target, as_version=4)
    notebook.cells[1].outputs = []
    nbformat.write(notebook, target)
    assert notebooks.stale(source, target) == []
    notebook.cells[1].id = "other"
    nbformat.write(notebook, target)
    assert notebooks.stale(source, target) == ["cell 2: the id differs"]
    target.unlink()
    assert "does not exist" in notebooks.stale(source, target)[0]


def test_run_writes_pages_and_leaves_the_notebooks_alone(course):
    (course / "src" / "01_one.py").write_text(SOURCE + "open('litter.txt', 'w').close()\n")
    notebooks.build(course / "src" / "01_one.py", course)
    (course / "litter.txt").unlink()
    before = {path: path.read_bytes() for path in course.rglob("*") if path.is_file()}
    done = invoke("run")
    assert done.exit_code == 0, done.output
    assert "✓ 01_one" in done.output and "1 of 1 notebooks ran" in done.output and "index.html" in done.output
    assert {path: path.read_bytes() for path in course.rglob("*") if path.is_file()} == before
    assert "<title>A title</title>" in (course.parent / "build" / "01_one.html").read_text()
    assert 'href="01_one.html"' in (course.parent / "build" / "index.html").read_text()


def test_a_failing_notebook_names_its_cell_the_rest_goes_on_and_the_exit_code_is_1(course):
    write(course / "01_bad.ipynb", new_markdown_cell("# x"), new_code_cell("y = 1"), new_code_cell("y / 0  # here"))
    write(course / "02_good.ipynb", new_code_cell("1"))
    old = course.parent / "build" / "01_bad.html"
    old.parent.mkdir()
    old.write_text("<title>of a run that went well</title>")
    done = invoke("run")
    assert done.exit_code == 1
    assert "01_bad: cell 3 failed: y / 0  # here" in done.output and "ZeroDivisionError" in done.output
    assert "✓ 02_good" in done.output and "1 of 2 notebooks ran" in done.output
    assert not old.exists()


@pytest.mark.parametrize(
    ("code", "say"),
    [("while True: pass", "took longer than 2 s"), ("import os; os.abort()", "the kernel died")],
)
def test_an_endless_or_deadly_cell_is_named_too(tmp_path, code, say):
    path = write(tmp_path / "a.ipynb", new_code_cell(code))
    with pytest.raises(notebooks.NotebookError, match="a: cell 1 failed") as error:
        notebooks.execute(path, timeout=2)
    assert say in str(error.value)


def test_a_failing_build_leaves_the_old_notebook(course):
    source = course / "src" / "01_one.py"
    once = notebooks.build(source, course).read_bytes()
    source.write_text(SOURCE + "1 / 0\n")
    assert invoke("build").exit_code == 1
    assert (course / "01_one.ipynb").read_bytes() == once


def test_a_built_notebook_keeps_the_slider_that_needs_no_kernel(course):
    """Of a bundle with both, the live widget is left to who runs the cell; a widget alone stays, or nbval would miss it."""
    source = course / "src" / "01_one.py"
    source.write_text(
        "# %%\nimport ipywidgets\nipywidgets.IntSlider()\n"
        "# %%\ndisplay({'application/vnd.jupyter.widget-view+json': {}, 'text/html': '<p>', 'text/plain': 'x'}, raw=True)\n"
    )
    built = nbformat.read(notebooks.build(source, course), as_version=4)
    alone, both = (cell.outputs[0].data for cell in built.cells)
    assert notebooks.WIDGET in alone and notebooks.WIDGET not in both and both["text/html"] == "<p>"
    assert "widgets" not in built.metadata


def test_the_kernel_is_this_python(tmp_path):
    path = write(tmp_path / "a.ipynb", new_code_cell("import sys; print(sys.executable)"))
    assert notebooks.execute(path).cells[0].outputs[0].text.strip() == sys.executable


def test_nbval_compares_strictly_and_forgives_pictures_in_html(course):
    for file in ["pyproject.toml", "conftest.py", "tests/nbval.cfg"]:
        (course.parent / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, course.parent / file)
    picture = "import IPython, os; IPython.display.HTML(f'<img src=\"data:image/png;base64,{os.urandom(40).hex()}\">')"
    (course / "src" / "01_one.py").write_text(SOURCE + f"# %%\n{picture}\n")
    target = notebooks.build(course / "src" / "01_one.py", course)

    def nbval() -> str:
        command = [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", "notebooks"]
        return subprocess.run(command, cwd=course.parent, capture_output=True, text=True).stdout

    assert "2 passed" in nbval()
    target.write_text(target.read_text().replace('"2\\n"', '"3\\n"'))
    assert "1 failed, 1 passed" in nbval()


# Pages


class Loads(HTMLParser):
    """Collects whatever in a page makes a browser fetch something from elsewhere, and the links in it."""

    SOURCES = {"src", "srcset", "data", "poster", "background", "xlink:href"}

    def __init__(self, page: str):
        super().__init__()
        self.found, self.links, self.open, self.count = [], [], None, {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.open = tag
        self.count[tag] = self.count.get(tag, 0) + 1
        for key, value in attributes:
            value = value or ""
            local = value.startswith(("data:", "#"))
            if (key in self.SOURCES or key == "href" and tag in ("link", "image", "use", "base")) and not local:
                self.found.append((tag, value))
            if key == "style":
                self.style(value)
            if tag == "a" and key == "href":
                self.links.append(value)

    def handle_data(self, data):
        if self.open == "style":
            self.style(data)

    def style(self, css):
        self.found += re.findall(r"@import[^;]*|url\(\s*[\"']?(?!data:|#)[^)]*", css)

    def handle_endtag(self, tag):
        self.open = None


@pytest.mark.parametrize(
    "bad",
    [
        '<script src="https://a.example/x.js"></script>',
        '<script src="x.js"></script>',
        '<link rel="stylesheet" href="//a.example/x.css">',
        '<img src="http://a.example/x.png">',
        '<iframe src="https://a.example"></iframe>',
        "<style>@import 'https://a.example/x.css';</style>",
        "<style>a { background: url(https://a.example/x.png) }</style>",
        '<p style="background: url(http://a.example/x.png)">',
    ],
)
def test_the_search_for_loads_finds_them(bad):
    assert Loads(bad).found


def write(path: Path, *cells) -> Path:
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


STILL = base64.b64encode(b"a still picture").decode()


@pytest.fixture
def page(tmp_path):
    """The page of a made-up notebook that has everything a page must cope with."""
    (tmp_path / "local.png").write_bytes(b"a local picture")
    figure = {"image/png": base64.b64encode(b"a figure").decode(), "text/plain": "<Figure>"}
    remote = '<link href="https://a.example/x.css" rel="stylesheet"><script src="https://a.example/x.js"></script>'
    bundle = {WIDGET: {"model_id": "abc"}, "text/html": f'{remote}<img src="data:image/png;base64,{STILL}">'}
    bar = {WIDGET: {"model_id": "bar"}, "text/plain": "0%| | 0/7 [00:00<?]"}
    outputs = [new_output("display_data", data=data) for data in (figure, bundle, bar)]
    outputs.append(new_output("stream", name="stderr", text="\r 50%|#####     | 1/2 [00:00<00:00]\nbeware\n"))
    text = r"""# Formulas & more
Inline $a_t^2$, \\(b\\), money \$5 and \$6, `\$code`; [next](02_next.ipynb#part), [out](https://a.example/x.ipynb),
[homework](../homework/hw1.ipynb).
## Part $x$
$$\begin{aligned} x &= y \\ &< z \end{aligned}$$
![far](https://a.example/x.png) ![near](local.png)
### Detail
<details><summary>Hint</summary>

A $y$ of *its own*.

</details>"""
    notebook = new_notebook(cells=[new_markdown_cell(text), new_code_cell("plot('</script>')", outputs=outputs)])
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    return pages.write_page(notebook, tmp_path / "out" / "01_page.html", tmp_path).read_text()


def test_a_page_loads_nothing_and_forbids_it(page):
    assert Loads(page).found == []
    assert "default-src 'none'" in page
    assert "require.js" not in page and "widget-state+json" not in page and "mermaid" not in page.split("<script>")[0]


def test_a_page_brings_mathjax_whole_and_leaves_the_formulas_to_it(page):
    assert Loads(page).count["script"] == page.count("</script>") == 2
    engine = page.split("<script>")[2].split("</script>")[0]
    vendored = (ROOT / "dgm_course/assets/mathjax/tex-svg-full.js").read_text()
    assert engine.replace(r"<\!--", "<!--") == vendored
    for formula in ["$a_t^2$", "$b$", r"\begin{aligned} x &amp;= y \\ &amp;&lt; z \end{aligned}"]:
        assert formula in page
    assert "money <span>$</span>5 and <span>$</span>6" in page and r"<code>\$code</code>" in page


def test_a_script_cannot_end_early(tmp_path):
    (tmp_path / "x.js").write_text('a = "</script><!-- <script>"')
    assert pages.inline(tmp_path / "x.js") == r'a = "<\/script><\!-- <script>"'


def test_a_page_shows_the_still_and_no_live_widget_nor_progress(page):
    assert STILL in page and base64.b64encode(b"a figure").decode() in page and "beware" in page
    assert base64.b64encode(b"a local picture").decode() in page
    body = page.split("<main>")[1].split("</main>")[0]
    assert "widget-view" not in body and "0/7" not in body and "50%" not in body


def test_a_box_that_unfolds_keeps_its_text_inside(page):
    box = page.split("<details><summary>Hint</summary>")[1].split("</details>")[0]
    assert "A $y$ of <em>its own</em>." in box


def test_a_page_has_title_contents_and_links_to_pages(page):
    assert "<title>Formulas &amp; more</title>" in page
    links = Loads(page).links
    assert {"index.html", "02_next.html#part", "https://a.example/x.ipynb", "../homework/hw1.ipynb"} <= set(links)
    anchors = [link[1:] for link in links if link.startswith("#")]
    assert len(anchors) == 2 and all(f'id="{anchor}"' in page for anchor in anchors)
