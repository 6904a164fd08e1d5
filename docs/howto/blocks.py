"""The figure of large.md: python docs/howto/blocks.py (seconds on one core)."""

from pathlib import Path

import dask.array as da
import matplotlib.pyplot as plt
import numpy as np
from skimage.data import camera

import patchscore as ps
from patchscore import stacks

SIDE, SIGMA = 64, 25
stacks.LEAST_SIDE = SIDE  # blocks as small as these would be merged
clean = camera()[40:232, 150:342].astype(float)
noisy = clean + SIGMA * np.random.default_rng(0).standard_normal(clean.shape)
whole = ps.denoise(noisy, SIGMA, prior="natural-gray-fast")
blocks = da.from_array(noisy, chunks=SIDE)
alone = blocks.map_blocks(ps.denoise, SIGMA, prior="natural-gray-fast").compute()
rims = ps.denoise(blocks, SIGMA, prior="natural-gray-fast").compute()

figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
for ax, image, title in zip(axes, (noisy, rims), ("noisy, 3 x 3 blocks", "estimate"), strict=False):
    ax.imshow(image, cmap="gray", vmin=0, vmax=255)
    ax.set_title(f"{title}\n")
for place in range(SIDE, len(clean), SIDE):
    axes[0].axhline(place - 0.5, color="orange")
    axes[0].axvline(place - 0.5, color="orange")
for ax, image, title in zip(
    axes[2:], (alone, rims), ("each block alone", "blocks with rims"), strict=True
):
    error = np.abs(image - whole)
    drawn = ax.imshow(error, cmap="magma", vmin=0, vmax=5)
    ax.set_title(f"{title}:\noff by at most {error.max():.2g}")
figure.colorbar(drawn, ax=axes, label="of 255", shrink=0.85)
for ax in axes:
    ax.set_axis_off()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=75)
