# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Homework 4: scores and stochastic differential equations
#
# The notebook [*Score-based models and SDEs*](../notebooks/05_score_sde.ipynb) turned the steps of a chain into an equation for every moment, ran it backwards by a score, and corrected what the steps got wrong. Here you work on equations that it did not treat, and you measure what it only used. You will practise
#
# - to solve a linear SDE for its mean and its variance, in a form that survives every special case;
# - to find the SDE that belongs to a path, also to one whose noise moves away, and to see when there is none;
# - to match scores when the noise has a shape;
# - to choose the corrector's step from what it moves, and to find what this choice costs;
# - to sample anywhere between the ODE and the SDE, and beyond;
# - to estimate a log-density without a trace, and to say how far the estimate may be off.
#
# | | you write | points | difficulty | minutes |
# |---|---|---|---|---|
# | 1 | `ou_moments` | 2 | ●●○○○ | 15 |
# | 2 | `sde_of_path` | 3 | ●●○○○ | 20 |
# | 3 | `correlated_dsm` | 3 | ●●●○○ | 25 |
# | 4 | `corrector_step` | 3 | ●●○○○ | 15 |
# | 5 | `sample_between` | 4 | ●●●○○ | 25 |
# | 6 | `estimated_log_prob` | 5 | ●●●●○ | 35 |
# | | | **20** | | **135** |
#
# **Symbols** are those of the lecture and of the README's [symbol ledger](../README.md#symbols): $t = 0$ is data, $x_t = \alpha x_0+\sigma\epsilon$, the SDE is $dx = f\,x\,dt+g\,dw$, and $s$ stands for a score. New ones are said where they first stand. You need pen and paper for 1, 2, 3 and 4.

# %% [markdown]
# ## How it works
#
# Replace each `raise NotImplementedError` by your code, and run the cell below it. `hw.check` tries your function on a few cases and says ✓, or ✗ and what differs (or · while nothing is written yet); some mistakes it knows by sight. When all is right, the cell goes on and draws a figure with *your* function.
#
# - **Keep names, arguments and results as they are asked for.** Work in as many cells as you like, and write helpers if you want them; the six functions are found by their names.
# - **Hidden cases count too.** In each exercise 1 point is for cases like those that you can try here, with other numbers. The rest is for cases you have not seen: other shapes, a batch of one, float64, the ends of a range.
# - **Leave inputs unchanged.** `x += 1` and functions that end in `_` change a tensor that is not yours.
# - **Results have the dtype of the samples**, unless said otherwise. Good practice: work out coefficients in float64, and cast them last.
# - **Write the formulas out.** The course's kernels that do the same (`path.drift`, `losses.dsm`, `samplers.euler_maruyama`, …) are refused inside your functions. Your own earlier functions are welcome, and so is all of PyTorch.
# - **Limits, unless your instructor says otherwise:** 60 seconds for the notebook from top to bottom, 10 seconds for the cases of one exercise, 6 GB of memory. A notebook that takes longer than its 60 seconds is not graded at all, so delete slow cells before you hand in. (Figures are not drawn while it is graded.)
#
# Each exercise ends with a short question, which the minutes do not include. It carries no points, but it is where the thinking is. Answer it before you go on.
#
# **To hand in**, run all cells once more from the top, save, and hand in this file as it is.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dgm_course import checkpoints, data, homework
from dgm_course.checks import claim
from dgm_course.denoisers import clipped, on_path, read_as
from dgm_course.paths import VP, Straight
from dgm_course.toy import GaussianMixture
from dgm_course.viz import plots

hw = homework.load("hw4")
g = torch.Generator().manual_seed(4)  # where all chance in the figures comes from

# %% [markdown]
# Samples have shape (B, …), whatever comes after B. Where **each sample of a batch has a number of its own**, such as a time, the numbers have shape (B,), and cannot be multiplied with the samples as they are. This helper does it; you may use it wherever you like.


# %%
def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """A number for each sample, (B,), in the dtype of `like` and shaped to multiply it: (B, 1, …, 1)."""
    return coefficient.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def draw(*shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=g, dtype=torch.float64)


digits, labels = data.images(data.load("mnist", "test"))
chosen = torch.stack([digits[labels == c][0] for c in range(10)])  # one digit of each class

# %% [markdown]
# The next six cells of code serve the figures. Come back to them when you wonder what a figure shows.
#
# For exercise 2: paths as functions of $t$. Each gives $\alpha$, $\mu$ and $\sigma$, and automatic differentiation gives their rates.


# %%
def straight(t):
    return 1 - t, 0 * t, t


def moving(t):
    """The straight path, but the noise ends around 3."""
    return 1 - t, 3 * t, t


def bump(t):
    """Noise comes, and goes again."""
    return 1 - t / 2, 0 * t, torch.sin(math.pi * t) / 2


def coefficients(path, t):
    """f, b and g² of a path at the times t, by your function of exercise 2."""
    return sde_of_path(*sum(torch.func.jvp(path, (t,), (torch.ones_like(t),)), ()))


# %% [markdown]
# For exercise 3: the best linear score for data and noise in the plane; and a matrix that makes the noise of an image smooth.


# %%
def best_linear(x0, eps, alpha, factor):
    """The matrix A for which the score −Ax has the smallest loss, by your function of exercise 3."""
    A = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    fit = torch.optim.LBFGS([A], max_iter=50)

    def loss():
        fit.zero_grad()
        value = correlated_dsm(lambda x, t: -x @ A.mT, x0, 0.5, eps, alpha, factor).mean()
        value.backward()
        return value

    fit.step(loss)
    return A.detach()


