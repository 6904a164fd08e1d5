"""The bundled priors on the photographs of BSD68, where they are at hand (see benchmarks/data.py)."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from patchscore import load_prior
from patchscore.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


def psnrs(table: Path) -> dict[tuple[str, str], float]:
    """By image and method, those at sigma 25 on BSD68."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["set"], row["sigma"]) == ("bsd68", "25.0")]
    return {(row["image"], row["method"]): float(row["psnr"]) for row in rows}


@pytest.mark.parametrize(
    ("name", "table", "least", "row"),
    [
        # The patch network of Burger et al., and BM3D, as published.
        ("natural-gray", "quality.csv", 28.96, "| | natural-gray | **31.55** | **{:.2f}** |"),
        ("natural-gray-fast", "quality-fast.csv", 28.57, "| | natural-gray-fast | 31.40 | {:.2f} |"),
    ],
)
def test_a_bundled_prior_on_bsd68(
    name: str, table: str, least: float, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One-step, sigma 25, nothing clipped: at least what is published, and what the tables say.

    Every ninth image is measured here and has the committed number, which no other weights have. For
    the others the committed rows stand in: the benchmark measures a row again if the image or the noise
    are not those of the row.
    """
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import data
    from benchmarks.__main__ import main
    from benchmarks.methods import version_of

    try:
        images = data.gray_images("bsd68")
    except InputError as error:
        pytest.skip(str(error))
    source, out = ROOT / "benchmarks" / "results" / table, tmp_path / "quality.csv"
    anew = {image_name for image_name, _ in images[::9]}
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(line for line in lines if line.split(",")[1] not in anew)
    version = version_of(load_prior(name, "cpu"))  # how a digest is made may change, the numbers may not
    out.write_text(re.sub(r"patchscore [\d.]+ prior \w+", version, kept), encoding="utf-8")
    command = f"quality --sets bsd68 --sigmas 25 --methods patchscore --prior {name} --out {out}"
    assert main(command.split()) == 0
    before, after = psnrs(source), psnrs(out)
    for key in after:
        assert after[key] == pytest.approx(before[key], abs=5e-4), key
    noisy, denoised = (
        np.mean([psnr for (_, one), psnr in after.items() if one == method])
        for method in ("noisy", "patchscore")
    )
    # The noise has 68 images of 321 x 481 draws: the error of its PSNR is far below 0.01 dB.
    assert noisy == pytest.approx(20 * np.log10(255 / 25), abs=0.01)
    assert denoised > least
    tables = [ROOT / "README.md", *ROOT.glob("docs/results/*.md")]
    assert any(row.format(denoised) in path.read_text(encoding="utf-8") for path in tables)
