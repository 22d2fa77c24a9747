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
# # Homework 2: normalizing flows
#
# The notebook [*Normalizing flows*](../notebooks/02_normalizing_flows.ipynb) built a flow for digits out of ready layers. Here you make the layers that it left out, and you follow the volume through each of them. You will practise
#
# - to find the density of a bent Gaussian, from its map alone;
# - to run a chain of couplings in both directions, on points whose odd and even places take turns;
# - to turn a density of real numbers into bits for grey levels, and to see what that bound loses;
# - to let half of an image leave early, and to say what it leaves with;
# - to invert a layer that is known for having no inverse in closed form;
# - to replace a determinant by a trace, which is the step from flows to diffusion.
#
# | | you write | points | difficulty | minutes |
# |---|---|---|---|---|
# | 1 | `sinh_arcsinh_log_prob` | 2 | ●○○○○ | 15 |
# | 2 | `coupling_chain` | 3 | ●●○○○ | 20 |
# | 3 | `image_bits` | 4 | ●●●○○ | 30 |
# | 4 | `multi_scale` | 4 | ●●●○○ | 25 |
# | 5 | `ridge` | 3 | ●●●○○ | 25 |
# | 6 | `small_steps` | 4 | ●●●●○ | 35 |
# | | | **20** | | **150** |
#
# **Symbols** are those of the notebook: noise $z$, data $x$, and $f$ from noise to data, $x = f(z)$. You need pen and paper for 1, 5 and 6.

# %% [markdown]
# ## How it works
#
# Replace each `raise NotImplementedError` by your code, and run the cell below it. `hw.check` tries your function on a few cases and says ✓, or ✗ and what differs (or · while nothing is written yet); some mistakes it knows by sight. When all is right, the cell goes on and draws a figure with *your* function.
#
# - **Keep names, arguments and results as they are asked for.** Work in as many cells as you like, and write helpers if you want them; the six functions are found by their names.
# - **One convention for every sign.** The direction `"forward"` goes from $z$ to $x$, `"inverse"` from $x$ to $z$. A function that returns a log-determinant returns that of the map that it has computed itself.
# - **Hidden cases count too.** In each exercise 1 point is for cases like those that you can try here, with other numbers. The rest is for cases you have not seen: other shapes, a batch of one, float64, the ends of a range.
# - **Leave inputs unchanged.** `x += 1` and functions that end in `_` change a tensor that is not yours. A slice of a tensor is the same tensor: to write into it, `clone()` first.
# - **Results have the dtype of the inputs.** A log-density or a log-determinant is one number for each point or image: shape (B,).
# - **Write the formulas out.** The course's kernels that do the same (`Coupling`, `Logit`, `Split`, `Planar`, `affine`, …) are refused inside your functions. Your own earlier functions are welcome, and so is all of PyTorch.
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

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dgm_course import data, homework
from dgm_course.checks import claim
from dgm_course.flows import dequantize, squeeze, unsqueeze
from dgm_course.viz import plots

hw = homework.load("hw2")
g = torch.Generator().manual_seed(2)  # where all chance in the figures comes from
digits, labels = data.images(data.load("mnist", "test"))
chosen = torch.stack([digits[labels == c][0] for c in range(10)])  # one digit of each class

# %% [markdown]
# Three helpers, which you may use wherever you like. The first is the density of the noise. The second is the network of exercises 2 and 4, small enough to be written as two tensors. The third finds a log-determinant without any theory: it moves a point a little along each coordinate, and looks where the map takes it. It is slow and works in double precision only, but it needs nothing except the map, so it tells you whether to trust a formula.


# %%
def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1) of each value by itself, of the shape of z."""
    return -(z**2 + math.log(2 * math.pi)) / 2


def network(kept: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The log-scale s, between −1 and 1, and the shift t: for kept (B, k, …) and weight (2m, k), each (B, m, …)."""
    raw = torch.einsum("oc,bc...->bo...", weight, kept) + bias.reshape(-1, *[1] * (kept.ndim - 2))
    s, t = raw.chunk(2, dim=1)
    return s.tanh(), t


def log_volume(function, point: Tensor, step: float = 1e-5) -> float:
    """log|det| of the Jacobian of a map of points (B, D) at one point (D,), by differences."""
    moves = step * torch.eye(len(point), dtype=point.dtype)
    return torch.linalg.slogdet((function(point + moves) - function(point - moves)) / (2 * step)).logabsdet.item()


# %% [markdown]
# The next four cells of code serve the figures. Come back to them when you wonder what a figure shows.
#
# For exercise 3: a model of digits whose pixels are independent, so that the truth is known. The probability of a grey level is a difference of two values of the normal distribution function $\Phi$.


# %%
def grey(images, levels):
    """Levels 0 … levels − 1 of images in [−1, 1]."""
    return ((images + 1) / 2 * 255).round().long() * levels // 256


def fitted(k, levels, margin):
    """Mean and log-deviation of each pixel's logit."""
    y = (k + torch.rand(k.shape, generator=g)) / levels
    logits = torch.logit(margin + (1 - 2 * margin) * y)
    return logits.mean(0), logits.std(0).log()


