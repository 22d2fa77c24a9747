"""Homework 2, normalizing flows: what is right, what people write instead, and the cases that tell one from the other.

For each exercise: the reference, the mistakes, right answers written in other ways, the cases. A flow goes from noise z
("forward") to data x and back ("inverse"), and a log-determinant is that of the map that was computed. No case holds
zeros: at zero a scale does not show, and a layer that does nothing would pass.
"""

import math

import torch
from torch import nn
from torch.distributions import AffineTransform, Normal, SigmoidTransform, TransformedDistribution

from dgm_course.flows import squeeze, unsqueeze
from dgm_course.grading.exercise import Exercise, Group

SINGLE, DOUBLE = torch.float32, torch.float64


# What the exercises share ---------------------------------------------------------------------------------------------


def normal(g, shape, dtype=SINGLE):
    return torch.randn(shape, generator=g, dtype=dtype)


def between(g, low, high, shape=(), dtype=SINGLE):
    return low + (high - low) * torch.rand(shape, generator=g, dtype=dtype)


def log_normal(z):
    """log N(z; 0, 1) of each value."""
    return -0.5 * z**2 - 0.5 * math.log(2 * math.pi)


def total(values):
    """The sum over all but the batch."""
    return values.flatten(1).sum(1)


def network(kept, net):
    """s and t from the part that stays: weights and biases, the same at each place, and s squashed."""
    weight, bias = net
    raw = torch.einsum("oc,bc...->bo...", weight, kept) + bias.reshape(-1, *[1] * (kept.ndim - 2))
    s, t = raw.chunk(2, dim=1)
    return s.tanh(), t


def exchanged(kept, net):
    return network(kept, net)[::-1]


# 1. sinh_arcsinh_log_prob ---------------------------------------------------------------------------------------------


def back_from_sinh(x, skew, tail):
    return ((x.asinh() - skew) / tail).sinh()


def slope(z, skew, tail):
    """f'(z)."""
    return tail * (tail * z.asinh() + skew).cosh() / (1 + z**2).sqrt()


def sinh_arcsinh_log_prob(x, skew, tail):
    z = back_from_sinh(x, skew, tail)
    return total(log_normal(z) - slope(z, skew, tail).abs().log())


def density_plus(x, skew, tail):
    z = back_from_sinh(x, skew, tail)
    return total(log_normal(z) + slope(z, skew, tail).abs().log())


def density_slope_at_x(x, skew, tail):
    return total(log_normal(back_from_sinh(x, skew, tail)) - slope(x, skew, tail).abs().log())


def density_without_abs(x, skew, tail):
    z = back_from_sinh(x, skew, tail)
    return total(log_normal(z) - slope(z, skew, tail).log())


def density_base_at_x(x, skew, tail):
    return total(log_normal(x) - slope(back_from_sinh(x, skew, tail), skew, tail).abs().log())


def density_no_volume(x, skew, tail):
    return total(log_normal(back_from_sinh(x, skew, tail)))


def density_forward(x, skew, tail):
    return total(log_normal((tail * x.asinh() + skew).sinh()) + slope(x, skew, tail).abs().log())


def density_mean(x, skew, tail):
    return sinh_arcsinh_log_prob(x, skew, tail) / x.shape[1]


def density_no_inner(x, skew, tail):
    z = back_from_sinh(x, skew, tail)
    return total(log_normal(z) - (slope(z, skew, tail) / tail).log())


def density_other_skew(x, skew, tail):
    return sinh_arcsinh_log_prob(x, -skew, tail)


def density_wrong_order(x, skew, tail):
    return sinh_arcsinh_log_prob(x, skew * tail, tail)


def density_volume_once(x, skew, tail):
    z = back_from_sinh(x, skew, tail)
    return total(log_normal(z)) - slope(z, skew, tail).abs().sum(1).log()


def density_by_the_inverse(x, skew, tail):
    """With dz/dx, and the logarithm of a cosine that cannot overflow."""
    angle = (x.asinh() - skew) / tail
    log_cosh = angle.abs() + torch.log1p((-2 * angle.abs()).exp()) - math.log(2)
    return (log_normal(angle.sinh()) + log_cosh - tail.abs().log() - 0.5 * torch.log1p(x**2)).sum(-1)


def density_by_autograd(x, skew, tail):
    with torch.enable_grad():
        x = x.detach().double().requires_grad_()
        z = back_from_sinh(x, skew.double(), tail.double())
        (change,) = torch.autograd.grad(z.sum(), x)
    return (Normal(0.0, 1.0).log_prob(z) + change.abs().log()).sum(1).detach().to(skew.dtype)


def density_in_a_loop(x, skew, tail):
    rows = []
    for row in x.tolist():
        value = 0.0
        for number, shift, stretch in zip(row, skew.tolist(), tail.tolist(), strict=True):
            z = math.sinh((math.asinh(number) - shift) / stretch)
            volume = abs(stretch) * math.sqrt((1 + number**2) / (1 + z**2))
            value += -(z**2) / 2 - math.log(math.sqrt(2 * math.pi) * volume)
        rows.append(value)
    return torch.tensor(rows, dtype=x.dtype)


def bent(g, shape, dtype=SINGLE, signs=None):
    """Points that the map makes of noise, so that none of them lies where there is no probability."""
    size, z = shape[1], normal(g, shape, dtype)
    skew, tail = between(g, 0.3, 0.9, (size,), dtype), between(g, 0.6, 1.6, (size,), dtype)
    skew = skew * (1 - 2 * torch.randint(2, (size,), generator=g))
    tail = tail * (torch.tensor(signs) if signs else 1 - 2 * torch.randint(2, (size,), generator=g))
    return {"x": (tail * z.asinh() + skew).sinh(), "skew": skew, "tail": tail}


DENSITY = Exercise(
    "sinh_arcsinh_log_prob",
    points=2,
    minutes=15,
    difficulty=1,
    reference=sinh_arcsinh_log_prob,
    outputs=("log_prob",),
    visible=Group(
        1, lambda g: [bent(g, (4, 2), signs=[1, 1]), bent(g, (3, 3), DOUBLE, [1, -1, 1]), bent(g, (2, 1), signs=[-1])]
    ),
    hidden={
        "other shapes": Group(
            0.5, lambda g: [bent(g, (5, 4)), bent(g, (1, 1), DOUBLE, [1]), bent(g, (3, 7)), bent(g, (1, 2), DOUBLE)]
        ),
        "maps that fall": Group(
            0.5,
            lambda g: [
                bent(g, (3, 2), signs=[-1, -1]),
                bent(g, (1, 3), DOUBLE, signs=[-1, 1, -1]),
                bent(g, (2, 2), signs=[1, 1]),
            ],
        ),
    },
    mistakes={
        "you added log|f'(z)|": (
            density_plus,
            "Where f stretches, the same probability lies on more room and the density falls: log p(x) = log p(z) − log|f'(z)|.",
        ),
        "you took f' at x": (
            density_slope_at_x,
            "f is a function of z, and so is its derivative: first find z, then f'(z).",
        ),
        "you forgot the absolute value": (
            density_without_abs,
            "A map that falls has a negative derivative, and a logarithm of that is no number. A length has no sign: |f'(z)|.",
        ),
        "you evaluated the normal density at x": (
            density_base_at_x,
            "The standard normal is the density of z. Evaluate it at z = f⁻¹(x).",
        ),
        "you left out the change of volume": (
            density_no_volume,
            "log N(z) alone does not integrate to 1 over x. What is missing is −log|f'(z)|.",
        ),
        "you took f for its inverse": (
            density_forward,
            "f goes from noise to data. x is data: solve x = f(z) for z.",
        ),
        "you took the mean over the coordinates": (
            density_mean,
            "The density of independent coordinates is a product, its logarithm a sum.",
        ),
        "you forgot the factor tail in the derivative": (
            density_no_inner,
            "The chain rule: the derivative of tail·arcsinh(z) has the factor tail.",
        ),
        "you added skew on the way back too": (
            density_other_skew,
            "The inverse undoes: f adds skew, so f⁻¹ subtracts it.",
        ),
        "you divided by tail before you subtracted skew": (
            density_wrong_order,
            "The inverse undoes the last step first: f multiplies and then adds, so f⁻¹ subtracts and then divides.",
        ),
        "you took the logarithm of a sum of derivatives": (
            density_volume_once,
            "The Jacobian is diagonal, so its determinant is the product of the derivatives: take each logarithm, then the sum.",
        ),
    },
    correct={
        "the derivative of the inverse": density_by_the_inverse,
        "autograd": density_by_autograd,
        "a loop": density_in_a_loop,
    },
    tolerance=1e-4,
    forbidden=("flows.flow.Flow.log_prob",),
)


# 2. coupling_chain ----------------------------------------------------------------------------------------------------


def apart(v, i):
    """What stays and what changes in layer i."""
    return v[:, i % 2 :: 2], v[:, (i + 1) % 2 :: 2]


def interleaved(kept, changed, i):
    joined = kept.new_empty(len(kept), kept.shape[1] + changed.shape[1])
    joined[:, i % 2 :: 2], joined[:, (i + 1) % 2 :: 2] = kept, changed
    return joined


