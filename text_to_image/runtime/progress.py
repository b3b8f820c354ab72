"""Progress bars and tables of what is printed, in a terminal or a log file."""

import os
import sys
from collections.abc import Sequence

from tqdm import tqdm

from runtime.errors import escape_control_chars


def print_table(rows: Sequence[tuple[str, str]], quiet: bool) -> None:
    if not quiet:
        width = max(len(name) for name, _ in rows)
        print(escape_control_chars("\n".join(f"{name:<{width}}  {text}" for name, text in rows)), flush=True)


def progress_bar(iterable=None, **settings) -> tqdm:
    """A progress bar; in a log file a line of its own every ten seconds, or TQDM_MININTERVAL."""
    if sys.stderr.isatty():
        return tqdm(iterable, **settings)
    seconds = float(os.environ.get("TQDM_MININTERVAL", 10))
    return tqdm(iterable, file=_Lines(), mininterval=seconds, maxinterval=seconds, **settings)


class _Lines:
    """Where a bar that is drawn again and again in one place becomes lines that follow each other."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def format_duration(seconds: float) -> str:
    """About how long, in the unit one would say."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
