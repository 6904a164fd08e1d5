"""The command line: python -m benchmarks quality | objectives | phantoms | robustness | speed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import objectives, phantoms, quality, speed, throughput
from benchmarks.data import prepare_table, write_table
from benchmarks.robustness import command as robustness
from patchscore.errors import InputError
from patchscore.evaluation.baselines import import_bm3d

RESULTS = Path("benchmarks/results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all went well, 1 for a target that is missed, 2 for unusable input."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except InputError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    with_prior = argparse.ArgumentParser(add_help=False)
    with_prior.add_argument(
        "--prior",
        default="natural-gray",
        metavar="NAME|FILE",
        help="a bundled prior, or a prior file (default: %(default)s)",
    )

    good = commands.add_parser(
        "quality",
        parents=[with_prior],
        help="PSNR and SSIM on sets of photographs",
        description="PSNR and SSIM on sets of gray photographs with white Gaussian noise. The sets are "
        "looked for in the folder that the environment variable PATCHSCORE_DATA names. A run that was "
        "stopped goes on where it was when the same command is given again.",
    )
    good.add_argument(
        "--sets", nargs="+", default=["bsd68", "set12"], metavar="SET", help="default: bsd68 set12"
    )
    good.add_argument(
        "--sigmas",
        nargs="+",
        type=float,
        default=[15.0, 25.0, 50.0],
        metavar="SIGMA",
        help="noise levels, of 255 (default: 15 25 50)",
    )
    good.add_argument(
        "--methods",
        nargs="+",
        choices=quality.METHODS,
        default=quality.METHODS,
        metavar="METHOD",
        help=f"some of: {', '.join(quality.METHODS)} (default: all)",
    )
    good.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    good.add_argument(
        "--out", type=Path, default=RESULTS / "quality.csv", metavar="CSV", help="default: %(default)s"
    )
    good.set_defaults(run=_quality)

    learn = commands.add_parser(
        "objectives",
        help="learning from noisy images alone, beside clean ones",
        description="Train small priors of one size from clean images and from noisy images alone, and "
        "measure them on photographs at the same noise level.",
    )
    learn.add_argument("--train", default="bsd400", metavar="SET", help="default: %(default)s")
    learn.add_argument("--test", default="bsd68", metavar="SET", help="default: %(default)s")
    learn.add_argument("--sigma", type=float, default=25.0, help="of 255 (default: %(default)s)")
    learn.add_argument("--steps", type=int, default=1500, help="default: %(default)s")
    learn.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "objectives.csv",
        metavar="CSV",
        help="default: %(default)s",
    )
    learn.set_defaults(run=_objectives)

    disks = commands.add_parser(
        "phantoms",
        help="MAP, Tweedie and total variation on images of one disk",
        description="Train two priors on phantoms, of one disk each, and measure what their maximum of "
        "the posterior and their one-step estimate make of other phantoms with noise.",
    )
    disks.add_argument(
        "--weights",
        type=Path,
        default=Path("phantoms"),
        metavar="FOLDER",
        help="of the priors; those that are there are not trained again (default: %(default)s)",
    )
    disks.add_argument("--minutes", type=float, default=4.0, help="of training (default: %(default)s)")
    disks.add_argument(
        "--sigmas",
        nargs="+",
        type=float,
        default=[0.5, 1.0],
        metavar="SIGMA",
        help="noise levels, in units of the spread of the background (default: 0.5 1)",
    )
    disks.add_argument("--images", type=int, default=20, help="to test on (default: %(default)s)")
    disks.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    disks.add_argument(
        "--out", type=Path, default=RESULTS / "phantoms.csv", metavar="CSV", help="default: %(default)s"
    )
    disks.set_defaults(run=_phantoms)

    change = commands.add_parser(
        "robustness",
        help="what methods lose when content, scanner, gain, geometry or noise change",
        description="Tune and train every method with the same budget, measure all of them in and out "
        "of distribution, print the drops and the paired differences, and write a report. A run that "
        "was stopped goes on where it was when the same command is given again.",
    )
    robustness.add_arguments(change, RESULTS)
    change.set_defaults(run=robustness.main)

    fast = commands.add_parser(
        "speed",
        parents=[with_prior],
        help="seconds beside other methods and matrix products, and the peak of memory",
        description="Seconds for 512 x 512 pixels beside other methods on the same cores, the share of "
        "the rate of matrix products, the growth with the size of the image, the start of a process, "
        "and the peak of memory for 2048 x 2048. Close other programs first.",
    )
    fast.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    fast.add_argument(
        "--mixture", type=Path, metavar="FILE", help="of EPLL, from python -m benchmarks.epll"
    )
    fast.add_argument("--large", action="store_true", help="measure the growth up to 8192 x 8192")
    fast.add_argument("--out", type=Path, metavar="CSV", help="also write the numbers to this file")
    fast.add_argument(
        "--check", action="store_true", help="exit with 1 if a target is missed; needs BM3D"
    )
    fast.set_defaults(run=_speed)
    return parser


def _quality(options: argparse.Namespace) -> int:
    prepare_table(options.out)
    methods = quality.select_methods(options.methods, options.prior)
    rows = quality.measure(options.sets, options.sigmas, methods, seed=options.seed, out=options.out)
    means = quality.averages(rows)
    cells = {(mean.set, mean.method, mean.sigma): f"{mean.psnr:.2f} / {mean.ssim:.3f}" for mean in means}
    lines = {(mean.set, mean.images, mean.method, mean.estimate): None for mean in means}
    print(
        _markdown(
            ["set", "method", "estimate", *(f"{sigma:g}" for sigma in options.sigmas)],
            [
                [f"{name} ({images})", method, estimate]
                + [cells[name, method, sigma] for sigma in options.sigmas]
                for name, images, method, estimate in lines
            ],
        )
    )
    print("\nPSNR in dB / SSIM, averaged over the images of the set, for noise of sigma of 255.")
    return 0


def _objectives(options: argparse.Namespace) -> int:
    results = objectives.compare_objectives(
        train=options.train, test=options.test, sigma=options.sigma, steps=options.steps
    )
    print(
        _markdown(
            ["objective, training images", f"PSNR on {options.test}", "steps", "seconds"],
            [[r.objective, f"{r.psnr:.2f} dB", str(r.steps), f"{r.seconds:.0f}"] for r in results],
        )
    )
    print(f"\nOne-step estimate, noise of {options.sigma:g} of 255; the seconds are those of training.")
    write_table(
        options.out,
        ["train", "test", "sigma", *objectives.Result._fields],
        [[options.train, options.test, options.sigma, *result] for result in results],
    )
    return 0


def _phantoms(options: argparse.Namespace) -> int:
    prepare_table(options.out)
    priors = phantoms.train(options.weights, minutes=options.minutes, seed=options.seed)
    rows = phantoms.measure(priors, options.sigmas, images=options.images, seed=options.seed)
    write_table(options.out, phantoms.Row._fields, rows)
    over = [f"over {name}" for name in phantoms.BASELINES]
    print(_markdown(["sigma", "method", "levels / sigma", "PSNR", *over], phantoms.table(rows)))
    counted = [(row.steps or 0, row.falls) for row in rows if row.falls is not None]
    steps, falls = (sum(numbers) for numbers in zip(*counted, strict=True))
    print(
        f"\nPSNR in dB, averaged over {options.images} phantoms; differences are paired, with their "
        f"standard errors.\nWith a potential MAP took {steps} steps, image by image; its objective "
        f"fell in {falls} of them."
    )
    return 0


def _speed(options: argparse.Namespace) -> int:
    if options.check:
        import_bm3d()
    if options.out is not None:
        prepare_table(options.out)
    if options.mixture is None:
        print("EPLL is left out; give the file of its mixture by --mixture.\n", file=sys.stderr)
    sides = throughput.GROWTH_SIDES + (throughput.LARGEST_SIDE,) * options.large
    timings = speed.time_denoisers(options.prior, rounds=options.rounds, mixture=options.mixture)
    lines = [
        *speed.report(timings, speed.peak_memory(options.prior)),
        *throughput.shares(options.prior, rounds=options.rounds),
        *throughput.growth(options.prior, rounds=options.rounds, sides=sides),
        *throughput.start_up(options.prior, rounds=options.rounds),
    ]
    machine = speed.machine()
    verdicts = {None: "", True: "met", False: "not met"}
    print(
        _markdown(
            ["quantity", "median", "min", "max", "target", ""],
            [
                [
                    line.quantity,
                    *(f"{x:.4g} {line.unit}".strip() for x in (line.median, line.least, line.greatest)),
                    line.target,
                    verdicts[line.met],
                ]
                for line in lines
            ],
        )
    )
    print(
        f"\n{machine.processor}, {machine.cores} cores, {machine.torch_threads} threads of "
        f"PyTorch {machine.torch}; {options.rounds} rounds."
    )
    if options.out is not None:
        write_table(
            options.out,
            ["prior", *speed.Line._fields, *speed.Machine._fields],
            [[options.prior, *line, *machine] for line in lines],
        )
    return int(options.check and any(line.met is False for line in lines))


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


if __name__ == "__main__":
    sys.exit(main())
