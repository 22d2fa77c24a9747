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
# # Parameter-efficient fine-tuning: one base, many users
#
# A model was trained once, at great cost. Now each of a million users wants it a little different. This notebook is about the "little". At the end of it you will be able to
#
# - write LoRA for a linear layer, a convolution and an attention, and say why it starts as the model it tunes, and which of its two factors moves first;
# - merge an update into a model, take it out again bit for bit, keep several of them on one base, and send one as a file that knows its base;
# - measure how low the rank of a full fine-tune's update is, and say what that does and does not prove;
# - say exactly in which sense LoRA's $\alpha$ is a learning rate, under SGD and under Adam;
# - put adapters into a transformer, and say why they cannot be merged;
# - write prefix tuning, get its mask right, and say why no prefix starts as the identity;
# - tune a diffusion transformer to a user's hand from a hundred images, and a language model to code, and say what each method costs a user and what the base forgets;
# - say of flow, diffusion, GAN and VAE what in them is exact, what is a bound and what is approximate, and name the cell of this course that shows it.
#
# **Time:** three hours to read, with pen and paper; it runs in less than a minute on one core.
# **It builds on** [notebook 04](04_schedules_and_backbones.ipynb): attention, the diffusion transformer (DiT), the Fréchet distance; and on [notebook 03](03_ddpm.ipynb): the loss. Section 9 looks back on all notebooks.
# **Symbols** are those of the lecture; the README's [symbol ledger](../README.md#symbols) lists them all. Up to section 8 some letters mean something else, as in the papers. $\alpha$ is a number that scales LoRA, not the factor of $x_0$. $s$ is a scale, not a time. $\eta$ is a learning rate, $\sigma_i$ a singular value. $d\times k$ is the shape of a weight, and $x$ is what goes into a layer.

# %%
import importlib.util

if importlib.util.find_spec("dgm_course") is None:  # Colab, or a fresh environment
    get_ipython().run_line_magic("pip", "install --quiet dgm-course")

# %%
import copy
import inspect
import json
import math
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.patches import Circle, FancyBboxPatch
from torch import nn

from dgm_course import checkpoints, data, likelihood, losses, peft, personal, samplers, tables, toy, training
from dgm_course.checks import claim, show_source
from dgm_course.data import hands
from dgm_course.denoisers import clipped
from dgm_course.nets.dit import Attention, attention_maps
from dgm_course.nets.language import generate, later
from dgm_course.paths import Cosine
from dgm_course.viz import plots, style, widgets

# %%
g = torch.Generator().manual_seed(0)  # where nearly all chance comes from
double = torch.float64
base = checkpoints.load("mnist-dit")  # a diffusion transformer that draws digits


def normal(*shape):
    return torch.randn(*shape, generator=g, dtype=double)


def count(parameters):
    return sum(p.numel() for p in parameters)


# %% [markdown]
# ## 1. A model for each user
#
# ### 1.1 What a user costs
#
# "To finetune the model to a particular task is very cumbersome", says the slide, and another: "If we want to deploy a personalized large language model, we need to separately deploy each model for each user." *Fine-tuning* means to go on training a trained model, the *base*, on a few data of one's own. Let us count what that costs for the course's diffusion transformer, which is tiny.

# %%
size = count(base.net.parameters())
print(f"the base:                       {size:9,} numbers, {4 * size / 1e6:.1f} MB in float32")
print(f"a model for each of a million:  {4 * size / 1e6:9.1f} TB")
print(f"the same for 7 billion numbers: {2 * 7e9 * 1e6 / 1e15:9.0f} PB, in float16")

# %% [markdown]
# The numbers of all users are nearly the same numbers, for all users start from one base. So write a user's weights as
#
# $$W_{user} = W_0+\Delta W,$$
#
# keep $W_0$ once, and look for a $\Delta W$ that takes few numbers to write down. That is the whole idea. There are three families: low-rank updates (LoRA), adapters, prefixes.
#
# **What is saved.** Storage: a user's file is small. Memory while training: a gradient and Adam's two running means, three numbers for each parameter, are needed only for the *trained* ones. Memory while serving: one base, whatever the number of users.
#
# **What is not.** The slide calls these methods "model compressions". *Is anything compressed?* The base is as large as before, and a user's file alone can draw nothing. What is small is the *difference*. Nor is there much less to compute. Each step of training still runs through the whole base, forwards and back. Only the gradients of the frozen weights themselves fall away, about a third of the work.
#
# ### 1.2 Three ways into one block
#
# The lecture shows a figure of the transformer block and of where each method sits in it. Here it is for the blocks of this course, drawn anew. Solid boxes are the base and stay frozen. Dashed ones are new, and only they are trained. *Follow one token upwards: what does each method change for it?*


# %%
def box(ax, x, y, text, width=1.5, height=0.62, color=None):
    """A box about (x, y): grey and solid for the base, coloured and dashed for what is added."""
    look = {"fc": "#F1F1F1", "ec": "#777777", "lw": 1.2} if color is None else {"fc": "white", "ec": color, "lw": 1.8}
    corner, dashes = (x - width / 2, y - height / 2), "--" if color else "-"
    look |= {"boxstyle": "round,pad=0,rounding_size=0.12", "ls": dashes, "zorder": 2}
    ax.add_patch(FancyBboxPatch(corner, width, height, **look))
    ax.text(x, y, text, ha="center", va="center", color=color or "#222222", size=11, zorder=3)


def way(ax, *points, color="#777777"):
    """A line through the points, with an arrow at its end."""
    for a, b in zip(points[:-2], points[1:-1], strict=True):
        ax.plot(*zip(a, b, strict=True), color=color, lw=1.2, zorder=1)
    look = {"arrowstyle": "-|>", "color": color, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", points[-1], points[-2], arrowprops=look, zorder=1)


# %%
def branch_of_attention(ax):
    lora, prefix = style.DATA, style.GUIDED
    box(ax, 4.6, 1.0, "norm")
    for x, name in ((2.6, "$W_q$"), (4.6, "$W_k$"), (6.6, "$W_v$")):
        way(ax, (4.6, 1.31), (4.6, 1.65), (x, 1.65), (x, 2.04))
        box(ax, x, 2.35, name, 0.9)
        way(ax, (x, 2.66), (x, 4.39))
    for x in (2.6, 6.6):  # LoRA beside the queries and the values, as in its paper
        way(ax, (x, 1.65), (x + 0.95, 1.65), (x + 0.95, 2.04), color=lora)
        box(ax, x + 0.95, 2.35, "$A, B$", 0.75, color=lora)
        way(ax, (x + 0.95, 2.66), (x + 0.95, 2.95), (x, 2.95), color=lora)
    for x, name in ((4.6, "$P_K$"), (6.6, "$P_V$")):
        box(ax, x - 1.0, 3.65, name, 0.75, color=prefix)
        way(ax, (x - 0.62, 3.65), (x, 3.65), color=prefix)
    box(ax, 4.6, 4.7, "softmax$(QK^{\\top}/\\sqrt{d})\\;V$", 4.9)
    way(ax, (4.6, 5.01), (4.6, 5.34))
    box(ax, 4.6, 5.65, "$W_o$", 0.9)
    way(ax, (4.6, 5.96), (4.6, 6.29))


# %%
def block():
    made, (ax,) = plots.panels(1, width=7.6, height=7.6)
    made.alt = "a transformer block with the places of LoRA, prefix and adapters"
    branch_of_attention(ax)
    for y in (6.6, 10.6):
        box(ax, 4.6, y, "adapter", 2.0, color=style.MODEL)
        way(ax, (4.6, y + 0.31), (4.6, y + 0.8), (1.18, y + 0.8))
        ax.add_patch(Circle((1.0, y + 0.8), 0.18, fc="white", ec="#777777", lw=1.2, zorder=3))
        ax.text(1.0, y + 0.78, "+", ha="center", va="center", size=13, zorder=4)
    box(ax, 4.6, 8.4, "norm")
    box(ax, 4.6, 9.5, "perceptron", 2.6)
    for points in (((4.6, 8.71), (4.6, 9.19)), ((4.6, 9.81), (4.6, 10.29)), ((1.0, 7.58), (1.0, 11.22))):
        way(ax, *points)
    way(ax, (1.0, -0.1), (1.0, 7.22))
    way(ax, (1.0, 0.3), (4.6, 0.3), (4.6, 0.69))
    way(ax, (1.0, 7.8), (4.6, 7.8), (4.6, 8.09))
    way(ax, (1.0, 11.58), (1.0, 12.1))
    return made, ax


# %%
made, ax = block()
ax.text(1.15, -0.1, "h", size=13, style="italic")
for x, y, text, color in (
    (8.15, 2.35, "LoRA: $W x$ becomes\n$W x + \\frac{\\alpha}{r}\\,BAx$", style.DATA),
    (8.15, 3.65, "prefix: more keys\nand values", style.GUIDED),
    (5.85, 6.6, "the same\n(Houlsby only)", style.MODEL),
    (5.85, 10.6, "adapter: a small detour\n(Houlsby and Pfeiffer)", style.MODEL),
):
    ax.text(x, y, text, color=color, va="center", size=11)
ax.set(xlim=(0.4, 11.2), ylim=(-0.3, 12.2), aspect="equal")
ax.axis("off")
made

# %% [markdown]
# **LoRA** runs beside a weight, and changes what is computed *from* a token. A **prefix** gives all tokens something more to look *at*. An **adapter** stands in the way of what a branch has to say, and changes it *after* the fact. On the stream at the left, which adds everything up, nothing new stands.
#
# Two things are not in the figure. LoRA may sit beside any weight, those of the perceptron, too. And a DiT scales and shifts what leaves a norm, and gates both branches; the layer that computes these numbers from time and label is called `modulation` (notebook 04, section 3.3).
#
# ## 2. LoRA
#
# ### 2.1 The equation, line by line
#
# The slide's formula:
#
# $$h = W_0x+\frac\alpha r\,BA\,x,\qquad B\in\mathbb R^{d\times r},\quad A\in\mathbb R^{r\times k}.$$
#
# - $W_0\in\mathbb R^{d\times k}$ is the base's weight: $k$ numbers $x$ in, $d$ numbers $h$ out. It stays as it is.
# - $Ax$ is $r$ numbers. $A$ decides what the update looks at.
# - $B$ makes $d$ numbers of them. It decides what the update says.
# - $\alpha/r$ is a fixed number. We call it $s$; section 4 is about it.
# - $\Delta W = sBA$ is a matrix of the shape of $W_0$, but of **rank at most $r$**: each of its rows is a mixture of the $r$ rows of $A$.
#
# (The slide text reads $A\in\mathbb R^{r\times d}$. That is right for a square weight, $k = d$. It also puts "(gradient)" behind the adaptation weight. $\Delta W$ is no gradient. It is the sum of all steps of a training, of which each was taken at another place.)
#
# $A$ and $B$ have $r(d+k)$ numbers where $\Delta W$ has $dk$. *When is this a saving?* For $r<dk/(d+k)$: for a square matrix, up to half of its side.
#
# In code (`kept` belongs to section 2.4, the sum over names and their weights $w$ to 2.5):

# %%
show_source(peft.LoRA.forward)

# %%
layer = peft.LoRA(nn.Linear(6, 4)).double()  # k = 6, d = 4
layer.add("mine", rank=2, alpha=3.0, generator=g)
x = normal(5, 6)
claim("at the start the layer is its base, exactly", torch.equal(layer(x), layer.base(x)))
A, B = layer.down["mine"].weight.data, layer.up["mine"].weight.data
B.copy_(normal(4, 2))
by_hand = x @ (layer.base.weight + 3.0 / 2 * B @ A).T + layer.base.bias
claim("h = (W_0 + α/r BA) x + b, to 1e-12", (layer(x) - by_hand).abs().max() < 1e-12)
claim("ΔW has rank 2, at most r", torch.linalg.matrix_rank(layer.update()) == 2)
claim("A and B have r(d + k) = 20 numbers, where ΔW has 24", A.numel() + B.numel() == 2 * (4 + 6) == 20)

# %% [markdown]
# ### 2.2 The start, and the first step
#
# $A$ begins as Gaussian noise and $B$ as zero. So $\Delta W = 0$, and "the model is initialized to be identical to the pretrained weights", as the slide says. *But if $BA = 0$, how can it learn? And why not the other way round, or both zero?*
#
# Let $G = \partial L/\partial W$ be the gradient of the loss in the weight, a $d\times k$ matrix, taken at $W = W_0+sBA$. It is what full fine-tuning would follow. By the chain rule
#
# $$\frac{\partial L}{\partial B} = s\,G A^\top,\qquad\frac{\partial L}{\partial A} = s\,B^\top G.$$
#
# At the start $B = 0$, so $\partial L/\partial A = 0$ and $\partial L/\partial B = sGA^\top\ne0$. **In the first step only $B$ moves.** In the second, $B$ is no longer zero, and $A$ moves, too. With $A = 0$ and $B$ Gaussian it would be the other way round. With both zero *neither* ever moves. With both Gaussian both move, but the start is another model.

# %%
W0, D_goal, x = normal(4, 6), normal(4, 6), normal(50, 6)
s, Gaussian = 1.5, (normal(2, 6) / 6**0.5, normal(4, 2) / 2**0.5)
zero = torch.zeros(2, 6, dtype=double), torch.zeros(4, 2, dtype=double)


def gradients(A, B):
    """∂L/∂A, ∂L/∂B and G of a squared error, by automatic differentiation."""
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    W = W0 + s * B @ A
    loss = (x @ (W - W0 - D_goal).T).square().mean()
    return torch.autograd.grad(loss, (A, B, W))


# %%
for name, A, B in (
    ("A Gaussian, B zero", Gaussian[0], zero[1]),
    ("A zero, B Gaussian", zero[0], Gaussian[1]),
    ("both zero", *zero),
    ("both Gaussian", *Gaussian),
):
    gA, gB, G = gradients(A, B)
    formula = max((gA - s * B.T @ G).abs().max(), (gB - s * G @ A.T).abs().max())
    claim(f"{name}: both formulas hold, to 1e-12", formula < 1e-12)
    moves = [f"{n} moves" for n, gradient in (("A", gA), ("B", gB)) if gradient.abs().max() > 0]
    print(f"    {' and '.join(moves) or 'nothing moves'}, from {'the base' if not (B @ A).any() else 'another model'}")

# %% [markdown]
# The first two starts are both sound. The paper takes the first.
#
# ### 2.3 Convolutions and attention
#
# **A convolution** is a linear map of patches. With $C$ channels in, $d$ out and a kernel of $K\times K$, write its weight as a matrix of $d$ rows, one for each channel out, and $CK^2$ columns. Then $\Delta W = sBA$ with $A\in\mathbb R^{r\times CK^2}$ and $B\in\mathbb R^{d\times r}$ as before. And the two factors are convolutions themselves: $A$ has the same $K\times K$ kernel, the same stride and padding, and $r$ channels; $B$ is $1\times1$.

# %%
conv = peft.LoRA(nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2)).double()
conv.add("mine", rank=2, alpha=3.0, generator=g)
A, B = conv.down["mine"].weight.data, conv.up["mine"].weight.data
B.copy_(normal(*B.shape))
print(f"A {tuple(A.shape)}, B {tuple(B.shape)}, W {tuple(conv.base.weight.shape)}")
x, plain = normal(2, 3, 11, 9), copy.deepcopy(conv.base)
plain.weight.data += (1.5 * B.flatten(1) @ A.flatten(1)).view_as(plain.weight)
claim("the two convolutions are one with W_0 + ΔW, to 1e-12", (conv(x) - plain(x)).abs().max() < 1e-12)
claim("ΔW as an 8 × 27 matrix has rank 2", torch.linalg.matrix_rank(conv.update().flatten(1)) == 2)

