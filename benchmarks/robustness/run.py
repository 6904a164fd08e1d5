"""The jobs of the robustness study: tune, train, measure, each in whichever process is free.

    rows = union over tasks of  { (PSNR, SSIM)(clean, restored(denoised(noisy))) : images of the task }

A task is the smallest piece: its rows come in together. Every process computes with one thread, so that
sums are in one order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.data import data_range, real_pairs, spaced, test_images
from benchmarks.machine import processor
from benchmarks.robustness.contenders import (
    ONE_STEP,
    TUNED,
    Settings,
    is_prepared_here,
    ready,
    tuning_budget,
)
from benchmarks.robustness.plan import Task
from benchmarks.robustness.shifts import REAL, Problem, shifted
from benchmarks.robustness.table import Budget, Row, Series
from benchmarks.robustness.training import learn
from benchmarks.study import Job
from benchmarks.tables import read_table, write_table
from benchmarks.workers import Workers
from patchscore.errors import InputError
from patchscore.evaluation.metrics import psnr, ssim
from patchscore.measurements.noise import estimated_sigma


class Case(NamedTuple):
    """One image of a task; sigma as the tables give it."""

    image: str
    sigma: float
    problem: Problem


def prepare_all(tasks: Sequence[Task], settings: Settings, workers: Workers, path: Path) -> None:
    """Train and tune what is not in the folder of weights yet; write what it took to ``path``."""
    settings.weights.mkdir(parents=True, exist_ok=True)
    budgets = {budget[:3]: budget for budget in read_table(path, Budget)}
    todo = lessons(tasks)
    with workers.spread(partial(prepare, settings=settings), todo) as results:
        for budget in tqdm(results, total=len(todo), desc="train", unit="method"):
            budgets[budget[:3]] = budget
            write_table(path, Budget._fields, sorted(budgets.values()))


def lessons(tasks: Sequence[Task]) -> list[tuple[Series, tuple[float, ...]]]:
    """What has to be tuned or trained, once each, with the noise levels that it is measured at."""
    sigmas: dict[Series, set[float]] = {}
    for task in tasks:
        one = task.contender._replace(estimate=TUNED.get(task.contender.method, ONE_STEP))
        if is_prepared_here(task.contender):
            sigmas.setdefault(one, set()).add(task.sigma)
    return [(contender, tuple(sorted(levels))) for contender, levels in sigmas.items()]


def prepare(lesson: tuple[Series, tuple[float, ...]], settings: Settings) -> Budget:
    """Train or tune a contender for these noise levels, unless it is in the folder of weights."""
    torch.set_num_threads(1)
    contender, sigmas = lesson
    if contender.method in TUNED:
        return tuning_budget(contender, sigmas, settings)
    return learn(settings.lesson(contender), settings.weights)


def jobs(tasks: Sequence[Task], settings: Settings) -> Iterator[Job]:
    """The tasks, in the order of their contenders, so that a worker loads each once."""
    contenders = list(dict.fromkeys(task.contender for task in tasks))
    for task in sorted(tasks, key=lambda task: contenders.index(task.contender)):
        version = ready(task.contender, task.sigma, settings).version
        known = _inputs(task._replace(contender=contenders[0], study=""))
        keys = [(*_key(task, image, sigma), version, content) for image, sigma, content in known]
        yield Job(partial(measure, task, settings), keys)


def measure(task: Task, settings: Settings) -> list[Row]:
    """The rows of a task."""
    torch.set_num_threads(1)
    denoiser = ready(task.contender, task.sigma, settings)
    scale = data_range(task.test_set)
    rows = []
    for name, sigma, problem in cases(task):
        denoised = problem.restored(denoiser.run(problem.noisy, problem.told, problem.seen))
        *key, seed = _key(task, name, sigma)
        found = [f(problem.clean, denoised, data_range=scale) for f in (psnr, ssim)]
        end = seed, denoiser.version, processor(), problem.digest
        rows.append(Row._make((*key, round(found[0], 4), round(found[1], 5), *end)))
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


def again(row: Row, tasks: Iterable[Task], settings: Settings) -> tuple[Problem, np.ndarray]:
    """Compute a row again: its problem and the restored image. The tasks are those of the run.

    Raises :class:`InputError` if the row is of none of them.
    """
    of_row = row.study, row.shift, row.test_set, row.series, row.seed
    for task in tasks:
        if (task.study, task.shift, task.test_set, task.contender, task.seed) != of_row:
            continue
        for name, sigma, problem in cases(task):
            if (name, sigma) == (row.image, row.sigma):
                denoiser = ready(task.contender, task.sigma, settings)
                denoised = denoiser.run(problem.noisy, problem.told, problem.seen)
                return problem, problem.restored(denoised)
    raise InputError(
        f"no task of this run makes the row {row}; take the size and the studies that it was "
        "measured with."
    )


@lru_cache(maxsize=512)
def _inputs(task: Task) -> list[tuple[str, float, str]]:
    """Image, sigma and digest of every case of a task, whoever denoises it."""
    return [(name, sigma, problem.digest) for name, sigma, problem in cases(task)]


def _key(task: Task, image: str, sigma: float) -> tuple[str | int | float, ...]:
    """The columns that tell a row from all others."""
    method, estimate, train_set, count = task.contender
    place = task.study, task.shift, train_set, count, task.test_set
    return (*place, image, sigma, method, estimate, task.seed)
