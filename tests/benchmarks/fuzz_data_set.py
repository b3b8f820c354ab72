"""Mutates metadata.jsonl files and pictures and puts each through the trainer's check of a data set.

    python tests/benchmarks/fuzz_data_set.py

Every one must end with exit code 0 or 2: no traceback, no hang, and nothing written or changed in the folder.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "text_to_image"))

from data.dataset import read_pictures  # noqa: E402
from runtime.errors import exit_with  # noqa: E402

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


def check(folder: Path) -> tuple[int | str, float]:
    """The exit code, or the name of what went wrong; and how long it took."""
    before, begun = snapshot(folder), time.perf_counter()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST)
    outcome: int | str = "no end"
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            exit_with(lambda: read_pictures(folder, True) and None)
    except SystemExit as ended:
        outcome = (
            ended.code
            if ended.code == 0 or said.getvalue().startswith("error: ")
            else f"no message: {said.getvalue()}"
        )
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.alarm(0)
    took = time.perf_counter() - begun
    return outcome if snapshot(folder) == before else "the folder was changed", took


def snapshot(folder: Path) -> dict:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


def pictures_of_all_kinds(folder: Path) -> list[Path]:
    """A small picture in each format, with what formats may carry: EXIF, ICC, palettes, 16 bits, CMYK, frames."""
    image = Image.effect_noise((48, 40), 60).convert("RGB")
    exif = image.getexif()
    exif[274] = 6
    image.save(folder / "a.jpg", exif=exif)
    image.convert("CMYK").save(folder / "b.jpg")
    image.save(folder / "c.png")
    image.convert("P").save(folder / "d.png", transparency=0)
    image.convert("I;16").save(folder / "e.png")
    image.save(folder / "f.webp")
    image.save(folder / "g.tif", compression="tiff_lzw")
    image.convert("P").save(folder / "h.gif", save_all=True, append_images=[image.convert("P")] * 2)
    image.save(folder / "i.bmp")
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
        outcomes[check(folder)[0]] += 1
    return outcomes


def fuzz_pictures(count: int, work: Path, rng: random.Random) -> Counter:
    good = work / "good"
    good.mkdir()
    originals, outcomes = pictures_of_all_kinds(good), Counter()
    for number in range(count):
        original = originals[number % len(originals)]
        folder = work / "picture"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / original.name).write_bytes(mutate(original.read_bytes(), rng))
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": original.name, "text": "a"}) + "\n")
        outcomes[check(folder)[0]] += 1
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
    print(f"{time.perf_counter() - begun:.0f} s")
    return any(set(outcomes) - {0, 2} for outcomes in found.values())


if __name__ == "__main__":
    sys.exit(main())
