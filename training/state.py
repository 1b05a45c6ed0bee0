"""All that a run's next step depends on, as named tensors: weights, optimizer state, random numbers.

Each rank has its part: rank 0 what all ranks share, every rank the state of the matrices it owns (see
optim/matrix_optimizer.py) and its random numbers. The union is the whole, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optim import MatrixOptimizer
from training.checkpoints import Checkpoint, CheckpointError
from training.runtime import Runtime

Optimizers = Mapping[str, torch.optim.Optimizer]


def gather_state(model: nn.Module, optimizers: Optimizers, rt: Runtime) -> dict[str, Tensor]:
    """This rank's part, not copied: model.NAME, optimizer.LABEL.NAME/PART and random.RANK.DEVICE."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()} if rt.is_main else {}
    names = {p: name for name, p in model.named_parameters()}
    for label, optimizer in optimizers.items():
        if rt.is_main or isinstance(optimizer, MatrixOptimizer):
            for p, parts in optimizer.state.items():
                state |= {f"optimizer.{label}.{names[p]}/{part}": tensor for part, tensor in parts.items()}
    state[f"random.{rt.rank}.cpu"] = torch.get_rng_state()
    if rt.device.type == "cuda":
        state[f"random.{rt.rank}.cuda"] = torch.cuda.get_rng_state(rt.device)
    return state


def options(optimizers: Optimizers) -> dict[str, list[dict[str, Any]]]:
    """What steps change in the options of every group, for the manifest: their number. The rest is configuration."""
    return {
        label: [{k: v for k, v in group.items() if k == "step"} for group in optimizer.param_groups]
        for label, optimizer in optimizers.items()
    }


def restore_state(model: nn.Module, optimizers: Optimizers, checkpoint: Checkpoint, rt: Runtime) -> None:
    """Put model, optimizers and random numbers where they were; raises CheckpointError if they do not fit."""
    try:
        model.load_state_dict(weights(checkpoint))
        for label, optimizer in optimizers.items():
            _restore_optimizer(model, label, optimizer, checkpoint)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise CheckpointError(f"checkpoint {checkpoint.path} is not of this model: {reason}") from error
    random = _select(checkpoint, f"random.{rt.rank}.")  # a rank that was not there then keeps its own
    if "cpu" in random:
        torch.set_rng_state(random["cpu"])
    if "cuda" in random and rt.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], rt.device)


def _restore_optimizer(model: nn.Module, label: str, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Through load_state_dict of the optimizer, which checks names, shapes and dtypes of what it keeps."""
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _select(checkpoint, f"optimizer.{label}.").items():
        name, part = key.rsplit("/", 1)
        saved.setdefault(name, {})[part] = tensor
    names = {p: name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    packed = optimizer.state_dict()
    for group, values in zip(packed["param_groups"], checkpoint.content["options"][label], strict=True):
        group.update(values)
    if isinstance(optimizer, MatrixOptimizer):  # its state goes by name, those of torch by position
        packed["state"] = saved
    else:
        packed["state"] = {i: saved[names[p]] for i, p in enumerate(params) if names[p] in saved}
        _check_moments(label, saved, {names[p]: p for p in params})
    optimizer.load_state_dict(packed)


def _check_moments(label: str, saved: Mapping[str, Mapping[str, Tensor]], params: Mapping[str, Tensor]) -> None:
    """What torch does not: that all parameters have a state, or none yet, with the same parts in their shape."""
    if not saved:
        return
    if strange := saved.keys() ^ params.keys():
        raise ValueError(f"the {label} state of {min(strange)} is missing or unknown")
    parts = set().union(*saved.values())
    for name, state in saved.items():
        if missing := parts - state.keys():
            raise ValueError(f"the {label} state of {name} lacks {min(missing)}")
        for part, tensor in state.items():
            if tensor.ndim and tensor.shape != params[name].shape:
                raise ValueError(f"{part} of {name} has shape {tuple(tensor.shape)}, not {tuple(params[name].shape)}")


def weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The state_dict of the model in a checkpoint, on the CPU."""
    return _select(checkpoint, "model.")


def _select(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, which is taken off."""
    found = checkpoint.tensors(lambda name: name.startswith(prefix))
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}
