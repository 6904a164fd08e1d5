"""The command line: patchscore denoise | restore | adapt | train | demo | info."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike
from tqdm import tqdm

from patchscore.adaptation.adapt import adapt
from patchscore.adaptation.noise_estimation import noise_and_image
from patchscore.arguments import AUTO, command_parser
from patchscore.block_runs import denoise_stack_file
from patchscore.checks import check_noise_level, noise_level_range
from patchscore.denoising import denoise, suitable_prior
from patchscore.errors import InputError
from patchscore.files import ImageFile, check_writable, image_files, read_image, write_image
from patchscore.images import training_images
from patchscore.jobs import Job, check_new, jobs
from patchscore.learning.fit import fit
from patchscore.memory import check_memory, enough_memory
from patchscore.prior_facts import prior_facts
from patchscore.priors.energy import ConvEnergy, PatchEnergy
from patchscore.priors.prior import KIND, PatchPrior
from patchscore.priors.zoo import SUFFIX, find_device, load_prior
from patchscore.restore_files import Damage, restore_file
from patchscore.stack_files import is_stack
from patchscore.storage import check_destination, reading
from patchscore.terminal import printable, tell

# The default noise levels of `train`, as fractions of the range of the images: 3 to 60 for 8-bit ones.
LOWEST_FRACTION, HIGHEST_FRACTION = 3 / 255, 60 / 255
# Its schedule is that of the bundled priors.
BATCH, LEARNING_RATE, WARMUP = 4, 8e-3, 100
# Bytes that denoising takes for each number of the image, and a training for each byte of its weights.
BYTES_PER_VALUE, TRAINING = 30, 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 if some images failed, or 2 if the input cannot be used."""
    if arguments is None:  # a process of its own: to end it cleans up as Ctrl-C does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = command_parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: tell(f"warning: {message}", sys.stderr)
            return COMMANDS[options.command](options)
    except (InputError, OSError) as error:
        tell(f"patchscore: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        tell("patchscore: stopped.", sys.stderr)
        return 130


def _generator(options: argparse.Namespace) -> torch.Generator:
    if not 0 <= options.seed < 2**63:
        raise InputError(f"--seed is {options.seed}; expected a whole number from 0 to 2^63 - 1.")
    return torch.Generator().manual_seed(options.seed)


def _check_prior(options: argparse.Namespace) -> None:
    """An error if no prior can be written to ``--output``."""
    if options.output.suffix != SUFFIX:
        raise InputError(f"{options.output} does not end in {SUFFIX}, as files of priors do.")
    check_destination(options.output, kind=KIND)
    if not options.force:
        check_new([options.output], advice="--force overwrites it")


def _denoise(options: argparse.Namespace) -> int:
    if options.sigma is not None:
        check_noise_level(options.sigma)
    if options.samples is not None and options.std is None:
        raise InputError("--samples is for the standard deviation; add --std OUT to write it.")
    _generator(options)
    if options.workers < 1:
        raise InputError(f"--workers is {options.workers}; expected 1 or more.")
    prior = None if options.prior == AUTO else load_prior(options.prior, options.device)

    def work(job: Job) -> None:
        if is_stack(job.source):
            _denoised_stack(job, options)
        else:
            _denoised(job, prior, options)

    return _over_images(options, options.std, work, "denoised")


def _restore(options: argparse.Namespace) -> int:
    if options.noise is not None:
        check_noise_level(options.noise)
    damage = Damage.told(options.psf, options.scale, options.mask)
    device = find_device(options.device)
    prior = AUTO if options.prior == AUTO else load_prior(options.prior, device)

    def work(job: Job) -> None:
        noise = restore_file(
            job.source, job.target, damage, options.noise, prior=prior, device=device,
            positive=options.positive,
        )  # fmt: skip
        if options.noise is None:
            tell(f"{job.source.name}: estimated noise level {noise:.3g}")

    return _over_images(options, None, work, "restored")


def _over_images(
    options: argparse.Namespace, std: Path | None, work: Callable[[Job], None], done: str
) -> int:
    """Work on an image, or on every image of a folder; 1 if some of these cannot be used, else 0."""
    planned = jobs(options.input, options.output, std)
    if options.skip_existing:
        images = len(planned)
        planned = [job for job in planned if not all(map(os.path.exists, job.outputs))]
        tell(f"{images - len(planned)} of {images} images are done already.")
    elif not options.force:
        advice = "--skip-existing makes what is missing, --force overwrites"
        check_new((path for job in planned for path in job.outputs), advice=advice)
    if not os.path.isdir(options.input) or is_stack(options.input):
        for job in planned:
            with enough_memory(job.source):
                work(job)
        return 0
    for folder in filter(None, (options.output, std)):
        folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tqdm(planned, unit="image") as bar:
        for job in bar:
            bar.set_postfix_str(printable(job.source.name))
            try:
                with enough_memory(job.source):
                    work(job)
            except InputError as error:
                failed += 1
                tell(f"patchscore: {error}", sys.stderr)
    if failed:
        tell(f"patchscore: {failed} of {len(planned)} images could not be {done}.", sys.stderr)
    return 1 if failed else 0


def _denoised_stack(job: Job, options: argparse.Namespace) -> None:
    if options.adapt or job.std is not None:
        raise InputError(
            f"{job.source} is a stack, and --adapt and --std are for single images; adapt a prior to "
            "some of its planes first (patchscore adapt), and give it as --prior."
        )
    prior = None if options.prior == AUTO else options.prior
    level = denoise_stack_file(
        job.source, job.target, options.sigma, prior=prior, axes=options.axes,
        orientations=options.orientations, device=options.device, workers=options.workers,
        scheduler=options.scheduler, force=options.force,
    )  # fmt: skip
    if options.sigma is None:
        tell(f"{job.source.name}: estimated noise level {level:.3g}")


def _denoised(job: Job, prior: PatchPrior | None, options: argparse.Namespace) -> None:
    source, target, std = job
    generator = _generator(options)
    image = read_image(source, bytes_per_value=BYTES_PER_VALUE)
    check_writable(target, image, dtype=image.pixels.dtype)
    plain = ImageFile(image.pixels)
    if std is not None:
        check_writable(std, plain, dtype=np.float32)
    axis = None if image.pixels.ndim == 2 else -1
    noise, noisy = noise_and_image(image.pixels, options.sigma, channel_axis=axis, name=source.name)
    if options.sigma is None:
        tell(f"{source.name}: noise {noise.describe(float(np.median(image.pixels)))}")
    if prior is None:
        prior = load_prior(suitable_prior(noise, len(noisy.pixels)), options.device)
    if options.adapt and noisy.sigma > 0:
        prior, report = adapt(prior, noisy, generator=generator)
        tell(f"{source.name}: {report}")

    def write(path: Path, result: ImageFile, dtype: DTypeLike) -> None:
        if not (options.skip_existing and os.path.exists(path)):
            write_image(path, result, dtype=dtype)

    if std is None:
        estimate = denoise(image.pixels, noise, channel_axis=axis, prior=prior)
    else:
        samples = 16 if options.samples is None else options.samples
        estimate, deviation = denoise(
            image.pixels,
            noise,
            channel_axis=axis,
            prior=prior,
            return_std=True,
            samples=samples,
            generator=generator,
        )
        write(std, plain._replace(pixels=deviation), np.float32)
    write(target, image._replace(pixels=estimate), image.pixels.dtype)


def _adapt(options: argparse.Namespace) -> int:
    if not options.minutes > 0:
        raise InputError(f"--minutes is {options.minutes}; expected a positive number.")
    _check_prior(options)
    adapted, report = adapt(
        load_prior(options.prior, options.device),
        options.folder,
        options.sigma,
        generator=_generator(options),
        max_seconds=60 * options.minutes,
    )
    tell(report)
    if not report.adapted:
        tell(f"{options.output} was not written.")
        return 1
    adapted.save(options.output)
    return 0


def _train(options: argparse.Namespace) -> int:
    if options.steps is None and options.minutes is None:
        options.minutes = 10.0
    _check_prior(options)
    generator, device = _generator(options), find_device(options.device)
    if options.sigmas is not None:
        noise_level_range(options.sigmas)
    first = read_image(image_files(options.folder)[0]).pixels
    torch.manual_seed(options.seed)
    prior = PatchPrior(_network(options, 1 if first.ndim == 2 else first.shape[2]).to(device))
    images = training_images(options.folder, channels=prior.network.channels, smallest=options.crop)
    if options.sigmas is None:
        low, high = np.quantile(
            np.concatenate([image.flatten()[::97] for image in images]), [0.001, 0.999]
        )
        options.sigmas = LOWEST_FRACTION * (high - low), HIGHEST_FRACTION * (high - low)
    tell(
        f"{len(images)} images; noise levels {options.sigmas[0]:.4g} to {options.sigmas[1]:.4g} in the "
        "unit of the files"
    )
    checkpoint = options.output.with_name(f"{options.output.name}.checkpoint")
    try:
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
            generator=generator,
            checkpoint=checkpoint,
        )
    except KeyboardInterrupt:
        if checkpoint.exists():
            tell(f"{checkpoint}: to go on, give the same command again.", sys.stderr)
        raise
    prior.save(options.output)
    checkpoint.unlink()
    tell(f"{options.output}: {len(history.loss)} steps in {history.seconds / 60:.1f} minutes")
    return 0


