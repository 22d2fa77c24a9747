r"""Gaussian paths from data to noise: :math:`x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon`.

One idea carries the course. A path states α and σ; the posterior, the SDE and the conversions between what networks
predict follow from these two functions, so they are written once, in :class:`GaussianPath`.
"""

from dgm_course.paths.base import GaussianPath
from dgm_course.paths.continuous import VE, VP, Cosine, Scaled, Sigmoid, Straight, SubVP
from dgm_course.paths.discrete import DiscretePath

__all__ = ["VE", "VP", "Cosine", "DiscretePath", "GaussianPath", "Scaled", "Sigmoid", "Straight", "SubVP"]
