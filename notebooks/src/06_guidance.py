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
# # Guidance: how to tell a diffusion model what to draw
#
# The networks of the last notebooks draw digits. Here we tell them *which* digit, and how strongly we mean it. At the end of this notebook you will be able to
#
# - derive the conditional score from Bayes' rule, and say what the classifier in it has to know;
# - see why a classifier of clean images fails on noisy ones, and measure from which $t$ on;
# - derive classifier-free guidance with every $\sigma$ in its place, and turn the two weights $w$ of the literature into each other;
# - say what a guided model samples from, and, more important, what it does not;
# - train one network for both of its parts, and sample with the slides' Algorithm 2;
# - measure what a larger weight buys on images and what it costs, and lessen the cost: clip in the right place, guide in an interval of $t$;
# - steer away from a label, and say why this is not a "not".
#
# **Time:** two to three hours to read, with pen and paper; it runs in less than a minute on a processor.
# **It builds on** [notebook 03](03_ddpm.ipynb): the chain and its samplers; and on [notebook 05](05_score_sde.ipynb): the score, Tweedie's formula, the probability-flow ODE.
# **Symbols** are those of the lecture; the README's [symbol ledger](../README.md#symbols) lists them all.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import functools
import itertools
import math

import sympy
import torch

from dgm_course import checkpoints, data, guidance, likelihood, losses, nets, samplers, tables, toy, training
from dgm_course.checks import claim, show_source
from dgm_course.denoisers import Denoiser, clipped, read_as
from dgm_course.paths import VE, VP, Cosine, Straight
from dgm_course.viz import plots, style, widgets

g = torch.Generator().manual_seed(0)  # where nearly all chance comes from
double = torch.float64


def normal(*shape):
    return torch.randn(*shape, generator=g, dtype=double)


# %% [markdown]
# ## 1. A classifier shows the way
#
# ### 1.1 Bayes' rule for scores
#
# A diffusion model knows the score $\nabla_x\log p_t(x)$ of noisy data. (Here $x$ is short for $x_t$, and $\alpha, \sigma$ for $\alpha(t), \sigma(t)$.) We want images of one class $y$, so we need the score of $p_t(x\mid y)$. Bayes' rule says
#
# $$p_t(x\mid y) = \frac{p_t(x)\;p_t(y\mid x)}{p(y)}.$$
#
# How frequent a class is does not depend on the noise, so $p(y)$ has no index $t$. Take the logarithm, then the gradient in $x$. The term $\log p(y)$ does not depend on $x$, so its gradient is 0:
#
# $$\nabla_x\log p_t(x\mid y) = \underbrace{\nabla_x\log p_t(x)}_{\text{diffusion model}} + \underbrace{\nabla_x\log p_t(y\mid x)}_{\text{classifier}}.$$
#
# So a model that knows nothing of classes can be steered by a classifier, without any new training of the model. This is **classifier guidance**. The lecture puts a weight $w$ before the second term and keeps the equality sign; for now $w = 1$.
#
# We check it where everything is known: a mixture of six Gaussians in the plane, two for each of three classes. The points of one class are a mixture of two, and its score has a closed form, too. Where no other path is named, we are on the cosine path, whose $x_1$ is pure noise.

# %%
means = torch.tensor([[-1.5, -0.5], [-0.3, 1.2], [0.9, 0.9], [1.5, -0.4], [0.2, -1.3], [0.0, 0.0]], dtype=double)
variances = torch.tensor([0.15, 0.1, 0.1, 0.2, 0.15, 0.1], dtype=double)
member = torch.tensor([0, 0, 1, 1, 2, 2])  # the class of each Gaussian
everything = toy.GaussianMixture(means, variances)
alone = [toy.GaussianMixture(means[member == y], variances[member == y]) for y in range(3)]
path = Cosine()


def log_class(x, t, y, path=path):
    """log p_t(y given x) by Bayes' rule, exactly; p(y) is 1/3."""
    return alone[y].log_prob(x, path, t) - everything.log_prob(x, path, t) - math.log(3)


# %%
for t in (0.05, 0.4, 0.9):
    x = path.perturb(everything.sample(200, g), t, normal(200, 2)).requires_grad_()
    total, off = sum(log_class(x, t, y).exp() for y in range(3)), 0.0
    for y in range(3):
        (gradient,) = torch.autograd.grad(log_class(x, t, y).sum(), x)
        two_terms = everything.score(x, path, t) + gradient
        off = max(off, (two_terms - alone[y].score(x, path, t)).abs().max().item())
    claim(f"t = {t}: the three p_t(y|x) sum to 1", (total - 1).abs().max() < 1e-12)
    claim("  and for each class the two terms sum to the score of p_t(x|y), to 1e-10", off < 1e-10)

# %% [markdown]
# ### 1.2 What the classifier has to know
#
# Look at the index: $p_t(y\mid x)$ is the probability of the class *when all we see is the noisy $x$*. It is not the clean classifier, $p_0(y\mid x)$, handed a noisy point. The noise does not depend on the class: once $x_0$ is known, $x$ says nothing more about $y$. So
#
# $$p_t(y\mid x)=\int p(y\mid x_0)\,p(x_0\mid x_t = x)\,dx_0 = \mathbb E\bigl[\,p(y\mid x_0)\,\big|\,x_t = x\bigr].$$
#
# In words: ask the clean classifier about *every clean point that may be behind $x$*, and average its answers. Near $t = 0$ there is one such point. Near $t = 1$ it may be any, and the answer goes to $p(y)$: in pure noise there is no class.
#
# **Checked** at $t = \frac12$, with a sum over 40,000 clean points on a grid in the place of the integral.

# %%
side = torch.linspace(-4, 4, 201, dtype=double)
plane, t = torch.cartesian_prod(side, side), 0.5
x = path.perturb(everything.sample(100, g), t, normal(100, 2))
off = x[:, None] - path.alpha(t) * plane
log_joint = everything.log_prob(plane) - off.square().sum(2) / (2 * path.sigma(t) ** 2)
behind = log_joint.softmax(1)  # p(x_0 given x_t), on the grid
mean = torch.stack([behind @ log_class(plane, 0.0, y).exp() for y in range(3)])
clean_answer = torch.stack([log_class(x, 0.0, y) for y in range(3)]).exp()
noisy_answer = torch.stack([log_class(x, t, y) for y in range(3)]).exp()
claim("for each class the mean of the clean answers is p_t(y|x), to 1e-6", (mean - noisy_answer).abs().max() < 1e-6)
claim(
    "the clean classifier, asked at x, is too sure: its favourite gets more by 0.1 on average",
    clean_answer.max(0).values.mean() > noisy_answer.max(0).values.mean() + 0.1,
)

# %% [markdown]
# The next figure asks both for class 2: $p_t(y\mid x)$ on the left, $p_0(y\mid x)$ on the right, from 0 (white) to 1 (blue). The points are noisy data at time $t$; those of class 2 are orange.
#
# *Before you move the slider: how should the left picture change as $t$ grows, and how will the right one?*

# %%
cloud, of_cloud = torch.cat([part.sample(60, g) for part in alone]), torch.arange(3).repeat_interleave(60)
cloud_eps, box = normal(180, 2), (-3, 3, -3, 3)
fine = torch.cartesian_prod(*[torch.linspace(-3, 3, 121, dtype=double)] * 2)


def compare(t):
    made, axes = plots.panels(2, width=8.0, height=3.9)
    seen = path.perturb(cloud, t, cloud_eps)
    for ax, at, name in zip(axes, (t, 0.0), ("p_t(y | x): knows the noise", "p_0(y | x): does not"), strict=True):
        shown = log_class(fine, at, 2).exp().reshape(121, 121).T
        ax.imshow(shown, extent=box, origin="lower", cmap=style.DENSITY, vmin=0, vmax=1)
        for points, color in ((seen[of_cloud != 2], style.NOISE), (seen[of_cloud == 2], style.MODEL)):
            ax.scatter(*points.T, s=8, color=color, linewidths=0)
        ax.set(xlim=box[:2], ylim=box[2:], title=name, xlabel="first coordinate", ylabel="second coordinate")
        ax.grid(False)
    return made


widgets.explore(compare, t=[0.05, 0.25, 0.5, 0.75])

# %% [markdown]
# On the left the borders soften and the blue fades towards one third, as it should. On the right nothing changes: a sure answer nearly everywhere, and a gradient that points across borders that have lost their meaning.
#
# ### 1.3 Guidance as a denoiser
#
# Our samplers take a denoiser, not a score. So we turn the guided score back into an $\hat x_0$. Tweedie's formula (notebook 05, section 3.3) says $\nabla\log p_t(x) = (\alpha\hat x_0-x)/\sigma^2$. Solve it for $\hat x_0$:
#
# $$\hat x_0 = \frac{x+\sigma^2\,\nabla\log p_t(x)}{\alpha}.$$
#
# Adding $w\nabla\log p_t(y\mid x)$ to the score therefore adds $w\,\frac{\sigma^2}{\alpha}\nabla\log p_t(y\mid x)$ to $\hat x_0$. And as $\epsilon = -\sigma\cdot$score, it adds $-w\,\sigma\,\nabla\log p_t(y\mid x)$ to $\hat\epsilon$. Mind this $\sigma$; section 2.1 comes back to it.

# %%
show_source(guidance.classifier)

# %% [markdown]
# **Checked:** with the exact classifier and $w = 1$ this must be the exact denoiser of the class, $\mathbb E[x_0\mid x_t, y]$.

# %%
for t in (0.1, 0.5, 0.95):
    x = path.perturb(everything.sample(200, g), t, normal(200, 2))
    off = 0.0
    for y in range(3):
        steered = guidance.classifier(everything.denoiser(path), path, lambda x, t, y=y: log_class(x, t, y))
        off = max(off, (steered(x, t) - alone[y].denoiser(path)(x, t)).abs().max().item())
    claim(f"t = {t}: the model of everything, guided to a class, is the model of that class, to 1e-9", off < 1e-9)

# %% [markdown]
# At $t = 1$, where $\alpha = 0$, the formula reads $\infty\cdot0$. The kernel then leaves $\hat x_0$ as it is. (The limit exists and is another one: $\mathbb E[x_0\mid y]$ for $w = 1$. But a classifier's gradient cannot tell it there, as it is 0. It concerns the first step alone, and only on a path that ends at $\alpha = 0$.)
#
# ### 1.4 On digits: two classifiers
#
# The lecture warns that an off-the-shelf classifier will not do. We have both: `mnist-classifier` was trained on clean digits, and `mnist-noisy-classifier` on $x_t$ at all $t$ of the cosine path; it is told $t$.
#
# How well do they do on 150 noisy test images? Two measures: the share that is right, and $-\log p(y\mid x_t)$ of the true class, in nats. The second one notices when a classifier is *sure* and wrong. One that knows nothing and says so pays $\log 10\approx2.3$ nats.
#
# *What do you expect? At $t = 0.5$ noise and signal are equally strong: $\alpha = \sigma$.*

