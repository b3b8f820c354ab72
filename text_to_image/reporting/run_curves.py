"""The curves of a run, from the rows of metrics.jsonl: losses, learning rate, speed, memory."""

from collections.abc import Sequence

import numpy as np

from reporting.charts import WIDE, Chart, Line, line_chart, smooth, thin_out
from runs.metrics_file import best_step

FIXED_LOSSES = (  # name in the rows, words, colour, whether it is of the EMA
    ("val_loss", "held out", "series-1", False),
    ("val_loss_ema", "held out, EMA", "series-1", True),
    ("train_fixed_loss", "training pictures", "series-3", False),
    ("train_fixed_loss_ema", "training pictures, EMA", "series-3", True),
)


def loss_charts(rows: Sequence[dict]) -> list[Chart]:
    """The training loss, and the losses on fixed noise, which are comparable from step to step."""
    return [chart for chart in (_training_loss(rows), _fixed_loss(rows)) if chart]


def other_charts(rows: Sequence[dict]) -> list[Chart]:
    charts = [
        _single(rows, "lr", "Learning rate", ""),
        _speed(rows),
        _single(rows, "peak_memory_gb", "Peak memory", "GB"),
    ]
    return [chart for chart in charts if chart]


def _values(rows: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have it; a skipped step has no loss."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None and not row.get("skipped")]
    return [step for step, _ in found], [value for _, value in found]


def _training_loss(rows: Sequence[dict]) -> Chart | None:
    steps, losses = _values(rows, "train_loss")
    if len(steps) < 2:
        return None
    raw, mean = thin_out(steps, losses), thin_out(steps, smooth(losses))
    lines = [Line("each step", *raw, colour="series-1", faint=True), Line("mean of neighbouring steps", *mean)]
    note = "Mean of neighbouring steps. It mostly shows which timesteps came up by chance."
    return line_chart("Training loss", note, lines, WIDE)


def _fixed_loss(rows: Sequence[dict]) -> Chart | None:
    lines = []
    for name, words, colour, is_ema in FIXED_LOSSES:
        steps, losses = _values(rows, name)
        if steps:
            lines.append(Line(words, steps, losses, colour, dashed=is_ema, dots=True))
    if not lines:
        return None
    best = best_step(rows)
    note = "The same pictures, noise and timesteps every time: lower is better."
    if best:
        note += f" Lowest held out: {best[2]:.4f} at step {best[0]:,} (circle)."
    return line_chart("Loss on fixed noise", note, lines, WIDE, best and (best[0], best[2]))


def _speed(rows: Sequence[dict]) -> Chart | None:
    steps, rates = _values(rows, "images_per_second")
    if len(steps) < 2:
        return None
    lines = [Line("each step", *thin_out(steps, rates), faint=True), Line("mean", *thin_out(steps, smooth(rates)))]
    return line_chart("Speed", f"Pictures a second; median {np.median(rates):.3g}.", lines)


def _single(rows: Sequence[dict], name: str, title: str, unit: str) -> Chart | None:
    steps, values = _values(rows, name)
    if len(steps) < 2:
        return None
    note = f"At most {max(values):.3g}{' ' + unit if unit else ''}."
    return line_chart(title, note, [Line(title, *thin_out(steps, values))])
