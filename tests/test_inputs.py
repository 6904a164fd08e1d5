"""What comes in: extreme values, wrong types, transforms of PyTorch. A right result, or InputError."""

from __future__ import annotations

import warnings
from typing import Any

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


def quiet() -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(0), "progress": False}


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


def test_an_array_says_what_is_no_pixel(x: torch.Tensor) -> None:
    """Marks for missing data and masked arrays are refused by name, by every door."""
    image = np.tile(x[0, 0].numpy(), (2, 2))
    marked = image.copy()
    marked[20, 21] = -3.4e38
    masked = np.ma.masked_less(image, 0.2)
    prior = ps.load_prior("natural-gray-fast", "cpu")
    for call in (
        lambda y: ps.denoise(y, 0.1, prior=prior),
        lambda y: ps.denoise(y, prior=prior),
        lambda y: ps.adapt(prior, y, 0.1, progress=False),
        lambda y: ps.surprise(prior, y, 0.1),
    ):
        with pytest.raises(ps.InputError, match=r"value -3.4e\+38 at \(.*20, 21\).*missing data"):
            call(marked)
        with pytest.raises(ps.InputError, match=r"is a masked array, and .* values are masked"):
            call(masked)
    with pytest.raises(ps.InputError, match="image 0 is a masked array"):
        ps.fit(ps.PatchPrior(ps.PatchEnergy(3)), [masked], sigmas=(0.1, 0.2), steps=1)
    with pytest.raises(ps.InputError, match=r"image 1 has the value -3.4e\+38 at \(20, 21\)"):
        ps.fit(ps.PatchPrior(ps.PatchEnergy(3)), [image, marked], sigmas=(0.1, 0.2), steps=1)
    # Without masked pixels it is an array.
    open_mask = np.ma.masked_less(image, -100)
    np.testing.assert_array_equal(
        ps.denoise(open_mask, 0.1, prior=prior), ps.denoise(image, 0.1, prior=prior)
    )


@pytest.mark.parametrize("unit", [1e-300, 1e-47, 1e37, 1e290])
def test_an_array_is_denoised_in_any_unit_of_float64(
    unit: float, fast: ps.PatchPrior, x: torch.Tensor
) -> None:
    image = x[0, 0].double().numpy()
    for sigma in (0.1, None):
        expected = ps.denoise(image, sigma, prior=fast)
        found = ps.denoise(unit * image, sigma and unit * sigma, prior=fast)
        assert np.abs(found / unit - expected).max() < 1e-5


def test_a_level_far_below_rounding_changes_nothing(fast: ps.PatchPrior, x: torch.Tensor) -> None:
    image = x[0, 0].double().numpy()
    with pytest.warns(UserWarning, match="sigma is 1e-20, which is 1e-20 of the range of the image"):
        found = ps.denoise(image, 1e-20, prior=fast)
    assert np.abs(found - image).max() < 1e-15
    with pytest.raises(ps.InputError, match="more than the prior can hold: scale the image"):
        ps.denoise(image, 1e-300, prior=fast)
    with pytest.raises(ps.InputError, match=r"has values up to 1.5e\+308; divide it"):
        ps.denoise(image / image.max() * 1.5e308, 1e307, prior=fast)


def test_a_result_that_is_not_finite_is_refused(x: torch.Tensor) -> None:
    broken = ps.load_prior("natural-gray-fast", "cpu")
    torch.nn.init.constant_(broken.network.biases[0], torch.nan)
    with pytest.raises(ps.InputError, match="the result has values beyond float32"):
        ps.denoise(x[0, 0], 0.1, prior=broken)


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">u2", "<f4", ">f2"])
def test_the_order_of_bytes_does_not_matter(dtype: str, fast: ps.PatchPrior, x: torch.Tensor) -> None:
    image = (100 * x[0, 0].numpy()).clip(0).astype(dtype)
    found = ps.denoise(image, 10.0, prior=fast)
    expected = ps.denoise(image.astype(image.dtype.newbyteorder("=")), 10.0, prior=fast)
    assert found.dtype == expected.dtype
    assert found.dtype == (np.float64 if dtype in (">f8", ">u2") else np.float32)
    np.testing.assert_array_equal(found, expected)


def test_a_level_in_the_wrong_unit_is_told(fast: ps.PatchPrior) -> None:
    clean = camera().astype(np.float64)[100:228, 100:228]
    noise = np.random.default_rng(0).standard_normal(clean.shape)
    with pytest.warns(UserWarning, match="sigma is 25, but all pixels .* in the unit of the image"):
        ps.denoise(clean / 255, 25, prior=fast)
    with pytest.warns(UserWarning, match=r"sigma is 0.098, which is 0.000\d of the range"):
        ps.denoise(clean + 25 * noise, 25 / 255, prior=fast)
    for sigma in (1.0, 25.0, 60.0, 200.0):  # the training range, and noise far above it: no warning
        ps.denoise(clean + sigma * noise, sigma, prior=fast)
        ps.denoise(127 + sigma * noise, sigma, prior=fast)


def test_a_level_far_from_the_training_is_told_where_there_is_a_unit(x: torch.Tensor) -> None:
    prior = ps.PatchPrior(
        ps.PatchEnergy(3, scale_invariant=False), card={"training": {"sigmas": [1, 2]}}
    )
    image = 100 * x[0, 0].numpy()
    with pytest.warns(UserWarning, match="trained on levels from 1 to 2: it is unreliable at others"):
        ps.denoise(image, 10.0, prior=prior)
    ps.denoise(image, 5.0, prior=prior)


