"""Finds generated pictures that are copies of training pictures; `check_copies(args)` does it all."""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.images import open_image, read_image_size, save_image
from evaluation.calibration import calibrate
from evaluation.copies_report import CopyReport, Diversity, NearestMatch, make_copies_sheet, print_report
from evaluation.nearest_file import write_nearest
from evaluation.similarity import FeatureSimilarity, ImageSimilarity, StructuralSimilarity
from generation.gallery import try_write_gallery
from generation.image_rows import IMAGES_FILE, read_image_rows
from metadata.containers import find_containers, list_pictures
from metadata.hub_datasets import find_captioned_folder
from metadata.image_files import find_image_files
from metadata.picture_names import distinct_names
from metadata.reading import scan_captions
from runtime.errors import UserError, WorkError
from runtime.paths import can_write, display_path

COPIES_SHEET_FILE = "copies_sheet.jpg"
EXAMPLE_SHEETS = {
    "example.jpg",
    "before_after.jpg",
    "three_in_new_out.jpg",
    "six_in_new_out.jpg",
    "run_page.jpg",
}  # committed in this repository's Generated_sample/
THUMBNAIL_SIDE = 384  # px: enough for every measure and the sheet, and hundreds fit into memory
MAX_COMPARED = 60  # pictures whose distances to all others are measured: all pairs would take minutes


def check_copies(args: argparse.Namespace) -> None:
    """Prints the nearest training picture of each generated one and writes the sheet.

    UserError if there are no pictures to compare; WorkError at the end if some could not be read.
    """
    sheet = sheet_path(args)
    similarity = load_similarity(args.embedder)
    generated, unreadable = open_pictures(generated_pictures(args.generated), "--generated", args.generated)
    where = args.metadata_file, args.image_column
    originals = [path for folder in args.dataset for path in training_pictures(folder, *where)]
    training, more_unreadable = open_pictures(originals, "--dataset", *args.dataset)
    print(f"{len(generated)} generated pictures, {len(training)} training pictures; {similarity.name}", flush=True)

    report = compare(similarity, generated, training)
    print_report(report)
    save_image(make_copies_sheet(report, generated, training), sheet)
    if (args.generated / IMAGES_FILE).is_file() and can_write(args.generated):
        write_nearest(args.generated, report.matches, training)
        try_write_gallery(args.generated)
    print(f"generated | nearest: {display_path(sheet)}")
    print(f"{report.copies} of {len(report.matches)} are copies", flush=True)
    if unreadable := [*unreadable, *more_unreadable]:
        raise WorkError("\n  ".join([f"{len(unreadable)} pictures could not be read and are left out:", *unreadable]))


def sheet_path(args: argparse.Namespace) -> Path:
    """Where the sheet goes. UserError if it cannot be written, or would become a picture of the data set."""
    if args.output:
        if args.output.suffix.lower() not in (".jpg", ".jpeg") or args.output.is_dir():
            raise UserError(f"--output {args.output}: the sheet is a JPEG; name a file that ends in .jpg")
        if not args.output.absolute().parent.is_dir():
            raise UserError(f"--output {args.output}: there is no folder {args.output.parent}")
        return args.output
    if args.generated.resolve() in [folder.resolve() for folder in args.dataset]:
        raise UserError("--generated is the data set itself: say with --output where the sheet goes")
    return args.generated / COPIES_SHEET_FILE


def load_similarity(embedder: str | None) -> ImageSimilarity:
    """By the features of the model `embedder`, or by structure if it is None. UserError if it cannot be loaded."""
    if not embedder:
        return StructuralSimilarity()
    from models.loading import quiet_libraries  # loads diffusers, which takes seconds

    quiet_libraries()
    return FeatureSimilarity(embedder)


# --- pictures -------------------------------------------------------------------------------------------------------


def generated_pictures(folder: Path) -> list[Path]:
    """The pictures of the newest model in images.jsonl; without that file all in the folder except the sheets.

    UserError if there are none.
    """
    if not folder.is_dir():
        raise UserError(f"--generated {folder}: no such folder; inference.py writes its pictures to Generated_sample/")
    found = [path for path in find_image_files(folder) if path.name not in EXAMPLE_SHEETS]
    rows = read_image_rows(folder / IMAGES_FILE)
    if not found:
        raise UserError(f"--generated {folder}: no pictures in it; inference.py generates some")
    names = {path.name for path in found}
    models = {name: row.get("model_hash") for name, row in rows.items() if name in names}  # the newest last
    if not models:
        return found
    newest = list(models.values())[-1]
    if others := sum(model != newest for model in models.values()):
        print(f"left out: {others} generated by other models")
    return [path for path in found if path.name in models and models[path.name] == newest]


