"""The shell that every matrix optimizer stands in: all of an optimizer except its direction.

Parameters of one shape are worked on as one stack (k, m, n). Under torch.distributed they are divided over the ranks:
the owner of a parameter alone keeps its state, computes its direction and sends that to the others; then every rank
applies shape scale, weight decay and learning rate alike, so replicas stay equal to the bit. A subclass says which
state a matrix needs and how gradients become directions.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

SHAPE_SCALES: dict[str, Callable[[int, int], float]] = {
    "none": lambda m, n: 1.0,
    "spectral": lambda m, n: math.sqrt(m / n),
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
}


def shape_scale(kind: str, m: int, n: int) -> float:
    """The factor on the direction of an m x n matrix (m outputs, n inputs); `kind` is one of SHAPE_SCALES.

    spectral: the step has length lr in the RMS-to-RMS operator norm (arXiv 2410.21265). original: KellerJordan/Muon.
    match_rms_adamw: entries of RMS 0.2 for an orthogonal direction, as AdamW's steps have (arXiv 2502.16982).
    """
    require(kind in SHAPE_SCALES, "shape_scale", kind, f"one of {', '.join(SHAPE_SCALES)}")
    return SHAPE_SCALES[kind](m, n)


# How a parameter that is no matrix is read: not at all, as the matrices of its last two dimensions, or as one matrix
# (size(0), all the rest), which is how a convolution sees its kernel, and a vector itself: as a column.
TENSORS = ("refuse", "stack", "flatten")

ROUNDING = 1e-9  # what a scheduler that ends at a limit may miss it by
STATE_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def require(holds: bool, option: str, value: Any, expected: str) -> None:
    """Raises ValueError naming an option whose value is not as expected."""
    if not holds:
        raise ValueError(f"{option} must be {expected}, not {value!r}")


def require_decay(option: str, value: Any, dtype: torch.dtype | None = None) -> None:
    """Raises ValueError unless the value can be what an average keeps of its past, if it is stored in `dtype`.

    Rounded to nearest, an average x of values near v stands still as soon as (1 - decay) |v - x| is at most half of the
    distance from x to the next number. In bfloat16 one that climbs from zero to a constant ends at 0.961 of it with
    a decay of 0.95, at 0.906 with 0.98, at 0.805 with 0.99 and at 0.25 with 0.999. So from 0.99 on it is refused there:
    no later step would show that the average stopped following.
    """
    require(_is_decay(value), option, value, "at least 0 and below 1")
    stalls = dtype == torch.bfloat16 and value >= 0.99
    require(not stalls, option, value, "below 0.99 for averages in bfloat16, which would stand still")


def require_betas(betas: Any, dtype: torch.dtype | None = None) -> None:
    """Raises ValueError unless these are the decays of two averages, see require_decay."""
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(map(_is_decay, betas))
    require(pair, "betas", betas, "two numbers, at least 0 and below 1")
    for beta in betas:
        require_decay("each of betas", beta, dtype)


def _is_decay(value: Any) -> bool:
    return isinstance(value, Real) and 0 <= value < 1


def require_dtype(option: str, dtype: Any) -> None:
    """Raises ValueError unless it is a dtype that state can have: squares of small gradients are zero in float16."""
    require(dtype in STATE_DTYPES, option, dtype, "a floating-point dtype among bfloat16, float32 and float64")


class Spec(NamedTuple):
    """One state tensor of one matrix; dtype None stands for the optimizer's state_dtype.

    It is zero at the start, or with `identity`, for a square shape, the identity.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    identity: bool = False


@dataclass
class Bucket:
    """Parameters of one group that are worked on together: each is one matrix m x n, or several in row-major order."""

    group: dict[str, Any]
    names: list[list[str]]  # of the matrices of each parameter
    params: list[Tensor]
    matrix: tuple[int, int]  # m, n
    dtype: torch.dtype  # of the stacked gradients and directions
    layout: dict[str, Any]  # the options that the state was laid out by
    shares: list[range]  # per rank, the parameters it owns
    state: dict[str, Tensor]  # of this rank's share: (parameters, matrices in each, *spec.shape)


