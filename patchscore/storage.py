"""Tensors and settings in one safetensors file, written whole or not at all.

The header holds the settings as JSON and a SHA-256 of settings and tensors, so that a truncated, foreign
or altered file is refused before anything is built from it. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from patchscore.errors import InputError


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], *, kind: str
) -> None:
    """Write tensors and settings to ``path``; ``kind`` names what the file is."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(settings, sort_keys=True)
    header = {"kind": kind, "settings": text, "sha256": _digest(plain, text)}
    with replacing(path) as beside:
        safetensors.torch.save_file(plain, beside, metadata=header)


def load_tensors(path: str | Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote: tensors on the CPU, and the settings.

    Raises :class:`InputError` if the file is missing, truncated, of another kind or altered.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated, or of another "
            "format."
        ) from error
    if header.get("kind") != kind:
        raise InputError(f"{path} is a safetensors file, but not a {kind}.")
    text = header.get("settings", "")
    if header.get("sha256") != _digest(tensors, text):
        raise InputError(
            f"{path} does not match its own checksum: it was damaged or altered after it was written; "
            "get a fresh copy."
        )
    return tensors, json.loads(text)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file beside ``path`` to write to; it replaces ``path`` at the end, unless an error occurs.

    Raises :class:`InputError` if the folder does not exist or cannot be written to.
    """
    path = Path(path)
    check_destination(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check_destination(path: str | Path) -> None:
    """Raise :class:`InputError` if no file can be written at ``path``; call it before long work."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file.")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}; create it first.")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror} ({path.parent}); use another folder."
        ) from error


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
