"""The figure of photograph.md and microscope.md: python docs/howto/noise.py (seconds on one core)."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.data import camera, cell

import patchscore as ps

generator = np.random.default_rng(0)
photograph = camera()[40:232, 150:342].astype(float)
smooth = gaussian_filter(generator.standard_normal(photograph.shape), 0.8)
shot = photograph + 12 * smooth / smooth.std()
photons = 2 + 38 * (cell()[170:554:2, 90:474:2] / 255)
counts = generator.poisson(photons).astype(float)

figure, axes = plt.subplots(2, 4, figsize=(11, 6), layout="constrained")
for row, noisy, clean in zip(axes, (shot, counts), (photograph, photons), strict=True):
    noise = ps.estimate_noise(noisy)
    white = float(np.sqrt(np.square(noisy - clean).mean()))
    images = noisy, ps.denoise(noisy, white), ps.denoise(noisy), clean
    words = noise.describe(float(np.median(noisy)))
    titles = "noisy", "told its standard deviation", f"told nothing; found:\n{words}", "clean"
    for ax, image, title in zip(row, images, titles, strict=True):
        ax.imshow(image, cmap="gray", vmin=clean.min(), vmax=clean.max())
        error = np.sqrt(np.square(image - clean).mean())
        ax.set_title(title if image is clean else f"{title}\nerror {error:.2g}", fontsize=9)
        ax.set_axis_off()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=75)
