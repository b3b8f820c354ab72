"""Are generated pictures copies of the training pictures? `check(args)` measures, judges and shows it."""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from data.image_files import find_image_files
from data.images import open_image, read_image_size, save_image
from data.metadata import read_existing_captions
from evaluation.copies_sheet import make_copies_sheet
from evaluation.similarity import FeatureSimilarity, StructuralSimilarity, ground_of, resized_on_ground
from generation.output_files import IMAGES_FILE, read_image_rows
from runtime.errors import UserError, WorkError, escape_control_chars
from runtime.paths import display_path

SHEET_FILE = "copies_sheet.jpg"
# Of this repository, beside those that are never pictures of a run.
SHEETS = {"example.jpg", "before_after.jpg", "three_in_new_out.jpg"}
KEPT_SIDE = 384  # px: more than any measure or sheet here needs, and hundreds fit into memory
# How much farther than a known copy a copy may lie. On rendered jeans known copies are 0.04 away, other copies up to
# 0.035, and the nearest of 160 other garments 0.12 (0.10 among thirty pairs of jeans).
BEYOND_KNOWN = 1.5
COMPARED = 60  # samples, compared with each other, and training pictures, with all others: all pairs take minutes


@dataclass(frozen=True)
class NearestMatch:
    """A generated picture, the training picture nearest to it, and how near that is."""

    picture: Path
    nearest: Path
    distance: float
    is_copy: bool


@dataclass(frozen=True)
class Scale:
    """What the distances of a measure mean on this data set, by 60 of its pictures where there are more; `own` is
    empty for a single picture."""

    known: np.ndarray  # of each training picture, how far the farthest of its known copies lies
    own: np.ndarray  # of each training picture, how far the nearest other one lies

    @property
    def limit(self) -> float:
        """A copy lies within this: half as far again as known copies, but no farther than half of what lies between
        two training pictures, as long as that leaves the known copies within it."""
        known = float(np.median(self.known))
        within = BEYOND_KNOWN * known
        return max(known, min(within, float(np.median(self.own)) / 2)) if len(self.own) else within

    @property
    def is_blind(self) -> bool:
        """Whether training pictures are to each other what copies are: nothing can be told from such distances."""
        return bool(len(self.own)) and float(np.median(self.own)) <= 2 * float(np.median(self.known))


def check_copies(args: argparse.Namespace) -> None:
    """Prints what is found and writes the sheet. WorkError at the end where pictures could not be read."""
    sheet = sheet_path(args)
    likeness = _likeness(args.embedder)
    generated, faults = open_all(generated_pictures(args.generated), "--generated", args.generated)
    training, more_faults = open_all(training_pictures(args.dataset), "--dataset", args.dataset)
    print(f"{len(generated)} generated pictures, {len(training)} training pictures; {likeness.name}", flush=True)

    samples, originals = list(generated.values()), list(training.values())
    chosen = evenly(len(originals), COMPARED)
    among = likeness.distances([originals[i] for i in chosen], originals, "training pictures")
    scale = measure_scale(likeness, samples, originals, chosen, among)
    distances = likeness.distances(samples, originals, "generated pictures")
    findings = judge(list(generated), list(training), distances, scale.limit)

    _print_scale(scale, len(originals))
    _print_table(findings)
    _print_diversity(likeness, samples, among[:, chosen], len(originals))
    save_image(make_copies_sheet([_pair(f, generated, training) for f in findings], scale.limit), sheet)
    print(f"generated | nearest: {display_path(sheet)}")
    print(f"{sum(f.is_copy for f in findings)} of {len(findings)} are copies", flush=True)
    if faults := [*faults, *more_faults]:
        raise WorkError("\n  ".join([f"{len(faults)} pictures could not be read and are not counted:", *faults]))


