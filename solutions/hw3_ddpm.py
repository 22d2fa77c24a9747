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
# # Homework 3: denoising diffusion, next to the textbook
#
# The notebook [*Denoising diffusion*](../notebooks/03_ddpm.ipynb) went straight through the theory, mostly in steps of one. It mentioned some turns on the way; here you take them, and carry them through. You will practise
#
# - to repair a schedule that does not end in noise;
# - to find $x_s$ from $x_t$ and $x_0$, across any number of skipped steps;
# - to move between $x_0$, $\epsilon$ and $v$, and to say where it cannot be done;
# - to read off what the bound on the likelihood weighs, and for which $\Sigma_\theta$;
# - to sample in fewer steps than the model was trained for;
# - to compute the whole bound of a model, exactly, and hold it against the truth.
#
# | | you write | points | difficulty | minutes |
# |---|---|---|---|---|
# | 1 | `perturb_zero_snr` | 2 | ●○○○○ | 10 |
# | 2 | `skip_posterior` | 3 | ●●○○○ | 20 |
# | 3 | `complete` | 2 | ●●○○○ | 15 |
# | 4 | `x0_weight` | 4 | ●●●○○ | 25 |
# | 5 | `sample_subset` | 4 | ●●○○○ | 20 |
# | 6 | `gaussian_bound` | 5 | ●●●●○ | 45 |
# | | | **20** | | **135** |
#
# **Symbols** are those of the lecture and of the README's [symbol ledger](../README.md#symbols); new ones are said where they first stand. You need pen and paper for 2, 4 and 6.

# %% [markdown]
# ## How it works
#
# Replace each `raise NotImplementedError` by your code, and run the cell below it. `hw.check` tries your function on a few cases and says ✓, or ✗ and what differs (or · while nothing is written yet); some mistakes it knows by sight. When all is right, the cell goes on and draws a figure with *your* function.
#
# - **Keep names, arguments and results as they are asked for.** Work in as many cells as you like, and write helpers if you want them; the six functions are found by their names.
# - **Hidden cases count too.** In each exercise 1 point is for cases like those that you can try here, with other numbers. The rest is for cases you have not seen: other shapes, a batch of one, float64, the first and the last time.
# - **Leave inputs unchanged.** `x += 1` and functions that end in `_` change a tensor that is not yours.
# - **Results have the dtype of the image argument**, unless said otherwise. Good practice: work out coefficients in float64, and cast them last, for near the data $1-\bar\alpha_t$ loses its digits in float32.
# - **Write the formulas out.** The course's kernels that do the same (`chain.posterior`, `chain.bridge`, `samplers.ddpm`, …) are refused inside your functions. Your own earlier functions are welcome.
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
from dgm_course.denoisers import clipped
from dgm_course.paths import DiscretePath
from dgm_course.schedules import linear_betas
from dgm_course.viz import plots

hw = homework.load("hw3")
g = torch.Generator().manual_seed(3)  # where all chance in the figures comes from

# %% [markdown]
# Wherever it stands, `alpha_bars` is a table of $\bar\alpha_0, \dots, \bar\alpha_T$ in float64, of shape (T + 1,), with $\bar\alpha_0 = 1$: the number $\bar\alpha_t$ is `alpha_bars[t]`.
# Images have shape (B, …), whatever comes after B, and in exercises 1 to 4 **each image of a batch has its own time** (in 3, its own $\bar\alpha$): `t` is an int64 tensor of shape (B,), and so is `s`.
#
# So a coefficient has shape (B,) and an image (B, 1, 28, 28), and they cannot be multiplied as they are. This helper does it; you may use it wherever you like.


# %%
def per_image(coefficient: Tensor, like: Tensor) -> Tensor:
    """A number for each image, (B,), in the dtype of `like` and shaped to multiply it: (B, 1, …, 1)."""
    return coefficient.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


digits, labels = data.images(data.load("mnist", "test"))
chosen = torch.stack([digits[labels == c][0] for c in range(10)])  # one digit of each class
chain = DiscretePath(linear_betas(1000))
alpha_bars = chain.alpha_bars

# %% [markdown]
# The figures of exercises 4 and 5 need a trained model. The course's digit model lives on a continuous path, with times from 0 to 1. We read it at 1001 places, as a table. Its last entry is 0, as at the end of exercise 1's chain.

# %%
digit_model = checkpoints.load("mnist-unet")
table = digit_model.path.alpha(torch.arange(1001, dtype=torch.float64) / 1000) ** 2  # ᾱ_0 … ᾱ_1000


@torch.no_grad()
def guess(x, t, y):
    """The model's x̂_0 for images at step t of 1000, with the labels y."""
    return clipped(digit_model)(x, t / 1000, y=y)


