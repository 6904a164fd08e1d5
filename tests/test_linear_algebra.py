from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from patchscore.linear_algebra import conjugate_gradients

N = 24


@pytest.fixture
def system(normal) -> tuple[Tensor, Tensor, Tensor]:
    """A positive definite matrix with five eigenvalues, three right-hand sides, and the solutions."""
    axes, _ = torch.linalg.qr(normal(N, N))
    eigenvalues = torch.tensor([1.0, 3.0, 10.0, 40.0, 100.0]).double().repeat(5)[:N]
    matrix = axes * eigenvalues @ axes.T
    right = normal(3, N, seed=1) * torch.tensor([1e-3, 1.0, 1e3]).double()[:, None]
    return matrix, right, torch.linalg.solve(matrix, right.T).T


def test_it_is_done_in_as_many_steps_as_there_are_eigenvalues(system, error) -> None:
    matrix, right, exact = system
    solved = conjugate_gradients(lambda x: x @ matrix, right, tolerance=1e-10)
    assert solved.steps == 5
    assert solved.converged
    for found, expected in zip(solved.x, exact, strict=True):
        assert error(found, expected) < 1e-8  # the tolerance times the condition number


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-6])
def test_it_stops_at_the_tolerance_and_tells_the_residual(system, tolerance: float) -> None:
    matrix, right, _ = system
    applied = []

    def left(x: Tensor) -> Tensor:
        applied.append(x)
        return x @ matrix

    solved = conjugate_gradients(left, right, tolerance=tolerance)
    residual = (right - solved.x @ matrix).norm(dim=1) / right.norm(dim=1)
    assert solved.steps == len(applied)
    assert bool((residual <= tolerance * (1 + 1e-9)).all())
    assert (residual - solved.residual).abs().max() < 1e-10
    if tolerance > 1e-6:  # one step less is not enough
        fewer = conjugate_gradients(left, right, tolerance=tolerance, max_steps=solved.steps - 1)
        assert not fewer.converged
        assert fewer.residual.max() > tolerance


def test_without_enough_steps_it_tells_how_far_it_came(system) -> None:
    matrix, right, exact = system
    solved = conjugate_gradients(lambda x: x @ matrix, right, max_steps=3)
    assert (solved.steps, solved.converged) == (3, False)
    residual = (right - solved.x @ matrix).norm(dim=1) / right.norm(dim=1)
    assert (residual - solved.residual).abs().max() < 1e-10

    def energy(x: Tensor) -> Tensor:
        return (x @ matrix * x).sum(1)

    # Chebyshev's bound of the error in the energy norm.
    rate = (math.sqrt(100) - 1) / (math.sqrt(100) + 1)
    assert bool((energy(solved.x - exact) <= (2 * rate**3) ** 2 * energy(exact)).all())


def test_nothing_is_solved_by_nothing(system) -> None:
    matrix, right, _ = system
    right[1] = 0
    solved = conjugate_gradients(lambda x: x @ matrix, right)
    assert solved.converged
    assert bool((solved.x[1] == 0).all())


def test_a_map_that_is_not_finite_ends_at_once(system) -> None:
    _, right, _ = system
    solved = conjugate_gradients(lambda x: x * math.nan, right)
    assert (solved.steps, solved.converged) == (1, False)


def test_single_precision_converges_to_its_rounding(system, error) -> None:
    matrix, right, exact = system
    solved = conjugate_gradients(lambda x: x @ matrix.float(), right.float(), tolerance=0.0)
    assert solved.converged
    for found, expected in zip(solved.x, exact, strict=True):
        assert error(found.double(), expected) < 100 * 10 * torch.finfo(torch.float32).eps
