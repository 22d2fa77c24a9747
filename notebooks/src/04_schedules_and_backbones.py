# ---
# jupyter:
#   jupytext:
#     formats: notebooks//ipynb,notebooks/src//py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Noise schedules, backbones, and how to score a generator
#
# A diffusion model has three choices to make that its loss says nothing about: how fast the noise comes, what the network looks like, and how we tell a good model from a bad one. At the end of this notebook you will be able to
#
# - draw a noise schedule in three ways, and say what it can change and what it cannot;
# - explain why the best schedule depends on the resolution, and by how much to move it;
# - say what each part of a U-Net is for, and measure what a part costs;
# - build a diffusion transformer (DiT) from patches, positions and blocks, and prove that it starts as the identity;
# - derive the Fréchet distance, correct its bias, and catch those who lie with it.
#
# **Time:** three sittings of an hour, with pen and paper: sections 1, 2–3 and 4–6. It runs in about a minute on a processor.
# **It builds on** notebook 03: the path $x_t = \alpha(t)\,x_0+\sigma(t)\,\epsilon$, what a network may predict, the loss and its bound.
# **Symbols** are those of the lecture; the README's [symbol ledger](../README.md#symbols) lists them all.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import contextlib
import math

import matplotlib.patches
import sympy
import torch
from scipy import linalg, optimize
from torch.utils.flop_counter import FlopCounterMode

from dgm_course import checkpoints, data, likelihood, losses, metrics, nets, samplers, schedules, tables, toy, training
from dgm_course.checks import claim, show_source
from dgm_course.denoisers import Denoiser, clipped
from dgm_course.nets import dit
from dgm_course.paths import VP, Cosine, DiscretePath, Scaled, Sigmoid
from dgm_course.viz import plots, widgets

g = torch.Generator().manual_seed(0)  # where nearly all chance in this notebook comes from
digits, labels = data.images(data.load("mnist", "test"))
train_digits, train_labels = data.images(data.load("mnist", "train"))

# %% [markdown]
# ## 1. Noise schedules
#
# ### 1.1 One schedule, three pictures
#
# A schedule says how much noise there is at each $t$. It is written in three ways, and papers mix them:
#
# - $\beta_t$, the variance of the noise that step $t$ adds;
# - $\bar\alpha_t=\alpha(t)^2$, the share of the variance of $x_t$ that is still image (for a pixel of variance 1);
# - the **log-SNR**, the logarithm of the signal-to-noise ratio: $\ell(t) = \log\dfrac{\alpha(t)^2}{\sigma(t)^2} = \log\dfrac{\bar\alpha_t}{1-\bar\alpha_t}$.
#
# The last is the most useful one, because it is the only thing that matters about a time. Divide $x_t$ by $\alpha(t)$: what is left is $x_0$ plus noise of variance $\sigma^2/\alpha^2=e^{-\ell}$. So two schedules with the same $\ell$, each at its own $t$, give the network the same information.
#
# The slide names constant, linear and quadratic $\beta$; its figure adds cosine and sigmoid. With $T=1000$:
#
# | schedule | formula | parameters |
# |---|---|---|
# | constant | $\beta_t=\beta$ | $\beta=0.01$ |
# | linear | $\beta_t$ in even steps from $\beta_1$ to $\beta_T$ | $10^{-4}$, $0.02$ |
# | quadratic | $\sqrt{\beta_t}$ in even steps from $\sqrt{\beta_1}$ to $\sqrt{\beta_T}$ | $10^{-4}$, $0.02$ |
# | cosine | $\bar\alpha_t\propto\cos^2\bigl(\frac{t/T+o}{1+o}\frac\pi2\bigr)$, and no $\beta_t$ above a clip | $o=0.008$, clip $0.999$ |
# | sigmoid | $\bar\alpha_t$ runs down the logistic function, from its value at $-b/\tau$ to that at $-e/\tau$, rescaled to $1\dots0$, and no $\beta_t$ above a clip | $b=-3$, $e=3$, temperature $\tau=1$, clip $0.999$ |
#
# *Which of the five spends most of its steps where hardly any image is left?*

# %%
chains = {
    "constant": DiscretePath(schedules.constant_betas(1000)),
    "linear": DiscretePath(schedules.linear_betas(1000)),
    "quadratic": DiscretePath(schedules.quadratic_betas(1000)),
    "cosine": DiscretePath(schedules.cosine_betas(1000)),
    "sigmoid": DiscretePath(schedules.sigmoid_betas(1000)),
}
each = torch.arange(1, 1001)
for name, chain in chains.items():
    left = (1 - chain.betas[1:]).cumprod(0)  # of the image, after each step
    claim(f"{name}: the path's log-SNR is log ᾱ/(1 − ᾱ)", torch.allclose(chain.logsnr(each), (left / (1 - left)).log()))

# %%
made, (beta, share, snr, density) = plots.panels(2, rows=2, width=10.0, height=7.4)
plots.curves(each[:980], {n: c.betas[1:981] for n, c in chains.items()}, "t", "β", logy=True, ax=beta)
plots.curves(each, {n: c.alpha_bars[1:] for n, c in chains.items()}, "t", "ᾱ, share of the image", ax=share)
plots.curves(each[:980], {n: c.logsnr(each)[:980] for n, c in chains.items()}, "t", "log-SNR ℓ", ax=snr)
edges = torch.linspace(-10, 10, 41)
spent = {n: torch.histogram(c.logsnr(each).float(), edges).hist / 1000 for n, c in chains.items()}
plots.curves((edges[1:] + edges[:-1]) / 2, spent, "log-SNR ℓ", "share of steps for each half unit", ax=density)
made

# %% [markdown]
# (The last 20 steps are left out on the left, where cosine and sigmoid shoot up or down.) Top left, β itself says little. Top right you see how long an image lives: longest under the cosine and sigmoid schedules, shortest under the constant one. Bottom right is the picture to remember: **a schedule is a choice of how often each log-SNR is visited.** It is what a histogram of $\ell(t)$ shows when $t$ is drawn evenly. Constant β spends most of its steps below $-4$, on what is noise already.
#
# Each family has parameters. Here are those of the sigmoid schedule (Chen, 2023), with $e=3$ held fixed. *What does moving the start $b$ do to the noisy end of the log-SNR, and what to the clean end?*


# %%
def pieces(start, tau):
    u = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    made, (left, right) = plots.panels(2, width=9.0, height=3.2)
    shown = {"sigmoid": Sigmoid(start, 3.0, tau), "cosine": Cosine()}
    plots.curves(u, {n: p.alpha(u) ** 2 for n, p in shown.items()}, "t", "α²", ax=left)
    plots.curves(u, {n: p.logsnr(u) for n, p in shown.items()}, "t", "log-SNR ℓ", ax=right)
    right.set_ylim(-12, 12)
    return made


widgets.explore(pieces, start=([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0], -3.0), tau=([0.3, 0.6, 1.0], 1.0))

# %% [markdown]
# At $\tau=1$ the start moves the clean end: with $b=2$ the log-SNR at $t=0.01$ is 4.2 and not 5.8, so the image is noisy almost from the beginning. The noisy end moves less than half as far: at $t=0.99$ it is $-5.1$ and not $-5.8$. A small temperature makes the piece of the logistic function steeper, or more curved if it lies to one side; then the start is felt at both ends.
#
# ### 1.2 What a schedule cannot change
#
# **Claim.** Take the bound of notebook 03 in the limit of many steps, with the variance $\tilde\beta$. For the best possible denoiser, and between two fixed log-SNRs, its value is the same for *every* schedule.
#
# **Why.** In section 4.6 there we measured the weight of $\lVert x_0-\hat x_0\rVert^2$ in one term: it is half of what the SNR, $e^{\ell}$, loses in the step. (Below is the algebra once more, for any two times $s<t$.) Many small steps make a sum into an integral:
# $$\sum_t L_{t-1}\ \to\ \tfrac12\int_{\ell_{\min}}^{\ell_{\max}} e^{\ell}\;\mathbb E\lVert x_0-\hat x_0\rVert^2\,d\ell .$$
# The error depends on the log-SNR alone. How $\ell$ depends on $t$ has dropped out. (Kingma et al., 2021, section 5.1.)

# %%
alpha_s, alpha_t, sigma_s, sigma_t = sympy.symbols("alpha(s) alpha(t) sigma(s) sigma(t)", positive=True)
a = alpha_t / alpha_s
added = sigma_t**2 - a**2 * sigma_s**2  # the noise that the step from s to t adds
mean_weight, variance = alpha_s * added / sigma_t**2, added * sigma_s**2 / sigma_t**2  # of x₀ in the posterior; its own
snr_lost = alpha_s**2 / sigma_s**2 - alpha_t**2 / sigma_t**2
claim("the weight of ‖x₀ − x̂₀‖² is half of the SNR lost", sympy.simplify(mean_weight**2 / variance - snr_lost) == 0)

# %% [markdown]
# Then the claim by numbers. The data are a mixture of Gaussians, whose best denoiser we know exactly. Three different schedules, each cut to $-6\le\ell\le 6$. Their times are their own, their noises too.

# %%
mixture = toy.ring(8)
exact_x0 = mixture.sample(2000, g).double()


def bound_and_simple(path, low=-6.0, high=6.0, steps=150):
    """The bound's integral between two log-SNRs, by the midpoint rule, and the mean over t of the squared error of ε."""
    ends = [optimize.brentq(lambda t, ell=ell: path.logsnr(t).item() - ell, 1e-6, 1 - 1e-6) for ell in (high, low)]
    times = torch.linspace(*ends, steps + 1, dtype=torch.float64)
    snr, bound, simple = path.logsnr(times).exp(), 0.0, 0.0
    for s, t, drop in zip(times[:-1], times[1:], -snr.diff(), strict=True):
        middle = (s + t) / 2
        xt = path.perturb(exact_x0, middle, torch.randn(exact_x0.shape, generator=g, dtype=torch.float64))
        error = (mixture.denoiser(path)(xt, middle) - exact_x0).square().sum(1).mean().item()
        bound += 0.5 * drop.item() * error
        simple += path.logsnr(middle).exp().item() * error / steps  # ε − ε̂ = −(α/σ)(x₀ − x̂₀)
    return bound, simple


# %%
values = torch.tensor([bound_and_simple(path) for path in (Cosine(), VP(), Sigmoid())])
for schedule, (bound, simple) in zip((Cosine(), VP(), Sigmoid()), values.tolist(), strict=True):
    print(f"{type(schedule).__name__:>8}: bound {bound:.1f}, simple loss {simple:.1f}")
claim("the bound is the same for the three schedules, to 2 %", values[:, 0].max() < 1.02 * values[:, 0].min())
claim("the simple loss is not: it differs by more than a tenth", values[:, 1].max() > 1.1 * values[:, 1].min())