place = torch.cartesian_prod(torch.arange(28.0), torch.arange(28.0)).double()
likeness = torch.exp(-(torch.cdist(place, place) ** 2) / 18)  # pixels up to some 3 apart get nearly the same noise
smooth = torch.linalg.cholesky(likeness + 1e-4 * torch.eye(784)).float()

# %% [markdown]
# For exercise 4: a cloud that is right from the start, and what two correctors make of it.


# %%
def corrected(dim, count, steps, r):
    """N(0, I), whose score is −x, after steps of your corrector; and after steps with one δ = 2r² for all."""
    measured = fixed = torch.randn(count, dim, generator=g)
    for _ in range(steps):
        z = torch.randn(count, dim, generator=g)
        measured, _ = corrector_step(measured, -measured, z, r)
        fixed = (1 - 2 * r**2) * fixed + 2 * r * z
    return measured, fixed


# %% [markdown]
# For exercise 5: the score of the course's digit model. It was trained on the cosine path; what it knows about an image depends on the signal-to-noise ratio alone, so it serves on the path VP too.
#
# And an exact way to ask how good a sampler is. For one coordinate with Gaussian data the score is linear, so the last state is a sum: the first state times a number, plus each $z$ times a number of its own. Put in a batch in which each sample has a single 1, in its start or in one of its noises, and read off all these numbers. The variance of the last state is the sum of their squares.

# %%
digit_model, vp = checkpoints.load("mnist-unet"), VP()


def digit_score(y):
    """The model's score on VP for the labels y, a function of (x, t)."""
    denoiser = clipped(on_path(lambda xt, t: digit_model(xt, t, y=y), digit_model.path, vp))
    return torch.no_grad()(read_as("score", denoiser, vp))


def grid(steps):
    """Times of VP from 1 to 0.001, with f and g²."""
    times = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
    return times, vp.drift(times), vp.diffusion2(times)


# %%
def end_variance(eta, steps, start=1.0, V=0.25):
    """Variance of the last state for N(0, V) data, as a multiple of what it should be; `start` likewise, at t = 1."""
    times, f, g2 = grid(steps)
    var = vp.alpha(times) ** 2 * V + vp.sigma(times) ** 2
    single = torch.eye(steps + 1, dtype=torch.float64)
    x, noise = (start * var[0]).sqrt() * single[0], single[1:]
    end = sample_between(lambda x, t: -x / (vp.alpha(t) ** 2 * V + vp.sigma(t) ** 2), x, times, f, g2, eta, noise)
    return end.square().sum() / var[-1]


# %% [markdown]
# For exercise 6: a walk along the probability-flow ODE of a mixture of Gaussians in 10 dimensions, whose log-density is known. There the whole Jacobian can be afforded.


# %%
def jacobian(u, x):
    """∂u/∂x of each sample, (B, D, D): the derivatives along all D axes."""
    along = torch.func.vmap(lambda axis: torch.func.jvp(u, (x,), (axis.expand_as(x),))[1], out_dims=2)
    return along(torch.eye(x.shape[1], dtype=x.dtype))


def walk(mixture, x, steps):
    """The ODE by Euler's rule from t = 0.001 to 1, with short steps near the data: its end, its times, all J."""
    times, jacobians = 1e-3 ** torch.linspace(1, 0, steps + 1, dtype=torch.float64), []
    for t, h, f, g2 in zip(times, times.diff(), vp.drift(times), vp.diffusion2(times), strict=False):

        def u(x, t=t, f=f, g2=g2):
            return f * x - g2 / 2 * mixture.score(x, vp, t)

        jacobians.append(jacobian(u, x))
        x = x + h * u(x)
    return x, times, torch.stack(jacobians)


# %% [markdown]
# ## 1. A spring and noise (2 points)
#
# ●●○○○ · 15 minutes · read again: sections 1.2 and 1.3 of the notebook
#
# An SDE says where $x$ goes in the next moment. Training needs to know where it is at time $t$, in one jump. For a linear SDE this can be worked out; the notebook did so for the step of a chain. Take all those with constant coefficients:
#
# $$dx = -k\,x\,dt+c\,dw.$$
#
# With $k>0$ it is a spring that pulls $x$ to 0 and noise that shakes it; it is known as the Ornstein–Uhlenbeck process. With $k = 0$ only the noise is left, Brownian motion. With $k<0$ the drift pushes $x$ away. Given $x_0$, the state $x_t$ is Gaussian in all three cases. So its mean $m(t)$ and its variance $V(t)$ say everything.
#
# In a short time $dt$, $x$ is multiplied by $1-k\,dt$, and independent noise of variance $c^2dt$ is added. What does this do to $m$, and what to $V$? Write down the two moment equations, and solve them from $m(0) = x_0$ and $V(0) = 0$.
#
# **Write** `ou_moments(x0, t, k, c)`, which gives the mean and the variance.
#
# - `x0`: (B, …), float32 or float64. `t`: (B,), float64, t ≥ 0. `k`, `c`: Python floats, c > 0, and k of any sign.
# - Returns `(mean, variance)`: (B, …) and (B,), the variance being one number for each sample; both in the dtype of `x0`.
# - $k = 0$ must work, and so must a $k$ that is nearly 0, such as $10^{-17}$.
#
# <details><summary>Hint 1</summary>
#
# The variance is multiplied by $(1-k\,dt)^2\approx 1-2k\,dt$. So $m' = -k\,m$ and $V' = -2k\,V+c^2$.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $1-e^{-y}$ has no correct digit left when $y$ is below the rounding error of 1. `torch.expm1(-y)` gives $e^{-y}-1$ to all its digits.
#
# </details>