# %%
digits = checkpoints.load("mnist-unet")
shelf, noisy = checkpoints.load("mnist-classifier"), checkpoints.load("mnist-noisy-classifier")
classifiers = {
    "off the shelf": lambda x, t: shelf(x).log_softmax(1),
    "trained on noise": lambda x, t: noisy(x, path.units(t, len(x), x.device)).log_softmax(1),
}
pictures, labels = data.balanced(*data.images(data.load("mnist", "test")), 150, g)
eps, ts = torch.randn(pictures.shape, generator=g), torch.linspace(0, 0.95, 11)
right, nats = ({name: [] for name in classifiers} for _ in range(2))
with torch.no_grad():
    for t in ts.tolist():
        xt = path.perturb(pictures, t, eps)
        for name, log_p in classifiers.items():
            said = log_p(xt, t)
            right[name].append((said.argmax(1) == labels).double().mean())
            nats[name].append(-said.gather(1, labels[:, None]).double().mean())

# %%
made, (left, other) = plots.panels(2, width=9.6, height=3.4)
plots.curves(ts, {name: torch.stack(values) for name, values in right.items()}, "t", "share classified right", ax=left)
plots.curves(ts, {name: torch.stack(values) for name, values in nats.items()}, "t", "−log p(y | x_t) in nats", ax=other)
other.axhline(math.log(10), color=style.NOISE, linewidth=1)
made

# %%
middle = 5  # ts[5] is 0.475
claim("without noise both are right on 95 % or more", min(values[0] for values in right.values()) > 0.95)
claim("just before t = ½ the one trained on noise is right on 90 % or more", right["trained on noise"][middle] > 0.9)
claim("the other one on less than half", right["off the shelf"][middle] < 0.5)
claim(
    "near t = 1 the one trained on noise knows that it knows nothing: 2.3 nats, to 0.2",
    abs(nats["trained on noise"][-1] - math.log(10)) < 0.2,
)
claim("the other one is sure and wrong: more than 3 nats", nats["off the shelf"][-1] > 3)

# %% [markdown]
# Left: the classifier trained on noise stays right until most of the signal is gone; the other one drops early. Right: above the grey line an answer is worse than none at all. Off the shelf, the classifier is sure of a wrong class as soon as there is real noise, and the gradient of such an answer points nowhere.
#
# Now let both guide. The diffusion model is asked without a label (notebook 03 trained it for that, too), so it does not know which digit is wanted. *After section 1.3, what do you expect of $w = 1$?*
#
# One caution: a classifier must not judge the samples that it has guided itself. It would report how well its own wishes were met, and a gradient can meet them without drawing a digit. So each one is judged by the other.

# %%
asked = torch.arange(10).repeat(2)
start, drawn = torch.randn(20, 1, 28, 28, generator=g), {}


def wish(name):
    return lambda x, t: classifiers[name](x, t).gather(1, asked[:, None])[:, 0]


for name, scale in (("off the shelf", 8), ("trained on noise", 1), ("trained on noise", 8)):
    d = clipped(guidance.classifier(digits, path, wish(name), scale))
    chance = torch.Generator().manual_seed(2)  # the same noise in all steps of all rows
    drawn[f"{name}, w = {scale}"] = samplers.last(samplers.ddpm(d, path, start, path.times(20), generator=chance))
plots.rows([images[:10] for images in drawn.values()], labels=list(drawn))


# %%
def share(images, judge):
    with torch.no_grad():
        return (classifiers[judge](images, 0.0).argmax(1) == asked).double().mean().item()


by_other = {
    name: share(images, "trained on noise" if "shelf" in name else "off the shelf") for name, images in drawn.items()
}
claim(
    "off the shelf, w = 8: fewer than a quarter are as asked, to the other classifier",
    by_other["off the shelf, w = 8"] < 0.25,
)
claim("trained on noise, w = 1: fewer than two thirds are", by_other["trained on noise, w = 1"] < 0.67)
claim("trained on noise, w = 8: more than three quarters are", by_other["trained on noise, w = 8"] > 0.75)

# %% [markdown]
# Asked for are 0 to 9, from left to right. All rows start from the same noise and get the same noise on the way. In the first row next to nothing is as asked, and many signs are no digits: a strong push in directions that mean nothing. The classifier trained on noise gets about half of them with $w = 1$, and most with $w = 8$, though in an unsteady hand.
#
# Should $w = 1$ not have been enough? With the exact gradient it was, in 1.3. Nor is it the diffusion model: told the label, the same network needs no more than $w = 1$ (section 3.2). What is left is the *gradient* of this classifier. It is not exact, although its answers are good: a classifier is trained to be right, not to have the right slope. Section 2.1 measures these slopes. Dhariwal and Nichol met the same on photographs, and their cure was the same, a larger weight.
#
# ### 1.5 At which point?
#
# > **Spot the bug.** A public sampler takes DDPM's step with mean $\mu$ and variance $\Sigma$, and guides it by moving the mean to $\mu+\Sigma\,\nabla\log p(y\mid\cdot)$. Its paper derives this by expanding $\log p(y\mid x_s)$ around $x_s = \mu$: the gradient belongs at the mean $\mu$, at the time $s$ of the *next* state. Its code takes the gradient at $x_t$ and $t$. A user asked; an author called it a slight bug, and said that mending it had not noticeably changed the results. Another library then mended its copy: gradient at $\mu$, but with the old $t$. Which of the three is right? How much does it matter?
#
# Work out what the answer should be. DDPM's step has the mean $\mathrm{keep}\cdot x_t+\mathrm{pull}\cdot\hat x_0$ (notebook 03, section 3.2; `path.bridge` gives both numbers). Given $x_t$ and $x_0$, the next $x_s$ no longer depends on $y$. So for a known class only $\hat x_0$ changes, to that of the class:
#
# $$\mathbb E[x_s\mid x_t, y] = \mathrm{keep}\cdot x_t+\mathrm{pull}\cdot\mathbb E[x_0\mid x_t, y] = \mu+\mathrm{pull}\cdot\tfrac{\sigma(t)^2}{\alpha(t)}\nabla\log p_t(y\mid x_t).$$
#
# The last equality is section 1.3. Now $\mathrm{pull} = \alpha(s)\,\beta/\sigma(t)^2$, where $\beta$ is the variance of $q(x_t\mid x_s)$, so the factor is $\beta\,\alpha(s)/\alpha(t)$. (On the chain, with the lecture's $\alpha_t = 1-\beta_t$, this is $\beta_t/\sqrt{\alpha_t}$.) So **at $x_t$ and $t$ there is an exact formula for the mean**, with $w = 1$, but its factor is not $\Sigma$. The three formulas of the bug are approximations of first order.
#
# On the mixture all of it can be computed. We measure the error of the shifted mean, as a share of the exact shift, over all steps of a grid and all three classes. There are two common choices of $\Sigma$, $\tilde\beta$ and $\beta$ (notebook 03, section 3.4).

# %%
chain_path, counts = VP(), [10, 30, 100]
places = ["code: x_t, t", "copy: μ, t", "paper: μ, s"]


def shift_errors(steps):
    """Errors of seven shifts of the mean, as shares of the true one: the exact formula, three with β̃, three with β."""
    wrong, whole = torch.zeros(7, dtype=double), 0.0
    for t, s in itertools.pairwise(torch.linspace(1, 0.01, steps + 1, dtype=double).tolist()):
        keep, pull, posterior = chain_path.bridge(s, t)
        a, beta = chain_path.transition(s, t)  # a = α(t)/α(s)
        for y in range(3):
            x = chain_path.perturb(alone[y].sample(150, g), t, normal(150, 2))
            mu, exact = (keep * x + pull * m.denoiser(chain_path)(x, t) for m in (everything, alone[y]))
            at = [(x, t), (mu, t), (mu, s)]
            slopes = [alone[y].score(z, chain_path, time) - everything.score(z, chain_path, time) for z, time in at]
            shifts = [beta / a * slopes[0], *(posterior * k for k in slopes), *(beta * k for k in slopes)]
            wrong += torch.stack([(mu + shift - exact).norm(dim=1).mean() for shift in shifts])
            whole += (exact - mu).norm(dim=1).mean()
    return wrong / whole


# %%
found = torch.stack([shift_errors(steps) for steps in counts])
claim("at x_t and t, with the factor βα(s)/α(t): exact, to 1e-9", found[:, 0].max() < 1e-9)
claim("10 steps, Σ = β̃: the code and the mended copy are off by more than half", found[0, 1:3].min() > 0.5)
claim("  the paper's formula by less than a quarter", found[0, 3] < 0.25)
claim("10 steps, Σ = β: all three are off by 25 to 40 %", found[0, 4:].min() > 0.25 and found[0, 4:].max() < 0.4)
claim("100 steps: all six by less than 10 %", found[-1].max() < 0.1)
made, axes = plots.panels(2, width=10.4, height=3.4)
for ax, columns, name in zip(axes, (slice(1, 4), slice(4, 7)), ("Σ = β̃", "Σ = β"), strict=True):
    lines = dict(zip(places, found[:, columns].T, strict=True))
    plots.curves(torch.tensor(counts), lines, "steps", "error, as a share", logx=True, logy=True, ax=ax, title=name)
    ax.set_yticks([0.03, 0.1, 0.3], ["3 %", "10 %", "30 %"])
    ax.minorticks_off()
    ax.set_ylim(0.02, 0.8)
made

# %% [markdown]
# The exact formula has no line: its error is 0. All others are wrong by a share that falls about like one over the number of steps. With hundreds of steps it is a few per cent of the shift; that this did not show, as the author reported, is no surprise. With few steps they are far off.
#
# The mended copy is no better than the code (on the left its line lies on top): to take a new point with an old time is no formula at all. The paper's formula is better if $\Sigma = \tilde\beta$, and not if $\Sigma = \beta$. So point and time are not the whole story. There is a closed form for the shift, and it needs no expansion.
#
# `guidance.classifier` changes $\hat x_0$, at $x_t$, and the sampler does the rest. So with the exact gradient and $w = 1$ every sampler gets the class's own denoiser, not only DDPM's step.
#
# ## 2. Without a classifier
#
# ### 2.1 The algebra, with σ in its place
#
# A classifier for noisy images is a second network to train, and its gradient costs time. But Bayes' rule can be read backwards. If a diffusion model knows both scores exactly, with the class and without, their difference *is* the classifier's gradient:
#
# $$\nabla_x\log p_t(y\mid x) = \nabla_x\log p_t(x\mid y)-\nabla_x\log p_t(x).$$
#
# Now in noise predictions. Let $\epsilon(x)$ be the one without a label and $\epsilon(x, y)$ the one with it, so $\nabla\log p_t(x) = -\epsilon(x)/\sigma$ and $\nabla\log p_t(x\mid y) = -\epsilon(x, y)/\sigma$. The guided prediction $\tilde\epsilon$ is the guided score times $-\sigma$:
#
# $$\begin{aligned}
# \tilde\epsilon(x, y) &= \epsilon(x)-w\,\sigma\,\nabla_x\log p_t(y\mid x)\\
# &= \epsilon(x)-w\,\sigma\,\bigl[\nabla_x\log p_t(x\mid y)-\nabla_x\log p_t(x)\bigr]\\
# &= \epsilon(x)-w\,\sigma\,\Bigl[-\frac{\epsilon(x, y)}\sigma+\frac{\epsilon(x)}\sigma\Bigr]\\
# &= (1-w)\,\epsilon(x)+w\,\epsilon(x, y).
# \end{aligned}$$
#
# This is **classifier-free guidance**: two evaluations, no gradient, no $\sigma$ in the last line.
#
# The slide text leaves $\sigma$ out of the first three lines, too. It reads $\tilde\epsilon = \epsilon(x)-w\nabla_x\log p_t(y\mid x)$, and two lines later $-w[-\epsilon(x, y)+\epsilon(x)]$. Two things are missing there, and they cancel: a factor $\sigma$ in the first line, and a $1/\sigma$ where scores become noises. The last line is right. *Does it matter, then?* Let `sympy` check each line, and see what the slide text's first line does if one takes it as it stands.