# %% [markdown]
# So a schedule does not move the goal between two log-SNRs. (The ends it does move, $L_T$ and $L_0$.) It changes three other things, and each of them can be chosen by itself:
#
# 1. **the weights** of the log-SNRs in the simple loss, which visits them as often as the schedule does;
# 2. **the noise** of the gradient: a batch that hardly visits an important level learns slowly there;
# 3. **the grid** on which we sample, and with it the error that few steps make.
#
# That is why a bad schedule can be repaired in part by loss weights, by another density of $t$ in training (that of section 7 in notebook 03, say), or by a better grid at sampling.
#
# ### 1.3 What the end costs: $L_T$
#
# Sampling starts from $\mathcal N(0,I)$, the chain ends in $q(x_T\mid x_0)$. The bound's first term, $L_T$, is the price of the difference. It has no parameters, so no training mends it. The slide asks for $L_T\approx0$. In nats for a digit, on average over the test digits:

# %%
unscaled = torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)  # the numbers for 1000 steps, used for 100
cost = {name: likelihood.prior_term(chain, digits, 1000).mean().item() for name, chain in chains.items()}
cost["linear, 100 steps, scaled"] = (
    likelihood.prior_term(DiscretePath(schedules.linear_betas(100)), digits, 100).mean().item()
)
cost["linear, 100 steps, unscaled"] = likelihood.prior_term(DiscretePath(unscaled), digits, 100).mean().item()
for name, nats in cost.items():
    print(f"{name:>28}: {nats:.2g} nats, {nats / 784 / math.log(2):.1g} bits for a pixel")
claim("L_T is below half a nat for the five schedules", max(list(cost.values())[:5]) < 0.5)
claim("it is above 100 nats for the 100 steps that were not scaled", cost["linear, 100 steps, unscaled"] > 100)

# %% [markdown]
# A bound on digits runs into hundreds of nats, so half a nat is nothing. The last line is a common slip: the published β belong to 1,000 steps. With 100 they leave $\bar\alpha_T=0.36$, more than a third of the image, and sampling starts from something that training never ended in.
#
# ### 1.4 Zero terminal SNR
#
# Is $\bar\alpha_T = 4\cdot10^{-5}$ small enough? In bits for a pixel, $L_T$ says yes. But look at one number of the image, its mean brightness $\mu$. The mean over the $D$ values of $x_T$ is $\sqrt{\bar\alpha_T}\,\mu$ plus noise of deviation $1/\sqrt D$. So the more pixels there are, the more clearly the last step still shows the brightness. How many deviations of that noise lie between grey and white, and what is $L_T$ of a white picture?

# %%
for side, channels in ((28, 1), (64, 3), (512, 3)):
    white = torch.ones(1, channels, side, side, dtype=torch.float64)
    visible = (chains["linear"].alpha_bars[-1] * white.numel()).sqrt().item()
    nats = likelihood.prior_term(chains["linear"], white, 1000).item()
    print(f"{side}×{side}×{channels}: {visible:.2f} deviations, L_T = {nats:.2f} nats")
    claim("L_T is half the square of the deviations, to 1 %", abs(nats / (visible**2 / 2) - 1) < 0.01)
claim("at 512×512 in colour white is more than five deviations away from grey", visible > 5)

# %% [markdown]
# In training, the network of a large model *reads the brightness off* $x_T$. In sampling it gets pure noise, whose mean is 0, and believes it: all its images are of medium brightness. Public text-to-image models could not draw a black picture for this reason (Lin et al., 2024); they worked on smaller latents, but with a schedule that leaves more. For digits it does not matter. So $L_T$ does see it, in *nats for the whole image*: these say whether two distributions can be told apart, and bits for a pixel hide it.
#
# The remedy takes the rest of the signal out: move $\alpha(t)=\sqrt{\bar\alpha_t}$ down so that it ends at 0, and stretch it so that it starts where it did.

# %%
zero = DiscretePath(schedules.zero_terminal(chains["linear"].betas[1:]))
claim("no signal is left at T", zero.alpha(1000).item() == 0)
claim("the first step is as before", torch.allclose(zero.betas[1], chains["linear"].betas[1]))
moved = (zero.alpha(each) / chains["linear"].alpha(each))[:-1]
early = chains["linear"].alpha_bars[1:-1] > 0.4
claim("α changes by less than 1 % as long as ᾱ > 0.4", (moved[early] - 1).abs().max() < 0.01)
true_noise = torch.randn(4, 1, 28, 28, generator=g)
x_T = zero.perturb(digits[:4], 1000, true_noise)

# %% [markdown]
# Now noise prediction breaks. At $T$ we have $x_T=\epsilon$. The network answers "$\epsilon$ is what I see", makes no error at all, and has said nothing about the image. Turning its answer into $\hat x_0=(x_T-\epsilon)/0$ is impossible, and `Denoiser` says so. The prediction of $v=\alpha\epsilon-\sigma x_0$ is $-x_0$ there: a real question, whose best answer is the mean of the data.

# %%
parrot = Denoiser(lambda xt, t: xt, zero, predicts="eps")
claim("answering x_T makes no error in the noise", torch.equal(parrot.output(x_T, 1000), true_noise))
try:
    parrot(x_T, 1000)
except ValueError as error:
    print(error)
says_mean = Denoiser(lambda xt, t: -digits.mean(0, keepdim=True).expand_as(xt), zero, predicts="v")
guess = says_mean(x_T, 1000)
claim("with v the guess at T is what the network chose, the mean digit", torch.allclose(guess[0], digits.mean(0)))

# %% [markdown]
# ### 1.5 The best schedule depends on the resolution
#
# "Best noise schedule depends on the resolution of the image and the task", says the slide. Why should it? Take 1,000 training digits, 100 of each class, as the whole world. In such a world we can say exactly what a noisy picture tells: how probable each of the 1,000 is. Their mean with these probabilities is the best guess there is, and no network can do better.
#
# Below is one of the digits at four resolutions, with the same schedule and the same $t$, and under each the best guess. Move $t$. *When do you lose the digit at 7×7? When at 56×56?*

# %%
world, world_labels = data.balanced(train_digits, train_labels, 1000, g)
worlds = {side: data.resized(world, side) for side in (7, 14, 28, 56)}
classes = torch.nn.functional.one_hot(world_labels).float()
path = Cosine()


def explain(bank, picked, path, t, generator):
    """Noisy versions of the picked images of a bank, and how well each image of the bank explains each of them."""
    xt = path.perturb(bank[picked], t, torch.randn(bank[picked].shape, generator=generator))
    alpha, sigma = path.alpha(t).item(), path.sigma(t).item()
    squared = torch.cdist(xt.flatten(1), alpha * bank.flatten(1)).square()
    return xt, (-squared / (2 * sigma**2)).softmax(1)  # Bayes, all images equally likely beforehand