# %% [markdown]
# **An attention** has four linear layers, for query, key, value and output. `add_lora` takes the names of layers. It freezes the model, and puts an update beside each layer whose name ends so. The same call serves the U-Net and the DiT.

# %%
unet, dit = checkpoints.load("mnist-unet"), copy.deepcopy(base)
noisy, ten = torch.randn(10, 1, 28, 28, generator=g), torch.arange(10)
places = (unet, ("conv1", "conv2", "qkv")), (dit, ("query", "value")), (copy.deepcopy(base), personal.TARGETS)
for d, targets in places:
    all_of, before = count(d.net.parameters()), d(noisy, 0.5, y=ten)
    peft.add_lora(d.net, targets, rank=2, generator=g)
    trained = count(peft.trainable(d.net).values())
    print(f"{', '.join(targets)}: {trained:,} numbers are trained, {100 * trained / all_of:.1f} % of the base")
    claim("    and it still draws the same, exactly", torch.equal(d(noisy, 0.5, y=ten), before))

# %% [markdown]
# (`perceptron.0` and `perceptron.2` are the two linear layers of a perceptron.) The paper tunes queries and values only. In section 7 the updates sit on the layers of the third line, and a table there compares the places.
#
# The U-Net's attention computes query, key and value in *one* layer of $3d$ outputs, `qkv`. With rank $r$ all three then read the same $r$ numbers $Ax$. Three separate layers would read $r$ numbers each.
#
# > **Spot the bug.** Some layers store their weight the other way round, $k\times d$ (GPT-2's do). To such a weight one must add $(sBA)^\top$. The first LoRA library had a switch for the two ways, and its merged `qkv` layer worked in one position only. Suppose that $sBA$ is added as it is. *When does this raise an error? What happens if not?*

# %%
layer = peft.LoRA(nn.Linear(6, 6)).double()  # a square one
layer.add("mine", rank=2, alpha=2.0, generator=g)
layer.up["mine"].weight.data.copy_(normal(6, 2))
x, stored = normal(200, 6), layer.base.weight.data.T  # as such a library stores it
right, wrong = (x @ (stored + change) + layer.base.bias for change in (layer.update().T, layer.update()))
claim("added transposed: the layer's answer, to 1e-12", (layer(x) - right).abs().max() < 1e-12)
apart = (layer(x) - wrong).square().mean() / (layer(x) - layer.base(x)).square().mean()
claim("added as it is: no error, and the answer is wrong by more than the update itself", apart > 1)

# %% [markdown]
# Only a weight that is not square raises an error. On a square one, as those of query, key and value mostly are, the merged model is silently wrong. A test that compares merged and unmerged answers finds it at once.
#
# ### 2.4 Merge, and take apart
#
# $W_0+\Delta W$ is a matrix like any other. So after training an update can be **merged**: the sum takes the place of $W_0$, and the model costs exactly what its base costs. This is LoRA's great advantage. (While it is *not* merged, each layer computes two small products more.)
#
# Merging is a sum in floating point, so it rounds. *How would you take $\Delta W$ out again?* Subtract it? Let us do both, in float32 and in bfloat16, which keeps only 8 binary digits of a number.

# %%
show_source(peft.LoRA.merge)
show_source(peft.LoRA.unmerge)


# %%
def trained_like(d, scale=0.02, name="mine", rank=4, seed=1):
    """A model with an update that looks trained: B random, with numbers of size `scale`."""
    own = torch.Generator().manual_seed(seed)
    peft.add_lora(d.net, personal.TARGETS, rank=rank, name=name, generator=own)
    for layer in d.net.modules():
        if isinstance(layer, peft.LoRA) and name in layer.up:
            layer.up[name].weight.data.copy_(scale * torch.randn(layer.up[name].weight.shape, generator=own))
    return d


d = trained_like(copy.deepcopy(base))
unmerged = d(noisy, 0.5, y=ten)
claim("the update changes what is drawn", (unmerged - base(noisy, 0.5, y=ten)).abs().max() > 0.01)
peft.merge(d.net)
claim("merged, float32: the same to 1e-4", (d(noisy, 0.5, y=ten) - unmerged).abs().max() < 1e-4)
peft.unmerge(d.net)
claim("taken apart again: the same, bit for bit", torch.equal(d(noisy, 0.5, y=ten), unmerged))
plain = peft.merged(d.net)
claim("a merged copy has the base's layers and as many numbers", count(plain.parameters()) == size)

# %%
for dtype in (torch.float32, torch.bfloat16):
    W = base.net.blocks[0].perceptron[0].weight.to(dtype)
    layer = peft.LoRA(nn.Linear(128, 384).to(dtype))
    layer.base.weight.data.copy_(W)
    layer.add("mine", rank=4, alpha=4.0, generator=g)
    layer.up["mine"].weight.data.copy_(0.002 * torch.randn(384, 4, generator=g))
    change = layer.update()
    merged_weight = (W + change).to(dtype)
    subtracted = (merged_weight - change).to(dtype)
    unmoved = (merged_weight == W).double().mean()
    claim(f"{dtype}: subtracting does not give all of W_0 back", not torch.equal(subtracted, W))
    layer.merge()
    layer.unmerge()
    claim("    keeping the old weight does", torch.equal(layer.base.weight, W))
claim("and in bfloat16 more than a third of the weights did not move at all", unmoved > 1 / 3)

# %% [markdown]
# In bfloat16 the neighbours of a number lie a 128th to a 256th of its size apart. A change of less than half of that is rounded away: $|\Delta W|<2^{-9}|W|$ always vanishes. Here it happens to more than a third of all weights.
#
# Unmerged, nothing of the sort happens: $\Delta W\,x$ is computed in float32, and what is rounded to bfloat16 are the answers, not the weights. So in bfloat16 *a merged model is not quite the model that was trained*, and users of large libraries have reported exactly this. The cure is to merge in float32 and to stay there, or else to compare.
#
# > **Spot the bug.** A public draft of a function merges an update while it reads the file: `weight += B @ A`. It is called twice. *What is the model now?*

# %%
d = trained_like(copy.deepcopy(base))
layer = d.net.blocks[0].perceptron[0]
W, change = layer.base.weight.clone(), layer.update()
naive = W + change + change  # merged, and merged again
peft.merge(peft.merge(d.net))
claim("`merge` knows that it has been called: W_0 + ΔW", torch.equal(layer.base.weight, W + change))
peft.unmerge(d.net)
peft.merge(peft.activate(d.net, mine=2.0))
claim("twice by hand is what one gets with α doubled", torch.allclose(naive, layer.base.weight, atol=1e-6))

# %% [markdown]
# (Section 7.6 shows what two times a user's update looks like.) A weight does not say whether something was merged into it. Somebody must remember: our layer keeps its old weight, and *that it has one* is the note.
#
# > **Spot another.** A library wants to merge whenever a model is set to evaluation. Its layer has a method `eval`, which merges and then calls `super().eval()`. On the layer alone it works. In a model nothing is ever merged. *Why?*


# %%
class Merging(nn.Linear):
    has_merged = False

    def eval(self):
        self.has_merged = True  # here it would add ΔW to its weight
        return super().eval()


alone, model = Merging(2, 2).eval(), nn.Sequential(Merging(2, 2)).eval()
claim("the layer by itself merges", alone.has_merged)
claim("inside a model it is in evaluation mode, and has not merged", not model[0].training and not model[0].has_merged)

# %% [markdown]
# `model.eval()` is `model.train(False)`, and that calls `train(False)` of all parts, never their `eval`. So one has to write `train`. Such a fault is hard to see: an unmerged layer gives the right answer, only more slowly. Better not to hide a change of the weights behind a word that means something else.
#
# ### 2.5 Several updates on one base
#
# An update has a name. `activate` says which ones are added, and how much of each:
#
# $$h = W_0x+\sum_iw_i\,\frac{\alpha_i}{r_i}\,B_iA_i\,x.$$
#
# All users share one base in memory, and to serve another user is to activate another name. (This $w$ is a weight of an update. Guidance had one, too.)
#
# Two updates that are added are *one* update. Put $A_1$ on top of $A_2$, and $B_1$ beside $B_2$: $\ s_1B_1A_1+s_2B_2A_2 = \begin{pmatrix}s_1B_1&s_2B_2\end{pmatrix}\begin{pmatrix}A_1\\A_2\end{pmatrix}$. Its rank is at most $r_1+r_2$.

# %%
d = trained_like(trained_like(copy.deepcopy(base), name="one", rank=2), name="two", rank=3, seed=2)
layer = d.net.blocks[0].perceptron[0]
claim("the one that came last is active", layer.active == {"two": 1.0})
peft.activate(d.net)
claim("none: the base, exactly", torch.equal(d(noisy, 0.5, y=ten), base(noisy, 0.5, y=ten)))
peft.activate(d.net, one=1.0, two=0.5)
stacked_A = torch.cat([layer.down["one"].weight, layer.down["two"].weight])
side_by_side = torch.cat([layer.up["one"].weight, 0.5 * layer.up["two"].weight], 1)
together = side_by_side @ stacked_A
claim("both: one update with stacked A and B, to 1e-6", torch.allclose(together, layer.update(), atol=1e-6))
claim("of rank 2 + 3", torch.linalg.matrix_rank(layer.update(), rtol=1e-4) == 5)

# %% [markdown]
# ### 2.6 The file
#
# What does a user keep? $A$ and $B$ of each layer, $r$, $\alpha$ and the names of the layers. `save_lora` writes two files, in the form of the library PEFT, so that both can read what the other wrote (section 8.2).

# %%
folder = Path(tempfile.mkdtemp())
d = trained_like(copy.deepcopy(base), rank=1)
file = peft.save_lora(d.net, folder, "mine")
settings = json.loads((folder / "adapter_config.json").read_text())
print(f"r = {settings['r']}, α = {settings['lora_alpha']:g}, {len(settings['target_modules'])} layers")
trained = count(peft.trainable(d.net).values())
weighs = file.stat().st_size
claim("the file holds A and B, 4 bytes a number, and at most 5 kB of words", 0 < weighs - 4 * trained < 5000)
print(f"{weighs / 1000:.0f} kB, where the base has {4 * size / 1e6:.1f} MB")
again = copy.deepcopy(base)
peft.load_lora(again.net, folder, name="mine")
claim("read again: the same answers, exactly", torch.equal(again(noisy, 0.5, y=ten), d(noisy, 0.5, y=ten)))

# %% [markdown]
# **An update belongs to its base.** Added to another model of the same shape it raises no error by itself: it draws *something*. So the file carries a fingerprint of the base, a hash of all its weights, and is refused elsewhere.

# %%
other = copy.deepcopy(base).net
other.blocks[3].perceptron[2].bias.data[0] += 1e-3  # one of a million numbers
try:
    peft.load_lora(other, folder)
except ValueError as error:
    print(str(error).replace(str(folder), "the file"))

