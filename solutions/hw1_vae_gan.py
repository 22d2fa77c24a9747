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
# # Homework 1: VAE, KL and GAN
#
# The notebook [*VAE and GAN: what they aim at, and why we go on*](../notebooks/01_vae_gan_recap.ipynb) derived the bound of a VAE, looked at the two directions of a KL divergence, and found what a discriminator measures. Here you take each of these one step further. You will practise
#
# - to write down a KL divergence for other Gaussians than the standard one;
# - to say exactly what "~L2" leaves out;
# - to tighten the bound, without an overflow;
# - to derive what a VAE loses because its encoder treats the latents as independent;
# - to read a divergence off a discriminator;
# - to differentiate a generator's loss by hand, and to see where it stops learning.
#
# | | you write | points | difficulty | minutes |
# |---|---|---|---|---|
# | 1 | `kl_to_prior` | 2 | ●○○○○ | 10 |
# | 2 | `reconstruction_nats` | 3 | ●●○○○ | 15 |
# | 3 | `bernoulli_bound` | 4 | ●●●○○ | 25 |
# | 4 | `nearest_diagonal` | 4 | ●●●●○ | 35 |
# | 5 | `js_from_logits` | 4 | ●●●○○ | 20 |
# | 6 | `generator_gradient` | 3 | ●●●○○ | 20 |
# | | | **20** | | **125** |
#
# **Symbols** are those of the notebook: the encoder answers to an image $x$ with $q(z\mid x) = \mathcal N(m, \mathrm{diag}\,s^2)$, and here we call this whole distribution the *code* of $x$; $\sigma^2$ is the variance of the decoder's $p(x\mid z)$; $\ell$ is a logit, of a pixel in exercise 3 and of a discriminator in 5 and 6, where $D = \mathrm{sigmoid}(\ell)$ is its probability of "real". All divergences are in nats. You need pen and paper for 2, 4, 5 and 6.

# %% [markdown]
# ## How it works
#
# Replace each `raise NotImplementedError` by your code, and run the cell below it. `hw.check` tries your function on a few cases and says ✓, or ✗ and what differs (or · while nothing is written yet); some mistakes it knows by sight. When all is right, the cell goes on and draws a figure with *your* function.
#
# - **Keep names, arguments and results as they are asked for.** Work in as many cells as you like, and write helpers if you want them; the six functions are found by their names.
# - **Hidden cases count too.** In each exercise 1 point is for cases like those that you can try here, with other numbers. The rest is for cases you have not seen: other shapes, a batch of one, float64, values at the edge of what is allowed.
# - **Leave inputs unchanged.** `x += 1` and functions that end in `_` change a tensor that is not yours.
# - **All floating-point arguments of a call have one dtype**, float32 or float64, and results have it too.
# - **Write the formulas out.** The course's kernels that do the same (`standard_kl`, `gaussian_kl`, `importance_bound`, `discriminator_loss`, …) are refused inside your functions. What PyTorch has, such as `softplus` or `logsumexp`, is welcome.
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

from dgm_course import data, gan, homework, vae
from dgm_course.checks import claim
from dgm_course.nets import ConvDecoder
from dgm_course.viz import plots, style

hw = homework.load("hw1")
g = torch.Generator().manual_seed(1)  # where all chance in the figures comes from

# %% [markdown]
# In this homework a digit is a row of $D = 784$ pixels in $[-1, 1]$. The figures of exercises 1, 2 and 4 use the linear model of the notebook's section 1.4, $x = Wz+b+\sigma\cdot$ noise, with $W$ along the principal axes of 10,000 digits. It is a VAE in which nothing has to be learned.

# %%
train, classes = data.images(data.load("mnist"))
digits, labels = data.images(data.load("mnist", "test"))
train, digits = train.flatten(1), digits.flatten(1)  # (10000, 784) and (2000, 784)
linear = vae.principal(train, 16, var=0.1)  # 16 latents


def as_images(x: Tensor) -> Tensor:
    """Rows of 784 pixels as images, (B, 1, 28, 28)."""
    return x.reshape(-1, 1, 28, 28)


# %% [markdown]
# ## 1. A prior of one's own (2 points)
#
# ●○○○○ · 10 minutes · read again: sections 1.2 and 2.1 of the notebook
#
# A VAE's prior need not be $\mathcal N(0, I)$. If the label is known, each class can have a prior of its own, which lies where its codes are. And in a VAE with several layers of latents, the "prior" of one layer is what the layer above predicts. So let the prior be any Gaussian with independent latents, $p(z) = \mathcal N(c, \mathrm{diag}\,\tau^2)$.
#
# **Write** `kl_to_prior(mean, log_var, prior_mean, prior_std)`, which gives $D_{KL}\bigl(q(z\mid x)\,\Vert\,p(z)\bigr)$ for each code $q = \mathcal N(m, \mathrm{diag}\,s^2)$.
#
# - `mean`, `log_var`: $m$ and $\log s^2$, (B, k), as encoders give them. `prior_mean`, `prior_std`: $c$ and $\tau$, (k,), the same for the whole batch. Mind that one is the log of a variance and the other a standard deviation.
# - Returns `kl`: (B,), in nats, for the vector $z$ as a whole.
#
# <details><summary>Hint</summary>
#
# $D_{KL} = \mathbb E_q[\log q(z)-\log p(z)]$, and the latents are independent in both. For one of them you need $\mathbb E_q(z-m)^2 = s^2$ and $\mathbb E_q(z-c)^2$, which is $s^2$ plus something. Two tests: with $c = 0$ and $\tau = 1$ it is the formula of section 1.2, and a code that equals the prior costs nothing.
#
# </details>


