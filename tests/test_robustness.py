"""The robustness benchmark on small photographs: rows that come again, shifts that are what they say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student
from skimage import data
from skimage.io import imsave
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import patchscore as ps
from benchmarks import data as sets
from benchmarks.robustness import contenders, plan, run, shifts, study, summary, table, training
from benchmarks.robustness.claims import claims
from benchmarks.tables import Table, read_table
from benchmarks.workers import Workers
from patchscore.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
TINY = plan.QUICK._replace(
    images=2, phantoms=2, slow=1, side=32, photograph_counts=(4,), phantom_counts=(4,), learned=4
)
CHEAP = {"noisy", "TV", "NLM", "wavelets", contenders.BUNDLED, training.PATCH_PRIOR, training.DDPM}


@pytest.fixture(autouse=True)
def photographs(tmp_path, monkeypatch) -> Path:
    """A data folder: photographs of scikit-image to learn from and to test on, in 8 and in 16 bits."""
    folder = tmp_path / "data"
    for name, picture, factor in (
        ("bsd400", data.camera(), 1),
        ("bsd68", data.brick(), 1),
        ("mri_brain/train", data.moon(), 100),
        ("mri_brain/test", data.moon().T, 100),
    ):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            cut = picture[100 + 12 * number : 164 + 12 * number, 150:214]
            pixels = cut.astype(np.uint16) * factor if factor > 1 else cut
            imsave(folder / name / f"{number:02d}.png", pixels, check_contrast=False)
    monkeypatch.setenv("PATCHSCORE_DATA", str(folder))
    contenders.ready.cache_clear()
    return folder


@pytest.fixture
def settings(tmp_path) -> contenders.Settings:
    return contenders.Settings(tmp_path / "weights", training.Effort(1.0, steps=2), None, 0)


def few_tasks(seed: int = 0) -> list[plan.Task]:
    """The cheap contenders, in and out of distribution."""
    found = plan.tasks(TINY, ["phantoms", "gain"], mixture=None, seed=seed)
    wanted = {"none", "gain 10", "disks to rectangles"}
    return [
        task
        for task in found
        if task.shift in wanted
        and task.contender.method in CHEAP
        and task.contender.train_set != "rectangles"
    ]


def few_classical(seed: int = 0) -> list[plan.Task]:
    return [task for task in few_tasks(seed) if task.contender.method in ("noisy", "TV", "wavelets")]


def measure_all(tasks, settings, out: Path, workers: Workers = Workers()) -> list[table.Row]:  # noqa: B008
    run.prepare_all(tasks, settings, workers, table.budget_path(out))
    one = replace(study.STUDY, jobs=lambda _: run.jobs(tasks, settings))
    return one.measure(Namespace(out=out, processes=workers.processes, scheduler=workers.scheduler))


def rows_of(path: Path) -> list[table.Row]:
    return read_table(path, table.Row)


# --- the table


def row(shift: str, method: str, image: str, psnr: float, **others) -> table.Row:
    made = table.Row(
        "content", shift, "", 0, "set", image, 25.0, method, "one-step", psnr, 0.5, 0, "v", "m", "d"
    )
    return made._replace(**others)


def table_at(path: Path) -> Table:
    return Table(path, table.Row, table.KEY, table.DEPENDS, "robustness")


def test_rows_come_back_as_they_were(tmp_path) -> None:
    rows = [row("none", "a", "1", 30.125), row("none", "a", "2", 1 / 3, sigma=0.1, seed=3)]
    written = table_at(tmp_path / "x.csv")
    written.add(reversed(rows))
    written.write()
    assert rows_of(tmp_path / "x.csv") == sorted(rows)
    assert rows_of(tmp_path / "missing.csv") == []


def test_a_key_has_one_row_and_the_last_counts(tmp_path) -> None:
    rows = [row("none", "a", "1", 30.0), row("none", "a", "1", 31.0, version="w")]
    written = table_at(tmp_path / "x.csv")
    for one in rows:
        written.add([one])
        written.write()
    assert rows_of(tmp_path / "x.csv") == rows[1:]
    key = written.key(rows[1])
    assert written.holds((*key, "w", "d"))
    assert written.is_stale((*key, "v", "d"))
    assert not written.is_stale((*key[:-1], 7, "v", "d"))  # of another seed there is none


def test_a_foreign_table_is_refused(tmp_path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"columns are different.*--out"):
        rows_of(tmp_path / "x.csv")


# --- runs


def test_the_same_seed_gives_the_same_bytes_and_rows_know_their_images(settings, tmp_path) -> None:
    tasks = few_tasks()
    first = measure_all(tasks, settings, tmp_path / "a.csv")
    fresh = settings._replace(weights=tmp_path / "other")
    contenders.ready.cache_clear()
    measure_all(tasks, fresh, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert len(first) == sum(task.images for task in tasks)

    for found in first[:: len(first) // 6]:
        problem, denoised = run.again(found, tasks, settings)
        scale = 10 if found.test_set in sets.PHANTOMS else 255
        psnr = peak_signal_noise_ratio(problem.clean, denoised, data_range=scale)
        ssim = structural_similarity(
            problem.clean,
            denoised,
            data_range=scale,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert found.psnr == round(float(psnr), 4)
        assert found.ssim == round(float(ssim), 5)

    other = measure_all(few_classical(1), settings._replace(seed=1), tmp_path / "c.csv")
    assert {found.input for found in first}.isdisjoint(found.input for found in other)
    budgets = read_table(tmp_path / "a-budget.csv", table.Budget)
    learned = {(one.contender.method, one.contender.train_set) for one in tasks}
    as_they_come = "", contenders.BUNDLED, contenders.ADAPTED
    expected = {pair for pair in learned if pair[1] and pair[0] not in as_they_come}
    assert {(budget.method, budget.train_set) for budget in budgets} == expected


def test_a_stopped_run_goes_on_without_a_missing_or_a_second_row(
    settings, tmp_path, monkeypatch
) -> None:
    tasks = few_tasks()
    measure_all(tasks, settings, tmp_path / "whole.csv")
    measured: Counter[plan.Task] = Counter()
    original, limit = run.measure, 7

    def counting(task, settings):
        if sum(measured.values()) == limit:
            raise KeyboardInterrupt
        measured[task] += 1
        return original(task, settings)

    monkeypatch.setattr(run, "measure", counting)
    with pytest.raises(KeyboardInterrupt):
        measure_all(tasks, settings, tmp_path / "parts.csv")
    assert 0 < len(rows_of(tmp_path / "parts.csv")) < sum(task.images for task in tasks)

    limit = -1
    denoised = []
    ready = run.ready

    def watched(*arguments):
        denoiser = ready(*arguments)
        return denoiser._replace(run=lambda *case: denoised.append(1) or denoiser.run(*case))

    monkeypatch.setattr(run, "ready", watched)
    done = len(rows_of(tmp_path / "parts.csv"))
    measure_all(tasks, settings, tmp_path / "parts.csv")
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert len(denoised) == sum(task.images for task in tasks) - done


KILLED = """
import sys, time
from pathlib import Path
sys.path.append({tests!r})
from benchmarks import study
from benchmarks.robustness import run
from benchmarks.robustness.contenders import Settings
from benchmarks.robustness.training import Effort
from test_robustness import few_classical, measure_all
study.WRITING_SHARE = 0.0
original = run.measure
def slow(task, settings):
    time.sleep(0.2)
    return original(task, settings)
