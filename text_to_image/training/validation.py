"""Validation while training: the loss on fixed noise and timesteps, and pictures of fixed prompts and seeds."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel

from data.augmentation import Augmentation
from data.buckets import ImageToEncode
from data.images import save_image
from data.random_numbers import keyed_generator
from models.defaults import guidance_scale_of
from models.loading import load_vae
from models.samplers import SamplingSettings
from models.sampling import decode_latents, generate_latents, initial_noise, load_sampler, sampling_conditions
from optimization.ema import averaged
from training.encoding import Encodings
from training.objective import Objective, diffusion_loss
from training.samples import DATA, HELD_OUT, LatentShape, Sample, make_batch
from training.setup import PreparedRun
from training.state import TrainState

TIMESTEPS_PER_PICTURE = 4  # the middle of each quarter of the schedule
MOST_PICTURES = 16  # of each stream, to limit the cost
DEFAULT_MEASUREMENTS, DEFAULT_MEASUREMENTS_HELD_OUT = 4, 10  # in a run
# The most that measuring takes of the time that the steps take, unless --validation_steps asks for more.
MEASURING_SHARE = 0.1
STEP_COST_IN_FORWARDS = 3  # that a training step takes as long as: one forward, and backward twice that
SAMPLING_STEPS = 25
LOSS_NAMES = {HELD_OUT: "val_loss", DATA: "train_fixed_loss"}


@dataclass(frozen=True)
class Validator:
    """Measures the loss and generates the validation prompts after the steps that are due, with the EMA too."""

    state: TrainState
    fixed_loss: "FixedNoiseLoss"
    sampler: "ValidationSampler | None"
    loss_steps: set[int]  # after which the loss is measured
    image_steps: set[int]  # after which the prompts are generated

    def measure(self, step: int, paused: Callable[[], AbstractContextManager]) -> dict[str, float]:
        """{name of a loss: its value} after optimisation step `step` (from 1), empty after most.

        Meanwhile the clock of the steps is `paused`.
        """
        if step not in self.loss_steps:
            return {}
        state = self.state
        with paused():
            # The unwrapped UNet: each process measures its share by itself.
            losses = self.fixed_loss.measure(state.unwrapped, state.accelerator)
            if state.ema.enabled:
                with averaged(state.ema, state.weights):
                    losses |= self.fixed_loss.measure(state.unwrapped, state.accelerator, "_ema")
        return losses

    def generate(self, step: int, paused: Callable[[], AbstractContextManager]) -> None:
        """After most steps nothing. Pictures go into OUTPUT/validation/; WriteError where they cannot be written."""
        state = self.state
        if self.sampler and step in self.image_steps and state.accelerator.is_main_process:
            with paused(), averaged(state.ema, state.weights):
                self.sampler.generate(state.unwrapped, step)


def make_validator(run: PreparedRun, state: TrainState, encodings: Encodings) -> Validator:
    """Fixed samples of the training pictures, and of held-out ones where there are any; the prompts where given.

    Their encodings are read now, so that nothing that happens to the files can end a run between its steps.
    """
    args, plan = run.args, run.plan
    samples = fixed_samples_of(run)
    encodings = encodings.keep(chain.from_iterable(samples.values()), ["", *(args.validation_prompts or [])])
    fixed_loss = FixedNoiseLoss(
        samples, encodings, Objective(run.objective.noise_scheduler), run.accelerator.device, run.compute_dtype
    )
    weight_sets = 2 if state.ema.enabled else 1
    steps_in_epoch = plan.epoch_samples / plan.global_batch
    return Validator(
        state,
        fixed_loss,
        make_validation_sampler(run, encodings) if args.validation_prompts else None,
        loss_steps=measured_steps(
            plan.steps, plan.samples_per_step, samples, weight_sets, args.validation_steps, args.checkpointing_steps
        ),
        image_steps=sampled_steps(plan.steps, steps_in_epoch, args.validation_epochs, args.validation_steps),
    )


# --- The loss on fixed noise ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedNoiseLoss:
    """The mean loss of the same pictures, captions, noise and timesteps whenever it is measured."""

    samples: Mapping[str, Sequence[Sample]]  # by stream
    encodings: Encodings
    objective: Objective  # the plain one: no SNR weights, no DREAM, so that the number means the same in every run
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def measure(self, unet: UNet2DConditionModel, accelerator: Accelerator, suffix: str = "") -> dict[str, float]:
        """{name of the loss + `suffix`: its mean over all processes}"""
        totals = torch.zeros(len(self.samples), device=self.device)
        for row, samples in enumerate(self.samples.values()):
            own = samples[accelerator.process_index :: accelerator.num_processes]
            for _, group in groupby(own, key=lambda sample: sample.picture):  # one size and caption: one batch
                batch = make_batch(self.encodings, list(group), self.device, self.dtype)
                totals[row] += diffusion_loss(unet, self.objective, batch).sum() / len(samples)
        means = accelerator.reduce(totals, reduction="sum").tolist()
        return {LOSS_NAMES[stream] + suffix: mean for stream, mean in zip(self.samples, means, strict=True)}


def fixed_samples_of(run: PreparedRun) -> dict[str, list[Sample]]:
    """By stream; the held-out pictures first."""
    images, samples = run.plan.images_to_encode, {}
    for stream in (HELD_OUT, DATA):
        if own := [image for (own_stream, _), image in images.items() if own_stream == stream]:
            shapes = [run.plan.shape.latent_shape(*image.size) for image in own]
            samples[stream] = fixed_samples(stream, own, shapes, len(run.objective.noise_scheduler))
    return samples


def fixed_samples(
    stream: str, images: Sequence[ImageToEncode], shapes: Sequence[LatentShape], timesteps: int
) -> list[Sample]:
    """Each picture of a stream, 16 evenly chosen where there are more, at four fixed timesteps with fixed noise."""
    chosen = torch.linspace(0, len(images) - 1, min(len(images), MOST_PICTURES)).round().int().tolist()
    samples = []
    for picture in chosen:
        for quarter in range(TIMESTEPS_PER_PICTURE):
            generator = keyed_generator(0, "validation", stream, picture, quarter)
            posterior_noise, noise = (torch.randn(shapes[picture], generator=generator) for _ in range(2))
            timestep = (2 * quarter + 1) * timesteps // (2 * TIMESTEPS_PER_PICTURE)
            caption, ids = images[picture].captions[0], images[picture].time_ids
            samples.append(
                Sample(stream, picture, Augmentation(), caption, timestep, posterior_noise, noise, noise, ids)
            )
    return samples


def measured_steps(
    steps: int, samples_per_step: int, samples: Mapping[str, Sequence[Sample]], weight_sets: int, asked: int | None,
    checkpointing_steps: int,
) -> set[int]:  # fmt: skip
    """The optimisation steps (from 1) after which the loss on fixed noise is measured: always after the last one.

    `asked` is --validation_steps; `weight_sets` is 2 where the EMA is measured beside the trained weights. With
    held-out pictures all steps that leave a checkpoint are among them, since the best of those is kept.
    """
    held_out = HELD_OUT in samples
    work = sum(map(len, samples.values())) * weight_sets
    affordable = int(MEASURING_SHARE * STEP_COST_IN_FORWARDS * steps * samples_per_step / work)
    times = max(1, min(DEFAULT_MEASUREMENTS_HELD_OUT if held_out else DEFAULT_MEASUREMENTS, affordable))
    every = asked or math.ceil(steps / times)
    checkpoints = range(checkpointing_steps, steps + 1, checkpointing_steps) if held_out else ()
    return {*range(every, steps + 1, every), *checkpoints, steps}


# --- Pictures of the validation prompts -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ValidationSampler:
    """Generates each prompt `number` times, always with the same seeds; training's randomness is untouched."""

    prompts: Sequence[str]
    number: int
    encodings: Encodings
    vae: AutoencoderKL
    scheduler: SchedulerMixin
    latent_shape: LatentShape
    size: tuple[int, int]  # height and width in pixels
    settings: SamplingSettings
    folder: Path

    def generate(self, unet: UNet2DConditionModel, step: int) -> None:
        """OUTPUT/validation/step-000100-0.png and so on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        negative = self.encodings.text("")
        for index in range(len(self.prompts) * self.number):
            prompt, seed = divmod(index, self.number)
            pairs = [(self.encodings.text(self.prompts[prompt]), negative)]
            conditions = sampling_conditions(pairs, self.size, self.settings)
            noise = initial_noise(seed, self.latent_shape)[None]
            latents = generate_latents(unet, self.scheduler, noise, conditions, self.settings)
            save_image(decode_latents(self.vae, latents)[0], self.folder / f"step-{step:06d}-{index}.png")


def make_validation_sampler(run: PreparedRun, encodings: Encodings) -> ValidationSampler:
    args, plan = run.args, run.plan
    return ValidationSampler(
        args.validation_prompts,
        args.num_validation_images,
        encodings,
        load_vae(plan.base).to(run.accelerator.device),
        load_sampler(plan.base, args.prediction_type, args.rescale_betas_zero_snr),
        plan.shape.latent_shape(*plan.main_size),
        plan.main_size,
        SamplingSettings(SAMPLING_STEPS, guidance_scale_of(plan.base)),
        run.folder / "validation",
    )


def sampled_steps(steps: int, steps_in_epoch: float, asked_epochs: int | None, asked: int | None) -> set[int]:
    """The optimisation steps (from 1) after which the prompts are generated: always after the last one.

    `asked_epochs` is --validation_epochs, which takes precedence over `asked`, --validation_steps.
    """
    every = (
        math.ceil(asked_epochs * steps_in_epoch) if asked_epochs else asked or math.ceil(steps / DEFAULT_MEASUREMENTS)
    )
    return {*range(every, steps + 1, every), steps}


# --- What was measured ----------------------------------------------------------------------------------------------


def best_step(rows: Sequence[dict], among: Collection[int] | None = None) -> tuple[int, str, float] | None:
    """(step, name, loss) of the lowest held-out loss in the rows of metrics.jsonl, of the weights that are saved.

    `among` are the steps that count; None: all.
    """
    for name in ("val_loss_ema", "val_loss"):
        if measured := [row for row in rows if name in row and (among is None or row["step"] in among)]:
            best = min(measured, key=lambda row: row[name])
            return best["step"], name, best[name]
    return None