def sheet_path(args: argparse.Namespace) -> Path:
    """Where the sheet goes; UserError rather than a picture among those to be trained on."""
    if args.output:
        if args.output.suffix.lower() not in (".jpg", ".jpeg") or args.output.is_dir():
            raise UserError(f"--output {args.output}: the sheet is a JPEG; name a file that ends in .jpg")
        if not args.output.absolute().parent.is_dir():
            raise UserError(f"--output {args.output}: there is no folder {args.output.parent}")
        return args.output
    if args.generated.resolve() == args.dataset.resolve():
        raise UserError("--generated is the data set itself: say with --output where the sheet goes")
    return args.generated / SHEET_FILE


def _likeness(embedder: str | None) -> StructuralSimilarity | FeatureSimilarity:
    if not embedder:
        return StructuralSimilarity()
    from models.loading import quiet_libraries  # loads diffusers, which takes seconds

    quiet_libraries()
    return FeatureSimilarity(embedder)


# --- the pictures ---------------------------------------------------------------------------------------------------


def generated_pictures(folder: Path) -> list[Path]:
    """Those that images.jsonl lists of the model that drew last, else all in the folder that are no sheets. UserError
    where there are none."""
    if not folder.is_dir():
        raise UserError(f"--generated {folder}: no such folder; inference.py draws into Generated_sample/")
    found = [path for path in find_image_files(folder) if path.name not in SHEETS]
    listed = read_image_rows(folder / IMAGES_FILE)
    if not found:
        raise UserError(f"--generated {folder}: no pictures in it; inference.py draws some")
    names = {path.name for path in found}
    models = {name: row.get("model_hash") for name, row in listed.items() if name in names}  # in the order of drawing
    if not models:
        return found
    last = list(models.values())[-1]
    if others := sum(model != last for model in models.values()):
        print(f"left out: {others} drawn by other models")
    return [path for path in found if path.name in models and models[path.name] == last]


def training_pictures(folder: Path) -> list[Path]:
    """Those that metadata.jsonl names, else all in the folder. UserError where there are none."""
    found = find_image_files(folder)
    if not (pictures := [row.path(folder) for row in read_existing_captions(folder)] or found):
        raise UserError(f"--dataset {folder}: no pictures in it")
    return pictures


def open_all(paths: Sequence[Path], flag: str, folder: Path) -> tuple[dict[Path, Image.Image], list[str]]:
    """Small copies of the pictures, and what is wrong with those that cannot be read. UserError where all cannot."""
    opened, faults = {}, []
    for path in paths:
        try:
            read_image_size(path)
            opened[path] = open_image(path)
            opened[path].thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.LANCZOS)
        except ValueError as fault:
            faults.append(f"{path}: {fault}")
    if not opened:
        raise UserError(f"{flag} {folder}: no picture in it can be read; {faults[0]}")
    return opened, faults


# --- what the distances mean ----------------------------------------------------------------------------------------


