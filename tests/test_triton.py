"""The kernels for GPUs, through Triton's interpreter where there is no GPU.

Triton reads whether to interpret as it is first imported, so the cases run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from patchscore.priors.engines.triton import has_triton


@pytest.mark.skipif(not has_triton(), reason="Triton 3.3 or newer is not installed")
def test_cases():
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    cases = Path(__file__).with_name("triton_cases.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases)],
        env=os.environ | interpret,
        cwd=cases.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_needs_a_gpu(tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path / "gpu.csv")]) == 2
    assert "PyTorch finds no GPU" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
