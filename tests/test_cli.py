"""The command line, as a user meets it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

import patchscore as ps
from patchscore.cli import main
from patchscore.files import read_image

SIGMA = 20.0


@pytest.fixture
def noisy() -> np.ndarray:
    from skimage.data import camera

    clean = camera()[100:164, 150:230].astype(np.float64)
    return np.clip(
        np.rint(clean + SIGMA * np.random.default_rng(0).standard_normal(clean.shape)), 0, 255
    ).astype(np.uint8)


def test_an_image_is_denoised_in_the_unit_of_its_file(noisy: np.ndarray, tmp_path: Path) -> None:
    source, target = tmp_path / "noisy.tif", tmp_path / "clean.tif"
    deep = noisy.astype(np.uint16) * 200
    Image.fromarray(deep).save(source)
    assert main(["denoise", str(source), str(target), "--sigma", str(200 * SIGMA)]) == 0
    stored = read_image(target).pixels
    assert stored.dtype == np.uint16
    expected = ps.denoise(deep, 200 * SIGMA)
    assert np.abs(stored - expected).max() < 0.51


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_colour_and_alpha_are_kept(suffix: str, noisy: np.ndarray, tmp_path: Path) -> None:
    colour = np.stack([noisy, noisy[::-1], 255 - noisy], axis=-1)
    source, target = tmp_path / f"noisy{suffix}", tmp_path / f"clean{suffix}"
    alpha = np.arange(noisy.size).reshape(noisy.shape).astype(np.uint8)
    if suffix == ".npy":
        np.save(source, colour)
    else:
        Image.fromarray(np.dstack([colour, alpha])).save(source)
    assert main(["denoise", str(source), str(target), "--sigma", "20"]) == 0
    written = read_image(target)
    expected = ps.denoise(colour, 20, channel_axis=-1)
    assert np.abs(written.pixels - np.clip(expected, 0, 255)).max() < 0.51
    if suffix != ".npy":
        assert written.alpha is not None
        np.testing.assert_array_equal(written.alpha, alpha)


def test_the_noise_level_is_estimated_and_told(
    noisy: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(noisy).save(tmp_path / "noisy.png")
    assert main(["denoise", str(tmp_path / "noisy.png"), str(tmp_path / "clean.png")]) == 0
    told = re.search(r"noisy.png: estimated noise level ([\d.]+)", capfd.readouterr().out)
    assert told is not None
    from skimage.restoration import estimate_sigma

    assert float(told[1]) == pytest.approx(estimate_sigma(noisy.astype(float)), rel=5e-3)


def test_a_folder_is_denoised_image_by_image(
    noisy: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    Image.fromarray(noisy).save(source / "a.png")
    np.save(source / "b.npy", noisy[::-1].astype(np.float32))
    (source / "notes.txt").write_text("not an image")
    (source / "c.png").write_text("not an image either")
    assert main(["denoise", str(source), str(target), "--sigma", "20"]) == 1
    assert sorted(path.name for path in target.iterdir()) == ["a.png", "b.npy"]
    np.testing.assert_allclose(
        np.load(target / "b.npy"), ps.denoise(noisy[::-1].astype(np.float32), 20), atol=1e-3
    )
    error = capfd.readouterr().err
    assert "c.png" in error
    assert "1 of 3 images could not be denoised" in error


@pytest.mark.parametrize(
    ("option", "clique"),
    [
        # 5 x 5 patches in two groups of eight: 2 x 25 + 2 x 2 x 8 weights, 2 + 2 biases, 2 to read out.
        ("--patch-size 5", "ConvEnergy, 88 parameters"),
        # Three layers of two groups: 2 x 25 + 2 (2 x 16 x 9) weights, 3 x 2 biases, 2 to read out.
        ("", "ConvEnergy, 634 parameters"),
    ],
)
def test_training_from_a_folder_and_what_info_tells(
    option: str, clique: str, noisy: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, image in (("a.png", noisy), ("b.png", noisy[::-1])):
        Image.fromarray(image).save(folder / name)
    output = tmp_path / "mine.safetensors"
    command = f"train {folder} -o {output} --steps 3 {option} --width 16 --crop 16"
    assert main(command.split()) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "mine.safetensors"]
    assert main(["info", str(output)]) == 0
    told = capfd.readouterr().out
    assert clique in told
    low, high = np.quantile(np.concatenate([noisy.ravel()] * 2), [0.001, 0.999])
    levels = re.search(r"noise levels ([\d.]+) to ([\d.]+)", told)
    assert levels is not None
    # The range comes from a sample of the pixels.
    assert float(levels[2]) == pytest.approx(60 / 255 * (high - low), rel=0.15)
    assert float(levels[2]) / float(levels[1]) == pytest.approx(20, rel=1e-3)
    Image.fromarray(noisy).save(tmp_path / "noisy.png")
    assert (
        main(f"denoise {tmp_path}/noisy.png {tmp_path}/clean.png --sigma 20 --prior {output}".split())
        == 0
    )


def test_the_demo_tells_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph = data.camera()[:256, 100:356]
    monkeypatch.setattr("skimage.data.camera", lambda: photograph)
    picture = tmp_path / "demo.png"
    assert main(["demo", "--output", str(picture)]) == 0
    told = capsys.readouterr().out
    assert str(picture) in told
    rows = dict(re.findall(r"^(noisy|TV|BM3D|patchscore)\D*?([\d.]+)", told, flags=re.MULTILINE))
    # n draws: the standard error of the noise's PSNR is 10 / ln 10 sqrt(2 / n) dB.
    error = 10 / np.log(10) * np.sqrt(2 / photograph.size)
    assert abs(float(rows["noisy"]) - 20 * np.log10(255 / 25)) < 4 * error + 0.005
    assert float(rows["patchscore"]) > float(rows["TV"])
    with Image.open(picture) as image:
        assert min(image.size) > 500


BAD_COMMANDS = {
    "missing input": ("denoise {tmp}/none.png {tmp}/out.png", "none.png"),
    "in is out": ("denoise {tmp}/noisy.png {tmp}/noisy.png", "OUT is IN"),
    "no such folder": ("denoise {tmp}/noisy.png {tmp}/none/out.png", "none"),
    "unknown format": ("denoise {tmp}/noisy.png {tmp}/out.webp", "webp"),
    "not an image": ("denoise {tmp}/text.png {tmp}/out.png", "text.png"),
    "misnamed": ("denoise {tmp}/misnamed.png {tmp}/out.png", "JPEG"),
    "unknown prior": ("denoise {tmp}/noisy.png {tmp}/out.png --prior none", "no prior 'none'"),
    "zero sigma": ("denoise {tmp}/noisy.png {tmp}/out.png --sigma 0", "sigma is 0.0"),
    "nan sigma": ("denoise {tmp}/noisy.png {tmp}/out.png --sigma nan", "sigma is nan"),
    "nan pixels": ("denoise {tmp}/nan.npy {tmp}/out.npy", "NaN or infinite"),
    "folder to file": ("denoise {tmp} {tmp}/noisy.png", "so OUT must be one too"),
    "folder to itself": ("denoise {tmp} {tmp}", "OUT is IN"),
    "unknown device": ("denoise {tmp}/noisy.png {tmp}/out.png --device abacus", "'abacus'"),
    "nothing to train on": ("train {tmp}/empty -o {tmp}/p.safetensors", "empty"),
    "no folder to train on": ("train {tmp}/none -o {tmp}/p.safetensors", "none"),
    "small images": ("train {tmp}/small -o {tmp}/p.safetensors --steps 1", "smaller than the crop"),
    "unwritable prior": ("train {tmp}/small -o {tmp}/none/p.safetensors --steps 1", "none"),
    "info on an image": ("info {tmp}/noisy.png", "not a whole safetensors file"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands_are_told_and_leave_nothing(
    case: str, noisy: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(noisy).save(tmp_path / "noisy.png")
    Image.fromarray(noisy).save(tmp_path / "misnamed.png", format="JPEG")
    (tmp_path / "text.png").write_text("not an image")
    np.save(tmp_path / "nan.npy", np.full((32, 32), np.nan))
    (tmp_path / "empty").mkdir()
    (tmp_path / "small").mkdir()
    Image.fromarray(noisy[:20]).save(tmp_path / "small" / "a.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command, message = BAD_COMMANDS[case]
    assert main(command.format(tmp=tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("patchscore: ")
    assert message in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_standard_deviation_is_written_beside(noisy: np.ndarray, tmp_path: Path) -> None:
    source = tmp_path / "noisy.png"
    Image.fromarray(noisy[:32, :32]).save(source)
    command = ["denoise", str(source), str(tmp_path / "clean.png"), "--sigma", "20", "--samples", "2"]
    assert main([*command, "--std", str(tmp_path / "std.tif"), "--seed", "4"]) == 0
    written = read_image(tmp_path / "std.tif").pixels
    _, expected = ps.denoise(
        noisy[:32, :32], 20, return_std=True, samples=2, progress=False,
        generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    assert written.dtype == np.float32
    np.testing.assert_allclose(written, expected, rtol=1e-4)


def test_a_folder_gets_a_folder_of_standard_deviations(noisy: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.fromarray(noisy[:24, :24]).save(tmp_path / "in" / f"{name}.png")
    paths = [str(tmp_path / name) for name in ("in", "out", "std")]
    assert main(["denoise", *paths[:2], "--sigma", "20", "--samples", "2", "--std", paths[2]]) == 0
    assert sorted(path.name for path in (tmp_path / "std").iterdir()) == ["a.tif", "b.tif"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "4"], "--std OUT"),
        (["--std", "std.png"], "cannot hold"),
        (["--std", "noisy.png"], "OUT is IN"),
    ],
)
def test_bad_uses_of_the_standard_deviation_are_refused(
    arguments: list[str], words: str, noisy: np.ndarray, tmp_path: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noisy).save("noisy.png")
    assert main(["denoise", "noisy.png", "clean.png", "--sigma", "20", *arguments]) == 2
    assert words in capfd.readouterr().err
    assert not Path("clean.png").exists()


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Noisy text, from which a prior of photographs gains at once: 15 steps, on any machine."""
    monkeypatch.setitem(ps.adapt.__kwdefaults__, "max_steps", 15)
    clean = data.page()[56:136, 152:232].astype(np.float64)
    return clean + SIGMA * np.random.default_rng(0).standard_normal(clean.shape)


