"""Operators of other libraries as operators of images: A and A' between tensors (B, ...).

    SciPy, PyLops      A and A' of flat vectors, one at a time        matvec, rmatvec
    SigPy              A and A' of arrays, one at a time              linop(x), linop.H(y)

None of these libraries is imported here: what counts is what an object has. An image is real or complex
as A' y is. Between real images and complex measurements, with <a, b> = Re sum conj(a) b, the adjoint of
x -> A x is the real part of A^H y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from patchscore.errors import InputError
from patchscore.protocols import Operator

Apply = Callable[[Tensor], Tensor]
ApplyArray = Callable[[np.ndarray], np.ndarray]
Shape = tuple[int, ...]


def as_operator(
    operator: Any,
    *,
    x_shape: Sequence[int] | None = None,
    y_shape: Sequence[int] | None = None,
    real_image: bool = False,
) -> Operator:
    """An operator with ``A(x)`` and ``A_adjoint(y)`` on tensors, from what other libraries offer.

    Parameters
    ----------
    operator
        One of

        - anything with ``A`` and ``A_adjoint``, such as the physics of deepinv: used as it is;
        - a pair of functions (A, A_adjoint) of tensors with a batch axis;
        - a ``LinearOperator`` of SciPy or PyLops, or a matrix of NumPy or SciPy, of flat vectors;
        - a linear operator of SigPy.

    x_shape
        The shape of one image, (H, W) or (C, H, W). Needed for flat vectors, unless the operator has
        ``dims`` of an image, as in PyLops.
    y_shape
        The shape of one measurement. By default that of the operator: ``dimsd``, ``oshape`` or (m,).
    real_image
        Whether the image is real although A' y is complex, as for the Fourier transform of a real image.
        A' is then the real part.

    Raises
    ------
    InputError
        If it is none of these, or a shape is missing or does not fit.

    Notes
    -----
    Operators of SciPy, PyLops and SigPy work on NumPy arrays, image by image: tensors are copied to the
    CPU and back, and autograd does not see through them.
    """
    adapted = _adapted(operator, x_shape, y_shape)
    return _RealImage(adapted) if real_image else adapted


def _adapted(operator: Any, x_shape: Sequence[int] | None, y_shape: Sequence[int] | None) -> Operator:
    if _has(operator, "A", "A_adjoint"):
        return cast(Operator, operator)
    if isinstance(operator, tuple | list) and len(operator) == 2 and all(map(callable, operator)):
        return _Pair(*operator)
    if _has(operator, "ishape", "oshape", "H"):
        ishape, oshape = tuple(operator.ishape), tuple(operator.oshape)
        return _Arrays(
            lambda x: operator(x.reshape(ishape)),
            lambda y: operator.H(y.reshape(oshape)),
            *_shapes(ishape, oshape, x_shape, y_shape),
        )
    if isinstance(operator, np.ndarray) and operator.ndim != 2:
        raise InputError(f"the operator is an array of shape {operator.shape}; expected a matrix.")
    if isinstance(operator, np.ndarray) or _has(operator, "tocsr"):
        from scipy.sparse.linalg import aslinearoperator

        operator = aslinearoperator(operator)
    if _has(operator, "matvec", "rmatvec", "shape"):
        m, n = operator.shape
        ishape, oshape = getattr(operator, "dims", (n,)), getattr(operator, "dimsd", (m,))
        is_complex = np.dtype(operator.dtype).kind == "c"
        return _Arrays(
            _linear(lambda x: operator.matvec(x.ravel()), is_complex),
            _linear(lambda y: operator.rmatvec(y.ravel()), is_complex),
            *_shapes(tuple(map(int, ishape)), tuple(map(int, oshape)), x_shape, y_shape),
        )
    raise InputError(
        f"the operator is of type {type(operator).__name__}; expected an object with A(x) and "
        "A_adjoint(y), a pair of functions (A, A_adjoint), or a linear operator of SciPy, PyLops or "
        "SigPy."
    )


def _has(operator: Any, *names: str) -> bool:
    return all(hasattr(operator, name) for name in names)


def _shapes(
    ishape: Shape, oshape: Shape, x_shape: Sequence[int] | None, y_shape: Sequence[int] | None
) -> tuple[Shape, Shape]:
    """The shapes (C, H, W) of an image and (...) of a measurement; an error if they do not fit."""
    x, y = tuple(x_shape or ishape), tuple(y_shape or oshape)
    if len(x) not in (2, 3):
        raise InputError(
            f"the operator takes arrays of shape {ishape}, which does not say how the image lies in "
            "them; give x_shape=(H, W) or (C, H, W)."
        )
    for name, shape, known in (("x_shape", x, ishape), ("y_shape", y, oshape)):
        if math.prod(shape) != math.prod(known):
            raise InputError(
                f"{name} is {shape}, {math.prod(shape)} numbers, but the operator has "
                f"{math.prod(known)}, shape {known}; give the shape of one image, without the batch."
            )
    return (x if len(x) == 3 else (1, *x)), y


def _linear(apply: ApplyArray, is_complex: bool) -> ApplyArray:
    """A real operator on the real and on the imaginary part, as some libraries drop the latter."""

    def by_parts(a: np.ndarray) -> np.ndarray:
        return apply(a.real) + 1j * apply(a.imag) if np.iscomplexobj(a) else apply(a)

    return apply if is_complex else by_parts


class _Pair(NamedTuple):
    """A and A' are two functions of tensors."""

    A: Apply
    A_adjoint: Apply


class _RealImage:
    """An operator with complex A' y, for real images."""

    def __init__(self, operator: Operator) -> None:
        self.A = operator.A
        self.operator = operator

    def A_adjoint(self, y: Tensor) -> Tensor:
        """The real part of A^H y."""
        return self.operator.A_adjoint(y).real


class _Arrays:
    """A and A' are functions of one array, and give arrays with the right number of values."""

    def __init__(self, forward: ApplyArray, adjoint: ApplyArray, x_shape: Shape, y_shape: Shape) -> None:
        self.forward, self.adjoint = forward, adjoint
        self.x_shape, self.y_shape = x_shape, y_shape

    def A(self, x: Tensor) -> Tensor:
        """A x: (B, C, H, W) -> (B, ...)."""
        return _each(self.forward, x, self.x_shape, self.y_shape, "an image")

    def A_adjoint(self, y: Tensor) -> Tensor:
        """A' y: (B, ...) -> (B, C, H, W)."""
        return _each(self.adjoint, y, self.y_shape, self.x_shape, "a measurement")


def _each(apply: ApplyArray, values: Tensor, taken: Shape, given: Shape, name: str) -> Tensor:
    """A function of arrays on each of a batch, in the precision of the batch."""
    if values.shape[1:] != taken:
        raise InputError(
            f"{name} has shape {tuple(values.shape)}; the operator takes {('B', *taken)}, where B is "
            "the number in the batch. as_operator(..., x_shape=, y_shape=) says how they lie."
        )
    arrays = values.cpu().resolve_conj().resolve_neg().numpy()
    try:
        results = torch.from_numpy(np.stack([np.reshape(apply(array), given) for array in arrays]))
    except NotImplementedError as error:
        raise InputError("the operator has no adjoint; give its LinearOperator an rmatvec.") from error
    dtype = values.dtype.to_complex() if results.is_complex() else values.dtype.to_real()
    return results.to(values.device, dtype)
