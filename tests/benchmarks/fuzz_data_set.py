"""Mutates metadata.jsonl files and pictures and puts each through what the scripts do with a data set.

    python tests/benchmarks/fuzz_data_set.py
    python tests/benchmarks/fuzz_data_set.py --metadata 0 --pictures 1000 --seed 1

Training's check and its reading of the pictures must end with exit code 0 or 2, captioning, --check and check_copies
with 0, 1 or 2; what is refused is named, and the whole picture beside it goes on. No traceback, no hang, and nothing
written or changed in the folder. A picture for which this does not hold is kept in the working directory.
"""

import argparse
import contextlib
import io
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageCms, PngImagePlugin

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "text_to_image"))

from captioning.audit import run_audit  # noqa: E402
from captioning.caption_file import locate_caption_file  # noqa: E402
from captioning.image_loading import open_ahead  # noqa: E402
from data.dataset import read_pictures  # noqa: E402
from data.images import load_pixel_values  # noqa: E402
from evaluation.copies import open_pictures  # noqa: E402
from runtime.errors import WorkError, exit_with  # noqa: E402

LONGEST = 20  # seconds that one check may take
PIECES = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b"\n", b"\r\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b"null",
    b"1e999", b"\\ud800", b"..", b"/", b"\x1b[2J", b"\xe2\x80\xa8", b"9" * 5000, b"[" * 3000, b"text", b"file_name",
]  # fmt: skip


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to six changes: bytes replaced, cut out, doubled, moved, or a piece that parsers dislike put in."""
    for _ in range(rng.randint(1, 6)):
        at, length = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 8, 64, 1024])
        before, middle, after = content[:at], content[at : at + length], content[at + length :]
        way = rng.randrange(5)
        if way == 0:
            content = before + rng.randbytes(len(middle)) + after
        elif way == 1:
            content = before + after
        elif way == 2:
            content = before + middle * 2 + after
        elif way == 3:
            content = after + before + middle
        else:
            content = before + rng.choice(PIECES) + middle + after
    return content


class Hang(BaseException):
    """No OSError, as TimeoutError is: those are what a damaged picture raises."""


def too_long(*_: object) -> None:
    raise Hang(f"more than {LONGEST} s")


def run(work: Callable[[], object], folder: Path) -> tuple[int | str, str]:
    """(the exit code, or what went wrong; all that was printed)."""
    before, outcome = snapshot(folder), "no end"
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
            exit_with(lambda: work() and None)
    except SystemExit as ended:
        outcome = ended.code
        if outcome and "error: " not in said.getvalue():
            outcome = f"no message: {said.getvalue()}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.alarm(0)
    return outcome if snapshot(folder) == before else "the folder was changed", said.getvalue()


def snapshot(folder: Path) -> dict:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


SIZE = (48, 40)


def pictures_of_all_kinds(folder: Path) -> list[Path]:
    """Small pictures in every format, with what it may carry: EXIF, ICC, palettes, 16 bits, CMYK, frames, text."""
    image = Image.effect_noise(SIZE, 60).convert("RGB")
    clear, palette, exif, info = image.copy(), image.convert("P"), image.getexif(), PngImagePlugin.PngInfo()
    clear.putalpha(image.convert("L"))
    exif[274] = 6
    info.add_text("workflow", "node " * 500, zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    several = {"save_all": True, "append_images": [image.resize((24, 20)).resize(SIZE)] * 2}
    for name, picture, settings in (
        ("a.jpg", image, {"exif": exif, "icc_profile": profile}),
        ("b.jpg", image.convert("CMYK"), {}),
        ("c.jpg", image, {"progressive": True, "quality": 95}),
        ("d.jpg", image, {"format": "MPO", "exif": exif, **several}),
        ("e.png", clear, {"pnginfo": info, "icc_profile": profile, "exif": exif}),
        ("f.png", palette, {"transparency": 0}),
        ("g.png", image.convert("I;16"), {}),
        ("h.png", image, several),
        ("i.webp", clear, {"exif": exif, "icc_profile": profile}),
        ("j.webp", image, {"lossless": True}),
        ("k.webp", image, several),
        ("l.avif", clear, {"exif": exif, "icc_profile": profile}),
        ("m.avif", image, several),
        ("n.tif", image, {"compression": "tiff_lzw", "exif": exif, "icc_profile": profile}),
        ("o.tif", image, {"exif": exif}),
        ("p.tif", image, {"compression": "jpeg"}),
        ("q.tif", image, {"save_all": True, "append_images": [image.copy()]}),
        ("r.bmp", image, {}),
        ("s.bmp", palette, {}),
        ("u.tif", image.convert("F"), {}),
        ("t.gif", palette, {"transparency": 0, **several}),
    ):
        picture.copy().save(folder / name, **settings)  # saving leaves settings of its format in a picture
    return sorted(folder.iterdir())


def fuzz_metadata(count: int, work: Path, rng: random.Random) -> Counter:
    folder = work / "metadata"
    folder.mkdir()
    names = [path.name for path in pictures_of_all_kinds(folder)]
    texts = ["One.", ["A thing, on white.", "two"], "A thing. Seen from the front."]
    rows = [{"file_name": name, "text": texts[i % 3]} for i, name in enumerate(names)]
    good = "".join(json.dumps(row) + "\n" for row in rows).encode()
    outcomes = Counter()
    for _ in range(count):
        (folder / "metadata.jsonl").write_bytes(mutate(good, rng))
        outcomes[run(lambda: read_pictures(folder, True), folder)[0]] += 1
    return outcomes


def mutate_picture(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, cut off, doubled, fields of the header changed, a huge size stated, or as `mutate`."""
    way = rng.randrange(6)
    if way == 0:
        return mutate(content, rng)
    if way == 1:
        return content[: rng.randrange(len(content))]
    if way == 2:
        at = rng.randrange(len(content))
        return content[:at] + content
    if way == 3:
        return with_another_size(content, rng)
    changed, reach = bytearray(content), len(content) if way == 4 else 96
    for _ in range(rng.choice([1, 2, 4, 16])):
        at = rng.randrange(min(reach, len(content)))
        flipped, other = changed[at] ^ 1 << rng.randrange(8), rng.choice([0, 1, 127, 255, rng.randrange(256)])
        changed[at] = flipped if way == 4 else other
    return bytes(changed) if way == 4 else with_right_checksum(bytes(changed))


