"""What a fine-tune on dataset/ must show: generates 16 pictures for each prompt, classifies them, prints shares.

python tests/benchmarks/measure_fine_tune.py --model output/dataset-0123abcd --save samples
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT / "text_to_image"), str(ROOT / "text_to_image" / "starter")]

from classifier import classify, load_classifier  # noqa: E402
from generation.contact_sheet import make_contact_sheet  # noqa: E402
from measure_base import generate_samples  # noqa: E402
from metadata.reading import read_captions  # noqa: E402
from models.loading import quiet_libraries  # noqa: E402
from models.sampling import guidance_scale_of  # noqa: E402
from runtime.paths import STARTER  # noqa: E402

SIZE = (224, 288)  # width, height that dataset/ is trained at on the starter
SHORT = ("denim jeans", "A single pair of denim jeans laid flat on a white background")
OTHER = "a red t-shirt"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(np.float32)


def border(image: Image.Image) -> float:
    """The mean brightness of the outermost 3 % of the picture, 0..255."""
    p = pixels(image).mean(-1)
    h, w = p.shape
    b = max(2, round(0.03 * w))
    inside = np.zeros((h, w), bool)
    inside[b:-b, b:-b] = True
    return float(p[~inside].mean())


def cloth_of(image: Image.Image) -> np.ndarray:
    """(H, W) bool: where cloth is. Neither the white table and its shadow nor the black marker is."""
    p = pixels(image)
    spread = p.max(-1) - p.min(-1)
    return ((p.mean(-1) < 215) & (p.mean(-1) > 45) & (spread > 18)) | (p.mean(-1).clip(45, 150) == p.mean(-1))


def is_blue(image: Image.Image) -> bool:
    """Denim blue: over the cloth, blue leads red by a good deal and green a little."""
    red, green, blue = pixels(image)[cloth_of(image)].mean(0)
    return blue > red + 30 and blue > green + 12


def is_faded(image: Image.Image) -> bool:
    """Worn and unworn parts differ: the tenth brightest and tenth darkest of the cloth lie 40 levels apart."""
    low, high = np.percentile(pixels(image)[cloth_of(image)].mean(-1), (10, 90))
    return high - low >= 40


def has_two_legs(image: Image.Image) -> bool:
    """Below the crotch a row of the picture crosses two pieces of cloth (a folded leg counts where it lies)."""
    cloth = cloth_of(image)
    rows = np.nonzero(cloth.sum(1) > 0.06 * cloth.shape[1])[0]
    top, bottom = rows[0], rows[-1]
    lower = cloth[int(top + 0.42 * (bottom - top)) : int(top + 0.95 * (bottom - top))]
    runs = [_runs(row, round(0.04 * cloth.shape[1])) for row in lower]
    return float(np.mean([r == 2 for r in runs])) >= 0.25


def _runs(row: np.ndarray, least: int) -> int:
    edges = np.flatnonzero(np.diff(np.r_[0, row.astype(int), 0]))
    return int((edges[1::2] - edges[::2] >= least).sum())


def small(image: Image.Image) -> np.ndarray:
    return pixels(image.convert("RGB").resize((32, 32), Image.Resampling.BOX)) / 255


def nearest(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """The mean over `images` of the mean absolute difference at 32 x 32 to the nearest of `others`, 0..1."""
    return float(np.mean([min(np.abs(small(a) - small(b)).mean() for b in others) for a in images]))


def spread(images: Sequence[Image.Image]) -> float:
    """The mean absolute difference at 32 x 32 between two of `images`, 0..1."""
    grids = [small(i) for i in images]
    return float(np.mean([np.abs(a - b).mean() for i, a in enumerate(grids) for b in grids[:i]]))


def judge_jeans(images: Sequence[Image.Image], found: Sequence[dict]) -> dict[str, float]:
    """Shares of `images` that are what a picture of denim jeans must be."""
    checks = {
        "blue": [is_blue(i) for i in images],
        "trouser_shaped": [f["kind"] == "trousers" for f in found],
        "two_legs": [has_two_legs(i) for i in images],
        "faded": [is_faded(i) for i in images],
        "clean_white": [border(i) >= 235 for i in images],
        "marker_upper_right": [f["marker"] == "upper right" for f in found],
    }
    return {name: float(np.mean(values)) for name, values in checks.items()}


def before_and_after(base: Path, tuned: Path, prompts: Sequence[str], guidance: float) -> Image.Image:
    """Two pictures for each prompt from both models, the same seeds above (before) and below (after)."""
    asked = [prompt for prompt in prompts for _ in range(2)]
    rows = [generate_samples(folder, asked, [SIZE] * len(asked), 25, guidance, seed=2) for folder in (base, tuned)]
    sheet = Image.new("RGB", (len(asked) * (SIZE[0] + 8) - 8, 2 * SIZE[1] + 8), "lightgray")
    for y, images in enumerate(rows):
        for x, image in enumerate(images):
            sheet.paste(image, (x * (SIZE[0] + 8), y * (SIZE[1] + 8)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the fine-tuned pipeline folder")
    parser.add_argument("--base", type=Path, default=STARTER, help="what it was fine-tuned from")
    parser.add_argument("--count", type=int, default=16, help="pictures for each prompt")
    parser.add_argument("--save", type=Path, help="folder for the sheets")
    parser.add_argument("--before_after", type=Path, help="only write the picture of both models' samples, here")
    args = parser.parse_args()
    quiet_libraries()
    dataset = ROOT / "dataset"
    rows = read_captions(dataset)
    pictures = [Image.open(row.path(dataset)).convert("RGB") for row in rows]
    prompts = [*SHORT, *(row.captions[0] for row in rows)]
    model, guidance, report = load_classifier(), guidance_scale_of(args.model), {}
    print(
        "dataset itself",
        judge_jeans([p.resize(SIZE) for p in pictures], classify(model, [p.resize(SIZE) for p in pictures])),
    )
    if args.before_after:
        sheet = before_and_after(args.base, args.model, (SHORT[0], prompts[2], prompts[4]), guidance)
        return sheet.save(args.before_after, quality=92)
    base = generate_samples(args.base, prompts * 3, [SIZE] * 3 * len(prompts), 25, guidance)
    for prompt in (*prompts, OTHER):
        images = generate_samples(args.model, [prompt] * args.count, [SIZE] * args.count, 25, guidance)
        found = classify(model, images)
        if prompt == OTHER:
            right = [f["kind"] == "t-shirt" and f["colour"] == "red" for f in found]
            report[prompt] = {"red_and_a_t_shirt": float(np.mean(right))}
        else:
            like = [b for b, p in zip(base, prompts * 3, strict=True) if p == prompt]
            report[prompt] = {
                **judge_jeans(images, found),
                "one_leg_folded": float(np.mean([f["fold"] == "knee" for f in found])),
                "nearest_vs_base": nearest(images, pictures) / nearest(like, pictures),
                "spread_vs_dataset": spread(images) / spread(pictures),
            }
        print(prompt[:70], json.dumps(report[prompt]), flush=True)
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            paths = [args.save / f"{len(report)}-{i:02d}.png" for i in range(len(images))]
            for path, image in zip(paths, images, strict=True):
                image.save(path)
            make_contact_sheet(paths, [(prompt, i) for i in range(len(paths))], str(args.model)).save(
                args.save / f"sheet-{len(report)}.jpg"
            )


if __name__ == "__main__":
    main()