# %% [markdown]
# ## 3. Why should a low rank do?
#
# ### 3.1 The best that a rank can do
#
# Suppose that the full update $\Delta W$ were known. How near can a matrix of rank $r$ come to it? The answer is old (Eckart and Young, 1936). Write the singular value decomposition $\Delta W = \sum_i\sigma_iu_iv_i^\top$ with $\sigma_1\ge\sigma_2\ge\dots$. The best one is the sum's first $r$ terms, and what is left is
#
# $$\min_{\mathrm{rank}\,M\le r}\lVert\Delta W-M\rVert^2 = \sum_{i>r}\sigma_i^2,$$
#
# with the sum of squares of all entries as the norm. So $\sigma_1^2+\dots+\sigma_r^2$, as a share of the sum of all, says how much of the update rank $r$ can hold. We call it the **energy** of the first $r$.
#
# Check it from two sides. The truncated sum must reach this error. And a search over $A$ and $B$ must end there and never below: with $A$ held, the best $B$ is a least-squares solution, and the other way round.

# %%
M = normal(12, 20)
U, S, Vt = torch.linalg.svd(M, full_matrices=False)
for r in (1, 3, 8):
    floor = S[r:].square().sum()
    cut = U[:, :r] * S[:r] @ Vt[:r]
    off = (M - cut).square().sum() - floor
    claim(f"r = {r}: the cut sum leaves Σ σ_i² of the others, to 1e-10", off.abs() < 1e-10)
    A = normal(r, 20)
    for _ in range(3000):
        B = M @ torch.linalg.pinv(A)
        A = torch.linalg.pinv(B) @ M
    left = (M - B @ A).square().sum()
    claim("    the search ends there, to a millionth, and not below", -1e-10 < left - floor < 1e-6 * floor)

# %% [markdown]
# ### 3.2 Measured
#
# The checkpoint `mnist-dit-bold` is `mnist-dit` with *all* its weights tuned on 100 images of one user, whom section 7 will introduce. Nothing forced the update to have a low rank. For each weight matrix of the four blocks we take $\Delta W = W_{bold}-W_0$ and its singular values.
#
# To have something to compare with, each matrix gets a *random twin* of Gaussian numbers in the same shape. Its singular values lie between about $\sqrt d-\sqrt k$ and $\sqrt d+\sqrt k$, in units of the entries' deviation: for a square matrix all the way down to 0, but slowly. *How much of the energy do you expect in the first 4 of 128 directions: for the twin? for $W_0$? for $\Delta W$?*

# %%
bold_in_full = checkpoints.load("mnist-dit-bold")
tuned_weights = dict(bold_in_full.net.named_parameters())
kinds = ("query", "key", "value", "attention.out", "perceptron.0", "perceptron.2", "modulation")
changes, originals, twins = {}, {}, {}
for name, W in base.net.named_parameters():
    place = name.removesuffix(".weight")
    if name.startswith("blocks") and place.endswith(kinds) and W.ndim == 2:
        changes[place], originals[place] = (tuned_weights[name] - W).double(), W.double()
        twins[place] = normal(*W.shape)


def energy(M, r):
    """The share of the sum of squares that the first r singular values hold."""
    S = torch.linalg.svdvals(M).square()
    return (S[:r].sum() / S.sum()).item()


# %%
def spectrum(ax, place):
    lines = {"ΔW": changes[place], "$W_0$": originals[place], "random": twins[place]}
    inks = {"ΔW": style.MODEL, "$W_0$": style.DATA, "random": style.NOISE}
    values = {name: torch.linalg.svdvals(M) for name, M in lines.items()}
    values = {name: S / S[0] for name, S in values.items()}
    ax.set_ylim(1e-3, 1.3)
    plots.curves(
        torch.arange(1, 129), values, "$i$", "$\\sigma_i/\\sigma_1$", logy=True, colors=inks, ax=ax, title=place
    )


made, axes = plots.panels(2, width=9.8, height=3.6)
for ax, place in zip(axes, ("blocks.1.attention.value", "blocks.1.perceptron.0"), strict=True):
    spectrum(ax, place)
made

# %%
made, (ax,) = plots.panels(1, width=8.4, height=3.6)
looks = (twins, style.NOISE, "o", "random"), (originals, style.DATA, "s", "$W_0$"), (changes, style.MODEL, "o", "ΔW")
for lift, (matrices, color, mark, label) in zip((0, 0.12, -0.12), looks, strict=True):  # side by side, to be seen
    for row, kind in enumerate(kinds):
        first_four = [energy(M, 4) for place, M in matrices.items() if place.endswith(kind)]
        heights = [row + lift] * len(first_four)
        ax.plot(first_four, heights, mark, color=color, alpha=0.8, label=label if row == 0 else None)
ax.set(yticks=range(len(kinds)), yticklabels=kinds, xlim=(0, 1), xlabel="share of the energy in the first 4 directions")
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
made

# %%
lowest = min(energy(M, 4) / energy(twins[place], 4) for place, M in changes.items())
claim("in every layer the first 4 hold at least 1.8 times what they hold in the random twin", lowest > 1.8)
mean_energy = sum(energy(M, 4) for M in changes.values()) / len(changes)
claim("but far from all: on average they hold between a quarter and a half of the energy", 1 / 4 < mean_energy < 1 / 2)
in_base = [energy(originals[place], 4) > energy(M, 4) for place, M in changes.items() if place.endswith("modulation")]
claim("and in the modulations the base's own weights hold even more in their first 4", all(in_base))
smallest = min(torch.linalg.svdvals(M)[-1] for M in changes.values())  # rounding alone makes about 1e-7
claim("and no update is of low rank exactly: its last singular value is more than float32's rounding", smallest > 1e-6)

# %% [markdown]
# Each dot of the second figure is one layer of one block. The update's singular values fall faster than those of a random matrix, and, but for the modulation, in the end faster than those of $W_0$. The modulation has the most in few directions: in its first four about half of the energy, where a random matrix has a sixteenth. In the perceptrons it is a quarter. But $W_0$ is not far behind, and in the modulation it is ahead. An uneven spectrum is no mark of fine-tuning: what was trained is uneven.
#
# So an honest sentence is: **the update of a full fine-tune has full rank and a long tail; it is only far from evenly spread.** Does what is left out matter? The energy counts all entries alike. The loss does not.
#
# ### 3.3 Cut, and look at the loss
#
# We cut each $\Delta W$ of the perceptrons and modulations to rank $r$, put it onto the base, leave everything else as in the base, and measure the denoising loss on held-out images in the user's hand. Rank 0 is the base. The black line is the full fine-tune, with all layers. And the orange dot is another update of rank 2 on the same layers: LoRA's, *trained* at rank 2 on the same hundred images. *Where will the curve be flat? Where will the dot be?*


# %%
def in_hand(user, number):
    """So many held-out images in a user's hand, as many of each label, and the labels."""
    x, y = data.balanced(*hands.originals(user, "test"), number, torch.Generator().manual_seed(0))
    return hands.written(user, x), y


# %%
def loss_on(d, x, y):
    """The denoising loss on these images, at times spread evenly; always the same noise."""
    batch = training.batches(x, d.path, size=len(x), y=y, drop=0, seed=1)
    with torch.no_grad():
        return losses.simple(d, **batch(0)).item()


def cut_to(r):
    """The base, with the updates of the perceptrons and modulations cut to rank r."""
    d = copy.deepcopy(base)
    for name, W in d.net.named_parameters():
        if name.removesuffix(".weight").endswith(personal.TARGETS):
            U, S, Vt = torch.linalg.svd((tuned_weights[name] - W).double(), full_matrices=False)
            W.data += (U[:, :r] * S[:r] @ Vt[:r]).float()
    return loss_on(d, held_out, held_labels)


# %%
held_out, held_labels = in_hand("bold", 60)
ranks = [0, 1, 2, 4, 8, 16, 128]
after_cut = torch.tensor([cut_to(r) for r in ranks])
made, (ax,) = plots.panels(1, width=7.0, height=3.4)
in_full = loss_on(bold_in_full, held_out, held_labels)
ax.axhline(in_full, color=style.EXACT, linewidth=1)
ax.text(len(ranks) - 1, in_full, "full fine-tune", ha="right", va="bottom")
plots.curves(torch.arange(len(ranks)), {"cut": after_cut}, "rank r", "loss in the user's hand", ax=ax)
ax.set_xticks(range(len(ranks)), [str(r) for r in ranks])
with_lora = copy.deepcopy(base)
peft.load_lora(with_lora.net, checkpoints.FOLDER / "users" / "bold", name="bold")
trained_low = loss_on(with_lora, held_out, held_labels)
ax.plot(ranks.index(2), trained_low, "o", color=style.MODEL, markersize=8)
ax.annotate("LoRA, r = 2", (ranks.index(2), trained_low), (8, -4), textcoords="offset points", color=style.MODEL)
made

# %%
gained = (after_cut[0] - after_cut) / (after_cut[0] - in_full)
claim("cut to rank 1 of 128: more than two fifths of what all ranks of these layers have", gained[1] > 0.4 * gained[-1])
claim("but cut to rank 4: less than half of what the full fine-tune has", gained[3] < 0.5)
claim("trained at rank 2: below every cut", trained_low < after_cut.min())
claim("    and as low as the full fine-tune, to a twentieth of the loss", trained_low < 1.05 * in_full)

# %% [markdown]
# The first direction of each layer brings the most. From there on the curve falls slowly; with the second it even rises, for the cut is the best one for the entries and not for the loss. Even all 128 do not reach the black line: the other layers have their part. Cut to rank 2, the full update is poor. An update *trained* at rank 2 does as well on these held-out images as the whole full fine-tune. (It is even a little better here. With other training images it may be a little worse; section 7.2 has users for whom the difference is clear, and says why.)
#
# That is the true reason for LoRA, and it is not what the singular values show. The update that full training *finds* need not have a low rank. It is enough that *there is* an update of low rank that does as well. Full training has no reason to look for it. LoRA cannot find any other.
#
# ## 4. "Can be seen as learning rate"
#
# The slide on the scale: "the paper proposes to scale low-rank matrices by alpha/r, claiming that it helps reduce the need to adjust hyperparameters when varying r. Can be seen as Learning Rate". These are two claims. (1) The scale $s = \alpha/r$ is a learning rate. (2) Divided by $r$, one need not search for a new one when $r$ changes. We take them one by one, and ask each time: with which optimizer?
#
# ### 4.1 A learning rate, exactly
#
# Hide the scale in $B$: let $B' = sB$, so that $h = W_0x+B'Ax$. How does $B'$ move?
#
# - **SGD** moves $B$ by $-\eta\,\partial L/\partial B = -\eta\,s\,\partial L/\partial B'$. So $B' = sB$ moves by $-\eta\,s^2\,\partial L/\partial B'$.
# - **Adam** divides each gradient by its own running size. A factor $s$ in the gradient cancels, so $B$ moves as it would without, and $B'$ by $s$ times that.
# - $A$ has the gradient $s\,B^\top G = B'^\top G$. There is no $s$ in it.
#
# So LoRA with scale $s$ and learning rate $\eta$ **is** LoRA with scale 1 in which $A$ has the rate $\eta$, and $B$ has the rate $s^2\eta$ under SGD, $s\,\eta$ under Adam. This is exact, and it holds from the first step to the last. (It needs $B = 0$ at the start. It does not survive weight decay or a clipped gradient, nor Adam's small $\epsilon$ where gradients are as small as that.)
#
# The slide is right, then, if one says *of what*: the scale is a learning rate **of $B$ alone**.

# %%
d_, k_, steps = 8, 12, 60
D_goal, start_A = normal(d_, k_), normal(3, k_) / k_**0.5


def train(optimizer, s, lr_A, lr_B, A=start_A):
    """ΔW after some steps on the squared distance of sBA from a goal, from B = 0."""
    A, B = A.clone().requires_grad_(), torch.zeros(d_, 3, dtype=double, requires_grad=True)
    groups = [{"params": [A], "lr": lr_A}, {"params": [B], "lr": lr_B}]
    extra = {"eps": 1e-30} if optimizer is torch.optim.Adam else {}
    descent = optimizer(groups, **extra)
    for _ in range(steps):
        descent.zero_grad()
        (0.5 * (s * B @ A - D_goal).square().sum()).backward()
        descent.step()
    return (s * B @ A).detach()


# %%
s, eta, c = 4.0, 2e-3, 3.0
for optimizer, power in ((torch.optim.SGD, 2), (torch.optim.Adam, 1)):
    scaled, plain = train(optimizer, s, eta, eta), train(optimizer, 1.0, eta, s**power * eta)
    what = f"{optimizer.__name__}: the scale s is a rate of B {'s²' if power == 2 else 's'} times as large"
    claim(f"{what}, for all {steps} steps, to 1e-9", (scaled - plain).abs().max() < 1e-9)
    both = train(optimizer, 1.0, s**power * eta, s**power * eta)
    claim("    and not a rate of A and B together: that ends elsewhere", (scaled - both).abs().max() > 0.01)
of_all = train(torch.optim.Adam, s, c * eta, c * eta, c * start_A)
off = (of_all - train(torch.optim.Adam, c**2 * s, eta, eta)).abs().max()
claim("Adam: c² times α is c times the rate of both, if A starts c times as large, to 1e-9", off < 1e-9)

