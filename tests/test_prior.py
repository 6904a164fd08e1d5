"""The prior for whole images: a score that is a gradient, exact invariances, and a guarded door."""

import math

import numpy as np
import pytest
import torch

from patchscore.errors import InputError
from patchscore.priors import patches
from patchscore.priors.energy import PatchEnergy
from patchscore.priors.mlp import PatchMLP
from patchscore.priors.patches import PatchGrid
from patchscore.priors.prior import PatchPrior

INVARIANCES = ("scale_invariant", "brightness_invariant", "flip_invariant", "turn_invariant")
ALL_OFF = dict.fromkeys(INVARIANCES, False)
BOUNDARIES = ["symmetric", "periodic", "open"]
SIGMA = torch.tensor([0.375, 1.75], dtype=torch.float64)  # exact in float32 too
# Identities hold to 1e-10. A broken one is off by the size of the thing itself; ten thousand times the
# tolerance is taken as proof.
BROKEN = 1e-6


def energy_network(patch_size=4, channels=1, **settings):
    return PatchEnergy(patch_size, channels, width=16, depth=2, **settings)


def mlp_network(patch_size=4, channels=1, **settings):
    return PatchMLP(patch_size, channels, widths=(16, 24, 16), tanh_layers=1, **settings)


networks = pytest.mark.parametrize("build", [energy_network, mlp_network])
assemblies = pytest.mark.parametrize(
    ("assembly", "boundary"),
    [("sum", b) for b in BOUNDARIES] + [("mean", b) for b in BOUNDARIES],
)


# The score is a gradient


@pytest.mark.parametrize(
    ("assembly", "boundary"),
    [
        ("sum", "symmetric"),
        ("sum", "periodic"),
        ("sum", "open"),
        ("mean", "symmetric"),
        ("mean", "periodic"),
    ],
)
@pytest.mark.parametrize("patch_size", [2, 3, 4, 5])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("settings", [{}, ALL_OFF, {"flip_invariant": False}])
def test_score_is_the_gradient_of_log_prob(
    assembly, boundary, patch_size, channels, settings, randomized, normal, error
):
    network = randomized(energy_network(patch_size, channels, **settings))
    prior = PatchPrior(network, assembly=assembly, boundary=boundary)
    for shape in ((7, 8), (5, 5)):
        x = normal(2, channels, *shape).requires_grad_()
        (gradient,) = torch.autograd.grad(prior.log_prob(x, SIGMA).sum(), x)
        assert error(prior.score(x.detach(), SIGMA), gradient) < 1e-10


def test_log_prob_by_mean_is_that_by_sum_over_the_patch_size_squared(randomized, normal, error):
    network = randomized(energy_network(4))
    x = normal(2, 1, 7, 8)
    for boundary in ("symmetric", "periodic"):
        summed, mean = (
            PatchPrior(network, assembly=assembly, boundary=boundary).log_prob(x, SIGMA)
            for assembly in ("sum", "mean")
        )
        assert error(mean, summed / 16) < 1e-10


def test_log_prob_is_minus_the_energy_of_every_patch(randomized, normal, error):
    network = randomized(energy_network(3))
    x = normal(2, 1, 6, 7)
    found = PatchPrior(network, boundary="open").log_prob(x, SIGMA)
    cut = [x[:, 0, top : top + 3, left : left + 3].flatten(1) for top in range(4) for left in range(5)]
    energy = network.energy(torch.stack(cut, dim=2), SIGMA[:, None, None])
    assert error(found, -energy.sum(1)) < 1e-10


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("patch_size", [3, 4])
@pytest.mark.parametrize("build", [energy_network, mlp_network])
def test_jacobian_of_the_score(build, boundary, patch_size, randomized, normal):
    """Symmetric for a potential (a Hessian); not for the unconstrained map."""
    prior = PatchPrior(randomized(build(patch_size)), boundary=boundary)
    x = normal(1, 1, 6, 5)
    jacobian = torch.autograd.functional.jacobian(lambda x: prior.score(x, 0.8), x).view(30, 30)
    asymmetry = ((jacobian - jacobian.T).norm() / jacobian.norm()).item()
    if build is energy_network:
        assert asymmetry < 1e-10
    else:
        assert asymmetry > BROKEN


# Denoising


@networks
@assemblies
def test_tweedie(build, assembly, boundary, randomized, normal, error):
    prior = PatchPrior(randomized(build()), assembly=assembly, boundary=boundary)
    x = normal(2, 1, 6, 7)
    expected = torch.stack([x[i] + SIGMA[i] ** 2 * prior.score(x, SIGMA)[i] for i in range(2)])
    assert error(prior.denoise(x, SIGMA), expected) < 1e-10
    assert error(prior(x, SIGMA), expected) < 1e-10