# %%
def draw(y, steps, slip=False):
    """A digit for each label in y, by your function of exercise 5. With the slip, a leap gets the noise of a single step."""
    start = torch.randn(len(y), 1, 28, 28, generator=g)
    noise = torch.randn(steps, *start.shape, generator=g)
    times = torch.linspace(1000, 0, steps + 1).round().long()
    if slip:  # what multiplies z then is √β_t instead of √β_{t|s}, the noise of the whole leap
        abar, before, after = table[times[:-1]], table[times[:-1] - 1], table[times[1:]]
        wrong = ((1 - abar / before) / (1 - abar / after)).sqrt()
        noise = noise * wrong.float().reshape(-1, 1, 1, 1, 1)
    return sample_subset(lambda x, t: guess(x, t, y), start, times, table, noise)


# %% [markdown]
# ## 1. A chain that ends in noise (2 points)
#
# ●○○○○ · 10 minutes · read again: section 2.4 of the notebook
#
# Sampling starts from $\mathcal N(0, I)$, so the chain should end there. It does not, quite: the factor of the image at the end is $\sqrt{\bar\alpha_T} > 0$. With linear $\beta$ it is 0.006. On the schedule that Stable Diffusion was trained with it is 0.068, and that is enough to learn from: such a model knows the mean brightness of a picture from $x_T$, expects to be told it, and can draw neither a very dark nor a very bright one.
#
# The repair ([Lin et al., 2024](https://arxiv.org/abs/2305.08891)) takes the factor of the image, $\sqrt{\bar\alpha_t}$, at all times. It shifts the factors by one number so that the last is 0, and then stretches them by one factor so that the first is 1 again. Call the result $\alpha^*(t)$. The noise gets the factor that keeps data of variance 1 at variance 1:
#
# $$x_t = \alpha^*(t)\,x_0+\sigma^*(t)\,\epsilon,\qquad \alpha^*(t)^2+\sigma^*(t)^2 = 1.$$
#
# (The paper keeps the value at $t = 1$; we keep the one at $t = 0$.) At $T$ the signal-to-noise ratio, $\alpha^{*2}/\sigma^{*2}$, is now zero.
#
# **Write** `perturb_zero_snr(x0, t, eps, alpha_bars)`, which noises each image to its own time under the repaired schedule.
#
# - `x0`, `eps`: (B, …), float32 or float64. `t`: (B,), int64, from 0 to T, both included. `alpha_bars`: (T + 1,), the table *before* the repair.
# - Returns `xt`: (B, …), in the dtype of `x0`.
#
# <details><summary>Hint</summary>
#
# Write the shift and the stretch as one formula for $\alpha^*(t)$, and try it at $t = 0$ and $t = T$. Repair the whole table first; then look up, for each image, its own entry.
#
# </details>


# %%
def perturb_zero_snr(x0: Tensor, t: Tensor, eps: Tensor, alpha_bars: Tensor) -> Tensor:
    """Noise each image to its own time, on the schedule shifted and stretched to end in pure noise.

    Arguments:
        x0, eps: Clean images and noise, (B, …).
        t: A time for each image, int64 (B,), 0 ≤ t ≤ T.
        alpha_bars: The table before the repair, float64 (T + 1,).

    Returns:
        xt, (B, …).
    """
    # BEGIN SOLUTION
    roots = alpha_bars.sqrt()
    signal = ((roots - roots[-1]) / (1 - roots[-1]))[t]
    return per_image(signal, x0) * x0 + per_image((1 - signal**2).sqrt(), x0) * eps
    # END SOLUTION


# %%
if hw.check(perturb_zero_snr):
    stable = DiscretePath(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)
    shown, many = chosen[:6], 2000
    x0, t = shown.repeat(many, 1, 1, 1), torch.full((6 * many,), 1000)
    eps = torch.randn(x0.shape, generator=g)
    ends = [stable.perturb(x0, t, eps), perturb_zero_snr(x0, t, eps, stable.alpha_bars)]
    means = [end.unflatten(0, (many, 6)).mean(0) / 0.068 for end in ends]
    draws = [end[:6] for end in ends]
    names = ["x₀", "one draw", "one draw, repaired", "mean", "mean, repaired"]
    plots.rows([shown, *draws, *means], labels=names)

