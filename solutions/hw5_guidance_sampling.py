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
# # Homework 5: guidance, and sampling in few steps
#
# The notebooks [*Guidance*](../notebooks/06_guidance.ipynb) and [*Fast sampling*](../notebooks/07_fast_sampling.ipynb) steered a diffusion model, and made it quick. Here you ask what was left open on the way. You will practise
#
# - to push a prediction in two directions at once, in its own units;
# - to lead samples to any of several classes by a classifier;
# - to say exactly which density guided samples have, and that it depends on the sampler;
# - to find the variance that a step back should have, and what it costs to take another;
# - to run DDIM backwards so that it leads back exactly;
# - to build a solver of second order that is exact where it claims to be.
#
# | | you write | points | difficulty | minutes |
# |---|---|---|---|---|
# | 1 | `guided_v` | 3 | ●●○○○ | 15 |
# | 2 | `classifier_step` | 3 | ●●●○○ | 25 |
# | 3 | `guided_moments` | 4 | ●●●○○ | 25 |
# | 4 | `best_variance` | 3 | ●●●○○ | 20 |
# | 5 | `exact_inversion` | 3 | ●●●○○ | 20 |
# | 6 | `sample_linear` | 4 | ●●●●○ | 30 |
# | | | **20** | | **135** |
#
# **Symbols** are those of the lecture and of the README's [symbol ledger](../README.md#symbols): $t = 0$ is data, $x_t = \alpha x_0+\sigma\epsilon$ with $\alpha = \sqrt{\bar\alpha_t}$ and $\sigma = \sqrt{1-\bar\alpha_t}$. Where a formula has two times, their coefficients are $\alpha_t, \sigma_t$ and $\alpha_s, \sigma_s$. New symbols are said where they first stand. You need pen and paper for all six.

# %% [markdown]
# ## How it works
#
# Replace each `raise NotImplementedError` by your code, and run the cell below it. `hw.check` tries your function on a few cases and says ✓, or ✗ and what differs (or · while nothing is written yet); some mistakes it knows by sight. When all is right, the cell goes on and draws a figure with *your* function.
#
# - **Keep names, arguments and results as they are asked for.** Work in as many cells as you like, and write helpers if you want them; the six functions are found by their names.
# - **Hidden cases count too.** In each exercise 1 point is for cases like those that you can try here, with other numbers. The rest is for cases you have not seen: other shapes, a batch of one, float64, the ends of a range.
# - **Leave inputs unchanged.** `x += 1` and functions that end in `_` change a tensor that is not yours.
# - **Results have the dtype of the samples**, unless said otherwise. Good practice: work out coefficients in float64, and cast them last.
# - **Write the formulas out.** The course's kernels that do the same (`guidance.classifier_free`, `samplers.ddim`, `path.posterior`, …) are refused inside your functions. Your own earlier functions are welcome, and so is all of PyTorch.
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
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dgm_course import checkpoints, data, homework, samplers
from dgm_course.checks import claim
from dgm_course.denoisers import clipped, on_path, read_as
from dgm_course.paths import VP, Cosine, DiscretePath
from dgm_course.schedules import linear_betas
from dgm_course.toy import GaussianMixture
from dgm_course.viz import plots

hw = homework.load("hw5")
g = torch.Generator().manual_seed(5)  # where all chance in the figures comes from

# %% [markdown]
# Wherever it stands, `alpha_bars` is a table of $\bar\alpha_0, \dots, \bar\alpha_T$ in float64, of shape (T + 1,), with $\bar\alpha_0 = 1$: the number $\bar\alpha_t$ is `alpha_bars[t]`. A list of `times` is int64, N + 1 numbers for N steps, from the noise down to the data (in exercise 5 up from the data). Of the two times of a step, $t$ is the noisier one and $s<t$ the other, and $\beta = 1-\bar\alpha_t/\bar\alpha_s$ and $\tilde\beta = \beta\,\sigma_s^2/\sigma_t^2$ belong to this step, however long it is.
#
# Samples have shape (B, …), whatever comes after B. Where **each sample of a batch has a number of its own**, the numbers have shape (B,), and cannot be multiplied with the samples as they are. This helper does it; you may use it wherever you like.


# %%
def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """A number for each sample, (B,), in the dtype of `like` and shaped to multiply it: (B, 1, …, 1)."""
    return coefficient.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def equal_steps(steps: int, first: int = 1000) -> Tensor:
    """A list of times from `first` down to 0."""
    return torch.linspace(first, 0, steps + 1).round().long()


digits, labels = data.images(data.load("mnist", "test"))
chosen = torch.stack([digits[labels == c][0] for c in range(10)])  # one digit of each class
chain = DiscretePath(linear_betas(1000))

# %% [markdown]
# The next cells of code serve the figures. Come back to them when you wonder what a figure shows.
#
# The course's digit model lives on a continuous path, with times from 0 to 1. We read it at 1001 places, as a table. It knows ten labels, and an eleventh, 10, for "no label".

# %%
digit_model = checkpoints.load("mnist-unet")
table = digit_model.path.alpha(torch.arange(1001, dtype=torch.float64) / 1000) ** 2  # ᾱ_0 … ᾱ_1000


@torch.no_grad()
def guess(x, t, y):
    """The model's x̂_0 for images at step t of 1000, with the labels y."""
    return clipped(digit_model)(x, t / 1000, y=y)


# %% [markdown]
# For exercise 1: a mixture of Gaussians at the four corners of a square. The first wish is "right", the second "top". Everything is known here, so the network and the classifier are exact.

# %%
corner, path = torch.tensor([[-2, -2], [-2, 2], [2, -2], [2, 2]]).double(), Cosine()


def part(weights, keep):
    """The mixture of some of the corners."""
    return GaussianMixture(corner[keep], 0.3, weights[keep])


def with_both_wishes(weights, w, scale):
    """Samples that are guided to the right and to the top, by your function of exercise 1."""
    whole, right, top = (part(weights, keep) for keep in ([0, 1, 2, 3], [2, 3], [1, 3]))
    v, v_right = (read_as("v", one.denoiser(path), path) for one in (whole, right))

    def denoiser(x, t):
        gradient = top.score(x, path, t) - whole.score(x, path, t)  # of log p(top | x), by Bayes
        alpha_bar = (path.alpha(t) ** 2).expand(len(x))
        return path.alpha(t) * x - path.sigma(t) * guided_v(v(x, t), v_right(x, t), gradient, alpha_bar, w, scale)

    start = torch.randn(1500, 2, generator=g, dtype=torch.float64)
    return samplers.last(samplers.ddim(denoiser, path, start, path.times(60)))


# %% [markdown]
# For exercise 2: a classifier of noisy digits that needs no training. Suppose that the digits of a class are Gaussian around their mean, all classes with the same covariance. Then noisy digits are Gaussian too, and Bayes gives $p_t(y\mid x_t)$ for every $t$; its logits are linear in $x_t$. On clean digits it is right 8 times in 10.

