"""The state of a training run, in memory and on disk: everything that its next step depends on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchscore.errors import InputError
from patchscore.priors.trainable import ScoreNetwork, TrainedOn
from patchscore.storage import load_tensors, save_tensors

KIND = "patchscore training checkpoint"


class TrainingState:
    """Weights and their moving average, the optimiser, the generator, and the losses so far.

    ``settings`` identify the run: the checkpoint of a run with other settings is refused.
    """

    def __init__(
        self,
        network: ScoreNetwork,
        generator: torch.Generator,
        settings: dict[str, Any],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.network = network
        self.generator = generator
        self.settings = settings
        self.optimizer = optimizer(network.parameters())
        self.average = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.loss = torch.zeros(0, device=network.device)
        self.step = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()

    @property
    def total_steps(self) -> int:
        """How many steps the run has; 0 before :meth:`plan`."""
        return len(self.loss)

    @property
    def seconds(self) -> float:
        """Time spent on the run, including what came before an interruption."""
        return self._seconds_before + time.monotonic() - self._started

    def plan(self, total_steps: int) -> None:
        """Set the number of steps."""
        self.loss = self.loss.new_zeros(total_steps)

    def update(self, loss: Tensor, learning_rate: float, decay: float) -> None:
        """One step of the optimiser, then of the moving average."""
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)
        self.loss[self.step] = loss.detach()
        self.step += 1

    def keep_average(self, trained_on: TrainedOn) -> None:
        """Give the network the averaged weights."""
        self.network.load_state_dict(self.average, strict=False)  # buffers stay
        self.network.trained_on = trained_on

    def write(self, path: Path) -> None:
        """Save the state; an existing file is replaced only by a complete one."""
        tensors = {
            "loss": self.loss[: self.step],
            "generator": self.generator.get_state(),
            **{f"average/{name}": t for name, t in self.average.items()},
            **{f"weights/{name}": t for name, t in self.network.named_parameters()},
        }
        for (name, _), moments in zip(
            self.network.named_parameters(), self.optimizer.state_dict()["state"].values(), strict=True
        ):
            tensors |= {f"optimizer/{name}/{key}": value for key, value in moments.items()}
        progress = {
            "step": self.step,
            "total_steps": self.total_steps,
            "seconds": self.seconds,
            "settings": self.settings,
        }
        save_tensors(path, tensors, progress, kind=KIND)

    def read(self, path: Path) -> None:
        """Continue from a saved state.

        Raises
        ------
        InputError
            If the file is damaged, or belongs to a run with other settings, which are then named.
        """
        tensors, progress = load_tensors(path, kind=KIND)
        old, new = progress["settings"], self.settings
        different = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        if different:
            changes = ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in different)
            raise InputError(
                f"{path} is the checkpoint of another run ({changes}); continue with its settings, or "
                "choose another file for this run."
            )
        self.plan(progress["total_steps"])
        self.step = progress["step"]
        self._seconds_before = progress["seconds"]
        self.loss[: self.step] = tensors["loss"]
        self.generator.set_state(tensors["generator"])
        moments = {}
        with torch.no_grad():
            for number, (name, parameter) in enumerate(self.network.named_parameters()):
                parameter.copy_(tensors[f"weights/{name}"])
                self.average[name].copy_(tensors[f"average/{name}"])
                prefix = f"optimizer/{name}/"
                moments[number] = {
                    key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)
                }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
