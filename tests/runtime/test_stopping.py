"""Signals: only noted while a run defers them, else they end it at once."""

import os
import signal

import pytest

from runtime.errors import Stopped
from runtime.stopping import SIGNALS, StopSignals


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_run_at_once_unless_it_is_deferred(number):
    with StopSignals() as stop, pytest.raises(Stopped, match=number.name):
        os.kill(os.getpid(), number)
    assert stop.asked == number.name


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_deferred_signal_is_only_noted(number):
    with StopSignals() as stop:
        stop.defer()
        os.kill(os.getpid(), number)
        assert stop.asked == number.name
        assert str(stop.exception_after(3, 9)).startswith(f"{number.name}: stopped after step 3 of 9")


def test_the_message_says_how_far_the_work_is_saved():
    with StopSignals("before the first step") as stop:
        with pytest.raises(Stopped, match="SIGTERM: stopped before the first step"):
            os.kill(os.getpid(), signal.SIGTERM)
        stop.defer()
        stop.note_saved("after step 3")
        stop.raise_at_once()
        with pytest.raises(Stopped, match="SIGTERM: stopped after step 3"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_undisturbed_work_is_finished_before_the_run_ends():
    finished = False
    with StopSignals() as stop, pytest.raises(Stopped), stop.undisturbed():
        os.kill(os.getpid(), signal.SIGTERM)
        finished = True
    assert finished


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_does_not_wait():
    with StopSignals() as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_earlier_handlers_come_back_after_the_block():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_forked_worker_process_just_ends():
    with StopSignals() as stop:
        stop.defer()
        if not (child := os.fork()):
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
        assert stop.asked is None
