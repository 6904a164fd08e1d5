"""The phantom study on a few images: reproducible rows, paired arithmetic, counted steps."""

from __future__ import annotations

import csv
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.methods import version_of
from patchscore.errors import InputError
from patchscore.evaluation.metrics import psnr
from patchscore.inference.optimize import Solution
from patchscore.priors.cliques import Clique
from patchscore.priors.gaussian import GaussianPatches
from patchscore.priors.mlp import PatchMLP
from patchscore.priors.prior import PatchPrior

ROOT = Path(__file__).resolve().parents[1]
SIGMA = 0.5


@pytest.fixture(autouse=True)
def study(monkeypatch):
    """The benchmark, which belongs to the repository and not to the installed package; few steps."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import phantoms

    monkeypatch.setattr(phantoms, "MAX_STEPS", 20)
    monkeypatch.setattr(phantoms, "VALIDATION_IMAGES", 2)
    monkeypatch.setattr(phantoms, "has_bm3d", lambda: False)
    return phantoms


@pytest.fixture
def priors() -> dict[str, PatchPrior]:
    """A Gaussian prior, whose maximum is known, and a small network without a potential."""
    torch.manual_seed(0)
    pair = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    gaussian: Clique = GaussianPatches((1, 2), pair)
    network = PatchMLP(3, widths=(8,), tanh_layers=1)
    return {
        "pairs": PatchPrior(gaussian, assembly="mean"),
        "network": PatchPrior(network, assembly="mean"),
    }


def measured(study, priors, seed: int = 0) -> list:
    jobs = study.jobs_of(priors, [SIGMA], images=2, seed=seed)
    return [row for job in jobs for row in job.run()]


def row(study, image: int, method: str, value: float, *, sigma: float = SIGMA):
    return study.Row(image, 1.0, sigma, method, value, "", None, None, 0, "")


def test_the_same_seed_gives_the_same_rows(study, priors) -> None:
    rows = measured(study, priors)
    assert rows == measured(study, priors)
    other = measured(study, priors, seed=1)
    assert all(a.psnr != b.psnr for a, b in zip(rows, other, strict=True))


def test_the_noise_of_an_image_does_not_depend_on_how_many_there_are(study) -> None:
    one, three = (study.noisy(torch.zeros(n, 1, 8, 8), SIGMA, study.TEST, 0) for n in (1, 3))
    assert torch.equal(three[:1], one)
    assert not torch.equal(three[1:2], one)


def test_training_validation_and_test_share_no_phantom_and_no_noise(study) -> None:
    sets = study.TRAINING, study.VALIDATION, study.TEST
    clean = [study.phantoms(2, which, seed) for seed in (0, 1) for which in sets]
    noise = [study.noisy(torch.zeros(2, 1, 8, 8), SIGMA, which, 0) for which in sets]
    for images in (clean, noise):
        assert len({x.numpy().tobytes() for batch in images for x in batch}) == 2 * len(images)


def test_the_noise_has_the_level_asked_for(study) -> None:
    z = study.noisy(torch.zeros(20, 1, 64, 64), SIGMA, study.TEST, 0) / SIGMA
    assert abs(z.square().mean().item() - 1) < 4 * math.sqrt(2 / z.numel())


def test_rows_hold_the_psnr_of_their_images(study, priors) -> None:
    rows = measured(study, priors)
    clean = study.phantoms(2, study.TEST, 0)
    y = study.noisy(clean, SIGMA, study.TEST, 0)
    for r in rows:
        if r.method == "noisy":
            truth, image = clean[r.image, 0].numpy(), y[r.image, 0].numpy()
            assert r.psnr == round(psnr(truth, image, data_range=study.DATA_RANGE), 4)
            assert r.contrast == pytest.approx(truth.max() - truth.min(), abs=1e-4)


def test_map_ends_at_the_share_that_is_best_on_the_validation_phantoms(study, priors) -> None:
    prior = priors["pairs"]
    clean = study.phantoms(2, study.VALIDATION, 0)
    y = study.noisy(clean, SIGMA, study.VALIDATION, 0)
    errors = {
        share: sum(
            10 * math.log10((x - truth).square().mean().item())
            for x, truth in zip(study.maximum(prior, y, SIGMA, [share]).x, clean, strict=True)
        )
        for share in study.SHARES
    }
    assert study.best_share(prior, SIGMA, 0) == min(errors, key=errors.get)


def test_map_without_a_potential_has_no_falls_and_with_one_no_fall(study, priors) -> None:
    rows = measured(study, priors)
    by_method = {
        name: [r for r in rows if r.method.startswith(("MAP", "annealed")) and r.method.endswith(name)]
        for name in ("pairs", "network")
    }
    assert [r.falls for r in by_method["pairs"]] == [0] * 4
    assert [r.falls for r in by_method["network"]] == [None] * 4
    assert all(r.steps for r in by_method["pairs"])


def test_falls_are_counted_image_by_image_and_within_a_level(study) -> None:
    objective = np.array([[0.0, 5.0], [1.0, 4.0], [-9.0, 3.0], [-8.0, 3.0]])
    levels = np.array([1.0, 1.0, 0.5, 0.5])
    solution = Solution(torch.zeros(2, 1, 1, 1), objective, objective, levels, "", 0, 0.0)
    assert study.falls(solution) == [0, 1]
    nothing = solution._replace(objective=np.full((4, 2), np.nan))
    assert study.falls(nothing) == [None, None]


def test_differences_are_paired(study) -> None:
    tv, _ = study.BASELINES
    pairs = [(30.0, 31.0), (20.0, 22.0), (40.0, 43.0)]
    rows = [
        row(study, n, name, v) for n, p in enumerate(pairs) for name, v in zip((tv, "b"), p, strict=True)
    ]
    rows += [row(study, 0, "b", 99.0, sigma=1.0), row(study, 1, "b", 97.0, sigma=1.0)]
    head, _, of_tv, of_b, elsewhere, *_ = study.summary(rows, Namespace()).splitlines()
    assert head.endswith("| PSNR | over TV, oracle weight | over BM3D |")
    # Of 1, 2, 3: their spread is 1, so the standard error is 1 / sqrt(3). BM3D was not measured.
    assert of_tv == f"| 0.5 | {tv} |  | 30.00 |  |  |"
    assert of_b == f"| 0.5 | b |  | 32.00 | +2.00 ± {1 / math.sqrt(3):.2f} |  |"
    assert elsewhere == "| 1 | b |  | 98.00 |  |  |"


def test_priors_are_trained_once(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(study, "TRAINING_IMAGES", 4)
    first = study.train(tmp_path, minutes=0.001, seed=0)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = study.train(tmp_path, minutes=0.001, seed=0)
    assert [version_of(prior) for prior in first.values()] == [*map(version_of, second.values())]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    assert [prior.has_potential for prior in first.values()] == [False, True]


def test_one_image_has_no_standard_error(study) -> None:
    with pytest.raises(InputError, match="at least 2 test phantoms"):
        list(study.jobs(Namespace(images=1)))


def test_the_command_writes_the_rows_and_prints_the_table(study, tmp_path, monkeypatch, capsys) -> None:
    from benchmarks.__main__ import main

    monkeypatch.setattr(study, "TRAINING_IMAGES", 4)
    monkeypatch.setattr(study, "MAX_STEPS", 2)
    out = tmp_path / "phantoms.csv"
    options = ("--weights", tmp_path, "--minutes", 0.001, "--sigmas", SIGMA, "--images", 2, "--out", out)
    assert main([str(option) for option in ("phantoms", *options)]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 8  # noisy, total variation, and three estimates of each prior
    assert {row["falls"] for row in rows} == {"", "0"}
    printed = capsys.readouterr().out
    assert all(f"| {row['method']} |" in printed for row in rows)
    assert "its objective fell in 0 of them" in printed
