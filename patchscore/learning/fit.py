"""The training loop: from images to a prior.

At every step: crops x of random images, noise levels sigma log-uniform in a range, and one step of Adam
or SOAP on the objective (denoising score matching by default), its learning rate falling as half a
cosine. The weights that are kept are a moving average over the steps (Polyak and Juditsky, SIAM J.
Control Optim. 30 (1992)).

The size of the crops decides what the network becomes: of one patch, the score of the patch marginal;
larger, a clique potential, trained through the assembled score of the crop.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patchscore.errors import InputError
from patchscore.images import ImageSource, random_crop, training_images
from patchscore.learning.checkpoint import TrainingState
from patchscore.learning.history import History
from patchscore.learning.matching import denoising_score_matching
from patchscore.learning.soap import SOAP
from patchscore.priors.patches import Boundary
from patchscore.priors.trainable import Trainable
from patchscore.randomness import seeded
from patchscore.storage import check_destination

OPTIMIZERS = {"adam": torch.optim.Adam, "soap": SOAP}
STEPS_BETWEEN_REPORTS = 50
SECONDS_OF_TIMING = 2.0
MOST_TIMED = 1000

Prior = TypeVar("Prior", bound=Trainable)
Prior_contra = TypeVar("Prior_contra", bound=Trainable, contravariant=True)


class Objective(Protocol[Prior_contra]):
    """What is minimised: a scalar from crops (B, C, h, w) and noise levels (B,)."""

    def __call__(
        self, prior: Prior_contra, crops: Tensor, sigma: Tensor, /, *, generator: torch.Generator
    ) -> Tensor:
        """The scalar."""


def fit(
    prior: Prior,
    images: ImageSource,
    *,
    sigmas: tuple[float, float],
    crop: int = 40,
    boundary: Boundary = "open",
    steps: int | None = None,
    minutes: float | None = None,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    warmup: int = 0,
    average: float = 0.999,
    objective: Objective[Prior] = denoising_score_matching,
    optimizer: Literal["adam", "soap"] = "adam",
    mixed_precision: bool = False,
    generator: torch.Generator | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    progress: bool = True,
) -> History:
    """Train a prior on clean images, in place.

    Parameters
    ----------
    prior
        Its network is trained on the device and in the precision that it is in. The assembly of a
        :class:`PatchPrior` must fit the crops: ``"sum"`` for crops of at least 2 P - 1 pixels,
        ``"mean"`` for crops of P. Or a network for whole images
        (:class:`~patchscore.evaluation.networks.WholeImagePrior`), which takes any crops.
    images
        An array (N, H, W) or (N, H, W, C), a tensor (N, C, H, W), a list of arrays or tensors that may
        differ in size, or a folder of image files. Finite, not constant, at least as large as the crop.
    sigmas
        The lowest and the highest noise level, in the unit of the images. Levels are drawn
        log-uniformly between them, one for each crop.
    crop
        Side of the square crops in pixels.
    boundary
        What lies beyond a crop. ``"open"``: nothing, and only pixels that have all their cliques count.
        ``"symmetric"``: its mirror image, and all pixels count: cheaper where cliques see far, at the
        price of a slight bias. A network for whole images pads as it does, whatever is said here.
    steps, minutes
        How long: exactly one of the two. Minutes are turned into steps once, from the time that a few
        steps take on a copy, so that the schedule is known and a resumed run follows it.
    learning_rate, warmup
        The highest rate, and over how many steps it is reached.
    average
        Decay of the moving average of the weights; less at first, (1 + t) / (10 + t).
    objective
        See :mod:`patchscore.learning.matching`.
    optimizer
        ``"adam"``, or ``"soap"``: Adam where the gradients are uncorrelated
        (:mod:`patchscore.learning.soap`).
    mixed_precision
        Matrix products in bfloat16, weights and sums in float32: about twice as fast where the
        processor has bfloat16 instructions.
    generator
        All randomness of the run; on the CPU. Seed 0 if not given.
    checkpoint
        A file that the state is written to every ``checkpoint_every`` steps. If it exists, the run
        continues from it and ends with the same weights, to the last bit, as if it had never stopped.
    progress
        Whether a progress bar is shown.

    Returns
    -------
    History
        The loss of every step, to plot. The prior holds the averaged weights (also when the run was
        interrupted from the keyboard), and its card the settings of the run.

    Raises
    ------
    InputError
        If the images do not fit the settings, the assembly does not fit the crops, the checkpoint is
        of another run, or the loss stops being finite; the prior then has the weights it came with.
    """
    if (steps is None) == (minutes is None):
        raise InputError(f"steps is {steps} and minutes is {minutes}; give exactly one of the two.")
    generator = seeded(generator)
    low, high, learning_rate = float(sigmas[0]), float(sigmas[1]), float(learning_rate)
    _check_counts(crop=crop, steps=steps, batch_size=batch_size, checkpoint_every=checkpoint_every)
    _check(low, high, minutes, learning_rate, average)
    if not (isinstance(warmup, int | np.integer) and warmup >= 0):
        raise InputError(f"warmup is {warmup!r}; expected a whole number of steps, at least 0.")
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer is {optimizer!r}; choose one of {tuple(OPTIMIZERS)}.")
    network = prior.network
    if not any(True for _ in network.parameters()):
        raise InputError(f"{type(network).__name__} has no parameters, so there is nothing to train.")
    trained_on = prior.becomes(crop, boundary)
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None:
        check_destination(path)
    data = training_images(images, channels=network.channels, smallest=crop)
    run = {
        "network": prior.network_settings(),
        "dtype": str(network.like.dtype).removeprefix("torch."),
        "images": len(data),
        "digest": _digest(data),
        "sigmas": [low, high],
        "crop": int(crop),
        "boundary": boundary,
        "batch_size": int(batch_size),
        "learning_rate": learning_rate,
        "warmup": int(warmup),
        "average": average,
        "objective": _name(objective),
        "optimizer": optimizer,
        "mixed_precision": mixed_precision,
        **(
            {"minutes": float(minutes)}
            if steps is None and minutes is not None
            else {"steps": int(steps or 0)}
        ),
    }

    def next_loss(view: Prior, generator: torch.Generator) -> Tensor:
        clean = torch.stack([random_crop(data, crop, generator) for _ in range(batch_size)])
        u = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        sigma = low * (high / low) ** u
        like = view.network.like
        with torch.autocast(like.device.type, torch.bfloat16, enabled=mixed_precision):
            return objective(view, clean.to(like), sigma.to(like), generator=generator)

    before = copy.deepcopy(network.state_dict())
    network.requires_grad_()
    view = prior.with_boundary(boundary)
    if path is not None and path.exists():
        state = TrainingState.read(path, network, generator, run, OPTIMIZERS[optimizer])
    else:
        total = int(steps or _steps_in(60 * (minutes or 0), view, next_loss, generator, optimizer))
        state = TrainingState(network, generator, run, total, OPTIMIZERS[optimizer])
    rates = _half_cosine(learning_rate, state.total_steps, warmup)
    try:
        with tqdm(total=state.total_steps, initial=state.step, disable=not progress) as bar:
            losses = partial(next_loss, view, generator)
            _descend(state, losses, rates, average, path, checkpoint_every, bar)
    except InputError:
        network.load_state_dict(before)
        raise
    except KeyboardInterrupt:
        state.keep_average(trained_on)
        raise
    if path is not None:
        state.write(path)
    state.keep_average(trained_on)
    # What was expected of noisy images before (ps.surprise) is out of date.
    prior.card = {name: entry for name, entry in prior.card.items() if name != "surprise"} | {
        "training": {**run, "steps": state.total_steps, "seconds": round(state.seconds)},
        "trained": date.today().isoformat(),
    }
    return History(state.loss.cpu().numpy(), rates, state.seconds)


def _descend(
    state: TrainingState,
    next_loss: Callable[[], Tensor],
    rates: np.ndarray,
    average: float,
    path: Path | None,
    checkpoint_every: int,
    bar: tqdm,
) -> None:
    """All steps that are left; an error if the loss stops being finite."""
    while state.step < state.total_steps:
        decay = min(average, (1 + state.step) / (10 + state.step))
        state.update(next_loss(), float(rates[state.step]), decay)
        bar.update()
        due = path is not None and state.step % checkpoint_every == 0
        if due or state.step % STEPS_BETWEEN_REPORTS == 0 or state.step == state.total_steps:
            recent = state.loss[: state.step][-STEPS_BETWEEN_REPORTS:].mean().item()
            bar.set_postfix(loss=f"{recent:.4f}")
            if not math.isfinite(recent):
                raise InputError(
                    f"the loss is {recent} after {state.step} steps: training diverged; try a learning "
                    f"rate below {rates[0]:g}, and remove the checkpoint if there is one."
                )
        if path is not None and due:
            state.write(path)


def _check_counts(**counts: object) -> None:
    for name, value in counts.items():
        if value is not None and not (isinstance(value, int | np.integer) and value > 0):
            raise InputError(f"{name} is {value!r}; expected a positive whole number.")


def _check(
    low: float,
    high: float,
    minutes: float | None,
    learning_rate: float,
    average: float,
) -> None:
    if not (0 < low <= high < math.inf):
        raise InputError(
            f"sigmas is ({low}, {high}); expected the lowest and the highest noise level, positive, in "
            "the unit of the images."
        )
    for name, value in (("minutes", minutes), ("learning_rate", learning_rate)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} is {value}; expected a positive number.")
    if not 0 <= average < 1:
        raise InputError(f"average is {average}; expected a decay from 0 (none) to below 1.")


def _half_cosine(learning_rate: float, steps: int, warmup: int) -> np.ndarray:
    step = np.arange(steps)
    rates: np.ndarray = 0.5 * learning_rate * (1 + np.cos(np.pi * step / steps))
    return rates * np.minimum(1, (step + 1) / (warmup + 1))


def _name(objective: object) -> str:
    """The name of a function, also under ``functools.partial``: the same in every process."""
    return getattr(getattr(objective, "func", objective), "__name__", type(objective).__name__)


def _digest(data: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for image in data:
        digest.update(str(tuple(image.shape)).encode() + image.numpy().tobytes())
    return digest.hexdigest()[:16]


def _steps_in(
    seconds: float,
    view: Prior,
    next_loss: Callable[[Prior, torch.Generator], Tensor],
    generator: torch.Generator,
    optimizer: str,
) -> int:
    """How many steps fit in the time, measured on a copy that leaves no trace."""
    copied = copy.deepcopy(view)
    generator = generator.clone_state()
    state = TrainingState(copied.network, generator, {}, MOST_TIMED, OPTIMIZERS[optimizer])
    times: list[float] = []
    while len(times) < 3 or (sum(times) < min(SECONDS_OF_TIMING, seconds) and len(times) < MOST_TIMED):
        start = time.perf_counter()
        state.update(next_loss(copied, generator), learning_rate=0.0, decay=0.9)
        state.loss[state.step - 1].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return max(1, round(seconds / sorted(times)[len(times) // 2]))