def known(bank, path, t, count=100):
    """How sure the class and the image are: the mean weight of the right ones."""
    picked = torch.arange(0, 1000, 1000 // count)
    _, weights = explain(bank, picked, path, t, torch.Generator().manual_seed(1))
    right = classes[picked].bool()
    return (weights @ classes)[right].mean().item(), weights[torch.arange(count), picked].mean().item()


# %%
def four_sizes(t):
    made, axes = plots.panels(4, rows=2, width=8.6, height=4.9)
    for column, (side, bank) in enumerate(worlds.items()):
        xt, weights = explain(bank, torch.tensor([350]), path, t, torch.Generator().manual_seed(3))
        guess = (weights @ bank.flatten(1)).reshape(side, side)
        for ax, image in ((axes[column], xt[0, 0]), (axes[column + 4], guess)):
            ax.imshow(image, vmin=-1.5, vmax=1.5)
            ax.set(xticks=[], yticks=[])
        axes[column].set_title(f"{side}×{side}, t = {t}")
        axes[column + 4].set_title(f"a 3 with {(weights[0] @ classes)[3]:.0%}")
    axes[0].set_ylabel("what is seen")
    axes[4].set_ylabel("best guess")
    return made


widgets.explore(four_sizes, t=([0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95], 0.8))

# %% [markdown]
# At 7×7 the digit is lost between $t=0.3$ and $0.5$, at 56×56 only after $0.9$. Look at $t=0.8$: your eye finds little in any of the four. But the best guess at 56×56 is sharp, and at 7×7 it is a blot. The noise of a pixel is the same everywhere. In the large picture many pixels tell the same story, and their noises average out. So one schedule is hard on small images and easy on large ones: for a large image most of its steps do no more than fine detail, and only the few near $t=1$ decide what the picture shows.
#
# **How much is the shift?** For one kind of enlargement we can say exactly. Let every pixel be copied into a square of $r\times r$. Then each value of $x_0$ is seen $r^2$ times, with independent noises. Their mean $\bar x_t$ is all that matters: it is $\alpha(t)\,x_0$ plus noise of variance $\sigma(t)^2/r^2$. Its log-SNR is higher by
# $$\log r^2 = 2\log r,\qquad 1.39\ \text{for each doubling of the side.}$$
# So to make the large image as hard as the small one, *lower* its log-SNR by $2\log r$: large images need more noise.
#
# Why does the mean alone matter? For a guess $m$ of $\alpha(t)\,x_0$, the squared distances of the copies add up to $r^2(\bar x_t-m)^2$ and a rest without $m$:

# %%
m = sympy.Symbol("m")
noisy = sympy.symbols("y1:5")  # r = 2: four noisy copies
mean = sum(noisy) / 4
rest = sympy.expand(sum((y - m) ** 2 for y in noisy) - 4 * (mean - m) ** 2)
claim("what is left of the four squared distances does not depend on the guess", m not in rest.free_symbols)

# %% [markdown]
# So for copied pixels the shift is exact, and we can see it: how probable each of 100 digits is, once from 28×28 pixels, once from the same digits at 56×56 with a path moved down by $2\log 2$. As the noise we take one draw at 56×56, and its mean over each square, times two, at 28×28.

# %%
copied = world[:100].double().repeat_interleave(2, 2).repeat_interleave(2, 3)
eps = torch.randn(copied.shape, generator=g, dtype=torch.float64)
merged = 2 * torch.nn.functional.avg_pool2d(eps, 2)  # variance 1 again


def posterior(bank, path, t, noise):
    xt = path.perturb(bank, t, noise)
    far = torch.cdist(xt.flatten(1), path.alpha(t) * bank.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return (-far.square() / (2 * path.sigma(t) ** 2)).softmax(1)


for t in (0.3, 0.6, 0.9):
    small = posterior(world[:100].double(), Cosine(), t, merged)
    large = posterior(copied, Cosine(shift=-2 * math.log(2)), t, eps)
    claim(f"t = {t}: moved by 2 log 2, copied pixels give the same posterior", torch.allclose(small, large, atol=1e-10))

# %% [markdown]
# Real images are not copies. An image at twice the resolution has *new* detail, and its old detail is spread over neighbours that are alike but not equal. So measure: how surely is the class known, on average over 100 digits? Below on the left, over $t$. On the right each curve is drawn over its log-SNR plus $k\log(\text{side}/28)$. Copies would all lie on one curve for $k=2$. *Is there a $k$ that makes these four one curve?*

# %%
levels = torch.linspace(-7.5, 3.5, 23, dtype=torch.float64)  # log-SNRs
times_of = 2 / math.pi * torch.atan(torch.exp(-levels / 2))  # where the cosine path has them
sure = {side: torch.tensor([known(bank, path, u) for u in times_of.tolist()]) for side, bank in worlds.items()}
curves = {f"{side}×{side}": values[:, 0] for side, values in sure.items()}
shades = dict(zip(curves, ("#9ecae1", "#4292c6", "#2171b5", "#08306b"), strict=True))


# %%
def moved_by(k):
    made, (left, right) = plots.panels(2, width=10.0, height=3.9)
    across = {f"{side}×{side}": levels + k * math.log(side / 28) for side in sure}
    name, height = f"log-SNR + {k} log(side/28)", "how surely the class is known"
    plots.curves(times_of, curves, "t", height, colors=shades, ax=left, title="the same t")
    plots.curves(across, curves, name, height, colors=shades, ax=right, title=f"log-SNR, moved by k = {k}")
    right.set_xlim(4, -8)  # noise to the right, as on the left
    for ax in (left, right):
        ax.axhline(0.5, color="0.5", linestyle="--", linewidth=1)
        ax.axhline(0.1, color="0.5", linestyle=":", linewidth=1)
    return made


widgets.explore(moved_by, k=([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5], 2.0))

# %% [markdown]
# The dotted line is chance, 10 %. No $k$ does it. With $k=2$ the three larger sizes come close and 7×7 stays apart; $k=2.5$ brings all four nearest together, but not to one curve. What is left is what copies cannot explain. In numbers, where each curve passes one half (the dashed line); and the same for how surely the image itself is known among the 1,000:


# %%
def halfway(values):
    """The log-SNR at which rising values pass one half, on a straight line between its neighbours."""
    i = int((values > 0.5).nonzero().min())
    return (levels[i] - (values[i] - 0.5) / (values[i] - values[i - 1]) * (levels[i] - levels[i - 1])).item()


# %%
at = {side: [halfway(values[:, k]) for k in (0, 1)] for side, values in sure.items()}
for small, large in ((7, 14), (14, 28), (28, 56)):
    by = [at[small][k] - at[large][k] for k in (0, 1)]
    print(
        f"{small:>2} → {large}: the class moves by {by[0]:.1f}, the image by {by[1]:.1f}; copies by {2 * math.log(2):.1f}"
    )
claim(
    "where detail is new the shift is larger than that of copies",
    min(at[7][0] - at[14][0], at[14][0] - at[28][0]) > 1.5,
)
claim("where it is only smoothed it is smaller", at[28][0] - at[56][0] < 1.35)

# %% [markdown]
# From 7 to 28 pixels each doubling brings new detail, and the shift is larger than the rule's. From 28 to 56 our images were only smoothed, and it is smaller.
#
# This had to be so. The posterior sees the images only through the distances between them. The mean over a square loses distance (the square of a mean is at most the mean of the squares), so from the small image to the large one the squared distances grow at least fourfold. Doubling by linear interpolation smooths, and makes them grow at most fourfold. Copies are the border between the two. For every pair of the 100 digits:

# %%
for small, large in ((7, 14), (14, 28), (28, 56)):
    growth = torch.pdist(worlds[large][::10].flatten(1)).square() / torch.pdist(worlds[small][::10].flatten(1)).square()
    print(
        f"{small:>2} → {large}: log growth {growth.log().min():.2f} to {growth.log().max():.2f}, mean {growth.log().mean():.2f}"
    )
    claim("at least that of copies" if large < 56 else "at most that of copies", ((growth >= 4) == (large < 56)).all())

# %% [markdown]
# On photographs the rule is a good start; the exact number is a matter of the data.
#
# A schedule that suits 28×28 should be moved up for 14×14 and down for 56×56, by 1 to 2 each. Section 1.7 tries it with networks.
#
# ### 1.6 Two ways to move a schedule
#
# **Shift it.** `Cosine(shift=-1.39)` adds a number to the log-SNR and leaves everything else as it was (Hoogeboom et al., 2023).
#
# **Scale the input.** Chen (2023) leaves the schedule alone and makes the data smaller: $x_t=\alpha(t)\,b\,x_0+\sigma(t)\,\epsilon$ with $b<1$. The log-SNR falls by $2\log(1/b)$. (The paper's abstract says "$\log b$"; with SNR as a ratio of *variances* it is $2\log b$.) But now $x_t$ has another size at each $t$, and a network likes inputs of one size. So what the *network sees* is divided by the deviation of $x_t$, which for data of variance 1 is $\sqrt{b^2\alpha^2+\sigma^2}$.
#
# The two are the same path, up to that division:

# %%
u = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
for b in (0.3, 0.5, 2.0):
    scaled, shifted = Scaled(Cosine(), b), Cosine(shift=2 * math.log(b))
    size = (scaled.alpha(u) ** 2 + scaled.sigma(u) ** 2).sqrt()
    same = torch.allclose(scaled.alpha(u) / size, shifted.alpha(u)) and torch.allclose(
        scaled.sigma(u) / size, shifted.sigma(u)
    )
    claim(f"b = {b}: scaling the input is a shift by 2 log b, once it is divided by its size", same)

# %% [markdown]
# > **Spot the bug.** A pseudo-code that is passed on normalises and then steps:
# >
# > `x_t = x_t / std(x_t)` … `eps_hat = net(x_t, t)` … `x_s = ddim_step(x_t, eps_hat, t, s)`
# >
# > What is wrong? And what will it do to data of deviation 1, with $b=\frac12$?
#
# We play it with an exact answer in place of `net`. Like a network, it is given the normalised state, and knows the size that a state has on the path. At $t=0$ the state is $b\,x_0$, so we divide by $b$ in the end and should find deviation 1.

# %%
line = toy.GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), 1.0)
path_b = Scaled(Cosine(), 0.5)
exact, times = line.denoiser(path_b), torch.linspace(0.999, 0, 200, dtype=torch.float64)
start = torch.randn(20000, 1, generator=g, dtype=torch.float64)


def end_of(overwrite):
    x = start
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        given = x / x.std()  # what the network sees
        state = given * (path_b.alpha(t) ** 2 + path_b.sigma(t) ** 2).sqrt()  # what that is on the path
        eps_hat = path_b.convert(exact(state, t), state, t, given="x0", to="eps")
        x = given if overwrite else state
        x0_hat = (x - path_b.sigma(t) * eps_hat) / path_b.alpha(t)
        x = path_b.alpha(s) * x0_hat + path_b.sigma(s) * eps_hat
    return (x / path_b.scale).std().item()


# %%
claim("stepping the state itself: the deviation is 1, to 2 %", abs(end_of(overwrite=False) - 1) < 0.02)
claim("stepping the normalised one: it is 2, to 5 %", abs(end_of(overwrite=True) - 2) < 0.1)

# %% [markdown]
# The network does want the normalised $x_t$. The *step* does not: its formula holds on the path, and the normalised state is not on it. Overwritten at every step, the state ends with deviation 1 where it should be $\frac12$. (Had the network predicted $x_0$, the last step would put the size right, and in this example nobody would see the bug.)
#
# ### 1.7 An experiment
#
# So far no network was trained. Does the shift matter for one? Digits at 14, 28 and 56 pixels, the cosine path moved by five amounts, three seeds. All networks are nearly equally large and fast: they fold the pixels into channels until 14×14 positions are left (section 2). Each model is scored on 1,000 digits, made 28×28 for the judge, and so are the real digits that it is compared with. So each size has a yardstick of its own: compare along a curve, not between curves. If 28 pixels want some shift, the rule of copies asks for 1.4 more at 14 and 1.4 less at 56. *Where do you expect the three curves to be lowest?*

# %%
table = tables.load("mnist-resolutions")
print(table["what"], f"({table['steps']} steps of {table['batch']})")
print(table["recipe"])
shifts = [setting["shift"] for setting in table["vary"]["path"]]


def by_shift(kind, score):
    """A score of one size, shape (seeds, shifts)."""
    rows = [row for row in table["rows"] if row["kind"] == kind]
    return torch.tensor([[row[score] for row in rows if row["path"]["shift"] == shift] for shift in shifts]).T


made, (left, right) = plots.panels(2, width=10.0, height=3.8)
for ax, score in ((left, "Fréchet distance"), (right, "classified as asked")):
    lines = {kind: by_shift(kind, score) for kind in table["vary"]["kind"]}
    plots.curves(torch.tensor(shifts), lines, "shift of the log-SNR", score, logy=ax is left, ax=ax)
best = {kind: shifts[by_shift(kind, "Fréchet distance").mean(0).argmin()] for kind in table["vary"]["kind"]}
claim("the best shift falls as the image grows", best["56 px"] < best["28 px"] < best["14 px"])
made

# %% [markdown]
# Bands show the three seeds. The curves on the left are lowest at different places, in the order that we expected: at 14 pixels near $-1$, at 28 near $-2$, and at 56 it still falls at $-6$, where the table ends. Only the amounts are not those of the rule, which says 1.4 for each step. From 28 to 56 it is over 4.
#
# What the rule compares is what can be *known* from $x_t$. A network also has to *do* it, in 400 steps. At 56 pixels ours has to answer with 16 numbers at each of its 14×14 positions, and has 16 channels to hold them; more noise in the path also means that less of the loss is about single pixels. This may be why it wants so much more; we have not tested it. (A shift changes three things at once, see 1.2: the weights, the levels that are trained, the grid of the sampler.)
#
# On the right, the judge finds what was asked for most often with the most noise (at 28 pixels, −4 and −6 are equal within the spread): the class is decided where there is much noise. So there is no *one* best shift, not even for one size. It depends on what is scored, and on the budget.
#
# The next two cells guard the table, and may be skipped: they repeat the first three steps of one run for each size, to show that its runs start from this code. (A run with another seed would fail.)


# %%
def first_losses(row, settings, x, steps):
    """The first three losses of a run of a table, trained anew."""
    torch.manual_seed(row["seed"])
    net, shift = dict(settings["net"]), row.get("path", {}).get("shift", 0.0)
    model = Denoiser(getattr(nets, net.pop("class"))(**net), Cosine(shift), predicts="v")
    times = settings.get("times", "uniform")
    batch = training.batches(x, model.path, size=128, y=train_labels, null=10, times=times, seed=row["seed"])
    seen = []

    def stop(fit):
        seen.extend(fit.losses)
        raise StopIteration  # planned are all steps, as the learning rate depends on them; three are enough

    with contextlib.suppress(StopIteration):
        training.fit(model, losses.simple, batch, steps=steps, precision="float32", watch=stop, watch_every=3)
    return torch.allclose(torch.tensor(seen), torch.tensor(row["first losses"]), rtol=1e-3)


# %%
for kind, settings in table["kinds"].items():
    row = next(r for r in table["rows"] if (r["kind"], r["path"]["shift"], r["seed"]) == (kind, -2.0, 0))
    same = first_losses(row, settings, data.resized(train_digits, settings["size"]), table["steps"])
    claim(f"{kind}: trained anew, the first three losses (shift −2, seed 0) are those of the table, to 0.1 %", same)

