"""What a training run leaves behind, to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patchscore.figures import as_html, counted, loss_axes

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
        return loss_axes(self.loss, self.learning_rate, ax)

    def __repr__(self) -> str:
        last = f", last loss {self.loss[-1]:.4g}" if len(self.loss) else ""
        return f"History({counted(len(self.loss), 'step')}{last}, {self.seconds:.3g} s)"

    def _repr_html_(self) -> str:
        return as_html(self)
