"""The images of :mod:`benchmarks.adaptation`, of eight kinds.

They are chosen by content or evenly spaced, gray, and in 0..255 (:mod:`benchmarks.data`). They are
central crops of at most 256 x 256 pixels, but the first texture, document and CT slice are whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.data import NamedImage, bundled, middle, test_images
from patchscore.evaluation.baselines import has_bm3d

SIDE = 256
WHOLE = 1024  # larger than any image
ALL = 10_000
SPACED = {
    "photographs": ("bsd68", 4),
    "OCT": ("oct_retina", 3),
    "electron microscopy": ("em_isbi2012", 3),
}
GROUPS = *SPACED, "buildings", "documents", "textures", "MRI", "CT"
BUILDINGS = {"set12": ("02",), "bsd68": ("test021", "test022", "test044")}
# Of the 20 documents: some for no table, those that --sets learns from, and those for tests.
UNUSED_DOCUMENTS, SHOWN_DOCUMENTS = 2, 12
COUNTS = 1, 3, 10
TESTS_OF_A_SET = 4


class Lesson(NamedTuple):
    """Images to adapt to at once, and those that the result is used on: all clean.

    ``also_clean`` asks for learning from the clean images as well, ``with_rival`` for BM3D.
    """

    group: str
    sigma: float
    shown: list[NamedImage]
    tests: list[NamedImage]
    also_clean: bool = False
    with_rival: bool = False


def single(group: str, sigma: float) -> Iterator[Lesson]:
    """Every test image of a group by itself."""
    for image in images(group):
        yield Lesson(group, sigma, [image], [image], with_rival=has_bm3d())


def sets(group: str, sigma: float) -> Iterator[Lesson]:
    """Some images of a kind, for other images of that kind."""
    match group:
        case "MRI" | "CT":
            folder = {"MRI": "mri_brain", "CT": "ct_chest"}[group]
            shown = load(f"{folder}/train", COUNTS[-1])
            tests = load(f"{folder}/test", TESTS_OF_A_SET)
        case "documents":
            documents = load("documents", ALL)
            shown = documents[UNUSED_DOCUMENTS:SHOWN_DOCUMENTS]
            tests = documents[SHOWN_DOCUMENTS:][:: (20 - SHOWN_DOCUMENTS) // TESTS_OF_A_SET]
        case _:
            return
    for count in COUNTS:
        yield Lesson(group, sigma, shown[:count], tests, also_clean=True)


def images(group: str) -> list[NamedImage]:
    """The test images of a group."""
    match group:
        case "buildings":
            wanted = {f"{folder}/{name}" for folder, names in BUILDINGS.items() for name in names}
            return [image for folder in BUILDINGS for image in load(folder, ALL) if image.name in wanted]
        case "documents":
            whole, other = load("documents", ALL, WHOLE)[SHOWN_DOCUMENTS::4]
            others = [other, *bundled("page", "text")]
        case "textures":
            whole, *others = bundled("brick", "grass", "gravel")
        case "CT":
            whole, *others = load("ct_chest/test", 3, WHOLE)
        case "MRI":
            return load("mri_brain/test", 2) + load("mri_t1_native", 2)
        case _:
            return load(*SPACED[group])
    return [whole, *(NamedImage(name, middle(pixels, SIDE)) for name, pixels in others)]


def load(folder: str, count: int, side: int = SIDE) -> list[NamedImage]:
    """Evenly spaced images of a folder, in 0..255, under names that say where they are from."""
    found = test_images(folder, count=count, side=side, seed=0)
    return [NamedImage(f"{folder}/{name}", pixels) for name, pixels in found]
