"""Pictures that the base draws itself before it is fine-tuned, mixed into training so that it keeps what it knows.

(Prior preservation, as in DreamBooth, arXiv:2208.12242, on the latents: the pictures are never decoded.)
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from models.samplers import SamplingSettings
from models.sampling import generate_latents
from runtime.progress import progress_bar
from training.encodings import is_intact, save_with_checksum
from training.samples import generator

PRIOR_STEPS, PRIOR_BATCH = 20, 4


def prior_batch_size(global_batch: int, prior_images: int) -> int:
    """How many of the base's pictures ride along with `global_batch` of the data set: half as many, rounded up."""
    return (global_batch + 1) // 2 if prior_images else 0


def repeat_prompts(prompts: Sequence[str], prior_images: int) -> list[str]:
    """The prompt of each of the base's pictures, in turn."""
    return [prompts[index % len(prompts)] for index in range(prior_images)]


def generate_prior(
    unet, sampler, prompts: Sequence[str], text: dict, latent_shape, guidance_scale: float, seed: int, indices, quiet
) -> dict[int, torch.Tensor]:
    """Scaled latents (C, h, w) of the pictures `indices` of `prompts`, whose embeddings are in `text`."""
    drawn = {}
    with progress_bar(
        total=len(indices), desc="the base's own pictures", unit="picture", disable=quiet, leave=False
    ) as bar:
        for start in range(0, len(indices), PRIOR_BATCH):
            part = indices[start : start + PRIOR_BATCH]
            noise = torch.stack(
                [torch.randn(latent_shape, generator=generator(seed, "prior picture", i)) for i in part]
            )
            embeddings = [(text[prompts[i]], text[""]) for i in part]
            settings = SamplingSettings(PRIOR_STEPS, guidance_scale)
            latents = generate_latents(unet, sampler, noise, embeddings, settings)
            drawn.update(zip(part, latents.float().cpu(), strict=True))
            bar.update(len(part))
    return drawn


def read_prior(path: Path) -> list[torch.Tensor] | None:
    """The latents that an earlier start has drawn, or None."""
    if not is_intact(path):
        return None
    latents = load_file(path)
    return [latents[str(index)] for index in range(len(latents))]


def write_prior(path: Path, latents: dict[int, torch.Tensor]) -> None:
    save_with_checksum(path, {str(index): latent for index, latent in latents.items()})
