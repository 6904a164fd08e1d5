"""What does it cost to have learned from other images?

    price = mean over noisy images of  PSNR(trained on their own set) - PSNR(trained on another one)

of one method, by as many training images of each set. A drop says how much harder the shifted images are
as well; this does not, since the noisy images are the same. It is known for the test sets that have a
training part; below zero, the other images have taught more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.robustness.contenders import ONE_STEP
from benchmarks.robustness.summary import Interval, interval
from benchmarks.robustness.table import REFERENCE, Row
from benchmarks.robustness.training import NETWORKS

STUDIES = "scanner", "content", "phantoms"  # the shifts of which are other images


class Price(NamedTuple):
    """What a method pays on a test set for having learned from ``other`` instead of ``own``, in dB."""

    test_set: str
    own: str
    other: str
    training_images: int
    method: str
    images: int
    price: Interval


def prices(rows: Sequence[Row], *, seed: int = 0) -> list[Price]:
    """The prices of all one-step estimates; an image counts by its mean over noise levels."""
    own_sets: dict[str, str] = {}
    # The PSNR by (test set, training set, number of training images, method), then image and level.
    found: dict[tuple[str, str, int, str], dict[tuple[str, int, float], float]] = defaultdict(dict)
    for row in rows:
        if row.study in STUDIES and row.method in NETWORKS and row.estimate == ONE_STEP:
            if row.shift == REFERENCE:
                own_sets[row.test_set] = row.train_set
            key = row.test_set, row.train_set, row.training_images, row.method
            found[key][row.image, row.seed, row.sigma] = row.psnr
    result = []
    for (test_set, other, count, method), theirs in found.items():
        own = own_sets.get(test_set, other)
        ours = found.get((test_set, own, count, method), {})
        by_image: dict[tuple[str, int], list[float]] = defaultdict(list)
        for place in ours.keys() & theirs.keys():
            by_image[place[:2]].append(ours[place] - theirs[place])
        if own != other and by_image:
            means = np.array([np.mean(by_image[image]) for image in sorted(by_image)])
            price = Price(test_set, own, other, count, method, len(means), interval(means, seed=seed))
            result.append(price)
    return sorted(result, key=lambda price: (price[:4], NETWORKS.index(price.method)))


def price_table(rows: Sequence[Row]) -> list[list[str]]:
    """Lines for a table with a column for every method; its head alone if there are no prices."""
    found = prices(rows)
    methods = [method for method in NETWORKS if any(price.method == method for price in found)]
    places: dict[tuple[str, str, int], dict[str, str]] = defaultdict(dict)
    for one in found:
        place = one.test_set.removesuffix("/test"), one.other.removesuffix("/train"), one.training_images
        low, mean, high = one.price.low, one.price.mean, one.price.high
        places[place][one.method] = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
    return [
        ["on", "learned from", "images", *methods],
        *([*map(str, place), *(cells.get(m, "") for m in methods)] for place, cells in places.items()),
    ]
