"""Real gradients, kept on request (`train.save_gradients_at`): what orthogonalizers are studied on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from optim import Rule, route
from training.checkpoints import save_tensors


def matrix_gradients(model: nn.Module, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Copies (m, n), float32 on the CPU, of the gradients of the parameters that `rules` send to the matrix optimizer.

    A parameter of several blocks, such as the fused QKV, gives name[0], name[1], ...: the matrices that an
    orthogonalizer sees. A parameter without gradient is left out.
    """
    gradients = {}
    for name, parameter, rule in route(model.named_parameters(), rules):
        if rule.optimizer == "matrix" and parameter.grad is not None:
            for i, block in enumerate(parameter.grad.chunk(rule.blocks)):
                key = f"{name}[{i}]" if rule.blocks > 1 else name
                gradients[key] = block.to("cpu", torch.float32, copy=True)
    return gradients


def save_gradients(model: nn.Module, rules: Sequence[Rule], run_dir: Path, step: int, name: str) -> None:
    """Write `matrix_gradients` into run_dir/gradients/step_NNNNNN.safetensors, with step and name of the run inside."""
    path = run_dir / "gradients" / f"step_{step:06d}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_tensors(path, matrix_gradients(model, rules), {"step": str(step), "name": name})
