"""What the tests of the kernels share. Data types are written out in every test; nothing here sets a default."""

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    """A source of random numbers with a fixed seed."""
    return torch.Generator().manual_seed(20240607)
