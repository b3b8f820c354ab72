"""What is looked at while training: a loss on fixed noise and timesteps, and pictures of fixed prompts and seeds."""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from data.augmentation import Augmentation
from data.images import save_image
from models.samplers import SamplingSettings
from models.sampling import decode_latents, generate_latents, initial_noise
from training.batches import DATA, HELD_OUT, make_batch
from training.objective import Objective, diffusion_loss
from training.samples import Sample, generator

TIMESTEPS_PER_PICTURE = 4  # the middle of each quarter of the schedule
MOST_PICTURES = 16  # of each stream; more would cost more than they tell
MEASURED, MEASURED_HELD_OUT = 4, 10  # times in a run
# The most that measuring takes of the time that the steps take, unless --validation_steps asks for more.
MEASURING = 0.1
FORWARD_PASSES = 3  # that a training step takes as long as: one forward, and backward twice that
DRAWING_STEPS = 25
LOSS_NAMES = {HELD_OUT: "val_loss", DATA: "train_fixed_loss"}


def fixed_samples(stream: str, captions: Sequence[str], shapes: Sequence[tuple], timesteps: int) -> list[Sample]:
    """Every picture of a stream, evenly chosen where they are many, at fixed timesteps with fixed noise of its own."""
    chosen = torch.linspace(0, len(captions) - 1, min(len(captions), MOST_PICTURES)).round().int().tolist()
    drawn = []
    for picture in chosen:
        for quarter in range(TIMESTEPS_PER_PICTURE):
            chance = generator(0, "validation", stream, picture, quarter)
            posterior_noise, noise = (torch.randn(shapes[picture], generator=chance) for _ in range(2))
            timestep = (2 * quarter + 1) * timesteps // (2 * TIMESTEPS_PER_PICTURE)
            drawn.append(
                Sample(stream, picture, Augmentation(), captions[picture], timestep, posterior_noise, noise, noise)
            )
    return drawn


def measured_steps(
    steps: int, samples_per_step: int, draws: Mapping[str, Sequence[Sample]], weight_sets: int, asked: int | None,
    checkpointing_steps: int,
) -> set[int]:  # fmt: skip
    """The optimisation steps (from 1) after which the loss on fixed noise is measured: always after the last one.

    `asked` is --validation_steps; `weight_sets` is 2 where the average is measured beside the trained weights. With
    held-out pictures all steps that leave a checkpoint are among them, since the best of those is kept.
    """
    held_out = HELD_OUT in draws
    work = sum(map(len, draws.values())) * weight_sets
    affordable = int(MEASURING * FORWARD_PASSES * steps * samples_per_step / work)
    times = max(1, min(MEASURED_HELD_OUT if held_out else MEASURED, affordable))
    every = asked or math.ceil(steps / times)
    kept = range(checkpointing_steps, steps + 1, checkpointing_steps) if held_out else ()
    return {*range(every, steps + 1, every), *kept, steps}


def sampled_steps(steps: int, steps_in_epoch: float, asked_epochs: int | None, asked: int | None) -> set[int]:
    """The optimisation steps (from 1) after which the prompts are drawn: always after the last one.

    `asked_epochs` is --validation_epochs, which counts before `asked`, --validation_steps.
    """
    every = math.ceil(asked_epochs * steps_in_epoch) if asked_epochs else asked or math.ceil(steps / MEASURED)
    return {*range(every, steps + 1, every), steps}


@dataclass(frozen=True)
class FixedNoiseLoss:
    """The mean loss of the same pictures, captions, noise and timesteps whenever it is measured."""

    draws: dict[str, list[Sample]]  # by stream
    encodings: object
    objective: Objective  # the plain one: no weights, no DREAM, so that the number means the same in every run
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def measure(self, unet, accelerator, ending: str = "") -> dict[str, float]:
        """{name of the loss: its mean over all processes}"""
        totals = torch.zeros(len(self.draws), device=self.device)
        for row, draws in enumerate(self.draws.values()):
            own = draws[accelerator.process_index :: accelerator.num_processes]
            for _, alike in groupby(own, key=lambda draw: draw.picture):  # one size and caption: one batch
                batch = make_batch(self.encodings, list(alike), self.device, self.dtype)
                totals[row] += diffusion_loss(unet, self.objective, batch).sum() / len(draws)
        totals = accelerator.reduce(totals, reduction="sum").tolist()
        return {LOSS_NAMES[stream] + ending: total for stream, total in zip(self.draws, totals, strict=True)}


@dataclass(frozen=True)
class ValidationSampler:
    """Draws each prompt `number` times with the same seeds, from generators of its own: training's are untouched."""

    prompts: Sequence[str]
    number: int
    encodings: object  # has text(prompt) -> (L, D)
    vae: object
    sampler: object
    latent_shape: tuple[int, int, int]
    guidance_scale: float
    folder: Path

    def draw(self, unet, step: int) -> None:
        """OUTPUT/validation/step-000100-0.png and so on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        negative = self.encodings.text("")
        for index in range(len(self.prompts) * self.number):
            prompt, seed = divmod(index, self.number)
            latents = generate_latents(
                unet, self.sampler, initial_noise(seed, self.latent_shape)[None],
                [(self.encodings.text(self.prompts[prompt]), negative)],
                SamplingSettings(DRAWING_STEPS, self.guidance_scale),
            )  # fmt: skip
            save_image(decode_latents(self.vae, latents)[0], self.folder / f"step-{step:06d}-{index}.png")


@dataclass(frozen=True)
class Validator:
    """Measures the loss and draws the prompts where it is time to, with the averaged weights too."""

    accelerator: object
    unet: object  # not wrapped for several processes: each measures its share by itself
    weights: object
    average: object
    fixed_loss: FixedNoiseLoss
    drawer: ValidationSampler | None
    measured: set[int]  # after these steps
    drawn: set[int]

    def at(self, step: int) -> Callable[[], dict[str, float]] | None:
        """What looks at the weights after optimisation step `step` (from 1) and returns what it measured, for the
        step's row in metrics.jsonl; None after most steps."""
        return functools.partial(self._look, step) if step in self.measured or step in self.drawn else None

    def _look(self, step: int) -> dict[str, float]:
        found = {}
        if step in self.measured:
            found = self.fixed_loss.measure(self.unet, self.accelerator)
            if self.average.enabled:
                with averaged(self.average, self.weights):
                    found |= self.fixed_loss.measure(self.unet, self.accelerator, "_ema")
        if self.drawer and step in self.drawn and self.accelerator.is_main_process:
            with averaged(self.average, self.weights):
                self.drawer.draw(self.unet, step)
        return found


@contextmanager
def averaged(average, weights) -> Iterator[None]:
    """The UNet with its averaged weights, for the block."""
    average.store(weights.parameters)
    average.copy_to(weights.parameters)
    weights.sync_to_model()
    try:
        yield
    finally:
        average.restore(weights.parameters)
        weights.sync_to_model()


def best_step(rows: Sequence[dict], among: Collection[int] | None = None) -> tuple[int, str, float] | None:
    """(step, name, loss) of the lowest held-out loss in the rows of metrics.jsonl, of the weights that are saved.

    `among` are the steps that count; None: all.
    """
    for name in ("val_loss_ema", "val_loss"):
        if measured := [row for row in rows if name in row and (among is None or row["step"] in among)]:
            best = min(measured, key=lambda row: row[name])
            return best["step"], name, best[name]
    return None
