"""What a comparison of checkpoints leaves: the sheet, checkpoints.jsonl, checkpoints.html, and what is printed."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.images import save_image
from evaluation.checkpoint_scores import CheckpointScore, recommend
from evaluation.copies_report import CopyReport
from generation.contact_sheet import make_contact_sheet
from generation.gallery import read_nearest, try_write_gallery
from generation.image_rows import SHEET_FILE
from generation.planned_images import PlannedImage
from generation.weights import GenerationWeights
from reporting.pages import try_write_page
from runtime.files import write_text_atomically
from runtime.paths import display_path

CHECKPOINTS_FILE, PAGE_FILE = "checkpoints.jsonl", "checkpoints.html"
COLUMNS = {  # of the tables: the measures' titles, and how they are written
    "val_loss": ("held-out loss", "{:.4f}"),
    "nearest": ("nearest", "{:.3f}"),
    "copies": ("copies", "{}"),
    "diversity": ("diversity", "{:.3f}"),
    "image_fidelity": ("image fidelity", "{:.3f}"),
    "prompt_fidelity": ("prompt fidelity", "{:.3f}"),
}
Row = dict[str, tuple[PlannedImage, str]]  # {checkpoint: (image, its file's name)}


@dataclass(frozen=True)
class Comparison:
    """The checkpoints of a run, and what was measured of their pictures."""

    models: Sequence[GenerationWeights]
    scores: Sequence[CheckpointScore]
    files: Mapping[PlannedImage, str]  # {image: its file's name}
    copies: CopyReport | None  # None without training pictures

    @property
    def names(self) -> list[str]:
        return [score.checkpoint for score in self.scores]


def picture_rows(files: Mapping[PlannedImage, str]) -> list[Row]:
    """One for each prompt, seed and settings, in the order of the plan."""
    rows: dict[Any, Row] = {}
    for image, name in files.items():
        key = image.prompt, image.seed, replace(image.settings, model="")
        rows.setdefault(key, {})[image.checkpoint or ""] = image, name
    return list(rows.values())


def write_sheet(
    args: argparse.Namespace, models: Sequence[GenerationWeights], files: Mapping[PlannedImage, str]
) -> Path:
    """The contact sheet: a row for each prompt and seed, a column for each checkpoint."""
    cells = [cell for row in picture_rows(files) for cell in row.values()]
    paths = [args.output_dir / name for _, name in cells]
    captions = [(f"{image.checkpoint}: {image.prompt}", image.seed) for image, _ in cells]
    sheet = make_contact_sheet(paths, captions, models[-1].name, columns=len(models))
    return save_image(sheet, args.output_dir / SHEET_FILE)


def report(args: argparse.Namespace, comparison: Comparison) -> None:
    """Writes checkpoints.jsonl and the pages, prints the table; the last line says which checkpoint to take."""
    folder, scores = args.output_dir, comparison.scores
    rows = [json.dumps(score.to_row(), ensure_ascii=False) + "\n" for score in scores]
    write_text_atomically(folder / CHECKPOINTS_FILE, "".join(rows))
    try_write_gallery(folder)
    best, reason = recommend(scores)
    written = try_write_page(folder / PAGE_FILE, "checkpoints.html", **page_content(folder, comparison, best, reason))
    print_table(comparison)
    where = display_path(folder / (PAGE_FILE if written else SHEET_FILE))
    print(f"by the numbers {best.checkpoint} is the one to take: {reason}; looking is better: {where}", flush=True)


# --- printed --------------------------------------------------------------------------------------------------------


def print_table(comparison: Comparison) -> None:
    measures, width = measured(comparison.scores), max(map(len, [*comparison.names, "checkpoint"]))
    print("  ".join([f"{'checkpoint':<{width}}", *(COLUMNS[measure][0] for measure in measures)]))
    for score in comparison.scores:
        cells = [f"{written(score, measure):>{len(COLUMNS[measure][0])}}" for measure in measures]
        print("  ".join([f"{score.checkpoint:<{width}}", *cells]))
    if comparison.copies and comparison.copies.scale.is_inconclusive:
        print("training pictures are as similar to each other as copies are: the count of copies says little")


def measured(scores: Sequence[CheckpointScore]) -> list[str]:
    """The measures that any checkpoint has."""
    return [measure for measure in COLUMNS if any(getattr(score, measure) is not None for score in scores)]


def written(score: CheckpointScore, measure: str) -> str:
    value = getattr(score, measure)
    return "–" if value is None else COLUMNS[measure][1].format(value)


# --- the page -------------------------------------------------------------------------------------------------------


def page_content(folder: Path, comparison: Comparison, best: CheckpointScore, reason: str) -> dict[str, Any]:
    """What the template checkpoints.html shows."""
    scores, copies = comparison.scores, comparison.copies
    measures = measured(scores)
    nearest = read_nearest(folder) if copies else {}
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in picture_rows(comparison.files):
        [prompt, seed] = next((image.prompt, image.seed) for image, _ in row.values())
        cells = [_cell(row.get(name), nearest) for name in comparison.names]
        prompts.setdefault(prompt, []).append({"seed": seed, "cells": cells})
    return {
        "run": comparison.models[-1].name,
        "names": comparison.names,
        "titles": [COLUMNS[measure][0] for measure in measures],
        "table": [(score.checkpoint, [written(score, measure) for measure in measures]) for score in scores],
        "prompts": prompts,
        "pictures": len(comparison.files),
        "limit": copies.scale.limit if copies else None,
        "inconclusive": bool(copies and copies.scale.is_inconclusive),
        "measures": measures,
        "best": best.checkpoint,
        "reason": reason,
    }


def _cell(found: tuple[PlannedImage, str] | None, nearest: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """A picture of the table; None where it is missing."""
    if found is None:
        return None
    image, name = found
    return {**image.to_row(name), "nearest": nearest.get(name)}
