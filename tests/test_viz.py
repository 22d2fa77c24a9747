"""The figures: what they accept, that a notebook shows each once, that animations move and sliders draw."""

import io
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from dgm_course.viz import inputs, plots, style, tiles, widgets


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture
def images():
    return torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def points():
    return torch.randn(200, 2, generator=torch.Generator().manual_seed(0))


def bowl(x):
    return -(x**2).sum(1) / 2


def every_figure(images, points):
    walk = [points * scale for scale in (1.0, 0.5, 0.1)]
    yield plots.grid(images, labels=range(12), title="noise")
    yield plots.rows([images[:3], images[:5]], ["three", "five"])
    yield plots.film([images, images / 2, images * 0], times=[1.0, 0.5, 0.0], labels="abcd".split() * 4)
    yield plots.density(bowl, resolution=20)
    yield plots.scatter(points, labels=torch.arange(200) % 3)
    yield plots.overlay(points, points + 1)
    yield plots.overlay(points[:, 0], points[:50, 1])
    yield plots.film_points(walk, times=["start", "middle", "end"], labels=torch.arange(200) % 3)
    yield plots.trajectories(walk)
    yield plots.trajectories([x[:, 0] for x in walk], times=[1.0, 0.5, 0.0])
    yield plots.curves(
        torch.arange(1, 5), {"one": torch.rand(4), "many": torch.rand(3, 4)}, "n", "y", logx=True, logy=True
    )


def test_every_figure_is_labelled_small_and_the_same_each_time(images, points):
    torch.manual_seed(0)
    first = [style.png(figure) for figure in every_figure(images, points)]
    plt.close("all")
    torch.manual_seed(0)
    figures = list(every_figure(images, points))
    assert [style.png(figure) for figure in figures] == first
    assert max(map(len, first)) < 60_000
    for figure in figures:
        assert figure.alt
        for ax in figure.axes:
            assert not ax.axison or not ax.get_subplotspec().is_first_col() or (ax.get_xlabel() and ax.get_ylabel())


def test_tiles_are_drawn_pixel_for_pixel():
    checks = (torch.arange(28)[:, None] + torch.arange(28)) % 2 * 2.0 - 1
    figure = plots.grid(checks.expand(6, 1, 28, 28), labels=["a long label"] * 6, title="checks")
    drawn = np.asarray(Image.open(io.BytesIO(style.png(figure))).convert("L"))
    line = drawn[-40]
    lengths = np.diff(np.flatnonzero(np.diff(line.astype(int))))
    assert set(line) == {0, 255}  # a blurred pixel would be grey
    assert (lengths == 4).sum() > 6 * 24  # each pixel of an image is four wide


def test_mosaic_puts_every_image_in_its_place():
    row = np.stack([np.full((2, 3, 1), value) for value in (0.1, 0.2)])
    sheet = tiles.mosaic([row, row[:1]], across=1, down=2)
    assert sheet.shape == (6, 7, 1)
    assert (sheet[:2, :3] == 0.1).all() and (sheet[:2, 4:] == 0.2).all() and (sheet[4:, :3] == 0.1).all()
    assert (sheet[2:4] == 1).all() and (sheet[4:, 3:] == 1).all()


def test_a_colour_of_the_palette_survives_the_small_file():
    made = style.figure(1, 1)
    made.patch.set_facecolor(style.DATA)
    assert Image.open(io.BytesIO(style.png(made))).convert("RGB").getpixel((9, 9)) == (0x00, 0x72, 0xB2)


def test_what_is_given_axes_opens_no_figure_and_keeps_the_title(points):
    figure, (left, right) = plots.panels(2)
    assert plots.density(bowl, ax=left, resolution=9, title="both") is figure
    assert plots.scatter(points, ax=left) is figure and left.get_title() == "both"
    assert left.get_xlim() == (-4, 4)  # the points lie on the density, they do not stretch it
    plots.trajectories([points, points / 2], ax=right)
    plots.curves(torch.arange(3), {"a": torch.arange(3)}, "x", "y", ax=right)
    assert plt.get_fignums() == [figure.number]


def test_names_at_the_ends_of_lines_do_not_touch():
    x = torch.linspace(0, 1, 20)
    figure = plots.curves(x, {f"power {k}": x**k for k in range(1, 6)}, "x", "y")
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 5 and all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))
    order = sorted(figure.axes[0].texts, key=lambda text: -text.get_position()[1])
    assert [text.get_text() for text in order] == [f"power {k}" for k in range(1, 6)]


