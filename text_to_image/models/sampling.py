"""From noise to pictures: diffusers' samplers on the model's own schedule, and classifier-free guidance."""

import inspect
from collections.abc import Sequence

import diffusers
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image

from models.folders import FolderLike, loading_errors
from models.samplers import DEFAULT_SAMPLER, SAMPLERS
from models.text_encoding import join_embeddings
from runtime.errors import UserError


def load_sampler(
    folder: FolderLike, prediction_type: str | None = None, zero_snr: bool = False, name: str = DEFAULT_SAMPLER
):
    """The scheduler SAMPLERS[`name`] on the schedule in `folder`/scheduler; by default DPM-Solver++ (arXiv:2211.01095)
    with the noise levels of arXiv:2206.00364.

    UserError where the schedule ends in pure noise (arXiv:2305.08891) and the scheduler knows no such schedule.
    """
    chosen = SAMPLERS[name]
    settings = dict(chosen.settings)
    settings |= {"prediction_type": prediction_type} if prediction_type else {}
    settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    scheduler = getattr(diffusers, chosen.scheduler)
    with loading_errors(folder, "scheduler"):
        own = scheduler.load_config(folder, subfolder="scheduler")
        if (zero_snr or own.get("rescale_betas_zero_snr")) and not _knows_zero_snr(scheduler):
            able = [n for n, s in SAMPLERS.items() if _knows_zero_snr(getattr(diffusers, s.scheduler))]
            raise UserError(f"--scheduler {name}: {folder} has zero terminal SNR; it is drawn with {', '.join(able)}")
        return scheduler.from_config(own, **settings)


def _knows_zero_snr(scheduler: type) -> bool:
    return "rescale_betas_zero_snr" in inspect.signature(scheduler).parameters


def seeded_generator(seed: int) -> torch.Generator:
    """A picture's own source of noise, on the CPU: its batch and the device change nothing."""
    return torch.Generator().manual_seed(seed)


def initial_noise(seed: int | torch.Generator, latent_shape: tuple[int, int, int]) -> torch.Tensor:
    """(C, h, w), drawn on the CPU for one picture, from its seed or from its generator."""
    generator = seed if isinstance(seed, torch.Generator) else seeded_generator(seed)
    return torch.randn((1, *latent_shape), generator=generator)[0]


@torch.no_grad()
def generate_latents(
    unet,
    sampler,
    noise: torch.Tensor,
    prompts: Sequence[torch.Tensor],
    negatives: Sequence[torch.Tensor],
    guidance_scale: float,
    steps: int,
    guidance_rescale: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """(B, C, h, w) latents from as much noise and B prompt embeddings (L_i, D), each steered away from its negative.

    A guidance scale of 1 or less takes the prediction for the prompt alone, at half the cost. `guidance_rescale` is
    the phi of arXiv:2305.08891, section 3.4. Samplers that add noise on the way draw it from `generators`.
    """
    guided = guidance_scale > 1
    texts = [*negatives, *prompts] if guided else prompts
    hidden_states, mask = join_embeddings([text.to(unet.device, unet.dtype) for text in texts])
    sampler.set_timesteps(steps, device=unet.device)
    chance = {"generator": list(generators)} if generators and is_stochastic(sampler) else {}
    latents = noise.to(unet.device) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        scaled = sampler.scale_model_input(latents, t).to(unet.dtype)
        model_input = torch.cat([scaled, scaled]) if guided else scaled
        model_pred = unet(model_input, t, hidden_states, encoder_attention_mask=mask).sample.float()
        if guided:
            noise_pred_uncond, noise_pred_text = model_pred.chunk(2)
            model_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
            if guidance_rescale > 0:
                model_pred = rescale_noise_cfg(model_pred, noise_pred_text, guidance_rescale)
        latents = sampler.step(model_pred, t, latents, **chance).prev_sample
    return latents


def is_stochastic(sampler) -> bool:
    """Whether the sampler may add noise on the way."""
    return "generator" in inspect.signature(sampler.step).parameters


@torch.no_grad()
def decode_latents(vae, latents: torch.Tensor) -> list[Image.Image]:
    """Pictures of latents (B, C, h, w); one at a time, since decoding takes more memory than all the steps before."""
    return [
        _to_image(vae.decode(latent[None].to(vae.dtype) / vae.config.scaling_factor).sample[0]) for latent in latents
    ]


def _to_image(pixel_values: torch.Tensor) -> Image.Image:
    pixels = (pixel_values / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu()
    return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())
