"""Read and write image files, PNG, JPEG, TIFF and NPY, in their own dtype and unit.

The alpha channel and the ICC profile are kept, the orientation is applied, other metadata is dropped.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from patchscore.errors import InputError
from patchscore.memory import check_memory, enough_memory
from patchscore.storage import check_destination, replacing


class ImageFile(NamedTuple):
    """The content of a file: pixels (H, W) or (H, W, C), alpha (H, W), ICC profile."""

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    profile: bytes | None = None


class _Format(NamedTuple):
    name: str
    dtypes: tuple[str, ...]
    channels: tuple[int, ...]
    alpha: bool


_INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
_NUMBERS = (*_INTEGERS, "float16", "float32", "float64")
_PNG = _Format("PNG", ("uint8", "uint16"), (1, 3), alpha=True)
_JPEG = _Format("JPEG", ("uint8",), (1, 3), alpha=False)
_TIFF = _Format("TIFF", _NUMBERS, (1, 2, 3, 4), alpha=True)
_NPY = _Format("NPY", _NUMBERS, (1, 2, 3, 4), alpha=False)
_FORMATS = {".png": _PNG, ".jpg": _JPEG, ".jpeg": _JPEG, ".tif": _TIFF, ".tiff": _TIFF, ".npy": _NPY}
_STARTS = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg", b"\x93NUMPY": ".npy"}
_STARTS |= dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), ".tif")
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # of its colour types
_ORIENTATION, _PROFILE = 274, 34675  # the numbers of the tags in EXIF and TIFF
SUFFIXES = tuple(_FORMATS)
COPIES = 3  # of the pixels, in memory while a file is read
_CheckRoom = Callable[[tuple[int, ...], float], None]


def read_image(path: str | Path, *, bytes_per_value: float = 0) -> ImageFile:
    """Read an image, upright, in the dtype and unit of the file.

    Palettes become RGB, white-is-zero TIFFs are inverted so that larger is brighter, and a JPEG with
    several pictures, as phones write them, gives the first. One channel is returned as (H, W), except
    for an NPY of shape (H, W, 1). The channels of an NPY are never an alpha.

    Parameters
    ----------
    bytes_per_value
        The memory that will be needed for each number of the image. An image that is too large is
        refused by its header.

    Raises
    ------
    InputError
        If the file is missing, empty, damaged, misnamed, of another format or too large for the memory
        that is free, or does not hold one image of 1 to 4 numeric channels (but a mask, a stack, CMYK,
        complex numbers, objects).
    """
    image = _read(Path(path), bytes_per_value)
    if image.pixels.dtype == bool:
        raise InputError(f"{path} is a 1-bit (boolean) image, a mask; expected at least 8-bit gray.")
    return image


def read_mask(path: str | Path) -> np.ndarray:
    """Where an image of any depth is not zero, in any channel: (H, W) booleans.

    Raises :class:`InputError` as :func:`read_image`, but not for 1-bit images.
    """
    pixels = _read(Path(path)).pixels
    return np.asarray(np.atleast_3d(pixels).any(axis=2))


def _read(path: Path, bytes_per_value: float = 0) -> ImageFile:
    """The image of a file, also a boolean one."""
    file_format = _format_of(path)
    read = {_PNG: _read_png, _JPEG: _read_jpeg, _TIFF: _read_tiff, _NPY: _read_npy}[file_format]
    try:
        with enough_memory(path):
            _check_content(path, file_format)
            return read(path, partial(_check_room, path, bytes_per_value))
    except InputError:
        raise
    except Exception as error:  # damaged bytes can raise anything in a decoder
        raise InputError(
            f"{path} cannot be read: {str(error) or repr(error)}. If it is damaged or cut short, get a "
            f"fresh copy; if not, save it again as a plain {file_format.name}."
        ) from error


def write_image(path: str | Path, image: ImageFile, *, dtype: DTypeLike) -> None:
    """Write an image in the format of the suffix; an existing file is replaced only when all is written.

    Values are clipped to the range of ``dtype``, and rounded for integers.
    The unit is not changed. JPEG uses quality 95 and no chroma subsampling; NPY drops the ICC profile.

    Raises
    ------
    InputError
        As :func:`check_writable`, if a pixel is NaN or infinite, or if the system cannot write.
    """
    path = Path(path)
    check_writable(path, image, dtype=dtype)
    if not np.isfinite(image.pixels).all():
        raise InputError(f"cannot write {path}: there are NaN or infinite pixels in the result.")
    parts = (image.pixels, image.alpha)
    samples = np.dstack([stored(part, np.dtype(dtype)) for part in parts if part is not None])
    samples = samples[..., 0] if samples.shape[2] == 1 else samples
    writers = {_PNG: _write_png, _JPEG: _write_jpeg, _TIFF: _write_tiff, _NPY: _write_npy}
    write = writers[_format_of(path)]
    with replacing(path) as beside, beside.open("wb") as file:
        write(file, samples, image)


def check_writable(path: str | Path, image: ImageFile, *, dtype: DTypeLike) -> None:
    """Check that ``write_image(path, image, dtype=dtype)`` can succeed, before any work is done.

    Raises
    ------
    InputError
        For an unknown suffix, a folder that is missing or read-only, a path that is a folder, or a
        format that cannot hold the dtype, the channels, the alpha or the size.
    """
    path, dtype = Path(path), np.dtype(dtype)
    file_format = _format_of(path)
    check_destination(path)
    _check_array(image.pixels, f"cannot write {path}: the image")
    if misfit := _misfit(file_format, image, dtype):
        others = [s for s in (".png", ".tif", ".npy") if not _misfit(_FORMATS[s], image, dtype)]
        advice = f"use {' or '.join(others)}" if others else "convert the image first"
        raise InputError(f"cannot write {path}: {file_format.name} cannot hold {misfit}; {advice}.")


def image_files(folder: str | Path) -> list[Path]:
    """The image files of a folder, sorted by name, without hidden files and subfolders.

    Raises
    ------
    InputError
        If the folder does not exist, is not a folder, or holds no image file.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # where Path.is_dir raises an error for some names
        wrong = f"{folder} is a file" if os.path.exists(folder) else f"there is no folder {folder}"
        raise InputError(f"{wrong}; give the folder that holds the images.")
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}.") from error
    visible = [p for p in inside if os.path.isfile(p) and not p.name.startswith(".")]
    files = [path for path in visible if path.suffix.lower() in SUFFIXES]
    if not files:
        raise InputError(f"the folder {folder} holds no image file ({' '.join(SUFFIXES)}).")
    return files


