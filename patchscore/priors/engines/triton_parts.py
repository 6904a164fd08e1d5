"""What the kernels of :mod:`patchscore.priors.engines.triton_kernels` are made of.

A program works on BLOCK places of a grid, BLOCK / SPAN lines of SPAN columns; a line is a row of one of
the images of a batch. Its products are (BLOCK, inputs) x (inputs, outputs), and every side of a tensor
is a power of two: weights are padded with zeros, which add nothing.
"""

import os

import triton
import triton.language as tl

# The interpreter truncates to bfloat16, and multiplies as if these were integers. So there operands are
# rounded to nearest here and multiplied in float32, in which products of two bfloat16 are exact.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def operand(values, BF16: tl.constexpr):
    """Values as a product takes them."""
    if BF16:
        if INTERPRETED:
            bits = values.to(tl.float32).to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            values = bits.to(tl.float32, bitcast=True)
        else:
            values = values.to(tl.bfloat16)
    return values


@triton.jit
def gelu(h):
    """h Phi(h) and its derivative Phi(h) + h N(h; 0, 1)."""
    cumulative = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    return h * cumulative, cumulative + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)


@triton.jit
def places(lines, rows, columns, first, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """Where a program works: line (from ``first``), image, row, column, and which places exist."""
    segments = tl.cdiv(columns, SPAN)
    m = tl.arange(0, BLOCK)
    line = tl.program_id(0) // segments * (BLOCK // SPAN) + m // SPAN
    column = tl.program_id(0) % segments * SPAN + m % SPAN
    return (
        line,
        (line + first) // rows,
        (line + first) % rows,
        column,
        (line < lines) & (column < columns),
    )


@triton.jit
def rim_weights(row, column, last_row, last_column, HALVES: tl.constexpr):
    """w_c: cliques centred on the rim of a mirrored image count half, or a quarter in a corner."""
    weight = row * 0.0 + 1.0
    if HALVES:
        weight = tl.where((row == 0) | (row == last_row), 0.5, weight)
        weight = tl.where((column == 0) | (column == last_column), 0.5 * weight, weight)
    return weight


@triton.jit
def pixels(cut, k, SIDE: tl.constexpr, PIXELS: tl.constexpr):
    """Pixels k of patches; ``cut`` is (image, corners, which exist, strides of channels and of rows)."""
    image, corner, ok, plane, stride = cut
    offset = k // (SIDE * SIDE) * plane + k // SIDE % SIDE * stride + k % SIDE
    inside = ok[:, None] & (k < PIXELS)[None, :]
    return tl.load(image + corner[:, None] + offset[None, :], mask=inside, other=0.0)


@triton.jit
def patch_means(
    cut,
    SIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """The mean of every patch: without it a bright image would lose its detail in bfloat16."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PADDED, PART):
        k = start + tl.arange(0, PART)
        total += tl.sum(pixels(cut, k, SIDE, PIXELS), 1)
    return total / PIXELS


@triton.jit
def first_layer(
    cut,
    inverse,
    layer,
    SIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h_1 = W_1 (v - m) / sigma + (W_1 1) m / sigma + b_1, PART pixels of the patch at a time."""
    weights, row_sums, bias = layer
    n = tl.arange(0, WIDTH)
    mean = patch_means(cut, SIDE, PIXELS, PADDED, BLOCK, PART)
    h = tl.load(bias + n)[None, :] + (mean * inverse)[:, None] * tl.load(row_sums + n)[None, :]
    for start in range(0, PADDED, PART):
        k = start + tl.arange(0, PART)
        v = pixels(cut, k, SIDE, PIXELS)
        w = operand(tl.load(weights + n[:, None] * PADDED + k[None, :]), BF16)
        u = operand((v - mean[:, None]) * inverse[:, None], BF16)
        h = tl.dot(u, tl.trans(w), h, input_precision=PRECISION)
    return h


@triton.jit
def skewed_sum(
    main,
    tail,
    force,
    k,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    LINES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what pixels k of the patches put into the same pixel of a row: sum_j force[i - j, (row, j)].

    ``main`` are the pixels i of the span, ``tail`` the SIDE - 1 beyond its end; a row of a patch, of one
    of its channels, is a column of both.
    """
    m = tl.arange(0, BLOCK)
    i = (m % SPAN)[:, None]
    j = (k % SIDE)[None, :]
    source = m[:, None] - i + ((i - j) & (SPAN - 1))
    shifted = tl.gather(force, source, 0)
    choose = ((k // SIDE)[:, None] == tl.arange(0, LINES)[None, :]).to(tl.float32)
    main = tl.dot(tl.where(i >= j, shifted, 0.0), choose, main, input_precision=PRECISION)
    tail = tl.dot(tl.where(i < j, shifted, 0.0), choose, tail, input_precision=PRECISION)
    return main, tail


@triton.jit
def first_adjoint(
    force,
    scale,
    weights,
    SIDE: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    PART: tl.constexpr,
    LINES: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_1' force, summed along rows, PART pixels of the patch at a time."""
    n = tl.arange(0, WIDTH)
    main = tl.zeros((BLOCK, LINES), tl.float32)
    tail = tl.zeros((BLOCK, LINES), tl.float32)
    for start in range(0, PADDED, PART):
        k = start + tl.arange(0, PART)
        w = operand(tl.load(weights + n[:, None] * PADDED + k[None, :]), BF16)
        part = tl.dot(force, w, input_precision=PRECISION) * scale[:, None]
        main, tail = skewed_sum(main, tail, part, k, SIDE, BLOCK, SPAN, LINES, PRECISION)
    return main, tail


@triton.jit
def store_sums(
    sums,
    main,
    tail,
    line,
    lines,
    columns,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    LINES: tl.constexpr,
):
    """Put the sums of a program where :func:`fold` finds them."""
    segments = tl.cdiv(columns, SPAN)
    r = tl.arange(0, LINES)[None, :]
    i = (tl.arange(0, BLOCK) % SPAN)[:, None]
    span = (r * lines + line[:, None]) * segments + tl.program_id(0) % segments
    target = sums + span * (SPAN + SIDE - 1) + i
    there = (r < CHANNELS * SIDE) & (line < lines)[:, None]
    tl.store(target, main, mask=there)
    tl.store(target + SPAN, tail, mask=there & (i < SIDE - 1))
