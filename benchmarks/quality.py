"""PSNR and SSIM of denoisers on sets of photographs with white Gaussian noise.

    y = x + sigma z,  z ~ N(0, I)        x in 0..255; y is neither clipped nor quantised

Every method sees the same noise (:func:`benchmarks.data.add_noise`). Sets may be in colour (cbsd68): the
prior is then natural-color unless another is asked for, a prior with one channel denoises channel by
channel, and BM3D is its variant for colour. How long methods take is for the study speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

import patchscore as ps
from benchmarks.data import DATA_RANGE, NamedImage, add_noise, digest, images
from benchmarks.methods import Method, by_bm3d, by_total_variation, noisy_itself, one_step
from benchmarks.study import SEED, SIGMAS, Job, Option, Study
from benchmarks.tables import frame_of, markdown
from patchscore.errors import InputError
from patchscore.evaluation.metrics import psnr, ssim

METHODS = "patchscore", "bm3d", "tv"


class Row(NamedTuple):
    """One method on one image at one noise level; ``input`` is a digest of the clean and noisy image."""

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


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Every method on every image at every noise level, and the noisy image itself."""
    for set_name in options.sets:
        found = images(set_name)[: options.images]
        in_colour = found[0].pixels.ndim == 3
        methods = select_methods(options.methods, options.prior, in_colour=in_colour)
        yield from jobs_of(set_name, found, methods, options.sigmas, options.seed)


def jobs_of(
    set_name: str,
    found: Sequence[NamedImage],
    methods: Sequence[Method],
    sigmas: Sequence[float],
    seed: int,
) -> Iterator[Job]:
    """These methods on the images of one set."""
    for number, (name, clean) in enumerate(found):
        for sigma in sigmas:
            content = digest(clean, add_noise(clean, sigma, seed=seed, number=number))
            for method in methods:
                key = set_name, name, sigma, method.name
                depends = seed, method.version, method.estimate, content
                start = Row(*key, np.nan, np.nan, *depends)
                yield Job(partial(measure, start, clean, number, method), [(*key, *depends)])


def select_methods(names: Sequence[str], prior: str | None, *, in_colour: bool) -> list[Method]:
    """Build the methods of these names, after the noisy image itself, which is always measured.

    Raises :class:`InputError` if BM3D is asked for and missing, the prior cannot be loaded, or total
    variation is asked for in colour.
    """
    found = [noisy_itself()]
    for name in names:
        if name == "patchscore":
            chosen = prior or ("natural-color" if in_colour else "natural-gray")
            found.append(one_step(name, ps.load_prior(chosen)))
        elif name == "bm3d":
            found.append(by_bm3d(name))
        elif not in_colour:
            found.append(by_total_variation(name))
        else:
            raise InputError("total variation is for gray images; leave tv out of --methods.")
    return found


def measure(start: Row, clean: np.ndarray, number: int, method: Method) -> list[Row]:
    """The row of one method on one image."""
    noisy = add_noise(clean, start.sigma, seed=start.seed, number=number)
    estimate = method.run(noisy, start.sigma, clean)
    axis = -1 if clean.ndim == 3 else None
    similarity = ssim(clean, estimate, data_range=DATA_RANGE, channel_axis=axis)
    quality = psnr(clean, estimate, data_range=DATA_RANGE)
    return [start._replace(psnr=round(quality, 4), ssim=round(similarity, 5))]


def summary(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """A table of the means over the images of every set."""
    frame = frame_of(rows)
    lines = ["set", "method", "estimate"]
    means = frame.groupby([*lines, "sigma"], sort=False)[["psnr", "ssim"]].mean()
    cells = means.apply(lambda mean: f"{mean.psnr:.2f} / {mean.ssim:.3f}", axis=1)
    order = frame[lines].drop_duplicates()
    table = cells.unstack("sigma").loc[list(order.itertuples(index=False, name=None))].reset_index()
    table["set"] = [f"{name} ({frame[frame.set == name].image.nunique()})" for name in table["set"]]
    table.columns = [c if isinstance(c, str) else f"{c:g}" for c in table.columns]
    words = "PSNR in dB / SSIM, averaged over the images of the set, for noise of sigma of 255."
    return f"{markdown(table)}\n\n{words}"


STUDY = Study(
    "quality",
    __doc__,
    Row,
    key=("set", "image", "sigma", "method"),
    depends=("seed", "version", "estimate", "input"),
    jobs=jobs,
    summary=summary,
    options=(
        Option("sets", ("bsd68", "set12"), "sets of photographs, gray or in colour", quick=("set12",)),
        SIGMAS,
        Option("methods", METHODS, "denoisers", choices=METHODS),
        Option("images", None, "of every set, at most", quick=1, kind=int),
        Option("prior", None, "name or file; without it natural-gray or natural-color", kind=str),
        SEED,
    ),
)
