"""What was measured, row by row: kept in OUT/gpu.json and OUT/gpu.md, which are written again after every row.

Standard library only.
"""

import faulthandler
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

OK, FAILED, SKIPPED, RUNNING = "ok", "failed", "skipped", "running"
TRACEBACK_LINES = 12
LEAST_PATIENCE = 150  # seconds: a row that takes longer than this, and than six times its due, hangs
UNUSABLE = 3  # exit code of a process whose GPU no longer answers


class Skipped(Exception):
    """The row cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Measurement:
    """A row to come: `work` measures it and returns its numbers by name; any exception of it fails the row."""

    name: str
    work: Callable[[], dict]
    seconds: float = 10.0  # it takes about so long on a large GPU; with less time left it is skipped


@dataclass
class Row:
    """One line of the report."""

    group: str
    name: str
    status: str
    seconds: float = 0.0
    measured: dict = field(default_factory=dict)
    reason: str = ""  # why it failed or was skipped

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value}" for name, value in self.measured.items())
        return f"{self.status:8}{self.seconds:6.1f} s  {self.group}: {self.name}: {numbers}{self.reason}"


class Report:
    """The rows so far, in their files. One process at a time writes it."""

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "gpu.json"
        self.rows = [Row(**row) for row in json.loads(file.read_text())] if file.is_file() else []

    def find(self, group: str, name: str) -> Row | None:
        return next((row for row in self.rows if (row.group, row.name) == (group, name)), None)

    def running(self) -> Row | None:
        """The row under way, or the one that its process died of."""
        return next((row for row in self.rows if row.status == RUNNING), None)

    def put(self, row: Row) -> None:
        """Adds the row, or replaces the one of its name."""
        earlier = self.find(row.group, row.name)
        if earlier:
            self.rows[self.rows.index(earlier)] = row
        else:
            self.rows.append(row)
        _write_atomically(self.folder / "gpu.json", json.dumps([asdict(row) for row in self.rows], indent=1) + "\n")
        _write_atomically(self.folder / "gpu.md", as_markdown(self.rows))

    def measure(self, group: str, measurement: Measurement, deadline: float) -> Row:
        """Runs one measurement and records how it went; `deadline` in seconds since the epoch."""
        left = deadline - time.time()
        if left < measurement.seconds:
            reason = f"no time: {max(left, 0):.0f} s are left, it needs about {measurement.seconds:.0f} s"
            row = Row(group, measurement.name, SKIPPED, reason=reason)
        else:
            self.put(Row(group, measurement.name, RUNNING))
            row = _timed(group, measurement)
        self.put(row)
        return row


def _timed(group: str, measurement: Measurement) -> Row:
    begun = time.perf_counter()
    # What hangs is ended, with the stacks of all threads in the log; the caller starts the rest anew.
    faulthandler.dump_traceback_later(max(LEAST_PATIENCE, 6 * measurement.seconds), exit=True)
    row = Row(group, measurement.name, OK)
    try:
        row.measured = measurement.work()
    except Skipped as reason:
        row.status, row.reason = SKIPPED, str(reason)
    except Exception:
        lines = traceback.format_exc().strip().splitlines()
        row.status, row.reason = FAILED, "\n".join(lines[-TRACEBACK_LINES:])
    finally:  # or it would end whatever this process does next
        faulthandler.cancel_dump_traceback_later()
    row.seconds = round(time.perf_counter() - begun, 1)
    return row


def as_markdown(rows: list[Row]) -> str:
    """The report for a reader: what machine it is, then a table for each group."""
    machine = [f"- {name}: {value}" for row in rows if row.group == "machine" for name, value in row.measured.items()]
    groups = dict.fromkeys(row.group for row in rows if row.group != "machine")
    counts = ", ".join(f"{sum(row.status == status for row in rows)} {status}" for status in (OK, FAILED, SKIPPED))
    parts = ["# What a GPU measured", "\n".join(machine), f"Rows: {counts}."]
    return "\n\n".join([*parts, *(_table(group, [r for r in rows if r.group == group]) for group in groups)]) + "\n"


def _table(group: str, rows: list[Row]) -> str:
    names = [name for row in rows for name in row.measured]
    columns = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    head = ["what", "result", "seconds", *columns, "also"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        numbers = [str(row.measured.get(name, "")) for name in columns]
        result = f"{row.status}: {row.reason}" if row.status == SKIPPED else row.status
        also = ", ".join(f"{name}: {value}" for name, value in row.measured.items() if name not in columns)
        lines.append(_line([row.name, result, f"{row.seconds:.1f}", *numbers, also]))
    reasons = [f"{row.name}:\n\n```text\n{row.reason}\n```" for row in rows if row.status == FAILED]
    return "\n\n".join([f"## {group}", "\n".join(lines), *reasons])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