def training_pictures(folder: Path, metadata_file: Path | None = None, image_column: str = "image") -> list[Path]:
    """The pictures that have a row where training reads them, whatever their captions; without any row all in the
    folder, and all in tar shards. UserError if there are none, or if one is missing."""
    if containers := find_containers(folder):
        return [path for container in containers for path in list_pictures(container, image_column)[0]]
    found = find_image_files(folder)
    folder = find_captioned_folder(folder, metadata_file) or folder
    rows = scan_captions(folder, named=metadata_file)
    if wrong := next((row for row in rows if row.picture_fault), None):
        raise UserError(f"{metadata_file or f'--dataset {folder}'}: {wrong.where}: {wrong.picture_fault}")
    if metadata_file and not rows:
        raise UserError(f"--metadata_file {metadata_file}: no rows in it; name the file that training read")
    if not (pictures := [folder / row.file_name for row in rows] or found):
        raise UserError(f"--dataset {folder}: no pictures in it")
    return pictures


def open_pictures(paths: Sequence[Path], flag: str, *folders: Path) -> tuple[dict[Path, Image.Image], list[str]]:
    """Thumbnails of the pictures, and a line for each that cannot be read. UserError if none can."""
    opened, unreadable = {}, []
    for path in paths:
        try:
            read_image_size(path)
            opened[path] = open_image(path)
            opened[path].thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
        except ValueError as error:
            unreadable.append(f"{path}: {error}")
    if not opened:
        named = ", ".join(f"{flag} {folder}" for folder in folders)
        raise UserError(f"{named}: no picture in {'them' if folders[1:] else 'it'} can be read; {unreadable[0]}")
    return opened, unreadable


# --- comparison -----------------------------------------------------------------------------------------------------


def compare(
    similarity: ImageSimilarity, generated: Mapping[Path, Image.Image], training: Mapping[Path, Image.Image]
) -> CopyReport:
    """Finds the nearest training picture of each generated one, and whether it is near enough to be a copy."""
    samples, originals = list(generated.values()), list(training.values())
    chosen = evenly_spaced(len(originals), MAX_COMPARED)
    between_originals = similarity.distances([originals[i] for i in chosen], originals, "training pictures")
    size = Counter(sample.size for sample in samples).most_common(1)[0][0]
    scale = calibrate(similarity, size, originals, chosen, between_originals)
    distances = similarity.distances(samples, originals, "generated pictures")
    return CopyReport(
        nearest_matches(list(generated), list(training), distances, scale.limit),
        scale,
        measure_diversity(similarity, samples),
        Diversity(mean_pair_distance(between_originals[:, chosen]), len(chosen), len(originals)),
    )


def measure_diversity(similarity: ImageSimilarity, pictures: Sequence[Image.Image]) -> Diversity:
    """The mean distance of all pairs of the pictures, or of 60 evenly spaced ones."""
    compared = [pictures[i] for i in evenly_spaced(len(pictures), MAX_COMPARED)]
    return Diversity(mean_pair_distance(similarity.distances(compared, compared)), len(compared), len(pictures))


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """All indices below `count`, or `most` of them spread from the first to the last."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def nearest_matches(
    generated: Sequence[Path], training: Sequence[Path], distances: np.ndarray, limit: float
) -> list[NearestMatch]:
    """The nearest first; `distances` are (generated, training). A copy is within `limit` of a training picture."""
    names = distinct_names(training)
    matches = [
        NearestMatch(
            path, nearest := training[row.argmin()], float(row.min()), bool(row.min() <= limit), names[nearest]
        )
        for path, row in zip(generated, distances, strict=True)
    ]
    return sorted(matches, key=lambda match: match.distance)


def mean_pair_distance(distances: np.ndarray) -> float | None:
    """The mean of (N, N) without the diagonal; None for a single picture."""
    return float(distances[~np.eye(len(distances), dtype=bool)].mean()) if len(distances) > 1 else None
