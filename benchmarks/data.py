"""What the benchmarks read and write: folders of images in, tables of results out.

A set of images is a folder of gray 8-bit PNG files inside the folder that ``PATCHSCORE_DATA`` names.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import numpy as np

from patchscore.errors import InputError
from patchscore.files import image_files, read_image
from patchscore.storage import check_destination, replacing

BESIDE_THE_REPOSITORY = Path(__file__).resolve().parents[2] / "shared" / "data"


Line = TypeVar("Line", bound=NamedTuple)


class NamedImage(NamedTuple):
    """A gray image of a set: the stem of its file, and its (H, W) float64 pixels from 0 to 255."""

    name: str
    pixels: np.ndarray


def data_folder() -> Path:
    """Find the folder of image sets: ``PATCHSCORE_DATA``, else ``../shared/data`` if it is there.

    Raises
    ------
    InputError
        If there is no such folder.
    """
    variable = os.environ.get("PATCHSCORE_DATA")
    folder = Path(variable) if variable else BESIDE_THE_REPOSITORY
    if not folder.is_dir():
        raise InputError(
            f"there are no benchmark images: {folder} is not a folder. Set the environment variable "
            "PATCHSCORE_DATA to a folder with a sub-folder of gray 8-bit PNG files for each set "
            "(bsd68, set12, ...)."
        )
    return folder


def gray_images(set_name: str) -> list[NamedImage]:
    """Load a set, in the order of its file names.

    Raises
    ------
    InputError
        If the set is missing or empty, or an image is not gray with 8 bits.
    """
    folder = data_folder()
    if not (folder / set_name).is_dir():
        present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise InputError(
            f"there is no set {set_name!r} in {folder}; the sets there are: {', '.join(present)}."
        )
    images = []
    for path in image_files(folder / set_name):
        pixels = read_image(path).pixels
        if pixels.ndim != 2 or pixels.dtype != np.uint8:
            raise InputError(
                f"{path} has shape {pixels.shape} and dtype {pixels.dtype}; the benchmarks take gray "
                "8-bit images, so that their data range is 255."
            )
        images.append(NamedImage(path.stem, pixels.astype(np.float64)))
    return images


def prepare_table(path: Path) -> None:
    """Make the folder of a table, to be asked before long work.

    Raises :class:`InputError` if no file can be written there.
    """
    with suppress(OSError):  # the check says it better
        path.parent.mkdir(parents=True, exist_ok=True)
    check_destination(path)


def read_table(path: Path, kind: type[Line], name: str = "this benchmark") -> list[Line]:
    """Read a CSV file of named tuples of one kind; nothing if there is no file.

    Raises :class:`InputError` if it is another kind of file.
    """
    if not path.exists():
        return []
    types = get_type_hints(kind).values()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file)
        if tuple(header) != kind._fields:
            raise ValueError("its columns are different")
        return [kind(*(t(text) for t, text in zip(types, line, strict=True))) for line in lines]
    except ValueError as error:
        raise InputError(
            f"{path} is not a table of {name} ({error}); move it away, or write to another file with "
            "--out."
        ) from error


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file, whole or not at all."""
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