# %%
e_u, e_c, w, sigma = sympy.symbols("epsilon_u epsilon_c w sigma", positive=True)
score_u, score_c = -e_u / sigma, -e_c / sigma
gradient, last_line = score_c - score_u, (1 - w) * e_u + w * e_c
claim("with σ the first line is the last one", sympy.expand(e_u - w * sigma * gradient - last_line) == 0)
as_it_stands = e_u - w * gradient
claim("the slide text's first line, without σ, is not", sympy.simplify(as_it_stands - last_line) != 0)
stronger = sympy.expand(as_it_stands - last_line.subs(w, w / sigma))
claim("it is guidance with the weight w/σ in the place of w", sympy.simplify(stronger) == 0)

# %% [markdown]
# So classifier guidance by the first line as it stands has the weight $w/\sigma(t)$: about $w$ near $t = 1$, five times $w$ where $\sigma = 0.2$, and without bound near the data. With $w = 1$ and the exact classifier one should get the class itself. Does one? (By the formula above, the exact classifier's gradient is the difference of two exact scores. So the kernel of section 2.2 may stand in for it.)

# %%
noise, grid = normal(2000, 2), torch.linspace(1, 0.01, 200, dtype=double)
ends = {}
for name, scale in {"with σ": 1.0, "as it stands": lambda t: 1 / path.sigma(t).item()}.items():
    d = guidance.classifier_free(alone[2].denoiser(path), everything.denoiser(path), scale)
    ends[name] = samplers.last(samplers.ddim(d, path, noise, grid))
sure = {name: log_class(x, 0.0, 2).exp() for name, x in ends.items()}
real = log_class(alone[2].sample(2000, g), 0.0, 2).exp()
claim(
    "with σ: on average points are as sure of their class as data are, to 0.02",
    abs(sure["with σ"].mean() - real.mean()) < 0.02,
)
claim("5 to 20 % of the data are less than 80 % sure", 0.05 < (real < 0.8).double().mean() < 0.2)
claim("as it stands: fewer than 1 % of the points are", (sure["as it stands"] < 0.8).double().mean() < 0.01)

# %% [markdown]
# As it stands the line pushes every point away from the border of its class. The data do have points there. A missing $\sigma$ does not look like an error in the pictures; it looks like a larger weight.
#
# **The hidden classifier.** Every conditional diffusion model with a null label thus contains an estimate of the gradient of a classifier of noisy data. (An estimate: the difference of two networks need not be the gradient of anything.) How do the gradients of the two classifiers of section 1.4 compare with it? We measure the cosine of the angle between them, on noisy digits, for a class that is not theirs. *The one trained on noise is right on more than 90 % up to $t = 0.5$. At which $t$ do you expect it to agree best?*

# %%
some, wrong_class, ts_few = pictures[::4], (labels[::4] + 3) % 10, [0.1, 0.3, 0.5, 0.7, 0.9]
cosine = {name: [] for name in classifiers}
for t in ts_few:
    xt = path.perturb(some, t, torch.randn(some.shape, generator=g))
    with torch.no_grad():
        hidden = digits(xt, t, y=wrong_class) - digits(xt, t)  # the hidden gradient, times σ²/α
    for name, log_p in classifiers.items():
        leaf = xt.clone().requires_grad_()
        (slope,) = torch.autograd.grad(log_p(leaf, t).gather(1, wrong_class[:, None]).sum(), leaf)
        cosine[name].append(torch.cosine_similarity(hidden.flatten(1), slope.flatten(1)).mean().double())
claim("off the shelf: the cosine is below 0.25 at all five times", max(cosine["off the shelf"]) < 0.25)
claim("trained on noise: above 0.4 at t = 0.7 and 0.9", min(cosine["trained on noise"][3:]) > 0.4)
claim("but below 0.3 at t = 0.1 and 0.3", max(cosine["trained on noise"][:2]) < 0.3)
plots.curves(
    torch.tensor(ts_few),
    {name: torch.stack(values) for name, values in cosine.items()},
    "t",
    "cosine with the hidden gradient",
)

# %% [markdown]
# In 784 dimensions a cosine of 0.5 is a good deal; two random directions have about $1/\sqrt{784}\approx0.04$. At large $t$, where the class is decided, the classifier trained on noise points roughly where the diffusion model points. At small $t$ the two disagree, although the classifier is right there: many slopes lead to the same answer. Off the shelf the direction is all but arbitrary. (Neither is the truth. The hidden gradient comes from predictions that the loss itself trains to have the right *direction*. But at small $t$ a digit with a wrong label is something that this network has not seen in training either; there the cosine does not say which of the two is off.)
#
# ### 2.2 Two weights
#
# The slides have two formulas with a $w$:
#
# | | formula | plain conditional model | no condition |
# |---|---|---|---|
# | derivation on the slide | $(1-w)\,\epsilon(x)+w\,\epsilon(x, y)$ | $w = 1$ | $w = 0$ |
# | Algorithm 2 | $(1+w)\,\epsilon(z, c)-w\,\epsilon(z)$ | $w = 0$ | $w = -1$ |
#
# **Claim.** $w_{\text{slide}} = 1+w_{\text{algorithm}}$.
#
# The paper of Ho and Salimans has the second (with $z$ for our $x$ and $c$ for our $y$). Most code has the first, and so has this course: `scale` is $w_{\text{slide}}$. The $w$ of section 1 is this one, too, as $w = 1$ is Bayes' rule. A weight read in one paper and typed into the code of another is off by one. From here on $w$ without an index is $w_{\text{slide}}$.

# %%
algorithm = (1 + w) * e_c - w * e_u
claim("w_slide = 1 + w_algorithm", sympy.expand(last_line.subs(w, 1 + w) - algorithm) == 0)
claim("w_slide = 1 is the conditional model", last_line.subs(w, 1) == e_c)
claim("so is w_algorithm = 0", algorithm.subs(w, 0) == e_c)

# %%
show_source(guidance.classifier_free)

# %% [markdown]
# The slide calls this "an interpolation between predictors". For $0\le w\le1$ it is one. But one guides with $w>1$, and then it is an **extrapolation**: one starts at the guess without a label, goes to the guess with it, and on in the same direction, $\hat x_0(x)+w\,[\hat x_0(x, y)-\hat x_0(x)]$ (`torch.lerp` in the code). Nothing keeps the result between the two.
#
# See it on one noisy digit. We take a 9 of the test set at $t = 0.7$, and ask for a 4. *What will the guess look like for $w = -2$?*

# %%
nine = pictures[labels == 9][:1]
xt = path.perturb(nine, 0.7, torch.randn(nine.shape, generator=g))
weights = [-2, 0, 0.5, 1, 2, 4, 8]
four = lambda x, t: digits(x, t, y=torch.full((len(x),), 4))  # noqa: E731
with torch.no_grad():
    guesses = [guidance.classifier_free(four, digits, w)(xt, 0.7) for w in weights]
outside = [(guess.abs() > 1.05).double().mean().item() for guess in guesses]
claim("from w = 0 to 1 nearly no pixel of the guess leaves [−1, 1]", max(outside[1:4]) < 0.01)
claim("at w = 8 more than a tenth does", outside[-1] > 0.1)
plots.grid(
    torch.cat([nine, xt, *guesses]),
    labels=["clean", "x_t", *(f"w = {w}".replace("-", "−") for w in weights)],
    columns=9,
)

# %% [markdown]
# From left to right it is a straight line in the space of images. At $w = 0$, without a label, the guess is a blurred 9; at $w = 1$ the loop opens; then the line goes on, and what tells a 4 from the rest is painted over and over, in the end brighter than white. To the left, at $w = -2$, whatever speaks for a 4 is taken away: even the stroke on the right fades, and the sign drifts towards a 5.
#
# ### 2.3 It may be done in any unit
#
# Should one extrapolate $\epsilon$, $\hat x_0$, $v$, or the score? It does not matter. Given $x_t$, each of them is $p\,x_t+q\,\hat x_0$ with numbers $p$ and $q$ that depend on $t$ alone (notebook 05, section 7.2). And the factors $1-w$ and $w$ sum to 1, so
#
# $$(1-w)\,\bigl(p\,x_t+q\,\hat x_0(x)\bigr)+w\,\bigl(p\,x_t+q\,\hat x_0(x, y)\bigr) = p\,x_t+q\,\bigl[(1-w)\,\hat x_0(x)+w\,\hat x_0(x, y)\bigr].$$
#
# Guidance *commutes* with every such change of parameterisation. With factors that do not sum to 1 it does not. The text of a public tutorial had $s\,\epsilon(x, y)+(s-1)\,\epsilon(x)$, with a plus in the place of the minus: there $x_t$ counts $2s-1$ times.

# %%
p, q, x_t, u, c = sympy.symbols("p q x_t u c")  # u and c: the guesses without and with the label
claim(
    "guiding commutes with x̂_0 → p·x_t + q·x̂_0",
    sympy.expand((1 - w) * (p * x_t + q * u) + w * (p * x_t + q * c) - p * x_t - q * ((1 - w) * u + w * c)) == 0,
)
wrong = w * (p * x_t + q * c) + (w - 1) * (p * x_t + q * u)
claim("with s and s − 1, x_t counts 2s − 1 times", sympy.expand(wrong).coeff(x_t) - sympy.expand(p * (2 * w - 1)) == 0)
both, t = (everything, alone[1]), 0.4
for path_ in (Cosine(), VP(), VE(0.01, 10.0), Straight()):
    x = path_.perturb(everything.sample(50, g), t, normal(50, 2))
    guided = guidance.classifier_free(alone[1].denoiser(path_), everything.denoiser(path_), 4.0)(x, t)
    off = 0.0
    for unit in ("eps", "v", "score", "velocity"):
        u, c = (read_as(unit, m.denoiser(path_), path_)(x, t) for m in both)
        off = max(off, (path_.convert(-3 * u + 4 * c, x, t, given=unit, to="x0") - guided).abs().max().item())
    claim(f"{type(path_).__name__}: guided as ε, v, score or velocity, it is the same x̂_0, to 1e-9", off < 1e-9)