def true_bits(k, levels, margin, loc, log_scale):
    """−log₂ P(k)/D, by Φ at both ends of each cell; of Φ's two tails, the one that is not cut off by rounding."""
    low, high = (torch.logit(margin + (1 - 2 * margin) * (k.double() + end) / levels) for end in (0, 1))
    low, high = ((end - loc) / log_scale.double().exp() for end in (low, high))
    phi = torch.special.ndtr
    return -torch.maximum(phi(high) - phi(low), phi(-low) - phi(-high)).log2().flatten(1).mean(1)


# %% [markdown]
# For exercise 4: networks that come from real digits, without any training. The shift $t$ is a linear regression of one half of the channels on the other, the same at each place of the image, and $s$ is the logarithm of the deviation that it leaves, one number for each channel.


# %%
def regressions(x, count):
    """Weight and bias of each scale, the finest first."""
    nets = []
    for _ in range(count):
        x, b = squeeze(x).chunk(2, 1)
        inside, outside = (part.movedim(1, -1).flatten(0, -2) for part in (x, b))
        inside = torch.cat([inside, torch.ones(len(inside), 1)], 1)
        line = torch.linalg.lstsq(inside, outside).solution
        left = (outside - inside @ line).std(0)
        nets.append((torch.cat([0 * line[:-1].T, line[:-1].T]), torch.cat([left.log().atanh(), line[-1]])))
    return nets


# %%
def numbers_of(images):
    """Grey levels with noise in their cells, brought to about the size of standard normal numbers."""
    return 4 * (dequantize(images, torch.rand(images.shape, generator=g)) - 0.12)


def bits(x, nets):
    """Bits per dimension of the images that became x; 256 is the number of levels, 4 the scale above."""
    log_prob = multi_scale(x, nets, "inverse")[1] + 784 * math.log(4 / 256)
    return -(log_prob / 784 / math.log(2)).mean()


# %% [markdown]
# For exercise 5: four ridges one after the other, each at an angle to the last one, and their flow in the plane.


# %%
angles = 0.5 + 2.4 * torch.arange(4, dtype=torch.float64)
across = 2.5 * torch.stack([angles.cos(), angles.sin()], 1)
pushes = 3 * torch.stack([-angles.sin(), angles.cos()], 1)
ridges = list(zip(pushes, across, [-1, -1 / 3, 1 / 3, 1], strict=True))


def through(v, direction):
    """All four ridges."""
    log_det = 0
    for one in ridges if direction == "forward" else reversed(ridges):
        v, change = ridge(v, *one, direction)
        log_det = log_det + change
    return v, log_det


def ridges_log_prob(x):
    """The density after all four."""
    z, log_det = through(x.double(), "inverse")
    return log_normal(z).sum(1) + log_det


# %% [markdown]
# ## 1. A bent Gaussian (2 points)
#
# ●○○○○ · 15 minutes · read again: sections 1.1, 1.3 and 1.4 of the notebook
#
# Two numbers are enough to give a Gaussian a lean and other tails. The map
#
# $$x = f(z) = \sinh\bigl(\tau\,\operatorname{arcsinh}(z)+\kappa\bigr)$$
#
# leans to the right for $\kappa>0$, has heavier tails than a Gaussian for $\tau>1$, lighter ones for $\tau<1$, and is the identity for $\kappa = 0$, $\tau = 1$ (after [Jones and Pewsey, 2009](https://doi.org/10.1093/biomet/asp053)). For $\tau<0$ it falls. That is a flow too.
#
# **Write** `sinh_arcsinh_log_prob(x, skew, tail)`, the log-density of $x$ if $z$ is standard normal. Each coordinate has its own $\kappa$ and $\tau$ and is bent by itself.
#
# - `x`: (B, D), float32 or float64. `skew`, `tail`: $\kappa$ and $\tau$ of each coordinate, (D,); no $\tau$ is 0, and some may be negative.
# - Returns $\log p(x)$: (B,).
#
# <details><summary>Hint 1</summary>
#
# First solve $x = f(z)$ for $z$. The density of the noise is asked for at that $z$.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $f$ is a chain: arcsinh, then a line, then sinh. Its derivative is a product, and $\cosh$ of the inner part is $\sqrt{1+x^2}$.
#
# </details>


# %%
def sinh_arcsinh_log_prob(x: Tensor, skew: Tensor, tail: Tensor) -> Tensor:
    """Log-density of x = sinh(tail · arcsinh(z) + skew) for standard normal z.

    Arguments:
        x: Points, (B, D).
        skew, tail: A number for each coordinate, (D,); tail is not 0.

    Returns:
        log p(x), (B,).
    """
    # BEGIN SOLUTION
    z = ((x.asinh() - skew) / tail).sinh()
    slope = tail * ((1 + x**2) / (1 + z**2)).sqrt()
    return (log_normal(z) - slope.abs().log()).sum(1)
    # END SOLUTION


