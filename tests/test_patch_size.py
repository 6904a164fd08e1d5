"""The patch-size study: its networks are what they say, and its table comes again after a stop."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.io import imsave

from benchmarks import patch_size as study
from benchmarks import patch_size_networks as networks
from benchmarks.__main__ import main
from benchmarks.machine import in_fresh_process
from benchmarks.patch_size_networks import NINE, WHOLE, Candidate
from benchmarks.tables import read_table
from benchmarks.throughput import multiply_adds
from patchscore.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
THREE = Candidate("3", 8)


def parameters_in_theory(side: int, width: int) -> int:
    """Of groups of 8 units: a filter, a row of the mix, two biases and a readout each."""
    groups = width // 8
    return groups * (side**2 + 8 * groups + 3)


@pytest.fixture
def photographs(tmp_path, monkeypatch) -> Path:
    """A data folder with 120 photographs of noise, no two alike."""
    folder = tmp_path / "data"
    (folder / "bsd400").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(120):
        pixels = generator.integers(0, 256, (96, 96), dtype=np.uint8)
        imsave(folder / "bsd400" / f"{number:03d}.png", pixels, check_contrast=False)
    monkeypatch.setenv("PATCHSCORE_DATA", str(folder))
    return folder


@pytest.fixture
def small(monkeypatch) -> None:
    """Few phantoms, two networks, and steps that cost a second."""
    domain = study.Domain("disks", ("rectangles",), (2, 3, 4), (0.5, 1.0), 3)
    monkeypatch.setattr(study, "DOMAINS", {"phantoms": domain})
    monkeypatch.setattr(study, "candidates", lambda: [NINE, THREE])
    monkeypatch.setattr(
        study, "cost", lambda candidate: networks.Cost(*candidate, 1, 1.0, 1.0, 1.0, 1.0, "none")
    )


def measured(todo: list[study.Lesson], path: Path) -> list[study.Row]:
    return replace(study.STUDY, jobs=lambda _: study.jobs_of(todo, path)).measure(Namespace(out=path))


def test_parameters_are_those_of_tied_weights():
    for candidate in networks.candidates():
        if candidate.size in networks.UNETS:
            continue
        side = networks.SIDE if candidate.size == WHOLE else int(candidate.size)
        found = networks.parameters(networks.untrained(candidate))
        assert found == parameters_in_theory(side, candidate.width)


@pytest.mark.parametrize("side", networks.PATCHES)
def test_no_width_comes_closer_to_the_parameters_of_nine(side):
    wanted = parameters_in_theory(9, networks.WIDTH)
    chosen = parameters_in_theory(side, networks.width_of_equal_parameters(str(side)))
    ratios = [parameters_in_theory(side, 8 * groups) / wanted for groups in range(1, 100)]
    assert abs(np.log(chosen / wanted)) == min(abs(np.log(ratios)))


def test_a_cost_is_what_the_layers_say(monkeypatch):
    monkeypatch.setattr(networks, "in_fresh_process", lambda *_: 0.0)
    found = networks.cost(THREE)
    assert found.parameters == parameters_in_theory(3, 8)
    assert found.multiply_adds == 2 * (8 * 9 + 8 * 8) == multiply_adds(networks.untrained(THREE))


def test_a_training_of_the_whole_image_holds_the_bases_of_its_optimiser():
    # SOAP keeps the correlation of 1024 pixels and its eigenvectors, in float32.
    assert in_fresh_process(networks.megabytes, Candidate(WHOLE, 8)) > 2 * 1024**2 * 4 / 1e6


def test_the_whole_image_is_one_clique(randomized, normal, error):
    prior = randomized(networks.untrained(Candidate(WHOLE, 8)))
    x = normal(2, 1, 32, 32).requires_grad_()
    energy = prior.network.energy(x.flatten(1)[..., None], torch.full((2, 1, 1), 0.7, dtype=x.dtype))
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    assert error(prior.score(x, 0.7), -gradient) < 1e-10


def test_a_single_clique_cannot_see_more_directions_than_it_has_filters(randomized, normal):
    prior = randomized(networks.untrained(Candidate(WHOLE, 64)))
    scores = prior.score(normal(80, 1, 32, 32), 0.7).flatten(1)
    assert torch.linalg.matrix_rank(scores.detach()) == 64


def test_tiles_are_denoised_each_by_itself(randomized):
    prior = randomized(networks.untrained(THREE))
    noisy = np.random.default_rng(0).standard_normal((2, 64, 96))
    found = networks.denoised(prior, noisy, 0.5)
    tile = torch.from_numpy(noisy[1, 32:, 64:])[None, None]
    alone = prior.denoise(tile, 0.5)[0, 0].detach().numpy()
    assert np.abs(found[1, 32:, 64:] - alone).max() < 1e-10


def test_every_setting_has_nine_first():
    todo = study.lessons(list(study.DOMAINS), seeds=2, seconds=1.0)
    assert len(set(todo)) == len(todo) == len(networks.candidates()) * 2 * (3 + 1)
    seen = set()
    for lesson in todo:
        nine = lesson._replace(candidate=NINE)
        assert lesson == nine or nine in seen
        seen.add(lesson)


@pytest.mark.usefixtures("photographs")
def test_what_is_measured_on_is_neither_learned_nor_chosen_on():
    domain = study.Domain("bsd400", (), (10, 50, 100), (25.0,), 24)
    learned = [x.tobytes() for x in study.learning_images(domain, 100, 0)]
    some = [x.tobytes() for x in study.learning_images(domain, 10, 0)]
    scale = 10 / 255
    measured = {(scale * x).tobytes() for x in study.measured_images(domain, "bsd400")}
    chosen = {(scale * x).tobytes() for x in study.choosing_images(domain)}
    # Twelve of 120 are held out: eight to choose on, four to measure on.
    assert (len(set(learned)), len(chosen), len(measured)) == (100, 8, 4)
    assert some == learned[:10]
    assert not measured & {*learned, *chosen}
    assert not chosen & set(learned)


@pytest.mark.usefixtures("small")
def test_a_stopped_run_goes_on_to_the_same_table(tmp_path):
    todo = study.lessons(["phantoms"], seeds=2, seconds=2.0)
    assert len(todo) == 8
    measured(todo, tmp_path / "whole.csv")
    measured(todo[:3], tmp_path / "parts.csv")
    measured(todo, tmp_path / "parts.csv")
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "parts.csv").read_bytes()
    assert len(read_table(tmp_path / "whole-cost.csv", networks.Cost)) == 2


@pytest.mark.usefixtures("small")
def test_differences_are_paired(tmp_path):
    todo = study.lessons(["phantoms"], seeds=1, seconds=2.0)[:2]
    rows = measured(todo, tmp_path / "rows.csv")
    nine, three = ([row for row in rows if row.size == size] for size in "93")
    assert [(row.test_set, row.sigma, row.steps) for row in three] == [
        (name, sigma, 2) for name in ("disks", "rectangles") for sigma in (0.5, 1.0)
    ]
    for order in (nine + three, three + nine):
        found = dict(zip(order, study.over_nine(order), strict=True))
        for ours, other in zip(three, nine, strict=True):
            gaps = study.image_psnr(ours) - study.image_psnr(other)
            assert np.array_equal(found[ours], gaps)
            assert not found[other].any()
    assert np.isnan(study.over_nine(three)).all()


def test_another_table_is_refused(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    assert main(["patch-size", "--out", str(path)]) == 2
    assert "is not a table of the study patch-size" in capsys.readouterr().err
    with pytest.raises(InputError, match="its columns are different"):
        read_table(path, networks.Cost)


def test_the_committed_table_agrees_with_itself():
    path = ROOT / "benchmarks/results/patch-size.csv"
    if not path.exists():
        pytest.skip("there is no table yet")
    rows = read_table(path, study.Row)
    costs = {found[:2]: found for found in read_table(study.cost_path(path), networks.Cost)}
    assert rows
    for row in rows:
        values = study.image_psnr(row)
        assert len(values) == row.measured
        assert abs(values.mean() - row.psnr) <= 5.01e-4
        assert row.steps == round(row.seconds / costs[row.size, row.width].seconds_per_step)