@networks
@assemblies
def test_a_batch_is_as_its_images_one_by_one(build, assembly, boundary, randomized, normal, error):
    prior = PatchPrior(randomized(build()), assembly=assembly, boundary=boundary)
    x = normal(2, 1, 6, 7)
    together = prior.denoise(x, SIGMA)
    for i, sigma in enumerate(SIGMA.tolist()):
        for level in (sigma, torch.tensor(sigma), np.float64(sigma), SIGMA[i], SIGMA[i : i + 1]):
            assert error(prior.denoise(x[i : i + 1], level), together[i : i + 1]) < 1e-10
    one_level = prior.denoise(x, 0.375)
    assert error(one_level[:1], together[:1]) < 1e-10
    assert error(one_level, prior.denoise(x, torch.tensor([0.375, 0.375]))) < 1e-10


TRANSFORMS = {
    "rows": lambda a: a.flip(-2),
    "columns": lambda a: a.flip(-1),
    "quarter turn": lambda a: a.rot90(1, (-2, -1)),
    "three quarters": lambda a: a.rot90(3, (-2, -1)),
}


def violations(prior, x, error):
    """For each invariance: how far the denoiser is from having it."""
    clean = prior.denoise(x, SIGMA)
    change = clean - x

    def commutes(name):
        transform = TRANSFORMS[name]
        found = prior.denoise(transform(x), SIGMA) - transform(x)
        return error(found, transform(change))

    return {
        "scale_invariant": max(
            error(prior.denoise(a * x, a * SIGMA) - a * x, a * change) for a in (1e-3, 7.0, 1e4)
        ),
        "brightness_invariant": error(prior.denoise(x + 5, SIGMA) - (x + 5), change),
        "flip_invariant": max(commutes("rows"), commutes("columns")),
        "turn_invariant": max(commutes("quarter turn"), commutes("three quarters")),
    }


