"""The command line: patchscore denoise | adapt | train | demo | info."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import patchscore
from patchscore.adaptation.adapt import adapt
from patchscore.adaptation.surprise import KEY as SURPRISE_KEY
from patchscore.checks import check_noise_level
from patchscore.denoising import denoise
from patchscore.errors import InputError
from patchscore.files import ImageFile, check_writable, image_files, read_image, write_image
from patchscore.images import training_images
from patchscore.learning.fit import fit
from patchscore.measurements.noisy_image import NoisyImage
from patchscore.priors.energy import ConvEnergy, PatchEnergy
from patchscore.priors.prior import PatchPrior
from patchscore.priors.zoo import bundled_priors, find_device, load_prior
from patchscore.storage import check_destination

# The default noise levels of `train`, as fractions of the range of the images: 3 to 60 for 8-bit ones.
LOWEST_FRACTION, HIGHEST_FRACTION = 3 / 255, 60 / 255
# Its schedule is that of the bundled priors.
BATCH, LEARNING_RATE, WARMUP = 4, 8e-3, 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 if some images failed, or 2 if the input cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: tqdm.write(
                f"warning: {message}", sys.stderr
            )
            return int(options.run(options))
    except InputError as error:
        print(f"patchscore: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("patchscore: stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="patchscore", description=patchscore.__doc__)
    parser.add_argument("--version", action="version", version=f"patchscore {patchscore.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    clean = commands.add_parser(
        "denoise",
        help="denoise an image, or every image of a folder",
        description="Remove white Gaussian noise from an image, or from every image of a folder. PNG, "
        "JPEG, TIFF and NPY; the bit depth of the file is kept.",
    )
    add = clean.add_argument
    add("input", metavar="IN", type=Path, help="an image, or a folder of images")
    add("output", metavar="OUT", type=Path, help="a file, or a folder if IN is one")
    add("--sigma", type=float, help="noise level in the unit of the file (default: estimated)")
    add("--adapt", action="store_true", help="let the prior learn from each image, for up to a minute")
    add("--std", metavar="OUT", type=Path, help="file or folder for the posterior standard deviation")
    add("--samples", type=int, help="posterior samples for the standard deviation (default: 16)")
    _add_common(clean, _denoise, "prior", "seed")

    move = commands.add_parser(
        "adapt",
        help="let a prior learn from noisy images of a new kind",
        description="Let a prior learn from noisy images of a new kind, without clean ones, and save "
        "the result as a prior for all images of that kind.",
    )
    add = move.add_argument
    add("folder", metavar="FOLDER", type=Path, help="noisy images")
    add("-o", "--output", metavar="PRIOR", type=Path, required=True, help="the adapted prior")
    add("--sigma", type=float, help="noise level in the unit of the files (default: each estimated)")
    add("--minutes", type=float, default=5.0, help="at most (default: %(default)s)")
    _add_common(move, _adapt, "prior", "seed")

    train = commands.add_parser(
        "train",
        help="train a prior on a folder of clean images",
        description="Train a prior on a folder of clean images. To continue an interrupted run, give "
        "the same command again.",
    )
    add = train.add_argument
    add("folder", metavar="FOLDER", type=Path, help="clean images")
    add("-o", "--output", metavar="PRIOR", type=Path, required=True, help="the trained prior")
    levels = "noise levels in the unit of the files (default: 3/255 to 60/255 of the images' range)"
    add("--sigmas", type=float, nargs=2, metavar=("LOW", "HIGH"), help=levels)
    length = train.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="how long to train (default: 10)")
    length.add_argument("--steps", type=int, help="how many steps to train")
    add("--width", type=int, default=32, help="hidden units of a layer (default: %(default)s)")
    patch = "for a network without convolutions (default: convolutions over patches of 15)"
    add("--patch-size", type=int, help=patch)
    add("--crop", type=int, default=64, help="side of the crops (default: %(default)s)")
    add("--mixed-precision", action="store_true", help="bfloat16 products: faster where supported")
    _add_common(train, _train, "seed")

    demo = commands.add_parser(
        "demo",
        help="denoise a photograph, beside total variation and BM3D",
        description="Add noise to a photograph of scikit-image, remove it, and compare.",
    )
    add = demo.add_argument
    add("--sigma", type=float, default=25, help="noise level, of 255 (default: %(default)s)")
    add("--output", type=Path, default=Path("patchscore-demo.png"), help="default: %(default)s")
    _add_common(demo, _demo)

    info = commands.add_parser("info", help="what a prior is and how it was trained")
    info.add_argument("prior", metavar="PRIOR", help="the name of a bundled prior, or a file")
    info.set_defaults(run=_info)
    return parser


def _add_common(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], *options: str
) -> None:
    """What the command runs, and the options that several commands have."""
    if "prior" in options:
        names = f"a prior file, or one of: {', '.join(bundled_priors())} (default: %(default)s)"
        parser.add_argument("--prior", default="natural-gray", metavar="NAME|FILE", help=names)
    if "seed" in options:
        parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    parser.set_defaults(run=run)


def _denoise(options: argparse.Namespace) -> int:
    if options.sigma is not None:
        check_noise_level(options.sigma)
    if options.samples is not None and options.std is None:
        raise InputError("--samples is for the standard deviation; add --std OUT to write it.")
    prior = load_prior(options.prior, options.device)
    if not options.input.is_dir():
        _denoise_file(options.input, options.output, options.std, prior, options)
        return 0
    paths = image_files(options.input)
    folders = [folder for folder in (options.output, options.std) if folder is not None]
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{options.input} is a folder, so OUT must be one too; {folder} is a file.")
        if folder.resolve() == options.input.resolve():
            raise InputError(f"OUT is IN ({folder}): the originals would be lost; give another folder.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"--std OUT is OUT ({options.std}); give another folder.")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    failures = []
    with tqdm(paths, unit="image") as bar:
        for path in bar:
            bar.set_postfix_str(path.name)
            std = options.std and options.std / f"{path.stem}.tif"
            try:
                _denoise_file(path, options.output / path.name, std, prior, options)
            except InputError as error:
                failures.append(str(error))
    if failures:
        failures.append(f"{len(failures)} of {len(paths)} images could not be denoised.")
    for failure in failures:
        print(f"patchscore: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _denoise_file(
    source: Path, target: Path, std: Path | None, prior: PatchPrior, options: argparse.Namespace
) -> None:
    for path in filter(None, (target, std)):
        if path.exists() and path.samefile(source):
            raise InputError(f"OUT is IN ({source}): the original would be lost; give another name.")
    image = read_image(source)
    check_writable(target, image, dtype=image.pixels.dtype)
    plain = ImageFile(image.pixels)
    if std is not None:
        check_writable(std, plain, dtype=np.float32)
    noisy = NoisyImage.of(
        image.pixels,
        options.sigma,
        channel_axis=None if image.pixels.ndim == 2 else -1,
        name=source.name,
    )
    if options.sigma is None:
        tqdm.write(f"{source.name}: estimated noise level {noisy.sigma:.3g}")
    generator = torch.Generator().manual_seed(options.seed)
    if options.adapt and noisy.sigma > 0:
        prior, report = adapt(prior, noisy, generator=generator)
        tqdm.write(f"{source.name}: {report}")
    if std is None:
        estimate = denoise(noisy, prior=prior)
    else:
        estimate, deviation = denoise(
            noisy, prior=prior, return_std=True, samples=options.samples or 16, generator=generator
        )
        write_image(std, plain._replace(pixels=deviation), dtype=np.float32)
    write_image(target, image._replace(pixels=estimate), dtype=image.pixels.dtype)


def _adapt(options: argparse.Namespace) -> int:
    if not options.minutes > 0:
        raise InputError(f"--minutes is {options.minutes}; expected a positive number.")
    check_destination(options.output)
    adapted, report = adapt(
        load_prior(options.prior, options.device),
        options.folder,
        options.sigma,
        generator=torch.Generator().manual_seed(options.seed),
        max_seconds=60 * options.minutes,
    )
    print(report)
    if not report.adapted:
        print(f"{options.output} was not written.")
        return 1
    adapted.save(options.output)
    return 0


def _train(options: argparse.Namespace) -> int:
    if options.steps is None and options.minutes is None:
        options.minutes = 10.0
    check_destination(options.output)
    first = read_image(image_files(options.folder)[0]).pixels
    torch.manual_seed(options.seed)
    channels = 1 if first.ndim == 2 else first.shape[2]
    network: ConvEnergy
    if options.patch_size is None:
        network = ConvEnergy((5, 3, 3), (1, 2, 3), channels, options.width)
    else:
        network = PatchEnergy(options.patch_size, channels, options.width)
    prior = PatchPrior(network.to(find_device(options.device)))
    images = training_images(options.folder, channels=network.channels, smallest=options.crop)
    if options.sigmas is None:
        low, high = np.quantile(
            np.concatenate([image.flatten()[::97] for image in images]), [0.001, 0.999]
        )
        options.sigmas = LOWEST_FRACTION * (high - low), HIGHEST_FRACTION * (high - low)
    print(
        f"{len(images)} images; noise levels {options.sigmas[0]:.4g} to {options.sigmas[1]:.4g} in the "
        "unit of the files"
    )
    checkpoint = options.output.with_name(f"{options.output.name}.checkpoint")
    history = fit(
        prior,
        images,
        sigmas=tuple(options.sigmas),
        crop=options.crop,
        boundary="symmetric",
        steps=options.steps,
        minutes=options.minutes,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        warmup=WARMUP,
        optimizer="soap",
        mixed_precision=options.mixed_precision,
        generator=torch.Generator().manual_seed(options.seed),
        checkpoint=checkpoint,
    )
    prior.save(options.output)
    checkpoint.unlink()
    print(f"{options.output}: {len(history.loss)} steps in {history.seconds / 60:.1f} minutes")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from patchscore.evaluation.demo import run_demo

    check_destination(options.output)
    print(run_demo(options.sigma, options.output, options.device))
    print(f"\npictures side by side: {options.output.resolve()}")
    return 0


def _info(options: argparse.Namespace) -> int:
    for title, content in _facts(load_prior(options.prior, "cpu"), options.prior):
        print(f"{title:14}{content}")
    return 0


def _facts(prior: PatchPrior, name: str) -> Iterator[tuple[str, str]]:
    """What a prior is and how it was trained, line by line."""
    network, card = prior.network, prior.card
    rows, columns = network.patch_shape
    parameters = sum(p.numel() for p in network.parameters())
    kinds = (("amplitude", prior.scale_invariant), ("brightness", network.brightness_invariant))
    yield "prior", card.get("name", name)
    yield "network", f"{type(network).__name__}, {parameters:,} parameters"
    yield "sees", f"patches of {rows} x {columns} pixels, {network.channels} channel(s)"
    yield "assembly", f"{prior.assembly}, boundary {prior.boundary}"
    yield "invariant to", ", ".join(kind for kind, true in kinds if true) or "nothing"
    if run := card.get("training"):
        in_bytes = "0..1" in card.get("data", "")
        low, high = ((255 if in_bytes else 1) * level for level in run["sigmas"])
        unit = "of 255" if in_bytes else "in the unit of its training images"
        yield "noise levels", f"{low:.4g} to {high:.4g} {unit}"
        length = f"{run['steps']:,} steps in {run['seconds'] / 60:.0f} minutes"
        yield "trained", f"{card['trained']}: {length} on {run['images']} images, {run['objective']}"
    if stages := card.get("stages"):
        total = sum(stage["steps"] for stage in stages)
        yield "", f"{total:,} steps in all, in {len(stages)} stages of which this was the last"
    for title in ("data", "terms"):
        if title in card:
            yield title, card[title]
    for entry in card.get("adapted", []):
        gain = f"estimated gain {100 * entry['gain']:.1f} +- {100 * entry['error']:.1f} % of the error"
        yield "adapted", f"{entry['date']}: to {entry['images']} noisy image(s), {gain}"
    known = SURPRISE_KEY in card
    yield "surprise", "can be computed" if known else "not available (see patchscore.expect)"
