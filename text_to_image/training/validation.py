"""Validation while training: the loss on fixed noise and timesteps, and pictures of fixed prompts and seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from PIL import Image

from data.augmentation import Augmentation
from data.images import save_image
from models.defaults import guidance_scale_of
from models.loading import load_vae
from models.samplers import SamplingSettings
from models.sampling import decode_latents, generate_latents, initial_noise, load_sampler
from optimization.ema import averaged
from runs.validation_pictures import FOLDER as PICTURES
from runs.validation_pictures import picture_info, picture_path
from runtime.errors import is_out_of_memory
from training.encoding import Encodings
from training.objective import Objective, diffusion_loss
from training.samples import DATA, HELD_OUT, LatentShape, Sample, keyed_generator, make_batch
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

    def generate(self, step: int, paused: Callable[[], AbstractContextManager]) -> list[Path]:
        """The files in OUTPUT/validation/, after most steps none; WriteError where they cannot be written.

        Pictures that nobody asked for end no run: without the memory for them there are no more.
        """
        state = self.state
        if not self.sampler or step not in self.image_steps or not state.accelerator.is_main_process:
            return []
        try:
            with paused(), averaged(state.ema, state.weights):
                return self.sampler.generate(state.unwrapped, step)
        except RuntimeError as error:
            if self.sampler.asked or not is_out_of_memory(error):
                raise
        self.image_steps.clear()
        print("no memory to generate example pictures: the run goes on without (--no_validation_pictures)", flush=True)
        return []

    def generate_base(self, first_step: int, paused: Callable[[], AbstractContextManager]) -> list[Path]:
        """What the base makes of the prompts, where the run begins with it."""
        return [] if first_step else self.generate(0, paused)


def make_validator(run: PreparedRun, state: TrainState, encodings: Encodings) -> Validator:
    """Fixed samples of the training pictures, and of held-out ones where there are any; the prompts where given.

    Their encodings are read now, so that nothing that happens to the files can end a run between its steps.
    """
    args, plan = run.args, run.plan
    samples = fixed_samples_of(run)
    encodings = encodings.keep(chain.from_iterable(samples.values()), ["", *run.validation_prompts])
    fixed_loss = FixedNoiseLoss(
        samples, encodings, Objective(run.objective.noise_scheduler), run.accelerator.device, run.compute_dtype
    )
    weight_sets = 2 if state.ema.enabled else 1
    loss_steps = measured_steps(
        plan.steps, plan.samples_per_step, samples, weight_sets, args.validation_steps, args.checkpointing_steps
    )
    sampler = make_validation_sampler(run, encodings) if run.validation_prompts else None
    return Validator(state, fixed_loss, sampler, loss_steps, image_steps_of(run, loss_steps))


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
            captions = [image.captions[0] for image in own]
            samples[stream] = fixed_samples(stream, captions, shapes, len(run.objective.noise_scheduler))
    return samples


def fixed_samples(stream: str, captions: Sequence[str], shapes: Sequence[LatentShape], timesteps: int) -> list[Sample]:
    """Each picture of a stream, 16 evenly chosen where there are more, at four fixed timesteps with fixed noise."""
    chosen = torch.linspace(0, len(captions) - 1, min(len(captions), MOST_PICTURES)).round().int().tolist()
    samples = []
    for picture in chosen:
        for quarter in range(TIMESTEPS_PER_PICTURE):
            generator = keyed_generator(0, "validation", stream, picture, quarter)
            posterior_noise, noise = (torch.randn(shapes[picture], generator=generator) for _ in range(2))
            timestep = (2 * quarter + 1) * timesteps // (2 * TIMESTEPS_PER_PICTURE)
            caption = captions[picture]
            samples.append(Sample(stream, picture, Augmentation(), caption, timestep, posterior_noise, noise, noise))
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
    vae: AutoencoderKL  # in CPU memory until it decodes
    scheduler: SchedulerMixin
    latent_shape: LatentShape
    guidance_scale: float
    folder: Path  # OUTPUT
    asked: bool = True  # the prompts were named

    def generate(self, unet: UNet2DConditionModel, step: int) -> list[Path]:
        """OUTPUT/validation/step-000100-0.png and so on."""
        (self.folder / PICTURES).mkdir(parents=True, exist_ok=True)
        negative, files = self.encodings.text(""), []
        for index in range(len(self.prompts) * self.number):
            prompt, seed = divmod(index, self.number)
            latents = generate_latents(
                unet, self.scheduler, initial_noise(seed, self.latent_shape)[None],
                [(self.encodings.text(self.prompts[prompt]), negative)],
                SamplingSettings(SAMPLING_STEPS, self.guidance_scale),
            )  # fmt: skip
            info = picture_info(self.prompts[prompt], seed)
            files.append(save_image(self._decode(latents), picture_path(self.folder, step, index), pnginfo=info))
        return files

    def _decode(self, latents: torch.Tensor) -> Image.Image:
        """The VAE is on the device for this alone: its memory would come on top of every step's."""
        try:
            return decode_latents(self.vae.to(latents.device), latents)[0]
        finally:
            self.vae.to("cpu")


def make_validation_sampler(run: PreparedRun, encodings: Encodings) -> ValidationSampler:
    args, plan = run.args, run.plan
    return ValidationSampler(
        run.validation_prompts,
        args.num_validation_images,
        encodings,
        load_vae(plan.base),
        load_sampler(plan.base, args.prediction_type, args.rescale_betas_zero_snr),
        plan.shape.latent_shape(*plan.main_size),
        guidance_scale_of(plan.base),
        run.folder,
        asked=bool(args.validation_prompts),
    )


def image_steps_of(run: PreparedRun, loss_steps: set[int]) -> set[int]:
    """The optimisation steps after which pictures are generated; 0 is the base."""
    args, plan = run.args, run.plan
    if args.validation_prompts:
        steps_in_epoch = len(plan.pictures) * args.repeats / plan.global_batch
        return {0, *sampled_steps(plan.steps, steps_in_epoch, args.validation_epochs, args.validation_steps)}
    pictures = len(run.validation_prompts) * args.num_validation_images
    return affordable_steps(plan.steps, plan.samples_per_step, pictures, loss_steps)


def affordable_steps(steps: int, samples_per_step: int, pictures: int, measured: set[int]) -> set[int]:
    """Those of the base (0) and the `measured` steps at which `pictures` cost at most a tenth of the run.

    The last step is always among them, the base next, the others evenly chosen.
    """
    round_cost = pictures * SAMPLING_STEPS * 2  # forwards: with the prompt and with the empty one
    rounds = int(MEASURING_SHARE * STEP_COST_IN_FORWARDS * steps * samples_per_step / max(1, round_cost))
    wanted = [0, *sorted(measured)]
    if rounds < 2:
        return {steps}
    return {wanted[index] for index in torch.linspace(0, len(wanted) - 1, min(rounds, len(wanted))).round().int()}


def sampled_steps(steps: int, steps_in_epoch: float, asked_epochs: int | None, asked: int | None) -> set[int]:
    """The optimisation steps (from 1) after which the prompts are generated: always after the last one.

    `asked_epochs` is --validation_epochs, which takes precedence over `asked`, --validation_steps.
    """
    every = (
        math.ceil(asked_epochs * steps_in_epoch) if asked_epochs else asked or math.ceil(steps / DEFAULT_MEASUREMENTS)
    )
    return {*range(every, steps + 1, every), steps}
