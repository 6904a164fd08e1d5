"""Every notebook runs from top to bottom in a fresh kernel, in its short mode, and has its figures."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHSCORE_SHORT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in conftest.py: the kernel is a process of its own
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_figures(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    drawn = [
        output
        for cell in cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    plotting = [cell for cell in cells if cell.cell_type == "code" and "plt.subplots" in cell.source]
    assert len(drawn) >= len(plotting) > 0
