"""What a person wants to see of a solution and of a chain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from patchscore.inference.chain import Chain
    from patchscore.inference.optimize import Solution


def solution_figure(solution: Solution) -> Figure:
    """The estimate of the first image, the objective (with a potential) and the residual."""
    raise NotImplementedError


def chain_figure(chain: Chain) -> Figure:
    """Mean, standard deviation and a few samples of the first image."""
    raise NotImplementedError