# %%
if hw.check(sinh_arcsinh_log_prob):
    x, near = torch.linspace(-400, 400, 400_001, dtype=torch.float64), torch.linspace(-5, 5, 401, dtype=torch.float64)

    def density(at, skew, tail):
        one = torch.tensor([[skew], [tail]], dtype=torch.float64)
        return sinh_arcsinh_log_prob(at[:, None], *one).exp()

    bent = {
        "κ = 0, τ = 1": (0, 1),
        "κ = 0.8, τ = 1": (0.8, 1),
        "κ = 0, τ = 1.6": (0, 1.6),
        "κ = 0.8, τ = −0.6": (0.8, -0.6),
    }
    claim(
        "each density integrates to 1", all(abs(torch.trapezoid(density(x, *p), x) - 1) < 1e-6 for p in bent.values())
    )
    plots.curves(near, {name: density(near, *p) for name, p in bent.items()}, "x", "p(x)")

# %% [markdown]
# **What to see.** Four densities from one Gaussian. With $\kappa = 0.8$ the curve leans to the right. With $\tau = 1.6$ it is lower and has more in the tails, with $\tau = -0.6$ it is narrow and ends early. (The sign of $\tau$ says in which direction $z$ runs along the curve; the density does not show it.) Each of them integrates to 1. Remember this check: it needs nothing but the function that is to be checked.
#
# **Question.** Someone writes $+\log|f'(z)|$ in the place of $-\log|f'(z)|$. To which number does that "density" integrate? For which $\kappa$ and $\tau$ does a test by the integral not see the slip?
#
# <!-- BEGIN SOLUTION -->
# $\int \mathcal N(z(x))\,|f'(z(x))|\,dx$, and with $dx = |f'(z)|\,dz$ it is $\int\mathcal N(z)\,f'(z)^2\,dz = \mathbb E[f'(z)^2]$. It is 1 for $\kappa = 0$ and $\tau = \pm1$, where $f(z) = \pm z$: a test on the identity, or on any map that keeps volume, cannot see a sign. (By chance the mean square can be 1 for another pair. So test with more than one pair.)
# <!-- END SOLUTION -->

# %% [markdown]
# ## 2. Couplings that take turns (3 points)
#
# ●●○○○ · 20 minutes · read again: sections 1.4, 2.1 and 2.2 of the notebook
#
# The notebook's couplings use a mask on points of full size. Many programs cut the point in two instead: the places 0, 2, 4, … and the places 1, 3, 5, …. That saves half of the work, but the two parts must then go back to where they came from. Three public flow libraries had a bug in such a chain: parts joined in another order than they were cut, the network of another layer, the sign of the log-determinant.
#
# **Write** `coupling_chain(v, nets, direction)`, a chain of such couplings. Layer $i$, counted from 0, keeps the even places if $i$ is even, and the odd places if $i$ is odd. With the network's $s, t$ of the part that stays, forward is
#
# $$x_\text{changes} = z_\text{changes}\,e^{s}+t,\qquad x_\text{stays} = z_\text{stays}.$$
#
# Forward goes through the layers 0, 1, 2, …; the inverse undoes all of them.
#
# - `v`: (B, D), $z$ or $x$; D ≥ 2, and it may be odd. `nets`: a list of pairs `(weight, bias)`, one for each layer, such that `network(kept, weight, bias)` gives `s, t`. `direction`: `"forward"` or `"inverse"`.
# - Returns `(result, log_det)`: (B, D) and (B,).
#
# <details><summary>Hint 1</summary>
#
# `v[:, 0::2]` are the even places, `v[:, 1::2]` the odd ones, and both can stand on the left of an `=`, too. For odd D the two parts differ in size.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Which layer did forward do last? And of each layer, which of its two operations?
#
# </details>


# %%
def coupling_chain(v: Tensor, nets: list[tuple[Tensor, Tensor]], direction: str) -> tuple[Tensor, Tensor]:
    """Affine couplings one after the other, on even and odd places in turn.

    Arguments:
        v: z for "forward", x for "inverse", (B, D).
        nets: For each layer the weight and the bias of its network.
        direction: "forward" or "inverse".
    """
    # BEGIN SOLUTION
    layers, log_det = list(enumerate(nets)), v.new_zeros(len(v))
    for i, net in layers if direction == "forward" else reversed(layers):
        stays, changes = slice(i % 2, None, 2), slice(1 - i % 2, None, 2)
        s, t = network(v[:, stays], *net)
        v, old = v.clone(), v[:, changes]
        v[:, changes] = old * s.exp() + t if direction == "forward" else (old - t) / s.exp()
        log_det = log_det + (s if direction == "forward" else -s).sum(1)
    return v, log_det
    # END SOLUTION


# %%
if hw.check(coupling_chain):
    flat = chosen.flatten(1)
    nets = [(0.05 * torch.randn(784, 392, generator=g), torch.zeros(784)) for _ in range(4)]
    z, there = coupling_chain(flat, nets, "inverse")
    back, home = coupling_chain(z, nets, "forward")
    claim("forward leads back to the digits", (back - flat).abs().max() < 1e-3)
    claim("and the two log-determinants sum to 0", (there + home).abs().max() < 1e-2)
    shown = {"x": flat, "z": z / 8, "forward of z": back, "by torch.cat": torch.cat([back[:, 0::2], back[:, 1::2]], 1)}
    plots.rows([image.reshape(-1, 1, 28, 28) for image in shown.values()], labels=list(shown))
    sizes, point = [(4, 3), (6, 2), (4, 3)], torch.randn(5, generator=g, dtype=torch.float64)
    small = [(torch.randn(n, m, generator=g).double(), torch.randn(n, generator=g).double()) for n, m in sizes]
    for way in ("forward", "inverse"):
        moved = log_volume(lambda v, way=way: coupling_chain(v, small, way)[0], point)
        claim(
            f"{way}: log_det is that of small moves",
            abs(coupling_chain(point[None], small, way)[1] - moved).max() < 1e-6,
        )