# %% [markdown]
# In the last line $A$ starts $c$ times as large, and both rates are $c$ times as large. Then under Adam both factors are $c$ times what they would be at every step, and $BA$ is $c^2$ times, as if $\alpha$ were. This is the paper's own remark: with Adam "tuning $\alpha$ is roughly the same as tuning the learning rate if we scale the initialization appropriately". The condition matters.
#
# ### 4.2 The first step, for every rank
#
# Now the second claim. What should $s$ be so that a step has the same size for every $r$? The first step can be computed. Only $B$ moves in it, so $\Delta W_1 = sB_1A$.
#
# **SGD.** $B_1 = -\eta s\,GA^\top$, so
#
# $$\Delta W_1 = -\eta\,s^2\,G\,A^\top\!A,\qquad\mathbb E\,[\Delta W_1] = -\eta\,s^2\,\frac rk\,G,$$
#
# as $A$ has entries of variance $1/k$: each of its $r$ rows adds $I/k$ to the mean of $A^\top\!A$. On average it is a step of full fine-tuning, along $G$, with the learning rate $\eta s^2r/k$. With $s = \alpha/r$ this shrinks as $1/r$. With $s = \alpha/\sqrt r$ it does not depend on $r$.
#
# **Adam.** In its first step Adam moves every number by $\eta$ against the *sign* of its gradient. Row $i$ of $G$ is $g_i$, row $j$ of $A$ is $a_j$. Then $B_{ij} = -\eta\,\mathrm{sign}(g_i\cdot a_j)$, and row $i$ of $\Delta W_1$ is $-\eta s\sum_j\mathrm{sign}(g_i\cdot a_j)\,a_j$. Each term is a random vector turned so that it points with $g_i$. At right angles to $g_i$ it averages to zero. Along $\hat g_i = g_i/\lVert g_i\rVert$ it has the mean $\mathbb E\,|\hat g_i\cdot a_j|$, and the mean size of a normal number of variance $1/k$ is $\sqrt{2/(\pi k)}$. So
#
# $$\mathbb E\,[\text{row}_i] = -\eta\,s\,r\,\sqrt{\frac2{\pi k}}\;\hat g_i.$$
#
# With $s = \alpha/r$ this does *not* depend on $r$. Both formulas, checked over many $A$:

# %%
rows_, k_, many = 3, 40, 20_000
G = normal(rows_, k_)
for r in (1, 4, 16):
    A = normal(many, r, k_) / k_**0.5
    along = torch.einsum("nrk,ik->nir", A, G)  # g_i · a_j
    SGD, Adam = torch.einsum("nir,nrk->nik", along, A), torch.einsum("nir,nrk->nik", along.sign(), A)
    mean = SGD.mean(0), Adam.mean(0)
    expected = r / k_ * G, r * (2 / (math.pi * k_)) ** 0.5 * G / G.norm(dim=1, keepdim=True)
    error = SGD.std(0) / many**0.5, Adam.std(0) / many**0.5
    for name, m, e, se in zip(("SGD", "Adam"), mean, expected, error, strict=True):
        agree = ((m - e).abs() < 5 * se).all()
        claim(f"r = {r}, {name}: the mean of ΔW_1/(−η) at s = 1 is the formula, to 5 standard errors", agree)

# %% [markdown]
# Both agree. So, up to factors without $s$ and $r$:
#
# | first step | size of $\mathbb E[\Delta W_1]$ | the same for all $r$ with |
# |---|---|---|
# | SGD | $\eta\,s^2\,r$ | $s = \alpha/\sqrt r$ |
# | Adam | $\eta\,s\,r$ | $s = \alpha/r$ |
#
# **The slide's claim holds for Adam's first step. It does not for SGD's.** The rule $\alpha/\sqrt r$ is known as *rank-stabilised LoRA*; its paper derives it from gradients and activations that should neither vanish nor explode for large $r$, over a whole training.
#
# Why the mean? To first order the loss changes by $\langle G,\Delta W_1\rangle$, so it is the part along $G$ that counts. One $\Delta W_1$ by itself has a random part, too, which for $r\ll k$ is much the larger. It has rank $r$ and cannot be $G$.
#
# A first step is not a training. From the second step on $A$ moves too, and by 4.1 the scale does nothing for $A$.
#
# ### 4.3 A training, for every rank
#
# So we try it, on a problem that takes no time: $\frac12\lVert sBA-D\rVert^2$ for a goal $D$ of shape $64\times64$ whose singular values fall as $1/i$. Ranks from 2 to 64; 37 learning rates; 30 steps; the mean over three starts. $\alpha$ is chosen so that both rules agree at $r = 8$, where $s = 1$. The figure shows, over the learning rate, what share of the goal is left. *In which of the four panels will all ranks have the same best learning rate?*

# %%
side, etas = 64, torch.logspace(-4, 2, 37)
rough = torch.randn(2, side, side, generator=torch.Generator().manual_seed(0))
left, right = torch.linalg.qr(rough)[0]
goal = 4 * nn.functional.normalize(left / torch.arange(1, side + 1) @ right, dim=(0, 1))
rules = {"α / r": lambda r: 8 / r, "α / √r": lambda r: (8 / r) ** 0.5}


def start_of(r, starts=3):
    """A and B for every start and learning rate, side by side, and the learning rates."""
    own = torch.Generator().manual_seed(r)
    A = (torch.randn(starts, r, side, generator=own) / side**0.5).repeat_interleave(len(etas), 0)
    return A, torch.zeros(len(A), side, r), etas.repeat(starts)[:, None, None]


def sgd(r, s, steps=30):
    A, B, eta = start_of(r)
    for _ in range(steps):
        G = s * B @ A - goal
        A, B = A - eta * s * B.mT @ G, B - eta * s * G @ A.mT
    return A, B


# %%
def adam(r, s, steps=30, betas=(0.9, 0.99)):
    A, B, eta = start_of(r)
    means = [[torch.zeros_like(M), torch.zeros_like(M)] for M in (A, B)]
    for i in range(1, steps + 1):
        G = s * B @ A - goal
        moved = []
        for M, gradient, (m, v) in zip((A, B), (s * B.mT @ G, s * G @ A.mT), means, strict=True):
            m.lerp_(gradient, 1 - betas[0])
            v.lerp_(gradient.square(), 1 - betas[1])
            moved.append(M - eta * m / (1 - betas[0] ** i) / ((v / (1 - betas[1] ** i)).sqrt() + 1e-12))
        A, B = moved
    return A, B


def left_over(optimizer, r, s):
    """What is left of the goal, as a share, for each learning rate; 1 or more is a failure."""
    A, B = optimizer(r, s)
    share = (s * B @ A - goal).square().sum((1, 2)) / goal.square().sum()
    return share.nan_to_num(9.0, 9.0).clamp(max=9.0).view(3, -1).mean(0)


# %%
ranks = (2, 4, 8, 16, 32, 64)
found = {
    (optimizer.__name__, rule): torch.stack([left_over(optimizer, r, s(r)) for r in ranks])
    for optimizer in (sgd, adam)
    for rule, s in rules.items()
}
made, axes = plots.panels(2, 2, width=9.4, height=6.2)
shades = [style.DENSITY(0.4 + 0.6 * i / 5) for i in range(6)]
for ax, ((name, rule), left_of) in zip(axes, found.items(), strict=True):
    for r, line, color in zip(ranks, left_of, shades, strict=True):
        ax.loglog(etas, line, color=color, label=f"r = {r}")
        ax.plot(etas[line.argmin()], line.min(), "o", color=style.MODEL, markersize=5, zorder=3)
    ax.set(title=f"{name.upper() if name == 'sgd' else 'Adam'}, s = {rule}", ylim=(5e-3, 2), xlim=(1e-3, 20))
    ax.set(xlabel="learning rate η", ylabel="share that is left")
axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
made


# %%
def fifth_done(line):
    """The learning rate at which four fifths are left, between two of those tried."""
    j = (line <= 0.8).double().argmax()
    return etas[j - 1] * (etas[j] / etas[j - 1]) ** ((line[j - 1] - 0.8) / (line[j - 1] - line[j]))


best = {key: etas[left_of.argmin(1)] for key, left_of in found.items()}
begins = {key: torch.stack([fifth_done(line) for line in left_of]) for key, left_of in found.items()}
moves, flank = ({key: (rates.max() / rates.min()).item() for key, rates in of.items()} for of in (best, begins))
steady = max(flank["sgd", "α / √r"], flank["adam", "α / r"])
claim(
    "left flank: with SGD and α/√r, and with Adam and α/r, all ranks begin at one η, to a factor of 2.5", steady < 2.5
)
claim("    the other two rules are off by more than 4", min(flank["sgd", "α / r"], flank["adam", "α / √r"]) > 4)
claim(
    "SGD, α/r: from r = 2 to 64 the best learning rate grows more than 15-fold",
    best["sgd", "α / r"][-1] > 15 * best["sgd", "α / r"][0],
)
claim("SGD, α/√r: less than 8-fold", moves["sgd", "α / √r"] < 8)
claim("Adam, either rule: it stays within a factor of 4", max(moves["adam", rule] for rule in rules) < 4)

# %% [markdown]
# An orange dot marks the best learning rate of each rank. (Darker lines have a higher rank, and can come nearer to the goal.)
#
# Look at the left flanks first, where a small learning rate makes thirty steps little more than one long first step. With SGD and $\alpha/\sqrt r$, and with Adam and $\alpha/r$, all ranks begin to fall at the same place. That is the table of 4.2, in a training.
#
# Then the best learning rates. Under SGD with $\alpha/r$ the dots wander to the right as $r$ grows, about in proportion to $r$: who doubles the rank must double the learning rate. With $\alpha/\sqrt r$ they wander much less, though not by nothing. Under Adam they stay within a factor of 4, *with either rule*. The likely reason: a large learning rate moves $A$, too, and $A$ has a best rate of its own, which by 4.1 no $s$ can change. It holds the common $\eta$ in place. (Hold $A$ fixed in `adam`, and the dots wander there as well.)
#
# What to remember: with Adam, as nearly everybody trains LoRA, $\alpha/r$ does what the slide says, and $\alpha/\sqrt r$ does it about as well on this problem. With SGD it does not. And $\alpha$ is a learning rate of $B$: if you change it, you change the ratio of two rates.
#
# ## 5. Adapters
#
# ### 5.1 A small detour
#
# "Insert a small number of layers that are relatively small compared to the entire model", says the slide. An **adapter** stands at the end of a branch. It squeezes each token of width $d$ down to $m$ numbers, bends them (by a GELU, which is not linear), and adds what comes back:
#
# $$a(h) = h+W_{up}\,\mathrm{GELU}(W_{down}\,h+b_{down})+b_{up},\qquad W_{down}\in\mathbb R^{m\times d},\quad W_{up}\in\mathbb R^{d\times m}.$$
#
# Where do they stand? **Houlsby** and others put one after the attention and one after the perceptron of each block. **Pfeiffer** and others found the second one enough. *How should they begin?* With $W_{up} = 0$ and $b_{up} = 0$ we have $a(h) = h$ exactly, and the gradient reaches $W_{up}$ first, as it reached $B$. (Houlsby's paper starts near the identity, with small random numbers.)

# %%
for placement, bottleneck in (("Houlsby", 8), ("Pfeiffer", 16)):
    d = copy.deepcopy(base)
    peft.add_adapters(d.net, bottleneck=bottleneck, placement=placement)
    trained = count(peft.trainable(d.net).values())
    each = 2 * 128 * bottleneck + bottleneck + 128  # both weights, both biases
    claim(
        f"{placement}: at the start the same digits, exactly",
        torch.equal(d(noisy, 0.5, y=ten), base(noisy, 0.5, y=ten)),
    )
    many = 8 if placement == "Houlsby" else 4
    claim(f"    {many} adapters of 2dm + m + d numbers: {trained:,}", trained == many * each)

# %% [markdown]
# ### 5.2 Why they cannot be merged
#
# LoRA could be merged because a sum of two linear maps is linear. An adapter bends: there is no matrix that does what it does. *And if one left the GELU out?* Then the branch would end in $(I+W_{up}W_{down})\,W_o$. This *is* a matrix: $W_o+BA$ with $B = W_{up}$ and $A = W_{down}W_o$. A straight adapter is a LoRA whose $A$ has to look at the world through $W_o$.

# %%
adapter = peft.Adapter(12, 3).double()
nn.init.normal_(adapter.up.weight, generator=g)
a, b, zero = normal(12), normal(12), torch.zeros(12, dtype=double)
bent = adapter(a + b) - adapter(a) - adapter(b) + adapter(zero)
claim("an adapter is not linear, not even up to a constant", bent.abs().max() > 0.01)
W_out, up, down, h = normal(12, 20), adapter.up.weight.data, adapter.down.weight.data, normal(20)
straight = W_out @ h + up @ (down @ (W_out @ h))
claim("without its bend it is W_o + BA, to 1e-12", (straight - (W_out + up @ (down @ W_out)) @ h).abs().max() < 1e-12)

# %% [markdown]
# So an adapter has to be computed, for each token, as long as the model lives. How much is that? Count the multiplications for one token in one of our blocks: the weights of attention and perceptron, $(4+2\cdot3)\,d^2$, and the weighing of 49 tokens, $2\cdot49\,d$. Two adapters add $4dm$.

# %%
d_, m_ = 128, 8
of_block = 10 * d_**2 + 2 * 49 * d_
print(
    f"a block: {of_block:,} multiplications for each token; two adapters: {4 * d_ * m_:,}, {400 * d_ * m_ / of_block:.1f} % more"
)
unmerged_lora = sum(
    2 * (M.shape[0] + M.shape[1]) for place, M in changes.items() if place.startswith("blocks.0.perceptron")
)
print(f"LoRA of rank 2 on the perceptron, not merged: {unmerged_lora:,}; merged: 0")

