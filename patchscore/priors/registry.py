"""Which class a saved network belongs to: the name in the file, and the class registered under it.

    @patchscore.register
    class Quadratic(patchscore.Potential): ...

The library's own networks go by their plain name, all others by ``package.module.Name``, so that no two
can be mistaken for each other. Loading a file never imports anything: a file of weights runs no code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from patchscore.errors import InputError
from patchscore.priors.trainable import ScoreNetwork

LIBRARY = "patchscore."
MOST_FOR_ITS_SIZE = 1000  # what a size in the settings may be, plus 8 for each number in the file
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
    """The network of a :func:`described` dictionary, with these tensors, in float32 or float64.

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
    for key, values in tensors.items():
        if not bool(values.isfinite().all()):
            raise InputError(f"the weights {key!r} hold NaN or infinite numbers; train the prior again.")
    most = MOST_FOR_ITS_SIZE + 8 * sum(values.numel() for values in tensors.values())
    if any(number > most for number in _whole_numbers(settings)):
        raise InputError(f"the settings {settings} make a network of more numbers than the file holds.")
    build = partial(_classes[name].from_settings, settings)
    _check_shapes(build, tensors)
    precise = any(t.dtype == torch.float64 for t in tensors.values())
    network = build().to(torch.float64 if precise else torch.float32)
    network.load_state_dict(dict(tensors))
    return network.eval()


def _check_shapes(build: Callable[[], ScoreNetwork], tensors: Mapping[str, Tensor]) -> None:
    """An error if the network has other tensors; found without memory for them, of any size."""
    try:
        with torch.device("meta"):
            expected = {key: _form(t) for key, t in build().state_dict().items()}
    except (NotImplementedError, RuntimeError) as error:
        if "meta" in str(error):  # a class that reads its numbers while it is built
            return
        raise
    given = {key: _form(t) for key, t in tensors.items()}
    if different := sorted(k for k in expected.keys() | given if expected.get(k) != given.get(k)):
        key = different[0]
        raise InputError(
            f"the settings and the weights do not fit together: the file has {key!r} as "
            f"{given.get(key, 'nothing')}, and the settings make it {expected.get(key, 'nothing')}."
        )


def _form(values: Tensor) -> tuple[str | int, ...]:
    return ("floats" if values.is_floating_point() else str(values.dtype), *values.shape)


def _whole_numbers(settings: Any) -> Iterator[int]:
    """Those in settings, at any depth."""
    if isinstance(settings, int):
        yield settings
    elif isinstance(settings, list | dict):
        for entry in settings.values() if isinstance(settings, dict) else settings:
            yield from _whole_numbers(entry)


def _name(network_class: type[ScoreNetwork]) -> str:
    if network_class.__module__.startswith(LIBRARY):
        return network_class.__qualname__
    return f"{network_class.__module__}.{network_class.__qualname__}"
