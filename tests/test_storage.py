"""Prior files: what is saved comes back, and nothing else is taken for it."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import patchscore as ps
from patchscore.priors.zoo import WEIGHTS
from patchscore.storage import load_tensors, replacing, save_tensors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "prior.safetensors"
    network = ps.PatchEnergy(patch_size=3, width=16)
    torch.nn.init.normal_(network.readout)
    ps.PatchPrior(network, boundary="periodic", card={"data": "none"}).save(path)
    return path


def rewrite(path: Path, *, metadata: dict[str, str] | None = None, scale: float = 1.0) -> None:
    """Change a prior file behind the library's back, in the manner of its own format."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() | (metadata or {})
        tensors = {name: scale * file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, metadata=header)


@pytest.mark.parametrize(
    "network",
    [
        ps.PatchEnergy(patch_size=3, channels=3, width=16, depth=3, turn_invariant=False),
        ps.PatchMLP(patch_size=4, widths=(16, 8), tanh_layers=1, scale_invariant=False),
        ps.PatchEnergy(patch_size=3, width=16).double(),
    ],
    ids=["energy", "mlp", "float64"],
)
@pytest.mark.parametrize(("assembly", "trained_on"), [("sum", "crops"), ("mean", "patches")])
def test_a_saved_prior_comes_back_the_same(network, assembly, trained_on, tmp_path: Path) -> None:
    network.trained_on = trained_on
    prior = ps.PatchPrior(network, assembly=assembly, boundary="periodic", card={"data": ["a", 1]})
    prior.save(tmp_path / "prior.safetensors")
    again = ps.load_prior(tmp_path / "prior.safetensors", device="cpu")
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name
    assert again.network.settings() == network.settings()
    assert (again.assembly, again.boundary, again.card) == (assembly, "periodic", {"data": ["a", 1]})
    assert again.network.trained_on == trained_on
    network.trained_on = None


@pytest.mark.parametrize(
    ("name", "images"),
    [("natural-color", "bsd432"), ("natural-gray", "bsd400"), ("natural-gray-fast", "bsd400")],
)
def test_a_bundled_prior_is_small_and_has_its_card(name: str, images: str) -> None:
    assert name in ps.bundled_priors()
    prior = ps.load_prior(name, "cpu")
    assert prior.network.trained_on == "crops"
    assert prior.scale_invariant
    assert prior.network.brightness_invariant
    assert prior.card["name"] == name
    assert prior.card["training"]["steps"] > 0
    assert len((WEIGHTS / f"{name}.safetensors").read_bytes()) < 2e6
    assert images in (WEIGHTS / f"{name}.md").read_text()


def test_every_bundled_prior_is_tested_here() -> None:
    assert ps.bundled_priors() == ["natural-color", "natural-gray", "natural-gray-fast"]


def test_every_truncation_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 23, dtype=int):
        saved.write_bytes(whole[:length])
        with pytest.raises(ps.InputError, match="not a whole safetensors file"):
            ps.load_prior(saved)


def test_every_flipped_byte_of_the_weights_is_refused(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    for position in np.linspace(start, len(whole) - 1, 23, dtype=int):
        altered = whole.copy()
        altered[position] ^= 1
        saved.write_bytes(altered)
        with pytest.raises(ps.InputError, match="does not match its own checksum"):
            ps.load_prior(saved)


def test_altered_weights_and_settings_are_refused(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        settings = file.metadata()["settings"]
    rewrite(saved, metadata={"settings": settings.replace("periodic", "open")})
    with pytest.raises(ps.InputError, match="does not match its own checksum"):
        ps.load_prior(saved)
    rewrite(saved, metadata={"settings": settings}, scale=1.001)
    with pytest.raises(ps.InputError, match="does not match its own checksum"):
        ps.load_prior(saved)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, other)
    with pytest.raises(ps.InputError, match="is a safetensors file, but not a patchscore prior"):
        ps.load_prior(other)
    pickled = tmp_path / "pickled.pt"
    torch.save({"a": torch.ones(2)}, pickled)
    with pytest.raises(ps.InputError, match="not a whole safetensors file"):
        ps.load_prior(pickled)
    with pytest.raises(ps.InputError, match=r"no prior .*missing\.safetensors"):
        ps.load_prior(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": {"type": "PatchOracle"}}, "holds a PatchOracle; this version"),
        ({"network": {"type": "PatchEnergy", "patch_size": 3, "width": 16}}, "do not fit together"),
        ({}, "do not fit together"),
    ],
)
def test_files_that_are_whole_but_make_no_prior_are_refused(settings, message, tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    save_tensors(path, {"lift": torch.ones(2, 2)}, settings, kind="patchscore prior")
    with pytest.raises(ps.InputError, match=message):
        ps.load_prior(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved: Path) -> None:
    before = saved.read_bytes()

    def fail() -> None:
        with replacing(saved) as beside:
            beside.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_paths_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    prior = ps.PatchPrior(ps.PatchEnergy(patch_size=3, width=16))
    with pytest.raises(ps.InputError, match=r"there is no folder .*nowhere; create it first"):
        prior.save(tmp_path / "nowhere" / "prior.safetensors")
    with pytest.raises(ps.InputError, match="it is a folder"):
        prior.save(tmp_path)


def test_tensors_from_a_file_are_aligned_as_new_ones_are(tmp_path: Path) -> None:
    """The rounding of a product depends on that, so a run that goes on would else not be the same."""
    tensors = {f"{size}": torch.ones(size) for size in range(1, 40)}
    save_tensors(tmp_path / "file", tensors, {}, kind="numbers")
    loaded, _ = load_tensors(tmp_path / "file", kind="numbers")
    assert {tensor.data_ptr() % 64 for tensor in loaded.values()} == {0}
