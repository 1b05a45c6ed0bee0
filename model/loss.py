"""Cross-entropy of a language-model head, with the logits of a CPU made and used a few rows at a time.

The logits of a batch over 50,257 tokens are hundreds of megabytes, which eager torch writes and reads several times;
in chunks they stay near the cache, and the gradients of both factors follow at once. On a GPU torch.compile fuses the
plain form.
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
    if not features.is_cpu:
        return plain_cross_entropy(features, weight, targets, vocab_size)
    if torch.is_grad_enabled():
        if torch.is_autocast_enabled("cpu"):
            features = features.to(torch.get_autocast_dtype("cpu"))
        return ChunkedCrossEntropy.apply(features, weight, targets, vocab_size)
    chunks = zip(features.split(ROWS), targets.split(ROWS), strict=True)
    return sum(plain_cross_entropy(x, weight, y, vocab_size) for x, y in chunks)


def plain_cross_entropy(features: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The same, with all logits at once."""
    logits = F.linear(features, weight)[:, :vocab_size]
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss and, in the same pass, its gradients; backward scales these by the incoming scalar."""

    @staticmethod
    def forward(ctx, features: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        head = weight[:vocab_size].to(features.dtype)
        loss = torch.zeros((), dtype=torch.float32)
        grad_features, grad_weight = torch.empty_like(features), torch.empty_like(weight)
        grad_weight[vocab_size:] = 0
        grad_head = grad_weight[:vocab_size]
        buffer = features.new_empty(ROWS, vocab_size)
        chunks = (tensor.split(ROWS) for tensor in (features, targets, grad_features))
        for i, (x, y, grad_x) in enumerate(zip(*chunks, strict=True)):
            logits = torch.mm(x, head.T, out=buffer[: len(x)]).float()
            log_p = torch.log_softmax(logits, 1, out=logits)
            loss += F.nll_loss(log_p, y, ignore_index=IGNORE, reduction="sum")
            # The gradient of the logits is p - onehot(target), and nothing where the target is left out.
            at, real = y.clamp(min=0)[:, None], (y != IGNORE)[:, None]
            p = log_p.exp_().scatter_add_(1, at, torch.full_like(at, -1, dtype=log_p.dtype)).to(x.dtype)
            torch.mm(p, head, out=grad_x).mul_(real)
            if x.dtype == grad_head.dtype:
                torch.addmm(grad_head, p.T, x * real, beta=min(i, 1), out=grad_head)
            elif i == 0:
                grad_head.copy_(p.T @ (x * real))
            else:
                grad_head += p.T @ (x * real)
        ctx.save_for_backward(grad_features, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_features, grad_weight = ctx.saved_tensors
        return grad_features.mul_(grad), grad_weight.mul_(grad), None, None
