"""The optimiser against Adam where they agree, and for the symmetry that Adam lacks."""

import numpy as np
import pytest
import torch

import patchscore as ps
from patchscore.errors import InputError
from patchscore.learning.soap import SOAP
from patchscore.priors.energy import ConvEnergy


def descend(optimizer, weight, gradient, steps):
    for _ in range(steps):
        weight.grad = gradient(weight.detach())
        optimizer.step()
    return weight.detach()


def test_of_numbers_it_is_adam_one_step_late(normal, error):
    """An axis of length one has no other basis, and the first gradient only finds the basis."""
    numbers = normal(5)
    target = normal(5, seed=1)
    late = [torch.nn.Parameter(number.view(1, 1)) for number in numbers.clone()]
    for weight, goal in zip(late, target, strict=True):
        descend(SOAP([weight], lr=0.1), weight, lambda w, goal=goal: (w - goal) ** 3, 31)
    adam = torch.nn.Parameter(numbers.clone())
    descend(torch.optim.Adam([adam], lr=0.1, betas=(0.9, 0.99)), adam, lambda w: (w - target) ** 3, 30)
    assert error(torch.cat(late).flatten().detach(), adam.detach()) < 1e-10


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_it_does_not_see_how_the_axes_are_turned(shape, normal, error):
    """A problem in turned coordinates has the turned path, where gradients leave no basis open."""
    turns = [torch.linalg.qr(normal(n, n, seed=n))[0] for n in shape]
    curvature = normal(*shape, seed=9).square()

    def turned(w, matrices):
        for matrix in matrices:
            w = torch.tensordot(w, matrix, dims=([0], [1]))
        return w

    def gradient(w):
        return curvature * w + w**3

    backs = [turn.T for turn in turns]
    start = normal(*shape)
    plain = torch.nn.Parameter(start.clone())
    other = torch.nn.Parameter(turned(start, turns))
    descend(SOAP([plain], lr=0.05), plain, gradient, 35)
    descend(SOAP([other], lr=0.05), other, lambda w: turned(gradient(turned(w, backs)), turns), 35)
    assert error(turned(other.detach(), backs), plain.detach()) < 1e-8


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.random((3, 24, 24))

    def run(steps_before_a_stop, checkpoint):
        torch.manual_seed(0)
        prior = ps.PatchPrior(ConvEnergy((3, 3), (1, 1), width=8))
        calls = 0

        def stopping(prior, clean, sigma, *, generator):
            nonlocal calls
            calls += 1
            if calls > steps_before_a_stop:
                raise KeyboardInterrupt
            return (sigma[0] * prior.score(clean, sigma) + 1).square().mean()

        ps.fit(
            prior,
            images,
            sigmas=(0.1, 0.3),
            crop=12,
            boundary="symmetric",
            steps=25,
            batch_size=2,
            objective=stopping,
            optimizer="soap",
            checkpoint=checkpoint,
            checkpoint_every=13,
            progress=False,
        )
        return prior

    whole = run(25, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(20, tmp_path / "stopped")
    resumed = run(12, tmp_path / "stopped")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_unknown_optimizer():
    prior = ps.PatchPrior(ConvEnergy((3,), (1,), width=8))
    with pytest.raises(InputError, match=r"optimizer is 'sgd'; choose one of \('adam', 'soap'\)"):
        ps.fit(prior, np.eye(20), sigmas=(0.1, 0.3), crop=9, steps=1, optimizer="sgd")
