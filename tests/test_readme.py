"""The examples of the README run as pasted, and it is short enough to be read."""

import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from patchscore import bundled_priors, load_prior

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_an_example_runs_as_pasted(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    names: dict[str, object] = {}
    exec(BLOCKS[number], names)
    clean = names.get("clean")
    assert clean is None or np.isfinite(clean).all()


def test_the_readme_has_its_examples_and_two_commands() -> None:
    assert BLOCKS
    commands = re.findall(r"^pip install -c constraints\.txt .*$", README, flags=re.MULTILINE)
    assert [command.split("&&")[1].strip() for command in commands] == ["patchscore demo", "pytest"]


def test_the_readme_has_at_most_1500_words() -> None:
    assert len(README.split()) <= 1500


def test_links_are_absolute_and_point_to_files() -> None:
    """A package index shows the README away from the repository."""
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 5
    own = (
        r"https://(?:github|raw\.githubusercontent)\.com/patchscore/patchscore/(?:blob/|tree/)?main/(.+)"
    )
    for link in links:
        assert link.startswith("https://")
        inside = re.fullmatch(own, link)
        assert inside is None or (ROOT / inside[1]).exists(), link


@pytest.mark.parametrize("name", bundled_priors())
def test_a_model_card_counts_the_parameters(name: str) -> None:
    prior = load_prior(name, "cpu")
    count = sum(parameter.numel() for parameter in prior.parameters())
    weights = ROOT / "patchscore" / "priors" / "weights"
    assert f"{count:,}".replace(",", " ") in (weights / f"{name}.md").read_text(encoding="utf-8")
