"""The programs that `sparse.triton` launches. Importing this module imports triton.

Tensors arrive as pointers; `name [shape]` in a docstring says to what. Strides are of rows, in
elements. A row number becomes int64 before it meets a stride, so that a table may have more than
2^31 elements. Limit: d stays below 65,535 tiles, 4 million columns and more.
"""

from typing import no_type_check  # Under pytest jaxtyping would wrap what Triton has to parse.

import triton
import triton.language as tl

# pyright: reportMissingImports=false


@triton.jit
@no_type_check
def _weighted_sum(
    table,
    stride,
    index,
    weights,
    start,
    end,
    columns,
    d,
    DTYPE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over start <= e < end of weights[e] * table[index[e], columns]."""
    # A tile of partial sums, added up once at the end: all rows of a tile are loaded at the same
    # time, and no iteration waits for a sum across warps.
    total = tl.zeros((BLOCK_E, BLOCK_D), dtype=DTYPE)
    for first in range(start, end, BLOCK_E):
        entries = first + tl.arange(0, BLOCK_E)
        is_entry = entries < end
        rows = tl.load(index + entries, mask=is_entry, other=0).to(tl.int64)
        weight = tl.load(weights + entries, mask=is_entry, other=0.0).to(DTYPE)
        pointers = table + rows[:, None] * stride + columns[None, :]
        values = tl.load(pointers, mask=is_entry[:, None] & (columns < d)[None, :], other=0.0)
        total += weight[:, None] * values.to(DTYPE)
    return tl.sum(total, axis=0)


@triton.jit
@no_type_check
def bag_pieces(
    table,
    stride,
    index,
    offsets,
    weights,
    piece_rows,
    piece_offsets,
    pieces,
    m,
    d,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sums, `pieces [n_pieces, d]`, of the CHUNKs of a row's entries after its first."""
    piece = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = pieces.dtype.element_ty
    row = tl.load(piece_rows + piece)
    if row < m:  # Else there are fewer pieces than programs.
        nth = 1 + piece - tl.load(piece_offsets + row)
        start = tl.load(offsets + row) + nth * CHUNK
        end = tl.minimum(start + CHUNK, tl.load(offsets + row + 1))
        total = _weighted_sum(
            table, stride, index, weights, start, end, columns, d, dtype, BLOCK_E, BLOCK_D
        )
        tl.store(pieces + piece.to(tl.int64) * d + columns, total, mask=columns < d)


@triton.jit
@no_type_check
def bag_rows(
    table,
    stride,
    index,
    offsets,
    weights,
    piece_offsets,
    pieces,
    out,
    d,
    CHUNK: tl.constexpr,
    HAS_PIECES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows `out [m, d]`: the sum of a row's first CHUNK entries, plus its pieces in order."""
    # Programs start along axis 0 first, so those that run together want the same columns of the
    # table. That slice, 38 MB for 73,728 rows of 512 bytes, may then stay in the 50 MB of L2,
    # and HBM is read once instead of once for each of ~100 active latents a token.
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = pieces.dtype.element_ty
    start = tl.load(offsets + row)
    end = tl.minimum(start + CHUNK, tl.load(offsets + row + 1))
    total = _weighted_sum(
        table, stride, index, weights, start, end, columns, d, dtype, BLOCK_E, BLOCK_D
    )
    if HAS_PIECES:
        first = tl.load(piece_offsets + row)
        last = tl.load(piece_offsets + row + 1)
        pointers = pieces + first.to(tl.int64) * d + columns
        for _ in range(first, last):
            total += tl.load(pointers, mask=columns < d, other=0.0)
            pointers += d
    pointers = out + row.to(tl.int64) * d + columns
    tl.store(pointers, total.to(out.dtype.element_ty), mask=columns < d)


@triton.jit
@no_type_check
def dots(
    a,
    a_stride,
    b,
    b_stride,
    rows,
    index,
    out,
    m,
    nnz,
    d,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Products `out [nnz]`: <a[rows[e]], b[index[e]]>, and zero where rows[e] is m."""
    # Consecutive entries, whatever rows they belong to: as much work for every program however
    # uneven the rows are. The entries of a row stand together, so its a is loaded from beyond L1
    # about once, and the gathers of b alone reach L2 and HBM.
    entries = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = tl.load(rows + entries, mask=entries < nnz, other=m)
    is_entry = row < m
    other = tl.load(index + entries, mask=is_entry, other=0)
    left = a + row.to(tl.int64)[:, None] * a_stride
    right = b + other.to(tl.int64)[:, None] * b_stride
    total = tl.zeros((BLOCK_E, BLOCK_D), dtype=out.dtype.element_ty)
    for first in range(0, d, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)[None, :]
        is_wanted = is_entry[:, None] & (columns < d)
        x = tl.load(left + columns, mask=is_wanted, other=0.0).to(out.dtype.element_ty)
        y = tl.load(right + columns, mask=is_wanted, other=0.0).to(out.dtype.element_ty)
        total += x * y
    tl.store(out + entries, tl.sum(total, axis=1), mask=entries < nnz)


@triton.jit
@no_type_check
def _n_bits(word):
    """How many bits of a uint32 are set; LLVM makes it the one instruction POPC."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 63).to(tl.int32)


@triton.jit
@no_type_check
def mark(upper, stride, limits, limits_stride, words, counts, n, n_tiles, N_WORDS: tl.constexpr):
    """A bit in `words [m * n_tiles, N_WORDS]` for each entry >= `limits [m]`, and their number."""
    # A scan is bound by memory. The second pass reads the bits, a sixteenth of the bf16 matrix.
    tile = tl.program_id(0)
    row = (tile // n_tiles).to(tl.int64)
    numbers = tl.arange(0, N_WORDS)
    bit = tl.arange(0, 32)[None, :]
    columns = ((tile % n_tiles) * N_WORDS + numbers)[:, None] * 32 + bit
    # NaN reaches no limit, so that what lies past column n is never marked.
    values = tl.load(upper + row * stride + columns, mask=columns < n, other=float("nan"))
    limit = tl.load(limits + row * limits_stride)
    is_hit = values.to(limits.dtype.element_ty) >= limit
    word = tl.sum(is_hit.to(tl.int32) << bit, axis=1)
    tl.store(words + tile.to(tl.int64) * N_WORDS + numbers, word)
    tl.store(counts + tile, tl.sum(_n_bits(word.to(tl.uint32, bitcast=True)), axis=0))


@triton.jit
@no_type_check
def write_columns(words, ends, cols, capacity, n_tiles, N_WORDS: tl.constexpr):
    """The columns of the marked entries; `ends [m * n_tiles]` counts up to each tile's last."""
    # A thread has one word, and each turn writes and clears its lowest bit. Hits are rare: most
    # tiles take one or two turns, where a running sum over all bits would cost the same for any.
    tile = tl.program_id(0)
    numbers = tl.arange(0, N_WORDS)
    word = tl.load(words + tile.to(tl.int64) * N_WORDS + numbers).to(tl.uint32, bitcast=True)
    count = _n_bits(word)
    places = tl.load(ends + tile) - tl.sum(count, axis=0) + tl.cumsum(count, axis=0) - count
    first = ((tile % n_tiles) * N_WORDS + numbers) * 32
    for _ in range(0, tl.max(count, axis=0)):
        columns = first + _n_bits(word ^ (word - 1)) - 1
        tl.store(cols + places, columns, mask=(word != 0) & (places < capacity))
        word = word & (word - 1)
        places += 1


IS_INTERPRETED = not isinstance(dots, triton.JITFunction)