# %% [markdown]
# ### 1.8 The slide's table
#
# The lecture shows a table of results on ImageNet from Chen's paper, with FID (section 4) and Inception score, for image sizes from 64 to 1024. In the slide text its first row reads "ADM: FID —, IS 2.07"; and the labels 256, 512 and 768 stand one row early, on the last row of the block before, while 1024 stands on an empty row at the end. How does 2.07 betray itself? An Inception score counts classes that a classifier is sure of, and the other models at that size have 56 to 66. An IS of 2.07 would be a model that draws two classes. It is the FID.
#
# Each block up to 512 begins with the model ADM, and every block ends with "RIN + our strategy", Chen's. With this order, and with what the ADM paper reports, we restored it. Its core, as FID / parameters in millions (bold: numbers that the slide text puts in the wrong column or under the wrong size):
#
# | | ADM | RIN | RIN + Chen's strategy |
# |---|---|---|---|
# | 64×64 | **2.07** / 297 | 1.23 / 281 | 2.04 / 214 |
# | 128×128 | 5.91 / 386 | 2.75 / 410 | **3.50** / 215 |
# | 256×256 | 10.94 / 553 | 4.51 / 410 | **3.52** / 319 |
# | 512×512 | 23.2 / 559 | – | **3.95** / 320 |
# | 768×768 | – | – | 5.60 / 408 |
# | 1024×1024 | – | – | **8.72** / 412 |
#
# <details><summary>All rows</summary>
#
# | size | method | FID | IS | parameters (M) |
# |---|---|---|---|---|
# | 64×64 | ADM | **2.07** | – | 297 |
# | | CF-guidance | 1.55 | 66.0 | – |
# | | CDM | 1.48 | 66.0 | – |
# | | RIN (patch 4, 300K updates) | 1.23 | 66.5 | 281 |
# | | RIN + our strategy (patch 8, 150K updates) | 2.04 | 55.8 | 214 |
# | 128×128 | ADM | 5.91 | – | 386 |
# | | ADM + guidance | 2.97 | – | > 386 |
# | | CF-guidance | 2.43 | 156.0 | – |
# | | CDM | 3.51 | 128.0 | 1058 |
# | | RIN (patch 4, 700K updates) | 2.75 | 144.1 | 410 |
# | | RIN + our strategy (patch 8, 250K updates) | **3.50** | **120.4** | 215 |
# | 256×256 | ADM | 10.94 | 100.9 | 553 |
# | | ADM + guidance | 4.59 | – | > 553 |
# | | CDM | 4.88 | 158.7 | 1953 |
# | | RIN (patch 8, 700K updates) | 4.51 | 161.0 | 410 |
# | | RIN + our strategy (patch 8, 250K updates) | **3.52** | **186.2** | 319 |
# | 512×512 | ADM | 23.2 | 58.1 | 559 |
# | | ADM + guidance | 7.72 | 172.7 | > 559 |
# | | RIN + our strategy (patch 8, 1M updates) | **3.95** | **216** | 320 |
# | 768×768 | RIN + our strategy (patch 8, 1M updates) | 5.60 | 196.2 | 408 |
# | 1024×1024 | RIN + our strategy (patch 8, 910K updates) | **8.72** | **163.9** | 412 |
#
# </details>
#
# Read in the right rows, the strategy does *not* have the best FID at 64 and 128 pixels, with fewer parameters and fewer updates; at 256 and 512 it has, and above that no other model was in the table. That fits section 1.5, but proves little: the models differ in more than the schedule. Look into the paper before you quote a number: we restored the order, and only the ADM values could be checked against a second source.
#
# *A good place for a break.*
#
# ## 2. The U-Net
#
# ### 2.1 A map
#
# The network gets a noisy image and returns an image. Two needs pull in opposite directions. To see *what* is drawn, it must look at the whole image at once, and that is cheap only at low resolution. To say *where* each stroke ends, it must keep every pixel. A U-Net does both: it goes down to a small map, thinks there, comes up again, and on the way up it is handed what it saw on the way down.
#
# Ours first **folds** 2×2 pixels into 4 channels: one channel of 28×28 becomes four of 14×14. Nothing is lost, and each convolution is four times cheaper. There are two *levels*: the upper one works on maps of 14×14, the lower one on 7×7. Its parts, from the input to the output:
#
# - `enter`: a convolution from the 4 folded channels to 40;
# - `down`: two blocks at the upper level; what they saw is kept for later;
# - `shrink`: a convolution that moves in steps of two, 14×14 → 7×7, and widens to 64 channels;
# - `middle`: three blocks at the lower level, after each of them one `attention`, in which every position looks at every other (section 3);
# - `grow`: back to 14×14, by unfolding;
# - `up`: two blocks. The first takes 80 channels, the 40 that come from below next to the 40 that `down` kept (the **skip**), and makes 40 of them;
# - `leave`: a convolution to 4 channels, which are unfolded to an image.
#
# A **block** is $h+f(h)$: it passes its input on and adds a correction, a *residual*. (Where the number of channels changes, a 1×1 convolution stands in for the first $h$.) In $f$ stand two convolutions; before each, the features are normalised (mean 0 and variance 1 over groups of channels) and bent by $\mathrm{SiLU}(x)=x\cdot\mathrm{sigmoid}(x)$. Here is one, where `condition` is what the block is told: the time and the label.

# %%
show_source(nets.unet.ResBlock.forward)

# %% [markdown]
# Let the network tell us its shapes, its parameters and its FLOPs (floating-point operations; a multiplication with its addition counts as two). A *hook* is a function that PyTorch calls whenever a module has run.

# %%
unet_model = checkpoints.load("mnist-unet")
unet = unet_model.net
image, time, label = torch.zeros(1, 1, 28, 28), torch.tensor([0.5]), torch.tensor([3])
stages, hooks = [], []
for part in ["enter", "down", "shrink", "middle", "attention", "grow", "up", "leave"]:
    whole = getattr(unet, part)
    last = whole[-1] if isinstance(whole, torch.nn.ModuleList) else whole

    def note(module, _, out, part=part):
        stages.append((part, tuple(out.shape[1:])))

    hooks.append(last.register_forward_hook(note))
with FlopCounterMode(display=False, depth=2) as counter, torch.no_grad():
    unet(image, time, label)
for hook in hooks:
    hook.remove()
flops = {name: sum(by.values()) for name, by in counter.get_flop_counts().items()}


# %%
def in_all(counts, part, prefix):
    """What a part counts, or all blocks of a list of blocks together."""
    whole = getattr(unet, part)
    names = [part] if f"{prefix}{part}" in counts else [f"{part}.{i}" for i in range(len(whole))]
    return sum(counts[prefix + name] for name in names)


parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in unet.named_modules()}
print(f"{'part':>10} {'shape':>9} {'parameters':>11} {'MFLOPs':>7}")
for part, shape in stages:
    size = "×".join(map(str, shape))
    print(f"{part:>10} {size:>9} {in_all(parameters, part, ''):>11,} {in_all(flops, part, 'UNet.') / 1e6:>7.1f}")
told = parameters["time"] + parameters["label"]
print(f"{'time,label':>10} {'':>9} {told:>11,} {flops['UNet.time'] / 1e6:>7.1f}")
print(f"{'all':>10} {'':>9} {parameters['']:>11,} {flops['UNet'] / 1e6:>7.1f}")
claim("the parts add up", sum(in_all(parameters, part, "") for part, _ in stages) + told == parameters[""])


# %% [markdown]
# The convolutions of the upper level (`down`, `up`) take most of the work, and the lower level has most of the parameters: a 3×3 kernel costs its weights times the number of positions, and 14×14 has four times as many positions as 7×7. This is the U-Net's economy: put the parameters where the map is small.
#
# As a drawing: the height of a box is the side of its map, the width grows with the number of channels. Grey is the image, green the upper level, blue the lower.

# %%
made, (ax,) = plots.panels(1, width=9.0, height=3.6)
ax.axis("off")
place, centre, colors = 0.0, {}, {7: "C0", 14: "C2", 28: "0.6"}
for part, (channels, side, _) in [("image", (1, 28, 28)), ("fold", (4, 14, 14)), *stages, ("unfold", (1, 28, 28))]:
    if part == "attention":
        continue  # after each block of the middle, and of its shape
    wide, low = channels / 10 + 0.3, 0 if side == 7 else 9 - side / 4
    ax.add_patch(matplotlib.patches.Rectangle((place, low), wide, side / 2, color=colors[side]))
    name = part.replace("middle", "middle, attention") + f"\n{channels}×{side}×{side}"
    ax.text(place + wide / 2, low - 0.5, name, ha="center", va="top", fontsize=9)
    centre[part], place = (place + wide / 2, low + side / 2), place + wide + 2.4
skip = {"arrowstyle": "->", "color": "C1", "linewidth": 2, "connectionstyle": "arc3,rad=-0.3"}
ax.annotate("", centre["up"], centre["down"], arrowprops=skip)
ax.text((centre["down"][0] + centre["up"][0]) / 2, 19.3, "skip: what was seen on the way down", color="C1", ha="center")
ax.set(xlim=(-2, place), ylim=(-3, 21))
made

# %% [markdown]
# ### 2.2 How far does an output pixel look?
#
# The **receptive field** of an output is the part of the input that it can depend on. Each 3×3 convolution widens it by one position to every side, and a position at the lower level is as wide as two at the upper. (Of the convolutions alone: a group norm takes its mean over the whole map, so with it every output depends a little on everything.) So a stack of convolutions with kernels $k_i$ sees $1+\sum_i (k_i-1)\,S_i$ positions across, where $S_i$ is the product of the strides *before* layer $i$. A check by autograd, without norms and with all weights 1 so that nothing cancels:


# %%
def field_of(kernels, strides):
    across, step = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        across += (kernel - 1) * step
        step *= stride
    return across


kernels, strides = [3, 3, 3, 3, 3], [1, 1, 2, 1, 1]  # the third halves the map
stack = [torch.nn.Conv2d(1, 1, k, s, padding=1, bias=False) for k, s in zip(kernels, strides, strict=True)]
for layer in stack:
    torch.nn.init.ones_(layer.weight)
field = torch.ones(1, 1, 41, 41, requires_grad=True)
torch.nn.Sequential(*stack)(field)[0, 0, 10, 10].backward()
found = int((field.grad[0, 0].sum(0) != 0).sum())
claim(
    f"the formula says {field_of(kernels, strides)} across, autograd finds as many", found == field_of(kernels, strides)
)
on_the_way_down = field_of([3] * 12, [1] * 5 + [2] + [1] * 6)  # enter, down, shrink, middle
print("our U-Net, from the folded image to the end of the middle:", on_the_way_down, "positions across")

# %% [markdown]
# That is far more than the 14 positions there are, and the attention at the lower level sees everything in one step. So the receptive field is the whole image, and says little. What the trained network *uses* says more: how much does the guess of one pixel in the middle change if an input pixel changes? *Where will it look when there is little noise? And when there is much?*

# %%
def looks(model, t, count=64):
    """Mean size of the gradient of the guess of the middle pixel, by input pixel."""
    noise = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    xt = model.path.perturb(digits[:count], t, noise).requires_grad_()
    model(xt, t, y=labels[:count])[:, 0, 14, 14].sum().backward()
    return xt.grad.abs().mean(0, keepdim=True)


