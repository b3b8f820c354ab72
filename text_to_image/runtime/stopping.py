"""Signals that ask a run to stop: it finishes the step under way, saves it, and ends with exit code 75."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Any

from runtime.errors import EXIT_STOPPED, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], Any] | int | None


class StopSignals(AbstractContextManager):
    """Within the block, a signal raises Stopped at once, or is only noted in `asked` while the run defers it.

    Raising at once is safe because every file is written under another name and renamed. A second SIGINT never
    waits. Outside the block, as in tests, no signal is caught and `asked` stays None.
    """

    def __init__(self, saved: str = "before anything was saved") -> None:
        self.asked: str | None = None  # the signal's name
        self.deferring = False
        self.saved = saved  # how far the work is saved; ends the message '<signal>: stopped <saved>'
        self._interrupts = 0
        self._earlier_handlers: dict[signal.Signals, Handler] = {}
        self._owner = os.getpid()

    def __enter__(self) -> "StopSignals":
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # by nohup
        listened = [number for number in SIGNALS if number not in ignored]
        self._earlier_handlers = {number: signal.signal(number, self._receive) for number in listened}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._earlier_handlers.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From here on a signal is only noted in `asked`; the run looks at it after each step."""
        self.deferring = True

    def raise_at_once(self) -> None:
        """From here on a signal ends the run at once."""
        self.deferring = False

    def note_saved(self, saved: str) -> None:
        """Says how far the work is saved, for the message of a stop."""
        self.saved = saved

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within the block a signal is only noted; Stopped is raised at the block's end."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        if self.asked:
            raise Stopped(self._message())

    def exception_after(self, step: int, steps: int) -> Stopped:
        """The exception to raise once checkpoint-`step` is written."""
        return Stopped(
            f"{self.asked or 'a signal to another process'}: stopped after step {step} of {steps}, saved in "
            f"checkpoint-{step}; the same command goes on from there"
        )

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked worker process that reads pictures
            os._exit(EXIT_STOPPED)
        self.asked = signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not self.deferring:
            raise Stopped(self._message())

    def _message(self) -> str:
        return f"{self.asked}: stopped {self.saved}"