def scaled(part, s, t, direction):
    return part * s.exp() + t if direction == "forward" else (part - t) * (-s).exp()


def signed(s, direction):
    return s.sum(1) if direction == "forward" else -s.sum(1)


def chain(
    v,
    nets,
    direction,
    split=apart,
    join=interleaved,
    change=scaled,
    volume=signed,
    look=lambda kept, changed: kept,
    read=network,
    order=lambda numbers, direction: numbers if direction == "forward" else numbers[::-1],
    which=lambda i, place: i,
):
    """Couplings one after the other. Each mistake is this with one of its parts exchanged."""
    log_det = v.new_zeros(len(v))
    for place, i in enumerate(order(list(range(len(nets))), direction)):
        kept, changed = split(v, i)
        s, t = read(look(kept, changed), nets[which(i, place)])
        v, log_det = join(kept, change(changed, s, t, direction), i), log_det + volume(s, direction)
    return v, log_det


def coupling_chain(v, nets, direction):
    return chain(v, nets, direction)


def chain_concatenated(v, nets, direction):
    return chain(v, nets, direction, join=lambda kept, changed, i: torch.cat([kept, changed], 1))


def chain_same_scale(v, nets, direction):
    return chain(
        v,
        nets,
        direction,
        change=lambda part, s, t, way: part * s.exp() + t if way == "forward" else (part - t) * s.exp(),
    )


def chain_without_exp(v, nets, direction):
    return chain(
        v, nets, direction, change=lambda part, s, t, way: part * s + t if way == "forward" else (part - t) / s
    )


def chain_shift_last(v, nets, direction):
    return chain(
        v,
        nets,
        direction,
        change=lambda part, s, t, way: part * s.exp() + t if way == "forward" else part * (-s).exp() - t,
    )


def chain_shift_first(v, nets, direction):
    return chain(
        v,
        nets,
        direction,
        change=lambda part, s, t, way: (part + t) * s.exp() if way == "forward" else part * (-s).exp() - t,
    )


def chain_one_sign(v, nets, direction):
    return chain(v, nets, direction, volume=lambda s, way: s.sum(1))


def chain_other_sign(v, nets, direction):
    return chain(v, nets, direction, volume=lambda s, way: -s.sum(1))


def chain_all_signs(v, nets, direction):
    result, log_det = chain(v, nets, direction)
    return result, -log_det


def chain_sum_of_scales(v, nets, direction):
    return chain(v, nets, direction, volume=lambda s, way: signed(s.exp(), way))


def chain_mean(v, nets, direction):
    return chain(v, nets, direction, volume=lambda s, way: signed(s, way) / s.shape[1])


def chain_looks_at_changed(v, nets, direction):
    return chain(v, nets, direction, look=lambda kept, changed: changed)


def chain_not_reversed(v, nets, direction):
    return chain(v, nets, direction, order=lambda numbers, way: numbers)


def chain_other_networks(v, nets, direction):
    return chain(v, nets, direction, which=lambda i, place: place)


def chain_exchanged(v, nets, direction):
    return chain(v, nets, direction, read=exchanged)


def chain_never_alternates(v, nets, direction):
    return chain(v, nets, direction, split=lambda v, i: apart(v, 0), join=lambda a, b, i: interleaved(a, b, 0))


def chain_other_half(v, nets, direction):
    return chain(v, nets, direction, split=lambda v, i: apart(v, i + 1), join=lambda a, b, i: interleaved(a, b, i + 1))


def chain_identity(v, nets, direction):
    return v.clone(), v.new_zeros(len(v))


def chain_by_masks(v, nets, direction):
    """On whole points: s and t are written to their places, and are 0 elsewhere."""
    result, log_det = v.double(), 0
    numbers = range(len(nets)) if direction == "forward" else reversed(range(len(nets)))
    for i in numbers:
        moves = torch.arange(v.shape[1]) % 2 != i % 2
        weight, bias = (part.double() for part in nets[i])
        values = result[:, ~moves] @ weight.T + bias
        s, t = torch.zeros_like(result), torch.zeros_like(result)
        s[:, moves], t[:, moves] = values[:, : int(moves.sum())].tanh(), values[:, int(moves.sum()) :]
        if direction == "inverse":
            s, t = -s, -t * (-s).exp()
        result, log_det = result * s.exp() + t, log_det + s.sum(1)
    return result.to(v.dtype), log_det.to(v.dtype)


def chain_recursive(v, nets, direction, i=0):
    """One layer, and the rest by itself; the joining is a sorting of places."""
    if not nets:
        return v, torch.zeros(len(v), dtype=v.dtype)
    if direction == "inverse":
        v, others = chain_recursive(v, nets[1:], direction, i + 1)
    places = sorted(range(v.shape[1]), key=lambda place: (place - i) % 2)
    first = (v.shape[1] + 1 - i % 2) // 2
    kept, changed = v[:, places].split([first, v.shape[1] - first], 1)
    s, t = nn.functional.linear(kept, *nets[0]).tensor_split(2, 1)
    s = s.tanh()
    changed = torch.addcmul(t, changed, s.exp()) if direction == "forward" else (changed - t) / s.exp()
    v = torch.cat([kept, changed], 1)[:, torch.tensor(places).argsort()]
    if direction == "forward":
        v, others = chain_recursive(v, nets[1:], direction, i + 1)
    return v, others + (s if direction == "forward" else -s).sum(1)


def chain_in_a_loop(v, nets, direction):
    rows, changes = [], []
    for row in v.tolist():
        point, change = list(row), 0.0
        for i in range(len(nets)) if direction == "forward" else range(len(nets) - 1, -1, -1):
            weight, bias = (part.tolist() for part in nets[i])
            kept, moved = point[i % 2 :: 2], point[1 - i % 2 :: 2]
            raw = [
                sum(a * b for a, b in zip(line, kept, strict=True)) + c for line, c in zip(weight, bias, strict=True)
            ]
            for j, number in enumerate(moved):
                s, t = math.tanh(raw[j]), raw[j + len(moved)]
                new = number * math.exp(s) + t if direction == "forward" else (number - t) / math.exp(s)
                point[2 * j + 1 - i % 2] = new
                change += s if direction == "forward" else -s
        rows.append(point)
        changes.append(change)
    return torch.tensor(rows, dtype=v.dtype), torch.tensor(changes, dtype=v.dtype)


def coupled(g, shape, layers, direction, dtype=SINGLE):
    nets = []
    for i in range(layers):
        kept = (shape[1] + 1 - i % 2) // 2
        wide = 2 * (shape[1] - kept)
        weight = normal(g, (wide, kept), dtype) * 0.4 / kept**0.5
        nets.append((weight, between(g, 0.2, 0.6, (wide,), dtype) * (1 - 2 * torch.randint(2, (wide,), generator=g))))
    return {"v": normal(g, shape, dtype), "nets": nets, "direction": direction}


CHAIN = Exercise(
    "coupling_chain",
    points=3,
    minutes=20,
    difficulty=2,
    reference=coupling_chain,
    outputs=("result", "log_det"),
    visible=Group(
        1,
        lambda g: [
            coupled(g, (3, 4), 2, "forward"),
            coupled(g, (2, 6), 2, "inverse"),
            coupled(g, (2, 5), 3, "inverse", DOUBLE),
        ],
    ),
    hidden={
        "forward": Group(0.5, lambda g: [coupled(g, (5, 6), 4, "forward"), coupled(g, (1, 5), 2, "forward", DOUBLE)]),
        "inverse": Group(
            1,
            lambda g: [
                coupled(g, (5, 6), 4, "inverse"),
                coupled(g, (1, 5), 2, "inverse", DOUBLE),
                coupled(g, (4, 8), 3, "inverse"),
            ],
        ),
        "one layer, a plane, many coordinates": Group(
            0.5,
            lambda g: [
                coupled(g, (3, 7), 1, "forward"),
                coupled(g, (3, 7), 1, "inverse", DOUBLE),
                coupled(g, (2, 2), 3, "inverse", DOUBLE),
                coupled(g, (1, 31), 5, "forward", DOUBLE),
            ],
        ),
    },
    mistakes={
        "you joined the two parts by torch.cat": (
            chain_concatenated,
            "They were taken from every other place, so each value must go back to its own: write to [:, 0::2] and [:, 1::2].",
        ),
        "you multiplied by exp(s) on the way back too": (
            chain_same_scale,
            "The inverse divides by what forward multiplied with: (x − t)·exp(−s).",
        ),
        "you forgot exp": (
            chain_without_exp,
            "The scale is exp(s): never 0 and never negative, so that it can be undone. Its logarithm is s.",
        ),
        "you subtracted the shift last on the way back": (
            chain_shift_last,
            "Forward scales and then shifts. The inverse undoes the last step first: (x − t)·exp(−s).",
        ),
        "you shifted before you scaled": (
            chain_shift_first,
            "Forward is z·exp(s) + t: the shift is not scaled.",
        ),
        "you gave the log-determinant of the forward map in both directions": (
            chain_one_sign,
            "Each direction returns that of the map that it computes itself: the inverse shrinks what forward stretched, −Σ s.",
        ),
        "you gave the log-determinant of the inverse in both directions": (
            chain_other_sign,
            "Each direction returns that of the map that it computes itself: forward multiplies by exp(s), so there it is +Σ s.",
        ),
        "the log-determinant has the wrong sign": (
            chain_all_signs,
            "Forward multiplies by exp(s), so log|det ∂x/∂z| = +Σ s; the inverse has −Σ s.",
        ),
        "you summed the scales instead of their logarithms": (
            chain_sum_of_scales,
            "The determinant is the product of exp(s), and its logarithm the sum of s.",
        ),
        "you took the mean of s": (
            chain_mean,
            "A determinant is a product over all coordinates, its logarithm a sum.",
        ),
        "the network looks at the part that changes": (
            chain_looks_at_changed,
            "On the way back that part is what we want to know. The network must see the part that stays.",
        ),
        "you did not reverse the layers on the way back": (
            chain_not_reversed,
            "The inverse undoes the last layer first: from nets[−1] to nets[0].",
        ),
        "you reversed the layers on the way back, but not their networks": (
            chain_other_networks,
            "Layer i keeps its own network in both directions: nets[i] goes with the places of layer i.",
        ),
        "you exchanged s and t": (chain_exchanged, "The network returns first the log-scale s, then the shift t."),
        "the same places stay in every layer": (
            chain_never_alternates,
            "Then half of the coordinates would never change. Layer i keeps the even places for even i, the odd ones for odd i.",
        ),
        "the wrong half stays": (chain_other_half, "Layer 0 keeps the places 0, 2, 4, …, and changes 1, 3, 5, …."),
        "nothing has changed": (
            chain_identity,
            "A layer that does nothing can be inverted, too. But s and t come from the network, and must be used.",
        ),
    },
    correct={
        "masks, in double precision": chain_by_masks,
        "recursion, and a sorting of places": chain_recursive,
        "a loop": chain_in_a_loop,
    },
    tolerance=1e-4,
    forbidden=(
        "flows.transforms.affine",
        "flows.transforms.affine_inverse",
        "flows.transforms.Coupling.forward",
        "flows.transforms.Coupling.inverse",
        "flows.transforms.Coupling.parameters_of",
    ),
)


