"""Progress bars and two-column tables that read well in a terminal and in a log file."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from runtime.errors import escape_control_chars


def print_table(rows: Sequence[tuple[str, str]], quiet: bool) -> None:
    """Prints (name, text) rows in two columns; nothing when `quiet`, as on all processes but the main one."""
    if not quiet:
        width = max(len(name) for name, _ in rows)
        print(escape_control_chars("\n".join(f"{name:<{width}}  {text}" for name, text in rows)), flush=True)


def progress_bar(iterable: Iterable | None = None, **settings: Any) -> tqdm:
    """A tqdm bar. In a log file it is a line every ten seconds, or every TQDM_MININTERVAL seconds."""
    if sys.stderr.isatty():
        return tqdm(iterable, **settings)
    seconds = float(os.environ.get("TQDM_MININTERVAL", 10))
    return tqdm(iterable, file=_LogLines(), mininterval=seconds, maxinterval=seconds, **settings)


class _LogLines:
    """stderr for a bar in a log file: each redraw becomes a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def format_duration(seconds: float) -> str:
    """A rounded duration: '45 s', '12 min' or '3.5 h'."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
