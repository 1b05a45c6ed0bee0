"""Cross-entropy of a language-model head, with the logits of a CPU made and used a few rows at a time.

A batch of logits over 50,257 tokens is hundreds of megabytes that eager torch writes and reads six times; in chunks they stay near
the cache and the gradients of both factors follow at once. On a GPU torch.compile fuses the plain form.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
ROWS = 256  # tokens a chunk: fewer make slow matrix products, more leave the cache


def linear_cross_entropy(features: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(features @ weight[:vocab_size].T), an fp32 scalar in nats.

    features (N, d), weight (V, d) with V >= vocab_size, targets (N,); targets of IGNORE are left out.
    """
    if features.is_cpu and torch.is_grad_enabled():
        if torch.is_autocast_enabled("cpu"):
            features = features.to(torch.get_autocast_dtype("cpu"))
        return ChunkedCrossEntropy.apply(features, weight, targets, vocab_size)
    logits = F.linear(features, weight)[:, :vocab_size]
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss and, in the same pass, its gradients; backward scales these by the incoming scalar."""

    @staticmethod
    def forward(ctx, features: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        head = weight[:vocab_size].to(features.dtype)
        loss = torch.zeros((), dtype=torch.float32)
        grad_features, grad_weight = torch.empty_like(features), torch.empty_like(weight)
        buffer = features.new_empty(ROWS, vocab_size)
        chunks = zip(features.split(ROWS), targets.split(ROWS), grad_features.split(ROWS))
        for i, (x, y, grad_x) in enumerate(chunks):
            logits = torch.mm(x, head.T, out=buffer[: len(x)]).float()
            log_p = torch.log_softmax(logits, 1, out=logits)
            loss += F.nll_loss(log_p, y, ignore_index=IGNORE, reduction="sum")
            # The gradient of the logits: p - onehot(target), nothing for targets left out.
            p = log_p.exp_()
            at = y.clamp(min=0)[:, None]
            p.scatter_add_(1, at, torch.full_like(at, -1, dtype=p.dtype))
            p[y == IGNORE] = 0
            p = p.to(x.dtype)
            torch.mm(p, head, out=grad_x)
            if i == 0:
                grad_weight[:vocab_size] = p.T @ x
            elif p.dtype == grad_weight.dtype:
                grad_weight[:vocab_size].addmm_(p.T, x)
            else:
                grad_weight[:vocab_size] += p.T @ x
        grad_weight[vocab_size:] = 0
        ctx.save_for_backward(grad_features, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_features, grad_weight = ctx.saved_tensors
        return grad_features.mul_(grad), grad_weight.mul_(grad), None, None