# %% [markdown]
# **What to see.** Six digits at $t = T$, on Stable Diffusion's schedule before and after the repair. In one draw the eye finds nothing but noise. The means of 2,000 draws (made $1/0.068$ times as strong) tell the two apart: before the repair the digit is still there, after it there is none.
#
# **Question.** On the repaired chain a network that predicts $\epsilon$ has an easy task at $t = T$, and its answer is of no use. Why?
#
# <!-- BEGIN SOLUTION -->
# There $x_T = \epsilon$. The network may simply repeat its input, and has then said nothing about the image: $\hat x_0 = (x_T-\epsilon_\theta)/0$ is 0/0 for the perfect answer, and infinite for any other. This is why the repair goes together with predicting $v$ or $x_0$; exercise 3 comes back to it.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 2. Back over skipped steps (3 points)
#
# ●●○○○ · 20 minutes · read again: section 3.2 of the notebook
#
# The lecture derives $q(x_{t-1}\mid x_t, x_0)$, one step back when the image is known. A fast sampler leaps: from $t = 400$ to $s = 350$, say. For that it needs $q(x_s\mid x_t, x_0)$ for any $0\le s<t$, which is a Gaussian too.
#
# **Write** `skip_posterior(xt, x0, s, t, alpha_bars)`, which gives its mean and its variance.
#
# - `xt`, `x0`: (B, …), float32 or float64. `s`, `t`: (B,), int64, with 0 ≤ s < t ≤ T in each place. `alpha_bars`: (T + 1,).
# - Returns `(mean, variance)`: (B, …) and (B,), the variance being one number for each image; both in the dtype of `xt`.
# - At s = 0 the mean is $x_0$ and the variance 0. $\bar\alpha_t = 0$ is allowed, as at the end of exercise 1's chain.
#
# <details><summary>Hint 1</summary>
#
# What does the chain do to $x_s$ on its way to $t$? Find the one step that does the same, and read section 3.2 of the notebook again with that step. (The slide text of this derivation has lost an $x_0$ on the way.)
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $x_t = \sqrt{a}\,x_s+\sqrt{1-a}\,z$, where $z$ is the noise of these steps alone and $a = \bar\alpha_t/\bar\alpha_s$. So $a$ takes the place of $\alpha_t$, and $\bar\alpha_s$ that of $\bar\alpha_{t-1}$. Nothing that you need is divided by $\bar\alpha_t$ itself.
#
# </details>


# %%
def skip_posterior(xt: Tensor, x0: Tensor, s: Tensor, t: Tensor, alpha_bars: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_s | x_t, x_0).

    Arguments:
        xt, x0: Images at time t, and clean, (B, …).
        s, t: Times for each image, int64 (B,), 0 ≤ s < t.
        alpha_bars: float64 (T + 1,).

    Returns:
        The mean, (B, …), and the variance, (B,).
    """
    # BEGIN SOLUTION
    abar_s, abar_t = alpha_bars[s], alpha_bars[t]
    kept = abar_t / abar_s  # the share of x_s's variance that is left at t; the step adds 1 - kept
    of_xt = kept.sqrt() * (1 - abar_s) / (1 - abar_t)
    of_x0 = abar_s.sqrt() * (1 - kept) / (1 - abar_t)
    var_s = (1 - kept) * (1 - abar_s) / (1 - abar_t)
    return per_image(of_xt, xt) * xt + per_image(of_x0, xt) * x0, var_s.to(xt.dtype)
    # END SOLUTION


# %%
if hw.check(skip_posterior):
    x0, times = chosen[[2, 5, 8]], [350, 300, 250, 200, 150, 100, 50, 0]
    t = torch.full((3,), 400)
    xt = chain.perturb(x0, t, torch.randn(x0.shape, generator=g))
    means = [skip_posterior(xt, x0, torch.full((3,), s), t, alpha_bars)[0] for s in times]
    plots.film([xt, *means], times=["x₄₀₀", *map(str, times)], title="x₄₀₀, and the mean of q(x_s | x₄₀₀, x₀) for s = …")

    def variances(t):
        s, blank = torch.arange(t), torch.zeros(t, 1, dtype=torch.float64)
        return skip_posterior(blank, blank, s, torch.full((t,), t), alpha_bars)[1]

    ends = {f"t = {t}": t for t in (100, 400, 1000)}
    lines = {name: variances(t) for name, t in ends.items()}
    plots.curves({name: torch.arange(t) for name, t in ends.items()}, lines, "s", "variance of q(x_s | x_t, x_0)")

# %% [markdown]
# **What to see.** Above: the further the leap, the more of the digit and the less of the noise is in the mean, until at $s = 0$ it *is* the digit. Below: the variance falls towards 0 at both ends. At $s = 0$ we know $x_0$, at $s = t$ we would know $x_t$; between them hangs a bridge, and it is widest somewhere on the way.
#
# **Question.** For which $\bar\alpha_s$ is it widest? (Write the variance as a function of $u = \bar\alpha_s$.)
#
# <!-- BEGIN SOLUTION -->
# The variance is $\frac{(1-u)(1-\bar\alpha_t/u)}{1-\bar\alpha_t} = \frac{1+\bar\alpha_t-u-\bar\alpha_t/u}{1-\bar\alpha_t}$. Its second derivative is negative, and the first vanishes at $u^2 = \bar\alpha_t$: it is widest where $\bar\alpha_s = \sqrt{\bar\alpha_t}$, the geometric mean of the values at the two ends. There it is $\frac{(1-\sqrt{\bar\alpha_t})^2}{1-\bar\alpha_t} = \frac{1-\sqrt{\bar\alpha_t}}{1+\sqrt{\bar\alpha_t}}$.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 3. All three from one (2 points)
#
# ●●○○○ · 15 minutes · read again: sections 4.6 and 7 of the notebook
#
# "Modeling the noise leads to easier learning", the slide text reads, and adds: "Not always". You have met a place where it cannot work at all. Many models predict
#
# $$v = \sqrt{\bar\alpha_t}\,\epsilon-\sqrt{1-\bar\alpha_t}\,x_0$$
#
# instead ([Salimans and Ho, 2022](https://arxiv.org/abs/2202.00512)). Given $x_t$, a prediction of $v$ always fixes the rest. One of $\epsilon$ does so too, except at one end.
#
# **Write** `complete(xt, value, given, alpha_bar)`, which works out all three of $x_0$, $\epsilon$ and $v$ from $x_t$ and one of the last two.
#
# - `xt`, `value`: (B, …), float32 or float64. `given`: `"v"` or `"eps"`, which of the two `value` is. `alpha_bar`: float64, (B,), the number $\bar\alpha$ of each image, from 0 to 1, **both included**.
# - Returns `(x0, eps, v)`: three tensors (B, …) in the dtype of `xt`.
# - If `given` is `"eps"` and $\bar\alpha$ is 0 for *any* image, raise a `ValueError` whose message names `alpha_bar`: there $\epsilon$ does not determine $x_0$. An error that is seen is better than an image of infinities. All other cases have an answer; with $v$ also $\bar\alpha = 0$.
#
# <details><summary>Hint</summary>
#
# Write $x_t$ and $v$ as a 2×2 matrix times $(x_0, \epsilon)$. What kind of matrix is it, and what is its inverse? No division is needed for `"v"`.
#
# </details>


# %%
def complete(xt: Tensor, value: Tensor, given: str, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, ε and v from x_t and one of ε and v.

    Arguments:
        xt, value: Noisy images, and what was predicted, (B, …).
        given: "v" or "eps": what `value` is.
        alpha_bar: ᾱ of each image, float64 (B,), 0 ≤ ᾱ ≤ 1.

    Raises:
        ValueError: If ε is given and an ᾱ is 0.
    """
    # BEGIN SOLUTION
    signal, noise = per_image(alpha_bar.sqrt(), xt), per_image((1 - alpha_bar).sqrt(), xt)
    if given == "v":
        return signal * xt - noise * value, noise * xt + signal * value, value.clone()
    if (alpha_bar == 0).any():
        raise ValueError(f"alpha_bar must be above 0 if eps is given; got {alpha_bar.tolist()}")
    x0 = (xt - noise * value) / signal
    return x0, value.clone(), signal * value - noise * x0
    # END SOLUTION


