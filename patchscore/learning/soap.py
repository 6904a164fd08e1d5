"""Adam in the eigenbasis of Shampoo's preconditioner.

For a weight W of k axes with gradient G, and Q = (Q_1 .. Q_k) the eigenvectors of C = (C_1 .. C_k),

    C_i <- c C_i + (1 - c) G_(i) G_(i)'            G_(i): G unfolded along its i-th axis
    M   <- b_1 M + (1 - b_1) G
    V   <- b_2 V + (1 - b_2) (Q' G)^2              Q' G: G turned along every axis
    W   <- W - rate Q (Q' M^ / (V^^(1/2) + eps))   ^: divided by 1 - b^t

The pixels of a patch are strongly correlated, and so are the gradients of its filters. Adam scales every
coordinate separately and ignores correlation; here it runs in a basis without correlation. For the small
matrices of a patch network the extra cost is negligible.

Reference: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson and Kakade, "SOAP: Improving and
Stabilizing Shampoo using Adam", ICLR 2025, algorithm 3 (here with M kept unturned, and for k axes).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

STEPS_BETWEEN_BASES = 10


class SOAP(torch.optim.Optimizer):
    """The optimiser. Its state holds tensors only: step, moments, and C_i and Q_i for each axis.

    The first gradient initialises the basis and does not change the weights.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        correlation_beta: float = 0.98,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "correlation_beta": correlation_beta, "eps": eps}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        """One step on every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    _step(weight, weight.grad, self.state[weight], group)


def _step(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    axes = range(gradient.ndim)
    first = not state
    if first:
        state["step"] = torch.zeros(())
        state["mean"] = gradient.new_zeros(gradient.shape)
        state["square"] = gradient.new_zeros(gradient.shape)
        for i in axes:
            state[f"correlation_{i}"] = gradient.new_zeros(gradient.shape[i], gradient.shape[i])
    for i in axes:
        unfolded = gradient.movedim(i, 0).flatten(1) if gradient.ndim > 1 else gradient[:, None]
        state[f"correlation_{i}"].lerp_(unfolded @ unfolded.T, 1 - group["correlation_beta"])
    if first:
        for i in axes:
            state[f"basis_{i}"] = torch.linalg.eigh(state[f"correlation_{i}"])[1].flip(1).contiguous()
        return
    bases = [state[f"basis_{i}"] for i in axes]
    state["step"] += 1
    t = int(state["step"])
    b_1, b_2 = group["betas"]
    mean = state["mean"].lerp_(gradient, 1 - b_1) / (1 - b_1**t)
    square = state["square"].lerp_(_turned(gradient, bases).square(), 1 - b_2) / (1 - b_2**t)
    step = _turned(mean, bases) / (square.sqrt() + group["eps"])
    weight.sub_(_turned(step, [basis.T for basis in bases]), alpha=group["lr"])
    if t % STEPS_BETWEEN_BASES == 0:
        for i in axes:
            _renew_basis(state, i)


def _renew_basis(state: dict[str, Tensor], axis: int) -> None:
    """One step of orthogonal iteration, columns in falling order of their eigenvalues; V follows."""
    correlation, basis = state[f"correlation_{axis}"], state[f"basis_{axis}"]
    image = correlation @ basis
    order = (basis * image).sum(0).argsort(descending=True)
    state["square"] = state["square"].index_select(axis, order)
    # The memory order after a checkpoint: it changes how products are rounded.
    state[f"basis_{axis}"] = torch.linalg.qr(image[:, order])[0].contiguous()


def _turned(values: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """Q' X: every axis into its basis."""
    for basis in bases:  # the axis in front goes to the back each time
        values = torch.tensordot(values, basis, dims=([0], [0]))
    return values
