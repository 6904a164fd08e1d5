"""What does it cost to have learned from other images?

    price = mean over noisy images of  PSNR(trained on their own set) - PSNR(trained on another one)

of one method, by as many training images of each set. A drop says how much harder the shifted images are
as well; this does not, since the noisy images are the same. It is known for the test sets that have a
training part; below zero, the other images have taught more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from benchmarks.robustness.contenders import ONE_STEP
from benchmarks.robustness.summary import Interval, interval
from benchmarks.robustness.table import REFERENCE, Row
from benchmarks.robustness.training import NETWORKS

STUDIES = "scanner", "content", "phantoms"  # the shifts of which are other images


class Exchange(NamedTuple):
    """A method that has learned from ``other`` images instead of ``own`` ones."""

    test_set: str
    own: str
    other: str
    training_images: int
    method: str


def prices(rows: Sequence[Row]) -> dict[Exchange, Interval]:
    """The prices of all one-step estimates, in dB; an image counts by its mean over noise levels."""
    frame = pd.DataFrame(rows, columns=Row._fields)
    frame = frame[frame.study.isin(STUDIES) & frame.method.isin(NETWORKS) & (frame.estimate == ONE_STEP)]
    inside = frame[frame["shift"] == REFERENCE]
    own = frame.test_set.map(dict(zip(inside.test_set, inside.train_set, strict=True)))
    same = ["test_set", "training_images", "method", "image", "seed", "sigma"]
    both = frame[own == frame.train_set].merge(
        frame[own.notna() & (own != frame.train_set)], on=same, suffixes=("_own", "_other")
    )
    both["price"] = both.psnr_own - both.psnr_other
    keys = ["test_set", "train_set_own", "train_set_other", "training_images", "method"]
    by_image = both.groupby([*keys, "image", "seed"]).price.mean()
    return {
        Exchange._make(key): interval(price.to_list()) for key, price in by_image.groupby(level=keys)
    }


def price_table(rows: Sequence[Row]) -> list[list[str]]:
    """Lines for a table with a column for every method; its head alone if there are no prices."""
    found = prices(rows)
    methods = [method for method in NETWORKS if any(one.method == method for one in found)]
    places: dict[tuple[str, str, int], dict[str, str]] = {}
    for one, price in found.items():
        place = one.test_set.removesuffix("/test"), one.other.removesuffix("/train"), one.training_images
        places.setdefault(place, {})[one.method] = str(price)
    return [
        ["on", "learned from", "images", *methods],
        *([*map(str, place), *(cells.get(m, "") for m in methods)] for place, cells in places.items()),
    ]