def near(look, radius=2):
    """The share of a map that lies within so many pixels of the middle."""
    return (look[0, 0, 14 - radius : 15 + radius, 14 - radius : 15 + radius].sum() / look.sum()).item()


# %%
moments = (0.1, 0.3, 0.5, 0.7, 0.9)
maps = [looks(unet_model, t) for t in moments]
shown = torch.cat([2 * (look / look.max()) ** 0.5 - 1 for look in maps])
claim("at t = 0.1 over 40 % of the dependence is on pixels at most 2 away", near(maps[0]) > 0.4)
claim("at t = 0.9 under 30 %", near(maps[-1]) < 0.3)
claim("the pixel itself: above 15 % at t = 0.1", near(maps[0], 0) > 0.15)
claim("below 5 % at t = 0.9", near(maps[-1], 0) < 0.05)
plots.grid(shown, labels=[f"t = {t}" for t in moments], columns=5, scale=2.0)

# %% [markdown]
# (Each map has its own scale, and is drawn as its square root, so that the faint parts show.) With little noise the network is a local filter: the pixel itself and its neighbours tell what it was. With much noise it asks the whole image, because only the whole says which digit this is. So one network has to be both, and the time tells it which.
#
# ### 2.3 How the network is told the time
#
# The time enters as **sinusoids**: sines and cosines of $t$ at frequencies from fast to slow, as a clock has hands. Two linear layers follow, the label's embedding is added, and the sum $c$ goes to every block. There it scales and shifts the features, channel by channel: $(1+s)\,\mathrm{norm}(h)+b$ with $(s,b)=W\,\mathrm{SiLU}(c)$. (Here $s$ and $b$ are a scale and a shift for each channel; they have nothing to do with an earlier time or with input scaling.)
#
# Does it matter? Tell the network a wrong time. The image is noised to $t=0.5$; it is told something else.

# %%
true_t, picked = 0.5, digits[:50]
xt = unet_model.path.perturb(picked, true_t, torch.randn(picked.shape, generator=g))


@torch.no_grad()
def error_if_told(told):
    return (unet_model(xt, told, y=labels[:50]) - picked).square().mean().item()


told = torch.linspace(0.1, 0.9, 9)
errors = torch.tensor([error_if_told(moment) for moment in told.tolist()])
claim("told 0.1: more than five times the error of the truth", errors[0] > 5 * errors[4])
claim("told 0.9: more than twice", errors[-1] > 2 * errors[4])
plots.curves(
    told, {"error of the guess": errors}, "time the network is told (true: 0.5)", "mean squared error", logy=True
)

# %% [markdown]
# Told the truth, the error is small. Told too little noise, it leaves noise in the image: the error grows twelvefold at 0.1. Told too much, it smooths strokes away: over twofold at 0.9. The network does not find out the noise level by itself, although it could be seen in the image. It has learned to trust what it is told.
#
# ### 2.4 What the skip is for
#
# Cut the orange arrow in the trained network: the way up gets zeros in place of what was seen on the way down.


# %%
def without_skip(block, arguments):
    h, condition = arguments
    return torch.cat([h[:, :40], torch.zeros_like(h[:, 40:])], dim=1), condition  # 40 channels come from below


noise = torch.randn(8, 1, 28, 28, generator=g)
shown = []
for t in (0.2, 0.8):
    xt = unet_model.path.perturb(digits[:8], t, noise)
    with torch.no_grad():
        shown += [xt, clipped(unet_model)(xt, t, y=labels[:8])]
        hook = unet_model.net.up[0].register_forward_pre_hook(without_skip)
        shown.append(clipped(unet_model)(xt, t, y=labels[:8]))
        hook.remove()
rows = [f"{what}, t = {t}" for t in (0.2, 0.8) for what in ("seen", "guess", "no skip")]
plots.rows(shown, labels=rows)

# %% [markdown]
# With little noise the guess without the skip keeps specks of noise. (It looks better than it is: in $\hat x_0=\alpha x_t-\sigma v$ most comes from $x_t$ itself, as $\sigma$ is small.) With much noise its strokes are where they were, but it is speckled all over. To take the noise away, the network has to know it pixel by pixel. The lower level could hold that (it has 3,136 numbers, an image 784), but in training it never had to: the skip brings it.
#
# A network that is cut after its training meets zeros that it never saw, so this is no fair trial. A fair one trains a network without the skip from the start. It is in the table of section 3.4.

# %% [markdown]
# ## 3. The diffusion transformer
#
# ### 3.1 Patches and positions
#
# Convolutions build in a belief: near pixels belong together. A transformer does not have it. It takes a *sequence* of vectors, called **tokens**, and lets each look at all the others. To make a sequence of an image, cut it into squares, **patches**, and write the pixels of each as one vector. With patches of 4×4, a digit becomes 49 tokens of 16 numbers. Our code has no loop for this: `pixel_unshuffle` moves the pixels of a square into channels.

# %%
patches = torch.nn.functional.pixel_unshuffle(digits[:2], 4).flatten(2).mT
by_hand = torch.stack(
    [digits[:2, 0, i : i + 4, j : j + 4].flatten(1) for i in range(0, 28, 4) for j in range(0, 28, 4)], dim=1
)
claim("49 tokens of 16 numbers, row by row", patches.shape == (2, 49, 16) and torch.equal(patches, by_hand))
together = torch.nn.functional.pixel_shuffle(patches.mT.unflatten(2, (7, 7)), 4)
claim("and back again without loss", torch.equal(together, digits[:2]))

# %% [markdown]
# To a transformer the order of its tokens means nothing: if they are shuffled, the answers are shuffled the same way, and nothing else changes. A digit with its patches shuffled is another image, so the tokens must be told where they are. To each is added a **position**: sinusoids of its row and of its column.
#
# Below, for three tokens, how alike its position is to that of every other token (their scalar product). *Near tokens should look alike. Do they?*

# %%
where = dit.positions(7, 128)
claim("49 positions, all different", torch.cdist(where, where).add(1e3 * torch.eye(49)).min() > 0.1)
alike = (where @ where.T).reshape(49, 1, 7, 7)
tokens = [0, 24, 40]
shown = 2 * (alike[tokens] - alike.min()) / (alike.max() - alike.min()) - 1
plots.grid(shown, labels=[f"row {i // 7}, column {i % 7}" for i in tokens], columns=3, scale=2.4)

# %% [markdown]
# They do: each token is most like itself, and the likeness falls off along its row and its column.
#
# ### 3.2 Attention
#
# Each token asks a question, the **query** $q=hW_q$. Each offers a **key** $k=hW_k$ and a **value** $v=hW_v$. A token's answer is a weighted mean of the values; the weights come from how well its query fits the keys:
# $$\mathrm{softmax}\Bigl(\frac{QK^\top}{\sqrt d}\Bigr)V .$$
# (In this section $q,k,v$ are these three; $v$ is not the prediction.) Why $\sqrt d$? If the $d$ numbers in $q$ and $k$ are independent with mean 0 and variance 1, then $q\cdot k$ has variance $d$. Without the root the softmax of wide vectors would put nearly all its weight on one token, and its gradient would vanish.

# %%
for d in (4, 64, 1024):
    q, k = torch.randn(2, 1000, d, generator=g)
    fit = q @ k.T
    claim(f"d = {d}: q·k has variance d, to 10 %", abs(fit.var() / d - 1) < 0.1)
    plain, scaled = (values[:, :50].softmax(1).amax(1).mean() for values in (fit, fit / d**0.5))  # of 50 tokens
    print(f"          the largest of 50 weights, on average: {plain:.2f};  divided by √d: {scaled:.2f}")

# %% [markdown]
# **Several heads** do this side by side, each with its share of the numbers, so that a token can ask several questions at once. Here is the kernel. The same formula, written as loops, gives the same numbers.

# %%
show_source(dit.Attention.forward)
show_source(dit.Attention.weights)

# %%
torch.manual_seed(0)
attention, h = dit.Attention(8, 2).double(), torch.randn(1, 5, 8, generator=g, dtype=torch.float64)
q, k, v = (part(h)[0] for part in (attention.query, attention.key, attention.value))
answer = torch.zeros(5, 8, dtype=torch.float64)
for head in (slice(0, 4), slice(4, 8)):
    for i in range(5):
        weights = torch.stack([torch.exp(q[i, head] @ k[j, head] / 4**0.5) for j in range(5)])
        answer[i, head] = ((weights / weights.sum()) @ v[:, head]).detach()
claim("the kernel is the formula", torch.allclose(attention(h)[0], attention.out(answer), atol=1e-12))
shuffled = torch.randperm(5, generator=g)
claim("shuffled tokens give shuffled answers", torch.allclose(attention(h[:, shuffled]), attention(h)[:, shuffled]))

# %% [markdown]
# The price: every token looks at every other, so the work of attention grows with the *square* of their number; that of the linear layers grows with the number itself. Halve the side of a patch, and there are four times as many tokens and sixteen times as many pairs. That is why large images are worked on in large patches, or in a smaller latent space.
#
# ### 3.3 The block, in three variants
#
# A block is attention, then a perceptron (two linear layers, the same for each token), each on a residual branch $h+f(\mathrm{norm}(h))$. The norm here makes mean 0 and variance 1 over the numbers of each token, a *layer norm*. How does a block learn the time and the label? Peebles & Xie (2023) tried several ways; the figure on the slide shows three.
#
# - **In-context**: the condition becomes two more tokens of the sequence, one for the time and one for the label. The block is a plain transformer's.
# - **Cross-attention**: a third branch, where the image's tokens ask and the condition's tokens answer.
# - **adaLN-Zero** (adaptive layer norm, from zero): no tokens. As in the U-Net, the condition scales and shifts what comes out of the norm; and it also *gates* each branch:
# $$h \leftarrow h+g\,f\bigl((1+s)\,\mathrm{norm}(h)+b\bigr),\qquad (b,s,g)=W\,\mathrm{SiLU}(c)+w .$$
# The layer with $W$ and $w$ starts at zero.

# %%
told = ("norm, ×(1+s), +b, {}, ×g", "s, b, g: from what is told")
variants = {
    "in-context": [("norm, attention", "looks at the condition's tokens too"), ("norm, perceptron", "")],
    "cross-attention": [("norm, attention", ""), ("norm, cross-attention", "looks at the condition's tokens"), ("norm, perceptron", "")],
    "adaLN-Zero": [(told[0].format(f), told[1]) for f in ("attention", "perceptron")],
}
made, axes = plots.panels(3, width=9.8, height=3.4)
box = {"boxstyle": "round", "facecolor": "#eef3f8"}
for ax, (name, branches) in zip(axes, variants.items(), strict=True):
    ax.set(title=name, xlim=(-0.1, 1.1), ylim=(0, 4))
    ax.axis("off")
    ax.annotate("", (0, 3.9), (0, 0), arrowprops={"arrowstyle": "->", "linewidth": 2})
    for height, (words, how) in zip(torch.linspace(0.8, 3.0, len(branches)).tolist(), branches, strict=True):
        ax.plot([0, 0.5, 0.5, 0.04], [height - 0.4] * 2 + [height + 0.4] * 2, color="0.4", marker="<", markevery=[3])
        ax.text(0.5, height, words, ha="center", va="center", fontsize=9, bbox=box)
        ax.text(0.58, height - 0.54, how, ha="center", va="center", fontsize=9, color="C1")
