"""The bundled prior on the photographs of BSD68, where they are at hand (see benchmarks/data.py)."""

from pathlib import Path

import numpy as np
import pytest

from patchscore.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("name", "least", "row"),
    [
        # The patch network of Burger et al., and BM3D, as published.
        ("natural-gray", 28.96, "| | natural-gray | **31.55** | **{:.2f}** |"),
        ("natural-gray-fast", 28.57, "| | natural-gray-fast | 31.40 | {:.2f} |"),
    ],
)
def test_a_bundled_prior_on_bsd68(
    name: str, least: float, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One-step, sigma 25, nothing clipped: at least what is published, and what the README says."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import data, quality

    try:
        data.gray_images("bsd68")
    except InputError as error:
        pytest.skip(str(error))
    methods = quality.select_methods(["patchscore"], name)
    rows = quality.measure(["bsd68"], [25.0], methods, seed=0, out=tmp_path / "quality.csv")
    noisy, denoised = (
        np.mean([row.psnr for row in rows if row.method == method]) for method in ("noisy", "patchscore")
    )
    # The noise has 68 images of 321 x 481 draws: the error of its PSNR is far below 0.01 dB.
    assert noisy == pytest.approx(20 * np.log10(255 / 25), abs=0.01)
    assert denoised > least
    assert row.format(denoised) in (ROOT / "README.md").read_text(encoding="utf-8")
