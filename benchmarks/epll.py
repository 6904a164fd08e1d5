"""Expected patch log likelihood, trained and measured here: python -m benchmarks.epll.

A mixture of 200 zero-mean Gaussians on 2 million 8 x 8 patches of the 400 images of ``bsd400``, their
means removed, and its PSNR and SSIM on ``bsd68``; Zoran and Weiss report 28.68 dB at noise level 25.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import gray_images
from benchmarks.quality import DATA_RANGE, Method, averages, measure
from patchscore import __version__
from patchscore.errors import InputError
from patchscore.evaluation.epll import epll
from patchscore.learning.mixture import MixtureFit, fit_mixture
from patchscore.priors.mixture import GaussianMixture
from patchscore.priors.prior import PatchPrior

PATCH_SIZE = 8


def main() -> None:
    """Train the mixture if it is not there, and measure EPLL with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixture", type=Path, default=Path("epll.safetensors"))
    parser.add_argument("--components", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--patches", type=int, default=2_000_000, help="default: %(default)s")
    parser.add_argument("--passes", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--set", default="bsd68", help="default: %(default)s")
    parser.add_argument("--sigmas", nargs="+", type=float, default=[15.0, 25.0, 50.0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/epll.csv"))
    options = parser.parse_args()

    if not options.mixture.exists():
        images = [image.pixels for image in gray_images("bsd400")]
        fit = train(images, options.components, patches=options.patches, passes=options.passes)
        print("log likelihood per patch:", *(f"{value:.2f}" for value in fit.log_likelihood[::10]))
        PatchPrior(fit.mixture, assembly="mean").save(options.mixture)
    rows = measure([options.set], options.sigmas, [method(options.mixture)], seed=0, out=options.out)
    for average in averages(rows):
        print(f"sigma {average.sigma:g}: {average.psnr:.2f} dB, SSIM {average.ssim:.4f}")


def train(
    images: Sequence[np.ndarray],
    components: int,
    *,
    patches: int,
    passes: int,
    batch_size: int = 40_000,
    seed: int = 0,
) -> MixtureFit:
    """Fit a mixture to random patches of images (H, W) in 0 .. 255; its unit is 1 for 255.

    Every image gives the same number of patches. They are spread over their quantisation interval:
    patches of one gray value only would draw components of no variance at all.
    """
    generator = torch.Generator().manual_seed(seed)
    cut = torch.cat([_random_patches(image, -(-patches // len(images)), generator) for image in images])
    return fit_mixture(
        cut,
        components,
        zero_mean=True,
        brightness_invariant=True,
        passes=passes,
        batch_size=batch_size,
        generator=generator,
        progress=True,
    )


def method(path: Path) -> Method:
    """EPLL with the mixture of a file, as a method of the quality benchmark.

    Raises :class:`InputError` if the file is not a Gaussian mixture.
    """
    mixture = PatchPrior.load(path).network
    if not isinstance(mixture, GaussianMixture):
        raise InputError(f"{path} is not a Gaussian mixture; train one with python -m benchmarks.epll.")

    def run(noisy: np.ndarray, sigma: float, clean: np.ndarray) -> np.ndarray:
        y = torch.from_numpy(noisy / DATA_RANGE).to(mixture.like)[None, None]
        restored: np.ndarray = epll(y, sigma / DATA_RANGE, mixture)[0, 0].double().numpy() * DATA_RANGE
        return restored

    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return Method("epll", f"patchscore {__version__} mixture {digest}", "mode", run)


def _random_patches(image: np.ndarray, count: int, generator: torch.Generator) -> Tensor:
    pixels = torch.from_numpy(image).float()
    windows = pixels.unfold(0, PATCH_SIZE, 1).unfold(1, PATCH_SIZE, 1)
    top, left = (torch.randint(size, (count,), generator=generator) for size in windows.shape[:2])
    patches = windows[top, left][:, None]
    return (patches + torch.rand(patches.shape, generator=generator) - 0.5) / DATA_RANGE


if __name__ == "__main__":
    main()
