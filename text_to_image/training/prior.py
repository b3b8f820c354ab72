"""Prior preservation: pictures that the base generates before it is fine-tuned, mixed into training so that it keeps
what it knows (DreamBooth, arXiv:2208.12242). They stay latents: nothing is decoded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from diffusers import SchedulerMixin

from data.random_numbers import keyed_generator
from models.folders import fingerprint_model
from models.loading import load_unet, set_attention
from models.samplers import SamplingSettings
from models.sampling import generate_latents, guidance_scale_of, load_sampler, sampling_conditions
from models.text_encoding import TextEmbedding
from runtime.errors import InputChanged
from runtime.files import hash_key
from runtime.processes import run_on_main
from runtime.progress import progress_bar
from runtime.tensor_shards import ShardWriter, TensorShards
from training.samples import LatentShape
from training.setup import PreparedRun

SAMPLER_STEPS, PRIOR_BATCH = 20, 4


def prior_latents(run: PreparedRun, cache_folder: Path, text: Callable[[str], TextEmbedding]) -> list[torch.Tensor]:
    """Latents (C, h, w) of the base's own pictures, generated once; the processes share the work.

    `text` gives the embedding of a prompt.
    """
    plan, accelerator, quiet = run.plan, run.accelerator, not run.is_main
    if not plan.prior_prompts:
        return []
    shape, guidance_scale = plan.shape.latent_shape(*plan.main_size), guidance_scale_of(plan.base)
    key_parts = (*plan.prior_prompts, run.seed, shape, guidance_scale, run.precision, run.args.max_token_chunks)
    key = hash_key(fingerprint_model(plan.base), *key_parts)
    latents = read_prior(cache_folder / "prior", key, len(plan.prior_prompts))
    if all(gather_object([latents is not None])):  # or all make it: none may wait for another that has it
        assert latents is not None
        return latents
    unet = load_unet(plan.base, run.compute_dtype).to(accelerator.device).eval()
    set_attention(unet, plan.shape, *plan.main_size, accelerator.device.type)
    embeddings = {prompt: text(prompt) for prompt in ["", *plan.prior_prompts]}
    settings = SamplingSettings(SAMPLER_STEPS, guidance_scale)
    sampler = load_sampler(plan.base)
    prior = PriorGenerator(unet, sampler, plan.prior_prompts, embeddings, shape, plan.main_size, settings)
    with accelerator.autocast():
        own = prior.generate(run.seed, run.process_share(len(plan.prior_prompts)), quiet)
    generated = {index: latent for share in gather_object([own]) for index, latent in share.items()}
    run_on_main(accelerator, lambda: write_prior(cache_folder / "prior", key, generated))
    return [generated[index] for index in range(len(generated))]


@dataclass(frozen=True)
class PriorGenerator:
    """The base and what it generates: picture i shows `prompts[i]`."""

    unet: torch.nn.Module
    sampler: SchedulerMixin
    prompts: Sequence[str]
    embeddings: Mapping[str, TextEmbedding]  # of each prompt, and of ''
    latent_shape: LatentShape
    size: tuple[int, int]  # height and width in pixels
    settings: SamplingSettings

    def generate(self, seed: int, indices: Sequence[int], quiet: bool) -> dict[int, torch.Tensor]:
        """Scaled latents (C, h, w) of the pictures `indices`, the same whichever process generates them."""
        generated: dict[int, torch.Tensor] = {}
        bar = progress_bar(total=len(indices), desc="prior images", unit="picture", disable=quiet, leave=False)
        with bar:
            for start in range(0, len(indices), PRIOR_BATCH):
                batch = indices[start : start + PRIOR_BATCH]
                generated.update(zip(batch, self._latents(seed, batch).float().cpu(), strict=True))
                bar.update(len(batch))
        return generated

    def _latents(self, seed: int, batch: Sequence[int]) -> torch.Tensor:
        generators = (keyed_generator(seed, "prior picture", index) for index in batch)
        noise = torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])
        pairs = [(self.embeddings[self.prompts[index]], self.embeddings[""]) for index in batch]
        conditions = sampling_conditions(pairs, self.size, self.settings)
        return generate_latents(self.unet, self.sampler, noise, conditions, self.settings)


def read_prior(folder: Path, key: str, count: int) -> list[torch.Tensor] | None:
    """The latents that an earlier start left there, or None."""
    shards, names = TensorShards(folder), [f"{key} {index}" for index in range(count)]
    if not shards.has(names).all():
        return None
    try:
        return [shards.read(name) for name in names]
    except InputChanged:
        return None


def write_prior(folder: Path, key: str, latents: dict[int, torch.Tensor]) -> None:
    with ShardWriter(folder) as writer:
        for index, latent in latents.items():
            writer.add({f"{key} {index}": latent})
