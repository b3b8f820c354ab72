"""How much faster inference.py draws than the plain loop, and whether its pictures are as close to the limit.

The plain loop is diffusers' pipeline as its documentation shows it: one picture at a time, the model's own scheduler
(PNDM), 50 steps. Ours is generate() at its defaults, 25 steps. Rounds of both alternate, without loading. The limit is
the picture of the same seed after 200 steps, by either sampler.

    python tests/benchmarks/draw_speed.py                          the starter, 32 pictures: 6 minutes on two cores
    python tests/benchmarks/draw_speed.py --model FOLDER --pictures 8
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "text_to_image"))
from devices import choose_device  # noqa: E402
from generating import plan_drawings  # noqa: E402
from inference import parse_args  # noqa: E402
from model_defaults import STARTER  # noqa: E402
from model_folders import read_shape  # noqa: E402
from models import quiet_libraries  # noqa: E402
from painting import Painter, load_samplers  # noqa: E402
from picture_files import Drawing, PictureFolder  # noqa: E402
from sources import find_source  # noqa: E402

ROUNDS, OWN_STEPS, PLAIN_STEPS, LIMIT_STEPS = 4, 25, 50, 200
Pictures = dict[int, np.ndarray]  # by seed


class Ours:
    """generate() without what it says, the model loaded once."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        words = ["--model", args.model, "--prompt", args.prompt, "--num_images", str(args.pictures)]
        words += ["--width", str(args.width), "--height", str(args.height), "--output_dir", str(folder)]
        self.args, source = parse_args(words), find_source(args.model)
        self.plan = plan_drawings(self.args, source, read_shape(source.base))
        self.painter = Painter(self.args, source, load_samplers(source, self.plan), choose_device(), self.plan)

    def draw(self, seeds: range, steps: int = OWN_STEPS) -> Pictures:
        plan = [Drawing(d.prompt, d.seed, {**d.settings, "steps": steps}) for d in self.plan if d.seed in seeds]
        with PictureFolder(self.args.output_dir, plan, metadata=False, is_main=True) as folder:
            for batch, images, withheld in self.painter.draw(plan):
                folder.add(batch, images, withheld)
        return {d.seed: read(self.args.output_dir / d.file_name) for d in plan}


class Plain:
    """One picture at a time."""

    def __init__(self, args: argparse.Namespace, guidance_scale: float, folder: Path):
        self.args, self.guidance_scale, self.folder = args, guidance_scale, folder
        self.pipeline = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32).to(choose_device())
        self.pipeline.set_progress_bar_config(disable=True)

    def draw(self, seeds: range, steps: int = PLAIN_STEPS) -> Pictures:
        for seed in seeds:
            image = self.pipeline(
                self.args.prompt, num_inference_steps=steps, guidance_scale=self.guidance_scale,
                width=self.args.width, height=self.args.height, generator=torch.Generator().manual_seed(seed),
            ).images[0]  # fmt: skip
            image.save(self.folder / f"{seed}.png")
        return {seed: read(self.folder / f"{seed}.png") for seed in seeds}


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(float)


def timed(drawer: Ours | Plain, seeds: range) -> tuple[float, Pictures]:
    begun = time.perf_counter()
    pictures = drawer.draw(seeds)
    return len(seeds) / (time.perf_counter() - begun), pictures


def distance(some: Pictures, others: Pictures) -> float:
    """The mean difference of two pictures of one seed, in levels of 255."""
    return statistics.mean(np.abs(some[seed] - others[seed]).mean() for seed in some.keys() & others.keys())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(STARTER))
    parser.add_argument("--prompt", default="A single pair of blue trousers laid flat on a white background")
    parser.add_argument("--pictures", type=int, default=32, help="in all, in four rounds (default: 32)")
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--height", type=int, default=288)
    parser.add_argument("--limits", type=int, default=4, help="seeds that are drawn with 200 steps (default: 4)")
    args = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as plain:
        ours = Ours(args, Path(own))
        theirs = Plain(args, ours.args.guidance_scale, Path(plain))
        drawers, rates, drawn = (ours, theirs), ([], []), ({}, {})
        for start in range(0, args.pictures, max(1, args.pictures // ROUNDS)):
            seeds = range(start, min(start + max(1, args.pictures // ROUNDS), args.pictures))
            for drawer, rate, pictures in zip(drawers, rates, drawn, strict=True):
                speed, found = timed(drawer, seeds)
                rate.append(speed)
                pictures |= found
                print(f"{type(drawer).__name__:6} {speed:.2f} pictures/s", flush=True)
        own_rate, plain_rate = map(statistics.median, rates)
        ratio = statistics.median(a / b for a, b in zip(*rates, strict=True))
        print(f"{own_rate:.2f} against {plain_rate:.2f} pictures/s, median of rounds: {ratio:.2f} times as fast")
        for name, drawer in (("DPM-Solver++", ours), ("PNDM", theirs)):
            limit = drawer.draw(range(args.limits), LIMIT_STEPS)
            print(
                f"from {LIMIT_STEPS} steps of {name}: ours {distance(drawn[0], limit):.2f}, "
                f"the plain loop {distance(drawn[1], limit):.2f} of 255"
            )


if __name__ == "__main__":
    main()
