"""Failures that optimizers count in their states are told: when there are more, and in records."""

import math

import torch
from torch import nn

from optim import SOAP, Muon
from training.inspection import Failures
from training.runtime import Runtime

RT = Runtime(torch.device("cpu"), 0, 1, None, False)


def test_failures_are_summed_over_all_optimizers_and_told_when_there_are_more(capsys):
    params = [nn.Parameter(torch.ones(shape)) for shape in ((4, 6), (2, 3, 4), (5, 5))]
    optimizers = {
        "soap": SOAP(params[:1]),
        "stacks": SOAP(params[1:2], tensors="stack"),
        "muon": Muon(params[2:], orthogonalizer="svd"),  # counts none
    }
    failures = Failures(optimizers, RT)

    def told(*bad):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, math.nan if i in bad else 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        return failures.tell(), capsys.readouterr().err.count("left a matrix out")

    assert told() == ({}, 0)
    assert told(0) == ({"failures": 1}, 1)
    assert told() == ({"failures": 1}, 0)
    assert told(0, 1) == ({"failures": 4}, 1)  # both matrices of the stack
    assert failures.count == Failures(optimizers, RT).count == 4