class MatrixOptimizer(torch.optim.Optimizer):
    """Base class of the optimizers that update whole matrices, p -= lr * shape_scale * direction.

    Args:
        params: matrices, or tensors if `tensors` says so, (name, parameter) pairs, or groups of either.
        defaults: the options of a group, among them
            lr: learning rate;
            weight_decay: decoupled, p *= 1 - lr * weight_decay before the step, whatever the shape scale;
            shape_scale: one of SHAPE_SCALES, of the shape of a block;
            blocks: how many equal matrices are stacked by rows in each parameter (3 in a fused QKV);
            tensors: what to do with more than two dimensions: "refuse" them (default), "stack" the matrices of the last
                two (experts), or "flatten" them to (size(0), rest) (kernels of convolutions);
            step: how many steps were taken before this one; the shell counts.
        state_dtype: of the state, whatever that of the parameters: bfloat16, float32 or float64; float64 parameters
            have float64 state.
        process_group: the ranks that share the work (default: all, if torch.distributed is initialized). They must
            hold the same gradients, as they do after DDP, and lack the same ones.

    A parameter without gradient is left alone entirely. Options can be edited between steps, and are checked in every
    step as at the start; those in `layout` stay what they were.
    """

    layout: tuple[str, ...] = ("blocks", "tensors")
    """The options that settle which state there is and what it means; a subclass adds its own."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        state_dtype: torch.dtype = torch.float32,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        require_dtype("state_dtype", state_dtype)
        distributed = dist.is_available() and dist.is_initialized()
        self._group = process_group
        self._rank = dist.get_rank(process_group) if distributed else 0
        self._world_size = dist.get_world_size(process_group) if distributed else 1
        require(self._rank >= 0, "process_group", process_group, "a group that this process is in")
        self._next_rank = 0  # the first to own one parameter more when a bucket does not divide evenly
        self._state_dtype = state_dtype
        self._known: set[str | Tensor] = set()  # parameters and their names
        self._buckets: list[Bucket] = []
        self._direction_hooks: OrderedDict[int, Callable[[list[str], list[Tensor]], None]] = OrderedDict()
        super().__init__(params, {"tensors": "refuse", "step": 0, **defaults})

    # ---- the part of a subclass --------------------------------------------------------------------------------

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError on an option out of range; a subclass adds its own options."""
        lr, decay, blocks = group["lr"], group["weight_decay"], group["blocks"]
        usable = isinstance(lr, Real) and -ROUNDING <= lr < math.inf
        require(usable, "lr", lr, "a number of at least 0")
        require(isinstance(decay, Real) and 0 <= decay < math.inf, "weight_decay", decay, "a number of at least 0")
        require(isinstance(blocks, int) and blocks >= 1, "blocks", blocks, "a whole number of at least 1")
        tensors, step = group["tensors"], group["step"]
        require(tensors in TENSORS, "tensors", tensors, f"one of {', '.join(TENSORS)}")
        require(isinstance(step, int) and step >= 0, "step", step, "a whole number of at least 0")
        shape_scale(group["shape_scale"], 1, 1)  # refuses an unknown kind

    def state_spec(self, m: int, n: int, group: Mapping[str, Any]) -> dict[str, Spec]:
        """The state that one m x n matrix needs, by name."""
        raise NotImplementedError

    def direction(self, grads: Tensor, state: dict[str, Tensor], group: Mapping[str, Any]) -> Tensor:
        """Directions (k, m, n) for gradients (k, m, n); updates the state, (k, *spec.shape) each, in place.

        Gradients come in float32, float64 for float64 parameters. What is decided once for a whole stack (refresh or
        not) goes by group["step"], what differs between its matrices (a gradient seen or not) by a state tensor, so
        that nothing here waits for the device except where a factorization must.
        """
        raise NotImplementedError

    # ---- buckets, owners, state --------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        first = sum(len(group["params"]) for group in self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self.check_group(group)
        names = group.get("param_names", [f"parameter {first + i}" for i in range(len(group["params"]))])
        alike: dict[tuple, list[tuple[str, Tensor]]] = {}
        for name, p in zip(names, group["params"], strict=True):
            _check_parameter(name, p, group)
            if not self._known.isdisjoint((name, p)):
                raise ValueError(f"{name!r} is given twice, by name or by parameter")
            self._known |= {name, p}
            alike.setdefault((p.shape, p.device, p.dtype == torch.float64), []).append((name, p))
        for members in alike.values():
            self._add_bucket(group, *map(list, zip(*members, strict=True)))

    def _add_bucket(self, group: dict[str, Any], names: list[str], params: list[Tensor]) -> None:
        m, n = matrix_shape(params[0].shape, group["blocks"], group["tensors"])
        count = params[0].numel() // (m * n)
        double = params[0].dtype == torch.float64
        shares = self._divide(len(params))
        own = shares[self._rank]
        state = {}
        for key, (shape, dtype, identity) in self.state_spec(m, n, group).items():
            dtype = dtype or (torch.float64 if double else self._state_dtype)
            state[key] = torch.zeros(len(own), count, *shape, dtype=dtype, device=params[0].device)
            if identity:
                state[key].diagonal(dim1=-2, dim2=-1).fill_(1)
        for i, p in enumerate(params[own.start : own.stop]):
            self.state[p] = {key: stack[i] if count > 1 else stack[i, 0] for key, stack in state.items()}
        self._buckets.append(
            Bucket(
                group=group,
                names=[[f"{name}[{i}]" for i in range(count)] if count > 1 else [name] for name in names],
                params=params,
                matrix=(m, n),
                dtype=torch.float64 if double else torch.float32,
                layout={option: group[option] for option in self.layout},
                shares=shares,
                state=state,
            )
        )

    def _divide(self, count: int) -> list[range]:
        """Consecutive shares of `count` parameters; who gets one more rotates from bucket to bucket."""
        least, extra = divmod(count, self._world_size)
        shares, start = [], 0
        for rank in range(self._world_size):
            stop = start + least + ((rank - self._next_rank) % self._world_size < extra)
            shares.append(range(start, stop))
            start = stop
        self._next_rank += extra
        return shares

    # ---- the step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after calling `closure` if given; returns what it returned.

        Raises ValueError, with nothing changed yet, for options that were edited to what cannot be.
        """
        self._check_edits()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ahead = None
        for bucket in self._buckets:
            started = bucket, *self._start(bucket)
            if ahead is not None:  # its directions travelled while those of the next bucket were computed
                self._finish(*ahead)
            ahead = started
        if ahead is not None:
            self._finish(*ahead)
        for group in self.param_groups:
            group["step"] += 1
        return loss

    def _check_edits(self) -> None:
        for bucket in self._buckets:
            self.check_group(bucket.group)
            for option, built in bucket.layout.items():
                if (now := bucket.group[option]) != built:
                    problem = f"{option} was edited from {built!r} to {now!r}, and the state is laid out by the first"
                    raise ValueError(f"{problem}; build another optimizer")

    def _start(self, bucket: Bucket) -> tuple[list[Tensor | None], list[dist.Work]]:
        """One direction a parameter, None without gradient; those of other ranks are there when the works are done."""
        directions: list[Tensor | None] = [None] * len(bucket.params)
        for has_grad, run in groupby(bucket.shares[self._rank], lambda i: bucket.params[i].grad is not None):
            if has_grad:
                run = list(run)
                part = slice(run[0], run[-1] + 1)
                directions[part] = self._directions(bucket, part)
        if self._world_size == 1:
            return directions, []
        # A broadcast by each owner rather than an all-gather, which would pad every share to the largest.
        everyone = bucket.params[0].new_empty(len(directions), *bucket.params[0].shape, dtype=bucket.dtype)
        for slot, direction in zip(everyone, directions, strict=True):
            if direction is not None:
                slot.copy_(direction)
        works = [
            dist.broadcast(everyone[share.start : share.stop], group=self._group, group_src=rank, async_op=True)
            for rank, share in enumerate(bucket.shares)
            if share
        ]
        return list(everyone), works

    def _directions(self, bucket: Bucket, part: slice) -> tuple[Tensor, ...]:
        """The directions of consecutive parameters of this rank, all with gradients."""
        grads = [p.grad for p in bucket.params[part]]
        if any(grad.layout != torch.strided for grad in grads):
            raise ValueError(f"a sparse gradient came for one of {bucket.names[part]}; whole matrices are needed")
        stack = grads[0].new_empty(len(grads), *grads[0].shape, dtype=bucket.dtype)
        torch._foreach_copy_(stack.unbind(), grads)
        start = bucket.shares[self._rank].start
        state = {k: v[part.start - start : part.stop - start].flatten(0, 1) for k, v in bucket.state.items()}
        return self.direction(stack.view(-1, *bucket.matrix), state, bucket.group).reshape(stack.shape).unbind()

    def _finish(self, bucket: Bucket, directions: list[Tensor | None], works: list[dist.Work]) -> None:
        """Waits for the directions of other ranks, then decays and moves every parameter that has a gradient."""
        for work in works:
            work.wait()
        present = [i for i, p in enumerate(bucket.params) if p.grad is not None]
        if not present:
            return
        params = [bucket.params[i] for i in present]
        directions = [directions[i] for i in present]
        for hook in self._direction_hooks.values():
            names = [name for i in present for name in bucket.names[i]]
            hook(names, [matrix for d in directions for matrix in d.reshape(-1, *bucket.matrix)])
        group = bucket.group
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        scale = shape_scale(group["shape_scale"], *bucket.matrix)
        torch._foreach_add_(params, directions, alpha=-group["lr"] * scale)

    def register_direction_hook(self, hook: Callable[[list[str], list[Tensor]], None]) -> RemovableHandle:
        """Have hook(names, directions) called in each step for each stack, with k names and k matrices (m, n).

        The directions are those of all ranks, before shape scale and learning rate; they are views into the stack, to
        be copied if kept. Matrix i of a parameter that is several is called name[i].
        """
        handle = RemovableHandle(self._direction_hooks)
        self._direction_hooks[handle.id] = hook
        return handle

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:  # for copy.deepcopy; torch.optim's leaves out attributes like ours
        state = self.__dict__.copy()
        state.pop("step", None)  # a scheduler's wrapper, which steps the original
        return state

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's form, with the names of the parameters for their positions where they have names.

        Under torch.distributed `state` holds this rank's parameters only; the union over the ranks is the whole.
        """
        packed = super().state_dict()
        keys = [key for group in packed["param_groups"] for key in group.get("param_names", group["params"])]
        packed["state"] = {keys[position]: state for position, state in packed["state"].items()}
        for group in packed["param_groups"]:
            group["params"] = group.pop("param_names", group["params"])
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copies in the options and this rank's share of the state, by name, from a dict that may hold more.

        Raises ValueError, with nothing changed yet, if names, groups, shapes or dtypes differ.
        """
        own = self.state_dict()
        options = _match_groups(own["param_groups"], state_dict["param_groups"], self.layout)
        for group, saved in zip(self.param_groups, options, strict=True):
            self.check_group({**group, **saved})
        for key, state in own["state"].items():
            _check_state(key, state, state_dict["state"].get(key), self.layout)
        for group, saved in zip(self.param_groups, options, strict=True):
            group.update(saved)
        for key, state in own["state"].items():
            for part, tensor in state.items():
                tensor.copy_(state_dict["state"][key][part])


def matrix_shape(shape: tuple[int, ...], blocks: int = 1, tensors: str = "refuse") -> tuple[int, int]:
    """(m, n) of the matrices that a parameter of this shape is worked on as; see MatrixOptimizer for the options."""
    rows, n = (shape[0], math.prod(shape[1:])) if tensors == "flatten" else shape[-2:]
    return rows // blocks, n


def _check_parameter(name: str, p: Tensor, group: Mapping[str, Any]) -> None:
    if hasattr(p, "device_mesh"):
        problem = "it is a DTensor, and whole matrices are needed: use DDP"
    elif p.layout != torch.strided or not p.is_floating_point():
        problem = f"it must be dense and real, not {p.layout} and {p.dtype}"
    elif p.ndim < (1 if group["tensors"] == "flatten" else 2) or p.numel() == 0:
        problem = "it must have two dimensions and an entry; give others to AdamW"
    elif p.ndim > 2 and group["tensors"] == "refuse":
        problem = "it must have two dimensions; set tensors to stack or flatten for it, or give it to AdamW"
    elif p.size(0 if group["tensors"] == "flatten" else -2) % group["blocks"]:
        problem = f"its rows do not divide into blocks={group['blocks']}"
    else:
        return
    raise ValueError(f"{name!r} of shape {tuple(p.shape)} cannot be optimized as a matrix: {problem}")


def _match_groups(
    own: list[dict[str, Any]], saved: list[dict[str, Any]], layout: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The saved options for each own group, which is found again by the parameters in it."""
    here = {key for group in own for key in group["params"]}
    there = {key for group in saved for key in group["params"]}
    for keys, problem in ((here - there, "lacks"), (there - here, "holds the unknown")):
        if keys:
            raise ValueError(f"the state dict {problem} {min(keys)!r} ({len(keys)} such in all): another model's?")
    by_members = {frozenset(group["params"]): group for group in saved}
    matched = [by_members.get(frozenset(group["params"])) for group in own]
    if None in matched:
        raise ValueError("the state dict divides the parameters into other groups than this optimizer does")
    for group, found in zip(own, matched, strict=True):
        for option in layout:
            here, there = group[option], found.get(option, group[option])
            if here != there:
                where = f"for {group['params'][0]!r} where this optimizer has {option}={here}"
                raise ValueError(f"the state dict has {option}={there} {where}")
    return [{option: value for option, value in group.items() if option != "params"} for group in matched]


def _check_state(
    key: str | int, own: dict[str, Tensor], saved: Mapping[str, Tensor] | None, layout: tuple[str, ...]
) -> None:
    if saved is None:
        raise ValueError(f"the state dict has no state for {key!r}; join the state dicts of all ranks")
    if own.keys() != saved.keys():
        origin = f"it is of another optimizer, or of one with other {', '.join(layout)}"
        raise ValueError(f"the state of {key!r} must be {list(own)}, not {list(saved)}: {origin}")
    for part, tensor in own.items():
        if tensor.shape != saved[part].shape:
            raise ValueError(f"{part} of {key!r} must have shape {tuple(tensor.shape)}, not {tuple(saved[part].shape)}")
        if tensor.dtype != saved[part].dtype:
            problem = f"{part} of {key!r} must be {tensor.dtype}, not {saved[part].dtype}"
            raise ValueError(f"{problem}; build the optimizer with the dtypes that it was saved with")
