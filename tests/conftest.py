"""What several test files need: networks with random weights, and how far off a number is."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

# The benchmarks are no part of the package; at the end, so that an installed package is what is tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.deepinv_import import mend_torchvision

mend_torchvision()  # before a test imports deepinv

# So many inputs for each test of test_fuzz*.py; they are the same in every run.
settings.register_profile(
    "suite",
    max_examples=int(os.environ.get("PATCHSCORE_FUZZ", "20")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("suite")

# Threads that wait for each other cost more than these small arrays, and one thread sums in one order.
torch.set_num_threads(1)


@pytest.fixture
def randomized() -> Callable[..., nn.Module]:
    """Put a module into float64 with N(0, 1 / fan-in) weights, so that no layer is idle."""

    def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        module.double()
        with torch.no_grad():
            for parameter in module.parameters():
                fan_in = parameter.numel() // len(parameter)
                parameter.normal_(0, 1 / math.sqrt(fan_in), generator=generator)
        return module

    return randomize


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """Standard normal numbers of a shape, in float64."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    return draw


@pytest.fixture
def error() -> Callable[[Tensor, Tensor], float]:
    """The largest difference, relative to the largest value expected."""

    def largest(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        return ((found - expected).abs().max() / expected.abs().max()).item()

    return largest


@pytest.fixture
def z_score() -> Callable[[object, float], float]:
    """How many standard errors the mean of independent samples lies from what theory says."""

    def score(samples: object, expected: float) -> float:
        values = np.asarray(samples, dtype=float)
        standard_error = values.std(ddof=1) / math.sqrt(len(values))
        return abs(values.mean() - expected) / standard_error

    return score


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    plt.close("all")
