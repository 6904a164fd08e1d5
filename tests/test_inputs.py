"""What comes in: extreme values, wrong types, transforms of PyTorch. A right result, or InputError."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.data import camera

import patchscore as ps
from patchscore.inference.diffusion import predictor_corrector
from patchscore.inference.langevin import annealed_langevin

NOT_LEVELS = {
    "ragged": [[1.0, 2.0], [3.0]],
    "None": None,
    "text": "25",
    "boolean": True,
    "object": object(),
    "huge": 10**400,
    "complex": 1j,
}
not_levels = pytest.mark.parametrize("sigma", NOT_LEVELS.values(), ids=NOT_LEVELS)


@pytest.fixture(scope="module")
def fast() -> ps.PatchPrior:
    return ps.load_prior("natural-gray-fast", "cpu")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    clean = torch.from_numpy(camera()[100:148, 150:198] / 255.0)
    noise = torch.randn(48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (clean + 0.1 * noise)[None, None].float()


@pytest.mark.parametrize("value", [1e12, 1e30, -3.4e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_pixel_does_not_move_those_out_of_its_reach(
    value: float, dtype: torch.dtype, fast: ps.PatchPrior, x: torch.Tensor
) -> None:
    prior = ps.PatchPrior(ps.ConvEnergy.from_settings(fast.network.settings()).to(dtype))
    prior.network.load_state_dict(fast.network.state_dict())
    prior.requires_grad_(False)
    x = x.to(dtype)
    expected = prior.denoise(x, 0.1)
    marked = x.clone()
    marked[..., 20, 21] = value
    found = prior.denoise(marked, 0.1)
    assert found.isfinite().all()
    reach = fast.network.patch_shape[0]
    out = torch.ones(48, 48, dtype=torch.bool)
    out[20 - reach + 1 : 20 + reach, 21 - reach + 1 : 21 + reach] = False
    rounding = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert (found - expected)[..., out].abs().max() < rounding


@pytest.mark.parametrize("unit", [1e-31, 1e-25, 1e-12, 1e12, 1e20, 1e33])
def test_a_prior_denoises_in_any_unit_of_float32(
    unit: float, fast: ps.PatchPrior, x: torch.Tensor
) -> None:
    expected = fast.denoise(x, 0.1)
    assert (fast.denoise(unit * x, unit * 0.1) / unit - expected).abs().max() < 1e-6
    # Channels of their own, and samples.
    wrapped = ps.Channelwise(fast)
    assert (wrapped.denoise(unit * x, unit * 0.1) / unit - expected).abs().max() < 1e-6
    one, other = (
        ps.sample_denoised(
            fast, scale * x, scale * 0.1, 1, levels=3, generator=torch.Generator().manual_seed(0),
            progress=False,
        ).mean
        for scale in (1.0, unit)
    )  # fmt: skip
    assert (other / unit - one).abs().max() < 1e-5


@pytest.mark.parametrize("sigma", [1e-300, 1e-40, 1e38, 1e300])
def test_levels_that_float32_cannot_hold_are_refused(
    sigma: float, fast: ps.PatchPrior, x: torch.Tensor
) -> None:
    with pytest.raises(ps.InputError, match="multiply the image and sigma by the same number"):
        fast.denoise(x, sigma)


@not_levels
def test_what_is_no_noise_level_is_refused(sigma: object, fast: ps.PatchPrior, x: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    field = ps.GaussianCliques.exponential((48, 48), std=1.0, length=2.0)
    calls = [
        lambda: fast.denoise(x, sigma),
        lambda: field.score(x.double(), sigma),
        lambda: ps.sample_denoised(fast, x, sigma, 2, generator=generator),
        lambda: ps.langevin(fast, x, sigma=sigma, steps=2, generator=generator),
        lambda: annealed_langevin(fast, x, sigmas=sigma, generator=generator),
        lambda: predictor_corrector(fast, x, sigmas=sigma, generator=generator),
        lambda: ps.fit(ps.PatchPrior(ps.PatchEnergy(3)), [x[0]], sigmas=sigma, steps=1),
        lambda: ps.expect(fast, [x[0]], sigmas=sigma),
    ]
    for call in calls:
        with pytest.raises(ps.InputError, match=r"sigmas? is|noise level"):
            call()
    if sigma is not None:
        with pytest.raises(ps.InputError, match="expected one number"):
            ps.denoise(x[0, 0], sigma)


def test_a_schedule_has_levels(fast: ps.PatchPrior, x: torch.Tensor) -> None:
    for sigmas in ([], np.array([]), torch.tensor([]), [1.0, 2.0], 1.0):
        with pytest.raises(ps.InputError, match="expected at least one positive noise level"):
            annealed_langevin(fast, x, sigmas=sigmas, generator=torch.Generator().manual_seed(0))
    chain = annealed_langevin(
        fast, x, sigmas=np.array([0.2, 0.1]), steps_per_level=2, progress=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert chain.draws == 2


def test_a_level_that_requires_a_gradient_is_a_level(fast: ps.PatchPrior, x: torch.Tensor) -> None:
    sigma = torch.tensor(0.1, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(fast.denoise(x, sigma), fast.denoise(x, 0.1))
    np.testing.assert_allclose(
        ps.denoise(x[0, 0], sigma, prior=fast), ps.denoise(x[0, 0], sigma.item(), prior=fast)
    )


def test_transforms_and_compilers_of_pytorch_work(fast: ps.PatchPrior, x: torch.Tensor) -> None:
    expected = fast.denoise(x, 0.1)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    value, derivative = torch.func.jvp(lambda x: fast.denoise(x, 0.1), (x,), (v,))
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    double = ps.load_prior("natural-gray-fast", "cpu").double()
    ahead, behind = (double.denoise(x.double() + sign * 1e-6 * v.double(), 0.1) for sign in (1, -1))
    torch.testing.assert_close(derivative.double(), (ahead - behind) / 2e-6, rtol=0, atol=1e-5)
    mapped = torch.func.vmap(lambda x: fast.denoise(x, 0.1))(x[None])
    torch.testing.assert_close(mapped[0], expected, rtol=0, atol=1e-6)
    mapped = torch.func.vmap(fast.denoise)(x[None], torch.tensor([0.1]))
    torch.testing.assert_close(mapped[0], expected, rtol=0, atol=1e-6)
    compiled = torch.compile(fast, backend="eager")(x, 0.1)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-6)


def test_the_default_dtype_does_not_matter(fast: ps.PatchPrior, x: torch.Tensor) -> None:
    expected = fast.denoise(x, 0.1)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(fast.denoise(x, 0.1), expected, rtol=0, atol=0)
        assert ps.denoise(x[0, 0].numpy(), 0.1, prior=fast).dtype == np.float32
    finally:
        torch.set_default_dtype(torch.float32)
