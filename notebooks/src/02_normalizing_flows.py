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
# # Normalizing flows: invertible maps and exact likelihoods
#
# A flow bends a simple distribution into a complicated one, and can always bend it back. At the end of this notebook you will be able to
#
# - derive the density of $x = f(z)$ from that of $z$, and draw where the determinant comes from;
# - add up the log-determinants of a chain of layers, with every sign where it belongs, and test such code so that a wrong sign is found;
# - build layers that are invertible by design, and say what each direction costs;
# - train a flow by maximum likelihood, and draw its density;
# - measure images in bits per dimension, without cheating;
# - say what "invertible" costs, and why adding noise removes it.
#
# **Time:** two to three hours to read, with pen and paper; it runs in under a minute on a processor.
# **It builds on** notebook 01: maximum likelihood, the bound of the VAE, a GAN's generator.
# **Symbols** are those of the lecture; the README's [symbol ledger](../README.md#symbols) lists the main ones.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import lzma
import math
import time

import sympy
import torch
from matplotlib.collections import PolyCollection
from scipy import ndimage, optimize, stats
from torch.utils.flop_counter import FlopCounterMode

from dgm_course import checkpoints, data, flows, nets, toy, training
from dgm_course.checks import claim, show_source
from dgm_course.likelihood import bits_per_dim
from dgm_course.viz import plots, style, widgets

g = torch.Generator().manual_seed(0)  # where nearly all chance in this notebook comes from
digits, labels = data.images(data.load("mnist", "test"))

# %% [markdown]
# A VAE gives a bound on the likelihood, a GAN gives none. A flow gives the likelihood itself (for grey levels a bound: section 4.1). It starts from noise $z_0$ of a known density $\pi_0$, as a rule $\mathcal N(0, I)$,
# and applies a transformation function, again and again:
#
# $$x = z_K = f_K\circ f_{K-1}\circ\dots\circ f_1(z_0).$$
#
# The transformations are deterministic and *invertible*: from $x$ one can compute the $z_0$ that it came from. That is what makes the density of $x$ computable, and it is what the whole notebook is about.
#
# ## 1. Change of variables
#
# ### 1.1 One dimension
#
# Let $z$ have the density $\pi_0$, and let $x = f(z)$ with an invertible, differentiable $f$ whose slope is nowhere 0. What is the density $p$ of $x$?
#
# A density is not a probability. An *area* under it is one. Take the $z$ in a narrow strip of width $dz$: they have the probability $\pi_0(z)\,dz$. The map carries them to a strip of width $dx = |f'(z)|\,dz$, and not one of them is lost. So
# the two areas are equal, $p(x)\,dx = \pi_0(z)\,dz$, and
#
# $$p(x) = \frac{\pi_0(z)}{|f'(z)|},\qquad z = f^{-1}(x).$$
#
# Where the map stretches, the same probability is spread over a wider strip, and the density falls.
#
# **Proof, without "narrow".** Let $\Phi$ be the cumulative distribution of $z$, and let $f$ increase. Then $P(f(z)\le x) = P(z\le f^{-1}(x)) = \Phi(f^{-1}(x))$. The density is the derivative of this: $p(x) = \pi_0(z)\,(f^{-1})'(x)$ with $z = f^{-1}(x)$. As $f(f^{-1}(x)) = x$, the chain rule gives
# $f'(z)\,(f^{-1})'(x) = 1$, so $(f^{-1})'(x) = 1/f'(z)$. If $f$ decreases, the inequality turns round: $P(f(z)\le x) = 1-\Phi(f^{-1}(x))$, whose derivative is $-\pi_0(z)\,(f^{-1})'(x)$. Now $(f^{-1})'$ is negative, so the minus makes it positive. Both cases together need the absolute value. ∎

# %%
z = sympy.symbols("z", real=True)
x = sympy.symbols("x", positive=True)
cdf = (1 + sympy.erf(z / sympy.sqrt(2))) / 2  # of N(0, 1)
pdf = sympy.exp(-(z**2) / 2) / sympy.sqrt(2 * sympy.pi)
claim("the derivative of Φ is π₀", sympy.simplify(cdf.diff(z) - pdf) == 0)
# f, its inverse g, and P(f(z) ≤ x)
rising = sympy.exp(z), sympy.log(x), cdf.subs(z, sympy.log(x))
falling = 1 - 2 * z, (1 - x) / 2, 1 - cdf.subs(z, (1 - x) / 2)
for name, (f, back, probability) in {"f = eᶻ": rising, "f = 1 − 2z": falling}.items():
    rule = (pdf / sympy.Abs(f.diff(z))).subs(z, back)
    claim(f"{name}: the derivative of P(f(z) ≤ x) is π₀ / |f′|", sympy.simplify(probability.diff(x) - rule) == 0)
two = (pdf / rising[0].diff(z)).subs(z, rising[1]).subs(x, 2.0)
claim("f = eᶻ gives what SciPy calls the log-normal density", abs(float(two) - stats.lognorm(1).pdf(2.0)) < 1e-12)

# %% [markdown]
# Now look at it. The map is $f(z) = z + \frac{a-1}{2}\tanh 2z$, whose slope at 0 is $a$ and far out 1. Below it lies the density of $z$, to its left the density of $x$, turned by a quarter. Two strips are marked. *Before you move $a$:* for which $a$ will the density of $x$ have two humps? And where will it be high if $a$ is small?


# %%
def bent(z, a):
    return z + (a - 1) / 2 * torch.tanh(2 * z)


def bent_slope(z, a):
    return 1 + (a - 1) / torch.cosh(2 * z) ** 2


line = torch.linspace(-4, 4, 1601, dtype=torch.float64)
of_z = torch.distributions.Normal(0.0, 1.0).log_prob(line).exp()
strips = {style.MODEL: (line >= -0.3) & (line <= 0.3), style.GUIDED: (line >= 0.8) & (line <= 1.4)}
for a in (0.4, 1.0, 3.0, 8.0):
    x, of_x = bent(line, a), of_z / bent_slope(line, a)
    same = [abs(torch.trapezoid(of_x[s], x[s]) - torch.trapezoid(of_z[s], line[s])) < 1e-4 for s in strips.values()]
    claim(f"a = {a}: both strips keep their area", all(same))


# %%
def draw_strips(a):
    x, of_x = bent(line, a), of_z / bent_slope(line, a)
    made, (left, middle, empty, below) = plots.panels(2, 2, width=6.2, height=5.2)
    for color, s in strips.items():
        middle.fill_between(line[s], x[s], -6, color=color, alpha=0.18, linewidth=0)  # down to the strip of z
        middle.fill_betweenx(x[s], -4, line[s], color=color, alpha=0.18, linewidth=0)  # and across to that of x
        below.fill_between(line[s], of_z[s], color=color, alpha=0.6, linewidth=0)
        left.fill_betweenx(x[s], of_x[s], color=color, alpha=0.6, linewidth=0)
    middle.plot(line, x, color=style.EXACT), below.plot(line, of_z), left.plot(of_x, x), empty.set_axis_off()
    middle.set(xlabel="z", ylabel="x = f(z)", xlim=(-4, 4), ylim=(-6, 6))
    below.set(xlabel="z", ylabel="density of z", xlim=(-4, 4), ylim=(0, 0.45))
    left.set(xlabel="density of x", ylabel="x", xlim=(1.05, 0), ylim=(-6, 6))
    return made


widgets.explore(draw_strips, a=([0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0], 5.0))

# %% [markdown]
# The strips on the left have the area of those below, whatever $a$ is. Where the curve is steep the strip of $x$ is wide and low; where it is flat ($a = 0.4$), the same probability is squeezed into a narrow peak. A stretch in the middle tears a valley into the density, with two humps beside it, once $a > \frac87$. (Near 0, $\log p$ is
# $\bigl(4\frac{a-1}{a}-\frac12\bigr)z^2$ plus a constant: the stretch against the Gaussian.) Note what it does *not* do: at no $a$ does the valley reach 0. Section 5 comes back to this.


# %%
def humps(a):
    of_x = of_z / bent_slope(line, a)
    return int(((of_x[1:-1] > of_x[:-2]) & (of_x[1:-1] > of_x[2:])).sum())


claim(
    "one hump for a = 1.1 and below, two for a = 1.2 and above",
    [humps(a) for a in (0.4, 1, 1.1, 1.2, 3, 8)] == [1, 1, 1, 2, 2, 2],
)

# %% [markdown]
# ### 1.2 Two dimensions, and the area
#
# In the plane a strip becomes a small square with sides $dz_1$ and $dz_2$. Near a point, a smooth map is nearly linear: it acts like its Jacobian
#
# $$J = \frac{df}{dz} = \begin{bmatrix}\frac{\partial f_1}{\partial z_1} & \frac{\partial f_1}{\partial z_2}\\[2pt] \frac{\partial f_2}{\partial z_1} & \frac{\partial f_2}{\partial z_2}\end{bmatrix}.$$
#
# The side $(dz_1, 0)$ goes to the first column times $dz_1$, the side $(0, dz_2)$ to the second column times $dz_2$. So the square becomes a parallelogram. Its area, computed from its corners, is $|\det J|\,dz_1dz_2$:

# %%
a, b, c, d = sympy.symbols("a b c d", real=True)
corners = [(0, 0), (a, c), (a + b, c + d), (b, d)]  # of the parallelogram between the columns (a, c) and (b, d)
shoelace = sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(corners, corners[1:] + corners[:1], strict=True)) / 2
claim("the signed area is the determinant", sympy.expand(shoelace - sympy.Matrix([[a, b], [c, d]]).det()) == 0)

# %% [markdown]
# The rest is as before. The probability in the square and in the parallelogram is the same, so
#
# $$p(x) = \frac{\pi_0(z)}{|\det J|},\qquad\text{and in any dimension}\qquad \log p(x) = \log\pi_0(z) - \log\left|\det\frac{df}{dz}\right|.$$
#
# In $D$ dimensions $|\det J|$ is the factor by which the map changes *volume*. *(The slide writes $J$ with $m$ functions of $n$ variables. A determinant asks for $m = n$: for a flow, $z$ and $x$ have the same dimension.)*
#
# An example that one can draw: bend the plane like a strip of rubber, so that horizontal lines become arcs of a circle with radius $1/k - z_2$,
#
# $$f(z) = \Bigl(\bigl(\tfrac1k - z_2\bigr)\sin kz_1,\ \ \tfrac1k-\bigl(\tfrac1k-z_2\bigr)\cos kz_1\Bigr).$$
#
# *What do you expect:* on which side of the strip does the area grow, and by how much?


