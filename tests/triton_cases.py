"""The kernels for GPUs against the definition; run by test_triton.py, on a GPU or in the interpreter."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from patchscore.errors import InputError
from patchscore.priors.energy import ConvEnergy, PatchEnergy
from patchscore.priors.engines import triton as engine
from patchscore.priors.engines import triton_launch
from patchscore.priors.engines.layers import Layers
from patchscore.priors.engines.triton_launch import Tiles
from patchscore.priors.patches import PatchGrid

BOUNDARIES = ["symmetric", "periodic", "open"]
SIGMA = torch.tensor([0.4, 1.7], dtype=torch.float64)
# Sums of at most some hundred products in float32, each with a relative error of 6e-8.
FLOAT32 = 1e-5
# Half the distance of neighbouring bfloat16, relative: a sum in another order may turn a rounding.
BFLOAT16 = 2**-9

boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)


@pytest.fixture
def device():
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def score(device):
    """The score from the kernels."""

    def evaluate(network, x, sigma, boundary, precision="float32", block=128, **changes):
        layers = plain(network, torch.float32, device)
        tiles = Tiles(block, 16, 4, 1)._replace(**changes)
        field = engine.Field(layers, precision, tiles)
        found = field.score(x.float().to(device), sigma.float().to(device), boundary)
        return found.double().cpu()

    return evaluate


def plain(network, dtype, device="cpu"):
    """The layers that tied weights stand for."""
    with torch.no_grad():
        layers = network.layers()

    def moved(values):
        return values.to(device, dtype)

    return layers._replace(
        kernels=[*map(moved, layers.kernels)],
        biases=[*map(moved, layers.biases)],
        readout=moved(layers.readout),
    )


def exact(network, x, sigma, boundary):
    with torch.no_grad():
        return network.field_score(x, sigma, boundary)


@boundaries
@pytest.mark.parametrize(
    ("patch_size", "channels", "width", "depth"),
    [(3, 1, 16, 1), (2, 3, 24, 1), (4, 1, 24, 2), (3, 3, 16, 2), (5, 1, 16, 3), (3, 1, 16, 4)],
)
def test_networks_on_patches(
    boundary, patch_size, channels, width, depth, randomized, normal, error, score
):
    network = randomized(PatchEnergy(patch_size, channels, width, depth))
    x = normal(2, channels, 7, 9)
    assert error(score(network, x, SIGMA, boundary), exact(network, x, SIGMA, boundary)) < FLOAT32


@boundaries
@pytest.mark.parametrize(
    ("sides", "dilations", "channels"), [((3, 3, 3), (1, 2, 1), 1), ((3, 3), (1, 3), 3), ((3,), (1,), 1)]
)
def test_convolutional_networks(boundary, sides, dilations, channels, randomized, normal, error, score):
    network = randomized(ConvEnergy(sides, dilations, channels, width=16))
    x = normal(2, channels, 9, 10)
    found = score(network, x, SIGMA, boundary, block=1024)
    assert error(found, exact(network, x, SIGMA, boundary)) < FLOAT32


@pytest.mark.parametrize("size", [(3, 3), (3, 37), (19, 3), (4, 35)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_one_patch_one_row_and_many_spans(size, channels, randomized, normal, error, score):
    """Cliques that reach the span of the next program, and programs with more places than cliques."""
    network = randomized(PatchEnergy(3, channels, 16, 2))
    x = normal(2, channels, *size)
    found = score(network, x, SIGMA, "open", block=16)
    assert error(found, exact(network, x, SIGMA, "open")) < FLOAT32


def test_patches_as_wide_as_a_program(randomized, normal, error, score):
    network = randomized(PatchEnergy(17, 1, 16, 2))
    x = normal(2, 1, 18, 36)
    found = score(network, x, SIGMA, "open", block=16)
    assert error(found, exact(network, x, SIGMA, "open")) < FLOAT32
    with pytest.raises(InputError, match=r"16 places; a first layer of 18 x 18 needs at least 32"):
        score(randomized(PatchEnergy(18, 1, 16, 2)), x, SIGMA, "open", block=16)


@boundaries
def test_stripes(boundary, randomized, normal, error, score, monkeypatch):
    """With room for the sums of a few lines only, across images."""
    monkeypatch.setattr(triton_launch, "SUMS_BYTES", 3000)
    network = randomized(PatchEnergy(4, 1, 16, 2))
    x = normal(2, 1, 7, 9)
    found = score(network, x, SIGMA, boundary, block=32)
    assert error(found, exact(network, x, SIGMA, boundary)) < FLOAT32


@pytest.mark.parametrize("boundary", ["symmetric", "open"])
def test_tiles_of_hidden_units(boundary, randomized, normal, error, score, monkeypatch):
    """With room for the hidden units of a part of an image only; here with sides that are even."""
    monkeypatch.setattr(triton_launch, "HIDDEN_BYTES", 2**17)
    network = randomized(PatchEnergy(2, 1, 16, 4))
    x = normal(2, 1, 17, 19)
    found = score(network, x, SIGMA, boundary, block=512)
    assert error(found, exact(network, x, SIGMA, boundary)) < FLOAT32


@pytest.mark.parametrize("boundary", ["symmetric", "open"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: PatchEnergy(4, 1, 16, 1),
        lambda: PatchEnergy(4, 1, 16, 2),
        lambda: PatchEnergy(3, 3, 16, 3),
        lambda: ConvEnergy((3, 3, 3), (1, 2, 1), 1, 16),
    ],
)
def test_bfloat16_rounds_operands_and_nothing_else(build, boundary, randomized, normal, error, score):
    """Equal to float64 in which what goes into a product is rounded."""
    network = randomized(build())
    x = normal(2, network.channels, 9, 11)
    found = score(network, x, SIGMA, boundary, "bfloat16", block=512)
    assert error(found, rounded_score(network, x, SIGMA, boundary)) < BFLOAT16


def rounded_score(network, x, sigma, boundary):
    """The equations on patches, the layers above the first as convolutions, with rounded operands."""
    kernels, biases, readout, dilations, *_ = plain(network, torch.float64)
    side = kernels[0].shape[-1]
    grid = PatchGrid(x.shape[-2:], network.patch_shape, boundary)
    padded = grid.pad(network.layers().centred(x))
    size = [length - side + 1 for length in padded.shape[-2:]]
    v = F.unfold(padded, side) / sigma[:, None, None]
    lift, mean = kernels[0].flatten(1), v.mean(1, keepdim=True)
    h = half(lift) @ half(v - mean) + lift.sum(1)[:, None] * mean + biases[0][:, None]
    hidden = [h.unflatten(2, size)]
    for kernel, bias, d in zip(kernels[1:], biases[1:], dilations[1:], strict=True):
        hidden.append(F.conv2d(half(F.gelu(hidden[-1])), half(kernel), bias, dilation=d))
    force = readout[:, None, None].expand_as(hidden[-1])
    weights = grid.weights(x)
    inside = weights is not None and len(kernels) > 3
    force = force * weights if inside else force
    force = half(slope(force, hidden.pop()))
    for kernel, d in zip(kernels[:0:-1], dilations[:0:-1], strict=True):
        force = F.conv_transpose2d(force, half(kernel), dilation=d)
        force = half(force * half(slope(torch.ones_like(force), hidden.pop())))
    force = half(lift).T @ force.flatten(2)
    force = force if weights is None or inside else force * weights.flatten()
    return -grid.pad_adjoint(F.fold(force, padded.shape[-2:], side)) / sigma[:, None, None, None]


def slope(force, h):
    return torch.ops.aten.gelu_backward(force, h)


def half(values):
    return values.bfloat16().double()


def test_a_bright_image_keeps_its_detail_in_bfloat16(randomized, normal, error, score):
    """A brightness of 1024 in units in which the pixels are multiples of 2^-10 is added exactly."""
    network = randomized(PatchEnergy(4, 1, 16, 2))
    x = (normal(2, 1, 7, 9) * 2**10).round() / 2**10
    dark, bright = (score(network, x + c, SIGMA, "open", "bfloat16") for c in (0, 1024))
    assert error(bright, dark) < BFLOAT16


def test_the_sizes_that_are_tried(randomized):
    """No fewer places than the first layer reaches, no more than registers hold; each once."""
    for width, side, depth in itertools.product((16, 64, 256), (3, 18), (1, 2, 3)):
        for precision, on_patches in itertools.product(("float32", "bfloat16"), (True, False)):
            network = randomized(PatchEnergy(side, 1, width, depth))
            weights = engine.Field(plain(network, torch.float32), precision).weights
            sizes = engine.tile_sizes(weights, on_patches=on_patches)
            assert len(set(sizes)) == len(sizes)
            assert all(max(16, side - 1) <= tiles.block <= 128 for tiles in sizes)


def test_a_field_is_packed_again_when_the_network_changes(randomized, device):
    network = randomized(PatchEnergy(3, 1, 16)).float().to(device)
    field = engine.field_of(network, "bfloat16")
    assert engine.field_of(network, "bfloat16") is field
    with torch.no_grad():
        network.readout.mul_(2)
    again = engine.field_of(network, "bfloat16")
    assert torch.equal(again.weights.readout, 2 * field.weights.readout)
    assert engine.field_of(network, "bfloat16") is again


def test_what_is_served(device, monkeypatch, randomized):
    """In bfloat16, float32 images of which no gradient is asked for."""
    served = []
    monkeypatch.setattr(engine, "field_of", lambda *_: served.append(1) or SimpleNamespace(score=same))

    def same(x, sigma, boundary):
        return x

    network = randomized(PatchEnergy(3, 1, 16)).float().to(device)
    x, sigma = torch.zeros(1, 1, 5, 5, device=device), torch.ones(1, device=device)

    def is_served(x, precision="bfloat16"):
        served.clear()
        network.field_score(x, sigma.to(x), "open", precision)
        return bool(served)

    assert not is_served(x)
    with torch.no_grad():
        assert is_served(x)
    network.requires_grad_(False)
    assert is_served(x)
    assert not is_served(x, "float32")
    assert not is_served(x.clone().requires_grad_())
    network.double()
    assert not is_served(x.double())
    network.float()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "has_triton", lambda: False)
        assert not is_served(x)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not engine.serves(x.cpu())


def test_an_error_falls_back_with_one_warning(device, monkeypatch, randomized, normal, error):
    """Whatever compiling or launching raises, PyTorch scores instead, also the next time."""
    tried = []

    def refuse(*_):
        tried.append(1)
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(engine, "patch_forces", refuse)
    network = randomized(PatchEnergy(3, 1, 16))
    x, sigma = normal(1, 1, 9, 8), SIGMA[:1]
    expected = exact(network, x, sigma, "open")
    network.float().to(device).requires_grad_(False)
    arguments = x.float().to(device), sigma.float().to(device), "open", "bfloat16"
    with pytest.warns(UserWarning, match=r"cannot score ConvEnergy\(.*no such instruction") as caught:
        found = [network.field_score(*arguments) for _ in range(2)]
    assert len(caught) == len(tried) == 1
    for score in found:
        # On a CPU, oneDNN may go on in bfloat16.
        assert error(score.double().cpu(), expected) < (FLOAT32 if device == "cuda" else 2**-6)


@pytest.mark.parametrize(("side", "width"), [(3, 1024), (34, 16)])
def test_networks_that_do_not_fit(side, width):
    layers = Layers([torch.zeros(width, 1, side, side)], [torch.zeros(width)], torch.zeros(width), [1])
    with pytest.raises(
        InputError, match=rf"{width} units .* {side} x {side}; .* at most 512 .* 33 x 33"
    ):
        engine.Field(layers)


def test_no_shared_memory(randomized, normal, score, monkeypatch):
    """Sizes are tried until one fits, and if none does an error says what to do."""
    from triton.runtime.errors import OutOfResources

    tried = []

    def refuse(*arguments):
        tried.append(arguments[-1])
        raise OutOfResources(2**18, 2**17, "shared memory")

    monkeypatch.setattr(engine, "patch_forces", refuse)
    field = engine.Field(plain(randomized(PatchEnergy(3, 1, 16)), torch.float32))
    with pytest.raises(
        InputError, match=r"no kernel for layers of 16 units fits .* use a smaller network"
    ):
        field.score(normal(1, 1, 5, 5).float(), torch.ones(1), "open")
    assert tried == engine.tile_sizes(field.weights, on_patches=True)
