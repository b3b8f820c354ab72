"""Signals that ask a run to stop: the step under way is finished and saved, then the run ends with exit code 75."""

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from runtime.errors import EXIT_STOPPED, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals(AbstractContextManager):
    """While the block lasts, a signal is noted where the run is `deferring`, and ends it at once elsewhere.

    Whatever is written is written beside and renamed, so nothing is left half done where it ends at once. A second
    SIGINT never waits. Without the block, in tests for instance, no signal is heard and `asked` stays None.
    """

    def __init__(self) -> None:
        self.asked: str | None = None  # the signal's name
        self.deferring = False
        self.saved = "before the first step; what is encoded is kept"  # told where it ends at once
        self.interrupts = 0
        self._before: dict = {}
        self._owner = os.getpid()

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """For what is to be done wholly: a signal is noted meanwhile, and obeyed at the block's end."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        if self.asked:
            raise Stopped(self._at_once())

    def words(self, step: int, steps: int) -> str:
        return (
            f"{self.asked or 'a signal to another process'}: stopped after step {step} of {steps}, saved in "
            f"checkpoint-{step}; the same command goes on from there"
        )

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a process that reads pictures for this one
            os._exit(EXIT_STOPPED)
        self.asked = signal.Signals(number).name
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt
        if not self.deferring:
            raise Stopped(self._at_once())

    def _at_once(self) -> str:
        return f"{self.asked}: stopped {self.saved}"
