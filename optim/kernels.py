"""Products known to be symmetric, for half the operations: the lower triangle is computed and mirrored."""

from functools import cache
from math import inf

import torch
from torch import Tensor

# Shortest side from which half a product beats a whole one. CPU, measured in fp32 for 1 and 8 matrices: on one thread
# 1.05x as fast at 256, 1.2x at 384, 1.3x at 512, 1.5x at 768; on two threads 0.8x, 1.05x, 1.0x, 1.4x.
# CUDA, not measured: a guess; below it a whole product takes little longer than its launch.
SHORTEST = {"cpu": 384, "cuda": 256}
BLOCK_ROWS = 128  # on the CPU; 64 to 128 are equally fast, 192 is slower
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def full_product(a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha a b + beta c for batches (k, n, p), (k, p, q) and (k, n, q); a new tensor."""
    if c is None:
        return torch.baddbmm(a.new_zeros(()), a, b, beta=0.0, alpha=alpha)
    return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def symmetric_product(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha a b + beta c, which the caller knows to be symmetric, in the dtype of a; a new tensor (k, n, n).

    a (k, n, p) and b (k, p, n) are x and x^T, or symmetric matrices that commute; c (k, n, n) is symmetric. Any strides
    will do, and the operands may be one tensor. The result is symmetric to the bit where Triton computes half, up to
    rounding elsewhere: in blocks on the diagonal, for small matrices, on other devices. Not differentiable.

    On CUDA the first call for a new shape, layout and dtype tries out tile sizes and keeps the best on disk, so a CUDA
    graph may only capture what has run before. torch.compile sees one opaque operator.
    """
    operands = (a, b) if c is None else (a, b, c)
    k, n, p = a.shape if a.ndim == 3 else (-1, -1, -1)
    shapes = ((k, n, p), (k, p, n), (k, n, n))[: len(operands)]
    if any(t.shape != shape for t, shape in zip(operands, shapes, strict=True)):
        given = ", ".join(str(tuple(t.shape)) for t in operands)
        raise ValueError(f"symmetric_product takes a (k, n, p), b (k, p, n) and c (k, n, n), not {given}")
    if any(t.dtype != a.dtype or t.device != a.device for t in operands):
        kinds = ", ".join(f"{t.dtype} on {t.device}" for t in operands)
        raise ValueError(f"symmetric_product takes operands of one dtype on one device, not {kinds}")
    if min(n, p) < SHORTEST.get(a.device.type, inf):
        return full_product(a, b, c, alpha=alpha, beta=beta)
    if a.device.type == "cpu" and not torch.compiler.is_compiling():
        return _block_rows(a, b, c, alpha, beta)  # the operator below would cost as much as a tenth of the product
    return _half(a, b, c, alpha, beta)


@torch.library.custom_op("optim::symmetric_product", mutates_args=())
def _half(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    if a.device.type == "cpu":
        return _block_rows(a, b, c, alpha, beta)
    triton_product = _triton_product()
    if triton_product is None or a.dtype not in TRITON_DTYPES or torch.cuda.get_device_capability(a.device) < (8, 0):
        return full_product(a, b, c, alpha=alpha, beta=beta)
    with torch.cuda.device(a.device):
        return triton_product(a, b, c, alpha, beta)


@_half.register_fake
def _(a, b, c, alpha, beta):
    return a.new_empty(a.size(0), a.size(1), a.size(1))


def _block_rows(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Blocks of rows, each up to the end of its diagonal block, and their mirror images."""
    k, n, _ = a.shape
    out = a.new_empty(k, n, n)
    for matrix in range(k):
        x, y, z = a[matrix], b[matrix], out[matrix]
        w, weight = (z, 0.0) if c is None else (c[matrix], beta)
        for i in range(0, n, BLOCK_ROWS):
            j = min(i + BLOCK_ROWS, n)
            torch.addmm(w[i:j, :j], x[i:j], y[:, :j], beta=weight, alpha=alpha, out=z[i:j, :j])
            z[:i, i:j] = z[i:j, :i].mT
    return out


@cache
def _triton_product():
    """The product by Triton's kernel, or None without Triton."""
    try:
        from ._triton_symmetric import half_product
    except ImportError:
        return None
    return half_product


@torch.compiler.assume_constant_result
def rounds_float32() -> bool:
    """Whether PyTorch may round the factors of float32 products, to TF32 or less, on some device."""
    settings = {torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision}
    if "none" in settings:
        settings.add(torch.backends.fp32_precision)
    return not settings <= {"ieee", "none"}
