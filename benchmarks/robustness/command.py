"""The command: python -m benchmarks robustness [--quick]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.data import prepare_table
from benchmarks.robustness import summary
from benchmarks.robustness.contenders import Settings
from benchmarks.robustness.plan import FULL, QUICK, Task, tasks
from benchmarks.robustness.prices import price_table
from benchmarks.robustness.report import Picture, write_report
from benchmarks.robustness.run import Workers, picture, run
from benchmarks.robustness.sets import data_range
from benchmarks.robustness.summary import Difference
from benchmarks.robustness.table import STUDIES, Row, budget_path, read_budgets, read_rows
from benchmarks.robustness.training import CNN, NETWORKS, PATCH_PRIOR, Effort
from patchscore.errors import InputError
from patchscore.priors.zoo import find_device
from patchscore.storage import replacing


def add_arguments(parser: argparse.ArgumentParser, results: Path) -> None:
    """Declare the options."""
    parser.add_argument(
        "--quick", action="store_true", help="few images and short training: under five minutes"
    )
    parser.add_argument(
        "--studies",
        nargs="+",
        choices=STUDIES,
        default=STUDIES,
        metavar="STUDY",
        help=f"some of: {', '.join(STUDIES)} (default: all)",
    )
    parser.add_argument(
        "--test-sets", nargs="+", metavar="SET", help="measure on some of the test sets only"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"measure some of the methods only, by their names in the tables; {PATCH_PRIOR!r} must be "
        "among them",
    )
    parser.add_argument(
        "--training-images",
        nargs="+",
        type=int,
        metavar="N",
        help="measure those networks only that learn from so many images",
    )
    parser.add_argument(
        "--side",
        type=int,
        help=f"of the middle that is cut from larger images, in pixels (default: {FULL.side}; "
        f"{QUICK.side} with --quick)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("robustness"),
        metavar="FOLDER",
        help="of the networks; those that are there are not trained again (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"of training on photographs (default: {FULL.minutes:g}; {QUICK.minutes:g} with --quick)",
    )
    parser.add_argument(
        "--steps", type=int, help="train for so many steps instead, the same on every machine"
    )
    parser.add_argument(
        "--width",
        type=int,
        default=1,
        metavar="TIMES",
        help="give every network so many times its hidden channels (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where networks learn and are measured; a GPU serves one process (default: %(default)s)",
    )
    parser.add_argument(
        "--mixture", type=Path, metavar="FILE", help="of EPLL, from python -m benchmarks.epll"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of dask, such as tcp://host:8786, to spread the work over a cluster that sees the same "
        "folders",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="CSV",
        help=f"default: {results / 'robustness.csv'}, or robustness-quick.csv; the budgets, the "
        "comparisons and the report go beside it",
    )
    parser.add_argument(
        "--tables", action="store_true", help="measure nothing: print the tables of what CSV holds"
    )
    parser.set_defaults(results=results)


def main(options: argparse.Namespace) -> int:
    """Run, print the tables, write the report."""
    size = QUICK if options.quick else FULL
    out = options.out or options.results / f"robustness{'-quick' * options.quick}.csv"
    if options.tables:
        print(tables(read_rows(out)))
        return 0
    prepare_table(out)
    device = str(find_device(options.device))
    effort = Effort(options.minutes or size.minutes, options.steps, options.width, device)
    settings = Settings(
        options.weights.resolve(), effort, options.mixture, size.adaptation, options.seed
    )
    size = size._replace(side=options.side or size.side)
    planned = tasks(size, options.studies, mixture=options.mixture, seed=options.seed)
    todo = [
        task
        for task in planned
        if task.test_set in (options.test_sets or [task.test_set])
        and task.contender.method in (options.methods or [task.contender.method])
        and (
            task.contender.method not in NETWORKS
            or task.contender.images in (options.training_images or [task.contender.images])
        )
    ]
    counts = {task.contender.images for task in planned if task.contender.method == PATCH_PRIOR}
    if PATCH_PRIOR not in {task.contender.method for task in todo}:
        raise InputError(
            f"with these options nothing is left of {PATCH_PRIOR!r}, which is what others stand beside. "
            f"The test sets are {', '.join(sorted({task.test_set for task in planned}))}; the methods "
            f"are {', '.join(sorted({task.contender.method for task in planned}))}; the numbers of "
            f"training images are {', '.join(map(str, sorted(counts)))}."
        )
    rows = run(todo, settings, Workers(options.processes, options.scheduler), out)

    print(tables(rows))
    compared = [f"## {s}\n\n{markdown(summary.comparison(rows, s))}\n" for s in options.studies]
    with replacing(out.with_suffix(".md")) as beside:
        beside.write_text("\n".join(compared), encoding="utf-8")
    page = out.with_suffix(".html")
    write_report(page, rows, read_budgets(budget_path(out)), pictures(rows, todo, settings))
    print(
        f"\n{len(rows)} rows in {out}; the patch prior beside every rival in {out.with_suffix('.md')}; "
        f"the report is {page}.",
        file=sys.stderr,
    )
    return 0


def tables(rows: Sequence[Row]) -> str:
    """What is expected and measured, the PSNR, and the prices. Raises InputError for no rows."""
    if not rows:
        raise InputError("there are no rows to make tables of; run the benchmark first, or give --out.")
    found = [
        markdown(summary.claims(rows)),
        "Mean PSNR in dB, of the same images in every column:",
        markdown(summary.headline(rows)),
    ]
    head, *lines = price_table(rows)
    if lines:
        found += ["PSNR lost by learning from other images, in dB:", markdown([head, *lines])]
    return "\n\n".join(found)


def pictures(rows: Sequence[Row], todo: Sequence[Task], settings: Settings) -> list[Picture]:
    """Where the patch prior is furthest behind and ahead in every study, and behind each rival."""
    several = (d for d in summary.differences(rows) if d.images > 1 and d.rival.method != "noisy")
    found = sorted(several, key=lambda d: d.psnr.mean)
    chosen: dict[Difference, None] = {}
    for study in STUDIES:
        ours = [d for d in found if d.study == study]
        chosen |= dict.fromkeys([*ours[:1], *ours[-1:]])
    for rival in ("BM3D", CNN):
        chosen |= dict.fromkeys([d for d in found if d.rival.method == rival][:1])
    return [_picture(difference, rows, todo, settings) for difference in chosen]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head."""
    head, *body = lines
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def _picture(
    difference: Difference, rows: Sequence[Row], todo: Sequence[Task], settings: Settings
) -> Picture:
    """The image on which the patch prior does worst beside this rival."""
    condition = difference.study, difference.shift, difference.worst_image, difference.sigma
    right, left = (
        next(
            row
            for row in rows
            if (row.study, row.shift, row.image, row.sigma) == condition
            and (row.method, row.estimate, row.train_set, row.training_images) == series
        )
        for series in (difference.prior, difference.rival)
    )
    ours, theirs = (picture(row, todo, settings) for row in (right, left))
    return Picture(
        f"{right.test_set}, {right.image}",
        f"{right.study}: {right.shift}, sigma {right.sigma:g}; trained on {right.training_images} "
        f"images of {right.train_set}.",
        ours.clean,
        ours.noisy,
        f"{left.method}, {left.estimate}",
        theirs.denoised,
        f"{right.method}, {right.estimate}",
        ours.denoised,
        data_range(right.test_set),
    )
