"""How fast on a GPU, beside the rate of its matrix products.

    share = 2 multiply-adds per pixel * pixels / seconds / rate of bfloat16 matrix products

The rate is that of a large product in the same run, so what clock and cooling do to both cancels. Steps
are one-step estimates; a chain is Langevin sampling without a Metropolis test, one score per step. The
error is that of a score, largest difference over largest value, from the plain PyTorch path in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import patchscore as ps
from benchmarks.study import Job, Option, Study
from benchmarks.tables import frame_of, markdown
from patchscore.errors import InputError
from patchscore.priors.engines.layers import Precision, field_score
from patchscore.priors.engines.triton import Field, has_triton, tile_sizes
from patchscore.priors.engines.triton_launch import Tiles

DEVICE = "cuda"
LARGE = 2160, 3840
SMALL = 512, 512
CHAINS = 10
MATRIX_SIDE = 8192
SIGMA = 0.1
STEP = 1e-3


class Row(NamedTuple):
    """One measurement.

    Attributes
    ----------
    device, torch, rate : the GPU, the version of PyTorch, and operations of matrix products per second
    task : the size of the image, or the number of chains
    tiles : block x chunk, warps, stages
    milliseconds : per step, the median of some
    share : of the rate of matrix products
    error : of the score of a small image; None where it was not measured
    """

    device: str
    torch: str
    rate: float
    network: str
    task: str
    precision: str
    tiles: str
    milliseconds: float
    share: float
    error: float | None
    seed: int = 0
    version: str = ""


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Each network by itself; :class:`InputError` if there is nothing to measure on."""
    check_gpu()
    rate = matrix_rate(options.repeats)
    for network in networks():
        yield Job(partial(measure, network, rate, options.repeats))


