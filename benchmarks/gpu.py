"""How fast on a GPU: python -m benchmarks.gpu.

    share = 2 multiply-adds per pixel * pixels / seconds / rate of bfloat16 matrix products

The rate is that of a large product in the same run, so what clock and cooling do to both cancels. Steps
are one-step estimates; a chain is Langevin sampling without a Metropolis test, one score per step. The
error is that of a score, largest difference over largest value, from the plain PyTorch path in float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.data import prepare_table, write_table
from patchscore.errors import InputError
from patchscore.priors.energy import ConvEnergy, PatchEnergy
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
OUT = Path("benchmarks/results/gpu.csv")


class Row(NamedTuple):
    """One measurement.

    Attributes
    ----------
    task : the size of the image, or the number of chains
    tiles : block x chunk, warps, stages
    milliseconds : per step, the median of some
    share : of the rate of matrix products
    error : of the score of a small image; None where it was not measured
    """

    network: str
    task: str
    precision: str
    tiles: str
    milliseconds: float
    share: float
    error: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 2 if there is nothing to measure on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="per number (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        check_gpu()
        prepare_table(options.out)
        rate = matrix_rate(options.repeats)
        name = torch.cuda.get_device_name()
        print(f"{name}, PyTorch {torch.__version__}: {rate / 1e12:.0f} TFLOP/s of bfloat16 products.\n")
        rows = [row for network in networks() for row in measure(network, rate, options.repeats)]
    except InputError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    print("| network | task | precision | tiles | ms per step | of the rate | error |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        off = "" if row.error is None else f"{row.error:.1e}"
        print(
            f"| {row.network} | {row.task} | {row.precision} | {row.tiles} "
            f"| {row.milliseconds:.2f} | {row.share:.1%} | {off} |"
        )
    columns = ["device", "torch", "rate", *Row._fields]
    write_table(options.out, columns, [[name, torch.__version__, rate, *row] for row in rows])
    return 0


def check_gpu() -> None:
    """Raise :class:`InputError` unless there is a GPU, and Triton for it."""
    if not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU; this benchmark needs one, and a PyTorch built for it.")
    if not has_triton():
        raise InputError(
            "Triton is not installed, or too old; PyTorch for CUDA since 2.7 brings it along."
        )


def networks() -> list[ConvEnergy]:
    """The network of ``natural-gray`` and the default convolutional one, with random weights."""
    generator = torch.Generator().manual_seed(0)
    built: list[ConvEnergy] = [PatchEnergy(11, 1, 256, 2), ConvEnergy()]
    for network in built:
        network.requires_grad_(False)
        network.readout.normal_(generator=generator)
        network.to(DEVICE)
    return built


def measure(network: ConvEnergy, rate: float, repeats: int) -> list[Row]:
    """All numbers of one network: tile sizes first, the rest with the fastest of them."""
    name = "patches" if on_patches(network) else "convolutional"
    operations = 2 * multiply_adds(network)

    def row(
        task: str, images: Tensor, precision: Precision, tiles: Tiles | None, *, check: bool = False
    ) -> Row:
        step, label = step_of(network, precision, tiles)
        milliseconds = milliseconds_of(lambda: step(images), repeats)
        share = operations * images.numel() / (milliseconds / 1e3) / rate
        error = error_of(network, step) if check else None
        return Row(name, task, precision, label, milliseconds, share, error)

    large, small, chains = image(1, LARGE), image(1, SMALL), image(CHAINS, SMALL)
    tried = []
    for tiles in candidates(network):
        try:
            tried.append((row("3840 x 2160", large, "bfloat16", tiles, check=True), tiles))
        except InputError:
            continue  # does not fit on this device
    best = min(tried, key=lambda pair: pair[0].milliseconds)[1]
    rows = [pair[0] for pair in tried]
    rows.append(row("3840 x 2160", large, "float32", None, check=True))
    rows.append(row("512 x 512", small, "bfloat16", best))
    for count, images in ((1, small), (CHAINS, chains)):
        step, label = step_of(network, "bfloat16", best)
        milliseconds = milliseconds_of(langevin_step(step, images), repeats)
        share = operations * images.numel() / (milliseconds / 1e3) / rate
        rows.append(
            Row(name, f"{count} chains of 512 x 512", "bfloat16", label, milliseconds, share, None)
        )
    sigma = torch.full((1,), SIGMA, device=DEVICE)
    milliseconds = milliseconds_of(lambda: plain_score(network, small, sigma), repeats)
    share = operations * small.numel() / (milliseconds / 1e3) / rate
    rows.append(Row(name, "512 x 512", "float32", "plain PyTorch", milliseconds, share, None))
    return rows


def candidates(network: ConvEnergy) -> list[Tiles]:
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
    network: ConvEnergy, precision: Precision, tiles: Tiles | None
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


def error_of(network: ConvEnergy, step: Callable[[Tensor], Tensor]) -> float:
    """How far the score of a small image is from that of the plain path in float64."""
    x = image(1, (96, 101))
    sigma = torch.full((1,), SIGMA, device=DEVICE, dtype=torch.float64)
    exact = plain_score(network.double(), x.double(), sigma)
    network.float()
    return float((step(x) - exact).abs().max() / exact.abs().max())


def plain_score(network: ConvEnergy, x: Tensor, sigma: Tensor) -> Tensor:
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


def on_patches(network: ConvEnergy) -> bool:
    """Whether it is a perceptron on patches, for which there is a kernel of its own."""
    return set(network.sides[1:]) <= {1}


def multiply_adds(network: ConvEnergy) -> int:
    """Per pixel, up and down."""
    return 2 * sum(kernel.numel() for kernel in network.layers().kernels)


def image(count: int, size: tuple[int, int]) -> Tensor:
    """Noise around a ramp."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    ramp = torch.linspace(0, 1, size[1], device=DEVICE).expand(count, 1, *size)
    return ramp + SIGMA * torch.randn(count, 1, *size, device=DEVICE, generator=generator)


if __name__ == "__main__":
    sys.exit(main())