def _format_of(path: Path) -> _Format:
    if path.suffix.lower() not in SUFFIXES:
        ending = f"the suffix {path.suffix}" if path.suffix else "no suffix"
        raise InputError(f"{path} has {ending}; expected one of {' '.join(SUFFIXES)}.")
    return _FORMATS[path.suffix.lower()]


def _check_content(path: Path, file_format: _Format) -> None:
    """Check that the file exists and starts with the bytes of its format."""
    if not os.path.isfile(path):
        wrong = f"{path} is a folder" if os.path.isdir(path) else f"there is no file {path}"
        raise InputError(f"{wrong}; give the name of an image file.")
    with path.open("rb") as file:
        start = file.read(12)
    if not start:
        raise InputError(f"{path} is empty (0 bytes); get a fresh copy.")
    suffix = next((_STARTS[known] for known in _STARTS if start.startswith(known)), None)
    if suffix is None:
        raise InputError(
            f"{path} holds no {file_format.name} data (it starts with {start!r}), so it is damaged or "
            f"another kind of file; export it as {file_format.name}."
        )
    name = _FORMATS[suffix].name
    if name != file_format.name:
        raise InputError(f"{path} holds {name} data; rename it to {path.with_suffix(suffix).name}.")


def _check_array(array: np.ndarray, name: str | Path) -> None:
    """Check that it is one image of 1 to 4 numeric or boolean channels."""
    if array.dtype.kind not in "uifb":
        raise InputError(f"{name} holds {array.dtype} values; expected integers or floats.")
    if array.ndim not in (2, 3) or array.shape[2:] > (4,):
        raise InputError(
            f"{name} has shape {array.shape}; expected one image, (H, W) or (H, W, C) with C from 1 to "
            "4: put the channels last, and save the images of a stack separately."
        )
    if array.size == 0:
        raise InputError(f"{name} has shape {array.shape}: there are no pixels in it.")