def test_adaptation_to_the_image_is_that_of_the_library(
    page: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "noisy.npy", tmp_path / "clean.npy"
    np.save(source, page)
    paths = [str(source), str(target)]
    options = ["--prior", "natural-gray-fast", "--sigma", str(SIGMA), "--adapt", "--seed", "3"]
    assert main(["denoise", *paths, *options]) == 0
    prior = ps.load_prior("natural-gray-fast", "cpu")
    generator = torch.Generator().manual_seed(3)
    expected = ps.denoise(page, SIGMA, prior=prior, adapt=True, generator=generator, progress=False)
    np.testing.assert_array_equal(np.load(target), expected)
    assert not np.array_equal(expected, ps.denoise(page, SIGMA, prior=prior))
    assert "noisy.npy: adapted: the estimated error fell by" in capfd.readouterr().out


def test_a_prior_for_a_folder_of_noisy_images_is_written_with_its_history(
    page: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "scans").mkdir()
    for name, part in (("a", page[:64]), ("b", page[24:, :72])):
        np.save(tmp_path / "scans" / f"{name}.npy", part)
    target = tmp_path / "scanner.safetensors"
    options = ["--prior", "natural-gray-fast", "--sigma", str(SIGMA)]
    assert main(["adapt", str(tmp_path / "scans"), "-o", str(target), *options]) == 0
    (entry,) = ps.load_prior(target, "cpu").card["adapted"]
    assert entry["images"] == 2
    assert entry["gain"] > 2 * entry["error"] > 0


def test_no_prior_is_written_if_nothing_could_be_learned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scans").mkdir()
    np.save(tmp_path / "scans" / "flat.npy", np.full((48, 48), 7.0))
    target = tmp_path / "scanner.safetensors"
    options = ["--prior", "natural-gray-fast", "--sigma", "1"]
    assert main(["adapt", str(tmp_path / "scans"), "-o", str(target), *options]) == 1
    assert not target.exists()
    assert "not adapted" in capfd.readouterr().out