# %%
def ou_moments(x0: Tensor, t: Tensor, k: float, c: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of x_t given x_0 under dx = −k x dt + c dw.

    Arguments:
        x0: Where the walks start, (B, …).
        t: A time for each sample, float64 (B,).
        k, c: The strength of the spring, of any sign, and of the noise.

    Returns:
        The mean, (B, …), and the variance, (B,).
    """
    # BEGIN SOLUTION
    spread = t if k == 0 else -torch.expm1(-2 * k * t) / (2 * k)
    return per_sample(torch.exp(-k * t), x0) * x0, (c**2 * spread).to(x0.dtype)
    # END SOLUTION


# %%
if hw.check(ou_moments):
    t, walks, h = torch.arange(201, dtype=torch.float64) / 100, 4000, 0.01
    lines, walked = {}, {}
    for k in (1.0, 0.0, -0.6):
        x, seen = torch.ones(walks, dtype=torch.float64), []
        for _ in t:
            seen.append(x.var())
            x = x - k * x * h + h**0.5 * draw(walks)
        lines[f"k = {k:g}"], walked[f"k = {k:g}"] = ou_moments(torch.ones_like(t), t, k, 1.0)[1], torch.stack(seen)
    claim(
        "4,000 walks have this variance, to 10 %",
        all((walked[k][1:] / lines[k][1:] - 1).abs().max() < 0.1 for k in lines),
    )
    mean, variance = ou_moments(torch.ones_like(t[:101]), t[:101], 4.0, 8**0.5)
    beta8 = VP(8.0, 8.0)
    gaps = mean - beta8.alpha(t[:101]), variance - beta8.sigma(t[:101]) ** 2
    claim("k = 4, c² = 8 is the course's VP with β = 8", all(gap.abs().max() < 1e-12 for gap in gaps))
    plots.curves(t, lines, "t", "variance of x_t given x_0")

# %% [markdown]
# **What to see.** All three begin alike, with slope $c^2$. With a spring the variance settles at $c^2/(2k)$, where the spring takes as much as the noise brings. Without one it grows like $t$, and with a push outwards like $e^{2\lvert k\rvert t}$.
#
# **Question.** A forward process should end in noise: nothing of $x_0$ should be left to see. For which $k$ does $x_t$ forget $x_0$ as $t\to\infty$? Look at the ratio of signal to noise, $e^{-2kt}/V(t)$. And which $c$ keeps data of variance 1 at variance 1?
#
# <!-- BEGIN SOLUTION -->
# For $k>0$ the ratio falls like $e^{-2kt}$, for $k = 0$ like $1/(c^2t)$: both forget, the first because $x_0$ shrinks, the second because it drowns. (These are the two kinds of the paper, VP and VE. VE lets $c$ grow with time, since $1/t$ is slow.) For $k<0$ the ratio tends to $2\lvert k\rvert/c^2$ and never to 0: the early noise grows as fast as $x_0$ does. Data of variance $V$ follow the same equation $V' = -2kV+c^2$, which rests at 1 if $c^2 = 2k$. This is the lecture's SDE, with $k = \beta/2$ and $c = \sqrt\beta$.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 2. Noise around another place (3 points)
#
# ●●○○○ · 20 minutes · read again: section 1.3 of the notebook
#
# Exercise 1 went from an SDE to its marginals. Models are mostly designed the other way round: somebody chooses a path, and wants the SDE that walks along it. The notebook did this for paths whose noise ends around 0. But noise may end elsewhere, for instance around a rough version of the answer that another network has made ([Popov and others, 2021](https://arxiv.org/abs/2105.06337), do so for speech). Such a path has a moving centre $\mu(t)$, a known function:
#
# $$x_t = \alpha\,x_0+\mu+\sigma\epsilon,\qquad \mu(0) = 0.$$
#
# Its SDE has a drift with a constant in it:
#
# $$dx = \bigl[f(t)\,x+b(t)\bigr]dt+g(t)\,dw.$$
#
# Write down what a short step of it does to a mean and to a variance, put in the mean $\alpha x_0+\mu$, which must be right for *every* $x_0$, and read the equations from right to left.
#
# Not every path has an SDE. If $\sigma^2$ falls faster than the drift alone would shrink it, noise is taken away from $x$. That would need $g^2<0$, and there is no such noise.
#
# **Write** `sde_of_path(alpha, mu, sigma, dalpha, dmu, dsigma)`, which gives $f$, $b$ and $g^2$ at some times of a path.
#
# - `alpha`, `mu`, `sigma`: $\alpha>0$, $\mu$ and $\sigma\ge 0$ at these times. `dalpha`, `dmu`, `dsigma`: their rates $\alpha'$, $\mu'$ and $\sigma'$. All are float64 of shape (N,).
# - Returns `(f, b, g2)`: each (N,), float64.
# - Raises a `ValueError` whose message says `g2`, if $g^2$ is negative at any of the times. $g^2 = 0$ is allowed; at $\sigma = 0$, where every path begins, it is 0.
#
# <details><summary>Hint</summary>
#
# The mean $m$ follows $m' = f\,m+b$. With $m = \alpha x_0+\mu$ both sides are a number times $x_0$ plus a number without it: compare each. A constant in the drift moves the cloud and does not widen it, so $V' = 2fV+g^2$ stays.
#
# </details>


# %%
def sde_of_path(
    alpha: Tensor, mu: Tensor, sigma: Tensor, dalpha: Tensor, dmu: Tensor, dsigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The SDE dx = (f x + b) dt + g dw along x_t = α x_0 + μ + σ ε.

    Arguments:
        alpha, mu, sigma: The path at some times, float64 (N,).
        dalpha, dmu, dsigma: Their rates of change, float64 (N,).

    Returns:
        f, b and g², each (N,).

    Raises:
        ValueError: If g² is negative at any of the times.
    """
    # BEGIN SOLUTION
    f = dalpha / alpha
    g2 = 2 * sigma * dsigma - 2 * f * sigma**2
    if (g2 < 0).any():
        raise ValueError(f"g2 must not be negative: this path takes noise away; got {g2.tolist()}")
    return f, dmu - f * mu, g2
    # END SOLUTION


# %%
if hw.check(sde_of_path):
    t, h = torch.arange(451, dtype=torch.float64) / 500, 0.002
    f, b, g2 = coefficients(straight, t)
    kernel = Straight().drift(t), 0 * t, Straight().diffusion2(t)
    claim("f, b and g² of the straight path are the kernel's", all(map(torch.allclose, (f, b, g2), kernel)))
    states = [torch.cat([torch.full((5000,), -2.0), torch.full((5000,), 2.0)]).double()]  # two values of x_0
    for f, b, g2 in zip(*coefficients(moving, t), strict=True):
        states.append(states[-1] + (f * states[-1] + b) * h + (g2 * h).sqrt() * draw(10_000))
    low, high = states[450].split(5000)  # at t = 0.9 the path has the means ±0.2 + 2.7
    claim("walks from −2 and 2 have the path's means", abs(low.mean() - 2.5) < 0.06 and abs(high.mean() - 2.9) < 0.06)
    claim("and its deviation, 0.9", abs(low.std() - 0.9) < 0.04 and abs(high.std() - 0.9) < 0.04)
    try:
        coefficients(bump, t)
    except ValueError as error:
        claim("where noise comes and goes there is no SDE", "g2" in str(error))
    shown = torch.stack(states)[:451, 4980:5020].T
    plots.curves(t, {"x_0 = −2": shown[:20], "x_0 = 2": shown[20:]}, "t", "x, 20 walks from each x_0")

# %% [markdown]
# **What to see.** Two values of $x_0$, and a path whose noise ends around 3: 20 walks from each, as their mean in the band of all. All are carried upwards and drawn together, until hardly anything tells where they came from.
#
# **Question.** Look at $y = (x-\mu)/\alpha$. What are $f$, $b$ and $g^2$ for $y$? What does this say about all the SDEs of this exercise, and about those paths that have none?
#
# <!-- BEGIN SOLUTION -->
# $y_t = x_0+(\sigma/\alpha)\,\epsilon$ has a constant factor of $x_0$ and no centre, so its $f$ and $b$ are 0, and its $g^2$ is the rate of $\sigma^2/\alpha^2$; for $x$ it is $\alpha^2$ times that. So each of these SDEs is Brownian motion, with the noise-to-signal ratio $\sigma^2/\alpha^2$ as its clock, looked at through a glass that is moved by $\mu$ and makes everything $\alpha$ times as large. A path without an SDE is one on which this clock runs backwards. It is also why a network trained on one path serves on all others: the same clock time, the same task.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 3. Noise with a shape (3 points)
#
# ●●●○○ · 25 minutes · read again: section 3.3 of the notebook
#
# So far each coordinate got noise of its own, equally strong everywhere. Nothing demands that. In an image the noise may be smooth, so that neighbours get nearly the same; in a space of latents it may be strong in one direction and weak in another. Let $x$ be a vector of D values, and
#
# $$x_t = \alpha\,x_0+L\epsilon,\qquad \epsilon\sim\mathcal N(0, I),\qquad \Sigma = LL^\top,$$
#
# with a lower triangular matrix $L$. Given $x_0$, the noise has the covariance $\Sigma$.
#
# As on the slides, a model $s_\theta$ learns from the score of $q(x_t\mid x_0)$, which is known. *(In Algorithm 3 the slide text writes $\nabla\log p_t(x_t)$. That is what the model ends up with; it is not known during training, so it cannot be the target.)* Work this score out. If $L$ nearly loses a direction, it explodes there. So the error is measured in units of the noise, which is what the weight $\lambda = \sigma^2$ does for noise of one strength:
#
# $$\ell = \tfrac12\,\bigl(s_\theta(x_t, t)-\nabla\log q(x_t\mid x_0)\bigr)^\top\,\Sigma\,\bigl(s_\theta(x_t, t)-\nabla\log q(x_t\mid x_0)\bigr).$$
#
# **Write** `correlated_dsm(score, x0, t, eps, alpha, factor)`, which gives $\ell$ for each sample.
#
# - `score`: a function of (B, D) samples and a time that returns (B, D). `t`: a Python float, only to be handed on to `score`.
# - `x0`, `eps`: (B, D), float32 or float64. `alpha`: a Python float. `factor`: $L$, (D, D), lower triangular, in the dtype of `x0`.
# - Returns `loss`: (B,), in the dtype of `x0`.
# - $L$ need not have an inverse. The loss is finite all the same.
#
# <details><summary>Hint 1</summary>
#
# $\log q(x_t\mid x_0) = -\frac12(x_t-\alpha x_0)^\top\Sigma^{-1}(x_t-\alpha x_0)+\dots$, so its gradient is $-\Sigma^{-1}L\epsilon = -L^{-\top}\epsilon$. Put it in, and multiply out before you code.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $u^\top LL^\top u = \lVert L^\top u\rVert^2$. And mind the rows: a batch holds each $\epsilon$ as a row, so $L\epsilon$ is `eps @ factor.mT`.
#
# </details>


# %%
def correlated_dsm(score: Callable, x0: Tensor, t: float, eps: Tensor, alpha: float, factor: Tensor) -> Tensor:
    """Denoising score matching with noise of covariance L Lᵀ, the error in units of that noise.

    Arguments:
        score: (x, t) → the model's score, (B, D).
        x0, eps: Clean data and standard normal noise, (B, D).
        t: The time, handed on to `score`.
        alpha: The factor of x_0.
        factor: L, lower triangular, (D, D).

    Returns:
        The loss of each sample, (B,).
    """
    # BEGIN SOLUTION
    xt = alpha * x0 + torch.einsum("ij,bj->bi", factor, eps)
    error = torch.einsum("ji,bj->bi", factor, score(xt, t)) + eps  # Lᵀ s − (−ε): no inverse of L is left
    return error.square().sum(1) / 2
    # END SOLUTION


# %%
if hw.check(correlated_dsm):
    C, L = torch.tensor([[1.0, -0.7], [-0.7, 1.0]]).double(), torch.tensor([[1.2, 0.0], [0.9, 0.4]]).double()
    x0, eps = draw(100_000, 2) @ torch.linalg.cholesky(C).mT, draw(100_000, 2)
    best = best_linear(x0, eps, 0.8, L)
    exact = torch.linalg.inv(0.64 * C + L @ L.mT)  # the score of the noised data is −(α²C + Σ)⁻¹ x
    claim("the best linear score is that of the noised data, to 5 %", (best - exact).norm() < 0.05 * exact.norm())
    plots.overlay(x0[:1500], (0.8 * x0 + eps @ L.mT)[:1500], labels=["data", "noised"])
    noise = torch.randn(10, 784, generator=g)
    white, soft = (0.6 * chosen + 0.8 * part.reshape(chosen.shape) for part in (noise, noise @ smooth.mT))
    plots.rows([chosen, white, soft], labels=["x₀", "L = I", "L smooth"])

# %% [markdown]
# **What to see.** Above: the data lean one way and the noise the other, and the fit finds the score of what comes out. Below: noise of the same strength in each pixel, once white and once smooth. White noise hides the edges and leaves the large forms to be seen; the smooth one does the opposite.
#
# **Question.** Let the last column of $L$ be 0. Then one direction gets no noise at all. What does the loss say about the score in that direction? Is anything missing that a sampler would need?
#
# <!-- BEGIN SOLUTION -->
# Nothing: the loss sees $L^\top s$ only, and a part of $s$ at right angles to all columns of $L$ does not change it. There is also nothing to be known: given $x_0$, the density lives on a plane, and across it there is no gradient. A sampler does not miss it. With noise $G\,dw$ the reverse SDE has $GG^\top s$ where ours has $g^2 s$, and $GG^\top$ sees no more of $s$ than $G^\top$ does: in a direction without noise there is nothing to take back.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 4. A corrector that measures its step (3 points)
#
# ●●○○○ · 15 minutes · read again: section 5.2 of the notebook
#
# A corrector takes steps of Langevin dynamics at a fixed $t$, uphill along the score and at once noised:
#
# $$x\leftarrow x+\delta\,s+\sqrt{2\delta}\;z,\qquad z\sim\mathcal N(0, I).$$
#
# *(The slide text calls the step $\Delta t$, like the predictor's, and counts $x_{t+1}$. But the predictor's $\Delta t$ is negative, and here the time stays where it is. So give it a letter of its own: $\delta>0$.)*
#
# Which $\delta$? The score is large near the data and small near the noise, so one number cannot suit all times. The paper ([Song and others, 2021](https://arxiv.org/abs/2011.13456)) fixes a ratio instead: what the score adds shall have $r$ times the length of what the noise adds,
#
# $$\lVert\delta\,s\rVert = r\,\lVert\sqrt{2\delta}\;z\rVert.$$
#
# The paper's code puts in norms that are averaged over the batch. Then what becomes of one image depends on which others are drawn with it. We give **each sample a step of its own**, from its own norms.
#
# **Write** `corrector_step(x, score, noise, r)`, which finds $\delta$ for each sample and takes the step.
#
# - `x`, `score`, `noise`: the state, the score there, and $z$, all (B, …), float32 or float64. `r`: a Python float. No score is 0.
# - Returns `(x, delta)`: the new state, (B, …), and the steps, (B,); both in the dtype of `x`.
#
# <details><summary>Hint</summary>
#
# Square both sides and solve for $\delta$. The norm of a sample is over all of its values, whatever its shape: `flatten(1)` first.
#
# </details>


# %%
def corrector_step(x: Tensor, score: Tensor, noise: Tensor, r: float) -> tuple[Tensor, Tensor]:
    """A Langevin step in which the score adds r times the length that the noise adds.

    Arguments:
        x, score, noise: The state, the score there, and z, (B, …).
        r: The ratio of the two lengths.

    Returns:
        The new state, (B, …), and δ of each sample, (B,).
    """
    # BEGIN SOLUTION
    length_s, length_z = (torch.linalg.vector_norm(part.flatten(1), dim=1) for part in (score, noise))
    delta = 2 * r**2 * (length_z / length_s) ** 2
    return x + per_sample(delta, x) * score + per_sample((2 * delta).sqrt(), x) * noise, delta
    # END SOLUTION


# %%
if hw.check(corrector_step):
    dims = torch.tensor([4, 8, 16, 32, 64, 128])
    ends = [corrected(dim, 40_000 // dim, 300, r=0.1) for dim in dims.tolist()]
    measured, fixed = (torch.stack([end[i].square().mean() for end in ends]) for i in (0, 1))
    limit = (1 + 2 / dims) ** 2
    claim("one δ for all leaves N(0, I) as it is, to 5 %", (fixed - 1).abs().max() < 0.05)
    claim("measured steps widen it by (1 + 2/D)², to 10 %", (measured / limit - 1).abs().max() < 0.1)
    lines = {"measured steps": measured, "one δ": fixed, "(1 + 2/D)²": limit}
    plots.curves(dims, lines, "D, the number of values in a sample", "variance after 300 steps", logx=True)
    plane = corrected(2, 2000, 1000, r=0.05)
    middle, wanted = ((cloud.norm(dim=1) < 0.5).double().mean() for cloud in plane)
    claim("in the plane, the middle keeps less than a third of those who belong there", middle < wanted / 3)
    plots.film_points(plane[::-1], times=["one δ", "measured steps"], extent=(-5, 5, -5, 5))

# %% [markdown]
# **What to see.** A corrector should leave the right cloud as it is. The cloud here was right from the start, $\mathcal N(0, I)$, and $r$ is small. With one $\delta$ for all samples it stays. With measured steps it is blown up, and in few dimensions badly. Below, in the plane, the middle is nearly empty. In 784 dimensions, as for digits, the effect is half a percent.
#
# **Question.** Why is the middle empty? And why does it hardly matter for images? If you like: which density does the corrector leave unchanged, in the limit of small $r$?
#
# <!-- BEGIN SOLUTION -->
# In the middle the score is near 0, so the measured step is huge: whoever comes there is thrown out at once, and seldom comes back. A cloud stays where steps are small. With a step $\delta(x)$ the noise that leaves a place is not balanced by what comes in from its neighbours; for small steps the density that stays unchanged is proportional to $p/\delta$, here to $p\,\lVert s\rVert^2$. There is a second effect: $\delta$ is large in just those steps whose $z$ is long, so that $\sqrt{2\delta}\,z$ has $(D+2)/D$ times the variance that belongs to the mean of $\delta$, and the cloud is like $p^{D/(D+2)}$. Together: $p^{D/(D+2)}\lVert s\rVert^2$, for $\mathcal N(0, I)$ with the variance $(1+2/D)^2$. In many dimensions all lengths are nearly alike, $\lVert z\rVert\approx\sqrt D$ and $\lVert s\rVert\approx\sqrt D/\sigma$, so the measured step is nearly $2(r\sigma)^2$ for everybody. The safe choice is to write that down at once, as `samplers.langevin` does.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 5. Between the ODE and the SDE (4 points)
#
# ●●●○○ · 25 minutes · read again: section 2.1 of the notebook
#
# Two equations lead from noise to data with the same density $p_t$ at each time: the reverse SDE, and the probability-flow ODE. They are two members of a family. For any number $\eta\ge 0$,
#
# $$dx = \Bigl[f\,x-\tfrac12(1+\eta^2)\,g^2\,s\Bigr]dt+\eta\,g\,d\bar w$$
#
# has these marginals too. $\eta = 0$ is the ODE, $\eta = 1$ the SDE; beyond 1 there is more noise, and the score pulls harder to make up for it. (It is the $\eta$ of DDIM, too, when its steps are many and short.) In a step from $t$ to the next time, $dt$ is **negative**, and $\bar w$ is a Brownian motion that runs backwards in time: its increment has variance $\lvert dt\rvert$. *(The slide text has $dw$ there, as in the forward SDE.)*
#
# **Write** `sample_between(score, x, times, f, g2, eta, noise)`, which walks down a list of times by Euler–Maruyama: in each step everything on the right side, the score too, is taken where the step begins.
#
# - `score`: a function of samples (B, …) and a time, a Python float, that returns the score, (B, …).
# - `x`: the first state, (B, …), at `times[0]`. `times`: float64, (N + 1,), descending, N ≥ 1, with steps of different lengths. `f`, `g2`: $f$ and $g^2$ at these times, (N + 1,), float64. `eta`: a Python float, ≥ 0. `noise`: (N, B, …), in the dtype of `x`; `noise[i]` is for the step from `times[i]`.
# - Returns the last state, (B, …), in the dtype of `x`. The last step gets its noise like all others: the list ends shortly *before* the data.
# - The clock is not always that of the course: in the cases here times run up to 13.
#
# <details><summary>Hint</summary>
#
# `times.diff()` holds all the $dt$, with their sign. As Python floats, coefficients change no dtype: `f[i].item()`.
#
# </details>


# %%
def sample_between(
    score: Callable, x: Tensor, times: Tensor, f: Tensor, g2: Tensor, eta: float, noise: Tensor
) -> Tensor:
    """Euler–Maruyama for the family between the probability-flow ODE (η = 0) and the reverse SDE (η = 1).

    Arguments:
        score: (x, t) → the score, with t a Python float.
        x: The state at times[0], (B, …).
        times: float64 (N + 1,), descending.
        f, g2: Drift and squared diffusion coefficient at the times, float64 (N + 1,).
        eta: How much noise.
        noise: The z of each step, (N, B, …).
    """
    # BEGIN SOLUTION
    steps = zip(times.tolist(), times.diff().tolist(), f.tolist(), g2.tolist(), noise, strict=False)
    for t, dt, pull, power, z in steps:
        drift = pull * x - (1 + eta**2) / 2 * power * score(x, t)
        x = x + drift * dt + eta * (power * abs(dt)) ** 0.5 * z
    return x
    # END SOLUTION


# %%
if hw.check(sample_between):
    start, drawn = torch.randn(10, 1, 28, 28, generator=g), {}
    for eta in (0.0, 1.0, 2.0):
        noise = torch.randn(50, *start.shape, generator=g)
        drawn[f"η = {eta:g}"] = sample_between(digit_score(torch.arange(10)), start, *grid(50), eta, noise)
    plots.rows(list(drawn.values()), labels=list(drawn), title="50 steps from the same first state")
    steps, etas = torch.tensor([25, 50, 100, 200, 400]), torch.arange(0, 1.6, 0.1)
    off = {f"η = {eta}": torch.stack([(end_variance(eta, n) - 1).abs() for n in steps.tolist()]) for eta in (0, 1, 2)}
    claim("twice the steps, half the error, for each η", all(1.8 < line[-2] / line[-1] < 2.2 for line in off.values()))
    plots.curves(steps, off, "number of steps", "error of the variance, relative", logx=True, logy=True)
    wide = torch.stack([end_variance(eta, 400, start=2.0) for eta in etas.tolist()])
    claim("the ODE keeps a wrong start, the SDE forgets it", abs(wide[0] - 2) < 0.02 and abs(wide[10] - 1) < 0.02)
    plots.curves(etas, {"twice at the start": wide}, "η", "variance at the end, relative")

# %% [markdown]
# **What to see.** Above: one start, three samplers. The ODE's digits are clean; with $\eta = 1$ there is a trace of grain, with $\eta = 2$ much of it: 50 steps are too long for so strong a pull. The middle: for $\mathcal N(0, \frac14)$ data every $\eta$ leads to the right variance as the steps get shorter, with an error like one over their number. More noise costs more steps. Below: the variance at the end, if at $t = 1$ it was twice what it should be.
#
# **Question.** The last figure says why anybody would take $\eta>0$. Explain it: split the equation into the ODE and the rest. What kind of dynamics is the rest, and what does it leave unchanged?
#
# <!-- BEGIN SOLUTION -->
# The rest is $-\frac12\eta^2g^2\,s\,dt+\eta\,g\,d\bar w$. With $dt = -\lvert dt\rvert$ and $\delta = \frac12\eta^2g^2\lvert dt\rvert$ it is $\delta\,s+\sqrt{2\delta}\,z$: Langevin dynamics at time $t$, whose equilibrium is $p_t$. So each step of the family is a step of the ODE and a step of a corrector, in one. If the cloud is right, the corrector does nothing to its density. If it is wrong, by its start, by earlier steps or by errors of the score, it is pulled back towards $p_t$. The ODE is a map: whatever is wrong at the start is carried to the end. What the noise costs is shorter steps, for the pull has grown by the factor $1+\eta^2$. (And a score that is wrong itself is not mended: the corrector then pulls towards the wrong density.)
# <!-- END SOLUTION -->

# %% [markdown]
# ## 6. A log-density with its error (5 points)
#
# ●●●●○ · 35 minutes · read again: sections 3.4 and 6 of the notebook
#
# Along the probability-flow ODE, $\dot x = u(x, t)$, a density changes by the trace of the Jacobian $J = \partial u/\partial x$. From data at $t_0\approx 0$ to noise at $t_N = 1$,
#
# $$\log p(x_0) = \log\mathcal N(x_1; 0, I)+\int_{t_0}^{1}\mathrm{tr}\,J(x_t, t)\,dt.$$
#
# A trace of D values takes D derivatives of the network; for an image that is too much. A random probe $v$ with $\mathbb E\,vv^\top = I$ takes one, $Jv$, and $v^\top Jv$ has the mean $\mathrm{tr}\,J$. So K probes give K estimates of the integral. Their mean is the estimate to report, and from their differences one can tell how far it may be off: its **standard error**, the estimated standard deviation of that mean. For this the probes must be independent. Each one is drawn once, and then kept along the whole way: the estimates of one probe at neighbouring times go wrong together.
#
# **Write** `estimated_log_prob(end, times, probes, products)`, which gives the estimate and its standard error, for a walk that has been done already.
#
# - `end`: $x_1$, where the walks of the samples end at the last of the times, (B, …), float32 or float64. `times`: float64, (N + 1,), ascending, N ≥ 1, with steps of different lengths.
# - `probes`: the $v$, (K, B, …), K ≥ 2, of random signs or normal. `products`: (N, K, B, …); `products[i, k]` is $Jv$ at `times[i]` for the probe `probes[k]`. Both have the dtype of `end`.
# - Take the integral by the left end of each step: the trace at `times[i]` holds until `times[i + 1]`.
# - Returns `(log_prob, error)`, in nats: both (B,), in the dtype of `end`.
#
# <details><summary>Hint 1</summary>
#
# First one number for each probe and sample, (K, B): its own estimate of the whole integral. Only then compare the probes.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The variance of K numbers, estimated from them, divides by K − 1; that of their mean is smaller by K. And $\log\mathcal N(x; 0, I)$ is a sum over all values of a sample.
#
# </details>


# %%
def estimated_log_prob(end: Tensor, times: Tensor, probes: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Hutchinson's estimate of the log-density under the probability-flow ODE, and its standard error.

    Arguments:
        end: The state at the last time, (B, …).
        times: float64 (N + 1,), ascending.
        probes: The v, (K, B, …).
        products: J v at times[:-1], (N, K, B, …).

    Returns:
        The estimate and its standard error, both (B,).
    """
    # BEGIN SOLUTION
    traces = (probes * products).reshape(*products.shape[:3], -1).sum(-1)  # N, K, B
    changes = torch.tensordot(times.diff().to(end.dtype), traces, dims=1)
    prior = -(end.square() + math.log(2 * math.pi)).reshape(len(end), -1).sum(1) / 2
    return prior + changes.mean(0), (changes.var(0) / len(changes)).sqrt()
    # END SOLUTION


# %%
if hw.check(estimated_log_prob):
    D, B, unit = 10, 100, torch.eye(10, dtype=torch.float64)
    mixture = GaussianMixture(1.2 * draw(3, D), torch.stack([0.1 * m @ m.mT + 0.2 * unit for m in draw(3, D, D)]))
    end, times, jacobians = walk(mixture, x0 := mixture.sample(B, g), 60)

    def estimate(probes):
        return estimated_log_prob(end, times, probes, torch.einsum("nbde,kbe->nkbd", jacobians, probes))

    truth, counts = mixture.log_prob(x0, vp, 1e-3), torch.tensor([2, 4, 8, 16, 32, 64, 128, 256])
    exact, _ = estimate(D**0.5 * unit[:, None].expand(-1, B, -1))  # the mean over all axes, √D long, is the trace
    signs = torch.randint(2, (256, B, D), generator=g).double() * 2 - 1
    values, errors = map(torch.stack, zip(*[estimate(signs[:K]) for K in counts.tolist()], strict=True))
    said, seen, to_truth = (part.square().mean(1).sqrt() for part in (errors, values - exact, values - truth))
    within = ((values - exact).abs() < 2 * errors).double().mean(1)
    claim("the standard error says how far the exact traces are, to 25 %", (said / seen - 1).abs().max() < 0.25)
    claim("from 64 probes on, two of them hold 90 to 99 of 100", bool(((within >= 0.9) & (within <= 0.99))[-3:].all()))
    claim("the truth stays further away than that", to_truth[-1] > 1.3 * said[-1])
    lines = {"standard error": said, "from exact traces": seen, "from the truth": to_truth}
    plots.curves(counts, lines, "number of probes K", "nats, root mean square", logx=True, logy=True)

# %% [markdown]
# **What to see.** Four times the probes, half the error. The standard error follows the true distance without knowing it. But what it measures is the distance to the result with exact traces. The truth is somewhere else: 60 steps of Euler's rule have an error of their own. No number of probes removes it, and no standard error shows it.
#
# **Question.** (a) An average of log-densities over many test images needs only one probe for each. Why? (b) The exponential of `log_prob` is an estimate of $p(x_0)$. Is it right on average? (c) Random signs or normal numbers: which probes err less, and when do signs not err at all?
#
# <!-- BEGIN SOLUTION -->
# (a) Each estimate is right on average, so their mean over images is, too; its error is that of all probes together, and usually the images differ among themselves by more than that. (b) No, it is too large: by Jensen's inequality the mean of an exponential is above the exponential of the mean, for normal errors by the factor $e^{\text{error}^2/2}$. With an error of 10 nats this is $e^{50}$, so keep to logarithms. (c) Only the symmetric part $S = (J+J^\top)/2$ counts. The variance of $v^\top Jv$ is $2\sum_{i,j}S_{ij}^2$ for normal probes. For signs it is the same without the diagonal, for $v_i^2 = 1$ makes no error. So signs are never worse, and they are exact where $S$ is diagonal, as for data whose coordinates are independent.
# <!-- END SOLUTION -->

# %% [markdown]
# ## Recap
#
# - A linear SDE is solved by two equations: one for the mean, $m' = fm$, and one for the variance, $V' = 2fV+g^2$.
# - Read from right to left, they give the SDE of any path along which noise is added; a moving centre takes a constant in the drift. All these SDEs are Brownian motion with the clock $\sigma^2/\alpha^2$, in changing units.
# - Noise with a covariance $LL^\top$ has the target $-L^{-\top}\epsilon$. In units of the noise the error is $L^\top s+\epsilon$, which is finite for every $L$.
# - A corrector's step that depends on the place changes what the corrector leaves unchanged. In many dimensions hardly, in few dimensions badly.
# - Between ODE and SDE lies a family, each member a step of the ODE plus a corrector. Noise forgets errors, and asks for shorter steps.
# - Hutchinson's estimate comes with a standard error, if each probe is kept along the way. It does not contain the error of the steps.
#
# **Pitfalls**
#
# - Backwards in time, $dt<0$. Under the root stands $\lvert dt\rvert$, and the corrector's $\delta$ is no $dt$ at all.
# - $g$ or $g^2$, $\sigma$ or $\sigma^2$, $\sqrt{2\delta}$ or $\delta$: the drift has variances in it, the noise deviations.
# - A formula with $1-e^{-y}$ in it: `expm1`. A formula that divides by $\sigma$ fails at the data; often there is another form that does not.
# - Samples are rows: $L\epsilon$ is `eps @ factor.mT`.
# - Norms and sums over the values of a sample, means over probes; nothing over the batch.
#
# ## Hand in
#
# Restart the kernel, run all cells, and look for the six lines with ✓ and the name of a function. (The other lines with ✓ are claims about the figures.) Save, and hand in this file as it is: `hw4_score_sde.ipynb`. Functions are found by name, so do not rename them. An exercise that you did not finish may stay as it is; it costs its own points and no others.