# %%
if hw.check(complete):
    x0, (eps, error) = chosen[3:4], torch.randn(2, 1, 1, 28, 28, generator=g)
    levels, columns = [1, 0.9, 0.5, 0.1, 0.01, 0.001, 0.0001, 0], []
    for level in levels:
        alpha, sigma = level**0.5, (1 - level) ** 0.5
        xt, v = alpha * x0 + sigma * eps, alpha * eps - sigma * x0
        abar = torch.tensor([level], dtype=torch.float64)
        from_v = complete(xt, v + 0.1 * error, "v", abar)[0]
        from_eps = complete(xt, eps + 0.1 * error, "eps", abar)[0] if level else torch.zeros_like(xt)
        columns.append(torch.cat([xt, from_eps, from_v]))
    names, rows = [f"{level:g}" for level in levels], ["xₜ", "x₀ from ε", "x₀ from v"]
    plots.film(columns, times=names, labels=rows, title="from a prediction with a small error, at ᾱ = …")

# %% [markdown]
# **What to see.** The prediction was right up to a small error, noise of standard deviation 0.1, in both of the lower rows. From $\epsilon$ the recovered digit drowns as $\bar\alpha$ falls, and at $\bar\alpha = 0$ there is none (the grey square). From $v$ it stays as good as the prediction was, from one end to the other.
#
# **Question.** Why does $v$ never magnify an error? Compare the lengths of $(x_t, v)$ and $(x_0, \epsilon)$.
#
# <!-- BEGIN SOLUTION -->
# With $\sqrt{\bar\alpha} = \cos\varphi$ and $\sqrt{1-\bar\alpha} = \sin\varphi$, $(x_t, v)$ is $(x_0, \epsilon)$, rotated by the angle $\varphi$ (clockwise). A rotation keeps lengths. So an error $\delta$ of $v$ becomes an error of $(x_0, \epsilon)$ of the same length: $-\delta\sin\varphi$ in $x_0$ and $\delta\cos\varphi$ in $\epsilon$. From $\epsilon$, an error $\delta$ becomes $-\delta\tan\varphi$ in $x_0$, and the tangent has no bound. (This compares errors of one size. A network's errors in $\epsilon$ and in $v$ are not of one size: near the noise end $\epsilon$ is easy to guess. Which of them learns better is for an experiment, as in section 9 of the notebook.)
# <!-- END SOLUTION -->