def _network(options: argparse.Namespace, channels: int) -> ConvEnergy:
    """The network to train; an error before it is built if there is too little memory for it."""

    def build() -> ConvEnergy:
        if options.patch_size is None:
            return ConvEnergy((5, 3, 3), (1, 2, 3), channels, options.width)
        return PatchEnergy(options.patch_size, channels, options.width)

    what = f"a training with --width {options.width}"
    with enough_memory(what), torch.device("meta"):
        check_memory(TRAINING * sum(p.nbytes for p in build().parameters()), what)
    return build()


def _demo(options: argparse.Namespace) -> int:
    from matplotlib.backend_bases import FigureCanvasBase

    from patchscore.evaluation.demo import run_demo

    check_noise_level(options.sigma)
    formats = FigureCanvasBase.get_supported_filetypes()
    if options.output.suffix[1:] not in formats:
        raise InputError(f"{options.output} is not a picture; end it in one of .{' .'.join(formats)}.")
    check_destination(options.output)
    if not options.force:
        check_new([options.output], advice="--force overwrites it")
    tell(run_demo(options.sigma, options.output, options.device))
    tell(f"\npictures side by side: {options.output.resolve()}")
    return 0


def _info(options: argparse.Namespace) -> int:
    prior = load_prior(options.prior, "cpu")
    with reading(options.prior):
        facts = list(prior_facts(prior, options.prior))
    for title, content in facts:
        tell(f"{title:14}{content}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "denoise": _denoise,
    "restore": _restore,
    "adapt": _adapt,
    "train": _train,
    "demo": _demo,
    "info": _info,
}