def with_another_size(content: bytes, rng: random.Random) -> bytes:
    """The first number that may be the width or the height made huge or zero, with a checksum that is right again."""
    for number in rng.sample(SIZE, 2):
        for kind in rng.sample([">I", "<I", ">H", "<H"], 4):
            largest = 2 ** (8 * struct.calcsize(kind)) - 1
            other = rng.choice([0, 1, number + 1, 10_000, 20_000, 40_000, 65_535, 2**31 - 1, 2**32 - 1])
            if (at := content.find(struct.pack(kind, number), 8)) >= 0:
                field = struct.pack(kind, min(other, largest))
                return with_right_checksum(content[:at] + field + content[at + len(field) :])
    return content


def with_right_checksum(content: bytes) -> bytes:
    """A PNG whose header says what it says on purpose."""
    if content[12:16] != b"IHDR":
        return content
    return content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]


def caption_all(paths: list[Path]) -> None:
    if faults := [f"{path.name}: {fault}" for path, fault in open_ahead(paths) if isinstance(fault, str)]:
        raise WorkError("\n".join(faults))


def train_on_all(folder: Path) -> None:
    for picture in read_pictures(folder, True):
        assert load_pixel_values(picture.path, 16, 24).isfinite().all()


def check_all(paths: list[Path], folder: Path) -> None:
    if faults := open_pictures(paths, "--generated", folder)[1]:
        raise WorkError("\n".join(faults))


def use_picture(folder: Path, name: str) -> str:
    """The exit codes of the scripts on a folder with this picture and a whole one, or what went wrong."""
    paths = [folder / name, folder / WHOLE]
    works = {
        "training": lambda: train_on_all(folder),
        "captioning": lambda: caption_all(paths),
        "check_copies": lambda: check_all(paths, folder),
        "--check": lambda: run_audit(locate_caption_file(folder, None, False)),
    }
    codes = []
    for what, work in works.items():
        code, said = run(work, folder)
        if code not in (0, 2 if what == "training" else 1):
            return f"{what}: {code}"
        if what != "--check" and code and (name not in said or WHOLE in said):
            return f"{what}: not named alone: {said}"
        codes.append(code)
    if len({bool(code) for code in codes[:3]}) > 1 or (codes[0] and (not codes[3] or f"{name}: " not in said)):
        return f"the scripts do not agree: {codes}"
    return "refused" if codes[0] else "read"


WHOLE = "whole.png"


def fuzz_pictures(count: int, work: Path, rng: random.Random) -> Counter:
    good = work / "good"
    good.mkdir()
    originals, outcomes = pictures_of_all_kinds(good), Counter()
    for number in range(count):
        original = originals[number % len(originals)]
        suffix = original.suffix if rng.random() < 0.8 else rng.choice(originals).suffix
        name, folder = f"{original.stem}{suffix}", work / "picture"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / name).write_bytes(mutate_picture(original.read_bytes(), rng) or b"x")
        Image.linear_gradient("L").save(folder / WHOLE)
        rows = [json.dumps({"file_name": picture, "text": f"a {picture}"}) + "\n" for picture in (name, WHOLE)]
        (folder / "metadata.jsonl").write_text("".join(rows))
        outcome = use_picture(folder, name)
        if outcome not in ("read", "refused"):
            shutil.copy(folder / name, f"{number}-{name}")
            print(f"{number}, {name}: {outcome}", flush=True)
        outcomes[outcome] += 1
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metadata", type=int, default=2000, help="mutated metadata.jsonl files")
    parser.add_argument("--pictures", type=int, default=500, help="mutated pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, begun = random.Random(args.seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        found = {
            "metadata.jsonl": fuzz_metadata(args.metadata, Path(work), rng),
            "pictures": fuzz_pictures(args.pictures, Path(work), rng),
        }
    for what, outcomes in found.items():
        print(f"{sum(outcomes.values())} {what}: " + ", ".join(f"{n} x {code}" for code, n in outcomes.most_common()))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{time.perf_counter() - begun:.0f} s, at most {most:.1f} GB of memory")
    return any(set(outcomes) - {0, 2, "read", "refused"} for outcomes in found.values())


if __name__ == "__main__":
    sys.exit(main())
