"""An image larger than memory: rate, memory, workers that are killed, and two workers beside one.

    y = steps + n,    n white of level 20        a Zarr of SIDE x SIDE float32 pixels, made on the fly

``patchscore denoise in.zarr out.zarr`` is run as a person would run it, on one process and on two with
one thread each, and on the two workers of a dask cluster. Its rate is compared with that of
``patchscore.denoise`` on a part of the same image in memory, on one thread, before and after. On a
machine that has other work, the same per second of the processor says more. Memory is
the peak of the proportional set size of all processes together. A worker is killed with SIGKILL when a
third of the blocks are done, and so is the scheduler of the cluster; then the same command is given
again, and the bytes of the result are compared with those of the run that nothing happened to.

What three orientations gain over one is measured on an isotropic volume of 64 x 64 x 64 with balls.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import patchscore as ps
from benchmarks.machine import PAUSE, machine
from benchmarks.study import PRIOR, SEED, Job, Option, Study
from benchmarks.tables import markdown
from patchscore.errors import InputError
from patchscore.evaluation.metrics import psnr

SIGMA = 20.0
CHUNK = 512
LEAST_RATE, LEAST_GAIN, MOST_BYTES = 0.85, 1.8, 1.5e9
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
LIMIT = 48 * 3600.0  # seconds, for one command


class Row(NamedTuple):
    """One quantity, its bound, and where it was measured; ``met`` is None where there is no bound."""

    side: int
    prior: str
    quantity: str
    value: float
    unit: str
    bound: str
    met: bool | None
    processor: str
    cores: int
    torch: str
    seed: int
    version: str


class Run(NamedTuple):
    """A command that ended: its status, its seconds, those of the processor, its peak of bytes."""

    status: int
    seconds: float
    worked: float
    peak: float


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Everything at once, as it has to be measured side by side."""
    yield Job(partial(measure, options))


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """All quantities."""
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="patchscore-large-") as name:
        folder = Path(name)
        make(folder / "in.zarr", options.side, options.seed)
        values = dict(measured(folder, options)) | dict(gains(options.prior, options.seed))
    bounds = {
        "file, one process, beside memory": ("at least", LEAST_RATE),
        "file, two processes, beside twice memory": ("at least", LEAST_RATE),
        "two processes beside one": ("at least", LEAST_GAIN),
        "memory of two processes": ("at most", MOST_BYTES / 1e9),
        "equal after a worker was killed": ("at least", 1.0),
        "equal after the scheduler was killed": ("at least", 1.0),
    }
    facts = machine()
    for quantity, (value, unit) in values.items():
        words, bound = bounds.get(quantity, ("", 0.0))
        met = None if not words else value >= bound if words == "at least" else value <= bound
        yield Row(
            options.side, options.prior, quantity, float(f"{value:.4g}"), unit,
            f"{words} {bound:g}" if words else "", met, facts.processor, facts.cores, facts.torch,
            options.seed, f"patchscore {ps.__version__}",
        )  # fmt: skip