made

# %%
show_source(dit.DiTBlock.forward)

# %% [markdown]
# **Claim.** At the start an adaLN-Zero block is the identity, for every input and every condition.
#
# **Why.** With $W=0$ and $w=0$ we have $g=0$. Then $h+g\,f(\cdot)=h$, whatever $f$ is.

# %%
h, condition = torch.randn(4, 49, 32, generator=g), torch.randn(4, 2, 32, generator=g)
for kind in ("adaLN-Zero", "cross-attention", "in-context"):
    torch.manual_seed(0)
    block = dit.DiTBlock(32, heads=4, conditioning=kind)
    is_identity = torch.equal(block(h, condition), h)
    claim(
        f"{kind}: {'the identity' if kind == 'adaLN-Zero' else 'not the identity'}",
        is_identity == (kind == "adaLN-Zero"),
    )

# %% [markdown]
# Why is that good? A deep stack of fresh random blocks scrambles its input. A stack of identities passes it on, and each block opens its gate only as far as it helps.
#
# But if the gate is zero, can anything learn? By the chain rule, the gradient of a gate is $f(\cdot)$ times what comes from above: not zero in itself. The gradient of $f$'s own weights is $g$ times something: zero, at first. The last layer of the network starts at zero too, so its first answer is 0, and nothing passes it backwards. Watch three parts over the first three steps. *In which order do they wake up?*

# %%
torch.manual_seed(0)
small = nets.DiT(width=32, depth=2, num_classes=10)
optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
parts = {
    "last layer": small.leave.weight,
    "gates": small.blocks[0].modulation.weight,
    "attention": small.blocks[0].attention.value.weight,
}
awake = []
for _ in range(3):
    optimizer.zero_grad()
    out = small(digits[:16], torch.rand(16, generator=g), labels[:16])
    (out - digits[:16]).square().mean().backward()
    awake.append({name: weight.grad.abs().max().item() > 0 for name, weight in parts.items()})
    optimizer.step()
for step, (name, first) in enumerate(zip(parts, (0, 1, 2), strict=True)):
    claim(f"{name}: moves from step {first + 1} on", [now[name] for now in awake] == [i >= step for i in range(3)])

# %% [markdown]
# ### 3.4 Compared
#
# Five networks with about as many parameters, trained alike: the same data, 600 steps, the same times and noises, three seeds. *Rank them before you look: the U-Net with and without its skip, and the three transformers.*

# %%
backbones = tables.load("mnist-backbones")
print(backbones["what"], f"({backbones['steps']} steps of {backbones['batch']})")
print("Fréchet distance of real digits, 1,000 against 1,000:", backbones["Fréchet distance of real images"])
reached = {}
for kind, settings in backbones["kinds"].items():
    net = dict(settings["net"])
    size = sum(p.numel() for p in getattr(nets, net.pop("class"))(**net).parameters())
    rows = [row for row in backbones["rows"] if row["kind"] == kind]
    scores = ("test loss", "classified as asked", "Fréchet distance")
    loss, asked, far = (torch.tensor([row[score] for row in rows]) for score in scores)
    reached[kind] = loss
    print(f"{kind}: {size:,} parameters, test loss {loss.mean():.3f} ± {loss.std():.3f},")
    print(f"    as asked {asked.mean():.0%}, Fréchet distance {far.mean():.1f} ± {far.std():.1f}")
ranked = sorted(reached, key=lambda kind: reached[kind].mean())
claim("no seed of a kind is better than any seed of the kind before it", all((reached[a].max() < reached[b].min()).item() for a, b in zip(ranked, ranked[1:], strict=False)))
claim("of the transformers adaLN-Zero is the best", ranked[2] == "DiT, adaLN-Zero")

# %%
for kind in ("U-Net", "DiT, adaLN-Zero"):
    row = next(row for row in backbones["rows"] if row["kind"] == kind and row["seed"] == 0)
    same = first_losses(row, backbones["kinds"][kind] | {"times": backbones["times"]}, train_digits, backbones["steps"])
    claim(f"{kind}: trained anew, the first three losses (seed 0) are those of the table, to 0.1 %", same)

# %% [markdown]
# The U-Net is far ahead, and its skip is worth a third of the Fréchet distance. In 600 steps no transformer has got as far as digits: what is asked for comes about as often as by chance. The likely reason is what is built in. A convolution knows from the start that near pixels belong together. A transformer has to learn it from the data, and that takes longer.
#
# Among the transformers adaLN-Zero has the lowest loss, then in-context, then cross-attention. The gaps of 2 to 4 % are several times the spread over seeds. In the paper adaLN-Zero is the best, too; but there cross-attention is second, on other images, with other sizes and hundreds of times our steps. The Fréchet distances agree with the loss, but at 13 they say little more than that nobody draws digits yet.
#
# The next section has a transformer that was given the time.
#
# ### 3.5 A trained DiT, and where it looks
#
# The course ships a DiT that is four times as large and was trained for longer. Later notebooks fine-tune it. Its scores are means over three draws of 2,000 samples against 2,000 test digits, so do not compare its Fréchet distances with those of 3.4 (section 4.2 shows why).

# %%
dit_model = checkpoints.load("mnist-dit")
card = dit_model.card
print(card["what"])
print(f"{sum(p.numel() for p in dit_model.parameters()):,} parameters, {card['steps']:,} steps; {card['recipe']}")
for name, value in card["scores"].items():
    print(f"{name}: {value}")

# %%
asked = torch.arange(10).repeat_interleave(4)
conditional = clipped(lambda xt, t: dit_model(xt, t, y=asked))
noise = torch.randn(40, 1, 28, 28, generator=g)
drawn = samplers.last(samplers.ddim(conditional, dit_model.path, noise, dit_model.path.times(20)))
judge = checkpoints.load("mnist-classifier")
claim("at least 34 of 40 are what was asked for", (judge(drawn).argmax(1) == asked).sum() >= 34)
plots.rows(list(drawn.unflatten(0, (10, 4)).transpose(0, 1)), title="Drawn by the DiT, 20 steps of DDIM")

# %% [markdown]
# Most could be real; a few are broken, a 2 or a 3 above all. The card says the same in numbers: 96 % are what was asked for, and the Fréchet distance is three times the floor, where that of `mnist-unet` is hardly above it.
#
# Where does a token look? Take the token in the middle of a noisy digit. For each of the four blocks, the weights with which it looks at all 49 tokens, as the mean over heads, from black (0) to white (an eighth and more). The dot is the token itself. Move the time. *Which blocks look elsewhere when there is more noise?*


# %%
def glances(t):
    xt = dit_model.path.perturb(digits[:1], t, torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(5)))
    maps = dit.attention_maps(dit_model.net, xt, dit_model.path.unit(t).expand(1), labels[:1])
    made, axes = plots.panels(5, width=9.0, height=2.2)
    axes[0].imshow(xt[0, 0], vmin=-1.5, vmax=1.5)
    axes[0].set(title=f"seen, t = {t}", xticks=[], yticks=[])
    axes[0].plot(13.5, 13.5, "o", color="C1")
    for ax, weights, number in zip(axes[1:], maps, range(1, 5), strict=True):
        ax.imshow(weights[0, :, 24].mean(0).reshape(7, 7), vmin=0, vmax=0.12)
        ax.plot(3, 3, "o", color="C1", markersize=4)
        ax.set(title=f"block {number}", xticks=[], yticks=[])
    return made


widgets.explore(glances, t=([0.1, 0.3, 0.5, 0.7, 0.8, 0.9], 0.3))

# %%
noise = torch.randn(50, 1, 28, 28, generator=g)
looks_at = {}
for t in (0.1, 0.8):
    xt = dit_model.path.perturb(digits[:50], t, noise)
    looks_at[t] = dit.attention_maps(dit_model.net, xt, dit_model.path.unit(t).expand(50), labels[:50])


def apart(a, b):
    """The share of the weight that would have to move to make one map of the other, on average."""
    return ((a - b).abs().sum(-1).mean() / 2).item()


over_time = [apart(early, late) for early, late in zip(looks_at[0.1], looks_at[0.8], strict=True)]
over_images = [apart(maps, maps.mean(0)) for maps in looks_at[0.8]]
claim("block 1: over a third of the weight moves with the noise", over_time[0] > 0.33)
claim("block 3: less than a fifth moves, with the noise or with the image", max(over_time[2], over_images[2]) < 0.2)
print("share of the weight that moves between t = 0.1 and 0.8:", ", ".join(f"{x:.1f}" for x in over_time))
print("share that differs from the mean over digits, t = 0.8: ", ", ".join(f"{x:.1f}" for x in over_images))

# %% [markdown]
# Block 3 looks at the four patches around the token, whatever is there; block 2 mostly to the left and the right, the more so with more noise. Nobody told the transformer that near patches belong together. It found out, and built itself something like a convolution. Block 1 changes most: with little noise it looks almost everywhere, with much noise mainly where the strokes are. Block 4 looks almost everywhere at any time, a little less evenly when there is much noise.
#
# *A good place for a break.*
#
# ## 4. How good is it? Scores, and how they lie
#
# ### 4.1 The Fréchet distance, derived
#
# Two clouds of points: features of real images, and of drawn ones. How far are they apart? Move one cloud onto the other, each point to a partner, so that the mean squared way is as short as possible. That is the squared **2-Wasserstein distance**. For two Gaussians $a=\mathcal N(m_a,A)$ and $b=\mathcal N(m_b,B)$ it has a closed form, and it is the score that we used in notebook 03.
#
# **Any pairing.** (Notebook 03 wrote $C_a, C_b$ for the covariances; here they are $A$ and $B$, and $C$ is something else.) Let $(x,y)$ be paired somehow. Then
# $$\mathbb E\lVert x-y\rVert^2=\lVert m_a-m_b\rVert^2+\mathrm{tr}A+\mathrm{tr}B-2\,\mathrm{tr}\,C,\qquad C=\mathrm{Cov}(x,y).$$
# The pairing only enters through $C$, and we want its trace as large as possible.
#
# **What may $C$ be?** Divide each cloud by its own root: the covariance of $(A^{-1/2}x, B^{-1/2}y)$ is $\begin{pmatrix}I&R\\R^\top&I\end{pmatrix}$ with $C=A^{1/2}RB^{1/2}$. It has no negative eigenvalue exactly if $R$ lengthens no vector, $\lVert R\rVert\le1$. (In one dimension: a covariance is $\sigma_a\sigma_b$ times a correlation, and $|R|\le1$ is the correlation. If $A$ or $B$ has no inverse, the same holds as a limit.)
#
# **The largest trace.** $\mathrm{tr}(A^{1/2}RB^{1/2})=\mathrm{tr}(MR)$ with $M=B^{1/2}A^{1/2}$. Write $M=U\Sigma V^\top$, its singular values in $\Sigma$. Then $\mathrm{tr}(MR)=\mathrm{tr}(\Sigma\,V^\top RU)$, and no entry of $V^\top RU$ exceeds 1, as it lengthens no vector either. So the trace is at most the sum of the singular values, and it is reached for $R=VU^\top$. The singular values are the roots of the eigenvalues of $M^\top M=A^{1/2}BA^{1/2}$. For Gaussians, a joint Gaussian with this $C$ is a pairing. So
# $$F=\lVert m_a-m_b\rVert^2+\mathrm{tr}A+\mathrm{tr}B-2\,\mathrm{tr}\bigl(A^{1/2}BA^{1/2}\bigr)^{1/2}.$$
#
# Each step by numbers. Two clouds in 6 dimensions, with the root of a matrix from SciPy.

