"""Operators of SciPy, PyLops, SigPy, deepinv and pairs of functions, against dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

import patchscore as ps

SHAPE = 6, 8
PIXELS = math.prod(SHAPE)


def matrix(rows: int = 30, *, imaginary: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    real, other = rng.standard_normal((2, rows, PIXELS))
    return real + 1j * imaginary * other if imaginary else real


def pair() -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    M = torch.from_numpy(matrix())

    def adjoint(y: Tensor) -> Tensor:
        return (y @ M.to(y.dtype)).view(-1, 1, *SHAPE)

    return lambda x: x.flatten(1) @ M.T.to(x.dtype), adjoint


def fourier(real: bool) -> object:
    pylops = pytest.importorskip("pylops")
    return pylops.signalprocessing.FFT2D(SHAPE, real=real, norm="ortho")


def pylops_blur() -> object:
    pylops = pytest.importorskip("pylops")
    return pylops.signalprocessing.Convolve2D(SHAPE, np.arange(6.0).reshape(2, 3), offset=(0, 1))


def sigpy_coils() -> object:
    """Coils, then every second row of the Fourier transform."""
    linop = pytest.importorskip("sigpy").linop
    coils = np.exp(1j * np.arange(3 * PIXELS)).reshape(3, *SHAPE)
    multiply = linop.Multiply(SHAPE, coils)
    centred = linop.FFT((3, *SHAPE), axes=(-2, -1))
    return linop.Slice(centred.oshape, (slice(None), slice(0, None, 2))) * centred * multiply


FLAT = {"x_shape": SHAPE}
OPERATORS: dict[str, tuple[Callable[[], object], dict]] = {
    "functions": (pair, {}),
    "array": (matrix, FLAT),
    "sparse": (lambda: scipy.sparse.random(30, PIXELS, 0.2, random_state=0), FLAT),
    "SciPy": (lambda: aslinearoperator(matrix()), {**FLAT, "y_shape": (5, 6)}),
    "SciPy, complex": (lambda: aslinearoperator(matrix(imaginary=1.0)), FLAT),
    "SciPy, two channels": (lambda: aslinearoperator(matrix()), {"x_shape": (2, 6, 4)}),
    "PyLops": (pylops_blur, {}),
    "PyLops, complex": (lambda: fourier(False), {}),
    "SigPy": (sigpy_coils, {}),
}
COMPLEX = {name for name in OPERATORS if "complex" in name or name == "SigPy"}


@pytest.fixture(params=OPERATORS)
def case(request: pytest.FixtureRequest) -> tuple[object, bool, dict]:
    make, options = OPERATORS[request.param]
    return make(), request.param in COMPLEX, options


def images(is_complex: bool, normal, options: dict, count: int = 2) -> Tensor:
    shape = options.get("x_shape", SHAPE)
    shape = (count, *((1,) if len(shape) == 2 else ()), *shape)
    return torch.complex(normal(*shape), normal(*shape, seed=9)) if is_complex else normal(*shape)


def by_the_library(operator: object, x: Tensor) -> np.ndarray:
    """A of one image, as the library itself has it."""
    a = x.numpy()
    if isinstance(operator, tuple):
        return operator[0](x[None])[0].numpy()
    if hasattr(operator, "ishape"):
        return operator(a.reshape(operator.ishape))
    return operator @ a.ravel()


def inner(a: Tensor, b: Tensor) -> float:
    return (a.conj() * b).real.sum().item()


@pytest.mark.parametrize("complex_images", [False, True])
def test_an_operator_is_that_of_its_library_with_its_adjoint(case, complex_images, normal) -> None:
    """<A u, v> = <u, A' v>: A is linear, so the mismatch is rounding alone."""
    operator, is_complex, options = case
    real_image = is_complex and not complex_images
    adapted = ps.as_operator(operator, **options, real_image=real_image)
    u = images(complex_images, normal, options)
    forward = adapted.A(u)
    expected = np.stack([by_the_library(operator, x).ravel() for x in u])
    assert forward.shape == (2, *options.get("y_shape", forward.shape[1:]))
    assert np.abs(forward.flatten(1).numpy() - expected).max() < 1e-10 * np.abs(expected).max()
    v = forward.flip(0) + forward.roll(1, -1)
    back = adapted.A_adjoint(v)
    assert back.shape == u.shape
    assert back.is_complex() == complex_images
    assert abs(inner(forward, v) - inner(u, back)) < 1e-10 * (forward.norm() * v.norm()).item()


def test_the_adjoint_of_a_half_spectrum(normal) -> None:
    adapted = ps.as_operator(fourier(True))
    u = images(False, normal, {})
    v = adapted.A(u.flip(0))
    assert v.is_complex()
    forward = inner(adapted.A(u), v)
    # PyLops counts the halved frequencies twice in its forward, so that <a, b> = Re sum conj(a) b.
    assert forward == pytest.approx(inner(u, adapted.A_adjoint(v).real), rel=1e-10)