# 3. image_bits --------------------------------------------------------------------------------------------------------


def logits_of(k, noise, levels, margin):
    """The logit of each dequantized image, and the share p of which it is the logit."""
    share = margin + (1 - 2 * margin) * (k + noise) / levels
    return share.log() - (1 - share).log(), share


def pixel_terms(k, noise, levels, margin, loc, log_scale):
    """log p(y) of each pixel of each draw, (S, B, …)."""
    logits, share = logits_of(k, noise, levels, margin)
    log_det = math.log(1 - 2 * margin) - share.log() - (1 - share).log()
    return log_normal((logits - loc) * (-log_scale).exp()) - log_scale + log_det


def to_bits(log_prob, k, levels):
    """From the log-density of y of each draw, (S, B), to bits."""
    size = k[0].numel()
    log_mean = log_prob.logsumexp(0) - math.log(len(log_prob))
    return (size * math.log(levels) - log_mean) / (size * math.log(2))


def image_bits(k, noise, levels, margin, loc, log_scale):
    return to_bits(pixel_terms(k, noise, levels, margin, loc, log_scale).flatten(2).sum(2), k, levels)


def changed_by(term):
    """The bits, after something wrong was added to the terms of each pixel."""

    def bits(k, noise, levels, margin, loc, log_scale):
        logits, share = logits_of(k, noise, levels, margin)
        terms = pixel_terms(k, noise, levels, margin, loc, log_scale)
        return to_bits((terms + term(logits, share, margin, log_scale)).flatten(2).sum(2), k, levels)

    return bits


def log_det_of(share, margin):
    return math.log(1 - 2 * margin) - share.log() - (1 - share).log()


bits_without_logit = changed_by(lambda logits, share, margin, s: -log_det_of(share, margin))
bits_logit_wrong_sign = changed_by(lambda logits, share, margin, s: -2 * log_det_of(share, margin))
bits_margin_forgotten = changed_by(lambda logits, share, margin, s: -math.log(1 - 2 * margin) + 0 * share)
bits_margin_wrong_sign = changed_by(lambda logits, share, margin, s: -2 * math.log(1 - 2 * margin) + 0 * share)
bits_scale_forgotten = changed_by(lambda logits, share, margin, s: s + 0 * share)
bits_scale_wrong_sign = changed_by(lambda logits, share, margin, s: 2 * s + 0 * share)


def bits_at_y(k, noise, levels, margin, loc, log_scale):
    y = (k + noise) / levels
    terms = pixel_terms(k, noise, levels, margin, loc, log_scale)
    _, share = logits_of(k, noise, levels, margin)
    wrong = terms + (share * (1 - share)).log() - (y * (1 - y)).log()
    return to_bits(wrong.flatten(2).sum(2), k, levels)


def bits_without_levels(k, noise, levels, margin, loc, log_scale):
    return image_bits(k, noise, levels, margin, loc, log_scale) - math.log2(levels)


def bits_levels_wrong_sign(k, noise, levels, margin, loc, log_scale):
    return image_bits(k, noise, levels, margin, loc, log_scale) - 2 * math.log2(levels)


def bits_levels_once(k, noise, levels, margin, loc, log_scale):
    return image_bits(k, noise, levels, margin, loc, log_scale) - math.log2(levels) * (1 - 1 / k[0].numel())


def bits_always_256(k, noise, levels, margin, loc, log_scale):
    return image_bits(k, noise, levels, margin, loc, log_scale) - math.log2(levels) + 8


def bits_mean_of_logs(k, noise, levels, margin, loc, log_scale):
    draws = [image_bits(k, one[None], levels, margin, loc, log_scale) for one in noise]
    return torch.stack(draws).mean(0)


def bits_sum_over_draws(k, noise, levels, margin, loc, log_scale):
    size = k[0].numel()
    return image_bits(k, noise, levels, margin, loc, log_scale) - math.log2(len(noise)) / size


def bits_pixel_by_pixel(k, noise, levels, margin, loc, log_scale):
    terms = pixel_terms(k, noise, levels, margin, loc, log_scale).logsumexp(0) - math.log(len(noise))
    return to_bits(terms.flatten(1).sum(1)[None], k, levels)


def bits_in_nats(k, noise, levels, margin, loc, log_scale):
    return image_bits(k, noise, levels, margin, loc, log_scale) * math.log(2)


def bits_of_the_image(k, noise, levels, margin, loc, log_scale):
    return image_bits(k, noise, levels, margin, loc, log_scale) * k[0].numel()


def bits_mean_over_pixels(k, noise, levels, margin, loc, log_scale):
    terms = pixel_terms(k, noise, levels, margin, loc, log_scale).flatten(2).mean(2)
    return (math.log(levels) - terms.logsumexp(0) + math.log(len(noise))) / math.log(2)


def bits_noise_on_the_logit(k, noise, levels, margin, loc, log_scale):
    logits, share = logits_of(k, 0 * noise, levels, margin)
    terms = log_normal((logits + noise - loc) * (-log_scale).exp()) - log_scale + log_det_of(share, margin)
    return to_bits(terms.flatten(2).sum(2), k, levels)


def bits_one_level_less(k, noise, levels, margin, loc, log_scale):
    shift = math.log2(levels) - math.log2(levels - 1)
    return image_bits(k, noise, levels - 1, margin, loc, log_scale) + shift


def bits_without_noise(k, noise, levels, margin, loc, log_scale):
    return image_bits(k, 0 * noise, levels, margin, loc, log_scale)


def bits_times_scale(k, noise, levels, margin, loc, log_scale):
    logits, share = logits_of(k, noise, levels, margin)
    terms = log_normal((logits - loc) * log_scale.exp()) - log_scale + log_det_of(share, margin)
    return to_bits(terms.flatten(2).sum(2), k, levels)


def bits_by_distributions(k, noise, levels, margin, loc, log_scale):
    """The library's change of variables; the grey levels themselves run from 0 to L."""
    to_grey = AffineTransform(-margin * levels / (1 - 2 * margin), levels / (1 - 2 * margin))
    model = TransformedDistribution(Normal(loc.double(), log_scale.double().exp()), [SigmoidTransform(), to_grey])
    log_prob = model.log_prob(k + noise.double()).flatten(2).sum(2)
    log_mean = (log_prob - log_prob.amax(0)).exp().mean(0).log() + log_prob.amax(0)
    return (-log_mean / k[0].numel() / math.log(2)).to(noise.dtype)


def bits_by_log_sigmoid(k, noise, levels, margin, loc, log_scale):
    logits = torch.logit(margin + (1 - 2 * margin) * (k + noise) / levels)
    inside = nn.functional.logsigmoid(logits) + nn.functional.logsigmoid(-logits) - math.log(1 - 2 * margin)
    log_prob = Normal(loc, log_scale.exp()).log_prob(logits) - inside
    one = log_prob.reshape(*noise.shape[:2], -1)
    nats = math.log(len(noise)) - one.sum(-1).logsumexp(0)
    return nats / (one.shape[-1] * math.log(2)) + math.log2(levels)