# %% [markdown]
# Few multiplications, but in *new layers, one after the other*. A processor that is fast at large products waits for small ones, so in seconds the price is higher than the count says.
#
# ## 6. Prefix tuning
#
# ### 6.1 Something more to look at
#
# The third way leaves the weights alone and gives the attention of *every layer* $P$ more keys and values, which are learned:
#
# $$\mathrm{softmax}\Bigl(\frac{Q\,[P_K;K]^\top}{\sqrt d}\Bigr)\,[P_V;V].$$
#
# The queries keep their number: $N$ tokens now look at $P+N$ things. What does a prefix do to what a token hears? Take one query $q$, and call $\ell_j = q\cdot k_j/\sqrt d$ its *score* for the key $k_j$. The softmax sums over two groups, so split its denominator into $Z_P = \sum_{j\in prefix}e^{\ell_j}$ and $Z_N = \sum_{j\in own}e^{\ell_j}$. The prefix's share of the mass is
#
# $$\lambda = \frac{Z_P}{Z_P+Z_N},$$
#
# and within each group the softmax is that of the group by itself. So, exactly,
#
# $$\text{attention with prefix} = (1-\lambda)\cdot\text{attention to the own tokens}+\lambda\cdot\text{attention to the prefix}.$$
#
# (He and others, 2022.) What the prefix says to a token depends on its query only; $\lambda$ weighs it against what the other tokens say. Read so, a prefix is a small detour as well: from the query through $P_K$, a softmax for the bend, and back through $P_V$; with $\lambda$ as its gate.

# %%
attention, prefix, h = Attention(32, 4).double(), normal(2, 5, 32), normal(3, 7, 32)  # 5 keys and values, 7 tokens
with_prefix = peft.PrefixAttention(attention, lambda: prefix)


def heads(z):
    return z.unflatten(-1, (4, 8)).transpose(-3, -2)  # (…, tokens, 32) → (…, heads, tokens, 8)


q, k, v, pk, pv = map(heads, (attention.query(h), attention.key(h), attention.value(h), *prefix))
own, added = q @ k.mT / 8**0.5, q @ pk.mT / 8**0.5
share = (added.logsumexp(-1) - own.logsumexp(-1)).sigmoid()[..., None]  # Z_P / (Z_P + Z_N), from logarithms
mixed = (1 - share) * (own.softmax(-1) @ v) + share * (added.softmax(-1) @ pv)
mixed = attention.out(mixed.transpose(1, 2).flatten(2))
claim("the mixture of both is the attention with the prefix, to 1e-10", (mixed - with_prefix(h)).abs().max() < 1e-10)
claim("7 queries look at 5 + 7 keys", with_prefix.weights(h).shape == (3, 4, 7, 12))
claim("and λ is the mass on the first 5", torch.allclose(with_prefix.weights(h)[..., :5].sum(-1, keepdim=True), share))

# %% [markdown]
# ### 6.2 No start is the identity
#
# LoRA and adapters began as the base. Can a prefix? Set its keys and values to zero. *What does a key of zeros do?* Its score is $0$ for every query, and $e^0 = 1$. So it takes the share
#
# $$\lambda = \frac{P}{P+\sum_{j\in own}e^{\ell_j}},$$
#
# and its value, zero, is mixed in: what a token hears shrinks by $1-\lambda$. With finite keys $\lambda$ is never 0. So a prefix begins by *disturbing* the base. How much?
#
# Left: the mean share in each of the four blocks of the trained DiT, numbered as in notebook 04, for a prefix of zeros; dashed, what it would be if all scores were equal, $P/(P+49)$. Right: the denoising loss on digits before any training, with zeros and with the usual random numbers; black, without a prefix. *Which start disturbs less?*

# %%
digits, digit_labels = data.balanced(*data.images(data.load("mnist", "test")), 60, torch.Generator().manual_seed(0))
lengths = [1, 2, 4, 8, 16, 32]


def untrained(P, zeros):
    """The share of a prefix's mass in each block, and the loss with it."""
    d = copy.deepcopy(base)
    torch.manual_seed(0)
    peft.add_prefix(d.net, length=P)
    if zeros:
        nn.init.zeros_(d.net.prefix.table.weight)
    half, ten_digits = torch.full((10,), 0.5), digits[::6]
    maps = attention_maps(d.net, base.path.perturb(ten_digits, 0.5, noisy), half, digit_labels[::6])
    return torch.stack([m[..., :P].sum(-1).mean() for m in maps]), loss_on(d, digits, digit_labels)


# %%
of_zeros, of_random = ([untrained(P, zeros) for P in lengths] for zeros in (True, False))
shares = torch.stack([share for share, _ in of_zeros])  # (lengths, blocks)
made, (left, right) = plots.panels(2, width=10.0, height=3.6)
P = torch.tensor(lengths, dtype=double)
plots.curves(P, {f"block {i + 1}": shares[:, i] for i in range(4)}, "P", "share of the mass", logx=True, ax=left)
left.plot(P, P / (P + 49), "--", color=style.EXACT, linewidth=1)
loss_of = {
    "zeros": torch.tensor([loss for _, loss in of_zeros]),
    "random": torch.tensor([loss for _, loss in of_random]),
}
plain_loss = loss_on(base, digits, digit_labels)
right.axhline(plain_loss, color=style.EXACT, linewidth=1)
plots.curves(P, loss_of, "P", "loss on digits", logx=True, ax=right)
made

# %%
claim("a prefix of zeros takes some mass in every block, and the longer, the more", (shares.diff(dim=0) > 0).all())
claim("except in block 3, where it takes next to nothing: less than 1e-6", shares[:, 2].max() < 1e-6)
d = peft.add_prefix(copy.deepcopy(base.net), length=1)
nn.init.zeros_(d.prefix.table.weight)
moved = (d(noisy, torch.full((10,), 0.5), ten) - base.net(noisy, torch.full((10,), 0.5), ten)).abs().max()
claim("even a single key of zeros changes what is drawn", moved > 1e-3)
claim(
    "32 random ones cost more than 32 zeros, and both cost",
    loss_of["random"][-1] > loss_of["zeros"][-1] > 1.005 * plain_loss,
)

# %% [markdown]
# In three of the blocks a prefix of zeros takes a good part of what equal scores would give it. In block 3 it takes next to nothing. (That is the block which looked at a token's four neighbours, whatever was there: notebook 04, section 3.5.) The scores there are large, and $e^0 = 1$ is lost beside $e^{20}$. So what a prefix begins with depends on the base, and to be heard in block 3 it first has to learn to shout.
#
# The loss hardly notices up to $P = 4$. With 32 it has grown by one or two per cent: this base leaves much of its work to the perceptrons. Zeros disturb less than random numbers. But no start is exact: a prefix cannot be switched on softly. (Keys that point away from all queries make $\lambda$ tiny. But every gradient of the prefix has the factor $\lambda$, so they would hardly be trained.)
#
# ### 6.3 Lengths and masks
#
# In a language model a token must not look at later ones. With a prefix there are $P+N$ keys, and all $P$ of the prefix come before everything. The mask is an $N\times(P+N)$ matrix: nothing of the prefix is hidden, and of the own tokens those that are later.

# %%
print(later(3, 5).int().tolist(), "for 3 tokens behind a prefix of 2; 1 is hidden")
N, P_ = 6, 3
masks = {
    "right": later(N, P_ + N),
    "counted from the front": torch.ones(N, P_ + N, dtype=torch.bool).triu(1),
    "padded with hidden": torch.cat([torch.ones(N, P_, dtype=torch.bool), later(N, N)], 1),
}
made, axes = plots.panels(3, width=9.0, height=2.8)
for ax, (name, mask) in zip(axes, masks.items(), strict=True):
    ax.imshow(mask, cmap="Greys", vmin=0, vmax=1.6)
    ax.axvline(P_ - 0.5, color=style.GUIDED, linewidth=2)
    ax.set(title=name, xlabel="key: prefix | own", ylabel="query", xticks=[], yticks=[])
    ax.grid(False)
made

# %% [markdown]
# > **Spot the bug.** Large libraries that had $N\times N$ masks were given prefixes, and raised an error of shape. Suppose that somebody now makes the mask wide enough, in one of the two ways on the right. Dark is hidden. *What can each token see in the middle? What on the right? Which of them trains without a word of complaint?*

# %%
q, k, v = normal(N, 8), normal(N, 8), normal(N, 8)
prefix = normal(2, P_, 8).requires_grad_()


