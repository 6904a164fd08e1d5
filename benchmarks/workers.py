"""Where jobs are done: in this process, in several of this machine, or by the workers of a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from patchscore.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers(NamedTuple):
    """Processes of this machine, each with one thread, or a dask scheduler.

    On a cluster all machines see the data and the weights under the same paths, and run in the folder of
    the repository.
    """

    processes: int = 1
    scheduler: str | None = None

    @staticmethod
    def of(options: argparse.Namespace) -> Workers:
        """Those that the command line asks for."""
        return Workers(options.processes, options.scheduler)

    @contextmanager
    def spread(
        self, function: Callable[[Job], Result], jobs: Sequence[Job]
    ) -> Iterator[Iterator[Result]]:
        """Apply a function to all jobs; the results come as they are ready.

        Raises :class:`InputError` if joblib or dask is missing, or there is no such scheduler.
        """
        if self.processes == 1 and self.scheduler is None:
            yield map(function, jobs)
            return
        try:
            from joblib import Parallel, delayed, parallel_config
        except ImportError as error:
            raise InputError(
                "the work is spread over processes by joblib, which is not installed; install it with "
                "pip install joblib, or give --processes 1."
            ) from error

        def results() -> Iterator[Result]:
            parallel = Parallel(return_as="generator_unordered", batch_size=1)
            yield from parallel(delayed(function)(job) for job in jobs)

        if self.scheduler is None:
            with parallel_config("loky", n_jobs=self.processes, inner_max_num_threads=1):
                yield results()
            return
        with _client(self.scheduler), parallel_config("dask"):
            yield results()


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
