"""What it costs to have learned from other images: against rows of known PSNR."""

import numpy as np
import pytest

from benchmarks.robustness.prices import price_table, prices
from benchmarks.robustness.table import REFERENCE, Row

IMAGES, SIGMAS = 5, (15.0, 25.0)
# Of each method on MRI after learning from MRI, CT and photographs.
PSNR = {
    "patch prior": {"mri/train": 30.0, "ct/train": 29.75, "bsd400": 29.5},
    "U-Net": {"mri/train": 31.0, "ct/train": 29.0, "bsd400": 31.5},
}


def row(train_set: str, method: str, image: int, sigma: float, value: float, **changes: object) -> Row:
    study = "content" if train_set == "bsd400" else "scanner"
    shift = REFERENCE if train_set == "mri/train" else f"{train_set} to mri"
    return Row(
        study, shift, train_set, 10, "mri/test", f"{image}", sigma, method, "one-step", value, 0.9, 0,
        "version", "machine", "digest",
    )._replace(**changes)  # fmt: skip


@pytest.fixture
def rows() -> list[Row]:
    """Every second image loses 0.2 dB more than the others at all levels, and levels differ."""
    return [
        row(
            train_set,
            method,
            image,
            sigma,
            value - sigma / 10 - 0.2 * (image % 2) * (train_set[0] == "c"),
        )
        for method, values in PSNR.items()
        for train_set, value in values.items()
        for image in range(IMAGES)
        for sigma in SIGMAS
    ]


def test_a_price_is_the_mean_over_the_same_noisy_images(rows: list[Row]) -> None:
    found = {(one.method, one.other): (one, price) for one, price in prices(rows).items()}
    assert set(found) == {(method, other) for method in PSNR for other in ("ct/train", "bsd400")}
    odd = 0.2 * 2 / 5  # images 1 and 3 of 5
    for (method, other), (one, price) in found.items():
        expected = PSNR[method]["mri/train"] - PSNR[method][other] + odd * (other == "ct/train")
        assert price.mean == pytest.approx(expected, abs=1e-10)
        assert (one.test_set, one.own, one.training_images) == ("mri/test", "mri/train", 10)
        assert price.images == 5
    (_, same), (_, spread) = found["U-Net", "bsd400"], found["U-Net", "ct/train"]
    assert same.low == pytest.approx(same.high, abs=1e-10)
    assert spread.low < spread.mean < spread.high


def test_an_image_counts_once_however_many_levels_it_has(rows: list[Row]) -> None:
    """The interval over images is that of the values of one level, as all levels say the same."""
    one_level = [one for one in rows if one.sigma == SIGMAS[0]]
    both, alone = (next(iter(prices(table).values())) for table in (rows, one_level))
    np.testing.assert_allclose(both, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "change",
    [
        {"study": "noise"},  # the noise is another one, not the images
        {"training_images": 55},
        {"estimate": "one sample"},
        {"image": "another"},
    ],
)
def test_what_is_not_the_same_is_not_compared(rows: list[Row], change: dict[str, object]) -> None:
    changed = [
        one._replace(**change) if (one.method, one.train_set) == ("U-Net", "ct/train") else one
        for one in rows
    ]
    found = {(one.method, one.other) for one in prices(changed)}
    assert found == {("patch prior", "ct/train"), ("patch prior", "bsd400"), ("U-Net", "bsd400")}


def test_the_table_has_a_column_for_every_method(rows: list[Row]) -> None:
    head, *lines = price_table(rows)
    assert head == ["on", "learned from", "images", "patch prior", "U-Net"]
    assert [line[:3] for line in lines] == [["mri", "bsd400", "10"], ["mri", "ct", "10"]]
    assert lines[0][3:] == ["+0.50 (+0.50 to +0.50)", "-0.50 (-0.50 to -0.50)"]
    assert price_table([one for one in rows if one.train_set == "bsd400"]) == [
        ["on", "learned from", "images"]
    ]