def bits_in_a_loop(k, noise, levels, margin, loc, log_scale):
    size, rows = k[0].numel(), []
    loc, log_scale = loc.flatten().double(), log_scale.flatten().double()
    for i, image in enumerate(k):
        draws = []
        for u in noise[:, i].double():
            share = margin + (1 - 2 * margin) * (image.flatten() + u.flatten()) / levels
            z = ((share / (1 - share)).log() - loc) / log_scale.exp()
            dz_dk = (1 - 2 * margin) / levels / (share * (1 - share)) / log_scale.exp()
            draws.append((log_normal(z) + dz_dk.log()).sum().item())
        top = max(draws)
        rows.append(-(top + math.log(sum(math.exp(one - top) for one in draws) / len(draws))) / size / math.log(2))
    return torch.tensor(rows, dtype=noise.dtype)


def grey(g, draws, shape, levels, dtype=SINGLE):
    """Images whose ends, black and white, are among the levels."""
    k = torch.randint(levels, shape, generator=g)
    k.view(-1)[0], k.view(-1)[-1] = levels - 1, 0
    return {
        "k": k,
        "noise": torch.rand(draws, *shape, generator=g, dtype=dtype),
        "levels": levels,
        "margin": between(g, 0.02, 0.1, dtype=DOUBLE).item(),
        "loc": normal(g, shape[1:], dtype) * 0.5,
        "log_scale": between(g, 0.1, 0.9, shape[1:], dtype),
    }


BITS = Exercise(
    "image_bits",
    points=4,
    minutes=30,
    difficulty=3,
    reference=image_bits,
    outputs=("bits",),
    visible=Group(
        1,
        lambda g: [
            grey(g, 1, (3, 4), 8),
            grey(g, 3, (2, 1, 2, 3), 4, DOUBLE),
            grey(g, 5, (2, 2), 2, DOUBLE),
        ],
    ),
    hidden={
        "one draw": Group(
            1, lambda g: [grey(g, 1, (4, 5), 16), grey(g, 1, (1, 1, 3, 2), 5, DOUBLE), grey(g, 1, (2, 1, 7, 5), 256)]
        ),
        "several draws": Group(
            1.5, lambda g: [grey(g, 4, (3, 6), 4, DOUBLE), grey(g, 7, (2, 1, 3, 3), 8), grey(g, 2, (1, 2), 32, DOUBLE)]
        ),
        "black and white, and one pixel": Group(
            0.5, lambda g: [grey(g, 6, (3, 3), 2), grey(g, 9, (4, 1), 3, DOUBLE), grey(g, 1, (1, 1), 2, DOUBLE)]
        ),
    },
    mistakes={
        "you forgot the levels, D·log L": (
            bits_without_levels,
            "A level's cell has the volume L^(−D). The probability of the level is the mean density in its cell times that.",
        ),
        "log L has the wrong sign": (
            bits_levels_wrong_sign,
            "A cell is small: log P(k) = log(mean density) − D·log L, so that bits get + log₂ L for each pixel.",
        ),
        "you counted log L once for the image": (
            bits_levels_once,
            "Each of the D pixels has L levels: the volume of a cell is L^(−D).",
        ),
        "you took 256 levels": (bits_always_256, "The number of levels is an argument; here it is not 256."),
        "you forgot the log-determinant of the logit": (
            bits_without_logit,
            "The density is known for the logits, and asked for y. Each logit has a slope of its own.",
        ),
        "the log-determinant of the logit has the wrong sign": (
            bits_logit_wrong_sign,
            "log p(y) = log p(logit) + log|d logit/dy|, and the logit is steep near black and white: its term is positive there.",
        ),
        "you forgot the margin's 1 − 2λ in the log-determinant": (
            bits_margin_forgotten,
            "Before the logit, y was shrunk by 1 − 2λ. The chain rule has that factor: + log(1 − 2λ) for each pixel.",
        ),
        "log(1 − 2λ) has the wrong sign": (
            bits_margin_wrong_sign,
            "On the way from y to the logit, y is multiplied by 1 − 2λ: its logarithm is added.",
        ),
        "you took the slope of the logit at y": (
            bits_at_y,
            "The logit is taken at p = λ + (1 − 2λ)y, and so is its slope: 1/(p(1 − p)).",
        ),
        "you forgot log_scale in the density": (
            bits_scale_forgotten,
            "z is the logit, divided by its scale. That map has a log-determinant too: −Σ log_scale.",
        ),
        "log_scale has the wrong sign in the density": (
            bits_scale_wrong_sign,
            "From the logit to z we divide by exp(log_scale), so the log-determinant of this map is −Σ log_scale.",
        ),
        "you multiplied by the scale where you should divide": (
            bits_times_scale,
            "loc and exp(log_scale) are mean and deviation of the logit: z = (logit − loc)/exp(log_scale).",
        ),
        "you took the mean of the logarithms over the draws": (
            bits_mean_of_logs,
            "That is the looser bound. Asked is the logarithm of the mean density: logsumexp over the draws, minus log S.",
        ),
        "you summed the densities of the draws": (
            bits_sum_over_draws,
            "The probability of a level is the mean of the density over its cell: subtract log S.",
        ),
        "you took the mean over the draws pixel by pixel": (
            bits_pixel_by_pixel,
            "A flow has one density for the whole image: sum the logarithms over its pixels first, then average over the draws.",
        ),
        "you returned nats": (bits_in_nats, "A bit is log 2 nats: divide by log 2."),
        "you did not divide by the number of pixels": (
            bits_of_the_image,
            "Bits *per dimension*: divide by D, the number of values in one image.",
        ),
        "you took the mean over the pixels before that over the draws": (
            bits_mean_over_pixels,
            "The density of an image is a product: sum over its pixels, average the density over the draws, and divide by D last.",
        ),
        "you added the noise to the logit": (
            bits_noise_on_the_logit,
            "The noise fills the cell of a level, so it is added to the level: y = (k + u)/L, and then the logit.",
        ),
        "you divided by L − 1": (
            bits_one_level_less,
            "L levels of width 1/L fill [0, 1): y = (k + u)/L.",
        ),
        "you left out the noise": (
            bits_without_noise,
            "At the levels themselves a density says nothing of its mean over the cell: y = (k + u)/L.",
        ),
    },
    correct={
        "torch.distributions": bits_by_distributions,
        "log-sigmoids": bits_by_log_sigmoid,
        "a loop in double precision": bits_in_a_loop,
    },
    tolerance=1e-4,
    forbidden=(
        "flows.images.dequantize",
        "flows.images.Logit.forward",
        "flows.images.Logit.inverse",
        "flows.images.Logit._log_det",
        "flows.flow.Flow.log_prob",
    ),
)


# 4. multi_scale -------------------------------------------------------------------------------------------------------


def to_noise(b, s, t):
    return (b - t) * (-s).exp()


def to_data(e, s, t):
    return e * s.exp() + t


def density_of(e, b, s):
    """log p(b | a), for the half that leaves."""
    return total(log_normal(e) - s)


def scales(
    v,
    nets,
    direction,
    there=to_data,
    back=to_noise,
    density=density_of,
    last=lambda z: total(log_normal(z)),
    split=lambda v: squeeze(v).chunk(2, 1),
    join=lambda a, b, direction: unsqueeze(torch.cat([a, b], 1)),
    look=lambda a, noise, direction, leaves: a,
    read=network,
):
    """One scale, and the coarser ones by itself. Each mistake is this with one of its parts exchanged."""
    if not nets:
        return v, last(v)
    how = {
        "read": read,
        "there": there,
        "back": back,
        "density": density,
        "last": last,
        "split": split,
        "join": join,
        "look": look,
    }
    stays, leaves = split(v)
    rest, log_prob = scales(stays, nets[1:], direction, **how)
    a = stays if direction == "inverse" else rest
    s, t = read(look(a, stays, direction, leaves), nets[0])
    other = back(leaves, s, t) if direction == "inverse" else there(leaves, s, t)
    e, b = (other, leaves) if direction == "inverse" else (leaves, other)
    return join(rest, other, direction), log_prob + density(e, b, s)


def multi_scale(v, nets, direction):
    return scales(v, nets, direction)


def scales_joined_backwards(v, nets, direction):
    return scales(v, nets, direction, join=lambda a, b, way: unsqueeze(torch.cat([b, a], 1)))


def scales_pairs(v, nets, direction):
    return scales(v, nets, direction, split=lambda v: (squeeze(v)[:, 0::2], squeeze(v)[:, 1::2]))


def scales_of_the_wrong_half(v, nets, direction):
    return scales(v, nets, direction, look=lambda a, noise, way, leaves: leaves)


def scales_of_the_noise(v, nets, direction):
    return scales(v, nets, direction, look=lambda a, noise, way, leaves: noise)


def scales_first_half_leaves(v, nets, direction):
    return scales(
        v,
        nets,
        direction,
        split=lambda v: squeeze(v).chunk(2, 1)[::-1],
        join=lambda a, b, way: unsqueeze(torch.cat([b, a], 1)),
    )


def scales_wrong_sign(v, nets, direction):
    return scales(v, nets, direction, there=lambda e, s, t: e * (-s).exp() + t, back=lambda b, s, t: (b - t) * s.exp())


def scales_same_sign(v, nets, direction):
    return scales(v, nets, direction, back=lambda b, s, t: (b - t) * s.exp())


