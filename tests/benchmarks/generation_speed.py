"""How much faster inference.py generates than the plain loop, and whether its pictures are as close to the limit.

The plain loop is diffusers' pipeline as its documentation shows it: one picture at a time, the model's own scheduler
(PNDM), 50 steps. Ours is generate() at its defaults, 25 steps. Rounds of both alternate, without loading. The limit is
the picture of the same prompt and seed after 200 steps, by either sampler. Both keep freed memory, as inference.py
does, and the plain loop computes in fp32, as ours does on a CPU. It takes several prompts: a picture now and then
stands at a fork, where one step more or less makes it another, and one such outweighs all the others.

    python tests/benchmarks/generation_speed.py                      the starter, 32 pictures: 12 minutes on two cores
    python tests/benchmarks/generation_speed.py --model FOLDER --seeds 1 --limits 0
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "text_to_image"))
from generation.generate import plan_images  # noqa: E402
from generation.image_generator import ImageGenerator, load_samplers  # noqa: E402
from generation.output_files import OutputWriter  # noqa: E402
from generation.planned_images import PlannedImage  # noqa: E402
from generation.weights import find_weights  # noqa: E402
from inference import parse_args  # noqa: E402
from models.folders import read_shape  # noqa: E402
from models.loading import quiet_libraries  # noqa: E402
from runtime.devices import choose_device  # noqa: E402
from runtime.paths import STARTER  # noqa: E402

OWN_STEPS, PLAIN_STEPS, LIMIT_STEPS = 25, 50, 200
PROMPTS = (
    "A single pair of blue trousers laid flat on a white background",
    "a red t-shirt",
    "green shorts laid flat on a white background, with a black square marker in the upper left corner",
    "a yellow dress, front view",
    "a purple hoodie laid flat on a plain white background, seen from the back",
    "a white shirt with navy stripes",
    "an orange skirt laid flat on a clean white background",
    "black trousers, folded in half",
)
Wanted = list[tuple[str, int]]  # prompts and seeds
Pictures = dict[tuple[str, int], np.ndarray]


class Ours:
    """generate() without its output, the model loaded once."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        words = ["--model", args.model, "--num_images", str(args.seeds), "--output_dir", str(folder)]
        words += ["--width", str(args.width), "--height", str(args.height)]
        words += [word for prompt in args.prompts for word in ("--prompt", prompt)]
        self.args, source = parse_args(words), find_weights(args.model)
        self.plan = plan_images(self.args, source, read_shape(source.base))
        self.image_generator = ImageGenerator(
            self.args, source, load_samplers(source, self.plan), choose_device(), self.plan
        )

    def generate(self, wanted: Wanted, steps: int = OWN_STEPS) -> Pictures:
        asked = [image for image in self.plan if (image.prompt, image.seed) in wanted]
        plan = [PlannedImage(d.prompt, d.seed, replace(d.settings, steps=steps)) for d in asked]
        with OutputWriter(self.args.output_dir, plan, with_metadata=False, is_main=True) as folder:
            for batch in self.image_generator.generate(plan):
                folder.add(batch)
        return {(d.prompt, d.seed): read(self.args.output_dir / d.file_name) for d in plan}


class Plain:
    """One picture at a time."""

    def __init__(self, args: argparse.Namespace, guidance_scale: float, folder: Path):
        self.args, self.guidance_scale, self.folder = args, guidance_scale, folder
        self.pipeline = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32).to(choose_device())
        self.pipeline.set_progress_bar_config(disable=True)

    def generate(self, wanted: Wanted, steps: int = PLAIN_STEPS) -> Pictures:
        generated = {}
        for prompt, seed in wanted:
            image = self.pipeline(
                prompt, num_inference_steps=steps, guidance_scale=self.guidance_scale,
                width=self.args.width, height=self.args.height, generator=torch.Generator().manual_seed(seed),
            ).images[0]  # fmt: skip
            image.save(self.folder / f"{seed}.png")
            generated[prompt, seed] = read(self.folder / f"{seed}.png")
        return generated


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(float)


def timed(method: Ours | Plain, wanted: Wanted) -> tuple[float, Pictures]:
    begun = time.perf_counter()
    pictures = method.generate(wanted)
    return len(wanted) / (time.perf_counter() - begun), pictures


def distances(some: Pictures, others: Pictures) -> str:
    """Of two pictures of one prompt and seed, in levels of 255."""
    apart = [np.abs(some[key] - picture).mean() for key, picture in others.items()]
    return f"{statistics.mean(apart):.2f} (median {statistics.median(apart):.2f}, most {max(apart):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(STARTER))
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="a round for each two (default: eight)")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt (default: 4)")
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--height", type=int, default=288)
    parser.add_argument("--limits", type=int, default=2, help="of which generated with 200 steps too (default: 2)")
    args = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as plain:
        ours = Ours(args, Path(own))
        methods = ours, Plain(args, ours.args.guidance_scale, Path(plain))
        rates, generated = ([], []), ({}, {})
        for start in range(0, len(args.prompts), 2):
            wanted = [(prompt, seed) for prompt in args.prompts[start : start + 2] for seed in range(args.seeds)]
            for method, rate, pictures in zip(methods, rates, generated, strict=True):
                speed, found = timed(method, wanted)
                rate.append(speed)
                pictures |= found
                print(f"{type(method).__name__:6} {speed:.2f} pictures/s", flush=True)
        own_rate, plain_rate = map(statistics.median, rates)
        ratio = statistics.median(a / b for a, b in zip(*rates, strict=True))
        print(f"{own_rate:.2f} against {plain_rate:.2f} pictures/s, median of rounds: {ratio:.2f} times as fast")
        wanted = [(prompt, seed) for prompt in args.prompts for seed in range(min(args.limits, args.seeds))]
        for name, method in zip(("DPM-Solver++", "PNDM"), methods if wanted else (), strict=False):
            limit = method.generate(wanted, LIMIT_STEPS)
            print(f"from {LIMIT_STEPS} steps of {name}, of 255: ours {distances(generated[0], limit)}")
            print(f"{'':{len(name) + 25}} the plain loop {distances(generated[1], limit)}", flush=True)


if __name__ == "__main__":
    main()