# %%
a = torch.randn(400, 6, generator=g, dtype=torch.float64) @ torch.randn(6, 6, generator=g, dtype=torch.float64)
b = torch.randn(300, 6, generator=g, dtype=torch.float64) @ torch.randn(6, 6, generator=g, dtype=torch.float64) + 1
A, B = a.T.cov(), b.T.cov()
root_a, root_b = (torch.from_numpy(linalg.sqrtm(M.numpy()).real) for M in (A, B))
left, singular, right = torch.linalg.svd(root_b @ root_a)
best = right.T @ left.T  # R = V Uᵀ
claim(
    "with it the trace is the sum of the singular values",
    torch.isclose((root_a @ best @ root_b).trace(), singular.sum()),
)
others = [torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q for _ in range(2000)]
claim(
    "2,000 random rotations in place of R do not beat it",
    max((root_a @ R @ root_b).trace() for R in others) < singular.sum(),
)
pair = torch.cat([torch.cat([A, root_a @ best @ root_b], 1), torch.cat([(root_a @ best @ root_b).T, B], 1)])
claim("the pair's covariance has no negative eigenvalue", torch.linalg.eigvalsh(pair).min() > -1e-9)

# %%
product = torch.from_numpy(linalg.sqrtm((A @ B).numpy()).real)
by_scipy = (a.mean(0) - b.mean(0)).square().sum() + (A + B - 2 * product).trace()
by_singular = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * singular.sum()
claim("tr (AB)^½, as it is often written, is the same", torch.isclose(by_scipy, by_singular))
claim("metrics.frechet_distance is the formula", abs(metrics.frechet_distance(a, b) - by_scipy.item()) < 1e-8)
s_a, s_b = sympy.symbols("sigma_a sigma_b", positive=True)
one_dimension = s_a**2 + s_b**2 - 2 * sympy.sqrt(s_a * s_b**2 * s_a)
claim(
    "in one dimension it is the squared difference of the deviations",
    sympy.simplify(one_dimension - (s_a - s_b) ** 2) == 0,
)

# %% [markdown]
# Features are not Gaussian. What is the score then? Only the last step used that they are: that there *is* a pairing which reaches the largest trace. For any two clouds with these means and covariances, a pairing may not get that far. So **the Fréchet distance is a lower bound on the squared 2-Wasserstein distance** of the two clouds in hand. (With covariances divided by $n$; with $n-1$, as in our kernel, up to a share of $1/n$.) It can miss a difference between them; it cannot invent one. For 300 ones and 300 sevens SciPy finds the best partner of every point:

# %%
with torch.no_grad():
    real = torch.cat([judge.features(part) for part in digits.split(500)])  # 2,000 test digits, used all along
    ones, sevens = (judge.features(train_digits[train_labels == c][:300]).double() for c in (1, 7))
cost = torch.cdist(ones, sevens).square()
rows, columns = optimize.linear_sum_assignment(cost.numpy())
way, distance = cost[rows, columns].mean().item(), metrics.frechet_distance(ones, sevens)
print(f"mean squared way {way:.1f}, Fréchet distance {distance:.1f}")
claim("the shortest way from 300 ones to 300 sevens is longer than their Fréchet distance", way > distance)

# %% [markdown]
# ### 4.2 It depends on the number of samples
#
# Two clouds from the *same source* still differ by chance in their means and covariances, so their score is not 0. How much is to be expected falls about like $1/n$, once $n$ is well above the 128 features. So a score needs its number of samples beside it. But $c/n$ is a straight line over $1/n$, and a line can be followed to $1/n=0$: infinitely many samples (Chong & Forsyth, 2020). Here are training digits against the test digits, and a GAN's against the test digits. A point is the mean over as many parts of size $n$ as 3,000 samples can be cut into.


# %%
def features_of(x, by=judge):
    """The judge's features of images."""
    with torch.no_grad():
        return torch.cat([by.features(part) for part in x.split(500)])


gan = checkpoints.load("mnist-gan")
with torch.no_grad():
    images = gan.sample(3000, generator=g)
fresh = train_digits[torch.randperm(10000, generator=g)[:3000]]
clouds = {"real digits": features_of(fresh), "GAN": features_of(images)}
sizes = [200, 250, 375, 600, 1000, 3000]


