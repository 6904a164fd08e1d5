"""Which class a saved network belongs to: the name in the file, and the class registered under it.

    @patchscore.register
    class Quadratic(patchscore.Potential): ...

The library's own networks go by their plain name, all others by ``package.module.Name``, so that no two
can be mistaken for each other. Loading a file never imports anything: a file of weights runs no code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from patchscore.errors import InputError
from patchscore.priors.trainable import ScoreNetwork

LIBRARY = "patchscore."
Network = TypeVar("Network", bound=ScoreNetwork)
_classes: dict[str, type[ScoreNetwork]] = {}


def register(network_class: type[Network], *, name: str | None = None) -> type[Network]:
    """Make the networks of a class ones that can be saved and loaded; a decorator.

    A file holds the name of the class, ``settings()`` and the tensors. To load it,
    ``from_settings(settings)`` builds the network: ``network_class(**settings)`` by default.

    Parameters
    ----------
    name
        One more name to load files under, such as one that the class had before.

    Raises
    ------
    InputError
        If the name belongs to another class.
    """
    for known in (_name(network_class), name):
        other = _classes.get(known or "", network_class)
        if _name(other) != _name(network_class):
            raise InputError(
                f"{known!r} is already the name of {_name(other)}, so {_name(network_class)} cannot be "
                "loaded under it; choose another name."
            )
        if known is not None:
            _classes[known] = network_class
    return network_class


def described(network: ScoreNetwork) -> dict[str, Any]:
    """Type and settings of a network, as a file holds them.

    Raises :class:`InputError` if the class is not registered.
    """
    name = _name(type(network))
    if name not in _classes:
        raise InputError(
            f"a {name} cannot be saved, because no file of it could be loaded. Register the class:\n\n"
            f"    @patchscore.register\n    class {type(network).__name__}(...):"
        )
    return {"type": name, **network.settings()}


def rebuilt(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ScoreNetwork:
    """The network of a :func:`described` dictionary, with these tensors and their precision.

    Raises :class:`InputError` if no class of that name is registered.
    """
    settings = dict(description)
    name = settings.pop("type")
    if name not in _classes:
        module, _, short = name.rpartition(".")
        known = ", ".join(sorted(known for known in _classes if "." not in known))
        raise InputError(
            f"the file holds a {short} of {module}, which is not registered here. Import {module} "
            f"first, with @patchscore.register above its class {short}; a file runs no code by itself."
            if module
            else f"the file holds a {name}; this version of patchscore knows {known}. A newer version "
            "may be needed."
        )
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    network = _classes[name].from_settings(settings).to(dtype)
    network.load_state_dict(dict(tensors))
    return network.eval()


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Raise an :class:`InputError` where settings and weights do not fit together."""
    try:
        yield
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"the settings and the weights in {path} do not fit together ({error}); it was not "
            "written by this version of patchscore."
        ) from error


def _name(network_class: type[ScoreNetwork]) -> str:
    if network_class.__module__.startswith(LIBRARY):
        return network_class.__qualname__
    return f"{network_class.__module__}.{network_class.__qualname__}"
