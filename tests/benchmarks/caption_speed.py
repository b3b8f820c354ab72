"""How fast img_captioning.py captions against a plain loop, and how much memory ten thousand pictures take.

python tests/benchmarks/caption_speed.py
python tests/benchmarks/caption_speed.py --pictures 0          the memory alone

The speed: a BLIP of the size of Salesforce/blip-image-captioning-base with random weights, JPEGs of 768 x 1024 pixels,
20 new tokens for each picture on both sides. The plain loop opens, captions and writes one picture after the other.
The memory: the script itself with a tiny BLIP over 10,000 pictures. Takes about four minutes on two cores and 3 GB of
the temporary folder (TMPDIR).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "text_to_image"), str(ROOT / "tests")]
NEW_TOKENS = 20


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.pictures:
            compare(Path(folder), args.pictures, args.rounds, args.batch_size)
        if args.many:
            measure_memory(Path(folder), args.many)


def compare(folder: Path, number: int, rounds: int, batch_size: int) -> None:
    """Both sides in turns, on the same model object; prints the median of each."""
    from PIL import Image
    from transformers.utils import logging

    from captioning.captioner_loading import load_captioner
    from runtime.devices import keep_freed_memory

    keep_freed_memory()  # for both sides: the plain loop gains little by it
    captioner = load_captioner(str(make_blip_base(folder / "blip-base")), None, NEW_TOKENS)
    captioner.model.text_decoder.generation_config.min_new_tokens = NEW_TOKENS
    logging.set_verbosity_error()
    images = [Image.open(path).convert("RGB") for path in sorted((ROOT / "dataset").glob("*.JPG"))]
    pictures = link_pictures(folder / "pictures", images, number)
    sides = {"plain loop": plain_loop, "img_captioning.py": lambda *two: own_loop(*two, batch_size)}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    first = link_pictures(folder / "first", images, 2)
    for side in sides.values():  # once before it counts
        timed(side, first, captioner)
    for _ in range(rounds):
        for name, side in sides.items():
            speeds[name].append(number / timed(side, pictures, captioner))
            print(f"{name}: {speeds[name][-1]:.3f} pictures/s", flush=True)
    plain, own = (statistics.median(found) for found in speeds.values())
    print(
        f"{sum(weight.numel() for weight in captioner.model.parameters()) / 1e6:.0f} M parameters, "
        f"{os.cpu_count()} cores: {plain:.3f} pictures/s one by one, {own:.3f} in batches of {batch_size}: "
        f"{own / plain:.2f} times as fast (medians of {rounds} rounds of {number} pictures)"
    )


def timed(side, pictures: Path, captioner) -> float:
    """Seconds."""
    (pictures / "metadata.jsonl").unlink(missing_ok=True)
    started = time.perf_counter()
    side(pictures, captioner)
    seconds = time.perf_counter() - started
    assert (pictures / "metadata.jsonl").read_bytes().count(b"\n") == len(list(pictures.glob("*.JPG")))
    return seconds


def plain_loop(folder: Path, captioner) -> None:
    """As one would write it down: each picture opened, captioned and written before the next."""
    import torch
    from PIL import Image

    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file, torch.inference_mode():
        for path in sorted(folder.glob("*.JPG")):
            image = Image.open(path).convert("RGB")
            inputs = captioner.processor(images=image, return_tensors="pt")
            tokens = captioner.model.generate(**inputs, max_new_tokens=NEW_TOKENS)
            text = captioner.processor.decode(tokens[0], skip_special_tokens=True)
            file.write(json.dumps({"file_name": path.name, "text": text}) + "\n")
            file.flush()


def own_loop(folder: Path, captioner, batch_size: int) -> None:
    """The script's loop: opened ahead, captioned in batches, written safe against a kill."""
    import contextlib
    import io

    from captioning.caption_file import locate_caption_file
    from captioning.caption_folder import caption_pending
    from img_captioning import parse_args

    args = parse_args(["--image_dir", str(folder), "--batch_size", str(batch_size)])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert not caption_pending(args, locate_caption_file(folder, None, False), captioner, "the model")


def measure_memory(folder: Path, number: int) -> None:
    """Prints the resident memory of the script as it goes through `number` pictures, and at most after that."""
    from PIL import Image

    from tiny_captioners import make_blip

    images = [Image.open(path).convert("RGB") for path in sorted((ROOT / "dataset").glob("*.JPG"))]
    pictures = link_pictures(folder / "many", [image.resize((288, 384)) for image in images], number)
    command = [
        sys.executable, ROOT / "text_to_image" / "img_captioning.py", "--image_dir", pictures,
        "--model", make_blip(folder / "tiny", "blue"), "--max_new_tokens", "2", "--batch_size", "16",
    ]  # fmt: skip
    started, done = time.perf_counter(), 0
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            done += line.endswith(".JPG: blue blue\n")
            if line.endswith(".JPG: blue blue\n") and done % (number // 10) == 0:
                print(
                    f"{done} pictures, {time.perf_counter() - started:.0f} s: {resident(process.pid)} MB", flush=True
                )
            elif line.startswith("tokens of"):
                print("captioned; at most until here:", peak(process.pid), "MB")
            elif line.startswith("checked the data"):
                print(f"looked at, {time.perf_counter() - started:.0f} s: at most {peak(process.pid)} MB")
    assert process.returncode == 0 and done == number


def resident(pid: int) -> int:
    return memory_of(pid, "VmRSS")


def peak(pid: int) -> int:
    return memory_of(pid, "VmHWM")


def memory_of(pid: int, key: str) -> int:
    """Megabytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) // 1024


def link_pictures(folder: Path, images: list, number: int) -> Path:
    """`number` JPEGs that are hard links of a few."""
    folder.mkdir()
    for one, image in enumerate(images):
        image.save(folder / f"{one}.JPG", quality=90)
    for one in range(len(images), number):
        os.link(folder / f"{one % len(images)}.JPG", folder / f"{one}.JPG")
    for one in range(number, len(images)):
        (folder / f"{one}.JPG").unlink()
    return folder


def make_blip_base(folder: Path) -> Path:
    """The sizes of Salesforce/blip-image-captioning-base with random weights, and a vocabulary of made-up words."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    from tiny_captioners import BLIP_WORDS

    folder.mkdir()
    config = BlipConfig(text_config={"encoder_hidden_size": 768, "bos_token_id": 5, "sep_token_id": 3})
    config.text_config.eos_token_id = 3
    words = [*BLIP_WORDS, *(f"word{index}" for index in range(config.text_config.vocab_size - len(BLIP_WORDS)))]
    (folder / "words.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "words.txt"), bos_token="[DEC]")
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 384, "width": 384}), tokenizer).save_pretrained(folder)
    return folder


def parse_args() -> argparse.Namespace:
    description, *details = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog="\n\n".join(details), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=16, help="in a round; 0: no comparison (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="of each side, in turns (default: 3)")
    parser.add_argument("--batch_size", type=int, default=8, help="of the script (default: 8, as it has it)")
    parser.add_argument("--many", type=int, default=10_000, help="pictures for the memory; 0: none (default: 10000)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
