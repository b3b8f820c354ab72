"""Signals: noted where a run defers them, ending it at once elsewhere."""

import os
import signal

import pytest

from runtime.errors import Stopped
from runtime.stopping import SIGNALS, StopSignals


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_it_ends_at_once_where_nothing_is_under_way(number):
    with StopSignals() as stop, pytest.raises(Stopped, match=number.name):
        os.kill(os.getpid(), number)
    assert stop.asked == number.name


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_it_is_only_noted_while_a_step_is_under_way(number):
    with StopSignals() as stop:
        stop.deferring = True
        os.kill(os.getpid(), number)
        assert stop.asked == number.name
        assert stop.words(3, 9).startswith(f"{number.name}: stopped after step 3 of 9")


def test_a_second_interrupt_does_not_wait():
    with StopSignals() as stop:
        stop.deferring = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_afterwards_everything_is_as_it_was():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_process_that_was_forked_off_just_ends():
    with StopSignals() as stop:
        stop.deferring = True
        if not (child := os.fork()):
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
        assert stop.asked is None
