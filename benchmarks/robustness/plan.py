"""What the robustness benchmark measures: its tasks, in a full and in a quick size.

    task = study x shift x test set x noise level x contender        over the images of the test set

Untrained and classical contenders are measured under every shift of a study, the trained ones
under the shifts of their training set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.data import PHANTOMS
from benchmarks.robustness.contenders import (
    ADAPTED,
    BUNDLED,
    EPLL,
    NLM,
    ONE_STEP,
    ORACLE,
    SAMPLES,
    TUNED,
    TUNING_IMAGES,
    TV,
    is_slow,
)
from benchmarks.robustness.shifts import GAIN_SHIFTS, GEOMETRY_SHIFTS, NOISE_SHIFTS, REAL
from benchmarks.robustness.table import REFERENCE, Series
from benchmarks.robustness.training import CNN, DDPM, INVARIANT_UNET, NO_INVARIANCE, PATCH_PRIOR, UNET
from patchscore.evaluation.baselines import has_bm3d

PHOTOGRAPHS = "bsd400"
BUNDLED_IMAGES = 360
OTHER_SETS = (
    "mri_brain/test",
    "mri_t1_native",
    "ct_chest/test",
    "oct_retina",
    "em_isbi2012",
    "documents",
)
SHIFTS = {"gain": GAIN_SHIFTS, "geometry": GEOMETRY_SHIFTS, "noise": (*NOISE_SHIFTS, REAL)}
PAIRS = "oct_retina"  # real pairs of noisy and clean scans


class Size(NamedTuple):
    """How much is measured.

    Attributes
    ----------
    images, phantoms, slow : of every test set; ``slow`` for slow methods
    side : of the middle that is cut from larger images, in pixels
    sigmas, phantom_sigmas : noise levels of the studies of content, scanners and phantoms
    sigma : the noise level of the other studies, and of slow methods
    phantom_counts, photograph_counts, mri_counts, ct_counts : numbers of training images
    learned : number of training images, in the studies of gain, geometry and noise
    references : test sets of photographs
    """

    images: int = 12
    phantoms: int = 20
    slow: int = 6
    side: int = 128
    sigmas: tuple[float, ...] = (15.0, 25.0, 50.0)
    phantom_sigmas: tuple[float, ...] = (0.5, 1.0)
    sigma: float = 25.0
    phantom_counts: tuple[int, ...] = (10, 100, 1000)
    photograph_counts: tuple[int, ...] = (10, 100, 360)
    mri_counts: tuple[int, ...] = (10, 55)
    ct_counts: tuple[int, ...] = (10, 27)
    learned: int = 100
    references: tuple[str, ...] = ("bsd68", "set12")


FULL = Size()
QUICK = Size(
    images=4,
    phantoms=8,
    slow=1,
    side=64,
    sigmas=(25.0,),
    phantom_sigmas=(0.5,),
    phantom_counts=(10,),
    photograph_counts=(10, 100),
    mri_counts=(10,),
    ct_counts=(10,),
    references=("bsd68",),
)


class Task(NamedTuple):
    """One contender on some images of a set under one shift at one noise level.

    A slow contender is measured on ``images`` of the ``among`` that others are measured on, with the
    same noise.
    """

    study: str
    shift: str
    test_set: str
    sigma: float
    contender: Series
    images: int
    among: int
    side: int
    seed: int


def tasks(size: Size, studies: Sequence[str], *, mixture: Path | None, seed: int) -> list[Task]:
    """All tasks of these studies, once each."""
    found = [
        Task(study, shift, test_set, sigma, contender, min(most, among), among, size.side, seed)
        for study in studies
        for train_set, shift, test_set, sigmas, networks in _conditions(study, size)
        for sigma in sigmas
        for among in [size.phantoms if test_set in PHANTOMS else size.images]
        for contender in (*_classical(train_set, test_set, mixture), *networks)
        for most in [size.slow if is_slow(contender) else among]
        if not is_slow(contender) or sigma in (size.sigma, *size.phantom_sigmas)
    ]
    return list(dict.fromkeys(found))


# The training set, the shift, the test set, the noise levels, and the networks.
Condition = tuple[str, str, str, tuple[float, ...], list[Series]]


def _conditions(study: str, size: Size) -> Iterator[Condition]:
    match study:
        case "phantoms":
            for train_set, other in (("disks", "rectangles"), ("rectangles", "disks")):
                networks = _networks(train_set, size.phantom_counts)
                yield train_set, REFERENCE, train_set, size.phantom_sigmas, networks
                yield train_set, f"{train_set} to {other}", other, size.phantom_sigmas, networks
        case "content":
            networks = [BUNDLED_PRIOR, *_networks(PHOTOGRAPHS, size.photograph_counts)]
            for test_set in (*size.references, *OTHER_SETS):
                inside = test_set in size.references
                shift = REFERENCE if inside else test_set.removesuffix("/test")
                yield PHOTOGRAPHS, shift, test_set, size.sigmas, networks
        case "scanner":
            for scanner, counts, others in (
                ("mri_brain", size.mri_counts, ("ct_chest/test", "mri_t1_native")),
                ("ct_chest", size.ct_counts, ("mri_brain/test",)),
            ):
                train_set = f"{scanner}/train"
                networks = [BUNDLED_PRIOR, *_networks(train_set, counts)]
                yield train_set, REFERENCE, f"{scanner}/test", size.sigmas, networks
                for other in others:
                    shift = f"{scanner} to {other.removesuffix('/test')}"
                    yield train_set, shift, other, size.sigmas, networks
        case _:
            networks = [BUNDLED_PRIOR, *_networks(PHOTOGRAPHS, (size.learned,))]
            networks = [c for c in networks if SAMPLES.get(c.estimate, 1) == 1]  # many samples are dear
            if study == "noise":  # under another content: the study adaptation, on larger images
                networks.append(BUNDLED_PRIOR._replace(method=ADAPTED))
            if study == "gain":
                networks.append(Series(NO_INVARIANCE, ONE_STEP, PHOTOGRAPHS, size.learned))
            for shift in (REFERENCE, *SHIFTS[study]):
                test_set = PAIRS if shift == REAL else size.references[0]
                yield PHOTOGRAPHS, shift, test_set, (size.sigma,), networks


BUNDLED_PRIOR = Series(BUNDLED, ONE_STEP, PHOTOGRAPHS, BUNDLED_IMAGES)


def _networks(train_set: str, counts: Sequence[int]) -> list[Series]:
    return [
        Series(network, estimate, train_set, count)
        for count in counts
        for network, estimate in (
            (PATCH_PRIOR, ONE_STEP),
            (CNN, ONE_STEP),
            (UNET, ONE_STEP),
            (INVARIANT_UNET, ONE_STEP),
            *((DDPM, estimate) for estimate in (ONE_STEP, *SAMPLES)),
        )
    ]


def _classical(train_set: str, test_set: str, mixture: Path | None) -> list[Series]:
    contenders = [
        Series("noisy", "none"),
        Series(TV, ORACLE),
        *(Series(method, TUNED[method], train_set, TUNING_IMAGES) for method in (TV, NLM)),
        Series("wavelets", "BayesShrink"),
    ]
    if has_bm3d():
        contenders.append(Series("BM3D", "two stages"))
    if mixture is not None and test_set not in PHANTOMS:
        contenders.append(Series(EPLL, "mode"))
    return contenders
