"""OUTPUT/report.html, the page of a run: made of the files in OUTPUT and what is known of its plan.

What was trained before a kill and after it comes from the same files, so a resumed run's curves have no seam.
"""

import datetime
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reporting.charts import Chart, histogram
from reporting.pages import write_page
from reporting.run_curves import loss_charts, other_charts
from reporting.run_facts import LISTED_CAPTION, RunFacts
from reporting.thumbnails import thumbnail
from runs.checkpoints import checkpoint_step, complete_checkpoints
from runs.metrics_file import METRICS_FILE, best_step, read_metrics
from runs.records import REPORT_FILE, read_run
from runs.validation_pictures import ValidationPicture, list_pictures, read_picture
from runtime.progress import format_duration

MOST_STEPS, MOST_PICTURES = 10, 100  # of the table prompt x step
CARD_SIDE, PICTURE_SIDE = 320, 400  # px of thumbnails, for screens that show two pixels in the place of one


@dataclass(frozen=True)
class RunState:
    """How the run stands: `kind` is running, stopped, failed or finished; `words` say why it ended."""

    kind: str = "running"
    words: str = ""


FINISHED = RunState("finished")


@dataclass(frozen=True)
class Thumbnails:
    """Made once: neither the data set nor a picture that was generated changes."""

    made: dict[tuple[Path, int], str] = field(default_factory=dict)

    def of(self, path: Path, side: int, shape: tuple[int, int] | None = None) -> str:
        """A data URI; empty where the file is gone or cannot be read any more."""
        try:
            key = path, path.stat().st_mtime_ns
            if key not in self.made:
                self.made[key] = thumbnail(path, side, shape)
            return self.made[key]
        except (OSError, ValueError):
            return ""


def write_run_page(folder: Path, facts: RunFacts, state: RunState, thumbnails: Thumbnails) -> None:
    """Writes OUTPUT/report.html, whole or not at all.

    ImportError where Jinja2 or matplotlib is not installed; OSError or WriteError where the disk refuses the page.
    """
    record, rows = read_run(folder) or {}, read_metrics(folder / METRICS_FILE)
    content = {
        "name": folder.resolve().name,
        "record": record,
        "datasets": datasets_of(record),
        "state": state,
        "facts": facts,
        "now": datetime.datetime.now().astimezone(),
        "figures": key_figures(record, rows, facts, state),
        "table": picture_table(folder, rows, thumbnails),
        "losses": loss_charts(rows),
        "others": other_charts(rows),
        "checkpoints": checkpoint_rows(folder, rows),
        "skipped": [row["step"] for row in rows if row.get("skipped")],
        "cards": [(picture, thumbnails.of(picture.path, CARD_SIDE, picture.size)) for picture in facts.pictures],
        "caption_lengths": caption_lengths(facts),
        "listed_caption": LISTED_CAPTION,
    }
    write_page(folder / REPORT_FILE, "run.html", **content)


def datasets_of(record: dict) -> list[str]:
    """Folders or hub ids, as they were named."""
    arguments = record.get("arguments", {})
    return [arguments.get("dataset", ""), *(arguments.get("more_datasets") or ())]


def key_figures(
    record: dict, rows: Sequence[dict], facts: RunFacts, state: RunState
) -> list[tuple[str, str, str]]:  # fmt: skip
    """(name, number, what to know of it): the most telling ones."""
    step, steps = rows[-1]["step"] if rows else 0, record.get("steps", 0)
    epoch = rows[-1]["epoch"] if rows else 0
    figures = [("Steps", f"{step:,}", f"of {steps:,}, epoch {epoch:.3g}")]
    if best := best_step(rows):
        figures.append(("Lowest held-out loss", f"{best[2]:.4f}", f"at step {best[0]:,}"))
    elif measured := [row["train_fixed_loss"] for row in rows if "train_fixed_loss" in row]:
        figures.append(("Loss on fixed noise", f"{measured[-1]:.4f}", f"{measured[0]:.4f} when first measured"))
    if rates := [row["images_per_second"] for row in rows if row.get("images_per_second")]:
        rate = statistics.median(rates[-200:])
        to_go = format_duration((steps - step) * facts.samples_per_step / rate)
        figures.append(("Pictures a second", f"{rate:.3g}", f"about {to_go} to go" if state.kind == "running" else ""))
    if memory := max((row.get("peak_memory_gb", 0) for row in rows), default=0):
        figures.append(("Peak memory", f"{memory:.3g} GB", record.get("device", "")))
    trained, held_out = facts.counts
    figures.append(("Pictures", f"{trained:,}", f"{held_out:,} more held out" if held_out else "none held out"))
    return figures


def checkpoint_rows(folder: Path, rows: Sequence[dict]) -> list[dict[str, Any]]:
    """The checkpoints that are kept, each with the losses that were measured after its step."""
    by_step = {row["step"]: row for row in rows}
    steps = [checkpoint_step(path) for path in complete_checkpoints(folder)]
    best = best_step(rows, among=steps)
    best_of_them = best and best[0]
    return [{"step": step, "best": step == best_of_them, "losses": by_step.get(step, {})} for step in steps]


def caption_lengths(facts: RunFacts) -> Chart | None:
    if not facts.caption_tokens:
        return None
    longest = max(facts.caption_tokens)
    note = f"Tokens of each picture's caption; the longest has {longest:,}."
    return histogram("Caption lengths", note, facts.caption_tokens, facts.token_marks)


# --- The validation pictures ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureTable:
    """Prompt x step: `rows` are (prompt, seed, a data URI for each step, empty where there is no picture)."""

    steps: Sequence[int]
    rows: Sequence[tuple[str, str, Sequence[str]]]
    best: int | None
    left_out: int  # pictures


def picture_table(folder: Path, rows: Sequence[dict], thumbnails: Thumbnails) -> PictureTable:
    """Of OUTPUT/validation/: at most ten steps, the first, the best and the last among them."""
    last = rows[-1]["step"] if rows else 0
    pictures = [picture for path in list_pictures(folder) if (picture := _read(path)) and picture.step <= last]
    steps, best = sorted({picture.step for picture in pictures}), best_step(rows)
    chosen = choose_steps(steps, best[0] if best else None)
    cells = {(p.prompt, p.seed, p.step): p.path for p in pictures if p.step in chosen}
    shown = list(dict.fromkeys((prompt, seed) for prompt, seed, _ in cells))[: MOST_PICTURES // max(1, len(chosen))]
    table = [
        (prompt, seed, [thumbnails.of(cells[key], PICTURE_SIDE) if (key := (prompt, seed, step)) in cells else ""
                        for step in chosen])
        for prompt, seed in shown
    ]  # fmt: skip
    count = sum((prompt, seed) in shown for prompt, seed, _ in cells)
    return PictureTable(chosen, table, best[0] if best else None, len(pictures) - count)


def _read(path: Path) -> ValidationPicture | None:
    try:
        return read_picture(path)
    except (OSError, ValueError):
        return None


def choose_steps(steps: Sequence[int], best: int | None) -> list[int]:
    """At most MOST_STEPS of them, evenly; in the place of the nearest one the best."""
    if len(steps) <= MOST_STEPS:
        return list(steps)
    chosen = [steps[round(index * (len(steps) - 1) / (MOST_STEPS - 1))] for index in range(MOST_STEPS)]
    if best is not None and best in steps and best not in chosen:
        nearest = min(range(1, MOST_STEPS - 1), key=lambda index: abs(chosen[index] - best))
        chosen[nearest] = best
    return chosen
