"""Does a colour prior pay, learned from four photographs?  python -m benchmarks.natural_color

The colour photographs that come with scikit-image are all that is at hand with clear terms. In two folds
a colour clique learns from two of them and is scored on the other two, one-step, beside the gray prior
applied to each channel. What decides whether a colour prior is worth bundling is the gain over the
latter, in dB over all channels, at noise that is independent between channels. With ``--bundle`` a prior
learns from all four, as it is bundled.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from skimage import data
from tqdm import tqdm

import patchscore as ps
from benchmarks.data import prepare_table, write_table
from benchmarks.natural_gray import weighted_score_matching
from benchmarks.quality import add_noise, prior_digest
from patchscore.evaluation.metrics import psnr
from patchscore.priors.energy import ConvEnergy

PHOTOGRAPHS = {
    "astronaut": data.astronaut,
    "chelsea": data.chelsea,
    "coffee": data.coffee,
    "rocket": data.rocket,
}
FOLDS = (("astronaut", "chelsea"), ("coffee", "rocket"))
SIGMAS = 15.0, 25.0, 50.0
SIDES, DILATIONS, WIDTH = (7, 3, 3), (1, 2, 3), 64
SEED = 0
CARD = {
    "data": "colour photographs that come with scikit-image, scaled to 0..1",
    "terms": "public domain or CC0, as the documentation of skimage.data says of each",
}


class Row(NamedTuple):
    """One photograph at one noise level; PSNR in dB, of 255, over all channels."""

    image: str
    sigma: float
    color: float
    gray_per_channel: float
    gray_prior: str
    minutes: float
    steps: int
    seed: int


def main() -> None:
    """Train on both folds, score, and print the gain."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.natural_color", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="of each fold; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/natural_color.csv"))
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("natural-color"),
        help="a folder of priors; those that are there are not trained again (default: %(default)s)",
    )
    parser.add_argument("--bundle", action="store_true", help="only train on all four photographs")
    options = parser.parse_args()
    prepare_table(options.out)
    options.weights.mkdir(exist_ok=True)
    if options.bundle:
        prior = trained(
            tuple(PHOTOGRAPHS), options.minutes, options.weights / "natural-color.safetensors"
        )
        print(f"{prior.card['training']['steps']} steps")
        return

    gray = ps.load_prior("natural-gray")
    rows = []
    for held_out, training in (FOLDS, FOLDS[::-1]):
        path = options.weights / f"{'-'.join(training)}.safetensors"
        prior = trained(training, options.minutes, path)
        steps = prior.card["training"]["steps"]
        for name in tqdm(held_out, unit="image"):
            for sigma in SIGMAS:
                color, per_channel = compare(PHOTOGRAPHS[name]().astype(float), sigma, prior, gray)
                digest = prior_digest(gray)
                rows.append(Row(name, sigma, color, per_channel, digest, options.minutes, steps, SEED))
    write_table(options.out, Row._fields, rows)
    print(summary(rows))


def trained(names: tuple[str, ...], minutes: float, path: Path) -> ps.PatchPrior:
    """A colour clique potential learned from these photographs, from its file if that is there."""
    if path.exists():
        return ps.load_prior(path)
    torch.manual_seed(SEED)
    network = ConvEnergy(SIDES, DILATIONS, channels=3, width=WIDTH)
    prior = ps.PatchPrior(network, card={"name": "natural-color", **CARD, "photographs": list(names)})
    ps.fit(
        prior,
        [PHOTOGRAPHS[name]() / 255 for name in names],
        sigmas=(1 / 255, 60 / 255),
        crop=80,
        boundary="symmetric",
        minutes=minutes,
        batch_size=4,
        learning_rate=8e-3,
        warmup=100,
        objective=weighted_score_matching,
        optimizer="soap",
        mixed_precision=True,
        generator=torch.Generator().manual_seed(SEED),
    )
    prior.save(path)
    return prior


def compare(
    clean: np.ndarray, sigma: float, color: ps.PatchPrior, gray: ps.PatchPrior
) -> tuple[float, float]:
    """PSNR of the colour prior, and of the gray prior on each channel."""
    noisy = add_noise(clean, sigma, seed=SEED, number=0)
    estimates = (ps.denoise(noisy, sigma, prior=prior, channel_axis=-1) for prior in (color, gray))
    first, second = (round(psnr(clean, estimate, data_range=255), 4) for estimate in estimates)
    return first, second


def summary(rows: list[Row]) -> str:
    """The gain of the colour prior at every noise level."""
    lines = []
    for sigma in SIGMAS:
        gains = np.array([row.color - row.gray_per_channel for row in rows if row.sigma == sigma])
        color = np.mean([row.color for row in rows if row.sigma == sigma])
        lines.append(
            f"sigma {sigma:g}: colour {color:.2f} dB, {gains.mean():+.2f} dB over channel by channel "
            f"({gains.min():+.2f} to {gains.max():+.2f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
