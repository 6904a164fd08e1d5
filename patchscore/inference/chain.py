"""What a sampler leaves behind: draws, or their running mean and variance, and how to go on from there.

    mean_n = mean_{n-1} + (x_n - mean_{n-1}) / n
    m2_n   = m2_{n-1} + (x_n - mean_{n-1}) (x_n - mean_n),        variance = m2 / (n - 1)

Reference: Welford, Technometrics 4 (1962), pages 419-420.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from patchscore.errors import InputError
from patchscore.figures import as_html, chain_figure, counted, image_size
from patchscore.inference.mixing import mixing_summary
from patchscore.storage import load_tensors, save_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Keep = Literal["samples", "moments"]
KIND = "patchscore chain"
SHOWN = 4  # draws in the figure
# Of the free memory, what samples may take: the sampler and the user's code need some too.
SHARE_OF_MEMORY = 0.8


class Chain(NamedTuple):
    """Draws of B images, in one Markov chain each or independent of each other.

    Attributes
    ----------
    samples
        (n, B, C, H, W), in the order of drawing; None if only moments were kept.
    mean, variance
        (B, C, H, W), of all n draws; the variance has n - 1 in its denominator.
    draws : n
    state
        (B, C, H, W): where a chain stands, to go on from.
    steps : that the sampler has made, burn-in included
    burn_in : steps that were not recorded
    step_size : (B,), h of a Langevin step; NaN for samplers that have none
    acceptance
        (B,): the share of proposals taken since the burn-in; NaN where everything is.
    evaluations : of the score, each of B images
    seconds : wall-clock time, over all sittings
    reason : why it stopped
    generator_state : of the random numbers, to go on from
    """

    samples: Tensor | None
    mean: Tensor
    variance: Tensor
    draws: int
    state: Tensor
    steps: int
    burn_in: int
    step_size: Tensor
    acceptance: Tensor
    evaluations: int
    seconds: float
    reason: str
    generator_state: Tensor

    @property
    def std(self) -> Tensor:
        """The standard deviation of every pixel, (B, C, H, W)."""
        return self.variance.sqrt()

    def plot(self) -> Figure:
        """Mean, standard deviation and up to four draws of the first image.

        Without any draws, where the chain stands.
        """
        center = self.mean if self.draws else self.state
        name = {0: "state, no draw yet", 1: "the only draw"}.get(self.draws, "mean")
        draws = {}
        if self.samples is not None and self.draws > 1:
            chosen = np.linspace(0, self.draws - 1, min(self.draws, SHOWN)).round().astype(int)
            draws = {f"draw {k + 1}": self.samples[k] for k in chosen}
        share = self.acceptance[0].item()
        accepted = "" if math.isnan(share) else f", {share:.0%} accepted"
        cost = f"{counted(self.evaluations, 'evaluation')} of the prior, {self.seconds:.3g} s"
        title = f"{counted(self.draws, 'draw')}{accepted}, {cost}"
        return chain_figure(center, name, self.std if self.draws > 1 else None, draws, title)

    def __repr__(self) -> str:
        mixing = "moments only" if self.samples is None else mixing_summary(self.samples)
        parts = [f"{counted(self.draws, 'draw')} of {image_size(self.state)}", mixing]
        return f"Chain({', '.join(filter(None, parts))})"

    def _repr_html_(self) -> str:
        return as_html(self)

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file, whole or not at all."""
        fields = self._asdict()
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        settings = {name: value for name, value in fields.items() if name not in tensors}
        save_tensors(path, tensors, settings, kind=KIND)

    @classmethod
    def load(cls, path: str | Path) -> Chain:
        """Read what :meth:`save` wrote, to the CPU.

        Raises :class:`InputError` if the file is missing, truncated, foreign or altered.
        """
        tensors, settings = load_tensors(path, kind=KIND)
        fields: dict[str, Any] = {"samples": None, **settings, **tensors}
        return cls(**fields)


