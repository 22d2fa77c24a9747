"""Scores of samples against torchmetrics, which takes features that were worked out before; float64.

Where the conventions differ:
- Theirs sums features and products of features, and takes the eigenvalues of the covariances' product; ours centres first.
- Their inception score is a mean over parts of the samples; with one part it is ours. They shuffle, so digits differ.
"""

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from dgm_course.metrics import frechet_distance, inception_score


class Given(torch.nn.Identity):
    """In place of Inception: the "images" are the features."""

    num_features = 6


def normals(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("n, m", [(200, 200), (300, 40), (7, 500)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_frechet_distance(n, m, dtype, tolerance, generator):
    """Correlated clouds, in several batches."""
    real = (normals(n, 6, generator=generator) @ normals(6, 6, generator=generator)).to(dtype)
    generated = (normals(m, 6, generator=generator) @ normals(6, 6, generator=generator) + 0.5).to(dtype)
    theirs = FrechetInceptionDistance(feature=Given())
    for part in real.split(150):
        theirs.update(part, real=True)
    for part in generated.split(150):
        theirs.update(part, real=False)
    assert frechet_distance(real, generated) == pytest.approx(theirs.compute().item(), rel=tolerance)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", "ignore:std")
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_inception_score(scale, generator):
    """From unsure to sure classifiers."""
    logits = scale * normals(250, 6, generator=generator)
    theirs = InceptionScore(feature=Given(), splits=1)
    theirs.update(logits)
    assert inception_score(logits) == pytest.approx(theirs.compute()[0].item(), rel=1e-10)
