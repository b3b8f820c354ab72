"""Images a second in generation: inference.py's generator beside diffusers' plain pipeline, both without files."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from generation.generate import plan_images
from generation.image_generator import ImageGenerator, load_samplers
from generation.weights import find_weights
from gpu.random_models import model_folder
from gpu.rows import Measurement
from gpu.settings import Settings, need_compiler, need_gpu
from gpu.training_runs import free_memory
from inference import parse_args
from models.folders import read_shape
from models.loading import DTYPES, quiet_libraries
from runtime.devices import choose_device, synchronize

PROMPT = "a pair of denim jeans laid flat on white"
OWN_STEPS, PLAIN_STEPS = 25, 50
LARGE = 8


def measurements(group: str, settings: Settings) -> list[Measurement]:
    generation = Generation(settings)

    def row(name: str, work: Callable[..., dict], *words: int, seconds: float = 10) -> Measurement:
        return Measurement(name, lambda: work(*words), seconds)

    return [
        row(f"ours, {OWN_STEPS} steps, batch {LARGE}", generation.ours, LARGE, seconds=25),
        row(f"ours, {OWN_STEPS} steps, batch 1", generation.ours, 1),
        row(f"pipeline, {PLAIN_STEPS} PNDM steps, batch 1", generation.plain, 1, PLAIN_STEPS),
        row(f"pipeline, {OWN_STEPS} DPM-Solver++ steps, batch 1", generation.plain, 1, OWN_STEPS),
        row(f"pipeline, {OWN_STEPS} DPM-Solver++ steps, batch {LARGE}", generation.plain, LARGE, OWN_STEPS),
        row(f"ours, {OWN_STEPS} steps, batch {LARGE}, compiled", generation.compiled, LARGE, seconds=75),
    ]


class Generation:
    """The generator and the pipeline, each loaded once, in the dtype that inference.py chooses."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def own_generator(self, *flags: str) -> tuple[ImageGenerator, list]:
        quiet_libraries()
        free_memory()
        side = str(self.settings.resolution)
        words = ["--model", str(model_folder(self.settings)), "--prompt", PROMPT, "--num_images", str(LARGE)]
        args = parse_args([*words, "--width", side, "--height", side, *flags])
        weights = find_weights(args.model)
        plan = plan_images(args, weights, read_shape(weights.base))
        plan = [replace(p, settings=replace(p.settings, steps=self.steps(OWN_STEPS))) for p in plan]
        return ImageGenerator(args, weights, load_samplers(weights, plan), choose_device(), plan), plan

    @cached_property
    def eager(self) -> tuple[ImageGenerator, list]:
        return self.own_generator()

    @cached_property
    def pipeline(self) -> StableDiffusionPipeline:
        free_memory()
        dtype = DTYPES[self.eager[1][0].settings.dtype]
        pipeline = StableDiffusionPipeline.from_pretrained(model_folder(self.settings), torch_dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(choose_device())

    def steps(self, usual: int) -> int:
        return 2 if self.settings.tiny else usual

    def ours(self, batch: int) -> dict:
        return self.time_own(*self.eager, self.settings.batch(batch))

    def compiled(self, batch: int) -> dict:
        need_gpu()
        need_compiler()
        begun = time.perf_counter()
        generator, plan = self.own_generator("--compile")
        generator.generate_images(plan[:batch])
        seconds = time.perf_counter() - begun
        return {**self.time_own(generator, plan, batch), "loading and compiling, s": round(seconds, 1)}

    def time_own(self, generator: ImageGenerator, plan: list, batch: int) -> dict:
        generator.batch_size = batch
        return timed(lambda: len(generator.generate_images(plan[:batch])))

    def plain(self, batch: int, steps: int) -> dict:
        pipeline, batch = self.pipeline, self.settings.batch(batch)
        if steps == OWN_STEPS:
            pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        side = self.settings.resolution

        def generate() -> int:
            return len(pipeline(PROMPT, num_inference_steps=self.steps(steps), num_images_per_prompt=batch,
                                height=side, width=side).images)  # fmt: skip

        return timed(generate)


@torch.no_grad()
def timed(generate: Callable[[], int]) -> dict:
    """Images a second of the second call; the first one warms up."""
    generate()
    synchronize()
    begun = time.perf_counter()
    images = generate()
    synchronize()
    seconds = time.perf_counter() - begun
    return {"images/s": float(f"{images / seconds:.3g}"), "s a batch": round(seconds, 2)}