# %% [markdown]
# **What to see.** Ten digits, as rows of 784 numbers; what a chain of four couplings with random networks makes of them; and the way back, exact up to rounding. The last row is the digits with their even places joined to their odd ones by `torch.cat`: each of them falls into four small copies, for each half of the places has every second column of the image. No network is at fault there.
#
# **Question.** A public course tests its coupling layer like this: the input is a tensor of zeros, and `inverse(forward(z))` must give zeros. Name three wrong layers that pass. Which test would find them?
#
# <!-- BEGIN SOLUTION -->
# The layer that does nothing. The layer that multiplies by $e^s$ in both directions: forward gives $0\cdot e^s+t = t$, and $t-t$ is 0 whatever it is multiplied with. The layers without exp, or with the shift before the scale: each undoes itself, and is another map than the one asked for. And with a network that starts at zero, as most do, $s = t = 0$ and nearly all slips pass: parts joined in another order, the network of another layer, the half that changes shown to the network. The log-determinant was not looked at, so it may be anything. A test that finds all of these: points and networks that are not zero, the result beside a loop written from the formula, and log_det beside the determinant of the Jacobian, by small moves or by autograd, in both directions.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 3. Bits for grey levels (4 points)
#
# ●●●○○ · 30 minutes · read again: sections 4.1, 4.2 and 4.3 of the notebook
#
# A pixel is one of $L$ grey levels, $k\in\{0,\dots,L-1\}$, and a flow is a density of real numbers. Between them stand the noise $u$ that fills a level's cell, and the logit that fills the line:
#
# $$y = \frac{k+u}{L},\qquad v = \lambda+(1-2\lambda)\,y,\qquad \ell = \log\frac{v}{1-v},\qquad z = (\ell-\mu)\,e^{-s}.$$
#
# The last step is the simplest flow there is: a shift and a scale for each pixel, with $z$ standard normal. The probability of an image is the mean density of $y$ over its cell, times the volume of the cell:
#
# $$P(k) = \mathbb E_u\,[p(y)]\;L^{-D}\qquad\text{is estimated by}\qquad \frac1S\sum_{j=1}^S p(y^{(j)})\;L^{-D},$$
#
# where $y^{(j)}$ has the $j$-th draw of the noise and $p(y)$ is the density of the **whole** image, the product over its $D$ pixels. On average over the noise, $-\log_2$ of the estimate lies above the true bits, by Jensen, as for the VAE with several draws (section 1.7 of notebook 01). For $S = 1$ it is that of section 4.3.
#
# **Write** `image_bits(k, noise, levels, margin, loc, log_scale)`, that bound in **bits per dimension**.
#
# - `k`: images, int64, (B, …). `noise`: S draws of $u$ for each image, (S, B, …), float32 or float64. `levels`, `margin`: $L\ge2$, an int, and $\lambda$, a float between 0 and ½. `loc`, `log_scale`: $\mu$ and $s$ of each pixel, shape (…) of one image.
# - Returns $-\frac1D\log_2$ of the estimate: (B,), in the dtype of `noise`.
#
# <details><summary>Hint 1</summary>
#
# $\log p(y)$ is $\log\mathcal N(z)$ and the log-derivative of each of the maps on the way from $y$ to $z$. There are three of them.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $p(y)$ itself would be 0 or infinite in the computer for 784 pixels. `logsumexp` takes the logarithm of a sum of such numbers. Which sum comes first, that over pixels or that over draws?
#
# </details>


