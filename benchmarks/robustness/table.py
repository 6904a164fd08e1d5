"""The tables of the robustness study: what was measured, and what the training cost.

    robustness.csv           one row per study, shift, training set, image, sigma, method and seed
    robustness-budget.csv    one row per method and training set

The first holds nothing that changes from run to run: the same seed and the same weights give the same
rows. Seconds are in the second.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

STUDIES = "phantoms", "gain", "content", "scanner", "geometry", "noise"
REFERENCE = "none"  # the shift of the rows that the others of a study are compared with
KEY = (
    *("study", "shift", "train_set", "training_images", "test_set"),
    *("image", "sigma", "method", "estimate", "seed"),
)
DEPENDS = "version", "input"


class Series(NamedTuple):
    """A method and what it has learned from; "" and 0 if from nothing here."""

    method: str
    estimate: str
    train_set: str = ""
    training_images: int = 0

    @property
    def learned(self) -> str:
        """What it has learned from, in words."""
        return f"{self.training_images} of {self.train_set}" if self.train_set else ""

    def __str__(self) -> str:
        return ", ".join(part for part in (self.method, self.estimate, self.learned) if part)


class Place(NamedTuple):
    """Where something was measured."""

    study: str
    shift: str
    sigma: float

    @property
    def name(self) -> str:
        """The shift, in words."""
        return "in distribution" if self.shift == REFERENCE else self.shift

    def __str__(self) -> str:
        return self.name if self.name.startswith(self.study) else f"{self.study}: {self.name}"


class Row(NamedTuple):
    """One method on one image under one shift.

    Attributes
    ----------
    study : one of ``STUDIES``
    shift
        What has changed since training: "none", "gain 0.1", "rotated 90", "ct_chest", "poisson", ...
    train_set, training_images : what the method has learned from; "" and 0 if it has not
    test_set, image : the set and the name of the image in it
    sigma
        The noise level before any gain: 0..255 for images of files, units of the background's spread
        for phantoms. For noise that is not white and Gaussian, its root mean square, or its estimate.
    method, estimate : the denoiser, and which estimate of the clean image it returns
    psnr, ssim
        In dB, and without unit. Of 255 (10 for phantoms); a gain or an offset is undone first.
    seed : of the noise, and of the samples of a method that draws some
    version : of the method: of its package, or a digest of its weights
    machine : the processor
    input : a digest of the clean and the noisy image and of the level that the method is told
    """

    study: str
    shift: str
    train_set: str
    training_images: int
    test_set: str
    image: str
    sigma: float
    method: str
    estimate: str
    psnr: float
    ssim: float
    seed: int
    version: str
    machine: str
    input: str

    @property
    def series(self) -> Series:
        """The method and what it has learned from."""
        return Series(self.method, self.estimate, self.train_set, self.training_images)

    @property
    def place(self) -> Place:
        """The study, the shift and the noise level."""
        return Place(self.study, self.shift, self.sigma)


class Budget(NamedTuple):
    """What it took to train or to tune a method.

    ``steps`` is of the optimiser, or the number of settings tried; ``tuned`` says what was tuned, how,
    and on which images.
    """

    method: str
    train_set: str
    training_images: int
    parameters: int
    training_seconds: float
    steps: int
    tuned: str
    machine: str


def budget_path(path: Path) -> Path:
    """The table of budgets that belongs to a table of rows: ``x.csv`` -> ``x-budget.csv``."""
    return path.with_name(f"{path.stem}-budget{path.suffix}")
