"""What a person wants to see of a solution and of a chain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from patchscore.inference.chain import Chain
    from patchscore.inference.optimize import Solution

WIDTH = 4.0  # of a large panel, in inches
SAMPLES = 4


def solution_figure(solution: Solution) -> Figure:
    """The estimate of the first image, the objective (with a potential) and the residual.

    The objective is shown as its rise since the first step of each noise level: log p_sigma is known up
    to a constant that depends on sigma.
    """
    import matplotlib.pyplot as plt

    image = _first(solution.x)
    objective, residual = solution.objective[:, 0], solution.residual[:, 0]
    steps = np.arange(len(residual))
    starts = np.flatnonzero(np.diff(solution.sigmas, prepend=np.nan))
    rows = ["objective", "residual"] if np.isfinite(objective).any() else ["residual"]
    height = max(_height(image), 3.2)
    figure, axes = plt.subplot_mosaic(
        [["estimate", row] for row in rows],
        figsize=(2.4 * WIDTH, height + 0.6),
        layout="constrained",
        width_ratios=(1, 1.2),
    )
    _show(axes["estimate"], image, (image.min(), image.max()), _title("estimate", solution.x))
    below = axes["residual"]
    below.plot(steps, np.where(residual > 0, residual, np.nan), color="C0")
    below.set(xlabel="step", ylabel="residual", yscale="log")
    if "objective" in rows:
        above = axes["objective"]
        for stretch in np.split(steps, starts[1:]):
            rise = objective[stretch] - objective[stretch[0]]
            above.plot(stretch, rise, color="C0", marker="." if len(stretch) == 1 else None)
        above.set_ylabel(r"rise of $\log\,p$")
        above.sharex(below)
        above.tick_params(labelbottom=False)
    if len(starts) > 1:
        level = below.twinx()
        level.step(steps, solution.sigmas, where="post", color="C1", linewidth=1, linestyle="--")
        level.set_ylabel("noise level", color="C1")
        level.set_ylim(bottom=0)
    figure.suptitle(f"{_cost(solution)}\n{solution.reason}", fontsize=11)
    return figure


def chain_figure(chain: Chain) -> Figure:
    """Mean, standard deviation and up to four samples of the first image.

    Mean and samples share one scale of intensity. Without any draws, where the chain stands.
    """
    import matplotlib.pyplot as plt

    mean, samples = _first(chain.mean if chain.draws else chain.state), _spread_out(chain)
    together = np.stack([mean, *samples.values()])
    scale = together.min(), together.max()
    panels = "A" if chain.draws < 2 else "AB"
    small = "cdef"[: len(samples)]
    right = small.ljust(4, ".") if samples else ""
    figure, axes = plt.subplot_mosaic(
        # Two rows and columns for a large panel, one for a sample.
        "\n".join("".join(2 * panel for panel in panels) + right[i : i + 2] for i in (0, 2)),
        figsize=(WIDTH * len(panels + right[:1]) + 0.6 * (len(panels) - 1), _height(mean) + 0.8),
        layout="constrained",
    )
    name = {0: "state, no draw yet", 1: "the only draw"}.get(chain.draws, "mean")
    _show(axes["A"], mean, scale, _title(name, chain.mean))
    if "B" in panels:
        # Of colours, one map: the root mean square over the channels.
        std = np.sqrt(np.square(_first(chain.std)).reshape(*mean.shape[:2], -1).mean(2))
        title = "standard deviation" + (", rms of the channels" if mean.ndim == 3 else "")
        shown = _show(axes["B"], std, (0, std.max() or 1), title, cmap="viridis")
        figure.colorbar(shown, ax=axes["B"], shrink=0.9, aspect=30)
    for panel, (k, sample) in zip(small, samples.items(), strict=True):
        _show(axes[panel], sample, scale, f"draw {k + 1}")
    accepted = f", {chain.acceptance[0]:.0%} accepted" if bool(chain.acceptance[0].isfinite()) else ""
    figure.suptitle(f"{_count(chain.draws, 'draw')}{accepted}, {_cost(chain)}", fontsize=11)
    return figure


def _show(ax: Axes, image: np.ndarray, scale: Any, title: str, cmap: str = "gray") -> Any:
    """An image on a scale; colours are put on it before they are shown."""
    low, high = scale
    if image.ndim == 3:
        image = (image - low) / ((high - low) or 1)
    ax.set_title(title, fontsize=11)
    ax.set_axis_off()
    return ax.imshow(image, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")


def _first(x: Tensor) -> np.ndarray:
    """The first image, (H, W), or (H, W, 3) of three channels."""
    image = x[0].detach().double().cpu().numpy()
    return np.moveaxis(image, 0, 2) if len(image) == 3 else image[0]


def _spread_out(chain: Chain) -> dict[int, np.ndarray]:
    """A few draws from the whole length of the chain, by their number."""
    if chain.samples is None or chain.draws < 2:
        return {}
    n = len(chain.samples)
    chosen = np.linspace(0, n - 1, min(n, SAMPLES)).round().astype(int)
    return {int(k): _first(chain.samples[k]) for k in chosen}


def _height(image: np.ndarray) -> float:
    """Of a large panel; long strips are kept within a page."""
    return WIDTH * float(np.clip(image.shape[0] / image.shape[1], 0.3, 2))


def _title(name: str, x: Tensor) -> str:
    return name if x.shape[1] in (1, 3) else f"{name}, channel 1 of {x.shape[1]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _cost(result: Chain | Solution) -> str:
    return f"{_count(result.evaluations, 'evaluation')} of the prior, {result.seconds:.3g} s"
