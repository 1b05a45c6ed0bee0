"""Maps from matrices (..., m, n) to their polar factors U V^T, exactly or nearly, chosen by name.

Whatever the method, the result has the shape, dtype and device of the input, which is never written to. It is the
same for c x as for x (any c > 0, entries from 1e-30 to 1e30) and zero for zero; a matrix that holds a NaN or an
infinity comes back all NaN, the others of its batch unharmed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import exact
from .iterations import PATHS, apply, fastest_path
from .kernels import rounds_float32
from .schedules import SCHEDULES, Schedule, schedule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}

EXACT = {"svd": exact.svd, "qdwh": exact.qdwh, "zolo_pd": exact.zolo_pd}

ORTHOGONALIZERS = (*SCHEDULES, *EXACT)

# ---------------------------------------------------------------------------------------------------------------
# Normalizers: (k, m, n) to matrices with singular values up to 1 / margin; zero stays zero


def normalize(x: Tensor, margin: float = 1.0) -> Tensor:
    """x / (margin * Frobenius norm) of each matrix of (k, m, n), in float32 (float64 for float64); zero stays zero.

    The largest entry is divided out first, so that no sum of squares leaves the range of the dtype.
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp_(min=tiny)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x.div_(norm.mul_(margin).clamp_(min=tiny))


def lift(x: Tensor, iterations: int = 4) -> Tensor:
    """One cubic step for matrices of Frobenius norm 1 with a dominant singular value, which lifts all the others.

    Where the power method finds a singular value z >= 1 / sqrt(2), no other exceeds k = sqrt(1 - z^2), and the cubic
    with p(k) = p(z) = 1 takes both to 1; z is capped at 0.97. Other matrices stay as they are. Two matrix products
    (arXiv 2505.16932, appendix I).
    """
    tall = x.size(-2) > x.size(-1)
    short = x.mT if tall else x
    v = torch.ones_like(short[..., :1])
    for _ in range(iterations):
        v = short @ (short.mT @ v)
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_(min=torch.finfo(v.dtype).tiny)
    z = torch.linalg.vector_norm(short.mT @ v, dim=-2, keepdim=True)
    dominant, z = z >= 0.5**0.5, z.clamp(0.5**0.5, 0.97)
    k = (1 - z * z).sqrt()
    scale = 1 / (z * k * (z + k))
    lifted = scale * ((z * z + z * k + k * k) * short - short @ (short.mT @ short))
    lifted = torch.where(dominant, lifted, short)
    return lifted.mT if tall else lifted


def rescale_rows(x: Tensor) -> Tensor:
    """D x with D_i = (sum_j |x x^T|_ij)^(-1/2) over the shorter side: singular values up to 1, of another matrix.

    The almost orthogonal layers' preconditioner (Prach and Lampert 2022) in Turbo-Muon (arXiv 2512.04632).
    """
    tall = x.size(-2) > x.size(-1)
    gram = x.mT @ x if tall else x @ x.mT
    sums = gram.abs().sum(dim=-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny)
    scale = sums.rsqrt_()
    return x * (scale.mT if tall else scale)


NORMALIZERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "frobenius": normalize,
    "power": lambda x, margin: lift(normalize(x)).div_(margin),
    "aol": lambda x, margin: rescale_rows(normalize(x)).div_(margin),
}

# ---------------------------------------------------------------------------------------------------------------
# Orthogonalizers