def test_the_precision_is_that_of_the_tensor(case, normal) -> None:
    operator, is_complex, options = case
    adapted = ps.as_operator(operator, **options)
    y = adapted.A(images(False, normal, options).float())
    assert y.dtype == (torch.complex64 if is_complex else torch.float32)
    assert adapted.A_adjoint(y).dtype == y.dtype
    conjugated = adapted.A_adjoint(y.conj())  # a lazy conjugate has no array of its own
    assert torch.equal(conjugated, adapted.A_adjoint(y.conj().resolve_conj()))


def test_it_makes_a_likelihood(normal, error) -> None:
    M = torch.from_numpy(matrix())
    operator = ps.as_operator(aslinearoperator(M.numpy()), x_shape=SHAPE, y_shape=(5, 6))
    y, z = normal(1, 5, 6), normal(2, 1, *SHAPE)
    left = M.T @ M / 0.3**2 + 0.7 * torch.eye(PIXELS).double()
    right = y.flatten() @ M / 0.3**2 + 0.7 * z.flatten(1)
    found = ps.GaussianLikelihood(y, operator, 0.3).proximal(z, 0.7, tolerance=1e-13)
    assert error(found.flatten(1), torch.linalg.solve(left, right.T).T) < 1e-10


def test_a_likelihood_takes_operators_that_know_their_shapes(normal) -> None:
    coils = sigpy_coils()
    y = torch.complex(normal(1, 3, 3, 8), normal(1, 3, 3, 8, seed=1))
    assert ps.GaussianLikelihood(y, coils, 0.3).back_projection.shape == (1, 1, *SHAPE)
    with pytest.raises(ps.InputError, match=r"give x_shape=\(H, W\)"):
        ps.GaussianLikelihood(normal(1, 5, 6), aslinearoperator(matrix()), 0.3)


def test_physics_are_used_as_they_are() -> None:
    identity = ps.Identity()
    assert ps.as_operator(identity) is identity


def physics(name: str) -> object:
    deepinv = pytest.importorskip("deepinv").physics
    kernel = deepinv.blur.gaussian_blur(sigma=(1.0, 1.5))
    mask = torch.arange(24).remainder(3).eq(0).float()[:, None].expand(24, 24)
    return {
        "blur": lambda: deepinv.Blur(filter=kernel, padding="reflect"),
        "super-resolution": lambda: deepinv.Downsampling(img_size=(1, 24, 24), factor=2),
        "inpainting": lambda: deepinv.Inpainting(img_size=(1, 24, 24), mask=0.5),
        "CT": lambda: deepinv.Tomography(img_width=24, angles=12, normalize=False),
        "MRI": lambda: deepinv.MRI(img_size=(2, 24, 24), mask=mask),
        "coils": lambda: deepinv.MultiCoilMRI(img_size=(2, 24, 24), mask=mask, coil_maps=3),
    }[name]()


@pytest.mark.filterwarnings("default")  # of deepinv itself
@pytest.mark.parametrize("name", ["blur", "super-resolution", "inpainting", "CT", "MRI", "coils"])
def test_physics_of_deepinv_pass_the_check_and_are_solved(name: str, normal) -> None:
    """In float32, which most of them need: the gradient falls to the tolerance."""
    operator = physics(name)
    truth, z = normal(2, 1 + (name in ("MRI", "coils")), 24, 24).float(), 0.0
    likelihood = ps.GaussianLikelihood(operator.A(truth), operator, 0.5)
    assert likelihood.operator is operator
    z = torch.zeros_like(truth)
    point = likelihood.proximal(z, 1.0, tolerance=1e-4)
    assert (likelihood.score(point) - point).norm() < 2e-4 * likelihood.score(z).norm()


class Forward(LinearOperator):
    """Without an adjoint."""

    def __init__(self) -> None:
        super().__init__(np.float64, (30, PIXELS))

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return np.zeros(30)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda: ps.as_operator("radon"), r"of type str; expected an object with A\(x\)"),
        (lambda: ps.as_operator((abs, 3)), "of type tuple"),
        (lambda: ps.as_operator(matrix()), r"shape \(48,\).*give x_shape=\(H, W\)"),
        (lambda: ps.as_operator(matrix(), x_shape=(2, 1, *SHAPE)), r"give x_shape=\(H, W\)"),
        (lambda: ps.as_operator(matrix(), x_shape=(8, 8)), "64 numbers, but the operator has 48"),
        (lambda: ps.as_operator(matrix(), **FLAT, y_shape=(2, 30)), "60 numbers.* has 30"),
        (
            lambda: ps.as_operator(matrix(), **FLAT).A(torch.zeros(*SHAPE)),
            r"an image has shape \(6, 8\); the operator takes \('B', 1, 6, 8\)",
        ),
        (
            lambda: ps.as_operator(Forward(), **FLAT).A_adjoint(torch.zeros(1, 30)),
            "no adjoint; give its LinearOperator an rmatvec",
        ),
    ],
)
def test_what_does_not_fit_is_told(use: Callable[[], object], words: str) -> None:
    with pytest.raises(ps.InputError, match=words):
        use()
