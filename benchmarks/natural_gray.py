"""Train the bundled prior ``natural-gray`` again: python -m benchmarks.natural_gray.

A potential of 11 x 11 patches (two hidden layers of 256 units, all invariances), a clique potential from
crops of 48 pixels of the 400 images of ``bsd400``, noise levels 3/255 to 60/255 of the images' range.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import patchscore as ps
from benchmarks.data import gray_images

CARD = {
    "name": "natural-gray",
    "data": "bsd400: 400 gray crops of 180 x 180 pixels of BSDS500 training photographs, scaled to 0..1",
    "terms": "BSDS500 is offered for non-commercial research; see natural-gray.md beside the weights",
}


def main() -> None:
    """Train, going on from a checkpoint if there is one, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("natural-gray.safetensors"))
    parser.add_argument("--steps", type=int, default=12_000, help="default: %(default)s")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    images = [image.pixels / 255 for image in gray_images("bsd400")]
    torch.manual_seed(0)
    network = ps.PatchEnergy(patch_size=11).to(options.device)
    prior = ps.PatchPrior(network, card=CARD)
    ps.fit(
        prior,
        images,
        sigmas=(3 / 255, 60 / 255),
        crop=48,
        steps=options.steps,
        mixed_precision=True,
        generator=torch.Generator().manual_seed(0),
        checkpoint=options.out.with_suffix(".checkpoint"),
    )
    prior.save(options.out)


if __name__ == "__main__":
    main()
