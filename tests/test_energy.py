"""The convolutional potential against its definition on patches, and its invariances."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import patchscore as ps
from patchscore.errors import InputError
from patchscore.priors.energy import ConvEnergy
from patchscore.priors.engines import layers
from patchscore.priors.patches import PatchGrid
from patchscore.priors.prior import PatchPrior

BOUNDARIES = ["symmetric", "periodic", "open"]
SIGMA = torch.tensor([0.4, 1.7], dtype=torch.float64)
boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)


def network(channels=1, **settings):
    return ConvEnergy((5, 3, 3), (1, 2, 1), channels, width=16, **settings)


@pytest.fixture(params=[2**20, 40 * 16], ids=["one tile", "tiles"])
def tiled(request, monkeypatch):
    monkeypatch.setattr(layers, "UNITS_PER_TILE_CPU", request.param)


@pytest.mark.usefixtures("tiled")
@boundaries
@pytest.mark.parametrize("channels", [1, 3])
def test_the_field_is_the_sum_over_patches(boundary, channels, randomized, normal, error):
    """sum_c phi(G_c x) and its gradient, from patches that are cut one by one."""
    clique = randomized(network(channels))
    prior = PatchPrior(clique, boundary=boundary)
    x = normal(2, channels, 14, 17)
    grid = PatchGrid((14, 17), clique.patch_shape, boundary)
    patches, levels = grid.extract(x), SIGMA[:, None, None]
    assert error(prior.log_prob(x, SIGMA), -clique.energy(patches, levels).sum(1)) < 1e-10
    assert error(prior.score(x, SIGMA), grid.assemble(clique.score(patches, levels))) < 1e-10


@pytest.mark.usefixtures("tiled")
@boundaries
def test_the_score_is_the_gradient_of_the_log_density(boundary, randomized, normal, error):
    prior = PatchPrior(randomized(network()), boundary=boundary)
    x = normal(2, 1, 13, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.log_prob(x, SIGMA).sum(), x)
    assert error(prior.score(x.detach(), SIGMA), gradient) < 1e-10


def test_the_patch_is_one_pass_of_valid_convolutions(randomized, normal, error):
    """phi from sums over places, layer by layer, without a convolution."""
    clique = randomized(network(2))
    assert clique.patch_shape == (11, 11)
    v = normal(1, 2 * 11**2, 1)
    z = v.view(2, 11, 11) / 0.4
    for kernel, bias, d in zip(clique.kernels(), clique.biases, clique.dilations, strict=True):
        side = kernel.shape[-1]
        size = z.shape[-1] - d * (side - 1)
        h = sum(
            torch.einsum("oi,ihw->ohw", kernel[:, :, a, b], z[:, d * a :, d * b :][:, :size, :size])
            for a in range(side)
            for b in range(side)
        )
        z = F.gelu(h + bias.repeat_interleave(8)[:, None, None])
    phi = clique.readout.repeat_interleave(8) @ z.flatten()
    assert error(clique.energy(v, SIGMA[:1, None, None]).flatten(), phi[None]) < 1e-10


@pytest.mark.parametrize("channels", [1, 3])
@boundaries
def test_invariances(boundary, channels, randomized, normal, error):
    prior = PatchPrior(randomized(network(channels)), boundary=boundary)
    x = normal(2, channels, 15, 12)
    s = prior.score(x, SIGMA)
    assert error(30 * prior.score(30 * x, 30 * SIGMA), s) < 1e-10
    assert error(prior.score(x + 5, SIGMA), s) < 1e-10
    for act in (lambda a: a.flip(-1), lambda a: a.flip(-2), lambda a: a.rot90(1, (-2, -1))):
        assert error(prior.score(act(x), SIGMA), act(s)) < 1e-10
        assert error(prior.log_prob(act(x), SIGMA), prior.log_prob(x, SIGMA)) < 1e-10


def test_on_a_torus_the_prior_is_stationary(randomized, normal, error):
    prior = PatchPrior(randomized(network()), boundary="periodic")
    x = normal(2, 1, 15, 12)
    shifted = prior.score(x.roll((4, -3), (2, 3)), SIGMA)
    assert error(shifted, prior.score(x, SIGMA).roll((4, -3), (2, 3))) < 1e-10


def test_symmetric_is_a_quarter_of_the_doubled_torus(randomized, normal, error):
    clique = randomized(network())
    x = normal(2, 1, 12, 15)
    doubled = torch.cat([x, x.flip(-1)], -1)
    doubled = torch.cat([doubled, doubled.flip(-2)], -2)
    energy = PatchPrior(clique, boundary="periodic").log_prob(doubled, SIGMA)
    assert error(PatchPrior(clique).log_prob(x, SIGMA), energy / 4) < 1e-10


def test_images_of_a_batch_do_not_see_each_other(randomized, normal, error):
    prior = PatchPrior(randomized(network()))
    x = normal(2, 1, 12, 15)
    together = prior.score(x, SIGMA)
    for image in (0, 1):
        assert (
            error(together[image : image + 1], prior.score(x[image : image + 1], SIGMA[image])) < 1e-10
        )


@pytest.mark.parametrize(("channels", "width", "sides"), [(1, 64, (7, 3, 3)), (3, 16, (3,))])
def test_parameters(channels, width, sides):
    """A filter per group, and k^2 width weights for each group of every layer above."""
    clique = ConvEnergy(sides, range(1, len(sides) + 1), channels, width)
    groups = width // 8
    weights = sides[0] ** 2 * channels + width * sum(side**2 for side in sides[1:])
    expected = groups * (weights + len(sides) + 1)
    assert sum(p.numel() for p in clique.parameters()) == expected


def test_saved_and_loaded(randomized, normal, tmp_path):
    prior = PatchPrior(randomized(network(3)), card={"name": "here"})
    prior.network.trained_on = "crops"
    prior.save(tmp_path / "prior.safetensors")
    again = PatchPrior.load(tmp_path / "prior.safetensors")
    x = normal(1, 3, 11, 14)
    assert again.network.settings() == prior.network.settings()
    assert torch.equal(again.score(x, 0.3), prior.score(x, 0.3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((7, 3), (1,)), r"sides is \[7, 3\] and dilations \[1\]; expected one of each for every layer"),
        (((7, 3), (2, 1)), r"a dilation of 1 in the first"),
        (((7, 4), (1, 1)), r"sides is \[7, 4\] .* odd sides after the first"),
        (((7, 3), (1, 0)), r"dilations \[1, 0\]; expected positive numbers"),
        (((7,), (1,), 1, 12), r"width is 12 with 1 channels; .* multiple of 8"),
        (((7,), (1,), 0, 16), r"width is 16 with 0 channels"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        ConvEnergy(*arguments)


@pytest.mark.parametrize(
    ("name", "log_prob", "norm", "ramp"),
    [
        ("perceptron", 13.949768600176121, 2.142903240672191, 4.822307895805677),
        ("convolutional", -3.0336097672085964, 7.540861787335133, -0.1562156223547272),
    ],
)
def test_old_files_give_the_old_numbers(name, log_prob, norm, ramp, error):
    """Files and float64 numbers of the commit before both networks became one class, for colour."""
    prior = PatchPrior.load(Path(__file__).with_name("data") / f"old_{name}.safetensors")
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 7, 8))).float()
    score = prior.requires_grad_(False).score(x, 0.7).double()
    projected = score.flatten() @ torch.linspace(-1, 1, x.numel(), dtype=torch.float64)
    found = torch.stack([prior.log_prob(x, 0.7)[0].double(), score.norm(), projected])
    expected = torch.tensor([log_prob, norm, ramp], dtype=torch.float64)
    assert error(found, expected) < 1e-6


@boundaries
@pytest.mark.parametrize(("offsets", "broken"), [("each", False), ("common", True)])
def test_an_offset_of_each_channel(boundary, offsets, broken, randomized, normal, error):
    prior = PatchPrior(randomized(network(3, offsets=offsets)), boundary=boundary)
    x = normal(2, 3, 13, 12)
    moved = error(prior.score(x + normal(2, 3, 1, 1, seed=1), SIGMA), prior.score(x, SIGMA))
    assert moved > 1e-6 if broken else moved < 1e-10
    assert error(prior.score(x + 5, SIGMA), prior.score(x, SIGMA)) < 1e-10


@pytest.mark.parametrize("offsets", ["each", "common"])
def test_a_bright_image_keeps_its_digits(offsets, randomized, normal, error):
    """The mean of a tile is taken off first, so float32 rounds what is left, not the brightness."""
    clique = randomized(network(3, offsets=offsets)).float()  # with gradients: PyTorch's own engine
    x = (normal(2, 3, 15, 12) * 2**10).round().float() / 2**10
    dark, bright = (clique.field_score(x + c, SIGMA.float(), "open").detach() for c in (0, 4096))
    assert error(bright, dark) < 1e-5


def test_no_tf32_in_convolutions_and_products(randomized, normal, monkeypatch):
    """On a GPU it would cost 1e-2 of the score; what the caller has set is there again afterwards."""
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")

    def spy(function):
        def call(*arguments, **settings):
            seen.append((cudnn.allow_tf32, torch.get_float32_matmul_precision()))
            return function(*arguments, **settings)

        return call

    for function in ("conv2d", "linear"):
        monkeypatch.setattr(F, function, spy(getattr(F, function)))
    try:
        prior = PatchPrior(randomized(ConvEnergy((3, 1, 3), (1, 1, 2), width=8)))
        prior.score(normal(2, 1, 9, 9), SIGMA)
        prior.log_prob(normal(2, 1, 9, 9), SIGMA)
        assert set(seen) == {(False, "highest")}
        assert len(seen) >= 6
        assert (cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (True, "high")
    finally:
        torch.set_float32_matmul_precision(before)


@boundaries
def test_no_score_waits_for_the_device(boundary):
    """On the device "meta" there are no numbers, so whatever looks at one raises an error."""
    x, sigma = torch.empty(2, 3, 14, 15, device="meta"), torch.ones(2, device="meta")
    for clique in (network(3), ps.PatchEnergy(4, 3, 16, scale_invariant=False)):
        prior = PatchPrior(clique.to("meta"), boundary=boundary)
        assert prior.denoise(x, sigma).shape == x.shape
        assert prior.log_prob(x, sigma).shape == (2,)


def test_the_printed_form():
    assert repr(ConvEnergy()) == "ConvEnergy(reach 17 x 17, 9,640 parameters)"
    assert repr(ps.PatchEnergy(4, 3, 16)) == "ConvEnergy(reach 4 x 4, 3 channels, 134 parameters)"