# %% [markdown]
# What does *not* commute is anything that bends: clipping above all (section 2.7).
#
# ### 2.4 What does it sample from?
#
# The slides write $\nabla\log p_t(x\mid y) = \nabla\log p_t(x)+w\nabla\log p_t(y\mid x)$. With $w = 1$ this is Bayes. With any other $w$ the two sides differ. What is the right side, then? We call it the *guided field*, and read it as a gradient:
#
# $$\nabla\log p_t(x)+w\nabla\log p_t(y\mid x) = \nabla\log\underbrace{\bigl[p_t(x)\;p_t(y\mid x)^w\bigr]}_{=:\,Z_t\,\tilde p_t(x)}.$$
#
# **At each $t$, the guided field is the score of the sharpened density $\tilde p_t\propto p_t(x)\,p_t(y\mid x)^w$.** This is exact; $Z_t$ is the number that makes $\tilde p_t$ integrate to 1. (There is one for every $w\ge0$, since $p_t(y\mid x)\le1$. For $w<0$ the integral may be infinite.)
#
# It is tempting to go on: so guided sampling draws from $\tilde p_0\propto p(x)\,p(y\mid x)^w$. **This does not follow, and it is not true.** A sampler of $\tilde p_0$ needs at each $t$ the score of $\tilde p_0$ *diffused to $t$*. For that $\tilde p_t$ would have to be $\tilde p_0$, shrunk by $\alpha$ and with the noise of time $t$ added. Multiplying densities and adding noise are two operations that do not commute.
#
# **A case for pen and paper.** All data are $\mathcal N(0, b)$; those of the class are narrower, $\mathcal N(0, a)$ with $a<b$. Divide everything by $\alpha$: the noise then adds the variance $\tau = \sigma^2/\alpha^2$ (notebook 05, section 5.5). So $p_t(x\mid y) = \mathcal N(0, a+\tau)$ and $p_t(x) = \mathcal N(0, b+\tau)$, and with $p_t(y\mid x)\propto p_t(x\mid y)/p_t(x)$
#
# $$\tilde p_t\propto p_t(x)^{1-w}\,p_t(x\mid y)^w = \mathcal N\bigl(0, S(\tau)\bigr),\qquad\frac1{S(\tau)} = \frac w{a+\tau}+\frac{1-w}{b+\tau}.$$
#
# If $\tilde p_t$ were $\tilde p_0$ with noise, $S(\tau)$ would be $S(0)+\tau$. *For which $w$ is it?*

# %%
tau, a, b = sympy.symbols("tau a b", positive=True)
S = 1 / (w / (a + tau) + (1 - w) / (b + tau))
gap = sympy.simplify(S - S.subs(tau, 0) - tau)
claim("S(τ) is S(0) + τ for w = 1, the class", sympy.simplify(gap.subs(w, 1)) == 0)
claim("  for w = 0, all data", sympy.simplify(gap.subs(w, 0)) == 0)
claim("  and for any w if a = b, a class like all others", sympy.simplify(gap.subs(b, a)) == 0)
at = {w: 3, a: 1, b: 2, tau: 1}
claim(
    "else not: with w = 3, a = 1, b = 2, S(1) is 6/5, and S(0) + 1 is 3/2",
    S.subs(at) == sympy.Rational(6, 5) and S.subs(at | {tau: 0}) + 1 == sympy.Rational(3, 2),
)

# %% [markdown]
# What, then, do the samplers draw? Here it can be worked out. The guided score is $-x/S(\tau)$, linear in $x$. So $x$ stays Gaussian, and we need only its variance $V(\tau)$.
#
# In the clock $\tau$ the probability-flow ODE is $dx = -\frac12\,\mathrm{score}\,d\tau = \frac x{2S}\,d\tau$, so $V' = V/S$. A step of the reverse SDE goes down from $\tau$ to $\tau-h$: it multiplies $x$ by $1-h/S$ and adds fresh noise of variance $h$. So $V(\tau-h)\approx V-2hV/S+h$, and $V' = 2V/S-1$. Both start with $V\approx\tau$ at a very large $\tau$.
#
# To solve both, let $E(\tau) = \exp\bigl(-\int_0^\tau\frac{d\tau'}{S(\tau')}\bigr)$, so $E(0) = 1$ and $E' = -E/S$. By the product rule $(V E)' = 0$ along the ODE: $VE$ is at 0 what it was at the start. Along the SDE $(V E^2)' = -E^2$, and at the start $VE^2\approx\tau E^2$ goes to 0. So at $\tau = 0$
#
# $$V_{\text{ODE}} = \lim_{\tau\to\infty}\tau\,E(\tau),\qquad V_{\text{SDE}} = \int_0^\infty E(\tau)^2\,d\tau.$$
#
# Take $a = 1$, $b = 2$ and $w = 3$: $1/S = \frac3{1+\tau}-\frac2{2+\tau}$, and $E = \frac{(2+\tau)^2}{4(1+\tau)^3}$. *The sharpened density at 0 has the variance $S(0) = \frac12$. Do you expect the ODE's to be larger, or smaller?*

# %%
slope = (1 / S).subs({w: 3, a: 1, b: 2})
E = (2 + tau) ** 2 / (4 * (1 + tau) ** 3)
claim("E(0) = 1 and E'/E = −1/S", E.subs(tau, 0) == 1 and sympy.simplify(sympy.diff(E, tau) / E + slope) == 0)
claim("the sharpened density at 0 has the variance 1/2", 1 / slope.subs(tau, 0) == sympy.Rational(1, 2))
claim("the ODE ends with 1/4", sympy.limit(tau * E, tau, sympy.oo) == sympy.Rational(1, 4))
claim(
    "the SDE ends with 31/80",
    sympy.integrate(sympy.expand(sympy.apart(E**2, tau)), (tau, 0, sympy.oo)) == sympy.Rational(31, 80),
)
no_guidance = sympy.limit(tau / (1 + tau), tau, sympy.oo), sympy.integrate(1 / (1 + tau) ** 2, (tau, 0, sympy.oo))
claim("without guidance, S = 1 + τ: both give 1, the class", no_guidance == (1, 1))

# %%
narrow, wide = (toy.GaussianMixture(torch.zeros(1, 1, dtype=double), v) for v in (1.0, 2.0))
d = guidance.classifier_free(narrow.denoiser(path), wide.denoiser(path), 3.0)
by_ode = samplers.last(samplers.heun(d, path, torch.ones(1, 1, dtype=double), path.times(400))).item() ** 2
drawn_points = samplers.last(
    samplers.ddpm(d, path, normal(20_000, 1), path.times(400), variance="posterior", generator=g)
)
claim("samplers agree: the ODE's variance is 1/4, to 0.5 %", abs(by_ode / 0.25 - 1) < 0.005)
claim("that of ancestral sampling is 31/80, to 4 %", abs(drawn_points.var() / (31 / 80) - 1) < 0.04)

# %% [markdown]
# Three different answers: $\frac12$ for the density that one thought of, $\frac14$ and $\frac{31}{80}$ for two samplers of the same field. That these two differ is the proof. Had the field been the score of *one* density in diffusion, ODE and SDE would agree (notebook 05, section 2.1). Guidance has no "model density" of its own: what comes out depends on the sampler. (In general: $a^w\,b^{1-w}$ for the ODE, the geometric extrapolation of the variances, where the sharpened density has the harmonic one; and $\frac{ab-a^{2w}b^{2-2w}}{(2w-1)(b-a)}$ for the SDE.)
#
# **Two classes on a line.** Now we look at whole densities. Take $p(x) = \frac12\mathcal N(-1, \frac12)+\frac12\mathcal N(1, \frac12)$, each Gaussian a class, and ask for the one on the right. Left in the figure: the KL divergence between $\tilde p_0$, properly diffused to $t$, and $\tilde p_t$. Right: what comes out in the end for $w = 3$. (In one dimension the ODE keeps the order of points. So its density follows from where a grid of points ends, without sampling.) *The class has its mean at 1. Where do you expect the ODE's peak?*

# %%
line, right_one = (toy.GaussianMixture(torch.tensor(m, dtype=double), 0.5) for m in ([[-1.0], [1.0]], [[1.0]]))
x = torch.linspace(-6, 8, 701, dtype=double)
dx = x[1] - x[0]


def sharpened(t, w):
    """log p̃_t on the grid, normalised."""
    log_p = (1 - w) * line.log_prob(x[:, None], path, t) + w * right_one.log_prob(x[:, None], path, t)
    return log_p - (log_p.logsumexp(0) + dx.log())


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum() * dx


