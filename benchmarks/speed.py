"""How fast and how large: seconds beside other methods on the same cores, and the peak of memory.

    ratio = seconds of the other / seconds of patchscore      one for each round, then their median

In each round every method denoises the same image once, one after the other, so that a slow drift of
the machine hits all of them. The memory is that of a fresh process, which inherits nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from skimage.data import camera
from skimage.restoration import denoise_nl_means

from benchmarks import epll
from patchscore.denoising import denoise
from patchscore.errors import InputError
from patchscore.evaluation.baselines import bm3d, has_bm3d, total_variation
from patchscore.priors.engines.cpu import has_bfloat16
from patchscore.priors.zoo import load_prior

SIGMA = 25.0
TV_WEIGHT = 1.0
# scikit-image's advice for noise of a known level, with its patches of 5 x 5 in the fast mode.
NON_LOCAL_STRENGTH = 0.8
PAUSE = 0.5
LARGE_SIDE = 2048
LEAST_RATIO = 5.0
MOST_MEGABYTES = 1000.0
# Of the image in float64, in which it is made, and what tiles and threads need, in MB.
MOST_COPIES = 3
MOST_WORKSPACE = 200


class Timing(NamedTuple):
    """The seconds that a method took, round by round."""

    method: str
    seconds: tuple[float, ...]


class Memory(NamedTuple):
    """Peaks of resident memory in bytes.

    Attributes
    ----------
    baseline : after everything is imported and the prior is loaded
    peak : after an image was made and denoised
    """

    baseline: int
    peak: int


class Machine(NamedTuple):
    """What the numbers were measured on."""

    processor: str
    cores: int
    torch_threads: int
    torch: str


class Line(NamedTuple):
    """One quantity of the report: its median with the least and the greatest value.

    ``met`` is None where there is no target.
    """

    quantity: str
    unit: str
    median: float
    least: float
    greatest: float
    target: str
    met: bool | None


def time_denoisers(prior: str, *, rounds: int, mixture: Path | None = None) -> list[Timing]:
    """Time patchscore and others on ``camera`` (512 x 512) at sigma 25 of 255.

    TV and non-local means are those of scikit-image, the first with its default tolerance, the second in
    its fast mode. BM3D takes part if it is installed, EPLL if there is the file of a ``mixture``.

    Raises
    ------
    InputError
        If the prior or the mixture cannot be loaded, or there is no round.
    """
    noisy = _noisy(camera())
    loaded = load_prior(prior, "cpu")
    denoisers: dict[str, Callable[[], np.ndarray]] = {
        "tv": lambda: total_variation(noisy, SIGMA, weight=TV_WEIGHT),
        "non-local means": lambda: denoise_nl_means(
            noisy, patch_size=5, patch_distance=6, h=NON_LOCAL_STRENGTH * SIGMA, sigma=SIGMA
        ),
        "patchscore": lambda: denoise(noisy, SIGMA, prior=loaded),
    }
    if has_bfloat16():
        fast = loaded.with_precision("bfloat16")
        denoisers["patchscore, bfloat16"] = lambda: denoise(noisy, SIGMA, prior=fast)
    if mixture is not None:
        restore = epll.method(mixture).run
        denoisers["epll"] = lambda: restore(noisy, SIGMA, camera())
    if has_bm3d():
        denoisers["bm3d"] = lambda: bm3d(noisy, SIGMA)
    return time_in_turn(denoisers, rounds=rounds)


def time_in_turn(tasks: Mapping[str, Callable[[], object]], *, rounds: int) -> list[Timing]:
    """Time tasks in turn, round by round, after one round that does not count.

    Before each there is a pause, in which the threads of the one before stop spinning for more work.

    Raises :class:`InputError` if there is no round.
    """
    if rounds < 1:
        raise InputError(f"rounds is {rounds}; expected at least one.")
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(1 + rounds):
        for name, task in tasks.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return [Timing(name, tuple(times[1:])) for name, times in seconds.items()]


def peak_memory(prior: str, *, side: int = LARGE_SIDE) -> Memory:
    """Measure the memory of denoising a ``side`` x ``side`` image, in a process of its own.

    The process is forked from a small server: one that is started by this process would count the
    peak of this one as its own.

    Raises
    ------
    InputError
        If the prior cannot be loaded, or the system is neither Linux nor macOS.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise InputError("the peak of memory can be measured on Linux and macOS only.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_memory_here, prior, side).result()


def machine() -> Machine:
    """Describe the processor, the cores that this process may use, and PyTorch."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Machine(_processor(), len(usable), torch.get_num_threads(), torch.__version__)


def report(timings: Sequence[Timing], memory: Memory) -> list[Line]:
    """Summarise the measurements and hold them against the targets."""
    lines = [line(f"{timing.method}, 512 x 512", "s", timing.seconds) for timing in timings]
    ours = dict(timings)["patchscore"]
    for method, seconds in timings:
        if method != "patchscore":
            ratios = [other / own for other, own in zip(seconds, ours, strict=True)]
            least = LEAST_RATIO if method == "bm3d" else None
            lines.append(line(f"{method} / patchscore", "", ratios, at_least=least))
    above = (memory.peak - memory.baseline) / 1e6
    image = 8 * LARGE_SIDE**2 / 1e6
    peak = [memory.peak / 1e6]
    return [
        *lines,
        line(f"peak memory, {LARGE_SIDE} x {LARGE_SIDE}", "MB", peak, at_most=MOST_MEGABYTES),
        line("peak above the loaded prior", "MB", [above], at_most=image * MOST_COPIES + MOST_WORKSPACE),
    ]


def line(
    quantity: str,
    unit: str,
    values: Sequence[float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Line:
    """Summarise what was measured, beside its target if there is one."""
    median = float(np.median(values))
    target, met = "", None
    if at_least is not None:
        target, met = f"at least {at_least:g}", median >= at_least
    if at_most is not None:
        target, met = f"at most {at_most:g}", median <= at_most
    return Line(quantity, unit, median, min(values), max(values), target, met)


def _memory_here(prior: str, side: int) -> Memory:
    loaded = load_prior(prior, "cpu")
    baseline = _peak_bytes()
    image = camera()
    copies = -(-side // len(image))
    denoise(_noisy(np.tile(image, (copies, copies))[:side, :side]), SIGMA, prior=loaded)
    return Memory(baseline, _peak_bytes())


def _peak_bytes() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _noisy(image: np.ndarray) -> np.ndarray:
    noisy = np.random.default_rng(0).standard_normal(image.shape)
    noisy *= SIGMA
    noisy += image
    return noisy


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
