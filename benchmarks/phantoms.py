"""Images of one disk: the maximum of the posterior beside the posterior mean, total variation and BM3D.

    y = x + sigma z,    z ~ N(0, I)
    Tweedie    y + sigma^2 s(y, sigma)
    MAP        argmax_x  log p_t(x) - |x - y|^2 / (2 sigma^2 + 2 t^2)

Two priors learn from the same 1000 phantoms for the same number of minutes: the 3 x 3 network of the
talk, patch by patch and without any invariance, and a 9 x 9 clique potential. The level t at which MAP
ends is chosen on other phantoms than those of the test. Gray values are given as (value - 1) / 0.1, in
units of the spread of the background; PSNR is of 1 in the unit of the talk.

Reference: J. A. Fessler, "Score-based priors for image reconstruction" (talk, 2023).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import patchscore as ps
from benchmarks.quality import add_noise
from patchscore.errors import InputError
from patchscore.evaluation.baselines import bm3d, has_bm3d, total_variation_oracle
from patchscore.evaluation.metrics import psnr
from patchscore.evaluation.phantoms import disks
from patchscore.inference.optimize import Solution
from patchscore.inference.schedules import geometric_levels

SIZE = 32
DATA_RANGE = 10.0
TRAINING_IMAGES, VALIDATION_IMAGES = 1000, 4
TRAINING, VALIDATION, TEST = range(3)
# The levels of training reach from well below the lowest t to above the noise of the test.
TRAINING_LEVELS = 0.02, 2.0
# t as a share of sigma: the candidates, and where annealing starts.
SHARES = 0.25, 0.1, 0.05
FIRST_SHARE, ANNEALING_LEVELS = 0.5, 3
MAX_STEPS, TOLERANCE = 150, 1e-3
BASELINES = "TV, oracle weight", "BM3D"


class Trained(NamedTuple):
    """A prior, what the tables call it, and what its results depend on."""

    name: str
    prior: ps.PatchPrior
    version: str


class Estimate(NamedTuple):
    """What a method makes of all test phantoms, (N, H, W); the rest is as in :class:`Row`."""

    method: str
    images: np.ndarray
    version: str
    levels: str = ""
    steps: int | None = None
    falls: Sequence[int | None] = ()


class Row(NamedTuple):
    """One test phantom, noise level and method.

    ``contrast`` is the range of the clean image. ``levels`` are those of MAP, from the first to the
    last, as shares of sigma. ``falls`` is the number of its ``steps`` in which the objective of this
    image fell; empty without a potential.
    """

    image: int
    contrast: float
    sigma: float
    method: str
    psnr: float
    levels: str
    steps: int | None
    falls: int | None
    seed: int
    version: str


class Difference(NamedTuple):
    """The mean of paired differences, and its standard error."""

    mean: float
    error: float


def train(folder: Path, *, minutes: float, seed: int) -> list[Trained]:
    """The two priors, read from the folder if they are there and trained into it if they are not.

    Raises
    ------
    InputError
        If a file is not a prior, or the minutes are not positive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = []
    for name, build, crop, batch_size in (
        ("3 x 3 network", _network_of_the_talk, 3, 256),
        ("9 x 9 potential", _clique_potential, 25, 16),
    ):
        path = folder / f"{name.replace(' ', '-')}-{minutes:g}-minutes-seed-{seed}.safetensors"
        if not path.exists():
            torch.manual_seed(seed)
            prior = build()
            ps.fit(
                prior,
                phantoms(TRAINING_IMAGES, TRAINING, seed),
                sigmas=TRAINING_LEVELS,
                crop=crop,
                batch_size=batch_size,
                minutes=minutes,
                generator=torch.Generator().manual_seed(seed),
            )
            prior.save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        prior = ps.PatchPrior.load(path)
        trained.append(Trained(name, prior, f"patchscore {ps.__version__} prior {digest}"))
    return trained


def measure(priors: Sequence[Trained], sigmas: Sequence[float], *, images: int, seed: int) -> list[Row]:
    """Every method on every test phantom at every noise level; BM3D where it is installed.

    Raises
    ------
    InputError
        If there are fewer than two images, or a noise level is not positive.
    """
    if images < 2:
        raise InputError(f"images is {images}; a standard error needs at least 2 test phantoms.")
    clean = phantoms(images, TEST, seed)
    contrasts = clean.amax((1, 2, 3)) - clean.amin((1, 2, 3))
    return [
        Row(
            number,
            round(float(contrasts[number]), 4),
            sigma,
            estimate.method,
            round(value, 4),
            estimate.levels,
            estimate.steps,
            estimate.falls[number] if estimate.falls else None,
            seed,
            estimate.version,
        )
        for sigma in sigmas
        for estimate in _estimates(priors, clean, sigma, seed)
        for number, value in enumerate(_psnrs(clean, estimate.images))
    ]