def measured(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, tuple[float, str]]]:
    """Each quantity with its unit."""
    side = options.side
    command = partial(denoising, folder, options.prior)
    before = in_memory(folder / "in.zarr", options.prior)
    one = watched(command("one"))
    between = in_memory(folder / "in.zarr", options.prior)
    two = watched(command("two", "--workers", "2"))
    after = in_memory(folder / "in.zarr", options.prior)
    memory, effort = np.array([before, between, after]).T
    rates = {"one": side**2 / one.seconds, "two": side**2 / two.seconds}
    yield "memory, one thread", (float(np.mean(memory)) / 1e6, "megapixels/s")
    yield "file, one process", (rates["one"] / 1e6, "megapixels/s")
    yield "file, two processes", (rates["two"] / 1e6, "megapixels/s")
    yield "file, one process, beside memory", (rates["one"] / float(np.mean(memory[:2])), "")
    yield "file, two processes, beside twice memory", (rates["two"] / 2 / float(np.mean(memory[1:])), "")
    yield "two processes beside one", (rates["two"] / rates["one"], "")
    worked = side**2 / np.array([one.worked, two.worked]) / effort.mean()
    yield "file, one process, beside memory, per processor second", (float(worked[0]), "")
    yield "file, two processes, beside memory, per processor second", (float(worked[1]), "")
    yield "memory of one process", (one.peak / 1e9, "GB")
    yield "memory of two processes", (two.peak / 1e9, "GB")
    straight = digest(folder / "one.zarr")
    yield "equal on two processes", (float(digest(folder / "two.zarr") == straight), "")
    for name in ("one.zarr", "two.zarr"):
        shutil.rmtree(folder / name)
    arguments = command("killed", "--workers", "2")
    lost = watched(arguments, kill=partial(kill_a_worker, folder / "killed.zarr", side))
    again = watched(arguments)
    equal = lost.status == 2 and again.status == 0 and digest(folder / "killed.zarr") == straight
    yield "equal after a worker was killed", (float(equal), "")
    shutil.rmtree(folder / "killed.zarr", ignore_errors=True)
    with cluster() as (address, scheduler):
        arguments = command("cluster", "--scheduler", address)
        lost = watched(arguments, kill=partial(kill, scheduler, folder / "cluster.zarr", side))
    with cluster() as (address, _):
        again = watched(command("cluster", "--scheduler", address))
    equal = lost.status != 0 and again.status == 0 and digest(folder / "cluster.zarr") == straight
    yield "equal after the scheduler was killed", (float(equal), "")


def gains(prior: str, seed: int) -> Iterator[tuple[str, tuple[float, str]]]:
    """The gain in PSNR of three orientations over one."""
    rng = np.random.default_rng(seed)
    clean = balls(rng)
    for sigma in (15.0, 25.0, 50.0):
        noisy = clean + sigma * rng.standard_normal(clean.shape)
        one, three = (
            ps.denoise(noisy, sigma, prior=prior, axes="ZYX", orientations=number) for number in (1, 3)
        )
        gain = psnr(clean, three, data_range=255) - psnr(clean, one, data_range=255)
        yield f"three orientations beside one, sigma {sigma:g}", (gain, "dB")


def balls(rng: np.random.Generator, side: int = 64, number: int = 40) -> np.ndarray:
    """A volume with balls of radius 3 to 10 and brightness 20 to 220, one over the other, on 60."""
    volume = np.full((side, side, side), 60.0)
    places = np.mgrid[:side, :side, :side]
    for _ in range(number):
        center = rng.uniform(0, side, (3, 1, 1, 1))
        distance = np.sqrt(((places - center) ** 2).sum(0))
        inside = np.clip(rng.uniform(3, 10) - distance + 0.5, 0, 1)
        volume += inside * (rng.uniform(20, 220) - volume)
    return volume


def make(path: Path, side: int, seed: int) -> None:
    """The image, chunk by chunk."""
    import zarr

    image = zarr.create_array(
        path, shape=(side, side), chunks=(CHUNK, CHUNK), dtype="float32", compressors=None
    )
    for number, top in enumerate(range(0, side, CHUNK)):
        rows = np.arange(top, min(top + CHUNK, side))
        steps = 40 * (rows // 37 % 3)[:, None] + 30 * (np.arange(side) // 23 % 4)
        noise = np.random.default_rng((seed, number)).standard_normal(steps.shape, dtype=np.float32)
        image[rows[0] : rows[-1] + 1] = steps + np.float32(SIGMA) * noise


def worked_by_children() -> float:
    """Seconds of the processor that commands that ended took, with all of their processes."""
    times = os.times()
    return times.children_user + times.children_system


def in_memory(path: Path, prior: str) -> tuple[float, float]:
    """Pixels per second of a part of the image in memory, on one thread; and per processor second."""
    import zarr

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    image = np.asarray(zarr.open_array(path, mode="r")[:2048, :2048])
    loaded = ps.load_prior(prior, "cpu")
    ps.denoise(image[:256, :256], SIGMA, prior=loaded)
    time.sleep(PAUSE)
    start, used = time.perf_counter(), time.process_time()
    ps.denoise(image, SIGMA, prior=loaded)
    seconds, worked = time.perf_counter() - start, time.process_time() - used
    torch.set_num_threads(threads)
    return image.size / seconds, image.size / worked


def denoising(folder: Path, prior: str, name: str, *options: str) -> list[str]:
    """The command."""
    files = [str(folder / "in.zarr"), str(folder / f"{name}.zarr")]
    told = ["--sigma", str(SIGMA), "--prior", prior, "--device", "cpu"]
    return [sys.executable, "-m", "patchscore", "denoise", *files, *told, *options]


def watched(arguments: Sequence[str], kill: object = None) -> Run:
    """Run a command, and watch its memory; ``kill`` may end something in the meantime."""
    start, used = time.perf_counter(), worked_by_children()
    with subprocess.Popen(
        arguments, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.DEVNULL
    ) as process:
        if callable(kill):
            threading.Thread(target=kill, args=(process,), daemon=True).start()
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, sum(map(resident, family(process.pid))))
            time.sleep(0.1)
            if time.perf_counter() - start > LIMIT:
                process.kill()
    worked = worked_by_children() - used
    return Run(process.returncode, time.perf_counter() - start, worked, peak)


