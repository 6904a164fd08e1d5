"""From a measurement to images: posteriors, estimates, samples, and how far they can be trusted.

A sampler of your own is a function ``step(state, generator) -> state``; see :func:`run`.
"""

from patchscore.inference.chain import Chain
from patchscore.inference.sampling import State, Step, run

__all__ = ["Chain", "State", "Step", "run"]