def difference(rows: Sequence[Row], sigma: float, method: str, baseline: str) -> Difference:
    """PSNR of a method less that of a baseline, over the same images, in dB."""
    values = {(row.image, row.method): row.psnr for row in rows if row.sigma == sigma}
    pairs = [
        value - values[image, baseline] for (image, name), value in values.items() if name == method
    ]
    return Difference(float(np.mean(pairs)), float(np.std(pairs, ddof=1) / np.sqrt(len(pairs))))


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Lines of text: noise level, method, levels, mean PSNR and the differences from the baselines."""
    groups: dict[tuple[float, str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row.sigma, row.method, row.levels), []).append(row.psnr)
    methods = {row.method for row in rows}
    return [
        [
            f"{sigma:g}",
            method,
            levels,
            f"{np.mean(values):.2f}",
            *(
                "{:+.2f} ± {:.2f}".format(*difference(rows, sigma, method, baseline))
                if baseline in methods - {method}
                else ""
                for baseline in BASELINES
            ),
        ]
        for (sigma, method, levels), values in groups.items()
    ]


def phantoms(count: int, which: int, seed: int) -> Tensor:
    """Phantoms for training, validation or test, in units of the background's spread."""
    generator = torch.Generator().manual_seed(3 * seed + which)
    return (disks(count, SIZE, generator=generator) - 1) / 0.1


def noisy(clean: Tensor, sigma: float, which: int, seed: int) -> Tensor:
    """Phantoms with noise: each has its own, however many there are."""
    return torch.stack(
        [
            torch.from_numpy(
                add_noise(image.numpy(), sigma, seed=seed, number=1_000_000 * which + n)
            ).to(image)
            for n, image in enumerate(clean)
        ]
    )


def maximum(prior: ps.PatchPrior, y: Tensor, sigma: float, shares: Sequence[float]) -> Solution:
    """MAP from the noisy image itself, at these shares of sigma in turn."""
    posterior = ps.Posterior(prior, ps.GaussianLikelihood(y, ps.Identity(), sigma))
    levels = [sigma * share for share in shares]
    return ps.map_estimate(
        posterior, y, sigma=levels, max_steps=MAX_STEPS, tolerance=TOLERANCE, progress=False
    )


def falls(solution: Solution) -> list[int | None]:
    """In how many steps the objective of each image fell; None without a potential."""
    within = solution.sigmas[1:] == solution.sigmas[:-1]
    fell = (np.diff(solution.objective, axis=0) < 0)[within].sum(0)
    known = np.isfinite(solution.objective).all(0)
    return [int(count) if there else None for count, there in zip(fell, known, strict=True)]


def best_share(prior: ps.PatchPrior, sigma: float, seed: int) -> float:
    """Where MAP should end, as a share of sigma: the best PSNR on the validation phantoms."""
    clean = phantoms(VALIDATION_IMAGES, VALIDATION, seed)
    y = noisy(clean, sigma, VALIDATION, seed)

    def quality(share: float) -> float:
        return float(np.mean(_psnrs(clean, maximum(prior, y, sigma, [share]).x[:, 0].numpy())))

    return max(SHARES, key=quality)


@torch.no_grad()
def _estimates(priors: Sequence[Trained], clean: Tensor, sigma: float, seed: int) -> Iterator[Estimate]:
    y = noisy(clean, sigma, TEST, seed)
    cases = [(a.numpy(), b.numpy()) for a, b in zip(y[:, 0], clean[:, 0], strict=True)]

    yield Estimate("noisy", y[:, 0].numpy(), f"numpy {np.__version__}")
    by_tv = np.stack([total_variation_oracle(a, sigma, b) for a, b in cases])
    yield Estimate(BASELINES[0], by_tv, f"scikit-image {version('scikit-image')}")
    if has_bm3d():
        by_bm3d = np.stack([bm3d(a, sigma) for a, _ in cases])
        yield Estimate(BASELINES[1], by_bm3d, f"bm3d {version('bm3d')}")
    for name, prior, code in priors:
        yield Estimate(f"Tweedie, {name}", prior.denoise(y, sigma)[:, 0].numpy(), code)
        share = best_share(prior, sigma, seed)
        for kind, shares in (
            ("MAP", [share]),
            ("annealed MAP", geometric_levels(FIRST_SHARE, share, ANNEALING_LEVELS)),
        ):
            solution = maximum(prior, y, sigma, shares)
            yield Estimate(
                f"{kind}, {name}",
                solution.x[:, 0].numpy(),
                code,
                " ".join(f"{share:.2g}" for share in shares),
                len(solution.residual) - len(shares),
                falls(solution),
            )


def _network_of_the_talk() -> ps.PatchPrior:
    network = ps.PatchMLP(
        3, scale_invariant=False, brightness_invariant=False, flip_invariant=False, turn_invariant=False
    )
    return ps.PatchPrior(network, assembly="mean")


def _clique_potential() -> ps.PatchPrior:
    return ps.PatchPrior(ps.PatchEnergy(9, width=128))


def _psnrs(clean: Tensor, estimates: np.ndarray) -> list[float]:
    return [
        psnr(truth.numpy(), estimate, data_range=DATA_RANGE)
        for truth, estimate in zip(clean[:, 0], estimates, strict=True)
    ]
