"""The pictures that the starter captioner learns from, resized by its image processor, and how a batch is varied."""

import io
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm
from transformers import BlipImageProcessor

from pictures import SHARES, SIZES, pictures_of, render_pictures, render_twins, seeds_of, twin_specs, twins_of
from render_garments import Spec, mirrored_spec, render, sample_spec

JEANS_SEEDS = 5_000_000  # from here on, below those held out
VIEWS = ("front", "back")


# --- Drawing --------------------------------------------------------------------------------------------------------


def draw_garments(drawn: Path, count: int) -> None:
    """What pretrain_base.py renders first, as far as it is not there: `count` pictures and their twins, no jeans."""
    drawn.mkdir(parents=True, exist_ok=True)
    (drawn / "count.json").write_text(json.dumps(count))
    render_pictures(drawn, count, ["pictures"])
    render_twins(drawn, count)


def jeans_specs(size: int, pairs: int) -> list[Spec]:
    """Jeans of SIZES[size] that are drawn from both sides, alike in all else."""
    seeds = range(JEANS_SEEDS + size, JEANS_SEEDS + round(pairs * SHARES[size]) * len(SIZES), len(SIZES))
    return [sample_spec(seed, "jeans") for seed in seeds]


def render_jeans(work: Path, pairs: int) -> None:
    """Both sides of jeans_specs, (N, 2, h, w, 3) uint8 a size; stopped and started again, it goes on where it was."""
    work.mkdir(parents=True, exist_ok=True)
    done_file = work / "jeans.jsonl"
    done = set(done_file.read_text().splitlines()) if done_file.exists() else set()
    tasks = []
    for size in range(len(SIZES)):
        n = len(jeans_specs(size, pairs))
        if not jeans_file(work, size).exists():
            w, h = SIZES[size]
            np.lib.format.open_memmap(jeans_file(work, size), "w+", np.uint8, (n, 2, h, w, 3)).flush()
        tasks += [(str(work), size, pairs, start) for start in range(0, n, 10)]
    todo = [task for task in tasks if json.dumps(task[1:]) not in done]
    with ProcessPoolExecutor(os.cpu_count()) as pool, open(done_file, "a") as log:
        for name in tqdm(pool.map(_render_ten, todo), total=len(todo), desc="jeans", unit="x20", mininterval=10):
            log.write(name + "\n")
            log.flush()


def jeans_file(work: Path, size: int) -> Path:
    return work / f"jeans-{SIZES[size][0]}x{SIZES[size][1]}.npy"


def _render_ten(task) -> str:
    work, size, pairs, start = task
    file = np.lib.format.open_memmap(jeans_file(Path(work), size), "r+")
    for i, spec in enumerate(jeans_specs(size, pairs)[start : start + 10], start):
        for side, view in enumerate(VIEWS):
            file[i, side] = np.asarray(render(replace(spec, view=view), *SIZES[size], twins=True))
    file.flush()
    return json.dumps(task[1:])


# --- As the image processor makes them ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Singles, (N, 3, side, side) uint8, and pairs of front and back alike in all else, (M, 2, 3, side, side)."""

    singles: np.ndarray
    single_specs: list[Spec]
    pairs: np.ndarray
    pair_specs: list[Spec]  # of the fronts, as far as the view goes
    jeans: int  # so many of the pairs, the last ones, are jeans


def read_pool(drawn: Path, work: Path, processor: BlipImageProcessor, pairs: int) -> Pool:
    """Everything that was drawn (in `drawn` by pretrain_base.py, jeans in `work`), as squares for the model."""
    count, sizes = json.loads((drawn / "count.json").read_text()), range(len(SIZES))
    jeans = [np.load(jeans_file(work, size), mmap_mode="r") for size in sizes]
    return Pool(
        np.concatenate([_squares(pictures_of(drawn, size), processor) for size in sizes]),
        [sample_spec(int(seed)) for size in sizes for seed in seeds_of(size, count)],
        np.concatenate([_squares(p, processor) for p in (*(twins_of(drawn, size) for size in sizes), *jeans)]),
        [spec for size in sizes for spec in twin_specs(size, count)]
        + [spec for size in sizes for spec in jeans_specs(size, pairs)],
        sum(len(p) for p in jeans),
    )