# %%
def image_bits(k: Tensor, noise: Tensor, levels: int, margin: float, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Bits per dimension of grey images, under independent Gaussians for the logits of their pixels.

    Arguments:
        k: Grey levels 0 … levels − 1, int64 (B, …).
        noise: u in [0, 1), S draws, (S, B, …).
        margin: λ of the logit.
        loc, log_scale: Of the logit of each pixel, (…).
    """
    # BEGIN SOLUTION
    share = margin + (1 - 2 * margin) * (k + noise) / levels
    z = (share.logit() - loc) * (-log_scale).exp()
    steep = math.log(1 - 2 * margin) - (share * (1 - share)).log()
    log_prob = (log_normal(z) - log_scale + steep).flatten(2).sum(2)
    log_mean = log_prob.logsumexp(0) - math.log(len(noise))
    return math.log2(levels) - log_mean / (k[0].numel() * math.log(2))
    # END SOLUTION


# %%
if hw.check(image_bits):
    seen, new, draws = digits[:1500], digits[1500:1550], [1, 2, 4, 8, 16, 32, 64]
    lines, gaps = {}, {}
    for levels in (2, 4):
        model, k = fitted(grey(seen, levels), levels, 0.01), grey(new, levels)
        noise = torch.rand(64, *k.shape, generator=g)
        bound = torch.stack([image_bits(k, noise[:S], levels, 0.01, *model).mean() for S in draws])
        truth = true_bits(k, levels, 0.01, *model).mean()
        lines |= {f"L = {levels}, bound": bound, f"L = {levels}, truth": truth.expand(len(draws))}
        gaps[levels] = bound - truth
    claim("the bound lies above the truth, whatever the draws", all((gap > 0).all() for gap in gaps.values()))
    claim(
        "64 draws close more of the gap than one, but less than half",
        all(0.5 < gap[-1] / gap[0] < 0.9 for gap in gaps.values()),
    )
    cells = [(grey(chosen, L) + torch.rand(chosen.shape, generator=g)) / L for L in (2, 4, 16)]
    plots.rows([2 * y - 1 for y in cells], labels=["y, L = 2", "y, L = 4", "y, L = 16"])
    plots.curves(torch.tensor(draws), lines, "draws of the noise, S", "bits per dimension", logx=True)

# %% [markdown]
# **What to see.** Above: what the flow is fitted to, digits of 2, 4 and 16 levels whose cells are filled with noise. Below, for 50 digits: since the pixels of this model are independent, the truth is known, and the bound can be held against it. It falls with the number of draws, and stays far above the truth. (Bits at different $L$ must not be compared: they are about different data. Most of these bits are the model's fault, since it knows nothing of strokes.)
#
# **Question.** With one draw the gap for $L = 4$ is about 0.13 bits per dimension. That is some 100 bits for an image, and 64 draws take away little more than a third of it. Why do more draws help so little? What must the density of $y$ look like for the gap to be 0 with a single draw?
#
# <!-- BEGIN SOLUTION -->
# $\log p(y)$ of an image is a sum over 784 pixels, and its deviation from draw to draw is more than ten nats. The mean of $p(y)$ is made by the rare draws in which all pixels happen to lie well, and among 64 draws there is none of these: the logarithm of the mean follows the best draw, which lies only a few deviations above the middle. To close a gap of $G$ nats takes about $e^{G}$ draws. The gap is 0 if $p(y)$ is constant over each cell, for then all draws give the same value (Jensen with equality). A flow would have to make plateaus with steep walls, which smooth maps do badly. A better noise helps: one that is drawn where $p(y)$ is large, and paid for by its own density. That is variational dequantization ([Ho and others, 2019](https://arxiv.org/abs/1902.00275)).
# <!-- END SOLUTION -->

# %% [markdown]
# ## 4. What leaves early (4 points)
#
# ●●●○○ · 25 minutes · read again: sections 2.1, 2.2 and 2.4 of the notebook
#
# In the notebook's multi-scale flow, half of the channels leave early and are standard normal from there on. [Glow](https://arxiv.org/abs/1807.03039) does better: what leaves is a Gaussian whose mean and scale depend on what stays. In a digit this is a lot to know, since a pixel is much like its neighbours.
#
# One scale works like this. Fold 2×2 pixels into channels by `squeeze`, (B, C, H, W) → (B, 4C, H/2, W/2), and split the channels: the first half $a$ stays, the second half $b$ leaves, as
#
# $$b = t(a)+e^{s(a)}\,e,\qquad e\sim\mathcal N(0, I).$$
#
# Then $a$ goes to the next scale and is folded there in turn. What is still there after the last scale is standard normal itself.
#
# **Write** `multi_scale(v, nets, direction)`. The noise $z$ has the shape of $x$: where $b$ was in $x$, $z$ has $e$; and where $a$ was, it has the noise of $a$.
#
# - `v`: $x$ or $z$, (B, C, H, W), with H and W divisible by 2 once for each scale. `nets`: `(weight, bias)` for each scale, the finest first, such that `network(a, weight, bias)` gives `s, t`, both of the shape of $b$. `direction`: `"inverse"` from $x$ to $z$, `"forward"` from $z$ to $x$.
# - Returns `(result, log_prob)`: (B, C, H, W) and (B,). The second is **in both directions** $\log p(x)$, the log-density of the image, not a log-determinant.
#
# `squeeze` and `unsqueeze` are imported and may be used; so may `network`.
#
# <details><summary>Hint 1</summary>
#
# $\log p(x) = \log p(b\mid a)+\log p(a)$. The second term is the same question, for an image of half the size and one scale less. A function may call itself.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Which $a$ does the network see? In both directions the same: the image. On the way to data that means to make the coarser scales first.
#
# </details>


# %%
def multi_scale(v: Tensor, nets: list[tuple[Tensor, Tensor]], direction: str) -> tuple[Tensor, Tensor]:
    """A flow in which half of the channels leave at each scale, as Gaussians that depend on the half that stays.

    Arguments:
        v: x for "inverse", z for "forward", (B, C, H, W).
        nets: Weight and bias of each scale's network, the finest first.
    """
    # BEGIN SOLUTION
    if not nets:
        return v, log_normal(v).sum((1, 2, 3))
    a, b = squeeze(v).chunk(2, 1)
    rest, log_prob = multi_scale(a, nets[1:], direction)
    s, t = network(rest if direction == "forward" else a, *nets[0])
    other = t + s.exp() * b if direction == "forward" else (b - t) / s.exp()
    e = b if direction == "forward" else other
    return unsqueeze(torch.cat([rest, other], 1)), log_prob + (log_normal(e) - s).sum((1, 2, 3))
    # END SOLUTION


# %%
if hw.check(multi_scale):
    nets = regressions(numbers_of(digits[:1500]), 2)
    plain, new = [(0 * weight, 0 * bias) for weight, bias in nets], numbers_of(digits[1500:])
    claim("knowing what stays saves more than half a bit for each pixel", bits(new, plain) - bits(new, nets) > 0.5)
    x, odd = numbers_of(chosen), (torch.arange(28) % 2)[:, None]  # the odd rows leave at the first scale
    z, other = multi_scale(x, nets, "inverse")[0], torch.randn(x.shape, generator=g)
    noise = {"x": z, "e = 0": (1 - odd) * z, "another e": (1 - odd) * z + odd * other, "another z": other}
    drawn = {name: multi_scale(v, nets, "forward")[0] for name, v in noise.items()}
    claim("forward leads back to the digits", (drawn["x"] - x).abs().max() < 1e-4)
    first, *others = [2 * (v / 4 + 0.12) - 1 for v in drawn.values()]
    plots.rows([first, z / 3, *others], labels=["x", "z", "e = 0", "another e", "another z"])
    point, small = torch.randn(16, generator=g).double(), [(weight.double(), bias.double()) for weight, bias in nets]
    z, log_prob = multi_scale(point.reshape(1, 1, 4, 4), small, "inverse")
    moved = log_volume(lambda v: multi_scale(v.reshape(-1, 1, 4, 4), small, "inverse")[0].flatten(1), point)
    gap = log_prob - log_normal(z).sum() - moved
    claim("log_prob is that of z, plus the volume of small moves", gap.abs().max() < 1e-6)

# %% [markdown]
# **What to see.** The networks are linear regressions, fitted to 1,500 digits. The row of $z$: what is left of a digit when each odd row has lost what the row above it says, and so again at half the size. Where the prediction holds, in the black and inside of broad strokes, little is left; the edges remain. (A quarter of the numbers stays to the end. These are the regular dots.) Without the $e$ of the first scale ($e = 0$) every digit can still be read: what left early was detail. With another $e$ it has other detail, and most of that looks wrong. The last row has nothing but new noise in it, and no digit comes: linear regressions do not know what a digit is. Still, they save about 0.7 bits for each pixel.
#
# **Question.** With another $e$ there are specks in the black, where no digit has any. The prediction $t$ is right there, so what is wrong? What would a better network do, and why would the bits fall?
#
# <!-- BEGIN SOLUTION -->
# The scale $s$ is one number for each channel, the same in the black and at an edge: an average of very small and very large errors. It is far too wide for the black, which is where most pixels are, and too narrow at edges. A network that sees whether $a$ is black around a place can answer with a small $s$ there and with a large one at edges. Then $-\log p(b\mid a) = \frac12e^2+s+\dots$ falls in the black, where $s$ becomes very negative while $e$ stays of the size of 1, and at edges, where $e^2$ was large. It needs to see more than one place, so its kernels must be larger than 1×1.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 5. A ridge that can be undone (3 points)
#
# ●●●○○ · 25 minutes · read again: sections 1.2 and 2.5 of the notebook
#
# The planar flow is the notebook's counterexample: $x = z+u\tanh(w^\top z+b)$ has a cheap determinant, and no inverse in closed form. The notebook halves an interval 60 times. But that is the fault of $\tanh$. Take another profile for the ridge, $h(a) = \frac{a}{1+|a|}$, which looks much the same:
#
# $$x = z+\hat u\,h(w^\top z+b),\qquad \hat u = u+\bigl(\mathrm{softplus}(w^\top u)-1-w^\top u\bigr)\frac{w}{\lVert w\rVert^2}.$$
#
# Of $u$ only its part along $w$ is changed, so that $w^\top\hat u = \mathrm{softplus}(w^\top u)-1>-1$. Otherwise the ridge could fold space over itself.
#
# **Write** `ridge(v, u, w, b, direction)`, both directions in closed form. Derive the inverse on paper first.
#
# - `v`: $z$ or $x$, (B, D), D ≥ 1. `u`, `w`: (D,). `b`: a Python float. `direction`: `"forward"` or `"inverse"`.
# - Returns `(result, log_det)`: (B, D) and (B,), of the direction asked for.
#
# <details><summary>Hint 1</summary>
#
# Multiply the equation by $w^\top$ and add $b$. With $a = w^\top z+b$ and $k = w^\top\hat u$ it becomes $a+k\,h(a) = w^\top x+b$: one equation for one number. Once $a$ is known, so is what was added to $z$.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Since $k>-1$, $a$ has the sign of the right-hand side. For $|a|$, multiply by $1+|a|$: a quadratic with one root that is not negative.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# $\det(I+\hat u\,w^\top c) = 1+c\,w^\top\hat u$, as in the notebook. What is $h'(a)$, and at which $a$ is it wanted on the way back?
#
# </details>


# %%
def ridge(v: Tensor, u: Tensor, w: Tensor, b: float, direction: str) -> tuple[Tensor, Tensor]:
    """A planar flow with the profile a / (1 + |a|), in both directions.

    Arguments:
        v: z for "forward", x for "inverse", (B, D).
        u, w: The push before it is bounded, and the direction across the ridge, (D,).
    """
    # BEGIN SOLUTION
    push = u + (softplus(u @ w) - 1 - u @ w) * w / (w @ w)
    a, k = v @ w + b, push @ w
    if direction == "inverse":
        half = (a.abs() - 1 - k) / 2
        a = a.sign() * (half + (half**2 + a.abs()).sqrt())
    moved = (a / (1 + a.abs()))[:, None] * push
    log_det = torch.log1p(k / (1 + a.abs()) ** 2)
    return (v + moved, log_det) if direction == "forward" else (v - moved, -log_det)
    # END SOLUTION


# %%
if hw.check(ridge):
    z = torch.randn(1500, 2, generator=g, dtype=torch.float64)
    x, log_det = through(z, "forward")
    claim("the inverse leads back to the noise", (through(x, "inverse")[0] - z).abs().max() < 1e-9)
    moved = log_volume(lambda v: through(v, "forward")[0], z[0])
    claim("log_det is that of small moves", abs(log_det[0] - moved) < 1e-6)
    axis = torch.arange(-12, 12, 0.04, dtype=torch.float64)
    mass = ridges_log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * 0.04**2
    claim("the density integrates to 1", abs(mass - 1) < 1e-3)
    made, (left, right) = plots.panels(2, width=7.6, height=3.8)
    plots.density(ridges_log_prob, extent=(-5, 5, -5, 5), resolution=320, ax=left, title="density")
    plots.scatter(x, extent=(-5, 5, -5, 5), ax=right, title="samples")

# %% [markdown]
# **What to see.** Four ridges bend a round Gaussian into a wave. The samples on the right came forward, from noise. The density on the left was found backward, point by point, by four square roots; it is dark where the samples lie close together, and has a sharp edge where a ridge pushed its two sides together.
#
# **Question.** Now each direction of a ridge costs about D multiplications, as little as a coupling without its network, and no halving of intervals. Why are flows for images still built from couplings?
#
# <!-- BEGIN SOLUTION -->
# One ridge moves all points along one direction $\hat u$, by an amount that depends on one number, $w^\top z$, and its Jacobian differs from the identity by a matrix of rank one. It takes hundreds of them to change each of 784 pixels in its own way. A coupling changes half of all pixels at once, each by a scale and a shift of its own, and these come from any network of the other half: a deep one, with convolutions. The limit of the ridge is not its inverse alone, but how little it can say.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 6. Small steps (4 points)
#
# ●●●●○ · 35 minutes · read again: sections 1.2, 1.3 and 2.5 of the notebook
#
# So far layers were made so that their determinants are cheap. There is another way: layers that hardly do anything, and many of them. Take any field $v$, which says at each point how fast to move and where to, and walk along it for one unit of time in K steps,
#
# $$z_{i+1} = z_i+h\,v(z_i),\qquad h = 1/K,\qquad z_0 = z,\quad z_K = x.$$
#
# One step has the Jacobian $I+hJ$, where $J$ is that of $v$ at $z_i$. For small $h$ its determinant can be had without computing it:
#
# $$\log\det(I+hJ) = h\,c_1+h^2\,c_2+O(h^3),$$
#
# where $c_1$ and $c_2$ are two simple numbers made of $J$. **Derive both** before you code.
#
# **Write** `small_steps(z, u, w, b, steps)` for the field of M ridges at once, $v(z) = U\tanh(Wz+b)$. It walks from $z$ to $x$ and sums three things over the steps: the exact $\log|\det(I+hJ)|$, its first order $h\,c_1$, and the first two orders $h\,c_1+h^2c_2$.
#
# - `z`: (B, D). `u`: $U$, (D, M). `w`: $W$, (M, D). `b`: (M,). `steps`: K ≥ 1, an int.
# - Returns `(x, exact, first, second)`: (B, D), and three times (B,).
#
# <details><summary>Hint 1</summary>
#
# The logarithm of a determinant is the sum of the logarithms of the eigenvalues, and those of $I+hJ$ are $1+h\lambda_j$ (complex ones come in pairs). Which function of a matrix is the sum of its eigenvalues, and which is the sum of their squares?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $J = U\,\mathrm{diag}(1-\tanh^2(Wz+b))\,W$, a matrix for each point of the batch: `torch.einsum("dm,bm,me->bde", …)`. `torch.linalg.slogdet` takes batches.
#
# </details>


# %%
def small_steps(z: Tensor, u: Tensor, w: Tensor, b: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk along v(z) = U tanh(W z + b) for one unit of time, and follow the volume.

    Arguments:
        z: Where the walk begins, (B, D).
        u, w, b: (D, M), (M, D), (M,).

    Returns:
        x, (B, D); the log-determinant of the walk, its first order, its first two orders, (B,) each.
    """
    # BEGIN SOLUTION
    h, x, exact, first, second = 1 / steps, z, 0, 0, 0
    for _ in range(steps):
        value = torch.tanh(x @ w.T + b)
        step = h * torch.einsum("dm,bm,me->bde", u, 1 - value**2, w)
        exact = exact + torch.linalg.slogdet(step + torch.eye(len(u), dtype=z.dtype)).logabsdet
        trace, square = torch.einsum("bdd->b", step), torch.einsum("bde,bed->b", step, step)
        first, second = first + trace, second + trace - square / 2
        x = x + h * value @ u.T
    return x, exact, first, second
    # END SOLUTION


# %%
if hw.check(small_steps):
    w, b = torch.randn(12, 2, generator=g).double(), torch.randn(12, generator=g).double()
    turn = torch.tensor([[math.cos(1.4), -math.sin(1.4)], [math.sin(1.4), math.cos(1.4)]], dtype=torch.float64)
    u = 0.8 * turn @ w.T  # each ridge pushes almost along itself: a whirl that spreads a little
    z, times = torch.randn(600, 2, generator=g).double(), [0, 0.25, 0.5, 0.75, 1]
    states = [small_steps(z, t * u, w, b, 100)[0] for t in times]
    plots.film_points(states, times=[f"t = {t}" for t in times], labels=(z[:, 0] > 0).long())
    counts = torch.tensor([4, 8, 16, 32, 64, 128, 256])
    walks = [small_steps(z[:200], u, w, b, steps) for steps in counts.tolist()]
    first = torch.stack([(exact - one).abs().mean() for _, exact, one, _ in walks])
    both = torch.stack([(exact - two).abs().mean() for _, exact, _, two in walks])
    claim("twice the steps, half the gap of the first order", abs(first[-2] / first[-1] - 2) < 0.1)
    claim("and a quarter of that of two orders", abs(both[-2] / both[-1] - 4) < 0.2)
    moved = log_volume(lambda v: small_steps(v, u, w, b, 16)[0], z[0])
    claim("exact is that of small moves", abs(walks[2][1][0] - moved) < 1e-6)
    gaps = {"first order": first, "two orders": both}
    plots.curves(counts, gaps, "number of steps K", "mean distance to the exact sum", logx=True, logy=True)

# %% [markdown]
# **What to see.** Above: points under a whirl, for one unit of time, in the colour of the side on which they began. The border between the sides is bent, and it is never torn. Below: with twice the steps the first order comes twice as near to the exact sum, and the two orders together four times. K steps make K errors, of order $h^2$ or $h^3$, and K is $1/h$: so the lines fall with slopes 1 and 2. For many steps a sum of traces is all that is needed.
#
# **Question.** Let $v(z) = Az$ be a rotation of the plane, $A = \begin{pmatrix}0&-\omega\\ \omega&0\end{pmatrix}$. A rotation keeps areas, and the first order says so. What does the exact sum say for K steps, and why? And what does the limit $K\to\infty$ buy: which demands on a layer fall away, and what is paid for it?
#
# <!-- BEGIN SOLUTION -->
# $\det(I+hA) = 1+h^2\omega^2$, so the sum is $K\log(1+\omega^2/K^2)\approx\omega^2/K$: every step follows the tangent and leaves its circle outwards. The two orders give just this, $-\frac{h^2}2\mathrm{tr}A^2 = h^2\omega^2$ for each step. In the limit the walk stays on the circle and area is kept. In general K errors of order $h^2$ sum to one of order $h$, so that the sum tends to the integral of the divergence, $\int_0^1\mathrm{tr}\,J\,dt$, along the path. What falls away: no mask, no split, no special shape of the weights, for the limit is invertible for any smooth $v$ (walk back along $-v$); and no determinant, which costs D³, but a trace, which one can estimate by $r^\top Jr$ with random $r$ at the cost of one derivative. What is paid: many evaluations of one network where a flow evaluates each layer once, and an error of the steps. The ODE that belongs to a diffusion model is such a flow, and its likelihood is computed in this way.
# <!-- END SOLUTION -->

# %% [markdown]
# ## Recap
#
# - $\log p(x) = \log p(z)-\log|\det\partial f/\partial z|$, the derivative taken at $z$. In code: each direction returns the log-determinant of what it computes, and the two sum to 0.
# - A coupling is undone from the last layer to the first, and within a layer the shift before the scale. Parts go back to the places that they came from.
# - From a density to bits: the log-determinant of every map on the way, $D\log L$, and at the very end a division by $D\log 2$. Noise makes it a bound; averages of densities over draws tighten it, slowly.
# - What leaves early is counted where it leaves, with a mean and a scale that depend on what stays.
# - An inverse in closed form is a matter of choosing the function. How much one layer can say is another matter.
# - $\log\det(I+hJ) = h\,\mathrm{tr}J-\frac{h^2}2\mathrm{tr}J^2+\dots$: for small steps the determinant is a trace, and flows become ODEs.
#
# **Pitfalls**
#
# - A test on zeros, on the identity, or on a round trip alone sees no sign. Compare with small moves, or integrate the density.
# - `torch.cat` undoes `chunk`, and does not undo slices with steps.
# - Sums over pixels and channels, means over draws; the logarithm of a mean is not the mean of logarithms.
# - $\lVert w\rVert$ or $\lVert w\rVert^2$, $e^{s}$ or $s$, a deviation or a variance: name it before you code it.
#
# ## Hand in
#
# Restart the kernel, run all cells, and look for the six lines with ✓ and the name of a function. (The other lines with ✓ are claims about the figures.) Save, and hand in this file as it is: `hw2_flows.ipynb`. Functions are found by name, so do not rename them. An exercise that you did not finish may stay as it is; it costs its own points and no others.