def mean_score(f, n):
    """The mean Fréchet distance to the test digits, over the parts of n samples that f can be cut into."""
    return sum(metrics.frechet_distance(part, real) for part in f.split(n)) / (len(f) // n)


# %%
score = {name: torch.tensor([mean_score(f, n) for n in sizes]) for name, f in clouds.items()}
several = [375, 600, 1000] * 5 + [3000]  # five draws of each size
limit = {name: metrics.frechet_without_bias(real, f, several, g) for name, f in clouds.items()}
for name, value in limit.items():
    print(f"{name}: {score[name][0]:.2f} with 200, {score[name][-1]:.2f} with 3,000, {value:.2f} extrapolated")
claim("200 real digits score worse than 3,000 of the GAN's", score["real digits"][0] > 1.3 * score["GAN"][-1])
made, (ax,) = plots.panels(1, width=5.6, height=3.6)
for color, value in zip(("C0", "C1"), limit.values(), strict=True):
    ax.plot(0, value, "*", color=color, markersize=11)
plots.curves(1 / torch.tensor(sizes), score, "1 / number of samples", "Fréchet distance to 2,000 test digits", ax=ax)
made

# %% [markdown]
# Both scores grow by about as much as the samples get fewer. (The blue line does not end at 0, for two reasons: the 2,000 test digits are themselves a sample, and the judge was trained on training digits, so that to it test digits are not quite like them.) A table that gives its own model 3,000 samples and another one 200 could let this GAN win against real digits. The stars are the extrapolated scores. They are estimates with a spread of their own, and they do not remove the bias that the 2,000 *real* digits bring. When you compare models, the best remedy is the simplest: the same numbers for all.
#
# ### 4.3 What fools the Inception score
#
# The Inception score asks for sure answers that spread over all classes. Nothing in it knows what a digit looks like. So we can have a perfect 10 with ten images, and with images of nothing: start from noise and climb the classifier's own gradient, as an attacker would.

# %%
ten = torch.stack([train_digits[train_labels == c][0] for c in range(10)])
with torch.no_grad():
    claim(
        "one digit of each class, again and again: above 9.9", metrics.inception_score(judge(ten).repeat(50, 1)) > 9.9
    )
wanted, fake = torch.arange(10).repeat(5), 0.5 * torch.randn(50, 1, 28, 28, generator=g)
for _ in range(15):
    fake.requires_grad_()
    torch.nn.functional.cross_entropy(judge(fake), wanted, reduction="sum").backward()
    fake = (fake - 0.15 * fake.grad.sign()).clamp(-1, 1).detach()
with torch.no_grad():
    claim("images of nothing: above 9.9", metrics.inception_score(judge(fake)) > 9.9)
nothing, truth = (metrics.frechet_distance(f, real) for f in (features_of(fake), clouds["real digits"][:50]))
print(f"Fréchet distance of 50: images of nothing {nothing:.1f}, real digits {truth:.1f}")
claim("the Fréchet distance is not fooled by them", nothing > 4 * truth)
plots.grid(fake[:10], labels=range(10), columns=10, title="“Digits” of Inception score 10")

# %% [markdown]
# ### 4.4 How to lie with the Fréchet distance
#
# The Fréchet distance is harder to fool. It can be done, in ways that can be found in published work, sometimes by mistake. Each trick below is run. Our GAN is always the same, `mnist-gan`. Its honest score here: 1,000 samples against 2,000 test digits, the mean over three draws.


# %%
honest = mean_score(clouds["GAN"], 1000)
print(f"honest: {honest:.2f}")

# %% [markdown]
# **Trick 1: fewer samples for the others.** Give your rival 200 samples and yourself 3,000. **Trick 2: the lucky draw.** Score 15 draws of 200 samples and report the best one.

# %%
parts = [metrics.frechet_distance(part, real) for part in clouds["GAN"].split(200)]
few, many, lucky = sum(parts) / 15, metrics.frechet_distance(clouds["GAN"], real), min(parts)
print(f"200 samples: {few:.2f} on average, {lucky:.2f} at best;  3,000 samples: {many:.2f}")
claim("the same model: 200 samples score over half as bad again as 3,000", few > 1.5 * many)
claim("the luckiest of 15 draws is at least 5 % better than their mean", lucky < 0.95 * few)

# %% [markdown]
# **Trick 3: another preparation of the real images.** Images are made smaller and larger again, with one filter for the real ones and with another for the drawn ones. The model is the same; the number is not.


# %%
def resized(x, mode):
    small = torch.nn.functional.interpolate(x, size=14, mode=mode, antialias=mode == "bilinear")
    return torch.nn.functional.interpolate(small, size=28, mode="bilinear")


smooth = features_of(resized(digits[::2], "bilinear"))
alike, unlike = (
    metrics.frechet_distance(features_of(resized(images[:1000], mode)), smooth) for mode in ("bilinear", "nearest")
)
print(f"the same filter for both: {alike:.2f};  two filters: {unlike:.2f}")
claim(
    "another filter for the drawn images than for the real ones makes it over half as bad again", unlike > 1.5 * alike
)

# %% [markdown]
# **Trick 4: choose the judge.** A network with random weights also has features, and to it most clouds look alike. What counts is not the value but its ratio to the floor, what real images score among themselves.

# %%
torch.manual_seed(0)
blind = nets.Classifier().eval()
floors = {}
for name, by in (("our judge", judge), ("random weights", blind)):
    truth, ours, others = (features_of(x, by) for x in (digits[::2], images[:1000], fresh[:1000]))
    floors[name] = metrics.frechet_distance(ours, truth) / metrics.frechet_distance(others, truth)
print({name: f"{value:.1f} floors" for name, value in floors.items()})
claim("our judge: the GAN is above 1.2 floors", floors["our judge"] > 1.2)
claim(
    "with random weights as the judge it is not told from real digits: below 1.15 floors",
    floors["random weights"] < 1.15,
)

# %% [markdown]
# With random weights the GAN even comes out below the floor: to this judge it is nearer to the test digits than training digits are. It cannot tell us which of the two is real.
#
# **Trick 5: hit the two moments.** The score sees means and covariances, nothing else. Here are "features" drawn from a Gaussian with the moments of *training* digits. They belong to no image at all.

# %%
train_f = clouds["real digits"].double()
factor = torch.linalg.cholesky(train_f.T.cov() + 1e-9 * torch.eye(128))
fiction = train_f.mean(0) + torch.randn(1000, 128, generator=g, dtype=torch.float64) @ factor.T
precision, _ = metrics.precision_recall(real[::2], fiction)
print(f"features of nothing: {metrics.frechet_distance(fiction, real):.2f};  the GAN: {honest:.2f}")
claim("features of nothing score better than the GAN", metrics.frechet_distance(fiction, real) < honest)
claim("precision sees it: under a fifth of them lie where digits are", precision < 0.2)

# %% [markdown]
# **Trick 6: memorise.** A "model" that replays its training images has the score of real digits. The Fréchet distance cannot see it; neither can precision and recall. Look for each drawn image at its **nearest neighbour** in the training set, and compare with the nearest neighbours of *test* digits, which nobody can have memorised.


# %%
def nearest(x):
    """The distance of each image to the nearest training image, in pixels."""
    return torch.cdist(x.flatten(1), train_digits.flatten(1)).amin(1)


replay = fresh[:300]
scores = (
    metrics.frechet_distance(clouds["real digits"][:1000], real),
    *metrics.precision_recall(real[::2], clouds["real digits"][:1000]),
)
print("replay: Fréchet distance {:.2f}, precision {:.2f}, recall {:.2f}".format(*scores))
claim("replayed training images score better than the GAN", scores[0] < honest)
unseen, of_gan, of_replay = (nearest(x).median() for x in (digits[:300], images[:300], replay))
claim("the replay is found out: its distance is 0, up to rounding", of_replay < 0.02 * unseen)
claim("the GAN is as far from the training images as test digits are, to 15 %", abs(of_gan / unseen - 1) < 0.15)
shifted = torch.roll(replay, 1, dims=3)
claim(
    "but moved by one pixel, the replay looks as far away as test digits, to 20 %",
    abs(nearest(shifted).median() / unseen - 1) < 0.2,
)

# %% [markdown]
# So pixels are a poor measure of "the same": one step to the right hides a copy. Use several: pixels, features, and your eyes. And a caution for our own models: `mnist-gan` and `mnist-unet` saw 60,000 digits, of which only 10,000 are here. The test above can find copies of these only.
#
# Now the diffusion model and its nearest neighbours, to look at. *Would you call any of them a copy?*

# %%
conditional = clipped(lambda xt, t: unet_model(xt, t, y=torch.arange(10)))
noise = torch.randn(10, 1, 28, 28, generator=g)
ours = samplers.last(samplers.ddim(conditional, unet_model.path, noise, unet_model.path.times(20)))
order = torch.cdist(ours.flatten(1), train_digits.flatten(1)).argsort(1)
plots.rows([ours, *(train_digits[order[:, k]] for k in range(3))], labels=["drawn", "nearest", "2nd", "3rd"])

# %% [markdown]
# Some come close. But digits of one class are much alike. What counts is whether a drawn one is nearer than real test digits are.

# %%
own = nearest(ours)
of_class = torch.stack([nearest(digits[labels == c][:40]).amin() for c in range(10)])
claim("none of the ten is much nearer than the nearest of 40 test digits of its class", (own > 0.8 * of_class).all())

# %% [markdown]
# **What to report, then.** The number of samples, on both sides; the same preparation; the same judge; the floor beside the score; precision and recall beside the distance; several draws; and some images with their nearest neighbours. That is little work, and it makes the number mean something.
#
# ## 5. Speed
#
# How many images a network handles in a second decides what can be tried in an afternoon. Three settings cost a line each. We measured them on one thread of a server processor that multiplies bfloat16 natively (AMX): images in a second for our U-Net, with batches of 128. Rounds took turns; the medians of 11 rounds vary by about 5 %.
#
# | our U-Net, 0.56 M parameters | training | evaluation |
# |---|---|---|
# | float32 | 206 | 567 |
# | float32, channels-last | 248 | 659 |
# | bfloat16 | 366 | 1000 |
# | bfloat16, channels-last | 316 | 740 |
#
# - **bfloat16** (`torch.autocast`) is the largest gain, but only where the hardware has it. Elsewhere it can be slower than float32.
# - **channels-last** stores the channels of a position side by side. In float32 it gains a fifth; in bfloat16 it loses here.
# - **`torch.compile`** joins small operations: a quarter more in training (330 → 418 in bfloat16, in a run of its own, when the machine was slower), half more in evaluation (950 → 1471). But it needs a C++ compiler, and spent 130 and 47 seconds of processor time before the first step.
#
# The course's defaults follow: `training.fit` takes bfloat16 where the processor has it, and channels-last in float32; `checkpoints.load` gives channels-last networks. Nothing is compiled, because a notebook is over before it would pay. On your machine the table will look different; `make bench` measures it there.
#
# Beside it stands `UNet2DModel`, the U-Net of the library diffusers, with as many parameters: at best 106 images in a second in training, as it works at the full 28×28 where ours has folded. That is what a good part of a fast model is: not fewer parameters, but fewer positions to apply them to.
#
# bfloat16 keeps 8 binary digits of a number where float32 keeps 24. How much does the network notice?

# %%
xt = unet_model.path.perturb(digits[:100], 0.5, torch.randn(100, 1, 28, 28, generator=g))
with torch.no_grad():
    full = unet_model(xt, 0.5, y=labels[:100])
    with torch.autocast("cpu", torch.bfloat16):
        rough = unet_model(xt, 0.5, y=labels[:100])
off, error = (rough - full).square().mean(), (full - digits[:100]).square().mean()
claim("bfloat16 moves the guess by less than a tenth of the guess's own error", off < 0.1 * error)

# %% [markdown]
# ## 6. From one processor to many
#
# The way to train on many devices is to *share the batch*: each of $n$ processes takes a part, works out the gradient of its part, and all of them average. If the parts are equally large, the mean of the $n$ means is the mean over the batch. So the result is that of one process, up to rounding:

# %%
torch.manual_seed(0)
net = nets.UNet(channels=(16, 16), blocks=(1, 1), num_classes=10)
model = Denoiser(net, Cosine(), predicts="v")
torch.nn.init.normal_(net.leave[-1].weight, std=0.1)  # it starts at zero, and then no gradient passes it
batch = training.batches(train_digits, model.path, size=32, y=train_labels, null=10)(0)
whole = torch.autograd.grad(losses.simple(model, **batch), net.enter.weight)[0]
shares = [{name: value[rank::2] for name, value in batch.items()} for rank in range(2)]
halves = [torch.autograd.grad(losses.simple(model, **share), net.enter.weight)[0] for share in shares]
claim(
    "the mean of two processes' gradients is the gradient of the batch",
    torch.allclose(sum(halves) / 2, whole, atol=1e-6),
)

# %% [markdown]
# Two things must be right for this. Each process must draw *its own* part of the *same* batch, with its own noise. And what depends on the whole batch must not be worked out on a part (`training.batches` spreads its times evenly over the whole batch, and does so before it is shared). `training.fit` does both: batches are a pure function of the step, drawn alike everywhere, and then shared. So
#
# `accelerate launch --multi_gpu --num_processes 8 -m dgm_course.cli train mnist-unet`
#
# gives the losses of one process, eight times as fast at best. The README says more, also how to try it without a GPU.
#
# ## 7. Recap
#
# - The log-SNR is what a time means. A schedule is how often each log-SNR is visited, in training and in sampling. Between two fixed log-SNRs it does not change the bound, only weights, noise and grid.
# - $L_T$ must be small in nats for the whole image: with many pixels, even a trace of signal at $T$ shows the brightness. Zero terminal SNR removes it, and noise prediction with it.
# - The larger the image, the more pixels tell the same story. Copies shift the log-SNR by $2\log r$; real images by more where detail is new, by less where they are smooth.
# - A U-Net puts its parameters where the map is small; the skip carries the detail, so that the lower level need not.
# - A DiT cuts patches, adds positions, and looks everywhere. Its adaLN-Zero block starts as the identity.
# - The Fréchet distance compares two moments of features. It needs equal numbers, one preparation, one judge, and its floor.
#
# **Pitfalls**
#
# - Published β belong to 1,000 steps. With another number, scale them.
# - Noise prediction with $\bar\alpha_T=0$, or near it: infinite, or nearly so.
# - Normalise what the network sees, not the state that the sampler steps.
# - `pixel_unshuffle` orders a patch's numbers by channel, row, column. Another library may use another order: weights do not carry over.
# - A Fréchet distance from 1,000 samples beside one from 50,000.
#
# **References**
#
# - Ho, Jain, Abbeel: [*Denoising Diffusion Probabilistic Models*](https://arxiv.org/abs/2006.11239), 2020. Constant, linear and quadratic β.
# - Nichol, Dhariwal: [*Improved Denoising Diffusion Probabilistic Models*](https://arxiv.org/abs/2102.09672), 2021. The cosine schedule.
# - Kingma, Salimans, Poole, Ho: [*Variational Diffusion Models*](https://arxiv.org/abs/2107.00630), 2021. The bound does not see the schedule.
# - Chen: [*On the Importance of Noise Scheduling for Diffusion Models*](https://arxiv.org/abs/2301.10972), 2023. The slide's figure and table.
# - Salimans, Ho: [*Progressive Distillation for Fast Sampling of Diffusion Models*](https://arxiv.org/abs/2202.00512), 2022. The prediction of $v$.
# - Hoogeboom, Heek, Salimans: [*Simple Diffusion*](https://arxiv.org/abs/2301.11093), 2023. The shift by resolution.
# - Lin, Liu, Li, Yang: [*Common Diffusion Noise Schedules and Sample Steps are Flawed*](https://arxiv.org/abs/2305.08891), 2024. Zero terminal SNR.
# - Ronneberger, Fischer, Brox: [*U-Net*](https://arxiv.org/abs/1505.04597), 2015.
# - Vaswani and others: [*Attention Is All You Need*](https://arxiv.org/abs/1706.03762), 2017.
# - Peebles, Xie: [*Scalable Diffusion Models with Transformers*](https://arxiv.org/abs/2212.09748), 2023. DiT.
# - Heusel and others: [*GANs Trained by a Two Time-Scale Update Rule*](https://arxiv.org/abs/1706.08500), 2017. The Fréchet distance as a score.
# - Salimans and others: [*Improved Techniques for Training GANs*](https://arxiv.org/abs/1606.03498), 2016. The Inception score.
# - Kynkäänniemi and others: [*Improved Precision and Recall Metric for Assessing Generative Models*](https://arxiv.org/abs/1904.06991), 2019.
# - Chong, Forsyth: [*Effectively Unbiased FID and Inception Score*](https://arxiv.org/abs/1911.07023), 2020.
# - Barratt, Sharma: [*A Note on the Inception Score*](https://arxiv.org/abs/1801.01973), 2018.
# - Parmar, Zhang, Zhu: [*On Aliased Resizing and Surprising Subtleties in GAN Evaluation*](https://arxiv.org/abs/2104.11222), 2022. Trick 3.