def _squares(pictures: np.ndarray, processor: BlipImageProcessor) -> np.ndarray:
    """(…, h, w, 3) uint8 -> (…, 3, side, side) uint8, resized exactly as the processor does."""
    before, done = pictures.shape[:-3], []
    flat = pictures.reshape(-1, *pictures.shape[-3:])
    for start in range(0, len(flat), 100):
        part = torch.from_numpy(np.array(flat[start : start + 100])).permute(0, 3, 1, 2)
        resized = processor(part, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        done.append(resized.astype(np.uint8))
    return np.concatenate(done).reshape(*before, *done[0].shape[1:])


# --- Batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Single pictures, then the fronts of pairs, then their backs in the same order."""

    images: torch.Tensor  # (B, 3, side, side) in 0..1
    specs: list[Spec]  # what they show, mirrored ones included
    differences: torch.Tensor  # (pairs, side, side): how far front and back differ


def draw_batch(pool: Pool, singles: int, pairs: int, rng: np.random.Generator) -> Batch:
    """Pictures at random, half of them mirrored and all of them varied; a quarter of the pairs are jeans."""
    ones, jeans = rng.integers(len(pool.singles), size=singles), pairs // 4
    others = len(pool.pairs) - pool.jeans
    twos = np.concatenate([rng.integers(others, size=pairs - jeans), others + rng.integers(pool.jeans, size=jeans)])
    pixels = np.concatenate([pool.singles[ones], pool.pairs[twos, 0], pool.pairs[twos, 1]])
    specs = [pool.single_specs[i] for i in ones]
    specs += [replace(pool.pair_specs[i], view=view) for view in VIEWS for i in twos]
    mirrored = rng.random(singles + pairs) < 0.5
    mirrored = np.concatenate([mirrored, mirrored[singles:]])  # both of a pair
    images = torch.from_numpy(pixels).float() / 255
    images[mirrored] = images[mirrored].flip(-1)
    images = warped(images, pairs, rng)
    differences = (images[singles : singles + pairs] - images[singles + pairs :]).abs().mean(1)
    specs = [mirrored_spec(spec) if flip else spec for spec, flip in zip(specs, mirrored, strict=True)]
    return Batch(photographed(images, rng), specs, differences)


def warped(images: torch.Tensor, pairs: int, rng: np.random.Generator) -> torch.Tensor:
    """Two thirds of the pictures turned by up to 5 degrees, scaled, moved; the last 2 * `pairs` by twos alike."""
    n = len(images) - pairs
    angle, size = np.deg2rad(rng.uniform(-5, 5, n)), 1 / rng.uniform(0.86, 1.03, (n, 1, 1))
    turn = np.stack([np.stack([np.cos(angle), -np.sin(angle)], -1), np.stack([np.sin(angle), np.cos(angle)], -1)], 1)
    theta = np.concatenate([turn * size * rng.uniform(0.96, 1.04, (n, 1, 2)), rng.uniform(-0.03, 0.03, (n, 2, 1))], 2)
    chosen = rng.random(n) < 0.67
    theta, chosen = (np.concatenate([values, values[n - pairs :]]) for values in (theta, chosen))
    some, white = images[chosen], 0.98  # what comes in from outside is white as the table
    grid = F.affine_grid(torch.from_numpy(theta[chosen]).float(), some.shape, align_corners=False)
    images = images.clone()
    images[chosen] = F.grid_sample(some - white, grid, mode="bicubic", align_corners=False).add_(white).clamp_(0, 1)
    return images


def photographed(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Exposure, tint and contrast of all, softness of a third, grain of a half and JPEG's loss of a quarter."""
    shape = (len(images), 1, 1, 1)
    gain = np.exp(rng.normal(0, 0.06, shape) + rng.normal(0, 0.02, (len(images), 3, 1, 1)))
    power = np.exp(rng.normal(0, 0.08, shape))
    images = (images.clamp_min(1e-3) ** torch.from_numpy(power).float()) * torch.from_numpy(gain).float()
    soft = rng.random(len(images)) < 0.33
    if soft.any():
        small = F.interpolate(images[soft], scale_factor=rng.uniform(0.6, 1), mode="bilinear", antialias=True)
        images[soft] = F.interpolate(small, images.shape[-2:], mode="bilinear")
    grain = torch.from_numpy(rng.uniform(0, 0.03, shape) * (rng.random(shape) < 0.5)).float()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
    images = (images + grain * noise).clamp_(0, 1)
    for i in np.flatnonzero(rng.random(len(images)) < 0.25):
        images[i] = _jpeg(images[i], int(rng.integers(40, 95)))
    return images


def _jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    file = io.BytesIO()
    Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255