def _check_room(path: Path, later: float, shape: tuple[int, ...], itemsize: float) -> None:
    """Check by the header of a file that there is memory to read it, and what is needed later."""
    what = f"{path} cannot be read: an image of {' x '.join(map(str, shape))} numbers"
    check_memory(max(COPIES * itemsize, later) * math.prod(shape), what)


def _image_file(
    path: Path, samples: np.ndarray, has_alpha: bool, profile: bytes | None, orientation: int
) -> ImageFile:
    """Apply the orientation tag, and separate the alpha."""
    samples = samples.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else samples
    samples = samples[::-1] if orientation in (3, 4, 7, 8) else samples
    samples = samples[:, ::-1] if orientation in (2, 3, 6, 7) else samples
    alpha = np.ascontiguousarray(samples[..., -1]) if has_alpha else None
    pixels = samples[..., :-1] if has_alpha else samples
    pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    _check_array(pixels, path)
    return ImageFile(np.ascontiguousarray(pixels), alpha, profile)


def _read_jpeg(path: Path, check_room: _CheckRoom) -> ImageFile:
    from PIL.JpegImagePlugin import JpegImageFile  # Image.open would refuse large images

    with JpegImageFile(path) as image:
        if image.mode not in ("L", "RGB"):
            raise InputError(f"{path} is a {image.mode} JPEG, made for print; convert it to RGB first.")
        check_room((image.height, image.width, len(image.mode)), 1)
        orientation = image.getexif().get(_ORIENTATION, 1)
        return _image_file(path, np.array(image), False, image.info.get("icc_profile"), orientation)


def _read_png(path: Path, check_room: _CheckRoom) -> ImageFile:
    import png
    from PIL.PngImagePlugin import PngImageFile

    with path.open("rb") as file, PngImageFile(path) as image:
        if image.n_frames > 1:
            raise InputError(f"{path} is an animation; save one of its images separately.")
        depth, colour = file.read(26)[24:]
        check_room((image.height, image.width, _PNG_CHANNELS[colour]), max(depth, 8) / 8)
        key = image.info.get("transparency")
        if colour == 3:
            samples = np.array(image.convert("RGB" if key is None else "RGBA"))
        elif depth == 16 and colour != 0:  # Pillow would reduce it to 8 bits
            file.seek(0)
            width, height, rows, _ = png.Reader(file=file).read()
            samples = np.vstack([np.asarray(row, np.uint16) for row in rows]).reshape(height, width, -1)
        else:
            samples = np.array(image, np.uint16 if depth == 16 else None)
        if key is not None and colour != 3:
            if depth < 8:  # Pillow widens the pixels to 8 bits, but not the key
                key = key * 255 // (2**depth - 1)
            opaque = (np.atleast_3d(samples) != key).any(axis=2)
            samples = np.dstack([samples, opaque * np.array(2 ** max(depth, 8) - 1, samples.dtype)])
        has_alpha = samples.shape[2:] in ((2,), (4,))
        orientation = image.getexif().get(_ORIENTATION, 1)
        return _image_file(path, samples, has_alpha, image.info.get("icc_profile"), orientation)


def _read_tiff(path: Path, check_room: _CheckRoom) -> ImageFile:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        size = page.imagelength * page.imagewidth * page.samplesperpixel
        shape = page.imagelength, page.imagewidth, page.samplesperpixel
        check_room(shape, max(page.bitspersample, 8) / 8)
        if len(file.series) > 1 or file.series[0].size != size:
            raise InputError(f"{path} holds several images or a volume; save one of them separately.")
        if max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))) > path.stat().st_size:
            raise EOFError("its end is missing")
        samples = page.asarray(squeeze=False)
        profile, orientation = page.tags.valueof(_PROFILE), page.tags.valueof(_ORIENTATION, 1)
    # (separate channels, depth, H, W, interleaved channels) -> (H, W, C)
    samples = np.moveaxis(samples[:, 0], 0, 2).reshape(*samples.shape[2:4], -1)
    unsigned = samples.dtype.kind in "ub"
    full = 2**page.bitspersample - 1 if unsigned else 1
    colours = tifffile.PHOTOMETRIC(page.photometric).name
    known = ["MINISBLACK", "RGB"] + ["MINISWHITE"] * unsigned
    if page.compression == tifffile.COMPRESSION.JPEG:
        known.append("YCBCR")  # tifffile has made it RGB
    if colours not in known:
        raise InputError(
            f"{path} holds {colours} {samples.dtype} pixels; convert it to plain gray or RGB."
        )
    if colours == "MINISWHITE":
        samples[..., 0] = full - samples[..., 0]
    alpha = page.extrasamples[-1] if page.extrasamples else 0  # 0 none, 1 multiplied in, 2 straight
    if alpha == 1 and (samples[..., -1] != full).any():
        raise InputError(f"{path} has colours multiplied by the alpha; export it with straight alpha.")
    return _image_file(path, samples, alpha != 0, profile, orientation)


