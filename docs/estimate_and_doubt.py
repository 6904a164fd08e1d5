"""The figure of the README: python docs/estimate_and_doubt.py (half a minute on one core)."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from skimage.data import camera

import patchscore as ps

sigma = 25
clean = camera()[40:200, 150:310].astype(float)
noisy = clean + sigma * np.random.default_rng(0).standard_normal(clean.shape)
estimate, std = ps.denoise(noisy, sigma, prior="natural-gray-fast", return_std=True)

figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
error = np.abs(estimate - clean)
for ax, image, title in zip(axes, (noisy, estimate), ("noisy", "estimate"), strict=False):
    ax.imshow(image, cmap="gray", vmin=0, vmax=255)
    ax.set_title(title)
for ax, image, title in zip(axes[2:], (std, error), ("posterior std", "error"), strict=True):
    drawn = ax.imshow(image, cmap="magma", vmin=0, vmax=25)
    ax.set_title(title)
figure.colorbar(drawn, ax=axes, label="of 255", shrink=0.85)
for ax in axes:
    ax.set_axis_off()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=75)
