"""Every figure of the course, in one place: ``from dgm_course.viz import plots``, which also sets the style.

Each function returns the figure it drew, which a notebook shows exactly once, with or without a semicolon at the end of
the cell; ``animate`` shows its animation at once and returns nothing. Where a function takes ``ax``, it draws there and
opens no figure of its own (``panels`` makes several). Points are tensors (N, 2), images float tensors (B, 1, H, W) in
[−1, 1]; states and frames may be the generator that a sampler returns.
"""

from dgm_course.viz import style
from dgm_course.viz.animation import animate, apng
from dgm_course.viz.lines import curves
from dgm_course.viz.points import density, film_points, overlay, scatter, trajectories
from dgm_course.viz.style import panels
from dgm_course.viz.tiles import film, grid, rows

__all__ = [
    "animate",
    "apng",
    "curves",
    "density",
    "film",
    "film_points",
    "grid",
    "overlay",
    "panels",
    "rows",
    "scatter",
    "trajectories",
]

style.use()
