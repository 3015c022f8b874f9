"""The functions of `sparse.codes` in Triton, for one NVIDIA GPU.

Row r owns the entries `offsets[r] : offsets[r + 1]`, and `offsets[0]` is 0. Sums run in float32,
in float64 where an operand is float64, and in one fixed order: equal inputs give equal bits. No
call waits for the device. Entries of `index` past `offsets[m]` (padding) are ignored, and offsets
past the end of `index` are cut to it, so what `compact` returns can be passed on even where it
overflowed. Rows of matrices may lie apart, as those of one site of a decoder do; a matrix whose
last axis is not contiguous is refused, a vector is copied.

Importing this module does not import triton. With TRITON_INTERPRET=1 in the environment before
anything imports triton, all runs in numpy, on CPU tensors too: for tests. Limits: not
differentiable; fewer than 2^31 - 256 entries; the values of `index` are not checked.
"""

from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Bytes of a table that one program loads at a time: four warps of 32 threads, four 16-byte loads
# in flight each. Data sheets ask for about 25 KB on the way to each multiprocessor of an H200
# (4.8 TB/s * 0.7 us / 132), so for three programs or more. As compiled for sm_90 by triton 3.9
# they take 40 to 96 registers, which leaves room for 12 to 5. No time has been measured.
TILE_BYTES = 8192
# FMAs: one rounding less, and triton 3.9 warns where the choice is left to it.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# The most entries of a row that one program sums. A latent can be active on every token: with 16
# entries at a time, its 4,096 would keep one program busy when the others are long done.
CHUNK = 256
# Of 32 columns each: what one program of `compact` scans, 8 KB of bf16.
N_WORDS = 128