# %%
seen, seen_labels = data.images(data.load("mnist", "train"))
seen = seen.flatten(1).double()
middle = torch.stack([seen[seen_labels == c].mean(0) for c in range(10)])
spread, axes = torch.linalg.eigh(torch.cov((seen - middle[seen_labels]).T))


def linear_classifier(x, t):
    """Logits (B, 10) of digits at step t of 1000."""
    alpha_bar = table[t]
    weights = alpha_bar.sqrt() * middle @ axes / (alpha_bar * spread.clamp(min=0) + 1 - alpha_bar) @ axes.T
    return x.flatten(1).double() @ weights.T - alpha_bar.sqrt() / 2 * (weights * middle).sum(1)


# %%
def led(classes, scale, count, steps=30):
    """Digits by the model without a label, led to any of some classes by your function of exercise 2."""
    x, none = torch.randn(count, 1, 28, 28, generator=g), torch.full((count,), 10)
    wanted = torch.zeros(count, 10, dtype=torch.bool)
    wanted[:, classes] = True
    for t, s in pairwise(equal_steps(steps).tolist()):
        z = torch.randn(x.shape, generator=g)
        x = classifier_step(linear_classifier, x, guess(x, t, none), wanted, s, t, table, scale, z).detach()
    return x


def share_of(classes, x):
    """The share of images that a better classifier, of clean digits, finds to be of these classes."""
    with torch.no_grad():
        return torch.isin(judge(x).argmax(1), torch.tensor(classes)).double().mean()


judge = checkpoints.load("mnist-classifier")
torch.func.grad(torch.sum)(torch.ones(1))  # its first call loads for seconds: better here than inside your function

# %% [markdown]
# For exercise 4: the digit model's squared error, measured at 25 times with 50 digits of the test set, and between these times by straight lines of its logarithm; $\tilde\beta$ of the steps of a list; and digits by Algorithm 2 with a variance of your choice.

# %%
def error_of_the_model():
    """E(x_0 − x̂_0)² of a pixel, as a function of a list of times."""
    x0, y = torch.cat([digits[labels == c][:5] for c in range(10)]), torch.arange(10).repeat_interleave(5)
    places, errors = (1000 * torch.linspace(0.04, 1, 25) ** 2).round().long().tolist(), []
    for t in places:
        xt = digit_model.path.perturb(x0, t / 1000, torch.randn(x0.shape, generator=g))
        errors.append((x0 - guess(xt, t, y)).square().mean().item())
    return lambda times: torch.from_numpy(np.exp(np.interp(times, places, np.log(errors))))


def lower_bound(times):
    """β̃ of each step."""
    abar_t, abar_s = table[times[:-1]], table[times[1:]]
    return (1 - abar_t / abar_s) * (1 - abar_s) / (1 - abar_t)


# %%
def with_variance(of_step, start):
    """Digits 0 to 9 in 20 steps; `of_step` is "beta", "posterior", or a variance for each step."""
    if not isinstance(of_step, str):
        known = dict(zip(equal_steps(20).tolist(), of_step.tolist(), strict=False))
        return with_variance_function(lambda x, x0, t, s: known[round(1000 * t)], start)
    return with_variance_function(of_step, start)


def with_variance_function(variance, start):
    model = clipped(lambda xt, t: digit_model(xt, t, y=torch.arange(10)))
    times = equal_steps(20) / 1000
    return samplers.last(samplers.ddpm(model, digit_model.path, start, times, variance=variance, generator=g))


# %% [markdown]
# For exercises 5 and 6: the digit model, asked for 2, 3, 5, 7 and 8, on the path VP, read at 1001 places. (What a model knows about an image depends on its signal-to-noise ratio alone, so it serves on this path too.) And a mixture of Gaussians whose noise is known exactly.

# %%
vp = VP()
vp_table = vp.alpha(torch.arange(1001, dtype=torch.float64) / 1000) ** 2
five = torch.tensor([2, 3, 5, 7, 8])
five_digits = clipped(on_path(lambda xt, t: digit_model(xt, t, y=five), digit_model.path, vp))
mixture = GaussianMixture(torch.tensor([[-1, 0.5], [1.2, -0.3], [0.2, 1.4]]).double(), torch.tensor([0.1, 0.3, 0.2]))
ideal = mixture.denoiser(vp)


def noise_of(denoiser):
    """Its ε̂, a function of (x, t) with t from 0 to 1000."""
    eps = torch.no_grad()(read_as("eps", denoiser, vp))
    return lambda x, t: eps(x, t / 1000)


def ddim(denoiser, start, times):
    return samplers.last(samplers.ddim(denoiser, vp, start, times / 1000))


# %% [markdown]
# ## 1. Two wishes at once (3 points)
#
# ●●○○○ · 15 minutes · read again: sections 1.1 and 2.1 to 2.3 of notebook 06
#
# The slides guide by one condition $y$. Often there are two. Suppose that the network knows the first, $y_1$, because it was trained with labels and without, and that a classifier of noisy images knows the second, $y_2$. If the two are independent given $x_t$, Bayes says of both at once
#
# $$\nabla\log p_t(x\mid y_1, y_2) = \nabla\log p_t(x)+\nabla\log p_t(y_1\mid x)+\nabla\log p_t(y_2\mid x).$$
#
# Each push gets a strength of its own. We count the first as **Algorithm 2** does: $w = 0$ is the plain conditional model, so that $\nabla\log p_t(y_1\mid x)$ stands with the factor $1+w$. We count the second as **the slide of classifier guidance** does: $\nabla\log p_t(y_2\mid x)$ stands with the factor `scale`, and 0 means no push. *(The slides call both of these $w$. They differ by 1.)*
#
# The network predicts $v = \alpha\epsilon-\sigma x_0$. What do the two pushes do to $v$, while $x_t$ stays where it is? Start from $\nabla\log p_t(x) = -\epsilon/\sigma$. *(The slide text goes on with $\tilde\epsilon = \epsilon-w\nabla\log p_t(y\mid x)$. A $\sigma$ is missing. Two lines further down it is missing once more, so that the last line is right again. Here nothing cancels.)*
#
# **Write** `guided_v(v, v_class, gradient, alpha_bar, w, scale)`, which gives the guided $v$.
#
# - `v`, `v_class`: the network's $v$ without a condition and with $y_1$; `gradient`: $\nabla\log p_t(y_2\mid x)$ at $x_t$. All are (B, …), float32 or float64.
# - `alpha_bar`: float64, (B,), the number $\bar\alpha$ of each sample, from 0 to 1, **both included**. `w`, `scale`: Python floats.
# - Returns the guided $v$, (B, …), in the dtype of `v`.
# - At $\bar\alpha = 0$ a sample is pure noise and says nothing about $y_2$: there the push by the gradient is left out, even if `gradient` is not 0.
#
# <details><summary>Hint 1</summary>
#
# First without the classifier. $v$ is a fixed multiple of the score plus a fixed multiple of $x_t$. A mixture of scores with factors that sum to 1 is the same mixture of the $v$.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Now let $\epsilon$ move by a small $\delta$ while $x_t = \alpha x_0+\sigma\epsilon$ is held. By how much must $x_0$ move? Put both into $v$, and use $\alpha^2+\sigma^2 = 1$.
#
# </details>