run.measure = slow
measure_all(few_classical(), Settings(Path({weights!r}), Effort(1.0, 2), None, 0), Path({out!r}))
"""


def test_a_killed_run_goes_on_to_the_same_table(settings, tmp_path) -> None:
    out = tmp_path / "killed.csv"
    code = KILLED.format(tests=str(ROOT / "tests"), weights=str(settings.weights), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    tasks = few_classical()
    assert 0 < len(rows_of(out)) < sum(task.images for task in tasks)
    measure_all(tasks, settings, out)
    measure_all(tasks, settings, tmp_path / "whole.csv")
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_processes_and_a_cluster_give_the_same_bytes(settings, tmp_path) -> None:
    tasks = few_classical()
    measure_all(tasks, settings, tmp_path / "one.csv")
    measure_all(tasks, settings, tmp_path / "two.csv", Workers(2))
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()

    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        workers = Workers(scheduler=cluster.scheduler_address)
        measure_all(tasks, settings, tmp_path / "cluster.csv", workers)
    assert (tmp_path / "cluster.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_no_scheduler_and_no_dask_are_errors_that_teach(settings, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"patchscore\[cluster\]"):
        measure_all(few_tasks(), settings, tmp_path / "x.csv", Workers(scheduler="tcp://nowhere:1"))


def test_gain_and_offset_cost_the_invariant_prior_nothing(settings) -> None:
    contender = table.Series(contenders.BUNDLED, contenders.ONE_STEP, "bsd400", 360)
    settings.weights.mkdir()
    found = {
        shift: run.measure(plan.Task("gain", shift, "bsd68", 25.0, contender, 2, 2, 48, 0), settings)
        for shift in ("none", *shifts.GAIN_SHIFTS)
    }
    rows = [one for several in found.values() for one in several]
    lost = summary.drops([*rows, *(one._replace(method=training.PATCH_PRIOR) for one in rows)])
    assert len(lost) == 2 * len(shifts.GAIN_SHIFTS)
    assert max(abs(drop.mean) for drop in lost.values()) < 0.01


def test_the_adapted_prior_is_the_bundled_one_after_its_steps(settings, monkeypatch) -> None:
    monkeypatch.setattr(contenders, "ADAPTATION_STEPS", 15)
    names = contenders.BUNDLED, contenders.ADAPTED
    bundled, adapted = (table.Series(n, contenders.ONE_STEP, "bsd400", 360) for n in names)
    assert not contenders.is_prepared_here(adapted)
    noisy = data.brick()[:96, :96] + 25 * np.random.default_rng(0).standard_normal((96, 96))
    denoiser = contenders.ready(adapted, 25.0, settings)
    plain = contenders.ready(bundled, 25.0, settings)
    assert denoiser.version == f"{plain.version} adapted in at most 15 steps"
    prior, report = ps.adapt(ps.load_prior("natural-gray"), noisy, 25.0, max_steps=15, progress=False)
    assert len(report.checks) == 1
    expected = ps.denoise(noisy, 25.0, prior=prior)
    np.testing.assert_array_equal(denoiser.run(noisy, 25.0, noisy), expected)


def test_slow_methods_see_the_noisy_images_that_others_see() -> None:
    task = plan.Task("gain", "gain 2", "bsd68", 25.0, plan.BUNDLED_PRIOR, 12, 12, 24, 0)
    others = {case.image: case.problem.noisy for case in run.cases(task)}
    slow = run.cases(task._replace(images=5))
    assert [case.image for case in slow] == ["00", "02", "04", "07", "09"]
    for case in slow:
        np.testing.assert_array_equal(case.problem.noisy, others[case.image])
    for size in (plan.FULL, plan.QUICK):
        for task in plan.tasks(size, table.STUDIES, mixture=None, seed=0):
            most = size.phantoms if task.test_set in sets.PHANTOMS else size.images
            assert task.among == most
            assert task.images == (size.slow if contenders.is_slow(task.contender) else most)


def test_every_task_is_there_once_and_every_shift_has_a_reference() -> None:
    for size in (plan.FULL, plan.QUICK):
        todo = plan.tasks(size, table.STUDIES, mixture=None, seed=0)
        assert len(todo) == len(set(todo))
        trained = [task for task in todo if task.contender.method == training.PATCH_PRIOR]
        references = {(t.study, t.sigma, t.contender) for t in trained if t.shift == "none"}
        assert {(t.study, t.sigma, t.contender) for t in trained} == references
        lessons = [contender for contender, _ in run.lessons(todo)]
        assert len({contender._replace(estimate="") for contender in lessons}) == len(lessons)


# --- images


def test_training_choosing_and_test_share_no_image() -> None:
    for name in sets.PHANTOMS:
        learn, choose = sets.training_images(name, count=10, seed=0)
        test = [pixels for _, pixels in sets.test_images(name, count=10, side=32, seed=0)]
        assert len({x.tobytes() for x in (*learn, *choose, *test)}) == len(learn) + len(choose) + 10
        assert sets.training_images(name, count=4, seed=0).learn[3].tobytes() == learn[3].tobytes()
    learn, choose = sets.training_images("bsd400", count=10, seed=0)
    assert len({x.tobytes() for x in (*learn, *choose)}) == 12
    with pytest.raises(InputError, match="has 10 \\(and 2 held out"):
        sets.training_images("bsd400", count=11, seed=0)


def test_a_set_is_scaled_by_the_quantile_of_its_training_part(photographs) -> None:
    from skimage.io import imread

    learned = np.stack([imread(path) for path in sorted((photographs / "mri_brain/train").glob("*"))])
    factor = 255 / np.percentile(learned, 99.9)
    found = sets.test_images("mri_brain/test", count=3, side=40, seed=0)
    assert [name for name, _ in found] == ["00", "04", "08"]
    pixels = imread(photographs / "mri_brain/test/04.png")[12:52, 12:52]
    np.testing.assert_allclose(found[1].pixels, factor * pixels, rtol=1e-14)
    assert (
        sets.test_images("bsd68", count=1, side=64, seed=0)[0].pixels.max()
        == data.brick()[100:164, 150:214].max()
    )


# --- shifts


def problem(shift: str, image: np.ndarray, sigma: float = 25.0) -> shifts.Problem:
    return shifts.shifted(shift, image, sigma, data_range=255.0, seed=0, number=0)


def test_turns_and_flips_are_those_of_the_noisy_image(normal) -> None:
    image = normal(6, 9).numpy()
    before = problem("none", image)
    turned, flipped = problem("rotated 90", image), problem("flipped", image)
    for k, (x, y) in enumerate(((turned.clean, image), (turned.noisy, before.noisy))):
        assert np.array_equal(x, np.rot90(y)), k
    assert np.array_equal(flipped.noisy, before.noisy[:, ::-1])
    assert np.array_equal(flipped.clean, image[:, ::-1])


def test_a_gain_and_an_offset_are_undone() -> None:
    image = data.camera()[:16, :16].astype(float)
    before = problem("none", image)
    for shift, told in (("gain 0.1", 2.5), ("offset -0.5", 25.0)):
        after = problem(shift, image)
        assert after.told == told
        np.testing.assert_allclose(after.restored(after.noisy), before.noisy, atol=1e-10)
        np.testing.assert_allclose(after.restored(after.seen), image, atol=1e-10)
    assert problem("sigma x 1.2", image).told == 30.0
    assert np.array_equal(problem("sigma x 1.2", image).noisy, before.noisy)


def test_zooms_keep_slopes() -> None:
    ramp = 3.0 * np.arange(64.0)[:, None] + np.zeros(64)
    twice, half = shifts.zoomed(ramp, 2.0), shifts.zoomed(ramp, 0.5)
    assert twice.shape == (64, 64)
    assert half.shape == (32, 32)
    np.testing.assert_allclose(np.diff(twice, axis=0)[16:-16], 1.5, atol=1e-3)
    np.testing.assert_allclose(np.diff(half, axis=0)[8:-8], 6.0, atol=1e-3)


@pytest.mark.parametrize("model", [shifts.poisson, shifts.speckle, shifts.correlated])
def test_noise_has_the_mean_and_the_variance_that_it_should(model, z_score) -> None:
    image = np.linspace(40, 200, 64)[:, None] + np.zeros(64)
    sigma, generator = 20.0, np.random.default_rng(0)
    noise = np.stack([model(image, sigma, generator) - image for _ in range(200)])
    expected = {
        shifts.poisson: sigma**2 * image / image.mean(),
        shifts.speckle: sigma**2 * image**2 / np.mean(image**2),
        shifts.correlated: np.full(image.shape, sigma**2),
    }[model]
    for rows in (slice(0, 8), slice(-8, None), slice(None)):  # dark, bright, all
        part = noise[:, rows]
        assert z_score(part.mean((1, 2)), 0.0) < 4
        assert z_score((part**2).mean((1, 2)), expected[rows].mean()) < 4
    assert expected.mean() == pytest.approx(sigma**2, rel=1e-12)


def test_correlated_noise_has_the_correlation_of_its_filter(z_score) -> None:
    generator = np.random.default_rng(1)
    noise = np.stack([shifts.correlated(np.zeros((32, 32)), 1.0, generator) for _ in range(400)])
    # A sampled Gaussian of standard deviation 1, cut at 4 as scipy does, and its autocorrelation.
    h = np.exp(-0.5 * np.arange(-4, 5) ** 2)
    correlation = np.correlate(h, h, "full")[8:] / np.sum(h**2)
    for distance in (1, 2, 4):
        for axis in (1, 2):
            products = (noise * np.roll(noise, distance, axis)).mean((1, 2))
            assert z_score(products, correlation[distance]) < 4
    diagonal = (noise * np.roll(noise, (1, 1), (1, 2))).mean((1, 2))
    assert z_score(diagonal, correlation[1] ** 2) < 4


def test_clipped_noise_is_white_noise_in_eight_bits() -> None:
    image = data.camera()[:32, :32].astype(float)
    found = shifts.clipped(image, 50.0, np.random.default_rng(0))
    plain = image + 50.0 * np.random.default_rng(0).standard_normal(image.shape)
    assert np.array_equal(found, np.clip(np.rint(plain), 0, 255).astype(np.uint8))


def test_an_image_without_light_has_no_poisson_noise() -> None:
    with pytest.raises(InputError, match="no photons"):
        shifts.poisson(np.zeros((4, 4)), 1.0, np.random.default_rng(0))


# --- what the rows say


def test_the_interval_holds_the_truth_as_often_as_theory_says() -> None:
    """The percentiles are close to mean -+ 1.96 s sqrt((n - 1) / n) / sqrt(n)."""
    count, trials = 20, 1000
    generator = np.random.default_rng(0)
    found = [summary.interval(generator.standard_normal(count), seed=n) for n in range(trials)]
    share = np.mean([low <= 0 <= high for _, low, high, _ in found])
    limit = 1.959964 * np.sqrt((count - 1) / count)
    expected = 1 - 2 * student.sf(limit, count - 1)
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / trials)


def test_two_samples_are_resampled_apart(z_score) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(3, 1, 400), generator.normal(1, 2, 100)
    found = summary.interval(a, b)
    assert found.mean == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    width = 2 * 1.959964 * np.sqrt(a.var() / 400 + b.var() / 100)
    # The percentiles of 4000 draws: each has a standard error of sqrt(p q / draws) / density.
    error = np.sqrt(2) * np.sqrt(0.025 * 0.975 / summary.DRAWS) / 0.0584 * width / (2 * 1.959964)
    assert abs(found.high - found.low - width) < 4 * error


def small_table() -> list[table.Row]:
    """Two methods; under the shift the prior loses 1 dB on average and the rival 3 dB."""
    values = {
        ("none", training.PATCH_PRIOR): (30.0, 32.0),
        ("none", "TV"): (29.0, 31.0),
        ("ct", training.PATCH_PRIOR): (29.5, 30.5),
        ("ct", "TV"): (26.0, 28.0),
    }
    return [
        row(shift, method, image, psnr, test_set=shift)
        for (shift, method), both in values.items()
        for image, psnr in zip("ab", both, strict=True)
    ]


def test_drops_and_differences_are_those_of_the_hand() -> None:
    lost = {series.method: drop for (_, series), drop in summary.drops(small_table()).items()}
    assert lost[training.PATCH_PRIOR].mean == pytest.approx(-1.0, abs=1e-12)
    assert lost["TV"].mean == pytest.approx(-3.0, abs=1e-12)
    found = {d.place.shift: d for d in summary.differences(small_table())}
    assert found["none"].drop is None
    assert found["ct"].psnr.mean == pytest.approx(3.0, abs=1e-12)
    assert found["ct"].drop.mean == pytest.approx(2.0, abs=1e-12)
    assert (found["ct"].worst_image, found["ct"].worst) == ("b", 2.5)


def test_how_hard_a_set_is_cancels_in_the_difference_of_drops() -> None:
    harder = [one._replace(psnr=one.psnr - 7 * (one.shift == "ct")) for one in small_table()]
    before, after = (
        next(d.drop for d in summary.differences(rows) if d.drop) for rows in (small_table(), harder)
    )
    np.testing.assert_allclose(after, before, atol=1e-12)


def test_only_what_has_learned_from_the_same_images_is_compared() -> None:
    prior = table.Series(training.PATCH_PRIOR, "one-step", "disks", 10)
    rows = [
        row(
            "none",
            *series[:1],
            "a",
            30.0,
            estimate=series[1],
            train_set=series[2],
            training_images=series[3],
        )
        for series in (
            prior,
            prior._replace(training_images=100),
            prior._replace(method="U-Net"),
            prior._replace(method="U-Net", training_images=100),
            prior._replace(method="U-Net", train_set="rectangles"),
            table.Series("TV", "tuned weight", "disks", 8),
            table.Series("TV", "tuned weight", "rectangles", 8),
            table.Series("BM3D", "two stages", "", 0),
        )
    ]
    rivals = [d.rival for d in summary.differences(rows) if d.prior == prior]
    assert sorted(rivals) == [
        ("BM3D", "two stages", "", 0),
        ("TV", "tuned weight", "disks", 8),
        ("U-Net", "one-step", "disks", 10),
    ]


def test_claims_are_read_off_the_rows() -> None:
    assert claims(small_table(), []) == [["expected", "measured", "so"]]
    values = {"none": (30.0, 28.0), "gain 10": (29.994, 25.0)}
    names = training.PATCH_PRIOR, training.NO_INVARIANCE
    rows = [
        row(shift, name, "a", psnr, study="gain")
        for shift, both in values.items()
        for name, psnr in zip(names, both, strict=True)
    ]
    for steps, verdict in ((600, "yes"), (30, "not known: 30 steps of training, and 600 are needed")):
        budget = table.Budget(training.NO_INVARIANCE, "", 0, 1, 1.0, steps, "", "")
        assert [line[1:] for line in claims(rows, [budget])[1:]] == [
            ["+0.0060 dB", "yes"],
            ["+3.0000 dB", verdict],
        ]


def test_a_column_of_the_headline_is_of_images_that_all_methods_share() -> None:
    rows = [
        row(shift, method, image, psnr, train_set="bsd400", training_images=count)
        for shift in ("none", "ct")
        for method, count, image, psnr in (
            (training.PATCH_PRIOR, 100, "a", 30.0),
            (training.PATCH_PRIOR, 100, "b", 10.0),
            (training.PATCH_PRIOR, 360, "a", 50.0),  # more than the headline has
            (training.UNET, 100, "a", 31.0),
            (training.UNET, 10, "a", 60.0),
            (contenders.BUNDLED, 360, "a", 29.0),
        )
    ]
    assert summary.headline(rows) == [
        ["method", "in distribution", "content"],
        ["patch prior, one-step", "30.00", "30.00"],
        ["patch prior, bundled, one-step", "29.00", "29.00"],
        ["U-Net, one-step", "**31.00**", "**31.00**"],
    ]


def test_a_choice_is_made_once(tmp_path) -> None:
    tried = []

    def quality(value: float) -> float:
        tried.append(value)
        return -abs(value - 2.2)

    for _ in range(2):
        assert training.choose(tmp_path / "x.json", (1.0, 2.0, 4.0), quality).value == 2.0
    assert tried == [1.0, 2.0, 4.0]


def test_a_training_that_diverges_is_repeated_at_half_the_rate(settings, monkeypatch) -> None:
    rates = []

    def diverging(lesson, images, rate):
        rates.append(rate)
        reached = 20.0 if lesson.effort.steps == 1 else 10.0 if rate > 1.5e-3 else 30.0
        return training.trained(lesson, images.learn, rate), reached

    monkeypatch.setattr(training, "attempt", diverging)
    settings.weights.mkdir()
    lesson = training.Lesson(training.CNN, "bsd400", 4, 0, training.Effort(1.0, steps=10))
    monkeypatch.setattr(training, "RATES", (4e-3,))
    budget = training.learn(lesson, settings.weights)
    assert rates == [4e-3, 4e-3, 2e-3, 1e-3]
    assert budget.tuned.startswith("learning rate 0.001; 0.004 was the best of 1")
    assert training.learn(lesson, settings.weights) == budget
    assert len(rates) == 4


def test_the_command_prints_its_tables_and_writes_a_report(tmp_path, monkeypatch, capsys) -> None:
    from benchmarks.__main__ import main

    monkeypatch.setattr(study, "QUICK", TINY)
    monkeypatch.setattr(plan, "has_bm3d", lambda: False)
    out = tmp_path / "x.csv"
    size = "--quick --studies geometry --steps 1 --side 32 --processes 1"
    options = f"{size} --weights {tmp_path / 'w'} --out {out}"
    assert main(["robustness", *options.split()]) == 0
    printed = capsys.readouterr().out
    assert "| method | geometry |" in printed
    assert "<html" in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "rotated 90" in (tmp_path / "x.md").read_text(encoding="utf-8")
    assert main(["robustness", "--tables", "--out", str(out)]) == 0
    assert capsys.readouterr().out == printed
    part = tmp_path / "part.csv"
    some = ["--test-sets", "bsd68", "--methods", training.PATCH_PRIOR, "wavelets", "--side", "24"]
    assert main(["robustness", *options.replace(str(out), str(part)).split(), *some]) == 0
    assert {one.method for one in rows_of(part)} == {training.PATCH_PRIOR, "wavelets"}
    few = ["--methods", training.PATCH_PRIOR, contenders.BUNDLED, "--training-images"]
    counted = [*options.replace(str(out), str(tmp_path / "few.csv")).split(), *few]
    assert main(["robustness", *counted, str(TINY.learned)]) == 0
    measured = {(one.method, one.training_images) for one in rows_of(tmp_path / "few.csv")}
    assert measured == {(training.PATCH_PRIOR, TINY.learned), (contenders.BUNDLED, plan.BUNDLED_IMAGES)}
    capsys.readouterr()
    assert main(["robustness", *counted, str(TINY.learned + 1)]) == 2
    assert f"the numbers of training images are {TINY.learned}." in capsys.readouterr().err
    assert main(["robustness", *options.split(), "--methods", "TV"]) == 2
    assert "The test sets are bsd68; the methods are CNN, DDPM" in capsys.readouterr().err
    lost = summary.drops(rows_of(out))
    turned = [
        drop.mean
        for (place, series), drop in lost.items()
        if series.method == contenders.BUNDLED and place.shift in shifts.TURNS
    ]
    # Turns and flips are exact invariances; a row has four digits after the point.
    assert len(turned) == 2
    assert max(map(abs, turned)) <= 1.1e-4


def test_the_documents_have_the_tables_of_the_committed_rows() -> None:
    path = ROOT / "benchmarks/results/robustness.csv"
    budgets = read_table(table.budget_path(path), table.Budget)
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    lines = [line for line in study.tables(rows_of(path), budgets).splitlines() if line.startswith("|")]
    assert len(lines) > 30
    assert [line for line in lines if line not in text] == []
