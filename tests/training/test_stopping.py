"""Signals as a flag, on this process."""

import os
import signal
from dataclasses import dataclass

import pytest
import torch

from training.runtime import Runtime
from training.signals import SIGNALS
from training.stopping import Stopped, stop_request

CPU = torch.device("cpu")
ALONE = Runtime(CPU, 0, 1, None, False)


@dataclass(frozen=True)
class OneOfTwo(Runtime):
    """A rank whose other was asked, or was not."""

    other: bool = False

    def any(self, here):
        return here or self.other


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_a_flag_within_the_block_and_what_it_was_after_it(number):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with stop_request(ALONE) as request:
        assert not request.asked
        send(number)
        assert request.asked and not request.agreed
        request.raise_if_agreed()
        with pytest.raises(Stopped):
            request.check()
        assert request.agreed
        with pytest.raises(Stopped):
            request.raise_if_agreed()
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_a_hangup_under_nohup_is_ignored_but_not_by_ranks(under_torchrun, monkeypatch):
    """torchrun heeds it under nohup too, and kills ranks that do not end."""
    monkeypatch.setattr(os, "environ", {"TORCHELASTIC_RUN_ID": "none"} if under_torchrun else {})
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_request(ALONE) as request:
        send(signal.SIGHUP)
        assert request.asked == under_torchrun
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_handlers_are_put_back_when_the_block_raises():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="in the block"), stop_request(ALONE):
        raise RuntimeError("in the block")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_ctrl_c_stops_one_process_at_once():
    with stop_request(ALONE) as request, pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
        assert request.asked
        send(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name)
def test_a_second_of_the_others_changes_nothing(number):
    with stop_request(ALONE) as request:
        send(number)
        send(number)
        assert request.asked


def test_under_torchrun_a_second_ctrl_c_is_the_first_once_more():
    with stop_request(OneOfTwo(CPU, 0, 2, None, False)) as request:
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert request.asked


def test_a_rank_that_was_not_asked_stops_with_the_other():
    with stop_request(OneOfTwo(CPU, 0, 2, None, False, other=True)) as request:
        with pytest.raises(Stopped):
            request.check()
        assert request.agreed and not request.asked
    with stop_request(OneOfTwo(CPU, 0, 2, None, False)) as request:
        request.check()
