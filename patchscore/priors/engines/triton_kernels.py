"""The kernels of :mod:`patchscore.priors.engines.triton`, which says what they compute and why so."""

import triton
import triton.language as tl

from patchscore.priors.engines.triton_parts import (
    first_adjoint,
    first_layer,
    gelu,
    operand,
    patch_means,
    pixels,
    places,
    rim_weights,
    skewed_sum,
    store_sums,
)

HIDDEN = tl.constexpr(0)
FORCE = tl.constexpr(1)
CHAIN = tl.constexpr(2)
FOLD = tl.constexpr(3)


@triton.jit
def fold(
    sums,
    out,
    batch_stride,
    plane,
    stride,
    first,
    lines,
    rows,
    columns,
    height,
    width,
    first_out,
    SIDE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add, to one row of one channel of an image, the SIDE lines of sums that reach it, in order."""
    line = tl.program_id(0) + first_out
    image, y = line // height, line % height
    channel = tl.program_id(2)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    segments = tl.cdiv(columns, SPAN)
    segment, i = x // SPAN, x % SPAN
    target = out + image.to(tl.int64) * batch_stride + channel * plane + y * stride + x
    total = tl.load(target, mask=x < width, other=0.0)
    for dy in range(SIDE):
        row = y - dy
        source = image * rows + row - first
        if (row >= 0) & (row < rows) & (source >= 0) & (source < lines):
            span = ((channel * SIDE + dy) * lines + source) * segments + segment
            at = sums + span * (SPAN + SIDE - 1) + i
            total += tl.load(at, mask=(x < width) & (segment < segments), other=0.0)
            before = at - (SPAN + SIDE - 1) + SPAN
            there = (x < width) & (segment > 0) & (i < SIDE - 1)
            total += tl.load(before, mask=there, other=0.0)
    tl.store(target, total, mask=x < width)


@triton.jit
def last_layer(
    z,
    shift,
    weights,
    vectors,
    SHIFTED: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_D' (gelu'(h_D) * a), CHUNK units at a time; ``shift`` is times (W_D 1) in h_D."""
    bias, row_sums, readout = vectors
    inputs = tl.arange(0, INPUTS)
    force = tl.zeros((BLOCK, INPUTS), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        units = start + tl.arange(0, CHUNK)
        w = operand(tl.load(weights + units[:, None] * INPUTS + inputs[None, :]), BF16)
        h = tl.dot(z, tl.trans(w), input_precision=PRECISION) + tl.load(bias + units)[None, :]
        if SHIFTED:
            h += shift[:, None] * tl.load(row_sums + units)[None, :]
        _, slope = gelu(h)
        part = operand(tl.load(readout + units)[None, :] * slope, BF16)
        force = tl.dot(part, w, force, input_precision=PRECISION)
    return force


@triton.jit
def patch_forces(
    image,
    batch_stride,
    plane,
    stride,
    sigma,
    weights,
    row_sums,
    hidden,
    biases,
    readout,
    sums,
    first,
    lines,
    rows,
    columns,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    LINES: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """-w_c phi'(v / sigma) / sigma of a network on patches, summed along rows."""
    PIXELS: tl.constexpr = CHANNELS * SIDE * SIDE
    line, b, row, column, ok = places(lines, rows, columns, first, BLOCK, SPAN)
    corner = b.to(tl.int64) * batch_stride + row * stride + column
    cut = (image, corner, ok, plane, stride)
    inverse = 1.0 / tl.load(sigma + b, mask=ok, other=1.0)
    scale = -inverse * rim_weights(row, column, rows - 1, columns - 1, HALVES)
    scale = tl.where(ok, scale, 0.0)
    if DEPTH == 1:
        k = tl.arange(0, PADDED)
        mean = patch_means(cut, SIDE, PIXELS, PADDED, BLOCK, PADDED)
        u = operand((pixels(cut, k, SIDE, PIXELS) - mean[:, None]) * inverse[:, None], BF16)
        vectors = (biases, row_sums, readout)
        part = last_layer(
            u, mean * inverse, weights, vectors, True, PADDED, WIDTH, BLOCK, CHUNK, BF16, PRECISION
        )
        none = tl.zeros((BLOCK, LINES), tl.float32)
        main, tail = skewed_sum(
            none, none, part * scale[:, None], k, SIDE, BLOCK, SPAN, LINES, PRECISION
        )
    else:
        layer = (weights, row_sums, biases)
        h = first_layer(cut, inverse, layer, SIDE, PIXELS, PADDED, WIDTH, BLOCK, PART, BF16, PRECISION)
        z, slope = gelu(h)
        slope = operand(slope, BF16)
        if DEPTH == 3:
            n = tl.arange(0, WIDTH)
            square = n[:, None] * WIDTH + n[None, :]
            w = operand(tl.load(hidden + square), BF16)
            h = tl.dot(operand(z, BF16), tl.trans(w), input_precision=PRECISION)
            z, middle_slope = gelu(h + tl.load(biases + WIDTH + n)[None, :])
            middle_slope = operand(middle_slope, BF16)
        last = hidden + (DEPTH - 2) * WIDTH * WIDTH
        vectors = (biases + (DEPTH - 1) * WIDTH, row_sums, readout)
        z = operand(z, BF16)
        force = last_layer(z, inverse, last, vectors, False, WIDTH, WIDTH, BLOCK, CHUNK, BF16, PRECISION)
        if DEPTH == 3:
            w = operand(tl.load(hidden + square), BF16)
            force = tl.dot(operand(force * middle_slope, BF16), w, input_precision=PRECISION)
        force = operand(force * slope, BF16)
        main, tail = first_adjoint(
            force, scale, weights, SIDE, PADDED, WIDTH, BLOCK, SPAN, PART, LINES, BF16, PRECISION
        )
    store_sums(sums, main, tail, line, lines, columns, CHANNELS, SIDE, BLOCK, SPAN, LINES)


@triton.jit
def conv_first(
    image,
    batch_stride,
    plane,
    stride,
    sigma,
    weights,
    row_sums,
    bias,
    z_out,
    slope_out,
    lines,
    rows,
    columns,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    PART: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z_1 = gelu(h_1) and gelu'(h_1) at every place of a tile, channels last."""
    PIXELS: tl.constexpr = CHANNELS * SIDE * SIDE
    line, b, row, column, ok = places(lines, rows, columns, 0, BLOCK, SPAN)
    corner = b.to(tl.int64) * batch_stride + row * stride + column
    inverse = 1.0 / tl.load(sigma + b, mask=ok, other=1.0)
    cut = (image, corner, ok, plane, stride)
    layer = (weights, row_sums, bias)
    h = first_layer(cut, inverse, layer, SIDE, PIXELS, PADDED, WIDTH, BLOCK, PART, BF16, PRECISION)
    z, slope = gelu(h)
    at = (line * columns + column)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(z_out + at, operand(z, BF16).to(z_out.dtype.element_ty), mask=ok[:, None])
    tl.store(slope_out + at, operand(slope, BF16).to(slope_out.dtype.element_ty), mask=ok[:, None])


@triton.jit
def conv_next(
    source,
    source_rows,
    source_columns,
    weights,
    step,
    readout,
    bias,
    slope,
    out,
    sigma,
    lift,
    sums,
    lines,
    rows,
    columns,
    top,
    left,
    last_row,
    last_column,
    MODE: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
    LINES: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum_q W(q) source(p + step q), a product over q and CHUNK units of the source at a time; then

    HIDDEN  h = . + b: store gelu(h) and gelu'(h)
    FORCE   h = . + b: store w_c a gelu'(h), where a force starts
    CHAIN   store . gelu'(h_l), the force of the layer below
    FOLD    the same, times the adjoint of the first layer, summed along rows
    """
    line, b, row, column, ok = places(lines, rows, columns, 0, BLOCK, SPAN)
    n = tl.arange(0, WIDTH)
    units = tl.arange(0, CHUNK)
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    for t in range(TAPS * TAPS * (WIDTH // CHUNK)):
        tap = t // (WIDTH // CHUNK)
        y = row + step * (tap // TAPS)
        x = column + step * (tap % TAPS)
        inside = ok & (y >= 0) & (y < source_rows) & (x >= 0) & (x < source_columns)
        place = (b * source_rows + y) * source_columns + x
        k = t % (WIDTH // CHUNK) * CHUNK + units
        z = tl.load(source + place[:, None] * WIDTH + k[None, :], mask=inside[:, None], other=0.0)
        w = tl.load(weights + (tap * WIDTH + k)[:, None] * WIDTH + n[None, :])
        total = tl.dot(operand(z, BF16), operand(w, BF16), total, input_precision=PRECISION)

    at = (line * columns + column)[:, None] * WIDTH + n[None, :]
    if MODE == HIDDEN:
        z, dz = gelu(total + tl.load(bias + n)[None, :])
        tl.store(out + at, operand(z, BF16).to(out.dtype.element_ty), mask=ok[:, None])
        tl.store(slope + at, operand(dz, BF16).to(out.dtype.element_ty), mask=ok[:, None])
    elif MODE == FORCE:
        _, dz = gelu(total + tl.load(bias + n)[None, :])
        weight = rim_weights(row + top, column + left, last_row, last_column, HALVES)
        force = weight[:, None] * tl.load(readout + n)[None, :] * dz
        tl.store(out + at, operand(force, BF16).to(out.dtype.element_ty), mask=ok[:, None])
    else:
        total *= tl.load(slope + at, mask=ok[:, None], other=0.0).to(tl.float32)
        if MODE == CHAIN:
            tl.store(out + at, operand(total, BF16).to(out.dtype.element_ty), mask=ok[:, None])
        else:
            scale = tl.where(ok, -1.0 / tl.load(sigma + b, mask=ok, other=1.0), 0.0)
            force = operand(total, BF16)
            main, tail = first_adjoint(
                force, scale, lift, SIDE, PADDED, WIDTH, BLOCK, SPAN, PART, LINES, BF16, PRECISION
            )
            store_sums(sums, main, tail, line, lines, columns, CHANNELS, SIDE, BLOCK, SPAN, LINES)