def evenly(count: int, most: int) -> np.ndarray:
    """All numbers below `count`, or `most` of them from the first to the last."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def measure_scale(
    likeness, samples: Sequence[Image.Image], originals: Sequence[Image.Image], chosen: np.ndarray, among: np.ndarray
) -> Scale:
    """How far copies of known making lie, in the shape that most samples have, and how far other pictures do: `among`
    (C, N) are the distances of the `chosen` C of N originals to all of them."""
    shape = Counter(sample.size for sample in samples).most_common(1)[0][0]
    known = [likeness.distances(known_copies(originals[i], shape), [originals[i]]).max() for i in chosen]
    others = among.copy()
    others[np.arange(len(chosen)), chosen] = np.inf
    return Scale(np.array(known), others.min(1) if len(originals) > 1 else np.array([]))


def known_copies(picture: Image.Image, shape: tuple[int, int]) -> list[Image.Image]:
    """What a model that has learned a picture by heart draws, roughly: each in another way not quite the same."""
    cut = ImageOps.fit(picture, shape, Image.Resampling.LANCZOS)
    soft = ImageOps.mirror(cut).filter(ImageFilter.GaussianBlur(max(shape) / 150))
    moved = Image.new("RGB", shape, ground_of(cut))
    moved.paste(_recoloured(cut), (round(0.035 * shape[0]), -round(0.02 * shape[1])))
    lighter = ImageEnhance.Brightness(resized_on_ground(cut, 0.95)).enhance(1.1)
    turned = cut.rotate(1, Image.Resampling.BICUBIC, fillcolor=ground_of(cut))
    return [soft, moved, lighter, turned]


def _recoloured(picture: Image.Image) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    return Image.merge("HSV", (hue.point(lambda level: (level + 100) % 256), saturation, value)).convert("RGB")


def judge(
    pictures: Sequence[Path], training: Sequence[Path], distances: np.ndarray, limit: float
) -> list[NearestMatch]:
    """The nearest first. Which is a copy: what is nearer than `limit` to any training picture."""
    found = [
        NearestMatch(picture, training[row.argmin()], float(row.min()), bool(row.min() <= limit))
        for picture, row in zip(pictures, distances, strict=True)
    ]
    return sorted(found, key=lambda finding: finding.distance)


def spread(likeness, pictures: Sequence[Image.Image]) -> float | None:
    """The mean distance between two of them (of 60, where there are more); None for a single one."""
    chosen = [pictures[i] for i in evenly(len(pictures), COMPARED)]
    return mean_of_pairs(likeness.distances(chosen, chosen))


def mean_of_pairs(among: np.ndarray) -> float | None:
    """Of the distances of pictures to each other, without those to themselves."""
    return float(among[~np.eye(len(among), dtype=bool)].mean()) if len(among) > 1 else None


# --- how it is told -------------------------------------------------------------------------------------------------


def _print_scale(scale: Scale, pictures: int) -> None:
    if pictures > len(scale.known):
        print(f"measured on {len(scale.known)} of the {pictures} training pictures, taken evenly:")
    found = int((scale.known <= scale.limit).sum())
    print(
        "known copies of a training picture (mirrored, softened, moved, recoloured, resized, turned by 1°) lie up to"
    )
    print(f"  {np.median(scale.known):.3f} away; all those of {found} of {len(scale.known)} pictures would be found")
    if len(scale.own):
        taken = int((scale.own <= scale.limit).sum())
        print(f"the nearest other training picture lies {np.median(scale.own):.3f} away;")
        print(f"  {taken} of {len(scale.own)} would be taken for copies of each other")
    print(f"a copy here is what lies within {scale.limit:.3f} of a training picture")
    if scale.is_blind:
        print("the training pictures resemble each other as copies do: look at the sheet, the count tells little")


def _print_table(findings: Sequence[NearestMatch]) -> None:
    width = max(len("nearest training picture"), *(len(f.nearest.name) for f in findings))
    print(f"\ndistance        {'nearest training picture':<{width}}  generated")
    for f in findings:
        row = f"{f.distance:8.3f}  {'copy' if f.is_copy else '':<4}  {f.nearest.name:<{width}}  {f.picture.name}"
        print(escape_control_chars(row))


def _print_diversity(likeness, samples: Sequence[Image.Image], among: np.ndarray, originals: int) -> None:
    print()
    if (apart := spread(likeness, samples)) is not None:
        of = f" ({COMPARED} of them)" if len(samples) > COMPARED else ""
        print(f"diversity: two generated pictures{of} are {apart:.3f} apart on average")
    if (apart := mean_of_pairs(among)) is not None:
        of = f" ({COMPARED} of them)" if originals > COMPARED else ""
        print(f"           two training pictures{of} are {apart:.3f} apart on average")


def _pair(finding: NearestMatch, generated: dict, training: dict) -> tuple[Image.Image, Image.Image, str, bool]:
    words = f"{finding.distance:.3f}{' copy of' if finding.is_copy else ' from'} {finding.nearest.name}"
    return generated[finding.picture], training[finding.nearest], words, finding.is_copy