def attend(hidden):
    keys, values = torch.cat([prefix[0], k]), torch.cat([prefix[1], v])
    return (q @ keys.T / 8**0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ values


own = (q @ k.T / 8**0.5).masked_fill(later(N, N), -torch.inf).softmax(-1) @ v
pull = {name: torch.autograd.grad(attend(mask).sum(), prefix)[0].abs().max() for name, mask in masks.items()}
sees_itself = {name: not mask[torch.arange(N), P_ + torch.arange(N)].any() for name, mask in masks.items()}
claim("right: each token sees itself, and the prefix has a gradient", sees_itself["right"] and pull["right"] > 0)
claim("counted from the front: no token sees itself", masks["counted from the front"].diagonal(P_).all())
claim(
    "padded with hidden: the answers are those without a prefix",
    torch.allclose(attend(masks["padded with hidden"]), own),
)
claim("    and the prefix has no gradient: it is never trained", pull["padded with hidden"] == 0)

# %% [markdown]
# In the middle a token sees nothing nearer than three places before it, not even itself. The model is bad, and somebody will notice. On the right all is well, only there is no prefix. The loss begins at the base's and *stays* there, for ever.
#
# ### 6.4 A perceptron writes the table
#
# The table of a prefix has $2LPd$ numbers: keys and values, for $L$ layers. Li and Liang found it hard to train as it is. So a small perceptron writes each of its rows, $W_2\tanh(W_1e+b_1)+b_2$, from a row $e$ of a smaller table of $P\times d$ numbers. This has *more* numbers while training. Afterwards one keeps only what it wrote: `fold`.

# %%
language = checkpoints.load("language")  # a small language model, of which section 8 says more
model = peft.add_prefix(copy.deepcopy(language), length=5, hidden=64)
x = data.text("prose", "test")[None, :40]
before, many = model(x), count(peft.trainable(model).values())
peft.fold(model)
kept = count(peft.trainable(model).values())
print(f"{many:,} numbers while it is trained, {kept:,} in the user's file")
claim("2LPd numbers are kept", kept == 2 * 4 * 5 * 128)
claim("and the model says the same, to 1e-5", (model(x) - before).abs().max() < 1e-5)
other = x.clone()
other[0, 25:] = 32  # spaces from the 26th byte on
claim("a later byte changes nothing before it: the mask is right", (model(other) - model(x))[0, :25].abs().max() < 1e-5)

# %% [markdown]
# ### 6.5 It is not a token in the input
#
# The slide describes prefix tuning as: "Append a learnable token in front of the input". That is **prompt tuning**, another method: $P$ learned tokens of $d$ numbers, which then go through all layers as tokens do. Prefix tuning learns the keys and values of *each layer*, $2L$ times as many numbers, and no layer computes them.
#
# How are the two related? In a causal model a token in front never looks at what comes later. So its keys and values in each layer are *constants*. Write them down, and you have a prefix that does the same. **Every prompt is a prefix**, but few prefixes are prompts. (This is also how servers answer fast: they keep the keys and values of a long prompt. It is called the KV cache.)
#
# We check it with a prompt of plain text. Its keys and values are caught on the way through the language model, and put into the table of a prefix. The own bytes must keep their places, behind the prompt.

# %%
prompt, caught = torch.tensor([list(b"In this section we ")]), {}


def catch(i, kind):
    return lambda layer, inside, out: caught.update({(i, kind): out[0]})


hooks = [
    getattr(block.attention, kind).register_forward_hook(catch(i, kind))
    for i, block in enumerate(language.blocks)
    for kind in ("key", "value")
]
language(prompt)
for hook in hooks:
    hook.remove()
P_ = prompt.shape[1]
model = peft.add_prefix(copy.deepcopy(language), length=P_)
rows_of = torch.stack([torch.stack([caught[i, "key"], caught[i, "value"]]) for i in range(4)])  # (layers, 2, P, width)
model.prefix.table.weight.data = rows_of.permute(2, 0, 1, 3).flatten(1)


# %%
def behind(model, x, place):
    """The logits of bytes that stand `place` bytes behind the start."""
    h = model.table(x) + model.positions.weight[place : place + x.shape[1]]
    for block in model.blocks:
        h = block(h, None)
    return model.leave(model.norm(h))


x = data.text("prose", "test")[None, :60]
prompted = language(torch.cat([prompt, x], 1))[:, P_:]
claim(
    "the prompt's keys and values as a prefix: the same logits, to 1e-4",
    (behind(model, x, P_) - prompted).abs().max() < 1e-4,
)
claim("without it they differ", (behind(language, x, P_) - prompted).abs().max() > 0.1)
print(f"learned numbers for {P_} places: prompt {P_ * 128:,}, prefix {2 * 4 * P_ * 128:,}")

# %% [markdown]
# In the DiT every token looks at every other. There a token in front would see the image, its keys would change with it, and no prefix could stand in for it.
#
# ## 7. A model for each user, measured
#
# ### 7.1 Four users
#
# The base draws digits as most people write them. Four users have sent in a hundred images each, ten of each label:
#
# - *thin* leans to the right and writes with a fine pen;
# - *bold* leans to the left and writes with a thick one;
# - *shoe* has a sign that the base has never seen: where others write a 7, this user draws a shoe;
# - *clothes* has no digits at all, but a piece of clothing for each of the ten labels: another data set.
#
# Here are ten more images of each, one of each label, which are held out. *For which user do you expect a small update to do?*


# %%
users = list(hands.HANDS)
plots.rows([in_hand(user, 10)[0] for user in users], labels=users)

# %% [markdown]
# ### 7.2 The table
#
# Each user, each method, two seeds (which draw other images of the user's, other starts, other noise). All train for 400 steps on 100 images, in about a minute on one core. Each kind has a learning rate of its own, which the table holds: the better of two or three that were tried on *bold*, with one seed and mostly half the steps (full fine-tuning was tried on *clothes*, too). So no kind was tuned for each user.
#
# | name | what is trained |
# |---|---|
# | full | everything |
# | LoRA, $r$ = 1, 2, 4, 8 | updates on perceptrons and modulations, $\alpha = 4$ |
# | LoRA on attention | the same on query, key, value and output, $r = 4$ |
# | Houlsby, Pfeiffer | adapters with $m = 8$ after both branches, or $m = 16$ after the second |
# | prefix | 16 keys and values for each block, written by a perceptron, then folded |
# | biases | nothing new: the base's own biases (BitFit) |
#
# Four things are measured. *Distance*: the Fréchet distance of 500 drawn images to held-out ones in the user's hand. *Loss*: the denoising loss on held-out images in the user's hand. *Forgetting*: the same loss on plain digits. *As asked*: how many of the drawn images a classifier reads as their label. (For *shoe* the classifier reads digits only. So a shoe counts as wrong: who draws one for each 7, as this user does, has about 90 % at most.)
#
# The first figure shows the *gain*: how far the distance has come from the base's (0) to that of full fine-tuning (1). *Before you look:* draw the gain over the number of parameters, as you expect it.

# %%
table = tables.load("mnist-users")
print(table["what"])
print(table["recipe"])
methods = list(dict.fromkeys(row["kind"] for row in table["rows"]))


def of(what, kind, user):
    """What was measured, the mean over seeds."""
    values = [row[what] for row in table["rows"] if row["kind"] == kind and row["user"] == user]
    return sum(values) / len(values)


def gain(kind, user):
    """How far the distance has come from the base's (0) to that of full fine-tuning (1)."""
    start, now, full = (of("Fréchet distance", k, user) for k in ("base", kind, "full"))
    return (start - now) / (start - full)


parameters = {kind: of("parameters", kind, "bold") for kind in methods}

# %%
shapes = "os^vDP*"
names = ["LoRA", "LoRA on attention, r = 4", "Houlsby", "Pfeiffer", "prefix", "biases", "full"]
colors = [style.DATA, "#56B4E9", style.MODEL, "#E69F00", style.GUIDED, "#CC79A7", style.EXACT]
lora = [kind for kind in methods if kind.startswith("LoRA, r")]
gains = {kind: torch.tensor([gain(kind, user) for user in users]) for kind in methods}
made, (ax,) = plots.panels(1, width=8.6, height=4.2)
for name, color, shape in zip(names, colors, shapes, strict=True):
    kinds_of = lora if name == "LoRA" else [name]
    reached, across = torch.stack([gains[kind] for kind in kinds_of]), [parameters[kind] for kind in kinds_of]
    label = "LoRA, r = 1 to 8" if name == "LoRA" else name.removesuffix(", r = 4")
    ax.semilogx(across, reached.mean(1), f"{shape}-", markersize=8, color=color, label=label, zorder=3)
    ax.plot(across, reached, ".", color=color, alpha=0.45, markersize=4)
ax.axhline(1, color=style.EXACT, linewidth=1)
ax.set(xlabel="parameters for a user", ylabel="gain in the Fréchet distance", xlim=(5e3, 2e6))
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
made

# %%
mean_gain = {kind: values.mean().item() for kind, values in gains.items()}
claim("LoRA: from rank 1 to 2 to 4 the gain grows", all(mean_gain[a] < mean_gain[b] for a, b in pairwise(lora[:3])))
claim("    rank 8 adds little to rank 4: less than 0.05", abs(mean_gain[lora[3]] - mean_gain[lora[2]]) < 0.05)
claim("rank 8 has more than nine tenths of the full gain, with 6 % of the numbers", mean_gain["LoRA, r = 8"] > 0.9)
similar = [kind for kind in methods if 16_000 < parameters[kind] < 18_000 and kind != "LoRA, r = 2"]
others = max(mean_gain[kind] for kind in similar)
claim(f"of the {1 + len(similar)} with about 16,000 numbers LoRA of rank 2 is first", mean_gain["LoRA, r = 2"] > others)
claim("and the prefix last", min(similar, key=mean_gain.get) == "prefix")

# %% [markdown]
# A large dot is the mean over users, and a small one is a user. LoRA of rank 8 comes close to full fine-tuning with a seventeenth of its parameters.
#
# How fine a difference can be believed? The base is not trained, and still its distance to *thin*, *bold* or *shoe* differs by 0.02 to 0.06 between the seeds, by the noise of 500 drawings alone. For a trained model it is up to 0.2, as another seed also draws another hundred images. (For *clothes*, whose distances are many times as large, it is 0.6, and up to 0.9.) But all methods share a seed's images, so we compare within a seed. For *bold* and *shoe* the ranks 2, 4, 8 and full are hardly told apart. For *thin* and *clothes* full is ahead: rank 2, with 1.4 % of the numbers, has about three quarters of the gain for *thin* and 85 % for *clothes*, where *bold* and *shoe* have about 97 %.
#
# At about 16,000 parameters five methods stand beside each other, and *where* they sit counts: LoRA on the perceptrons and modulations is ahead of LoRA on the attention, the paper's choice. (It tuned language models, and left the perceptrons for later. Section 6.2 has a hint why: this base does little with its attention.) The prefix, which speaks through the attention only, is last.
#
# The biases alone, the smallest file of all, do well for the two hands (for *thin* about as well as LoRA of rank 2), and badly for the new sign and the new data. It may be that shifts of features can make a slant or a pen, and cannot make a shoe; we have not tested this.
#
# Now the loss. Left: on held-out images in the user's hand, in units of the base's. Right: on plain digits. *Can a method that trains more numbers have a larger loss on the left?*

# %%
made, axes = plots.panels(2, width=11.4, height=4.0)
shown = [kind for kind in methods if kind != "base"]
marks = list(zip(users, "os^D", [style.DATA, style.MODEL, style.GUIDED, "#CC79A7"], strict=True))
for ax, what, title in zip(axes, ("test loss", "plain test loss"), ("in the user's hand", "plain digits"), strict=True):
    for user, shape, color in marks:
        grown = [of(what, kind, user) / of(what, "base", user) for kind in shown]
        ax.plot(grown, range(len(shown)), shape, color=color, alpha=0.85, label=user)
    ax.axvline(1, color=style.EXACT, linewidth=1)
    ax.set(yticks=range(len(shown)), yticklabels=shown if ax is axes[0] else [], title=title)
    ax.set_xlabel("loss, in units of the base's")
    ax.invert_yaxis()
axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
made

# %%
for user in ("thin", "shoe"):
    ahead = all(of("test loss", kind, user) < of("test loss", "full", user) for kind in lora)
    claim(f"{user}: LoRA of every rank has a smaller held-out loss than full fine-tuning", ahead)
claim(
    "shoe: full fine-tuning has a larger one than the base",
    of("test loss", "full", "shoe") > of("test loss", "base", "shoe"),
)
saved = {k: [of("test loss", "base", user) - of("test loss", k, user) for user in users] for k in methods}
enough = all(a > 0.95 * b for a, b in zip(saved["LoRA, r = 2"], saved["full"], strict=True))
claim("rank 2, each user: it saves at least 95 % of the held-out loss that full fine-tuning saves", enough)
forgotten = {kind: [of("plain test loss", kind, user) for user in users] for kind in [*lora, "full"]}
order = [*zip(lora, lora[2:], strict=False), ("LoRA, r = 4", "full")]  # rank 1 and 4, 2 and 8, 4 and full
more = all(a < b for low, high in order for a, b in zip(forgotten[low], forgotten[high], strict=True))
claim("for each user: four times the rank, more is forgotten; and in full more than with rank 4", more)

# %% [markdown]
# A hundred images are few, and a million parameters can learn them by heart. For *shoe* the full fine-tune, which has seen ten shoes, does worse on other images than the base, which has seen none: it overfits. What it draws still looks like the user's, so the distance does not tell. (A model that copied its hundred images would have a good one: notebook 04, section 4.4, trick 6.) A low rank cannot store as much, and that protects it. By this measure, which counts images that no method has seen, LoRA of rank 2 is as good as full fine-tuning or better for three users, and for *clothes* it saves 97 % of what full fine-tuning saves. For *bold*, whose full fine-tune is shipped, we can look at both sides:

# %%
own, own_labels = personal.few("bold", 0, table["images for a user"])
behind_by = {
    name: loss_on(d, held_out, held_labels) - loss_on(d, own, own_labels)
    for name, d in {"base": base, "full": bold_in_full, "LoRA": with_lora}.items()
}
claim("full: a smaller loss on its own hundred images than on others, by more than 0.01", behind_by["full"] > 0.01)
claim("LoRA of rank 2: the difference is smaller", behind_by["LoRA"] < behind_by["full"] - 0.005)

# %% [markdown]
# **Forgetting** goes with what was learned. For each user, the higher the rank, the more is forgotten, and full fine-tuning forgets more than rank 4. *shoe*, who changed one sign in ten, forgets least. But with LoRA, adapters and a prefix the base is still there. Take the update away, and it is back, bit by bit. After full fine-tuning, or with tuned biases, it is back only if somebody kept a copy.
#
# The numbers: the size of a user's file, the Fréchet distance for each user, and the share drawn as asked, the mean of *thin* and *bold*, who write plain digits.

# %%
print(f"{'':>24}  {'parameters':>10}  {'kB':>5}" + "".join(f"{user:>9}" for user in users) + "   as asked")
for kind in methods:
    distances = "".join(f"{of('Fréchet distance', kind, user):9.2f}" for user in users)
    right = sum(of("classified as asked", kind, user) for user in ("thin", "bold")) / 2
    print(f"{kind:>24}  {parameters[kind]:10,.0f}  {4 * parameters[kind] / 1000:5.0f}{distances}  {100 * right:7.0f} %")

# %% [markdown]
# The last column is a price that the distance does not show. A small update makes digits that are read as asked a little less often than the base's own, and more rank mends a part of it.
#
# Is the table about this code? The losses of a row's first three steps, computed anew:

# %%
(row,) = (r for r in table["rows"] if (r["user"], r["kind"], r["seed"]) == ("bold", "LoRA, r = 2", 0))
few_images, few_labels = personal.few("bold", 0, table["images for a user"])
d = personal.tuned(copy.deepcopy(base), {"kind": "LoRA", "rank": 2, "alpha": 4.0}, seed=0)
batch = training.batches(few_images, d.path, size=table["batch"], y=few_labels, null=10, times="logit-normal", seed=0)
trained = list(peft.trainable(d).values())
descent, first = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0), []
for step in range(3):
    descent.param_groups[0]["lr"] = table["rates"]["LoRA"]["lr"] * (step + 1) / (table["fit"]["warmup"] + 1)
    descent.zero_grad()
    loss = losses.simple(d, **batch(step))
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    descent.step()
    first.append(loss.item())
claim(
    "bold, LoRA of rank 2: they agree to 0.002",
    max(abs(a - b) for a, b in zip(first, row["first losses"], strict=True)) < 2e-3,
)

# %% [markdown]
# ### 7.3 A million users
#
# Storage follows from the bytes alone. *A million users of this small model: how much in full, how much as LoRA of rank 2?*

# %%
print(f"{'':>24}   for each user   for a million")
for kind in ("full", "LoRA, r = 8", "Houlsby", "LoRA, r = 2", "LoRA, r = 1", "biases"):
    print(f"{kind:>24}   {4 * parameters[kind] / 1000:10,.0f} kB   {4 * parameters[kind] / 1e6:10,.3f} TB")
ratio = parameters["full"] / parameters["LoRA, r = 2"]
claim("LoRA of rank 2 takes less than a sixtieth", ratio > 60)


def lora_share(d, r=2):
    """Numbers of LoRA on a square d × d layer, as a share of the layer's."""
    return r * 2 * d / d**2


claim("the same rank on layers of width 4096: a thousandth of their numbers", abs(lora_share(4096) - 1e-3) < 1e-4)

# %% [markdown]
# A layer of $d\times d$ has $d^2$ numbers, and its LoRA $2rd$. The share $2r/d$ *falls* with the width. That is why the saving is so much larger for large models than for ours: for width 4096 and rank 2 it is a thousandth. This counts on the rank that a user needs to stay small.
#
# ### 7.4 Live: the user bold
#
# Now here, while you wait: LoRA of rank 2 on the hundred images of *bold*. 80 steps of 16 images, where the table had 400 of 32. *What will have changed after so little: the slant, the thickness, both?*

# %%
d = personal.tuned(copy.deepcopy(base), {"kind": "LoRA", "rank": 2, "alpha": 4.0})
done = training.fit(
    d,
    losses.simple,
    training.batches(few_images, d.path, size=16, y=few_labels, null=10, seed=0, times="logit-normal"),
    steps=training.scaled(cpu=80, gpu=400),
    lr=1e-2,
    warmup=20,
    ema=0.95,
    weight_decay=0.0,
    precision="float32",
    progress=False,
)
mine, start = done.ema, torch.randn(10, 1, 28, 28, generator=g)


def draw(d, begin=start, labels=ten, steps=10):
    """Images in so many steps of DDIM, with clipped guesses; always from the same noise."""
    return samplers.last(samplers.ddim(clipped(lambda xt, t: d(xt, t, y=labels)), d.path, begin, d.path.times(steps)))


