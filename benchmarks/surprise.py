"""What surprises a bundled prior, and is that calibrated?  python -m benchmarks.surprise

The expectation is learned from the 360 images of ``bsd400`` that the priors learned from, at noise
levels from 4/255 to 60/255. It is measured on the 40 held out, on which the statistic was chosen, beside
training slices of the medical sets and textures; and on sets that no choice was made on:

    exceed    images above the 95 % mark; of photographs 5 %, within binomial error (its 90 % interval)
    auc       P(an image of the set surprises more than a photograph of bsd68), at the same noise level

Images of 8 bits are taken as they are; medical images are stretched to 0..255, each by itself, so that a
noise level means about the same. ``--store`` writes the expectation into the file of the prior.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binom, mannwhitneyu
from tqdm import tqdm

import patchscore as ps
from benchmarks.data import data_folder, prepare_table, write_table
from benchmarks.natural_gray import split
from benchmarks.quality import add_noise
from patchscore.adaptation.surprise import KEY, Expectation, expect, surprise
from patchscore.errors import InputError
from patchscore.files import image_files, read_image
from patchscore.priors.zoo import SUFFIX, WEIGHTS, bundled_priors

LEVELS = 4 / 255, 60 / 255
SIGMAS = 15.0, 25.0, 50.0
PHOTOGRAPHS = "bsd400 held out", "bsd68"
SHIFTED = "ct_chest/test", "mri_brain/test", "mri_t1_native", "oct_retina", "em_isbi2012", "documents"
SEED = 0
COLUMNS = "prior", "set", "sigma", "images", "exceed", "expected_90", "median", "auc"


def main() -> None:
    """Learn what each prior expects, measure how it is surprised, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.surprise", description=__doc__)
    parser.add_argument("--priors", nargs="+", default=["natural-gray", "natural-gray-fast"])
    parser.add_argument("--store", action="store_true", help="write what is expected into the priors")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/surprise.csv"))
    options = parser.parse_args()

    prepare_table(options.out)
    rows = []
    for name in options.priors:
        prior = ps.load_prior(name, device="cpu")
        generator = torch.Generator().manual_seed(SEED)
        expectation = expect(prior, split()[0], sigmas=LEVELS, generator=generator)
        if options.store:
            store(prior, expectation, name)
        rows += measure(prior, expectation, name)
        write_table(options.out, COLUMNS, rows)
    for row in rows:
        print(*row, sep="\t")


def store(prior: ps.PatchPrior, expectation: Expectation, name: str) -> None:
    """Write the prior again, with what it expects in its card."""
    prior.card[KEY] = expectation.card()
    prior.save(str(WEIGHTS / f"{name}{SUFFIX}") if name in bundled_priors() else name)


def measure(prior: ps.PatchPrior, expectation: Expectation, name: str) -> list[tuple[str | float, ...]]:
    """The rows of one prior."""
    rows: list[tuple[str | float, ...]] = []
    values = {}
    for set_name in tqdm([*PHOTOGRAPHS, *SHIFTED], unit="set"):
        images = list(load(set_name))
        for sigma in SIGMAS:
            values[set_name, sigma] = found = np.array(
                [
                    surprise(
                        prior,
                        add_noise(clean, sigma, seed=SEED, number=number),
                        sigma,
                        expectation=expectation,
                    ).value
                    for number, clean in enumerate(images)
                ]
            )
            low, high = binom.interval(0.9, len(found), 0.05)
            calibrated = set_name in PHOTOGRAPHS
            rows.append(
                (
                    name,
                    set_name,
                    sigma,
                    len(found),
                    int((found > 1).sum()),
                    f"{low:.0f} to {high:.0f}" if calibrated else "",
                    round(float(np.median(found)), 3),
                    "" if calibrated else round(auc(found, values["bsd68", sigma]), 3),
                )
            )
    return rows


def auc(shifted: np.ndarray, usual: np.ndarray) -> float:
    """The area under the ROC curve, P(shifted > usual)."""
    return float(mannwhitneyu(shifted, usual).statistic / (len(shifted) * len(usual)))


def load(set_name: str) -> Iterator[np.ndarray]:
    """The images of a set, in 0..255."""
    if set_name == PHOTOGRAPHS[0]:
        yield from (255 * image for image in split()[1])
        return
    folder = data_folder() / set_name
    if not folder.is_dir():
        raise InputError(f"there is no set {set_name!r} in {data_folder()}.")
    for path in image_files(folder):
        if path.stem.endswith("_noisy"):  # of the pairs of oct_retina, the clean one
            continue
        pixels = read_image(path).pixels.astype(np.float64)
        if not set_name.startswith(("ct", "mri")):
            yield pixels
        else:
            yield 255 * (pixels - pixels.min()) / np.ptp(pixels)


if __name__ == "__main__":
    main()
