"""metrics.jsonl as it is read: its rows, and which step has the lowest held-out loss."""

import contextlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict]:
    """The rows of metrics.jsonl, without a last line that a kill has cut in two."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def best_step(rows: Sequence[dict], among: Collection[int] | None = None) -> tuple[int, str, float] | None:
    """(step, name, loss) of the lowest held-out loss in the rows of metrics.jsonl, of the weights that are saved.

    `among` are the steps that count; None: all.
    """
    for name in ("val_loss_ema", "val_loss"):
        if measured := [row for row in rows if name in row and (among is None or row["step"] in among)]:
            best = min(measured, key=lambda row: row[name])
            return best["step"], name, best[name]
    return None
