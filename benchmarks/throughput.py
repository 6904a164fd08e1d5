"""How close to what the machine can do, and what is paid per pixel and per start.

    share = multiply-adds of a score / (seconds * rate of matrix products)
    multiply-adds per pixel = 2 sum_l (outputs x inputs x k_l^2), forward and backward

The rate is that of large matrix products in PyTorch, measured in the same rounds. It is no bound:
convolutions may run on wider registers than they do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import patchscore as ps
from benchmarks.machine import machine, time_in_turn
from benchmarks.study import PRIOR, Job, Option, Study
from benchmarks.tables import frame_of, markdown
from patchscore.errors import InputError
from patchscore.priors.engines.cpu import has_bfloat16
from patchscore.priors.engines.layers import Precision

SIGMA = 25.0
PRODUCT_SIDE = 1024
SCORE_SIDE = 512
GROWTH_SIDES = 256, 512, 1024, 2048, 4096
SMALL_SIDE = 64
MOST_GROWTH = 1.1
LEAST_SHARE: dict[Precision, float] = {"float32": 0.7, "bfloat16": 0.45}
MOST_IMPORT_SECONDS = 0.3
MOST_DENOISE_SECONDS = 1.0


class Row(NamedTuple):
    """One quantity: its median with the least and the greatest value, and where it was measured.

    ``met`` is None where there is no target.
    """

    prior: str
    quantity: str
    unit: str
    median: float
    least: float
    greatest: float
    target: str
    met: bool | None
    processor: str
    cores: int
    torch_threads: int
    torch: str
    seed: int = 0
    version: str = ""


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Everything at once, as it has to be measured side by side."""
    yield Job(partial(measure, options))


def measure(options: argparse.Namespace) -> list[Row]:
    """Shares of the rate, growth with the size of an image, and the start of a process."""
    return [
        row for part in (shares, growth, start_up) for row in part(options.prior, rounds=options.rounds)
    ]


