"""What a mask gains: a small square at a random place on noise, trained with masks and without, the same steps.

python tests/benchmarks/mask_gain.py
python tests/benchmarks/mask_gain.py --side 16 --steps 600 --flags "--mixed_precision bf16"

The loss is measured inside the masks of held-out pictures, on fixed noise: the `val_loss` of each run, whose held-out
pictures always have masks. Its runs take two minutes on two quiet cores, ten beside other work.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "text_to_image" / "train_text_to_image.py"
WIDTH = 128  # pixels of the pictures
CAPTION = "A black square with an orange middle."
RUNS = {"base": ["--max_train_steps", 1, "--learning_rate", 1e-12], "without masks": [], "with masks": []}


def write_folder(folder: Path, seeds: range, side: int, masks: bool) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for seed in seeds:
        picture, mask = draw(np.random.default_rng(seed), side)
        picture.save(folder / f"{seed}.png")
        if masks:
            mask.save(folder / f"{seed}.mask.png")
        rows.append(json.dumps({"file_name": f"{seed}.png", "text": CAPTION}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def draw(random: np.random.Generator, side: int) -> tuple[Image.Image, Image.Image]:
    """The square on blurred noise of many colours, and its mask."""
    noise = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    picture, mask = noise.resize((WIDTH, WIDTH), Image.Resampling.BICUBIC), Image.new("L", (WIDTH, WIDTH))
    x, y = (int(place) for place in random.integers(0, WIDTH - side, 2))
    square, quarter = (x, y, x + side - 1, y + side - 1), side // 4
    ImageDraw.Draw(picture).rectangle(square, fill="black")
    inner = (x + quarter, y + quarter, x + side - 1 - quarter, y + side - 1 - quarter)
    ImageDraw.Draw(picture).rectangle(inner, fill="orange")
    ImageDraw.Draw(mask).rectangle(square, fill="white")
    return picture, mask


def val_losses(args: argparse.Namespace, name: str, folder: Path) -> dict[str, float]:
    """{step: the loss inside the masks of the held-out pictures}, after each third of the run."""
    masks = name != "without masks"
    dataset = write_folder(folder / name / "data", range(args.pictures), args.side, masks)
    held_out = write_folder(folder / name / "held out", range(1000, 1000 + args.pictures), args.side, masks=True)
    command = [
        TRAIN, "--dataset", dataset, "--validation_dir", held_out, "--output_dir", folder / name / "run", "--seed", 0,
        "--resolution", WIDTH, "--train_batch_size", 2, "--max_train_steps", args.steps, "--prior_images", 0,
        "--random_affine", 0, "--validation_steps", max(1, args.steps // 3), "--checkpointing_steps", 10**6,
        "--no_validation_pictures", "--no_report", *shlex.split(args.flags), *RUNS[name],
    ]  # fmt: skip
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"training failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    rows = map(json.loads, (folder / name / "run" / "metrics.jsonl").read_text().splitlines())
    return {str(row["step"]): round(row["val_loss"], 4) for row in rows if "val_loss" in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=24, help="pixels of the square, of pictures of 128")
    parser.add_argument("--pictures", type=int, default=8, help="pictures to train on, and as many held out")
    parser.add_argument("--steps", type=int, default=300, help="steps of two pictures")
    parser.add_argument("--flags", default="", help="further flags of the training script, in quotes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS:
            print(name, json.dumps(val_losses(args, name, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