def diffused(t, w):
    """log of p̃_0 with the noise of time t added, on the grid."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    log_kernel = -((x[:, None] - alpha * x) ** 2) / (2 * sigma**2) - (2 * math.pi * sigma**2).log() / 2
    return (log_kernel + sharpened(0.0, w)).logsumexp(1) + dx.log()


# %%
def ode_density(w):
    """log of the density at which the guided ODE ends: points in order, from their density at the start."""
    z = torch.linspace(-6, 6, 2001, dtype=double)
    d = guidance.classifier_free(right_one.denoiser(path), line.denoiser(path), w)
    ends = samplers.last(samplers.heun(d, path, z[:, None], path.times(200)))[:, 0]
    log_p = -(z**2) / 2 - math.log(2 * math.pi) / 2 - torch.gradient(ends, spacing=(z,))[0].log()
    at = torch.searchsorted(ends, x).clamp(1, len(z) - 1)
    part = (x - ends[at - 1]) / (ends[at] - ends[at - 1])  # between two ends: on the line through their values
    return log_p[at - 1] + part * (log_p[at] - log_p[at - 1])


ts = torch.linspace(0.04, 0.98, 32, dtype=double)
apart = {f"w = {w}": torch.stack([kl(diffused(t, w), sharpened(t, w)) for t in ts]) for w in (1, 2, 3)}
claim("w = 1: no difference at any t, to 1e-6", apart["w = 1"].abs().max() < 1e-6)
claim("w = 3: more than 0.1 nats in between", apart["w = 3"].max() > 0.1)

# %%
law = {w: ode_density(w) for w in (1, 3)}
claim(
    "w = 1: the ODE ends in the density of the class, KL < 1e-3",
    kl(law[1], right_one.log_prob(x[:, None])).abs() < 1e-3,
)
claim("w = 3: its density is more than 0.5 nats from p̃_0", kl(law[3], sharpened(0.0, 3)) > 0.5)
mean = {name: (log_p.exp() * x).sum() * dx for name, log_p in {"p̃_0": sharpened(0.0, 3), "ODE": law[3]}.items()}
claim(
    "p̃_0 has the mean 1.2, and the ODE's density 1.7, to 0.05",
    abs(mean["p̃_0"] - 1.2) < 0.05 and abs(mean["ODE"] - 1.7) < 0.05,
)

# %%
made, (one, two) = plots.panels(2, width=9.6, height=3.5)
plots.curves(ts, apart, "t", "KL in nats", ax=one, title="p̃_0 diffused to t, against p̃_t")
shown = {"class": right_one.log_prob(x[:, None]), "p̃_0": sharpened(0.0, 3), "ODE": law[3]}
view = (x > -2) & (x < 4)
seen = {name: log_p[view].exp() for name, log_p in shown.items()}
colors = {"p̃_0": style.EXACT, "ODE": style.GUIDED}
plots.curves(x[view], seen, "x", "density", ax=two, title="w = 3", colors=colors)
two.set_xticks(range(-2, 5))
made

# %% [markdown]
# Left: at both ends the two agree, in between they do not. Right: the sharpened density only leaves out the part of the class that overlaps with the other one. The guided ODE does more. It moves the class *away* from the other one, to where fewer data are, and makes it narrower.
#
# **In the plane.** Now for class 2 of the mixture, whose two Gaussians lie differently: one at the edge, one in the middle, among the others. The colour is the sharpened density $\tilde p_0$; the points are where the ODE ends. *Which of the two Gaussians will suffer as $w$ grows?*

# %%
few = normal(400, 2)


def at_weight(w):
    d = guidance.classifier_free(alone[2].denoiser(path), everything.denoiser(path), float(w))
    ends = samplers.last(samplers.heun(d, path, few, path.times(40)))
    made, axes = plots.panels(2, width=8.0, height=4.1)
    densities = {
        "p(x | y), the data": alone[2].log_prob,
        "p̃_0, sharpened": lambda x: everything.log_prob(x) + w * log_class(x, 0.0, 2),
    }
    for ax, (name, log_p) in zip(axes, densities.items(), strict=True):
        plots.density(lambda x, log_p=log_p: log_p(x.double()), extent=(-2.2, 2.2, -3.2, 1.2), ax=ax, title=name)
        ax.scatter(*ends.T, s=6, color=style.GUIDED, linewidths=0)
    return made


widgets.explore(at_weight, w=([1, 2, 3, 5, 8], 3))


# %%
def in_the_middle(x):
    """The share of points that are nearer to the Gaussian in the middle, (0, 0), than to the other five."""
    return (torch.cdist(x, means).argmin(1) == 5).double().mean().item()


shares = {}
for w in (1, 2, 4, 8):
    d = guidance.classifier_free(alone[2].denoiser(path), everything.denoiser(path), float(w))
    shares[w] = in_the_middle(samplers.last(samplers.heun(d, path, noise, path.times(60))))
claim("w = 1: nearly half of the points are in the middle, as in the data, 0.49 to 0.04", abs(shares[1] - 0.49) < 0.04)
claim("w = 2: less than a third", shares[2] < 1 / 3)
claim("w = 4: less than a tenth", shares[4] < 0.1)
claim("w = 8: none of 2,000", shares[8] == 0)
center = torch.zeros(1, 2, dtype=double)
claim(
    "and yet a clean point in the middle is of class 2 with more than 95 %",
    log_class(center, 0.0, 2).exp().item() > 0.95,
)
claim("while at t = 0.7 it is anybody's: less than 50 %", log_class(center, 0.7, 2).exp().item() < 0.5)

# %% [markdown]
# With $w = 1$ the points cover both. As $w$ grows, the Gaussian in the middle is emptied, although a point there is nearly sure of its class once the noise is gone, and $\tilde p_0$ keeps it (checked below). The reason lies at large $t$. There the middle is anybody's, the edge belongs to the class, and so the field drives nearly all points to the edge; later it is too late to come back. At $w = 8$ even the Gaussian at the edge is left on its far side. **A mode is lost while the noise is still strong.** Section 3.4 makes use of this.
#
# How far is the ODE's density from $\tilde p_0$, in nats? The ODE is a continuous flow, so notebook 05 has its density at any point: `likelihood.ode_log_prob`. We take it on a grid.

# %%
side = torch.linspace(-4.5, 4.5, 55, dtype=double)
plane, area = torch.cartesian_prod(side, side), (side[1] - side[0]) ** 2
grid = 1e-4 + (1 - 1e-4) * torch.linspace(1, 0, 37, dtype=double) ** 2  # times, denser near the data
for w, low, high in ((1.0, -1e-3, 1e-3), (3.0, 1.0, 1.4)):
    d = guidance.classifier_free(alone[2].denoiser(path), everything.denoiser(path), w)
    log_ode = likelihood.ode_log_prob(d, path, plane, grid)
    log_sharp = everything.log_prob(plane) + w * log_class(plane, 0.0, 2)
    log_sharp = log_sharp - (log_sharp.logsumexp(0) + area.log())
    mass, nats_apart = log_ode.exp().sum() * area, (log_ode.exp() * (log_ode - log_sharp)).sum() * area
    claim(f"w = {w:g}: the ODE's density integrates to 1, to 1 %", abs(mass - 1) < 0.01)
    claim(f"w = {w:g}: KL(ODE ‖ p̃_0) lies between {low:g} and {high:g} nats", low < nats_apart < high)
    kept = log_sharp.exp()[torch.cdist(plane, means).argmin(1) == 5].sum() * area
    claim(f"w = {w:g}: p̃_0 itself has nearly half of its mass in the middle, 0.49 to 0.02", abs(kept - 0.49) < 0.02)

# %% [markdown]
# > **What guidance is, and is not.** *Pointwise, at each $t$*: the score of $p_t(x)\,p_t(y\mid x)^w$. *Not*: a sampler of $p(x)\,p(y\mid x)^w$, unless $w$ is 0 or 1 (or in special cases, such as a class like all others). Why its pictures are good all the same, this formula does not say.
#
# ### 2.5 Algorithm 1: one network for both
#
# Two models would do. But one is enough: drop the label now and then, and the same network learns both. The label's place is then taken by a **null label** $\emptyset$, an embedding of its own. Where the network sees it, the class may be any, so the loss is smallest at $\mathbb E[x_0\mid x_t]$ over all classes. Where it sees $y$, at $\mathbb E[x_0\mid x_t, y]$.
#
# > **Algorithm 1, Joint training.** Repeat: draw $(x, c)$ from the data. Set $c\leftarrow\emptyset$ with probability $p_{\text{uncond}}$. Draw $\lambda\sim p(\lambda)$ and $\epsilon\sim\mathcal N(0, I)$. Set $z_\lambda = \alpha_\lambda x+\sigma_\lambda\epsilon$. Take a gradient step on $\lVert\epsilon_\theta(z_\lambda, c)-\epsilon\rVert^2$.
#
# In our words: $z_\lambda$ is $x_t$, $c$ is $y$, and $\lambda = \log(\alpha^2/\sigma^2)$ is the log-SNR, `path.logsnr(t)`, used as a clock.
#
# What is $p(\lambda)$? If $t$ is uniform on the cosine path, then $\lambda = -2\log\tan(\pi t/2)$, and its density is $|dt/d\lambda|$:
#
# $$p(\lambda) = \frac1{2\pi\cosh(\lambda/2)},$$
#
# a hyperbolic secant. The paper uses this one, cut off at $\lambda_{\min}$ and $\lambda_{\max}$.
#
# So Algorithm 1 is `losses.simple` with labels dropped, and `training.batches` drops them:

# %%
lam = sympy.symbols("lambda", real=True)
t_of = 2 / sympy.pi * sympy.atan(sympy.exp(-lam / 2))
secant = 1 / (2 * sympy.pi * sympy.cosh(lam / 2))
claim(
    "t uniform on the cosine path: p(λ) is the hyperbolic secant",
    sympy.simplify((-sympy.diff(t_of, lam) - secant).rewrite(sympy.exp)) == 0,
)

# %%
x0, y = torch.cat([part.sample(3000, g) for part in alone]).float(), torch.arange(3).repeat_interleave(3000)
torch.manual_seed(0)
learner = Denoiser(nets.MLP(2, width=64, depth=2, num_classes=3), path, predicts="eps")  # as on the slide
batch = training.batches(x0, path, size=256, y=y, drop=0.2, null=3)  # p_uncond = 0.2
steps = training.scaled(cpu=700, gpu=10_000)
joint = training.fit(
    learner, losses.simple, batch, steps=steps, lr=4e-3, ema=0.99, precision="float32", progress=False
).ema
dropped = sum((batch(step)["y"] == 3).sum().item() for step in range(50)) / (50 * 256)
claim("a fifth of the labels is dropped, to 0.02", abs(dropped - 0.2) < 0.02)

# %% [markdown]
# For this mixture the right answers are known. How far is the network from them, with a label and with the null label? The loss would not tell, as it is above 0 for a perfect network, too (notebook 05, section 3.3). So we take the root mean square of $\hat\epsilon-\epsilon^*$, where $\epsilon^*$ is the exact prediction. (The noise itself has the size 1.)


# %%
def distance_to_exact(t, y):
    """Root mean square of ε̂ − ε*, over x_t of that class (or of all)."""
    model = everything if y == 3 else alone[y]
    xt = path.perturb(model.sample(2000, g), t, normal(2000, 2))
    exact = read_as("eps", model.denoiser(path), path)(xt, t)
    with torch.no_grad():
        found = joint.output(xt.float(), t, y=torch.full((2000,), y))
    return (found - exact).square().mean().sqrt().item()


for y in range(4):
    far = [distance_to_exact(t, y) for t in (0.1, 0.3, 0.5, 0.7, 0.9)]
    bar = 0.25 if y == 3 else 0.15
    claim(
        f"{'null label' if y == 3 else f'class {y}'}: within {bar} of the exact prediction at five times",
        max(far) < bar,
    )

# %% [markdown]
# One network has learned four denoisers. The null label gets the wider bar: it must know all six Gaussians from a fifth of the samples, where each class has two, and more samples ($0.8/3$ of them). What if labels are never dropped? Then the null label's embedding is never trained, and guidance extrapolates from a meaningless point. Nothing raises an error.
#
# ### 2.6 Algorithm 2: sampling, as on the slide
#
# > **Algorithm 2, Conditional sampling.** Given $w$, $c$ and increasing log-SNRs $\lambda_1 = \lambda_{\min}, \dots, \lambda_T = \lambda_{\max}$. Draw $z_1\sim\mathcal N(0, I)$. For $t = 1, \dots, T$:
# > $\tilde\epsilon_t = (1+w)\,\epsilon_\theta(z_t, c)-w\,\epsilon_\theta(z_t)$, then $\tilde x_t = (z_t-\sigma_{\lambda_t}\tilde\epsilon_t)/\alpha_{\lambda_t}$, then
# > $z_{t+1}\sim\mathcal N\bigl(\tilde\mu_{\lambda_{t+1}\mid\lambda_t}(z_t, \tilde x_t),\ (\tilde\sigma^2_{\lambda_{t+1}\mid\lambda_t})^{1-v}(\sigma^2_{\lambda_t\mid\lambda_{t+1}})^v\bigr)$ if $t<T$, else $z_{t+1} = \tilde x_t$. Return $z_{T+1}$.
#
# Read it with care: nearly every letter has another meaning than on the slides before. (In the table a step goes from $\lambda$ to the next, larger $\lambda'$.)
#
# | letter | in Algorithm 2 | elsewhere in this course |
# |---|---|---|
# | $t$ | counts steps from noise ($t = 1$) to data ($t = T$) | a time, 0 for data; it falls while we sample |
# | $\lambda$ | log-SNR, rising from noise to data | `path.logsnr(t)`; in DPM-Solver half of it; in other slides a loss weight |
# | $\alpha_\lambda, \sigma_\lambda$ | factors of $x$ and $\epsilon$ in $z_\lambda$ | `path.alpha(t)` $= \sqrt{\bar\alpha_t}$, `path.sigma(t)` $= \sqrt{1-\bar\alpha_t}$; **not** DDPM's $\alpha_t$, nor its $\sigma_t$ |
# | $\tilde\mu_{\lambda'\mid\lambda}$, $\tilde\sigma^2_{\lambda'\mid\lambda}$ | mean and variance of $q(z_{\lambda'}\mid z_\lambda, x)$ | $\tilde\mu$ and $\tilde\beta$ of this step |
# | $\sigma^2_{\lambda\mid\lambda'}$ | variance of $q(z_\lambda\mid z_{\lambda'})$ | $\beta$ of this step |
# | $w$ | 0 for the plain conditional model | $w_{\text{slide}}-1$ |
# | $v$ | share in $[0, 1]$: 0 takes $\tilde\beta$, 1 takes $\beta$, mixed in the logarithm | `variance=v`; not the $v$ that a network predicts |
#
# So there are three kinds of $\sigma$ in one algorithm. How much do they differ? We take a step from $\lambda = 0$, in the middle of the cosine path, to $\lambda' = 1$:

# %%
t, s = path.time_at(torch.tensor([0.0, 1.0])).tolist()  # λ = 0, and one step later λ' = 1
claim("σ_λ² of the state is 1/2", abs(path.sigma(t) ** 2 - 0.5) < 1e-12)
beta, posterior = path.transition(s, t)[1], path.bridge(s, t)[2]
claim(
    "σ²_{λ|λ'} = (1 − e^{λ−λ'}) σ_λ² = 0.32 is β of the step",
    abs(beta - (1 - math.exp(-1)) * path.sigma(t) ** 2) < 1e-12 and abs(beta - 0.32) < 0.005,
)
claim(
    "σ̃²_{λ'|λ} = (1 − e^{λ−λ'}) σ_λ'² = 0.17 is its β̃",
    abs(posterior - (1 - math.exp(-1)) * path.sigma(s) ** 2) < 1e-12 and abs(posterior - 0.17) < 0.005,
)
claim(
    "v = ½ takes their geometric mean, 0.23",
    abs(path.log_variance(s, t, 0.5).exp() - (beta * posterior).sqrt()) < 1e-12
    and abs((beta * posterior).sqrt() - 0.23) < 0.005,
)

# %% [markdown]
# Now the algorithm, word by word, with its own letters. ($\alpha_\lambda^2+\sigma_\lambda^2 = 1$ gives $\alpha_\lambda^2 = 1/(1+e^{-\lambda})$, the logistic function.) Below it the course's samplers do the same: a denoiser guided with `scale` $= 1+w$, on a grid of equal steps in log-SNR.


# %%
@torch.no_grad()
def algorithm_2(network, c, w, lambdas, v, z, generator):
    """The slide's Algorithm 2; lambdas rise from noise to data, and t counts them from 0."""
    for t, lam in enumerate(lambdas):
        alpha, sigma = lam.sigmoid().sqrt(), (-lam).sigmoid().sqrt()
        at = path.unit(path.time_at(lam)).expand(len(z))  # our networks are told the time, not λ
        eps = (1 + w) * network(z, at, c) - w * network(z, at)
        x = (z - sigma * eps) / alpha
        if t == len(lambdas) - 1:
            return x
        after = lambdas[t + 1]
        ratio, alpha_after, var_after = (lam - after).exp(), after.sigmoid().sqrt(), (-after).sigmoid()  # e^{λ−λ'}
        mean = ratio * alpha_after / alpha * z + (1 - ratio) * alpha_after * x
        smaller, larger = (1 - ratio) * var_after, (1 - ratio) * sigma**2
        z = mean + (smaller ** (1 - v) * larger**v).sqrt() * torch.randn(z.shape, generator=generator)


