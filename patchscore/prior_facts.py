"""What a prior is and how it was trained, in words."""

from __future__ import annotations

from collections.abc import Iterator

from patchscore.adaptation.surprise import KEY as SURPRISE_KEY
from patchscore.priors.prior import PatchPrior


def prior_facts(prior: PatchPrior, name: str) -> Iterator[tuple[str, str]]:
    """A title and a text for each line."""
    network, card = prior.network, prior.card
    rows, columns = network.patch_shape
    parameters = sum(p.numel() for p in network.parameters())
    kinds = (("amplitude", prior.scale_invariant), ("brightness", network.brightness_invariant))
    yield "prior", card.get("name", name)
    yield "network", f"{type(network).__name__}, {parameters:,} parameters"
    yield "sees", f"patches of {rows} x {columns} pixels, {network.channels} channel(s)"
    yield "assembly", f"{prior.assembly}, boundary {prior.boundary}"
    yield "invariant to", ", ".join(kind for kind, true in kinds if true) or "nothing"
    if run := card.get("training"):
        in_bytes = "0..1" in card.get("data", "")
        low, high = ((255 if in_bytes else 1) * level for level in run["sigmas"])
        unit = "of 255" if in_bytes else "in the unit of its training images"
        yield "noise levels", f"{low:.4g} to {high:.4g} {unit}"
        length = f"{run['steps']:,} steps in {run['seconds'] / 60:.0f} minutes"
        yield "trained", f"{card['trained']}: {length} on {run['images']} images, {run['objective']}"
    if stages := card.get("stages"):
        total = sum(stage["steps"] for stage in stages)
        yield "", f"{total:,} steps in all, in {len(stages)} stages of which this was the last"
    for title in ("data", "terms"):
        if title in card:
            yield title, card[title]
    for entry in card.get("adapted", []):
        gain = f"estimated gain {100 * entry['gain']:.1f} +- {100 * entry['error']:.1f} % of the error"
        yield "adapted", f"{entry['date']}: to {entry['images']} noisy image(s), {gain}"
    known = SURPRISE_KEY in card
    yield "surprise", "can be computed" if known else "not available (see patchscore.expect)"
