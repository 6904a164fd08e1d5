"""The networks against their equations: invariances, gradients, dense and convolutional forms."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchscore.errors import InputError
from patchscore.priors.energy import PatchEnergy
from patchscore.priors.mlp import PatchMLP
from patchscore.priors.patches import PatchGrid
from patchscore.priors.prior import PatchPrior
from patchscore.priors.symmetry import Symmetry

INVARIANCES = ("scale_invariant", "brightness_invariant", "flip_invariant", "turn_invariant")
ALL_OFF = dict.fromkeys(INVARIANCES, False)
BOUNDARIES = ["symmetric", "periodic", "open"]
SIGMA = torch.tensor([0.4, 1.7], dtype=torch.float64)[:, None, None]
# Identities hold to 1e-10. A broken one is off by the size of the thing itself; ten thousand times the
# tolerance is taken as proof.
BROKEN = 1e-6


def energy_network(patch_size=4, channels=1, **settings):
    return PatchEnergy(patch_size, channels, width=16, depth=2, **settings)


def mlp_network(patch_size=4, channels=1, **settings):
    return PatchMLP(patch_size, channels, widths=(16, 24, 16), tanh_layers=1, **settings)


def matrices(network):
    """The plain matrices of either network."""
    if isinstance(network, PatchMLP):
        return network.matrices()
    return [kernel.flatten(1) for kernel in network.kernels()]


networks = pytest.mark.parametrize("build", [energy_network, mlp_network])


def image_transform(patch_size, channels, transform):
    """A transform of (..., P, P) arrays, acting on patches (B, n, L)."""

    def act(v):
        square = v.transpose(1, 2).unflatten(2, (channels, patch_size, patch_size))
        return transform(square).flatten(2).transpose(1, 2)

    return act


def violations(network, v, error):
    """For each invariance: how far s_V is from having it."""
    act = {
        name: image_transform(network.patch_shape[0], network.channels, transform)
        for name, transform in {
            "rows": lambda a: a.flip(-2),
            "columns": lambda a: a.flip(-1),
            "turn": lambda a: a.rot90(1, (-2, -1)),
        }.items()
    }
    s = network.score(v, SIGMA)
    flips = [error(network.score(act[name](v), SIGMA), act[name](s)) for name in ("rows", "columns")]
    return {
        "scale_invariant": error(30 * network.score(30 * v, 30 * SIGMA), s),
        "brightness_invariant": error(network.score(v + 5, SIGMA), s),
        "flip_invariant": max(flips),
        "turn_invariant": error(network.score(act["turn"](v), SIGMA), act["turn"](s)),
    }


@networks
@pytest.mark.parametrize("patch_size", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("switched_off", [None, *INVARIANCES])
def test_invariances_hold_and_can_be_switched_off(
    build, patch_size, channels, switched_off, randomized, normal, error
):
    settings = {} if switched_off is None else {switched_off: False}
    network = randomized(build(patch_size, channels, **settings))
    found = violations(network, normal(2, channels * patch_size**2, 6), error)
    for name, violation in found.items():
        if name == switched_off:
            assert violation > BROKEN, name
        else:
            assert violation < 1e-10, name


@pytest.mark.parametrize("switched_off", [None, *INVARIANCES])
def test_the_energy_is_invariant_too(switched_off, randomized, normal, error):
    settings = {} if switched_off is None else {switched_off: False}
    network = randomized(energy_network(3, 1, **settings))
    v = normal(2, 9, 6)
    flip, turn = (
        image_transform(3, 1, transform) for transform in (lambda a: a.flip(-1), lambda a: a.mT.flip(-1))
    )
    energy = network.energy(v, SIGMA)
    found = {
        "scale_invariant": network.energy(30 * v, 30 * SIGMA),
        "brightness_invariant": network.energy(v + 5, SIGMA),
        "flip_invariant": network.energy(flip(v), SIGMA),
        "turn_invariant": network.energy(turn(v), SIGMA),
    }
    for name, transformed in found.items():
        violation = error(transformed, energy)
        assert violation > BROKEN if name == switched_off else violation < 1e-10, name


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, ALL_OFF, {"scale_invariant": False}])
@pytest.mark.parametrize("channels", [1, 3])
def test_energy_score_is_the_gradient_of_minus_the_energy(
    depth, settings, channels, randomized, normal, error
):
    network = randomized(PatchEnergy(3, channels, width=16, depth=depth, **settings))
    v = normal(2, 9 * channels, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(-network.energy(v, SIGMA).sum(), v)
    assert error(network.score(v.detach(), SIGMA), gradient) < 1e-10


@networks
@pytest.mark.parametrize("settings", [{}, ALL_OFF])
def test_patches_of_a_batch_do_not_see_each_other(build, settings, randomized, normal, error):
    """The score of every patch is that of the patch alone, at its own image's noise level."""
    network = randomized(build(**settings))
    v = normal(2, 16, 5)
    together = network.score(v, SIGMA)
    for image, patch in itertools.product(range(2), range(5)):
        alone = network.score(v[image : image + 1, :, patch : patch + 1], SIGMA[image : image + 1])
        assert error(together[image : image + 1, :, patch : patch + 1], alone) < 1e-10