class Orthogonalizer:
    """Checks and flattens the batch; a subclass maps it, (k, m, n) with no empty side, in `polar`.

    Nothing is recorded for autograd.
    """

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            raise ValueError(f"an orthogonalizer takes a dense tensor, not {getattr(x, 'layout', type(x).__name__)}")
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

    Singular values come out within the schedule's certificate, and in half precision up to 5 % beyond its ends.
    dtype None is float64 for float64, bfloat16 on CUDA devices that are fast in it (float16 if path or schedule are not
    made for bfloat16), and float32 elsewhere: a CPU without bfloat16 units takes a hundred times as long in it.
    path: 'plain', 'symmetric' or 'gram' (see iterations.py); 'auto' takes the one of least cost for each shape. Square
    matrices have no Gram path and take the symmetric one.
    """

    schedule: Schedule
    dtype: torch.dtype | None = None
    path: str = "auto"

    def polar(self, x: Tensor) -> Tensor:
        dtype = self.dtype or _fast_dtype(x, self.schedule.bf16 and self.path != "gram")
        x = x.double() if dtype == torch.float64 else x
        normal = NORMALIZERS[self.schedule.normalizer](x, self.schedule.margin).to(dtype)
        path = self.path
        if path == "auto":
            path = fastest_path(*x.shape[-2:], self.schedule.rows, dtype, x.device.type)
        return apply(normal, self.schedule.rows, path)


@dataclass(frozen=True)
class ExactOrthogonalizer(Orthogonalizer):
    """One of the classical methods of exact.py, to machine precision.

    dtype None is float64 for float64 and where products of float32 are rounded to TF32, float32 for the rest.
    """

    name: str
    dtype: torch.dtype | None = None

    def polar(self, x: Tensor) -> Tensor:
        wide = x.dtype == torch.float64 or rounds_float32()
        dtype = self.dtype or (torch.float64 if wide else torch.float32)
        return EXACT[self.name](normalize(x.to(dtype)))


def orthogonalizer(
    name: str,
    *,
    steps: int | None = None,
    dtype: str | torch.dtype = "auto",
    margin: float | None = None,
    path: str = "auto",
    normalizer: str | None = None,
    allow_unsafe: bool = False,
) -> Orthogonalizer:
    """The orthogonalizer of this name: one of ORTHOGONALIZERS.

    steps: how many rows of the polynomial schedule are applied (default: as published, mostly 5).
    dtype: of the iteration, 'auto', 'bf16', 'fp16', 'fp32', 'fp64' or a torch dtype; never that of the result.
    margin: factor on the norm, 1 or more (default: the schedule's own).
    path: 'auto', 'plain', 'symmetric' or 'gram': one map, computed in three ways. auto keeps gram to fp16 and fp32.
    normalizer: 'frobenius', or 'power' for one more step that lifts what a dominant singular value hides (default: the
        schedule's own; turbo's cannot be changed).
    allow_unsafe: accept a schedule that a rank-one matrix makes flip signs or explode.
    The exact methods have none of these but dtype and ignore the others, so that a sweep can put them beside the rest;
    exact.zolo_pd itself has a choice of factorizations.
    """
    if name not in ORTHOGONALIZERS:
        raise ValueError(f"unknown orthogonalizer {name!r}; choose one of {', '.join(ORTHOGONALIZERS)}")
    chosen = None if dtype == "auto" else DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if chosen is not None and chosen not in DTYPES.values():
        raise ValueError(f"unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)} or the torch dtype of one")
    if path not in ("auto", *PATHS):
        raise ValueError(f"unknown path {path!r}; choose auto, {', '.join(PATHS)}")
    if name in EXACT:
        if chosen in (torch.bfloat16, torch.float16):
            raise ValueError(f"orthogonalizer {name!r} works in fp32 or fp64, not {dtype}")
        return ExactOrthogonalizer(name, chosen)
    plan = schedule(name, steps, margin, allow_unsafe=allow_unsafe)
    if chosen == torch.bfloat16 and not (plan.bf16 or allow_unsafe):
        raise ValueError(f"schedule {name!r} does not survive bf16; choose fp16 or fp32, or allow_unsafe=True")
    if normalizer is not None:
        plan = _with_normalizer(plan, normalizer)
    return PolynomialOrthogonalizer(plan, chosen, path)


def _with_normalizer(plan: Schedule, normalizer: str) -> Schedule:
    if normalizer not in ("frobenius", "power"):
        raise ValueError(f"unknown normalizer {normalizer!r}; choose frobenius or power")
    if plan.normalizer != "frobenius":
        raise ValueError(f"schedule {plan.name!r} is made for its own normalizer, {plan.normalizer}, not {normalizer}")
    return replace(plan, normalizer=normalizer)


def _fast_dtype(x: Tensor, bf16: bool) -> torch.dtype:
    if x.dtype == torch.float64:
        return torch.float64
    if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0):
        return torch.bfloat16 if bf16 else torch.float16
    return torch.float32