def weighted_bag(
    table: Float[Tensor, "n d"],
    index: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " m_plus_1"],
    weights: Float[Tensor, " nnz"],
    *,
    out_dtype: torch.dtype | None = None,
) -> Float[Tensor, "m d"]:
    """Weighted sums of rows of a table, one for each row of entries; zero for an empty row.

    Rows of more than `CHUNK` entries are summed in pieces, all at once, and the pieces in order.
    The sums are rounded once, to `out_dtype` or the table's own: gradients of a bf16 table for
    fp32 weights ask for fp32.
    """
    programs = _programs(table)
    m, d, nnz = len(offsets) - 1, table.shape[1], len(index)
    out = table.new_empty(m, d, dtype=out_dtype or table.dtype)
    if out.numel() == 0:
        return out
    block_e, block_d = _tile(table, row_length=nnz // m)
    n_blocks, n_pieces = -(-d // block_d), max(nnz - 1, 0) // CHUNK
    offsets = offsets.clamp(max=nnz)
    piece_rows, piece_offsets = _pieces(offsets, n_pieces)
    pieces = table.new_empty(n_pieces, d, dtype=_accumulator(table, weights))
    entries = (table, table.stride(0), index.contiguous(), offsets, weights.contiguous())
    meta = {"CHUNK": CHUNK, "BLOCK_E": block_e, "BLOCK_D": block_d} | OPTIONS
    with torch.cuda.device_of(table):
        if n_pieces > 0:
            programs.bag_pieces[(n_pieces, n_blocks)](
                *entries, piece_rows, piece_offsets, pieces, m, d, **meta
            )
        programs.bag_rows[(m, n_blocks)](
            *entries, piece_offsets, pieces, out, d, HAS_PIECES=n_pieces > 0, **meta
        )
    return out


def sampled_dots(
    a: Float[Tensor, "m d"],
    b: Float[Tensor, "n d"],
    offsets: Int[Tensor, " m_plus_1"],
    index: Int[Tensor, " nnz"],
) -> Float[Tensor, " nnz"]:
    """Dot products of the rows of `a` with the rows of `b` that their entries name.

    In float32, or float64 where `a` or `b` is; zero for entries that no row owns.
    """
    programs = _programs(a, b)
    (m, d), nnz = a.shape, len(index)
    out = a.new_zeros(nnz, dtype=_accumulator(a, b))
    if nnz == 0 or m == 0 or d == 0:
        return out
    entries = torch.arange(nnz, dtype=offsets.dtype, device=offsets.device)
    rows = torch.searchsorted(offsets[1:].contiguous(), entries, right=True, out_int32=True)
    # 16 entries a program, not as many as a row has: tiles are cut without regard to rows.
    block_e, block_d = _tile(b, row_length=16)
    with torch.cuda.device_of(a):
        programs.dots[(-(-nnz // block_e),)](
            *(a, a.stride(0), b, b.stride(0), rows, index.contiguous(), out, m, nnz, d),
            BLOCK_E=block_e,
            BLOCK_D=block_d,
            **OPTIONS,
        )
    return out


def compact(
    upper: Float[Tensor, "m n"],
    threshold: Float[Tensor, ""] | Float[Tensor, " m"],
    capacity: int,
) -> tuple[Int[Tensor, " capacity"], Int[Tensor, " m_plus_1"]]:
    """The columns of the entries >= threshold, row by row, and where each row's begin.

    Compared exactly, in float32 or float64; NaN is below every threshold. Columns are int32 and
    ascend within a row; unused places hold 0. Entries past `capacity` are dropped but counted:
    `offsets[-1] > capacity` tells. Counts stop at 2^31 - 1.
    """
    programs = _programs(upper)
    m, n = upper.shape
    cols = torch.zeros(capacity, dtype=torch.int32, device=upper.device)
    offsets = torch.zeros(m + 1, dtype=torch.int32, device=upper.device)
    if upper.numel() == 0:
        return cols, offsets
    n_tiles = -(-n // (32 * N_WORDS))
    words = offsets.new_empty(m * n_tiles, N_WORDS)
    counts = offsets.new_empty(m * n_tiles)
    limits = threshold.to(_accumulator(upper, threshold)).expand(m)
    meta = {"N_WORDS": N_WORDS} | OPTIONS
    with torch.cuda.device_of(upper):
        programs.mark[(m * n_tiles,)](
            *(upper, upper.stride(0), limits, limits.stride(0), words, counts, n, n_tiles), **meta
        )
        ends = counts.cumsum(dim=0)
        programs.write_columns[(m * n_tiles,)](words, ends, cols, capacity, n_tiles, **meta)
    offsets[1:] = ends.view(m, n_tiles)[:, -1].clamp(max=2**31 - 1)
    return cols, offsets


def _pieces(
    offsets: Int[Tensor, " m_plus_1"], n_pieces: int
) -> tuple[Int[Tensor, " n_pieces"], Int[Tensor, " m_plus_1"]]:
    """The row of each piece after a row's first, and where each row's pieces begin.

    `n_pieces` is the most there can be, known without waiting for the device; the row of those
    that there are not is m.
    """
    ends = ((offsets.diff() - 1).clamp(min=0) // CHUNK).cumsum(dim=0, dtype=torch.int32)
    numbers = torch.arange(n_pieces, dtype=torch.int32, device=offsets.device)
    rows = torch.searchsorted(ends, numbers, right=True, out_int32=True)
    return rows, torch.nn.functional.pad(ends, (1, 0))


def _tile(table: Float[Tensor, "n d"], *, row_length: int) -> tuple[int, int]:
    """Entries and columns of a tile of `TILE_BYTES`.

    16 entries by 512 bytes, one 16-byte load of a whole warp. Where rows are short, as those of
    most latents (nnz / d_sae = 5.6 at k 100, batch 4,096, d_sae 73,728), 4 by 2,048 bytes: a
    quarter of the programs, and fewer places of the tile empty.
    """
    block_e = 16 if row_length >= 8 else 4
    widest = TILE_BYTES // (table.element_size() * block_e)
    power_of_two = 1 << (table.shape[1] - 1).bit_length()
    return block_e, min(widest, max(16, power_of_two))


def _accumulator(*operands: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in operands) else torch.float32


def _programs(*matrices: Float[Tensor, "_ _"]) -> ModuleType:
    """The compiled programs, once triton, the device and the layout of the matrices allow them.

    Raises:
        ImportError: triton is not installed.
        ValueError: a matrix is not on a CUDA device (nor interpreted), or its last axis has gaps.
    """
    try:
        from tl_crosscoder.crosscoder.sparse import triton_device as programs
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            "the fast kernels need triton, which is not installed. On Linux: pip install triton; "
            "elsewhere crosscoder.sparse.codes has these functions in torch alone."
        ) from error
    for matrix in matrices:
        if not (matrix.is_cuda or programs.IS_INTERPRETED):
            raise ValueError(
                f"a matrix is on {matrix.device}; triton kernels need CUDA. On a CPU use "
                "crosscoder.sparse.codes, or set TRITON_INTERPRET=1 before importing."
            )
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise ValueError(
                f"a matrix of shape {tuple(matrix.shape)} has strides {matrix.stride()}; the last "
                "must be 1. Pass matrix.contiguous()."
            )
    return programs