def scales_variance(v, nets, direction):
    return scales(
        v,
        nets,
        direction,
        there=lambda e, s, t: e * (s / 2).exp() + t,
        back=lambda b, s, t: (b - t) * (-s / 2).exp(),
        density=lambda e, b, s: total(log_normal(e) - s / 2),
    )


def scales_not_counted(v, nets, direction):
    return scales(v, nets, direction, density=lambda e, b, s: 0)


def scales_counted_twice(v, nets, direction):
    result, log_prob = scales(v, nets, direction)
    z = result if direction == "inverse" else v
    for _ in nets:
        z, leaves = squeeze(z).chunk(2, 1)
        log_prob = log_prob + total(log_normal(leaves))
    return result, log_prob


def scales_no_volume(v, nets, direction):
    return scales(v, nets, direction, density=lambda e, b, s: total(log_normal(e)))


def scales_volume_plus(v, nets, direction):
    return scales(v, nets, direction, density=lambda e, b, s: total(log_normal(e) + s))


def scales_volume_plus_forward(v, nets, direction):
    return scales(
        v, nets, direction, density=lambda e, b, s: total(log_normal(e) + (s if direction == "forward" else -s))
    )


def scales_standard(v, nets, direction):
    return scales(v, [(0 * weight, 0 * bias) for weight, bias in nets], direction)


def scales_density_at_data(v, nets, direction):
    return scales(v, nets, direction, density=lambda e, b, s: total(log_normal(b) - s))


def scales_one_place(v, nets, direction):
    return scales(v, nets, direction, density=lambda e, b, s: total(log_normal(e)) - total(s) / s[0, 0].numel())


def scales_last_not_counted(v, nets, direction):
    return scales(v, nets, direction, last=lambda z: z.new_zeros(len(z)))


def scales_exchanged(v, nets, direction):
    return scales(v, nets, direction, read=exchanged)


