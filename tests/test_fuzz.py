"""Arrays and calls that nobody thought of: a right result, or an InputError. Nothing else.

Each test takes its number of inputs from the profile that conftest.py loads.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import patchscore as ps
from patchscore.inference import run
from patchscore.inference.diffusion import predictor_corrector
from patchscore.inference.gibbs import split_gibbs
from patchscore.inference.langevin import annealed_langevin
from patchscore.inference.splitting import half_quadratic_splitting
from patchscore.measurements.noise import estimated_sigma
from patchscore.measurements.noisy_image import NoisyImage

# What the library itself warns of.
OURS = (
    "sigma is",
    "the estimated noise level is zero",
    "the noise seems to be clipped",
    "image",
    "the image misses",
    "the residual",
    "neighbouring pixels",
    "predictor_corrector is not calibrated",
    "the chain is too short",
    "the linear system",
)
JUNK: dict[str, Any] = {
    "None": None,
    "no text": "",
    "text": "text",
    "bytes": b"x",
    "minus one": -1,
    "zero": 0,
    "a half": 0.5,
    "NaN": math.nan,
    "infinity": math.inf,
    "huge": 2**64,
    "huger": 10**400,
    "tiny": 1e-300,
    "true": True,
    "imaginary": 1j,
    "no list": [],
    "ragged": [1.0, [2.0]],
    "texts": ["a", "b"],
    "numbers": [3.0, 2.0],
    "dictionary": {},
    "object": object(),
    "class": int,
    "no array": np.zeros(0),
    "objects": np.array([None]),
    "line": np.ones(3),
    "volume": np.ones((2, 3, 4)),
    "scalar": torch.tensor(0.1),
    "no tensor": torch.zeros(0),
    "no images": torch.zeros(0, 1, 8, 8),
    "whole numbers": torch.ones(1, 1, 8, 8, dtype=torch.int64),
    "booleans": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "complex": torch.ones(1, 1, 8, 8, dtype=torch.complex64),
    "two channels": torch.ones(1, 2, 8, 8),
    "another size": torch.ones(1, 1, 9, 7),
    "another batch": torch.ones(3, 1, 8, 8),
    "double": torch.ones(1, 1, 8, 8, dtype=torch.float64),
    "NaN images": torch.full((1, 1, 8, 8), math.nan),
    "requires grad": torch.ones(1, 1, 8, 8, requires_grad=True),
    "numpy's generator": np.random.default_rng(0),
    "identity": ps.Identity(),
}


DTYPES = [
    "f8",
    "f8",
    "f8",
    "f8",
    "f4",
    "f2",
    ">f4",
    ">f8",
    "u1",
    "i2",
    ">u2",
    "i8",
    "u8",
    "g",
    "?",
    "F",
    "O",
    "U3",
]
LAYOUTS = ["plain"] * 4 + ["flipped", "strided", "list", "masked", "tensor", "grad"]
FLAGS = {"return_std", "positive", "progress", "mixed_precision"}  # of which Python takes the truth


@contextmanager
def only_ours() -> Iterator[None]:
    """Errors for warnings of numpy, torch or anybody but the library itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        assert warning.category is UserWarning, warning
        assert str(warning.message).startswith(OURS), warning


def attempt(call: Callable[[], Any]) -> Any:
    """What the call returns, or None if it refuses its input, in words."""
    with only_ours():
        try:
            return call()
        except ps.InputError:
            return None


