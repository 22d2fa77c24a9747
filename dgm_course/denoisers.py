r"""Denoisers: functions (x_t, t) → x̂_0. The only place that knows what a network predicts is :class:`Denoiser`."""

from collections.abc import Callable

from torch import Tensor, nn

from dgm_course.paths.base import QUANTITIES, GaussianPath, Time, expand

__all__ = ["Denoiser", "clipped", "on_path", "read_as", "with_fraction"]


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
        return self.outputs(xt, t, **cond)[0]

    def forward(self, xt: Tensor, t: Time, **cond) -> Tensor:
        return self.path.convert(self.output(xt, t, **cond), xt, t, given=self.predicts, to="x0")

    def with_variance(self, xt: Tensor, t: Time, **cond) -> tuple[Tensor, Tensor]:
        r"""x̂_0, and the fraction v of :math:`\log\Sigma_\theta = v\log\beta_t + (1-v)\log\tilde\beta_t`, both of the shape of `xt`.

        Raises:
            ValueError: If the network was not declared with `learned_variance=True`.
        """
        if not self.learned_variance:
            raise ValueError("with_variance needs a Denoiser built with learned_variance=True")
        output, fraction = self.outputs(xt, t, **cond)
        return self.path.convert(output, xt, t, given=self.predicts, to="x0"), fraction

    def outputs(self, xt: Tensor, t: Time, **cond) -> tuple[Tensor, Tensor | None]:
        """All that the network says: `output`, and the fraction of the log-variance, None unless it is learned."""
        output = self.net(xt, self.path.units(t, xt.shape[0], xt.device), **cond)
        shape = (len(xt), 2 * xt.shape[1], *xt.shape[2:]) if self.learned_variance else xt.shape
        if output.shape != shape:
            raise ValueError(
                f"net must return shape {tuple(shape)} for xt of shape {tuple(xt.shape)}; got {tuple(output.shape)}"
            )
        if not self.learned_variance:
            return output, None
        output, fraction = output.chunk(2, dim=1)
        return output, (fraction + 1) / 2  # −1 and 1 stand for β̃ and β


def clipped(d: Callable, low: float = -1.0, high: float = 1.0) -> Callable:
    """The same denoiser with x̂_0 held in [low, high], the range of images. Put it on last, outside guidance.

    Samplers work out ε̂ from the x̂_0 they are given, so that the two stay consistent after clipping. Of a pair (x̂_0, fraction), as
    `Denoiser.with_variance` gives, the first is held.

    Raises:
        ValueError: If low ≥ high.

    Example:
        >>> import torch
        >>> clipped(lambda xt, t: 3 * xt)(torch.tensor([[0.1, 2.0]]), 0.5)
        tensor([[0.3000, 1.0000]])
    """
    if not low < high:
        raise ValueError(f"low must be less than high; got {low} and {high}")

    def held(xt: Tensor, t: Time, **cond):
        out = d(xt, t, **cond)
        return (out[0].clamp(low, high), *out[1:]) if isinstance(out, tuple) else out.clamp(low, high)

    return held


def with_fraction(d: Callable, xt: Tensor, t: Time) -> tuple[Tensor, Tensor]:
    """The pair (x̂_0, fraction of the log-variance) of a denoiser that says both; raises a TypeError if it does not."""
    out = d(xt, t)
    if not (isinstance(out, tuple) and len(out) == 2):
        asked = "(x̂_0, fraction), as Denoiser.with_variance does, for variance = 'learned'"
        raise TypeError(f"the denoiser must return {asked}; got {type(out).__name__}")
    return out


def read_as(quantity: str, d: Callable, path: GaussianPath) -> Callable:
    r"""A denoiser read as another quantity: its score, its ε̂, its v, or the velocity of the probability-flow ODE.

    .. math:: \hat s = (\alpha\hat x_0 - x_t)/\sigma^2, \qquad \dot x_t = \alpha'\hat x_0 + \sigma'\hat\epsilon

    The velocity is the drift of the ODE :math:`dx = [f x - \tfrac12 g^2\hat s]\,dt`: one thing in two units.

    Arguments:
        quantity: "eps", "v", "score" or "velocity".
        d: A denoiser (x_t, t) → x̂_0.
        path: The Gaussian path.

    Returns:
        A function (x_t, t) → the quantity, of the shape of x_t.

    Raises:
        ValueError: If the quantity is unknown; on a call, where x_t and x̂_0 do not determine it (σ = 0).

    Source:
        | Score-Based Generative Modeling through SDEs (Song et al., 2021), eq. 13

    Example:
        >>> import torch
        >>> from dgm_course.paths import Straight
        >>> read_as("velocity", lambda xt, t: torch.zeros_like(xt), Straight())(torch.ones(1), 0.5).item()
        2.0
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity must be one of {', '.join(QUANTITIES)}; got {quantity!r}")
    return lambda xt, t, **cond: path.convert(d(xt, t, **cond), xt, t, given="x0", to=quantity)


def on_path(d: Callable, trained: GaussianPath, path: GaussianPath) -> Callable:
    r"""A denoiser of one path as a denoiser of another: what it needs to know is the signal-to-noise ratio alone.

    With the time :math:`\tau` at which its own path has the same ratio, both states are the same mixture in another size:

    .. math:: \hat x_0(x_t, t) = \hat x_0^{trained}(c\,x_t, \tau), \qquad
              c^2 = \frac{\alpha_{trained}^2(\tau) + \sigma_{trained}^2(\tau)}{\alpha^2(t) + \sigma^2(t)}

    Arguments:
        d: A denoiser (x_t, t) → x̂_0 on `trained`.
        trained: Its path, continuous.
        path: The path on which it is to be used.

    Returns:
        A denoiser on `path`.

    Raises:
        ValueError: On a call, if `trained` does not reach the ratio.

    Source:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), section 2 and appendix B

    Example:
        >>> import torch
        >>> from dgm_course.paths import VE, VP
        >>> d = on_path(lambda xt, t: xt, VP(), VE())  # at t = 1 of VE the noise is 50 times as large
        >>> round(d(torch.full((1, 1), 50.0), 1.0).item(), 2)
        1.0
    """

    def moved(xt: Tensor, t: Time, **cond) -> Tensor:
        tau = trained.time_at(path.logsnr(t))
        size = (trained.alpha(tau) ** 2 + trained.sigma(tau) ** 2) / (path.alpha(t) ** 2 + path.sigma(t) ** 2)
        return d(expand(size.sqrt(), xt) * xt, tau, **cond)

    return moved
