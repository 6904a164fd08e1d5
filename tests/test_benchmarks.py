"""The benchmarks on two small images: reproducible numbers, and errors that say what to do."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from skimage.io import imsave

from patchscore import ConvEnergy, PatchEnergy, PatchMLP, PatchPrior
from patchscore.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
SIGMAS = 15.0, 40.0


@pytest.fixture(autouse=True)
def _repository_on_path(monkeypatch) -> None:
    """The benchmarks belong to the repository, not to the installed package."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A folder with one set, of two images of different shape."""
    folder = tmp_path / "data" / "photos"
    folder.mkdir(parents=True)
    for name, shape in (("a", (40, 48)), ("b", (52, 36))):
        rows, columns = np.mgrid[: shape[0], : shape[1]]
        image = 60 + 90 * (rows > 18) + 40 * (columns > 25) + columns // 2
        imsave(folder / f"{name}.png", image.astype(np.uint8), check_contrast=False)
    monkeypatch.setenv("PATCHSCORE_DATA", str(folder.parent))
    return folder


@pytest.fixture
def prior(tmp_path) -> Path:
    """A network as it is before training: its potential is zero, so it returns the noisy image."""
    path = tmp_path / "prior.safetensors"
    PatchPrior(PatchEnergy(3, width=16)).save(path)
    return path


def benchmarks(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def quality(out: Path, *more: object, methods: tuple[str, ...] = ("tv",)) -> int:
    from benchmarks.__main__ import main

    arguments = ("quality", "--sets", "photos", "--methods", *methods, "--out", out)
    more = more if "--sigmas" in more else (*more, "--sigmas", *SIGMAS)
    return main([str(argument) for argument in (*arguments, *more)])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_quality_from_the_command_line(data, prior, tmp_path) -> None:
    out = tmp_path / "new" / "quality.csv"
    result = benchmarks(
        *("quality", "--sets", "photos", "--sigmas", 15, 40, "--out", out),
        *("--methods", "patchscore", "tv", "--prior", prior),
    )
    assert result.returncode == 0, result.stderr
    rows = rows_of(out)
    assert [(row["image"], row["sigma"], row["method"]) for row in rows] == [
        (image, sigma, method)
        for image in ("a", "b")
        for sigma in ("15.0", "40.0")
        for method in ("noisy", "patchscore", "tv")
    ]
    psnrs = {(row["image"], row["sigma"], row["method"]): float(row["psnr"]) for row in rows}
    pixels = {"a": 40 * 48, "b": 52 * 36}
    for (image, sigma, method), psnr in psnrs.items():
        if method == "noisy":
            # The mean of n squared standard normal numbers has variance 2 / n.
            standard_error = 10 / math.log(10) * math.sqrt(2 / pixels[image])
            assert abs(psnr - 20 * math.log10(255 / float(sigma))) < 4 * standard_error
        if method == "patchscore":
            assert psnr == pytest.approx(psnrs[image, sigma, "noisy"], abs=2e-4)
        if method == "tv":
            assert psnr > psnrs[image, sigma, "noisy"]

    [line] = [line for line in result.stdout.splitlines() if "| tv |" in line]
    for cell, sigma in zip(line.split("|")[4:6], ("15.0", "40.0"), strict=True):
        mean = (psnrs["a", sigma, "tv"] + psnrs["b", sigma, "tv"]) / 2
        assert float(cell.split("/")[0]) == pytest.approx(mean, abs=0.0051)


def test_a_stopped_run_goes_on_where_it_was(data, tmp_path) -> None:
    out = tmp_path / "quality.csv"
    quality(out)
    whole = rows_of(out)
    header, *lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join([header, *lines[1::3]]))
    kept = rows_of(out)
    quality(out)
    assert rows_of(out) == whole
    assert all(row in rows_of(out) for row in kept)


def test_a_subset_has_the_same_numbers(data, tmp_path) -> None:
    quality(tmp_path / "all.csv")
    quality(tmp_path / "part.csv", "--sigmas", SIGMAS[1])
    part = rows_of(tmp_path / "part.csv")
    assert part == [row for row in rows_of(tmp_path / "all.csv") if row["sigma"] == str(SIGMAS[1])]