# Symmetry


@pytest.mark.parametrize("patch_size", [2, 3, 5])
@pytest.mark.parametrize(
    ("flips", "turns", "order"),
    [(False, False, 1), (True, False, 4), (False, True, 4), (True, True, 8)],
)
def test_order_of_the_group(patch_size, flips, turns, order):
    symmetry = Symmetry([patch_size, 1], flips=flips, turns=turns)
    assert symmetry.order == order
    assert symmetry.pixels(patch_size).shape == (order, patch_size**2)
    assert sorted(symmetry.quotient[0].tolist()) == list(range(order))


def test_the_group_is_that_of_the_whole_network():
    """Nothing turns in one pixel, but a layer that sees one place has the group of the others."""
    assert Symmetry([1, 1], flips=True, turns=True).order == 1
    assert Symmetry([1, 3], flips=True, turns=True).order == 8


@pytest.mark.parametrize(("flips", "turns"), [(True, False), (False, True), (True, True)])
def test_a_transformed_patch_permutes_the_units_of_a_group(flips, turns, normal, error):
    """z_{i,g}(k v) = z_{i,kg}(v), after the first layer and after a mixing layer, where the product is
    that of the permutations, pi_kg(p) = pi_k(pi_g(p))."""
    symmetry = Symmetry([3], flips=flips, turns=turns)
    order, pi = symmetry.order, symmetry.pixels(3).argsort(1)
    v = normal(2, 9, 1, seed=1)
    first = symmetry.lift(normal(4, 18), 3)
    second = symmetry.spread(normal(3, 4, order)).squeeze(2)
    numbers = {tuple(permutation): g for g, permutation in enumerate(pi.tolist())}
    for k, pi_k in enumerate(pi):
        kg = torch.tensor([numbers[tuple(pi_k[pi_g].tolist())] for pi_g in pi])
        z, z_k = (torch.tanh(first @ u.reshape(18, 1)) for u in (v, v[:, pi_k]))
        assert error(z_k, z.view(4, order, 1)[:, kg].flatten(0, 1)) < 1e-10, k
        h, h_k = second @ z, second @ z_k
        assert error(h_k, h.view(3, order, 1)[:, kg].flatten(0, 1)) < 1e-10, k


@networks
def test_rows_of_a_group_are_the_transforms_of_one_filter(build, randomized, normal, error):
    """The first matrix holds, for each filter, its eight flips and turns, less the mean."""
    network = randomized(build(3))
    first = matrices(network)[0].view(-1, 8, 3, 3)
    for filters, group in zip(network.lift.view(-1, 3, 3), first, strict=True):
        centred = filters - filters.mean()
        wanted = [t.rot90(k) for k in range(4) for t in (centred, centred.flip(0))]
        distances = torch.stack([(group - w).abs().amax((1, 2)) for w in wanted])
        nearest = distances.min(1)
        assert nearest.values.max() < 1e-10
        assert sorted(nearest.indices.tolist()) == list(range(8))


@pytest.mark.parametrize("filters", [1, 2, 3])
@pytest.mark.parametrize("brightness", [True, False])
def test_rank_of_the_first_matrix(filters, brightness, randomized):
    """The 3 x 3 patches are 3 A1 + B1 + B2 + 2 E of the group of the square (centre, edges, corners).

    The transforms of each filter reach one more A1, B1 and B2 and two more E, of dimension 2; removing
    the mean takes one A1 away.
    """
    network = randomized(PatchEnergy(3, 1, 8 * filters, brightness_invariant=brightness))
    first, second = matrices(network)
    rank = min(filters, 2 if brightness else 3) + 1 + 1 + 2 * 2
    assert first.shape == (8 * filters, 9)
    assert torch.linalg.matrix_rank(first) == rank
    assert torch.linalg.matrix_rank(second) == 8 * filters


@pytest.mark.parametrize(
    ("settings", "order"),
    [({}, 8), ({"flip_invariant": False}, 4), ({"turn_invariant": False}, 4), (ALL_OFF, 1)],
)
def test_tying_divides_the_number_of_parameters(settings, order):
    """lift n w / |G|, mix w^2 / |G| per layer, bias w / |G| per layer, read-out w / |G|."""
    network = PatchEnergy(5, 3, width=32, depth=3, **settings)
    expected = (75 * 32 + 2 * 32**2 + 3 * 32 + 32) // order
    if settings == ALL_OFF:
        expected += 32  # the weights of log sigma
    assert sum(p.numel() for p in network.parameters()) == expected


