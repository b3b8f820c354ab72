"""The loaded model: planned images → pictures, batch by batch."""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from PIL import Image

from generation.planned_images import GeneratedBatch, GenerationSettings, PlannedImage
from generation.safety_checker import ImageChecker, NoSafetyChecker, SafetyChecker
from generation.weights import (
    GenerationWeights,
    load_generation_prompt_encoder,
    load_generation_sampler,
    load_generation_unet,
)
from models.folders import read_shape
from models.loading import DTYPES, load_vae, set_attention
from models.sampling import (
    decode_latents,
    generate_latents,
    initial_noise,
    sampling_conditions,
    seeded_generator,
)
from models.text_encoding import TextEmbedding, count_tokens
from runtime.devices import disable_cudnn_attention, keep_freed_memory
from runtime.errors import UserError, WorkError, escape_control_chars, first_line, is_out_of_memory

AUTO_BATCH_SIZE = {"cuda": 16, "cpu": 4}  # larger ones are no faster on a CPU


def load_samplers(weights: GenerationWeights, plan: Sequence[PlannedImage]) -> dict[str, SchedulerMixin]:
    """The samplers that `plan` needs, by name; UserError where one cannot take so many steps. Loads no weight."""
    pairs = {(planned.settings.scheduler, planned.settings.steps) for planned in plan}
    samplers = {name: load_generation_sampler(weights, name) for name in {name for name, _ in pairs}}
    for name, steps in pairs:
        try:
            samplers[name].set_timesteps(steps)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise UserError(f"--steps {steps} with --scheduler {name}: {first_line(error)}") from None
    return samplers


class ImageGenerator:
    """The model on its device, with the embeddings of every prompt it will be asked for.

    `plan` is what it will generate: images of one dtype, token limit and safety checker.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        weights: GenerationWeights,
        samplers: dict[str, SchedulerMixin],
        device: torch.device,
        plan: Sequence[PlannedImage],
    ):
        keep_freed_memory()
        disable_cudnn_attention()
        settings = plan[0].settings
        self.device, self.samplers, self.shape = device, samplers, read_shape(weights.base)
        self.batch_size = AUTO_BATCH_SIZE[device.type] if args.batch_size == "auto" else args.batch_size
        self.fitting_batch_sizes: dict[tuple[int, int], int] = {}  # by (height, width), where batch_size is too large
        # In this order, so that the text encoder is gone before the UNet is loaded:
        self.embeddings = encode_planned_prompts(plan, weights, device)
        self.compile, self.largest = args.compile, max((i.settings.size for i in plan), key=math.prod)
        self.dtype = DTYPES[settings.dtype]
        self.unet: UNet2DConditionModel | None = None
        self.load_unet(weights)
        self.vae = _load_vae(weights, device)
        self.checker: ImageChecker = (
            SafetyChecker(weights.base, device) if settings.safety_checker else NoSafetyChecker()
        )

    def load_unet(self, weights: GenerationWeights) -> None:
        """Generates with the UNet of these weights from now on. The one before is freed first."""
        self.unet = None
        unet = load_generation_unet(weights, self.dtype).to(self.device)
        set_attention(unet, self.shape, *self.largest, self.device.type)
        self.unet = torch.compile(unet) if self.compile else unet

    def generate(self, plan: Sequence[PlannedImage]) -> Iterator[GeneratedBatch]:
        """Batch by batch, in the order of `plan`.

        A batch that does not fit into memory is halved, and so are the later batches of its size. Raises WorkError
        where one picture does not fit, or where latents are not finite.
        """
        for _, group in groupby(plan, key=_batch_key):
            waiting = list(group)
            while waiting:
                planned = waiting[: self.fitting_batch_sizes.get(waiting[0].settings.size, self.batch_size)]
                if (batch := self.try_batch(planned)) is None:
                    self.halve_batch_size(planned)
                    continue
                yield batch
                waiting = waiting[len(planned) :]

    def try_batch(self, planned: Sequence[PlannedImage]) -> GeneratedBatch | None:
        """None where the memory does not suffice. On return, the memory that the attempt held is free again."""
        try:
            images, withheld = self.checker.check(self.generate_images(planned))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        return GeneratedBatch(planned, images, withheld)

    def generate_images(self, planned: Sequence[PlannedImage]) -> list[Image.Image]:
        """The pictures of one batch: their settings may differ in the negative prompt alone."""
        settings = planned[0].settings
        latent_shape = self.shape.latent_shape(*settings.size)
        generators = [seeded_generator(image.seed) for image in planned]
        noise = torch.stack([initial_noise(generator, latent_shape) for generator in generators])
        pairs = [(self.embeddings[i.prompt], self.embeddings[i.settings.negative_prompt]) for i in planned]
        conditions = sampling_conditions(pairs, settings.size, settings.sampling)
        sampler = self.samplers[settings.scheduler]
        latents = generate_latents(self.unet, sampler, noise, conditions, settings.sampling, generators)
        if not latents.isfinite().all():
            raise WorkError(
                f"{planned[0].file_name} or another picture of its batch overflows in {settings.dtype}: its latents "
                "are not finite; try --dtype bf16 or fp32, or a lower --guidance_scale"
            )
        return decode_latents(self.vae, latents)

    def halve_batch_size(self, planned: Sequence[PlannedImage]) -> None:
        """For pictures of this size, after a batch that did not fit; WorkError where that was one picture."""
        height, width = planned[0].settings.size
        if len(planned) == 1:
            raise WorkError(
                f"not enough memory for one picture of {width} x {height} px; a smaller --width or --height needs less"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.fitting_batch_sizes[height, width] = len(planned) // 2
        print(f"not enough memory for {len(planned)} pictures at once: going on with {len(planned) // 2}", flush=True)


def _batch_key(planned: PlannedImage) -> GenerationSettings:
    """Pictures with one key can be generated together."""
    return replace(planned.settings, negative_prompt="")


def _load_vae(weights: GenerationWeights, device: torch.device) -> AutoencoderKL:
    """In fp32, also on a GPU: half precision is visible and saves little."""
    # A CPU's convolutions are faster in channels_last.
    memory_format = torch.channels_last if device.type == "cpu" else torch.preserve_format
    return load_vae(weights.base).to(device, memory_format=memory_format)


def encode_planned_prompts(
    plan: Sequence[PlannedImage], weights: GenerationWeights, device: torch.device
) -> dict[str, TextEmbedding]:
    settings = plan[0].settings
    prompts = dict.fromkeys(text for i in plan for text in (i.settings.negative_prompt, i.prompt))
    return encode_all_prompts(weights, list(prompts), settings.token_chunks, device, DTYPES[settings.dtype])


def encode_all_prompts(
    weights: GenerationWeights, prompts: Sequence[str], max_chunks: int, device: torch.device, dtype: torch.dtype
) -> dict[str, TextEmbedding]:
    """{prompt: its embedding on the CPU}, read as training reads captions. The text encoders are freed."""
    encoder = load_generation_prompt_encoder(weights, max_chunks, device, dtype)
    tokenizer = encoder.tokenizer
    limit = max_chunks * (tokenizer.model_max_length - 2)
    for prompt in prompts:
        if (tokens := count_tokens(tokenizer, prompt)) > limit:
            print(escape_control_chars(f"only the first {limit} of {tokens} tokens are read of: {prompt}"))
    return {prompt: encoder(prompt).to("cpu") for prompt in prompts}
