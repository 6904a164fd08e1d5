"""The table of adaptation: what a row says, and that a run goes on where it was."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from skimage.data import brick

import patchscore as ps
from benchmarks import adaptation
from benchmarks.adaptation_jobs import Lesson
from benchmarks.data import NamedImage
from patchscore.evaluation.metrics import psnr


@pytest.fixture
def settings() -> adaptation.Settings:
    return adaptation.Settings(ps.load_prior("natural-gray-fast", "cpu"), 0, 2.0)


def measured(lessons: list[Lesson], settings: adaptation.Settings, out: Path) -> list[adaptation.Row]:
    study = replace(adaptation.STUDY, jobs=lambda _: adaptation.jobs_of(lessons, settings))
    return study.measure(Namespace(out=out))


def test_a_row_holds_the_quality_before_and_after_and_is_not_measured_twice(
    settings: adaptation.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = NamedImage("wall", brick()[:64, :64].astype(np.float64))
    out = tmp_path / "table.csv"
    lessons = [Lesson("textures", sigma, [image], [image]) for sigma in (25.0, 50.0)]
    (first,) = measured(lessons[:1], settings, out)
    assert first.adapted in (0, 1)
    if not first.adapted:
        assert first.after == first.before

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    rows = measured(lessons, settings, out)
    assert str(rows[0]) == str(first)  # nan where BM3D was not run
    monkeypatch.setattr(adaptation, "adapt", refuse)
    assert str(measured(lessons, settings, out)) == str(rows)
    assert out.read_text().count("wall") == 2


def test_the_quality_before_is_that_of_the_prior(settings: adaptation.Settings, tmp_path: Path) -> None:
    image = NamedImage("wall", brick()[:64, :64].astype(np.float64))
    (row,) = measured([Lesson("textures", 25.0, [image], [image])], settings, tmp_path / "t.csv")
    noisy = adaptation._noisy(image, 25.0, 0)
    expected = psnr(image.pixels, ps.denoise(noisy, 25.0, prior=settings.prior), data_range=255)
    assert row.before == pytest.approx(expected, abs=1e-4)
    assert (noisy - image.pixels).std() == pytest.approx(25.0, rel=5 / np.sqrt(2 * 64**2))
