"""The lecture's chain: a Gaussian path on whole times."""

import torch
from torch import Tensor

from dgm_course.paths.base import GaussianPath, Time

__all__ = ["DiscretePath"]


class DiscretePath(GaussianPath):
    r"""The lecture's chain :math:`x_t = \sqrt{1-\beta_t}\,x_{t-1} + \sqrt{\beta_t}\,\epsilon_t` as a table over t = 0 … T.

    .. math:: \alpha(t) = \sqrt{\bar\alpha_t}, \qquad \sigma(t) = \sqrt{1-\bar\alpha_t},
              \qquad \bar\alpha_t = \prod_{t'=1}^{t}(1-\beta_{t'}), \quad \bar\alpha_0 = 1

    The table has T + 1 entries, so t − 1 always exists and no step is a special case.

    Arguments:
        betas: β_1 … β_T, each in (0, 1), the last also 1, shape (T,).

    Attributes:
        T: The number of steps.
        betas, alpha_bars: float64 tables of shape (T + 1,), with β_0 = 0 and ᾱ_0 = 1, so that `betas[t]` is β_t.

    Source:
        | Slide "Formulate the forward process with Markov Chain process"; Ho et al. (2020), eq. 2 and 4

    Example:
        >>> DiscretePath([0.1, 0.2]).alpha_bars.tolist()
        [1.0, 0.9, 0.72]
    """

    def __init__(self, betas):
        super().__init__()
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not len(betas):
            raise ValueError(f"betas must have shape (T,) with T ≥ 1; got shape {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(f"betas must lie in (0, 1]; got {betas.min().item():g} … {betas.max().item():g}")
        if bool((betas[:-1] == 1).any()):
            raise ValueError(
                "betas may be 1 in the last step only: after it no signal is left that a later step could lose"
            )
        self.T = self.horizon = len(betas)
        self.betas = torch.cat([betas.new_zeros(1), betas])
        self._log_alpha_bars = torch.log1p(-self.betas).cumsum(0)  # a sum of logs keeps 1 − ᾱ_t exact where it is small
        self.alpha_bars = self._log_alpha_bars.exp()

    def __repr__(self):
        return f"DiscretePath(T={self.T})"

    def _check_time(self, t: Tensor, name: str) -> None:
        if not bool(((t >= 0) & (t <= self.T) & (t == t.round())).all()):
            raise ValueError(f"{name} must be a whole number from 0 to T = {self.T}; got {t.unique().tolist()}")

    def _alpha(self, t: Tensor) -> Tensor:
        return (self._log_alpha_bars.to(t.device)[t.long()] / 2).exp()

    def _variance(self, t: Tensor) -> Tensor:
        return 0 - torch.expm1(self._log_alpha_bars.to(t.device)[t.long()])

    def _rates(self, t: Tensor):
        raise ValueError(_no_sde("velocity"))

    def times(self, steps: int) -> Tensor:
        """A grid for samplers: T = t_0 > … > t_steps = 0, as even as whole numbers allow, int64, shape (steps + 1,).

        Both ends are always visited, and no time twice.

        Example:
            >>> DiscretePath([0.1] * 10).times(4).tolist()
            [10, 8, 5, 2, 0]
        """
        if not (isinstance(steps, int) and 1 <= steps <= self.T):
            raise ValueError(f"steps must be a whole number from 1 to T = {self.T}; got {steps!r}")
        return torch.linspace(self.T, 0, steps + 1, dtype=torch.float64).round().long()

    def drift(self, t: Time) -> Tensor:
        raise ValueError(_no_sde("drift"))

    def diffusion2(self, t: Time) -> Tensor:
        raise ValueError(_no_sde("diffusion coefficient"))


def _no_sde(what: str) -> str:
    return f"a DiscretePath has no {what}: it lives at whole t only. Its limit for T → ∞ with β_t = β(t/T)/T is the SDE of VP"
