"""The runner of the studies: what is measured, what the table gives, and where rows come from."""

from __future__ import annotations

import csv
import socket
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from skimage.io import imsave

from benchmarks import __main__ as command
from benchmarks import quality, train
from benchmarks.methods import version_of
from benchmarks.study import Job, Option, Study
from benchmarks.tables import Table, markdown, read_table
from patchscore import load_prior
from patchscore.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
TABLES = [
    (name, path)
    for name in command.STUDIES
    for path in sorted((ROOT / "benchmarks/results").glob(f"{name}*.csv"))
    if not path.stem.endswith(("-budget", "-cost"))
]


class Row(NamedTuple):
    name: str
    square: int
    known: float | None
    version: str = ""


class Squares:
    """A study that counts what it measures, and stops after so many jobs if it is told to."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.version, self.limit = "one", 100
        self.study = Study(
            "squares",
            "Squares of numbers.",
            Row,
            key=("name",),
            jobs=self.jobs,
            summary=lambda rows, options: " ".join(str(row.square) for row in rows),
            options=(Option("numbers", (1, 2, 3), "to square", quick=(5,)), Option("seed", 0, "unused")),
        )

    def jobs(self, options: Namespace) -> Iterator[Job]:
        for number in options.numbers:
            key = str(number), self.version
            yield Job(partial(self.measure, number), [key])

    def measure(self, number: int) -> list[Row]:
        if len(self.measured) == self.limit:
            raise KeyboardInterrupt
        self.measured.append(str(number))
        return [Row(str(number), number**2, None if number % 2 else 0.1, self.version)]

    def run(self, *arguments: object) -> int:
        parser = ArgumentParser()
        self.study.add_to(parser)
        words = [str(argument) for argument in arguments]
        options = parser.parse_args(words)
        if options.quick:
            parser.set_defaults(**self.study.quick)
            options = parser.parse_args(words)
        return self.study.run(options)


@pytest.fixture
def squares() -> Squares:
    return Squares()


def test_what_the_table_holds_is_not_measured_again(squares, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "squares.csv"
    assert squares.run("--out", out) == 0
    assert squares.run("--out", out, "--numbers", 3, 4, 1) == 0
    assert squares.measured == ["1", "2", "3", "4"]
    assert capsys.readouterr().out.splitlines() == ["1 4 9", "9 16 1"]
    rows = read_table(out, Row)
    assert rows == [Row(str(n), n**2, None if n % 2 else 0.1, "one") for n in (1, 2, 3, 4)]


def test_a_stopped_run_keeps_its_rows_and_goes_on(squares, tmp_path) -> None:
    out = tmp_path / "squares.csv"
    squares.limit = 2
    with pytest.raises(KeyboardInterrupt):
        squares.run("--out", out)
    assert [row.name for row in read_table(out, Row)] == ["1", "2"]
    squares.limit = 100
    squares.run("--out", out)
    assert squares.measured == ["1", "2", "3"]


def test_stale_rows_are_told_and_replaced(squares, tmp_path, capsys) -> None:
    out = tmp_path / "squares.csv"
    squares.run("--out", out)
    squares.version = "two"
    squares.run("--out", out, "--numbers", 2, 3)
    assert "2 rows of" in capsys.readouterr().err
    assert [row.version for row in read_table(out, Row)] == ["one", "two", "two"]


def test_a_table_without_the_new_columns_is_valid(squares, tmp_path) -> None:
    out = tmp_path / "squares.csv"
    out.write_text("name,square,known,retired\n2,4,0.1,x\n", encoding="utf-8")
    squares.run("--out", out, "--numbers", 2)
    assert squares.measured == []
    out.write_text("name,known\n2,0.1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"not a table of the study squares .*there is no square"):
        squares.run("--out", out)


def test_rows_say_where_they_come_from_and_no_more(squares, tmp_path) -> None:
    out = tmp_path / "squares.csv"
    squares.run("--out", out)
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        assert line["package"].startswith("patchscore ")
        assert "cores" in line["machine"]
        assert len(line["date"]) == len("2026-11-21")
    assert socket.gethostname() not in out.read_text()
    assert str(tmp_path) not in out.read_text()


def test_a_quick_run_has_its_own_defaults_and_takes_what_is_given(squares, tmp_path) -> None:
    out = tmp_path / "squares.csv"
    squares.run("--quick", "--out", out)
    squares.run("--quick", "--numbers", 7, "--out", out)
    assert squares.measured == ["5", "7"]


def test_tables_measure_nothing(squares, tmp_path, capsys) -> None:
    out = tmp_path / "squares.csv"
    with pytest.raises(InputError, match="there are no rows in"):
        squares.run("--tables", "--out", out)
    squares.run("--out", out, "--numbers", 2)
    assert squares.run("--tables", "--out", out) == 0
    assert squares.measured == ["2"]
    assert capsys.readouterr().out.splitlines() == ["4", "4"]


def test_markdown() -> None:
    assert markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_all_studies_are_listed(capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    words = capsys.readouterr().out.split()
    assert [name for name in command.STUDIES if name not in words] == []


@pytest.mark.parametrize("name", command.STUDIES)
def test_a_study_has_its_name_and_readable_help(name: str, capsys) -> None:
    study = import_module(f"benchmarks.{name.replace('-', '_')}").STUDY
    with pytest.raises(SystemExit):
        command.main([name, "--help"])
    printed = capsys.readouterr().out
    assert "--out" in printed or name == "fuzz"  # which has no table
    assert ":func:" not in printed
    if isinstance(study, Study):
        assert study.name == name
        assert {*study.key, *study.depends} <= set(study.row._fields)
        assert "seed" in study.row._fields


@pytest.mark.parametrize(("name", "path"), TABLES, ids=lambda value: getattr(value, "stem", value))
def test_a_committed_table_is_one_of_its_study(name: str, path: Path) -> None:
    study = import_module(f"benchmarks.{name.replace('-', '_')}").STUDY
    table = Table(path, study.row, study.key, study.depends, name)
    with path.open(newline="", encoding="utf-8") as file:
        assert len(table.rows) == sum(1 for _ in csv.reader(file)) - 1


@pytest.mark.parametrize(
    ("name", "table"), [("natural-gray", "quality.csv"), ("natural-gray-fast", "quality-fast.csv")]
)
def test_the_committed_rows_are_of_the_bundled_weights(name: str, table: str) -> None:
    rows = read_table(ROOT / "benchmarks/results" / table, quality.Row)
    assert {row.version for row in rows if row.method == "patchscore"} == {version_of(load_prior(name))}


def test_colour_photographs_are_held_out_and_halved(tmp_path, monkeypatch) -> None:
    (tmp_path / "bsd432").mkdir()
    for number in range(23):
        pixels = np.random.default_rng(number).integers(0, 256, (7, 10, 3), dtype=np.uint8)
        imsave(tmp_path / "bsd432" / f"{number:02d}.png", pixels, check_contrast=False)
    monkeypatch.setenv("PATCHSCORE_DATA", str(tmp_path))
    train.split.cache_clear()
    learned, held_out = train.split("natural-color")
    train.split.cache_clear()
    assert (len(learned), len(held_out)) == (2 * 20, 3)  # numbers 0, 11 and 22
    assert {image.shape for image in learned} == {(7, 10, 3), (3, 5, 3)}
    whole, half = learned[4], learned[24]
    assert half[2, 3] == pytest.approx(whole[4:6, 6:8].mean((0, 1)), abs=1e-15)
    first = np.random.default_rng(0).integers(0, 256, (7, 10, 3), dtype=np.uint8) / 255
    assert np.array_equal(held_out[0], first)
