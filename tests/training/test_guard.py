import math

import pytest
import torch

from training.guard import DivergedError, require_finite


def linear_stack():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def test_finite_numbers_pass():
    require_finite(linear_stack(), 1.0, 2.0, 3, 0.1, "none")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_message_names_step_layer_lr_and_checkpoint(bad):
    model = linear_stack()
    model[1].weight.grad[0, 0] = bad
    with pytest.raises(DivergedError, match=r"step 7.*learning rate 0.1.*gradient: 1.weight.*last checkpoint: ck/7"):
        require_finite(model, 1.0, bad, 7, 0.1, "ck/7")


def test_non_finite_loss_alone_is_enough():
    with pytest.raises(DivergedError, match=r"loss nan.*gradient: none.*last checkpoint: none"):
        require_finite(linear_stack(), math.nan, 1.0, 7, 0.1, "none")
