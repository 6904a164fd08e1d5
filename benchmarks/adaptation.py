"""What is gained by learning from the noisy image itself?  python -m benchmarks.adaptation

    y = x + sigma z                              x in 0..255 (one factor for a set of another range)
    before, after = PSNR of the one-step estimate of the prior that was given, and of the adapted one

on images of eight kinds, each adapted to by itself, with BM3D beside. With ``--sets``: 1, 3 or 10 noisy
images of a kind are adapted to at once, and what came of it is used on other images of that kind, beside
a prior that has learned from the same images without noise, in as many steps.

Images are central crops of at most 256 x 256 pixels, but the first texture, document and CT slice are
whole. They are chosen by content, or evenly spaced in the order of their names. A run that was stopped
goes on where it was; after a change of code under one version number, delete the table.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import patchscore as ps
from benchmarks.adaptation_jobs import GROUPS, Job, sets, single
from benchmarks.data import NamedImage, prepare_table, read_table, write_table
from benchmarks.quality import add_noise, prior_digest
from benchmarks.speed import machine
from patchscore.adaptation.adapt import Report, adapt
from patchscore.adaptation.search import AVERAGE, CROP, WARMUP
from patchscore.evaluation.baselines import bm3d
from patchscore.evaluation.metrics import psnr

RESULTS = Path("benchmarks/results")
DATA_RANGE = 255.0
# Of learning from clean images where nothing could be learned from noisy ones.
CLEAN_STEPS = 100


class Row(NamedTuple):
    """One image, denoised with a prior before and after it has learned from some.

    Attributes
    ----------
    group, image, sigma : what is denoised
    learned_from, images : "itself", "noisy" or "clean" images, and how many
    rate, limit : the first learning rate, and the most seconds
    seed : of the noise and of the adaptation
    version, input : of the code and the prior that was given; a digest of all clean images of the job
    before, after, bm3d : PSNR in dB, of 255; bm3d is nan where it was not run
    adapted : 1 if the prior was changed
    gain, error : what adaptation reports, as shares of the mean squared error; nan for clean images
    variance, correlation : of the residuals of the images learned from, the furthest from 1 and from 0
    steps, seconds : of learning; the steps are those kept
    machine : the processor and the number of threads
    """

    group: str
    image: str
    sigma: float
    learned_from: str
    images: int
    rate: float
    limit: float
    seed: int
    version: str
    input: str
    before: float
    after: float
    bm3d: float
    adapted: int
    gain: float
    error: float
    variance: float
    correlation: float
    steps: int
    seconds: float
    machine: str


KEY = Row._fields.index("before")
Key = tuple[str | int | float, ...]


class Learned(NamedTuple):
    """A prior that has learned, and how, as the columns of a row from ``adapted`` to ``seconds``."""

    prior: ps.PatchPrior
    adapted: int
    gain: float
    error: float
    variance: float
    correlation: float
    steps: int
    seconds: float


class Settings(NamedTuple):
    """What all jobs share."""

    prior: ps.PatchPrior
    seed: int
    limit: float


def main() -> None:
    """Measure one of the tables, and print its summary."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sets", action="store_true", help="noisy images of a kind, beside clean ones")
    parser.add_argument("--prior", default="natural-gray", metavar="NAME|FILE")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP")
    parser.add_argument("--sigmas", nargs="+", type=float, help="default: 15 25 50; 25 of other tables")
    parser.add_argument("--seconds", type=float, default=60.0, help="the most, of one adaptation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}/adaptation[-sets].csv")
    options = parser.parse_args()

    jobs_of = sets if options.sets else single
    out = options.out or RESULTS / f"adaptation{'-sets' if options.sets else ''}.csv"
    prepare_table(out)
    sigmas = options.sigmas or ([25.0] if options.sets else [15.0, 25.0, 50.0])
    settings = Settings(ps.load_prior(options.prior), options.seed, options.seconds)
    jobs = [job for group in options.groups for sigma in sigmas for job in jobs_of(group, sigma)]
    rows = measure(jobs, settings, out)
    by = ("group", "sigma", "images", "learned_from") if options.sets else ("group", "sigma")
    print(summary(rows, by))


def measure(jobs: Sequence[Job], settings: Settings, out: Path) -> list[Row]:
    """The rows of all jobs; those that the table holds are taken from it, others are written to it.

    Raises :class:`InputError` if ``out`` is another kind of file.
    """
    table: dict[Key, Row] = {row[:KEY]: row for row in read_table(out, Row)}
    version = f"patchscore {ps.__version__} prior {prior_digest(settings.prior)}"
    rows = []
    for job in tqdm(jobs, unit="job"):
        keys = _keys(job, settings, version)
        if not all(key in table for key in keys):
            table |= zip(keys, run(job, keys, settings), strict=True)
            write_table(out, Row._fields, sorted(table.values()))
        rows += [table[key] for key in keys]
    return rows