# %%
def bend(z, k):
    radius = 1 / k - z[..., 1]
    return torch.stack([radius * torch.sin(k * z[..., 0]), 1 / k - radius * torch.cos(k * z[..., 0])], -1)


k, z1, z2 = sympy.symbols("k z_1 z_2", positive=True)
bent_z = sympy.Matrix([(1 / k - z2) * sympy.sin(k * z1), 1 / k - (1 / k - z2) * sympy.cos(k * z1)])
claim("det J = 1 − k z₂", sympy.simplify(bent_z.jacobian([z1, z2]).det() - (1 - k * z2)) == 0)
points = 2 * torch.rand(100, 2, generator=g, dtype=torch.float64) - 1
jacobians = torch.func.vmap(torch.func.jacrev(lambda z: bend(z, 0.6)))(points)  # (100, 2, 2), by autograd
claim("autograd agrees, at 100 points, to 1e-12", (jacobians.det() - (1 - 0.6 * points[:, 1])).abs().max() < 1e-12)

# %% [markdown]
# Now the picture. On the left a square of 25 cells, evenly filled; on the right the same cells, bent, and darker where the density is higher. The orange parallelogram is what $J$ makes of the orange cell.

# %%
side = torch.linspace(0, 1, 9)
round_it = torch.cat([side, torch.ones(9), 1 - side, torch.zeros(9)])  # first coordinate of a walk round a square
walk = torch.stack([round_it, round_it.roll(9)], 1)
cells = torch.cartesian_prod(*[torch.linspace(-1, 0.6, 5)] * 2)[:, None] + 0.4 * walk  # (25, 36, 2)
middles, marked = cells.mean(1), 20  # of all cells, and which one is marked


# %%
def draw_bend(k):
    made, axes = plots.panels(2, width=7.2, height=3.2)
    J = torch.func.jacrev(lambda z: bend(z, k))(middles[marked])
    outlines = cells[marked], bend(middles[marked], k) + 0.4 * (walk - 0.5) @ J.T
    dets = torch.ones(25), 1 - k * middles[:, 1]
    for ax, shapes, outline, det, name in zip(axes, (cells, bend(cells, k)), outlines, dets, "zx", strict=True):
        drawn = PolyCollection(shapes, array=1 / det, cmap=style.DENSITY, edgecolors="#777777", linewidths=0.6)
        drawn.set_clim(0, 3)
        ax.add_collection(drawn)
        ax.plot(*outline.T, color=style.MODEL)
        ax.set(xlim=(-1.9, 1.9), ylim=(-1.3, 1.3), aspect="equal", title=f"marked area: {0.16 * det[marked]:.2f}")
        ax.set(xlabel=f"first coordinate of {name}", ylabel=f"second coordinate of {name}")
    return made


widgets.explore(draw_bend, k=([0.05, 0.2, 0.4, 0.6, 0.8, 0.9], 0.6))

# %% [markdown]
# The area grows by the factor $1 - kz_2$: the outer side, $z_2 = -1$, by $1+k$, and the inner one by $1-k$, so it shrinks and fills up. Strictly, the parallelogram is the image of the cell only in the limit of small cells: it follows the cell's middle, and at $k = 0.9$ one sees that it misses the corners a little. (The *area* is the cell's exactly, as this determinant is linear in $z_2$.)
#
# At $k = 1$ the whole inner edge $z_2 = 1$ shrinks to one point, the centre of the circle, and the determinant is 0 there. For $k > 1$ the same happens to the line $z_2 = 1/k$, and what lies beyond it comes out turned over, on the other side; from $k = \pi/2$ on, whole areas lie on top of each other. Many $z$ have the same $x$, and the formula above does not hold any more.
#
# **By experiment.** 400,000 points, evenly spread over the square $[-1, 1]^2$, so with $\pi_0 = \frac14$, are bent. The share that falls into a small disc, divided by the disc's area, must be the density. The test must be able to fail: a formula that *multiplies* by the determinant has to be found.

# %%
many = bend(2 * torch.rand(400_000, 2, generator=g) - 1, 0.6)
place = torch.tensor([0.3, -0.7])
inside = (many - bend(place, 0.6)).norm(dim=1) < 0.1
share, error = inside.double().mean(), inside.double().std() / len(many) ** 0.5
det = 1 - 0.6 * place[1]
disc = math.pi * 0.1**2
claim(
    "the share in the disc is (1/4) / |det J| × its area, within 4 standard errors",
    abs(share - disc / 4 / det) < 4 * error,
)
claim("(1/4) × |det J| would be found out", abs(share - disc / 4 * det) > 20 * error)

# %% [markdown]
# ### 1.3 A chain of transforms
#
# One bend is not enough for a digit. Chain $K$ of them: $z_i = f_i(z_{i-1})$, and $x = z_K$. Write $\pi_i$ for the density of $z_i$. Each step is a change of variables of its own:
#
# $$\log\pi_i(z_i) = \log\pi_{i-1}(z_{i-1}) - \log\left|\det\frac{df_i}{dz_{i-1}}\right|.$$
#
# *(The slide writes $p_i$ in one line and $\pi_i$ in the next for the same density.)* Start at $x = z_K$ and put one line into the other until $\pi_0$ is reached:
#
# $$\begin{aligned}
# \log p(x) = \log\pi_K(z_K) &= \log\pi_{K-1}(z_{K-1}) - \log\left|\det\frac{df_K}{dz_{K-1}}\right|\\
# &= \log\pi_{K-2}(z_{K-2}) - \log\left|\det\frac{df_{K-1}}{dz_{K-2}}\right| - \log\left|\det\frac{df_K}{dz_{K-1}}\right|\\
# &= \dots = \log\pi_0(z_0) - \sum_{i=1}^K\log\left|\det\frac{df_i}{dz_{i-1}}\right|.
# \end{aligned}$$
#
# Each determinant is taken at *its own* point $z_{i-1}$. The sum says once more what the chain rule says: the Jacobian of the whole map is the product of those of its layers, and the determinant of a product is the product of the determinants.

# %%
A, B = (sympy.Matrix(2, 2, sympy.symbols(f"{name}:4")) for name in "ab")
claim("det(AB) = det A · det B", sympy.expand((A * B).det() - A.det() * B.det()) == 0)

# %% [markdown]
# We check the slide's line, layer by layer, in a case where every $\pi_i$ is known. If $z_0$ is Gaussian and all layers are linear, then every $z_i$ is Gaussian: a layer $z_i = W z_{i-1}+b$ turns the mean $m$ into $Wm+b$, and the covariance $C$ into $WCW^\top$. PyTorch's own Gaussian is the judge. (`ActNorm` scales and shifts each coordinate,
# `InvertibleConv` multiplies by a matrix; section 2.3 has both.)


# %%
def shaken(layer, by=0.5):
    """The same layer in float64 with random weights, so that no test runs on zeros."""
    with torch.no_grad():
        for weight in layer.double().parameters():
            weight.add_(by * torch.randn(weight.shape, generator=g))
    return layer


linear = [shaken(layer) for layer in (flows.ActNorm(3), flows.InvertibleConv(3, g), flows.ActNorm(3))]
zi = torch.randn(5, 3, generator=g, dtype=torch.float64)
mean, cov = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
log_pi = torch.distributions.MultivariateNormal(mean, cov).log_prob(zi)
for i, layer in enumerate(linear, start=1):
    W, b = (layer.weight, 0) if i == 2 else (layer.log_scale.exp().diag(), layer.shift)
    zi, log_det = layer(zi)
    mean, cov = W @ mean + b, W @ cov @ W.T
    log_pi = log_pi - log_det
    exact = torch.distributions.MultivariateNormal(mean, (cov + cov.T) / 2).log_prob(zi)
    claim(f"after layer {i}: the slide's sum is the exact log π_{i}, to 1e-10", (log_pi - exact).abs().max() < 1e-10)

# %% [markdown]
# And now with layers that are not linear, against autograd: after each layer, the sum so far must be the log-determinant of the whole Jacobian from $z_0$ to $z_i$, computed without any formula. (What the layers do is the topic of section 2.)


# %%
def full_log_det(direction, values):
    """log|det| of the whole Jacobian matrix by autograd, sample by sample."""
    rows = []
    for value in values:
        # [0] is the result without its log-determinant, and the second [0] the only sample
        J = torch.autograd.functional.jacobian(lambda one: direction(one[None])[0][0], value)
        rows.append(J.reshape(value.numel(), value.numel()))
    return torch.linalg.slogdet(torch.stack(rows)).logabsdet


def coupling(dim, parity=0):
    mask = ((torch.arange(dim) + parity) % 2).double()
    return shaken(flows.Coupling(mask, nets.perceptron(dim, 16, 2 * dim)))


# %%
mixed = [coupling(4), shaken(flows.ActNorm(4)), shaken(flows.Planar(4, g)), coupling(4, 1)]
z0 = torch.randn(3, 4, generator=g, dtype=torch.float64)
for i in range(1, 5):
    so_far = flows.Composed(*mixed[:i])
    claim(
        f"layers 1 to {i}: sum of log-determinants = autograd, to 1e-10",
        (so_far(z0)[1] - full_log_det(so_far, z0)).abs().max() < 1e-10,
    )