def _read_npy(path: Path, check_room: _CheckRoom) -> ImageFile:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    _check_array(array, path)
    check_room(array.shape, array.itemsize)
    return ImageFile(np.array(array, array.dtype.newbyteorder("=")))


def _misfit(file_format: _Format, image: ImageFile, dtype: np.dtype) -> str:
    """What the format cannot hold of the image, in words; empty if it can hold all."""
    _, dtypes, channels, alpha = file_format
    height, width, count = (*image.pixels.shape, 1)[:3]
    if dtype.name not in dtypes:
        return f"{dtype} (it holds {', '.join(dtypes)})"
    if count not in channels:
        return f"{count} channels (it holds {' or '.join(map(str, channels))})"
    if image.alpha is not None and not alpha:
        return "an alpha"
    if file_format is _JPEG and max(height, width) > 65500:
        return f"{height} x {width} pixels (at most 65500 on a side)"
    return ""


def stored(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Clip to the range of a dtype, and round to integers."""
    if values.dtype == dtype:
        return values
    if dtype.kind == "f":
        return values.clip(np.finfo(dtype).min, np.finfo(dtype).max).astype(dtype)
    limits = np.iinfo(dtype)
    # The cast drops the fraction; the largest int64 or uint64 itself is no float64.
    below = np.nextafter(float(limits.max + 1), 0)
    return np.rint(values.astype(np.float64)).clip(limits.min, below).astype(dtype)


def _write_png(file: BinaryIO, samples: np.ndarray, image: ImageFile) -> None:
    """Write 8 or 16 bits, each row as its difference from the row above (filter 2)."""
    import png

    height, width = samples.shape[:2]
    colour = {(): 0, (2,): 4, (3,): 2, (4,): 6}[samples.shape[2:]]
    rows = samples.astype(samples.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    filtered = np.insert(np.diff(rows, axis=0, prepend=np.uint8(0)), 0, 2, axis=1)
    data = zlib.compress(filtered.data)
    chunks = [(b"IHDR", struct.pack("!2I5B", width, height, 8 * samples.itemsize, colour, 0, 0, 0))]
    if image.profile:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(image.profile)))
    chunks += [(b"IDAT", data[start : start + 2**30]) for start in range(0, len(data), 2**30)]
    png.write_chunks(file, [*chunks, (b"IEND", b"")])


def _write_jpeg(file: BinaryIO, samples: np.ndarray, image: ImageFile) -> None:
    from PIL import Image

    picture = Image.fromarray(samples)
    picture.save(file, format="JPEG", quality=95, subsampling="4:4:4", icc_profile=image.profile)


def _write_tiff(file: BinaryIO, samples: np.ndarray, image: ImageFile) -> None:
    import tifffile

    channels = (*image.pixels.shape, 1)[2]
    colours = 3 if channels >= 3 else 1
    tifffile.imwrite(
        file,
        samples,
        photometric="rgb" if colours == 3 else "minisblack",
        planarconfig="contig" if samples.ndim == 3 else None,
        extrasamples=["unspecified"] * (channels - colours) + ["unassalpha"] * (image.alpha is not None),
        extratags=[(_PROFILE, 7, None, image.profile, True)] * bool(image.profile),
        metadata=None,
    )


def _write_npy(file: BinaryIO, samples: np.ndarray, image: ImageFile) -> None:
    np.save(file, samples.reshape(image.pixels.shape))
