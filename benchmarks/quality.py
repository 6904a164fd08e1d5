"""PSNR and SSIM of denoisers on sets of gray photographs with white Gaussian noise.

    y = x + sigma z,  z ~ N(0, I)        x in 0 .. 255; y is neither clipped nor quantised

z comes from a generator seeded by (seed, number of the image in its set, sigma). So every method sees
the same noise, and any subset of images, noise levels and methods gives the same numbers again. How long
the methods take is for :mod:`benchmarks.speed`, which has the machine to itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
from tqdm import tqdm

from benchmarks.data import gray_images, read_table, write_table
from patchscore import __version__
from patchscore.denoising import denoise
from patchscore.errors import InputError
from patchscore.evaluation.baselines import bm3d, import_bm3d, total_variation_oracle
from patchscore.evaluation.metrics import psnr, ssim
from patchscore.priors.prior import PatchPrior
from patchscore.priors.zoo import load_prior

DATA_RANGE = 255.0
METHODS = "patchscore", "bm3d", "tv"


class Method(NamedTuple):
    """A denoiser under test.

    Attributes
    ----------
    name : what the tables call it
    version : what its result depends on, beside the input
    estimate : which estimate of the clean image it returns
    run : (noisy, sigma, clean) -> denoised; only an oracle looks at the clean image
    """

    name: str
    version: str
    estimate: str
    run: Callable[[np.ndarray, float, np.ndarray], np.ndarray]


class Row(NamedTuple):
    """One line of the table of results: one method on one image at one noise level.

    ``input`` is a digest of the clean and the noisy image. A row is valid as long as the input, the
    version and the estimate are the same: so a changed image, seed, order of images or random
    generator, and a retrained prior, have it computed again. A change of code under one version
    number is not seen: delete the file.
    """

    set: str
    image: str
    sigma: float
    method: str
    psnr: float
    ssim: float
    seed: int
    version: str
    estimate: str
    input: str


class Average(NamedTuple):
    """The mean over the images of a set."""

    set: str
    images: int
    sigma: float
    method: str
    estimate: str
    psnr: float
    ssim: float


def select_methods(names: Sequence[str], prior: str) -> list[Method]:
    """Build the methods of these names, after the noisy image itself, which is always measured.

    Raises
    ------
    InputError
        If BM3D is asked for and missing, or the prior cannot be loaded.
    """
    noisy = Method("noisy", f"numpy {np.__version__}", "none", lambda noisy, sigma, clean: noisy)
    return [noisy, *(_method(name, prior) for name in names)]


def measure(
    sets: Sequence[str], sigmas: Sequence[float], methods: Sequence[Method], *, seed: int, out: Path
) -> list[Row]:
    """Measure every method on every image at every noise level, and keep the table in a CSV file.

    The file holds one row per set, image, noise level and method. Valid rows are taken from it, the
    others are replaced or added one by one, so a run that was stopped goes on where it was.

    Returns
    -------
    list of Row
        Those of the sets, noise levels and methods asked for.

    Raises
    ------
    InputError
        If a set cannot be loaded, a noise level is not positive, or ``out`` is another kind of file.
    """
    table = {row[:4]: row for row in read_rows(out)}
    cases = [
        (set_name, number, image, sigma)
        for set_name in sets
        for number, image in enumerate(gray_images(set_name))
        for sigma in sigmas
    ]
    rows = []
    for set_name, number, (name, clean), sigma in tqdm(cases, unit="image"):
        noisy = add_noise(clean, sigma, seed=seed, number=number)
        digest = _digest(clean.tobytes() + noisy.tobytes())
        for method in methods:
            key = set_name, name, sigma, method.name
            row = table.get(key)
            if row is None or row[-3:] != (method.version, method.estimate, digest):
                estimate = method.run(noisy, sigma, clean)
                row = table[key] = Row(
                    *key,
                    round(psnr(clean, estimate, data_range=DATA_RANGE), 4),
                    round(ssim(clean, estimate, data_range=DATA_RANGE), 5),
                    seed,
                    method.version,
                    method.estimate,
                    digest,
                )
                write_table(out, Row._fields, sorted(table.values()))
            rows.append(row)
    return rows


def averages(rows: Sequence[Row]) -> list[Average]:
    """Average over the images, in the order of first appearance."""
    groups: dict[tuple[str, float, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.set, row.sigma, row.method, row.estimate), []).append(row)
    return [
        Average(
            set_name,
            len(group),
            sigma,
            method,
            estimate,
            float(np.mean([row.psnr for row in group])),
            float(np.mean([row.ssim for row in group])),
        )
        for (set_name, sigma, method, estimate), group in groups.items()
    ]


def add_noise(clean: np.ndarray, sigma: float, *, seed: int, number: int) -> np.ndarray:
    """Make y = x + sigma z for the image of this number in its set.

    Raises :class:`InputError` if sigma is not positive and finite, or the seed is negative.
    """
    if not 0 < sigma < np.inf:
        raise InputError(f"sigma is {sigma}; a noise level is positive and finite.")
    if seed < 0:
        raise InputError(f"seed is {seed}; expected a whole number of at least 0.")
    # A noise level need not be a whole number, but the entropy of a seed must be: so its bits are.
    bits = int(np.float64(sigma).view(np.uint64))
    generator = np.random.default_rng(np.random.SeedSequence([seed, number, bits]))
    return clean + sigma * generator.standard_normal(clean.shape)


def read_rows(path: Path) -> list[Row]:
    """Read what an earlier run wrote; nothing if there is no file.

    Raises
    ------
    InputError
        If it is not a table of this benchmark.
    """
    return read_table(path, Row)


def _method(name: str, prior: str) -> Method:
    match name:
        case "patchscore":
            loaded = load_prior(prior)
            return Method(
                name,
                f"patchscore {__version__} prior {prior_digest(loaded)}",
                "one-step",
                lambda noisy, sigma, clean: denoise(noisy, sigma, prior=loaded),
            )
        case "bm3d":
            import_bm3d()
            return Method(
                name,
                f"bm3d {version('bm3d')}",
                "two stages",
                lambda noisy, sigma, clean: bm3d(noisy, sigma),
            )
        case "tv":
            return Method(
                name, f"scikit-image {version('scikit-image')}", "oracle weight", total_variation_oracle
            )
        case _:
            raise InputError(f"there is no method {name!r}; choose among {', '.join(METHODS)}.")


def prior_digest(prior: PatchPrior) -> str:
    """Tell priors apart by what they compute: the network, its weights and how it is assembled."""
    settings = [type(prior.network).__name__, prior.network.settings(), prior.assembly, prior.boundary]
    weights = {name: tensor.cpu().contiguous() for name, tensor in prior.state_dict().items()}
    return _digest(json.dumps(settings, sort_keys=True).encode() + safetensors.torch.save(weights))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