def run(job: Job, keys: Sequence[Key], settings: Settings) -> list[Row]:
    """Learn, and denoise the tests with what was given and with what was learned."""
    here = machine()
    where = f"{here.processor}, {here.torch_threads} threads"
    adapted, report = adapt(
        settings.prior,
        [_noisy(image, job.sigma, settings.seed) for image in job.shown],
        job.sigma,
        generator=torch.Generator().manual_seed(settings.seed),
        max_seconds=settings.limit,
        learning_rate=job.rate,
        progress=False,
    )
    learned = [from_noisy(adapted, report)]
    if job.also_clean:
        learned.append(from_clean(job, report, settings))
    rows: list[Row] = []
    for image in job.tests:
        y = _noisy(image, job.sigma, settings.seed)
        before = _quality(image, ps.denoise(y, job.sigma, prior=settings.prior))
        rival = _quality(image, bm3d(y, job.sigma)) if job.with_rival else math.nan
        for prior, *columns in learned:
            after = _quality(image, ps.denoise(y, job.sigma, prior=prior))
            rows.append(Row._make((*keys[len(rows)], before, after, rival, *columns, where)))
    return rows


def from_noisy(prior: ps.PatchPrior, report: Report) -> Learned:
    """What :func:`~patchscore.adaptation.adapt.adapt` has made and reported."""
    variances = [float(residual.variance) for residual in report.residuals]
    correlations = [float(value) for residual in report.residuals for value in residual.correlation]
    variance = max(variances, key=lambda variance: abs(variance - 1))
    correlation: float = max(correlations, key=abs)
    return Learned(
        prior,
        int(report.adapted),
        round(report.gain, 5),
        round(report.error, 5),
        round(variance, 4),
        round(correlation, 4),
        report.steps,
        round(report.seconds, 1),
    )


def from_clean(job: Job, report: Report, settings: Settings) -> Learned:
    """Denoising score matching on the clean images, in as many steps as the search went on for."""
    steps = report.checks[-1].step if report.checks else CLEAN_STEPS
    start = time.perf_counter()
    prior = copy.deepcopy(settings.prior).requires_grad_()
    clean = [image.pixels for image in job.shown]
    ps.fit(
        prior,
        clean,
        sigmas=(job.sigma, job.sigma),
        crop=min(CROP, *(side for pixels in clean for side in pixels.shape)),
        boundary="symmetric",
        steps=steps,
        batch_size=1,
        learning_rate=job.rate,
        warmup=WARMUP,
        average=AVERAGE,
        optimizer="soap",
        generator=torch.Generator().manual_seed(settings.seed),
        progress=False,
    )
    seconds = round(time.perf_counter() - start, 1)
    unknown = (math.nan,) * 4
    return Learned(prior.requires_grad_(False), 1, *unknown, steps, seconds)


def summary(rows: Sequence[Row], by: Sequence[str]) -> str:
    """A table in markdown of the mean gain, the worst image and the share adapted, by these columns."""
    head = [
        *by,
        "rows",
        "before",
        "gain",
        "worst",
        "adapted",
        "gain if adapted",
        "estimated",
        "BM3D gain",
    ]
    lines = [head, ["---"] * len(head)]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(getattr(row, column)) for column in by), []).append(row)
    for names, group in groups.items():
        gains = np.array([row.after - row.before for row in group])
        adapted = np.array([bool(row.adapted) for row in group])
        shares = [row.gain for row in group if row.adapted and row.gain < 1]
        estimated = -10 * np.log10(1 - np.array(shares))
        against = np.array([row.bm3d - row.before for row in group])
        lines.append(
            [
                *names,
                str(len(group)),
                f"{np.mean([row.before for row in group]):.2f}",
                f"{gains.mean():+.2f}",
                f"{gains.min():+.2f}",
                f"{adapted.sum()} of {len(group)}",
                f"{gains[adapted].mean():+.2f}" if adapted.any() else "",
                f"{estimated.mean():+.2f}" if shares else "",
                f"{against.mean():+.2f}" if np.isfinite(against).all() else "",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _keys(job: Job, settings: Settings, version: str) -> list[Key]:
    """The first columns of the rows of a job, in their order."""
    content = b"".join(image.pixels.tobytes() for image in (*job.shown, *job.tests))
    digest = hashlib.sha256(content).hexdigest()[:12]
    end = job.rate, settings.limit, settings.seed, version, digest
    kinds = ("noisy", "clean") if job.also_clean else ("itself",)
    return [
        (job.group, image.name, job.sigma, kind, len(job.shown), *end)
        for image in job.tests
        for kind in kinds
    ]


def _noisy(image: NamedImage, sigma: float, seed: int) -> np.ndarray:
    """With noise that belongs to the image, whichever table it is in."""
    return add_noise(image.pixels, sigma, seed=seed, number=zlib.crc32(image.name.encode()))


def _quality(image: NamedImage, estimate: np.ndarray) -> float:
    return round(psnr(image.pixels, estimate, data_range=DATA_RANGE), 4)


if __name__ == "__main__":
    main()