# %%
asked_class, first, T = torch.full((400,), 2), torch.randn(400, 2, generator=g), 40
first_time, last_time = path.time_at(torch.tensor([-8.0, 8.0])).tolist()  # λ_min and λ_max
times = samplers.logsnr_times(path, T, first_time, last_time)
lambdas = path.logsnr(times[:-1]).float()
claim(
    "T log-SNRs in equal steps, from −8 to 8", len(lambdas) == T and (lambdas.diff() - 16 / (T - 1)).abs().max() < 1e-4
)
by_slide = {}
for w_algorithm, v in ((0.0, 0.3), (2.0, 0.0), (2.0, 0.3), (2.0, 1.0)):
    by_slide[w_algorithm, v] = algorithm_2(
        joint.net, asked_class, w_algorithm, lambdas, v, first, torch.Generator().manual_seed(1)
    )
    d = guidance.classifier_free(lambda x, t: joint(x, t, y=asked_class), joint, 1 + w_algorithm)
    ours = samplers.last(samplers.ddpm(d, path, first, times, variance=v, generator=torch.Generator().manual_seed(1)))
    claim(
        f"w = {w_algorithm:g}, v = {v}: Algorithm 2 and samplers.ddpm end at the same points",
        torch.allclose(by_slide[w_algorithm, v], ours, atol=2e-3),
    )

# %%
made, axes = plots.panels(3, width=9.9, height=3.6)
shown = {
    "data of the class": alone[2].sample(400, g),
    "Algorithm 2, w = 0": by_slide[0.0, 0.3],
    "Algorithm 2, w = 2": by_slide[2.0, 0.3],
}
for ax, (name, points), color in zip(axes, shown.items(), (style.DATA, style.MODEL, style.GUIDED), strict=True):
    plots.scatter(points, color=color, extent=(-2.5, 2.5, -3.4, 1.6), ax=ax, title=name)
middle = {name: in_the_middle(points.double()) for name, points in shown.items()}
claim(
    "w = 0 keeps more than 40 % in the middle, w = 2 less than 30 %",
    middle["Algorithm 2, w = 0"] > 0.4 > 0.3 > middle["Algorithm 2, w = 2"],
)
made

# %% [markdown]
# With the algorithm's $w = 0$ the small network draws the class. With its $w = 2$, our weight 3, both Gaussians shrink, and the one in the middle loses more than a quarter of its points. The same network keeps them with $w = 0$, and the exact model loses them, too (section 2.4): the loss is due to guidance, and not to the network. (One detail: the algorithm starts at $\lambda_{\min}$ from $\mathcal N(0, I)$, although a little signal, $\alpha = e^{-4}$, should be in $z_1$. That is why $\lambda_{\min}$ must be low.)
#
# **Count evaluations.** Each guided step asks the network twice. 40 steps of Algorithm 2 are 80 evaluations. Whoever compares samplers by steps makes guidance a present of a factor of two. In this course a guided step counts two.

# %%
calls = 0


def counted(x, t, **label):
    global calls
    calls += 1
    return joint(x, t, **label)


for scale, evaluations in ((3.0, 80), (1, 40), (0, 40)):
    calls = 0
    d = guidance.classifier_free(lambda x, t: counted(x, t, y=asked_class), counted, scale)
    samplers.last(samplers.ddim(d, path, first, times))
    claim(f"w = {scale:g}: 40 steps ask the network {evaluations} times", calls == evaluations)

# %% [markdown]
# ### 2.7 Spot the bug, twice
#
# > **Spot the bug: some channels.** A well-known image model works on latents with four channels. Its sampler guides `eps[:, :3]` and leaves the rest as the conditional prediction, because the line comes from an older model whose images had three. An author called it unintended, and found that it acts much like a smaller weight on all four. It has been copied into several other projects. What is lost, if the pictures look right?
#
# Our points have two coordinates; let us guide the first one only. There is a test that needs no samples. A score is a gradient, so its Jacobian is symmetric: $\partial_1s_2 = \partial_2s_1$. Section 2.4 says that the guided field is a score at each $t$. And the half-guided one?


# %%
def twist(d, t):
    """The largest ∂₁s₂ − ∂₂s₁ of a denoiser's score over 300 noisy points: 0 for the gradient of anything."""
    x = path.perturb(everything.sample(300, g), t, normal(300, 2)).requires_grad_()
    s = read_as("score", d, path)(x, t)
    rows = [torch.autograd.grad(s[:, i].sum(), x, retain_graph=True)[0] for i in (0, 1)]
    return (rows[1][:, 0] - rows[0][:, 1]).abs().max().item()


plain, full = (guidance.classifier_free(alone[2].denoiser(path), everything.denoiser(path), w) for w in (1.0, 4.0))
half = lambda x, t: torch.stack([full(x, t)[:, 0], plain(x, t)[:, 1]], 1)  # noqa: E731
claim("t = 0.4, guided in both coordinates: no twist, to 1e-8", twist(full, 0.4) < 1e-8)
claim("  guided in one of them: more than 1, so the field is no gradient", twist(half, 0.4) > 1)
lost = {
    name: in_the_middle(samplers.last(samplers.heun(d, path, noise, path.times(60))))
    for name, d in (("full", full), ("half", half))
}
claim("more than twice as many stay in the middle, as with a smaller weight", lost["half"] > 2 * lost["full"])

# %% [markdown]
# The half-guided field is the score of no density. (Its twist is $\pm(w-1)\,\partial_1\partial_2\log p_t(y\mid x)$. This is 0 only if $\log p_t(y\mid x)$ is a sum of two functions, of one coordinate each.) It still draws something, which looks like guidance with a smaller weight. A test on pictures would pass; a test on an identity does not. (It needs exact denoisers: a network's own score is a gradient only nearly.)
#
# > **Spot the bug: clipping.** Clean pixels lie in $[-1, 1]$, so samplers clip $\hat x_0$ (notebook 03). Someone wraps the network once, `d = clipped(network)`, and guides that: `classifier_free(lambda x, t: d(x, t, y=labels), d, 8.0)`. Where does $\hat x_0$ end up?

# %%
fashion = checkpoints.load("fashion-unet")
ten, start = torch.arange(10), torch.randn(10, 1, 28, 28, generator=g)


def garments(x, t):
    return fashion(x, t, y=ten)


ways = {
    "no clipping": guidance.classifier_free(garments, fashion, 8.0),
    "inside": guidance.classifier_free(clipped(garments), clipped(fashion), 8.0),
    "outside": clipped(guidance.classifier_free(garments, fashion, 8.0)),
}
by_way = {name: samplers.last(samplers.ddim(d, path, start, path.times(12))) for name, d in ways.items()}


# %%
beyond = {name: (x.abs() > 1.001).double().mean().item() for name, x in by_way.items()}


def white(x):
    """The share of pixels that are, or would be shown, white."""
    return (x > 0.95).double().mean().item()


claim("without clipping more than a quarter of the pixels end outside [−1, 1]", beyond["no clipping"] > 0.25)
claim("clipped inside, still more than 1 %", beyond["inside"] > 0.01)
claim("clipped outside, none", beyond["outside"] == 0)
claim(
    "clipped inside, at least 3/4 as many pixels are white as without clipping",
    white(by_way["inside"]) > 0.75 * white(by_way["no clipping"]),
)
claim("clipped outside, less than 2/3 as many", white(by_way["outside"]) < white(by_way["no clipping"]) * 2 / 3)
plots.rows(list(by_way.values()), labels=list(by_way))