# %% [markdown]
# ### 1.4 One convention for every sign
#
# The formula has a minus, papers have a plus, and both are right. The slide's determinant is that of $f$, from noise to data. Papers that start from the data write $\log p(x) = \log\pi_0(z) + \log\left|\det\frac{dz}{dx}\right|$, with the inverse map. As $\frac{dz}{dx}$ is the inverse matrix of $\frac{dx}{dz}$, its log-determinant is the same number with the other sign.
#
# In code this is a trap: a function returns a number called `log_det`, and one has to know of which map. The course has one rule.
#
# > **Each direction returns its result and the log-determinant of the map that it computes itself.**
# > `forward(z)` gives $x$ and $\log|\det dx/dz|$; `inverse(x)` gives $z$ and $\log|\det dz/dx|$.
#
# Two things follow: at one point the two numbers sum to 0, and $\log p(x)$ is $\log\pi_0(z)$ *plus* what `inverse` returns. The log-determinant is one number for each sample, of shape (B,). Apart from a check of the shape, the density of a flow is two lines (`total` sums all values of one sample):

# %%
show_source(flows.Flow.log_prob)

# %% [markdown]
# > **Spot the bug.** In a public library of flows, one layer returned the log-determinant of `forward` with the wrong sign. Below are two wrong versions of our layers: in the first, `inverse` has the sign of `forward`. In the second, *both* signs are wrong. Which of these three checks find which?
# > (a) The two log-determinants sum to 0. (b) The density, which calls `inverse`, integrates to 1. (c) The log-determinant of `forward` agrees with autograd.


