"""From noise to pictures: diffusers' samplers on the model's own noise schedule, and classifier-free guidance."""

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image

from models.conditions import Conditions, whole_picture
from models.defaults import GUIDANCE_SCALE, XL_GUIDANCE_SCALE, recommended_guidance_scale
from models.folders import FolderLike, is_xl, loading_errors
from models.samplers import DEFAULT_SAMPLER, SAMPLERS, SamplingSettings
from models.text_encoding import TextEmbedding
from runtime.errors import UserError, is_out_of_memory

TILE = 512  # pixels, along each side
PromptPair = tuple[TextEmbedding, TextEmbedding]  # of a prompt and of its negative prompt


def guidance_scale_of(folder: FolderLike) -> float:
    """The guidance scale that the model recommends, else what is usual for its kind."""
    recommended = recommended_guidance_scale(folder)
    if recommended is not None:
        return recommended
    return XL_GUIDANCE_SCALE if is_xl(folder) else GUIDANCE_SCALE


def load_sampler(
    folder: FolderLike, prediction_type: str | None = None, zero_snr: bool = False, name: str = DEFAULT_SAMPLER
) -> SchedulerMixin:
    """The sampler SAMPLERS[`name`] on the noise schedule of the model in `folder`.

    The default is DPM-Solver++ (arXiv:2211.01095) with the noise levels of arXiv:2206.00364. Raises UserError where
    the schedule has zero terminal SNR (arXiv:2305.08891) and this sampler cannot handle it.
    """
    preset = SAMPLERS[name]
    scheduler_class = getattr(diffusers, preset.scheduler_class)
    with loading_errors(folder, "scheduler"):
        config = scheduler_class.load_config(folder, subfolder="scheduler")
        if zero_snr or config.get("rescale_betas_zero_snr"):
            _check_zero_snr(name, folder)
        return scheduler_class.from_config(config, **preset.config, **_overrides(prediction_type, zero_snr))


def _overrides(prediction_type: str | None, zero_snr: bool) -> dict[str, Any]:
    overrides: dict[str, Any] = {"prediction_type": prediction_type} if prediction_type else {}
    return overrides | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {})


def _check_zero_snr(name: str, folder: FolderLike) -> None:
    if not _supports_zero_snr(name):
        able = ", ".join(filter(_supports_zero_snr, SAMPLERS))
        raise UserError(f"--scheduler {name}: {folder} has zero terminal SNR, which needs one of {able}")


def _supports_zero_snr(name: str) -> bool:
    scheduler_class = getattr(diffusers, SAMPLERS[name].scheduler_class)
    return "rescale_betas_zero_snr" in inspect.signature(scheduler_class).parameters


def seeded_generator(seed: int) -> torch.Generator:
    """One picture's own randomness, on the CPU, so that neither its batch nor the device changes the picture."""
    return torch.Generator().manual_seed(seed)


def initial_noise(seed: int | torch.Generator, latent_shape: tuple[int, int, int]) -> torch.Tensor:
    """(C, h, w) noise of one picture, from its seed or its generator, on the CPU."""
    generator = seed if isinstance(seed, torch.Generator) else seeded_generator(seed)
    return torch.randn((1, *latent_shape), generator=generator)[0]


def sampling_conditions(pairs: Sequence[PromptPair], size: tuple[int, int], settings: SamplingSettings) -> Conditions:
    """Of pictures of `size` (height and width in pixels), the negative prompts first where they are used."""
    prompts, negatives = zip(*pairs, strict=True)
    embeddings = [*negatives, *prompts] if settings.is_guided else prompts
    return Conditions.join(embeddings, [whole_picture(*size)] * len(embeddings))


@torch.no_grad()
def generate_latents(
    unet: UNet2DConditionModel,
    sampler: SchedulerMixin,
    noise: torch.Tensor,
    conditions: Conditions,
    settings: SamplingSettings,
    generators: Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Scaled latents (B, C, h, w) from `noise` of that shape and the `sampling_conditions` of B pictures.

    Samplers that add noise between the steps take it from `generators`, one for each picture.
    """
    unet_inputs = conditions.to(unet.device, unet.dtype).unet_inputs()
    step_options = {"generator": list(generators)} if generators and is_stochastic(sampler) else {}
    sampler.set_timesteps(settings.steps, device=unet.device)
    latents = noise.to(unet.device) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        latent_model_input = sampler.scale_model_input(latents, t).to(unet.dtype)
        if settings.is_guided:
            latent_model_input = torch.cat([latent_model_input, latent_model_input])
        model_pred = unet(latent_model_input, t, **unet_inputs).sample.float()
        if settings.is_guided:
            model_pred = apply_guidance(model_pred, settings)
        latents = sampler.step(model_pred, t, latents, **step_options).prev_sample
    return latents


def apply_guidance(model_pred: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Classifier-free guidance (arXiv:2207.12598).

    (2B, C, h, w), the predictions for the negative prompts first, → (B, C, h, w).
    """
    noise_pred_uncond, noise_pred_text = model_pred.chunk(2)
    guided = noise_pred_uncond + settings.guidance_scale * (noise_pred_text - noise_pred_uncond)
    if settings.guidance_rescale > 0:
        guided = rescale_noise_cfg(guided, noise_pred_text, settings.guidance_rescale)
    return guided


def is_stochastic(sampler: SchedulerMixin) -> bool:
    """Whether the sampler may add noise between the steps."""
    return "generator" in inspect.signature(sampler.step).parameters


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> list[Image.Image]:
    """Pictures of scaled latents (B, C, h, w), decoded one at a time: decoding takes more memory than sampling.

    Where the memory does not suffice for a large one, it and all later ones are decoded in tiles.
    """
    return [_to_image(_decode(vae, latent[None].to(vae.dtype) / vae.config.scaling_factor)[0]) for latent in latents]


def _decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """(1, 3, H, W)"""
    try:
        return vae.decode(latents).sample
    except Exception as error:
        if vae.use_tiling or max(latents.shape[2:]) <= _tile_latent_size(vae) or not is_out_of_memory(error):
            raise
    print("not enough memory to decode a picture at once: in tiles, whose colours differ a little", flush=True)
    if latents.device.type == "cuda":
        torch.cuda.empty_cache()
    decode_in_tiles(vae)
    return vae.decode(latents).sample


def decode_in_tiles(vae: AutoencoderKL) -> None:
    """From now on larger pictures are decoded in overlapping tiles, which take less memory and differ a little."""
    vae.enable_tiling()
    vae.tile_sample_min_size = TILE
    vae.tile_latent_min_size = _tile_latent_size(vae)


def _tile_latent_size(vae: AutoencoderKL) -> int:
    return TILE // 2 ** (len(vae.config.block_out_channels) - 1)


def _to_image(pixel_values: torch.Tensor) -> Image.Image:
    pixels = (pixel_values / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu()
    return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