# %% [markdown]
# Each guess is in range, and the extrapolation leaves it at once, up to $1+2\,(w-1)$. So clipping inside is nearly no clipping at all: the first two rows look the same, bleached. Clipped outside, more greys survive. **Clip what the sampler gets, not what guidance gets.** (Measured once with 100 garments, $w = 8$ and 20 steps: 16 % of the pixels are white without clipping, 14 % with clipping inside, 6 % outside; of test images it is 1.6 %. So outside is better, but no cure.)
#
# ## 3. On images
#
# ### 3.1 Look first
#
# `mnist-unet` and `fashion-unet` were trained by Algorithm 1, with a tenth of the labels dropped. So they can be guided at once. *Move the weight. The noise stays the same. Which digits change, and what changes in them?*

# %%
ten_starts = {
    name: torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    for name, seed in (("digits", 5), ("fashion", 3))
}


@functools.cache
def at_scale(w, images="digits"):
    network = {"digits": digits, "fashion": fashion}[images]
    d = clipped(guidance.classifier_free(lambda x, t: network(x, t, y=ten), network, w))
    return samplers.last(samplers.ddim(d, network.path, ten_starts[images], network.path.times(12)))


widgets.explore(at_scale, w=([0, 1, 2, 4, 8], 1), images=["digits", "fashion"])

# %% [markdown]
# With $w = 0$ the label is not used: any digit may come. With $w = 1$ the ten classes stand in order. From there on the digits become bolder, rounder, more like the textbook's: unusual strokes go.
#
# ### 3.2 What it buys, and what it costs
#
# Four numbers for each weight, on the features of the course's classifiers (notebook 04, section 4, says what they mean): the share *classified as asked*; the *Fréchet distance* to test images; *precision*, the share of samples that look real; *recall*, the share of real images near which there are samples. The lines: classifier-free guidance of both networks, at all $t$ and in an *interval* of $t$ only (section 3.4 says why); and on MNIST the classifier trained on noise of section 1.4.
#
# *Before you look: which of the four will still be better at $w = 8$ than at $w = 1$?*

# %%
all_tables = {"MNIST": tables.load("mnist-guidance"), "Fashion": tables.load("fashion-guidance")}
for table in all_tables.values():
    print(table["recipe"], "·", table["what"])


def over_weights(kind, name, what):
    """The weights of one kind of guidance, and what was measured at them, a row for each seed."""
    rows = [row for row in all_tables[kind]["rows"] if row["guidance"]["name"] == name]
    rows.sort(key=lambda row: row["guidance"]["scale"])
    seeds = sorted({row["seed"] for row in rows})
    scales = [row["guidance"]["scale"] for row in rows if row["seed"] == seeds[0]]
    return torch.tensor(scales), torch.tensor([[row[what] for row in rows if row["seed"] == seed] for seed in seeds])


# %%
lines = {"MNIST": ("MNIST", "classifier-free"), "Fashion": ("Fashion", "classifier-free")}
lines |= {"MNIST, interval": ("MNIST", "interval"), "Fashion, interval": ("Fashion", "interval")}
lines["MNIST, classifier"] = "MNIST", "classifier"
made, axes = plots.panels(2, rows=2, width=9.8, height=6.4)
for ax, what in zip(axes, ("classified as asked", "Fréchet distance", "precision", "recall"), strict=True):
    found = {name: over_weights(*of, what) for name, of in lines.items()}
    plots.curves(
        {name: x for name, (x, _) in found.items()},
        {name: y for name, (_, y) in found.items()},
        "weight w",
        what,
        logy=what == "Fréchet distance",
        ax=ax,
    )
made


# %%
def mean_at(kind, what, scale, name="classifier-free"):
    scales, values = over_weights(kind, name, what)
    return values[:, scales.tolist().index(scale)].mean().item()


for kind in all_tables:
    asked_for, distance, recall = (
        {w: mean_at(kind, what, w) for w in (0, 1, 5, 8)}
        for what in ("classified as asked", "Fréchet distance", "recall")
    )
    claim(f"{kind}: at w = 0 about a tenth is as asked, by chance", 0.05 < asked_for[0] < 0.15)
    claim("  more at w = 5 than at w = 1", asked_for[5] > asked_for[1])
    claim("  but the Fréchet distance is larger at 5, and again at 8", distance[8] > distance[5] > distance[1])
    claim("  and the recall smaller", recall[5] < recall[1])

# %%
for kind in all_tables:
    inside, everywhere = (
        {what: mean_at(kind, what, 5, name) for what in ("Fréchet distance", "recall", "evaluations")}
        for name in ("interval", "classifier-free")
    )
    nearer = inside["Fréchet distance"] < everywhere["Fréchet distance"]
    claim(
        f"{kind}, w = 5, in the interval: smaller distance, larger recall",
        nearer and inside["recall"] > everywhere["recall"],
    )
    claim("  19 evaluations in place of 24", (inside["evaluations"], everywhere["evaluations"]) == (19, 24))
    twice = [mean_at(kind, what, 2, "interval") for what in ("Fréchet distance", "classified as asked")]
    plain = [mean_at(kind, what, 1) for what in ("Fréchet distance", "classified as asked")]
    claim(
        "  w = 2 in the interval: the distance of w = 1, to 10 %, and more as asked",
        abs(twice[0] / plain[0] - 1) < 0.1 and twice[1] > plain[1],
    )

# %%
accuracy = checkpoints.load("fashion-classifier").card["scores"]["accuracy on the test set"]
claim(
    "Fashion, w = 5: classified as asked more often than real test images are",
    mean_at("Fashion", "classified as asked", 5) > accuracy,
)

# %% [markdown]
# Follow the first two lines, MNIST (blue) and Fashion (orange), from left to right. Up to $w = 1$ the label is being switched on: class accuracy rises steeply, and by $w = 1$ the Fréchet distance has fallen far. On MNIST it rises first, from 0.44 without a label to 0.60 at $w = 0.5$. From $w = 1$ on accuracy on MNIST has little left to gain; on Fashion it goes from 88 % to nearly 100 % and passes the 91 % of real garments, some of which do look like another class. Precision rises at first, and falls a little at $w = 8$. But recall falls, from 0.90 to 0.54 on MNIST and from 0.81 to 0.32 on Fashion: guided samples are good examples of their class, but of ever fewer kinds. Of the weights at all $t$, $w = 1$ has the smallest Fréchet distance: there nothing is extrapolated.
#
# **In an interval** of $t$ (section 3.4) the same weight costs less recall, and five evaluations fewer. With $w = 2$ it has about the plain model's distance, 0.20 on Fashion and 0.08 on MNIST, and more of its samples are as asked: 94 % and not 88 %, 99.9 % and not 98.4 %. It asks 19 times for this, and the plain model 12 times.
#
# **The classifier** needs a large weight to be obeyed. Its samples keep their diversity, but about half of them do not look real, and their distance stays above that of samples without any label.
#
# Are weights of 2, or of 7, then useless? With photographs and with text such weights are common. There a plain model's samples are less often convincing, so there is precision to be gained, and many users want one good picture rather than all kinds of pictures. Our digits leave little to mend. What carries over is the trade.
#
# *How sure is all this?* Each point is the mean over two seeds of 1,000 images, and the bands hold both. Near $w = 1$ the distance moves by 0.01 or 0.02 from one to the other. With the first seed alone, the interval with $w = 2$ had a *smaller* distance than the plain model on both sets of images. The second seed took that back.
#
# Do the tables describe this code? Forty garments for each of three weights, drawn now and classified:

# %%
judge, forty = checkpoints.load("fashion-classifier"), torch.arange(10).repeat_interleave(4)
start, garment = torch.randn(40, 1, 28, 28, generator=g), {}
for w in (1, 5, 8):
    d = clipped(guidance.classifier_free(lambda x, t: fashion(x, t, y=forty), fashion, w))
    garment[w] = samplers.last(samplers.ddim(d, fashion.path, start, fashion.path.times(12)))
    with torch.no_grad():
        as_asked = (judge(garment[w]).argmax(1) == forty).double().mean().item()
    claim(
        f"w = {w}: classified as asked as in the table, to 0.18",
        abs(as_asked - mean_at("Fashion", "classified as asked", w)) < 0.18,
    )

# %% [markdown]
# ### 3.3 Bleached, and all alike
#
# What do the numbers look like? Here are four pullovers, four sandals and four boots of those that we have just drawn. Each column starts from one noise. *What happens to the greys? How alike are the four of a kind?*

# %%
some = torch.isin(forty, torch.tensor([2, 5, 9]))  # pullovers, sandals, boots
plots.rows([garment[w][some] for w in garment], labels=[f"w = {w}" for w in garment])

# %%
test_x, test_y = data.balanced(*data.images(data.load("fashion_mnist", "test")), 500, g)


def spread(x, y):
    """Mean distance between two features of one class, to the judge."""
    with torch.no_grad():
        f = judge.features(x)
    return torch.stack([torch.pdist(f[y == c]).mean() for c in range(10)]).mean().item()


claim("w = 1: less than 1.2 times the white of test images", white(garment[1]) < 1.2 * white(test_x))
claim("w = 8: more than twice that of test images", white(garment[8]) > 2 * white(test_x))
claim(
    "w = 1: garments of a class are as different from each other as test images are, to 20 %",
    abs(spread(garment[1], forty) / spread(test_x, test_y) - 1) < 0.2,
)
claim("w = 5: less different, by more than 20 %", spread(garment[5], forty) < 0.8 * spread(test_x, test_y))

# %% [markdown]
# Two things happen.
#
# **Oversaturation:** grey cloth turns white. The extrapolated guess leaves $[-1, 1]$, and clipping puts it on the edge; the sampler takes what is left for the image and goes on.
#
# **Loss of diversity:** within a class the garments grow alike. At $w = 5$ the boots are nearly one boot. Section 2.4 showed one reason, without any network: what is shared with other classes is driven out.
#
# Clipping alone does not bring the greys back. It must be there (on the outside), or the guess runs away. The literature has further cures. Imagen *thresholds dynamically*: it takes a high percentile of $|\hat x_0|$ in each image and, if that is above 1, clips at plus and minus it, and divides by it. Lin and others rescale the guided guess to the standard deviation of the conditional one. Or one guides less. Where?
#
# ### 3.4 Guidance in an interval
#
# With the mixture we saw that a mode is lost while the noise is strong. Near the data the class of an image has long been decided, and guidance has little left to do. Kynkäänniemi and others therefore guide in an *interval* of $t$ only, and find better images for less. Outside of it the weight is 1, the plain conditional model, and a step there costs one evaluation.

# %%
show_source(guidance.interval)

# %% [markdown]
# First class 2 of the mixture, with $w = 4$ for $t\le\frac12$ only. *Will the points keep the mode in the middle? And will they keep away from the other classes?*

# %%
fields = {"w = 1": 1.0, "w = 4": 4.0, "w = 4 for t ≤ 0.5": guidance.interval(4.0, 0.0, 0.5)}
made, axes = plots.panels(3, width=9.9, height=3.8)
held = {}
for ax, (name, scale) in zip(axes, fields.items(), strict=True):
    d = guidance.classifier_free(alone[2].denoiser(path), everything.denoiser(path), scale)
    ends = samplers.last(samplers.heun(d, path, noise, path.times(60)))
    held[name] = in_the_middle(ends), (log_class(ends, 0.0, 2).exp() < 0.8).double().mean().item()
    plots.density(lambda x: alone[2].log_prob(x.double()), extent=(-2.2, 2.2, -3.2, 1.2), ax=ax, title=name)
    ax.scatter(*ends[:400].T, s=6, color=style.GUIDED, linewidths=0)