# %% [markdown]
# ## 4. What the bound weighs (4 points)
#
# ●●●○○ · 25 minutes · read again: sections 4.4 and 4.6 of the notebook
#
# In the bound, a step from $t$ to $s$ costs $D_{KL}\bigl(q(x_s\mid x_t,x_0)\,\Vert\,p_\theta(x_s\mid x_t)\bigr)$. The model $p_\theta$ is a Gaussian whose mean is that of exercise 2 with a guess $\hat x_0$ in the place of $x_0$, and whose variance is $\sigma^2$ in each coordinate. For one coordinate,
#
# $$D_{KL} = w\,(x_0-\hat x_0)^2+C.$$
#
# The number $w$ depends on how $\Sigma_\theta = \sigma^2 I$ was chosen, and so does $C$. *(The slides choose twice: "set to its upper bound" on one, $\tilde\beta_t$ on a later one. Both may be done, but it must be said which. The slide's weight $1/(2\tilde\beta_t)$ of the squared distance of the means belongs to the second choice alone; there its "$+\,C$" is 0.)*
#
# **Write** `x0_weight(s, t, alpha_bars, variance)`, which gives $w$ and $C$ for a step from $t$ to $s$, maybe over skipped steps.
#
# - `s`, `t`: (B,), int64, with 1 ≤ s < t ≤ T. `alpha_bars`: (T + 1,); $\bar\alpha_t = 0$ is allowed. `variance`: `"posterior"` for $\sigma^2 = \tilde\beta$, the variance of exercise 2, or `"beta"` for $\sigma^2 = 1-\bar\alpha_t/\bar\alpha_s$, the noise that the steps from $s$ to $t$ add.
# - Returns `(weight, constant)`: both (B,), float64, in nats.
#
# Why $s\ge 1$? At $s = 0$ the posterior is a point, its variance is 0. With $\sigma^2 = \tilde\beta$ the weight would be infinite, with $\beta$ the constant. *(The slide text has the first of these: $L_0$ with the weight $1/(2\tilde\beta_1)$.)* The last step is not a KL divergence anyway; it gets its own treatment in exercise 6.
#
# <details><summary>Hint</summary>
#
# First the KL divergence of two Gaussians on the line, $\mathcal N(m_1, \tilde\beta)$ and $\mathcal N(m_2, \sigma^2)$: it is $(m_1-m_2)^2/(2\sigma^2)$ plus something without means. The two means differ only in what stands for $x_0$, so $m_1-m_2$ is $x_0-\hat x_0$ times a factor that you know. A check for the first choice: its weight is half of the drop of the signal-to-noise ratio, $\bar\alpha/(1-\bar\alpha)$, from $s$ to $t$.
#
# </details>


# %%
def x0_weight(s: Tensor, t: Tensor, alpha_bars: Tensor, variance: str) -> tuple[Tensor, Tensor]:
    """The weight of (x_0 − x̂_0)² in the bound's term for a step from t to s, and the constant beside it.

    Arguments:
        s, t: Times, int64 (B,), 1 ≤ s < t.
        alpha_bars: float64 (T + 1,).
        variance: Σ_θ: "posterior" or "beta".
    """
    # BEGIN SOLUTION
    abar_s, abar_t = alpha_bars[s], alpha_bars[t]
    added = 1 - abar_t / abar_s
    lower = added * (1 - abar_s) / (1 - abar_t)
    sigma2 = lower if variance == "posterior" else added
    pull = abar_s.sqrt() * added / (1 - abar_t)  # the factor of x_0 in the mean
    ratio = lower / sigma2
    return pull**2 / (2 * sigma2), (ratio - 1 - ratio.log()) / 2
    # END SOLUTION


# %%
if hw.check(x0_weight):
    t, x0 = torch.arange(1000, 20, -20), digits[::100]  # 50 equal steps without the last one, the step to the data
    errors = []
    for now in t.tolist():
        xt = digit_model.path.perturb(x0, now / 1000, torch.randn(x0.shape, generator=g))
        errors.append((x0 - guess(xt, now, labels[::100])).square().mean())
    both = {"Σ = β̃": x0_weight(t - 20, t, table, "posterior"), "Σ = β": x0_weight(t - 20, t, table, "beta")}
    cost = {name: (w * torch.stack(errors) + C) / math.log(2) for name, (w, C) in both.items()}
    plots.curves(t, {name: w for name, (w, C) in both.items()}, "t", "weight of (x₀ − x̂₀)²", logy=True)
    plots.curves(t, cost, "t", "bits per pixel of a step", logy=True)
    claim("the five steps next to the data cost more than all others", all(c[-5:].sum() > c[:-5].sum() for c in cost.values()))
    claim("Σ = β̃ costs fewer bits than Σ = β", cost["Σ = β̃"].sum() < cost["Σ = β"].sum())

