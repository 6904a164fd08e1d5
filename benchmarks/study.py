"""One runner for all studies: their command lines, their tables on disk, and going on after a stop.

    options -> jobs -> rows that the table holds already, and rows measured now -> summary

A study says what a row is, which jobs make its rows, how one job is measured and what the rows say. The
runner parses the options, measures what is missing or stale, and writes the table every now and then, so
that a run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple

from tqdm import tqdm

from benchmarks.tables import Row, Table, Values, prepare_table, read_table
from benchmarks.workers import Workers
from patchscore.errors import InputError

RESULTS = Path("benchmarks/results")
# The table is written again after this many times the seconds that writing took.
WRITING_SHARE = 20.0


class Option(NamedTuple):
    """An option ``--name`` of a study, of the type of its default; a tuple takes several values.

    Attributes
    ----------
    quick : the default of a run with ``--quick``, if it is another
    choices : the values that are allowed, if not all are
    kind : the type, where the default is None
    """

    name: str
    default: Any
    help: str
    quick: Any = None
    choices: Collection[Any] | None = None
    kind: Callable[[str], Any] | None = None

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Declare it."""
        flag, several = f"--{self.name}", isinstance(self.default, tuple)
        if isinstance(self.default, bool):
            parser.add_argument(flag, action="store_true", help=self.help)
            return
        words = self.help if self.choices is None else f"{self.help}: {_text(tuple(self.choices))}"
        defaults = [] if self.default in (None, ()) else [f"default: {_text(self.default)}"]
        if self.quick is not None:
            defaults.append(f"{_text(self.quick)} with --quick")
        if defaults:
            words += f" ({'; '.join(defaults)})"
        first = self.default[0] if several and self.default else self.default
        parser.add_argument(
            flag,
            default=self.default,
            nargs="+" if several else None,
            type=self.kind or type(first),
            choices=self.choices,
            metavar=self.name.rstrip("s").upper().replace("-", "_"),
            help=words,
        )


PRIOR = Option("prior", "natural-gray", "a bundled prior, or a prior file")
SEED = Option("seed", 0, "of the noise and of all other random numbers")
SIGMAS = Option("sigmas", (15.0, 25.0, 50.0), "noise levels, of 255", quick=(25.0,))


class Job(NamedTuple):
    """The smallest piece of work, whose rows come in together.

    Attributes
    ----------
    run : () -> rows
    rows
        Of each of its rows the values of the columns ``key`` and ``depends`` of the study. If there are
        none, the rows cannot be known beforehand, and the job is always done.
    """

    run: Callable[[], Iterable[Values]]
    rows: Sequence[Values] = ()


@dataclass(frozen=True)
class Study(Generic[Row]):
    """A study of the benchmarks: ``python -m benchmarks NAME``.

    Attributes
    ----------
    name : in the command line, and of its table
    about : the docstring of its module
    row : the named tuple that is a row of its table
    key : the columns that tell a row from all others
    depends : the columns that have to stay the same for a row to stay valid, such as digests and seeds
    jobs : options -> what there is to measure
    summary : (rows, options) -> text to print
    variant : an option without a value that gives the study a table of its own
    parallel : whether the jobs may be spread over processes and machines
    """

    name: str
    about: str
    row: type[Row]
    key: tuple[str, ...]
    jobs: Callable[[argparse.Namespace], Iterable[Job]]
    summary: Callable[[Sequence[Row], argparse.Namespace], str]
    options: tuple[Option, ...] = ()
    depends: tuple[str, ...] = ("version",)
    variant: str = ""
    parallel: bool = False

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options of the study and those of the runner."""
        for option in self.options:
            option.add_to(parser)
        if self.quick:
            parser.add_argument("--quick", action="store_true", help="a small run, to try the study")
        if self.parallel:
            Option("processes", 2, "that work at the same time").add_to(parser)
            words = "of dask, such as tcp://host:8786, to spread the work over a cluster"
            Option("scheduler", None, words, kind=str).add_to(parser)
        words = f"the table (default: {RESULTS}/{self.name}.csv)"
        parser.add_argument("--out", type=Path, metavar="CSV", help=words)
        words = "measure nothing: print what the table says"
        parser.add_argument("--tables", action="store_true", help=words)

    @property
    def quick(self) -> dict[str, Any]:
        """The defaults of a quick run."""
        return {o.name.replace("-", "_"): o.quick for o in self.options if o.quick is not None}

    def run(self, options: argparse.Namespace) -> int:
        """Measure, and print the summary; 0, the exit status of a command that went well.

        Raises :class:`InputError` if something cannot be measured, or the table cannot be used.
        """
        if options.out is None:
            variant = f"-{self.variant}" if self.variant and getattr(options, self.variant) else ""
            quick = "-quick" if getattr(options, "quick", False) else ""
            options.out = RESULTS / f"{self.name}{variant}{quick}.csv"
        if options.tables:
            rows = read_table(options.out, self.row, self.name)
            if not rows:
                raise InputError(
                    f"there are no rows in {options.out}; run the study first, or give --out."
                )
        else:
            rows = self.measure(options)
        print(self.summary(rows, options))
        return 0

    def measure(self, options: argparse.Namespace) -> list[Row]:
        """The rows of all jobs in their order: from the table what it holds, the others measured now."""
        prepare_table(options.out)
        table = Table(options.out, self.row, self.key, self.depends, f"the study {self.name}")
        jobs = list(self.jobs(options))
        if not jobs:
            raise InputError("with these options there is nothing to measure; leave some of them out.")
        stale = sum(table.is_stale(row) for job in jobs for row in job.rows)
        if stale:
            words = "were made with other weights, code, images or seeds, and are measured again"
            print(f"benchmarks: {stale} rows of {options.out} {words}.", file=sys.stderr)
        todo = [n for n, job in enumerate(jobs) if not job.rows or not all(map(table.holds, job.rows))]
        workers = Workers.of(options) if self.parallel else Workers()
        found: dict[int, list[Any]] = {}
        next_writing = time.monotonic()
        try:
            with workers.spread(_done, [(n, jobs[n].run) for n in todo]) as results:
                for number, rows in tqdm(results, total=len(todo), desc=self.name, unit="job"):
                    found[number] = rows
                    table.add(rows)
                    start = time.monotonic()
                    if start >= next_writing:
                        table.write()
                        next_writing = time.monotonic() + WRITING_SHARE * (time.monotonic() - start)
        finally:
            if found:
                table.write()
        return [
            row
            for n, job in enumerate(jobs)
            for row in (found[n] if n in found else map(table.row, job.rows))
        ]


def _done(numbered: tuple[int, Callable[[], Iterable[Values]]]) -> tuple[int, list[Values]]:
    number, run = numbered
    return number, list(run())


def _text(value: Any) -> str:
    """A default as one would type it."""
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
