"""The pictures that the starter captioner is trained on, rendered and resized, and augmented batches of them."""

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

from pictures import SHARES, SIZES, load_pairs, load_pictures, pair_specs, picture_specs, render_pairs, render_pictures
from render_garments import Spec, mirrored_spec, render, sample_spec

JEANS_SEEDS = 5_000_000  # the first of their seeds
VIEWS = ("front", "back")


# --- rendering ------------------------------------------------------------------------------------------------------


def render_base_pictures(folder: Path, count: int) -> None:
    """Renders what pretrain_base.py renders, unless it is there: `count` pictures and pairs, without jeans."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "count.json").write_text(json.dumps(count))
    render_pictures(folder, count, ["pictures"])
    render_pairs(folder, count)


def jeans_specs(size: int, pairs: int) -> list[Spec]:
    """The jeans of SIZES[size] that are rendered as pairs; `pairs` over all sizes."""
    seeds = range(JEANS_SEEDS + size, JEANS_SEEDS + round(pairs * SHARES[size]) * len(SIZES), len(SIZES))
    return [sample_spec(seed, "jeans") for seed in seeds]


def render_jeans(work: Path, pairs: int) -> None:
    """Renders front and back of jeans_specs, (N, 2, h, w, 3) uint8 for each size.

    Stopped and started again, it goes on where it was.
    """
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


def _render_ten(task: tuple) -> str:
    """Renders ten pairs into their array; returns the line that marks the task as done."""
    work, size, pairs, start = task
    file = np.lib.format.open_memmap(jeans_file(Path(work), size), "r+")
    for i, spec in enumerate(jeans_specs(size, pairs)[start : start + 10], start):
        for side, view in enumerate(VIEWS):
            file[i, side] = np.asarray(render(replace(spec, view=view), *SIZES[size], same_layout=True))
    file.flush()
    return json.dumps(task[1:])


# --- resized for the model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PicturePool:
    """All training pictures as squares: singles (N, 3, side, side) uint8, pairs (M, 2, 3, side, side)."""

    singles: np.ndarray
    single_specs: list[Spec]
    pairs: np.ndarray
    pair_specs: list[Spec]  # one for each pair; the view in it means nothing
    jeans: int  # how many of the pairs are jeans: the last ones


def load_pool(drawn: Path, work: Path, processor: BlipImageProcessor, pairs: int) -> PicturePool:
    """Everything that was rendered: in `drawn` as by pretrain_base.py, and `pairs` of jeans in `work`."""
    count, sizes = json.loads((drawn / "count.json").read_text()), range(len(SIZES))
    jeans = [np.load(jeans_file(work, size), mmap_mode="r") for size in sizes]
    return PicturePool(
        np.concatenate([_squares(load_pictures(drawn, size), processor) for size in sizes]),
        [spec for size in sizes for spec in picture_specs(size, count)],
        np.concatenate([_squares(p, processor) for p in (*(load_pairs(drawn, size) for size in sizes), *jeans)]),
        [spec for size in sizes for spec in pair_specs(size, count)]
        + [spec for size in sizes for spec in jeans_specs(size, pairs)],
        sum(len(p) for p in jeans),
    )


def _squares(pictures: np.ndarray, processor: BlipImageProcessor) -> np.ndarray:
    """(…, h, w, 3) uint8 -> (…, 3, side, side) uint8, resized by the processor itself."""
    before, done = pictures.shape[:-3], []
    flat = pictures.reshape(-1, *pictures.shape[-3:])
    for start in range(0, len(flat), 100):
        part = torch.from_numpy(np.array(flat[start : start + 100])).permute(0, 3, 1, 2)
        resized = processor(part, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        done.append(resized.astype(np.uint8))
    return np.concatenate(done).reshape(*before, *done[0].shape[1:])


# --- batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionerBatch:
    """Single pictures, then the fronts of pairs, then their backs in the same order."""

    images: torch.Tensor  # (B, 3, side, side) in 0..1
    specs: list[Spec]  # what they show, mirrored ones included
    differences: torch.Tensor  # (pairs, side, side) between front and back, 0..1


def sample_batch(pool: PicturePool, singles: int, pairs: int, rng: np.random.Generator) -> CaptionerBatch:
    """Random pictures, augmented, half of them mirrored. A quarter of the pairs are jeans."""
    singles_picked, jeans = rng.integers(len(pool.singles), size=singles), pairs // 4
    others = len(pool.pairs) - pool.jeans
    pairs_picked = np.concatenate(
        [rng.integers(others, size=pairs - jeans), others + rng.integers(pool.jeans, size=jeans)]
    )
    pixels = np.concatenate([pool.singles[singles_picked], pool.pairs[pairs_picked, 0], pool.pairs[pairs_picked, 1]])
    specs = [pool.single_specs[i] for i in singles_picked]
    specs += [replace(pool.pair_specs[i], view=view) for view in VIEWS for i in pairs_picked]
    mirrored = rng.random(singles + pairs) < 0.5
    mirrored = np.concatenate([mirrored, mirrored[singles:]])  # both of a pair
    images = torch.from_numpy(pixels).float() / 255
    images[mirrored] = images[mirrored].flip(-1)
    images = random_affine(images, pairs, rng)
    differences = (images[singles : singles + pairs] - images[singles + pairs :]).abs().mean(1)
    specs = [mirrored_spec(spec) if flip else spec for spec, flip in zip(specs, mirrored, strict=True)]
    return CaptionerBatch(random_camera(images, rng), specs, differences)


def random_affine(images: torch.Tensor, pairs: int, rng: np.random.Generator) -> torch.Tensor:
    """Rotates two thirds of the pictures by up to 5 degrees, scales and moves them; the same for both of a pair."""
    n = len(images) - pairs
    angle, size = np.deg2rad(rng.uniform(-5, 5, n)), 1 / rng.uniform(0.86, 1.03, (n, 1, 1))
    turn = np.stack([np.stack([np.cos(angle), -np.sin(angle)], -1), np.stack([np.sin(angle), np.cos(angle)], -1)], 1)
    theta = np.concatenate([turn * size * rng.uniform(0.96, 1.04, (n, 1, 2)), rng.uniform(-0.03, 0.03, (n, 2, 1))], 2)
    chosen = rng.random(n) < 0.67
    theta, chosen = (np.concatenate([values, values[n - pairs :]]) for values in (theta, chosen))
    some, white = images[chosen], 0.98  # the table's white, for what comes in from outside
    grid = F.affine_grid(torch.from_numpy(theta[chosen]).float(), some.shape, align_corners=False)
    images = images.clone()
    images[chosen] = F.grid_sample(some - white, grid, mode="bicubic", align_corners=False).add_(white).clamp_(0, 1)
    return images


def random_camera(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Random exposure, tint and contrast; blur for a third, grain for a half, JPEG artefacts for a quarter."""
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
