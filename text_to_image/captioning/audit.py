"""A look at a folder of pictures and their captions before anything is trained on them."""

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from captioning.caption_file import CaptionFile
from data.images import EXIF_ORIENTATION, TURNS_BY_ORIENTATION, open_image, read_image_size
from data.metadata import ScannedRow
from runtime.errors import UserError, WorkError, escape_control_chars
from runtime.prefetching import prefetch
from runtime.progress import progress_bar

TINY = 256  # pixels: a shorter side below is enlarged twofold and more for Stable Diffusion 1.5
SEEN_AT = 512  # pixels, the longer side: how sharp a picture is depends on its size
# Of skimage's blur_effect, from 0 (sharp) to 1: photographs and flat-lay pictures on white come out at 0.2 to 0.5, and
# blurred with a radius of 3 of 512 pixels at 0.62 to 0.83, textures lowest.
BLURRED = 0.65
BLANK = 8  # levels of 255 between the darkest and the brightest pixel
# Of the 256 bits of a perceptual hash: different pictures of one kind of garment differ in 36 and more, one picture
# saved again, made smaller or a little brighter mostly in 0 to 16.
HASH_SIDE, ALIKE = 16, 24
SAME_COLOUR = 16  # levels of 255, on average over the picture: a hash knows no colours
PAIRS_AT_ONCE = 256


@dataclass(frozen=True)
class ImageFacts:
    """What is seen of one picture."""

    name: str
    fault: str | None = None
    width: int = 0
    height: int = 0
    turned: bool = False
    pixels: bytes = b""  # a hash of them all
    bits: bytes = b""  # a perceptual hash
    colour: tuple[float, ...] = ()  # mean red, green, blue
    blur: float = 0.0
    contrast: int = 255


@dataclass(frozen=True)
class Finding:
    """Something about one picture or row; `wrong`, or only worth knowing."""

    kind: str
    text: str
    wrong: bool = True


def missing_packages() -> str | None:
    """The line that helps where the packages that measure pictures are not installed, None where they are."""
    packages = {"imagehash": "ImageHash", "skimage": "scikit-image"}
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    return f"{' and '.join(missing)} not installed; pip install {' '.join(missing)}" if missing else None


def run_audit(file: CaptionFile) -> None:
    """Prints all that is found. WorkError where something is wrong."""
    if packages := missing_packages():
        raise UserError(f"--check: {packages}")
    findings = look_at(file, file.rows())
    report(findings)
    if wrong := sum(finding.wrong for finding in findings):
        things = "1 thing is" if wrong == 1 else f"{wrong} things are"
        raise WorkError(f"{things} wrong with the data in {file.image_dir}; the list stands above")


def print_audit(file: CaptionFile) -> None:
    """Prints what is found, the first of each kind; nothing follows from it."""
    if packages := missing_packages():
        print(f"no look at the data: {packages}")
    else:
        report(look_at(file, file.rows()), most=10)


def report(findings: Sequence[Finding], most: int | None = None) -> None:
    """Prints the findings by their kind, at most `most` of each."""
    kinds = list(dict.fromkeys(finding.kind for finding in findings))
    if not any(finding.wrong for finding in findings):
        print("a look at the data: nothing is wrong")
    else:
        print("a look at the data:")
    for kind in kinds:
        texts = [finding.text for finding in findings if finding.kind == kind]
        shown = texts[:most]
        more = [f"... and {len(texts) - len(shown)} more; --check lists all"] if len(shown) < len(texts) else []
        print(escape_control_chars("\n    ".join([f"  {kind}: {len(texts)}", *shown, *more])), flush=True)


def look_at(file: CaptionFile, rows: Sequence[ScannedRow]) -> list[Finding]:
    """All that is found, kind by kind, pictures in order."""
    paths = file.pictures()
    seen = prefetch(lambda path: view(path, file.name_of(path)), paths)
    views = [one for _, one in progress_bar(seen, total=len(paths), desc="looking at the pictures", unit="picture")]
    return [*look_at_files(file, rows), *look_at_pictures(views), *look_at_rows(rows, [one.name for one in views])]


def look_at_files(file: CaptionFile, rows: Sequence[ScannedRow]) -> list[Finding]:
    """What is neither captioned nor trained on."""
    deeper = file.without_row(rows, among=file.in_sub_folders())
    return [
        *(
            Finding("of a kind that cannot be read (save them as JPEG or PNG)", file.name_of(path))
            for path in file.unread()
        ),
        *(
            Finding("in sub-folders, without a row (--recursive captions them)", file.name_of(path), wrong=False)
            for path in deeper
        ),
    ]


