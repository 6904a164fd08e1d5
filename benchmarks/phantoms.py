"""MAP, Tweedie, total variation and BM3D on images of one disk.

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

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import patchscore as ps
from benchmarks.data import add_noise
from benchmarks.methods import Method, by_bm3d, by_total_variation, noisy_itself, version_of
from benchmarks.study import Job, Option, Study
from benchmarks.tables import frame_of, markdown
from patchscore.errors import InputError
from patchscore.evaluation.baselines import has_bm3d
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


class Estimate(NamedTuple):
    """What a method makes of all test phantoms, (N, H, W); the rest is as in :class:`Row`."""

    method: str
    images: np.ndarray
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


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Train what is not there yet; then every method on all test phantoms at every noise level.

    Raises :class:`InputError` if there are fewer than two images, or a file is not a prior.
    """
    if options.images < 2:
        raise InputError(f"images is {options.images}; a standard error needs at least 2 test phantoms.")
    trained = train(options.weights, minutes=options.minutes, seed=options.seed)
    yield from jobs_of(trained, options.sigmas, images=options.images, seed=options.seed)


def jobs_of(
    priors: Mapping[str, ps.PatchPrior], sigmas: Sequence[float], *, images: int, seed: int
) -> Iterator[Job]:
    """Every method; BM3D where it is installed."""
    tv, rival = BASELINES
    baselines = [noisy_itself(), by_total_variation(tv), *([by_bm3d(rival)] if has_bm3d() else [])]
    methods: list[tuple[tuple[str, ...], str, Callable[..., Iterator[Estimate]]]] = [
        ((method.name,), method.version, partial(_image_by_image, method)) for method in baselines
    ]
    for name, prior in priors.items():
        names = tuple(f"{kind}, {name}" for kind in ("Tweedie", "MAP", "annealed MAP"))
        methods.append((names, version_of(prior), partial(_by_prior, prior, names, seed)))
    for sigma in sigmas:
        for names, code, run in methods:
            keys = [(image, sigma, name, seed, code) for name in names for image in range(images)]
            yield Job(partial(measure, run, sigma, images, seed, code), keys)


def measure(
    run: Callable[..., Iterator[Estimate]], sigma: float, images: int, seed: int, code: str
) -> list[Row]:
    """The rows of one method or prior."""
    clean = phantoms(images, TEST, seed)
    contrasts = clean.amax((1, 2, 3)) - clean.amin((1, 2, 3))
    y = noisy(clean, sigma, TEST, seed)
    rows = []
    for method, estimates, levels, steps, fell in run(clean, y, sigma):
        for number, value in enumerate(_psnrs(clean, estimates)):
            contrast, fallen = round(float(contrasts[number]), 4), fell[number] if fell else None
            start = number, contrast, sigma, method, round(value, 4)
            rows.append(Row(*start, levels, steps, fallen, seed, code))
    return rows


def train(folder: Path, *, minutes: float, seed: int) -> dict[str, ps.PatchPrior]:
    """The two priors by their names: read from the folder, or trained into it if they are not there.

    Raises :class:`InputError` if a file is not a prior, or the minutes are not positive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = {}
    for name, build, crop, batch_size in (
        ("3 x 3 network", _network_of_the_talk, 3, 256),
        ("9 x 9 potential", lambda: ps.PatchPrior(ps.PatchEnergy(9, width=128)), 25, 16),
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
        trained[name] = ps.PatchPrior.load(path)
    return trained


def summary(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The mean PSNR of every method, and the paired differences from the baselines."""
    frame = frame_of(rows)
    lines = [["sigma", "method", "levels / sigma", "PSNR", *(f"over {name}" for name in BASELINES)]]
    for sigma, found in frame.groupby("sigma", sort=False):
        wide = found.pivot(index="image", columns="method", values="psnr")
        for (method, levels), values in found.groupby(["method", "levels"], sort=False):
            cells = [f"{sigma:g}", method, levels, f"{values.psnr.mean():.2f}"]
            for baseline in BASELINES:
                if baseline == method or baseline not in wide:
                    cells.append("")
                    continue
                gaps = wide[method] - wide[baseline]
                cells.append(f"{gaps.mean():+.2f} ± {gaps.sem():.2f}")
            lines.append(cells)
    counted = frame[frame.falls.notna()]
    return (
        f"{markdown(lines)}\n\nPSNR in dB, averaged over {frame.image.nunique()} phantoms; differences "
        f"are paired, with their standard errors.\nWith a potential MAP took "
        f"{counted.steps.sum():.0f} steps, image by image; its objective fell in "
        f"{counted.falls.sum():.0f} of them."
    )


def phantoms(count: int, which: int, seed: int) -> Tensor:
    """Phantoms for training, validation or test, in units of the background's spread."""
    generator = torch.Generator().manual_seed(3 * seed + which)
    return (disks(count, SIZE, generator=generator) - 1) / 0.1


def noisy(clean: Tensor, sigma: float, which: int, seed: int) -> Tensor:
    """Phantoms with noise: each has its own, however many there are."""
    found = [
        add_noise(image.numpy(), sigma, seed=seed, number=1_000_000 * which + n)
        for n, image in enumerate(clean)
    ]
    return torch.from_numpy(np.stack(found)).to(clean)


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


def _image_by_image(method: Method, clean: Tensor, y: Tensor, sigma: float) -> Iterator[Estimate]:
    pairs = zip(y[:, 0].numpy(), clean[:, 0].numpy(), strict=True)
    yield Estimate(method.name, np.stack([method.run(a, sigma, b) for a, b in pairs]))


@torch.no_grad()
def _by_prior(
    prior: ps.PatchPrior, names: Sequence[str], seed: int, clean: Tensor, y: Tensor, sigma: float
) -> Iterator[Estimate]:
    one_step, at_one_level, annealed = names
    yield Estimate(one_step, prior.denoise(y, sigma)[:, 0].numpy())
    share = best_share(prior, sigma, seed)
    for name, shares in (
        (at_one_level, [share]),
        (annealed, geometric_levels(FIRST_SHARE, share, ANNEALING_LEVELS)),
    ):
        solution = maximum(prior, y, sigma, shares)
        yield Estimate(
            name,
            solution.x[:, 0].numpy(),
            " ".join(f"{share:.2g}" for share in shares),
            len(solution.residual) - len(shares),
            falls(solution),
        )


def _network_of_the_talk() -> ps.PatchPrior:
    network = ps.PatchMLP(
        3, scale_invariant=False, brightness_invariant=False, flip_invariant=False, turn_invariant=False
    )
    return ps.PatchPrior(network, assembly="mean")


def _psnrs(clean: Tensor, estimates: np.ndarray) -> list[float]:
    return [
        psnr(truth.numpy(), estimate, data_range=DATA_RANGE)
        for truth, estimate in zip(clean[:, 0], estimates, strict=True)
    ]


STUDY = Study(
    "phantoms",
    __doc__,
    Row,
    key=("image", "sigma", "method"),
    depends=("seed", "version"),
    jobs=jobs,
    summary=summary,
    options=(
        Option("weights", Path("phantoms"), "folder of priors; those that are there are kept"),
        Option("minutes", 4.0, "of training of each prior", quick=0.05),
        Option("sigmas", (0.5, 1.0), "noise levels, in units of the background's spread", quick=(0.5,)),
        Option("images", 20, "phantoms to test on", quick=2),
        Option("seed", 0, "of phantoms, noise and training"),
    ),
)
