"""Measures what the starter makes of your own photographs: the VAE, a fine-tune, a sheet, copies, the time it takes.

    python measure_photos.py ~/photos --to /scratch/photos
    python measure_photos.py ~/photos --to /scratch/photos --samples 1600     further flags go to the training script

The folder holds a few photographs of one thing and a caption for each, as training reads them. Nothing is written
into it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from classifier import classify, load_classifier
from gpu_pictures import psnr, square
from measure_base import HERE, generate_samples

sys.path.insert(1, str(HERE.parent))  # the folders of the entry points

from data.images import open_image  # noqa: E402
from metadata.reading import read_captions  # noqa: E402
from models.loading import load_vae, quiet_libraries  # noqa: E402
from models.sampling import guidance_scale_of  # noqa: E402
from runtime.errors import WorkError, exit_with  # noqa: E402
from runtime.paths import STARTER  # noqa: E402

OTHER = ("red", "t-shirt")  # what the base draws well, and the fine-tune should not forget
CELL = 192  # px of a picture on the sheet


def captioned_photos(folder: Path) -> tuple[list[Path], list[str]]:
    """The photographs and the first caption of each. UserError where there are none."""
    rows = read_captions(folder)
    return [row.path(folder) for row in rows], [row.captions[0] for row in rows]


def vae_psnr(model: Path, photos: Sequence[Path]) -> list[float]:
    """PSNR in dB of the VAE's reconstruction of the middle of each photograph at 256 px."""
    values, _ = psnr(load_vae(model), np.stack([square(path) for path in photos]))
    return values


def run_script(name: str, *flags: object) -> dict[str, float]:
    """Runs an entry point; its minutes, by the clock and of all CPU cores. WorkError where it fails."""
    started, before = time.time(), os.times()
    code = subprocess.run([sys.executable, HERE.parent / name, *map(str, flags)]).returncode
    if code:
        raise WorkError(f"{name} ended with exit code {code}; what it said stands above")
    spent = os.times()
    cpu = spent.children_user + spent.children_system - before.children_user - before.children_system
    return {"minutes": round((time.time() - started) / 60, 2), "cpu_minutes": round(cpu / 60, 2)}


def make_sheet(photos: Sequence[Path], generated: Sequence[Image.Image]) -> Image.Image:
    """The photographs in the first rows, eight to a row, below a grey line what was generated."""
    parts = [[open_image(path) for path in photos], list(generated)]
    rows = [[images[i : i + 8] for i in range(0, len(images), 8)] for images in parts]
    sheet = Image.new("RGB", (8 * CELL, sum(map(len, rows)) * CELL + 8), "white")
    sheet.paste("grey", (0, len(rows[0]) * CELL, sheet.width, len(rows[0]) * CELL + 8))
    for y, row in enumerate([*rows[0], *rows[1]]):
        for x, image in enumerate(row):
            small = image.copy()
            small.thumbnail((CELL - 4, CELL - 4), Image.Resampling.LANCZOS)
            sheet.paste(small, (x * CELL + 2, y * CELL + 2 + 8 * (y >= len(rows[0]))))
    return sheet


def main_size(model: Path) -> tuple[int, int]:
    """(width, height) that most pictures of this run were trained at."""
    size = json.loads((model / "run.json").read_text())["sizes"][0]
    return size["width"], size["height"]


def draw(model: Path, prompt: str, count: int) -> list[Image.Image]:
    sizes = [main_size(model)] * count
    return generate_samples(model, [prompt] * count, sizes, 25, guidance_scale_of(model))


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs with captions")
    parser.add_argument("--to", type=Path, required=True, help="folder for the model, the pictures and the sheet")
    parser.add_argument("--count", type=int, default=16, help="pictures to generate")
    parser.add_argument("--prompt", help="what to generate (default: the first caption)")
    return parser.parse_known_args()


def main() -> None:
    args, flags = parse_args()
    quiet_libraries()
    torch.manual_seed(0)
    photos, captions = captioned_photos(args.folder)
    model, pictures, prompt = args.to / "model", args.to / "pictures", args.prompt or captions[0]
    report = {"photographs": len(photos), "vae_psnr_db": round(float(np.mean(vae_psnr(STARTER, photos))), 1)}
    report["fine_tune"] = run_script("train_text_to_image.py", "--dataset", args.folder, "--output_dir", model, *flags)
    images = draw(model, prompt, args.count)
    pictures.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(pictures / f"{i:02d}.png")
    make_sheet(photos, images).save(args.to / "sheet.png")
    found = classify(load_classifier(), draw(model, f"a {' '.join(OTHER)}", 8))
    report["a_red_t_shirt"] = f"{sum((f['colour'], f['kind']) == OTHER for f in found)} of {len(found)}"
    print(json.dumps(report | {"sheet": str(args.to / "sheet.png")}, indent=1), flush=True)
    run_script("check_copies.py", "--generated", pictures, "--dataset", args.folder)


if __name__ == "__main__":
    exit_with(main)