# %% [markdown]
# **What to see.** Above: an error next to the data weighs some 200,000 times ($\beta$) or 800,000 times ($\tilde\beta$) as much as one next to the noise. Below: what these steps cost the digit model on 20 real digits, with its errors put in. Most is paid at the end, for detail. And mind the order of the lines: $\tilde\beta$ weighs errors *more* and yet costs *less*, since with $\beta$ each step pays the constant $C$. The digit model's errors are small, so the true variance of a step is near the lower choice.
#
# **Question.** Take $\sigma^2 = \tilde\beta$ and add up the weights over a descending list of times from $T$ to 1. How does the sum depend on the number of steps?
#
# <!-- BEGIN SOLUTION -->
# Not at all. Each weight is $\frac12(\mathrm{SNR}(s)-\mathrm{SNR}(t))$, so the sum telescopes to $\frac12(\mathrm{SNR}(1)-\mathrm{SNR}(T))$: only the two ends matter. More steps cut the same total finer. What they gain: the weight between $t$ and $s$ is paid with the error at $t$, its noisier end, and with finer cuts that end is closer, where the error is smaller. ([Kingma and others, 2021](https://arxiv.org/abs/2107.00630), make this the starting point of their models.)
# <!-- END SOLUTION -->

# %% [markdown]
# ## 5. Sampling in fewer steps (4 points)
#
# ●●○○○ · 20 minutes · read again: section 6 of the notebook
#
# A thousand calls of the network for one image is a lot. With fewer steps and a fixed variance? "No, it is inappropriate to do so", the slide text reads: the two bounds on the variance of a step, $\tilde\beta$ and $\beta$, move apart. It *is* possible, if all coefficients are made anew for the leap: to a model of $\hat x_0$ it does not matter how $x_t$ was reached. But the quality suffers, for two reasons. Whichever fixed $\Sigma_\theta$ you take fits less well, and a long step back is less and less a Gaussian.
#
# **Write** `sample_subset(denoiser, x, times, alpha_bars, noise)`, which is Algorithm 2 on a descending list of times. For each pair of neighbours $t > s$:
#
# $$\hat x_0 = \mathtt{denoiser}(x, t),\qquad x \leftarrow \text{mean of } q(x_s\mid x_t = x,\ x_0 = \hat x_0)+\sqrt{\beta_{t\mid s}}\;z,\qquad \beta_{t\mid s} = 1-\bar\alpha_t/\bar\alpha_s.$$
#
# This is the upper choice of $\Sigma_\theta$. In the $i$-th step, counted from 0, $z$ is `noise[i]`. A step that ends at $s = 0$ gets no noise.
#
# - `denoiser`: a function of an image batch (B, …) and a time, a Python int, that returns $\hat x_0$, (B, …).
# - `x`: the first state, (B, …), at `times[0]`. `times`: int64, (N + 1,), descending, N ≥ 1; it need not begin at T nor end at 0. `alpha_bars`: (T + 1,). `noise`: (N, B, …), in the dtype of `x`.
# - Returns the last state, (B, …), in the dtype of `x`.
#
# <details><summary>Hint</summary>
#
# Your `skip_posterior` does most of the work. It wants a time for each image: `torch.full((len(x),), t)`. `times.tolist()` makes Python ints; pair each of them with the next.
#
# </details>


# %%
def sample_subset(denoiser: Callable, x: Tensor, times: Tensor, alpha_bars: Tensor, noise: Tensor) -> Tensor:
    """Algorithm 2 over a descending list of times, with Σ_θ = β of each leap.

    Arguments:
        denoiser: (x, t) → x̂_0, with t a Python int.
        x: The state at times[0], (B, …).
        times: int64 (N + 1,), descending.
        alpha_bars: float64 (T + 1,).
        noise: The z of each step, (N, B, …).
    """
    # BEGIN SOLUTION
    steps = times.tolist()
    for z, t, s in zip(noise, steps[:-1], steps[1:], strict=True):
        here, there = torch.full((len(x),), t), torch.full((len(x),), s)
        x, _ = skip_posterior(x, denoiser(x, t), there, here, alpha_bars)
        if s > 0:
            x = x + (1 - alpha_bars[t] / alpha_bars[s]).sqrt().to(x.dtype) * z
    return x
    # END SOLUTION


