"""What is looked at while training: a loss on fixed noise and timesteps, and pictures of fixed prompts and seeds."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from batches import make_batch
from draws import Draw, generator
from objective import Objective, diffusion_loss
from picture_files import save_image
from sampling import decode_latents, draw_latents, initial_noise

TIMESTEPS_PER_PICTURE = 4  # the middle of each quarter of the schedule
MOST_PICTURES = 16  # of each stream; more would cost more than they tell
MEASURED, MEASURED_HELD_OUT = 4, 10  # times in a run
DRAWING_STEPS = 25
LOSS_NAMES = {"held out": "val_loss", "data": "train_fixed_loss"}


def fixed_draws(stream: str, captions: Sequence[str], shapes: Sequence[tuple], timesteps: int) -> list[Draw]:
    """Every picture of a stream, evenly chosen where they are many, at fixed timesteps with fixed noise of its own."""
    chosen = torch.linspace(0, len(captions) - 1, min(len(captions), MOST_PICTURES)).round().int().tolist()
    drawn = []
    for picture in chosen:
        for quarter in range(TIMESTEPS_PER_PICTURE):
            chance = generator(0, "validation", stream, picture, quarter)
            posterior_noise, noise = (torch.randn(shapes[picture], generator=chance) for _ in range(2))
            timestep = (2 * quarter + 1) * timesteps // (2 * TIMESTEPS_PER_PICTURE)
            drawn.append(Draw(stream, picture, False, captions[picture], timestep, posterior_noise, noise, noise))
    return drawn


@dataclass(frozen=True)
class FixedLoss:
    """The mean loss of the same pictures, captions, noise and timesteps whenever it is measured."""

    draws: dict[str, list[Draw]]  # by stream
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
class PromptDrawer:
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
            latents = draw_latents(
                unet, self.sampler, initial_noise(seed, self.latent_shape)[None],
                [self.encodings.text(self.prompts[prompt])], [negative], self.guidance_scale, DRAWING_STEPS,
            )  # fmt: skip
            save_image(decode_latents(self.vae, latents)[0], self.folder / f"step-{step:06d}-{index}.png")


@dataclass(frozen=True)
class Watch:
    """Measures the loss and draws the prompts where it is time to, with the averaged weights too."""

    accelerator: object
    unet: object  # not wrapped for several processes: each measures its share by itself
    weights: object
    average: object
    fixed_loss: FixedLoss
    drawer: PromptDrawer | None
    measured: set[int]  # after these steps, among them all that leave a checkpoint: the best of those is kept
    drawn: set[int]

    def after(self, step: int) -> dict[str, float]:
        """What was measured after optimisation step `step` (from 1), for its row in metrics.jsonl."""
        found = {}
        if step in self.measured:
            found = self.fixed_loss.measure(self.unet, self.accelerator)
            if self.average.kept:
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
    weights.publish()
    try:
        yield
    finally:
        average.restore(weights.parameters)
        weights.publish()


def best_step(rows: Sequence[dict], among: Collection[int] | None = None) -> tuple[int, str, float] | None:
    """(step, name, loss) of the lowest held-out loss in the rows of metrics.jsonl, of the weights that are saved.

    `among` are the steps that count; None: all.
    """
    for name in ("val_loss_ema", "val_loss"):
        if measured := [row for row in rows if name in row and (among is None or row["step"] in among)]:
            best = min(measured, key=lambda row: row[name])
            return best["step"], name, best[name]
    return None
