"""The loaded model: drawings → pictures, batch by batch."""

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from PIL import Image

from generation.output_files import PlannedImage
from generation.safety_checker import NoChecker, SafetyChecker
from generation.weights import GenerationWeights, load_generation_text_encoder, load_generation_unet, sampler_of
from models.folders import read_shape
from models.loading import DTYPES, load_tokenizer, load_vae, set_attention
from models.sampling import decode_latents, generate_latents, initial_noise, seeded_generator
from models.text_encoding import count_tokens, encode_prompt
from runtime.devices import keep_freed_memory
from runtime.errors import UserError, WorkError, escape_control_chars, first_line, is_out_of_memory

Painted = tuple[Sequence[PlannedImage], Sequence[Image.Image], list[bool]]
AUTO_BATCH = {"cuda": 16, "cpu": 4}  # to begin with; on a CPU larger ones are no faster


def load_samplers(source: GenerationWeights, drawings: Sequence[PlannedImage]) -> dict[str, object]:
    """The samplers that `drawings` need, by name; UserError where one cannot take so many steps. Loads no weight."""
    samplers = {name: sampler_of(source, name) for name in {d.settings["scheduler"] for d in drawings}}
    for name, steps in {(d.settings["scheduler"], d.settings["steps"]) for d in drawings}:
        try:
            samplers[name].set_timesteps(steps)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise UserError(f"--steps {steps} with --scheduler {name}: {first_line(error)}") from None
    return samplers


class ImageGenerator:
    """The loaded model, and everything that is the same for all pictures."""

    def __init__(
        self,
        args: argparse.Namespace,
        source: GenerationWeights,
        samplers: dict[str, object],
        device: torch.device,
        drawings: Sequence[PlannedImage],
    ):
        keep_freed_memory()
        settings, self.device, self.samplers = drawings[0].settings, device, samplers
        self.batch_size = AUTO_BATCH[device.type] if args.batch_size == "auto" else args.batch_size
        self.fitting: dict[tuple[int, int], int] = {}  # what did fit, where the batch size did not, by the size
        self.dtype, self.shape = settings["dtype"], read_shape(source.base)
        texts = dict.fromkeys(text for d in drawings for text in (d.settings["negative_prompt"], d.prompt))
        self.text = encode_all_prompts(source, list(texts), settings["token_chunks"], device, DTYPES[self.dtype])
        unet = load_generation_unet(source, DTYPES[self.dtype]).to(device)
        height, width = max(((d.settings["height"], d.settings["width"]) for d in drawings), key=math.prod)
        set_attention(unet, self.shape, height, width, device.type)
        self.unet = torch.compile(unet) if args.compile else unet
        # fp32 also on a GPU: half precision shows and saves little. A CPU's convolutions are faster in channels_last.
        layout = torch.channels_last if device.type == "cpu" else torch.preserve_format
        self.vae = load_vae(source.base).to(device, memory_format=layout)
        self.checker = SafetyChecker(source.base, device) if settings["safety_checker"] else NoChecker()

    def draw(self, drawings: Sequence[PlannedImage]) -> Iterator[Painted]:
        """Batch by batch: the drawings, their pictures, and which of those the safety checker has blackened.

        A batch that does not fit into the memory is halved, and so are all of its size that follow it.
        """
        for _, group in groupby(drawings, key=lambda d: {**d.settings, "negative_prompt": None}):
            waiting = list(group)
            while waiting:
                batch = waiting[: self.fitting.get(_size(waiting[0]), self.batch_size)]
                if (checked := self.paint_if_it_fits(batch)) is None:
                    self.halve_batch_size(batch)
                    continue
                yield batch, *checked
                waiting = waiting[len(batch) :]

    def paint_if_it_fits(self, batch: Sequence[PlannedImage]) -> tuple[Sequence[Image.Image], list[bool]] | None:
        """The pictures and which of them are blackened; None where the memory does not suffice. What the attempt held
        is free again when this returns."""
        try:
            return self.checker.check(self.paint(batch))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def paint(self, batch: Sequence[PlannedImage]) -> list[Image.Image]:
        settings = batch[0].settings
        latent_shape = self.shape.latent_shape(settings["height"], settings["width"])
        generators = [seeded_generator(drawing.seed) for drawing in batch]
        latents = generate_latents(
            self.unet, self.samplers[settings["scheduler"]],
            torch.stack([initial_noise(generator, latent_shape) for generator in generators]),
            [self.text[drawing.prompt] for drawing in batch],
            [self.text[drawing.settings["negative_prompt"]] for drawing in batch],
            settings["guidance"], settings["steps"], settings["guidance_rescale"], generators,
        )  # fmt: skip
        if not latents.isfinite().all():
            raise WorkError(
                f"the numbers of {batch[0].file_name} or one drawn with it overflow in {self.dtype}; --dtype bf16 or "
                "fp32 may hold them, and a lower --guidance_scale helps"
            )
        return decode_latents(self.vae, latents)

    def halve_batch_size(self, batch: Sequence[PlannedImage]) -> None:
        """Half of the batch size that was too much; WorkError where that was one picture."""
        height, width = _size(batch[0])
        if len(batch) == 1:
            raise WorkError(f"not enough memory for one picture of {width} x {height} px; a smaller --width, --height")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.fitting[height, width] = len(batch) // 2
        print(f"not enough memory for {len(batch)} pictures at once: going on with {len(batch) // 2}", flush=True)


def _size(drawing: PlannedImage) -> tuple[int, int]:
    return drawing.settings["height"], drawing.settings["width"]


def encode_all_prompts(
    source: GenerationWeights, prompts: Sequence[str], chunks: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The embedding of each prompt, in the CPU's memory, as training read its captions; the text encoder is gone when
    this returns."""
    tokenizer, text_encoder = load_tokenizer(source.base), load_generation_text_encoder(source, dtype).to(device)
    room = chunks * (tokenizer.model_max_length - 2)
    for prompt in prompts:
        if (tokens := count_tokens(tokenizer, prompt)) > room:
            print(escape_control_chars(f"only the first {room} of {tokens} tokens are read of: {prompt}"))
    return {prompt: encode_prompt(tokenizer, text_encoder, prompt, chunks).cpu() for prompt in prompts}