# %%
before, after = draw(base), draw(mine)
peft.activate(mine.net)
off = draw(mine)
peft.activate(mine.net, default=1.0)
claim("switched off, the base's digits are back, bit by bit", torch.equal(off, before))
losses_now = [loss_on(model, held_out, held_labels) for model in (base, mine)]
claim("loss in the user's hand: at least a quarter less than the base's", losses_now[1] < 0.75 * losses_now[0])
plain_now = [loss_on(model, digits, digit_labels) for model in (base, mine)]
claim("loss on plain digits: more than the base's", plain_now[1] > 1.2 * plain_now[0])
plots.rows([before, after, held_out[::6]], labels=["base", "with bold's update", "bold's own"])

# %% [markdown]
# The first two rows come from the same noise. The digits have become as heavy as bold's. Their slant has only begun to change: 80 steps are few. The third row is what bold writes, and was not used in the training.
#
# ### 7.5 Switch users
#
# The four updates of rank 2 that the table's recipe made are shipped as files of 68 kB, of which 65 are numbers. All are loaded onto *one* base; the slider activates one of them. *Move it, and compare with the images of 7.1.*

# %%
everyone = copy.deepcopy(base)
for user in users:
    peft.load_lora(everyone.net, checkpoints.FOLDER / "users" / user, name=user)
twenty, more_noise = torch.arange(20) % 10, torch.randn(20, 1, 28, 28, generator=g)


def as_user(user):
    peft.activate(everyone.net, **({} if user == "base" else {user: 1.0}))
    return draw(everyone, more_noise, twenty)


widgets.explore(as_user, user=(["base", *users], "bold"))

# %% [markdown]
# All frames come from the same noise. *thin*'s digits are slender and lean to the right, *bold*'s heavy and to the left. *shoe*'s are the base's, all but the 7, which is on its way to being a shoe. For *clothes* there are outlines of garments, and not much more: a hundred images and rank 2 are little for a new world.
#
# ### 7.6 A little of this, a little of that
#
# An update has a weight $w$, and two updates may be added. So one can turn a user's style up and down, or mix two users. *What do you expect of half of bold? Of one and a half? And of half of thin plus half of bold, who lean to opposite sides?*


# %%
def mixture_of(bold, thin):
    peft.activate(everyone.net, bold=bold, thin=thin)
    return draw(everyone, more_noise, twenty)


widgets.explore(mixture_of, bold=([0.0, 0.25, 0.5, 1.0, 1.5, 2.0], 0.5), thin=([0.0, 0.25, 0.5, 0.75, 1.0], 0.0))

# %% [markdown]
# To see more than an impression, measure the digits. *Ink* is the mean brightness of an image. *Slant* is how many pixels a digit moves to the right for one that it rises: the slope of a line through its pixels, each weighted by its ink.

# %%
up, across = torch.meshgrid(torch.arange(13.5, -14, -1), torch.arange(-13.5, 14), indexing="ij")


def ink_and_slant(x):
    """Means over images."""
    p = ((x[:, 0] + 1) / 2).clamp(min=0)
    mass = p.sum((1, 2), keepdim=True)
    rise, run = (axis - (p * axis).sum((1, 2), keepdim=True) / mass for axis in (up, across))
    slope = (p * rise * run).sum((1, 2)) / (p * rise.square()).sum((1, 2))
    return torch.stack([p.mean(), slope.mean()])


weights = torch.tensor([0.0, 0.5, 1.0, 1.5])
of_bold = torch.stack([ink_and_slant(mixture_of(w, 0.0)) for w in weights.tolist()])
of_both = torch.stack([ink_and_slant(mixture_of(w, 1 - w)) for w in weights[:3].tolist()])
wanted = torch.stack([ink_and_slant(in_hand(user, 200)[0]) for user in ("bold", "thin")])

# %%
made, axes = plots.panels(2, width=9.6, height=3.5)
for i, (ax, name) in enumerate(zip(axes, ("ink", "slant"), strict=True)):
    ax.plot(weights, of_bold[:, i], "o-", color=style.DATA, label="w · bold")
    ax.plot(weights[:3], of_both[:, i], "o-", color=style.GUIDED, label="w · bold + (1 − w) · thin")
    for hand, user, place in ((wanted[0], "bold's own", 1.0), (wanted[1], "thin's own", 0.0)):
        ax.plot(place, hand[i], "x", color=style.EXACT, markersize=9, markeredgewidth=2)
        where = {"xytext": (-8, -4), "ha": "right"} if (name, place) == ("slant", 1.0) else {"xytext": (8, -4)}
        ax.annotate(user, (place, hand[i]), textcoords="offset points", **where)
    ax.set(xlabel="w", ylabel=name)
axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
made

# %%
claim("more of bold: more ink, and more to the left", (of_bold.diff(dim=0) * torch.tensor([1, -1]) > 0).all())
off_middle = (of_both[1] - (of_both[0] + of_both[2]) / 2).abs() / (of_both[0] - of_both[2]).abs()
claim("half of each: the mean of the two, to a tenth of what lies between them", off_middle.max() < 0.1)

# %% [markdown]
# A surprise, perhaps: both measures move nearly along straight lines, and half of each lies near the mean of the two. At $w = 1$ the digits have a little more ink than bold's own, and lean less. At 1.5 they are bolder than bold. (At 2 they fall apart, as the slider shows. That is what merging twice does.)
#
# Nothing promises this. Half of each update gives the mean of the two users' *weights*, and a network is not linear in its weights. It works for a quantity that has a middle, such as slant. What is the middle of a 7 and a shoe?

# %%
seven, from_noise = torch.full((10,), 7), torch.randn(10, 1, 28, 28, generator=g)


def half_a_shoe(w):
    peft.activate(everyone.net, shoe=w)
    return draw(everyone, from_noise, seven)


steps_of_w = [0.0, 0.25, 0.5, 0.75, 1.0]
plots.rows([half_a_shoe(w) for w in steps_of_w], labels=[f"w = {w:g}" for w in steps_of_w])

# %% [markdown]
# At a quarter most are still sevens. At 1 they are shoes of a sort. In between comes no blend of the two, but something that is neither; and each noise goes over at a weight of its own.
#
# ## 8. A language model, too
#
# ### 8.1 The course's own words
#
# The slides speak of language models. `language` is a small one, of four blocks like those of the DiT, but causal: it reads up to 128 *bytes* and says which byte comes next. It was trained on the prose of this course's notebooks. Its user writes code: the code cells of the same notebooks. (These texts are cut from the notebooks as they stood at one time, and shipped.)
#
# The score is $-\log_2p$ for each byte of a held-out text. 8 is a blind guess. *What will prose cost, and what code, which the model has never read?*

# %%
print(language.card["what"])
print(f"{count(language.parameters()):,} numbers")
nat = math.log(2)


def language_loss(model, x):
    """Cross-entropy of the next byte, in nats."""
    return nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


@torch.no_grad()
def bits(model, name, pieces=40):
    """Bits for each byte of a held-out text."""
    x = data.text(name, "test")
    return language_loss(model, x[: len(x) // 129 * 129].view(-1, 129)[:pieces]).item() / nat


untuned = {name: bits(language, name) for name in data.TEXTS}
print(", ".join(f"{name}: {value:.1f} bits for each byte" for name, value in untuned.items()))

# %% [markdown]
# Now the *same* `add_lora`, with the names of this model's layers, on the code of the training part:

# %%
code, span = data.text("code"), torch.arange(129)


def pieces_of_code(step):
    own = torch.Generator().manual_seed(step)
    return {"x": code[torch.randint(len(code) - 129, (8, 1), generator=own) + span]}


coder = copy.deepcopy(language)
torch.manual_seed(0)
peft.add_lora(coder, ("query", "key", "value", "attention.out", "perceptron.0", "perceptron.2"), rank=4, alpha=8.0)
trained = count(peft.trainable(coder).values())
print(f"{trained:,} numbers are trained, {100 * trained / count(language.parameters()):.0f} % of the model's")
steps = training.scaled(cpu=60, gpu=1000)
settings = {"lr": 5e-3, "ema": 0.9, "weight_decay": 0.0, "precision": "float32", "progress": False}
coder = training.fit(coder, language_loss, pieces_of_code, steps=steps, **settings).ema

# %%
tuned_bits = {name: bits(coder, name) for name in data.TEXTS}
claim("code costs at least one and a half bits less for each byte", tuned_bits["code"] < untuned["code"] - 1.5)
claim("prose costs more: with the update on, some of it is forgotten", tuned_bits["prose"] > untuned["prose"])
peft.activate(coder)
claim("switched off: as before, exactly", bits(coder, "prose", 4) == bits(language, "prose", 4))
peft.activate(coder, default=1.0)


def sheet(texts):
    """Some short texts beside each other, as a figure."""
    made, axes = plots.panels(len(texts), width=10.6, height=1.9)
    for ax, (name, text) in zip(axes, texts.items(), strict=True):
        lines = [line[i : i + 46] for line in text.split("\n") for i in range(0, max(len(line), 1), 46)]
        ax.text(0, 1, "\n".join(lines[:9]).replace("$", r"\$"), family="monospace", size=9, va="top")
        ax.set_title(name, loc="left")
        ax.axis("off")
    return made


# %%
def write(model, prompt, seed=0):
    return generate(model, prompt, 220, temperature=0.5, generator=torch.Generator().manual_seed(seed))


sheet({"base": write(language, "claim("), "with the update": write(coder, "claim(")})

# %% [markdown]
# Both were asked to go on from "claim(", with the same chance. The base goes on in prose. With the update it opens brackets and quotes, and ends its lines as code does. Nobody would run it: this is a model of under a million numbers that spells byte by byte.
#
# ### 8.2 The same numbers as a library
#
# The library [PEFT](https://huggingface.co/docs/peft) is what most people use. Do our classes compute the same? The test needs no download. We build a small model of the family Llama from a *configuration*, with random weights; give the library's update to ours through its file, and ours to the library; and compare logits.

# %%
import warnings

missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
if missing:
    print(f"To run sections 8.2 and 8.3: pip install {' '.join(missing)}. The rest of the notebook does without.")


def quietly(compare):
    """Compare, where both libraries are; without what one of them says of the other's older words."""
    if not missing:
        with warnings.catch_warnings(action="ignore"):
            compare()


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=4, **sizes)).eval()


# %%
@torch.no_grad()
def compare_lora():
    import peft as library

    folder, words = Path(tempfile.mkdtemp()), torch.randint(64, (2, 7), generator=g)
    asked = library.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = library.get_peft_model(small_llama(), asked).eval()
    theirs.save_pretrained(folder / "theirs")
    ours = peft.load_lora(small_llama(), folder / "theirs")
    here, there, plain = ours(words).logits, theirs(words).logits, small_llama()(words).logits
    claim("their file in our classes: the same logits, to 1e-5", (here - there).abs().max() < 1e-5)
    claim("    which are not those of the base", (here - plain).abs().max() > 1e-3)
    peft.save_lora(ours, folder / "ours")
    back = library.PeftModel.from_pretrained(small_llama(), folder / "ours").eval()
    claim("our file in theirs: the same again", (back(words).logits - there).abs().max() < 1e-5)


quietly(compare_lora)

# %% [markdown]
# A difference that the numbers do not show: the library's files have no fingerprint of the base, so it loads them onto any model with layers of the same names and shapes.
#
# **And the prefix?** The library hands its keys and values to a model as its KV cache, as if the prefix had been read before (section 6.5). So can we: our `Prefix`, with the library's weights, given to the model as a cache.


# %%
@torch.no_grad()
def compare_prefix():
    import peft as library
    from transformers import DynamicCache

    words = torch.randint(64, (2, 7), generator=g)
    sizes = {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 16}
    asked = library.PrefixTuningConfig(task_type="CAUSAL_LM", **sizes)
    theirs = library.get_peft_model(small_llama(), asked).eval()
    written, ours = theirs.prompt_encoder["default"], peft.Prefix(5, layers=2, width=32, hidden=16)
    for mine, of_theirs in ((ours.table, written.embedding), (ours.transform, written.transform)):
        mine.load_state_dict(of_theirs.state_dict())
    split = ours().unflatten(3, (4, 8)).transpose(2, 3)  # (layers, key or value, heads, P, 8)
    cache = DynamicCache([tuple(part.expand(2, -1, -1, -1).contiguous() for part in layer) for layer in split])
    model, mask = small_llama(), torch.ones(2, 5 + 7)
    told = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # its older name
    here = model(words, attention_mask=mask, **{told: cache}).logits
    claim("our prefix with their weights: the same logits, to 1e-5", (here - theirs(words).logits).abs().max() < 1e-5)


# %%
quietly(compare_prefix)