@pytest.fixture(scope="module", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Text where a path is taken is the name of a file, which is written in a folder of the tests."""
    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("fuzz"))
    yield
    os.chdir(here)


@pytest.fixture(scope="module")
def fast() -> ps.PatchPrior:
    return ps.load_prior("natural-gray-fast", "cpu")


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Images, almost images and what is none, in any unit and layout."""
    count = draw(st.sampled_from([2, 2, 2, 2, 3, 0, 1, 4]))
    shape = draw(st.tuples(*[st.sampled_from([1, 2, 3, 7, 16, 33, 0])] * count))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = {
        "noise": lambda: rng.standard_normal(shape),
        "constant": lambda: np.ones(shape),
        "zeros": lambda: np.zeros(shape),
        "impulse": lambda: (np.arange(math.prod(shape)) == 3).reshape(shape).astype(float),
        "ramp": lambda: np.linspace(0, 1, math.prod(shape)).reshape(shape),
        "two values": lambda: rng.integers(0, 2, shape).astype(float),
    }[draw(st.sampled_from(["noise"] * 4 + ["constant", "zeros", "impulse", "ramp", "two values"]))]()
    unit = draw(st.sampled_from([1.0, 255.0, 1e-30, 1e-47, 1e-300, 1e30, 1e37, 3e38, 1e299, 1e308]))
    offset = draw(st.sampled_from([0.0, 0.0, 1.0, -3.0, 1e6]))
    with np.errstate(all="ignore"):
        values = (values + offset) * unit
        if values.size and draw(st.booleans()) and draw(st.booleans()):
            special = [math.nan, math.inf, 1e12, 1e30, -3.4e38, -32768.0, 65535.0, 5e-324]
            values.flat[draw(st.integers(0, values.size - 1))] = draw(st.sampled_from(special))
        dtype = draw(st.sampled_from(DTYPES))
        array = np.asarray(values).astype(dtype)
    layout = draw(st.sampled_from(LAYOUTS))
    if layout == "flipped":
        return array[::-1] if array.ndim else array
    if layout == "strided":
        return np.repeat(array, 2, -1)[..., ::2] if array.ndim else array
    if layout == "list":
        return array.tolist()
    if layout == "masked":
        return np.ma.MaskedArray(array, mask=rng.random(shape) < draw(st.sampled_from([0.0, 0.1])))
    if layout in ("tensor", "grad") and dtype in ("f8", "f4", "u1", "i8"):
        return torch.from_numpy(array).requires_grad_(layout == "grad" and dtype in ("f8", "f4"))
    return array


levels = st.one_of(
    st.none(),
    st.sampled_from([1e-320, 1e-300, 1e-30, 1e-9, 0.1, 1, 25, 25.0, 1e9, 1e37, 1e300, np.float32(0.1)]),
    st.sampled_from(list(JUNK)).map(JUNK.get),
)


@given(image=arrays(), sigma=levels, axis=st.sampled_from([None, None, None, 0, -1, 3]), data=st.data())
def test_any_array_is_denoised_or_refused(
    image: Any, sigma: Any, axis: int | None, data: st.DataObject, fast: ps.PatchPrior
) -> None:
    with_std = (
        data.draw(st.booleans()) and np.size(image) < 300 if isinstance(image, np.ndarray) else False
    )
    options = {"prior": fast, "channel_axis": axis, "progress": False}
    if with_std:
        options.update(return_std=True, samples=2)
    result = attempt(lambda: ps.denoise(image, sigma, **options))
    if result is None:
        return
    estimate, std = result if with_std else (result, None)
    pixels = np.asarray(image.detach() if isinstance(image, torch.Tensor) else image, dtype=np.float64)
    assert estimate.shape == pixels.shape
    assert estimate.dtype in (np.float32, np.float64)
    assert np.isfinite(estimate).all()
    level = estimated_sigma(pixels, axis) if sigma is None else float(sigma)
    # No network of gelu can move a pixel further than its weights say; this one by less than 40 sigma.
    rounding = np.finfo(estimate.dtype).eps * np.abs(pixels).max() + np.finfo(estimate.dtype).tiny
    assert np.abs(estimate.astype(np.float64) - pixels).max() <= 40 * level + 2 * rounding
    if std is not None:
        assert std.shape == pixels.shape
        assert np.isfinite(std).all()
        assert (std >= 0).all()


@given(image=arrays(), sigma=levels)
def test_any_array_surprises_adapts_or_is_refused(image: Any, sigma: Any, fast: ps.PatchPrior) -> None:
    if isinstance(image, np.ndarray) and image.ndim == 2 and image.size and image.dtype.kind in "fiu":
        image = np.pad(image, [(0, max(0, 64 - side)) for side in image.shape], mode="reflect")
        found = attempt(lambda: ps.surprise(fast, image, sigma))
        if found is not None:
            assert np.isfinite(found.map).all()
            assert math.isfinite(found.value)
            assert 0 < found.p_value <= 1
    noisy = attempt(lambda: NoisyImage.of(image, sigma))
    assert noisy is None or (math.isfinite(noisy.sigma) and noisy.sigma >= 0)
    if isinstance(image, np.ndarray) and image.size < 300:
        adapted = attempt(lambda: ps.adapt(fast, image, sigma, max_steps=1, progress=False))
        if adapted is not None:
            assert math.isfinite(adapted.report.gain)


@given(
    shape=st.sampled_from(
        [(1, 1, 9, 8), (2, 1, 1, 1), (1, 1, 1, 30), (3, 1, 7, 2), (0, 1, 8, 8), (1, 8)]
    ),
    unit=st.sampled_from([1e-44, 1e-38, 1e-30, 1.0, 1e6, 1e30, 1e37, 1e300]),
    sigma=st.sampled_from([1e-300, 1e-36, 1e-31, 1e-6, 1.0, 1e6, 1e30, 1e37]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int32]),
    boundary=st.sampled_from(["symmetric", "periodic", "open"]),
)
def test_a_prior_scores_any_tensor_or_refuses_it(
    shape: tuple[int, ...], unit: float, sigma: float, dtype: torch.dtype, boundary: Any
) -> None:
    prior = ps.load_prior("natural-gray-fast", "cpu").with_boundary(boundary)
    if dtype == torch.float64:
        prior = prior.double()
    generator = torch.Generator().manual_seed(0)
    x = (unit * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    if not x.isfinite().all():
        return
    for method in (prior.denoise, prior.score, prior.log_prob):
        result = attempt(lambda method=method: method(x, sigma))
        assert result is None or result.isfinite().all() or method is not prior.denoise


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def quiet(**options: Any) -> dict[str, Any]:
    return {"generator": generator(), "progress": False, **options}


def step(state: Any, generator: torch.Generator) -> Any:
    return state._replace(x=state.x / 2)


def calls(fast: ps.PatchPrior) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A function and arguments that it takes, in which one is then replaced."""
    x, image = torch.rand(1, 1, 8, 8, generator=generator()), np.random.default_rng(0).random((24, 24))
    likelihood = ps.GaussianLikelihood(x, ps.Identity(), 0.1)
    posterior = ps.Posterior(fast, likelihood)
    small = ps.PatchPrior(ps.PatchEnergy(3, width=8))
    return {
        "denoise": (
            ps.denoise,
            {
                "image": image[:8, :8],
                "sigma": 0.1,
                "prior": fast,
                "channel_axis": None,
                "device": "cpu",
                "return_std": True,
                "samples": 2,
                **quiet(),
            },
        ),
        "surprise": (ps.surprise, {"prior": fast, "y": np.tile(image, (3, 3))[:64, :64], "sigma": 0.1}),
        "adapt": (
            ps.adapt,
            {
                "prior": fast,
                "y": image,
                "sigma": 0.1,
                "max_steps": 1,
                "max_seconds": 5.0,
                "learning_rate": 1e-3,
                "sigma_error": 0.01,
                **quiet(),
            },
        ),
        "sample_denoised": (
            ps.sample_denoised,
            {
                "prior": fast,
                "y": x,
                "sigma": 0.1,
                "n": 2,
                "levels": 2,
                "order": 1,
                "keep": "moments",
                "resume": None,
                **quiet(),
            },
        ),
        "langevin": (
            ps.langevin,
            {
                "posterior": posterior,
                "x0": x,
                "sigma": 0.1,
                "steps": 3,
                "burn_in": 1,
                "step_size": 1e-4,
                "thin": 1,
                "keep": "samples",
                "resume": None,
                **quiet(),
            },
        ),
        "annealed_langevin": (
            annealed_langevin,
            {
                "posterior": posterior,
                "x0": x,
                "sigmas": [0.2, 0.1],
                "steps_per_level": 2,
                "thin": 1,
                "step_fraction": 0.1,
                **quiet(),
            },
        ),
        "predictor_corrector": (
            predictor_corrector,
            {
                "posterior": fast,
                "x0": x,
                "sigmas": [0.2, 0.1],
                "corrections": 1,
                "step_fraction": 0.1,
                "order": 2,
                **quiet(),
            },
        ),
        "split_gibbs": (
            split_gibbs,
            {
                "posterior": posterior,
                "x0": x,
                "rho": 0.1,
                "steps": 2,
                "burn_in": 0,
                "levels": 2,
                "order": 1,
                **quiet(),
            },
        ),
        "run": (
            run,
            {
                "step": step,
                "x0": x,
                "steps": 3,
                "burn_in": 1,
                "thin": 1,
                "keep": "samples",
                "resume": None,
                **quiet(),
            },
        ),
        "map_estimate": (
            ps.map_estimate,
            {
                "posterior": posterior,
                "x0": x,
                "sigma": 0.1,
                "tolerance": 0.1,
                "max_steps": 2,
                "progress": False,
            },
        ),
        "restore": (
            ps.restore,
            {
                "y": image[:8, :8],
                "operator": ps.Identity(),
                "noise_std": 0.1,
                "prior": fast,
                "estimate": "auto",
                "return_std": True,
                "samples": 2,
                "positive": False,
                "channel_axis": None,
                "device": "cpu",
                **quiet(),
            },
        ),
        "half_quadratic_splitting": (
            half_quadratic_splitting,
            {
                "denoiser": fast.denoise,
                "likelihood": likelihood,
                "x0": x,
                "sigmas": [0.2, 0.1],
                "progress": False,
            },
        ),
        "GaussianLikelihood": (
            ps.GaussianLikelihood,
            {"y": x, "operator": ps.Identity(), "noise_std": 0.1},
        ),
        "Mask": (lambda mask: ps.GaussianLikelihood(x, ps.Mask(mask), 0.1), {"mask": x[0, 0] > 0.5}),
        "Posterior": (ps.Posterior, {"prior": fast, "likelihood": likelihood}),
        "score": (fast.score, {"x": x, "sigma": 0.1}),
        "log_prob": (fast.log_prob, {"x": x, "sigma": 0.1}),
        "fit": (
            ps.fit,
            {
                "prior": small,
                "images": [image],
                "sigmas": (0.1, 0.2),
                "crop": 8,
                "steps": 1,
                "boundary": "open",
                "batch_size": 1,
                "learning_rate": 1e-3,
                "warmup": 0,
                "average": 0.9,
                "optimizer": "adam",
                "mixed_precision": False,
                "checkpoint": None,
                **quiet(),
            },
        ),
        "load_prior": (ps.load_prior, {"name_or_path": "natural-gray-fast", "device": "cpu"}),
        "PatchPrior": (
            ps.PatchPrior,
            {
                "network": ps.PatchEnergy(3, width=8),
                "assembly": "sum",
                "boundary": "open",
                "score_weight": {0.1: 1.0},
                "precision": "float32",
            },
        ),
    }


@given(data=st.data())
def test_a_wrong_argument_is_taken_or_refused(data: st.DataObject, fast: ps.PatchPrior) -> None:
    table = calls(fast)
    function, arguments = table[data.draw(st.sampled_from(sorted(table)))]
    name = data.draw(st.sampled_from(sorted(set(arguments) - FLAGS)))
    arguments[name] = JUNK[data.draw(st.sampled_from(sorted(JUNK)))]
    attempt(lambda: function(**arguments))


@pytest.mark.parametrize("name", calls(ps.load_prior("natural-gray-fast", "cpu")))
def test_the_right_arguments_are_taken(name: str, fast: ps.PatchPrior) -> None:
    function, arguments = calls(fast)[name]
    function(**arguments)
