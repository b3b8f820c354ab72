"""Standard output and error that never end a run: what cannot be written there is dropped, and said at the end."""

import contextlib
import io
import os
import select
import sys
from typing import Any, TextIO

NAMES = {"stdout": "standard output", "stderr": "standard error"}


class LossyFile(io.FileIO):
    """A descriptor to write to, whose failed writes are dropped: its disk is full, or its reader is gone."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.failure: OSError | None = None  # the first one

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # another program has made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            self.failure = self.failure or error
            return memoryview(data).nbytes


def make_streams_lossy() -> None:
    """Has what is printed from here on go through `LossyFile`. A closed stream becomes /dev/null.

    So does a closed standard input: the next file that is opened would take its place. Streams that are not the
    process's own, as in tests, stay as they are.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    for name in NAMES:
        if (stream := getattr(sys, name)) is getattr(sys, f"__{name}__"):
            setattr(sys, name, _lossy(stream))


def _lossy(stream: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    assert isinstance(stream, io.TextIOWrapper), "the process's own"
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(LossyFile(stream.fileno())),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )


def report_lost_output() -> None:
    """Says on standard error, where that can be written again, that something printed was lost."""
    for name, title in NAMES.items():
        stream = getattr(sys, name)
        stream.flush()
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        if isinstance(raw, LossyFile) and raw.failure:
            reason = raw.failure.strerror
            print(f"warning: {title} could not be written ({reason}): lines are missing there", file=sys.stderr)
