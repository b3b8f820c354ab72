"""Keeps the page of a run up to date while it trains: told of steps, it writes the page after those that matter."""

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from reporting.run_facts import RunFacts
from reporting.run_page import RunState, Thumbnails, write_run_page
from runs.records import REPORT_FILE
from runtime.errors import Stopped, first_line

MOST_OF_THE_TIME = 0.1  # that the page takes: where it takes long, it is written more seldom


class RunObserver:
    """Writes OUTPUT/report.html after the steps in `due`, and when the run ends. A page that fails ends nothing.

    `folder` gives OUTPUT, which may be moved; `facts` makes what is known of the plan, None: no page is wanted, or
    another process writes it.
    """

    def __init__(
        self, folder: Callable[[], Path], facts: Callable[[], RunFacts] | None, due: Collection[int]
    ):  # fmt: skip
        self.folder, self.make_facts, self.due = folder, facts, due
        self.facts: RunFacts | None = None
        self.thumbnails = Thumbnails()
        self.outdated = self.complained = False
        self.not_before = 0.0  # on the monotonic clock

    def follow(self, step: int, all_written: bool, paused: Callable[[], AbstractContextManager]) -> None:
        """After optimisation step `step`; `all_written`: its row is in metrics.jsonl. The clock is `paused`."""
        self.outdated |= step in self.due
        if self.outdated and all_written and self.make_facts and time.monotonic() >= self.not_before:
            with paused():
                self.write(RunState())

    @contextlib.contextmanager
    def until(self, end: RunState | None = None) -> Iterator[None]:
        """The page says how the block ended: stopped, failed, or, without an error, `end`."""
        try:
            yield
        except Stopped as stopped:
            self.write(RunState("stopped", str(stopped)))
            raise
        except Exception as error:
            self.write(RunState("failed", first_line(error)))
            raise
        if end:
            self.write(end)

    def write(self, state: RunState) -> None:
        """One line where it fails, for the first time."""
        if not self.make_facts:
            return
        began = time.monotonic()
        try:
            self.facts = self.facts or self.make_facts()
            write_run_page(self.folder(), self.facts, state, self.thumbnails)
        except ImportError as error:
            self._complain(f"{first_line(error)}; `pip install Jinja2 matplotlib`")
        except Exception as error:  # of a disk, a font, a picture: whatever it is, the run is not worse for it
            self._complain(first_line(error))
        self.outdated = False
        self.not_before = time.monotonic() + (time.monotonic() - began) / MOST_OF_THE_TIME

    def _complain(self, fault: str) -> None:
        if not self.complained:
            print(f"warning: {REPORT_FILE} is not written ({fault}); the run goes on without it", file=sys.stderr)
        self.complained = True