def kill_a_worker(target: Path, side: int, process: subprocess.Popen[bytes]) -> None:
    """Kill a worker of the command when a third of the blocks are done."""
    third_done(target, side, process)
    workers = [pid for pid in family(process.pid) if b"spawn_main" in _read(pid, "cmdline")]
    os.kill(workers[0], signal.SIGKILL)


def kill(
    scheduler: subprocess.Popen[bytes], target: Path, side: int, process: subprocess.Popen[bytes]
) -> None:
    """Kill the scheduler when a third of the blocks are done."""
    third_done(target, side, process)
    scheduler.kill()


def third_done(target: Path, side: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a third of the blocks are done."""
    work = target.with_name(target.name + ".unfinished")
    while process.poll() is None:
        with suppress(OSError, ValueError):
            block = json.loads((work / "plan.json").read_text())["block"]
            blocks = -(-side // block[0]) * -(-side // block[1])
            if len(os.listdir(work / "done")) >= blocks / 3:
                return
        time.sleep(0.01)


@contextmanager
def cluster() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a dask cluster of two workers of one thread, and the process of its scheduler."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    scheduler = python("dask_scheduler", "--no-dashboard", "--host", address)
    told = ("--no-dashboard", "--nworkers", "2", "--nthreads", "1", "--death-timeout", "60")
    worker = python("dask_worker", address, *told)
    try:
        yield address, scheduler
    finally:
        for pid in [pid for process in (worker, scheduler) for pid in family(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        worker.wait()
        scheduler.wait()


def python(program: str, *options: str) -> subprocess.Popen[bytes]:
    """A program of dask, started."""
    command = [sys.executable, "-m", f"distributed.cli.{program}", *options]
    return subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.DEVNULL)


def family(pid: int) -> list[int]:
    """A process, its children and theirs, on Linux."""
    children = _read(pid, f"task/{pid}/children").split()
    return [pid, *(one for child in children for one in family(int(child)))]


def resident(pid: int) -> float:
    """Bytes of a process in memory; what several share is shared out."""
    for line in _read(pid, "smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return 1024.0 * int(line.split()[1])
    return 0.0


def digest(path: Path) -> str:
    """Of all files of a folder, and their names."""
    found = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        found.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return found.hexdigest()


def summary(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """A line for every quantity, beside its bound."""
    lines = [["quantity", "measured", "bound", ""]]
    for row in rows:
        met = "" if row.met is None else "met" if row.met else "not met"
        lines.append([row.quantity, f"{row.value:.4g} {row.unit}".strip(), row.bound, met])
    first = rows[0]
    return (
        f"{markdown(lines)}\n\n{first.side} x {first.side} pixels, {first.prior}; {first.processor}, "
        f"{first.cores} cores, PyTorch {first.torch}."
    )


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError as error:
        if sys.platform != "linux":
            raise InputError("processes can be watched on Linux only.") from error
        return b""  # it has ended


STUDY = Study(
    "large",
    __doc__,
    Row,
    key=("side", "prior", "quantity"),
    depends=(),
    jobs=jobs,
    summary=summary,
    options=(
        PRIOR._replace(default="natural-gray-fast"),
        Option("side", 20_000, "of the image, in pixels", quick=2100),
        Option("folder", None, "for the files, of four times the size of the image", kind=str),
        SEED,
    ),
)