def scales_in_a_loop(v, nets, direction):
    """Down through the scales, then up again, in double precision."""
    state, left, log_prob = v.double(), [], torch.zeros(len(v), dtype=DOUBLE)

    def read(kept, weight, bias):
        raw = nn.functional.conv2d(kept, weight.double()[..., None, None], bias.double())
        s, t = torch.split(raw, len(bias) // 2, 1)
        return torch.tanh(s), t

    for net in nets:
        blocks = nn.functional.pixel_unshuffle(state, 2)
        channels = blocks.shape[1] // 2
        state, leaving = blocks[:, :channels], blocks[:, channels:]
        if direction == "inverse":
            s, t = read(state, *net)
            leaving = (leaving - t) / s.exp()
            log_prob -= s.sum((1, 2, 3))
        left.append(leaving)
    log_prob += sum(log_normal(part).sum((1, 2, 3)) for part in [state, *left])
    for net, leaving in zip(reversed(nets), reversed(left), strict=True):
        if direction == "forward":
            s, t = read(state, *net)
            leaving = leaving * s.exp() + t
            log_prob -= s.sum((1, 2, 3))
        state = nn.functional.pixel_shuffle(torch.cat([state, leaving], 1), 2)
    return state.to(v.dtype), log_prob.to(v.dtype)


def scales_by_distributions(v, nets, direction):
    """log p(b | a) as the library has it; the folding by slices."""
    if not nets:
        return v, Normal(0.0, 1.0).log_prob(v).sum((1, 2, 3))
    corners = [v[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    first, second = torch.stack(corners, 2).flatten(1, 2).tensor_split(2, 1)
    if direction == "forward":
        first, log_prob = scales_by_distributions(first, nets[1:], direction)
    weight, bias = nets[0]
    raw = (weight @ first.flatten(2)).unflatten(2, first.shape[2:]) + bias[:, None, None]
    half = raw.shape[1] // 2
    model = Normal(raw[:, half:], raw[:, :half].tanh().exp())
    if direction == "forward":
        second = model.loc + model.scale * second
        log_prob = log_prob + model.log_prob(second).sum((1, 2, 3))
        whole = torch.cat([first, second], 1)
    else:
        rest, log_prob = scales_by_distributions(first, nets[1:], direction)
        log_prob = log_prob + model.log_prob(second).sum((1, 2, 3))
        whole = torch.cat([rest, (second - model.loc) / model.scale], 1)
    return nn.functional.pixel_shuffle(whole, 2), log_prob


def scales_as_one_map(v, nets, direction):
    """The density of the noise, and a log-determinant with one sign for each direction."""
    result, log_det = scales_with_volume(v, nets, 1 if direction == "forward" else -1)
    noise = v if direction == "forward" else result
    return result, log_normal(noise).sum((1, 2, 3)) + (log_det if direction == "inverse" else -log_det)


def scales_with_volume(v, nets, sign):
    if not nets:
        return v, v.new_zeros(len(v))
    folded = squeeze(v)
    half = folded.shape[1] // 2
    a, b, deeper = folded[:, :half], folded[:, half:], 0
    if sign > 0:
        a, deeper = scales_with_volume(a, nets[1:], sign)
    s, t = network(a, nets[0])
    b = b * s.exp() + t if sign > 0 else (b - t) / s.exp()
    if sign < 0:
        a, deeper = scales_with_volume(a, nets[1:], sign)
    return unsqueeze(torch.cat((a, b), 1)), deeper + sign * s.sum((1, 2, 3))


def scaled_images(g, shape, count, direction, dtype=SINGLE):
    nets = []
    for i in range(count):
        stays = shape[1] * 2 ** (i + 1)
        bias = between(g, 0.2, 0.6, (2 * stays,), dtype) * (1 - 2 * torch.randint(2, (2 * stays,), generator=g))
        nets.append((normal(g, (2 * stays, stays), dtype) * 0.4 / stays**0.5, bias))
    return {"v": normal(g, shape, dtype), "nets": nets, "direction": direction}


SCALES = Exercise(
    "multi_scale",
    points=4,
    minutes=25,
    difficulty=3,
    reference=multi_scale,
    outputs=("result", "log_prob"),
    visible=Group(
        1,
        lambda g: [
            scaled_images(g, (2, 1, 4, 4), 2, "inverse", DOUBLE),
            scaled_images(g, (2, 1, 4, 8), 2, "forward"),
            scaled_images(g, (3, 2, 2, 4), 1, "inverse"),
        ],
    ),
    hidden={
        "from data to noise": Group(
            1,
            lambda g: [
                scaled_images(g, (3, 1, 8, 4), 2, "inverse"),
                scaled_images(g, (1, 3, 2, 6), 1, "inverse", DOUBLE),
            ],
        ),
        "from noise to data": Group(
            1.5,
            lambda g: [
                scaled_images(g, (3, 1, 8, 4), 2, "forward"),
                scaled_images(g, (1, 3, 2, 6), 1, "forward", DOUBLE),
            ],
        ),
        "one pixel left, and three scales": Group(
            0.5,
            lambda g: [
                scaled_images(g, (2, 1, 2, 2), 1, "inverse"),
                scaled_images(g, (1, 1, 8, 8), 3, "inverse", DOUBLE),
                scaled_images(g, (1, 1, 8, 16), 3, "forward", DOUBLE),
            ],
        ),
    },
    mistakes={
        "you joined the halves in the other order": (
            scales_joined_backwards,
            "chunk put the half that stays first, so cat must too: what was split and joined must be as it was.",
        ),
        "you split by every other channel and joined by torch.cat": (
            scales_pairs,
            "torch.cat does not undo slices [0::2] and [1::2]. Take the first half of the channels and the second: chunk(2, dim=1).",
        ),
        "the first half of the channels leaves": (
            scales_first_half_leaves,
            "Asked is that the first half stays and goes on, and the second half leaves.",
        ),
        "the network looks at the half that leaves": (
            scales_of_the_wrong_half,
            "What leaves is drawn when the other half is known. The network must see the half that stays.",
        ),
        "the network looks at the noise of the half that stays": (
            scales_of_the_noise,
            "On the way to data, first make the coarser scales, then show the network that image: on the way back it saw the same.",
        ),
        "the log-scale has the wrong sign": (
            scales_wrong_sign,
            "The half that leaves is drawn with the deviation exp(s): b = t + exp(s)·e.",
        ),
        "you multiplied by exp(s) in both directions": (
            scales_same_sign,
            "From data to noise we divide: e = (b − t)·exp(−s).",
        ),
        "you read s as the logarithm of a variance": (
            scales_variance,
            "s is the logarithm of the deviation: the factor is exp(s), not exp(s/2).",
        ),
        "the half that leaves is not counted": (
            scales_not_counted,
            "log p(x) = log p(a) + log p(b | a): what has left keeps its share.",
        ),
        "the half that leaves is counted twice": (
            scales_counted_twice,
            "Its noise is counted where it leaves. At the end only what is left then is counted.",
        ),
        "you left out −Σ s": (
            scales_no_volume,
            "b is e, stretched by exp(s): log p(b | a) = log N(e; 0, 1) − s for each value.",
        ),
        "you added Σ s": (
            scales_volume_plus,
            "A wide Gaussian is low: log p(b | a) = log N(e; 0, 1) − s for each value.",
        ),
        "you added Σ s on the way to data": (
            scales_volume_plus_forward,
            "Asked is log p(x) in both directions, so it is −Σ s in both: the log-determinant of forward, +Σ s, is subtracted.",
        ),
        "you drew the half that leaves from N(0, I)": (
            scales_standard,
            "Its mean t and its log-scale s come from the network, which sees the half that stays.",
        ),
        "you evaluated the normal density at b": (
            scales_density_at_data,
            "The standard normal is the density of the noise e = (b − t)·exp(−s).",
        ),
        "you counted s at one place of the image only": (
            scales_one_place,
            "Each place has its own s, and the log-determinant is the sum over all channels *and* places.",
        ),
        "what is left at the end is not counted": (
            scales_last_not_counted,
            "The last half that stays is standard normal: its log-density belongs to the sum.",
        ),
        "you exchanged s and t": (scales_exchanged, "The network returns first the log-scale s, then the mean t."),
    },
    correct={
        "a loop down and up, in double precision": scales_in_a_loop,
        "torch.distributions": scales_by_distributions,
        "one log-determinant for all scales": scales_as_one_map,
    },
    tolerance=1e-4,
    forbidden=(
        "flows.transforms.affine",
        "flows.transforms.affine_inverse",
        "flows.images.Split.forward",
        "flows.images.Split.inverse",
        "flows.images.Squeeze.forward",
        "flows.images.Squeeze.inverse",
        "flows.flow.Flow.log_prob",
    ),
)


# 5. ridge -------------------------------------------------------------------------------------------------------------


def bounded_push(u, w):
    """û, which pushes against w by less than 1."""
    along = u @ w
    return u + (nn.functional.softplus(along) - 1 - along) * w / (w @ w)


def root(along, k):
    """a in a + k·a/(1 + |a|) = along."""
    size = along.abs()
    middle = size - 1 - k
    return along.sign() * (middle + (middle**2 + 4 * size).sqrt()) / 2


def rate(a):
    """The derivative of a/(1 + |a|)."""
    return (1 + a.abs()) ** -2


def ridge_with(
    v,
    u,
    w,
    b,
    direction,
    push=bounded_push,
    solve=root,
    slope=lambda a, along: rate(a),
    volume=lambda k, rate: torch.log1p(k * rate),
    sign=-1,
):
    """Each mistake is this with one of its parts exchanged."""
    push = push(u, w)
    along, k = v @ w + b, push @ w
    a = along if direction == "forward" else solve(along, k)
    moved = (a / (1 + a.abs()))[:, None] * push
    log_det = volume(k, slope(a, along))
    return (v + moved, log_det) if direction == "forward" else (v - moved, sign * log_det)


def ridge(v, u, w, b, direction):
    return ridge_with(v, u, w, b, direction)


def ridge_by_the_norm(v, u, w, b, direction):
    def push(u, w):
        return u + (nn.functional.softplus(u @ w) - 1 - u @ w) * w / w.norm()

    return ridge_with(v, u, w, b, direction, push=push)


def ridge_not_divided(v, u, w, b, direction):
    def push(u, w):
        return u + (nn.functional.softplus(u @ w) - 1 - u @ w) * w

    return ridge_with(v, u, w, b, direction, push=push)


def ridge_unbounded(v, u, w, b, direction):
    return ridge_with(v, u, w, b, direction, push=lambda u, w: u)


def ridge_without_one(v, u, w, b, direction):
    def push(u, w):
        return u + (nn.functional.softplus(u @ w) - u @ w) * w / (w @ w)

    return ridge_with(v, u, w, b, direction, push=push)


def ridge_along_left(v, u, w, b, direction):
    def push(u, w):
        return u + (nn.functional.softplus(u @ w) - 1) * w / (w @ w)

    return ridge_with(v, u, w, b, direction, push=push)


def ridge_rate_not_squared(v, u, w, b, direction):
    return ridge_with(v, u, w, b, direction, slope=lambda a, along: 1 / (1 + a.abs()))


def ridge_rate_of_tanh(v, u, w, b, direction):
    return ridge_with(v, u, w, b, direction, slope=lambda a, along: 1 - a.tanh() ** 2)


def ridge_rate_at_x(v, u, w, b, direction):
    return ridge_with(v, u, w, b, direction, slope=lambda a, along: rate(along))


def ridge_one_sign(v, u, w, b, direction):
    return ridge_with(v, u, w, b, direction, sign=1)


def ridge_all_signs(v, u, w, b, direction):
    result, log_det = ridge_with(v, u, w, b, direction)
    return result, -log_det


def ridge_negated(v, u, w, b, direction):
    return ridge_with(v, u, w, b, direction, solve=lambda along, k: along)


def ridge_other_root(v, u, w, b, direction):
    def solve(along, k):
        middle = along.abs() - 1 - k
        return along.sign() * (middle - (middle**2 + 4 * along.abs()).sqrt()) / 2

    return ridge_with(v, u, w, b, direction, solve=solve)


def ridge_one_side(v, u, w, b, direction):
    def solve(along, k):
        return ((along - 1 - k) + ((along - 1 - k) ** 2 + 4 * along).clamp(min=0).sqrt()) / 2

    return ridge_with(v, u, w, b, direction, solve=solve)


def ridge_forgets_b(v, u, w, b, direction):
    """Takes a for wᵀz on the way back."""
    return ridge_with(v, u, w, b, direction, solve=lambda along, k: root(along - b, k) + b)


def ridge_no_one_plus(v, u, w, b, direction):
    return ridge_with(v, u, w, b, direction, volume=lambda k, rate: (k * rate).abs().log())


def ridge_each_coordinate(v, u, w, b, direction):
    push = bounded_push(u, w)

    def volume(k, rate):
        return torch.log((1 + push * w * rate[:, None]).abs()).sum(1)

    return ridge_with(v, u, w, b, direction, volume=volume)


def ridge_raw_volume(v, u, w, b, direction):
    return ridge_with(v, u, w, b, direction, volume=lambda k, rate: (1 + (u @ w) * rate).abs().log())


def ridge_by_halving(v, u, w, b, direction):
    """As the kernel does it: the root by halving an interval, in double precision."""
    x, push, w = v.double(), bounded_push(u.double(), w.double()), w.double()
    along, k = x @ w + b, (push * w).sum()
    low, high = along - k.abs(), along + k.abs()
    if direction == "forward":
        low = high = along
    for _ in range(80):
        middle = (low + high) / 2
        below = middle + k * nn.functional.softsign(middle) < along
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    a = along if direction == "forward" else (low + high) / 2
    sign = 1 if direction == "forward" else -1
    result = x + sign * torch.outer(nn.functional.softsign(a), push)
    return result.to(v.dtype), (sign * (1 + k / (1 + a.abs()) ** 2).log()).to(v.dtype)


def ridge_by_matrices(v, u, w, b, direction):
    """The root in its form without cancellation, and the determinant of the whole Jacobian."""
    along = (v * w).sum(1) + b
    dot = torch.dot(u, w)
    push = u - dot * w / w.norm() ** 2 + (torch.log1p(dot.exp()) - 1) * w / w.norm() ** 2
    k = torch.dot(push, w)
    if direction == "inverse":
        size, middle = along.abs(), along.abs() - 1 - k
        distance = (middle**2 + 4 * size).sqrt()
        stable = torch.where(middle > 0, (middle + distance) / 2, 2 * size / (distance - middle))
        along = torch.sign(along) * stable
    jacobian = torch.eye(len(w), dtype=v.dtype) + rate(along)[:, None, None] * torch.outer(push, w)
    log_det = torch.linalg.slogdet(jacobian).logabsdet
    step = torch.outer(along / (1 + along.abs()), push)
    return (v + step, log_det) if direction == "forward" else (v - step, -log_det)


def ridge_in_a_loop(v, u, w, b, direction):
    u, w, rows, changes = u.tolist(), w.tolist(), [], []
    dot, square = sum(i * j for i, j in zip(u, w, strict=True)), sum(i * i for i in w)
    k = math.log1p(math.exp(dot)) - 1
    push = [i + (k - dot) * j / square for i, j in zip(u, w, strict=True)]
    for row in v.tolist():
        a = sum(i * j for i, j in zip(row, w, strict=True)) + b
        if direction == "inverse":  # both signs of a, each with its own quadratic
            half = (a - 1 - k) / 2 if a >= 0 else (a + 1 + k) / 2
            a = half + math.sqrt(half**2 + a) if a >= 0 else half - math.sqrt(half**2 - a)
        change = math.log(1 + k / (1 + abs(a)) ** 2)
        way = 1 if direction == "forward" else -1
        rows.append([i + way * j * a / (1 + abs(a)) for i, j in zip(row, push, strict=True)])
        changes.append(way * change)
    return torch.tensor(rows, dtype=v.dtype), torch.tensor(changes, dtype=v.dtype)


def ridged(g, shape, direction, dtype=SINGLE, pull=None):
    """A ridge whose w is far from length 1; `pull` is wᵀu, below −1 where û must differ much from u."""
    w = normal(g, shape[1:], DOUBLE)
    w = w / w.norm() * (between(g, 1.6, 2.4) if torch.rand((), generator=g) < 0.5 else between(g, 0.4, 0.65))
    pull = between(g, -2.5, 3.0, dtype=DOUBLE) if pull is None else torch.tensor(pull, dtype=DOUBLE)
    across = normal(g, shape[1:], DOUBLE)
    u = across - (across @ w) * w / (w @ w) + pull * w / (w @ w)
    b = between(g, 0.3, 0.9, dtype=DOUBLE) * (1 - 2 * torch.randint(2, (), generator=g))
    v = normal(g, shape, DOUBLE) * 1.5 / min(1, w.norm())
    return {"v": v.to(dtype), "u": u.to(dtype), "w": w.to(dtype), "b": b.item(), "direction": direction}


RIDGE = Exercise(
    "ridge",
    points=3,
    minutes=25,
    difficulty=3,
    reference=ridge,
    outputs=("result", "log_det"),
    visible=Group(
        1,
        lambda g: [
            ridged(g, (4, 2), "forward", pull=1.5),
            ridged(g, (7, 3), "inverse", pull=2.0),
            ridged(g, (6, 3), "inverse", DOUBLE, pull=-2.0),
        ],
    ),
    hidden={
        "forward": Group(
            0.5, lambda g: [ridged(g, (5, 4), "forward"), ridged(g, (1, 2), "forward", DOUBLE, pull=-1.8)]
        ),
        "inverse": Group(
            1,
            lambda g: [
                ridged(g, (6, 4), "inverse"),
                ridged(g, (1, 2), "inverse", DOUBLE),
                ridged(g, (7, 5), "inverse"),
            ],
        ),
        "a line, and a push that must be bounded": Group(
            0.5,
            lambda g: [
                ridged(g, (5, 1), "inverse", DOUBLE),
                ridged(g, (5, 3), "inverse", DOUBLE, pull=-2.5),
                ridged(g, (3, 6), "forward", pull=-2.2),
            ],
        ),
    },
    mistakes={
        "you divided by ‖w‖ instead of ‖w‖²": (
            ridge_by_the_norm,
            "wᵀû should be softplus(wᵀu) − 1. What is added to u is a multiple of w/‖w‖², for wᵀw = ‖w‖²: a public library had this bug.",
        ),
        "you did not divide by ‖w‖²": (
            ridge_not_divided,
            "wᵀû should be softplus(wᵀu) − 1. What is added to u is a multiple of w/‖w‖², for wᵀw = ‖w‖².",
        ),
        "you used u as it is": (
            ridge_unbounded,
            "With wᵀu < −1 the ridge folds space over itself, and two points z have one x. Use û.",
        ),
        "you forgot the −1 in û": (
            ridge_without_one,
            "wᵀû should be softplus(wᵀu) − 1, which is above −1 and may be negative.",
        ),
        "you left wᵀu in û": (
            ridge_along_left,
            "û = u + (softplus(wᵀu) − 1 − wᵀu) w/‖w‖²: the part of u along w is taken away, and another put in its place.",
        ),
        "you took 1/(1 + |a|) for the slope": (
            ridge_rate_not_squared,
            "The derivative of a/(1 + |a|) is 1/(1 + |a|)².",
        ),
        "you took the slope of tanh": (
            ridge_rate_of_tanh,
            "Here the ridge has the profile a/(1 + |a|). Its derivative is 1/(1 + |a|)².",
        ),
        "you took the slope at x on the way back": (
            ridge_rate_at_x,
            "The slope is that of the forward map at z. First find a = wᵀz + b, then the slope at a.",
        ),
        "you gave the log-determinant of the forward map in both directions": (
            ridge_one_sign,
            "Each direction returns that of the map that it computes itself: on the way back minus that of forward at z.",
        ),
        "the log-determinant has the wrong sign": (
            ridge_all_signs,
            "Forward stretches along w by 1 + wᵀû h'(a): its log-determinant is + the logarithm of that.",
        ),
        "you subtracted the push at x": (
            ridge_negated,
            "That undoes a coupling, where what the push depends on has stayed. Here z is not known yet: solve for a = wᵀz + b.",
        ),
        "you took the other root": (
            ridge_other_root,
            "The roots of the quadratic have different signs, and |a| is the one that is not negative.",
        ),
        "you solved for a > 0 only": (
            ridge_one_side,
            "For a < 0 the absolute value gives another quadratic. By symmetry: solve with |wᵀx + b| for |a|, and put the sign back.",
        ),
        "you lost b on the way back": (
            ridge_forgets_b,
            "Add b on both sides: with a = wᵀz + b the equation is a + wᵀû h(a) = wᵀx + b, and b occurs nowhere else.",
        ),
        "you forgot the 1 in the determinant": (
            ridge_no_one_plus,
            "The Jacobian is I + û wᵀ h'(a): without a push its determinant is 1.",
        ),
        "you took the Jacobian for diagonal": (
            ridge_each_coordinate,
            "û wᵀ is a full matrix. det(I + û wᵀ h') = 1 + wᵀû h': the determinant of a matrix of rank one beside I.",
        ),
        "you used u instead of û in the determinant": (
            ridge_raw_volume,
            "The points are pushed by û, so wᵀû is in the determinant too.",
        ),
    },
    correct={
        "halving, in double precision": ridge_by_halving,
        "the stable root, and whole matrices": ridge_by_matrices,
        "a loop": ridge_in_a_loop,
    },
    tolerance=2e-4,
    forbidden=("flows.transforms.Planar.forward", "flows.transforms.Planar.inverse"),
)


# 6. small_steps -------------------------------------------------------------------------------------------------------


def jacobian(x, u, w, b):
    """That of f at each point, (B, D, D)."""
    return torch.einsum("dm,bm,me->bde", u, 1 - (x @ w.T + b).tanh() ** 2, w)


def walk(z, u, w, b, steps, at=lambda x, after: x, jac=jacobian, one=None):
    """The end of the walk, and the three sums; `one` gives their terms from h and the Jacobian."""
    h, sums = 1 / steps, [0.0, 0.0, 0.0]
    for _ in range(steps):
        after = z + h * (z @ w.T + b).tanh() @ u.T
        terms = (one or three)(h, jac(at(z, after), u, w, b))
        sums = [old + new for old, new in zip(sums, terms, strict=True)]
        z = after
    return z, *sums


def trace(matrix):
    return matrix.diagonal(dim1=1, dim2=2).sum(1)


def three(h, j):
    exact = torch.linalg.slogdet(torch.eye(j.shape[1], dtype=j.dtype) + h * j).logabsdet
    return exact, h * trace(j), h * trace(j) - h**2 / 2 * trace(j @ j)


def small_steps(z, u, w, b, steps):
    return walk(z, u, w, b, steps)


def with_terms(change):
    """The walk with other terms: `change` gets h, J and the right three."""

    def wrong(z, u, w, b, steps):
        return walk(z, u, w, b, steps, one=lambda h, j: change(h, j, *three(h, j)))

    return wrong


steps_plus = with_terms(lambda h, j, e, f, s: (e, f, 2 * f - s))
steps_no_half = with_terms(lambda h, j, e, f, s: (e, f, 2 * s - f))
steps_half_h = with_terms(lambda h, j, e, f, s: (e, f, f + (s - f) / h))
steps_trace_squared = with_terms(lambda h, j, e, f, s: (e, f, f - f**2 / 2))
steps_frobenius = with_terms(lambda h, j, e, f, s: (e, f, f - h**2 / 2 * (j**2).sum((1, 2))))
steps_diagonal = with_terms(lambda h, j, e, f, s: (e, f, f - h**2 / 2 * (j.diagonal(dim1=1, dim2=2) ** 2).sum(1)))
steps_without_h = with_terms(lambda h, j, e, f, s: (e, f / h, f / h + s - f))
steps_no_identity = with_terms(
    lambda h, j, e, f, s: (torch.linalg.slogdet(h * j + 1e-9 * torch.eye(j.shape[1], dtype=j.dtype)).logabsdet, f, s)
)
steps_determinant = with_terms(lambda h, j, e, f, s: (e.exp(), f, s))
steps_diagonal_determinant = with_terms(
    lambda h, j, e, f, s: ((1 + h * j.diagonal(dim1=1, dim2=2)).abs().log().sum(1), f, s)
)
steps_inverse_sign = with_terms(lambda h, j, e, f, s: (-e, -f, -s))
steps_log_of_trace = with_terms(lambda h, j, e, f, s: (e, torch.log1p(f), s))


def steps_rate_of_tanh(z, u, w, b, steps):
    def jac(x, u, w, b):
        return torch.einsum("dm,bm,me->bde", u, 1 - (x @ w.T + b).tanh(), w)

    return walk(z, u, w, b, steps, jac=jac)


def steps_no_rate(z, u, w, b, steps):
    return walk(z, u, w, b, steps, jac=lambda x, u, w, b: (u @ w).expand(len(x), -1, -1))


def steps_after(z, u, w, b, steps):
    return walk(z, u, w, b, steps, at=lambda x, after: after)


def steps_at_the_start(z, u, w, b, steps):
    x = walk(z, u, w, b, steps)[0]
    terms = three(1 / steps, jacobian(z, u, w, b))
    return x, *(steps * term for term in terms)


def steps_at_the_end(z, u, w, b, steps):
    x = walk(z, u, w, b, steps)[0]
    terms = three(1 / steps, jacobian(x, u, w, b))
    return x, *(steps * term for term in terms)


def steps_last_only(z, u, w, b, steps):
    before = z
    for _ in range(steps - 1):
        before = before + (before @ w.T + b).tanh() @ u.T / steps
    return walk(z, u, w, b, steps)[0], *three(1 / steps, jacobian(before, u, w, b))


def steps_one_too_few(z, u, w, b, steps):
    h, sums = 1 / steps, [z.new_zeros(len(z))] * 3
    for _ in range(steps - 1):
        sums = [old + new for old, new in zip(sums, three(h, jacobian(z, u, w, b)), strict=True)]
        z = z + h * (z @ w.T + b).tanh() @ u.T
    return z, *sums


def steps_of_length_one(z, u, w, b, steps):
    sums = [0.0, 0.0, 0.0]
    for _ in range(steps):
        sums = [old + new for old, new in zip(sums, three(1.0, jacobian(z, u, w, b)), strict=True)]
        z = z + (z @ w.T + b).tanh() @ u.T
    return z, *sums


def steps_in_the_ridges(z, u, w, b, steps):
    """All by matrices of the size of the number of ridges, M: det(I + UV) = det(I + VU), and so with the traces."""
    x, exact, first, second = z, z.new_zeros(len(z)), z.new_zeros(len(z)), z.new_zeros(len(z))
    inner, one = w @ u, torch.eye(len(b), dtype=z.dtype)
    for _ in range(steps):
        value = torch.tanh(nn.functional.linear(x, w, b))
        small = (1 - value.square())[:, :, None] * inner / steps
        exact = exact + (one + small).logdet()
        divergence = torch.einsum("bmm->b", small)
        first, second = first + divergence, second + divergence - torch.einsum("bmn,bnm->b", small, small) / 2
        x = x + nn.functional.linear(value, u) / steps
    return x, exact, first, second


def steps_by_autograd(z, u, w, b, steps):
    """Each Jacobian by autograd, in double precision; the sums from its eigenvalues, which may be complex."""
    u, w, b = u.double(), w.double(), b.double()

    def step(x):
        return x + torch.tanh(w @ x + b) @ u.T / steps

    points, sums = [], []
    for row in z.double():
        exact = first = second = 0.0
        for _ in range(steps):
            values = torch.linalg.eigvals(torch.autograd.functional.jacobian(step, row)) - 1
            exact += (1 + values).abs().log().sum()
            first += values.sum().real
            second += (values - values**2 / 2).sum().real
            row = step(row)
        points.append(row)
        sums.append(torch.stack([exact, first, second]))
    return torch.stack(points).to(z.dtype), *torch.stack(sums).to(z.dtype).unbind(1)


def steps_in_a_loop(z, u, w, b, steps):
    """The sums over steps last; the ridges one by one."""
    h, states = 1 / steps, [z]
    for _ in range(steps):
        x = states[-1]
        states.append(x + h * sum(u[:, m] * (x @ w[m] + b[m]).tanh()[:, None] for m in range(len(b))))
    jacobians = []
    for x in states[:-1]:
        jac = torch.zeros(len(x), x.shape[1], x.shape[1], dtype=z.dtype)
        for m in range(len(b)):
            jac = jac + torch.cosh(x @ w[m] + b[m]).pow(-2)[:, None, None] * torch.outer(u[:, m], w[m])
        jacobians.append(jac)
    j = torch.stack(jacobians)
    exact = torch.linalg.det(torch.eye(z.shape[1], dtype=z.dtype) + h * j).abs().log().sum(0)
    first = h * j.diagonal(dim1=-2, dim2=-1).sum((0, 2))
    return states[-1], exact, first, first - h**2 / 2 * (j * j.mT).sum((0, 2, 3))


def walking(g, shape, ridges, steps, dtype=SINGLE):
    """A field that runs apart or together, too weak for even one step to fold space: J is never longer than 0.9."""
    w, way = normal(g, (ridges, shape[1]), DOUBLE), 1 - 2 * torch.randint(2, (), generator=g)
    u = normal(g, (shape[1], ridges), DOUBLE) + 0.7 * way * w.T
    u = 0.9 * u / (u.norm(dim=0) * w.norm(dim=1)).sum()
    b = between(g, 0.2, 0.6, (ridges,), DOUBLE) * (1 - 2 * torch.randint(2, (ridges,), generator=g))
    z = normal(g, shape, DOUBLE) * 0.7
    return {"z": z.to(dtype), "u": u.to(dtype), "w": w.to(dtype), "b": b.to(dtype), "steps": steps}


STEPS = Exercise(
    "small_steps",
    points=4,
    minutes=35,
    difficulty=4,
    reference=small_steps,
    outputs=("x", "exact", "first", "second"),
    visible=Group(
        1, lambda g: [walking(g, (3, 2), 4, 2, DOUBLE), walking(g, (2, 3), 2, 3, DOUBLE), walking(g, (2, 3), 5, 1)]
    ),
    hidden={
        "other fields": Group(
            1, lambda g: [walking(g, (4, 3), 6, 3, DOUBLE), walking(g, (1, 2), 3, 2, DOUBLE), walking(g, (5, 4), 4, 4)]
        ),
        "one step, many steps": Group(
            1, lambda g: [walking(g, (3, 3), 4, 1), walking(g, (2, 2), 5, 25, DOUBLE), walking(g, (1, 4), 3, 10)]
        ),
        "a line, and one ridge": Group(
            1, lambda g: [walking(g, (4, 1), 3, 2, DOUBLE), walking(g, (3, 4), 1, 3, DOUBLE), walking(g, (1, 1), 1, 1)]
        ),
    },
    mistakes={
        "the second-order term has the wrong sign": (
            steps_plus,
            "log(1 + λ) = λ − λ²/2 + …, and so with the eigenvalues of h·J.",
        ),
        "you forgot the ½ of the second order": (
            steps_no_half,
            "log(1 + λ) = λ − λ²/2 + …, and so with the eigenvalues of h·J.",
        ),
        "you forgot to square h": (
            steps_half_h,
            "The matrix is h·J, and its square has h².",
        ),
        "you squared the trace": (
            steps_trace_squared,
            "Σλ² is tr(J²), the trace of the square. (tr J)² has the products of different eigenvalues, too.",
        ),
        "you took the sum of all squared entries": (
            steps_frobenius,
            "That is tr(JᵀJ). Asked is tr(J²) = Σ J_ij J_ji, which may be negative, as for a rotation.",
        ),
        "you squared the diagonal only": (
            steps_diagonal,
            "tr(J²) = Σ J_ij J_ji: square the matrix, then take its trace.",
        ),
        "you forgot h before the trace": (
            steps_without_h,
            "One step moves by h·f, so it changes log-volume by about h·tr J.",
        ),
        "you forgot the identity in the determinant": (
            steps_no_identity,
            "The step is z + h v(z), and its Jacobian I + h J.",
        ),
        "you summed determinants instead of their logarithms": (
            steps_determinant,
            "Determinants of a chain multiply; their logarithms add.",
        ),
        "you took the Jacobian for diagonal": (
            steps_diagonal_determinant,
            "Every coordinate pushes every other one: take the determinant of the whole matrix.",
        ),
        "you gave the log-determinants of the way back": (
            steps_inverse_sign,
            "Asked is the map from z to x: where the field runs apart, volume grows.",
        ),
        "you took the logarithm of 1 + h tr J": (
            steps_log_of_trace,
            "det(I + hJ) is 1 + h·tr J up to h². Asked is the first order of its logarithm, and that is h·tr J itself.",
        ),
        "you took 1 − tanh for the slope": (
            steps_rate_of_tanh,
            "The derivative of tanh is 1 − tanh².",
        ),
        "you forgot the slope of tanh": (
            steps_no_rate,
            "The chain rule: J = U diag(1 − tanh²) W, with the slope of each ridge between the matrices.",
        ),
        "you took the Jacobian after the step": (
            steps_after,
            "The step from x has the Jacobian at x: work it out before you move on.",
        ),
        "you took the Jacobian at z in every step": (
            steps_at_the_start,
            "The chain rule: each step has its Jacobian at the point where it starts.",
        ),
        "you took the Jacobian at the last point in every step": (
            steps_at_the_end,
            "The chain rule: each step has its Jacobian at the point where it starts.",
        ),
        "you returned the last step's terms": (
            steps_last_only,
            "The log-determinants of a chain add: sum over all steps.",
        ),
        "you took one step too few": (steps_one_too_few, "From 0 to 1 in steps of 1/steps: that is `steps` of them."),
        "your steps have length 1": (
            steps_of_length_one,
            "The walk takes one unit of time in all: h = 1/steps.",
        ),
    },
    correct={
        "matrices of the size of M": steps_in_the_ridges,
        "autograd and eigenvalues": steps_by_autograd,
        "ridge by ridge": steps_in_a_loop,
    },
    tolerance=1e-4,
    forbidden=("flows.transforms.Planar.forward", "flows.transforms.Planar.inverse", "flows.flow.Flow.log_prob"),
)

EXERCISES = [DENSITY, CHAIN, BITS, SCALES, RIDGE, STEPS]
