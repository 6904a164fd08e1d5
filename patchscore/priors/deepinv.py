"""Priors for the algorithms of deepinv: the door, which imports deepinv when it is opened.

Reference: Tachella et al., "DeepInverse: A Python package for solving imaging inverse problems with deep
learning", JOSS 10 (2025).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from patchscore.checks import check_positive
from patchscore.errors import InputError
from patchscore.protocols import Score

if TYPE_CHECKING:
    from patchscore.priors.deepinv_models import ScoreDenoiser


def as_deepinv(prior: Score, *, highest_sigma: float | None = None) -> ScoreDenoiser:
    """A prior as a denoiser and as a regulariser for the algorithms of deepinv.

    ``as_deepinv(prior)`` is a ``deepinv.models.Denoiser``, for ``PnP``, ``RED`` and ``ScorePrior``, and
    so for its optimisers and Langevin samplers, for ``DPIR`` and ``DDRM``. ``as_deepinv(prior).prior()``
    is the energy -log p_sigma as a ``deepinv.optim.Prior``, with values for line searches.

    Parameters
    ----------
    prior
        A :class:`PatchPrior` or another score. It is copied: yours stays as it is, and the copy follows
        the dtype and the device of the images. A gray prior takes images of any number of channels and
        sees each by itself.
    highest_sigma
        The highest noise level to accept, in the unit of the images; ``math.inf`` accepts all. By
        default 4.5 times the highest trained level. For the bundled gray priors that is 1.06, for images
        in 0..1, the range that deepinv works in; for 8-bit images give 255 times as much.

    Returns
    -------
    denoiser
        ``denoiser(x, sigma)`` is the one-step posterior mean of x, (B, C, H, W), in the dtype of x.
        sigma is a number, or a tensor with one element or with one for each image, such as (B,) or
        (B, 1, 1, 1). Where it is zero, x is returned. For complex images:
        ``deepinv.models.to_complex_denoiser(denoiser)``.

    Raises
    ------
    InputError
        If deepinv cannot be imported. The denoiser raises it for a noise level that is too high or that
        varies within an image, and for an image that does not fit the prior.

    Notes
    -----
    Diffusion samplers begin at noise far above the image. A prior that ignores brightness then cannot
    know how bright the image is, and DPS from sigma 80 ends far from it. Start at
    ``denoiser.highest_sigma``; ``DDRM(denoiser)`` starts at 1 by default, which works for the bundled
    gray priors. DiffPIR always starts at 80; use DPIR or DDRM instead.

    Below the lowest trained level the prior is used as it is, since only x / sigma matters to it. It
    then removes almost nothing of the noise, which is too weak to be seen.
    """
    if highest_sigma is not None and highest_sigma != math.inf:
        check_positive(highest_sigma=highest_sigma)
    try:
        from patchscore.priors.deepinv_models import ScoreDenoiser
    except (ImportError, RuntimeError, OSError) as error:  # torchvision of another torch: RuntimeError
        raise InputError(
            f"deepinv cannot be imported ({str(error).splitlines()[0]}). Install it with pip install "
            "'patchscore[inverse]'. If it is torchvision that fails, install the torchvision that "
            "belongs to your torch, from the same place."
        ) from error
    return ScoreDenoiser(prior, highest_sigma)
