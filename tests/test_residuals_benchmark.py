"""The table behind the guard of adaptation: what a row says of noise of a known kind."""

import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from skimage.data import camera

import patchscore as ps
from benchmarks import residuals
from benchmarks.data import NamedImage

SIGMA = 25.0
SIDE = 64


def measured(
    prior: ps.PatchPrior, named: list[tuple[str, NamedImage]], out: Path
) -> list[residuals.Row]:
    study = replace(residuals.STUDY, jobs=lambda _: residuals.jobs_of(prior, named, [SIGMA]))
    return study.measure(Namespace(out=out))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, residuals.Row]:
    """A part of a photograph, whose first image is adapted to, under four kinds of noise."""
    pixels = camera()[60 : 60 + SIDE, 180 : 180 + SIDE].astype(float)
    named = [("photographs", NamedImage(name, pixels)) for name in ("first", "second")]
    out = tmp_path_factory.mktemp("residuals") / "table.csv"
    prior = ps.load_prior("natural-gray-fast", "cpu")
    kinds = residuals.RIGHT, "sigma x 0.8", "speckle", "correlated"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residuals, "NOISES", kinds)
        patch.setattr(residuals, "STEPS", 1)
        first = measured(prior, named[:1], out)
        found = measured(prior, named, out)
        patch.setattr(ps, "adapt", None)  # nothing is left to be measured
        assert str(measured(prior, named, out)) == str(found)
    assert found[: len(kinds)] == first
    assert len(out.read_text().splitlines()) == 1 + len(found)
    assert [row.noise for row in found] == [*kinds, *kinds]
    assert all(math.isnan(row.change) for row in found[len(kinds) :])
    return {row.noise: row for row in found[: len(kinds)]}


def test_white_noise_is_let_through_and_other_noise_is_not(rows: dict[str, residuals.Row]) -> None:
    assert {noise: row.refused for noise, row in rows.items()} == {
        residuals.RIGHT: 0,
        "sigma x 0.8": 1,
        "speckle": 1,
        "correlated": 1,
    }
    assert all(row.change == 0 for row in rows.values() if row.refused)


def test_the_statistics_are_those_of_the_noise(rows: dict[str, residuals.Row]) -> None:
    """By the standard errors of 64 x 64 pixels, and 0.05 for what the prior makes of the image."""
    error = math.sqrt(2) / SIDE
    assert rows[residuals.RIGHT].variance == pytest.approx(1, abs=0.05 + 4 * error)
    assert rows[residuals.RIGHT].correlation == pytest.approx(0, abs=0.05 + 4 / SIDE)
    told_less = rows["sigma x 0.8"]
    assert told_less.witness / rows[residuals.RIGHT].witness == pytest.approx(1 / 0.8, rel=0.02)
    assert rows["speckle"].bright_over_dark > 1.5
    assert rows["correlated"].correlation > 0.1


def test_the_summary_has_a_line_for_every_noise(rows: dict[str, residuals.Row]) -> None:
    text = residuals.summary(
        [row._replace(noise=noise) for noise in residuals.NOISES for row in rows.values()]
    )
    head, _, *lines = text.splitlines()
    assert head.startswith("| noise | images | variance | witness |")
    assert [line.split(" | ")[0] for line in lines] == [f"| {noise}" for noise in residuals.NOISES]
    values = [row.variance for row in rows.values()]
    assert f"{min(values):.2f} to {max(values):.2f}" in lines[0]
    assert lines[0].endswith("| 75% |")


def test_the_patterns_have_their_contrast() -> None:
    for pattern in residuals.patterns():
        assert pattern.pixels.shape == (residuals.SIDE, residuals.SIDE)
        assert pattern.pixels.min() == pytest.approx(40, abs=0.5)
        assert pattern.pixels.max() == pytest.approx(200, abs=0.5)