# %%
if hw.check(sample_subset):
    drawn = {f"{steps} steps": draw(torch.arange(10), steps) for steps in (10, 25, 100)}
    plots.rows(list(drawn.values()), labels=list(drawn))
    fours = torch.full((30,), 4)
    cases = {"real": digits[labels == 4][:30], "25 steps": draw(fours, 25), "β of one step": draw(fours, 25, slip=True)}
    plots.rows([x[:10] for x in cases.values()], labels=list(cases))
    real, right, weak = (x.var(0).mean() for x in cases.values())
    claim("over the draws, a pixel varies as much as over real fours, to 25 %", abs(right / real - 1) < 0.25)
    claim("with the noise of single steps it varies less than two thirds as much", weak < real * 2 / 3)

# %% [markdown]
# **What to see.** Above: ten steps already draw digits, with faint specks of noise around them; with more steps the specks go. They come from the upper choice of $\Sigma_\theta$, which leaves more noise in $x_s$ than belongs there: exercise 4 found the true variance near the lower one. Below: fours, real ones, and drawn in 25 steps with the right noise and with noise that is too weak. (Not every drawn digit succeeds, whatever the steps and the noise.)
#
# **Question.** A common slip is to take the noise of a leap from the table of single steps: $\beta_t$ and not $\beta_{t\mid s}$. With leaps of 40 steps the noise is then four to six times too weak, in all leaps but the first; this is the last row. Its digits look clean, each by itself even cleaner than the right ones. What is wrong with them, and how does it come about?
#
# <!-- BEGIN SOLUTION -->
# They are too much alike. A state at $s$ should hold noise of variance $1-\bar\alpha_s$, as the denoiser saw it in training. Here it holds less: step after step the state is pulled towards the mean of what is possible, and too little pushes it away again. The variance of a pixel over the draws is about half of that over real fours. Looking at pictures one at a time does not show this; looking at the distribution does.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 6. The whole bound, exactly (5 points)
#
# ●●●●○ · 45 minutes · read again: sections 3.4, 4.4 and 4.5 of the notebook
#
# On digits nobody knows how far the bound lies above the truth. So take data whose truth is known: one coordinate, $x_0\sim\mathcal N(m, V)$, with the entropy $\mathbb E[-\log q(x_0)] = \frac12\log(2\pi eV)$. The best denoiser, $\hat x_0 = \mathbb E[x_0\mid x_t]$, is known too. Give the model this denoiser and $\sigma^2 = \beta_{t\mid s} = 1-\bar\alpha_t/\bar\alpha_s$ in each step. Then the bound, **on average over the data**, can be written down without a single draw.
#
# **Write** `gaussian_bound(mean, var, alpha_bars, times)`, which gives its terms for the chain that visits `times` only.
#
# - `mean`, `var`: $m$ and $V$, Python floats, $V>0$. `alpha_bars`: (T + 1,). `times`: int64, (N + 1,), descending, its last entry 0, N ≥ 1. The first entry plays the part of $T$; it may be any $t\ge 1$.
# - Returns the expected terms in nats, float64, (N + 1,), in the order of the times:
#   - first $L_T = \mathbb E\,D_{KL}\bigl(q(x_T\mid x_0)\,\Vert\,\mathcal N(0, 1)\bigr)$, at $T$ = `times[0]`;
#   - then, for each pair of neighbours $t>s>0$, the term of exercise 4, $w\;\mathbb E(x_0-\hat x_0)^2+C$;
#   - last $L_0 = \mathbb E[-\log p_\theta(x_0\mid x_t)]$, the step from $t$ = `times[-2]` to 0. Its density is a Gaussian with mean $\hat x_0$ and variance $\beta_{t\mid 0}$. (With $\tilde\beta = 0$ here it would have none, as exercise 4 found. The sampler of exercise 5 adds no noise there; the bound is that of a model that does.)
#
# <details><summary>Hint 1</summary>
#
# What you need of the denoiser is its mean squared error alone, $\mathbb E(x_0-\hat x_0)^2 = \mathrm{Var}(x_0\mid x_t)$. For Gaussians, precisions (one over the variance) add: that of $x_0$ before we look, and that of the look $x_t/\sqrt{\bar\alpha_t}$. Section 3.4 of the notebook has the result.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# With $\mathbb E x_0^2 = m^2+V$ the first term is one line. A test for all of it: with $m = 0$ and $V = 1$ the terms sum to the entropy, whatever the times.
#
# </details>


# %%
def gaussian_bound(mean: float, var: float, alpha_bars: Tensor, times: Tensor) -> Tensor:
    """The expected terms of the bound for N(mean, var) data and the exact denoiser, Σ_θ = β of each step.

    Arguments:
        mean, var: Of the data.
        alpha_bars: float64 (T + 1,).
        times: int64 (N + 1,), descending to 0.

    Returns:
        L_T, the KL terms, L_0, in nats: float64 (N + 1,).
    """
    # BEGIN SOLUTION
    t, s = times[:-1], times[1:]
    clean, noisy = alpha_bars[t], 1 - alpha_bars[t]
    first = (clean * (mean**2 + var) - clean - noisy.log())[:1] / 2
    mmse = var * noisy / (clean * var + noisy)
    weight, constant = x0_weight(s[:-1], t[:-1], alpha_bars, "beta")
    last = (2 * math.pi * noisy[-1:]).log() / 2 + mmse[-1:] / (2 * noisy[-1:])
    return torch.cat([first, weight * mmse[:-1] + constant, last])
    # END SOLUTION