def summary(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """A line for every measurement."""
    frame = frame_of(rows)
    table = frame[["network", "task", "precision", "tiles"]].copy()
    table["ms per step"] = frame.milliseconds.map("{:.2f}".format)
    table["of the rate"] = frame.share.map("{:.1%}".format)
    table["error"] = ["" if row.error is None else f"{row.error:.1e}" for row in rows]
    device = {f"{r.device}, PyTorch {r.torch}: {r.rate / 1e12:.0f} TFLOP/s" for r in rows}
    return f"{markdown(table)}\n\n{'; '.join(sorted(device))} of bfloat16 products."


def check_gpu() -> None:
    """Raise :class:`InputError` unless there is a GPU, and Triton for it."""
    if not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU; this benchmark needs one, and a PyTorch built for it.")
    if not has_triton():
        raise InputError(
            "Triton is not installed, or too old; PyTorch for CUDA since 2.7 brings it along."
        )


def networks() -> list[ps.ConvEnergy]:
    """The network of ``natural-gray`` and the default convolutional one, with random weights."""
    generator = torch.Generator().manual_seed(0)
    built = [ps.PatchEnergy(11, 1, 256, 2), ps.ConvEnergy()]
    for network in built:
        network.requires_grad_(False)
        network.readout.normal_(generator=generator)
        network.to(DEVICE)
    return built


def measure(network: ps.ConvEnergy, rate: float, repeats: int) -> list[Row]:
    """All numbers of one network: tile sizes first, the rest with the fastest of them."""
    operations = 2 * sum(2 * kernel.numel() for kernel in network.kernels())

    def row(
        task: str,
        images: Tensor,
        step: Callable[[], object],
        precision: Precision = "bfloat16",
        label: str = "",
        error: float | None = None,
    ) -> Row:
        milliseconds = milliseconds_of(step, repeats)
        share = operations * images.numel() / (milliseconds / 1e3) / rate
        where = (
            torch.cuda.get_device_name(),
            torch.__version__,
            rate,
            "patches" if on_patches(network) else "convolutional",
        )
        version = f"patchscore {ps.__version__}"
        return Row(*where, task, precision, label, milliseconds, share, error, version=version)

    large, small, chains = image(1, LARGE), image(1, SMALL), image(CHAINS, SMALL)
    rows, tried = [], []
    settings: list[tuple[Precision, Tiles | None]] = [("bfloat16", t) for t in candidates(network)]
    settings.append(("float32", None))
    for precision, tiles in settings:
        step, label = step_of(network, precision, tiles)
        try:
            error = error_of(network, step)
            rows.append(row("3840 x 2160", large, partial(step, large), precision, label, error))
        except InputError:
            continue  # does not fit on this device
        if tiles is not None:
            tried.append((rows[-1].milliseconds, step, label))
    _, step, label = min(tried, key=lambda one: one[0])
    rows.append(row("512 x 512", small, partial(step, small), label=label))
    for count, images in ((1, small), (CHAINS, chains)):
        advance = langevin_step(step, images)
        rows.append(row(f"{count} chains of 512 x 512", images, advance, label=label))
    sigma = torch.full((1,), SIGMA, device=DEVICE)
    plain = partial(plain_score, network, small, sigma)
    return [*rows, row("512 x 512", small, plain, "float32", "plain PyTorch")]


def candidates(network: ps.ConvEnergy) -> list[Tiles]:
    """The sizes that would be taken, and others around them."""
    field = Field(network.layers(), "bfloat16")
    around = [
        Tiles(block, chunk, warps, stages)
        for block in (32, 64, 128)
        for chunk in (32, 64)
        for warps in (4, 8)
        for stages in (2, 3)
        if block * field.weights.width <= 2**12 * warps
    ]
    return list(dict.fromkeys([*tile_sizes(field.weights, on_patches=on_patches(network))[:2], *around]))


def step_of(
    network: ps.ConvEnergy, precision: Precision, tiles: Tiles | None
) -> tuple[Callable[[Tensor], Tensor], str]:
    """The score of images at SIGMA, and how the tiles are called."""
    field = Field(network.layers(), precision, tiles)
    used = tiles or tile_sizes(field.weights, on_patches=on_patches(network))[0]
    label = f"{used.block} x {used.chunk}, {used.warps} warps, {used.stages} stages"

    def step(images: Tensor) -> Tensor:
        return field.score(images, torch.full((len(images),), SIGMA, device=images.device), "symmetric")

    return step, label


def langevin_step(step: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    """A step of all chains, in place: x + h s(x) + (2 h)^(1/2) noise."""
    x = images.clone()

    def advance() -> Tensor:
        return x.add_(step(x), alpha=STEP * SIGMA**2).add_(
            torch.randn_like(x), alpha=(2 * STEP) ** 0.5 * SIGMA
        )

    return advance


def error_of(network: ps.ConvEnergy, step: Callable[[Tensor], Tensor]) -> float:
    """How far the score of a small image is from that of the plain path in float64."""
    x = image(1, (96, 101))
    sigma = torch.full((1,), SIGMA, device=DEVICE, dtype=torch.float64)
    exact = plain_score(network.double(), x.double(), sigma)
    network.float()
    return float((step(x) - exact).abs().max() / exact.abs().max())


def plain_score(network: ps.ConvEnergy, x: Tensor, sigma: Tensor) -> Tensor:
    """The score as PyTorch alone computes it."""
    return field_score(network.layers(), x, sigma, "symmetric")


def matrix_rate(repeats: int) -> float:
    """Floating-point operations per second of a bfloat16 product of large matrices."""
    a, b = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=DEVICE).bfloat16() for _ in range(2))
    return 2 * MATRIX_SIDE**3 / (milliseconds_of(lambda: a @ b, repeats) / 1e3)


def milliseconds_of(task: Callable[[], object], repeats: int) -> float:
    """The median time of a task on the device, after three times that do not count."""
    for _ in range(3):
        task()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        task()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(torch.tensor(times).median())


def on_patches(network: ps.ConvEnergy) -> bool:
    """Whether it is a perceptron on patches, for which there is a kernel of its own."""
    return set(network.sides[1:]) <= {1}


def image(count: int, size: tuple[int, int]) -> Tensor:
    """Noise around a ramp."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    ramp = torch.linspace(0, 1, size[1], device=DEVICE).expand(count, 1, *size)
    return ramp + SIGMA * torch.randn(count, 1, *size, device=DEVICE, generator=generator)


STUDY = Study(
    "gpu",
    __doc__,
    Row,
    key=("device", "network", "task", "precision", "tiles"),
    jobs=jobs,
    summary=summary,
    options=(Option("repeats", 20, "of every measurement", quick=3),),
)