# %%
def kl_to_prior(mean: Tensor, log_var: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """KL from each code N(mean, diag exp(log_var)) to the prior N(prior_mean, diag prior_std²).

    Arguments:
        mean, log_var: Of the codes, (B, k).
        prior_mean, prior_std: Of the prior, (k,).

    Returns:
        Nats, (B,).
    """
    # BEGIN SOLUTION
    distance = (mean - prior_mean).square()
    spread = (log_var.exp() + distance) / prior_std.square()
    log_ratio = 2 * prior_std.log() - log_var
    return 0.5 * (spread - 1 + log_ratio).sum(1)
    # END SOLUTION


# %%
if hw.check(kl_to_prior):
    (mean, cov), codes = linear.posterior(digits), linear.posterior(train)[0]
    var = cov.diagonal()  # s², the same for every digit; here the latents are independent given x
    standard = kl_to_prior(mean, var.log().expand_as(mean), torch.zeros(16), torch.ones(16))
    own, draws = torch.empty_like(standard), []
    for c in range(10):
        centre, std = codes[classes == c].mean(0), (var + codes[classes == c].var(0, correction=0)).sqrt()
        here = labels == c
        own[here] = kl_to_prior(mean[here], var.log().expand_as(mean[here]), centre, std)
        draws.append(centre + std * torch.randn(16, generator=g))
    pictures = [
        as_images(z @ linear.weight.T + linear.bias) for z in (torch.randn(10, 16, generator=g), torch.stack(draws))
    ]
    plots.rows(pictures, labels=["N(0, I)", "by class"])
    both = {"N(0, I)": standard, "by class": own}
    lines = {name: torch.stack([kl[labels == c].mean() for c in range(10)]) for name, kl in both.items()}
    plots.curves(torch.arange(10), lines, "class", "nats for a code")
    claim("in each class its own prior costs less", (lines["by class"] < lines["N(0, I)"]).all())

# %% [markdown]
# **What to see.** Above: digits that the linear model draws from the prior $\mathcal N(0, I)$, and one from the prior of each class, 0 to 9. Below: what a code costs. Knowing the class saves about two nats in most classes and six for ones, which are all alike: their codes lie close together, and so does their prior.
#
# **Question.** The prior of a class was given the mean of its codes' means $m$, and the variance $\tau^2 =$ mean of $s^2$ + variance of $m$. Why is this the best choice, that is, the one with the smallest mean KL over the class? What would go wrong with $\tau^2 =$ mean of $s^2$ alone?
#
# <!-- BEGIN SOLUTION -->
# For one latent, the mean KL depends on the prior as $\frac12\bigl(\overline{s^2+(m-c)^2}/\tau^2+\log\tau^2\bigr)$, with a bar for the mean over the class. The derivative by $c$ vanishes at $c = \overline m$, that by $\tau^2$ at $\tau^2 = \overline{s^2}+\overline{(m-\overline m)^2}$: the variance within the codes *and* that between them. These are mean and variance of the mixture of all codes of the class. It is the nearest Gaussian in $D_{KL}(p\Vert q)$ of section 2.1 again: minimizing over the second argument matches moments. Without the part between the codes the prior is far too narrow, and nearly every code lies outside of it and pays for its distance, $(m-c)^2/\tau^2$. (For all digits together the best prior of this model is $\mathcal N(0, I)$ itself.)
# <!-- END SOLUTION -->

# %% [markdown]
# ## 2. What "~L2" leaves out (3 points)
#
# ●●○○○ · 15 minutes · read again: sections 1.3 and 1.6 of the notebook
#
# Beside the term $-\mathbb E_q[\log p(x\mid z)]$ the slide reads "~L2". For a Gaussian decoder, $p(x\mid z) = \mathcal N(\hat x, \sigma^2 I)$, it *is* the squared error, up to a factor and a constant. Both depend on $\sigma$, so $\sigma$ decides how much the squared error weighs beside the KL. Nobody has to guess it: for given reconstructions there is one best $\sigma^2$, the one that makes the images of the batch most probable ([Rybkin et al., 2021](https://arxiv.org/abs/2006.13202)).
#
# **Write** `reconstruction_nats(x, x_hat)`, which gives $-\log p(x\mid z)$ of each image at the one $\sigma^2$ that is best for the whole batch.
#
# - `x`, `x_hat`: the images and the decoder's means $\hat x$, both (B, …) with at least one dimension after B.
# - Returns `nats`: (B,). An image with D numbers in it has a density in D dimensions.
# - If all of `x_hat` equals `x`, raise a `ValueError` whose message names `x_hat`: then the smaller $\sigma$, the better, and there is no best. A single image without error is fine.
#
# <details><summary>Hint</summary>
#
# Write the sum of $-\log p$ over the batch as a function of $u = \sigma^2$, and set its derivative to 0. What comes out is a plain mean; say of what. Then put it into the density of each image. A test: the *mean* over the batch must be $\frac D2\log(2\pi e\,\sigma^2)$.
#
# </details>


# %%
def reconstruction_nats(x: Tensor, x_hat: Tensor) -> Tensor:
    """−log N(x; x̂, σ² I) of each image, at the σ² that is best for the batch.

    Arguments:
        x, x_hat: Images and what the decoder made of them, (B, …).

    Returns:
        Nats, (B,).

    Raises:
        ValueError: If there is no error anywhere.
    """
    # BEGIN SOLUTION
    missed = (x - x_hat).flatten(1).square()
    var = missed.mean()
    if var == 0:
        raise ValueError("x_hat must differ from x in some value; it is the same everywhere")
    constant = 0.5 * missed.shape[1] * torch.log(2 * math.pi * var)
    return missed.sum(1) / (2 * var) + constant
    # END SOLUTION


# %%
if hw.check(reconstruction_nats):
    models = {f"{k} latents": vae.principal(train, k, var=1e-6) for k in (2, 8, 32, 128)}
    found = {name: model.posterior(digits)[0] @ model.weight.T + model.bias for name, model in models.items()}
    nats = {name: reconstruction_nats(digits, x_hat) for name, x_hat in found.items()}
    order = nats["32 latents"].argsort()
    shown = torch.cat([order[:5], order[-5:]])
    plots.rows([as_images(x[shown]) for x in (digits, *found.values())], labels=["real", *found])
    var = torch.logspace(-1.9, 0.3, 20)

    def at_all(x_hat):
        return torch.stack([-vae.gaussian_log_prob(digits, x_hat, v.log()).mean() for v in var])

    lines = {name: at_all(x_hat) for name, x_hat in found.items()}
    figure = plots.curves(var, lines, "σ²", "nats for an image", logx=True)
    for name, x_hat in found.items():
        figure.axes[0].plot((digits - x_hat).square().mean(), nats[name].mean(), "o", color=style.EXACT)
    claim("no σ² is better than yours", all((line > nats[name].mean() - 0.1).all() for name, line in lines.items()))

# %% [markdown]
# **What to see.** Above: the five digits that cost least and the five that cost most with 32 latents, and what the linear model makes of them. Below: the mean over 2,000 digits, for each $\sigma^2$; the dots are yours. To the left of its dot a line shoots up, for such a decoder claims to be surer than it is. To the right it rises gently, and the lines come together: a decoder with a large $\sigma$ hardly cares which reconstruction is better. (Nats may be negative: a density is no probability, and may exceed 1.)
#
# **Question.** Some public code minimizes `mse_loss(x_hat, x) + kl.mean()`, with a mean over the pixels in the first term and a mean over the $k$ latents in the second, as if the two means cancelled. For which $\sigma^2$ is this the negative ELBO, up to a factor and a constant? No axis of the digits has a variance above 22. What becomes of the linear model with 16 latents?
#
# <!-- BEGIN SOLUTION -->
# Let $S$ be the sum of the squares and KL the sum over the latents. The code has $\frac1DS+\frac1k\mathrm{KL}$, which is $\frac1k\bigl(\frac kDS+\mathrm{KL}\bigr)$; the ELBO has $\frac1{2\sigma^2}S$. So $\sigma^2 = \frac D{2k}$: for 784 pixels and 16 latents 24.5, where the best values in the figure lie between 0.02 and 0.22. By the formula of section 1.6 an axis whose variance is below $\sigma^2$ gets length 0. Here that is every axis: all 16 latents collapse, and the model says the mean digit to everything. Sums in both terms are $\sigma^2 = \frac12$, which is far better and still not the best.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 3. A tighter bound for black and white (4 points)
#
# ●●●○○ · 25 minutes · read again: section 1.7 of the notebook
#
# For images with pixels 0 and 1 a Gaussian decoder makes no sense; each pixel is a coin. The decoder gives its logit, here by a linear map:
#
# $$p(x\mid z) = \prod_i \hat x_i^{x_i}(1-\hat x_i)^{1-x_i},\qquad \hat x = \mathrm{sigmoid}(\ell),\qquad \ell = Wz+b.$$
#
# With $K$ draws of $z$ from the encoder's $q(z\mid x)$ there is a bound that is tighter than the ELBO ([Burda et al., 2016](https://arxiv.org/abs/1509.00519)):
#
# $$\hat L_K = \log\frac1K\sum_{j=1}^K\frac{p(x\mid z_j)\,p(z_j)}{q(z_j\mid x)},\qquad z_j = m+s\,\epsilon_j,\qquad \mathbb E\,\hat L_K = L_K\le\log p(x).$$
#
# An image of 784 pixels has a probability around $e^{-200}$, which is 0 in float32. So the formula cannot be computed as it stands.
#
# **Write** `bernoulli_bound(x, mean, log_var, eps, weight, bias)`, which gives $\hat L_K$ for each image, for the prior $p(z) = \mathcal N(0, I)$.
#
# - `x`: (B, D), zeros and ones. `mean`, `log_var`: $m$ and $\log s^2$ of each image's code, (B, k). `eps`: the draws $\epsilon$, (K, B, k). `weight`, `bias`: $W$, (D, k), and $b$, (D,).
# - Returns `bound`: (B,), in nats. It must be finite wherever logits are a few hundred large, of either sign.
# - Work on whole tensors: the figure trains a small VAE with your function.
#
# <details><summary>Hint 1</summary>
#
# Stay with logarithms until the end: a log-weight of shape (K, B) for each draw and image, then `torch.logsumexp`. A sum is not yet a mean.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $\log\hat x = -\log(1+e^{-\ell})$ and $\log(1-\hat x) = -\log(1+e^{\ell})$. Show that $x\log\hat x+(1-x)\log(1-\hat x) = x\ell-\log(1+e^\ell)$. PyTorch has the last function under the name `softplus`, and its version does not overflow.
#
# </details>


# %% [markdown]
# *For the figure only.* It needs a VAE for black-and-white digits. `fit` trains one with two latents and a linear encoder, in a few seconds. Its loss is $-\hat L_1$, by your function. With two latents the evidence $\log p(x)$ can be had as well: by adding up $p(x\mid z)\,p(z)$ over a fine grid.


# %%
def fit(seen, steps=400):
    """A linear encoder and decoder with two latents, trained on the bound with K = 1."""
    torch.manual_seed(1)
    encoder, decoder = torch.nn.Linear(784, 4), torch.nn.Linear(2, 784)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.01)
    for _ in range(steps):
        x = seen[torch.randint(len(seen), (200,), generator=g)]
        eps = torch.randn(1, 200, 2, generator=g)
        loss = -bernoulli_bound(x, *encoder(x).chunk(2, dim=1), eps, decoder.weight, decoder.bias).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.requires_grad_(False), decoder.requires_grad_(False)


