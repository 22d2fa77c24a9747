"""Sliders that move a figure: live where a kernel runs, from pictures drawn beforehand where none does."""

from __future__ import annotations

import base64
import html
import io
import traceback
from collections.abc import Callable, Sequence

import ipywidgets
import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dgm_course.viz import inputs, plots, style
from dgm_course.viz.tiles import spread

__all__ = ["explore"]

_FRAMES = 10  # pictures drawn beforehand: at 10 to 15 kB each, what a notebook of 2 MB can carry

# No script element and no id: the slider finds its pictures among its own neighbours, so two on a page cannot mix.
_MOVE = (
    "const frames=this.closest('div').querySelectorAll('img');"
    "frames.forEach((f,i)=>{f.style.display=i==this.value?'block':'none'});"
    "const now=frames[this.value].alt;this.setAttribute('aria-valuetext',now);"
    "this.parentNode.querySelector('output').textContent=now"
)


def explore(draw: Callable[..., Figure | Tensor], **choices: Sequence | tuple[Sequence, object]) -> None:
    """Show a figure at once, with a slider for each thing that the reader may move.

    With a kernel each move calls ``draw`` anew, and an error in it is shown in the place of the figure. On a page, or
    before the notebook is run, the first slider moves through at most 10 pictures drawn beforehand; the others stay
    where they start. So ``draw`` runs up to 11 times here: let it be quick.

    Arguments:
        draw: Called with a value for each name; returns a figure, or images (B, 1, H, W) in [−1, 1].
        choices: For each name the values to choose from, or (values, start); the start is the first value by default.

    Raises:
        ValueError: If there is nothing to choose, or a start is not among its values.
        TypeError: If ``draw`` returns neither.

    Example, in a notebook::

        widgets.explore(lambda t: plots.grid(noised(t)), t=([0.0, 0.25, 0.5, 1.0], 0.5))
    """
    if not callable(draw) or not choices:
        raise TypeError(f"explore needs a function and at least one name=values, not {draw!r} and {sorted(choices)}")
    options = {name: _options(name, given) for name, given in choices.items()}
    bundle = _live(draw, options)._repr_mimebundle_()
    fallback = {"text/html": _page(draw, options), "text/plain": f"explore({', '.join(options)})"}
    style.show_waiting()
    display({**bundle, **fallback}, raw=True)


def _options(name: str, given: Sequence | tuple[Sequence, object]) -> tuple[list, int]:
    """The values of a slider, and the index at which it starts."""
    pair = isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], (list, tuple, range, Tensor))
    values, start = given if pair else (given, None)
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    if not values:
        raise ValueError(f"{name} must have at least one value, not none")
    if start is not None and start not in values:
        raise ValueError(f"{name} must start at one of its values {values}, not at {start!r}")
    return values, 0 if start is None else values.index(start)


def _picture(draw: Callable, values: dict, dpi: int) -> bytes:
    """What draw returns, as a PNG; figures that it opened are closed, or the notebook would show them too."""
    before = plt.get_fignums()
    try:
        drawn = draw(**values)
        if isinstance(drawn, Tensor):
            drawn = plots.grid(drawn)
        if not isinstance(drawn, Figure):
            raise TypeError(f"draw must return a figure or images (B, 1, H, W), not {type(drawn).__name__}")
        return style.png(drawn, dpi)
    finally:
        for number in set(plt.get_fignums()) - set(before):
            plt.close(number)


def _live(draw: Callable, options: dict[str, tuple[list, int]]) -> ipywidgets.VBox:
    """Sliders, a place for an error, and the picture, which follows the sliders."""
    sliders = {
        name: ipywidgets.SelectionSlider(
            options=[(inputs.text(value), i) for i, value in enumerate(values)],
            value=start,
            description=name,
            continuous_update=False,
            style={"description_width": "initial"},
            layout={"width": "420px", "max_width": "100%"},
        )
        for name, (values, start) in options.items()
    }
    fault = ipywidgets.HTML()
    shown = ipywidgets.Image(format="png", layout={"max_width": "100%", "object_fit": "contain"})

    def update(_change: object = None) -> None:
        try:
            values = {name: options[name][0][slider.value] for name, slider in sliders.items()}
            shown.value = _picture(draw, values, 200)
            shown.width = str(Image.open(io.BytesIO(shown.value)).width // 2)
            shown.layout.display, fault.value = None, ""
        except Exception:  # whatever the reader's function does: shown, where otherwise a server's log would swallow it
            shown.layout.display, fault.value = "none", f"<pre>{html.escape(traceback.format_exc())}</pre>"

    for slider in sliders.values():
        slider.observe(update, names="value")
    update()
    return ipywidgets.VBox([*sliders.values(), fault, shown])


def _page(draw: Callable, options: dict[str, tuple[list, int]]) -> str:
    """The same without a kernel: a slider of HTML over pictures; the one at the start is seen even without a script."""
    (name, (values, start)), *others = options.items()
    rest = {other: those[at] for other, (those, at) in others}
    chosen = spread(len(values), _FRAMES) if len(values) > 1 else [0]
    if start not in chosen:  # in the place of its nearest neighbour
        chosen[min(range(1, len(chosen) - 1), key=lambda i: abs(chosen[i] - start))] = start
    pictures = []
    for i in chosen:
        code = base64.b64encode(_picture(draw, {name: values[i], **rest}, 100)).decode()
        look = f"display:{'block' if i == start else 'none'};max-width:100%"
        alt = html.escape(f"{name} = {inputs.text(values[i])}")
        pictures.append(f'<img alt="{alt}" style="{look}" src="data:image/png;base64,{code}">')
    now = html.escape(f"{name} = {inputs.text(values[start])}")
    fixed = "".join(f", {other} = {inputs.text(value)}" for other, value in rest.items())
    note = f"<small>{html.escape(fixed[2:])} (run the notebook to move the rest)</small>" if rest else ""
    return (
        f'<div style="font-family:sans-serif;max-width:720px"><label>{html.escape(name)} '
        f'<input type="range" min="0" max="{len(chosen) - 1}" value="{chosen.index(start)}" autocomplete="off" '
        f'style="width:300px;max-width:60%;vertical-align:middle" aria-valuetext="{now}" oninput="{_MOVE}"> '
        f"<output>{now}</output></label> {note}{''.join(pictures)}</div>"
    )
