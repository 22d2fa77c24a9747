r"""Denoisers: functions (x_t, t) → x̂_0. The only place that knows what a network predicts is :class:`Denoiser`."""

from collections.abc import Callable

from torch import Tensor, nn

from dgm_course.paths.base import QUANTITIES, GaussianPath, Time

__all__ = ["Denoiser", "clipped"]


class Denoiser(nn.Module):
    r"""A network and its path, read as the estimate :math:`\hat x_0(x_t, t) \approx \mathbb E[x_0 \mid x_t]`.

    Arguments:
        net: A module (x_t, t, **cond) → output of the shape of x_t (twice the channels with `learned_variance`).
            It sees t as `path.unit(t)`, float32 of shape (B,).
        path: The Gaussian path on which it was, or will be, trained.
        predicts: What its output stands for: "eps", "x0", "v", "score" or "velocity".
        learned_variance: Whether the second half of the output's channels interpolates the reverse variance.

    Raises:
        ValueError: If `predicts` is unknown; on a call, if the shapes do not fit, or the output does not determine x̂_0
            (noise predicted where α = 0).

    Source:
        | Slide "we can further parameterize the model to predict the noise instead"; Salimans & Ho (2022), section 4

    Example:
        >>> import torch
        >>> from dgm_course.paths import Straight
        >>> d = Denoiser(lambda xt, t: torch.zeros_like(xt), Straight(), predicts="eps")
        >>> d(torch.ones(1, 2), 0.5)
        tensor([[2., 2.]])
    """

    def __init__(self, net: Callable, path: GaussianPath, predicts: str = "eps", learned_variance: bool = False):
        super().__init__()
        if predicts not in QUANTITIES:
            raise ValueError(f"predicts must be one of {', '.join(QUANTITIES)}; got {predicts!r}")
        if not isinstance(path, GaussianPath):
            raise TypeError(f"path must be a GaussianPath; got {type(path).__name__}")
        self.net, self.path, self.predicts, self.learned_variance = net, path, predicts, learned_variance

    def output(self, xt: Tensor, t: Time, **cond) -> Tensor:
        """What the network says, in its own units: the quantity that `predicts` names, of the shape of `xt`."""
        return self._split(xt, t, **cond)[0]

    def forward(self, xt: Tensor, t: Time, **cond) -> Tensor:
        return self.path.convert(self.output(xt, t, **cond), xt, t, given=self.predicts, to="x0")

    def with_variance(self, xt: Tensor, t: Time, **cond) -> tuple[Tensor, Tensor]:
        r"""x̂_0, and the fraction w of :math:`\log\Sigma_\theta = w\log\beta_t + (1-w)\log\tilde\beta_t`, both of the shape of `xt`.

        Raises:
            ValueError: If the network was not declared with `learned_variance=True`.
        """
        if not self.learned_variance:
            raise ValueError("with_variance needs a Denoiser built with learned_variance=True")
        output, fraction = self._split(xt, t, **cond)
        return self.path.convert(output, xt, t, given=self.predicts, to="x0"), (fraction + 1) / 2

    def _split(self, xt: Tensor, t: Time, **cond) -> tuple[Tensor, Tensor | None]:
        output = self.net(xt, self.path.units(t, xt.shape[0], xt.device), **cond)
        shape = (len(xt), 2 * xt.shape[1], *xt.shape[2:]) if self.learned_variance else xt.shape
        if output.shape != shape:
            raise ValueError(
                f"net must return shape {tuple(shape)} for xt of shape {tuple(xt.shape)}; got {tuple(output.shape)}"
            )
        return output.chunk(2, dim=1) if self.learned_variance else (output, None)


def clipped(d: Callable, low: float = -1.0, high: float = 1.0) -> Callable:
    """The same denoiser with x̂_0 held in [low, high], the range of images. Put it on last, outside guidance.

    Samplers work out ε̂ from the x̂_0 they are given, so that the two stay consistent after clipping.

    Raises:
        ValueError: If low ≥ high.

    Example:
        >>> import torch
        >>> clipped(lambda xt, t: 3 * xt)(torch.tensor([[0.1, 2.0]]), 0.5)
        tensor([[0.3000, 1.0000]])
    """
    if not low < high:
        raise ValueError(f"low must be less than high; got {low} and {high}")
    return lambda xt, t, **cond: d(xt, t, **cond).clamp(low, high)