def test_rows_that_no_longer_hold_are_replaced(data, prior, tmp_path) -> None:
    out = tmp_path / "quality.csv"
    run = {"methods": ("patchscore",)}
    quality(out, "--prior", prior, **run)
    before = rows_of(out)

    trained = PatchPrior.load(prior)
    trained.network.readout.data += 0.1
    trained.save(prior)
    quality(out, "--prior", prior, **run)
    retrained = rows_of(out)
    for old, new in zip(before, retrained, strict=True):
        assert (old["version"] != new["version"]) == (new["method"] == "patchscore")
        assert (old["psnr"] != new["psnr"]) == (new["method"] == "patchscore")

    imsave(data / "a.png", np.full((40, 48), 90, np.uint8), check_contrast=False)
    quality(out, "--prior", prior, **run)
    for old, new in zip(retrained, rows_of(out), strict=True):
        assert (old != new) == (new["image"] == "a")

    quality(out, "--prior", prior, "--seed", 1, **run)
    assert {row["seed"] for row in rows_of(out)} == {"1"}


def test_missing_images(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATCHSCORE_DATA", str(tmp_path / "nowhere"))
    assert quality(tmp_path / "quality.csv") == 2
    message = capsys.readouterr().err
    assert "nowhere is not a folder" in message
    assert "Set the environment variable PATCHSCORE_DATA to a folder" in message


def test_errors_say_what_to_do(data, tmp_path, capsys) -> None:
    from benchmarks.data import gray_images

    out = tmp_path / "quality.csv"
    with pytest.raises(InputError, match="the sets there are: photos"):
        gray_images("portraits")
    imsave(data / "c.png", np.zeros((20, 20, 3), np.uint8), check_contrast=False)
    with pytest.raises(InputError, match=r"c of photos has shape .*; this study takes gray"):
        gray_images("photos")
    (data / "c.png").unlink()

    for problem, message in (
        (["--sigmas", "0"], "sigma is 0"),
        (["--seed", "-1"], "seed is -1"),
    ):
        assert quality(out, *problem) == 2
        assert message in capsys.readouterr().err
    assert quality(data) == 2
    assert "it is a folder" in capsys.readouterr().err
    out.write_text("name,value\n")
    assert quality(out) == 2
    assert "is not a table of the study quality" in capsys.readouterr().err


def test_every_objective_learns_to_remove_noise(data, tmp_path) -> None:
    from benchmarks.__main__ import main

    rows, columns = np.mgrid[:48, :48]
    for number, slope in enumerate((0.2, 0.7)):
        (data.parent / "edges").mkdir(exist_ok=True)
        edge = np.where(rows > slope * columns + 9, 200, 60).astype(np.uint8)
        imsave(data.parent / "edges" / f"{number}.png", edge, check_contrast=False)
    out = tmp_path / "objectives.csv"
    command = f"objectives --train edges --test edges --steps 20 --sigma 25 --out {out}"
    assert main(command.split()) == 0
    results = rows_of(out)
    assert {row["objective"].split(",")[0] for row in results} == {
        "denoising score matching",
        "SURE",
        "Noise2Score",
    }
    for row in results:
        # Half of the noise, 3 dB, is the least that can be asked on two flat areas.
        assert float(row["psnr"]) > 20 * math.log10(255 / 25) + 3, row


def test_tasks_are_timed_in_turn(monkeypatch) -> None:
    from benchmarks import machine

    clock = [0.0]
    calls = []
    monkeypatch.setattr(
        machine, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=lambda _: None)
    )

    def task(name: str, seconds: list[float]) -> None:
        calls.append(name)
        clock[0] += seconds[calls.count(name) - 1]

    timings = machine.time_in_turn(
        {"a": lambda: task("a", [9, 1, 2, 3]), "b": lambda: task("b", [8, 4, 5, 6])}, rounds=3
    )
    assert calls == ["a", "b"] * 4
    assert timings == {"a": [1, 2, 3], "b": [4, 5, 6]}


