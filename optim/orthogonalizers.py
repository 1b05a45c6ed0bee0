"""Maps from matrices (..., m, n) to their polar factors U V^T, exactly or nearly, chosen by name.

Whatever the method, the result has the shape, dtype and device of the input, which is never written to. It is the
same for c x as for x (any c > 0, entries from 1e-30 to 1e30) and zero for zero; a matrix that holds a NaN or an
infinity comes back all NaN, the others of its batch unharmed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .polynomials import SCHEDULES, Row, Schedule, schedule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def normalize(x: Tensor, margin: float = 1.0) -> Tensor:
    """x / (margin * Frobenius norm) of each matrix of (k, m, n), in float32 (float64 for float64); zero stays zero.

    The largest entry is divided out first, so that no sum of squares leaves the range of the dtype.
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp_(min=tiny)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x.div_(norm.mul_(margin).clamp_(min=tiny))


def apply_rows(x: Tensor, rows: tuple[Row, ...]) -> Tensor:
    """p_T(... p_1(x)) for each matrix of (k, m, n) with singular values up to 1, in the dtype of x.

    The products run over the shorter side, x x^T from the left or x^T x from the right: nothing is transposed. The
    linear term joins as `beta` in the last product, since adding a I to the Gram matrix costs digits in bfloat16.
    """
    tall = x.size(-2) > x.size(-1)
    for linear, *middle, leading in rows:
        gram = x.mT @ x if tall else x @ x.mT
        factor, weight = gram, leading
        for coefficient in reversed(middle):
            factor, weight = torch.baddbmm(gram, gram, factor, beta=coefficient, alpha=weight), 1.0
        left, right = (x, factor) if tall else (factor, x)
        x = torch.baddbmm(x, left, right, beta=linear, alpha=weight)
    return x


class Orthogonalizer:
    """Checks and flattens the batch; a subclass maps it, (k, m, n) with no empty side, in `polar`."""

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim < 2:
            raise ValueError(f"an orthogonalizer takes matrices (..., m, n), not a tensor of shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"an orthogonalizer takes real floating-point matrices, not {x.dtype}")
        if x.numel() == 0:
            return x.clone()
        return self.polar(x.reshape(-1, *x.shape[-2:])).to(x.dtype).reshape(x.shape)

    def polar(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class PolynomialOrthogonalizer(Orthogonalizer):
    """Matrix products alone: normalized in float32 or float64 first, cast to `dtype`, then one row a step.

    dtype None is float64 for float64, bfloat16 on CUDA devices that are fast in it, and float32 elsewhere: a CPU
    without bfloat16 units takes a hundred times as long in it.
    """

    schedule: Schedule
    dtype: torch.dtype | None = None

    def polar(self, x: Tensor) -> Tensor:
        normal = normalize(x, self.schedule.margin)
        return apply_rows(normal.to(self.dtype or _fast_dtype(x)), self.schedule.rows)


@dataclass(frozen=True)
class SVDOrthogonalizer(Orthogonalizer):
    """U V^T over the singular directions above rounding error, so rank-deficient matrices keep their rank.

    dtype None is float64 for float64 and float32 for the rest.
    """

    dtype: torch.dtype | None = None

    def polar(self, x: Tensor) -> Tensor:
        x = normalize(x)
        x = x.to(self.dtype or x.dtype)
        u, s, vh = torch.linalg.svd(x.nan_to_num(), full_matrices=False)
        keep = s > max(x.shape[-2:]) * torch.finfo(x.dtype).eps * s[:, :1]
        return torch.where(x.isnan(), x, (u * keep.unsqueeze(-2)) @ vh)


ORTHOGONALIZERS = (*SCHEDULES, "svd")


def orthogonalizer(
    name: str, *, steps: int | None = None, dtype: str | torch.dtype = "auto", margin: float | None = None
) -> Orthogonalizer:
    """The orthogonalizer of this name: one of ORTHOGONALIZERS.

    steps: how many rows of the polynomial schedule are applied (default 5).
    dtype: of the iteration, 'auto', 'bf16', 'fp16', 'fp32', 'fp64' or a torch dtype; never that of the result.
    margin: factor on the Frobenius norm, 1 or more (default: the schedule's own).
    svd has neither steps nor margin and ignores both, so that a sweep can put it beside the others.
    """
    if name not in ORTHOGONALIZERS:
        raise ValueError(f"unknown orthogonalizer {name!r}; choose one of {', '.join(ORTHOGONALIZERS)}")
    chosen = None if dtype == "auto" else DTYPES.get(dtype, dtype)
    if chosen is not None and chosen not in DTYPES.values():
        raise ValueError(f"unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)} or the torch dtype of one")
    if name != "svd":
        return PolynomialOrthogonalizer(schedule(name, steps, margin), chosen)
    if chosen in (torch.bfloat16, torch.float16):
        raise ValueError(f"orthogonalizer 'svd' works in fp32 or fp64, not {dtype}")
    return SVDOrthogonalizer(chosen)


def _fast_dtype(x: Tensor) -> torch.dtype:
    if x.dtype == torch.float64:
        return torch.float64
    fast = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32