def test_states_may_come_from_a_generator(images):
    assert plots.film(images * s for s in (1.0, 0.5)).alt == "film of 4 samples"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plots.grid(torch.zeros(1, 28, 28)), "images must have the shape (B, 1, H, W), not (1, 28, 28)"),
        (lambda: plots.grid(torch.full((1, 1, 2, 2), torch.nan)), "4 pixels"),
        (lambda: plots.grid(torch.zeros(3, 1, 2, 2), labels=[1, 2]), "labels must have 3 entries"),
        (lambda: plots.grid(torch.zeros(3, 1, 2, 2), columns=0), "columns"),
        (lambda: plots.rows([]), "batches"),
        (lambda: plots.rows([torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3)]), "(3, 3, 1)"),
        (lambda: plots.film([torch.zeros(1, 1, 2, 2)] * 2, times=[1, 0.5, 0]), "times must have 2 entries"),
        (lambda: plots.film([]), "states"),
        (lambda: plots.density(lambda x: x), "(25600, 2)"),
        (lambda: plots.density(bowl, extent=(1, -1, 0, 1)), "extent"),
        (lambda: plots.scatter(torch.zeros(4, 3)), "points must have the shape (N, 2), not (4, 3)"),
        (lambda: plots.overlay(torch.zeros(4), torch.zeros(4, 2)), "same dimension"),
        (lambda: plots.trajectories([torch.zeros(4, 2)]), "at least two"),
        (lambda: plots.curves(torch.zeros(3), {"a": torch.zeros(4)}, "x", "y"), "lines['a']"),
        (lambda: plots.apng([torch.zeros(4, 2)]), "at least two frames"),
        (lambda: plots.apng([torch.zeros(4, 2), torch.zeros(4, 2)], seconds=0), "seconds"),
        (lambda: widgets.explore(bowl, t=[]), "t must have at least one value"),
        (lambda: widgets.explore(bowl, t=([1, 2], 3)), "t must start at one of its values"),
    ],
)
def test_bad_input_is_named_and_leaves_no_figure_behind(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)
    assert not plt.get_fignums()