@pytest.mark.parametrize(("peak", "verdict"), [(9e8, "met"), (1.1e9, "not met")])
def test_speed_holds_the_numbers_against_the_targets(
    peak: float, verdict: str, tmp_path, monkeypatch, capsys
) -> None:
    from benchmarks import __main__, speed, throughput

    timings = {"patchscore": [1.0, 1.0, 2.0], "bm3d": [4.0, 6.0, 20.0]}
    monkeypatch.setattr(speed, "time_denoisers", lambda prior, rounds, mixture: timings)
    for name in ("shares", "growth", "start_up"):
        monkeypatch.setattr(throughput, name, lambda prior, **options: [])
    monkeypatch.setattr(speed, "in_fresh_process", lambda *_: speed.Memory(int(7e8), int(peak)))
    out = tmp_path / "speed.csv"

    assert __main__.main(["speed", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| natural-gray | bm3d / patchscore | 6 | 4 | 10 | at least 5 | met |" in printed
    lines = {row["quantity"]: row for row in rows_of(out)}
    ratio = lines["bm3d / patchscore"]
    assert [float(ratio[column]) for column in ("median", "least", "greatest")] == [6, 4, 10]
    assert float(lines["peak memory, 2048 x 2048"]["median"]) == peak / 1e6
    assert lines["peak memory, 2048 x 2048"]["met"] == str(verdict == "met")
    assert float(lines["peak above the loaded prior"]["median"]) == peak / 1e6 - 700


def test_multiply_adds_are_counted() -> None:
    """By hand: w n + w^2 for a patch network, w (k_1^2 + w k_2^2) for a convolutional, each twice."""
    from benchmarks.throughput import multiply_adds

    assert multiply_adds(PatchPrior(PatchEnergy(3, width=16))) == 2 * (16 * 9 + 16 * 16)
    conv = ConvEnergy((5, 3), (1, 2), width=8)
    assert multiply_adds(PatchPrior(conv)) == 2 * 8 * (25 + 8 * 9)
    with pytest.raises(InputError, match="multiply-adds of PatchMLP are not known"):
        multiply_adds(PatchPrior(PatchMLP(3, widths=(16,), tanh_layers=1)))


def test_shares_growth_and_start(prior, monkeypatch) -> None:
    from benchmarks import machine, throughput

    monkeypatch.setattr(machine, "PAUSE", 0.0)
    monkeypatch.setattr(throughput, "SCORE_SIDE", 64)
    monkeypatch.setattr(throughput, "PRODUCT_SIDE", 64)
    lines = {line.quantity: line.median for line in throughput.shares(str(prior), rounds=1)}
    assert lines["multiply-adds per pixel"] == 800
    share = lines["floor, float32"] / lines["score, float32"]
    assert lines["share of the rate, float32"] == pytest.approx(share)

    *costs, ratio = throughput.growth(str(prior), rounds=1, sides=(32, 64))
    assert [line.quantity for line in costs] == ["estimate, 32 x 32", "estimate, 64 x 64"]
    medians = [line.median for line in costs]
    assert ratio.median == pytest.approx(max(medians) / min(medians))

    assert [line.unit for line in throughput.start_up(str(prior), rounds=1)] == ["s", "s"]
    with pytest.raises(InputError, match="failed: there is no prior"):
        throughput._process(["-c", "raise SystemExit('there is no prior')"])


@pytest.mark.parametrize(
    ("target", "text", "met"),
    [({"at_least": 2}, "at least 2", True), ({"at_most": 1.5}, "at most 1.5", False), ({}, "", None)],
)
def test_a_line_is_the_median_beside_its_target(target, text: str, met: bool | None) -> None:
    from benchmarks.throughput import row_of

    assert row_of("p", "q", "s", [1, 5, 2], **target)[:8] == ("p", "q", "s", 2, 1, 5, text, met)


@pytest.mark.skipif(sys.platform != "linux", reason="counts in the units of Linux")
def test_memory_is_that_of_a_fresh_process(prior) -> None:
    import resource

    from benchmarks import machine, speed

    ballast = np.ones(50_000_000)
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = machine.in_fresh_process(speed.peak_memory, str(prior), 256)
    assert ballast.nbytes < ours
    # It imports less than this process holds; if it had inherited our peak, it would report no less.
    assert memory.baseline < ours
    assert memory.baseline <= memory.peak
