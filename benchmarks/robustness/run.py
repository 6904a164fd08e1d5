"""Run the robustness benchmark: tune, train, measure, each piece of work in whichever process is free.

    rows = union over tasks of  { (PSNR, SSIM)(clean, restored(denoised(noisy))) : images of the task }

A task is the smallest piece: its rows come in together. The table on disk is replaced by a longer one
every few seconds, so a run that is killed loses those seconds, and the same command goes on from there.
Every process computes with one thread, so that sums are in one order.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.robustness.contenders import ONE_STEP, TUNED, Contender, Settings, ready, tuning_budget
from benchmarks.robustness.plan import Task
from benchmarks.robustness.sets import data_range, real_pairs, spaced, test_images
from benchmarks.robustness.shifts import REAL, Problem, shifted
from benchmarks.robustness.table import (
    Budget,
    Row,
    budget_path,
    read_budgets,
    read_rows,
    row_key,
    write_budgets,
    write_rows,
)
from benchmarks.robustness.training import learn
from benchmarks.speed import machine
from patchscore.errors import InputError
from patchscore.evaluation.metrics import psnr, ssim
from patchscore.measurements.noise import estimated_sigma

SECONDS_BETWEEN_TABLES = 15.0

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers(NamedTuple):
    """Where the work is done: in processes of this machine, or by the workers of a dask scheduler."""

    processes: int = 1
    scheduler: str | None = None


class Pictures(NamedTuple):
    """The images behind a row, all (H, W) in the unit of the clean one."""

    clean: np.ndarray
    noisy: np.ndarray
    denoised: np.ndarray


class Case(NamedTuple):
    """One image of a task; sigma as the tables give it."""

    image: str
    sigma: float
    problem: Problem


def run(tasks: Sequence[Task], settings: Settings, workers: Workers, out: Path) -> list[Row]:
    """Do what is left of the tasks, and return all of their rows.

    The tables at ``out`` and beside it (:func:`~benchmarks.robustness.table.budget_path`) keep what they
    hold of other tasks. On a cluster all machines see the data and the folder of weights under the same
    paths, and run in the folder of the repository.

    Raises
    ------
    InputError
        If a set or a package is missing, a file cannot be written, or there is no such scheduler.
    """
    settings.weights.mkdir(parents=True, exist_ok=True)
    known, budgets = read_rows(out), read_budgets(budget_path(out))
    contenders = list(dict.fromkeys(task.contender for task in tasks))
    with _pool(workers) as spread:
        for budget in tqdm(
            spread(partial(prepare, settings=settings), _lessons(tasks)), desc="train", unit="method"
        ):
            budgets.append(budget)
            write_budgets(budget_path(out), budgets)
        known_of: dict[tuple[object, ...], list[Row]] = {}
        for row in known:
            known_of.setdefault(_task_of(row), []).append(row)
        jobs = [(task, known_of.get(_task_key(task), [])) for task in tasks]
        jobs.sort(key=lambda job: contenders.index(job[0].contender))  # a worker loads it once
        return _collect(spread(partial(measure, settings=settings), jobs), len(jobs), known, out)


def prepare(lesson: tuple[Contender, tuple[float, ...]], settings: Settings) -> Budget:
    """Train or tune a contender for these noise levels, unless it is in the folder of weights."""
    torch.set_num_threads(1)
    contender, sigmas = lesson
    if contender.method in TUNED:
        return tuning_budget(contender, sigmas, settings)
    return learn(settings.lesson(contender), settings.weights)


def measure(job: tuple[Task, list[Row]], settings: Settings) -> list[Row]:
    """The rows of a task; those known that are of the same input and version are taken as they are."""
    torch.set_num_threads(1)
    task, known = job
    contender = task.contender
    denoiser = ready(contender, task.sigma, settings)
    valid = {row_key(row): row for row in known if row.version == denoiser.version}
    processor = machine().processor
    scale = data_range(task.test_set)
    rows = []
    for name, sigma, problem in cases(task):
        row = Row(
            task.study,
            task.shift,
            contender.train_set,
            contender.images,
            task.test_set,
            name,
            sigma,
            contender.method,
            contender.estimate,
            0.0,
            0.0,
            task.seed,
            denoiser.version,
            processor,
            _digest(problem),
        )
        found = valid.get(row_key(row))
        if found is None or found.input != row.input:
            denoised = problem.restored(denoiser.run(problem.noisy, problem.told, problem.seen))
            found = row._replace(
                psnr=round(psnr(problem.clean, denoised, data_range=scale), 4),
                ssim=round(ssim(problem.clean, denoised, data_range=scale), 5),
            )
        rows.append(found)
    return rows


def cases(task: Task) -> list[Case]:
    """The images of a task with their noise."""
    if task.shift == REAL:
        pairs = real_pairs(task.test_set, count=task.among, side=task.side)
        # Nobody knows the level; it is one for the set, as the scans are of one scanner.
        sigma = round(float(np.median([estimated_sigma(noisy) for _, _, noisy in pairs])), 1)
        found = [Case(name, sigma, Problem(clean, noisy, sigma)) for name, clean, noisy in pairs]
    else:
        images = test_images(task.test_set, count=task.among, side=task.side, seed=task.seed)
        problem = partial(
            shifted, task.shift, sigma=task.sigma, data_range=data_range(task.test_set), seed=task.seed
        )
        found = [
            Case(name, task.sigma, problem(clean, number=number))
            for number, (name, clean) in enumerate(images)
        ]
    return spaced(found, task.images)


def picture(row: Row, tasks: Iterable[Task], settings: Settings) -> Pictures:
    """Compute the images of a row again. The tasks are those of the run.

    Raises :class:`InputError` if the row is of none of them.
    """
    for task in tasks:
        if _task_key(task) == _task_of(row) and (task.sigma == row.sigma or task.shift == REAL):
            denoiser = ready(task.contender, task.sigma, settings)
            for name, sigma, problem in cases(task):
                if (name, sigma) == (row.image, row.sigma):
                    denoised = denoiser.run(problem.noisy, problem.told, problem.seen)
                    noisy = problem.restored(problem.noisy)
                    return Pictures(problem.clean, noisy, problem.restored(denoised))
    raise InputError(
        f"no task of this run makes the row {row_key(row)}; take the size and the studies that it was "
        "measured with."
    )


def _collect(batches: Iterator[list[Row]], count: int, known: Sequence[Row], out: Path) -> list[Row]:
    """Take rows in as they come, and write the table now and then, and at the end however it comes."""
    rows: list[Row] = []
    written = time.monotonic()
    try:
        for batch in tqdm(batches, total=count, desc="measure", unit="task"):
            rows += batch
            if time.monotonic() - written > SECONDS_BETWEEN_TABLES:
                write_rows(out, [*known, *rows])
                written = time.monotonic()
    finally:
        write_rows(out, [*known, *rows])
    return sorted({row_key(row): row for row in rows}.values())


@contextmanager
def _pool(workers: Workers) -> Iterator[Callable[..., Iterator[Any]]]:
    """(function, jobs) -> results, as they come."""
    try:
        from joblib import Parallel, delayed, parallel_config
    except ImportError as error:
        raise InputError(
            "the work is spread over processes by joblib, which is not installed; install it with "
            "pip install joblib."
        ) from error

    def spread(function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        parallel = Parallel(return_as="generator_unordered", batch_size=1)
        results: Iterator[Result] = parallel(delayed(function)(job) for job in jobs)
        return results

    if workers.scheduler is None:
        with parallel_config("loky", n_jobs=workers.processes, inner_max_num_threads=1):
            yield spread
        return
    with _client(workers.scheduler), parallel_config("dask"):
        yield spread


def _client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError(
            "a scheduler needs dask, which is not installed; install it with pip install "
            "'patchscore[cluster]', or leave --scheduler out to use the cores of this machine."
        ) from error
    try:
        return Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no dask scheduler at {address} ({error}); start one with dask scheduler, start "
            "its workers in the folder of the repository, and pass the address that it prints."
        ) from error


def _lessons(tasks: Sequence[Task]) -> list[tuple[Contender, tuple[float, ...]]]:
    """What has to be tuned or trained, once each, with the noise levels that it is measured at."""
    sigmas: dict[Contender, set[float]] = {}
    for task in tasks:
        one = task.contender._replace(estimate=TUNED.get(task.contender.method, ONE_STEP))
        if task.contender.is_prepared_here:
            sigmas.setdefault(one, set()).add(task.sigma)
    return [(contender, tuple(sorted(levels))) for contender, levels in sigmas.items()]


def _task_key(task: Task) -> tuple[object, ...]:
    return (task.study, task.shift, task.test_set, task.seed, *task.contender)


def _task_of(row: Row) -> tuple[object, ...]:
    """What :func:`_task_key` gives for the task of the row; several noise levels share it."""
    contender = row.method, row.estimate, row.train_set, row.training_images
    return (row.study, row.shift, row.test_set, row.seed, *contender)


def _digest(problem: Problem) -> str:
    content = problem.clean.tobytes() + problem.noisy.tobytes() + np.float64(problem.told).tobytes()
    return hashlib.sha256(content).hexdigest()[:12]
