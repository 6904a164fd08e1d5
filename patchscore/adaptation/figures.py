"""What a person wants to see of a surprise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from patchscore.adaptation.surprise import Surprise


def surprise_figure(found: Surprise) -> Figure:
    """The noisy image and the map beside it, on both a line where the map passes its 95 % mark."""
    import matplotlib.pyplot as plt

    height, width = found.map.shape
    panel = 4.2 * float(np.clip(height / width, 0.3, 2))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, panel + 0.9), layout="constrained")
    low, high = np.quantile(found.y, (0.005, 0.995))
    left.imshow(found.y, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    top = max(2.0, float(found.map.max()))
    shown = right.imshow(found.map, cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
    if found.map.min() < 1 < found.map.max():
        left.contour(found.map, levels=[1], colors="C1", linewidths=1.2)
        right.contour(found.map, levels=[1], colors="white", linewidths=1.2)
    left.set_title("noisy image", fontsize=11)
    right.set_title("surprise of the window around a pixel", fontsize=11)
    for ax in (left, right):
        ax.set_axis_off()
    bar = figure.colorbar(shown, ax=right, shrink=0.9, aspect=30)
    bar.set_label("1: exceeded by 5 % of training windows")
    bar.ax.axhline(1, color="white", linewidth=1.2)
    figure.suptitle(
        f"image: surprise {found.value:.2f} (1: exceeded by 5 % of training images), "
        f"p = {found.p_value:.2g}",
        fontsize=11,
    )
    return figure
