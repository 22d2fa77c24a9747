"""Homework 7, parameter-efficient fine-tuning: what is right, what people write instead, and the cases that tell them apart.

For each exercise: the reference, the mistakes, right answers written in other ways, the cases. No answer depends on the sign of a
singular vector, and where roundings are counted all numbers are short enough for float32 to add them exactly.
"""

import math

import numpy as np
import torch

from dgm_course.grading.exercise import Exercise, Group

SINGLE, DOUBLE = torch.float32, torch.float64


# What the exercises share ---------------------------------------------------------------------------------------------


def normal(g, *shape, dtype=DOUBLE):
    return torch.randn(shape, generator=g, dtype=DOUBLE).to(dtype)


def number(g, low, high):
    return low + (high - low) * torch.rand((), generator=g, dtype=DOUBLE).item()


def whole(g, low, high, *shape):
    """Whole numbers, low ≤ n < high; a Python int without a shape."""
    drawn = torch.randint(low, high, shape, generator=g)
    return drawn if shape else int(drawn)


# 1. grouped_update ----------------------------------------------------------------------------------------------------


def grouped_update(A, B, alpha, groups):
    rows = A.reshape(groups, len(A) // groups, -1)
    columns = B.reshape(groups, len(B) // groups, -1)
    return (alpha / len(A) * (columns @ rows)).reshape(len(B), *A.shape[1:])


def scaled_by(scale):
    """The right product with another number before it."""

    def answer(A, B, alpha, groups):
        return grouped_update(A, B, scale(alpha, len(A), groups) * len(A), groups)

    return answer


grouped_own_rank = scaled_by(lambda alpha, r, groups: alpha * groups / r)
grouped_no_scale = scaled_by(lambda alpha, r, groups: 1.0)
grouped_alpha_alone = scaled_by(lambda alpha, r, groups: alpha)
grouped_root = scaled_by(lambda alpha, r, groups: alpha / math.sqrt(r))
grouped_twice = scaled_by(lambda alpha, r, groups: (alpha / r) ** 2)
grouped_each = scaled_by(lambda alpha, r, groups: alpha / r / groups)


def grouped_not_at_all(A, B, alpha, groups):
    """Fits together for one group only."""
    return (alpha / len(A) * (B.flatten(1) @ A.flatten(1))).reshape(len(B), *A.shape[1:])


def grouped_tiled(A, B, alpha, groups):
    return grouped_not_at_all(A, B.repeat(1, groups, 1, 1), alpha, 1)


def grouped_first(A, B, alpha, groups):
    first = A[: len(A) // groups]
    return alpha / len(A) * (B.flatten(1) @ first.flatten(1)).reshape(len(B), *A.shape[1:])


def dealt(B, groups):
    """Rows as if the groups took them in turn."""
    return B.reshape(len(B) // groups, groups, *B.shape[1:]).transpose(0, 1).reshape(B.shape)


def undealt(B, groups):
    return B.reshape(groups, len(B) // groups, *B.shape[1:]).transpose(0, 1).reshape(B.shape)


def grouped_outputs_in_turn(A, B, alpha, groups):
    return undealt(grouped_update(A, dealt(B, groups), alpha, groups), groups)


def grouped_middle_in_turn(A, B, alpha, groups):
    return grouped_update(dealt(A, groups), B, alpha, groups)


def grouped_flipped(A, B, alpha, groups):
    return grouped_update(A.flip(-1, -2), B, alpha, groups)


def grouped_whole(A, B, alpha, groups):
    """The weight of a convolution without groups that does the same."""
    blocks = grouped_update(A, B, alpha, groups).chunk(groups)
    wide = A.new_zeros(len(B), groups * A.shape[1], *A.shape[2:])
    for i, block in enumerate(blocks):
        wide[i * len(block) : (i + 1) * len(block), i * A.shape[1] : (i + 1) * A.shape[1]] = block
    return wide


def grouped_in_a_loop(A, B, alpha, groups):
    """Group by group, channel of the middle by channel of the middle."""
    r, out = len(A), B.new_zeros(len(B), *A.shape[1:])
    own, rows = r // groups, len(B) // groups
    for o in range(len(B)):
        for j in range(own):
            out[o] += alpha / r * B[o, j, 0, 0] * A[(o // rows) * own + j]
    return out


def grouped_by_einsum(A, B, alpha, groups):
    a, b = A.double().unflatten(0, (groups, -1)), B.double()[..., 0, 0].unflatten(0, (groups, -1))
    return (torch.einsum("gor,grchw->gochw", b, a) * alpha / a.shape[:2].numel()).flatten(0, 1).to(A.dtype)


def grouped_by_impulses(A, B, alpha, groups):
    """What both layers make of an image with one bright pixel, for each channel of a group in turn."""
    c, (high, wide), found = A.shape[1], A.shape[2:], []
    for i in range(c):
        x = A.new_zeros(1, groups, c, 2 * high - 1, 2 * wide - 1)
        x[:, :, i, high - 1, wide - 1] = 1
        middle = torch.nn.functional.conv2d(x.flatten(1, 2), A, groups=groups)
        found.append(torch.nn.functional.conv2d(middle, B, groups=groups)[0].flip(-1, -2))
    return alpha / len(A) * torch.stack(found, 1)


def grouped(g, groups, out, middle, into, kernel, dtype=SINGLE):
    """Numbers of channels are those of a group."""
    return {
        "A": normal(g, groups * middle, into, *kernel, dtype=dtype),
        "B": normal(g, groups * out, middle, 1, 1, dtype=dtype),
        "alpha": number(g, 1.5, 6.0),
        "groups": groups,
    }


GROUPED = Exercise(
    "grouped_update",
    points=2,
    minutes=15,
    difficulty=2,
    reference=grouped_update,
    outputs=("update",),
    visible=Group(
        1,
        lambda g: [
            grouped(g, 2, 3, 2, 2, (3, 3)),
            grouped(g, 1, 4, 3, 2, (1, 3), DOUBLE),
            grouped(g, 3, 2, 2, 1, (2, 3), DOUBLE),
        ],
    ),
    hidden={
        "other numbers of groups and channels": Group(
            0.5,
            lambda g: [
                grouped(g, 4, 2, 3, 3, (3, 3)),
                grouped(g, 2, whole(g, 2, 6), 2, whole(g, 3, 6), (5, 3), DOUBLE),
                grouped(g, 1, 5, 2, 7, (3, 3)),
                grouped(g, 3, 1, 2, 4, (1, 1), DOUBLE),
            ],
        ),
        "a channel for each group": Group(
            0.5,
            lambda g: [
                grouped(g, 5, 1, 1, 1, (3, 3), DOUBLE),
                grouped(g, 4, 2, 1, 1, (7, 7)),
                grouped(g, 2, 3, 4, 1, (1, 5), DOUBLE),
                grouped(g, 1, 1, 1, 1, (3, 3)),
            ],
        ),
    },
    mistakes={
        "you divided α by the second side of B": (
            grouped_own_rank,
            "B sees r/g of the channels in the middle. r is all of them, the length of A.",
        ),
        "you left the scale out": (grouped_no_scale, "The update is α/r times the product."),
        "you multiplied by α alone": (grouped_alpha_alone, "The scale is α/r, and r is the number of rows of A."),
        "you took α/√r": (grouped_root, "That is the scale of rsLoRA. Here it is α/r."),
        "you put the scale on both factors": (grouped_twice, "The product is scaled once, by α/r."),
        "you took the mean over the groups": (
            grouped_each,
            "Each output belongs to one group. There is nothing to be averaged over.",
        ),
        "you multiplied the matrices as if there were one group": (
            grouped_not_at_all,
            "B has r/g columns and A has r rows: each block of rows of B belongs to one block of rows of A.",
        ),
        "you repeated B, so that each output sees all of A": (
            grouped_tiled,
            "The shapes fit then, but an output of one group may see the channels in the middle of its own group only.",
        ),
        "you gave every group the A of the first": (
            grouped_first,
            "The i-th group has rows i·r/g to (i+1)·r/g of A.",
        ),
        "you let the groups take the output channels in turn": (
            grouped_outputs_in_turn,
            "A group's output channels lie next to each other: the first d/g belong to the first group.",
        ),
        "you let the groups take the rows of A in turn": (
            grouped_middle_in_turn,
            "A group's channels lie next to each other in the middle, too: reshape to (g, r/g, …), not to (r/g, g, …).",
        ),
        "you turned the kernels round": (
            grouped_flipped,
            "PyTorch's convolution does not flip its kernel, so a weight of A stays at its place.",
        ),
        "you gave the weight of a convolution without groups": (
            grouped_whole,
            "A weight with groups holds the blocks alone: (d, C/g, K, K'), without the zeros between them.",
        ),
    },
    correct={
        "a loop": grouped_in_a_loop,
        "einsum in float64": grouped_by_einsum,
        "an image with one bright pixel": grouped_by_impulses,
    },
    forbidden=("peft.LoRA.update", "peft.LoRA.merge", "peft.LoRA.forward", "peft.merge", "peft.merged"),
)


# 2. first_step --------------------------------------------------------------------------------------------------------


def unit_columns(grad):
    length = grad.norm(dim=0)
    return torch.where(length > 0, grad / length, 0.0)


def first_step(grad, B, scale, rate, optimizer):
    r, slope = B.shape[1], scale * B.mT @ grad
    if optimizer == "sgd":
        return -rate * scale * B @ slope, -rate * scale**2 * grad
    return -rate * scale * B @ slope.sign(), -rate * scale * math.sqrt(2 * r / math.pi) * unit_columns(grad)


def first(sgd=None, adam=None):
    """The first step with other formulas: (grad, B, scale) → (update, mean) under one of the optimizers, without −η."""

    def answer(grad, B, scale, rate, optimizer):
        other = sgd if optimizer == "sgd" else adam
        if other is None:
            return first_step(grad, B, scale, rate, optimizer)
        return tuple(-rate * part for part in other(grad, B, scale))

    return answer


def factors(update=(1, 1), mean=(1, 1)):
    """Right but for factors: numbers, or functions of grad, B and scale; under SGD and under Adam."""

    def value(factor, *inputs):
        return factor(*inputs) if callable(factor) else factor

    def answer(grad, B, scale, rate, optimizer):
        step, average = first_step(grad, B, scale, rate, optimizer)
        at = 0 if optimizer == "sgd" else 1
        return step * value(update[at], grad, B, scale), average * value(mean[at], grad, B, scale)

    return answer


def of_scale(power):
    return lambda grad, B, scale: scale**power


def of_rank(power):
    return lambda grad, B, scale: B.shape[1] ** power


first_one_scale = factors((of_scale(-1), 1), (of_scale(-1), 1))
first_outer_scale = factors((of_scale(-1), of_scale(-1)), (of_scale(-1), of_scale(-1)))
first_squared_under_adam = factors((1, of_scale(1)), (1, of_scale(1)))
first_no_correction = factors((1, 0.1 / math.sqrt(0.001)), (1, 0.1 / math.sqrt(0.001)))
first_uphill = factors((-1, -1), (-1, -1))
first_unit_variance = factors(mean=(of_rank(1), of_rank(0.5)))
first_deviation_1_r = factors(mean=(of_rank(-1), of_rank(-0.5)))
first_one_direction = factors(mean=(of_rank(-1), of_rank(-1)))
first_mean_size_1 = factors(mean=(1, math.sqrt(math.pi / 2)))
first_root_forgotten = factors(mean=(1, math.sqrt(2 / math.pi)))
first_not_unit = first(
    adam=lambda G, B, s: (s * B @ (B.mT @ G).sign(), s * math.sqrt(2 * B.shape[1] / math.pi) * G),
)
first_sign_of_all = first(adam=lambda G, B, s: (s * (B @ (B.mT @ G)).sign(), s * G.sign()))
first_sign_of_w = first(adam=lambda G, B, s: (s**2 * B @ (B.mT @ G.sign()), s**2 * G.sign()))
first_rows = first(
    adam=lambda G, B, s: (
        s * B @ (B.mT @ G).sign(),
        s * math.sqrt(2 * B.shape[1] / math.pi) * unit_columns(G.mT).mT,
    )
)
first_whole_length = first(
    adam=lambda G, B, s: (s * B @ (B.mT @ G).sign(), s * math.sqrt(2 * B.shape[1] / math.pi) * G / G.norm())
)
first_nan = first(
    adam=lambda G, B, s: (s * B @ (B.mT @ G).sign(), s * math.sqrt(2 * B.shape[1] / math.pi) * G / G.norm(dim=0))
)
first_mean_is_the_step = first(
    sgd=lambda G, B, s: (s**2 * B @ (B.mT @ G),) * 2, adam=lambda G, B, s: (s * B @ (B.mT @ G).sign(),) * 2
)
first_of_the_notebook = first(
    sgd=lambda G, B, s: (s**2 * B @ (B.mT @ G), s**2 * B.shape[1] / G.shape[1] * G),
    adam=lambda G, B, s: (
        s * B @ (B.mT @ G).sign(),
        s * B.shape[1] * math.sqrt(2 / (math.pi * G.shape[1])) * unit_columns(G.mT).mT,
    ),
)
first_full = first(sgd=lambda G, B, s: (G, G), adam=lambda G, B, s: (G.sign(), G.sign()))


def first_by_optim(grad, B, scale, rate, optimizer):
    """A real step of PyTorch's own; the mean by the distribution of one number."""
    A = torch.zeros(B.shape[1], grad.shape[1], dtype=DOUBLE, requires_grad=True)
    made = torch.optim.SGD([A], rate) if optimizer == "sgd" else torch.optim.Adam([A], rate, eps=1e-30)
    (grad.double() * (scale * B.double() @ A)).sum().backward()
    made.step()
    r = B.shape[1]
    each = torch.distributions.HalfNormal(r**-0.5).mean.item()  # of |b·g| for a g of length 1
    if optimizer == "sgd":
        mean = -rate * scale**2 * r / r * grad
    else:
        mean = -rate * scale * r * each * torch.nn.functional.normalize(grad.double(), dim=0)
    return (scale * B.double() @ A.detach()).to(grad.dtype), mean.to(grad.dtype)


def first_in_a_loop(grad, B, scale, rate, optimizer):
    """Column by column, direction by direction."""
    d, k = grad.shape
    update, mean = torch.zeros_like(grad), torch.zeros_like(grad)
    for c in range(k):
        g = grad[:, c]
        for j in range(B.shape[1]):
            b = B[:, j]
            pull = scale * torch.dot(b, g)
            update[:, c] -= rate * scale * b * (pull if optimizer == "sgd" else torch.sign(pull))
        if optimizer == "sgd":
            mean[:, c] = -rate * scale * scale * g
        elif g.abs().max() > 0:
            mean[:, c] = -rate * scale * (2 * B.shape[1] / math.pi) ** 0.5 * g / g.square().sum().sqrt()
    return update, mean


def first_in_numpy(grad, B, scale, rate, optimizer):
    G, b = grad.double().numpy(), B.double().numpy()
    slope = np.einsum("dr,dk->rk", b, G) * scale
    length = np.hypot.reduce(G, axis=0)
    move, mean = slope, scale**2 * G
    if optimizer == "adam":
        move = np.divide(slope, abs(slope), out=0 * slope, where=slope != 0)
        mean = scale * np.sqrt(2 * b.shape[1] / np.pi) * np.divide(G, length, out=0 * G, where=length > 0)
    found = (-rate * scale * b @ move, -rate * mean)
    return tuple(torch.from_numpy(part).to(grad.dtype) for part in found)


def stepped(g, shape, rank, optimizer, dtype=DOUBLE, still=()):
    """A gradient and a start; the columns in `still` are of inputs that were 0 all the time."""
    d, k = shape
    grad = normal(g, d, k) * (0.3 + 1.5 * torch.rand(k, generator=g, dtype=DOUBLE))
    grad[:, list(still)] = 0
    return {
        "grad": grad.to(dtype),
        "B": normal(g, d, rank, dtype=dtype) / math.sqrt(rank),
        "scale": number(g, 1.4, 3.0),
        "rate": number(g, 0.01, 0.1),
        "optimizer": optimizer,
    }


STEP = Exercise(
    "first_step",
    points=4,
    minutes=30,
    difficulty=4,
    reference=first_step,
    outputs=("update", "mean"),
    visible=Group(
        1,
        lambda g: [
            stepped(g, (5, 4), 3, "sgd"),
            stepped(g, (4, 6), 2, "adam", still=[2]),
            stepped(g, (3, 5), 3, "adam", SINGLE),
            stepped(g, (6, 2), 4, "sgd", SINGLE),
        ],
    ),
    hidden={
        "other shapes and ranks": Group(
            2,
            lambda g: [
                stepped(g, (7, 3), 5, "sgd"),
                stepped(g, (2, 9), 4, "adam"),
                stepped(g, (4, 4), 4, "adam", SINGLE),
                stepped(g, (5, 5), 2, "sgd", SINGLE),
                stepped(g, (9, 8), whole(g, 2, 8), "adam"),
            ],
        ),
        "rank 1, one input, one output, inputs that never speak": Group(
            1,
            lambda g: [
                stepped(g, (6, 4), 1, "adam", still=[0, 3]),
                stepped(g, (1, 5), 3, "adam", still=[1]),
                stepped(g, (5, 1), 2, "adam"),
                stepped(g, (4, 3), 1, "sgd", SINGLE, still=[1]),
                stepped(g, (1, 1), 2, "sgd"),
            ],
        ),
    },
    mistakes={
        "you have the scale once under SGD": (
            first_one_scale,
            "The scale stands before BA, and by the chain rule in the gradient by A again: s².",
        ),
        "you left out the scale before BA": (
            first_outer_scale,
            "What the layer adds is s·BA. The step moves A, and s multiplies what comes of it.",
        ),
        "you squared the scale under Adam, too": (
            first_squared_under_adam,
            "Adam's first step has the size η whatever the size of the gradient: the s inside is lost, the one before BA stays.",
        ),
        "you forgot Adam's corrections for the start": (
            first_no_correction,
            "m and v begin at 0, and Adam divides them by 1 − β₁ and 1 − β₂ in the first step. What is left is g/√(g²).",
        ),
        "you walked uphill": (first_uphill, "A step goes against the gradient."),
        "you took a variance of 1 for B": (
            first_unit_variance,
            "The entries of B have variance 1/r, so E[BBᵀ] is the sum of r matrices I/r.",
        ),
        "you took 1/r for the deviation of B": (
            first_deviation_1_r,
            "1/r is the variance of an entry. Its deviation is 1/√r.",
        ),
        "you took the mean over the directions": (
            first_one_direction,
            "ΔW is the sum over the r columns of B, not their mean.",
        ),
        "you took the mean of |z| to be 1": (
            first_mean_size_1,
            "For a Gaussian of deviation 1 it is √(2/π): the mean of a size is less than the root of the mean square.",
        ),
        "you took 2/π for the mean of |z|": (first_root_forgotten, "It is √(2/π)."),
        "you did not divide by the length of the column": (
            first_not_unit,
            "The sign does not care how long the column g of G is: E[sign(b·g) b] points along g, with a length of its own.",
        ),
        "you took the sign of the whole step": (
            first_sign_of_all,
            "Adam sees the gradient by A, (r, k), and takes its signs. Then B multiplies.",
        ),
        "you took the sign of the gradient by W": (
            first_sign_of_w,
            "It is A that is trained: the signs are those of s·BᵀG.",
        ),
        "you made the rows of G unit": (
            first_rows,
            "That is for a Gaussian A. Here a column of B meets a column of G.",
        ),
        "you divided by the length of all of G": (
            first_whole_length,
            "Each column of ΔW is made of the signs of its own column of BᵀG: divide each column of G by its own length.",
        ),
        "you divided a column of zeros by its length": (
            first_nan,
            "An input that was always 0 has a gradient of 0, and Adam leaves its column where it is: 0, not 0/0.",
        ),
        "you gave the step of this B as the mean": (
            first_mean_is_the_step,
            "The mean is over all B. It depends on G, r, s and η, not on the B that came.",
        ),
        "you took the notebook's mean, for a Gaussian A": (
            first_of_the_notebook,
            "Here A is zero, and B has d rows of variance 1/r: work the mean out anew.",
        ),
        "you stepped with the whole weight": (
            first_full,
            "That is the first step of full fine-tuning. Here A moves alone, and what it can do is seen through B.",
        ),
    },
    correct={
        "PyTorch's optimizers": first_by_optim,
        "a loop": first_in_a_loop,
        "NumPy": first_in_numpy,
    },
    forbidden=("peft.add_lora", "peft.LoRA.add", "peft.LoRA.update", "peft.LoRA.forward"),
)


# 3. best_update -------------------------------------------------------------------------------------------------------


def ranks_in(delta, budget):
    d, k = delta.flatten(1).shape
    return min(budget // (d + k), d, k)


def tails(sigma, d, k):
    """What is left for each rank: the sums of the last squares, and 0."""
    squares = sigma[: min(d, k)] ** 2
    return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


def best_update(delta, inputs, budget):
    W, X = delta.flatten(1).double(), inputs.double()
    U, sigma, _ = torch.linalg.svd(W @ X.mT / math.sqrt(len(X)), full_matrices=False)
    U = U[:, : ranks_in(delta, budget)]
    left = tails(sigma, *W.shape)
    return (U @ (U.mT @ W)).reshape(delta.shape).to(delta.dtype), left.to(delta.dtype)


def best(rank=ranks_in, sees=lambda X: X, update=None, left=None):
    """The best update with one part of it changed, all in float64."""

    def answer(delta, inputs, budget):
        W, X = delta.flatten(1).double(), sees(inputs.double())
        U, sigma, V = torch.linalg.svd(W @ X.mT / math.sqrt(len(X)), full_matrices=False)
        r = rank(delta, budget)
        low = U[:, :r] @ U[:, :r].mT @ W if update is None else update(W, X, r)
        rest = tails(sigma, *W.shape) if left is None else left(sigma, W, X)
        return low.reshape(delta.shape).to(delta.dtype), rest.to(delta.dtype)

    return answer


def truncated(M, r):
    U, sigma, V = torch.linalg.svd(M, full_matrices=False)
    return U[:, :r] * sigma[:r] @ V[:r]


def root_of_moment(X):
    values, vectors = torch.linalg.eigh(X.mT @ X / len(X))
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT


def by_components(W, X, r):
    """ΔW of the r largest principal directions of the inputs."""
    V = torch.linalg.eigh(X.mT @ X)[1].flip(1)[:, :r]
    return W @ V @ V.mT


def by_moment(W, X, r):
    U = torch.linalg.svd(W @ X.mT @ X)[0][:, :r]
    return U @ U.mT @ W


def smallest(W, X, r):
    U = torch.linalg.eigh(W @ X.mT @ X @ W.mT)[1][:, :r]
    return U @ U.mT @ W


best_plain = best(
    update=lambda W, X, r: truncated(W, r), left=lambda sigma, W, X: tails(torch.linalg.svdvals(W), *W.shape)
)
best_centred = best(sees=lambda X: X - X.mean(0))
best_squared = best(
    update=by_moment, left=lambda sigma, W, X: tails(torch.linalg.svdvals(W @ X.mT @ X / len(X)), *W.shape)
)
best_weighted = best(update=lambda W, X, r: truncated(W @ root_of_moment(X), r))
best_components = best(update=by_components)
best_smallest = best(update=smallest)
best_d_times_k = best(rank=lambda delta, budget: min(budget // delta.numel(), *delta.flatten(1).shape))
best_one_side = best(rank=lambda delta, budget: min(budget // len(delta), *delta.flatten(1).shape))
best_rounded_up = best(
    rank=lambda delta, budget: min(-(-budget // sum(delta.flatten(1).shape)), min(delta.flatten(1).shape))
)
best_at_least_1 = best(rank=lambda delta, budget: max(1, ranks_in(delta, budget)))
best_kernel_once = best(
    rank=lambda delta, budget: min(budget // (delta.shape[0] + delta.shape[1]), *delta.flatten(1).shape)
)
best_summed = best(left=lambda sigma, W, X: tails(sigma, *W.shape) * len(X))
best_over_outputs = best(left=lambda sigma, W, X: tails(sigma, *W.shape) / len(W))
best_root = best(left=lambda sigma, W, X: tails(sigma, *W.shape).sqrt())
best_not_squared = best(left=lambda sigma, W, X: tails(sigma.sqrt(), *W.shape))
best_kept = best(left=lambda sigma, W, X: tails(sigma, *W.shape)[0] - tails(sigma, *W.shape))
best_share = best(left=lambda sigma, W, X: tails(sigma, *W.shape) / tails(sigma, *W.shape)[0])
best_next_alone = best(left=lambda sigma, W, X: torch.cat([sigma[: min(W.shape)] ** 2, sigma.new_zeros(1)]))
best_without_rank_0 = best(left=lambda sigma, W, X: tails(sigma, *W.shape)[1:])


def best_by_whitening(delta, inputs, budget):
    """The inputs made round by Cholesky's factor, the plain best matrix, and back."""
    W, X = delta.flatten(1).double(), inputs.double()
    L = torch.linalg.cholesky(X.mT @ X / len(X))
    low = truncated(W @ L, ranks_in(delta, budget))
    left = torch.stack([(W @ L - truncated(W @ L, r)).square().sum() for r in range(min(W.shape) + 1)])
    return torch.linalg.solve(L.mT, low.mT).mT.reshape(delta.shape).to(delta.dtype), left.to(delta.dtype)


def best_by_eigenvectors(delta, inputs, budget):
    """The directions in which the outputs spread most."""
    W, outputs = delta.flatten(1).double(), inputs.double() @ delta.flatten(1).double().mT
    values, vectors = torch.linalg.eigh(outputs.mT @ outputs / len(outputs))
    most, r = min(W.shape), ranks_in(delta, budget)
    keep = vectors[:, vectors.shape[1] - r :]
    left = torch.stack([values[: len(values) - n].sum() if n < most else 0 * values[0] for n in range(most + 1)])
    return (keep @ keep.mT @ W).view(delta.shape).to(delta.dtype), left.to(delta.dtype)


def best_by_regression(delta, inputs, budget):
    """Least squares for each output, with the fitted outputs cut to their first principal components; errors measured."""
    W, X = delta.flatten(1).double(), inputs.double()
    Y, made = X @ W.mT, []
    V = torch.linalg.svd(Y, full_matrices=False)[2]
    for r in range(min(W.shape) + 1):
        made.append(torch.linalg.lstsq(X, Y @ V[:r].mT @ V[:r]).solution.mT)
    left = torch.stack([(Y - X @ low.mT).square().sum(1).mean() for low in made])
    return made[ranks_in(delta, budget)].reshape(delta.shape).to(delta.dtype), left.to(delta.dtype)


def best_in_own_dtype(delta, inputs, budget):
    W = delta.flatten(1)
    U, sigma, _ = torch.linalg.svd(W @ inputs.mT, full_matrices=False)
    U = U[:, : ranks_in(delta, budget)]
    return (U @ U.mT @ W).reshape(delta.shape), tails(sigma, *W.shape) / len(inputs)


def fine_tuned(g, shape, samples, budget, dtype=DOUBLE):
    """ΔW and inputs that are not round and have a mean; on them the singular values fall by a factor each."""
    d, k = shape[0], math.prod(shape[1:])
    X = normal(g, samples, k) @ (torch.diag(torch.linspace(1.6, 0.5, k, dtype=DOUBLE)) @ normal(g, k, k)) / k**0.5
    X = X + 0.4 * normal(g, samples, k) + 0.8 * normal(g, k)
    most = min(d, k)
    U, V = torch.linalg.qr(normal(g, d, d))[0][:, :most], torch.linalg.qr(normal(g, k, k))[0][:, :most]
    falling = (0.55 + 0.2 * torch.rand(most, generator=g, dtype=DOUBLE)).cumprod(0)
    whitened = U * falling @ V.mT
    L = torch.linalg.cholesky(X.mT @ X / samples)
    delta = torch.linalg.solve(L.mT, whitened.mT).mT.reshape(shape).contiguous()
    return {"delta": delta.to(dtype), "inputs": X.to(dtype), "budget": budget}


BEST = Exercise(
    "best_update",
    points=4,
    minutes=30,
    difficulty=4,
    reference=best_update,
    outputs=("update", "left"),
    visible=Group(
        1,
        lambda g: [
            fine_tuned(g, (4, 5), 12, 24),
            fine_tuned(g, (3, 2, 3, 1), 16, 13, SINGLE),
            fine_tuned(g, (3, 4), 9, 5),
            fine_tuned(g, (6, 3), 10, 22),
        ],
    ),
    hidden={
        "other shapes and budgets": Group(
            2,
            lambda g: [
                fine_tuned(g, (8, 6), 30, 14 * 3 + whole(g, 0, 14)),
                fine_tuned(g, (5, 2, 2, 2), 40, 13 * 2 + whole(g, 0, 13), SINGLE),
                fine_tuned(g, (7, 4), 4, 11 * 2 + 5),
                fine_tuned(g, (2, 9), 20, 11 + whole(g, 0, 11)),
            ],
        ),
        "budgets for nothing and for all, a single row": Group(
            1,
            lambda g: [
                fine_tuned(g, (5, 4), 15, whole(g, 0, 9)),
                fine_tuned(g, (3, 2, 1, 2), 12, 500, SINGLE),
                fine_tuned(g, (1, 6), 8, 7),
                fine_tuned(g, (4, 1), 5, whole(g, 5, 20)),
                fine_tuned(g, (4, 3, 2, 1), 14, 9),
            ],
        ),
    },
    mistakes={
        "you cut ΔW as if all inputs were alike": (
            best_plain,
            "The truncated SVD of ΔW is best for inputs that are as large in all directions. Ask what it is of ΔW x that counts.",
        ),
        "you took the mean of the inputs away": (
            best_centred,
            "What the layer sees is x itself: it is E[xxᵀ] that counts, with the mean in it.",
        ),
        "you weighted by E[xxᵀ] and not by its root": (
            best_squared,
            "The error is the mean of |(ΔW − M) x|², so each x comes in once on either side: ‖(ΔW − M) E[xxᵀ]^½‖².",
        ),
        "you did not go back to the inputs as they are": (
            best_weighted,
            "That is the best matrix for inputs that have been made round. The layer's inputs are not: undo the root.",
        ),
        "you kept the directions in which the inputs are largest": (
            best_components,
            "ΔW may do nothing there. What has to be large is what ΔW makes of the inputs.",
        ),
        "you kept the smallest directions": (
            best_smallest,
            "eigh gives its values in ascending order: the largest come last.",
        ),
        "you divided the budget by d·k": (
            best_d_times_k,
            "d·k numbers are all of ΔW. One more rank costs a row of A and a column of B.",
        ),
        "you paid for one of the two factors": (
            best_one_side,
            "One more rank costs a column of B, d numbers, and a row of A, k numbers.",
        ),
        "you rounded the rank up": (best_rounded_up, "The file must fit into the budget."),
        "you took rank 1 where nothing fits": (
            best_at_least_1,
            "With less than d + k numbers there is no update at all: M = 0.",
        ),
        "you counted a kernel as one number": (
            best_kernel_once,
            "A row of A holds a whole kernel for each channel: k = C·K·K' numbers.",
        ),
        "you summed over the inputs": (best_summed, "The error is the mean over the inputs."),
        "you averaged over the outputs, too": (
            best_over_outputs,
            "The error of one input is the squared length of a vector, a sum over the outputs.",
        ),
        "you gave roots of errors": (best_root, "Asked is the mean squared error itself."),
        "you summed the singular values and not their squares": (
            best_not_squared,
            "The squared error is the sum of the squares of what is left out.",
        ),
        "you gave what is kept": (best_kept, "Asked is what is left out: it falls from all of it at rank 0 to 0."),
        "you gave shares of the error at rank 0": (best_share, "Asked are the errors themselves."),
        "you gave the next singular value alone": (
            best_next_alone,
            "Its square is the largest error over one direction. The mean squared error has all that are left out, summed.",
        ),
        "you left out rank 0": (
            best_without_rank_0,
            "The list begins with rank 0, where M = 0 and the error is E|ΔW x|².",
        ),
    },
    correct={
        "round inputs": best_by_whitening,
        "eigenvectors of the outputs": best_by_eigenvectors,
        "regression": best_by_regression,
        "float32 where it came": best_in_own_dtype,
    },
    tolerance=1e-4,
    forbidden=("peft.LoRA.update", "peft.LoRA.merge", "peft.LoRA.forward", "peft.merge", "peft.merged"),
)


# 4. joined ------------------------------------------------------------------------------------------------------------


def sizes(downs):
    return torch.tensor([len(A) for A in downs], dtype=DOUBLE)


def scales_of(downs, alphas, rooted):
    ranks = sizes(downs)
    return alphas / torch.where(rooted, ranks.sqrt(), ranks)


def products(downs, ups, scales):
    """⟨s_i B_i A_i, s_j B_j A_j⟩ for all pairs."""
    n = len(downs)
    found = torch.zeros(n, n, dtype=DOUBLE)
    for i in range(n):
        for j in range(n):
            left, right = (a.double() @ b.double().mT for a, b in ((ups[i].mT, ups[j].mT), (downs[i], downs[j])))
            found[i, j] = scales[i] * scales[j] * (left * right).sum()
    return found


def joined(downs, ups, alphas, rooted, weights, alpha):
    scales, rank = scales_of(downs, alphas, rooted), sum(map(len, downs))
    parts = [(w * s * rank / alpha).item() * B for w, s, B in zip(weights, scales, ups, strict=True)]
    return torch.cat(downs), torch.cat(parts, 1), products(downs, ups, scales)


def joined_with(factor=None, pair=None):
    """Other factors before each B, (downs, scales, weights, alpha, alphas, rooted) → (n,), or another matrix of products."""

    def answer(downs, ups, alphas, rooted, weights, alpha):
        A, B, overlap = joined(downs, ups, alphas, rooted, weights, alpha)
        scales = scales_of(downs, alphas, rooted)
        if factor is not None:
            numbers = factor(downs, scales, weights, alpha, alphas, rooted)
            B = torch.cat([f.item() * up for f, up in zip(numbers, ups, strict=True)], 1)
        if pair is not None:
            overlap = pair(downs, ups, scales, weights)
        return A, B, overlap

    return answer


def with_scales(rule):
    """Other scales of the files, in B and in the products."""

    def answer(downs, ups, alphas, rooted, weights, alpha):
        scales, rank = rule(sizes(downs), alphas, rooted), sum(map(len, downs))
        parts = [(w * s * rank / alpha).item() * B for w, s, B in zip(weights, scales, ups, strict=True)]
        return torch.cat(downs), torch.cat(parts, 1), products(downs, ups, scales)

    return answer


def new_scale(rule):
    return joined_with(lambda downs, s, w, alpha, alphas, rooted: w * s / rule(alpha, sizes(downs)))


joined_all_plain = with_scales(lambda ranks, alphas, rooted: alphas / ranks)
joined_all_rooted = with_scales(lambda ranks, alphas, rooted: alphas / ranks.sqrt())
joined_the_other_way = with_scales(lambda ranks, alphas, rooted: alphas / torch.where(rooted, ranks, ranks.sqrt()))
joined_root_times = with_scales(
    lambda ranks, alphas, rooted: alphas * torch.where(rooted, ranks.sqrt(), 1 / ranks),
)
joined_root_of_scale = with_scales(
    lambda ranks, alphas, rooted: torch.where(rooted, (alphas / ranks).sqrt(), alphas / ranks)
)
joined_no_new_scale = new_scale(lambda alpha, ranks: 1.0)
joined_scaled_again = new_scale(lambda alpha, ranks: ranks.sum() / alpha)
joined_first_rank = new_scale(lambda alpha, ranks: alpha / ranks[0])
joined_own_ranks = new_scale(lambda alpha, ranks: alpha / ranks)
joined_new_root = new_scale(lambda alpha, ranks: alpha / ranks.sum().sqrt())
joined_no_old_scale = joined_with(lambda downs, s, w, alpha, alphas, rooted: w * sizes(downs).sum() / alpha)
joined_no_weights = joined_with(lambda downs, s, w, alpha, alphas, rooted: s * sizes(downs).sum() / alpha)
joined_mean = joined_with(lambda downs, s, w, alpha, alphas, rooted: w / w.sum() * s * sizes(downs).sum() / alpha)
joined_squared = joined_with(lambda downs, s, w, alpha, alphas, rooted: w**2 * s * sizes(downs).sum() / alpha)
joined_raw_products = joined_with(pair=lambda downs, ups, s, w: products(downs, ups, torch.ones_like(s)))
joined_weighted_products = joined_with(pair=lambda downs, ups, s, w: products(downs, ups, w * s))
joined_scale_once = joined_with(pair=lambda downs, ups, s, w: products(downs, ups, s) / s)


def joined_cosines(downs, ups, alphas, rooted, weights, alpha):
    A, B, overlap = joined(downs, ups, alphas, rooted, weights, alpha)
    length = overlap.diagonal().sqrt()
    return A, B, overlap / length / length[:, None]


def pairs(formula):
    """All pairs of a formula of A_i, A_j, B_i, B_j, with both scales."""

    def matrix(downs, ups, scales, weights):
        n = len(downs)
        found = torch.zeros(n, n, dtype=DOUBLE)
        for i in range(n):
            for j in range(n):
                four = (one.double() for one in (downs[i], downs[j], ups[i], ups[j]))
                found[i, j] = scales[i] * scales[j] * formula(*four)
        return found

    return joined_with(pair=matrix)


joined_two_traces = pairs(lambda A, C, B, D: torch.trace(A @ C.mT) * torch.trace(B.mT @ D))
joined_all_entries = pairs(lambda A, C, B, D: (B.mT @ D @ C @ A.mT).sum())
joined_two_norms = pairs(lambda A, C, B, D: (A @ C.mT).norm() * (B.mT @ D).norm())
joined_transposed = pairs(lambda A, C, B, D: ((B.mT @ D) * (C @ A.mT)).sum())


def joined_scale_in_a(downs, ups, alphas, rooted, weights, alpha):
    A, B, overlap = joined(downs, ups, alphas, rooted, weights, alpha)
    numbers = weights * scales_of(downs, alphas, rooted) * len(A) / alpha
    return torch.cat([f.item() * down for f, down in zip(numbers, downs, strict=True)]), torch.cat(ups, 1), overlap


def joined_added(downs, ups, alphas, rooted, weights, alpha):
    """A and B added, each by itself, which needs one rank."""
    A, numbers = sum(downs), weights * scales_of(downs, alphas, rooted) * len(downs[0]) / alpha
    B = sum(f.item() * up for f, up in zip(numbers, ups, strict=True))
    return A, B, products(downs, ups, scales_of(downs, alphas, rooted))


def joined_roots(downs, ups, alphas, rooted, weights, alpha):
    """A and B added with the roots of weight and scale, and the sign in A."""
    numbers = weights * scales_of(downs, alphas, rooted)
    A = sum((f.sign() * f.abs().sqrt()).item() * down for f, down in zip(numbers, downs, strict=True))
    B = sum((f.abs().sqrt()).item() * up for f, up in zip(numbers, ups, strict=True))
    return A, B, products(downs, ups, scales_of(downs, alphas, rooted))


def joined_reversed(downs, ups, alphas, rooted, weights, alpha):
    A, B, overlap = joined(downs, ups, alphas, rooted, weights, alpha)
    return A, torch.cat(B.split([len(one) for one in downs], 1)[::-1], 1), overlap


def joined_in_columns(downs, ups, alphas, rooted, weights, alpha):
    """A factor for each column of B, and one product for all pairs, summed block by block."""
    ranks = [len(A) for A in downs]
    scales = torch.tensor(
        [a / (r**0.5 if root else r) for a, r, root in zip(alphas.tolist(), ranks, rooted.tolist(), strict=True)],
        dtype=DOUBLE,
    )
    A, B = torch.cat(downs, 0), torch.hstack(list(ups))
    each = torch.repeat_interleave(weights * scales, torch.tensor(ranks))
    own = torch.repeat_interleave(scales, torch.tensor(ranks))
    wide_a, wide_b = A.double(), own * B.double()
    gram = (wide_a @ wide_a.T) * (wide_b.T @ wide_b)
    overlap = torch.stack([torch.stack([block.sum() for block in rows.split(ranks, 1)]) for rows in gram.split(ranks)])
    return A, (B * (each * sum(ranks) / alpha).to(B.dtype)).contiguous(), overlap


def joined_by_traces(downs, ups, alphas, rooted, weights, alpha):
    """tr(A_iᵀ B_iᵀ B_j A_j), taken round until the small matrices stand inside."""
    rank, s = sum(len(A) for A in downs), []
    for A, a, root in zip(downs, alphas, rooted, strict=True):
        s.append(float(a) / math.sqrt(len(A)) if root else float(a) / len(A))
    B = torch.cat(
        [up.double() * (float(w) * one / (alpha / rank)) for up, w, one in zip(ups, weights, s, strict=True)], -1
    )
    A, C = [down.double() for down in downs], [one * up.double() for one, up in zip(s, ups, strict=True)]
    rows = [[torch.trace(A[j] @ A[i].T @ (C[i].T @ C[j])) for j in range(len(s))] for i in range(len(s))]
    return torch.cat(downs), B.to(ups[0].dtype), torch.stack([torch.stack(row) for row in rows])


def joined_by_qr(downs, ups, alphas, rooted, weights, alpha):
    """The updates in the coordinates of bases for all rows of A and all columns of B: small matrices with the same products."""
    rank = sum(map(len, downs))
    scales = alphas / sizes(downs) ** (1 - 0.5 * rooted.double())
    row_basis = torch.linalg.qr(torch.cat(downs).double().mT)[1].split([len(A) for A in downs], 1)
    column_basis = torch.linalg.qr(torch.cat(ups, 1).double())[1].split([len(A) for A in downs], 1)
    small = torch.stack(
        [s * up @ down.mT for s, up, down in zip(scales, column_basis, row_basis, strict=True)]
    ).flatten(1)
    B = [up * (w * s * rank / alpha).to(up.dtype) for up, w, s in zip(ups, weights, scales, strict=True)]
    return torch.vstack(list(downs)), torch.cat(B, dim=1), small @ small.mT


def files(g, ranks, shape, rooted, dtype=DOUBLE, weights=None):
    d, k = shape
    shared = normal(g, max(ranks), k)  # updates of one base have something in common
    common = normal(g, d, max(ranks))
    n = len(ranks)
    drawn = torch.tensor([number(g, 0.3, 1.7) for _ in range(n)], dtype=DOUBLE)
    signs = (
        torch.ones(n, dtype=DOUBLE) if n == 1 else torch.where(torch.arange(n) == whole(g, 0, n), -1.0, 1.0).double()
    )
    return {
        "downs": [(normal(g, r, k) + 0.7 * shared[:r]).to(dtype) / 2 for r in ranks],
        "ups": [(normal(g, d, r) + 0.7 * common[:, :r]).to(dtype) / 2 for r in ranks],
        "alphas": torch.tensor([number(g, 1.5, 9.0) for _ in ranks], dtype=DOUBLE),
        "rooted": torch.tensor(rooted),
        "weights": drawn * signs if weights is None else torch.tensor(weights, dtype=DOUBLE),
        "alpha": number(g, 1.5, 9.0),
    }


JOINED = Exercise(
    "joined",
    points=4,
    minutes=25,
    difficulty=3,
    reference=joined,
    outputs=("A", "B", "overlap"),
    visible=Group(
        1,
        lambda g: [
            files(g, [2, 2], (4, 5), [False, False]),
            files(g, [3, 1, 2], (5, 4), [True, False, False], SINGLE),
            files(g, [3, 2], (3, 6), [False, True]),
        ],
    ),
    hidden={
        "other numbers of files and ranks": Group(
            1.5,
            lambda g: [
                files(g, [4, 2, 3, 1], (6, 7), [True, True, False, False]),
                files(g, [3, 3], (4, 3), [False, True], SINGLE),
                files(g, [2, 5], (2, 5), [True, False]),
                files(g, [3], (6, 4), [True]),
            ],
        ),
        "one file, files that are switched off, a very wide layer": Group(
            1.5,
            lambda g: [
                files(g, [4], (5, 6), [False], SINGLE),
                files(g, [1, 2], (3, 3), [True, True], weights=[0.0, 1.0]),
                files(g, [2, 1], (50_000, 60_000), [True, False], SINGLE),
            ],
        ),
    },
    mistakes={
        "you forgot the scale of the new file": (
            joined_no_new_scale,
            "Whoever reads the new file multiplies by α/R, so B must be divided by it beforehand.",
        ),
        "you multiplied by the scale of the new file": (
            joined_scaled_again,
            "Whoever reads the new file multiplies by α/R. Divide B by it, or it is there twice.",
        ),
        "you took the first file's rank for the new one": (
            joined_first_rank,
            "The new file has the rank R = r_1 + … + r_n, and its scale is α/R.",
        ),
        "you took each file's own rank for the new scale": (
            joined_own_ranks,
            "There is one new file with one scale, α/R, and R is the sum of the ranks.",
        ),
        "you took α/√R for the new scale": (joined_new_root, "The new file is a plain one: it is read with α/R."),
        "you read all files as plain ones": (
            joined_all_plain,
            "Where rooted is true, the file's scale is α/√r.",
        ),
        "you read all files as rooted ones": (
            joined_all_rooted,
            "Where rooted is false, the file's scale is α/r.",
        ),
        "you exchanged plain and rooted files": (
            joined_the_other_way,
            "rooted says that the scale is α/√r.",
        ),
        "you multiplied α by √r": (
            joined_root_times,
            "α√r is the α of a plain file with the same scale. The scale itself is that over r: α/√r.",
        ),
        "you took the root of the whole scale": (joined_root_of_scale, "The root is of r alone: α/√r."),
        "you forgot the scales of the old files": (
            joined_no_old_scale,
            "Each file's update is s_i B_i A_i, with its own α and r in s_i. The new file has another scale.",
        ),
        "you forgot the weights": (joined_no_weights, "Each update is added with its weight w_i."),
        "you divided the weights by their sum": (
            joined_mean,
            "The weights are as they are: two updates added in full have the weights 1 and 1.",
        ),
        "you put the weight on both factors": (
            joined_squared,
            "A weight that multiplies A and B multiplies their product twice.",
        ),
        "you put the scales into A": (
            joined_scale_in_a,
            "The sum is right, but asked is an A that is the old ones as they are. All numbers go into B.",
        ),
        "you added the A and the B": (
            joined_added,
            "(B_1 + B_2)(A_1 + A_2) has the terms B_1A_2 and B_2A_1 in it, which nobody trained. Put them side by side.",
        ),
        "you added A and B with the roots of the weights": (
            joined_roots,
            "A public library has such a choice, but it is no sum of the updates: B_1A_2 and B_2A_1 come in. Put them side by side.",
        ),
        "you put the B in the opposite order": (
            joined_reversed,
            "Each block of columns of B meets the block of rows of A at the same place.",
        ),
        "you left the scales out of the overlap": (
            joined_raw_products,
            "The updates are s_i B_i A_i: both scales belong to the product.",
        ),
        "you took the overlap of the weighted updates": (
            joined_weighted_products,
            "The overlap is of the files' updates themselves, without the w_i.",
        ),
        "you have one of the two scales in the overlap": (
            joined_scale_once,
            "⟨s_i B_i A_i, s_j B_j A_j⟩ has s_i and s_j.",
        ),
        "you gave cosines": (joined_cosines, "Asked are the inner products, with the lengths in them."),
        "you multiplied the products of the A and of the B": (
            joined_two_traces,
            "⟨B_iA_i, B_jA_j⟩ is the sum of (B_iᵀB_j)_{pq} (A_iA_jᵀ)_{pq} over all p and q. Two traces have p = q only, and mix them.",
        ),
        "you summed all entries of the product of both small matrices": (
            joined_all_entries,
            "It is the trace of B_iᵀB_j · A_jA_iᵀ, or the sum of B_iᵀB_j times A_iA_jᵀ, entry by entry.",
        ),
        "you multiplied the lengths of both small matrices": (
            joined_two_norms,
            "Lengths have no sign. Multiply B_iᵀB_j and A_iA_jᵀ entry by entry, and sum.",
        ),
        "you turned one of the two small matrices round": (
            joined_transposed,
            "Entry by entry, B_iᵀB_j goes with A_iA_jᵀ: the first index is a direction of i in both.",
        ),
    },
    correct={
        "a factor for each column": joined_in_columns,
        "traces": joined_by_traces,
        "QR": joined_by_qr,
    },
    forbidden=(
        "peft.LoRA.update",
        "peft.LoRA.merge",
        "peft.LoRA.forward",
        "peft.merge",
        "peft.merged",
        "peft.activate",
    ),
)


# 5. merged_pair -------------------------------------------------------------------------------------------------------


def rounded(x):
    """To bfloat16 and back."""
    return x.to(torch.bfloat16).to(SINGLE)


def sum_of(downs, ups, scales):
    return torch.einsum("n,ndr,nrk->dk", scales.float(), ups, downs)


def merged_pair(weight, downs, ups, scales):
    total = weight + sum_of(downs, ups, scales)
    return rounded(total), rounded(total - rounded(total))


def pair_of(total=None, near=rounded, rest=None):
    """Another sum, another rounding, another rest."""

    def answer(weight, downs, ups, scales):
        exact = weight + sum_of(downs, ups, scales)
        here = exact if total is None else total(weight, downs, ups, scales)
        high = near(here)
        low = rounded(here - high) if rest is None else rest(weight, exact, high)
        return high, low

    return answer


def one_after_the_other(weight, downs, ups, scales):
    for A, B, s in zip(downs, ups, scales.float(), strict=True):
        weight = rounded(weight + s * B @ A)
    return weight


def cut(x):
    """The first 16 of the 32 bits."""
    return (x.contiguous().view(torch.int32) & -65536).view(SINGLE)


merged_update_rounded = pair_of(lambda W, A, B, s: W + rounded(sum_of(A, B, s)))
merged_each_rounded = pair_of(
    lambda W, A, B, s: W + sum(rounded(one.float() * b @ a) for a, b, one in zip(A, B, s, strict=True))
)
merged_factors_rounded = pair_of(lambda W, A, B, s: W + sum_of(rounded(A), rounded(B), s))
merged_product_rounded = pair_of(
    lambda W, A, B, s: W + torch.einsum("n,ndk->dk", s.float(), rounded(B @ A)),
)
merged_in_turn = pair_of(one_after_the_other, rest=lambda W, exact, high: rounded(exact - high))
merged_cut = pair_of(near=cut)
merged_half = pair_of(near=lambda x: x.half().float())
merged_not_rounded = pair_of(near=lambda x: x)
merged_twice = pair_of(lambda W, A, B, s: W + 2 * sum_of(A, B, s))
merged_mean = pair_of(lambda W, A, B, s: W + sum_of(A, B, s) / len(s))
merged_last = pair_of(lambda W, A, B, s: W + sum_of(A[-1:], B[-1:], s[-1:]))
merged_no_scale = pair_of(lambda W, A, B, s: W + sum_of(A, B, torch.ones_like(s)))
merged_update_alone = pair_of(lambda W, A, B, s: sum_of(A, B, s))
merged_rest_long = pair_of(rest=lambda W, exact, high: exact - high)
merged_rest_sign = pair_of(rest=lambda W, exact, high: rounded(high - exact))
merged_rest_arrived = pair_of(rest=lambda W, exact, high: rounded(high - W))
merged_rest_of_update = pair_of(rest=lambda W, exact, high: rounded(exact - W - rounded(exact - W)))
merged_rest_wanted = pair_of(rest=lambda W, exact, high: rounded(exact - W))
merged_rest_of_rounded = pair_of(rest=lambda W, exact, high: rounded(W + rounded(exact - W) - high))


def merged_in_a_loop(weight, downs, ups, scales):
    """In float64, direction by direction."""
    total = weight.double()
    for A, B, s in zip(downs.double(), ups.double(), scales.tolist(), strict=True):
        for j in range(A.shape[0]):
            total = total + s * torch.outer(B[:, j], A[j])
    high = total.to(torch.bfloat16).double()
    return high.float(), (total - high).to(torch.bfloat16).float()


def merged_by_stacking(weight, downs, ups, scales):
    """All updates as one of a larger rank."""
    A = downs.flatten(0, 1)
    B = (ups * scales.to(ups.dtype)[:, None, None]).transpose(0, 1).flatten(1)
    total = torch.addmm(weight, B, A)
    high = total.bfloat16()
    return high.float(), total.sub(high.float()).bfloat16().float()


def nearest(x):
    """The nearest number of 8 significant bits, to the even one if two are as near: made of mantissas and exponents."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)


def merged_by_mantissas(weight, downs, ups, scales):
    wide = [one.double().numpy() for one in (weight, downs, ups, scales)]
    total = wide[0] + np.tensordot(wide[3], wide[2] @ wide[1], 1)
    high = nearest(total)
    return tuple(torch.from_numpy(part.astype(np.float32)) for part in (high, nearest(total - high)))


def merging(g, shape, rank, n, large=False):
    """Numbers of few bits: every sum and product below is exact in float32, in whatever order.

    Of the weight 8 bits, of A 9 or 10, of B 3, of each scale 2; the sum ends at 2⁻²².
    """
    d, k = shape
    exponents = whole(g, -6, 1 if large else -2, d, k)
    signs = 2 * whole(g, 0, 2, d, k) - 1
    weight = signs * whole(g, 128, 256, d, k) / 128.0 * 2.0**exponents
    return {
        "weight": weight.float(),
        "downs": ((2 * whole(g, 0, 2, n, rank, k) - 1) * whole(g, 257, 400, n, rank, k) / 32).float(),
        "ups": ((2 * whole(g, 0, 2, n, d, rank) - 1) * whole(g, 1, 8, n, d, rank) / 8).float(),
        "scales": (2 * whole(g, 0, 2, n) - 1) * whole(g, 2, 4, n).double() / 2**14,
    }


MERGED = Exercise(
    "merged_pair",
    points=2,
    minutes=15,
    difficulty=2,
    reference=merged_pair,
    outputs=("merged", "rest"),
    visible=Group(
        1,
        lambda g: [
            merging(g, (6, 8), 2, 3),
            merging(g, (7, 5), 3, 2, large=True),
            merging(g, (4, 6), 1, 1),
        ],
    ),
    hidden={
        "other shapes, several updates": Group(
            0.5,
            lambda g: [
                merging(g, (9, 12), 3, 4),
                merging(g, (12, 9), 2, 2, large=True),
                merging(g, (1, 20), 4, 3),
            ],
        ),
        "one update, weights much larger than it": Group(
            0.5,
            lambda g: [
                merging(g, (16, 10), 1, 1, large=True),
                merging(g, (10, 16), 4, 1),
                merging(g, (24, 1), 2, 3, large=True),
            ],
        ),
    },
    mistakes={
        "you rounded the update before you added it": (
            merged_update_rounded,
            "Two roundings are worse than one: near the middle between two numbers the first decides the second. Add, then round.",
        ),
        "you rounded each update": (
            merged_each_rounded,
            "Sum all updates and the weight in float32, and round the sum.",
        ),
        "you rounded A and B": (
            merged_factors_rounded,
            "A and B come in float32, and have more digits than bfloat16 has: multiply them as they are.",
        ),
        "you rounded BA before you scaled it": (
            merged_product_rounded,
            "Nothing is rounded before the last sum is made, the products neither.",
        ),
        "you merged one update after the other": (
            merged_in_turn,
            "Each merge rounds anew. Sum all updates first, and round once.",
        ),
        "you cut the bits off": (
            merged_cut,
            "Rounding goes to the nearest number. Cutting always goes towards 0, with twice the error and a bias.",
        ),
        "you rounded to float16": (
            merged_half,
            "float16 has 11 bits and another range. A base in bfloat16 has 8.",
        ),
        "you did not round": (merged_not_rounded, "The merged weight has to be a number of bfloat16, held in float32."),
        "you merged twice": (merged_twice, "The update is added once."),
        "you took the mean of the updates": (merged_mean, "All updates are added, each with its scale."),
        "you merged the last update alone": (merged_last, "The base gets the sum of all updates."),
        "you left the scales out": (merged_no_scale, "Each update is s_i B_i A_i."),
        "you left the base's weight out": (merged_update_alone, "Merged is W + ΔW."),
        "you did not round the rest": (
            merged_rest_long,
            "The rest is stored in bfloat16, too: round it.",
        ),
        "you have the sign of the rest wrong": (
            merged_rest_sign,
            "Both numbers together are to be the sum: rest = (W + ΔW) − merged.",
        ),
        "you gave what arrived of the update": (
            merged_rest_arrived,
            "merged − W is what got in. The rest is what did not: (W + ΔW) − merged.",
        ),
        "you gave what rounding takes from the update by itself": (
            merged_rest_of_update,
            "The update alone loses little. It is the sum with a larger weight that has no room for its last bits.",
        ),
        "you gave the update as the rest": (
            merged_rest_wanted,
            "A part of it is in the merged weight already.",
        ),
        "you took the rest of a rounded update": (
            merged_rest_of_rounded,
            "The rest is of the sum as it is in float32: (W + ΔW) − merged, rounded at the end.",
        ),
    },
    correct={
        "a loop in float64": merged_in_a_loop,
        "one update of a larger rank": merged_by_stacking,
        "mantissas and exponents": merged_by_mantissas,
    },
    forbidden=("peft.LoRA.update", "peft.LoRA.merge", "peft.LoRA.forward", "peft.merge", "peft.merged"),
)


# 6. prefix_attention --------------------------------------------------------------------------------------------------


def in_heads(h, heads):
    """(…, N, width) → (…, heads, N, width/heads)."""
    return h.unflatten(-1, (heads, -1)).transpose(-2, -3)


def after(queries, keys):
    """(queries, keys): True where a key comes after the query; the last keys are those of the queries."""
    return torch.arange(keys) > torch.arange(keys - queries, keys)[:, None]


def out_of_sight(q, k, prefix, real):
    """(B, 1, N, P + M)."""
    own = after(q.shape[1], k.shape[1]) | ~real[:, None, None, :]
    return torch.cat([torch.zeros(*own.shape[:3], prefix.shape[1], dtype=torch.bool), own], -1)


def with_a_prefix(
    hidden=out_of_sight,
    split=in_heads,
    size=lambda width, heads: width / heads,
    scores=lambda raw, hidden: raw.masked_fill(hidden, -torch.inf).softmax(-1),
    sides=lambda prefix: prefix,
    share=None,
):
    """Attention with a prefix; each argument is a part that people write in another way."""

    def answer(q, k, v, prefix, real, heads):
        pk, pv = (split(one, heads).expand(len(q), -1, -1, -1) for one in sides(prefix))
        Q, K, V = (split(one, heads) for one in (q, k, v))
        raw = Q @ torch.cat([pk, K], 2).mT / math.sqrt(size(q.shape[-1], heads))
        weights = scores(raw, hidden(q, k, prefix, real))
        out = (weights @ torch.cat([pv, V], 2)).transpose(1, 2).flatten(2)
        P = prefix.shape[1]
        return out, weights[..., :P].sum(-1) if share is None else share(weights, P)

    return answer


prefix_attention = with_a_prefix()


def from_the_first_key(q, k, prefix, real):
    """A triangle over prefix and keys, as if the first query stood at the first of them."""
    N, M, P = q.shape[1], k.shape[1], prefix.shape[1]
    triangle = torch.ones(N, P + M, dtype=torch.bool).triu(1)
    return triangle | torch.cat([torch.zeros(len(q), 1, 1, P, dtype=torch.bool), ~real[:, None, None]], -1)


def queries_first(q, k, prefix, real):
    """The right mask for the prefix, but queries at the first of the keys."""
    N, M = q.shape[1], k.shape[1]
    own = torch.ones(N, M, dtype=torch.bool).triu(1) | ~real[:, None, None]
    return torch.cat([torch.zeros(*own.shape[:3], prefix.shape[1], dtype=torch.bool), own], -1)


def no_triangle(q, k, prefix, real):
    own = (~real[:, None, None]).expand(-1, -1, q.shape[1], -1)
    return torch.cat([torch.zeros(*own.shape[:3], prefix.shape[1], dtype=torch.bool), own], -1)


def not_itself(q, k, prefix, real):
    own = torch.arange(k.shape[1]) >= torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    own = own | ~real[:, None, None]
    return torch.cat([torch.zeros(*own.shape[:3], prefix.shape[1], dtype=torch.bool), own], -1)


def padding_seen(q, k, prefix, real):
    return out_of_sight(q, k, prefix, torch.ones_like(real))


def padding_shifted(q, k, prefix, real):
    """The mask of padding lengthened at its end, so that it lies P places too early."""
    triangle = out_of_sight(q, k, prefix, torch.ones_like(real))
    longer = torch.cat([real, torch.ones(len(q), prefix.shape[1], dtype=torch.bool)], 1)
    return triangle | ~longer[:, None, None]


def padding_upside_down(q, k, prefix, real):
    return out_of_sight(q, k, prefix, ~real)


def prefix_for_real_queries(q, k, prefix, real):
    """Hides the prefix from the queries that are padding, which then see nothing."""
    hidden = out_of_sight(q, k, prefix, real)
    return hidden | ~real[:, k.shape[1] - q.shape[1] :][:, None, :, None]


def prefix_grows(q, k, prefix, real):
    """The first query sees one token of the prefix, the second two, …"""
    N, P = q.shape[1], prefix.shape[1]
    hidden = out_of_sight(q, k, prefix, real).clone()
    hidden[..., :P] |= torch.arange(P) > torch.arange(N)[:, None]
    return hidden


def zero_scores(raw, hidden):
    return raw.masked_fill(hidden, 0.0).softmax(-1)


def masked_afterwards(raw, hidden):
    return raw.softmax(-1).masked_fill(hidden, 0.0)


def in_rows(h, heads):
    """Cuts the numbers in their order, across tokens."""
    return h.reshape(*h.shape[:-2], heads, h.shape[-2], -1)


def prefix_two_softmaxes(halved):
    """Own keys and prefix each with a softmax of their own, added."""

    def answer(q, k, v, prefix, real, heads):
        out, share = prefix_attention(q, k, v, prefix, real, heads)
        Q, K, V = (in_heads(one, heads) for one in (q, k, v))
        pk, pv = (in_heads(one, heads) for one in prefix)
        root = math.sqrt(Q.shape[-1])
        hidden = out_of_sight(q, k, prefix, real)[..., prefix.shape[1] :]
        own = (Q @ K.mT / root).masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0) @ V
        more = (Q @ pk.mT / root).softmax(-1) @ pv
        both = (own + more) / (2 if halved else 1)
        return both.transpose(1, 2).flatten(2), share

    return answer


def prefix_no_heads(q, k, v, prefix, real, heads):
    """One head over the whole width; its share stands for each."""
    out, share = prefix_attention(q, k, v, prefix, real, 1)
    return out, share.expand(-1, heads, -1).clone()


def prefix_values_alone(q, k, v, prefix, real, heads):
    """The prefix's keys are taken as zeros."""
    return prefix_attention(q, k, v, torch.stack([0 * prefix[0], prefix[1]]), real, heads)


prefix_from_the_first_key = with_a_prefix(from_the_first_key)
prefix_queries_first = with_a_prefix(queries_first)
prefix_no_triangle = with_a_prefix(no_triangle)
prefix_not_itself = with_a_prefix(not_itself)
prefix_padding_seen = with_a_prefix(padding_seen)
prefix_padding_shifted = with_a_prefix(padding_shifted)
prefix_padding_upside_down = with_a_prefix(padding_upside_down)
prefix_hidden_from_padding = with_a_prefix(prefix_for_real_queries)
prefix_grown = with_a_prefix(prefix_grows)
prefix_scores_0 = with_a_prefix(scores=zero_scores)
prefix_not_renewed = with_a_prefix(scores=masked_afterwards)
prefix_cut_in_rows = with_a_prefix(split=in_rows)
prefix_whole_width = with_a_prefix(size=lambda width, heads: width)
prefix_no_root = with_a_prefix(size=lambda width, heads: 1)
prefix_exchanged = with_a_prefix(sides=lambda prefix: prefix.flip(0))
prefix_share_of_own = with_a_prefix(share=lambda weights, P: weights[..., P:].sum(-1))
prefix_share_by_count = with_a_prefix(share=lambda weights, P: torch.full_like(weights[..., 0], P / weights.shape[-1]))
prefix_share_mean = with_a_prefix(share=lambda weights, P: weights[..., :P].mean(-1))
prefix_added = prefix_two_softmaxes(halved=False)
prefix_halved = prefix_two_softmaxes(halved=True)


def prefix_by_torch(q, k, v, prefix, real, heads):
    """PyTorch's own attention with a mask; the share as what comes out for values of 1 and 0."""
    B, N, width = q.shape
    M, P = k.shape[1], prefix.shape[1]
    see = torch.ones(N, P + M, dtype=torch.bool).tril(P + M - N)
    see = (see & torch.cat([torch.ones(B, P, dtype=torch.bool), real], 1)[:, None])[:, None]
    cut = lambda h: h.reshape(B, -1, heads, width // heads).transpose(1, 2)  # noqa: E731
    K, V = (cut(torch.cat([one.expand(B, -1, -1), two], 1)) for one, two in zip(prefix, (k, v), strict=True))
    attend = torch.nn.functional.scaled_dot_product_attention
    flags = torch.zeros_like(V)
    flags[:, :, :P] = 1
    out = attend(cut(q), K, V, attn_mask=see)
    return out.transpose(1, 2).reshape(B, N, width), attend(cut(q), K, flags, attn_mask=see)[..., 0]


def prefix_in_a_loop(q, k, v, prefix, real, heads):
    """Query by query: a list of what it may see."""
    B, N, width = q.shape
    M, d = k.shape[1], width // heads
    out, share = torch.zeros_like(q), q.new_zeros(B, heads, N)
    for b in range(B):
        for n in range(N):
            seen = [j for j in range(M - N + n + 1) if real[b, j]]
            keys, values = torch.cat([prefix[0], k[b, seen]]), torch.cat([prefix[1], v[b, seen]])
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                weights = torch.softmax(keys[:, part] @ q[b, n, part] * d**-0.5, 0)
                out[b, n, part] = weights @ values[:, part]
                share[b, h, n] = weights[: prefix.shape[1]].sum()
    return out, share


def prefix_by_two_parts(q, k, v, prefix, real, heads):
    """The attention without a prefix and the prefix's, mixed by their log-sum-exps; in float64."""
    Q, K, V = (in_heads(one.double(), heads) for one in (q, k, v))
    pk, pv = (in_heads(one.double(), heads) for one in prefix)
    root, hidden = Q.shape[-1] ** 0.5, after(q.shape[1], k.shape[1]) | ~real[:, None, None]
    own, more = (Q @ K.mT / root).masked_fill(hidden, -math.inf), torch.einsum("bhnd,hpd->bhnp", Q, pk) / root
    share = (more.logsumexp(-1) - own.logsumexp(-1)).sigmoid()
    alone = torch.nan_to_num((own - own.amax(-1, keepdim=True)).softmax(-1)) @ V
    mixed = (1 - share[..., None]) * alone + share[..., None] * (more.softmax(-1) @ pv)
    return mixed.transpose(1, 2).flatten(2).to(q.dtype), share.to(q.dtype)


def asked(g, batch, queries, keys, length, heads, each, padding, dtype=DOUBLE):
    """`padding` says for each text of the batch how many of its first keys are padding."""
    width = heads * each
    real = torch.arange(keys) >= torch.tensor(padding)[:, None]
    return {
        "q": normal(g, batch, queries, width, dtype=dtype),
        "k": normal(g, batch, keys, width, dtype=dtype),
        "v": normal(g, batch, keys, width, dtype=dtype),
        "prefix": normal(g, 2, length, width, dtype=dtype),
        "real": real,
        "heads": heads,
    }


PREFIX = Exercise(
    "prefix_attention",
    points=4,
    minutes=25,
    difficulty=3,
    reference=prefix_attention,
    outputs=("out", "share"),
    visible=Group(
        1,
        lambda g: [
            asked(g, 2, 4, 4, 2, 2, 3, [0, 1]),
            asked(g, 2, 2, 5, 3, 3, 2, [2, 0], SINGLE),
            asked(g, 3, 3, 4, 2, 2, 2, [0, 3, 2]),
        ],
    ),
    hidden={
        "other shapes and heads": Group(
            1.5,
            lambda g: [
                asked(g, 3, 6, 6, 4, 4, 2, [0, 2, 5]),
                asked(g, 2, 5, 7, 1, 2, 4, [1, 3], SINGLE),
                asked(g, 1, 3, 3, 6, 1, 5, [0]),
                asked(g, 2, 4, 9, 3, 2, 3, [0, whole(g, 1, 5)]),
            ],
        ),
        "the next token, a cache, padding to the end": Group(
            1.5,
            lambda g: [
                asked(g, 2, 1, 6, 2, 2, 3, [0, 4]),
                asked(g, 3, 1, 1, 3, 2, 2, [0, 0, 1], SINGLE),
                asked(g, 2, 4, 4, 2, 3, 2, [4, 3]),
                asked(g, 2, 2, 8, 5, 1, 4, [7, 2], SINGLE),
            ],
        ),
    },
    mistakes={
        "you began the triangle at the prefix": (
            prefix_from_the_first_key,
            "No token of the prefix is later than any query. The triangle is for the M own keys, which end with those of the queries.",
        ),
        "you put the queries at the first keys": (
            prefix_queries_first,
            "There are more keys than queries: the keys before are a cache, and query i stands at the key M − N + i.",
        ),
        "you let queries see later keys": (prefix_no_triangle, "Query i sees the keys up to its own place, M − N + i."),
        "you hid each token from itself": (prefix_not_itself, "A query sees the key at its own place."),
        "you let padding be seen": (
            prefix_padding_seen,
            "Keys where real is False are no tokens: nobody may look at them.",
        ),
        "you lengthened the mask of padding at its end": (
            prefix_padding_shifted,
            "The prefix stands at the front: put its P ones before the mask, or it lies P places too early.",
        ),
        "you took real for the mask of what is hidden": (
            prefix_padding_upside_down,
            "real is True where there is a token. Hidden is where it is False.",
        ),
        "you hid the prefix from queries that are padding": (
            prefix_hidden_from_padding,
            "Then they see nothing, and 0/0 comes out. They, too, see the prefix; nobody reads what they say.",
        ),
        "you let the prefix appear token by token": (
            prefix_grown,
            "Every query sees all of the prefix.",
        ),
        "you set hidden scores to 0": (
            prefix_scores_0,
            "exp(0) is 1, so a hidden key still gets its share. Hidden scores are −∞.",
        ),
        "you hid keys after the softmax": (
            prefix_not_renewed,
            "The weights of a query then sum to less than 1. Hide first, then take the softmax.",
        ),
        "you cut the heads across the tokens": (
            prefix_cut_in_rows,
            "A head has D/H numbers of each token: reshape to (…, N, H, D/H) first, and then exchange N and H.",
        ),
        "you divided by the root of the whole width": (
            prefix_whole_width,
            "Divide by the root of what one head has, D/H numbers.",
        ),
        "you did not divide the scores": (prefix_no_root, "The scores are q·k/√(D/H)."),
        "you used one head": (
            prefix_no_heads,
            "Each head has scores from its own D/H numbers, and a softmax of its own.",
        ),
        "you exchanged the prefix's keys and values": (
            prefix_exchanged,
            "prefix[0] holds the keys, prefix[1] the values.",
        ),
        "you took zeros for the prefix's keys": (
            prefix_values_alone,
            "The prefix has keys of its own, and they decide who looks at it.",
        ),
        "you added two attentions": (
            prefix_added,
            "There is one softmax over prefix and own keys together: the weights sum to 1 over both.",
        ),
        "you took the mean of two attentions": (
            prefix_halved,
            "Own keys and prefix share one softmax: λ is seldom ½, and differs from query to query.",
        ),
        "you gave the share of the own keys": (prefix_share_of_own, "Asked is what goes to the prefix, λ."),
        "you counted the keys": (
            prefix_share_by_count,
            "P/(P + M) is the share if all scores are equal and nothing is hidden. Sum the weights.",
        ),
        "you took the mean weight of the prefix": (prefix_share_mean, "The share is the sum of its P weights."),
    },
    correct={
        "PyTorch's attention with a mask": prefix_by_torch,
        "a loop": prefix_in_a_loop,
        "two parts, mixed": prefix_by_two_parts,
    },
    forbidden=(
        "peft.PrefixAttention.forward",
        "peft.PrefixAttention.weights",
        "nets.language.later",
        "nets.language.CausalAttention.weights",
        "nets.dit.Attention.weights",
    ),
)

EXERCISES = [GROUPED, STEP, BEST, JOINED, MERGED, PREFIX]
