"""What a training run leaves behind, to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class History(NamedTuple):
    """The course of a training run.

    Attributes
    ----------
    loss : (steps,) the objective at every step, on that step's crops and noise levels
    learning_rate : (steps,)
    seconds : wall-clock time, over all sittings if the run was resumed
    """

    loss: np.ndarray
    learning_rate: np.ndarray
    seconds: float

    def plot(self, ax: Axes | None = None) -> Axes:
        """The loss, step by step and as a running mean, beside the learning rate."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(7, 4), layout="constrained")
        steps = np.arange(1, len(self.loss) + 1)
        window = max(1, len(steps) // 50)
        smooth = np.convolve(self.loss, np.ones(window) / window, mode="valid")
        ax.plot(steps, self.loss, color="0.8", linewidth=0.6, label="each step")
        ax.plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window} steps")
        # The first steps are far above the rest and would flatten it.
        low, high = np.percentile(self.loss, [0, 98])
        margin = 0.1 * (high - low) + 1e-12
        ax.set(xlabel="step", ylabel="loss", ylim=(low - margin, high + margin))
        rate = ax.twinx()
        rate.plot(steps, self.learning_rate, color="C1", linewidth=1, linestyle="--")
        rate.set_ylabel("learning rate", color="C1")
        rate.set_ylim(bottom=0)
        ax.legend(loc="upper right")
        return ax