# %%
def log_evidence(x, decoder, side=7.0, points=161):
    """log p(x), by a sum of p(x given z) p(z) over a grid of z."""
    line = torch.linspace(-side, side, points)
    z = torch.cartesian_prod(line, line)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + 2 * math.log(2 * side / (points - 1))
    on, off = (torch.nn.functional.logsigmoid(sign * decoder(z)) for sign in (1, -1))
    return (x @ on.T + (1 - x) @ off.T + prior).logsumexp(1)


# %%
def bernoulli_bound(x: Tensor, mean: Tensor, log_var: Tensor, eps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """L_K, the bound on log p(x) from K weighted draws, for a linear decoder of black-and-white images.

    Arguments:
        x: Zeros and ones, (B, D).
        mean, log_var: Of q(z given x), (B, k).
        eps: Standard normal draws, (K, B, k).
        weight, bias: Of the decoder's logits, (D, k) and (D,).
    """
    # BEGIN SOLUTION
    z = mean + (0.5 * log_var).exp() * eps
    logits = z @ weight.T + bias
    fit = (x * logits - torch.nn.functional.softplus(logits)).sum(-1)
    prior_over_q = 0.5 * (eps.square() + log_var - z.square()).sum(-1)  # the 2π cancel, and (z − m)²/s² is ε²
    return torch.logsumexp(fit + prior_over_q, 0) - math.log(len(eps))
    # END SOLUTION


# %%
if hw.check(bernoulli_bound):
    encoder, decoder = fit((train > 0).float())
    seen = (digits[::50] > 0).float()
    mean, log_var = encoder(seen).chunk(2, dim=1)
    plots.rows([as_images(2 * x[:10] - 1) for x in (seen, decoder(mean).sigmoid())], labels=["seen", "decoded"])
    eps, counts = torch.randn(256, len(seen), 2, generator=g), [1, 4, 16, 64, 256]

    def bound(part):
        return bernoulli_bound(seen, mean, log_var, part, decoder.weight, decoder.bias).mean()

    bounds = torch.stack([torch.stack([bound(part) for part in eps.split(k)]).mean() for k in counts])
    exact = log_evidence(seen, decoder).mean()
    lines = {"bound": bounds, "log p(x)": exact.expand(len(counts))}
    plots.curves(torch.tensor(counts), lines, "K", "nats", logx=True, colors={"log p(x)": style.EXACT})
    claim("the bound rises with K", (bounds.diff() > 0).all())
    claim("with 256 draws a quarter of the ELBO's gap, or less, is left", exact - bounds[-1] < (exact - bounds[0]) / 4)

# %% [markdown]
# **What to see.** Above: digits in black and white, and what is left of them after two latents. Below: the mean over 40 digits. All points were computed from the same 256 draws, in groups of K. At K = 1 the bound is the ELBO; with more draws it climbs towards the evidence.
#
# **Question.** The rise of the line in the figure is no matter of luck: with the same draws, in larger groups, it cannot fall. Why?
#
# <!-- BEGIN SOLUTION -->
# Let $a$ and $b$ be the mean weights of two groups of $K$. For the group of $2K$ that they form together, the mean weight is $\frac12(a+b)$. The logarithm is concave, so $\log\frac12(a+b)\ge\frac12(\log a+\log b)$: the value of the joint group is at least the mean of the two values. With equality only if $a = b$. This is Jensen's inequality, the same step that made the ELBO a bound, and in expectation it gives $L_1\le L_K\le L_{2K}\le\log p(x)$.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 4. What independent latents cost (4 points)
#
# ●●●●○ · 35 minutes · read again: sections 1.2, 1.4, 2.1 and 2.2 of the notebook
#
# An encoder gives each latent a mean and a variance, and no correlations: $q$ is a Gaussian with a *diagonal* covariance. The true posterior $p(z\mid x)$ as a rule has correlations. How close can $q$ come, and which variances does it get? That depends on which of the two KL divergences is made small. This is the lecture's question about framing, and for Gaussians it has an exact answer.
#
# Let $p = \mathcal N(m, C)$ with any covariance $C$, and $q = \mathcal N(m, \mathrm{diag}(v_1,\dots,v_k))$. (The best mean is that of $p$ in both directions.)
#
# **Write** `nearest_diagonal(cov, first)`, which gives the best $v$ and the divergence that remains.
#
# - `cov`: covariances $C$, (B, k, k), symmetric and positive definite. `first`: `"p"` to minimize $D_{KL}(p\Vert q)$, `"q"` to minimize $D_{KL}(q\Vert p)$.
# - Returns `(var, nats)`: the variances $v$, (B, k), and the divergence at the minimum, (B,).
# - k may be 1, and may be 40 with variances of a thousandth: then $\det C$ is too small for float32.
#
# <details><summary>Hint 1</summary>
#
# Start from the KL of two Gaussians with the same mean, $\frac12\bigl(\mathrm{tr}\,C_2^{-1}C_1-k+\log\det C_2-\log\det C_1\bigr)$ with the first argument's covariance $C_1$. Put in $C$ and $\mathrm{diag}(v)$, in both orders. Each time it is a sum of terms with one $v_i$ each: set the derivative by $v_i$ to 0. At the minimum the trace has a simple value.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# In one of the directions the inverse of $C$ comes in, by its diagonal. This is not one over the diagonal of $C$: try $k = 2$. For logarithms of determinants there is `torch.linalg.slogdet`.
#
# </details>


# %% [markdown]
# *For the figure only.* Take the linear model with its 16 latents. Its posterior has the same covariance for every digit, $\sigma^2(W^\top W+\sigma^2I)^{-1}$. Now turn the latents: $WR$ in the place of $W$, with a rotation $R$. As $WR(WR)^\top = WW^\top$, the digits are exactly as probable as before. But the posterior's covariance becomes $R^\top CR$.


# %%
def turned(cov, angles):
    """The covariances R^T C R for rotations that go on and on in one direction, and these rotations."""
    turn = torch.randn(cov.shape, generator=g, dtype=cov.dtype)
    turn = (turn - turn.T) / (turn - turn.T).norm() * math.sqrt(2)
    rotations = torch.matrix_exp(angles[:, None, None] * turn)
    turned = rotations.mT @ cov @ rotations
    return (turned + turned.mT) / 2, rotations


def draw_both(cov, ax):
    """A Gaussian in the plane, and one standard deviation of the two that are nearest."""
    density = torch.distributions.MultivariateNormal(torch.zeros(2), cov.float())
    size = 3 * cov.diagonal().max().sqrt().item()
    plots.density(density.log_prob, extent=(-size, size, -size, size), ax=ax)
    angle = torch.linspace(0, 2 * math.pi, 100)
    for first, color, name in (("p", style.MODEL, "KL(p‖q)"), ("q", style.GUIDED, "KL(q‖p)")):
        a, b = nearest_diagonal(cov[None], first)[0][0].sqrt()
        ax.plot(a * angle.cos(), b * angle.sin(), color=color, label=name)
    ax.legend(loc="upper right")


# %%
def nearest_diagonal(cov: Tensor, first: str) -> tuple[Tensor, Tensor]:
    """The Gaussian without correlations that is nearest to N(m, cov), and how near it is.

    Arguments:
        cov: Covariances, (B, k, k).
        first: "p" for KL(p‖q), "q" for KL(q‖p), where q is the one without correlations.

    Returns:
        Its variances, (B, k), and the KL, (B,).
    """
    # BEGIN SOLUTION
    log_det = torch.linalg.slogdet(cov).logabsdet
    if first == "p":
        var = cov.diagonal(dim1=1, dim2=2).clone()
        return var, 0.5 * (var.log().sum(1) - log_det)
    var = 1 / cov.inverse().diagonal(dim1=1, dim2=2)
    return var, 0.5 * (log_det - var.log().sum(1))
    # END SOLUTION


# %%
if hw.check(nearest_diagonal):
    cov, angles = linear.posterior(digits[:1])[1].double(), torch.linspace(0, 3, 31, dtype=torch.float64)
    covs, rotations = turned(cov, angles)
    other = linear.weight @ rotations[-1].float()
    axes = [as_images(w.T[:10] / w.abs().max()) for w in (linear.weight, other)]
    plots.rows(axes, labels=["W", "W turned"])
    both = {"KL(q‖p)": nearest_diagonal(covs, "q")[1], "KL(p‖q)": nearest_diagonal(covs, "p")[1]}
    colors = {"KL(q‖p)": style.GUIDED, "KL(p‖q)": style.MODEL}
    plots.curves(angles, both, "angle of the rotation", "nats", colors=colors)
    half = math.sqrt(0.5) * torch.tensor([[1, 1], [-1, 1]], dtype=torch.float64)
    figure, (ax,) = plots.panels(1, width=4.2, height=4.0)
    draw_both(half.T @ cov[[0, 15]][:, [0, 15]] @ half, ax)
    evidence = [vae.LinearGaussian(w, linear.bias, 0.1).log_evidence(digits[:50]) for w in (linear.weight, other)]
    claim("turned or not, the digits are as probable", torch.allclose(*evidence, rtol=1e-3))
    claim("turning costs a diagonal encoder half a nat or more", both["KL(q‖p)"][-1] > 0.5 + both["KL(q‖p)"][0])

# %% [markdown]
# **What to see.** Above: ten of the 16 columns of $W$, principal axes of the digits, and the same after the last rotation. The two models are equally good; but in the middle figure the second costs an encoder without correlations about a nat for every digit, in either direction. Below: the posterior of the first and the last latent, turned by 45°, and a circle of one standard deviation for each of the two nearest $q$. In $D_{KL}(p\Vert q)$ the nearest $q$ covers $p$ and puts mass where $p$ has none; in $D_{KL}(q\Vert p)$, which is what a VAE minimizes, it stays inside and is much too sure.
#
# **Question.** Which of all these equally probable models does a VAE with a diagonal encoder end up with? Use ELBO $= \log p(x)-D_{KL}\bigl(q(z\mid x)\Vert p(z\mid x)\bigr)$.
#
# <!-- BEGIN SOLUTION -->
# The first term is the same for all rotations, so the ELBO is largest where the smallest possible KL is smallest. That KL, your second value for "q", is 0 where $C$ is diagonal and positive elsewhere. And $C$ is diagonal where $W^\top W$ is, so the columns of $W$ are orthogonal: these are the principal axes. So the likelihood alone cannot tell the rotations apart, but the encoder's lack of correlations does, and a VAE finds principal axes "by accident" ([Rolínek et al., 2019](https://arxiv.org/abs/1812.06775); [Lucas et al., 2019](https://arxiv.org/abs/1911.02469), show it for the linear model).
# <!-- END SOLUTION -->

# %% [markdown]
# ## 5. A divergence from a discriminator (4 points)
#
# ●●●○○ · 20 minutes · read again: sections 2.3, 3.1 and 3.2 of the notebook
#
# The best discriminator has the logit $\log p(x)-\log q(x)$, where $p$ is the density of the real samples and $q$ that of the generated ones. So a trained discriminator tells how far $q$ is from $p$, though nobody knows either of them. But the formula supposes that it saw as many real samples as generated ones. Suppose a share $\pi$ of what it saw was real, and it minimized the cross-entropy over all of it. (Real data are scarce, generated samples are not.)
#
# **Write** `js_from_logits(real, fake, share)`, which estimates the Jensen–Shannon divergence of $p$ and $q$ from such a discriminator's logits:
#
# $$JS(p, q) = \tfrac12\,\mathbb E_p\Bigl[\log\frac{p}{\frac12(p+q)}\Bigr]+\tfrac12\,\mathbb E_q\Bigl[\log\frac{q}{\frac12(p+q)}\Bigr].$$
#
# - `real`: logits at N real samples, (R, N). `fake`: logits at M generated samples, (R, M). Each of the R rows belongs to a discriminator of its own, and its $\pi$ is in `share`, (R,), between 0 and 1. N and M may differ.
# - Returns `js`: (R,), in nats, an expectation being estimated by the mean over its samples. It must be finite for logits of several hundred.
#
# <details><summary>Hint 1</summary>
#
# What is the probability that $x$ is real, by Bayes' rule, if real samples have the share $\pi$? Write its logit. What must be subtracted to get $r = \log p-\log q$?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $p/(p+q) = \mathrm{sigmoid}(r)$. Take care of the factor 2 in the logarithms, and write $\log\mathrm{sigmoid}$ by `softplus`. Two tests: all $r = 0$ gives 0; no value can exceed $\log 2$.
#
# </details>


# %% [markdown]
# *For the figure only.* There $p$ are 100 threes and $q$ are 900 eights, and Gaussian noise is added to all of them. Images with noise are a mixture of Gaussians, one around each image. So here the best discriminator is known: which of the two sets an $x$ comes from is a matter of how near it lies to their members. It saw nine eights for each three, $\pi = 0.1$.

# %%
threes, eights = train[classes == 3][:100], train[classes == 8][:900]


def nearness(x, images, std):
    """The log of the sum of the densities that the images with noise have at x, up to a constant."""
    return (-((torch.cdist(x, images) / std) ** 2) / 2).logsumexp(1)


def noisy(images, std):
    """1,000 of the images, with noise."""
    x = images.repeat(1000 // len(images) + 1, 1)[:1000]
    return x + std * torch.randn(x.shape, generator=g)


# %%
def js_from_logits(real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """The Jensen–Shannon divergence of real and generated samples, from discriminators' logits.

    Arguments:
        real, fake: Logits at real and at generated samples, (R, N) and (R, M).
        share: Which part of the samples in each discriminator's training was real, (R,).
    """
    # BEGIN SOLUTION
    prior_odds = torch.logit(share)[:, None]
    softplus = torch.nn.functional.softplus
    at_real = softplus(prior_odds - real).mean(1)  # −log p/(p + q)
    at_fake = softplus(fake - prior_odds).mean(1)  # −log q/(p + q)
    return math.log(2) - 0.5 * (at_real + at_fake)
    # END SOLUTION


# %%
if hw.check(js_from_logits):
    stds = [0.5, 1, 2, 3, 4, 6, 8, 16]
    clouds = [(noisy(threes, std), noisy(eights, std)) for std in stds]
    seen = [torch.stack([x[0] for x in pair]) / (0.5 + 2 * std) for std, pair in zip(stds, clouds, strict=True)]
    title = "a three and an eight with noise of standard deviation …"
    plots.film([as_images(pair) for pair in seen], times=[f"{std:g}" for std in stds], title=title)

    def estimate(said, blur=1):
        logits = []
        for std, pair in zip(stds, clouds, strict=True):
            logits.append([nearness(x, threes, blur * std) - nearness(x, eights, blur * std) for x in pair])
        return js_from_logits(*map(torch.stack, zip(*logits, strict=True)), torch.full((8,), said))

    lines = {"the best": estimate(0.1), "for twice the noise": estimate(0.1, blur=2), "π ignored": estimate(0.5)}
    plots.curves(torch.tensor(stds), lines, "standard deviation of the noise", "estimate of JS, in nats", logx=True)
    best, blurred, wrong = lines.values()
    claim("with little noise JS is log 2", (best[:2] - math.log(2)).abs().max() < 1e-3)
    claim("with much noise less than a tenth is left", best[-1] < math.log(2) / 10)
    claim("any other discriminator gives less", (blurred[3:6] < best[3:6]).all() and (wrong[3:] < best[3:]).all())

# %% [markdown]
# **What to see.** Above: what the discriminators see, drawn paler, so that it fits. Below: while there is little noise, threes and eights do not overlap at all, and JS is $\log 2$, its largest value. It falls as the noise grows and the two clouds mix. The second line is from a discriminator that is the best one for twice the noise. In the third, the share $\pi$ of the threes was ignored: nonsense, even below 0.
#
# **Question.** The discriminator for twice the noise gives a smaller value than the best one. Show that *every* discriminator does, up to chance. And what does the flat beginning of the best line mean for a generator that learns from it?
#
# <!-- BEGIN SOLUTION -->
# For any function $r(x)$, $\mathbb E_p\log\mathrm{sigmoid}(r)+\mathbb E_q\log(1-\mathrm{sigmoid}(r))$ is minus a cross-entropy. At each $x$ it is largest where the sigmoid is the true share $p/(p+q)$, and there it is $2\,JS-\log 4$. So $\log 2-\frac12(\dots)$ of any other $r$ is below JS: an estimate from samples that the discriminator was not trained on is a lower bound, up to the error of the means. (On its own training samples it may be too large: it may know them by heart.) Where the line is flat, $q$ may come closer to $p$ without JS becoming smaller: as long as they do not overlap, the best discriminator gives the generator no direction. Noise makes the two overlap and the divergence fall smoothly. This is one way to see why diffusion models look at data through noise, from much to little.
# <!-- END SOLUTION -->

# %% [markdown]
# ## 6. Where the generator stops learning (3 points)
#
# ●●●○○ · 20 minutes · read again: section 3.3 of the notebook
#
# All that a generator learns from is a gradient: in which direction should each of its samples move? Take a discriminator with one hidden layer, $\ell(x) = \sum_j a_j\tanh(V_j\cdot x+b_j)$, and three losses for the generator, each a mean over a batch of its samples:
#
# | `loss` | is the mean of | |
# |---|---|---|
# | `"saturating"` | $\log(1-D)$ | the slide's |
# | `"non-saturating"` | $-\log D$ | what is used in practice |
# | `"least squares"` | $(\ell-1)^2$ | no sigmoid; label 1 is "real" ([Mao et al., 2017](https://arxiv.org/abs/1611.04076)) |
#
# **Write** `generator_gradient(x, weight, bias, head, loss)`, which gives the gradient of the loss with respect to each sample. Do it by hand; autograd is for checking it.
#
# - `x`: samples, (B, d). `weight`, `bias`, `head`: $V$, (H, d), $b$, (H,), and $a$, (H,). `loss`: one of the three names.
# - Returns `gradient`: (B, d). It must be finite where $D$ rounds to 0 or 1.
#
# <details><summary>Hint</summary>
#
# Two factors: the derivative of the loss by $\ell$, and the gradient of $\ell$ by $x$. For the first, $D' = D(1-D)$; cancel on paper before you code, or you will divide 0 by 0. For the second, $\tanh' = 1-\tanh^2$. And the loss is a mean.
#
# </details>


# %% [markdown]
# *For the figure only.* It shows the start of a GAN on digits: the generator is not trained yet, and the discriminator learns to find it out.


# %%
def untrained(count):
    """What a generator draws before it has learned anything, in rows."""
    torch.manual_seed(1)
    return ConvDecoder(16).requires_grad_(False)(torch.randn(count, 16, generator=g)).flatten(1)


def judge(x, weight, bias, head):
    """The discriminator's logits."""
    return torch.tanh(x @ weight.T + bias) @ head


# %%
def learning(real, fake, steps):
    """Train a discriminator of 64 units; yields its weight, bias and head before each step."""
    weight, bias = 0.01 * torch.randn(64, 784, generator=g), torch.zeros(64)
    net = [weight, bias, 0.1 * torch.randn(64, generator=g)]
    optimizer = torch.optim.Adam([part.requires_grad_() for part in net], lr=1e-3)
    for _ in range(steps):
        yield [part.detach().clone() for part in net]
        pair = (x[torch.randint(len(x), (100,), generator=g)] for x in (real, fake))
        loss = gan.discriminator_loss(*(judge(x, *net) for x in pair))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# %%
def generator_gradient(x: Tensor, weight: Tensor, bias: Tensor, head: Tensor, loss: str) -> Tensor:
    """The gradient of the generator's loss by each of its samples, for a discriminator with one hidden layer.

    Arguments:
        x: Generated samples, (B, d).
        weight, bias, head: V, (H, d), b, (H,), and a, (H,), of the discriminator.
        loss: "saturating", "non-saturating" or "least squares".
    """
    # BEGIN SOLUTION
    hidden = torch.tanh(x @ weight.T + bias)
    logit = hidden @ head
    if loss == "saturating":
        by_logit = -torch.sigmoid(logit)
    elif loss == "non-saturating":
        by_logit = -torch.sigmoid(-logit)
    else:
        by_logit = 2 * (logit - 1)
    slope = ((1 - hidden**2) * head) @ weight
    return by_logit[:, None] * slope / len(x)
    # END SOLUTION


# %%
if hw.check(generator_gradient):
    fake, losses, sizes = untrained(1000), ["saturating", "non-saturating", "least squares"], []
    for net in learning(train, fake, 101):
        gradients = [100 * generator_gradient(fake[:100], *net, loss) for loss in losses]
        sizes.append(torch.stack([each.norm(dim=1).mean() for each in gradients]))
    lines = dict(zip(losses, torch.stack(sizes, 1), strict=True))
    plots.curves(torch.arange(101), lines, "steps of the discriminator", "length of a sample's gradient", logy=True)
    walks = {loss: [fake[:1]] for loss in losses[:2]}
    for loss, walk in walks.items():
        for _ in range(300):
            walk.append((walk[-1] - 2 * generator_gradient(walk[-1], *net, loss)).clamp(-1, 1))
    plots.rows([as_images(torch.cat(walk[::33])) for walk in walks.values()], labels=list(walks))
    stuck, free = (judge(walk[-1], *net).sigmoid().item() for walk in walks.values())
    slides = lines["saturating"]
    claim("the saturating gradient falls to a hundredth or less", slides[-1] < slides[0] / 100)
    claim("a sample comes to D > 0.9 with one loss, and stays at D < 0.05 with the other", stuck < 0.05 < 0.9 < free)


# %% [markdown]
# **What to see.** Above: within a hundred steps the discriminator is sure that these samples are fakes. The slide's gradient vanishes together with $D$; the other two stay. Below: one sample of the untrained generator, which walks against its gradient for 300 steps while the discriminator stands still. With the slide's loss it does not move. With the other it moves until the discriminator takes it for real.
#
# **Question.** The last image of the lower row has $D > 0.9$, and it is no digit. What has gone wrong, and what does a GAN do about it?
#
# <!-- BEGIN SOLUTION -->
# Nothing in the gradient: it did what was asked and made $\ell$ large. But the discriminator has seen digits and the untrained generator's noise only. Between and beyond them it was never told anything, and along its gradient an image soon gets there, where "less like that noise" already counts as real. In a GAN the discriminator does not stand still: it is trained on the new samples, finds them out too, and its gradient turns towards what still tells them from digits. That is why the two players take turns in small steps, and why neither loss says how good the samples are.
# <!-- END SOLUTION -->

# %% [markdown]
# ## Recap
#
# - The KL of two Gaussians is the mean over the *first* one: its log-variance has the minus sign, and the second one's variance divides. The best second argument has the moments of the first.
# - "~L2" is the squared error over $2\sigma^2$, and $\sigma^2$ belongs to the model: the best one is the mean squared error. A mean over pixels where a sum belongs is a hidden $\sigma^2$, far too large.
# - More draws inside the logarithm tighten the bound. Logarithms stay logarithms until the last line.
# - A diagonal $q$ is too wide in one direction of the KL and too narrow in the other. What it loses turns a VAE's latents towards principal axes.
# - A discriminator's logit is a log-ratio of densities plus the log-odds of the classes. It gives a lower bound of JS, at most $\log 2$.
# - A generator learns from the gradient, not from the loss. The slide's loss has none where the discriminator is sure.
#
# **Pitfalls**
#
# - $\log s^2$, $s^2$ or $s$: say which of them an encoder gives, and which one a formula wants.
# - The two arguments of a KL divergence are not alike. Name the one that the mean is over.
# - A sum over pixels and latents, a mean over images.
# - $\log$ of a sigmoid, of a sum of exponentials, of a determinant: each has a form that neither overflows nor rounds to 0.
#
# ## Hand in
#
# Restart the kernel, run all cells, and look for the six lines with ✓ and the name of a function. (The other lines with ✓ are claims about the figures.) Save, and hand in this file as it is: `hw1_vae_gan.ipynb`. Functions are found by name, so do not rename them. An exercise that you did not finish may stay as it is; it costs its own points and no others.
