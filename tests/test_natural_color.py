"""The experiment with a colour prior: folds that do not mix, priors that are kept, its arithmetic."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks import natural_color


def row(sigma: float, color: float, gray: float) -> natural_color.Row:
    return natural_color.Row("a", sigma, color, gray, "digest", 1.0, 10, 0)


def test_the_gain_is_paired() -> None:
    rows = [row(sigma, *pair) for sigma in (15.0, 25.0, 50.0) for pair in ((33.0, 32.0), (30.0, 29.5))]
    told = natural_color.summary(rows)
    assert "sigma 25: colour 31.50 dB, +0.75 dB over channel by channel (+0.50 to +1.00)" in told


def test_no_photograph_is_scored_that_was_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs = {
        name: partial(lambda read: read()[:48, 100:148], read)
        for name, read in natural_color.PHOTOGRAPHS.items()
    }
    monkeypatch.setattr(natural_color, "PHOTOGRAPHS", photographs)
    monkeypatch.setattr(natural_color, "WIDTH", 8)
    fitted, fit = [], natural_color.ps.fit

    def short(prior, images, *, minutes, crop, **settings):
        fitted.append([image.mean() for image in images])
        return fit(prior, images, steps=2, crop=40, progress=False, **settings)

    monkeypatch.setattr(natural_color.ps, "fit", short)
    out = tmp_path / "color.csv"
    options = ["--weights", str(tmp_path / "weights"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["natural_color", *options])
    natural_color.main()
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + 4 * 3
    means = {name: (read() / 255).mean() for name, read in photographs.items()}
    first_scored = {line.split(",")[0] for line in lines[1:7]}
    assert not any(np.isclose(means[name], fitted[0]).any() for name in first_scored)

    natural_color.main()  # the priors are there
    assert len(fitted) == 2
    assert out.read_text().splitlines() == lines