# %%
def guided_v(v: Tensor, v_class: Tensor, gradient: Tensor, alpha_bar: Tensor, w: float, scale: float) -> Tensor:
    """The v that is guided by a class and by the gradient of a classifier.

    Arguments:
        v, v_class: Predictions without a condition and with the class, (B, …).
        gradient: ∇log p_t(y_2 | x) at x_t, (B, …).
        alpha_bar: ᾱ of each sample, float64 (B,), 0 ≤ ᾱ ≤ 1.
        w: Strength of the class, 0 for the plain conditional model.
        scale: Factor of the gradient.
    """
    # BEGIN SOLUTION
    noise_to_signal = torch.where(alpha_bar > 0, ((1 - alpha_bar) / alpha_bar).sqrt(), 0)
    return v_class + w * (v_class - v) - per_sample(scale * noise_to_signal, v) * gradient
    # END SOLUTION


# %%
if hw.check(guided_v):
    free, tied = torch.tensor([[0.12, 0.28, 0.18, 0.42], [0.01, 0.49, 0.49, 0.01]]).double()
    clouds = [part(free, [0, 1, 2, 3]).sample(1500, g), with_both_wishes(free, 0, 1), with_both_wishes(free, 1, 2)]
    clouds += [part(tied, [0, 1, 2, 3]).sample(1500, g), with_both_wishes(tied, 0, 1), with_both_wishes(tied, 1, 2)]
    asked, lost = clouds[1], clouds[4]
    exact = torch.allclose(asked.mean(0), corner[3], atol=0.1) and torch.allclose(asked.var(0), 0.3 + 0 * corner[3], rtol=0.15)
    claim("above, w = 0 and scale 1 sample the corner as it is", exact)
    claim("stronger pushes make the cloud narrower", bool((clouds[2].var(0) < 0.7 * asked.var(0)).all()))
    claim("below, a quarter and more do not arrive there", ((lost - corner[3]).norm(dim=1) > 1.7).double().mean() > 0.25)
    names = ["free: data", "w = 0, scale 1", "w = 1, scale 2", "tied: data", "w = 0, scale 1", "w = 1, scale 2"]
    plots.film_points(clouds[:3], times=names[:3], extent=(-5, 5, -5, 5))
    plots.film_points(clouds[3:], times=names[3:], extent=(-5, 5, -5, 5))

# %% [markdown]
# **What to see.** Above, the data are *free*: whether a point is right says nothing about whether it is at the top. The plain Bayes, $w = 0$ and scale 1, gives the corner, in its place and of its size. Stronger pushes make it narrower and move it outwards. Below, the data are *tied*: right is nearly always bottom, and the corner that was asked for holds one point in a hundred. Now many samples end on the way there, between the two large clouds, where there are no data; and stronger pushes do not bring them home.
#
# **Question.** At $t = 0$ a look at $x_0$ tells, nearly always without doubt, whether it is right and whether it is at the top. This holds for the tied mixture, too. So there $p(y_1, y_2\mid x_0) = p(y_1\mid x_0)\,p(y_2\mid x_0)$ up to very little. Why does the formula fail all the same for the tied mixture, and not for the free one?
#
# <!-- BEGIN SOLUTION -->
# It is used at each $t$, and needs $y_1$ and $y_2$ to be independent given $x_t$. At large $t$ the state $x_t$ says little, so $p_t(y_1, y_2\mid x_t)$ is near $p(y_1, y_2)$, which is 0.01 for the corner, while the product $p(y_1)\,p(y_2)$ is 0.25. The sum of the two pushes then leads to the middle of all that is right *or* top. Later, when $x_t$ says more, the corner is far away, and the two pushes balance each other on the way there. For the free data the two coordinates are independent at $t = 0$, and the noise keeps them so: the formula holds at every $t$.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 2. Any of several classes (3 points)
#
# ●●●○○ · 25 minutes · read again: sections 1.3 and 1.5 of notebook 06
#
# A classifier can be asked for more than a label. Say that an *even* digit is wanted, or a 1 or a 7: any class of a set $S$, given as a row of yes and no. Bayes holds for this as for any condition, and the push is the gradient of the logarithm of one probability:
#
# $$\gamma = \nabla_x\log p_t(y\in S\mid x)\quad\text{at}\ x = x_t .$$
#
# The probability of *one of several* classes is not a product, and its logarithm is no sum of logarithms.
#
# What does the push do to a step of Algorithm 2? Put $w\gamma$ into the score. This moves $\hat x_0$, and $\hat x_0$ stands in the mean of $q(x_s\mid x_t, x_0 = \hat x_0)$ with a factor. Follow it to the mean. If $\hat x_0$ and $\gamma$ are exact and $w = 1$, the guided mean is then exactly that of the model that knows $S$, for a step of any length from $\bar\alpha_t>0$. The variance of the step is left as it is.
#
# **Write** `classifier_step(classifier, x, x0, wanted, s, t, alpha_bars, scale, noise)`, one guided step from $t$ to $s$.
#
# - `classifier`: a function of samples (B, …) and a time, a Python int, that returns logits, (B, C); it can be differentiated. `wanted`: bool, (B, C), the set of each sample; no row is empty.
# - `x`, `x0`, `noise`: $x_t$, the network's $\hat x_0$ there without guidance, and $z$, all (B, …), float32 or float64. `s`, `t`: Python ints, 0 ≤ s < t ≤ T. `alpha_bars`: (T + 1,). `scale`: $w$, a Python float, counted as on the slide.
# - The noise has the variance $\tilde\beta$. At $s = 0$ that is 0, and what comes out is the guided $\hat x_0$.
# - $\bar\alpha_t = 0$ is allowed. There $x_t$ is pure noise and knows no class: leave the push out, whatever the classifier says.
# - Returns $x_s$, (B, …), in the dtype of `x`.
#
# <details><summary>Hint 1</summary>
#
# The output for a sample depends on that sample alone. So the gradient of the *sum* over the batch holds, in its row $i$, the gradient that sample $i$ needs. `torch.autograd.grad` wants a copy of `x` with `requires_grad`; `torch.func.grad` wants a function. For the logarithm of a sum of probabilities there is `logsumexp`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# In the score $-\hat\epsilon/\sigma_t$ a push $w\gamma$ moves $\hat\epsilon$ by $-w\sigma_t\gamma$. By how much does it move $\hat x_0 = (x_t-\sigma_t\hat\epsilon)/\alpha_t$? In the mean, $x_0$ has the factor $\alpha_s\beta/\sigma_t^2$. Much cancels.
#
# </details>