# %%
if hw.check(gaussian_bound):
    pixel = digits[:, 0, 14, 14].double()  # in the middle of the digits
    steps = torch.tensor([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])

    def gap(mean, var):
        bounds = [gaussian_bound(mean, var, alpha_bars, chain.times(n)).sum() for n in steps.tolist()]
        return (torch.stack(bounds) - math.log(2 * math.pi * math.e * var) / 2) / math.log(2)

    gaps = {"V = 0.04": gap(0.0, 0.04), "V = 4": gap(0.0, 4.0), "a pixel": gap(pixel.mean().item(), pixel.var().item())}
    claim("the bound is never below the entropy", all((bits > 0).all() for bits in gaps.values()))
    claim("from 100 to 1000 steps the gap shrinks to a tenth", all(9 < bits[-4] / bits[-1] < 11 for bits in gaps.values()))
    claim("for N(0, 1) there is no gap, in any number of steps", gap(0.0, 1.0).abs().max() < 1e-9)
    plots.curves(steps, gaps, "number of steps", "bound − entropy, in bits", logx=True, logy=True)

# %% [markdown]
# **What to see.** The gap between the bound and the truth, for three Gaussians; one has the mean and the variance (0.78) of a pixel in the middle of the digits. For many steps the lines are straight and fall by a factor of ten for ten times the steps: the bound becomes exact like 1 / (number of steps).
#
# **Question.** The denoiser is perfect, and each step back of these chains *is* a Gaussian. Where does the gap come from? Why is there none for $\mathcal N(0, 1)$, and why does it fall like one over the number of steps, once there are many?
#
# <!-- BEGIN SOLUTION -->
# Bound minus entropy is the KL divergence between the true walk back and the model's, so it is a sum over steps: $D_{KL}(q(x_T)\Vert p(x_T))$, and for each step the mean of $D_{KL}(q(x_s\mid x_t)\Vert p_\theta(x_s\mid x_t))$. Here both are Gaussians with the same mean, and what differs is the variance: the true one is $\tilde\beta+c^2\,\mathrm{Var}(x_0\mid x_t)$, where $c$ is the factor of $x_0$ in the mean, and the model says $\beta_{t\mid s}$. The two are equal for $V = 1$ and for no other $V$. If the true one is $r$ times the model's, the step costs $\frac12(r-1-\log r)$, which is about $\frac14(r-1)^2$ for $r$ near 1. With many steps $r-1$ is of the order of $1/N$, and $N$ steps cost $N\cdot 1/N^2$. (A trace comes from the start, for $q(x_T)$ is not quite $\mathcal N(0, 1)$: less than $10^{-5}$ bits here.)
# <!-- END SOLUTION -->

# %% [markdown]
# ## Recap
#
# - A chain should end in noise. If it does not, shift and stretch $\sqrt{\bar\alpha_t}$, and predict $v$, for $\epsilon$ says nothing at that end.
# - All formulas of one step hold for a leap from $t$ to $s$, with $\bar\alpha_t/\bar\alpha_s$ in the place of $\alpha_t$ and $\bar\alpha_s$ in that of $\bar\alpha_{t-1}$. So a trained model can be sampled in any number of steps.
# - $(x_t, v)$ is $(x_0, \epsilon)$, rotated. A rotation does not magnify an error; a division by $\sqrt{\bar\alpha_t}$ does.
# - $\Sigma_\theta$ is a choice. It sets the weight *and* the constant of each term, and the bits depend on both.
# - With a perfect denoiser the bound is not yet the truth. For Gaussian data it tends to it like one over the number of steps, up to what $\bar\alpha_T$ leaves.
#
# **Pitfalls**
#
# - $\alpha$ or $\bar\alpha$, one step or a leap, a variance or a deviation: name it before you code it.
# - A formula that divides by $\bar\alpha_t$ fails where $\bar\alpha_t = 0$. Often there is another form that does not.
# - No noise in the step that ends at $s = 0$, and only there.
# - $1-\bar\alpha_t$ in float32 has few digits left near the data. Coefficients first, in float64; then cast.
#
# ## Hand in
#
# Restart the kernel, run all cells, and look for the six lines with ✓ and the name of a function. (The other lines with ✓ are claims about the figures.) Save, and hand in this file as it is: `hw3_ddpm.ipynb`. Functions are found by name, so do not rename them. An exercise that you did not finish may stay as it is; it costs its own points and no others. (Exercise 5 may call your function of exercise 2, and exercise 6 that of exercise 4: then these must be right too.)
