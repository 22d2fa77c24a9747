"""What every Gaussian path has: derived once, from α and σ."""

import torch
from torch import Tensor

__all__ = ["GaussianPath", "Time", "expand", "same_shape"]

Time = float | Tensor
QUANTITIES = ("eps", "x0", "v", "score", "velocity")


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Cast a float64 coefficient of shape () or (B,) to the dtype of `like`, ready to multiply its (B, …)."""
    coefficient = coefficient.to(device=like.device, dtype=like.dtype)
    if not coefficient.ndim:
        return coefficient
    one_each(coefficient, len(like))
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))


def one_each(t: Tensor, batch: int) -> None:
    """Raise unless `t` is one number for all samples or one for each of them."""
    if t.ndim and t.shape[0] not in (1, batch):
        raise ValueError(f"t must be a number or have shape ({batch},), one for each sample; got {tuple(t.shape)}")


def same_shape(**tensors: Tensor) -> None:
    """Raise unless all the named tensors have the first one's shape and are of floating type."""
    (first, reference), *_ = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(
                f"{name} must be a floating-point tensor; got {getattr(tensor, 'dtype', type(tensor).__name__)}"
            )
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} must have the shape of {first}, {tuple(reference.shape)}; got {tuple(tensor.shape)}"
            )


class GaussianPath:
    r"""A path :math:`x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon` with t ∈ [0, 1], data at 0 and noise at 1.

    A subclass states `_alpha` and one of `_sigma` and `_variance`, as functions of a float64 tensor; the rest is derived.
    Schedules are evaluated in float64 and cast to the data's dtype last, because 1 − α² loses its digits in float32.

    Source:
        | Variational Diffusion Models (Kingma et al., 2021), section 3.1
    """

    horizon = 1.0  # the time of pure noise; T on a chain

    def __init__(self):
        self._grid, self._units, self._conversions = None, {}, {}  # see `tabulate`

    # What a subclass states ------------------------------------------------------------------------------------------

    def _alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _sigma(self, t: Tensor) -> Tensor:
        return self._variance(t).sqrt()

    def _variance(self, t: Tensor) -> Tensor:
        return self._sigma(t) ** 2

    def __repr__(self):
        settings = ", ".join(f"{k}={v}" for k, v in vars(self).items() if isinstance(v, (int, float)))
        return f"{type(self).__name__}({settings})"

    # Times -----------------------------------------------------------------------------------------------------------

    def _time(self, t: Time, name: str = "t") -> Tensor:
        """`t` as a float64 tensor of shape () or (B,), checked."""
        if isinstance(t, Tensor):
            t = t.detach()
            t = t.cpu().double() if t.device.type == "mps" else t.double()  # Apple's GPUs have no float64
        elif isinstance(t, (int, float)):
            t = torch.tensor(t, dtype=torch.float64)
        else:
            raise TypeError(f"{name} must be a number or a tensor; got {type(t).__name__}")
        if t.ndim > 1:
            raise ValueError(f"{name} must be a number or a tensor of shape (B,); got shape {tuple(t.shape)}")
        self._check_time(t, name)
        return t

    def _check_time(self, t: Tensor, name: str) -> None:
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"{name} must lie in [0, 1]; got {t.unique().tolist()}")

    def unit(self, t: Time) -> Tensor:
        """The time that a network sees: float32 in [0, 1], of the shape of `t`."""
        return (self._time(t) / self.horizon).float()

    def times(self, steps: int) -> Tensor:
        """A grid for samplers: `steps` equal steps down from pure noise to the data, shape (steps + 1,), float64.

        Example:
            >>> from dgm_course.paths import Cosine
            >>> Cosine().times(4).tolist()
            [1.0, 0.75, 0.5, 0.25, 0.0]
        """
        if not (isinstance(steps, int) and steps >= 1):
            raise ValueError(f"steps must be a whole number of at least 1; got {steps!r}")
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def tabulate(self, times: Tensor) -> Tensor:
        """Announce a grid, so that what a step needs at these times is worked out for all of them at once.

        A sampler calls this. It changes no result: at other times everything is evaluated when it is asked for.
        Returns the checked times in float64.
        """
        self._grid = self._time(times, "times")
        self._units = dict(zip(self._grid.tolist(), (self._grid / self.horizon).float().unbind(), strict=True))
        self._conversions = {}
        return self._grid

    def units(self, t: Time, batch: int, device: torch.device) -> Tensor:
        """`unit(t)` for each sample of a batch, shape (batch,)."""
        known = self._units.get(t)  # a tensor t is never found: it is hashed by identity
        if known is not None:
            return known.to(device).expand(batch)
        unit = self.unit(t).to(device)
        one_each(unit, batch)
        return unit.expand(batch)

    # The path and its SDE --------------------------------------------------------------------------------------------

    def alpha(self, t: Time) -> Tensor:
        r"""The data's coefficient α(t), float64, of the shape of `t`. On the lecture's chain it is :math:`\sqrt{\bar\alpha_t}`."""
        return self._alpha(self._time(t))

    def sigma(self, t: Time) -> Tensor:
        r"""The noise's standard deviation σ(t), float64. On the lecture's chain it is :math:`\sqrt{1-\bar\alpha_t}`."""
        return self._sigma(self._time(t))

    def logsnr(self, t: Time) -> Tensor:
        r"""The log signal-to-noise ratio :math:`\log(\alpha^2/\sigma^2)`; ±inf where σ or α is 0. DPM-Solver's λ is half of it."""
        return self._logsnr(self._time(t))

    def _logsnr(self, t: Tensor) -> Tensor:
        return 2 * self._alpha(t).log() - self._variance(t).log()

    def time_at(self, logsnr: Time) -> Tensor:
        r"""The time at which the log-SNR has this value: the inverse of `logsnr`, found by bisection.

        Arguments:
            logsnr: A number or a tensor of any shape; −∞ and ∞ where the path reaches them.

        Returns:
            Times in [0, 1], float64, of the same shape.

        Raises:
            ValueError: If the path does not reach such a value, or has whole times only.

        Source:
            | Variational Diffusion Models (Kingma et al., 2021), section 5.1: the log-SNR is the natural clock of a path

        Example:
            >>> from dgm_course.paths import Straight
            >>> Straight().time_at(torch.tensor([-torch.inf, 0.0])).tolist()
            [1.0, 0.5]
        """
        if self.horizon != 1:
            raise ValueError(f"{self!r} has whole times only, and no time for each log-SNR")
        logsnr = torch.as_tensor(logsnr, dtype=torch.float64)
        low, high = torch.zeros_like(logsnr), torch.ones_like(logsnr)
        most, least = self.logsnr(0.0), self.logsnr(1.0)
        if not bool(((logsnr >= least) & (logsnr <= most)).all()):
            raise ValueError(f"logsnr must lie in [{least:g}, {most:g}], where {self!r} goes; got {logsnr.tolist()}")
        for _ in range(64):
            middle = (low + high) / 2
            later = self._logsnr(middle) > logsnr  # too much signal there: the time lies later
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return torch.where(logsnr == most, 0.0, high)

    def drift(self, t: Time) -> Tensor:
        r"""The linear drift f(t) of the SDE :math:`dx = f(t)\,x\,dt + g(t)\,dw` with these marginals: :math:`f = \alpha'/\alpha`.

        Raises:
            ValueError: Where the drift is infinite, as at the end of a path with α(1) = 0.

        Source:
            | Score-Based Generative Modeling through SDEs (Song et al., 2021), eq. 29 and appendix B
        """
        t = self._time(t)
        return self._finite(_derivative(self._alpha, t) / self._alpha(t), "the drift α'/α", t)

    def diffusion2(self, t: Time) -> Tensor:
        r"""The squared diffusion coefficient :math:`g^2 = (\sigma^2)' - 2 f \sigma^2` of the SDE with these marginals."""
        t = self._time(t)
        g2 = _derivative(self._variance, t) - 2 * _derivative(self._alpha, t) / self._alpha(t) * self._variance(t)
        return self._finite(g2, "the diffusion coefficient", t)

    def perturb(self, x0: Tensor, t: Time, eps: Tensor) -> Tensor:
        r"""Jump from the data to time t at once: :math:`x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon`.

        Arguments:
            x0: Clean data, shape (B, …).
            t: A number, or one time for each sample, shape (B,).
            eps: Standard normal noise, same shape as `x0`.

        Raises:
            TypeError: If a tensor is not of floating type.
            ValueError: If the shapes differ or t leaves the path.

        Source:
            | Slide "What's the benefits of defining the forward process like this?"; Ho et al. (2020), eq. 4

        Example:
            >>> from dgm_course.paths import Straight
            >>> Straight().perturb(torch.ones(2, 1), 0.25, torch.zeros(2, 1)).tolist()
            [[0.75], [0.75]]
        """
        same_shape(x0=x0, eps=eps)
        t = self._time(t)
        return expand(self._alpha(t), x0) * x0 + expand(self._sigma(t), x0) * eps

    # One step back ---------------------------------------------------------------------------------------------------

    def transition(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        r"""Coefficient and variance of :math:`q(x_t \mid x_s) = \mathcal N(a\,x_s,\ v I)`, for s < t.

        .. math:: a = \alpha_t/\alpha_s, \qquad v = \sigma_t^2 - a^2\sigma_s^2

        With s = t − 1 on the lecture's chain, :math:`a = \sqrt{1-\beta_t}` and :math:`v = \beta_t`.

        Raises:
            ValueError: If s ≥ t anywhere, or s < 0.
        """
        alpha_s, var_s, alpha_t, var_t = self.ends(s, t)
        a = alpha_t / alpha_s
        return a, var_t - a**2 * var_s

    def ends(self, s: Time, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """α and σ² at both ends of a step, float64: (α_s, σ_s², α_t, σ_t²). Raises a ValueError unless s < t everywhere."""
        s, t = self._time(s, "s"), self._time(t)
        if not bool((s < t).all()):
            raise ValueError(f"s must be less than t everywhere; got s = {s.tolist()} and t = {t.tolist()}")
        return self._alpha(s), self._variance(s), self._alpha(t), self._variance(t)

    def posterior(self, xt: Tensor, x0: Tensor, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        r"""Mean and variance of a reverse step from t to s when the clean data are known.

        .. math:: q(x_s \mid x_t, x_0) = \mathcal N\Bigl(\tfrac{a\,\sigma_s^2}{\sigma_t^2}\,x_t
                  + \tfrac{\alpha_s v}{\sigma_t^2}\,x_0,\ \tfrac{v\,\sigma_s^2}{\sigma_t^2} I\Bigr),
                  \qquad a = \alpha_t/\alpha_s,\quad v = \sigma_t^2 - a^2\sigma_s^2

        With s = t − 1 on the lecture's chain this is :math:`\tilde\mu_t, \tilde\beta_t`.

        Arguments:
            xt: Noisy data at t, shape (B, …).
            x0: Clean data, same shape.
            s, t: Times with 0 ≤ s < t; a number, or a tensor of shape (B,).

        Returns:
            The mean, of the shape of `xt`, and the variance, which broadcasts against it.

        Raises:
            ValueError: If s ≥ t anywhere, or the shapes differ.

        Source:
            | Slide "Getting q(x_{t-1}|x_t, x_0)"; Ho et al. (2020), eq. 6-7

        Example:
            >>> from dgm_course.paths import DiscretePath
            >>> mean, var = DiscretePath([0.1, 0.2]).posterior(torch.ones(1), torch.ones(1), s=0, t=1)
            >>> round(mean.item(), 6), var.item()
            (1.0, 0.0)
        """
        same_shape(xt=xt, x0=x0)
        keep, pull, var = self.bridge(s, t)
        return expand(keep, xt) * xt + expand(pull, xt) * x0, expand(var, xt)

    def bridge(self, s: Time, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """The posterior's three numbers, float64: its mean is `keep`·x_t + `pull`·x_0, and its variance the third."""
        alpha_s, var_s, alpha_t, var_t = self.ends(s, t)
        a = alpha_t / alpha_s
        v = var_t - a**2 * var_s  # the noise that the step from s to t added
        return a * var_s / var_t, alpha_s * v / var_t, v * var_s / var_t

    def log_variance(self, s: Time, t: Time, variance: str | float | Tensor) -> Tensor:
        r"""Log-variance of a reverse step from t to s: one of the two that DDPM offers, or between them.

        .. math:: \log\Sigma = v\log\beta + (1 - v)\log\tilde\beta

        :math:`\beta` is the variance of q(x_t given x_s), and :math:`\tilde\beta` that of q(x_s given x_t, x_0), both for this very
        step: on a grid with fewer steps they are other numbers. Where σ_s = 0, β̃ is 0, and log Σ is log β whatever v is.

        Arguments:
            s, t: Times with 0 ≤ s < t; numbers, or tensors of shape (B,).
            variance: v: "beta" for 1, "posterior" for 0, a number in [0, 1], or what a network says, of the data's shape (B, …).

        Returns:
            float64 of the shape of the times; if v is a tensor, of its shape and dtype.

        Raises:
            ValueError: If s ≥ t anywhere, or v is none of these.

        Source:
            | Slide "How can we shorten the diffusion steps?"; Improved DDPM (Nichol & Dhariwal, 2021), eq. 15

        Example:
            >>> from dgm_course.paths import DiscretePath
            >>> path = DiscretePath([0.1, 0.2])
            >>> [round(path.log_variance(s=1, t=2, variance=v).exp().item(), 4) for v in (0, 0.5, 1)]
            [0.0714, 0.1195, 0.2]
        """
        v = {"posterior": 0.0, "beta": 1.0}.get(variance) if isinstance(variance, str) else variance
        if not isinstance(v, Tensor) and (isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 <= v <= 1):
            raise ValueError(f"variance must be 'beta', 'posterior' or a number in [0, 1]; got {variance!r}")
        beta, posterior = self.transition(s, t)[1], self.bridge(s, t)[2]
        upper, lower = beta.log(), torch.where(posterior > 0, posterior, beta).log()  # β̃ = 0 where σ_s = 0
        if isinstance(v, Tensor):
            upper, lower = expand(upper, v), expand(lower, v)
        return v * upper + (1 - v) * lower

    # What a network can predict --------------------------------------------------------------------------------------

    def convert(self, value: Tensor, xt: Tensor, t: Time, given: str, to: str) -> Tensor:
        r"""Turn one of eps, x0, v, score, velocity into another, given x_t.

        Each quantity is a linear form :math:`r_1 x_0 + r_2\epsilon`, and so is :math:`x_t`:

        .. math:: v = \alpha\epsilon - \sigma x_0, \qquad \nabla\log q(x_t \mid x_0) = -\epsilon/\sigma,
                  \qquad \dot x_t = \alpha' x_0 + \sigma'\epsilon

        Two forms fix :math:`(x_0, \epsilon)`, unless they are parallel; then there is nothing to solve and this raises.

        Arguments:
            value: The known quantity, shape (B, …).
            xt: Noisy data at t, same shape.
            t: A number, or a tensor of shape (B,).
            given, to: Two of "eps", "x0", "v", "score", "velocity".

        Raises:
            ValueError: If a name is unknown, the shapes differ, or the numbers do not determine the answer
                (x0 from eps where α = 0; eps from x0 where σ = 0).

        Source:
            | Progressive Distillation (Salimans & Ho, 2022), section 4 and appendix D, for v

        Example:
            >>> from dgm_course.paths import Straight
            >>> Straight().convert(torch.zeros(1), torch.ones(1), 0.5, given="eps", to="x0").item()
            2.0
        """
        known = self._conversions.get((given, to, xt.dtype), {}).get(t)
        if known and xt.shape == value.shape:
            return xt.mul(known[0]).add_(value, alpha=known[1])
        same_shape(xt=xt, value=value)
        for name, asked in (("given", given), ("to", to)):
            if asked not in QUANTITIES:
                raise ValueError(f"{name} must be one of {', '.join(QUANTITIES)}; got {asked!r}")
        if given == to:
            return value
        if t in self._units and self._remember(given, to, xt.dtype, t):
            return self.convert(value, xt, t, given, to)
        t = self._time(t)
        p, q = self._conversion(t, given, to)
        if not bool((good := p.isfinite() & q.isfinite()).all()):
            where = t[~good].unique().tolist()
            raise ValueError(
                f"x_t and {given} do not determine {to} at t = {where} of {self!r}: α or σ is 0 there, or a rate infinite"
            )
        return expand(p, xt) * xt + expand(q, xt) * value

    def _conversion(self, t: Tensor, given: str, to: str) -> tuple[Tensor, Tensor]:
        """The p and q of `to = p·x_t + q·given`, not finite where there is no answer: two equations in x_0 and ε, solved."""
        alpha, sigma = self._alpha(t), self._sigma(t)
        (g1, g2), (r1, r2) = self._form(given, t), self._form(to, t)
        det = alpha * g2 - sigma * g1
        p, q = (r1 * g2 - r2 * g1) / det, (alpha * r2 - sigma * r1) / det
        if {given, to} == {"eps", "score"}:  # one thing in two units: x_t is not needed, even where α = 0
            p, q = 0 * (r2 + g2), r2 / g2
        return p, q

    def _remember(self, given: str, to: str, dtype: torch.dtype, t: float) -> bool:
        """Keep `_conversion` of the whole grid, where there is an answer; p as a 0-d tensor, faster to multiply by."""
        key = given, to, dtype
        if key not in self._conversions:
            p, q = self._conversion(self._grid, given, to)
            rows = zip(self._grid.tolist(), p.to(dtype).unbind(), q.tolist(), (p + q).isfinite().tolist(), strict=True)
            self._conversions[key] = {t: (p, q) for t, p, q, good in rows if good}
        return t in self._conversions[key]

    def _form(self, name: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """The (r_1, r_2) of a quantity r_1·x_0 + r_2·ε."""
        if name == "velocity":
            return self._rates(t)
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        if name == "v":
            return -self._sigma(t), self._alpha(t)
        return {"x0": (one, zero), "eps": (zero, one), "score": (zero, -1 / self._sigma(t))}[name]

    def quantity(self, name: str, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """What a network that predicts `name` is asked for: one of eps, x0, v, score, velocity, from x_0 and ε.

        Example:
            >>> from dgm_course.paths import Straight
            >>> Straight().quantity("velocity", torch.zeros(1), torch.ones(1), 0.3).item()
            1.0
        """
        same_shape(x0=x0, eps=eps)
        t = self._time(t)
        r1, r2 = self._form(name, t)
        self._finite(r1 + r2, name, t)
        return expand(r1, x0) * x0 + expand(r2, x0) * eps

    def _rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _derivative(self._alpha, t), _derivative(self._sigma, t)

    def _finite(self, value: Tensor, what: str, t: Tensor) -> Tensor:
        if not bool(value.isfinite().all()):
            where = t[~value.isfinite()].unique().tolist()
            raise ValueError(f"{what} of {self!r} is not finite at t = {where}; stay inside the interval")
        return value


def _derivative(function, t: Tensor) -> Tensor:
    """d function / dt at each entry of t, exactly, by automatic differentiation."""
    with torch.enable_grad():
        t = t.clone().requires_grad_()
        return torch.autograd.grad(function(t).sum(), t)[0]