# %%
def classifier_step(
    classifier: Callable, x: Tensor, x0: Tensor, wanted: Tensor, s: int, t: int, alpha_bars: Tensor, scale: float, noise: Tensor
) -> Tensor:
    """A step of Algorithm 2 with Σ = β̃, led to any of the wanted classes.

    Arguments:
        classifier: (x, t) → logits (B, C).
        x, x0, noise: The state, x̂_0 and z, (B, …).
        wanted: The classes of each sample, bool (B, C).
        s, t, alpha_bars: The times, 0 ≤ s < t, and the table, float64 (T + 1,).
        scale: The strength of the guidance.
    """
    # BEGIN SOLUTION
    leaf = x.detach().clone().requires_grad_()
    log_prob = classifier(leaf, t).log_softmax(1).where(wanted, -torch.inf).logsumexp(1)
    (gradient,) = torch.autograd.grad(log_prob.sum(), leaf)
    abar_s, abar_t = alpha_bars[s].item(), alpha_bars[t].item()
    push = scale * (1 - abar_t) / abar_t**0.5 * gradient if abar_t > 0 else 0
    beta, share = 1 - abar_t / abar_s, (1 - abar_s) / (1 - abar_t)
    mean = (abar_t / abar_s) ** 0.5 * share * x + abar_s**0.5 * beta / (1 - abar_t) * (x0 + push)
    return mean + (beta * share) ** 0.5 * noise
    # END SOLUTION


# %%
if hw.check(classifier_step):
    sets = {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9], "1 or 7": [1, 7], "0, 6 or 8": [0, 6, 8]}
    drawn = {name: led(classes, 3.0, 8) for name, classes in sets.items()}
    plots.rows(list(drawn.values()), labels=list(drawn), title="led by a linear classifier, w = 3")
    scales = torch.tensor([0.0, 1, 3])
    shares = torch.stack([share_of([1, 7], led([1, 7], scale, 30)) for scale in scales.tolist()])
    claim("w = 3 makes a 1 or a 7 more frequent, by 0.25 at least", shares[2] > shares[0] + 0.25)
    plots.curves(scales, {"1 or 7": shares}, "w", "share of digits that are as asked")

# %% [markdown]
# **What to see.** The model was told no label: all that leads it is a classifier that draws straight lines, and is wrong for 2 clean digits of 10. Above, most digits are of the set that was asked for, and of different classes in it. Below: how the share grows with $w$, as a better classifier sees it.
#
# **Question.** Write $\nabla\log p(y\in S\mid x)$ as a weighted mean of the gradients $\nabla\log p(y\mid x)$ of the single classes. What are the weights, near the noise and near the data? What does a sampler do that adds up the gradients of all classes in $S$ instead? And with $w>1$, which classes of $S$ will come too seldom?
#
# <!-- BEGIN SOLUTION -->
# $\nabla\log\sum_{y\in S}p(y\mid x) = \sum_{y\in S}\frac{p(y\mid x)}{p(S\mid x)}\,\nabla\log p(y\mid x)$. The weights are the probabilities of the classes once it is known that it is one of $S$. Near the noise all classes of $S$ have a share, and the push goes to where they have more in common. Near the data one weight is nearly 1, that of the class to which this sample already tends: the push does not say which. The plain sum has equal weights all the way. It pulls to all classes at once, and where their pulls contradict each other the sample ends between them. With $w>1$ the push goes on to where $p(S\mid x)$ is nearest to 1. A class of $S$ that is easily taken for one outside (a 7 that may be a 9) is left for those that are not. It will tend to come too seldom, and the variety within $S$ shrinks.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 3. What guidance samples (4 points)
#
# ●●●○○ · 25 minutes · read again: section 2.4 of notebook 06, section 2.2 of notebook 07
#
# The slide text reads $\nabla\log p_t(x\mid y) = \nabla\log p_t(x)+w\nabla\log p_t(y\mid x)$. For $w = 1$ this is Bayes. For other $w$ the right side is the score of another density, $\propto p_t(x)\,p_t(y\mid x)^w$, at each $t$. The samples do not follow $p(x)\,p(y\mid x)^w$, the *sharpened* density of the data; notebook 06 showed it in the limit of short steps. What they do follow depends on the sampler. You find it for every member of DDIM's family, and on any list of times.
#
# Take one coordinate, data $x_0\sim\mathcal N(m, V)$, and among them those of the class, $x_0\sim\mathcal N(m_y, V_y)$. Both denoisers are known, and straight lines in $x_t$. With the slide's $w$ the guided one is
#
# $$\hat x_0 = (1-w)\,\mathbb E[x_0\mid x_t]+w\,\mathbb E[x_0\mid x_t, y].$$
#
# The step with a share $\eta$ of new noise is $x_s = \alpha_s\hat x_0+\sqrt{\sigma_s^2-\eta^2\tilde\beta}\;\hat\epsilon+\eta\sqrt{\tilde\beta}\,z$, where $\hat\epsilon = (x_t-\alpha_t\hat x_0)/\sigma_t$. *(On the slide $\eta\sqrt{\tilde\beta}$ is called $\sigma_t$.)* If the first state is drawn from $\mathcal N(0, 1)$, each state is Gaussian, and two numbers say all.
#
# **Write** `guided_moments(m, V, m_y, V_y, w, alpha_bars, times, eta)`, which gives the mean and the variance of the last state, and those of the sharpened density.
#
# - `m`, `V`, `m_y`, `V_y`: Python floats, 0 < V_y < V: a class is part of the data, so it cannot be wider. `w`: weights, float64 (W,); each of them is a case of its own, and for each the sharpened density exists. `alpha_bars`: (T + 1,); $\bar\alpha = 0$ is allowed at the first time. `times`: int64 (N + 1,), descending, N ≥ 1; they need not end at 0. `eta`: a Python float from 0 to 1, both included.
# - Returns `(mean, var, sharp_mean, sharp_var)`, each float64 (W,): of the last state, and of the density $\propto p(x)\,p(y\mid x)^w$ of the data.
#
# <details><summary>Hint 1</summary>
#
# $\mathbb E[x_0\mid x_t] = m+k\,(x_t-\alpha_t m)$, and $k$ is the covariance of $x_0$ and $x_t$ over the variance of $x_t$. Write the guided $\hat x_0$ as $A\,x_t+B$, then the step, and collect all that multiplies $x_t$. What does a straight line do to a mean, what to a variance, and what does $z$ add?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# By Bayes $p(y\mid x)\propto p(x\mid y)/p(x)$. So the sharpened density is a product of powers of two Gaussians; add up the exponents and read off the precision.
#
# </details>


