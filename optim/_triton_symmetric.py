"""The Triton kernel of kernels.py, which imports it where it runs: Triton is large, and absent on many machines."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tile side, depth of one step along p, warps, pipeline stages. Large tiles move the fewest bytes, small ones give
# every multiprocessor work when the matrices are small or few; what a device has no room for drops out in the tuning.
CONFIGS = [
    triton.Config({"BLOCK": side, "BLOCK_K": depth}, num_warps=warps, num_stages=stages)
    for side, depth, warps, stages in (
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 32, 8, 4),
        (64, 64, 4, 4),
        (64, 32, 4, 5),
    )
]


@triton.jit
def lower_tile(index, side, GROUP: tl.constexpr):
    """Row and column of one of the side (side + 1) / 2 tiles on and below the diagonal.

    The triangle is folded into a rectangle, its short rows behind its long ones, so that no program idles. Its rows
    are walked GROUP at a time, column by column, so that programs that run together share operands in the L2 cache.
    """
    odd = side % 2
    width = side + 1 - odd
    height = (side + odd) // 2
    first = index // (GROUP * width) * GROUP
    inside = index % (GROUP * width)
    rows = tl.minimum(height - first, GROUP)
    fold, col = first + inside % rows, inside // rows
    row = side - 1 - fold
    return tl.where(col <= row, row, fold - odd), tl.where(col <= row, col, col - row - 1)


@triton.autotune(CONFIGS, key=["n", "p", "batch", "a_row", "a_col", "b_row", "b_col"], cache_results=True)
@triton.jit
def multiply_lower(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    n,
    p,
    batch,  # matrices; only the key of the tuning reads it
    a_batch,
    a_row,
    a_col,
    b_batch,
    b_row,
    b_col,
    c_batch,
    c_row,
    c_col,
    alpha,
    beta,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr = 8,
):
    """One tile of alpha a b + beta c and its mirror image; every element of out is written by exactly one program."""
    side = tl.cdiv(n, BLOCK)
    tiles = side * (side + 1) // 2
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    row, col = lower_tile(tl.program_id(0) % tiles, side, GROUP)
    # Everything a stride multiplies is int64: offsets into a large batch do not fit into 32 bits.
    rows = (row * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    cols = (col * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    step = tl.full((), BLOCK_K, tl.int64)

    a_ptrs = a_ptr + matrix * a_batch + rows[:, None] * a_row + inner.to(tl.int64)[None, :] * a_col
    b_ptrs = b_ptr + matrix * b_batch + inner.to(tl.int64)[:, None] * b_row + cols[None, :] * b_col
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, p, BLOCK_K):
        a = tl.load(a_ptrs, (rows[:, None] < n) & (inner[None, :] < p - start), other=0.0)
        b = tl.load(b_ptrs, (inner[:, None] < p - start) & (cols[None, :] < n), other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        a_ptrs += step * a_col
        b_ptrs += step * b_row

    inside = (rows[:, None] < n) & (cols[None, :] < n)
    total *= alpha
    if ADD:
        c_ptrs = c_ptr + matrix * c_batch + rows[:, None] * c_row + cols[None, :] * c_col
        total += beta * tl.load(c_ptrs, inside, other=0.0).to(tl.float32)
    result = total.to(out_ptr.dtype.element_ty)
    if row == col:
        result = tl.where(rows[:, None] >= cols[None, :], result, tl.trans(result))
    out_ptr += matrix * n * n
    tl.store(out_ptr + rows[:, None] * n + cols[None, :], result, inside)
    if row != col:
        tl.store(out_ptr + cols[None, :] * n + rows[:, None], result, inside)


def half_product(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    """symmetric_product for bfloat16, float16 and float32 on a device Triton knows; sums in float32.

    float32 is multiplied in tf32 only where PyTorch's own products would be.
    """
    k, n, p = a.shape
    out = a.new_empty(k, n, n)
    if out.numel() == 0:
        return out
    added = out if c is None else c
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"

    def grid(meta):
        side = triton.cdiv(n, meta["BLOCK"])
        return (k * (side * (side + 1) // 2),)

    multiply_lower[grid](
        *(a, b, added, out, n, p, k),
        *(*a.stride(), *b.stride(), *added.stride()),
        *(alpha, beta),
        ADD=c is not None,
        PRECISION="tf32" if tf32 else "ieee",
    )
    return out