def view(path: Path, name: str) -> ImageFacts:
    """Looks at one picture; what is wrong with one that cannot be read stands in `fault`."""
    import imagehash
    from skimage.measure import blur_effect

    try:
        width, height = read_image_size(path)
        picture = open_image(path)
        with Image.open(path) as image:
            turned = image.getexif().get(EXIF_ORIENTATION) in TURNS_BY_ORIENTATION
    except (OSError, ValueError) as error:
        return ImageFacts(name, fault=str(error))
    pixels = hashlib.sha256(repr(picture.size).encode())
    pixels.update(picture.tobytes())
    colour = tuple(np.asarray(picture.resize((16, 16), Image.Resampling.BOX)).mean((0, 1)).tolist())
    bits = np.packbits(imagehash.phash(picture, hash_size=HASH_SIDE).hash).tobytes()
    grey = picture.convert("L")
    grey.thumbnail((SEEN_AT, SEEN_AT), Image.Resampling.LANCZOS)
    darkest, brightest = grey.getextrema()
    blur = blur_effect(np.asarray(grey)) if min(width, height) >= TINY and brightest > darkest else 0.0
    return ImageFacts(
        name, None, width, height, turned, pixels.digest(), bits, colour, float(blur), brightest - darkest
    )


def look_at_pictures(views: Sequence[ImageFacts]) -> list[Finding]:
    whole = [one for one in views if one.fault is None]
    return [
        *(Finding("broken", f"{one.name}: {one.fault}") for one in views if one.fault),
        *(
            Finding(f"tiny (a shorter side below {TINY} pixels)", f"{one.name}: {one.width} x {one.height}")
            for one in whole if min(one.width, one.height) < TINY
        ),
        *(Finding("of one colour all over", one.name) for one in whole if one.contrast < BLANK),
        *(
            Finding(f"blurred (above {BLURRED} on a scale from 0 to 1)", f"{one.name}: {one.blur:.2f}")
            for one in whole if one.blur > BLURRED and one.contrast >= BLANK
        ),
        *repeated(whole),
        *(
            Finding("turned by EXIF, as training turns them too (a note)", one.name, wrong=False)
            for one in whole if one.turned
        ),
    ]  # fmt: skip


def repeated(views: Sequence[ImageFacts]) -> Iterator[Finding]:
    """Pictures that an earlier one equals, pixel by pixel or nearly."""
    first: dict[bytes, ImageFacts] = {}
    for one in views:
        if (same := first.setdefault(one.pixels, one)) is not one:
            yield Finding("the same picture twice", f"{one.name} = {same.name}")
    for one, like, distance in nearly_alike(list(first.values())):
        of_all = HASH_SIDE * HASH_SIDE
        yield Finding(
            "nearly the same picture twice", f"{one.name} ~ {like.name} ({distance} of {of_all} bits differ)"
        )


def nearly_alike(views: Sequence[ImageFacts]) -> Iterator[tuple[ImageFacts, ImageFacts, int]]:
    """(picture, the earlier one that it is most like, bits in which their hashes differ), where these are few.

    Blocks of rows at once: 10,000 pictures are 50 million pairs.
    """
    if not views:
        return
    bits = np.frombuffer(b"".join(one.bits for one in views), dtype=np.uint64).reshape(len(views), -1)
    colours = np.array([one.colour for one in views], dtype=np.float32).reshape(len(views), -1)
    for start in range(0, len(views), PAIRS_AT_ONCE):
        end = min(start + PAIRS_AT_ONCE, len(views))
        distances = np.zeros((end - start, end), dtype=np.uint16)
        for word in range(bits.shape[1]):
            distances += np.bitwise_count(bits[start:end, None, word] ^ bits[None, :end, word])
        rows, columns = np.nonzero(distances <= ALIKE)
        earlier = columns < rows + start
        rows, columns = rows[earlier], columns[earlier]
        alike = np.abs(colours[rows + start] - colours[columns]).max(1, initial=0) <= SAME_COLOUR
        best: dict[int, tuple[int, int]] = {}
        for row, column in zip(rows[alike].tolist(), columns[alike].tolist(), strict=True):
            best[row] = min(best.get(row, (ALIKE + 1, 0)), (int(distances[row, column]), column))
        yield from ((views[start + row], views[column], distance) for row, (distance, column) in best.items())


def look_at_rows(rows: Sequence[ScannedRow], names: Iterable[str]) -> list[Finding]:
    """What is wrong with rows, and which of the pictures `names` have none."""
    named = {PurePosixPath(row.file_name) for row in rows}
    return [
        *(
            Finding("rows without a picture", f"line {row.line}: {row.picture_fault}")
            for row in rows
            if row.picture_fault
        ),
        *(
            Finding("rows without a caption", f"line {row.line}: {row.caption_fault}")
            for row in rows
            if row.caption_fault
        ),
        *equal_captions(rows),
        *(Finding("pictures without a row", name) for name in names if PurePosixPath(name) not in named),
    ]


def equal_captions(rows: Iterable[ScannedRow]) -> Iterator[Finding]:
    """Captions that several rows have, whatever their capitals and spaces."""
    lines: dict[str, list[int]] = {}
    for row in rows:
        for caption in dict.fromkeys(" ".join(caption.casefold().split()) for caption in row.captions):
            lines.setdefault(caption, []).append(row.line)
    for caption, found in lines.items():
        if len(found) > 1:
            shown = caption if len(caption) <= 60 else caption[:57] + "..."
            several = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
            yield Finding("equal captions", f"lines {several}: {shown}")
