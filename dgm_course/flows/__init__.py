r"""Normalizing flows: invertible transforms that know how they change volume, and the exact density that they give.

A flow carries noise to data, :math:`x = f_K \circ \dots \circ f_1(z)`. **One convention for every sign:** each direction of a
transform returns its result and the log-determinant of *the map that it computes itself*,

.. math:: \texttt{forward}: z \mapsto \bigl(x, \log|\det \partial x/\partial z|\bigr), \qquad
          \texttt{inverse}: x \mapsto \bigl(z, \log|\det \partial z/\partial x|\bigr),

so that at one point the two sum to 0, and log p(x) is log π₀(z), the density of the noise, plus what `inverse` returns.
"""

from dgm_course.flows.flow import Flow, RealNVP, coupling_flow
from dgm_course.flows.images import (
    Logit,
    Split,
    Squeeze,
    channel_mask,
    checkerboard,
    dequantize,
    quantize,
    squeeze,
    unsqueeze,
)
from dgm_course.flows.transforms import (
    ActNorm,
    Composed,
    Coupling,
    InvertibleConv,
    Permutation,
    Planar,
    Transform,
    affine,
    affine_inverse,
)

__all__ = [
    "ActNorm",
    "Composed",
    "Coupling",
    "Flow",
    "InvertibleConv",
    "Logit",
    "Permutation",
    "Planar",
    "RealNVP",
    "Split",
    "Squeeze",
    "Transform",
    "affine",
    "affine_inverse",
    "channel_mask",
    "checkerboard",
    "coupling_flow",
    "dequantize",
    "quantize",
    "squeeze",
    "unsqueeze",
]