# %%
class OneWrong(flows.Transform):
    """`inverse` returns the log-determinant of the other direction."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, z):
        return self.layer(z)

    def inverse(self, x):
        z, log_det = self.layer.inverse(x)
        return z, -log_det


class BothWrong(OneWrong):
    def forward(self, z):
        x, log_det = self.layer(z)
        return x, -log_det


# %%
wide = torch.linspace(-20, 20, 4001, dtype=torch.float64)


def three_checks(layer):
    """Which of (a) the sum, (b) the integral, (c) autograd this layer passes."""
    z = torch.randn(4, 1, generator=g, dtype=torch.float64)
    x, log_det = layer(z)
    density = flows.Flow(layer, (1,)).log_prob(wide[:, None]).exp()
    return [
        bool((log_det + layer.inverse(x)[1]).abs().max() < 1e-10),
        bool(abs(torch.trapezoid(density, wide) - 1) < 1e-3),
        bool((log_det - full_log_det(layer, z)).abs().max() < 1e-10),
    ]


# %%
double = flows.ActNorm(1).double()
double.log_scale.data.fill_(math.log(2))  # x = 2z
claim("the right layer passes (a), (b) and (c)", three_checks(double) == [True, True, True])
claim(
    "one sign wrong: (a) and (b) find it, (c) does not look there",
    three_checks(OneWrong(double)) == [False, False, True],
)
claim("both signs wrong: (a) is content; (b) and (c) find it", three_checks(BothWrong(double)) == [True, False, False])
wrong_integral = torch.trapezoid(flows.Flow(BothWrong(double), (1,)).log_prob(wide[:, None]).exp(), wide)
claim("for x = 2z the wrong density integrates to 2 / ½ = 4 in place of 1", abs(wrong_integral - 4) < 1e-3)

# %% [markdown]
# So the check that everyone writes first, (a), misses a sign that is wrong on both sides. (b) looks at `inverse` only and (c), as written, at `forward` only. Test all three, and autograd in both directions.
#
# What would training do with the wrong sign? Take data from $\mathcal N(0, 1)$ and the flow $x = e^s z$, and look at the average log-likelihood as $s$ moves. That of the noise $z = xe^{-s}$ is $-\frac12\log2\pi-\frac12e^{-2s}$, as $\mathbb E[x^2] = 1$. The right sign then subtracts $s$, the wrong one adds it. *Draw both curves before you look.* No density can do better on average than the true one, whose average is minus the entropy of the data, $-\frac12\log(2\pi e) = -1.42$ nats.

# %%
s = torch.linspace(-1, 3, 81, dtype=torch.float64)
of_noise = -0.5 * math.log(2 * math.pi) - 0.5 * (-2 * s).exp()  # the average of log N(z; 0, 1), z = x·e^(−s), E x² = 1
average = {
    "right: − s": of_noise - s,
    "wrong: + s": of_noise + s,
    "−entropy": torch.full_like(s, -0.5 * math.log(2 * math.pi * math.e)),
}
claim(
    "right: the best s is 0, and there it is minus the entropy",
    s[average["right: − s"].argmax()].abs() < 1e-9 and abs(average["right: − s"].max() - average["−entropy"][0]) < 1e-9,
)
claim(
    "wrong: it rises all the way, above what any density can reach",
    (average["wrong: + s"].diff() > 0).all() and average["wrong: + s"][-1] > average["−entropy"][0],
)
plots.curves(s, average, "s", "average log-likelihood (nats)", colors={"−entropy": style.EXACT})

# %% [markdown]
# The right curve has its top at the true scale. The wrong one rises for ever: training would blow the scale up, and the log would show a likelihood that gets better and better. **A likelihood that is too good to be true usually is.** Here it crosses the line that no density can cross.

# %% [markdown]
# ## 2. Layers
#
# Constrain $f$ so that it is easy to invert and its determinant easy to compute, says the slide. Why constrain it at all? For any network one could ask autograd for the Jacobian, as we did above. For a digit that is a matrix of $784\times784$: one backward pass for each of its 784 rows, and about $784^3/3$, some 160 million, multiplications for the determinant, for each image and each step of training. And nothing would make such a network invertible. So we build layers
# whose determinant can be read off without the matrix.
#
# ### 2.1 The affine coupling
#
# RealNVP cuts the values of $z$ in two parts, $z_a$ and $z_b$. (The slide's figure calls them $x_1$ and $x_2$.) The first part stays. It also says how the second one is scaled and shifted:
#
# $$x_a = z_a,\qquad x_b = z_b\odot e^{s(z_a)} + t(z_a).$$
#
# $s$ and $t$ are neural networks, and $\odot$ multiplies value by value.
#
# **It is invertible**, whatever the networks are. As $x_a = z_a$, the way back knows what the networks saw. It calls them again, in the same direction, and undoes a shift and a scale:
#
# $$z_a = x_a,\qquad z_b = \bigl(x_b - t(x_a)\bigr)\odot e^{-s(x_a)}.$$
#
# **Its determinant is a sum.** Order the values so that $z_a$ comes first. Then
#
# $$J = \begin{bmatrix} I & 0\\[2pt] \dfrac{\partial x_b}{\partial z_a} & \mathrm{diag}\bigl(e^{s(z_a)}\bigr)\end{bmatrix},\qquad \log|\det J| = \sum_i s_i(z_a).$$
#
# The block at the lower left holds the derivatives of the networks, and it may be anything: the determinant of a triangular matrix is the product of its diagonal. Sorting the values reorders rows *and* columns in the same way. Each of the two may change the sign of the determinant; together they leave it.

# %%
za, zb = sympy.symbols("z_a z_b", real=True)
S, T = sympy.Function("s")(za), sympy.Function("t")(za)
forward = sympy.Matrix([za, zb * sympy.exp(S) + T])
claim("det J = e^s for any functions s and t", sympy.simplify(forward.jacobian([za, zb]).det() - sympy.exp(S)) == 0)
claim("(x_b − t) e^(−s) gives z_b back", sympy.simplify((forward[1] - T) * sympy.exp(-S) - zb) == 0)

# %% [markdown]
# In code a mask $m$ says what stays: 1 for $z_a$, 0 for $z_b$. The network gets $m\odot z$, and its outputs count where the mask is 0. (`affine` and `affine_inverse` are the two formulas above, each with its sum of $\pm s$; `net` returns raw $s$ and $t$ in one tensor.)

# %%
show_source(flows.Coupling)

# %% [markdown]
# (`limit` bends $s$ so that it stays within $\pm\log 1000$: one wild output of the network must not overflow the exponential.)
#
# The figure shows Jacobians of layers on six numbers, whose even places (counted from 0) stay; darker means larger, and white is 0. *Where do you expect zeros in the first one? And what is left of them after three couplings, which keep the even, the odd and the even places?*

# %%
first, second = coupling(6, 1), coupling(6, 0)
point = torch.randn(6, generator=g, dtype=torch.float64)
J = torch.autograd.functional.jacobian(lambda z: first(z[None])[0][0], point)
all_three = flows.Composed(first, second, coupling(6, 1))
JJJ = torch.autograd.functional.jacobian(lambda z: all_three(z[None])[0][0], point)
order = [0, 2, 4, 1, 3, 5]  # what stays comes first
made, axes = plots.panels(3, width=7.2, height=2.8)
titles = ["one coupling", "the same, sorted", "three couplings"]
for ax, matrix, title in zip(axes, [J, J[order][:, order], JJJ], titles, strict=True):
    ax.imshow(matrix.abs().sqrt(), cmap=style.DENSITY, vmin=0, vmax=1.2)
    ax.set(title=title, xlabel="place of z", ylabel="place of x", xticks=range(6), yticks=range(6))
    names = order if title == "the same, sorted" else range(6)
    ax.set_xticklabels(names), ax.set_yticklabels(names)
    ax.grid(False)
made

# %%
claim("sorted, nothing stands above the diagonal", J[order][:, order].triu(1).abs().max() == 0)
claim("sorting rows and columns alike leaves the determinant", abs(J[order][:, order].det() - J.det()) < 1e-12)
z = torch.randn(3, 6, generator=g, dtype=torch.float64)
claim(
    "three couplings: the sum of s is log|det| of the full matrix, to 1e-10",
    (all_three(z)[1] - full_log_det(all_three, z)).abs().max() < 1e-10,
)
claim("three couplings: no entry of the matrix is 0", bool((JJJ != 0).all()))
claim("three couplings: there and back, to 1e-10", (all_three.inverse(all_three(z)[0])[0] - z).abs().max() < 1e-10)

# %% [markdown]
# One coupling: the rows 0, 2, 4 have a 1 and nothing else, as these values stay; the others depend on themselves and on what stays. Sorted, it is triangular. After three couplings every number depends on every other, no sorting helps, and yet the log-determinant is still a sum of nine numbers, three for each coupling. This is the trick of flows: *each layer* has a simple Jacobian; their product has not.
#
# > **Spot the bug.** A course tested its coupling layer like this: send zeros through it, send the result back, compare. What does this test let pass? (Two hints: flows are often started as the identity, with the last layer of $s$ and $t$ at zero. And what is $0\cdot e^s$?)


# %%
class Broken(flows.Coupling):
    """Undoes the shift, and forgets the scale."""

    def inverse(self, x):
        _, shift = self.parameters_of(self.mask * x)
        return flows.affine_inverse(x, torch.zeros_like(shift), shift)


def comes_back(layer, z):
    return bool((layer.inverse(layer(z)[0])[0] - z).abs().max() < 1e-10)


# %%
broken = Broken(first.mask, nets.perceptron(6, 16, 12)).double()
for weight in broken.net[-1].parameters():
    torch.nn.init.zeros_(weight)
zeros, random = torch.zeros(1, 6, dtype=torch.float64), torch.randn(5, 6, generator=g, dtype=torch.float64)
claim(
    "fresh, the broken layer passes with zeros, and with random numbers",
    comes_back(broken, zeros) and comes_back(broken, random),
)
shaken(broken)
claim("with random weights and zeros it still passes", comes_back(broken, zeros))
claim("with random weights and random numbers it fails", not comes_back(broken, random))
claim("the right layer passes that, too", comes_back(first, random))

# %% [markdown]
# Two kinds of errors get through. With zeros, $z_b\odot e^s$ is 0 whatever $s$ is: a way back that forgets the scale, or has it the wrong way round, gives 0 all the same. And with fresh weights $s = t = 0$: every layer does nothing, right or wrong. So a test of a flow needs random inputs *and* random weights. That is what `shaken` is for.

# %% [markdown]
# ### 2.2 Masks and permutations
#
# One coupling leaves half of the values as they are. The next one must keep the other half. There are two ways to say it: swap the mask, or keep the mask and permute the values in between. A permutation only moves values: its determinant is $\pm1$, so its log-determinant is 0.
#
# For images RealNVP has two kinds of masks. *Checkerboard*: a pixel stays if row + column is even. *Channels*: half of the channels stay (section 2.4 makes channels of pixels). Below, what changes is grey; the network has to say from the rest how it is scaled and shifted. *For which mask is that easier?*

# %%
permute = flows.Permutation([2, 0, 3, 1])
matrix = torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]]
z = torch.randn(3, 4, generator=g, dtype=torch.float64)
claim("a permutation is a matrix with |det| = 1", torch.equal(permute(z)[0], z @ matrix.T) and matrix.det().abs() == 1)
claim("and its log-determinant is 0", (permute(z)[1] == 0).all())
seven = digits[labels == 7][:1]
masks = [flows.checkerboard(28, 28, i)[None] for i in (0, 1)]
masks += [flows.unsqueeze(flows.channel_mask(4, i).expand(1, 4, 14, 14)) for i in (0, 1)]
names = ["all", "checkerboard", "the other one", "2 of 4 channels", "the other two"]
plots.grid(torch.cat([seven] + [m * seven for m in masks]), labels=names, columns=5, scale=1.6)

# %% [markdown]
# Each grey pixel of a checkerboard has four neighbours that are seen; with channels, two (above and below), as the first two channels are every other row. In an image, neighbours say most of what there is to say about a pixel.
#
# > **Spot the bug.** Two public implementations split $z$ in even and odd places, transformed one part, and put the parts together with `torch.cat`. All worked well in the plane. What happens in four dimensions?


# %%
def halves(z, s=0.5, t=1.0):
    even, odd = z[:, ::2], z[:, 1::2]
    return torch.cat([even, odd * math.exp(s) + t], dim=1)


def halves_back(x, s=0.5, t=1.0):
    even, odd = x[:, ::2], x[:, 1::2]
    return torch.cat([even, (odd - t) * math.exp(-s)], dim=1)


for dim, works in ((2, True), (4, False)):
    z = torch.randn(5, dim, generator=g, dtype=torch.float64)
    found = bool((halves_back(halves(z)) - z).abs().max() < 1e-10)
    claim(f"dimension {dim}: there and back is {'exact' if works else 'wrong'}", found is works)

# %% [markdown]
# `cat` puts the even places first: a permutation, hidden in the code. The way back splits the *permuted* values in even and odd once more, and so undoes the scale in the wrong places. In two dimensions even first, odd second is the old order, and nothing is seen. (Test layers in more than two dimensions.) With a mask there is nothing to put together.

# %% [markdown]
# ### 2.3 Actnorm and 1×1 convolutions
#
# Two linear layers help a flow to train. Both come from Glow (Kingma and Dhariwal, 2018).
#
# **Actnorm** gives each channel $c$ a scale and a shift, $x_c = z_c\,e^{s_c} + t_c$. Before training, one batch of data sets them, so that each channel has mean 0 and deviation 1 on its way to the noise. It takes the place of batch normalization, and does not mix the images of a batch.
#
# **A 1×1 convolution** multiplies the channels at each pixel by one learned matrix, $x = Wz$. A permutation is a special case. $W$ must stay invertible: near a singular one the noise $W^{-1}x$ of the data grows without bound, and the loss with it.
#
# Both do the same at each of the $H\cdot W'$ pixels of an image of height $H$ and width $W'$. So the Jacobian is block-diagonal with $HW'$ equal blocks, and
#
# $$\log|\det J| = HW'\sum_c s_c\qquad\text{and}\qquad\log|\det J| = HW'\,\log|\det W|.$$
#
# The factor $HW'$ is easily forgotten. Autograd remembers it:

# %%
image = torch.randn(2, 4, 3, 2, generator=g, dtype=torch.float64)  # 4 channels, 3 × 2 pixels
norm, mix = shaken(flows.ActNorm(4)), shaken(flows.InvertibleConv(4, g))
for name, layer, one_pixel in (
    ("actnorm", norm, norm.log_scale.sum()),
    ("1×1 convolution", mix, torch.linalg.slogdet(mix.weight).logabsdet),
):
    exact = full_log_det(layer, image)
    claim(f"{name}: log|det| = 6 × that of one pixel, to 1e-10", (exact - 6 * one_pixel).abs().max() < 1e-10)
    claim(f"{name}: the layer returns it", (layer(image)[1] - exact).abs().max() < 1e-10)
folded = flows.squeeze(flows.dequantize(digits[:500], torch.rand(500, 1, 28, 28, generator=g)))
fresh = flows.ActNorm(4).initialize(folded).transpose(0, 1).flatten(1)
claim(
    "set by 500 digits, each channel has mean 0 and deviation 1",
    fresh.mean(1).abs().max() < 1e-3 and (fresh.std(1) - 1).abs().max() < 1e-3,
)
start = flows.InvertibleConv(4, g).weight
claim(
    "W starts as a turn or a reflection: |det W| = 1, and the inverse is W transposed",
    torch.allclose(start @ start.T, torch.eye(4), atol=1e-5),
)

# %% [markdown]
# ### 2.4 Squeeze and split
#
# A coupling with a channel mask needs channels, and a grey image has one. `squeeze` folds each 2×2 block of pixels into four channels of half the side. No value changes, they only move, so the log-determinant is 0.

# %%
four = flows.squeeze(seven)  # (1, 4, 14, 14)
large = four[0][:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)  # each pixel drawn as 2 × 2
claim("1×28×28 becomes 4×14×14, and back", four.shape == (1, 4, 14, 14) and torch.equal(flows.unsqueeze(four), seven))
plots.grid(torch.cat([seven, large]), labels=["28 × 28", "channel 0", "1", "2", "3"], columns=5, scale=1.4)

# %% [markdown]
# Four small sevens, each made of every second pixel in every second row. They are nearly alike: given two of them, the others are easy to guess. That is the work of a coupling with a channel mask.
#
# `Split` saves work. On the way to the noise, after some layers at 14×14, half of the channels leave: they are taken as noise already. Only the other half goes on, squeezed once more, to 7×7. *(RealNVP calls it the multi-scale architecture.)* In formulas: cut the channels into $a$ and $b$, where $b$ leaves; then $\log p(a, b) = \log\mathcal N(b; 0, I) + \log p(a)$, and $p(a)$ is the density of the flow that goes on. Nothing gets lost, the numbers that left are part of $z$: $784 = 2\cdot14\cdot14 + 8\cdot7\cdot7$.
#
# Now all layers at once: there and back to $10^{-10}$ in float64, and the log-determinants of both directions against the full Jacobian.

# %%
claim("no number is lost", 2 * 14 * 14 + 8 * 7 * 7 == 28 * 28)
conv = shaken(flows.Coupling(flows.channel_mask(4).double(), nets.ConvCoupler(4, 8, 1)))
board = shaken(flows.Coupling(flows.checkerboard(4, 4).double(), nets.ConvCoupler(1, 8, 1)))
layers = {
    "coupling, checkerboard": (board, (1, 4, 4)),
    "coupling, channels": (conv, (4, 2, 3)),
    "actnorm": (norm, (4, 2, 3)),
    "permutation": (permute, (4, 2, 3)),
    "1×1 convolution": (mix, (4, 2, 3)),
    "squeeze": (flows.Squeeze(conv), (1, 4, 6)),
    "split": (flows.Split(norm), (8, 2, 2)),
    "all of RealNVP": (shaken(flows.RealNVP(side=8, widths=(8, 8), blocks=1, couplings=(2, 2, 2)), 0.05).transform, (1, 8, 8)),
}
for name, (layer, shape) in layers.items():
    z = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    x, log_det = layer(z)
    back, log_det_back = layer.inverse(x)
    errors = back - z, log_det - full_log_det(layer, z), log_det_back - full_log_det(layer.inverse, x)
    claim(f"{name}: inverse and both log-determinants", max(e.abs().max() for e in errors) < 1e-10)

# %% [markdown]
# ### 2.5 What a direction costs: coupling against planar
#
# "The forward and inverse propagation operations have identical computational cost", says the figure of the slide about the coupling. We count: PyTorch can add up the multiplications and additions of all convolutions and matrix products. And we take the time, of the fastest of seven runs; a clock is less exact, so the claim is generous.


# %%
def operations(direction, value):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        direction(value)
    return counter.get_total_flops()


def seconds(direction, value):
    runs = []
    for _ in range(7):
        start = time.process_time()
        with torch.no_grad():
            direction(value)
        runs.append(time.process_time() - start)
    return min(runs)


# %%
layer, value = (
    flows.Coupling(flows.channel_mask(4), nets.ConvCoupler(4, 32, 2)),
    torch.randn(64, 4, 14, 14, generator=g),
)
counts = operations(layer, value), operations(layer.inverse, value)
claim("coupling: forward and inverse take equally many operations, over a million", counts[0] == counts[1] > 1e6)
ratio = seconds(layer.inverse, value) / seconds(layer, value)
claim("coupling: and about equal time, within a factor of 2", 0.5 < ratio < 2)

# %% [markdown]
# This is no law of nature. The **planar** layer is a counterexample, and older than RealNVP: push all points along one direction $u$, by an amount that depends on where they are along another direction $w$,
#
# $$x = z + u\,\tanh(w^\top z + b),\qquad J = I + u\,h'\,w^\top,\qquad |\det J| = |1 + h'\,u^\top w|,\qquad h' = 1-\tanh^2(w^\top z+b),$$
#
# where $h'$ is the derivative of the hyperbolic tangent.
#
# The determinant is cheap in any dimension: a matrix of rank one, added to the identity, changes the determinant by one scalar product.

# %%
u, w = (sympy.Matrix(sympy.symbols(f"{name}:3", real=True)) for name in "uw")
claim(
    "det(I + u wᵀ) = 1 + uᵀw, in three dimensions", sympy.expand((sympy.eye(3) + u * w.T).det() - (1 + u.dot(w))) == 0
)
planar, z = shaken(flows.Planar(3, g)), torch.randn(4, 3, generator=g, dtype=torch.float64)
claim("the layer's log-determinant is autograd's", (planar(z)[1] - full_log_det(planar, z)).abs().max() < 1e-10)

# %% [markdown]
# **And the inverse?** Multiply $x = z+u\tanh(\dots)$ by $w^\top$ and write $a = w^\top z$. What is left is one equation for one number, $a + c\,\tanh(a+b) = w^\top x$ with $c = u^\top w$. It has no solution in closed form. *For which $c$ has it exactly one?* Look at its left side (with $b = 0$; another $b$ only moves the curve):

# %%
a = torch.linspace(-4, 4, 401)
plots.curves(a, {f"c = {c}": a + c * torch.tanh(a) for c in (2, -0.9, -2.5)}, "a", "a + c tanh(a)")

# %% [markdown]
# The slope is $1 + c\,(1-\tanh^2)$, which lies between 1 and $1+c$. So the curve rises everywhere if and only if $c\ge-1$. For $c = -2.5$ it falls in the middle: three $a$ have the same value, and the layer is not invertible. Therefore $u$ is changed so that $u^\top w>-1$ always: with $\mathrm{softplus}(v) = \log(1+e^v)>0$,
#
# $$\hat u = u + \bigl(\mathrm{softplus}(u^\top w) - 1 - u^\top w\bigr)\,\frac{w}{\lVert w\rVert^2},\qquad \hat u^\top w = \mathrm{softplus}(u^\top w)-1 > -1.$$
#
# (At $c = -1$ the slope is 0 at one point, and so is the determinant; hence $>$.) Then $a$ can be searched for. As $|\tanh|<1$, it lies within $\pm|c|$ of $w^\top x$: halve this interval 60 times.

# %%
x, log_det = planar(z)
back, log_det_back = planar.inverse(x)
claim(
    "found by halving: there and back to 1e-10, and the log-determinants sum to 0",
    max((back - z).abs().max(), (log_det + log_det_back).abs().max()) < 1e-10,
)
many = torch.randn(100_000, 3, generator=g, dtype=torch.float64)
ratio = seconds(planar.inverse, planar(many)[0].detach()) / seconds(planar, many)
claim("planar: the inverse takes more than 5 times as long as forward", ratio > 5)

# %% [markdown]
# Which direction is wanted? Training by maximum likelihood needs the *inverse*, from data to noise; sampling needs *forward*. A planar flow is dear in the first. (It was made for another use: for the encoder of a VAE, which draws its own $z$ and only needs the density of what it drew.) A coupling is cheap in both.
#
# > **Spot the bug.** A public planar layer divides by $\lVert w\rVert$ where $\lVert w\rVert^2$ stands. Its author tested with a $w$ of length 1. What happens with $\lVert w\rVert = \frac12$?

# %%
w, target = torch.tensor([0.3, 0.4], dtype=torch.float64), -5.0  # ‖w‖ = 1/2, uᵀw = −5
u = target * w / w.square().sum()
softplus = math.log1p(math.exp(target))
for name, length in {"‖w‖²": w.square().sum(), "‖w‖": w.norm()}.items():
    changed = u + (softplus - 1 - target) * w / length
    claim(
        f"divided by {name}: uᵀw = {changed @ w:.2f}, {'invertible' if changed @ w > -1 else 'not invertible'}",
        (changed @ w > -1) == (name == "‖w‖²"),
    )

# %% [markdown]
# $u$ is changed by $\lVert w\rVert$ times what is needed. At $\lVert w\rVert = \frac12$ only half of the way is made: from $u^\top w = -5$ to $-3$, still below $-1$. The layer folds, and its "inverse" finds one of three points. With length 1 both formulas agree.
#
# ## 3. Densities in the plane
#
# "Now we can directly maximize $\log p(x)$", says the slide: the loss is minus the average log-likelihood of the data, and nothing else. No bound, no second network. Why is it the right thing to do? By the definition of the KL divergence,
#
# $$\mathbb E_{q}\bigl[-\log p_\theta(x)\bigr] = \underbrace{\mathbb E_q\bigl[-\log q(x)\bigr]}_{\text{entropy of the data}} + D_{KL}(q\,\Vert\,p_\theta),$$
#
# where $q$ is the distribution of the data. The first term has no $\theta$. So the loss is the KL divergence from data to model, up to a constant.
#
# We train on two moons. To measure how good the flow is we need the true density, so we write it down: points on two half circles, blurred with deviation 0.08, are a mixture of very many narrow Gaussians. The flow has eight couplings, which keep the second and the first coordinate in turn, each with a small network.

# %%
arc = torch.linspace(0, math.pi, 60)
upper = torch.stack([arc.cos() - 0.5, arc.sin() - 0.25], 1)  # a half circle; the other moon is its mirror image, −upper
truth = toy.GaussianMixture(torch.cat([upper, -upper]), 0.08**2)
moons, fresh = truth.sample(20_000, g), truth.sample(5000, g)


def nll(flow, x):
    return -flow.log_prob(x).mean()


def batch(step):
    return {"x": moons[torch.randint(len(moons), (256,), generator=torch.Generator().manual_seed(step))]}


torch.manual_seed(0)
steps = training.scaled(cpu=1000, gpu=20_000)
flow = flows.coupling_flow(dim=2, depth=8, width=64, limit=2.0)  # scales within e^±2: a fast training stays calm
flow = training.fit(flow, nll, batch, steps=steps, lr=1.5e-2, ema=0.99, precision="float32").ema.requires_grad_(False)

# %% [markdown]
# Two checks before we look. The density of any flow integrates to 1, trained or not. And no density can have a smaller loss than the true one, whose loss is the entropy; what the flow's loss has above it is the KL divergence.

# %%
sides = torch.linspace(-3, 3, 301)
plane = torch.cartesian_prod(sides, sides)
height = flow.log_prob(plane).double().exp()
claim("the density integrates to 1, on a grid, to 1 %", abs(height.sum() * 0.02**2 - 1) < 0.01)
gap = truth.log_prob(fresh) - flow.log_prob(fresh)  # its average is the KL divergence
error = gap.std() / len(gap) ** 0.5
claim("the KL divergence from data to flow is above 0, by more than 5 standard errors", gap.mean() > 5 * error)
claim("and below 0.2 nats", gap.mean() < 0.2)
claim("point by point, the flow's density is the larger one at some", (gap < 0).any())

# %% [markdown]
# (On average over the data, the true density wins. At single points it need not.)
#
# Now look inside. Noise goes in on the left; each panel is what it has become after two more couplings. The colour of a point says where in the noise it began, left or right of the middle. *How does a round cloud become two moons?* (Some points leave the frame on the way.)

# %%
states = [torch.randn(2000, 2, generator=g)]
log_p = torch.distributions.Normal(0.0, 1.0).log_prob(states[0]).sum(1)
for layer in flow.transform.transforms:
    z_i, log_det = layer(states[-1])
    states.append(z_i)
    log_p = log_p - log_det
claim("the slide's sum, layer by layer, is the flow's log p(x)", (log_p - flow.log_prob(states[-1])).abs().max() < 1e-2)
origin = ["left" if first < 0 else "right" for first in states[0][:, 0].tolist()]
after = ["noise"] + [f"{i} couplings" for i in range(1, 8)] + ["all 8"]
plots.film_points(states[::2], times=after[::2], labels=origin, extent=(-3, 3, -3, 3))

# %% [markdown]
# A coupling moves points along one axis only; the other coordinate says how far they are shifted and stretched. Bit by bit the cloud is pulled into two arms. Between them some points are left over. Keep them in mind.
#
# Now the density. On the right it is drawn once more as its fourth root, which makes visible what is faint. *What do you expect between the moons, where there are no data?*

# %%
made, axes = plots.panels(3, width=7.2, height=2.9)
square = (-2.2, 2.2, -2.2, 2.2)
plots.scatter(moons[:3000], extent=square, ax=axes[0], title="data")
plots.density(flow.log_prob, extent=square, ax=axes[1], title="density of the flow")
plots.density(lambda x: flow.log_prob(x) / 4, extent=square, ax=axes[2], title="its fourth root")
for ax in axes[1:]:
    ax.set_ylabel("")
made

# %% [markdown]
# There is a faint **bridge** from moon to moon, and the fourth root shows it clearly. Hardly any data lie there. It is no accident of a short training. $f$ is continuous and so is its inverse, and the image of something in one piece under a continuous map is in one piece. Such a map can stretch and bend the plane, but not tear it. As couplings reach every point of the plane, and their determinant is finite, the density is nowhere 0.
# (The true density is not 0 there either, but very much smaller. How small a flow can make it depends on how steep $f$ may be.) Section 5 measures it.

# %% [markdown]
# ## 4. Images
#
# ### 4.1 Dequantization
#
# A digit's pixel is one of 256 grey levels. A flow has a density, and here lies a trap. *What is the largest average log-density that a model can give to grey levels?*
#
# Take the simplest model of a pixel: a box of width $\delta$ around each level $k$, with as much probability $P(k)$ as the level has in the data. Its density on the level is $P(k)/\delta$. Let the boxes get narrow, and watch minus the average logarithm to base 2, the "bits per pixel":

# %%
grey = ((digits + 1) * 127.5).round().long()
frequency = grey.flatten().bincount(minlength=256).double() / grey.numel()
widths = 2.0 ** -torch.arange(8, 41)  # the first is 1/256, the distance of two levels in [0, 1]
bits = torch.stack([-(frequency / w).clamp(min=1e-300).log2() @ frequency for w in widths])
claim("each halving of the width 'saves' one bit", torch.allclose(bits.diff(), torch.tensor(-1.0).double()))
claim("with narrow boxes the bits are below −20", bits[-1] < -20)
plots.curves(widths.flip(0), {"bits": bits.flip(0)}, "width of the boxes", "−log₂ density, per pixel", logx=True)

# %% [markdown]
# From right to left, as the boxes get narrow, there is no floor. The model learns nothing about digits, and its likelihood is as large as you like, because a density on single points is unbounded. A flow that is trained on raw grey levels finds this out.
#
# The remedy is to fill the gaps between the levels: **dequantization**. Add noise $u$, uniform in $[0, 1)$, to the level $k\in\{0,\dots,255\}$ of each of the $D$ pixels, and divide: $y = (k+u)/256$. Every level now owns a whole cell of width $\frac1{256}$, and spikes no longer pay.
#
# **What does $\log p(y)$ say about the image?** The model's probability of the image $k$ is the integral of its density over the cell:
#
# $$\begin{aligned}
# \log P(k) &= \log\int_{[0,1)^D} p\Bigl(\frac{k+u}{256}\Bigr)\,\frac{du}{256^D} && y = \tfrac{k+u}{256},\ \text{so } dy = \tfrac{du}{256^D}\\
# &= \log\,\mathbb E_u\Bigl[p\Bigl(\frac{k+u}{256}\Bigr)\Bigr] - D\log 256 && \text{the integral is an average over } u\\
# &\ge \mathbb E_u\Bigl[\log p\Bigl(\frac{k+u}{256}\Bigr)\Bigr] - D\log 256. && \text{Jensen: the logarithm is concave}
# \end{aligned}$$
#
# So the average log-density, less $D\log256$, is a lower bound on $\log P(k)$ for *every single image*. It is an equality if the density is constant on the cell. Now it is safe to maximize: probabilities are at most 1, and so the bound is at most 0.
#
# One pixel, eight levels, and the Beta(2, 5) density, whose probabilities are known:

# %%
levels, beta = 8, stats.beta(2, 5)
edges = torch.arange(levels + 1).double() / levels
exact = torch.tensor(beta.cdf(edges)).diff().log()
u = (torch.arange(10_000).double() + 0.5) / 10_000
y = (torch.arange(levels)[:, None] + u) / levels
bound = torch.tensor(beta.logpdf(y)).mean(1) - math.log(levels)
claim("the probabilities of the 8 levels sum to 1", abs(exact.exp().sum() - 1) < 1e-12)
claim("the bound lies below log P(k), for every level", (bound < exact).all())
noise = torch.rand(digits.shape, generator=g)
y = flows.dequantize(digits, noise)  # what the flow of section 4.4 is given
claim("dequantize, then quantize: the same digits", torch.allclose(flows.quantize(y), digits, atol=1e-6))
plots.curves(torch.arange(levels), {"log P(k)": exact, "the bound": bound}, "level k", "nats")

# %% [markdown]
# The bound lies below at every level, and close, except where the density changes steeply within a cell (levels 0, 6 and 7).

# %% [markdown]
# ### 4.2 The logit
#
# From here on the data $x$ of the flow are these $y$. $y$ lies in $[0, 1]$, but a chain of couplings makes numbers of any size: part of its probability would lie outside, on no image at all. So the last layer of the flow squashes every number $\ell$ by a sigmoid, $1/(1+e^{-\ell})$, and stretches the result a little. In the direction of training it is the *logit*:
#
# $$\ell = \mathrm{logit}\bigl(\lambda+(1-2\lambda)\,y\bigr),\qquad \mathrm{logit}(v) = \log\frac{v}{1-v}.$$
#
# The small margin $\lambda$ keeps black and white away from $\pm\infty$. Its price: on the way to data $y$ may leave $[0, 1]$ by about $\lambda$. Of the samples of the flow of section 4.4 about four in five do so in some pixel, but it costs only about 0.003 bits per dimension. Write $v = \lambda+(1-2\lambda)\,y$. Then $\frac{d\ell}{dy} = \frac{1-2\lambda}{v\,(1-v)}$, so each pixel adds $\log(1-2\lambda)-\log v-\log(1-v)$ to $\log|\det d\ell/dy|$.

# %%
Y, lam = sympy.symbols("y lambda", positive=True)
v = lam + (1 - 2 * lam) * Y
slope = sympy.log(v / (1 - v)).diff(Y)
claim("dℓ/dy = (1 − 2λ) / (v (1 − v))", sympy.simplify(slope - (1 - 2 * lam) / (v * (1 - v))) == 0)
squash = flows.Logit(margin=1e-5)
ys = y[0, 0, 12:14, 8:14].double()[None]  # twelve pixels of a digit
zs, log_det = squash.inverse(ys)
claim("the layer's log-determinant is autograd's", (log_det - full_log_det(squash.inverse, ys)).abs().max() < 1e-8)
made, (left, right) = plots.panels(2, width=7.2, height=2.8)
left.hist(y[:500].flatten(), 60, density=True, color=style.DATA)
right.hist(squash.inverse(y[:500])[0].flatten(), 60, density=True, color=style.DATA)
left.set(xlabel="pixel y, dequantized", ylabel="density", yscale="log")
right.set(xlabel="after the logit, ℓ", ylabel="density")
made

# %% [markdown]
# On the left nearly everything stands in the first of the bars, the black background. The logit pulls it apart: on the right it is a hill of its own, to the left of $-5$. The ink lies to the right of it, with a small hill near 5 for the white pixels.

# %% [markdown]
# > **Spot the bug.** A flow is trained without the log-determinant of its logit: the layer is "only preprocessing". The samples are fine. Are the reported bits too high or too low, and roughly by how many for each pixel? (Most pixels are black, with $v\approx\frac1{512}$. Bits for each pixel are nats divided by $D\log 2$.)

# %%
_, forgotten = squash.inverse(y[:500])
claim("on average the forgotten term is above 8 bits for each pixel", bits_per_dim(forgotten, y).mean() > 8)

# %% [markdown]
# The term is positive, so the reported bits are too *high*, by about 8.5 for each pixel ($\log_2 512 = 9$ for a black one, less for grey): this slip makes the model look worse than it is. It has no parameters, so training and samples stay the same. But the number is a likelihood in other coordinates, of $\ell$ and not of $y$. It must not be compared with that of any other model. Densities change with the unit of measurement; probabilities do not.

# %% [markdown]
# ### 4.3 Bits per dimension
#
# Which brings us to the usual unit. Divide the bound on $-\log P(k)$ by the number of pixels $D$, and by $\log 2$ to go from nats to bits:
#
# $$\text{bits per dimension} = \frac{-\log p(y) + D\log256}{D\log2} = \frac{-\log p(y)}{D\log 2} + 8.$$
#
# It has a plain meaning: at most about so many bits for each pixel would a file need if this model compressed the image. Guessing all levels alike costs 8.
#
# A number needs something to compare it with. Here are three models of a digit that need no network. *Guess their bits for a pixel of MNIST:* (a) all levels alike; (b) each pixel by itself, by how frequent its level is in all images; (c) `lzma`, a general-purpose compressor, on the file of all 2,000 test digits.

# %%
even = bits_per_dim(torch.zeros(1), y) + 8  # the density of y is 1 everywhere in [0, 1]^D
claim("(a) all levels alike: 8 bits", even.item() == 8)
entropy = -torch.special.xlogy(frequency, frequency).sum() / math.log(2)
claim("(b) one table of levels for all pixels: between 1.8 and 2 bits", 1.8 < entropy < 2)
raw = grey.to(torch.uint8).numpy().tobytes()
packed = 8 * len(lzma.compress(raw, preset=9)) / len(raw)
claim("(c) lzma: between 1.3 and 1.5 bits", 1.3 < packed < 1.5)

# %% [markdown]
# The black background is cheap, and that explains the way from 8 to below 2. The rest must come from knowing strokes.

# %% [markdown]
# ### 4.4 RealNVP on digits
#
# Now put everything together. From data to noise, with an actnorm beside each coupling:
#
# | step | shape after it |
# |---|---|
# | logit | 1×28×28 |
# | squeeze | 4×14×14 |
# | 4 couplings with checkerboard masks, then 4 with channel masks | 4×14×14 |
# | split: 2×14×14 numbers leave | 2×14×14 |
# | squeeze | 8×7×7 |
# | 8 couplings with channel masks | 8×7×7 |
#
# (A checkerboard of the full image, squeezed, is a channel mask: channels 0 and 3 stay. So the networks of these couplings, too, work at 14×14, at a quarter of the cost.) It takes longer than half a minute to train,
# so a trained one comes with the course.

# %%
board28 = flows.squeeze(flows.checkerboard(28, 28)[None])[0]
claim(
    "a squeezed checkerboard keeps channels 0 and 3, whole",
    torch.equal(board28.mean((1, 2)), torch.tensor([1.0, 0, 0, 1])),
)
digit_flow = checkpoints.load("mnist-realnvp")
card = digit_flow.card
print(card["what"])
print(
    f"{sum(p.numel() for p in digit_flow.parameters()):,} parameters, {card['steps']:,} steps, trained on {card['images']:,} images"
)
print("train it again:", card["recipe"])
for name, value in card["scores"].items():
    print(f"{name}: {value}")

# %%
test, names = y[:400], labels[:400]
with torch.no_grad():
    z_test, log_det = digit_flow.transform.inverse(test)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z_test).flatten(1).sum(1) + log_det
    again = digit_flow.transform(z_test[:50])[0]
bits = bits_per_dim(-log_p, test) + 8
claim("digit → noise → digit, to 1e-4 in float32", (again - test[:50]).abs().max() < 1e-4)
claim("test digits cost below 1.3 bits per dimension, and less than with lzma", bits.mean() < min(1.3, packed))
norms = z_test.flatten(1).norm(dim=1)
claim("their noise is about as long as noise is (E‖z‖² = 784, and √784 = 28), to 5 % on average", abs(norms.mean() / 28 - 1) < 0.05)

# %% [markdown]
# So the flow knows more about digits than a general-purpose compressor that has seen no others. Does it draw them? The first row shows real digits, the others are drawn: noise in, one pass through the flow.

# %%
drawn = flows.quantize(digit_flow.sample(30, generator=g))
plots.rows([digits[:10], *drawn.split(10)], labels=["real", "drawn", "", ""])

# %% [markdown]
# The strokes are sharp, and most have the right width. Some are digits; others are parts of digits that do not fit together. The log-likelihood is a sum over all pixels, each given those before it, and neighbours decide nearly all of it. To know the class saves at most $\log_2 10 = 3.3$ bits on average, out of some 870 (784 pixels at 1.1 bits).
#
# Which test digits does the flow find probable? *Guess which class is at the top.*

# %%
order = log_p.argsort(descending=True)
plots.rows([digits[:400][order[:10]], digits[:400][order[-10:]]], labels=["most probable", "least probable"])

# %%
paper = flows.dequantize(-torch.ones(8, 1, 28, 28), torch.rand(8, 1, 28, 28, generator=g))
with torch.no_grad():
    empty = bits_per_dim(-digit_flow.log_prob(paper), paper) + 8
claim("the ten most probable digits are ones, all or nearly all", (names[order[:10]] == 1).sum() >= 8)
claim("an empty sheet is more probable than every one of the 400 digits", empty.max() < bits.min())

# %% [markdown]
# The most probable digits are the plainest: single upright strokes with smooth edges. The least probable have loops. And an empty sheet, which is no digit, beats them all: a *density* is high where an image is easy to predict. That is no contradiction. There is one empty sheet and there are very many digits: each of them is less probable, but together they have nearly all of the probability. (In 784 dimensions the highest density of a Gaussian is at 0, and its samples have a length of about 28 all the same.)
#
# So a likelihood tells how well a model predicts images of this kind, and is a fair way to compare two models in that. It does not tell whether an image is a good digit.

# %% [markdown]
# ### 4.5 Temperature and interpolation
#
# Samples have a knob. Draw $z = \tau\,\epsilon$ with $\epsilon\sim\mathcal N(0, I)$ and a **temperature** $\tau<1$: noise closer to its mode. *What do you expect at 0.5? And at 0?* The noise $\epsilon$ is the same at all temperatures.

# %%
fixed = torch.randn(20, 1, 28, 28, generator=g)


def warm(temperature):
    with torch.no_grad():
        return plots.grid(2 * digit_flow.transform(temperature * fixed)[0] - 1, columns=10)


widgets.explore(warm, temperature=([0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2], 0.7))

# %% [markdown]
# At $\tau = 0$ all are the same image, a blob of ink: that of the noise 0. Somewhat below 1 the strokes are smoother and the images calmer, at the price of variety. Above 1 they fall apart. A temperature does not draw from the model's $p$ any more, and not from a sharpened $p$ either: the density of $\tau\epsilon$ is $\pi_0$ to a power, up to a factor, but the determinant that turns it into a density of images does not go to that power with it.
#
# **Interpolation.** Every *dequantized* test digit has its noise, exactly one. So one can walk from one digit to another through the noise. A straight line leads through noise that is too short: half-way between two independent $z$ of length 28 the length is $28/\sqrt2$, a temperature of 0.7. (Independent vectors of many dimensions are nearly at right angles. These two are not quite independent, so the length falls less far.) A walk along the circle from one to the other keeps the length. *How will the three rows differ in the middle?* (Top: mixed pixels, without a flow.)

# %%
pair = [int((names == c).nonzero()[i]) for c, i in ((1, 0), (7, 0))]
start, end = z_test[pair[0]], z_test[pair[1]]
weights = torch.linspace(0, 1, 9)[:, None, None, None]
angle = torch.acos((start * end).sum() / (start.norm() * end.norm()))
straight = (1 - weights) * start + weights * end
circle = (torch.sin((1 - weights) * angle) * start + torch.sin(weights * angle) * end) / torch.sin(angle)
pixels = (1 - weights) * test[pair[0]] + weights * test[pair[1]]
half = [path[4].norm() / ((start.norm() + end.norm()) / 2) for path in (straight, circle)]
claim(
    "half-way, the straight line's noise has less than 0.85 of the length; the circle's all of it, to 2 %",
    half[0] < 0.85 and abs(half[1] - 1) < 0.02,
)
with torch.no_grad():
    walks = [pixels, digit_flow.transform(straight)[0], digit_flow.transform(circle)[0]]
plots.rows([2 * walk - 1 for walk in walks], labels=["pixels", "straight", "circle"])

# %% [markdown]
# Mixed pixels show one digit fading out and another fading in: two grey digits on one sheet. The flow's images are made of strokes all the way. The straight row passes through noise that is too short, so it looks like a temperature below 1: smooth and calm. The circle keeps the length, and its middle looks like the flow's own samples, breaks and specks included. Nicer is not more typical.

# %% [markdown]
# ## 5. What "invertible" costs, and the bridge to diffusion
#
# A flow has what VAE and GAN lack: an exact density, one simple loss, a noise for each dequantized image. The price is the word *invertible*. It is paid three times.
#
# **The dimension.** An invertible map with a determinant needs as many numbers in $z$ as in $x$. A VAE may say a digit in twenty numbers. The flow has 784, whatever there is to say, for every pixel that is always black, too.

# %%
always_black = (grey == 0).flatten(1).all(0).sum()
claim("more than 150 of the 784 pixels are black in all 2,000 test digits; each has its own z", always_black > 150)

# %% [markdown]
# **The layers.** Only special layers will do. A coupling lets half of the values pass unchanged, so many of them are needed. No pooling, no bottleneck, no attention of everything to everything, except inside of $s$ and $t$, which must not see what they change.
#
# **The topology.** The bridge of section 3 has a price that can be computed. Take one dimension, noise $\mathcal N(0,1)$, and two humps of deviation $\sigma = \frac14$ at $\pm m$. The increasing map that makes one of the other is $f = F^{-1}\circ\Phi$, where $\Phi$ is the cumulative distribution of the noise and $F$ that of the two humps. By symmetry $f(0) = 0$, and section 1.1 gives its slope there:
#
# $$f'(0) = \frac{\pi_0(0)}{p(0)} = \frac{1/\sqrt{2\pi}}{e^{-m^2/2\sigma^2}/(\sigma\sqrt{2\pi})} = \sigma\,e^{\,m^2/(2\sigma^2)}.$$
#
# *How steep must the map be for humps at $\pm1$?*

# %%
sigma = 0.25
far = torch.linspace(0.25, 1.25, 41, dtype=torch.float64)
steep = []
for m in far:
    two = toy.GaussianMixture(torch.tensor([[-m], [m]], dtype=torch.float64), sigma**2)
    p_0 = two.log_prob(torch.zeros(1, 1, dtype=torch.float64)).exp()
    steep.append((1 / math.sqrt(2 * math.pi) / p_0).squeeze())
steep = torch.stack(steep)
claim("the slope at 0 is σ exp(m² / (2σ²))", torch.allclose(steep, sigma * (far**2 / (2 * sigma**2)).exp(), rtol=1e-9))
claim("humps at ±1 need a slope above 700", 700 < sigma * math.exp(1 / (2 * sigma**2)) < 800)
plots.curves(far, {"slope": steep}, "m: the humps are at ±m", "slope of f at 0", logy=True)

# %% [markdown]
# For humps at $\pm1$ the slope is 745, and it grows faster than exponentially with the distance. (The axis is logarithmic, and the curve still bends upwards.) Turn it round: if no slope of $f$ exceeds $L$, then at every point $p(x) = \pi_0(z)/|f'(z)|\ge\pi_0(z)/L$. So at the median, where $z = 0$, **the density is at least** $\pi_0(0)/L = 1/(L\sqrt{2\pi})\approx 0.4/L$: this is the bridge. It is thin if $L$ is large, and never gone.
#
# In the plane the same holds for the share of points in the gap. Let two regions $A$ and $B$ lie at a distance $d$, and let $f$ stretch no direction by more than $L$ ($f$ is *$L$-Lipschitz*). Then their noise lies at least $d/L$ apart. Of all sets that keep two halves of equal probability at least $d/L$ apart, a straight strip through the middle has the least probability. (This is the Gaussian isoperimetric inequality; we take it on trust.) If $A$ and $B$ have the same probability, the gap has at least
#
# $$P(\text{gap})\ \ge\ 2\,\Phi\Bigl(\frac{d}{2L}\Bigr) - 1\ \approx\ 0.4\,\frac dL\quad\text{for small } d/L.$$
#
# On the line we can check it with the map of section 1.1, whose largest slope is $a$ (for $a\ge1$).

# %%
for a, d in ((2.0, 1.0), (4.0, 1.0), (4.0, 3.0)):
    edge = optimize.brentq(lambda z, a=a, d=d: z + (a - 1) / 2 * math.tanh(2 * z) - d / 2, 0, d)  # f(edge) = d/2
    share, least = 2 * stats.norm.cdf(edge) - 1, 2 * stats.norm.cdf(d / (2 * a)) - 1
    claim(f"slope {a:.0f}, gap {d:.0f}: the share in the gap is at least 2Φ(d/2L) − 1", share > least)
    claim("and not far above it", share < 1.2 * least)

# %% [markdown]
# Now the flow of section 3, and the bridge between its moons. Take the region of highest density that holds a share of the flow's probability. For a small share it is two moons, for a large one it is a single piece. *From which share on is it in one piece?* As we know the true density, we can ask the same of the data.


# %%
def one_piece_from(log_p):
    """The smallest share (of a list) whose region of highest density, on a grid, has both moons in one piece."""
    height = log_p.exp().reshape(301, 301).double()
    levels = height.flatten().sort(descending=True).values
    held = levels.cumsum(0) / levels.sum()
    for share in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999):
        region = height >= levels[(held < share).sum()]
        pieces = torch.tensor(ndimage.label(region.numpy())[0])  # the connected pieces, numbered
        if pieces[upper_moon] == pieces[lower_moon] != 0:
            return share
    return 1.0


# %%
# The middles of the two arcs, as places on the grid.
upper_moon, lower_moon = (tuple(((way[30] + 3) / 0.02).round().long().tolist()) for way in (upper, -upper))
shares = one_piece_from(flow.log_prob(plane)), one_piece_from(truth.log_prob(plane))
claim("the flow: two pieces at a share of 30 %, one at 98 % or before", 0.3 < shares[0] <= 0.98)
claim("the data: still two pieces at 99 %", shares[1] > 0.99)

# %% [markdown]
# The data have hardly a path from moon to moon; the flow has one. What lies on it are samples that look like nothing in the data. With digits one expects the same wherever the classes are apart.
#
# Off the moons the map is also steeper, on average, though not at every point. The largest stretch of $f$ at a point is the largest singular value of its Jacobian:

# %%
noise = torch.randn(4000, 2, generator=g)
J = torch.func.vmap(torch.func.jacrev(lambda one: flow.transform(one[None])[0][0]))(noise)
stretch, made_of_it = torch.linalg.matrix_norm(J, 2), flow.transform(noise)[0]
arcs = torch.cat([upper, -upper])
off_moons, data_off = (torch.cdist(x, arcs).min(1).values > 0.24 for x in (made_of_it, fresh))
few, many = data_off.double().mean(), off_moons.double().mean()
claim("three deviations off the moons: below 0.6 % of the data, over 1 % of the flow's points", few < 0.006 and many > 0.01)
claim("the map is steeper there, on average", stretch[off_moons].mean() > 1.05 * stretch[~off_moons].mean())

# %% [markdown]
# ### Why adding noise removes it
#
# "Similar to flow; no longer constrained to reversible operations; add noise to image until you get just noise", says the slide that comes next. Let us take it word by word, on the line, with the two humps at $\pm1$.
#
# Take care: the words turn round here. In diffusion *forward* goes from data to noise; $x_0$ is data, $x_T$ is noise, and $q$ is the distribution of the data and of all that is made of it.
#
# **Forward.** Add noise to data: $x_T = \alpha\,x_0+\sqrt{1-\alpha^2}\,\epsilon$ with a small $\alpha$, here 0.1. As an operation on *points* this is not invertible at all. The same $x_T$ can come from the left hump or from the right one.
#
# **Back.** But nobody needs the point back. To draw samples it is enough to undo what happened to the *distribution*. And a random step can: given $x_T$, draw $x_0$ from its distribution by Bayes' rule,
#
# $$q(x_0\mid x_T)\ \propto\ q(x_0)\,\mathcal N(x_T;\ \alpha x_0,\ 1-\alpha^2).$$
#
# If $x_T$ has its right distribution, then so has $x_0$: drawing both together, forward or back, is the same joint distribution. The step back is *torn* without any trouble: from the same $x_T$ it goes left one time and right the next, and hardly ever between. *Draw it, before you look:* $x_0$ over $z$ for the invertible map; $x_0$ over $x_T$ for the random one.

# %%
two = toy.GaussianMixture(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 0.25**2)
fine = torch.linspace(-2.5, 2.5, 1001, dtype=torch.float64)
x0, alpha = two.sample(5000, g)[:, 0], 0.1
xT = alpha * x0 + (1 - alpha**2) ** 0.5 * torch.randn(5000, generator=g, dtype=torch.float64)
log_back = two.log_prob(fine[:, None]) - (xT[:, None] - alpha * fine) ** 2 / (2 * (1 - alpha**2))  # (5000, 1001)
x0_back = fine[torch.multinomial(log_back.softmax(1), 1, generator=g)[:, 0]]

# %%
fresh = two.sample(5000, g)[:, 0]
claim(
    "x_T is nearly N(0, 1): a Kolmogorov–Smirnov test sees no difference",
    stats.kstest(xT.numpy(), "norm").pvalue > 0.001,
)
claim(
    "what came back has the distribution of the data: no difference seen", stats.ks_2samp(x0_back, fresh).pvalue > 0.001
)
claim(
    "the points themselves did not come back: correlation with the x_0 they came from below 0.2",
    torch.corrcoef(torch.stack([x0, x0_back]))[0, 1] < 0.2,
)
middle = xT.abs() < 0.1
claim(
    "from the same place it goes left and right, each at least 4 times in 10",
    0.4 < (x0_back[middle] > 0).double().mean() < 0.6,
)

# %%
cumulative = (two.log_prob(fine[:, None]).exp() * (fine[1] - fine[0])).cumsum(0).clamp(1e-9, 1 - 1e-9)
made, (left, right) = plots.panels(2, width=7.2, height=3.4, share=True)
left.plot(torch.special.ndtri(cumulative), fine, color=style.MODEL)
right.scatter(xT[:2000], x0_back[:2000], s=6, alpha=0.5, linewidths=0, color=style.MODEL)
left.set(title="an invertible map", xlabel="noise z", ylabel="$x_0$", xlim=(-3, 3), ylim=(-2.5, 2.5))
right.set(title="a random step back", xlabel="noise $x_T$")
made

# %% [markdown]
# On the left a curve must pass through the gap, in one nearly vertical stroke; a network with bounded slopes draws it flatter, and puts points there. On the right there is no curve. Every $x_T$ has a *distribution* of $x_0$, with two humps and next to nothing between.
#
# So noise removes the constraint. What is gained, and what is given up?
#
# - Any network will do. It need not be inverted, and no determinant is computed: it only describes the step back.
# - The step back $q(x_0\mid x_T)$ has two humps, and for images it is as complicated as the data. We could compute it here because we know $q$. Notebook 03 cuts the way into many small steps, for each of which a Gaussian will do: many passes in place of one.
# - The exact likelihood is gone. A bound takes its place, that of a VAE with many layers. (Notebook 05 finds an invertible map hidden in a diffusion model, and gets the likelihood back, with an integral in place of the sum of log-determinants.)
# - One price stays: $x_T$ has as many numbers as $x_0$. And with few, coarse Gaussian steps a bridge comes back; that is why the steps are many.

# %% [markdown]
# ## 6. Recap
#
# - An invertible map keeps the probability of every region and changes its volume. So $\log p(x) = \log\pi_0(z_0)-\sum_i\log|\det df_i/dz_{i-1}|$, each determinant at its own point.
# - Each direction returns the log-determinant of the map that it computes. Then they sum to 0, and a density is $\log\pi_0$ plus that of `inverse`.
# - A coupling is invertible whatever its networks are; its log-determinant is a sum, and both directions cost the same. A planar layer has a cheap determinant, and an inverse that must be searched for.
# - Maximum likelihood is the whole training. It lowers the KL divergence from data to model.
# - Images need dequantization, which makes the likelihood a lower bound; bits per dimension measure the probability of grey levels, not the density.
# - Likelihood is not quality: an empty sheet has a higher density than each of the 400 digits that we tried.
# - Invertible means: the dimension of the data, special layers, and bridges that are only as thin as the map is steep. A random step back needs neither of the last two.
#
# **Pitfalls**
#
# - The sign of the log-determinant. "Forward plus inverse is 0" does not find a sign that is wrong in both. Integrate the density; ask autograd.
# - A sum over the batch, or a mean over pixels, where a sum over the values of *one* sample belongs.
# - The number of pixels, as a factor of actnorm and 1×1 convolutions.
# - Halves that are put together in another order than they were cut.
# - Tests on zeros, on fresh weights, or in two dimensions only.
# - A forgotten $D\log256$, or the forgotten log-determinant of the logit: bits that cannot be compared with anybody else's.
#
# **Homework:** [exercises](../homework/hw2_flows.ipynb) next to this notebook.
#
# **References**
#
# - Dinh, Sohl-Dickstein, Bengio: [*Density estimation using Real NVP*](https://arxiv.org/abs/1605.08803), 2017. Couplings, masks, squeeze and split; the lecture's figure.
# - Dinh, Krueger, Bengio: [*NICE: Non-linear Independent Components Estimation*](https://arxiv.org/abs/1410.8516), 2014. The first coupling layers, without a scale.
# - Rezende, Mohamed: [*Variational Inference with Normalizing Flows*](https://arxiv.org/abs/1505.05770), 2015. The planar layer.
# - Kingma, Dhariwal: [*Glow: Generative Flow with Invertible 1×1 Convolutions*](https://arxiv.org/abs/1807.03039), 2018. Actnorm, 1×1 convolutions, temperature.
# - Theis, van den Oord, Bethge: [*A note on the evaluation of generative models*](https://arxiv.org/abs/1511.01844), 2016. Dequantization, and what a likelihood does not say.
# - Nalisnick and others: [*Do Deep Generative Models Know What They Don't Know?*](https://arxiv.org/abs/1810.09136), 2019. More on likely images that are none of the data.
# - Cornish, Caterini, Deligiannidis, Doucet: [*Relaxing Bijectivity Constraints with Continuously Indexed Normalising Flows*](https://arxiv.org/abs/1909.13833), 2020. Bridges and Lipschitz constants.
# - Papamakarios and others: [*Normalizing Flows for Probabilistic Modeling and Inference*](https://arxiv.org/abs/1912.02762), 2021. A survey.