# %%
def guided_moments(
    m: float, V: float, m_y: float, V_y: float, w: Tensor, alpha_bars: Tensor, times: Tensor, eta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance of guided DDIM samples of Gaussian data, and those of the sharpened density.

    Arguments:
        m, V, m_y, V_y: Mean and variance of the data, and of the class.
        w, eta: The slide's weights, float64 (W,), and the share of new noise.
        alpha_bars, times: float64 (T + 1,), and int64 (N + 1,), descending.
    """
    # BEGIN SOLUTION
    mean, var, a = torch.zeros_like(w), torch.ones_like(w), alpha_bars
    for t, s in pairwise(times.tolist()):
        fresh = eta**2 * (1 - a[t] / a[s]) * (1 - a[s]) / (1 - a[t])
        keep = ((1 - a[s] - fresh) / (1 - a[t])).sqrt()
        k, k_y = (v * a[t].sqrt() / (a[t] * v + 1 - a[t]) for v in (V, V_y))
        A, B = (1 - w) * k + w * k_y, (1 - w) * (1 - k * a[t].sqrt()) * m + w * (1 - k_y * a[t].sqrt()) * m_y
        pull = a[s].sqrt() - keep * a[t].sqrt()
        mean, var = (keep + pull * A) * mean + pull * B, (keep + pull * A) ** 2 * var + fresh
    rate = (1 - w) / V + w / V_y
    return mean, var, ((1 - w) * m / V + w * m_y / V_y) / rate, 1 / rate
    # END SOLUTION


# %%
if hw.check(guided_moments):
    w, bells, x = torch.arange(0, 8.1, 0.5, dtype=torch.float64), {}, torch.linspace(-1, 3, 401, dtype=torch.float64)
    found = [guided_moments(0.0, 1.0, 1.0, 0.25, w, chain.alpha_bars, chain.times(1000), eta) for eta in (0.0, 1.0)]
    means = {"η = 0": found[0][0], "η = 1": found[1][0], "sharpened": found[0][2]}
    variances = {"η = 0": found[0][1], "η = 1": found[1][1], "sharpened": found[0][3]}
    sharp = all(abs(variances[name][i] / variances["sharpened"][i] - 1) < 0.02 for name in variances for i in (0, 2))
    claim("for w = 0 and w = 1 all three agree, to 2 %", sharp)
    low, middle_one, high = (variances[name][6] for name in variances)
    claim("w = 3: η = 0 is narrowest, then η = 1, then the sharpened density", low < middle_one / 3 and middle_one < 0.7 * high)
    claim("and their means lie in the other order", bool(means["η = 0"][6] > means["η = 1"][6] > means["sharpened"][6]))
    plots.curves(w, means, "w", "mean")
    plots.curves(w, variances, "w", "variance", logy=True)
    for name, at, v in [(name, means[name][4], variances[name][4]) for name in means] + [("class", 1.0, 0.25), ("data", 0.0, 1.0)]:
        bells[name] = (-((x - at) ** 2) / (2 * v)).exp() / (2 * math.pi * v) ** 0.5
    plots.curves(x, bells, "x", "density, for w = 2")

# %% [markdown]
# **What to see.** The class has mean 1 and a quarter of the data's variance. At $w = 0$ and $w = 1$ all three agree. Beyond, they part. Without new noise the variance falls exponentially, and soon nothing is left of it; the mean overshoots what the sharpened density allows, and later it comes back a little. With new noise both are less far off. The last figure shows the densities for $w = 2$.
#
# **Question.** (a) Why do $\eta = 0$ and $\eta = 1$ agree for $w = 1$, and not for $w = 2$? Homework 4 split a short step with $\eta>0$ into one of the ODE and one of Langevin dynamics. What does each of the two parts do to the density $\tilde p_t\propto p_t(x)\,p_t(y\mid x)^w$? (b) How could the sharpened density be sampled after all, with the same guided score?
#
# <!-- BEGIN SOLUTION -->
# (a) Langevin dynamics at time $t$ leaves the density unchanged whose score it is given, and that is $\tilde p_t$, for every $w$. The ODE carries a density to the next time. For $w = 1$ it carries $p_t(x\mid y)$ to $p_s(x\mid y)$, the Langevin part then finds what it wants to find, and changes nothing: all $\eta$ agree. For $w = 2$ the ODE does not carry $\tilde p_t$ to $\tilde p_s$, since $\tilde p_t$ is not $\tilde p_s$ with more noise. Here it makes the cloud too narrow. The Langevin part pulls it back towards $\tilde p_s$, as far as one short step can. So the result lies between the ODE's and $\tilde p_0$, and depends on how much of the second part there is. (b) By more Langevin dynamics: many corrector steps at each time, or at the last ones. At a fixed small $t$, with short steps, it has $\tilde p_t$ as its equilibrium whatever came before, and $\tilde p_t$ tends to $\tilde p_0$. For images this takes many evaluations, and modes that lie apart do not mix.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 4. The variance that a step should have (3 points)
#
# ●●●○○ · 20 minutes · read again: sections 1.2, 1.4 and 1.5 of notebook 07
#
# May one drop steps with a fixed variance? "No", the slide text reads, since the two bounds $\tilde\beta$ and $\beta$ move apart. One may, if both are worked out anew for each longer step; but then the choice between them matters. Notebook 07 found the best variance, which makes the bound's term smallest. As one number for all $x_t$ it is
#
# $$\Sigma^* = \tilde\beta+c^2E,\qquad E = \mathbb E(x_0-\hat x_0)^2\ \text{of a coordinate},$$
#
# where $c$ is the factor of $x_0$ in the mean of $q(x_s\mid x_t, x_0)$. Improved DDPM lets the network say the variance as $\Sigma = \exp\bigl(v\log\beta+(1-v)\log\tilde\beta\bigr)$. *(Another $v$ than that of exercise 1.)* Which $v$ should it say? And what is paid by those who take $\beta$? For one coordinate, a Gaussian of variance $\Sigma$ around the model's mean costs, up to what does not depend on $\Sigma$,
#
# $$\frac{\Sigma^*}{2\Sigma}+\frac12\log\Sigma\quad\text{nats},$$
#
# because $\Sigma^*$ is the mean square of $x_s$ around that mean. This holds for the step to the data, too.
#
# **Write** `best_variance(mse, times, alpha_bars)`, which gives for each step the best variance, the $v$ that says it, and the extra cost of $\Sigma = \beta$.
#
# - `mse`: $E$ at the $t$ of each step, float64 (N,), positive. `times`: int64 (N + 1,), descending, its last entry 0, N ≥ 3. `alpha_bars`: (T + 1,); $\bar\alpha = 0$ is allowed at the first time.
# - Returns `(variance, fraction, extra)`: all float64 (N,). The fraction is not held between 0 and 1. The extra cost is that of $\beta$ minus that of $\Sigma^*$, in **bits**.
# - In the step to 0, $\tilde\beta$ is 0 and has no logarithm. *(The slide's formula does not say what to do.)* For the fraction, and for it only, take the $\tilde\beta$ of the step before in its place, as Improved DDPM does.
#
# <details><summary>Hint</summary>
#
# Solve the formula with $v$ for $v$: it is a ratio of two differences of logarithms. The extra cost is a function of $\Sigma^*/\beta$ alone; it is 0 where that is 1. From nats to bits: divide by $\log 2$.
#
# </details>


# %%
def best_variance(mse: Tensor, times: Tensor, alpha_bars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The variance of each step that makes the bound smallest, the v that says it, and what β costs more.

    Arguments:
        mse: E(x_0 − x̂_0)² at times[:-1], float64 (N,).
        times: int64 (N + 1,), descending to 0.
        alpha_bars: float64 (T + 1,).

    Returns:
        The variance, v, and the extra cost of β in bits, all float64 (N,).
    """
    # BEGIN SOLUTION
    abar_t, abar_s = alpha_bars[times[:-1]], alpha_bars[times[1:]]
    upper = 1 - abar_t / abar_s
    lower = upper * (1 - abar_s) / (1 - abar_t)
    variance = lower + abar_s * (upper / (1 - abar_t)) ** 2 * mse
    held = torch.cat([lower[:-1], lower[-2:-1]]).log()
    ratio = variance / upper
    return variance, (variance.log() - held) / (upper.log() - held), (ratio - 1 - ratio.log()) / (2 * math.log(2))
    # END SOLUTION


# %%
if hw.check(best_variance):
    error, counts = error_of_the_model(), torch.tensor([20, 50, 100, 200])
    places, fractions, paid = {}, {}, {"Σ = β": [], "Σ = β̃": []}
    for steps in counts.tolist():
        times = equal_steps(steps)
        best, v, extra = best_variance(error(times[:-1]), times, table)
        places[f"{steps} steps"], fractions[f"{steps} steps"] = times[:-2], v[:-1]
        ratio = (best / lower_bound(times))[:-1]
        paid["Σ = β"].append(extra[:-1].sum())
        paid["Σ = β̃"].append(((ratio - 1 - ratio.log()) / 2 / math.log(2)).sum())
        if steps == 20:
            first, start = best, torch.randn(10, 1, 28, 28, generator=g)
    paid = {name: torch.stack(costs) for name, costs in paid.items()}
    claim("β costs more than 0.4 bits more than the best, β̃ less than 0.25", paid["Σ = β"].min() > 0.4 and paid["Σ = β̃"].max() < 0.25)
    plots.curves(places, fractions, "t", "v of the best variance")
    plots.curves(counts, paid, "number of steps", "bits per pixel more than the best", logx=True, logy=True)
    drawn = [with_variance(one, start) for one in ("beta", "posterior", first)]
    plots.rows(drawn, labels=["β", "β̃", "best"], title="20 steps")

# %% [markdown]
# **What to see.** The step to the data is left out of the first two figures: there $\tilde\beta$ is 0, so that $v$ is a convention and the cost of $\tilde\beta$ is infinite. Above: the digit model's best $v$ lies near the lower choice, between 0.05 and 0.4, and is largest at both ends. The number of steps changes it near the data only. The middle: $\beta$ costs more than half a bit per pixel, however many steps there are. $\tilde\beta$ costs a few hundredths with 20 steps. With more steps it is more, because more of them lie close to the data, where the two bounds are far apart in any list. Below: $\beta$ leaves grain; between the other two the eye sees no difference.
#
# **Question.** (a) For data $\mathcal N(0, V)$ and the exact denoiser, which $V$ has $v = 1$ in all steps? Which limit of $V$ has $v = 0$ in all but the last? In what sense, then, are $\beta$ and $\tilde\beta$ an upper and a lower bound? (b) Your $\Sigma^*$ is one number for all pixels and all images. A network says a $v$ for each pixel of each image. Why can that only cost fewer bits, if it is good?
#
# <!-- BEGIN SOLUTION -->
# (a) $V = 1$: then $E = \sigma_t^2$, and $\tilde\beta+c^2\sigma_t^2 = \beta$ (the step to the data included). For $V\to0$ there is no error, and $\Sigma^* = \tilde\beta$. So the two are bounds of the best variance *on average*, for a coordinate whose variance is between 0 and 1, if the denoiser is no worse than the best straight line. At a single $x_t$ the variance may be above $\beta$; and a bad network, or data with $V>1$, can have $v>1$ on average. (b) With the best $\Sigma$ the cost is $\frac12\log\Sigma^*$ plus a constant. The logarithm bends down, so the mean of the logarithms is at most the logarithm of the mean: it is cheaper to say a small variance at the black border and a large one at the edge of a stroke than the mean of both everywhere. The gain is 0 only if $E$ is the same for all.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 5. There, and exactly back (3 points)
#
# ●●●○○ · 20 minutes · read again: sections 2.2 and 2.5 of notebook 07
#
# Notebook 07 ran DDIM upwards, from an image to the noise that it would be drawn from. Going down again did not lead back exactly: the way down asks the network about $x_t$ at $t$, and on the way up $x_t$ is not known yet. But it is *determined*. DDIM's step down, without new noise, is
#
# $$x_s = \alpha_s\,\frac{x_t-\sigma_t\hat\epsilon}{\alpha_t}+\sigma_s\hat\epsilon,\qquad \hat\epsilon = \hat\epsilon(x_t, t).$$
#
# Solve it for $x_t$ as if $\hat\epsilon$ were known. The right side then holds $x_s$, which is known, and $\hat\epsilon$, which depends on the $x_t$ that you look for. So it is a fixed point: guess an $x_t$, ask the network for the noise in it **at time $t$**, get a better $x_t$, and so on. If the rounds converge, their limit is the very $x_t$ that DDIM takes to $x_s$.
#
# **Write** `exact_inversion(eps_model, x, times, alpha_bars, rounds)`, which goes up a list of times, with so many rounds in each step.
#
# - `eps_model`: a function of samples (B, …) and a time, a Python int, that returns $\hat\epsilon$, (B, …). It is asked once in each round.
# - `x`: the state at `times[0]`, (B, …), float32 or float64. `times`: int64 (N + 1,), **ascending**, N ≥ 1, with steps of different lengths. They may begin at 0. `alpha_bars`: (T + 1,), above 0 at all times of the list. `rounds`: a Python int, at least 1.
# - In each step the first guess of $x_t$ is $x_s$. The guess after the last round is the state that the next step starts from.
# - Returns the last state, (B, …), in the dtype of `x`.
#
# <details><summary>Hint</summary>
#
# Multiply by $a = \alpha_t/\alpha_s$ first, and collect all that multiplies $\hat\epsilon$. A test on paper: with the true noise in the place of $\hat\epsilon$, $x_s = \alpha_sx_0+\sigma_s\epsilon$ must become $\alpha_tx_0+\sigma_t\epsilon$. Nothing has to be divided by $\sigma_s$, so the data are no special case.
#
# </details>


# %%
def exact_inversion(eps_model: Callable, x: Tensor, times: Tensor, alpha_bars: Tensor, rounds: int) -> Tensor:
    """The noise from which DDIM leads to x, by a fixed-point iteration in each step.

    Arguments:
        eps_model: (x, t) → ε̂, with t a Python int.
        x: The state at times[0], (B, …).
        times: int64 (N + 1,), ascending.
        alpha_bars: float64 (T + 1,).
        rounds: How often the network is asked in each step.
    """
    # BEGIN SOLUTION
    for s, t in pairwise(times.tolist()):
        abar_s, abar_t = alpha_bars[s].item(), alpha_bars[t].item()
        a = (abar_t / abar_s) ** 0.5
        turn = (1 - abar_t) ** 0.5 - a * (1 - abar_s) ** 0.5
        guess_of_xt = x
        for _ in range(rounds):
            guess_of_xt = a * x + turn * eps_model(guess_of_xt, t)
        x = guess_of_xt
    return x
    # END SOLUTION


# %%
if hw.check(exact_inversion):
    times, rounds = torch.linspace(20, 1000, 21).round().long(), torch.tensor([1, 2, 4, 8])
    x = vp.perturb(chosen[five], 0.02, torch.randn(5, 1, 28, 28, generator=g))  # with the little noise that belongs there
    codes = [exact_inversion(noise_of(five_digits), x, times, vp_table, n) for n in rounds.tolist()]
    again = [ddim(five_digits, code, times.flip(0)) for code in codes]
    usual = samplers.last(samplers.ddim_inversion(five_digits, vp, x, times / 1000))
    usual_again = ddim(five_digits, usual, times.flip(0))
    off = torch.stack([(one - x).square().mean().sqrt() for one in again])
    usual_off = (usual_again - x).square().mean().sqrt().expand(4)
    claim("8 rounds leave less than a fifth of the error of one round", off[3] < off[0] / 5)
    plots.curves(rounds, {"yours": off, "ddim_inversion": usual_off}, "rounds in each step", "distance of a pixel, there and back", logx=True, logy=True)
    plots.rows([x, codes[3] / 3, again[3], (usual_again - x) * 3, (again[3] - x) * 3], labels=["digit", "code", "decoded", "error ×3, usual", "error ×3, 8 rounds"])

# %% [markdown]
# **What to see.** Twenty steps up, twenty down. Each round takes away a good part of the error, and what is left after eight is hardly to be seen, even enlarged. The usual inversion asks about $x_s$ at time $s$, once in a step; its error only falls with the length of the steps. (Its code is no worse as noise. It is the code of a slightly different image.)
#
# **Question.** Take data $\mathcal N(0, V)$, for which $\hat\epsilon = \sigma_tx_t/(\alpha_t^2V+\sigma_t^2)$. (a) By which factor does a round multiply the error of the guess? Show that it lies between 0 and 1 for every step up and every $V>0$, from the data too. Why do short steps need few rounds? (b) The same equation can be solved in terms of $\hat x_0$: $x_t\leftarrow\frac{\sigma_t}{\sigma_s}\bigl(x_s-\alpha_s\hat x_0\bigr)+\alpha_t\hat x_0$. What is the factor now, for the same data with large $V$, and when do the rounds run away?
#
# <!-- BEGIN SOLUTION -->
# (a) The guess enters through $\hat\epsilon$ alone, so with $a = \alpha_t/\alpha_s$ the factor is $(\sigma_t-a\sigma_s)\,\sigma_t/(\alpha_t^2V+\sigma_t^2)$. It is above 0, because $\sigma/\alpha$ grows on the way up. And it is at most $\sigma_t^2/(\alpha_t^2V+\sigma_t^2)<1$. It is also below $1-a\sigma_s/\sigma_t$, whatever $V$ is: short steps with $\sigma_s>0$ have $a\sigma_s\approx\sigma_t$ and converge at once. (b) Here $\hat x_0 = \alpha_tVx_t/(\alpha_t^2V+\sigma_t^2)$, which tends to $x_t/\alpha_t$ for large $V$, and it has the factor $\alpha_t-\alpha_s\sigma_t/\sigma_s$. So an error is multiplied by $1-\alpha_s\sigma_t/(\alpha_t\sigma_s)$, whose size is above 1 as soon as the ratio of noise to signal more than doubles in a step. The equation is the same, and so is its solution; but one way to write it is a contraction and the other is not. (For a network neither is guaranteed. But if it is near to what it learnt, the first has the better chances.)
# <!-- END SOLUTION -->

# %% [markdown]
# ## 6. A straight line, integrated exactly (4 points)
#
# ●●●●○ · 30 minutes · read again: sections 3.1 to 3.3 of notebook 07
#
# A step of the probability-flow ODE from $t$ to $s$ can be written down without any error. With $\lambda = \log(\alpha/\sigma)$, which is *half* of the log-SNR and grows on the way to the data,
#
# $$\frac{x_s}{\alpha_s} = \frac{x_t}{\alpha_t}-\int_{\lambda_t}^{\lambda_s}e^{-\lambda}\,\hat\epsilon(\lambda)\,d\lambda ,$$
#
# where $\hat\epsilon(\lambda)$ is the noise that the network sees on the way. All that has to be guessed is $\hat\epsilon(\lambda)$. If it is held constant, the step is DDIM's. 2M of notebook 07 remembers one more prediction, of $x_0$, and takes the value in the *middle* of the step for the whole step. Here the network predicts $\epsilon$, and you do without that shortcut: draw the **straight line in $\lambda$** through the noise at $t$ and the noise at the time before, follow it over the step, and integrate it exactly, together with the factor $e^{-\lambda}$.
#
# **Write** `sample_linear(eps_model, x, times, alpha_bars)`, which samples so down a list of times.
#
# - `eps_model`: a function of samples (B, …) and a time, a Python int, that returns $\hat\epsilon$, (B, …). It is asked once in each step, at the $t$ where the step begins.
# - `x`: the first state, (B, …), at `times[0]`, float32 or float64. `times`: int64 (N + 1,), descending, N ≥ 1, with steps of different lengths. `alpha_bars`: (T + 1,), above 0 at all times of the list.
# - The first step knows one noise only: hold it constant. Hold the noise constant, too, in a step to $\bar\alpha_s = 1$, where $\lambda_s = \infty$: what comes out there is $\hat x_0$.
# - Returns the last state, (B, …), in the dtype of `x`.
#
# <details><summary>Hint 1</summary>
#
# With $h = \lambda_s-\lambda_t$, and $h_-$ and $\hat\epsilon_-$ for the length and the noise of the step before, the line is $\hat\epsilon_t+(\lambda-\lambda_t)\,(\hat\epsilon_t-\hat\epsilon_-)/h_-$. Two integrals are needed: of $e^{-\lambda}$, and of $e^{-\lambda}(\lambda-\lambda_t)$.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Integrate the second by parts, multiply both by $\alpha_s$, and use $\alpha_s e^{-\lambda_s} = \sigma_s$, so $\alpha_s e^{-\lambda_t} = \sigma_s e^h$. The first becomes $\sigma_s(e^h-1)$, the factor of $\hat\epsilon$ in DDIM's step; `math.expm1(h)` is $e^h-1$. The second is the factor of the slope. A test on paper: for small $h$ it must be $\frac12\sigma_s h^2$.
#
# </details>


# %%
def sample_linear(eps_model: Callable, x: Tensor, times: Tensor, alpha_bars: Tensor) -> Tensor:
    """Solve the probability-flow ODE with the noise as a straight line in λ, integrated exactly.

    Arguments:
        eps_model: (x, t) → ε̂, with t a Python int.
        x: The state at times[0], (B, …).
        times: int64 (N + 1,), descending.
        alpha_bars: float64 (T + 1,).
    """
    # BEGIN SOLUTION
    before, h_before = None, None
    for t, s in pairwise(times.tolist()):
        abar_t, abar_s = alpha_bars[t].item(), alpha_bars[s].item()
        eps = eps_model(x, t)
        if abar_s == 1:
            return (x - (1 - abar_t) ** 0.5 * eps) / abar_t**0.5
        h = (math.log(abar_s / (1 - abar_s)) - math.log(abar_t / (1 - abar_t))) / 2
        slope = 0 if before is None else (eps - before) / h_before
        x = (abar_s / abar_t) ** 0.5 * x - (1 - abar_s) ** 0.5 * (math.expm1(h) * eps + (math.expm1(h) - h) * slope)
        before, h_before = eps, h
    return x
    # END SOLUTION


# %%
if hw.check(sample_linear):
    counts, gaps = torch.tensor([12, 24, 48, 96, 192]), {"DDIM": [], "2M": [], "yours": []}
    start = torch.randn(300, 2, generator=g, dtype=torch.float64)
    exact = samplers.last(samplers.heun(ideal, vp, start, torch.arange(1000, 39, -1) / 1000))
    for steps in counts.tolist():
        times = torch.arange(1000, 39, -960 // steps)
        gaps["DDIM"].append(ddim(ideal, start, times) - exact)
        gaps["2M"].append(samplers.last(samplers.dpm_solver_pp_2m(ideal, vp, start, times / 1000)) - exact)
        gaps["yours"].append(sample_linear(noise_of(ideal), start, times, vp_table) - exact)
    gaps = {name: torch.stack([gap.abs().mean() for gap in found]) for name, found in gaps.items()}
    orders = {name: math.log2(gap[-2] / gap[-1]) for name, gap in gaps.items()}
    claim("DDIM has order 1, yours has order 2", abs(orders["DDIM"] - 1) < 0.1 and abs(orders["yours"] - 2) < 0.15)
    plots.curves(counts, gaps, "number of evaluations", "mean error", logx=True, logy=True)
    start, times = torch.randn(5, 1, 28, 28, generator=g), equal_steps(10)
    few, mine = ddim(five_digits, start, times), sample_linear(noise_of(five_digits), start, times, vp_table)
    many = ddim(five_digits, start, equal_steps(100))
    off, mine_off = ((x - many).flatten(1).norm(dim=1) for x in (few, mine))
    claim("most of your digits in 10 evaluations come closer to those of 100 steps than DDIM's", (mine_off < off).sum() >= 3)
    plots.rows([few, mine, many, (few - many) * 2, (mine - many) * 2], labels=["DDIM, 10", "yours, 10", "DDIM, 100", "error ×2, DDIM", "error ×2, yours"])

# %% [markdown]
# **What to see.** Above: the error against the exact solution on a mixture. DDIM's line falls by 2 for twice the evaluations, the other two fall by 4. Below: digits in 10 evaluations from the same noise, where many steps lead, and how far the two are from that.
#
# **Question.** (a) Let $\lambda_s\to\infty$ in your formula, as in a step to the data. It has a finite limit: which one? How far beyond $\lambda_t$ along the line is $\hat\epsilon$ taken, on average with the weight $e^{-\lambda}$? Why does the exercise ask for $\hat x_0$ in that step all the same? (b) At the first times $\alpha$ is 0.01 or less. What becomes of $\hat x_0 = (x-\sigma\hat\epsilon)/\alpha$ if the line misses $\hat\epsilon$ by a little? Why do solvers for strong guidance extrapolate $\hat x_0$ and not $\hat\epsilon$?
#
# <!-- BEGIN SOLUTION -->
# (a) $\sigma_s(e^h-1-h)$ tends to $\alpha_s e^{-\lambda_t} = \sigma_t/\alpha_t$ with $\alpha_s = 1$, as does $\sigma_s(e^h-1)$. So the last state would be $\bigl(x-\sigma_t(\hat\epsilon_t+\text{slope})\bigr)/\alpha_t$: the noise one unit of $\lambda$ further along the line, for 1 is the mean of $\lambda-\lambda_t$ under the weight $e^{-\lambda}$. If the steps before are about that long, this is no bolder than the others. If they are short, two noises close together are asked for a value far away, and however short the steps become, that distance stays. Holding $\hat\epsilon$ constant errs there, too, but it follows no slope that may be wrong. (On the mixture of the figure, followed down to the data with equal steps in $t$, the limit is the better choice with 20 steps and the worse one with 50 and more.) (b) The error of $\hat\epsilon$ is multiplied by $\sigma/\alpha$, a hundred times or more. Guidance makes $\hat\epsilon$ change faster in $\lambda$, and the line misses by more. $\hat x_0$ behaves better: near the noise it hardly changes, a line through it misses by little, and nothing is divided by $\alpha$. It also has a known range and can be clipped.
# <!-- END SOLUTION -->

# %% [markdown]
# ## Recap
#
# - If the score is pushed by $\gamma$, then $\epsilon$ moves by $-\sigma\gamma$ and $\hat x_0$ by $(\sigma^2/\alpha)\,\gamma$, because $x_t$ stays; $v$ and the mean of a step move with them. Predictions mixed with factors that sum to 1 need no such care.
# - Two conditions may be added if they are independent given $x_t$, at every $t$. One of several classes is a sum of probabilities, inside the logarithm.
# - Guidance with a $w$ other than 0 and 1 has no density of its own: what it samples depends on the sampler, and for Gaussians it can be worked out.
# - The best variance of a step is $\tilde\beta$ plus what the error of $\hat x_0$ adds. On average it lies between $\tilde\beta$ and $\beta$, for a coordinate of variance up to 1 and a good denoiser.
# - DDIM without noise is a map. A fixed-point iteration undoes it, if it is written so that it contracts.
# - An exponential integrator approximates the network's output and nothing else. What is done with the approximation can be exact.
#
# **Pitfalls**
#
# - Two $w$: 0 is the plain conditional model for one, 1 for the other. Three $\sigma$: in $x_t$, of a step, of DDIM. Two $v$. Name them before you code.
# - $\beta$ and $\tilde\beta$ belong to the step of the list, not to that of the training chain.
# - The gradient of a mean over the batch is $B$ times too small.
# - $\lambda$ is half of the log-SNR, and a slope is divided by the length of the step in which it was seen.
# - Where $\alpha = 0$ or $\sigma = 0$, a formula may say $0/0$. Find out first what is meant there.
#
# ## Hand in
#
# Restart the kernel, run all cells, and look for the six lines with ✓ and the name of a function. (The other lines with ✓ are claims about the figures.) Save, and hand in this file as it is: `hw5_guidance_sampling.ipynb`. Functions are found by name, so do not rename them. An exercise that you did not finish may stay as it is; it costs its own points and no others.