# %% [markdown]
# Note the mask: 7 words, and a mask of $5+7$. A mask of 7 is the bug of section 6.3, which users of `transformers` and PEFT have met.
#
# ### 8.3 A real one
#
# Where there is a network and a little memory, the same lines tune a model that people use. They are not run here:
#
# ```python
# from transformers import AutoModelForCausalLM, AutoTokenizer
# from dgm_course import peft
#
# model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
# peft.add_lora(model, ("q_proj", "v_proj"), rank=8, alpha=16)
# optimizer = torch.optim.AdamW(peft.trainable(model).values(), lr=2e-4)
# for x in batches:  # of token ids
#     optimizer.zero_grad()
#     model(input_ids=x, labels=x).loss.backward()
#     optimizer.step()
# peft.save_lora(model, "my-update")
# ```
#
# `add_lora` looks for layers by name and asks only that they are `nn.Linear` or `nn.Conv2d`. (GPT-2 will be refused: its layers are of a kind of their own, which stores weights transposed; see the bug of 2.3.)
#
# ## 9. Looking back: flow, diffusion, GAN, VAE
#
# The lecture's last slide puts its models beside each other. So do we, with the cell of the course that shows each claim. (From here on all letters have their old meanings again.)
#
# ### 9.1 What is exact, what a bound, what approximate
#
# | | VAE | GAN | flow | diffusion, the chain | diffusion, the ODE |
# |---|---|---|---|---|---|
# | $\log p_\theta(x)$ | a bound | none | **exact** | a bound | **exact**, up to the solver (in many dimensions also up to a trace, which is estimated) |
# | what is trained | the bound | a game of two | $\log p_\theta$ itself | a weighted bound | the same |
# | drawing from the model | exact, 1 evaluation | exact, 1 | exact, 1 | exact, $T$ | up to the solver, 10 or more |
# | the code of a given $x$ | an approximate $q(z\mid x)$ | none | **exact**, one $z$ | a fixed $q(x_T\mid x)$, which knows next to nothing of $x$ | exact, up to the solver |
# | asked of the network | any | any | invertible, a cheap determinant | any | a smooth one |
# | size of the latent | free | free | that of $x$ | that of $x$, $T$ times | that of $x$ |
# | what is approximate | $q$ for the posterior | the discriminator, for a divergence | nothing (of pixels: dequantisation) | the step back as a Gaussian, the network | the network, the solver |
# | shown in | [01](01_vae_gan_recap.ipynb), 1.1 and 1.4 | [01](01_vae_gan_recap.ipynb), 3.2 to 3.4 | [02](02_normalizing_flows.ipynb), 1 and 4 | [03](03_ddpm.ipynb), 4 and 8 | [05](05_score_sde.ipynb), 5.4 and 6 |
#
# *Read the column of the ODE twice.* The density is exact *of its own model*. This is not the model of the chain, unless the network is perfect and the steps are many ([notebook 05, section 6.4](05_score_sde.ipynb)). In no column does "exact" mean "right": a flow knows exactly how probable its own, possibly poor, model finds $x$.
#
# ### 9.2 One distribution, three likelihoods
#
# Three bumps on a line, whose density we know. The *flow* is the increasing map from noise to data ([notebook 08, section 6.1](08_distillation.ipynb)); the *ODE* and the *chain* use the ideal denoiser. So no error of a network is left, and each column of the table shows its own. The steps of the chain get one of the two usual variances, $\beta$ or $\tilde\beta$ ([notebook 03, section 3.4](03_ddpm.ipynb)). *Which of the three will equal $\log p$? What does the number of steps $T$ do to the chain's bound? And what model is a chain of one step?*

# %%
modes, widths = torch.tensor([-1.07, 0.18, 1.09], dtype=double), torch.tensor([0.10, 0.17, 0.14], dtype=double)
line = toy.GaussianMixture(modes[:, None], widths**2, torch.tensor([0.40, 0.25, 0.35], dtype=double))
path, points = Cosine(), line.sample(200, torch.Generator().manual_seed(0))
exact, ideal = line.log_prob(points), line.denoiser(path)

small = 1e-5
code_of = lambda x: torch.special.ndtri(line.cdf(x))  # noqa: E731, from data to noise
slope = (code_of(points + small) - code_of(points - small)) / (2 * small)
of_flow = (-code_of(points).square() / 2 - math.log(2 * math.pi) / 2 + slope.log())[:, 0]
claim("flow: log N(z) + log dz/dx is log p, to 1e-6 (the slope is a difference)", (of_flow - exact).abs().max() < 1e-6)
of_ode = likelihood.ode_log_prob(ideal, path, points)
claim("ODE: log p, to 1e-4", (of_ode - exact).abs().max() < 1e-4)

# %%
chain_steps, entropy = [1, 2, 4, 8, 16, 32, 64, 128, 256], -exact.mean()
bounds = {"beta": [], "posterior": []}
for variance, T in ((variance, T) for variance in bounds for T in chain_steps if T > 1 or variance == "beta"):
    x = points.repeat(16, 1)  # each point so many times
    own = torch.Generator().manual_seed(T)
    terms = likelihood.bound(ideal, path, x, path.times(T), variance=variance, generator=own)
    bounds[variance].append(terms.sum(0).mean())
with_beta, with_posterior = (torch.stack(values) for values in bounds.values())

# %%
gap = with_beta - entropy
claim("chain with β: its bound lies above the mean of −log p, for every T up to 64", (gap[:-2] > 0).all())
claim("it tightens from T = 1 to 32", (gap[:6].diff() < 0).all())
claim("and at T = 256 it is within 0.1 nats", gap[-1].abs() < 0.1)
one_normal = torch.distributions.Normal(line.mean, 1.0).log_prob(points).mean()
claim("T = 1: exactly −log of one normal density about the data's mean", (with_beta[0] + one_normal).abs() < 1e-9)
i = torch.arange(2, 100_000, dtype=double)
stays = ((i / (i - 1)) ** 2 - 1 - 2 * (i / (i - 1)).log()).sum() / 2
left_open = with_posterior[-1] - entropy
claim("with β̃ it does not tighten: it stays above by the sum in the text, to 0.2", abs(left_open - stays) < 0.2)

# %%
made, (ax,) = plots.panels(1, width=7.4, height=3.6)
ax.axhline(entropy, color=style.EXACT, linewidth=1)
ax.text(1, entropy + 0.02, "flow and ODE: −log p", color=style.EXACT, va="bottom")
T = torch.tensor(chain_steps)
first, second = "chain, $\\beta$", "chain, $\\tilde\\beta$"
over, lines = {first: T, second: T[1:]}, {first: with_beta, second: with_posterior}
inks = {first: style.MODEL, second: style.GUIDED}
plots.curves(over, lines, "steps T", "bound on −log p, nats", logx=True, colors=inks, ax=ax)
ax.set_xticks(chain_steps, [str(steps) for steps in chain_steps])
ax.set_xticks([], minor=True)
made

# %% [markdown]
# The flow and the ODE give $\log p$. The chain with $\beta$ gives a bound that tightens with $T$. With one step the only latent is pure noise and knows nothing of $x$: what is left is a single normal density, the worst of VAEs, with a collapsed latent ([notebook 01, section 1.6](01_vae_gan_recap.ipynb)). Each further step gives the chain another latent. *A diffusion model is a VAE with many layers and a fixed encoder* ([notebook 03, section 4.1](03_ddpm.ipynb)); in the limit of many layers, with an ideal network, the gap is gone.
#
# With $\tilde\beta$ it is not. The last steps lie so near the data that $x_t$ says hardly anything about *which* $x_0$ close by it came from. The true step then has the variance $\beta$, larger than $\tilde\beta$ by the factor $\sigma_t^2/\sigma_s^2 = i^2/(i-1)^2$ in the $i$-th step from the data, *whatever $T$ is*. Each such step costs the KL divergence of two Gaussians with these variances, $\frac12\bigl(\frac{i^2}{(i-1)^2}-1-\log\frac{i^2}{(i-1)^2}\bigr)$, and all together 1.4 nats. A bound is tight only if every part of the model is right, its variance too (notebook 07, section 1).
#
# For a GAN there is nothing to draw in this figure.
#
# ### 9.3 The lecture's summary, claim by claim
#
# **"They are quite similar (and can be shown to be the same thing under certain settings) except that flow requires invertible layers."**
#
# - *Similar*: both turn noise into data of the same size, by many simple steps. [Notebook 02, section 5](02_normalizing_flows.ipynb) has what "invertible" costs, and its last part, "Why adding noise removes it".
# - *The same thing*: the probability-flow ODE of a diffusion model is an invertible map, a flow with infinitely many layers: [notebook 05, sections 5.4 and 6.1](05_score_sde.ipynb). Nobody built the layers to be invertible. That paths of an ODE do not cross does it.
# - *Under certain settings*: in continuous time, with $\eta = 0$, for a network that is smooth. With the ideal denoiser even two or more steps of DDIM are invertible; a trained student's are not any more: [notebook 08, section 7.2](08_distillation.ipynb). And from the other side, flow matching trains a flow as one trains a diffusion model: [notebook 05, section 7.1](05_score_sde.ipynb).
#
# **"Flow → exact max likelihood."** [Notebook 02, sections 1.1 and 1.3](02_normalizing_flows.ipynb): $\log p$ by change of variables, and its maximum is the whole training. For images dequantisation makes it a bound after all: [section 4.1](02_normalizing_flows.ipynb) there.
#
# **"Diffusion → solve via ELBO."** [Notebook 03, sections 4.1 to 4.3](03_ddpm.ipynb). But $L_{simple}$, which is trained, is the bound with other weights ([section 4.7](03_ddpm.ipynb)); and with the ODE there is an exact likelihood, too.
#
# **"DDPM vs score-based."** Not two models, but two roads to one. The forward chain is an SDE, seen at $T$ times ([notebook 05, section 1.2](05_score_sde.ipynb)); the chain back is the reverse SDE in the limit of many steps. The predicted noise is $-\sigma$ times a score, and both losses differ by a weight and a constant: [sections 3.3 and 4](05_score_sde.ipynb). One table turns $\epsilon$, $x_0$, $v$, score and velocity into each other: [section 7.2](05_score_sde.ipynb).
#
# What the two roads gave each other: from the chain came the bound and a simple loss, from the SDE the ODE, its solvers ([notebook 07](07_fast_sampling.ipynb)) and its likelihood. Some things were found on both: DDIM as another chain, and it is a solver of the ODE. And guidance ([notebook 06](06_guidance.ipynb)) is plainest in the language of scores.
#
# ## 10. Recap
#
# - Fine-tuning for many users: keep the base once, and for each user a small $\Delta W$. Nothing is compressed; the difference is small.
# - LoRA: $\Delta W = \frac\alpha rBA$, with $B = 0$ at the start. In the first step only $B$ moves. Convolutions too: $A$ with the same kernel, $B$ $1\times1$.
# - An update can be merged, and then costs nothing. Keep the old weight: subtracting rounds, and in bfloat16 small changes vanish.
# - Updates have names, can be switched and added. A file holds $A$ and $B$ alone, and should know its base.
# - A full fine-tune's update has full rank and a long tail; what rank $r$ can hold of it at best is its truncated SVD. An update *trained* at a low rank can do as well as the full one all the same.
# - The scale $s$ is a learning rate of $B$ alone: $\times s$ under Adam, $\times s^2$ under SGD. The first step has the same mean for all $r$ with $\alpha/r$ under Adam, with $\alpha/\sqrt r$ under SGD.
# - Adapters bend, so they cannot be merged. They can begin as the exact identity.
# - A prefix is mixed in with the share $\lambda$ of the softmax, and never begins as the identity. Prompt tuning learns tokens; prefix tuning learns keys and values of each layer.
# - Our users: LoRA of rank 8 came close to full fine-tuning with 6 % of the numbers, and on held-out images it overfitted less. Where an update sits counts as much as how many numbers it has.
# - Flow: exact. VAE and chain: a bound. ODE: exact for its own model. GAN: no density. With an ideal network and the variance $\beta$ the chain's bound tightens to the exact value.
#
# **Pitfalls**
#
# - Both factors zero: nothing ever moves. Both random: the start is another model.
# - An update merged twice; merging hidden in `eval`, where it is never called; a transposed weight, with no error on square layers.
# - Unmerging by subtraction. Merging in bfloat16 and calling it the same model.
# - $\alpha$ changed and the learning rate kept, or a rule for Adam used with SGD.
# - Weight decay on $A$ and $B$ pulls towards the base, not towards zero weights.
# - A causal mask of $N\times N$ for $P+N$ keys. Padded with "hidden" it trains for ever and learns nothing.
# - An update loaded onto another base of the same shape.
# - Comparing methods by parameters alone: a merged LoRA costs nothing at run time, an adapter and a prefix do.
#
# **Homework:** [the exercises](../homework/hw7_peft.ipynb) next to this notebook.
#
# **References**
#
# - Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: [*LoRA: Low-Rank Adaptation of Large Language Models*](https://arxiv.org/abs/2106.09685), 2021.
# - Kalajdzievski: [*A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA*](https://arxiv.org/abs/2312.03732), 2023. The rule $\alpha/\sqrt r$.
# - Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly: [*Parameter-Efficient Transfer Learning for NLP*](https://arxiv.org/abs/1902.00751), 2019. Adapters.
# - Pfeiffer, Kamath, Rücklé, Cho, Gurevych: [*AdapterFusion: Non-Destructive Task Composition for Transfer Learning*](https://arxiv.org/abs/2005.00247), 2021. One adapter for each block.
# - Li, Liang: [*Prefix-Tuning: Optimizing Continuous Prompts for Generation*](https://arxiv.org/abs/2101.00190), 2021.
# - Lester, Al-Rfou, Constant: [*The Power of Scale for Parameter-Efficient Prompt Tuning*](https://arxiv.org/abs/2104.08691), 2021. Prompt tuning.
# - He, Zhou, Ma, Berg-Kirkpatrick, Neubig: [*Towards a Unified View of Parameter-Efficient Transfer Learning*](https://arxiv.org/abs/2110.04366), 2022. The slide's figure, and the mixture of 6.1.
# - Ben Zaken, Ravfogel, Goldberg: [*BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models*](https://arxiv.org/abs/2106.10199), 2022. Biases only.
# - Eckart, Young: *The approximation of one matrix by another of lower rank*, Psychometrika 1, 1936.
# - Kingma, Salimans, Poole, Ho: [*Variational Diffusion Models*](https://arxiv.org/abs/2107.00630), 2021. The bound in the limit of many steps.
