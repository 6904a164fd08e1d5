"""The images of the robustness benchmark: sets of files in 0..255, and phantoms.

    x = 255 v / q        q: the 99.9 % quantile of the set's training part, 255 for 8-bit files

One factor for a whole set keeps its images comparable, and brings every set to one data range. A large
image is cut to its middle. Where only some images of a set are asked for, they are evenly spaced in the
order of their names, as neighbours may show one patient. Phantoms are in units of the spread of their
background, as in :mod:`benchmarks.phantoms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import NamedImage, data_folder
from patchscore.errors import InputError
from patchscore.evaluation.phantoms import disks, rectangles
from patchscore.files import image_files, read_image

PHANTOMS: dict[str, Callable[..., Tensor]] = {"disks": disks, "rectangles": rectangles}
PHANTOM_SIZE, PHANTOM_RANGE = 32, 10.0
FILE_RANGE = 255.0
QUANTILE = 99.9
HELD_OUT_EVERY = 10

Item = TypeVar("Item")


class TrainingImages(NamedTuple):
    """What a method may learn from, and what its settings may be chosen on: (H, W) arrays."""

    learn: list[np.ndarray]
    choose: list[np.ndarray]


def data_range(set_name: str) -> float:
    """The range that PSNR and SSIM take for granted."""
    return PHANTOM_RANGE if set_name in PHANTOMS else FILE_RANGE


def test_images(set_name: str, *, count: int, side: int, seed: int) -> list[NamedImage]:
    """Some images of a set, (H, W) float64, at most ``side`` on a side.

    Raises
    ------
    InputError
        If there is no such set.
    """
    if set_name in PHANTOMS:
        return [
            NamedImage(f"{n:04d}", x) for n, x in enumerate(_phantoms(set_name, count, "test", seed))
        ]
    return [NamedImage(name, middle(pixels, side)) for name, pixels in spaced(_files(set_name), count)]


def training_images(set_name: str, *, count: int, seed: int) -> TrainingImages:
    """Images to learn from, and others of the training part to choose settings on.

    Of files every tenth is kept for choosing. Raises :class:`InputError` if there is no such set, or
    not as many images in it.
    """
    if set_name in PHANTOMS:
        learn, choose = (
            _phantoms(set_name, n, part, seed) for n, part in ((count, "train"), (8, "choose"))
        )
        return TrainingImages(learn, choose)
    files = [pixels for _, pixels in _files(set_name)]
    learn = [pixels for number, pixels in enumerate(files) if number % HELD_OUT_EVERY]
    if count > len(learn):
        raise InputError(
            f"{count} training images of {set_name} are asked for, and it has {len(learn)} (and "
            f"{len(files) - len(learn)} held out for choosing settings); ask for fewer."
        )
    return TrainingImages(spaced(learn, count), files[::HELD_OUT_EVERY][:8])


def real_pairs(set_name: str, *, count: int, side: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The name, the clean and the noisy image of real pairs: files ``X_clean`` and ``X_noisy``."""
    files = dict(_files(set_name, parts=("clean", "noisy")))
    names = [name.removesuffix("_clean") for name in files if name.endswith("_clean")]
    return [
        (name, middle(files[f"{name}_clean"], side), middle(files[f"{name}_noisy"], side))
        for name in spaced(names, count)
    ]


def middle(image: np.ndarray, side: int) -> np.ndarray:
    """The middle of an image, at most ``side`` pixels high and wide."""
    top, left = (max(0, (length - side) // 2) for length in image.shape)
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def _phantoms(set_name: str, count: int, part: str, seed: int) -> list[np.ndarray]:
    number = 10 * seed + ("train", "choose", "test").index(part)
    # Disks and rectangles of one seed would have the same gray values.
    number = 2 * number + list(PHANTOMS).index(set_name)
    generator = torch.Generator().manual_seed(number)
    # One by one, so that the first of them are the same however many there are.
    images = [PHANTOMS[set_name](1, PHANTOM_SIZE, generator=generator) for _ in range(count)]
    return [((image[0, 0].double() - 1) / 0.1).numpy() for image in images]


@lru_cache(maxsize=16)
def _files(set_name: str, parts: tuple[str, ...] = ("clean",)) -> list[tuple[str, np.ndarray]]:
    """The names and the pixels of a set; of real pairs the clean ones, if not told otherwise."""
    folder = data_folder() / set_name
    if not folder.is_dir():
        raise InputError(f"there is no set {set_name!r} in {data_folder()}.")
    factor = FILE_RANGE / _white(set_name)
    named = [(path.stem, path) for path in image_files(folder)]
    kept = [(n, p) for n, p in named if not n.endswith(("_clean", "_noisy")) or n.endswith(parts)]
    return [(name, factor * _gray(path)) for name, path in kept]


@lru_cache(maxsize=16)
def _white(set_name: str) -> float:
    """The value that becomes 255, from the training part if the set has one."""
    folder = data_folder() / set_name
    training = folder.parent / "train" if folder.name == "test" else folder
    images = [read_image(path).pixels for path in image_files(training)]
    if all(pixels.dtype == np.uint8 for pixels in images):
        return FILE_RANGE
    return float(np.percentile(np.concatenate([pixels.ravel() for pixels in images]), QUANTILE))


def _gray(path: Path) -> np.ndarray:
    pixels = read_image(path).pixels
    if pixels.ndim != 2:
        raise InputError(f"{path} has shape {pixels.shape}; the benchmark takes gray images.")
    return pixels.astype(np.float64)


def spaced(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` items, evenly spaced, with the first."""
    chosen = np.linspace(0, len(items), min(count, len(items)), endpoint=False).astype(int)
    return [items[number] for number in chosen]
