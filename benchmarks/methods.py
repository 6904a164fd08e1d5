"""Denoisers under test, behind one signature, with what their results depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import nn

import patchscore as ps
from benchmarks.data import DATA_RANGE, digest
from patchscore.errors import InputError
from patchscore.evaluation.baselines import bm3d, import_bm3d, total_variation_oracle
from patchscore.evaluation.epll import epll
from patchscore.priors.mixture import GaussianMixture

# Settings of a ConvEnergy that are newer than the committed rows, with the values they had all along.
IMPLIED = {
    "scale_invariant": True,
    "brightness_invariant": True,
    "offsets": "common",
    "flip_invariant": True,
    "turn_invariant": True,
}
Run = Callable[[np.ndarray, float, np.ndarray], np.ndarray]


class Method(NamedTuple):
    """A denoiser under test.

    Attributes
    ----------
    name : what the tables call it
    version : what its result depends on, beside the input
    estimate : which estimate of the clean image it returns
    run : (noisy, sigma, clean) -> denoised; only an oracle looks at the clean image
    """

    name: str
    version: str
    estimate: str
    run: Run


def blind(name: str, code: str, estimate: str, run: Callable[[np.ndarray, float], np.ndarray]) -> Method:
    """A method that does not see the clean image."""
    return Method(name, code, estimate, lambda noisy, sigma, clean: run(noisy, sigma))


def noisy_itself() -> Method:
    """The noisy image, as it is."""
    return blind("noisy", f"numpy {np.__version__}", "none", lambda noisy, sigma: noisy)


def one_step(name: str, prior: ps.PatchPrior) -> Method:
    """A prior, on gray images or on colour (H, W, 3); a gray one takes each channel by itself."""

    def run(noisy: np.ndarray, sigma: float) -> np.ndarray:
        axis = -1 if noisy.ndim == 3 else None
        denoised: np.ndarray = ps.denoise(noisy, sigma, prior=prior, channel_axis=axis)
        return denoised

    return blind(name, version_of(prior), "one-step", run)


def by_total_variation(name: str) -> Method:
    """Total variation with the weight that is best for the clean image."""
    return Method(
        name, f"scikit-image {version('scikit-image')}", "oracle weight", total_variation_oracle
    )


def by_bm3d(name: str) -> Method:
    """BM3D, and its variant for colour; :class:`InputError` if it is not installed."""
    package = import_bm3d()

    def run(noisy: np.ndarray, sigma: float) -> np.ndarray:
        if noisy.ndim == 2:
            return bm3d(noisy, sigma)
        # Its clipping and its thresholds take images of 0..1 for granted.
        denoised = package.bm3d_rgb(noisy / DATA_RANGE, sigma / DATA_RANGE)
        return DATA_RANGE * np.asarray(denoised)

    return blind(name, f"bm3d {version('bm3d')}", "two stages", run)


def by_epll(path: Path) -> Method:
    """EPLL with the mixture of a file; :class:`InputError` if the file is not a Gaussian mixture."""
    mixture = ps.PatchPrior.load(path).network
    if not isinstance(mixture, GaussianMixture):
        raise InputError(f"{path} is not a Gaussian mixture; train one with python -m benchmarks epll.")

    def run(noisy: np.ndarray, sigma: float) -> np.ndarray:
        y = torch.from_numpy(noisy / DATA_RANGE).to(mixture.like)[None, None]
        restored: np.ndarray = epll(y, sigma / DATA_RANGE, mixture)[0, 0].double().numpy() * DATA_RANGE
        return restored

    content = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return blind("epll", f"patchscore {ps.__version__} mixture {content}", "mode", run)


def prior_digest(prior: ps.PatchPrior) -> str:
    """Tell priors apart by what they compute: the network, its weights and how it is assembled."""
    network = prior.network.settings()
    if isinstance(prior.network, ps.ConvEnergy):
        network = {name: value for name, value in network.items() if IMPLIED.get(name) != value}
    settings = [type(prior.network).__name__, network, prior.assembly, prior.boundary]
    return digest(json.dumps(settings, sort_keys=True).encode() + _weights(prior))


def version_of(prior: Any) -> str:
    """What the results of a patch prior, or a prior of whole images, depend on: code and weights."""
    if isinstance(prior, ps.PatchPrior):
        found = prior_digest(prior)
    else:
        settings: list[object] = [type(prior.network).__name__, prior.network.settings()]
        settings += [prior.data_mean, prior.data_std, prior.invariant]
        found = digest(json.dumps(settings).encode() + _weights(prior.network))
    return f"patchscore {ps.__version__} prior {found}"


def _weights(module: nn.Module) -> bytes:
    weights = {name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}
    return safetensors.torch.save(weights)
