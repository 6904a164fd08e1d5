"""How much memory is free, and what checks and samplers take of it."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import patchscore as ps
from patchscore import memory


def test_the_caches_of_files_are_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  4000 kB\nMemFree:   100 kB\nMemAvailable:   3000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    assert memory.free_bytes() == 3000 * 1024
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    free = memory.free_bytes("cpu")
    assert free is None or free > 0


def test_an_interrupted_chain_is_not_copied() -> None:
    calls = 0

    class Interrupted:
        def score(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 20:
                raise KeyboardInterrupt
            return -x

    x0 = torch.zeros(1, 1, 4, 4)
    chain = ps.langevin(
        Interrupted(), x0, sigma=1.0, steps=40, burn_in=0, step_size=0.1, progress=False,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert chain.samples is not None
    assert len(chain.samples) == chain.draws == 18
    # Memory for all 40 draws, of which the others were never touched.
    assert chain.samples.untyped_storage().nbytes() == 40 * x0.nbytes


def test_refusing_an_image_takes_less_memory_than_the_image() -> None:
    image = np.full((1000, 1000), np.nan, np.float32)
    tracemalloc.start()
    try:
        with pytest.raises(ps.InputError, match="1000000 NaN or infinite values of 1000000"):
            ps.denoise(image, 1.0)
        assert tracemalloc.get_traced_memory()[1] < image.nbytes
    finally:
        tracemalloc.stop()