class Recorder:
    """Takes draws in, and gives a :class:`Chain` out.

    Raises
    ------
    InputError
        If the draws do not fit in memory, or there is no going on from this chain.
    """

    def __init__(
        self, like: Tensor, draws: int, keep: Keep, generator: torch.Generator, resume: Chain | None
    ) -> None:
        if keep not in get_args(Keep):
            raise InputError(f"keep is {keep!r}; choose one of {get_args(Keep)}.")
        self.size = check_memory(like, draws) if keep == "samples" else 2 * like.nbytes
        if resume is None:
            resume = _beginning(like, keep, generator)
        _check_resumable(resume, like, keep)
        generator.set_state(resume.generator_state)
        self.generator = generator
        self.generator_state = resume.generator_state
        self.samples = None if resume.samples is None else list(resume.samples.to(like.device))
        if keep == "moments":
            self.samples = None
        self.count = resume.draws
        self.mean = resume.mean.to(like)
        self.m2 = resume.variance.to(like).nan_to_num() * max(0, self.count - 1)
        self.first = resume.steps
        self.seconds_before = resume.seconds
        self.evaluations_before = resume.evaluations
        self.start = time.perf_counter()

    def add(self, x: Tensor) -> None:
        """One more draw of every image; an error if it is not finite."""
        if not bool(x.isfinite().all()):
            raise InputError(
                f"draw {self.count + 1} has values that are NaN or infinite: check that the images to "
                "begin with are finite, and that the prior was trained near these noise levels."
            )
        count = self.count + 1
        change = x - self.mean
        mean = self.mean + change / count
        self.count, self.mean, self.m2 = count, mean, self.m2 + change * (x - mean)
        if self.samples is not None:
            self.samples.append(x)

    def repeat(
        self, step: Callable[[int], int], last: int, *, unit: str, progress: bool
    ) -> tuple[int, str]:
        """Call step(k), which returns how many steps it made, up to ``last`` or until Ctrl-C.

        Returns the steps made in all, and why it ended.
        """
        done = self.first
        try:
            label = f"{self.size / 1e6:.3g} MB"
            with tqdm(desc=label, initial=done, total=last, unit=unit, disable=not progress) as bar:
                while done < last:
                    made = step(done)
                    done, self.generator_state = done + made, self.generator.get_state()
                    bar.update(made)
        except KeyboardInterrupt:
            return done, f"interrupted after {done} of {last} {unit}s"
        return done, f"all {last} {unit}s are done"

    def chain(
        self,
        state: Tensor,
        steps: int,
        evaluations: int,
        reason: str,
        *,
        burn_in: int = 0,
        step_size: Tensor | None = None,
        acceptance: Tensor | None = None,
    ) -> Chain:
        """What there is so far."""
        none = state.new_full((len(state),), math.nan)
        samples = None if self.samples is None else state.new_empty(0, *self.mean.shape)
        return Chain(
            samples=torch.stack(self.samples) if self.samples else samples,
            mean=self.mean,
            variance=self.m2 / (self.count - 1)
            if self.count > 1
            else torch.full_like(self.m2, math.nan),
            draws=self.count,
            state=state,
            steps=steps,
            burn_in=burn_in,
            step_size=none if step_size is None else step_size,
            acceptance=none if acceptance is None else acceptance,
            evaluations=self.evaluations_before + evaluations,
            seconds=self.seconds_before + time.perf_counter() - self.start,
            reason=reason,
            generator_state=self.generator_state,
        )


def check_memory(like: Tensor, draws: int) -> int:
    """The bytes that draws take; :class:`InputError` if they do not fit, with how many do."""
    each = like.nbytes
    free = free_bytes(like.device)
    if free is not None and draws * each > SHARE_OF_MEMORY * free:
        raise InputError(
            f"{draws} samples of shape {tuple(like.shape)} take {draws * each / 1e9:.3g} GB, and "
            f"{free / 1e9:.3g} GB are free: {int(SHARE_OF_MEMORY * free // each)} fit. Ask for fewer, "
            'thin the chain, or use keep="moments" for the running mean and variance alone.'
        )
    return draws * each


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _beginning(like: Tensor, keep: Keep, generator: torch.Generator) -> Chain:
    """The chain of no steps."""
    zero, none = torch.zeros_like(like), like.new_full((len(like),), math.nan)
    samples = None if keep == "moments" else like.new_empty(0, *like.shape)
    return Chain(samples, zero, zero, 0, like, 0, 0, none, none, 0, 0.0, "", generator.get_state())


def _check_resumable(chain: Chain, like: Tensor, keep: Keep) -> None:
    if chain.state.shape != like.shape:
        raise InputError(
            f"the chain to go on from is of images {tuple(chain.state.shape)}, and these are "
            f"{tuple(like.shape)}; go on with the images that it was begun with."
        )
    if keep == "samples" and chain.samples is None:
        raise InputError('the chain to go on from kept its moments only; go on with keep="moments".')
