"""Scores of generated samples, worked out on features: how near two clouds of points are, and where they part."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["frechet_distance", "frechet_without_bias", "inception_score", "precision_recall"]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""The squared Fréchet distance (2-Wasserstein) of the two Gaussians that have the means and covariances of `a` and `b`.

    .. math:: \lVert m_a - m_b \rVert^2 + \operatorname{tr}\bigl(C_a + C_b - 2\,(C_a^{1/2} C_b\, C_a^{1/2})^{1/2}\bigr)

    It is called FID if the features are Inception's. It has a bias upwards that falls with the number of samples:
    compare only scores of equal numbers, and look at the score of real data against real data, the floor.

    Arguments:
        a, b: Features, shapes (N, D) and (M, D), at least two of each.

    Raises:
        ValueError: If the shapes do not fit or a feature is not finite.

    Source:
        | GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), eq. 6

    Example:
        >>> x = torch.randn(50, 3)
        >>> round(frechet_distance(x, x + 2.0), 3)
        12.0
    """
    a, b = _features(a=a, b=b, least=2)
    cov_a, cov_b = (torch.atleast_2d(x.T.cov()) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # the symmetric square root of C_a
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return max(0.0, distance.item())  # rounding may leave it just below 0


def frechet_without_bias(
    real: Tensor, generated: Tensor, sizes: Sequence[int], generator: torch.Generator | None = None
) -> float:
    r"""The Fréchet distance that infinitely many generated samples would have, on a line through the scores of fewer.

    .. math:: d_n \approx d_\infty + c/n, \qquad \text{fitted by least squares to } d_n \text{ of } n \text{ samples drawn from } generated

    The bias in the number of real samples stays.

    Arguments:
        real, generated: Features, shapes (N, D) and (M, D).
        sizes: Values of n, at least two different ones, none above M; each well above D, below which the bias is no line.
        generator: Source of the draws.

    Raises:
        ValueError: If the shapes or the sizes do not fit.

    Source:
        | Effectively Unbiased FID and Inception Score (Chong & Forsyth, 2020), section 4

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> a, b = torch.randn(2, 4000, 8, generator=g)
        >>> frechet_without_bias(a, b, [500, 1000, 2000, 4000], g) < frechet_distance(a, b)
        True
    """
    real, generated = _features(real=real, generated=generated, least=2)
    if len(set(sizes)) < 2 or not 2 <= min(sizes) <= max(sizes) <= len(generated):
        raise ValueError(f"sizes must be two or more, between 2 and {len(generated)}; got {list(sizes)}")
    chosen = [torch.randperm(len(generated), generator=generator)[:n] for n in sizes]
    values = torch.tensor([[frechet_distance(real, generated[part])] for part in chosen], dtype=torch.float64)
    line = torch.stack([torch.ones(len(sizes), dtype=torch.float64), 1 / torch.tensor(sizes, dtype=torch.float64)], 1)
    return torch.linalg.lstsq(line, values).solution[0].item()


def inception_score(logits: Tensor) -> float:
    r"""How sure a classifier is of each sample, and how many classes it finds in all: between 1 and the number of classes.

    .. math:: \exp\,\mathbb E_x\, D_{KL}\bigl(p(y \mid x)\,\Vert\,p(y)\bigr), \qquad p(y) = \mathbb E_x\,p(y \mid x)

    It never looks at real data, so one perfect image of each class has the highest score.

    Arguments:
        logits: The classifier's output for each sample, before the softmax, shape (N, classes).

    Raises:
        ValueError: If the shape is another or a logit is not finite.

    Source:
        | Improved Techniques for Training GANs (Salimans et al., 2016), section 4

    Example:
        >>> round(inception_score(1000 * torch.eye(10)), 6)
        10.0
    """
    (logits,) = _features(logits=logits, least=1)
    log_p = logits.log_softmax(1)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item()


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    r"""Precision, the share of generated samples that look real, and recall, the share of real ones that can be generated.

    A set's territory is the union of balls around its points, each as wide as the distance to the point's k-th nearest
    neighbour in the set. Precision is the share of generated points in the real territory; recall, the other way round.

    Arguments:
        real, generated: Features, shapes (N, D) and (M, D), more than k of each.
        k: Which neighbour sets the radius.

    Returns:
        (precision, recall), both in [0, 1].

    Raises:
        ValueError: If the shapes do not fit, a feature is not finite, or k is not in 1 … N − 1.

    Source:
        | Improved Precision and Recall Metric for Assessing Generative Models (Kynkäänniemi et al., 2019), eq. 1-3

    Example:
        >>> x = torch.arange(10.0)[:, None]
        >>> precision_recall(x, x[:5])
        (1.0, 0.8)
    """
    real, generated = _features(real=real, generated=generated, least=2)
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(f"k must lie between 1 and {min(len(real), len(generated)) - 1}; got {k}")
    return _share_inside(generated, real, k), _share_inside(real, generated, k)


def _share_inside(points: Tensor, territory: Tensor, k: int) -> float:
    radius = torch.cat([_distances(part, territory).kthvalue(k + 1).values for part in territory.split(1000)])
    inside = torch.cat([(_distances(part, territory) <= radius).any(1) for part in points.split(1000)])
    return inside.double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # the other way loses digits near 0


def _features(least: int, **named: Tensor) -> list[Tensor]:
    """The tensors in float64, checked: (N, D) with one D, at least so many, all finite."""
    width = next(iter(named.values())).shape[-1:]
    for name, value in named.items():
        if value.ndim != 2 or value.shape[-1:] != width or len(value) < least:
            asked = f"(N, {width[0] if width else 'D'}) with N ≥ {least}"
            raise ValueError(f"{name} must have shape {asked}; got {tuple(value.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite; {int((~value.isfinite()).sum())} of its values are not")
    return [value.detach().double() for value in named.values()]