@networks
@assemblies
@pytest.mark.parametrize(("patch_size", "channels"), [(3, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize("switched_off", [None, *INVARIANCES])
def test_denoising_keeps_the_invariances(
    build, assembly, boundary, patch_size, channels, switched_off, randomized, normal, error
):
    settings = {} if switched_off is None else {switched_off: False}
    network = randomized(build(patch_size, channels, **settings))
    prior = PatchPrior(network, assembly=assembly, boundary=boundary)
    for name, violation in violations(prior, normal(2, channels, 6, 9), error).items():
        if name == switched_off:
            assert violation > BROKEN, name
        else:
            assert violation < 1e-10, name


def test_log_prob_does_not_depend_on_the_unit_or_the_brightness(randomized, normal, error):
    prior = PatchPrior(randomized(energy_network()))
    x = normal(2, 1, 6, 7)
    expected = prior.log_prob(x, SIGMA)
    assert error(prior.log_prob(7 * x + 3, 7 * SIGMA), expected) < 1e-10


@networks
@assemblies
def test_tiles_do_not_show_in_float32(build, assembly, boundary, normal, error, randomized, monkeypatch):
    prior = PatchPrior(randomized(build(8)).float(), assembly=assembly, boundary=boundary)
    x = normal(2, 1, 40, 33).float()
    monkeypatch.setattr(patches, "PATCHES_PER_TILE_CPU", 10**9)
    whole = prior.score(x, SIGMA)
    for limit in (1, 100, 1500):
        monkeypatch.setattr(patches, "PATCHES_PER_TILE_CPU", limit)
        assert error(prior.score(x, SIGMA), whole) < 1e-6


@networks
@pytest.mark.parametrize("patch_size", [3, 4])
def test_interior_pixels_have_all_their_cliques(build, patch_size, randomized, normal, error):
    network = randomized(build(patch_size))
    prior = PatchPrior(network, boundary="open")
    x = normal(1, 1, 9, 11)
    overlap = PatchGrid((9, 11), network.patch_shape, "open").overlap(x)
    inside = prior.interior(overlap)
    assert (inside == patch_size**2).all()
    assert inside.numel() == (overlap == patch_size**2).sum()
    # there the score knows nothing of the boundary
    expected = prior.interior(prior.score(x, 0.7))
    for boundary in ("symmetric", "periodic"):
        other = prior.with_boundary(boundary)
        assert error(prior.interior(other.score(x, 0.7)), expected) < 1e-10
        assert other.interior(x) is x
    assert PatchPrior(network, assembly="mean", boundary="open").interior(x) is x


def test_with_boundary_shares_the_weights(randomized, normal, error):
    prior = PatchPrior(randomized(energy_network()), card={"name": "a"})
    other = prior.with_boundary("periodic")
    x = normal(1, 1, 6, 7)
    with torch.no_grad():
        prior.network.readout *= 3
    expected = PatchPrior(prior.network, boundary="periodic").score(x, 1.0)
    assert error(other.score(x, 1.0), expected) == 0
    assert (other.boundary, other.assembly, other.card) == ("periodic", "sum", {"name": "a"})


# The door


X = torch.zeros(2, 1, 6, 7)


@pytest.mark.parametrize("method", ["score", "denoise", "log_prob"])
@pytest.mark.parametrize(
    ("x", "sigma", "message"),
    [
        (X[0, 0], 1.0, r"x has shape \(6, 7\); expected \(B, C, H, W\).*x\[None, None\]"),
        (X[0], 1.0, r"x has shape \(1, 6, 7\); expected"),
        (X.expand(2, 3, 6, 7), 1.0, r"x has 3 channels and the prior 1; .*each channel by itself"),
        (X.double(), 1.0, r"x is torch.float64 on cpu and the prior torch.float32 on cpu; move"),
        (X.int(), 1.0, r"x is torch.int32 on cpu and the prior torch.float32"),
        (X.half(), 1.0, r"x is torch.float16 on cpu and the prior torch.float32"),
        (X.to("meta"), 1.0, r"x is torch.float32 on meta and the prior torch.float32 on cpu; move"),
        (X, 0.0, r"sigma is 0.0; a noise level is positive and finite, in the image's unit"),
        (X, -1, r"sigma is -1.0; a noise level is positive"),
        (X, math.nan, r"sigma is nan; a noise level is positive"),
        (X, math.inf, r"sigma is inf; a noise level is positive"),
        (X, torch.tensor([1.0, 0.0]), r"sigma is \[1.0, 0.0\]; a noise level is positive"),
        (X, torch.ones(3), r"sigma has shape \(3,\); expected one number, or one for .* 2 images"),
        (X, torch.ones(2, 1), r"sigma has shape \(2, 1\); expected one number"),
    ],
)
def test_input_that_cannot_be_used(method, x, sigma, message):
    prior = PatchPrior(energy_network(3))
    with pytest.raises(InputError, match=message):
        getattr(prior, method)(x, sigma)


def test_an_open_boundary_needs_a_whole_patch():
    prior = PatchPrior(energy_network(3), boundary="open")
    for x in (X[:, :, :2], X[..., :2]):
        with pytest.raises(InputError, match=r"smaller than one patch of 3 x 3; use a larger image"):
            prior.score(x, 1.0)


def test_log_prob_needs_a_potential():
    prior = PatchPrior(mlp_network(3))
    assert not prior.has_potential
    assert PatchPrior(energy_network(3)).has_potential
    with pytest.raises(InputError, match=r"PatchMLP has no potential, so there is no log_prob"):
        prior.log_prob(X, 1.0)


def test_log_prob_of_the_mean_needs_a_border_with_all_cliques(randomized, normal, error):
    """By the mean over an open boundary the score is no gradient: its Jacobian is not symmetric."""
    prior = PatchPrior(randomized(energy_network(3)), assembly="mean", boundary="open")
    with pytest.raises(InputError, match=r"mean over an open boundary is not the gradient"):
        prior.log_prob(normal(1, 1, 6, 7), 1.0)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: prior.score(x, 0.8), normal(1, 1, 6, 5)
    ).view(30, 30)
    assert error(jacobian, jacobian.T) > BROKEN


@pytest.mark.parametrize(
    ("trained_on", "right", "wrong"), [("patches", "mean", "sum"), ("crops", "sum", "mean")]
)
def test_training_decides_the_assembly(trained_on, right, wrong):
    network = energy_network(3)
    network.trained_on = trained_on
    assert PatchPrior(network, assembly=right).assembly == right
    with pytest.raises(
        InputError, match=rf"trained on {trained_on}, .*assembled by '{right}'.*, not by '{wrong}'"
    ):
        PatchPrior(network, assembly=wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"assembly": "average"}, r"assembly is 'average'; choose one of \('sum', 'mean', 'center'"),
        ({"boundary": "reflect"}, r"boundary is 'reflect'; choose one of \('symmetric'"),
    ],
)
def test_unknown_names(settings, message):
    with pytest.raises(InputError, match=message):
        PatchPrior(energy_network(3), **settings)