def test_clipped_noise_is_told(fast: ps.PatchPrior) -> None:
    clean = camera().astype(np.float64)[100:356, 100:356]
    noise = np.random.default_rng(0).standard_normal(clean.shape)
    clipped = np.clip(clean + 80 * noise, 0, 255).astype(np.uint8)
    with pytest.warns(UserWarning, match="the noise seems to be clipped"):
        ps.denoise(clipped, prior=fast)
    ps.denoise(clipped, 80.0, prior=fast)
    ps.denoise(np.clip(clean + 10 * noise, 0, 255).astype(np.uint8), prior=fast)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_axis": "last"}, "channel_axis is 'last'; expected three"),
        ({"channel_axis": (0,)}, r"channel_axis is \(0,\); expected three"),
        ({"channel_axis": 1.0}, "channel_axis is 1.0; expected three"),
        ({"prior": None}, "the prior is None; expected a PatchPrior, a name"),
        ({"generator": np.random.default_rng(0)}, "expected one of PyTorch"),
        ({"samples": "many", "return_std": True}, "samples is 'many'"),
    ],
)
def test_options_of_the_wrong_type_are_refused(options: dict, message: str, fast: ps.PatchPrior) -> None:
    image = np.random.default_rng(0).random((3, 20, 20) if "channel_axis" in options else (20, 20))
    with pytest.raises(ps.InputError, match=message):
        ps.denoise(image, 0.1, **{"prior": fast, **options})


@pytest.mark.parametrize("bound", [True, False])
def test_every_evaluation_is_counted(bound: bool) -> None:
    """Also those that measure the curvature."""
    field = ps.GaussianCliques.exponential((8, 8), std=1.0, length=2.0)

    class Counting:
        calls = 0

        def score(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return field.score(x, sigma)

    class Bounded(Counting):
        def curvature_bound(self, sigma: float) -> float:
            return 1 / sigma**2

    x0 = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    settings = {"generator": torch.Generator().manual_seed(0), "progress": False}
    for sampler in (
        lambda model: ps.langevin(model, x0, sigma=0.5, steps=3, **settings),
        lambda model: annealed_langevin(model, x0, sigmas=[0.5, 0.4], steps_per_level=2, **settings),
        lambda model: predictor_corrector(model, x0, sigmas=[0.5, 0.4, 0.3], **settings),
        lambda model: ps.sample_denoised(model, x0, 0.5, 2, **settings),
        lambda model: ps.map_estimate(model, x0 + 1, sigma=0.5, max_steps=3, progress=False),
    ):
        model = Bounded() if bound else Counting()
        result = sampler(model)
        # The reverse diffusion draws both samples in one batch.
        assert result.evaluations == model.calls * (
            2 if result.reason.endswith("samples are done") else 1
        )


def test_what_is_no_batch_of_images_is_refused(fast: ps.PatchPrior, x: torch.Tensor) -> None:
    settings = {"generator": torch.Generator().manual_seed(0), "progress": False}
    doors = [
        lambda y, model: ps.sample_denoised(model, y, 0.1, 2, **settings),
        lambda y, model: ps.langevin(model, y, sigma=0.1, steps=2, **settings),
        lambda y, model: annealed_langevin(model, y, sigmas=[0.1], **settings),
        lambda y, model: predictor_corrector(model, y, sigmas=[0.2, 0.1], **settings),
        lambda y, model: ps.map_estimate(model, y, sigma=0.1, progress=False),
        lambda y, model: model.denoise(y, 0.1),
    ]
    for door in doors:
        for y, found in (
            (x[0], r"has shape \(1, 48, 48\)"),
            (x[:0], "has shape"),
            (x.numpy(), "is ndarray"),
        ):
            with pytest.raises(ps.InputError, match=found + r".*expected \(B, C, H, W\)"):
                door(y, fast)
        with pytest.raises(ps.InputError, match=r"is torch\.int64"):
            door(x.long(), fast)
    for door in doors[:-1]:
        with pytest.raises(ps.InputError, match="NaN or infinite"):
            door(x * torch.nan, fast)
        for model in (None, "natural-gray", lambda x: x):
            with pytest.raises(ps.InputError, match=r"expected something with score\(x, sigma\)"):
                door(x, model)
    for door in doors[:4]:
        settings["generator"] = np.random.default_rng(0)
        with pytest.raises(ps.InputError, match="expected one of PyTorch"):
            door(x, fast)
    for prior, likelihood in ((None, fast), (fast, None)):
        with pytest.raises(ps.InputError, match=r"expected something with score\(x, sigma\)"):
            ps.Posterior(prior, likelihood)


def test_a_chain_says_that_it_is_too_short() -> None:
    """Of a slow walk, whose true worth is n (1 - a) / (1 + a)."""
    field = ps.GaussianCliques.exponential((8, 8), std=1.0, length=1.0)
    x0 = torch.zeros(1, 1, 8, 8, dtype=torch.float64)

    def walk(steps: int, **settings: Any) -> ps.Chain:
        return ps.langevin(
            field, x0, sigma=1.0, steps=steps, thin=1 + steps // 400, **quiet(), **settings
        )

    with pytest.warns(UserWarning, match=r"short: its 50 draws of each image are worth about \d\.\d"):
        short = walk(100)
    assert "too short, worth" in repr(short)
    with pytest.warns(UserWarning, match="too short: its 60 draws of each image are worth about"):
        walk(110, resume=short)
    with pytest.warns(UserWarning, match="too short: its 50 draws of each image are worth about"):
        moments = walk(100, keep="moments")
    with pytest.warns(UserWarning, match="too short: its 2 draws of each image are worth fewer than 10"):
        walk(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "too short" not in repr(walk(10_000))
        walk(10_000, keep="moments")
        walk(110, keep="moments", resume=moments)
        independent = ps.sample_denoised(field, x0, 0.2, 3, **quiet())
    assert "too short" not in repr(independent)


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