claim("w = 4 everywhere: fewer than 10 % in the middle", held["w = 4"][0] < 0.1)
claim("only up to t = ½: more than a third", held["w = 4 for t ≤ 0.5"][0] > 1 / 3)
claim(
    "less than 80 % sure of their class: fewer than 1 % of the points of both, more than 5 % of those of w = 1",
    max(held[name][1] for name in list(fields)[1:]) < 0.01 and held["w = 1"][1] > 0.05,
)
made

# %% [markdown]
# The colour is the data's density, as before. Guided everywhere, the mode in the middle is all but empty. Guided only after the coarse decision has been made, both modes are there, and what overlapped with other classes is gone all the same. Now the garments, with $w = 8$:

# %%
evaluations = {}


def asking(name):
    """fashion-unet, counting how often it is asked."""

    def ask(x, t, **label):
        evaluations[name] = evaluations.get(name, 0) + 1
        return fashion(x, t, **label)

    return ask


# %%
rows = {}
for name, scale in {"w = 1": 1, "w = 8": 8.0, "w = 8, ¼ ≤ t ≤ ¾": guidance.interval(8.0, 0.25, 0.75)}.items():
    network = asking(name)
    d = clipped(guidance.classifier_free(lambda x, t, network=network: network(x, t, y=ten), network, scale))
    rows[name] = samplers.last(samplers.ddim(d, fashion.path, ten_starts["fashion"], fashion.path.times(12)))
claim(
    "12 steps: 12 evaluations with w = 1, 24 guided everywhere, 19 in the interval",
    list(evaluations.values()) == [12, 24, 19],
)
claim(
    "in the interval there is less than half as much white",
    white(rows["w = 8, ¼ ≤ t ≤ ¾"]) < 0.5 * white(rows["w = 8"]),
)
plots.rows(list(rows.values()), labels=list(rows))

# %% [markdown]
# Guided everywhere the garments are bleached. In the interval they are nearly as grey as without guidance, while prints and seams come out more strongly, sometimes too much so. Seven of twelve steps were guided: 19 evaluations.
#
# ### 3.5 Away from a label
#
# Extrapolation has a direction, and one may go the other way. Two uses.
#
# **"Not a 4": a weight below 0.** With $w = -1$ the guess $\hat x_0(x)-[\hat x_0(x, y)-\hat x_0(x)]$ goes away from the class. By section 2.4 this is at each $t$ the score of $p_t(x)\,p_t(y\mid x)^{-1}$.
#
# Is it what we mean by "not $y$"? No: that would be $p_t(x)\,[1-p_t(y\mid x)]$, which is 0 where the class is certain and $p_t(x)$ where it is impossible. The density of $w = -1$ is not 0 but $p_t(x)$ where the class is certain. And it *rewards* every further power of ten by which the class is unlikely, without end; its integral may be infinite.
#
# On the mixture we can draw both, because "not class 2" is the mixture of the other four Gaussians. *Where will the points of $w = -1$ end?*

# %%
others = toy.GaussianMixture(means[member != 2], variances[member != 2])
right_not = {"not 2, exactly": others.denoiser(path)}
negative = {
    f"w = −{w}": guidance.classifier_free(alone[2].denoiser(path), everything.denoiser(path), -w) for w in (1, 3)
}
made, axes = plots.panels(3, width=9.9, height=3.8)
away = {}
for ax, (name, d) in zip(axes, (right_not | negative).items(), strict=True):
    away[name] = samplers.last(samplers.heun(d, path, noise, path.times(60)))
    plots.density(lambda x: everything.log_prob(x.double()), extent=(-3.5, 3.5, -3.5, 3.5), ax=ax, title=name)
    ax.scatter(*away[name][:400].T, s=6, color=style.GUIDED, linewidths=0)
made

# %%
sure_of_2 = {name: (log_class(x, 0.0, 2).exp() > 0.5).double().mean().item() for name, x in away.items()}
far_out = {name: (everything.log_prob(x) < -6).double().mean().item() for name, x in away.items()}
claim(
    "exactly: fewer than 4 % look like class 2 (classes overlap), fewer than 2 % are far from all data, log p < −6",
    sure_of_2["not 2, exactly"] < 0.04 and far_out["not 2, exactly"] < 0.02,
)
claim("w = −1: more than twice as many look like class 2", sure_of_2["w = −1"] > 2 * sure_of_2["not 2, exactly"])
claim(
    "  more than 45 % are far from all data; with w = −3 more than 95 %",
    far_out["w = −1"] > 0.45 and far_out["w = −3"] > 0.95,
)

# %% [markdown]
# The colour is the density of all data. Left, the true "not class 2": the other four Gaussians. In the middle, $w = -1$: points are blown out of the data, away from class 2, and a few are *trapped* in the forbidden class. Where the class is certain, $p_t(y\mid x)$ is flat, and a flat function does not push. Right, $w = -3$: nearly everything has left the picture. A negative weight is not a "not".
#
# **"A 4, and not a 9": a negative label.** In the place of the null label stands another label. The direction is then that *from* 9 *to* 4, and the field is, at each $t$, the score of $p_t(x\mid4)\,\bigl[p_t(x\mid4)/p_t(x\mid9)\bigr]^{w-1}$: what tells the two apart is made stronger, and nothing else is asked for. (Its integral may be infinite even for $w>1$, as no $p_t(y\mid x)\le1$ bounds this ratio. This is what "negative prompts" do in programs that draw from text.) The same kernel does it; only its second argument changes. *What has a 4 that a 9 has not?*


# %%
def labelled(digit):
    return lambda x, t: digits(x, t, y=torch.full((len(x),), digit))


ways = {"4, w = 1": labelled(4), "4, w = 3": guidance.classifier_free(labelled(4), digits, 3.0)}
ways["4, not 9, w = 3"] = guidance.classifier_free(labelled(4), labelled(9), 3.0)
ways["no label"] = digits
ways["not a 4, w = −1"] = guidance.classifier_free(labelled(4), digits, -1.0)
fours = {
    name: samplers.last(samplers.ddim(clipped(d), path, ten_starts["digits"], path.times(12)))
    for name, d in ways.items()
}

# %%
with torch.no_grad():
    log_p = {name: shelf(x).log_softmax(1) for name, x in fours.items()}
margin = {name: (values[:, 4] - values[:, 9]).mean().item() for name, values in log_p.items()}
claim(
    "4, not 9: log p(4) − log p(9) of the classifier is larger on average than with the null label, w = 1 or 3",
    margin["4, not 9, w = 3"] > max(margin["4, w = 1"], margin["4, w = 3"]),
)
count = {name: (values.argmax(1) == 4).sum() for name, values in log_p.items()}
claim(
    "with no label some are 4s to the classifier, with 'not a 4' none",
    count["no label"] > count["not a 4, w = −1"] == 0,
)
plots.rows(list(fours.values()), labels=list(fours))

# %% [markdown]
# All rows start from the same noise. With $w = 3$ most 4s change little, and the doubtful ones at the right end become clear. With "not a 9" in the place of the null label they open at the top and get long crossing bars: that is what a 9 has not. Without a label some are 4s. In the last row they have become other digits, and nothing is blown apart: the classes of digits hardly overlap, and the guess is clipped. Ten digits prove little, though, and the mixture has shown how the crude "not" can fail.
#
# ## 4. Recap
#
# - Bayes: the conditional score is the model's score plus the gradient of $\log p_t(y\mid x)$, a classifier *of noisy data*. It averages the clean classifier over all clean points that may be behind $x$.
# - In $\hat x_0$ this is $+\,w\frac{\sigma^2}\alpha\nabla\log p_t(y\mid x)$, in $\epsilon$ it is $-\,w\,\sigma\,\nabla\log p_t(y\mid x)$, taken at $x_t$ and $t$.
# - Classifier-free: $(1-w)\,\epsilon(x)+w\,\epsilon(x, y)$. One network, labels dropped now and then, two evaluations a step. $w_{\text{slide}} = 1+w_{\text{algorithm}}$; for $w_{\text{slide}}>1$ it is extrapolation.
# - Guidance commutes with the parameterisation, as its factors sum to 1. It does not commute with clipping.
# - At each $t$ the guided field is the score of $p_t(x)\,p_t(y\mid x)^w$. It is not a sampler of $p(x)\,p(y\mid x)^w$: ODE and SDE give two other distributions. In our examples with $w>1$ they are narrower, and the ODE's is pushed away from the other classes.
# - On images a larger weight buys class accuracy, and pays with recall and greys. On our small models $w = 1$ has about the smallest Fréchet distance.
# - An interval of $t$ costs less and keeps modes. A negative weight is not a "not".
#
# **Pitfalls**
#
# - A classifier that has not seen noise; a classifier that judges what it has guided.
# - $\sigma$ dropped from the classifier's gradient: the weight becomes $w/\sigma(t)$.
# - A weight from one paper in the code of another: off by one.
# - Gradient at one point, time of another. Guidance on some channels. Clipping inside.
# - A network trained without dropping labels has a null label all the same, and guides from it without an error.
# - A guided step counts two evaluations.
#
# **Homework:** [exercises](../homework/hw5_guidance_sampling.ipynb) on guidance and on sampling in few steps, after [notebook 07](07_fast_sampling.ipynb).
#
# **References**
#
# - Dhariwal, Nichol: [*Diffusion Models Beat GANs on Image Synthesis*](https://arxiv.org/abs/2105.05233), 2021. Classifier guidance, with a classifier trained on noise.
# - Ho, Salimans: [*Classifier-Free Diffusion Guidance*](https://arxiv.org/abs/2207.12598), 2022. The lecture's Algorithms 1 and 2.
# - Saharia and others: [*Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding*](https://arxiv.org/abs/2205.11487), 2022. Large weights, saturation, dynamic thresholding.
# - Lin, Liu, Li, Yang: [*Common Diffusion Noise Schedules and Sample Steps are Flawed*](https://arxiv.org/abs/2305.08891), 2024. Section 3.4: the guided guess rescaled.
# - Kynkäänniemi, Aittala, Karras, Laine, Aila, Lehtinen: [*Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models*](https://arxiv.org/abs/2404.07724), 2024.
# - Bradley, Nakkiran: [*Classifier-Free Guidance is a Predictor-Corrector*](https://arxiv.org/abs/2408.09000), 2024. What guided ODEs and SDEs draw, and that it differs; section 3 has our Gaussians with $a = 1$, $b = 2$.
# - Chidambaram, Gatmiry, Chen, Lee, Lu: [*What does guidance do? A fine-grained analysis in a simple setting*](https://arxiv.org/abs/2409.13074), 2024. Samples are driven to the edge of the class.
# - Du and others: [*Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC*](https://arxiv.org/abs/2302.11552), 2023. Products of diffused densities, and what it takes to sample from the product.
