"""The engine of the CPU against the definition on patches: every shape, boundary and noise level."""

from __future__ import annotations

import resource
import sys

import numpy as np
import pytest
import torch
from skimage.data import camera, moon
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import patchscore as ps
from patchscore.priors.energy import ConvEnergy, PatchEnergy
from patchscore.priors.engines import cpu
from patchscore.priors.patches import PatchGrid
from patchscore.priors.prior import PatchPrior

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
CLIQUES = {
    "convolutional": lambda channels: ConvEnergy((5, 3, 3), (1, 2, 1), channels, width=16),
    "one layer": lambda channels: ConvEnergy((5,), (1,), channels, width=16),
    "odd patches": lambda channels: PatchEnergy(7, channels, width=32),
    "even patches": lambda channels: PatchEnergy(4, channels, width=16, depth=3),
    "without symmetry": lambda channels: PatchEnergy(
        5, channels, width=17, depth=1, flip_invariant=False, turn_invariant=False
    ),
}
BOUNDARIES = ["symmetric", "periodic", "open"]
cliques = pytest.mark.parametrize("name", CLIQUES)
boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)
needs_bfloat16 = pytest.mark.skipif(not cpu.has_bfloat16(), reason="needs products in bfloat16")


class Allocations(TorchDispatchMode):
    """The numbers of elements of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for _, storage in self.storages(args)}
        self.sizes += [
            storage.nbytes() // tensor.element_size()
            for tensor, storage in self.storages(result)
            if storage.data_ptr() not in given
        ]
        return result

    @staticmethod
    def storages(values):
        tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
        return [(tensor, tensor.untyped_storage()) for tensor in tensors]


def by_definition(clique, x, sigma, boundary):
    """sum_c w_c G_c' s_V(G_c x; sigma) in float64, from all patches at once."""
    grid = PatchGrid(x.shape[-2:], clique.patch_shape, boundary)
    weights = grid.weights(x.double())
    scores = clique.double().score(grid.extract(x.double()), sigma.double()[:, None, None])
    return grid.assemble(scores if weights is None else scores * weights.flatten())


@pytest.fixture(params=[2**21, 900], ids=["one tile", "tiles"])
def tiled(request, monkeypatch):
    monkeypatch.setattr(cpu, "UNITS_PER_TILE", request.param)


@pytest.mark.usefixtures("tiled")
@cliques
@boundaries
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("extra", [(0, 0), (0, 9), (13, 0), (12, 17)], ids=str)
def test_equals_the_definition(name, boundary, channels, extra, randomized, normal, error):
    """From one patch, one row and one column of patches to odd sizes, each image at its own sigma."""
    clique = randomized(CLIQUES[name](channels))
    shape = (side + more for side, more in zip(clique.patch_shape, extra, strict=True))
    x = 20 * normal(3, channels, *shape).float() + 100
    sigma = torch.tensor([5.0, 20.0, 90.0])
    expected = by_definition(clique, x, sigma, boundary)
    prior = PatchPrior(clique.float().requires_grad_(False), boundary=boundary)
    assert error(prior.score(x, sigma).double(), expected) < 1e-5


@cliques
def test_the_engine_is_what_runs(name, monkeypatch, normal):
    """For float32 images, unless a gradient is asked for; float64 goes by the definition."""
    calls = []
    monkeypatch.setattr(cpu, "field_score", lambda layers, x, *_: calls.append(x.dtype) or x)
    prior = PatchPrior(CLIQUES[name](1))
    x = normal(1, 1, 20, 20).float()
    with torch.no_grad():
        prior.score(x, 0.5)
    assert calls == [torch.float32]
    prior.requires_grad_(False).score(x, 0.5)
    assert len(calls) == 2

    prior.score(x.requires_grad_(), 0.5)
    prior.requires_grad_().score(x.detach(), 0.5)
    prior.double().requires_grad_(False).score(x.detach().double(), 0.5)
    assert len(calls) == 2