def test_bad_types_are_named():
    with pytest.raises(TypeError, match="images must be a float tensor.*uint8"):
        plots.grid(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(TypeError, match="points must be a tensor or numbers, not str"):
        plots.scatter("points")
    with pytest.raises(TypeError, match="draw must return a figure"):
        widgets.explore(lambda t: "text", t=[1, 2])
    with pytest.raises(TypeError, match="name=values"):
        widgets.explore(bowl)


def test_numbers_are_written_short():
    assert [inputs.text(value) for value in (0.12345, 1000.0, 7, torch.tensor(0.5), "x")] == [
        "0.123",
        "1000",
        "7",
        "0.5",
        "x",
    ]


@pytest.mark.parametrize("kind", ["images", "points", "pictures"])
def test_an_animation_moves_loops_and_rests(kind, images, points):
    fade = torch.linspace(0, 1, 50)
    frames = {
        "images": [images * s for s in fade],
        "points": [points * s for s in fade],
        "pictures": [Image.linear_gradient("L").rotate(7 * i) for i in range(50)],
    }[kind]
    small = plots.apng(frames, times=fade, seconds=3)
    assert len(small) < 400_000 and small == plots.apng(frames, times=fade, seconds=3)
    movie = Image.open(io.BytesIO(small))
    assert movie.is_animated and movie.n_frames == 30 and movie.info["loop"] == 0
    pixels, durations = [], []
    for i in range(movie.n_frames):
        movie.seek(i)
        pixels.append(movie.convert("RGB").tobytes())
        durations.append(movie.info["duration"])
    assert len(set(pixels)) > 15 and durations == [100] * 29 + [1100]


def test_a_slider_draws_anew_and_shows_errors(points):
    seen = []

    def draw(t, w):
        seen.append((t, w))
        if w == 2:
            raise RuntimeError("w is <two>")
        return plots.scatter(points * t + w)

    box = widgets._live(draw, {"t": ([0.1, 0.5, 1.0], 1), "w": ([0, 1, 2], 0)})
    slide_t, slide_w, fault, shown = box.children
    start = bytes(shown.value)
    assert seen == [(0.5, 0)] and start.startswith(b"\x89PNG") and not plt.get_fignums()
    slide_t.value = 2
    assert seen[-1] == (1.0, 0) and shown.value != start
    slide_w.value = 2
    assert "RuntimeError: w is &lt;two&gt;" in fault.value and shown.layout.display == "none"
    slide_w.value, slide_t.value = 0, 1
    assert fault.value == "" and shown.layout.display is None and shown.value == start


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_page_holds_its_pictures_and_shows_the_start(images):
    text = widgets._page(lambda n, k: images[:n], {"n": (list(range(1, 41)), 17), "k": (["a<b"], 0)})
    page = Page(text)
    pictures, (slider,) = page.all("img"), page.all("input")
    assert len(pictures) == 10 and int(slider["max"]) == 9
    visible = [picture["alt"] for picture in pictures if "block" in picture["style"]]
    assert visible == ["n = 18"] == [pictures[int(slider["value"])]["alt"]]
    assert [p["alt"] for p in pictures] == sorted([p["alt"] for p in pictures], key=lambda alt: int(alt[4:]))
    assert "a&lt;b" in text and "http" not in text and " id=" not in text
    assert all(picture["src"].startswith("data:image/png;base64,") for picture in pictures)


@pytest.mark.parametrize("values", [[1], [1, 2], [1, 2, 3]])
@pytest.mark.parametrize("at", [0, -1])
def test_a_page_works_for_few_values(values, at, images):
    page = Page(widgets._page(lambda n: images[:n], {"n": (values, at % len(values))}))
    assert len(page.all("img")) == len(values) and page.all("input")[0]["aria-valuetext"] == f"n = {values[at]}"


CELLS = {
    "semicolon": "plots.grid(x);",
    "value": "plots.grid(x)",
    "name": "figure = plots.scatter(p)",
    "again": "figure",
    "two": "plots.scatter(p)\nplots.overlay(p, p);",
    "two and value": "plots.scatter(p)\nplots.overlay(p, p)",
    "figure, then animation": "plots.scatter(p)\nplots.animate([x, x / 2])",
    "panels": "figure, (a, b) = plots.panels(2)\nplots.scatter(p, ax=a)\nplots.scatter(p, ax=b);",
    "animate": "plots.animate([x, x / 2])",
    "quiet": "plots.animate([p, p / 2]);",
    "explore": "widgets.explore(lambda n: x[:n], n=([1, 2, 4], 2));",
    "error": "plots.grid(p)",
}


@pytest.fixture(scope="module")
def notebook():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    begin = "import torch\nfrom dgm_course.viz import plots, widgets\nx, p = torch.zeros(4, 1, 8, 8), torch.eye(2)"
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (begin, *CELLS.values())])
    nbclient.NotebookClient(made, timeout=120, kernel_name="python3", allow_errors=True).execute()
    return dict(zip(("begin", *CELLS), made.cells, strict=True))


def test_a_notebook_shows_every_figure_once(notebook):
    shown = {name: [output.get("data", {}) for output in cell.outputs] for name, cell in notebook.items()}
    pairs = ["two", "two and value", "figure, then animation"]
    expected = dict.fromkeys(shown, 1) | {"begin": 0} | dict.fromkeys(pairs, 2)
    assert {name: len(outputs) for name, outputs in shown.items()} == expected
    texts = {name: outputs[0].get("text/plain") for name, outputs in shown.items() if outputs}
    assert texts["semicolon"] == texts["value"] == "<Figure size 260x62 with 1 Axes>"
    assert texts["name"] == texts["again"] == "<Figure size 420x400 with 1 Axes>"
    assert texts["panels"] == "<Figure size 560x360 with 2 Axes>"
    assert {name: texts[name] for name in pairs} == dict.fromkeys(pairs, texts["name"])  # in the order of the calls
    assert texts["animate"] == texts["quiet"] == "<IPython.core.display.Image object>"
    for name in set(CELLS) - {"explore", "error"}:
        assert "image/png" in shown[name][0] and notebook[name].outputs[0].metadata["image/png"]["alt"]
    assert notebook["error"].outputs[0].ename == "ValueError"  # and no empty figure below it


def test_a_notebook_holds_slider_and_page_in_one_output(notebook):
    (output,) = notebook["explore"].outputs
    assert set(output.data) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    assert output.data["text/plain"] == "explore(n)"
    assert len(Page(output.data["text/html"]).all("img")) == 3


def test_the_package_alone_loads_no_matplotlib():
    code = "import sys, dgm_course.viz; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