# Dense and convolutional forms


@networks
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("patch_size", "channels"), [(3, 1), (4, 1), (3, 3), (2, 3)])
@pytest.mark.parametrize("settings", [{}, ALL_OFF])
def test_the_prior_is_fold_of_the_network_of_unfold(
    build, boundary, patch_size, channels, settings, randomized, normal, error
):
    network = randomized(build(patch_size, channels, **settings))
    x = normal(2, channels, 7, 9)
    grid = PatchGrid((7, 9), network.patch_shape, boundary)
    v = F.unfold(grid.pad(x), patch_size)
    s = network.score(v, SIGMA) * clique_weights(grid).flatten()
    dense = grid.pad_adjoint(F.fold(s, grid.padded_shape, patch_size))
    found = PatchPrior(network, boundary=boundary).score(x, SIGMA.flatten())
    assert error(found, dense) < 1e-10


@networks
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("patch_size", "channels"), [(3, 1), (4, 1), (3, 3)])
def test_the_prior_is_a_convolution_then_1x1_convolutions_then_a_transposed_one(
    build, boundary, patch_size, channels, randomized, normal, error
):
    network = randomized(build(patch_size, channels))
    x, sigma = normal(2, channels, 7, 9), SIGMA[..., None]
    grid = PatchGrid((7, 9), network.patch_shape, boundary)
    first, *others = matrices(network)
    kernel = first.view(-1, channels, patch_size, patch_size)
    biases = [network.symmetry.pool(bias) for bias in network.biases]

    hidden = [F.conv2d(grid.pad(x) / sigma, kernel, biases[0])]
    if build is energy_network:
        for matrix, bias in zip(others, biases[1:], strict=True):
            hidden.append(F.conv2d(F.gelu(hidden[-1]), matrix[..., None, None], bias))
        force = network.symmetry.pool(network.readout)[:, None, None] * gelu_slope(hidden[-1])
        for matrix, h in zip(reversed(others), reversed(hidden[:-1]), strict=True):
            force = F.conv2d(force, matrix.T[..., None, None]) * gelu_slope(h)
        last, out = kernel, -force
    else:
        for matrix, bias in zip(others, biases[1:], strict=True):
            hidden.append(F.conv2d(F.leaky_relu(hidden[-1]), matrix[..., None, None], bias))
        last = network.symmetry.lift(network.project, patch_size).view(
            -1, channels, patch_size, patch_size
        )
        out = hidden[-1].tanh()
    score = grid.pad_adjoint(F.conv_transpose2d(clique_weights(grid) * out / sigma, last))
    found = PatchPrior(network, boundary=boundary).score(x, SIGMA.flatten())
    assert error(found, score) < 1e-10


def clique_weights(grid):
    """One, and a half for each side of the image on whose rim a clique of even side is centred."""
    weights = torch.ones(grid.shape, dtype=torch.float64)
    if grid.boundary == "symmetric" and grid.patch_shape[0] % 2 == 0:
        weights[[0, -1], :] /= 2
        weights[:, [0, -1]] /= 2
    return weights


def gelu_slope(h):
    """d/dh of h Phi(h): Phi(h) + h N(h; 0, 1)."""
    cumulative = 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return cumulative + h * torch.exp(-(h**2) / 2) / math.sqrt(2 * math.pi)


# The MLP of the talk


def test_mlp_without_invariances_is_that_of_the_talk(randomized, normal, error):
    network = randomized(PatchMLP(**ALL_OFF))
    sizes = [9, 40, 80, 160, 320, 320, 160, 80, 40, 9]
    activations = [nn.LeakyReLU()] * 5 + [nn.Tanh()] * 3
    layers = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        final = i == len(sizes) - 2
        # The noise level, log(sigma), is one more input of the first layer.
        layers.append(nn.Linear(inputs + (i == 0), outputs, bias=not final, dtype=torch.float64))
        if not final:
            layers.append(activations[i])
    reference = nn.Sequential(*layers)
    linear = [layer for layer in reference if isinstance(layer, nn.Linear)]
    first, *others = network.matrices()
    with torch.no_grad():
        linear[0].weight.copy_(torch.cat([first, network.noise[:, None]], dim=1))
        for layer, matrix in zip(linear[1:-1], others, strict=True):
            layer.weight.copy_(matrix)
        for layer, bias in zip(linear[:-1], network.biases, strict=True):
            layer.bias.copy_(bias)
        linear[-1].weight.copy_(network.project.T)

    v = normal(2, 9, 50)
    inputs = torch.cat([v, SIGMA.log().expand(2, 1, 50)], dim=1)
    expected = reference(inputs.transpose(1, 2)).transpose(1, 2) / SIGMA
    assert error(network.score(v, SIGMA), expected) < 1e-10
    weights = sum(a * b for a, b in itertools.pairwise(sizes))
    assert sum(p.numel() for p in network.parameters()) == weights + sum(sizes[1:-1]) + 40