def test_a_gradient_goes_through_the_definition(normal):
    clique = CLIQUES["convolutional"](1)
    torch.nn.init.normal_(clique.readout)
    PatchPrior(clique).score(normal(1, 1, 14, 14).float(), 0.5).square().sum().backward()
    assert all(parameter.grad is not None for parameter in clique.parameters())


@cliques
def test_nothing_larger_than_a_tile_is_made(name, monkeypatch, normal):
    """Beyond the score itself: no padded copy of the image, and patches are never all in memory."""
    monkeypatch.setattr(cpu, "UNITS_PER_TILE", 2**14)
    monkeypatch.setattr(cpu, "KEPT_BYTES", 1)
    clique = CLIQUES[name](1).requires_grad_(False)
    x = normal(2, 1, 200, 180).float()
    layers = clique.layers()
    with Allocations() as made:
        cpu.field_score(layers, x, torch.ones(2), "symmetric")
    cliques = 2**14 // len(layers.readout)
    rim = (cliques**0.5 + 2 * clique.patch_shape[0] - 2) ** 2 / cliques
    largest = sorted(made.sizes)
    weights = 204 * 184 if name == "even patches" else 0
    assert largest[-1] == x.numel()
    assert largest[-2] < max(weights, rim * 2**14)
    assert sum(size >= x.numel() for size in made.sizes) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the way in which glibc keeps memory")
def test_the_memory_of_a_tile_comes_back_to_the_next(normal):
    """A fresh page of 4096 bytes costs as much as 1000 products. A layer of a tile has 2000 of them."""
    prior = PatchPrior(ConvEnergy((5, 3), (1, 2), width=32).requires_grad_(False))
    x = normal(1, 1, 512, 512).float()
    fresh = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        prior.score(x, 0.5)
        fresh.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    score = x.numel() * x.element_size() // resource.getpagesize()
    assert min(fresh) <= 2 * score


@needs_bfloat16
@pytest.mark.parametrize("sigma", [15.0, 25.0, 50.0])
@pytest.mark.parametrize("photograph", [camera, moon])
def test_bfloat16_costs_next_to_nothing(photograph, sigma, normal):
    prior = ps.load_prior("natural-gray", device="cpu")
    clean = torch.from_numpy(photograph()[100:292, 150:342].astype(np.float32))[None, None]
    noisy = clean + sigma * normal(*clean.shape).float()
    exact, fast = (p.denoise(noisy, sigma) for p in (prior, prior.with_precision("bfloat16")))
    assert not torch.equal(exact, fast)
    losses = [10 * torch.log10((x - clean).square().mean()) for x in (fast, exact)]
    assert losses[0] - losses[1] < 0.005


@needs_bfloat16
def test_bfloat16_keeps_a_flat_image(randomized, normal):
    """Brightness is taken out before anything is rounded: in bfloat16, 999 is 1000."""
    prior = PatchPrior(randomized(CLIQUES["convolutional"](1)).float().requires_grad_(False))
    prior = prior.with_precision("bfloat16")
    flat = prior.score(torch.full((1, 1, 30, 30), 999.0), 1.0)
    noise = prior.score(normal(1, 1, 30, 30).float(), 1.0)
    assert flat.abs().max() < torch.finfo(torch.bfloat16).eps * noise.abs().max()


def test_without_bfloat16_nothing_changes(monkeypatch, randomized, normal):
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    prior = PatchPrior(randomized(CLIQUES["odd patches"](1)).float().requires_grad_(False))
    x = normal(1, 1, 20, 20).float()
    assert torch.equal(prior.with_precision("bfloat16").score(x, 0.5), prior.score(x, 0.5))


def test_an_unknown_precision():
    with pytest.raises(ps.InputError, match="precision is 'half'; choose one of"):
        PatchPrior(CLIQUES["odd patches"](1)).with_precision("half")
