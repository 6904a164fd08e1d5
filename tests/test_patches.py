"""The cutting operators against their definition, and the sums over cliques against plain loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchscore.errors import InputError
from patchscore.priors import patches
from patchscore.priors.patches import PatchGrid

BOUNDARIES = ["symmetric", "periodic", "open"]
# (H, W), (rows, columns): odd, even, not square, one patch, one row of patches, one column of them.
SIZES = [
    ((7, 9), (3, 3)),
    ((6, 5), (4, 4)),
    ((8, 7), (2, 5)),
    ((5, 9), (3, 4)),
    ((3, 3), (3, 3)),
    ((4, 4), (4, 4)),
    ((3, 8), (3, 3)),
    ((4, 9), (4, 4)),
    ((9, 2), (2, 2)),
    ((4, 6), (1, 1)),
]
every_grid = pytest.mark.parametrize(
    ("image_shape", "patch_shape", "boundary"), [(*size, b) for size in SIZES for b in BOUNDARIES]
)


def brute_force(image: np.ndarray, patch_shape: tuple[int, int], boundary: str) -> np.ndarray:
    """Every patch of a (C, H, W) image, cut out by hand: (C P^2, L)."""
    before = [side // 2 for side in patch_shape]
    match boundary:
        case "periodic":
            after = [side - 1 - side // 2 for side in patch_shape]
            mode = "wrap"
        case "symmetric":
            after = before
            mode = "symmetric"
        case "open":
            before = after = [0, 0]
            mode = "constant"
    padded = np.pad(image, [(0, 0), *zip(before, after, strict=True)], mode=mode)
    rows, columns = (padded.shape[1 + a] - patch_shape[a] + 1 for a in range(2))
    cut = [
        padded[:, top : top + patch_shape[0], left : left + patch_shape[1]].flatten()
        for top in range(rows)
        for left in range(columns)
    ]
    return np.stack(cut, axis=1)


def rim_weights(grid: PatchGrid) -> torch.Tensor:
    """w_c by definition: half for each side of the image on whose rim a clique is centred."""
    weights = torch.ones(grid.shape, dtype=torch.float64)
    if grid.boundary == "symmetric":
        for axis, side in enumerate(grid.patch_shape):
            if side % 2 == 0:
                for end in (0, -1):
                    weights.select(axis, end).mul_(0.5)
    return weights.flatten()


@every_grid
def test_extract_cuts_the_patches_that_loops_cut(image_shape, patch_shape, boundary, normal):
    x = normal(2, 3, *image_shape)
    found = PatchGrid(image_shape, patch_shape, boundary).extract(x)
    for image, cut in zip(x, found, strict=True):
        np.testing.assert_array_equal(cut, brute_force(image.numpy(), patch_shape, boundary))


@every_grid
def test_assemble_is_the_adjoint_of_extract(image_shape, patch_shape, boundary, normal):
    grid = PatchGrid(image_shape, patch_shape, boundary)
    x = normal(2, 3, *image_shape, seed=1)
    cut = grid.extract(x)
    p = normal(*cut.shape, seed=2)
    left, right = (cut * p).sum(), (x * grid.assemble(p)).sum()
    assert abs(left - right) <= 1e-10 * cut.norm() * p.norm()


@every_grid
def test_pad_adjoint_is_the_adjoint_of_pad(image_shape, patch_shape, boundary, normal):
    grid = PatchGrid(image_shape, patch_shape, boundary)
    x, y = normal(2, 1, *image_shape, seed=1), normal(2, 1, *grid.padded_shape, seed=2)
    left, right = (grid.pad(x) * y).sum(), (x * grid.pad_adjoint(y)).sum()
    assert abs(left - right) <= 1e-10 * x.norm() * y.norm()


@every_grid
def test_overlap_counts_the_cliques_of_a_pixel(image_shape, patch_shape, boundary):
    grid = PatchGrid(image_shape, patch_shape, boundary)
    found = grid.overlap(torch.zeros(1, dtype=torch.float64))
    if boundary == "open":
        count = np.zeros(image_shape)
        for top in range(image_shape[0] - patch_shape[0] + 1):
            for left in range(image_shape[1] - patch_shape[1] + 1):
                count[top : top + patch_shape[0], left : left + patch_shape[1]] += 1
    else:
        count = np.full(image_shape, math.prod(patch_shape))
    assert found.shape == (1, 1, *image_shape)
    np.testing.assert_array_equal(found[0, 0], count)


@pytest.mark.parametrize("limit", [1, 7, 60, 10**9])
@every_grid
def test_tile_by_tile_equals_the_definition(
    image_shape, patch_shape, boundary, limit, normal, error, monkeypatch
):
    monkeypatch.setattr(patches, "PATCHES_PER_TILE_CPU", limit)
    grid = PatchGrid(image_shape, patch_shape, boundary)
    x, sigma = normal(5, 2, *image_shape), torch.linspace(0.5, 2, 5).double()
    mixing = normal(2 * math.prod(patch_shape), 2 * math.prod(patch_shape), seed=1)
    scale = sigma[:, None, None]
    weights = rim_weights(grid)

    def f(v, sigma):
        return torch.tanh(mixing @ v / sigma)

    def phi(v, sigma):
        return f(v, sigma).square().sum(1)

    cut = grid.extract(x)
    assert error(grid.apply(x, sigma, f), grid.assemble(weights * f(cut, scale))) < 1e-10
    assert error(grid.total(x, sigma, phi), (weights * phi(cut, scale)).sum(-1)) < 1e-10


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("limit", [1, 7, 50, 300, 10**9])
def test_a_tile_holds_no_more_patches_than_the_limit(boundary, limit, normal, monkeypatch):
    monkeypatch.setattr(patches, "PATCHES_PER_TILE_CPU", limit)
    grid = PatchGrid((17, 12), (3, 4), boundary)
    seen = []

    def f(v, sigma):
        seen.append((len(v) * v.shape[-1], len(sigma)))
        return v

    def phi(v, sigma):
        return f(v, sigma).sum(1)

    x = normal(5, 1, 17, 12)
    for evaluate, function in ((grid.apply, f), (grid.total, phi)):
        seen.clear()
        evaluate(x, torch.ones(5), function)
        assert max(count for count, _ in seen) <= limit
        assert sum(count for count, _ in seen) == 5 * math.prod(grid.shape)


@pytest.mark.parametrize("limit", [1, 7, 100, 1024, 2**20])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (512, 512), (129, 65)])
@pytest.mark.parametrize("images", [1, 5])
def test_tiles_are_nearly_square_and_nearly_equal(images, shape, limit):
    tiles = list(patches.tiling(images, shape, limit))
    seen = np.zeros((images, *shape), int)
    for tile in tiles:
        seen[tile] += 1
    assert (seen == 1).all()
    sizes = np.array([[part.stop - part.start for part in tile] for tile in tiles])
    assert sizes.prod(1).max() <= limit
    most = np.array([min(count, math.isqrt(limit)) for count in (images, *shape)])
    assert sizes[:, 1].max() <= most[1]
    # As few parts as can be, and the parts of an axis differ by less than their number.
    for axis, count in enumerate((images, *shape)):
        parts = -(-count // sizes[:, axis].max())
        assert sizes[:, axis].max() - sizes[:, axis].min() < parts
    if min(shape) > math.isqrt(limit):  # square up to the rounding of both sides
        assert sizes[:, 1:].max() <= 4 * sizes[:, 1:].max(0).min()


@pytest.mark.parametrize(("images", "shape"), [(1, (1, 10**6)), (1, (10**6, 2)), (10**4, (8, 8))])
def test_a_rim_makes_no_tile_larger_than_a_square_one(images, shape):
    limit, rim = 32768, 16
    largest = max(
        (images.stop - images.start) * math.prod(part.stop - part.start + rim for part in window)
        for images, *window in patches.tiling(images, shape, limit, rim)
    )
    assert largest <= (math.isqrt(limit) + rim) ** 2


@pytest.mark.parametrize("patch_shape", [(3, 3), (4, 4), (2, 2), (3, 4), (5, 2), (1, 1)])
@pytest.mark.parametrize("image_shape", [(7, 9), (6, 5), (5, 5)])
def test_symmetric_energy_is_a_quarter_of_that_of_the_mirrored_torus(image_shape, patch_shape, normal):
    x = normal(2, 2, *image_shape)
    mirrored = torch.cat([x, x.flip(-1)], dim=-1)
    mirrored = torch.cat([mirrored, mirrored.flip(-2)], dim=-2)
    filters = normal(5, 2, *patch_shape, seed=1)
    flipped = [filters, filters.flip(-1), filters.flip(-2), filters.flip(-1, -2)]

    def energies(filters_of_phi):
        def phi(v, sigma):
            return sum(torch.tanh(w.flatten(1) @ v / sigma + 0.5).sum(1) for w in filters_of_phi)

        sigma = torch.tensor([0.7, 1.9], dtype=torch.float64)
        here = PatchGrid(image_shape, patch_shape, "symmetric").total(x, sigma, phi)
        doubled = tuple(2 * size for size in image_shape)
        there = PatchGrid(doubled, patch_shape, "periodic").total(mirrored, sigma, phi)
        return here, there / 4

    here, quarter = energies(flipped)
    torch.testing.assert_close(here, quarter, rtol=1e-10, atol=1e-10)
    if math.prod(patch_shape) > 1:  # the claim needs the flips: one filter without its mirror images
        here, quarter = energies([filters])
        assert (here - quarter).abs().min() > 1e-6


def test_apply_is_the_gradient_of_total(normal, error):
    """sum_c w_c G_c' phi'(G_c x), against autograd and without any network."""
    for image_shape, patch_shape in SIZES:
        for boundary in BOUNDARIES:
            grid = PatchGrid(image_shape, patch_shape, boundary)
            x = normal(2, 1, *image_shape).requires_grad_()
            w, sigma = normal(math.prod(patch_shape), 1, seed=1), torch.ones(2, dtype=torch.float64)
            energy = grid.total(x, sigma, lambda v, _, w=w: (w * v).sum(1).sin())
            score = grid.apply(
                x.detach(), sigma, lambda v, _, w=w: w * (w * v).sum(1, keepdim=True).cos()
            )
            (gradient,) = torch.autograd.grad(energy.sum(), x)
            assert error(score, gradient) < 1e-10


def test_gradients_flow_after_a_first_call_in_inference_mode(normal, error):
    """What is remembered about a shape must not be bound to the mode that it was first met in."""
    grid = PatchGrid((11, 13), (3, 3), "symmetric")
    x = normal(1, 1, 11, 13)
    with torch.inference_mode():
        grid.pad(x)
    x.requires_grad_()
    y = normal(1, 1, *grid.padded_shape, seed=1)
    (gradient,) = torch.autograd.grad((grid.pad(x) * y).sum(), x)
    assert error(gradient, grid.pad_adjoint(y)) < 1e-10


def test_a_patch_lists_its_pixels_like_the_kernel_of_a_convolution(normal, error):
    x, w = normal(2, 3, 6, 7), normal(4, 3, 2, 3, seed=1)
    cut = PatchGrid((6, 7), (2, 3), "open").extract(x)
    assert error(w.flatten(1) @ cut, F.conv2d(x, w).flatten(2)) < 1e-10


@pytest.mark.parametrize("boundary", ["symmetric", "periodic"])
@pytest.mark.parametrize(
    ("image_shape", "patch_shape"), [((2, 3), (5, 5)), ((1, 4), (4, 7)), ((1, 1), (3, 2))]
)
def test_a_patch_may_be_larger_than_the_image(boundary, image_shape, patch_shape, normal, error):
    """The patches are those of the image repeated (mirrored), and assembling is still the adjoint."""
    grid = PatchGrid(image_shape, patch_shape, boundary)
    x, y = normal(2, 1, *image_shape), normal(2, patch_shape[0] * patch_shape[1], 1, seed=1)
    cut = grid.extract(x)
    y = y.expand_as(cut)
    assert error((cut * y).sum(), (x * grid.assemble(y)).sum()) < 1e-10
    mode = {"symmetric": "symmetric", "periodic": "wrap"}[boundary]
    before = [side // 2 for side in patch_shape]
    after = [padded - b - n for padded, b, n in zip(grid.padded_shape, before, image_shape, strict=True)]
    margins = [(0, 0), (0, 0), *zip(before, after, strict=True)]
    assert error(grid.pad(x), torch.from_numpy(np.pad(x.numpy(), margins, mode=mode))) < 1e-10


@pytest.mark.parametrize("image_shape", [(2, 9), (9, 2)])
def test_image_smaller_than_a_patch(image_shape):
    message = rf"the image is {image_shape[0]} x {image_shape[1]} pixels, smaller than .* of 3 x 4"
    with pytest.raises(InputError, match=message):
        PatchGrid(image_shape, (3, 4), "open")


def test_unknown_boundary():
    with pytest.raises(InputError, match=r"boundary is 'reflect'; choose one of .*'symmetric'"):
        PatchGrid((5, 5), (3, 3), "reflect")
