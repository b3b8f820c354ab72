"""What large data sets cost: generates pictures of 64 px, and starts training on them cold and warm, for one step.

    python tests/benchmarks/many_pictures.py --work FOLDER [--counts 1000 10000 100000] [--plot FILE.png] [--made_up]

For each number of pictures: seconds of the whole command with nothing encoded and with everything encoded, its peak
memory, the files in the cache, and how long it takes to read 16 samples whose pages the system has dropped. With
--made_up nothing is encoded: noise of the same size is stored instead, which a warm start cannot tell apart.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "text_to_image"
SIDE, READ_AT_ONCE, READINGS = 64, 16, 50
GARMENTS = ("a red t-shirt", "a blue skirt", "a pair of grey trousers", "a green dress", "a white shirt")
# No variants of the pictures, which only multiply the time of encoding, and none of the base's own.
FLAGS = ["--resolution", SIDE, "--random_affine", 0, "--prior_images", 0, "--max_train_steps", 1]
FLAGS += ["--no_validation_pictures"]

FILL = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
import torch
from training import encoding
from models.text_encoding import TextEmbedding
encoding.encode_pixels = lambda vae, pixels: [(torch.randn(4, *(s // 4 for s in p.shape[1:])),) * 2 for p in pixels]
text = TextEmbedding(torch.randn(77, 128), torch.empty(0))
encoding.CaptionEncoder.encode = lambda self, captions: [text for _ in captions]
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # the script, with noise for encodings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder for pictures and encodings: 8 GB for 100,000"
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--made_up", action="store_true", help="noise instead of encodings, to fill a cache quickly")
    parser.add_argument("--plot", type=Path, help="draws the growth")
    parser.add_argument("--code", type=Path, default=SCRIPTS, help="the text_to_image folder of another version")
    args = parser.parse_args()
    rows = []
    for count in args.counts:
        rows.append(measure(args.work, args.code, count, args.made_up))
        print(json.dumps(rows[-1]), flush=True)
    if args.plot:
        draw(rows, args.plot)


def measure(work: Path, code: Path, count: int, made_up: bool) -> dict:
    folder, cache = work / f"pictures-{count}", work / f"cache-{count}"
    write_data_set(folder, count)
    row: dict = {"pictures": count}
    for kind in ("cold", "warm"):
        if kind == "warm" or not cache.exists():
            command = [folder, "--output_dir", work / f"run-{count}-{kind}", "--latents_cache_dir", cache, *FLAGS]
            script = code / "train_text_to_image.py"
            start = ["-c", FILL, script] if made_up and kind == "cold" else [script]
            row |= run([sys.executable, *start, "--dataset", *command], kind)
    files = [path for path in cache.rglob("*") if path.is_file()]
    row |= {"files": len(files), "cache_mb": round(sum(path.stat().st_size for path in files) / 1e6)}
    if code == SCRIPTS:
        row["read_16_samples_ms"] = measure_reading(cache)
    return row


def run(command: list, kind: str) -> dict:
    """Seconds and peak memory of a command."""
    began = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))}: status {status}")
    return {f"{kind}_s": round(time.perf_counter() - began, 1), f"{kind}_peak_mb": round(usage.ru_maxrss / 1024)}


def write_data_set(folder: Path, count: int) -> None:
    """Blurred noise, a caption of two sentences each."""
    if (folder / "metadata.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(partial(write_picture, folder), range(count), chunksize=500))
    (folder / "metadata.jsonl").write_text("".join(rows))


def write_picture(folder: Path, number: int) -> str:
    pixels = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg")
    side = "right" if number % 2 else "left"
    text = f"A photo of {GARMENTS[number % 5]} number {number} laid flat on a white background. "
    text += f"It has a black marker at the upper {side}."
    return json.dumps({"file_name": f"{number:06d}.jpg", "text": text}) + "\n"


def measure_reading(cache: Path) -> float:
    """Milliseconds, the median: a picture's and a caption's tensors of each of 16 samples, not in the page cache."""
    sys.path.insert(0, str(SCRIPTS))
    from safetensors import safe_open

    from runtime.tensor_shards import TensorShards

    names = {}
    for kind in ("pictures", "captions"):
        names[kind] = []
        for path in sorted((cache / kind).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                names[kind] += [(kind, name) for name in list(file.keys())]
    shards = {kind: TensorShards(cache / kind) for kind in names}
    chosen = random.Random(0)
    times = []
    for _ in range(READINGS):
        samples = [chosen.choice(names[kind]) for kind in names for _ in range(READ_AT_ONCE)]
        drop_pages(cache)
        began = time.perf_counter()
        for kind, name in samples:
            shards[kind].read(name)
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times), 2)


def drop_pages(cache: Path) -> None:
    for path in cache.rglob("*.safetensors"):
        with open(path, "rb") as file, contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = [row["pictures"] for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
    lines = [
        ("seconds of the command", {"nothing encoded": "cold_s", "everything encoded": "warm_s"}),
        ("peak memory, MB", {"nothing encoded": "cold_peak_mb", "everything encoded": "warm_peak_mb"}),
        ("files in the cache", {"": "files"}),
    ]
    for axis, (title, curves) in zip(axes, lines, strict=True):
        for label, key in curves.items():
            measured = [(row["pictures"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*measured, strict=True), marker="o", label=label)
        axis.set(xscale="log", title=title, xlabel="pictures", xticks=counts)
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.set_ylim(bottom=0)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=70)


if __name__ == "__main__":
    main()