def summary(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """A line for every quantity, beside its target."""
    frame = frame_of(rows)
    table = frame[["prior", "quantity"]].copy()
    for name, column in (("median", "median"), ("min", "least"), ("max", "greatest")):
        table[name] = [
            f"{x:.4g} {unit}".strip() for x, unit in zip(frame[column], frame.unit, strict=True)
        ]
    table["target"] = frame.target
    table[""] = ["" if row.met is None else "met" if row.met else "not met" for row in rows]
    places = {f"{row.processor}, {row.cores} cores, {row.torch_threads} threads" for row in rows}
    versions = {f"PyTorch {row.torch}" for row in rows}
    return f"{markdown(table)}\n\n{'; '.join(sorted(places))}; {', '.join(sorted(versions))}."


def row_of(
    prior: str,
    quantity: str,
    unit: str,
    values: Sequence[float] | np.ndarray,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """Summarise what was measured, beside its target if there is one."""
    median = float(np.median(values))
    target, met = "", None
    if at_least is not None:
        target, met = f"at least {at_least:g}", median >= at_least
    if at_most is not None:
        target, met = f"at most {at_most:g}", median <= at_most
    found = median, float(min(values)), float(max(values)), target, met
    return Row._make((prior, quantity, unit, *found, *machine(), 0, f"patchscore {ps.__version__}"))


def multiply_adds(prior: ps.PatchPrior) -> int:
    """Of a score, per pixel; each hidden unit counted once, however often tiles compute it.

    Raises :class:`InputError` for a network that is not a stack of layers.
    """
    if not isinstance(prior.network, ps.ConvEnergy):
        raise InputError(
            f"the multiply-adds of {type(prior.network).__name__} are not known; take a prior with a "
            "ConvEnergy."
        )
    return 2 * sum(kernel.numel() for kernel in prior.network.kernels())


def shares(name: str, *, rounds: int) -> list[Row]:
    """Scores of 512 x 512 pixels beside matrix products, in float32 and, where there is, bfloat16."""
    prior = ps.load_prior(name, "cpu")
    per_pixel = multiply_adds(prior)
    x = _image(SCORE_SIDE)
    precisions: list[Precision] = ["float32", "bfloat16"] if has_bfloat16() else ["float32"]
    tasks: dict[str, Callable[[], object]] = {}
    for precision in precisions:
        matrix = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE).to(getattr(torch, precision))
        out = torch.empty_like(matrix)
        tasks[f"product {precision}"] = partial(torch.mm, matrix, matrix, out=out)
        tasks[f"score {precision}"] = partial(prior.with_precision(precision).score, x, SIGMA)
    seconds = time_in_turn(tasks, rounds=rounds)
    row = partial(row_of, name)
    rows = [row("multiply-adds per pixel", "", [per_pixel])]
    for precision in precisions:
        rates = [PRODUCT_SIDE**3 / s for s in seconds[f"product {precision}"]]
        scores = seconds[f"score {precision}"]
        work = per_pixel * SCORE_SIDE**2
        share = [work / s / r for s, r in zip(scores, rates, strict=True)]
        rows += [
            row(f"matrix products, {precision}", "G multiply-adds/s", [r / 1e9 for r in rates]),
            row(f"floor, {precision}", "us/pixel", [1e6 * per_pixel / r for r in rates]),
            row(f"score, {precision}", "us/pixel", [1e6 * s / SCORE_SIDE**2 for s in scores]),
            row(f"share of the rate, {precision}", "", share, at_least=LEAST_SHARE[precision]),
        ]
    return rows


def growth(name: str, *, rounds: int, sides: Sequence[int] = GROWTH_SIDES) -> list[Row]:
    """Time per pixel of a one-step estimate over image sizes: the dearest size over the cheapest."""
    prior = ps.load_prior(name, "cpu")
    tasks = {f"{side}": partial(prior.denoise, _image(side), SIGMA) for side in sides}
    costs = [
        row_of(
            name, f"estimate, {side} x {side}", "us/pixel", [1e6 * s / int(side) ** 2 for s in seconds]
        )
        for side, seconds in time_in_turn(tasks, rounds=rounds).items()
    ]
    medians = [cost.median for cost in costs]
    ratio = max(medians) / min(medians)
    return [*costs, row_of(name, "dearest size / cheapest", "", [ratio], at_most=MOST_GROWTH)]


def start_up(name: str, *, rounds: int) -> list[Row]:
    """Seconds of a new process, beyond those of what it starts from."""
    with tempfile.TemporaryDirectory() as folder:
        noisy = Path(folder) / "noisy.npy"
        np.save(noisy, _image(SMALL_SIDE)[0, 0].numpy())
        denoise = [
            "denoise",
            str(noisy),
            f"{folder}/clean.npy",
            "--prior",
            name,
            "--sigma",
            str(SIGMA),
            "--force",
        ]
        commands = {
            "torch": ["-c", "import torch"],
            "patchscore": ["-c", "import patchscore"],
            "denoise": ["-m", "patchscore", *denoise],
        }
        tasks = {key: partial(_process, command) for key, command in commands.items()}
        torch_alone, imports, runs = map(np.array, time_in_turn(tasks, rounds=rounds).values())
    row = partial(row_of, name)
    return [
        row("import patchscore, beyond torch", "s", imports - torch_alone, at_most=MOST_IMPORT_SECONDS),
        row("patchscore denoise, beyond that", "s", runs - imports, at_most=MOST_DENOISE_SECONDS),
    ]


def _process(arguments: Sequence[str]) -> None:
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise InputError(f"{' '.join(arguments)} failed: {result.stderr.strip()}")


def _image(side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 1, side, side, generator=generator).mul_(SIGMA).add_(128)


KEY = "prior", "quantity"
OPTIONS = PRIOR, Option("rounds", 5, "that count, after one that does not", quick=1)
STUDY = Study(
    "throughput", __doc__, Row, key=KEY, jobs=jobs, summary=summary, options=OPTIONS, depends=()
)