@pytest.mark.parametrize("tanh_layers", [0, 1, 3])
def test_tanh_layers_are_the_last_hidden_ones(tanh_layers, randomized, normal, error):
    network = randomized(PatchMLP(3, 1, (16, 8, 24), tanh_layers))
    u = normal(2, 9, 5)
    h = u / SIGMA
    for layer, (matrix, bias) in enumerate(zip(network.matrices(), network.biases, strict=True)):
        h = matrix @ h + network.symmetry.pool(bias)[:, None]
        h = torch.tanh(h) if layer >= 3 - tanh_layers else torch.where(h > 0, h, 0.01 * h)
    expected = network.symmetry.lift(network.project, 3).T @ h / SIGMA
    assert error(network.score(u, SIGMA), expected) < 1e-10


# The noise level as an input


@networks
def test_noise_conditional_form(build, randomized, normal, error):
    """s_V(v; sigma) = s~(v; log sigma) / sigma, where log sigma enters as a bias of the first layer."""
    network = randomized(build(scale_invariant=False))
    plain = build(scale_invariant=False).double()
    v = normal(1, 16, 6)
    for sigma in (0.05, 1.0, 20.0):
        plain.load_state_dict(network.state_dict())
        with torch.no_grad():  # s~(v; log sigma), written as a network at log sigma = 0
            plain.biases[0] += math.log(sigma) * network.noise
        level = torch.full((1, 1, 1), sigma, dtype=torch.float64)
        expected = plain.score(v, torch.ones_like(level)) / sigma
        assert error(network.score(v, level), expected) < 1e-10
        if build is energy_network:
            expected = plain.energy(v, torch.ones_like(level)) / sigma
            assert error(network.energy(v, level), expected) < 1e-10


# Settings and errors


@pytest.mark.parametrize(
    "network",
    [
        PatchEnergy(),
        PatchEnergy(5, 3, 24, 3, turn_invariant=False),
        PatchEnergy(4, 1, 7, 1, **ALL_OFF),
        PatchMLP(),
        PatchMLP(4, 3, (8, 16), 1, scale_invariant=False),
        PatchMLP(2, 1, [5, 6, 7], 2, **ALL_OFF),
    ],
    ids=lambda network: type(network).__name__,
)
def test_settings_build_the_network_again(network, normal, error, randomized):
    randomized(network)
    again = type(network)(**network.settings()).double()
    again.load_state_dict(network.state_dict())
    assert again.settings() == network.settings()
    v = normal(2, network.channels * network.patch_shape[0] ** 2, 3)
    assert error(again.score(v, SIGMA), network.score(v, SIGMA)) == 0


def test_a_new_energy_is_flat(normal):
    """Training starts from doing nothing: the read-out is zero."""
    assert not PatchEnergy(3, 1, 16).double().score(normal(2, 9, 5), SIGMA).any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PatchEnergy(0), r"sides is \[0, 1\] .* expected positive numbers"),
        (lambda: PatchEnergy(3, 0), r"with 0 channels; expected at least one"),
        (lambda: PatchMLP(0), r"patch_size is 0; expected a positive whole number"),
        (lambda: PatchEnergy(depth=0), r"depth is 0; expected a positive whole number"),
        (lambda: PatchEnergy(width=12), r"width is 12 .* groups of 8, .* multiple of 8"),
        (lambda: PatchEnergy(width=6, turn_invariant=False), r"groups of 4, .* multiple of 4"),
        (lambda: PatchEnergy(width=0, **ALL_OFF), r"width is 0 .* multiple of 1"),
        (lambda: PatchMLP(widths=()), r"\[\] units"),
        (lambda: PatchMLP(widths=(8, 9)), r"\[8, 9\] units; .* multiple of 8"),
        (lambda: PatchMLP(widths=(8, 8)), r"tanh_layers is 3; expected 0 to 2"),
        (lambda: PatchMLP(widths=(8, 8), tanh_layers=-1), r"tanh_layers is -1; expected 0 to 2"),
    ],
)
def test_settings_that_cannot_be(build, message):
    with pytest.raises(InputError, match=message):
        build()
